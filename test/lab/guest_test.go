//go:build lab && linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestGuest holds the harness to what its documentation says.
func TestGuest(t *testing.T) {
	start := time.Now()
	g := guest(t, 4500)
	t.Logf("booted in %v: %s", time.Since(start).Round(time.Millisecond), g.Release(t))

	t.Run("host files", func(t *testing.T) {
		exe, err := os.Readlink("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if out := g.Run(t, "ls", exe); strings.TrimSpace(out) != exe {
			t.Errorf("ls of the test binary says %q", out)
		}
		if _, err := g.Output(t.Context(), "sh", "-c", "echo x > /root/written-by-a-guest"); err == nil {
			t.Error("the guest may write to the host's file system")
		}
	})
	t.Run("exit status", func(t *testing.T) {
		_, err := g.Output(t.Context(), "sh", "-c", "echo this >&2; exit 3")
		var exit *ExitError
		if !errors.As(err, &exit) || exit.Code != 3 || exit.Stderr != "this\n" {
			t.Errorf("a command with status 3 gives %#v", err)
		}
		if _, err := g.Output(t.Context(), "no-such-command"); !errors.As(err, &exit) || exit.Code != -1 {
			t.Errorf("a command that does not exist gives %v", err)
		}
	})
	t.Run("input", func(t *testing.T) {
		p, err := g.Start("tr", "a-z", "A-Z")
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Repeat("HELLO\n", 50000)
		if _, err := p.Write([]byte(strings.ToLower(want))); err != nil {
			t.Fatal(err)
		}
		p.CloseWrite()
		if err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := p.Output(); got != want {
			t.Errorf("tr gave %d bytes, want %d", len(got), len(want))
		}
	})
	t.Run("time limit", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, err := g.Output(ctx, "sh", "-c", "sleep 1000 & sleep 1000")
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > hangLimit {
			t.Errorf("a command past its limit gives %v after %v", err, time.Since(start))
		}
		if out := g.Run(t, "sh", "-c", "pgrep -c sleep; true"); strings.TrimSpace(out) != "0" {
			t.Errorf("%s processes survive their command", strings.TrimSpace(out))
		}
	})
	t.Run("link", func(t *testing.T) {
		for _, mtu := range []int{1500, 4500} {
			g.SetMTU(t, mtu)
			g.Run(t, "busybox", "ping", "-q", "-c1", "-W5", "-s", fmt.Sprint(mtu-28), HostAddr4)
			g.Run(t, "busybox", "ping", "-q", "-c1", "-W5", "-s", fmt.Sprint(mtu-48), HostAddr6)
		}
	})
}
