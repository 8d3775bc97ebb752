//go:build !linux

package softroce

import (
	"fmt"
	"net/netip"

	"github.com/openrds/openrds/verbs"
)

// monitor follows the addresses of the host: on Linux.
type monitor struct{}

func newMonitor(*Provider) (*monitor, error) {
	return nil, fmt.Errorf("following the addresses of the host: %w", verbs.ErrNotSupported)
}

func (*monitor) close()                  {}
func (*monitor) present(netip.Addr) bool { return false }
