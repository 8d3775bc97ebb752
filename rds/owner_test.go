package rds

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
)

// An address belongs to one Service of the host: a second one is told who has it.
func TestAddressTaken(t *testing.T) {
	first := openUDP(t, Config{})
	second := openUDP(t, Config{})
	bind(t, first, netip.MustParseAddrPort("127.0.0.77:4000"))
	_, err := second.ListenPacket(t.Context(), "127.0.0.77:5000")
	if want := fmt.Sprintf("process %d (", os.Getpid()); !errors.Is(err, ErrAddrInUse) || !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want ErrAddrInUse and %q", err, want)
	}
}
