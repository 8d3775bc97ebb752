package mrpool

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/ref"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// side is one device with one queue pair; pools are on side 1, its peer is side 0.
type side struct {
	dev  verbs.Device
	pd   verbs.PD
	cq   verbs.CQ
	qp   verbs.QP
	undo []func() error
	buf  [64]verbs.WC
}

// testStack is two devices of a provider, connected, with pools over the second.
type testStack struct {
	p     verbs.Provider
	addrs [2]netip.Addr
	side  [2]*side
	pool  int // requests on the queue for the pools
	extra int // and for others

	ps    *Pools
	q     *QP
	epoch *epoch.Domain
	ref   ref.Count
	mem   []byte
	pin   runtime.Pinner

	mu  sync.Mutex
	wcs []verbs.WC // of side 0, and those of side 1 that are not the pools'
}

func newStack(p verbs.Provider, a, b string) *testStack {
	s := &testStack{p: p, addrs: [2]netip.Addr{netip.MustParseAddr(a), netip.MustParseAddr(b)}, pool: 16, extra: 64}
	mem := make([]byte, 1<<20+verbs.PageSize)
	s.pin.Pin(&mem[0])
	off := -uintptr(unsafe.Pointer(&mem[0])) & (verbs.PageSize - 1)
	s.mem = mem[off : off+1<<20]
	return s
}

// poll is the handler of x's completion queue.
func (s *testStack) poll(x *side) {
	for {
		for n := x.cq.Poll(x.buf[:]); n > 0; n = x.cq.Poll(x.buf[:]) {
			for i := range x.buf[:n] {
				if s.q == nil || !s.q.Completion(&x.buf[i]) {
					s.mu.Lock()
					s.wcs = append(s.wcs, x.buf[i])
					s.mu.Unlock()
				}
			}
		}
		if !x.cq.Arm(false) {
			return
		}
	}
}

func (s *testStack) open() (err error) {
	for i := range s.side {
		x := &side{}
		s.side[i] = x
		if x.dev, err = s.p.OpenDevice(s.addrs[i]); err != nil {
			return err
		}
		x.undo = append(x.undo, x.dev.Close)
		if x.pd, err = x.dev.AllocPD(); err != nil {
			return err
		}
		x.undo = append(x.undo, x.pd.Close)
		if x.cq, err = x.dev.CreateCQ(verbs.CQConfig{Depth: 4096, Handler: func(verbs.CQ) { s.poll(x) }}); err != nil {
			return err
		}
		x.undo = append(x.undo, x.cq.Close)
		x.cq.Arm(false)
		if x.qp, err = x.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: x.cq, RecvCQ: x.cq, MaxSendWR: s.pool + s.extra, MaxRecvWR: 512, MaxSendSGE: 1, MaxRecvSGE: 1}); err != nil {
			return err
		}
	}
	const all = verbs.AccessRemoteRead | verbs.AccessRemoteWrite
	for i, x := range s.side {
		o := s.side[1-i]
		for _, step := range []struct {
			a verbs.QPAttr
			m verbs.QPAttrMask
		}{
			{verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: all}, verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPAccessBit},
			{verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: s.addrs[1-i]}, PathMTU: verbs.MTU4096, DestQPN: o.qp.Num(), MaxDestRDAtomic: 16, MinRNRTimer: 1},
				verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit},
			{verbs.QPAttr{State: verbs.StateRTS, Timeout: 14, RetryCount: 6, RNRRetry: 7, MaxRDAtomic: 16, SendWindow: o.dev.Attr().RecvWindow},
				verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit | verbs.QPSendWindowBit},
		} {
			if err := x.qp.Modify(step.a, step.m|verbs.QPStateBit); err != nil {
				return err
			}
		}
	}
	x := s.side[1]
	s.epoch = epoch.NewDomain()
	s.ref.Init(nil)
	if s.ps, err = New(Config{PD: x.pd, Attr: x.dev.Attr(), Epoch: s.epoch, Ref: &s.ref}); err != nil {
		return err
	}
	s.q = s.ps.NewQP(x.qp, s.pool)
	return nil
}

// close closes everything. A step that fails once is taken again.
func (s *testStack) close(t testing.TB) {
	t.Helper()
	again := func(what string, f func() error) {
		err := f()
		if err != nil {
			err = f()
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, x := range s.side {
		if x != nil && x.qp != nil {
			again("close QP", x.qp.Close)
		}
	}
	if s.ps != nil {
		s.q.Close()
		again("close pools", s.ps.Close)
		n := s.ref.Refs()
		for i := 0; n != 1 && i < 1000; i++ { // a worker that was cancelled drops its own as its last act
			time.Sleep(time.Millisecond)
			n = s.ref.Refs()
		}
		if n != 1 {
			t.Errorf("%d references to the device", n)
		}
		if st := s.ps.Stats(); st.Pinned != 0 {
			t.Errorf("%d bytes pinned", st.Pinned)
		}
		again("epoch", s.epoch.Close)
	}
	for _, x := range s.side {
		if x == nil {
			continue
		}
		for i := len(x.undo) - 1; i >= 0; i-- {
			again("close", x.undo[i])
		}
	}
	s.pin.Unpin()
}

// await waits for the next completion that is not the pools'.
func (s *testStack) await() (verbs.WC, error) {
	for range 2000 {
		s.mu.Lock()
		if len(s.wcs) > 0 {
			wc := s.wcs[0]
			s.wcs = s.wcs[1:]
			s.mu.Unlock()
			return wc, nil
		}
		s.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	return verbs.WC{}, errors.New("no completion")
}

// peer has the peer use a key, and returns how that ended.
func (s *testStack) peer(op verbs.SendOpcode, key verbs.RKey, addr uint64, n int) error {
	x := s.side[0]
	mem := make([]byte, n)
	for i := range mem {
		mem[i] = byte(i + 1)
	}
	s.pin.Pin(&mem[0])
	mr, err := x.pd.RegMR(mem, 0, verbs.AccessLocalWrite)
	if err != nil {
		return err
	}
	defer func() {
		if mr.Deregister() != nil {
			mr.Deregister()
		}
	}()
	_, err = x.qp.PostSend([]verbs.SendWR{{ID: 1, Opcode: op, Flags: verbs.SendSignaled, SGs: []verbs.SGE{{Length: uint32(n), LKey: mr.LKey()}}, RemoteAddr: addr, RKey: key}})
	if err != nil {
		return err
	}
	wc, err := s.await()
	if err != nil {
		return err
	}
	return wc.Err()
}

// simProvider is softroce over a network of the test's own.
func simProvider(t *testing.T, f *faultverbs.Faults) verbs.Provider {
	net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}})
	return faultverbs.Wrap(softroce.New(softroce.Config{Network: net}), f)
}

// TestSoftroce: a peer uses keys of each way, on devices that have fast registration and windows, one of them, or neither; and
// none of the keys once the owner was told.
func TestSoftroce(t *testing.T) {
	const fast, windows = verbs.CapMemMgtExtensions, verbs.CapMW1 | verbs.CapMW2A | verbs.CapMW2B
	for _, c := range []struct {
		name    string
		without verbs.DeviceCaps
		over    bool // a registration is offered
		on      bool // the queue pair
		want    kind
	}{
		{"fast registration", 0, false, true, byFastReg},
		{"window", 0, true, true, byWindow},
		{"plain registration", 0, false, false, byRegistration},
		{"windows only, nothing offered", fast, false, true, byRegistration},
		{"windows only", fast, true, true, byWindow},
		{"no windows", windows, true, true, byFastReg},
		{"neither", fast | windows, true, true, byRegistration},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := new(faultverbs.Faults)
				f.Without(c.without)
				s := newStack(simProvider(t, f), "10.0.0.1", "10.0.0.2")
				if err := s.open(); err != nil {
					t.Fatal(err)
				}
				defer s.close(t)
				var over Mapping
				var err error
				if c.over {
					access := rw
					if c.want == byWindow {
						access |= verbs.AccessMWBind
					}
					if over, err = s.ps.Register(context.Background(), s.mem, 0, access); err != nil {
						t.Fatal(err)
					}
				}
				var last verbs.RKey
				for i := range 20 {
					b := s.mem[i*5000 : i*5000+9000 : i*5000+9000]
					clear(b)
					var m Mapping
					iova := uint64(uintptr(unsafe.Pointer(&b[0]))) & (verbs.PageSize - 1)
					if c.over {
						iova = 0
					}
					if !c.on {
						m, err = s.ps.Register(context.Background(), b, iova, rw)
					} else {
						m, err = s.q.Map(Request{Segs: [][]byte{b}, IOVA: iova, Access: rw, Over: over})
					}
					if err != nil {
						t.Fatal(err)
					}
					if m.it.kind != c.want {
						t.Fatalf("mapped by way %d, want %d", m.it.kind, c.want)
					}
					if err := s.peer(verbs.OpWrite, m.RKey(), m.IOVA(), m.Len()); err != nil {
						t.Fatalf("peer's WRITE: %v", err)
					}
					s.side[1].qp.Query() // orders this goroutine behind the engine
					if b[0] != 1 || b[8999] != byte(8999&0xff+1) {
						t.Fatalf("not written: %v", b[:4])
					}
					if err := s.peer(verbs.OpRead, m.RKey(), m.IOVA(), m.Len()); err != nil {
						t.Fatalf("peer's READ: %v", err)
					}
					told := make(chan error, 1)
					if err := m.Unmap(func(err error) { told <- err }); err != nil {
						t.Fatal(err)
					}
					if err := <-told; err != nil {
						t.Fatal(err)
					}
					last = m.RKey()
				}
				if s := s.ps.Stats(); s.Small.Alloc > 1 && c.want == byFastReg {
					t.Errorf("%d regions for one at a time", s.Small.Alloc)
				}
				var wc *verbs.WCError
				if err := s.peer(verbs.OpWrite, last, 0, 8); !errors.As(err, &wc) || wc.Status != verbs.WCRemAccessErr {
					t.Errorf("peer's WRITE after the owner was told: %v", err)
				}
				if c.over {
					if err := over.Unmap(nil); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Second)
				}
			})
		})
	}
}

// workload maps, has the peer write, and gives back, in all ways; what fails is returned, and everything is given back
// all the same.
func (s *testStack) workload() error {
	ctx := context.Background()
	var errs []error
	var held []Mapping
	keep := func(m Mapping, err error) Mapping {
		if err != nil {
			errs = append(errs, err)
			return Mapping{}
		}
		held = append(held, m)
		return m
	}
	over := keep(s.ps.Register(ctx, s.mem[:64<<10:64<<10], 0, rw|verbs.AccessMWBind))
	for i := range 4 {
		b := s.mem[i*8192 : i*8192+4096 : i*8192+4096]
		for _, o := range []Mapping{{}, over} {
			if m := keep(s.q.Map(Request{Segs: [][]byte{b}, Access: rw, Over: o})); m.it != nil {
				if err := s.peer(verbs.OpWrite, m.RKey(), 0, len(b)); err != nil {
					errs = append(errs, err)
				}
			}
		}
	}
	told := 0
	for i, m := range held {
		give := m.Unmap
		if i%3 == 1 {
			give = m.Free
		}
		if err := give(func(err error) {
			if err == nil {
				s.mu.Lock()
				told++
				s.mu.Unlock()
			}
		}); err != nil {
			errs = append(errs, err)
		}
	}
	if err := s.ps.Flush(ctx); err != nil {
		errs = append(errs, err)
	}
	time.Sleep(10 * time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	if told != len(held) {
		errs = append(errs, &untold{told, len(held)})
	}
	return errors.Join(errs...)
}

type untold struct{ told, of int }

func (e *untold) Error() string { return "owners were not told" }

// TestEveryCallFails fails the n-th call of the device for each n, whatever it is, on devices of each kind. Owners are told and
// nothing is left.
func TestEveryCallFails(t *testing.T) {
	for name, without := range map[string]verbs.DeviceCaps{"all": 0, "windows": verbs.CapMemMgtExtensions, "neither": ^verbs.DeviceCaps(0)} {
		t.Run(name, func(t *testing.T) { everyCallFails(t, without) })
	}
}

func everyCallFails(t *testing.T, without verbs.DeviceCaps) {
	failed := 0
	for n, done := 1, false; !done && !t.Failed(); n++ {
		synctest.Test(t, func(t *testing.T) {
			f := new(faultverbs.Faults)
			f.Without(without)
			s := newStack(simProvider(t, f), "10.0.0.1", "10.0.0.2")
			f.Fail(faultverbs.Any, n, errFault)
			err := s.open()
			if err == nil {
				err = s.workload()
			}
			s.close(t)
			var u *untold
			switch unused := f.Clear(); {
			case errors.As(err, &u):
				t.Errorf("call %d fails: %d of %d owners were told", n, u.told, u.of)
			case unused > 0:
				if done = true; err != nil {
					t.Errorf("without a fault: %v", err)
				}
			default:
				if failed++; err != nil && !errors.Is(err, errFault) {
					t.Errorf("call %d fails: %v", n, err)
				}
			}
		})
	}
	if failed < 60 {
		t.Errorf("only %d calls were made", failed)
	}
}

// TestEveryRequestFails completes the n-th memory request with an error, which ends the queue pair. The owners are
// told, and nothing is left.
func TestEveryRequestFails(t *testing.T) {
	for _, op := range []verbs.SendOpcode{verbs.OpFastRegMR, verbs.OpBindMW, verbs.OpLocalInv} {
		for n, done := 1, false; !done && !t.Failed(); n++ {
			synctest.Test(t, func(t *testing.T) {
				f := new(faultverbs.Faults)
				s := newStack(simProvider(t, f), "10.0.0.1", "10.0.0.2")
				if err := s.open(); err != nil {
					t.Fatal(err)
				}
				f.FailWR(op, n, verbs.WCLocQPOpErr)
				var u *untold
				err := s.workload()
				if errors.As(err, &u) {
					t.Errorf("%v number %d fails: %d of %d owners were told", op, n, u.told, u.of)
				}
				if done = f.Clear() > 0; done && err != nil {
					t.Errorf("without a fault: %v", err)
				} else if done && n <= 4 || n > 100 {
					t.Errorf("%d requests of kind %v were made", n-1, op)
				}
				s.close(t)
			})
		}
	}
}
