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

// mr is a memory region: one registered for good, or one of AllocFastRegMR, whose mapping work requests give
// and take.
//
// References: one for the user (until Deregister), one for the key table, one for each posted work
// request of this device that names it, and one for the time a remote operation's packet, or one
// batch of READ responses, is handled. A remote operation looks the key up again for its next
// packet, so a peer that falls silent holds nothing.
//
// What a registration for good maps never changes. The mapping of a fast-registration region, and whether it
// has one, belongs to the engine role, and nothing outside the role looks at it; so does who touches bytes of
// it, and an invalidation that has been executed is complete.
type mr struct {
	pd       *pd
	paged    *onDemand     // of RegOnDemandMR; else nil
	fast     int           // pages that a fast registration may map; 0: registered for good
	key      atomic.Uint32 // index << 8 | variant; written under the engine role
	valid    bool          // keys open it; false: free
	mapping                //
	uses     int           // started, incomplete work requests that name it and look it up as they go; engine role
	bound    atomic.Int32  // windows bound to it; windowsClosed: Deregister has begun, none will be
	addr     atomic.Uint64 // iova and size, for whoever asks
	length   atomic.Uint64 //
	refs     ref.Count     //
	zero     chan struct{} // closed when the last reference is gone
	revoked  atomic.Bool   // keys no longer valid, for ever
	dropping sync.Mutex    // serialises Deregister
	dropped  bool          // the user's and the table's references are gone
	done     bool
}

// mapping is what keys open.
type mapping struct {
	iova   uint64
	size   uint64
	access verbs.Access
	mem    []byte  // all of it, if it lies in one piece
	pieces []piece // otherwise, in order
}

// piece is a contiguous part of a region.
type piece struct {
	off uint64 // of its first byte in the region
	mem []byte
}

const (
	accessRemote  = verbs.AccessRemoteRead | verbs.AccessRemoteWrite | verbs.AccessRemoteAtomic
	accessAll     = accessRemote | verbs.AccessLocalWrite | verbs.AccessMWBind
	windowsClosed = -1 << 30
)

// Key indices: regions below, windows from firstWindow on (rocev2 spec 6.1).
const (
	firstWindow = 1 << 23
	lastIndex   = 1<<24 - 1
)

// checkMapping says what is wrong with registering size bytes at iova for access.
func checkMapping(iova, size uint64, access verbs.Access) error {
	switch {
	case access&verbs.AccessOnDemand != 0: // any memory, of the Go heap perhaps: nobody would tell us what is done to it
		return fmt.Errorf("on demand, memory that cannot be watched (see RegOnDemandMR): %w", verbs.ErrNotSupported)
	case access&^accessAll != 0:
		return fmt.Errorf("access %#x: %w", access, verbs.ErrInvalid)
	case access&(verbs.AccessRemoteWrite|verbs.AccessRemoteAtomic) != 0 && access&verbs.AccessLocalWrite == 0:
		return fmt.Errorf("remote write or atomic without local write: %w", verbs.ErrInvalid)
	case size == 0:
		return fmt.Errorf("empty region: %w", verbs.ErrInvalid)
	case iova+size < iova:
		return fmt.Errorf("region wraps the address space: %w", verbs.ErrInvalid)
	}
	return nil
}

// RegMR implements verbs.PD.
func (p *pd) RegMR(mem []byte, iova uint64, access verbs.Access) (verbs.MR, error) {
	if err := checkMapping(iova, uint64(len(mem)), access); err != nil {
		return nil, fmt.Errorf("register memory: %w", err)
	}
	m := &mr{mapping: mapping{iova: iova, size: uint64(len(mem)), access: access, mem: mem}, valid: true}
	if err := p.publish(m); err != nil {
		return nil, fmt.Errorf("register memory: %w", err)
	}
	return m, nil
}

// publish gives m a key and a place in the table, and counts it as a child of p.
func (p *pd) publish(m *mr) error {
	if err := p.addChild(); err != nil {
		return err
	}
	m.pd, m.zero = p, make(chan struct{})
	m.addr.Store(m.iova)
	m.length.Store(m.size)
	m.refs.Init(func() { close(m.zero) })
	m.refs.Get() // the key table's
	d := p.dev
	if _, err := d.mrs.reserve(func(idx uint32) *mr {
		m.key.Store(idx<<8 | uint32(d.random64()&0xff))
		return m
	}); err != nil {
		p.dropChild()
		return err
	}
	return nil
}

func (m *mr) LKey() verbs.LKey { return verbs.LKey(m.key.Load()) }
func (m *mr) Addr() uint64     { return m.addr.Load() }
func (m *mr) Len() int         { return int(m.length.Load()) }

func (m *mr) RKey() verbs.RKey {
	if m.fast == 0 && m.access&accessRemote == 0 {
		return 0
	}
	return verbs.RKey(m.key.Load())
}

func (m *mr) String() string { return fmt.Sprintf("memory region %#x", m.key.Load()) }

// Deregister implements verbs.MR.
func (m *mr) Deregister() error {
	d := m.pd.dev
	d.mayWait("MR.Deregister")
	m.dropping.Lock()
	defer m.dropping.Unlock()
	if m.done {
		return nil
	}
	if !m.dropped {
		for !m.bound.CompareAndSwap(0, windowsClosed) {
			// Between the look and the swap they may all have gone.
			if w := d.windowsOf(m); len(w) > 0 {
				return &verbs.BusyError{Object: m.String(), Holders: w}
			}
		}
		m.dropped = true
		m.revoked.Store(true)
		d.mrs.remove(m.key.Load() >> 8)
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
			return &verbs.BusyError{Object: m.String(), Holders: d.holdersOf(m)}
		}
	}
	m.done = true
	if m.paged != nil {
		d.endPaging(m)
	}
	m.pd.dropChild()
	return nil
}

// Access to registered memory. Whoever reads or writes bytes of a region, for a peer or for a work request,
// asks here first and gets a verdict and the memory as a list of direct elements:
//
//	poster       resolve     elements of posted lists: direct, or to be looked up at each access
//	requester    mayUse      may a request start with these elements?
//	both halves  reach       bytes [off, off+n) of a posted list, now
//	responder    grant       may the peer touch this range? (all of it, before the first byte)
//	             remote      the bytes of one packet, with a reference on the region
//
// All of these but resolve belong to the engine role, and what they return is good until the next call or
// the end of the step, whichever is first; a region's mapping does not change meanwhile.

// verdict is what became of asking for memory.
type verdict uint8

const (
	granted verdict = iota
	refused         // wrong key, state, right or range: fail the request, or NAK 0x62
	absent          // pages are not in memory: pause, and ask again when they are
)

// sge is an element of a posted list, whose region is referenced until the request completes, or of a
// list made for one access.
type sge struct {
	mr   *mr
	base *byte  // first byte. nil: found at each access, through what follows
	addr uint64 // as posted
	n    uint32 // bytes
	key  uint32 // as posted
}

// direct is the element of memory that needs no looking up.
func direct(b []byte) sge { return sge{base: unsafe.SliceData(b), n: uint32(len(b))} }

// bytes is the memory of a direct element.
func (s *sge) bytes() []byte { return unsafe.Slice(s.base, s.n) }

// indirect says that what keys of the region open can change while a request names it.
func (m *mr) indirect() bool { return m.fast > 0 || m.paged != nil }

// resolve fills dst from the posted list and returns the total length. Elements of regions registered for
// good are looked up once, here; others each time they are used. A key or range that is wrong is not
// the poster's error: the request fails with LOC_PROT_ERR when it executes, which bad tells.
func (p *pd) resolve(dst []sge, sgs []verbs.SGE) (out []sge, total uint64, bad, indirect bool) {
	out = dst[:0]
	for i := range sgs {
		s := &sgs[i]
		if s.Length == 0 {
			continue // its key is not looked at
		}
		total += uint64(s.Length)
		m := p.dev.mrs.get(uint32(s.LKey) >> 8)
		if m == nil || m.pd != p || m.revoked.Load() {
			bad = true
			continue
		}
		if m.indirect() {
			if !m.refs.TryGet() {
				bad = true
				continue
			}
			indirect = true
			out = append(out, sge{mr: m, addr: s.Addr, n: s.Length, key: uint32(s.LKey)})
			continue
		}
		off, ok := m.span(s.Addr, s.Length)
		if !ok || m.key.Load() != uint32(s.LKey) || !m.refs.TryGet() {
			bad = true
			continue
		}
		out = append(out, sge{mr: m, base: &m.mem[off], n: s.Length})
	}
	return out, total, bad, indirect
}

// release puts the references of a posted list and forgets it.
func release(sgs []sge) {
	for i := range sgs {
		sgs[i].mr.refs.Put()
		sgs[i] = sge{}
	}
}

// span is the offset of the n bytes at addr, if all of them are inside.
func (m *mapping) span(addr uint64, n uint32) (off uint64, ok bool) {
	off = addr - m.iova
	return off, addr >= m.iova && off <= m.size && uint64(n) <= m.size-off
}

// view appends the n bytes at offset off, which are inside, to dst. write: they will be written.
func (m *mr) view(dst []sge, off uint64, n uint32, write bool) ([]sge, verdict) {
	if m.mem != nil {
		return append(dst, direct(m.mem[off:off+uint64(n)])), granted
	}
	if m.paged != nil {
		return m.paged.view(dst, off, n, write)
	}
	// The last piece that begins at or before off.
	lo, hi := 0, len(m.pieces)
	for hi-lo > 1 {
		if mid := int(uint(lo+hi) / 2); m.pieces[mid].off <= off {
			lo = mid
		} else {
			hi = mid
		}
	}
	for off -= m.pieces[lo].off; n > 0; lo++ {
		b := m.pieces[lo].mem[off:]
		if uint64(len(b)) > uint64(n) {
			b = b[:n]
		}
		dst = append(dst, direct(b))
		n -= uint32(len(b))
		off = 0
	}
	return dst, granted
}

// local is the offset of an element that is looked up at each access, if its key opens it now
// (rocev2 spec 6.4).
func (s *sge) local(write bool) (off uint64, ok bool) {
	m := s.mr
	if m.revoked.Load() || !m.valid || m.key.Load() != s.key || write && m.access&verbs.AccessLocalWrite == 0 {
		return 0, false
	}
	return m.span(s.addr, s.n)
}

// mayUse decides whether a request may start that uses the list; write: as a sink.
func mayUse(sgs []sge, write bool) verdict {
	for i := range sgs {
		s := &sgs[i]
		if s.base == nil {
			if _, ok := s.local(write); !ok {
				return refused
			}
		} else if s.mr.revoked.Load() || write && s.mr.access&verbs.AccessLocalWrite == 0 {
			return refused
		}
	}
	return granted
}

// reach makes bytes [off, off+n) of a posted list addressable: they are out[o:] from then on.
func (d *device) reach(sgs []sge, off, n uint32, write bool) (out []sge, o uint32, v verdict) {
	for i := range sgs {
		s := &sgs[i]
		if s.base == nil {
			return d.translate(sgs, off, n, write)
		}
		if s.mr.revoked.Load() || write && s.mr.access&verbs.AccessLocalWrite == 0 {
			return nil, 0, refused
		}
	}
	return sgs, off, granted
}

// translate is reach for lists with elements to be looked up.
func (d *device) translate(sgs []sge, off, n uint32, write bool) (out []sge, o uint32, v verdict) {
	out = d.direct[:0]
	for i := 0; i < len(sgs) && n > 0; i++ {
		s := &sgs[i]
		if off >= s.n {
			off -= s.n
			continue
		}
		k := min(n, s.n-off)
		if s.base != nil {
			if s.mr.revoked.Load() || write && s.mr.access&verbs.AccessLocalWrite == 0 {
				return nil, 0, refused
			}
			out = append(out, direct(s.bytes()[off:off+k]))
		} else {
			at, ok := s.local(write)
			if !ok {
				return nil, 0, refused
			}
			if out, v = s.mr.view(out, at+uint64(off), k, write); v != granted {
				return nil, 0, v
			}
		}
		n -= k
		off = 0
	}
	d.direct = out
	return out, 0, granted
}

// grant finds the region that an R_Key opens to a peer of q for an access of n bytes at addr
// (rocev2 spec 6.4), and the offset in it. nil: NAK 0x62.
func (d *device) grant(q *qp, rkey uint32, addr uint64, n uint32, need verbs.Access) (*mr, uint64) {
	idx := rkey >> 8
	if idx >= firstWindow {
		return d.grantWindow(q, rkey, addr, n, need)
	}
	m := d.mrs.get(idx)
	if m == nil || m.key.Load() != rkey || m.pd != q.pd || !m.valid || m.access&need != need || m.revoked.Load() {
		return nil, 0
	}
	off, ok := m.span(addr, n)
	if !ok {
		return nil, 0
	}
	return m, off
}

// remote is grant, and the memory, for one packet. The caller puts the reference.
func (d *device) remote(q *qp, rkey uint32, addr uint64, n uint32, need verbs.Access) (m *mr, mem []sge, v verdict) {
	m, off := d.grant(q, rkey, addr, n, need)
	if m == nil || !m.refs.TryGet() {
		return nil, nil, refused
	}
	d.direct, v = m.view(d.direct[:0], off, n, need != verbs.AccessRemoteRead)
	if v != granted {
		m.refs.Put()
		return nil, nil, v
	}
	return m, d.direct, granted
}

// word is the aligned 8-byte word that mem is, or nil.
func word(mem []sge) *uint64 {
	if len(mem) != 1 || mem[0].n != 8 || uintptr(unsafe.Pointer(mem[0].base))&7 != 0 {
		return nil
	}
	return (*uint64)(unsafe.Pointer(mem[0].base))
}

// holdersOf names what references m. May wait.
func (d *device) holdersOf(m *mr) []string {
	d.role.Lock()
	defer d.unlockRole()
	var out []string
	known := int64(0)
	add := func(n int, format string, args ...any) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d ", n)+fmt.Sprintf(format, args...))
			known += int64(n)
		}
	}
	// A request counts once, however often it names the region.
	d.qps.each(func(q *qp) {
		if q.closed.Load() {
			return
		}
		n := 0
		for h := q.head.Load(); h != q.tail.Load(); h++ {
			if q.names(h, m) {
				n++
			}
		}
		add(n, "send requests of QP %d", q.num)
		if q.srq == nil {
			add(q.rq.holds(m), "receive requests of QP %d", q.num)
		}
		if q.inMessage && namesRegion(q.w.sgs, m) {
			add(1, "receive request in use by QP %d", q.num)
		}
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.srqs {
		add(s.holds(m), "receive requests of a shared receive queue")
	}
	n := 0
	for _, r := range d.tx.refs {
		if r == m {
			n++
		}
	}
	add(n, "batch of READ responses waiting for room in the socket")
	add(d.paging.faults.holds(m), "page faults on their way")
	if n := m.refs.Refs() - known; n > 0 && len(out) == 0 {
		out = append(out, fmt.Sprintf("%d references that no queue accounts for", n))
		out = append(out, m.refs.Holders()...)
	}
	return out
}
