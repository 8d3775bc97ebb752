package mrpool

import (
	"fmt"
	"unsafe"

	"github.com/openrds/openrds/verbs"
)

// Request is memory to be mapped.
type Request struct {
	// Segs is the memory in order: outside the Go heap, or pinned by the caller until it has been given back and
	// that was proven (the done callback). Only the first piece may begin, and only the last end, off a
	// verbs.PageSize boundary. The pools do not keep the slice.
	Segs [][]byte
	// IOVA is the address that requests give to the first byte.
	IOVA   uint64
	Access verbs.Access
	// Over, when set, is a plain registration (Pools.Register) with AccessMWBind that Segs, one piece, lies in.
	// Where the device has windows of type 2, and its rights and addresses allow it (IOVA is 0, or what the
	// registration gives to the byte), a window is bound over it then: the key works through this QP alone.
	Over Mapping
}

// way is one way to give a peer a key to memory. Ways keep nothing: the objects are the item's.
type way interface {
	// alloc gives the objects to an empty item.
	alloc(it *item) error
	// begin maps r: it fills wr and o, or has mapped at once (posted is false). The caller has a right to
	// post on q, which is nil for plain registration.
	begin(q *QP, it *item, r *Request, o *op, wr *verbs.SendWR) (posted bool, err error)
	// lkey is for local use of the region.
	lkey(it *item) verbs.LKey
}

// shape is what a request comes to.
type shape struct {
	kind  kind
	pool  *pool
	bytes int
	pages int
}

// shapeOf measures r, and chooses the way and the pool.
func (ps *Pools) shapeOf(r *Request, onQP bool) (s shape, err error) {
	if len(r.Segs) == 0 || len(r.Segs[0]) == 0 {
		return s, fmt.Errorf("map: no memory: %w", verbs.ErrInvalid)
	}
	first := uintptr(unsafe.Pointer(&r.Segs[0][0])) & (verbs.PageSize - 1)
	end, apart := first, false // end: offset from the first page's begin
	for i, b := range r.Segs {
		if len(b) == 0 {
			return s, fmt.Errorf("map: piece %d is empty: %w", i, verbs.ErrInvalid)
		}
		if i > 0 {
			at := uintptr(unsafe.Pointer(&b[0]))
			prev := r.Segs[i-1]
			if at != uintptr(unsafe.Pointer(&prev[0]))+uintptr(len(prev)) {
				if apart = true; end&(verbs.PageSize-1) != 0 || at&(verbs.PageSize-1) != 0 {
					return s, fmt.Errorf("map: piece %d is apart from the one before off a page boundary: %w", i, verbs.ErrInvalid)
				}
			}
		}
		end += uintptr(len(b))
	}
	s.bytes = int(end - first)
	s.pages = int((end + verbs.PageSize - 1) / verbs.PageSize)
	if r.IOVA+uint64(s.bytes) < r.IOVA {
		return s, fmt.Errorf("map: region wraps the address space: %w", verbs.ErrInvalid)
	}
	s.pool = ps.small
	if s.pages > s.pool.maxPages {
		s.pool = ps.large
	}
	switch {
	case onQP && r.Over.it != nil && ps.windowFits(r, s.bytes):
		s.kind = byWindow
	case onQP && ps.hasFastReg:
		s.kind = byFastReg
		if s.pages > s.pool.maxPages {
			return s, fmt.Errorf("map: %d pages, at most %d: %w", s.pages, s.pool.maxPages, ErrTooLarge)
		}
	case apart:
		return s, fmt.Errorf("map: memory in pieces, and the device has no fast registration: %w", verbs.ErrNotSupported)
	default:
		s.kind = byRegistration
		if onQP && s.pages > s.pool.maxPages {
			return s, fmt.Errorf("map: %d pages, at most %d: %w", s.pages, s.pool.maxPages, ErrTooLarge)
		}
	}
	return s, nil
}

// windowFits reports whether a window over r.Over can be what r asks for.
func (ps *Pools) windowFits(r *Request, n int) bool {
	const remote = verbs.AccessRemoteRead | verbs.AccessRemoteWrite | verbs.AccessRemoteAtomic
	o := &r.Over
	if ps.mwType == 0 || len(r.Segs) != 1 || o.it.kind != byRegistration || o.access&verbs.AccessMWBind == 0 {
		return false
	}
	at, base := uintptr(unsafe.Pointer(&r.Segs[0][0])), uintptr(unsafe.Pointer(&o.mem[0]))
	if at < base || at-base > uintptr(len(o.mem)) || uintptr(n) > uintptr(len(o.mem))-(at-base) {
		return false
	}
	// The window's local rights are the region's: who asks for a key to read with, locally, gets it by registration.
	if r.Access&remote == 0 || r.Access&(verbs.AccessRemoteWrite|verbs.AccessRemoteAtomic) != 0 && o.access&verbs.AccessLocalWrite == 0 {
		return false
	}
	return r.IOVA == 0 || r.IOVA == o.iova+uint64(at-base)
}

// fastReg maps by OpFastRegMR. The page list of a request belongs to the request, not to the region: while
// an earlier registration of the same region is still in the queue its list may not change.
type fastReg struct{ ps *Pools }

func (w *fastReg) alloc(it *item) error {
	mr, err := w.ps.pd.AllocFastRegMR(it.pool.maxPages)
	if err != nil {
		return err
	}
	it.mr = mr
	it.key.Store(uint32(mr.RKey()))
	return nil
}

func (w *fastReg) begin(q *QP, it *item, r *Request, o *op, wr *verbs.SendWR) (bool, error) {
	pl, err := q.pageList(it.pool, r.Segs)
	if err != nil {
		return false, err
	}
	key := verbs.UpdateFastRegKey(verbs.RKey(it.key.Load()))
	q.fr = verbs.FastReg{MR: it.mr, Key: key, Pages: pl, IOVA: r.IOVA, Access: r.Access}
	wr.Opcode, wr.FastReg = verbs.OpFastRegMR, &q.fr
	o.pages = pl
	it.key.Store(uint32(key))
	return true, nil
}

func (w *fastReg) lkey(it *item) verbs.LKey { return verbs.LKey(it.key.Load()) }

// window maps by OpBindMW.
type window struct{ ps *Pools }

func (w *window) alloc(it *item) error {
	mw, err := w.ps.pd.AllocMW(w.ps.mwType)
	if err != nil {
		return err
	}
	it.mw = mw
	it.key.Store(uint32(mw.RKey()))
	return nil
}

func (w *window) begin(q *QP, it *item, r *Request, o *op, wr *verbs.SendWR) (bool, error) {
	over := r.Over.it
	if !over.use(r.Over.gen) {
		return false, fmt.Errorf("map: memory under the window: %w", ErrNotMapped)
	}
	it.over = over
	key := verbs.UpdateFastRegKey(verbs.RKey(it.key.Load()))
	off := uint64(uintptr(unsafe.Pointer(&r.Segs[0][0])) - uintptr(unsafe.Pointer(&r.Over.mem[0])))
	q.bind = verbs.MWBind{MW: it.mw, Key: key, MR: over.mr, Addr: r.Over.iova + off, Length: uint64(len(r.Segs[0])), Access: r.Access &^ verbs.AccessLocalWrite}
	if r.IOVA != q.bind.Addr {
		q.bind.Access |= verbs.AccessZeroBased
	}
	wr.Opcode, wr.Bind = verbs.OpBindMW, &q.bind
	it.key.Store(uint32(key))
	return true, nil
}

func (w *window) lkey(it *item) verbs.LKey { return it.over.mr.LKey() }

// registration maps by RegMR; there is nothing to keep ready.
type registration struct{ ps *Pools }

func (w *registration) alloc(*item) error { return nil }

func (w *registration) begin(_ *QP, it *item, r *Request, _ *op, _ *verbs.SendWR) (bool, error) {
	n := 0
	for _, b := range r.Segs {
		n += len(b)
	}
	mr, err := w.ps.pd.RegMR(unsafe.Slice(&r.Segs[0][0], n), r.IOVA, r.Access) // shapeOf has seen that they adjoin
	if err != nil {
		return false, err
	}
	it.mr = mr
	it.key.Store(uint32(mr.RKey()))
	it.users.Store(1)
	return false, nil
}

func (w *registration) lkey(it *item) verbs.LKey { return it.mr.LKey() }

// bytes is the memory of a plain registration, whose pieces adjoin.
func (it *item) bytes(r *Request, n int) []byte { return unsafe.Slice(&r.Segs[0][0], n) }
