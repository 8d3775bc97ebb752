package softroce

import (
	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// placement is a guess at what arrives next: a SEND that is a whole train, into the next request of a shared
// receive queue. A stream of large messages between two softroce devices looks like that, message after
// message and whatever the QP, since all of them take from that queue. With the guess in hand the socket
// receives payloads where they belong. Nothing depends on it: a train that is something else is put
// together again and takes the ordinary way. Engine role.
type placement struct {
	conn   packetio.Placer // nil: the network cannot
	srq    *srq            // nil: nothing is expected
	layout packetio.Layout
	misses int
	bufs   [2][]byte
}

// placeMisses is how many receives in a row without a hit end the guessing.
const placeMisses = 16

// receiveBatch takes trains from the socket and handles them. It returns how many.
func (d *device) receiveBatch() int {
	pl := &d.place
	traced := d.prov.tracers.Load() != nil
	if pl.srq == nil || traced {
		n, err := d.conn.Recv(d.rx[:])
		if err != nil {
			return 0
		}
		if traced {
			d.traceIn(d.rx[:n])
		}
		for i := range d.rx[:n] {
			d.receive(&d.rx[i])
		}
		return n
	}
	k := pl.offer()
	if k == 0 { // the queue is empty, or closed
		pl.srq = nil
		return d.receiveBatch()
	}
	n, err := pl.conn.RecvPlaced(d.rx[:k], pl.layout, pl.bufs[:k])
	if err != nil {
		// The kernel cannot write there (EFAULT), say, and what it had for it is lost. It would be so for ever: the request stays the next
		// one until something arrives the ordinary way, and fails.
		if isFault(err) {
			d.stats.add(cMemoryFaults, 1)
		}
		pl.srq = nil
		return 1
	}
	if n == 0 {
		return 0
	}
	hit := false
	for i := range d.rx[:n] {
		t := &d.rx[i]
		if t.Placed {
			if d.takePlaced(t, pl.bufs[i]) {
				hit = true
				continue
			}
		}
		// What it turns out to be may take several requests, those among them that the trains behind it lie in.
		for j := i; j < n; j++ {
			if t := &d.rx[j]; t.Placed {
				t.Data, t.Placed = pl.conn.Linear(j), false
			}
		}
		d.receive(t)
	}
	if pl.misses++; hit {
		pl.misses = 0
	} else if pl.misses > placeMisses {
		pl.srq = nil
	}
	return n
}

// expect takes note of a SEND that arrived as a whole train the ordinary way.
func (d *device) expect(q *qp, t *packetio.RxTrain) {
	l := packetio.Layout{Hdr: roce.BTHLen, Payload: q.pmtu, Tail: roce.ICRCLen, Segs: d.attr.PreferredMsg / q.pmtu}
	if d.place.conn != nil && q.srq != nil && len(t.Data) == l.Size() && t.SegSize == l.Hdr+l.Payload+l.Tail {
		d.place.srq, d.place.layout, d.place.misses = q.srq, l, 0
	}
}

// offer fills bufs with the memory of the next requests of the queue, as far as it will do.
func (pl *placement) offer() (k int) {
	s := pl.srq
	for h := s.head.Load(); k < len(pl.bufs) && h != s.tail.Load(); h++ {
		w := s.slot(h)
		if w.bad || len(w.sgs) != 1 || w.sgs[0].base == nil || int(w.sgs[0].n) < pl.layout.Segs*pl.layout.Payload || mayUse(w.sgs, true) != granted {
			break
		}
		pl.bufs[k] = w.sgs[0].bytes()
		k++
	}
	return k
}

// takePlaced handles a placed train if it is, packet by packet, the next SEND of an RC QP that takes from
// the queue whose buffer it is in. It changes nothing otherwise.
func (d *device) takePlaced(t *packetio.RxTrain, buf []byte) bool {
	pl := &d.place
	l := pl.layout
	q := d.qps.get(roce.BTH(t.Data).DestQP())
	if q == nil || q.closed.Load() || q.typ != verbs.RC || q.srq != pl.srq || q.pmtu != l.Payload || !q.commEst ||
		q.inMessage || q.inWrite || len(q.rdq) > 0 || t.From != q.rxFrom {
		return false
	}
	switch q.State() {
	case verbs.StateRTR, verbs.StateRTS, verbs.StateSQD:
	default:
		return false
	}
	u := l.Hdr + l.Payload + l.Tail
	ack := false
	for i := range l.Segs {
		h := t.Data[i*(l.Hdr+l.Tail):][:l.Hdr+l.Tail]
		bth := roce.BTH(h)
		op := roce.RCSendMiddle
		switch i {
		case 0:
			op = roce.RCSendFirst
		case l.Segs - 1:
			op = roce.RCSendLast
		}
		if bth.Opcode() != op || bth.TVer() != 0 || bth.Pad() != 0 || bth.DestQP() != q.num || !bth.PKeyOK() || bth.PSN() != q.epsn.Add(i) {
			return false
		}
		z := roce.Update(q.rxFlow.Begin(u, h[:l.Hdr]), buf[i*l.Payload:(i+1)*l.Payload]) ^ roce.LoadICRC(h[l.Hdr:])
		if z != 0 && (!d.is4 || z != roce.IDDelta(u, uint16(i))) {
			return false
		}
		ack = ack || bth.AckReq()
	}
	if !pl.srq.takeBuf(&q.w, buf) {
		return false
	}
	pl.srq.taken()
	q.inMessage, q.got = true, uint32(l.Segs*l.Payload)
	last := q.epsn.Add(l.Segs - 1)
	d.stats.add(cRxTrains, 1)
	d.stats.add(cRxPlaced, 1)
	d.stats.add(cRxPackets, uint64(l.Segs))
	d.stats.add(cRxBytes, uint64(l.Size()))
	d.deliverRecv(q, &verbs.WC{ID: q.w.id, Opcode: verbs.WCRecv, QPN: verbs.QPN(q.num), ByteLen: q.got}, roce.BTH(t.Data[(l.Segs-1)*(l.Hdr+l.Tail):]).SE())
	d.executed(q, last, ack, true)
	return true
}

// takeBuf is take of the request whose memory is buf, one of the first few.
func (r *recvRing) takeBuf(dst *rwqe, buf []byte) bool {
	h := r.head.Load()
	for i := h; i != r.tail.Load() && i-h < 2; i++ {
		w := r.slot(i)
		if len(w.sgs) == 1 && w.sgs[0].base == &buf[0] {
			if i != h { // the one before it was offered too and not used: it stays first
				first := r.slot(h)
				w.id, first.id = first.id, w.id
				w.total, first.total = first.total, w.total
				w.bad, first.bad = first.bad, w.bad
				w.sgs[0], first.sgs[0] = first.sgs[0], w.sgs[0]
			}
			return r.take(dst)
		}
	}
	return false
}
