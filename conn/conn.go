package conn

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/conn/ib"
)

// Conn is the connection of a pair of hosts for one type of service. It exists from the first Get
// or the first request of the peer until the Manager is closed, through any number of incarnations (links); one that only its peer has asked
// for, until it is idle (idle.go).
type Conn struct {
	m      *Manager
	site   *site // what connections of the local address share
	peer   *Peer
	local  netip.Addr
	remote netip.Addr
	tos    uint8
	state  stateVar    // see State
	named  atomic.Bool // somebody here has it: it stays

	mu sync.Mutex // see the package comment for its place in the lock order

	// The send side; all guarded by mu.
	q         sendQueue
	link      *ib.Link      // the incarnation; nil in down
	up        bool          // link may be posted to
	open      bool          // the peer is one of us
	frag      int           // payload of a SEND if it takes one fragment each; 0: SENDs are runs
	closed    bool          // Manager.Close is through with it: nothing is accepted
	upWait    chan struct{} // closed when up, or closed, turns true: WaitUp
	upWaiters int
	txBusy    bool // there is a transmitter
	txIdle    chan struct{}
	flush     bool   // post what there is, full or not, until the queue is empty
	ackNow    bool   // an acknowledgement is due
	ackArmed  bool   // the delayed acknowledgement's timer runs
	ackAtArm  uint64 // ackSent when it was set
	ackNext   uint64 // last sequence received
	ackSent   uint64 // the last one posted
	asked     uint64 // open: sequence after the last message that asked for an acknowledgement
	mapDue    bool   // our congestion map has changed, or the peer knows none
	mapKnown  bool   // the peer knows the map as it was after change mapVer
	mapVer    uint64
	mapDelta  uint64 // deltas sent since the whole map
	deltas    bool   // the peer takes them
	markDue   bool   // our mark is to be sent, before anything else

	sendQueued uint64 // counters
	contention uint64

	// Ports, modulo 64, that the peer has sent to since the last look of the heartbeat, and before that (congestion.go).
	lately, before atomic.Uint64

	delivered atomic.Uint64 // batches of messages; written by the receive handler
	reapSeen  uint64        // delivered at reapAt; both are the reaper's, under Manager.mu
	reapAt    time.Time

	// Timers, made on first use.
	ackTimer *time.Timer
	askTimer *time.Timer
	askArmed bool
	tick     *time.Timer
	beat     heartbeat
	pings    pings

	ctl control // guarded by mu

	// The transmitter's: a batch of SENDs, and up to which message each has sent everything, exclusive.
	sends [ib.BatchMax]ib.Send
	ends  [ib.BatchMax]uint64

	// rx belongs to the receive handler of the link's device, and to the control side while there is no link.
	rx rxState
}

// Local is the local address.
func (c *Conn) Local() netip.Addr { return c.local }

// Remote is the peer's address.
func (c *Conn) Remote() netip.Addr { return c.remote }

// TOS is the type of service.
func (c *Conn) TOS() uint8 { return c.tos }

// State is the state of this moment.
func (c *Conn) State() State { return c.state.load() }

func (c *Conn) String() string {
	if c.tos != 0 {
		return fmt.Sprintf("%v-%v/%d", c.local, c.remote, c.tos)
	}
	return fmt.Sprintf("%v-%v", c.local, c.remote)
}

// Send is SendMsg without flags.
func (c *Conn) Send(o Owner, srcPort, dstPort uint16, payload []byte) error {
	return c.SendExtra(o, srcPort, dstPort, payload, 0, nil)
}

// SendMsg is SendExtra without an Extra.
func (c *Conn) SendMsg(o Owner, srcPort, dstPort uint16, payload []byte, flags SendFlags) error {
	return c.SendExtra(o, srcPort, dstPort, payload, flags, nil)
}

// SendExtra queues a copy of payload, at most MaxMessage bytes, as one datagram to dstPort of the peer, with x if that is not
// nil; if x has a Buffer that is the payload, and not copied. o's Released tells when it is no longer kept. It never waits; it may post what is queued on the caller's
// goroutine, and starts connecting if the connection is down. Datagrams of one goroutine go out in
// order. Errors, which leave nothing queued: ErrNoMemory, ErrClosed, ErrMessageTooLong; for an operation ErrTooManyPieces and
// verbs.ErrDeviceGone.
func (c *Conn) SendExtra(o Owner, srcPort, dstPort uint16, payload []byte, flags SendFlags, x *Extra) error {
	n, buffer := len(payload), x != nil && x.Buffer != nil
	if buffer {
		n = x.Buffer.Len()
	}
	if n > MaxMessage {
		return ErrMessageTooLong
	}
	var f uint8
	if flags&AckNow != 0 {
		f = msgAckNow
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return ErrClosed
	}
	var (
		seq   uint64
		first []byte
		ok    bool
	)
	if x == nil {
		seq, first, ok = c.q.append(o, srcPort, dstPort, n, c.ackNext, f, nil)
	} else {
		if err := c.checkExtra(x); err != nil {
			c.mu.Unlock()
			return err
		}
		seq, first, ok = c.appendExtra(o, srcPort, dstPort, n, f, x)
	}
	if !ok {
		c.mu.Unlock()
		c.m.count.sendNoMemory.Inc()
		return ErrNoMemory
	}
	c.sendQueued++
	switch {
	case buffer:
	case n <= copyLocked:
		copy(first, payload)
	default:
		c.copyIn(seq, payload)
	}
	switch {
	case !c.up:
		c.kickLocked()
		c.mu.Unlock()
	case c.txBusy:
		c.contention++
		c.mu.Unlock()
	case !c.mayPost() || flags&More != 0 && !c.q.runFull():
		c.mu.Unlock()
	default:
		c.transmitLocked()
	}
	return nil
}

// copyIn copies a payload that is longer than copyLocked, without the lock, and has each piece sent as soon as it is
// there: the peer is at work on a large message while the rest is copied. It is called with mu held and returns so.
func (c *Conn) copyIn(seq uint64, payload []byte) {
	var parts [maxPieces][]byte
	n := c.q.pieces(seq, &parts)
	have := 0
	c.mu.Unlock()
	for _, p := range parts[:n-1] {
		have += copy(p, payload[have:])
		c.mu.Lock()
		c.q.copied(seq, have)
		if c.up && !c.txBusy && c.mayPost() {
			c.transmitLocked()
		} else {
			c.mu.Unlock()
		}
	}
	copy(parts[n-1], payload[have:])
	c.mu.Lock()
	c.q.ready(seq)
	if c.q.copying == 0 && c.ctl.copied != nil {
		close(c.ctl.copied)
		c.ctl.copied = nil
	}
}

// Flush posts what is queued, full SEND or not: the caller is about to wait.
func (c *Conn) Flush() {
	c.mu.Lock()
	if !c.up || c.q.next == c.q.tail {
		c.mu.Unlock()
		return
	}
	c.flush = true
	c.transmitLocked()
}

// PeerCongested reports whether port is congested in the last map the peer sent.
func (c *Conn) PeerCongested(port uint16) bool { return c.peer.cong.test(port) }

// Cancel takes back the messages of o to dstPort (-1: to all ports) that the peer has not acknowledged, and returns
// how many. o's Released has been called for them when it returns. Those on their way already
// may still arrive. Source: rds-protocol spec 1.7.
func (c *Conn) Cancel(o Owner, dstPort int) int {
	var r released
	total := 0
	c.mu.Lock()
	for from := c.q.una; ; {
		end, n := c.q.cancelRange(o, dstPort, from, &r)
		total += n
		c.emptyLocked()
		done := end == c.q.tail
		c.mu.Unlock()
		r.tell()
		if done {
			break
		}
		from = end
		c.mu.Lock()
	}
	c.m.count.sendCancelled.Add(uint64(total))
	return total
}

// Info is a snapshot of the connection.
func (c *Conn) Info() Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := Info{
		Local: c.local, Remote: c.remote, TOS: c.tos, State: c.state.load(),
		PeerIsKernel: c.peer.kernel.Load(), PeerInc: c.peer.inc.Load(),
		NextTX: c.q.tail, NextRX: c.rx.expectedSeen.Load(),
		QueuedMsgs: c.q.queued(), QueuedBytes: c.q.bytes, UnsentMsgs: c.q.unsent(),
		Established: c.ctl.established,
	}
	if c.ctl.lastErr != nil {
		i.LastError = c.ctl.lastErr.Error()
	}
	if c.up {
		i.Device = c.link.Device().Name()
		i.QPN, i.PeerQPN = uint32(c.link.QPN()), uint32(c.ctl.peerQPN)
		i.MaxSendWR, i.MaxSendSGE, i.MaxRecvWR = c.link.Limits()
		i.MaxMRs, i.MRPages = c.link.Device().Pools().Limits()
	}
	i.PeerCongestedPorts = int(c.peer.cong.count.Load())
	return i
}

// QueuedMessages describes up to limit messages that are not acknowledged, oldest first.
func (c *Conn) QueuedMessages(limit int) []QueuedMessage {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]QueuedMessage, 0, min(limit, c.q.queued()))
	for s := c.q.una; s != c.q.tail && len(out) < limit; s++ {
		m := c.q.msg(s)
		if m.flags&msgCancelled != 0 {
			continue
		}
		out = append(out, QueuedMessage{Local: c.local, Remote: c.remote, SrcPort: m.sport, DstPort: m.dport, TOS: c.tos,
			Seq: s, Len: int(m.len), Sent: s < c.q.next || s == c.q.next && c.q.nextOff > 0})
	}
	return out
}
