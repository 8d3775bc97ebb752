package conn

import (
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/atomic"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// Manager holds the connections of a Service. Make one with NewManager. Methods are safe for
// concurrent use.
type Manager struct {
	cfg       Config
	log       hclog.Logger
	inc       uint64 // our incarnation
	count     counters
	linkStats ib.Stats
	sendMem   memBudget
	tracing   atomic.Int32 // TraceReceive, calls of
	maxPieces int          // of an operation: what fits into the smaller ring

	rngMu sync.Mutex
	rng   *rand.Rand

	mu       sync.RWMutex
	byKey    map[key]*Conn
	peers    map[pair]*Peer
	sites    map[netip.Addr]*site
	scratch  map[*ibdev.Device]*rxScratch
	links    uint32 // incarnations so far
	traces   traces
	reaper   *time.Timer // made when a peer asks for a connection
	reaping  bool        // it runs
	closed   bool        // no new connections, no requests
	closeErr error
	abandon  int

	ctx   context.Context // ends with done
	end   func()
	done  chan struct{} // closed when Close has begun to tear down
	ended chan struct{} // closed when it is through
	wg    sync.WaitGroup
}

type key struct {
	local, remote netip.Addr
	tos           uint8
}

type pair struct{ local, remote netip.Addr }

func (c Config) withDefaults() Config {
	dur := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	num := func(v *int, n int) {
		if *v == 0 {
			*v = n
		}
	}
	dur(&c.BackoffMin, time.Millisecond)
	dur(&c.BackoffMax, time.Second)
	dur(&c.ConnectTimeout, 2*time.Second)
	dur(&c.DrainTimeout, 5*time.Second)
	dur(&c.DeadAfter, 10*time.Second)
	dur(&c.AckDelay, 10*time.Millisecond)
	dur(&c.HeartbeatIdle, c.DeadAfter/4)
	if c.HeartbeatIdle > 0 {
		c.HeartbeatIdle = min(c.HeartbeatIdle, c.DeadAfter/4)
	}
	dur(&c.IdleTimeout, 10*time.Minute)
	num(&c.MaxConns, 65536)
	num(&c.MaxConnsPerPeer, 64)
	num(&c.MaxQueuedPerConn, 1<<20)
	num(&c.SendRing, 64)
	if c.SendMemory == 0 {
		c.SendMemory = slab.DefaultMaxBytes / 2
	}
	num(&c.KernelSendRing, 256)
	c.SendRing, c.KernelSendRing = ringSize(c.SendRing, 256), ringSize(c.KernelSendRing, 1024)
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.FirstSequence == nil {
		c.FirstSequence = func() uint64 { return uint64(time.Now().UnixNano()) }
	}
	return c
}

// ringSize is the power of two between twice the reserved slots and most that holds n.
func ringSize(n, most int) int {
	r := 2 * (reservedSlots + 1)
	for r < n && r < most {
		r *= 2
	}
	return r
}

// NewManager returns a Manager without connections. Registry, Slab and Sink are required.
func NewManager(cfg Config) *Manager {
	cfg = cfg.withDefaults()
	m := &Manager{
		cfg: cfg, log: cfg.Logger, inc: cfg.Incarnation,
		byKey: make(map[key]*Conn), peers: make(map[pair]*Peer), sites: make(map[netip.Addr]*site),
		scratch: make(map[*ibdev.Device]*rxScratch), done: make(chan struct{}), ended: make(chan struct{}),
	}
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	m.rng = rand.New(rand.NewPCG(cfg.Seed, 0))
	m.ctx, m.end = context.WithCancel(context.Background())
	m.sendMem.limit = cfg.SendMemory
	m.maxPieces = min(MaxRDMAPieces, ib.MaxOpSGE*(min(cfg.SendRing, cfg.KernelSendRing)-reservedSlots))
	for m.inc == 0 {
		var b [8]byte
		_, _ = crand.Read(b[:]) // never fails
		m.inc = binary.LittleEndian.Uint64(b[:])
	}
	return m
}

// upTo is a random delay below most.
func (m *Manager) upTo(most time.Duration) time.Duration {
	m.rngMu.Lock()
	defer m.rngMu.Unlock()
	return time.Duration(m.rng.Int64N(int64(most)))
}

// Incarnation tells this Manager from others at the same addresses.
func (m *Manager) Incarnation() uint64 { return m.inc }

// mark is what we say about ourselves on l. Control side, or mu held.
func (c *Conn) mark(l *ib.Link) rdshdr.Mark {
	return rdshdr.Mark{Incarnation: c.m.inc, MaxSend: uint32(l.Recv().Bytes()), Window: uint32(l.Device().Attr().RecvWindow),
		Flags: rdshdr.FlagDeltas, Attempt: c.ctl.tries}
}

// Listen opens the device of local and accepts connections there from now on. Nil if it does
// already. Errors: ErrNoDevice, ErrClosed, the provider's. May wait.
func (m *Manager) Listen(local netip.Addr) error {
	s, err := m.site(local.Unmap())
	if err != nil {
		return err
	}
	return s.listen(context.Background())
}

// site finds or makes the site of an address.
func (m *Manager) site(local netip.Addr) (*site, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.siteLocked(local)
}

func (m *Manager) siteLocked(local netip.Addr) (*site, error) {
	if m.closed {
		return nil, ErrClosed
	}
	s := m.sites[local]
	if s == nil {
		s = &site{m: m, addr: local, open: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
		m.sites[local] = s
	}
	return s, nil
}

// Get returns the connection from local to remote for a type of service, in state down if it did not
// exist; the first Send connects it. The same *Conn every time. Errors: ErrTooManyConns, ErrClosed, ErrSelf.
func (m *Manager) Get(local, remote netip.Addr, tos uint8) (*Conn, error) {
	k := key{local, remote, tos}
	m.mu.RLock()
	c := m.byKey[k]
	m.mu.RUnlock()
	if c != nil && c.named.Load() { // once it is, it stays
		return c, nil
	}
	return m.create(key{local.Unmap(), remote.Unmap(), tos}, true)
}

// create finds or makes a connection. named says that somebody here asked for it, not only a peer.
func (m *Manager) create(k key, named bool) (*Conn, error) {
	if k.local == k.remote {
		return nil, ErrSelf
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.byKey[k]; c != nil {
		if named && !c.named.Swap(true) {
			c.peer.asked--
		}
		return c, nil
	}
	s, err := m.siteLocked(k.local)
	if err != nil {
		return nil, err
	}
	p := m.peers[pair{k.local, k.remote}]
	switch {
	case len(m.byKey) >= m.cfg.MaxConns:
		return nil, ErrTooManyConns
	case !named && p != nil && p.asked >= m.cfg.MaxConnsPerPeer:
		return nil, ErrTooManyConns
	}
	if p == nil {
		p = &Peer{m: m, local: k.local, remote: k.remote}
		m.peers[pair{k.local, k.remote}] = p
	}
	p.conns++
	c := &Conn{m: m, site: s, peer: p, local: k.local, remote: k.remote, tos: k.tos}
	c.q.init(m.cfg.Slab, &m.sendMem, m.cfg.MaxQueuedPerConn, m.cfg.FirstSequence())
	c.asked = c.q.una
	c.ctl.wake = make(chan struct{}, 1)
	c.ctl.tries = uint16(m.inc) // any number: another process's are others
	c.rx.pongs.tokens = pongBurst
	c.rx.peerInc, c.rx.expected = m.traces.take(k)
	c.rx.expectedSeen.Store(c.rx.expected)
	p.inc.CompareAndSwap(0, c.rx.peerInc)
	c.named.Store(named)
	if !named {
		p.asked++
		m.reapLocked()
	}
	m.byKey[k] = c
	s.mu.Lock()
	s.conns = append(s.conns, c)
	s.mu.Unlock()
	return c, nil
}

// Conns are the connections of this moment, in no order.
func (m *Manager) Conns() []*Conn { return m.conns() }

func (m *Manager) conns() []*Conn {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := make([]*Conn, 0, len(m.byKey))
	for _, c := range m.byKey {
		out = append(out, c)
	}
	return out
}

func (m *Manager) isClosed() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.closed
}

// Snapshot describes all connections, in no order.
func (m *Manager) Snapshot() []Info {
	conns := m.conns()
	out := make([]Info, 0, len(conns))
	for _, c := range conns {
		out = append(out, c.Info())
	}
	return out
}

// TraceReceive has arriving datagrams stamped (Ext.Seen, Ext.Start) from the first call with true on until there were as many
// with false. A reading of the clock per datagram is what it costs.
func (m *Manager) TraceReceive(on bool) {
	if on {
		m.tracing.Inc()
	} else {
		m.tracing.Dec()
	}
}

// SetCongested sets or clears the bit of port in the congestion map of local. Every connection of the
// address tells its peer: those at once whose peers have sent to the port lately, the others soon; several changes go out as
// one. It does not wait.
func (m *Manager) SetCongested(local netip.Addr, port uint16, on bool) {
	m.mu.RLock()
	s := m.sites[local]
	closed := m.closed
	m.mu.RUnlock()
	if s == nil && !closed {
		s, _ = m.site(local.Unmap())
	}
	if s != nil {
		s.setCongested(port, on)
	}
}

// Progress does what is due on the devices, on the caller's goroutine: see verbs.Progresser. Whoever
// is about to wait for a message calls it first, with no lock held.
func (m *Manager) Progress() bool { return m.cfg.Registry.Progress() }

// Park is called by a caller of Progress that is about to sleep: see verbs.Progresser.
func (m *Manager) Park() { m.cfg.Registry.Park() }

// scratchFor is where the receive handler of d gathers messages.
func (m *Manager) scratchFor(d *ibdev.Device) *rxScratch {
	m.mu.Lock()
	s, old := m.scratch[d]
	if !old {
		s = new(rxScratch)
		m.scratch[d] = s
	}
	m.mu.Unlock()
	if !old {
		// Links that have it keep it.
		d.OnRemove(func() {
			m.mu.Lock()
			delete(m.scratch, d)
			m.mu.Unlock()
		})
	}
	return s
}

func (m *Manager) linkNumber() uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.links++
	return m.links
}

// Close lingers until every queue is empty or ctx is done, then ends all connections. It returns how
// many messages were abandoned; their owners have been told. The devices and the slab remain
// their owner's. The second call waits for the first and returns the same.
func (m *Manager) Close(ctx context.Context) (abandoned int, err error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		<-m.ended
		return m.abandon, m.closeErr
	}
	// 1. Refuse new work: no Get, no Listen. Send still works on connections that somebody holds, and
	// those are what the linger is for.
	m.closed = true
	if m.reaper != nil {
		m.reaper.Stop()
	}
	sites := make([]*site, 0, len(m.sites))
	for _, s := range m.sites {
		sites = append(sites, s)
	}
	m.mu.Unlock()
	conns := m.conns()
	// 2. Linger. Peers may still connect to fetch what is queued for them, and have their messages
	// acknowledged.
	moment := time.Now().Add(lingerLeast)
	for _, c := range conns {
		c.linger(ctx, moment)
	}
	// 3. No more requests, and none in progress.
	close(m.done)
	m.end()
	var errs []error
	for _, s := range sites {
		errs = append(errs, s.close())
	}
	// 4. End the connections, side by side: each sends its last acknowledgement, drains its QP and drops what is left. It
	// waits for completions and for copies in progress, not for peers.
	var wg sync.WaitGroup
	limit := make(chan struct{}, 64)
	var mu sync.Mutex
	for _, c := range conns {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			n := c.close()
			mu.Lock()
			m.abandon += n
			mu.Unlock()
		})
	}
	wg.Wait()
	m.count.sendAbandoned.Add(uint64(m.abandon))
	// 5. Pushers of congestion maps find nothing to push to.
	for _, s := range sites {
		s.stop()
	}
	m.wg.Wait()
	// 6. What the addresses hold: devices, maps.
	for _, s := range sites {
		s.release()
	}
	m.closeErr = errors.Join(errs...)
	close(m.ended)
	return m.abandon, m.closeErr
}

// linger waits until everything written is acknowledged, or ctx is done, and what we have received too; for that there is
// time until moment in any case.
func (c *Conn) linger(ctx context.Context, moment time.Time) {
	c.mu.Lock()
	if c.q.owes() {
		wait := make(chan struct{})
		c.ctl.drained = wait
		c.flush = true
		if !c.up {
			c.kickLocked()
		}
		c.transmitLocked()
		select {
		case <-wait:
		case <-ctx.Done():
		}
		c.mu.Lock()
	}
	if l := c.link; l != nil {
		// Whoever reads a message may close before the handler that brought it has noted that it is to be acknowledged.
		c.mu.Unlock()
		l.InRecv(func() {})
		c.mu.Lock()
	}
	// The last acknowledgement on its way saves the peer from sending again what we had. It may have to wait: for another
	// transmitter, for room, or, if data came before the handshake was through, for the connection.
	for range lingerLooks {
		owed := c.ackNext != c.ackSent
		if owed && c.up {
			c.ackNow = true
		}
		owed = owed && (c.up || c.state.load() == Connecting)
		l := c.link
		c.transmitLocked()
		if !owed && (l == nil || l.InFlight() == 0) || ctx.Err() != nil && time.Now().After(moment) {
			return
		}
		time.Sleep(lingerPause)
		c.mu.Lock()
	}
	c.mu.Unlock()
}

const (
	lingerPause = time.Millisecond
	lingerLooks = 500
	// lingerLeast is for acknowledgements of who has no time to linger: what its peers have sent again, and connect for, nobody
	// will ever receive.
	lingerLeast = 20 * time.Millisecond
)

// close ends the connection for good and returns how many messages it abandoned.
func (c *Conn) close() int {
	// 1. Nothing is accepted any more; the control side shuts down what is up and ends.
	c.mu.Lock()
	c.closed = true
	c.wakeUpWaitLocked()
	c.ctl.closing = true
	stopped := make(chan struct{})
	c.ctl.stopped = stopped
	if a := c.ctl.attempt; a != nil {
		a.cancel(errClosing)
	}
	c.kickLocked()
	c.mu.Unlock()
	<-stopped
	// 2. It is down: nothing starts a timer any more. What is left in the queue goes back to its owners.
	c.mu.Lock()
	c.stopTimersLocked()
	c.mu.Unlock()
	abandoned := 0
	for {
		var r released
		c.mu.Lock()
		n, empty := c.q.drop(&r)
		abandoned += n
		var copied chan struct{}
		if !empty && r.n == 0 {
			copied = make(chan struct{}) // a Send is in the middle of its copy
			c.ctl.copied = copied
		}
		if empty {
			c.q.trim()
		}
		c.mu.Unlock()
		r.tell()
		if empty {
			return abandoned
		}
		if copied != nil {
			<-copied
		}
	}
}

func (c *Conn) stopTimersLocked() {
	for _, t := range []*time.Timer{c.ackTimer, c.askTimer, c.tick} {
		if t != nil {
			t.Stop()
		}
	}
}
