package softroce

import (
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// TestFullForAMoment: the socket takes nothing in the middle of a step, and everything at its end. Who stopped for it goes on, although
// nothing tells that there is room: neither an acknowledgement, since none was asked for, nor a timer.
func TestFullForAMoment(t *testing.T) {
	refuse := 0
	f := &sendConn{}
	f.send = func(ts []packetio.TxTrain) (int, error) {
		if refuse > 0 {
			refuse--
			return 0, packetio.ErrWouldBlock
		}
		return f.scriptConn.Send(ts)
	}
	const n = maxTrains + 20
	t.Run("requester", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tc := newTestContext(t, Config{})
			f.take(tc)
			refuse = 1
			tc.post(send(1, tc.sge(0, n*256)))
			if refuse != 0 {
				t.Fatal("the socket was not full: the test tests nothing")
			}
			for i := range n {
				op := requestOpcode(verbs.OpSend, i == 0, i == n-1)
				tc.want("", op, tx(i))
			}
			tc.close()
		})
	})
	t.Run("responder", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			tc := newTestContext(t, Config{})
			f.take(tc)
			refuse = 1
			tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey(), n*256), nil)
			if refuse != 0 {
				t.Fatal("the socket was not full: the test tests nothing")
			}
			for i := range n {
				op := roce.RCReadRespMiddle
				switch i {
				case 0:
					op = roce.RCReadRespFirst
				case n - 1:
					op = roce.RCReadRespLast
				}
				tc.want("", op, rx(i))
			}
			tc.close()
		})
	})
}

// TestResetWhileFull: a reset gives back the memory of what was posted, so nothing of it may wait for the socket any more.
func TestResetWhileFull(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.qp.(*qp).pmtu = 4096 // packets whose payload is named where it lies
		tc.full(true)
		tc.post(send(1, tc.sge(0, 4096)))
		tc.wantIdle("the socket is full")
		if err := tc.qp.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit); err != nil {
			t.Fatal(err)
		}
		if err := tc.mr.Deregister(); err != nil {
			t.Fatal(err)
		}
		tc.dev.role.Lock()
		for _, v := range tc.dev.tx.vecs {
			if len(v) > 0 && &v[0] == &tc.mem[0] {
				t.Error("the batch names memory that was deregistered")
			}
		}
		tc.dev.role.Unlock()
		tc.full(false)
		synctest.Wait()
		tc.wantIdle("the request is no more")
	})
}
