package rds

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// A deadline is the read or the write deadline of a socket. It keeps one timer for its whole life.
type deadline struct {
	expired atomic.Bool // decides: calls fail while it is set

	mu    sync.Mutex
	when  time.Time   // zero: none; guarded by mu
	timer *time.Timer // made at the first future deadline; guarded by mu
	fire  func()      // wakes who waits; set before use

	calls   map[*call]struct{} // guarded by mu
	stopped bool               // guarded by mu
}

// A call is one that waits below the socket, where a context is all that it is waited with.
type call struct {
	cancel context.CancelCauseFunc
	heeds  bool // the deadline ends it, not only Close
}

// Causes of a call's end (waitError).
var (
	errCallExpired = errors.New("deadline")
	errCallClosed  = errors.New("closed")
)

// context is ctx that also ends when the socket is closed and, if the call heeds it, when the deadline expires. The caller calls end.
func (d *deadline) context(ctx context.Context, heeds bool) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{cancel, heeds}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.stopped:
		cancel(errCallClosed)
	case heeds && d.expired.Load():
		cancel(errCallExpired)
	}
	if d.calls == nil {
		d.calls = make(map[*call]struct{})
	}
	d.calls[c] = struct{}{}
	return ctx, func() {
		d.mu.Lock()
		delete(d.calls, c)
		d.mu.Unlock()
		cancel(nil)
	}
}

// waitError is err of a call that waited for cause with a context of this kind.
func waitError(ctx context.Context, err, cause error) error {
	switch context.Cause(ctx) {
	case errCallClosed:
		return ErrClosed
	case errCallExpired:
		return deadlineFor(cause)
	}
	return err
}

func (d *deadline) expireCallsLocked() {
	for c := range d.calls {
		if c.heeds {
			c.cancel(errCallExpired)
		}
	}
}

// set moves the deadline to t, zero for none. Calls that wait are woken if t is not in the future.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	if d.stopped { // by a Close that was not seen
		d.mu.Unlock()
		return
	}
	d.when = t
	if d.timer != nil {
		d.timer.Stop() // too late is harmless: expire looks at when
	}
	past := false
	if !t.IsZero() {
		left := time.Until(t)
		switch {
		case left <= 0:
			past = true
		case d.timer == nil:
			d.timer = time.AfterFunc(left, d.expire)
		default:
			d.timer.Reset(left)
		}
	}
	d.expired.Store(past)
	if past {
		d.expireCallsLocked()
	}
	d.mu.Unlock()
	if past {
		d.fire()
	}
}

// expire is the timer's. It may come late, after set has moved the deadline on.
func (d *deadline) expire() {
	d.mu.Lock()
	hit := !d.when.IsZero() && !time.Now().Before(d.when)
	if hit {
		d.expired.Store(true)
		d.expireCallsLocked()
	}
	d.mu.Unlock()
	if hit {
		d.fire()
	}
}

// stop ends the timer for good, and the calls.
func (d *deadline) stop() {
	d.mu.Lock()
	d.when = time.Time{}
	if d.timer != nil {
		d.timer.Stop()
	}
	d.stopped = true
	for c := range d.calls {
		c.cancel(errCallClosed)
	}
	d.mu.Unlock()
}
