package conn

import (
	"net/netip"
	"time"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/verbs"
)

// request is a peer's REQ on its way to the control side of a connection.
type request struct {
	verbs.ConnRequest
	hello    ib.Hello
	answered chan struct{} // closed when it has been accepted, refused, or given up
}

// rejectData is the private data of our rejects: the int 1, "try again", as an x86 kernel writes it. A
// kernel that is told a larger number stays in connecting for good (rds-protocol spec 3.4).
var rejectData = [4]byte{1, 0, 0, 0}

func (r *request) refuse() {
	_ = r.Reject(rejectData[:])
	close(r.answered)
}

// acceptTimeout bounds how long the peer may take to send RTU or data after our REP.
const acceptTimeout = 3 * time.Second

// request handles a REQ to the listener of s. It runs on a goroutine of the provider, which bounds
// how many there are.
func (m *Manager) request(s *site, req verbs.ConnRequest) {
	remote := req.Remote().Addr().Unmap()
	refuse := func(what string, err error) {
		m.count.acceptRejected.Inc()
		m.log.Debug("request refused", "local", s.addr, "remote", remote, "why", what, "err", err)
		_ = req.Reject(rejectData[:])
	}
	hello, err := ib.ParseREQ(req.Info().PrivateData, remote, s.addr)
	if err != nil {
		m.count.acceptBadPrivate.Inc()
		refuse("private data", err)
		return
	}
	if m.cfg.Dialect == DialectKernelOnly {
		hello.Ours, hello.MarkFollows = false, false
	}
	c, err := m.create(key{s.addr, remote, hello.TOS}, false)
	if err != nil {
		if err == ErrTooManyConns {
			m.count.requestsTooMany.Inc()
		}
		refuse("no connection", err)
		return
	}
	r := &request{ConnRequest: req, hello: hello, answered: make(chan struct{})}
	if why := c.offer(r); why != "" {
		refuse(why, nil)
		m.forget(c)
		return
	}
	select {
	case <-r.answered:
	case <-m.done:
	}
}

// offer hands a request to the control side, or says why not. What becomes of it depends on the state (rds-protocol spec
// 3.4):
//
//	down                    accepted
//	connecting, our REQ     a duel: to one of ours, the REQ of the lower address wins; a kernel refuses our
//	                        REQ anyway, so its own is accepted and ours is cancelled first
//	connecting, accepting   the peer has given up its earlier REQ: the new one counts
//	up                      the peer has lost the old connection: down, then accepted
//	error, disconnecting    accepted when down
//
// A request that the network has kept until a later one was settled (rdshdr.Mark.Attempt) means nothing, and ends nothing. A peer
// in penalty is refused: it overran its bound.
func (c *Conn) offer(r *request) (refused string) {
	k := &c.m.count
	if c.peer.penaltyLeft(time.Now()) > 0 {
		return "penalty"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctl.closing {
		return "closing"
	}
	if c.lateLocked(&r.hello) {
		k.requestsLate.Inc()
		return "late"
	}
	switch a := c.ctl.attempt; {
	case a != nil && a.ours:
		k.connectRaced.Inc()
		if r.hello.Ours && c.m.cfg.Dialect == DialectOpen && lower(c.local, c.remote) {
			return "our request wins"
		}
		a.cancel(errAbandoned)
	case a != nil:
		k.connectRaced.Inc()
		a.cancel(errStale)
	case c.state.load() == Up:
		k.listenStale.Inc()
	}
	if old := c.ctl.req; old != nil {
		close(old.answered) // its handler returns, and that refuses it
	}
	c.ctl.req = r
	c.kickLocked()
	return ""
}

// lateLocked reports whether a request was made before the one that has settled what it is about: what is up, what is being accepted, what
// waits to be.
func (c *Conn) lateLocked(h *ib.Hello) bool {
	if !h.Ours || c.m.cfg.Dialect != DialectOpen {
		return false
	}
	known := !h.MarkFollows // it says which process it is of
	var than *ib.Hello
	switch a := c.ctl.attempt; {
	case c.ctl.req != nil:
		than = &c.ctl.req.hello
	case a != nil && !a.ours:
		than = &a.hello
	case a == nil && c.state.load() == Up && c.ctl.theirInc != 0:
		if known && h.Mark.Incarnation != c.ctl.theirInc {
			return h.Mark.Incarnation == c.peer.formerly.Load()
		}
		return notAfter(h.Mark.Attempt, c.ctl.theirTry)
	}
	return than != nil && than.Ours && than.Mark.Incarnation == h.Mark.Incarnation && notAfter(h.Mark.Attempt, than.Mark.Attempt)
}

// notAfter compares the numbers of attempts. Only so many before are taken for such: a process that has begun anew, whose IPv6 REQ does not
// say so, begins anywhere.
func notAfter(n, than uint16) bool { return than-n < lateAttempts }

// lateAttempts is how many attempts the network may hold back: at most one every few milliseconds, and after a second one a second.
const lateAttempts = 64

// lower compares addresses as 128-bit numbers (rds-protocol spec 1.1).
func lower(a, b netip.Addr) bool {
	x, y := a.As16(), b.As16()
	return string(x[:]) < string(y[:])
}

// accept answers r: down to connecting to up, or to error.
func (c *Conn) accept(r *request) {
	m := c.m
	defer close(r.answered) // a request that is not answered by then is refused by the provider
	if !c.state.move(Down, Connecting) {
		return
	}
	ctx, end := c.begin(r, acceptTimeout)
	defer end()
	kind := ibdev.Small
	if r.hello.Ours {
		kind = ibdev.Large
	}
	l, err := c.newLink(ctx, kind)
	if err == nil {
		// The receive side is ready before anything can come.
		if r.hello.MarkFollows {
			c.awaitMark()
		} else {
			err = c.know(l, r.hello.Ours, &r.hello.Mark)
		}
	}
	if err == nil {
		h := c.hello(l)
		if !r.hello.Ours {
			h.Ours = false // a kernel would not look, but need not see it
		}
		err = l.Accept(ctx, r, h.AppendREP(nil))
	}
	if err == nil {
		err = c.establish(ctx, l, &r.hello, r.Info(), false)
	}
	if err != nil {
		m.count.acceptRejected.Inc()
		c.attemptFailed(ctx, l, err)
	}
}

// awaitMark prepares the receive side for a peer whose mark is its first SEND.
func (c *Conn) awaitMark() {
	c.rx.ready, c.rx.wantMark, c.rx.open = true, true, true
	c.mu.Lock()
	c.ctl.markKnown = make(chan struct{})
	c.mu.Unlock()
}
