package softroce

import (
	"net/netip"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
)

// The general service interface: QP 1, which carries nothing but the connection manager's MADs here
// (rocev2 spec 7.1).
//
//	BTH 12 (UD SEND Only, DestQP 1) | DETH 8 (Q_Key 0x80010000, source QP 1) | MAD 256 | ICRC 4
//
// Never more than 256 bytes: a longer packet moves QP 1 of a kernel peer to ERR (rocev2 spec 9, Q5).
const (
	gsiQPN   = 1
	madBytes = cmwire.MADLen
)

// gsiInput takes a packet for QP 1 from address from, whose ICRC and P_Key are good. It is for the
// engine: what is not a MAD of the connection manager is dropped and counted, the rest is copied and
// left for the manager's worker. The source QP does not matter, since answers go to QP 1.
func (m *connManager) gsiInput(from netip.Addr, p *roce.Packet) {
	if p.Op != roce.UDSendOnly {
		m.stats.add(cmGSIBadOpcode)
		return
	}
	if p.DETH().QKey() != roce.GSIQKey {
		m.stats.add(cmGSIBadQKey)
		return
	}
	m.input(from, p.Payload)
}

// gsiCheck reports whether mad is one of the connection manager's, and counts why it is not: length,
// base version 1, class 7, class version 2, method 3 (rocev2 spec 7.1).
func (m *connManager) gsiCheck(mad []byte) bool {
	if len(mad) != madBytes {
		m.stats.add(cmGSIBadLength)
		return false
	}
	if _, err := cmwire.PeekHeader(mad); err != nil {
		m.stats.add(cmGSINotCM)
		return false
	}
	return true
}
