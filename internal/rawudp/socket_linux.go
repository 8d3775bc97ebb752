package rawudp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollInterval is how often a blocked call looks whether it is closed or past its deadline.
const pollInterval = 50 * time.Millisecond

// socket is an unconnected UDP socket in blocking mode. Unconnected, with PMTUDISC_DO: the kernel then sends
// IPv4 identification 0, or the index in a GSO train (rocev2 spec 2.4), which the ICRC covers.
type socket struct {
	fd       int
	local    netip.AddrPort
	rcvbuf   int // granted, as the kernel counts
	closed   atomic.Bool
	deadline atomic.Int64 // in Unix nanoseconds, 0 for none
	mu       sync.Mutex   // held in system calls on fd, so that Close does not close it under them
}

func openSocket(local netip.AddrPort) (*socket, error) {
	if !local.Addr().Is4() {
		return nil, fmt.Errorf("raw udp from %v: %w: not IPv4", local, ErrNotSupported)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("raw udp socket: %w", err)
	}
	s := &socket{fd: fd}
	if err := s.setup(local); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *socket) setup(local netip.AddrPort) error {
	if err := unix.Bind(s.fd, &unix.SockaddrInet4{Port: int(local.Port()), Addr: local.Addr().As4()}); err != nil {
		return fmt.Errorf("raw udp bind to %v: %w", local, err)
	}
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return err
	}
	in := sa.(*unix.SockaddrInet4)
	s.local = netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port))

	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO); err != nil {
		return fmt.Errorf("raw udp IP_MTU_DISCOVER: %w", err)
	}
	for _, o := range [...]struct{ force, plain int }{
		{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF},
	} {
		if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o.force, socketBufferSize) != nil {
			_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o.plain, socketBufferSize)
		}
	}
	if s.rcvbuf, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil {
		return err
	}
	return s.setTimeout(pollInterval)
}

// setTimeout bounds each receive.
func (s *socket) setTimeout(d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	return unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// Addr is the local address.
func (s *socket) Addr() netip.AddrPort { return s.local }

// SetDeadline bounds what blocks, within 50 ms; zero for no bound.
func (s *socket) SetDeadline(t time.Time) error {
	var ns int64
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	s.deadline.Store(ns)
	return nil
}

// usable is what a call looks at before it blocks again.
func (s *socket) usable() error {
	if s.closed.Load() {
		return ErrClosed
	}
	if d := s.deadline.Load(); d != 0 && time.Now().UnixNano() >= d {
		return ErrDeadline
	}
	return nil
}

// Close wakes who is blocked.
func (s *socket) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // ENOTCONN, and wakes all the same (inet_shutdown)
	s.mu.Lock()
	defer s.mu.Unlock()
	return unix.Close(s.fd)
}

// interfaceMTU is the MTU of the interface that has addr, 1500 if there is none.
func interfaceMTU(addr netip.Addr) int {
	const ethernet = 1500
	ifs, err := net.Interfaces()
	if err != nil {
		return ethernet
	}
	for _, i := range ifs {
		as, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range as {
			// 127.0.0.2 is not assigned, but within the loopback interface's prefix.
			if p, err := netip.ParsePrefix(a.String()); err == nil && (p.Addr() == addr || addr.IsLoopback() && p.Contains(addr)) {
				return i.MTU
			}
		}
	}
	return ethernet
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [unsafe.Sizeof(uintptr(0)) - 4]byte
}

// recvmmsg and sendmmsg retry after a signal and return how many messages were done.
func (s *socket) recvmmsg(ms []mmsghdr, flags int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mmsg(unix.SYS_RECVMMSG, ms, flags)
}

func (s *socket) sendmmsg(ms []mmsghdr) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mmsg(unix.SYS_SENDMMSG, ms, 0)
}

func (s *socket) mmsg(trap uintptr, ms []mmsghdr, flags int) (int, error) {
	for {
		if s.closed.Load() {
			return 0, ErrClosed
		}
		n, _, errno := unix.Syscall6(trap, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(ms))), uintptr(len(ms)), uintptr(flags), 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// sockaddr is a as the kernel takes it.
func sockaddr(a netip.AddrPort) unix.RawSockaddrInet4 {
	sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:], a.Port())
	return sa
}

// addrPort is the inverse of sockaddr.
func addrPort(sa *unix.RawSockaddrInet4) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port)
}

// segmentControl is a control message of UDP: the size of the segments, UDP_SEGMENT or UDP_GRO. The
// first takes two bytes, the second gives four.
type segmentControl struct {
	hdr  unix.Cmsghdr
	size [8]byte
}
