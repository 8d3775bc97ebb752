//go:build !linux

package main

import "net"

// tcpRetransmits is not known here.
func tcpRetransmits(*net.TCPConn) uint64 { return 0 }
