package conn

import (
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
)

// What a few messages have beside their payload is in a table beside the queue, by sequence: extensions of the
// header, and an operation that is executed before the message.
//
// An operation is posted by the transmitter when its message comes to the cursor, as requests of their own on the
// message's QP, so it is executed before everything behind it. A message with one begins a chunk and fills it: no SEND
// packs it with others, and none waits for company to go with it. It is posted once in its life:
//
//	queued ──PostOp──▶ in flight ──completion, flush, drain──▶ done
//	   ▲        │
//	   └────────┘ the link broke before anything was posted
//
// If it succeeded the message goes on as any other, and is sent again on a new connection; the operation is not. If it
// failed, or nobody knows, the message is taken out of the queue: its receiver would believe what is not
// so.

// side is what a message has beside its payload. It lives from append to pop.
type side struct {
	ext [rdshdr.ExtAreaLen]byte
	op  *op // until it is done
}

// op is an operation and its message, in the caller's RDMA: nothing points to it once the owner has been told. Guarded by Conn.mu,
// except for what the link has while it is in flight.
type op struct {
	ib.Op
	c         *Conn
	r         *RDMA
	seq       uint64
	state     opState
	alone     bool // there is no SEND
	acked     bool // the peer has the message, and so whatever was executed before it
	cancelled bool
}

type opState uint8

const (
	opQueued opState = iota
	opPosted         // or being posted
	opDone
)

// reads reports whether the operation brings something here, which may come after what is sent behind it.
func (o *op) reads() bool { return o.Opcode != verbs.OpWrite }

// checkExtra is why x cannot be sent at all.
func (c *Conn) checkExtra(x *Extra) error {
	switch r := x.RDMA; {
	case r == nil:
	case len(r.SGs) > c.m.maxPieces:
		return ErrTooManyPieces
	case r.Device.Gone(): // dropOps, which looks later, finds the others
		return verbs.ErrDeviceGone
	}
	return nil
}

// appendExtra is sendQueue.append for a message with x.
func (c *Conn) appendExtra(owner Owner, sport, dport uint16, n int, flags uint8, x *Extra) (seq uint64, first []byte, ok bool) {
	q := &c.q
	var s side
	flags |= msgSide
	if r := x.RDMA; r != nil {
		flags |= msgOp
		s.op = &r.op
		r.op = op{c: c, r: r, alone: r.Silent && n == 0}
		r.op.Op = ib.Op{Opcode: r.Opcode, SGs: r.SGs, RKey: r.RKey, RemoteAddr: r.RemoteAddr, CompareAdd: r.CompareAdd, Swap: r.Swap, Owner: &r.op}
		if r.Opcode == verbs.OpRead || r.Opcode == verbs.OpWrite {
			// The peer frees a region that was to be used once (rds-protocol spec 2.5, 9 no. 18).
			s.ext[0] = byte(rdshdr.ExtRDMA)
			binary.BigEndian.PutUint32(s.ext[1:], uint32(r.RKey))
		}
	} else if x.Cookie == 0 {
		return q.append(owner, sport, dport, n, c.ackNext, flags&^msgSide, x.Buffer)
	} else {
		s.ext[0] = byte(rdshdr.ExtRDMADest)
		binary.BigEndian.PutUint32(s.ext[1:], uint32(x.Cookie))
		binary.BigEndian.PutUint32(s.ext[5:], uint32(x.Cookie>>32))
	}
	seq, first, ok = q.append(owner, sport, dport, n, c.ackNext, flags, x.Buffer)
	if !ok {
		return seq, first, false
	}
	if q.sides == nil {
		q.sides = make(map[uint64]side)
	}
	q.sides[seq] = s
	if s.op != nil {
		s.op.seq = seq
		c.m.count.sendRDMA.Inc()
	}
	// Other headers of it are stamped as they are sent.
	m := q.msg(seq)
	q.putExt(q.chunk(m.ser).mem[m.off:], seq)
	return seq, first, true
}

// putExt writes the extensions of message seq into its header at b.
func (q *sendQueue) putExt(b []byte, seq uint64) {
	h := rdshdr.Header(b[:hdrLen:hdrLen])
	ext := q.sides[seq].ext
	copy(h.Ext(), ext[:])
	h.Seal()
}

// forgetOp is for an operation that is over, or about to be: its message has none.
func (q *sendQueue) forgetOp(seq uint64) {
	if s, ok := q.sides[seq]; ok {
		s.op = nil
		q.sides[seq] = s
	}
}

// fence reports whether the SEND that begins at the cursor has to wait for an operation before it.
func (q *sendQueue) fence() bool {
	if q.nextOff > 0 || q.msg(q.next).flags&msgSide == 0 {
		return false
	}
	o := q.sides[q.next].op
	return o != nil && o.reads() && !o.r.NoFence
}

// opDue is the operation to be posted before anything else of the queue. wait: it cannot be yet, since its message is not
// complete.
func (q *sendQueue) opDue() (o *op, wait bool) {
	if q.nextOff > 0 {
		return nil, false
	}
	switch q.msg(q.next).flags & (msgOp | msgReady) {
	case msgOp | msgReady:
		return q.sides[q.next].op, false
	case msgOp:
		return nil, true
	}
	return nil, false
}

// postOp posts o and takes note of what became of it. Transmitter; it is called with mu held and returns so, and
// lets go of it in between.
func (c *Conn) postOp(l *ib.Link, o *op) {
	seq, alone := o.seq, o.alone
	o.state = opPosted
	c.q.msg(seq).flags &^= msgOp
	c.mu.Unlock()
	var posted bool
	err := ib.ErrRefused // keys of another device, or more than the ring ever holds
	if l.Device() == o.r.Device && l.OpWRs(len(o.SGs)) <= l.Ring()-reservedSlots {
		posted, err = l.PostOp(&o.Op)
	}
	refused := errors.Is(err, ib.ErrRefused)
	var r released
	c.mu.Lock()
	if refused {
		c.q.cancel(seq, &r)
	}
	switch {
	case posted:
		// OpDone tells, or has told already: o is not ours any more.
		if alone && c.q.next == seq && seq != c.q.tail && c.q.msg(seq).flags&msgCancelled == 0 {
			c.q.next++ // all of it is on its way
			c.q.everSent = max(c.q.everSent, c.q.next)
		}
	case refused:
		c.q.forgetOp(seq)
		r.end(o, RDMAOther)
	case o.cancelled:
		c.q.forgetOp(seq)
		r.end(o, RDMACancelled)
	default:
		o.state = opQueued
		c.q.msg(seq).flags |= msgOp
	}
	c.emptyLocked()
	if r.some() {
		c.mu.Unlock()
		r.tell()
		c.mu.Lock()
	}
}

// OpDone implements ib.OpOwner.
func (o *op) OpDone(s verbs.WCStatus) {
	c := o.c
	var r released
	c.mu.Lock()
	st := o.outcome(s)
	r.acked = st == RDMASuccess
	if _, ok := c.q.sides[o.seq]; ok {
		c.q.forgetOp(o.seq)
		if st != RDMASuccess || o.alone {
			if c.q.cancel(o.seq, &r) && st == RDMASuccess {
				c.m.count.sendAcked.Inc()
			}
			c.emptyLocked()
		}
	}
	r.end(o, st)
	c.mu.Unlock()
	r.tell()
}

// outcome is what a completion status says about an operation (rds-protocol spec 3.9).
func (o *op) outcome(s verbs.WCStatus) RDMAStatus {
	switch s {
	case verbs.WCSuccess:
		return RDMASuccess
	case verbs.WCRemAccessErr:
		return RDMARemoteError
	case verbs.WCFlushErr, verbs.WCRetryExcErr, verbs.WCRNRRetryExcErr:
		switch {
		case o.acked && !o.reads():
			return RDMASuccess // executed before the message, and that has arrived
		case o.cancelled:
			return RDMACancelled
		}
		return RDMADropped
	}
	return RDMAOther
}

// end notes that o is over.
func (r *released) end(o *op, s RDMAStatus) {
	o.state = opDone
	if r.op.o == nil {
		r.op = endedOp{o, s}
	} else {
		r.ops = append(r.ops, endedOp{o, s})
	}
}

type endedOp struct {
	o *op
	s RDMAStatus
}

func (e endedOp) tell() {
	o, k := e.o, &e.o.c.m.count
	if e.s != RDMASuccess {
		k.rdmaFailed[e.s].Inc()
	} else {
		n := uint64(0)
		for i := range o.SGs {
			n += uint64(o.SGs[i].Length)
		}
		switch o.Opcode {
		case verbs.OpRead:
			k.recvRDMABytes.Add(n)
		case verbs.OpWrite:
			k.sendRDMABytes.Add(n)
		case verbs.OpCompareSwap:
			k.atomicCswp.Inc()
		case verbs.OpFetchAdd:
			k.atomicFadd.Inc()
		}
	}
	o.r.Owner.RDMADone(e.s)
}

// cancel takes message seq out of the queue, wherever it is, unless that has been done: it is not sent, or not again.
// An operation of its own is not touched.
func (q *sendQueue) cancel(seq uint64, r *released) bool {
	if seq < q.una || seq >= q.tail {
		return false
	}
	m := q.msg(seq)
	if m.flags&msgCancelled != 0 || !r.add(m.owner, int(m.len)) {
		return false
	}
	q.cancelMsg(seq, m)
	q.trimHead()
	return true
}

// cancelMsg marks a message that is ready. Its owner has been noted.
func (q *sendQueue) cancelMsg(seq uint64, m *msg) {
	m.flags = m.flags&^msgOp | msgCancelled
	m.owner = nil
	q.cancelled++
	q.bytes -= int(m.len)
	if seq > q.next || seq == q.next && q.nextOff == 0 {
		q.filler++
	}
}

// cancelOp takes back the operation of a message that is being cancelled: if it is in flight it goes on to its end.
func (q *sendQueue) cancelOp(seq uint64, r *released) {
	o := q.sides[seq].op
	if o == nil {
		return
	}
	o.cancelled = true
	if o.state == opQueued {
		q.forgetOp(seq)
		r.end(o, RDMACancelled)
	}
}

// dropOps ends the operations of the address that wait for a device which is gone: their keys are of no use on any other.
func (s *site) dropOps() {
	s.mu.Lock()
	conns := s.conns // appended to, or replaced
	s.mu.Unlock()
	for _, c := range conns {
		c.dropOps()
	}
}

func (c *Conn) dropOps() {
	c.mu.Lock()
	var seqs []uint64
	for seq, s := range c.q.sides {
		// One that is being copied is refused when it comes to be posted.
		if s.op != nil && s.op.state == opQueued && s.op.r.Device.Gone() && c.q.msg(seq).flags&msgReady != 0 {
			seqs = append(seqs, seq)
		}
	}
	slices.Sort(seqs)
	for len(seqs) > 0 {
		var r released
		n := 0
		for ; n < min(len(seqs), len(r.runs)); n++ { // each may have another owner
			if o := c.q.sides[seqs[n]].op; o != nil && o.state == opQueued {
				r.end(o, RDMADropped)
				c.q.forgetOp(seqs[n])
				c.q.cancel(seqs[n], &r)
			}
		}
		seqs = seqs[n:]
		c.emptyLocked()
		c.mu.Unlock()
		r.tell()
		c.mu.Lock()
	}
	c.mu.Unlock()
}

// dropSide is for a message that leaves the queue.
func (q *sendQueue) dropSide(seq uint64, r *released) {
	if o := q.sides[seq].op; o != nil {
		if o.state == opQueued { // only with the queue itself
			r.end(o, RDMADropped)
		} else {
			o.acked = !o.cancelled
		}
	}
	delete(q.sides, seq)
}

// ext is what the header of a received message says, and when, if somebody wants to know. It is the scratch's.
func (s *rxScratch) ext(h rdshdr.Header) *Ext {
	var x Ext
	if d := h.FindExt(rdshdr.ExtRDMADest); d != nil {
		x.Cookie = uint64(binary.BigEndian.Uint32(d)) | uint64(binary.BigEndian.Uint32(d[4:]))<<32
	}
	if d := h.FindExt(rdshdr.ExtRDMA); d != nil {
		x.Used, x.HasUsed = verbs.RKey(binary.BigEndian.Uint32(d)), true
	}
	if rx := &s.conn.rx; rx.traced {
		x.Seen, x.Start = rx.seen, time.Now()
	}
	if x == (Ext{}) {
		return nil
	}
	s.exts = append(s.exts, x)
	return &s.exts[len(s.exts)-1]
}
