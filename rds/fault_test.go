package rds

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// faultRun is what programs do with a Service: datagrams, regions of each kind, operations, a device that goes away in the
// middle of one and comes back, the end; while a call of the Service's to its provider fails.
type faultRun struct {
	t       *testing.T
	what    string // fails
	cause   error
	faults  *faultverbs.Faults
	prov    *softroce.Provider
	net     *simnet.Net
	passive bool // the peer connects
	bare    bool // the device can do no more than it must

	svc, other *Service
	s, c       *Socket // on svc, on other
	regions    []*Region
	plain      [2]uint32 // datagrams without operations: sent by s, by c
	asked      int       // completions that s was promised
	told       int
	failures   int // of calls of this package
}

// failed notes an error of a call, which has the fault for its cause, or follows from it.
func (w *faultRun) failed(call string, err error, follows ...error) {
	w.t.Helper()
	w.failures++
	for _, e := range append(follows, w.cause, ErrPoolExhausted) {
		if errors.Is(err, e) {
			return
		}
	}
	w.t.Errorf("%s: %s: %v", w.what, call, err)
}

func (w *faultRun) keep(call string, r *Region, err error) *Region {
	w.t.Helper()
	if err != nil {
		w.failed(call, err)
		return nil
	}
	w.regions = append(w.regions, r)
	return r
}

// exchange sends datagrams both ways, and reads them: once, in order, and whole. Datagrams of operations come between them.
func (w *faultRun) exchange() {
	w.t.Helper()
	for _, n := range []int{8, 70000} {
		for i, s := range []*Socket{w.s, w.c} {
			p := payload(n, byte(n))
			binary.BigEndian.PutUint32(p, w.plain[i])
			to := []*Socket{w.c, w.s}[i]
			mustWrite(w.t, s, p, to.AddrPort())
			for {
				m := mustReceive(w.t, to)
				if len(m.Data) < 8 {
					continue
				}
				if k := binary.BigEndian.Uint32(m.Data); k != w.plain[i] || len(m.Data) != n || m.Data[n-1] != p[n-1] {
					w.t.Fatalf("%s: datagram %d of %d bytes, want %d of %d", w.what, k, len(m.Data), w.plain[i], n)
				}
				break
			}
			w.plain[i]++
		}
	}
}

// op sends an operation of s's. Whatever becomes of it, its completion comes.
func (w *faultRun) op(ctx context.Context, r RDMA, wait bool) {
	w.t.Helper()
	r.Notify, r.Token = true, uint64(w.asked)
	if err := w.s.Send(ctx, Message{Peer: w.c.AddrPort(), Data: []byte("op"), RDMA: &r}); errors.Is(err, ErrNotSupported) && r.Op == FetchAdd && w.bare {
		return
	} else if err != nil {
		w.failed(r.Op.String(), err, ErrDeviceGone, ErrStaleCookie)
		return
	}
	if w.asked++; wait {
		w.completion(ctx)
	}
}

func (w *faultRun) completion(ctx context.Context) {
	w.t.Helper()
	c, err := w.s.ReadCompletion(ctx)
	if err != nil {
		w.t.Fatalf("%s: completion %d: %v", w.what, w.told, err)
	}
	if c.Token != uint64(w.told) {
		w.t.Errorf("%s: completion of operation %d, want %d", w.what, c.Token, w.told)
	}
	w.told++
}

func (w *faultRun) run(ctx context.Context) {
	t := w.t
	for try := 0; w.s == nil; try++ {
		s, err := w.svc.ListenAddrPort(ctx, ap(addrB, 4000))
		if w.s = s; err != nil {
			w.failed("bind", err)
			if try > 0 {
				t.Fatalf("%s: cannot bind", w.what)
			}
		}
	}
	w.c = bind(t, w.other, ap(addrA, 4000))
	to := w.c.AddrPort()
	if w.passive {
		mustWrite(t, w.c, []byte("first"), w.s.AddrPort())
		mustReceive(t, w.s)
	}
	w.exchange()

	// Regions of each kind, and operations from and to them.
	remote := mustRegister(t, w.c, 200000, RegionOptions{Atomic: true})
	r, err := w.s.RegisterRegion(ctx, make([]byte, 200000), RegionOptions{})
	local := w.keep("register", r, err)
	if local != nil {
		at := uint64(-int(remote.Cookie().Offset()) & 7)
		w.op(ctx, RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 30000), local.Piece(50000, 100)}, Remote: remote.Cookie()}, true)
		w.op(ctx, RDMA{Op: RDMARead, Local: []Piece{local.Piece(100, 70000)}, Remote: remote.Cookie(), RemoteOffset: 5}, true)
		w.op(ctx, RDMA{Op: FetchAdd, Local: []Piece{local.Piece(0, 8)}, Remote: remote.Cookie(), RemoteOffset: at, Add: 1}, true)
	}
	w.exchange()
	theirs := mustRegister(t, w.c, 200000, RegionOptions{})
	give := func(cookie Cookie, n int) {
		err := w.c.Send(ctx, Message{Peer: w.s.AddrPort(), Data: []byte("done"), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{theirs.Piece(0, n)}, Remote: cookie, Notify: true}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.c.ReadCompletion(ctx); err != nil {
			t.Fatal(err)
		}
	}
	r, err = w.s.SendMapped(ctx, Message{Peer: to, Data: []byte("use it")}, make([]byte, 9000), RegionOptions{UseOnce: true})
	if r := w.keep("send mapped", r, err); r != nil {
		give(r.Cookie(), 9000)
	}
	r, err = w.s.RegisterRegionFor(ctx, to, make([]byte, 300), RegionOptions{})
	if r := w.keep("register for a peer", r, err); r != nil {
		give(r.Cookie(), 300)
		if err := r.Invalidate(ctx); err != nil {
			w.failed("invalidate", err)
		}
	}
	w.exchange()

	// The device goes in the middle of an operation, and regions with it.
	if local != nil {
		w.op(ctx, RDMA{Op: RDMARead, Local: []Piece{local.Piece(0, 200000)}, Remote: remote.Cookie()}, false)
	}
	if r, err := w.s.RegisterRegionFor(ctx, to, make([]byte, 100), RegionOptions{}); w.keep("register", r, err) != nil && w.failures%2 == 0 {
		r.Close()
	}
	if err := w.prov.Remove(addrB); err != nil {
		t.Fatal(err)
	}
	for w.told < w.asked {
		w.completion(ctx)
	}
	waitDone(t, w.regions...) // a device waits for nobody, and nobody has to free anything
	for _, r := range w.regions {
		if err := r.Err(); !errors.Is(err, ErrDeviceGone) && !errors.Is(err, ErrStaleCookie) {
			t.Errorf("%s: a region of a device that is gone: %v", w.what, err)
		}
	}
	if err := w.prov.Add(addrB); err != nil {
		t.Fatal(err)
	}
	w.exchange()
	for try := 0; ; try++ {
		r, err := w.s.RegisterRegion(ctx, make([]byte, 5000), RegionOptions{})
		if r := w.keep("register again", r, err); r != nil {
			w.op(ctx, RDMA{Op: RDMAWrite, Local: []Piece{r.Piece(0, 5000)}, Remote: remote.Cookie()}, true)
			break
		}
		if try > 0 {
			t.Fatalf("%s: nothing can be registered", w.what)
		}
	}
	w.exchange()
}

// close ends it all. Nothing is left: not with the Service, which is an audit, not with the provider, whose address can be opened
// anew, since that takes that everything on it was closed.
func (w *faultRun) close() {
	time.Sleep(10 * time.Second) // what a peer has not acknowledged when its last acknowledgement fails is abandoned with good reason
	if err := w.svc.Close(); err != nil {
		w.t.Errorf("%s: closing: %v", w.what, err)
	}
	waitDone(w.t, w.regions...)
	closeService(w.t, w.other)
	again, err := Open(Config{Providers: []verbs.Provider{w.prov}})
	if err != nil {
		w.t.Fatal(err)
	}
	bind(w.t, again, ap(addrB, 4000))
	closeService(w.t, again)
	if c, ok := w.s.TryReadCompletion(); ok {
		w.t.Errorf("%s: completion %+v was not asked for", w.what, c)
	}
}

// faultLoop runs with the nth chance to fail taken, for each n until it is not, and returns how often it was. arm says what calls fail with
// then.
func faultLoop(t *testing.T, what string, bare bool, arm func(f *faultverbs.Faults, n int) (cause error)) (failed int) {
	for n, done := 1, false; !done && !t.Failed(); n++ {
		synctest.Test(t, func(t *testing.T) {
			w := &faultRun{t: t, what: fmt.Sprintf("%s number %d fails", what, n), faults: new(faultverbs.Faults), bare: bare, passive: what == faultverbs.Accept.String(),
				net: simnet.ForTest(t, uint64(n), simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})}
			w.prov = softroce.New(softroce.Config{Network: w.net})
			if bare {
				w.faults.Without(^verbs.DeviceCaps(0))
			}
			var err error
			if w.svc, err = Open(Config{Providers: []verbs.Provider{faultverbs.Wrap(w.prov, w.faults)}}); err != nil {
				t.Fatal(err)
			}
			w.other = openSim(t, w.net, Config{})
			w.cause = arm(w.faults, n)
			ctx, cancel := context.WithTimeout(bg(), 10*time.Minute)
			defer cancel()
			w.run(ctx)
			w.close()
			if done = w.faults.Clear() > 0; done && w.failures > 0 {
				t.Errorf("%d calls failed without a fault", w.failures)
			} else if !done {
				failed++
			}
		})
	}
	return failed
}

// TestEveryCallFails fails each call to the provider, one at a time, on a device that can do everything and on one that can do no
// more than it must. The caller is told, or nobody is; every datagram arrives once, every operation is told of once, every
// region's memory comes back; the next try succeeds; and nothing is left.
func TestEveryCallFails(t *testing.T) {
	errFault := fmt.Errorf("the test says no: %w", verbs.ErrNoMemory)
	for _, c := range []struct {
		op   faultverbs.Op
		bare bool
		want int // calls, at least
	}{
		{faultverbs.OpenDevice, false, 2},
		{faultverbs.WatchDevices, false, 1},
		{faultverbs.AllocPD, false, 2},
		{faultverbs.CreateCQ, false, 4},
		{faultverbs.CreateSRQ, false, 4},
		{faultverbs.CreateQP, false, 2},
		{faultverbs.RegMR, false, 5},
		{faultverbs.RegMR, true, 8},
		{faultverbs.AllocFastRegMR, false, 2},
		{faultverbs.AllocPageList, false, 1},
		{faultverbs.SetPageList, false, 2},
		{faultverbs.Deregister, false, 6},
		{faultverbs.Deregister, true, 8},
		{faultverbs.ClosePageList, false, 1},
		{faultverbs.CloseDevice, false, 2},
		{faultverbs.ClosePD, false, 2},
		{faultverbs.CloseCQ, false, 4},
		{faultverbs.CloseSRQ, false, 4},
		{faultverbs.Modify, false, 2},
		{faultverbs.PostSend, false, 30},
		{faultverbs.PostSRQ, false, 20},
		{faultverbs.ArmSRQ, false, 2},
		{faultverbs.Listen, false, 2},
		{faultverbs.Connect, false, 2},
		{faultverbs.Accept, false, 1},
	} {
		t.Run(fmt.Sprintf("%v/bare=%v", c.op, c.bare), func(t *testing.T) {
			n := faultLoop(t, c.op.String(), c.bare, func(f *faultverbs.Faults, n int) (cause error) {
				if cause = errFault; c.op == faultverbs.PostSend {
					cause = []error{verbs.ErrSQFull, verbs.ErrInvalid}[n%2]
				}
				f.Fail(c.op, n, cause)
				return cause
			})
			if n < c.want {
				t.Errorf("%d calls failed, want %d", n, c.want)
			}
		})
	}
}

// TestEveryRequestFails is the same for requests on the send queue, which are refused, or fail when their turn comes.
func TestEveryRequestFails(t *testing.T) {
	for op, want := range map[verbs.SendOpcode]int{verbs.OpSend: 20, verbs.OpWrite: 2, verbs.OpRead: 2, verbs.OpFetchAdd: 1, verbs.OpFastRegMR: 3, verbs.OpLocalInv: 1} {
		t.Run(op.String(), func(t *testing.T) {
			refused := faultLoop(t, op.String(), false, func(f *faultverbs.Faults, n int) error {
				f.FailPost(op, n, verbs.ErrInvalid)
				return verbs.ErrInvalid
			})
			failed := faultLoop(t, op.String(), false, func(f *faultverbs.Faults, n int) error {
				f.FailWR(op, n, verbs.WCLocQPOpErr)
				return verbs.ErrInvalid
			})
			if refused < want || failed < want {
				t.Errorf("%d requests were refused, %d failed, want %d", refused, failed, want)
			}
		})
	}
}

// TestEveryArenaCallFails is the same for regions over an Arena, whose pages the kernel tells of in its own time: a peer writes to
// them while calls fail.
func TestEveryArenaCallFails(t *testing.T) {
	errFault := fmt.Errorf("the test says no: %w", verbs.ErrNoMemory)
	for _, op := range []faultverbs.Op{faultverbs.RegOnDemandMR, faultverbs.Deregister} {
		for n, done := 1, false; !done && !t.Failed(); n++ {
			a, err := OpenArena(1 << 20)
			if errors.Is(err, ErrNotSupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			var faults faultverbs.Faults
			svc, other := openUDP(t, Config{Providers: []verbs.Provider{faultverbs.Wrap(softroce.New(softroce.Config{Port: udpPort}), &faults)}}), openUDP(t, Config{})
			s, c := bind(t, svc, ap(netip.MustParseAddr("127.0.7.1"), 4000)), bind(t, other, ap(netip.MustParseAddr("127.0.7.2"), 4000))
			local := mustRegister(t, c, 8192, RegionOptions{})
			faults.Fail(op, n, errFault)
			var all []*Region
			for try := range 2 {
				r, err := s.RegisterRegion(bg(), a.Bytes()[:8192], RegionOptions{Arena: a, Invalidate: try == 0})
				if err != nil {
					if !errors.Is(err, errFault) {
						t.Errorf("%v number %d fails: %v", op, n, err)
					}
					continue
				}
				all = append(all, r)
				mustSend(t, c, Message{Peer: s.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 8192)}, Remote: r.Cookie(), Notify: true}})
				wantCompletion(t, c, 0, StatusSuccess)
				mustReceive(t, s)
				r.Close()
			}
			waitDone(t, all...)
			for _, r := range all {
				if r.err != nil {
					t.Errorf("%v number %d fails: memory not given back: %v", op, n, r.err)
				}
			}
			closeService(t, svc)
			closeService(t, other)
			if err := a.Close(); err != nil {
				t.Errorf("%v number %d fails: %v", op, n, err)
			}
			if done = faults.Clear() > 0; done && n < 3 {
				t.Errorf("%v: %d calls were made", op, n-1)
			}
		}
	}
}
