package softroce

import (
	"fmt"
	"sync"
	"unsafe"

	"github.com/openrds/openrds/verbs"
)

// Fast registration (rocev2 spec 6.3, 6.5).
//
//	free ──FAST_REG_MR──▶ valid ──LOCAL_INV, SEND with invalidate, READ with invalidate──▶ free
//
// All of it happens under the engine role, when the queue gets to the request: what is before it in the queue and
// uses the region has completed by then (LOCAL_INV waits for that), what is behind has not started.

// maxFastRegPages bounds one registration: 16 MiB. The list of pieces grows with use only.
const maxFastRegPages = 4096

// AllocFastRegMR implements verbs.PD.
func (p *pd) AllocFastRegMR(maxPages int) (verbs.MR, error) {
	if maxPages < 1 || maxPages > maxFastRegPages {
		return nil, fmt.Errorf("allocate fast registration region: %d pages outside 1..%d: %w", maxPages, maxFastRegPages, verbs.ErrInvalid)
	}
	m := &mr{fast: maxPages}
	if err := p.publish(m); err != nil {
		return nil, fmt.Errorf("allocate fast registration region: %w", err)
	}
	return m, nil
}

// fastReg executes FAST_REG_MR. Engine role.
func (d *device) fastReg(q *qp, w *swqe, x *swqeExt) bool {
	m, l, access := x.mr, x.list, verbs.Access(w.imm)
	if m.valid || m.revoked.Load() || m.pd != q.pd || w.rkey>>8 != m.key.Load()>>8 || l.pages > m.fast ||
		checkMapping(w.raddr, uint64(l.size), access) != nil {
		return false
	}
	m.iova, m.size, m.access = w.raddr, uint64(l.size), access
	if len(l.pieces) == 1 {
		m.mem = l.pieces[0].mem
	} else {
		m.mem, m.pieces = nil, append(m.pieces[:0], l.pieces...)
	}
	m.addr.Store(m.iova)
	m.length.Store(m.size)
	m.key.Store(w.rkey)
	m.valid = true
	return true
}

// invalidate frees the fast-registration region or type 2 window that key names; false if it may not be
// (rocev2 spec 6.5). remote: at the peer's wish, who may do so only through the QP that a window is bound to.
// Nothing touches the memory once it has returned. Engine role.
func (d *device) invalidate(q *qp, key uint32, remote bool) bool {
	if key>>8 >= firstWindow {
		w := d.mws.get(key >> 8)
		if w == nil || w.typ == verbs.MWType1 || w.mr == nil || w.key.Load() != key || w.pd != q.pd || remote && w.q != q {
			return false
		}
		w.unbind()
		return true
	}
	m := d.mrs.get(key >> 8)
	if m == nil || m.fast == 0 || !m.valid || m.key.Load() != key || m.pd != q.pd || m.bound.Load() > 0 {
		return false
	}
	if d.tx.names(m) {
		d.tx.makeRoom()
	}
	m.valid = false
	m.mem = nil
	clear(m.pieces)
	m.pieces = m.pieces[:0]
	return true
}

// pageList is a verbs.PageList: pieces of memory, neighbours joined, so that a contiguous region is one
// piece whatever its size.
type pageList struct {
	pd  *pd
	max int // pages

	mu     sync.Mutex
	busy   bool // named by a posted request, to which the rest belongs
	closed bool
	pieces []piece
	size   int // bytes
	pages  int
}

// AllocPageList implements verbs.PD.
func (p *pd) AllocPageList(maxPages int) (verbs.PageList, error) {
	if maxPages < 1 || maxPages > maxFastRegPages {
		return nil, fmt.Errorf("allocate page list: %d pages outside 1..%d: %w", maxPages, maxFastRegPages, verbs.ErrInvalid)
	}
	if err := p.addChild(); err != nil {
		return nil, fmt.Errorf("allocate page list: %w", err)
	}
	return &pageList{pd: p, max: maxPages}, nil
}

// Set implements verbs.PageList.
func (l *pageList) Set(segs [][]byte) error {
	pages, last := 0, len(segs)-1
	for i, s := range segs {
		if len(s) == 0 {
			return fmt.Errorf("page list: segment %d is empty: %w", i, verbs.ErrInvalid)
		}
		start := uintptr(unsafe.Pointer(&s[0]))
		end := start + uintptr(len(s))
		if i > 0 && start%verbs.PageSize != 0 || i < last && end%verbs.PageSize != 0 {
			return fmt.Errorf("page list: segment %d of %d is not aligned to %d: %w", i, len(segs), verbs.PageSize, verbs.ErrInvalid)
		}
		pages += int((end+verbs.PageSize-1)/verbs.PageSize - start/verbs.PageSize)
	}
	if pages > l.max {
		return fmt.Errorf("page list: %d pages, room for %d: %w", pages, l.max, verbs.ErrInvalid)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.idleLocked(); err != nil {
		return fmt.Errorf("page list: %w", err)
	}
	clear(l.pieces)
	l.pieces, l.size, l.pages = l.pieces[:0], 0, pages
	for _, s := range segs {
		if k := len(l.pieces) - 1; k >= 0 {
			// Joined as far as the slice itself says that the memory goes on: allocations that happen to
			// be neighbours stay two.
			if p := &l.pieces[k].mem; cap(*p)-len(*p) >= len(s) && &(*p)[:len(*p)+1][len(*p)] == &s[0] {
				*p = (*p)[:len(*p)+len(s)]
				l.size += len(s)
				continue
			}
		}
		l.pieces = append(l.pieces, piece{off: uint64(l.size), mem: s})
		l.size += len(s)
	}
	return nil
}

func (l *pageList) idleLocked() error {
	switch {
	case l.closed:
		return verbs.ErrClosed
	case l.busy:
		return fmt.Errorf("named by a posted request: %w", verbs.ErrBusy)
	}
	return nil
}

// take makes the list a posted request's.
func (l *pageList) take() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.idleLocked(); err != nil {
		return err
	}
	if l.size == 0 {
		return verbs.ErrInvalid
	}
	l.busy = true
	return nil
}

// give is called when that request has completed or was flushed.
func (l *pageList) give() {
	l.mu.Lock()
	l.busy = false
	l.mu.Unlock()
}

func (l *pageList) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}

func (l *pageList) Pages() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pages
}

func (l *pageList) Cap() int { return l.max }

// Close implements verbs.PageList.
func (l *pageList) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	if l.busy {
		return &verbs.BusyError{Object: "page list", Holders: []string{"a posted fast registration"}}
	}
	l.closed, l.pieces, l.size, l.pages = true, nil, 0, 0
	l.pd.dropChild()
	return nil
}
