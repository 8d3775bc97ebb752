package epoch

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/internal/invariants"
	"pgregory.net/rapid"
)

// TestModel compares a Domain with a naive twin, which keeps for each retirement the set of readers
// that have to leave.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// In real time: that nothing is freed too early is checked after each step, that everything is
		// freed at the end.
		d := NewDomain()
		type retirement struct {
			waitsFor map[*Participant]bool
			freed    atomic.Bool
		}
		var readers []*Participant
		var retired []*retirement
		pick := func(inside bool) *Participant {
			var from []*Participant
			for _, p := range readers {
				if p.Inside() == inside {
					from = append(from, p)
				}
			}
			if len(from) == 0 {
				rt.Skip("nobody")
			}
			return from[rapid.IntRange(0, len(from)-1).Draw(rt, "reader")]
		}
		left := func(p *Participant) {
			for _, r := range retired {
				delete(r.waitsFor, p)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"register": func(*rapid.T) {
				readers = append(readers, d.Register(fmt.Sprint("reader ", len(readers))))
			},
			"enter": func(*rapid.T) { pick(false).Enter() },
			"exit": func(*rapid.T) {
				p := pick(true)
				left(p)
				p.Exit()
			},
			"checkpoint": func(*rapid.T) {
				// The model knows only that it may end a wait: whether it does depends on whether the
				// worker has begun to wait.
				p := pick(true)
				left(p)
				p.Checkpoint()
				p.Exit()
				p.Enter()
			},
			"unregister": func(*rapid.T) {
				p := pick(false)
				p.Unregister()
				readers = slices.DeleteFunc(readers, func(q *Participant) bool { return p == q })
			},
			"retire": func(*rapid.T) {
				r := &retirement{waitsFor: make(map[*Participant]bool)}
				for _, p := range readers {
					if p.Inside() {
						r.waitsFor[p] = true
					}
				}
				retired = append(retired, r)
				d.Retire(func() { r.freed.Store(true) })
			},
			"": func(rt *rapid.T) {
				runtime.Gosched()
				for i, r := range retired {
					if len(r.waitsFor) > 0 && r.freed.Load() {
						rt.Fatalf("retirement %d was freed with %d readers inside", i, len(r.waitsFor))
					}
				}
			},
		})
		for _, p := range readers {
			if p.Inside() {
				p.Exit()
			}
			p.Unregister()
		}
		if err := d.Close(); err != nil {
			rt.Fatal(err)
		}
		for i, r := range retired {
			if !r.freed.Load() {
				rt.Fatalf("retirement %d was never freed", i)
			}
		}
	})
}

// TestStressPlain has readers look at a published object while writers replace it; a callback marks the
// object freed, with plain stores, so that the race detector checks the ordering as well.
func TestStressPlain(t *testing.T) {
	type object struct {
		freed bool // plain on purpose
		value int
	}
	for _, procs := range []int{1, 2, 8} {
		t.Run(fmt.Sprintf("procs=%d", procs), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			d := Config{MaxPending: 64}.NewDomain()
			var current atomic.Pointer[object]
			current.Store(&object{})
			var stop atomic.Bool
			var reads, frees atomic.Int64
			var readers, writers sync.WaitGroup
			for r := range 3 {
				p := d.Register(fmt.Sprint("reader ", r))
				readers.Go(func() {
					defer p.Unregister()
					p.Enter()
					for n := 0; !stop.Load() || n < 100; n++ {
						if o := current.Load(); o.freed || o.value < 0 {
							t.Error("a reader inside met a freed object")
						}
						reads.Add(1)
						if n%4 == r {
							p.Checkpoint()
							continue
						}
						p.Exit()
						if n%64 == 0 {
							runtime.Gosched()
						}
						p.Enter()
					}
					p.Exit()
				})
			}
			const replaced = 1500
			for w := range 2 {
				writers.Go(func() {
					for i := range replaced {
						old := current.Swap(&object{value: i})
						free := func() {
							if old.freed {
								t.Error("freed twice")
							}
							old.freed, old.value = true, -1
							frees.Add(1)
						}
						if i%50 == w {
							d.Synchronize()
							free()
							continue
						}
						d.Retire(free)
						if err := d.Throttle(context.Background()); err != nil {
							t.Error(err)
						}
						if n := d.Pending(); n > 64+2 {
							t.Errorf("%d pending behind Throttle", n)
						}
					}
				})
			}
			writers.Wait()
			stop.Store(true)
			readers.Wait()
			mustClose(t, d)
			if frees.Load() != 2*replaced {
				t.Errorf("%d of %d objects were freed", frees.Load(), 2*replaced)
			}
			t.Logf("%d reads", reads.Load())
		})
	}
}

// TestSynchronizeTogether: several wait at once, each for its own grace period, and leave no mark behind
// that would keep Exits slow.
func TestSynchronizeTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDomain()
		d.Synchronize() // nobody there
		p := d.Register("p")
		p.Synchronize() // nobody inside
		p.Enter()
		var done [3]bool // several at once, each with its own grace period
		for i := range done {
			go func() {
				d.Synchronize()
				done[i] = true
			}()
		}
		synctest.Wait()
		if done != [3]bool{} {
			t.Errorf("Synchronize returned with a reader inside: %v", done)
		}
		p.Exit()
		synctest.Wait()
		if done != [3]bool{true, true, true} {
			t.Errorf("Synchronize did not return when the reader had left: %v", done)
		}
		if len(d.waiters) != 0 || p.watched.Load() != 0 {
			t.Errorf("left behind: %d waiters, %d marks", len(d.waiters), p.watched.Load())
		}
		p.Unregister()
		mustClose(t, d)
	})
}

// TestCloseRunsAll: Close waits for readers, then runs what was retired and what that retires.
func TestCloseRunsAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDomain()
		p, q := d.Register("p"), d.Register("q")
		p.Enter()
		var ran []int
		d.Retire(func() {
			ran = append(ran, 1)
			d.Retire(func() { ran = append(ran, 2) })
		})
		done := make(chan error)
		go func() { done <- d.Close() }()
		synctest.Wait()
		if len(ran) != 0 {
			t.Error("Close ran a callback with a reader inside")
		}
		p.Exit()
		if err := <-done; err == nil || err.Error() != "epoch: close: still registered: p, q" {
			t.Errorf("Close with participants: %v", err)
		}
		if !slices.Equal(ran, []int{1, 2}) {
			t.Errorf("Close ran %v", ran)
		}
		p.Unregister()
		q.Unregister()
		mustClose(t, d)
		mustClose(t, d)
	})
}

func TestEnterExitAllocatesNothing(t *testing.T) {
	if invariants.Enabled {
		t.Skip("goroutines are identified under -tags invariants")
	}
	d := NewDomain()
	p := d.Register("p")
	if n := testing.AllocsPerRun(1000, func() {
		p.Enter()
		p.Checkpoint()
		p.Exit()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	p.Unregister()
	mustClose(t, d)
}
