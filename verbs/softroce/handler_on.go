//go:build invariants

package softroce

import (
	"bytes"
	"runtime"
	"strconv"
	"sync/atomic"
)

// inHandlerMark remembers which goroutine runs a handler, so that a call that may wait can be refused
// there: it would wait for itself.
type inHandlerMark struct{ g atomic.Uint64 }

func (m *inHandlerMark) enterHandler() { m.g.Store(goid()) }
func (m *inHandlerMark) leaveHandler() { m.g.Store(0) }

func (m *inHandlerMark) mayWait(what string) {
	if g := m.g.Load(); g != 0 && g == goid() {
		panic("BUG: " + what + " called in a completion handler")
	}
}

func goid() uint64 {
	var buf [64]byte
	b := bytes.Fields(buf[:runtime.Stack(buf[:], false)])
	n, _ := strconv.ParseUint(string(b[1]), 10, 64)
	return n
}
