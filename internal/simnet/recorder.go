package simnet

import (
	"fmt"
	"hash/crc32"
	"strings"
	"sync"
)

// Recorder keeps what happened on a Net, to be compared with another run or with a golden trace:
//
//	var rec simnet.Recorder
//	n.SetTap(rec.Record)
type Recorder struct {
	mu    sync.Mutex
	lines []string
}

// Record adds an event; it is a tap.
func (r *Recorder) Record(e Event) {
	line := e.String()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
}

// String returns the event as a line of a trace: when, which packet of which link, what happened,
// length and checksum of the payload.
func (e Event) String() string {
	return fmt.Sprintf("%-14v %v > %v #%d %v len %d tos %d crc %08x",
		e.At, e.From, e.To, e.N, e.Kind, len(e.Data), e.TOS, crc32.ChecksumIEEE(e.Data))
}

// Lines returns a copy of the trace, one event per line.
func (r *Recorder) Lines() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.lines...)
}

// String returns the trace as text.
func (r *Recorder) String() string { return strings.Join(r.Lines(), "\n") }

// Diff describes the first place where the traces differ; "" if they are equal.
func (r *Recorder) Diff(other *Recorder) string {
	a, b := r.Lines(), other.Lines()
	for i := range max(len(a), len(b)) {
		x, y := "(end)", "(end)"
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if x != y {
			return fmt.Sprintf("event %d of %d and %d:\n  %s\n  %s", i, len(a), len(b), x, y)
		}
	}
	return ""
}
