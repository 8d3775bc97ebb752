package softroce

import (
	"fmt"
	"sync"
	"time"
	"unsafe"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/ref"
	"github.com/openrds/openrds/verbs"
)

// mr is a registered region.
//
// References: one for the user (until Deregister), one for the key table, one for each posted work
// request of this device that names it, and one for the time a remote operation's packet, or one
// batch of READ responses, is handled. A remote operation looks the key up again for its next
// packet, so a peer that falls silent holds nothing.
type mr struct {
	pd     *pd
	mem    []byte
	iova   uint64
	access verbs.Access
	key    uint32 // index << 8 | variant

	refs    ref.Count
	zero    chan struct{} // closed when the last reference is gone
	revoked atomic.Bool   // keys no longer valid

	mu      sync.Mutex // serialises Deregister
	dropped bool       // the user's and the table's references are gone
	done    bool
}

const accessRemote = verbs.AccessRemoteRead | verbs.AccessRemoteWrite | verbs.AccessRemoteAtomic
const accessAll = accessRemote | verbs.AccessLocalWrite

// RegMR implements verbs.PD.
func (p *pd) RegMR(mem []byte, iova uint64, access verbs.Access) (verbs.MR, error) {
	d := p.dev
	switch {
	case access&^accessAll != 0:
		return nil, fmt.Errorf("register memory: access %#x: %w", access, verbs.ErrInvalid)
	case access&(verbs.AccessRemoteWrite|verbs.AccessRemoteAtomic) != 0 && access&verbs.AccessLocalWrite == 0:
		return nil, fmt.Errorf("register memory: remote write or atomic without local write: %w", verbs.ErrInvalid)
	case len(mem) == 0:
		return nil, fmt.Errorf("register memory: empty region: %w", verbs.ErrInvalid)
	case iova+uint64(len(mem)) < iova:
		return nil, fmt.Errorf("register memory: region wraps the address space: %w", verbs.ErrInvalid)
	}
	if err := p.addChild(); err != nil {
		return nil, fmt.Errorf("register memory: %w", err)
	}
	m := &mr{pd: p, mem: mem, iova: iova, access: access, zero: make(chan struct{})}
	m.refs.Init(func() { close(m.zero) })
	m.refs.Get() // the key table's
	_, err := d.mrs.reserve(func(idx uint32) *mr {
		m.key = idx<<8 | uint32(d.random64()&0xff)
		return m
	})
	if err != nil {
		p.dropChild()
		return nil, fmt.Errorf("register memory: %w", err)
	}
	return m, nil
}

func (m *mr) LKey() verbs.LKey { return verbs.LKey(m.key) }
func (m *mr) Addr() uint64     { return m.iova }
func (m *mr) Len() int         { return len(m.mem) }

func (m *mr) RKey() verbs.RKey {
	if m.access&accessRemote == 0 {
		return 0
	}
	return verbs.RKey(m.key)
}

// Deregister implements verbs.MR.
func (m *mr) Deregister() error {
	m.pd.dev.mayWait("MR.Deregister")
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.done {
		return nil
	}
	d := m.pd.dev
	if !m.dropped {
		m.dropped = true
		m.revoked.Store(true)
		d.mrs.remove(m.key >> 8)
		m.refs.Put() // table
		m.refs.Put() // user
	}
	select {
	case <-m.zero:
	default:
		t := time.NewTimer(d.cfg.DeregisterBound)
		defer t.Stop()
		select {
		case <-m.zero:
		case <-t.C:
			return &verbs.BusyError{Object: fmt.Sprintf("memory region %#x", m.key), Holders: d.holdersOf(m)}
		}
	}
	m.done = true
	m.pd.dropChild()
	return nil
}

// slice returns the n bytes at addr, or nil when they are not all inside the region.
func (m *mr) slice(addr uint64, n uint32) []byte {
	off := addr - m.iova
	if addr < m.iova || off > uint64(len(m.mem)) || uint64(n) > uint64(len(m.mem))-off {
		return nil
	}
	return m.mem[off : off+uint64(n) : off+uint64(n)]
}

// remote finds the region an R_Key names for an access of n bytes at addr through a QP of pd
// (rocev2 spec 6.4) and takes a reference. nil: NAK 0x62.
func (d *device) remote(p *pd, rkey uint32, addr uint64, n uint32, need verbs.Access) (*mr, []byte) {
	m := d.mrs.get(rkey >> 8)
	if m == nil || m.key != rkey || m.pd != p || m.access&need != need || m.revoked.Load() || m.access&accessRemote == 0 {
		return nil, nil
	}
	b := m.slice(addr, n)
	if b == nil || !m.refs.TryGet() {
		return nil, nil
	}
	return m, b
}

// sge is a posted scatter/gather element, resolved at post. The region is referenced until the
// request completes; whether it may be used is decided at execution.
type sge struct {
	buf []byte
	mr  *mr
}

// resolve fills dst from the posted list and returns the total length. A key or range that is wrong
// is not the poster's error: the request fails with LOC_PROT_ERR when it executes, which
// bad tells.
func (p *pd) resolve(dst []sge, sgs []verbs.SGE) (out []sge, total uint64, bad bool) {
	out = dst[:0]
	for i := range sgs {
		s := &sgs[i]
		if s.Length == 0 {
			continue // its key is not looked at
		}
		total += uint64(s.Length)
		m := p.dev.mrs.get(uint32(s.LKey) >> 8)
		if m == nil || m.key != uint32(s.LKey) || m.pd != p || m.revoked.Load() {
			bad = true
			continue
		}
		b := m.slice(s.Addr, s.Length)
		if b == nil || !m.refs.TryGet() {
			bad = true
			continue
		}
		out = append(out, sge{b, m})
	}
	return out, total, bad
}

// release puts the references of a list and forgets it.
func release(sgs []sge) {
	for i := range sgs {
		sgs[i].mr.refs.Put()
		sgs[i] = sge{}
	}
}

// usable reports whether every element may be used now; write: as a sink.
func usable(sgs []sge, write bool) bool {
	for i := range sgs {
		m := sgs[i].mr
		if m.revoked.Load() || write && m.access&verbs.AccessLocalWrite == 0 {
			return false
		}
	}
	return true
}

// scatter copies b into the list at byte offset off. The list is long enough. This, word access of
// atomics and the gather lists handed to the packet socket are the only places that touch
// registered bytes.
func scatter(sgs []sge, off uint32, b []byte) {
	for i := range sgs {
		s := sgs[i].buf
		if off >= uint32(len(s)) {
			off -= uint32(len(s))
			continue
		}
		n := copy(s[off:], b)
		b = b[n:]
		if len(b) == 0 {
			return
		}
		off = 0
	}
}

func uintptrOf(w *uint64) uintptr { return uintptr(unsafe.Pointer(w)) }

// word is the 8-byte word at the start of b.
func word(b []byte) *uint64 { return (*uint64)(unsafe.Pointer(&b[0])) }
