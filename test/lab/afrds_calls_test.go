//go:build lab && linux

package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls of the AF_RDS program as they are, for tests of what the kernel answers: nothing is checked, retried or
// translated on the way.

// Further options of level SOL_RDS.
const (
	optCancelSentTo = 1
	optTransport    = 8
	optPathLatency  = 10
	cmsgCongUpdate  = 5
	cmsgPathLatency = 11
	cmsgZcopyCookie = 12
	transportIB     = 0
	transportTCP    = 2

	maxControlLength = 4096
)

// Calls.
const (
	callSocket   = "socket"
	callBind     = "bind"
	callConnect  = "connect"
	callSend     = "sendmsg"
	callRecv     = "recvmsg"
	callSetOpt   = "setsockopt"
	callGetOpt   = "getsockopt"
	callIoctl    = "ioctl"
	callSockName = "getsockname"
	callPeerName = "getpeername"
	callListen   = "listen"
	callAccept   = "accept"
	callShutdown = "shutdown"
	callClose    = "close"
	callPoll     = "poll"
	// An epoll descriptor that has the socket; numbered as sockets are, and closed as they are.
	callEpoll     = "epoll_ctl"
	callEpollWait = "epoll_wait"
)

// Call is a system call on a socket of the program. Which fields count depends on Call.
type Call struct {
	Call  string
	ID    int
	Name  []byte // an address as the kernel wants it: family first; nil: none
	Level int    // option's; of a socket its type
	Num   int    // option, ioctl, backlog, events; of a socket its protocol
	Data  []byte // of an option or an ioctl; its length is that of what is asked for
	Size  int    // of a payload or a buffer; of a poll its time limit in milliseconds
	Seed  uint32 // of a payload's pattern
	Flags int
	Cmsgs []Cmsg
}

// Cmsg is a control message.
type Cmsg struct {
	Level, Type int
	Data        []byte
	Vector      int // RDMA_ARGS: so many local segments, of 1 byte of the payload each
}

// Outcome is what a call returned.
type Outcome struct {
	Errno unix.Errno
	N     int    // return value; of a socket its number here
	Data  []byte // what an option or an ioctl filled in
	Name  []byte // address filled in
	Flags int    // of a received message; events of a poll, 0: none
	Cmsgs []Cmsg
	Sum   uint32        // CRC-32 of what was received
	Took  time.Duration // how long it took
}

func bytePtr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// Call makes a system call.
func (k *KernelRDS) Call(a Call, out *Outcome) (err error) {
	fd := -1
	if a.Call != callSocket {
		if fd, err = k.fd(a.ID); err != nil {
			return err
		}
	}
	begin := time.Now()
	defer func() { out.Took = time.Since(begin) }()
	sys := func(trap uintptr, args ...uintptr) int {
		args = append([]uintptr{uintptr(fd)}, append(args, 0, 0, 0, 0, 0)...)
		var n uintptr
		for { // of signals that concern the program only
			n, _, out.Errno = unix.Syscall6(trap, args[0], args[1], args[2], args[3], args[4], args[5])
			if out.Errno != unix.EINTR {
				break
			}
		}
		if out.Errno != 0 {
			return 0
		}
		return int(n)
	}
	var pin runtime.Pinner // addresses travel as numbers
	defer pin.Unpin()
	keep := func(b []byte) uintptr {
		if len(b) > 0 {
			pin.Pin(&b[0])
		}
		return bytePtr(b)
	}
	length := new(uint32)
	pin.Pin(length)
	lengthPtr := uintptr(unsafe.Pointer(length))

	switch a.Call {
	case callSocket:
		fd, err := unix.Socket(afRDS, a.Level|unix.SOCK_CLOEXEC, a.Num)
		if err != nil {
			return asErrno(err, &out.Errno)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.next++
		k.socks[k.next], out.N = fd, k.next
	case callClose:
		return k.Close(a.ID, nil)
	case callBind:
		sys(unix.SYS_BIND, keep(a.Name), uintptr(len(a.Name)))
	case callConnect:
		sys(unix.SYS_CONNECT, keep(a.Name), uintptr(len(a.Name)))
	case callListen:
		sys(unix.SYS_LISTEN, uintptr(a.Num))
	case callAccept:
		sys(unix.SYS_ACCEPT)
	case callShutdown:
		sys(unix.SYS_SHUTDOWN, unix.SHUT_RDWR)
	case callSockName, callPeerName:
		name := make([]byte, 128)
		*length = uint32(len(name))
		trap := uintptr(unix.SYS_GETSOCKNAME)
		if a.Call == callPeerName {
			trap = unix.SYS_GETPEERNAME
		}
		sys(trap, keep(name), lengthPtr)
		out.Name = name[:*length]
	case callSetOpt:
		sys(unix.SYS_SETSOCKOPT, uintptr(a.Level), uintptr(a.Num), keep(a.Data), uintptr(len(a.Data)))
	case callGetOpt:
		*length = uint32(len(a.Data))
		out.N = sys(unix.SYS_GETSOCKOPT, uintptr(a.Level), uintptr(a.Num), keep(a.Data), lengthPtr)
		out.Data = a.Data[:min(int(*length), len(a.Data))]
	case callIoctl:
		sys(unix.SYS_IOCTL, uintptr(a.Num), keep(a.Data))
		out.Data = a.Data
	case callPoll:
		out.Flags, err = pollOne(fd, a.Num, time.Duration(a.Size)*time.Millisecond)
		return asErrno(err, &out.Errno)
	case callEpoll:
		ep, err := newEpoll(fd, a.Num)
		if err != nil {
			return asErrno(err, &out.Errno)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.next++
		k.socks[k.next], out.N = ep, k.next
	case callEpollWait:
		out.Flags, err = epollOne(fd, time.Duration(a.Size)*time.Millisecond)
		return asErrno(err, &out.Errno)
	case callSend, callRecv:
		p := make([]byte, a.Size)
		var oob []byte
		name := a.Name
		trap := uintptr(unix.SYS_SENDMSG)
		if a.Call == callSend {
			pattern(p, a.Seed)
			for _, c := range a.Cmsgs {
				if c.Vector > 0 {
					var vec []uint64
					for range c.Vector {
						vec = append(vec, uint64(bytePtr(p)), 1)
					}
					pin.Pin(&vec[0])
					binary.NativeEndian.PutUint64(c.Data[24:], uint64(uintptr(unsafe.Pointer(&vec[0]))))
				}
				oob = appendControl(oob, c)
			}
		} else {
			trap = unix.SYS_RECVMSG
			oob, name = make([]byte, maxControlLength), make([]byte, 128)
		}
		iov := &unix.Iovec{Len: uint64(len(p))}
		m := &unix.Msghdr{Iov: iov, Iovlen: 1, Namelen: uint32(len(name)), Controllen: uint64(len(oob))}
		pin.Pin(iov)
		pin.Pin(m)
		if len(p) > 0 {
			iov.Base = &p[0]
			pin.Pin(iov.Base)
		}
		if len(name) > 0 {
			m.Name = &name[0]
			pin.Pin(m.Name)
		}
		if len(oob) > 0 {
			m.Control = &oob[0]
			pin.Pin(m.Control)
		}
		out.N = sys(trap, uintptr(unsafe.Pointer(m)), uintptr(a.Flags))
		if a.Call == callSend || out.Errno != 0 {
			return nil
		}
		out.Flags, out.Name, out.Sum = int(m.Flags), name[:m.Namelen], crc(p[:min(out.N, len(p))])
		msgs, err := unix.ParseSocketControlMessage(oob[:m.Controllen])
		if err != nil {
			return err
		}
		for _, c := range msgs {
			out.Cmsgs = append(out.Cmsgs, Cmsg{Level: int(c.Header.Level), Type: int(c.Header.Type), Data: c.Data})
		}
	default:
		return fmt.Errorf("no call %q", a.Call)
	}
	return nil
}

// untilDone makes a call that waits for limit, again after a signal.
func untilDone(limit time.Duration, call func(ms int) (int, error)) (n int, err error) {
	end := time.Now().Add(limit)
	for {
		n, err = call(max(0, int((time.Until(end)+time.Millisecond-1)/time.Millisecond)))
		if err != unix.EINTR {
			return n, err
		}
	}
}

// pollOne is the events that fd has, 0 if it has none within limit.
func pollOne(fd, events int, limit time.Duration) (int, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: int16(events)}}
	_, err := untilDone(limit, func(ms int) (int, error) { return unix.Poll(fds, ms) })
	return int(fds[0].Revents), err
}

// newEpoll is an epoll descriptor with fd.
func newEpoll(fd, events int) (int, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, err
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: uint32(events)}); err != nil {
		_ = unix.Close(ep)
		return -1, err
	}
	return ep, nil
}

// epollOne is the events that ep's only descriptor has, 0 if it has none within limit.
func epollOne(ep int, limit time.Duration) (int, error) {
	var evs [1]unix.EpollEvent
	n, err := untilDone(limit, func(ms int) (int, error) { return unix.EpollWait(ep, evs[:], ms) })
	if err != nil || n == 0 {
		return 0, err
	}
	return int(evs[0].Events), nil
}

// appendControl appends a control message. One without data has a length that is too short for its type.
func appendControl(oob []byte, c Cmsg) []byte {
	if c.Level == solRDS {
		return appendCmsg(oob, c.Type, c.Data)
	}
	b := appendCmsg(nil, c.Type, c.Data)
	binary.NativeEndian.PutUint32(b[8:], uint32(c.Level))
	return append(oob, b...)
}

// rawAddr is the address as the kernel wants it: sockaddr_in or sockaddr_in6. An address with zone has its number.
func rawAddr(ap netip.AddrPort) []byte {
	a := ap.Addr()
	if a.Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = binary.BigEndian.AppendUint16(b, ap.Port())
		return append(append(b, a.AsSlice()...), make([]byte, 8)...)
	}
	var scope uint32
	fmt.Sscan(a.Zone(), &scope)
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, ap.Port())
	b = binary.BigEndian.AppendUint32(b, 0)
	b = append(b, a.AsSlice()...)
	return binary.NativeEndian.AppendUint32(b, scope)
}

// parseRawAddr is its inverse; invalid for any other family.
func parseRawAddr(b []byte) netip.AddrPort {
	if len(b) < 16 {
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		if len(b) >= 28 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port)
		}
	}
	return netip.AddrPort{}
}

// do makes a system call in the guest.
func (k *kernelEnd) do(c Call) (out Outcome) {
	k.t.Helper()
	k.must("Call", c, &out)
	return out
}
