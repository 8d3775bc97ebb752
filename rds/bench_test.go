package rds

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/openrds/openrds/conn"
)

// nullLink takes everything and acknowledges in batches, as connections do.
type nullLink struct {
	pending, bytes int
}

func (l *nullLink) SendMsg(o conn.Owner, _, _ uint16, p []byte, _ conn.SendFlags) error {
	l.pending++
	l.bytes += len(p)
	if l.pending == 64 {
		o.Released(l.pending, l.bytes)
		l.pending, l.bytes = 0, 0
	}
	return nil
}
func (l *nullLink) Flush()                         {}
func (l *nullLink) PeerCongested(uint16) bool      { return false }
func (l *nullLink) Cancel(conn.Owner, int) int     { return 0 }
func (l *nullLink) drained(o conn.Owner) *nullLink { o.Released(l.pending, l.bytes); return l }

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
		s.last.Load().link.(*nullLink).drained(s.owner())
	})
	b.Run("DeliverRead", func(b *testing.B) {
		svc, s := openNull(b)
		ms, p := batch64(4000), make([]byte, 64)
		peer := svc.peerOf(addrA, addrB)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if n%len(ms) == 0 {
				svc.deliver(peer, ms, maxInt64)
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
				svc.deliver(peer, ms, maxInt64)
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
				svc.deliver(peer, ms, maxInt64)
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
		svc.deliver(peer, ms, maxInt64)
	}
	wg.Wait()
}
