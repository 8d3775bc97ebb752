package softroce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/atomic"
	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/verbs"
)

// udpNetwork makes sockets of the host.
type udpNetwork struct {
	rcvbuf int
	noGSO  bool
}

// udpConn is one UDP socket: unconnected and with PMTU discovery "do", so that the kernel gives its
// packets DF and identification 0, or the index in their GSO train: what the ICRC was computed
// with (rocev2 spec 2.4).
//
// Waiting is by an epoll instance of its own, which the Go runtime's poller watches: the socket is in
// it one-shot, armed only when Wait goes to sleep. A socket registered with the runtime's poller would wake a
// thread for every packet, also while another goroutine is busy receiving them.
type udpConn struct {
	fd     int
	local  netip.AddrPort
	scope  uint32 // number of local's zone, 0 if it has none: asked for once, not for each packet
	caps   packetio.Caps
	gso    bool
	drops  atomic.Uint64
	iface  int // MTU cached ...
	mtuAt  time.Time
	mtuMu  sync.Mutex
	closed atomic.Bool
	off    atomic.Bool // Unplug was called: fd is closed

	// Receive side, one caller at a time.
	rmsgs  [rxBatch]mmsghdr
	riov   [rxBatch]unix.Iovec
	rnames [rxBatch]unix.RawSockaddrInet6
	rctl   [rxBatch][rxControl]byte
	rbuf   []byte
	rbatch int // messages to ask for

	// Placing (see packetio.Placer): the first messages have a gather list of their own.
	placing bool
	layout  packetio.Layout
	places  [maxPlaces][]byte
	rest    [maxPlaces][]byte
	piov    [maxPlaces][]unix.Iovec

	// Send side, one caller at a time.
	smsgs  [maxTrains]mmsghdr
	siov   []unix.Iovec
	snames [maxTrains]unix.RawSockaddrInet6
	sctl   [maxTrains][txControl]byte

	// Waiting.
	ep      int
	epFile  *os.File
	epRaw   syscall.RawConn
	evfd    int
	timer   int
	timerAt time.Time
	woken   atomic.Bool        // an eventfd write is outstanding
	wakeMu  sync.Mutex         // held while evfd is written to, and to set closed
	onReady func(uintptr) bool // ready, made once
	armMu   sync.Mutex
	waiting bool // in Wait; guarded by armMu
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

const (
	rxBufBytes = 65536
	longTrain  = 16 << 10
	maxPlaces  = 2
	rxControl  = 128
	txControl  = 64
)

// Listen implements packetio.Network.
func (n udpNetwork) Listen(local netip.AddrPort) (packetio.Conn, error) {
	c := &udpConn{local: local, fd: -1, ep: -1, evfd: -1, timer: -1}
	if err := c.open(n); err != nil {
		c.closeFDs()
		switch {
		case errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.EINVAL) && local.Addr().Zone() != "": // no such interface
			return nil, fmt.Errorf("UDP %v: %w", local, verbs.ErrNoSuchAddress)
		case errors.Is(err, unix.EADDRINUSE):
			return nil, &verbs.BusyError{Object: fmt.Sprintf("UDP %v", local), Holders: []string{portOwner(local)}}
		}
		return nil, fmt.Errorf("UDP %v: %w", local, err)
	}
	return c, nil
}

func (c *udpConn) open(n udpNetwork) (err error) {
	family := unix.AF_INET
	if !c.local.Addr().Is4() {
		family = unix.AF_INET6
	}
	if c.fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return os.NewSyscallError("socket", err)
	}
	opts := []struct{ level, opt, val int }{
		{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO},
		{unix.IPPROTO_IP, unix.IP_RECVTOS, 1},
		{unix.IPPROTO_IP, unix.IP_RECVTTL, 1},
	}
	if family == unix.AF_INET6 {
		opts = []struct{ level, opt, val int }{
			{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO},
			{unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1},
			{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1}, // rxe sends none (rocev2 spec Q14)
		}
	}
	for _, o := range opts {
		if err = unix.SetsockoptInt(c.fd, o.level, o.opt, o.val); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	// What follows is better had than not.
	_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n.rcvbuf) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, n.rcvbuf)
	}
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n.rcvbuf) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n.rcvbuf)
	}
	_ = unix.SetsockoptInt(c.fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	own := sockaddr(c.local)
	if six, ok := own.(*unix.SockaddrInet6); ok {
		c.scope = six.ZoneId
	}
	if err = unix.Bind(c.fd, own); err != nil {
		return os.NewSyscallError("bind", err)
	}
	granted, _ := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	// A kernel without UDP GSO does not know the option.
	_, gsoErr := unix.GetsockoptInt(c.fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	c.gso = gsoErr == nil && !n.noGSO
	c.caps = packetio.Caps{MTU: interfaceMTU(c.local.Addr()), GSO: c.gso, RecvBuffer: granted}

	if c.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create", err)
	}
	if c.evfd, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	if c.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC); err != nil {
		return os.NewSyscallError("timerfd_create", err)
	}
	for _, e := range []struct {
		fd     int
		events uint32
	}{{c.fd, unix.EPOLLONESHOT}, {c.evfd, unix.EPOLLIN}, {c.timer, unix.EPOLLIN}} {
		if err = unix.EpollCtl(c.ep, unix.EPOLL_CTL_ADD, e.fd, &unix.EpollEvent{Events: e.events, Fd: int32(e.fd)}); err != nil {
			return os.NewSyscallError("epoll_ctl", err)
		}
	}
	if err = unix.SetNonblock(c.ep, true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	c.epFile = os.NewFile(uintptr(c.ep), "softroce-epoll")
	if c.epRaw, err = c.epFile.SyscallConn(); err != nil {
		return err
	}

	c.onReady = c.ready
	c.rbuf = make([]byte, rxBatch*rxBufBytes)
	c.rbatch = rxBatch
	for i := range c.rmsgs {
		c.riov[i] = unix.Iovec{Base: &c.rbuf[i*rxBufBytes], Len: rxBufBytes}
		h := &c.rmsgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&c.rnames[i]))
		h.Iov, h.Iovlen = &c.riov[i], 1
		h.Control = &c.rctl[i][0]
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if z := a.Addr().Zone(); z != "" {
		if ifi, err := net.InterfaceByName(z); err == nil {
			sa.ZoneId = uint32(ifi.Index)
		}
	}
	return sa
}

func (c *udpConn) closeFDs() {
	if c.epFile != nil {
		c.epFile.Close()
	} else if c.ep >= 0 {
		unix.Close(c.ep)
	}
	if c.fd >= 0 && !c.off.Load() {
		unix.Close(c.fd)
	}
	for _, fd := range []int{c.evfd, c.timer} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (c *udpConn) LocalAddr() netip.AddrPort { return c.local }

// Caps implements packetio.Conn. GSO may turn false after a Send.
func (c *udpConn) Caps() packetio.Caps {
	caps := c.caps
	caps.GSO = c.gso
	return caps
}

func (c *udpConn) Dropped() uint64 { return c.drops.Load() }

// Recv implements packetio.Conn.
func (c *udpConn) Recv(ts []packetio.RxTrain) (int, error) {
	if c.placing {
		c.placing = false
		for i := range c.places {
			h := &c.rmsgs[i].hdr
			h.Iov, h.Iovlen = &c.riov[i], 1
			c.places[i] = nil
		}
	}
	return c.recv(ts, min(len(ts), c.rbatch))
}

// RecvPlaced implements packetio.Placer: a gather list with the shape of the train.
func (c *udpConn) RecvPlaced(ts []packetio.RxTrain, l packetio.Layout, places [][]byte) (int, error) {
	n := min(len(ts), len(places), maxPlaces)
	if !c.placing || l != c.layout {
		c.placing, c.layout = true, l
		c.places = [maxPlaces][]byte{}
	}
	for i := range n {
		if len(c.places[i]) == 0 || &c.places[i][0] != &places[i][0] {
			c.places[i] = places[i]
			c.shape(i)
		}
	}
	r, err := c.recv(ts, n)
	for i := range r {
		t := &ts[i]
		if t.Placed = len(t.Data) == l.Size() && t.SegSize == l.Hdr+l.Payload+l.Tail; t.Placed {
			t.Data = c.rest[i][:l.Segs*(l.Hdr+l.Tail)]
		} else {
			c.linear(i, len(t.Data))
		}
	}
	return r, err
}

// shape writes the gather list of message i: headers and trailers one behind the other into rest, so that
// a trailer and the header after it are one element; payloads into the place; what is longer than the
// train behind it in the ordinary buffer.
func (c *udpConn) shape(i int) {
	l := c.layout
	if need := l.Segs * (l.Hdr + l.Tail); len(c.rest[i]) < need {
		c.rest[i] = make([]byte, need)
	}
	iov := c.piov[i][:0]
	add := func(b []byte) { iov = append(iov, iovec(b)) }
	rest, place := c.rest[i], c.places[i]
	from := 0
	for s := range l.Segs {
		to := s*(l.Hdr+l.Tail) + l.Hdr
		add(rest[from:to])
		add(place[s*l.Payload : (s+1)*l.Payload])
		from = to
	}
	add(rest[from : from+l.Tail])
	if over := c.rbuf[i*rxBufBytes+l.Size() : (i+1)*rxBufBytes]; len(over) > 0 {
		add(over)
	}
	c.piov[i] = iov
	h := &c.rmsgs[i].hdr
	h.Iov = &iov[0]
	h.SetIovlen(len(iov))
}

// linear copies n bytes of message i from where the gather list put them to where Recv would have.
func (c *udpConn) linear(i, n int) {
	dst := c.rbuf[i*rxBufBytes:][:n]
	for _, v := range c.piov[i] {
		if len(dst) == 0 {
			return
		}
		b := unsafe.Slice(v.Base, v.Len)
		if &b[0] == &dst[0] {
			return // the end of a train longer than expected lies right
		}
		dst = dst[copy(dst, b):]
	}
}

// Linear implements packetio.Placer.
func (c *udpConn) Linear(i int) []byte {
	n := c.layout.Size()
	c.linear(i, n)
	return c.rbuf[i*rxBufBytes:][:n]
}

// recv receives at most n messages.
func (c *udpConn) recv(ts []packetio.RxTrain, n int) (int, error) {
	if c.off.Load() {
		return 0, nil
	}
	for i := range n {
		h := &c.rmsgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(rxControl)
	}
	r, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.rmsgs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		switch errno {
		case unix.EAGAIN, unix.EINTR:
			return 0, nil
		case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EMSGSIZE:
			return 0, nil // an ICMP error about something sent before
		}
		return 0, errno
	}
	bytes := 0
	for i := range int(r) {
		m := &c.rmsgs[i]
		bytes += int(m.n)
		t := &ts[i]
		t.Data = c.rbuf[i*rxBufBytes : i*rxBufBytes+int(m.n)]
		t.SegSize, t.TOS, t.TTL, t.Placed = int(m.n), 0, 64, false
		t.From = c.addrPort(&c.rnames[i])
		c.control(t, c.rctl[i][:m.hdr.Controllen])
	}
	// Long trains are taken two at a time, so that what the kernel has just copied is still in the nearest
	// cache when it is copied on; a call for each costs little beside.
	if c.rbatch = rxBatch; bytes > int(r)*longTrain {
		c.rbatch = 2
	}
	return int(r), nil
}

// control reads a message's control data.
func (c *udpConn) control(t *packetio.RxTrain, b []byte) {
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		if h.Len < unix.SizeofCmsghdr || uint64(h.Len) > uint64(len(b)) {
			return
		}
		d := b[unix.SizeofCmsghdr:h.Len]
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(d) >= 4:
			t.SegSize = int(*(*int32)(unsafe.Pointer(&d[0])))
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL && len(d) >= 4:
			// A 32-bit running count.
			old := c.drops.Load()
			c.drops.Store(old + uint64(*(*uint32)(unsafe.Pointer(&d[0]))-uint32(old)))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TTL && len(d) >= 4,
			h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_HOPLIMIT && len(d) >= 4:
			t.TTL = uint8(*(*int32)(unsafe.Pointer(&d[0])))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && len(d) >= 1:
			t.TOS = d[0]
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(d) >= 4:
			t.TOS = uint8(*(*int32)(unsafe.Pointer(&d[0])))
		}
		n := unix.CmsgSpace(int(h.Len) - unix.SizeofCmsghdr)
		if n > len(b) {
			return
		}
		b = b[n:]
	}
}

// addrPort reads an address in the kernel's form. A link-local one is on the link of the socket's own: it is called alike.
func (c *udpConn) addrPort(sa *unix.RawSockaddrInet6) netip.AddrPort {
	if sa.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), ntohs(v4.Port))
	}
	a := netip.AddrFrom16(sa.Addr)
	if z := c.local.Addr().Zone(); z != "" && a.IsLinkLocalUnicast() {
		a = a.WithZone(z)
	}
	return netip.AddrPortFrom(a, ntohs(sa.Port))
}

func ntohs(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

// name writes an address in the kernel's form.
func (c *udpConn) name(sa *unix.RawSockaddrInet6, a netip.AddrPort) uint32 {
	port := ntohs(a.Port())
	if a.Addr().Is4() {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(sa)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: a.Addr().As4()}
		return unix.SizeofSockaddrInet4
	}
	*sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: a.Addr().As16()}
	if a.Addr().IsLinkLocalUnicast() {
		sa.Scope_id = c.scope
	}
	return unix.SizeofSockaddrInet6
}

// Send implements packetio.Conn.
func (c *udpConn) Send(ts []packetio.TxTrain) (int, error) {
	if c.off.Load() {
		return len(ts), nil
	}
	n := min(len(ts), maxTrains)
	k := 0
	for i := range n {
		k += len(ts[i].Vec)
	}
	if cap(c.siov) < k {
		c.siov = make([]unix.Iovec, k, 2*k)
	}
	iov := c.siov[:k]
	k = 0
	for i := range n {
		t := &ts[i]
		h := &c.smsgs[i].hdr
		*h = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&c.snames[i])), Namelen: c.name(&c.snames[i], t.To)}
		h.Iov = &iov[k]
		h.SetIovlen(len(t.Vec))
		for _, v := range t.Vec {
			iov[k] = iovec(v)
			k++
		}
		c.sendControl(h, &c.sctl[i], t)
	}
	r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.smsgs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	runtime.KeepAlive(ts)
	clear(iov) // a gather list keeps nothing alive
	if errno != 0 {
		switch errno {
		case unix.EAGAIN, unix.ENOBUFS:
			return 0, packetio.ErrWouldBlock
		case unix.EINTR:
			return 0, packetio.ErrWouldBlock
		case unix.EIO, unix.EINVAL:
			if ts[0].Segs > 1 && c.gso {
				// No segmentation on this path (rocev2 spec 8.1): from now on one by one. This train and those behind
				// it were computed for a train; they are lost, as if on the wire.
				c.gso = false
				return 0, errno
			}
		}
		return 0, errno
	}
	if int(r) < n {
		return int(r), packetio.ErrWouldBlock
	}
	return int(r), nil
}

// iovec is a piece of a gather list.
func iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

// sendControl adds the segment size and the TOS, where there is something to say.
func (c *udpConn) sendControl(h *unix.Msghdr, buf *[txControl]byte, t *packetio.TxTrain) {
	off := 0
	put := func(level, typ int32, n int) unsafe.Pointer {
		ch := (*unix.Cmsghdr)(unsafe.Pointer(&buf[off]))
		ch.Level, ch.Type = level, typ
		ch.SetLen(unix.CmsgLen(n))
		p := unsafe.Pointer(&buf[off+unix.SizeofCmsghdr])
		off += unix.CmsgSpace(n)
		return p
	}
	if t.Segs > 1 {
		*(*uint16)(put(unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)) = uint16(t.SegSize)
	}
	if t.TOS != 0 {
		level, typ := int32(unix.IPPROTO_IP), int32(unix.IP_TOS)
		if !c.local.Addr().Is4() {
			level, typ = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		*(*int32)(put(level, typ, 4)) = int32(t.TOS)
	}
	if off > 0 {
		h.Control = &buf[0]
		h.SetControllen(off)
	}
}

// Wait implements packetio.Conn.
func (c *udpConn) Wait(deadline time.Time, wantWrite bool) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if err := c.setTimer(deadline); err != nil {
		return err
	}
	events := uint32(unix.EPOLLIN)
	if wantWrite {
		events = unix.EPOLLOUT // receiving waits until what is blocked has left (see device.step)
	}
	c.armMu.Lock()
	c.waiting = true
	c.arm(events)
	c.armMu.Unlock()
	err := c.sleep()
	c.armMu.Lock()
	c.waiting = false
	c.armMu.Unlock()
	return err
}

// Sleep implements packetio.Sleeper: the one-shot stays unarmed.
func (c *udpConn) Sleep(deadline time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if err := c.setTimer(deadline); err != nil {
		return err
	}
	return c.sleep()
}

// Arm implements packetio.Sleeper. The Sleep it was meant for may have become a Wait, which is armed as it wants to be.
func (c *udpConn) Arm() {
	c.armMu.Lock()
	defer c.armMu.Unlock()
	if !c.waiting {
		c.arm(unix.EPOLLIN)
	}
}

func (c *udpConn) arm(events uint32) {
	if c.off.Load() {
		return // and who has just missed it names a descriptor that this epoll instance does not have
	}
	unix.EpollCtl(c.ep, unix.EPOLL_CTL_MOD, c.fd, &unix.EpollEvent{Events: events | unix.EPOLLONESHOT, Fd: int32(c.fd)})
}

func (c *udpConn) sleep() error {
	if c.epRaw.Read(c.onReady) != nil {
		return net.ErrClosed
	}
	return nil
}

// ready drains what made the epoll instance readable.
func (c *udpConn) ready(fd uintptr) bool {
	var evs [3]unix.EpollEvent
	n, _ := unix.EpollWait(int(fd), evs[:], 0)
	for _, e := range evs[:max(n, 0)] {
		var b [8]byte
		switch int(e.Fd) {
		case c.evfd:
			// In this order: a Wake between the two writes nothing, and we, who are about to return, see what it was for. The
			// other way round it would write, we would read that away, and woken would stay set for ever.
			unix.Read(c.evfd, b[:])
			c.woken.Store(false)
		case c.timer:
			unix.Read(c.timer, b[:])
			c.timerAt = time.Time{}
		}
	}
	return n > 0
}

// setTimer arms the timerfd when the deadline has changed to an earlier one; a later one is lazily taken up
// when the earlier has fired.
func (c *udpConn) setTimer(t time.Time) error {
	if t.IsZero() || !c.timerAt.IsZero() && !t.Before(c.timerAt) {
		return nil
	}
	c.timerAt = t
	d := max(time.Until(t), 1)
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(d.Nanoseconds())}
	return os.NewSyscallError("timerfd_settime", unix.TimerfdSettime(c.timer, 0, &spec, nil))
}

// Wake implements packetio.Conn. Who leaves the engine role wakes when he has left it, and the device may be closed by then: what has
// the descriptor's number after that is not written to.
func (c *udpConn) Wake() {
	if c.woken.Swap(true) {
		return
	}
	c.wakeMu.Lock()
	defer c.wakeMu.Unlock()
	if c.closed.Load() {
		return
	}
	one := [8]byte{1}
	unix.Write(c.evfd, one[:])
}

// Unplug implements packetio.Conn. Closing the socket takes it out of the epoll instance.
func (c *udpConn) Unplug() {
	if !c.off.Swap(true) {
		unix.Close(c.fd)
	}
}

// Close implements packetio.Conn. Nobody is in Recv, Send or Wait any more.
func (c *udpConn) Close() error {
	c.wakeMu.Lock()
	was := c.closed.Swap(true)
	c.wakeMu.Unlock()
	if was {
		return nil
	}
	c.closeFDs()
	return nil
}

// PathMTU implements packetio.Conn: the MTU of the interface that owns the local address.
func (c *udpConn) PathMTU(netip.Addr) int {
	c.mtuMu.Lock()
	defer c.mtuMu.Unlock()
	if c.iface == 0 || time.Since(c.mtuAt) > time.Second {
		c.iface, c.mtuAt = interfaceMTU(c.local.Addr()), time.Now()
	}
	return c.iface
}

// interfaceMTU is the MTU of the interface with address a, or of the one whose network a is in (all of
// 127.0.0.0/8 is the loopback's); 1500 when nobody knows.
func interfaceMTU(a netip.Addr) int {
	ifs, err := net.Interfaces()
	if err != nil {
		return 1500
	}
	within := 0
	for _, ifi := range ifs {
		addrs, err := ifi.Addrs()
		if err != nil {
			continue
		}
		for _, x := range addrs {
			n, ok := x.(*net.IPNet)
			if !ok {
				continue
			}
			ip, _ := netip.AddrFromSlice(n.IP)
			if ip.Unmap() == a.WithZone("") {
				return ifi.MTU
			}
			if n.Contains(a.AsSlice()) {
				within = ifi.MTU
			}
		}
	}
	if within > 0 {
		return within
	}
	return 1500
}
