package ibdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// ErrDeviceGone: the device was removed.
var ErrDeviceGone = verbs.ErrDeviceGone

// Names of holders that the package knows itself.
const (
	holderQP       = "QP"
	holderRegistry = "registry"
	holderMR       = "memory region in use"
)

// holders counts references by who holds them, for the report of those that are left.
type holders struct {
	mrs atomic.Int64 // regions in use: taken and given back on the data path

	mu     sync.Mutex
	byName map[string]int
}

func (h *holders) add(name string, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.byName == nil {
		h.byName = make(map[string]int)
	}
	h.byName[name] += n
}

// Get takes a further reference; the caller holds one.
func (d *Device) Get() { d.refs.Get() }

// Put gives a reference back. The last one schedules the teardown on a goroutine of its own, so
// it may come from a handler.
func (d *Device) Put() { d.refs.Put() }

// GetNamed is Get for a holder that is called name ("listener") in the report of what is still held. It is
// given back with PutNamed and the same name.
func (d *Device) GetNamed(name string) {
	d.refs.GetNamed(name)
	d.holders.add(name, 1)
}

// PutNamed gives a reference of GetNamed back; otherwise it is Put.
func (d *Device) PutNamed(name string) {
	d.holders.add(name, -1)
	d.refs.PutNamed(name)
}

// mrRef counts the references of memory regions in use, which come and go with requests.
type mrRef Device

func (r *mrRef) Get() {
	r.refs.GetNamed(holderMR)
	r.holders.mrs.Inc()
}

func (r *mrRef) Put() {
	r.holders.mrs.Dec()
	r.refs.PutNamed(holderMR)
}

// Holders names what holds references to the device at this moment: what and how many, and under -tags invariants each
// with the stack that took it.
func (d *Device) Holders() []string {
	if list := d.refs.Holders(); list != nil {
		return list
	}
	other := d.refs.Refs()
	var list []string
	note := func(name string, n int64) {
		if n > 0 {
			list = append(list, fmt.Sprintf("%s (%d)", name, n))
			other -= n
		}
	}
	d.holders.mu.Lock()
	for name, n := range d.holders.byName {
		note(name, int64(n))
	}
	d.holders.mu.Unlock()
	slices.Sort(list)
	note(holderMR, d.holders.mrs.Load())
	note("unnamed", other)
	return list
}

// Removed is closed when the device was removed: unplugged, failed, or closed. It exists until the last reference is
// gone, and nothing new can be made on it.
func (d *Device) Removed() <-chan struct{} { return d.removed }

// Gone reports whether the device was removed.
func (d *Device) Gone() bool {
	select {
	case <-d.removed:
		return true
	default:
		return false
	}
}

// OnRemove has fn called once when the device is removed, or at once, before OnRemove returns, if it has been.
// fn may not wait. It runs on a goroutine of the provider, in no order with others, and before the QPs of the device are told;
// cancel withdraws it, and does not wait for a call in progress.
func (d *Device) OnRemove(fn func()) (cancel func()) {
	key := &fn
	d.hooksMu.Lock()
	late := d.hooks == nil
	if !late {
		d.hooks[key] = struct{}{}
	}
	d.hooksMu.Unlock()
	if late {
		fn()
		return func() {}
	}
	return func() {
		d.hooksMu.Lock()
		delete(d.hooks, key)
		d.hooksMu.Unlock()
	}
}

// Close removes the device as if it had gone away, gives back the caller's reference, and waits until the device
// has been torn down or ctx ends. It waits for nobody to let go: the error is an audit, a *verbs.BusyError beside ctx's
// that names what is still held, and the device goes when that does. May wait.
func (d *Device) Close(ctx context.Context) error {
	d.reg.cfg.Epoch.MayWait("Device.Close")
	d.reg.remove(d, verbs.EventDeviceRemoved, false)
	d.Put()
	return d.wait(ctx)
}

// wait waits for the end of the teardown.
func (d *Device) wait(ctx context.Context) error {
	select {
	case <-d.down:
	default:
		select {
		case <-d.down:
		case <-ctx.Done():
			held := &verbs.BusyError{Object: "device " + d.dev.Name(), Holders: d.Holders()}
			return errors.Join(held, ctx.Err())
		}
	}
	if d.err != nil {
		return fmt.Errorf("device %s: %w", d.dev.Name(), d.err)
	}
	return nil
}
