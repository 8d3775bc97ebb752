package softroce

import (
	"fmt"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// mw is a memory window (rocev2 spec 6.3). Its states:
//
//	type 1  bound ◀──BIND_MW──▶ bound elsewhere, or unbound (length 0)
//	type 2  free ──BIND_MW──▶ bound ──LOCAL_INV, SEND with invalidate──▶ free
//	any     ──Dealloc──▶ gone
//
// A bound window counts in its region, which can be neither invalidated nor deregistered then. That takes
// the place of a reference: whoever is granted access through a window references the region itself.
type mw struct {
	pd  *pd
	typ verbs.MWType
	key atomic.Uint32 // written under the engine role

	// Engine role.
	gone   bool
	mr     *mr    // nil: not bound
	q      *qp    // type 2: the only QP it works through
	start  uint64 // address of its first byte, as requests give it
	size   uint64
	at     uint64 // offset in the region
	access verbs.Access
}

// AllocMW implements verbs.PD.
func (p *pd) AllocMW(t verbs.MWType) (verbs.MW, error) {
	if t < verbs.MWType1 || t > verbs.MWType2B {
		return nil, fmt.Errorf("allocate window: %v: %w", t, verbs.ErrNotSupported)
	}
	if err := p.addChild(); err != nil {
		return nil, fmt.Errorf("allocate window: %w", err)
	}
	d := p.dev
	w := &mw{pd: p, typ: t}
	if _, err := d.mws.reserve(func(idx uint32) *mw {
		w.key.Store(idx<<8 | uint32(d.random64()&0xff))
		return w
	}); err != nil {
		p.dropChild()
		return nil, fmt.Errorf("allocate window: %w", err)
	}
	return w, nil
}

func (w *mw) Type() verbs.MWType { return w.typ }
func (w *mw) RKey() verbs.RKey   { return verbs.RKey(w.key.Load()) }

func (w *mw) String() string { return fmt.Sprintf("memory window %#x (%v)", w.key.Load(), w.typ) }

// Dealloc implements verbs.MW.
func (w *mw) Dealloc() error {
	d := w.pd.dev
	d.mayWait("MW.Dealloc")
	d.role.Lock()
	defer d.unlockRole()
	if w.gone {
		return nil
	}
	w.gone = true
	d.mws.remove(w.key.Load() >> 8)
	if w.mr != nil && d.tx.names(w.mr) {
		d.tx.makeRoom() // an answer through it, perhaps, that waits for the socket
	}
	w.unbind()
	w.pd.dropChild()
	return nil
}

// unbind takes the window off its region. Engine role.
func (w *mw) unbind() {
	if w.mr != nil {
		w.mr.bound.Dec()
	}
	w.mr, w.q, w.size = nil, nil, 0
}

// bindTo counts one more window of m; false: m is on its way out.
func (m *mr) bindTo() bool {
	for n := m.bound.Load(); n >= 0; n = m.bound.Load() {
		if m.bound.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

// bind executes BIND_MW (rocev2 spec 6.5). Engine role.
func (d *device) bind(q *qp, w *swqe, x *swqeExt) bool {
	win, m := x.mw, x.mr
	size := w.cmp
	access := verbs.Access(w.imm)
	two := win.typ != verbs.MWType1
	switch {
	case win.gone, w.rkey>>8 != win.key.Load()>>8, win.pd != q.pd, access&^(accessRemote|verbs.AccessZeroBased) != 0,
		two && (win.mr != nil || size == 0), !two && access&verbs.AccessZeroBased != 0:
		return false
	}
	if size == 0 { // type 1, unbound
		win.unbind()
		win.key.Store(w.rkey)
		return true
	}
	off := w.raddr - m.rangeStart()
	switch {
	case m == nil || m.pd != q.pd || !m.valid || m.revoked.Load() || m.access&verbs.AccessMWBind == 0,
		access&(verbs.AccessRemoteWrite|verbs.AccessRemoteAtomic) != 0 && m.access&verbs.AccessLocalWrite == 0,
		w.raddr < m.iova || off > m.size || size > m.size-off,
		!m.bindTo():
		return false
	}
	win.unbind()
	win.mr, win.start, win.size, win.at, win.access = m, w.raddr, size, off, access
	if access&verbs.AccessZeroBased != 0 {
		win.start = 0
	}
	if two {
		win.q = q
	}
	win.key.Store(w.rkey)
	return true
}

func (m *mr) rangeStart() uint64 {
	if m == nil {
		return 0
	}
	return m.iova
}

// grantWindow is grant through a window.
func (d *device) grantWindow(q *qp, rkey uint32, addr uint64, n uint32, need verbs.Access) (*mr, uint64) {
	w := d.mws.get(rkey >> 8)
	if w == nil || w.mr == nil || w.key.Load() != rkey || w.pd != q.pd || w.q != nil && w.q != q || w.access&need != need {
		return nil, 0
	}
	off := addr - w.start
	if addr < w.start || off > w.size || uint64(n) > w.size-off {
		return nil, 0
	}
	return w.mr, w.at + off
}

// windowsOf names the windows bound to m. May wait.
func (d *device) windowsOf(m *mr) (out []string) {
	d.role.Lock()
	defer d.unlockRole()
	d.mws.each(func(w *mw) {
		if w.mr == m {
			out = append(out, w.String())
		}
	})
	return out
}
