package rds

import (
	"bytes"
	"encoding/json"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/internal/simnet"
)

// logged collects lines of a logger.
type logged struct {
	mu    sync.Mutex
	lines []map[string]any
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(p) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			return 0, err
		}
		l.lines = append(l.lines, m)
	}
	return len(p), nil
}

// take is what was logged since the last call: all of it, and which subsystems did.
func (l *logged) take() (lines []map[string]any, modules []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines, l.lines = l.lines, nil
	for _, m := range lines {
		modules = append(modules, m["@module"].(string))
	}
	slices.Sort(modules)
	return lines, slices.Compact(modules)
}

// Each subsystem logs under its name; operators see what concerns them at the level of warnings; and no datagram is worth a line at any
// level.
func TestLogging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logged
		net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		cfg := Config{Linger: -1, Logger: hclog.New(&hclog.LoggerOptions{Name: "rds", Level: hclog.Trace, JSONFormat: true, Output: &log})}
		sa, sb := openSim(t, net, cfg), openSim(t, net, Config{Linger: -1})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		mustWrite(t, a, []byte("hello"), b.AddrPort())
		wantRead(t, b, []byte("hello"), a.AddrPort())
		time.Sleep(time.Second)
		lines, modules := log.take()
		for _, want := range []string{"rds.conn", "rds.ibdev"} {
			if !slices.Contains(modules, want) {
				t.Errorf("nothing of %s: %v", want, lines)
			}
		}
		for _, m := range lines {
			if m["@level"] != "debug" && m["@level"] != "trace" {
				t.Errorf("of interest to an operator? %v", m)
			}
		}

		exchange(t, []*Socket{a}, []*Socket{b}, 500, 5000)
		if lines, _ := log.take(); len(lines) != 0 {
			t.Errorf("datagrams are logged: %v", lines)
		}

		net.Partition(addrA, addrB)
		time.Sleep(11 * time.Second)
		net.Heal(addrA, addrB)
		mustWrite(t, a, []byte("x"), b.AddrPort())
		b.SetReadDeadline(time.Time{})
		wantRead(t, b, []byte("x"), a.AddrPort())
		time.Sleep(time.Second)
		var seen []string
		lines, _ = log.take()
		for _, m := range lines {
			if m["@level"] != "debug" && m["@level"] != "trace" { // once, not by each layer
				seen = append(seen, m["@level"].(string)+": "+m["@message"].(string))
				if m["peer"] != addrB.String() || m["local"] != addrA.String() {
					t.Errorf("about whom? %v", m)
				}
			}
		}
		if want := []string{"warn: peer cannot be reached; its datagrams wait", "info: peer is reachable again"}; !slices.Equal(seen, want) {
			t.Errorf("told %q, want %q", seen, want)
		}
		sa.Close()
		sb.Close()
	})
}
