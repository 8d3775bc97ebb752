package softroce

import (
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// TestTraceStopLeavesNothing: who waits for the end of a step has the role for a moment, in which a poster finds it taken and leaves his
// request. It goes out all the same.
func TestTraceStopLeavesNothing(t *testing.T) {
	script(t, func(tc *testContext) {
		stop := tc.dev.prov.TracePackets(func(verbs.Packet) {})
		tc.dev.role.Lock()
		if _, err := tc.qp.PostSend([]verbs.SendWR{send(1, tc.sge(0, 10))}); err != nil {
			t.Fatal(err)
		}
		tc.dev.role.Unlock() // as who does not look
		tc.wantIdle("nobody has looked")
		stop()
		synctest.Wait()
		tc.want("it is seen to", roce.RCSendOnly, tx(0))
	})
}
