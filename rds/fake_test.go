package rds

import (
	"bytes"
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/verbs"
)

// fakeNet joins Services without connections: what one sends is delivered to the other on the sender's stack. Tests
// of what sockets do by themselves use it; whole stacks are tested over simnet.
type fakeNet struct {
	mu        sync.Mutex
	hosts     map[netip.Addr]*fakeTransport
	congested map[netip.AddrPort]bool
}

func newFakeNet() *fakeNet {
	return &fakeNet{hosts: make(map[netip.Addr]*fakeTransport), congested: make(map[netip.AddrPort]bool)}
}

// fakeTransport is the transport of one Service in a fakeNet.
type fakeTransport struct {
	net *fakeNet
	svc *Service

	mu       sync.Mutex
	listen   func(netip.Addr) error // nil: succeeds
	congest  func()                 // called when a bit is about to change
	sendErr  error                  // what SendExtra says next, until it is changed
	withhold bool                   // keep acknowledgements for ack
	unacked  []fakeSent
	progress func() bool
	flushed  int
	cancels  []int
}

type fakeSent struct {
	o conn.Owner
	n int
}

// open makes a Service in the net.
func (n *fakeNet) open(t testing.TB, cfg Config) (*Service, *fakeTransport) {
	t.Helper()
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	svc := newService(cfg)
	tr := &fakeTransport{net: n, svc: svc}
	svc.tr = tr
	t.Cleanup(func() {
		tr.ack(-1)
		if err := svc.Close(); err != nil {
			t.Errorf("closing the service: %v", err)
		}
	})
	return svc, tr
}

func (tr *fakeTransport) Listen(a netip.Addr) error {
	tr.mu.Lock()
	listen := tr.listen
	tr.mu.Unlock()
	if listen != nil {
		if err := listen(a); err != nil {
			return err
		}
	}
	tr.net.mu.Lock()
	defer tr.net.mu.Unlock()
	tr.net.hosts[a] = tr
	return nil
}

func (tr *fakeTransport) Get(local, remote netip.Addr, tos uint8) (link, error) {
	return &fakeLink{tr: tr, local: local, remote: remote}, nil
}

func (tr *fakeTransport) SetCongested(a netip.Addr, port uint16, on bool) {
	tr.mu.Lock()
	hook := tr.congest
	tr.mu.Unlock()
	if hook != nil {
		hook()
	}
	tr.net.mu.Lock()
	tr.net.congested[netip.AddrPortFrom(a, port)] = on
	hosts := make(map[netip.Addr]*fakeTransport)
	for h, t := range tr.net.hosts {
		hosts[h] = t
	}
	tr.net.mu.Unlock()
	for h, t := range hosts {
		if !on {
			sink{t.svc}.PortsClear(h, a, []uint16{port})
		}
	}
}

func (tr *fakeTransport) Progress() bool {
	tr.mu.Lock()
	f := tr.progress
	tr.mu.Unlock()
	return f != nil && f()
}

func (tr *fakeTransport) Park() {}

func (tr *fakeTransport) Register(context.Context, netip.Addr, []byte, verbs.PagedMemory, uint64, verbs.Access) (*conn.Mapping, error) {
	return nil, verbs.ErrNotSupported
}

func (tr *fakeTransport) Reserve(int) (*conn.Buffer, error) { return nil, conn.ErrNoMemory }
func (tr *fakeTransport) TraceReceive(bool)                 {}

func (tr *fakeTransport) FlushMemory(context.Context) error { return nil }
func (tr *fakeTransport) StartFlush(netip.Addr)             {}

func (tr *fakeTransport) Providers() []verbs.Provider              { return nil }
func (tr *fakeTransport) Conns() []*conn.Conn                      { return nil }
func (tr *fakeTransport) Stats() (conn.Stats, []ibdev.DeviceStats) { return conn.Stats{}, nil }

func (tr *fakeTransport) Close(context.Context) (int, error) {
	tr.mu.Lock()
	n := len(tr.unacked)
	tr.mu.Unlock()
	tr.ack(-1)
	return n, nil
}

// ack acknowledges the n oldest messages, all if n is negative.
func (tr *fakeTransport) ack(n int) {
	tr.mu.Lock()
	if n < 0 {
		n = len(tr.unacked)
	}
	done := slices.Clone(tr.unacked[:n])
	tr.unacked = tr.unacked[n:]
	tr.mu.Unlock()
	for _, s := range done {
		s.o.Released(1, s.n, true)
	}
}

type fakeLink struct {
	tr            *fakeTransport
	local, remote netip.Addr
}

func (l *fakeLink) SendExtra(o conn.Owner, srcPort, dstPort uint16, payload []byte, _ conn.SendFlags, _ *conn.Extra) error {
	l.tr.mu.Lock()
	if err := l.tr.sendErr; err != nil {
		l.tr.mu.Unlock()
		return err
	}
	withhold := l.tr.withhold
	if withhold {
		l.tr.unacked = append(l.tr.unacked, fakeSent{o, len(payload)})
	}
	l.tr.mu.Unlock()
	l.tr.net.mu.Lock()
	to := l.tr.net.hosts[l.remote]
	l.tr.net.mu.Unlock()
	if to != nil {
		deliverTo(to.svc, l.remote, l.local, srcPort, dstPort, bytes.Clone(payload))
	}
	if !withhold {
		o.Released(1, len(payload), true)
	}
	return nil
}

func (l *fakeLink) Map(context.Context, []byte, uint64, verbs.Access, bool) (*conn.Mapping, error) {
	return nil, conn.ErrNotUp
}

func (l *fakeLink) WaitUp(ctx context.Context, stop <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-stop:
		return ErrClosed
	}
}

func (l *fakeLink) Flush() {
	l.tr.mu.Lock()
	l.tr.flushed++
	l.tr.mu.Unlock()
}

func (l *fakeLink) PeerCongested(port uint16) bool {
	l.tr.net.mu.Lock()
	defer l.tr.net.mu.Unlock()
	return l.tr.net.congested[netip.AddrPortFrom(l.remote, port)]
}

func (l *fakeLink) Cancel(o conn.Owner, dstPort int) int {
	l.tr.mu.Lock()
	l.tr.cancels = append(l.tr.cancels, dstPort)
	l.tr.mu.Unlock()
	return 0
}

// deliverTo is one datagram's arrival at svc's address local.
func deliverTo(svc *Service, local, remote netip.Addr, srcPort, dstPort uint16, payload []byte) (taken bool) {
	m := conn.Incoming{SrcPort: srcPort, DstPort: dstPort, Len: len(payload), First: conn.Frag{Data: payload}}
	return svc.deliver(svc.peerOf(local, remote), 0, []conn.Incoming{m}, int64(svc.cfg.MaxPeerBytes)) == 1
}

var (
	addrA = netip.MustParseAddr("10.0.0.1")
	addrB = netip.MustParseAddr("10.0.0.2")
)

func ap(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func bind(t testing.TB, svc *Service, a netip.AddrPort) *Socket {
	t.Helper()
	s, err := svc.ListenAddrPort(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
