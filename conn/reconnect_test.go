package conn

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
)

// exchange starts both directions, runs faults meanwhile, and verifies that everything arrived once, in order.
func exchange(t *testing.T, net *simnet.Net, a, b *host, seed uint64, rounds int, fault func(round int)) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 9))
	ab1, ab2, ba := &stream{port: 4001, rng: rng}, &stream{port: 4002, rng: rng}, &stream{port: 4003, rng: rng}
	for r := range rounds {
		ab1.send(t, a.conn(b.addr), rng.IntN(20))
		ab2.send(t, a.conn(b.addr), rng.IntN(20))
		ba.send(t, b.conn(a.addr), rng.IntN(20))
		fault(r)
		time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
	}
	eventually(t, "everything arrives", 10*time.Minute, func() bool {
		return b.sink.len() >= ab1.sent+ab2.sent && a.sink.len() >= ba.sent
	})
	for _, s := range []*stream{ab1, ab2, ba} {
		eventually(t, "everything is acknowledged", time.Minute, func() bool { n, _ := s.owner.get(); return n == s.sent })
	}
	checkStreams(t, b.sink.take(), ab1, ab2)
	checkStreams(t, a.sink.take(), ba)
}

// TestLinkResets breaks the QP under a connection again and again, from either side.
func TestLinkResets(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for seed := range uint64(5) {
			t.Run(fmt.Sprintf("%v/%d", dialect, seed), func(t *testing.T) {
				bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Jitter: 50 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
					mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
					a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
					rng := rand.New(rand.NewPCG(seed, 5))
					exchange(t, net, a, b, seed, 60, func(r int) {
						switch rng.IntN(6) {
						case 0:
							a.conn(addrB).failLink(errors.New("test"))
						case 1:
							b.conn(addrA).failLink(errors.New("test"))
						case 2:
							a.conn(addrB).failLink(errors.New("test"))
							b.conn(addrA).failLink(errors.New("test"))
						}
					})
					sa, sb := a.m.Stats(), b.m.Stats()
					if sa.ConnReset < 5 || sa.DrainTimeouts+sb.DrainTimeouts != 0 {
						t.Errorf("%d resets, %d drain timeouts", sa.ConnReset, sa.DrainTimeouts)
					}
					t.Logf("resets %d, resent %d, dropped as old %d, stale completions %d", sa.ConnReset, sa.SendRetransmit, sb.RecvDropOldSeq, sb.RecvStale)
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		}
	}
}

// TestDuel lets both sides begin at the same instant, many times.
func TestDuel(t *testing.T) {
	for _, dialects := range [][2]Dialect{{DialectOpen, DialectOpen}, {DialectKernelOnly, DialectKernelOnly}, {DialectOpen, DialectKernelOnly}, {DialectKernelOnly, DialectOpen}} {
		t.Run(fmt.Sprint(dialects), func(t *testing.T) {
			raced := uint64(0)
			for seed := range uint64(20) {
				bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond, Jitter: 100 * time.Microsecond}}, func(t *testing.T, net *simnet.Net) {
					a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.Dialect = dialects[0] })
					b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = dialects[1] })
					start := time.Now()
					exchange(t, net, a, b, seed, 3, func(int) {})
					if d := time.Since(start); d > 2*time.Second {
						t.Errorf("seed %d: a duel took %v", seed, d)
					}
					raced += a.m.Stats().IBConnectRaced + b.m.Stats().IBConnectRaced
					if open := dialects == [2]Dialect{}; open {
						// The lower address wins at once, without a reset.
						if s := b.m.Stats(); s.ConnReset != 0 || s.Established != 1 {
							t.Errorf("seed %d: %d resets, %d times up", seed, s.ConnReset, s.Established)
						}
						if s := a.m.Stats(); s.ConnectFailed != 0 || s.ConnectAttempts > 1 {
							t.Errorf("seed %d: the lower address tried %d times and failed %d times", seed, s.ConnectAttempts, s.ConnectFailed)
						}
					}
					a.close(time.Second)
					b.close(time.Second)
				})
			}
			if raced == 0 {
				t.Error("no race happened")
			}
		})
	}
}

// TestPartition cuts the network for longer than the dead-peer time and heals it.
func TestPartition(t *testing.T) {
	bubble(t, 5, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}}, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		exchange(t, net, a, b, 1, 30, func(r int) {
			switch r {
			case 10:
				net.Partition(addrA, addrB)
				start := time.Now()
				eventually(t, "the peer is reported down", 30*time.Second, func() bool {
					a.sink.mu.Lock()
					defer a.sink.mu.Unlock()
					return len(a.sink.down) == 1
				})
				if d := time.Since(start); d > 10*time.Second {
					t.Errorf("reported after %v", d)
				}
				time.Sleep(20 * time.Second)
			case 11:
				net.Heal(addrA, addrB)
			}
		})
		for _, h := range []*host{a, b} {
			h.sink.mu.Lock()
			if len(h.sink.down) != 1 || len(h.sink.upAgain) != 1 {
				t.Errorf("%v: down %v, up %v", h.addr, h.sink.down, h.sink.upAgain)
			}
			h.sink.mu.Unlock()
			if s := h.m.Stats(); s.PeersDown != 1 {
				t.Errorf("%v: %d peers down", h.addr, s.PeersDown)
			}
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestIdlePeerDies: an idle connection notices that the peer has gone without a word, in time, by its heartbeat, and
// rests until there is something to send.
func TestIdlePeerDies(t *testing.T) {
	bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		a.conn(addrB).Send(&o, 1, 2, []byte("x"))
		time.Sleep(time.Hour)
		sa := a.m.Stats()
		if sa.HeartbeatsSent < 100 || sa.HeartbeatTimeouts != 0 || sa.ConnReset != 0 {
			t.Errorf("an hour of idling: %d heartbeats, %d timeouts, %d resets", sa.HeartbeatsSent, sa.HeartbeatTimeouts, sa.ConnReset)
		}
		// The receive buffers, and the map.
		if u, q := a.slab.Stats(), a.reg.Devices()[0].Stats().Large; u.LargeInUse > q.Live+1 {
			t.Errorf("%d large chunks are in use", u.LargeInUse)
		}
		net.Partition(addrA, addrB)
		start := time.Now()
		eventually(t, "down", 11*time.Second, func() bool { return a.m.Stats().PeersDown == 1 })
		t.Logf("noticed after %v", time.Since(start))
		time.Sleep(time.Minute)
		synctest.Wait()
		c := a.conn(addrB)
		c.mu.Lock()
		if c.ctl.running || c.state.load() != Down {
			t.Errorf("the control side of an idle connection to a dead peer: running %v, %v", c.ctl.running, c.state.load())
		}
		c.mu.Unlock()
		net.Heal(addrA, addrB)
		c.Send(&o, 1, 2, []byte("y"))
		eventually(t, "message arrives", 5*time.Second, func() bool { return b.sink.len() == 2 })
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestPeerRestart kills one side without a word, in the middle of traffic, and starts it again. The new process sees the
// stream from the first message that the old one had not acknowledged; the survivor's connection goes on.
func TestPeerRestart(t *testing.T) {
	for seed := range uint64(8) {
		bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
			rng := rand.New(rand.NewPCG(seed, 3))
			a := newHost(t, net, addrA)
			ab := &stream{port: 4001, rng: rng}
			nextExpected := uint64(0)
			for gen := range 4 {
				b := newHost(t, net, addrB)
				ba := &stream{port: 4002, rng: rng}
				for range 10 {
					ab.send(t, a.conn(addrB), rng.IntN(30))
					ba.send(t, b.conn(addrA), rng.IntN(30))
					time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
				}
				if gen == 3 {
					eventually(t, "everything arrives", time.Minute, func() bool { n, _ := ab.owner.get(); return n == ab.sent })
				}
				// Kill: from now on nothing of b gets out.
				net.Partition(addrA, addrB)
				time.Sleep(time.Millisecond) // what is under way still arrives
				got := b.sink.take()
				acked, _ := ab.owner.get()
				fromA := a.sink.take()
				// What a got of this process is a prefix of what it sent, in order.
				checkPrefix(t, fromA, ba)
				if len(got) > 0 {
					first := num(got[0])
					if first != nextExpected {
						t.Fatalf("seed %d, process %d: begins with message %d, the first not acknowledged is %d", seed, gen, first, nextExpected)
					}
					for i, m := range got {
						if num(m) != first+uint64(i) {
							t.Fatalf("seed %d, process %d: message %d after %d", seed, gen, num(m), first+uint64(i)-1)
						}
					}
				} else if gen > 0 && gen < 3 {
					t.Logf("seed %d: process %d saw nothing", seed, gen)
				}
				nextExpected = uint64(acked)
				b.close(0)
				net.Heal(addrA, addrB)
			}
			if s := a.m.Stats(); s.PeerRestarted == 0 {
				t.Errorf("no restart noticed")
			}
			a.close(0)
		})
	}
}

func num(m gotMsg) uint64 {
	n := uint64(0)
	for _, b := range m.data[:8] {
		n = n<<8 | uint64(b)
	}
	return n
}

func checkPrefix(t *testing.T, got []gotMsg, s *stream) {
	t.Helper()
	for i, m := range got {
		if num(m) != uint64(i) || sum(m.data) != sum(payload(m.sport, uint64(i), len(m.data))) {
			t.Fatalf("message %d at place %d", num(m), i)
		}
	}
}

// TestHardBound: a Sink that refuses resets the connection without acknowledging, and gets the messages again.
func TestHardBound(t *testing.T) {
	bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		room := 50
		b.sink.accept = func(c *Conn, m *Incoming) bool {
			if room == 0 {
				return false
			}
			room--
			return true
		}
		ab := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}
		ab.send(t, a.conn(addrB), 400)
		for range 10 {
			time.Sleep(time.Second)
			b.sink.mu.Lock()
			room += 50
			b.sink.mu.Unlock()
		}
		eventually(t, "everything arrives", 10*time.Second, func() bool { n, _ := ab.owner.get(); return n == ab.sent })
		checkStreams(t, b.sink.take(), ab)
		s := b.m.Stats()
		if s.RecvRefused == 0 || s.ConnReset == 0 {
			t.Errorf("%d refused, %d resets", s.RecvRefused, s.ConnReset)
		}
		if s.Established > 100 {
			t.Errorf("reconnected %d times in 10 s: no back-off", s.Established)
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestNobodyThere: what is queued for a host without a process waits, and goes out when it appears.
func TestNobodyThere(t *testing.T) {
	bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		ab := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}
		ab.send(t, a.conn(addrB), 100)
		time.Sleep(15 * time.Second)
		if s := a.m.Stats(); s.PeersDown != 1 || s.ConnectAttempts > 60 {
			t.Errorf("%d peers down, %d attempts", s.PeersDown, s.ConnectAttempts)
		}
		b := newHost(t, net, addrB)
		eventually(t, "everything arrives", 5*time.Second, func() bool { return b.sink.len() == 100 })
		checkStreams(t, b.sink.take(), ab)
		eventually(t, "up", time.Second, func() bool { a.sink.mu.Lock(); defer a.sink.mu.Unlock(); return len(a.sink.upAgain) == 1 })
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestCloseLingers: Close waits for acknowledgements, and says what it abandoned.
func TestCloseLingers(t *testing.T) {
	bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		ab := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}
		ab.send(t, a.conn(addrB), 300)
		if n := a.close(5 * time.Second); n != 0 {
			t.Errorf("%d abandoned", n)
		}
		checkStreams(t, b.sink.take(), ab)
		if n, _ := ab.owner.get(); n != ab.sent {
			t.Errorf("%d of %d released", n, ab.sent)
		}
		if err := a.conn2(addrB); !errors.Is(err, ErrClosed) {
			t.Errorf("Get after Close: %v", err)
		}
		// To nobody: all are abandoned, released, and counted.
		var o testOwner
		c := b.conn(addrC)
		for range 10 {
			c.Send(&o, 1, 2, make([]byte, 100000))
		}
		start := time.Now()
		if n := b.close(3 * time.Second); n != 10 || b.m.Stats().SendAbandoned != 10 {
			t.Errorf("%d abandoned, %d counted", n, b.m.Stats().SendAbandoned)
		}
		if d := time.Since(start); d < 3*time.Second || d > 4*time.Second {
			t.Errorf("Close took %v", d)
		}
		if n, bytes := o.get(); n != 10 || bytes != 1000000 {
			t.Errorf("released %d messages, %d bytes", n, bytes)
		}
		if err := c.Send(&o, 1, 2, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("Send after Close: %v", err)
		}
		if n, err := b.m.Close(context.Background()); n != 10 || err != nil {
			t.Errorf("second Close: %d, %v", n, err)
		}
	})
}

// TestCloseOwesNobody: Close does not wait for answers of the connection's own to a peer that has gone, nor count them.
func TestCloseOwesNobody(t *testing.T) {
	bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		if _, err := b.conn(addrA).Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		net.Partition(addrA, addrB)
		c := a.conn(addrB)
		c.pong(4000)
		c.mu.Lock()
		c.pingLocked(nil)
		c.flush = true
		c.transmitLocked()
		start := time.Now()
		if n := a.close(10 * time.Second); n != 0 {
			t.Errorf("%d abandoned", n)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("Close took %v", d)
		}
		b.close(0)
	})
}

// TestCloseAcknowledges: who closes at once has acknowledged what it has received, so that its peer need not come back.
func TestCloseAcknowledges(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for seed := range uint64(8) {
			bubble(t, seed, quick, func(t *testing.T, net *simnet.Net) {
				mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
				a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
				ab := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, seed))}
				ab.send(t, a.conn(addrB), 30)
				for b.sink.len() < 30 {
					time.Sleep(time.Microsecond)
				}
				b.close(0)
				if n, _ := ab.owner.get(); n != ab.sent {
					t.Errorf("%d of %d acknowledged", n, ab.sent)
				}
				checkStreams(t, b.sink.take(), ab)
				a.close(0)
			})
		}
	}
}

func (h *host) conn2(remote netip.Addr) error {
	_, err := h.m.Get(h.addr, netip.MustParseAddr("10.77.0.99"), 0)
	return err
}

// TestIPv6: the mark does not fit into the REQ and follows as the first SEND.
func TestIPv6(t *testing.T) {
	a6, b6 := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	for seed := range uint64(3) {
		bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond, Loss: 0.02}}, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, a6), newHost(t, net, b6)
			exchange(t, net, a, b, seed, 20, func(r int) {
				if r%5 == 4 {
					a.conn(b6).failLink(errors.New("test"))
				}
			})
			for _, i := range append(a.m.Snapshot(), b.m.Snapshot()...) {
				if i.PeerIsKernel || i.PeerInc == 0 {
					t.Errorf("%v does not know that %v is one of us", i.Local, i.Remote)
				}
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}

// TestKernelIsRemembered: the second connection to a kernel uses the small buffers.
func TestKernelIsRemembered(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = DialectKernelOnly })
		var o testOwner
		c := a.conn(addrB)
		c.Send(&o, 1, 2, []byte("x"))
		eventually(t, "arrives", time.Second, func() bool { return b.sink.len() == 1 })
		if !c.peer.kernel.Load() {
			t.Error("not known as a kernel")
		}
		kind := func() int { c.mu.Lock(); defer c.mu.Unlock(); return c.link.Recv().Bytes() }
		first := kind()
		b.m.Close(context.Background())
		b.close(0)
		c.failLink(ib.ErrPeerClosed) // what a kernel that ends would have told us
		b = newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = DialectKernelOnly })
		eventually(t, "down", 20*time.Second, func() bool { return c.State() == Down })
		c.Send(&o, 1, 2, []byte("y"))
		eventually(t, "arrives", 5*time.Second, func() bool { return b.sink.len() == 1 })
		if second := kind(); first != 61440 || second != 4144 {
			t.Errorf("announced %d, then %d bytes", first, second)
		}
		// It comes back as one of us: small SENDs at first, but our dialect.
		eventually(t, "acknowledged", time.Second, func() bool { n, _ := o.get(); return n == 2 })
		b.close(0)
		c.failLink(ib.ErrPeerClosed)
		b = newHost(t, net, addrB)
		eventually(t, "down", 20*time.Second, func() bool { return c.State() == Down })
		ab := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}
		ba := &stream{port: 4002, rng: ab.rng}
		ab.send(t, c, 100)
		ba.send(t, b.conn(addrA), 100)
		eventually(t, "arrives", 5*time.Second, func() bool { return b.sink.len() == 100 && a.sink.len() == 100 })
		checkStreams(t, b.sink.take(), ab)
		checkStreams(t, a.sink.take(), ba)
		if c.peer.kernel.Load() {
			t.Error("still taken for a kernel")
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestManyConns: one host, many peers and types of service, at once.
func TestManyConns(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		many := func(o *hostOptions) { o.cfg.MaxConnsPerPeer = 256 }
		a, b, d := newHost(t, net, addrA), newHost(t, net, addrB, many), newHost(t, net, addrC, many)
		var o testOwner
		n := 0
		for round := range 5 {
			for tos := range 100 {
				for _, to := range []*host{b, d} {
					c, err := a.m.Get(addrA, to.addr, uint8(tos))
					if err != nil {
						t.Fatal(err)
					}
					if err := c.Send(&o, uint16(10+tos), uint16(10+round), payload(1, uint64(n), 100*(round+1))); err != nil {
						t.Fatal(err)
					}
					n++
				}
			}
			time.Sleep(time.Millisecond)
		}
		eventually(t, "all arrive", 10*time.Second, func() bool { return b.sink.len()+d.sink.len() == n })
		eventually(t, "all are acknowledged", time.Second, func() bool { got, _ := o.get(); return got == n })
		if s := a.m.Stats(); s.ConnsUp != 200 {
			t.Errorf("%d connections up", s.ConnsUp)
		}
		a.close(time.Second)
		b.close(time.Second)
		d.close(time.Second)
	})
}

// TestPing measures a round trip.
func TestPing(t *testing.T) {
	bubble(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: time.Millisecond}}, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := a.conn(addrB).Ping(ctx); err != nil {
			t.Fatal(err)
		}
		d, err := a.conn(addrB).Ping(ctx)
		if err != nil || d < 2*time.Millisecond || d > 3*time.Millisecond {
			t.Errorf("round trip %v, %v", d, err)
		}
		ctx2, cancel2 := context.WithTimeout(context.Background(), time.Second)
		defer cancel2()
		if _, err := a.conn(addrC).Ping(ctx2); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ping to nobody: %v", err)
		}
		// They have a bound.
		var wg sync.WaitGroup
		ctx3, cancel3 := context.WithCancel(context.Background())
		for range maxPings {
			wg.Go(func() { a.conn(addrC).Ping(ctx3) })
		}
		synctest.Wait()
		before := a.m.Stats().PingRefused
		if _, err := a.conn(addrC).Ping(ctx3); !errors.Is(err, ErrNoMemory) || a.m.Stats().PingRefused != before+1 {
			t.Errorf("one too many: %v, %d counted", err, a.m.Stats().PingRefused)
		}
		cancel3()
		wg.Wait()
		a.close(0)
		b.close(time.Second)
	})
}

// TestCancel takes messages back, sent and unsent, and the rest still arrives in order.
func TestCancel(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		c := a.conn(addrB)
		keep, drop := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}, &stream{port: 4002, rng: rand.New(rand.NewPCG(1, 2))}
		for range 50 {
			keep.send(t, c, 3)
			drop.send(t, c, 3)
		}
		if n := c.Cancel(&drop.owner, 9); n != 0 {
			t.Errorf("%d messages to port 9 cancelled", n)
		}
		if n := c.Cancel(&drop.owner, 4002); n != 150 {
			t.Errorf("%d cancelled", n)
		}
		if n, _ := drop.owner.get(); n != 150 {
			t.Errorf("%d released", n)
		}
		b := newHost(t, net, addrB)
		eventually(t, "the others arrive", 10*time.Second, func() bool { n, _ := keep.owner.get(); return n == keep.sent })
		checkStreams(t, b.sink.take(), keep)
		// The last ones of a queue.
		drop.send(t, c, 1)
		time.Sleep(100 * time.Millisecond)
		net.Partition(addrA, addrB)
		keep.send(t, c, 5)
		drop.send(t, c, 5)
		c.Cancel(&drop.owner, -1)
		net.Heal(addrA, addrB)
		eventually(t, "the queue empties", 10*time.Second, func() bool { return c.Info().QueuedMsgs == 0 })
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestHalfOpen: a REQ whose sender never completes the handshake leaves nothing behind.
func TestHalfOpen(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		net.SetFilter(func(e simnet.Event) bool { return e.From.Addr() == addrB }) // no REP arrives
		for tos := range 20 {
			p := k.priv(addrB)
			p[12] = byte(tos)
			k.newQP()
			cp := kernelParam
			cp.PrivateData = p
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			if _, _, err := k.dev.Connect(ctx, netip.AddrPortFrom(addrB, CMPort4), k.qp, cp, nil); err == nil {
				t.Fatal("connected")
			}
			cancel()
		}
		eventually(t, "connections are forgotten", 10*time.Second, func() bool { return i.m.Stats().Conns == 0 })
		i.m.mu.Lock()
		if len(i.m.byKey) != 0 || len(i.m.peers) != 0 || len(i.m.sites[addrB].conns) != 0 {
			t.Errorf("left: %d connections, %d peers", len(i.m.byKey), len(i.m.peers))
		}
		i.m.mu.Unlock()
		net.SetFilter(nil)
		// One that somebody here has asked for stays.
		c := i.conn(addrA)
		k.up(i)
		if i.conn(addrA) != c {
			t.Error("another connection")
		}
		if _, err := i.m.Get(addrB, addrB, 0); !errors.Is(err, ErrSelf) {
			t.Errorf("a connection to itself: %v", err)
		}
	})
}

// TestSlabExhausted: senders that fill the memory are told so, and what was accepted gets through; both ways at once, so that
// the receive queues want memory too.
func TestSlabExhausted(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		mod := func(o *hostOptions) {
			o.slabBytes, o.cfg.SendMemory = 8<<20, 4<<20
			o.regCfg.RecvMemory = 2 << 20
		}
		a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
		rng := rand.New(rand.NewPCG(1, 1))
		ab, ba := &stream{port: 4001, rng: rng}, &stream{port: 4002, rng: rng}
		refused := 0
		for range 20 {
			for _, x := range []struct {
				s *stream
				c *Conn
			}{{ab, a.conn(addrB)}, {ba, b.conn(addrA)}} {
				for range 200 {
					size := testSizes[rng.IntN(len(testSizes))]
					err := x.c.Send(&x.s.owner, x.s.port, x.s.port, payload(x.s.port, x.s.next, size))
					if errors.Is(err, ErrNoMemory) {
						refused++
						continue
					} else if err != nil {
						t.Fatal(err)
					}
					x.s.next++
					x.s.sent++
				}
			}
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		}
		if n := a.m.Stats().SendNoMemory + b.m.Stats().SendNoMemory; refused == 0 || n != uint64(refused) {
			t.Errorf("memory was exhausted %d times, %d counted", refused, n)
		}
		eventually(t, "what was accepted arrives", time.Minute, func() bool { return b.sink.len() == ab.sent && a.sink.len() == ba.sent })
		checkStreams(t, b.sink.take(), ab)
		checkStreams(t, a.sink.take(), ba)
		a.close(10 * time.Second)
		b.close(10 * time.Second)
	})
}

// TestPingNotAnswered: a peer may refuse to answer a ping, for its rate or because our port is congested, and then never does. The pings after
// it have their own answers, and an idle connection goes on asking for signs of life, and stays.
func TestPingNotAnswered(t *testing.T) {
	bubble(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: time.Millisecond}}, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect, o.cfg.HeartbeatIdle = DialectKernelOnly, -1 }) // a kernel asks nobody
		ping := func() (time.Duration, error) {
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			return a.conn(addrB).Ping(ctx)
		}
		if _, err := ping(); err != nil {
			t.Fatal(err)
		}
		ca, cb := a.conn(addrB), b.conn(addrA)
		answer := func(on bool) {
			cb.mu.Lock()
			link := cb.link
			cb.mu.Unlock()
			link.InRecv(func() {
				cb.rx.pongs.tokens = pongBurst
				if !on {
					cb.rx.pongs.tokens = -1 << 30
				}
			})
		}
		idle := func(what string) {
			t.Helper()
			time.Sleep(2 * time.Minute)
			if s := a.m.Stats(); s.HeartbeatTimeouts != 0 || s.ConnReset != 0 || s.HeartbeatsSent == 0 {
				t.Errorf("%s: %d heartbeats, %d found their peer dead, %d connections lost", what, s.HeartbeatsSent, s.HeartbeatTimeouts, s.ConnReset)
			}
		}
		answer(false)
		if d, err := ping(); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a ping that is not answered: %v, %v", d, err)
		}
		answer(true)
		for range 3 {
			if d, err := ping(); err != nil || d < 2*time.Millisecond || d > 3*time.Millisecond {
				t.Errorf("a ping after it: %v, %v", d, err)
			}
		}
		idle("with answers")
		answer(false) // an acknowledgement is a sign of life too
		idle("without answers")
		answer(true)
		if _, err := ping(); err != nil {
			t.Error(err)
		}
		// Nobody waits for an answer less than before.
		forever, stop := context.WithCancel(context.Background())
		defer stop()
		answer(false)
		go ca.Ping(forever)
		time.Sleep(time.Second)
		answer(true)
		idle("with somebody who waits for ever")
		stop()
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestCloseLeavesNoTimer: a connection that is established while it is being closed has no timer that goes off when Close has returned.
func TestCloseLeavesNoTimer(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		var faults faultverbs.Faults
		a := newHost(t, net, addrA, func(o *hostOptions) {
			o.wrap = func(p verbs.Provider) verbs.Provider { return faultverbs.Wrap(p, &faults) }
		})
		b := newHost(t, net, addrB)
		var o testOwner
		c := a.conn(addrB)
		faults.Delay(faultverbs.Modify, 1, 100*time.Millisecond) // the window is set when the peer has answered
		c.Send(&o, 1, 2, nil)
		time.Sleep(50 * time.Millisecond)
		a.close(0)
		if c.ctl.established != 1 {
			t.Fatalf("established %d times", c.ctl.established)
		}
		for i, timer := range []*time.Timer{c.ackTimer, c.askTimer, c.tick} {
			if timer != nil && timer.Stop() {
				t.Errorf("timer %d runs", i)
			}
		}
		b.close(time.Second)
	})
}
