package mrpool

import (
	"errors"
	"fmt"
	"net"

	"github.com/openrds/openrds/verbs"
)

// Conditions a caller acts on.
var (
	// ErrPoolExhausted: a bound on regions or on pinned bytes is reached. See ExhaustedError.
	ErrPoolExhausted = errors.New("memory region pool exhausted")
	// ErrTooLarge: more pages than one region of the pools takes.
	ErrTooLarge = errors.New("memory larger than a region of the pools")
	// ErrQueueFull: the requests the pools may have outstanding on the queue pair are. It matches verbs.ErrSQFull.
	ErrQueueFull = fmt.Errorf("memory requests outstanding on the queue pair: %w", verbs.ErrSQFull)
	// ErrQPLost: the queue pair has failed, or was closed; mapping goes on when there is a new one.
	ErrQPLost = errors.New("queue pair of the mapping is lost")
	// ErrNotMapped: the mapping was given back before, or never was one.
	ErrNotMapped = errors.New("no such mapping")
	// ErrClosed: the pools are closed.
	ErrClosed = net.ErrClosed
)

// ExhaustedError says which bound is reached. It matches ErrPoolExhausted.
type ExhaustedError struct {
	Pool  string // "8k", "1m"
	Bound string // "regions", "pinned bytes", "pinned bytes of the device"
}

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("memory region pool %s: all %s in use", e.Pool, e.Bound)
}

// Is matches ErrPoolExhausted.
func (e *ExhaustedError) Is(target error) bool { return target == ErrPoolExhausted }
