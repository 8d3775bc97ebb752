//go:build lab && linux

package lab

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/wire/roce"
)

// frames reads the frames of a pcap file as StartCapture writes it.
func frames(t testing.TB, path string) (fs [][]byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for b = b[24:]; len(b) > 16; {
		n := binary.LittleEndian.Uint32(b[8:])
		fs = append(fs, b[16:16+n])
		b = b[16+n:]
	}
	return fs
}

// TestRXEPackets looks at what both sides put on the wire: our packets have DF and an IPv4 identification of 0, or their
// place in a GSO train, and every ICRC is right for the identification that was really sent.
func TestRXEPackets(t *testing.T) {
	_, h, e := pair(t)
	path := workPath("packets.pcap")
	c, err := StartCapture(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range []int{0, 1, 4096, 300000} {
		fromHost(t, h, e, n, uint32(2*i+1))
		fromGuest(t, h, e, n, uint32(2*i+2))
	}
	time.Sleep(50 * time.Millisecond)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	ours, theirs, trains := 0, 0, 0
	for i, f := range frames(t, path) {
		const ethLen, ipLen, udpLen = 14, 20, 8
		ip := f[ethLen:]
		if binary.BigEndian.Uint16(f[12:]) != 0x0800 || ip[9] != 17 || binary.BigEndian.Uint16(ip[ipLen+2:]) != roce.Port {
			continue
		}
		ip = ip[:binary.BigEndian.Uint16(ip[2:])]
		addr := func(off int, port int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[off:off+4])), binary.BigEndian.Uint16(ip[ipLen+port:]))
		}
		src, dst := addr(12, 0), addr(16, 2)
		id := binary.BigEndian.Uint16(ip[4:])
		if ip[6] != 0x40 || ip[7] != 0 {
			t.Errorf("frame %d from %v has flags and offset %x", i, src, ip[6:8])
		}
		flow := roce.NewFlow(src, dst)
		if got, v := flow.Check(ip[ipLen+udpLen:], id); v == roce.Bad || v == roce.BadDF || got != id {
			t.Errorf("frame %d from %v: ICRC %v for identification %#x, is %#x", i, src, v, got, id)
		}
		if src.Addr() == h.dev.Addr() {
			ours++
			if id >= 64 {
				t.Errorf("frame %d of ours has identification %d", i, id)
			} else if id > 0 {
				trains++
			}
		} else {
			theirs++
		}
	}
	t.Logf("%d packets of ours, %d of them inside trains, %d of the guest's", ours, trains, theirs)
	if ours < 100 || theirs < 100 || trains == 0 {
		t.Error("too few packets to tell")
	}
}
