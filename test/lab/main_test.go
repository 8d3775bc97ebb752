//go:build lab && linux

package lab

import (
	"sync"
	"testing"
)

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
	if shared.g == nil {
		g, err := Start(t.Context(), Config{MTU: mtu})
		if err != nil {
			t.Fatal(err)
		}
		shared.g = g
	}
	g := shared.g
	g.SetMTU(t, mtu)
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
