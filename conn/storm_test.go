package conn

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
)

// cpu is a processor that handshakes cost time of, one after the other, in virtual time.
type cpu struct {
	mu   sync.Mutex
	free time.Time
	cost time.Duration // of one side of a handshake
	used atomic.Int64  // handshakes
}

func (c *cpu) handshake() {
	c.mu.Lock()
	now := time.Now()
	if c.free.Before(now) {
		c.free = now
	}
	c.free = c.free.Add(c.cost)
	c.used.Inc()
	wait := c.free.Sub(now)
	c.mu.Unlock()
	time.Sleep(wait)
}

// costly is a provider whose handshakes cost.
type costly struct {
	verbs.Provider
	cpu *cpu
}

func (p *costly) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err != nil {
		return nil, err
	}
	return &costlyDevice{d, p.cpu}, nil
}

type costlyDevice struct {
	verbs.Device
	cpu *cpu
}

func (d *costlyDevice) Connect(ctx context.Context, to netip.AddrPort, qp verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, verbs.Connected, error) {
	d.cpu.handshake()
	return d.Device.Connect(ctx, to, qp, p, prepare)
}

func (d *costlyDevice) Listen(port uint16, handler func(verbs.ConnRequest)) (verbs.Listener, error) {
	return d.Device.Listen(port, func(r verbs.ConnRequest) {
		d.cpu.handshake()
		handler(r)
	})
}

// storm is a host with many peers.
type storm struct {
	t     *testing.T
	net   *simnet.Net
	hub   *host
	cpu   *cpu // of hub
	peers []*host
	out   []testOwner // messages of the hub, by peer
	back  []testOwner // of the peers
}

// stormLink takes 1 ms, 1 ms more or less.
var stormLink = simnet.LinkConfig{Delay: 0, Jitter: 2 * time.Millisecond, Loss: 0.01}

// newStorm connects hub to n peers, half with lower and half with higher addresses, of the dialect.
func newStorm(t *testing.T, net *simnet.Net, seed uint64, n int, dialect Dialect) *storm {
	s := &storm{t: t, net: net, cpu: &cpu{cost: time.Millisecond}, out: make([]testOwner, n), back: make([]testOwner, n)}
	mod := func(c *cpu, seed uint64) func(*hostOptions) {
		return func(o *hostOptions) {
			o.cfg.Seed = seed
			o.regCfg.Small, o.regCfg.Large = ibdev.RecvConfig{Initial: 8, PerQP: 8}, ibdev.RecvConfig{Initial: 4}
			o.wrap = func(p verbs.Provider) verbs.Provider { return &costly{p, c} }
		}
	}
	hub := netip.MustParseAddr("10.78.128.1")
	s.hub = newHost(t, net, hub, mod(s.cpu, seed))
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, 78, byte(i % 2 * 255), byte(i / 2)})
		s.peers = append(s.peers, newHost(t, net, a, mod(&cpu{cost: time.Millisecond}, seed*1000+uint64(i)+1), func(o *hostOptions) { o.cfg.Dialect = dialect }))
	}
	return s
}

// talk queues a message each way for every peer.
func (s *storm) talk() {
	for i, p := range s.peers {
		if err := s.hub.conn(p.addr).Send(&s.out[i], 1, 2, []byte("from the hub")); err != nil {
			s.t.Fatal(err)
		}
		if err := p.conn(s.hub.addr).Send(&s.back[i], 1, 2, []byte("from the peer")); err != nil {
			s.t.Fatal(err)
		}
	}
}

// settle waits until n messages each way have been acknowledged for every peer, at most limit, and returns how long each took,
// in order; limit for those that did not.
func (s *storm) settle(n int, limit time.Duration) []time.Duration {
	start := time.Now()
	took := make([]time.Duration, len(s.peers))
	for left := len(took); left > 0; time.Sleep(5 * time.Millisecond) {
		at := time.Since(start)
		for i := range took {
			if took[i] > 0 {
				continue
			}
			x, _ := s.out[i].get()
			y, _ := s.back[i].get()
			if x >= n && y >= n || at >= limit {
				took[i] = max(at, 1)
				left--
			}
		}
	}
	slices.Sort(took)
	return took
}

func (s *storm) attempts() (n uint64) {
	n = s.hub.m.Stats().ConnectAttempts
	for _, p := range s.peers {
		n += p.m.Stats().ConnectAttempts
	}
	return n
}

func (s *storm) close() {
	var wg sync.WaitGroup
	for _, p := range append(s.peers, s.hub) {
		wg.Go(func() { p.close(10 * time.Second) })
	}
	wg.Wait()
}

// TestReconnectStorm: the network between a host and 500 peers is away, for so long that all give each other up, or nearly so long. Then 99
// of 100 are back within 3 s, though a handshake costs each side a millisecond of its one processor and a packet in 100 is lost, and
// nobody tries in vain for long.
func TestReconnectStorm(t *testing.T) {
	const peers = 500
	for _, tc := range []struct {
		dialect  Dialect
		pause    time.Duration
		attempts uint64 // after the pause, of both sides together, at most
	}{
		{DialectOpen, 20 * time.Second, 2 * peers},
		{DialectOpen, 9 * time.Second, 2 * peers},
		{DialectKernelOnly, 20 * time.Second, 3 * peers},
	} {
		t.Run(fmt.Sprintf("%v/%v", tc.dialect, tc.pause), func(t *testing.T) {
			if testing.Short() && tc.dialect == DialectKernelOnly {
				t.Skip("long")
			}
			bubble(t, 11, simnet.Config{Link: stormLink}, func(t *testing.T, net *simnet.Net) {
				s := newStorm(t, net, 11, peers, tc.dialect)
				s.talk()
				first := s.settle(1, time.Minute)
				t.Logf("first contact: median %v, 99%% %v, all %v; %d attempts", first[peers/2], first[peers*99/100], first[peers-1], s.attempts())
				if last := first[peers-1]; last >= time.Minute {
					t.Fatal("not all have met")
				}
				time.Sleep(time.Second)
				net.SetDefaultLink(simnet.LinkConfig{Down: true})
				s.talk()
				time.Sleep(tc.pause)
				st := s.hub.m.Stats()
				if tc.pause > s.hub.m.cfg.DeadAfter && st.PeersDown != peers {
					t.Errorf("%d peers reported down", st.PeersDown)
				}
				before, used := s.attempts(), s.cpu.used.Load()
				net.SetDefaultLink(stormLink)
				took := s.settle(2, time.Minute)
				tries := s.attempts() - before
				t.Logf("after %v: median %v, 99%% %v, all %v; %d attempts, %d handshakes at the hub; %d attempts meanwhile", tc.pause, took[peers/2],
					took[peers*99/100], took[peers-1], tries, s.cpu.used.Load()-used, before)
				if d := took[peers*99/100]; d > 3*time.Second {
					t.Errorf("99 of 100 are back after %v", d)
				}
				if d := took[peers-1]; d > 15*time.Second {
					t.Errorf("the last one is back after %v", d)
				}
				if tries > tc.attempts {
					t.Errorf("%d attempts, at most %d", tries, tc.attempts)
				}
				if st := s.hub.m.Stats(); st.RecvMessages != 2*peers || st.DrainTimeouts != 0 {
					t.Errorf("%d messages received of %d, %d drain timeouts", st.RecvMessages, 2*peers, st.DrainTimeouts)
				}
				for _, p := range s.peers {
					if n := p.sink.len(); n != 2 {
						t.Errorf("%v: %d messages", p.addr, n)
					}
				}
				s.close()
			})
		})
	}
}
