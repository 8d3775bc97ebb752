package conn

import (
	"context"
	"errors"
	"slices"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/conn/ib"
)

// ErrPeerDead: nothing was heard from the peer for the dead-peer time, not even an answer to a ping.
var ErrPeerDead = errors.New("no sign of life from the peer")

// pings are those of ours that were not answered yet, in order; the peer answers in order, but need not answer each: it has a bound and a
// rate, and says nothing to a congested port. Guarded by Conn.mu.
type pings struct {
	waiting []sentPing
	late    int // those nobody waits for any more, whose pongs may still come
}

type sentPing struct {
	*ping // nil: a heartbeat
	seq   uint64
}

// forget takes those out that nobody waits for any more.
func (ps *pings) forget(which func(sentPing) bool) {
	n := len(ps.waiting)
	ps.waiting = slices.DeleteFunc(ps.waiting, which)
	ps.late = min(ps.late+n-len(ps.waiting), maxPings)
}

// forgetBeats is forget for heartbeats below una. A pong comes with the acknowledgement of its ping, or before it, unless it has to wait
// behind other messages.
func (ps *pings) forgetBeats(una uint64) {
	ps.forget(func(p sentPing) bool { return p.ping == nil && p.seq < una })
}

// asking reports whether there is one that has not even been acknowledged.
func (ps *pings) asking(una uint64) bool {
	n := len(ps.waiting)
	return n > 0 && ps.waiting[n-1].seq >= una
}

type ping struct {
	sent time.Time
	done chan time.Duration // buffered
}

// maxPings bounds pings in flight.
const maxPings = 64

// Ping sends an RDS ping and returns the time until its pong. It starts connecting if the connection is
// down, and the time then includes that. ErrNoMemory with 64 of them under way.
func (c *Conn) Ping(ctx context.Context) (time.Duration, error) {
	p := &ping{sent: time.Now(), done: make(chan time.Duration, 1)}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, ErrClosed
	}
	if !c.pingLocked(p) {
		c.mu.Unlock()
		c.m.count.pingsRefused.Inc()
		return 0, ErrNoMemory
	}
	c.flush = true
	if !c.up {
		c.kickLocked()
	}
	c.transmitLocked()
	for {
		select {
		case d := <-p.done:
			return d, nil
		default:
		}
		if !c.m.Progress() {
			break
		}
	}
	select {
	case d := <-p.done:
		return d, nil
	case <-c.m.done:
		return 0, ErrClosed
	case <-ctx.Done():
		c.mu.Lock()
		c.pings.forget(func(w sentPing) bool { return w.ping == p }) // the next pong is not this one's
		c.mu.Unlock()
		return 0, ctx.Err()
	}
}

// pingLocked queues a ping that asks for an acknowledgement too. p may be nil.
func (c *Conn) pingLocked(p *ping) bool {
	if c.pings.forgetBeats(c.q.una); len(c.pings.waiting) >= maxPings { // the next pong is not theirs
		return false
	}
	var o Owner
	if p == nil {
		o = &c.beat
	}
	seq, _, ok := c.q.append(o, PingSourcePort, 0, 0, c.ackNext, msgAckNow, nil)
	if !ok {
		return false
	}
	c.sendQueued++
	c.m.count.sendPong.Inc()
	c.pings.waiting = append(c.pings.waiting, sentPing{p, seq})
	return true
}

// takePong reports whether a pong is the answer to a ping of ours, and takes it. Receive handler.
func (c *Conn) takePong() bool {
	c.mu.Lock()
	w := c.pings.waiting
	if len(w) == 0 {
		late := c.pings.late > 0
		if late {
			c.pings.late--
		}
		c.mu.Unlock()
		return late
	}
	p := w[0].ping
	c.pings.waiting = slices.Delete(w, 0, 1)
	c.mu.Unlock()
	if p != nil {
		p.done <- time.Since(p.sent)
	}
	return true
}

// pongs are the answers we owe or have sent. They are charged to no socket, so they have a bound
// and a rate of their own (rds-protocol spec 2.6, 8.3).
type pongs struct {
	out    atomic.Int32 // queued or not acknowledged
	tokens float64      // receive handler's
	last   time.Time
}

// Released implements Owner.
func (p *pongs) Released(msgs, bytes int, _ bool) { p.out.Sub(int32(msgs)) }

const (
	maxPongs     = 256  // not acknowledged, per connection
	pongRate     = 4096 // per second and connection
	pongBurst    = 256
	pongsPerTick = float64(pongRate) / float64(time.Second)
)

// pong answers a ping from port. Receive handler.
func (c *Conn) pong(port uint16) {
	p := &c.rx.pongs
	now := time.Now()
	p.tokens = min(pongBurst, p.tokens+float64(now.Sub(p.last))*pongsPerTick)
	p.last = now
	if p.tokens < 1 || p.out.Load() >= maxPongs || c.peer.cong.test(port) {
		c.m.count.pongDropped.Inc()
		return
	}
	c.mu.Lock()
	_, _, ok := c.q.append(p, 0, port, 0, c.ackNext, 0, nil)
	if ok {
		c.sendQueued++
	}
	c.mu.Unlock()
	if !ok {
		c.m.count.pongDropped.Inc()
		return
	}
	p.tokens--
	p.out.Inc()
	c.m.count.sendPong.Inc()
}

// heartbeat watches a connection that is up. Guarded by Conn.mu.
type heartbeat struct {
	heard  bool      // something arrived since the last look
	looked time.Time // when that was, or the connection came up
	since  time.Time // of the look before something was last heard
	silent int       // looks in a row at which nothing had
	una    uint64    // head of the queue at the last look
}

// lastHeard is when the peer gave a sign of life, or at most a look earlier.
func (b *heartbeat) lastHeard() time.Time {
	if b.heard {
		return b.looked
	}
	return b.since
}

// Released implements Owner: heartbeats are their own, so that they can be taken back.
func (b *heartbeat) Released(msgs, bytes int, _ bool) {}

// dropBeatsLocked takes the heartbeats of a connection that is gone out of the queue: they are no reason to
// connect again.
func (c *Conn) dropBeatsLocked() {
	var r released
	for from := c.q.una; from != c.q.tail; {
		from, _ = c.q.cancelRange(&c.beat, -1, from, &r)
	}
	c.pings.forgetBeats(c.q.tail)
}

// armTickLocked starts the heartbeat, or keeps it going.
func (c *Conn) armTickLocked() {
	if c.m.cfg.HeartbeatIdle < 0 {
		return
	}
	if c.tick == nil {
		c.tick = time.AfterFunc(c.m.cfg.HeartbeatIdle, c.look)
	} else {
		c.tick.Reset(c.m.cfg.HeartbeatIdle)
	}
}

// look is the heartbeat: a ping if nothing arrived since the last look, and the end of the connection
// if nothing did for three quarters of the dead-peer time. Looks are at most a quarter of it apart, so a peer
// is declared dead in time. An idle queue gives its memory back.
func (c *Conn) look() {
	c.mu.Lock()
	if !c.up {
		c.mu.Unlock()
		return
	}
	b := &c.beat
	l := c.link
	select {
	case <-l.Done():
		c.mu.Unlock()
		l.Fail(ib.ErrPeerClosed) // the event that says so is on its way
		return
	default:
	}
	l.Device().Refill()
	now := time.Now()
	if b.heard {
		b.heard, b.silent, b.since = false, 0, b.looked
	} else {
		b.silent++
	}
	if time.Duration(b.silent)*c.m.cfg.HeartbeatIdle >= c.m.cfg.DeadAfter*3/4 {
		c.mu.Unlock()
		c.m.count.heartbeatTimeouts.Inc()
		l.Fail(ErrPeerDead)
		return
	}
	c.age()
	if c.q.una == c.q.tail && c.q.una == b.una {
		c.q.trim()
		c.peer.cong.trim()
	}
	b.una, b.looked = c.q.una, now
	c.armTickLocked()
	if b.silent > 0 && !c.pings.asking(c.q.una) && c.pingLocked(nil) {
		c.m.count.heartbeatsSent.Inc()
		c.flush = true
	}
	c.transmitLocked() // also what waited for memory
}
