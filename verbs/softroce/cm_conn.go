package softroce

import (
	"errors"
	"net/netip"
	"time"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// cmState is the state of a connection (rocev2 spec 7.10; the names are Linux').
//
//	active                         passive
//	             ┌─▶ mraReqRcvd                 ┌─▶ mraReqSent ──reject, REJ──▶ idle
//	          MRA│       │REP          dup REQ  │        │accept: QP to RTS, REP
//	connect      │       ▼             REQ      │        ▼
//	───REQ──▶ reqSent ─REP▶ repRcvd    ──▶ reqRcvd ──▶ repSent ─MRA▶ mraRepRcvd
//	                         │QP to RTS, RTU             │RTU or first data  │
//	                         └──────────▶ established ◀──┴───────────────────┘
//	                      disconnect, DREQ│        │DREQ: DREP, or REJ
//	                                      ▼        ▼
//	                                  dreqSent ─▶ timewait ──timer──▶ idle
//	                           DREP, DREQ, timeout
//
// An attempt given up after REQ or REP went out lingers in timewait too and repeats its REJ to a peer
// that did not hear it.
type cmState uint8

const (
	cmIdle cmState = iota // not in any table
	cmReqSent
	cmMRAReqRcvd
	cmRepRcvd
	cmReqRcvd
	cmMRAReqSent
	cmRepSent
	cmMRARepRcvd
	cmEstab
	cmDreqSent
	cmTimewait
)

func (s cmState) String() string {
	return [...]string{"IDLE", "REQ_SENT", "MRA_REQ_RCVD", "REP_RCVD", "REQ_RCVD", "MRA_REQ_SENT", "REP_SENT", "MRA_REP_RCVD",
		"ESTABLISHED", "DREQ_SENT", "TIMEWAIT"}[s]
}

// cmConn is a connection, from REQ to the end of timewait. It is the verbs.Endpoint.
type cmConn struct {
	m      *connManager
	active bool
	id     uint32 // our communication ID
	local  netip.AddrPort
	remote netip.AddrPort
	answer chan struct{} // closed when Connect or Accept has something to look at
	done   chan struct{} // closed when an established connection has ended

	// Guarded by m.q.mu.
	notes      cmNotes
	disconnect bool // Disconnect or Abandon was called
	quiet      bool // the peer is not told of the end

	// Everything below is guarded by m.mu. qp and qpn do not change after REQ or REP was sent.
	state    cmState
	qp       verbs.QP // nil on the passive side before Accept
	qpn      verbs.QPN
	held     bool // holds qpn
	qpGone   bool // the user has closed qp, or moves it to ERR itself
	tid      uint64
	timewait time.Duration
	ackDelay time.Duration // ms(ACK timeout), what an MRA's time is extended by

	havePeer bool // the peer's communication ID, GUID and QPN are known
	peerID   uint32
	info     verbs.Connected // what the peer said

	out      [madBytes]byte // last message of ours, as retransmitted
	aborted  bool           // timewait: out is a REJ, to be repeated when REP or RTU comes late
	tries    int            // retransmissions of out
	maxTries int
	interval time.Duration // before the next one
	timer    *time.Timer
	timerGen uint64

	heard    bool  // the peer has sent a request on our QP: established for it, too
	err      error // why there is no connection
	woken    bool  // answer is closed
	wasEstab bool

	// Active side.
	rep     cmwire.REP
	mtuHint verbs.MTU // with a REJ 26: what the peer would take; 0 unknown

	// Passive side.
	listener  *cmListener
	req       cmwire.REQ
	slot      bool // counts in m.pending
	delivered bool // the handler has been called
	returned  bool // and has returned
	answering bool // in Accept
}

// newConnLocked makes a connection and enters it by a new communication ID.
func (m *connManager) newConnLocked(active bool, local, remote netip.AddrPort) *cmConn {
	c := &cmConn{
		m: m, active: active, id: m.newIDLocked(), local: local, remote: remote,
		answer: make(chan struct{}), done: make(chan struct{}),
	}
	m.conns[c.id] = c
	return c
}

// Local implements verbs.Endpoint.
func (c *cmConn) Local() netip.AddrPort { return c.local }

// Remote implements verbs.Endpoint.
func (c *cmConn) Remote() netip.AddrPort { return c.remote }

// Abandon implements verbs.Abandoner.
func (c *cmConn) Abandon() error {
	q := &c.m.q
	q.mu.Lock()
	c.quiet = c.quiet || !c.disconnect
	q.mu.Unlock()
	return c.Disconnect()
}

func (c *cmConn) isQuiet() bool {
	c.m.q.mu.Lock()
	defer c.m.q.mu.Unlock()
	return c.quiet
}

// Done implements verbs.Endpoint.
func (c *cmConn) Done() <-chan struct{} { return c.done }

// Disconnect implements verbs.Endpoint. The QP is on its way to ERR when it returns; the rest is the
// worker's.
func (c *cmConn) Disconnect() error {
	q := &c.m.q
	q.mu.Lock()
	first := !c.disconnect && !q.closed
	c.disconnect = true
	q.mu.Unlock()
	select {
	case <-c.done:
		return nil // the QP may serve another connection by now
	default:
	}
	if first {
		c.qp.SetError()
		q.mu.Lock()
		c.m.noteQueueLocked(c, noteDisconnect)
		q.mu.Unlock()
	}
	return nil
}

// transmitLocked sends c.out and has it repeated until the state changes: at 250 ms, doubling to 6 s,
// maxTries times (rocev2 spec 7.8).
func (m *connManager) transmitLocked(c *cmConn) {
	c.tries, c.interval = 0, cmFirstInterval
	m.sendLocked(c.remote.Addr(), &c.out)
	m.armRetryLocked(c)
}

// armRetryLocked waits the current interval; after the last transmission as long as Linux would.
func (m *connManager) armRetryLocked(c *cmConn) {
	d := c.interval
	if c.tries >= c.maxTries {
		d = cmMaxInterval
	}
	m.armLocked(c, d)
}

// expiredLocked is the timer of c.
func (m *connManager) expiredLocked(c *cmConn) {
	switch c.state {
	case cmMRAReqRcvd:
		c.state = cmReqSent // each transmission may be answered by one MRA
	case cmMRARepRcvd:
		c.state = cmRepSent
	case cmTimewait:
		m.goneLocked(c)
		return
	case cmEstab:
		m.stats.add(cmRTURepeats)
		m.sendLocked(c.remote.Addr(), &c.out)
		if c.tries++; c.tries < cmMaxRTURepeats {
			c.interval *= 2
			m.armLocked(c, c.interval)
		}
		return
	}
	if c.tries < c.maxTries {
		c.tries++
		c.interval = min(2*c.interval, cmMaxInterval)
		m.stats.add(cmRetransmits)
		m.sendLocked(c.remote.Addr(), &c.out)
		m.armRetryLocked(c)
		return
	}
	m.stats.add(cmTimeouts)
	if c.state == cmDreqSent {
		m.lingerLocked(c, c.timewait)
		return
	}
	m.abandonLocked(c, verbs.ErrUnreachable)
}

// postponeLocked is an MRA: the next transmission waits for the time the peer asked for, which is
// bounded, since it comes from the network.
func (m *connManager) postponeLocked(c *cmConn, serviceTimeout uint8) {
	m.armLocked(c, min(cmwire.Timeout(serviceTimeout)+c.ackDelay, cmMaxMRA))
}

// setTimes derives what depends on the local ACK timeout of the REQ.
func (c *cmConn) setTimes(ackTimeout uint8) {
	c.timewait = min(max(verbs.AckTimeoutDuration(ackTimeout), cmMinTimewait), cmMaxTimewait)
	c.ackDelay = cmwire.Timeout(ackTimeout)
}

// meetPeerLocked enters what a REQ or REP said of its sender.
func (m *connManager) meetPeerLocked(c *cmConn, id uint32, guid uint64, qpn verbs.QPN) {
	c.havePeer, c.peerID = true, id
	c.info.PeerGUID, c.info.PeerQPN = guid, qpn
	m.byPeerID[c.peerIDKey()] = c
	m.byPeerQPN[c.peerQPNKey()] = c
}

func (c *cmConn) peerIDKey() cmPeerID {
	return cmPeerID{c.remote.Addr().WithZone(""), c.info.PeerGUID, c.peerID}
}

func (c *cmConn) peerQPNKey() cmPeerQPN {
	return cmPeerQPN{c.remote.Addr().WithZone(""), c.info.PeerGUID, c.info.PeerQPN}
}

func (m *connManager) forgetPeerQPNLocked(c *cmConn) {
	if k := c.peerQPNKey(); c.havePeer && m.byPeerQPN[k] == c {
		delete(m.byPeerQPN, k)
	}
}

// wakeLocked lets Connect or Accept look.
func (c *cmConn) wakeLocked() {
	if !c.woken {
		c.woken = true
		close(c.answer)
	}
}

// failLocked records why the attempt has no connection.
func (c *cmConn) failLocked(err error) {
	if c.err == nil && !c.wasEstab {
		c.err = err
	}
	c.wakeLocked()
}

// enterEstablishedLocked: from REP_RCVD with the RTU, from REP_SENT by RTU or data.
//
// The RTU is not acknowledged, and a kernel whose application waits for it repeats its REP after 4.1 s only, taking
// nothing else for it. So an active side that hears nothing repeats it a few times; whoever has it ignores the
// next. An ACK is no sign that it has arrived, a request is: the passive side's QP answers before its application
// may know.
func (m *connManager) enterEstablishedLocked(c *cmConn) {
	m.disarmLocked(c)
	c.state, c.wasEstab = cmEstab, true
	m.stats.add(cmEstablished)
	m.dropSlotLocked(c)
	c.wakeLocked()
	if c.active && !c.heard {
		c.tries, c.interval = 0, cmFirstRTURepeat
		m.armLocked(c, c.interval)
	}
}

// endLocked is the end of an established connection for its user: QP to ERR, Done closed.
func (m *connManager) endLocked(c *cmConn) {
	m.stats.add(cmDisconnected)
	if !c.qpGone {
		c.qpGone = true
		m.fx.errs = append(m.fx.errs, c.qp)
	}
	m.fx.done = append(m.fx.done, c)
}

// enterDreqSentLocked disconnects an established connection.
func (m *connManager) enterDreqSentLocked(c *cmConn) {
	m.endLocked(c)
	m.forgetPeerQPNLocked(c)
	c.state = cmDreqSent
	c.maxTries = cmMaxRetries
	m.putDREQLocked(c)
	m.transmitLocked(c)
}

// lingerLocked enters timewait for d: the QPN is not used again before, and a late message of the
// peer is answered. The peer may use its QPN again at once.
func (m *connManager) lingerLocked(c *cmConn, d time.Duration) {
	m.forgetPeerQPNLocked(c)
	c.state = cmTimewait
	if !c.active {
		m.lingering++
		if c.returned {
			m.dropSlotLocked(c)
		}
	}
	m.armLocked(c, d)
}

// goneLocked forgets the connection.
func (m *connManager) goneLocked(c *cmConn) {
	m.disarmLocked(c)
	if c.state == cmIdle {
		return
	}
	if c.state == cmTimewait && !c.active {
		m.lingering--
	}
	c.state = cmIdle
	delete(m.conns, c.id)
	m.forgetPeerQPNLocked(c)
	if k := c.peerIDKey(); c.havePeer && m.byPeerID[k] == c {
		delete(m.byPeerID, k)
	}
	m.unholdQPNLocked(c)
	if c.returned {
		m.dropSlotLocked(c)
	}
}

// dropSlotLocked gives back the place of a passive handshake. It is kept until the connection is
// established, or is not and its handler has returned: what a source can make us run is bounded.
func (m *connManager) dropSlotLocked(c *cmConn) {
	if !c.slot {
		return
	}
	c.slot = false
	m.nPending--
	src := c.remote.Addr().WithZone("")
	if m.pending[src]--; m.pending[src] == 0 {
		delete(m.pending, src)
	}
}

// abandonLocked gives c up from our side, for err, and tells the peer what its state calls for: in a
// handshake a REJ (rocev2 spec 7.10; which, is what Linux does when an ID in that state is destroyed), else a DREQ,
// unless the user wants none.
func (m *connManager) abandonLocked(c *cmConn, err error) {
	switch c.state {
	case cmIdle, cmDreqSent, cmTimewait:
		return
	case cmEstab:
		if c.isQuiet() {
			m.endLocked(c)
			m.lingerLocked(c, c.timewait)
			return
		}
		m.enterDreqSentLocked(c)
		return
	case cmReqSent, cmMRAReqRcvd:
		m.putREJLocked(c, cmwire.ForOther, cmwire.RejTimeout, nil)
	case cmRepRcvd:
		m.putREJLocked(c, cmwire.ForREP, cmwire.RejConsumer, nil)
	case cmReqRcvd, cmMRAReqSent:
		m.putREJLocked(c, cmwire.ForREQ, cmwire.RejConsumer, nil)
	case cmRepSent, cmMRARepRcvd:
		m.putREJLocked(c, cmwire.ForOther, cmwire.RejConsumer, nil)
	}
	m.sendLocked(c.remote.Addr(), &c.out)
	c.failLocked(err)
	if c.state == cmReqRcvd || c.state == cmMRAReqSent {
		m.goneLocked(c) // no QPN of ours went out
		return
	}
	c.aborted = true
	m.lingerLocked(c, cmAbortLinger)
}

// noteLocked handles what the engine or a user left for c.
func (m *connManager) noteLocked(c *cmConn, n cmNotes) {
	if n&noteCommEst != 0 && c.active && !c.heard {
		c.heard = true
		if c.state == cmEstab {
			m.disarmLocked(c)
		}
	}
	if n&noteCommEst != 0 && (c.state == cmRepSent || c.state == cmMRARepRcvd) {
		m.stats.add(cmCommEst)
		m.enterEstablishedLocked(c)
	}
	if n&(noteQPClosed|noteDisconnect) != 0 {
		c.qpGone = true
		m.abandonLocked(c, verbs.ErrClosed)
	}
}

// Moves of the QP (rocev2 spec 5.2, 7.6). They run on the goroutine of Connect or Accept, with no lock
// held.

// qpToInit takes qp from RESET to INIT. served is how many READs and atomics it will serve.
func qpToInit(qp verbs.QP, served uint8) error {
	if s := qp.State(); s != verbs.StateReset {
		return &verbs.StateError{From: s, To: verbs.StateInit}
	}
	access := verbs.AccessRemoteWrite
	if served != 0 {
		access |= verbs.AccessRemoteRead | verbs.AccessRemoteAtomic
	}
	return qp.Modify(verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: access},
		verbs.QPStateBit|verbs.QPPKeyIndexBit|verbs.QPPortBit|verbs.QPAccessBit)
}

// qpToRTS takes qp from INIT through RTR to RTS with the attributes in a. peerRNR is the RNR retry count that the
// peer's QP has from us.
func qpToRTS(qp verbs.QP, a verbs.QPAttr, peerRNR uint8) error {
	if q, ok := qp.(interface{ setPeerRNRRetry(uint8) }); ok {
		q.setPeerRNRRetry(peerRNR)
	}
	a.State = verbs.StateRTR
	err := qp.Modify(a, verbs.QPStateBit|verbs.QPAHBit|verbs.QPPathMTUBit|verbs.QPDestQPNBit|verbs.QPRQPSNBit|
		verbs.QPMaxDestRDAtomicBit|verbs.QPMinRNRTimerBit)
	if err != nil {
		return err
	}
	a.State = verbs.StateRTS
	return qp.Modify(a, verbs.QPStateBit|verbs.QPTimeoutBit|verbs.QPRetryCountBit|verbs.QPRNRRetryBit|verbs.QPSQPSNBit|
		verbs.QPMaxRDAtomicBit)
}

// qpFail moves a QP whose connection did not come about to ERR, unless it is in RESET still.
func qpFail(qp verbs.QP) {
	if qp.State() != verbs.StateReset {
		// The only error is that the user closed or reset it meanwhile, and then there is nothing to do.
		_ = qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit)
	}
}

var (
	errPeerLeft = errors.New("peer disconnected during the handshake")
	errStaleQPN = errors.New("peer answers with the QP of another connection")
)
