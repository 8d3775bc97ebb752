// Package conn is RDS between pairs of hosts: connections that carry the datagrams of all sockets,
// reliably, in order, exactly once between two live incarnations.
//
// A [Manager] holds the connections of a Service: one [Conn] per (local address, remote address, type
// of service). It delivers to a [Sink] and accounts to [Owner]s; it knows port numbers, not sockets.
//
//	state.go     the states and their one way of moving
//	site.go      a local address: its device and listener, without a device the wait for one
//	congestion.go  maps of congested ports, both ways
//	control.go   connect, accept, shut down, back off: one goroutine, only while there is such work
//	accept.go    requests of peers; duels
//	sendq.go     messages accepted and not acknowledged, in slab chunks
//	pack.go      SENDs out of them, in both dialects
//	transmit.go  the transmitter of the moment
//	rdma.go      operations before messages, cookies
//	mapping.go   memory that peers may touch
//	receive.go   headers, duplicates, reassembly, delivery
//	ack.go       acknowledgements, both ways
//	ping.go      pings, pongs, heartbeats
//	peer.go      what the connections of a pair of hosts share
//	idle.go      connections that only peers have asked for
//	conn/ib      one QP of a connection: handshake, posting, drain
//
// # The two owners of the data path
//
// Whoever has something to send becomes the transmitter, or leaves its message to the one at work. The
// receive handler of the device owns the receive state (Conn.rx). What both need is under
// Conn.mu, which is held for a few hundred nanoseconds and never across a call down (posting) or up
// (Sink, Owner).
//
// # When is what posted
//
// At once, if no SEND of this connection is in flight. Otherwise when a full SEND has gathered, when the
// last SEND in flight has completed, when a caller is about to wait (Flush), or with the
// acknowledgement of a batch. So an idle connection has no delay and a busy one full SENDs.
//
// # Acknowledgements
//
// Every SEND carries the sequence of the last message received. A frame of its own goes out at the end of a batch with an
// ACK_REQUIRED message, unless data does, and within 10 ms of anything else. Between two of ours the last
// message of a SEND asks, unless it was alone and nothing else was in flight; towards a kernel every
// ninth does, as its budget wants, and a ping if messages stay unacknowledged.
//
// # Lock order
//
// Manager.mu, then Conn.mu, then site.mu, then what the slab has. Peer.mu is held alone.
//
// # Limitations
//
// Connections that were asked for here are never freed, only their memory is trimmed. Incarnations of a kernel cannot
// be told apart: what the specification says about its restart applies.
package conn
