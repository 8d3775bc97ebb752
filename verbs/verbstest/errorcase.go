package verbstest

import (
	"fmt"
	"time"

	"github.com/openrds/openrds/verbs"
)

// fault is a request of A that fails, between others that must not be disturbed or must flush.
type fault struct {
	name string
	link func(*link)
	// bad is the failing request. It is posted unsignaled: an error always completes. Without an opcode there
	// is nothing to post.
	bad func(p *pair) verbs.SendWR
	// status is how it completes at A.
	status verbs.WCStatus

	// peer is what happens to B: nothing, when the failure is A's own; otherwise its QP errs,
	// with a status in the receive that was in use, or an event.
	peer      peerEffect
	recvs     func(p *pair) verbs.RecvWR // B's receive for bad; nil: an empty one, if one is consumed at all
	peerState verbs.WCStatus
}

type peerEffect uint8

const (
	peerUnaware    peerEffect = iota // B does not learn of it
	peerEvent                        // B's QP errs with an access or request event
	peerCompletion                   // the receive in use completes with fault.peerState
)

// errorEvents are what a responder raises for a fatal error no receive completion carries.
var errorEvents = []verbs.EventType{verbs.EventQPFatal, verbs.EventQPRequestErr, verbs.EventQPAccessErr}

// run posts, on A: a good SEND, the bad request, three more. On B: four receives. It then checks
// every completion on both sides.
func (f fault) run(l *lab) {
	p := l.pair(func(k *link) {
		if f.link != nil {
			f.link(k)
		}
	})
	p.a.recvEmpty(901, 902)
	second := verbs.RecvWR{ID: 802}
	if f.recvs != nil {
		second = f.recvs(p)
		second.ID = 802
	}
	p.b.recv(verbs.RecvWR{ID: 801}, second, verbs.RecvWR{ID: 803}, verbs.RecvWR{ID: 804})
	bad := f.bad(p)
	if bad.Opcode == 0 {
		return // refused when it was posted
	}
	bad.ID, bad.Flags = 2, 0
	last := sendWR(5, nil)
	p.a.send(sendWR(1, nil), bad, verbs.SendWR{ID: 3, Opcode: verbs.OpSend}, sendWR(4, nil), last)

	if f.peer == peerUnaware {
		p.a.wantSent("what was posted before completes", 1, verbs.WCSend)
		p.a.wantSendStatus("the request fails", f.status, 2)
	} else {
		f.wantRefused(p.a)
	}
	p.a.wantSendStatus("what was posted behind it flushes, signaled or not", verbs.WCFlushErr, 3, 4, 5)
	p.a.wantRecvStatus("A's receives flush", verbs.WCFlushErr, 901, 902)
	p.a.wantState("A's QP", verbs.StateErr)
	p.b.wantRecvd("what was sent before arrived", 801, 0)
	switch f.peer {
	case peerUnaware:
		p.b.wantQuiet("the peer is not told")
		p.b.wantState("B's QP", verbs.StateRTS)
	case peerEvent:
		l.b.wantEvent("the responder raises an event", ofQP(p.b.qp), errorEvents...)
		p.b.wantRecvStatus("B's receives flush", verbs.WCFlushErr, 802, 803, 804)
		p.b.wantState("B's QP", verbs.StateErr)
	case peerCompletion:
		p.b.wantRecvStatus("the receive in use fails", f.peerState, 802)
		p.b.wantRecvStatus("B's other receives flush", verbs.WCFlushErr, 803, 804)
		p.b.wantState("B's QP", verbs.StateErr)
		p.b.wantQuiet("exactly one completion each")
		l.b.wantNoEvent("the completion carries the error, no event does", errorEvents...)
	}
	for _, e := range []*end{p.a, p.b} {
		if e == p.b && f.peer == peerUnaware {
			continue
		}
		e.send(sendWR(11, nil), verbs.SendWR{ID: 12, Opcode: verbs.OpSend})
		e.recvEmpty(13, 14)
		e.wantSendStatus("sends posted in ERR flush", verbs.WCFlushErr, 11, 12)
		e.wantRecvStatus("receives posted in ERR flush", verbs.WCFlushErr, 13, 14)
		e.wantQuiet("exactly one completion each")
	}
}

// wantRefused expects a good request 1 and the refused request 2. The NAK acknowledges request 1 too:
// when it is lost with an earlier acknowledgement, both are stuck.
func (f fault) wantRefused(e *end) {
	e.l.Helper()
	wc := e.nextWC("what was posted before completes", e.scq)
	if e.l.env.Lossy && wc.ID == 1 && wc.Status == verbs.WCRetryExcErr {
		e.wantSendStatus("the bad request flushes", verbs.WCFlushErr, 2)
		return
	}
	if msg := diffWC(wc, verbs.WC{ID: 1, Opcode: verbs.WCSend, QPN: e.qp.Num()}); msg != "" {
		e.l.Fatalf("what was posted before completes: completion on %s: %s", e.name, msg)
	}
	e.wantRefused("the request fails", f.status, 2)
}

// Faults of A's own memory.

func localFaults() []fault {
	opOf := func(op verbs.SendOpcode, sgs func(p *pair) []verbs.SGE) func(p *pair) verbs.SendWR {
		return func(p *pair) verbs.SendWR {
			return remoteWR(0, op, sgs(p), p.b.region(64, allAccess), 0)
		}
	}
	badKey := func(p *pair) []verbs.SGE {
		r := p.a.region(64, allAccess)
		return []verbs.SGE{{Addr: r.addr(0), Length: 8, LKey: r.mr.LKey() ^ 1}}
	}
	gone := func(p *pair) []verbs.SGE {
		r := p.a.region(64, allAccess)
		p.l.must("deregister", r.mr.Deregister())
		return r.sg(0, 8)
	}
	pastEnd := func(p *pair) []verbs.SGE { return p.a.region(64, allAccess).sg(57, 8) }
	before := func(p *pair) []verbs.SGE { return p.a.region(64, allAccess).sg(-1, 8) }
	otherPD := func(p *pair) []verbs.SGE { return p.a.regionIn(p.a.allocPD(), 64, allAccess).sg(0, 8) }
	second := func(p *pair) []verbs.SGE {
		return []verbs.SGE{p.a.region(64, allAccess).sge(0, 4), badKey(p)[0]}
	}
	wrap := func(p *pair) []verbs.SGE {
		r := p.a.region(64, allAccess)
		return []verbs.SGE{{Addr: ^uint64(0) - 3, Length: 8, LKey: r.mr.LKey()}}
	}
	readOnly := func(p *pair) []verbs.SGE { return p.a.region(64, verbs.AccessRemoteRead).sg(0, 8) }
	fs := []fault{
		{name: "LOC_PROT/KeyVariant", bad: opOf(verbs.OpSend, badKey)},
		{name: "LOC_PROT/Deregistered", bad: opOf(verbs.OpSend, gone)},
		{name: "LOC_PROT/PastTheEndByOne", bad: opOf(verbs.OpSend, pastEnd)},
		{name: "LOC_PROT/BeforeTheStart", bad: opOf(verbs.OpWrite, before)},
		{name: "LOC_PROT/AddressWraps", bad: opOf(verbs.OpWrite, wrap)},
		{name: "LOC_PROT/OtherPD", bad: opOf(verbs.OpWrite, otherPD)},
		{name: "LOC_PROT/SecondElement", bad: opOf(verbs.OpSendWithImm, second)},
		{name: "LOC_PROT/ReadWithoutLocalWrite", bad: opOf(verbs.OpRead, readOnly)},
		{name: "LOC_PROT/AtomicWithoutLocalWrite", bad: opOf(verbs.OpFetchAdd, readOnly)},
		{name: "LOC_PROT/ReadOfBadKey", bad: opOf(verbs.OpRead, badKey)},
	}
	for i := range fs {
		fs[i].status = verbs.WCLocProtErr
	}
	return append(fs,
		fault{name: "LOC_QP_OP/ReadWithDepthZero", status: verbs.WCLocQPOpErr,
			link: func(k *link) { k.rdAtomic = 0 }, bad: opOf(verbs.OpRead, newSinkOf)},
		fault{name: "LOC_QP_OP/AtomicWithDepthZero", status: verbs.WCLocQPOpErr,
			link: func(k *link) { k.rdAtomic = 0 }, bad: opOf(verbs.OpCompareSwap, newSinkOf)})
}

func newSinkOf(p *pair) []verbs.SGE { return newSink(p.a) }

// Faults the responder finds in the request.

func remoteFaults() (fs []fault) {
	ops := []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd, verbs.OpCompareSwap}
	right := map[verbs.SendOpcode]verbs.Access{
		verbs.OpWrite: verbs.AccessRemoteWrite, verbs.OpRead: verbs.AccessRemoteRead,
		verbs.OpFetchAdd: verbs.AccessRemoteAtomic, verbs.OpCompareSwap: verbs.AccessRemoteAtomic,
	}
	for _, op := range ops {
		on := func(target func(p *pair) (*region, int)) func(p *pair) verbs.SendWR {
			return func(p *pair) verbs.SendWR {
				r, off := target(p)
				return remoteWR(0, op, newSink(p.a), r, off)
			}
		}
		full := func(p *pair) *region { return p.b.region(64, allAccess) }
		access := func(name string, bad func(p *pair) verbs.SendWR) {
			fs = append(fs, fault{name: fmt.Sprintf("REM_ACCESS/%v/%s", op, name), status: verbs.WCRemAccessErr, peer: peerEvent, bad: bad})
		}
		access("KeyVariant", func(p *pair) verbs.SendWR {
			wr := on(func(p *pair) (*region, int) { return full(p), 0 })(p)
			wr.RKey ^= 0x80
			return wr
		})
		access("KeyIndex", func(p *pair) verbs.SendWR {
			wr := on(func(p *pair) (*region, int) { return full(p), 0 })(p)
			wr.RKey ^= 0x40000000
			return wr
		})
		access("KeyZero", func(p *pair) verbs.SendWR {
			wr := on(func(p *pair) (*region, int) { return full(p), 0 })(p)
			wr.RKey = 0
			return wr
		})
		access("OtherPD", on(func(p *pair) (*region, int) { return p.b.regionIn(p.b.allocPD(), 64, allAccess), 0 }))
		access("Deregistered", on(func(p *pair) (*region, int) {
			r := full(p)
			p.l.must("deregister", r.mr.Deregister())
			return r, 0
		}))
		if op == verbs.OpWrite || op == verbs.OpRead {
			access("PastTheEndByOne", on(func(p *pair) (*region, int) { return full(p), 57 }))
			access("BeforeTheStart", on(func(p *pair) (*region, int) { return full(p), -1 }))
		} else {
			access("PastTheEnd", on(func(p *pair) (*region, int) { return p.b.region(60, allAccess), 56 }))
			access("BeforeTheStart", on(func(p *pair) (*region, int) { return full(p), -8 }))
		}
		access("NoRight", on(func(p *pair) (*region, int) {
			a := allAccess &^ right[op]
			return p.b.region(64, a), 0
		}))
		access("LocalKey", func(p *pair) verbs.SendWR {
			r := p.b.region(64, verbs.AccessLocalWrite)
			if k := r.mr.RKey(); k != 0 {
				p.l.Fatalf("a region without remote rights has no rkey: got %#x", k)
			}
			wr := remoteWR(0, op, newSink(p.a), r, 0)
			wr.RKey = verbs.RKey(r.mr.LKey())
			return wr
		})

		fs = append(fs, fault{name: fmt.Sprintf("REM_INV_REQ/%v/QPForbids", op), status: verbs.WCRemInvReqErr, peer: peerEvent,
			link: func(k *link) { k.access &^= right[op] }, bad: on(func(p *pair) (*region, int) { return full(p), 0 })})
		if op == verbs.OpWrite {
			continue
		}
		fs = append(fs, fault{name: fmt.Sprintf("REM_INV_REQ/%v/NoResources", op), status: verbs.WCRemInvReqErr, peer: peerEvent,
			link: func(k *link) { k.destRDAtomic = 0 }, bad: on(func(p *pair) (*region, int) { return full(p), 0 })})
		if op != verbs.OpRead {
			fs = append(fs, fault{name: fmt.Sprintf("REM_INV_REQ/%v/Misaligned", op), status: verbs.WCRemInvReqErr, peer: peerEvent,
				bad: on(func(p *pair) (*region, int) { return full(p), 4 })})
			// It is the address that counts, wherever the memory may be; and where the memory is not
			// aligned the operation is not possible either.
			for _, off := range []int{0, 4} {
				fs = append(fs, fault{name: fmt.Sprintf("REM_INV_REQ/%v/Misaligned%dOfOddMemory", op, off), status: verbs.WCRemInvReqErr, peer: peerEvent,
					bad: on(func(p *pair) (*region, int) { return p.b.regionOf(p.b.pd, make([]byte, 64)[4:], allAccess), off })})
			}
		}
	}

	// A WRITE with immediate to a place it may not write. Whether the receive it would have taken
	// carries the error or flushes depends on which check comes first (rocev2 spec 4.2), so only the
	// sender's side is like the others'.
	for _, n := range []int{8, 20000} {
		multi := func(p *pair) (*region, *region) { return p.a.region(n, 0), p.b.region(n-1, allAccess) }
		fs = append(fs, fault{name: fmt.Sprintf("REM_ACCESS/RDMA_WRITE/%dBytesPastTheEndByOne", n), status: verbs.WCRemAccessErr, peer: peerEvent,
			bad: func(p *pair) verbs.SendWR {
				src, dst := multi(p)
				return remoteWR(0, verbs.OpWrite, src.sg(0, n), dst, 0)
			}})
	}

	// Faults of B's receive.
	send := func(n int) func(p *pair) verbs.SendWR {
		return func(p *pair) verbs.SendWR { return sendWR(0, p.a.region(n, 0).sg(0, n)) }
	}
	into := func(sgs func(p *pair) []verbs.SGE) func(p *pair) verbs.RecvWR {
		return func(p *pair) verbs.RecvWR { return verbs.RecvWR{SGs: sgs(p)} }
	}
	for _, n := range []int{1, 100, 4096, 3*4096 + 5, 100000} {
		fs = append(fs, fault{name: fmt.Sprintf("LOC_LEN/%dBytesTooLongByOne", n), status: verbs.WCRemInvReqErr,
			peer: peerCompletion, peerState: verbs.WCLocLenErr, bad: send(n),
			recvs: into(func(p *pair) []verbs.SGE { return p.b.region(n+8, verbs.AccessLocalWrite).sg(0, n-1) })})
	}
	remOp := func(name string, n int, sgs func(p *pair) []verbs.SGE) {
		fs = append(fs, fault{name: "REM_OP/" + name, status: verbs.WCRemOpErr, peer: peerCompletion, peerState: verbs.WCLocProtErr,
			bad: send(n), recvs: into(sgs)})
	}
	remOp("ReceiveKeyVariant", 8, func(p *pair) []verbs.SGE {
		sg := p.b.region(64, allAccess).sg(0, 8)
		sg[0].LKey ^= 1
		return sg
	})
	remOp("ReceiveWithoutLocalWrite", 8, func(p *pair) []verbs.SGE { return p.b.region(64, verbs.AccessRemoteRead).sg(0, 8) })
	remOp("ReceiveOfOtherPD", 8, func(p *pair) []verbs.SGE {
		return p.b.regionIn(p.b.allocPD(), 64, allAccess).sg(0, 8)
	})
	remOp("ReceivePastTheEnd", 8, func(p *pair) []verbs.SGE { return p.b.region(64, allAccess).sg(60, 8) })
	remOp("LongMessage", 20000, func(p *pair) []verbs.SGE { return p.b.region(20000, 0).sg(0, 20000) })
	return fs
}

func errorCases() (cases []testcase) {
	for _, f := range append(localFaults(), remoteFaults()...) {
		cases = append(cases, testcase{f.name, f.run})
	}
	for n := range uint8(4) {
		cases = append(cases, testcase{fmt.Sprintf("RNR_RETRY_EXC/%dRetries", n), func(l *lab) { rnrExhausted(l, n) }})
	}
	return append(cases,
		testcase{"RNR/GetsThroughAtTheLastRetry", rnrLast},
		testcase{"RNR/CountReloadsOnProgress", rnrReload},
		testcase{"RNR/SevenIsForEver", rnrForever},
		testcase{"RETRY_EXC/PeerClosed", retryClosed},
		testcase{"RETRY_EXC/PeerReset", retryReset},
		testcase{"RETRY_EXC/PeerInErr", retryPeerErr},
		testcase{"RETRY_EXC/Partition", retryPartition},
		testcase{"RETRY_EXC/Read", retryRead},
		testcase{"HealedInTime", healed},
		testcase{"REM_ACCESS/FirstOfTwo", accessMidQueue},
		testcase{"WR_FLUSH/SetError", flushSetError},
		testcase{"WR_FLUSH/Modify", flushModify},
		testcase{"ReceiverErrReported", receiverErr},
	)
}

// rnrExhausted: the peer never posts a receive. The request fails after as many waits as it has
// retries, each at least the time the peer's timer code stands for.
func rnrExhausted(l *lab, retries uint8) {
	const code, wait = 22, 20480 * time.Microsecond
	p := l.pair(func(k *link) { k.rnrRetry, k.rnrTimer = retries, code })
	start := time.Now()
	p.a.send(sendWR(1, nil), verbs.SendWR{ID: 2, Opcode: verbs.OpSend}, sendWR(3, nil))
	p.a.wantSendStatus("the request fails", verbs.WCRNRRetryExcErr, 1)
	took := time.Since(start)
	p.a.wantSendStatus("the rest flushes", verbs.WCFlushErr, 2, 3)
	p.a.wantState("A's QP", verbs.StateErr)
	if least := time.Duration(retries) * wait; took < least {
		l.Fatalf("%d retries wait at least %v: it took %v", retries, least, took)
	}
	if most := time.Duration(retries+1) * wait; l.exact && took >= most {
		l.Fatalf("%d retries wait no longer than the peer asks: it took %v", retries, took)
	}
	p.b.wantQuiet("the peer has seen nothing")
	p.b.wantState("B's QP", verbs.StateRTS)
}

func rnrLast(l *lab) {
	const wait = 245760 * time.Microsecond // code 29
	p := l.pair(func(k *link) { k.rnrRetry, k.rnrTimer = 2, 29 })
	p.a.send(sendWR(1, nil))
	time.Sleep(wait + wait/2) // the first retry is over, the second is to come
	p.b.recvEmpty(20)
	p.a.wantSent("the second of two retries gets through", 1, verbs.WCSend)
	p.b.wantRecvd("the second of two retries gets through", 20, 0)
}

// rnrReload: retries count from the last progress, so that a slow receiver is not taken for a dead one.
func rnrReload(l *lab) {
	p := l.pair(func(k *link) { k.rnrRetry, k.rnrTimer = 1, 29 })
	for i := range uint64(4) {
		p.a.send(sendWR(i, nil))
	}
	for i := range uint64(4) {
		time.Sleep(245760 * time.Microsecond / 2) // of code 29
		p.b.recvEmpty(20 + i)
		p.a.wantSent("one wait per message", i, verbs.WCSend)
		p.b.wantRecvd("one wait per message", 20+i, 0)
	}
}

func rnrForever(l *lab) {
	p := l.pair(func(k *link) { k.rnrRetry, k.rnrTimer = 7, 20 })
	data := l.nextPattern(10000)
	src, dst := l.a.region(10000, 0), l.b.region(10000, verbs.AccessLocalWrite)
	copy(src.mem, data)
	p.a.send(sendWR(1, src.sg(0, 10000)))
	time.Sleep(200 * time.Millisecond) // nineteen waits
	p.a.wantQuiet("the request waits on")
	p.b.recv(verbs.RecvWR{ID: 20, SGs: dst.sg(0, 10000)})
	p.b.wantRecvd("and gets through", 20, 10000)
	p.a.wantSent("and completes", 1, verbs.WCSend)
	l.wantBytes("with its content", dst.mem, data)
}

func silent(l *lab, gone func(p *pair), bad func(p *pair) verbs.SendWR) {
	l.Helper()
	p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
	p.b.recvEmpty(20)
	p.ping(0)
	wr := bad(p)
	wr.ID = 1
	gone(p)
	p.a.recvEmpty(901)
	p.a.send(wr, verbs.SendWR{ID: 2, Opcode: verbs.OpSend}, sendWR(3, nil))
	p.a.wantSendStatus("the oldest request fails", verbs.WCRetryExcErr, 1)
	p.a.wantSendStatus("the rest flushes", verbs.WCFlushErr, 2, 3)
	p.a.wantRecvStatus("so do the receives", verbs.WCFlushErr, 901)
	p.a.wantState("A's QP", verbs.StateErr)
}

func emptySend(*pair) verbs.SendWR { return sendWR(0, nil) }

func retryClosed(l *lab) {
	silent(l, func(p *pair) { l.must("close B's QP", p.b.qp.Close()) }, emptySend)
}

func retryReset(l *lab) {
	silent(l, func(p *pair) { p.b.to(verbs.StateReset) }, emptySend)
}

func retryPeerErr(l *lab) {
	silent(l, func(p *pair) { p.b.to(verbs.StateErr) }, emptySend)
}

func retryPartition(l *lab) {
	if l.env.Partition == nil {
		l.Skip("the network cannot be cut")
	}
	silent(l, func(*pair) { l.env.Partition(true) }, func(p *pair) verbs.SendWR { return sendWR(0, p.a.region(100000, 0).sg(0, 100000)) })
	l.env.Partition(false)
}

func retryRead(l *lab) {
	silent(l, func(p *pair) { p.b.to(verbs.StateErr) }, func(p *pair) verbs.SendWR {
		return remoteWR(0, verbs.OpRead, newSink(p.a), p.b.region(8, allAccess), 0)
	})
}

// healed: a partition shorter than the requester's patience costs nothing but time.
func healed(l *lab) {
	if l.env.Partition == nil {
		l.Skip("the network cannot be cut")
	}
	p := l.pair(func(k *link) { k.timeout, k.retry = 14, 7 })
	ab, ba := newMix(p, p.a, p.b, 30), newMix(p, p.b, p.a, 30)
	p.a.send(ab.ops[:10]...)
	p.b.send(ba.ops[:10]...)
	l.env.Partition(true)
	p.a.send(ab.ops[10:]...)
	p.b.send(ba.ops[10:]...)
	time.Sleep(300 * time.Millisecond)
	l.env.Partition(false)
	ab.check("A to B")
	ba.check("B to A")
}

// accessMidQueue: of what is on the wire when a request is refused, everything before it has happened and
// nothing behind it has.
func accessMidQueue(l *lab) {
	p := l.pair()
	n := 3 * p.mtu.Bytes()
	good, src := l.b.region(3*n, allAccess), l.a.region(n, 0)
	copy(src.mem, l.nextPattern(n))
	bad := remoteWR(2, verbs.OpWrite, src.sg(0, n), good, 0)
	bad.RKey ^= 1
	first := remoteWR(1, verbs.OpWrite, src.sg(0, n), good, 0)
	first.Flags = 0
	p.a.send(first, bad, remoteWR(3, verbs.OpWrite, src.sg(0, n), good, n))
	p.a.wantRefused("the bad WRITE fails", verbs.WCRemAccessErr, 2)
	p.a.wantSendStatus("the one behind it flushes", verbs.WCFlushErr, 3)
	p.b.wantState("B's QP", verbs.StateErr)
	l.must("close B's QP", p.b.qp.Close())
	l.wantBytes("the WRITE before it was done", good.mem[:n], src.mem)
	for i, b := range good.mem[n:] {
		if b != poison {
			l.Fatalf("the WRITE behind it was not: byte %d is %#x", i, b)
		}
	}
}

func flush(l *lab, err func(p *pair)) {
	l.Helper()
	p := l.pair(func(k *link) { k.rnrTimer = 0 })
	r := l.b.region(64, allAccess)
	p.a.recvEmpty(1, 2, 3)
	// B has no receive: nothing gets past the first.
	p.a.send(sendWR(11, nil), verbs.SendWR{ID: 12, Opcode: verbs.OpSend}, remoteWR(13, verbs.OpRead, newSink(p.a), r, 0),
		remoteWR(14, verbs.OpFetchAdd, newSink(p.a), r, 0), verbs.SendWR{ID: 15, Opcode: verbs.OpWrite, RemoteAddr: r.addr(0), RKey: r.mr.RKey()})
	err(p)
	p.a.wantSendStatus("sends flush in order, signaled or not", verbs.WCFlushErr, 11, 12, 13, 14, 15)
	p.a.wantRecvStatus("receives flush in order", verbs.WCFlushErr, 1, 2, 3)
	p.a.wantState("the QP", verbs.StateErr)
	p.a.wantQuiet("exactly one completion each")
	p.b.recvEmpty(20)
	p.b.wantQuiet("a QP in ERR sends nothing any more")
	p.a.qp.SetError()
	l.must("ERR to ERR", p.a.qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit))
	p.a.wantQuiet("ERR twice flushes nothing twice")
}

func flushSetError(l *lab) { flush(l, func(p *pair) { p.a.qp.SetError() }) }
func flushModify(l *lab)   { flush(l, func(p *pair) { p.a.to(verbs.StateErr) }) }

// receiverErr: a QP with a message half received errs: the receive in use completes once, flushed,
// before those behind it.
func receiverErr(l *lab) {
	p := l.pair()
	r := l.b.region(1<<20, verbs.AccessLocalWrite)
	p.b.recv(verbs.RecvWR{ID: 1, SGs: r.sg(0, 1<<20)}, verbs.RecvWR{ID: 2}, verbs.RecvWR{ID: 3})
	src := l.a.region(1<<20, 0)
	p.a.send(sendWR(1, src.sg(0, 1<<20)))
	time.Sleep(100 * time.Microsecond)
	p.b.qp.SetError()
	wc := p.b.nextWC("the receive in use", p.b.rcq)
	if wc.ID != 1 || wc.Status != verbs.WCFlushErr && wc.Status != verbs.WCSuccess {
		l.Fatalf("the receive in use completes first, flushed unless it was done: %+v", wc)
	}
	p.b.wantRecvStatus("then those behind it", verbs.WCFlushErr, 2, 3)
	p.b.wantQuiet("exactly one completion each")
	r.mem[0] = 1 // ours again: nothing writes to it any more
	p.a.to(verbs.StateErr)
}
