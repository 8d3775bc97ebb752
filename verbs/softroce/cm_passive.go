package softroce

import (
	"context"
	"fmt"
	"net/netip"
	"sync"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// cmListener is a verbs.Listener.
type cmListener struct {
	m       *connManager
	port    uint16
	handler func(verbs.ConnRequest)
	wg      sync.WaitGroup // handlers
}

// listen implements Device.Listen.
func (m *connManager) listen(port uint16, handler func(verbs.ConnRequest)) (verbs.Listener, error) {
	if port == 0 || handler == nil {
		return nil, fmt.Errorf("listen on port %d: a port and a handler: %w", port, verbs.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fmt.Errorf("listen on port %d: %w", port, verbs.ErrClosed)
	}
	if m.listeners[port] != nil {
		return nil, fmt.Errorf("listen: %w", &verbs.BusyError{
			Object: netip.AddrPortFrom(m.addr, port).String(), Holders: []string{"another listener"},
		})
	}
	l := &cmListener{m: m, port: port, handler: handler}
	m.listeners[port] = l
	return l, nil
}

// Close implements verbs.Listener: requests that wait for an answer, and those in Accept, are rejected.
func (l *cmListener) Close() error {
	m := l.m
	m.mu.Lock()
	if m.listeners[l.port] == l {
		delete(m.listeners, l.port)
		for _, c := range m.sortedLocked() {
			if c.listener == l && c.passivePending() {
				m.abandonLocked(c, verbs.ErrClosed)
			}
		}
	}
	m.unlock()
	l.wg.Wait()
	return nil
}

// passivePending reports whether c is a passive handshake in progress.
func (c *cmConn) passivePending() bool {
	return c.unanswered() || c.state == cmRepSent || c.state == cmMRARepRcvd
}

// unanswered reports whether c is a request that the application may still answer.
func (c *cmConn) unanswered() bool { return c.state == cmReqRcvd || c.state == cmMRAReqSent }

// handleREQLocked is a REQ from address from (rocev2 spec 7.7, 7.9). What a peer can make us keep is
// bounded by the places of handshakes in progress; everything refused before is answered from the REQ alone.
func (m *connManager) handleREQLocked(from netip.Addr, b []byte) {
	var req cmwire.REQ
	src := from.WithZone("")
	if req.Decode(b) != nil || req.LocalCommID == 0 || req.LocalQPN <= gsiQPN || req.LocalQPN == 0xFFFFFF {
		m.stats.add(cmMalformed)
		return
	}
	if c := m.byPeerID[cmPeerID{src, req.LocalCAGUID, req.LocalCommID}]; c != nil {
		m.handleDupREQLocked(c, from, &req)
		return
	}
	if old := m.byPeerQPN[cmPeerQPN{src, req.LocalCAGUID, verbs.QPN(req.LocalQPN)}]; old != nil {
		m.supersedeLocked(old)
		m.rejectREQLocked(from, &req, cmwire.RejStaleConn, nil)
		return
	}
	space, port, ok := cmwire.SplitServiceID(req.ServiceID)
	l := m.listeners[port]
	if !ok || space != cmwire.PortSpaceTCP || l == nil {
		m.stats.add(cmREQNoListener)
		m.rejectREQLocked(from, &req, cmwire.RejInvalidServiceID, nil)
		return
	}
	var cma cmwire.CMAHeader
	gid := cmwire.GIDOf(m.addr.WithZone(""))
	bad := cmwire.Reason(0)
	switch {
	case req.PKey&0x7FFF != roce.DefaultPKey&0x7FFF, req.Primary.LocalGID != cmwire.GIDOf(src), req.Primary.RemoteGID != gid:
		bad = cmwire.RejInvalidGID
	case req.TransportType != cmwire.TransportRC:
		bad = cmwire.RejInvalidTransport
	case cma.Decode(req.PrivateData[:]) != nil, cma.Dst != m.addr.WithZone(""), cma.Src.Is4() != src.Is4():
		bad = cmwire.RejConsumer
	}
	if bad != 0 {
		m.stats.add(cmREQBadPath)
		var info []byte
		if bad == cmwire.RejInvalidGID {
			info = gid[:]
		}
		m.rejectREQLocked(from, &req, bad, info)
		return
	}
	mtu := verbs.MTU(req.PathMTU)
	if ours := m.host.pathMTU(from); mtu.Bytes() == 0 || mtu > ours {
		// The information is our own convention, for our own active side: kernels do not send 26.
		m.stats.add(cmREQBadMTU)
		m.rejectREQLocked(from, &req, cmwire.RejInvalidMTU, []byte{uint8(ours)})
		return
	}
	// A REQ that is dropped comes again, and by then there may be room.
	switch {
	case m.pending[src] >= cmMaxPerSource:
		m.stats.add(cmREQOverSource)
		return
	case m.nPending >= cmMaxPending, m.lingering >= cmMaxLingering:
		m.stats.add(cmREQOverTotal)
		return
	}

	m.stats.add(cmREQs)
	c := m.newConnLocked(false, netip.AddrPortFrom(m.addr, port), netip.AddrPortFrom(from, cma.SrcPort))
	c.state = cmReqRcvd
	c.tid, c.req, c.listener = req.TID, req, l
	c.maxTries = int(req.MaxCMRetries)
	c.setTimes(req.Primary.AckTimeout)
	c.info = verbs.Connected{
		PrivateData:        append([]byte(nil), req.PrivateData[cmwire.CMAHeaderLen:]...),
		ResponderResources: req.ResponderResources,
		InitiatorDepth:     req.InitiatorDepth,
		PathMTU:            mtu,
	}
	m.meetPeerLocked(c, req.LocalCommID, req.LocalCAGUID, verbs.QPN(req.LocalQPN))
	c.slot = true
	m.pending[src]++
	m.nPending++
	m.wg.Add(1)
	l.wg.Add(1)
	go l.serve(c)
}

// handleDupREQLocked is a REQ we have seen (rocev2 spec 7.9).
func (m *connManager) handleDupREQLocked(c *cmConn, from netip.Addr, req *cmwire.REQ) {
	m.stats.add(cmDupREQ)
	switch c.state {
	case cmReqRcvd, cmMRAReqSent:
		if c.delivered {
			c.state = cmMRAReqSent
			m.sendMRALocked(c, cmwire.ForREQ)
		}
	case cmRepSent, cmMRARepRcvd:
		// The peer has not seen our REP. Its timer goes on.
		m.stats.add(cmRetransmits)
		m.sendLocked(from, &c.out)
	case cmTimewait:
		m.rejectREQLocked(from, req, cmwire.RejStaleConn, nil)
	}
}

// supersedeLocked ends a connection whose peer uses its QP for another: the peer has lost it.
func (m *connManager) supersedeLocked(c *cmConn) {
	m.stats.add(cmStale)
	if c.state == cmEstab {
		m.enterDreqSentLocked(c)
		return
	}
	// A handshake that the peer no longer knows of. Nothing is said to it: it hears of the new one.
	c.failLocked(verbs.ErrStaleConn)
	m.goneLocked(c)
}

// serve runs the handler for one request.
func (l *cmListener) serve(c *cmConn) {
	m := l.m
	defer m.wg.Done()
	defer l.wg.Done()
	m.mu.Lock()
	live := c.unanswered()
	c.delivered = true
	m.unlock()
	if live {
		l.handler(&cmRequest{c})
	}
	m.mu.Lock()
	defer m.unlock()
	c.returned = true
	if c.unanswered() && !c.answering {
		m.abandonLocked(c, verbs.ErrClosed)
	}
	if !c.passivePending() {
		m.dropSlotLocked(c)
	}
}

// cmRequest is a verbs.ConnRequest.
type cmRequest struct{ c *cmConn }

// Remote implements verbs.ConnRequest.
func (r *cmRequest) Remote() netip.AddrPort { return r.c.remote }

// Local implements verbs.ConnRequest.
func (r *cmRequest) Local() netip.AddrPort { return r.c.local }

// Info implements verbs.ConnRequest.
func (r *cmRequest) Info() verbs.Connected { return r.c.info }

// answerableLocked says why r cannot be answered, if so.
func (r *cmRequest) answerableLocked() error {
	switch c := r.c; {
	case c.err != nil:
		return c.err // withdrawn by the peer, superseded, or the listener was closed
	case c.answering || !c.unanswered():
		return fmt.Errorf("already answered: %w", verbs.ErrInvalid)
	}
	return nil
}

// Reject implements verbs.ConnRequest.
func (r *cmRequest) Reject(privateData []byte) error {
	c, m := r.c, r.c.m
	if len(privateData) > cmPrivateREJ {
		return fmt.Errorf("reject: %d bytes of private data, at most %d: %w", len(privateData), cmPrivateREJ, verbs.ErrInvalid)
	}
	m.mu.Lock()
	defer m.unlock()
	if err := r.answerableLocked(); err != nil {
		return fmt.Errorf("reject: %w", err)
	}
	m.putREJLocked(c, cmwire.ForREQ, cmwire.RejConsumer, privateData)
	m.sendLocked(c.remote.Addr(), &c.out)
	m.goneLocked(c)
	return nil
}

// Accept implements verbs.ConnRequest. After an error that comes before the REP was sent (of
// prepare, or of qp), the request may still be rejected.
func (r *cmRequest) Accept(ctx context.Context, qp verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, error) {
	c := r.c
	if err := r.accept(ctx, qp, &p, prepare); err != nil {
		return nil, fmt.Errorf("accept %v: %w", c.remote, err)
	}
	return c, nil
}

func (r *cmRequest) accept(ctx context.Context, qp verbs.QP, p *verbs.ConnParam, prepare func() error) error {
	c, m := r.c, r.c.m
	if err := checkConnParam(qp, p, cmPrivateREP); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	if err := r.answerableLocked(); err != nil {
		m.unlock()
		return err
	}
	c.answering = true
	rqPSN := m.rng.Uint32N(1 << 24)
	m.unlock()

	// 1. The QP goes to RTS before REP, as Linux' does: the peer may send as soon as it has the REP, and
	// its RTU may be lost.
	res, depth := min(p.ResponderResources, c.req.InitiatorDepth), min(p.InitiatorDepth, c.req.ResponderResources)
	err := r.prepareQP(qp, p, prepare, res, depth, rqPSN)

	// 2. REP, unless the peer took the REQ back meanwhile, or the listener was closed.
	m.mu.Lock()
	c.answering = false
	if err == nil && !c.unanswered() {
		err = c.err
	}
	if err != nil {
		if c.returned && c.unanswered() {
			m.abandonLocked(c, err) // nobody is left to answer
		}
		m.unlock()
		qpFail(qp)
		return err
	}
	c.qp, c.qpn = qp, qp.Num()
	c.state = cmRepSent
	m.holdQPNLocked(c)
	m.putREP(c, p, res, depth, rqPSN)
	m.transmitLocked(c)
	m.unlock()

	// 3. RTU, or data in its place, or the end. What is here already beats a cancelled context.
	select {
	case <-c.answer:
	case <-ctx.Done():
	}
	m.mu.Lock()
	if c.state == cmRepSent || c.state == cmMRARepRcvd {
		m.abandonLocked(c, ctx.Err())
	}
	established, err := c.wasEstab, c.err
	m.unlock()
	if !established {
		qpFail(qp)
		return err
	}
	return nil
}

// prepareQP takes qp from RESET to RTS by what the REQ says (rocev2 spec 7.6).
func (r *cmRequest) prepareQP(qp verbs.QP, p *verbs.ConnParam, prepare func() error, res, depth uint8, rqPSN uint32) error {
	if err := qpToInit(qp, res); err != nil {
		return err
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			return err
		}
	}
	req := &r.c.req // does not change
	return qpToRTS(qp, verbs.QPAttr{
		AH:              verbs.AH{Remote: r.c.remote.Addr(), TrafficClass: req.Primary.TrafficClass},
		PathMTU:         verbs.MTU(req.PathMTU),
		DestQPN:         verbs.QPN(req.LocalQPN),
		RQPSN:           rqPSN,
		SQPSN:           req.StartingPSN,
		MaxDestRDAtomic: res,
		MaxRDAtomic:     depth,
		MinRNRTimer:     p.MinRNRTimer,
		Timeout:         req.Primary.AckTimeout,
		RetryCount:      req.RetryCount,
		RNRRetry:        req.RNRRetryCount,
	}, p.RNRRetryCount)
}
