package rds

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
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

// peer is a pair of hosts: one of our addresses and a remote one. It stays as long as the Service,
// as connections do.
type peer struct {
	la     *localAddr
	remote netip.Addr
	index  uint32 // in Service.peers, for records

	queued atomic.Int64 // charge of its datagrams in receive queues

	cong portWaits // for ports of remote to clear

	plain atomic.Pointer[dest] // the dest of type of service 0
	mu    sync.Mutex
	dests map[uint8]*dest // the others; guarded by mu
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
		la.svc.addPeer(p)
		la.peers[remote] = p
	}
	return p
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
	return la.peer(remote).dest(tos)
}

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

// known is the ways to remote there are.
func (la *localAddr) known(remote netip.Addr) []*dest {
	la.peersMu.RLock()
	p := la.peers[remote]
	la.peersMu.RUnlock()
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var ds []*dest
	if d := p.plain.Load(); d != nil {
		ds = append(ds, d)
	}
	for _, d := range p.dests {
		ds = append(ds, d)
	}
	return ds
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
