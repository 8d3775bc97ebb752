//go:build lab && linux

package lab

import (
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"net/rpc"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel's RDS is driven by a program of ours in the guest that opens AF_RDS sockets and serves net/rpc
// on its standard input and output. Numbers are those of linux/rds.h (rds-protocol spec 1.1, 1.7, 6.1).
const (
	afRDS  = 21
	solRDS = 276

	optCongMonitor = 6

	infoCounters   = 10000
	infoConns      = 10001
	infoConns6     = 10011
	infoSendQueue6 = 10012
	infoRetrans6   = 10013
	infoRecvQueue6 = 10014
	infoSockets6   = 10015

	siocSetTOS = 0x89E0
	siocGetTOS = 0x89E1
)

// afrdsMain is the program.
func afrdsMain([]string) int {
	k := &KernelRDS{socks: make(map[int]int), statuses: make(map[int][]RDMAStatus)}
	fd, err := unix.Socket(afRDS, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, "AF_RDS:", err)
		return 1
	}
	k.info = fd
	srv := rpc.NewServer()
	if err := srv.Register(k); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	srv.ServeConn(stdio{})
	return 0
}

type stdio struct{}

func (stdio) Read(p []byte) (int, error)  { return os.Stdin.Read(p) }
func (stdio) Write(p []byte) (int, error) { return os.Stdout.Write(p) }
func (stdio) Close() error                { return nil }

// KernelRDS is the program's service. Calls run at the same time.
type KernelRDS struct {
	info int // unbound socket for the information interface

	mu       sync.Mutex
	next     int
	socks    map[int]int // ID -> descriptor
	bufs     [][]byte
	statuses map[int][]RDMAStatus // by socket's ID: received, not yet asked for
}

func (k *KernelRDS) fd(id int) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd, ok := k.socks[id]
	if !ok {
		return -1, errors.New("no such socket")
	}
	return fd, nil
}

// OpenArgs are the parameters of a socket. Buffers of 0 bytes: 4 MiB.
type OpenArgs struct {
	Local          netip.AddrPort // port 0: any
	TOS            uint8
	SndBuf, RcvBuf int
	Monitor        bool // RDS_CONG_MONITOR
}

// Opened is a socket.
type Opened struct {
	ID    int
	Local netip.AddrPort
}

// Open opens and binds a socket.
func (k *KernelRDS) Open(a OpenArgs, out *Opened) error {
	fd, err := unix.Socket(afRDS, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	for opt, n := range map[int]int{unix.SO_SNDBUFFORCE: a.SndBuf, unix.SO_RCVBUFFORCE: a.RcvBuf} {
		if n == 0 {
			n = 4 << 20
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, n); err != nil {
			return fmt.Errorf("setsockopt: %w", err)
		}
	}
	if a.Monitor {
		if err := unix.SetsockoptInt(fd, solRDS, optCongMonitor, 1); err != nil {
			return fmt.Errorf("RDS_CONG_MONITOR: %w", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(a.Local)); err != nil {
		return fmt.Errorf("bind %v: %w", a.Local, err)
	}
	if a.TOS != 0 {
		if err := unix.IoctlSetPointerInt(fd, siocSetTOS, int(a.TOS)); err != nil {
			return fmt.Errorf("SIOCRDSSETTOS: %w", err)
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("getsockname: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.next++
	k.socks[k.next] = fd
	*out = Opened{ID: k.next, Local: addrPortOf(sa)}
	return nil
}

// Close closes a socket.
func (k *KernelRDS) Close(id int, _ *struct{}) error {
	fd, err := k.fd(id)
	if err != nil {
		return err
	}
	k.mu.Lock()
	delete(k.socks, id)
	k.mu.Unlock()
	return unix.Close(fd)
}

// SendArgs are datagrams: number i has Sizes[i] bytes of the pattern Seed+i.
type SendArgs struct {
	ID     int
	To     netip.AddrPort
	Seed   uint32
	Sizes  []int
	NoWait bool
}

// Sent is how many were accepted, and the error that ended it.
type Sent struct {
	N     int
	Errno unix.Errno
}

// Send sends datagrams; it waits like the kernel does unless told not to.
func (k *KernelRDS) Send(a SendArgs, out *Sent) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	flags := 0
	if a.NoWait {
		flags = unix.MSG_DONTWAIT
	}
	buf := make([]byte, 1<<20)
	for i, n := range a.Sizes {
		pattern(buf[:n], a.Seed+uint32(i))
		if err := unix.Sendto(fd, buf[:n], flags, sockaddr(a.To)); err != nil {
			return errors.Join(nil, asErrno(err, &out.Errno))
		}
		out.N++
	}
	return nil
}

func asErrno(err error, to *unix.Errno) error {
	if errors.As(err, to) {
		return nil
	}
	return err
}

// RecvArgs say how many datagrams to wait for, and how long for each.
type RecvArgs struct {
	ID, Count int
	Limit     time.Duration
}

// Datagram is a received datagram without its content.
type Datagram struct {
	From   netip.AddrPort
	Len    int
	Sum    uint32 // CRC-32
	Cookie uint64 // RDS_CMSG_RDMA_DEST
}

// Recv receives datagrams; fewer than Count if the limit passes.
func (k *KernelRDS) Recv(a RecvArgs, out *[]Datagram) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	buf, oob := make([]byte, 1<<20), make([]byte, 4096)
	end := time.Now().Add(a.Limit)
	for len(*out) < a.Count {
		n, oobn, _, sa, err := unix.Recvmsg(fd, buf, oob, unix.MSG_DONTWAIT)
		var d Datagram
		if err == nil {
			err = k.cmsgs(a.ID, oob[:oobn], &d)
		}
		switch {
		case err == unix.EAGAIN || err == nil && sa == nil: // nothing, or news about congestion or operations
			left := time.Until(end)
			if left <= 0 {
				return nil
			}
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, time.Second).Milliseconds())+1); err != nil && err != unix.EINTR {
				return err
			}
		case err != nil:
			return err
		default:
			d.From, d.Len, d.Sum = addrPortOf(sa), n, crc32.ChecksumIEEE(buf[:n])
			*out = append(*out, d)
			end = time.Now().Add(a.Limit)
		}
	}
	return nil
}

// Poll waits until the socket has one of events and returns those it has.
func (k *KernelRDS) Poll(a struct {
	ID     int
	Events int16
	Limit  time.Duration
}, out *int16) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: a.Events}}
	_, err = unix.Poll(fds, int(a.Limit.Milliseconds()))
	*out = fds[0].Revents
	return err
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// kernelEnd is the host's handle on the program.
type kernelEnd struct {
	t testing.TB
	p *Process
	c *rpc.Client
}

type procConn struct{ *Process }

func (p procConn) Close() error { return p.CloseWrite() }

func newKernelEnd(t testing.TB, g *Guest) *kernelEnd {
	t.Helper()
	p, err := g.StartProgram("afrds")
	if err != nil {
		t.Fatal(err)
	}
	k := &kernelEnd{t: t, p: p, c: rpc.NewClient(procConn{p})}
	t.Cleanup(func() {
		_ = p.Signal(unix.SIGKILL)
		<-p.Done()
		_ = k.c.Close()
		if t.Failed() && p.Stderr() != "" {
			t.Logf("guest's AF_RDS program: %s", p.Stderr())
		}
	})
	return k
}

// call calls a method; an answer that does not come kills the program.
func (k *kernelEnd) call(method string, args, reply any) error {
	limit := time.AfterFunc(2*time.Minute, func() { _ = k.p.Signal(unix.SIGKILL) })
	defer limit.Stop()
	if err := k.c.Call("KernelRDS."+method, args, reply); err != nil {
		return fmt.Errorf("kernel RDS: %s: %w %s", method, err, k.p.Stderr())
	}
	return nil
}

func (k *kernelEnd) must(method string, args, reply any) {
	k.t.Helper()
	if err := k.call(method, args, reply); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kernelEnd) open(a OpenArgs) Opened {
	k.t.Helper()
	var o Opened
	k.must("Open", a, &o)
	return o
}
