package pagemem

import "fmt"

// Section is a part of a Memory, to the byte, as paged memory of its own (verbs.PagedMemory). Offsets are from its
// start.
type Section struct {
	m      *Memory
	off, n int
}

// Section returns the n bytes at off. EINVAL when they are not all inside.
func (m *Memory) Section(off, n int) (*Section, error) {
	if off < 0 || n <= 0 || n > len(m.alias)-off {
		return nil, fmt.Errorf("section [%#x, %#x) of %#x bytes: %w", off, off+n, len(m.alias), errInvalid)
	}
	return &Section{m, off, n}, nil
}

// Alias is the device's mapping of the section.
func (s *Section) Alias() []byte { return s.m.alias[s.off : s.off+s.n : s.off+s.n] }

// Populate is Memory.Populate; pages at the ends come in whole.
func (s *Section) Populate(off, n int, write bool) error {
	if off < 0 || n < 0 || n > s.n-off {
		return fmt.Errorf("populate [%#x, %#x) of %#x bytes: %w", off, off+n, s.n, errFault)
	}
	return s.m.Populate(s.off+off, n, write)
}

// Resident is Memory.Resident, with what is reported cut to the section.
func (s *Section) Resident(off, n int, fn func(off, n int)) error {
	if off < 0 || n < 0 || n > s.n-off {
		return fmt.Errorf("resident [%#x, %#x) of %#x bytes: %w", off, off+n, s.n, errFault)
	}
	return s.m.Resident(s.off+off, n, func(off, n int) { s.cut(off, n, fn) })
}

// Watch is Memory.Watch, with what is reported cut to the section.
func (s *Section) Watch(fn func(off, n int, gone bool)) (stop func(), err error) {
	return s.m.Watch(func(off, n int, gone bool) {
		s.cut(off, n, func(off, n int) { fn(off, n, gone) })
	})
}

// cut calls fn for the part of [off, off+n) of the memory that is in the section.
func (s *Section) cut(off, n int, fn func(off, n int)) {
	lo, hi := max(off-s.off, 0), min(off+n-s.off, s.n)
	if lo < hi {
		fn(lo, hi-lo)
	}
}
