package softroce

import (
	"time"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// requester is the sending half of a QP (rocev2 spec section 3). All of it belongs to the engine role.
//
//	   una            nxt            max
//	    │   in flight  │  sent once   │  never sent
//	────┴──────────────┴──────────────┴──────────▶ PSN
//
// A go-back sets nxt back; what lies between nxt and max is sent again with the PSNs it had. cur is
// the request that owns nxt (or would).
type requester struct {
	una psn.PSN // oldest PSN not acknowledged
	nxt psn.PSN // next PSN to send
	max psn.PSN // next PSN never sent
	cur uint32  // index of the send request nxt belongs to

	rdOut     int // READ and atomic requests sent (before nxt) and not answered in full
	readDue   int // packets of READ responses that they will bring
	sinceAck  int // packets sent since one asked for an acknowledgement
	sqdNotify bool

	// Flow: bytes of receive-buffer cost. cum is a running total over everything started.
	cumNxt   uint64 // cost of all before nxt
	cumUna   uint64 // cost of all before una
	cumNew   uint64 // startCum of the next request to start
	window   uint64 // bound on cumNxt-cumUna announced by the peer; 0: none announced
	pktLimit int    // bound on nxt-una
	cwnd     uint64
	ssthresh uint64

	// Loss.
	deadline   time.Time // retransmission timer, zero when nothing is outstanding
	stallSince time.Time // since when there was no progress
	rto        time.Duration
	srtt       time.Duration
	rttvar     time.Duration
	timedPSN   psn.PSN // acknowledgement of this PSN gives an RTT sample
	timedAt    time.Time
	probing    bool
	backAt     time.Time // last go-back ...
	backTo     psn.PSN   // ... and where to
	rnrUntil   time.Time // no requests before
	rnrLeft    uint8

	// On-demand paging.
	txFault  faultState
	askAgain bool // a response could not be placed: go back when its page is there
	reprobe  bool // a probe could not be sent: send it when its page is there
	resend   bool // the socket could not read what it was to send
}

const (
	// A packet costs the receiver's socket buffer more than its bytes: struct sk_buff and the
	// rounding of its data (skb->truesize). Seen for small datagrams: 768 bytes over the payload.
	pktOverhead = 768
	// kernelPackets is the PSN window towards a peer that announced no share of its buffer: what
	// rxe uses itself (rocev2 spec 3.4).
	kernelPackets = 128
	ownPackets    = 2048
	ackEvery      = 32 // packets without AckReq at most
	// stepPackets bounds what one QP sends in one engine step, so that it delays others by no more
	// than about a hundred microseconds.
	stepPackets = 256
)

func (q *qp) setWindow(n int) {
	q.window, q.pktLimit = uint64(n), kernelPackets
	if n > 0 {
		q.pktLimit = ownPackets
	}
}

// runRequester sends what the window admits. It reports whether it stopped at its bound for one
// step, with more to send. Engine role.
func (d *device) runRequester(q *qp) (more bool) {
	st := q.State()
	if st != verbs.StateRTS && st != verbs.StateSQD {
		return false
	}
	if q.txFault.waiting {
		return false
	}
	if q.typ == verbs.UD {
		return d.sendUD(q)
	}
	if q.askAgain {
		q.askAgain, q.reprobe = false, false
		d.goBack(q, d.resumePSN(q), false)
	}
	if q.reprobe {
		if !d.tx.ready() {
			d.queueTX(q)
			return false
		}
		q.reprobe = false
		if d.probe(q); q.State() == verbs.StateErr || q.txFault.waiting {
			return false
		}
	}
	if q.resend {
		q.resend = false
		if q.una != q.max {
			d.goBackOnce(q, d.resumePSN(q))
		}
	}
	if !q.rnrUntil.IsZero() {
		return false
	}
	for sent := 0; ; {
		if q.cur == q.tail.Load() {
			return false
		}
		if sent >= stepPackets {
			return true
		}
		w := q.slot(q.cur)
		if w.isLocal() {
			if !w.started && !d.execute(q, w, st) {
				return false
			}
			if int32(q.cur-q.head.Load()) < 0 { // it completed
				q.cur = q.head.Load()
			} else {
				q.cur++
			}
			sent++
			continue
		}
		if !w.started && !q.start(w, st) {
			return false
		}
		if q.State() == verbs.StateErr { // start found the request bad
			return false
		}
		n, stop := d.sendFrom(q, w, stepPackets-sent)
		sent += n
		if stop {
			return false
		}
	}
}

// start assigns w its PSNs if it may begin now.
func (q *qp) start(w *swqe, st verbs.QPState) bool {
	if st == verbs.StateSQD {
		return false // only what was begun is finished
	}
	if w.flags&verbs.SendFence != 0 && q.rdOut > 0 {
		return false
	}
	if w.isReadLike() {
		if q.attr.MaxRDAtomic == 0 {
			if q.head.Load() == q.cur { // earlier requests finish first
				q.fail(w, verbs.WCLocQPOpErr)
			}
			return false
		}
		if q.rdOut >= int(q.attr.MaxRDAtomic) {
			return false
		}
	}
	if w.bad || mayUse(w.sgs, w.isReadLike()) != granted {
		if q.head.Load() == q.cur {
			q.fail(w, verbs.WCLocProtErr)
		}
		return false
	}
	w.started = true
	if w.indirect {
		q.countUses(w, 1)
	}
	w.first = q.max
	w.npkts = 1
	w.cost = pktOverhead
	if w.op != verbs.OpCompareSwap && w.op != verbs.OpFetchAdd {
		w.npkts = max(1, (int(w.total)+q.pmtu-1)/q.pmtu)
		if !w.isRead() {
			w.cost = uint64(w.total) + uint64(w.npkts)*pktOverhead
		} else {
			w.chunk = int32(q.readChunk())
			w.cost = uint64(w.requests(w.npkts)) * pktOverhead
		}
	}
	w.startCum = q.cumNew
	q.cumNew += w.cost
	w.got = w.first
	return true
}

// A READ goes out as one request for every chunk packets, not more of them at a time than fill our share of the
// receive buffer: who answers cannot know how much that takes, and a kernel does not ask. Chunks are what
// they are whatever is lost: a request that is repeated asks for the rest of its chunk.

// maxReadChunk is how many packets one READ request asks for at most: what a responder sends in one go.
const maxReadChunk = 128

// readWindow is how many packets of READ responses may be due at a time: half of the buffer that a peer may
// fill, the other half being for his requests.
func (q *qp) readWindow() int {
	return max(q.dev.attr.RecvWindow/2/(q.pmtu+pktOverhead), 2)
}

func (q *qp) readChunk() int {
	n := min(q.readWindow(), q.pktLimit) / 2 // two at least under way
	return min(max(n, 1), maxReadChunk)
}

// requests is how many requests ask for the first k packets of the READ.
func (w *swqe) requests(k int) int { return (k + int(w.chunk) - 1) / int(w.chunk) }

// chunkEnd is one past the last packet of the chunk that packet k of the READ is in.
func (w *swqe) chunkEnd(k int) int { return min(w.npkts, k-k%int(w.chunk)+int(w.chunk)) }

// execute carries out the local operation w, to which the queue has come, once and for good: a go-back passes it
// by. It takes no PSN. Like any request it completes when all before it have (finishSend).
func (d *device) execute(q *qp, w *swqe, st verbs.QPState) bool {
	if st == verbs.StateSQD || w.flags&verbs.SendFence != 0 && q.rdOut > 0 {
		return false
	}
	h, x := q.head.Load(), q.ext(q.cur)
	ok, status := false, verbs.WCLocQPOpErr
	switch w.op {
	case verbs.OpFastRegMR:
		ok = !w.bad && d.fastReg(q, w, x)
	case verbs.OpLocalInv:
		if m := x.mr; m != nil && m.indirect() {
			if m.uses > 0 && q.inUse(m) {
				return false // until the requests that use it are complete
			}
			if d.tx.names(m) {
				if d.tx.flush(); d.tx.blocked {
					d.queueTX(q)
					return false
				}
			}
		}
		ok = d.invalidate(q, w.rkey, false)
	case verbs.OpBindMW:
		ok, status = !w.bad && d.bind(q, w, x), verbs.WCMWBindErr
	}
	if !ok {
		if h == q.cur { // earlier requests finish first
			q.fail(w, status)
		}
		return false
	}
	w.started, w.first, w.npkts, w.startCum = true, q.max, 0, q.cumNew
	if h == q.cur {
		q.finishSend(h, w)
	}
	return true
}

// inUse reports whether a request before cur, not complete yet, looks m up.
func (q *qp) inUse(m *mr) bool {
	for i := q.head.Load(); i != q.cur; i++ {
		if w := q.slot(i); w.indirect && w.started && namesRegion(w.sgs, m) {
			return true
		}
	}
	return false
}

// cumAt is the cost of everything before PSN p of the started request w.
func (q *qp) cumAt(w *swqe, p psn.PSN) uint64 {
	k := p.Sub(w.first)
	if k <= 0 {
		return w.startCum
	}
	if k >= w.npkts {
		return w.startCum + w.cost
	}
	if w.isRead() {
		return w.startCum + uint64(w.requests(k))*pktOverhead
	}
	return w.startCum + uint64(k)*uint64(q.pmtu+pktOverhead)
}

// sendFrom sends packets of w from q.nxt on, at most limit. stop: the window is closed.
func (d *device) sendFrom(q *qp, w *swqe, limit int) (sent int, stop bool) {
	wnd := q.cwnd
	if q.window > 0 {
		wnd = min(wnd, q.window)
	}
	k := q.nxt.Sub(w.first)
	resend := q.nxt.Less(q.max)
	for ; k < w.npkts && sent < limit; k++ {
		if !d.tx.ready() {
			d.queueTX(q)
			return sent, true
		}
		// One message at least is always allowed, else a window smaller than a packet would stop us.
		inflight := q.cumNxt - q.cumUna
		if q.nxt != q.una && (q.nxt.Sub(q.una) >= q.pktLimit || inflight >= wnd) {
			// The packet before asked for an acknowledgement: ack below looks one packet ahead.
			if q.deadline.IsZero() {
				q.armRTO()
			}
			return sent, true
		}
		step := 1
		if w.isRead() {
			if step = w.chunkEnd(k) - k; q.rdOut > 0 && (q.rdOut >= int(q.attr.MaxRDAtomic) || q.readDue+step > q.readWindow()) {
				if q.deadline.IsZero() {
					q.armRTO()
				}
				return sent, true // the next answer makes room
			}
		}
		last := k+step == w.npkts
		q.sinceAck++
		nextCum := q.cumAt(w, q.nxt.Add(step))
		ack := last || q.sinceAck >= ackEvery || nextCum-q.cumUna >= wnd || q.nxt.Add(step).Sub(q.una) >= q.pktLimit
		if ack {
			q.sinceAck = 0
		}
		if v := d.emitRequest(q, w, k, ack); v != granted {
			if v == absent && d.pauseTX(q, w, q.nxt, uint32(k*q.pmtu), w.isReadLike()) == absent {
				if q.deadline.IsZero() && sent > 0 {
					q.armRTO()
				}
				return sent, true
			}
			// The region it sends from is no longer what it was when it started.
			if q.head.Load() == q.cur {
				q.fail(w, verbs.WCLocProtErr)
			}
			return sent, true
		}
		if resend {
			d.stats.add(cRetransmits, 1)
		}
		if w.isReadLike() {
			w.out++
			q.rdOut++
			if w.isRead() {
				q.readDue += step
			}
		}
		if q.timedAt.IsZero() && ack && !resend && !w.isRead() {
			q.timedPSN, q.timedAt = q.nxt, d.now
		}
		q.nxt = q.nxt.Add(step)
		q.cumNxt = nextCum
		if q.max.Less(q.nxt) {
			q.max = q.nxt
		}
		resend = q.nxt.Less(q.max)
		sent++
		if step > 1 {
			k += step - 1
		}
	}
	if q.deadline.IsZero() && sent > 0 {
		q.armRTO()
	}
	if k >= w.npkts {
		q.cur++
	}
	return sent, false
}

// emitRequest sends packet k of w, unless its memory cannot be had.
func (d *device) emitRequest(q *qp, w *swqe, k int, ack bool) verdict {
	p := w.first.Add(k)
	off := uint32(k * q.pmtu)
	var b pktBuilder
	switch w.op {
	case verbs.OpRead, verbs.OpReadWithInv:
		rem := uint32(min(uint64(w.total), uint64(w.chunkEnd(k))*uint64(q.pmtu)) - uint64(off))
		if w.indirect {
			if _, _, v := d.translate(w.sgs, off, q.txFault.enough(p, rem, uint32(q.pmtu)), true); v != granted {
				return v // what comes could not be placed
			}
		}
		b.begin(d, q, roce.RCReadRequest, roce.BTHLen+roce.RETHLen, 0)
		roce.PutRETH(b.hdr[roce.BTHLen:], w.raddr+uint64(off), w.rkey, rem)
		b.finish(d, q, roce.RCReadRequest, false, true, q.attr.DestQPN, p, nil, 0)
		return granted
	case verbs.OpCompareSwap, verbs.OpFetchAdd:
		if w.indirect {
			if _, _, v := d.translate(w.sgs, 0, w.total, true); v != granted {
				return v
			}
		}
		op, a, c := roce.RCFetchAdd, w.cmp, uint64(0)
		if w.op == verbs.OpCompareSwap {
			op, a, c = roce.RCCmpSwap, w.swap, w.cmp
		}
		b.begin(d, q, op, roce.BTHLen+roce.AtomicETHLen, 0)
		roce.PutAtomicETH(b.hdr[roce.BTHLen:], w.raddr, w.rkey, a, c)
		b.finish(d, q, op, false, true, q.attr.DestQPN, p, nil, 0)
		return granted
	}
	n := min(uint32(q.pmtu), w.total-off)
	sgs, at := w.sgs, off
	if w.indirect {
		var v verdict
		if sgs, at, v = d.translate(w.sgs, off, n, false); v != granted {
			return v
		}
	}
	first, last := k == 0, k == w.npkts-1
	op := requestOpcode(w.op, first, last)
	b.begin(d, q, op, op.Info().HdrLen, int(n))
	x := b.hdr[roce.BTHLen:]
	if op.Info().Flags&roce.FlagRETH != 0 {
		roce.PutRETH(x, w.raddr, w.rkey, w.total)
		x = x[roce.RETHLen:]
	}
	if last {
		switch w.op {
		case verbs.OpSendWithImm, verbs.OpWriteWithImm:
			putU32(x, w.imm)
		case verbs.OpSendWithInv:
			putU32(x, w.rkey)
		}
	}
	se := last && w.flags&verbs.SendSolicited != 0 && w.op != verbs.OpWrite
	return b.finish(d, q, op, se, ack, q.attr.DestQPN, p, sgs, at)
}

func putU32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
}

func requestOpcode(op verbs.SendOpcode, first, last bool) roce.Opcode {
	write := op == verbs.OpWrite || op == verbs.OpWriteWithImm
	switch {
	case first && !last && write:
		return roce.RCWriteFirst
	case first && !last:
		return roce.RCSendFirst
	case !first && !last && write:
		return roce.RCWriteMiddle
	case !first && !last:
		return roce.RCSendMiddle
	}
	switch op {
	case verbs.OpSend:
		return pick(first, roce.RCSendOnly, roce.RCSendLast)
	case verbs.OpSendWithImm:
		return pick(first, roce.RCSendOnlyImm, roce.RCSendLastImm)
	case verbs.OpSendWithInv:
		return pick(first, roce.RCSendOnlyInv, roce.RCSendLastInv)
	case verbs.OpWriteWithImm:
		return pick(first, roce.RCWriteOnlyImm, roce.RCWriteLastImm)
	}
	return pick(first, roce.RCWriteOnly, roce.RCWriteLast)
}

func pick(only bool, a, b roce.Opcode) roce.Opcode {
	if only {
		return a
	}
	return b
}

// goBack makes the requester continue from PSN p, una <= p < max. For a READ that is in the middle p
// is the first missing response.
func (d *device) goBack(q *qp, p psn.PSN, loss bool) {
	q.nxt = p
	q.rdOut, q.readDue = 0, 0
	h, t := q.head.Load(), q.tail.Load()
	for q.cur = h; q.cur != t; q.cur++ {
		w := q.slot(q.cur)
		if !w.started {
			break
		}
		if p.LessEq(w.last()) {
			q.cumNxt = q.cumAt(w, p)
			break
		}
		q.rdOut += int(w.out)
	}
	for i := q.cur; i != t && q.slot(i).started; i++ {
		q.slot(i).out = 0 // to be sent again
	}
	q.sinceAck = 0
	q.timedAt = time.Time{} // Karn: no sample from what was sent twice
	q.backAt, q.backTo = d.now, p
	q.probing = false
	if loss {
		// The window that lost halves, once per go-back.
		q.ssthresh = max((q.cumNewest()-q.cumUna)/2, minWindow)
		q.cwnd = min(q.cwnd, q.ssthresh)
	}
	d.queueTX(q)
}

// cumNewest is the cost of everything before max.
func (q *qp) cumNewest() uint64 { return q.cumNew }

func (q *qp) armRTO() {
	q.deadline = q.dev.now.Add(q.rto)
	if q.stallSince.IsZero() {
		q.stallSince = q.dev.now
	}
	q.dev.timers.add(q, q.deadline)
}

// progress is called when una has moved.
func (q *qp) progress() {
	d := q.dev
	q.stallSince = time.Time{}
	q.rnrLeft = q.attr.RNRRetry
	if !q.timedAt.IsZero() && q.timedPSN.Less(q.una) {
		q.sampleRTT(d.now.Sub(q.timedAt))
		q.timedAt = time.Time{}
	}
	q.rto = q.baseRTO() // the peer answers: what timeouts added is over
	if q.una == q.max {
		q.deadline = time.Time{}
		q.probing = false
		q.checkDrained()
		return
	}
	q.stallSince = d.now
	q.deadline = d.now.Add(q.rto) // its entry in the heap is lazily moved
	d.timers.add(q, q.deadline)
}

func (q *qp) sampleRTT(r time.Duration) {
	if q.srtt == 0 {
		q.srtt, q.rttvar = r, r/2
	} else {
		diff := q.srtt - r
		if diff < 0 {
			diff = -diff
		}
		q.rttvar += (diff - q.rttvar) / 4
		q.srtt += (r - q.srtt) / 8
	}
}

// baseRTO is the retransmission timeout before any backing off.
func (q *qp) baseRTO() time.Duration {
	if q.srtt == 0 {
		return initialRTO
	}
	return min(max(q.srtt+4*q.rttvar, minRTO), maxRTO)
}

// grow opens the congestion window for n bytes acknowledged without loss.
func (q *qp) grow(n uint64) {
	limit := q.window
	if limit == 0 {
		limit = kernelPackets * uint64(q.pmtu+pktOverhead)
	}
	if q.cwnd >= limit {
		return
	}
	if q.cwnd < q.ssthresh {
		q.cwnd += n
	} else {
		q.cwnd += max(1, uint64(q.pmtu)*n/q.cwnd)
	}
	q.cwnd = min(q.cwnd, limit)
}

// timeout is called by runTimers when the QP's deadline or RNR wait may have passed.
func (d *device) timeout(q *qp) {
	if !q.paceUntil.IsZero() {
		if d.now.Before(q.paceUntil) {
			d.timers.add(q, q.paceUntil)
		} else {
			q.paceUntil = time.Time{}
			d.dueAnswer(q)
		}
	}
	d.askRepeat(q)
	if q.State() != verbs.StateRTS && q.State() != verbs.StateSQD {
		return
	}
	if !q.rnrUntil.IsZero() {
		if d.now.Before(q.rnrUntil) {
			d.timers.add(q, q.rnrUntil)
			return
		}
		q.rnrUntil = time.Time{}
		q.deadline = time.Time{}
		// Nothing was lost, but the peer may still not be ready: it is asked with a handful of packets, not with a window that it
		// would throw away again. The window opens with its acknowledgements as fast as it was.
		q.ssthresh = max(q.ssthresh, q.cwnd)
		q.cwnd = min(q.cwnd, minWindow)
		d.goBack(q, q.una, false)
		q.backAt = time.Time{} // it was no answer to a loss: a sequence NAK from now on is news
		return
	}
	if q.deadline.IsZero() || q.una == q.max {
		return
	}
	if q.txFault.waiting { // for this side's own memory: nothing is known of the peer
		q.armRTO()
		return
	}
	if d.now.Before(q.deadline) {
		d.timers.add(q, q.deadline)
		return
	}
	if g := d.giveUp(q); g > 0 && !q.stallSince.IsZero() && d.now.Sub(q.stallSince) >= g {
		q.failHead(verbs.WCRetryExcErr)
		return
	}
	d.stats.add(cTimeouts, 1)
	q.rto = min(q.rto*2, maxRTO)
	q.timedAt = time.Time{}
	q.deadline = d.now.Add(q.rto)
	d.timers.add(q, q.deadline)
	d.probe(q)
}

// giveUp is how long a QP goes without progress before its oldest request fails.
func (d *device) giveUp(q *qp) time.Duration {
	t := verbs.AckTimeoutDuration(q.attr.Timeout)
	if t == 0 {
		return 0 // the attribute's "no timer": for ever, but probing
	}
	return max(t*time.Duration(q.attr.RetryCount+1), d.cfg.GiveUp)
}

// probe sends the oldest unacknowledged packet again, alone. If the peer has it, the duplicate is
// acknowledged with all that arrived in order; if not, it is executed; in both cases
// the answer tells from where to go on, and a lost tail costs one packet, not a window.
func (d *device) probe(q *qp) {
	h := q.head.Load()
	if h == q.tail.Load() || !q.slot(h).started {
		return
	}
	w := q.slot(h)
	d.stats.add(cProbes, 1)
	d.stats.add(cRetransmits, 1)
	q.probing = true
	p := q.una
	if w.isReadLike() {
		p = w.got
	}
	k := p.Sub(w.first)
	if k < 0 || k >= w.npkts {
		k = 0
	}
	v := d.emitRequest(q, w, k, true)
	if v == absent {
		v = d.pauseTX(q, w, w.first.Add(k), uint32(k*q.pmtu), w.isReadLike())
		q.reprobe = v == absent
	}
	if v == refused {
		q.fail(w, verbs.WCLocProtErr)
	}
}

// fail completes w, the oldest request, with a status and moves the QP to ERR.
func (q *qp) fail(w *swqe, s verbs.WCStatus) {
	h := q.head.Load()
	wc := verbs.WC{ID: w.id, Status: s, QPN: verbs.QPN(q.num)}
	q.dev.tx.dropQP(q)
	q.freeSend(h, w)
	q.complete(q.scq, &wc, false)
	q.enterErr()
}

func (q *qp) failHead(s verbs.WCStatus) {
	if h := q.head.Load(); h != q.tail.Load() {
		q.fail(q.slot(h), s)
	} else {
		q.enterErr()
	}
}

// checkDrained raises SQ_DRAINED when the send queue has come to rest in SQD.
func (q *qp) checkDrained() {
	if q.State() != verbs.StateSQD || q.una != q.max {
		return
	}
	if h := q.cur; h != q.tail.Load() && q.slot(h).started {
		return // a message is still to be finished
	}
	if q.sqdNotify {
		q.sqdNotify = false
		q.dev.async(verbs.AsyncEvent{Type: verbs.EventSQDrained, QP: q})
	}
}
