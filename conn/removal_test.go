package conn

import (
	"context"
	"encoding/binary"
	"errors"
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
		if s.IBTxCQEvent == 0 || s.IBRxCQEvent == 0 {
			t.Error("running totals went with the device")
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

// opsHost is a host with memory for operations, registered anew with each device of its address.
type opsHost struct {
	*host
	cur  *opsRegion
	all  []*opsRegion // by number
	used int          // slots of cur
}

// opsRegion is a region of slots. Each is the object of one operation.
type opsRegion struct {
	num     int
	m       *Mapping
	mem     []byte
	release sync.WaitGroup
}

const (
	opSlots = 128
	opSlot  = 3000
	opPort  = 5000
)

func (r *opsRegion) slot(i int) []byte { return r.mem[i*opSlot : (i+1)*opSlot] }

// region is one with room for another slot, nil if there is no device to have it on. What is given up is given back, with the device
// still there or gone.
func (h *opsHost) region() *opsRegion {
	if r := h.cur; r != nil && (r.m.Device().Gone() || h.used == opSlots) {
		h.give()
	}
	if h.cur == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		r := &opsRegion{num: len(h.all), mem: make([]byte, opSlots*opSlot)}
		var err error
		if r.m, err = h.m.Register(ctx, h.addr, r.mem, 0, rwAccess); err != nil {
			return nil
		}
		for i := range opSlots {
			pattern(r.slot(i), uint16(r.num), uint64(i)|1<<40) // what a READ of it finds
		}
		r.release.Add(1)
		h.cur, h.all, h.used = r, append(h.all, r), 0
	}
	h.used++
	return h.cur
}

func (h *opsHost) give() {
	if r := h.cur; r != nil {
		h.cur = nil
		r.m.Release(true, func(error) { r.release.Done() })
	}
}

// TestRemovalWithOperations removes devices under READs and WRITEs from and to regions on them, both in use by operations and not.
// Each operation is told of once; a message that arrives finds its operation executed, and one whose operation is said to have
// succeeded arrives; messages without one arrive once and in order; and no device is kept by what was left on it.
func TestRemovalWithOperations(t *testing.T) {
	type key struct{ region, slot int }
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, seed, simnet.Config{SendBuffer: 256 << 10, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, RateBytesPerSec: 1 << 30}}, func(t *testing.T, net *simnet.Net) {
				a, b := &opsHost{host: newHost(t, net, addrA)}, &opsHost{host: newHost(t, net, addrB)}
				a.sink.hold, b.sink.hold = true, true
				var mu sync.Mutex // of what both sides' handlers note
				wrote := map[key]func() error{}
				arrived := map[uint64]int{}
				b.sink.accept = func(_ *Conn, m *Incoming) bool {
					if m.DstPort == opPort {
						n := binary.BigEndian.Uint64(m.First.Data)
						mu.Lock()
						arrived[n]++
						check := wrote[key{int(n >> 32), int(n & 0xffff)}]
						mu.Unlock()
						if err := check(); err != nil {
							t.Errorf("message of operation %#x: %v", n, err)
						}
					}
					return true
				}
				rng := rand.New(rand.NewPCG(seed, 13))
				plain := &stream{port: 4001, rng: rng}
				type started struct {
					n     uint64
					owner *opOwner
					read  []byte // where a READ puts it
					want  []byte
				}
				var ops []started
				c := a.conn(addrB)
				var opMsgs testOwner
				for round := range 150 {
					plain.send(t, c, rng.IntN(6))
					for range rng.IntN(6) {
						local, remote := a.region(), b.region()
						if local == nil || remote == nil {
							continue
						}
						i, k := a.used-1, b.used-1
						n := uint64(remote.num)<<32 | uint64(k)
						st := started{n: n, owner: new(opOwner)}
						op := verbs.OpWrite
						check := func() error { return nil }
						if rng.IntN(2) == 0 {
							op = verbs.OpRead
							st.read, st.want = local.slot(i), slices.Clone(remote.slot(k))
						} else {
							pattern(local.slot(i), 7, n)
							want := slices.Clone(local.slot(i))
							check = func() error {
								if !slices.Equal(remote.slot(k), want) {
									return errors.New("it has not been executed")
								}
								return nil
							}
						}
						mu.Lock()
						wrote[key{remote.num, k}] = check
						mu.Unlock()
						r := &RDMA{Opcode: op, Device: local.m.Device(), RKey: remote.m.RKey(), RemoteAddr: uint64(k * opSlot), Owner: st.owner,
							SGs: []verbs.SGE{{Addr: uint64(i * opSlot), Length: opSlot, LKey: local.m.LKey()}}}
						if err := c.SendExtra(&opMsgs, opPort, opPort, payload(1, n, 100), 0, &Extra{RDMA: r}); errors.Is(err, verbs.ErrDeviceGone) {
							continue // since it was registered
						} else if err != nil {
							t.Fatal(err)
						}
						ops = append(ops, st)
					}
					time.Sleep(time.Duration(rng.IntN(2500)) * time.Microsecond)
					switch rng.IntN(24) {
					case 0:
						a.unplug()
					case 1:
						b.unplug()
					case 2:
						a.unplug()
						b.unplug()
					case 3:
						a.give()
					default:
						continue
					}
					if rng.IntN(2) == 0 {
						time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
					}
					a.plug()
					b.plug()
					if round%8 == 0 {
						a.sink.releaseAll()
						b.sink.releaseAll()
					}
				}
				eventually(t, "everything is acknowledged", time.Minute, func() bool { n, _ := plain.owner.get(); return n == plain.sent })
				var count [RDMAOther + 1]int
				for i := range ops {
					o := &ops[i]
					eventually(t, "an operation has ended", time.Minute, o.owner.done)
				}
				eventually(t, "messages of operations leave the queue", time.Minute, func() bool { n, _ := opMsgs.get(); return n == len(ops) })
				a.give()
				b.give()
				for _, h := range []*opsHost{a, b} {
					for _, r := range h.all {
						r.release.Wait() // and the memory is ours again
					}
				}
				for i := range ops {
					o := &ops[i]
					if len(o.owner.got) != 1 {
						t.Fatalf("operation %#x was told of %d times", o.n, len(o.owner.got))
					}
					s := o.owner.got[0]
					count[s]++
					if s == RDMASuccess && o.read != nil && !slices.Equal(o.read, o.want) {
						t.Errorf("READ %#x brought something else", o.n)
					}
					if k := arrived[o.n]; k > 1 || s == RDMASuccess && k != 1 {
						t.Errorf("operation %#x, %v: its message arrived %d times", o.n, s, k)
					}
				}
				var rest []gotMsg
				for _, m := range b.sink.take() {
					if m.dport != opPort {
						rest = append(rest, m)
					}
				}
				checkStreams(t, rest, plain)
				if count[RDMASuccess] < 20 || count[RDMADropped]+count[RDMAOther]+count[RDMARemoteError] < 3 || a.m.Stats().DevicesLost < 3 {
					t.Errorf("by status: %v; devices lost: %d: the test tests little", count, a.m.Stats().DevicesLost)
				}
				t.Logf("%d operations, by status %v; %d regions; devices lost %d, %d", len(ops), count, len(a.all)+len(b.all), a.m.Stats().DevicesLost, b.m.Stats().DevicesLost)
				a.close(time.Second)
				b.close(time.Second)
			})
		})
	}
}
