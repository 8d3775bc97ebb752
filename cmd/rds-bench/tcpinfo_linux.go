package main

import (
	"net"

	"golang.org/x/sys/unix"
)

// tcpRetransmits is how many segments of c were sent again.
//
// Source: tcp(7), TCP_INFO.
func tcpRetransmits(c *net.TCPConn) uint64 {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	var n uint64
	_ = rc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = uint64(info.Total_retrans)
		}
	})
	return n
}
