package softroce

import (
	"bytes"
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// ud makes a UD QP in RTS, which closes with tc.
func (tc *testContext) ud() verbs.QP {
	tc.t.Helper()
	q, err := tc.pd.CreateQP(verbs.QPConfig{Type: verbs.UD, SendCQ: tc.cq, RecvCQ: tc.cq, MaxSendWR: 4, MaxRecvWR: 4, MaxSendSGE: 1, MaxRecvSGE: 1})
	if err != nil {
		tc.t.Fatal(err)
	}
	tc.more = append(tc.more, q.Close)
	for _, m := range []struct {
		a verbs.QPAttr
		m verbs.QPAttrMask
	}{
		{verbs.QPAttr{State: verbs.StateInit, Port: 1, QKey: 5}, initAttrsUD},
		{verbs.QPAttr{State: verbs.StateRTR}, 0},
		{verbs.QPAttr{State: verbs.StateRTS}, verbs.QPSQPSNBit},
	} {
		if err := q.Modify(m.a, m.m|verbs.QPStateBit); err != nil {
			tc.t.Fatal(err)
		}
	}
	return q
}

// TestUDSocketFull: a datagram that waits for room in the socket is not complete, since its memory is still to be read.
func TestUDSocketFull(t *testing.T) {
	for _, how := range []string{"leaves", "leaves, from SQD", "flushed", "reset"} {
		t.Run(how, func(t *testing.T) {
			script(t, func(tc *testContext) {
				q := tc.ud()
				ah := &verbs.AH{Remote: tc.peer.Addr()}
				wr := func(id uint64, off, n int) verbs.SendWR {
					return verbs.SendWR{ID: id, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: tc.sge(off, n), AH: ah, RemoteQPN: 9}
				}
				want := bytes.Clone(tc.mem[:1000])
				tc.full(true)
				if _, err := q.PostSend([]verbs.SendWR{wr(1, 0, 1000), wr(2, 1000, 10)}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				tc.wantIdle("the socket is full")
				tc.wantNoWC("it is still to be read")
				modify := func(s verbs.QPState) {
					t.Helper()
					if err := q.Modify(verbs.QPAttr{State: s}, verbs.QPStateBit); err != nil {
						t.Fatal(err)
					}
				}
				switch how {
				case "leaves, from SQD":
					modify(verbs.StateSQD)
				case "flushed":
					modify(verbs.StateErr)
					tc.wantWC("", 1, verbs.WCFlushErr)
					tc.wantWC("", 2, verbs.WCFlushErr)
				case "reset":
					modify(verbs.StateReset)
				}
				if how == "flushed" || how == "reset" {
					clear(tc.mem[:1000])
					tc.full(false)
					tc.wantIdle("it went with the QP")
					tc.wantNoWC("")
					return
				}
				tc.full(false)
				if pk := tc.want("", roce.UDSendOnly, 0); !bytes.Equal(pk.Payload, want) {
					t.Error("its payload has changed")
				}
				tc.wantWC("it has left", 1, verbs.WCSuccess)
				if how == "leaves, from SQD" {
					tc.wantIdle("the next waits for RTS")
					modify(verbs.StateRTS)
					synctest.Wait()
				}
				tc.want("", roce.UDSendOnly, 1)
				tc.wantWC("", 2, verbs.WCSuccess)
			})
		})
	}
}
