package conn

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
)

// TestDeadInTime: whatever a connection is doing when its peer falls silent, that is reported within the dead-peer time, once, and not
// before half of it; and so is that the peer is back.
func TestDeadInTime(t *testing.T) {
	for _, after := range []time.Duration{time.Second, 3 * time.Second, 10 * time.Second, 30 * time.Second} {
		for _, what := range []string{"idle", "sending", "receiving", "both", "connecting", "never"} {
			for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
				t.Run(fmt.Sprintf("%v/%s/%v", after, what, dialect), func(t *testing.T) {
					bubble(t, 3, quick, func(t *testing.T, net *simnet.Net) {
						a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.DeadAfter = after })
						b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = dialect })
						var o testOwner
						c := a.conn(addrB)
						silent := make(chan struct{})
						flow := func(c *Conn) {
							go func() {
								for {
									c.Send(&o, 1, 2, make([]byte, 100))
									select {
									case <-silent:
										return
									case <-time.After(3 * time.Millisecond):
									}
								}
							}()
						}
						if what != "never" && what != "connecting" {
							c.Send(&o, 1, 2, nil)
							eventually(t, "up", time.Second, func() bool { n, _ := o.get(); return n == 1 })
							if what == "sending" || what == "both" {
								flow(c)
							}
							if what == "receiving" || what == "both" {
								flow(b.conn(addrA))
							}
							time.Sleep(2*after + after/7) // at no moment in particular
						} else {
							if what == "connecting" {
								c.Send(&o, 1, 2, nil)
								time.Sleep(quick.Link.Delay * 3 / 2) // its REQ has arrived
							}
						}
						if n := len(a.sink.down); n != 0 {
							t.Fatalf("reported down while it was there")
						}
						net.Partition(addrA, addrB)
						start := time.Now()
						if what == "never" {
							c.Send(&o, 1, 2, nil)
						}
						isDown := func() bool {
							a.sink.mu.Lock()
							defer a.sink.mu.Unlock()
							return len(a.sink.down) > 0
						}
						for !isDown() && time.Since(start) < 2*after {
							time.Sleep(after / 200)
						}
						if d := time.Since(start); d > after+after/100 || d < after/2 {
							t.Errorf("reported after %v", d)
						}
						time.Sleep(3 * after)
						net.Heal(addrA, addrB)
						c.Send(&o, 1, 2, nil)
						eventually(t, "reported up", 10*time.Second, func() bool {
							a.sink.mu.Lock()
							defer a.sink.mu.Unlock()
							return len(a.sink.upAgain) == 1
						})
						close(silent)
						if len(a.sink.down) != 1 {
							t.Errorf("reported down %d times", len(a.sink.down))
						}
						a.close(10 * time.Second)
						b.close(10 * time.Second)
					})
				})
			}
		}
	}
}

// TestRestartAgainAndAgain: a peer that dies and comes back every second or so, at moments of all kinds, of either dialect. The survivor
// keeps what was not acknowledged for the next one, in order; each process sees every message once and skips only what
// one before it had; nothing grows.
func TestRestartAgainAndAgain(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%v/%d", dialect, seed), func(t *testing.T) {
				bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond, Jitter: 200 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
					rng := rand.New(rand.NewPCG(seed, 3))
					a := newHost(t, net, addrA)
					ab := &stream{port: 4001, rng: rng}
					lives := 0
					due := uint64(0) // the first message that may be new to a process
					for life := range 40 {
						b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = dialect })
						ba := &stream{port: 4002, rng: rng}
						until := time.Duration(rng.IntN(1500)) * time.Millisecond
						if life == 39 {
							until = time.Minute
						}
						for end := time.Now().Add(until); time.Now().Before(end); {
							if life < 39 || ab.sent == 0 {
								ab.send(t, a.conn(addrB), rng.IntN(3))
								ba.send(t, b.conn(addrA), rng.IntN(3))
							}
							time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
						}
						net.Partition(addrA, addrB)
						time.Sleep(time.Millisecond)
						acked, _ := ab.owner.get()
						got := slices.DeleteFunc(b.sink.take(), func(m gotMsg) bool {
							// The pong to a ping of the process before: nobody's any more.
							return m.dport == PingSourcePort && len(m.data) == 0
						})
						for i, m := range got {
							if i == 0 {
								lives++
								if n := num(m); n > due {
									t.Fatalf("life %d begins with message %d; %d was not acknowledged", life, n, due)
								}
							} else if num(m) != num(got[i-1])+1 {
								t.Fatalf("life %d: message %d after %d", life, num(m), num(got[i-1]))
							}
						}
						checkPrefix(t, a.sink.take(), ba)
						due = uint64(acked)
						b.close(0)
						net.Heal(addrA, addrB)
					}
					if acked, _ := ab.owner.get(); acked != ab.sent || lives < 20 {
						t.Errorf("%d of %d acknowledged, by %d processes", acked, ab.sent, lives)
					}
					s := a.m.Stats()
					if s.Conns != 1 || s.DrainTimeouts != 0 || dialect == DialectOpen && s.PeerRestarted < uint64(lives-1) {
						t.Errorf("%d connections, %d drain timeouts, %d restarts of %d", s.Conns, s.DrainTimeouts, s.PeerRestarted, lives-1)
					}
					// A lifetime without being heard costs a few attempts.
					if s.ConnectAttempts > 40*20 {
						t.Errorf("%d attempts", s.ConnectAttempts)
					}
					a.close(time.Second)
				})
			})
		}
	}
}

// TestStaleQP: a peer rejects our REQ because to it the QP belongs to an older connection (REJ 10). That is one failed attempt.
func TestStaleQP(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		tap := tapCM(net)
		var h holdREQ
		var o testOwner
		h.of(net, addrA)
		a.conn(addrB).Send(&o, 1, 2, nil)
		eventually(t, "a REQ", time.Second, func() bool { return h.len() > 0 })
		net.SetFilter(nil)
		eventually(t, "up", 5*time.Second, func() bool { n, _ := o.get(); return n == 1 })
		// The same QP in a REQ of another connection: the peer takes the one it has for lost.
		e := h.held[0]
		const madLen, commID = 256, 24
		e.Data[len(e.Data)-4-madLen+commID] ^= 0xFF
		flow := roce.NewFlow(e.From, e.To)
		roce.PutICRC(e.Data[len(e.Data)-4:], flow.ICRC(len(e.Data), e.Data[:len(e.Data)-4]))
		net.Inject(e)
		eventually(t, "the connection ends", time.Second, func() bool { return b.m.Stats().ConnReset == 1 })
		var rej cm.REJ
		if err := rej.Decode(tap.find(addrB, cm.AttrREJ)); err != nil || rej.Reason != cm.RejStaleConn {
			t.Fatalf("reject %v, %v", rej.Reason, err)
		}
		a.conn(addrB).Send(&o, 1, 2, nil)
		b.conn(addrA).Send(&o, 2, 1, nil)
		eventually(t, "both arrive", time.Second, func() bool { n, _ := o.get(); return n == 3 })
		if s := a.m.Stats(); s.Established != 2 {
			t.Errorf("up %d times", s.Established)
		}
		a.close(time.Second)
		b.close(time.Second)
	})
	// And told so by a kernel, again and again: we try again, later each time, until it is through with it.
	bubble(t, 2, quick, func(t *testing.T, net *simnet.Net) {
		k := newKernel(t, net, addrA)
		i := newHost(t, net, addrB)
		var o testOwner
		i.conn(addrA).Send(&o, 1, 2, nil)
		for range 5 {
			r := k.wantREQ("another attempt")
			k.reject(r)
		}
		k.accept(k.wantREQ("and another"), false)
		k.wantMap("map")
		if s := i.m.Stats(); s.ConnectRejected != 5 || s.ConnectAttempts != 6 {
			t.Errorf("%d rejected of %d attempts", s.ConnectRejected, s.ConnectAttempts)
		}
		k.close()
		i.close(0)
	})
}
