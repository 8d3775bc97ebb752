package rds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
)

// What the kernel refuses is refused with the kernel's errno, inside an OpError (rds-protocol spec 1.2 to 1.4).
func TestErrnos(t *testing.T) {
	a, b, ta, tb := pair(t, Config{})
	six, err := a.svc.ListenPacket(t.Context(), "[fd00::9]:4000")
	if err != nil {
		t.Fatal(err)
	}
	// A host without an address, a port that is congested, a socket whose buffer is full, and one that has a type of service.
	ta.listen = func(a netip.Addr) error {
		switch a {
		case netip.MustParseAddr("10.0.0.66"):
			return fmt.Errorf("resolving: %w", verbs.ErrNoSuchAddress)
		case netip.MustParseAddr("10.0.0.67"): // as on other systems than Linux
			return fmt.Errorf("opening: %w", verbs.ErrNotSupported)
		}
		return nil
	}
	tb.SetCongested(addrB, 5000, true)
	full := bind(t, a.svc, ap(addrA, 4666))
	full.SetWriteBuffer(10)
	ta.withhold = true
	mustWrite(t, full, make([]byte, 10), b.AddrPort())
	ta.withhold = false
	tos := bind(t, a.svc, ap(addrA, 4667))
	if err := tos.SetTypeOfService(3); err != nil {
		t.Fatal(err)
	}
	shut := bind(t, a.svc, ap(addrA, 4668))
	shut.Close()
	late := bind(t, a.svc, ap(addrA, 4669))
	late.SetWriteDeadline(time.Unix(1, 0))
	bindTo := func(s string) error { _, err := a.svc.ListenPacket(t.Context(), s); return err }
	writeTo := func(s string, n int) error {
		_, err := a.WriteToAddrPort(make([]byte, n), netip.MustParseAddrPort(s))
		return err
	}
	connect := func(s string) error { return a.ConnectAddrPort(netip.MustParseAddrPort(s)) }
	connect6 := func(s string) error { return six.ConnectAddrPort(netip.MustParseAddrPort(s)) }
	for _, tc := range []struct {
		what  string
		err   error
		ours  error
		errno syscall.Errno
	}{
		{"bind to the wildcard", bindTo("0.0.0.0:4"), ErrInvalid, syscall.EINVAL},
		{"bind to the wildcard of IPv6", bindTo("[::]:4"), ErrInvalid, syscall.EINVAL},
		{"bind to the broadcast address", bindTo("255.255.255.255:4"), ErrInvalid, syscall.EINVAL},
		{"bind to a group", bindTo("224.0.0.1:4"), ErrInvalid, syscall.EINVAL},
		{"bind to a group of IPv6", bindTo("[ff02::1]:4"), ErrInvalid, syscall.EINVAL},
		{"bind to a link-local address without a zone", bindTo("[fe80::1]:4"), ErrInvalid, syscall.EINVAL},
		{"bind to port 1", bindTo("10.0.0.1:1"), ErrInvalid, syscall.EINVAL},
		{"bind twice", bindTo("10.0.0.1:4000"), ErrAddrInUse, syscall.EADDRINUSE},
		{"bind twice, mapped", bindTo("[::ffff:10.0.0.1]:4000"), ErrAddrInUse, syscall.EADDRINUSE},

		{"bind to an address of another host", bindTo("10.0.0.66:4000"), ErrAddrNotAvailable, syscall.EADDRNOTAVAIL},
		{"bind where there is no provider", bindTo("10.0.0.67:4000"), ErrNotSupported, syscall.EOPNOTSUPP},
		{"bind to it with a transport chosen", func() error {
			lc := ListenConfig{Service: a.svc, Transport: TransportIB}
			_, err := lc.Bind(t.Context(), netip.MustParseAddrPort("10.0.0.66:4000"))
			return err
		}(), ErrNoTransport, syscall.ENOPROTOOPT},
		{"bind with RDS over TCP", func() error {
			lc := ListenConfig{Service: a.svc, Transport: TransportTCP}
			_, err := lc.Bind(t.Context(), netip.MustParseAddrPort("10.0.0.1:4001"))
			return err
		}(), ErrNoTransport, syscall.ENOPROTOOPT},
		{"bind with a transport that is none", func() error {
			lc := ListenConfig{Service: a.svc, Transport: 77}
			_, err := lc.Bind(t.Context(), netip.MustParseAddrPort("10.0.0.1:4001"))
			return err
		}(), ErrInvalid, syscall.EINVAL},

		{"connect to nothing", a.ConnectAddrPort(netip.AddrPort{}), ErrInvalid, syscall.EAFNOSUPPORT},
		{"connect to the wildcard", connect("0.0.0.0:4"), ErrInvalid, syscall.EDESTADDRREQ},
		{"connect to the broadcast address", connect("255.255.255.255:4"), ErrInvalid, syscall.EINVAL},
		{"connect to a group", connect("224.0.0.1:4"), ErrInvalid, syscall.EINVAL},
		{"connect to the wildcard of IPv6", connect6("[::]:4"), ErrInvalid, syscall.EPROTOTYPE},
		{"connect to a group of IPv6", connect6("[ff02::1]:4"), ErrInvalid, syscall.EPROTOTYPE},
		{"connect to a link-local address without a zone", connect6("[fe80::1]:4"), ErrInvalid, syscall.EINVAL},

		{"write nowhere", func() error { _, err := a.Write(nil); return err }(), ErrNotConnected, syscall.ENOTCONN},
		{"write to the wildcard", writeTo("0.0.0.0:4", 1), ErrInvalid, syscall.EINVAL},
		{"write to the other IP version", writeTo("[fd00::1]:4", 1), ErrNotSupported, syscall.EOPNOTSUPP},
		{"write too much", writeTo("10.0.0.2:4000", MaxMessageSize+1), ErrMessageTooLong, syscall.EMSGSIZE},
		{"write too much to a bad address", writeTo("255.255.255.255:4", MaxMessageSize+1), ErrInvalid, syscall.EINVAL},
		{"cookie of nothing to a bad address", a.Send(t.Context(), Message{Peer: ap(broadcast4, 5), Cookie: 77}), ErrInvalid, syscall.EINVAL},
		{"cookie of nothing, and too much", a.Send(t.Context(), Message{Peer: b.AddrPort(), Data: make([]byte, MaxMessageSize+1), Cookie: 77}), ErrMessageTooLong, syscall.EMSGSIZE},
		{"cookie of nothing", a.Send(t.Context(), Message{Peer: b.AddrPort(), Cookie: 77}), ErrStaleCookie, syscall.EINVAL},
		{"cookie and operation", a.Send(t.Context(), Message{Peer: b.AddrPort(), Cookie: 77, RDMA: &RDMA{}}), ErrInvalid, syscall.EINVAL},

		{"write to a congested port without waiting", a.TrySend(Message{Peer: ap(addrB, 5000)}), ErrCongested, syscall.ENOBUFS},
		{"write to a congested port of bytes without waiting", func() error { _, err := a.TryWriteToAddrPort(nil, ap(addrB, 5000)); return err }(), ErrCongested, syscall.ENOBUFS},
		{"write into a full buffer without waiting", full.TrySend(Message{Peer: b.AddrPort()}), ErrNoBufferSpace, syscall.EAGAIN},
		{"write with MSG_MORE", func() error { _, err := a.WriteBatch(nil, 0x8000); return err }(), ErrNotSupported, syscall.EOPNOTSUPP},
		{"write past the deadline", func() error { _, err := late.WriteToAddrPort(nil, b.AddrPort()); return err }(), os.ErrDeadlineExceeded, syscall.ETIMEDOUT},
		{"map without a connection", func() error {
			_, err := a.TrySendMapped(Message{Peer: b.AddrPort()}, make([]byte, 10), RegionOptions{})
			return err
		}(), ErrNotReady, syscall.EAGAIN},
		{"map nothing", func() error {
			_, err := a.TrySendMapped(Message{Peer: b.AddrPort()}, nil, RegionOptions{})
			return err
		}(), ErrInvalid, syscall.EINVAL},
		{"register too much", func() error {
			_, err := a.RegisterRegion(t.Context(), make([]byte, MaxRDMASize+1), RegionOptions{})
			return err
		}(), ErrRegionTooLarge, syscall.EMSGSIZE},
		{"free what is none", a.FreeRegion(77, false), ErrStaleCookie, syscall.EINVAL},
		{"cancel to the wildcard", func() error { _, err := a.Cancel(netip.MustParseAddrPort("0.0.0.0:1")); return err }(), ErrInvalid, syscall.EINVAL},
		{"type of service, twice", tos.SetTypeOfService(4), ErrInvalid, syscall.EINVAL},
		{"type of service, after writing", full.SetTypeOfService(4), ErrInvalid, syscall.EINVAL},
		{"send buffer of nothing", a.SetWriteBuffer(0), ErrInvalid, syscall.EINVAL},
		{"anything on a closed socket", shut.TrySend(Message{Peer: b.AddrPort()}), net.ErrClosed, 0},
		{"anything nowhere on a closed socket", shut.TrySend(Message{}), net.ErrClosed, 0},

		{"read with MSG_OOB", func() error { _, _, _, err := a.ReadMsg(nil, 1); return err }(), ErrNotSupported, syscall.EOPNOTSUPP},
		{"read nothing without waiting", func() error { _, _, err := a.TryReadFromAddrPort(nil); return err }(), ErrWouldBlock, syscall.EAGAIN},
		{"receive nothing without waiting", func() error { _, err := a.TryReceive(); return err }(), ErrWouldBlock, syscall.EAGAIN},
		{"read until the deadline", func() error {
			a.SetReadDeadline(time.Now().Add(-time.Second))
			defer a.SetReadDeadline(time.Time{})
			_, err := a.Read(nil)
			return err
		}(), nil, syscall.ETIMEDOUT},
	} {
		var oe *OpError
		var ne net.Error
		if tc.errno != 0 && !errors.Is(tc.err, tc.errno) || tc.ours != nil && !errors.Is(tc.err, tc.ours) || !errors.As(tc.err, &oe) || !errors.As(tc.err, &ne) {
			t.Errorf("%s: %v; want %v (%v) in an OpError", tc.what, tc.err, tc.ours, tc.errno)
			continue
		}
		var errno syscall.Errno
		if errors.As(tc.err, &errno) != (tc.errno != 0) || errno != tc.errno {
			t.Errorf("%s: %v as an errno is %v; want %v", tc.what, tc.err, errno, tc.errno)
		}
		for _, other := range []syscall.Errno{syscall.EINVAL, syscall.EAGAIN, syscall.ENOBUFS, syscall.EADDRINUSE, syscall.EADDRNOTAVAIL, syscall.ENOPROTOOPT, syscall.ETIMEDOUT, syscall.EOPNOTSUPP, syscall.EDESTADDRREQ, syscall.EPROTOTYPE, syscall.EMSGSIZE, syscall.ENOTCONN, syscall.EAFNOSUPPORT} {
			if other != tc.errno && errors.Is(tc.err, other) {
				t.Errorf("%s: %v matches %v as well as %v", tc.what, tc.err, other, tc.errno)
			}
		}
	}
}

// One destination that takes nothing holds half of the send buffer, and no more, as soon as there is another.
func TestSendBufferShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		sa, ta := n.open(t, Config{SendBuffer: 1000})
		a := bind(t, sa, ap(addrA, 4000))
		stuck, fine := ap(addrB, 1000), ap(addrC, 1000)
		ta.withhold = true
		try := func(to netip.AddrPort, n int) error { return a.TrySend(Message{Peer: to, Data: make([]byte, n)}) }
		fill := func(to netip.AddrPort, n int) (msgs int) {
			for {
				err := try(to, n)
				if err == nil {
					msgs++
					continue
				}
				if !errors.Is(err, ErrNoBufferSpace) || !errors.Is(err, syscall.EAGAIN) {
					t.Fatalf("full: %v", err)
				}
				return msgs
			}
		}
		// Alone it has all of it, as the kernel's would.
		if n := fill(stuck, 100); n != 10 {
			t.Errorf("%d messages of 100 bytes fit into 1000", n)
		}
		ta.ack(-1)
		if err := try(fine, 1); err != nil {
			t.Fatal(err)
		}
		ta.ack(-1)
		if n := fill(stuck, 100); n != 5 {
			t.Errorf("%d messages of 100 bytes fit into the share of one of two", n)
		}
		if n := fill(fine, 100); n != 5 {
			t.Errorf("%d messages of 100 bytes fit into the rest", n)
		}
		// Another type of service is another connection, with a share of its own; here the whole buffer is full.
		if err := a.TrySend(Message{Peer: fine, TypeOfService: 3}); !errors.Is(err, ErrNoBufferSpace) {
			t.Errorf("full buffer: %v", err)
		}

		// Who waits for room in one share is not woken for another, and all get in when theirs has some.
		var wg sync.WaitGroup
		done := map[netip.AddrPort]*int{stuck: new(int), fine: new(int)}
		var mu sync.Mutex
		for to, count := range done {
			for range 3 {
				wg.Go(func() {
					mustWrite(t, a, make([]byte, 10), to)
					mu.Lock()
					*count++
					mu.Unlock()
				})
			}
		}
		synctest.Wait()
		fineOnly := ta.unacked[5:]
		ta.unacked = ta.unacked[:5:5] // the writers append
		for _, s := range fineOnly {
			s.o.Released(1, s.n, true)
		}
		synctest.Wait()
		mu.Lock()
		if *done[stuck] != 0 || *done[fine] != 3 {
			t.Errorf("%d writes to the stuck destination and %d to the other got in; want 0 and 3", *done[stuck], *done[fine])
		}
		mu.Unlock()
		ta.ack(-1)
		synctest.Wait()
		ta.ack(-1)
		wg.Wait()
		ta.ack(-1)
		if msgs, n := a.Unacknowledged(); msgs != 0 || n != 0 || a.first.out.Load() != 0 || a.others.Load() != 0 {
			t.Errorf("%d messages, %d bytes accounted for with nothing queued", msgs, n)
		}

		// A deadline ends the wait for a share as well; so does Close.
		fill(stuck, 100)
		a.SetWriteDeadline(time.Now().Add(time.Second))
		_, err := a.WriteToAddrPort([]byte{1}, stuck)
		wantTimeout(t, err, ErrNoBufferSpace)
		a.SetWriteDeadline(time.Time{})
		wg.Go(func() {
			if _, err := a.WriteToAddrPort([]byte{1}, stuck); !errors.Is(err, ErrClosed) {
				t.Errorf("Close under a writer: %v", err)
			}
		})
		synctest.Wait()
		a.Close()
		wg.Wait()
	})
}

var addrC = netip.MustParseAddr("10.0.0.3")

// MsgPeek, MsgTrunc and MsgDontWait.
func TestReadMsg(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	for _, n := range []int{0, 100, 5000, 200000} {
		want := payload(n, byte(n))
		mustWrite(t, a, want, b.AddrPort())
		mustWrite(t, a, []byte("next"), b.AddrPort())
		p := make([]byte, n)
		for range 2 {
			k, from, out, err := b.ReadMsg(p, MsgPeek|MsgDontWait)
			if k != n || from != a.AddrPort() || out != 0 || err != nil || !bytes.Equal(p, want) {
				t.Fatalf("peek at %d: %d from %v, %#x, %v", n, k, from, out, err)
			}
			clear(p)
		}
		if n > 10 {
			short := make([]byte, 10)
			if k, from, out, err := b.ReadMsg(short, MsgPeek); k != 10 || from != a.AddrPort() || out != MsgTrunc || !errors.Is(err, io.ErrShortBuffer) || !bytes.Equal(short, want[:10]) {
				t.Errorf("peek at the beginning: %d, %#x, %v", k, out, err)
			}
			if k, _, out, err := b.ReadMsg(short, MsgPeek|MsgTrunc); k != n || out != MsgTrunc || err != nil {
				t.Errorf("peek at the length: %d, %#x, %v", k, out, err)
			}
			if k, _, out, err := b.ReadMsg(short, MsgTrunc); k != n || out != MsgTrunc || err != nil || !bytes.Equal(short, want[:10]) {
				t.Errorf("read of the beginning: %d, %#x, %v", k, out, err)
			}
		} else if k, _, err := b.TryReadFromAddrPort(p); k != n || err != nil {
			t.Errorf("read: %d, %v", k, err)
		}
		wantRead(t, b, []byte("next"), a.AddrPort())
		if _, _, _, err := b.ReadMsg(p, MsgPeek|MsgDontWait); !errors.Is(err, ErrWouldBlock) {
			t.Errorf("peek into an empty queue: %v", err)
		}
	}
	if q := b.svc.peerOf(addrB, addrA).queued.Load(); q != 0 || b.q.bytes.Load() != 0 {
		t.Errorf("%d accounted for, %d bytes in the queue", q, b.q.bytes.Load())
	}
}

// A peek does not take away what another reader waits for.
func TestPeekWakesReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, Config{})
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, _, out, err := b.ReadMsg(make([]byte, 10), MsgPeek); err != nil || out != 0 {
					t.Error(err)
				}
			})
		}
		wg.Go(func() { wantRead(t, b, []byte("x"), a.AddrPort()) })
		wg.Go(func() { wantRead(t, b, []byte("x"), a.AddrPort()) })
		synctest.Wait()
		mustWrite(t, a, []byte("x"), b.AddrPort())
		mustWrite(t, a, []byte("x"), b.AddrPort())
		synctest.Wait()
		mustWrite(t, a, []byte("x"), b.AddrPort()) // for peekers that came too late
		wg.Wait()
	})
}

func TestBatch(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	if err := a.Connect(b.Addr()); err != nil {
		t.Fatal(err)
	}
	big := payload(100000, 3)
	n, err := a.WriteBatch([]BatchMessage{
		{Buffers: [][]byte{[]byte("one")}, Addr: b.AddrPort()},
		{Buffers: [][]byte{[]byte("tw"), []byte("o, in"), nil, []byte(" pieces")}},
		{},
		{Buffers: [][]byte{big}},
		{Buffers: [][]byte{big}},
		{Buffers: [][]byte{make([]byte, MaxMessageSize+1)}},
		{Buffers: [][]byte{[]byte("never")}},
	}, 0)
	if n != 5 || !errors.Is(err, ErrMessageTooLong) {
		t.Fatalf("WriteBatch: %d, %v", n, err)
	}
	in := make([]BatchMessage, 10)
	in[0].Buffers = [][]byte{make([]byte, 10)}
	in[1].Buffers = [][]byte{make([]byte, 3), make([]byte, 3), make([]byte, 100)}
	in[2].Buffers = [][]byte{make([]byte, 10)}
	in[3].Buffers = [][]byte{make([]byte, 50000), make([]byte, 60000)}
	in[4].Buffers = [][]byte{make([]byte, 7)}
	if n, err = b.ReadBatch(in, 0); n != 5 || err != nil {
		t.Fatalf("ReadBatch: %d, %v", n, err)
	}
	for i, want := range []struct {
		n     int
		flags Flags
		data  []byte
	}{{3, 0, []byte("one")}, {14, 0, []byte("two, in pieces")}, {0, 0, nil}, {100000, 0, big}, {7, MsgTrunc, big[:7]}} {
		m := &in[i]
		if got := bytes.Join(m.Buffers, nil)[:m.N]; m.N != want.n || m.Flags != want.flags || m.Addr != a.AddrPort() || !bytes.Equal(got, want.data) {
			t.Errorf("datagram %d: %d bytes from %v, flags %#x; want %d bytes, flags %#x", i, m.N, m.Addr, m.Flags, want.n, want.flags)
		}
	}
	if n, err := b.ReadBatch(in, MsgDontWait); n != 0 || !errors.Is(err, ErrWouldBlock) {
		t.Errorf("ReadBatch of nothing: %d, %v", n, err)
	}
	if _, err := b.ReadBatch(in, MsgPeek); !errors.Is(err, ErrNotSupported) {
		t.Errorf("ReadBatch that peeks: %v", err)
	}
	if _, err := a.WriteBatch(nil, 0x4000); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("WriteBatch with MSG_NOSIGNAL: %v", err)
	}
}

// More than one datagram to one host is not sent one by one, and a failure in between leaves none behind.
func TestBatchFlush(t *testing.T) {
	a, b, ta, _ := pair(t, Config{SendBuffer: 1000})
	ta.withhold = true
	ms := make([]BatchMessage, 4)
	for i := range ms {
		ms[i] = BatchMessage{Buffers: [][]byte{make([]byte, 400)}, Addr: b.AddrPort()}
	}
	n, err := a.WriteBatch(ms, MsgDontWait)
	if n != 3 || !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("%d, %v", n, err)
	}
	if ta.flushed != 1 {
		t.Errorf("flushed %d times", ta.flushed)
	}
}

// Message.Notify: one Completion for each message, that says how it ended.
func TestNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 41, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa := openSim(t, net, Config{})
		a := bind(t, sa, ap(addrA, 4000))
		for i := range uint64(6) { // the peer is not there
			if err := a.Send(t.Context(), Message{Peer: ap(addrB, 4000+uint16(i%2)), Data: []byte{byte(i)}, Notify: i != 4, Token: i}); err != nil {
				t.Fatal(err)
			}
		}
		if _, ok := a.TryReadCompletion(); ok {
			t.Error("a completion before anything happened")
		}
		if n, err := a.Cancel(ap(addrB, 4001)); n != 3 || err != nil {
			t.Errorf("Cancel: %d, %v", n, err)
		}
		want := func(token uint64, s CompletionStatus) {
			t.Helper()
			c, err := a.ReadCompletion(t.Context())
			if err != nil || c != (Completion{Token: token, Status: s, Peer: ap(addrB, 4000+uint16(token%2))}) {
				t.Errorf("%+v, %v; want token %d, %v", c, err, token, s)
			}
		}
		for _, i := range []uint64{1, 3, 5} {
			want(i, StatusCancelled)
		}
		sb := openSim(t, net, Config{})
		b := bind(t, sb, ap(addrB, 4000))
		start := time.Now()
		want(0, StatusSuccess)
		want(2, StatusSuccess)
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("told after %v", d)
		}
		for i := range byte(3) {
			wantRead(t, b, []byte{2 * i}, a.AddrPort())
		}
		// Within the Service, and for a buffer, the same.
		c := bind(t, sa, ap(addrA, 4002))
		if err := a.Send(t.Context(), Message{Peer: c.AddrPort(), Notify: true, Token: 9}); err != nil {
			t.Fatal(err)
		}
		if got, ok := a.TryReadCompletion(); !ok || got.Token != 9 || got.Err() != nil {
			t.Errorf("%+v, %v", got, ok)
		}
		// A place is promised for each; who reads none is refused.
		a.comp.promised = maxCompletions
		if err := a.TrySend(Message{Peer: c.AddrPort(), Notify: true}); !errors.Is(err, ErrNoBufferSpace) {
			t.Errorf("without a place for the completion: %v", err)
		}
		a.comp.promised = 0
		closeService(t, sa)
		closeService(t, sb)
	})
}

// Payloads written where they are sent from arrive as they are: over the network and within a Service.
func TestSendBuf(t *testing.T) {
	for _, d := range []Dialect{DialectOpen, DialectKernelOnly} {
		synctest.Test(t, func(t *testing.T) {
			net := simnet.ForTest(t, 43, simnet.Config{GRO: true, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Loss: 0.01}})
			sa, sb := openSim(t, net, Config{Dialect: d}), openSim(t, net, Config{Dialect: d})
			a, b, local := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000)), bind(t, sa, ap(addrA, 4001))
			for i, n := range []int{0, 1, 1000, conn.MinBuffer - 1, conn.MinBuffer, 61392, 61393, 200000, MaxMessageSize} {
				for _, to := range []*Socket{b, local} {
					want := payload(n, byte(i))
					buf, err := a.Alloc(n)
					if err != nil {
						t.Fatal(err)
					}
					switch i % 3 {
					case 0:
						rest := want
						for _, p := range buf.Buffers() {
							rest = rest[copy(p, rest):]
						}
					case 1:
						for rest := want; len(rest) > 0; {
							k := min(len(rest), 1777)
							if m, err := buf.Write(rest[:k]); m != k || err != nil {
								t.Fatal(m, err)
							}
							rest = rest[k:]
						}
						if m, err := buf.Write([]byte("too much")); m != 0 || err != io.ErrShortWrite {
							t.Errorf("%d bytes: wrote %d more, %v", n, m, err)
						}
					case 2:
						if m, err := io.Copy(buf, bytes.NewReader(want)); m != int64(n) || err != nil {
							t.Fatal(m, err)
						}
					}
					if buf.Len() != n {
						t.Errorf("Len is %d, not %d", buf.Len(), n)
					}
					m := Message{Peer: to.AddrPort(), Buffer: buf, Notify: true, Token: uint64(n)}
					if err := a.Send(t.Context(), m); err != nil {
						t.Fatal(err)
					}
					if buf.Len() != 0 || buf.Buffers() != nil {
						t.Error("a buffer that was sent still has memory")
					}
					buf.Free()
					if err := a.Send(t.Context(), m); !errors.Is(err, ErrInvalid) {
						t.Errorf("sent twice: %v", err)
					}
					wantRead(t, to, want, a.AddrPort())
					if c, err := a.ReadCompletion(t.Context()); err != nil || c.Token != uint64(n) || c.Err() != nil {
						t.Errorf("%+v, %v", c, err)
					}
				}
			}
			if n := a.reserved.Load(); n != 0 {
				t.Errorf("%d bytes reserved", n)
			}
			closeService(t, sa)
			closeService(t, sb)
		})
	}
}

func TestSendBufLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 45, simnet.Config{})
		svc := openSim(t, net, Config{MaxReservedBytes: 100000, SendBuffer: 80000})
		a := bind(t, svc, ap(addrA, 4000))
		for n, want := range map[int]error{-1: ErrInvalid, MaxMessageSize + 1: ErrMessageTooLong, 80001: ErrMessageTooLong} {
			if _, err := a.Alloc(n); !errors.Is(err, want) {
				t.Errorf("Alloc(%d): %v", n, err)
			}
		}
		x, err := a.Alloc(60000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Alloc(40001); !errors.Is(err, ErrNoBufferSpace) {
			t.Errorf("beyond MaxReservedBytes: %v", err)
		}
		if st := svc.Stats(); st.SendNoReserve != 1 || st.ReservedBytes != 60000 {
			t.Errorf("%d refused, %d bytes reserved", st.SendNoReserve, st.ReservedBytes)
		}
		y, err := a.Alloc(40000)
		if err != nil {
			t.Fatal(err)
		}
		// What cannot be sent stays the caller's.
		for range 2 {
			if err := a.Send(t.Context(), Message{Peer: ap(addrB, 1), Buffer: x, Data: []byte{1}}); !errors.Is(err, ErrInvalid) {
				t.Errorf("Data and Buffer: %v", err)
			}
		}
		if err := a.TrySend(Message{Peer: ap(addrB, 1), Buffer: x}); err != nil {
			t.Fatal(err)
		}
		if _, n := a.Unacknowledged(); n != 60000 {
			t.Errorf("%d bytes accounted for", n)
		}
		mustWrite(t, a, make([]byte, 20000), ap(addrB, 1))
		if err := a.TrySend(Message{Peer: ap(addrB, 1), Buffer: y, Notify: true}); !errors.Is(err, ErrNoBufferSpace) || y.Len() != 40000 {
			t.Errorf("into a full send buffer: %v, %d bytes left", err, y.Len())
		}
		a.Close()
		if _, err := a.Alloc(1); !errors.Is(err, ErrClosed) {
			t.Errorf("Alloc on a closed socket: %v", err)
		}
		y.Free() // outlives its socket
		y.Free()
		if n := a.reserved.Load(); n != 0 {
			t.Errorf("%d bytes reserved", n)
		}
		if err := svc.Close(); err != nil && !errors.As(err, new(*AbandonedError)) {
			t.Error(err)
		}
	})
}

// What was lent and not given back is told with the place where it was lent, when anybody wants to know that.
func TestLoanReports(t *testing.T) {
	if !invariants.Enabled {
		t.Skip("needs -tags invariants")
	}
	n := newFakeNet()
	svc := newService(Config{})
	svc.tr = &fakeTransport{net: n, svc: svc}
	s := bind(t, svc, ap(addrA, 4000))
	mustWrite(t, s, []byte("x"), s.AddrPort())
	m, err := s.TryReceive()
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Alloc(10)
	if err != nil {
		t.Fatal(err)
	}
	var le *LoanError
	if err := svc.Close(); !errors.As(err, &le) || len(le.Sites) != 2 || strings.Count(err.Error(), "TestLoanReports") != 2 {
		t.Errorf("%v", err)
	}
	m.Release()
	b.Free()
	if err := svc.lent.err(); err != nil {
		t.Error(err)
	}
	m.Release()
	if err := svc.lent.err(); !errors.As(err, &le) || len(le.Sites) != 1 || strings.Count(err.Error(), "TestLoanReports") != 1 {
		t.Errorf("after a second Release: %v", err)
	}
	b.Free() // that is allowed
}

// Stamps of messages of every kind of place: inline, lent, in pieces, with a cookie, within the Service.
func TestStamps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay = 3 * time.Millisecond
		net := simnet.ForTest(t, 47, simnet.Config{Link: simnet.LinkConfig{Delay: delay}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a, b, local := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000)), bind(t, sb, ap(addrB, 4001))
		region := mustRegister(t, a, 100, RegionOptions{})
		if err := b.SetTimestamps(true); err != nil {
			t.Fatal(err)
		}
		for _, latency := range []bool{false, true} {
			if err := b.SetReceiveLatency(latency); err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{0, 10, 5000, 300000} {
				for _, cookie := range []Cookie{0, region.Cookie()} {
					for _, from := range []*Socket{a, local} {
						if from == local {
							cookie = 0
						}
						sent := time.Now()
						if err := from.Send(t.Context(), Message{Peer: b.AddrPort(), Data: payload(n, 1), Cookie: cookie}); err != nil {
							t.Fatal(err)
						}
						time.Sleep(time.Second)
						m, err := b.Receive(t.Context())
						if err != nil {
							t.Fatal(err)
						}
						what := fmt.Sprintf("latency %v, %d bytes, cookie %v, from %v", latency, n, cookie, m.Peer)
						if !bytes.Equal(m.Bytes(), payload(n, 1)) || m.Cookie != cookie {
							t.Errorf("%s: %d bytes, cookie %v", what, m.Len(), m.Cookie)
						}
						if from == a && m.Time.Before(sent.Add(delay)) || m.Time.Before(sent) || m.Time.After(sent.Add(time.Second)) {
							t.Errorf("%s: sent %v, arrived %v", what, sent, m.Time)
						}
						l := m.Latency
						if !latency && l != (ReceiveLatency{}) {
							t.Errorf("%s: %+v, though it is off", what, l)
						}
						if want := time.Since(m.Time); latency && (l.QueuedToDelivered != want || l.StartToQueued < 0 || l.HeaderToStart < 0) {
							t.Errorf("%s: %+v, queued for %v", what, l, want)
						}
						m.Release()
					}
				}
			}
		}
		// Off again, and with the socket gone, nobody reads the clock.
		local.SetReceiveLatency(true)
		local.Close()
		b.SetTimestamps(false)
		b.SetReceiveLatency(false)
		b.SetReceiveLatency(false)
		mustWrite(t, a, []byte("x"), b.AddrPort())
		if m, err := b.Receive(t.Context()); err != nil || !m.Time.IsZero() || m.Latency != (ReceiveLatency{}) {
			t.Errorf("%+v, %v", m, err)
		} else {
			m.Release()
		}
		if err := local.SetTimestamps(true); !errors.Is(err, ErrClosed) {
			t.Errorf("on a closed socket: %v", err)
		}
		region.Close()
		closeService(t, sa)
		closeService(t, sb)
	})
}

func TestListenConfig(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	lc := ListenConfig{Service: svc, TypeOfService: 7, ReadBuffer: 1234, WriteBuffer: 4321, Timestamps: true, RecvErr: true, CongestionMonitor: true, Transport: TransportIB}
	pc, err := lc.ListenPacket(t.Context(), "rds4", "10.0.0.1:4000")
	if err != nil {
		t.Fatal(err)
	}
	s := pc.(*Socket)
	if s.TypeOfService() != 7 || s.ReadBuffer() != 1234 || s.WriteBuffer() != 4321 || !s.RecvErr() || !s.CongestionMonitor() || s.Transport() != TransportIB || s.q.stamps != stampTime {
		t.Errorf("options: %+v", s)
	}
	for _, tc := range []struct {
		lc            ListenConfig
		network, addr string
		want          error
	}{
		{lc, "rds", "10.0.0.1:4000", syscall.EADDRINUSE},
		{lc, "udp", "10.0.0.1:5000", ErrInvalid},
		{lc, "rds6", "10.0.0.1:5000", ErrInvalid},
		{lc, "rds4", "[fd00::1]:5000", ErrInvalid},
		{lc, "rds", ":5000", ErrInvalid},
		{lc, "rds", "10.0.0.1", ErrInvalid},
		{lc, "rds", "10.0.0.1:99999", ErrInvalid},
		{ListenConfig{}, "rds", "10.0.0.1:5000", ErrInvalid},
		{ListenConfig{Service: svc, Transport: TransportTCP}, "rds", "10.0.0.1:5000", syscall.ENOPROTOOPT},
		{ListenConfig{Service: svc, Transport: 9}, "rds", "10.0.0.1:5000", syscall.EINVAL},
		{ListenConfig{Service: svc, ReadBuffer: -1}, "rds", "10.0.0.1:5000", ErrInvalid},
	} {
		pc, err := tc.lc.ListenPacket(t.Context(), tc.network, tc.addr)
		var oe *OpError
		if pc != nil || !errors.Is(err, tc.want) || !errors.As(err, &oe) || oe.Op != "bind" {
			t.Errorf("%s %s: %v, %v; want %v", tc.network, tc.addr, pc, err, tc.want)
		}
	}
}

func TestDialer(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	other, _ := n.open(t, Config{})
	server := bind(t, other, ap(addrB, 4000))
	d := Dialer{ListenConfig: ListenConfig{Service: svc, TypeOfService: 3}, LocalAddr: AddrFromAddrPort(ap(addrA, 0)), Timeout: time.Minute}
	c, err := d.Dial("rds", server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if a, ok := c.LocalAddr().(Addr); !ok || a.AddrPort().Addr() != addrA || a.AddrPort().Port() < firstUserPort || c.RemoteAddr() != server.LocalAddr() {
		t.Errorf("dialed from %v to %v", c.LocalAddr(), c.RemoteAddr())
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	wantRead(t, server, []byte("hello"), c.(*Socket).AddrPort())
	if c.(*Socket).TypeOfService() != 3 {
		t.Error("the options are not there")
	}

	// Without a local address it is the only one that there is.
	d.LocalAddr = nil
	s, err := d.DialAddrPort(t.Context(), ap(netip.MustParseAddr("::ffff:10.0.0.2"), 4000))
	if err != nil || s.AddrPort().Addr() != addrA || s.RemoteAddr() != server.LocalAddr() {
		t.Errorf("%v, %v", s, err)
	}
	// To an address of one's own it is that one.
	bind(t, svc, ap(addrC, 1000))
	if s, err := d.DialAddrPort(t.Context(), ap(addrC, 1000)); err != nil || s.AddrPort().Addr() != addrC {
		t.Errorf("%v, %v", s, err)
	}
	// With several the system says.
	if s, err := d.DialAddrPort(t.Context(), netip.MustParseAddrPort("127.0.0.9:1000")); err != nil || !s.AddrPort().Addr().IsLoopback() {
		t.Errorf("%v, %v", s, err)
	}
	if c, err := d.Dial("rds4", "localhost:4000"); err != nil || c.RemoteAddr().String() != "127.0.0.1:4000" {
		t.Errorf("by name: %v, %v", c, err)
	}

	for _, tc := range []struct {
		addr string
		want error
	}{{"0.0.0.0:4000", syscall.EDESTADDRREQ}, {"224.0.0.1:4000", syscall.EINVAL}, {"10.0.0.2", ErrInvalid}} {
		if c, err := d.Dial("rds", tc.addr); c != nil || !errors.Is(err, tc.want) || !errors.As(err, new(*OpError)) {
			t.Errorf("%s: %v, %v; want %v", tc.addr, c, err, tc.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.DialContext(ctx, "rds", "10.0.0.2:4000"); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if svc.local(addrA).ports.lookup(0) != nil {
		t.Error("port 0 is bound")
	}
}

// Of the addresses of a name a Dialer takes one that its LocalAddr can send to, as net.Dialer does.
func TestDialerChooses(t *testing.T) {
	six, four, mapped := netip.MustParseAddr("fd00::2"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("::ffff:10.0.0.2")
	for _, tc := range []struct {
		addrs      []netip.Addr
		like, want netip.Addr
	}{
		{[]netip.Addr{six, four}, netip.Addr{}, six},
		{[]netip.Addr{six, four}, addrA, four},
		{[]netip.Addr{six, mapped}, addrA, mapped},
		{[]netip.Addr{mapped, six}, six, six},
		{[]netip.Addr{six}, addrA, six},
	} {
		if got := choose(tc.addrs, tc.like); got != tc.want {
			t.Errorf("of %v, from %v: %v, want %v", tc.addrs, tc.like, got, tc.want)
		}
	}
}

// Link-local addresses: the zone is part of the key, by whatever name; elsewhere it means nothing.
func TestZones(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	a, err := svc.ListenPacket(t.Context(), "[fe80::1%lo]:4000")
	if err != nil {
		t.Fatal(err)
	}
	if ifc, err := net.InterfaceByName("lo"); err == nil {
		if _, err := svc.ListenPacket(t.Context(), fmt.Sprintf("[fe80::1%%%d]:4000", ifc.Index)); !errors.Is(err, ErrAddrInUse) {
			t.Errorf("the same zone by number: %v", err)
		}
	}
	b, err := svc.ListenPacket(t.Context(), "[fe80::1%eth7]:4000")
	if err != nil {
		t.Fatalf("the same address in another zone: %v", err)
	}
	if _, err := a.WriteTo([]byte("x"), b.Addr()); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("from one zone to the other: %v", err)
	}
	if err := a.Connect(b.Addr()); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("connect to another zone: %v", err)
	}
	if _, err := svc.ListenPacket(t.Context(), "[fd00::1%lo]:4000"); err != nil {
		t.Fatal(err)
	}
	if _, err := svc.ListenPacket(t.Context(), "[fd00::1]:4000"); !errors.Is(err, ErrAddrInUse) {
		t.Errorf("a zone counts for an address that has none: %v", err)
	}
}

// Datagrams between link-local addresses, by way of connections.
func TestZonesStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 51, simnet.Config{Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa, sb := openSim(t, net, Config{}), openSim(t, net, Config{})
		a := bind(t, sa, ap(netip.MustParseAddr("fe80::1%eth0"), 4000))
		b := bind(t, sb, ap(netip.MustParseAddr("fe80::2%eth0"), 4000))
		a.SetWriteDeadline(time.Now().Add(time.Second))
		mustWrite(t, a, []byte("hello"), b.AddrPort())
		b.SetReadDeadline(time.Now().Add(10 * time.Second))
		wantRead(t, b, []byte("hello"), a.AddrPort())
		mustWrite(t, b, []byte("you"), a.AddrPort())
		a.SetReadDeadline(time.Now().Add(10 * time.Second))
		wantRead(t, a, []byte("you"), b.AddrPort())
		closeService(t, sa)
		closeService(t, sb)
	})
}

// A socket that writes to a host that is not there goes on with the others, for as long as it takes.
func TestStackUnreachableShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 53, simnet.Config{GRO: true, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond}})
		sa, sb := openSim(t, net, Config{SendBuffer: 256 << 10}), openSim(t, net, Config{})
		a, b := bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000))
		mustWrite(t, a, []byte("there"), b.AddrPort())
		wantRead(t, b, []byte("there"), a.AddrPort())
		var wg sync.WaitGroup
		nowhere := ap(addrC, 4000)
		for range 4 {
			wg.Go(func() {
				for {
					if _, err := a.WriteToAddrPort(make([]byte, 1000), nowhere); err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		exchange(t, []*Socket{a}, []*Socket{b}, 300, 64<<10)
		if d := time.Since(start) - time.Minute; d > time.Second { // exchange looks out for a minute
			t.Errorf("the others took %v", d)
		}
		// What is there belongs to the host that is not.
		msgs, n := a.Unacknowledged()
		if f := a.flowsTo(addrC)[0].out.Load(); int(f>>outShift) != msgs || n < 128<<10 || n > 129<<10 {
			t.Errorf("%d messages, %d bytes unacknowledged; the share is %d", msgs, n, 128<<10)
		}
		if k, err := a.Cancel(nowhere); k != msgs || err != nil {
			t.Errorf("Cancel: %d of %d, %v", k, msgs, err)
		}
		a.Close()
		wg.Wait()
		if err := sa.Close(); err != nil && !errors.As(err, new(*AbandonedError)) {
			t.Error(err)
		}
		closeService(t, sb)
	})
}
