package softroce

import (
	"errors"
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

// TestPostRecvAgainstClose: a receive that was posted past the look at a QP that is being closed leaves no reference behind.
func TestPostRecvAgainstClose(t *testing.T) {
	script(t, func(tc *testContext) {
		q := tc.qp.(*qp)
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		// What PostRecv does when it has found the QP open.
		if n, err := q.rq.post([]verbs.RecvWR{{ID: 1, SGs: tc.sge(0, 100)}}); n != 0 || !errors.Is(err, verbs.ErrClosed) {
			t.Errorf("posted %d, %v", n, err)
		}
		if err := tc.mr.Deregister(); err != nil {
			t.Error(err)
		}
	})
}

// TestRemovalIsHeard: whatever else waits to be told, that the device is gone is told.
func TestRemovalIsHeard(t *testing.T) {
	script(t, func(tc *testContext) {
		gate := make(chan struct{})
		removed := 0
		tc.dev.SetAsyncHandler(func(e verbs.AsyncEvent) {
			<-gate
			if e.Type == verbs.EventDeviceRemoved {
				removed++
			}
		})
		tc.dev.async(verbs.AsyncEvent{Type: verbs.EventCommEst, QP: tc.qp})
		synctest.Wait() // it is being delivered
		for range maxAsync + 1 {
			tc.dev.async(verbs.AsyncEvent{Type: verbs.EventCommEst, QP: tc.qp})
		}
		if tc.dev.Stats()["async_events_dropped"] == 0 {
			t.Fatalf("nothing was dropped: the test tests nothing: %v", tc.dev.Stats())
		}
		if err := tc.dev.prov.Remove(tc.dev.addr); err != nil {
			t.Fatal(err)
		}
		close(gate)
		synctest.Wait()
		if removed != 1 {
			t.Errorf("told %d times", removed)
		}
	})
}
