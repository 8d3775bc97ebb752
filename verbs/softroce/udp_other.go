//go:build !linux

package softroce

import (
	"fmt"
	"net/netip"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/verbs"
)

// udpNetwork needs what only Linux promises about the packets of a UDP socket (rocev2 spec 2.4).
type udpNetwork struct {
	rcvbuf int
	noGSO  bool
}

// Listen implements packetio.Network.
func (udpNetwork) Listen(local netip.AddrPort) (packetio.Conn, error) {
	return nil, fmt.Errorf("UDP %v: %w", local, verbs.ErrNotSupported)
}
