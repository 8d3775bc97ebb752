package ibdev

import (
	"slices"
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

// reasonHandler notes in which order it hears what has happened to its QP.
type reasonHandler struct {
	countHandler
	heard []string
}

func (h *reasonHandler) SendWC(wc *verbs.WC)       { h.heard = append(h.heard, wc.Status.String()) }
func (h *reasonHandler) QPEvent(t verbs.EventType) { h.heard = append(h.heard, t.String()) }

// oneCQ has a completion that nobody has been told of yet.
type oneCQ struct {
	wc   verbs.WC
	done bool
}

func (c *oneCQ) Poll(wcs []verbs.WC) int {
	if c.done {
		return 0
	}
	c.done, wcs[0] = true, c.wc
	return 1
}
func (c *oneCQ) Arm(bool) bool { return false }
func (c *oneCQ) Close() error  { return nil }

type numQP struct{ verbs.QP }

func (numQP) Num() verbs.QPN { return 7 }

// TestReasonFirst: the event of a QP that went to ERR comes on another way than the completion of the request that failed, and not
// before it: who hears of the event alone takes it for the peer's wish.
func TestReasonFirst(t *testing.T) {
	var h reasonHandler
	d := &Device{qps: map[verbs.QPN]*QP{}}
	q := &cq{dev: d, depth: 16, vcq: &oneCQ{wc: verbs.WC{QPN: 7, Status: verbs.WCRetryExcErr}}}
	d.qps[7] = &QP{QP: numQP{}, handler: &h, num: 7, dev: d, sendCQ: q}
	d.event(verbs.AsyncEvent{Type: verbs.EventQPLastWQEReached, QP: numQP{}})
	want := []string{verbs.WCRetryExcErr.String(), verbs.EventQPLastWQEReached.String()}
	if !slices.Equal(h.heard, want) {
		t.Errorf("heard %q, not %q", h.heard, want)
	}
}
