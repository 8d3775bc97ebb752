package rds

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"sync/atomic"
	"unsafe"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/verbs"
)

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

// remoteAddr is the address of the operation in the space of the remote key.
func (r *RDMA) remoteAddr() uint64 { return uint64(r.Remote.Offset()) + r.RemoteOffset }

// opcode is the operation in the words of verbs, 0 if there is no word.
func (o RDMAOp) opcode() verbs.SendOpcode {
	switch o {
	case RDMARead:
		return verbs.OpRead
	case RDMAWrite:
		return verbs.OpWrite
	case CompareSwap:
		return verbs.OpCompareSwap
	case FetchAdd:
		return verbs.OpFetchAdd
	}
	return 0
}

func (o RDMAOp) atomic() bool { return o > RDMAWrite }

// operation is an RDMA on its way.
type operation struct {
	conn.RDMA
	extra  conn.Extra // with RDMA
	s      *Socket
	what   Completion // but for the status
	notify bool       // a Completion was promised
	local  []Piece    // each holds its region
}

// operation checks r, and holds its regions. The order of the checks is the kernel's (rds-protocol spec 1.4, 3.9).
func (s *Socket) operation(r *RDMA, to netip.AddrPort) (*operation, error) {
	code := r.Op.opcode()
	total := 0
	for i := range r.Local {
		p := &r.Local[i]
		switch {
		case p.Region == nil:
			return nil, fmt.Errorf("%w: piece %d of no region", ErrInvalid, i)
		case p.Length <= 0 || p.Offset < 0 || p.Offset > p.Region.Len() || p.Length > p.Region.Len()-p.Offset:
			return nil, fmt.Errorf("%w: piece %d of %d bytes from %d on, region of %d", ErrInvalid, i, p.Length, p.Offset, p.Region.Len())
		}
		if total += p.Length; total > MaxRDMASize {
			return nil, fmt.Errorf("%w: operation on more than %d bytes", ErrRegionTooLarge, MaxRDMASize)
		}
	}
	switch {
	case r.Op == MaskedCompareSwap || r.Op == MaskedFetchAdd:
		return nil, fmt.Errorf("%w: %v", ErrNotSupported, r.Op)
	case code == 0:
		return nil, fmt.Errorf("%w: operation %d", ErrInvalid, r.Op)
	case len(r.Local) == 0:
		return nil, fmt.Errorf("%w: no local memory", ErrInvalid)
	case len(r.Local) > conn.MaxRDMAPieces:
		return nil, fmt.Errorf("%w: operation on %d pieces", ErrRegionTooLarge, len(r.Local))
	case r.RemoteOffset > math.MaxUint32 || r.remoteAddr()+uint64(total) < r.RemoteOffset:
		return nil, fmt.Errorf("%w: remote offset %#x", ErrInvalid, r.RemoteOffset)
	case r.Op.atomic():
		p := &r.Local[0]
		if total != 8 || len(r.Local) != 1 || (uintptr(unsafe.Pointer(&p.Region.mem[0]))+uintptr(p.Offset))%8 != 0 || r.remoteAddr()%8 != 0 {
			return nil, ErrMisaligned
		}
		if p.Region.m.Device().Attr().Caps&verbs.CapAtomics == 0 {
			return nil, fmt.Errorf("%w: atomics", ErrNotSupported)
		}
	}
	o, ok := s.svc.ops.Get().(*operation)
	if !ok {
		o = new(operation)
		o.extra.RDMA, o.Owner = &o.RDMA, o
	}
	o.s, o.what, o.notify = s, Completion{Token: r.Token, Op: r.Op, Peer: to}, false
	o.Opcode, o.Device, o.SGs, o.RKey, o.RemoteAddr = code, r.Local[0].Region.m.Device(), o.SGs[:0], verbs.RKey(r.Remote.RKey()), r.remoteAddr()
	o.NoFence, o.Silent = r.NoFence, r.Silent
	switch r.Op {
	case CompareSwap:
		o.CompareAdd, o.Swap = r.Compare, r.Swap
	case FetchAdd:
		o.CompareAdd = r.Add
	}
	for i := range r.Local {
		p := r.Local[i]
		err := ErrForeignRegion
		if p.Region.s == s {
			err = p.Region.hold()
		}
		if err == nil {
			o.local = append(o.local, p)
			if p.Region.m.Device() != o.Device {
				err = ErrDeviceGone // one of the two is about to be a tombstone
			}
		}
		if err != nil {
			o.abort()
			return nil, err
		}
		o.SGs = append(o.SGs, verbs.SGE{Addr: p.Region.m.IOVA() + uint64(p.Offset), Length: uint32(p.Length), LKey: p.Region.m.LKey()})
	}
	if r.Notify {
		if !s.comp.promise() {
			o.abort()
			return nil, fmt.Errorf("%w: %d operations whose completions were not read", ErrNoBufferSpace, maxCompletions)
		}
		o.notify = true
	}
	return o, nil
}

// release lets go of the regions.
func (o *operation) release() {
	for i := range o.local {
		o.local[i].Region.drop()
	}
	clear(o.local)
	o.local = o.local[:0]
}

// abort is for an operation that the connection did not take.
func (o *operation) abort() {
	o.release()
	if o.notify {
		o.s.comp.breakPromise()
	}
	o.s.svc.ops.Put(o)
}

// RDMADone implements conn.RDMAOwner.
func (o *operation) RDMADone(st conn.RDMAStatus) {
	o.release()
	o.what.Status = CompletionStatus(st)
	ok, first := true, false
	switch {
	case o.notify:
		first = o.s.comp.keep(o.what)
	case st != conn.RDMASuccess && o.s.recvErr.Load():
		ok, first = o.s.comp.add(o.what)
	}
	if !ok {
		o.s.svc.ctr.completionsLost.Add(1)
	}
	if first {
		o.s.raise()
	}
	o.s.svc.ops.Put(o)
}

// isLocal reports whether d is an address of the same Service.
func (d *dest) isLocal() bool { _, ok := d.link.(*localLink); return ok }

// execute does the operation on a region of la, an address of the same Service, as a device would.
func (o *operation) execute(la *localAddr) conn.RDMAStatus {
	r := la.regions.get(uint32(o.RKey))
	if r == nil || r.hold() != nil {
		return conn.RDMARemoteError
	}
	defer r.drop()
	total := 0
	for _, p := range o.local {
		total += p.Length
	}
	off := o.RemoteAddr - r.m.IOVA()
	write := o.Opcode != verbs.OpRead
	if off > uint64(r.Len()) || total > r.Len()-int(off) || write && r.opt.ReadOnly || o.what.Op.atomic() && !r.opt.Atomic {
		return conn.RDMARemoteError
	}
	remote, err := r.touch(int(off), total, write)
	if err != nil {
		return conn.RDMARemoteError
	}
	for _, p := range o.local {
		local, err := p.Region.touch(p.Offset, p.Length, o.Opcode != verbs.OpWrite)
		if err != nil {
			return conn.RDMAOther
		}
		switch o.Opcode {
		case verbs.OpRead:
			copy(local, remote)
		case verbs.OpWrite:
			copy(remote, local)
		default:
			binary.NativeEndian.PutUint64(local, o.atomic((*uint64)(unsafe.Pointer(&remote[0]))))
		}
		remote = remote[p.Length:]
	}
	return conn.RDMASuccess
}

// atomic executes an atomic on w and returns what was there.
func (o *operation) atomic(w *uint64) uint64 {
	for {
		old := atomic.LoadUint64(w)
		next := old + o.CompareAdd
		if o.Opcode == verbs.OpCompareSwap {
			if next = o.Swap; old != o.CompareAdd {
				return old
			}
		}
		if atomic.CompareAndSwapUint64(w, old, next) {
			return old
		}
	}
}

// touch is the n bytes from off on, in memory that can be touched without harm.
func (r *Region) touch(off, n int, write bool) ([]byte, error) {
	if r.paged == nil {
		return r.mem[off : off+n], nil
	}
	if err := r.paged.Populate(off, n, write); err != nil {
		return nil, err
	}
	return r.paged.Alias()[off : off+n], nil
}
