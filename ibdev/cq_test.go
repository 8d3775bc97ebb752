package ibdev

import (
	"testing"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// endlessCQ completes sends of a QP for as long as it is on.
type endlessCQ struct {
	qpn   verbs.QPN
	on    atomic.Bool
	polls atomic.Int64
}

func (c *endlessCQ) Poll(wcs []verbs.WC) int {
	c.polls.Inc()
	if !c.on.Load() {
		return 0
	}
	for i := range wcs {
		wcs[i] = verbs.WC{QPN: c.qpn}
	}
	return len(wcs)
}
func (c *endlessCQ) Arm(bool) bool { return false }
func (c *endlessCQ) Close() error  { return nil }

type countHandler struct{ sends, ends atomic.Int64 }

func (h *countHandler) SendWC(*verbs.WC)           { h.sends.Inc() }
func (h *countHandler) RecvWC(*verbs.WC, *RecvBuf) {}
func (h *countHandler) BatchEnd(bool)              { h.ends.Inc() }
func (h *countHandler) QPEvent(verbs.EventType)    {}

// TestEndlessCompletions: a card that goes on completing while we poll keeps neither the end of a batch away, nor who waits for
// the poller's role.
func TestEndlessCompletions(t *testing.T) {
	var h countHandler
	d := &Device{qps: map[verbs.QPN]*QP{}}
	c := &endlessCQ{qpn: 7}
	q := &cq{dev: d, depth: 4096, vcq: c}
	d.qps[7] = &QP{handler: &h, num: 7, dev: d}
	c.on.Store(true)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		q.run()
	}()
	through := make(chan int64, 1)
	go func() {
		q.barrier() // returns when what was there has been dispatched, although there is always more
		q.as(func() { through <- h.sends.Load() / max(1, h.ends.Load()) })
	}()
	select {
	case n := <-through:
		if n == 0 || n > pollRound {
			t.Errorf("%d completions in a batch", n)
		}
	case <-time.After(time.Minute):
		t.Error("nobody gets the role")
	}
	c.on.Store(false)
	<-stopped
	if err := q.close(); err != nil {
		t.Error(err)
	}
}
