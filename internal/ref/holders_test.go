package ref

import (
	"fmt"
	"strings"
	"testing"

	"github.com/openrds/openrds/internal/invariants"
)

// TestHolders: references are listed by name and stack, and a name that holds none may not give one
// back.
func TestHolders(t *testing.T) {
	var c Count
	c.Init(nil)
	c.GetNamed("flush worker")
	if !c.TryGetNamed("conn 7") {
		t.Fatal("TryGetNamed of a live count")
	}
	c.GetNamed("flush worker")
	if !invariants.Enabled {
		if h := c.Holders(); h != nil {
			t.Errorf("holders without the tag: %q", h)
		}
		return
	}
	want := []string{"(unnamed)", "conn 7", "flush worker", "flush worker"}
	got := c.Holders()
	if len(got) != len(want) {
		t.Fatalf("holders %q", got)
	}
	for i, h := range got {
		if !strings.HasPrefix(h, want[i]+" took it at\n") || !strings.Contains(h, "ref.TestHolders ") {
			t.Errorf("holder %d: %q, want %q and this test", i, h, want[i])
		}
	}
	func() {
		defer func() {
			if r := fmt.Sprint(recover()); !strings.HasPrefix(r, `BUG: ref: Put by "stranger", who holds none`) {
				t.Errorf("a Put under a name that holds none: panic %q", r)
			}
		}()
		c.PutNamed("stranger")
	}()
	if n := c.Refs(); n != 4 {
		t.Errorf("that Put left %d references, want 4", n)
	}
	c.PutNamed("flush worker")
	c.PutNamed("flush worker")
	c.PutNamed("conn 7")
	c.Put()
	if h := c.Holders(); len(h) != 0 {
		t.Errorf("holders of a count at zero: %q", h)
	}
}

// TestInitAgain: a count at zero may serve again, one above may not be reset.
func TestInitAgain(t *testing.T) {
	var c Count
	zero := 0
	for range 3 {
		c.Init(func() { zero++ })
		c.Put()
	}
	if zero != 3 {
		t.Errorf("onZero ran %d times in three lives", zero)
	}
	c.Init(nil)
	defer func() {
		if r := fmt.Sprint(recover()); r != "BUG: ref: Init of a count at 1" {
			t.Errorf("Init of a live count: panic %q", r)
		}
		c.Put()
	}()
	c.Init(nil)
}
