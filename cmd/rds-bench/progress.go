package main

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progress tells a person how far a measurement is.
type progress interface {
	begin(s spec)                  // the next run
	advance(elapsed time.Duration) // into the warm-up, then into the measured interval
	finish()                       // the terminal's line is free again
}

// noProgress is for output that nobody watches.
type noProgress struct{}

func (noProgress) begin(spec)            {}
func (noProgress) advance(time.Duration) {}
func (noProgress) finish()               {}

// barProgress draws a bar on a terminal.
type barProgress struct {
	bar     *progressbar.ProgressBar
	perRun  time.Duration
	done    time.Duration // runs before this one
	started bool
	last    time.Duration
	base    time.Duration // intervals of this run that are over
}

func newBarProgress(w io.Writer, runs int, p params) *barProgress {
	perRun := p.Warmup + p.Duration
	return &barProgress{perRun: perRun, bar: progressbar.NewOptions64(int64(runs)*perRun.Milliseconds(),
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetWidth(30),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionThrottle(50*time.Millisecond),
	)}
}

func (b *barProgress) begin(s spec) {
	if b.started {
		b.done += b.perRun
	}
	b.started, b.base, b.last = true, 0, 0
	b.bar.Describe(s.String())
	b.show(0)
}

func (b *barProgress) advance(elapsed time.Duration) {
	if elapsed < b.last { // the warm-up is over
		b.base += b.last
	}
	b.last = elapsed
	b.show(b.base + elapsed)
}

// show draws; what the terminal thinks of it does not matter to the measurement.
func (b *barProgress) show(inRun time.Duration) {
	_ = b.bar.Set64((b.done + min(inRun, b.perRun)).Milliseconds())
}

func (b *barProgress) finish() { _ = b.bar.Finish() }
