package conn

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

var (
	addrA = netip.MustParseAddr("10.77.0.1")
	addrB = netip.MustParseAddr("10.77.0.2")
	addrC = netip.MustParseAddr("10.77.0.3")
)

// host is a process: a Manager with everything below it.
type host struct {
	t     testing.TB
	addr  netip.Addr
	m     *Manager
	reg   *ibdev.Registry
	slab  *slab.Slab
	epoch *epoch.Domain
	sink  *testSink
	prov  *softroce.Provider

	closed bool
}

type hostOptions struct {
	cfg    Config
	regCfg ibdev.Config
	sr     softroce.Config

	slabBytes int64
	wrap      func(verbs.Provider) verbs.Provider // nil: as it is
}

func newHost(t testing.TB, net packetio.Network, addr netip.Addr, mod ...func(*hostOptions)) *host {
	t.Helper()
	h := &host{t: t, addr: addr, epoch: epoch.NewDomain(), sink: newTestSink()}
	o := hostOptions{sr: softroce.Config{Network: net, Epoch: h.epoch}}
	if testing.Verbose() && os.Getenv("CONN_TRACE") != "" {
		o.cfg.Logger = hclog.New(&hclog.LoggerOptions{Name: addr.String(), Level: hclog.Trace})
	}
	for _, f := range mod {
		f(&o)
	}
	var err error
	if h.slab, err = slab.New(slab.Config{Name: addr.String(), MaxBytes: o.slabBytes}); err != nil {
		t.Fatal(err)
	}
	h.prov = softroce.New(o.sr)
	o.regCfg.Providers = []verbs.Provider{h.prov}
	if o.wrap != nil {
		o.regCfg.Providers[0] = o.wrap(h.prov)
	}
	o.regCfg.Slab, o.regCfg.Epoch = h.slab, h.epoch
	h.reg = ibdev.NewRegistry(o.regCfg)
	o.cfg.Registry, o.cfg.Slab, o.cfg.Epoch = h.reg, h.slab, h.epoch
	if o.cfg.Sink == nil {
		o.cfg.Sink = h.sink
	}
	h.m = NewManager(o.cfg)
	h.sink.m = h.m
	t.Cleanup(func() {
		if !h.closed { // a test that failed leaves no goroutines to be complained about
			h.close(0)
		}
	})
	if err := h.m.Listen(addr); err != nil {
		t.Fatal(err)
	}
	return h
}

// close takes the host down in order and reports what it left behind. It returns the number of abandoned messages.
func (h *host) close(linger time.Duration) int {
	h.t.Helper()
	h.closed = true
	ctx, cancel := context.WithTimeout(context.Background(), linger)
	defer cancel()
	n, err := h.m.Close(ctx)
	if err != nil {
		h.t.Errorf("%v: close: %v", h.addr, err)
	}
	h.sink.releaseAll()
	ctx2, cancel2 := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel2()
	if err := h.reg.Close(ctx2); err != nil {
		h.t.Errorf("%v: close registry: %v", h.addr, err)
	}
	if err := h.epoch.Close(); err != nil {
		h.t.Errorf("%v: close epochs: %v", h.addr, err)
	}
	if err := h.slab.Close(); err != nil {
		h.t.Errorf("%v: close slab: %v", h.addr, err)
	}
	return n
}

func (h *host) conn(remote netip.Addr) *Conn {
	h.t.Helper()
	c, err := h.m.Get(h.addr, remote, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// testSink keeps copies of what it is given.
type testSink struct {
	m  *Manager
	mu sync.Mutex

	msgs     []gotMsg
	clear    []netip.AddrPort // PortsClear
	gone     []*Conn
	attached bool // every connection is of use
	down     []netip.Addr
	upAgain  []netip.Addr
	accept   func(c *Conn, m *Incoming) bool // nil: everything
	hold     bool                            // lend instead of copying
	held     []*RecvBuf
	discard  bool
	count    int
}

type gotMsg struct {
	from         netip.Addr
	seq          uint64
	sport, dport uint16
	data         []byte
	ext          Ext
}

func newTestSink() *testSink { return &testSink{} }

func (s *testSink) Deliver(c *Conn, msgs []Incoming) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range msgs {
		m := &msgs[i]
		if s.accept != nil && !s.accept(c, m) {
			return i
		}
		s.count++
		if s.discard {
			continue
		}
		data := append(make([]byte, 0, m.Len), m.First.Data...)
		for _, f := range m.More {
			data = append(data, f.Data...)
		}
		if len(data) != m.Len {
			panic(fmt.Sprintf("message of %d bytes has pieces of %d", m.Len, len(data)))
		}
		got := gotMsg{c.Remote(), m.Seq, m.SrcPort, m.DstPort, data, Ext{}}
		if m.Ext != nil {
			got.ext = *m.Ext
		}
		s.msgs = append(s.msgs, got)
		if s.hold && m.First.Buf != nil {
			m.First.Buf.Get()
			s.held = append(s.held, m.First.Buf)
		}
	}
	return len(msgs)
}

func (s *testSink) PortsClear(local, remote netip.Addr, ports []uint16) {
	s.mu.Lock()
	for _, p := range ports {
		s.clear = append(s.clear, netip.AddrPortFrom(remote, p))
	}
	s.mu.Unlock()
}

func (s *testSink) PeerDown(local, remote netip.Addr) {
	s.mu.Lock()
	s.down = append(s.down, remote)
	s.mu.Unlock()
}

func (s *testSink) PeerUp(local, remote netip.Addr) {
	s.mu.Lock()
	s.upAgain = append(s.upAgain, remote)
	s.mu.Unlock()
}

func (s *testSink) releaseAll() {
	s.mu.Lock()
	held := s.held
	s.held = nil
	s.mu.Unlock()
	for _, b := range held {
		b.Put()
	}
}

func (s *testSink) take() []gotMsg {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.msgs
	s.msgs = nil
	return m
}

func (s *testSink) ConnIdle(c *Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.attached
}

func (s *testSink) ConnGone(c *Conn) {
	s.mu.Lock()
	s.gone = append(s.gone, c)
	s.mu.Unlock()
}

func (s *testSink) takeClear() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.clear
	s.clear = nil
	return c
}

func (s *testSink) reset() {
	s.mu.Lock()
	s.msgs, s.count = nil, 0
	s.mu.Unlock()
}

func (s *testSink) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count
}

// testOwner counts what it is told.
type testOwner struct {
	mu          sync.Mutex
	msgs, bytes int
}

func (o *testOwner) Released(msgs, bytes int, _ bool) {
	o.mu.Lock()
	o.msgs += msgs
	o.bytes += bytes
	o.mu.Unlock()
}

func (o *testOwner) get() (msgs, bytes int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.msgs, o.bytes
}

// noise is what patterns are cut from.
var noise = func() []byte {
	b := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}()

// pattern fills b with content that depends on stream and number. It copies, since the race detector looks at each byte
// written otherwise.
func pattern(b []byte, stream uint16, n uint64) []byte {
	x := uint64(stream)<<48 ^ n
	for p := b; len(p) > 0; {
		x = (x + 1) * 0x9e3779b97f4a7c15
		p = p[copy(p, noise[x>>43:]):]
	}
	return b
}

// payload is message n of a stream: its number, its length, and the pattern, as far as there is room.
func payload(stream uint16, n uint64, size int) []byte {
	b := pattern(make([]byte, size), stream, n)
	if size >= 8 {
		binary.BigEndian.PutUint64(b, n)
	}
	return b
}

func sum(b []byte) uint64 {
	h := fnv.New64a()
	h.Write(b)
	return h.Sum64()
}

// eventually waits in a bubble, or outside, until cond holds.
func eventually(t testing.TB, what string, limit time.Duration, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if cond() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// bubble runs fn in a synctest bubble over a network with the given faults.
func bubble(t *testing.T, seed uint64, cfg simnet.Config, fn func(t *testing.T, net *simnet.Net)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, seed, cfg)
		fn(t, net)
	})
}
