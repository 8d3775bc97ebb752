package conn

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
)

// holdREQ has the network keep the REQs of an address until free.
type holdREQ struct {
	mu   sync.Mutex
	held []simnet.Event
}

func (h *holdREQ) of(net *simnet.Net, from netip.Addr) {
	net.SetFilter(func(e simnet.Event) bool {
		var p roce.Packet
		if e.From.Addr() != from || roce.Parse(e.Data, &p) != nil || p.BTH.DestQP() != 1 {
			return false
		}
		if hd, err := cm.PeekHeader(p.Payload); err != nil || hd.Attr != cm.AttrREQ {
			return false
		}
		e.Data = append([]byte(nil), e.Data...)
		h.mu.Lock()
		h.held = append(h.held, e)
		h.mu.Unlock()
		return true
	})
}

func (h *holdREQ) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.held)
}

// TestLateREQ: a REQ that the network brings when its duel has long been settled, or its attempt given up, does not end what was
// established since. Nor does one of a process that is no more; and one of a process that is new still does.
func TestLateREQ(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		low, high := addrA, addrB
		if v6 {
			low, high = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
		}
		link := simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}}
		// check sends both ways, lets the late packets loose, and sends again.
		check := func(t *testing.T, net *simnet.Net, a, b *host, h *holdREQ) {
			t.Helper()
			rng := rand.New(rand.NewPCG(1, 1))
			ab, ba := &stream{port: 4001, rng: rng}, &stream{port: 4002, rng: rng}
			ab.send(t, a.conn(b.addr), 5)
			ba.send(t, b.conn(a.addr), 5)
			eventually(t, "up", 10*time.Second, func() bool { return b.sink.len() >= ab.sent && a.sink.len() >= ba.sent })
			was := []uint64{a.m.Stats().Established, b.m.Stats().Established}
			if h.len() == 0 {
				t.Fatal("no REQ was held back")
			}
			for _, e := range h.held {
				net.Inject(e)
				ab.send(t, a.conn(b.addr), 5)
				ba.send(t, b.conn(a.addr), 5)
				time.Sleep(3 * time.Millisecond)
			}
			time.Sleep(5 * time.Second)
			checkStreams(t, b.sink.take(), ab)
			checkStreams(t, a.sink.take(), ba)
			for i, x := range []*host{a, b} {
				if s := x.m.Stats(); s.Established != was[i] || s.IBListenClosedStale != 0 {
					t.Errorf("%v: up %d times more, %d live connections ended", x.addr, s.Established-was[i], s.IBListenClosedStale)
				}
			}
			if n := a.m.Stats().AcceptLate + b.m.Stats().AcceptLate; n == 0 {
				t.Error("none was found late")
			}
		}
		t.Run(fmt.Sprintf("v6=%v/duel", v6), func(t *testing.T) {
			bubble(t, 1, link, func(t *testing.T, net *simnet.Net) {
				a, b := newHost(t, net, low), newHost(t, net, high)
				var h holdREQ
				h.of(net, high)
				var o testOwner
				b.conn(low).Send(&o, 1, 4009, nil)
				time.Sleep(time.Millisecond) // its REQ is on its way
				a.conn(high).Send(&o, 1, 4009, nil)
				eventually(t, "up", time.Second, func() bool { n, _ := o.get(); return n == 2 })
				net.SetFilter(nil)
				a.sink.reset()
				b.sink.reset()
				check(t, net, a, b, &h)
				a.close(time.Second)
				b.close(time.Second)
			})
		})
		t.Run(fmt.Sprintf("v6=%v/given up", v6), func(t *testing.T) {
			bubble(t, 1, link, func(t *testing.T, net *simnet.Net) {
				a, b := newHost(t, net, low), newHost(t, net, high)
				var h holdREQ
				h.of(net, low)
				var o testOwner
				a.conn(high).Send(&o, 1, 4009, nil)
				time.Sleep(5 * time.Second) // two attempts and more
				net.SetFilter(nil)
				eventually(t, "up", 5*time.Second, func() bool { n, _ := o.get(); return n == 1 })
				b.sink.reset()
				check(t, net, a, b, &h)
				a.close(time.Second)
				b.close(time.Second)
			})
		})
		if v6 {
			continue // its REQ does not name its process
		}
		t.Run("dead process", func(t *testing.T) {
			bubble(t, 1, link, func(t *testing.T, net *simnet.Net) {
				a, b := newHost(t, net, low), newHost(t, net, high)
				var h holdREQ
				var o testOwner
				b.conn(low).Send(&o, 1, 4009, nil)
				eventually(t, "up", time.Second, func() bool { n, _ := o.get(); return n == 1 })
				h.of(net, high)
				b.conn(low).failLink(errStale) // it comes back at once
				eventually(t, "a REQ", time.Second, func() bool { return h.len() > 0 })
				net.Partition(low, high) // killed
				b.close(0)
				net.Heal(low, high)
				net.SetFilter(nil)
				b = newHost(t, net, high)
				b.conn(low).Send(&o, 1, 4009, nil)
				eventually(t, "up again", 10*time.Second, func() bool { n, _ := o.get(); return n == 2 })
				if s := a.m.Stats(); s.PeerRestarted != 1 {
					t.Errorf("%d restarts noticed", s.PeerRestarted)
				}
				a.sink.reset()
				check(t, net, a, b, &h)
				a.close(time.Second)
				b.close(time.Second)
			})
		})
	}
}

// TestRestartByTOS: a process that is new has connected for one type of service. Its REQ for another one, where its predecessor's connection is
// not known to be dead yet, is no late one, whatever its number: the two processes count on their own.
func TestRestartByTOS(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		with := func(inc uint64) func(*hostOptions) {
			return func(o *hostOptions) { o.cfg.Incarnation = inc } // attempts are counted from there
		}
		a, b := newHost(t, net, addrA), newHost(t, net, addrB, with(1000))
		var o testOwner
		send := func(tos uint8) {
			t.Helper()
			c, err := b.m.Get(addrB, addrA, tos)
			if err != nil {
				t.Fatal(err)
			}
			n := a.sink.len()
			c.Send(&o, 1, 2, nil)
			eventually(t, "arrives", 100*time.Millisecond, func() bool { return a.sink.len() > n })
		}
		send(0)
		send(1)
		net.Partition(addrA, addrB) // killed
		b.close(0)
		net.Heal(addrA, addrB)
		b = newHost(t, net, addrB, with(990))
		send(0)
		send(1)
		if s := a.m.Stats(); s.AcceptLate != 0 {
			t.Errorf("%d requests taken for late ones", s.AcceptLate)
		}
		b.close(time.Second)
		a.close(time.Second)
	})
}
