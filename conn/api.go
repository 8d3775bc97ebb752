package conn

import (
	"net/netip"
)

// Sink is what a Manager delivers to: the sockets of a Service. Its methods run in completion
// handlers: they may not wait, and may not call back into the Manager except where said.
type Sink interface {
	// Deliver hands over messages that arrived on c, in order, each complete. It returns how many it
	// took; n < len(msgs) says that msgs[n] would pass the hard bound of what one peer may
	// have queued here: the connection is then reset, msgs[n:] stay unacknowledged, and the peer
	// will send them again. A message for a port nobody bound is taken and counted by the Sink.
	//
	// msgs and what they point to belong to the connection once Deliver has returned, except
	// buffers the Sink took with RecvBuf.Get.
	Deliver(c *Conn, msgs []Incoming) (n int)

	// PeerMapChanged says that the congestion map of remote, as seen by connections from local, was
	// replaced; cleared reports whether any bit went from 1 to 0. Writers that wait for
	// a port of remote look again (Conn.PeerCongested).
	PeerMapChanged(local, remote netip.Addr, cleared bool)

	// PeerDown and PeerUp report that a peer could not be reached for the dead-peer time (default
	// 10 s) and that it is reachable again.
	PeerDown(local, remote netip.Addr)
	PeerUp(local, remote netip.Addr)
}

// Owner is who a sent message is accounted to (a socket). Released runs in completion handlers or
// in the caller of Conn.Cancel: it may not wait.
type Owner interface {
	// Released reports that msgs messages with together bytes of payload of this owner were
	// acknowledged by the peer, or dropped with the connection at Manager.Close.
	Released(msgs, bytes int)
}

// Incoming is one received datagram.
type Incoming struct {
	Seq     uint64
	Len     int // payload bytes of the whole message
	SrcPort uint16
	DstPort uint16
	First   Frag   // the first (nearly always the only) piece; empty for a zero-length message
	More    []Frag // further pieces in order
}

// Frag is a piece of a message in a receive buffer.
type Frag struct {
	Buf  *RecvBuf
	Data []byte
}
