package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// tcpTransport is the baseline over Go's TCP, written as one would who wants it fast and simple: a
// message is its length and its payload in one Write; the receiver reads through a buffer of 64 KiB;
// one connection per flow.
type tcpTransport struct{}

const tcpReadBufferBytes = 64 << 10

func (tcpTransport) close() error { return nil }

func (tcpTransport) open(ctx context.Context, cfg endpointConfig) (endpoint, error) {
	ep := &tcpEndpoint{cfg: cfg}
	if !cfg.active {
		var lc net.ListenConfig
		ln, err := lc.Listen(ctx, "tcp", netip.AddrPortFrom(cfg.local, 0).String())
		if err != nil {
			return nil, err
		}
		ep.ln = ln.(*net.TCPListener)
	}
	return ep, nil
}

type tcpEndpoint struct {
	cfg   endpointConfig
	ln    *net.TCPListener // passive side only
	conns []*net.TCPConn   // by flow
}

func (e *tcpEndpoint) addrs() []netip.AddrPort {
	if e.ln == nil {
		return nil
	}
	return []netip.AddrPort{e.ln.Addr().(*net.TCPAddr).AddrPort()}
}

func (e *tcpEndpoint) connect(ctx context.Context, peers []netip.AddrPort) ([]flow, error) {
	e.conns = make([]*net.TCPConn, e.cfg.flows)
	var err error
	if e.cfg.active {
		err = e.dial(ctx, peers)
	} else {
		err = e.accept(ctx)
	}
	if err != nil {
		return nil, err
	}
	flows := make([]flow, len(e.conns))
	for i, c := range e.conns {
		flows[i] = &tcpFlow{conn: c, streamFlow: streamFlow{w: c, r: bufio.NewReaderSize(c, tcpReadBufferBytes)}}
	}
	return flows, nil
}

func (e *tcpEndpoint) dial(ctx context.Context, peers []netip.AddrPort) error {
	if len(peers) != 1 {
		return fmt.Errorf("tcp: %d addresses to connect to instead of one", len(peers))
	}
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(e.cfg.local, 0))}
	for i := range e.conns {
		c, err := d.DialContext(ctx, "tcp", peers[0].String())
		if err != nil {
			return err
		}
		e.conns[i] = c.(*net.TCPConn)
		if _, err := c.Write(appendPreamble(nil, e.cfg.token, i)); err != nil {
			return err
		}
	}
	return nil
}

// accept takes the connections of this run and closes any other.
func (e *tcpEndpoint) accept(ctx context.Context) error {
	defer e.ln.Close()
	stop := context.AfterFunc(ctx, func() { _ = e.ln.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for left := len(e.conns); left > 0; {
		c, err := e.ln.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fmt.Errorf("tcp: %d of %d connections came: %w", len(e.conns)-left, len(e.conns), err)
		}
		if i, ok := e.preamble(c); ok {
			e.conns[i] = c
			left--
		} else {
			c.Close()
		}
	}
	return nil
}

// preamble reads which flow of this run c is.
func (e *tcpEndpoint) preamble(c *net.TCPConn) (index int, ok bool) {
	if c.SetReadDeadline(time.Now().Add(time.Second)) != nil {
		return 0, false
	}
	i, ok := readPreamble(c, e.cfg.token)
	if !ok || i >= len(e.conns) || e.conns[i] != nil {
		return 0, false
	}
	return i, c.SetReadDeadline(time.Time{}) == nil
}

func (e *tcpEndpoint) counters() counters {
	var n counters
	for _, c := range e.conns {
		if c != nil {
			n.retransmits += tcpRetransmits(c)
		}
	}
	return n
}

func (e *tcpEndpoint) close() error {
	var errs []error
	if e.ln != nil {
		if err := e.ln.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range e.conns {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

type tcpFlow struct {
	streamFlow
	conn *net.TCPConn
}

func (f *tcpFlow) setDeadline(t time.Time) error { return f.conn.SetDeadline(t) }
