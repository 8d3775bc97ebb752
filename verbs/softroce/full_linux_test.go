package softroce

import (
	"bytes"
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

// TestVecsOfATrain: a train of packets with long gather lists stays within what the kernel takes in one message (UIO_MAXIOV), or it
// would be refused each time it is sent.
func TestVecsOfATrain(t *testing.T) {
	most := 0
	f := &sendConn{gso: true}
	f.send = func(ts []packetio.TxTrain) (int, error) {
		for _, t := range ts {
			most = max(most, len(t.Vec))
		}
		return len(ts), nil
	}
	synctest.Test(t, func(t *testing.T) {
		tc := newTestContext(t, Config{})
		f.take(tc)
		d := tc.dev
		var sgs []sge
		for i := range 2 * d.attr.MaxSGE { // each of two pieces of its region
			sgs = append(sgs, direct(tc.mem[i*8:][:8]))
		}
		d.role.Lock()
		for i := range 60 {
			var b pktBuilder
			b.begin(d, tc.qp.(*qp), roce.RCSendMiddle, roce.BTHLen, 512)
			b.finish(d, tc.qp.(*qp), roce.RCSendMiddle, false, false, peerQPN, tx(i), sgs, 0)
		}
		d.tx.flush()
		d.role.Unlock()
		if most > 1024 {
			t.Errorf("a train is a list of %d pieces", most)
		}
		tc.close()
	})
}

// TestLongListsUDP sends SENDs of as many pieces as there may be, many at once.
func TestLongListsUDP(t *testing.T) {
	tp := newTestPair(t, Config{}, "127.0.0.77", "127.0.0.78", verbs.MTU4096)
	defer tp.shut(t)
	q := tp.qp[0].(*qp)
	q.cfg.MaxSendSGE = tp.dev[0].attr.MaxSGE
	q.sqStore = make([]sge, len(q.sq)*storedSGEs)
	const n = 64
	var wrs []verbs.SendWR
	for i := range n {
		if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: uint64(i), SGs: tp.sge(1, i*512, 512)}}); err != nil {
			t.Fatal(err)
		}
		wr := send(uint64(i), nil)
		for k := range tp.dev[0].attr.MaxSGE {
			wr.SGs = append(wr.SGs, tp.sge(0, i*512+k*16, 16)...)
		}
		wrs = append(wrs, wr)
	}
	fill(tp.mem[0][:n*512], 5)
	if _, err := tp.qp[0].PostSend(wrs); err != nil {
		t.Fatal(err)
	}
	for range n {
		if wc := tp.wait(t, 0); wc.Err() != nil {
			t.Fatal(wc.Err())
		}
		if wc := tp.wait(t, 1); wc.Err() != nil {
			t.Fatal(wc.Err())
		}
	}
	tp.qp[1].Query()
	if !bytes.Equal(tp.mem[0][:n*512], tp.mem[1][:n*512]) {
		t.Error("content")
	}
	if s := tp.dev[0].Stats(); s["tx_errors"] != 0 {
		t.Errorf("%d trains were refused", s["tx_errors"])
	}
}

// TestReprobeWhileFull: nothing is built on a batch that waits for the socket, a probe that is due after a page fault neither.
func TestReprobeWhileFull(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.full(true)
		tc.post(send(1, tc.sge(0, 10)))
		d, q := tc.dev, tc.qp.(*qp)
		d.role.Lock()
		n := len(d.tx.trains)
		for range 2 {
			q.reprobe = true
			d.runRequester(q)
		}
		if !d.tx.blocked || d.tx.open || len(d.tx.trains) != n {
			t.Errorf("%d trains wait, and %v is open; there were %d", len(d.tx.trains), d.tx.open, n)
		}
		d.role.Unlock()
		tc.full(false)
		tc.want("what waited", roce.RCSendOnly, tx(0))
		tc.want("the probe", roce.RCSendOnly, tx(0))
		tc.wantIdle("")
	})
}
