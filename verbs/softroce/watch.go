package softroce

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/openrds/openrds/verbs"
)

// Devices come and go: by Provider.Add and Remove, and, on the network of the host and as long as somebody watches,
// with the addresses of its interfaces.
//
//	absent ──OpenDevice──▶ open ──Remove, interface down, address deleted──▶ gone ──Close──▶
//	  ▲                     │                                                  │
//	  └──────Close──────────┘         the address can be opened again at once ─┘
//
// A device that is gone receives and sends nothing. Its QPs are in ERR, their requests flushed to handlers that are called
// as before, its connections have ended without a word to their peers (it could not say one if its interface is down, and a
// kernel that hears a DREQ does worse than one that does not), and nothing new can be made on it: ErrDeviceGone. Its
// objects are closed as ever, which waits for nothing that comes from the network.

// Remove takes the device of addr away, as if it had been unplugged, and has OpenDevice answer ErrNoSuchAddress until
// Add. When it returns, the address is free, although the old device is still to be closed by its
// owner. An address that is not open, or was removed before, is only taken note of. ErrInvalid for what is no address of a device.
// Not in a handler. May wait.
func (p *Provider) Remove(addr netip.Addr) error {
	addr = addr.Unmap()
	if err := checkAddr(addr); err != nil {
		return fmt.Errorf("remove device: %w", err)
	}
	p.changes.Lock()
	defer p.changes.Unlock()
	p.mu.Lock()
	was := p.removed[addr]
	p.removed[addr] = true
	p.mu.Unlock()
	if p.unplug(addr); !was {
		p.tell(verbs.DeviceEvent{Addr: addr})
	}
	return nil
}

// Add undoes Remove: the address can be opened again. An address that was not removed is left alone.
func (p *Provider) Add(addr netip.Addr) error {
	addr = addr.Unmap()
	if err := checkAddr(addr); err != nil {
		return fmt.Errorf("add device: %w", err)
	}
	p.changes.Lock()
	defer p.changes.Unlock()
	p.mu.Lock()
	was := p.removed[addr]
	delete(p.removed, addr)
	p.mu.Unlock()
	if was && (p.mon == nil || p.mon.present(addr)) {
		p.tell(verbs.DeviceEvent{Addr: addr, Present: true})
	}
	return nil
}

// unplug removes the open device of addr, if there is one. The caller holds changes.
func (p *Provider) unplug(addr netip.Addr) bool {
	p.mu.Lock()
	d := p.devs[addr]
	p.mu.Unlock()
	if d == nil {
		return false
	}
	d.unplug()
	p.mu.Lock()
	if p.devs[addr] == d {
		delete(p.devs, addr)
	}
	p.mu.Unlock()
	return true
}

// unplug is the removal of the device. Several may call it.
func (d *device) unplug() {
	d.mayWait("removal")
	// 1. Nothing new is made on it.
	d.mu.Lock()
	first := !d.closed && !d.removed.Swap(true)
	d.mu.Unlock()
	if !first {
		return
	}
	// 2. The event goes first: what follows raises events of QPs, and whoever gets those should know the reason.
	d.async(verbs.AsyncEvent{Type: verbs.EventDeviceRemoved})
	// 3. Connections and attempts end, in silence.
	d.cm.unplug()
	// 4. The QPs go to ERR and flush; what waits for the socket is lost with it.
	d.role.Lock()
	defer d.unlockRole() // which wakes the engine: it calls the handlers
	if d.closing {
		return // Close was faster: the socket is its business
	}
	d.off = true
	d.tx.blocked = false
	d.tx.clear()
	d.conn.Unplug()
	d.qps.each(func(q *qp) {
		if !q.closed.Load() && q.State() != verbs.StateReset {
			q.enterErr()
		}
	})
}

// unplug ends all connections and attempts without a word, and takes no more.
func (m *connManager) unplug() {
	m.mu.Lock()
	defer m.unlock()
	if m.closed {
		return
	}
	m.closed = true
	m.q.close()
	for _, c := range m.sortedLocked() {
		if c.state == cmEstab {
			m.endLocked(c)
		}
		c.failLocked(verbs.ErrDeviceGone)
		m.goneLocked(c)
	}
}

// isRemoved reports whether the device was unplugged.
func (d *device) isRemoved() bool { return d.removed.Load() }

// watcher is a call of WatchDevices. Its events are delivered one at a time on a goroutine that exists while there are any; one
// that is not delivered yet is replaced by a later one of its address, so that what waits is bounded by the
// number of addresses.
type watcher struct {
	fn func(verbs.DeviceEvent)

	mu      sync.Mutex
	idle    sync.Cond // on mu: a delivery has ended
	queue   []verbs.DeviceEvent
	running bool
	stopped bool
}

// WatchDevices implements verbs.DeviceWatcher. On the network of the host it begins to listen to the kernel's news of interfaces
// and addresses, with the first watcher, and ends with the last; without a watcher devices go by Remove only. fn may not stop
// the watching.
func (p *Provider) WatchDevices(fn func(verbs.DeviceEvent)) (stop func(), err error) {
	p.changes.Lock()
	defer p.changes.Unlock()
	if _, ofHost := p.cfg.Network.(udpNetwork); ofHost && len(p.watchers) == 0 {
		if p.mon, err = newMonitor(p); err != nil {
			return nil, fmt.Errorf("watch devices: %w", err)
		}
	}
	w := &watcher{fn: fn}
	w.idle.L = &w.mu
	p.watchers = append(p.watchers, w)
	return func() { p.unwatch(w) }, nil
}

func (p *Provider) unwatch(w *watcher) {
	p.changes.Lock()
	var mon *monitor
	for i, x := range p.watchers {
		if x == w {
			p.watchers = append(p.watchers[:i:i], p.watchers[i+1:]...)
			if len(p.watchers) == 0 {
				mon, p.mon = p.mon, nil
			}
			break
		}
	}
	p.changes.Unlock()
	mon.close()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	for w.running {
		w.idle.Wait()
	}
}

// tell has every watcher told. The caller holds changes, which makes the order of events that of what happened.
func (p *Provider) tell(e verbs.DeviceEvent) {
	p.cfg.Logger.Debug("address", "addr", e.Addr, "present", e.Present)
	for _, w := range p.watchers {
		w.tell(e)
	}
}

func (w *watcher) tell(e verbs.DeviceEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.queue {
		if w.queue[i].Addr == e.Addr {
			w.queue = append(w.queue[:i], w.queue[i+1:]...)
			break
		}
	}
	w.queue = append(w.queue, e)
	if !w.running && !w.stopped {
		w.running = true
		go w.deliver()
	}
}

func (w *watcher) deliver() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 && !w.stopped {
		e := w.queue[0]
		w.queue = append(w.queue[:0], w.queue[1:]...)
		w.mu.Unlock()
		w.fn(e)
		w.mu.Lock()
	}
	w.running = false
	w.idle.Broadcast()
}
