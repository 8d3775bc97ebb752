package softroce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// Room for the application's private data in bytes (rocev2 spec 7.2).
const (
	cmPrivateREQ = 56
	cmPrivateREP = 196
	cmPrivateREJ = 148
)

// checkConnParam reports what the caller got wrong.
func checkConnParam(qp verbs.QP, p *verbs.ConnParam, room int) error {
	switch {
	case qp == nil || qp.Type() != verbs.RC:
		return fmt.Errorf("no RC queue pair: %w", verbs.ErrInvalid)
	case len(p.PrivateData) > room:
		return fmt.Errorf("%d bytes of private data, at most %d: %w", len(p.PrivateData), room, verbs.ErrInvalid)
	case p.RetryCount > 7 || p.RNRRetryCount > 7:
		return fmt.Errorf("retry counts %d and %d, at most 7: %w", p.RetryCount, p.RNRRetryCount, verbs.ErrInvalid)
	case p.AckTimeout > 31 || p.MinRNRTimer > 31:
		return fmt.Errorf("ACK timeout and RNR timer codes %d and %d, at most 31: %w", p.AckTimeout, p.MinRNRTimer, verbs.ErrInvalid)
	}
	return nil
}

// connect implements Device.Connect.
func (m *connManager) connect(ctx context.Context, remote netip.AddrPort, qp verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, verbs.Connected, error) {
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	c, err := m.dial(ctx, remote, qp, &p, prepare)
	if err != nil {
		return nil, verbs.Connected{}, fmt.Errorf("connect to %v: %w", remote, err)
	}
	return c, c.info, nil
}

func (m *connManager) dial(ctx context.Context, remote netip.AddrPort, qp verbs.QP, p *verbs.ConnParam, prepare func() error) (*cmConn, error) {
	if err := checkConnParam(qp, p, cmPrivateREQ); err != nil {
		return nil, err
	}
	if !remote.Addr().IsValid() || remote.Addr().Is4() != m.addr.Is4() || remote.Port() == 0 {
		return nil, fmt.Errorf("not an address and port of the family of %v: %w", m.addr, verbs.ErrInvalid)
	}
	mtu := m.host.pathMTU(remote.Addr())
	if mtu.Bytes() == 0 {
		return nil, fmt.Errorf("the link carries no path MTU: %w", verbs.ErrUnreachable)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := qpToInit(qp, p.ResponderResources); err != nil {
		return nil, err
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			qpFail(qp)
			return nil, err
		}
	}
	for {
		c, err := m.attempt(ctx, remote, qp, p, mtu)
		if err == nil {
			return c, nil
		}
		// Only the active side can choose a path MTU, so it has to come down when the passive
		// side's link carries less (rocev2 spec 1.7).
		var rej *verbs.RejectError
		if errors.As(err, &rej) && rej.Reason == uint16(cmwire.RejInvalidMTU) && mtu > verbs.MTU256 {
			mtu--
			if c.mtuHint != 0 {
				mtu = min(mtu, c.mtuHint)
			}
			continue
		}
		qpFail(qp)
		return nil, err
	}
}

// attempt is one exchange of REQ, REP and RTU with qp in INIT.
func (m *connManager) attempt(ctx context.Context, remote netip.AddrPort, qp verbs.QP, p *verbs.ConnParam, mtu verbs.MTU) (*cmConn, error) {
	ackTimeout := p.AckTimeout
	if ackTimeout == 0 {
		ackTimeout = verbs.DefaultAckTimeout
	}

	// 1. REQ. Its starting PSN is the one we expect to receive (rocev2 spec 7.6).
	m.mu.Lock()
	if m.closed {
		m.unlock()
		return nil, verbs.ErrClosed
	}
	// The port is decoration: nothing is bound to it. From the range for ephemeral ports.
	local := netip.AddrPortFrom(m.addr, 0xC000|uint16(m.rng.Uint32N(0x4000)))
	rqPSN := m.rng.Uint32N(1 << 24)
	c := m.newConnLocked(true, local, remote)
	c.tid = m.tid(c.id)
	c.qp, c.qpn = qp, qp.Num()
	c.setTimes(ackTimeout)
	c.maxTries = cmMaxRetries
	c.state = cmReqSent
	m.holdQPNLocked(c)
	m.putREQ(c, p, ackTimeout, mtu, rqPSN)
	m.transmitLocked(c)
	m.unlock()

	// 2. REP, or the end of the attempt. A REP that is here already beats a cancelled context.
	select {
	case <-c.answer:
	case <-ctx.Done():
	}
	m.mu.Lock()
	if c.state == cmReqSent || c.state == cmMRAReqRcvd {
		m.abandonLocked(c, ctx.Err())
	}
	rep, state, err := c.rep, c.state, c.err
	m.unlock()
	if state != cmRepRcvd {
		return c, err
	}

	// 3. The QP goes to RTS before RTU, so that the peer's first packets find it ready.
	err = qpToRTS(qp, verbs.QPAttr{
		AH:              verbs.AH{Remote: remote.Addr(), TrafficClass: p.TrafficClass},
		PathMTU:         mtu,
		DestQPN:         verbs.QPN(rep.LocalQPN),
		RQPSN:           rqPSN,
		SQPSN:           rep.StartingPSN,
		MaxDestRDAtomic: min(rep.InitiatorDepth, p.ResponderResources),
		MaxRDAtomic:     min(rep.ResponderResources, p.InitiatorDepth),
		MinRNRTimer:     p.MinRNRTimer,
		Timeout:         cmwire.AckTimeout(rep.TargetAckDelay, ackTimeout-1),
		RetryCount:      p.RetryCount,
		RNRRetry:        rep.RNRRetryCount,
	}, p.RNRRetryCount)

	// 4. RTU, unless the peer or the user took it back meanwhile.
	m.mu.Lock()
	defer m.unlock()
	if c.state != cmRepRcvd {
		return c, c.err
	}
	if err != nil {
		m.abandonLocked(c, err)
		return c, err
	}
	c.info = verbs.Connected{
		PrivateData:        append([]byte(nil), rep.PrivateData[:]...),
		ResponderResources: rep.ResponderResources,
		InitiatorDepth:     rep.InitiatorDepth,
		PathMTU:            mtu,
		PeerGUID:           rep.LocalCAGUID,
		PeerQPN:            verbs.QPN(rep.LocalQPN),
	}
	m.putRTULocked(c)
	m.sendLocked(remote.Addr(), &c.out)
	m.enterEstablishedLocked(c)
	return c, nil
}
