package mrpool

import (
	"fmt"
	"sync"

	"go.uber.org/atomic"
)

// blockItems is how many items a pool grows by in memory: those of 1 GiB in regions of 256 KiB.
const blockItems = 256

// pool is the regions of one size of a device.
type pool struct {
	ps       *Pools
	name     string
	class    int // 0: 8k, 1: 1m
	maxPages int
	cfg      PoolConfig

	free  [numKinds]stack // objects ready
	empty stack           // without objects
	dirty stack           // freed, still mapped
	stale stack           // for recovery

	flush    *worker
	recovery *worker

	blocks atomic.Pointer[[]*[blockItems]item] // replaced, never changed

	mu    sync.Mutex // guards growing, item.dones, and lost against given back
	items int        // made so far
	stuck []*QP      // queues that refused an invalidation: the recovery worker tries again

	pinned     atomic.Int64 // bytes
	dirtyItems atomic.Int64
	dirtyBytes atomic.Int64
	freeItems  atomic.Int64
	used       atomic.Int64  // mapped now
	starved    atomic.Uint32 // kinds a request found none of: 1 << kind, or hungryForBytes. The flush worker acts on it

	stats poolCounters
}

type poolCounters struct {
	alloc, destroyed, mapped, flushes, waits, depleted, reused atomic.Uint64
	allocErrors, recovered, recoveryErrors                     atomic.Uint64
}

// item returns the item of an index that was given out.
func (p *pool) item(i uint32) *item {
	return &(*p.blocks.Load())[i/blockItems][i%blockItems]
}

// grow makes an item, or returns nil at the bound.
func (p *pool) grow() *item {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.items >= p.cfg.MaxItems || p.ps.closed.Load() {
		return nil
	}
	i := p.items
	var blocks []*[blockItems]item
	if b := p.blocks.Load(); b != nil {
		blocks = *b
	}
	if i/blockItems == len(blocks) {
		blocks = append(blocks[:len(blocks):len(blocks)], new([blockItems]item))
		p.blocks.Store(&blocks)
	}
	it := &blocks[i/blockItems][i%blockItems]
	it.pool, it.index = p, uint32(i)
	p.items++
	return it
}

// acquire takes an item with the objects of kind k, whose state it leaves free. It does not wait.
func (p *pool) acquire(k kind) (*item, error) {
	for {
		it := p.free[k].pop(p)
		if it == nil {
			break
		}
		p.freeItems.Dec()
		if it.state() != stFree {
			p.doom(it) // never handed out
			continue
		}
		p.stats.reused.Inc()
		return it, nil
	}
	it := p.empty.pop(p)
	if it == nil {
		it = p.grow()
	}
	if it == nil {
		if p.ps.closed.Load() {
			return nil, fmt.Errorf("memory region pool %s: %w", p.name, ErrClosed)
		}
		p.stats.depleted.Inc()
		p.hunger(1 << k)
		return nil, &ExhaustedError{Pool: p.name, Bound: "regions"}
	}
	if err := p.ps.ways[k].alloc(it); err != nil {
		p.putEmpty(it)
		p.stats.allocErrors.Inc()
		return nil, fmt.Errorf("memory region pool %s: %w", p.name, err)
	}
	it.kind = k
	if k != byRegistration { // whose object is made by the mapping
		p.stats.alloc.Inc()
	}
	gen, _ := it.load()
	it.set(gen, stFree)
	return it, nil
}

// hungryForBytes is the bit of pool.starved for a bound on pinned bytes.
const hungryForBytes = 1 << numKinds

// hunger says what a request found none of, and starts a flush.
func (p *pool) hunger(what uint32) {
	for old := p.starved.Load(); !p.starved.CompareAndSwap(old, old|what); {
		old = p.starved.Load()
	}
	p.flush.kick()
}

// putFree gives back an item whose objects are good.
func (p *pool) putFree(it *item) {
	gen, _ := it.load()
	it.set(gen, stFree)
	it.q = nil
	if it.kind == byRegistration {
		p.putEmpty(it)
		return
	}
	p.free[it.kind].push(it)
	if p.freeItems.Inc() > int64(p.cfg.MaxFree) {
		p.flush.kick() // which trims
	}
	p.ps.room.open()
}

// putEmpty gives back an item without objects.
func (p *pool) putEmpty(it *item) {
	gen, _ := it.load()
	it.set(gen, stEmpty)
	it.q = nil
	p.empty.push(it)
	p.ps.room.open()
}

// pin counts n bytes, or says which bound is in the way.
func (p *pool) pin(n int64) error {
	if p.pinned.Add(n) > p.cfg.MaxPinned {
		p.pinned.Sub(n)
		p.stats.depleted.Inc()
		p.hunger(hungryForBytes)
		return &ExhaustedError{Pool: p.name, Bound: "pinned bytes"}
	}
	if p.ps.pinned.Add(n) > p.ps.cfg.MaxPinned {
		p.ps.pinned.Sub(n)
		p.pinned.Sub(n)
		p.stats.depleted.Inc()
		// What is freed may be in the other pool.
		p.ps.small.hunger(hungryForBytes)
		p.ps.large.hunger(hungryForBytes)
		return &ExhaustedError{Pool: p.name, Bound: "pinned bytes of the device"}
	}
	return nil
}

// unpin gives n bytes back.
func (p *pool) unpin(n int64) {
	if n != 0 {
		p.unpinQuietly(n)
		p.ps.room.open()
	}
}

// unpinQuietly is unpin by a request that failed, whose caller opens the gate unless it waits there itself.
func (p *pool) unpinQuietly(n int64) {
	p.pinned.Sub(n)
	p.ps.pinned.Sub(n)
}

// setAside leaves a region that was given back to the flush worker, which is started if prompt or at a threshold.
// The caller owns it, and holds a reference to the device.
func (p *pool) setAside(it *item, prompt bool) {
	gen, _ := it.load()
	n := it.pinned
	it.set(gen, stFreed)
	p.dirty.push(it)
	items, bytes := p.dirtyItems.Inc(), p.dirtyBytes.Add(n)
	if prompt || items >= int64(p.cfg.FlushItems) || bytes >= p.cfg.FlushPinned {
		p.flush.kick()
	}
}

// doom leaves an item whose objects cannot be trusted, or cannot be invalidated by a request, to recovery. The caller
// owns it, and holds a reference to the device.
func (p *pool) doom(it *item) {
	gen, _ := it.load()
	it.set(gen, stStale)
	if b := it.batch; b != nil {
		it.batch = nil
		b.leave()
	}
	p.stale.push(it)
	p.recovery.kick()
}

// settle tells everybody who waits for the memory of it, which nothing touches any more (err: which cannot be
// given back).
func (p *pool) settle(it *item, err error) {
	p.unpin(it.pinned)
	it.pinned = 0
	if over := it.over; over != nil {
		it.over = nil
		over.unuse()
	}
	done := it.done
	it.done = nil
	p.mu.Lock()
	dones := it.dones
	it.dones = nil
	it.lives++
	p.mu.Unlock()
	for _, f := range dones {
		f(err)
	}
	if done != nil {
		done(err)
	}
}

// PoolStats are the counters of a pool under the kernel's names (rds-protocol spec 6.2), and what they leave out.
type PoolStats struct {
	Alloc    uint64 // regions allocated
	Free     uint64 // regions given back to the device
	Used     uint64 // memory mapped, since the beginning
	Flush    uint64 // runs of the flush worker
	Wait     uint64 // requests that waited for room
	Depleted uint64 // requests that met a bound
	Reused   uint64 // requests that took a region that was ready

	AllocErrors    uint64 // allocations the device refused
	Recovered      uint64 // regions replaced by the recovery worker
	RecoveryErrors uint64 // attempts at it that failed

	MaxItems  int // bounds: regions, pages of each, bytes
	MaxPages  int
	MaxPinned int64

	Items  int   // places in use or kept
	Mapped int64 // regions that owners have
	Ready  int64 // regions with the device's objects on the free list
	Dirty  int64 // regions freed and still mapped
	Pinned int64 // bytes
}

func (p *pool) snapshot() PoolStats {
	p.mu.Lock()
	items := p.items
	p.mu.Unlock()
	c := &p.stats
	return PoolStats{
		Alloc: c.alloc.Load(), Free: c.destroyed.Load(), Used: c.mapped.Load(), Flush: c.flushes.Load(), Wait: c.waits.Load(),
		Depleted: c.depleted.Load(), Reused: c.reused.Load(), AllocErrors: c.allocErrors.Load(), Recovered: c.recovered.Load(),
		RecoveryErrors: c.recoveryErrors.Load(), MaxItems: p.cfg.MaxItems, MaxPages: p.maxPages, MaxPinned: p.cfg.MaxPinned, Items: items, Mapped: p.used.Load(), Ready: p.freeItems.Load(),
		Dirty: p.dirtyItems.Load(), Pinned: p.pinned.Load(),
	}
}
