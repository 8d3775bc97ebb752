package rds

import (
	"net/netip"

	"github.com/openrds/openrds/conn"
)

// sink is the Service as connections see it. Its methods run in completion handlers.
type sink struct{ svc *Service }

var _ conn.Sink = sink{}

func (k sink) Deliver(c *conn.Conn, msgs []conn.Incoming) int {
	return k.svc.deliver(k.svc.peerOfConn(c), c.TOS(), msgs, int64(k.svc.cfg.MaxPeerBytes))
}

func (k sink) PeerDown(local, remote netip.Addr) {
	k.svc.ctr.peerDown.Add(1)
	k.svc.log.Warn("peer cannot be reached; its datagrams wait", "local", local, "peer", remote)
}

func (k sink) PeerUp(local, remote netip.Addr) {
	k.svc.ctr.peerUp.Add(1)
	k.svc.log.Info("peer is reachable again", "local", local, "peer", remote)
}

// run is what one batch has brought one socket so far.
type run struct {
	s      *Socket
	wake   bool // there was nothing to read before
	msgs   int
	bytes  int64
	charge int64
	room   int64 // charge until the socket's hard bound
}

// fairShare is what a peer may have in the queues even of a socket that has passed its hard bound because of others.
const fairShare = 1 << 20

// maxRuns is how many sockets a batch keeps apart. Datagrams of more than that interleaved cost some atomic additions
// more each.
const maxRuns = 16

// runs are those of one batch. At most one socket's queue is locked at a time, since another batch may bring
// to the same sockets in another order.
type runs struct {
	rs     [maxRuns]run
	n      int
	locked *Socket // whose queue is locked, nil if none
	victim int
}

// to makes s's run the current one.
func (b *runs) to(s *Socket) *run {
	b.unlock()
	i := 0
	for i < b.n && b.rs[i].s != s {
		i++
	}
	if i == b.n {
		if b.n < maxRuns {
			b.n++
		} else {
			i = b.victim
			b.victim = (b.victim + 1) % maxRuns
			b.rs[i].end()
		}
		b.rs[i] = run{s: s, room: s.hardBound() - s.q.charge.Load()}
	}
	r := &b.rs[i]
	s.q.inMu.Lock()
	if s.q.in == nil {
		r.wake = true
	}
	b.locked = s
	return r
}

func (b *runs) unlock() {
	if b.locked != nil {
		b.locked.q.inMu.Unlock()
		b.locked = nil
	}
}

func (b *runs) end() {
	b.unlock()
	for i := range b.rs[:b.n] {
		b.rs[i].end()
	}
}

// end accounts for the run, wakes a reader if there was nothing to read before, and tells the world
// if the socket has got too much. A reader may have consumed some of it by now: the counts are below zero
// for that moment.
func (r *run) end() {
	if r.msgs == 0 {
		return
	}
	s := r.s
	q := &s.q
	total, charge := q.bytes.Add(r.bytes), q.charge.Add(r.charge)
	if r.wake {
		q.readers.wakeOne()
		s.raise()
	}
	c := &s.svc.ctr
	c.recvQueued.Add(uint64(r.msgs))
	c.recvBytesAdded.Add(uint64(r.bytes))
	if s.overfull(total, charge) && !q.congested.Load() {
		s.updateCongestion()
	}
}

// deliver queues msgs, which came from p with type of service tos, at their sockets. It returns how many it took; fewer than
// all only if the next would take p past limit, or its socket past the hard bound.
func (svc *Service) deliver(p *peer, tos uint8, msgs []conn.Incoming, limit int64) int {
	la := p.la
	room := limit - max(0, p.queued.Load()) // below zero when a reader is faster than our accounts
	from := source32{p.index, tos}
	var (
		batch runs
		r     *run // the current one, whose queue is locked; nil if none
		total int64
		n     int
		used  []usedKey // told when no queue is locked
	)
	for ; n < len(msgs); n++ {
		m := &msgs[n]
		if r == nil || r.s.port != m.DstPort {
			s := la.ports.lookup(m.DstPort)
			if s == nil {
				batch.unlock()
				r = nil
				if s = la.deliverUnbound(p, from, m, &total); s == nil {
					continue
				}
			}
			r = batch.to(s)
		}
		q := &r.s.q
		if q.closed {
			svc.ctr.recvDropDeadSock.Add(1)
			continue
		}
		charge := chargeOf(m.Len)
		if total+charge > room {
			svc.ctr.recvPeerLimit.Add(1)
			break
		}
		if r.charge+charge > r.room && limit-room+total > fairShare && limit < maxInt64 { // who is local has seen the bit
			svc.ctr.recvSocketLimit.Add(1)
			break
		}
		if m.Ext == nil && q.stamps == 0 {
			q.pushLocked(from, m)
		} else {
			q.pushExtLocked(from, m)
			if m.Ext != nil && m.Ext.HasUsed {
				used = append(used, usedKey{r.s, uint32(m.Ext.Used)})
			}
		}
		total += charge
		r.msgs++
		r.bytes += int64(m.Len)
		r.charge += charge
	}
	if total != 0 {
		p.queued.Add(total)
	}
	batch.end()
	for _, u := range used {
		u.s.used(p.remote, u.rkey)
	}
	return n
}

// usedKey is the key of a region of s that a peer says it has used.
type usedKey struct {
	s    *Socket
	rkey uint32
}

// deliverUnbound holds m or drops it. If the port was bound at this very moment it returns the
// socket instead.
func (la *localAddr) deliverUnbound(p *peer, from source32, m *conn.Incoming, total *int64) *Socket {
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
	if m.Ext == nil {
		q.pushLocked(from, m)
	} else {
		q.pushExtLocked(from, m)
	}
	q.inMu.Unlock()
	q.bytes.Add(int64(m.Len))
	q.charge.Add(charge)
	*total += charge
	la.svc.ctr.recvHeld.Add(1)
	return nil
}
