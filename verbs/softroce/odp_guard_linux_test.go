package softroce

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// mapped is n bytes that can be taken away behind everybody's back.
func mapped(t *testing.T, n int) (mem []byte, takeAway func()) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	return mem, func() {
		// No rights rather than no mapping: nothing else may come to live there.
		if err := unix.Mprotect(mem, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGuard takes plain registered memory away: each operation on it fails, and nothing else does.
func TestGuard(t *testing.T) {
	for _, c := range []struct {
		name string
		run  func(tc *testContext, m verbs.MR)
	}{
		{"send, copied", func(tc *testContext, m verbs.MR) {
			tc.post(send(1, tc.sge(0, 10)), send(2, []verbs.SGE{{Addr: 0, Length: 100, LKey: m.LKey()}}))
			tc.want("what is before it leaves intact", roce.RCSendOnly, tx(0))
			tc.wantIdle("and nothing else")
			tc.write(roce.RCAck, tx(0), false, aeth(roce.SynACK, 1), nil)
			tc.wantWC("", 1, verbs.WCSuccess)
			tc.wantWC("", 2, verbs.WCLocProtErr)
		}},
		{"WRITE, received", func(tc *testContext, m verbs.MR) {
			tc.write(roce.RCWriteOnly, rx(0), true, reth(0, m.RKey(), 10), make([]byte, 10))
			tc.wantAck("", roce.SynNAKAccess, rx(0))
		}},
		{"READ, answered", func(tc *testContext, m verbs.MR) {
			tc.write(roce.RCReadRequest, rx(0), true, reth(0, m.RKey(), 10), nil)
			tc.wantAck("", roce.SynNAKAccess, rx(0))
		}},
		{"atomic", func(tc *testContext, m verbs.MR) {
			ext := make([]byte, roce.AtomicETHLen)
			roce.PutAtomicETH(ext, 0, uint32(m.RKey()), 5, 0)
			tc.write(roce.RCFetchAdd, rx(0), true, ext, nil)
			tc.wantAck("", roce.SynNAKAccess, rx(0))
		}},
		{"receive", func(tc *testContext, m verbs.MR) {
			tc.postRecv(verbs.RecvWR{ID: 1, SGs: []verbs.SGE{{Addr: 0, Length: 100, LKey: m.LKey()}}})
			tc.write(roce.RCSendOnly, rx(0), true, nil, make([]byte, 10))
			tc.wantAck("", roce.SynNAKOp, rx(0))
			tc.wantWC("", 1, verbs.WCLocProtErr)
		}},
		{"READ, sink", func(tc *testContext, m verbs.MR) {
			tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: []verbs.SGE{{Addr: 0, Length: 10, LKey: m.LKey()}}, RemoteAddr: 1, RKey: 1})
			tc.want("", roce.RCReadRequest, tx(0))
			tc.write(roce.RCReadRespOnly, tx(0), false, aeth(roce.SynACK, 1), make([]byte, 10))
			tc.wantWC("", 1, verbs.WCLocProtErr)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, takeAway := mapped(t, 1<<16)
			script(t, func(tc *testContext) {
				m, err := tc.pd.RegMR(mem, 0, accessAll)
				if err != nil {
					t.Fatal(err)
				}
				takeAway()
				c.run(tc, m)
				tc.wantIdle("")
				if s := tc.qp.State(); s != verbs.StateErr {
					t.Fatalf("QP is in %v", s)
				}
				if n := tc.dev.Stats()["memory_faults"]; n == 0 {
					t.Fatal("no fault was counted")
				}
				if err := m.Deregister(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// TestGuardLetsOthersPanic sees to it that a guard is for faults alone.
func TestGuardLetsOthersPanic(t *testing.T) {
	defer func() {
		if r := recover(); r != "BUG: of ours" {
			t.Fatalf("recovered %v", r)
		}
	}()
	var at uintptr
	func() {
		defer unguard(false, &at)
		panic("BUG: of ours")
	}()
}

// TestUndo takes a packet whose payload cannot be read out of a train of three.
func TestUndo(t *testing.T) {
	mem, takeAway := mapped(t, 1<<16)
	good := make([]byte, 4096)
	fill(good, 9)
	var out [][]byte
	f := &sendConn{gso: true, send: func(ts []packetio.TxTrain) (int, error) {
		for _, t := range ts {
			b := bytes.Join(t.Vec, nil)
			for len(b) > 0 {
				n := min(t.SegSize, len(b))
				out, b = append(out, b[:n]), b[n:]
			}
		}
		return len(ts), nil
	}}
	synctest.Test(t, func(t *testing.T) {
		tc := newTestContext(t, Config{})
		f.take(tc)
		takeAway()
		d, q := tc.dev, tc.qp.(*qp)
		d.role.Lock()
		for i, p := range []struct {
			b []byte
			n int
		}{{good, 1024}, {mem, 1024}, {good[1024:], 1024}, {mem, 100}, {good[2048:], 512}} {
			var b pktBuilder
			b.begin(d, q, roce.RCSendMiddle, roce.BTHLen, p.n)
			want := granted
			if &p.b[0] == &mem[0] {
				want = refused
			}
			if v := b.finish(d, q, roce.RCSendMiddle, false, false, peerQPN, tx(i), []sge{direct(p.b)}, 0); v != want {
				t.Errorf("packet %d: %v, want %v", i, v, want)
			}
		}
		d.tx.flush()
		d.role.Unlock()
		if len(out) != 3 {
			t.Fatalf("%d packets left, want 3", len(out))
		}
		flow := roce.NewFlow(tc.conn.local, tc.peer)
		for i, b := range out {
			var pk roce.Packet
			if err := roce.Parse(b, &pk); err != nil {
				t.Fatal(err)
			}
			if _, v := flow.Check(b, uint16(i)); v != roce.OK0 && v != roce.OKGuess {
				t.Errorf("packet %d has ICRC %v", i, v)
			}
			if pk.BTH.PSN() != tx(2*i) || !bytes.Equal(pk.Payload, good[i*1024:][:len(pk.Payload)]) {
				t.Errorf("packet %d is PSN %#x of %d bytes, or carries something else", i, pk.BTH.PSN(), len(pk.Payload))
			}
		}
		tc.close()
	})
}

// sendConn is a scriptConn with a Send of the test's.
type sendConn struct {
	*scriptConn
	gso  bool
	send func([]packetio.TxTrain) (int, error)
}

func (c *sendConn) Caps() packetio.Caps {
	x := c.scriptConn.Caps()
	x.GSO = c.gso
	return x
}

// take puts c between the device and its scriptConn.
func (c *sendConn) take(tc *testContext) {
	c.scriptConn = tc.conn
	tc.dev.role.Lock()
	tc.dev.conn, tc.dev.caps = c, c.Caps()
	tc.dev.role.Unlock()
}

func (c *sendConn) Send(ts []packetio.TxTrain) (int, error) { return c.send(ts) }

// TestGatherFault has the socket fail to read what it is to send.
func TestGatherFault(t *testing.T) {
	fail := 1
	f := &sendConn{}
	f.send = func(ts []packetio.TxTrain) (int, error) {
		for i, tr := range ts {
			if len(tr.Vec) > 1 && fail > 0 { // with memory of a region
				fail--
				return i, syscall.EFAULT
			}
			f.scriptConn.Send(ts[i : i+1])
		}
		return len(ts), nil
	}
	synctest.Test(t, func(t *testing.T) {
		tc := newTestContext(t, Config{})
		f.take(tc)
		tc.dev.attr.Caps |= verbs.CapOnDemandPaging
		tc.qp.(*qp).pmtu = 4096 // packets of more than what is copied
		p := newFakePaged(8)
		m, err := tc.pd.RegOnDemandMR(p, odpIOVA, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		fill(p.alias, 4)
		tc.post(send(1, []verbs.SGE{{Addr: odpIOVA, Length: 1000, LKey: m.LKey()}}))
		if pk := tc.want("the packet leaves when the page was brought in again", roce.RCSendOnly, tx(0)); !bytes.Equal(pk.Payload, p.alias[:1000]) {
			t.Fatal("and carries something else")
		}
		tc.wantIdle("once")
		if got := p.calls(); len(got) != 2 {
			t.Fatalf("populated %v, want twice", got)
		}
		if s := tc.dev.Stats(); s["memory_faults"] != 1 || s["odp_faults"] != 2 || s["odp_present_pages"] != 1 || s["odp_invalidated_pages"] != 1 {
			t.Fatalf("counters %v", s)
		}
		tc.write(roce.RCAck, tx(0), false, aeth(roce.SynACK, 1), nil)
		tc.wantWC("", 1, verbs.WCSuccess)
		if err := tc.qp.Close(); err != nil {
			t.Fatal(err)
		}
		if err := m.Deregister(); err != nil {
			t.Fatal(err)
		}
		tc.close()
	})
}

// TestForeignMemory refuses what nobody would tell us about.
func TestForeignMemory(t *testing.T) {
	mem, _ := mapped(t, 1<<16)
	script(t, func(tc *testContext) {
		for _, b := range [][]byte{mem, make([]byte, 100)} {
			if m, err := tc.pd.RegMR(b, uint64(uintptr(unsafe.Pointer(&b[0]))), verbs.AccessOnDemand|verbs.AccessLocalWrite); m != nil || !errors.Is(err, verbs.ErrNotSupported) {
				t.Errorf("registering memory that cannot be watched: %v, %v", m, err)
			}
		}
	})
}

// faultyPlacer is a network that cannot write where it is told to.
type faultyPlacer struct{ calls int }

func (p *faultyPlacer) RecvPlaced([]packetio.RxTrain, packetio.Layout, [][]byte) (int, error) {
	if p.calls++; p.calls > 100 {
		panic("BUG: asked for ever")
	}
	return 0, syscall.EFAULT
}

func (*faultyPlacer) Linear(int) []byte { return nil }

// TestPlacementFault: receive buffers that were unmapped are the error of who receives into them, and not the end of all receiving.
func TestPlacementFault(t *testing.T) {
	script(t, func(tc *testContext) {
		vs, err := tc.pd.CreateSRQ(verbs.SRQConfig{MaxWR: 4})
		if err != nil {
			t.Fatal(err)
		}
		tc.more = append(tc.more, vs.Close)
		if _, err := vs.PostRecv([]verbs.RecvWR{{ID: 1, SGs: tc.sge(0, 65536)}}); err != nil {
			t.Fatal(err)
		}
		p := &faultyPlacer{}
		tc.dev.role.Lock()
		tc.dev.place = placement{conn: p, srq: vs.(*srq), layout: packetio.Layout{Hdr: roce.BTHLen, Payload: 4096, Tail: roce.ICRCLen, Segs: 15}}
		tc.dev.role.Unlock()
		tc.postRecv(verbs.RecvWR{ID: 2, SGs: tc.sge(1<<17, 100)})
		tc.write(roce.RCSendOnly, rx(0), true, nil, []byte("hello"))
		tc.wantAck("others receive", roce.SynACK, rx(0))
		tc.wantWC("", 2, verbs.WCSuccess)
		if p.calls != 1 {
			t.Errorf("tried %d times", p.calls)
		}
	})
}
