package verbs

import (
	"errors"
	"fmt"
	"net"
	"strings"
)

// Conditions a caller acts on.
var (
	ErrClosed        = net.ErrClosed
	ErrBusy          = errors.New("object has live children")
	ErrSQFull        = errors.New("send queue full")
	ErrRQFull        = errors.New("receive queue full")
	ErrNoMemory      = errors.New("out of device resources")
	ErrInvalid       = errors.New("invalid argument")
	ErrNotSupported  = errors.New("not supported")
	ErrStaleRKey     = errors.New("memory key is not valid")
	ErrFlushed       = errors.New("work request flushed")
	ErrTimeout       = errors.New("timed out")
	ErrRefused       = errors.New("connection refused") // nobody listens (REJ 8)
	ErrUnreachable   = errors.New("peer unreachable")   // no answer to REQ or REP
	ErrStaleConn     = errors.New("stale connection")   // REJ 10: retry after timewait
	ErrNoSuchAddress = errors.New("no device owns the address")
	ErrDeviceGone    = errors.New("device is gone") // removed (EventDeviceRemoved): nothing new can be made on it
)

// WCError is a completion that did not succeed.
type WCError struct {
	Status    WCStatus
	QPN       QPN
	WRID      uint64
	VendorErr uint32
}

func (e *WCError) Error() string {
	return fmt.Sprintf("work completion on QP %d: %v (wr %#x, vendor %#x)", e.QPN, e.Status, e.WRID, e.VendorErr)
}

// Is matches ErrFlushed for a flushed request.
func (e *WCError) Is(target error) bool { return target == ErrFlushed && e.Status == WCFlushErr }

// StateError is a Modify or a post that the QP's state does not admit (rocev2 spec 5.1 to 5.3).
// Nothing was changed.
type StateError struct {
	From, To QPState    // equal for a post
	Missing  QPAttrMask // required attributes that were not given
	Extra    QPAttrMask // attributes that may not be given here
}

func (e *StateError) Error() string {
	if e.From == e.To && e.Missing == 0 && e.Extra == 0 {
		return fmt.Sprintf("not possible in QP state %v", e.From)
	}
	s := fmt.Sprintf("QP transition %v to %v refused", e.From, e.To)
	if e.Missing != 0 {
		s += ": missing " + e.Missing.String()
	}
	if e.Extra != 0 {
		s += ": not allowed " + e.Extra.String()
	}
	return s
}

func (m QPAttrMask) String() string {
	names := [...]string{"state", "cur_state", "access", "pkey_index", "port", "qkey", "av", "path_mtu", "dest_qpn", "rq_psn", "sq_psn", "max_rd_atomic", "max_dest_rd_atomic", "min_rnr_timer", "timeout", "retry_cnt", "rnr_retry", "en_sqd_async_notify", "send_window"}
	var out []string
	for i, n := range names {
		if m&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return strings.Join(out, "|")
}

// RejectError is a connection the peer refused: the reason of its REJ and its private data.
type RejectError struct {
	Reason      uint16 // rocev2 spec 7.11
	PrivateData []byte // 148 bytes, for reason 28 (consumer reject)
}

func (e *RejectError) Error() string {
	return fmt.Sprintf("connection rejected by peer (reason %d)", e.Reason)
}

// Is matches ErrRefused for reason 8, ErrStaleConn for 10, ErrTimeout for 4.
func (e *RejectError) Is(target error) bool {
	switch target {
	case ErrRefused:
		return e.Reason == 8
	case ErrStaleConn:
		return e.Reason == 10
	case ErrTimeout:
		return e.Reason == 4
	}
	return false
}

// BusyError is a Close or Deregister refused, or given up on after its bound; it names what holds
// the object. It matches ErrBusy.
type BusyError struct {
	Object  string
	Holders []string
}

func (e *BusyError) Error() string { return e.Object + " is held by " + strings.Join(e.Holders, ", ") }

// Is matches ErrBusy.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }
