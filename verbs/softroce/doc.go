// Package softroce is a verbs provider in pure Go: a RoCEv2 endpoint (RC, UD and the GSI with its
// own IB CM) over ordinary UDP sockets. Its peers are other softroce devices, the Linux kernel's
// soft RoCE (rdma_rxe) and RoCE NICs.
//
// A device is one local IP address with one UDP socket on port 4791. There is no other hardware:
// everything a NIC does runs under the device's engine role.
//
// # The engine role
//
// All state of a device's QPs past the rings that posts append to is touched only by the holder of
// the engine role, a mutex that data-path callers only ever try:
//
//   - the engine goroutine, woken by its socket, a timer or Wake;
//   - whoever posts: it runs the requester (packets out, never handlers), so an idle QP sends
//     from its caller's own stack;
//   - whoever is about to wait (Device.Progress): it does all there is to do.
//
// Somebody who finds the role taken leaves a note (device.kicks) and goes; the holder looks at the
// notes after it has let go of the role. Control calls (Modify, Close, Deregister) lock it.
//
// One step of the engine: receive a batch, run responder and completer on each packet, run due
// timers, let requesters send, call handlers of CQs with news, send acknowledgements; everything
// that leaves in one step leaves in as few system calls as the sizes allow.
//
// # Devices that come and go
//
// Provider.Remove and Add take the device of an address away and give it back. On the network of the host, while somebody
// watches (Provider.WatchDevices), an interface that goes down or an address that is deleted does the same. See
// watch.go for what becomes of a removed device.
//
// # On-demand paging
//
// A region of RegOnDemandMR has a page table and pins nothing. The engine, which may not wait, pauses a QP whose page is absent, and
// a worker brings the page in. See odp.go, and docs/memory.md for the whole of it.
//
// # Limitations
//
// One port, P_Key 0xFFFF, no LAP/APR, no UC, no XRC. IPv4 peers that send without DF are dropped (their ICRC cannot be told from
// corruption with confidence: rocev2 spec 2.8).
package softroce
