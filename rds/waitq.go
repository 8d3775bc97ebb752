package rds

import (
	"slices"
	"sync"
	"sync/atomic"
)

// A waiter is one blocked call. A wake is a token in its channel; whoever is woken looks at
// everything again, so a wake too many costs time and nothing else.
type waiter struct {
	wake chan struct{} // capacity 1
}

func newWaiter() *waiter { return &waiter{wake: make(chan struct{}, 1)} }

func (w *waiter) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// A waitq is the waiters of one condition, in the order they came. The zero waitq is ready.
//
// No wake is lost if a waiter enters the queue before it looks at the condition for the last time, and
// whoever changes the condition does so before it looks at the queue.
type waitq struct {
	n  atomic.Int32 // len(ws), for those who look without the lock
	mu sync.Mutex
	ws []*waiter // guarded by mu
}

func (q *waitq) empty() bool { return q.n.Load() == 0 }

func (q *waitq) add(w *waiter) {
	q.mu.Lock()
	q.ws = append(q.ws, w)
	q.n.Store(int32(len(q.ws)))
	q.mu.Unlock()
}

// remove takes w out. It is a no-op for a waiter that a wakeOne has taken out already.
func (q *waitq) remove(w *waiter) {
	q.mu.Lock()
	if i := slices.Index(q.ws, w); i >= 0 {
		q.ws = slices.Delete(q.ws, i, i+1)
		q.n.Store(int32(len(q.ws)))
	}
	q.mu.Unlock()
}

// wakeOne takes the waiter that waits longest out and wakes it.
func (q *waitq) wakeOne() {
	if q.empty() {
		return
	}
	q.mu.Lock()
	if len(q.ws) > 0 {
		w := q.ws[0]
		q.ws = slices.Delete(q.ws, 0, 1)
		q.n.Store(int32(len(q.ws)))
		w.notify()
	}
	q.mu.Unlock()
}

// wakeAll wakes all waiters; they leave by themselves.
func (q *waitq) wakeAll() {
	if q.empty() {
		return
	}
	q.mu.Lock()
	for _, w := range q.ws {
		w.notify()
	}
	q.mu.Unlock()
}

// waiterPool keeps waiters between calls, so that a call which blocks does not allocate.
type waiterPool struct {
	mu   sync.Mutex
	free []*waiter
}

const maxFreeWaiters = 16 // per socket; as many calls block at once without allocating

func (p *waiterPool) get() *waiter {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		w := p.free[n-1]
		p.free = p.free[:n-1]
		return w
	}
	return newWaiter()
}

// put takes back a waiter that is in no queue any more.
func (p *waiterPool) put(w *waiter) {
	select {
	case <-w.wake: // a token of the call that ends must not wake the next one
	default:
	}
	p.mu.Lock()
	if len(p.free) < maxFreeWaiters {
		p.free = append(p.free, w)
	}
	p.mu.Unlock()
}
