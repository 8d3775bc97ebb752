package softroce

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
)

// fickleNet is a network whose sockets are full at random, for a moment.
type fickleNet struct {
	packetio.Network
	r *rand.Rand
}

type fickleConn struct {
	packetio.Conn
	n *fickleNet
}

func (n *fickleNet) Listen(a netip.AddrPort) (packetio.Conn, error) {
	c, err := n.Network.Listen(a)
	if err != nil {
		return nil, err
	}
	return &fickleConn{c, &fickleNet{r: rand.New(rand.NewPCG(n.r.Uint64(), 1))}}, nil
}

func (c *fickleConn) Send(ts []packetio.TxTrain) (int, error) {
	if c.n.r.IntN(2) > 0 {
		return c.Conn.Send(ts)
	}
	k := c.n.r.IntN(len(ts) + 1)
	if k == len(ts) {
		return c.Conn.Send(ts)
	}
	n, err := c.Conn.Send(ts[:k])
	if err == nil {
		err = packetio.ErrWouldBlock
	}
	return n, err
}

func (c *fickleConn) Wait(deadline time.Time, wantWrite bool) error {
	if wantWrite {
		time.Sleep(time.Microsecond)
		return nil
	}
	return c.Conn.Wait(deadline, wantWrite)
}

// TestFickleSocket: whatever the socket refuses, and whenever it takes it, nothing has to wait for a timer.
func TestFickleSocket(t *testing.T) {
	for seed := range uint64(24) {
		synctest.Test(t, func(t *testing.T) { fickle(t, seed) })
	}
}

func fickle(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 9))
	sim := simnet.New(seed, simnet.Config{NoGSO: r.IntN(2) > 0, GRO: r.IntN(2) > 0, RecvBuffer: 64 << 20, Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}})
	defer sim.Close()
	tp := newTestPair(t, Config{Network: &fickleNet{sim, r}, Peers: 1}, "10.0.0.1", "10.0.0.2", []verbs.MTU{verbs.MTU256, verbs.MTU1024, verbs.MTU4096}[r.IntN(3)])
	defer tp.shut(t)
	n := [2]int{}
	for i := range 100 {
		if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: uint64(i), SGs: tp.sge(1, 2<<20, 1<<17)}}); err != nil {
			t.Fatal(err)
		}
		if _, err := tp.qp[0].PostRecv([]verbs.RecvWR{{ID: uint64(i), SGs: tp.sge(0, 2<<20, 1<<17)}}); err != nil {
			t.Fatal(err)
		}
	}
	var wcs [64]verbs.WC
	for n[0] < 100 || n[1] < 100 {
		for i := range tp.qp {
			for k := r.IntN(4); k > 0 && n[i] < 100; k-- {
				w := verbs.SendWR{ID: 1000, Flags: verbs.SendSignaled, SGs: tp.sge(i, 0, r.IntN(1<<17)), RemoteAddr: 0x1000 + 1<<20, RKey: tp.mr[1-i].RKey()}
				switch r.IntN(5) {
				case 0, 1:
					w.Opcode = verbs.OpSend
				case 2:
					w.Opcode = verbs.OpWrite
				case 3:
					w.Opcode = verbs.OpRead
					w.SGs = tp.sge(i, 3<<20, int(w.SGs[0].Length))
				case 4:
					w.Opcode, w.SGs = verbs.OpFetchAdd, tp.sge(i, 3<<20, 8)
				}
				if r.IntN(4) == 0 {
					w.Flags |= verbs.SendFence
				}
				if _, err := tp.qp[i].PostSend([]verbs.SendWR{w}); err != nil {
					break
				}
				n[i]++
			}
		}
		time.Sleep(time.Duration(r.IntN(200)) * time.Microsecond)
		for i := range tp.cq {
			tp.cq[i].Poll(wcs[:])
		}
	}
	time.Sleep(minRTO / 2) // less than any timer
	for i, d := range tp.dev {
		for k := tp.cq[i].Poll(wcs[:]); k > 0; k = tp.cq[i].Poll(wcs[:]) {
			for _, wc := range wcs[:k] {
				if wc.Err() != nil {
					t.Error(wc.Err())
				}
			}
		}
		q := tp.qp[i].(*qp)
		if s := d.Stats(); q.head.Load() != q.tail.Load() || s["timeouts"] != 0 || s["tx_blocked"] == 0 {
			t.Errorf("seed %d side %d: %d outstanding, timeouts %d, retransmits %d, tx_blocked %d tx_errors %d", seed, i, q.tail.Load()-q.head.Load(), s["timeouts"], s["retransmits"], s["tx_blocked"], s["tx_errors"])
		}
	}
}
