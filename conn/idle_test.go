package conn

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

func TestTraces(t *testing.T) {
	const most = 8
	var tr traces
	rng := rand.New(rand.NewPCG(3, 4))
	type put struct {
		k        key
		expected uint64
	}
	var latest []put // a naive twin
	for n := range uint64(20000) {
		k := key{tos: uint8(rng.IntN(12))}
		if rng.IntN(3) == 0 {
			_, got := tr.take(k)
			want := uint64(0)
			for i := range latest {
				if latest[i].k == k {
					want = latest[i].expected
					latest[i].expected = 0
				}
			}
			if got != want {
				t.Fatalf("step %d: %d, want %d", n, got, want)
			}
			continue
		}
		for i := range latest {
			if latest[i].k == k {
				latest[i].expected = 0 // it gives way to the newer one
			}
		}
		tr.put(k, 1, n+1, most)
		if latest = append(latest, put{k, n + 1}); len(latest) > most {
			latest = latest[1:]
		}
		if len(tr.byKey) > most || len(tr.order) > most {
			t.Fatalf("%d traces", len(tr.byKey))
		}
	}
	if tr.forgot == 0 {
		t.Error("none ever gave way")
	}
}

func (h *host) conns() int { return int(h.m.Stats().Conns) }

// TestIdleConnectionsGo: what only a peer asks for goes when it has brought nothing for long, in either dialect and whether it is up or
// not, unless the Sink needs it; what somebody here has asked for stays.
func TestIdleConnectionsGo(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		mod := func(o *hostOptions) { o.cfg.IdleTimeout, o.cfg.MaxConns = time.Minute, 3 }
		// A heartbeat that is on its way when the connection is closed makes it look lost, and the peer comes back once more: not here.
		a, b := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.HeartbeatIdle = 2357 * time.Millisecond }), newHost(t, net, addrB, mod)
		k := newHost(t, net, addrC, func(o *hostOptions) { o.cfg.Dialect = DialectKernelOnly })
		var o testOwner
		ca, ck := a.conn(addrB), k.conn(addrB)
		ca.Send(&o, 1, 2, []byte("a"))
		ck.Send(&o, 1, 2, []byte("k"))
		eventually(t, "arrive", time.Second, func() bool { return b.sink.len() == 2 })
		// In use it stays, though there is only a message now and then.
		for n := range 10 {
			time.Sleep(50 * time.Second)
			ca.Send(&o, 1, 2, []byte("a"))
			eventually(t, "arrives", time.Second, func() bool { return b.sink.len() == 3+n })
		}
		if s := b.m.Stats(); s.ConnsRetired != 0 || s.Established != 2 {
			t.Fatalf("in use: %d retired, %d times up", s.ConnsRetired, s.Established)
		}
		b.sink.mu.Lock()
		b.sink.attached = true
		b.sink.mu.Unlock()
		time.Sleep(3 * time.Minute)
		if b.conns() != 2 {
			t.Fatalf("%d connections, of which the Sink needs 2", b.conns())
		}
		b.sink.mu.Lock()
		b.sink.attached = false
		b.sink.mu.Unlock()
		// Heartbeats are no use of it. The kernel would connect again at once.
		time.Sleep(2 * time.Minute)
		if s := b.m.Stats(); s.Conns != 1 || s.ConnsRetired != 1 || len(b.sink.gone) != 1 || b.sink.gone[0].Remote() != addrA {
			t.Fatalf("%d connections, %d retired, gone %v", s.Conns, s.ConnsRetired, b.sink.gone)
		}
		if s := a.m.Stats(); s.ConnectAttempts != 1 || s.PeersDown != 0 || ca.State() != Down {
			t.Errorf("the peer: %d attempts, %d peers down, %v", s.ConnectAttempts, s.PeersDown, ca.State())
		}
		// The kernel dies. Its connection is down then, and goes.
		net.Partition(addrB, addrC)
		time.Sleep(3 * time.Minute)
		if s := b.m.Stats(); s.Conns != 0 || s.ConnsRetired != 2 {
			t.Fatalf("%d connections, %d retired", s.Conns, s.ConnsRetired)
		}
		b.m.mu.Lock()
		if len(b.m.peers)+len(b.m.byKey)+len(b.m.sites[addrB].conns) != 0 || b.m.reaping {
			t.Errorf("left: %d peers, %d connections, reaping %v", len(b.m.peers), len(b.m.byKey), b.m.reaping)
		}
		b.m.mu.Unlock()
		if u := b.slab.Stats(); u.LargeInUse+u.SmallInUse > recvChunks(b)+1 { // the map
			t.Errorf("%+v in use, %d in receive queues", u, recvChunks(b))
		}
		// It comes back as if nothing had been; named, it stays for good.
		b.sink.reset()
		cb := b.conn(addrA)
		ca.Send(&o, 1, 2, []byte("again"))
		eventually(t, "arrives", time.Second, func() bool { return b.sink.len() == 1 })
		time.Sleep(time.Hour)
		if b.conn(addrA) != cb || cb.State() != Up || b.m.Stats().ConnsRetired != 2 {
			t.Errorf("%v, %d retired", cb.State(), b.m.Stats().ConnsRetired)
		}
		for _, h := range []*host{a, b, k} {
			h.close(time.Second)
		}
	})
}

// recvChunks is the chunks of a host's receive queues.
func recvChunks(h *host) (n int) {
	for _, d := range h.reg.Devices() {
		s := d.Stats()
		n += s.Small.Live + s.Large.Live
	}
	return n
}

// TestIdleTrace: the acknowledgement of a message is lost with the connection, which is then given up; when the peer is
// there again it is told, or what it sends again is known.
func TestIdleTrace(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		t.Run(fmt.Sprint(dialect), func(t *testing.T) {
			bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
				a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.Dialect = dialect })
				b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.IdleTimeout = time.Minute })
				rng := rand.New(rand.NewPCG(1, 1))
				ab := &stream{port: 4001, rng: rng}
				ab.send(t, a.conn(addrB), 10)
				eventually(t, "acknowledged", 5*time.Second, func() bool { n, _ := ab.owner.get(); return n == 10 })
				net.SetLink(addrB, addrA, simnet.LinkConfig{Down: true}) // no acknowledgement from now on
				ab.send(t, a.conn(addrB), 10)
				time.Sleep(10 * time.Millisecond)
				if acked, _ := ab.owner.get(); b.sink.len() <= acked {
					t.Fatalf("%d arrived, %d are acknowledged", b.sink.len(), acked)
				}
				time.Sleep(10 * time.Minute)
				if s := b.m.Stats(); s.ConnsRetired != 1 {
					t.Fatalf("%d retired", s.ConnsRetired)
				}
				net.SetLink(addrB, addrA, quick.Link)
				ab.send(t, a.conn(addrB), 10)
				eventually(t, "acknowledged", 5*time.Second, func() bool { n, _ := ab.owner.get(); return n == 30 })
				checkStreams(t, b.sink.take(), ab)
				a.close(time.Second)
				b.close(time.Second)
			})
		})
	}
}

// TestIdleChurn gives connections up at every moment of a peer's sending again. Nothing is lost, and nothing comes twice.
func TestIdleChurn(t *testing.T) {
	for seed := range uint64(4) {
		bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Jitter: 50 * time.Microsecond, Loss: 0.02}}, func(t *testing.T, net *simnet.Net) {
			a := newHost(t, net, addrA)
			b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.IdleTimeout, o.cfg.MaxConns = 10*time.Millisecond, 1 })
			rng := rand.New(rand.NewPCG(seed, 1))
			ab := &stream{port: 4001, rng: rng}
			for range 300 {
				ab.send(t, a.conn(addrB), rng.IntN(4))
				time.Sleep(time.Duration(rng.IntN(25000)) * time.Microsecond)
				if rng.IntN(20) == 0 {
					a.conn(addrB).failLink(errors.New("test"))
				}
			}
			eventually(t, "acknowledged", time.Minute, func() bool { n, _ := ab.owner.get(); return n == ab.sent })
			checkStreams(t, b.sink.take(), ab)
			if s := b.m.Stats(); s.ConnsRetired < 20 || s.DrainTimeouts != 0 {
				t.Errorf("%d retired, %d drain timeouts", s.ConnsRetired, s.DrainTimeouts)
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}

// TestConnsPerPeer: a peer has so many connections of its own asking and no more; those that are wanted here do not count, and other peers
// are not concerned.
func TestConnsPerPeer(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, c := newHost(t, net, addrA), newHost(t, net, addrC)
		b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.MaxConnsPerPeer, o.cfg.IdleTimeout = 4, time.Minute })
		for tos := range uint8(3) {
			if _, err := b.m.Get(addrB, addrA, 100+tos); err != nil {
				t.Fatal(err)
			}
		}
		var o testOwner
		send := func(h *host, tos uint8) {
			x, err := h.m.Get(h.addr, addrB, tos)
			if err != nil {
				t.Fatal(err)
			}
			x.Send(&o, 1, 2, nil)
		}
		for tos := range uint8(10) {
			send(a, tos)
			time.Sleep(time.Millisecond)
		}
		for tos := range uint8(3) {
			send(a, 100+tos)
			send(c, tos)
		}
		time.Sleep(3 * time.Second)
		if n, s := b.sink.len(), b.m.Stats(); n != 4+3+3 || s.AcceptTooMany == 0 || s.ConnsUp != 10 {
			t.Errorf("%d messages, %d connections up, %d requests too many", n, s.ConnsUp, s.AcceptTooMany)
		}
		// One of theirs that is wanted here makes room for another.
		if _, err := b.m.Get(addrB, addrA, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		if s := b.m.Stats(); s.ConnsUp != 11 {
			t.Errorf("%d connections up", s.ConnsUp)
		}
		// The others get their turn when idle ones go.
		eventually(t, "all arrive", 10*time.Minute, func() bool { n, _ := o.get(); return n == 16 })
		for _, h := range []*host{a, c, b} {
			h.close(time.Second)
		}
	})
}

// TestStrangers: peers that come once from ever new addresses leave nothing behind, also when their addresses are made up.
func TestStrangers(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.IdleTimeout, o.cfg.MaxConns = time.Minute, 20 })
		for n := range 60 {
			h := newHost(t, net, netip.AddrFrom4([4]byte{10, 78, 0, byte(n + 1)}))
			var o testOwner
			h.conn(addrB).Send(&o, 1, 2, nil)
			eventually(t, "arrives", 10*time.Minute, func() bool { return b.sink.len() == n+1 })
			if n%2 == 0 {
				net.Partition(h.addr, addrB) // dies without a word
			}
			h.close(0)
			if b.conns() > 20 {
				t.Fatalf("%d connections", b.conns())
			}
		}
		time.Sleep(5 * time.Minute)
		if s := b.m.Stats(); s.Conns != 0 || s.ConnsRetired != 60 || s.AcceptTooMany == 0 {
			t.Errorf("%d connections, %d retired, %d requests too many", s.Conns, s.ConnsRetired, s.AcceptTooMany)
		}
		b.m.mu.Lock()
		if len(b.m.peers)+len(b.m.sites[addrB].conns) != 0 {
			t.Errorf("left: %d peers", len(b.m.peers))
		}
		b.m.mu.Unlock()
		b.close(time.Second)
	})
}
