package main

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A pacer sleeps to the microsecond. time.Sleep does not: a process that is idle otherwise waits for its timers in epoll_wait,
// which counts in milliseconds. The thread that sleeps is not at hand for other goroutines, so with a single one of those it
// does not do so.
type pacer struct{ coarse bool }

func newPacer() *pacer {
	if runtime.GOMAXPROCS(0) == 1 {
		return &pacer{coarse: true}
	}
	// The thread's own slack is 50 us.
	runtime.LockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // not allowed: 50 us less exact
	return &pacer{}
}

func (p *pacer) sleep(d time.Duration) {
	if p.coarse {
		time.Sleep(d)
		return
	}
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // a signal ends it early; callers look at the clock
}

func (p *pacer) close() {
	if !p.coarse {
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) // the default
		runtime.UnlockOSThread()
	}
}
