//go:build linux

package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestRootInterfaceDown takes the interface and the address that carry the traffic away and brings them back, of one host, of the
// other, and of both, for shorter and longer than it takes to tear a device down. The processes notice, and
// every datagram arrives once and in order.
func TestRootInterfaceDown(t *testing.T) {
	hs := pair(t, 1500)
	a := role{Local: hs[0].addr, Remote: hs[1].addr, Ports: []uint16{4000, 4001}, Seed: 1, PeerSeed: 2, Count: 12_000, Expect: 12_000, MaxSize: 64 << 10, Every: 150 * time.Microsecond}
	b := a
	b.Local, b.Remote, b.Seed, b.PeerSeed = a.Remote, a.Local, 2, 1
	pa, pb := start(t, a, hs[0].do), start(t, b, hs[1].do)
	pa.expect("ready", 10*time.Second)
	pb.expect("ready", 10*time.Second)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	link := func(i int, f func(l netlink.Link) error) {
		t.Helper()
		must(hs[i].do(func() error {
			l, err := netlink.LinkByName(fmt.Sprintf("rds%d", i))
			if err != nil {
				return err
			}
			return f(l)
		}))
	}
	addr := func(i int) *netlink.Addr {
		return &netlink.Addr{IPNet: &net.IPNet{IP: hs[i].addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}
	}
	for _, away := range []time.Duration{50 * time.Millisecond, 700 * time.Millisecond} {
		time.Sleep(200 * time.Millisecond)
		link(0, netlink.LinkSetDown)
		time.Sleep(away)
		link(0, netlink.LinkSetUp)
		time.Sleep(300 * time.Millisecond)
		link(1, func(l netlink.Link) error { return netlink.AddrDel(l, addr(1)) })
		time.Sleep(away)
		link(1, func(l netlink.Link) error { return netlink.AddrAdd(l, addr(1)) })
		time.Sleep(300 * time.Millisecond)
		link(0, netlink.LinkSetDown)
		link(1, netlink.LinkSetDown)
		time.Sleep(away)
		link(0, netlink.LinkSetUp)
		link(1, netlink.LinkSetUp)
	}
	// The address moves to another interface, as some routing set-ups have it.
	link(1, func(l netlink.Link) error { return netlink.AddrDel(l, addr(1)) })
	time.Sleep(100 * time.Millisecond)
	must(hs[1].do(func() error {
		l, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: hs[1].addr.AsSlice(), Mask: net.CIDRMask(32, 32)}})
	}))
	// The way to the peer still leads over the veth pair.
	link(1, func(l netlink.Link) error {
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: hs[0].addr.AsSlice(), Mask: net.CIDRMask(32, 32)}, Src: hs[1].addr.AsSlice()})
	})
	la, lb := pa.expect("done", time.Minute), pb.expect("done", time.Minute)
	t.Logf("%s / %s", la, lb)
	for i, l := range []string{la, lb} {
		var lost, back int
		_, err := fmt.Sscanf(l[strings.Index(l, "devices"):], "devices %d %d", &lost, &back)
		// One less than there were: on a busy machine an outage of 50 ms may be over before anybody has looked.
		want := []int{3, 4}[i]
		if err != nil || lost < want || back != lost {
			t.Errorf("host %d: devices lost %d, back %d, want at least %d", i, lost, back, want)
		}
	}
}
