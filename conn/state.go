package conn

import (
	"fmt"

	"go.uber.org/atomic"
)

// State is the state of a connection (rds-protocol spec 5.1, without RESETTING, which is TCP's).
type State uint32

// Connection states. They move only through stateVar.move, a compare-and-swap from the expected
// state.
//
//	  ┌───────────────────────────────────────────────────────┐
//	  ▼                                                       │
//	down ──connect, accept──▶ connecting ──established──▶ up  │
//	                              │ attempt failed,       │ bad completion, protocol error,
//	                              │ abandoned             │ peer gone, stale, Close
//	                              ▼                       ▼   │
//	                            error ◀───────────────────┘   │
//	                              │ control side takes it     │
//	                              ▼                           │
//	                         disconnecting ──drained──────────┘
//
// Anybody may move to error, handlers included. Everything else is the control side's (connect.go), which
// is one goroutine that exists only while there is such work. In disconnecting the QP
// is moved to ERR, polled to the marker behind its last send, destroyed, and polled once more; only
// then are the buffers ours again, and only then is the receive sequence taken for the next handshake.
const (
	Down State = iota
	Connecting
	Up
	Disconnecting
	Error
)

func (s State) String() string {
	names := [...]string{"down", "connecting", "up", "disconnecting", "error"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("State(%d)", uint32(s))
}

// stateVar holds a State. Loading it is advice except for whoever owns the next move.
type stateVar struct{ v atomic.Uint32 }

func (s *stateVar) load() State { return State(s.v.Load()) }

// legalMove[from] is the set of states from may move to.
var legalMove = [...]uint32{
	Down:          1 << Connecting,
	Connecting:    1<<Up | 1<<Error,
	Up:            1 << Error,
	Error:         1 << Disconnecting,
	Disconnecting: 1 << Down,
}

// move changes the state from from to to and reports whether it was from. A move that the drawing
// does not have is a bug.
func (s *stateVar) move(from, to State) bool {
	if int(from) >= len(legalMove) || legalMove[from]&(1<<to) == 0 {
		panic(fmt.Sprintf("BUG: connection state %v to %v", from, to))
	}
	return s.v.CompareAndSwap(uint32(from), uint32(to))
}
