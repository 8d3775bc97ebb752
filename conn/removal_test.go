package conn

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
)

func (h *host) unplug() {
	h.t.Helper()
	if err := h.prov.Remove(h.addr); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) plug() {
	h.t.Helper()
	if err := h.prov.Add(h.addr); err != nil {
		h.t.Fatal(err)
	}
}

// TestDevicesComeAndGo removes and adds the devices that carry the traffic, again and again, on either side and on both, for shorter
// and longer than it takes to notice, and faster than they can be torn down. Every message arrives once and in order.
func TestDevicesComeAndGo(t *testing.T) {
	for _, dialects := range [][2]Dialect{{DialectOpen, DialectOpen}, {DialectKernelOnly, DialectKernelOnly}, {DialectOpen, DialectKernelOnly}} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%v/%d", dialects, seed), func(t *testing.T) {
				bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Jitter: 50 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
					a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.Dialect = dialects[0] })
					b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.Dialect = dialects[1] })
					rng := rand.New(rand.NewPCG(seed, 11))
					for _, h := range []*host{a, b} {
						h.sink.hold = true // a device does not wait for whoever holds its buffers
					}
					exchange(t, net, a, b, seed, 60, func(r int) {
						var out []*host
						switch rng.IntN(6) {
						case 0:
							out = []*host{a}
						case 1:
							out = []*host{b}
						case 2:
							out = []*host{a, b}
						default:
							return
						}
						for range 1 + rng.IntN(3) {
							for _, h := range out {
								h.unplug()
							}
							switch rng.IntN(3) {
							case 0: // before anything has been torn down
							case 1:
								time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
							case 2:
								time.Sleep(time.Duration(rng.IntN(20_000)) * time.Millisecond)
							}
							for _, h := range out {
								h.plug()
							}
							if rng.IntN(2) == 0 {
								time.Sleep(time.Duration(rng.IntN(500)) * time.Microsecond)
							}
						}
						if r%10 == 0 {
							a.sink.releaseAll()
							b.sink.releaseAll()
						}
					})
					for _, h := range []*host{a, b} {
						s := h.m.Stats()
						if s.DevicesLost < 5 || s.DevicesLost != s.DevicesBack || s.DrainTimeouts != 0 {
							t.Errorf("%v: %d devices lost, %d back, %d drain timeouts", h.addr, s.DevicesLost, s.DevicesBack, s.DrainTimeouts)
						}
						t.Logf("%v: devices lost %d, resets %d, resent %d, dropped as old %d", h.addr, s.DevicesLost, s.ConnReset, s.SendRetransmit, s.RecvDropOldSeq)
						if d := h.reg.Devices(); len(d) != 1 {
							t.Errorf("%v: %d devices", h.addr, len(d))
						}
						h.m.mu.Lock()
						if n := len(h.m.scratch); n > 1 {
							t.Errorf("%v: what belonged to %d devices is still there", h.addr, n)
						}
						h.m.mu.Unlock()
					}
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		}
	}
}

// TestWithoutDevice: a connection whose device is gone tries nothing, costs no goroutine and blames nobody, for hours; what is
// written meanwhile waits, and goes out as soon as there is a device.
func TestWithoutDevice(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		rng := rand.New(rand.NewPCG(1, 1))
		ab, ba := &stream{port: 4001, rng: rng}, &stream{port: 4002, rng: rng}
		c := a.conn(addrB)
		ab.send(t, c, 50)
		ba.send(t, b.conn(addrA), 50)
		time.Sleep(300 * time.Microsecond) // in the middle of it
		a.unplug()
		ab.send(t, c, 50)
		time.Sleep(time.Second)
		before := a.m.Stats()
		time.Sleep(3 * time.Hour)
		ab.send(t, c, 5)
		ba.send(t, b.conn(addrA), 5)
		time.Sleep(time.Minute)
		synctest.Wait()
		s := a.m.Stats()
		if s.ConnectAttempts != before.ConnectAttempts || s.ConnectFailed != before.ConnectFailed || s.PeersDown != 0 {
			t.Errorf("without a device: %d attempts, %d failed, %d peers reported down", s.ConnectAttempts-before.ConnectAttempts, s.ConnectFailed, s.PeersDown)
		}
		if s.DevicesLost != 1 || s.DevicesBack != 0 {
			t.Errorf("%d devices lost, %d back", s.DevicesLost, s.DevicesBack)
		}
		if i := c.Info(); i.State != Down || i.QueuedMsgs == 0 || i.Device != "" || i.LastError == "" {
			t.Errorf("%+v", i)
		}
		c.mu.Lock()
		if c.ctl.running {
			t.Error("a control side that has nothing to do")
		}
		c.mu.Unlock()
		if d := a.reg.Devices(); len(d) != 0 {
			t.Errorf("%d devices", len(d))
		}
		// The peer has noticed, and says so.
		if s := b.m.Stats(); s.PeersDown != 1 {
			t.Errorf("the peer reports %d peers down", s.PeersDown)
		}
		start := time.Now()
		a.plug()
		eventually(t, "everything arrives", 5*time.Second, func() bool { return b.sink.len() == ab.sent && a.sink.len() == ba.sent })
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("it took %v", d)
		}
		checkStreams(t, b.sink.take(), ab)
		checkStreams(t, a.sink.take(), ba)
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestIdleConnectionComesBack: a connection that carried nothing when its device went is there again when it is back, at both
// ends, without anybody sending.
func TestIdleConnectionComesBack(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		a.conn(addrB).Send(&o, 1, 2, []byte("x"))
		time.Sleep(time.Second)
		b.unplug() // the side that was asked
		time.Sleep(time.Second)
		if s := b.conn(addrA).State(); s != Down {
			t.Errorf("without a device: %v", s)
		}
		b.plug()
		time.Sleep(time.Second)
		for _, c := range []*Conn{a.conn(addrB), b.conn(addrA)} {
			if i := c.Info(); i.State != Up || i.Established != 2 {
				t.Errorf("%v: %+v", c, i)
			}
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestRemovalWhileConnecting removes a device at every moment of connecting and accepting, a fifth of a network delay apart, and
// gives it back before or after the attempt would have been given up.
func TestRemovalWhileConnecting(t *testing.T) {
	for side := range 2 {
		for _, away := range []time.Duration{0, time.Millisecond, 3 * time.Second, time.Minute} {
			t.Run(fmt.Sprintf("side %d for %v", side, away), func(t *testing.T) {
				for step := range 30 {
					bubble(t, uint64(step), quick, func(t *testing.T, net *simnet.Net) {
						a, b := newHost(t, net, addrA), newHost(t, net, addrB)
						hs := []*host{a, b}
						s := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, uint64(step)))}
						s.send(t, a.conn(addrB), 10)
						time.Sleep(time.Duration(step) * quick.Link.Delay / 5)
						hs[side].unplug()
						time.Sleep(away)
						hs[side].plug()
						start := time.Now()
						eventually(t, "everything arrives", time.Minute, func() bool { return b.sink.len() == s.sent })
						if d := time.Since(start); d > 5*time.Second {
							t.Errorf("step %d: everything arrived %v after the device was back", step, d)
						}
						checkStreams(t, b.sink.take(), s)
						a.close(time.Second)
						b.close(time.Second)
					})
				}
			})
		}
	}
}

// TestRemovalWhileClosing removes a device at every moment of Manager.Close, and closes one that has no device.
func TestRemovalWhileClosing(t *testing.T) {
	for step := range 30 {
		bubble(t, uint64(step), quick, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA), newHost(t, net, addrB)
			s := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, uint64(step)))}
			s.send(t, a.conn(addrB), 100)
			time.Sleep(time.Duration(step%10) * time.Millisecond)
			closed := make(chan int)
			go func() { closed <- a.close(100 * time.Millisecond) }()
			time.Sleep(time.Duration(step) * quick.Link.Delay / 3)
			a.unplug()
			b.unplug()
			if step%2 == 0 {
				a.plug()
			}
			abandoned := <-closed
			released, _ := s.owner.get()
			if released != s.sent {
				t.Errorf("step %d: owners were told of %d of %d messages", step, released, s.sent)
			}
			if n := b.sink.len(); n+abandoned < s.sent {
				t.Errorf("step %d: %d arrived and %d were abandoned of %d", step, n, abandoned, s.sent)
			}
			b.close(0)
		})
	}
}

// TestCloseWithoutDevice: the linger waits for a device as it waits for a peer, and its end is the end.
func TestCloseWithoutDevice(t *testing.T) {
	for _, back := range []bool{false, true} {
		bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA), newHost(t, net, addrB)
			a.unplug()
			time.Sleep(time.Second)
			var o testOwner
			a.conn(addrB).Send(&o, 1, 2, []byte("x"))
			want := 1
			if back {
				want = 0
				go func() {
					time.Sleep(time.Second)
					a.plug()
				}()
			}
			start := time.Now()
			if n := a.close(5 * time.Second); n != want {
				t.Errorf("%d abandoned, want %d", n, want)
			}
			if d := time.Since(start); back == (d >= 5*time.Second) {
				t.Errorf("close took %v", d)
			}
			b.close(time.Second)
		})
	}
}

// TestDeviceFails: a fatal event makes the device's owner close it and open it anew, since it holds the address until then.
func TestDeviceFails(t *testing.T) {
	for seed := range uint64(4) {
		bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
			var faults faultverbs.Faults
			prov := &keepLast{}
			a := newHost(t, net, addrA, func(o *hostOptions) {
				o.wrap = func(p verbs.Provider) verbs.Provider {
					prov.Provider = faultverbs.Wrap(p, &faults)
					return prov
				}
			})
			b := newHost(t, net, addrB)
			rng := rand.New(rand.NewPCG(seed, 11))
			exchange(t, net, a, b, seed, 40, func(int) {
				switch rng.IntN(5) {
				case 0:
					faults.DeviceFatal(prov.last())
				case 1:
					// and what comes after it fails, too
					faults.DeviceFatal(prov.last())
					faults.Fail([]faultverbs.Op{faultverbs.OpenDevice, faultverbs.AllocPD, faultverbs.CreateCQ, faultverbs.CreateSRQ, faultverbs.Listen, faultverbs.CreateQP}[rng.IntN(6)], 1, verbs.ErrNoMemory)
					time.Sleep(time.Duration(rng.IntN(3000)) * time.Millisecond)
				}
			})
			faults.Clear()
			if s := a.m.Stats(); s.DevicesLost < 3 || s.DevicesLost != s.DevicesBack {
				t.Errorf("%d devices lost, %d back", s.DevicesLost, s.DevicesBack)
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}

// keepLast remembers the device that was opened last.
type keepLast struct {
	verbs.Provider
	mu  sync.Mutex
	dev verbs.Device
}

func (p *keepLast) last() verbs.Device {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dev
}

func (p *keepLast) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err == nil {
		p.mu.Lock()
		p.dev = d
		p.mu.Unlock()
	}
	return d, err
}

// TestManyConnectionsLoseTheirDevice: they come back over some time, all of them, and only once.
func TestManyConnectionsLoseTheirDevice(t *testing.T) {
	bubble(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}}, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		var peers []*host
		var o testOwner
		for i := range 20 {
			h := newHost(t, net, netip.AddrFrom4([4]byte{10, 78, 0, byte(i + 1)}))
			peers = append(peers, h)
			a.conn(h.addr).Send(&o, 1, 2, []byte("x"))
		}
		time.Sleep(time.Second)
		for range 3 {
			a.unplug()
			time.Sleep(time.Second)
			a.plug()
			time.Sleep(time.Second)
		}
		for _, h := range peers {
			c := a.conn(h.addr)
			if i := c.Info(); i.State != Up || i.Established != 4 {
				t.Errorf("%v: %v, established %d times", c, i.State, i.Established)
			}
			h.close(time.Second)
		}
		a.close(time.Second)
	})
}

// TestAddressMoves: an address that one provider loses is found with another.
func TestAddressMoves(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		var first, second hostProvider
		a := newHost(t, net, addrA, func(o *hostOptions) {
			o.wrap = func(p verbs.Provider) verbs.Provider { first.Provider = p; return &first }
		})
		second.Provider = a.prov
		b := newHost(t, net, addrB)
		s := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 1))}
		s.send(t, a.conn(addrB), 10)
		time.Sleep(time.Second)
		if !slices.Equal(first.opened, []netip.Addr{addrA}) {
			t.Fatalf("opened %v", first.opened)
		}
		s.send(t, a.conn(addrB), 10)
		a.unplug()
		a.plug()
		s.send(t, a.conn(addrB), 10)
		eventually(t, "everything arrives", time.Minute, func() bool { return b.sink.len() == s.sent })
		checkStreams(t, b.sink.take(), s)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		d, err := a.reg.Await(ctx, addrA)
		if err != nil || d.Gone() {
			t.Errorf("await of an address that has a device: %v", err)
		} else {
			d.Put()
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

type hostProvider struct {
	verbs.Provider
	opened []netip.Addr
}

func (p *hostProvider) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err == nil {
		p.opened = append(p.opened, a)
	}
	return d, err
}
