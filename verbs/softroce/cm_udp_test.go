package softroce

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// TestConnectUDP takes two devices on loopback through CM, a SEND and a disconnect.
func TestConnectUDP(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p := New(Config{})
	mk := func(addr string) (verbs.Device, verbs.PD, verbs.CQ, verbs.QP) {
		d, err := p.OpenDevice(netip.MustParseAddr(addr))
		if err != nil {
			t.Fatal(err)
		}
		pd, _ := d.AllocPD()
		cq, _ := d.CreateCQ(verbs.CQConfig{Depth: 64})
		qp, err := pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: cq, RecvCQ: cq, MaxSendWR: 16, MaxRecvWR: 16})
		if err != nil {
			t.Fatal(err)
		}
		return d, pd, cq, qp
	}
	d0, pd0, cq0, qp0 := mk("127.0.0.15")
	d1, pd1, cq1, qp1 := mk("127.0.0.16")
	mem := make([]byte, 4096)
	mr, err := pd1.RegMR(mem, 0, verbs.AccessLocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan verbs.Endpoint, 1)
	l, err := d1.Listen(18634, func(r verbs.ConnRequest) {
		ep, err := r.Accept(ctx, qp1, verbs.ConnParam{PrivateData: []byte("yes"), RNRRetryCount: 7, RetryCount: 6}, func() error {
			_, err := qp1.PostRecv([]verbs.RecvWR{{ID: 9, SGs: []verbs.SGE{{Length: 4096, LKey: mr.LKey()}}}})
			return err
		})
		if err != nil {
			t.Error(err)
		}
		accepted <- ep
	})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	ep, info, err := d0.Connect(ctx, netip.MustParseAddrPort("127.0.0.16:18634"), qp0, verbs.ConnParam{PrivateData: []byte("hello"), RNRRetryCount: 7, RetryCount: 6}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("connected in %v: %q mtu %v", time.Since(start), info.PrivateData[:3], info.PathMTU)
	if string(info.PrivateData[:3]) != "yes" || info.PathMTU != verbs.MTU4096 {
		t.Fatalf("learnt %q, MTU %v", info.PrivateData[:3], info.PathMTU)
	}
	ep1 := <-accepted
	if _, err := qp0.PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}}); err != nil {
		t.Fatal(err)
	}
	poll := func(cq verbs.CQ) verbs.WC {
		var wc [1]verbs.WC
		for cq.Poll(wc[:]) == 0 {
			time.Sleep(50 * time.Microsecond)
		}
		return wc[0]
	}
	if wc := poll(cq0); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	if wc := poll(cq1); wc.Err() != nil || wc.ID != 9 {
		t.Fatal(wc)
	}
	ep.Disconnect()
	<-ep1.Done()
	<-ep.Done()
	for _, c := range []interface{ Close() error }{l, qp0, qp1, cq0, cq1} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := mr.Deregister(); err != nil {
		t.Error(err)
	}
	for _, c := range []interface{ Close() error }{pd0, pd1, d0, d1} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}
