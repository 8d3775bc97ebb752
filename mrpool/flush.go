package mrpool

import (
	"sync"
	"time"
)

// flushBound is how long a flush waits for the invalidations it has posted. One that takes longer sits behind
// requests to a slow peer: its region goes its own way then, and the others of the batch do not wait for it.
const flushBound = 100 * time.Millisecond

// batch is the regions one flush has invalidated by requests.
type batch struct {
	mu        sync.Mutex
	left      int  // not proven yet, and one for the worker while it posts
	abandoned bool // who is proven later is given back by the completion
	proven    []*item
	all       chan struct{} // closed when none is left
}

// add takes one more in.
func (b *batch) add() {
	b.mu.Lock()
	b.left++
	b.mu.Unlock()
}

// prove takes an item whose invalidation has executed, unless the worker has left.
func (b *batch) prove(it *item) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.abandoned {
		return false
	}
	b.proven = append(b.proven, it)
	b.leaveLocked()
	return true
}

// leave is for an item that goes to recovery instead.
func (b *batch) leave() {
	b.mu.Lock()
	b.leaveLocked()
	b.mu.Unlock()
}

func (b *batch) leaveLocked() {
	if b.left--; b.left == 0 {
		close(b.all)
	}
}

// wait returns the items proven when all are, when the bound is over, or when stop is closed.
func (b *batch) wait(stop <-chan struct{}) []*item {
	b.leave()
	t := time.NewTimer(flushBound)
	defer t.Stop()
	select {
	case <-b.all:
	case <-t.C:
	case <-stop:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.abandoned = true
	return b.proven
}

// flushRound invalidates and unpins what was freed. It takes the whole list at once, so whoever frees or
// allocates meanwhile meets no lock, and what comes later is for the next round.
func (p *pool) flushRound(stop <-chan struct{}) {
	p.stats.flushes.Inc()
	list := p.dirty.popAll(p)
	var n int64
	for _, it := range list {
		n += it.pinned
	}
	p.dirtyItems.Sub(int64(len(list)))
	p.dirtyBytes.Sub(n)

	b := &batch{left: 1, all: make(chan struct{})}
	var plain []*item
	var queues []*QP
	seen := make(map[*QP]bool)
	for _, it := range list {
		q := it.q
		if q == nil {
			plain = append(plain, it)
			continue
		}
		gen, _ := it.load()
		it.set(gen, stInvalid)
		it.batch = b
		b.add()
		if it.isGone() {
			it.batch = nil
			b.prove(it)
		} else if !q.enqueue(it) {
			p.doom(it)
		} else if !seen[q] {
			seen[q] = true
			queues = append(queues, q)
		}
	}
	for _, q := range queues {
		q.pump()
	}
	proven := b.wait(stop)
	if len(proven)+len(plain) > 0 && p.ps.cfg.Epoch != nil {
		// Who found a region in a table of keys or sockets under the epoch may be using it still.
		if !p.ps.cfg.Epoch.SynchronizeUntil(stop) {
			return // Close, which waits for the same, takes them from where they are
		}
	}
	for _, it := range proven {
		p.settle(it, nil)
		p.putFree(it)
	}
	for _, it := range plain {
		if err := it.destroy(); err != nil {
			p.ps.logger.Warn("deregister", "pool", p.name, "err", err)
			p.doom(it)
			continue
		}
		p.stats.destroyed.Inc()
		p.settle(it, nil)
		p.putEmpty(it)
	}
	if hungry := p.starved.Swap(0); hungry != 0 {
		p.reclaim(hungry)
	}
	p.trim(p.cfg.MaxFree)
}

// reclaim looks for regions of the hungry kinds where they are out of reach: on the lists of queues that have fallen
// idle, and as regions of another kind.
func (p *pool) reclaim(hungry uint32) {
	for _, q := range p.ps.queues() {
		q.nudge(p)
	}
	if hungry&^hungryForBytes == 0 {
		return
	}
	for k := kind(0); k < numKinds; k++ {
		if hungry&(1<<k) == 0 {
			for it := p.free[k].pop(p); it != nil; it = p.free[k].pop(p) {
				p.freeItems.Dec()
				p.retireFree(it)
			}
		}
	}
}

// trim destroys free regions above n. A free list that is full takes no more, and loses none.
func (p *pool) trim(n int) {
	for k := kind(0); k < numKinds; k++ {
		for p.freeItems.Load() > int64(n) {
			it := p.free[k].pop(p)
			if it == nil {
				break
			}
			p.freeItems.Dec()
			p.retireFree(it)
		}
	}
}

func (p *pool) retireFree(it *item) {
	if err := it.destroy(); err != nil {
		p.doom(it)
		return
	}
	p.stats.destroyed.Inc()
	p.putEmpty(it)
}
