package mrpool

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/verbs"
)

// TestStress maps and gives back from several goroutines on queues that are executed by others, break, and are replaced,
// while small bounds keep the workers busy. Owners are told, and nothing is left.
func TestStress(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Small.MaxItems, c.Small.FlushItems, c.Small.MaxFree = 12, 3, 4
		c.Large.MaxItems, c.Large.FlushItems = 6, 2
		c.MaxWait = 5 * time.Millisecond
	})
	type conn struct {
		q *QP
		f *fakeQP
	}
	var conns [2]atomic.Pointer[conn]
	var qpn atomic.Uint32
	open := func(i int) {
		f := &fakeQP{pd: r.pd, num: verbs.QPN(qpn.Add(1)), depth: 300}
		conns[i].Store(&conn{r.ps.NewQP(f, 16), f})
	}
	over, err := r.ps.Register(context.Background(), r.mem[:1<<20:1<<20], 0, rw|verbs.AccessMWBind)
	if err != nil {
		t.Fatal(err)
	}
	var engines, callers sync.WaitGroup
	var stop atomic.Bool
	for i := range conns {
		open(i)
		engines.Go(func() { // handler and control of one connection
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for !stop.Load() {
				c := conns[i].Load()
				give(c.q, c.f.run(1+rng.IntN(20)))
				if rng.IntN(60) == 0 {
					if rng.IntN(2) == 0 {
						gone(c.q, c.f)
					} else {
						c.f.destroy()
						c.q.Close()
					}
					open(i)
				}
				time.Sleep(20 * time.Microsecond)
			}
			c := conns[i].Load()
			gone(c.q, c.f)
		})
	}
	var mapped, told atomic.Int64
	for i := range 4 {
		callers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 2))
			ctx := context.Background()
			for range 400 {
				q := conns[rng.IntN(len(conns))].Load().q
				n := 1 + rng.IntN(6)
				at := rng.IntN(64) // whose memory is no matter: nobody writes
				req := Request{Segs: r.pages(at, n), Access: rw}
				var m Mapping
				var err error
				switch rng.IntN(4) {
				case 0:
					m, err = q.Map(req)
				case 1:
					m, err = q.MapWait(ctx, req)
				case 2:
					req.Over = over
					m, err = q.Map(req)
				case 3:
					m, err = r.ps.Register(ctx, req.Segs[0], 0, rw)
				}
				if err != nil {
					if !errors.Is(err, ErrPoolExhausted) && !errors.Is(err, ErrQueueFull) && !errors.Is(err, ErrQPLost) && !errors.Is(err, verbs.ErrClosed) {
						t.Errorf("map: %v", err)
					}
					continue
				}
				mapped.Add(1)
				done := func(err error) {
					if err != nil {
						t.Errorf("told: %v", err)
					}
					told.Add(1)
				}
				if rng.IntN(3) == 0 {
					err = m.Free(done)
				} else {
					err = m.Unmap(done)
				}
				if err != nil {
					t.Errorf("give back: %v", err)
				}
			}
		})
	}
	within(t, "the callers", callers.Wait)
	stop.Store(true)
	within(t, "the queues", engines.Wait)
	r.mustUnmap(over, nil)
	r.shut()
	if mapped.Load() != told.Load() || mapped.Load() < 400 {
		t.Errorf("%d mapped, %d told", mapped.Load(), told.Load())
	}
}

// promptQP executes what is posted at once, and keeps the completions.
type promptQP struct {
	verbs.QP
	wcs []verbs.WC
}

func (q *promptQP) Num() verbs.QPN { return 1 }

func (q *promptQP) PostSend(wrs []verbs.SendWR) (int, error) {
	for i := range wrs {
		if wrs[i].Flags&verbs.SendSignaled != 0 {
			q.wcs = append(q.wcs, verbs.WC{ID: wrs[i].ID})
		}
	}
	return len(wrs), nil
}

// TestNoAllocation: mapping, giving back either way of two, and completions cost nothing on the heap.
func TestNoAllocation(t *testing.T) {
	if invariants.Enabled {
		t.Skip("invariants remember stacks")
	}
	r := newRig(t)
	f := &promptQP{}
	q := r.ps.NewQP(f, 64)
	req := Request{Segs: r.pages(0, 16), Access: rw}
	told := 0
	done := func(error) { told++ }
	pair := func() {
		for i := range 32 {
			m, err := q.Map(req)
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				err = m.Unmap(nil)
			} else {
				err = m.Unmap(done)
			}
			if err != nil {
				t.Fatal(err)
			}
			for i := range f.wcs {
				q.Completion(&f.wcs[i])
			}
			f.wcs = f.wcs[:0]
		}
	}
	pair()
	if n := testing.AllocsPerRun(20, pair); n != 0 {
		t.Errorf("%v allocations in 32 mappings", n)
	}
	if told != 22*16 {
		t.Errorf("%d told", told)
	}
	q.Close()
	r.shut()
}

// BenchmarkPoolMapUnmap is the pools' own part of BenchmarkPoolMapUnmap64K: the queue costs nothing.
func BenchmarkPoolMapUnmap(b *testing.B) {
	r := newRig(b)
	f := &promptQP{}
	q := r.ps.NewQP(f, 512)
	req := Request{Segs: r.pages(0, 16), Access: rw}
	b.ReportAllocs()
	for b.Loop() {
		m, err := q.Map(req)
		if err != nil {
			b.Fatal(err)
		}
		m.Unmap(nil)
		for i := range f.wcs {
			q.Completion(&f.wcs[i])
		}
		f.wcs = f.wcs[:0]
	}
	q.Close()
	r.shut()
}
