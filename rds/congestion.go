package rds

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Congestion as senders see it (rds-protocol spec 1.9, 2.7). A peer's map says which of its ports do not read fast enough; the connection
// keeps it. Here is who waits for one of these ports to clear: each port has its own queue, so a map that clears one wakes nobody
// who waits for another, and costs an atomic load where nobody waits at all.

// CongestedError is a write that was refused because its destination does not read fast enough. It matches ErrCongested and
// syscall.ENOBUFS.
type CongestedError struct {
	Dest netip.AddrPort

	d *dest
}

func (e *CongestedError) Error() string { return ErrCongested.Error() }

// Is matches ErrCongested and ENOBUFS.
func (e *CongestedError) Is(target error) bool {
	return target == ErrCongested || target == syscall.ENOBUFS
}

// As gives ENOBUFS to who asks for an errno.
func (e *CongestedError) As(target any) bool { return asErrno(target, syscall.ENOBUFS) }

// Ready is a channel that is closed when Dest is not congested any more, and when the service is closed: then is the time to
// try again. It costs nothing until it is asked for. All who wait for a port share it.
func (e *CongestedError) Ready() <-chan struct{} {
	p, port := e.d.peer, e.Dest.Port()
	ch := p.cong.watch(port)
	if p.la.svc.closed.Load() || !e.d.link.PeerCongested(port) {
		p.cong.clear(port) // what was reported before we were in the queue
	}
	return ch
}

// portWaits are those who wait for ports of one peer.
//
// No wake is lost if a waiter enters before it looks at the peer's map for the last time, and clear is called after the map has
// changed.
type portWaits struct {
	n     atomic.Int32 // len(ports), for those who look without the lock
	mu    sync.Mutex
	ports map[uint16]*portWait // guarded by mu
	spare *portWait            // guarded by mu: a write that waits again and again does not allocate
}

// portWait is those who wait for one port.
type portWait struct {
	writers  []*waiter     // blocked writes; they leave by themselves
	ready    chan struct{} // CongestedError.Ready; nil: nobody has asked
	monitors []*Socket     // each once
}

func (pw *portWait) empty() bool {
	return len(pw.writers)+len(pw.monitors) == 0 && pw.ready == nil
}

// atLocked finds or makes the entry of port.
func (q *portWaits) atLocked(port uint16) *portWait {
	pw := q.ports[port]
	if pw != nil {
		return pw
	}
	if pw, q.spare = q.spare, nil; pw == nil {
		pw = new(portWait)
	}
	if q.ports == nil {
		q.ports = make(map[uint16]*portWait)
	}
	q.ports[port] = pw
	q.n.Store(int32(len(q.ports)))
	return pw
}

// tidyLocked forgets an entry without anybody.
func (q *portWaits) tidyLocked(port uint16, pw *portWait) {
	if pw.empty() {
		delete(q.ports, port)
		q.n.Store(int32(len(q.ports)))
		q.spare = pw
	}
}

func (q *portWaits) empty() bool { return q.n.Load() == 0 }

// add enters a blocked write.
func (q *portWaits) add(port uint16, w *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	pw := q.atLocked(port)
	pw.writers = append(pw.writers, w)
}

// remove takes it out.
func (q *portWaits) remove(port uint16, w *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	pw := q.ports[port]
	if pw == nil {
		return
	}
	if i := slices.Index(pw.writers, w); i >= 0 {
		pw.writers = slices.Delete(pw.writers, i, i+1)
		q.tidyLocked(port, pw)
	}
}

// watch is the channel that is closed when port clears.
func (q *portWaits) watch(port uint16) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	pw := q.atLocked(port)
	if pw.ready == nil {
		pw.ready = make(chan struct{})
	}
	return pw.ready
}

// monitor enters a socket that wants to be told once.
func (q *portWaits) monitor(port uint16, s *Socket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	pw := q.atLocked(port)
	if !slices.Contains(pw.monitors, s) {
		pw.monitors = append(pw.monitors, s)
	}
}

// unmonitor takes it out.
func (q *portWaits) unmonitor(port uint16, s *Socket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	pw := q.ports[port]
	if pw == nil {
		return
	}
	if i := slices.Index(pw.monitors, s); i >= 0 {
		pw.monitors = slices.Delete(pw.monitors, i, i+1)
		q.tidyLocked(port, pw)
	}
}

// clear tells those who wait for port that it is not congested.
func (q *portWaits) clear(port uint16) {
	q.mu.Lock()
	pw := q.ports[port]
	if pw == nil {
		q.mu.Unlock()
		return
	}
	for _, w := range pw.writers {
		w.notify()
	}
	if pw.ready != nil {
		close(pw.ready)
		pw.ready = nil
	}
	monitors := pw.monitors
	pw.monitors = nil
	q.tidyLocked(port, pw)
	q.mu.Unlock()
	for _, s := range monitors {
		s.mon.clear(s, q, port)
	}
}

// clearAll is the end of waiting.
func (q *portWaits) clearAll() {
	q.mu.Lock()
	ports := make([]uint16, 0, len(q.ports))
	for port := range q.ports {
		ports = append(ports, port)
	}
	q.mu.Unlock()
	for _, port := range ports {
		q.clear(port)
	}
}

func (k sink) PortsClear(local, remote netip.Addr, ports []uint16) {
	la := k.svc.local(local)
	if la == nil {
		return
	}
	la.peersMu.RLock()
	p := la.peers[remote]
	la.peersMu.RUnlock()
	if p == nil || p.cong.empty() { // whoever waits has made the peer
		return
	}
	for _, port := range ports {
		p.cong.clear(port)
	}
}

// clearNearby tells those of this Service that wait for port of la.
func (la *localAddr) clearNearby(port uint16) {
	if list := la.nearby.Load(); list != nil {
		for _, p := range *list {
			if !p.cong.empty() {
				p.cong.clear(port)
			}
		}
	}
}

// congMonitor is a socket's RDS_CONG_MONITOR.
type congMonitor struct {
	on      atomic.Bool
	mu      sync.Mutex
	want    map[monitored]struct{} // congested destinations that writes met; guarded by mu
	mask    uint64                 // what has cleared since the last read, bit port mod 64; guarded by mu
	readers waitq
}

type monitored struct {
	q    *portWaits
	port uint16
}

// met notes that a write found a port congested. The caller then looks at the port again.
func (m *congMonitor) met(s *Socket, q *portWaits, port uint16) {
	k := monitored{q, port}
	m.mu.Lock()
	if m.want == nil {
		m.want = make(map[monitored]struct{})
	}
	m.want[k] = struct{}{}
	m.mu.Unlock()
	q.monitor(port, s)
	if s.closed.Load() || !m.on.Load() && s.ready.Load() == nil { // stop may have missed it
		m.stop(s)
	}
}

// clear says that port has cleared.
func (m *congMonitor) clear(s *Socket, q *portWaits, port uint16) {
	k := monitored{q, port}
	m.mu.Lock()
	_, wanted := m.want[k]
	if wanted {
		delete(m.want, k)
		if m.on.Load() {
			m.mask |= 1 << (port % 64)
		}
	}
	m.mu.Unlock()
	if wanted {
		m.readers.wakeOne()
		if r := s.ready.Load(); r != nil {
			r.raiseNews()
		}
	}
}

// stop forgets everything.
func (m *congMonitor) stop(s *Socket) {
	m.mu.Lock()
	want := m.want
	m.want, m.mask = nil, 0
	m.mu.Unlock()
	for k := range want {
		k.q.unmonitor(k.port, s)
	}
}

func (m *congMonitor) take() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	mask := m.mask
	m.mask = 0
	return mask
}

// news reports whether there is something to take.
func (m *congMonitor) news() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mask != 0
}

// SetCongestionMonitor chooses whether the socket is told when destinations clear at which a call that does not wait (TrySend) was
// refused with ErrCongested (RDS_CONG_MONITOR). Each is told of once, by ReadCongestion, and again only after another refusal.
// Off, the default, forgets what has not been told. Unlike the kernel's it does not touch the socket's own congestion.
//
// CongestedError.Ready does the same for one destination.
func (s *Socket) SetCongestionMonitor(on bool) error {
	if s.closed.Load() {
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	}
	s.mon.on.Store(on)
	if !on {
		s.mon.stop(s)
	}
	return nil
}

// CongestionMonitor is what SetCongestionMonitor has set.
func (s *Socket) CongestionMonitor() bool { return s.mon.on.Load() }

// ReadCongestion returns which destinations have cleared since the last call (RDS_CMSG_CONG_UPDATE): bit n stands for ports that are n
// modulo 64, of whatever host. Exactly destinations count at which this socket was refused. It waits for one until the read deadline or until
// ctx is done, whichever is first.
func (s *Socket) ReadCongestion(ctx context.Context) (mask uint64, err error) {
	var w *waiter
	sp := spinner{hint: &s.readHint}
	for {
		if err = s.readErr(); err != nil {
			break
		}
		if mask = s.mon.take(); mask != 0 {
			break
		}
		if err = ctx.Err(); err != nil {
			err = ctxError(err, nil)
			break
		}
		if sp.turn(s.svc.tr) {
			continue
		}
		if w == nil {
			w = s.waiters.get()
		}
		s.mon.readers.add(w)
		if s.readErr() == nil && !s.mon.news() {
			sp.park(ctx, s.svc.tr, w)
		}
		s.mon.readers.remove(w)
	}
	if w != nil {
		s.waiters.put(w)
	}
	if s.mon.news() {
		s.mon.readers.wakeOne()
	}
	s.settle(true)
	if err != nil {
		return 0, s.opError("read", netip.AddrPort{}, err)
	}
	return mask, nil
}

// TryReadCongestion is ReadCongestion that never waits (MSG_DONTWAIT): 0 if there is nothing.
func (s *Socket) TryReadCongestion() (mask uint64) {
	mask = s.mon.take()
	s.settle(true)
	return mask
}
