package mrpool

import (
	"slices"
	"time"
)

const (
	// recoverFirst and recoverMost bound the pause between attempts. Deregistration waits by itself, so an attempt that
	// failed has taken its time already.
	recoverFirst = 10 * time.Millisecond
	recoverMost  = 2 * time.Second
	// recoverTries is how often allocation is tried before the place is left empty, for a request to try again.
	recoverTries = 8
)

// recoveryRound replaces stale regions, and has queues try again that refused an invalidation, with a pause that grows while
// some cannot be. It ends with something left, for Close, when stop is closed, and instead of pausing when the pools are being
// left (Pools.Leave): a run holds a reference to the device, and what a device does not give back may never come.
func (p *pool) recoveryRound(stop <-chan struct{}) {
	pause := recoverFirst
	var left []*item
	var stuck []*QP
	leave := func() {
		for _, it := range left {
			p.stale.push(it)
		}
		p.mu.Lock()
		p.stuck = append(p.stuck, stuck...)
		p.mu.Unlock()
	}
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	for {
		p.mu.Lock()
		stuck = append(stuck, p.stuck...)
		p.stuck = nil
		p.mu.Unlock()
		stuck = slices.DeleteFunc(stuck, func(q *QP) bool {
			return q.tryPump() || !q.ready() // done, or lost, or it waits for completions
		})
		left = append(left, p.stale.popAll(p)...)
		left = slices.DeleteFunc(left, func(it *item) bool { return !stopped() && p.replace(it) })
		if len(left) == 0 && len(stuck) == 0 {
			return
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-p.recovery.poke:
		case <-p.ps.leaving:
			stop = p.ps.leaving
		case <-stop:
		}
		t.Stop()
		if stopped() {
			leave()
			return
		}
		pause = min(2*pause, recoverMost)
	}
}

// replace gives a stale item new objects. It reports whether it is done with it.
func (p *pool) replace(it *item) bool {
	if it.mr != nil || it.mw != nil {
		if err := it.destroy(); err != nil {
			if p.stats.recoveryErrors.Inc() == 1 {
				p.ps.logger.Warn("recovery: deregister", "pool", p.name, "err", err)
			}
			return false
		}
		p.stats.destroyed.Inc()
	}
	p.settle(it, nil)
	gen, _ := it.load()
	p.mu.Lock()
	if it.move(gen, stLost, stDead) {
		p.mu.Unlock()
		return true
	}
	p.mu.Unlock()
	p.settle(it, nil) // its owner may have given it back between
	if it.kind == byRegistration {
		p.stats.recovered.Inc()
		p.putEmpty(it)
		return true
	}
	if err := p.ps.ways[it.kind].alloc(it); err != nil {
		p.stats.recoveryErrors.Inc()
		if it.tries++; it.tries < recoverTries {
			return false
		}
		p.ps.logger.Warn("recovery: allocate", "pool", p.name, "err", err)
		it.tries = 0
		p.putEmpty(it)
		return true
	}
	it.tries = 0
	p.stats.alloc.Inc()
	p.stats.recovered.Inc()
	p.putFree(it)
	return true
}
