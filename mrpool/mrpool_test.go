package mrpool

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/verbs"
)

// TestReuseInQueueOrder: a region is mapped again on its queue before anything has executed, with another key, and the
// queue then executes all of it.
func TestReuseInQueueOrder(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(64)
	keys := map[verbs.RKey]bool{}
	for range 8 {
		m := r.mustMap(q, 0, 1)
		if keys[m.RKey()] {
			t.Fatalf("key %#x again", m.RKey())
		}
		keys[m.RKey()] = true
		if m.Len() != verbs.PageSize || m.LKey() != verbs.LKey(m.RKey()) || !m.Valid() {
			t.Fatalf("mapping %+v", m)
		}
		r.mustUnmap(m, nil)
		if m.Valid() {
			t.Fatal("valid after Unmap")
		}
	}
	if s := r.ps.Stats().Small; s.Alloc != 1 || s.Reused != 7 || s.Used != 8 {
		t.Errorf("one region serves all: %+v", s)
	}
	if f.outstanding() != 16 {
		t.Fatalf("%d requests posted", f.outstanding())
	}
	wcs := f.run(-1)
	if len(wcs) != 1 || wcs[0].Status != verbs.WCSuccess {
		t.Fatalf("sixteen requests complete once: %+v", wcs)
	}
	give(q, wcs)
	if s := r.ps.Stats().Small; s.Pinned != 0 || s.Ready != 1 {
		t.Errorf("proven: %+v", s)
	}
	gone(q, f)
	r.shut()
}

// TestOtherQueueWaitsForProof: a region invalidated on one queue is another's only after a completion.
func TestOtherQueueWaitsForProof(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Small.MaxItems = 1 })
	a, fa := r.qp(64)
	b, fb := r.qp(64)
	m := r.mustMap(a, 0, 1)
	r.mustUnmap(m, func(error) {})
	if _, err := b.Map(Request{Segs: r.pages(0, 1), Access: rw}); !errors.Is(err, ErrPoolExhausted) {
		t.Fatalf("not proven, and taken: %v", err)
	}
	give(a, fa.run(-1))
	m = r.mustMap(b, 0, 1)
	r.mustUnmap(m, nil)
	gone(a, fa)
	gone(b, fb)
	r.shut()
}

// TestPassed: a completion of the connection's own proves what was posted before it, and not what came after.
func TestPassed(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(64)
	r.mustUnmap(r.mustMap(q, 0, 1), nil)
	mark := q.Mark()
	f.post(7, verbs.SendSignaled)
	r.mustUnmap(r.mustMap(q, 1, 1), nil)
	wcs := f.run(-1)
	if len(wcs) != 1 || q.Completion(&wcs[0]) {
		t.Fatalf("only the connection's request completes, and is not ours: %+v", wcs)
	}
	q.Passed(mark)
	if s := r.ps.Stats(); s.Pinned != verbs.PageSize {
		t.Errorf("%d bytes pinned, one page is not proven", s.Pinned)
	}
	q.Passed(mark)
	q.Passed(q.Mark())
	if s := r.ps.Stats(); s.Pinned != 0 {
		t.Errorf("%d bytes pinned", s.Pinned)
	}
	gone(q, f)
	r.shut()
}

// TestDone: the owner is told after the invalidation has executed, once, whatever the way.
func TestDone(t *testing.T) {
	for _, c := range []struct {
		name string
		give func(*rig, *QP, *fakeQP, Mapping, func(error))
	}{
		{"unmap", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.mustUnmap(m, done)
			give(q, f.run(-1))
		}},
		{"used again before", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.mustUnmap(m, done)
			m = r.mustMap(q, 9, 1)
			give(q, f.run(-1))
			r.mustUnmap(m, nil)
		}},
		{"free and flush", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			if err := m.Free(done); err != nil {
				r.t.Fatal(err)
			}
			flushed := make(chan error)
			go func() { flushed <- r.ps.Flush(context.Background()) }()
			synctest.Wait()
			if f.outstanding() != 1 {
				r.t.Errorf("%d requests outstanding, want the invalidation", f.outstanding())
			}
			give(q, f.run(-1))
			if err := <-flushed; err != nil {
				r.t.Error(err)
			}
		}},
		{"queue breaks after unmap", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.mustUnmap(m, done)
			f.breaks()
			give(q, f.run(-1))
		}},
		{"queue breaks, used again before", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.mustUnmap(m, done)
			m = r.mustMap(q, 9, 1)
			f.breaks()
			give(q, f.run(-1))
			synctest.Wait()
			if m.Valid() {
				r.t.Error("the mapping whose request was flushed is valid")
			}
			r.mustUnmap(m, nil)
		}},
		{"queue breaks before unmap", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			f.breaks()
			f.post(1, 0)
			give(q, f.run(-1))
			q.Close()
			r.mustUnmap(m, done)
		}},
		{"queue destroyed with the invalidation in it", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.mustUnmap(m, done)
			f.destroy()
			q.Close()
		}},
		{"freed, queue lost", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			m.Free(done)
			f.destroy()
			q.Close()
		}},
		{"peer invalidates", func(r *rig, q *QP, f *fakeQP, m Mapping, done func(error)) {
			r.pd.mu.Lock()
			mr := r.pd.mrs[uint32(m.RKey())>>8]
			mr.valid, mr.segs = false, nil
			r.pd.mu.Unlock()
			if !r.ps.Invalidated(m.RKey()) || r.ps.Invalidated(m.RKey()+1) {
				r.t.Error("whose key?")
			}
			r.mustUnmap(m, done)
			if f.outstanding() != 0 {
				r.t.Error("an invalidation of what is invalid breaks the queue")
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				q, f := r.qp(16)
				m := r.mustMap(q, 0, 2)
				give(q, f.run(-1))
				if !r.pd.reaches(r.mem[:1]) {
					t.Fatal("not mapped")
				}
				told := 0
				c.give(r, q, f, m, func(err error) {
					if told++; err != nil {
						t.Error(err)
					}
					if r.pd.reaches(r.mem[:2*verbs.PageSize]) {
						t.Error("done, and the peer reaches it")
					}
				})
				synctest.Wait()
				if told != 1 {
					t.Errorf("told %d times", told)
				}
				gone(q, f)
				r.shut()
			})
		})
	}
}

// TestMisuse: a mapping is given back once, and a copy is the same mapping.
func TestMisuse(t *testing.T) {
	for _, again := range []string{"at once", "used again", "empty"} {
		t.Run(again, func(t *testing.T) {
			r := newRig(t)
			q, f := r.qp(16)
			m := r.mustMap(q, 0, 1)
			r.mustUnmap(m, nil)
			var m2 Mapping
			switch again {
			case "used again":
				m2 = r.mustMap(q, 1, 1)
			case "empty":
				m = Mapping{}
			}
			err := func() (err error) {
				defer func() {
					if p := recover(); p != nil {
						if s := fmt.Sprint(p); !invariants.Enabled || !strings.HasPrefix(s, "BUG: mrpool") || strings.Count(s, "TestMisuse") < 2 {
							t.Errorf("panic without both stacks: %v", p)
						}
						err = ErrNotMapped
					}
				}()
				return m.Unmap(func(error) { t.Error("done of a misuse") })
			}()
			if !errors.Is(err, ErrNotMapped) {
				t.Errorf("got %v", err)
			}
			want := uint64(1)
			if again == "empty" {
				want = 0
			}
			if got := r.ps.misuse.Swap(0); got != want {
				t.Errorf("counted %d", got)
			}
			if m2.it != nil {
				if !m2.Valid() {
					t.Error("somebody else's mapping suffered")
				}
				r.mustUnmap(m2, nil)
			}
			gone(q, f)
			r.shut()
		})
	}
}

// TestHandlersMayNotWait: what waits is refused where completion handlers run, inside an epoch, whether it would have to wait or
// not. What does not wait is not.
func TestHandlersMayNotWait(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(16)
	engine := r.epoch.Register("engine")
	engine.Enter()
	ctx, req := context.Background(), Request{Segs: r.pages(0, 1), Access: rw}
	m, err := q.Map(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unmap(nil); err != nil {
		t.Fatal(err)
	}
	if invariants.Enabled {
		for op, call := range map[string]func(){
			"Register": func() { r.ps.Register(ctx, r.mem, 0, rw) },
			"MapWait":  func() { q.MapWait(ctx, req) },
			"Flush":    func() { r.ps.Flush(ctx) },
			"Close":    func() { r.ps.Close() },
		} {
			func() {
				defer func() {
					if s := fmt.Sprint(recover()); !strings.HasPrefix(s, "BUG: epoch") || !strings.Contains(s, `"engine", which is inside`) {
						t.Errorf("%s: %s", op, s)
					}
				}()
				call()
			}()
		}
	}
	engine.Exit()
	engine.Unregister()
	gone(q, f)
	r.shut()
}

// TestOldGenerationIgnored: a completion of a request that is not outstanding changes nothing.
func TestOldGenerationIgnored(t *testing.T) {
	r := newRig(t)
	a, fa := r.qp(16)
	b, fb := r.qp(16)
	r.mustUnmap(r.mustMap(a, 0, 1), func(error) {})
	wcs := fa.run(-1)
	give(a, wcs)
	m := r.mustMap(b, 0, 1)
	late := verbs.WC{ID: wcs[0].ID, Status: verbs.WCFlushErr}
	for _, q := range []*QP{a, b} {
		if !q.Completion(&late) {
			t.Error("it is the pools' all the same")
		}
	}
	give(b, fb.run(-1))
	if !m.Valid() || r.ps.strayWCs.Swap(0) != 2 {
		t.Error("a flush of an old generation hit")
	}
	r.mustUnmap(m, nil)
	gone(a, fa)
	gone(b, fb)
	r.shut()
}

// TestQueueFull: with all requests outstanding Map says so, Unmap leaves its invalidation, and completions make
// room for both.
func TestQueueFull(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(4)
	var ms []Mapping
	for i := range 4 {
		ms = append(ms, r.mustMap(q, i, 1))
	}
	if _, err := q.Map(Request{Segs: r.pages(8, 1), Access: rw}); !errors.Is(err, ErrQueueFull) || !errors.Is(err, verbs.ErrSQFull) {
		t.Fatalf("fifth request: %v", err)
	}
	told := 0
	for _, m := range ms {
		r.mustUnmap(m, func(error) { told++ })
	}
	if f.outstanding() != 4 {
		t.Fatalf("%d requests posted", f.outstanding())
	}
	for i := 0; f.outstanding() > 0; i++ {
		give(q, f.run(1))
	}
	if told != 4 {
		t.Errorf("%d of 4 told", told)
	}
	gone(q, f)
	r.shut()
}

// TestBounds: each bound has its error, counts, and gives way when something is given back.
func TestBounds(t *testing.T) {
	for _, c := range []struct {
		bound string
		mod   func(*Config)
	}{
		{"regions", func(c *Config) { c.Small.MaxItems = 2 }},
		{"pinned bytes", func(c *Config) { c.Small.MaxPinned = 2*verbs.PageSize + 5 }},
		{"pinned bytes of the device", func(c *Config) { c.MaxPinned = 2*verbs.PageSize + 5 }},
	} {
		t.Run(c.bound, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, c.mod)
				q, f := r.qp(16)
				a, b := r.mustMap(q, 0, 1), r.mustMap(q, 1, 1)
				_, err := q.Map(Request{Segs: r.pages(2, 1), Access: rw})
				var x *ExhaustedError
				if !errors.As(err, &x) || x.Bound != c.bound || !errors.Is(err, ErrPoolExhausted) {
					t.Fatalf("got %v", err)
				}
				if r.ps.Stats().Small.Depleted != 1 {
					t.Error("not counted")
				}
				give(q, f.run(-1))
				if f.err {
					t.Fatal("the queue suffered")
				}
				// Nobody gives anything back: it takes as long as it may.
				start := time.Now()
				if _, err = q.MapWait(context.Background(), Request{Segs: r.pages(2, 1), Access: rw}); !errors.Is(err, ErrPoolExhausted) {
					t.Fatalf("got %v", err)
				}
				if d := time.Since(start); d != DefaultMaxWait {
					t.Errorf("waited %v", d)
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
				defer cancel()
				if _, err = q.MapWait(ctx, Request{Segs: r.pages(2, 1), Access: rw}); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatalf("got %v", err)
				}
				// A region freed lazily is flushed for who waits.
				a.Free(nil)
				got := make(chan Mapping)
				go func() {
					m, err := q.MapWait(context.Background(), Request{Segs: r.pages(2, 1), Access: rw})
					if err != nil {
						t.Error(err)
					}
					got <- m
				}()
				synctest.Wait()
				give(q, f.run(-1))
				m := <-got
				r.mustUnmap(m, nil)
				r.mustUnmap(b, nil)
				gone(q, f)
				r.shut()
				if s := r.ps.Stats().Small; s.Wait != 3 || s.Flush == 0 {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TestIdleQueueGivesUp: regions whose invalidations nothing proves, on a queue that has fallen idle, are had when
// somebody waits for them.
func TestIdleQueueGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Small.MaxItems = 3 })
		a, fa := r.qp(64)
		b, fb := r.qp(64)
		var ms []Mapping
		for i := range 3 {
			ms = append(ms, r.mustMap(a, i, 1))
		}
		for _, m := range ms {
			r.mustUnmap(m, nil)
		}
		if wcs := fa.run(-1); len(wcs) != 0 {
			t.Fatalf("nothing is signaled: %+v", wcs)
		}
		stop := make(chan struct{})
		go func() { // the idle queue's device goes on
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					give(a, fa.run(-1))
				}
			}
		}()
		for i := range 3 {
			m, err := b.MapWait(context.Background(), Request{Segs: r.pages(i, 1), Access: rw})
			if err != nil {
				t.Fatal(err)
			}
			ms[i] = m
		}
		close(stop)
		for _, m := range ms {
			r.mustUnmap(m, nil)
		}
		gone(a, fa)
		gone(b, fb)
		r.shut()
	})
}

// TestFlushGoesOnWhileListsSwap: a kernel pool stopped making progress when its lists were swapped under a concurrent
// allocation. Requests that wait for a pool with one region, while it is freed, flushed and allocated from all sides, all
// get it.
func TestFlushGoesOnWhileListsSwap(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Small.MaxItems, c.Small.FlushItems = 2, 1
		c.MaxWait = time.Minute
	})
	const callers, rounds = 4, 150
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var engine sync.WaitGroup
	for range callers {
		q, f := r.qp(8)
		engine.Go(func() {
			for {
				select {
				case <-stop:
					gone(q, f)
					return
				default:
					give(q, f.run(-1))
					time.Sleep(20 * time.Microsecond)
				}
			}
		})
		wg.Go(func() {
			for i := range rounds {
				m, err := q.MapWait(context.Background(), Request{Segs: r.pages(0, 1), Access: rw})
				if err != nil {
					t.Errorf("round %d: %v", i, err)
					return
				}
				if i%2 == 0 {
					m.Free(nil)
				} else {
					m.Unmap(nil)
				}
			}
		})
	}
	wg.Go(func() {
		for range rounds {
			r.ps.Flush(context.Background())
		}
	})
	within(t, "mapping", wg.Wait)
	close(stop)
	within(t, "the queues", engine.Wait)
	r.shut()
}

// TestFlushMeetsFullFreeList: a kernel pool leaked items when a flush met a clean list that was full. What is over the
// bound is given back to the device, its place in the pool is free, and the count is right.
func TestFlushMeetsFullFreeList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Small.MaxItems, c.Small.FlushItems, c.Small.MaxFree = 8, 100, 2 })
		q, f := r.qp(64)
		for round := range 3 {
			var ms []Mapping
			for i := range 8 {
				ms = append(ms, r.mustMap(q, i, 1))
			}
			for _, m := range ms {
				m.Free(nil)
			}
			flushed := make(chan error)
			go func() { flushed <- r.ps.Flush(context.Background()) }()
			synctest.Wait()
			give(q, f.run(-1))
			if err := <-flushed; err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			s := r.ps.Stats().Small
			if s.Ready != 2 || s.Items != 8 || s.Alloc-s.Free != 2 || s.Dirty != 0 || s.Pinned != 0 || len(r.pd.mrs) != 2 {
				t.Fatalf("round %d: %+v, %d regions on the device", round, s, len(r.pd.mrs))
			}
		}
		gone(q, f)
		r.shut()
	})
}

// TestFlushDoesNotWaitForSlowQueue: what sits behind a slow peer's requests delays nobody else's region, and is given back
// when it is proven after all.
func TestFlushDoesNotWaitForSlowQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		slow, fslow := r.qp(16)
		q, f := r.qp(16)
		told := map[string]time.Duration{}
		start := time.Now()
		tell := func(who string) func(error) { return func(error) { told[who] = time.Since(start) } }
		a, b := r.mustMap(slow, 0, 1), r.mustMap(q, 1, 1)
		a.Free(tell("slow"))
		b.Free(tell("fast"))
		flushed := make(chan error)
		go func() { flushed <- r.ps.Flush(context.Background()) }()
		synctest.Wait()
		give(q, f.run(-1))
		if err := <-flushed; err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		give(slow, fslow.run(-1))
		if told["fast"] != flushBound || told["slow"] != flushBound+time.Second {
			t.Errorf("told %v", told)
		}
		gone(slow, fslow)
		gone(q, f)
		r.shut()
	})
}

// TestStaleNeverHandedOut: acquire meets a region that is not what the list says.
func TestStaleNeverHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		r.mustUnmap(r.mustMap(q, 0, 1), func(error) {})
		give(q, f.run(-1))
		it := r.ps.small.item(0)
		mr := it.mr
		gen, _ := it.load()
		it.set(gen, stStale)
		m := r.mustMap(q, 0, 1)
		if m.it == it {
			t.Fatal("handed out")
		}
		synctest.Wait()
		if it.state() != stFree || it.mr == mr || r.ps.Stats().Small.Recovered != 1 {
			t.Errorf("recovery left it %v", it.state())
		}
		r.mustUnmap(m, nil)
		gone(q, f)
		r.shut()
	})
}

// TestRecoveryBacksOff: a region the device does not take back is tried again, less and less often, and its owner is told
// when it has.
func TestRecoveryBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		m := r.mustMap(q, 0, 1)
		r.pd.denyNext(5)
		gone(q, f)
		start := time.Now()
		var told time.Duration
		r.mustUnmap(m, func(err error) { told = time.Since(start) })
		time.Sleep(time.Minute)
		synctest.Wait()
		if want := (10 + 20 + 40 + 80 + 160) * time.Millisecond; told != want {
			t.Errorf("told after %v, want %v", told, want)
		}
		if s := r.ps.Stats().Small; s.RecoveryErrors != 5 || s.Recovered != 1 || s.Ready != 1 {
			t.Errorf("%+v", s)
		}
		r.shut()
	})
}

// TestRefusedInvalidation: what the queue refuses is tried again, less and less often, until it takes it or is lost.
func TestRefusedInvalidation(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("lost=%v", lost), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				q, f := r.qp(16)
				m := r.mustMap(q, 0, 1)
				f.refuse(true)
				told := 0
				r.mustUnmap(m, func(error) { told++ })
				time.Sleep(11 * time.Second) // 10 ms, 20, 40, ... 1.28 s, then every 2 s
				synctest.Wait()
				if n := f.refused; n < 10 || n > 15 {
					t.Errorf("tried %d times", n)
				}
				f.refuse(false)
				if lost {
					gone(q, f)
				}
				time.Sleep(2 * time.Second)
				give(q, f.run(-1))
				synctest.Wait()
				if told != 1 {
					t.Errorf("told %d times", told)
				}
				gone(q, f)
				r.shut()
			})
		})
	}
}

// TestCloseWithRefusedInvalidation: a queue that takes nothing, and whose owner has forgotten it, does not keep Close, which names
// it and gives the memory back.
func TestCloseWithRefusedInvalidation(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(16)
	m := r.mustMap(q, 0, 1)
	f.refuse(true)
	told := 0
	r.mustUnmap(m, func(err error) {
		if told++; err != nil {
			t.Error(err)
		}
	})
	var err error
	within(t, "Close", func() { err = r.ps.Close() })
	if err == nil || !strings.Contains(err.Error(), "is open") || told != 1 || r.pd.reaches(r.mem) {
		t.Errorf("close: %v; told %d times", err, told)
	}
	f.destroy()
	r.dev.Put()
	if err := <-r.down; err != nil {
		t.Error(err)
	}
	r.clean()
}

// TestCloseCancelsRecovery: teardown does not wait for a worker that backs off, and tells owners of memory that the device
// keeps.
func TestCloseCancelsRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		m := r.mustMap(q, 0, 1)
		r.pd.denyNext(20)
		gone(q, f)
		var told []error
		r.mustUnmap(m, func(err error) { told = append(told, err) })
		time.Sleep(time.Second)
		start := time.Now()
		r.dev.Put() // not the last: recovery is at work
		select {
		case err := <-r.down:
			t.Fatalf("torn down while a worker holds the device: %v", err)
		case <-time.After(time.Millisecond):
		}
		err := r.ps.Close() // as removal of a device that cannot wait would
		if !errors.Is(err, verbs.ErrBusy) || time.Since(start) > 2*time.Millisecond {
			t.Errorf("close: %v after %v", err, time.Since(start))
		}
		if len(told) != 1 || told[0] == nil {
			t.Errorf("told %v", told)
		}
		if err := <-r.down; !errors.Is(err, verbs.ErrBusy) { // the worker's reference was the last
			t.Errorf("teardown: %v", err)
		}
		r.pd.denyNext(0)
		r.clean()
	})
}

// TestLeave: a device that takes nothing back is not kept by those who try to give it something.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		m, m2 := r.mustMap(q, 0, 1), r.mustMap(q, 1, 1)
		var told []error
		note := func(err error) { told = append(told, err) }
		r.pd.denyNext(1 << 20)
		gone(q, f)
		r.mustUnmap(m, note)
		time.Sleep(time.Minute)
		if n := r.dev.Refs(); n != 3 { // the test's, the worker's, that of the second mapping
			t.Errorf("%d references", n)
		}
		r.ps.Leave()
		r.ps.Leave()
		synctest.Wait()
		if n := r.dev.Refs(); n != 2 || len(told) != 0 {
			t.Errorf("%d references; told %v", n, told)
		}
		r.mustUnmap(m2, note) // one attempt, and no more
		synctest.Wait()
		if n := r.dev.Refs(); n != 1 || len(told) != 0 {
			t.Errorf("%d references; told %v", n, told)
		}
		r.pd.denyNext(0)
		r.dev.Put()
		if err := <-r.down; err != nil || len(told) != 2 || told[0] != nil || told[1] != nil {
			t.Errorf("torn down: %v; told %v", err, told)
		}
		r.clean()
	})
}

// TestLastReferenceFromFlush: the flush worker's run drops the last reference, whose teardown cancels that worker.
func TestLastReferenceFromFlush(t *testing.T) {
	for _, inside := range []bool{false, true} {
		t.Run(fmt.Sprintf("teardown inside=%v", inside), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				if inside {
					// Worse than ibdev does: on the worker's own goroutine.
					r.dev.Put()
					<-r.down
					r.ps, _ = New(r.ps.cfg)
					r.dev.Init(func() { r.down <- r.ps.Close() })
				}
				m, err := r.ps.Register(context.Background(), r.mem[:8192], 0, rw)
				if err != nil {
					t.Fatal(err)
				}
				told := false
				r.mustUnmap(m, func(error) { // for a plain registration that starts a flush
					told = true
					r.dev.Put() // the application's, from within the run: the run's own is the last now
				})
				if err := <-r.down; err != nil || !told {
					t.Errorf("torn down: %v, told %v", err, told)
				}
				if r.dev.Refs() != 0 {
					t.Errorf("%d references", r.dev.Refs())
				}
				synctest.Wait()
				r.clean()
			})
		})
	}
}

// TestReaderStays: while a reader of the epoch stays inside no memory is given back, neither by a flush nor by Close, which
// calls that flush off. Everybody else can go on.
func TestReaderStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		told := 0
		tell := func(err error) {
			if told++; err != nil {
				t.Error(err)
			}
		}
		m := r.mustMap(q, 0, 1)
		plain, err := r.ps.Register(context.Background(), r.pages(1, 1)[0], 0, rw)
		if err != nil {
			t.Fatal(err)
		}
		reader := r.epoch.Register("reader")
		leave, left := make(chan struct{}), make(chan struct{})
		go func() {
			reader.Enter()
			<-leave
			reader.Exit()
			close(left)
		}()
		synctest.Wait()
		m.Free(tell)
		plain.Free(tell)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		flushed := make(chan error)
		go func() { flushed <- r.ps.Flush(ctx) }()
		synctest.Wait()
		give(q, f.run(-1))
		if err := <-flushed; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("flush: %v", err)
		}
		others := 0
		r.mustUnmap(r.mustMap(q, 2, 1), func(error) { others++ })
		give(q, f.run(-1))
		if others != 1 {
			t.Error("memory invalidated on its own queue waits for the reader")
		}
		gone(q, f)

		go func() { r.down <- r.ps.Close() }()
		synctest.Wait()
		if r.ps.small.flush.running {
			t.Error("Close has not called off the flush")
		}
		time.Sleep(time.Hour)
		if told != 0 || len(r.pd.mrs) != 3 || r.ps.Stats().Pinned != 2*verbs.PageSize || len(r.down) != 0 {
			t.Errorf("%d told, %d regions on the device, %d bytes pinned", told, len(r.pd.mrs), r.ps.Stats().Pinned)
		}
		close(leave)
		<-left
		reader.Unregister()
		if err := <-r.down; err != nil || told != 2 {
			t.Errorf("close: %v; %d told", err, told)
		}
		r.clean()
	})
}

// TestStartFlush: a flush that nobody waits for gives back what was freed, and none runs when nothing was.
func TestStartFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		told := 0
		m := r.mustMap(q, 0, 1)
		r.ps.StartFlush()
		synctest.Wait()
		if n := r.ps.Stats().Small.Flush; n != 0 {
			t.Errorf("%d flushes of nothing", n)
		}
		m.Free(func(error) { told++ })
		r.ps.StartFlush()
		synctest.Wait()
		give(q, f.run(-1))
		synctest.Wait()
		if s := r.ps.Stats(); told != 1 || s.Pinned != 0 || s.Small.Flush != 1 || s.Large.Flush != 0 {
			t.Errorf("%d told; %+v", told, s)
		}
		gone(q, f)
		r.shut()
	})
}

// TestCloseAudits: what was not given back is named, and gone all the same.
func TestCloseAudits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		q, f := r.qp(16)
		m := r.mustMap(q, 0, 1)
		w, err := r.ps.Register(context.Background(), r.mem[:4096], 0, rw)
		if err != nil {
			t.Fatal(err)
		}
		give(q, f.run(-1))
		err = r.ps.Close()
		if err == nil || r.pd.reaches(r.mem) {
			t.Fatalf("close: %v", err)
		}
		if es := err.(interface{ Unwrap() []error }).Unwrap(); len(es) != 3 {
			t.Errorf("close names %d things: %v", len(es), err)
		}
		if _, err := q.Map(Request{Segs: r.pages(0, 1)}); !errors.Is(err, ErrQPLost) && !errors.Is(err, ErrClosed) {
			t.Errorf("map after close: %v", err)
		}
		if _, err := r.ps.Register(context.Background(), r.mem[:1], 0, rw); !errors.Is(err, ErrClosed) {
			t.Errorf("register after close: %v", err)
		}
		told := 0
		for _, m := range []Mapping{m, w} {
			if m.Valid() {
				t.Error("valid")
			}
			if err := m.Unmap(func(err error) {
				if told++; err != nil {
					t.Error(err)
				}
			}); err != nil {
				t.Error(err)
			}
		}
		if told != 2 {
			t.Errorf("%d told", told)
		}
		q.Close()
		r.shut()
	})
}

// TestWays: the way of a request follows from the device and from what it offers.
func TestWays(t *testing.T) {
	for _, c := range []struct {
		name string
		caps verbs.DeviceCaps
		over bool
		want kind
	}{
		{"fast registration", fakeCaps, false, byFastReg},
		{"window", fakeCaps, true, byWindow},
		{"window only", verbs.CapMW2A, true, byWindow},
		{"nothing offered", verbs.CapMW2A, false, byRegistration},
		{"nothing", 0, true, byRegistration},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(cfg *Config) { cfg.Attr.Caps = c.caps })
				q, f := r.qp(16)
				over, err := r.ps.Register(context.Background(), r.mem, 0, rw|verbs.AccessMWBind)
				if err != nil {
					t.Fatal(err)
				}
				for i := range 3 {
					req := Request{Segs: r.pages(1, 1), IOVA: uint64(i) * verbs.PageSize, Access: rw}
					if c.over {
						req.Over = over
					}
					m, err := q.Map(req)
					if err != nil {
						t.Fatal(err)
					}
					want := c.want
					if i == 2 && want == byWindow { // an address a window cannot have
						if want = byFastReg; c.caps&verbs.CapMemMgtExtensions == 0 {
							want = byRegistration
						}
					}
					if m.it.kind != want {
						t.Errorf("mapped by way %d, want %d", m.it.kind, want)
					}
					told := false
					r.mustUnmap(m, func(err error) { told = err == nil })
					synctest.Wait()
					give(q, f.run(-1))
					synctest.Wait()
					if !told {
						t.Error("not told")
					}
				}
				r.mustUnmap(over, nil)
				synctest.Wait()
				gone(q, f)
				r.shut()
			})
		})
	}
}

// TestWindowHoldsRegion: memory under a window stays registered until the last window is gone; nobody binds over it
// meanwhile.
func TestWindowHoldsRegion(t *testing.T) {
	for _, how := range []string{"invalidated", "queue lost"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				q, f := r.qp(16)
				over, err := r.ps.Register(context.Background(), r.mem, 4096, rw|verbs.AccessMWBind)
				if err != nil {
					t.Fatal(err)
				}
				req := Request{Segs: [][]byte{r.mem[100:300]}, IOVA: 4196, Access: rw, Over: over}
				m, err := q.Map(req)
				if err != nil {
					t.Fatal(err)
				}
				give(q, f.run(-1))
				freed := false
				r.mustUnmap(over, func(error) { freed = true })
				if _, err := q.Map(req); !errors.Is(err, ErrNotMapped) {
					t.Errorf("bound over what was given back: %v", err)
				}
				synctest.Wait()
				if freed || !r.pd.reaches(r.mem[:1]) {
					t.Fatal("deregistered under a window")
				}
				if how == "queue lost" {
					gone(q, f)
				}
				r.mustUnmap(m, nil)
				give(q, f.run(-1))
				synctest.Wait()
				if !freed || r.pd.reaches(r.mem) {
					t.Error("the last window is gone, the region is not")
				}
				if how != "queue lost" {
					gone(q, f)
				}
				r.shut()
			})
		})
	}
}

// TestBadRequests: each has its error and leaves nothing.
func TestBadRequests(t *testing.T) {
	r := newRig(t)
	q, f := r.qp(16)
	for _, c := range []struct {
		name string
		req  Request
		want error
	}{
		{"nothing", Request{}, verbs.ErrInvalid},
		{"empty", Request{Segs: [][]byte{{}}}, verbs.ErrInvalid},
		{"empty piece", Request{Segs: [][]byte{r.mem[:4096], {}}}, verbs.ErrInvalid},
		{"begins inside", Request{Segs: [][]byte{r.mem[:4096], r.mem[8193:9000]}}, verbs.ErrInvalid},
		{"ends inside", Request{Segs: [][]byte{r.mem[:4095], r.mem[8192:9000]}}, verbs.ErrInvalid},
		{"wraps", Request{Segs: r.pages(0, 2), IOVA: ^uint64(0) - 4096}, verbs.ErrInvalid},
		{"too large", Request{Segs: r.pages(0, 258)}, ErrTooLarge},
	} {
		if _, err := q.Map(c.req); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if f.outstanding() != 0 || r.ps.Stats().Pinned != 0 {
		t.Error("something was left")
	}
	// A page more than fits, by where it begins.
	m, err := q.Map(Request{Segs: [][]byte{r.mem[1:][:256*verbs.PageSize]}, Access: rw})
	if err != nil {
		t.Fatal(err)
	}
	if s := r.ps.Stats().Large; s.Pinned != 257*verbs.PageSize {
		t.Errorf("%d bytes pinned", s.Pinned)
	}
	r.mustUnmap(m, nil)
	gone(q, f)
	r.shut()
}

// TestStatsNames: the kernel's names, in its order.
func TestStatsNames(t *testing.T) {
	var s Stats
	s.Small.Alloc, s.Large.Reused = 3, 9
	var names []string
	s.Each(func(name string, v uint64) { names = append(names, fmt.Sprintf("%s=%d", name, v)) })
	want := "[ib_rdma_mr_8k_alloc=3 ib_rdma_mr_8k_free=0 ib_rdma_mr_8k_used=0 ib_rdma_mr_8k_pool_flush=0 ib_rdma_mr_8k_pool_wait=0 ib_rdma_mr_8k_pool_depleted=0 " +
		"ib_rdma_mr_1m_alloc=0 ib_rdma_mr_1m_free=0 ib_rdma_mr_1m_used=0 ib_rdma_mr_1m_pool_flush=0 ib_rdma_mr_1m_pool_wait=0 ib_rdma_mr_1m_pool_depleted=0 " +
		"ib_rdma_mr_8k_reused=0 ib_rdma_mr_1m_reused=9]"
	if fmt.Sprint(names) != want {
		t.Errorf("got  %v\nwant %s", names, want)
	}
}
