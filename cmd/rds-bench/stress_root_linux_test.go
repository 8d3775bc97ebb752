package main

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNetns is set in a process of the test that has a network namespace for itself.
const inNetns = "RDS_BENCH_TEST_NETNS"

// IPv6 over real sockets: a host has one address of its own, and a test needs two.
func TestStressRootIPv6(t *testing.T) {
	if os.Getenv(inNetns) == "" {
		if os.Geteuid() != 0 {
			t.Skip("needs root for a network namespace")
		}
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestStressRootIPv6$", "-test.v", "-test.timeout=1m")
		cmd.Env = append(os.Environ(), inNetns+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestStressRootIPv6 ") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "rds0"}, PeerName: "rds1"}))
	for _, name := range []string{"lo", "rds0", "rds1"} {
		l, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(l))
		if name != "rds0" {
			continue
		}
		for _, a := range []string{"fd00::51", "fd00::52", "fe80::51", "fe80::52", "10.0.0.51", "10.0.0.52"} {
			ip := netip.MustParseAddr(a)
			must(netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}, Flags: unix.IFA_F_NODAD}))
		}
	}
	for _, c := range []struct {
		name, active, passive string
		accepted              string // in the passive side's output
		change                func(*stressOptions)
		also                  func(*stress)
	}{
		{"RDMA", "fd00::52", "fd00::51", "on [fd00::51]:4300\naccepted connection from [fd00::52]:", func(o *stressOptions) { o.RDMASize, o.Depth = 5000, 3 }, nil},
		{"link-local", "fe80::52%rds0", "fe80::51%rds0", "on [fe80::51%rds0]:4300\naccepted connection from [fe80::52%rds0]:", func(o *stressOptions) { o.SendAddr = o.SendAddr.WithZone("") }, nil},
		{"anybody, link-local", "fe80::52%rds0", "fe80::51%rds0", " on [fe80::51%rds0]:4300\nnegotiated", func(*stressOptions) {}, anybody},
		{"anybody", "fd00::52", "fd00::51", " on [fd00::51]:4300\nnegotiated", func(*stressOptions) {}, anybody},
		{"anybody, who has IPv4", "10.0.0.52", "10.0.0.51", " on 10.0.0.51:4300\nnegotiated", func(*stressOptions) {}, anybody},
	} {
		t.Run(c.name, func(t *testing.T) {
			active, passive := stressBetween(t, c.active, c.passive, c.change, c.also)
			for _, out := range []string{active, passive} {
				if tx, rx, _, _, _ := average(t, out); tx == 0 || rx == 0 {
					t.Errorf("nothing happened:\n%s", out)
				}
			}
			if !strings.Contains(passive, c.accepted) {
				t.Errorf("no %q in\n%s", c.accepted, passive)
			}
		})
	}
}

// anybody has the passive side wait at every address.
func anybody(s *stress) {
	if !s.opt.SendAddr.IsValid() {
		s.opt.RecvAddr = netip.IPv6Unspecified()
	}
}
