package conn

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
)

// Sink is what a Manager delivers to: the sockets of a Service. Its methods run in completion
// handlers: they may not wait, and may not call back into the Manager except where said.
type Sink interface {
	// Deliver hands over messages that arrived on c, in order, each complete. It returns how many it
	// took; n < len(msgs) says that msgs[n] would pass the hard bound of what one peer may
	// have queued here: the connection is then reset, msgs[n:] stay unacknowledged, and the peer
	// will send them again. A message for a port nobody bound is taken and counted by the Sink.
	//
	// msgs and what they point to belong to the connection once Deliver has returned, except
	// buffers the Sink took with RecvBuf.Get.
	//
	// Deliver may call Manager.SetCongested and Conn.PeerCongested.
	Deliver(c *Conn, msgs []Incoming) (n int)

	// PortsClear says that these ports of remote, as seen by connections from local, were congested and are not any
	// more (Conn.PeerCongested): writers that wait for them may go on. Each is named once; ports belongs to the caller.
	PortsClear(local, remote netip.Addr, ports []uint16)

	// PeerDown and PeerUp report that a peer could not be reached for the dead-peer time (default
	// 10 s) and that it is reachable again.
	PeerDown(local, remote netip.Addr)
	PeerUp(local, remote netip.Addr)

	// ConnIdle asks about a connection that only its peer has asked for, and that has brought nothing for Config.IdleTimeout: true says that
	// the Sink has no use for it. ConnGone says that c is no more: nothing is delivered on it. It may follow without the question
	// for one on which nothing ever was. Neither runs in a handler.
	ConnIdle(c *Conn) bool
	ConnGone(c *Conn)
}

// Owner is who a sent message is accounted to (a socket). Owners are compared, so an Owner is a
// pointer. Released runs in completion handlers or in the caller of Conn.Cancel and
// Manager.Close: it may not wait, and may not call back into the connection.
type Owner interface {
	// Released reports that msgs messages with together bytes of payload of this owner were acknowledged by the
	// peer if acked, and otherwise cancelled, or dropped with the connection at Manager.Close.
	Released(msgs, bytes int, acked bool)
}

// Part is an Owner whose messages are another's too: Conn.Cancel for that one takes them as well. It tells the other
// what it is told itself.
type Part interface {
	Owner
	Whole() Owner
}

// Incoming is one received datagram.
type Incoming struct {
	Seq     uint64
	Len     int // payload bytes of the whole message
	SrcPort uint16
	DstPort uint16
	Ext     *Ext   // what the header says beyond that, nil: nothing
	First   Frag   // the first (nearly always the only) piece; empty for a zero-length message
	More    []Frag // further pieces in order
}

// Ext is what a datagram's header says about memory (rds-protocol spec 2.5), and when it came.
type Ext struct {
	Cookie uint64 // of a region of the sender's, handed out (RDMA_DEST); 0 none
	// Used is the key of the region of the receiver's that the operation before this datagram used (RDMA), if
	// HasUsed. The peer says so: nothing proves it.
	Used    verbs.RKey
	HasUsed bool
	// Seen is when the first SEND of the datagram was taken from its completion, Start when its header was looked at. Zero
	// unless Manager.TraceReceive is on (rds-protocol spec 1.7, SO_RDS_MSG_RXPATH_LATENCY).
	Seen, Start time.Time
}

// Frag is a piece of a message in a receive buffer.
type Frag struct {
	Buf  *RecvBuf
	Data []byte
}

// RecvBuf is a receive buffer. A Sink that keeps a message takes a reference with Get inside Deliver and
// gives it back with Put from anywhere, at any time; with the last one the buffer
// returns to its receive queue. Whoever may keep a buffer for long asks Scarce first, and copies instead
// if it says so: one small message pins the whole buffer.
type RecvBuf = ibdev.RecvBuf

// SendFlags modify Conn.Send.
type SendFlags uint8

// Send flags.
const (
	// AckNow asks the peer to acknowledge at once (and releases the owner's buffer space soonest): for a
	// socket that has filled half its send buffer (rds-protocol spec 3.6).
	AckNow SendFlags = 1 << iota
	// More says that the caller has further messages for this connection at hand: nothing is posted for
	// this one unless a full SEND is there. Conn.Flush ends it.
	More
)

// Extra is what a datagram may have beside its payload: one of Cookie and RDMA (rds-protocol spec 1.4 step 12), or none.
type Extra struct {
	Cookie uint64  // of a region to hand out: rkey | offset << 32; 0 none
	RDMA   *RDMA   // an operation to execute before the datagram
	Buffer *Buffer // has the payload, of this Manager; it is the connection's when the datagram is queued
}

// RDMA is an operation that is executed before the datagram it is sent with. It belongs to the connection from a SendExtra
// that succeeded until RDMADone.
type RDMA struct {
	Opcode     verbs.SendOpcode // OpRead, OpWrite, OpCompareSwap, OpFetchAdd
	Device     *ibdev.Device    // whose keys SGs has
	SGs        []verbs.SGE      // local memory in order; none is empty. 8 bytes for an atomic
	RKey       verbs.RKey
	RemoteAddr uint64
	CompareAdd uint64 // of an atomic
	Swap       uint64
	NoFence    bool // the datagram need not wait for the data of a READ, or the result of an atomic
	Silent     bool // if the payload is empty there is no datagram: only the operation is executed

	Owner RDMAOwner

	op op
}

// RDMAOwner is who an operation is for.
type RDMAOwner interface {
	// RDMADone is called once, when the connection touches none of the memory any more, nor the RDMA itself. It may run in completion handlers,
	// in the caller of SendExtra, Cancel, Manager.Close: it may not wait, and may not call back into the connection.
	RDMADone(s RDMAStatus)
}

// RDMAStatus is the outcome of an operation; the values are the kernel's (rds-protocol spec 1.8).
type RDMAStatus uint8

const (
	RDMASuccess     RDMAStatus = iota
	RDMARemoteError            // remote access error: a key that is not valid, or not for that
	RDMACancelled              // taken back before it was executed
	RDMADropped                // the connection was lost; it is not known whether it was executed
	RDMAOther                  // any other error, such as one of this side
)

// Conditions a caller acts on.
var (
	ErrClosed = net.ErrClosed
	// ErrNoMemory: SendMemory or the slab is exhausted, or the connection holds as many messages as it may. Nothing was
	// queued.
	ErrNoMemory = errors.New("no buffer memory")
	// ErrTooManyConns: the Manager, or of one peer, holds as many connections as it may.
	ErrTooManyConns = errors.New("too many connections")
	// ErrNoDevice: no device owns the local address. It is verbs.ErrNoSuchAddress or wraps it.
	ErrNoDevice = ibdev.ErrNoDevice
	// ErrSelf: a connection of an address with itself. Datagrams to an address of one's own do not travel.
	ErrSelf = errors.New("connection to itself")
	// ErrMessageTooLong: above MaxMessage.
	ErrMessageTooLong = errors.New("message too long")
	// ErrTooManyPieces: an operation on more pieces of local memory than a send ring holds.
	ErrTooManyPieces = errors.New("operation on too many pieces of memory")
	// ErrNotUp: the connection is not established; it is being connected.
	ErrNotUp = errors.New("not connected yet")
)

// MaxMessage is the largest payload of a datagram in bytes (rds-protocol spec 1.1).
const MaxMessage = 1 << 20

// MaxRDMAPieces is how many pieces of local memory an operation names at most (rds-protocol spec 1.4 step 13); with short rings it
// is fewer.
const MaxRDMAPieces = 1024

// Ports of the CM listeners (rds-protocol spec 1.1, 3.1).
const (
	CMPort4 = 18634
	CMPort6 = 16385
)

// PingSourcePort is the RDS port our own pings (heartbeats, Conn.Ping) come from. It is left out of
// automatic binding; a socket bound to it works, but its own pongs cannot be told from ours.
const PingSourcePort = 65535

// Dialect is how a Manager presents itself to peers.
type Dialect uint8

const (
	// DialectOpen sends our mark and packs SENDs towards a peer that sends it too; a peer without it is treated
	// as a kernel.
	DialectOpen Dialect = iota
	// DialectKernelOnly behaves towards everybody as towards a kernel, and like one: no mark is sent, none
	// is looked at.
	DialectKernelOnly
)

// Config are the parameters of a Manager. Zero values are the defaults given; nobody changes it
// after NewManager.
type Config struct {
	Registry *ibdev.Registry // required
	Slab     *slab.Slab      // required: the one the Registry's devices register
	Epoch    *epoch.Domain   // required
	Sink     Sink            // required
	Logger   hclog.Logger    // nil: none

	Dialect Dialect

	// Incarnation tells this process from another at the same address; 0: random. FirstSequence is the
	// sequence that a new connection starts at; nil: the wall clock in nanoseconds (rds-protocol spec 5.6). It must
	// be greater than any sequence this address used before.
	Incarnation   uint64
	FirstSequence func() uint64

	Seed uint64 // of random delays; 0: random

	// BackoffMin is the first delay after a failed attempt (upper limit of the random delay), which then doubles up to BackoffMax
	// (net.rds.reconnect_min_delay_ms, net.rds.reconnect_max_delay_ms): 1 ms and 1 s.
	BackoffMin, BackoffMax time.Duration

	ConnectTimeout time.Duration // 2 s: of one attempt
	DrainTimeout   time.Duration // 5 s: for the completions of a QP in ERR; passing it is a provider's bug
	DeadAfter      time.Duration // 10 s without a sign of life: PeerDown
	HeartbeatIdle  time.Duration // a quarter of DeadAfter, and at most that, without traffic: a ping; negative: never
	AckDelay       time.Duration // 10 ms: acknowledge what did not ask for it

	// IdleTimeout is after how long without a message a connection that only its peer has asked for is given up when it is down, or room is
	// needed; 10 min; negative: never.
	IdleTimeout time.Duration

	MaxConns         int // 65536 connections
	MaxConnsPerPeer  int // 64 that a pair of hosts has only because the peer asked, one per type of service
	MaxQueuedPerConn int // 1 << 20 messages unacknowledged
	SendRing         int // 64 SENDs in flight per connection between two of ours, at most 256 (net.rds.ib.max_send_wr)
	KernelSendRing   int // 256 SENDs in flight per connection towards a kernel, at most 1024 (net.rds.ib.max_send_wr)

	// SendMemory bounds the slab memory of all send queues in bytes; 0: half of slab.DefaultMaxBytes. With
	// ibdev.Config.RecvMemory it must leave something of the Slab's bound: an eighth is good.
	SendMemory int64
}

// Stats are the counters of a Manager: those of the kernel that concern this layer under the kernel's
// names (rds-protocol spec 6.2; the rest of that list is the sockets'), and ours. All are running
// totals.
type Stats struct {
	ConnReset            uint64 // conn_reset
	RecvDropBadChecksum  uint64 // recv_drop_bad_checksum
	RecvDropOldSeq       uint64 // recv_drop_old_seq
	RecvAckRequired      uint64 // recv_ack_required
	RecvPing             uint64 // recv_ping
	SendLockContention   uint64 // send_lock_contention: a message was left to the transmitter at work
	SendAckRequired      uint64 // send_ack_required
	SendQueued           uint64 // send_queued: messages, pings and pongs included
	SendPong             uint64 // send_pong: pings and pongs generated
	CongUpdateQueued     uint64 // cong_update_queued
	CongUpdateReceived   uint64 // cong_update_received: whole maps and deltas
	IBConnectRaced       uint64 // ib_connect_raced: REQ while connecting
	IBListenClosedStale  uint64 // ib_listen_closed_stale: REQ while up
	IBTxCQEvent          uint64 // ib_tx_cq_event
	IBRxCQEvent          uint64 // ib_rx_cq_event
	IBTxRingFull         uint64 // ib_tx_ring_full
	IBRxCreditUpdates    uint64 // ib_rx_credit_updates: headers with credits, which are ignored
	IBAckSent            uint64 // ib_ack_sent
	IBAckSendPiggybacked uint64 // ib_ack_send_piggybacked
	IBAckSendDelayed     uint64 // ib_ack_send_delayed
	IBAckReceived        uint64 // ib_ack_received: acknowledgement frames
	SendRDMA             uint64 // send_rdma: operations accepted
	SendRDMABytes        uint64 // send_rdma_bytes: of WRITEs that succeeded
	RecvRDMABytes        uint64 // recv_rdma_bytes: of READs that succeeded
	IBAtomicCswp         uint64 // ib_atomic_cswp
	IBAtomicFadd         uint64 // ib_atomic_fadd

	RecvMessages      uint64 // messages delivered to the Sink
	RecvBytes         uint64 // their payload
	RecvSends         uint64 // SENDs received
	SendMessages      uint64 // messages posted to the end, resends included
	SendBytes         uint64 // their payload
	SendSends         uint64 // SENDs posted
	SendRetransmit    uint64 // messages posted with RETRANSMITTED
	SendAcked         uint64 // messages acknowledged
	SendCancelled     uint64 // messages cancelled
	SendAbandoned     uint64 // messages dropped at Close
	SendNoMemory      uint64 // messages refused with ErrNoMemory
	RDMARemoteErrors  uint64 // operations that failed for the peer's reasons
	RDMADropped       uint64 // operations lost with a connection
	RDMACancelled     uint64 // operations taken back
	RDMAOtherErrors   uint64 // operations that failed otherwise
	RecvSeqGap        uint64 // sequences skipped by a peer (cancelled there, or lost with it)
	RecvBadFragment   uint64 // connections dropped for a fragment against the rules
	RecvBadAck        uint64 // acknowledgements of what was never sent, ignored
	RecvStale         uint64 // completions of an old incarnation
	RecvRefused       uint64 // messages the Sink did not take (hard bound of a peer)
	RecvEarlyDropped  uint64 // connections dropped for sending too much before the handshake was through
	RecvPongDropped   uint64 // pings not answered: bound or rate
	RecvMapBadLength  uint64 // congestion maps ignored
	CongDeltaSent     uint64 // updates of our map that named the ports alone
	CongDeltaReceived uint64
	PeerRestarted     uint64 // incarnations of peers that replaced another
	StrayConnects     uint64 // connections made because a peer took us for the process that was here before
	PeersDown         uint64 // PeerDown reports
	ConnectAttempts   uint64
	ConnectFailed     uint64
	ConnectRejected   uint64 // by the peer
	AcceptRejected    uint64 // REQs refused by us
	AcceptBadPrivate  uint64 // REQs with private data that makes no sense
	AcceptLate        uint64 // REQs of ours that arrived when a later one was settled
	Established       uint64
	DrainTimeouts     uint64 // QPs destroyed without their marker: a provider's bug
	HeartbeatsSent    uint64
	HeartbeatTimeouts uint64
	PingRefused       uint64 // calls of Ping with as many under way as there may be
	DevicesLost       uint64 // times an address was found without its device
	DevicesBack       uint64 // times it had one again
	ConnsRetired      uint64 // connections given up because only the peer had asked for them and brought nothing
	AcceptTooMany     uint64 // REQs refused because there are as many connections as there may be, in all or of the peer
	TracesForgotten   uint64 // connections given up of which nothing is known any more
	Conns             uint64 // gauge
	ConnsUp           uint64 // gauge
	SlabBytes         uint64 // gauge: memory mapped to send from and to receive into, used or not
}

// Info is a snapshot of one connection, as `rds-info -n -I` shows it (rds-protocol spec 6.1, 7.6).
type Info struct {
	Local, Remote      netip.Addr
	TOS                uint8
	State              State
	PeerIsKernel       bool   // meaningful once it was up
	PeerInc            uint64 // the peer's incarnation, 0 unknown or a kernel
	Device             string // "" unless connected
	QPN, PeerQPN       uint32
	MaxSendWR          int // of the QP, 0 unless connected
	MaxSendSGE         int
	MaxMRs, MRPages    int    // large regions of the device's pools, 0 unless connected
	MaxRecvWR          int    // posted to the shared receive queue it takes from
	PeerCongestedPorts int    // bits set in the peer's map
	NextTX             uint64 // next sequence to send
	NextRX             uint64 // next sequence expected, 0: any
	QueuedMsgs         int    // accepted, not acknowledged
	QueuedBytes        int    // their payload
	UnsentMsgs         int    // of these not yet posted
	Established        uint64 // times it was up
	LastError          string // why it was last down
}

// QueuedMessage describes a message that is not acknowledged yet (`rds-info -s -t`).
type QueuedMessage struct {
	Local, Remote    netip.Addr
	SrcPort, DstPort uint16
	TOS              uint8
	Seq              uint64
	Len              int
	Sent             bool // posted at least in part: on the retransmit queue in the kernel's terms
}
