package rds

import (
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
}

// set moves the deadline to t, zero for none. Calls that wait are woken if t is not in the future.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
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
	}
	d.mu.Unlock()
	if hit {
		d.fire()
	}
}

// stop ends the timer for good.
func (d *deadline) stop() {
	d.mu.Lock()
	d.when = time.Time{}
	if d.timer != nil {
		d.timer.Stop()
	}
	d.mu.Unlock()
}
