package ref

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestCount(t *testing.T) {
	zero := 0
	var c Count
	c.Init(func() { zero++ })
	c.Get()
	c.GetNamed("table")
	if !c.TryGet() || c.Refs() != 4 {
		t.Fatalf("%d references", c.Refs())
	}
	c.Put()
	c.PutNamed("table")
	c.Put()
	if zero != 0 {
		t.Fatal("gone with a reference left")
	}
	if invariants.Enabled && len(c.Holders()) != 1 {
		t.Errorf("holders: %q", c.Holders())
	}
	c.Put()
	if zero != 1 {
		t.Fatalf("onZero ran %d times", zero)
	}
	if c.TryGet() {
		t.Fatal("revived by TryGet")
	}
	for what, f := range map[string]func(){"Get": c.Get, "Put": c.Put} {
		func() {
			defer func() {
				if r, ok := recover().(string); !ok || !strings.HasPrefix(r, "BUG: ref") {
					t.Errorf("%s at zero: panic %q", what, r)
				}
			}()
			f()
		}()
	}
	if zero != 1 || c.Refs() != 0 {
		t.Fatalf("after misuse: onZero ran %d times, %d references", zero, c.Refs())
	}
}

// TestConcurrent: whoever got a reference by TryGet has the object until its Put, and it goes once.
func TestConcurrent(t *testing.T) {
	for range 300 {
		var c Count
		var gone atomic.Int32
		c.Init(func() { gone.Add(1) })
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				// Bounded: while each holds one most of the time, the count may never find its way to zero.
				for i := 0; i < 100 && c.TryGet(); i++ {
					if gone.Load() != 0 {
						t.Error("got a reference to what is gone")
					}
					c.Put()
				}
			})
		}
		c.Put()
		wg.Wait()
		if gone.Load() != 1 {
			t.Fatalf("gone %d times", gone.Load())
		}
	}
}
