package conn

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs/softroce"
)

// TestRemovalUDP removes and adds devices with real sockets under many goroutines that send both ways: for the race
// detector.
func TestRemovalUDP(t *testing.T) {
	perSender := 3000
	if testing.Short() {
		perSender = 300
	}
	addrs := [2]byte{5, 6}
	var hs [2]*host
	var sinks [2]*orderSink
	for i := range hs {
		sinks[i] = &orderSink{t: t, next: make(map[uint16]uint64)}
		hs[i] = newHost(t, nil, ownLoopback(addrs[i]), func(o *hostOptions) {
			o.sr = softroce.Config{Port: 24794}
			o.cfg.Sink = sinks[i]
		})
	}
	var senders, rest sync.WaitGroup
	const perHost = 4
	for i, h := range hs {
		c := h.conn(hs[1-i].addr)
		for s := uint16(10); s < 10+perHost; s++ {
			senders.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), uint64(s)))
				var o testOwner
				for n := range uint64(perSender) {
					size := 8 + rng.IntN(2000)
					if rng.IntN(50) == 0 {
						size = 8 + rng.IntN(200_000)
					}
					for {
						err := c.Send(&o, s, s, payload(s, n, size))
						if err == nil {
							break
						}
						if err != ErrNoMemory {
							t.Error(err)
							return
						}
						time.Sleep(time.Millisecond)
					}
					if n%100 == 99 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
	}
	stop := make(chan struct{})
	rest.Go(func() { // somebody who waits, and works
		for {
			select {
			case <-stop:
				return
			default:
				hs[0].m.Progress()
				hs[1].m.Park()
				time.Sleep(20 * time.Microsecond)
			}
		}
	})
	rng := rand.New(rand.NewPCG(1, 2))
	for range 25 {
		h := hs[rng.IntN(2)]
		h.unplug()
		time.Sleep(time.Duration(rng.IntN(3)) * time.Duration(rng.IntN(5000)) * time.Microsecond)
		h.plug()
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
	}
	senders.Wait()
	defer func() {
		if t.Failed() {
			for i, h := range hs {
				t.Logf("%v received %d: %+v", h.addr, sinks[i].count(), h.conn(hs[1-i].addr).Info())
			}
		}
	}()
	eventually(t, "everything arrives", 30*time.Second, func() bool {
		return sinks[0].count() == perHost*perSender && sinks[1].count() == perHost*perSender
	})
	close(stop)
	rest.Wait()
	for i, h := range hs {
		s := h.m.Stats()
		t.Logf("%v: devices lost %d, resets %d, resent %d", h.addr, s.DevicesLost, s.ConnReset, s.SendRetransmit)
		if s.DevicesLost == 0 || s.DevicesLost != s.DevicesBack || s.DrainTimeouts != 0 {
			t.Errorf("devices lost %d, back %d, drain timeouts %d", s.DevicesLost, s.DevicesBack, s.DrainTimeouts)
		}
		sinks[i].mu.Lock()
		for _, b := range sinks[i].lent {
			b.Put()
		}
		sinks[i].mu.Unlock()
	}
	for _, h := range hs {
		if n := h.close(5 * time.Second); n != 0 {
			t.Errorf("%d abandoned", n)
		}
	}
}
