package ibdev

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
)

// mrTable holds the device's memory regions over slab regions, by Region.ID. A region is registered
// when a work request first names it and stays so until the device is torn down.
type mrTable struct {
	tab atomic.Pointer[[]mrEntry] // immutable; nil entries are not registered

	mu     sync.Mutex // writers
	mrs    []verbs.MR
	closed bool
}

type mrEntry struct {
	lkey verbs.LKey
	ok   bool
	base uint64 // IOVA of the region's first byte
}

// SGE names n bytes of c from off on. The lkey is looked up here, when a request is posted, because
// the chunk may outlive the device and come back to another one. Lock-free, except for the first
// use of a slab region, which registers it: verbs allows that in a handler.
func (d *Device) SGE(c *slab.Chunk, off, n int) (verbs.SGE, error) {
	r := c.Region()
	id := r.ID()
	if t := d.mrs.tab.Load(); t != nil && id < len(*t) {
		if e := &(*t)[id]; e.ok {
			return verbs.SGE{Addr: e.base + uint64(c.Offset()+off), Length: uint32(n), LKey: e.lkey}, nil
		}
	}
	e, err := d.register(r)
	if err != nil {
		return verbs.SGE{}, err
	}
	return verbs.SGE{Addr: e.base + uint64(c.Offset()+off), Length: uint32(n), LKey: e.lkey}, nil
}

// PD is the protection domain of everything on the device, for what the pools do not register.
func (d *Device) PD() verbs.PD { return d.pd }

var errDeviceClosed = errors.New("device is being torn down")

// register makes an MR of r. Its IOVA is the address of its memory: verbs in hardware want the two to
// agree in the page offset.
func (d *Device) register(r *slab.Region) (mrEntry, error) {
	t := &d.mrs
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return mrEntry{}, errDeviceClosed
	}
	var old []mrEntry
	if p := t.tab.Load(); p != nil {
		old = *p
	}
	id := r.ID()
	if id < len(old) && old[id].ok {
		return old[id], nil
	}
	mem := r.Bytes()
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	mr, err := d.pd.RegMR(mem, base, verbs.AccessLocalWrite)
	if err != nil {
		d.stats.regErrors.Inc()
		return mrEntry{}, fmt.Errorf("register slab region %d: %w", id, err)
	}
	t.mrs = append(t.mrs, mr)
	tab := make([]mrEntry, max(id+1, len(old)))
	copy(tab, old)
	tab[id] = mrEntry{lkey: mr.LKey(), ok: true, base: base}
	t.tab.Store(&tab)
	return tab[id], nil
}

// close deregisters everything. Nothing is posted any more. What the device did not give back is there for another try.
func (t *mrTable) close() error {
	t.mu.Lock()
	t.closed = true
	mrs := t.mrs
	t.mrs = nil
	t.tab.Store(nil)
	t.mu.Unlock()
	var errs []error
	var left []verbs.MR
	for _, mr := range mrs {
		if err := mr.Deregister(); err != nil {
			errs = append(errs, err)
			left = append(left, mr)
		}
	}
	t.mu.Lock()
	t.mrs = left
	t.mu.Unlock()
	return errors.Join(errs...)
}
