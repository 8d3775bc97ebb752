package conn

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
)

var (
	errStale     = errors.New("the peer asked for a new connection")
	errAbandoned = errors.New("attempt abandoned for the peer's")
	errClosing   = errors.New("manager closed")
	errEndedSoon = errors.New("connection ended while it was being established")
	errSmallSend = errors.New("the peer takes SENDs that are too small")
)

// control is the control side of a connection: one goroutine (Conn.control) that exists while there is
// something to connect, accept or shut down. Others leave notes here and wake it. Guarded by
// Conn.mu.
type control struct {
	running bool
	wake    chan struct{} // one slot: interrupts waiting
	req     *request      // of the peer, to be accepted
	keep    bool          // reconnect although nothing is queued
	retired bool          // not used any more, and by nobody: to be forgotten when down
	closing bool          // shut down, and stay so
	stopped chan struct{} // closed when the control side has ended for good

	attempt *attempt // in progress
	tries   uint16   // number of our latest REQ; written by the control side only, which reads it without the lock

	// The peer's incarnation, 0 a kernel, and its latest REQ, when the connection was last established: what comes late of those up to it means
	// nothing. Peer.inc may be a later one's, which another type of service has met.
	theirInc uint64
	theirTry uint16

	tryAt   time.Time     // no attempt of ours before that
	backoff time.Duration // upper limit of the next delay; 0: none yet, try at once

	wasUp       bool // and shutdown has still to account for that
	lastErr     error
	peerQPN     verbs.QPN
	established uint64
	drained     chan struct{} // closed when the queue is empty: linger
	copied      chan struct{} // closed when no payload is being copied
	theirMark   rdshdr.Mark   // arrived as a SEND: IPv6
	markKnown   chan struct{} // closed when it has
}

// attempt is a connect or an accept in progress.
type attempt struct {
	ours   bool     // our REQ
	hello  ib.Hello // of the peer's
	cancel context.CancelCauseFunc
}

// kickLocked starts the control side, or tells it to look again.
func (c *Conn) kickLocked() {
	if !c.ctl.running {
		if c.ctl.stopped != nil && isClosedChan(c.ctl.stopped) {
			return
		}
		c.ctl.running = true
		go c.control()
		return
	}
	select {
	case c.ctl.wake <- struct{}{}:
	default:
	}
}

func isClosedChan(ch chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// control does what there is to do, in this order: shut down what has failed, accept what the peer wants, connect if
// we want to. It ends when there is nothing.
func (c *Conn) control() {
	for {
		c.mu.Lock()
		state := c.state.load()
		switch {
		case state == Error:
			c.mu.Unlock()
			c.shutdown()
		case state == Up && c.ctl.closing:
			c.mu.Unlock()
			c.failLink(errClosing)
			c.pause(failPause)
		case state == Up && c.ctl.req != nil:
			// The peer has lost what we think is up.
			c.mu.Unlock()
			c.failLink(errStale)
			c.pause(failPause)
		case c.ctl.closing:
			if r := c.ctl.req; r != nil {
				c.ctl.req = nil
				r.refuse()
			}
			c.ctl.running = false
			close(c.ctl.stopped)
			c.mu.Unlock()
			return
		case c.ctl.req != nil:
			r := c.ctl.req
			c.ctl.req = nil
			c.mu.Unlock()
			c.accept(r)
		case state == Up || !c.wantedLocked() || c.site.isAway(): // away: Conn.deviceBack starts us again
			c.ctl.running = false
			useless := c.ctl.established == 0 || c.ctl.retired
			c.mu.Unlock()
			if useless {
				c.m.forget(c)
			}
			return
		default:
			now := time.Now()
			wait := max(c.ctl.tryAt.Sub(now), c.peer.penaltyLeft(now))
			c.mu.Unlock()
			if left, due := c.peer.untilDead(now); due && left <= 0 {
				c.dead()
				continue
			} else if due && wait > left {
				wait = left
			}
			if wait > 0 {
				c.pause(wait)
				continue
			}
			c.connect()
		}
	}
}

// failPause is for a link that somebody else has found broken and is about to report.
const failPause = 10 * time.Millisecond

// pause waits, or until something happens.
func (c *Conn) pause(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.ctl.wake:
	}
}

// wantedLocked decides whether to connect: something is queued; somebody waits for it; or the connection was lost and the peer is not
// known to be dead; or a port there is congested, and writers wait for a map.
func (c *Conn) wantedLocked() bool {
	return c.q.una != c.q.tail || c.upWaiters > 0 || c.ctl.keep || c.peer.cong.count.Load() > 0 && c.named.Load()
}

// LinkBroken implements ib.Upper.
func (c *Conn) LinkBroken(l *ib.Link, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != l {
		return
	}
	c.ctl.lastErr = err
	if a := c.ctl.attempt; a != nil {
		a.cancel(err) // its goroutine moves the state
		return
	}
	if c.state.move(Up, Error) {
		c.up = false
		// The peer that closes an idle connection has its reasons, and comes back if it wants to.
		c.ctl.keep = !errors.Is(err, ib.ErrPeerClosed) && !errors.Is(err, errIdle)
		c.kickLocked()
	}
}

// failLink ends the current incarnation, if there is one. It may be called from handlers.
func (c *Conn) failLink(err error) {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if l != nil {
		l.Fail(err)
	}
}

// penalise is for a peer that has passed its bound. Receive handler.
func (c *Conn) penalise() {
	c.peer.penalise(time.Now(), c.m.cfg.BackoffMin*8, c.m.cfg.BackoffMax)
}

// begin notes an attempt, ours if r is nil. Its context ends after the timeout, or when somebody abandons it.
func (c *Conn) begin(r *request, timeout time.Duration) (context.Context, func()) {
	ctx, cancelTime := context.WithTimeout(context.Background(), timeout)
	ctx, cancel := context.WithCancelCause(ctx)
	c.mu.Lock()
	c.ctl.attempt = &attempt{ours: r == nil, cancel: cancel}
	if r != nil {
		c.ctl.attempt.hello = r.hello
	}
	abandoned := c.ctl.closing || c.ctl.req != nil
	c.mu.Unlock()
	if abandoned {
		cancel(errAbandoned)
	}
	return ctx, func() { cancel(nil); cancelTime() }
}

// newLink makes the incarnation of an attempt. Nothing comes from it before it is connected.
func (c *Conn) newLink(ctx context.Context, kind ibdev.RecvKind) (_ *ib.Link, err error) {
	d, err := c.site.device(ctx)
	if err != nil {
		if errors.Is(err, ErrNoDevice) {
			c.site.lost(nil)
		}
		return nil, err
	}
	defer func() {
		if err != nil && d.Gone() {
			c.site.lost(d)
		}
		d.Put()
	}()
	ring := c.m.cfg.SendRing
	if kind == ibdev.Small {
		ring = c.m.cfg.KernelSendRing
	}
	l, err := ib.NewLink(d, c.m.cfg.Slab, ib.Config{Ring: ring, Recv: kind, TOS: c.tos, Stats: &c.m.linkStats}, c.m.linkNumber(), c)
	if err != nil {
		return nil, err
	}
	c.rx.scr = c.m.scratchFor(d)
	c.mu.Lock()
	c.link = l
	c.mu.Unlock()
	return l, nil
}

// hello is what we say in REQ and REP.
func (c *Conn) hello(l *ib.Link) ib.Hello {
	h := ib.Hello{From: c.local, To: c.remote, TOS: c.tos}
	if c.rx.expected != 0 {
		h.AckSeq = c.rx.expected - 1
	}
	if c.m.cfg.Dialect == DialectOpen {
		h.Ours, h.Mark = true, c.mark(l)
	}
	return h
}

// connect makes one attempt of ours: down to connecting to up, or to down again.
func (c *Conn) connect() {
	m := c.m
	if !c.state.move(Down, Connecting) {
		return
	}
	timeout := m.cfg.ConnectTimeout
	if left := m.cfg.DeadAfter - c.peer.missing(time.Now()); left > 0 {
		timeout = min(timeout, left) // so that a dead peer is reported in time
	}
	c.mu.Lock()
	c.ctl.tries++
	c.mu.Unlock()
	ctx, end := c.begin(nil, timeout)
	defer end()
	kind := ibdev.Large
	if m.cfg.Dialect == DialectKernelOnly || c.peer.kernel.Load() {
		kind = ibdev.Small
	}
	l, err := c.newLink(ctx, kind)
	if err == nil {
		m.count.connectAttempts.Inc()
		h := c.hello(l)
		var info verbs.Connected
		info, err = l.Connect(ctx, netip.AddrPortFrom(c.remote, cmPort(c.remote)), h.AppendREQ(nil))
		if err == nil {
			h, err = ib.ParseREP(info.PrivateData, c.remote, c.local)
		}
		if err == nil && m.cfg.Dialect == DialectKernelOnly {
			h.Ours = false
		}
		if err == nil {
			err = c.establish(ctx, l, &h, info, true)
		}
	}
	if err == nil {
		return
	}
	var rej *verbs.RejectError
	if errors.As(err, &rej) {
		m.count.connectRejected.Inc()
	}
	if c.attemptFailed(ctx, l, err); c.site.isAway() {
		return
	}
	if c.peer.missing(time.Now()) >= m.cfg.DeadAfter {
		c.dead()
	}
}

// dead reports the peer, if nobody has, and gives up a connection that nobody needs.
func (c *Conn) dead() {
	c.peer.isDown()
	c.mu.Lock()
	c.ctl.keep = false
	c.mu.Unlock()
}

// attemptFailed moves connecting to error, and sets when to try again. An attempt that failed for want of a device says nothing
// about the peer.
func (c *Conn) attemptFailed(ctx context.Context, l *ib.Link, err error) {
	if l != nil && l.Device().Gone() {
		c.site.lost(l.Device())
	}
	if c.site.isAway() {
		c.peer.pardon()
	} else {
		c.m.count.connectFailed.Inc()
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.DeadlineExceeded) && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	c.m.log.Debug("connection attempt failed", "conn", c, "err", err)
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.ctl.attempt
	c.ctl.attempt = nil
	c.ctl.lastErr = err
	if a != nil && !a.ours && l != nil && (l.Device().Gone() || errors.Is(err, verbs.ErrDeviceGone)) {
		c.ctl.keep = true // the peer may take it for established, and hears nothing of its end but our request
	}
	var rej *verbs.RejectError
	if errors.As(err, &rej) && rej.Reason == consumerReject {
		// Most often the peer has just dropped a stale connection, or is about to connect itself: its REQ comes first,
		// since ours would end what it brings up (rds-protocol spec 3.4).
		c.ctl.backoff = max(c.ctl.backoff, rejectPatience*c.m.cfg.BackoffMin)
	}
	c.backOffLocked()
	c.state.move(Connecting, Error)
}

const (
	consumerReject = 28
	rejectPatience = 8
)

// backOffLocked sets the next attempt to a random time below a limit that doubles (rds-protocol spec 5.4).
func (c *Conn) backOffLocked() {
	cfg := &c.m.cfg
	c.ctl.backoff = max(c.ctl.backoff, cfg.BackoffMin)
	c.ctl.tryAt = time.Now().Add(c.m.upTo(c.ctl.backoff))
	c.ctl.backoff = min(2*c.ctl.backoff, cfg.BackoffMax)
}

// establish takes what the peer said and opens the data path. The QP is in RTS.
func (c *Conn) establish(ctx context.Context, l *ib.Link, h *ib.Hello, info verbs.Connected, active bool) error {
	m := c.m
	if !h.MarkFollows {
		// The active side may have received SENDs already, and kept them.
		var err error
		l.InRecv(func() { err = c.know(l, h.Ours, &h.Mark) })
		if err != nil {
			return err
		}
	} else {
		c.mu.Lock()
		known := c.ctl.markKnown
		c.mu.Unlock()
		select {
		case <-known:
			h.Mark = c.ctl.theirMark
		case <-ctx.Done():
			return errNoMark
		}
	}
	if h.Ours && h.Mark.Window > 0 {
		if err := l.SetWindow(int(h.Mark.Window)); err != nil {
			var state *verbs.StateError
			if errors.As(err, &state) {
				<-ctx.Done() // the QP is in ERR already, and what comes to tell us (LinkBroken) knows why
			}
			return err
		}
	}
	frag := rdshdr.FragLen
	if h.Ours {
		frag = 0
		if max := int(h.Mark.MaxSend); max < ibdev.MaxSend {
			if frag = max - hdrLen; frag < minSplit {
				return errSmallSend
			}
		}
	}
	var r released
	c.mu.Lock()
	if l.Broken() || !c.state.move(Connecting, Up) {
		c.mu.Unlock()
		return errEndedSoon
	}
	c.ctl.attempt, c.ctl.wasUp = nil, true
	c.open, c.frag = h.Ours, frag
	c.ctl.peerQPN = info.PeerQPN
	c.ctl.established++
	c.ctl.backoff, c.ctl.tryAt, c.ctl.keep, c.ctl.retired = 0, time.Time{}, false, false
	c.ctl.lastErr = nil
	c.asked = c.q.una
	c.markDue = active && h.Ours && c.remote.Is6()
	c.mapDue, c.mapKnown, c.mapDelta = true, false, 0
	c.ctl.theirInc, c.ctl.theirTry = 0, h.Mark.Attempt
	if h.Ours {
		c.ctl.theirInc = h.Mark.Incarnation
	}
	c.deltas = h.Ours && h.Mark.Flags&rdshdr.FlagDeltas != 0
	m.count.congQueued.Inc()
	if h.AckSeq != 0 {
		c.ackedLocked(h.AckSeq, &r)
	}
	c.beat = heartbeat{heard: true, una: c.q.una, looked: time.Now()}
	c.up = true
	c.wakeUpWaitLocked()
	c.armTickLocked()
	c.transmitLocked()
	r.tell()
	c.peer.kernel.Store(!h.Ours)
	c.peer.connected()
	if h.Ours {
		m.endOthers(c, h.Mark.Incarnation)
	}
	m.count.established.Inc()
	m.log.Debug("connection up", "conn", c, "kernel", !h.Ours, "active", active)
	return nil
}

// endOthers ends the connections of other types of service to the host of c that are with a process before the one that c has
// just been established with: it is gone, since there is one at a time, and they need not wait to find out.
func (m *Manager) endOthers(c *Conn, inc uint64) {
	var others []*Conn
	m.mu.RLock()
	for tos := 0; tos < 256 && c.peer.conns > 1; tos++ {
		if x := m.byKey[key{c.local, c.remote, uint8(tos)}]; x != nil && x != c {
			others = append(others, x)
		}
	}
	m.mu.RUnlock()
	for _, x := range others {
		x.mu.Lock()
		l, old := x.link, x.up && x.open && x.ctl.theirInc != inc && x.ctl.theirInc == x.peer.formerly.Load()
		x.mu.Unlock()
		if old {
			l.Fail(errStale)
		}
	}
}

// know tells the receive side who the peer is, and lets it process what it has kept. Receive handler, or with nothing coming yet.
func (c *Conn) know(l *ib.Link, open bool, mark *rdshdr.Mark) error {
	rx := &c.rx
	if open && mark.Incarnation == 0 {
		return errNoMark
	}
	if !rx.ready {
		c.meet(open, mark.Incarnation)
		rx.ready = true
	}
	early := rx.early
	rx.early = nil
	if len(early) == 0 {
		return nil
	}
	for _, e := range early {
		c.RecvSend(l, e.b, e.n)
	}
	c.BatchEnd(l, true)
	return nil
}

// meet sets the expected sequence for a peer. A kernel's incarnations cannot be told apart: its sequences go on,
// and what we acknowledge starts at nothing on every connection, since after a restart an old number would
// acknowledge new messages (rds-protocol spec 2.4, 5.6).
func (c *Conn) meet(open bool, inc uint64) {
	rx := &c.rx
	rx.open = open
	if open {
		c.peer.met(inc)
	} else {
		inc = 0
	}
	if inc != rx.peerInc {
		// Another process, or one dialect after the other: its sequences are new.
		rx.peerInc, rx.expected = inc, 0
	}
	rx.ack = 0
	if open && rx.expected != 0 {
		rx.ack = rx.expected - 1
	}
	rx.expectedSeen.Store(rx.expected)
	c.mu.Lock()
	c.ackNext, c.ackSent = rx.ack, rx.ack
	c.mu.Unlock()
}

// shutdown is error to disconnecting to down: the steps of rds-protocol spec 5.3.
func (c *Conn) shutdown() {
	m := c.m
	if !c.state.move(Error, Disconnecting) {
		return
	}
	// 1. The transmitter leaves and does not come back.
	c.mu.Lock()
	wasUp := c.ctl.wasUp
	quiet := c.ctl.closing && wasUp && !c.open // a kernel, which nobody will answer any more
	c.up = false
	l := c.link
	var idle chan struct{}
	if c.txBusy {
		if c.txIdle == nil {
			c.txIdle = make(chan struct{})
		}
		idle = c.txIdle
	}
	c.mu.Unlock()
	if idle != nil {
		<-idle
	}
	// 2. Drain the QP and destroy it. After that the receive handler has nothing of ours any more.
	if l != nil {
		if quiet {
			l.CloseQuietly()
		}
		if err := l.Close(m.cfg.DrainTimeout); err != nil {
			m.log.Warn("drain", "conn", c, "err", err)
		}
	}
	// 3. What was received by half is discarded.
	rx := &c.rx
	rx.part.drop()
	for _, e := range rx.early {
		e.b.Put()
	}
	rx.early = nil
	rx.ready, rx.wantMark, rx.dead, rx.mapKnown = false, false, false, false
	rx.gotAck, rx.got, rx.asked = false, false, 0
	// 4. What was posted and not acknowledged is to be sent again.
	c.mu.Lock()
	c.link = nil
	heard := time.Now()
	if wasUp && m.cfg.HeartbeatIdle > 0 {
		heard = c.beat.lastHeard()
	}
	if wasUp {
		c.q.rewind()
		c.dropBeatsLocked()
	}
	gone := l != nil && l.Device().Gone()
	if gone {
		c.ctl.keep = c.ctl.keep || wasUp // nobody wanted it to end
	}
	c.ackNow, c.flush, c.mapDue, c.markDue = false, false, false, false
	err := c.ctl.lastErr
	c.emptyLocked()
	c.mu.Unlock()
	if wasUp {
		m.count.connReset.Inc()
		c.peer.lost()
		if !gone {
			c.peer.missingSince(heard, time.Now())
		}
		if errors.Is(err, ErrPeerDead) {
			c.peer.isDown()
		}
		m.log.Debug("connection down", "conn", c, "err", err)
	}
	// 5. Down. Attempts that follow a connection that was up begin at once.
	c.mu.Lock()
	c.ctl.wasUp = false
	c.state.move(Disconnecting, Down)
	c.mu.Unlock()
}
