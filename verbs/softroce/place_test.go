package softroce

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// TestPlaced streams SENDs of whole trains into a shared receive queue, with others in between that are not
// what the guess expects: each arrives whole, in order and in one buffer of its own, most of the trains
// placed.
func TestPlaced(t *testing.T) {
	for _, mtu := range []verbs.MTU{verbs.MTU1024, verbs.MTU4096} {
		t.Run(mtu.String(), func(t *testing.T) { placed(t, mtu) })
	}
}

func placed(t *testing.T, mtu verbs.MTU) {
	const size, bufs, total = 15 * 4096, 32, 1500
	tp := newTestPairSRQ(t, Config{}, "127.0.0.25", "127.0.0.26", mtu, bufs)
	defer tp.shut(t)
	r := rand.New(rand.NewPCG(1, uint64(mtu)))
	fill(tp.mem[0][:2<<20], 3)
	recv := func(i uint64) {
		if _, err := tp.srq.PostRecv([]verbs.RecvWR{{ID: i, SGs: tp.sge(1, int(i)*65536, 65536)}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(bufs) {
		recv(i)
	}
	type msg struct{ off, n int }
	var sent []msg
	var wcs [bufs]verbs.WC
	out, got := 0, 0
	for end := time.Now().Add(time.Minute); got < total; {
		if time.Now().After(end) {
			t.Fatalf("%d of %d: %v", got, total, tp.dev[1].Stats())
		}
		for len(sent) < total && out < bufs/2 {
			m := msg{r.IntN(1 << 20), size}
			switch r.IntN(8) {
			case 0:
				m.n = r.IntN(200)
			case 1:
				m.n = r.IntN(size)
			}
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{send(uint64(len(sent)), tp.sge(0, m.off, m.n))}); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, m)
			out++
		}
		for i := range tp.cq[0].Poll(wcs[:]) {
			if err := wcs[i].Err(); err != nil {
				t.Fatal(err)
			}
			out--
		}
		n := tp.cq[1].Poll(wcs[:])
		for _, wc := range wcs[:n] {
			if err := wc.Err(); err != nil {
				t.Fatal(err)
			}
			m := sent[got]
			if b := tp.mem[1][wc.ID*65536:][:wc.ByteLen]; !bytes.Equal(b, tp.mem[0][m.off:][:m.n]) {
				t.Fatalf("SEND %d: %d bytes, want %d, or content", got, wc.ByteLen, m.n)
			}
			got++
			recv(wc.ID)
		}
		if n == 0 {
			time.Sleep(10 * time.Microsecond)
		}
	}
	if s := tp.dev[1].Stats(); tp.dev[0].caps.GSO && s["rx_placed"] == 0 {
		t.Errorf("%d of %d SENDs were placed", s["rx_placed"], total)
	} else {
		t.Logf("%d of %d SENDs were placed", s["rx_placed"], total)
	}
}
