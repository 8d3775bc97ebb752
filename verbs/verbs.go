package verbs

import (
	"context"
	"net/netip"
	"time"
)

// Provider opens devices.
type Provider interface {
	// Name is a short name for logs and reports: "softroce".
	Name() string
	// OpenDevice opens the device that owns the local address addr. The error matches
	// ErrNoSuchAddress when this provider has none. Opening an address twice gives an error that
	// names the owner where it can. May wait.
	OpenDevice(addr netip.Addr) (Device, error)
}

// DeviceWatcher is implemented by providers whose devices come and go.
type DeviceWatcher interface {
	// WatchDevices calls fn, one call at a time, on a goroutine of the provider: for an address that can be opened
	// from now on, and for one that cannot any more. stop ends it; no call runs once stop has returned.
	// An open device that goes away also raises EventDeviceRemoved.
	WatchDevices(fn func(DeviceEvent)) (stop func(), err error)
}

// DeviceEvent says that the device of an address came or went.
type DeviceEvent struct {
	Addr    netip.Addr
	Present bool
}

// PacketTracer is implemented by providers that see packets (a capture on the interface does not show what
// hardware does, and needs rights; this needs none).
type PacketTracer interface {
	// TracePackets calls fn for every packet in and out until stop has returned. fn runs on the data path: it copies what
	// it wants of the payload, and may not wait or call the provider. Not in a handler.
	TracePackets(fn func(Packet)) (stop func())
}

// Packet is a UDP datagram as it was seen by a provider.
type Packet struct {
	Time          time.Time
	Out           bool
	Local, Remote netip.AddrPort
	TrafficClass  uint8
	HopLimit      uint8
	// ID is the IPv4 identification of a packet out, and of one in where it can be told: the index in its train.
	ID      uint16
	Payload []byte // BTH to ICRC; the provider's, for the time of the call
}

// Device is an opened RDMA device with one port.
type Device interface {
	Name() string
	Attr() DeviceAttr
	// Addr is the address (GID) the device was opened for.
	Addr() netip.Addr

	AllocPD() (PD, error)
	CreateCQ(CQConfig) (CQ, error)

	// SetAsyncHandler installs the receiver of asynchronous events, nil for none. It runs on a
	// goroutine of the provider, never on the engine, one event at a time; it may not wait for the
	// provider.
	SetAsyncHandler(func(AsyncEvent))

	// Connect establishes an RC connection from this device to remote (the service port in RDMA-CM's
	// port space TCP) over qp, which must be in RESET: CM takes it through INIT and RTR to RTS.
	// prepare, when not nil, is called with qp in INIT, before REQ is sent: post receives there.
	// Connect returns when the peer has accepted and RTU was sent; on error qp is in ERR or RESET
	// and belongs to the caller still. Errors: *RejectError, ErrUnreachable, ctx's. May wait.
	Connect(ctx context.Context, remote netip.AddrPort, qp QP, p ConnParam, prepare func() error) (Endpoint, Connected, error)

	// Listen accepts REQs to port (1..65535) on the device's address. handler runs on a goroutine of
	// its own for each request and must answer it with Accept or Reject; a request it leaves
	// unanswered when it returns is rejected. Requests beyond the provider's bounds (per source and in total) are dropped and
	// counted.
	Listen(port uint16, handler func(ConnRequest)) (Listener, error)

	// Stats is a snapshot of the provider's counters by name.
	Stats() map[string]uint64

	// Close releases the device. *BusyError, changing nothing, while PDs, CQs or listeners live. May
	// wait.
	Close() error
}

// Progresser is implemented by devices whose data path runs on goroutines of this process.
// Whoever is about to wait for a completion calls Progress first, holding no locks: it does what
// is due (a receive batch, completions, handlers, acknowledgements) on the caller's goroutine and
// reports whether there was anything. It returns false at once when somebody else is at it, and
// never waits.
type Progresser interface {
	Progress() bool
	// Park is called by who has called Progress and is about to sleep: from now on arrivals wake the
	// device by themselves.
	Park()
}

// Listener is a CM listener.
type Listener interface {
	Close() error // no handler runs once it has returned; may wait
}

// ConnRequest is an incoming REQ.
type ConnRequest interface {
	// Remote is the peer: the address of its REQ's primary path and its CMA source port.
	Remote() netip.AddrPort
	Local() netip.AddrPort
	// Info holds the request's parameters: private data, resources, path MTU, the peer's GUID and QPN.
	Info() Connected
	// Accept takes qp (in RESET) to RTS and sends REP. prepare is as in Connect. It returns when the
	// peer's RTU or first packet has arrived. May wait.
	Accept(ctx context.Context, qp QP, p ConnParam, prepare func() error) (Endpoint, error)
	// Reject refuses the request with reason 28 and at most 148 bytes of private data.
	Reject(privateData []byte) error
}

// Endpoint is one side of an established connection.
type Endpoint interface {
	Local() netip.AddrPort
	Remote() netip.AddrPort
	// Done is closed when the connection has ended: DREQ from the peer, Disconnect, a stale
	// connection, or the device going away. CM has then moved the QP to ERR.
	Done() <-chan struct{}
	// Disconnect moves the QP to ERR and sends DREQ (or answers one); it does not wait for DREP,
	// which CM retries for on its own. Safe to call twice, and from a handler.
	Disconnect() error
}

// Abandoner is implemented by endpoints that can end without a word to the peer, as the death of a process
// does. Abandon is otherwise like Disconnect; the peer finds out when it sends or when its address is
// connected from anew. It is for peers that do worse with a DREQ than without. An endpoint that
// was disconnected before has told its peer already.
type Abandoner interface {
	Abandon() error
}

// PD is a protection domain.
type PD interface {
	// RegMR registers mem for access. The region's address (its IOVA) is iova: SGEs and remote
	// addresses are iova plus an offset. mem is memory outside the Go heap, or pinned by the caller
	// until Deregister has returned nil.
	RegMR(mem []byte, iova uint64, access Access) (MR, error)
	// RegOnDemandMR registers mem without pinning any of it (AccessOnDemand is implied): a page is brought in when
	// a request needs it, and given up when mem says so. Access to what is gone is refused as if out
	// of the region. ErrNotSupported without CapOnDemandPaging; other errors as RegMR.
	RegOnDemandMR(mem PagedMemory, iova uint64, access Access) (MR, error)
	// AdviseMR acts on on-demand regions that sgs name (ibv_advise_mr(3)). Others are ErrInvalid. May wait.
	AdviseMR(a Advice, sgs []SGE) error

	// AllocFastRegMR makes a region for up to maxPages pages that is free: OpFastRegMR makes it valid, OpLocalInv or a
	// peer's SEND with invalidate free again. Its keys are those of the last registration executed.
	// ErrNotSupported without CapMemMgtExtensions.
	AllocFastRegMR(maxPages int) (MR, error)
	// AllocPageList makes a list for up to maxPages pages. ErrNotSupported without CapMemMgtExtensions.
	AllocPageList(maxPages int) (PageList, error)
	// AllocMW makes a memory window. ErrNotSupported if the device has no such type.
	AllocMW(t MWType) (MW, error)

	CreateSRQ(SRQConfig) (SRQ, error)
	CreateQP(QPConfig) (QP, error)
	// Close is *BusyError while MRs, windows, page lists, SRQs or QPs live.
	Close() error
}

// MR is a memory region.
type MR interface {
	LKey() LKey
	RKey() RKey // 0 when the region has no remote right; never 0 for one of AllocFastRegMR
	Addr() uint64
	Len() int
	// Deregister makes the keys invalid at once, waits (bounded) until no operation of this device
	// touches the memory, and gives it back. Never busy for traffic of a peer. After the bound:
	// *BusyError naming what holds it; the keys are gone, the memory still belongs to those
	// operations, and Deregister may be called again. A region with windows bound is *BusyError naming them, and
	// nothing is changed. nil when already done. May wait.
	Deregister() error
}

// MW is a memory window: rights to a part of a region, given and taken by work requests.
type MW interface {
	Type() MWType
	// RKey is the key of the last bind executed, of the free window before.
	RKey() RKey
	// Dealloc ends the window, bound or not. nil when already done. May wait.
	Dealloc() error
}

// PageList is memory to be mapped by a fast registration: the provider's, one per registration outstanding.
type PageList interface {
	// Set makes the list name segs in order: memory outside the Go heap, or pinned by the caller until the
	// registration made of it is invalidated. Only the first may begin, and only the last end, off a PageSize
	// boundary of its address: ErrInvalid otherwise, and for more than Cap pages. ErrBusy from the post of a request that
	// names the list until that request has completed or was flushed: also for the post of another one. A
	// refusal changes nothing.
	Set(segs [][]byte) error
	// Len is how many bytes the list names, Pages how many pages, Cap how many it can.
	Len() int
	Pages() int
	Cap() int
	// Close frees the list; ErrBusy as Set. nil when already done.
	Close() error
}

// CQ is a completion queue.
type CQ interface {
	// Poll takes up to len(wcs) completions.
	Poll(wcs []WC) int
	// Arm asks for one call of the handler at the next completion (next solicited or failed one
	// if solicitedOnly). It reports true if completions are there already, in which case the
	// caller polls again: whether the handler is called for those is not defined.
	Arm(solicitedOnly bool) (missed bool)
	// Close is *BusyError while QPs use it. No handler runs once it has returned. May wait.
	Close() error
}

// SRQ is a shared receive queue.
type SRQ interface {
	// PostRecv is as QP.PostRecv.
	PostRecv(wrs []RecvWR) (n int, err error)
	// Arm raises EventSRQLimitReached once when fewer than limit requests are left; 0 disarms.
	Arm(limit int) error
	// Close is *BusyError while QPs use it. Posted requests vanish without completions.
	Close() error
}

// QP is a queue pair.
type QP interface {
	Num() QPN
	Type() QPType
	State() QPState
	Context() any
	PD() PD

	// PostSend queues wrs on the send queue in order and reports how many it took.
	//
	// Each wr names at most MaxSendSGE entries. PostSend does not keep wrs or its SG lists, but the
	// memory they name belongs to the QP until the WC with the same ID (or a later one) was polled.
	//
	// If n < len(wrs), err says why wrs[n] was refused and wrs[n:] were not queued: ErrSQFull, a
	// *StateError, ErrInvalid, ErrNotSupported (SendOpcode.Caps). Requests posted in ERR are queued and flushed. Batches from
	// different goroutines do not interleave.
	//
	// Source: ibv_post_send(3).
	PostSend(wrs []SendWR) (n int, err error)

	// PostRecv queues receive requests; errors as PostSend, with ErrRQFull. ErrInvalid on a QP with
	// an SRQ.
	PostRecv(wrs []RecvWR) (n int, err error)

	// Modify changes state and attributes; see QPAttr. A move or an attribute the state does not
	// admit is a *StateError and changes nothing. May wait; SetError is for handlers.
	Modify(attr QPAttr, mask QPAttrMask) error

	// SetError starts the move to ERR and returns at once; the flushed completions follow. Safe from
	// a handler.
	SetError()

	// Query returns the attributes in force.
	Query() QPAttr

	// Close destroys the QP. Requests not yet completed vanish; completions already in a CQ remain. Once it
	// has returned the QP touches no memory. May wait.
	Close() error
}
