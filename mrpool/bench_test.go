package mrpool

import (
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

const (
	benchBytes = 64 << 10
	benchSends = 128
	benchPool  = 512 // requests for the pools: how many are outstanding before the queue must move
)

func benchStack(b *testing.B) *testStack {
	s := newStack(softroce.New(softroce.Config{}), "127.0.6.1", "127.0.6.2")
	s.pool, s.extra = benchPool, benchSends
	if err := s.open(); err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkPoolMapUnmap64K maps and unmaps 64 KiB, with SENDs outstanding ahead of the requests in the queue. Counted is all
// that mapping and unmapping take: posting, their execution, which posting brings about, and what their completions take
// once the SENDs are acknowledged. Not counted is what the SENDs take: the queue moves on outside the count each time the
// pools' part of it is full.
func BenchmarkPoolMapUnmap64K(b *testing.B) {
	for _, sends := range []int{0, benchSends} {
		b.Run(map[int]string{0: "idle", benchSends: "sends=128"}[sends], func(b *testing.B) {
			s := benchStack(b)
			defer s.close(b)
			peer, x := s.side[0], s.side[1]
			req := Request{Segs: [][]byte{s.mem[:benchBytes:benchBytes]}, Access: rw}
			recv := make([]verbs.RecvWR, benchSends)
			send := make([]verbs.SendWR, benchSends)
			for i := range send {
				send[i] = verbs.SendWR{Opcode: verbs.OpSend}
			}
			send[benchSends-1].Flags = verbs.SendSignaled
			var ours []verbs.WC // of the pools, handed on inside the count
			q := s.q
			s.q = nil // the handler leaves completions to us
			round := func(pairs int) (spent time.Duration) {
				if sends > 0 {
					if n, err := peer.qp.PostRecv(recv); n != len(recv) {
						b.Fatal(err)
					}
					if n, err := x.qp.PostSend(send); n != len(send) {
						b.Fatal(err)
					}
				}
				start := time.Now()
				for range pairs {
					m, err := q.Map(req)
					if err != nil {
						b.Fatal(err)
					}
					if err = m.Unmap(nil); err != nil {
						b.Fatal(err)
					}
				}
				spent = time.Since(start)
				// What completes when the SENDs do. The handlers of this rig collect them.
				ours = ours[:0]
				got, want := 0, 2*pairs/maxUnsignaled
				for end := time.Now().Add(5 * time.Second); got < want || sends > 0 && len(ours) == got; {
					s.mu.Lock()
					for i := range s.wcs {
						if s.wcs[i].ID&WRBit != 0 {
							got++
						}
					}
					ours = append(ours, s.wcs...)
					s.wcs = s.wcs[:0]
					s.mu.Unlock()
					if x.dev.(verbs.Progresser).Progress() || peer.dev.(verbs.Progresser).Progress() {
						continue
					}
					if time.Now().After(end) {
						b.Fatalf("%d of %d completions", got, want)
					}
				}
				start = time.Now()
				for i := range ours {
					q.Completion(&ours[i])
				}
				return spent + time.Since(start)
			}
			round(benchPool / 2)
			b.ReportAllocs()
			b.ResetTimer()
			var spent time.Duration
			for left := b.N; left > 0; {
				n := min(left, benchPool/2) / 8 * 8 // the last of a round is signaled
				n = max(n, 8)
				spent += round(n)
				left -= n
			}
			b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "ns/op")
			s.q = q
		})
	}
}

// BenchmarkRegDereg64K is the same by plain registration: what the pools are there to spare.
func BenchmarkRegDereg64K(b *testing.B) {
	s := benchStack(b)
	defer s.close(b)
	mem := s.mem[:benchBytes:benchBytes]
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		mr, err := s.side[1].pd.RegMR(mem, 0, rw)
		if err != nil {
			b.Fatal(err)
		}
		if err := mr.Deregister(); err != nil {
			b.Fatal(err)
		}
	}
}
