//go:build linux

package rawudp

import (
	"net/netip"
	"testing"
	"time"
)

var variants = []struct {
	name string
	o    Options
}{
	{"gso+gro", Options{}},
	{"gso", Options{NoGRO: true}},
	{"sendmmsg+gro", Options{NoGSO: true}},
	{"sendmmsg", Options{NoGSO: true, NoGRO: true}},
}

// BenchmarkRawUDP128 is the limit of packets of 128 bytes: a 64-byte datagram of RDS, alone in its SEND.
func BenchmarkRawUDP128(b *testing.B) { benchmarkRaw(b, 128-packetBytes(0)) }

// BenchmarkRawUDP15x4112 is the limit of bulk: trains of 15 packets that carry 4096 bytes each.
func BenchmarkRawUDP15x4112(b *testing.B) { benchmarkRaw(b, 4096) }

// BenchmarkRawUDPCopy4096 is the same with the payload copied once on each side, as a datagram socket has to.
func BenchmarkRawUDPCopy4096(b *testing.B) {
	s, err := NewSender(netip.MustParseAddr("127.0.0.1"), startReceiver(b, Options{}, copyEnv), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	p := make([]byte, 4096)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := s.Send(p, true); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Send(nil, false); err != nil {
		b.Fatal(err)
	}
	if err := s.Drain(); err != nil {
		b.Fatal(err)
	}
}

// benchmarkRaw sends b.N packets from this process to another one and waits for the last acknowledgement. Each
// sub-benchmark is one way to use the kernel; the limit is the best of them.
func benchmarkRaw(b *testing.B, payload int) {
	for _, v := range variants {
		b.Run(v.name, func(b *testing.B) {
			s, err := NewSender(netip.MustParseAddr("127.0.0.1"), startReceiver(b, v.o, discardEnv), v.o)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			if err := s.SendPackets(100, payload); err != nil { // the other process is there
				b.Fatal(err)
			}
			before := s.Stats()
			b.SetBytes(int64(payload))
			b.ReportAllocs()
			b.ResetTimer()
			start := time.Now()
			if err := s.SendPackets(b.N, payload); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "packets/s")
			b.ReportMetric(float64(s.Stats().Retransmits-before.Retransmits)/float64(b.N), "retransmits/op")
		})
	}
}
