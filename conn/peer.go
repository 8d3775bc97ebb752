package conn

import (
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"
)

// Peer is what all connections of a pair of hosts share.
type Peer struct {
	m             *Manager
	local, remote netip.Addr
	conns         int // guarded by Manager.mu
	asked         int // of these, those only the peer has asked for; guarded by Manager.mu

	cong     peerMap
	inc      atomic.Uint64 // incarnation seen last, 0: none, or a kernel
	formerly atomic.Uint64 // the one before that
	kernel   atomic.Bool   // it answered without our mark: its QPs join the queue of small buffers

	mu      sync.Mutex
	up      int       // connections that are up
	since   time.Time // when it was first missed; zero: not missed
	down    bool      // reported
	penalty penalty
}

// penalty is how long a peer that overran its bound stays away.
type penalty struct {
	until time.Time
	next  time.Duration
}

// tell reports ports of the peer that are no longer congested.
func (p *Peer) tell(fell []uint16) {
	if len(fell) > 0 {
		p.m.cfg.Sink.PortsClear(p.local, p.remote, fell)
	}
}

// missing notes that there is no connection to the peer, and returns how long it has been without a sign of life.
func (p *Peer) missing(now time.Time) time.Duration { return p.missingSince(now, now) }

// missingSince is missing for one that was last heard at heard, or soon after.
func (p *Peer) missingSince(heard, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.up > 0 {
		return 0
	}
	if p.since.IsZero() {
		p.since = heard
	}
	return now.Sub(p.since)
}

// untilDead is how long the peer may go on being missed before it is to be reported. false: it need not be.
func (p *Peer) untilDead(now time.Time) (time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.up > 0 || p.down || p.since.IsZero() {
		return 0, false
	}
	return p.m.cfg.DeadAfter - now.Sub(p.since), true
}

// pardon forgets for how long the peer has been missed: that it was not reached was not its fault.
func (p *Peer) pardon() {
	p.mu.Lock()
	p.since = time.Time{}
	p.mu.Unlock()
}

// isDown reports the peer down, once.
func (p *Peer) isDown() {
	p.mu.Lock()
	first := !p.down && p.up == 0
	if first {
		p.down = true
	}
	p.mu.Unlock()
	if !first {
		return
	}
	p.m.count.peersDown.Inc()
	p.m.log.Debug("peer is down", "local", p.local, "remote", p.remote)
	// Nobody knows any more what is congested there: writers may queue again.
	p.tell(p.cong.clear())
	p.m.cfg.Sink.PeerDown(p.local, p.remote)
}

// connected notes that a connection is up, lost that it no longer is.
func (p *Peer) connected() {
	p.mu.Lock()
	p.up++
	p.since = time.Time{}
	was := p.down
	p.down = false
	p.mu.Unlock()
	if was {
		p.m.log.Debug("peer is up", "local", p.local, "remote", p.remote)
		p.m.cfg.Sink.PeerUp(p.local, p.remote)
	}
}

func (p *Peer) lost() {
	p.mu.Lock()
	p.up--
	p.mu.Unlock()
}

// met takes the incarnation of the peer, and reports whether it is another one than before.
func (p *Peer) met(inc uint64) {
	old := p.inc.Swap(inc)
	if old != inc && old != 0 {
		p.formerly.Store(old)
		p.m.count.peerRestarted.Inc()
		// The old one's map says nothing about the new one (rds-protocol spec 2.7).
		p.tell(p.cong.clear())
	}
}

// penalise keeps the peer away for a time that doubles when it comes back and does it again.
func (p *Peer) penalise(now time.Time, least, most time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.After(p.penalty.until.Add(10 * most)) {
		p.penalty.next = least
	}
	p.penalty.until = now.Add(p.penalty.next)
	p.penalty.next = min(2*p.penalty.next, most)
}

// penaltyLeft is how long the peer has still to stay away.
func (p *Peer) penaltyLeft(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(0, p.penalty.until.Sub(now))
}
