package softroce

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
)

// TestLossy mixes SENDs, WRITEs, READs and atomics over a bad network. Whatever is lost, doubled,
// reordered or damaged: each operation happens once and in order, and its data is right. So it is when all memory is
// paged, comes in late and goes all the time.
func TestLossy(t *testing.T) {
	for _, l := range []simnet.LinkConfig{
		{},
		{Loss: 0.01},
		{Loss: 0.20},
		{Reorder: 0.1, Dup: 0.1},
		{Loss: 0.05, Reorder: 0.05, Dup: 0.05, Corrupt: 0.05},
	} {
		l.Delay, l.Jitter = 20*time.Microsecond, 5*time.Microsecond
		t.Run(fmt.Sprintf("%+v", l), func(t *testing.T) {
			for seed := range uint64(4) {
				synctest.Test(t, func(t *testing.T) { lossy(t, seed, l, false) })
				synctest.Test(t, func(t *testing.T) { lossy(t, seed, l, true) })
			}
		})
	}
}

func lossy(t *testing.T, seed uint64, l simnet.LinkConfig, paged bool) {
	t.Logf("seed %d", seed)
	n := simnet.New(seed, simnet.Config{})
	defer n.Close()
	n.SetDefaultLink(l)
	tp := newTestPair(t, Config{Network: n, GiveUp: time.Hour}, "10.0.0.1", "10.0.0.2", verbs.MTU1024)
	defer tp.shut(t)
	if paged {
		defer tp.page(t, seed)()
	}
	r := rand.New(rand.NewPCG(seed, 7))
	const (
		ops   = 300
		slot  = 8 << 10
		slots = 64
		src   = 0         // side 0: what is sent
		sink  = 1 << 20   // side 0: where READs and atomics land
		recv  = 2 << 20   // side 1: receive buffers
		ctr   = 3<<20 + 8 // side 1: the atomic counter
		wr    = 0         // side 1: target of WRITEs
	)
	fill(tp.mem[0][src:src+slots*slot], seed)
	type op struct {
		kind verbs.SendOpcode
		n    int
		slot int
	}
	var sent []op
	posted, done, got, added := 0, 0, 0, uint64(0)
	postRecv := func(i int) {
		if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: uint64(i), SGs: tp.sge(1, recv+i%slots*slot, slot)}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 16 {
		postRecv(i)
	}
	next := 16
	var sends []op
	var wcs [16]verbs.WC
	idle := 0
	for done < ops {
		for posted < ops && posted-done < 24 {
			o := op{kind: []verbs.SendOpcode{verbs.OpSend, verbs.OpSend, verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd}[r.IntN(5)], n: r.IntN(slot), slot: posted % slots}
			w := verbs.SendWR{ID: uint64(posted), Opcode: o.kind, Flags: verbs.SendSignaled, SGs: tp.sge(0, src+o.slot*slot, o.n), RKey: tp.mr[1].RKey()}
			switch o.kind {
			case verbs.OpSend:
				sends = append(sends, o)
			case verbs.OpWrite:
				w.RemoteAddr = 0x1000 + uint64(wr+o.slot*slot)
			case verbs.OpRead: // what the WRITE before it to this place wrote, if there was one
				w.SGs, w.RemoteAddr = tp.sge(0, sink+o.slot*slot, o.n), 0x1000+uint64(wr+o.slot*slot)
			case verbs.OpFetchAdd:
				w.SGs, w.RemoteAddr, w.CompareAdd = tp.sge(0, sink+o.slot*slot, 8), 0x1000+ctr, 3
			}
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{w}); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, o)
			posted++
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if idle++; idle > 200_000 {
			t.Fatalf("stuck at %d of %d: %v %v", done, ops, tp.dev[0].Stats(), tp.dev[1].Stats())
		}
		for k := range tp.cq[1].Poll(wcs[:]) {
			if err := wcs[k].Err(); err != nil {
				t.Fatal(err)
			}
			o := sends[got]
			if b := tp.mem[1][recv+got%slots*slot:][:wcs[k].ByteLen]; int(wcs[k].ByteLen) != o.n || !bytes.Equal(b, tp.mem[0][src+o.slot*slot:][:o.n]) {
				t.Fatalf("SEND %d: %d bytes, want %d, or content", got, wcs[k].ByteLen, o.n)
			}
			got++
			postRecv(next)
			next++
		}
		for k := range tp.cq[0].Poll(wcs[:]) {
			if err := wcs[k].Err(); err != nil {
				t.Fatalf("%v (%v of %d bytes): %v %v", err, sent[done].kind, sent[done].n, tp.dev[0].Stats(), tp.dev[1].Stats())
			}
			if wcs[k].ID != uint64(done) {
				t.Fatalf("completion %d, want %d", wcs[k].ID, done)
			}
			switch o := sent[done]; o.kind {
			case verbs.OpFetchAdd:
				if v := binary.NativeEndian.Uint64(tp.mem[0][sink+o.slot*slot:]); v != added {
					t.Fatalf("atomic returned %d, want %d", v, added)
				}
				added += 3
			case verbs.OpWrite:
				if !bytes.Equal(tp.mem[1][wr+o.slot*slot:][:o.n], tp.mem[0][src+o.slot*slot:][:o.n]) {
					t.Fatal("WRITE content")
				}
			case verbs.OpRead:
				if !bytes.Equal(tp.mem[0][sink+o.slot*slot:][:o.n], tp.mem[1][wr+o.slot*slot:][:o.n]) {
					t.Fatal("READ content")
				}
			}
			done++
		}
	}
	if got != len(sends) {
		t.Fatalf("%d SENDs completed, %d arrived", len(sends), got)
	}
}
