package conn

import (
	"fmt"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

// TestRestartUnheard: a process dies without a word and another begins at its address, and says nothing. A peer that still believes in
// the old one is told by its first packet, whatever its types of service, and what it sends arrives; one that sends nothing is left
// alone until its heartbeat.
func TestRestartUnheard(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for _, tos := range []uint8{0, 3} {
			if dialect == DialectKernelOnly && tos != 0 {
				continue // a kernel's connections do not know of each other
			}
			t.Run(fmt.Sprintf("%v/%d", dialect, tos), func(t *testing.T) {
				bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
					mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
					a, b := newHost(t, net, addrA), newHost(t, net, addrB, mod)
					var o testOwner
					c, err := a.m.Get(addrA, addrB, tos)
					if err != nil {
						t.Fatal(err)
					}
					c.Send(&o, 1, 2, []byte("to the first"))
					eventually(t, "acknowledged", time.Second, func() bool { return o.count() == 1 })
					time.Sleep(time.Second)
					net.Partition(addrA, addrB)
					b.close(0)
					net.Heal(addrA, addrB)
					b = newHost(t, net, addrB, mod)
					time.Sleep(500 * time.Millisecond)
					if n := a.m.Stats().Established; n != 1 {
						t.Errorf("up %d times, and nobody has said anything", n)
					}
					start := time.Now()
					c.Send(&o, 1, 2, []byte("to the second"))
					eventually(t, "acknowledged", 20*time.Second, func() bool { return o.count() == 2 })
					if d := time.Since(start); d > 500*time.Millisecond {
						t.Errorf("acknowledged after %v", d)
					}
					if got := b.sink.take(); len(got) != 1 || string(got[0].data) != "to the second" {
						t.Errorf("%d messages", len(got))
					}
					if s := b.m.Stats(); s.StrayConnects != 1 {
						t.Errorf("%d connects", s.StrayConnects)
					}
					a.close(10 * time.Second)
					b.close(10 * time.Second)
				})
			})
		}
	}
}

// TestStrayIgnored: packets for queue pairs that do not exist cost nothing but in a process that has just begun, and from whom it has
// nothing to do with.
func TestStrayIgnored(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		a.conn(addrB).Send(&o, 1, 2, []byte("hello"))
		eventually(t, "acknowledged", time.Second, func() bool { return o.count() == 1 })
		sa, sb := a.m.sites[addrA], b.m.sites[addrB]
		sb.stray(addrA) // we have a connection with it
		sa.stray(addrC) // there is nobody
		if n := a.m.Stats().Conns; n != 2 {
			t.Errorf("%d connections", n)
		}
		time.Sleep(30 * time.Second)
		sa.stray(addrC) // too late
		if sa, sb := a.m.Stats(), b.m.Stats(); sa.Conns != 1 || sb.Conns != 1 || sa.StrayConnects != 1 || sb.StrayConnects != 0 {
			t.Errorf("%d and %d connections, %d and %d of them for strays", sa.Conns, sb.Conns, sa.StrayConnects, sb.StrayConnects)
		}
		a.close(time.Second)
		sa.stray(addrC)
		b.close(time.Second)
	})
}
