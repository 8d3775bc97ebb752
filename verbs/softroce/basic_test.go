package softroce

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// testPair is two connected RC QPs on two devices, without CM.
type testPair struct {
	dev [2]*device
	pd  [2]verbs.PD
	cq  [2]verbs.CQ
	qp  [2]verbs.QP
	mem [2][]byte
	mr  [2]verbs.MR
	srq verbs.SRQ // side 1's, if it has one
}

func newTestPair(t testing.TB, cfg Config, a, b string, mtu verbs.MTU) *testPair {
	t.Helper()
	return newTestPairSRQ(t, cfg, a, b, mtu, 0)
}

// newTestPairSRQ gives side 1 a shared receive queue of srq requests, if that is not 0.
func newTestPairSRQ(t testing.TB, cfg Config, a, b string, mtu verbs.MTU, srq int) *testPair {
	t.Helper()
	p := New(cfg)
	tp := &testPair{}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, addr := range []string{a, b} {
		d, err := p.OpenDevice(netip.MustParseAddr(addr))
		must(err)
		tp.dev[i] = d.(*device)
		tp.pd[i], err = d.AllocPD()
		must(err)
		tp.cq[i], err = d.CreateCQ(verbs.CQConfig{Depth: 1024})
		must(err)
		c := verbs.QPConfig{Type: verbs.RC, SendCQ: tp.cq[i], RecvCQ: tp.cq[i], MaxSendWR: 128, MaxRecvWR: 128, MaxSendSGE: 4, MaxRecvSGE: 4}
		if i == 1 && srq > 0 {
			tp.srq, err = tp.pd[i].CreateSRQ(verbs.SRQConfig{MaxWR: srq})
			must(err)
			c.SRQ = tp.srq
		}
		tp.qp[i], err = tp.pd[i].CreateQP(c)
		must(err)
		tp.mem[i] = make([]byte, 4<<20)
		tp.mr[i], err = tp.pd[i].RegMR(tp.mem[i], 0x1000, accessAll)
		must(err)
	}
	for i := range tp.qp {
		o := 1 - i
		must(tp.qp[i].Modify(verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: accessRemote}, verbs.QPStateBit|initAttrsRC))
		must(tp.qp[i].Modify(verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: tp.dev[o].addr}, PathMTU: mtu, DestQPN: tp.qp[o].Num(), RQPSN: uint32(0xfffff0 + i), MaxDestRDAtomic: 16, MinRNRTimer: 12},
			verbs.QPStateBit|verbs.QPAHBit|verbs.QPPathMTUBit|verbs.QPDestQPNBit|verbs.QPRQPSNBit|verbs.QPMaxDestRDAtomicBit|verbs.QPMinRNRTimerBit))
		must(tp.qp[i].Modify(verbs.QPAttr{State: verbs.StateRTS, Timeout: 17, RetryCount: 6, RNRRetry: 7, SQPSN: uint32(0xfffff0 + o), MaxRDAtomic: 16, SendWindow: tp.dev[o].attr.RecvWindow},
			verbs.QPStateBit|verbs.QPTimeoutBit|verbs.QPRetryCountBit|verbs.QPRNRRetryBit|verbs.QPSQPSNBit|verbs.QPMaxRDAtomicBit|verbs.QPSendWindowBit))
	}
	return tp
}

// shut closes everything, which nothing may hold.
func (tp *testPair) shut(t testing.TB) {
	t.Helper()
	for i := range tp.qp {
		if err := tp.qp[i].Close(); err != nil {
			t.Error(err)
		}
		if i == 1 && tp.srq != nil {
			if err := tp.srq.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, c := range []func() error{tp.mr[i].Deregister, tp.pd[i].Close, tp.cq[i].Close, tp.dev[i].Close} {
			if err := c(); err != nil {
				t.Error(err)
			}
		}
	}
}

func (tp *testPair) sge(i int, off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: 0x1000 + uint64(off), Length: uint32(n), LKey: tp.mr[i].LKey()}}
}

func (tp *testPair) wait(t testing.TB, i int) verbs.WC {
	t.Helper()
	var wc [1]verbs.WC
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
		if tp.cq[i].Poll(wc[:]) == 1 {
			return wc[0]
		}
	}
	t.Fatalf("side %d: no completion; counters %v / %v", i, tp.dev[0].Stats(), tp.dev[1].Stats())
	return verbs.WC{}
}

func fill(b []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

func TestRoundUDP(t *testing.T) {
	for _, mtu := range []verbs.MTU{verbs.MTU1024, verbs.MTU4096} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			tp := newTestPair(t, Config{}, "127.0.0.11", "127.0.0.12", mtu)
			defer tp.shut(t)
			for k, n := range []int{0, 1, mtu.Bytes() - 1, mtu.Bytes(), mtu.Bytes() + 1, 3*mtu.Bytes() + 5, 1 << 20} {
				fill(tp.mem[0][:n], uint64(k))
				tp.qp[1].Query()
				clear(tp.mem[1])
				// SEND
				if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: 7, SGs: tp.sge(1, 0, n)}}); err != nil {
					t.Fatal(err)
				}
				if _, err := tp.qp[0].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, n)}}); err != nil {
					t.Fatal(err)
				}
				if wc := tp.wait(t, 1); wc.Err() != nil || int(wc.ByteLen) != n {
					t.Fatalf("recv %d: %+v", n, wc)
				}
				if wc := tp.wait(t, 0); wc.Err() != nil {
					t.Fatalf("send %d: %+v", n, wc)
				}
				if !bytes.Equal(tp.mem[0][:n], tp.mem[1][:n]) {
					t.Fatalf("SEND of %d bytes arrived changed", n)
				}
				// WRITE
				tp.qp[1].Query()
				clear(tp.mem[1])
				tp.qp[0].PostSend([]verbs.SendWR{{ID: 2, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, n), RemoteAddr: 0x1000, RKey: tp.mr[1].RKey()}})
				if wc := tp.wait(t, 0); wc.Err() != nil {
					t.Fatalf("write %d: %+v", n, wc)
				}
				tp.qp[1].Query() // orders this goroutine behind the engine that wrote, which nothing else does
				if !bytes.Equal(tp.mem[0][:n], tp.mem[1][:n]) {
					t.Fatalf("WRITE of %d bytes arrived changed", n)
				}
				// READ back into another place
				tp.qp[0].PostSend([]verbs.SendWR{{ID: 3, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tp.sge(0, 2<<20, n), RemoteAddr: 0x1000, RKey: tp.mr[1].RKey()}})
				if wc := tp.wait(t, 0); wc.Err() != nil {
					t.Fatalf("read %d: %+v", n, wc)
				}
				if !bytes.Equal(tp.mem[0][2<<20:2<<20+n], tp.mem[1][:n]) {
					t.Fatalf("READ of %d bytes arrived changed", n)
				}
			}
			tp.qp[1].Query()
			tp.qp[0].PostSend([]verbs.SendWR{{ID: 4, Opcode: verbs.OpFetchAdd, CompareAdd: 5, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, 8), RemoteAddr: 0x1000, RKey: tp.mr[1].RKey()}})
			if wc := tp.wait(t, 0); wc.Err() != nil {
				t.Fatalf("fetch and add: %+v", wc)
			}
		})
	}
}
