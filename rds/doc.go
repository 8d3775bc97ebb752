// Package rds is Reliable Datagram Sockets in userspace: one socket talks to every peer of a
// cluster, and datagrams of up to 1 MiB arrive once, in order and whole.
//
//	svc, err := rds.Open(rds.Config{})
//	sock, err := svc.ListenPacket(ctx, "10.0.0.1:4000")
//	n, err := sock.WriteTo(p, addr)
//	n, from, err := sock.ReadFrom(p)
//
// A [Service] owns the devices, the connections and the memory; several may live in one process and
// share nothing. A [Socket] is a bound port. There are no connections to manage: all sockets of a
// pair of hosts share one, which is made at the first datagram and made again whenever it breaks.
//
// # Guarantees
//
// Datagrams from one socket to one destination (address, port, type of service) arrive exactly
// once, in the order of the calls, as long as both processes live. A write returns when the datagram is queued
// here; it is never lost to a bad network or to a peer that is not there yet. A datagram for a port that nobody
// bound, or whose socket closes before it is read, vanishes without a word to its sender, as
// the RDS specification has it (rds-protocol spec 1.10); [Service.Stats] of the receiver counts it.
//
// A write blocks while the destination port is congested (its reader is slow) or the socket's send
// buffer is full, until its deadline; the error then matches both [os.ErrDeadlineExceeded] and its
// cause, [ErrCongested] or [ErrNoBufferSpace].
//
// # Concurrency
//
// Every method may be called from any goroutine. Close wakes everything that is blocked in its
// socket. A deadline or a Close never waits for a reader or a writer.
//
// A goroutine that is about to wait first does the provider's work itself for a moment ("who waits,
// works"): the Go scheduler may take milliseconds to start the goroutine that would otherwise do it.
//
// # Memory
//
// [Socket.ReadFromAddrPort] and [Socket.WriteToAddrPort] copy and do not allocate, nor do [Socket.ReadBatch] and
// [Socket.WriteBatch], which move many datagrams in one call. [Socket.Receive] lends the datagram until [Message.Release] and
// does not allocate either. [Socket.Alloc] lends memory to write a datagram into, from which it is sent without another copy.
// Everything that a peer or a forgotten Release can make grow is bounded by [Config]; built with -tags invariants,
// [Service.Close] names the calls whose loans are still out.
//
// # Waiting
//
// Deadlines and contexts end every wait, for a congested destination too. Calls whose name begins with Try never wait; [Socket.ReadMsg]
// has the flags of recvmsg. [Socket.SyscallConn] gives a descriptor to poll beside others. [Message].Notify asks for a
// [Completion] when the peer has acknowledged a datagram.
//
// One destination holds at most half of a send buffer that others use too, so one that takes nothing does not stop the rest.
//
// # Coming from net, or from the kernel's RDS
//
// [ListenConfig] and [Dialer] have the shapes of package net's; a Socket is a [net.PacketConn], and once connected a [net.Conn]. Doc
// comments name the kernel's options and control messages, and each error matches the kernel's errno: docs/compatibility.md
// lists all of them.
//
// # RDMA
//
// A [Region] is memory that peers may read or write by its [Cookie], which travels with a datagram ([Message].Cookie,
// [Socket.SendMapped]) or in any other way. They do so with an operation that is executed before a datagram of theirs
// ([Message].RDMA): whoever receives that knows that it has been. How an operation ended is told by
// [Socket.ReadCompletion] to who asks for it. Doc comments name the kernel's counterparts.
//
// # Limitations
//
// Only ListenConfig and Dialer resolve names. Masked atomics are not there: no device has them. An address of a
// host belongs to one Service.
package rds
