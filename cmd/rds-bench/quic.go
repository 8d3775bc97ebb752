package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/quic-go/quic-go"
)

// quicTransport is the baseline over QUIC (quic-go): as the one over TCP, a connection per flow with one stream of messages,
// each its length and its payload in one Write, read through a buffer of 64 KiB. QUIC's own datagrams would be no
// comparison: they are unreliable and fit into a packet. It encrypts, which none of the others do.
//
// The certificate is made up for the run and not looked at: whoever answers is known by the run's token, and what is sent
// is no secret.
type quicTransport struct {
	tls *tls.Config
}

const (
	quicALPN        = "rds-bench"
	quicStreamBytes = 6 << 20 // receive window: what quic-go would grow it to by itself
	quicConnBytes   = 15 << 20
)

func newQUIC() (transport, error) {
	// It would complain on standard error about the size of the socket's buffer, which is the machine's setting.
	if err := os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true"); err != nil {
		return nil, err
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	cert := x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &cert, &cert, pub, key)
	if err != nil {
		return nil, err
	}
	return quicTransport{&tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:         []string{quicALPN},
		InsecureSkipVerify: true,
		MinVersion:         tls.VersionTLS13,
	}}, nil
}

func (quicTransport) close() error { return nil }

func (t quicTransport) open(_ context.Context, cfg endpointConfig) (endpoint, error) {
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(cfg.local, 0)))
	if err != nil {
		return nil, err
	}
	ep := &quicEndpoint{cfg: cfg, tls: t.tls, udp: udp, tr: &quic.Transport{Conn: udp}}
	if !cfg.active {
		if ep.ln, err = ep.tr.Listen(t.tls, quicConfig()); err != nil {
			return nil, errors.Join(err, ep.close())
		}
	}
	return ep, nil
}

func quicConfig() *quic.Config {
	return &quic.Config{
		InitialStreamReceiveWindow:     quicStreamBytes,
		InitialConnectionReceiveWindow: quicConnBytes,
		MaxIdleTimeout:                 time.Minute,
		KeepAlivePeriod:                15 * time.Second,
	}
}

type quicEndpoint struct {
	cfg   endpointConfig
	tls   *tls.Config
	udp   *net.UDPConn
	tr    *quic.Transport
	ln    *quic.Listener // passive side only
	conns []*quic.Conn   // by flow
}

func (e *quicEndpoint) addrs() []netip.AddrPort {
	if e.ln == nil {
		return nil
	}
	return []netip.AddrPort{e.udp.LocalAddr().(*net.UDPAddr).AddrPort()}
}

func (e *quicEndpoint) connect(ctx context.Context, peers []netip.AddrPort) ([]flow, error) {
	e.conns = make([]*quic.Conn, e.cfg.flows)
	flows := make([]flow, e.cfg.flows)
	if e.cfg.active && len(peers) != 1 {
		return nil, fmt.Errorf("quic: %d addresses to connect to instead of one", len(peers))
	}
	for n := range flows {
		i, s, err := n, (*quic.Stream)(nil), error(nil)
		if e.cfg.active {
			s, err = e.dial(ctx, n, peers[0])
		} else {
			i, s, err = e.accept(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("quic: connection %d of %d: %w", n+1, len(flows), err)
		}
		flows[i] = &quicFlow{stream: s, streamFlow: streamFlow{w: s, r: bufio.NewReaderSize(s, tcpReadBufferBytes)}}
	}
	return flows, nil
}

func (e *quicEndpoint) dial(ctx context.Context, i int, peer netip.AddrPort) (*quic.Stream, error) {
	c, err := e.tr.Dial(ctx, net.UDPAddrFromAddrPort(peer), e.tls, quicConfig())
	if err != nil {
		return nil, err
	}
	e.conns[i] = c
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	_, err = s.Write(appendPreamble(nil, e.cfg.token, i))
	return s, err
}

// accept takes a connection of this run and closes any other.
func (e *quicEndpoint) accept(ctx context.Context) (int, *quic.Stream, error) {
	for {
		c, err := e.ln.Accept(ctx)
		if err != nil {
			return 0, nil, err
		}
		if i, s, ok := e.preamble(ctx, c); ok {
			e.conns[i] = c
			return i, s, nil
		}
		_ = c.CloseWithError(1, "not of this run")
	}
}

// preamble reads which flow of this run c is.
func (e *quicEndpoint) preamble(ctx context.Context, c *quic.Conn) (int, *quic.Stream, bool) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	s, err := c.AcceptStream(ctx)
	if err != nil || s.SetReadDeadline(time.Now().Add(time.Second)) != nil {
		return 0, nil, false
	}
	i, ok := readPreamble(s, e.cfg.token)
	if !ok || i >= len(e.conns) || e.conns[i] != nil {
		return 0, nil, false
	}
	return i, s, s.SetReadDeadline(time.Time{}) == nil
}

// counters are the packets that were found lost: QUIC sends their content again in others.
func (e *quicEndpoint) counters() counters {
	var n counters
	for _, c := range e.conns {
		if c != nil {
			n.retransmits += c.ConnectionStats().PacketsLost
		}
	}
	return n
}

func (e *quicEndpoint) close() error {
	var errs []error
	for _, c := range e.conns {
		if c != nil {
			errs = append(errs, c.CloseWithError(0, ""))
		}
	}
	if e.ln != nil {
		errs = append(errs, e.ln.Close())
	}
	return errors.Join(append(errs, e.tr.Close(), e.udp.Close())...)
}

type quicFlow struct {
	streamFlow
	stream *quic.Stream
}

func (f *quicFlow) setDeadline(t time.Time) error { return f.stream.SetDeadline(t) }
