// Package slab is memory outside the Go heap for data that queue pairs send from and receive into.
//
// A Slab maps regions of 2 MiB and cuts each into chunks of one of two sizes. A device registers a
// region as one memory region the first time it meets one of its chunks (Region.ID is the key), so
// neither registration nor pinning is on the way of a datagram. Regions stay mapped until Close: a
// chunk's memory is always there, whatever a late completion does with it.
//
// Chunks are reference counted: Alloc returns one with a single reference, Get adds one, Put takes
// one away, and the last Put makes the chunk free for anybody. Chunk values are made with their
// region and used again: nothing is allocated on the Go heap once a region exists.
//
// Each size has one stack of free chunks under a mutex of its own, last in first out: what was
// freed last is still in the cache. A lock-free stack (a tagged word, compare-and-swap) was tried and lost: an
// Alloc and a Put cost 30 ns instead of 35 alone, but 430 instead of 95 while another goroutine did
// the same, since every failed exchange fetches the line anew. AllocN and FreeN take the mutex once
// for many chunks.
//
// Under -tags invariants a freed chunk is filled with a pattern that must be intact when it is
// allocated again, and chunks remember where they were allocated and freed.
//
// Limitations: memory is given back to the system by Close alone; a region serves one size for
// ever; the memory is invisible to the race detector, being no part of Go's heap.
//
// All methods are safe for concurrent use.
package slab

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/openrds/openrds/internal/invariants"
)

// Sizes, in bytes.
const (
	RegionSize = 2 << 20
	// Small holds a SEND of the kernel's dialect, 4144 bytes, and stays a multiple of a cache line.
	Small = 4352
	// Large holds a SEND between two of ours, 61440 bytes.
	Large = 65536
)

// DefaultMaxBytes bounds a Slab whose Config does not.
const DefaultMaxBytes = 1 << 30

var (
	// ErrNoMemory says that the slab's bound is reached, that it is closed (the error then matches
	// net.ErrClosed too), or that the system gave no memory.
	ErrNoMemory = errors.New("slab memory exhausted")
	// ErrTooLarge says that a chunk of more than Large bytes, or of less than none, was asked for.
	ErrTooLarge = errors.New("no slab chunk of that size")
)

// Config is the configuration of a Slab; the zero value is usable.
type Config struct {
	MaxBytes int64  // bound on mapped memory in bytes, in whole regions; 0: DefaultMaxBytes
	Name     string // for reports
}

// class indexes the sizes.
type class uint8

const (
	small class = iota
	large
	numClasses
)

var classSize = [numClasses]int{small: Small, large: Large}

// Slab is a set of regions. Make one with New.
type Slab struct {
	cfg  Config
	free [numClasses]stack

	mu      sync.Mutex // guards what follows; taken before a stack's
	regions []*Region  // by ID
	mapped  int        // regions not yet unmapped
}

// stack is the free chunks of one size. The pad keeps two sizes off one cache line.
type stack struct {
	mu     sync.Mutex
	top    *Chunk
	closed bool // nothing is taken any more; what is freed still comes here
	_      [104]byte
}

// Region is one mapping.
type Region struct {
	id     int
	mem    []byte
	slab   *Slab
	class  class
	chunks []Chunk
}

// ID is the region's number: 0, 1, 2, ... in its slab.
func (r *Region) ID() int { return r.id }

// Bytes is the region's memory, page aligned, RegionSize bytes, mapped until Slab.Close.
func (r *Region) Bytes() []byte { return r.mem }

// Chunk is a piece of a region. It fills a cache line, since neighbours are counted by different
// processors.
type Chunk struct {
	mem    []byte
	region *Region
	off    int
	refs   atomic.Int32

	// Guarded by the mutex of the size's stack. Between a stack and a holder, either way, a chunk has no
	// reference and is not free: Close counts it as in use.
	free bool
	next *Chunk
	debug
	_ [8]byte
}

// New makes an empty slab; the first chunk maps the first region.
func New(cfg Config) (*Slab, error) {
	if cfg.MaxBytes < 0 {
		return nil, fmt.Errorf("slab: bound of %d bytes", cfg.MaxBytes)
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = DefaultMaxBytes
	}
	return &Slab{cfg: cfg}, nil
}

// classFor returns the smallest class that holds n bytes.
func (s *Slab) classFor(n int) (class, error) {
	switch {
	case n < 0 || n > Large:
		return 0, fmt.Errorf("slab %s: %d bytes: %w", s.cfg.Name, n, ErrTooLarge)
	case n > Small:
		return large, nil
	}
	return small, nil
}

// Alloc returns a chunk of at least n bytes (at most Large) with one reference, its content
// undefined. The error matches ErrNoMemory or ErrTooLarge.
func (s *Slab) Alloc(n int) (*Chunk, error) {
	cl, err := s.classFor(n)
	if err != nil {
		return nil, err
	}
	st := &s.free[cl]
	st.mu.Lock()
	for st.top == nil || st.closed {
		st.mu.Unlock()
		if err := s.grow(cl); err != nil {
			return nil, err
		}
		st.mu.Lock()
	}
	c := st.pop()
	st.mu.Unlock()
	c.start()
	return c, nil
}

// AllocN fills cs with chunks of at least n bytes and returns how many it got; got < len(cs) comes
// with the error that Alloc would have returned.
func (s *Slab) AllocN(n int, cs []*Chunk) (got int, err error) {
	cl, err := s.classFor(n)
	if err != nil {
		return 0, err
	}
	st := &s.free[cl]
	for got < len(cs) {
		first := got
		st.mu.Lock()
		for got < len(cs) && st.top != nil && !st.closed {
			cs[got] = st.pop()
			got++
		}
		st.mu.Unlock()
		for _, c := range cs[first:got] {
			c.start()
		}
		if got < len(cs) {
			if err := s.grow(cl); err != nil {
				return got, err
			}
		}
	}
	return got, nil
}

// pop takes a chunk; there is one, and the caller holds st.mu.
func (st *stack) pop() *Chunk {
	c := st.top
	st.top, c.next = c.next, nil
	c.free = false
	return c
}

// push adds a chunk without references; the caller holds st.mu.
func (st *stack) push(c *Chunk) {
	c.next, st.top = st.top, c
	c.free = true
}

// start gives a chunk that was popped its first reference.
func (c *Chunk) start() {
	if invariants.Enabled {
		c.checkPoison()
	}
	c.refs.Store(1)
}

// Bytes is the chunk's memory, valid while the caller holds a reference. len and cap are Small or
// Large.
func (c *Chunk) Bytes() []byte { return c.mem }

// Region is the region the chunk lies in.
func (c *Chunk) Region() *Region { return c.region }

// Offset is the chunk's offset in its region, in bytes.
func (c *Chunk) Offset() int { return c.off }

// Refs is the number of references, for tests and reports.
func (c *Chunk) Refs() int { return int(c.refs.Load()) }

// Get takes a further reference; the caller holds one.
func (c *Chunk) Get() {
	if n := c.refs.Add(1); n <= 1 {
		c.refs.Add(-1)
		panic(fmt.Sprintf("BUG: slab: Get of %s, which is free", c.describe()))
	}
}

// Put drops a reference; the last one frees the chunk.
func (c *Chunk) Put() {
	if c.drop() {
		st := &c.region.slab.free[c.region.class]
		st.mu.Lock()
		st.push(c)
		st.mu.Unlock()
	}
}

// FreeN is Put of each chunk of cs, which belong to s, with the mutex taken once per size.
func (s *Slab) FreeN(cs []*Chunk) {
	var freed [numClasses]*Chunk // chains; a chunk without references that is on no stack is ours
	for _, c := range cs {
		if c.drop() {
			cl := c.region.class
			c.next, freed[cl] = freed[cl], c
		}
	}
	for cl, c := range freed {
		if c == nil {
			continue
		}
		st := &s.free[cl]
		st.mu.Lock()
		for c != nil {
			next := c.next
			st.push(c)
			c = next
		}
		st.mu.Unlock()
	}
}

// drop takes a reference away and reports whether it was the last.
func (c *Chunk) drop() bool {
	n := c.refs.Add(-1)
	if n < 0 {
		c.refs.Add(1)
		panic(fmt.Sprintf("BUG: slab: Put of %s, which is free", c.describe()))
	}
	if invariants.Enabled && n == 0 {
		c.poison() // mapped still: it is not yet on the stack
	}
	return n == 0
}

// grow maps a region for a class that has no free chunk.
func (s *Slab) grow(cl class) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &s.free[cl]
	st.mu.Lock()
	closed, enough := st.closed, st.top != nil
	st.mu.Unlock()
	switch {
	case closed:
		return fmt.Errorf("slab %s: %w: %w", s.cfg.Name, ErrNoMemory, net.ErrClosed)
	case enough:
		return nil // somebody else was faster
	case int64(len(s.regions)+1)*RegionSize > s.cfg.MaxBytes:
		return fmt.Errorf("slab %s: %w: %d bytes mapped, bound %d", s.cfg.Name, ErrNoMemory,
			len(s.regions)*RegionSize, s.cfg.MaxBytes)
	}
	mem, err := mapMemory(RegionSize)
	if err != nil {
		return fmt.Errorf("slab %s: %w: map %d bytes: %w", s.cfg.Name, ErrNoMemory, RegionSize, err)
	}
	size := classSize[cl]
	r := &Region{id: len(s.regions), mem: mem, slab: s, class: cl, chunks: make([]Chunk, RegionSize/size)}
	s.regions = append(s.regions, r)
	s.mapped++
	st.mu.Lock()
	defer st.mu.Unlock()
	for i := len(r.chunks) - 1; i >= 0; i-- {
		c := &r.chunks[i]
		c.region, c.off = r, i*size
		c.mem = mem[c.off : c.off+size : c.off+size]
		st.push(c)
	}
	return nil
}

// Region is the region with that ID, nil if there is none.
func (s *Slab) Region(id int) *Region {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id < 0 || id >= len(s.regions) {
		return nil
	}
	return s.regions[id]
}

// Stats says how much is mapped and how many chunks of each size are out.
type Stats struct {
	MappedBytes            int64
	SmallInUse, LargeInUse int
}

// Stats is a snapshot. It looks at every chunk: for reports, not for the data path.
func (s *Slab) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	var inUse [numClasses]int
	for _, r := range s.regions {
		for i := range r.chunks {
			if r.chunks[i].Refs() > 0 {
				inUse[r.class]++
			}
		}
	}
	return Stats{MappedBytes: int64(s.mapped) * RegionSize, SmallInUse: inUse[small], LargeInUse: inUse[large]}
}

// Mapped is how many bytes of memory are mapped, in use or not.
func (s *Slab) Mapped() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(s.mapped) * RegionSize
}

// LeakError says that a slab was closed while chunks were out.
type LeakError struct {
	Slab         string
	Small, Large int      // chunks out, by size
	Sites        []string // what is known of each; only under -tags invariants
}

func (e *LeakError) Error() string {
	var out []string
	if e.Small > 0 {
		out = append(out, fmt.Sprintf("%d chunks of %d bytes", e.Small, Small))
	}
	if e.Large > 0 {
		out = append(out, fmt.Sprintf("%d chunks of %d bytes", e.Large, Large))
	}
	return fmt.Sprintf("slab %s closed with %s in use%s", e.Slab, strings.Join(out, " and "),
		strings.Join(append([]string{""}, e.Sites...), "\n"))
}

// Close ends allocation and unmaps the regions without chunks in use. If there are others it
// returns a *LeakError; they stay mapped for those who hold the chunks, and Close may be called again
// to unmap them. Nil once everything is unmapped.
func (s *Slab) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for cl := range s.free {
		st := &s.free[cl]
		st.mu.Lock()
		st.closed = true
		st.mu.Unlock()
	}
	leak := &LeakError{Slab: s.cfg.Name}
	var errs []error
	for _, r := range s.regions {
		if r.mem == nil {
			continue
		}
		// Chunks that are free stay so, now that nothing is taken any more.
		out := 0
		st := &s.free[r.class]
		st.mu.Lock()
		for i := range r.chunks {
			if c := &r.chunks[i]; !c.free {
				out++
				if invariants.Enabled {
					leak.Sites = append(leak.Sites, c.describe())
				}
			}
		}
		st.mu.Unlock()
		switch {
		case out > 0 && r.class == small:
			leak.Small += out
		case out > 0:
			leak.Large += out
		default:
			errs = append(errs, unmapMemory(r.mem))
			r.mem = nil
			s.mapped--
		}
	}
	if leak.Small+leak.Large > 0 {
		errs = append(errs, leak)
	}
	return errors.Join(errs...)
}

// describe names a chunk, with its history as far as that is known.
func (c *Chunk) describe() string {
	return fmt.Sprintf("chunk of %d bytes at %d in region %d of slab %s%s",
		len(c.mem), c.off, c.region.id, c.region.slab.cfg.Name, c.history())
}
