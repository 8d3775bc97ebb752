package softroce

import (
	"time"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// responder is the receiving half of a QP (rocev2 spec section 4). All of it belongs to the engine role.
type responder struct {
	epsn     psn.PSN // expected PSN
	msn      uint32
	lastExec psn.PSN // last executed SEND, WRITE packet: what a plain ACK carries. Never a READ's or an atomic's.
	hasExec  bool
	commEst  bool // a first valid request has been seen
	nakSent  bool // a sequence or RNR NAK is outstanding for epsn ...
	nakRNR   bool // ... it was an RNR NAK
	nakAt    time.Time
	ackDue   bool // an ACK of lastExec leaves at the end of the batch

	// The message in progress.
	inSend    bool
	inWrite   bool
	inMessage bool   // w is taken
	w         rwqe   // receive request in use
	got       uint32 // bytes of the SEND received
	va        uint64 // WRITE: address of the next byte
	rkey      uint32
	length    uint32 // WRITE: whole length
	remaining uint32 // WRITE: bytes still to come

	// READs and atomics: the most recent ones, to be replayed; and what is still to be answered, in PSN
	// order.
	ring      []rdEntry
	ringNext  int
	rdq       []rdWork
	deferred  bool          // a request was dropped because rdq was not empty
	dying     pendingNAK    // what ends the QP when rdq is empty
	paceUntil time.Time     // no responses before
	readGap   time.Duration // between runs of responses; 0: readGapMin

	// On-demand paging.
	rxFault faultState
	held    bool      // the packet at epsn was dropped without a word, to be asked for when its page is there
	askAt   time.Time // when to ask for packet askPSN again, if it has not come; zero: never
	askPSN  psn.PSN
	askWait time.Duration
	peerRNR uint8 // RNR NAKs the peer bears (its rnr_retry), as far as is known
	rnrTold int   // RNR NAKs sent since an acknowledgement
	// faultWait is how long the peer is told to wait when it comes for the packet of rxFault.
	faultWait time.Duration
}

// pendingNAK is a fatal NAK that waits for the answers before it.
type pendingNAK struct {
	syn    uint8 // 0: none
	status verbs.WCStatus
}

// rdEntry is an executed READ or atomic. It keeps key and range, never a reference: a replay
// validates the key again.
type rdEntry struct {
	valid  bool
	atomic bool
	first  psn.PSN
	npkts  int
	va     uint64
	rkey   uint32
	length uint32
	orig   uint64    // atomic: the value before
	sent   bool      // the last response has left once
	gone   time.Time // since when a replay finds the key gone
}

// rdWork is an answer in progress: packets [next, end) of a READ, or an atomic's one.
type rdWork struct {
	atomic bool
	replay bool // asked for again
	orig   uint64
	msn    uint32
	start  psn.PSN // first PSN of this answer: carries First or Only
	next   psn.PSN
	end    psn.PSN // one past the last
	va     uint64  // of start
	rkey   uint32
	length uint32 // bytes from start
}

// nakRepeat is after how long a lasting gap is reported again (rocev2 spec 4.4): several round trips of a
// LAN, far below any peer's transport timer.
const nakRepeat = 10 * time.Millisecond

// request handles a request packet of an RC QP, in the order of checks of rocev2 spec 4.2.
func (d *device) request(q *qp, pk *roce.Packet) {
	switch q.State() {
	case verbs.StateRTR, verbs.StateRTS, verbs.StateSQD:
	default:
		d.stats.add(cRxBadState, 1)
		return
	}
	if !q.commEst {
		q.commEst = true
		d.cm.commEstablished(q.Num())
		if q.State() == verbs.StateRTR {
			d.async(verbs.AsyncEvent{Type: verbs.EventCommEst, QP: q})
		}
	}
	p := pk.BTH.PSN()
	if c := p.Sub(q.epsn); c != 0 {
		if c < 0 {
			d.duplicate(q, pk, p)
		} else {
			d.outOfOrder(q)
		}
		return
	}
	if q.dying.syn != 0 {
		return
	}
	f := pk.Info.Flags
	if f&(roce.FlagRead|roce.FlagAtomic) != 0 && len(q.rdq) > 0 && len(q.rdq) >= len(q.ring) {
		// More at a time than agreed. It will not take long; the peer is told then.
		q.deferred = true
		d.stats.add(cReadDeferred, 1)
		return
	}
	if !pk.Info.Valid {
		d.nak(q, roce.SynNAKInvReq)
		return
	}
	start := f&roce.FlagStart != 0
	switch {
	case q.inSend && (start || f&roce.FlagSend == 0),
		q.inWrite && (start || f&roce.FlagWrite == 0),
		!q.inSend && !q.inWrite && !start:
		d.nak(q, roce.SynNAKInvReq)
		return
	}
	switch {
	case f&roce.FlagSend != 0:
		d.recvSend(q, pk, p, f)
	case f&roce.FlagWrite != 0:
		d.recvWrite(q, pk, p, f)
	case f&roce.FlagRead != 0:
		d.recvRead(q, pk, p)
	default:
		d.recvAtomic(q, pk, p)
	}
}

// executed advances past a SEND or WRITE packet.
func (d *device) executed(q *qp, p psn.PSN, ackReq, end bool) {
	q.epsn = p.Add(1)
	q.lastExec, q.hasExec = p, true
	q.nakSent, q.nakRNR = false, false
	if end {
		q.msn = (q.msn + 1) & 0xffffff
	}
	if ackReq {
		d.dueAck(q)
	}
}

// takeRecv takes a receive request, or answers RNR.
func (d *device) takeRecv(q *qp, p psn.PSN) bool {
	var ok bool
	if q.srq != nil {
		if ok = q.srq.take(&q.w); ok {
			q.srq.taken()
		}
	} else {
		ok = q.rq.take(&q.w)
	}
	if !ok && len(q.rdq) > 0 {
		q.deferred = true // no NAK before the responses that are due
		return false
	}
	if !ok {
		d.stats.add(cRNRSent, 1)
		q.nakSent, q.nakRNR, q.nakAt = true, true, d.now
		q.rnrTold++
		d.sendAck(q, roce.SynRNR|q.attr.MinRNRTimer, p)
		return false
	}
	q.inMessage, q.got = true, 0
	return true
}

// finishRecv completes the receive request in use with an error.
func (q *qp) finishRecv(s verbs.WCStatus) {
	q.inMessage, q.inSend, q.inWrite = false, false, false
	release(q.w.sgs)
	q.complete(q.rcq, &verbs.WC{ID: q.w.id, Status: s, QPN: verbs.QPN(q.num)}, true)
}

func (d *device) recvSend(q *qp, pk *roce.Packet, p psn.PSN, f roce.OpFlags) {
	// A request taken before may wait for its pages.
	if f&roce.FlagStart != 0 && !q.inMessage && !d.takeRecv(q, p) {
		return
	}
	if !pk.PayloadOK(q.pmtu) {
		d.nakRecv(q, roce.SynNAKInvReq, verbs.WCRemInvReqErr)
		return
	}
	n := uint32(len(pk.Payload))
	if n > q.w.total-q.got {
		d.nakRecv(q, roce.SynNAKInvReq, verbs.WCLocLenErr)
		return
	}
	if n > 0 {
		sgs, o, v := d.reach(q.w.sgs, q.got, n, true)
		if v == granted && !q.w.bad {
			v = d.put(sgs, o, pk.Payload)
		}
		if v == absent && !q.w.bad {
			if v = d.pauseRX(q, p, true, restOf(q.w.sgs, q.got, true)); v == absent {
				return
			}
		}
		if q.w.bad || v != granted {
			d.nakRecv(q, roce.SynNAKOp, verbs.WCLocProtErr)
			return
		}
		q.got += n
	}
	end := f&roce.FlagEnd != 0
	q.inSend = !end
	if !end {
		d.executed(q, p, pk.BTH.AckReq(), false)
		return
	}
	wc := verbs.WC{ID: q.w.id, Opcode: verbs.WCRecv, QPN: verbs.QPN(q.num), ByteLen: q.got}
	switch {
	case f&roce.FlagImm != 0:
		wc.Flags, wc.Imm = verbs.WCWithImm, pk.Imm()
	case f&roce.FlagInv != 0:
		// The data is placed already. A key that may not be invalidated fails both sides (rocev2 spec 4.6).
		key := pk.IETH()
		if !d.invalidate(q, key, true) {
			d.nakRecv(q, roce.SynNAKAccess, verbs.WCRemInvReqErr)
			return
		}
		wc.Flags, wc.InvRKey = verbs.WCWithInvalidate, verbs.RKey(key)
	}
	d.deliverRecv(q, &wc, pk.BTH.SE())
	d.executed(q, p, pk.BTH.AckReq(), true)
	if d.place.srq == nil && int(q.got) == d.attr.PreferredMsg {
		d.expect(q, d.train)
	}
}

// deliverRecv completes the receive request in use with success.
func (d *device) deliverRecv(q *qp, wc *verbs.WC, solicited bool) {
	if solicited {
		wc.Flags |= verbs.WCSolicited
	}
	q.inMessage = false
	release(q.w.sgs)
	q.complete(q.rcq, wc, solicited)
}

func (d *device) recvWrite(q *qp, pk *roce.Packet, p psn.PSN, f roce.OpFlags) {
	if q.attr.Access&verbs.AccessRemoteWrite == 0 {
		d.nak(q, roce.SynNAKInvReq)
		return
	}
	if f&roce.FlagRETH != 0 {
		r := pk.RETH()
		if r.Len() > maxMessage {
			d.nak(q, roce.SynNAKInvReq)
			return
		}
		q.va, q.rkey, q.length, q.remaining = r.VA(), r.RKey(), r.Len(), r.Len()
	}
	end, imm := f&roce.FlagEnd != 0, f&roce.FlagImm != 0
	if imm && !q.inMessage && !d.takeRecv(q, p) {
		return
	}
	n := uint32(len(pk.Payload))
	if !pk.PayloadOK(q.pmtu) || n > q.remaining || end != (n == q.remaining) {
		d.nakRecv(q, roce.SynNAKInvReq, verbs.WCRemInvReqErr)
		return
	}
	if f&roce.FlagStart != 0 && q.length > 0 {
		// The whole range is checked before the first byte is written.
		if m, _ := d.grant(q, q.rkey, q.va, q.length, verbs.AccessRemoteWrite); m == nil {
			d.nakRecv(q, roce.SynNAKAccess, verbs.WCRemAccessErr)
			return
		}
	}
	if n > 0 {
		m, mem, v := d.remote(q, q.rkey, q.va, n, verbs.AccessRemoteWrite)
		if v == granted {
			v = d.put(mem, 0, pk.Payload)
			m.refs.Put()
		}
		if v == absent {
			if v = d.pauseRemote(q, p, q.rkey, q.va, q.remaining, verbs.AccessRemoteWrite); v == absent {
				return
			}
		}
		if v != granted {
			d.nakRecv(q, roce.SynNAKAccess, verbs.WCRemAccessErr)
			return
		}
		q.va += uint64(n)
		q.remaining -= n
	}
	q.inWrite = !end
	if imm {
		d.deliverRecv(q, &verbs.WC{ID: q.w.id, Opcode: verbs.WCRecvWriteWithImm, Flags: verbs.WCWithImm, Imm: pk.Imm(), QPN: verbs.QPN(q.num), ByteLen: q.length}, pk.BTH.SE())
	}
	d.executed(q, p, pk.BTH.AckReq(), end)
}

func (d *device) recvRead(q *qp, pk *roce.Packet, p psn.PSN) {
	r := pk.RETH()
	if q.attr.Access&verbs.AccessRemoteRead == 0 || len(q.ring) == 0 || len(pk.Payload) != 0 || r.Len() > maxMessage {
		d.nak(q, roce.SynNAKInvReq)
		return
	}
	if r.Len() > 0 {
		m, off := d.grant(q, r.RKey(), r.VA(), r.Len(), verbs.AccessRemoteRead)
		v := granted
		switch {
		case m == nil:
			v = refused
		case m.paged != nil:
			if v = m.paged.table.look(off, uint64(q.rxFault.enough(p, r.Len(), uint32(q.pmtu))), false); v == absent {
				v = d.pauseRemote(q, p, r.RKey(), r.VA(), r.Len(), verbs.AccessRemoteRead)
			}
		}
		switch v {
		case refused:
			d.nak(q, roce.SynNAKAccess)
			return
		case absent:
			return
		}
	}
	n := max(1, (int(r.Len())+q.pmtu-1)/q.pmtu)
	q.epsn = p.Add(n)
	q.nakSent, q.nakRNR = false, false
	q.msn = (q.msn + 1) & 0xffffff
	q.remember(rdEntry{valid: true, first: p, npkts: n, va: r.VA(), rkey: r.RKey(), length: r.Len()})
	q.rdq = append(q.rdq, rdWork{msn: q.msn, start: p, next: p, end: q.epsn, va: r.VA(), rkey: r.RKey(), length: r.Len()})
	d.dueAnswer(q)
}

func (q *qp) remember(e rdEntry) {
	q.ring[q.ringNext] = e
	q.ringNext = (q.ringNext + 1) % len(q.ring)
}

func (d *device) recvAtomic(q *qp, pk *roce.Packet, p psn.PSN) {
	a := pk.AtomicETH()
	if q.attr.Access&verbs.AccessRemoteAtomic == 0 || len(q.ring) == 0 || len(pk.Payload) != 0 || a.VA()&7 != 0 {
		d.nak(q, roce.SynNAKInvReq)
		return
	}
	m, mem, v := d.remote(q, a.RKey(), a.VA(), 8, verbs.AccessRemoteAtomic)
	var orig uint64
	if v == granted {
		w := word(mem)
		if w == nil { // an IOVA that is not aligned as its memory is
			m.refs.Put()
			d.nak(q, roce.SynNAKInvReq)
			return
		}
		var fault uintptr
		orig, fault = atomically(w, pk.Op, a.SwapAdd(), a.Compare())
		m.refs.Put()
		v = d.faultAt(fault)
	}
	if v == absent {
		if v = d.pauseRemote(q, p, a.RKey(), a.VA(), 8, verbs.AccessRemoteAtomic); v == absent {
			return
		}
	}
	if v != granted {
		d.nak(q, roce.SynNAKAccess)
		return
	}
	q.epsn = p.Add(1)
	q.nakSent, q.nakRNR = false, false
	q.msn = (q.msn + 1) & 0xffffff
	q.remember(rdEntry{valid: true, atomic: true, first: p, npkts: 1, va: a.VA(), rkey: a.RKey(), orig: orig})
	q.rdq = append(q.rdq, rdWork{atomic: true, orig: orig, msn: q.msn, start: p, next: p, end: q.epsn})
	d.dueAnswer(q)
}

// duplicate answers a request from before epsn (rocev2 spec 4.3).
func (d *device) duplicate(q *qp, pk *roce.Packet, p psn.PSN) {
	d.stats.add(cDupRequests, 1)
	switch {
	case pk.Op == roce.RCReadRequest:
		d.replayRead(q, pk, p)
	case pk.Info.Flags&roce.FlagAtomic != 0:
		for i := range q.ring {
			e := &q.ring[i]
			if e.valid && e.atomic && e.first == p {
				if q.answering(p) {
					return
				}
				d.stats.add(cAtomicReplays, 1)
				q.queueReplay(rdWork{atomic: true, orig: e.orig, msn: q.msn, start: p, next: p, end: p.Add(1)})
				d.dueAnswer(q)
				return
			}
		}
	case q.hasExec && pk.Info.Flags&(roce.FlagSend|roce.FlagWrite) != 0:
		d.dueAck(q)
		if q.nakSent && !q.nakRNR {
			// The peer is going back: should what it then sends be lost, it hears so again.
			q.nakSent = false
		}
	}
}

// answering reports whether an answer that covers p is in progress.
func (q *qp) answering(p psn.PSN) bool {
	for i := range q.rdq {
		if p.InRange(q.rdq[i].next, q.rdq[i].end) {
			return true
		}
	}
	return false
}

// queueReplay queues an answer again, in PSN order, bounded by the ring.
func (q *qp) queueReplay(w rdWork) {
	if len(q.rdq) >= len(q.ring) {
		return
	}
	i := len(q.rdq)
	for i > 0 && w.start.Less(q.rdq[i-1].start) {
		i--
	}
	q.rdq = append(q.rdq, rdWork{})
	copy(q.rdq[i+1:], q.rdq[i:])
	q.rdq[i] = w
}

func (d *device) replayRead(q *qp, pk *roce.Packet, p psn.PSN) {
	r := pk.RETH()
	e := q.entry(p)
	if e == nil {
		return
	}
	off := uint32(p.Sub(e.first)) * uint32(q.pmtu)
	if r.RKey() != e.rkey || r.VA() != e.va+uint64(off) || r.Len() > e.length-off {
		return
	}
	n := max(1, (int(r.Len())+q.pmtu-1)/q.pmtu)
	w := rdWork{replay: true, msn: q.msn, start: p, next: p, end: p.Add(n), va: r.VA(), rkey: r.RKey(), length: r.Len()}
	d.stats.add(cReadReplays, 1)
	q.readGap = min(max(q.readGap, readGapMin)*2, readGapMax)
	d.dueAnswer(q)
	// A READ in progress is moved, never started a second time: else duplicates would multiply its
	// responses.
	for k := range q.rdq {
		if x := &q.rdq[k]; !x.atomic && (p.InRange(x.start, x.end) || x.start.InRange(p, w.end)) {
			if x.next != x.start || x.start != p {
				*x = w
			}
			return
		}
	}
	q.queueReplay(w)
}

// outOfOrder reports a gap: once, and again when it lasts (rocev2 spec 4.4, 4.5).
func (d *device) outOfOrder(q *qp) {
	if q.nakSent && (q.nakRNR || d.now.Sub(q.nakAt) < nakRepeat) {
		return
	}
	if len(q.rdq) > 0 {
		q.deferred = true // answers leave in PSN order
		return
	}
	d.seqNAK(q)
}

func (d *device) seqNAK(q *qp) {
	d.stats.add(cSeqNAKSent, 1)
	q.nakSent, q.nakRNR, q.nakAt = true, false, d.now
	d.sendAck(q, roce.SynNAKSeq, q.epsn)
}

// nak ends the QP with a fatal NAK for the request at epsn.
func (d *device) nak(q *qp, syn uint8) { d.nakRecv(q, syn, verbs.WCRemInvReqErr) }

// nakRecv is nak; the receive request in use, if any, completes with s, otherwise an async event
// tells.
func (d *device) nakRecv(q *qp, syn uint8, s verbs.WCStatus) {
	if len(q.rdq) > 0 {
		q.dying = pendingNAK{syn, s}
		return
	}
	ev := verbs.EventQPRequestErr
	switch syn {
	case roce.SynNAKInvReq:
		d.stats.add(cRemoteInvReq, 1)
	case roce.SynNAKAccess:
		d.stats.add(cRemoteAccessErr, 1)
		ev = verbs.EventQPAccessErr
	default:
		d.stats.add(cRemoteOpErr, 1)
	}
	p := q.epsn
	if q.ackDue && q.hasExec {
		// What was executed before is acknowledged by the NAK's PSN.
		q.ackDue = false
	}
	if q.inMessage {
		q.finishRecv(s)
	} else {
		d.async(verbs.AsyncEvent{Type: ev, QP: q})
	}
	q.enterErr()
	d.sendAck(q, syn, p)
}

// dueAck asks for one ACK of all that was executed, at the end of the batch.
func (d *device) dueAck(q *qp) {
	q.ackDue = true
	d.dueAnswer(q)
}

// dueAnswer puts the QP on the list of those that answer at the end of the batch.
func (d *device) dueAnswer(q *qp) {
	if !q.ackList {
		q.ackList = true
		d.acks = append(d.acks, q)
	}
}

// READ responses leave in runs of at most readRun packets per QP and step, so that nobody's answer delays the
// others by more. Who reads takes them at his own pace and says nothing about it. One of ours asks for no more
// than its buffer takes; after a run that the peer's window has no room for beside our own requests, and
// after any run towards a kernel, there is a pause, longer when READs have had to be repeated
// (rocev2 spec 4.9).
const (
	readRun    = 128
	readRunMin = 16
	readGapMin = 256 * time.Microsecond // 2 us a packet: what soft RoCE takes
	readGapMax = 16 * time.Millisecond
)

// readBudget is how many READ responses may leave in this step, and whether a pause is due after them.
func (q *qp) readBudget() (n int, pause bool) {
	if q.window == 0 {
		return readRun, true
	}
	room := (int64(q.window) - int64(q.cumNxt-q.cumUna)) / int64(q.pmtu+pktOverhead)
	if room >= readRun {
		return readRun, false
	}
	return int(max(room, readRunMin)), true
}

// answer sends what the QP owes its peer: responses to READs and atomics in order, then one
// coalesced ACK. It reports whether responses are left for the next step.
func (d *device) answer(q *qp) (more bool) {
	if s := q.State(); s == verbs.StateErr || s == verbs.StateReset || q.closed.Load() {
		return false
	}
	if d.now.Before(q.paceUntil) {
		return false // timeout comes back to it
	}
	budget, pause := q.readBudget()
	for len(q.rdq) > 0 {
		if !d.tx.ready() {
			return true
		}
		w := &q.rdq[0]
		if q.ackDue && q.hasExec && q.lastExec.Less(w.start) {
			q.ackDue = false
			d.sendAck(q, roce.SynACK, q.lastExec)
			continue
		}
		if w.atomic {
			d.sendAtomicAck(q, w)
			q.popAnswer()
			continue
		}
		n, v := d.sendReadResponses(q, w, budget)
		if v == absent {
			return false // wakeRX comes back to it
		}
		if v != granted {
			if !d.readFailed(q, w) {
				return false
			}
			continue
		}
		if w.next == w.end {
			if !w.replay {
				q.readGap = max(q.readGap-q.readGap/8, readGapMin)
			}
			if e := q.entry(w.start); e != nil && w.end == e.first.Add(e.npkts) {
				e.sent = true
			}
			q.popAnswer()
		}
		if budget -= n; budget <= 0 && len(q.rdq) > 0 {
			if !pause {
				return true
			}
			d.stats.add(cReadPauses, 1)
			q.paceUntil = d.now.Add(max(q.readGap, readGapMin))
			d.timers.add(q, q.paceUntil)
			return false
		}
	}
	if !d.tx.ready() {
		return true
	}
	if q.dying.syn != 0 {
		d.nakRecv(q, q.dying.syn, q.dying.status)
		return false
	}
	if q.ackDue {
		q.ackDue = false
		if q.hasExec {
			d.sendAck(q, roce.SynACK, q.lastExec)
		}
	}
	if q.deferred {
		q.deferred = false
		if !q.nakSent {
			d.seqNAK(q)
		}
	}
	return false
}

// popAnswer takes the first answer, which has been given, off the queue.
func (q *qp) popAnswer() {
	q.rdq = append(q.rdq[:0], q.rdq[1:]...)
	q.rnrTold = 0
}

// entry is the remembered READ that p belongs to.
func (q *qp) entry(p psn.PSN) *rdEntry {
	for i := range q.ring {
		if e := &q.ring[i]; e.valid && !e.atomic && p.InRange(e.first, e.first.Add(e.npkts)) {
			return e
		}
	}
	return nil
}

// replayPatience is for how long a peer may ask for a READ again whose region is gone: less than its first probes
// are apart.
const replayPatience = 50 * time.Millisecond

// readFailed is called when the region has gone away under the READ w that is being answered, and reports whether
// the QP lives on. That ends it, with a NAK if none of its responses has left: behind one there must
// not be any (rocev2 spec 4.9). But a READ that was answered in full, and is asked for again, may be a
// duplicate that the network kept: the peer has its data and has said so, or the region would still be
// there. It is dropped; a peer that really misses some goes on asking.
func (d *device) readFailed(q *qp, w *rdWork) bool {
	if e := q.entry(w.start); w.replay && e != nil && e.sent && (e.gone.IsZero() || d.now.Sub(e.gone) < replayPatience) {
		if e.gone.IsZero() {
			e.gone = d.now
		}
		d.stats.add(cReplaysDropped, 1)
		q.popAnswer()
		return true
	}
	p, nak := w.start, !w.replay && w.next == w.start
	d.stats.add(cRemoteAccessErr, 1)
	d.async(verbs.AsyncEvent{Type: verbs.EventQPAccessErr, QP: q})
	q.enterErr()
	if nak {
		d.sendAck(q, roce.SynNAKAccess, p)
	}
	return false
}

// sendReadResponses sends at most limit packets of a READ's answer, straight from the region, which is
// referenced until they have left.
func (d *device) sendReadResponses(q *qp, w *rdWork, limit int) (sent int, v verdict) {
	for w.next != w.end && sent < limit && d.tx.ready() {
		k := w.next.Sub(w.start)
		off := uint32(k * q.pmtu)
		n := min(uint32(q.pmtu), w.length-off)
		var m *mr
		var mem []sge
		if n > 0 {
			at := w.va + uint64(off)
			if m, mem, v = d.remote(q, w.rkey, at, n, verbs.AccessRemoteRead); v == absent {
				v = d.waitRX(q, w.next, false, d.remoteSpan(q, w.rkey, at, w.length-off, verbs.AccessRemoteRead))
			}
			if v != granted {
				return sent, v
			}
		}
		first, last := w.next == w.start, w.next.Add(1) == w.end
		op := roce.RCReadRespMiddle
		switch {
		case first && last:
			op = roce.RCReadRespOnly
		case first:
			op = roce.RCReadRespFirst
		case last:
			op = roce.RCReadRespLast
		}
		var b pktBuilder
		b.begin(d, q, op, op.Info().HdrLen, int(n))
		if first || last {
			roce.PutAETH(b.hdr[roce.BTHLen:], roce.SynACK, w.msn)
		}
		v = b.finish(d, q, op, false, false, q.attr.DestQPN, w.next, mem, 0)
		switch {
		case m == nil:
		case v == granted:
			d.tx.hold(m)
		default:
			m.refs.Put()
		}
		if v == absent {
			v = d.waitRX(q, w.next, false, d.remoteSpan(q, w.rkey, w.va+uint64(off), w.length-off, verbs.AccessRemoteRead))
		}
		if v != granted {
			return sent, v
		}
		if first && !last {
			// It is longer than what follows: the next would end its train, and be numbered 1 where those behind
			// begin at 0, which a receiver that gets them joined by length cannot guess.
			d.tx.closeTrain()
		}
		w.next = w.next.Add(1)
		sent++
	}
	return sent, granted
}

func (d *device) sendAtomicAck(q *qp, w *rdWork) {
	var b pktBuilder
	b.begin(d, q, roce.RCAtomicAck, roce.RCAtomicAck.Info().HdrLen, 0)
	roce.PutAETH(b.hdr[roce.BTHLen:], roce.SynACK, w.msn)
	roce.PutAtomicAckETH(b.hdr[roce.BTHLen+roce.AETHLen:], w.orig)
	b.finish(d, q, roce.RCAtomicAck, false, false, q.attr.DestQPN, w.start, nil, 0)
}

// sendAck sends an ACKNOWLEDGE packet.
func (d *device) sendAck(q *qp, syn uint8, p psn.PSN) {
	if d.tx.blocked {
		return // as if lost: the peer's probe asks again
	}
	if syn == roce.SynACK {
		q.rnrTold = 0
	}
	var b pktBuilder
	b.begin(d, q, roce.RCAck, roce.BTHLen+roce.AETHLen, 0)
	roce.PutAETH(b.hdr[roce.BTHLen:], syn, q.msn)
	b.finish(d, q, roce.RCAck, false, false, q.attr.DestQPN, p, nil, 0)
}
