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
	// spinTime bounds the moment. A round trip over loopback takes a tenth of it; parking and being
	// woken costs 5 to 50 us on each side, so there is no point in staying much longer.
	spinTime = 100 * time.Microsecond
	// spinWorth is how short a wait must be, sleep included, to say that one should have worked longer: two who wait
	// for each other in turn, and both sleep, take that long where they could take 10 us.
	spinWorth = 200 * time.Microsecond
	// Rounds without work bound it too, about 0.5 us each: under virtual time the clock stands still, and
	// where waits are long nobody should burn a core at each of them.
	spinMin, spinMax = 1, 256
	// spinWork bounds the rounds that found work: a caller does not become the engine for ever.
	spinWork = 4096
)

// spinHint is what the waits of one kind at one socket learn from each other. Advice only.
type spinHint struct{ rounds atomic.Int32 }

func (h *spinHint) get() int32 { return max(h.rounds.Load(), spinMin) }

func (h *spinHint) paid() {
	if n := h.get(); n < spinMax {
		h.rounds.Store(n * 2)
	}
}

func (h *spinHint) vain() {
	if n := h.get(); n > spinMin {
		h.rounds.Store(n / 2)
	}
}

// spinner is the work of one call.
type spinner struct {
	hint  *spinHint
	idle  int32
	work  int32
	start time.Time // of the first idle round
	spun  bool      // rounds were done since the last park
	full  bool      // the last of them ended spinTime
}

// turn does a round of work, and reports false when it is time to park.
func (sp *spinner) turn(tr transport) bool {
	sp.spun = true
	if tr.Progress() {
		sp.idle = 0
		sp.work++
		return sp.work < spinWork
	}
	now := time.Now()
	if sp.start.IsZero() {
		sp.start = now
	} else if now.Sub(sp.start) > spinTime {
		sp.full = true
		return false
	}
	// Not runtime.Gosched: it wakes another thread to look for work, on the core the answer comes from.
	osYield()
	sp.idle++
	return sp.idle < sp.hint.get()
}

// park sleeps until w, which is in its queues, is woken or ctx is done. Then the work begins anew.
func (sp *spinner) park(ctx context.Context, tr transport, w *waiter) {
	tr.Park()
	if done := ctx.Done(); done != nil {
		select {
		case <-w.wake:
		case <-done:
		}
	} else {
		<-w.wake
	}
	if !sp.full && !sp.start.IsZero() && time.Since(sp.start) < spinWorth {
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
