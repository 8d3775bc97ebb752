//go:build invariants

package mrpool

import (
	"fmt"
	"sync"

	"github.com/openrds/openrds/internal/invariants"
)

// debug remembers where an item was mapped and given back.
type debug struct {
	mu         sync.Mutex
	got, given invariants.Stack
}

func (d *debug) mapped() {
	d.mu.Lock()
	d.got = invariants.Caller(1)
	d.mu.Unlock()
}

func (d *debug) gaveBack() {
	d.mu.Lock()
	d.given = invariants.Caller(1)
	d.mu.Unlock()
}

// misused panics: op was called with a mapping that is none any more.
func (d *debug) misused(op string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	panic(fmt.Sprintf("BUG: mrpool: %s of what is not mapped; last mapped at\n%s\nlast given back at\n%s", op, d.got, d.given))
}

func (d *debug) where() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return ", mapped at\n" + d.got.String()
}
