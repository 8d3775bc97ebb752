//go:build lab && linux

package lab

import (
	"context"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestRDSStress runs rds-stress's protocol between the kernel's RDS and ours, verified, with RDMA reads and writes in turn:
// "rds-bench stress" on the host and "rds-bench stress --kernel" in the guest, which says what is to be done first the one, then the other,
// over IPv4 and over IPv6.
func TestRDSStress(t *testing.T) {
	bench := goBuild(t, "cmd/rds-bench")
	const limit = 60 * time.Second
	// The last line's rates: requests sent and received, and KiB of RDMA in and out.
	average := regexp.MustCompile(`(?m)^ +\d+ +(\d+) +(\d+) +[\d.]+ +([\d.]+) +([\d.]+) .*\(average\)$`)
	check := func(t *testing.T, who, out string, rdma bool) {
		t.Helper()
		m := average.FindStringSubmatch(out)
		if m == nil {
			t.Errorf("%s: no result:\n%s", who, out)
			return
		}
		t.Logf("%s: %s", who, strings.TrimSpace(m[0]))
		for i, v := range m[1:] {
			n, err := strconv.ParseFloat(v, 64)
			if want := i < 2 || rdma; err != nil || (n > 0) != want {
				t.Errorf("%s: column %d is %s", who, i+2, v)
			}
		}
	}
	for _, c := range []struct {
		name   string
		family family
		active string // who tells the other
		args   []string
		rdma   bool
	}{
		{"ours tells the kernel", ipv4, "host", []string{"-q", "5000", "-a", "100", "-t", "2", "-d", "4", "-v"}, false},
		{"the kernel tells ours", ipv4, "guest", []string{"-q", "300", "-t", "2", "-d", "2", "-Q", "5", "-v", "-D", "16384", "-I", "2"}, true},
		{"ours tells the kernel, RDMA used once", ipv4, "host", []string{"-d", "2", "-v", "-D", "65536", "--rdma-use-once", "1"}, true},
		{"ours tells the kernel over IPv6", ipv6, "host", []string{"-q", "3000", "-t", "2", "-d", "2", "-v", "-D", "16384"}, true},
		{"the kernel tells ours, RDMA without fences", ipv4, "guest", []string{"-d", "4", "-v", "-D", "8k", "--rdma-use-fence", "0"}, true},
		{"the kernel tells ours over IPv6", ipv6, "guest", []string{"-q", "5000", "-a", "100", "-t", "2", "-d", "4", "-Q", "5", "-v"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, c.family)
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			host := []string{"stress", "-r", f.host}
			there := []string{bench, "stress", "--kernel", "-r", f.guest}
			tell := append([]string{"-T", "2", "--connect-retries", "30"}, c.args...)
			if c.active == "host" {
				host = append(append(host, "-s", f.guest), tell...)
			} else {
				there = append(append(there, "-s", f.host), tell...)
			}
			p, err := g.Start(there...)
			if err != nil {
				t.Fatal(err)
			}
			ours, err := exec.CommandContext(ctx, bench, host...).CombinedOutput()
			if err != nil {
				t.Errorf("ours: %v", err)
			}
			check(t, "ours", string(ours), c.rdma)
			if err := p.Wait(ctx); err != nil {
				t.Errorf("the kernel's: %v", err)
			}
			check(t, "the kernel", p.Output(), c.rdma)
		})
	}
}
