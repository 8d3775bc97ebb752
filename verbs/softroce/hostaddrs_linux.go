package softroce

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/verbs"
)

// monitor follows the addresses of the host through rtnetlink. The kernel's messages are taken as news only: after any, or
// when some were lost, all addresses are read anew, and what counts is the difference. So nothing depends on
// the order or the completeness of messages.
type monitor struct {
	p    *Provider
	news *os.File // subscribed to links and addresses
	ask  int      // for dumps
	done chan struct{}
}

// newMonitor starts the goroutine. The caller holds p.changes.
func newMonitor(p *Provider) (_ *monitor, err error) {
	m := &monitor{p: p, done: make(chan struct{})}
	if m.ask, err = rtnetlink(0, 0); err != nil {
		return nil, err
	}
	fd, err := rtnetlink(unix.SOCK_NONBLOCK, unix.RTMGRP_LINK|unix.RTMGRP_IPV4_IFADDR|unix.RTMGRP_IPV6_IFADDR)
	if err != nil {
		unix.Close(m.ask)
		return nil, err
	}
	m.news = os.NewFile(uintptr(fd), "rtnetlink")
	if p.host, err = m.read(); err != nil {
		m.news.Close()
		unix.Close(m.ask)
		return nil, err
	}
	go m.run()
	return m, nil
}

func rtnetlink(flags int, groups uint32) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("rtnetlink: %w", os.NewSyscallError("socket", err))
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("rtnetlink: %w", os.NewSyscallError("bind", err))
	}
	return fd, nil
}

// close ends the goroutine and waits for it. nil is no monitor.
func (m *monitor) close() {
	if m == nil {
		return
	}
	m.news.Close()
	<-m.done
}

func (m *monitor) run() {
	defer close(m.done)
	defer unix.Close(m.ask)
	raw, err := m.news.SyscallConn()
	if err != nil {
		return // closed
	}
	buf := make([]byte, 16<<10)
	for {
		// Everything that is there is one piece of news.
		err := raw.Read(func(fd uintptr) bool {
			some := false
			for {
				switch _, err := unix.Read(int(fd), buf); err {
				case nil, unix.ENOBUFS:
					some = true
				case unix.EINTR:
				default:
					return some
				}
			}
		})
		if err != nil {
			return // closed
		}
		now, err := m.read()
		if err != nil {
			m.p.cfg.Logger.Warn("reading the addresses of the host", "err", err)
			continue
		}
		m.p.addressesChanged(m, now, bindable)
	}
}

// present reports whether a can be opened now, as far as the host is concerned. The caller holds p.changes.
func (m *monitor) present(a netip.Addr) bool { return m.p.host.has(a) || bindable(a) }

// bindable reports whether a socket can be bound to a.
func bindable(a netip.Addr) bool {
	family := unix.AF_INET
	if !a.Is4() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true // out of descriptors, say: that is no reason to remove a device
	}
	defer unix.Close(fd)
	return unix.Bind(fd, sockaddr(netip.AddrPortFrom(a, 0))) == nil
}

// dumpTries bounds how often a dump is repeated that the kernel changed under way.
const dumpTries = 5

// read reads the addresses of the host.
func (m *monitor) read() (*hostAddrs, error) {
	for range dumpTries {
		links, torn1, err := m.dump(unix.RTM_GETLINK)
		if err != nil {
			return nil, err
		}
		addrs, torn2, err := m.dump(unix.RTM_GETADDR)
		if err != nil {
			return nil, err
		}
		if !torn1 && !torn2 {
			return parseHostAddrs(links, addrs)
		}
	}
	return nil, fmt.Errorf("rtnetlink: addresses change faster than they can be read: %w", verbs.ErrBusy)
}

// dump asks for all objects of a kind. torn says that they changed meanwhile.
func (m *monitor) dump(kind uint16) (msgs []syscall.NetlinkMessage, torn bool, err error) {
	req := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtGenmsg)
	n := binary.NativeEndian
	n.PutUint32(req, uint32(len(req)))
	n.PutUint16(req[4:], kind)
	n.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	// Sequence number and port 0: nothing else is asked on this socket, and the kernel fills in the port.
	if err := unix.Sendto(m.ask, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, false, fmt.Errorf("rtnetlink: %w", os.NewSyscallError("sendto", err))
	}
	buf := make([]byte, 64<<10) // the kernel fills at most 32 KiB at a time
	for {
		k, err := unix.Read(m.ask, buf) // the answer is there, or made by this call: it does not wait
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, false, fmt.Errorf("rtnetlink: %w", os.NewSyscallError("read", err))
		}
		part, err := syscall.ParseNetlinkMessage(bytes.Clone(buf[:k]))
		if err != nil {
			return nil, false, fmt.Errorf("rtnetlink: %w", err)
		}
		for i := range part {
			h := &part[i].Header
			torn = torn || h.Flags&unix.NLM_F_DUMP_INTR != 0
			switch h.Type {
			case unix.NLMSG_DONE:
				return msgs, torn, nil
			case unix.NLMSG_ERROR:
				errno := syscall.EIO
				if d := part[i].Data; len(d) >= 4 {
					errno = syscall.Errno(-int32(n.Uint32(d)))
				}
				return nil, false, fmt.Errorf("rtnetlink: dump: %w", errno)
			}
			msgs = append(msgs, part[i])
		}
	}
}

// parseHostAddrs makes the addresses of the host of a dump of its links and one of its addresses.
func parseHostAddrs(links, addrs []syscall.NetlinkMessage) (*hostAddrs, error) {
	type link struct {
		name     string
		up       bool
		loopback bool
	}
	byIndex := make(map[uint32]link)
	for i := range links {
		m := &links[i]
		if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
			continue
		}
		info := (*unix.IfInfomsg)(unsafe.Pointer(&m.Data[0]))
		attrs, err := routeAttrs(m)
		if err != nil {
			return nil, fmt.Errorf("rtnetlink: link: %w", err)
		}
		l := link{up: info.Flags&unix.IFF_UP != 0, loopback: info.Flags&unix.IFF_LOOPBACK != 0}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_IFNAME {
				l.name = string(bytes.TrimRight(a.Value, "\x00"))
			}
		}
		byIndex[uint32(info.Index)] = l
	}
	h := &hostAddrs{addrs: make(map[netip.Addr]struct{})}
	for i := range addrs {
		m := &addrs[i]
		if m.Header.Type != unix.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg {
			continue
		}
		info := (*unix.IfAddrmsg)(unsafe.Pointer(&m.Data[0]))
		attrs, err := routeAttrs(m)
		if err != nil {
			return nil, fmt.Errorf("rtnetlink: address: %w", err)
		}
		l := byIndex[info.Index]
		flags := uint32(info.Flags)
		var own, any netip.Addr
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.IFA_LOCAL: // on a point-to-point link the other one is the peer's
				own, _ = netip.AddrFromSlice(a.Value)
			case unix.IFA_ADDRESS:
				any, _ = netip.AddrFromSlice(a.Value)
			case unix.IFA_FLAGS:
				if len(a.Value) >= 4 {
					flags = binary.NativeEndian.Uint32(a.Value)
				}
			}
		}
		if !own.IsValid() {
			own = any
		}
		own = own.Unmap()
		if !l.up || !own.IsValid() || flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 && flags&unix.IFA_F_OPTIMISTIC == 0 {
			continue
		}
		if own.Is6() && own.IsLinkLocalUnicast() {
			own = own.WithZone(l.name)
		}
		h.addrs[own] = struct{}{}
		if l.loopback && own.Is4() {
			if n, err := own.Prefix(int(info.Prefixlen)); err == nil {
				h.nets = append(h.nets, n)
			}
		}
	}
	return h, nil
}

// routeAttrs are the attributes of m. The library's parser relies on their being padded, as the kernel's are.
func routeAttrs(m *syscall.NetlinkMessage) ([]syscall.NetlinkRouteAttr, error) {
	if len(m.Data)%unix.RTA_ALIGNTO != 0 {
		return nil, syscall.EINVAL
	}
	return syscall.ParseNetlinkRouteAttr(m)
}
