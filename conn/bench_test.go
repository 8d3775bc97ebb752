package conn

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs/softroce"
)

type countSink struct {
	testSink
	n, bytes atomic.Int64
}

func (s *countSink) Deliver(c *Conn, msgs []Incoming) int {
	b := 0
	for i := range msgs {
		b += msgs[i].Len
	}
	s.n.Add(int64(len(msgs)))
	s.bytes.Add(int64(b))
	return len(msgs)
}

type windowOwner struct{ inFlight atomic.Int64 }

func (o *windowOwner) Released(msgs, bytes int, _ bool) { o.inFlight.Add(-int64(msgs)) }

// BenchmarkLoopback sends from one Manager to another in the same process, over UDP, with at most 4 MiB (or 4096
// messages) not acknowledged.
func BenchmarkLoopback(b *testing.B) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for _, size := range []int{64, 4096, 65536, 1 << 20} {
			b.Run(fmt.Sprintf("dialect=%v/size=%d", dialect, size), func(b *testing.B) {
				var sink countSink
				mod := func(o *hostOptions) { o.cfg.Dialect = dialect; o.sr = softroce.Config{Port: 14791} }
				local, remote := ownLoopback(21), ownLoopback(22)
				x := newHost(b, nil, local, mod)
				y := newHost(b, nil, remote, mod, func(o *hostOptions) { o.cfg.Sink = &sink })
				c := x.conn(remote)
				p := make([]byte, size)
				var o windowOwner
				limit := int64(min(32768, max(2, (4<<20)/size)))
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i++ {
					if o.inFlight.Load() >= limit {
						c.Flush()
						for o.inFlight.Load() >= limit {
							if !x.m.Progress() {
								time.Sleep(20 * time.Microsecond)
							}
						}
					}
					o.inFlight.Add(1)
					if err := c.Send(&o, 1000, 1000, p); err != nil {
						b.Fatal(err)
					}
				}
				c.Flush()
				for sink.n.Load() < int64(b.N) {
					time.Sleep(20 * time.Microsecond)
				}
				b.StopTimer()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
				st := x.m.Stats()
				b.ReportMetric(float64(st.SendBytes)/float64(st.SendSends), "bytes/SEND")
				if os.Getenv("CONN_STATS") != "" {
					b.Logf("%+v\n%+v\n%+v\n%+v", st, x.reg.Devices()[0].Stats(), y.m.Stats(), y.reg.Devices()[0].Stats())
				}
				x.close(time.Second)
				y.close(time.Second)
			})
		}
	}
}
