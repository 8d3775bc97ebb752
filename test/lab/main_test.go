//go:build lab && linux

package lab

import (
	"flag"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// go test -tags lab ./test/lab -run TestRDSLoss -args -pcap /tmp
var pcapDir = flag.String("pcap", "", "directory for a capture of each test")

func TestMain(m *testing.M) { Main(m, map[string]Program{"afrds": afrdsMain, "echo": echoMain}) }

// shared is the guest that most tests use, booted by the first.
var shared struct {
	sync.Mutex
	g *Guest
}

// guest returns the shared guest with the link at mtu, after checking that it still lives. The guest's log is
// checked when t ends.
func guest(t testing.TB, mtu int) *Guest {
	t.Helper()
	Need(t)
	shared.Lock()
	defer shared.Unlock()
	if shared.g != nil {
		select {
		case <-shared.g.exited: // killed because it hung
			shared.g = nil
		default:
		}
	}
	// A kernel keeps 4 MiB of receive buffers for every RDS connection it ever had, and takes a third of its memory for
	// them at most; then it answers RNR for ever (rds-protocol spec Q3).
	if shared.g != nil && shared.g.strangers() >= 50 {
		_ = shared.g.Close()
		shared.g = nil
	}
	if shared.g == nil {
		g, err := Start(t.Context(), Config{MTU: mtu})
		if err != nil {
			t.Fatal(err)
		}
		shared.g = g
	}
	g := shared.g
	g.SetMTU(t, mtu)
	if *pcapDir != "" {
		path := filepath.Join(*pcapDir, strings.ReplaceAll(t.Name(), "/", "_")+".pcap")
		c, err := StartCapture(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		shared.Lock()
		defer shared.Unlock()
		if shared.g == g {
			g.CheckLog(t)
		}
	})
	return g
}

// discardGuest has the next test boot a guest of its own: this one has seen something that its kernel does
// not get over, and whose complaints are known.
func discardGuest() {
	shared.Lock()
	defer shared.Unlock()
	if shared.g != nil {
		_ = shared.g.Close()
		shared.g = nil
	}
}

// goBuild builds a command of this module, named from its root, and returns the program's path.
func goBuild(t testing.TB, pkg string) string {
	t.Helper()
	Need(t)
	out := workPath(filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", out, "./"+pkg)
	cmd.Dir = "../.."
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, text)
	}
	return out
}

// strangers is how many addresses AddHostAddr has given since the first of the guests that run was started.
func (g *Guest) strangers() int {
	link.Lock()
	defer link.Unlock()
	return len(link.extra)
}
