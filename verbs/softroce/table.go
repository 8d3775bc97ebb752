package softroce

import (
	"fmt"
	"sync"

	"go.uber.org/atomic"
)

// table maps 24-bit indices (QPNs, key indices) to objects. Reads are two atomic loads and need no
// lock. What keeps an object usable that was found is not the table: QPs and windows end under the engine role, which the engine
// has for the step; a region is used with a reference (TryGet), by the engine as by posters; and the collector keeps what
// is found too late.
// Writers are serialised by mu. Indices are handed out upwards from a random start and wrap, so
// that one is not used again soon.
type table[T any] struct {
	root  [1 << 12]atomic.Pointer[leaf[T]]
	mu    sync.Mutex
	next  uint32
	count int
	max   int
	min   uint32 // lowest index handed out
	last  uint32 // highest
}

type leaf[T any] [1 << 12]atomic.Pointer[T]

// init makes the table for at most max objects at indices min to last, beginning anywhere.
func (t *table[T]) init(start, min, last uint32, max int) {
	t.min, t.last, t.max = min, last, max
	t.next = min + start%(last-min+1)
}

// get returns the object at idx, or nil.
func (t *table[T]) get(idx uint32) *T {
	l := t.root[idx>>12&0xfff].Load()
	if l == nil {
		return nil
	}
	return l[idx&0xfff].Load()
}

// reserve picks a free index and publishes the object that mk makes for it.
func (t *table[T]) reserve(mk func(idx uint32) *T) (*T, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.count >= t.max {
		return nil, fmt.Errorf("%d objects exist: %w", t.count, errNoMemory)
	}
	for range t.last - t.min + 1 {
		idx := t.next
		if t.next++; t.next > t.last {
			t.next = t.min
		}
		l := t.root[idx>>12].Load()
		if l == nil {
			l = new(leaf[T])
			t.root[idx>>12].Store(l)
		}
		if l[idx&0xfff].Load() != nil {
			continue
		}
		v := mk(idx)
		l[idx&0xfff].Store(v)
		t.count++
		return v, nil
	}
	return nil, errNoMemory
}

// remove unpublishes the object at idx. Readers of this moment may still hold it.
func (t *table[T]) remove(idx uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.root[idx>>12&0xfff].Load(); l != nil && l[idx&0xfff].Swap(nil) != nil {
		t.count--
	}
}

// replace puts v in the place of the object at idx.
func (t *table[T]) replace(idx uint32, v *T) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.root[idx>>12&0xfff].Load(); l != nil {
		l[idx&0xfff].Store(v)
	}
}

// each calls f for every object. What is added or removed meanwhile may be missed.
func (t *table[T]) each(f func(*T)) {
	for i := range t.root {
		if l := t.root[i].Load(); l != nil {
			for k := range l {
				if v := l[k].Load(); v != nil {
					f(v)
				}
			}
		}
	}
}
