package softroce

import (
	"encoding/binary"
	"time"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// response handles a packet that answers our requests (rocev2 spec 3.5 to 3.8). Engine role.
func (d *device) response(q *qp, pk *roce.Packet) {
	if s := q.State(); s != verbs.StateRTS && s != verbs.StateSQD {
		d.stats.add(cRxBadState, 1)
		return
	}
	p := pk.BTH.PSN()
	var syn uint8 = roce.SynACK
	if pk.Info.Flags&roce.FlagAETH != 0 {
		syn = pk.AETH().Syndrome()
	}
	kind := syn >> 5
	if p.Less(q.una) || !p.Less(q.max) {
		// A NAK with the PSN of a READ in progress concerns that READ (rocev2 spec 3.7).
		if pk.Op == roce.RCAck && (kind == 1 || kind == 3) && syn != roce.SynNAKSeq && p.Less(q.una) {
			if h := q.head.Load(); h != q.tail.Load() {
				if w := q.slot(h); w.isRead() && w.started && p == w.first {
					d.negative(q, syn, w.got)
					return
				}
			}
		}
		if !p.Less(q.max) && !(syn == roce.SynNAKSeq && p == q.max) {
			d.stats.add(cRespOutOfRange, 1)
		}
		d.probeAnswered(q)
		return
	}
	switch pk.Op {
	case roce.RCAck:
		switch {
		case kind == 0:
			if d.acknowledge(q, p.Add(1), false) {
				d.probeAnswered(q)
			}
		case kind == 1 || kind == 3:
			d.negative(q, syn, p)
		}
	case roce.RCReadRespFirst, roce.RCReadRespMiddle, roce.RCReadRespLast, roce.RCReadRespOnly:
		d.readResponse(q, pk, p)
	case roce.RCAtomicAck:
		d.atomicResponse(q, pk, p)
	}
}

// probeAnswered is called when the peer has spoken after a probe: what is still
// outstanding was lost.
func (d *device) probeAnswered(q *qp) {
	if q.probing && q.una != q.max && q.State() != verbs.StateErr {
		d.goBack(q, d.resumePSN(q), true)
	}
	q.probing = false
}

// resumePSN is where a go-back starts: una, or the first missing response of a READ at the head.
func (d *device) resumePSN(q *qp) psn.PSN {
	if h := q.head.Load(); h != q.tail.Load() {
		if w := q.slot(h); w.started && w.isRead() && q.una.LessEq(w.got) && w.got.LessEq(w.last()) {
			return w.got
		}
	}
	return q.una
}

// acknowledge completes, in order, the SENDs and WRITEs all of whose packets are before end, and moves una to
// end. A READ or atomic in the way whose answer has not come is an implied NAK: it reports false and
// goes back to it. Requests whose answer is what is being handled are not touched (keep).
func (d *device) acknowledge(q *qp, end psn.PSN, keep bool) bool {
	before := q.cumUna
	moved := false
	for h := q.head.Load(); h != q.tail.Load(); h = q.head.Load() {
		w := q.slot(h)
		if !w.started {
			break
		}
		if end.LessEq(w.last()) {
			if w.isReadLike() {
				break // una stays where its responses are
			}
			if q.una.Less(end) && w.first.Less(end) {
				q.una, moved = end, true
				q.cumUna = q.cumAt(w, end)
			}
			break
		}
		if w.isReadLike() {
			// Passed by a later answer, with its own missing.
			if moved {
				q.progress()
			}
			d.stats.add(cImpliedNAK, 1)
			if q.State() != verbs.StateErr {
				d.goBackOnce(q, w.got)
			}
			return false
		}
		q.una, moved = w.last().Add(1), true
		q.cumUna = w.startCum + w.cost
		q.finishSend(h, w)
		if q.State() == verbs.StateErr {
			return false
		}
	}
	if moved {
		q.afterMove()
		q.grow(q.cumUna - before)
		q.progress()
		d.queueTX(q)
	}
	return true
}

// afterMove keeps nxt at or after una.
func (q *qp) afterMove() {
	if q.nxt.Less(q.una) {
		q.nxt = q.una
		if q.cumNxt < q.cumUna {
			q.cumNxt = q.cumUna
		}
		if h := q.head.Load(); int32(q.cur-h) < 0 {
			q.cur = h
		}
		for q.cur != q.tail.Load() {
			w := q.slot(q.cur)
			if !w.started || q.nxt.LessEq(w.last()) {
				break
			}
			q.cur++
		}
	}
	if h := q.head.Load(); int32(q.cur-h) < 0 {
		q.cur = h
	}
}

var sendWCOpcode = [...]verbs.WCOpcode{
	verbs.OpSend: verbs.WCSend, verbs.OpSendWithImm: verbs.WCSend, verbs.OpSendWithInv: verbs.WCSend,
	verbs.OpWrite: verbs.WCWrite, verbs.OpWriteWithImm: verbs.WCWrite, verbs.OpRead: verbs.WCRead,
	verbs.OpCompareSwap: verbs.WCCompareSwap, verbs.OpFetchAdd: verbs.WCFetchAdd, verbs.OpReadWithInv: verbs.WCRead,
	verbs.OpFastRegMR: verbs.WCFastRegMR, verbs.OpLocalInv: verbs.WCLocalInv, verbs.OpBindMW: verbs.WCBindMW,
}

// finishSend completes the head request with success, and with it the local operations right behind, which have
// waited for their turn. So the head is never a local operation that has been executed.
func (q *qp) finishSend(h uint32, w *swqe) {
	q.finishOne(h, w)
	for h++; h != q.tail.Load(); h++ {
		if w = q.slot(h); !w.isLocal() || !w.started {
			break
		}
		q.finishOne(h, w)
	}
}

func (q *qp) finishOne(h uint32, w *swqe) {
	q.rdOut -= int(w.out)
	if w.flags&verbs.SendSignaled == 0 {
		q.freeSend(h, w)
		return
	}
	wc := verbs.WC{ID: w.id, Opcode: sendWCOpcode[w.op], QPN: verbs.QPN(q.num), ByteLen: w.total}
	q.freeSend(h, w)
	q.complete(q.scq, &wc, false)
}

// goBackOnce goes back to p unless that was just done and nothing has been acknowledged since: answers to
// one loss come in numbers.
func (d *device) goBackOnce(q *qp, p psn.PSN) {
	if q.backTo == p && !q.backAt.IsZero() && d.now.Sub(q.backAt) < max(q.srtt, time.Millisecond) {
		return
	}
	d.goBack(q, p, true)
}

// negative handles a NAK or RNR NAK for PSN p.
func (d *device) negative(q *qp, syn uint8, p psn.PSN) {
	if syn == roce.SynNAKSeq {
		d.stats.add(cSeqNAKRecv, 1)
		if !q.rnrUntil.IsZero() {
			return // rxe sends one after its RNR NAK (rocev2 spec Q3)
		}
		if d.acknowledge(q, p, false) && q.State() != verbs.StateErr && p.Less(q.max) {
			d.goBackOnce(q, d.resumePSN(q))
		}
		q.probing = false
		return
	}
	if h := q.head.Load(); h != q.tail.Load() && q.slot(h).isRead() && q.slot(h).started && p.InRange(q.slot(h).first, q.slot(h).last().Add(1)) {
		// The READ at the head is what failed; nothing before it is left.
	} else if !d.acknowledge(q, p, false) {
		return
	}
	if q.State() == verbs.StateErr {
		return
	}
	if syn>>5 == 1 {
		d.stats.add(cRNRRecv, 1)
		if !q.rnrUntil.IsZero() {
			return
		}
		if q.attr.RNRRetry != 7 {
			if q.rnrLeft == 0 {
				q.failHead(verbs.WCRNRRetryExcErr)
				return
			}
			q.rnrLeft--
		}
		q.stallSince = d.now // the peer lives
		q.probing = false
		q.rnrUntil = d.now.Add(roce.RNRTimer(syn & 31))
		d.timers.add(q, q.rnrUntil)
		return
	}
	switch syn {
	case roce.SynNAKInvReq:
		q.failHead(verbs.WCRemInvReqErr)
	case roce.SynNAKAccess:
		q.failHead(verbs.WCRemAccessErr)
	case roce.SynNAKOp, roce.SynNAKOp + 1:
		q.failHead(verbs.WCRemOpErr)
	}
}

// readResponse takes one packet of a READ's answer (rocev2 spec 3.6).
func (d *device) readResponse(q *qp, pk *roce.Packet, p psn.PSN) {
	if !d.acknowledge(q, p, true) { // earlier SENDs and WRITEs
		return
	}
	h := q.head.Load()
	if h == q.tail.Load() {
		return
	}
	w := q.slot(h)
	if !w.started || !p.InRange(w.first, w.last().Add(1)) {
		return
	}
	if !w.isRead() {
		q.fail(w, verbs.WCBadRespErr)
		return
	}
	if p != w.got {
		if w.got.Less(p) {
			d.goBackOnce(q, w.got) // a gap: ask again from it
		}
		return
	}
	k := p.Sub(w.first)
	last, end := p == w.last(), k+1 == w.chunkEnd(k)
	if e := pk.Op == roce.RCReadRespOnly || pk.Op == roce.RCReadRespLast; e != end {
		// First where Middle is due, or the other way round, answers an earlier request for the same: its data
		// is the same, its place is right. The end of a request is the same for all.
		q.fail(w, verbs.WCBadRespErr)
		return
	}
	off := uint32(k * q.pmtu)
	n := min(uint32(q.pmtu), w.total-off)
	if uint32(len(pk.Payload)) != n {
		q.fail(w, verbs.WCLocLenErr)
		return
	}
	sgs, o, v := d.reach(w.sgs, off, n, true)
	if v == granted {
		v = d.put(sgs, o, pk.Payload)
	}
	if v == absent {
		if v = d.pauseSink(q, w, off); v == absent {
			return
		}
	}
	if v != granted {
		q.fail(w, verbs.WCLocProtErr)
		return
	}
	w.got = p.Add(1)
	q.una = w.got
	q.readDue = max(q.readDue-1, 0)
	if end && w.out > 0 {
		w.out--
		q.rdOut--
	}
	q.cumUna = q.cumAt(w, w.got)
	if last {
		if w.op == verbs.OpReadWithInv && !d.invalidate(q, w.imm, false) {
			q.fail(w, verbs.WCLocQPOpErr)
			return
		}
		q.finishSend(h, w)
	}
	if q.State() == verbs.StateErr {
		return
	}
	q.afterMove()
	q.progress()
	if end {
		d.queueTX(q)
	}
}

// atomicResponse takes the answer to an atomic.
func (d *device) atomicResponse(q *qp, pk *roce.Packet, p psn.PSN) {
	if !d.acknowledge(q, p, true) {
		return
	}
	h := q.head.Load()
	if h == q.tail.Load() {
		return
	}
	w := q.slot(h)
	if !w.started || p != w.first {
		return
	}
	if w.op != verbs.OpCompareSwap && w.op != verbs.OpFetchAdd {
		q.fail(w, verbs.WCBadRespErr)
		return
	}
	var orig [8]byte
	binary.NativeEndian.PutUint64(orig[:], pk.AtomicAck())
	sgs, o, v := d.reach(w.sgs, 0, 8, true)
	if v == granted {
		v = d.put(sgs, o, orig[:])
	}
	if v == absent {
		if v = d.pauseSink(q, w, 0); v == absent {
			return
		}
	}
	if v != granted {
		q.fail(w, verbs.WCLocProtErr)
		return
	}
	q.una = p.Add(1)
	q.cumUna = w.startCum + w.cost
	w.got = q.una
	q.finishSend(h, w)
	if q.State() == verbs.StateErr {
		return
	}
	q.afterMove()
	q.progress()
	d.queueTX(q)
}
