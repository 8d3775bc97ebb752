package rds

import (
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// BenchmarkSlowPeer is the rate of seven streams beside an eighth whose reader has stopped: it holds 10,000 messages that were lent to it,
// its queue is full, its port congested, and its writer blocked. with/without is that rate in relation to the one without the eighth, both
// measured in turn in the same run; the budget is 0.95. cpu-with/without is the processor time of a datagram in relation, which does not
// depend on who else uses the machine. The streams go from one host to one other, over one connection, or from one to
// eight.
func BenchmarkSlowPeer(b *testing.B) {
	b.Run("same host", func(b *testing.B) {
		benchSlowPeer(b, func(int) netip.Addr { return loB })
	})
	b.Run("other hosts", func(b *testing.B) {
		benchSlowPeer(b, func(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 6, byte(i + 1)}) })
	})
}

func benchSlowPeer(b *testing.B, host func(int) netip.Addr) {
	const (
		size  = 64
		burst = 30000 // datagrams of a stream between two looks at the clock
		warm  = 5000  // and before the first: what the eighth has filled its queue with is not in anybody's pool any more
	)
	sa, sb := openUDP(b, Config{}), openUDP(b, Config{})
	var as, bs []*Socket
	for i := range 8 {
		as = append(as, bind(b, sa, ap(loA, uint16(4000+i))))
		bs = append(bs, bind(b, sb, ap(host(i), uint16(4000+i))))
		mustWrite(b, as[i], nil, bs[i].AddrPort()) // connects
		wantRead(b, bs[i], nil, as[i].AddrPort())
	}
	slow := slowReader{b: b, from: as[7], to: bs[7]}
	run := func(burst int) (wall, cpu time.Duration) {
		var wg sync.WaitGroup
		start, used := time.Now(), cpuTime()
		for i := range 7 {
			wg.Go(func() {
				p := make([]byte, size)
				for range burst {
					if _, err := as[i].WriteToAddrPort(p, bs[i].AddrPort()); err != nil {
						b.Error(err)
						return
					}
				}
			})
			wg.Go(func() {
				p := make([]byte, size)
				for range burst {
					if _, _, err := bs[i].ReadFromAddrPort(p); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return time.Since(start), cpuTime() - used
	}
	var ratios, cpus []float64
	var took time.Duration
	b.ReportAllocs()
	b.SetBytes(2 * 7 * burst * size)
	b.StopTimer()
	for n := range b.N {
		var with, without, cpuWith, cpuWithout time.Duration
		for k := range 2 {
			stopped := (n+k)%2 == 0
			if stopped {
				slow.begin()
			}
			run(warm)
			b.StartTimer()
			wall, cpu := run(burst)
			b.StopTimer()
			if stopped {
				slow.end()
				with, cpuWith = wall, cpu
			} else {
				without, cpuWithout = wall, cpu
			}
		}
		ratios = append(ratios, without.Seconds()/with.Seconds())
		cpus = append(cpus, cpuWith.Seconds()/cpuWithout.Seconds())
		took += with
	}
	slices.Sort(ratios)
	slices.Sort(cpus)
	b.ReportMetric(cpus[len(cpus)/2], "cpu-with/without")
	b.ReportMetric(ratios[len(ratios)/2], "with/without")
	b.ReportMetric(float64(b.N*7*burst)/took.Seconds(), "msgs/s")
}

// cpuTime is what the process has used so far.
func cpuTime() time.Duration {
	var ru syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru) // cannot fail with these arguments
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// slowReader is a stream whose reader stops.
type slowReader struct {
	b        *testing.B
	from, to *Socket
	held     []*Message
	done     chan int // what the writer has written
}

// begin returns when the reader has stopped and the writer is blocked.
func (s *slowReader) begin() {
	s.done = make(chan int)
	go func() {
		p, n := make([]byte, 64), 0
		for ; ; n++ {
			if _, err := s.from.WriteToAddrPort(p, s.to.AddrPort()); err != nil {
				break
			}
		}
		s.done <- n
	}()
	for range 10000 {
		m, err := s.to.Receive(s.b.Context())
		if err != nil {
			s.b.Fatal(err)
		}
		s.held = append(s.held, m)
	}
	for !s.to.q.congested.Load() {
		time.Sleep(time.Millisecond)
	}
}

// end has all of it read.
func (s *slowReader) end() {
	if !s.to.q.congested.Load() {
		s.b.Error("the port did not stay congested")
	}
	s.from.SetWriteDeadline(time.Unix(1, 0))
	n := <-s.done
	s.from.SetWriteDeadline(time.Time{})
	p := make([]byte, 64)
	for range n - len(s.held) {
		if _, _, err := s.to.ReadFromAddrPort(p); err != nil {
			s.b.Fatal(err)
		}
	}
	for _, m := range s.held {
		m.Release()
	}
	s.held = s.held[:0]
}
