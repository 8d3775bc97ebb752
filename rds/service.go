package rds

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Service is an instance of RDS: its devices, connections, sockets and memory. Several in one
// process share nothing. An address of the host belongs to one Service, from its first bind there
// until Close.
type Service struct {
	cfg   Config
	log   hclog.Logger
	tr    transport
	began time.Time // what stamps count from

	arena arena
	msgs  sync.Pool // *Message
	lent  loans
	ops   sync.Pool // *operation
	ctr   counters

	closed atomic.Bool   // decides; set under mu
	down   chan struct{} // closed at the end of Close

	mu     sync.Mutex                                // writers of locals
	locals atomic.Pointer[map[netip.Addr]*localAddr] // immutable
	peers  peerTable
	byConn sync.Map // *conn.Conn to *peer
}

// Open makes a Service. It opens no device and binds nothing yet: addresses are opened as they are bound. The error matches ErrInvalid,
// and names every field that is wrong, or ErrNotSupported on a 32-bit system.
func Open(cfg Config) (*Service, error) {
	if strconv.IntSize < 64 { // 64-bit counters are not aligned there for what is done to them
		return nil, fmt.Errorf("rds open: %w: 32-bit system", ErrNotSupported)
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	svc := newService(cfg)
	tr, err := openTransport(&svc.cfg, sink{svc})
	if err != nil {
		return nil, err
	}
	svc.tr = tr
	return svc, nil
}

// newService is a Service without a transport.
func newService(cfg Config) *Service {
	svc := &Service{cfg: cfg.withDefaults(), began: time.Now(), down: make(chan struct{})}
	svc.log = svc.cfg.Logger
	svc.locals.Store(&map[netip.Addr]*localAddr{})
	return svc
}

// ListenPacket binds a socket to address, an IP literal and a port: "10.0.0.1:4000", "[fd00::1]:4000"; port 0 stands
// for any free one, port 1 is reserved. The first bind on an address opens its device and accepts connections there.
//
// The error is an *OpError that matches ErrAddrInUse, ErrAddrNotAvailable, ErrInvalid, ErrClosed, ctx's error, or ErrNotSupported where
// no provider works: softroce needs Linux.
func (svc *Service) ListenPacket(ctx context.Context, address string) (*Socket, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, &OpError{Op: "bind", Err: fmt.Errorf("%w: %v", ErrInvalid, err)}
	}
	return svc.ListenAddrPort(ctx, ap)
}

// ListenAddrPort is ListenPacket with a netip value.
func (svc *Service) ListenAddrPort(ctx context.Context, address netip.AddrPort) (*Socket, error) {
	lc := ListenConfig{Service: svc}
	return lc.Bind(ctx, address)
}

// listen binds a socket that options have been given to.
func (svc *Service) listen(ctx context.Context, address netip.AddrPort, options func(*Socket)) (*Socket, error) {
	if err := checkBind(address); err != nil {
		return nil, err
	}
	la, err := svc.openLocal(ctx, address.Addr())
	if err != nil {
		return nil, err
	}
	s := newSocket(svc, la)
	options(s)
	if err := la.bind(s, address.Port()); err != nil {
		s.stopStamps()
		return nil, err
	}
	s.updateCongestion() // it may have inherited more than its buffer
	return s, nil
}

// openLocal finds or opens a local address.
func (svc *Service) openLocal(ctx context.Context, addr netip.Addr) (*localAddr, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	svc.mu.Lock()
	if svc.closed.Load() {
		svc.mu.Unlock()
		return nil, ErrClosed
	}
	la := svc.local(addr)
	if la == nil {
		la = &localAddr{svc: svc, addr: addr, opened: make(chan struct{}), peers: make(map[netip.Addr]*peer)}
		svc.setLocal(la, true) // before Listen: datagrams may come before it returns
		svc.mu.Unlock()
		if err := svc.tr.Listen(addr); err != nil {
			la.err = bindError(err)
			svc.mu.Lock()
			svc.setLocal(la, false)
			svc.mu.Unlock()
		}
		close(la.opened)
		return la, la.err
	}
	svc.mu.Unlock()
	select { // another call may be opening it
	case <-la.opened:
		return la, la.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (svc *Service) local(addr netip.Addr) *localAddr { return (*svc.locals.Load())[addr] }

// setLocal adds or removes la. The caller holds mu.
func (svc *Service) setLocal(la *localAddr, add bool) {
	old := *svc.locals.Load()
	m := make(map[netip.Addr]*localAddr, len(old)+1)
	for a, l := range old {
		if l != la {
			m[a] = l
		}
	}
	if add {
		m[la.addr] = la
	}
	svc.locals.Store(&m)
}

// peerOf is the peer of a connection.
func (svc *Service) peerOf(local, remote netip.Addr) *peer {
	la := svc.local(local)
	if la == nil {
		// The transport has only the addresses we told it to listen on, and reports none after
		// it has failed to.
		panic(fmt.Sprintf("BUG: rds: connection of %v, which is not an address of this service", local))
	}
	return la.peer(remote)
}

// linkTo is the way to p: a short cut if its address is open in this Service, else the wire.
func (svc *Service) linkTo(p *peer, tos uint8) (link, error) {
	if to := svc.local(p.remote); to != nil {
		select {
		case <-to.opened:
			if to.err == nil {
				return newLocalLink(p, to), nil
			}
		default:
		}
	}
	return svc.tr.Get(p.la.addr, p.remote, tos)
}

func (svc *Service) eachSocket(f func(*Socket)) {
	for _, la := range *svc.locals.Load() {
		la.ports.each(f)
	}
}

// Close closes all sockets, waits until the peers have acknowledged what was written, at most Config.Linger, and
// ends all connections. The error is an *AbandonedError if messages were left then; it also counts the memory of messages that
// are still lent, and of SendBufs, which they keep: also of a SendBuf whose Send it has woken, and who has not come to freeing it. Once
// it has returned, no goroutine of the Service runs. The second call returns nil when the first one is through: a program that
// closes in a signal's handler may leave main by another Close.
func (svc *Service) Close() error {
	svc.mu.Lock()
	if svc.closed.Load() {
		svc.mu.Unlock()
		<-svc.down
		return nil
	}
	svc.closed.Store(true)
	svc.mu.Unlock()
	defer close(svc.down)

	// 1. No new work: no binds (closed), no writes.
	locals := *svc.locals.Load()
	for _, la := range locals {
		<-la.opened
		var socks []*Socket
		la.mu.Lock() // a bind that has seen us open is in the table by now
		la.ports.each(func(s *Socket) { socks = append(socks, s) })
		la.mu.Unlock()
		for _, s := range socks {
			s.Close()
		}
	}
	// 2. What was written gets its time; then connections, devices and memory go.
	ctx, cancel := context.WithTimeout(context.Background(), max(0, svc.cfg.Linger))
	defer cancel()
	abandoned, err := svc.tr.Close(ctx)
	// 3. Nothing is delivered any more.
	for _, la := range locals {
		la.endHold()
	}
	for _, p := range svc.peers.all() {
		p.cong.clearAll()
	}
	err = errors.Join(err, svc.lent.err())
	if abandoned > 0 {
		err = errors.Join(&AbandonedError{Messages: abandoned}, err)
	}
	return err
}
