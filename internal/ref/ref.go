// Package ref counts references to what the garbage collector cannot free: registered memory, queue
// pairs, devices.
//
// A Count starts at one, the reference of whoever created the object. The holder of a reference
// takes further ones with Get; whoever finds the object in a table, and so holds none, asks with
// TryGet, which fails once the count has been zero. The Put that reaches zero calls onZero, once, on its
// own goroutine. A count that falls below zero, or is revived from zero, is a bug of ours and panics.
//
// Under -tags invariants a Count remembers for each reference the stack that took it, and Holders
// lists them for reports of leaks. All methods but Init are safe for concurrent use.
package ref

import (
	"fmt"
	"sync/atomic"
)

// Count is a reference count. Init must be called before use; it may not be copied.
type Count struct {
	n      atomic.Int64
	onZero func()
	holders
}

// Init sets the count to one. onZero (nil: nothing) runs when it reaches zero, on the goroutine of
// the last Put: where that may be a completion handler it only schedules the teardown.
func (c *Count) Init(onZero func()) {
	if n := c.n.Load(); n != 0 {
		panic(fmt.Sprintf("BUG: ref: Init of a count at %d", n))
	}
	c.onZero = onZero
	c.reset()
	c.took("")
	c.n.Store(1)
}

// Get takes a reference. The caller holds one already.
func (c *Count) Get() { c.get("") }

// GetNamed is Get for a holder that reports of leaks will call name; it is given back with
// PutNamed and the same name.
func (c *Count) GetNamed(name string) { c.get(name) }

func (c *Count) get(name string) {
	if n := c.n.Add(1); n <= 1 {
		c.n.Add(-1)
		panic(fmt.Sprintf("BUG: ref: Get by %q of a count at %d%s", name, n-1, c.history()))
	}
	c.took(name)
}

// TryGet takes a reference unless the count has reached zero, and reports whether it did. The
// caller need not hold one, but something (an epoch, the collector) must keep c itself in existence.
func (c *Count) TryGet() bool { return c.tryGet("") }

// TryGetNamed is TryGet for a holder called name.
func (c *Count) TryGetNamed(name string) bool { return c.tryGet(name) }

func (c *Count) tryGet(name string) bool {
	for {
		n := c.n.Load()
		if n <= 0 {
			return false
		}
		if c.n.CompareAndSwap(n, n+1) {
			c.took(name)
			return true
		}
	}
}

// Put gives back a reference that Init, Get or TryGet took.
func (c *Count) Put() { c.put("") }

// PutNamed gives back a reference that GetNamed or TryGetNamed took under name.
func (c *Count) PutNamed(name string) { c.put(name) }

func (c *Count) put(name string) {
	// Before the count falls: afterwards the object, and this list with it, may be gone.
	c.gave(name)
	switch n := c.n.Add(-1); {
	case n == 0:
		if c.onZero != nil {
			c.onZero()
		}
	case n < 0:
		c.n.Add(1)
		panic(fmt.Sprintf("BUG: ref: Put by %q of a count at %d%s", name, n+1, c.history()))
	}
}

// Refs returns the count of this moment: for reports and assertions, never for a decision.
func (c *Count) Refs() int64 { return c.n.Load() }
