//go:build lab && linux

package lab

import (
	"testing"

	"github.com/openrds/openrds/verbs"
)

// opened makes a key of ours valid for n bytes at offset off of our memory, by a work request, and returns it with the
// address of the first byte. Its MW or MR is gone when t ends.
type opened func(t testing.TB, h *hostEnd, off, n int) (key verbs.RKey, addr uint64)

// window opens by binding a window of a type.
func window(typ verbs.MWType) opened {
	return func(t testing.TB, h *hostEnd, off, n int) (verbs.RKey, uint64) {
		t.Helper()
		w, err := h.pd.AllocMW(typ)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.Dealloc(); err != nil {
				t.Error(err)
			}
		})
		key := verbs.UpdateFastRegKey(w.RKey())
		h.post(verbs.SendWR{ID: 50, Opcode: verbs.OpBindMW, Bind: &verbs.MWBind{MW: w, Key: key, MR: h.mr, Addr: hostIOVA + uint64(off), Length: uint64(n),
			Access: verbs.AccessRemoteWrite | verbs.AccessRemoteRead}})
		h.done(50)
		return key, hostIOVA + uint64(off)
	}
}

// fastRegistered opens by a fast registration.
func fastRegistered(t testing.TB, h *hostEnd, off, n int) (verbs.RKey, uint64) {
	t.Helper()
	const iova = 0x123000
	pages := (n + verbs.PageSize - 1) / verbs.PageSize
	m, err := h.pd.AllocFastRegMR(pages)
	if err != nil {
		t.Fatal(err)
	}
	l, err := h.pd.AllocPageList(pages)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := m.Deregister(); err != nil {
			t.Error(err)
		}
	})
	if err := l.Set([][]byte{h.mem[off : off+n]}); err != nil {
		t.Fatal(err)
	}
	key := verbs.UpdateFastRegKey(m.RKey())
	h.post(verbs.SendWR{ID: 50, Opcode: verbs.OpFastRegMR, FastReg: &verbs.FastReg{MR: m, Key: key, Pages: l, IOVA: iova, Access: verbs.AccessLocalWrite | verbs.AccessRemoteWrite | verbs.AccessRemoteRead}})
	h.done(50)
	return key, iova
}

// TestRXEInvalidate has the guest use keys that our work requests opened, and end them by a SEND with invalidate.
func TestRXEInvalidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		open opened
	}{
		{"window 2A", window(verbs.MWType2A)},
		{"window 2B", window(verbs.MWType2B)},
		{"fast registration", fastRegistered},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := guest(t, 4500)
			h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
			wantLossFree(t, g, h.dev)
			connect(t, h, e, ipv4)
			const n, seed = 20000, 5
			for round := range uint32(3) {
				key, addr := tc.open(t, h, offB, n)
				// WRITE and READ through it.
				e.do("fill %d %d %d", offA, n, seed+round)
				e.do("write 1 %d %d %d %d", offA, n, addr, key)
				e.done(1, ibvWCWrite)
				if err := checkPattern(h.at(offB, n), seed+round); err != nil {
					t.Errorf("the guest's WRITE: %v", err)
				}
				e.do("clear %d %d", offB, n)
				e.do("read 2 %d %d %d %d", offB, n, addr, key)
				e.done(2, ibvWCRead)
				e.do("check %d %d %d", offB, n, seed+round)
				// The SEND arrives whole, and its completion names the key.
				h.recv(3, offA, 100)
				e.do("sendinv 4 %d 9 %d", offA, key)
				e.done(4, ibvWCSend)
				if wc := h.done(3); wc.ByteLen != 9 || wc.Flags&verbs.WCWithInvalidate == 0 || wc.InvRKey != key {
					t.Errorf("SEND with invalidate of key %#x completes as %+v", key, wc)
				}
				if err := checkPattern(h.at(offA, 9), seed+round); err != nil {
					t.Error(err)
				}
				if round == 2 { // dead: refused, and that ends the connection
					e.do("write 5 %d 1 %d %d", offA, addr, key)
					if wc := e.poll(); wc.id != 5 || wc.status != int(verbs.WCRemAccessErr) {
						t.Errorf("the guest's WRITE with a dead key completes as %+v", wc)
					}
				}
			}
		})
	}
}
