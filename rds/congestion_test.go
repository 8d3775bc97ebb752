package rds

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/internal/simnet"
)

// wantCongested takes the *CongestedError out of err.
func wantCongested(t testing.TB, err error, dest netip.AddrPort) *CongestedError {
	t.Helper()
	ce, ok := errors.AsType[*CongestedError](err)
	if !ok || ce.Dest != dest || !errors.Is(err, ErrCongested) || !errors.Is(err, syscall.ENOBUFS) {
		t.Fatalf("got %v; want congestion of %v", err, dest)
	}
	return ce
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// TestCongestedError: a refused write says where, and has what to wait on: for that port alone.
func TestCongestedError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		sa, _ := n.open(t, Config{})
		sb, _ := n.open(t, Config{ReceiveBuffer: 1000})
		a := bind(t, sa, ap(addrA, 4000))
		var bs []*Socket
		var ces []*CongestedError
		for i := range 3 {
			b := bind(t, sb, ap(addrB, uint16(5000+i)))
			bs = append(bs, b)
			mustWrite(t, a, make([]byte, 2000), b.AddrPort())
			ces = append(ces, wantCongested(t, a.TrySend(Message{Peer: b.AddrPort()}), b.AddrPort()))
		}
		again := wantCongested(t, a.TrySend(Message{Peer: bs[0].AddrPort()}), bs[0].AddrPort())
		r0, r1, r2 := ces[0].Ready(), ces[1].Ready(), ces[2].Ready()
		if again.Ready() != r0 {
			t.Error("two who wait for a port do not share")
		}
		if isClosed(r0) || isClosed(r1) {
			t.Fatal("ready while congested")
		}
		// A deadline says the same.
		a.SetWriteDeadline(time.Now().Add(time.Second))
		_, err := a.WriteToAddrPort(nil, bs[1].AddrPort())
		wantTimeout(t, err, ErrCongested)
		wantCongested(t, err, bs[1].AddrPort())
		a.SetWriteDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err = a.Send(ctx, Message{Peer: bs[1].AddrPort()})
		wantCongested(t, err, bs[1].AddrPort())
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()

		p := make([]byte, 2000)
		bs[1].ReadFromAddrPort(p)
		if isClosed(r0) || !isClosed(r1) || isClosed(r2) {
			t.Errorf("port 1 has cleared: %v %v %v", isClosed(r0), isClosed(r1), isClosed(r2))
		}
		if !isClosed(ces[1].Ready()) {
			t.Error("asked for when the port has cleared: not closed")
		}
		mustWrite(t, a, nil, bs[1].AddrPort())
		bs[0].Close() // nobody is congested who is not there
		if !isClosed(r0) || isClosed(r2) {
			t.Errorf("the socket is closed: %v %v", isClosed(r0), isClosed(r2))
		}
		sa.Close()
		if !isClosed(r2) || !isClosed(ces[2].Ready()) {
			t.Error("the service is closed, and who waits is not told")
		}
		for _, p := range sa.peers.all() {
			if !p.cong.empty() {
				t.Error("somebody is still entered")
			}
		}
	})
}

// TestWakePerDestination: of writers that wait for many ports those of the port that clears go on, and nobody else is woken.
func TestWakePerDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		sa, _ := n.open(t, Config{})
		sb, tb := n.open(t, Config{})
		const ports = 20
		a := bind(t, sa, ap(addrA, 4000))
		var wg sync.WaitGroup
		var mu sync.Mutex
		done := make([]int, ports)
		for i := range ports {
			bind(t, sb, ap(addrB, uint16(5000+i)))
			tb.SetCongested(addrB, uint16(5000+i), true)
			for range 2 {
				wg.Go(func() {
					mustWrite(t, a, nil, ap(addrB, uint16(5000+i)))
					mu.Lock()
					done[i]++
					mu.Unlock()
				})
			}
		}
		synctest.Wait()
		q := &sa.peerOf(addrA, addrB).cong
		if int(q.n.Load()) != ports {
			t.Fatalf("waited for: %d ports", q.n.Load())
		}
		before := sa.Stats().CongSendBlocked
		for i := range ports {
			tb.SetCongested(addrB, uint16(5000+i), false)
			synctest.Wait()
			for k := range done {
				if want := 0; k <= i {
					want = 2
					if done[k] != want {
						t.Fatalf("port %d has cleared: %d of its writers are through", k, done[k])
					}
				} else if done[k] != want {
					t.Fatalf("port %d has not cleared, and %d of its writers are through", k, done[k])
				}
			}
			if int(q.n.Load()) != ports-1-i {
				t.Fatalf("waited for: %d ports", q.n.Load())
			}
		}
		wg.Wait()
		if st := sa.Stats(); before != 2*ports || st.CongSendBlocked != before {
			t.Errorf("%d writes blocked, then %d", before, st.CongSendBlocked)
		}
	})
}

// TestClearAllocs: a map that clears ports nobody waits for costs nothing, one that somebody waits for again and again nothing more.
func TestClearAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	a, b, _, _ := pair(t, Config{})
	mustWrite(t, a, nil, b.AddrPort())
	ports := make([]uint16, 1000)
	for i := range ports {
		ports[i] = uint16(i + 2)
	}
	k, q := sink{a.svc}, &a.svc.peerOf(addrA, addrB).cong
	if n := testing.AllocsPerRun(100, func() { k.PortsClear(addrA, addrB, ports) }); n != 0 {
		t.Errorf("nobody waits: %v allocations", n)
	}
	w := newWaiter()
	if n := testing.AllocsPerRun(100, func() {
		q.add(500, w)
		k.PortsClear(addrA, addrB, ports)
		<-w.wake
		q.remove(500, w)
	}); n != 0 {
		t.Errorf("a write waits: %v allocations", n)
	}
	if !q.empty() {
		t.Error("still entered")
	}
}

// TestCongestionMonitor is RDS_CONG_MONITOR (rds-protocol spec 1.9): interest by a write that does not wait, told once, exactly of the
// ports that cleared.
func TestCongestionMonitor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		sa, _ := n.open(t, Config{})
		sb, tb := n.open(t, Config{})
		a, other := bind(t, sa, ap(addrA, 4000)), bind(t, sa, ap(addrA, 4001))
		for _, p := range []uint16{5000, 5001, 5064, 5130} {
			bind(t, sb, ap(addrB, p))
			tb.SetCongested(addrB, p, true)
		}
		try := func(s *Socket, port uint16) {
			t.Helper()
			wantCongested(t, s.TrySend(Message{Peer: ap(addrB, port)}), ap(addrB, port))
		}
		want := func(what string, s *Socket, mask uint64) {
			t.Helper()
			if got := s.TryReadCongestion(); got != mask {
				t.Fatalf("%s: %x, want %x", what, got, mask)
			}
		}
		flip := func(port uint16) { tb.SetCongested(addrB, port, false); tb.SetCongested(addrB, port, true) }
		bit := func(ports ...uint16) (mask uint64) {
			for _, p := range ports {
				mask |= 1 << (p % 64)
			}
			return mask
		}

		try(a, 5000)
		flip(5000)
		want("monitor off", a, 0)
		a.SetCongestionMonitor(true)
		other.SetCongestionMonitor(true)
		flip(5000)
		want("no interest", a, 0)
		try(a, 5000)
		try(a, 5000)
		try(a, 5001)
		flip(5064) // the same bit as 5000
		want("another port with that bit", a, 0)
		flip(5000)
		want("another socket's interest", other, 0)
		want("told", a, bit(5000))
		flip(5000)
		want("told once", a, 0)
		try(a, 5000)
		flip(5000)
		flip(5001)
		want("two at once", a, bit(5000, 5001))
		try(a, 5000)
		try(other, 5000)
		a.SetCongestionMonitor(false)
		flip(5000)
		want("off", a, 0)
		want("the other", other, bit(5000))
		a.SetCongestionMonitor(true)
		flip(5000)
		want("off has forgotten", a, 0)

		// A write that waits is told by going on.
		done := make(chan error)
		go func() { done <- a.Send(context.Background(), Message{Peer: ap(addrB, 5130)}) }()
		synctest.Wait()
		tb.SetCongested(addrB, 5130, false)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		want("a write that waited", a, 0)

		// Blocked readers.
		try(a, 5001)
		got := make(chan uint64)
		go func() {
			mask, err := a.ReadCongestion(context.Background())
			if err != nil {
				t.Error(err)
			}
			got <- mask
		}()
		synctest.Wait()
		flip(5001)
		if mask := <-got; mask != bit(5001) {
			t.Errorf("read %x", mask)
		}
		a.SetReadDeadline(time.Now().Add(time.Second))
		_, err := a.ReadCongestion(context.Background())
		wantTimeout(t, err, nil)
		a.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		if _, err := a.ReadCongestion(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		time.AfterFunc(time.Second, func() { a.Close() })
		try(a, 5001)
		if _, err := a.ReadCongestion(context.Background()); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if q := &sa.peerOf(addrA, addrB).cong; !q.empty() {
			t.Error("a closed socket is still entered")
		}
		if err := a.SetCongestionMonitor(true); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

// TestStackCongestion: whole stacks, either dialect. Eight streams to as many slow readers, with congestion all the time, writers that wait in
// each of the three ways; every datagram arrives once and in order, and no port stays congested.
func TestStackCongestion(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%v/%d", dialect, seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					net := simnet.ForTest(t, seed, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond, Jitter: 100 * time.Microsecond, Loss: 0.01}})
					sa, sb := openSim(t, net, Config{Dialect: dialect}), openSim(t, net, Config{ReceiveBuffer: 20000, Dialect: dialect})
					const flows, count, size = 8, 400, 500
					var wg sync.WaitGroup
					for i := range flows {
						a, b := bind(t, sa, ap(addrA, uint16(4000+i))), bind(t, sb, ap(addrB, uint16(5000+i)))
						to := b.AddrPort()
						a.SetCongestionMonitor(i%3 == 1)
						wg.Go(func() {
							for n := range count {
								p := payload(size, byte(n))
								for {
									var err error
									if i%3 == 0 {
										_, err = a.WriteToAddrPort(p, to)
									} else {
										err = a.TrySend(Message{Peer: to, Data: p})
									}
									if err == nil {
										break
									}
									switch ce, ok := errors.AsType[*CongestedError](err); {
									case !ok:
										t.Error(err)
										return
									case i%3 == 1:
										if mask, err := a.ReadCongestion(t.Context()); mask != 1<<(to.Port()%64) || err != nil {
											t.Errorf("cleared: %x, %v", mask, err)
										}
									default:
										<-ce.Ready()
									}
								}
							}
						})
						wg.Go(func() {
							rng := rand.New(rand.NewPCG(seed, uint64(i)))
							p := make([]byte, size)
							for n := range count {
								if n%50 == 0 {
									time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
								}
								if _, _, err := b.ReadFromAddrPort(p); err != nil || string(p) != string(payload(size, byte(n))) {
									t.Errorf("datagram %d: %v", n, err)
									return
								}
							}
						})
					}
					wg.Wait()
					time.Sleep(time.Second)
					st := sb.Stats()
					if st.CongestedPort < flows || sa.Stats().Conn.CongUpdateReceived < flows { // changes at the same time are one update
						t.Errorf("congested %d times, %d updates", st.CongestedPort, sa.Stats().Conn.CongUpdateReceived)
					}
					if deltas := sa.Stats().Conn.CongDeltaReceived; (deltas > 0) != (dialect == DialectOpen) {
						t.Errorf("%d deltas", deltas)
					}
					for _, c := range sa.tr.Conns() {
						if n := c.Info().PeerCongestedPorts; n != 0 {
							t.Errorf("%d ports stay congested", n)
						}
					}
					closeService(t, sa)
					closeService(t, sb)
				})
			})
		}
	}
}

// TestSocketBound: a socket that does not read, with many peers that ignore its congestion, has a bound; it is those with most in its
// queue that it refuses, and a peer with little is not.
func TestSocketBound(t *testing.T) {
	svc, _ := newFakeNet().open(t, Config{MaxSocketBytes: 16 << 20, ReceiveBuffer: 1 << 20, HoldTime: -1})
	s := bind(t, svc, ap(addrA, 4000))
	other := bind(t, svc, ap(addrA, 4001))
	peerAddr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }
	msg := make([]byte, 64<<10)
	taken, refused := 0, 0
	for range 64 {
		for i := range 20 {
			if deliverTo(svc, addrA, peerAddr(i), 1, 4000, msg) {
				taken += len(msg)
			} else {
				refused++
			}
		}
	}
	// Twenty that have a fair share each, and one more message.
	if most := max(16<<20, 20*(fairShare+len(msg))) + 20*len(msg); taken > most || refused == 0 {
		t.Errorf("%d bytes taken, at most %d; %d messages refused", taken, most, refused)
	}
	if !deliverTo(svc, addrA, peerAddr(500), 1, 4000, msg) {
		t.Error("a peer with nothing queued was refused")
	}
	if !deliverTo(svc, addrA, peerAddr(0), 1, 4001, msg) {
		t.Error("a socket that reads was refused its messages")
	}
	if st := svc.Stats(); st.RecvSocketLimit != uint64(refused) || st.RecvPeerLimit != 0 {
		t.Errorf("%d refused for the socket, %d for the peer, of %d", st.RecvSocketLimit, st.RecvPeerLimit, refused)
	}
	p := make([]byte, len(msg))
	for range (taken + len(msg)) / len(msg) {
		if _, _, err := s.ReadFromAddrPort(p); err != nil {
			t.Fatal(err)
		}
	}
	if !deliverTo(svc, addrA, peerAddr(0), 1, 4000, msg) {
		t.Error("refused when all has been read")
	}
	_ = other
}

// TestPeersGo: what sockets know of hosts that only sent to them goes with their connections, numbers are used again, and what is queued
// keeps the name of its sender.
func TestPeersGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sb := openSim(t, net, Config{Conn: conn.Config{IdleTimeout: time.Minute}})
		b := bind(t, sb, ap(addrB, 5000))
		strangers := func(from, n int) {
			for i := range n {
				h := openSim(t, net, Config{Linger: time.Second})
				a := bind(t, h, ap(netip.AddrFrom4([4]byte{10, 9, 0, byte(from + i)}), 4000))
				mustWrite(t, a, []byte{byte(from + i)}, b.AddrPort())
				closeService(t, h)
			}
		}
		read := func(from, n int) {
			t.Helper()
			for i := range n {
				wantRead(t, b, []byte{byte(from + i)}, ap(netip.AddrFrom4([4]byte{10, 9, 0, byte(from + i)}), 4000))
			}
		}
		strangers(1, 40)
		time.Sleep(10 * time.Minute)
		if n := len(sb.peers.all()); n != 40 {
			t.Errorf("%d peers with something queued", n)
		}
		read(1, 40)
		time.Sleep(10 * time.Minute)
		if n := len(sb.peers.all()); n > 1 { // accounting lags behind by one sender
			t.Errorf("%d peers left", n)
		}
		strangers(100, 40)
		read(100, 40)
		if sb.peers.n > 41 {
			t.Errorf("%d numbers given out for 40 peers at a time", sb.peers.n)
		}
		// One that was answered stays.
		sb.Stats() // accounts
		b.WriteToAddrPort([]byte("hello"), ap(netip.AddrFrom4([4]byte{10, 9, 0, 100}), 4000))
		time.Sleep(10 * time.Minute)
		if all := sb.peers.all(); len(all) != 1 || all[0].remote != netip.AddrFrom4([4]byte{10, 9, 0, 100}) {
			t.Errorf("%d peers left", len(all))
		}
		left := 0
		sb.byConn.Range(func(any, any) bool { left++; return true })
		if left > 1 {
			t.Errorf("%d connections remembered", left)
		}
		sb.cfg.Linger = 0
		sb.Close() // abandons the hello
	})
}

// TestCongestionEnds: a reader takes the last datagram before its deliverer has accounted for it, and somebody looks at the queue at that moment. An
// empty queue is not congested then either, though nobody reads any more.
func TestCongestionEnds(t *testing.T) {
	n := newFakeNet()
	sb, _ := n.open(t, Config{ReceiveBuffer: 1000})
	b := bind(t, sb, ap(addrB, 5000))
	p, q := sb.peerOf(addrB, addrA), &b.q
	payload := make([]byte, 2000)
	m := conn.Incoming{DstPort: 5000, Len: len(payload), First: conn.Frag{Data: payload}}
	r := run{s: b, wake: true, msgs: 1, bytes: 2000, charge: chargeOf(2000)}
	q.inMu.Lock()
	q.pushLocked(source32{p.index, 0}, &m)
	p.queued.Add(r.charge)
	q.inMu.Unlock()
	if _, _, st := b.tryRead(payload); st != complete {
		t.Fatal(st)
	}
	q.readMu.Lock() // MsgPeek, or a poll
	r.end()
	q.readMu.Unlock()
	if q.congested.Load() || n.congested[b.AddrPort()] {
		t.Error("senders wait for an empty queue")
	}
	if n, c := q.bytes.Load(), q.charge.Load(); n != 0 || c != 0 {
		t.Errorf("%d bytes, charge %d in an empty queue", n, c)
	}
}

// TestCloseEndsCongestionFirst: a socket that closes leaves its port uncongested to the next one, whose own congestion it does not end.
func TestCloseEndsCongestionFirst(t *testing.T) {
	n := newFakeNet()
	sb, tb := n.open(t, Config{ReceiveBuffer: 1000})
	b := bind(t, sb, ap(addrB, 5000))
	crowd := func() { deliverTo(sb, addrB, addrA, 1, 5000, make([]byte, 2000)) }
	crowd()
	if !n.congested[b.AddrPort()] {
		t.Fatal("not congested")
	}
	var next *Socket
	again := func() {
		s, err := sb.ListenAddrPort(context.Background(), b.AddrPort())
		if err != nil {
			return // not yet
		}
		next = s
		crowd()
	}
	tb.congest = func() {
		tb.congest = nil
		again()
	}
	b.Close()
	if next == nil {
		again()
	}
	if next == nil || next.q.congested.Load() != n.congested[b.AddrPort()] {
		t.Errorf("bound again: %v; its bit in the map is %v", next != nil, n.congested[b.AddrPort()])
	}
}
