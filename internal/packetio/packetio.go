// Package packetio is the boundary between softroce and whatever carries its UDP datagrams: a real
// socket (verbs/softroce) or a simulated network (internal/simnet).
//
// A train is a run of datagrams of equal length (the last may be shorter) that travel as one: UDP
// GSO on transmit, GRO on receive. A datagram is a train of one.
package packetio

import (
	"errors"
	"net/netip"
	"time"
)

// MaxTrainBytes bounds the UDP payload of a train (65535 less IPv6 and UDP headers, rounded down).
const MaxTrainBytes = 65480

// MaxTrainSegs is the kernel's bound on segments of one GSO send.
const MaxTrainSegs = 64

// ErrWouldBlock is what Send returns when the socket takes no more now; Wait with wantWrite tells
// when it does again.
var ErrWouldBlock = errors.New("packet socket would block")

// TxTrain is a train to send. The concatenation of Vec is its UDP payload; when Segs > 1 it is
// Segs datagrams of SegSize bytes each, the last one of 1..SegSize.
type TxTrain struct {
	To      netip.AddrPort
	TOS     uint8
	Segs    int
	SegSize int
	Vec     [][]byte
}

// RxTrain is a received train. Data belongs to the Conn and is valid until the next Recv.
type RxTrain struct {
	From    netip.AddrPort
	Data    []byte
	SegSize int // datagram size; == len(Data) for a single one
	TOS     uint8
	TTL     uint8
	Placed  bool // see Placer
}

// Caps describe a Conn.
type Caps struct {
	MTU        int  // IP MTU of the egress interface of the local address
	GSO        bool // Send takes trains of more than one
	RecvBuffer int  // granted receive buffer in bytes as the kernel accounts it (SO_RCVBUF), 0 unknown
}

// Conn carries datagrams of one local address and port. Recv, Send and Wait are each called by one
// goroutine at a time, but Wait may run beside Send and Recv; Wake and Close by any, Unplug as it says.
type Conn interface {
	LocalAddr() netip.AddrPort
	Caps() Caps
	// PathMTU is the IP MTU towards remote as far as known locally (interface MTU of the route).
	PathMTU(remote netip.Addr) int
	// Recv fills ts with trains that are here already and returns how many; it does not wait.
	Recv(ts []RxTrain) (int, error)
	// Send sends ts in order and returns how many trains went out. ErrWouldBlock: ts[n:] should be
	// offered again when Wait reports room. Any other error concerns ts[n] alone, which is
	// then to be counted and skipped.
	Send(ts []TxTrain) (int, error)
	// Wait returns when there is something to receive, or with wantWrite when there is room to send (then
	// what there is to receive does not count: it is not wanted yet); when Wake was called since
	// the last Wait returned; or at deadline (zero: none). net.ErrClosed after Close.
	Wait(deadline time.Time, wantWrite bool) error
	Wake()
	// Dropped is the running count of datagrams the receive buffer could not take (SO_RXQ_OVFL).
	Dropped() uint64
	// Unplug gives address and port back: somebody else may Listen there once it has returned. What has arrived is
	// gone, and what is sent from now on is lost, as if on the wire; Wait and Wake go on as before. Not beside Recv
	// or Send.
	Unplug()
	Close() error
}

// Sleeper is implemented by Conns where a packet's arrival wakes a thread at a cost, which is wasted when
// somebody polls Recv anyway.
type Sleeper interface {
	// Sleep is Wait without regard to packets that arrive, until Arm is called.
	Sleep(deadline time.Time) error
	// Arm ends the disregard: from now on an arrival ends the Sleep. Safe beside everything else.
	Arm()
}

// Layout is the shape of a train: Segs datagrams, each of Hdr bytes of headers, Payload bytes, and Tail
// bytes behind them.
type Layout struct{ Hdr, Payload, Tail, Segs int }

// Size is the length of the whole train.
func (l Layout) Size() int { return l.Segs * (l.Hdr + l.Payload + l.Tail) }

// Placer is implemented by Conns that can receive the payloads of an expected train where they belong,
// which saves the copy from a receive buffer.
type Placer interface {
	// RecvPlaced is Recv of at most len(places) trains. A train i of exactly the layout l is Placed: its payloads
	// are in places[i] (l.Segs*l.Payload bytes), one behind the other, and its Data is the rest: Hdr
	// and Tail bytes of the first datagram, then of the second, and so on. Any other train is as Recv's. What
	// is in places of trains that are not Placed is undefined.
	RecvPlaced(ts []RxTrain, l Layout, places [][]byte) (int, error)
	// Linear undoes the placing of train i: its Data as Recv would have it.
	Linear(i int) []byte
}

// Network makes Conns.
type Network interface {
	// Listen binds a Conn to local. ErrAddrInUse-like errors name the address.
	Listen(local netip.AddrPort) (Conn, error)
}
