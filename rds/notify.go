package rds

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
)

// CompletionStatus is the outcome of an operation; the values are the kernel's (RDS_CMSG_RDMA_STATUS, rds-protocol spec
// 1.8).
type CompletionStatus uint8

// Outcomes.
const (
	// StatusSuccess: executed (RDS_RDMA_SUCCESS).
	StatusSuccess CompletionStatus = iota
	// StatusRemoteError: the peer's memory is not to be touched so, or not any more (RDS_RDMA_REMOTE_ERROR).
	StatusRemoteError
	// StatusCancelled: taken back by Cancel or Close before it was executed (RDS_RDMA_CANCELED).
	StatusCancelled
	// StatusDropped: the connection broke, and nobody knows whether it was executed. Its datagram is not sent again
	// (RDS_RDMA_DROPPED).
	StatusDropped
	// StatusOther: any other error (RDS_RDMA_OTHER_ERROR).
	StatusOther
)

func (s CompletionStatus) String() string {
	names := [...]string{"success", "remote error", "cancelled", "dropped", "other error"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("CompletionStatus(%d)", uint8(s))
}

// Completion tells of the end of an operation: there is exactly one for each that asked for it.
type Completion struct {
	Token  uint64 // RDMA.Token, or Message.Token
	Op     RDMAOp // 0: the message itself (Message.Notify)
	Status CompletionStatus
	Peer   netip.AddrPort // where the operation's datagram was to go
}

// Err is nil for success, otherwise the status as an error: ErrRemoteAccess, ErrCancelled, ErrDropped, or one that says no
// more than that the operation failed.
func (c *Completion) Err() error {
	switch c.Status {
	case StatusSuccess:
		return nil
	case StatusRemoteError:
		return ErrRemoteAccess
	case StatusCancelled:
		return ErrCancelled
	case StatusDropped:
		return ErrDropped
	}
	return errOperation
}

// maxCompletions bounds the completions of a socket, promised and not read, to 4 MiB.
const maxCompletions = 1 << 16

// completions are those of a socket, in the order in which they came. A place is promised to each operation that asks to be
// told, so none is ever lost.
type completions struct {
	mu       sync.Mutex
	q        []Completion
	r        int // q[:r] was read
	promised int

	n       atomic.Int32 // len(q)-r, for those who look without the lock
	readers waitq
}

func (c *completions) fullLocked() bool { return len(c.q)-c.r+c.promised >= maxCompletions }

// promise sets a place aside, if there is one.
func (c *completions) promise() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fullLocked() {
		return false
	}
	c.promised++
	return true
}

func (c *completions) breakPromise() {
	c.mu.Lock()
	c.promised--
	c.mu.Unlock()
}

// keep enters a completion that was promised. first: there was none.
func (c *completions) keep(what Completion) (first bool) {
	c.mu.Lock()
	c.promised--
	first = c.addLocked(what)
	c.mu.Unlock()
	c.readers.wakeOne()
	return first
}

// add enters one that was not, if there is room.
func (c *completions) add(what Completion) (ok, first bool) {
	c.mu.Lock()
	if ok = !c.fullLocked(); ok {
		first = c.addLocked(what)
	}
	c.mu.Unlock()
	if ok {
		c.readers.wakeOne()
	}
	return ok, first
}

func (c *completions) addLocked(what Completion) (first bool) {
	if c.r > len(c.q)/2 {
		c.q = c.q[:copy(c.q, c.q[c.r:])]
		c.r = 0
	}
	c.q = append(c.q, what)
	return c.n.Add(1) == 1
}

// take is the oldest completion.
func (c *completions) take() (what Completion, ok bool) {
	if c.n.Load() == 0 {
		return what, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.r == len(c.q) {
		return what, false
	}
	what = c.q[c.r]
	c.r++
	c.n.Add(-1)
	if c.r == len(c.q) {
		c.q, c.r = c.q[:0], 0
		if cap(c.q) > 64 {
			c.q = nil
		}
	}
	if c.n.Load() > 0 {
		c.readers.wakeOne()
	}
	return what, true
}

// errTooManyCompletions refuses to promise one more.
var errTooManyCompletions = fmt.Errorf("%w: %d completions that were not read", ErrNoBufferSpace, maxCompletions)

// park enters w unless there is something to read.
func (c *completions) park(w *waiter) bool {
	c.readers.add(w)
	if c.n.Load() > 0 {
		c.readers.remove(w)
		return false
	}
	return true
}

// ReadCompletion returns the oldest Completion of the socket's operations (RDS_CMSG_RDMA_STATUS). It waits for one until the
// read deadline or until ctx is done, whichever is first; one that is here already beats a done ctx. Completions come in
// the order in which the operations of a connection end.
//
// An operation that asked for a Completion and whose Completion was not read counts: with 65536 of them further ones fail with
// ErrNoBufferSpace.
func (s *Socket) ReadCompletion(ctx context.Context) (Completion, error) {
	var (
		what Completion
		ok   bool
		err  error
	)
	rd := reading{s: s, spin: spinner{hint: &s.readHint}, comp: true}
	for {
		if err = s.readErr(); err != nil {
			break
		}
		if what, ok = s.comp.take(); ok {
			break
		}
		if err = rd.wait(ctx); err != nil {
			break
		}
	}
	rd.end(ok)
	s.settle(false)
	if err != nil {
		return what, s.opError("read", netip.AddrPort{}, err)
	}
	return what, nil
}

// TryReadCompletion is ReadCompletion that never waits (MSG_DONTWAIT): it reports false if there is none.
func (s *Socket) TryReadCompletion() (Completion, bool) {
	what, ok := s.comp.take()
	s.settle(false)
	return what, ok
}

// SetRecvErr chooses whether operations that did not ask for a Completion get one if they fail (RDS_RECVERR). It is
// dropped, and counted, if there is no room for it.
func (s *Socket) SetRecvErr(on bool) { s.recvErr.Store(on) }

// RecvErr is what SetRecvErr has set.
func (s *Socket) RecvErr() bool { return s.recvErr.Load() }
