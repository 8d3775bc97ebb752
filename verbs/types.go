package verbs

import (
	"fmt"
	"net/netip"
	"time"
)

// LKey and RKey are memory keys: a 24-bit index and an 8-bit variant (rocev2 spec 6.1).
type (
	LKey uint32
	RKey uint32
)

// QPN is a 24-bit queue pair number. 0 and 1 are the management QPs.
type QPN uint32

// MTU is the path MTU code of verbs and CM: 1=256 ... 5=4096 (rocev2 spec 1.7).
type MTU uint8

// Path MTU codes.
const (
	MTU256 MTU = 1 + iota
	MTU512
	MTU1024
	MTU2048
	MTU4096
)

// Bytes is the payload of a full packet, 0 for a code that does not exist.
func (m MTU) Bytes() int {
	if m < MTU256 || m > MTU4096 {
		return 0
	}
	return 128 << m
}

func (m MTU) String() string { return fmt.Sprintf("%d", m.Bytes()) }

// QPType is the transport service of a QP.
type QPType uint8

// Transport services.
const (
	RC QPType = 1 + iota // reliable connected
	UD                   // unreliable datagram
)

func (t QPType) String() string {
	switch t {
	case RC:
		return "RC"
	case UD:
		return "UD"
	}
	return fmt.Sprintf("QPType(%d)", uint8(t))
}

// QPState is a state of the QP state machine (rocev2 spec 5.1).
type QPState uint8

// QP states. The zero value is RESET.
//
//	RESET ──▶ INIT ──▶ RTR ──▶ RTS ◀──▶ SQD
//	  any but RESET ──▶ ERR       UD: RTS ──▶ SQE ──▶ RTS       any ──▶ RESET
const (
	StateReset QPState = iota
	StateInit
	StateRTR
	StateRTS
	StateSQD
	StateSQE
	StateErr
)

func (s QPState) String() string {
	names := [...]string{"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("QPState(%d)", uint8(s))
}

// Access is a set of rights to a memory region, or of remote operations a QP admits
// (rocev2 spec 6.2; the values are ibverbs').
type Access uint32

// Access rights. RemoteWrite and RemoteAtomic require LocalWrite.
const (
	AccessLocalWrite   Access = 1 << 0
	AccessRemoteWrite  Access = 1 << 1
	AccessRemoteRead   Access = 1 << 2
	AccessRemoteAtomic Access = 1 << 3
	AccessMWBind       Access = 1 << 4 // memory windows may be bound to the region
	AccessZeroBased    Access = 1 << 5 // of a window: its addresses are offsets from its start
	AccessOnDemand     Access = 1 << 6 // nothing is pinned: see PD.RegOnDemandMR
)

// SGE names Length bytes at Addr of the registered region LKey. Addr is an IOVA: the region's
// address plus an offset. A zero-length SGE's key is not looked at.
type SGE struct {
	Addr   uint64
	Length uint32
	LKey   LKey
}

// SendOpcode is the operation of a send work request.
type SendOpcode uint8

// Send operations.
const (
	OpSend SendOpcode = iota + 1
	OpSendWithImm
	OpSendWithInv // invalidates InvalidateRKey at the receiver
	OpWrite
	OpWriteWithImm
	OpRead
	OpCompareSwap
	OpFetchAdd
	// OpReadWithInv is OpRead that frees the local region or window InvalidateRKey, which its sink
	// belongs to, when it completes (CapReadWithInv).
	OpReadWithInv
	// OpFastRegMR maps SendWR.FastReg.MR (CapMemMgtExtensions). Requests behind it in the queue may use the key.
	OpFastRegMR
	// OpLocalInv frees the fast-registration region, or type 2 window, whose key is InvalidateRKey
	// (CapMemMgtExtensions, CapMW2A, CapMW2B). It waits for earlier requests of its queue that use that region, for no others.
	OpLocalInv
	// OpBindMW binds SendWR.Bind.MW (CapMW1, CapMW2A, CapMW2B).
	OpBindMW
)

func (o SendOpcode) String() string {
	names := [...]string{1: "SEND", "SEND_WITH_IMM", "SEND_WITH_INV", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "RDMA_READ", "ATOMIC_CMP_AND_SWP", "ATOMIC_FETCH_AND_ADD", "RDMA_READ_WITH_INV", "FAST_REG_MR", "LOCAL_INV", "BIND_MW"}
	if o > 0 && int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("SendOpcode(%d)", uint8(o))
}

// Caps are the capabilities of which a device has one at least if it takes requests of opcode o; 0: every device does.
func (o SendOpcode) Caps() DeviceCaps {
	switch o {
	case OpFastRegMR:
		return CapMemMgtExtensions
	case OpLocalInv, OpSendWithInv:
		return CapMemMgtExtensions | CapMW2A | CapMW2B
	case OpReadWithInv:
		return CapReadWithInv
	case OpBindMW:
		return CapMW1 | CapMW2A | CapMW2B
	case OpCompareSwap, OpFetchAdd:
		return CapAtomics
	}
	return 0
}

// SendFlags modify a send work request.
type SendFlags uint8

// Send flags.
const (
	SendSignaled  SendFlags = 1 << iota // a WC on success too; errors and flushes always give one
	SendSolicited                       // SE bit on the last packet of a SEND or WRITE with immediate
	SendFence                           // waits until all previous READs and atomics are complete
)

// SendWR is a send work request.
type SendWR struct {
	ID     uint64
	Opcode SendOpcode
	Flags  SendFlags

	// SGs is the gather list (scatter list for READ and atomics, which want exactly 8 bytes).
	// The provider copies it at post.
	SGs []SGE

	// Imm is the immediate of OpSendWithImm and OpWriteWithImm. On the wire it is big-endian; both
	// ends see the same number.
	Imm uint32
	// InvalidateRKey is the peer's key that OpSendWithInv invalidates, our own of OpLocalInv and OpReadWithInv.
	InvalidateRKey RKey

	FastReg *FastReg // OpFastRegMR; copied at post
	Bind    *MWBind  // OpBindMW; copied at post

	// RemoteAddr and RKey are the target of WRITE, READ and atomics.
	RemoteAddr uint64
	RKey       RKey
	// CompareAdd is the compare operand of OpCompareSwap, the addend of OpFetchAdd.
	CompareAdd uint64
	Swap       uint64

	// AH, RemoteQPN and RemoteQKey address a UD send. Ignored on RC.
	AH         *AH
	RemoteQPN  QPN
	RemoteQKey uint32
}

// PageSize is the unit of page lists: 4 KiB, whatever the host's pages are.
const PageSize = 4096

// FastReg is what OpFastRegMR does to a region (ib_reg_wr of the kernel; rocev2 spec 6.5). The request
// fails with WCLocQPOpErr if the region is not free when it executes, or belongs to another PD than the QP.
// What no execution could make right, such as objects of another device, ErrInvalid may refuse when it is posted.
// It executes when the queue gets to it and completes behind all that is before it: one that was flushed may have
// been executed, and leaves its region in a state that only Deregister makes sure of. The same holds of OpLocalInv.
type FastReg struct {
	MR     MR       // of AllocFastRegMR
	Key    RKey     // its new key: the current one with another variant (UpdateFastRegKey)
	Pages  PageList // belongs to the request until that has completed or was flushed
	IOVA   uint64   // address that remote and local requests give to the list's first byte
	Access Access
}

// UpdateFastRegKey is key with the next variant: what the next registration of the same region, or binding of
// the same window, may be given, so that who still has the old key is refused (ib_update_fast_reg_key).
func UpdateFastRegKey(key RKey) RKey { return key&^0xff | (key+1)&0xff }

// MWType is the kind of a memory window (rocev2 spec 6.3).
type MWType uint8

// Kinds of windows. A type 1 window works through every QP of its PD and is bound again at will, or unbound by a
// bind of length 0. One of type 2 works through the QP that bound it alone, is bound while it is free, and
// becomes free by invalidation, local or remote: 2A is checked against the QP, 2B against the QP and its PD.
const (
	MWType1 MWType = iota + 1
	MWType2A
	MWType2B
)

func (t MWType) String() string {
	switch t {
	case MWType1:
		return "type 1"
	case MWType2A:
		return "type 2A"
	case MWType2B:
		return "type 2B"
	}
	return fmt.Sprintf("MWType(%d)", uint8(t))
}

// MWBind is what OpBindMW does to a window (rocev2 spec 6.5). The request fails with WCMWBindErr if the
// rules of the type, of the region or of the range do not admit it when it executes.
type MWBind struct {
	MW     MW
	Key    RKey // its new key: the current one with another variant
	MR     MR   // registered with AccessMWBind; nil to unbind type 1
	Addr   uint64
	Length uint64
	Access Access // remote rights, and AccessZeroBased
}

// DeviceCaps is a set of capabilities.
type DeviceCaps uint32

// Capabilities.
const (
	CapMemMgtExtensions DeviceCaps = 1 << iota // AllocFastRegMR, AllocPageList, OpFastRegMR, OpLocalInv, OpSendWithInv
	CapReadWithInv
	CapMW1
	CapMW2A
	CapMW2B
	CapOnDemandPaging // RegOnDemandMR, AdviseMR
	CapAtomics        // 8-byte compare-and-swap and fetch-and-add, atomic towards this process too
)

// PagedMemory is memory whose pages come and go while it is registered. The provider touches it through
// Alias only, a mapping of its own that no act of the application on the application's mapping can
// take away or point elsewhere.
type PagedMemory interface {
	// Alias is the provider's mapping. Touching an absent page in it would bring in a zero page, so whoever
	// does has populated it before.
	Alias() []byte
	// Populate brings in the pages of [off, off+n), for writing if write. It may wait for the disk.
	// The error is the kernel's.
	Populate(off, n int, write bool) error
	// Resident calls fn, in order, for each run of pages in [off, off+n) that are in memory at this moment.
	Resident(off, n int, fn func(off, n int)) error
	// Watch calls fn for each range whose pages were, or are about to be, taken away, until stop has
	// returned. When fn returns, nothing may touch the range without populating it again; fn may wait for
	// accesses in flight. gone says that the range is no part of the memory any more: it is not to be
	// populated again. One call at a time. Source: userfaultfd(2), UFFD_EVENT_REMOVE, _UNMAP, _REMAP.
	Watch(fn func(off, n int, gone bool)) (stop func(), err error)
}

// Advice is what AdviseMR asks for (ibv_advise_mr).
type Advice uint8

// Advices. Prefetching populates pages before requests need them.
const (
	AdvisePrefetch        Advice = iota + 1 // for reading
	AdvisePrefetchWrite                     // for writing
	AdvisePrefetchNoFault                   // enter what is resident already, bring nothing in
)

// AH is an address vector: where packets of a UD send, or of an RC QP, go.
type AH struct {
	Remote       netip.Addr // peer address (its GID); IPv4 or IPv6, not 4-in-6
	TrafficClass uint8      // IPv4 TOS or IPv6 traffic class
	HopLimit     uint8      // 0 means 64
}

// RecvWR is a receive work request: a scatter list for one incoming SEND (or nothing, for a WRITE
// with immediate). The provider copies SGs at post.
type RecvWR struct {
	ID  uint64
	SGs []SGE
}

// WCOpcode is the kind of operation a work completion reports.
type WCOpcode uint8

// Completion opcodes.
const (
	WCSend WCOpcode = iota + 1
	WCWrite
	WCRead
	WCCompareSwap
	WCFetchAdd
	WCRecv
	WCRecvWriteWithImm
	WCFastRegMR
	WCLocalInv
	WCBindMW
)

// WCFlags say which fields of a WC are meaningful beyond the usual.
type WCFlags uint8

// Completion flags.
const (
	WCWithImm WCFlags = 1 << iota
	WCWithInvalidate
	WCWithGRH   // UD: 40 bytes of network header precede the payload
	WCSolicited // the peer set the solicited event bit
)

// WC is a work completion. When Status is not WCSuccess only ID, Status, QPN and VendorErr are
// meaningful.
type WC struct {
	ID        uint64
	Status    WCStatus
	Opcode    WCOpcode
	Flags     WCFlags
	QPN       QPN    // local QP
	ByteLen   uint32 // bytes received, or bytes of a completed READ
	Imm       uint32
	SrcQPN    QPN // UD: sender's QP
	InvRKey   RKey
	VendorErr uint32
}

// WCStatus is the status of a completion (rocev2 spec 5.5; the values are ibverbs').
type WCStatus uint8

// Completion statuses.
const (
	WCSuccess        WCStatus = 0
	WCLocLenErr      WCStatus = 1
	WCLocQPOpErr     WCStatus = 2
	WCLocProtErr     WCStatus = 4
	WCFlushErr       WCStatus = 5
	WCMWBindErr      WCStatus = 6
	WCBadRespErr     WCStatus = 7
	WCLocAccessErr   WCStatus = 8
	WCRemInvReqErr   WCStatus = 9
	WCRemAccessErr   WCStatus = 10
	WCRemOpErr       WCStatus = 11
	WCRetryExcErr    WCStatus = 12
	WCRNRRetryExcErr WCStatus = 13
	WCRemAbortErr    WCStatus = 16
	WCFatalErr       WCStatus = 19
	WCGeneralErr     WCStatus = 21
)

var wcStatusNames = map[WCStatus]string{
	WCSuccess: "success", WCLocLenErr: "local length error", WCLocQPOpErr: "local QP operation error",
	WCLocProtErr: "local protection error", WCFlushErr: "work request flushed", WCMWBindErr: "memory window bind error", WCBadRespErr: "bad response",
	WCLocAccessErr: "local access error", WCRemInvReqErr: "remote invalid request", WCRemAccessErr: "remote access error",
	WCRemOpErr: "remote operation error", WCRetryExcErr: "transport retries exceeded", WCRNRRetryExcErr: "RNR retries exceeded",
	WCRemAbortErr: "remote aborted", WCFatalErr: "fatal error", WCGeneralErr: "general error",
}

func (s WCStatus) String() string {
	if n, ok := wcStatusNames[s]; ok {
		return n
	}
	return fmt.Sprintf("WCStatus(%d)", uint8(s))
}

// Err is nil for success, otherwise a *WCError with the completion's facts.
func (wc *WC) Err() error {
	if wc.Status == WCSuccess {
		return nil
	}
	return &WCError{Status: wc.Status, QPN: wc.QPN, WRID: wc.ID, VendorErr: wc.VendorErr}
}

// DeviceAttr are a device's identity and limits.
type DeviceAttr struct {
	GUID                  uint64 // node GUID; softroce: random per device, so that a restart is a new CA
	MaxQP                 int
	MaxQPWR               int // per queue
	MaxSGE                int
	MaxCQ                 int
	MaxCQE                int
	MaxSRQ                int
	MaxSRQWR              int
	MaxMR                 int
	MaxMRBytes            uint64
	Caps                  DeviceCaps
	MaxMW                 int
	MaxFastRegPageListLen int // pages of one fast registration; 0: there is none
	MaxRDAtomic           int // outstanding READs and atomics per QP, each direction
	MaxMsgBytes           uint32
	ActiveMTU             MTU // largest path MTU of the port
	RecvWindow            int // bytes one peer may have in flight towards this device; 0: no own flow limit
	PreferredMsg          int // SEND size in bytes that the device moves most cheaply (softroce: a GSO train); 0: no preference
}

// QPAttr are the attributes of Modify. Which are read, and which must be given, is in the table of
// rocev2 spec 5.2; Mask names the ones given.
type QPAttr struct {
	State           QPState
	CurState        QPState
	Access          Access // remote operations admitted
	PKeyIndex       uint16
	Port            uint8
	QKey            uint32
	AH              AH
	PathMTU         MTU
	DestQPN         QPN
	RQPSN           uint32 // first PSN expected
	SQPSN           uint32 // first PSN sent
	MaxRDAtomic     uint8  // READs and atomics we may have outstanding
	MaxDestRDAtomic uint8  // READs and atomics the peer may have outstanding
	MinRNRTimer     uint8  // 5-bit code, rocev2 spec 3.8
	Timeout         uint8  // 5-bit code, 4.096 us << code; 0 disables
	RetryCount      uint8  // 0..7
	RNRRetry        uint8  // 0..7, 7 for ever
	EnSQDNotify     bool

	// SendWindow bounds the bytes in flight towards the peer (what the peer announced as its
	// DeviceAttr.RecvWindow); 0 leaves the provider's default for a peer that announced nothing.
	// An OpenRDS attribute; providers in hardware ignore it. Settable in RTR and RTS.
	SendWindow int
}

// QPAttrMask says which fields of a QPAttr are given.
type QPAttrMask uint32

// Attribute mask bits.
const (
	QPStateBit QPAttrMask = 1 << iota
	QPCurStateBit
	QPAccessBit
	QPPKeyIndexBit
	QPPortBit
	QPQKeyBit
	QPAHBit
	QPPathMTUBit
	QPDestQPNBit
	QPRQPSNBit
	QPSQPSNBit
	QPMaxRDAtomicBit
	QPMaxDestRDAtomicBit
	QPMinRNRTimerBit
	QPTimeoutBit
	QPRetryCountBit
	QPRNRRetryBit
	QPEnSQDNotifyBit
	QPSendWindowBit
)

// EventType is the kind of an asynchronous event.
type EventType uint8

// Asynchronous events (rocev2 spec 5.4).
const (
	EventCommEst EventType = iota + 1
	EventSQDrained
	EventQPFatal
	EventQPRequestErr
	EventQPAccessErr
	EventQPLastWQEReached
	EventCQErr
	EventSRQLimitReached
	EventDeviceFatal
	// EventDeviceRemoved: the device was unplugged, or its interface is gone or down. Its QPs go to ERR and
	// flush; what is left to do with it is to destroy its objects and close it.
	EventDeviceRemoved
	// EventStrayPacket: an RC packet came for a QP that does not exist, from a peer that takes it for its own: most likely one
	// that was connected to a process which had the device before, and has not noticed that it is gone. Not of the InfiniBand
	// specification, and only of providers that see such packets, which raise it now and then, not for each.
	EventStrayPacket
)

func (t EventType) String() string {
	names := [...]string{1: "COMM_EST", "SQ_DRAINED", "QP_FATAL", "QP_REQ_ERR", "QP_ACCESS_ERR", "QP_LAST_WQE_REACHED", "CQ_ERR", "SRQ_LIMIT_REACHED", "DEVICE_FATAL", "DEVICE_REMOVED", "STRAY_PACKET"}
	if t > 0 && int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprintf("EventType(%d)", uint8(t))
}

// AsyncEvent is an asynchronous event. Exactly the field its Type concerns is set.
type AsyncEvent struct {
	Type EventType
	QP   QP
	CQ   CQ
	SRQ  SRQ
	From netip.Addr // of EventStrayPacket
}

// CQConfig are the parameters of a CQ.
type CQConfig struct {
	Depth int // completions it can hold
	// Handler runs when the CQ is armed and a completion arrives (see the package comment). Nil for
	// a CQ that is only polled.
	Handler func(CQ)
}

// SRQConfig are the parameters of a shared receive queue.
type SRQConfig struct {
	MaxWR  int
	MaxSGE int
}

// QPConfig are the parameters of a QP.
type QPConfig struct {
	Type       QPType
	SendCQ     CQ
	RecvCQ     CQ
	SRQ        SRQ // nil: the QP has its own receive queue
	MaxSendWR  int
	MaxRecvWR  int
	MaxSendSGE int
	MaxRecvSGE int
	// SignalAll makes every send work request signaled.
	SignalAll bool
	// Context is returned by QP.Context, for handlers that find a QP by number.
	Context any
}

// ConnParam are the parameters a side gives to connection establishment.
type ConnParam struct {
	PrivateData        []byte // at most 56 bytes in a connect, 196 in an accept, 148 in a reject
	ResponderResources uint8  // READs and atomics we can serve
	InitiatorDepth     uint8  // READs and atomics we will issue
	RetryCount         uint8  // 0..7; in a REQ, the count the passive side's QP uses too
	RNRRetryCount      uint8  // 0..7, 7 for ever; the count the peer's QP uses
	AckTimeout         uint8  // local ACK timeout code; 0: provider default (17)
	MinRNRTimer        uint8  // 5-bit code our responder puts into RNR NAKs
	TrafficClass       uint8
	SRQ                bool
}

// Connected is what establishment learnt from the peer.
type Connected struct {
	PrivateData        []byte // as received, zero padded: 56 bytes from a REQ, 196 from a REP
	ResponderResources uint8
	InitiatorDepth     uint8
	PathMTU            MTU
	PeerGUID           uint64
	PeerQPN            QPN
}

// DefaultAckTimeout is the ACK timeout code our REQ asks for: 4.096 us << 17 = 0.54 s.
const DefaultAckTimeout = 17

// AckTimeoutDuration is the time of a 5-bit ACK timeout code, 0 for code 0 (disabled).
func AckTimeoutDuration(code uint8) time.Duration {
	if code == 0 {
		return 0
	}
	return time.Duration(4096<<(code&31)) * time.Nanosecond
}
