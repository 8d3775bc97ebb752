package mrpool

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// Bounds on what the pools may have outstanding on a queue.
const (
	minSendWRs = 4
	maxSendWRs = 1 << 15 // half of what a request's identifier tells apart
	// maxUnsignaled is how many requests go without a completion: the kernel's max_unsignaled_wr (rds-protocol spec
	// 6.3). A completion costs about what a request does; twice as many would save a thirtieth of both.
	maxUnsignaled = 16
	postBatch     = 16 // invalidations per PostSend
	settleBatch   = 32 // requests proven per hold of the lock
)

// Identifiers of work requests: what is told apart, and how many bits it has.
//
//	63     ours
//	62     invalidation
//	61     pool
//	40-60  item
//	16-39  generation
//	0-15   place in the queue
const (
	// WRBit is set in the identifiers of the pools' work requests, and in no other.
	WRBit     = uint64(1) << 63
	wrInv     = uint64(1) << 62
	wrClass   = 61
	wrItem    = 40
	wrGen     = 16
	wrGenMask = 1<<24 - 1
	wrSeqMask = 1<<16 - 1
)

func wrID(it *item, gen uint64, inv bool, seq uint32) uint64 {
	id := WRBit | uint64(it.pool.class)<<wrClass | uint64(it.index)<<wrItem | gen&wrGenMask<<wrGen | uint64(seq)&wrSeqMask
	if inv {
		id |= wrInv
	}
	return id
}

// op is a request posted and not yet proven.
type op struct {
	id     uint64
	it     *item
	gen    uint64
	inv    bool
	pages  verbs.PageList // fast registration: free when the request is done
	pinned int64          // invalidation: what it gives back
	done   func(error)
	over   *item
	batch  *batch
	lives  int // item.lives
}

// QP is a queue pair that memory is mapped on: the record of the requests outstanding there, and the regions that
// may be used again there before they may anywhere else.
type QP struct {
	ps       *Pools
	qp       verbs.QP
	limit    uint32 // requests outstanding
	interval int

	// post is the right to post: requests are recorded in the order they are posted in. Map takes it, also
	// while it is held across a PostSend of another goroutine; the rest try it, and whoever gives it up looks for what
	// they left.
	post       sync.Mutex
	wrs        [postBatch]verbs.SendWR
	req        Request // being made
	fr         verbs.FastReg
	bind       verbs.MWBind
	pl         verbs.PageList // for the request being made
	unsignaled int            // requests since the last that gives a completion

	filled atomic.Uint32 // requests whose record is complete, counted from the beginning
	posted atomic.Uint32 // requests posted, counted from the beginning
	proven atomic.Uint32 // advice
	queued atomic.Int32  // len(pending): advice

	mu         sync.Mutex
	ring       []op   // made with the first mapping; a power of two
	head, tail uint32 // of the requests recorded; counted from the beginning
	pending    []*item
	own        [2][numKinds]ownList
	lists      [2][]verbs.PageList
	broken     bool // a request failed: the rest will, or the queue pair is closed
	closed     bool
}

// NewQP makes the pools' side of a queue pair, which has sendWRs requests of its send queue (and as many
// completions) for them. Its send completion handler gives completions to Completion. Close it when the queue pair
// was destroyed, or drained in ERR.
func (ps *Pools) NewQP(qp verbs.QP, sendWRs int) *QP {
	n := min(max(sendWRs, minSendWRs), maxSendWRs)
	q := &QP{ps: ps, qp: qp, limit: uint32(n), interval: min(maxUnsignaled, n/4)}
	ps.mu.Lock()
	ps.qps[q] = struct{}{}
	ps.mu.Unlock()
	return q
}

// Map maps r and returns when the request for it is posted: requests posted behind it may use the key, and so may a
// peer who is told by one of them. A failure leaves the queue pair as it was:
//
//	ErrPoolExhausted  a bound is reached; a flush has been started
//	ErrTooLarge       more pages than a region takes
//	ErrQueueFull      sendWRs requests are outstanding: completions make room
//	ErrQPLost         a request has failed, or Close was called
//
// verbs.ErrInvalid, verbs.ErrNotSupported, ErrNotMapped (Request.Over), and what the provider says to an
// allocation or a post. The caller holds a reference to the device. Does not wait.
func (q *QP) Map(r Request) (Mapping, error) {
	s, err := q.ps.shapeOf(&r, true)
	if err != nil {
		return Mapping{}, err
	}
	m, err := q.mapAs(s, &r)
	if err != nil {
		q.ps.room.open() // see Pools.attempt
	}
	return m, err
}

// MapWait is Map that waits at a bound for something to be given back, at most Config.MaxWait. May wait.
func (q *QP) MapWait(ctx context.Context, r Request) (Mapping, error) {
	s, err := q.ps.shapeOf(&r, true)
	if err != nil {
		return Mapping{}, err
	}
	return q.ps.wait(ctx, s.pool, func() (Mapping, error) { return q.mapAs(s, &r) })
}

func (q *QP) mapAs(s shape, r *Request) (Mapping, error) {
	if s.kind == byRegistration {
		return q.ps.register(s, r)
	}
	p := s.pool
	bytes := int64(s.pages) * verbs.PageSize
	if err := p.pin(bytes); err != nil {
		return Mapping{}, err
	}
	q.post.Lock()
	q.req = *r
	m, err := q.mapPosting(s)
	q.post.Unlock()
	if err != nil {
		p.unpinQuietly(bytes)
	}
	q.pump()
	return m, err
}

// mapPosting maps q.req. For who has the right to post.
func (q *QP) mapPosting(s shape) (Mapping, error) {
	p, r := s.pool, &q.req
	defer func() { *r = Request{} }()
	if q.queued.Load() > 0 && !q.postPending() { // they came first
		q.stuck()
	}
	q.mu.Lock()
	if q.broken {
		q.mu.Unlock()
		return Mapping{}, fmt.Errorf("map: %w", ErrQPLost)
	}
	if q.tail-q.head >= q.limit {
		q.mu.Unlock()
		return Mapping{}, fmt.Errorf("map: %w", ErrQueueFull)
	}
	if q.ring == nil {
		q.ring = make([]op, 1<<bits.Len32(q.limit-1))
	}
	it := q.own[p.class][s.kind].popLast()
	if it != nil {
		gen, _ := it.load()
		it.set(gen, stFree) // not on the list: the proof of its invalidation is nobody's business now
	}
	if s.kind == byFastReg {
		if n := len(q.lists[p.class]); n > 0 {
			q.pl = q.lists[p.class][n-1]
			q.lists[p.class] = q.lists[p.class][:n-1]
		}
	}
	seq := q.tail
	o := &q.ring[seq&uint32(len(q.ring)-1)]
	q.tail++
	q.mu.Unlock()

	own := it != nil
	var gen uint64
	var err error
	if own {
		p.stats.reused.Inc()
		gen, _ = it.load()
	} else if it, err = p.acquire(s.kind); err != nil {
		q.retract(p)
		return Mapping{}, err
	}
	wr := &q.wrs[0]
	*wr = verbs.SendWR{}
	*o = op{it: it}
	key := it.key.Load()
	if _, err = q.ps.ways[s.kind].begin(q, it, r, o, wr); err != nil {
		q.retract(p)
		q.takeBack(it, gen, own)
		return Mapping{}, err
	}
	m := p.mapped(it, q, s, r)
	o.gen, o.id = m.gen, wrID(it, m.gen, false, seq)
	wr.ID = o.id
	if q.unsignaled++; q.unsignaled >= q.interval {
		q.unsignaled = 0
		wr.Flags = verbs.SendSignaled
	}
	q.filled.Store(seq + 1)
	if _, err = q.qp.PostSend(q.wrs[:1]); err == nil {
		q.posted.Store(seq + 1)
		return m, nil
	}
	// It is as if it had never been tried: nobody has seen m.
	q.unsignaled = q.interval // the next gives a completion
	q.retract(p)
	p.unmapped(it, key)
	q.takeBack(it, gen, own)
	return Mapping{}, fmt.Errorf("map: %w", err)
}

// retract removes the newest record, which was not posted, and keeps the page list. For who has the right to post.
func (q *QP) retract(p *pool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.tail--
	q.filled.Store(q.tail)
	o := &q.ring[q.tail&uint32(len(q.ring)-1)]
	if o.pages != nil {
		q.pl = o.pages
	}
	*o = op{}
	if q.pl != nil {
		q.lists[p.class] = append(q.lists[p.class], q.pl)
		q.pl = nil
	}
}

// takeBack is for an item that was to be mapped and is not: own tells that it came from this queue's list, when
// its generation was gen. For who has the right to post.
func (q *QP) takeBack(it *item, gen uint64, own bool) {
	p := it.pool
	if over := it.over; over != nil {
		it.over = nil
		over.unuse()
	}
	if !own {
		p.putFree(it)
		return
	}
	q.mu.Lock()
	broken, proven := q.broken, int32(q.head-it.invSeq) > 0
	if !broken && !proven {
		it.set(gen, stInvalid)
		// Nothing was added since it was taken from the end: that takes the right to post.
		q.own[p.class][it.kind].pushLast(it, len(q.ring))
	}
	q.mu.Unlock()
	switch {
	case broken:
		p.doom(it)
	case proven:
		p.putFree(it)
	}
}

// pageList returns a list that names segs. For who has the right to post.
func (q *QP) pageList(p *pool, segs [][]byte) (verbs.PageList, error) {
	if pl := q.pl; pl != nil {
		err := pl.Set(segs)
		if err == nil {
			q.pl = nil
			return pl, nil
		}
		if !errors.Is(err, verbs.ErrBusy) {
			return nil, err // retract keeps it
		}
		// The provider has a use for it still, although its request is done: not for us now.
		q.pl = nil
		q.ps.keepLists(p.class, pl)
	} else if pl = q.ps.takeList(p.class); pl != nil {
		if pl.Set(segs) == nil {
			return pl, nil
		}
		q.ps.keepLists(p.class, pl)
	}
	pl, err := q.ps.pd.AllocPageList(p.maxPages)
	if err != nil {
		p.stats.allocErrors.Inc()
		return nil, fmt.Errorf("memory region pool %s: page list: %w", p.name, err)
	}
	if err := pl.Set(segs); err != nil {
		q.pl = pl
		return nil, err
	}
	return pl, nil
}

func (ps *Pools) keepLists(class int, pls ...verbs.PageList) {
	ps.mu.Lock()
	ps.lists[class] = append(ps.lists[class], pls...)
	ps.mu.Unlock()
}

// takeList takes the list that was kept longest, nil when there is none.
func (ps *Pools) takeList(class int) verbs.PageList {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	l := ps.lists[class]
	if len(l) == 0 {
		return nil
	}
	pl := l[0]
	ps.lists[class] = slices.Delete(l, 0, 1)
	return pl
}

// enqueue has the key of it, which is the caller's, invalidated by a request. It reports whether that is possible;
// pump posts it.
func (q *QP) enqueue(it *item) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.broken {
		return false
	}
	q.pending = append(q.pending, it)
	q.queued.Store(int32(len(q.pending)))
	return true
}

// lost reports whether no request can be posted any more.
func (q *QP) lost() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.broken
}

// pump posts the invalidations that are pending, as far as there is room, unless somebody is posting, who then does it.
func (q *QP) pump() {
	if !q.tryPump() {
		q.stuck()
	}
}

// tryPump is pump for who tries again. It reports false if the queue refused.
func (q *QP) tryPump() bool {
	for look := q.queued.Load() > 0; look && q.post.TryLock(); look = q.ready() {
		ok := q.postPending()
		q.post.Unlock() // and look again: who tried in vain meanwhile has gone
		if !ok {
			return false
		}
	}
	return true
}

// stuck has the recovery worker try again.
func (q *QP) stuck() {
	p := q.ps.small
	p.mu.Lock()
	if !slices.Contains(p.stuck, q) {
		p.stuck = append(p.stuck, q)
	}
	p.mu.Unlock()
	p.recovery.kick()
}

// ready reports whether there is an invalidation to be posted, and room.
func (q *QP) ready() bool {
	if q.queued.Load() == 0 {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.pending) > 0 && q.tail-q.head < q.limit
}

// postPending is pump by who has the right to post. It reports whether the queue took what it was given; what it
// refused stays pending.
func (q *QP) postPending() bool {
	for {
		q.mu.Lock()
		n := q.fillLocked()
		first := q.tail - uint32(n)
		q.mu.Unlock()
		if n == 0 {
			return true
		}
		q.filled.Store(first + uint32(n))
		got, err := q.qp.PostSend(q.wrs[:n])
		q.posted.Store(first + uint32(got))
		if err == nil && q.queued.Load() == 0 {
			return true
		}
		if err == nil {
			continue
		}
		// Recovery could end these keys without the queue. But earlier requests for the same regions may be in it, and
		// fail then, and the queue with them. So recovery has it try again until it is lost.
		q.unsignaled = q.interval
		q.mu.Lock()
		var back [postBatch]*item
		for i := n; i > got; i-- {
			q.tail--
			o := &q.ring[q.tail&uint32(len(q.ring)-1)]
			if o.batch == nil {
				q.own[o.it.pool.class][o.it.kind].popLast()
			}
			o.restore()
			back[i-1] = o.it
			*o = op{}
		}
		q.filled.Store(q.tail)
		broken := q.broken
		if !broken {
			q.pending = slices.Insert(q.pending, 0, back[got:n]...)
			q.queued.Store(int32(len(q.pending)))
		}
		q.mu.Unlock()
		if broken {
			for _, it := range back[got:n] {
				it.pool.doom(it)
			}
			return false
		}
		return false
	}
}

// fillLocked makes requests of what is pending, at most a batch, and returns how many. The regions are on the list of
// this queue from now on; who could take one there needs the right to post, which the caller has.
func (q *QP) fillLocked() int {
	n := min(len(q.pending), postBatch, int(q.limit-(q.tail-q.head)))
	if n <= 0 {
		return 0
	}
	mask := uint32(len(q.ring) - 1)
	waiter := -1 // the last that somebody waits for
	for i, it := range q.pending[:n] {
		gen, _ := it.load()
		seq := q.tail
		q.tail++
		o := &q.ring[seq&mask]
		*o = op{id: wrID(it, gen, true, seq), it: it, gen: gen, inv: true, pinned: it.pinned, done: it.done, over: it.over, batch: it.batch, lives: it.lives}
		it.pinned, it.done, it.over, it.batch = 0, nil, nil, nil
		it.invSeq = seq
		if o.batch == nil {
			q.own[it.pool.class][it.kind].pushLast(it, len(q.ring))
		}
		wr := &q.wrs[i]
		*wr = verbs.SendWR{ID: o.id, Opcode: verbs.OpLocalInv, InvalidateRKey: verbs.RKey(it.key.Load())}
		if q.unsignaled++; q.unsignaled >= q.interval {
			q.unsignaled = 0
			wr.Flags = verbs.SendSignaled
			waiter = -1
		} else if o.done != nil || o.batch != nil || it.kind == byWindow { // a nudge cannot help windows
			waiter = i
		}
	}
	if waiter >= 0 {
		q.wrs[waiter].Flags = verbs.SendSignaled
		q.unsignaled = n - 1 - waiter
	}
	if n == len(q.pending) {
		clear(q.pending)
		q.pending = q.pending[:0]
	} else {
		q.pending = slices.Delete(q.pending, 0, n)
	}
	q.queued.Store(int32(len(q.pending)))
	return n
}

// restore gives back to the item what the request was to give back.
func (o *op) restore() {
	o.it.pinned, o.it.done, o.it.over, o.it.batch = o.pinned, o.done, o.over, o.batch
}

// Mark is the position of the pools' requests in the queue: the caller reads it, then posts a signaled request of its
// own, and gives it to Passed when that has completed successfully.
func (q *QP) Mark() uint32 { return q.posted.Load() }

// Passed says that a request posted after mark was read has completed successfully: so have the pools' before.
func (q *QP) Passed(mark uint32) {
	if int32(mark-q.proven.Load()) > 0 {
		q.prove(mark)
	}
}

// Completion takes a completion of the send queue and reports whether it was one of the pools'. It calls done
// functions. Does not wait.
func (q *QP) Completion(wc *verbs.WC) bool {
	if wc.ID&WRBit == 0 {
		return false
	}
	q.mu.Lock()
	seq := q.head + (uint32(wc.ID)-q.head)&wrSeqMask
	known := q.ring != nil && seq-q.head < q.filled.Load()-q.head && q.ring[seq&uint32(len(q.ring)-1)].id == wc.ID
	q.mu.Unlock()
	switch {
	case !known:
		q.ps.strayWCs.Inc()
	case wc.Status == verbs.WCSuccess:
		q.prove(seq + 1)
	default:
		q.prove(seq) // those without a completion before it were executed
		q.fail(seq + 1)
	}
	return true
}

// settled is what follows from requests that are done: it is acted upon without the lock.
type settled struct {
	n    int // requests
	free [settleBatch]*item
	done [settleBatch]func(error)
	over [settleBatch]*item
	late [settleBatch]*item // of a flush that has not waited for them

	nFree, nDone, nOver, nLate int
}

// prove takes the requests before end out of the record: they have executed.
func (q *QP) prove(end uint32) {
	for more := true; more; {
		var s settled
		q.mu.Lock()
		for s.n < settleBatch && int32(end-q.head) > 0 {
			q.proveLocked(&s)
		}
		more = int32(end-q.head) > 0
		q.proven.Store(q.head)
		q.mu.Unlock()
		q.act(&s)
	}
	q.ps.room.open()
	q.pump()
}

func (q *QP) proveLocked(s *settled) {
	o := &q.ring[q.head&uint32(len(q.ring)-1)]
	q.head++
	s.n++
	it := o.it
	p := it.pool
	if o.pages != nil {
		q.lists[p.class] = append(q.lists[p.class], o.pages)
	}
	switch {
	case !o.inv:
	case o.batch != nil:
		b := o.batch
		o.batch = nil
		o.restore()
		if !b.prove(it) {
			s.late[s.nLate] = it
			s.nLate++
		}
	default:
		p.unpin(o.pinned)
		if o.done != nil {
			s.done[s.nDone] = o.done
			s.nDone++
		}
		if o.over != nil {
			s.over[s.nOver] = o.over
			s.nOver++
		}
		if it.is(o.gen, stInvalid) { // not used again: it is the oldest on the list
			q.takeOldest(it)
			s.free[s.nFree] = it
			s.nFree++
		}
	}
	*o = op{}
}

// takeOldest takes it, the first, from this queue's list.
func (q *QP) takeOldest(it *item) {
	if q.own[it.pool.class][it.kind].popFirst() != it {
		panic("BUG: mrpool: a region invalidated on a queue pair is not the oldest on its list")
	}
}

// act does what could not be done under the lock.
func (q *QP) act(s *settled) {
	for _, it := range s.free[:s.nFree] {
		it.pool.putFree(it)
	}
	for _, it := range s.late[:s.nLate] {
		it.pool.settle(it, nil)
		it.pool.putFree(it)
	}
	for _, over := range s.over[:s.nOver] {
		over.unuse()
	}
	for _, f := range s.done[:s.nDone] {
		f(nil)
	}
}

// fail takes the requests before end out of the record: whether they have executed is not known, and none behind them
// will. The queue pair is lost.
func (q *QP) fail(end uint32) {
	var lost, doomed []*item
	var tells []func(error)
	q.mu.Lock()
	first := !q.broken
	q.broken = true
	for int32(end-q.head) > 0 {
		o := &q.ring[q.head&uint32(len(q.ring)-1)]
		q.head++
		it := o.it
		p := it.pool
		if o.pages != nil {
			q.lists[p.class] = append(q.lists[p.class], o.pages)
		}
		switch {
		case !o.inv:
			// Given back already: its invalidation is pending, or in the record behind this, or it is on
			// the dirty list. Each ends in recovery.
			if it.move(o.gen, stMapped, stLost) {
				lost = append(lost, it)
			}
		case o.batch != nil:
			o.restore()
			doomed = append(doomed, it)
		case it.is(o.gen, stInvalid):
			q.takeOldest(it)
			o.restore()
			doomed = append(doomed, it)
		default:
			// Used again, by a request that fails too or was not posted: recovery gets the region then, or had it already.
			n, over, done := o.pinned, o.over, o.done
			tell := func(err error) {
				p.unpin(n)
				if over != nil {
					over.unuse()
				}
				if done != nil {
					done(err)
				}
			}
			p.mu.Lock()
			if it.lives == o.lives {
				it.dones = append(it.dones, tell)
			} else {
				tells = append(tells, tell)
			}
			p.mu.Unlock()
		}
		*o = op{}
	}
	q.proven.Store(q.head)
	doomed = append(doomed, q.pending...)
	q.pending = nil
	q.queued.Store(0)
	q.mu.Unlock()

	for _, it := range lost {
		it.pool.stale.push(it)
		it.pool.recovery.kick()
	}
	for _, it := range doomed {
		it.pool.doom(it)
	}
	for _, tell := range tells {
		tell(nil)
	}
	if first {
		for _, p := range q.ps.pools() {
			p.flush.kick() // what was freed lazily, and somebody may wait for now
		}
		q.ps.room.open()
	}
}

// nudge makes the completion certain of the invalidations a queue has fallen idle after, if regions of p are on its
// list: it maps a page without rights, and ends that by a request that gives a completion. Both stay on this host.
func (q *QP) nudge(p *pool) {
	q.post.Lock()
	q.mu.Lock()
	need := !q.broken && q.own[p.class][byFastReg].len() > 0 && q.unsignaled > 0
	q.mu.Unlock()
	var m Mapping
	var err error
	if need {
		q.req = Request{Segs: q.ps.scratchPage()}
		m, err = q.mapPosting(shape{kind: byFastReg, pool: p, bytes: verbs.PageSize})
	}
	q.post.Unlock()
	if need && err == nil {
		m.Unmap(func(error) {}) // somebody waits
	}
	q.pump()
}

// Close ends the pools' side of the queue pair, which has been destroyed, or drained in ERR: none of its requests is
// executed any more. Regions whose invalidation was not proven go to recovery; mappings made here stay valid where the
// device lets them (a window ends with its queue pair) until they are given back. Completions that come
// later are ignored. The caller holds a reference to the device. May wait.
func (q *QP) Close() {
	q.post.Lock()
	q.mu.Lock()
	closed := q.closed
	q.closed = true
	end := q.tail
	q.mu.Unlock()
	if closed {
		q.post.Unlock()
		return
	}
	q.fail(end)
	q.mu.Lock()
	lists := q.lists
	q.lists = [2][]verbs.PageList{}
	q.mu.Unlock()
	q.post.Unlock()
	for class := range lists {
		q.ps.keepLists(class, lists[class]...)
	}
	q.ps.mu.Lock()
	delete(q.ps.qps, q)
	q.ps.mu.Unlock()
}

// ownList is the regions whose invalidation is posted on one queue and not proven, in the order of the posts. They are used
// again from the end, whose page tables are warm, and proven from the front.
type ownList struct {
	ring        []*item
	first, last uint32 // counted from the beginning
}

func (l *ownList) len() int { return int(l.last - l.first) }

// pushLast adds it; size is how many there can be, a power of two.
func (l *ownList) pushLast(it *item, size int) {
	if l.ring == nil {
		l.ring = make([]*item, size)
	}
	l.ring[l.last&uint32(len(l.ring)-1)] = it
	l.last++
}

// popLast takes the newest, nil when there is none.
func (l *ownList) popLast() *item {
	if l.first == l.last {
		return nil
	}
	l.last--
	at := &l.ring[l.last&uint32(len(l.ring)-1)]
	it := *at
	*at = nil
	return it
}

// popFirst takes the oldest, nil when there is none.
func (l *ownList) popFirst() *item {
	if l.first == l.last {
		return nil
	}
	at := &l.ring[l.first&uint32(len(l.ring)-1)]
	l.first++
	it := *at
	*at = nil
	return it
}
