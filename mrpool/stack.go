package mrpool

import "go.uber.org/atomic"

// stack is a lock-free list of a pool's items, last in first out. An item is on one stack at most.
//
// The head is the index of the top item, plus one, in the low 24 bits, and a tag above them that every change
// counts up. The tag is what makes a pop safe: between its look at the top's successor and its exchange
// the top may have been taken, and put back over another successor (ABA); the tag is another one then.
// It comes round after 2^40 changes during one pop, a day of nothing else. The memory of items is never given
// back before the pools are closed, so looking at the successor of an item that somebody else has taken meanwhile
// reads a number of no use, not memory of no use: no epoch is needed.
type stack struct {
	_    [64]byte // the head changes on every processor: it shares its cache line with nobody
	head atomic.Uint64
	_    [56]byte
}

const (
	stackIndexBits = 24
	stackIndexMask = 1<<stackIndexBits - 1
)

// push puts it on top.
func (s *stack) push(it *item) { s.pushChain(it, it) }

// pushChain puts a chain of items (linked by next from first to last) on top in one exchange.
func (s *stack) pushChain(first, last *item) {
	for {
		h := s.head.Load()
		last.next.Store(uint32(h & stackIndexMask))
		if s.head.CompareAndSwap(h, (h>>stackIndexBits+1)<<stackIndexBits|uint64(first.index+1)) {
			return
		}
	}
}

// pop takes the top item, nil when there is none.
func (s *stack) pop(p *pool) *item {
	for {
		h := s.head.Load()
		i := h & stackIndexMask
		if i == 0 {
			return nil
		}
		it := p.item(uint32(i - 1))
		if s.head.CompareAndSwap(h, (h>>stackIndexBits+1)<<stackIndexBits|uint64(it.next.Load())) {
			return it
		}
	}
}

// popAll takes all items, as a list in which the one pushed first comes first. Whoever pushes meanwhile finds an
// empty stack: nothing is lost and nobody waits.
func (s *stack) popAll(p *pool) (list []*item) {
	for {
		h := s.head.Load()
		i := uint32(h & stackIndexMask)
		if i == 0 {
			return nil
		}
		if !s.head.CompareAndSwap(h, (h>>stackIndexBits+1)<<stackIndexBits) {
			continue
		}
		for i != 0 {
			it := p.item(i - 1)
			list = append(list, it)
			i = it.next.Load()
		}
		for a, b := 0, len(list)-1; a < b; a, b = a+1, b-1 {
			list[a], list[b] = list[b], list[a]
		}
		return list
	}
}
