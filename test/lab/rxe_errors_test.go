//go:build lab && linux

package lab

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/verbs"
)

// pair is a connection over IPv4 at path MTU 4096 that we opened, on a guest whose log is checked at the end.
func pair(t testing.TB) (*Guest, *hostEnd, *guestEnd) {
	t.Helper()
	g := guest(t, 4500)
	h := newHost(t, ipv4.host)
	e := newGuestEnd(t, g)
	connect(t, h, e, ipv4)
	return g, h, e
}

func addrPort(addr string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
}

// TestRXEReject refuses connections in both directions, as an application and because nobody listens.
func TestRXEReject(t *testing.T) {
	g := guest(t, 4500)
	wantReject := func(t *testing.T, err error, reason uint16, private string) {
		t.Helper()
		var rej *verbs.RejectError
		if !errors.As(err, &rej) || rej.Reason != reason || !strings.HasPrefix(string(rej.PrivateData), private) {
			t.Errorf("Connect returns %v, want a rejection with reason %d and private data %q", err, reason, private)
		}
	}
	t.Run("guest's application", func(t *testing.T) {
		h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
		e.do("listen %s %d", ipv4.guest, port)
		ch := make(chan error, 1)
		go func() {
			_, _, err := h.dev.Connect(h.ctx, addrPort(ipv4.guest, port), h.qp, connParam, nil)
			ch <- err
		}()
		e.do("getreq")
		e.do("reject %x", "not today")
		wantReject(t, <-ch, 28, "not today")
	})
	t.Run("nobody in the guest", func(t *testing.T) {
		h := newHost(t, ipv4.host)
		_, _, err := h.dev.Connect(h.ctx, addrPort(ipv4.guest, port+1), h.qp, connParam, nil)
		wantReject(t, err, 8, "")
		if !errors.Is(err, verbs.ErrRefused) {
			t.Errorf("%v is not ErrRefused", err)
		}
	})
	t.Run("our application", func(t *testing.T) {
		h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
		l, err := h.dev.Listen(port, func(r verbs.ConnRequest) {
			if err := r.Reject([]byte("no, thanks")); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		e.setup(e.do("resolve %s %s %d", ipv4.guest, ipv4.host, port))
		_, err = e.try("connect -")
		want := fmt.Sprintf("RDMA_CM_EVENT_REJECTED status 28 private %s", hex.EncodeToString([]byte("no, thanks")))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the guest's connect ends with %v, want %s", err, want)
		}
	})
	t.Run("nobody here", func(t *testing.T) {
		_, e := newHost(t, ipv4.host), newGuestEnd(t, g)
		e.setup(e.do("resolve %s %s %d", ipv4.guest, ipv4.host, port))
		_, err := e.try("connect -")
		if err == nil || !strings.Contains(err.Error(), "RDMA_CM_EVENT_REJECTED status 8") {
			t.Errorf("the guest's connect ends with %v, want a rejection with reason 8", err)
		}
	})
	t.Run("unanswered request", func(t *testing.T) {
		h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
		l, err := h.dev.Listen(port, func(verbs.ConnRequest) {})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		e.setup(e.do("resolve %s %s %d", ipv4.guest, ipv4.host, port))
		if _, err := e.try("connect -"); err == nil || !strings.Contains(err.Error(), "RDMA_CM_EVENT_REJECTED") {
			t.Errorf("the guest's connect ends with %v, want a rejection", err)
		}
	})
}

// TestRXEMTUMismatch has the guest offer a path MTU that our link does not carry: only the active side can choose,
// so we refuse, with the reason and the MTU that would do (rocev2 spec 1.7, O7).
func TestRXEMTUMismatch(t *testing.T) {
	g := guest(t, 4500)
	t.Cleanup(func() {
		if err := ip("link", "set", HostLink, "mtu", "4500"); err != nil {
			t.Error(err)
		}
	})
	if err := ip("link", "set", HostLink, "mtu", "1500"); err != nil {
		t.Fatal(err)
	}
	h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
	l, err := h.dev.Listen(port, func(verbs.ConnRequest) { t.Error("a request of path MTU 4096 is shown on a link of 1500") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e.setup(e.do("resolve %s %s %d", ipv4.guest, ipv4.host, port))
	_, err = e.try("connect -")
	if err == nil || !strings.Contains(err.Error(), "RDMA_CM_EVENT_REJECTED status 26") {
		t.Errorf("the guest's connect ends with %v, want a rejection with reason 26", err)
	}
}

// TestRXEErrors has each side do what the other must refuse; each case ends its connection.
func TestRXEErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		run  func(h *hostEnd, e *guestEnd)
		host verbs.WCStatus // of our request
	}{
		{"WRITE with a wrong key", func(h *hostEnd, e *guestEnd) {
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpWrite, SGs: h.sge(0, 100), RemoteAddr: e.addr, RKey: e.rkey + 0x100})
		}, verbs.WCRemAccessErr},
		{"READ with a wrong key", func(h *hostEnd, e *guestEnd) {
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, SGs: h.sge(0, 100), RemoteAddr: e.addr, RKey: e.rkey + 0x100})
		}, verbs.WCRemAccessErr},
		{"WRITE one byte past the end", func(h *hostEnd, e *guestEnd) {
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpWrite, SGs: h.sge(0, 100), RemoteAddr: e.addr + memBytes - 99, RKey: e.rkey})
		}, verbs.WCRemAccessErr},
		{"READ one byte before the start", func(h *hostEnd, e *guestEnd) {
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, SGs: h.sge(0, 100), RemoteAddr: e.addr - 1, RKey: e.rkey})
		}, verbs.WCRemAccessErr},
		{"misaligned atomic", func(h *hostEnd, e *guestEnd) {
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpFetchAdd, SGs: h.sge(0, 8), RemoteAddr: e.addr + 4, RKey: e.rkey})
		}, verbs.WCRemInvReqErr},
		{"SEND longer than the receive", func(h *hostEnd, e *guestEnd) {
			e.do("recv 2 0 99")
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: h.sge(0, 100)})
		}, verbs.WCRemOpErr}, // a NIC says invalid request (rocev2 spec Q4)
		{"WRITE with an invalidated key", func(h *hostEnd, e *guestEnd) {
			var key verbs.RKey
			fmt.Sscan(e.do("bind 1 0 4096"), &key)
			e.done(1, ibvWCBind)
			e.do("recv 2 0 100")
			h.post(verbs.SendWR{ID: 9, Opcode: verbs.OpSendWithInv, SGs: h.sge(0, 1), InvalidateRKey: key})
			h.done(9)
			e.done(2, ibvWCRecv)
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpWrite, SGs: h.sge(0, 1), RemoteAddr: e.addr, RKey: key})
		}, verbs.WCRemAccessErr},
	} {
		t.Run("ours/"+tc.name, func(t *testing.T) {
			_, h, e := pair(t)
			tc.run(h, e)
			wc := h.poll()
			if wc.ID != 1 || wc.Status != tc.host {
				t.Errorf("our request completes as %v (%d), want %v", wc.Status, wc.ID, tc.host)
			}
			if s := h.qp.State(); s != verbs.StateErr {
				t.Errorf("our QP is in %v", s)
			}
		})
	}
	for _, tc := range []struct {
		name   string
		run    func(h *hostEnd, e *guestEnd)
		status int // of the guest's request, as libibverbs has them
	}{
		{"WRITE with a wrong key", func(h *hostEnd, e *guestEnd) {
			e.do("write 1 0 100 %d %d", hostIOVA, h.mr.RKey()+0x100)
		}, int(verbs.WCRemAccessErr)},
		{"READ with a wrong key", func(h *hostEnd, e *guestEnd) {
			e.do("read 1 0 100 %d %d", hostIOVA, h.mr.RKey()+0x100)
		}, int(verbs.WCRemAccessErr)},
		{"WRITE one byte past the end", func(h *hostEnd, e *guestEnd) {
			e.do("write 1 0 100 %d %d", hostIOVA+memBytes-99, h.mr.RKey())
		}, int(verbs.WCRemAccessErr)},
		{"long READ past the end", func(h *hostEnd, e *guestEnd) {
			e.do("read 1 0 100000 %d %d", hostIOVA+memBytes-99999, h.mr.RKey())
		}, int(verbs.WCRemAccessErr)},
		{"SEND longer than the receive", func(h *hostEnd, e *guestEnd) {
			h.recv(2, 0, 99)
			e.do("send 1 0 100")
		}, int(verbs.WCRemInvReqErr)},
	} {
		t.Run("the guest's/"+tc.name, func(t *testing.T) {
			_, h, e := pair(t)
			tc.run(h, e)
			if wc := e.poll(); wc.id != 1 || wc.status != tc.status {
				t.Errorf("the guest's request completes as %+v, want status %d", wc, tc.status)
			}
		})
	}
}

// TestRXERNR sends before the receiver has a buffer.
func TestRXERNR(t *testing.T) {
	_, h, e := pair(t)
	const n = 10000
	pattern(h.at(offA, n), 1)
	h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: h.sge(offA, n)})
	time.Sleep(50 * time.Millisecond)
	e.do("recv 2 %d %d", offB, n)
	h.done(1)
	e.done(2, ibvWCRecv)
	e.do("check %d %d 1", offB, n)

	e.do("fill %d %d 2", offA, n)
	e.do("send 3 %d %d", offA, n)
	time.Sleep(50 * time.Millisecond)
	h.recv(4, offB, n)
	h.done(4)
	e.done(3, ibvWCSend)
	if err := checkPattern(h.at(offB, n), 2); err != nil {
		t.Error(err)
	}
	if s := h.dev.Stats(); s["rnr_nak_received"] == 0 || s["rnr_nak_sent"] == 0 {
		t.Errorf("RNR NAKs: %d received, %d sent", s["rnr_nak_received"], s["rnr_nak_sent"])
	}
}

// TestRXEBurst keeps many requests outstanding both ways at once.
func TestRXEBurst(t *testing.T) {
	g := guest(t, 4500)
	h, e := newHost(t, ipv4.host), newGuestEnd(t, g)
	wantLossFree(t, g, h.dev)
	connect(t, h, e, ipv4)
	burst(t, h, e)
}

// burst has each side send burstSends messages of changing sizes with a READ after every tenth.
func burst(t testing.TB, h *hostEnd, e *guestEnd) {
	t.Helper()
	const sends, slot = 100, 20000
	size := func(i int) int { return (i*i*37 + i) % slot }
	for i := range sends {
		e.do("recv %d %d %d", 1000+i, offB+i*slot, slot)
		h.recv(uint64(1000+i), offB+i*slot, slot)
		pattern(h.at(offA+i*slot, size(i)), uint32(i))
		e.do("fill %d %d %d", offA+i*slot, size(i), i+500)
	}
	guestDone, hostDone := 0, 0
	for i := range sends {
		h.post(verbs.SendWR{ID: uint64(i), Opcode: verbs.OpSend, SGs: h.sge(offA+i*slot, size(i))})
		e.do("send %d %d %d", i, offA+i*slot, size(i))
		guestDone, hostDone = guestDone+2, hostDone+2
		if i%10 == 9 {
			h.post(verbs.SendWR{ID: uint64(i), Opcode: verbs.OpRead, SGs: h.sge(offB+(sends+i/10)*slot, slot), RemoteAddr: e.addr + offA, RKey: e.rkey})
			e.do("read %d %d %d %d %d", i, offB+(sends+i/10)*slot, slot, hostIOVA+offA, h.mr.RKey())
			guestDone, hostDone = guestDone+1, hostDone+1
		}
	}
	for range hostDone {
		if wc := h.poll(); wc.Err() != nil {
			t.Fatal(wc.Err())
		}
	}
	for range guestDone {
		if wc := e.poll(); wc.status != 0 {
			t.Fatalf("guest: completion %+v", wc)
		}
	}
	for i := range sends {
		if _, err := e.try("check %d %d %d", offB+i*slot, size(i), i); err != nil {
			t.Errorf("our SEND %d of %d bytes: %v", i, size(i), err)
		}
		if err := checkPattern(h.at(offB+i*slot, size(i)), uint32(i+500)); err != nil {
			t.Errorf("the guest's SEND %d of %d bytes: %v", i, size(i), err)
		}
	}
}

// TestRXELoss is the burst with 1 % of the guest's packets lost, in both directions.
func TestRXELoss(t *testing.T) {
	g, h, e := pair(t)
	g.Impair(t, "loss", "1%")
	burst(t, h, e)
	s := h.dev.Stats()
	t.Logf("ours: %s", nonZero(s))
}

// TestRXEProcessDies kills the guest's process: its kernel disconnects for it.
func TestRXEProcessDies(t *testing.T) {
	g := guest(t, 4500)
	h := newHost(t, ipv4.host)
	p, err := g.Start(CompileC(t, "testdata/verbspeer.c"))
	if err != nil {
		t.Fatal(err)
	}
	e := newGuestEndOn(t, p)
	connect(t, h, e, ipv4)
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.ep.Done():
	case <-time.After(stepLimit):
		t.Fatal("the connection outlives the guest's process")
	}
	if s := h.qp.State(); s != verbs.StateErr {
		t.Errorf("our QP is in %v", s)
	}
}
