package rds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/openrds/openrds/verbs"
)

// Conditions a caller acts on. Each matches, besides itself, the errno with which the kernel's RDS
// reports it, where there is one: errors.Is(err, syscall.ENOBUFS), or errors.As with a *syscall.Errno.
var (
	// ErrClosed: the socket or the service was closed.
	ErrClosed = net.ErrClosed
	// ErrCongested: the destination port does not read fast enough (ENOBUFS). The error is a *CongestedError.
	ErrCongested error = &condition{text: "destination port is congested", errno: syscall.ENOBUFS}
	// ErrNoBufferSpace: the send buffer is full of unacknowledged datagrams (EAGAIN).
	ErrNoBufferSpace error = &condition{text: "send buffer is full", errno: syscall.EAGAIN}
	// ErrMessageTooLong: more than 1 MiB or than the send buffer; nothing was sent (EMSGSIZE).
	ErrMessageTooLong error = &condition{text: "message too long", errno: syscall.EMSGSIZE}
	// ErrAddrInUse: another socket has the port, or another owner the address (EADDRINUSE).
	ErrAddrInUse error = &condition{text: "address in use", errno: syscall.EADDRINUSE}
	// ErrAddrNotAvailable: no device of this host owns the address (EADDRNOTAVAIL).
	ErrAddrNotAvailable error = &condition{text: "address not available", errno: syscall.EADDRNOTAVAIL}
	// ErrNotConnected: no destination was given and the socket has no default one (ENOTCONN).
	ErrNotConnected error = &condition{text: "no destination", errno: syscall.ENOTCONN}
	// ErrInvalid: an argument makes no sense here (EINVAL).
	ErrInvalid error = &condition{text: "invalid argument", errno: syscall.EINVAL}
	// ErrNotSupported: what was asked for cannot be done here (EOPNOTSUPP).
	ErrNotSupported error = &condition{text: "not supported", errno: syscall.EOPNOTSUPP}

	// ErrWouldBlock: there is nothing to read, and the call does not wait (EAGAIN).
	ErrWouldBlock error = &condition{text: "nothing to read", errno: syscall.EAGAIN}
	// ErrNoTransport: what was asked for to carry the datagrams is not there (ENOPROTOOPT).
	ErrNoTransport error = &condition{text: "no such transport", errno: syscall.ENOPROTOOPT}

	// ErrRegionTooLarge: a region or an operation of more than 1 MiB, or of too many pieces (EMSGSIZE).
	ErrRegionTooLarge error = &condition{text: "region too large", errno: syscall.EMSGSIZE}
	// ErrStaleCookie: the cookie names no region of this socket, or the region was freed (EINVAL).
	ErrStaleCookie error = &condition{text: "cookie of no region", errno: syscall.EINVAL}
	// ErrForeignRegion: the region belongs to another socket (EINVAL).
	ErrForeignRegion error = &condition{text: "region of another socket", errno: syscall.EINVAL}
	// ErrPoolExhausted: the device has as many regions as it may (EAGAIN).
	ErrPoolExhausted error = &condition{text: "pool of memory regions exhausted", errno: syscall.EAGAIN}
	// ErrDeviceGone: the device that the region was registered with was removed (ENODEV).
	ErrDeviceGone error = &condition{text: "device was removed", errno: syscall.ENODEV}
	// ErrNotReady: the connection that a region is for is not established; it is being connected (EAGAIN).
	ErrNotReady error = &condition{text: "not connected yet", errno: syscall.EAGAIN}
	// ErrMisaligned: an atomic on memory that is not 8 bytes, or not at an address that 8 divides (EFAULT).
	ErrMisaligned error = &condition{text: "atomic operand of wrong size or alignment", errno: syscall.EFAULT}
)

// What an operation may end with (Completion.Err). The kernel has statuses for these, not errors.
var (
	ErrRemoteAccess = errors.New("remote access error")
	ErrCancelled    = errors.New("operation cancelled")
	ErrDropped      = errors.New("operation dropped with its connection")
	errOperation    = errors.New("operation failed")
)

// condition is a sentinel that also matches an errno, and perhaps another condition of which it is a kind.
type condition struct {
	text  string
	errno syscall.Errno
	kind  error
}

func (c *condition) Error() string { return c.text }

func (c *condition) Is(target error) bool {
	return target == c.errno || c.kind != nil && target == c.kind || c == ErrNotSupported && target == verbs.ErrNotSupported
}

// As gives the errno to who asks for one.
func (c *condition) As(target any) bool { return asErrno(target, c.errno) }

// asErrno is an As method of an error with an errno.
func asErrno(target any, errno syscall.Errno) bool {
	e, ok := target.(*syscall.Errno)
	if ok {
		*e = errno
	}
	return ok
}

// OpError is the error of every operation of this package that concerns a socket or a bind. It is a
// net.Error.
type OpError struct {
	Op    string // "bind", "connect", "read", "write", "set", "close"
	Local Addr   // the socket, zero if there is none yet
	Peer  Addr   // the destination of a write, the source of a read; zero if unknown
	Err   error
}

func (e *OpError) Error() string {
	s := "rds " + e.Op
	if e.Local.IsValid() {
		s += " " + e.Local.String()
	}
	if e.Peer.IsValid() {
		if e.Local.IsValid() {
			s += "->"
		} else {
			s += " "
		}
		s += e.Peer.String()
	}
	return s + ": " + e.Err.Error()
}

func (e *OpError) Unwrap() error { return e.Err }

// Timeout reports whether the cause is an expired deadline.
func (e *OpError) Timeout() bool {
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](e.Err)
	return ok && t.Timeout()
}

// Temporary is false: what passes by itself is waited for, not reported.
func (e *OpError) Temporary() bool { return false }

// deadlineError is an expired deadline together with what the operation waited for.
type deadlineError struct {
	cause error // *CongestedError, ErrNoBufferSpace; nil for a read
}

// A deadline that expires allocates nothing but its OpError, and for congestion what says where.
var (
	errDeadlineRead     = &deadlineError{}
	errDeadlineNoBuffer = &deadlineError{ErrNoBufferSpace}
)

// deadlineFor is the error of a deadline that expired while waiting for cause.
func deadlineFor(cause error) error {
	switch cause {
	case nil:
		return errDeadlineRead
	case ErrNoBufferSpace:
		return errDeadlineNoBuffer
	}
	return &deadlineError{cause}
}

func (e *deadlineError) Error() string {
	if e.cause == nil {
		return os.ErrDeadlineExceeded.Error()
	}
	return os.ErrDeadlineExceeded.Error() + ": " + e.cause.Error()
}

// Is matches ETIMEDOUT, which the kernel has for it (rds-protocol spec 1.4 step 24, 1.5 step 4).
func (e *deadlineError) Is(target error) bool { return target == syscall.ETIMEDOUT }

// As gives ETIMEDOUT to who asks for an errno, rather than the cause's.
func (e *deadlineError) As(target any) bool { return asErrno(target, syscall.ETIMEDOUT) }

func (e *deadlineError) Timeout() bool   { return true }
func (e *deadlineError) Temporary() bool { return false }

func (e *deadlineError) Unwrap() []error {
	if e.cause == nil {
		return []error{os.ErrDeadlineExceeded}
	}
	return []error{os.ErrDeadlineExceeded, e.cause}
}

// ctxError is a done context together with what the operation waited for: it matches ctx.Err(), the
// cause, and os.ErrDeadlineExceeded where the context's deadline was it.
func ctxError(err, cause error) error {
	switch {
	case err == context.DeadlineExceeded:
		return fmt.Errorf("%w: %w", err, deadlineFor(cause))
	case cause != nil:
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

// AbandonedError is what Service.Close returns when the time to linger was over before every
// accepted message was acknowledged.
type AbandonedError struct {
	Messages int // messages of this service that no peer has acknowledged
}

func (e *AbandonedError) Error() string {
	return fmt.Sprintf("rds close: %d unacknowledged messages abandoned", e.Messages)
}

// bindError gives a provider's refusal of a local address the names of this package.
func bindError(err error) error {
	switch {
	case errors.Is(err, ErrAddrInUse), errors.Is(err, ErrAddrNotAvailable), errors.Is(err, ErrClosed):
		return err
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, verbs.ErrBusy):
		return fmt.Errorf("%w: %w", ErrAddrInUse, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, verbs.ErrNoSuchAddress):
		return fmt.Errorf("%w: %w", ErrAddrNotAvailable, err)
	case errors.Is(err, verbs.ErrNotSupported):
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	return err
}

var (
	_ net.Error = (*OpError)(nil)
	_ net.Error = (*deadlineError)(nil)
)
