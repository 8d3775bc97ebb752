package conn

import (
	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

const (
	// reservedSlots of the ring are kept from data: acknowledgements and a map always find room. Four acknowledgement
	// frames (a lost one is noticed at once only if something follows it), a map of two, our mark.
	reservedSlots = 7
	maxAckFrames  = 4
	// txRounds bounds how many batches one caller posts in a row before a worker takes over: with full SENDs 8 MiB, with
	// small ones 128 SENDs.
	txRounds = 8
	// kernelRun is how many messages, or a message of how many bytes, make a full run towards a kernel: its SENDs are
	// not packed, but leave in one batch.
	kernelRun      = 16
	kernelRunBytes = 4 * rdshdr.FragLen
	// bigMessage is how much of a message has been sent when its end no longer waits for company: a SEND that is not full is
	// nothing beside the others, and the receiver can do nothing before it.
	bigMessage = 4 * pieceLen
	// askEvery is after how many messages at most one asks for an acknowledgement between two of ours.
	askEvery = 64
)

// mayPost decides whether data is posted now: see the package comment.
func (c *Conn) mayPost() bool {
	return c.flush || c.link.Outstanding() == 0 || c.q.nextOff >= bigMessage || c.runReady()
}

// runReady reports whether there is a full SEND, or what takes its place towards a kernel.
func (c *Conn) runReady() bool {
	if c.frag == 0 {
		return c.q.runFull()
	}
	if c.q.nextOff > 0 || c.q.unsent() >= kernelRun {
		return true
	}
	if c.q.unsent() == 0 {
		return false
	}
	m := c.q.msg(c.q.next)
	return m.len >= kernelRunBytes || m.flags&msgSide != 0
}

// transmitLocked posts what is due, unless somebody is at it. It is called with mu held and returns with
// it released. Whoever leaves a message does so under mu, and the holder looks at the
// queue under mu before it goes: nothing is left behind.
func (c *Conn) transmitLocked() {
	if c.txBusy || !c.up {
		c.mu.Unlock()
		return
	}
	c.txBusy = true
	c.transmitRounds()
}

// transmitRounds is the transmitter's loop; mu and the role are held, and given up.
func (c *Conn) transmitRounds() {
	for round := 0; c.up; {
		l := c.link
		if round == txRounds && c.q.unsent() > 0 && l.Free() > reservedSlots {
			c.mu.Unlock()
			go c.work() // the role goes with it
			return
		}
		b := c.build(l)
		if b.op != nil {
			c.postOp(l, b.op)
			continue
		}
		if b.n == 0 {
			break
		}
		round++
		c.mu.Unlock()
		n, _ := l.Post(c.sends[:b.n]) // an error has gone to LinkBroken
		b.account(c.m, n)
		c.mu.Lock()
		if n > 0 { // with an error too: what the QP took may have arrived
			c.q.handed = max(c.q.handed, c.ends[n-1])
		}
	}
	c.txBusy = false
	if c.txIdle != nil {
		close(c.txIdle)
		c.txIdle = nil
	}
	c.mu.Unlock()
}

// work goes on where a caller has done its share.
func (c *Conn) work() {
	c.mu.Lock()
	c.transmitRounds()
}

// built is what a batch of SENDs contains.
type built struct {
	n       int // SENDs
	msgs    uint64
	bytes   uint64
	retrans int
	acks    int
	piggy   bool
	asked   int
	op      *op // to be posted, instead of any SENDs
}

func (b *built) account(m *Manager, posted int) {
	k := &m.count
	k.sendSends.Add(uint64(posted))
	if b.bytes > 0 {
		k.sendMessages.Add(b.msgs)
		k.sendBytes.Add(b.bytes)
	}
	if b.retrans > 0 {
		k.sendRetransmit.Add(uint64(b.retrans))
	}
	if b.asked > 0 {
		k.sendAckRequired.Add(uint64(b.asked))
	}
	if b.acks > 0 {
		k.ackSent.Inc()
	} else if b.piggy {
		k.ackPiggybacked.Inc()
	}
}

// build fills c.sends, and c.ends beside it, with what is to be posted now, in order: our mark, our map, data, and an acknowledgement
// frame if one is due and nothing else carries it. Transmitter, mu held.
func (c *Conn) build(l *ib.Link) (b built) {
	free := l.Free()
	carried := false // the last SEND so far carries ackNext
	if c.markDue && free > 0 {
		s := &c.sends[0]
		*s = ib.Send{Kind: ib.Control, Solicited: true, HeaderLen: rdshdr.MarkLen}
		mark := c.mark(l)
		mark.Put(l.Header(0))
		b.n++
		c.markDue = false
	}
	if c.mapDue && !c.markDue && !c.midMessage() && free >= b.n+2 {
		carried = c.buildMap(l, &b)
	}
	first := c.q.next
	for i := range b.n {
		c.ends[i] = first
	}
	outstanding := l.Outstanding()
	data := 0
	for b.n < len(c.sends) && b.n < free-reservedSlots && c.q.next != c.q.tail && !c.markDue && (!c.mapDue || c.midMessage()) {
		if c.q.skipCancelled(); c.q.next == c.q.tail {
			break
		}
		if o, wait := c.q.opDue(); o != nil || wait {
			if b.n > 0 || wait {
				break
			}
			if l.OpWRs(len(o.SGs)) <= min(free, l.Ring())-reservedSlots || l.OpWRs(len(o.SGs)) > l.Ring()-reservedSlots {
				b.op = o
				return b
			}
			c.m.count.txRingFull.Inc()
			break
		}
		s := &c.sends[b.n]
		fence := c.q.fence()
		idle := outstanding+data == 0 || c.flush || c.q.nextOff >= bigMessage
		if c.frag == 0 {
			ask := outstanding+data > 0 || c.q.next-c.asked >= askEvery || c.q.runFull()
			ok, retrans := c.q.packRun(s, c.ackNext, ask, !idle)
			if !ok {
				break
			}
			b.retrans += retrans
			b.bytes += uint64(s.Pieces[0].Len)
			if ask {
				b.asked++
				c.asked = c.q.next
			}
			carried = true
		} else {
			if data == 0 && !idle && !c.runReady() {
				break
			}
			ok, retrans, asked := c.q.packFragment(s, l.Header(b.n), c.frag, c.ackNext)
			if !ok {
				break
			}
			if retrans {
				b.retrans++
			}
			if asked {
				b.asked++
			}
			for i := range s.Pieces[:s.N] {
				b.bytes += uint64(s.Pieces[i].Len)
			}
			carried = c.q.cutAck == c.ackNext
		}
		s.Fence = fence
		c.ends[b.n] = c.q.next
		data++
		b.n++
	}
	if c.q.next == c.q.tail {
		c.flush = false
	} else if free <= reservedSlots {
		c.m.count.txRingFull.Inc()
	}
	b.msgs = c.q.next - first
	switch {
	case carried:
		b.piggy = c.ackNow
		c.ackNow, c.ackSent = false, c.ackNext
	case c.ackNow && !c.markDue && b.n < free && b.n < len(c.sends) && l.AcksInFlight() < maxAckFrames && !c.midMessage():
		c.sends[b.n] = ib.Send{Kind: ib.Ack, Solicited: true, HeaderLen: hdrLen}
		rdshdr.Put(l.Header(b.n), 0, c.ackNext, 0, 0, 0, 0, 0)
		c.ends[b.n] = c.q.next
		b.n++
		b.acks = 1
		c.ackNow, c.ackSent = false, c.ackNext
	}
	if data > 0 && !c.open {
		c.armAsk()
	}
	return b
}

// midMessage reports whether a message to a kernel is cut halfway. Its headers carry the acknowledgement of the
// first one, and a kernel believes the last SEND of a batch alone: a newer frame in between would be
// hidden by the fragments behind it, so it waits for the end of the message.
func (c *Conn) midMessage() bool { return c.frag != 0 && c.q.nextOff > 0 }

// buildMap adds what is due of our congestion map, if anything is, which carries the acknowledgement too. It reports whether it did:
// without memory for the map it is tried again later.
func (c *Conn) buildMap(l *ib.Link, b *built) bool {
	u, err := c.site.mapSince(c.mapVer, !c.mapKnown, c.deltas)
	if err != nil {
		return false
	}
	c.mapDue, c.mapKnown, c.mapVer = false, true, u.ver
	if u.chunk == nil {
		return false // it came with an earlier one
	}
	if u.len > 0 {
		c.mapDelta++
		c.m.count.congDeltasSent.Inc()
		rdshdr.Put(l.Header(b.n), c.mapDelta, c.ackNext, uint32(u.len), 0, 0, rdshdr.FlagCongDelta, 0)
		c.sends[b.n] = ib.Send{Kind: ib.Control, Solicited: true, HeaderLen: hdrLen, N: 1, Pieces: [2]ib.Piece{{Chunk: u.chunk, Len: u.len}}}
		b.n++
		return true
	}
	c.mapDelta = 0
	parts := 2
	if c.frag == 0 {
		parts = 1
	}
	size := rdshdr.CongMapLen / parts
	for i := range parts {
		if i > 0 {
			u.chunk.Get() // one for each piece
		}
		rdshdr.Put(l.Header(b.n), 0, c.ackNext, rdshdr.CongMapLen, 0, 0, rdshdr.FlagCongBitmap, 0)
		c.sends[b.n] = ib.Send{Kind: ib.Control, Solicited: i == parts-1, HeaderLen: hdrLen, N: 1,
			Pieces: [2]ib.Piece{{Chunk: u.chunk, Off: i * size, Len: size}}}
		b.n++
	}
	return true
}
