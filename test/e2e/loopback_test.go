//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/openrds/openrds/rds"
)

// e2ePort keeps the tests off whatever else speaks RoCE on this machine.
const e2ePort = 24801

// TestMillion sends a million datagrams of mixed sizes between two processes, content and order
// checked, half of them each way.
func TestMillion(t *testing.T) {
	count := 125_000 // per port and direction
	if testing.Short() {
		count /= 10
	}
	a := role{Local: netip.MustParseAddr("127.0.0.41"), Remote: netip.MustParseAddr("127.0.0.42"), UDPPort: e2ePort, Ports: []uint16{4000, 4001, 4002, 4003},
		Seed: 1, PeerSeed: 2, Count: count, Expect: count, MaxSize: 1 << 20}
	b := a
	b.Local, b.Remote, b.Seed, b.PeerSeed = a.Remote, a.Local, 2, 1
	begin := time.Now()
	pa, pb := start(t, a, nil), start(t, b, nil)
	la, lb := pa.expect("done", 4*time.Minute), pb.expect("done", 4*time.Minute)
	t.Logf("%d datagrams in %v; %s / %s", 8*count, time.Since(begin).Round(time.Millisecond), la, lb)
}

// TestKill kills one of two processes in the middle and starts it again. Each incarnation of it sees the
// survivor's stream from the first message that was not acknowledged to the dead one, without gap or
// duplicate. So what is missing between the two was acknowledged and never read, which the dead one's
// receive queue bounds; what the dead one had read but not acknowledged comes again. The survivor goes
// on, and sees each incarnation's stream from its beginning, without gap or duplicate.
func TestKill(t *testing.T) {
	survivor := role{Local: netip.MustParseAddr("127.0.0.43"), Remote: netip.MustParseAddr("127.0.0.44"), UDPPort: e2ePort, Ports: []uint16{4000, 4001},
		Seed: 1, Free: true, Journal: true, MaxSize: 4096, Every: 50 * time.Microsecond}
	victim := survivor
	victim.Local, victim.Remote = survivor.Remote, survivor.Local
	ps := start(t, survivor, nil)
	last := map[uint16]int64{4000: -1, 4001: -1} // what the previous incarnation had read
	var missing, again int64
	for inc := range 3 {
		victim.Seed = uint64(100 + inc)
		pv := start(t, victim, nil)
		pv.expect("ready", 10*time.Second)
		now := map[uint16]int64{}
		begun := 0
		deadline := time.After(20 * time.Second)
		stop := time.Time{}
		for stop.IsZero() || time.Now().Before(stop) {
			select {
			case l, ok := <-pv.lines:
				if !ok {
					t.Fatalf("incarnation %d: %s", inc, pv.errs.String())
				}
				var port uint16
				var n, s int64
				if k, _ := fmt.Sscanf(l, "recv %d %d %d", &port, &s, &n); k == 3 {
					gap := n - last[port] - 1
					t.Logf("incarnation %d, port %d: the last one had read up to %d, this one begins with %d", inc, port, last[port], n)
					if inc > 0 {
						missing += max(gap, 0)
						again += max(-gap, 0)
					}
					begun++
				} else if k, _ := fmt.Sscanf(l, "upto %d %d", &port, &n); k == 2 {
					now[port] = n
				}
				if begun == 2 && stop.IsZero() && len(now) == 2 {
					stop = time.Now().Add(400 * time.Millisecond)
				}
			case <-deadline:
				t.Fatalf("incarnation %d received nothing: %s", inc, pv.errs.String())
			}
		}
		if inc < 2 {
			if err := pv.cmd.Process.Signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			for l := range pv.lines { // what it had still said
				var port uint16
				var n int64
				if k, _ := fmt.Sscanf(l, "upto %d %d", &port, &n); k == 2 {
					now[port] = n
				}
			}
			last = now
		}
		// The survivor has seen this incarnation on both ports, from wherever.
		seen := map[uint16]bool{}
		for len(seen) < 2 {
			var port uint16
			var s, n uint64
			l := ps.expect("recv", 20*time.Second)
			if fmt.Sscanf(l, "recv %d %d %d", &port, &s, &n); s == victim.Seed {
				if n != 0 {
					t.Fatalf("port %d: incarnation %d's stream begins with %d", port, inc, n)
				}
				seen[port] = true
			}
		}
	}
	t.Logf("%d datagrams were acknowledged to the dead and not read by them; %d had been read and came again", missing, again)
	if most := int64(2 * 2 * rds.DefaultBuffer / headerLen); missing > most {
		t.Errorf("%d datagrams are missing: more than receive queues hold", missing)
	}
	ps.stdin.Close() // the last incarnation lives and acknowledges the rest
	ps.expect("done", 40*time.Second)
}
