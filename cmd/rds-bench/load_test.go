package main

import (
	"context"
	"math"
	"testing"
	"time"
)

// The reason for load runs: a stall of the server is felt by every datagram that was due in the meantime, not by one.
func TestLoadCountsEveryDelayed(t *testing.T) {
	t.Parallel()
	const (
		rate  = 1000
		stall = 200 * time.Millisecond
	)
	stallOnce := func(f *mangledFlow, n int, more bool) error {
		if f.count == spoiled {
			time.Sleep(stall)
		}
		return f.flow.send(n, more)
	}
	open := func(name string, o rdsOptions) (transport, error) {
		tr, err := newTransport(name, o)
		return mangledTransport{tr, stallOnce}, err
	}
	p := shortParams()
	p.Duration = 600 * time.Millisecond
	c := connectClient(t, serveLoopback(t, open), p, newTransport)
	s := testSpec(transportTCP, testLoad, 64)
	s.Rate = rate
	r, err := c.run(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	// One after the other they waited 200 ms, 199 ms, ...: 150 of them longer than 50 ms. A busy machine adds to that.
	longer := int64(0)
	for _, b := range r.times.Distribution() {
		if b.From > int64(50*time.Millisecond) {
			longer += b.Count
		}
	}
	if longer < 140 {
		t.Errorf("%d of %d waited for more than 50 ms", longer, r.RTTSeconds.Count)
	}
	if want := int64(rate * 6 / 10); r.RTTSeconds.Count < want*9/10 {
		t.Errorf("%d datagrams were timed, want %d or so", r.RTTSeconds.Count, want)
	}
}

// What is due while the transport takes nothing counts too, with the time for which it waited at least.
func TestLoadCountsUnsent(t *testing.T) {
	for _, tc := range []struct {
		name string
		rate float64
	}{{"few", 1000}, {"very many", 1e9}} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSide(spec{Test: testLoad, Rate: tc.rate, Sockets: 2, Size: 1}, true, nil)
			s.begun = time.Now().Add(-3 * time.Second)
			s.from.Store(int64(time.Second))
			s.to.Store(int64(2 * time.Second))
			l := &lane{side: s, index: 1, times: newRecorder(false), late: newRecorder(false)}
			l.countUnsent(uint64(1.5 * tc.rate / 2)) // those of 1.5 s on; this flow has half of all
			h := newHistogram()
			l.times.addTotal(h)
			if n, want := float64(h.TotalCount()), tc.rate/4; math.Abs(n-want) > want/100+1 {
				t.Errorf("%v were counted, want %v", n, want)
			}
			// The earliest had waited 1.5 s at the end, the latest one second.
			if lo, hi := time.Duration(h.Min()), time.Duration(h.Max()); lo < 990*time.Millisecond || hi < 1450*time.Millisecond || hi > 4*time.Second {
				t.Errorf("they waited %v to %v", lo, hi)
			}
		})
	}
}

func TestLoadSchedule(t *testing.T) {
	s := newSide(spec{Test: testLoad, Rate: 1000, Sockets: 4}, true, nil)
	for _, tc := range []struct {
		index int
		seq   uint64
		want  time.Duration
	}{{0, 0, 0}, {1, 0, time.Millisecond}, {3, 0, 3 * time.Millisecond}, {0, 1, 4 * time.Millisecond}, {2, 250, 1002 * time.Millisecond}} {
		l := &lane{side: s, index: tc.index}
		if got := l.due(tc.seq); (got - tc.want).Abs() > time.Microsecond {
			t.Errorf("flow %d, datagram %d is due at %v, want %v", tc.index, tc.seq, got, tc.want)
		}
	}
}

func TestPacer(t *testing.T) {
	p := newPacer()
	defer p.close()
	for _, d := range []time.Duration{0, time.Microsecond, 3 * time.Millisecond} {
		start := time.Now()
		for left := d; left > 0; left = d - time.Since(start) { // a signal may end a sleep
			p.sleep(left)
		}
		if got := time.Since(start); got < d {
			t.Errorf("slept for %v instead of %v", got, d)
		}
	}
}

// Operations can be offered at a rate too.
func TestLoadRDMA(t *testing.T) {
	c := connectClient(t, serveLoopback(t, newTransport), shortParams(), newTransport)
	s := rdmaSpec(rdmaWrite, 4096)
	s.Test, s.Rate = testLoad, 1000
	r, err := c.run(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if r.RTTSeconds == nil || r.LateSeconds == nil || r.RTTSeconds.Count < 200 || !r.Verified {
		t.Errorf("%+v", r)
	}
}

func TestRecorder(t *testing.T) {
	r := newRecorder(true)
	r.record(-time.Second) // a clock that went back
	r.record(time.Millisecond)
	first, second, all := newHistogram(), newHistogram(), newHistogram()
	r.takePart(first)
	r.record(time.Hour)
	r.recordN(time.Second, 3)
	r.takePart(second)
	r.addTotal(all)
	if first.TotalCount() != 2 || second.TotalCount() != 4 || all.TotalCount() != 6 {
		t.Errorf("%d, %d and %d values, want 2, 4 and 6", first.TotalCount(), second.TotalCount(), all.TotalCount())
	}
	if first.Min() != 1 || all.Max() < int64(maxLatency)*999/1000 {
		t.Errorf("from %d to %d ns", first.Min(), all.Max())
	}
	none := newRecorder(false)
	none.record(1)
	h := newHistogram()
	if none.takePart(h); h.TotalCount() != 0 {
		t.Error("a part of a recorder without parts")
	}
}

// listener keeps the intervals that a client tells of.
type listener struct {
	noReporter
	intervals []interval
}

func (l *listener) interval(_ *result, iv *interval) error {
	l.intervals = append(l.intervals, *iv)
	return nil
}

func TestIntervals(t *testing.T) {
	t.Parallel()
	p := shortParams()
	p.Duration, p.Interval = 450*time.Millisecond, 100*time.Millisecond
	for _, test := range []string{testThroughput, testRTT} {
		c := connectClient(t, serveLoopback(t, newTransport), p, newTransport)
		var heard listener
		c.reporter = &heard
		r, err := c.run(context.Background(), testSpec(transportTCP, test, 64))
		if err != nil {
			t.Fatal(err)
		}
		// Four and a half, of which a busy machine may run some together.
		if n := len(r.Intervals); n < 2 || n > 5 || len(heard.intervals) != n {
			t.Fatalf("%s: %d intervals, told of %d", test, n, len(heard.intervals))
		}
		end, messages, times := 0.0, 0.0, int64(0)
		for i, iv := range r.Intervals {
			if math.Abs(iv.BeginSeconds-end) > 1e-9 || iv.EndSeconds <= iv.BeginSeconds {
				t.Errorf("%s: interval %d from %v to %v, the last ended at %v", test, i, iv.BeginSeconds, iv.EndSeconds, end)
			}
			end = iv.EndSeconds
			messages += iv.MessagesPerSecond * (iv.EndSeconds - iv.BeginSeconds)
			if iv.RTTSeconds != nil { // in an interval of a busy machine there may be none
				times += iv.RTTSeconds.Count
			}
		}
		if whole := r.MessagesPerSecond * r.seconds; messages <= 0 || messages > whole*1.5 {
			t.Errorf("%s: %v messages in the intervals, %v in the run", test, messages, whole)
		}
		switch {
		case test == testThroughput && times > 0:
			t.Errorf("%d round trips of a throughput run", times)
		case test == testRTT && (times == 0 || times > r.RTTSeconds.Count):
			t.Errorf("%d round trips in the intervals, %d in the run", times, r.RTTSeconds.Count)
		}
	}
}
