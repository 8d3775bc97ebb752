package slab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func newSlab(t testing.TB, cfg Config) *Slab {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantPanic(t *testing.T, what, text string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if r := fmt.Sprint(recover()); !strings.HasPrefix(r, "BUG: slab: ") || !strings.Contains(r, text) {
			t.Errorf("%s: panic %q, want one of ours with %q", what, r, text)
		}
	}()
	f()
}

func TestAllocSizes(t *testing.T) {
	s := newSlab(t, Config{MaxBytes: 2 * RegionSize})
	seen := map[*byte]bool{}
	var all []*Chunk
	var err error
	for _, n := range []int{0, 1, Small, Small + 1, Large} {
		c, err := s.Alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		b := c.Bytes()
		want := Small
		if n > Small {
			want = Large
		}
		if len(b) != want || cap(b) != want || seen[&b[0]] {
			t.Fatalf("%d bytes: chunk of %d (cap %d), seen before: %v", n, len(b), cap(b), seen[&b[0]])
		}
		seen[&b[0]] = true
		if r := c.Region(); s.Region(r.ID()) != r || &r.Bytes()[c.Offset()] != &b[0] {
			t.Fatal("chunk is not where its region says")
		}
		all = append(all, c)
	}
	for _, n := range []int{-1, Large + 1} {
		if _, err := s.Alloc(n); !errors.Is(err, ErrTooLarge) {
			t.Errorf("Alloc(%d): %v, want ErrTooLarge", n, err)
		}
		if _, err := s.AllocN(n, make([]*Chunk, 1)); !errors.Is(err, ErrTooLarge) {
			t.Errorf("AllocN(%d): %v, want ErrTooLarge", n, err)
		}
	}
	for err == nil {
		var c *Chunk
		if c, err = s.Alloc(Large); err == nil {
			all = append(all, c)
		}
	}
	if !errors.Is(err, ErrNoMemory) {
		t.Fatal(err)
	}
	if want := 3 + RegionSize/Large; len(all) != want {
		t.Errorf("%d chunks before the bound, want %d", len(all), want)
	}
	if st := s.Stats(); st != (Stats{2 * RegionSize, 3, RegionSize / Large}) {
		t.Errorf("at the bound: %+v", st)
	}
	all[0].Get()
	all[0].Put()
	for _, c := range all {
		if c.Refs() != 1 {
			t.Errorf("a chunk with %d references, want 1", c.Refs())
		}
		c.Put()
	}
	if st := s.Stats(); st != (Stats{MappedBytes: 2 * RegionSize}) {
		t.Errorf("after the last Put: %+v", st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal("second close:", err)
	}
	if _, err := s.Alloc(1); !errors.Is(err, ErrNoMemory) || !errors.Is(err, net.ErrClosed) {
		t.Fatal("allocation after close:", err)
	}
	if s.Region(2) != nil || s.Region(-1) != nil {
		t.Error("a region that was never made")
	}
}

// TestChunksCoverRegions allocates all there is and checks that no byte belongs to two.
func TestChunksCoverRegions(t *testing.T) {
	s := newSlab(t, Config{MaxBytes: 3 * RegionSize})
	var all []*Chunk
	for {
		c, err := s.Alloc(Small)
		if err != nil {
			break
		}
		for i := range c.Bytes() {
			c.Bytes()[i] = byte(len(all))
		}
		all = append(all, c)
	}
	if want := 3 * (RegionSize / Small); len(all) != want {
		t.Errorf("%d chunks, want %d", len(all), want)
	}
	for i, c := range all {
		for _, b := range c.Bytes() {
			if b != byte(i) {
				t.Fatalf("chunk %d was overwritten with %d", i, b)
			}
		}
	}
	s.FreeN(all)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAllocN(t *testing.T) {
	s := newSlab(t, Config{MaxBytes: RegionSize})
	cs := make([]*Chunk, RegionSize/Large+5)
	n, err := s.AllocN(Large, cs)
	if n != RegionSize/Large || !errors.Is(err, ErrNoMemory) {
		t.Fatalf("AllocN beyond the bound: %d, %v", n, err)
	}
	seen := map[*Chunk]bool{}
	for i, c := range cs {
		if i >= n {
			if c != nil {
				t.Errorf("entry %d is set", i)
			}
			continue
		}
		if seen[c] || c.Refs() != 1 {
			t.Errorf("chunk %d: seen %v, %d references", i, seen[c], c.Refs())
		}
		seen[c] = true
	}
	cs = cs[:n]
	cs[3].Get()
	s.FreeN(cs) // one of each
	if got := s.Stats().LargeInUse; got != 1 {
		t.Errorf("%d chunks in use after FreeN, want the one held twice", got)
	}
	cs[3].Get()
	s.FreeN([]*Chunk{cs[3], cs[3]}) // both of one
	if n, err := s.AllocN(Large, cs); n != len(cs) || err != nil {
		t.Errorf("AllocN of all again: %d, %v", n, err)
	}
	s.FreeN(cs)
	s.FreeN(nil)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestCloseHeld(t *testing.T) {
	s := newSlab(t, Config{Name: "test"})
	c, _ := s.Alloc(Large)
	d, _ := s.Alloc(Small)
	d.Put()
	err := s.Close()
	var leaked *LeakError
	if !errors.As(err, &leaked) || leaked.Large != 1 || leaked.Small != 0 {
		t.Fatal(err)
	}
	if !strings.HasPrefix(err.Error(), "slab test closed with 1 chunks of 65536 bytes in use") {
		t.Error(err)
	}
	if invariants.Enabled && !strings.Contains(err.Error(), "TestCloseHeld") {
		t.Errorf("no word of who allocated it: %v", err)
	}
	c.Bytes()[0] = 1 // still mapped
	if s.Region(d.Region().ID()).Bytes() != nil {
		t.Error("the region without chunks in use is still mapped")
	}
	if _, err := s.Alloc(Large); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Alloc after such a Close: %v", err)
	}
	c.Put()
	if _, err := s.Alloc(Large); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Alloc of a chunk that came back after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close once the chunk is back: %v", err)
	}
	if c.Region().Bytes() != nil {
		t.Error("the region is still mapped")
	}
}

func TestMisuse(t *testing.T) {
	s := newSlab(t, Config{})
	defer s.Close()
	c, _ := s.Alloc(1)
	c.Put()
	wantPanic(t, "a second Put", "Put of chunk", c.Put)
	wantPanic(t, "FreeN of a free chunk", "Put of chunk", func() { s.FreeN([]*Chunk{c}) })
	wantPanic(t, "Get of a free chunk", "Get of chunk", c.Get)
	if c.Refs() != 0 {
		t.Errorf("misuse left %d references", c.Refs())
	}
	if invariants.Enabled {
		c.mem[7] = 1
		wantPanic(t, "a write after the free", "byte 7 of", func() { s.Alloc(1) })
	}
	if _, err := New(Config{MaxBytes: -1}); err == nil {
		t.Error("New takes a negative bound")
	}
}

// TestConcurrent has goroutines allocate, share and free chunks; each chunk must have one owner at a
// time. Half of the traffic moves in batches, and Close comes in the middle.
func TestConcurrent(t *testing.T) {
	for _, procs := range []int{1, 2, 8} {
		t.Run(fmt.Sprintf("procs=%d", procs), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			s := newSlab(t, Config{MaxBytes: 4 * RegionSize})
			const workers, rounds = 4, 4000
			var owned sync.Map
			own := func(c *Chunk) {
				if _, twice := owned.LoadOrStore(c, true); twice || c.Refs() != 1 {
					t.Errorf("a chunk was given to two, or has %d references", c.Refs())
				}
			}
			var wg sync.WaitGroup
			var done atomic.Int32
			for w := range workers {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(1, uint64(w)))
					var held []*Chunk
					for range rounds {
						batch := make([]*Chunk, 1+r.IntN(8))
						switch k := min(len(held), len(batch)); {
						case k > 0 && r.IntN(2) == 0:
							last := held[len(held)-k:]
							held = held[:len(held)-k]
							for _, c := range last {
								owned.Delete(c)
								if r.IntN(4) == 0 { // a second holder drops its reference elsewhere
									c.Get()
									wg.Go(c.Put)
								}
							}
							if r.IntN(2) == 0 {
								s.FreeN(last)
							} else {
								for _, c := range last {
									c.Put()
								}
							}
						default:
							n, err := s.AllocN(Small+r.IntN(2), batch)
							if err != nil && !errors.Is(err, ErrNoMemory) {
								t.Error(err)
							}
							for _, c := range batch[:n] {
								own(c)
							}
							held = append(held, batch[:n]...)
						}
					}
					done.Add(1)
					for _, c := range held {
						owned.Delete(c)
						c.Put()
					}
				})
			}
			for done.Load() == 0 {
				runtime.Gosched()
			}
			first := s.Close() // with holders, most likely: only ever a LeakError
			var leaked *LeakError
			if first != nil && !errors.As(first, &leaked) {
				t.Error(first)
			}
			wg.Wait()
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNoAllocations(t *testing.T) {
	if invariants.Enabled {
		t.Skip("stacks are kept under -tags invariants")
	}
	s := newSlab(t, Config{})
	cs := make([]*Chunk, 16)
	if n := testing.AllocsPerRun(1000, func() {
		c, _ := s.Alloc(Large)
		c.Get()
		c.Put()
		c.Put()
		s.AllocN(Small, cs)
		s.FreeN(cs)
	}); n != 0 {
		t.Errorf("%v allocations on the Go heap per round", n)
	}
	if size := unsafe.Sizeof(Chunk{}); unsafe.Sizeof(uintptr(0)) == 8 && size != 64 {
		t.Errorf("a Chunk has %d bytes, want a cache line", size)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// BenchmarkAllocPut measures an Alloc and a Put. With two workers both use one stack; ns/op is then
// per worker.
func BenchmarkAllocPut(b *testing.B) {
	for _, workers := range []int{1, 2} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			bench(b, workers, func(s *Slab) {
				c, err := s.Alloc(Large)
				if err != nil {
					panic(err)
				}
				c.Put()
			})
		})
	}
}

// BenchmarkAllocNFreeN measures chunks that move in batches.
func BenchmarkAllocNFreeN(b *testing.B) {
	for _, batch := range []int{8, 32} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			cs := make([]*Chunk, batch)
			bench(b, 1, func(s *Slab) {
				if _, err := s.AllocN(Small, cs); err != nil {
					panic(err)
				}
				s.FreeN(cs)
			})
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/chunk")
		})
	}
}

func bench(b *testing.B, workers int, op func(*Slab)) {
	b.ReportAllocs()
	s := newSlab(b, Config{})
	op(s) // maps the first region
	b.ResetTimer()
	// Started together: workers that came one after the other would show twice the cost of one, and
	// nothing of what they cost each other.
	if workers > runtime.GOMAXPROCS(0) {
		b.Skipf("%d processors", runtime.GOMAXPROCS(0))
	}
	var wg sync.WaitGroup
	var ready atomic.Int32
	for range workers {
		wg.Go(func() {
			ready.Add(1)
			for int(ready.Load()) < workers {
				runtime.Gosched()
			}
			for range b.N {
				op(s)
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}
