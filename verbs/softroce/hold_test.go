package softroce

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// holdNet is a network that looks at the memory it is given.
type holdNet struct {
	packetio.Network
	look func([]byte)
}

type holdConn struct {
	packetio.Conn
	n *holdNet
}

func (n *holdNet) Listen(a netip.AddrPort) (packetio.Conn, error) {
	c, err := n.Network.Listen(a)
	if err != nil {
		return nil, err
	}
	return &holdConn{c, n}, nil
}

func (c *holdConn) Send(ts []packetio.TxTrain) (int, error) {
	for _, t := range ts {
		for _, v := range t.Vec {
			if len(v) > 0 {
				c.n.look(v)
			}
		}
	}
	return c.Conn.Send(ts)
}

// TestNothingNamesWhatIsGone: whatever QPs do and wherever they end, nothing names memory to the socket that has been given back.
func TestNothingNamesWhatIsGone(t *testing.T) {
	invalidated := 0
	defer func() { t.Logf("%d regions were invalidated", invalidated) }()
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) { invalidated += nothingNames(t, seed) })
		if t.Failed() {
			return
		}
	}
}

func nothingNames(t *testing.T, seed uint64) (invalidated int) {
	const page, pages = 8192, 64
	r := rand.New(rand.NewPCG(seed, 11))
	sim := simnet.New(seed, simnet.Config{NoGSO: r.IntN(2) > 0, GRO: r.IntN(2) > 0, SendBuffer: 32 << 10,
		Link: simnet.LinkConfig{Delay: 20 * time.Microsecond, Loss: []float64{0, 0.02}[r.IntN(2)], RateBytesPerSec: 1 << 26}})
	defer sim.Close()
	var mu sync.Mutex
	arena := pageMem(pages * page / verbs.PageSize)
	var owned [pages]bool
	base := uintptr(unsafe.Pointer(&arena[0]))
	net := &holdNet{&fickleNet{sim, r}, func(v []byte) {
		at := uintptr(unsafe.Pointer(&v[0]))
		if at < base || at >= base+page*pages {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for p := (at - base) / page; p <= (at+uintptr(len(v))-1-base)/page; p++ {
			if !owned[p] {
				t.Errorf("seed %d: page %d is named and belongs to nobody", seed, p)
			}
		}
	}}
	p := New(Config{Network: net, GiveUp: 50 * time.Millisecond})
	var dev [2]*device
	var pd [2]verbs.PD
	var cq [2]verbs.CQ
	for i, a := range []string{"10.0.0.1", "10.0.0.2"} {
		d, err := p.OpenDevice(netip.MustParseAddr(a))
		if err != nil {
			t.Fatal(err)
		}
		dev[i] = d.(*device)
		pd[i], _ = d.AllocPD()
		cq[i], _ = d.CreateCQ(verbs.CQConfig{Depth: 1 << 16})
	}
	type region struct {
		i    int
		page int
		mr   verbs.MR
		list verbs.PageList // of a fast registration
		key  verbs.RKey     // of the region: what opens it
		gone bool           // invalidated; guarded by mu
	}
	inv := map[uint64]*region{} // by the identifier of its invalidation
	id, done := uint64(1), 0
	type pair struct {
		qp [2]verbs.QP
	}
	var pairs []*pair
	mk := func() *pair {
		x := &pair{}
		for i := range x.qp {
			q, err := pd[i].CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: cq[i], RecvCQ: cq[i], MaxSendWR: 32, MaxRecvWR: 64, MaxSendSGE: 3, MaxRecvSGE: 1, SignalAll: true})
			if err != nil {
				t.Fatal(err)
			}
			x.qp[i] = q
		}
		return x
	}
	up := func(x *pair) {
		for i, q := range x.qp {
			q.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit)
			o := x.qp[1-i]
			for _, m := range []struct {
				a verbs.QPAttr
				m verbs.QPAttrMask
			}{
				{verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: accessRemote}, initAttrsRC},
				{verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: dev[1-i].addr}, PathMTU: verbs.MTU1024, DestQPN: o.Num(), RQPSN: 100, MaxDestRDAtomic: 4, MinRNRTimer: 2},
					verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit},
				{verbs.QPAttr{State: verbs.StateRTS, Timeout: 10, RetryCount: 3, RNRRetry: 7, SQPSN: 100, MaxRDAtomic: 4},
					verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit},
			} {
				if err := q.Modify(m.a, m.m|verbs.QPStateBit); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for range 3 {
		x := mk()
		up(x)
		pairs = append(pairs, x)
	}
	var regions []*region
	var wg sync.WaitGroup
	drop := func(g *region) {
		wg.Go(func() {
			if g.list != nil {
				defer func() {
					for g.list.Close() != nil {
						time.Sleep(time.Millisecond)
					}
				}()
			}
			for {
				if err := g.mr.Deregister(); err == nil {
					break
				}
			}
			mu.Lock()
			if !g.gone {
				owned[g.page] = false
			}
			mu.Unlock()
		})
	}
	var wcs [256]verbs.WC
	for range 400 {
		i := r.IntN(2)
		x := pairs[r.IntN(len(pairs))]
		switch k := r.IntN(20); {
		case k < 2:
			pg := r.IntN(pages)
			mu.Lock()
			busy := owned[pg]
			owned[pg] = true
			mu.Unlock()
			if !busy {
				m, err := pd[i].RegMR(arena[pg*page:][:page], uint64(pg*page), accessAll)
				if err != nil {
					t.Fatal(err)
				}
				regions = append(regions, &region{i: i, page: pg, mr: m, key: m.RKey()})
			}
		case k == 4 || k == 5: // by a request, whose region is then used on any queue
			pg := r.IntN(pages)
			mu.Lock()
			busy := owned[pg]
			owned[pg] = true
			mu.Unlock()
			if !busy {
				m, err := pd[i].AllocFastRegMR(2)
				if err != nil {
					t.Fatal(err)
				}
				l, _ := pd[i].AllocPageList(2)
				if err := l.Set([][]byte{arena[pg*page:][:page]}); err != nil {
					t.Fatal(err)
				}
				g := &region{i: i, page: pg, mr: m, list: l, key: verbs.UpdateFastRegKey(m.RKey())}
				regions = append(regions, g)
				x.qp[i].PostSend([]verbs.SendWR{{Opcode: verbs.OpFastRegMR, FastReg: &verbs.FastReg{MR: m, Key: g.key, Pages: l, IOVA: uint64(pg * page), Access: accessAll}}})
			}
		case k == 6 && len(regions) > 0:
			if n := r.IntN(len(regions)); regions[n].list != nil {
				g := regions[n]
				id++
				if _, err := x.qp[g.i].PostSend([]verbs.SendWR{{ID: id, Opcode: verbs.OpLocalInv, InvalidateRKey: g.key}}); err == nil {
					inv[id] = g
				}
			}
		case k < 4 && len(regions) > 0:
			n := r.IntN(len(regions))
			drop(regions[n])
			regions = append(regions[:n], regions[n+1:]...)
		case k < 14 && len(regions) > 0:
			var mine, theirs *region
			for range 8 {
				if g := regions[r.IntN(len(regions))]; g.i == i {
					mine = g
				} else {
					theirs = g
				}
			}
			if mine == nil || theirs == nil {
				break
			}
			n := r.IntN(page)
			w := verbs.SendWR{SGs: []verbs.SGE{{Addr: uint64(mine.page * page), Length: uint32(n), LKey: verbs.LKey(mine.key)}}, RKey: theirs.key, RemoteAddr: uint64(theirs.page * page)}
			w.Opcode = []verbs.SendOpcode{verbs.OpSend, verbs.OpWrite, verbs.OpRead}[r.IntN(3)]
			x.qp[i].PostSend([]verbs.SendWR{w})
		case k < 16 && len(regions) > 0:
			if g := regions[r.IntN(len(regions))]; g.i == i {
				x.qp[i].PostRecv([]verbs.RecvWR{{SGs: []verbs.SGE{{Addr: uint64(g.page * page), Length: page, LKey: verbs.LKey(g.key)}}}})
			}
		case k == 16:
			x.qp[i].SetError()
		case k == 17:
			up(x)
		case k == 18:
			n := r.IntN(len(pairs))
			for _, q := range pairs[n].qp {
				q.Close()
			}
			pairs[n] = mk()
			up(pairs[n])
		case k == 19:
			time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
		}
		for i := range cq {
			for _, wc := range wcs[:cq[i].Poll(wcs[:])] {
				g := inv[wc.ID]
				if g == nil || wc.Status != verbs.WCSuccess {
					continue
				}
				// Its owner has the memory back, and may do with it what he likes.
				done++
				mu.Lock()
				owned[g.page], g.gone = false, true
				mu.Unlock()
			}
		}
	}
	invalidated += done
	for _, x := range pairs {
		for _, q := range x.qp {
			q.Close()
		}
	}
	for _, g := range regions {
		drop(g)
	}
	wg.Wait()
	for i := range dev {
		for _, c := range []func() error{pd[i].Close, cq[i].Close, dev[i].Close} {
			if err := c(); err != nil {
				t.Error(err)
			}
		}
	}
	return invalidated
}

// TestDeallocWhileFull: an answer through a window waits for the socket when the window ends. What is in its range is not told any more.
func TestDeallocWhileFull(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.qp.(*qp).pmtu = 4096
		m, err := tc.pd.RegMR(tc.mem[:8192], 0, accessAll|verbs.AccessMWBind)
		if err != nil {
			t.Fatal(err)
		}
		w := tc.window(verbs.MWType2A)
		bind := bindWR(1, w, m, 0, 8192, verbs.AccessRemoteRead)
		tc.post(bind)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.full(true)
		tc.write(roce.RCReadRequest, rx(0), true, reth(0, bind.Bind.Key, 4096), nil)
		tc.wantIdle("the answer waits")
		if err := w.Dealloc(); err != nil {
			t.Fatal(err)
		}
		tc.dev.role.Lock()
		for _, v := range tc.dev.tx.vecs {
			if len(v) > 0 && &v[0] == &tc.mem[0] {
				t.Error("it is still to be read")
			}
		}
		tc.dev.role.Unlock()
		tc.full(false)
		tc.wantIdle("it was lost")
		if err := m.Deregister(); err != nil {
			t.Error(err)
		}
	})
}
