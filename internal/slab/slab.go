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
// Each size has one stack of free chunks, lock-free, last in first out: what was freed last is
// still in the cache. The head of the stack is one word with a tag that changes at each exchange; without
// it a pop that was interrupted could install a successor that is no longer one. AllocN and FreeN
// move many chunks for one exchange.
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
	cfg     Config
	free    [numClasses]head
	regions atomic.Pointer[[]*Region] // by ID; replaced, never changed

	mu     sync.Mutex // serialises grow and Close
	mapped int        // regions not yet unmapped
	closed bool
}

// head of a stack of free chunks:
//
//	 63 ........... 29  28  27 ............ 0
//	| tag             | C | link             |
//
// link is 0 for an empty stack, or 1 + region<<9 + index of the chunk in its region. C is set by
// Close and stays. tag counts the exchanges; its 35 bits repeat after 34 billion of them, and do harm
// only to a pop that slept through exactly as many.
type head struct {
	_ [64]byte
	atomic.Uint64
	_ [56]byte
}

const (
	linkBits  = 28
	linkMask  = 1<<linkBits - 1
	closedBit = 1 << linkBits
	tagOne    = 1 << (linkBits + 1)

	indexBits  = 9 // a region has 481 small chunks
	indexMask  = 1<<indexBits - 1
	maxRegions = 1<<(linkBits-indexBits) - 1
)

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

	// state is the number of references while there are any; freeBit and the link to the next chunk on
	// a stack, or on the way from or to one; home once Close has collected the chunk. One word for
	// both, since an exchange is what an allocation costs.
	state atomic.Uint32
	debug
	_ [20]byte
}

const (
	freeBit = 1 << 31
	home    = 1<<32 - 1 // no link has these bits
)

// New makes an empty slab; the first chunk maps the first region.
func New(cfg Config) (*Slab, error) {
	if cfg.MaxBytes < 0 {
		return nil, fmt.Errorf("slab: bound of %d bytes", cfg.MaxBytes)
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = DefaultMaxBytes
	}
	s := &Slab{cfg: cfg}
	s.regions.Store(new([]*Region))
	return s, nil
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
	for {
		h := s.free[cl].Load()
		link := uint32(h & linkMask)
		if link == 0 {
			if err := s.grow(cl); err != nil {
				return nil, err
			}
			continue
		}
		c := s.chunk(link)
		// c may have left the stack by now and its state be anything: the tag then has changed.
		if s.free[cl].CompareAndSwap(h, (h&^linkMask+tagOne)|uint64(c.state.Load()&linkMask)) {
			c.start()
			return c, nil
		}
	}
}

// AllocN fills cs with chunks of at least n bytes and returns how many it got; got < len(cs) comes
// with the error that Alloc would have returned.
func (s *Slab) AllocN(n int, cs []*Chunk) (got int, err error) {
	cl, err := s.classFor(n)
	if err != nil {
		return 0, err
	}
	for got < len(cs) {
		h := s.free[cl].Load()
		link := uint32(h & linkMask)
		if link == 0 {
			if err := s.grow(cl); err != nil {
				clear(cs[got:]) // a walk gone astray may have left others' chunks there
				return got, err
			}
			continue
		}
		// If the stack changes meanwhile the walk goes astray, over free chunks still, and the
		// exchange fails.
		end := got
		for link != 0 && end < len(cs) {
			c := s.chunk(link)
			state := c.state.Load()
			if state&freeBit == 0 || state == home {
				break
			}
			cs[end] = c
			end++
			link = state & linkMask
		}
		if s.free[cl].CompareAndSwap(h, (h&^linkMask+tagOne)|uint64(link)) {
			for _, c := range cs[got:end] {
				c.start()
			}
			got = end
		}
	}
	return got, nil
}

// start gives a chunk that was popped its first reference.
func (c *Chunk) start() {
	if invariants.Enabled {
		c.checkPoison()
	}
	c.state.Store(1)
}

// Bytes is the chunk's memory, valid while the caller holds a reference. len and cap are Small or
// Large.
func (c *Chunk) Bytes() []byte { return c.mem }

// Region is the region the chunk lies in.
func (c *Chunk) Region() *Region { return c.region }

// Offset is the chunk's offset in its region, in bytes.
func (c *Chunk) Offset() int { return c.off }

// Refs is the number of references, for tests and reports.
func (c *Chunk) Refs() int {
	n := c.state.Load()
	if n&freeBit != 0 {
		return 0
	}
	return int(n)
}

// Get takes a further reference; the caller holds one.
func (c *Chunk) Get() {
	if n := c.state.Add(1) - 1; n&freeBit != 0 {
		c.state.Add(^uint32(0))
		panic(fmt.Sprintf("BUG: slab: Get of %s, which is free", c.describe()))
	}
}

// Put drops a reference; the last one frees the chunk.
func (c *Chunk) Put() {
	s, cl := c.region.slab, c.region.class
	h := s.free[cl].Load()
	if !c.drop(uint32(h & linkMask)) {
		return
	}
	// A look before the exchange: under contention h is old by now, and a failed exchange is dear (two
	// goroutines that allocate and free: 61 ns each instead of 420).
	if h&closedBit == 0 && s.free[cl].Load() == h && s.free[cl].CompareAndSwap(h, (h&^linkMask+tagOne)|uint64(c.link())) {
		return
	}
	s.push(cl, c, c)
}

// FreeN is Put of each chunk of cs, which belong to s, for fewer exchanges.
func (s *Slab) FreeN(cs []*Chunk) {
	var first, last [numClasses]*Chunk
	for _, c := range cs {
		cl := c.region.class
		next := uint32(0)
		if first[cl] != nil {
			next = first[cl].link()
		}
		if !c.drop(next) {
			continue
		}
		if first[cl] == nil {
			last[cl] = c
		}
		first[cl] = c
	}
	for cl := range numClasses {
		if first[cl] != nil {
			s.push(cl, first[cl], last[cl])
		}
	}
}

// drop takes a reference away and reports whether it was the last; the chunk then is free, with a
// link to next.
func (c *Chunk) drop(next uint32) bool {
	for {
		n := c.state.Load()
		switch {
		case n == 0 || n&freeBit != 0:
			panic(fmt.Sprintf("BUG: slab: Put of %s, which is free", c.describe()))
		case n > 1:
			if c.state.CompareAndSwap(n, n-1) {
				return false
			}
		default:
			if invariants.Enabled {
				c.poison() // before it is free: from then on Close may unmap it
			}
			if c.state.CompareAndSwap(1, freeBit|next) {
				return true
			}
		}
	}
}

// push puts the chain from first to last on the stack of cl.
func (s *Slab) push(cl class, first, last *Chunk) {
	for {
		h := s.free[cl].Load()
		if h&closedBit != 0 {
			s.takeHome(first, last)
			return
		}
		last.state.Store(freeBit | uint32(h&linkMask))
		if s.free[cl].CompareAndSwap(h, (h&^linkMask+tagOne)|uint64(first.link())) {
			return
		}
	}
}

// takeHome marks the chunks from first to last (nil: to the end of the chain) as collected.
func (s *Slab) takeHome(first, last *Chunk) {
	for c := first; ; {
		next := c.state.Load() & linkMask
		c.state.Store(home)
		if c == last || next == 0 {
			return
		}
		c = s.chunk(next)
	}
}

func (s *Slab) chunk(link uint32) *Chunk {
	link--
	return &(*s.regions.Load())[link>>indexBits].chunks[link&indexMask]
}

func (c *Chunk) link() uint32 {
	return uint32(c.region.id<<indexBits+c.off/classSize[c.region.class]) + 1
}

// grow maps a region for a class that has no free chunk.
func (s *Slab) grow(cl class) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("slab %s: %w: %w", s.cfg.Name, ErrNoMemory, net.ErrClosed)
	}
	if s.free[cl].Load()&linkMask != 0 {
		return nil // somebody else was faster
	}
	old := *s.regions.Load()
	if int64(len(old)+1)*RegionSize > s.cfg.MaxBytes || len(old) == maxRegions {
		return fmt.Errorf("slab %s: %w: %d bytes mapped, bound %d", s.cfg.Name, ErrNoMemory,
			len(old)*RegionSize, s.cfg.MaxBytes)
	}
	mem, err := mapMemory(RegionSize)
	if err != nil {
		return fmt.Errorf("slab %s: %w: map %d bytes: %w", s.cfg.Name, ErrNoMemory, RegionSize, err)
	}
	size := classSize[cl]
	r := &Region{id: len(old), mem: mem, slab: s, class: cl, chunks: make([]Chunk, RegionSize/size)}
	for i := range r.chunks {
		c := &r.chunks[i]
		c.region, c.off = r, i*size
		c.mem = mem[c.off : c.off+size : c.off+size]
		next := uint32(0)
		if i+1 < len(r.chunks) {
			next = c.link() + 1
		}
		c.state.Store(freeBit | next)
	}
	all := append(old[:len(old):len(old)], r)
	s.regions.Store(&all) // before the push: whoever pops must find it
	s.mapped++
	s.push(cl, &r.chunks[0], &r.chunks[len(r.chunks)-1])
	return nil
}

// Region is the region with that ID, nil if there is none.
func (s *Slab) Region(id int) *Region {
	all := *s.regions.Load()
	if id < 0 || id >= len(all) {
		return nil
	}
	return all[id]
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
	for _, r := range *s.regions.Load() {
		for i := range r.chunks {
			if r.chunks[i].Refs() > 0 {
				inUse[r.class]++
			}
		}
	}
	return Stats{MappedBytes: int64(s.mapped) * RegionSize, SmallInUse: inUse[small], LargeInUse: inUse[large]}
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
	s.closed = true
	for cl := range numClasses {
		s.collect(cl)
	}
	leak := &LeakError{Slab: s.cfg.Name}
	var errs []error
	for _, r := range *s.regions.Load() {
		if r.mem == nil {
			continue
		}
		out := 0
		for i := range r.chunks {
			// One that is not home has a holder, or is on the way from or to one.
			if c := &r.chunks[i]; c.state.Load() != home {
				out++
				if invariants.Enabled {
					leak.Sites = append(leak.Sites, c.describe())
				}
			}
		}
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

// collect closes the stack of cl for good and takes home what is on it.
func (s *Slab) collect(cl class) {
	for {
		h := s.free[cl].Load()
		if h&closedBit != 0 {
			return
		}
		if s.free[cl].CompareAndSwap(h, (h&^linkMask+tagOne)|closedBit) {
			if link := uint32(h & linkMask); link != 0 {
				s.takeHome(s.chunk(link), nil)
			}
			return
		}
	}
}

// describe names a chunk, with its history as far as that is known.
func (c *Chunk) describe() string {
	return fmt.Sprintf("chunk of %d bytes at %d in region %d of slab %s%s",
		len(c.mem), c.off, c.region.id, c.region.slab.cfg.Name, c.debug.String())
}
