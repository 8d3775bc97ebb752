//go:build invariants

package ref

import (
	"fmt"
	"sort"
	"sync"

	"github.com/openrds/openrds/internal/invariants"
)

// holders remembers who took references.
type holders struct {
	mu   sync.Mutex
	by   map[string][]invariants.Stack // one stack per reference held under a name
	last invariants.Stack              // of the most recent Put
}

func (h *holders) reset() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.by = make(map[string][]invariants.Stack)
}

func (h *holders) took(name string) {
	s := invariants.Caller(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.by[name] = append(h.by[name], s)
}

func (h *holders) gave(name string) {
	s := invariants.Caller(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	held := h.by[name]
	if len(held) == 0 {
		panic(fmt.Sprintf("BUG: ref: Put by %q, who holds none; the last Put was at\n%s", name, h.last))
	}
	// References under one name are alike: which stack goes is of no account.
	if held = held[:len(held)-1]; len(held) > 0 {
		h.by[name] = held
	} else {
		delete(h.by, name)
	}
	h.last = s
}

func (h *holders) history() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return fmt.Sprintf("; the last Put was at\n%s", h.last)
}

// Holders describes who holds references, one entry for each: the name and the stack that took it.
func (h *holders) Holders() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []string
	for name, stacks := range h.by {
		for _, s := range stacks {
			if name == "" {
				name = "(unnamed)"
			}
			list = append(list, name+" took it at\n"+s.String())
		}
	}
	sort.Strings(list)
	return list
}
