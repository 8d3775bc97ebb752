package ibdev

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
)

// ErrNoDevice: no provider has a device that owns the address.
var ErrNoDevice = verbs.ErrNoSuchAddress

// ErrClosed: the Registry was closed.
var ErrClosed = verbs.ErrClosed

// Config are the parameters of a Registry.
type Config struct {
	Providers []verbs.Provider // asked in order; required
	Slab      *slab.Slab       // required: where receive buffers come from
	Epoch     *epoch.Domain    // required
	Logger    hclog.Logger     // nil: none

	// Small and Large describe the shared receive queues of each device. Zero values: Small 512, 256 per
	// QP (a kernel's send ring), at most 16384 buffers of SmallRecv; Large 16, however many QPs, at most 4096 of LargeRecv.
	Small, Large RecvConfig

	// RecvMemory bounds the slab memory of the receive buffers of all devices in bytes, beyond the initial ones of
	// each; 0: three eighths of slab.DefaultMaxBytes.
	RecvMemory int64
}

func (c *RecvConfig) setDefaults(initial, perQP, maxBufs int) {
	if c.Max == 0 {
		c.Max = maxBufs
	}
	if c.Initial == 0 {
		c.Initial = initial
	}
	if c.PerQP == 0 {
		c.PerQP = perQP
	}
	c.Initial = min(c.Initial, c.Max)
}

// Registry maps local addresses to devices, which it opens on first use.
type Registry struct {
	cfg     Config
	logger  hclog.Logger
	recvMem atomic.Int64 // bytes of receive buffers

	// table is what Lookup reads, inside an epoch. The registry holds a reference to each device in it; a
	// device taken out may still be found by a reader that entered before, whose TryGet then decides.
	table atomic.Pointer[table]

	mu      sync.Mutex // writers of table, and:
	opening map[netip.Addr]*opening
	live    map[*Device]struct{} // not yet torn down, in the table or not
	closed  bool
}

// table is immutable.
type table struct {
	byAddr map[netip.Addr]*Device
	all    []*Device
}

// opening is an address that somebody is opening: others wait for the outcome.
type opening struct{ done chan struct{} }

// NewRegistry returns an empty Registry.
func NewRegistry(cfg Config) *Registry {
	if cfg.RecvMemory == 0 {
		cfg.RecvMemory = slab.DefaultMaxBytes / 8 * 3
	}
	cfg.Small.setDefaults(512, 256, 16384)
	cfg.Large.setDefaults(16, 0, 4096)
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	r := &Registry{cfg: cfg, logger: cfg.Logger, opening: make(map[netip.Addr]*opening), live: make(map[*Device]struct{})}
	r.table.Store(&table{})
	return r
}

// Lookup returns the device of addr with a reference, nil if it is not open. p is the caller's
// participant and outside. Lock-free.
func (r *Registry) Lookup(p *epoch.Participant, addr netip.Addr) *Device {
	p.Enter()
	d := r.table.Load().byAddr[addr]
	if d != nil && !d.refs.TryGet() {
		d = nil
	}
	p.Exit()
	return d
}

// Open returns the device of addr with a reference, and opens it if need be: the first provider that
// knows the address does. The error is ErrNoDevice when none does, that of the provider that failed,
// ErrClosed, or ctx's. May wait.
func (r *Registry) Open(ctx context.Context, addr netip.Addr) (*Device, error) {
	addr = addr.Unmap()
	for {
		r.mu.Lock()
		if r.closed {
			r.mu.Unlock()
			return nil, ErrClosed
		}
		if d := r.table.Load().byAddr[addr]; d != nil && d.refs.TryGet() {
			r.mu.Unlock()
			return d, nil
		}
		var wait <-chan struct{}
		if o := r.opening[addr]; o != nil {
			wait = o.done
		} else if d := r.dyingLocked(addr); d != nil {
			wait = d.down // its address is not free yet
		}
		if wait == nil {
			o := &opening{done: make(chan struct{})}
			r.opening[addr] = o
			r.mu.Unlock()
			d, err := r.open(addr)
			r.mu.Lock()
			delete(r.opening, addr)
			close(o.done)
			if err == nil && r.closed {
				r.mu.Unlock()
				d.Put()
				return nil, ErrClosed
			}
			if err == nil {
				d.refs.Get()
				r.publishLocked(addr, d)
			}
			r.mu.Unlock()
			return d, err
		}
		r.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (r *Registry) dyingLocked(addr netip.Addr) *Device {
	for d := range r.live {
		if d.addr == addr {
			return d
		}
	}
	return nil
}

// open asks the providers.
func (r *Registry) open(addr netip.Addr) (*Device, error) {
	for _, p := range r.cfg.Providers {
		vdev, err := p.OpenDevice(addr)
		if errors.Is(err, ErrNoDevice) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open %v with %s: %w", addr, p.Name(), err)
		}
		d, err := openDevice(r, addr, vdev)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		r.live[d] = struct{}{}
		r.mu.Unlock()
		r.logger.Debug("device opened", "addr", addr, "provider", p.Name(), "device", vdev.Name())
		return d, nil
	}
	return nil, fmt.Errorf("%v: %w", addr, ErrNoDevice)
}

// publishLocked puts d into the table (nil: takes addr out).
func (r *Registry) publishLocked(addr netip.Addr, d *Device) {
	tab := &table{byAddr: make(map[netip.Addr]*Device)}
	maps.Copy(tab.byAddr, r.table.Load().byAddr)
	if d == nil {
		delete(tab.byAddr, addr)
	} else {
		tab.byAddr[addr] = d
	}
	for _, d := range tab.byAddr {
		tab.all = append(tab.all, d)
	}
	r.table.Store(tab)
}

// remove takes d out of the table and drops the registry's reference once nobody can be on the way
// from the table to a TryGet.
func (r *Registry) remove(d *Device) {
	r.mu.Lock()
	in := r.table.Load().byAddr[d.addr] == d
	if in {
		r.publishLocked(d.addr, nil)
	}
	r.mu.Unlock()
	if in {
		r.cfg.Epoch.Retire(d.Put)
	}
}

func (r *Registry) forget(d *Device) {
	r.mu.Lock()
	delete(r.live, d)
	r.mu.Unlock()
}

// Devices are the devices of this moment, for statistics and for Progress. They carry no references:
// the caller reads counters, nothing else.
func (r *Registry) Devices() []*Device { return slices.Clone(r.table.Load().all) }

// Progress calls Progress of every device, and reports whether any had something to do.
func (r *Registry) Progress() bool {
	any := false
	for _, d := range r.table.Load().all {
		if d.Progress() {
			any = true
		}
	}
	return any
}

// Park tells every device that a caller of Progress is about to sleep.
func (r *Registry) Park() {
	for _, d := range r.table.Load().all {
		d.Park()
	}
}

// Close refuses new devices, gives up the registry's references, and waits until every device has
// been torn down or ctx ends; the error then names the devices that are still held. As an audit it
// is called last: whoever holds a device did not close. nil the second time. May wait.
func (r *Registry) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	tab := r.table.Swap(&table{})
	all := make([]*Device, 0, len(r.live))
	for d := range r.live {
		all = append(all, d)
	}
	r.mu.Unlock()
	for _, d := range tab.all {
		r.cfg.Epoch.Retire(d.Put)
	}
	var errs []error
	for _, d := range all {
		select {
		case <-d.down:
			if d.err != nil {
				errs = append(errs, fmt.Errorf("device %v: %w", d.addr, d.err))
			}
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("device %v: %d references left (%d QPs): %w", d.addr, d.refs.Refs(), len(d.allQPs()), ctx.Err()))
		}
	}
	return errors.Join(errs...)
}
