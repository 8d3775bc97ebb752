package rds

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/conn"
)

// TestWakeIsPassedOn: a writer that is woken for room and cannot use it, because its destination has become congested in the meantime or holds its
// share, leaves it to the next one. The wake may have been the last.
func TestWakeIsPassedOn(t *testing.T) {
	addrC, addrD := netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4")
	type msg struct {
		to netip.Addr
		n  int
	}
	congested := func(_ *Socket, tr *fakeTransport) { tr.SetCongested(addrC, 7, true) }
	for name, c := range map[string]struct {
		fill   []msg                              // all of the buffer
		then   func(a *Socket, tr *fakeTransport) // when one writer waits to send to C, and then another one to B
		acked  int                                // of fill, as one
		second netip.Addr
	}{
		"buffer, congestion": {[]msg{{addrC, 4000}, {addrC, 4000}}, congested, 2, addrC},
		"share, congestion":  {[]msg{{addrB, 2000}, {addrC, 4000}}, congested, 2, addrC},
		"buffer, share": {[]msg{{addrD, 2900}, {addrD, 2900}, {addrC, 1200}, {addrB, 1000}}, func(a *Socket, tr *fakeTransport) {
			f := a.flowsTo(addrC)[0] // whoever was faster has filled C's share
			f.out.Add(2800)
			a.others.Add(2800)
		}, 2, addrB},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newFakeNet()
				svc, tr := n.open(t, Config{SendBuffer: 8000})
				a := bind(t, svc, ap(addrA, 4000))
				tr.withhold = true
				for _, m := range c.fill {
					mustWrite(t, a, make([]byte, m.n), ap(m.to, 1))
				}
				var wg sync.WaitGroup
				var done [2]bool
				for i, to := range []netip.AddrPort{ap(addrC, 7), ap(c.second, 8)} {
					wg.Go(func() {
						_, err := a.WriteToAddrPort([]byte("x"), to)
						if err != nil && !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						done[i] = err == nil
					})
					synctest.Wait()
				}
				if done != [2]bool{} {
					t.Fatalf("%v went into a full buffer, or share", done)
				}
				c.then(a, tr)
				tr.ackAtOnce(c.acked)
				synctest.Wait()
				if done != [2]bool{false, true} {
					t.Errorf("writers are through: %v", done)
				}
				a.Close()
				wg.Wait()
			})
		})
	}
}

// ackAtOnce acknowledges the n oldest messages, as one.
func (tr *fakeTransport) ackAtOnce(n int) {
	tr.mu.Lock()
	done := tr.unacked[:n:n]
	tr.unacked = tr.unacked[n:]
	tr.mu.Unlock()
	sum := make(map[conn.Owner]fakeSent)
	for _, s := range done {
		sum[s.o] = fakeSent{s.o, sum[s.o].n + s.n}
	}
	for _, s := range sum {
		msgs := 0
		for _, d := range done {
			if d.o == s.o {
				msgs++
			}
		}
		s.o.Released(msgs, s.n, true)
	}
}
