package rds

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"unicode"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
)

// counters are a Service's own. They are added to once per run or block, not per message.
type counters struct {
	recvQueued       atomic.Uint64
	recvDelivered    atomic.Uint64
	recvBytesAdded   atomic.Uint64
	recvBytesFreed   atomic.Uint64
	copyToUser       atomic.Uint64
	recvDropNoSock   atomic.Uint64
	recvDropDeadSock atomic.Uint64
	recvPing         atomic.Uint64
	recvHeld         atomic.Uint64
	recvPeerLimit    atomic.Uint64
	recvSocketLimit  atomic.Uint64
	recvShort        atomic.Uint64
	recvLoanCopied   atomic.Uint64
	recvUnknownKey   atomic.Uint64
	recvUsedOnce     atomic.Uint64
	completionsLost  atomic.Uint64
	sendQueueEmpty   atomic.Uint64
	sendQueueFull    atomic.Uint64
	congSendError    atomic.Uint64
	congSendBlocked  atomic.Uint64
	sendReleased     atomic.Uint64
	sendNoMemory     atomic.Uint64
	sendNoReserve    atomic.Uint64
	congSet          atomic.Uint64
	peerDown         atomic.Uint64
	peerUp           atomic.Uint64
}

// Stats is a snapshot of a Service's counters: running totals, except for the gauges. Those of the kernel have its
// names (rds-protocol spec 6.2); Counters lists all of them by name.
type Stats struct {
	RecvQueued             uint64 // messages queued to sockets
	RecvDelivered          uint64 // messages read by applications
	RecvBytesAddedToSock   uint64 // payload bytes queued to sockets
	RecvBytesFreedFromsock uint64 // payload bytes that left their queues
	CopyToUser             uint64 // payload bytes copied to callers' buffers
	RecvDropNoSock         uint64 // messages for a port that nobody bound; acknowledged
	RecvDropDeadSock       uint64 // messages whose socket was closed before they were read; acknowledged
	SendQueueEmpty         uint64 // a socket's send buffer became empty
	SendQueueFull          uint64 // writes that found the send buffer full
	CongSendError          uint64 // TrySends that found the port congested
	CongSendBlocked        uint64 // writes that waited for a congested port

	RecvLocalPing     uint64 // pings from sockets of this Service to its own addresses
	RecvHeld          uint64 // messages kept for a port that was not bound yet
	RecvPeerLimit     uint64 // times a peer met MaxPeerBytes
	RecvSocketLimit   uint64 // times a peer met a socket's hard bound
	RecvShortBuffer   uint64 // messages cut because the reader's buffer was too short
	RecvLoanCopied    uint64 // messages copied because of MaxLentBytes
	RecvUsedOnce      uint64 // regions for one use freed because a peer said that it had used them
	RecvUnknownKey    uint64 // messages that say so of memory their socket does not have
	CompletionsLost   uint64 // failed operations nobody was told of, since too many completions were not read
	SendReleased      uint64 // messages that left the send buffers: acknowledged, cancelled or abandoned
	SendNoBuffer      uint64 // writes that found no memory in the connection
	SendNoReserve     uint64 // Allocs that found no memory, or MaxReservedBytes of it in the socket's SendBufs
	CongestedPort     uint64 // times a port of ours became congested
	PeerDownReported  uint64
	PeerUpReported    uint64
	Sockets           uint64 // gauge: bound
	LentMessages      uint64 // gauge: of bound sockets, not released yet
	LentBytes         uint64 // gauge: blocks they keep
	ReservedBytes     uint64 // gauge: in SendBufs of bound sockets that were neither sent nor freed
	UnackedMessages   uint64 // gauge: of bound sockets
	UnackedBytes      uint64 // gauge
	QueuedBytes       uint64 // gauge: payload in receive queues of bound sockets
	CongestedSockets  uint64 // gauge
	ReceiveBufsPinned uint64 // gauge: bytes of receive buffers kept by queues and loans

	Conn conn.Stats // of all connections
	// MemoryPools are the counters of the pools of registered memory, of the devices of the moment together, under the kernel's
	// names: ib_rdma_mr_8k_alloc and so on.
	MemoryPools map[string]uint64
	// Devices are the counters of each device by its name: the provider's under the provider's names, and those of
	// its receive queues.
	Devices map[string]map[string]uint64
}

// Stats takes a snapshot. It is not atomic across counters.
func (svc *Service) Stats() Stats {
	var st Stats
	svc.eachSocket(func(s *Socket) {
		s.q.readMu.Lock()
		s.q.flushLocked()
		s.q.readMu.Unlock()
		st.Sockets++
		st.LentMessages += uint64(max(0, s.loans.Load()))
		st.LentBytes += uint64(max(0, s.lentBytes.Load()))
		st.ReservedBytes += uint64(max(0, s.reserved.Load()))
		msgs, bytes := s.Unacknowledged()
		st.UnackedMessages += uint64(msgs)
		st.UnackedBytes += uint64(bytes)
		st.QueuedBytes += uint64(max(0, s.q.bytes.Load()))
		st.ReceiveBufsPinned += uint64(max(0, s.q.pinned.Load()))
		if s.q.congested.Load() {
			st.CongestedSockets++
		}
	})
	c := &svc.ctr
	st.RecvQueued = c.recvQueued.Load()
	st.RecvDelivered = c.recvDelivered.Load()
	st.RecvBytesAddedToSock = c.recvBytesAdded.Load()
	st.RecvBytesFreedFromsock = c.recvBytesFreed.Load()
	st.CopyToUser = c.copyToUser.Load()
	st.RecvDropNoSock = c.recvDropNoSock.Load()
	st.RecvDropDeadSock = c.recvDropDeadSock.Load()
	st.SendQueueEmpty = c.sendQueueEmpty.Load()
	st.SendQueueFull = c.sendQueueFull.Load()
	st.CongSendError = c.congSendError.Load()
	st.CongSendBlocked = c.congSendBlocked.Load()
	st.RecvLocalPing = c.recvPing.Load()
	st.RecvHeld = c.recvHeld.Load()
	st.RecvPeerLimit = c.recvPeerLimit.Load()
	st.RecvSocketLimit = c.recvSocketLimit.Load()
	st.RecvShortBuffer = c.recvShort.Load()
	st.RecvLoanCopied = c.recvLoanCopied.Load()
	st.RecvUsedOnce = c.recvUsedOnce.Load()
	st.RecvUnknownKey = c.recvUnknownKey.Load()
	st.CompletionsLost = c.completionsLost.Load()
	st.SendReleased = c.sendReleased.Load()
	st.SendNoBuffer = c.sendNoMemory.Load()
	st.SendNoReserve = c.sendNoReserve.Load()
	st.CongestedPort = c.congSet.Load()
	st.PeerDownReported = c.peerDown.Load()
	st.PeerUpReported = c.peerUp.Load()
	var devs []ibdev.DeviceStats
	st.Conn, devs = svc.tr.Stats()
	st.Devices = make(map[string]map[string]uint64, len(devs))
	st.MemoryPools = make(map[string]uint64, len(memoryPoolNames))
	for _, name := range memoryPoolNames {
		st.MemoryPools[name] = 0
	}
	for _, d := range devs {
		d.Pools.Each(func(name string, v uint64) { st.MemoryPools[name] += v })
		m := make(map[string]uint64, len(d.Provider)+16)
		for _, c := range appendFields(nil, reflect.ValueOf(d)) {
			m[c.Name] = c.Value
		}
		maps.Copy(m, d.Provider)
		st.Devices[d.Name] = m
	}
	return st
}

// Counter is one line of rds-info -c.
type Counter struct {
	Name  string `json:"name"`
	Value uint64 `json:"value"`
}

// Counters lists all counters: the kernel's first, in the kernel's order, then ours, then the devices' as
// "device/counter".
func (st Stats) Counters() []Counter {
	var cs []Counter
	cs = appendFields(cs, reflect.ValueOf(st))
	cs = appendFields(cs, reflect.ValueOf(st.Conn))
	for name, v := range st.MemoryPools {
		cs = append(cs, Counter{name, v})
	}
	slices.SortStableFunc(cs, func(a, b Counter) int { return kernelRank(a.Name) - kernelRank(b.Name) })
	var devs []Counter
	for dev, m := range st.Devices {
		for name, v := range m {
			devs = append(devs, Counter{dev + "/" + name, v})
		}
	}
	slices.SortFunc(devs, func(a, b Counter) int { return strings.Compare(a.Name, b.Name) })
	return append(cs, devs...)
}

func appendFields(cs []Counter, v reflect.Value) []Counter {
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Uint64 {
			cs = append(cs, Counter{snake(v.Type().Field(i).Name), f.Uint()})
		}
	}
	return cs
}

// kernelNames are the kernel's counters in its order (rds-protocol spec 6.2), as far as they count something here.
var kernelNames = [...]string{
	"conn_reset", "recv_drop_bad_checksum", "recv_drop_old_seq", "recv_drop_no_sock", "recv_drop_dead_sock",
	"recv_delivered", "recv_queued", "recv_ack_required", "recv_rdma_bytes", "recv_ping", "send_queue_empty", "send_queue_full",
	"send_lock_contention", "send_ack_required", "send_queued", "send_rdma", "send_rdma_bytes", "send_pong", "copy_to_user",
	"cong_update_queued", "cong_update_received", "cong_send_error", "cong_send_blocked",
	"recv_bytes_added_to_sock", "recv_bytes_freed_fromsock",
	"ib_connect_raced", "ib_listen_closed_stale", "ib_tx_cq_event", "ib_rx_cq_event", "ib_tx_ring_full",
	"ib_rx_credit_updates", "ib_ack_sent", "ib_ack_send_delayed", "ib_ack_send_piggybacked", "ib_ack_received",
	"ib_rdma_mr_8k_alloc", "ib_rdma_mr_8k_free", "ib_rdma_mr_8k_used", "ib_rdma_mr_8k_pool_flush", "ib_rdma_mr_8k_pool_wait",
	"ib_rdma_mr_8k_pool_depleted", "ib_rdma_mr_1m_alloc", "ib_rdma_mr_1m_free", "ib_rdma_mr_1m_used", "ib_rdma_mr_1m_pool_flush",
	"ib_rdma_mr_1m_pool_wait", "ib_rdma_mr_1m_pool_depleted", "ib_rdma_mr_8k_reused", "ib_rdma_mr_1m_reused",
	"ib_atomic_cswp", "ib_atomic_fadd",
}

// memoryPoolNames are those of them that the pools of registered memory count.
var memoryPoolNames = kernelNames[slices.Index(kernelNames[:], "ib_rdma_mr_8k_alloc") : slices.Index(kernelNames[:], "ib_rdma_mr_1m_reused")+1]

func kernelRank(name string) int {
	if i := slices.Index(kernelNames[:], name); i >= 0 {
		return i
	}
	return len(kernelNames)
}

// snake turns a field's name into a counter's: IBTxCQEvent into ib_tx_cq_event.
func snake(name string) string {
	var b strings.Builder
	rs := []rune(name)
	for i, r := range rs {
		if unicode.IsUpper(r) && i > 0 &&
			(unicode.IsLower(rs[i-1]) || i+1 < len(rs) && unicode.IsLower(rs[i+1])) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// SocketInfo describes a bound socket, as rds-info -k does (rds-protocol spec 6.1).
type SocketInfo struct {
	Local         Addr  `json:"local"`
	Connected     Addr  `json:"connected"` // default destination, zero if none
	SendBuffer    int64 `json:"send_buffer"`
	ReceiveBuffer int64 `json:"receive_buffer"`
	UnackedMsgs   int   `json:"unacked_msgs"`
	UnackedBytes  int64 `json:"unacked_bytes"`
	QueuedBytes   int64 `json:"queued_bytes"` // payload that nobody read yet
	Congested     bool  `json:"congested"`
	Loans         int64 `json:"loans"`
}

// Sockets lists the bound sockets by address and port.
func (svc *Service) Sockets() []SocketInfo {
	var list []SocketInfo
	svc.eachSocket(func(s *Socket) {
		in := SocketInfo{
			Local: s.Addr(), SendBuffer: s.sndbuf.Load(), ReceiveBuffer: s.rcvbuf.Load(),
			QueuedBytes: max(0, s.q.bytes.Load()), Congested: s.q.congested.Load(), Loans: s.loans.Load(),
		}
		in.UnackedMsgs, in.UnackedBytes = s.Unacknowledged()
		if d := s.dflt.Load(); d != nil {
			in.Connected = Addr{d.ap}
		}
		list = append(list, in)
	})
	slices.SortFunc(list, func(a, b SocketInfo) int { return a.Local.ap.Compare(b.Local.ap) })
	return list
}
