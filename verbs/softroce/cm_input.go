package softroce

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// What each message does (rocev2 spec 7.5, 7.9, 7.10). Messages are matched by communication IDs and
// source address, never by transaction ID.

// handleLocked is a MAD from address from that gsiCheck has let through.
func (m *connManager) handleLocked(from netip.Addr, mad *[madBytes]byte) {
	if m.closed {
		return
	}
	m.stats.add(cmRxMADs)
	h, err := cmwire.PeekHeader(mad[:])
	if err != nil {
		return
	}
	b := mad[:]
	switch h.Attr {
	case cmwire.AttrREQ:
		m.handleREQLocked(from, b)
	case cmwire.AttrMRA:
		m.handleMRALocked(from, b)
	case cmwire.AttrREJ:
		m.handleREJLocked(from, b)
	case cmwire.AttrREP:
		m.handleREPLocked(from, b)
	case cmwire.AttrRTU:
		m.handleRTULocked(from, b)
	case cmwire.AttrDREQ:
		m.handleDREQLocked(from, b)
	case cmwire.AttrDREP:
		m.handleDREPLocked(from, b)
	default:
		m.stats.add(cmIgnored)
	}
}

// byIDLocked finds the connection by our communication ID, if it is one with from.
func (m *connManager) byIDLocked(from netip.Addr, ours uint32) *cmConn {
	if c := m.conns[ours]; c != nil && c.remote.Addr().WithZone("") == from.WithZone("") {
		return c
	}
	return nil
}

// byBothLocked finds it by both IDs.
func (m *connManager) byBothLocked(from netip.Addr, ours, theirs uint32) *cmConn {
	if c := m.byIDLocked(from, ours); c != nil && c.havePeer && c.peerID == theirs {
		return c
	}
	return nil
}

func (m *connManager) handleREPLocked(from netip.Addr, b []byte) {
	var rep cmwire.REP
	if rep.Decode(b) != nil || rep.LocalCommID == 0 || rep.LocalQPN <= gsiQPN || rep.LocalQPN == 0xFFFFFF {
		m.stats.add(cmMalformed)
		return
	}
	c := m.byIDLocked(from, rep.RemoteCommID)
	switch {
	case c == nil || !c.active:
		m.stats.add(cmUnmatched)
		return
	case c.state == cmTimewait && c.aborted:
		// It answers an attempt we gave up, so our REJ was lost.
		m.stats.add(cmDupREP)
		m.sendLocked(from, &c.out)
		return
	case c.state != cmReqSent && c.state != cmMRAReqRcvd:
		if c.peerID != rep.LocalCommID {
			m.stats.add(cmUnmatched)
			return
		}
		m.stats.add(cmDupREP)
		switch c.state {
		case cmEstab:
			m.sendLocked(from, &c.out) // RTU
		case cmRepRcvd:
			m.sendMRALocked(c, cmwire.ForREP)
		}
		return
	}
	qpn := verbs.QPN(rep.LocalQPN)
	if old := m.byPeerQPN[cmPeerQPN{from.WithZone(""), rep.LocalCAGUID, qpn}]; old != nil {
		m.supersedeLocked(old)
		c.peerID = rep.LocalCommID
		m.putREJLocked(c, cmwire.ForREP, cmwire.RejStaleConn, nil)
		m.sendLocked(from, &c.out)
		c.failLocked(fmt.Errorf("%w: %w", errStaleQPN, verbs.ErrStaleConn))
		c.aborted = true
		m.lingerLocked(c, c.timewait)
		return
	}
	m.disarmLocked(c)
	c.state, c.rep = cmRepRcvd, rep
	m.meetPeerLocked(c, rep.LocalCommID, rep.LocalCAGUID, qpn)
	c.wakeLocked()
}

func (m *connManager) handleRTULocked(from netip.Addr, b []byte) {
	var rtu cmwire.RTU
	if rtu.Decode(b) != nil {
		return
	}
	c := m.byBothLocked(from, rtu.RemoteCommID, rtu.LocalCommID)
	switch {
	case c == nil:
	case c.state == cmRepSent || c.state == cmMRARepRcvd:
		m.enterEstablishedLocked(c)
		return
	case c.state == cmTimewait && c.aborted && !c.active:
		m.sendLocked(from, &c.out) // our REJ was lost
		return
	}
	m.stats.add(cmUnmatched)
}

func (m *connManager) handleMRALocked(from netip.Addr, b []byte) {
	var mra cmwire.MRA
	if mra.Decode(b) != nil {
		return
	}
	switch mra.Message {
	case cmwire.ForREQ:
		if c := m.byIDLocked(from, mra.RemoteCommID); c != nil && c.state == cmReqSent {
			m.stats.add(cmMRAReceived)
			c.state = cmMRAReqRcvd
			m.postponeLocked(c, mra.ServiceTimeout)
			return
		}
	case cmwire.ForREP:
		if c := m.byBothLocked(from, mra.RemoteCommID, mra.LocalCommID); c != nil && c.state == cmRepSent {
			m.stats.add(cmMRAReceived)
			c.state = cmMRARepRcvd
			m.postponeLocked(c, mra.ServiceTimeout)
			return
		}
	}
	m.stats.add(cmUnmatched)
}

func (m *connManager) handleREJLocked(from netip.Addr, b []byte) {
	var rej cmwire.REJ
	if rej.Decode(b) != nil {
		return
	}
	var c *cmConn
	switch {
	case rej.Reason == cmwire.RejTimeout:
		// The peer gave up an attempt before it knew our ID: its GUID and its ID say which.
		if info := rej.Info(); len(info) >= 8 {
			c = m.byPeerID[cmPeerID{from.WithZone(""), binary.BigEndian.Uint64(info), rej.LocalCommID}]
		}
	case rej.Message == cmwire.ForREQ:
		if c = m.byIDLocked(from, rej.RemoteCommID); c != nil && c.havePeer {
			c = nil
		}
	default:
		c = m.byBothLocked(from, rej.RemoteCommID, rej.LocalCommID)
	}
	if c == nil {
		m.stats.add(cmUnmatched)
		return
	}
	err := &verbs.RejectError{Reason: uint16(rej.Reason), PrivateData: append([]byte(nil), rej.PrivateData[:]...)}
	switch c.state {
	case cmReqSent, cmMRAReqRcvd, cmReqRcvd, cmMRAReqSent, cmRepSent, cmMRARepRcvd:
		if info := rej.Info(); rej.Reason == cmwire.RejInvalidMTU && len(info) > 0 {
			if hint := verbs.MTU(info[0]); hint.Bytes() != 0 {
				c.mtuHint = hint
			}
		}
		c.failLocked(err)
		if rej.Reason == cmwire.RejStaleConn {
			m.lingerLocked(c, c.timewait)
		} else {
			m.goneLocked(c)
		}
	case cmRepRcvd:
		c.failLocked(err)
		m.lingerLocked(c, c.timewait)
	case cmEstab:
		m.endLocked(c)
		m.lingerLocked(c, c.timewait)
	case cmDreqSent:
		m.lingerLocked(c, c.timewait)
	default:
		m.stats.add(cmUnmatched)
		return
	}
	m.stats.add(cmRejReceived)
}

func (m *connManager) handleDREQLocked(from netip.Addr, b []byte) {
	var dreq cmwire.DREQ
	if dreq.Decode(b) != nil {
		return
	}
	c := m.byBothLocked(from, dreq.RemoteCommID, dreq.LocalCommID)
	if c == nil {
		m.stats.add(cmUnmatched)
		m.sendDREPLocked(from, &dreq) // the connection is over for us, and may be for the peer
		return
	}
	if verbs.QPN(dreq.RemoteQPN) != c.qpn {
		m.stats.add(cmMalformed)
		return
	}
	switch c.state {
	case cmEstab:
		m.endLocked(c)
	case cmRepRcvd, cmRepSent, cmMRARepRcvd:
		c.failLocked(fmt.Errorf("%w: %w", errPeerLeft, verbs.ErrUnreachable))
	case cmDreqSent:
	case cmTimewait:
		m.stats.add(cmDupDREQ)
		m.sendDREPLocked(from, &dreq)
		return
	default:
		m.stats.add(cmUnmatched)
		return
	}
	m.sendDREPLocked(from, &dreq)
	m.lingerLocked(c, c.timewait)
}

func (m *connManager) handleDREPLocked(from netip.Addr, b []byte) {
	var drep cmwire.DREP
	if drep.Decode(b) != nil {
		return
	}
	c := m.byBothLocked(from, drep.RemoteCommID, drep.LocalCommID)
	if c == nil || c.state != cmDreqSent {
		m.stats.add(cmUnmatched)
		return
	}
	m.lingerLocked(c, c.timewait)
}
