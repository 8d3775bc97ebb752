package rds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"
)

// ListenConfig has the options of a socket that have to be known when it is bound, and makes sockets as net.ListenConfig does. Zero
// values are the Service's defaults. The methods do not change it.
type ListenConfig struct {
	Service *Service // required

	// Transport is what has to carry the datagrams (SO_RDS_TRANSPORT); with one that does not own the address the error matches
	// ErrNoTransport.
	Transport Transport
	// TypeOfService as SetTypeOfService (SIOCRDSSETTOS).
	TypeOfService uint8
	// ReadBuffer and WriteBuffer in payload bytes as SetReadBuffer and SetWriteBuffer (SO_RCVBUF, SO_SNDBUF). Here the first datagram
	// meets them already.
	ReadBuffer, WriteBuffer int
	// Timestamps, ReceiveLatency, RecvErr and CongestionMonitor as the setters of these names (SO_TIMESTAMP,
	// SO_RDS_MSG_RXPATH_LATENCY, RDS_RECVERR, RDS_CONG_MONITOR).
	Timestamps, ReceiveLatency, RecvErr, CongestionMonitor bool
}

// ListenPacket binds a socket to address, "host:port": an IP literal or a name of this host, which stands for the first of its
// addresses, and a number, 0 for any free port. The network is "rds", "rds4" or "rds6". The net.PacketConn is a *Socket; the error is
// Service.ListenPacket's, or a *net.DNSError inside an *OpError.
//
// There is no wildcard: RDS binds addresses (rds-protocol spec 1.2).
func (lc *ListenConfig) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	ap, err := resolve(ctx, nil, network, address, netip.Addr{})
	if err != nil {
		return nil, &OpError{Op: "bind", Err: err}
	}
	s, err := lc.Bind(ctx, ap)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Bind is ListenPacket with a netip value and a *Socket.
func (lc *ListenConfig) Bind(ctx context.Context, address netip.AddrPort) (*Socket, error) {
	address = unmap(address)
	s, err := lc.bind(ctx, address)
	if err != nil {
		return nil, &OpError{Op: "bind", Local: Addr{address}, Err: err}
	}
	return s, nil
}

func (lc *ListenConfig) bind(ctx context.Context, address netip.AddrPort) (*Socket, error) {
	if lc.Service == nil {
		return nil, fmt.Errorf("%w: no Service", ErrInvalid)
	}
	for _, b := range []int{lc.ReadBuffer, lc.WriteBuffer} {
		if b < 0 || int64(b) > maxBuffer {
			return nil, fmt.Errorf("%w: buffer of %d bytes", ErrInvalid, b)
		}
	}
	if err := lc.Transport.check(); err != nil {
		return nil, err
	}
	s, err := lc.Service.listen(ctx, address, func(s *Socket) {
		if lc.ReadBuffer > 0 {
			s.setReadBuffer(lc.ReadBuffer)
		}
		if lc.WriteBuffer > 0 {
			s.sndbuf.Store(int64(lc.WriteBuffer))
		}
		s.tos.Store(uint32(lc.TypeOfService))
		if lc.Timestamps {
			s.setStamps(stampTime, true)
		}
		if lc.ReceiveLatency {
			s.setStamps(stampLatency, true)
		}
		s.recvErr.Store(lc.RecvErr)
		s.mon.on.Store(lc.CongestionMonitor)
	})
	if lc.Transport != TransportAny && errors.Is(err, ErrAddrNotAvailable) {
		err = fmt.Errorf("%w: %v does not have %v: %v", ErrNoTransport, lc.Transport, address.Addr(), err)
	}
	return s, err
}

// Dialer makes connected sockets as net.Dialer does. Zero values are defaults. The methods do not change it.
type Dialer struct {
	// ListenConfig has the Service, which is required, and the options of the socket.
	ListenConfig

	// LocalAddr is the address to bind to; port 0, or no LocalAddr: any free port. Without a LocalAddr it is the address that the
	// Service has open, if there is one only that may reach the destination, and otherwise the one that the
	// system would send a UDP datagram from, as rds-ping has it.
	LocalAddr net.Addr
	// Resolver resolves names; nil: net.DefaultResolver.
	Resolver *net.Resolver
	// Timeout bounds a Dial, names resolved included; zero: not at all.
	Timeout time.Duration
}

// DialContext binds a socket and connects it to address, "host:port". The network is "rds", "rds4" or "rds6". The net.Conn is a *Socket.
//
// A name stands for the first of its addresses, of LocalAddr's IP version if there is one: none can be found out to be the wrong one,
// since, as with the kernel's connect, nothing is sent. The peer need not be there, and others may send to the socket as well.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	s, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Dial is DialContext without a context.
func (d *Dialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

func (d *Dialer) dial(ctx context.Context, network, address string) (*Socket, error) {
	if d.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.Timeout)
		defer cancel()
	}
	local, err := d.local()
	if err != nil {
		return nil, &OpError{Op: "dial", Err: err}
	}
	to, err := resolve(ctx, d.Resolver, network, address, local.Addr())
	if err != nil {
		return nil, &OpError{Op: "dial", Err: err}
	}
	return d.DialAddrPort(ctx, to)
}

// DialAddrPort is DialContext with a netip value and a *Socket.
func (d *Dialer) DialAddrPort(ctx context.Context, to netip.AddrPort) (*Socket, error) {
	to = unmap(to)
	fail := func(err error) (*Socket, error) { return nil, &OpError{Op: "dial", Peer: Addr{to}, Err: err} }
	if err := checkConnect(to.Addr()); err != nil {
		return fail(err)
	}
	local, err := d.local()
	if err != nil {
		return fail(err)
	}
	if !local.Addr().IsValid() {
		if d.Service == nil {
			return fail(fmt.Errorf("%w: no Service", ErrInvalid))
		}
		a, err := d.Service.sourceFor(ctx, to.Addr())
		if err != nil {
			return fail(err)
		}
		local = netip.AddrPortFrom(a, local.Port())
	}
	s, err := d.Bind(ctx, local)
	if err != nil {
		return nil, err
	}
	if err := s.ConnectAddrPort(to); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// local is LocalAddr.
func (d *Dialer) local() (netip.AddrPort, error) {
	if d.LocalAddr == nil {
		return netip.AddrPort{}, nil
	}
	return toAddrPort(d.LocalAddr)
}

// sourceFor is the address of this host that datagrams to remote should come from.
func (svc *Service) sourceFor(ctx context.Context, remote netip.Addr) (netip.Addr, error) {
	var found []netip.Addr
	for a := range *svc.locals.Load() {
		if a == remote { // ourselves
			return a, nil
		}
		if checkDest(a, remote) == nil && a.IsLoopback() == remote.IsLoopback() && a.IsLinkLocalUnicast() == remote.IsLinkLocalUnicast() {
			found = append(found, a)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	// Connecting a UDP socket sends nothing, and tells which address the system would take.
	c, err := new(net.Dialer).DialContext(ctx, "udp", netip.AddrPortFrom(remote, 9).String())
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return netip.Addr{}, ctx.Err()
	default:
		return netip.Addr{}, fmt.Errorf("%w: no way to %v: %v", ErrAddrNotAvailable, remote, err)
	}
	defer c.Close()
	return unmap(c.LocalAddr().(*net.UDPAddr).AddrPort()).Addr(), nil
}

// resolve turns "host:port" into an address of the network, and of the IP version of like, if that is valid.
func resolve(ctx context.Context, r *net.Resolver, network, address string, like netip.Addr) (netip.AddrPort, error) {
	var none netip.AddrPort
	family := "ip"
	switch network {
	case "rds":
	case "rds4":
		family = "ip4"
	case "rds6":
		family = "ip6"
	default:
		return none, fmt.Errorf("%w: %w", ErrInvalid, net.UnknownNetworkError(network))
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return none, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return none, fmt.Errorf("%w: port %q is not a number up to 65535", ErrInvalid, service)
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		if host == "" {
			return none, fmt.Errorf("%w: no host in %q, and there is no wildcard", ErrInvalid, address)
		}
		if r == nil {
			r = net.DefaultResolver
		}
		addrs, err := r.LookupNetIP(ctx, family, host)
		if err != nil {
			return none, err
		}
		if len(addrs) == 0 {
			return none, errors.New("no address of " + host)
		}
		addr = choose(addrs, like)
	}
	addr = addr.Unmap()
	if family == "ip4" && !addr.Is4() || family == "ip6" && !addr.Is6() {
		return none, fmt.Errorf("%w: %v on network %s", ErrInvalid, addr, network)
	}
	return netip.AddrPortFrom(addr, uint16(port)), nil
}

// choose is the first of a name's addresses that may be used together with like, or the first of all: who is told what is wrong with it
// knows more than who is told that there is none.
func choose(addrs []netip.Addr, like netip.Addr) netip.Addr {
	for _, a := range addrs {
		if like.IsValid() && a.Unmap().Is4() == like.Is4() {
			return a
		}
	}
	return addrs[0]
}
