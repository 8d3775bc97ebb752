package softroce

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

var ignoreAddr = cmpopts.EquateComparable(netip.Addr{})

// TestCMConnect follows one connection from REQ to the end of timewait on both sides: what goes over
// the wire, how the parameters map to the QPs (rocev2 spec 7.6), when QPNs are free again.
func TestCMConnect(t *testing.T) {
	for _, tc := range []struct{ name, a, b string }{
		{"IPv4", "10.0.0.1", "10.0.0.2"},
		{"IPv6", "fd00::1", "fd00::2"},
		{"IPv6 link local", "fe80::1%eth0", "fe80::2%eth0"},
	} {
		t.Run(tc.name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { testCMConnect(t, tc.a, tc.b) }) })
	}
}

func testCMConnect(t *testing.T, addrA, addrB string) {
	n := newCMNet(t)
	a, b := n.host("A", addrA, 1), n.host("B", addrB, 2)
	got := make(chan *acceptedOne, 1)
	l := b.listen(func(r verbs.ConnRequest) {
		o := &acceptedOne{req: r, qp: b.qp()}
		o.ep, o.err = r.Accept(context.Background(), o.qp, cmPassiveParam, func() error {
			o.qp.wantState(t, "passive prepare", verbs.StateInit)
			return nil
		})
		got <- o
	})
	qa := a.qp()
	prepared := false
	ep, info, err := a.cm.connect(context.Background(), netip.AddrPortFrom(b.addr, cmTestPort), qa, cmActiveParam, func() error {
		prepared = true
		qa.wantState(t, "active prepare", verbs.StateInit)
		if tr := n.trace(); tr != "" {
			t.Errorf("sent before prepare has returned: %s", tr)
		}
		return nil
	})
	if err != nil || !prepared {
		t.Fatalf("connect: %v, prepared %v", err, prepared)
	}
	o := <-got
	if o.err != nil {
		t.Fatal(o.err)
	}
	qb := o.qp

	// Both sides know each other.
	wantB := verbs.Connected{PrivateData: pad(cmActiveParam.PrivateData, 56), ResponderResources: 16, InitiatorDepth: 12,
		PathMTU: verbs.MTU4096, PeerGUID: a.id, PeerQPN: qa.n}
	if d := cmp.Diff(wantB, o.req.Info()); d != "" {
		t.Errorf("what the REQ said (-want +got):\n%s", d)
	}
	wantA := verbs.Connected{PrivateData: pad(cmPassiveParam.PrivateData, 196), ResponderResources: 8, InitiatorDepth: 16,
		PathMTU: verbs.MTU4096, PeerGUID: b.id, PeerQPN: qb.n}
	if d := cmp.Diff(wantA, info); d != "" {
		t.Errorf("what the REP said (-want +got):\n%s", d)
	}
	if ep.Remote() != netip.AddrPortFrom(b.addr, cmTestPort) || ep.Local() != o.ep.Remote() || o.ep.Local() != ep.Remote() ||
		o.req.Remote() != ep.Local() || o.req.Local() != ep.Remote() || ep.Local().Addr() != a.addr {
		t.Errorf("addresses: active %v %v, passive %v %v, request %v %v", ep.Local(), ep.Remote(), o.ep.Local(), o.ep.Remote(), o.req.Local(), o.req.Remote())
	}

	// Parameters.
	reqs, reps := n.sentBy(a, cmwire.AttrREQ), n.sentBy(b, cmwire.AttrREP)
	var req cmwire.REQ
	var rep cmwire.REP
	if len(reqs) != 1 || len(reps) != 1 || req.Decode(reqs[0].mad[:]) != nil || rep.Decode(reps[0].mad[:]) != nil {
		t.Fatalf("%d REQs, %d REPs, or not understood", len(reqs), len(reps))
	}
	if req.Primary.AckTimeout != verbs.DefaultAckTimeout || req.RetryCount != 6 || req.RNRRetryCount != 7 || req.MaxCMRetries != 15 ||
		req.LocalResponseTimeout != 20 || req.RemoteResponseTimeout != 20 {
		t.Errorf("REQ asks for ACK timeout %d, retry %d, RNR %d, CM retries %d, CM timeouts %d %d",
			req.Primary.AckTimeout, req.RetryCount, req.RNRRetryCount, req.MaxCMRetries, req.LocalResponseTimeout, req.RemoteResponseTimeout)
	}
	access := verbs.AccessRemoteWrite | verbs.AccessRemoteRead | verbs.AccessRemoteAtomic
	for _, c := range []struct {
		name     string
		qp       *fakeQP
		rtr, rts verbs.QPAttr
	}{
		{"active", qa,
			verbs.QPAttr{AH: verbs.AH{Remote: b.addr, TrafficClass: 0x28}, PathMTU: verbs.MTU4096, DestQPN: qb.n,
				RQPSN: req.StartingPSN, MaxDestRDAtomic: 16, MinRNRTimer: 9},
			verbs.QPAttr{Timeout: 17, RetryCount: 6, RNRRetry: 5, SQPSN: rep.StartingPSN, MaxRDAtomic: 8}},
		{"passive", qb,
			verbs.QPAttr{AH: verbs.AH{Remote: a.addr, TrafficClass: 0x28}, PathMTU: verbs.MTU4096, DestQPN: qa.n,
				RQPSN: rep.StartingPSN, MaxDestRDAtomic: 8, MinRNRTimer: 11},
			verbs.QPAttr{Timeout: 17, RetryCount: 6, RNRRetry: 7, SQPSN: req.StartingPSN, MaxRDAtomic: 16}},
	} {
		c.qp.wantState(t, c.name, verbs.StateRTS)
		if g := c.qp.got[verbs.StateInit]; g.Access != access || g.Port != 1 || g.PKeyIndex != 0 {
			t.Errorf("%s INIT: access %v, port %d, P_Key index %d", c.name, g.Access, g.Port, g.PKeyIndex)
		}
		g := c.qp.got[verbs.StateRTR]
		rtr := verbs.QPAttr{AH: g.AH, PathMTU: g.PathMTU, DestQPN: g.DestQPN, RQPSN: g.RQPSN, MaxDestRDAtomic: g.MaxDestRDAtomic, MinRNRTimer: g.MinRNRTimer}
		if d := cmp.Diff(c.rtr, rtr, ignoreAddr); d != "" {
			t.Errorf("%s RTR (-want +got):\n%s", c.name, d)
		}
		g = c.qp.got[verbs.StateRTS]
		rts := verbs.QPAttr{Timeout: g.Timeout, RetryCount: g.RetryCount, RNRRetry: g.RNRRetry, SQPSN: g.SQPSN, MaxRDAtomic: g.MaxRDAtomic}
		if d := cmp.Diff(c.rts, rts, ignoreAddr); d != "" {
			t.Errorf("%s RTS (-want +got):\n%s", c.name, d)
		}
	}
	n.wantTrace("establishment", "A REQ, B REP, A RTU")
	a.wantState("after RTU", cmEstab)
	b.wantState("after RTU", cmEstab)

	// The end.
	ca, cb := a.only(), b.only()
	if err := ep.Disconnect(); err != nil {
		t.Fatal(err)
	}
	qa.wantState(t, "Disconnect has returned", verbs.StateErr)
	if qa.errs != 1 {
		t.Errorf("SetError called %d times", qa.errs)
	}
	<-ep.Done()
	<-o.ep.Done()
	qb.wantState(t, "when Done is closed", verbs.StateErr)
	time.Sleep(5 * time.Millisecond)
	n.wantTrace("disconnect", "A DREQ, B DREP")
	a.wantState("DREP has arrived", cmTimewait)
	b.wantState("DREP was sent", cmTimewait)
	if err := ep.Disconnect(); err != nil {
		t.Fatal(err)
	}
	if err := o.ep.Disconnect(); err != nil {
		t.Fatal(err)
	}

	// Timewait is the ACK timeout, 537 ms.
	if !a.cm.qpClosed(qa.n) || !b.cm.qpClosed(qb.n) {
		t.Error("QPNs are not held in timewait")
	}
	time.Sleep(500 * time.Millisecond)
	if a.isReleased(qa.n) || b.isReleased(qb.n) {
		t.Error("QPN released before timewait has ended")
	}
	time.Sleep(40 * time.Millisecond)
	synctest.Wait()
	if !a.isReleased(qa.n) || !b.isReleased(qb.n) {
		t.Error("QPN not released after timewait")
	}
	if a.state(ca.id) != cmIdle || b.state(cb.id) != cmIdle {
		t.Error("connection not forgotten after timewait")
	}
	if qa.errs != 1 || qb.errs != 1 {
		t.Errorf("SetError called %d and %d times, want once each", qa.errs, qb.errs)
	}
	n.wantTrace("afterwards", "")
	if a.cm.qpClosed(qa.n) {
		t.Error("an unknown QPN is held")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	a.wantEmpty()
	b.wantEmpty()
}

// pad is b followed by zeroes up to n bytes.
func pad(b []byte, n int) []byte { return append(append([]byte(nil), b...), make([]byte, n-len(b))...) }

// TestCMREQVector compares our REQ with vector V5 (rocev2 spec 7.12), byte for byte.
func TestCMREQVector(t *testing.T) {
	want := unhex(t, `
		01070203000000000000000111223344 00100000000000001122334400000000
		0000000001064e5102005e1000000001 0000000000000000000abc1000000010
		000000a0123456a7ffff37f0ffffffff 00000000000000000000ffff0a000001
		00000000000000000000ffff0a000002 11b15003004000980000000000000000
		00000000000000000000000000000000 00000000000000000000000000000000
		000000000040`+`8abc0000000000000000 000000000a0000010000000000000000
		000000000a0000027573657264617461`+strings.Repeat("00", 48))
	n := newCMNet(t)
	a := n.host("A", "10.0.0.1", 1)
	a.cm.myGUID, a.cm.agent = 0x02005E1000000001, 1
	c := &cmConn{
		m: a.cm, id: 0x11223344, qpn: 0xABC, tid: a.cm.tid(0x11223344),
		local: netip.MustParseAddrPort("10.0.0.1:35516"), remote: netip.MustParseAddrPort("10.0.0.2:20049"),
	}
	p := verbs.ConnParam{PrivateData: []byte("userdata"), ResponderResources: 16, InitiatorDepth: 16, RetryCount: 7, RNRRetryCount: 7}
	a.cm.putREQ(c, &p, 19, verbs.MTU1024, 0x123456)
	if d := cmp.Diff(want, c.out[:]); d != "" {
		t.Errorf("REQ (-want +got):\n%s", d)
	}
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What a 6.1 kernel's RDS sent from 10.77.0.2 to 10.77.0.1, and the answers; trailing zeroes cut.
const (
	kernelREQ = `010702030000000000000002d8c584f40010000000000000f484c5d80000000000000000010648ca505400fffe000002
		00000000000000000000118000000080000000a0252e21a1ffff57f0ffffffff00000000000000000000ffff0a4d0002
		00000000000000000000ffff0a4d00015ef0200000400098000000000000000000000000000000000000000000000000
		00000000000000000000000000000000000000000040b2c80000000000000000000000000a4d00020000000000000000
		000000000a4d00010a4d00020a4d000103010003`
	kernelREP = `010702030000000000000002d8c584f40013000000000000903d7c47f484c5d8000000000000110000000000f6a2bd00
		808078e0505400fffe0000010a4d00010a4d000203010003`
	kernelRTU = `010702030000000000000002d8c584f40014000000000000f484c5d8903d7c47`
	kernelREJ = `010702030000000000000002cd4866f9001200000000000000000000f96648cd0000001c` // private data at byte 108: 1
)

func kernelMAD(t testing.TB, s string) *[madBytes]byte {
	return (*[madBytes]byte)(pad(unhex(t, s), madBytes))
}

// TestCMKernelActive is a kernel's REQ and RTU against our passive side.
func TestCMKernelActive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		b := n.host("B", "10.77.0.1", 2)
		k := netip.MustParseAddr("10.77.0.2")
		ac := b.accept(cmPassiveParam, nil)
		b.cm.input(k, kernelMAD(t, kernelREQ)[:])
		synctest.Wait()
		reps := n.sentBy(b, cmwire.AttrREP)
		if len(reps) != 1 || reps[0].to != k {
			t.Fatalf("%d REPs", len(reps))
		}
		var rep cmwire.REP
		if err := rep.Decode(reps[0].mad[:]); err != nil {
			t.Fatal(err)
		}
		if rep.TID != 0x2d8c584f4 || rep.RemoteCommID != 0xf484c5d8 || rep.TargetAckDelay != 15 || rep.RNRRetryCount != 5 || rep.ResponderResources != 8 || rep.InitiatorDepth != 32 {
			t.Errorf("REP %+v", rep)
		}
		rtu := cmwire.RTU{}
		if err := rtu.Decode(kernelMAD(t, kernelRTU)[:]); err != nil {
			t.Fatal(err)
		}
		rtu.RemoteCommID = rep.LocalCommID
		var mad [madBytes]byte
		rtu.Encode(mad[:])
		b.cm.input(k, mad[:])
		o := <-ac.got
		if o.err != nil {
			t.Fatal(o.err)
		}
		rtr, rts := o.qp.got[verbs.StateRTR], o.qp.got[verbs.StateRTS]
		if rtr.DestQPN != 0x11 || rtr.PathMTU != verbs.MTU4096 || rtr.AH.Remote != k || rts.SQPSN != 0x252e21 || rts.Timeout != 19 || rts.RetryCount != 1 || rts.RNRRetry != 7 || rts.MaxRDAtomic != 32 {
			t.Errorf("RTR %+v\nRTS %+v", rtr, rts)
		}
		info := o.req.Info()
		if info.ResponderResources != 128 || info.InitiatorDepth != 128 || !bytes.HasPrefix(info.PrivateData, unhex(t, "0a4d00020a4d000103010003")) || len(info.PrivateData) != 56 {
			t.Errorf("request says %+v", info)
		}
		if o.req.Remote() != netip.AddrPortFrom(k, 0xb2c8) {
			t.Errorf("request from %v", o.req.Remote())
		}
		ac.l.Close()
		b.cm.close()
	})
}

// TestCMKernelPassive is a kernel's REP, and its reject, against our active side.
func TestCMKernelPassive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		a := n.host("A", "10.77.0.2", 2)
		k := &cmTestHost{addr: netip.MustParseAddr("10.77.0.1")}

		d := a.dial(context.Background(), k, cmActiveParam)
		synctest.Wait()
		var rep cmwire.REP
		if err := rep.Decode(kernelMAD(t, kernelREP)[:]); err != nil {
			t.Fatal(err)
		}
		rep.RemoteCommID = a.only().id
		var mad [madBytes]byte
		rep.Encode(mad[:])
		a.cm.input(k.addr, mad[:])
		if d.wait().err != nil {
			t.Fatal(d.err)
		}
		rtr, rts := d.qp.got[verbs.StateRTR], d.qp.got[verbs.StateRTS]
		if rtr.DestQPN != 0x11 || rts.SQPSN != 0xf6a2bd || rts.Timeout != 17 || rts.RNRRetry != 7 || rts.MaxRDAtomic != 12 || rtr.MaxDestRDAtomic != 16 {
			t.Errorf("RTR %+v\nRTS %+v", rtr, rts)
		}
		n.wantTrace("kernel's REP", "A REQ, A RTU")
		d.ep.Disconnect()
		settle()
		n.trace()

		d = a.dial(context.Background(), k, cmActiveParam)
		synctest.Wait()
		rej := kernelMAD(t, kernelREJ)
		rej[108] = 1
		id := a.only().id
		rej[28], rej[29], rej[30], rej[31] = byte(id>>24), byte(id>>16), byte(id>>8), byte(id)
		a.cm.input(k.addr, rej[:])
		var re *verbs.RejectError
		if !errors.As(d.wait().err, &re) || re.Reason != 28 || !bytes.Equal(re.PrivateData, pad([]byte{1}, 148)) {
			t.Errorf("rejected: %v %+v", d.err, re)
		}
		a.wantEmpty()
	})
}

// TestCMPrivateDataLimits: 56, 196 and 148 bytes fit exactly and arrive; one more is refused and
// changes nothing.
func TestCMPrivateDataLimits(t *testing.T) {
	fill := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i + 1)
		}
		return b
	}
	synctest.Test(t, func(t *testing.T) {
		n, a, b := twoHosts(t)
		ctx := context.Background()
		reject := false
		l := b.listen(func(r verbs.ConnRequest) {
			if !bytes.Equal(r.Info().PrivateData, fill(56)) {
				t.Errorf("REQ's private data %x", r.Info().PrivateData)
			}
			qp := b.qp()
			if _, err := r.Accept(ctx, qp, verbs.ConnParam{PrivateData: fill(197)}, nil); !errors.Is(err, verbs.ErrInvalid) {
				t.Errorf("accept with 197 bytes: %v", err)
			}
			if err := r.Reject(fill(149)); !errors.Is(err, verbs.ErrInvalid) {
				t.Errorf("reject with 149 bytes: %v", err)
			}
			qp.wantState(t, "after refused calls", verbs.StateReset)
			if reject {
				if err := r.Reject(fill(148)); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := r.Accept(ctx, qp, verbs.ConnParam{PrivateData: fill(196)}, nil); err != nil {
				t.Error(err)
			}
		})
		if d := a.dial(ctx, b, verbs.ConnParam{PrivateData: fill(57)}).wait(); !errors.Is(d.err, verbs.ErrInvalid) || d.qp.State() != verbs.StateReset {
			t.Errorf("connect with 57 bytes: %v", d.err)
		}
		n.wantTrace("after refused calls", "")
		d := a.dial(ctx, b, verbs.ConnParam{PrivateData: fill(56)}).wait()
		if d.err != nil || !bytes.Equal(d.info.PrivateData, fill(196)) {
			t.Errorf("connect: %v, private data %x", d.err, d.info.PrivateData)
		}
		if d.qp.got[verbs.StateInit].Access != verbs.AccessRemoteWrite {
			t.Errorf("access %v without responder resources", d.qp.got[verbs.StateInit].Access)
		}
		n.trace()
		reject = true
		r := a.dial(ctx, b, verbs.ConnParam{PrivateData: fill(56)}).wait()
		var re *verbs.RejectError
		if !errors.As(r.err, &re) || re.Reason != 28 || !bytes.Equal(re.PrivateData, fill(148)) {
			t.Errorf("rejected: %v", r.err)
		}
		r.qp.wantState(t, "after a reject", verbs.StateErr)
		n.wantTrace("reject", "A REQ, B REJ")
		d.ep.Disconnect()
		settle()
		l.Close()
		a.wantEmpty()
		b.wantEmpty()
	})
}

// TestCMConnectArguments: what a caller gets wrong is ErrInvalid or a *StateError and sends nothing.
func TestCMConnectArguments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := twoHosts(t)
		ctx := context.Background()
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		ud, used := a.qp(), a.qp()
		ud.typ, used.state = verbs.UD, verbs.StateInit
		to := netip.AddrPortFrom(b.addr, cmTestPort)
		var stateErr *verbs.StateError
		for _, tc := range []struct {
			name string
			ctx  context.Context
			to   netip.AddrPort
			qp   verbs.QP
			p    verbs.ConnParam
			want error
		}{
			{"no QP", ctx, to, nil, verbs.ConnParam{}, verbs.ErrInvalid},
			{"UD QP", ctx, to, ud, verbs.ConnParam{}, verbs.ErrInvalid},
			{"retry count", ctx, to, a.qp(), verbs.ConnParam{RetryCount: 8}, verbs.ErrInvalid},
			{"RNR retry count", ctx, to, a.qp(), verbs.ConnParam{RNRRetryCount: 8}, verbs.ErrInvalid},
			{"ACK timeout", ctx, to, a.qp(), verbs.ConnParam{AckTimeout: 32}, verbs.ErrInvalid},
			{"RNR timer", ctx, to, a.qp(), verbs.ConnParam{MinRNRTimer: 32}, verbs.ErrInvalid},
			{"port 0", ctx, netip.AddrPortFrom(b.addr, 0), a.qp(), verbs.ConnParam{}, verbs.ErrInvalid},
			{"no address", ctx, netip.AddrPort{}, a.qp(), verbs.ConnParam{}, verbs.ErrInvalid},
			{"other family", ctx, netip.MustParseAddrPort("[fd00::1]:5"), a.qp(), verbs.ConnParam{}, verbs.ErrInvalid},
			{"cancelled", cancelled, to, a.qp(), verbs.ConnParam{}, context.Canceled},
			{"QP not in RESET", ctx, to, used, verbs.ConnParam{}, nil},
		} {
			_, _, err := a.cm.connect(tc.ctx, tc.to, tc.qp, tc.p, nil)
			if tc.want != nil && !errors.Is(err, tc.want) || tc.want == nil && !errors.As(err, &stateErr) {
				t.Errorf("%s: %v", tc.name, err)
			}
		}
		for _, port := range []uint16{0, 1} {
			if _, err := a.cm.listen(port, nil); !errors.Is(err, verbs.ErrInvalid) {
				t.Errorf("listen on %d without a handler: %v", port, err)
			}
		}
		a.mtu = 0
		if d := a.dial(ctx, b, verbs.ConnParam{}).wait(); !errors.Is(d.err, verbs.ErrUnreachable) {
			t.Errorf("no path MTU: %v", d.err)
		}
		a.mtu = verbs.MTU4096
		broken := errors.New("no receives")
		qp := a.qp()
		if _, _, err := a.cm.connect(ctx, to, qp, verbs.ConnParam{}, func() error { return broken }); !errors.Is(err, broken) {
			t.Errorf("prepare fails: %v", err)
		}
		qp.wantState(t, "prepare has failed", verbs.StateErr)
		n.wantTrace("refused", "")
		a.wantEmpty()
	})
}

// TestCMCrossing: both sides connect to each other at the same moment. The REQs are two independent
// connections.
func TestCMCrossing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := twoHosts(t)
		la, lb := a.accept(cmPassiveParam, nil), b.accept(cmPassiveParam, nil)
		da, db := a.dial(context.Background(), b, cmActiveParam), b.dial(context.Background(), a, cmActiveParam)
		oa, ob := <-la.got, <-lb.got
		if da.wait().err != nil || db.wait().err != nil || oa.err != nil || ob.err != nil {
			t.Fatal(da.err, db.err, oa.err, ob.err)
		}
		if oa.ep.Remote() != db.ep.Local() || ob.ep.Remote() != da.ep.Local() {
			t.Error("connections are mixed up")
		}
		da.ep.Disconnect()
		synctest.Wait()
		time.Sleep(10 * time.Millisecond)
		if !isDone(ob.ep) || isDone(oa.ep) || isDone(db.ep) {
			t.Error("the end of one connection concerns the other")
		}
		oa.ep.Disconnect()
		<-db.ep.Done()
		settle()
		la.l.Close()
		lb.l.Close()
		a.wantEmpty()
		b.wantEmpty()
		_ = n
	})
}

// TestCMSelf: a device connects to itself.
func TestCMSelf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		a := n.host("A", "127.0.0.1", 1)
		d, o := connected(t, a, a)
		n.wantTrace("self", "A REQ, A REP, A RTU")
		o.ep.Disconnect()
		<-d.ep.Done()
		<-o.ep.Done()
		settle()
		n.wantTrace("self", "A DREQ, A DREP")
		a.wantEmpty()
		a.cm.close()
	})
}

// TestCMReject: every way in which a REQ is refused, and what each says.
func TestCMReject(t *testing.T) {
	ctx := context.Background()
	t.Run("nobody listens", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			d := a.dial(ctx, b, cmActiveParam).wait()
			if !errors.Is(d.err, verbs.ErrRefused) {
				t.Errorf("error %v", d.err)
			}
			n.wantTrace("nobody listens", "A REQ, B REJ")
			if b.stat(cmREQNoListener) != 1 {
				t.Error("not counted")
			}
			a.wantEmpty()
			b.wantEmpty()
		})
	})
	t.Run("handler does not answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, a, b := twoHosts(t)
			b.listen(func(verbs.ConnRequest) {})
			d := a.dial(ctx, b, cmActiveParam).wait()
			var re *verbs.RejectError
			if !errors.As(d.err, &re) || re.Reason != 28 {
				t.Errorf("error %v", d.err)
			}
			a.wantEmpty()
			b.wantEmpty()
		})
	})
	t.Run("answered twice", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, a, b := twoHosts(t)
			b.listen(func(r verbs.ConnRequest) {
				if err := r.Reject([]byte("no")); err != nil {
					t.Error(err)
				}
				if err := r.Reject(nil); !errors.Is(err, verbs.ErrInvalid) {
					t.Errorf("second reject: %v", err)
				}
				if _, err := r.Accept(ctx, b.qp(), verbs.ConnParam{}, nil); !errors.Is(err, verbs.ErrInvalid) {
					t.Errorf("accept after reject: %v", err)
				}
			})
			d := a.dial(ctx, b, cmActiveParam).wait()
			var re *verbs.RejectError
			if !errors.As(d.err, &re) || !bytes.Equal(re.PrivateData, pad([]byte("no"), 148)) {
				t.Errorf("error %v", d.err)
			}
			b.wantEmpty()
		})
	})
	t.Run("accept fails, then rejects", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, a, b := twoHosts(t)
			broken := errors.New("broken")
			b.listen(func(r verbs.ConnRequest) {
				for _, at := range []verbs.QPState{verbs.StateInit, verbs.StateRTR, verbs.StateRTS} {
					qp := b.qp()
					qp.hook = func(to verbs.QPState) error {
						if to == at {
							return broken
						}
						return nil
					}
					if _, err := r.Accept(ctx, qp, cmPassiveParam, nil); !errors.Is(err, broken) {
						t.Errorf("QP fails at %v: %v", at, err)
					}
					if s := qp.State(); s != verbs.StateErr && s != verbs.StateReset {
						t.Errorf("QP is left in %v", s)
					}
				}
				if _, err := r.Accept(ctx, b.qp(), cmPassiveParam, func() error { return broken }); !errors.Is(err, broken) {
					t.Errorf("prepare fails: %v", err)
				}
				cancelled, cancel := context.WithCancel(ctx)
				cancel()
				if _, err := r.Accept(cancelled, b.qp(), cmPassiveParam, nil); !errors.Is(err, context.Canceled) {
					t.Errorf("cancelled: %v", err)
				}
				if err := r.Reject([]byte{1}); err != nil {
					t.Error(err)
				}
			})
			d := a.dial(ctx, b, cmActiveParam).wait()
			var re *verbs.RejectError
			if !errors.As(d.err, &re) || re.PrivateData[0] != 1 {
				t.Errorf("error %v", d.err)
			}
			b.wantEmpty()
		})
	})
	t.Run("accept outlives the handler", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, a, b := twoHosts(t)
			broken := errors.New("broken")
			var prepared error
			got := make(chan error, 1)
			b.listen(func(r verbs.ConnRequest) {
				go func() {
					_, err := r.Accept(ctx, b.qp(), cmPassiveParam, func() error { time.Sleep(time.Second); return prepared })
					got <- err
				}()
				time.Sleep(time.Millisecond) // the request is being answered
			})
			if d := a.dial(ctx, b, cmActiveParam).wait(); d.err != nil {
				t.Errorf("connect: %v", d.err)
			}
			if err := <-got; err != nil {
				t.Errorf("accept: %v", err)
			}
			prepared = broken
			var re *verbs.RejectError
			if d := a.dial(ctx, b, cmActiveParam).wait(); !errors.As(d.err, &re) || re.Reason != 28 {
				t.Errorf("accept has failed and nobody is left to answer: %v", d.err)
			}
			if err := <-got; !errors.Is(err, broken) {
				t.Errorf("accept: %v", err)
			}
			if b.cm.nPending != 0 {
				t.Errorf("%d places taken", b.cm.nPending)
			}
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("active QP fails", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			ac := b.accept(cmPassiveParam, nil)
			qp := a.qp()
			broken := errors.New("broken")
			qp.hook = func(to verbs.QPState) error {
				if to == verbs.StateRTS {
					return broken
				}
				return nil
			}
			if d := a.dialQP(ctx, b, qp, cmActiveParam).wait(); !errors.Is(d.err, broken) {
				t.Errorf("error %v", d.err)
			}
			var re *verbs.RejectError
			if o := <-ac.got; !errors.As(o.err, &re) || re.Reason != 28 {
				t.Errorf("passive error %v", o.err)
			}
			n.wantTrace("REP rejected", "A REQ, B REP, A REJ")
			settle()
			a.wantEmpty()
			b.wantEmpty()
		})
	})
}

// TestCMPathMTU: the active side comes down to what the passive side's link carries.
func TestCMPathMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := twoHosts(t)
		b.mtu = verbs.MTU1024
		d, o := connected(t, a, b)
		if d.info.PathMTU != verbs.MTU1024 || o.qp.got[verbs.StateRTR].PathMTU != verbs.MTU1024 || d.qp.got[verbs.StateRTR].PathMTU != verbs.MTU1024 {
			t.Errorf("path MTU %v", d.info.PathMTU)
		}
		n.wantTrace("path MTU", "A REQ, B REJ, A REQ, B REP, A RTU")
		a.cm.close()
		b.cm.close()
	})
}

// TestCMClose: closing a listener and a manager while handshakes and connections are under way.
func TestCMClose(t *testing.T) {
	ctx := context.Background()
	t.Run("listener", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrRTU, 1000)
			ac := b.accept(cmPassiveParam, nil)
			if _, err := b.cm.listen(cmTestPort, func(verbs.ConnRequest) {}); !errors.Is(err, verbs.ErrBusy) {
				t.Errorf("port in use: %v", err)
			}
			d := a.dial(ctx, b, cmActiveParam).wait()
			if d.err != nil {
				t.Fatal(d.err)
			}
			b.wantState("no RTU yet", cmRepSent)
			if err := ac.l.Close(); err != nil {
				t.Fatal(err)
			}
			select {
			case o := <-ac.got:
				if !errors.Is(o.err, verbs.ErrClosed) {
					t.Errorf("accept: %v", o.err)
				}
				o.qp.wantState(t, "handshake broken off", verbs.StateErr)
			default:
				t.Error("a handler still runs after Close")
			}
			<-d.ep.Done() // the REJ ends the connection that the active side thinks it has
			if err := ac.l.Close(); err != nil {
				t.Fatal(err)
			}
			if b.cm.listening() != 0 {
				t.Error("listener counted")
			}
			if d := a.dial(ctx, b, cmActiveParam).wait(); !errors.Is(d.err, verbs.ErrRefused) {
				t.Errorf("connect to a closed listener: %v", d.err)
			}
			settle()
			a.wantEmpty()
			b.wantEmpty()
		})
	})
	t.Run("manager", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			d, o := connected(t, a, b)
			c := n.host("C", "10.0.0.3", 3)
			nobody := &cmTestHost{addr: netip.MustParseAddr("10.0.0.9")}
			pend := a.dial(ctx, nobody, cmActiveParam)
			c.listen(func(r verbs.ConnRequest) { <-r.(*cmRequest).c.answer })
			thinking := a.dial(ctx, c, cmActiveParam)
			synctest.Wait()
			n.trace()
			a.cm.close()
			if !errors.Is(pend.wait().err, verbs.ErrClosed) || !errors.Is(thinking.wait().err, verbs.ErrClosed) {
				t.Errorf("pending connects: %v, %v", pend.err, thinking.err)
			}
			if !isDone(d.ep) || d.qp.State() != verbs.StateErr {
				t.Error("connection lives on")
			}
			<-o.ep.Done() // A's DREQ
			a.cm.close()
			a.cm.input(b.addr, kernelMAD(t, kernelREQ)[:])
			a.cm.commEstablished(1)
			if err := d.ep.Disconnect(); err != nil {
				t.Error(err)
			}
			a.wantEmpty()
			if a.cm.qpClosed(d.qp.n) {
				t.Error("QPN held by a closed manager")
			}
			if e := a.dial(ctx, b, cmActiveParam).wait(); !errors.Is(e.err, verbs.ErrClosed) {
				t.Errorf("connect after close: %v", e.err)
			}
			if _, err := a.cm.listen(1, func(verbs.ConnRequest) {}); !errors.Is(err, verbs.ErrClosed) {
				t.Errorf("listen after close: %v", err)
			}
			b.cm.close()
			c.cm.close()
		})
	})
}

// TestCMAbandon ends a connection without a word to the peer.
func TestCMAbandon(t *testing.T) {
	for _, closing := range []string{"", "device", "QP"} {
		t.Run("then "+closing, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, a, b := twoHosts(t)
				d, o := connected(t, a, b)
				a.cm.commEstablished(d.qp.n)
				n.trace()
				for range 2 {
					if err := d.ep.(verbs.Abandoner).Abandon(); err != nil {
						t.Error(err)
					}
				}
				switch closing { // at the same instant: the worker has not looked yet
				case "device":
					a.cm.close()
				case "QP":
					a.cm.qpClosed(d.qp.n)
				}
				d.qp.wantState(t, "abandoned", verbs.StateErr)
				time.Sleep(time.Minute)
				n.wantTrace("nothing is said", "")
				if !isDone(d.ep) || isDone(o.ep) {
					t.Errorf("done here: %v, there: %v", isDone(d.ep), isDone(o.ep))
				}
				if closing != "device" {
					o.ep.Disconnect()
					synctest.Wait()
					time.Sleep(time.Second)
					n.wantTrace("the peer ends it, too", "B DREQ, A DREP")
					d.ep.Disconnect()
				}
				settle()
				a.wantEmpty()
				a.cm.close()
				b.cm.close()
			})
		})
	}
	t.Run("after Disconnect", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			d, _ := connected(t, a, b)
			n.trace()
			d.ep.Disconnect()
			d.ep.(verbs.Abandoner).Abandon()
			n.wantTrace("the peer is told", "A DREQ")
			settle()
			a.wantEmpty()
			b.wantEmpty()
			a.cm.close()
			b.cm.close()
		})
	})
}
