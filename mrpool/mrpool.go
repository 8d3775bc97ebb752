package mrpool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/verbs"
)

// Pages of a region of each pool, and the kernel's bounds on regions (rds-protocol spec 3.10).
const (
	SmallPages = 3
	LargePages = 257

	defaultSmallItems = 348160
	defaultLargeItems = 4096
	maxItems          = 1 << 21 // what a request's identifier has bits for
)

// DefaultMaxWait bounds MapWait and Register at a limit.
const DefaultMaxWait = time.Second

// Ref counts references to the device the pools belong to.
type Ref interface {
	Get() // the caller holds one
	Put() // may be the last: it waits for nothing the pools do
}

// PoolConfig bounds one pool. Zero values are the kernel's figures, in so far as the device has that much.
type PoolConfig struct {
	MaxItems  int   // regions
	MaxPinned int64 // bytes of memory pinned by them; 0: MaxItems full ones
	// FlushItems and FlushPinned, of regions freed and still mapped, start the flush worker; 0: a fifth of MaxItems, a
	// quarter of all they could pin.
	FlushItems  int
	FlushPinned int64
	MaxFree     int // regions kept ready; 0: all
}

// Config are the parameters of New.
type Config struct {
	PD     verbs.PD
	Attr   verbs.DeviceAttr
	Epoch  *epoch.Domain // nil: no reader looks regions up under one
	Ref    Ref           // nil: none
	Logger hclog.Logger  // nil: none

	Small, Large PoolConfig
	MaxPinned    int64         // bytes pinned by both pools; 0: the sum of theirs, at most Attr.MaxMRBytes
	MaxWait      time.Duration // of MapWait and Register for room; 0: DefaultMaxWait
}

// Pools is the registered memory of one device. Make one with New.
type Pools struct {
	cfg        Config
	pd         verbs.PD
	ref        Ref
	logger     hclog.Logger
	ways       [numKinds]way
	hasFastReg bool
	mwType     verbs.MWType // of windows used; 0: none

	small, large *pool
	pinned       atomic.Int64 // bytes, both pools
	room         gate
	misuse       atomic.Uint64
	strayWCs     atomic.Uint64
	closed       atomic.Bool

	scratch struct { // what a nudge maps: made for the first, pinned until Close
		sync.Mutex
		page [][]byte
		pin  runtime.Pinner
	}

	mu    sync.Mutex
	qps   map[*QP]struct{}
	lists [2][]verbs.PageList // of queue pairs that are gone, for new ones

	closing sync.Mutex    // serialises Close
	leaving chan struct{} // closed by Leave
	left    sync.Once
}

type noRef struct{}

func (noRef) Get() {}
func (noRef) Put() {}

// New makes the pools of a device; they are empty. It opens nothing: there is nothing to close on error.
func New(cfg Config) (*Pools, error) {
	if cfg.PD == nil {
		return nil, fmt.Errorf("memory region pools: no protection domain: %w", verbs.ErrInvalid)
	}
	if cfg.Ref == nil {
		cfg.Ref = noRef{}
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.MaxWait == 0 {
		cfg.MaxWait = DefaultMaxWait
	}
	ps := &Pools{cfg: cfg, pd: cfg.PD, ref: cfg.Ref, logger: cfg.Logger, qps: make(map[*QP]struct{}), leaving: make(chan struct{})}
	a := &cfg.Attr
	ps.ways = [numKinds]way{byFastReg: &fastReg{ps}, byWindow: &window{ps}, byRegistration: &registration{ps}}
	largePages := LargePages
	if a.Caps&verbs.CapMemMgtExtensions != 0 && a.MaxFastRegPageListLen >= SmallPages {
		ps.hasFastReg = true
		largePages = min(largePages, a.MaxFastRegPageListLen)
	}
	switch { // 2B checks the PD too
	case a.Caps&verbs.CapMW2B != 0:
		ps.mwType = verbs.MWType2B
	case a.Caps&verbs.CapMW2A != 0:
		ps.mwType = verbs.MWType2A
	}
	devItems := a.MaxMR / 2
	if devItems <= 0 {
		devItems = math.MaxInt
	}
	ps.small = ps.newPool("8k", 0, SmallPages, cfg.Small, min(defaultSmallItems, devItems))
	ps.large = ps.newPool("1m", 1, largePages, cfg.Large, min(defaultLargeItems, devItems))
	if ps.cfg.MaxPinned == 0 {
		ps.cfg.MaxPinned = ps.small.cfg.MaxPinned + ps.large.cfg.MaxPinned
		if a.MaxMRBytes != 0 && uint64(ps.cfg.MaxPinned) > a.MaxMRBytes {
			ps.cfg.MaxPinned = int64(a.MaxMRBytes)
		}
	}
	return ps, nil
}

func (ps *Pools) newPool(name string, class, pages int, cfg PoolConfig, items int) *pool {
	if cfg.MaxItems <= 0 {
		cfg.MaxItems = items
	}
	cfg.MaxItems = min(cfg.MaxItems, maxItems)
	most := int64(cfg.MaxItems) * int64(pages) * verbs.PageSize
	if cfg.MaxPinned <= 0 {
		cfg.MaxPinned = most
	}
	if cfg.FlushItems <= 0 {
		cfg.FlushItems = max(1, cfg.MaxItems/5)
	}
	if cfg.FlushPinned <= 0 {
		cfg.FlushPinned = max(1, most/4)
	}
	if cfg.MaxFree <= 0 {
		cfg.MaxFree = cfg.MaxItems
	}
	p := &pool{ps: ps, name: name, class: class, maxPages: pages, cfg: cfg}
	p.flush = newWorker(ps.ref, p.flushRound)
	p.recovery = newWorker(ps.ref, p.recoveryRound)
	return p
}

func (ps *Pools) pools() [2]*pool { return [2]*pool{ps.small, ps.large} }

// queues returns the queue pairs in use.
func (ps *Pools) queues() []*QP {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	qs := make([]*QP, 0, len(ps.qps))
	for q := range ps.qps {
		qs = append(qs, q)
	}
	return qs
}

// scratchPage is one page of memory that matters to nobody.
func (ps *Pools) scratchPage() [][]byte {
	ps.scratch.Lock()
	defer ps.scratch.Unlock()
	if ps.scratch.page == nil {
		b := make([]byte, 2*verbs.PageSize)
		off := -uintptr(unsafe.Pointer(&b[0])) & (verbs.PageSize - 1)
		ps.scratch.page = [][]byte{b[off : off+verbs.PageSize : off+verbs.PageSize]}
		ps.scratch.pin.Pin(&b[0])
	}
	return ps.scratch.page
}

// Register registers one contiguous piece of memory for no queue pair in particular. mem is memory outside the Go
// heap, or pinned by the caller until it was given back and that was proven. It may be of any length that the bound on
// pinned bytes allows. At a bound it starts a flush and waits, at most Config.MaxWait; then the error matches
// ErrPoolExhausted, as does ctx's when that ended the wait. Other errors are PD.RegMR's and ctx's. The caller holds a reference to the device. May wait.
func (ps *Pools) Register(ctx context.Context, mem []byte, iova uint64, access verbs.Access) (Mapping, error) {
	if ps.cfg.Epoch != nil {
		if err := ps.cfg.Epoch.Throttle(ctx); err != nil {
			return Mapping{}, err
		}
	}
	segs := [1][]byte{mem}
	r := Request{Segs: segs[:], IOVA: iova, Access: access}
	s, err := ps.shapeOf(&r, false)
	if err != nil {
		return Mapping{}, err
	}
	return ps.wait(ctx, s.pool, func() (Mapping, error) { return ps.register(s, &r) })
}

// register maps r without a request.
func (ps *Pools) register(s shape, r *Request) (Mapping, error) {
	p := s.pool
	if ps.closed.Load() {
		return Mapping{}, fmt.Errorf("memory region pool %s: %w", p.name, ErrClosed)
	}
	bytes := int64(s.pages) * verbs.PageSize
	if err := p.pin(bytes); err != nil {
		return Mapping{}, err
	}
	it, err := p.acquire(byRegistration)
	if err != nil {
		p.unpinQuietly(bytes)
		return Mapping{}, err
	}
	begun := *r // what is handed to a way is the heap's: mapping on a queue pair does without
	if _, err := ps.ways[byRegistration].begin(nil, it, &begun, nil, nil); err != nil {
		p.unpinQuietly(bytes)
		p.putEmpty(it)
		p.stats.allocErrors.Inc()
		return Mapping{}, fmt.Errorf("memory region pool %s: %w", p.name, err)
	}
	p.stats.alloc.Inc()
	return p.mapped(it, nil, s, r), nil
}

// attempt is one try to map by somebody who does not wait. What it held for a moment may be what somebody who does
// has just missed.
func (ps *Pools) attempt(try func() (Mapping, error)) (Mapping, error) {
	m, err := try()
	if err != nil {
		ps.room.open()
	}
	return m, err
}

// mayWait refuses the handlers' goroutines what may wait: see epoch.Domain.MayWait.
func (ps *Pools) mayWait(op string) {
	if ps.cfg.Epoch != nil {
		ps.cfg.Epoch.MayWait(op)
	}
}

// wait calls try until it does not meet a bound, at most MaxWait long.
func (ps *Pools) wait(ctx context.Context, p *pool, try func() (Mapping, error)) (Mapping, error) {
	ps.mayWait("memory region pools: a request that waits")
	m, err := ps.attempt(try)
	if !atBound(err) {
		return m, err
	}
	p.stats.waits.Inc()
	t := time.NewTimer(ps.cfg.MaxWait)
	defer t.Stop()
	ps.room.arrive()
	defer ps.room.depart()
	for {
		opened := ps.room.next() // before the try: what is given back after it is noticed
		// One after the other: were they to take from each other for a moment, and to tell each other so, they would never
		// sleep.
		ps.room.turn.Lock()
		m, err = try()
		ps.room.turn.Unlock()
		if !atBound(err) {
			return m, err
		}
		select {
		case <-opened:
		case <-t.C:
			return Mapping{}, err
		case <-ctx.Done():
			return Mapping{}, fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

func atBound(err error) bool {
	return err != nil && (errors.Is(err, ErrPoolExhausted) || errors.Is(err, ErrQueueFull))
}

// Flush invalidates and unpins everything that was freed before the call, and returns when that has been tried; a region
// whose queue is stuck may be left. The caller holds a reference to the device. May wait.
func (ps *Pools) Flush(ctx context.Context) error {
	ps.mayWait("memory region pools: Flush")
	for _, p := range ps.pools() {
		select {
		case <-p.flush.round():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// StartFlush is Flush that does not wait, and does nothing if nothing was freed. The caller holds a reference to the device.
func (ps *Pools) StartFlush() {
	for _, p := range ps.pools() {
		if p.dirtyItems.Load() > 0 {
			p.flush.kick()
		}
	}
}

// Invalidated says that a peer has invalidated the region of key (a completion with WCWithInvalidate), and reports
// whether it is one of ours that is mapped. The owner gives it back as always.
func (ps *Pools) Invalidated(key verbs.RKey) bool {
	for _, p := range ps.pools() {
		p.mu.Lock()
		n := p.items
		p.mu.Unlock()
		for i := range n {
			it := p.item(uint32(i))
			gen, s := it.load()
			if (s == stMapped || s == stFreed) && verbs.RKey(it.key.Load()) == key {
				it.gone.Store(gen) // if it has moved on meanwhile, this is about none of its lives
				return true
			}
		}
	}
	return false
}

// Leave says that the device is on its way out, and Close will follow when the last reference to it is gone. The recovery worker,
// which holds one, does not go on with regions that the device does not take back: they are left for Close. Everything else
// works as before. It does not wait.
func (ps *Pools) Leave() { ps.left.Do(func() { close(ps.leaving) }) }

// Close ends the pools: it cancels the workers, recovery first, waits for a run in progress, and gives all regions back
// to the device itself. It waits for no queue: queue pairs have been closed, and mappings given back, before. What has
// not been is closed and given back here, and the error names it. A region the device does not take back is
// in the error too, its owner is told by the done callback; Close may be called again for those. nil when all
// is done. The caller is inside no epoch. May wait, as long as there is a reader of the epoch that stays inside: the memory may be
// in use.
func (ps *Pools) Close() error {
	ps.mayWait("memory region pools: Close")
	ps.closing.Lock()
	defer ps.closing.Unlock()
	// 1. Nothing new.
	first := !ps.closed.Swap(true)
	ps.room.open()
	// 2. Recovery first: a flush may leave regions to it, and it would allocate what step 5 destroys.
	for _, p := range ps.pools() {
		p.recovery.cancel()
	}
	for _, p := range ps.pools() {
		p.flush.cancel()
	}
	var errs []error
	// 3. Queue pairs first: what they have outstanding is not proven any more.
	for _, q := range ps.queues() {
		errs = append(errs, fmt.Errorf("memory region pools: queue pair %d is open", q.qp.Num()))
		q.Close()
	}
	// 4. One grace period for all.
	if ps.cfg.Epoch != nil && ps.pinned.Load() != 0 {
		ps.cfg.Epoch.Synchronize()
	}
	// 5. The flush, inline: regions over which there are windows come last.
	for _, k := range closeOrder {
		for _, p := range ps.pools() {
			errs = append(errs, p.closeKind(k, first)...)
		}
	}
	for _, p := range ps.pools() {
		p.freeItems.Store(0)
		p.dirtyItems.Store(0)
		p.dirtyBytes.Store(0)
	}
	ps.mu.Lock()
	lists := ps.lists
	ps.lists = [2][]verbs.PageList{}
	ps.mu.Unlock()
	for class := range lists {
		for _, pl := range lists[class] {
			if err := pl.Close(); err != nil {
				errs = append(errs, fmt.Errorf("memory region pools: page list: %w", err))
				ps.mu.Lock()
				ps.lists[class] = append(ps.lists[class], pl)
				ps.mu.Unlock()
			}
		}
	}
	ps.scratch.Lock()
	ps.scratch.page = nil
	ps.scratch.pin.Unpin()
	ps.scratch.Unlock()
	return errors.Join(errs...)
}

// closeOrder is the order in which regions can be destroyed: windows before what they are over.
var closeOrder = [numKinds]kind{byFastReg, byWindow, byRegistration}

// closeKind destroys what the pool has of one kind, wherever it is: the workers are cancelled and the queues closed. audit
// names what owners have not given back.
func (p *pool) closeKind(k kind, audit bool) (errs []error) {
	p.mu.Lock()
	n := p.items
	p.mu.Unlock()
	for i := range n {
		it := p.item(uint32(i))
		if it.kind != k {
			continue
		}
		gen, s := it.load()
		if audit && (s == stMapped || s == stLost || s == stDead) {
			errs = append(errs, fmt.Errorf("memory region pool %s: key %#x is mapped%s", p.name, it.key.Load(), it.where()))
		}
		if s == stMapped && it.move(gen, stMapped, stLost) {
			s = stLost
		}
		if it.mr == nil && it.mw == nil {
			continue
		}
		if err := it.destroy(); err != nil {
			errs = append(errs, fmt.Errorf("memory region pool %s: key %#x: %w", p.name, it.key.Load(), err))
			p.settle(it, err)
			continue
		}
		p.stats.destroyed.Inc()
		p.settle(it, nil)
		if s == stLost {
			p.mu.Lock()
			it.move(gen, stLost, stDead)
			p.mu.Unlock()
		} else {
			it.set(gen, stEmpty)
		}
	}
	return errs
}

// Stats are the counters of the pools of a device.
type Stats struct {
	Small, Large PoolStats
	Pinned       int64  // bytes, both pools
	Misuse       uint64 // mappings given back that were none
	StrayWCs     uint64 // completions of requests that are not outstanding
}

// Stats is a snapshot of the counters.
func (ps *Pools) Stats() Stats {
	return Stats{Small: ps.small.snapshot(), Large: ps.large.snapshot(), Pinned: ps.pinned.Load(), Misuse: ps.misuse.Load(), StrayWCs: ps.strayWCs.Load()}
}

// Limits are the bounds of the pool of large regions: how many, and pages of each.
func (ps *Pools) Limits() (items, pages int) { return ps.large.cfg.MaxItems, ps.large.maxPages }

// Each calls fn for the counters that the kernel has, under its names (rds-protocol spec 6.2).
func (s *Stats) Each(fn func(name string, value uint64)) {
	for _, p := range []struct {
		name string
		s    *PoolStats
	}{{"8k", &s.Small}, {"1m", &s.Large}} {
		pre := "ib_rdma_mr_" + p.name + "_"
		fn(pre+"alloc", p.s.Alloc)
		fn(pre+"free", p.s.Free)
		fn(pre+"used", p.s.Used)
		fn(pre+"pool_flush", p.s.Flush)
		fn(pre+"pool_wait", p.s.Wait)
		fn(pre+"pool_depleted", p.s.Depleted)
	}
	fn("ib_rdma_mr_8k_reused", s.Small.Reused)
	fn("ib_rdma_mr_1m_reused", s.Large.Reused)
}

// gate lets callers wait for something to be given back, at the price of one load to those who give.
type gate struct {
	waiting atomic.Int32
	turn    sync.Mutex // whose try it is
	mu      sync.Mutex
	c       chan struct{}
}

func (g *gate) arrive() { g.waiting.Inc() }
func (g *gate) depart() { g.waiting.Dec() }

// next is closed by the next open. The caller has arrived.
func (g *gate) next() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.c == nil {
		g.c = make(chan struct{})
	}
	return g.c
}

func (g *gate) open() {
	if g.waiting.Load() == 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.c != nil {
		close(g.c)
		g.c = nil
	}
}
