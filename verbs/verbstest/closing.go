package verbstest

import (
	"errors"
	"net/netip"
	"time"

	"github.com/openrds/openrds/verbs"
)

func closeCases() []testcase {
	return []testcase{
		{"ParentsAreBusy", closeParents},
		{"DeviceWithListener", closeListening},
		{"UseAfterClose", useAfterClose},
		{"UseAfterCloseOfDevice", useAfterDeviceClose},
		{"CompletionsOutliveTheQP", completionsOutlive},
		{"QPUnderTraffic", closeUnderTraffic},
		{"CQWhileHandlerRuns", closeCQInHandler},
		{"NothingAfterDeviceClose", nothingAfterClose},
	}
}

// wantBusy ends the case unless err is a *BusyError that names somebody.
func (l *lab) wantBusy(what string, err error) *verbs.BusyError {
	l.Helper()
	l.wantErr(what, err, verbs.ErrBusy)
	e := wantErrAs[*verbs.BusyError](l, what, err)
	if e.Object == "" || len(e.Holders) == 0 || e.Holders[0] == "" {
		l.Fatalf("%s: the error names object and holders: %+v", what, e)
	}
	return e
}

// wantUnusable ends the case unless err says that an object handed in cannot be used.
func (l *lab) wantUnusable(what string, err error) {
	l.Helper()
	if !errors.Is(err, verbs.ErrClosed) && !errors.Is(err, verbs.ErrInvalid) {
		l.Fatalf("%s: error is %v, want one of ErrClosed, ErrInvalid", what, err)
	}
}

func closeParents(l *lab) {
	dev, pd := l.a.dev, l.a.pd
	l.wantBusy("device with a PD", dev.Close())

	mr := l.a.region(64, allAccess).mr
	l.wantBusy("PD with an MR", pd.Close())
	l.must("deregister", mr.Deregister())

	srq := l.a.srq(4, 1)
	l.wantBusy("PD with an SRQ", pd.Close())

	scq, rcq := l.a.cq(16, nil), l.a.cq(16, nil)
	cfg := l.a.qpConfig(verbs.RC)
	cfg.SendCQ, cfg.RecvCQ, cfg.SRQ = scq, rcq, srq
	e := l.a.newEnd(cfg)
	l.wantBusy("send CQ with a QP", scq.Close())
	l.wantBusy("receive CQ with a QP", rcq.Close())
	l.wantBusy("SRQ with a QP", srq.Close())
	l.wantBusy("PD with a QP", pd.Close())
	l.wantBusy("device with everything", dev.Close())

	// Nothing of that changed anything.
	p := l.pair()
	p.b.recvEmpty(20)
	p.ping(0)
	p.b.wantRecvd("the device works on", 20, 0)
	l.must("close that QP", p.a.qp.Close())

	for range 2 {
		l.must("close the QP", e.qp.Close())
	}
	for range 2 {
		l.must("close the SRQ", srq.Close())
		l.must("close the send CQ", scq.Close())
		l.must("close the receive CQ", rcq.Close())
	}
	l.must("close the other CQs", p.a.scq.Close())
	l.must("close the other CQs", p.a.rcq.Close())
	l.must("close the PD", pd.Close())
	cq := l.a.cq(16, nil)
	l.wantBusy("device with a CQ", dev.Close())
	l.must("close the CQ", cq.Close())
	l.must("close the PD again", pd.Close())
	l.must("close the device", dev.Close())
	l.must("close the device again", dev.Close())
}

func closeListening(l *lab) {
	ln, err := l.a.dev.Listen(7000, func(verbs.ConnRequest) {})
	l.must("listen", err)
	l.listeners = append(l.listeners, ln)
	l.must("close the PD", l.a.pd.Close())
	l.wantBusy("device with a listener", l.a.dev.Close())
	l.must("close the listener", ln.Close())
	l.must("close the listener again", ln.Close())
	l.must("close the device", l.a.dev.Close())
}

func useAfterClose(l *lab) {
	p := l.pair()
	qp := p.a.qp
	num := qp.Num()
	l.must("close the QP", qp.Close())
	_, err := qp.PostSend([]verbs.SendWR{sendWR(1, nil)})
	l.wantErr("PostSend on a closed QP", err, verbs.ErrClosed)
	_, err = qp.PostRecv([]verbs.RecvWR{{}})
	l.wantErr("PostRecv on a closed QP", err, verbs.ErrClosed)
	l.wantErr("Modify of a closed QP", qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit), verbs.ErrClosed)
	qp.SetError()
	_ = qp.Query()
	if qp.Num() != num {
		l.Fatal("a closed QP keeps its number")
	}

	l.must("close the CQ", p.a.scq.Close())
	if n := p.a.scq.Poll(make([]verbs.WC, 4)); n != 0 {
		l.Fatalf("a closed CQ has no completions: %d", n)
	}
	if p.a.scq.Arm(false) {
		l.Fatal("a closed CQ has missed nothing")
	}
	cfg := l.a.qpConfig(verbs.RC)
	cfg.SendCQ, cfg.RecvCQ = p.a.scq, p.a.rcq
	_, err = l.a.pd.CreateQP(cfg)
	l.wantUnusable("CreateQP over a closed CQ", err)

	srq := l.a.srq(4, 1)
	l.must("close the SRQ", srq.Close())
	l.wantErr("Arm of a closed SRQ", srq.Arm(1), verbs.ErrClosed)
	cfg.SendCQ, cfg.SRQ = p.a.rcq, srq
	_, err = l.a.pd.CreateQP(cfg)
	l.wantUnusable("CreateQP over a closed SRQ", err)

	pd := l.a.allocPD()
	l.must("close the PD", pd.Close())
	_, err = pd.RegMR(make([]byte, 8), 0, allAccess)
	l.wantErr("RegMR in a closed PD", err, verbs.ErrClosed)
	_, err = pd.CreateSRQ(verbs.SRQConfig{MaxWR: 4, MaxSGE: 1})
	l.wantErr("CreateSRQ in a closed PD", err, verbs.ErrClosed)
	cfg.SRQ = nil
	_, err = pd.CreateQP(cfg)
	l.wantErr("CreateQP in a closed PD", err, verbs.ErrClosed)
}

func useAfterDeviceClose(l *lab) {
	dev := l.a.dev
	l.must("close the PD", l.a.pd.Close())
	l.must("close the device", dev.Close())
	_, err := dev.AllocPD()
	l.wantErr("AllocPD on a closed device", err, verbs.ErrClosed)
	_, err = dev.CreateCQ(verbs.CQConfig{Depth: 1})
	l.wantErr("CreateCQ on a closed device", err, verbs.ErrClosed)
	_, err = dev.Listen(7000, func(verbs.ConnRequest) {})
	l.wantErr("Listen on a closed device", err, verbs.ErrClosed)
	_, _, err = dev.Connect(l.Context(), netip.AddrPortFrom(l.b.dev.Addr(), 7000), l.b.newEnd(l.b.qpConfig(verbs.RC)).qp, verbs.ConnParam{}, nil)
	if err == nil {
		l.Fatal("Connect on a closed device succeeded")
	}
	dev.SetAsyncHandler(nil)
	_ = dev.Stats()
	_ = dev.Attr()
}

func completionsOutlive(l *lab) {
	p := l.pair()
	p.b.recvEmpty(20, 21)
	p.ping(0)
	l.must("close the QP", p.b.qp.Close())
	p.b.wantRecvd("a completion outlives its QP", 20, 0)
	p.b.wantQuiet("requests that had not completed vanish")
}

// closeUnderTraffic closes QPs on both sides while both send: no completion of a closed QP comes after.
func closeUnderTraffic(l *lab) {
	for round := range 6 {
		p := l.pair()
		src, dst := l.a.region(1<<18, verbs.AccessLocalWrite), l.b.region(1<<18, allAccess)
		p.b.recv(verbs.RecvWR{ID: 1, SGs: dst.sg(0, 1<<18)})
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, 1<<18), dst, 0), sendWR(2, src.sg(0, 1<<18)), remoteWR(3, verbs.OpRead, src.sg(0, 1<<18), dst, 0))
		time.Sleep(time.Duration(round) * 100 * time.Microsecond)
		first, second := p.a, p.b
		if round%2 == 1 {
			first, second = p.b, p.a
		}
		var wcs [16]verbs.WC
		l.within(promptly, "closing a QP does not wait for its peer", func() { l.must("close", first.qp.Close()) })
		first.scq.Poll(wcs[:])
		first.rcq.Poll(wcs[:])
		first.wantQuiet("nothing completes after Close")
		l.must("close", second.qp.Close())
		src.mem[0], dst.mem[0] = 1, 1
	}
}

// closeCQInHandler: Close of a CQ waits for its handler.
func closeCQInHandler(l *lab) {
	for range 20 {
		b := new(bell)
		closed := false // written behind Close, read by a handler that must not run then
		bad := make(chan struct{}, 1)
		cq := l.b.cq(16, func(cq verbs.CQ) {
			b.ring(cq)
			if closed {
				bad <- struct{}{}
			}
		})
		p := l.pair(func(k *link) { k.cfgB.RecvCQ = cq })
		p.b.recvEmpty(1)
		cq.Arm(false)
		p.a.send(sendWR(1, nil))
		time.Sleep(10 * time.Microsecond)
		l.must("close the QP", p.b.qp.Close())
		l.must("close the CQ", cq.Close())
		closed = true
		select {
		case <-bad:
			l.Fatal("the handler ran after Close")
		default:
		}
		l.must("close A's QP", p.a.qp.Close())
	}
	l.settle()
}

// nothingAfterClose: a closed device raises no events and leaves its address to the next.
func nothingAfterClose(l *lab) {
	p := l.pair()
	p.b.recvEmpty(20)
	p.ping(0)
	p.b.wantRecvd("it works", 20, 0)
	l.must("close", p.a.qp.Close())
	l.must("close", p.a.scq.Close())
	l.must("close", p.a.rcq.Close())
	l.must("close", l.a.pd.Close())
	l.must("close", l.a.dev.Close())
	old := l.a.dev.Attr().GUID
	l.a = l.node("A'", 0)
	if l.a.dev.Attr().GUID == old {
		l.Fatal("a device opened anew is a new channel adapter: its GUID is another")
	}
	q := l.pair()
	q.b.recvEmpty(21)
	q.ping(0)
	q.b.wantRecvd("the new device works", 21, 0)
}
