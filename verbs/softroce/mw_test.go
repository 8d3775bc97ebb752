package softroce

import (
	"errors"
	"strings"
	"testing"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

func (tc *testContext) window(t verbs.MWType) verbs.MW {
	tc.t.Helper()
	w, err := tc.pd.AllocMW(t)
	if err != nil {
		tc.t.Fatal(err)
	}
	return w
}

func bindWR(id uint64, w verbs.MW, m verbs.MR, addr, n uint64, a verbs.Access) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpBindMW, Flags: verbs.SendSignaled,
		Bind: &verbs.MWBind{MW: w, Key: verbs.UpdateFastRegKey(w.RKey()), MR: m, Addr: addr, Length: n, Access: a}}
}

// A window opens its part of the region and no more: rights, both ends, and for a zero-based one addresses that are
// offsets.
func TestWindowGrants(t *testing.T) {
	script(t, func(tc *testContext) {
		w := tc.window(verbs.MWType2B)
		m, q := tc.mr.(*mr), tc.qp.(*qp)
		const at, n = testIOVA + 1000, 500
		for _, zero := range []bool{false, true} {
			a, start := verbs.AccessRemoteRead|verbs.AccessRemoteWrite, uint64(at)
			if zero {
				a, start = a|verbs.AccessZeroBased, 0
			}
			tc.post(bindWR(1, w, tc.mr, at, n, a))
			if wc := tc.wantWC("", 1, verbs.WCSuccess); wc.Opcode != verbs.WCBindMW {
				t.Errorf("completion of opcode %d", wc.Opcode)
			}
			key := uint32(w.RKey())
			for _, c := range []struct {
				addr uint64
				n    uint32
				need verbs.Access
				ok   bool
			}{
				{start, n, verbs.AccessRemoteRead, true},
				{start, n, verbs.AccessRemoteWrite, true},
				{start, 8, verbs.AccessRemoteAtomic, false},
				{start + n - 1, 1, verbs.AccessRemoteRead, true},
				{start + n, 0, verbs.AccessRemoteRead, true},
				{start + n - 1, 2, verbs.AccessRemoteRead, false},
				{start - 1, 1, verbs.AccessRemoteRead, false},
				{start + 1, n, verbs.AccessRemoteRead, false},
				{start, 1<<32 - 1, verbs.AccessRemoteRead, false},
			} {
				got, off := tc.dev.grant(q, key, c.addr, c.n, c.need)
				if (got != nil) != c.ok || got != nil && (got != m || off != 1000+c.addr-start) {
					t.Errorf("zero-based %v: %d bytes at start%+d for %#x: %v, offset %d", zero, c.n, int64(c.addr-start), c.need, got, off)
				}
			}
			other := &qp{dev: q.dev, pd: q.pd}
			for _, k := range []uint32{key ^ 1, key ^ 0x100} {
				if got, _ := tc.dev.grant(q, k, start, 1, verbs.AccessRemoteRead); got != nil {
					t.Errorf("key %#x opens what %#x does", k, key)
				}
			}
			if got, _ := tc.dev.grant(other, key, start, 1, verbs.AccessRemoteRead); got != nil {
				t.Error("a type 2 window works through another QP")
			}
			tc.post(verbs.SendWR{ID: 2, Opcode: verbs.OpLocalInv, Flags: verbs.SendSignaled, InvalidateRKey: w.RKey()})
			tc.wantWC("", 2, verbs.WCSuccess)
			if got, _ := tc.dev.grant(q, key, start, 1, verbs.AccessRemoteRead); got != nil {
				t.Error("a free window opens something")
			}
		}
		if err := w.Dealloc(); err != nil {
			t.Error(err)
		}
	})
}

// A region with windows bound is not deregistered; the error names them, and nothing has changed. The last
// window gone, it is.
func TestDeregisterWithWindows(t *testing.T) {
	script(t, func(tc *testContext) {
		mem := make([]byte, 4096)
		m, err := tc.pd.RegMR(mem, 0x1000, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		one, two := tc.window(verbs.MWType1), tc.window(verbs.MWType2A)
		tc.post(bindWR(1, one, m, 0x1000, 100, verbs.AccessRemoteRead), bindWR(2, two, m, 0x1200, 100, verbs.AccessRemoteWrite))
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.wantWC("", 2, verbs.WCSuccess)
		for _, left := range [][]verbs.MW{{one, two}, {two}} {
			err := m.Deregister()
			var busy *verbs.BusyError
			if !errors.As(err, &busy) || len(busy.Holders) != len(left) {
				t.Fatalf("deregister: %v", err)
			}
			for i, w := range left {
				if s := strings.Join(busy.Holders, "; "); !strings.Contains(s, w.(*mw).String()) {
					t.Errorf("window %d not in %q", i, s)
				}
			}
			tc.write(roce.RCWriteOnly, rx(2-len(left)), true, reth(0x1200, two.RKey(), 4), []byte("word"))
			tc.wantAck("the window still opens the region", roce.SynACK, rx(2-len(left)))
			if left[0] == one { // unbound by a bind of length 0
				b := bindWR(3, one, nil, 0, 0, 0)
				tc.post(b)
				tc.wantWC("", 3, verbs.WCSuccess)
			}
		}
		if err := two.Dealloc(); err != nil {
			t.Fatal(err)
		}
		if err := m.Deregister(); err != nil {
			t.Fatalf("deregister when the windows are gone: %v", err)
		}
		if string(mem[0x200:0x204]) != "word" {
			t.Error("not written")
		}
		tc.post(bindWR(4, one, tc.mr, testIOVA, 10, verbs.AccessRemoteRead))
		tc.wantWC("", 4, verbs.WCSuccess)
		if err := one.Dealloc(); err != nil {
			t.Fatalf("dealloc while bound: %v", err)
		}
		if err := one.Dealloc(); err != nil {
			t.Fatalf("the second time: %v", err)
		}
	})
}

// A peer may free a type 2 window with a SEND only through the QP it is bound to, and reads nothing through it
// afterwards.
func TestRemoteInvalidateWindow(t *testing.T) {
	script(t, func(tc *testContext) {
		w := tc.window(verbs.MWType2A)
		tc.post(bindWR(1, w, tc.mr, testIOVA, 100, verbs.AccessRemoteRead))
		tc.wantWC("", 1, verbs.WCSuccess)
		stranger := &qp{dev: tc.dev, pd: tc.pd.(*pd)}
		if tc.dev.invalidate(stranger, uint32(w.RKey()), true) {
			t.Fatal("invalidated through another QP")
		}
		tc.postRecv(verbs.RecvWR{ID: 2})
		inv := make([]byte, roce.IETHLen)
		roce.PutIETH(inv, uint32(w.RKey()))
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, w.RKey(), 10), nil)
		tc.want("", roce.RCReadRespOnly, rx(0))
		tc.write(roce.RCSendOnlyInv, rx(1), true, inv, nil)
		tc.wantAck("", roce.SynACK, rx(1))
		if wc := tc.wantWC("", 2, verbs.WCSuccess); wc.InvRKey != w.RKey() {
			t.Errorf("invalidated %#x", wc.InvRKey)
		}
		tc.write(roce.RCReadRequest, rx(2), true, reth(testIOVA, w.RKey(), 10), nil)
		tc.wantAck("", roce.SynNAKAccess, rx(2))
		if err := w.Dealloc(); err != nil {
			t.Error(err)
		}
	})
}

// Keys of regions and windows come from halves of one space; index 0 is nobody's.
func TestKeySpace(t *testing.T) {
	script(t, func(tc *testContext) {
		for range 100 {
			m, err := tc.pd.AllocFastRegMR(1)
			if err != nil {
				t.Fatal(err)
			}
			w := tc.window(verbs.MWType1)
			if i := m.RKey() >> 8; i == 0 || i >= firstWindow {
				t.Errorf("region of index %#x", i)
			}
			if i := w.RKey() >> 8; i < firstWindow {
				t.Errorf("window of index %#x", i)
			}
			if tc.dev.mrs.get(uint32(w.RKey())>>8) != nil || tc.dev.mws.get(uint32(m.RKey())>>8) != nil {
				t.Error("an index of both tables")
			}
			if err := errors.Join(m.Deregister(), w.Dealloc()); err != nil {
				t.Fatal(err)
			}
		}
	})
}
