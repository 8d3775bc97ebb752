package rds

import "fmt"

// MaxRDMASize is how many bytes an operation moves at most, and how long a region is (rds-protocol spec 1.1).
const MaxRDMASize = 1 << 20

// RDMAOp is what an operation does.
type RDMAOp uint8

// Operations.
const (
	RDMARead  RDMAOp = iota + 1 // from the peer's region to local memory
	RDMAWrite                   // from local memory to the peer's region (RDS_RDMA_READWRITE)
	// The atomics work on 8 bytes of the peer's region, at an address that 8 divides, and bring what was there
	// before to the 8 bytes of local memory.
	CompareSwap // stores Swap if the word equals Compare (RDS_CMSG_ATOMIC_CSWP)
	FetchAdd    // adds Add (RDS_CMSG_ATOMIC_FADD)
	// Masked atomics need a device that has them; others answer ErrNotSupported.
	MaskedCompareSwap // RDS_CMSG_MASKED_ATOMIC_CSWP
	MaskedFetchAdd    // RDS_CMSG_MASKED_ATOMIC_FADD
)

func (o RDMAOp) String() string {
	names := [...]string{1: "READ", "WRITE", "CMP_AND_SWP", "FETCH_AND_ADD", "MASKED_CMP_AND_SWP", "MASKED_FETCH_AND_ADD"}
	if o > 0 && int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("RDMAOp(%d)", uint8(o))
}

// RDMA is an operation on a peer's memory that is executed before the datagram it is sent with (rds_rdma_args and
// rds_atomic_args of the kernel). The peer gave the cookie; who gets the datagram knows that its region
// was read or written.
type RDMA struct {
	Op RDMAOp
	// Local is the memory here, in order: regions of the sending socket on the address it is bound to. For an atomic 8 bytes, at an
	// address that 8 divides.
	Local []Piece
	// Remote is the peer's region, RemoteOffset where in it the operation begins: the byte RemoteOffset after the region's
	// first.
	Remote       Cookie
	RemoteOffset uint64

	Compare, Swap         uint64 // CompareSwap
	Add                   uint64 // FetchAdd
	CompareMask, SwapMask uint64 // MaskedCompareSwap
	NoCarryMask           uint64 // MaskedFetchAdd

	// NoFence lets the datagram overtake the data of a READ, or the result of an atomic. The kernel's default; RDS_RDMA_FENCE is
	// ours.
	NoFence bool
	// Silent sends no datagram at all if Data is empty (RDS_RDMA_SILENT).
	Silent bool
	// Notify asks for a Completion with Token (RDS_RDMA_NOTIFY_ME).
	Notify bool
	Token  uint64
}

// Piece is a part of a Region.
type Piece struct {
	Region *Region
	Offset int
	Length int
}
