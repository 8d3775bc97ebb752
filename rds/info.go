package rds

import (
	"cmp"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/mrpool"
)

// InfoItems chooses parts of an Info. Each is what a getsockopt of the kernel's RDS gives (rds-protocol spec 6.1).
type InfoItems uint

// Parts of an Info, with the kernel's names and rds-info's options.
const (
	InfoCounters    InfoItems = 1 << iota // RDS_INFO_COUNTERS, -c
	InfoSockets                           // RDS_INFO_SOCKETS, RDS6_INFO_SOCKETS, -k
	InfoConnections                       // RDS_INFO_CONNECTIONS, RDS6_INFO_CONNECTIONS, -n
	InfoSend                              // RDS_INFO_SEND_MESSAGES, RDS6_INFO_SEND_MESSAGES, -s
	InfoRetrans                           // RDS_INFO_RETRANS_MESSAGES, RDS6_INFO_RETRANS_MESSAGES, -t
	InfoRecv                              // RDS_INFO_RECV_MESSAGES, RDS6_INFO_RECV_MESSAGES, -r
	InfoIB                                // RDS_INFO_IB_CONNECTIONS, RDS6_INFO_IB_CONNECTIONS, -I
	InfoDevices                           // not in the kernel: devices, their pools and receive queues

	InfoAll = InfoDevices<<1 - 1
)

// maxInfoMessages bounds each list of messages: what is looked at more than once is the front of a queue.
const maxInfoMessages = 4096

// Info is a snapshot of a Service, part by part, each at its own moment. Lists are sorted by address; those of
// messages hold the oldest of each queue first, and at most some thousands.
type Info struct {
	PID     int       `json:"pid"`
	Program string    `json:"program"`
	Time    time.Time `json:"time"`

	Counters       []Counter     `json:"counters,omitempty"`
	Sockets        []SocketInfo  `json:"sockets,omitempty"`
	Connections    []ConnInfo    `json:"connections,omitempty"`
	SendQueue      []MessageInfo `json:"send_queue,omitempty"`       // accepted, not posted
	RetransQueue   []MessageInfo `json:"retransmit_queue,omitempty"` // posted, not acknowledged
	ReceiveQueue   []MessageInfo `json:"receive_queue,omitempty"`    // arrived, not read
	IBConnections  []IBConnInfo  `json:"ib_connections,omitempty"`
	Devices        []DeviceInfo  `json:"devices,omitempty"`
	LocalAddresses []netip.Addr  `json:"local_addresses"` // those this Service has open
}

// ConnInfo is a connection as rds-info -n shows it: one per pair of hosts and type of service, since each has one path.
type ConnInfo struct {
	Local     netip.Addr `json:"local"`
	Remote    netip.Addr `json:"remote"`
	TOS       uint8      `json:"tos"`
	NextTX    uint64     `json:"next_tx"` // sequence of the next message to send
	NextRX    uint64     `json:"next_rx"` // sequence expected, 0 any
	Transport string     `json:"transport"`
	State     string     `json:"state"` // "up", "connecting", ...
	// Flags are the kernel's: 1 sending, 2 connecting, 4 connected.
	Flags uint8 `json:"flags"`

	Kernel       bool   `json:"kernel"` // the peer is a kernel (known once it was up)
	QueuedMsgs   int    `json:"queued_messages"`
	QueuedBytes  int    `json:"queued_bytes"`
	Established  uint64 `json:"established"` // times it was up
	LastError    string `json:"last_error,omitempty"`
	Incarnation  uint64 `json:"peer_incarnation,omitempty"`
	UnsentMsgs   int    `json:"unsent_messages"`
	CongestedMap int    `json:"peer_congested_ports"`
}

// Flags of a ConnInfo (RDS_INFO_CONNECTION_FLAG_*).
const (
	ConnSending    = 1
	ConnConnecting = 2
	ConnConnected  = 4
)

// MessageInfo is a message in a queue (rds_info_message).
type MessageInfo struct {
	Local  Addr   `json:"local"`
	Remote Addr   `json:"remote"`
	TOS    uint8  `json:"tos"`
	Seq    uint64 `json:"seq"`
	Len    int    `json:"bytes"`
}

// IBConnInfo is the verbs side of a connection (rds_info_rdma_connection).
type IBConnInfo struct {
	Local      netip.Addr `json:"local"`
	Remote     netip.Addr `json:"remote"`
	TOS        uint8      `json:"tos"`
	SL         uint8      `json:"sl"`        // 0: on RoCE the type of service is the traffic class
	LocalGID   netip.Addr `json:"local_gid"` // zero unless up, as the other fields below
	RemoteGID  netip.Addr `json:"remote_gid"`
	Device     string     `json:"device"`
	QPN        uint32     `json:"qpn"`
	PeerQPN    uint32     `json:"peer_qpn"`
	MaxSendWR  int        `json:"max_send_wr"`
	MaxRecvWR  int        `json:"max_recv_wr"` // of the shared receive queue it takes from
	MaxSendSGE int        `json:"max_send_sge"`
	RDMAMRMax  int        `json:"rdma_mr_max"`  // regions of the device's 1m pool
	RDMAMRSize int        `json:"rdma_mr_size"` // pages of each
}

// DeviceInfo is a device: its receive queues, its pools of registered memory and the provider's counters.
type DeviceInfo struct {
	Name     string            `json:"name"`
	Addr     netip.Addr        `json:"addr"`
	Refs     int64             `json:"refs"`
	QPs      int               `json:"qps"`
	Small    ibdev.RecvStats   `json:"small_receive_queue"`
	Large    ibdev.RecvStats   `json:"large_receive_queue"`
	Pool8K   PoolInfo          `json:"pool_8k"` // regions of up to three pages
	Pool1M   PoolInfo          `json:"pool_1m"` // larger ones
	Counters map[string]uint64 `json:"counters"`
}

// PoolInfo is a pool of registered memory, as it is now; what it has done is in the counters (ib_rdma_mr_8k_..., ib_rdma_mr_1m_...).
type PoolInfo struct {
	Max       int   `json:"max"`        // regions it may have
	Pages     int   `json:"pages"`      // of the largest
	MaxPinned int64 `json:"max_pinned"` // bytes
	Regions   int   `json:"regions"`    // it has: mapped, ready, dirty, or on their way between these
	Mapped    int64 `json:"mapped"`     // that sockets have
	Ready     int64 `json:"ready"`      // that nobody has, to be used again
	Dirty     int64 `json:"dirty"`      // that were freed, and whose memory is mapped until there are enough of them
	Pinned    int64 `json:"pinned"`     // bytes
}

func poolInfo(s *mrpool.PoolStats) PoolInfo {
	return PoolInfo{Max: s.MaxItems, Pages: s.MaxPages, MaxPinned: s.MaxPinned, Regions: s.Items, Mapped: s.Mapped, Ready: s.Ready, Dirty: s.Dirty, Pinned: s.Pinned}
}

// Info takes a snapshot of what items says. It holds no lock for longer than it takes to copy one queue, and costs
// nothing between calls; a poll of InfoCounters alone does not look at queues.
func (svc *Service) Info(items InfoItems) Info {
	in := Info{PID: os.Getpid(), Program: programName(), Time: time.Now()}
	for a := range *svc.locals.Load() {
		in.LocalAddresses = append(in.LocalAddresses, a)
	}
	slices.SortFunc(in.LocalAddresses, netip.Addr.Compare)
	if items&InfoCounters != 0 {
		in.Counters = svc.Stats().Counters()
	}
	if items&InfoSockets != 0 {
		in.Sockets = svc.Sockets()
	}
	if items&(InfoConnections|InfoSend|InfoRetrans|InfoIB) != 0 {
		svc.connInfo(&in, items)
	}
	if items&InfoRecv != 0 {
		svc.recvInfo(&in)
	}
	if items&InfoDevices != 0 {
		_, devs := svc.tr.Stats()
		for _, d := range devs {
			in.Devices = append(in.Devices, DeviceInfo{Name: d.Name, Addr: d.Addr, Refs: d.Refs, QPs: d.QPs, Small: d.Small, Large: d.Large,
				Pool8K: poolInfo(&d.Pools.Small), Pool1M: poolInfo(&d.Pools.Large), Counters: d.Provider})
		}
		slices.SortFunc(in.Devices, func(a, b DeviceInfo) int { return a.Addr.Compare(b.Addr) })
	}
	return in
}

func (svc *Service) connInfo(in *Info, items InfoItems) {
	conns := svc.tr.Conns()
	slices.SortFunc(conns, func(a, b *conn.Conn) int {
		return cmp.Or(a.Local().Compare(b.Local()), a.Remote().Compare(b.Remote()), cmp.Compare(a.TOS(), b.TOS()))
	})
	for _, c := range conns {
		i := c.Info()
		if items&InfoConnections != 0 {
			in.Connections = append(in.Connections, connInfoOf(&i))
		}
		if items&InfoIB != 0 {
			ib := IBConnInfo{Local: i.Local, Remote: i.Remote, TOS: i.TOS, Device: i.Device, QPN: i.QPN, PeerQPN: i.PeerQPN,
				MaxSendWR: i.MaxSendWR, MaxRecvWR: i.MaxRecvWR, MaxSendSGE: i.MaxSendSGE, RDMAMRMax: i.MaxMRs, RDMAMRSize: i.MRPages}
			if i.Device != "" {
				ib.LocalGID, ib.RemoteGID = i.Local, i.Remote
			}
			in.IBConnections = append(in.IBConnections, ib)
		}
		if items&(InfoSend|InfoRetrans) == 0 {
			continue
		}
		for _, m := range c.QueuedMessages(maxInfoMessages) {
			mi := MessageInfo{Local: Addr{netip.AddrPortFrom(m.Local, m.SrcPort)}, Remote: Addr{netip.AddrPortFrom(m.Remote, m.DstPort)},
				TOS: m.TOS, Seq: m.Seq, Len: m.Len}
			switch {
			case m.Sent && items&InfoRetrans != 0 && len(in.RetransQueue) < maxInfoMessages:
				in.RetransQueue = append(in.RetransQueue, mi)
			case !m.Sent && items&InfoSend != 0 && len(in.SendQueue) < maxInfoMessages:
				in.SendQueue = append(in.SendQueue, mi)
			}
		}
	}
}

func connInfoOf(i *conn.Info) ConnInfo {
	c := ConnInfo{Local: i.Local, Remote: i.Remote, TOS: i.TOS, NextTX: i.NextTX, NextRX: i.NextRX, Transport: "infiniband", State: i.State.String(),
		Kernel: i.PeerIsKernel, Incarnation: i.PeerInc, QueuedMsgs: i.QueuedMsgs, QueuedBytes: i.QueuedBytes, UnsentMsgs: i.UnsentMsgs,
		Established: i.Established, LastError: i.LastError, CongestedMap: i.PeerCongestedPorts}
	switch i.State {
	case conn.Up:
		c.Flags |= ConnConnected
	case conn.Connecting:
		c.Flags |= ConnConnecting
	}
	if i.UnsentMsgs > 0 && i.State == conn.Up {
		c.Flags |= ConnSending
	}
	return c
}

type connKey struct {
	local, remote netip.Addr
	tos           uint8
}

// recvInfo lists what sockets have queued.
func (svc *Service) recvInfo(in *Info) {
	svc.eachSocket(func(s *Socket) {
		if left := maxInfoMessages - len(in.ReceiveQueue); left > 0 {
			in.ReceiveQueue = s.q.list(in.ReceiveQueue, left, s.Addr())
		}
	})
	// Records keep half of the sequence; the connection knows the rest.
	next := make(map[connKey]uint64)
	for _, c := range svc.tr.Conns() {
		next[connKey{c.Local(), c.Remote(), c.TOS()}] = c.Info().NextRX
	}
	for i := range in.ReceiveQueue {
		m := &in.ReceiveQueue[i]
		m.Seq = fullSeq(uint32(m.Seq), next[connKey{m.Local.ap.Addr(), m.Remote.ap.Addr(), m.TOS}])
	}
}

// fullSeq is the sequence with the lower half low that is nearest below next, 0 where next is unknown.
func fullSeq(low uint32, next uint64) uint64 {
	if next == 0 {
		return 0
	}
	s := next&^0xffffffff | uint64(low)
	if s >= next && s >= 1<<32 {
		s -= 1 << 32
	}
	return s
}

// list appends descriptions of up to limit datagrams of the queue, oldest first. Neither readers nor deliverers wait longer than
// for a read of as many record headers.
func (q *recvq) list(dst []MessageInfo, limit int, local Addr) []MessageInfo {
	walk := func(b *block) {
		for ; b != nil && limit > 0; b = b.next {
			for at := b.r; at < b.w && limit > 0; limit-- {
				r := b.at(at)
				p := q.svc.peerAt(r.peer)
				dst = append(dst, MessageInfo{Local: local, Remote: Addr{netip.AddrPortFrom(p.remote, r.port)},
					TOS: r.tos, Seq: uint64(r.seq), Len: r.length})
				at += r.size()
			}
		}
	}
	q.readMu.Lock()
	defer q.readMu.Unlock()
	walk(q.out)
	q.inMu.Lock()
	defer q.inMu.Unlock()
	walk(q.in)
	return dst
}

func programName() string {
	if p, err := os.Executable(); err == nil {
		return filepath.Base(p)
	}
	return filepath.Base(os.Args[0])
}
