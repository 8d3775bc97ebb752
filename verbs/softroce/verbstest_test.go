package softroce_test

import (
	"hash/fnv"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs/softroce"
	"github.com/openrds/openrds/verbs/verbstest"
)

// Bounds that a test can wait out in real time.
const (
	testGiveUp     = 600 * time.Millisecond
	testDeregister = 150 * time.Millisecond
)

// loopbacks counts the addresses handed out. Cases run in parallel, each on addresses of its own; so do
// test processes on one machine, each with 1024 addresses of 127.0.0.0/8 by its process number.
var loopbacks atomic.Uint32

func loopback() netip.Addr {
	n := uint32(64+os.Getpid()%16000)<<10 | loopbacks.Add(1)&1023
	return netip.AddrFrom4([4]byte{127, byte(n >> 16), byte(n >> 8), byte(n)})
}

func TestVerbsUDP(t *testing.T) {
	verbstest.Run(t, func(t *testing.T) verbstest.Env {
		return verbstest.Env{
			Provider: softroce.New(softroce.Config{GiveUp: testGiveUp, DeregisterBound: testDeregister}),
			Addrs:    []netip.Addr{loopback(), loopback()},
			Nowhere:  loopback(),
			Unowned:  netip.MustParseAddr("192.0.2.77"), // of the range for documentation
		}
	}, verbstest.Parallel())
}

// simulated runs the suite in virtual time on a network of cfg, between hosts of its own.
func simulated(t *testing.T, cfg simnet.Config, a, b, nowhere string, lossy bool) {
	verbstest.Run(t, func(t *testing.T) verbstest.Env {
		h := fnv.New64a()
		h.Write([]byte(t.Name()))
		net := simnet.ForTest(t, h.Sum64(), cfg)
		hosts := []netip.Addr{netip.MustParseAddr(a), netip.MustParseAddr(b)}
		return verbstest.Env{
			Provider: softroce.New(softroce.Config{Network: net}),
			Addrs:    hosts,
			Nowhere:  netip.MustParseAddr(nowhere),
			Partition: func(cut bool) {
				if cut {
					net.Partition(hosts[0], hosts[1])
				} else {
					net.Heal(hosts[0], hosts[1])
				}
			},
			Lossy: lossy,
		}
	}, verbstest.Within(synctest.Test))
}

func TestVerbsSimulated(t *testing.T) {
	link := simnet.LinkConfig{Delay: 20 * time.Microsecond, Jitter: 5 * time.Microsecond}
	simulated(t, simnet.Config{GRO: true, Link: link}, "10.0.0.1", "10.0.0.2", "10.0.0.9", false)
}

// IPv6 over Ethernet frames of the usual size: path MTU 1024, no offloads.
func TestVerbsSimulatedIPv6(t *testing.T) {
	link := simnet.LinkConfig{Delay: 200 * time.Microsecond, RateBytesPerSec: 200 << 20}
	simulated(t, simnet.Config{MTU: 1500, NoGSO: true, SendBuffer: 32 << 10, Link: link}, "fd00::1", "fd00::2", "fd00::9", false)
}

// A network that loses, repeats, damages and reorders: whatever is reliable behaves the same, later.
func TestVerbsSimulatedLossy(t *testing.T) {
	link := simnet.LinkConfig{Loss: 0.02, Dup: 0.01, Corrupt: 0.005, Reorder: 0.02, Delay: 50 * time.Microsecond, Jitter: 50 * time.Microsecond}
	simulated(t, simnet.Config{Link: link}, "10.0.0.1", "10.0.0.2", "10.0.0.9", true)
}
