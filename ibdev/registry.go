package ibdev

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/mrpool"
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

	// Pools bounds the registered memory of each device: see package mrpool. Zero values are its defaults.
	Pools PoolConfig
}

// PoolConfig bounds the pools of a device.
type PoolConfig struct {
	Small, Large mrpool.PoolConfig // of up to 3 pages, of up to 257
	MaxPinned    int64             // bytes, both; 0: what both may pin
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
	live    map[*Device]struct{}         // not yet torn down, in the table or not
	absent  map[netip.Addr]chan struct{} // closed when a device may have appeared: see Await
	closed  bool
	past    [2]uint64 // completions, of sends and of receives, of devices that are gone

	watch     sync.Once
	unwatched bool     // a provider does not tell when its devices come; written in watch
	stops     []func() // end the watching; guarded by mu
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
	r := &Registry{cfg: cfg, logger: cfg.Logger, opening: make(map[netip.Addr]*opening), live: make(map[*Device]struct{}), absent: make(map[netip.Addr]chan struct{})}
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

// Get is Lookup for who is no participant. It takes the registry's lock, and does not wait.
func (r *Registry) Get(addr netip.Addr) *Device {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d := r.table.Load().byAddr[addr]; d != nil && d.refs.TryGet() {
		return d
	}
	return nil
}

// Open returns the device of addr with a reference, and opens it if need be: the first provider that
// knows the address does. The error is ErrNoDevice when none does, that of the provider that failed,
// ErrClosed, or ctx's. May wait.
func (r *Registry) Open(ctx context.Context, addr netip.Addr) (*Device, error) {
	r.cfg.Epoch.MayWait("Registry.Open")
	addr = addr.Unmap()
	// Before the first look at an address, so that none comes unnoticed after it.
	r.watch.Do(r.startWatching)
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
			wait = d.free
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
			if err == nil && d.Gone() {
				// It went while it was being opened: somebody else may have the address by now.
				r.mu.Unlock()
				d.Put()
				continue
			}
			if err == nil {
				d.GetNamed(holderRegistry)
				d.listed = true
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

// retryAfter is how long Await leaves an address that has a device which cannot be opened, or whose provider does not
// tell of devices that appear.
const retryAfter = time.Second

// Await is Open that waits, for an address without a device, until one appears: the provider says so
// (verbs.DeviceWatcher), or is asked once a second if it does not. The error is ErrClosed or ctx's. May wait.
func (r *Registry) Await(ctx context.Context, addr netip.Addr) (*Device, error) {
	addr = addr.Unmap()
	for {
		appeared := r.appears(addr)
		d, err := r.Open(ctx, addr)
		switch {
		case err == nil:
			return d, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case r.isClosed():
			return nil, ErrClosed
		}
		var retry <-chan time.Time
		if !errors.Is(err, ErrNoDevice) || r.unwatched {
			retry = time.After(retryAfter)
		}
		select {
		case <-appeared:
		case <-retry:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// appears returns a channel that is closed when a device for addr may have appeared after the call, or the registry was
// closed.
func (r *Registry) appears(addr netip.Addr) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	ch := r.absent[addr]
	if ch == nil {
		ch = make(chan struct{})
		r.absent[addr] = ch
	}
	return ch
}

func (r *Registry) appearedLocked(addr netip.Addr) {
	if ch := r.absent[addr]; ch != nil {
		delete(r.absent, addr)
		close(ch)
	}
}

func (r *Registry) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

// startWatching asks the providers to tell of devices that come.
func (r *Registry) startWatching() {
	for _, p := range r.cfg.Providers {
		w, ok := p.(verbs.DeviceWatcher)
		if !ok {
			r.unwatched = true
			continue
		}
		stop, err := w.WatchDevices(r.deviceEvent)
		if err != nil {
			r.logger.Warn("devices that come and go are not told of", "provider", p.Name(), "err", err)
			r.unwatched = true
			continue
		}
		r.mu.Lock()
		closed := r.closed
		if !closed {
			r.stops = append(r.stops, stop)
		}
		r.mu.Unlock()
		if closed {
			stop()
		}
	}
}

// deviceEvent is told of addresses. That one has gone says nothing new: the device of it raises an event of
// its own, which cannot be taken for that of its successor.
func (r *Registry) deviceEvent(e verbs.DeviceEvent) {
	r.logger.Debug("address", "addr", e.Addr, "present", e.Present)
	if e.Present {
		r.mu.Lock()
		r.appearedLocked(e.Addr.Unmap())
		r.mu.Unlock()
	}
}

// dyingLocked is a device that still holds addr, although the table does not have it any more.
func (r *Registry) dyingLocked(addr netip.Addr) *Device {
	for d := range r.live {
		if d.addr == addr && !d.freed {
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

// remove takes d out of the table, tells its users (Device.gone), and drops the registry's reference once nobody can be on
// the way from the table to a TryGet. What comes after the first call for a device is only that free, the hardware's
// being gone already, is taken note of. It does not wait.
func (r *Registry) remove(d *Device, why verbs.EventType, free bool) {
	r.mu.Lock()
	if free {
		r.freeLocked(d)
	}
	first := !d.Gone()
	listed := d.listed
	if first {
		d.listed = false
		if listed {
			r.publishLocked(d.addr, nil)
		}
		close(d.removed)
	}
	r.mu.Unlock()
	if !first {
		return
	}
	d.pools.Leave()
	d.gone(why)
	if listed {
		r.cfg.Epoch.Retire(func() { d.PutNamed(holderRegistry) })
	}
}

// freeLocked: the address of d can be opened again.
func (r *Registry) freeLocked(d *Device) {
	if !d.freed {
		d.freed = true
		close(d.free)
		r.appearedLocked(d.addr)
	}
}

// forget is the end of a teardown.
func (r *Registry) forget(d *Device) {
	r.mu.Lock()
	delete(r.live, d)
	r.past[0] += d.stats.sendCompletions.Load()
	r.past[1] += d.stats.recvCompletions.Load()
	r.freeLocked(d)
	r.mu.Unlock()
}

// Devices are the devices of this moment, for statistics and for Progress. They carry no references:
// the caller reads counters, nothing else.
func (r *Registry) Devices() []*Device { return slices.Clone(r.table.Load().all) }

// Completions are running totals of all devices there have been: of completions polled by the send side and by the receive
// side.
func (r *Registry) Completions() (send, recv uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	send, recv = r.past[0], r.past[1]
	for d := range r.live {
		send += d.stats.sendCompletions.Load()
		recv += d.stats.recvCompletions.Load()
	}
	return send, recv
}

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
// been torn down or ctx ends. It is an audit, called last: the error is a *verbs.BusyError for each device that is still
// held, naming the holders, beside ctx's. It may be called again, and returns nil once everything is
// gone. May wait.
func (r *Registry) Close(ctx context.Context) error {
	r.cfg.Epoch.MayWait("Registry.Close")
	r.mu.Lock()
	r.closed = true
	stops := r.stops
	r.stops = nil
	tab := r.table.Swap(&table{})
	for _, d := range tab.all {
		d.listed = false
	}
	for addr := range r.absent {
		r.appearedLocked(addr)
	}
	r.mu.Unlock()
	for _, stop := range stops {
		stop()
	}
	errs := r.awaitOpening(ctx)
	r.mu.Lock()
	all := make([]*Device, 0, len(r.live))
	for d := range r.live {
		all = append(all, d)
	}
	r.mu.Unlock()
	for _, d := range all {
		d.pools.Leave()
	}
	for _, d := range tab.all {
		r.cfg.Epoch.Retire(func() { d.PutNamed(holderRegistry) })
	}
	for _, d := range all {
		errs = append(errs, d.wait(ctx))
	}
	return errors.Join(errs...)
}

// awaitOpening waits for those who are opening devices, whom a closed registry will not let have them, or for ctx's end: then the errors name
// the addresses.
func (r *Registry) awaitOpening(ctx context.Context) (errs []error) {
	r.mu.Lock()
	opening := maps.Clone(r.opening)
	r.mu.Unlock()
	for addr, o := range opening {
		select {
		case <-o.done:
		case <-ctx.Done():
			errs = append(errs, &verbs.BusyError{Object: "address " + addr.String(), Holders: []string{"a device that is being opened"}}, ctx.Err())
		}
	}
	return errs
}
