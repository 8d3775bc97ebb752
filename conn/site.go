package conn

import (
	"bytes"
	"context"
	"net/netip"
	"sync"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
)

// site is a local address: its device and listener, its congestion map, and the connections that the map goes
// to.
type site struct {
	m    *Manager
	addr netip.Addr

	// open is the gate of whoever opens the device: one at a time. dev and lis are written through it.
	open chan struct{}
	dev  *ibdev.Device
	lis  verbs.Listener

	mu      sync.Mutex
	cong    rdshdr.CongMap
	chunk   *slab.Chunk // what cong was when it was last sent; nil: it has changed since. One reference.
	conns   []*Conn
	dirty   bool // changed since the pusher looked
	pushing bool // there is a pusher
	stopped bool // the Manager is closing: there is nobody left to tell
}

// snapshot returns the map in memory that can be posted, with a reference for the caller. All connections share it until
// the map changes.
func (s *site) snapshot() (*slab.Chunk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.chunk == nil {
		c, err := s.m.cfg.Slab.Alloc(rdshdr.CongMapLen)
		if err != nil {
			return nil, err
		}
		copy(c.Bytes(), s.cong[:])
		s.chunk = c
	}
	s.chunk.Get()
	return s.chunk, nil
}

// set changes the bit of port. It is called with sockets locked, so the map is sent by a goroutine of its own; what changes
// meanwhile goes out with it.
func (s *site) set(port uint16, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cong.Test(port) == on {
		return
	}
	if on {
		s.cong.Set(port)
	} else {
		s.cong.Clear(port)
	}
	if s.chunk != nil {
		s.chunk.Put()
		s.chunk = nil
	}
	s.dirty = true
	if !s.pushing && !s.stopped {
		s.pushing = true
		s.m.wg.Add(1)
		go s.push()
	}
}

// stop ends the pushing of maps; who is at it goes on to the end.
func (s *site) stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
}

// push marks the map as due on every connection.
func (s *site) push() {
	defer s.m.wg.Done()
	for {
		s.mu.Lock()
		if !s.dirty {
			s.pushing = false
			s.mu.Unlock()
			return
		}
		s.dirty = false
		conns := s.conns // appended to, or replaced
		s.mu.Unlock()
		for _, c := range conns {
			c.pushMap()
		}
	}
}

// pushMap sends the local map if the connection is up; if it is not, the map is the first thing that is sent when
// it is.
func (c *Conn) pushMap() {
	c.mu.Lock()
	if !c.up || c.mapDue {
		c.mu.Unlock()
		return
	}
	c.mapDue = true
	c.m.count.congQueued.Inc()
	c.transmitLocked()
}

// recvMap takes the peer's congestion map, which replaces the one before. Receive handler.
func (c *Conn) recvMap(size int, first Frag, more []Frag) {
	k := &c.m.count
	if size != rdshdr.CongMapLen {
		k.mapBadLength.Inc()
		return
	}
	k.congReceived.Inc()
	// Most maps are empty, and many are what we have already: neither makes garbage.
	old := c.peer.cong.Load()
	var empty rdshdr.CongMap
	if old == nil {
		old = &empty
	}
	if sameMap(old, first, more) {
		return
	}
	m := new(rdshdr.CongMap)
	n := copy(m[:], first.Data)
	for _, f := range more {
		n += copy(m[n:], f.Data)
	}
	if *m == empty {
		m = nil
	}
	c.peer.setMap(m)
}

func sameMap(m *rdshdr.CongMap, first Frag, more []Frag) bool {
	n := len(first.Data)
	if !bytes.Equal(m[:n], first.Data) {
		return false
	}
	for _, f := range more {
		if !bytes.Equal(m[n:n+len(f.Data)], f.Data) {
			return false
		}
		n += len(f.Data)
	}
	return true
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
	lis, err := d.Verbs().Listen(cmPort(s.addr), func(r verbs.ConnRequest) { s.m.request(s, r) })
	if err != nil {
		d.Put()
		return err
	}
	s.dev, s.lis = d, lis
	return nil
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
	s.open <- struct{}{}
	if s.dev != nil {
		s.dev.Put()
		s.dev = nil
	}
	<-s.open
	s.mu.Lock()
	if s.chunk != nil {
		s.chunk.Put()
		s.chunk = nil
	}
	s.mu.Unlock()
}

func cmPort(a netip.Addr) uint16 {
	if a.Is4() {
		return CMPort4
	}
	return CMPort6
}
