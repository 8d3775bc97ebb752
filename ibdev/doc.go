// Package ibdev holds what RDS keeps per RDMA device, and finds the device of an address.
//
// A [Registry] maps local addresses to [Device]s and opens them on first use through the providers
// it was given. A Device owns a protection domain, completion queues, two shared receive queues
// with their buffers, and one memory region per slab region that a work request has named. It
// hands out [QP]s with their worst-case completions reserved, and brings completions to
// their [QPHandler]s in batches.
//
// # References
//
// Lookup happens inside an epoch: enter, read the table, TryGet, exit. Each QP holds a reference to
// its device, each listener of ours one, each memory region in use one, the registry one. References have names, and
// audits (Registry.Close, Device.Close) say who holds what. The last Put may come from a completion handler and
// therefore only schedules the teardown, which has a goroutine of its own.
//
// # Removal
//
// A device that was unplugged, has failed or is closed leaves the table at once; whoever asked for it is told (OnRemove), then
// the QPs; then the registry gives up its reference. Users let go in their own time, and the teardown follows the last of them.
// The address can be opened again before that if the device is really gone, and after it if it only failed.
// Await waits for a device to appear, by news of its provider.
//
// # Memory
//
// Send and receive memory is slab memory and belongs to the Service; a device owns only its
// memory regions over it. Removing a device never waits for an application that still holds a
// receive buffer: the buffer goes back to the slab when it is put.
//
// # Limitations
//
// Shared receive queues grow and do not shrink below what they grew to, although
// buffers that were lent beyond that go back to the slab. Counters of a device go with it, except for
// Registry.Completions.
package ibdev
