package conn

import "go.uber.org/atomic"

// counters are the Manager's. Data path counters are added to once per batch; send_queued is kept per
// connection, under its lock, and summed up by Stats.
type counters struct {
	connReset         atomic.Uint64
	recvBadChecksum   atomic.Uint64
	recvOldSeq        atomic.Uint64
	recvAckRequired   atomic.Uint64
	recvPing          atomic.Uint64
	sendAckRequired   atomic.Uint64
	sendPong          atomic.Uint64
	congQueued        atomic.Uint64
	congReceived      atomic.Uint64
	connectRaced      atomic.Uint64
	listenStale       atomic.Uint64
	txRingFull        atomic.Uint64
	rxCredits         atomic.Uint64
	ackSent           atomic.Uint64
	ackPiggybacked    atomic.Uint64
	ackDelayed        atomic.Uint64
	ackReceived       atomic.Uint64
	recvMessages      atomic.Uint64
	recvBytes         atomic.Uint64
	recvSends         atomic.Uint64
	sendMessages      atomic.Uint64
	sendBytes         atomic.Uint64
	sendSends         atomic.Uint64
	sendRetransmit    atomic.Uint64
	sendAcked         atomic.Uint64
	sendCancelled     atomic.Uint64
	sendAbandoned     atomic.Uint64
	sendNoMemory      atomic.Uint64
	sendRDMA          atomic.Uint64
	sendRDMABytes     atomic.Uint64
	recvRDMABytes     atomic.Uint64
	atomicCswp        atomic.Uint64
	atomicFadd        atomic.Uint64
	rdmaFailed        [RDMAOther + 1]atomic.Uint64 // by status
	recvGap           atomic.Uint64
	recvBadFragment   atomic.Uint64
	recvBadAck        atomic.Uint64
	recvRefused       atomic.Uint64
	recvEarlyDropped  atomic.Uint64
	pongDropped       atomic.Uint64
	mapBadLength      atomic.Uint64
	congDeltas        atomic.Uint64 // received
	congDeltasSent    atomic.Uint64
	peerRestarted     atomic.Uint64
	strayConnects     atomic.Uint64
	peersDown         atomic.Uint64
	connectAttempts   atomic.Uint64
	connectFailed     atomic.Uint64
	connectRejected   atomic.Uint64
	acceptRejected    atomic.Uint64
	acceptBadPrivate  atomic.Uint64
	requestsLate      atomic.Uint64
	requestsTooMany   atomic.Uint64
	connsRetired      atomic.Uint64
	established       atomic.Uint64
	heartbeatsSent    atomic.Uint64
	heartbeatTimeouts atomic.Uint64
	pingsRefused      atomic.Uint64
	devicesLost       atomic.Uint64
	devicesBack       atomic.Uint64
}

// Stats is a snapshot of the counters.
func (m *Manager) Stats() Stats {
	k := &m.count
	s := Stats{
		ConnReset:            k.connReset.Load(),
		RecvDropBadChecksum:  k.recvBadChecksum.Load(),
		RecvDropOldSeq:       k.recvOldSeq.Load(),
		RecvAckRequired:      k.recvAckRequired.Load(),
		RecvPing:             k.recvPing.Load(),
		SendAckRequired:      k.sendAckRequired.Load(),
		SendPong:             k.sendPong.Load(),
		CongUpdateQueued:     k.congQueued.Load(),
		CongUpdateReceived:   k.congReceived.Load(),
		IBConnectRaced:       k.connectRaced.Load(),
		IBListenClosedStale:  k.listenStale.Load(),
		IBTxRingFull:         k.txRingFull.Load(),
		IBRxCreditUpdates:    k.rxCredits.Load(),
		IBAckSent:            k.ackSent.Load(),
		IBAckSendPiggybacked: k.ackPiggybacked.Load(),
		IBAckSendDelayed:     k.ackDelayed.Load(),
		IBAckReceived:        k.ackReceived.Load(),
		RecvMessages:         k.recvMessages.Load(),
		RecvBytes:            k.recvBytes.Load(),
		RecvSends:            k.recvSends.Load(),
		SendMessages:         k.sendMessages.Load(),
		SendBytes:            k.sendBytes.Load(),
		SendSends:            k.sendSends.Load(),
		SendRetransmit:       k.sendRetransmit.Load(),
		SendAcked:            k.sendAcked.Load(),
		SendCancelled:        k.sendCancelled.Load(),
		SendAbandoned:        k.sendAbandoned.Load(),
		SendNoMemory:         k.sendNoMemory.Load(),
		SendRDMA:             k.sendRDMA.Load(),
		SendRDMABytes:        k.sendRDMABytes.Load(),
		RecvRDMABytes:        k.recvRDMABytes.Load(),
		IBAtomicCswp:         k.atomicCswp.Load(),
		IBAtomicFadd:         k.atomicFadd.Load(),
		RDMARemoteErrors:     k.rdmaFailed[RDMARemoteError].Load(),
		RDMADropped:          k.rdmaFailed[RDMADropped].Load(),
		RDMACancelled:        k.rdmaFailed[RDMACancelled].Load(),
		RDMAOtherErrors:      k.rdmaFailed[RDMAOther].Load(),
		RecvSeqGap:           k.recvGap.Load(),
		RecvBadFragment:      k.recvBadFragment.Load(),
		RecvBadAck:           k.recvBadAck.Load(),
		RecvStale:            m.linkStats.Stale.Load(),
		RecvRefused:          k.recvRefused.Load(),
		RecvEarlyDropped:     k.recvEarlyDropped.Load(),
		RecvPongDropped:      k.pongDropped.Load(),
		RecvMapBadLength:     k.mapBadLength.Load(),
		CongDeltaSent:        k.congDeltasSent.Load(),
		CongDeltaReceived:    k.congDeltas.Load(),
		PeerRestarted:        k.peerRestarted.Load(),
		StrayConnects:        k.strayConnects.Load(),
		PeersDown:            k.peersDown.Load(),
		ConnectAttempts:      k.connectAttempts.Load(),
		ConnectFailed:        k.connectFailed.Load(),
		ConnectRejected:      k.connectRejected.Load(),
		AcceptRejected:       k.acceptRejected.Load(),
		AcceptBadPrivate:     k.acceptBadPrivate.Load(),
		AcceptLate:           k.requestsLate.Load(),
		AcceptTooMany:        k.requestsTooMany.Load(),
		ConnsRetired:         k.connsRetired.Load(),
		Established:          k.established.Load(),
		DrainTimeouts:        m.linkStats.DrainTimeouts.Load(),
		HeartbeatsSent:       k.heartbeatsSent.Load(),
		HeartbeatTimeouts:    k.heartbeatTimeouts.Load(),
		PingRefused:          k.pingsRefused.Load(),
		DevicesLost:          k.devicesLost.Load(),
		DevicesBack:          k.devicesBack.Load(),
	}
	m.mu.RLock()
	s.TracesForgotten = m.traces.forgot
	m.mu.RUnlock()
	s.SlabBytes = uint64(m.cfg.Slab.Mapped())
	s.IBTxCQEvent, s.IBRxCQEvent = m.cfg.Registry.Completions()
	for _, c := range m.conns() {
		c.mu.Lock()
		s.SendQueued += c.sendQueued
		s.SendLockContention += c.contention
		s.Conns++
		if c.state.load() == Up {
			s.ConnsUp++
		}
		c.mu.Unlock()
	}
	return s
}
