package epoch

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func mustClose(t *testing.T, d *Domain) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestGracePeriod: a callback waits for every reader that was inside when it was retired, for none that
// came later, and callbacks run in order.
func TestGracePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDomain()
		a, b := d.Register("a"), d.Register("b")
		var ran []int
		retire := func(i int) {
			d.Retire(func() { ran = append(ran, i) })
			synctest.Wait() // the worker has seen who is inside
		}
		want := func(what string, w ...int) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(ran, w) {
				t.Fatalf("%s: ran %v, want %v", what, ran, w)
			}
		}
		retire(1)
		want("nobody inside", 1)
		a.Enter()
		retire(2)
		want("a inside", 1)
		b.Enter() // later than the retirement
		a.Exit()
		want("a has left; b came later", 1, 2)
		retire(3)
		a.Enter()
		want("b was inside", 1, 2)
		b.Exit()
		want("b has left; a came later", 1, 2, 3)
		retire(4)
		want("a inside", 1, 2, 3)
		a.Checkpoint()
		want("a passed a checkpoint", 1, 2, 3, 4)
		a.Exit()
		a.Unregister()
		b.Unregister()
		mustClose(t, d)
	})
}

func TestSynchronize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDomain()
		p := d.Register("p")
		p.Enter()
		done := false
		go func() { d.Synchronize(); done = true }()
		synctest.Wait()
		if done {
			t.Fatal("returned with a reader inside")
		}
		p.Exit()
		synctest.Wait()
		if !done {
			t.Fatal("did not return")
		}
		p.Synchronize()
		p.Unregister()
		mustClose(t, d)
	})
}

// TestStaysInside: nobody has to wait for a reader that stays, and whoever has given up frees nothing and leaves no mark.
func TestStaysInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDomain()
		p := d.Register("p")
		leave := make(chan struct{})
		left := make(chan struct{})
		go func() {
			p.Enter()
			<-leave
			p.Exit()
			close(left)
		}()
		synctest.Wait()
		ran := false
		stop, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if d.SynchronizeUntil(stop.Done()) {
			t.Error("a grace period with a reader inside")
		}
		if len(d.waiters) != 0 || p.watched.Load() != 0 {
			t.Errorf("left behind: %d waiters, %d marks", len(d.waiters), p.watched.Load())
		}
		d.Retire(func() { ran = true })
		stop, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := d.CloseUntil(stop.Done()); err == nil || err.Error() != "epoch: close: 1 callbacks wait; still registered: p" || ran {
			t.Errorf("Close with a reader inside: %v; freed: %v", err, ran)
		}
		close(leave)
		<-left
		if !d.SynchronizeUntil(nil) {
			t.Error("no grace period with nobody inside")
		}
		p.Unregister()
		mustClose(t, d)
		if !ran {
			t.Error("never freed")
		}
	})
}

func TestMisuse(t *testing.T) {
	d := NewDomain()
	p := d.Register("worker")
	panics := func(what string, f func()) {
		t.Helper()
		defer func() {
			if r, ok := recover().(string); !ok || !strings.HasPrefix(r, "BUG: epoch") {
				t.Errorf("%s: panic %q", what, r)
			}
		}()
		f()
	}
	panics("Exit outside", p.Exit)
	p.Enter()
	panics("Enter inside", p.Enter)
	panics("Synchronize inside", p.Synchronize)
	panics("Unregister inside", p.Unregister)
	if invariants.Enabled {
		panics("Domain.Synchronize inside", d.Synchronize)
	}
	p.Exit()
	if err := d.Close(); err == nil || !strings.Contains(err.Error(), "worker") {
		t.Errorf("close with a participant: %v", err)
	}
	p.Unregister()
	panics("Unregister twice", p.Unregister)
	panics("Retire after Close", func() { d.Retire(func() {}) })
	panics("Register after Close", func() { d.Register("late") })
}

// TestThrottle: retiring never blocks, allocating at the bound does, until there is room or the context
// ends.
func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := Config{MaxPending: 10}.NewDomain()
		p := d.Register("p")
		leave := make(chan struct{})
		go func() { p.Enter(); <-leave; p.Exit() }()
		synctest.Wait()
		for range 25 {
			d.Retire(func() {})
		}
		if n := d.Pending(); n != 25 {
			t.Fatalf("%d pending", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := d.Throttle(ctx); err != context.DeadlineExceeded {
			t.Fatalf("throttle: %v", err)
		}
		ok := false
		go func() { ok = d.Throttle(t.Context()) == nil }()
		synctest.Wait()
		if ok {
			t.Fatal("not throttled")
		}
		close(leave)
		synctest.Wait()
		if !ok || d.Pending() != 0 {
			t.Fatalf("throttled still, %d pending", d.Pending())
		}
		p.Unregister()
		mustClose(t, d)
	})
}

func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var who []string
		d := Config{StallAfter: time.Second, OnStall: func(s Stall) {
			mu.Lock()
			defer mu.Unlock()
			who = append(who, fmt.Sprint(s.Participant, " ", s.Inside >= time.Second))
		}}.NewDomain()
		p := d.Register("sleeper")
		p.Enter()
		d.Retire(func() {})
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		mu.Lock()
		if len(who) == 0 || who[0] != "sleeper true" {
			t.Errorf("reported %q", who)
		}
		mu.Unlock()
		p.Exit()
		p.Unregister()
		mustClose(t, d)
	})
}

// TestRetireInCallback: a callback may retire more; Close runs that too.
func TestRetireInCallback(t *testing.T) {
	d := NewDomain()
	n := 0
	var again func()
	again = func() {
		if n++; n < 5 {
			d.Retire(again)
		}
	}
	d.Retire(again)
	mustClose(t, d)
	if n != 5 {
		t.Fatalf("ran %d times", n)
	}
}

// TestStress has readers that follow a shared pointer to objects, and writers that replace and retire
// them. A retired object is marked freed; no reader may ever see one that is.
func TestStress(t *testing.T) {
	type object struct{ freed atomic.Bool }
	d := NewDomain()
	var cur atomic.Pointer[object]
	cur.Store(new(object))
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for i := range 4 {
		p := d.Register(fmt.Sprint("reader ", i))
		readers.Go(func() {
			defer p.Unregister()
			r := rand.New(rand.NewPCG(7, uint64(i)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				p.Enter()
				for range 1 + r.IntN(4) {
					o := cur.Load()
					for range r.IntN(50) {
						if o.freed.Load() {
							t.Error("a reader holds a freed object")
						}
					}
					if r.IntN(8) == 0 {
						o = nil
						p.Checkpoint()
					}
				}
				p.Exit()
			}
		})
	}
	var freed atomic.Int64
	const each = 1000
	for range 2 {
		writers.Go(func() {
			for i := range each {
				old := cur.Swap(new(object))
				if i%16 == 0 {
					d.Synchronize()
					old.freed.Store(true)
					freed.Add(1)
				} else {
					d.Retire(func() { old.freed.Store(true); freed.Add(1) })
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	mustClose(t, d)
	if n := freed.Load(); n != 2*each {
		t.Fatalf("%d of %d freed", n, 2*each)
	}
}
