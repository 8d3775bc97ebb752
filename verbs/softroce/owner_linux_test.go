package softroce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/openrds/openrds/verbs"
)

// Who has the port is named in the error, whether he has it on the address or on all of them.
func TestPortOwner(t *testing.T) {
	for _, c := range []struct{ network, bind, local string }{
		{"udp4", "127.0.0.71:0", "127.0.0.71"},
		{"udp4", "0.0.0.0:0", "127.0.0.71"},
		{"udp", "[::]:0", "127.0.0.71"},
		{"udp6", "[::1]:0", "::1"},
	} {
		t.Run(c.bind, func(t *testing.T) {
			l, err := net.ListenPacket(c.network, c.bind)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			p := New(Config{Port: uint16(l.LocalAddr().(*net.UDPAddr).Port)})
			_, err = p.OpenDevice(netip.MustParseAddr(c.local))
			var busy *verbs.BusyError
			if want := fmt.Sprintf("process %d (", os.Getpid()); !errors.As(err, &busy) || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q in it", err, want)
			}
		})
	}
}

func TestTableAddr(t *testing.T) {
	for s, want := range map[string]string{
		"0100007F:12B7":                         "127.0.0.1:4791",
		"00000000000000000000000001000000:0001": "[::1]:1",
		"B80D01200000000067452301EFCDAB89:FFFF": "[2001:db8::123:4567:89ab:cdef]:65535",
	} {
		if got := tableAddr(s); got != netip.MustParseAddrPort(want) {
			t.Errorf("%s: %v, want %s", s, got, want)
		}
	}
	for _, s := range []string{"", ":", "xx:12B7", "0100007F:1", "01:0001"} {
		if got := tableAddr(s); got.IsValid() {
			t.Errorf("%q: %v", s, got)
		}
	}
}
