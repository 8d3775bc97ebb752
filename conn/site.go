package conn

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/verbs"
)

// site is a local address: its device and listener, its congestion map (congestion.go), and the connections that the map goes
// to.
//
// A site whose device goes is away until the address has one again: its connections are down, try nothing, and keep
// their messages; one goroutine (recover) waits. Then there is a listener again, and connections that have something to
// do connect.
//
//	        listen              device removed
//	(no device) ──▶ here ──────────────────────────▶ away ◀── a connection finds no device
//	                 ▲                                │
//	                 └── a device appears, listening ─┘
type site struct {
	m    *Manager
	addr netip.Addr

	// open is the gate of whoever opens the device: one at a time. dev and lis, and what belongs to them, are written
	// through it.
	open   chan struct{}
	dev    *ibdev.Device // what the listener is on, with a reference
	lis    verbs.Listener
	unhook func() // no more news of dev
	wanted bool   // listen has succeeded once

	mu      sync.Mutex
	cur     *ibdev.Device // dev
	away    bool          // there is no device, and recover is at work on that
	since   time.Time     // when cur was adopted
	cong    ourMap
	conns   []*Conn
	pushing bool // there is a pusher
	stopped bool // the Manager is closing: there is nobody left to tell

	wake    chan struct{} // one slot: the pusher looks again
	crowded atomic.Uint64 // congested ports, modulo 64; advice
}

// stop ends the pushing of maps.
func (s *site) stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
}

// device returns the address's device with a reference for the caller. May wait.
func (s *site) device(ctx context.Context) (*ibdev.Device, error) {
	return s.m.cfg.Registry.Open(ctx, s.addr)
}

// listen opens the device and accepts requests from now on. The device stays open until close. May wait.
func (s *site) listen(ctx context.Context) error {
	select {
	case s.open <- struct{}{}:
		defer func() { <-s.open }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if s.lis != nil {
		return nil
	}
	if s.m.isClosed() {
		return ErrClosed
	}
	d, err := s.device(ctx)
	if err != nil {
		return err
	}
	if err := s.adopt(d); err != nil {
		d.Put()
		return err
	}
	s.wanted = true
	return nil
}

// holder is what the device calls our reference.
const holder = "listener"

// adopt listens on d, whose reference it takes over unless it fails. The caller is in the gate. May wait.
func (s *site) adopt(d *ibdev.Device) error {
	lis, err := d.Verbs().Listen(cmPort(s.addr), func(r verbs.ConnRequest) { s.m.request(s, r) })
	if err != nil {
		return err
	}
	d.GetNamed(holder)
	d.Put()
	s.dev, s.lis = d, lis
	s.mu.Lock()
	s.cur, s.away, s.since = d, false, time.Now()
	s.mu.Unlock()
	d.OnStray(s.stray)
	s.unhook = d.OnRemove(func() { s.lost(d) }) // last: it may have been removed already
	return nil
}

// drop gives up the device and the listener, if there are any. May wait, for handlers of requests.
func (s *site) drop() error {
	s.open <- struct{}{}
	d, lis, unhook := s.dev, s.lis, s.unhook
	s.dev, s.lis, s.unhook = nil, nil, nil
	<-s.open
	s.mu.Lock()
	if s.cur == d {
		s.cur = nil
	}
	s.mu.Unlock()
	var err error
	if lis != nil {
		err = lis.Close()
	}
	if d != nil {
		unhook()
		d.PutNamed(holder)
	}
	return err
}

// stray is told of a packet for a QP that does not exist. A peer that was connected to the process which had this address before sends
// such: it has not noticed that the process is gone, and nobody tells it, until its heartbeat does after most of the dead-peer time.
// So we connect to it, and it finds that its connection is an old one. Only who was connected then is meant: whom we have, or had,
// a connection with hears of its end otherwise, and after the dead-peer time nobody is left who does not know.
func (s *site) stray(from netip.Addr) {
	m := s.m
	s.mu.Lock()
	late := time.Since(s.since) > m.cfg.DeadAfter || s.away || s.stopped
	s.mu.Unlock()
	m.mu.RLock()
	known := m.peers[pair{s.addr, from}] != nil
	m.mu.RUnlock()
	if late || known {
		return
	}
	c, err := m.create(key{s.addr, from, 0}, false)
	if err != nil {
		return
	}
	c.mu.Lock()
	if c.ctl.established == 0 && !c.ctl.closing {
		m.count.strayConnects.Inc()
		c.ctl.keep = true
		c.kickLocked()
	}
	c.mu.Unlock()
}

// lost says that the address has no device: that it found none (nil), or that d is gone. It does not wait.
func (s *site) lost(d *ibdev.Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away || s.stopped || d != nil && s.cur != nil && s.cur != d {
		return // known, of no interest any more, or no news: there is another one
	}
	s.away = true
	s.m.count.devicesLost.Inc()
	s.m.wg.Add(1)
	go s.recover()
}

func (s *site) isAway() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away
}

// recover waits for a device and puts everything back in place.
func (s *site) recover() {
	m := s.m
	defer m.wg.Done()
	m.log.Warn("no device", "addr", s.addr)
	if err := s.drop(); err != nil {
		m.log.Warn("listener of a removed device", "addr", s.addr, "err", err)
	}
	s.dropOps()
	for {
		d, err := m.cfg.Registry.Await(m.ctx, s.addr)
		if err != nil {
			return // closing
		}
		back, err := s.arrive(d)
		if back {
			return
		}
		m.log.Warn("device that cannot be listened on", "device", d.Name(), "err", err)
		t := time.NewTimer(m.cfg.BackoffMax)
		select {
		case <-d.Removed():
		case <-t.C:
		case <-m.ctx.Done():
		}
		t.Stop()
		d.Put()
	}
}

// arrive has the address use d, whose reference it takes over if it does.
func (s *site) arrive(d *ibdev.Device) (bool, error) {
	m := s.m
	s.open <- struct{}{}
	switch {
	case m.ctx.Err() != nil: // the listener that close has ended stays ended
		d.Put()
		<-s.open
		return true, nil
	case s.lis != nil: // somebody else was faster
		d.Put()
	case s.wanted:
		if err := s.adopt(d); err != nil {
			<-s.open
			return false, err
		}
	default:
		d.Put()
		s.mu.Lock()
		s.away = false
		s.mu.Unlock()
	}
	<-s.open
	s.mu.Lock()
	conns := s.conns
	s.mu.Unlock()
	m.count.devicesBack.Inc()
	m.log.Info("device is back", "addr", s.addr, "device", d.Name())
	// All at once they would overrun the peers' and our own queues of requests.
	now, spread := time.Now(), time.Duration(len(conns)+1)*reconnectSpread
	for _, c := range conns {
		c.deviceBack(now.Add(m.upTo(spread)))
	}
	return true, nil
}

// reconnectSpread is the time for each of the connections that begin anew because their device is back: 20,000 a
// second.
const reconnectSpread = 50 * time.Microsecond

// deviceBack has the connection begin anew where it has something to do: nothing that happened before counts against the peer.
func (c *Conn) deviceBack(tryAt time.Time) {
	c.peer.pardon()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ctl.backoff, c.ctl.tryAt = 0, tryAt
	if c.ctl.running || c.state.load() == Down && !c.ctl.closing && c.wantedLocked() {
		c.kickLocked()
	}
}

// close ends the listener; no request is being handled once it has returned. May wait.
func (s *site) close() error {
	s.open <- struct{}{}
	defer func() { <-s.open }()
	if s.lis == nil {
		return nil
	}
	err := s.lis.Close()
	s.lis = nil
	return err
}

// release gives up what the address holds. Its connections are gone.
func (s *site) release() {
	_ = s.drop() // of the listener, which close has ended, the device alone is left
	s.mu.Lock()
	s.cong.dropChunks()
	s.mu.Unlock()
}

func cmPort(a netip.Addr) uint16 {
	if a.Is4() {
		return CMPort4
	}
	return CMPort6
}
