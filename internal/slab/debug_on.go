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

var poisonPattern = bytes.Repeat([]byte{poisonByte}, MaxSize)

// debug is what a chunk remembers.
type debug struct {
	mu       sync.Mutex // Close may describe a chunk that its holder frees at that moment
	poisoned         bool
	allocAt, freedAt invariants.Stack
}

func (d *debug) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprintf("\nallocated at\n%s\nfreed at\n%s", d.allocAt, d.freedAt)
}

func (c *Chunk) poison() {
	copy(c.Data, poisonPattern)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poisoned = true
	c.freedAt = invariants.Caller(1)
}

// verifyPoison panics if a free chunk was written to. A chunk that was never allocated holds zeros
// that nobody looks at.
func (c *Chunk) verifyPoison() {
	if c.poisoned && !bytes.Equal(c.Data, poisonPattern[:len(c.Data)]) {
		i := 0
		for c.Data[i] == poisonByte {
			i++
		}
		panic(fmt.Sprintf("BUG: slab: byte %d of %s was written after the free", i, c.describe()))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poisoned = false
	c.allocAt = invariants.Caller(1)
}
