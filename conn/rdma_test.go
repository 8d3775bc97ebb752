package conn

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
)

const rwAccess = verbs.AccessLocalWrite | verbs.AccessRemoteRead | verbs.AccessRemoteWrite | verbs.AccessRemoteAtomic

// region is registered memory of a host.
type region struct {
	*Mapping
	mem []byte
}

func (h *host) region(n int) *region {
	h.t.Helper()
	mem := make([]byte, n)
	m, err := h.m.Register(context.Background(), h.addr, mem, 0x10, rwAccess)
	if err != nil {
		h.t.Fatal(err)
	}
	return &region{m, mem}
}

// free gives regions back and waits for it.
func free(rs ...*region) {
	var wg sync.WaitGroup
	for _, r := range rs {
		wg.Add(1)
		r.Release(true, func(error) { wg.Done() })
	}
	wg.Wait()
}

func (r *region) sge(off, n int) verbs.SGE {
	return verbs.SGE{Addr: r.IOVA() + uint64(off), Length: uint32(n), LKey: r.LKey()}
}

// opOwner keeps the statuses an operation was told, which must be one.
type opOwner struct {
	mu   sync.Mutex
	got  []RDMAStatus
	at   time.Time
	then func()
}

func (o *opOwner) RDMADone(s RDMAStatus) {
	o.mu.Lock()
	o.got, o.at = append(o.got, s), time.Now()
	o.mu.Unlock()
	if o.then != nil {
		o.then()
	}
}

func (o *opOwner) done() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.got) > 0
}

func (o *opOwner) want(t testing.TB, what string, s RDMAStatus) {
	t.Helper()
	eventually(t, what, time.Minute, o.done)
	time.Sleep(10 * time.Millisecond)
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.got) != 1 || o.got[0] != s {
		t.Errorf("%s: told %v, want %v once", what, o.got, s)
	}
}

// rdma makes an operation of local memory on the whole of remote.
func rdma(op verbs.SendOpcode, local, remote *region, pieces int) (*RDMA, *opOwner) {
	o := new(opOwner)
	r := &RDMA{Opcode: op, Device: local.Device(), RKey: remote.RKey(), RemoteAddr: remote.IOVA(), Owner: o}
	for i := range pieces {
		from, to := i*len(local.mem)/pieces, (i+1)*len(local.mem)/pieces
		r.SGs = append(r.SGs, local.sge(from, to-from))
	}
	return r, o
}

func dialects(t *testing.T, fn func(t *testing.T, mod func(*hostOptions))) {
	for name, d := range map[string]Dialect{"open": DialectOpen, "kernel": DialectKernelOnly} {
		t.Run(name, func(t *testing.T) { fn(t, func(o *hostOptions) { o.cfg.Dialect = d }) })
	}
}

var quietNet = simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}}

// TestRDMA: operations of all sizes and shapes, in the midst of messages. When a message arrives its operation has been
// executed, and its header names the key.
func TestRDMA(t *testing.T) {
	for _, c := range []struct{ size, pieces, payload int }{
		{1, 1, 8}, {8, 1, 0}, {4096, 1, 64}, {5000, 3, 9000}, {1 << 20, 1, 100}, {1 << 20, 256, 100}, {100000, 20, 70000}, {456, 456, 8},
	} {
		for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead} {
			t.Run(fmt.Sprintf("%v/%dx%d+%d", op, c.size, c.pieces, c.payload), func(t *testing.T) {
				dialects(t, func(t *testing.T, mod func(*hostOptions)) {
					bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
						a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
						local, remote := a.region(c.size), b.region(c.size)
						want := pattern(make([]byte, c.size), 9, 9)
						src, dst := local, remote
						if op == verbs.OpRead {
							src, dst = remote, local
						}
						copy(src.mem, want)
						r, done := rdma(op, local, remote, c.pieces)
						var owner testOwner
						ca := a.conn(addrB)
						early := false
						b.sink.accept = func(_ *Conn, m *Incoming) bool {
							if m.DstPort == 2 && op == verbs.OpWrite && !bytes.Equal(dst.mem, want) {
								early = true
							}
							return true
						}
						for i := range 5 {
							if err := ca.Send(&owner, 1, 1, payload(1, uint64(i), 100)); err != nil {
								t.Fatal(err)
							}
						}
						if err := ca.SendExtra(&owner, 1, 2, payload(2, 0, c.payload), 0, &Extra{RDMA: r}); err != nil {
							t.Fatal(err)
						}
						for i := range 5 {
							if err := ca.Send(&owner, 1, 3, payload(3, uint64(i), 100)); err != nil {
								t.Fatal(err)
							}
						}
						done.want(t, "the operation succeeds", RDMASuccess)
						eventually(t, "all messages arrive", time.Minute, func() bool { return b.sink.len() == 11 })
						if early {
							t.Error("the message was there before its WRITE")
						}
						if !bytes.Equal(dst.mem, want) {
							t.Error("wrong bytes")
						}
						for i, m := range b.sink.take() {
							port := uint16(1)
							if i > 4 {
								port++
							}
							if i > 5 {
								port++
							}
							if m.dport != port {
								t.Fatalf("message %d is to port %d", i, m.dport)
							}
							if used := port == 2; m.ext.HasUsed != used || used && m.ext.Used != remote.RKey() || m.ext.Cookie != 0 {
								t.Errorf("message to port %d has extensions %+v", port, m.ext)
							}
							if port == 2 && !bytes.Equal(m.data, payload(2, 0, c.payload)) {
								t.Error("wrong payload")
							}
						}
						eventually(t, "all is acknowledged", time.Minute, func() bool { n, _ := owner.get(); return n == 11 })
						st := a.m.Stats()
						if st.SendRDMA != 1 || st.SendRDMABytes+st.RecvRDMABytes != uint64(c.size) || (st.SendRDMABytes > 0) != (op == verbs.OpWrite) {
							t.Errorf("counters: %d operations, %d and %d bytes", st.SendRDMA, st.SendRDMABytes, st.RecvRDMABytes)
						}
						free(local, remote)
						a.close(time.Second)
						b.close(time.Second)
					})
				})
			})
		}
	}
}

// TestRDMAFence: the message of a READ waits for its data, unless it is told not to.
func TestRDMAFence(t *testing.T) {
	for _, noFence := range []bool{false, true} {
		t.Run(fmt.Sprintf("noFence=%v", noFence), func(t *testing.T) {
			dialects(t, func(t *testing.T, mod func(*hostOptions)) {
				bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
					a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
					local, remote := a.region(100000), b.region(100000)
					r, done := rdma(verbs.OpRead, local, remote, 1)
					r.NoFence = noFence
					var arrived time.Time
					b.sink.accept = func(*Conn, *Incoming) bool { arrived = time.Now(); return true }
					if err := a.conn(addrB).WaitUp(context.Background(), nil); err != nil {
						t.Fatal(err)
					}
					var owner testOwner
					if err := a.conn(addrB).SendExtra(&owner, 1, 2, []byte("read it"), 0, &Extra{RDMA: r}); err != nil {
						t.Fatal(err)
					}
					done.want(t, "the READ succeeds", RDMASuccess)
					eventually(t, "the message arrives", time.Minute, func() bool { return b.sink.len() == 1 })
					if before := arrived.Before(done.at); before != noFence {
						t.Errorf("message at %v, data at %v", arrived, done.at)
					}
					free(local, remote)
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		})
	}
}

func TestRDMAAtomics(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			local, remote := a.region(8), b.region(8)
			word := func(r *region) uint64 { return binary.NativeEndian.Uint64(r.mem) }
			binary.NativeEndian.PutUint64(remote.mem, 40)
			for i, c := range []struct {
				op            verbs.SendOpcode
				add, swap     uint64
				before, after uint64
			}{
				{verbs.OpFetchAdd, 2, 0, 40, 42},
				{verbs.OpCompareSwap, 42, 7, 42, 7},
				{verbs.OpCompareSwap, 42, 8, 7, 7},
				{verbs.OpFetchAdd, ^uint64(0), 0, 7, 6},
			} {
				r, done := rdma(c.op, local, remote, 1)
				r.CompareAdd, r.Swap = c.add, c.swap
				var owner testOwner
				if err := a.conn(addrB).SendExtra(&owner, 1, 2, []byte("atomic"), 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
				done.want(t, "the atomic succeeds", RDMASuccess)
				if word(local) != c.before || word(remote) != c.after {
					t.Errorf("%d: %v brought %d and left %d, want %d and %d", i, c.op, word(local), word(remote), c.before, c.after)
				}
			}
			eventually(t, "the messages arrive", time.Minute, func() bool { return b.sink.len() == 4 })
			for _, m := range b.sink.take() {
				if m.ext != (Ext{}) {
					t.Errorf("the message of an atomic has extensions %+v", m.ext)
				}
			}
			if st := a.m.Stats(); st.IBAtomicCswp != 2 || st.IBAtomicFadd != 2 {
				t.Errorf("counters: %d, %d", st.IBAtomicCswp, st.IBAtomicFadd)
			}
			free(local, remote)
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// TestRDMASilent: an operation alone sends nothing, completes by itself, and takes a sequence.
func TestRDMASilent(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			local, remote := a.region(10000), b.region(10000)
			pattern(local.mem, 1, 1)
			c := a.conn(addrB)
			var owner testOwner
			for i := range 100 {
				r, done := rdma(verbs.OpWrite, local, remote, 1)
				r.Silent = true
				if err := c.SendExtra(&owner, 1, 2, nil, 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
				if i%10 == 9 {
					done.want(t, "the WRITE succeeds", RDMASuccess)
				}
			}
			if !bytes.Equal(local.mem, remote.mem) {
				t.Error("wrong bytes")
			}
			if n, _ := owner.get(); n != 100 || b.sink.len() != 0 {
				t.Errorf("%d of 100 messages over, %d arrived", n, b.sink.len())
			}
			if in := c.Info(); in.QueuedMsgs != 0 {
				t.Errorf("%d messages are queued still", in.QueuedMsgs)
			}
			// One with a payload is a message.
			r, done := rdma(verbs.OpWrite, local, remote, 1)
			r.Silent = true
			if err := c.SendExtra(&owner, 1, 2, []byte("x"), 0, &Extra{RDMA: r}); err != nil {
				t.Fatal(err)
			}
			done.want(t, "the WRITE succeeds", RDMASuccess)
			eventually(t, "the message arrives", time.Minute, func() bool { return b.sink.len() == 1 })
			eventually(t, "and is acknowledged", time.Minute, func() bool { n, _ := owner.get(); return n == 101 })
			free(local, remote)
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// TestRDMARemoteError: a key that the peer does not know ends the connection. The operation says so, its message is not
// sent, all others arrive once.
func TestRDMARemoteError(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			local, remote := a.region(100), b.region(100)
			c := a.conn(addrB)
			st := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 2))}
			var owner testOwner
			var dones []*opOwner
			for i := range 9 {
				st.send(t, c, 20)
				r, done := rdma([]verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd}[i%3], local, remote, 1)
				r.RKey ^= 1
				if r.Opcode == verbs.OpFetchAdd {
					r.SGs[0].Length = 8
				}
				if err := c.SendExtra(&owner, 1, 2, []byte("never"), 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
				dones = append(dones, done)
				if i < 6 {
					done.want(t, "the key is refused", RDMARemoteError)
				}
			}
			st.send(t, c, 20)
			eventually(t, "everything arrives", time.Minute, func() bool { return b.sink.len() == st.sent })
			for i, d := range dones {
				eventually(t, "every operation ends", time.Minute, d.done)
				if d.got[0] != RDMARemoteError && (d.got[0] != RDMADropped || i < 7) || len(d.got) != 1 {
					t.Errorf("operation %d ended with %v", i, d.got)
				}
			}
			checkStreams(t, b.sink.take(), st)
			eventually(t, "its message is over", time.Minute, func() bool { n, _ := owner.get(); return n == 9 })
			free(local, remote)
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// TestRDMARefused: what the device does not take fails alone: the connection stays, the queue goes on (rds-protocol spec 8.1,
// P15).
func TestRDMARefused(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			local, remote, other := a.region(100), b.region(100), b.region(8)
			c := a.conn(addrB)
			st := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 2))}
			var owner testOwner
			for name, spoil := range map[string]func(*RDMA){
				"no such operation":      func(r *RDMA) { r.Opcode = 77 },
				"atomic on 100 bytes":    func(r *RDMA) { r.Opcode = verbs.OpFetchAdd },
				"keys of another device": func(r *RDMA) { r.Device, r.SGs = other.Device(), []verbs.SGE{other.sge(0, 8)} },
				"a part of it is refused": func(r *RDMA) {
					r.SGs = append(slices8(r.SGs[0]), verbs.SGE{Length: 1 << 31, LKey: local.LKey()}, verbs.SGE{Length: 1 << 31, LKey: local.LKey()})
				},
			} {
				st.send(t, c, 20)
				r, done := rdma(verbs.OpWrite, local, remote, 1)
				spoil(r)
				if err := c.SendExtra(&owner, 1, 2, []byte("never"), 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
				st.send(t, c, 20)
				done.want(t, name, RDMAOther)
			}
			eventually(t, "everything arrives", time.Minute, func() bool { return b.sink.len() == st.sent })
			checkStreams(t, b.sink.take(), st)
			if n, _ := owner.get(); n != 4 {
				t.Errorf("%d of 4 messages are over", n)
			}
			if st := a.m.Stats(); st.ConnReset != 0 || st.RDMAOtherErrors != 4 {
				t.Errorf("%d resets, %d errors", st.ConnReset, st.RDMAOtherErrors)
			}
			r, _ := rdma(verbs.OpWrite, local, remote, 1)
			r.SGs = make([]verbs.SGE, 457)
			if err := c.SendExtra(&owner, 1, 2, nil, 0, &Extra{RDMA: r}); err != ErrTooManyPieces {
				t.Errorf("457 pieces: %v", err)
			}
			free(local, remote, other)
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// slices8 is a full request of one-byte pieces.
func slices8(s verbs.SGE) []verbs.SGE {
	var out []verbs.SGE
	for i := range uint64(8) {
		out = append(out, verbs.SGE{Addr: s.Addr + i, Length: 1, LKey: s.LKey})
	}
	return out
}

// TestRDMAReconnect: the peer falls silent in the middle of an operation. What was posted is dropped and its message never
// sent; what was not goes out on the next connection, and so does all else, once.
func TestRDMAReconnect(t *testing.T) {
	for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd} {
		t.Run(op.String(), func(t *testing.T) {
			dialects(t, func(t *testing.T, mod func(*hostOptions)) {
				bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
					a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
					size := 1 << 20
					if op == verbs.OpFetchAdd {
						size = 8
					}
					local, remote := a.region(size), b.region(size)
					c := a.conn(addrB)
					st := &stream{port: 4001, rng: rand.New(rand.NewPCG(1, 2))}
					st.send(t, c, 1)
					eventually(t, "the connection is up", time.Minute, func() bool { return b.sink.len() == 1 })
					var owner testOwner
					var dones []*opOwner
					post := func() {
						r, done := rdma(op, local, remote, 1)
						dones = append(dones, done)
						if err := c.SendExtra(&owner, 1, 2, []byte("reply"), 0, &Extra{RDMA: r}); err != nil {
							t.Fatal(err)
						}
						st.send(t, c, 3)
					}
					post()
					net.Partition(addrA, addrB)
					for range 3 * 64 { // more than the ring takes
						post()
					}
					eventually(t, "the peer is given up", time.Minute, func() bool { return c.State() != Up })
					posted := 0
					for _, d := range dones {
						if d.done() {
							posted++
						}
					}
					net.Heal(addrA, addrB)
					eventually(t, "every operation ends", 10*time.Minute, func() bool {
						for _, d := range dones {
							if !d.done() {
								return false
							}
						}
						return true
					})
					eventually(t, "every message ends", time.Minute, func() bool { n, _ := owner.get(); return n == len(dones) })
					ok, dropped := 0, 0
					for _, d := range dones {
						if len(d.got) != 1 {
							t.Fatalf("an operation was told %v", d.got)
						}
						switch d.got[0] {
						case RDMASuccess:
							ok++
						case RDMADropped:
							dropped++
						default:
							t.Errorf("an operation ended with %v", d.got[0])
						}
					}
					if dropped == 0 || ok == 0 || dropped > posted {
						t.Errorf("%d operations dropped, %d succeeded, %d were posted when the peer was given up", dropped, ok, posted)
					}
					var plain []gotMsg
					replies := 0
					eventually(t, "all else arrives", time.Minute, func() bool { return b.sink.len() >= st.sent+ok })
					for _, m := range b.sink.take() {
						if m.dport == 2 {
							replies++
						} else {
							plain = append(plain, m)
						}
					}
					if replies != ok {
						t.Errorf("%d messages of %d operations that succeeded", replies, ok)
					}
					checkStreams(t, plain, st)
					if op == verbs.OpFetchAdd {
						if sum := binary.NativeEndian.Uint64(remote.mem); sum != 0 {
							t.Errorf("sum %d of zeroes", sum)
						}
					}
					free(local, remote)
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		})
	}
}

// TestRDMACancel: what was not posted is taken back, what was goes on to its end.
func TestRDMACancel(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			local, remote := a.region(1<<20), b.region(1<<20)
			c := a.conn(addrB)
			if err := c.WaitUp(context.Background(), nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			net.Partition(addrA, addrB)
			var owner testOwner
			var dones []*opOwner
			for range 300 {
				r, done := rdma(verbs.OpWrite, local, remote, 1)
				dones = append(dones, done)
				if err := c.SendExtra(&owner, 1, 2, []byte("x"), 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Millisecond)
			if n := c.Cancel(&owner, 2); n != 300 {
				t.Errorf("%d messages cancelled", n)
			}
			if n, _ := owner.get(); n != 300 {
				t.Errorf("%d messages released", n)
			}
			posted := 0
			for _, d := range dones {
				if !d.done() {
					posted++
				} else if d.got[0] != RDMACancelled {
					t.Errorf("an operation ended with %v", d.got)
				}
			}
			if posted == 0 || posted == 300 {
				t.Fatalf("%d of 300 operations were posted", posted)
			}
			net.Heal(addrA, addrB)
			eventually(t, "all end", time.Minute, func() bool {
				for _, d := range dones {
					if !d.done() {
						return false
					}
				}
				return true
			})
			time.Sleep(time.Minute)
			for _, d := range dones {
				if len(d.got) != 1 || d.got[0] != RDMACancelled && d.got[0] != RDMASuccess {
					t.Errorf("an operation was told %v", d.got)
				}
			}
			if in := c.Info(); in.QueuedMsgs != 0 {
				t.Errorf("%d messages are queued still", in.QueuedMsgs)
			}
			free(local, remote)
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// TestRDMAClose: a Manager that closes ends what is queued and what is in flight.
func TestRDMAClose(t *testing.T) {
	bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		local, remote := a.region(1<<20), b.region(1<<20)
		c := a.conn(addrB)
		if err := c.WaitUp(context.Background(), nil); err != nil {
			t.Fatal(err)
		}
		net.Partition(addrA, addrB)
		var owner testOwner
		var dones []*opOwner
		var wg sync.WaitGroup
		wg.Add(1)
		for range 100 {
			r, done := rdma(verbs.OpRead, local, remote, 1)
			dones = append(dones, done)
			if err := c.SendExtra(&owner, 1, 2, nil, 0, &Extra{RDMA: r}); err != nil {
				t.Fatal(err)
			}
		}
		dones[99].then = func() { local.Release(true, func(error) { wg.Done() }) } // as a socket's region does
		if n := a.close(time.Second); n != 100-1 && n > 100 {
			t.Errorf("%d messages abandoned", n)
		}
		wg.Wait()
		if n, _ := owner.get(); n != 100 {
			t.Errorf("%d messages released", n)
		}
		for _, d := range dones {
			if len(d.got) != 1 || d.got[0] != RDMADropped {
				t.Errorf("an operation was told %v", d.got)
			}
		}
		free(remote)
		b.close(time.Second)
	})
}

// TestRDMAFaults: operations and messages in both directions over bad networks and links that break. Every operation
// is told once; the message of each that succeeded arrives once, no message of another does, unless it had
// arrived before the link broke; and the sum of the additions says that none was executed twice.
func TestRDMAFaults(t *testing.T) {
	delay := 50 * time.Microsecond
	for name, link := range map[string]simnet.LinkConfig{
		"loss":             {Delay: delay, Loss: 0.03},
		"everything":       {Delay: delay, Jitter: delay, Loss: 0.02, Dup: 0.02, Corrupt: 0.02, Reorder: 0.02},
		"late completions": {Delay: delay},
	} {
		t.Run(name, func(t *testing.T) {
			dialects(t, func(t *testing.T, mod func(*hostOptions)) {
				bubble(t, 11, simnet.Config{Link: link}, func(t *testing.T, net *simnet.Net) {
					var faults faultverbs.Faults
					if link.Loss == 0 {
						faults.DelayCompletions(300 * time.Microsecond)
						faults.ShuffleCompletions(7)
					}
					a := newHost(t, net, addrA, mod, func(o *hostOptions) {
						o.wrap = func(p verbs.Provider) verbs.Provider { return faultverbs.Wrap(p, &faults) }
					})
					b := newHost(t, net, addrB, mod)
					local, remote := a.region(8), b.region(8)
					big, bigRemote := a.region(100000), b.region(100000)
					c := a.conn(addrB)
					rng := rand.New(rand.NewPCG(3, 4))
					s1, s2 := &stream{port: 4001, rng: rng}, &stream{port: 4002, rng: rng}
					var owner testOwner
					dones := make(map[uint64]*opOwner)
					adds := make(map[uint64]bool)
					for i := range uint64(200) {
						s1.send(t, c, rng.IntN(3))
						s2.send(t, b.conn(addrA), rng.IntN(3))
						op := []verbs.SendOpcode{verbs.OpFetchAdd, verbs.OpWrite, verbs.OpRead}[rng.IntN(3)]
						l, r := big, bigRemote
						if op == verbs.OpFetchAdd {
							l, r = local, remote
							adds[i] = true
						}
						x, done := rdma(op, l, r, 1)
						x.CompareAdd = 1
						dones[i] = done
						if err := c.SendExtra(&owner, 1, 2, payload(2, i, 8+rng.IntN(5000)), 0, &Extra{RDMA: x}); err != nil {
							t.Fatal(err)
						}
						time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
						if i%40 == 39 {
							c.failLink(fmt.Errorf("the test's"))
						}
					}
					eventually(t, "every operation ends", 10*time.Minute, func() bool {
						for _, d := range dones {
							if !d.done() {
								return false
							}
						}
						return true
					})
					eventually(t, "every message ends", 10*time.Minute, func() bool {
						n, _ := owner.get()
						n1, _ := s1.owner.get()
						n2, _ := s2.owner.get()
						return n == len(dones) && n1 == s1.sent && n2 == s2.sent
					})
					sum := binary.NativeEndian.Uint64(remote.mem)
					ok, unsure := uint64(0), uint64(0)
					for i, d := range dones {
						switch {
						case len(d.got) != 1:
							t.Fatalf("operation %d was told %v", i, d.got)
						case d.got[0] != RDMASuccess && d.got[0] != RDMADropped:
							t.Errorf("operation %d ended with %v", i, d.got[0])
						case !adds[i]:
						case d.got[0] == RDMASuccess:
							ok++
						default:
							unsure++
						}
					}
					if sum < ok || sum > ok+unsure {
						t.Errorf("%d additions executed, %d succeeded, %d more may have been", sum, ok, unsure)
					}
					var plain []gotMsg
					last, replies := uint64(0), make(map[uint64]bool)
					for _, m := range b.sink.take() {
						if m.dport != 2 {
							plain = append(plain, m)
							continue
						}
						n := binary.BigEndian.Uint64(m.data)
						if n < last || replies[n] || !bytes.Equal(m.data, payload(2, n, len(m.data))) {
							t.Errorf("message %d after %d, or twice, or changed", n, last)
						}
						last, replies[n] = n, true
					}
					for i, d := range dones {
						if d.got[0] == RDMASuccess && !replies[i] {
							t.Errorf("operation %d succeeded and its message did not arrive", i)
						}
					}
					checkStreams(t, plain, s1)
					checkStreams(t, a.sink.take(), s2)
					t.Logf("%d additions of %d, %d unsure; %d resets, %d dropped", sum, len(adds), unsure, a.m.Stats().ConnReset, a.m.Stats().RDMADropped)
					free(local, remote, big, bigRemote)
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		})
	}
}

// TestCookie: a cookie is in the header of its message, wherever it is packed, and of no other.
func TestCookie(t *testing.T) {
	dialects(t, func(t *testing.T, mod func(*hostOptions)) {
		bubble(t, 1, quietNet, func(t *testing.T, net *simnet.Net) {
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			c := a.conn(addrB)
			var owner testOwner
			sizes := []int{8, 8, 9, 64, 4096, 5000, 70000, 200000, 8, 8}
			for i := range uint64(100) {
				var x *Extra
				if i%3 == 0 {
					x = &Extra{Cookie: 0x1000_0000_2000 + i<<32 + i}
				}
				flags := SendFlags(0)
				if i%5 == 0 {
					flags = AckNow
				}
				if err := c.SendExtra(&owner, 1, 2, payload(2, i, sizes[i%10]), flags|More, x); err != nil {
					t.Fatal(err)
				}
				if i == 70 {
					c.Flush()
					eventually(t, "some arrive", time.Minute, func() bool { return b.sink.len() > 10 })
					c.failLink(fmt.Errorf("the test's"))
				}
			}
			c.Flush()
			eventually(t, "all arrive", time.Minute, func() bool { return b.sink.len() == 100 })
			for i, m := range b.sink.take() {
				want := Ext{}
				if i%3 == 0 {
					want.Cookie = 0x1000_0000_2000 + uint64(i)<<32 + uint64(i)
				}
				if m.ext != want || !bytes.Equal(m.data, payload(2, uint64(i), sizes[i%10])) {
					t.Fatalf("message %d has %+v, want %+v", i, m.ext, want)
				}
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	})
}

// TestRDMAProviderFaults fails the nth post, for each n until nothing fails: every operation is told once, every message
// ends, nothing is left.
func TestRDMAProviderFaults(t *testing.T) {
	for n := 1; ; n++ {
		unused := 0
		bubble(t, uint64(n), quietNet, func(t *testing.T, net *simnet.Net) {
			var faults faultverbs.Faults
			a := newHost(t, net, addrA, func(o *hostOptions) {
				o.wrap = func(p verbs.Provider) verbs.Provider { return faultverbs.Wrap(p, &faults) }
			})
			b := newHost(t, net, addrB)
			local, remote := a.region(30000), b.region(30000)
			c := a.conn(addrB)
			faults.Fail(faultverbs.PostSend, n, []error{verbs.ErrSQFull, verbs.ErrInvalid}[n%2])
			var owner testOwner
			var dones []*opOwner
			for i := range 6 {
				r, done := rdma([]verbs.SendOpcode{verbs.OpWrite, verbs.OpRead}[i%2], local, remote, 1+9*(i%3))
				r.Silent = i == 2
				dones = append(dones, done)
				data := []byte("reply")
				if r.Silent {
					data = nil
				}
				if err := c.SendExtra(&owner, 1, 2, data, 0, &Extra{RDMA: r}); err != nil {
					t.Fatal(err)
				}
				if err := c.Send(&owner, 1, 3, []byte("plain")); err != nil {
					t.Fatal(err)
				}
				time.Sleep(200 * time.Microsecond)
			}
			eventually(t, "every message ends", 10*time.Minute, func() bool { m, _ := owner.get(); return m == 12 })
			time.Sleep(time.Second)
			ok := 0
			for i, d := range dones {
				if len(d.got) != 1 {
					t.Fatalf("n=%d: operation %d was told %v", n, i, d.got)
				}
				if d.got[0] == RDMASuccess {
					ok++
				}
			}
			if ok < 3 {
				t.Errorf("n=%d: %d of 6 operations succeeded", n, ok)
			}
			plain := 0
			for _, m := range b.sink.take() {
				if m.dport == 3 {
					plain++
				}
			}
			if plain != 6 {
				t.Errorf("n=%d: %d of 6 plain messages arrived", n, plain)
			}
			unused = faults.Clear()
			free(local, remote)
			a.close(time.Second)
			b.close(time.Second)
		})
		if unused > 0 || t.Failed() {
			return
		}
	}
}

// TestExtHostile: whatever a peer puts into the extension area does no harm.
func TestExtHostile(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	s := rxScratch{conn: new(Conn)}
	for range 20000 {
		h := make(rdshdr.Header, rdshdr.HeaderLen)
		for i := range h.Ext() {
			h.Ext()[i] = byte(rng.Uint32N(12))
			if rng.IntN(8) == 0 {
				h.Ext()[i] = byte(rng.Uint32())
			}
		}
		x := s.ext(h)
		if d := h.FindExt(rdshdr.ExtRDMADest); (d != nil && x == nil) && binary.BigEndian.Uint64(d) != 0 {
			t.Fatalf("%x: nothing", h.Ext())
		}
		s.exts = s.exts[:0]
	}
}
