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

// recoveryRound replaces stale regions, and has queues try again that refused an invalidation, with a pause that grows while some cannot be.
func (p *pool) recoveryRound(stop <-chan struct{}) {
	pause := recoverFirst
	var left []*item
	var stuck []*QP
	for {
		p.mu.Lock()
		stuck = append(stuck, p.stuck...)
		p.stuck = nil
		p.mu.Unlock()
		stuck = slices.DeleteFunc(stuck, func(q *QP) bool {
			return q.tryPump() || !q.ready() // done, or lost, or it waits for completions
		})
		left = append(left, p.stale.popAll(p)...)
		keep := left[:0]
		for i, it := range left {
			select {
			case <-stop:
				keep = append(keep, left[i:]...)
				for _, it := range keep {
					p.stale.push(it) // Close takes them
				}
				return
			default:
			}
			if !p.replace(it) {
				keep = append(keep, it)
			}
		}
		if left = keep; len(left) == 0 && len(stuck) == 0 {
			return
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-p.recovery.poke:
		case <-stop:
		}
		t.Stop()
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
