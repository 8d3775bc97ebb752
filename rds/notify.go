package rds

import (
	"context"
	"fmt"
	"net/netip"
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
	Token  uint64 // RDMA.Token
	Op     RDMAOp
	Status CompletionStatus
	Peer   netip.AddrPort // where the operation's datagram was to go
}

// ReadCompletion returns the oldest Completion of the socket's operations. It waits for one until the read deadline or
// until ctx is done, whichever is first.
func (s *Socket) ReadCompletion(ctx context.Context) (Completion, error) {
	return Completion{}, s.opError("read", netip.AddrPort{}, ErrNotSupported)
}

// SetRecvErr chooses whether operations that did not ask for a Completion get one if they fail (RDS_RECVERR).
func (s *Socket) SetRecvErr(on bool) {}
