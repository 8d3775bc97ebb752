//go:build invariants

package slab

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/openrds/openrds/internal/invariants"
)

// poisonByte fills free chunks. As a length, a port or an address it is absurd at once.
const poisonByte = 0xdb

var poisonPattern = bytes.Repeat([]byte{poisonByte}, Large)

// debug is what a chunk remembers.
type debug struct {
	mu               sync.Mutex // Close may describe a chunk that its holder frees at that moment
	poisoned         bool
	allocAt, freedAt invariants.Stack
}

func (d *debug) history() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprintf("\nallocated at\n%s\nfreed at\n%s", d.allocAt, d.freedAt)
}

func (c *Chunk) poison() {
	copy(c.mem, poisonPattern)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poisoned = true
	c.freedAt = invariants.Caller(1)
}

// checkPoison panics if a free chunk was written to. One that was never allocated is not poisoned: it
// would cost its pages.
func (c *Chunk) checkPoison() {
	if c.poisoned && !bytes.Equal(c.mem, poisonPattern[:len(c.mem)]) {
		i := 0
		for c.mem[i] == poisonByte {
			i++
		}
		panic(fmt.Sprintf("BUG: slab: write after free at byte %d of %s", i, c.describe()))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poisoned = false
	c.allocAt = invariants.Caller(1)
}
