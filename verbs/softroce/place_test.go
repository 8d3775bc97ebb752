package softroce

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
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
	if n := tp.dev[1].Stats()["rx_bad_icrc"]; n != 0 {
		t.Errorf("%d packets were spoilt", n)
	}
	if s := tp.dev[1].Stats(); tp.dev[0].caps.GSO && s["rx_placed"] == 0 {
		t.Errorf("%d of %d SENDs were placed", s["rx_placed"], total)
	} else {
		t.Logf("%d of %d SENDs were placed", s["rx_placed"], total)
	}
}

// memPlacer places trains by hand.
type memPlacer struct {
	trains [][][]byte // the packets of each; of the layout's shape: it is placed
	from   netip.AddrPort
	l      packetio.Layout
	places [][]byte
	whole  [][][]byte
}

func (p *memPlacer) RecvPlaced(ts []packetio.RxTrain, l packetio.Layout, places [][]byte) (int, error) {
	p.l, p.places = l, slices.Clone(places)
	n := min(len(ts), len(p.trains))
	for i, train := range p.trains[:n] {
		ts[i] = packetio.RxTrain{From: p.from, Data: slices.Concat(train...), SegSize: len(train[0]), TTL: 64}
		if len(ts[i].Data) != l.Size() {
			continue
		}
		ts[i].Placed, ts[i].Data = true, nil
		for k, b := range train {
			copy(places[i][k*l.Payload:], b[l.Hdr:l.Hdr+l.Payload])
			ts[i].Data = append(append(ts[i].Data, b[:l.Hdr]...), b[l.Hdr+l.Payload:]...)
		}
	}
	p.trains = p.trains[n:]
	return n, nil
}

// Linear puts train i together from where it lies now.
func (p *memPlacer) Linear(i int) []byte {
	b := slices.Concat(p.whole[i]...)
	for k := range p.l.Segs {
		copy(b[k*(len(b)/p.l.Segs)+p.l.Hdr:], p.places[i][k*p.l.Payload:][:p.l.Payload])
	}
	return b
}

// TestPlacedBehindOthers: a train that was placed where the SENDs before it are received turns out to be elsewhere, whole.
func TestPlacedBehindOthers(t *testing.T) {
	script(t, func(tc *testContext) {
		vs, err := tc.pd.CreateSRQ(verbs.SRQConfig{MaxWR: 4})
		if err != nil {
			t.Fatal(err)
		}
		old := tc.qp
		if tc.qp, err = tc.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: tc.cq, RecvCQ: tc.cq, SRQ: vs}); err != nil {
			t.Fatal(err)
		}
		tc.more = append(tc.more, old.Close, vs.Close)
		tc.connect()
		const n = 2 * 256
		for i := range 3 {
			if _, err := vs.PostRecv([]verbs.RecvWR{{ID: uint64(i), SGs: tc.sge(1<<17+i*n, n)}}); err != nil {
				t.Fatal(err)
			}
		}
		pkt := func(i int, op roce.Opcode, data []byte) []byte {
			return tc.packet(op, uint32(tc.qp.Num()), rx(i), i == 3, nil, data)
		}
		p := &memPlacer{from: tc.peer, trains: [][][]byte{
			{pkt(0, roce.RCSendOnly, tc.mem[:100]), pkt(1, roce.RCSendOnly, tc.mem[100:200])},
			{pkt(2, roce.RCSendFirst, tc.mem[1000:1256]), pkt(3, roce.RCSendLast, tc.mem[1256:1512])},
		}}
		p.whole = p.trains
		tc.dev.role.Lock()
		tc.dev.place = placement{conn: p, srq: vs.(*srq), layout: packetio.Layout{Hdr: roce.BTHLen, Payload: 256, Tail: roce.ICRCLen, Segs: 2}}
		tc.dev.role.Unlock()
		tc.conn.Wake()
		synctest.Wait()
		for i, want := range [][]byte{tc.mem[:100], tc.mem[100:200], tc.mem[1000:1512]} {
			wc := tc.wantWC("", uint64(i), verbs.WCSuccess)
			if !bytes.Equal(tc.mem[1<<17+i*n:][:wc.ByteLen], want) {
				t.Errorf("SEND %d is of %d bytes, or content", i, wc.ByteLen)
			}
		}
		tc.wantAck("all of it", roce.SynACK, rx(3))
	})
}
