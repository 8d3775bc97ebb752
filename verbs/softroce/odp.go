package softroce

import (
	"fmt"
	"math/bits"
	"os"
	"slices"
	"sync"
	"unsafe"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/pagemem"
	"github.com/openrds/openrds/verbs"
)

// On-demand paging. A region of RegOnDemandMR pins nothing: its page table says which pages the engine may touch,
// and an access to another raises a page fault (odp_fault.go), which brings the page in where waiting is allowed.
// Pages leave the table when the memory says that they were, or are about to be, taken away. So three parties meet at
// the table, under the engine role:
//
//	engine       looks, before each access
//	fault worker populates without the role, then enters, unless the range was taken away meanwhile
//	memory       drops entries, and returns when no access is under way: that is, when it has got the role,
//	             and nothing in the transmit batch names the region
//
// The pages themselves are always there to be touched, through the memory's alias: a mistake here costs a page
// that comes back as zero, never a fault. Guarded copies (odp_guard.go) are the second line.

// onDemand is what such a region has more than others.
type onDemand struct {
	mem   verbs.PagedMemory
	alias []byte
	table pageTable // engine role
	stop  func()    // ends the watch

	mu      sync.Mutex // guards filling; taken after the role
	filling []*filling
}

// filling is a population in progress of [off, end).
type filling struct {
	off, end uint64
	stale    bool // some of it was taken away since it began
}

const (
	// populateStep is how much is populated between two looks at whether anybody still wants it. 2 MiB take half a
	// millisecond from the page cache.
	populateStep = 2 << 20
	// populateTries is how often a step is tried that is taken away while it comes in.
	populateTries = 8
)

// paging is the device's part in it.
type paging struct {
	regions    []*mr        // engine role
	registered atomic.Int64 // pages of all regions
	present    atomic.Int64 // entries in their tables
	faults     faultQueue
}

// RegOnDemandMR implements verbs.PD.
func (p *pd) RegOnDemandMR(mem verbs.PagedMemory, iova uint64, access verbs.Access) (verbs.MR, error) {
	const op = "register on-demand memory"
	d := p.dev
	if d.attr.Caps&verbs.CapOnDemandPaging == 0 {
		if err := pagemem.Supported(); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", op, verbs.ErrNotSupported, err)
		}
		return nil, fmt.Errorf("%s: %w", op, verbs.ErrNotSupported)
	}
	if mem == nil {
		return nil, fmt.Errorf("%s: no memory: %w", op, verbs.ErrInvalid)
	}
	access &^= verbs.AccessOnDemand
	o := &onDemand{mem: mem, alias: mem.Alias()}
	n := uint64(len(o.alias))
	if err := checkMapping(iova, n, access); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	ps := uintptr(os.Getpagesize())
	lead := uintptr(unsafe.Pointer(&o.alias[0])) & (ps - 1)
	o.table.init(uint(bits.TrailingZeros64(uint64(ps))), uint64(lead), n)
	m := &mr{pd: p, mapping: mapping{iova: iova, size: n, access: access}, valid: true, paged: o}
	// The watch comes first: nothing can be entered that it would not take out again.
	var err error
	if o.stop, err = mem.Watch(func(off, n int, gone bool) { d.takeAway(m, uint64(off), uint64(n), gone) }); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if err := p.publish(m); err != nil {
		o.stop()
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	d.paging.registered.Add(m.paged.table.pages(n))
	d.role.Lock()
	d.paging.regions = append(d.paging.regions, m)
	d.unlockRole()
	return m, nil
}

// pages is how many pages hold n bytes from the region's start.
func (t *pageTable) pages(n uint64) int64 { return int64((t.lead + n + 1<<t.shift - 1) >> t.shift) }

// endPaging takes the region, which nobody references any more, off the memory.
func (d *device) endPaging(m *mr) {
	o := m.paged
	o.stop() // waits for a report that is being dealt with, which wants the role
	d.role.Lock()
	d.paging.present.Sub(int64(o.table.clear()))
	d.paging.regions = slices.DeleteFunc(d.paging.regions, func(x *mr) bool { return x == m })
	d.unlockRole()
	d.paging.registered.Sub(o.table.pages(m.size))
}

// view is mr.view of an on-demand region.
func (o *onDemand) view(dst []sge, off uint64, n uint32, write bool) ([]sge, verdict) {
	if v := o.table.look(off, uint64(n), write); v != granted {
		return dst, v
	}
	return append(dst, direct(o.alias[off:off+uint64(n)])), granted
}

// takeAway drops the entries of a range of m and returns when nothing touches it any more. May wait.
func (d *device) takeAway(m *mr, off, n uint64, gone bool) {
	d.role.Lock()
	defer d.unlockRole()
	d.stats.add(cODPInvalidations, 1)
	d.takeAwayInRole(m, off, n, gone)
}

func (d *device) takeAwayInRole(m *mr, off, n uint64, gone bool) {
	o := m.paged
	if off >= m.size {
		return
	}
	n = min(n, m.size-off)
	o.mu.Lock()
	for _, f := range o.filling {
		// A page is the unit: what touches one of its bytes touches it.
		if f.off < off+n+1<<o.table.shift && off < f.end+1<<o.table.shift {
			f.stale = true
		}
	}
	o.mu.Unlock()
	k := o.table.drop(off, n, gone)
	d.paging.present.Sub(int64(k))
	d.stats.add(cODPInvalidatedPages, uint64(k))
	if k > 0 && d.tx.names(m) {
		d.tx.makeRoom() // it leaves, or is lost as if on the wire
	}
}

// begin notes that [off, off+n) is being populated, end that it is done; end reports whether what is in memory now may
// be entered. The caller of end has the role.
func (o *onDemand) begin(off, n uint64) *filling {
	f := &filling{off: off, end: off + n}
	o.mu.Lock()
	o.filling = append(o.filling, f)
	o.mu.Unlock()
	return f
}

func (o *onDemand) end(f *filling) (valid bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.filling = slices.DeleteFunc(o.filling, func(x *filling) bool { return x == f })
	return !f.stale
}

// enterInRole makes pages present.
func (d *device) enterInRole(m *mr, off, n uint64, write bool) int {
	k := m.paged.table.enter(off, n, write)
	d.paging.present.Add(int64(k))
	return k
}

// bring makes the n bytes at off of m, which the caller references, present. It returns how many pages came in, and
// what kept others from it: nil also if they were taken away again each time they were tried. goOn, if not nil, is asked between
// steps. May wait.
func (d *device) bring(m *mr, off, n uint64, write bool, goOn func() bool) (pages int, err error) {
	o := m.paged
	for n > 0 && (goOn == nil || goOn()) {
		k := min(n, populateStep-(off+o.table.lead)%populateStep)
		for try, done := 0, false; !done && try < populateTries; try++ {
			f := o.begin(off, k)
			err := o.mem.Populate(int(off), int(k), write)
			d.role.Lock()
			done = o.end(f)
			if err == nil && done {
				pages += d.enterInRole(m, off, k, write)
			}
			d.unlockRole()
			if err != nil {
				return pages, err
			}
		}
		off, n = off+k, n-k
	}
	return pages, nil
}

// AdviseMR implements verbs.PD.
func (p *pd) AdviseMR(a verbs.Advice, sgs []verbs.SGE) error {
	d := p.dev
	d.mayWait("PD.AdviseMR")
	if d.attr.Caps&verbs.CapOnDemandPaging == 0 {
		return fmt.Errorf("advise: %w", verbs.ErrNotSupported)
	}
	if a < verbs.AdvisePrefetch || a > verbs.AdvisePrefetchNoFault {
		return fmt.Errorf("advise: advice %d: %w", a, verbs.ErrInvalid)
	}
	write := a == verbs.AdvisePrefetchWrite
	spans, err := p.adviseSpans(sgs, write)
	for _, s := range spans {
		n := 0
		switch {
		case err != nil:
		case a == verbs.AdvisePrefetchNoFault:
			n, err = d.enterResident(s)
		default:
			n, err = d.bring(s.m, s.off, s.n, write, nil)
		}
		if err == nil {
			d.stats.add(cODPPrefetches, 1)
		}
		d.stats.add(cODPPrefetchedPages, uint64(n))
		s.m.refs.Put()
	}
	if err != nil {
		return fmt.Errorf("advise: %w", err)
	}
	return nil
}

// adviseSpans looks sgs up and references their regions. With an error what it returns is referenced too.
func (p *pd) adviseSpans(sgs []verbs.SGE, write bool) (spans []faultSpan, err error) {
	for _, s := range sgs {
		if s.Length == 0 {
			continue
		}
		m := p.dev.mrs.get(uint32(s.LKey) >> 8)
		if m == nil || m.paged == nil || m.key.Load() != uint32(s.LKey) || m.pd != p || m.revoked.Load() || !m.refs.TryGet() {
			return spans, fmt.Errorf("key %#x is of no on-demand region here: %w", uint32(s.LKey), verbs.ErrInvalid)
		}
		off, ok := m.span(s.Addr, s.Length)
		spans = append(spans, faultSpan{m, off, uint64(s.Length)})
		switch {
		case !ok:
			return spans, fmt.Errorf("[%#x, %#x) is not in the region of key %#x: %w", s.Addr, s.Addr+uint64(s.Length), uint32(s.LKey), verbs.ErrInvalid)
		case write && m.access&verbs.AccessLocalWrite == 0:
			return spans, fmt.Errorf("the region of key %#x may not be written: %w", uint32(s.LKey), verbs.ErrInvalid)
		}
	}
	return spans, nil
}

// enterResident enters, for reading, what is in memory without having been brought in.
func (d *device) enterResident(s faultSpan) (pages int, err error) {
	o := s.m.paged
	for try, done := 0, false; !done && try < populateTries; try++ {
		type run struct{ off, n uint64 }
		var runs []run
		f := o.begin(s.off, s.n)
		err := o.mem.Resident(int(s.off), int(s.n), func(off, n int) { runs = append(runs, run{uint64(off), uint64(n)}) })
		d.role.Lock()
		if done = o.end(f); done && err == nil {
			for _, r := range runs {
				pages += d.enterInRole(s.m, r.off, r.n, false)
			}
		}
		d.unlockRole()
		if err != nil {
			return pages, err
		}
	}
	return pages, nil
}

// snapshot adds the gauges of on-demand paging to a snapshot of the counters.
func (p *paging) snapshot(m map[string]uint64) {
	m["odp_registered_pages"] = uint64(p.registered.Load())
	m["odp_present_pages"] = uint64(p.present.Load())
}
