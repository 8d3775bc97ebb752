//go:build linux

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
)

// Addresses of the lab's only link. The host's are on the bridge lab0, those of a guest on its eth0: GuestAddr4
// and GuestAddr6 are the first guest's, that of a second one (Guest.Addr4, Guest.Addr6) ends in 3.
const (
	HostAddr4  = "10.77.0.1"
	GuestAddr4 = "10.77.0.2"
	HostAddr6  = "fd00:77::1"
	GuestAddr6 = "fd00:77::2"
)

// Names of the link's ends, and of a guest's soft RoCE device.
const (
	HostLink  = "lab0"
	GuestLink = "eth0"
	RXE       = "rxe0"
)

// MaxGuests is how many machines run at the same time.
const MaxGuests = 2

// link is the state of the link: the bridge HostLink with a tap device for each guest.
var link struct {
	sync.Mutex
	guests [MaxGuests]*Guest // running or starting, by number - 1
	extra  []string          // AddHostAddr's, in ip(8)'s form
}

// makeLink makes the bridge, with the host's addresses. Once, in a new network namespace.
func makeLink() error {
	for _, args := range [][]string{
		{"link", "add", HostLink, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"},
		{"link", "set", HostLink, "address", "52:54:00:77:00:01", "up"},
		{"addr", "add", HostAddr4 + "/24", "dev", HostLink},
		{"addr", "add", HostAddr6 + "/64", "dev", HostLink, "nodad"},
	} {
		if err := ip(args...); err != nil {
			return err
		}
	}
	// IPv6 addresses stay when the link goes down, as IPv4 ones do.
	return os.WriteFile("/proc/sys/net/ipv6/conf/"+HostLink+"/keep_addr_on_down", []byte("1"), 0)
}

// plug gives g the first free place on the link, and makes its tap device.
func (g *Guest) plug() error {
	link.Lock()
	defer link.Unlock()
	for i, other := range link.guests {
		if other != nil {
			continue
		}
		g.number = i + 1
		_ = ip("link", "del", g.tap()) // of a guest that has just gone
		for _, args := range [][]string{
			{"tuntap", "add", g.tap(), "mode", "tap"},
			// Room for a whole READ response of 1 MiB at path MTU 1024: it comes in one go, and the guest is slow.
			{"link", "set", g.tap(), "mtu", fmt.Sprint(g.mtu), "txqueuelen", "16384", "master", HostLink, "up"},
			{"link", "set", HostLink, "mtu", fmt.Sprint(g.mtu)},
		} {
			if err := ip(args...); err != nil {
				return err
			}
		}
		link.guests[i] = g
		return nil
	}
	return fmt.Errorf("%d guests are running already", MaxGuests)
}

// unplug removes the tap device. With the last guest go the addresses that were added: the next one has heard of nobody.
func (g *Guest) unplug() {
	link.Lock()
	defer link.Unlock()
	if g.number == 0 || link.guests[g.number-1] != g {
		return
	}
	_ = ip("link", "del", g.tap())
	link.guests[g.number-1] = nil
	if link.guests == [MaxGuests]*Guest{} {
		for _, a := range link.extra {
			_ = ip("addr", "del", a, "dev", HostLink)
		}
		link.extra = nil
	}
}

// running are the guests of this moment.
func running() (gs []*Guest) {
	link.Lock()
	defer link.Unlock()
	for _, g := range link.guests {
		if g != nil {
			gs = append(gs, g)
		}
	}
	return gs
}

// tap is the name of the host's end of g's cable.
func (g *Guest) tap() string { return fmt.Sprintf("lab%d", g.number) }

func (g *Guest) mac() string { return fmt.Sprintf("52:54:00:77:00:%02x", g.number+1) }

// Number is 1 for the first of the guests that run at the same time, 2 for the second.
func (g *Guest) Number() int { return g.number }

// Addr4 is the guest's IPv4 address.
func (g *Guest) Addr4() string { return fmt.Sprintf("10.77.0.%d", g.number+1) }

// Addr6 is the guest's IPv6 address.
func (g *Guest) Addr6() string { return fmt.Sprintf("fd00:77::%d", g.number+1) }

// AddHostAddr adds an address to the host's end of the link, in the network of like, and returns it. It is
// another one at each call and goes with the last guest.
func (g *Guest) AddHostAddr(t testing.TB, like netip.Addr) netip.Addr {
	t.Helper()
	link.Lock()
	defer link.Unlock()
	b, bits := like.AsSlice(), 24
	if like.Is6() {
		bits = 64
	}
	n := 16 + len(link.extra) // behind the fixed ones
	b[len(b)-1] = byte(n)
	addr, _ := netip.AddrFromSlice(b)
	err := errors.New("there are no more")
	text := fmt.Sprintf("%v/%d", addr, bits)
	if n < 255 {
		err = ip("addr", "add", text, "dev", HostLink, "nodad")
	}
	if err != nil {
		t.Fatalf("address %v: %v", addr, err)
	}
	link.extra = append(link.extra, text)
	return addr
}
