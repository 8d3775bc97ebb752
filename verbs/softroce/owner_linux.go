package softroce

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// portOwner says who has the UDP port of local, as far as this user may know. The answer is of this moment: the owner may
// be gone already.
func portOwner(local netip.AddrPort) string {
	inode := socketInode(local)
	if inode != "" && inode != "0" {
		want := "socket:[" + inode + "]"
		fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the only error is a bad pattern
		for _, fd := range fds {
			if t, err := os.Readlink(fd); err == nil && t == want {
				pid := strings.Split(fd, "/")[2]
				comm, _ := os.ReadFile("/proc/" + pid + "/comm")
				return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(comm)))
			}
		}
	}
	if _, err := os.Stat("/sys/module/rdma_rxe"); err == nil {
		return "rdma_rxe of the kernel, or another process"
	}
	return "another process"
}

// socketInode finds the socket that is bound to local, or to its port on all addresses, in the kernel's tables; "" if
// there is none.
func socketInode(local netip.AddrPort) string {
	table := "/proc/net/udp"
	if !local.Addr().Is4() {
		table = "/proc/net/udp6"
	}
	any4 := netip.AddrPortFrom(netip.IPv4Unspecified(), local.Port())
	any6 := netip.AddrPortFrom(netip.IPv6Unspecified(), local.Port())
	for _, name := range slices.Compact([]string{table, "/proc/net/udp6"}) {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 10 {
				continue
			}
			if a := tableAddr(f[1]); a == local || a == any4 || a == any6 {
				return f[9]
			}
		}
	}
	return ""
}

// tableAddr reads an address of /proc/net/udp: 32-bit words in the host's byte order, a colon, the port.
func tableAddr(s string) netip.AddrPort {
	words, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(words)
	p, err2 := hex.DecodeString(port)
	if err != nil || err2 != nil || len(p) != 2 {
		return netip.AddrPort{}
	}
	if one := [2]byte{1}; binary.NativeEndian.Uint16(one[:]) == 1 {
		for i := 0; i+4 <= len(b); i += 4 {
			slices.Reverse(b[i : i+4])
		}
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, uint16(p[0])<<8|uint16(p[1]))
}
