//go:build lab && linux

package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/rds"
)

// twoGuests returns the shared guest and one that ends with t.
func twoGuests(t testing.TB) (a, b *Guest) {
	t.Helper()
	a = guest(t, 4500)
	b = Boot(t, Config{MTU: 4500})
	return a, b
}

// station is a socket of a kernel's or ours in traffic that goes everywhere at once.
type station struct {
	name string
	at   netip.AddrPort
	send func(to netip.AddrPort, seed uint32, sizes []int) error
	recv func(n int) ([]Datagram, error)
}

func kernelStation(name string, k *kernelEnd, o Opened) *station {
	return &station{name: name, at: o.Local,
		send: func(to netip.AddrPort, seed uint32, sizes []int) error {
			var sent Sent
			err := k.call("Send", SendArgs{ID: o.ID, To: to, Seed: seed, Sizes: sizes}, &sent)
			if err == nil && sent.N != len(sizes) {
				err = sent.Errno
			}
			return err
		},
		recv: func(n int) (got []Datagram, err error) {
			err = k.call("Recv", RecvArgs{ID: o.ID, Count: n, Limit: stepLimit}, &got)
			return got, err
		},
	}
}

func ourStation(name string, s *rds.Socket) *station {
	return &station{name: name, at: s.AddrPort(),
		send: func(to netip.AddrPort, seed uint32, sizes []int) error { return sendOurs(s, to, seed, sizes) },
		recv: func(n int) (got []Datagram, err error) {
			buf := make([]byte, 1<<20)
			for range n {
				_ = s.SetReadDeadline(time.Now().Add(stepLimit))
				n, from, err := s.ReadFromAddrPort(buf)
				if err != nil {
					return got, err
				}
				got = append(got, Datagram{From: from, Len: n, Sum: crc(buf[:n])})
			}
			return got, nil
		},
	}
}

// everywhere has each station send sizes to each other one, all at once, and checks what arrives: everything, unchanged, and in
// order from each sender.
func everywhere(t testing.TB, stations []*station, sizes []int) {
	t.Helper()
	seed := func(from, to int) uint32 { return uint32(1+from)*100000 + uint32(to)*10000 }
	var wg sync.WaitGroup
	for i, s := range stations {
		for j, to := range stations {
			if i == j {
				continue
			}
			wg.Go(func() {
				if err := s.send(to.at, seed(i, j), sizes); err != nil {
					t.Errorf("%s to %s: %v", s.name, to.name, err)
				}
			})
		}
		wg.Go(func() {
			got, err := s.recv((len(stations) - 1) * len(sizes))
			if err != nil {
				t.Errorf("%s: %v", s.name, err)
			}
			from := make(map[netip.AddrPort][]Datagram)
			for _, d := range got {
				from[d.From] = append(from[d.From], d)
			}
			for j, sender := range stations {
				if i == j {
					continue
				}
				if err := checkDatagrams(from[sender.at], sender.at, seed(j, i), sizes); err != nil {
					t.Errorf("%s from %s: %v", s.name, sender.name, err)
				}
				delete(from, sender.at)
			}
			if len(from) != 0 {
				t.Errorf("%s has datagrams from nobody: %v", s.name, from)
			}
		})
	}
	wg.Wait()
}

// TestGuests: two guests and the host reach each other.
func TestGuests(t *testing.T) {
	a, b := twoGuests(t)
	if a.Number() == b.Number() || a.Addr4() == b.Addr4() {
		t.Fatalf("guests %d and %d at %s and %s", a.Number(), b.Number(), a.Addr4(), b.Addr4())
	}
	for _, mtu := range []int{1500, 4500} {
		b.SetMTU(t, mtu)
		for _, p := range []struct {
			g  *Guest
			to string
		}{{a, b.Addr4()}, {b, a.Addr4()}, {a, HostAddr4}, {b, HostAddr4}} {
			p.g.Run(t, "busybox", "ping", "-q", "-c1", "-W5", "-s", fmt.Sprint(mtu-28), p.to)
		}
		a.Run(t, "busybox", "ping", "-q", "-c1", "-W5", "-s", fmt.Sprint(mtu-48), b.Addr6())
	}
	if _, err := Start(t.Context(), Config{}); err == nil || !strings.Contains(err.Error(), "running already") {
		t.Errorf("a third guest: %v", err)
	}
}

// TestRDSTwoGuests has two kernels and one Service of ours send to each other, all at once.
func TestRDSTwoGuests(t *testing.T) {
	a, b := twoGuests(t)
	f := freshHost(t, a, ipv4)
	svc := service(t)
	s := listen(t, svc, addrPort(f.host, 4020))
	ka, kb := newKernelEnd(t, a), newKernelEnd(t, b)
	oa, ob := ka.open(OpenArgs{Local: addrPort(a.Addr4(), 0)}), kb.open(OpenArgs{Local: addrPort(b.Addr4(), 0)})
	everywhere(t, []*station{kernelStation("first kernel", ka, oa), kernelStation("second kernel", kb, ob), ourStation("ours", s)}, sizesRDS)
	drained(t, s, ka)
	drained(t, s, kb)
	// A kernel acknowledges what asks for it, and every ninth message does: what comes after the last that did stays with its sender
	// until something else is said (rds-protocol spec 3.6).
	const unasked = 8
	eventually(t, "the kernels' queues to each other drain", func() bool {
		return ka.queued(ob.Local.Addr()) <= unasked && kb.queued(oa.Local.Addr()) <= unasked
	})
	for _, k := range []*kernelEnd{ka, kb} {
		up := 0
		for _, c := range k.conns() {
			if c.Flags&connUp != 0 && (c.Remote == s.AddrPort().Addr() || c.Remote == oa.Local.Addr() || c.Remote == ob.Local.Addr()) {
				up++
				if c.Transport != "infiniband" {
					t.Errorf("connection over %s", c.Transport)
				}
			}
		}
		if up != 2 {
			t.Errorf("a kernel shows %d connections up, want 2: %+v", up, k.conns())
		}
	}
}
