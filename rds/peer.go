package rds

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openrds/openrds/conn"
)

// localAddr is an address of this host that belongs to the Service, from its first bind until Close.
type localAddr struct {
	svc    *Service
	addr   netip.Addr
	opened chan struct{} // closed when openErr is set
	err    error         // of opening it

	ports   portTable
	regions regions

	mu   sync.Mutex // binds and holds; ports change under it
	hold holding    // guarded by mu

	peersMu sync.RWMutex
	peers   map[netip.Addr]*peer // guarded by peersMu

	// nearby are the peers of this Service's addresses that reach this address through a localLink.
	nearby atomic.Pointer[[]*peer]
}

// peer is a pair of hosts: one of our addresses and a remote one. It stays as long as the Service if anything was sent to it, as
// connections do; one that has only sent to us goes with the last of its connections (retire).
type peer struct {
	la     *localAddr
	remote netip.Addr
	index  uint32 // in Service.peers, for records
	conns  int    // that have delivered something; guarded by la.peersMu
	local  bool   // senders of this Service have it; guarded by la.peersMu

	queued atomic.Int64 // charge of its datagrams in receive queues

	cong portWaits // for ports of remote to clear

	plain atomic.Pointer[dest] // the dest of type of service 0
	mu    sync.Mutex
	dests map[uint8]*dest // the others; guarded by mu
	gone  bool            // not in the tables any more; written under mu and la.peersMu
}

// peerTable finds peers by their number.
type peerTable struct {
	mu   sync.Mutex                             // writers
	list atomic.Pointer[[]atomic.Pointer[peer]] // replaced by a longer one when it is full
	n    int                                    // numbers given out; guarded by mu
	free []uint32                               // of these, those given back; guarded by mu
}

// add gives p its number.
func (t *peerTable) add(p *peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := t.list.Load()
	if n := len(t.free); n > 0 {
		p.index, t.free = t.free[n-1], t.free[:n-1]
	} else {
		if list == nil || t.n == len(*list) {
			longer := make([]atomic.Pointer[peer], max(16, 2*t.n))
			for i := range t.n {
				longer[i].Store((*list)[i].Load())
			}
			list = &longer
			t.list.Store(list)
		}
		p.index = uint32(t.n)
		t.n++
	}
	(*list)[p.index].Store(p)
}

// remove gives p's number back. No record has it.
func (t *peerTable) remove(p *peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	(*t.list.Load())[p.index].Store(nil)
	t.free = append(t.free, p.index)
}

// all are the peers of this moment.
func (t *peerTable) all() (ps []*peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.n {
		if p := (*t.list.Load())[i].Load(); p != nil {
			ps = append(ps, p)
		}
	}
	return ps
}

// peerAt is the peer with a number that a record has.
func (svc *Service) peerAt(index uint32) *peer { return (*svc.peers.list.Load())[index].Load() }

// peerOfConn is the peer of a connection that delivers.
func (svc *Service) peerOfConn(c *conn.Conn) *peer {
	if p, ok := svc.byConn.Load(c); ok {
		return p.(*peer)
	}
	la := svc.local(c.Local())
	p := la.peer(c.Remote())
	la.peersMu.Lock()
	defer la.peersMu.Unlock()
	for p.gone { // under peersMu it is not set
		la.peersMu.Unlock()
		p = la.peer(c.Remote())
		la.peersMu.Lock()
	}
	p.conns++ // one handler at a time delivers on c
	svc.byConn.Store(c, p)
	return p
}

// ConnIdle implements conn.Sink: a connection whose peer has something in our queues stays, since records name the peer.
func (k sink) ConnIdle(c *conn.Conn) bool {
	p, ok := k.svc.byConn.Load(c)
	return !ok || p.(*peer).queued.Load() == 0
}

// ConnGone implements conn.Sink.
func (k sink) ConnGone(c *conn.Conn) {
	v, ok := k.svc.byConn.LoadAndDelete(c)
	if !ok {
		return
	}
	p := v.(*peer)
	p.la.peersMu.Lock()
	p.conns--
	p.la.peersMu.Unlock()
	p.retire()
}

// retire takes p out of the tables if it is of no use: nobody here has sent to it, nothing of it is queued, no connection of it is left.
func (p *peer) retire() {
	la := p.la
	la.peersMu.Lock()
	defer la.peersMu.Unlock()
	if !p.mu.TryLock() {
		return // somebody is about to send to it. It is not waited for: that may be for the peers of another address
	}
	defer p.mu.Unlock()
	if p.gone || p.local || p.conns > 0 || p.plain.Load() != nil || len(p.dests) > 0 || p.queued.Load() != 0 || !p.cong.empty() {
		return
	}
	p.gone = true
	delete(la.peers, p.remote)
	la.svc.peers.remove(p)
}

// dest is where datagrams to a host go. Immutable.
type dest struct {
	peer   *peer
	remote netip.Addr
	tos    uint8
	link   link
}

// peer finds or makes the peer of remote.
func (la *localAddr) peer(remote netip.Addr) *peer {
	la.peersMu.RLock()
	p := la.peers[remote]
	la.peersMu.RUnlock()
	if p != nil {
		return p
	}
	la.peersMu.Lock()
	defer la.peersMu.Unlock()
	if p = la.peers[remote]; p == nil {
		p = &peer{la: la, remote: remote}
		la.svc.peers.add(p)
		la.peers[remote] = p
	}
	return p
}

// localPeer is peer for an address of this Service, whose senders keep it.
func (la *localAddr) localPeer(remote netip.Addr) *peer {
	for {
		p := la.peer(remote)
		la.peersMu.Lock()
		ok := la.peers[remote] == p
		if ok {
			p.local = true
		}
		la.peersMu.Unlock()
		if ok {
			return p
		}
	}
}

// dest finds or makes the way to remote.
func (la *localAddr) dest(remote netip.Addr, tos uint8) (*dest, error) {
	la.peersMu.RLock()
	p := la.peers[remote]
	la.peersMu.RUnlock()
	if p != nil && tos == 0 {
		if d := p.plain.Load(); d != nil {
			return d, nil
		}
	}
	if err := checkDest(la.addr, remote); err != nil {
		return nil, err
	}
	for {
		d, err := la.peer(remote).dest(tos)
		if err != errPeerRetired {
			return d, err
		}
	}
}

// errPeerRetired says that a peer is not in the tables any more: another one is, or will be.
var errPeerRetired = errors.New("peer has gone")

// dest finds or makes the way to p with type of service tos. Whether that is the wire or a short cut inside the
// Service is decided once: datagrams that took the other way could overtake.
func (p *peer) dest(tos uint8) (*dest, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.plain.Load()
	if tos != 0 {
		d = p.dests[tos]
	}
	if d != nil {
		return d, nil
	}
	if p.gone {
		return nil, errPeerRetired
	}
	l, err := p.la.svc.linkTo(p, tos)
	if err != nil {
		return nil, err
	}
	d = &dest{peer: p, remote: p.remote, tos: tos, link: l}
	if tos == 0 {
		p.plain.Store(d)
	} else {
		if p.dests == nil {
			p.dests = make(map[uint8]*dest)
		}
		p.dests[tos] = d
	}
	return d, nil
}

// bind gives port (0: any) to s.
func (la *localAddr) bind(s *Socket, port uint16) error {
	la.mu.Lock()
	defer la.mu.Unlock()
	if la.svc.closed.Load() {
		return ErrClosed
	}
	if port == 0 {
		var ok bool
		if port, ok = la.ports.free(); !ok {
			return fmt.Errorf("%w: no port of %v is free", ErrAddrInUse, la.addr)
		}
	} else if la.ports.lookup(port) != nil {
		return ErrAddrInUse
	}
	s.port = port
	la.hold.start(la)
	// What was held goes first; deliverers see the socket only after it is in its queue.
	if q := la.hold.take(port); q != nil {
		s.q.adopt(q)
	}
	la.ports.bind(port, s)
	return nil
}

// holding keeps datagrams for ports that nobody bound yet, for a moment after the first bind on an
// address: a program binds its ports one by one, and its peers, who sent before it was there, may not
// lose what they sent to the later ones (design section 7). Bounded in time and charge.
type holding struct {
	active bool
	began  bool
	timer  *time.Timer
	ports  map[uint16]*recvq
	charge int64
}

// start begins the time of grace, once. The caller holds la.mu, as for all methods.
func (h *holding) start(la *localAddr) {
	if h.began {
		return
	}
	h.began = true
	if d := la.svc.cfg.HoldTime; d > 0 {
		h.active = true
		h.ports = make(map[uint16]*recvq)
		h.timer = time.AfterFunc(d, la.endHold)
	}
}

// take is what was held for port, nil if nothing was.
func (h *holding) take(port uint16) *recvq {
	q := h.ports[port]
	if q != nil {
		delete(h.ports, port)
		h.charge -= q.charge.Load()
	}
	return q
}

// queue is where a datagram of charge c for port is held, nil if it cannot be.
func (h *holding) queue(svc *Service, port uint16, c int64) *recvq {
	if !h.active || h.charge+c > int64(svc.cfg.HoldBytes) {
		return nil
	}
	h.charge += c
	q := h.ports[port]
	if q == nil {
		q = &recvq{svc: svc} // pinLimit 0: copied, no device waits for what may never be read
		h.ports[port] = q
	}
	return q
}

// endHold drops what is held still; it would have been dropped on arrival otherwise.
func (la *localAddr) endHold() {
	la.mu.Lock()
	defer la.mu.Unlock()
	h := &la.hold
	if !h.active {
		return
	}
	h.active = false
	h.timer.Stop()
	for _, q := range h.ports {
		la.svc.ctr.recvDropNoSock.Add(uint64(q.close()))
	}
	h.ports, h.charge = nil, 0
}
