// Package pagemem is memory whose pages a device brings in when it needs them and gives up when the
// application takes them away: the memory of on-demand regions.
//
// A Memory is one memfd mapped twice. The application has the first mapping, Bytes, and may do to it what
// it likes: MADV_REMOVE, MADV_DONTNEED, munmap, mremap. The device has the second, Alias, which nobody else
// touches, so that none of this can make an access of the device fault or hit somebody else's memory.
//
//	            application            device
//	              Bytes()              Alias()
//	                │                     │
//	userfaultfd ◀── │                     │ ──▶ madvise(MADV_POPULATE_*), mincore
//	    │           └──── memfd pages ────┘
//	    ▼
//	 watchers
//
// A userfaultfd plays the part of the kernel's MMU notifier. The first mapping is registered with it in
// write-protect mode, and no page is ever write-protected: so it raises no fault, and reports every REMOVE, UNMAP
// and REMAP. Whoever acts on the mapping waits in the kernel until the report has been read, not until
// it has been acted on: see Sync. A REMOVE is reported before the pages go, UNMAP and REMAP afterwards.
//
// Limitations: pages that the kernel swaps out are not reported, since their content stays; the device's
// next access waits for the disk. MADV_DONTNEED looks like MADV_REMOVE in the reports, but the pages stay in
// the memfd. What was unmapped or moved is gone for the device for ever. Memory that mremap has moved or
// doubled is given back to the system by Close alone. Neither mapping is inherited by fork.
//
// All methods are safe for concurrent use. Source: userfaultfd(2), ioctl_userfaultfd(2), madvise(2).
package pagemem

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"
)

// ErrBusy says that a Memory is watched.
var ErrBusy = errors.New("memory is watched")

// Memory is paged memory. Make one with Open.
type Memory struct {
	app, alias []byte
	events     eventSource

	// eventMu is held while an event is read and acted on: who has it knows that all acts on the mapping
	// that have returned were acted on. Taken before mu.
	eventMu sync.Mutex

	// mu guards what follows. Populating holds it for reading, so that a range that has been marked gone is not
	// populated any more.
	mu       sync.RWMutex
	segs     []segment // what of app is still mapped, and where
	gone     ranges    // offsets that app has no more at their old addresses
	moved    bool      // an mremap: a page may be mapped where segs do not say
	watchers []*watcher
	closed   bool
}

// segment is a piece of the application's mapping.
type segment struct {
	addr   uintptr
	off, n int
}

type watcher struct {
	mu      sync.Mutex // held during a call
	fn      func(off, n int, gone bool)
	stopped bool
}

// eventKind is what was done to the application's mapping.
type eventKind uint8

const (
	eventRemove eventKind = iota + 1
	eventUnmap
	eventRemap
)

// event is a report. to is the new address of a move.
type event struct {
	kind       eventKind
	start, end uintptr
	to         uintptr
}

// Open maps n bytes, rounded up to pages, none of which is resident. The error matches errors.ErrUnsupported where the
// kernel has no userfaultfd that can do it or does not let this process have one; it then names the setting.
func Open(n int) (*Memory, error) {
	if n <= 0 || n > math.MaxInt-PageSize() {
		return nil, fmt.Errorf("paged memory: %d bytes", n)
	}
	m := &Memory{}
	if err := m.open((n + PageSize() - 1) &^ (PageSize() - 1)); err != nil {
		return nil, fmt.Errorf("paged memory: %w", err)
	}
	return m, nil
}

// Bytes is the application's mapping.
func (m *Memory) Bytes() []byte { return m.app }

// Alias is the device's mapping (verbs.PagedMemory). It stays until Close, whatever happens to Bytes.
func (m *Memory) Alias() []byte { return m.alias }

// Populate brings in the pages of [off, off+n), which are rounded outwards, for writing if write. It may wait
// for the disk. EFAULT for what the application has unmapped or moved; otherwise the error is the kernel's.
func (m *Memory) Populate(off, n int, write bool) error {
	if off < 0 || n < 0 || n > len(m.alias)-off {
		return fmt.Errorf("populate [%#x, %#x) of %#x bytes: %w", off, off+n, len(m.alias), errFault)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed || m.gone.overlap(off, off+n) {
		return fmt.Errorf("populate [%#x, %#x): %w", off, off+n, errFault)
	}
	return m.populate(off, n, write)
}

// Resident calls fn, in order, for each run of resident pages in [off, off+n), which is rounded outwards.
func (m *Memory) Resident(off, n int, fn func(off, n int)) error {
	if off < 0 || n < 0 || n > len(m.alias)-off {
		return fmt.Errorf("resident [%#x, %#x) of %#x bytes: %w", off, off+n, len(m.alias), errFault)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return fmt.Errorf("resident: %w", errFault)
	}
	return m.resident(off, n, fn)
}

// Watch calls fn for each range whose pages were, or are about to be, taken away, one call at a time, until stop
// has returned. gone says that the range is no part of the application's mapping any more. Pages that were unmapped
// are given back to the system when fn has returned. fn may wait, but not for what acts on the mapping; stop may
// not be called by fn. The error matches net.ErrClosed.
func (m *Memory) Watch(fn func(off, n int, gone bool)) (stop func(), err error) {
	w := &watcher{fn: fn}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errClosed
	}
	m.watchers = append(m.watchers[:len(m.watchers):len(m.watchers)], w) // tell reads it without the lock
	return func() {
		w.mu.Lock()
		w.stopped = true
		w.mu.Unlock()
		m.mu.Lock()
		if i := slices.Index(m.watchers, w); i >= 0 {
			m.watchers = slices.Concat(m.watchers[:i], m.watchers[i+1:])
		}
		m.mu.Unlock()
	}, nil
}

// Sync returns when all watchers have dealt with every act on the mapping that has returned.
func (m *Memory) Sync() {
	m.eventMu.Lock()
	defer m.eventMu.Unlock()
}

// Discard gives the pages of [off, off+n) back to the system, both page aligned: they are absent until touched,
// and then zero. It returns when all watchers know. EINVAL for what is not aligned, inside, and still mapped
// where it was.
func (m *Memory) Discard(off, n int) error {
	if off < 0 || n <= 0 || n > len(m.app)-off || (off|n)&(PageSize()-1) != 0 {
		return fmt.Errorf("discard [%#x, %#x) of %#x bytes: %w", off, off+n, len(m.app), errInvalid)
	}
	m.mu.RLock()
	bad := m.closed || m.gone.overlap(off, off+n)
	m.mu.RUnlock() // not held meanwhile: the report takes it
	if bad {
		return fmt.Errorf("discard [%#x, %#x): %w", off, off+n, errInvalid)
	}
	if err := m.discard(m.app[off : off+n]); err != nil {
		return err
	}
	m.Sync()
	return nil
}

// Close unmaps both mappings, as far as the application has not, and frees all pages; ErrBusy, changing nothing,
// while it is watched. nil when already done. Nobody may use either mapping any more.
func (m *Memory) Close() error {
	m.Sync() // an munmap that has returned is in segs
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	if n := len(m.watchers); n > 0 {
		m.mu.Unlock()
		return fmt.Errorf("close paged memory: %d watchers: %w", n, ErrBusy)
	}
	m.closed = true
	m.mu.Unlock()
	// 1. No reports any more: unmapping below would wait for somebody to read its own.
	err := m.events.close()
	// 2. What is still the application's. Where something else may live by now is not touched.
	for _, s := range m.segs {
		err = errors.Join(err, unmap(s.addr, s.n))
	}
	// 3. The alias, and with it the last reference to the memfd.
	m.segs = nil
	return errors.Join(err, unmapBytes(m.alias))
}

// handle acts on one report. The caller holds eventMu.
func (m *Memory) handle(e event) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return
	}
	moved := e.kind == eventRemap
	m.moved = m.moved || moved
	var hit, segs []segment
	for _, s := range m.segs {
		lo, hi := max(s.addr, e.start), min(s.addr+uintptr(s.n), e.end)
		if lo >= hi {
			segs = append(segs, s)
			continue
		}
		h := segment{lo, s.off + int(lo-s.addr), int(hi - lo)}
		hit = append(hit, h)
		if e.kind == eventRemove {
			segs = append(segs, s)
			continue
		}
		if head := int(lo - s.addr); head > 0 {
			segs = append(segs, segment{s.addr, s.off, head})
		}
		if tail := int(s.addr + uintptr(s.n) - hi); tail > 0 {
			segs = append(segs, segment{hi, h.off + h.n, tail})
		}
		if moved {
			segs = append(segs, segment{e.to + (lo - e.start), h.off, h.n})
		}
		m.gone.add(h.off, h.off+h.n)
	}
	m.segs = segs
	punch := e.kind == eventUnmap && !m.moved
	m.mu.Unlock()
	for _, h := range hit {
		m.tell(h.off, h.n, e.kind != eventRemove)
		if punch {
			m.release(h.off, h.n)
		}
	}
}

// tell calls the watchers.
func (m *Memory) tell(off, n int, gone bool) {
	m.mu.RLock()
	ws := m.watchers
	m.mu.RUnlock()
	for _, w := range ws {
		w.mu.Lock()
		if !w.stopped {
			w.fn(off, n, gone)
		}
		w.mu.Unlock()
	}
}

// ranges is a sorted list of disjoint ranges [lo, hi) that do not touch.
type ranges []struct{ lo, hi int }

// add makes [lo, hi) part of r.
func (r *ranges) add(lo, hi int) {
	s := *r
	i := sort.Search(len(s), func(i int) bool { return s[i].hi >= lo })
	k := i
	for ; k < len(s) && s[k].lo <= hi; k++ {
		lo, hi = min(lo, s[k].lo), max(hi, s[k].hi)
	}
	*r = slices.Replace(s, i, k, struct{ lo, hi int }{lo, hi})
}

// overlap reports whether a byte of [lo, hi) is in r.
func (r ranges) overlap(lo, hi int) bool {
	i := sort.Search(len(r), func(i int) bool { return r[i].hi > lo })
	return lo < hi && i < len(r) && r[i].lo < hi
}
