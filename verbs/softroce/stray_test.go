package softroce

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// TestStrayPacket: RC packets for a QP that does not exist are told of with their source, a few at a time; those that are not what
// they seem, and those of other transports, are not.
func TestStrayPacket(t *testing.T) {
	script(t, func(tc *testContext) {
		events := new(eventLog)
		var from []netip.Addr
		tc.dev.SetAsyncHandler(func(e verbs.AsyncEvent) {
			events.add(e)
			events.mu.Lock()
			from = append(from, e.From)
			events.mu.Unlock()
		})
		stray := func(op roce.Opcode) []byte { return tc.packet(op, 0xdead, 7, true, nil, []byte("anybody?")) }
		n := 0
		want := func(more int) {
			t.Helper()
			synctest.Wait()
			if n += more; len(events.get()) != n {
				t.Fatalf("%d events, not %d", len(events.get()), n)
			}
			time.Sleep(strayEvery)
		}
		tc.inject(stray(roce.RCSendOnly))
		want(1)
		bad := stray(roce.RCSendOnly)
		bad[len(bad)-1] ^= 1
		tc.inject(bad)
		want(0)
		key := stray(roce.RCSendOnly)
		key[2], key[3] = 0, 1 // PKey
		tc.inject(key)
		want(0)
		tc.inject(tc.packet(roce.UDSendOnly, 0xdead, 7, false, make([]byte, roce.DETHLen), nil))
		want(0)
		for range 100 {
			tc.inject(stray(roce.RCSendOnly))
		}
		want(strayMost)
		if all := events.get(); slices.ContainsFunc(all, func(e verbs.EventType) bool { return e != verbs.EventStrayPacket }) {
			t.Error(all)
		}
		if slices.ContainsFunc(from, func(a netip.Addr) bool { return a != tc.peer.Addr() }) {
			t.Error(from)
		}
	})
}
