//go:build lab && linux

package lab

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/openrds/openrds/verbs"
)

// lossFree are counters of rxe and of ours that stay where they are on a link that loses nothing. What
// timers do is not among them: an emulated machine that is not scheduled for a while lets them expire.
var (
	lossFreeGuest = []string{"out_of_seq_request", "rcvd_seq_err", "retry_exceeded_err"}
	lossFreeHost  = []string{"rx_malformed", "rx_bad_icrc", "rx_bad_df", "rx_bad_source", "rx_bad_pkey", "seq_nak_sent", "seq_nak_received", "implied_nak", "rx_socket_drops", "tx_errors"}
)

// wantLossFree checks, when t ends, that no counter of a loss grew on either side.
func wantLossFree(t testing.TB, g *Guest, dev verbs.Device) {
	t.Helper()
	g0, h0 := g.Counters(t), dev.Stats()
	t.Cleanup(func() {
		g1, h1 := g.Counters(t), dev.Stats()
		for _, c := range lossFreeGuest {
			if g1[c] != g0[c] {
				t.Errorf("the guest's %s grew by %d on a link without loss", c, g1[c]-g0[c])
			}
		}
		for _, c := range lossFreeHost {
			if h1[c] != h0[c] {
				t.Errorf("our %s grew by %d on a link without loss", c, h1[c]-h0[c])
			}
		}
	})
}

// TestRXE takes connections with the kernel's soft RoCE through every operation.
func TestRXE(t *testing.T) {
	for _, f := range []family{ipv4, ipv6} {
		for _, mtu := range []struct{ link, path int }{{4500, 4096}, {1500, 1024}} {
			for _, role := range []struct {
				name string
				make func(testing.TB, *hostEnd, *guestEnd, family)
			}{{"connect", connect}, {"accept", accept}} {
				t.Run(fmt.Sprintf("%s/mtu=%d/%s", f.name, mtu.path, role.name), func(t *testing.T) {
					g := guest(t, mtu.link)
					h := newHost(t, f.host)
					e := newGuestEnd(t, g)
					wantLossFree(t, g, h.dev)
					role.make(t, h, e, f)
					if got := h.got.PathMTU.Bytes(); got != mtu.path {
						t.Errorf("path MTU %d, want %d", got, mtu.path)
					}
					t.Logf("guest's QP: %s", e.do("attr"))
					for i, n := range []int{0, 1, mtu.path - 1, mtu.path, mtu.path + 1, 3*mtu.path + 5, 1 << 20} {
						fromHost(t, h, e, n, uint32(2*i+1))
						fromGuest(t, h, e, n, uint32(2*i+2))
					}
					atomics(t, h, e)
					invalidate(t, h, e)
					if role.name == "connect" {
						h.ep.Disconnect()
						if ev := e.do("event"); ev != "RDMA_CM_EVENT_DISCONNECTED" {
							t.Errorf("the guest sees %s when we disconnect", ev)
						}
					} else {
						e.do("disconnect")
					}
					select {
					case <-h.ep.Done():
					case <-h.ctx.Done():
						t.Error("no end of the connection")
					}
				})
			}
		}
	}
}

// Places in both regions.
const (
	offA = 0
	offB = 4 << 20
)

// fromHost has our end issue every operation on n bytes.
func fromHost(t testing.TB, h *hostEnd, e *guestEnd, n int, seed uint32) {
	t.Helper()
	for _, op := range []verbs.SendOpcode{verbs.OpSend, verbs.OpSendWithImm, verbs.OpWrite, verbs.OpWriteWithImm} {
		pattern(h.at(offA, n), seed)
		e.do("clear %d %d", offB, n+1)
		wr := verbs.SendWR{ID: 1, Opcode: op, SGs: h.sge(offA, n), Imm: 0xfeed0000 + seed}
		wantOp, wantImm := ibvWCRecv, uint32(0)
		switch op {
		case verbs.OpSend, verbs.OpSendWithImm:
			e.do("recv 2 %d %d", offB, n+1)
		case verbs.OpWriteWithImm:
			e.do("recv 2 0 0")
			wantOp = ibvWCRecvWriteImm
		}
		if op == verbs.OpSendWithImm || op == verbs.OpWriteWithImm {
			wantImm = wr.Imm
		}
		if op == verbs.OpWrite || op == verbs.OpWriteWithImm {
			wr.RemoteAddr, wr.RKey = e.addr+offB, e.rkey
		}
		h.post(wr)
		h.done(1)
		if op != verbs.OpWrite {
			wc := e.done(2, wantOp)
			if wc.bytes != n || wc.imm != wantImm {
				t.Errorf("%v of %d bytes: the guest's completion has %d bytes, immediate %#x, want %#x", op, n, wc.bytes, wc.imm, wantImm)
			}
		}
		if _, err := e.try("check %d %d %d", offB, n, seed); err != nil {
			t.Errorf("%v of %d bytes arrives changed: %v", op, n, err)
		}
		seed += 100
	}
	e.do("fill %d %d %d", offA, n, seed)
	clear(h.at(offB, n))
	h.post(verbs.SendWR{ID: 3, Opcode: verbs.OpRead, SGs: h.sge(offB, n), RemoteAddr: e.addr + offA, RKey: e.rkey})
	h.done(3)
	if err := checkPattern(h.at(offB, n), seed); err != nil {
		t.Errorf("READ of %d bytes brings something else: %v", n, err)
	}
}

// fromGuest has the guest issue every operation on n bytes.
func fromGuest(t testing.TB, h *hostEnd, e *guestEnd, n int, seed uint32) {
	t.Helper()
	for _, op := range []struct {
		name      string
		opcode    int
		recv      verbs.WCOpcode
		imm, addr bool
	}{
		{"send", ibvWCSend, verbs.WCRecv, false, false},
		{"sendimm", ibvWCSend, verbs.WCRecv, true, false},
		{"write", ibvWCWrite, 0, false, true},
		{"writeimm", ibvWCWrite, verbs.WCRecvWriteWithImm, true, true},
	} {
		e.do("fill %d %d %d", offA, n, seed)
		clear(h.at(offB, n+1))
		if op.recv != 0 {
			h.recv(2, offB, n+1)
		}
		cmd := fmt.Sprintf("%s 1 %d %d", op.name, offA, n)
		if op.addr {
			cmd += fmt.Sprintf(" %d %d", hostIOVA+offB, h.mr.RKey())
		}
		imm := 0xbeef0000 + seed
		if op.imm {
			cmd += fmt.Sprintf(" %d", imm)
		}
		e.do("%s", cmd)
		e.done(1, op.opcode)
		if op.recv != 0 {
			wc := h.done(2)
			if wc.Opcode != op.recv || int(wc.ByteLen) != n || op.imm != (wc.Flags&verbs.WCWithImm != 0) || op.imm && wc.Imm != imm {
				t.Errorf("%s of %d bytes from the guest completes as %+v, want immediate %#x", op.name, n, wc, imm)
			}
		}
		if err := checkPattern(h.at(offB, n), seed); err != nil {
			t.Errorf("%s of %d bytes from the guest arrives changed: %v", op.name, n, err)
		}
		seed += 100
	}
	pattern(h.at(offA, n), seed)
	e.do("clear %d %d", offB, n)
	e.do("read 3 %d %d %d %d", offB, n, hostIOVA+offA, h.mr.RKey())
	e.done(3, ibvWCRead)
	if _, err := e.try("check %d %d %d", offB, n, seed); err != nil {
		t.Errorf("READ of %d bytes by the guest brings something else: %v", n, err)
	}
}

// atomics issues both atomic operations from both ends.
func atomics(t testing.TB, h *hostEnd, e *guestEnd) {
	t.Helper()
	const start, add, swap = 1<<40 + 7, 1<<33 + 1, 42
	u64 := func(off int) uint64 { return binary.NativeEndian.Uint64(h.at(off, 8)) }
	peek := func(off int) (v uint64) {
		fmt.Sscan(e.do("peek %d", off), &v)
		return v
	}
	check := func(what string, got, want uint64) {
		t.Helper()
		if got != want {
			t.Errorf("%s is %d, want %d", what, got, want)
		}
	}
	// Ours on the guest's memory.
	e.do("poke %d %d", offA, uint64(start))
	h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpFetchAdd, CompareAdd: add, SGs: h.sge(offB, 8), RemoteAddr: e.addr + offA, RKey: e.rkey})
	h.done(1)
	check("what our FETCH_AND_ADD returns", u64(offB), start)
	check("the guest's memory after our FETCH_AND_ADD", peek(offA), start+add)
	h.post(verbs.SendWR{ID: 2, Opcode: verbs.OpCompareSwap, CompareAdd: start + add, Swap: swap, SGs: h.sge(offB, 8), RemoteAddr: e.addr + offA, RKey: e.rkey})
	h.done(2)
	check("what our CMP_AND_SWP returns", u64(offB), start+add)
	check("the guest's memory after our CMP_AND_SWP", peek(offA), swap)
	// The guest's on ours.
	binary.NativeEndian.PutUint64(h.at(offA, 8), start)
	e.do("fadd 3 %d %d %d %d", offB, hostIOVA+offA, h.mr.RKey(), uint64(add))
	e.done(3, ibvWCFadd)
	check("what the guest's FETCH_AND_ADD returns", peek(offB), start)
	check("our memory after the guest's FETCH_AND_ADD", u64(offA), start+add)
	e.do("cas 4 %d %d %d %d %d", offB, hostIOVA+offA, h.mr.RKey(), uint64(start+add), swap)
	e.done(4, ibvWCCas)
	check("what the guest's CMP_AND_SWP returns", peek(offB), start+add)
	check("our memory after the guest's CMP_AND_SWP", u64(offA), swap)
}

// invalidate writes through a type 2 window of the guest and invalidates its key with a SEND.
func invalidate(t testing.TB, h *hostEnd, e *guestEnd) {
	t.Helper()
	const n, seed = 5000, 77
	var key verbs.RKey
	fmt.Sscan(e.do("bind 1 %d %d", offB, n), &key)
	e.done(1, ibvWCBind)
	pattern(h.at(offA, n), seed)
	h.post(verbs.SendWR{ID: 2, Opcode: verbs.OpWrite, SGs: h.sge(offA, n), RemoteAddr: e.addr + offB, RKey: key})
	h.done(2)
	e.do("check %d %d %d", offB, n, seed)
	e.do("recv 3 %d %d", offA, 100)
	h.post(verbs.SendWR{ID: 4, Opcode: verbs.OpSendWithInv, SGs: h.sge(offA, 9), InvalidateRKey: key})
	h.done(4)
	if wc := e.done(3, ibvWCRecv); wc.bytes != 9 || wc.flags&(ibvWithInv|kernelWithInv) == 0 || verbs.RKey(wc.inv) != key {
		t.Errorf("SEND with invalidate of key %#x completes in the guest as %+v", key, wc)
	}
}
