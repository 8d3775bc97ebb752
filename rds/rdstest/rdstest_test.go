package rdstest_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
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
		var ends [2]*streamConn
		for i, c := range conns {
			ends[i] = &streamConn{Socket: c.(*rds.Socket)}
			if err := ends[i].Connect(conns[1-i].LocalAddr()); err != nil {
				stop()
				return nil, nil, nil, err
			}
		}
		return ends[0], ends[1], func() {
			ends[0].Close()
			ends[1].Close()
			stop()
		}, nil
	})
}
