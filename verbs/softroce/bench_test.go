package softroce

import (
	"fmt"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// BenchmarkStream is a one-way stream of SENDs between two devices of this process over loopback
// UDP: posting, segmentation, ICRC, socket, ICRC, placement, completion, acknowledgement.
func BenchmarkStream(b *testing.B) {
	for _, size := range []int{112, 4144, 61440} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			tp := newTestPair(b, Config{}, "127.0.0.13", "127.0.0.14", verbs.MTU4096)
			defer tp.shut(b)
			const depth = 64
			var recv [depth]verbs.RecvWR
			for i := range recv {
				recv[i] = verbs.RecvWR{ID: uint64(i), SGs: tp.sge(1, i*61440, 61440)}
			}
			if _, err := tp.qp[1].PostRecv(recv[:]); err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				var wcs [depth]verbs.WC
				idle := 0
				for got := 0; got < b.N; {
					n := tp.cq[1].Poll(wcs[:])
					for _, wc := range wcs[:n] {
						if wc.Status != verbs.WCSuccess {
							b.Error(wc.Err())
							return
						}
						tp.qp[1].PostRecv(recv[wc.ID : wc.ID+1])
					}
					if got += n; n == 0 && !tp.dev[1].Progress() {
						if idle++; idle > 100 {
							time.Sleep(20 * time.Microsecond)
						}
					} else {
						idle = 0
					}
				}
			}()
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			out := 0
			var wcs [depth]verbs.WC
			wr := []verbs.SendWR{{Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, size)}}
			for i := 0; i < b.N; i++ {
				for idle := 0; out >= depth/2; idle++ {
					n := tp.cq[0].Poll(wcs[:])
					if n == 0 && !tp.dev[0].Progress() && idle > 100 {
						time.Sleep(20 * time.Microsecond)
					}
					for _, wc := range wcs[:n] {
						if wc.Status != verbs.WCSuccess {
							b.Fatal(wc.Err())
						}
					}
					out -= n
				}
				if _, err := tp.qp[0].PostSend(wr); err != nil {
					b.Fatal(err)
				}
				out++
			}
			<-done
			b.StopTimer()
			s := tp.dev[0].Stats()
			r := tp.dev[1].Stats()
			b.Logf("rnr %d seqnak %d implied %d timeouts %d probes %d dup %d icrc %d sockdrops %d", s["rnr_nak_received"], s["seq_nak_received"], s["implied_nak"], s["timeouts"], s["probes"], r["duplicate_requests"], r["rx_bad_icrc"], r["rx_socket_drops"])
			b.ReportMetric(float64(s["retransmits"])/float64(b.N), "retransmits/op")
			b.ReportMetric(float64(s["tx_packets"])/float64(s["tx_trains"]), "packets/train")
		})
	}
}

// BenchmarkRDMA moves a megabyte at a time between two devices of this process over loopback UDP.
func BenchmarkRDMA(b *testing.B) {
	for _, op := range []verbs.SendOpcode{verbs.OpRead, verbs.OpWrite} {
		for _, depth := range []int{1, 4} {
			b.Run(fmt.Sprintf("%v/%d", op, depth), func(b *testing.B) {
				tp := newTestPair(b, Config{}, "127.0.0.13", "127.0.0.14", verbs.MTU4096)
				defer tp.shut(b)
				const size = 1 << 20
				b.SetBytes(size)
				b.ReportAllocs()
				var wcs [16]verbs.WC
				wr := []verbs.SendWR{{Opcode: op, Flags: verbs.SendSignaled, RemoteAddr: 0x1000, RKey: tp.mr[1].RKey(), SGs: tp.sge(0, 0, size)}}
				out := 0
				for i := 0; i < b.N || out > 0; {
					if i < b.N && out < depth {
						if _, err := tp.qp[0].PostSend(wr); err != nil {
							b.Fatal(err)
						}
						out++
						i++
						continue
					}
					n := tp.cq[0].Poll(wcs[:])
					for _, wc := range wcs[:n] {
						if wc.Status != verbs.WCSuccess {
							b.Fatal(wc.Err())
						}
					}
					if out -= n; n == 0 && !tp.dev[0].Progress() {
						time.Sleep(20 * time.Microsecond)
					}
				}
				b.StopTimer()
				s, r := tp.dev[0].Stats(), tp.dev[1].Stats()
				b.ReportMetric(float64(s["retransmits"])/float64(b.N), "retransmits/op")
				b.ReportMetric(float64(s["rx_socket_drops"]+r["rx_socket_drops"])/float64(b.N), "drops/op")
				b.ReportMetric(float64(r["tx_packets"]+s["tx_packets"])/float64(r["tx_trains"]+s["tx_trains"]), "packets/train")
			})
		}
	}
}
