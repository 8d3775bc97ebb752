package softroce

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// pageMem is n pages of memory.
func pageMem(n int) []byte {
	b := make([]byte, (n+1)*verbs.PageSize)
	off := int(-uintptr(unsafe.Pointer(&b[0])) % verbs.PageSize)
	return b[off : off+n*verbs.PageSize]
}

// fastRegion is a fast-registration region with memory of its own.
type fastRegion struct {
	tc    *testContext
	mr    verbs.MR
	key   verbs.RKey // of the last registration posted
	mem   []byte
	segs  [][]byte         // what the next registration maps
	lists []verbs.PageList // one for each registration
}

// mapper maps and frees one region on a QP whose requests do not complete, so each registration has a list of
// its own.
type mapper struct {
	fastRegion
	wr [1]verbs.SendWR
	fr verbs.FastReg
}

// prepare makes lists for n pairs of memory in so many pieces.
func (f *mapper) prepare(n, pieces int) {
	for range n {
		l, err := f.tc.pd.AllocPageList(16)
		if err != nil {
			f.tc.t.Fatal(err)
		}
		f.lists = append(f.lists, l)
		f.set(l, pieces) // its room grows now
	}
}

func (f *mapper) set(l verbs.PageList, pieces int) {
	if f.segs = f.segs[:0]; pieces == 1 {
		f.segs = append(f.segs, f.mem)
	} else {
		for i := range pieces { // backwards: no two are neighbours
			i = pieces - 1 - i
			f.segs = append(f.segs, f.mem[i*verbs.PageSize:(i+1)*verbs.PageSize])
		}
	}
	if err := l.Set(f.segs); err != nil {
		f.tc.t.Fatal(err)
	}
}

// pair maps the region through list i and frees it.
func (f *mapper) pair(i, pieces int) {
	f.set(f.lists[i], pieces)
	f.key = verbs.UpdateFastRegKey(f.key)
	f.fr = verbs.FastReg{MR: f.mr, Key: f.key, Pages: f.lists[i], IOVA: fastIOVA, Access: accessAll}
	f.wr[0] = verbs.SendWR{Opcode: verbs.OpFastRegMR, FastReg: &f.fr}
	if _, err := f.tc.qp.PostSend(f.wr[:]); err != nil {
		f.tc.t.Fatal(err)
	}
	f.wr[0] = verbs.SendWR{Opcode: verbs.OpLocalInv, InvalidateRKey: f.key}
	if _, err := f.tc.qp.PostSend(f.wr[:]); err != nil {
		f.tc.t.Fatal(err)
	}
}

func (tc *testContext) fast(pages int) *fastRegion {
	tc.t.Helper()
	f := &fastRegion{tc: tc, mem: pageMem(pages)}
	var err error
	if f.mr, err = tc.pd.AllocFastRegMR(pages); err != nil {
		tc.t.Fatal(err)
	}
	f.segs = [][]byte{f.mem}
	f.key = f.mr.RKey()
	fill(f.mem, uint64(pages))
	return f
}

func (f *fastRegion) free() {
	f.tc.t.Helper()
	if err := f.mr.Deregister(); err != nil {
		f.tc.t.Error(err)
	}
	for _, l := range f.lists {
		if err := l.Close(); err != nil {
			f.tc.t.Error(err)
		}
	}
}

const fastIOVA = 0x70000

// reg maps the region under the next variant of its key.
func (f *fastRegion) reg(id uint64, a verbs.Access) verbs.SendWR {
	f.tc.t.Helper()
	l, err := f.tc.pd.AllocPageList(len(f.mem) / verbs.PageSize)
	if err != nil {
		f.tc.t.Fatal(err)
	}
	f.lists = append(f.lists, l)
	if err := l.Set(f.segs); err != nil {
		f.tc.t.Fatal(err)
	}
	f.key = verbs.UpdateFastRegKey(f.key)
	return verbs.SendWR{ID: id, Opcode: verbs.OpFastRegMR, Flags: verbs.SendSignaled, FastReg: &verbs.FastReg{MR: f.mr, Key: f.key, Pages: l, IOVA: fastIOVA, Access: a}}
}

func (f *fastRegion) inv(id uint64) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpLocalInv, Flags: verbs.SendSignaled, InvalidateRKey: f.key}
}

func (f *fastRegion) sge(off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: fastIOVA + uint64(off), Length: uint32(n), LKey: verbs.LKey(f.key)}}
}

func (tc *testContext) ack(p int) {
	tc.t.Helper()
	tc.write(roce.RCAck, tx(p), false, aeth(roce.SynACK, uint32(p)+1), nil)
}

// Local operations take no PSN, execute in the order of the queue, and complete in it: behind what is before
// them, at once with what completes before them.
func TestLocalOperationsInOrder(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(2)
		defer f.free()
		tc.post(send(1, tc.sge(0, 10)), f.reg(2, accessAll), send(3, f.sge(4000, 300)), send(4, tc.sge(0, 5)), f.inv(5), f.reg(6, accessAll), send(7, f.sge(0, 3)))
		tc.want("", roce.RCSendOnly, tx(0))
		if pk := tc.want("the region is mapped before what is behind starts", roce.RCSendFirst, tx(1)); !bytes.Equal(pk.Payload, f.mem[4000:4256]) {
			t.Error("not the region's bytes")
		}
		if pk := tc.want("", roce.RCSendLast, tx(2)); !bytes.Equal(pk.Payload, f.mem[4256:4300]) {
			t.Error("not the region's bytes")
		}
		tc.want("", roce.RCSendOnly, tx(3))
		tc.wantIdle("the invalidation waits for the SEND from the region, and all behind it too")
		tc.wantNoWC("nothing completes before what precedes it")
		tc.ack(0)
		tc.wantWC("", 1, verbs.WCSuccess)
		if wc := tc.wantWC("", 2, verbs.WCSuccess); wc.Opcode != verbs.WCFastRegMR {
			t.Errorf("completion of opcode %d", wc.Opcode)
		}
		tc.wantNoWC("")
		tc.ack(2)
		tc.wantWC("", 3, verbs.WCSuccess)
		tc.want("now the region is free, mapped again and used", roce.RCSendOnly, tx(4))
		tc.wantNoWC("executed is not completed: a SEND is before them")
		tc.ack(4)
		for id := uint64(4); id <= 7; id++ {
			tc.wantWC("", id, verbs.WCSuccess)
		}
	})
}

// An invalidation is fenced against requests that use the region, and against no others: it frees the region
// while a hundred others are under way.
func TestLocalInvOvertakes(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(1)
		defer f.free()
		tc.post(send(1, tc.sge(0, 10)), verbs.SendWR{ID: 2, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tc.sge(1<<17, 10), RemoteAddr: 1, RKey: 2})
		m := f.mr.(*mr)
		for id := uint64(3); id < 9; id += 2 {
			tc.post(f.reg(id, accessAll))
			if !m.valid || m.RKey() != f.key {
				t.Fatal("not mapped while earlier requests are under way")
			}
			tc.post(f.inv(id + 1))
			if m.valid {
				t.Fatal("not free while earlier requests are under way")
			}
		}
		if err := f.lists[0].Set(nil); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("the list of a registration not complete yet: %v", err)
		}
		tc.wantNoWC("")
		tc.want("", roce.RCSendOnly, tx(0))
		tc.want("", roce.RCReadRequest, tx(1))
		tc.write(roce.RCReadRespOnly, tx(1), false, aeth(roce.SynACK, 2), make([]byte, 10))
		for id := uint64(1); id < 9; id++ {
			tc.wantWC("in order", id, verbs.WCSuccess)
		}
		if err := f.lists[0].Set(nil); err != nil {
			t.Error(err)
		}
	})
}

// A go-back sends packets again. It does not map, free or bind anything again.
func TestGoBackOverLocalOperations(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(1)
		defer f.free()
		write := verbs.SendWR{ID: 3, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, RemoteAddr: 0x4000, RKey: 0x77}
		reg := f.reg(2, accessAll)
		write.SGs = f.sge(0, 600)
		tc.post(send(1, tc.sge(0, 300)), reg, write, f.inv(4), f.reg(5, accessAll), send(6, nil))
		all := func(what string) {
			t.Helper()
			tc.want(what, roce.RCSendFirst, tx(0))
			tc.want("", roce.RCSendLast, tx(1))
			tc.want("", roce.RCWriteFirst, tx(2))
			tc.want("", roce.RCWriteMiddle, tx(3))
			tc.want("", roce.RCWriteLast, tx(4))
			tc.wantIdle("")
		}
		all("first time")
		key := f.mr.RKey()
		tc.write(roce.RCAck, tx(0), false, aeth(roce.SynNAKSeq, 0), nil)
		all("again")
		if f.mr.RKey() != key || !f.mr.(*mr).valid {
			t.Error("the registration was repeated, or undone")
		}
		time.Sleep(time.Second)
		tc.write(roce.RCAck, tx(3), false, aeth(roce.SynNAKSeq, 0), nil)
		for pk, ok := tc.read(); ok; pk, ok = tc.read() {
			if p := pk.BTH.PSN(); p == tx(4) {
				break
			}
		}
		tc.wantWC("what is before the NAK completes", 1, verbs.WCSuccess)
		tc.wantWC("", 2, verbs.WCSuccess)
		tc.ack(4)
		tc.wantWC("", 3, verbs.WCSuccess)
		tc.wantWC("", 4, verbs.WCSuccess)
		tc.wantWC("", 5, verbs.WCSuccess)
		tc.want("", roce.RCSendOnly, tx(5))
		tc.ack(5)
		tc.wantWC("", 6, verbs.WCSuccess)
	})
}

// A request whose region is freed by another queue while it is under way fails at its next packet. Nothing of the
// memory leaves any more.
func TestRetransmitFindsRegionGone(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(1)
		defer f.free()
		tc.post(f.reg(1, accessAll))
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.post(send(2, f.sge(0, 600)), send(3, nil))
		for range 4 {
			tc.read()
		}
		// The peer frees it, who knows why.
		tc.postRecv(verbs.RecvWR{ID: 9})
		inv := make([]byte, roce.IETHLen)
		roce.PutIETH(inv, uint32(f.key))
		tc.write(roce.RCSendOnlyInv, rx(0), true, inv, nil)
		tc.wantAck("", roce.SynACK, rx(0))
		if wc := tc.wantWC("", 9, verbs.WCSuccess); wc.Flags&verbs.WCWithInvalidate == 0 || wc.InvRKey != f.key {
			t.Errorf("completion %+v", wc)
		}
		tc.write(roce.RCAck, tx(1), false, aeth(roce.SynNAKSeq, 0), nil)
		tc.wantIdle("nothing is sent from a region that is free")
		tc.wantWC("", 2, verbs.WCLocProtErr)
		tc.wantWC("", 3, verbs.WCFlushErr)
	})
}

// The same at the sink of a READ.
func TestReadSinkGone(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(1)
		defer f.free()
		tc.post(f.reg(1, accessAll))
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.post(verbs.SendWR{ID: 2, Opcode: verbs.OpRead, SGs: f.sge(0, 600), RemoteAddr: 1, RKey: 2})
		tc.want("", roce.RCReadRequest, tx(0))
		old := bytes.Clone(f.mem)
		tc.write(roce.RCReadRespFirst, tx(0), false, aeth(roce.SynACK, 1), make([]byte, 256))
		tc.postRecv(verbs.RecvWR{ID: 9})
		inv := make([]byte, roce.IETHLen)
		roce.PutIETH(inv, uint32(f.key))
		tc.write(roce.RCSendOnlyInv, rx(0), true, inv, nil)
		tc.wantWC("", 9, verbs.WCSuccess)
		tc.write(roce.RCReadRespMiddle, tx(1), false, nil, make([]byte, 256))
		tc.wantWC("", 2, verbs.WCLocProtErr)
		if !bytes.Equal(f.mem[:256], make([]byte, 256)) || !bytes.Equal(f.mem[256:], old[256:]) {
			t.Error("not just the first packet was placed")
		}
	})
}

// READ with invalidate frees its sink when the last response has come, and fails when the key is another's.
func TestReadWithInvalidate(t *testing.T) {
	script(t, func(tc *testContext) {
		f, g := tc.fast(1), tc.fast(1)
		defer f.free()
		defer g.free()
		read := verbs.SendWR{ID: 2, Opcode: verbs.OpReadWithInv, Flags: verbs.SendSignaled, RemoteAddr: 1, RKey: 2}
		reg := f.reg(1, accessAll)
		read.SGs, read.InvalidateRKey = f.sge(0, 300), f.key
		tc.post(reg, read)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.want("", roce.RCReadRequest, tx(0))
		tc.write(roce.RCReadRespFirst, tx(0), false, aeth(roce.SynACK, 1), make([]byte, 256))
		if !f.mr.(*mr).valid {
			t.Fatal("free before the READ is complete")
		}
		tc.write(roce.RCReadRespLast, tx(1), false, aeth(roce.SynACK, 1), make([]byte, 44))
		if wc := tc.wantWC("", 2, verbs.WCSuccess); wc.Opcode != verbs.WCRead || f.mr.(*mr).valid {
			t.Errorf("completion %+v, region valid: %v", wc, f.mr.(*mr).valid)
		}
		read.ID, read.InvalidateRKey = 4, f.key // free
		reg = g.reg(3, accessAll)
		read.SGs = g.sge(0, 10)
		tc.post(reg, read)
		tc.wantWC("", 3, verbs.WCSuccess)
		tc.want("", roce.RCReadRequest, tx(2))
		tc.write(roce.RCReadRespOnly, tx(2), false, aeth(roce.SynACK, 2), make([]byte, 10))
		tc.wantWC("a key that cannot be invalidated", 4, verbs.WCLocQPOpErr)
	})
}

// A SEND whose key may not be invalidated is placed, refused, and ends the connection.
func TestSendWithInvalidateRefused(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.sge(1<<17, 100)})
		inv := make([]byte, roce.IETHLen)
		roce.PutIETH(inv, uint32(tc.mr.RKey()))
		tc.write(roce.RCSendOnlyInv, rx(0), true, inv, []byte("placed first"))
		tc.wantAck("", roce.SynNAKAccess, rx(0))
		tc.wantWC("", 1, verbs.WCRemInvReqErr)
		if string(tc.mem[1<<17:1<<17+12]) != "placed first" {
			t.Error("not placed")
		}
	})
}

// The bytes that addresses of a mapping stand for are those of its segments in order, however they lie.
func TestViewAgainstNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	mem := pageMem(64)
	fill(mem, 9)
	for range 300 {
		// Segments: whole pages, some neighbours, the first and the last cut short.
		var segs [][]byte
		for range 1 + r.IntN(8) {
			a := r.IntN(60)
			segs = append(segs, mem[a*verbs.PageSize:(a+1+r.IntN(4))*verbs.PageSize])
		}
		segs[0] = segs[0][r.IntN(verbs.PageSize):]
		l := len(segs) - 1
		segs[l] = segs[l][:len(segs[l])-r.IntN(min(len(segs[l]), verbs.PageSize))]
		flat := bytes.Join(segs, nil)
		pl := &pageList{max: 64}
		if err := pl.Set(segs); err != nil {
			t.Fatal(err)
		}
		if pl.Len() != len(flat) || pl.Pages() > 64 {
			t.Fatalf("%d bytes of %d pages, want %d", pl.Len(), pl.Pages(), len(flat))
		}
		m := &mr{mapping: mapping{iova: 1 << 40, size: uint64(pl.size), pieces: pl.pieces}}
		if len(pl.pieces) == 1 {
			m.mem = pl.pieces[0].mem
		}
		for range 50 {
			off := r.IntN(len(flat))
			n := 1 + r.IntN(len(flat)-off)
			sgs, v := m.view(nil, uint64(off), uint32(n), false)
			if v != granted {
				t.Fatal("refused")
			}
			var got []byte
			for i := range sgs {
				got = append(got, sgs[i].bytes()...)
			}
			if !bytes.Equal(got, flat[off:off+n]) {
				t.Fatalf("bytes %d to %d of %d segments differ", off, off+n, len(segs))
			}
			if len(pl.pieces) == 1 && len(sgs) != 1 {
				t.Fatal("contiguous memory in pieces")
			}
		}
	}
}

// Posted lists that mix plain and fast-registered elements, at every boundary, both ways.
func TestMixedLists(t *testing.T) {
	script(t, func(tc *testContext) {
		f := tc.fast(3)
		defer f.free()
		// Pages in another order than they lie, the first and the last in part.
		f.segs = [][]byte{f.mem[2*4096+100:], f.mem[:4096], f.mem[4096 : 2*4096-7]}
		flat := bytes.Join(f.segs, nil)
		tc.post(f.reg(1, accessAll))
		tc.wantWC("", 1, verbs.WCSuccess)
		if f.mr.Len() != len(flat) || f.mr.Addr() != fastIOVA {
			t.Fatalf("region of %d bytes at %#x", f.mr.Len(), f.mr.Addr())
		}
		psn := 0
		for _, c := range [][2]int{{0, 1}, {0, len(flat)}, {3990, 20}, {3995, 4097}, {len(flat) - 1, 1}} {
			off, n := c[0], c[1]
			want := append(bytes.Clone(tc.mem[5:5+333]), flat[off:off+n]...)
			tc.post(send(2, append(tc.sge(5, 333), f.sge(off, n)...)))
			var got []byte
			for pk, ok := tc.read(); ok; pk, ok = tc.read() {
				got = append(got, pk.Payload...)
				psn++
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("[%d,%d): sent %d bytes that differ", off, off+n, len(got))
			}
			tc.ack(psn - 1)
			tc.wantWC("", 2, verbs.WCSuccess)
		}
		// A receive into the region, and a READ of it by the peer.
		tc.postRecv(verbs.RecvWR{ID: 3, SGs: append(tc.sge(1<<18, 7), f.sge(3990, 4096)...)})
		msg := make([]byte, 256)
		fill(msg, 77)
		tc.write(roce.RCSendFirst, rx(0), false, nil, msg)
		tc.write(roce.RCSendLast, rx(1), true, nil, msg[:100])
		tc.wantAck("", roce.SynACK, rx(1))
		tc.wantWC("", 3, verbs.WCSuccess)
		tc.write(roce.RCReadRequest, rx(2), true, reth(fastIOVA+3990, f.key, 349), nil)
		var got []byte
		for pk, ok := tc.read(); ok; pk, ok = tc.read() {
			got = append(got, pk.Payload...)
		}
		if !bytes.Equal(got, append(bytes.Clone(msg[7:]), msg[:100]...)) {
			t.Error("what was received differs from what was sent")
		}
		tc.post(f.inv(4))
		tc.wantWC("", 4, verbs.WCSuccess)
	})
}

// A pair of registration and invalidation with 128 SENDs outstanding allocates nothing.
func TestFastRegAllocs(t *testing.T) {
	for _, pieces := range []int{1, 16} {
		f, done := outstanding(t)
		f.prepare(300, pieces)
		i := 0
		pair := func() {
			f.pair(i, pieces)
			i++
		}
		pair()
		if n := testing.AllocsPerRun(200, pair); n != 0 && !invariants.Enabled { // which remembers stacks
			t.Errorf("%v allocations per pair of %d pieces", n, pieces)
		}
		if m := f.mr.(*mr); m.valid || m.RKey() != f.key {
			t.Error("not executed as posted")
		}
		done()
	}
}

// outstanding is a fast-registration region on a QP with 128 SENDs that the peer does not acknowledge.
func outstanding(t testing.TB) (*mapper, func()) {
	n := &scriptNet{}
	d, err := New(Config{Network: n}).OpenDevice(netip.MustParseAddr("10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	tc := &testContext{t: t, dev: d.(*device), conn: n.conn, peer: netip.MustParseAddrPort("10.0.0.2:4791")}
	n.conn.from = tc.peer
	tc.pd, _ = d.AllocPD()
	tc.cq, _ = d.CreateCQ(verbs.CQConfig{Depth: 1 << 16})
	tc.qp, err = tc.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: tc.cq, RecvCQ: tc.cq, MaxSendWR: 1 << 15, MaxSendSGE: 1})
	if err != nil {
		t.Fatal(err)
	}
	tc.mem = make([]byte, 1<<16)
	tc.mr, err = tc.pd.RegMR(tc.mem, testIOVA, accessAll)
	if err != nil {
		t.Fatal(err)
	}
	tc.connect()
	for i := range 128 {
		if _, err := tc.qp.PostSend([]verbs.SendWR{{ID: uint64(i), Opcode: verbs.OpSend, SGs: tc.sge(0, 64)}}); err != nil {
			t.Fatal(err)
		}
	}
	f := &mapper{fastRegion: fastRegion{tc: tc, mem: pageMem(16)}}
	if f.mr, err = tc.pd.AllocFastRegMR(16); err != nil {
		t.Fatal(err)
	}
	f.key = f.mr.RKey()
	return f, func() {
		if s := tc.qp.State(); s != verbs.StateRTS {
			t.Errorf("QP is in %v", s)
		}
		for _, c := range []func() error{tc.qp.Close, f.mr.Deregister, tc.mr.Deregister} {
			if err := c(); err != nil {
				t.Error(err)
			}
		}
		for _, l := range f.lists {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, c := range []func() error{tc.pd.Close, tc.cq.Close, d.Close} {
			if err := c(); err != nil {
				t.Error(err)
			}
		}
	}
}

// BenchmarkFastRegLocalInv posts a registration of 64 KiB and its invalidation with 128 SENDs outstanding: what
// mapping costs below a pool.
func BenchmarkFastRegLocalInv(b *testing.B) {
	for _, pieces := range []int{1, 16} {
		b.Run(fmt.Sprintf("%d", pieces), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; i < b.N; {
				b.StopTimer()
				f, done := outstanding(b)
				k := min(b.N-i, 1<<14-128)
				f.prepare(k, pieces)
				f.pair(0, pieces)
				b.StartTimer()
				for n := 1; n < k; n++ {
					f.pair(n, pieces)
				}
				i += k
				b.StopTimer()
				done()
				b.StartTimer()
			}
		})
	}
}
