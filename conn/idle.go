package conn

import (
	"errors"
	"slices"
	"time"

	"github.com/openrds/openrds/conn/ib"
)

// Connections that only a peer has asked for are not kept for ever: anybody can ask. Those that were never up go at once
// (Manager.forget); others that are down when nothing has been delivered on them for Config.IdleTimeout, and the Sink has no use for
// them. One that is up has a peer that lives, which wants to hear if we do: it is closed only if room is needed, and its peer, if it
// is one of us, connects again when it has something to say. A kernel would at once: its connections stay while they are up.
//
// What has to outlive the connection is which messages of which process have arrived: otherwise one whose
// acknowledgement was lost would be delivered twice. That is a trace, two numbers per connection, kept for the latest maxTraces of them.

var errIdle = errors.New("nothing came for the idle timeout")

// trace is the receive side of a connection that is gone.
type trace struct {
	inc, expected uint64
	n             uint64 // number of the trace
}

// traces are guarded by Manager.mu.
type traces struct {
	byKey  map[key]trace
	order  []key // of the last len(order) traces, by number
	n      uint64
	forgot uint64 // traces that gave way to later ones
}

// maxTraces is how many are kept: 6 MiB.
const maxTraces = 1 << 16

func (t *traces) put(k key, inc, expected uint64, most int) {
	if expected == 0 {
		return
	}
	if t.byKey == nil {
		t.byKey = make(map[key]trace)
	}
	if len(t.order) < most {
		t.order = append(t.order, k)
	} else {
		i := t.n % uint64(most)
		if old := t.order[i]; t.byKey[old].n == t.n-uint64(most) && old != k {
			delete(t.byKey, old)
			t.forgot++
		}
		t.order[i] = k
	}
	t.byKey[k] = trace{inc, expected, t.n}
	t.n++
}

func (t *traces) take(k key) (inc, expected uint64) {
	tr := t.byKey[k]
	delete(t.byKey, k)
	return tr.inc, tr.expected
}

// reapLocked has reap called in time. Manager.mu is held.
func (m *Manager) reapLocked() {
	if m.cfg.IdleTimeout < 0 || m.closed || m.reaping {
		return
	}
	m.reaping = true
	if every := m.cfg.IdleTimeout / 4; m.reaper == nil {
		m.reaper = time.AfterFunc(every, m.reap)
	} else {
		m.reaper.Reset(every)
	}
}

// reap looks at the connections that nobody here has asked for, and ends those that are idle. There is a timer for it only while there are
// any.
func (m *Manager) reap() {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return
	}
	m.reaping = false
	m.wg.Add(1)
	defer m.wg.Done()
	type idleConn struct {
		*Conn
		full bool
	}
	var idle []idleConn
	some, now := false, time.Now()
	full := len(m.byKey) >= m.cfg.MaxConns*3/4
	for _, c := range m.byKey {
		if c.named.Load() {
			continue
		}
		some = true
		if n := c.delivered.Load(); n != c.reapSeen || c.reapAt.IsZero() {
			c.reapSeen, c.reapAt = n, now
		} else if now.Sub(c.reapAt) >= m.cfg.IdleTimeout {
			idle = append(idle, idleConn{c, full || c.peer.asked >= m.cfg.MaxConnsPerPeer})
		}
	}
	if some {
		m.reapLocked()
	}
	m.mu.Unlock()
	for _, c := range idle {
		if m.cfg.Sink.ConnIdle(c.Conn) {
			c.retire(c.full)
		}
	}
}

// retire ends a connection for want of use: if it is up only for want of room.
func (c *Conn) retire(full bool) {
	var r released
	c.mu.Lock()
	var end *ib.Link
	forget := false
	switch {
	case c.named.Load() || c.ctl.req != nil: // somebody has come
	case !c.up:
		// Answers to pings are all there can be in its queue, and of no use to anybody so late. What keeps the control side busy are
		// they.
		for from := c.q.una; from != c.q.tail; {
			from, _ = c.q.cancelRange(&c.rx.pongs, -1, from, &r)
		}
		c.ctl.keep = false
		forget = c.state.load() == Down && !c.ctl.running
		c.ctl.retired = true
	case full && c.open && c.q.una == c.q.tail && c.ackNext == c.ackSent && c.link.InFlight() == 0:
		c.ctl.retired = true // and forgotten when it is down
		end = c.link
	}
	c.mu.Unlock()
	r.tell()
	switch {
	case forget:
		c.m.forget(c)
	case end != nil:
		end.Fail(errIdle)
	}
}

// forget takes back a connection that a peer asked for and nobody here has heard of, and that was never completed or has retired: a
// REQ costs its sender nothing, so it must not cost us anything that stays.
func (m *Manager) forget(c *Conn) {
	if !m.remove(c) {
		return
	}
	defer m.wg.Done()
	c.mu.Lock()
	c.stopTimersLocked()
	c.q.trim()
	c.mu.Unlock()
	m.cfg.Sink.ConnGone(c)
}

// remove takes c out of all tables, unless it is of use to somebody.
func (m *Manager) remove(c *Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := key{c.local, c.remote, c.tos}
	if m.closed || m.byKey[k] != c || c.named.Load() {
		return false
	}
	c.mu.Lock()
	unused := (c.ctl.established == 0 || c.ctl.retired) && !c.ctl.running && c.ctl.req == nil && c.state.load() == Down && c.q.una == c.q.tail && !c.ctl.keep
	was := c.ctl.established > 0
	if unused {
		c.closed, c.ctl.closing = true, true
	}
	c.mu.Unlock()
	if !unused {
		return false
	}
	m.wg.Add(1) // until forget is through with it
	if was {
		m.count.connsRetired.Inc()
	}
	m.traces.put(k, c.rx.peerInc, c.rx.expected, maxTraces)
	delete(m.byKey, k)
	c.peer.conns--
	if c.peer.asked--; c.peer.conns == 0 {
		delete(m.peers, pair{c.local, c.remote})
	}
	c.site.mu.Lock()
	c.site.conns = slices.DeleteFunc(slices.Clone(c.site.conns), func(x *Conn) bool { return x == c }) // a pusher may be reading the old one
	c.site.mu.Unlock()
	return true
}
