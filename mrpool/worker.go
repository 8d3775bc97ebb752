package mrpool

import "sync"

// worker runs a function while there is work: kick starts a goroutine, or has the one at work go round once more.
// Each goroutine holds a reference to the device and drops it as its last act, when the worker already counts as
// at rest: that reference may be the last, and what it then starts may cancel this very worker.
type worker struct {
	ref Ref
	run func(stop <-chan struct{}) // one round; returns soon when stop is closed
	// stop is closed by cancel. A round waits for nothing that is done after cancel.
	stop chan struct{}
	poke chan struct{} // holds a token for a round that sleeps: there is new work

	mu        sync.Mutex
	running   bool
	again     bool
	cancelled bool
	rest      chan struct{} // of the goroutine: closed when it is at rest
	next      chan struct{} // closed at the end of the round that starts next; nil: nobody asked
}

func newWorker(ref Ref, run func(stop <-chan struct{})) *worker {
	return &worker{ref: ref, run: run, stop: make(chan struct{}), poke: make(chan struct{}, 1)}
}

// kick has a round begin after now. The caller holds a reference to the device.
func (w *worker) kick() {
	w.mu.Lock()
	w.kickLocked()
	w.mu.Unlock()
}

func (w *worker) kickLocked() {
	switch {
	case w.cancelled:
	case w.running:
		if !w.again {
			w.again = true
			select {
			case w.poke <- struct{}{}:
			default:
			}
		}
	default:
		w.running, w.rest = true, make(chan struct{})
		w.ref.Get()
		go w.work()
	}
}

// round is kick, and a channel that is closed when that round is over, or will not be.
func (w *worker) round() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next == nil {
		w.next = make(chan struct{})
		if w.cancelled {
			close(w.next)
		}
	}
	c := w.next
	w.kickLocked()
	return c
}

func (w *worker) work() {
	w.mu.Lock()
	for {
		w.again = false
		select {
		case <-w.poke:
		default:
		}
		asked := w.next
		w.next = nil
		w.mu.Unlock()
		w.run(w.stop)
		if asked != nil {
			close(asked)
		}
		w.mu.Lock()
		if !w.again || w.cancelled {
			break
		}
	}
	w.running = false
	close(w.rest)
	w.mu.Unlock()
	w.ref.Put()
}

// cancel ends the worker: no round begins any more, and none runs once it has returned. May wait.
func (w *worker) cancel() {
	w.mu.Lock()
	if !w.cancelled {
		w.cancelled = true
		close(w.stop)
	}
	running, rest := w.running, w.rest
	w.mu.Unlock()
	if running {
		<-rest
	}
	w.mu.Lock()
	if w.next != nil {
		select {
		case <-w.next:
		default:
			close(w.next)
		}
	}
	w.mu.Unlock()
}
