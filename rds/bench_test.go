package rds

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
)

// nullLink takes everything and acknowledges in batches, as connections do.
type nullLink struct {
	fakeLink       // for what it has not
	pending, bytes int
}

func (l *nullLink) SendExtra(o conn.Owner, _, _ uint16, p []byte, _ conn.SendFlags, _ *conn.Extra) error {
	l.pending++
	l.bytes += len(p)
	if l.pending == 64 {
		o.Released(l.pending, l.bytes, true)
		l.pending, l.bytes = 0, 0
	}
	return nil
}
func (l *nullLink) Flush()                     {}
func (l *nullLink) PeerCongested(uint16) bool  { return false }
func (l *nullLink) Cancel(conn.Owner, int) int { return 0 }

// drained acknowledges the rest of what s has sent last.
func drained(s *Socket) {
	f := s.last.Load()
	l := f.link.(*nullLink)
	f.Released(l.pending, l.bytes, true)
}

type nullTransport struct{ fakeTransport }

func (tr *nullTransport) Get(local, remote netip.Addr, tos uint8) (link, error) {
	return &nullLink{}, nil
}

func openNull(t testing.TB) (*Service, *Socket) {
	svc := newService(Config{})
	svc.tr = &nullTransport{fakeTransport{net: newFakeNet(), svc: svc}}
	t.Cleanup(func() { svc.Close() })
	return svc, bind(t, svc, ap(addrA, 4000))
}

// batch64 is what one packed SEND of 64-byte datagrams is to the sink: a run of messages in one buffer.
func batch64(port uint16) []conn.Incoming {
	const n = 61440 / (48 + 64)
	buf := make([]byte, 61440)
	ms := make([]conn.Incoming, n)
	for i := range ms {
		off := i*(48+64) + 48
		ms[i] = conn.Incoming{Len: 64, SrcPort: 4000, DstPort: port, First: conn.Frag{Data: buf[off : off+64]}}
	}
	return ms
}

// The sockets' own share of BenchmarkServiceOverhead64.
func BenchmarkSocket64(b *testing.B) {
	b.Run("Write", func(b *testing.B) {
		_, s := openNull(b)
		p := make([]byte, 64)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.WriteToAddrPort(p, ap(addrB, 4000)); err != nil {
				b.Fatal(err)
			}
		}
		drained(s)
	})
	b.Run("DeliverRead", func(b *testing.B) {
		svc, s := openNull(b)
		ms, p := batch64(4000), make([]byte, 64)
		peer := svc.peerOf(addrA, addrB)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if n%len(ms) == 0 {
				svc.deliver(peer, 0, ms, maxInt64)
			}
			if _, _, err := s.ReadFromAddrPort(p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("DeliverReceive", func(b *testing.B) {
		svc, s := openNull(b)
		ms := batch64(4000)
		peer := svc.peerOf(addrA, addrB)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if n%len(ms) == 0 {
				svc.deliver(peer, 0, ms, maxInt64)
			}
			m, err := s.Receive(context.Background())
			if err != nil {
				b.Fatal(err)
			}
			m.Release()
		}
	})
	b.Run("Deliver8Sockets", func(b *testing.B) {
		svc, s0 := openNull(b)
		socks := []*Socket{s0}
		ms, p := batch64(4000), make([]byte, 64)
		for i := 1; i < 8; i++ {
			socks = append(socks, bind(b, svc, ap(addrA, uint16(4000+i))))
		}
		for i := range ms {
			ms[i].DstPort = uint16(4000 + i%8)
		}
		ms = ms[:len(ms)/8*8]
		peer := svc.peerOf(addrA, addrB)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if n%len(ms) == 0 {
				svc.deliver(peer, 0, ms, maxInt64)
			}
			if _, _, err := socks[n%8].ReadFromAddrPort(p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("FanOut1000", func(b *testing.B) {
		_, s := openNull(b)
		p := make([]byte, 64)
		var to [1000]netip.AddrPort
		for i := range to {
			to[i] = ap(netip.MustParseAddr(fmt.Sprintf("10.1.%d.%d", i/250, i%250+1)), 4000)
		}
		s.SetWriteBuffer(1 << 30)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if _, err := s.WriteToAddrPort(p, to[n%len(to)]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// One goroutine delivers, another reads: what the two ends of the queue cost each other.
func BenchmarkRecvQueueTwoSides(b *testing.B) {
	svc, s := openNull(b)
	ms := batch64(4000)[:64]
	peer := svc.peerOf(addrA, addrB)
	room := make(chan struct{}, 64)
	var wg sync.WaitGroup
	n := b.N/len(ms) + 1
	wg.Go(func() {
		p := make([]byte, 64)
		for i := range n * len(ms) {
			if _, _, err := s.ReadFromAddrPort(p); err != nil {
				b.Error(err)
				return
			}
			if i%len(ms) == 0 {
				<-room
			}
		}
	})
	b.ReportAllocs()
	b.ResetTimer()
	for range n {
		room <- struct{}{}
		svc.deliver(peer, 0, ms, maxInt64)
	}
	wg.Wait()
}

// BenchmarkFanOut1000 is one socket that sends to 1,000 peers in turn, each with its connection, over nullVerbs. What
// counts is ns/write, which includes the post: nothing waits for company where no two datagrams go the same way. The
// rest is 1,000 receivers with cold memory, in the same process here.
func BenchmarkFanOut1000(b *testing.B) {
	for _, peers := range []int{1, 1000} {
		b.Run(fmt.Sprint(peers), func(b *testing.B) {
			null := newNullVerbs(b)
			cfg := Config{Providers: []verbs.Provider{null}, MaxSlabBytes: 1 << 36}
			sa, sb := openUDP(b, cfg), openUDP(b, cfg)
			a := bind(b, sa, ap(addrA, 4000))
			socks := make([]*Socket, peers)
			for i := range socks {
				socks[i] = bind(b, sb, ap(netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(i%250 + 1)}), 4000))
				mustWrite(b, a, nil, socks[i].AddrPort())
				wantRead(b, socks[i], nil, a.AddrPort())
			}
			p, q := make([]byte, 64), make([]byte, 64)
			b.ReportAllocs()
			const burst = 1000
			n, writing := 0, time.Duration(0)
			for b.Loop() {
				if n%burst == 0 {
					start := time.Now()
					for i := range burst {
						if _, err := a.WriteToAddrPort(p, socks[i%peers].AddrPort()); err != nil {
							b.Fatal(err)
						}
					}
					writing += time.Since(start)
					// Not by the readers' Progress, which here goes round 1,000 devices.
					for null.work() {
					}
					for i := range burst {
						if _, _, err := socks[i%peers].ReadFromAddrPort(q); err != nil {
							b.Fatal(err)
						}
					}
				}
				n++
			}
			b.ReportMetric(float64(writing)/float64((n+burst-1)/burst*burst), "ns/write")
		})
	}
}

// BenchmarkIdleConnMemory is what one end of a connection costs that was used once: heap; slab memory of
// its own (send queues); slab memory by which it made shared receive queues longer, which is
// mapped and not touched until it is used; goroutines.
func BenchmarkIdleConnMemory(b *testing.B) {
	const side = 24 // addresses
	prov := []verbs.Provider{newNullVerbs(b)}
	for b.Loop() {
		cfg := Config{Providers: prov, MaxSlabBytes: 1 << 36}
		sa, sb := openUDP(b, cfg), openUDP(b, cfg)
		var as, bs []*Socket
		say := func(x, y *Socket) {
			mustWrite(b, x, []byte("x"), y.AddrPort())
			wantRead(b, y, []byte("x"), x.AddrPort())
		}
		for i := range side { // devices and sockets are not what is measured, nor their first connection
			as = append(as, bind(b, sa, ap(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 4000)))
			bs = append(bs, bind(b, sb, ap(netip.AddrFrom4([4]byte{10, 0, 1, byte(i + 1)}), 4000)))
			say(as[i], bs[i])
		}
		before, goroutines := measure(sa, sb), runtime.NumGoroutine()
		for i, x := range as {
			for j, y := range bs {
				if i != j {
					say(x, y)
				}
			}
		}
		time.Sleep(50 * time.Millisecond) // acknowledgements
		after := measure(sa, sb)
		ends := float64(2 * side * (side - 1))
		b.ReportMetric(float64(after.heap-before.heap)/ends, "heap-B/conn")
		b.ReportMetric(float64(after.slab-before.slab-(after.recv-before.recv))/ends, "slab-B/conn")
		b.ReportMetric(float64(after.recv-before.recv)/ends, "recvq-B/conn")
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/ends, "goroutines/conn")
		sa.Close()
		sb.Close()
	}
}

// footprint is memory in bytes.
type footprint struct{ heap, slab, recv int64 }

func measure(svcs ...*Service) (f footprint) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	f.heap = int64(m.HeapAlloc)
	for _, svc := range svcs {
		st := svc.tr.(*stack)
		n := st.slab.Stats()
		f.slab += int64(n.SmallInUse)*slab.Small + int64(n.LargeInUse)*slab.Large
		_, devs := st.Stats()
		for _, d := range devs {
			f.recv += int64(d.Small.Live*d.Small.BufBytes + d.Large.Live*d.Large.BufBytes)
		}
	}
	return f
}

// BenchmarkInfo is what it costs to look: at a Service with 200 sockets, as many connections, and 2,000 datagrams that nobody reads. A
// poll of the counters once a second, or of everything, is nothing beside what is looked at.
func BenchmarkInfo(b *testing.B) {
	const peers, unread = 200, 10
	cfg := Config{Providers: []verbs.Provider{newNullVerbs(b)}, MaxSlabBytes: 1 << 36}
	sa, sb := openUDP(b, cfg), openUDP(b, cfg)
	for i := range peers {
		x := bind(b, sa, ap(netip.AddrFrom4([4]byte{10, 1, 0, byte(i + 1)}), 4000))
		y := bind(b, sb, ap(addrB, uint16(4000+i)))
		for range unread {
			mustWrite(b, x, make([]byte, 64), y.AddrPort())
		}
		for len(y.svc.Info(InfoRecv).ReceiveQueue) < (i+1)*unread {
			sb.tr.Progress()
		}
	}
	for _, c := range []struct {
		name  string
		items InfoItems
	}{{"counters", InfoCounters}, {"sockets", InfoSockets}, {"connections", InfoConnections}, {"queues", InfoSend | InfoRetrans | InfoRecv}, {"ib", InfoIB}, {"devices", InfoDevices}, {"all", InfoAll}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if in := sb.Info(c.items); len(in.LocalAddresses) != 1 {
					b.Fatal(in)
				}
			}
		})
	}
}

// BenchmarkRDMA is one operation with its datagram, or alone, after the other over loopback sockets, 16 of them outstanding.
func BenchmarkRDMA(b *testing.B) {
	for _, op := range []RDMAOp{RDMAWrite, RDMARead} {
		for _, size := range []int{64, 64 << 10, 1 << 20} {
			for _, silent := range []bool{true, false} {
				name := fmt.Sprintf("%v/%d", op, size)
				if silent {
					name += "/silent"
				}
				b.Run(name, func(b *testing.B) { benchRDMA(b, op, size, silent) })
			}
		}
	}
}

func benchRDMA(b *testing.B, op RDMAOp, size int, silent bool) {
	const window = 16
	sa, sb := openUDP(b, Config{}), openUDP(b, Config{})
	x, y := bind(b, sa, ap(netip.MustParseAddr("127.0.5.1"), 4000)), bind(b, sb, ap(netip.MustParseAddr("127.0.5.2"), 4000))
	local, remote := mustRegister(b, x, size, RegionOptions{}), mustRegister(b, y, size, RegionOptions{})
	m := Message{Peer: y.AddrPort(), RDMA: &RDMA{Op: op, Local: []Piece{local.Piece(0, size)}, Remote: remote.Cookie(), Silent: silent, Notify: true}}
	if !silent {
		m.Data = make([]byte, 16)
		go func() {
			p := make([]byte, 64)
			for {
				if _, _, err := y.ReadFromAddrPort(p); err != nil {
					return
				}
			}
		}()
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	out := 0
	for b.Loop() {
		if out == window {
			wantCompletion(b, x, 0, StatusSuccess)
			out--
		}
		mustSend(b, x, m)
		out++
	}
	for ; out > 0; out-- {
		wantCompletion(b, x, 0, StatusSuccess)
	}
	for { // the last datagram may still be on its way, and is nobody's once y's Service has closed
		if n, _ := x.Unacknowledged(); n == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	y.Close()
}
