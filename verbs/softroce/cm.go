package softroce

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/openrds/openrds/verbs"
)

// The connection manager: the IB CM of rocev2 spec 7 with RDMA-CM's private data header.
//
// cm.go holds the manager, its queue and timers; cm_conn.go a connection and what both sides share;
// cm_active.go and cm_passive.go the two sides of establishment; cm_input.go what each message does;
// cm_message.go how ours look.
//
// # Who does what
//
// The engine hands MADs and notes (first packet on a QP, QP closed) to the manager's queue and goes;
// a worker goroutine, which exists only while the queue is not empty, takes them. Timers run on
// goroutines of their own. Connect and Accept move their QP through its states on the caller's
// goroutine. All of them meet at connManager.mu, which is never held across a call to the
// device, a QP or a user: what is to be sent, moved to ERR or woken is collected and carried
// out by unlock.
//
// Lock order: engine role (when held), connManager.mu, cmQueue.mu. The engine takes only the
// last.

// Limits and times of the connection manager. Those the peer sees are what Linux says (rocev2 spec
// 7.3, 7.8); the retransmission is earlier than Linux'.
const (
	cmMaxQueued      = 512  // MADs waiting for the worker; a kernel's QP 1 posts as many receives
	cmMaxPerSource   = 64   // passive handshakes in progress, per source address
	cmMaxPending     = 1024 // and in total; as many handlers run at most
	cmMaxLingering   = 4096 // passive connections in timewait
	cmMaxRetries     = 15   // of REQ and DREQ; on the wire, for the peer's REP
	cmFirstInterval  = 250 * time.Millisecond
	cmMaxInterval    = 6 * time.Second
	cmFirstRTURepeat = 50 * time.Millisecond // then doubling: the last after 1.55 s, before a kernel repeats its REP
	cmMaxRTURepeats  = 5
	cmResponseCode   = 20                // CM response timeouts of our REQ: 4.3 s
	cmMRACode        = 20                // service timeout of our MRA: we promise to answer, or MRA again, in 4.3 s
	cmMaxMRA         = 140 * time.Second // Linux asks for 68.7 s (code 24) and the ACK timeout
	cmTargetAckDelay = 15                // rxe's
	cmMinTimewait    = 250 * time.Millisecond
	cmMaxTimewait    = 10 * time.Second
	// An attempt given up lingers longer than timewait, to tell a peer whose REP or RTU comes late: a
	// kernel repeats its REP every 4.1 s.
	cmAbortLinger = 10 * time.Second
)

// cmHost is what the connection manager needs of its device. Its methods do not block and do not call
// back. sendMAD and releaseQPN are called with no lock of the manager held, and possibly still after
// the manager was closed.
type cmHost interface {
	// sendMAD queues a packet with mad, which it copies, from QP 1 to QP 1 of to. It may drop it.
	sendMAD(to netip.Addr, mad *[madBytes]byte)
	// localAddr is the device's address, which with guid never changes.
	localAddr() netip.Addr
	guid() uint64
	// pathMTU is the largest path MTU towards remote, 0 if the link carries none. Called with the
	// manager's lock held: it must not take the engine role.
	pathMTU(remote netip.Addr) verbs.MTU
	// releaseQPN gives back a QPN that qpClosed kept.
	releaseQPN(n verbs.QPN)
}

// connManager is the connection manager of one device. It has no goroutine while nothing happens.
type connManager struct {
	host   cmHost
	addr   netip.Addr // host's
	myGUID uint64     // host's
	stats  cmCounters
	q      cmQueue
	wg     sync.WaitGroup // worker, timers, handlers

	mu        sync.Mutex
	closed    bool
	rng       *rand.Rand
	agent     uint32                 // high half of our transaction IDs
	conns     map[uint32]*cmConn     // by our communication ID; all that are not idle
	byPeerID  map[cmPeerID]*cmConn   // those whose peer's communication ID is known
	byPeerQPN map[cmPeerQPN]*cmConn  // those whose peer's QPN is known, but in timewait
	listeners map[uint16]*cmListener // by port
	pending   map[netip.Addr]int     // passive handshakes in progress, by source
	nPending  int                    // and in total
	lingering int                    // passive connections in timewait
	fx        cmEffects
}

// cmPeerID names a connection as its peer does. The address is part of it, so that no other host can
// touch a connection by naming its GUID.
type cmPeerID struct {
	addr netip.Addr // without zone
	guid uint64
	id   uint32
}

// cmPeerQPN names a QP of a peer (stale connection detection).
type cmPeerQPN struct {
	addr netip.Addr // without zone
	guid uint64
	qpn  verbs.QPN
}

// cmEffects is what is to be done when the lock has been released, in this order.
type cmEffects struct {
	errs []verbs.QP // move to ERR
	done []*cmConn  // close the endpoint's Done: after its QP is on its way to ERR
	mads []cmMAD    // send
	qpns []verbs.QPN
}

// cmMAD is a MAD and the address that it came from or goes to.
type cmMAD struct {
	addr netip.Addr
	b    [madBytes]byte
}

// newConnManager makes the manager of host. rng is the manager's from now on: its source of
// communication IDs, PSNs and ports, so it should be hard to predict outside of tests.
func newConnManager(host cmHost, rng *rand.Rand) *connManager {
	m := &connManager{
		host: host, addr: host.localAddr(), myGUID: host.guid(), rng: rng, agent: rng.Uint32(),
		conns:     make(map[uint32]*cmConn),
		byPeerID:  make(map[cmPeerID]*cmConn),
		byPeerQPN: make(map[cmPeerQPN]*cmConn),
		listeners: make(map[uint16]*cmListener),
		pending:   make(map[netip.Addr]int),
	}
	m.q.qps = make(map[verbs.QPN]*cmHold)
	return m
}

// unlock releases m.mu and then does what was collected under it.
func (m *connManager) unlock() {
	fx := m.fx
	m.fx = cmEffects{}
	m.mu.Unlock()
	for _, qp := range fx.errs {
		qp.SetError()
	}
	for _, c := range fx.done {
		close(c.done)
	}
	for i := range fx.mads {
		m.stats.add(cmTxMADs)
		m.host.sendMAD(fx.mads[i].addr, &fx.mads[i].b)
	}
	for _, n := range fx.qpns {
		m.host.releaseQPN(n)
	}
}

// sendLocked has a copy of mad sent once the lock is released.
func (m *connManager) sendLocked(to netip.Addr, mad *[madBytes]byte) {
	m.fx.mads = append(m.fx.mads, cmMAD{to, *mad})
}

// sortedLocked is all connections in an order that does not depend on map iteration.
func (m *connManager) sortedLocked() []*cmConn {
	out := make([]*cmConn, 0, len(m.conns))
	for _, c := range m.conns {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *cmConn) int { return int(int64(a.id) - int64(b.id)) })
	return out
}

// listening is the number of listeners.
func (m *connManager) listening() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.listeners)
}

// close ends every connection and attempt, telling each peer once, and returns when no goroutine
// of the manager is left. The engine may still call in; it is not heard. May wait, for handlers
// too; not to be called from one.
func (m *connManager) close() {
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		// 1. Nothing new: the queue takes no more, timers are not armed, requests not accepted.
		m.q.close()
		clear(m.listeners)
		for _, c := range m.sortedLocked() {
			// 2. Each peer hears why. Whoever waits for a handshake is woken.
			m.abandonLocked(c, verbs.ErrClosed)
			// 3. Nobody will answer what comes in reply, so there is nothing to linger for.
			m.goneLocked(c)
		}
	}
	m.unlock()
	m.wg.Wait()
}

// cmQueue is what the engine leaves for the manager, and the QPs about which it leaves notes. Its
// lock is the innermost.
type cmQueue struct {
	mu      sync.Mutex
	closed  bool
	running bool      // the worker exists
	mads    []cmMAD   // at most cmMaxQueued
	notes   []*cmConn // with notes set; each at most once
	qps     map[verbs.QPN]*cmHold
}

// cmNotes are events that concern one connection.
type cmNotes uint8

const (
	noteCommEst    cmNotes = 1 << iota // first valid request packet on its QP
	noteQPClosed                       // its QP was closed by the user
	noteDisconnect                     // Endpoint.Disconnect
)

// cmHold keeps a QPN from being used again.
type cmHold struct {
	c      *cmConn // latest connection over the QP
	n      int     // connections that hold it
	closed bool    // the user closed the QP: the last hold releases the QPN
}

// input takes a MAD that came from address from. It copies b, is O(1), starts the worker where there
// is none, and drops and counts what is no MAD of ours or beyond cmMaxQueued. For the engine.
func (m *connManager) input(from netip.Addr, b []byte) {
	if !m.gsiCheck(b) {
		return
	}
	q := &m.q
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	if len(q.mads) >= cmMaxQueued {
		m.stats.add(cmQueueFull)
		return
	}
	q.mads = append(q.mads, cmMAD{addr: from.Unmap(), b: [madBytes]byte(b)})
	m.wakeQueueLocked()
}

// commEstablished says that the first valid request packet has arrived on QP n, which may be any.
// For the engine.
func (m *connManager) commEstablished(n verbs.QPN) {
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	if h := m.q.qps[n]; h != nil {
		m.noteQueueLocked(h.c, noteCommEst)
	}
}

// qpClosed says that the user closed QP n, which ends its connection. It reports whether the QPN must
// not be given to another QP before the manager calls releaseQPN (timewait, rocev2 spec 7.9). For any
// goroutine; takes no lock but the queue's.
func (m *connManager) qpClosed(n verbs.QPN) (held bool) {
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	h := m.q.qps[n]
	if h == nil {
		return false
	}
	h.closed = true
	m.noteQueueLocked(h.c, noteQPClosed)
	return true
}

func (m *connManager) noteQueueLocked(c *cmConn, n cmNotes) {
	if m.q.closed {
		return
	}
	if c.notes == 0 {
		m.q.notes = append(m.q.notes, c)
	}
	c.notes |= n
	m.wakeQueueLocked()
}

func (m *connManager) wakeQueueLocked() {
	if !m.q.running {
		m.q.running = true
		m.wg.Add(1)
		go m.work()
	}
}

// close stops the queue.
func (q *cmQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed, q.mads, q.notes = true, nil, nil
}

// work is the worker: it empties the queue and ends.
func (m *connManager) work() {
	defer m.wg.Done()
	q := &m.q
	type noted struct {
		c *cmConn
		n cmNotes
	}
	var notes []noted
	for {
		q.mu.Lock()
		mads := q.mads
		q.mads = nil
		for _, c := range q.notes {
			notes = append(notes, noted{c, c.notes})
			c.notes = 0
		}
		q.notes = q.notes[:0]
		if len(mads)+len(notes) == 0 {
			q.running = false
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		for i := range mads {
			m.mu.Lock()
			m.handleLocked(mads[i].addr, &mads[i].b)
			m.unlock()
		}
		for _, n := range notes {
			m.mu.Lock()
			m.noteLocked(n.c, n.n)
			m.unlock()
		}
		notes = notes[:0]
	}
}

// holdQPNLocked keeps c's QPN from being used again until unholdQPNLocked.
func (m *connManager) holdQPNLocked(c *cmConn) {
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	h := m.q.qps[c.qpn]
	if h == nil {
		h = new(cmHold)
		m.q.qps[c.qpn] = h
	}
	h.c = c
	h.n++
	c.held = true
}

func (m *connManager) unholdQPNLocked(c *cmConn) {
	if !c.held {
		return
	}
	c.held = false
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	h := m.q.qps[c.qpn]
	if h.n--; h.n > 0 {
		return
	}
	delete(m.q.qps, c.qpn)
	if h.closed {
		m.fx.qpns = append(m.fx.qpns, c.qpn)
	}
}

// armLocked has expiredLocked called for c after d, unless the timer is armed anew or disarmed
// before.
func (m *connManager) armLocked(c *cmConn, d time.Duration) {
	m.disarmLocked(c)
	if m.closed {
		return
	}
	gen := c.timerGen
	m.wg.Add(1)
	c.timer = time.AfterFunc(d, func() {
		defer m.wg.Done()
		m.mu.Lock()
		// A Stop that came too late left its mark in timerGen.
		if c.timerGen == gen {
			c.timer = nil
			m.expiredLocked(c)
		}
		m.unlock()
	})
}

func (m *connManager) disarmLocked(c *cmConn) {
	c.timerGen++
	if c.timer != nil && c.timer.Stop() {
		m.wg.Done()
	}
	c.timer = nil
}

// newIDLocked is a communication ID that no connection has. Random, so that whoever does not
// see the handshake cannot name the connection.
func (m *connManager) newIDLocked() uint32 {
	for {
		if id := m.rng.Uint32(); id != 0 && m.conns[id] == nil {
			return id
		}
	}
}
