package softroce

import (
	"fmt"
	"math/bits"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// rwqe is a posted receive request.
type rwqe struct {
	id    uint64
	sgs   []sge
	total uint32
	bad   bool // a key was wrong at post: LOC_PROT_ERR when used
}

// recvRing holds posted receives, of one QP or of an SRQ. Posts append under mu; the engine role
// takes from the front.
type recvRing struct {
	pd     *pd
	maxSGE int
	mu     sync.Mutex
	closed bool   // nothing is taken any more; guarded by mu
	depth  int    // requests it takes
	slots  []rwqe // ringSlots(depth)
	store  []sge  // maxSGE per slot
	head   atomic.Uint32
	tail   atomic.Uint32
}

func (r *recvRing) init(p *pd, n, maxSGE int) {
	r.pd, r.maxSGE, r.depth = p, maxSGE, n
	r.slots = make([]rwqe, ringSlots(n))
	r.store = make([]sge, len(r.slots)*maxSGE)
}

// ringSlots is how many slots a ring of n requests has: a power of two, so that indexes, which run on
// for ever, still name n different slots in a row when they pass 2^32.
func ringSlots(n int) int { return 1 << bits.Len(uint(max(n, 1)-1)) }

// slot is the place of index i.
func (r *recvRing) slot(i uint32) *rwqe { return &r.slots[i&uint32(len(r.slots)-1)] }

func (r *recvRing) len() int { return int(r.tail.Load() - r.head.Load()) }

// post appends wrs and returns how many fit.
func (r *recvRing) post(wrs []verbs.RecvWR) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0, verbs.ErrClosed
	}
	for i := range wrs {
		wr := &wrs[i]
		if len(wr.SGs) > r.maxSGE {
			return i, fmt.Errorf("post receive: %d SGEs, limit %d: %w", len(wr.SGs), r.maxSGE, verbs.ErrInvalid)
		}
		t := r.tail.Load()
		if int(t-r.head.Load()) == r.depth {
			return i, verbs.ErrRQFull
		}
		k := int(t & uint32(len(r.slots)-1))
		w := &r.slots[k]
		sgs, total, bad, _ := r.pd.resolve(r.store[k*r.maxSGE:(k+1)*r.maxSGE:(k+1)*r.maxSGE], wr.SGs)
		if total > maxMessage {
			release(sgs)
			return i, fmt.Errorf("post receive: %d bytes: %w", total, verbs.ErrInvalid)
		}
		*w = rwqe{id: wr.ID, sgs: sgs, total: uint32(total), bad: bad}
		r.tail.Store(t + 1)
	}
	return len(wrs), nil
}

// take moves the oldest request into dst, whose sgs storage it reuses. Engine role. The
// references go with it.
func (r *recvRing) take(dst *rwqe) bool {
	h := r.head.Load()
	if h == r.tail.Load() {
		return false
	}
	w := r.slot(h)
	store := append(dst.sgs[:0], w.sgs...)
	clear(w.sgs)
	*dst = *w
	dst.sgs = store
	w.sgs = nil
	r.head.Store(h + 1)
	return true
}

// close refuses what is posted from now on. What has been is there, to be discarded.
func (r *recvRing) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
}

// discard releases everything. Engine role, or nobody posts or takes any more.
func (r *recvRing) discard() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for h := r.head.Load(); h != r.tail.Load(); h++ {
		release(r.slot(h).sgs)
		r.head.Store(h + 1)
	}
}

// holds counts requests that name m. Engine role.
func (r *recvRing) holds(m *mr) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for h := r.head.Load(); h != r.tail.Load(); h++ {
		if namesRegion(r.slot(h).sgs, m) {
			n++
		}
	}
	return n
}

func namesRegion(sgs []sge, m *mr) bool {
	for i := range sgs {
		if sgs[i].mr == m {
			return true
		}
	}
	return false
}

// srq is a shared receive queue.
type srq struct {
	recvRing
	users atomic.Int32
	limit atomic.Int32 // armed limit, 0 none
	state struct {
		sync.Mutex
		closed bool
	}
}

// CreateSRQ implements verbs.PD.
func (p *pd) CreateSRQ(cfg verbs.SRQConfig) (verbs.SRQ, error) {
	d := p.dev
	if cfg.MaxSGE == 0 {
		cfg.MaxSGE = 1
	}
	if cfg.MaxWR < 1 || cfg.MaxWR > d.attr.MaxSRQWR || cfg.MaxSGE < 0 || cfg.MaxSGE > d.attr.MaxSGE {
		return nil, fmt.Errorf("create SRQ: %d requests of %d SGEs: %w", cfg.MaxWR, cfg.MaxSGE, verbs.ErrInvalid)
	}
	if err := d.addChild(&d.nSRQ, d.attr.MaxSRQ); err != nil {
		return nil, fmt.Errorf("create SRQ: %w", err)
	}
	if err := p.addChild(); err != nil {
		d.dropChild(&d.nSRQ)
		return nil, fmt.Errorf("create SRQ: %w", err)
	}
	s := &srq{}
	s.init(p, cfg.MaxWR, cfg.MaxSGE)
	d.mu.Lock()
	d.srqs[s] = struct{}{}
	d.mu.Unlock()
	return s, nil
}

// use counts a QP; false, though counted, when the queue is closed.
func (s *srq) use() bool {
	s.state.Lock()
	defer s.state.Unlock()
	s.users.Inc()
	return !s.state.closed
}

// PostRecv implements verbs.SRQ.
func (s *srq) PostRecv(wrs []verbs.RecvWR) (int, error) {
	s.state.Lock()
	defer s.state.Unlock()
	if s.state.closed {
		return 0, verbs.ErrClosed
	}
	return s.post(wrs)
}

// Arm implements verbs.SRQ.
func (s *srq) Arm(limit int) error {
	if limit < 0 || limit > s.depth {
		return fmt.Errorf("arm SRQ: limit %d: %w", limit, verbs.ErrInvalid)
	}
	s.state.Lock()
	defer s.state.Unlock()
	if s.state.closed {
		return verbs.ErrClosed
	}
	s.limit.Store(int32(limit))
	return nil
}

// taken is called after each take. Engine role.
func (s *srq) taken() {
	if l := s.limit.Load(); l > 0 && s.len() < int(l) && s.limit.CompareAndSwap(l, 0) {
		s.pd.dev.async(verbs.AsyncEvent{Type: verbs.EventSRQLimitReached, SRQ: s})
	}
}

// Close implements verbs.SRQ.
func (s *srq) Close() error {
	d := s.pd.dev
	d.mayWait("SRQ.Close")
	d.role.Lock()
	defer d.unlockRole()
	s.state.Lock()
	defer s.state.Unlock()
	if s.state.closed {
		return nil
	}
	if n := s.users.Load(); n > 0 {
		return &verbs.BusyError{Object: "shared receive queue", Holders: []string{fmt.Sprintf("%d QPs", n)}}
	}
	s.state.closed = true
	if d.place.srq == s {
		d.place.srq = nil
	}
	s.discard()
	d.mu.Lock()
	delete(d.srqs, s)
	d.mu.Unlock()
	s.pd.dropChild()
	d.dropChild(&d.nSRQ)
	return nil
}
