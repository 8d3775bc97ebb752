package ibdev

import (
	"fmt"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

const (
	// pollBatch is how many completions are polled at a time.
	pollBatch = 64
	// pollRound is after how many the batch ends, whatever is left: a card goes on completing while we poll, and what waits for the end
	// of the batch, our acknowledgements above all, or for the role, must not wait for ever.
	pollRound = 16 * pollBatch
)

// cq is a completion queue and its poller.
//
// Sends and receives complete in different queues because their bounds differ: receive completions are
// bounded by the shared receive queues, so one queue holds them all; send completions are reserved
// per QP, and a further queue is made when the last is full.
//
// The poller is a role: the provider's handler takes it, and so does a goroutine that destroys a
// QP and must know that nothing of it is left (barrier). A handler that finds it taken leaves a note and
// goes; it never waits.
type cq struct {
	dev      *Device
	recv     bool
	depth    int
	reserved int // completions promised to QPs; guarded by dev.mu

	vcq verbs.CQ

	again  atomic.Bool
	role   sync.Mutex // the poller
	closed bool       // guarded by role
	hands  sync.WaitGroup

	// The poller's.
	wcs     [pollBatch]verbs.WC
	touched []*QP
}

func (d *Device) newCQ(recv bool, depth int) (*cq, error) {
	q := &cq{dev: d, recv: recv, depth: depth}
	vcq, err := d.dev.CreateCQ(verbs.CQConfig{Depth: depth, Handler: func(verbs.CQ) { q.run() }})
	if err != nil {
		return nil, fmt.Errorf("completion queue of %d: %w", depth, err)
	}
	q.vcq = vcq
	vcq.Arm(false)
	return q, nil
}

// run is the handler.
func (q *cq) run() {
	for q.again.Store(true); q.round(); {
	}
}

// round polls if there is something to be polled and nobody at it, and reports whether there may be more for the caller.
func (q *cq) round() bool {
	if !q.again.Load() || !q.role.TryLock() {
		return false
	}
	q.again.Store(false)
	if q.poll() >= pollRound {
		q.again.Store(true)
	}
	q.role.Unlock()
	return q.again.Load()
}

// barrier returns when every completion that was in the queue has been dispatched. Not in a handler.
func (q *cq) barrier() {
	q.as(func() {
		n := pollRound
		for left := q.depth; n >= pollRound && left > 0; left -= n { // no more than that were there
			n = q.poll()
		}
		if n >= pollRound {
			q.again.Store(true) // there may be others by now
		}
	})
}

// as runs fn in the role. Not in a handler. What handlers have left meanwhile is seen to: one round here, and the rest, while
// completions come as fast as they are polled, on a goroutine of its own.
func (q *cq) as(fn func()) {
	q.role.Lock()
	fn()
	q.role.Unlock()
	if !q.round() {
		return
	}
	q.role.Lock()
	if !q.closed {
		q.hands.Go(func() {
			for q.round() {
			}
		})
	}
	q.role.Unlock()
}

// close ends the polling, of a queue that no QP uses any more, and closes it.
func (q *cq) close() error {
	q.role.Lock()
	q.closed = true
	q.role.Unlock()
	q.hands.Wait()
	return q.vcq.Close()
}

// poll dispatches completions, until there are none or were pollRound, arms the queue if it is empty, and ends the batch of every QP
// that had one. It returns how many there were.
func (q *cq) poll() int {
	d := q.dev
	total := 0
	for total < pollRound && !q.closed {
		n := q.vcq.Poll(q.wcs[:])
		if n == 0 {
			if q.vcq.Arm(false) {
				continue
			}
			break
		}
		total += n
		if q.recv {
			q.dispatchRecv(q.wcs[:n])
		} else {
			q.dispatchSend(q.wcs[:n])
		}
	}
	if total == 0 {
		return 0
	}
	side := q.side()
	for i, qp := range q.touched {
		qp.touched[side] = false
		qp.handler.BatchEnd(q.recv)
		q.touched[i] = nil
	}
	q.touched = q.touched[:0]
	if q.recv {
		d.stats.recvCompletions.Add(uint64(total))
	} else {
		d.stats.sendCompletions.Add(uint64(total))
	}
	return total
}

func (q *cq) side() int {
	if q.recv {
		return 1
	}
	return 0
}

// touch notes that qp had a completion in this batch.
func (q *cq) touch(qp *QP) {
	if side := q.side(); !qp.touched[side] {
		qp.touched[side] = true
		q.touched = append(q.touched, qp)
	}
}

func (q *cq) dispatchSend(wcs []verbs.WC) {
	var qp *QP
	for i := range wcs {
		wc := &wcs[i]
		if qp == nil || qp.num != wc.QPN {
			if qp = q.dev.findQP(wc.QPN); qp == nil {
				q.dev.stats.strayCompletions.Inc()
				continue
			}
			q.touch(qp)
		}
		if wc.ID&mrpool.WRBit != 0 && qp.pool != nil {
			qp.pool.Completion(wc) // that the QP is in ERR, if so, the owner learns by its own requests and events
			continue
		}
		qp.handler.SendWC(wc)
	}
}

func (q *cq) dispatchRecv(wcs []verbs.WC) {
	d := q.dev
	var qp *QP
	for i := range wcs {
		wc := &wcs[i]
		pool := d.large
		if wc.ID&smallBit != 0 {
			pool = d.small
		}
		if wc.Flags&verbs.WCWithInvalidate != 0 && wc.Status == verbs.WCSuccess {
			d.pools.Invalidated(wc.InvRKey) // whoever has it need not, and a request to do so would fail
		}
		b := pool.completed(wc.ID)
		if b == nil {
			d.stats.strayCompletions.Inc()
			continue
		}
		if qp == nil || qp.num != wc.QPN {
			if qp = d.findQP(wc.QPN); qp == nil {
				d.stats.strayCompletions.Inc()
				b.Put()
				continue
			}
			q.touch(qp)
		}
		qp.handler.RecvWC(wc, b)
	}
	d.small.settle()
	d.large.settle()
}
