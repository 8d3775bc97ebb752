package faultverbs_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
	"github.com/openrds/openrds/verbs/softroce"
	"github.com/openrds/openrds/verbs/verbstest"
)

func TestMain(m *testing.M) { leak.Main(m) }

var addrs = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}

func newProvider(t *testing.T, f *faultverbs.Faults) verbs.Provider {
	net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}})
	return faultverbs.Wrap(softroce.New(softroce.Config{Network: net}), f)
}

func suite(t *testing.T, set func(*faultverbs.Faults)) {
	verbstest.Run(t, func(t *testing.T) verbstest.Env {
		f := new(faultverbs.Faults)
		set(f)
		return verbstest.Env{Provider: newProvider(t, f), Addrs: addrs, Nowhere: netip.MustParseAddr("10.0.0.9"), Settle: 50 * time.Millisecond}
	}, verbstest.Within(synctest.Test))
}

func TestVerbsFaultsOff(t *testing.T) { suite(t, func(*faultverbs.Faults) {}) }

// Late completions in an unexpected order are within the letter of verbs: the suite does not notice.
func TestVerbsLateCompletions(t *testing.T) {
	suite(t, func(f *faultverbs.Faults) {
		f.DelayCompletions(30 * time.Microsecond)
		f.ShuffleCompletions(7)
	})
}

// A device that lacks what is optional passes: what needs it is skipped, or is refused as verbs has it.
func TestVerbsWithout(t *testing.T) {
	const windows, all = verbs.CapMW1 | verbs.CapMW2A | verbs.CapMW2B, ^verbs.DeviceCaps(0)
	for name, caps := range map[string]verbs.DeviceCaps{"fast registration": verbs.CapMemMgtExtensions, "windows": windows, "all": all} {
		t.Run(name, func(t *testing.T) { suite(t, func(f *faultverbs.Faults) { f.Without(caps) }) })
	}
}

var errTest = errors.New("the test says no")

// world is two devices with a pair of connected QPs, built step by step so that any step may fail.
type world struct {
	t    *testing.T
	f    *faultverbs.Faults
	p    verbs.Provider
	dev  [2]verbs.Device
	pd   [2]verbs.PD
	scq  [2]verbs.CQ
	rcq  [2]verbs.CQ
	srq  verbs.SRQ
	mr   verbs.MR
	qp   [2]verbs.QP
	ln   verbs.Listener
	ep   [2]verbs.Endpoint
	mem  []byte
	undo []func() error

	fast   verbs.MR // of side 1, as the rest
	list   verbs.PageList
	mw     verbs.MW
	target verbs.MR // the window's

	handler func(verbs.CQ) // of side 1's receive CQ
	events  func(verbs.AsyncEvent)
}

func newWorld(t *testing.T) *world {
	f := new(faultverbs.Faults)
	return &world{t: t, f: f, p: newProvider(t, f), mem: make([]byte, 4096)}
}

// open makes everything; what it made is closed by close, whatever it returns.
func (w *world) open() (err error) {
	keep := func(f func() error) { w.undo = append(w.undo, f) }
	for i := range 2 {
		if w.dev[i], err = w.p.OpenDevice(addrs[i]); err != nil {
			return err
		}
		keep(w.dev[i].Close)
		w.dev[i].SetAsyncHandler(func(ev verbs.AsyncEvent) {
			if w.events != nil {
				w.events(ev)
			}
		})
		if w.pd[i], err = w.dev[i].AllocPD(); err != nil {
			return err
		}
		keep(w.pd[i].Close)
		if w.scq[i], err = w.dev[i].CreateCQ(verbs.CQConfig{Depth: 256}); err != nil {
			return err
		}
		keep(w.scq[i].Close)
		var h func(verbs.CQ)
		if i == 1 && w.handler != nil {
			h = w.handler
		}
		if w.rcq[i], err = w.dev[i].CreateCQ(verbs.CQConfig{Depth: 256, Handler: h}); err != nil {
			return err
		}
		keep(w.rcq[i].Close)
	}
	if w.mr, err = w.pd[0].RegMR(w.mem, 0, verbs.AccessLocalWrite); err != nil {
		return err
	}
	keep(w.mr.Deregister)
	if w.srq, err = w.pd[1].CreateSRQ(verbs.SRQConfig{MaxWR: 64, MaxSGE: 1}); err != nil {
		return err
	}
	keep(w.srq.Close)
	if err = w.srq.Arm(1); err != nil {
		return err
	}
	for i := range 2 {
		cfg := verbs.QPConfig{Type: verbs.RC, SendCQ: w.scq[i], RecvCQ: w.rcq[i], MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 1, MaxRecvSGE: 1}
		if i == 1 {
			cfg.SRQ = w.srq
		}
		if w.qp[i], err = w.pd[i].CreateQP(cfg); err != nil {
			return err
		}
		keep(w.qp[i].Close)
	}
	return nil
}

// connect connects the QPs through CM.
func (w *world) connect() error {
	type accepted struct {
		ep  verbs.Endpoint
		err error
	}
	out := make(chan accepted, 8)
	var err error
	w.ln, err = w.dev[1].Listen(7000, func(req verbs.ConnRequest) {
		ep, err := req.Accept(context.Background(), w.qp[1], verbs.ConnParam{RetryCount: 6, RNRRetryCount: 7}, nil)
		out <- accepted{ep, err}
	})
	if err != nil {
		return err
	}
	w.undo = append(w.undo, w.ln.Close)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	w.ep[0], _, err = w.dev[0].Connect(ctx, netip.AddrPortFrom(addrs[1], 7000), w.qp[0], verbs.ConnParam{RetryCount: 6, RNRRetryCount: 7}, nil)
	if err != nil {
		return err
	}
	w.undo = append(w.undo, w.ep[0].Disconnect)
	acc := <-out
	w.ep[1] = acc.ep
	return acc.err
}

// exchange sends n messages from side 0 to side 1.
func (w *world) exchange(n int) error {
	if _, err := w.srq.PostRecv(make([]verbs.RecvWR, n)); err != nil {
		return err
	}
	wrs := make([]verbs.SendWR, n)
	for i := range wrs {
		wrs[i] = verbs.SendWR{ID: uint64(i), Opcode: verbs.OpSend, Flags: verbs.SendSignaled}
	}
	if _, err := w.qp[0].PostSend(wrs); err != nil {
		return err
	}
	if _, err := w.qp[0].PostRecv(make([]verbs.RecvWR, 1)); err != nil {
		return err
	}
	_, err := poll(w.scq[0], n)
	return err
}

// pages is two pages of memory that a page list may name.
func pages(t *testing.T) []byte {
	mem := make([]byte, 3*verbs.PageSize)
	var pin runtime.Pinner
	pin.Pin(&mem[0])
	t.Cleanup(pin.Unpin)
	return mem[-uintptr(unsafe.Pointer(&mem[0]))%verbs.PageSize:][:2*verbs.PageSize]
}

// allocate makes what a service that maps memory for its peers has: a plain region and a window over it, a
// region for fast registration and a page list.
func (w *world) allocate() (err error) {
	keep := func(f func() error) { w.undo = append(w.undo, f) }
	const access = verbs.AccessLocalWrite | verbs.AccessMWBind
	if w.target, err = w.pd[1].RegMR(pages(w.t), 1<<20, access); err != nil {
		return err
	}
	keep(w.target.Deregister)
	if w.mw, err = w.pd[1].AllocMW(verbs.MWType2A); err != nil {
		return err
	}
	keep(w.mw.Dealloc)
	if w.fast, err = w.pd[1].AllocFastRegMR(2); err != nil {
		return err
	}
	keep(w.fast.Deregister)
	if w.list, err = w.pd[1].AllocPageList(2); err != nil {
		return err
	}
	keep(w.list.Close)
	return nil
}

// serve maps memory on side 1 in both ways, has side 0 write to it, and unmaps it, n times.
func (w *world) serve(n int) error {
	step := func(side int, wrs ...verbs.SendWR) error {
		if k, err := w.qp[side].PostSend(wrs); err != nil {
			_, e := poll(w.scq[side], k)
			return errors.Join(err, e)
		}
		wcs, err := poll(w.scq[side], len(wrs))
		for i := range wcs {
			err = errors.Join(err, wcs[i].Err())
		}
		return err
	}
	for range n {
		if err := w.list.Set([][]byte{pages(w.t)[100:5000]}); err != nil {
			return err
		}
		fast, mw := verbs.UpdateFastRegKey(w.fast.RKey()), verbs.UpdateFastRegKey(w.mw.RKey())
		write := func(id uint64, at uint64, key verbs.RKey) verbs.SendWR {
			return verbs.SendWR{ID: id, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, SGs: []verbs.SGE{{Length: 64, LKey: w.mr.LKey()}}, RemoteAddr: at, RKey: key}
		}
		if err := step(1,
			verbs.SendWR{ID: 100, Opcode: verbs.OpFastRegMR, Flags: verbs.SendSignaled, FastReg: &verbs.FastReg{MR: w.fast, Key: fast, Pages: w.list,
				IOVA: 1<<30 + 100, Access: verbs.AccessLocalWrite | verbs.AccessRemoteWrite}},
			verbs.SendWR{ID: 101, Opcode: verbs.OpBindMW, Flags: verbs.SendSignaled, Bind: &verbs.MWBind{MW: w.mw, Key: mw, MR: w.target,
				Addr: 1<<20 + 8, Length: 64, Access: verbs.AccessRemoteWrite}}); err != nil {
			return err
		}
		if err := step(0, write(102, 1<<30+4936, fast), write(103, 1<<20+8, mw)); err != nil {
			return err
		}
		if err := step(1, verbs.SendWR{ID: 104, Opcode: verbs.OpLocalInv, Flags: verbs.SendSignaled, InvalidateRKey: fast},
			verbs.SendWR{ID: 105, Opcode: verbs.OpLocalInv, Flags: verbs.SendSignaled, InvalidateRKey: mw}); err != nil {
			return err
		}
	}
	return nil
}

func poll(cq verbs.CQ, n int) (got []verbs.WC, err error) {
	wcs := make([]verbs.WC, n)
	for end := time.Now().Add(30 * time.Second); len(got) < n; time.Sleep(10 * time.Microsecond) {
		if time.Now().After(end) {
			return got, fmt.Errorf("%d of %d completions", len(got), n)
		}
		got = append(got, wcs[:cq.Poll(wcs[:n-len(got)])]...)
	}
	return got, nil
}

// close closes everything made. A call that is made to fail here is made again.
func (w *world) close() {
	w.t.Helper()
	for _, f := range slices.Backward(w.undo) {
		if err := f(); errors.Is(err, errTest) {
			err = f()
			if err != nil {
				w.t.Errorf("a close that failed once: %v", err)
			}
		} else if err != nil {
			w.t.Errorf("close: %v", err)
		}
	}
	w.undo = nil
}

func (w *world) must(what string, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

// connected is a world with everything in place, closed with the test.
func connected(t *testing.T, change ...func(*world)) *world {
	t.Helper()
	w := newWorld(t)
	for _, f := range change {
		f(w)
	}
	t.Cleanup(w.close)
	w.must("open", w.open())
	w.must("allocate", w.allocate())
	w.must("connect", w.connect())
	return w
}

// Every call fails once, in turn; whatever it was, everything can be closed and nothing is left.
func TestEveryCallFails(t *testing.T) {
	failed := 0
	for n, done := 1, false; !done; n++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.f.Fail(faultverbs.Any, n, errTest)
			err := w.open()
			for _, step := range []func() error{w.allocate, w.connect, func() error { return w.exchange(10) }, func() error { return w.serve(2) }} {
				if err == nil {
					err = step()
				}
			}
			w.close()
			unused := w.f.Clear()
			var rejected *verbs.RejectError // Accept failed
			switch {
			case unused == 0:
				failed++
				if err != nil && !errors.Is(err, errTest) && !errors.As(err, &rejected) {
					t.Errorf("call %d fails: %v", n, err)
				}
			case err != nil:
				t.Errorf("without a fault: %v", err)
			default:
				done = true
			}
		})
		if t.Failed() {
			return
		}
	}
	if failed < 40 {
		t.Errorf("only %d calls were made", failed)
	}
}

// Every memory request fails once, in turn, where it is posted or with a status of its own. Nothing is left of
// what was mapped, and a QP that only refused to take the request works on.
func TestEveryMemoryRequestFails(t *testing.T) {
	const rounds = 3
	for op, total := range map[verbs.SendOpcode]int{verbs.OpFastRegMR: rounds, verbs.OpBindMW: rounds, verbs.OpLocalInv: 2 * rounds, verbs.OpWrite: 2 * rounds} {
		for _, atPost := range []bool{true, false} {
			failed := 0
			for n, done := 1, false; !done && !t.Failed(); n++ {
				synctest.Test(t, func(t *testing.T) {
					w := connected(t)
					if atPost {
						w.f.FailPost(op, n, errTest)
					} else {
						w.f.FailWR(op, n, verbs.WCFatalErr)
					}
					err := w.serve(rounds)
					if done = w.f.Clear() > 0; done {
						w.must("without a fault", err)
						return
					}
					failed++
					var e *verbs.WCError
					if atPost && !errors.Is(err, errTest) || !atPost && (!errors.As(err, &e) || e.Status != verbs.WCFatalErr) {
						t.Errorf("%v number %d fails: %v", op, n, err)
					}
					side := 1
					if op == verbs.OpWrite {
						side = 0
					}
					if atPost {
						w.must("the QP has not noticed", w.exchange(1))
					} else if s := w.qp[side].State(); s != verbs.StateErr {
						t.Errorf("the QP errs: %v", s)
					}
					// Whatever was mapped or half mapped, all of it can be freed.
					for _, qp := range w.qp {
						w.must("close", qp.Close())
					}
					w.must("deallocate the window", w.mw.Dealloc())
					w.must("deregister", w.target.Deregister())
					w.must("set the list", w.list.Set([][]byte{pages(t)}))
				})
			}
			if failed != total {
				t.Errorf("%d requests %v were made to fail, want %d", failed, op, total)
			}
		}
	}
}

func TestRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		modify := func() error { return w.qp[0].Modify(verbs.QPAttr{MinRNRTimer: 3}, verbs.QPMinRNRTimerBit) }
		before := w.f.Calls(faultverbs.Modify)
		w.f.Fail(faultverbs.Modify, 2, errTest)
		for i, want := range []error{nil, errTest, nil} {
			if err := modify(); !errors.Is(err, want) {
				t.Errorf("call %d: %v, want %v", i+1, err, want)
			}
		}
		if got := w.f.Calls(faultverbs.Modify) - before; got != 3 {
			t.Errorf("three calls are counted: %d", got)
		}
		w.f.FailAll(faultverbs.Modify, errTest)
		for range 3 {
			if err := modify(); !errors.Is(err, errTest) {
				t.Errorf("every call fails: %v", err)
			}
		}
		w.f.Fail(faultverbs.RegMR, 1, errTest)
		if n := w.f.Clear(); n != 1 {
			t.Errorf("one rule was not used: %d", n)
		}
		w.must("no rule is left", modify())

		w.f.Delay(faultverbs.Modify, 1, time.Second)
		start := time.Now()
		w.must("a delayed call succeeds", modify())
		if took := time.Since(start); took < time.Second {
			t.Errorf("it takes its time: %v", took)
		}
	})
}

func TestShortPosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		w.f.Fail(faultverbs.PostSend, 1, verbs.ErrSQFull)
		w.f.Fail(faultverbs.PostSRQ, 1, verbs.ErrRQFull)
		if n, err := w.srq.PostRecv(make([]verbs.RecvWR, 5)); n != 2 || !errors.Is(err, verbs.ErrRQFull) {
			t.Fatalf("half of a batch of receives is posted: %d, %v", n, err)
		}
		wrs := make([]verbs.SendWR, 5)
		for i := range wrs {
			wrs[i] = verbs.SendWR{ID: uint64(i), Opcode: verbs.OpSend, Flags: verbs.SendSignaled}
		}
		if n, err := w.qp[0].PostSend(wrs); n != 2 || !errors.Is(err, verbs.ErrSQFull) {
			t.Fatalf("half of a batch of sends is posted: %d, %v", n, err)
		}
		wcs, err := poll(w.scq[0], 2)
		w.must("that half is sent", err)
		if wcs[0].ID != 0 || wcs[1].ID != 1 {
			t.Fatalf("the first half: %+v", wcs)
		}
	})
}

func TestDelayedCompletions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay = 3 * time.Second
		rung := make(chan time.Time, 4)
		w := connected(t, func(w *world) { w.handler = func(verbs.CQ) { rung <- time.Now() } })
		_, err := w.srq.PostRecv(make([]verbs.RecvWR, 4))
		w.must("post", err)
		w.f.DelayCompletions(delay)
		if w.rcq[1].Arm(false) {
			t.Fatal("nothing is there yet")
		}
		start := time.Now()
		_, err = w.qp[0].PostSend([]verbs.SendWR{{Opcode: verbs.OpSend}, {Opcode: verbs.OpSend}})
		w.must("post", err)
		time.Sleep(delay - time.Millisecond)
		var wc [4]verbs.WC
		if n := w.rcq[1].Poll(wc[:]); n != 0 || len(rung) != 0 {
			t.Fatalf("completions are held back: %d, and %d calls of the handler", n, len(rung))
		}
		at := <-rung
		if d := at.Sub(start); d < delay || d > delay+time.Millisecond {
			t.Fatalf("the handler runs when they arrive: after %v", d)
		}
		time.Sleep(time.Millisecond)
		w.f.DelayCompletions(0)
		if n := w.rcq[1].Poll(wc[:]); n != 2 {
			t.Fatalf("both are there: %d", n)
		}
		w.must("and later ones are at once", w.exchange(1))
		if len(rung) != 0 {
			t.Fatal("the handler ran without being armed")
		}
	})
}

func TestShuffledCompletions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		cq, err := w.dev[0].CreateCQ(verbs.CQConfig{Depth: 256})
		w.must("create CQ", err)
		var qps []verbs.QP
		for range 4 {
			qp, err := w.pd[0].CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: cq, RecvCQ: cq, MaxSendWR: 8, MaxRecvWR: 8})
			w.must("create QP", err)
			w.must("to INIT", qp.Modify(verbs.QPAttr{State: verbs.StateInit, Port: 1}, verbs.QPStateBit|verbs.QPPKeyIndexBit|verbs.QPPortBit|verbs.QPAccessBit))
			_, err = qp.PostRecv([]verbs.RecvWR{{ID: 0}, {ID: 1}, {ID: 2}, {ID: 3}, {ID: 4}, {ID: 5}, {ID: 6}, {ID: 7}})
			w.must("post", err)
			qps = append(qps, qp)
		}
		w.f.ShuffleCompletions(99)
		for _, qp := range qps {
			w.must("to ERR", qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit))
		}
		wcs, err := poll(cq, 32)
		w.must("32 flushes", err)
		next, turns := map[verbs.QPN]uint64{}, 0
		for i, wc := range wcs {
			if wc.ID != next[wc.QPN] {
				t.Fatalf("the completions of a QP keep their order: %+v, want request %d", wc, next[wc.QPN])
			}
			next[wc.QPN]++
			if i > 0 && wc.QPN != wcs[i-1].QPN {
				turns++
			}
		}
		if turns <= 3 {
			t.Fatalf("those of different QPs do not: %+v", wcs)
		}
		for _, qp := range qps {
			w.must("close", qp.Close())
		}
		w.must("close", cq.Close())
	})
}

func TestBreakQP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		w.must("it works", w.exchange(3))
		// The peer has no receive: nothing gets through, two are outstanding.
		_, err := w.qp[0].PostSend([]verbs.SendWR{{ID: 10, Opcode: verbs.OpSend}, {ID: 11, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}})
		w.must("post", err)
		w.f.BreakQP(w.qp[0], verbs.WCRetryExcErr)
		wcs, err := poll(w.scq[0], 2)
		w.must("both complete", err)
		if wcs[0].ID != 10 || wcs[0].Status != verbs.WCRetryExcErr || wcs[1].ID != 11 || wcs[1].Status != verbs.WCFlushErr {
			t.Fatalf("the first fails, the next is flushed: %+v", wcs)
		}
		wcs, err = poll(w.rcq[0], 1)
		w.must("the receive", err)
		if wcs[0].Status != verbs.WCFlushErr {
			t.Fatalf("the receive is flushed: %+v", wcs[0])
		}
		if a, b := w.qp[0].State(), w.qp[1].State(); a != verbs.StateErr || b != verbs.StateRTS {
			t.Fatalf("the QP errs, the peer does not know: %v, %v", a, b)
		}
	})
}

// A completion that is in the CQ already may still turn out to be an error; a receive may not.
func TestBreakQPLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		_, err := w.srq.PostRecv(make([]verbs.RecvWR, 2))
		w.must("post", err)
		_, err = w.qp[0].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}, {ID: 2, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}})
		w.must("post", err)
		time.Sleep(time.Second)
		w.f.BreakQP(w.qp[0], verbs.WCRemOpErr)
		w.f.BreakQP(w.qp[1], verbs.WCRetryExcErr)
		wcs, err := poll(w.scq[0], 2)
		w.must("both complete", err)
		if wcs[0].Status != verbs.WCRemOpErr || wcs[1].Status != verbs.WCFlushErr {
			t.Fatalf("the first fails, the next is flushed: %+v", wcs)
		}
		wcs, err = poll(w.rcq[1], 2)
		w.must("both were received", err)
		if wcs[0].Status != verbs.WCSuccess || wcs[1].Status != verbs.WCSuccess {
			t.Fatalf("what was received stays so: %+v", wcs)
		}
	})
}

func TestFailWR(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		_, err := w.srq.PostRecv(make([]verbs.RecvWR, 8))
		w.must("post", err)
		w.f.FailWR(verbs.OpSend, 3, verbs.WCRNRRetryExcErr)
		var wrs []verbs.SendWR
		for i := range uint64(5) {
			wrs = append(wrs, verbs.SendWR{ID: i, Opcode: verbs.OpSend, Flags: verbs.SendSignaled})
		}
		_, err = w.qp[0].PostSend(wrs)
		w.must("post", err)
		wcs, err := poll(w.scq[0], 5)
		w.must("five completions", err)
		for i, want := range []verbs.WCStatus{verbs.WCSuccess, verbs.WCSuccess, verbs.WCRNRRetryExcErr, verbs.WCFlushErr, verbs.WCFlushErr} {
			if wcs[i].ID != uint64(i) || wcs[i].Status != want {
				t.Errorf("completion %d: %+v, want %v", i, wcs[i], want)
			}
		}
		if a, b := w.qp[0].State(), w.qp[1].State(); a != verbs.StateErr || b != verbs.StateRTS {
			t.Errorf("the QP errs, the peer does not know: %v, %v", a, b)
		}
		wcs, err = poll(w.rcq[1], 2)
		w.must("two messages arrive", err)
		time.Sleep(time.Second)
		if n := w.rcq[1].Poll(wcs); n != 0 {
			t.Errorf("and no more: %d", n)
		}
	})
}

// A request that was to fail and is flushed before its turn comes is flushed; a rule whose request was not taken
// waits for the next.
func TestFailWRNotReached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := connected(t)
		w.f.FailWR(verbs.OpSend, 2, verbs.WCFatalErr)
		w.f.FailPost(verbs.OpWrite, 1, errTest)
		n, err := w.qp[0].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend}, {ID: 2, Opcode: verbs.OpWrite}, {ID: 3, Opcode: verbs.OpSend}})
		if n != 1 || !errors.Is(err, errTest) {
			t.Fatalf("a batch is cut where a request is refused: %d, %v", n, err)
		}
		wrs := make([]verbs.SendWR, 100)
		for i := range wrs {
			wrs[i] = verbs.SendWR{ID: uint64(10 + i), Opcode: verbs.OpRead}
		}
		wrs[99].Opcode = verbs.OpSend
		if n, err = w.qp[0].PostSend(wrs); !errors.Is(err, verbs.ErrSQFull) {
			t.Fatalf("a hundred requests do not fit: %d, %v", n, err)
		}
		if left := w.f.Clear(); left != 1 {
			t.Fatalf("the rule of a request that was not taken remains: %d", left)
		}
		// The peer has no receive: the first SEND is stuck, and what is behind it waits for its turn.
		w.f.FailWR(verbs.OpRead, 1, verbs.WCFatalErr)
		_, err = w.qp[1].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend}, {ID: 2, Opcode: verbs.OpRead}})
		w.must("post", err)
		time.Sleep(time.Millisecond)
		w.must("to ERR", w.qp[1].Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit))
		wcs, err := poll(w.scq[1], 2)
		w.must("both complete", err)
		if wcs[0].ID != 1 || wcs[0].Status != verbs.WCFlushErr || wcs[1].ID != 2 || wcs[1].Status != verbs.WCFlushErr {
			t.Errorf("both are flushed: %+v", wcs)
		}
	})
}

func TestDeviceRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := make(chan verbs.EventType, 16)
		w := connected(t, func(w *world) { w.events = func(ev verbs.AsyncEvent) { events <- ev.Type } })
		w.must("map", w.serve(1))
		w.f.DeviceRemoved(w.dev[1])
		w.f.DeviceFatal(w.dev[1]) // comes too late
		<-w.ep[1].Done()
		synctest.Wait()
		close(events)
		removed := 0
		for e := range events {
			if e == verbs.EventDeviceRemoved {
				removed++
			}
			if e == verbs.EventDeviceFatal {
				t.Error("a device that is gone dies no more")
			}
		}
		if removed != 1 {
			t.Errorf("one event tells: %d", removed)
		}
		w.events = nil
		for what, f := range map[string]func() error{
			"AllocFastRegMR": func() error { _, err := w.pd[1].AllocFastRegMR(1); return err },
			"AllocPageList":  func() error { _, err := w.pd[1].AllocPageList(1); return err },
			"AllocMW":        func() error { _, err := w.pd[1].AllocMW(verbs.MWType1); return err },
			"RegOnDemandMR":  func() error { _, err := w.pd[1].RegOnDemandMR(nil, 0, 0); return err },
			"AdviseMR":       func() error { return w.pd[1].AdviseMR(verbs.AdvisePrefetch, nil) },
		} {
			if err := f(); !errors.Is(err, faultverbs.ErrDeviceGone) {
				t.Errorf("%s: %v, want ErrDeviceGone", what, err)
			}
		}
		w.must("what exists can be freed", errors.Join(w.mw.Dealloc(), w.target.Deregister(), w.fast.Deregister(), w.list.Close()))
	})
}

// The news of a provider whose devices come and go are handed on.
func TestWatchDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 1, simnet.Config{})
		inner := softroce.New(softroce.Config{Network: net})
		f := new(faultverbs.Faults)
		p := faultverbs.Wrap(inner, f).(verbs.DeviceWatcher)
		f.Fail(faultverbs.WatchDevices, 1, errTest)
		if _, err := p.WatchDevices(func(verbs.DeviceEvent) {}); !errors.Is(err, errTest) {
			t.Fatalf("the first call fails: %v", err)
		}
		news := make(chan verbs.DeviceEvent, 4)
		stop, err := p.WatchDevices(func(e verbs.DeviceEvent) { news <- e })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if err := inner.Remove(addrs[0]); err != nil {
			t.Fatal(err)
		}
		if e := <-news; e != (verbs.DeviceEvent{Addr: addrs[0]}) {
			t.Errorf("the address is gone: %+v", e)
		}
		if err := inner.Add(addrs[0]); err != nil {
			t.Fatal(err)
		}
		if e := <-news; e != (verbs.DeviceEvent{Addr: addrs[0], Present: true}) {
			t.Errorf("the address is back: %+v", e)
		}
		plain := struct{ verbs.Provider }{inner}
		if _, err := faultverbs.Wrap(plain, f).(verbs.DeviceWatcher).WatchDevices(nil); !errors.Is(err, verbs.ErrNotSupported) {
			t.Errorf("a provider that has no news: %v", err)
		}
	})
}

func TestDeviceFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var events []verbs.AsyncEvent
		w := connected(t, func(w *world) {
			w.events = func(ev verbs.AsyncEvent) {
				mu.Lock()
				defer mu.Unlock()
				events = append(events, ev)
			}
		})
		w.must("it works", w.exchange(3))
		w.f.DeviceFatal(w.dev[0])
		w.f.DeviceFatal(w.dev[0])
		<-w.ep[0].Done()
		<-w.ep[1].Done()
		wcs, err := poll(w.rcq[0], 1)
		w.must("the receive", err)
		if wcs[0].Status != verbs.WCFlushErr {
			t.Fatalf("requests are flushed: %+v", wcs[0])
		}
		synctest.Wait()
		mu.Lock()
		fatal := 0
		for _, ev := range events {
			if ev.Type == verbs.EventDeviceFatal {
				fatal++
			}
		}
		mu.Unlock()
		if fatal != 1 {
			t.Fatalf("one event tells: %+v", events)
		}
		for what, f := range map[string]func() error{
			"AllocPD":  func() error { _, err := w.dev[0].AllocPD(); return err },
			"CreateCQ": func() error { _, err := w.dev[0].CreateCQ(verbs.CQConfig{Depth: 1}); return err },
			"RegMR":    func() error { _, err := w.pd[0].RegMR(make([]byte, 8), 0, 0); return err },
			"Listen":   func() error { _, err := w.dev[0].Listen(1, func(verbs.ConnRequest) {}); return err },
		} {
			if err := f(); !errors.Is(err, faultverbs.ErrDeviceGone) || !errors.Is(err, verbs.ErrClosed) {
				t.Errorf("%s: %v, want ErrDeviceGone", what, err)
			}
		}
		w.must("what exists can be closed", w.mr.Deregister())
		n, err := w.qp[0].PostSend([]verbs.SendWR{{ID: 7, Opcode: verbs.OpSend}})
		if n != 1 || err != nil {
			t.Fatalf("a post is taken and flushed: %d, %v", n, err)
		}
		wcs, err = poll(w.scq[0], 1)
		w.must("the post", err)
		if wcs[0].ID != 7 || wcs[0].Status != verbs.WCFlushErr {
			t.Fatalf("a post is taken and flushed: %+v", wcs[0])
		}
	})
}
