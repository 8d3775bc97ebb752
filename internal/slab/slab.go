// Package slab is memory outside the Go heap for data that queue pairs send from and receive into.
//
// A Slab maps regions of 2 MiB and cuts them into chunks of two sizes. A device registers a region
// as one memory region the first time it meets one of its chunks (Region.ID is the key), so neither
// registration nor pinning is on the way of a datagram. Regions stay mapped until Close: a chunk's
// memory is always there, whatever a late completion does with it.
//
// Chunks are reference counted; the last Put gives the chunk back. Nothing is allocated on the Go
// heap once a region exists.
//
// All methods are safe for concurrent use.
package slab

import (
	"errors"
	"fmt"
	"go.uber.org/atomic"
	"strings"
	"sync"

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

// ErrNoMemory says that the slab's bound is reached, or that the system gave no memory.
var ErrNoMemory = errors.New("slab memory exhausted")

// Config is the configuration of a Slab; the zero value is usable.
type Config struct {
	MaxBytes int64  // bound on mapped memory in bytes; 0: DefaultMaxBytes
	Name     string // for reports
}

// Slab is a set of regions. Make one with New.
type Slab struct {
	cfg     Config
	classes [2]class

	mu      sync.Mutex
	regions []*Region // by ID
	mapped  int64
	closed  bool
}

// class is the chunks of one size.
type class struct {
	size int
	mu   sync.Mutex
	free []*Chunk
	all  int
}

// Region is one mapping.
type Region struct {
	id     int
	mem    []byte
	chunks []Chunk
}

// ID is the region's number: 0, 1, 2, ... in its slab.
func (r *Region) ID() int { return r.id }

// Bytes is the region's memory, page aligned, RegionSize bytes.
func (r *Region) Bytes() []byte { return r.mem }

// Chunk is a piece of a region.
type Chunk struct {
	slab   *Slab
	region *Region
	class  *class
	mem    []byte
	off    int
	refs   atomic.Int32
}

// New makes an empty slab; the first chunk maps the first region.
func New(cfg Config) (*Slab, error) {
	if cfg.MaxBytes < 0 {
		return nil, fmt.Errorf("slab: bound of %d bytes", cfg.MaxBytes)
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = DefaultMaxBytes
	}
	s := &Slab{cfg: cfg}
	s.classes[0].size, s.classes[1].size = Small, Large
	return s, nil
}

// Alloc returns a chunk of at least n bytes (at most Large) with one reference, its content undefined.
// ErrNoMemory at the bound.
func (s *Slab) Alloc(n int) (*Chunk, error) {
	c := &s.classes[0]
	if n > Small {
		c = &s.classes[1]
	}
	if n < 0 || n > c.size {
		return nil, fmt.Errorf("slab: chunk of %d bytes, largest is %d", n, Large)
	}
	c.mu.Lock()
	for len(c.free) == 0 {
		c.mu.Unlock()
		if err := s.grow(c); err != nil {
			return nil, err
		}
		c.mu.Lock()
	}
	k := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	c.mu.Unlock()
	if invariants.Enabled {
		k.checkPoison()
	}
	k.refs.Store(1)
	return k, nil
}

// grow maps a region for a class that has no free chunk.
func (s *Slab) grow(c *class) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("slab %s is closed: %w", s.cfg.Name, ErrNoMemory)
	}
	c.mu.Lock()
	enough := len(c.free) > 0 // somebody else was faster
	c.mu.Unlock()
	if enough {
		return nil
	}
	if s.mapped+RegionSize > s.cfg.MaxBytes {
		return fmt.Errorf("%w: %d bytes mapped, bound %d", ErrNoMemory, s.mapped, s.cfg.MaxBytes)
	}
	mem, err := mapMemory(RegionSize)
	if err != nil {
		return fmt.Errorf("%w: map %d bytes: %v", ErrNoMemory, RegionSize, err)
	}
	r := &Region{id: len(s.regions), mem: mem}
	n := RegionSize / c.size
	r.chunks = make([]Chunk, n)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := n - 1; i >= 0; i-- {
		k := &r.chunks[i]
		*k = Chunk{slab: s, region: r, class: c, off: i * c.size, mem: mem[i*c.size : (i+1)*c.size : (i+1)*c.size]}
		if invariants.Enabled {
			k.poison()
		}
		c.free = append(c.free, k)
	}
	c.all += n
	s.regions = append(s.regions, r)
	s.mapped += RegionSize
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

// Stats is a snapshot.
func (s *Slab) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{MappedBytes: s.mapped, SmallInUse: s.classes[0].out(), LargeInUse: s.classes[1].out()}
}

func (c *class) out() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all - len(c.free)
}

// Close unmaps everything. While chunks are out it returns an error that counts them, and leaves
// the regions they are in mapped: somebody may still look at them. Nil the second time.
func (s *Slab) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var out []string
	for i := range s.classes {
		c := &s.classes[i]
		if n := c.out(); n > 0 {
			out = append(out, fmt.Sprintf("%d chunks of %d bytes", n, c.size))
		}
		c.mu.Lock()
		c.free = nil // nothing is handed out any more
		c.mu.Unlock()
	}
	var errs []error
	for _, r := range s.regions {
		held := false
		for i := range r.chunks {
			held = held || r.chunks[i].refs.Load() != 0
		}
		if !held {
			errs = append(errs, unmapMemory(r.mem))
			r.mem = nil
		}
	}
	if out != nil {
		errs = append(errs, fmt.Errorf("slab %s closed with %s in use", s.cfg.Name, strings.Join(out, " and ")))
	}
	return errors.Join(errs...)
}

// Bytes is the chunk's memory, valid while the caller holds a reference.
func (c *Chunk) Bytes() []byte { return c.mem }

// Region is the region the chunk lies in.
func (c *Chunk) Region() *Region { return c.region }

// Offset is the chunk's offset in its region, in bytes.
func (c *Chunk) Offset() int { return c.off }

// Refs is the number of references, for tests and reports.
func (c *Chunk) Refs() int { return int(c.refs.Load()) }

// Get takes a further reference; the caller holds one.
func (c *Chunk) Get() {
	if c.refs.Add(1) <= 1 {
		panic("BUG: slab chunk revived")
	}
}

// Put drops a reference; the last one frees the chunk.
func (c *Chunk) Put() {
	switch n := c.refs.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("BUG: slab chunk put more often than got")
	}
	if invariants.Enabled {
		c.poison()
	}
	k := c.class
	k.mu.Lock()
	if k.free != nil || k.all > 0 {
		k.free = append(k.free, c)
	}
	k.mu.Unlock()
}

const poisonByte = 0xdb

func (c *Chunk) poison() {
	for i := range c.mem {
		c.mem[i] = poisonByte
	}
}

func (c *Chunk) checkPoison() {
	for i, b := range c.mem {
		if b != poisonByte {
			panic(fmt.Sprintf("BUG: freed slab chunk written at offset %d", i))
		}
	}
}
