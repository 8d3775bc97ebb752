//go:build lab && linux

package lab

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// TestRDSCancel takes back what is queued to one port, among what is queued to another (RDS_CANCEL_SENT_TO), on either side. The
// rest arrives, once and in order; the gap that remains in the sequence disturbs nobody.
func TestRDSCancel(t *testing.T) {
	// More than either side has in flight, so that some of it is not sent when it is taken back.
	const rounds = 600
	sizes := busy(rounds)
	const seedGone, seedKept = 10000, 20000
	// cut takes from ds those of the cancelled run, which may have been on their way: some of the first, in order.
	cut := func(t *testing.T, ds []Datagram) (kept []Datagram, arrived int) {
		for _, d := range ds {
			if arrived < rounds && d.Len == sizes[arrived] && d.Sum == sum(d.Len, seedGone+uint32(arrived)) {
				arrived++
				continue
			}
			kept = append(kept, d)
		}
		return kept, arrived
	}
	type setup struct {
		k   *kernelEnd
		svc *rds.Service
		f   family
	}
	start := func(t *testing.T) setup {
		g := guest(t, 4500)
		f := freshHost(t, g, ipv4)
		return setup{newKernelEnd(t, g), service(t), f}
	}
	silent := func(t *testing.T) (end func()) {
		t.Helper()
		if err := ip("link", "set", HostLink, "down"); err != nil {
			t.Fatal(err)
		}
		end = func() { _ = ip("link", "set", HostLink, "up") }
		t.Cleanup(end)
		return end
	}
	t.Run("ours", func(t *testing.T) {
		e := start(t)
		s := listen(t, e.svc, addrPort(e.f.host, 4050))
		if err := s.SetWriteBuffer(64 << 20); err != nil { // nobody makes room
			t.Fatal(err)
		}
		_ = s.SetWriteDeadline(time.Now().Add(stepLimit))
		gone, kept := e.k.open(OpenArgs{Local: addrPort(e.f.guest, 0)}), e.k.open(OpenArgs{Local: addrPort(e.f.guest, 0)})
		exchange(t, s, e.k, kept, []int{1})
		drained(t, s, e.k)
		end := silent(t)
		for i, n := range sizes {
			if err := errors.Join(sendOurs(s, gone.Local, seedGone+uint32(i), []int{n}), sendOurs(s, kept.Local, seedKept+uint32(i), []int{n})); err != nil {
				t.Fatal(err)
			}
		}
		n, err := s.Cancel(gone.Local)
		if err != nil || n != rounds {
			t.Fatalf("Cancel drops %d messages (%v), want %d", n, err, rounds)
		}
		if msgs, _ := s.Unacknowledged(); msgs != rounds {
			t.Errorf("%d messages are left, want %d", msgs, rounds)
		}
		in := e.svc.Info(rds.InfoSend | rds.InfoRetrans)
		for _, m := range append(in.RetransQueue, in.SendQueue...) {
			if m.Remote.AddrPort() == gone.Local {
				t.Errorf("message %d is still queued", m.Seq)
			}
		}
		end()
		var got, strays []Datagram
		e.k.must("Recv", RecvArgs{ID: kept.ID, Count: rounds, Limit: stepLimit}, &got)
		if err := checkDatagrams(got, s.AddrPort(), seedKept, sizes); err != nil {
			t.Error(err)
		}
		drained(t, s, e.k)
		agree(t, e.svc, e.k, s.AddrPort().Addr(), kept.Local.Addr(), 0)
		e.k.must("Recv", RecvArgs{ID: gone.ID, Count: rounds, Limit: 100 * time.Millisecond}, &strays)
		rest, arrived := cut(t, strays)
		t.Logf("%d of %d cancelled datagrams arrive", arrived, rounds)
		if len(rest) != 0 || arrived == rounds {
			t.Errorf("%d of %d cancelled datagrams arrive, and %v", arrived, rounds, rest)
		}
		exchange(t, s, e.k, gone, []int{1, 5000})
		drained(t, s, e.k)
		agree(t, e.svc, e.k, s.AddrPort().Addr(), kept.Local.Addr(), 0)
	})
	t.Run("the kernel", func(t *testing.T) {
		e := start(t)
		ks := e.k.open(OpenArgs{Local: addrPort(e.f.guest, 0), SndBuf: 64 << 20})
		gone, kept := listen(t, e.svc, addrPort(e.f.host, 4051)), listen(t, e.svc, addrPort(e.f.host, 4052))
		exchange(t, kept, e.k, ks, []int{1})
		drained(t, kept, e.k)
		host := kept.AddrPort().Addr()
		end := silent(t)
		const some = 20 // in turn: a call takes a while
		for i := 0; i < rounds; i += some {
			var a, b Sent
			e.k.must("Send", SendArgs{ID: ks.ID, To: gone.AddrPort(), Seed: seedGone + uint32(i), Sizes: sizes[i : i+some]}, &a)
			e.k.must("Send", SendArgs{ID: ks.ID, To: kept.AddrPort(), Seed: seedKept + uint32(i), Sizes: sizes[i : i+some]}, &b)
			if a.N+b.N != 2*some {
				t.Fatalf("the kernel's sends: %v, %v", a.Errno, b.Errno)
			}
		}
		if r := e.k.do(Call{Call: callSetOpt, ID: ks.ID, Level: solRDS, Num: optCancelSentTo, Data: rawAddr(gone.AddrPort())}); r.Errno != 0 {
			t.Fatalf("RDS_CANCEL_SENT_TO: %v", r.Errno)
		}
		for _, m := range e.k.messages(host, infoSendQueue6, infoRetrans6) {
			if m.Remote == gone.AddrPort() {
				t.Errorf("message %d is still queued", m.Seq)
			}
		}
		end()
		if err := recvOurs(kept, ks.Local, seedKept, sizes); err != nil {
			t.Error(err)
		}
		drained(t, kept, e.k)
		agree(t, e.svc, e.k, host, ks.Local.Addr(), 0)
		var strays []Datagram
		buf := make([]byte, 1<<20)
		for {
			_ = gone.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, from, err := gone.ReadFromAddrPort(buf)
			if err != nil {
				break
			}
			strays = append(strays, Datagram{From: from, Len: n, Sum: crc(buf[:n])})
		}
		rest, arrived := cut(t, strays)
		t.Logf("%d of %d cancelled datagrams arrive", arrived, rounds)
		if len(rest) != 0 || arrived == rounds {
			t.Errorf("%d of %d cancelled datagrams arrive, and %v", arrived, rounds, rest)
		}
		exchange(t, gone, e.k, ks, []int{1, 5000})
		drained(t, gone, e.k)
		agree(t, e.svc, e.k, host, ks.Local.Addr(), 0)
	})
}

// TestRDSMonitor: who was refused at a congested port and asks to be told (RDS_CONG_MONITOR) hears of that port, and of no other,
// once its reader has caught up.
func TestRDSMonitor(t *testing.T) {
	const rcvbuf = 64 << 10
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)

	t.Run("the kernel hears of ours", func(t *testing.T) {
		ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), Monitor: true})
		blind := k.open(OpenArgs{Local: addrPort(f.guest, 0)}) // has not asked
		// Two readers stop, and one of them goes on: ports 4100 and 4133 are bits 4 and 37.
		var socks []*rds.Socket
		sent := make([]int, 2)
		for i, port := range []uint16{4100, 4133} {
			s := listen(t, svc, addrPort(f.host, port))
			defer s.Close()
			if err := s.SetReadBuffer(rcvbuf); err != nil {
				t.Fatal(err)
			}
			socks = append(socks, s)
			for ; sent[i] < 2000; sent[i]++ {
				var out Sent
				k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: uint32(sent[i]), Sizes: []int{4096}, NoWait: true}, &out)
				if out.N == 1 {
					continue
				}
				if out.Errno != unix.ENOBUFS {
					t.Fatalf("the kernel's send: %v", out.Errno)
				}
				break
			}
			var out Sent
			k.must("Send", SendArgs{ID: blind.ID, To: s.AddrPort(), Sizes: []int{1}, NoWait: true}, &out)
			if out.Errno != unix.ENOBUFS {
				t.Fatalf("the other socket's send: %d, %v", out.N, out.Errno)
			}
		}
		updates := func(id int) (masks []uint64) {
			for {
				r := k.do(Call{Call: callRecv, ID: id, Size: 10, Flags: unix.MSG_DONTWAIT})
				if r.Errno != 0 {
					if r.Errno != unix.EAGAIN {
						t.Errorf("recvmsg: %v", r.Errno)
					}
					return masks
				}
				for _, c := range r.Cmsgs {
					if c.Level == solRDS && c.Type == cmsgCongUpdate {
						masks = append(masks, binary.NativeEndian.Uint64(c.Data))
					}
				}
			}
		}
		if m := updates(ks.ID); m != nil {
			t.Errorf("told of %#x before anybody has read", m)
		}
		for i, s := range socks {
			sizes := make([]int, sent[i])
			for j := range sizes {
				sizes[j] = 4096
			}
			if err := recvOurs(s, ks.Local, 0, sizes); err != nil {
				t.Fatal(err)
			}
			var masks []uint64
			eventually(t, "the kernel tells its socket", func() bool { masks = append(masks, updates(ks.ID)...); return len(masks) > 0 })
			if want := uint64(1) << (s.AddrPort().Port() % 64); len(masks) != 1 || masks[0] != want {
				t.Errorf("told of %#x, want %#x once", masks, want)
			}
		}
		if m := updates(blind.ID); m != nil {
			t.Errorf("who has not asked is told of %#x", m)
		}
		// The interest is used up: another change of the map is no news.
		exchange(t, socks[0], k, ks, []int{1, 5000})
		if m := updates(ks.ID); m != nil {
			t.Errorf("told again of %#x", m)
		}
	})
	t.Run("we hear of the kernel's", func(t *testing.T) {
		s := listen(t, svc, addrPort(f.host, 4060))
		defer s.Close()
		if err := s.SetCongestionMonitor(true); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4096)
		var theirs []Opened
		sent := make([]int, 2)
		for i, port := range []uint16{5000, 5033} {
			ks := k.open(OpenArgs{Local: addrPort(f.guest, port), RcvBuf: rcvbuf})
			theirs = append(theirs, ks)
			exchange(t, s, k, ks, []int{1})
			for ; sent[i] < 2000; sent[i]++ {
				pattern(p, uint32(sent[i]))
				_, err := s.TryWriteToAddrPort(p, ks.Local)
				if err == nil {
					time.Sleep(time.Millisecond)
					continue
				}
				if !errors.Is(err, rds.ErrCongested) || !errors.Is(err, unix.ENOBUFS) {
					t.Fatalf("a write to a congested port: %v", err)
				}
				break
			}
		}
		if m := s.TryReadCongestion(); m != 0 {
			t.Errorf("told of %#x before anybody has read", m)
		}
		for i, ks := range theirs {
			var got []Datagram
			k.must("Recv", RecvArgs{ID: ks.ID, Count: sent[i], Limit: stepLimit}, &got)
			if len(got) != sent[i] {
				t.Fatalf("the kernel received %d of %d", len(got), sent[i])
			}
			_ = s.SetReadDeadline(time.Now().Add(stepLimit))
			mask, err := s.ReadCongestion(t.Context())
			if want := uint64(1) << (ks.Local.Port() % 64); err != nil || mask != want {
				t.Errorf("told of %#x (%v), want %#x", mask, err, want)
			}
			if m := s.TryReadCongestion(); m != 0 {
				t.Errorf("told again of %#x", m)
			}
		}
	})
}
