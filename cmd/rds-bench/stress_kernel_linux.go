package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// The kernel's RDS (linux/rds.h; rds-protocol spec 1 and 3.9), as much of it as rds-stress uses.
const (
	afRDS  = 21
	solRDS = 276

	optCancelSent  = 1
	optFreeMR      = 3
	optCongMonitor = 6
	infoCounters   = 10000
	siocSetTOS     = 0x89E0

	cmsgRDMAArgs   = 1
	cmsgRDMADest   = 2
	cmsgRDMAMap    = 3
	cmsgRDMAStatus = 4

	flagWrite      = 0x01
	flagFence      = 0x02
	flagInvalidate = 0x04
	flagUseOnce    = 0x08
	flagNotify     = 0x20
)

// kernelRetry is how often a message that has to wait is tried again: which of those who wait for a congested port, for room in the send
// buffer, or for a connection to map memory for, may go on is told to nobody in particular.
const kernelRetry = time.Millisecond

// kernelConnect is how long a connection may take to be of use: a kernel repeats its request for one after 6 s.
const kernelConnect = 10 * time.Second

type kernelHost struct {
	fd int // for questions
}

func openKernelRDS() (stressHost, error) {
	fd, err := unix.Socket(afRDS, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("the kernel's RDS (modules rds and rds_rdma): %w", os.NewSyscallError("socket", err))
	}
	return kernelHost{fd}, nil
}

func (h kernelHost) Close() error { return unix.Close(h.fd) }

// counters are RDS_INFO_COUNTERS: 32 bytes of name and 8 of value each.
func (h kernelHost) counters() (cs []rds.Counter) {
	buf := make([]byte, 40*256)
	n := uint32(len(buf))
	size, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(h.fd), solRDS, infoCounters, uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 || size < 40 {
		return nil
	}
	for b := buf[:n]; len(b) >= int(size); b = b[size:] {
		name, _, _ := bytes.Cut(b[:32], []byte{0})
		cs = append(cs, rds.Counter{Name: string(name), Value: binary.NativeEndian.Uint64(b[32:])})
	}
	return cs
}

func (h kernelHost) listen(_ context.Context, at netip.AddrPort, sendBuffer, receiveBuffer int, tos uint8) (stressSocket, error) {
	fd, err := unix.Socket(afRDS, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "rds") // known to the runtime's poller
	fail := func(call string, err error) (stressSocket, error) {
		return nil, errors.Join(os.NewSyscallError(call, err), f.Close())
	}
	for _, o := range []struct{ force, opt, n int }{
		{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, receiveBuffer},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.force, o.n); err == nil {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.opt, o.n); err != nil { // as much as an ordinary user may have
			return fail("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, kernelAddr(at)); err != nil {
		return fail(fmt.Sprintf("bind to %v", at), err)
	}
	if tos != 0 {
		if err := unix.IoctlSetPointerInt(fd, siocSetTOS, int(tos)); err != nil {
			return fail("ioctl SIOCRDSSETTOS", err)
		}
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return fail("fcntl", err)
	}
	s := &kernelSocket{f: f, rc: rc, at: at, oob: make([]byte, 4096)}
	s.news = sync.NewCond(&s.mu)
	return s, nil
}

// kernelAddr is ap as the kernel knows it: its RDS has addresses of both IPs.
func kernelAddr(ap netip.AddrPort) unix.Sockaddr {
	if a := ap.Addr(); a.Is6() {
		return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: a.As16(), ZoneId: scopeOf(a)}
	}
	return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
}

// rawAddr is ap in the form of struct sockaddr_in or sockaddr_in6.
func rawAddr(ap netip.AddrPort) []byte {
	ne, be := binary.NativeEndian, binary.BigEndian
	a := ap.Addr()
	if a.Is6() {
		v := a.As16()
		b := be.AppendUint16(ne.AppendUint16(nil, unix.AF_INET6), ap.Port())
		b = append(append(b, 0, 0, 0, 0), v[:]...) // no flow
		return ne.AppendUint32(b, scopeOf(a))
	}
	v := a.As4()
	b := be.AppendUint16(ne.AppendUint16(nil, unix.AF_INET), ap.Port())
	return append(append(b, v[:]...), make([]byte, 8)...)
}

// sendmsg is sendmsg(2) without waiting. unix.Sendmsg puts a byte into a message that has only control messages.
func sendmsg(fd uintptr, to, p, oob []byte) error {
	m := unix.Msghdr{Name: &to[0], Namelen: uint32(len(to))}
	var iov unix.Iovec
	if len(p) > 0 {
		iov.Base = &p[0]
		iov.SetLen(len(p))
		m.Iov = &iov
		m.SetIovlen(1)
	}
	if len(oob) > 0 {
		m.Control = &oob[0]
		m.SetControllen(len(oob))
	}
	if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), unix.MSG_DONTWAIT); errno != 0 {
		return errno
	}
	return nil
}

// kernelSocket is an AF_RDS socket.
type kernelSocket struct {
	f   *os.File
	rc  syscall.RawConn
	at  netip.AddrPort
	oob []byte // of the goroutine that receives

	mu       sync.Mutex
	news     *sync.Cond // completions or closed have changed
	complete []rds.Completion
	closed   bool
}

func (s *kernelSocket) AddrPort() netip.AddrPort { return s.at }

func (s *kernelSocket) Close() error {
	s.mu.Lock()
	s.closed = true
	s.news.Broadcast()
	s.mu.Unlock()
	return s.f.Close()
}

func appendCmsg(oob []byte, typ int, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = solRDS, int32(typ)
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return append(oob, b...)
}

func where(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

func (s *kernelSocket) try(m stressMessage) error { return s.sendmsg(m, nil) }

// sendmsg sends m, and maps what mapping says (rds_get_mr_args). The kernel follows the pointers in control messages, so what they
// point to is pinned here; memory for operations is pinned by the kernel itself until they have ended.
func (s *kernelSocket) sendmsg(m stressMessage, mapping []byte) error {
	ne := binary.NativeEndian
	var oob []byte
	var pin runtime.Pinner
	defer pin.Unpin()
	if m.cookie != 0 {
		oob = appendCmsg(oob, cmsgRDMADest, ne.AppendUint64(nil, uint64(m.cookie)))
	}
	if mapping != nil {
		oob = appendCmsg(oob, cmsgRDMAMap, mapping)
	}
	if o := m.op; o != nil {
		var vec []uint64
		mem := o.local.Bytes()
		for i := range o.segments {
			vec = append(vec, where(mem[i*o.size:]), uint64(o.size))
		}
		pin.Pin(&vec[0])
		flags := uint64(flagNotify)
		if o.write {
			flags |= flagWrite
		}
		// Of an operation that goes alone the kernel makes a datagram of nothing behind it, whose acknowledgement is what it tells as the
		// operation's end: that must not overtake the data either.
		if !o.write {
			flags |= flagFence
		}
		d := make([]byte, 0, 56)
		for _, v := range []uint64{uint64(o.remote), 0, uint64(o.segments * o.size), uint64(uintptr(unsafe.Pointer(&vec[0]))), uint64(o.segments), flags, o.token} {
			d = ne.AppendUint64(d, v)
		}
		oob = appendCmsg(oob, cmsgRDMAArgs, d)
	}
	to := rawAddr(m.to)
	var err error
	if e := s.rc.Control(func(fd uintptr) {
		for { // of signals that concern the program only
			if err = sendmsg(fd, to, m.data, oob); err != unix.EINTR {
				return
			}
		}
	}); e != nil {
		return e
	}
	switch err {
	case unix.ENOBUFS:
		return rds.ErrCongested
	case unix.EAGAIN:
		return rds.ErrNoBufferSpace
	}
	return os.NewSyscallError("sendmsg", err)
}

// again calls try until it has another answer than to try later.
func (s *kernelSocket) again(ctx context.Context, try func() error) error {
	for {
		err := try()
		if !errors.Is(err, rds.ErrCongested) && !errors.Is(err, rds.ErrNoBufferSpace) {
			return err
		}
		select {
		case <-time.After(kernelRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *kernelSocket) send(ctx context.Context, m stressMessage) error {
	return s.again(ctx, func() error { return s.try(m) })
}

func (s *kernelSocket) receive(ctx context.Context, buf []byte) (n int, from netip.AddrPort, cookie rds.Cookie, err error) {
	stop := context.AfterFunc(ctx, func() { _ = s.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ne := binary.NativeEndian
	for {
		var oobn int
		var sa unix.Sockaddr
		e := s.rc.Read(func(fd uintptr) bool {
			for {
				// With MSG_TRUNC n is the datagram's length, whatever of it fits.
				if n, oobn, _, sa, err = unix.Recvmsg(int(fd), buf, s.oob, unix.MSG_DONTWAIT|unix.MSG_TRUNC); err != unix.EINTR {
					return err != unix.EAGAIN
				}
			}
		})
		if e != nil {
			return 0, from, 0, e
		}
		if err != nil {
			return 0, from, 0, os.NewSyscallError("recvmsg", err)
		}
		msgs, err := unix.ParseSocketControlMessage(s.oob[:oobn])
		if err != nil {
			return 0, from, 0, err
		}
		for _, c := range msgs {
			switch {
			case c.Header.Level != solRDS:
			case c.Header.Type == cmsgRDMADest:
				cookie = rds.Cookie(ne.Uint64(c.Data))
			case c.Header.Type == cmsgRDMAStatus:
				s.mu.Lock()
				s.complete = append(s.complete, rds.Completion{Token: ne.Uint64(c.Data), Status: rds.CompletionStatus(ne.Uint32(c.Data[8:]))})
				s.news.Broadcast()
				s.mu.Unlock()
			}
		}
		switch sa := sa.(type) { // without one there were notifications only
		case *unix.SockaddrInet4:
			return n, netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), cookie, nil
		case *unix.SockaddrInet6:
			return n, netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), cookie, nil
		}
	}
}

// cancel is RDS_CANCEL_SENT_TO, which takes a sockaddr.
func (s *kernelSocket) cancel(to netip.AddrPort) (err error) {
	if e := s.rc.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), solRDS, optCancelSent, string(rawAddr(to))) }); e != nil {
		return e
	}
	return os.NewSyscallError("RDS_CANCEL_SENT_TO", err)
}

func (s *kernelSocket) completion(ctx context.Context) (rds.Completion, error) {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.news.Broadcast()
	})
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.complete) == 0 {
		switch {
		case s.closed:
			return rds.Completion{}, os.ErrClosed
		case ctx.Err() != nil:
			return rds.Completion{}, ctx.Err()
		}
		s.news.Wait()
	}
	c := s.complete[0]
	s.complete = s.complete[1:]
	return c, nil
}

// kernelRegion is memory that the kernel pins: for an operation, or by a mapping, which has a cookie.
type kernelRegion struct {
	s      *kernelSocket
	mem    []byte
	cookie rds.Cookie
}

func (r *kernelRegion) Bytes() []byte      { return r.mem }
func (r *kernelRegion) Cookie() rds.Cookie { return r.cookie }

// Close is RDS_FREE_MR.
func (r *kernelRegion) Close() (err error) {
	if r.cookie == 0 {
		return nil
	}
	d := binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, uint64(r.cookie)), flagInvalidate)
	if e := r.s.rc.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), solRDS, optFreeMR, string(d)) }); e != nil {
		return e
	}
	return os.NewSyscallError("RDS_FREE_MR", err)
}

func (s *kernelSocket) local(_ context.Context, mem []byte) (stressRegion, error) {
	return &kernelRegion{s: s, mem: mem}, nil
}

// register is not to be had: of the two ways in which the kernel's RDS/IB maps memory, only the one with a message works
// (rds-protocol spec 1.7).
func (s *kernelSocket) register(context.Context, netip.AddrPort, []byte, bool) (stressRegion, error) {
	return nil, fmt.Errorf("--rdma-use-get-mr with the kernel's RDS: %w", rds.ErrNotSupported)
}

func (s *kernelSocket) sendMapped(ctx context.Context, m stressMessage, mem []byte, once bool) (stressRegion, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	cookie := new(uint64)
	pin.Pin(cookie)
	flags := uint64(0)
	if once {
		flags = flagUseOnce
	}
	args := make([]byte, 0, 32)
	for _, v := range []uint64{where(mem), uint64(len(mem)), uint64(uintptr(unsafe.Pointer(cookie))), flags} {
		args = binary.NativeEndian.AppendUint64(args, v)
	}
	begin := time.Now()
	err := s.again(ctx, func() error {
		err := s.sendmsg(m, args)
		// EINVAL: the connection's QP is there and cannot register yet, or the arguments are really wrong.
		if errors.Is(err, unix.EINVAL) && time.Since(begin) < kernelConnect {
			err = rds.ErrNoBufferSpace
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &kernelRegion{s: s, mem: mem, cookie: rds.Cookie(*cookie)}, nil
}
