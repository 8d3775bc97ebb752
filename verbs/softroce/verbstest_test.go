package softroce_test

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs/softroce"
	"github.com/openrds/openrds/verbs/verbstest"
)

// Bounds that a test can wait out in real time.
const (
	testGiveUp     = 600 * time.Millisecond
	testDeregister = 150 * time.Millisecond
)

// loopbacks hands out addresses of 127.201.0.0/16: cases run in parallel, each on its own.
var loopbacks atomic.Uint32

func loopback() netip.Addr {
	n := loopbacks.Add(1)
	return netip.AddrFrom4([4]byte{127, 201, byte(n >> 8), byte(n)})
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
