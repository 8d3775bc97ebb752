package rds

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

// Tests of whole stacks: rds, conn, ibdev, softroce, over a simulated network in virtual time.

// openSim is a Service on net.
func openSim(t testing.TB, net *simnet.Net, cfg Config) *Service {
	t.Helper()
	cfg.Network = net
	svc, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return svc
}

func closeService(t testing.TB, svc *Service) {
	t.Helper()
	if err := svc.Close(); err != nil {
		t.Errorf("closing a service: %v", err)
	}
}

// stream is the datagrams from one socket to another: length and content of each follow from (seed, n), so a
// receiver knows what must come next without having been told.
type stream struct {
	seed uint64
	max  int // longest; lengths are spread over orders of magnitude below it
}

func (st stream) size(n int) int {
	h := rand.New(rand.NewPCG(st.seed, uint64(n)))
	if h.IntN(16) == 0 {
		return 0
	}
	limit := 1 << (3 + h.IntN(18))
	return min(h.IntN(limit), st.max)
}

func (st stream) datagram(n int, buf []byte) []byte {
	p := buf[:st.size(n)]
	x := st.seed*0x9e3779b97f4a7c15 + uint64(n)*0xbf58476d1ce4e5b9 + 1
	for i := 0; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], x)
		copy(p[i:], w[:])
	}
	return p
}

// send writes datagrams [from, to) of st.
func (st stream) send(s *Socket, dst netip.AddrPort, from, to int) error {
	buf := make([]byte, MaxMessageSize)
	for n := from; n < to; n++ {
		if _, err := s.WriteToAddrPort(st.datagram(n, buf), dst); err != nil {
			return fmt.Errorf("datagram %d: %w", n, err)
		}
	}
	return nil
}

// checker reads a socket and compares what comes from each sender with its stream.
type checker struct {
	s       *Socket
	streams map[netip.AddrPort]stream
	next    map[netip.AddrPort]int
	lend    bool // Receive, not ReadFrom
	in, exp []byte
}

func newChecker(s *Socket) *checker {
	return &checker{s: s, streams: make(map[netip.AddrPort]stream), next: make(map[netip.AddrPort]int),
		in: make([]byte, MaxMessageSize), exp: make([]byte, MaxMessageSize)}
}

// read checks one datagram.
func (c *checker) read() error {
	var (
		p    []byte
		from netip.AddrPort
	)
	if c.lend {
		m, err := c.s.Receive(context.Background())
		if err != nil {
			return err
		}
		defer m.Release()
		p, from = m.Bytes(), m.Peer
	} else {
		n, f, err := c.s.ReadFromAddrPort(c.in)
		if err != nil {
			return err
		}
		p, from = c.in[:n], f
	}
	st, ok := c.streams[from]
	if !ok {
		return fmt.Errorf("a datagram from %v, which sends nothing", from)
	}
	n := c.next[from]
	c.next[from]++
	if want := st.datagram(n, c.exp); !bytes.Equal(p, want) {
		return fmt.Errorf("datagram %d from %v: %d bytes that are not the %d bytes sent", n, from, len(p), len(want))
	}
	return nil
}

// total is how many datagrams came.
func (c *checker) total() int {
	n := 0
	for _, k := range c.next {
		n += k
	}
	return n
}

// exchange has every socket of as send count datagrams to every socket of bs and the other way, and checks
// that each arrives exactly once, in order, with its content.
func exchange(t *testing.T, as, bs []*Socket, count, longest int) {
	t.Helper()
	var wg sync.WaitGroup
	half := func(from, to []*Socket, salt uint64) {
		for i, r := range to {
			c := newChecker(r)
			c.lend = i%2 == 1
			for j, s := range from {
				st := stream{seed: salt + uint64(i*100+j), max: longest}
				c.streams[s.AddrPort()] = st
				wg.Go(func() {
					if err := st.send(s, r.AddrPort(), 0, count); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Go(func() {
				r.SetReadDeadline(time.Now().Add(10 * time.Minute))
				for range count * len(from) {
					if err := c.read(); err != nil {
						t.Errorf("%v, after %d datagrams: %v", r.Addr(), c.total(), err)
						return
					}
				}
				// Nothing may come twice: what is late comes within a minute.
				r.SetReadDeadline(time.Now().Add(time.Minute))
				if err := c.read(); err == nil || !isTimeout(err) {
					t.Errorf("%v: after the last datagram: %v", r.Addr(), err)
				}
			})
		}
	}
	half(as, bs, 1000)
	half(bs, as, 2000)
	wg.Wait()
}

func isTimeout(err error) bool {
	var oe *OpError
	return errors.As(err, &oe) && oe.Timeout()
}

func TestStackExactlyOnce(t *testing.T) {
	for _, tc := range []struct {
		name string
		link simnet.LinkConfig
		cfg  Config
	}{
		{name: "clean"},
		{name: "kernel dialect", cfg: Config{Dialect: DialectKernelOnly}},
		{name: "latency", link: simnet.LinkConfig{Delay: 5 * time.Millisecond, Jitter: time.Millisecond}},
		{name: "loss 1%", link: simnet.LinkConfig{Loss: 0.01, Delay: 50 * time.Microsecond}},
		{name: "loss 5%", link: simnet.LinkConfig{Loss: 0.05, Delay: 50 * time.Microsecond}},
		{name: "loss 20%", link: simnet.LinkConfig{Loss: 0.2, Delay: 50 * time.Microsecond}},
		{name: "reorder", link: simnet.LinkConfig{Reorder: 0.1, Delay: 50 * time.Microsecond}},
		{name: "duplicate", link: simnet.LinkConfig{Dup: 0.2, Delay: 50 * time.Microsecond}},
		{name: "corrupt", link: simnet.LinkConfig{Corrupt: 0.02, Delay: 50 * time.Microsecond}},
		{name: "everything", link: simnet.LinkConfig{Loss: 0.05, Dup: 0.05, Reorder: 0.05, Corrupt: 0.01, Delay: time.Millisecond, Jitter: time.Millisecond}},
		{name: "everything, kernel dialect", cfg: Config{Dialect: DialectKernelOnly},
			link: simnet.LinkConfig{Loss: 0.05, Dup: 0.05, Reorder: 0.05, Corrupt: 0.01, Delay: time.Millisecond, Jitter: time.Millisecond}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := simnet.ForTest(t, 7, simnet.Config{Link: tc.link, MTU: 4500})
				sa, sb := openSim(t, net, tc.cfg), openSim(t, net, tc.cfg)
				var as, bs []*Socket
				for i := range 2 {
					as = append(as, bind(t, sa, ap(addrA, uint16(4000+i))))
					bs = append(bs, bind(t, sb, ap(addrB, uint16(5000+i))))
				}
				exchange(t, as, bs, 60, 100<<10)
				for kind, p := range map[simnet.Kind]float64{simnet.Lost: tc.link.Loss, simnet.Duplicated: tc.link.Dup,
					simnet.Corrupted: tc.link.Corrupt, simnet.Reordered: tc.link.Reorder} {
					if got := net.Count(kind); (got > 0) != (p > 0) {
						t.Errorf("%v packets: %d, at a probability of %v", kind, got, p)
					}
				}
				closeService(t, sa)
				closeService(t, sb)
			})
		})
	}
}

func TestStackPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 11, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		stop := make(chan struct{})
		var chaos sync.WaitGroup
		chaos.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					net.Heal(addrA, addrB)
					return
				case <-time.After(time.Duration(1+i) * 700 * time.Millisecond):
				}
				net.Partition(addrA, addrB)
				time.Sleep(time.Duration(1+i*8) * time.Second) // some outlive the connection, some do not
				net.Heal(addrA, addrB)
			}
		})
		ca := newChecker(b)
		ca.streams[a.AddrPort()] = stream{seed: 5, max: 64 << 10}
		var wg sync.WaitGroup
		wg.Go(func() {
			for n := range 400 {
				if err := ca.streams[a.AddrPort()].send(a, b.AddrPort(), n, n+1); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		})
		wg.Go(func() {
			b.SetReadDeadline(time.Now().Add(time.Hour))
			for range 400 {
				if err := ca.read(); err != nil {
					t.Errorf("after %d datagrams: %v", ca.total(), err)
					return
				}
			}
		})
		wg.Wait()
		close(stop)
		chaos.Wait()
		if st := sa.Stats(); st.Conn.ConnReset == 0 {
			t.Error("the connection never broke: the test tested nothing")
		}
		closeService(t, sa)
		closeService(t, sb)
	})
}

// A peer dies without a word and another process takes its address. Only what was acknowledged to the dead one may be
// missing from the stream; the survivor's socket goes on.
func TestStackPeerRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 13, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond, Loss: 0.01}})
		sa := openSim(t, net, Config{})
		a := bind(t, sa, ap(addrA, 4000))
		st := stream{seed: 99, max: 8 << 10}
		const incarnations, count = 4, 4000
		var wg sync.WaitGroup
		wg.Go(func() {
			for n := range count {
				if err := st.send(a, ap(addrB, 4000), n, n+1); err != nil {
					t.Error(err)
					return
				}
				if n%10 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
		first := 0 // of the stream, that this incarnation may see
		for inc := range incarnations {
			sb := openSim(t, net, Config{Linger: -1})
			b := bind(t, sb, ap(addrB, 4000))
			c := newChecker(b)
			c.streams[a.AddrPort()] = st
			last := inc == incarnations-1
			// The first datagram says where the stream starts; it is not before what the previous one
			// could have acknowledged, and nothing it had not may be skipped.
			p := make([]byte, MaxMessageSize)
			b.SetReadDeadline(time.Now().Add(5 * time.Minute))
			n, _, err := b.ReadFromAddrPort(p)
			if err != nil {
				t.Fatalf("incarnation %d: %v", inc, err)
			}
			start := -1
			for k := 0; k <= first; k++ {
				if bytes.Equal(st.datagram(k, c.exp), p[:n]) {
					start = k
				}
			}
			if start < 0 {
				t.Fatalf("incarnation %d starts after datagram %d, which was not acknowledged to the one before", inc, first)
			}
			c.next[a.AddrPort()] = start + 1
			for last && c.next[a.AddrPort()] < count || !last && c.next[a.AddrPort()] < (inc+1)*count/incarnations {
				if err := c.read(); err != nil {
					t.Fatalf("incarnation %d, after %d: %v", inc, c.next[a.AddrPort()], err)
				}
			}
			if !last {
				// Killed: nothing of it is heard again.
				net.Partition(addrA, addrB)
				synctest.Wait()
				stb := sb.Stats()
				first = start + int(stb.RecvQueued) // the most it can have acknowledged
				sb.Close()
				time.Sleep(2 * time.Second)
				net.Heal(addrA, addrB)
				continue
			}
			wg.Wait()
			closeService(t, sa)
			closeService(t, sb)
		}
	})
}

func TestStackUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{})
		sa := openSim(t, net, Config{SendBuffer: 100 << 10})
		a := bind(t, sa, ap(addrA, 4000))
		st := stream{seed: 1, max: 4096}
		dst := ap(addrB, 4000)
		n := 0
		a.SetWriteDeadline(time.Now().Add(30 * time.Second))
		var err error
		for ; err == nil; n++ {
			err = st.send(a, dst, n, n+1)
		}
		n--
		wantTimeout(t, err, ErrNoBufferSpace)
		if _, queued := a.Unacknowledged(); queued < 100<<10 {
			t.Fatalf("writes stopped with %d bytes queued", queued)
		}
		if sa.Stats().Conn.ConnectFailed == 0 {
			t.Error("no attempt to connect has failed")
		}
		// The peer appears: everything accepted arrives, and there is room again.
		a.SetWriteDeadline(time.Time{})
		done := make(chan error)
		go func() { done <- st.send(a, dst, n, n+100) }()
		sb := openSim(t, net, Config{})
		b := bind(t, sb, dst)
		c := newChecker(b)
		c.streams[a.AddrPort()] = st
		b.SetReadDeadline(time.Now().Add(time.Minute))
		for range n + 100 {
			if err := c.read(); err != nil {
				t.Fatalf("after %d of %d: %v", c.total(), n+100, err)
			}
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		closeService(t, sa)
		closeService(t, sb)
	})
}

func TestStackCloseLingers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{Link: simnet.LinkConfig{Delay: 300 * time.Millisecond}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		for range 10 {
			mustWrite(t, a, payload(1000, 1), b.AddrPort())
		}
		a.Close() // does not take back what was accepted
		closeService(t, sa)
		for range 10 {
			wantRead(t, b, payload(1000, 1), ap(addrA, 4000))
		}

		// To nobody: the time to linger passes, and the count is right.
		sc := openSim(t, net, Config{Linger: 2 * time.Second})
		c := bind(t, sc, ap(netip.MustParseAddr("10.0.0.3"), 4000))
		for range 7 {
			mustWrite(t, c, []byte("x"), ap(netip.MustParseAddr("10.0.0.4"), 4000))
		}
		start := time.Now()
		err := sc.Close()
		var ab *AbandonedError
		if !errors.As(err, &ab) || ab.Messages != 7 {
			t.Errorf("Close: %v; want 7 messages abandoned", err)
		}
		if d := time.Since(start); d < 2*time.Second || d > 4*time.Second {
			t.Errorf("lingered for %v", d)
		}
		closeService(t, sb)
	})
}

// A second Close, in main perhaps while a signal's handler is in the first, does not return before that is through: the process would
// end with datagrams unsent.
func TestStackCloseTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		svc := openSim(t, simnet.New(1, simnet.Config{}), Config{Linger: 4 * time.Second})
		a := bind(t, svc, ap(addrA, 4000))
		mustWrite(t, a, []byte("nobody is there"), ap(addrB, 4000))
		first := make(chan error, 1)
		start := time.Now()
		go func() { first <- svc.Close() }()
		time.Sleep(time.Second)
		if err := svc.Close(); err != nil {
			t.Errorf("the second Close: %v", err)
		}
		if d := time.Since(start); d < 4*time.Second {
			t.Errorf("the second Close is through after %v", d)
		}
		if err := <-first; !errors.As(err, new(*AbandonedError)) {
			t.Errorf("the first Close: %v", err)
		}
	})
}

// One of eight sockets never reads, another keeps 10,000 messages: the others do not notice.
func TestStackSlowReaders(t *testing.T) {
	for _, size := range []int{200, 3000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := simnet.ForTest(t, 5, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})
				cfg := Config{ReceiveBuffer: 256 << 10, SendBuffer: 256 << 10}
				sa, sb := openSim(t, net, cfg), openSim(t, net, cfg)
				const count = 12000
				p := payload(size, 0)
				var senders, readers sync.WaitGroup
				var held []*Message
				for i := range 8 {
					a, b := bind(t, sa, ap(addrA, uint16(4000+i))), bind(t, sb, ap(addrB, uint16(5000+i)))
					senders.Go(func() {
						a.SetWriteDeadline(time.Now().Add(time.Minute))
						for n := range count {
							if _, err := a.WriteToAddrPort(p, b.AddrPort()); err != nil {
								if i != 0 || !errors.Is(err, ErrCongested) && !errors.Is(err, ErrNoBufferSpace) {
									t.Errorf("socket %d, datagram %d: %v", i, n, err)
								}
								return
							}
						}
						if i == 0 {
							t.Error("everything was accepted for the socket that does not read")
						}
					})
					if i == 0 {
						continue
					}
					readers.Go(func() {
						b.SetReadDeadline(time.Now().Add(2 * time.Minute))
						for n := range count {
							m, err := b.Receive(t.Context())
							if err != nil {
								t.Errorf("socket %d, datagram %d: %v", i, n, err)
								return
							}
							if !bytes.Equal(m.Bytes(), p) {
								t.Errorf("socket %d, datagram %d: wrong content", i, n)
							}
							if i == 1 && len(held) < 10000 {
								held = append(held, m)
								continue
							}
							m.Release()
						}
					})
				}
				readers.Wait()
				senders.Wait()
				for _, m := range held {
					if !bytes.Equal(m.Bytes(), p) {
						t.Fatal("a lent message changed")
					}
					m.Release()
				}
				st := sb.Stats()
				if pinned := st.ReceiveBufsPinned; (size > copyMax) != (pinned > 0) || pinned > 2*256<<10+MaxMessageSize {
					t.Errorf("%d bytes of receive buffers pinned", pinned)
				}
				if st.CongestedSockets != 1 || st.Conn.RecvRefused != 0 || st.Conn.ConnReset != 0 || sa.Stats().Conn.ConnReset != 0 {
					t.Errorf("congested sockets %d, refused %d, resets %d", st.CongestedSockets, st.Conn.RecvRefused, st.Conn.ConnReset)
				}
				closeService(t, sa)
				closeService(t, sb)
			})
		})
	}
}

// The same scripted run gives the same packets, as far as the scheduler is the same too.
func TestStackDeterminism(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	run := func() (trace string) {
		synctest.Test(t, func(t *testing.T) {
			// A delay that no timer of ours has: two things due at one instant have no order.
			net := simnet.ForTest(t, 21, simnet.Config{Link: simnet.LinkConfig{Loss: 0.05, Dup: 0.02, Reorder: 0.05, Delay: 1037411, Jitter: 400 * time.Microsecond}})
			var b bytes.Buffer
			net.SetTap(func(e simnet.Event) { fmt.Fprintln(&b, e.Kind, e.At, e.N, e.From, e.To, len(e.Data)) })
			cfg := Config{}
			cfg.Conn.Incarnation = 1
			cfg.Conn.FirstSequence = func() uint64 { return 1000 }
			sa := openSim(t, net, cfg)
			cfg.Conn.Incarnation = 2
			sb := openSim(t, net, cfg)
			x, y := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
			for i := range 100 {
				mustWrite(t, x, payload(i*50, byte(i)), y.AddrPort())
				wantRead(t, y, payload(i*50, byte(i)), x.AddrPort())
			}
			time.Sleep(time.Second) // acknowledgements
			synctest.Wait()
			net.SetTap(nil)
			trace = b.String()
			closeService(t, sa)
			closeService(t, sb)
		})
		return trace
	}
	first := run()
	if len(first) < 1000 {
		t.Fatalf("a trace of %d bytes", len(first))
	}
	for range 2 {
		if again := run(); again != first {
			i := 0
			for i < len(first) && i < len(again) && first[i] == again[i] {
				i++
			}
			t.Fatalf("traces differ after %d bytes: %q, %q", i, first[i:min(i+80, len(first))], again[i:min(i+80, len(again))])
		}
	}
}

// With the least memory that a Service may be given the longest datagrams pass, both ways at once, in both dialects.
func TestStackLeastMemory(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		synctest.Test(t, func(t *testing.T) {
			net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})
			cfg := Config{MaxSlabBytes: minSlabBytes, Dialect: dialect}
			one, other := openSim(t, net, cfg), openSim(t, net, cfg)
			defer closeService(t, one)
			defer closeService(t, other)
			a, b := bind(t, one, ap(addrA, 4000)), bind(t, other, ap(addrB, 4000))
			const count = 20
			var wg sync.WaitGroup
			for _, s := range []*Socket{a, b} {
				s.SetDeadline(time.Now().Add(time.Minute))
				to := a.AddrPort()
				if s == a {
					to = b.AddrPort()
				}
				wg.Go(func() {
					for i := range count {
						if _, err := s.WriteToAddrPort(payload(MaxMessageSize, byte(i)), to); err != nil {
							t.Errorf("write %d: %v", i, err)
							return
						}
					}
				})
				wg.Go(func() {
					p := make([]byte, MaxMessageSize)
					for i := range count {
						if n, _, err := s.ReadFromAddrPort(p); err != nil || !bytes.Equal(p[:n], payload(MaxMessageSize, byte(i))) {
							t.Errorf("read %d: %d bytes, %v", i, n, err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestStackCloseStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 17, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Loss: 0.01}})
		for round := range 6 {
			sa, sb := openSim(t, net, Config{Linger: -1}), openSim(t, net, Config{Linger: -1})
			var wg sync.WaitGroup
			for i := range 4 {
				a, b := bind(t, sa, ap(addrA, uint16(4000+i))), bind(t, sb, ap(addrB, uint16(4000+i)))
				for _, s := range []struct{ from, to *Socket }{{a, b}, {b, a}} {
					wg.Go(func() {
						for {
							if _, err := s.from.WriteToAddrPort(make([]byte, 5000), s.to.AddrPort()); err != nil {
								return
							}
						}
					})
					wg.Go(func() {
						for {
							m, err := s.from.Receive(t.Context())
							if err != nil {
								return
							}
							m.Release()
						}
					})
				}
			}
			time.Sleep(time.Duration(round) * 3 * time.Millisecond)
			wg.Go(func() { sa.Close() })
			if round%2 == 0 {
				sb.Close()
			} else {
				time.Sleep(time.Second)
				sb.Close()
			}
			wg.Wait()
		}
	})
}

func TestStackAddressInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		bind(t, sa, ap(addrA, 4000))
		if _, err := sb.ListenAddrPort(t.Context(), ap(addrA, 4001)); !errors.Is(err, ErrAddrInUse) {
			t.Errorf("an address of another service: %v", err)
		}
		closeService(t, sa)
		bind(t, sb, ap(addrA, 4001))
		closeService(t, sb)
	})
}

// A sender that meets the bound per peer before any port is congested loses its connection, and nothing else.
func TestStackPeerLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 23, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{MaxPeerBytes: minPeerBytes})
		sc := openSim(t, net, Config{})
		addrC := netip.MustParseAddr("10.0.0.3")
		c, quick := bind(t, sc, ap(addrC, 4000)), bind(t, sb, ap(addrB, 6000))
		const socks, count = 4, 200
		var wg sync.WaitGroup
		var bs []*Socket
		var as []*Socket
		for i := range socks {
			a, b := bind(t, sa, ap(addrA, uint16(4000+i))), bind(t, sb, ap(addrB, uint16(5000+i)))
			as, bs = append(as, a), append(bs, b)
			wg.Go(func() {
				if err := (stream{seed: uint64(i), max: 100 << 10}).send(a, b.AddrPort(), 0, count); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(5 * time.Second)
		if st := sb.Stats(); st.RecvPeerLimit == 0 || st.Conn.RecvRefused == 0 || st.QueuedBytes > minPeerBytes {
			t.Errorf("limit met %d times, %d refused, %d bytes queued", st.RecvPeerLimit, st.Conn.RecvRefused, st.QueuedBytes)
		}
		// Another peer does not pay.
		mustWrite(t, c, []byte("hello"), quick.AddrPort())
		wantRead(t, quick, []byte("hello"), c.AddrPort())
		for i, b := range bs {
			ch := newChecker(b)
			ch.streams[as[i].AddrPort()] = stream{seed: uint64(i), max: 100 << 10}
			wg.Go(func() {
				b.SetReadDeadline(time.Now().Add(time.Hour))
				for range count {
					if err := ch.read(); err != nil {
						t.Errorf("socket %d, after %d: %v", i, ch.total(), err)
						return
					}
				}
			})
		}
		wg.Wait()
		for _, svc := range []*Service{sa, sb, sc} {
			closeService(t, svc)
		}
	})
}

func TestStackIPv6AndTypesOfService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 29, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a := bind(t, sa, ap(netip.MustParseAddr("fd00::1"), 4000))
		b := bind(t, sb, ap(netip.MustParseAddr("fd00::2"), 4000))
		exchange(t, []*Socket{a}, []*Socket{b}, 50, 20<<10)
		for tos := range uint8(3) {
			if err := a.Send(t.Context(), Message{Peer: b.AddrPort(), Data: []byte{tos}, TypeOfService: tos}); err != nil {
				t.Fatal(err)
			}
			wantRead(t, b, []byte{tos}, a.AddrPort())
		}
		if err := a.SetTypeOfService(2); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("type of service of a socket that has sent: %v", err)
		}
		a2 := bind(t, sa, netip.AddrPortFrom(a.AddrPort().Addr(), 0))
		if err := a2.SetTypeOfService(2); err != nil || a2.TypeOfService() != 2 {
			t.Errorf("type of service is %d, %v", a2.TypeOfService(), err)
		}
		if err := a2.SetTypeOfService(2); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("type of service set twice: %v", err)
		}
		mustWrite(t, a2, []byte("2"), b.AddrPort())
		m, err := b.Receive(t.Context())
		if err != nil || string(m.Bytes()) != "2" || m.TypeOfService != 2 {
			t.Fatalf("%+v, %v", m, err)
		}
		m.Release()
		if n := sa.Stats().Conn.Conns; n != 3 {
			t.Errorf("%d connections, want one for each of 3 types of service", n)
		}
		closeService(t, sa)
		closeService(t, sb)
	})
}

func TestStackCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 31, simnet.Config{})
		sa := openSim(t, net, Config{})
		a := bind(t, sa, ap(addrA, 4000))
		for i := range 10 {
			mustWrite(t, a, []byte{byte(i)}, ap(addrB, 4000+uint16(i%2)))
		}
		if n, err := a.Cancel(ap(addrB, 4001)); n != 5 || err != nil {
			t.Errorf("cancelled %d: %v; want 5", n, err)
		}
		if msgs, bytes := a.Unacknowledged(); msgs != 5 || bytes != 5 {
			t.Errorf("%d messages of %d bytes left", msgs, bytes)
		}
		sb := openSim(t, net, Config{})
		b, other := bind(t, sb, ap(addrB, 4000)), bind(t, sb, ap(addrB, 4001))
		for i := 0; i < 10; i += 2 {
			wantRead(t, b, []byte{byte(i)}, a.AddrPort())
		}
		mustWrite(t, a, []byte("after"), other.AddrPort())
		wantRead(t, other, []byte("after"), a.AddrPort())
		closeService(t, sa)
		closeService(t, sb)
	})
}

// Lent messages outlive their socket and their Service, which says that it could not take everything back.
func TestStackLoansOutliveService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 37, simnet.Config{})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		var ms []*Message
		for _, n := range []int{10, 10000, 300000} {
			mustWrite(t, a, payload(n, 1), b.AddrPort())
			m, err := b.Receive(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ms = append(ms, m)
		}
		closeService(t, sa)
		if err := sb.Close(); err == nil {
			t.Error("a service closed without a word about the messages it had lent")
		}
		for i, n := range []int{10, 10000, 300000} {
			if !bytes.Equal(ms[i].Bytes(), payload(n, 1)) {
				t.Errorf("message %d changed", i)
			}
			ms[i].Release()
		}
	})
}

// The eldest of the rules: what is sent to nobody is acknowledged, and counted.
func TestStackNoSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 41, simnet.Config{})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		time.Sleep(2 * DefaultHoldTime)
		for range 5 {
			mustWrite(t, a, []byte("x"), ap(addrB, 4001))
		}
		mustWrite(t, a, []byte("y"), b.AddrPort())
		wantRead(t, b, []byte("y"), a.AddrPort())
		time.Sleep(time.Second)
		if msgs, _ := a.Unacknowledged(); msgs != 0 {
			t.Errorf("%d messages unacknowledged", msgs)
		}
		if n := sb.Stats().RecvDropNoSock; n != 5 {
			t.Errorf("%d dropped, want 5", n)
		}
		closeService(t, sa)
		closeService(t, sb)
	})
}
