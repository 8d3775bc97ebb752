package softroce

import (
	"encoding/binary"
	"net/netip"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// What our messages look like. The put functions write c.out, the message that is retransmitted.

// reqServiceID is the service ID of a port of RDMA-CM's port space TCP.
func reqServiceID(port uint16) uint64 { return cmwire.ServiceID(cmwire.PortSpaceTCP, port) }

// putREQ writes the REQ of c (rocev2 spec 7.3).
func (m *connManager) putREQ(c *cmConn, p *verbs.ConnParam, ackTimeout uint8, mtu verbs.MTU, psn uint32) {
	dst, srcPort, dstPort := c.remote.Addr(), c.local.Port(), c.remote.Port()
	req := cmwire.REQ{
		TID:                   c.tid,
		LocalCommID:           c.id,
		ServiceID:             reqServiceID(dstPort),
		LocalCAGUID:           m.myGUID,
		LocalQPN:              uint32(c.qpn),
		ResponderResources:    p.ResponderResources,
		InitiatorDepth:        p.InitiatorDepth,
		RemoteResponseTimeout: cmResponseCode,
		TransportType:         cmwire.TransportRC,
		StartingPSN:           psn,
		LocalResponseTimeout:  cmResponseCode,
		RetryCount:            p.RetryCount,
		PKey:                  roce.DefaultPKey,
		PathMTU:               uint8(mtu),
		RNRRetryCount:         p.RNRRetryCount,
		MaxCMRetries:          cmMaxRetries,
		SRQ:                   p.SRQ,
		Primary: cmwire.Path{
			LocalLID: 0xFFFF, RemoteLID: 0xFFFF, // Linux' for a hop limit above 1
			LocalGID: cmwire.GIDOf(m.addr), RemoteGID: cmwire.GIDOf(dst),
			FlowLabel:    31*uint32(srcPort) + uint32(dstPort),
			PacketRate:   3, // 10 Gb/s; nobody looks
			TrafficClass: p.TrafficClass,
			HopLimit:     64,
			AckTimeout:   ackTimeout,
		},
	}
	cma := cmwire.CMAHeader{SrcPort: srcPort, Src: m.addr, Dst: dst}
	cma.Encode(req.PrivateData[:])
	copy(req.PrivateData[cmwire.CMAHeaderLen:], p.PrivateData)
	req.Encode(c.out[:])
}

// putREP writes the REP of c; res and depth are the READs and atomics we serve and issue.
func (m *connManager) putREP(c *cmConn, p *verbs.ConnParam, res, depth uint8, psn uint32) {
	rep := cmwire.REP{
		TID:                c.tid,
		LocalCommID:        c.id,
		RemoteCommID:       c.peerID,
		LocalQPN:           uint32(c.qpn),
		StartingPSN:        psn,
		ResponderResources: res,
		InitiatorDepth:     depth,
		TargetAckDelay:     cmTargetAckDelay,
		RNRRetryCount:      p.RNRRetryCount,
		SRQ:                p.SRQ,
		LocalCAGUID:        m.myGUID,
	}
	copy(rep.PrivateData[:], p.PrivateData)
	rep.Encode(c.out[:])
}

func (m *connManager) putRTULocked(c *cmConn) {
	rtu := cmwire.RTU{TID: c.tid, LocalCommID: c.id, RemoteCommID: c.peerID}
	rtu.Encode(c.out[:])
}

func (m *connManager) putDREQLocked(c *cmConn) {
	dreq := cmwire.DREQ{TID: m.tid(c.id), LocalCommID: c.id, RemoteCommID: c.peerID, RemoteQPN: uint32(c.info.PeerQPN)}
	dreq.Encode(c.out[:])
}

// putREJLocked writes a REJ in c's name. In REQ_RCVD we have shown no communication ID yet and show
// none. Reason 4 carries our GUID, by which the peer finds the attempt (rocev2 spec 7.5).
func (m *connManager) putREJLocked(c *cmConn, message uint8, reason cmwire.Reason, private []byte) {
	rej := cmwire.REJ{TID: c.tid, LocalCommID: c.id, RemoteCommID: c.peerID, Message: message, Reason: reason}
	if c.state == cmReqRcvd {
		rej.LocalCommID = 0
	}
	if reason == cmwire.RejTimeout {
		var guid [8]byte
		binary.BigEndian.PutUint64(guid[:], m.myGUID)
		rej.SetInfo(guid[:])
	}
	copy(rej.PrivateData[:], private)
	rej.Encode(c.out[:])
	m.stats.add(cmRejSent)
}

// sendMRALocked asks the peer to be patient.
func (m *connManager) sendMRALocked(c *cmConn, message uint8) {
	var b [madBytes]byte
	mra := cmwire.MRA{TID: c.tid, LocalCommID: c.id, RemoteCommID: c.peerID, Message: message, ServiceTimeout: cmMRACode}
	mra.Encode(b[:])
	m.stats.add(cmMRASent)
	m.sendLocked(c.remote.Addr(), &b)
}

// rejectREQLocked refuses a REQ for which there is no connection.
func (m *connManager) rejectREQLocked(to netip.Addr, req *cmwire.REQ, reason cmwire.Reason, info []byte) {
	var b [madBytes]byte
	rej := cmwire.REJ{TID: req.TID, RemoteCommID: req.LocalCommID, Message: cmwire.ForREQ, Reason: reason}
	rej.SetInfo(info)
	rej.Encode(b[:])
	m.stats.add(cmRejSent)
	m.sendLocked(to, &b)
}

// sendDREPLocked answers a DREQ, also one for a connection we do not know.
func (m *connManager) sendDREPLocked(to netip.Addr, dreq *cmwire.DREQ) {
	var b [madBytes]byte
	drep := cmwire.DREP{TID: dreq.TID, LocalCommID: dreq.RemoteCommID, RemoteCommID: dreq.LocalCommID}
	drep.Encode(b[:])
	m.sendLocked(to, &b)
}

// tid is the transaction ID of a request of ours, made as Linux makes it.
func (m *connManager) tid(id uint32) uint64 { return uint64(m.agent)<<32 | uint64(id) }
