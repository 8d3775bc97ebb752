//go:build linux

package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// host is a network namespace with one end of a veth pair.
type host struct {
	ns   netns.NsHandle
	addr netip.Addr
}

// do runs f on a thread in the namespace, which is thrown away afterwards.
func (h host) do(f func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := netns.Set(h.ns); err != nil {
			errc <- err
			return
		}
		errc <- f()
	}()
	return <-errc
}

// pair makes two hosts joined by a veth pair with segmentation and checksum offloads off.
func pair(t *testing.T, mtu int) [2]host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	var hs [2]host
	for i := range hs {
		errc := make(chan error)
		go func() {
			runtime.LockOSThread()
			var err error
			hs[i].ns, err = netns.New()
			errc <- err
		}()
		if err := <-errc; err != nil {
			t.Skipf("no network namespaces here: %v", err)
		}
		hs[i].addr = netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})
		t.Cleanup(func() { hs[i].ns.Close() })
	}
	must("veth", hs[0].do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "rds0", MTU: mtu}, PeerName: "rds1", PeerNamespace: netlink.NsFd(hs[1].ns), PeerMTU: uint32(mtu)})
	}))
	for i, h := range hs {
		must("interface", h.do(func() error {
			l, err := netlink.LinkByName(fmt.Sprintf("rds%d", i))
			if err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			for _, err := range []error{
				netlink.LinkSetMTU(l, mtu),
				netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: h.addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}),
				offloads(l.Attrs().Name),
				netlink.LinkSetUp(l),
				netlink.LinkSetUp(lo),
			} {
				if err != nil {
					return err
				}
			}
			return nil
		}))
	}
	return hs
}

// offloads switches TSO, GSO, GRO and transmit checksums of an interface off (ethtool(8), -K).
func offloads(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, cmd := range []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SGRO} {
		value := struct{ cmd, data uint32 }{cmd, 0}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data uintptr
			_    [16]byte
		}
		copy(req.name[:], name)
		req.data = uintptr(unsafe.Pointer(&value))
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return fmt.Errorf("ethtool command %#x on %s: %w", cmd, name, errno)
		}
		runtime.KeepAlive(&value)
	}
	return nil
}

// lossRule drops one in every n UDP packets that arrive at h, at random, and returns a function that
// reads how many it saw and how many it dropped.
func lossRule(t *testing.T, h host, n uint32) func() (seen, dropped uint64) {
	t.Helper()
	var c *nftables.Conn
	var tab *nftables.Table
	var ch *nftables.Chain
	err := h.do(func() (err error) {
		if c, err = nftables.New(nftables.AsLasting()); err != nil {
			return err
		}
		tab = c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "loss"})
		ch = c.AddChain(&nftables.Chain{Name: "in", Table: tab, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
		udp := func(more ...expr.Any) []expr.Any {
			return append([]expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			}, more...)
		}
		zero := make([]byte, 4)
		binary.NativeEndian.PutUint32(zero, 0)
		c.AddRule(&nftables.Rule{Table: tab, Chain: ch, Exprs: udp(&expr.Counter{})})
		c.AddRule(&nftables.Rule{Table: tab, Chain: ch, Exprs: udp(
			&expr.Numgen{Register: 1, Modulus: n, Type: unix.NFT_NG_RANDOM},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: zero},
			&expr.Counter{},
			&expr.Verdict{Kind: expr.VerdictDrop},
		)})
		return c.Flush()
	})
	if err != nil {
		t.Skipf("no nftables here: %v", err)
	}
	t.Cleanup(func() { c.CloseLasting() })
	return func() (seen, dropped uint64) {
		rules, err := c.GetRules(tab, ch)
		if err != nil || len(rules) != 2 {
			t.Fatalf("reading the rules: %d, %v", len(rules), err)
		}
		var got [2]uint64
		for i, r := range rules {
			for _, e := range r.Exprs {
				if k, ok := e.(*expr.Counter); ok {
					got[i] = k.Packets
				}
			}
		}
		return got[0], got[1]
	}
}

// TestRootVethLoss runs two processes in network namespaces of their own, joined by a veth pair without
// segmentation offload, on which one packet of a hundred is dropped each way. Everything arrives once and in
// order.
func TestRootVethLoss(t *testing.T) {
	for _, mtu := range []int{1500, 9000} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			hs := pair(t, mtu)
			seenA := lossRule(t, hs[0], 100)
			seenB := lossRule(t, hs[1], 100)
			a := role{Local: hs[0].addr, Remote: hs[1].addr, Ports: []uint16{4000, 4001}, Seed: 1, PeerSeed: 2, Count: 10_000, Expect: 10_000, MaxSize: 1 << 20}
			b := a
			b.Local, b.Remote, b.Seed, b.PeerSeed = a.Remote, a.Local, 2, 1
			begin := time.Now()
			pa, pb := start(t, a, hs[0].do), start(t, b, hs[1].do)
			la, lb := pa.expect("done", 2*time.Minute), pb.expect("done", 2*time.Minute)
			var lost [2]float64
			for i, f := range []func() (uint64, uint64){seenA, seenB} {
				seen, dropped := f()
				if seen == 0 || dropped == 0 {
					t.Fatalf("host %d: %d packets seen, %d dropped: the rule does not work", i, seen, dropped)
				}
				lost[i] = 100 * float64(dropped) / float64(seen)
			}
			t.Logf("40000 datagrams in %v; measured loss %.2f %% and %.2f %%; %s / %s", time.Since(begin).Round(time.Millisecond), lost[0], lost[1], la, lb)
		})
	}
}
