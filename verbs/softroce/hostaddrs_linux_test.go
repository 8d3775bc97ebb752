package softroce

import (
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// TestReadHostAddrs reads this machine's addresses.
func TestReadHostAddrs(t *testing.T) {
	p := New(Config{})
	stop, err := p.WatchDevices(func(e verbs.DeviceEvent) { t.Logf("event %+v", e) })
	if err != nil {
		t.Skipf("no rtnetlink here: %v", err)
	}
	defer stop()
	p.changes.Lock()
	h := p.host
	p.changes.Unlock()
	if lo := netip.MustParseAddr("127.0.0.1"); !h.lists(lo) || !h.has(lo) || !h.has(netip.MustParseAddr("127.200.3.4")) {
		t.Errorf("addresses %v, nets %v", h.addrs, h.nets)
	}
	if h.has(netip.MustParseAddr("192.0.2.77")) || bindable(netip.MustParseAddr("192.0.2.77")) {
		t.Error("an address for documentation is here")
	}
	for a := range h.addrs {
		if !bindable(a) {
			t.Errorf("%v is listed and cannot be bound to", a)
		}
	}
}

// TestRemoveUDP removes and adds real sockets under traffic, from several goroutines, with somebody polling.
func TestRemoveUDP(t *testing.T) {
	for round := range 5 {
		tp := newTestPair(t, Config{}, "127.0.0.21", "127.0.0.22", verbs.MTU4096)
		p := tp.dev[0].prov
		stop, err := p.WatchDevices(func(verbs.DeviceEvent) {})
		if err != nil {
			t.Logf("no rtnetlink here: %v", err)
			stop = func() {}
		}
		var wg sync.WaitGroup
		end := make(chan struct{})
		work := func(f func()) {
			wg.Go(func() {
				for {
					select {
					case <-end:
						return
					default:
						f()
					}
				}
			})
		}
		for i := range 2 {
			var wcs [64]verbs.WC
			work(func() { tp.dev[i].Progress(); tp.cq[i].Poll(wcs[:]) })
			work(func() {
				tp.qp[i].PostSend([]verbs.SendWR{{Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, SGs: tp.sge(i, 1<<20*i, 100_000), RemoteAddr: 0x1000 + uint64(1<<20*i), RKey: tp.mr[1-i].RKey()}})
				tp.dev[i].Park()
				time.Sleep(10 * time.Microsecond)
			})
		}
		time.Sleep(time.Duration(round) * time.Millisecond)
		for range 2 { // side by side, twice
			var both sync.WaitGroup
			for _, a := range []string{"127.0.0.21", "127.0.0.22"} {
				both.Go(func() {
					addr := netip.MustParseAddr(a)
					if err := p.Remove(addr); err != nil {
						t.Error(err)
					}
					if err := p.Add(addr); err != nil {
						t.Error(err)
					}
					d, err := p.OpenDevice(addr)
					if err != nil {
						t.Errorf("the address of a removed device: %v", err)
						return
					}
					if err := d.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			both.Wait()
		}
		time.Sleep(2 * time.Millisecond)
		close(end)
		wg.Wait()
		for i := range tp.qp {
			if s := tp.qp[i].State(); s != verbs.StateErr {
				t.Errorf("side %d is in %v", i, s)
			}
		}
		tp.shut(t)
		stop()
	}
}

// TestRemoveWhileClosing has Close and Remove meet.
func TestRemoveWhileClosing(t *testing.T) {
	p := New(Config{})
	addr := netip.MustParseAddr("127.0.0.23")
	for range 200 {
		d, err := p.OpenDevice(addr)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := p.Remove(addr); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if err := p.Add(addr); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzParseHostAddrs: whatever the kernel may say, it does no harm.
func FuzzParseHostAddrs(f *testing.F) {
	p := New(Config{})
	if stop, err := p.WatchDevices(func(verbs.DeviceEvent) {}); err == nil {
		for _, kind := range []uint16{syscall.RTM_GETLINK, syscall.RTM_GETADDR} {
			if msgs, _, err := p.mon.dump(kind); err == nil && len(msgs) > 0 {
				f.Add(kind == syscall.RTM_GETADDR, msgs[0].Data)
			}
		}
		stop()
	}
	link := syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: syscall.RTM_NEWLINK}, Data: make([]byte, 16)}
	f.Fuzz(func(t *testing.T, isAddr bool, data []byte) {
		links := []syscall.NetlinkMessage{link}
		addrs := []syscall.NetlinkMessage{{Header: syscall.NlMsghdr{Type: syscall.RTM_NEWADDR}, Data: data}}
		if !isAddr {
			links = []syscall.NetlinkMessage{{Header: syscall.NlMsghdr{Type: syscall.RTM_NEWLINK}, Data: data}}
			addrs[0].Data = make([]byte, 8)
		}
		h, err := parseHostAddrs(links, addrs)
		if err == nil && len(h.addrs) > 1 {
			t.Errorf("%d addresses of one message", len(h.addrs))
		}
	})
}
