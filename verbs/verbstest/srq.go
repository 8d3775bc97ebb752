package verbstest

import (
	"errors"

	"github.com/openrds/openrds/verbs"
)

func srqCases() []testcase {
	return []testcase{
		{"SharedInArrivalOrder", srqShared},
		{"PostOnQPRefused", srqPostOnQP},
		{"LimitEventOncePerArm", srqLimit},
		{"EmptyIsRNRUntilRefilled", srqRefill},
		{"ErrorOfOneQPLeavesTheRest", srqQPError},
		{"RequestInUseTakesTheError", srqInUse},
		{"WriteWithImmTakesOne", srqWriteImm},
		{"Full", srqFull},
		{"CloseForgetsRequests", srqClose},
		{"UD", srqUD},
	}
}

// srqPairs is n pairs whose B ends share an SRQ of 32 requests and a CQ.
func srqPairs(l *lab, n int, change ...func(*link)) (verbs.SRQ, []*pair) {
	l.Helper()
	srq, cq := l.b.srq(32, 2), l.b.cq(256, nil)
	var ps []*pair
	for range n {
		ps = append(ps, l.pair(append([]func(*link){func(k *link) {
			k.cfgB.SRQ, k.cfgB.RecvCQ, k.cfgB.MaxRecvWR = srq, cq, 0
		}}, change...)...))
	}
	return srq, ps
}

func (l *lab) srqPost(srq verbs.SRQ, wrs ...verbs.RecvWR) {
	l.Helper()
	if n, err := srq.PostRecv(wrs); n != len(wrs) || err != nil {
		l.Fatalf("post %d receives on the SRQ: took %d, %v", len(wrs), n, err)
	}
}

func srqShared(l *lab) {
	srq, ps := srqPairs(l, 3)
	r := l.b.region(32*4, verbs.AccessLocalWrite)
	src := l.a.region(4, 0)
	for i := range 30 {
		l.srqPost(srq, verbs.RecvWR{ID: uint64(i), SGs: r.sg(4*i, 4)})
	}
	for i := range 30 {
		p := ps[i%3]
		src.mem[0] = byte(i)
		p.a.send(sendWR(0, src.sg(0, 1)))
		p.a.wantSent("a SEND into the SRQ", 0, verbs.WCSend)
		p.b.wantRecvd("requests are taken in order of arrival over all QPs", uint64(i), 1)
		if r.mem[4*i] != byte(i) {
			l.Fatalf("request %d holds another message: %d", i, r.mem[4*i])
		}
	}
}

func srqPostOnQP(l *lab) {
	_, ps := srqPairs(l, 1)
	n, err := ps[0].b.qp.PostRecv([]verbs.RecvWR{{}})
	if n != 0 {
		l.Fatalf("a QP with an SRQ took %d receives", n)
	}
	l.wantErr("posting a receive on a QP with an SRQ", err, verbs.ErrInvalid)
}

func srqLimit(l *lab) {
	srq, ps := srqPairs(l, 1)
	p := ps[0]
	post := func(n int) {
		for range n {
			l.srqPost(srq, verbs.RecvWR{})
		}
	}
	take := func() {
		l.Helper()
		p.ping(0)
		p.b.wantRecvd("a SEND into the SRQ", 0, 0)
	}
	post(5)
	take()
	l.must("arm at 3", srq.Arm(3))
	take()
	l.settle()
	l.b.wantNoEvent("3 left, armed at 3", verbs.EventSRQLimitReached)
	take()
	l.b.wantEvent("2 left, armed at 3", ofSRQ(srq), verbs.EventSRQLimitReached)
	take()
	l.settle()
	l.b.wantNoEvent("the event disarms", verbs.EventSRQLimitReached)
	post(5)
	l.must("arm at 6", srq.Arm(6))
	l.must("disarm", srq.Arm(0))
	take()
	l.settle()
	l.b.wantNoEvent("0 disarms", verbs.EventSRQLimitReached)
	l.must("arm at 5", srq.Arm(5))
	take()
	l.b.wantEvent("armed again, it is raised again", ofSRQ(srq), verbs.EventSRQLimitReached)
}

func srqRefill(l *lab) {
	srq, ps := srqPairs(l, 2)
	for i, p := range ps {
		p.a.send(sendWR(uint64(i), nil))
	}
	ps[0].b.wantQuiet("nothing is delivered without a request")
	ps[0].a.wantQuiet("nor completed")
	l.srqPost(srq, verbs.RecvWR{ID: 1}, verbs.RecvWR{ID: 2})
	for i, p := range ps {
		p.a.wantSent("it gets through once there are requests", uint64(i), verbs.WCSend)
	}
	seen := map[verbs.QPN]bool{}
	ids := map[uint64]bool{}
	for range 2 { // in an order that is only defined within a QP
		wc := ps[0].b.nextWC("the receive", ps[0].b.rcq)
		if wc.Status != verbs.WCSuccess {
			l.Fatalf("the receive: %+v", wc)
		}
		seen[wc.QPN], ids[wc.ID] = true, true
	}
	if !ids[1] || !ids[2] {
		l.Fatalf("each request was used once: %v", ids)
	}
	if !seen[ps[0].b.qp.Num()] || !seen[ps[1].b.qp.Num()] {
		l.Fatalf("each QP got one: %v", seen)
	}
}

func srqQPError(l *lab) {
	srq, ps := srqPairs(l, 2)
	l.srqPost(srq, verbs.RecvWR{ID: 1}, verbs.RecvWR{ID: 2})
	ps[0].b.to(verbs.StateErr)
	l.b.wantEvent("a QP in ERR takes no more of the SRQ", ofQP(ps[0].b.qp), verbs.EventQPLastWQEReached)
	ps[0].b.wantQuiet("its SRQ's requests are not flushed")
	ps[1].ping(0)
	ps[1].b.wantRecvd("another QP uses them", 1, 0)
}

func srqInUse(l *lab) {
	srq, ps := srqPairs(l, 2)
	p := ps[0]
	r := l.b.region(64, verbs.AccessLocalWrite)
	l.srqPost(srq, verbs.RecvWR{ID: 1, SGs: r.sg(0, 10)}, verbs.RecvWR{ID: 2, SGs: r.sg(20, 10)})
	p.a.send(sendWR(5, l.a.region(11, 0).sg(0, 11)))
	p.b.wantRecvStatus("the request in use takes the error", verbs.WCLocLenErr, 1)
	p.a.wantRefused("the sender is told", verbs.WCRemInvReqErr, 5)
	l.b.wantEvent("the QP takes no more", ofQP(p.b.qp), verbs.EventQPLastWQEReached)
	p.b.wantQuiet("no other request is touched")
	ps[1].ping(0)
	ps[1].b.wantRecvd("which is there for another QP", 2, 0)
}

func srqWriteImm(l *lab) {
	srq, ps := srqPairs(l, 1)
	p := ps[0]
	l.srqPost(srq, verbs.RecvWR{ID: 1}, verbs.RecvWR{ID: 2})
	n := 2*p.mtu.Bytes() + 3
	target, src := l.b.region(n, allAccess), l.a.region(n, 0)
	copy(src.mem, l.nextPattern(n))
	wr := remoteWR(9, verbs.OpWriteWithImm, src.sg(0, n), target, 0)
	wr.Imm = testImm
	p.a.send(wr)
	p.a.wantSent("the WRITE completes", 9, verbs.WCWrite)
	p.b.wantWC("its immediate takes one request", p.b.rcq,
		verbs.WC{ID: 1, Opcode: verbs.WCRecvWriteWithImm, Flags: verbs.WCWithImm, Imm: testImm, ByteLen: uint32(n)})
	l.wantBytes("the data is in place", target.mem, src.mem)
	p.ping(0)
	p.b.wantRecvd("and only one", 2, 0)
}

func srqFull(l *lab) {
	srq := l.b.srq(8, 1)
	n, err := srq.PostRecv(make([]verbs.RecvWR, 1000))
	if n < 8 || n == 1000 {
		l.Fatalf("an SRQ of 8 took %d requests", n)
	}
	l.wantErr("posting more than fits", err, verbs.ErrRQFull)
	if n, err = srq.PostRecv(make([]verbs.RecvWR, 1)); n != 0 || !errors.Is(err, verbs.ErrRQFull) {
		l.Fatalf("posting to a full SRQ: took %d, %v", n, err)
	}
	r := l.b.region(64, verbs.AccessLocalWrite)
	srq = l.b.srq(8, 2)
	n, err = srq.PostRecv([]verbs.RecvWR{{SGs: r.sg(0, 1)}, {SGs: []verbs.SGE{r.sge(0, 1), r.sge(1, 1), r.sge(2, 1)}}, {}})
	if n != 1 {
		l.Fatalf("a request with too many SGEs stops the batch: took %d, want 1", n)
	}
	l.wantErr("a request with too many SGEs", err, verbs.ErrInvalid)
}

func srqClose(l *lab) {
	srq, ps := srqPairs(l, 1)
	r := l.b.region(64, verbs.AccessLocalWrite)
	l.srqPost(srq, verbs.RecvWR{ID: 1, SGs: r.sg(0, 64)})
	l.wantBusy("closing an SRQ that a QP uses", srq.Close())
	l.srqPost(srq, verbs.RecvWR{ID: 2})
	l.must("close the QP", ps[0].b.qp.Close())
	l.must("close the SRQ", srq.Close())
	l.must("close the SRQ again", srq.Close())
	l.must("its requests hold no memory any more", r.mr.Deregister())
	_, err := srq.PostRecv([]verbs.RecvWR{{}})
	l.wantErr("posting to a closed SRQ", err, verbs.ErrClosed)
	ps[0].b.wantQuiet("posted requests vanish without completions")
}

func srqUD(l *lab) {
	if l.env.Lossy {
		l.Skip("the network loses datagrams")
	}
	srq := l.b.srq(8, 2)
	a := l.udEnd(l.a, nil)
	b := l.udEnd(l.b, func(c *verbs.QPConfig) { c.SRQ, c.MaxRecvWR = srq, 0 })
	r := l.b.region(2*100, verbs.AccessLocalWrite)
	l.srqPost(srq, verbs.RecvWR{ID: 1, SGs: r.sg(0, 100)}, verbs.RecvWR{ID: 2, SGs: r.sg(100, 100)})
	src := l.a.region(30, 0)
	for id := uint64(1); id <= 2; id++ {
		a.send(udWR(b, id, src.sg(0, 30)))
		a.wantSent("the datagram is sent", id, verbs.WCSend)
		b.wantUD("a datagram takes a request of the SRQ", id, 30, a)
	}
}
