package rds

import (
	"context"
	"sync/atomic"
	"time"
)

// Who waits, works: a call that found nothing to read, or no room to send, does the provider's
// work itself for a moment before it parks. The answer is then handled by the goroutine that wants it,
// without the scheduler between them.
const (
	// spinTime bounds the moment. It is about what a round trip over loopback takes; parking and
	// being woken costs 5 to 50 us, so there is no point in staying much longer.
	spinTime = 50 * time.Microsecond
	// Rounds without work bound it too: under virtual time the clock stands still, and a wait that
	// was vain last time should not burn a core this time.
	spinMin, spinMax = 1, 256
	// spinWork bounds the rounds that found work: a caller does not become the engine for ever.
	spinWork = 4096
)

// spinHint is what the waits of one kind at one socket learn from each other. Advice only.
type spinHint struct{ rounds atomic.Int32 }

func (h *spinHint) get() int32 { return max(h.rounds.Load(), spinMin) }

func (h *spinHint) paid() { h.rounds.Store(min(h.get()*2, spinMax)) }

func (h *spinHint) vain() { h.rounds.Store(max(h.get()/2, spinMin)) }

// spinner is the work of one call.
type spinner struct {
	hint  *spinHint
	idle  int32
	work  int32
	start time.Time
	spun  bool // rounds were done since the last park
}

// turn does a round of work, and reports false when it is time to park.
func (sp *spinner) turn(tr transport) bool {
	sp.spun = true
	if tr.Progress() {
		sp.idle = 0
		sp.work++
		return sp.work < spinWork
	}
	sp.idle++
	if sp.idle >= sp.hint.get() {
		return false
	}
	now := time.Now()
	if sp.start.IsZero() {
		sp.start = now
	} else if now.Sub(sp.start) > spinTime {
		return false
	}
	// No runtime.Gosched: it wakes another thread to look for work, on the core the answer comes from.
	return true
}

// park sleeps until w, which is in its queues, is woken or ctx is done. Then the work begins anew.
func (sp *spinner) park(ctx context.Context, tr transport, w *waiter) {
	tr.Park()
	start := time.Now()
	if done := ctx.Done(); done != nil {
		select {
		case <-w.wake:
		case <-done:
		}
	} else {
		<-w.wake
	}
	// A short sleep would have been spun with profit.
	if time.Since(start) < spinTime {
		sp.hint.paid()
	} else {
		sp.hint.vain()
	}
	*sp = spinner{hint: sp.hint}
}

// done is told that the call got what it waited for.
func (sp *spinner) done() {
	if sp.spun {
		sp.hint.paid()
	}
}
