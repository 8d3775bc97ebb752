package conn

import (
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
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/internal/wire/roce"
)

// TestMapUpdates compares what connections that look at a map now and then tell their peers with the map itself, and what the peers
// report as cleared with what was.
func TestMapUpdates(t *testing.T) {
	mem, err := slab.New(slab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	m := &Manager{cfg: Config{Slab: mem}}
	rng := rand.New(rand.NewPCG(1, 2))
	s := &site{m: m, stopped: true}
	type viewer struct {
		ver    uint64
		fresh  bool
		deltas bool
		seen   peerMap
		have   map[uint16]bool // a model of seen
	}
	vs := make([]*viewer, 6)
	for i := range vs {
		vs[i] = &viewer{fresh: true, deltas: i > 0, have: make(map[uint16]bool)}
	}
	model := make(map[uint16]bool)
	wholes, deltas, nothing := 0, 0, 0
	for round := range 3000 {
		n := rng.IntN(8)
		if round%200 == 0 {
			n = 2 * mapLog
		}
		for range n {
			port, on := uint16(rng.IntN(300)*37), rng.IntN(2) == 0
			s.setCongested(port, on)
			model[port] = on
		}
		v := vs[rng.IntN(len(vs))]
		if rng.IntN(100) == 0 { // another connection
			v.fresh = true
		}
		u, err := s.mapSince(v.ver, v.fresh, v.deltas)
		if err != nil {
			t.Fatal(err)
		}
		var fell []uint16
		switch {
		case u.chunk == nil:
			nothing++
		case u.len > 0:
			deltas++
			if !v.deltas || v.fresh {
				t.Fatal("a delta to one that cannot take it")
			}
			d := rdshdr.CongDelta(u.chunk.Bytes()[:u.len])
			if !d.Valid() {
				t.Fatalf("delta %x", d)
			}
			fell = v.seen.apply(d, nil)
		default:
			wholes++
			p := u.chunk.Bytes()[:rdshdr.CongMapLen]
			cut := rng.IntN(len(p)) // pieces need not be whole words
			fell = v.seen.replace(p[:cut], []Frag{{Data: p[cut:]}}, nil)
		}
		if u.chunk != nil {
			u.chunk.Put()
		}
		v.ver, v.fresh = u.ver, false
		var want []uint16
		count := 0
		for port, on := range model {
			if v.have[port] && !on {
				want = append(want, port)
			}
			v.have[port] = on
			if on {
				count++
			}
			if v.seen.test(port) != on {
				t.Fatalf("round %d: port %d is %v", round, port, !on)
			}
		}
		slices.Sort(want)
		slices.Sort(fell)
		if !slices.Equal(fell, want) || int(v.seen.count.Load()) != count {
			t.Fatalf("round %d: fell %v, want %v; %d congested, want %d", round, fell, want, v.seen.count.Load(), count)
		}
	}
	if wholes == 0 || deltas < 1000 || nothing == 0 {
		t.Errorf("%d whole maps, %d deltas, %d times nothing", wholes, deltas, nothing)
	}
	fold := uint64(0)
	for port, on := range model {
		if on {
			fold |= 1 << (port % 64)
		}
	}
	if s.crowded.Load() != fold {
		t.Errorf("congested ports modulo 64: %x, want %x", s.crowded.Load(), fold)
	}
	for _, v := range vs {
		if v.seen.count.Load() != int32(len(v.seen.clear())) || v.seen.words.Load() != nil {
			t.Error("clear leaves something, or reports something else")
		}
	}
	s.cong.dropChunks()
	if st := mem.Stats(); st.SmallInUse+st.LargeInUse != 0 {
		t.Errorf("%d chunks left", st.SmallInUse+st.LargeInUse)
	}
}

// TestDeltas changes a map at random, with traffic, resets and several connections of the same pair, on a bad network. In the end the
// peers know it, each port has cleared for them no more often than it did, and whole maps were sent only where a connection
// began, or to peers that take nothing else.
func TestDeltas(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%v/%d", dialect, seed), func(t *testing.T) {
				bubble(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Jitter: 100 * time.Microsecond, Loss: 0.01}}, func(t *testing.T, net *simnet.Net) {
					mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
					a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB)
					rng := rand.New(rand.NewPCG(seed, 7))
					ab := &stream{port: 4001, rng: rng}
					var o testOwner
					var cs []*Conn
					for tos := range uint8(3) {
						c, err := a.m.Get(addrA, addrB, tos)
						if err != nil {
							t.Fatal(err)
						}
						c.Send(&o, 1, 4009, nil)
						cs = append(cs, c)
					}
					eventually(t, "up", 10*time.Second, func() bool { n, _ := o.get(); return n == 3 })
					b.sink.reset()
					a.sink.takeClear()
					cleared := make(map[uint16]int)
					model := make(map[uint16]bool)
					resets := uint64(0)
					for range 300 {
						for range rng.IntN(5) {
							port, on := uint16(rng.IntN(10)*100), rng.IntN(2) == 0
							if model[port] && !on {
								cleared[port]++
							}
							model[port] = on
							b.m.SetCongested(addrB, port, on)
						}
						ab.send(t, cs[0], rng.IntN(3))
						if rng.IntN(50) == 0 {
							resets++
							cs[rng.IntN(3)].failLink(errors.New("test"))
						}
						time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
					}
					eventually(t, "all arrives", time.Minute, func() bool { return b.sink.len() == ab.sent })
					checkStreams(t, b.sink.take(), ab)
					time.Sleep(5 * time.Second)
					for port, on := range model {
						if cs[0].PeerCongested(port) != on {
							t.Errorf("port %d: %v at the peer, %v here", port, on, !on)
						}
					}
					got := make(map[uint16]int)
					for _, p := range a.sink.takeClear() {
						got[p.Port()]++
					}
					for port, n := range got {
						// Three connections tell of it, and may cross.
						if n > 3*cleared[port] {
							t.Errorf("port %d was reported clear %d times, and was %d times", port, n, cleared[port])
						}
					}
					sa, sb := a.m.Stats(), b.m.Stats()
					wholes := sa.CongUpdateReceived - sa.CongDeltaReceived
					if dialect == DialectOpen {
						if sa.CongDeltaReceived < 100 || wholes > sa.Established || sb.CongDeltaSent < sa.CongDeltaReceived {
							t.Errorf("%d deltas of %d, %d whole maps, %d connections", sa.CongDeltaReceived, sb.CongDeltaSent, wholes, sa.Established)
						}
					} else if sa.CongDeltaReceived+sb.CongDeltaSent != 0 || wholes < 100 {
						t.Errorf("to a kernel: %d deltas, %d whole maps", sb.CongDeltaSent, wholes)
					}
					if sa.RecvBadFragment+sb.RecvBadFragment != 0 {
						t.Errorf("%d and %d bad fragments", sa.RecvBadFragment, sb.RecvBadFragment)
					}
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		}
	}
}

// deltaBytes is a SEND with changes to a map.
func deltaBytes(seq uint64, set, cleared []uint16) []byte {
	p := make([]byte, rdshdr.CongDeltaLen(len(set)+len(cleared)))
	rdshdr.PutCongDelta(p, set, cleared)
	return append(header(seq, 0, len(p), 0, 0, rdshdr.FlagCongDelta), p...)
}

func mapBytes(ports ...uint16) []byte {
	var m rdshdr.CongMap
	for _, p := range ports {
		m.Set(p)
	}
	return append(header(0, 0, len(m), 0, 0, rdshdr.FlagCongBitmap), m[:]...)
}

func TestDeltaReceived(t *testing.T) {
	injected(t, func(t *testing.T, x *inject) {
		x.know(true, 5)
		big := payload(1, 1, 100000)
		x.recv(
			mapBytes(5, 6),
			deltaBytes(1, []uint16{7}, []uint16{5}),
			// In a SEND with messages, and in the middle of one.
			run(msgBytes(10, []byte("a"), 0), deltaBytes(2, []uint16{8, 9}, nil), append(header(11, 0, len(big), 9, 10, 0), big[:50000]...)),
			deltaBytes(3, nil, []uint16{8, 6, 4}),
			append(header(11, 0, len(big), 9, 10, 0), big[50000:]...),
		)
		if n := len(x.h.sink.take()); n != 2 || x.dead() {
			t.Fatalf("%d messages, dead %v", n, x.dead())
		}
		for port := range uint16(12) {
			if want := port == 7 || port == 9; x.c.PeerCongested(port) != want {
				t.Errorf("port %d: %v", port, !want)
			}
		}
		if want := []netip.AddrPort{ap(5), ap(8), ap(6)}; !slices.Equal(x.h.sink.clear, want) {
			t.Errorf("reported clear: %v", x.h.sink.clear)
		}
		// A whole map begins anew.
		x.recv(mapBytes(1), deltaBytes(1, nil, []uint16{1}))
		if x.dead() || x.c.peer.cong.count.Load() != 0 {
			t.Errorf("dead %v, %d congested", x.dead(), x.c.peer.cong.count.Load())
		}
	})
}

func ap(port uint16) netip.AddrPort { return netip.AddrPortFrom(addrA, port) }

// A peer whose changes do not follow what it said before is not believed.
func TestDeltaHostile(t *testing.T) {
	delta := deltaBytes(1, []uint16{7}, nil)
	cut := func(size, have int) []byte {
		return append(header(1, 0, size, 0, 0, rdshdr.FlagCongDelta), make([]byte, have)...)
	}
	for name, sends := range map[string][][]byte{
		"no map":               {delta},
		"twice":                {mapBytes(), delta, delta},
		"one left out":         {mapBytes(), deltaBytes(2, nil, nil)},
		"sequence 0":           {mapBytes(), deltaBytes(0, nil, nil)},
		"of another map":       {mapBytes(), delta, mapBytes(), deltaBytes(2, nil, nil)},
		"odd":                  {mapBytes(), cut(3, 3)},
		"more than there is":   {mapBytes(), cut(10, 8)},
		"huge":                 {mapBytes(), cut(1<<31, 10)},
		"too many ports":       {mapBytes(), cut(rdshdr.CongDeltaLen(rdshdr.MaxCongDelta+1), rdshdr.CongDeltaLen(rdshdr.MaxCongDelta+1))},
		"more set than it has": {mapBytes(), append(header(1, 0, 4, 0, 0, rdshdr.FlagCongDelta), 0, 2, 0, 7)},
	} {
		t.Run(name, func(t *testing.T) {
			injected(t, func(t *testing.T, x *inject) {
				x.know(true, 5)
				x.recv(sends[:len(sends)-1]...)
				if len(sends) > 1 && x.dead() {
					t.Fatal("dead too soon")
				}
				x.recv(sends[len(sends)-1])
				if !x.dead() {
					t.Error("the connection lives")
				}
				if s := x.h.m.Stats(); s.RecvBadFragment != 1 {
					t.Errorf("%d bad fragments counted", s.RecvBadFragment)
				}
			})
		})
	}
	// A kernel knows no such thing: an unknown flag is ignored, and it is a message from port 0 to port 0.
	injected(t, func(t *testing.T, x *inject) {
		x.know(false, 0)
		x.recv(append(header(1, 0, 4, 0, 0, rdshdr.FlagCongDelta), 0, 1, 0, 7))
		if x.dead() || x.c.PeerCongested(7) || x.h.sink.len() != 0 {
			t.Errorf("dead %v, congested %v", x.dead(), x.c.PeerCongested(7))
		}
	})
}

// TestSendersFirst: of many connections those whose peers have sent to the port lately hear of its congestion at once, the idle ones
// at their pace; a port that changes all the time reaches these no more often, and in the end all know.
func TestSendersFirst(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		const conns = 3 * pushGroup
		many := func(o *hostOptions) { o.cfg.MaxConnsPerPeer = 256 }
		a, b := newHost(t, net, addrA), newHost(t, net, addrB, many)
		c := newHost(t, net, addrC)
		var o testOwner
		var all []*Conn
		for n := range conns {
			h := []*host{a, c}[n%2]
			x, err := h.m.Get(h.addr, addrB, uint8(n/2))
			if err != nil {
				t.Fatal(err)
			}
			x.Send(&o, 1, 4009, nil)
			all = append(all, x)
		}
		eventually(t, "up", 10*time.Second, func() bool { n, _ := o.get(); return n == conns })
		time.Sleep(10 * time.Second) // forgotten who has sent where
		last := all[conns-1]         // in no place of honour
		last.Send(&o, 1, 4000, nil)
		all[conns-2].Send(&o, 1, 4001, nil)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		before := b.m.Stats()
		b.m.SetCongested(addrB, 4000, true)
		synctest.Wait()
		// What has been sent before time has moved.
		if n := b.m.Stats().CongDeltaSent - before.CongDeltaSent; n < 1 || n > pushGroup+1 {
			t.Errorf("%d connections told at once", n)
		}
		time.Sleep(200 * time.Microsecond) // a network delay, and half of a pause
		if !last.PeerCongested(4000) {
			t.Error("the sender does not know")
		}
		// While it goes on and off, the sender is told each time, the others once a round.
		for n := range 300 {
			b.m.SetCongested(addrB, 4000, n%2 == 1)
			time.Sleep(200 * time.Microsecond)
		}
		time.Sleep(100 * time.Millisecond)
		after := b.m.Stats()
		n := after.CongDeltaSent - before.CongDeltaSent
		// Each change goes to the sender, and begins a round: of one group, since the next one is there before the second's turn.
		if max := uint64(300 * (pushGroup + 1)); n < 300 || n > max+conns {
			t.Errorf("%d deltas for 300 changes to %d connections, at most %d", n, conns, max)
		}
		for _, x := range all {
			if !x.PeerCongested(4000) {
				t.Fatalf("%v does not know", x)
			}
		}
		b.m.SetCongested(addrB, 4000, false)
		time.Sleep(100 * time.Millisecond)
		for _, x := range all {
			if x.PeerCongested(4000) {
				t.Fatalf("%v does not know that it has cleared", x)
			}
		}
		// One that waits for a congested port is among the first however long it waits.
		b.m.SetCongested(addrB, 4001, true)
		time.Sleep(time.Minute)
		x := b.conn(addrA) // type of service 0
		y, err := b.m.Get(addrB, last.local, last.tos)
		if err != nil {
			t.Fatal(err)
		}
		if x.before.Load() != 0 || y.before.Load() != 0 {
			t.Errorf("ports sent to a minute ago: %x, %x", x.before.Load(), y.before.Load())
		}
		if y, err = b.m.Get(addrB, all[conns-2].local, all[conns-2].tos); err != nil || y.before.Load() != 1<<(4001%64) {
			t.Errorf("congested ports sent to a minute ago: %x, %v", y.before.Load(), err)
		}
		for _, h := range []*host{a, b, c} {
			h.close(time.Second)
		}
	})
}

// TestSendersFirstOrder looks at the network: of 150 peers the five that have sent to the port lately hear of its congestion before any of the
// others does, and before any of the others does that it has cleared; each hears of each once.
func TestSendersFirstOrder(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		bubble(t, 3, quick, func(t *testing.T, net *simnet.Net) {
			const conns, recent = 150, 5
			a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.Dialect = dialect })
			b := newHost(t, net, addrB, func(o *hostOptions) { o.cfg.MaxConnsPerPeer = 256 })
			var o testOwner
			var all []*Conn
			for n := range conns {
				x, err := a.m.Get(addrA, addrB, uint8(n))
				if err != nil {
					t.Fatal(err)
				}
				x.Send(&o, 1, 4009, nil)
				all = append(all, x)
			}
			eventually(t, "up", 10*time.Second, func() bool { n, _ := o.get(); return n == conns })
			time.Sleep(10 * time.Second) // forgotten who has sent where
			rand.New(rand.NewPCG(3, 3)).Shuffle(conns, func(i, j int) { all[i], all[j] = all[j], all[i] })
			senders := make(map[uint32]bool)
			for _, x := range all[:recent] {
				x.Send(&o, 1, 4000, nil)
				senders[x.Info().QPN] = true
			}
			time.Sleep(100 * time.Millisecond)

			var mu sync.Mutex
			var told []uint32 // QPs, in order
			maps := make(map[uint32]int)
			net.SetTap(func(e simnet.Event) {
				var p roce.Packet
				if e.Kind != simnet.Sent || e.From.Addr() != addrB || roce.Parse(e.Data, &p) != nil || len(p.Payload) < rdshdr.HeaderLen {
					return
				}
				if f := rdshdr.Header(p.Payload).Flags(); f == rdshdr.FlagCongDelta || f == rdshdr.FlagCongBitmap && p.BTH.Opcode() == roce.RCSendFirst {
					mu.Lock()
					qp := uint32(p.BTH.DestQP())
					if maps[qp]++; f == rdshdr.FlagCongDelta || maps[qp]%2 == 1 { // a whole map is two SENDs
						told = append(told, qp)
					}
					mu.Unlock()
				}
			})
			for _, on := range []bool{true, false} {
				b.m.SetCongested(addrB, 4000, on)
				time.Sleep(100 * time.Millisecond)
				mu.Lock()
				seen := make(map[uint32]int)
				for i, qp := range told {
					if seen[qp]++; i < recent != senders[qp] || seen[qp] > 1 {
						t.Errorf("%v, congested %v: number %d to hear of it is QP %#x, a sender: %v, for the %d. time", dialect, on, i+1, qp, senders[qp], seen[qp])
					}
				}
				if len(told) != conns {
					t.Errorf("%v, congested %v: %d of %d were told", dialect, on, len(told), conns)
				}
				told = nil
				mu.Unlock()
			}
			net.SetTap(nil)
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}
