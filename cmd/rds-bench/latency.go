package main

import (
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Range of recorded times: three significant digits from 1 ns on. What is longer counts as maxLatency.
const (
	maxLatency       = time.Minute
	latencyPrecision = 3
)

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(maxLatency), latencyPrecision)
}

// A recorder keeps the times that one lane measures: of the whole measured interval, and of the part of it since somebody last
// looked.
type recorder struct {
	mu    sync.Mutex
	total *hdrhistogram.Histogram
	part  *hdrhistogram.Histogram // nil: nobody looks
}

func newRecorder(parts bool) *recorder {
	r := &recorder{total: newHistogram()}
	if parts {
		r.part = newHistogram()
	}
	return r
}

func (r *recorder) record(d time.Duration) { r.recordN(d, 1) }

// recordN records n times.
func (r *recorder) recordN(d time.Duration, n int64) {
	v := int64(min(max(d, 1), maxLatency)) // within the range, so that recording does not fail
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.total.RecordValues(v, n)
	if r.part != nil {
		_ = r.part.RecordValues(v, n)
	}
}

// takePart adds the part to h and begins a new one.
func (r *recorder) takePart(h *hdrhistogram.Histogram) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.part != nil {
		h.Merge(r.part)
		r.part.Reset()
	}
}

// addTotal adds all to h.
func (r *recorder) addTotal(h *hdrhistogram.Histogram) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h.Merge(r.total)
}
