package rds

import (
	"net/netip"

	"github.com/openrds/openrds/conn"
)

// sink is the Service as connections see it. Its methods run in completion handlers.
type sink struct{ svc *Service }

var _ conn.Sink = sink{}

func (k sink) Deliver(c *conn.Conn, msgs []conn.Incoming) int {
	p, ok := k.svc.byConn.Load(c)
	if !ok {
		// Many connections of a pair (one per type of service) share the peer.
		p, _ = k.svc.byConn.LoadOrStore(c, k.svc.peerOf(c.Local(), c.Remote()))
	}
	return k.svc.deliver(p.(*peer), msgs, int64(k.svc.cfg.MaxPeerBytes))
}

func (k sink) PeerMapChanged(local, remote netip.Addr, cleared bool) {
	if cleared {
		k.svc.peerOf(local, remote).congWait.wakeAll()
	}
}

func (k sink) PeerDown(local, remote netip.Addr) {
	k.svc.ctr.peerDown.Add(1)
	k.svc.log.Warn("peer cannot be reached; its datagrams wait", "local", local, "peer", remote)
}

func (k sink) PeerUp(local, remote netip.Addr) {
	k.svc.ctr.peerUp.Add(1)
	k.svc.log.Info("peer is reachable again", "local", local, "peer", remote)
}

// run is a number of consecutive datagrams for one socket, appended under one lock.
type run struct {
	s        *Socket
	wasEmpty bool
	msgs     int
	bytes    int64
	charge   int64
}

func (r *run) begin(s *Socket) {
	*r = run{s: s}
	s.q.inMu.Lock()
	r.wasEmpty = s.q.in == nil
}

// end accounts for the run, wakes a reader if there was nothing to read before, and tells the world
// if the socket has got too much.
func (r *run) end() {
	s := r.s
	if s == nil {
		return
	}
	r.s = nil
	q := &s.q
	var total, charge int64
	if r.msgs > 0 {
		total = q.bytes.Add(r.bytes)
		charge = q.charge.Add(r.charge)
	}
	q.inMu.Unlock()
	if r.msgs == 0 {
		return
	}
	if r.wasEmpty {
		q.readers.wakeOne()
	}
	c := &s.svc.ctr
	c.recvQueued.Add(uint64(r.msgs))
	c.recvBytesAdded.Add(uint64(r.bytes))
	if s.overfull(total, charge) && !q.congested.Load() {
		s.updateCongestion()
	}
}

// deliver queues msgs, which came from p, at their sockets. It returns how many it took; fewer than
// all only if the next would take p past limit.
func (svc *Service) deliver(p *peer, msgs []conn.Incoming, limit int64) int {
	la := p.la
	room := limit - p.queued.Load()
	var (
		cur   run
		total int64
		n     int
	)
	for ; n < len(msgs); n++ {
		m := &msgs[n]
		s := cur.s
		if s == nil || s.port != m.DstPort {
			if s = la.ports.lookup(m.DstPort); s == nil {
				cur.end()
				if s = la.deliverUnbound(p, m, &total); s == nil {
					continue
				}
			}
			cur.end()
			cur.begin(s)
		}
		if s.q.closed {
			svc.ctr.recvDropDeadSock.Add(1)
			continue
		}
		charge := chargeOf(m.Len)
		if total+charge > room {
			svc.ctr.recvPeerLimit.Add(1)
			break
		}
		s.q.pushLocked(p.index, m)
		total += charge
		cur.msgs++
		cur.bytes += int64(m.Len)
		cur.charge += charge
	}
	if total != 0 {
		p.queued.Add(total)
	}
	cur.end()
	return n
}

// deliverUnbound holds m or drops it. If the port was bound at this very moment it returns the
// socket instead.
func (la *localAddr) deliverUnbound(p *peer, m *conn.Incoming, total *int64) *Socket {
	la.mu.Lock()
	defer la.mu.Unlock()
	if s := la.ports.lookup(m.DstPort); s != nil {
		return s
	}
	charge := chargeOf(m.Len)
	q := la.hold.queue(la.svc, m.DstPort, charge)
	if q == nil {
		la.svc.ctr.recvDropNoSock.Add(1)
		return nil
	}
	q.inMu.Lock()
	q.pushLocked(p.index, m)
	q.inMu.Unlock()
	q.bytes.Add(int64(m.Len))
	q.charge.Add(charge)
	*total += charge
	la.svc.ctr.recvHeld.Add(1)
	return nil
}
