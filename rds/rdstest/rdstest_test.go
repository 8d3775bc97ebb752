package rdstest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdstest"
)

func TestMain(m *testing.M) { leak.Main(m) }

// hosts makes n Services with a socket each.
func hosts(t *testing.T, n int, cfg func() rds.Config, addr func(i int) netip.Addr) (conns []net.PacketConn, stop func(), err error) {
	var svcs []*rds.Service
	stop = func() {
		for _, s := range svcs {
			if err := s.Close(); err != nil && !errors.As(err, new(*rds.AbandonedError)) {
				t.Errorf("closing a service: %v", err)
			}
		}
	}
	for i := range n {
		c := cfg()
		c.Linger = -1 // a case that failed may leave more than anybody reads
		svc, err := rds.Open(c)
		if err != nil {
			stop()
			return nil, nil, err
		}
		svcs = append(svcs, svc)
		s, err := svc.ListenAddrPort(t.Context(), netip.AddrPortFrom(addr(i), 4000))
		if err != nil {
			stop()
			return nil, nil, err
		}
		conns = append(conns, s)
	}
	return conns, stop, nil
}

func simAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}) }

// Over UDP sockets of the loopback interface, in both dialects.
func TestSocketsUDP(t *testing.T) {
	for i, d := range []rds.Dialect{rds.DialectOpen, rds.DialectKernelOnly} {
		t.Run([]string{"open", "kernel"}[i], func(t *testing.T) {
			port := freePort(t)
			rdstest.TestPacketConn(t, func(n int) ([]net.PacketConn, func(), error) {
				return hosts(t, n, func() rds.Config { return rds.Config{UDPPort: port, Dialect: d} },
					func(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(100 + i)}) })
			})
		})
	}
}

func freePort(t *testing.T) uint16 {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// Sockets of one Service, between which nothing travels.
func TestSocketsLocal(t *testing.T) {
	port := freePort(t)
	rdstest.TestPacketConn(t, func(n int) (conns []net.PacketConn, stop func(), err error) {
		svc, err := rds.Open(rds.Config{UDPPort: port})
		if err != nil {
			return nil, nil, err
		}
		for i := range n {
			s, err := svc.ListenPacket(t.Context(), fmt.Sprintf("127.0.0.%d:4000", 120+i%2))
			if errors.Is(err, rds.ErrAddrInUse) {
				s, err = svc.ListenPacket(t.Context(), fmt.Sprintf("127.0.0.%d:0", 120+i%2))
			}
			if err != nil {
				svc.Close()
				return nil, nil, err
			}
			conns = append(conns, s)
		}
		return conns, func() {
			if err := svc.Close(); err != nil {
				t.Errorf("closing the service: %v", err)
			}
		}, nil
	})
}

// The whole suite over simulated networks, good and bad.
func TestSocketsSim(t *testing.T) {
	for _, l := range []simnet.LinkConfig{{}, {Loss: 0.01, Reorder: 0.01, Dup: 0.01}} {
		t.Run(fmt.Sprintf("loss %v", l.Loss), func(t *testing.T) {
			rdstest.TestPacketConn(t, func(n int) ([]net.PacketConn, func(), error) {
				nw := simnet.New(1, simnet.Config{})
				nw.SetDefaultLink(l)
				return hosts(t, n, func() rds.Config { return rds.Config{Network: nw} }, simAddr)
			})
		})
	}
}

// batchConn reads and writes through the batch calls, several datagrams at a time where there are several.
type batchConn struct {
	*rds.Socket
	mu   sync.Mutex // readers
	ms   [8]rds.BatchMessage
	r, w int
}

func (c *batchConn) WriteTo(p []byte, addr net.Addr) (int, error) {
	half := len(p) / 2
	ms := [1]rds.BatchMessage{{Buffers: [][]byte{p[:half], p[half:]}, Addr: addr.(rds.Addr).AddrPort()}}
	if _, err := c.WriteBatch(ms[:], 0); err != nil {
		return 0, err
	}
	return ms[0].N, nil
}

func (c *batchConn) ReadFrom(p []byte) (int, net.Addr, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.r == c.w {
		c.r, c.w = 0, 0
		for i := range c.ms {
			if c.ms[i].Buffers == nil {
				c.ms[i].Buffers = [][]byte{make([]byte, 1000), make([]byte, rdstest.MaxSize)}
			}
		}
		n, err := c.ReadBatch(c.ms[:], 0)
		if err != nil {
			return 0, nil, err
		}
		c.w = n
	} else if _, _, _, err := c.ReadMsg(nil, rds.MsgPeek|rds.MsgDontWait|rds.MsgTrunc); err != nil && !errors.Is(err, rds.ErrWouldBlock) {
		return 0, nil, err // closed, or past the deadline: what is here already may not be had either
	}
	m := &c.ms[c.r]
	c.r++
	n := 0
	for _, b := range m.Buffers {
		n += copy(p[n:], b[:max(0, min(len(b), m.N-n))])
	}
	if n < m.N {
		return n, rds.AddrFromAddrPort(m.Addr), io.ErrShortBuffer
	}
	return n, rds.AddrFromAddrPort(m.Addr), nil
}

// lendingConn writes into memory that is sent as it is, and reads what is lent.
type lendingConn struct{ *rds.Socket }

func (c *lendingConn) WriteTo(p []byte, addr net.Addr) (int, error) {
	b, err := c.Alloc(len(p))
	if err != nil {
		return 0, err
	}
	defer b.Free()
	b.Write(p)
	if err := c.Send(context.Background(), rds.Message{Peer: addr.(rds.Addr).AddrPort(), Buffer: b}); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *lendingConn) ReadFrom(p []byte) (n int, _ net.Addr, err error) {
	m, err := c.Receive(context.Background())
	if err != nil {
		return 0, nil, err
	}
	defer m.Release()
	for _, b := range m.Buffers() {
		n += copy(p[n:], b)
	}
	if n < m.Len() {
		err = io.ErrShortBuffer
	}
	return n, rds.AddrFromAddrPort(m.Peer), err
}

// pollingConn waits as an event loop does, and never in a read or a write.
type pollingConn struct {
	*rds.Socket
	rc syscall.RawConn
}

func (c *pollingConn) ReadFrom(p []byte) (n int, from net.Addr, err error) {
	werr := c.rc.Read(func(uintptr) bool {
		var ap netip.AddrPort
		if n, ap, err = c.TryReadFromAddrPort(p); errors.Is(err, rds.ErrWouldBlock) {
			return false
		}
		from = rds.AddrFromAddrPort(ap)
		return true
	})
	if werr != nil {
		return 0, nil, werr
	}
	return n, from, err
}

func (c *pollingConn) WriteTo(p []byte, addr net.Addr) (n int, err error) {
	werr := c.rc.Write(func(uintptr) bool {
		n, err = c.TryWriteToAddrPort(p, addr.(rds.Addr).AddrPort())
		return !errors.Is(err, rds.ErrNoBufferSpace) && !errors.Is(err, rds.ErrCongested)
	})
	if werr != nil {
		return 0, werr
	}
	return n, err
}

// The other ways to read and write carry the same datagrams.
func TestSocketsOtherCalls(t *testing.T) {
	for name, wrap := range map[string]func(*rds.Socket) net.PacketConn{
		"batches": func(s *rds.Socket) net.PacketConn { return &batchConn{Socket: s} },
		"loans":   func(s *rds.Socket) net.PacketConn { return &lendingConn{s} },
		"polling": func(s *rds.Socket) net.PacketConn {
			rc, err := s.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			return &pollingConn{s, rc}
		},
	} {
		t.Run(name, func(t *testing.T) {
			port := freePort(t)
			rdstest.TestPacketConn(t, func(n int) ([]net.PacketConn, func(), error) {
				conns, stop, err := hosts(t, n, func() rds.Config { return rds.Config{UDPPort: port} },
					func(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(140 + i)}) })
				for i, c := range conns {
					conns[i] = wrap(c.(*rds.Socket))
				}
				return conns, stop, err
			})
		})
	}
}

// streamConn makes a stream of a connected socket for nettest: writes of any length become datagrams, reads take what is left of
// the last one, and an empty datagram, which Close sends, is the end that RDS does not have.
type streamConn struct {
	*rds.Socket
	mu   sync.Mutex // readers
	buf  [64 << 10]byte
	rest []byte
	eof  bool

	wmu    sync.Mutex // writers: what one writes is not mixed with another's
	closed sync.Once
	err    error
}

func (c *streamConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.rest) == 0 && !c.eof {
		n, err := c.Socket.Read(c.buf[:])
		if err != nil {
			return 0, err
		}
		c.rest, c.eof = c.buf[:n], n == 0
	}
	if c.eof {
		return 0, io.EOF
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *streamConn) Write(p []byte) (n int, err error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	for len(p) > 0 {
		k := min(len(p), len(c.buf))
		if k, err = c.Socket.Write(p[:k]); err != nil {
			return n, err
		}
		n += k
		p = p[k:]
	}
	return n, nil
}

func (c *streamConn) Close() error {
	c.closed.Do(func() {
		c.Socket.SetWriteDeadline(time.Time{})
		c.Socket.TrySend(rds.Message{})
		c.err = c.Socket.Close()
	})
	return c.err
}

// golang.org/x/net/nettest on a connected pair.
func TestConn(t *testing.T) {
	port := freePort(t)
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		conns, stop, err := hosts(t, 2, func() rds.Config { return rds.Config{UDPPort: port} },
			func(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(130 + i)}) })
		if err != nil {
			return nil, nil, nil, err
		}
		// One end dials the other, which connects back.
		server := conns[1].(*rds.Socket)
		d := rds.Dialer{ListenConfig: rds.ListenConfig{Service: conns[0].(*rds.Socket).Service()}}
		c, err := d.Dial("rds", server.Addr().String())
		if err == nil {
			err = server.Connect(c.LocalAddr())
		}
		if err != nil {
			stop()
			return nil, nil, nil, err
		}
		ends := [2]*streamConn{{Socket: c.(*rds.Socket)}, {Socket: server}}
		return ends[0], ends[1], func() {
			ends[0].Close()
			ends[1].Close()
			stop()
		}, nil
	})
}
