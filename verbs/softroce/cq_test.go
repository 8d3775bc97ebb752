package softroce

import (
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/verbs"
)

// TestCQCloseAfterCompletion: a completion that came in the role of somebody who runs no handlers has the engine run it later. Closing
// the queue takes that back.
func TestCQCloseAfterCompletion(t *testing.T) {
	script(t, func(tc *testContext) {
		calls := 0
		vcq, err := tc.dev.CreateCQ(verbs.CQConfig{Depth: 4, Handler: func(verbs.CQ) { calls++ }})
		if err != nil {
			t.Fatal(err)
		}
		vcq.Arm(false)
		tc.dev.role.Lock()
		vcq.(*cq).push(&verbs.WC{ID: 1}, false)
		if len(tc.dev.cqReady) != 1 {
			t.Error("the handler is not due: the test tests nothing")
		}
		tc.dev.role.Unlock()
		if err := vcq.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if calls != 0 {
			t.Error("the handler ran after Close had returned")
		}
		if n := vcq.Poll(make([]verbs.WC, 1)); n != 0 {
			t.Errorf("%d completions", n)
		}
	})
}
