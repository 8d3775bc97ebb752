package softroce

import (
	"sync"

	"github.com/openrds/openrds/verbs"
)

// asyncQueue delivers asynchronous events, one at a time, on a goroutine that exists only while there
// are any.
type asyncQueue struct {
	mu      sync.Mutex
	idle    sync.Cond // a delivery has ended
	handler func(verbs.AsyncEvent)
	queue   []verbs.AsyncEvent
	running bool
	stopped bool
	missed  bool // the device was removed while there was nobody to hear it
}

// maxAsync bounds events not yet delivered.
const maxAsync = 4096

// SetAsyncHandler implements verbs.Device.
func (d *device) SetAsyncHandler(f func(verbs.AsyncEvent)) {
	a := &d.events
	a.mu.Lock()
	a.handler = f
	missed := f != nil && a.missed
	a.missed = a.missed && !missed
	a.mu.Unlock()
	if missed {
		d.async(verbs.AsyncEvent{Type: verbs.EventDeviceRemoved})
	}
}

// async queues an event. Never waits.
func (d *device) async(e verbs.AsyncEvent) {
	a := &d.events
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.handler == nil || a.stopped {
		a.missed = a.missed || e.Type == verbs.EventDeviceRemoved
		return
	}
	if len(a.queue) >= maxAsync && e.Type != verbs.EventDeviceRemoved { // which comes once, and nothing makes up for it
		d.stats.add(cAsyncDropped, 1)
		return
	}
	a.queue = append(a.queue, e)
	if !a.running {
		a.running = true
		go a.deliver()
	}
}

func (a *asyncQueue) deliver() {
	a.mu.Lock()
	for len(a.queue) > 0 && !a.stopped {
		e, h := a.queue[0], a.handler
		a.queue = append(a.queue[:0], a.queue[1:]...)
		if h == nil {
			continue
		}
		a.mu.Unlock()
		h(e)
		a.mu.Lock()
	}
	a.running = false
	if a.idle.L != nil {
		a.idle.Broadcast()
	}
	a.mu.Unlock()
}

// stop ends deliveries and waits for the one in progress.
func (a *asyncQueue) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stopped = true
	a.idle.L = &a.mu
	for a.running {
		a.idle.Wait()
	}
}
