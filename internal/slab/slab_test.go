package slab

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestAllocSizes(t *testing.T) {
	s, err := New(Config{MaxBytes: 2 * RegionSize})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[*byte]bool{}
	var all []*Chunk
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
	if _, err := s.Alloc(Large + 1); err == nil {
		t.Fatal("a chunk larger than the largest")
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
	all[0].Get()
	all[0].Put()
	for _, c := range all {
		c.Put()
	}
	if st := s.Stats(); st.SmallInUse+st.LargeInUse != 0 || st.MappedBytes != 2*RegionSize {
		t.Fatalf("%+v", st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal("second close:", err)
	}
	if _, err := s.Alloc(1); !errors.Is(err, ErrNoMemory) {
		t.Fatal("allocation after close:", err)
	}
}

func TestCloseHeld(t *testing.T) {
	s, _ := New(Config{Name: "test"})
	c, _ := s.Alloc(Large)
	d, _ := s.Alloc(Small)
	d.Put()
	err := s.Close()
	if err == nil || !strings.Contains(err.Error(), "1 chunks of 65536 bytes") || strings.Contains(err.Error(), "4352") {
		t.Fatal(err)
	}
	c.Bytes()[0] = 1 // still mapped
	c.Put()
}

func TestMisuse(t *testing.T) {
	s, _ := New(Config{})
	defer s.Close()
	c, _ := s.Alloc(1)
	c.Put()
	for name, f := range map[string]func(){"Put": c.Put, "Get": c.Get} {
		func() {
			defer func() {
				if r := recover(); r == nil || !strings.HasPrefix(r.(string), "BUG:") {
					t.Errorf("%s of a freed chunk: %v", name, r)
				}
				c.refs.Store(0)
			}()
			f()
		}()
	}
	if invariants.Enabled {
		c.mem[7] = 1
		defer func() {
			if recover() == nil {
				t.Error("write after free not noticed")
			}
		}()
		s.Alloc(1)
	}
}

func TestConcurrent(t *testing.T) {
	s, _ := New(Config{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			var held []*Chunk
			for range 5000 {
				if len(held) > 0 && r.IntN(2) == 0 {
					i := r.IntN(len(held))
					c := held[i]
					if c.Bytes()[5] != byte(g) {
						t.Error("chunk shared")
					}
					held[i] = held[len(held)-1]
					held = held[:len(held)-1]
					c.Put()
					continue
				}
				c, err := s.Alloc(r.IntN(Large + 1))
				if err != nil {
					t.Error(err)
					return
				}
				c.Bytes()[5] = byte(g)
				held = append(held, c)
			}
			for _, c := range held {
				c.Put()
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkAllocPut(b *testing.B) {
	s, _ := New(Config{})
	defer s.Close()
	b.ReportAllocs()
	for b.Loop() {
		c, err := s.Alloc(Large)
		if err != nil {
			b.Fatal(err)
		}
		c.Put()
	}
}
