package rds

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn"
)

// pair is two sockets of two Services that reach each other.
func pair(t testing.TB, cfg Config) (a, b *Socket, ta, tb *fakeTransport) {
	n := newFakeNet()
	sa, ta := n.open(t, cfg)
	sb, tb := n.open(t, cfg)
	return bind(t, sa, ap(addrA, 4000)), bind(t, sb, ap(addrB, 4000)), ta, tb
}

func mustWrite(t testing.TB, s *Socket, p []byte, to netip.AddrPort) {
	t.Helper()
	if n, err := s.WriteToAddrPort(p, to); err != nil || n != len(p) {
		t.Fatalf("WriteToAddrPort: %d, %v", n, err)
	}
}

func wantRead(t testing.TB, s *Socket, want []byte, from netip.AddrPort) {
	t.Helper()
	p := make([]byte, MaxMessageSize)
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, f, err := s.ReadFromAddrPort(p)
	s.SetReadDeadline(time.Time{})
	if err != nil || f != from || !bytes.Equal(p[:n], want) {
		t.Fatalf("read %d bytes from %v, %v; want %d bytes from %v", n, f, err, len(want), from)
	}
}

func wantTimeout(t testing.TB, err, cause error) {
	t.Helper()
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) || cause != nil && !errors.Is(err, cause) {
		t.Fatalf("got %v; want an expired deadline caused by %v", err, cause)
	}
}

func payload(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7) + byte(i>>8) + seed
	}
	return p
}

func TestSizes(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	for _, n := range []int{0, 1, 7, 8, 63, 64, copyMax, copyMax + 1, 4096, inlineMax, inlineMax + 1, blockSize, blockSize + 1, MaxMessageSize} {
		p := payload(n, byte(n))
		mustWrite(t, a, p, b.AddrPort())
		mustWrite(t, a, p, b.AddrPort())
		wantRead(t, b, p, a.AddrPort())
		m, err := b.Receive(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if m.Len() != n || !bytes.Equal(bytes.Join(m.Buffers(), nil), p) || !bytes.Equal(m.Bytes(), p) || m.Peer != a.AddrPort() {
			t.Fatalf("Receive of %d bytes: %d bytes from %v", n, m.Len(), m.Peer)
		}
		m.Release()
	}
	st := b.svc.Stats()
	if st.QueuedBytes != 0 || st.LentBytes != 0 || st.LentMessages != 0 || st.RecvBytesAddedToSock != st.RecvBytesFreedFromsock {
		t.Errorf("after reading everything: %+v", st)
	}
}

func TestOrderOfMixedSizes(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	sizes := []int{64, 5000, 0, 64, 40000, 100000, 1, 1025, 1024}
	for round := range 20 {
		for i, n := range sizes {
			mustWrite(t, a, payload(n, byte(round*16+i)), b.AddrPort())
		}
		for i, n := range sizes {
			wantRead(t, b, payload(n, byte(round*16+i)), a.AddrPort())
		}
	}
}

func TestShortBuffer(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	for _, n := range []int{100, 50000, 200000} {
		mustWrite(t, a, payload(n, 1), b.AddrPort())
		p := make([]byte, 60)
		k, from, err := b.ReadFrom(p)
		if k != 60 || from != net.Addr(a.Addr()) || !errors.Is(err, io.ErrShortBuffer) || !bytes.Equal(p, payload(n, 1)[:60]) {
			t.Fatalf("short read: %d from %v, %v", k, from, err)
		}
		mustWrite(t, a, []byte("next"), b.AddrPort())
		wantRead(t, b, []byte("next"), a.AddrPort())
	}
	if st := b.svc.Stats(); st.RecvShortBuffer != 3 {
		t.Errorf("%d short reads counted, want 3", st.RecvShortBuffer)
	}
}

func TestWriteChecks(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	six := netip.MustParseAddr("fd00::1")
	for _, tc := range []struct {
		name string
		to   netip.AddrPort
		n    int
		want error
	}{
		{"no destination", netip.AddrPort{}, 1, ErrNotConnected},
		{"wildcard", ap(netip.IPv4Unspecified(), 1), 1, ErrInvalid},
		{"broadcast", ap(broadcast4, 1), 1, ErrInvalid},
		{"multicast", ap(netip.MustParseAddr("224.0.0.1"), 1), 1, ErrInvalid},
		{"other IP version", ap(six, 5), 1, ErrNotSupported},
		{"too long, invalid destination first", ap(broadcast4, 5), MaxMessageSize + 1, ErrInvalid},
		{"too long", b.AddrPort(), MaxMessageSize + 1, ErrMessageTooLong},
	} {
		k, err := a.WriteToAddrPort(make([]byte, tc.n), tc.to)
		var oe *OpError
		if k != 0 || !errors.Is(err, tc.want) || !errors.As(err, &oe) || oe.Op != "write" || oe.Local != a.Addr() {
			t.Errorf("%s: %d, %v; want %v", tc.name, k, err, tc.want)
		}
	}
	if !errors.Is(ErrMessageTooLong, syscall.EMSGSIZE) || !errors.Is(ErrCongested, syscall.ENOBUFS) || !errors.Is(ErrNoBufferSpace, syscall.EAGAIN) {
		t.Error("the conditions do not match the kernel's errno")
	}

	if err := a.SetWriteBuffer(1000); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteToAddrPort(make([]byte, 1001), b.AddrPort()); !errors.Is(err, ErrMessageTooLong) {
		t.Errorf("longer than the send buffer: %v", err)
	}
	mustWrite(t, a, make([]byte, 1000), b.AddrPort())
	if _, err := a.Write([]byte{1}); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Write without Connect: %v", err)
	}
	if err := a.SetWriteBuffer(0); !errors.Is(err, ErrInvalid) {
		t.Errorf("SetWriteBuffer(0): %v", err)
	}
}

func TestConnect(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	if a.RemoteAddr() != nil {
		t.Error("RemoteAddr of an unconnected socket")
	}
	if err := a.Connect(&net.UDPAddr{IP: net.IPv4(10, 0, 0, 2), Port: 4000}); err != nil {
		t.Fatal(err)
	}
	if a.RemoteAddr() != net.Addr(b.Addr()) {
		t.Errorf("RemoteAddr is %v", a.RemoteAddr())
	}
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	wantRead(t, b, []byte("x"), a.AddrPort())
	if err := a.Send(context.Background(), Message{Data: []byte("y")}); err != nil {
		t.Fatal(err)
	}
	wantRead(t, b, []byte("y"), a.AddrPort())
	if err := a.ConnectAddrPort(ap(netip.IPv4Unspecified(), 4)); !errors.Is(err, ErrInvalid) {
		t.Errorf("connect to the wildcard: %v", err)
	}
	// Being connected does not restrict what is received.
	c := bind(t, b.svc, ap(addrB, 0))
	mustWrite(t, c, []byte("z"), a.AddrPort())
	wantRead(t, a, []byte("z"), c.AddrPort())
	if n, err := a.Cancel(b.AddrPort()); n != 0 || err != nil {
		t.Errorf("Cancel: %d, %v", n, err)
	}
}

func TestBind(t *testing.T) {
	n := newFakeNet()
	svc, tr := n.open(t, Config{})
	ctx := context.Background()
	for _, tc := range []struct {
		addr string
		want error
	}{
		{"nonsense", ErrInvalid},
		{"10.0.0.1", ErrInvalid},
		{"host:1", ErrInvalid},
		{"10.0.0.1:1", ErrInvalid},
		{"0.0.0.0:4", ErrInvalid},
		{"[::]:4", ErrInvalid},
		{"255.255.255.255:4", ErrInvalid},
		{"224.0.0.1:4", ErrInvalid},
		{"[ff02::1]:4", ErrInvalid},
		{"[fe80::1]:4", ErrInvalid},
	} {
		_, err := svc.ListenPacket(ctx, tc.addr)
		var oe *OpError
		if !errors.Is(err, tc.want) || !errors.As(err, &oe) || oe.Op != "bind" {
			t.Errorf("bind %s: %v; want %v", tc.addr, err, tc.want)
		}
	}
	a, err := svc.ListenPacket(ctx, "10.0.0.1:4000")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := svc.ListenPacket(ctx, "10.0.0.1:4000"); !errors.Is(err, ErrAddrInUse) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second bind: %v", err)
	}
	if _, err := svc.ListenPacket(ctx, "[::ffff:10.0.0.1]:4000"); !errors.Is(err, ErrAddrInUse) {
		t.Errorf("the IPv4-mapped form is the same binding: %v", err)
	}
	a.Close()
	if _, err = svc.ListenPacket(ctx, "10.0.0.1:4000"); err != nil {
		t.Errorf("bind after Close: %v", err)
	}

	tr.listen = func(netip.Addr) error { return fmt.Errorf("udp: %w", syscall.EADDRNOTAVAIL) }
	if _, err := svc.ListenPacket(ctx, "10.0.0.9:4000"); !errors.Is(err, ErrAddrNotAvailable) {
		t.Errorf("an address that is not ours: %v", err)
	}
	tr.listen = func(netip.Addr) error { return fmt.Errorf("owned by process 7: %w", syscall.EADDRINUSE) }
	if _, err := svc.ListenPacket(ctx, "10.0.0.9:4000"); !errors.Is(err, ErrAddrInUse) {
		t.Errorf("an address that is another's: %v", err)
	}
	tr.listen = nil
	if _, err := svc.ListenPacket(ctx, "10.0.0.9:4000"); err != nil {
		t.Errorf("the same address once it is free: %v", err)
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := svc.ListenPacket(done, "10.0.0.1:0"); !errors.Is(err, context.Canceled) {
		t.Errorf("bind with a done context: %v", err)
	}
}

func TestBindAuto(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	seen := make(map[uint16]bool)
	// Half of the port space, so that many starts meet taken ports.
	for range 32000 {
		s := bind(t, svc, ap(addrA, 0))
		p := s.AddrPort().Port()
		if p < firstUserPort || p == conn.PingSourcePort || seen[p] {
			t.Fatalf("port 0 gave %d", p)
		}
		seen[p] = true
	}
	la := svc.local(addrA)
	for p := range 1 << 16 {
		la.ports.bind(uint16(p), &Socket{})
	}
	if _, err := svc.ListenAddrPort(context.Background(), ap(addrA, 0)); !errors.Is(err, ErrAddrInUse) {
		t.Errorf("all ports taken: %v", err)
	}
	for p := range 1 << 16 {
		if s := la.ports.lookup(uint16(p)); s.la == nil {
			la.ports.unbind(uint16(p), s)
		}
	}
}

func TestSendBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ta, _ := pair(t, Config{SendBuffer: 1000})
		ta.withhold = true
		mustWrite(t, a, make([]byte, 999), b.AddrPort())
		mustWrite(t, a, make([]byte, 1000), b.AddrPort()) // 999 < 1000 were queued: one may overshoot
		for _, n := range []int{0, 1} {
			if err := a.TrySend(Message{Peer: b.AddrPort(), Data: make([]byte, n)}); !errors.Is(err, ErrNoBufferSpace) {
				t.Fatalf("TrySend of %d bytes into a full buffer: %v", n, err)
			}
		}
		a.SetWriteDeadline(time.Now().Add(time.Second))
		start := time.Now()
		_, err := a.WriteToAddrPort([]byte{1}, b.AddrPort())
		wantTimeout(t, err, ErrNoBufferSpace)
		if d := time.Since(start); d != time.Second {
			t.Errorf("the deadline came after %v", d)
		}
		// An expired deadline fails at once, room or not.
		ta.ack(-1)
		_, err = a.WriteToAddrPort([]byte{1}, b.AddrPort())
		wantTimeout(t, err, nil)
		a.SetWriteDeadline(time.Time{})
		mustWrite(t, a, make([]byte, 1000), b.AddrPort())

		// An acknowledgement lets all writers in that fit.
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { mustWrite(t, a, make([]byte, 10), b.AddrPort()) })
		}
		synctest.Wait()
		if msgs, _ := a.Unacknowledged(); msgs != 1 {
			t.Fatalf("%d messages got into a full buffer", msgs-1)
		}
		ta.ack(-1)
		wg.Wait()
		if msgs, n := a.Unacknowledged(); msgs != 5 || n != 50 {
			t.Errorf("%d messages, %d bytes unacknowledged; want 5, 50", msgs, n)
		}

		// A context ends a Send, and says why it waited.
		a.SetWriteBuffer(10)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = a.Send(ctx, Message{Peer: b.AddrPort(), Data: []byte{1}})
		wantTimeout(t, err, ErrNoBufferSpace)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Send: %v", err)
		}
		// A larger buffer lets a waiting writer in.
		wg.Go(func() { mustWrite(t, a, make([]byte, 10), b.AddrPort()) })
		synctest.Wait()
		a.SetWriteBuffer(1000)
		wg.Wait()

		st := a.svc.Stats()
		if st.SendQueueFull == 0 || st.UnackedMessages != 6 {
			t.Errorf("counters: %+v", st)
		}
	})
}

func TestSendBufferCountsMessages(t *testing.T) {
	a, b, ta, _ := pair(t, Config{})
	ta.withhold = true
	n := 0
	for a.TrySend(Message{Peer: b.AddrPort()}) == nil {
		n++
	}
	if n != DefaultBuffer/sndMsgBytes {
		t.Errorf("%d empty messages fit into the send buffer, want %d", n, DefaultBuffer/sndMsgBytes)
	}
}

func TestConnectionWithoutMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ta, _ := pair(t, Config{})
		ta.sendErr = conn.ErrNoMemory
		if err := a.TrySend(Message{Peer: b.AddrPort()}); !errors.Is(err, ErrNoBufferSpace) {
			t.Fatalf("TrySend: %v", err)
		}
		time.AfterFunc(time.Second, func() {
			ta.mu.Lock()
			ta.sendErr = nil
			ta.mu.Unlock()
		})
		start := time.Now()
		mustWrite(t, a, []byte("x"), b.AddrPort())
		if d := time.Since(start); d < time.Second || d > time.Second+2*noMemoryRetry {
			t.Errorf("the write took %v", d)
		}
		if msgs, _ := a.Unacknowledged(); msgs != 0 {
			t.Errorf("%d messages accounted", msgs)
		}
	})
}

func TestCongestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, Config{ReceiveBuffer: 1000})
		other := bind(t, b.svc, ap(addrB, 5000))
		congested := func() bool { return b.q.congested.Load() }
		for range 10 {
			mustWrite(t, a, make([]byte, 100), b.AddrPort())
		}
		if congested() {
			t.Fatal("1000 bytes queued are not more than 1000")
		}
		mustWrite(t, a, nil, b.AddrPort())
		if congested() {
			t.Fatal("a message without payload made the port congested")
		}
		mustWrite(t, a, make([]byte, 1), b.AddrPort())
		if !congested() {
			t.Fatal("1001 bytes queued, and not congested")
		}
		if err := a.TrySend(Message{Peer: b.AddrPort()}); !errors.Is(err, ErrCongested) {
			t.Fatalf("TrySend to a congested port: %v", err)
		}
		mustWrite(t, a, []byte("other port"), other.AddrPort())
		a.SetWriteDeadline(time.Now().Add(time.Second))
		_, err := a.WriteToAddrPort(nil, b.AddrPort())
		wantTimeout(t, err, ErrCongested)
		a.SetWriteDeadline(time.Time{})

		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { mustWrite(t, a, []byte("late"), b.AddrPort()) })
		}
		synctest.Wait()
		p := make([]byte, 100)
		for i := range 5 { // 501 bytes left
			if _, _, err := b.ReadFromAddrPort(p); err != nil {
				t.Fatal(err)
			}
			if !congested() {
				t.Fatalf("not congested any more after %d messages", i+1)
			}
		}
		if _, _, err := b.ReadFromAddrPort(p); err != nil { // 401
			t.Fatal(err)
		}
		if congested() {
			t.Fatal("401 bytes queued, and still congested")
		}
		wg.Wait()
		st := a.svc.Stats()
		if st.CongSendBlocked != 4 || st.CongSendError != 1 {
			t.Errorf("blocked %d, refused %d; want 4, 1", st.CongSendBlocked, st.CongSendError)
		}

		// The limit can be moved past what is queued.
		b.SetReadBuffer(100)
		if !congested() {
			t.Error("a smaller buffer did not make the port congested")
		}
		b.SetReadBuffer(10000)
		if congested() {
			t.Error("a larger buffer did not end congestion")
		}
		b.SetReadBuffer(100)
		b.Close()
		if b.q.congested.Load() {
			t.Error("a closed socket's port is congested")
		}
		mustWrite(t, a, []byte("to nobody"), b.AddrPort())
	})
}

// Messages without payload have a bound as well, although the kernel's accounting has none for them.
func TestCongestionByCount(t *testing.T) {
	a, b, _, _ := pair(t, Config{ReceiveBuffer: 1000})
	n := 0
	for a.TrySend(Message{Peer: b.AddrPort()}) == nil {
		if n++; n > 1<<20 {
			t.Fatal("no bound")
		}
	}
	p := make([]byte, 1)
	for range n {
		b.ReadFromAddrPort(p)
	}
	if b.q.congested.Load() {
		t.Error("an empty queue is congested")
	}
}

func TestPeerLimit(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{MaxPeerBytes: minPeerBytes})
	s := bind(t, svc, ap(addrA, 4000))
	big := make([]byte, MaxMessageSize)
	send := func(from netip.Addr) bool { return deliverTo(svc, addrA, from, 9, 4000, big) }
	if !send(addrB) {
		t.Fatal("the first message was not taken")
	}
	if send(addrB) {
		t.Fatal("2 MiB and two headers were taken with a bound of 2 MiB")
	}
	if !send(netip.MustParseAddr("10.0.0.3")) {
		t.Fatal("another peer pays for the first one")
	}
	wantRead(t, s, big, ap(addrB, 9))
	if !send(addrB) {
		t.Error("not taken although the queue is empty")
	}
	if st := svc.Stats(); st.RecvPeerLimit != 1 {
		t.Errorf("counted %d times", st.RecvPeerLimit)
	}
}

func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		svc, _ := n.open(t, Config{HoldBytes: 10000})
		first := bind(t, svc, ap(addrA, 4000))
		from := ap(addrB, 7)
		for i := range 5 {
			deliverTo(svc, addrA, addrB, 7, 4001, payload(1500, byte(i)))
		}
		deliverTo(svc, addrA, addrB, 7, 4000, []byte("bound"))
		wantRead(t, first, []byte("bound"), from)
		time.Sleep(DefaultHoldTime / 2)
		late := bind(t, svc, ap(addrA, 4001))
		deliverTo(svc, addrA, addrB, 7, 4001, []byte("after the bind"))
		for i := range 5 {
			wantRead(t, late, payload(1500, byte(i)), from)
		}
		wantRead(t, late, []byte("after the bind"), from)

		// Bounded in bytes.
		for range 100 {
			deliverTo(svc, addrA, addrB, 7, 4002, make([]byte, 1000))
		}
		st := svc.Stats()
		if st.RecvHeld != 5+9 || st.RecvDropNoSock != 91 {
			t.Errorf("held %d, dropped %d; want 14, 91", st.RecvHeld, st.RecvDropNoSock)
		}
		// Bounded in time.
		time.Sleep(DefaultHoldTime)
		if st := svc.Stats(); st.RecvDropNoSock != 100 {
			t.Errorf("dropped %d in the end, want 100", st.RecvDropNoSock)
		}
		deliverTo(svc, addrA, addrB, 7, 4002, nil)
		if st := svc.Stats(); st.RecvDropNoSock != 101 {
			t.Errorf("dropped %d later, want 101", st.RecvDropNoSock)
		}
		if q := svc.peerOf(addrA, addrB).queued.Load(); q != 0 {
			t.Errorf("%d bytes accounted to the peer with nothing queued", q)
		}
	})
}

func TestLocalDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		svc, tr := n.open(t, Config{ReceiveBuffer: 1000, HoldTime: -1})
		a, b := bind(t, svc, ap(addrA, 4000)), bind(t, svc, ap(addrB, 4000))
		same := bind(t, svc, ap(addrA, 4001))
		for _, to := range []*Socket{b, same, a} {
			mustWrite(t, a, []byte("near"), to.AddrPort())
			wantRead(t, to, []byte("near"), a.AddrPort())
		}
		big := payload(MaxMessageSize, 3)
		mustWrite(t, a, big, b.AddrPort())
		if err := a.TrySend(Message{Peer: b.AddrPort(), Data: []byte{1}}); !errors.Is(err, ErrCongested) {
			t.Fatalf("TrySend to a full neighbour: %v", err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { mustWrite(t, a, []byte("waited"), b.AddrPort()) })
		synctest.Wait()
		wantRead(t, b, big, a.AddrPort())
		wantRead(t, b, []byte("waited"), a.AddrPort())
		wg.Wait()

		mustWrite(t, a, []byte("nobody there"), ap(addrB, 9))
		if st := svc.Stats(); st.RecvDropNoSock != 1 {
			t.Errorf("dropped %d", st.RecvDropNoSock)
		}
		mustWrite(t, a, []byte("ping"), ap(addrB, PingPort))
		wantRead(t, a, nil, ap(addrB, PingPort))
		if msgs, bytes := a.Unacknowledged(); msgs != 0 || bytes != 0 {
			t.Errorf("%d messages, %d bytes unacknowledged by nobody", msgs, bytes)
		}
		if len(tr.unacked) != 0 {
			t.Error("local datagrams went over the wire")
		}

		// What began over the wire stays there: it must not be overtaken.
		addrC := netip.MustParseAddr("10.0.0.3")
		mustWrite(t, a, []byte("into the void"), ap(addrC, 4000))
		bind(t, svc, ap(addrC, 4000))
		if d := a.last.Load(); d.remote != addrC {
			t.Fatal("wrong destination cached")
		} else if _, ok := d.link.(*fakeLink); !ok {
			t.Errorf("link is a %T", d.link)
		}
	})
}

func TestLoans(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{MaxLentBytes: 2 * blockSize})
	s := bind(t, svc, ap(addrA, 4000))
	const count = 5000 // of 1016+ bytes: about 80 blocks
	var ms []*Message
	for i := range count {
		deliverTo(svc, addrA, addrB, 7, 4000, payload(1000, byte(i)))
		if i%2 == 1 {
			wantRead(t, s, payload(1000, byte(i-1)), ap(addrB, 7))
			m, err := s.Receive(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			ms = append(ms, m)
		}
	}
	st := svc.Stats()
	if st.LentMessages != count/2 || st.LentBytes > 2*blockSize || st.RecvLoanCopied == 0 {
		t.Errorf("lent %d messages, %d bytes, %d copied", st.LentMessages, st.LentBytes, st.RecvLoanCopied)
	}
	s.Close() // loans outlive the socket
	for i, m := range ms {
		if !bytes.Equal(m.Bytes(), payload(1000, byte(2*i+1))) {
			t.Fatalf("message %d changed while it was lent", i)
		}
	}
	for _, m := range ms {
		m.Release()
	}
	if s.loans.Load() != 0 || s.lentBytes.Load() != 0 {
		t.Errorf("%d loans, %d bytes left", s.loans.Load(), s.lentBytes.Load())
	}
}

func TestReadDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, Config{})
		p := make([]byte, 10)
		read := func() error {
			_, _, err := b.ReadFrom(p)
			return err
		}
		start := time.Now()
		b.SetReadDeadline(start.Add(time.Second))
		wantTimeout(t, read(), nil)
		if d := time.Since(start); d != time.Second {
			t.Errorf("expired after %v", d)
		}
		// As in package net, an expired deadline fails even if there is data.
		mustWrite(t, a, []byte("x"), b.AddrPort())
		wantTimeout(t, read(), nil)
		b.SetReadDeadline(time.Time{})
		if err := read(); err != nil {
			t.Fatal(err)
		}
		// Moved while somebody waits: later, then to the past.
		errs := make(chan error)
		b.SetDeadline(time.Now().Add(time.Second))
		go func() { errs <- read() }()
		time.Sleep(time.Second / 2)
		b.SetDeadline(time.Now().Add(time.Hour))
		time.Sleep(time.Minute)
		select {
		case err := <-errs:
			t.Fatalf("the old deadline expired: %v", err)
		default:
		}
		b.SetDeadline(time.Unix(1, 0))
		wantTimeout(t, <-errs, nil)
		// A context ends a Receive; what is here already beats it.
		b.SetDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := b.Receive(ctx)
		wantTimeout(t, err, nil)
		mustWrite(t, a, []byte("x"), b.AddrPort())
		m, err := b.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m.Release()
	})
}

// A deadline that is set while Close runs starts no timer that outlives it.
func TestDeadlineAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := deadline{fire: func() { t.Error("a deadline that was stopped expires") }}
		d.stop()
		d.set(time.Now().Add(time.Second))
		d.set(time.Unix(1, 0))
		time.Sleep(time.Minute)
		if d.timer != nil {
			t.Error("there is a timer")
		}
	})
}

func TestManyReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := pair(t, Config{})
		const readers, each = 8, 50
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				p := make([]byte, 10)
				for range each {
					if _, _, err := b.ReadFromAddrPort(p); err != nil {
						t.Error(err)
					}
				}
			})
		}
		synctest.Wait()
		// One batch wakes one reader; each passes the rest on.
		var batch []conn.Incoming
		for range readers * each / 2 {
			batch = append(batch, conn.Incoming{SrcPort: 1, DstPort: 4000})
		}
		b.svc.deliver(b.svc.peerOf(addrB, addrA), 0, batch, maxInt64)
		synctest.Wait()
		for range readers * each / 2 {
			mustWrite(t, a, nil, b.AddrPort())
		}
		wg.Wait()
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ta, _ := pair(t, Config{SendBuffer: 10, ReceiveBuffer: 10})
		c := bind(t, a.svc, ap(addrA, 4001))
		ta.withhold = true
		mustWrite(t, a, make([]byte, 10), b.AddrPort())
		errs := make(chan error)
		go func() { _, err := a.WriteToAddrPort([]byte{1}, b.AddrPort()); errs <- err }()
		go func() { _, _, err := a.ReadFrom(nil); errs <- err }()
		go func() { _, err := a.Receive(t.Context()); errs <- err }()
		mustWrite(t, c, []byte{1}, b.AddrPort()) // b is congested now
		go func() { _, err := c.WriteToAddrPort([]byte{1}, b.AddrPort()); errs <- err }()
		synctest.Wait()
		a.Close()
		for range 3 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("blocked call: %v", err)
			}
		}
		c.Close()
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("blocked call: %v", err)
		}
		for _, err := range []error{a.Close(), a.Close()} {
			if err != nil {
				t.Errorf("Close again: %v", err)
			}
		}
		for name, f := range map[string]func() error{
			"WriteTo":          func() error { _, err := a.WriteTo(nil, b.Addr()); return err },
			"Write":            func() error { _, err := a.Write(nil); return err },
			"ReadFrom":         func() error { _, _, err := a.ReadFrom(nil); return err },
			"Read":             func() error { _, err := a.Read(nil); return err },
			"Receive":          func() error { _, err := a.Receive(t.Context()); return err },
			"Send":             func() error { return a.Send(t.Context(), Message{Peer: b.AddrPort()}) },
			"TrySend":          func() error { return a.TrySend(Message{Peer: b.AddrPort()}) },
			"Connect":          func() error { return a.Connect(b.Addr()) },
			"SetDeadline":      func() error { return a.SetDeadline(time.Time{}) },
			"SetWriteDeadline": func() error { return a.SetWriteDeadline(time.Time{}) },
			"SetReadBuffer":    func() error { return a.SetReadBuffer(1) },
			"SetWriteBuffer":   func() error { return a.SetWriteBuffer(1) },
			"Cancel":           func() error { _, err := a.Cancel(b.AddrPort()); return err },
		} {
			var oe *OpError
			if err := f(); !errors.Is(err, net.ErrClosed) || !errors.As(err, &oe) || oe.Timeout() {
				t.Errorf("%s after Close: %v", name, err)
			}
		}
		if a.LocalAddr() != net.Addr(Addr{ap(addrA, 4000)}) {
			t.Error("a closed socket forgot its address")
		}
		// Unread messages vanish, counted.
		b.Close()
		if st := b.svc.Stats(); st.RecvDropDeadSock != 2 {
			t.Errorf("%d messages died with the socket, want 2", st.RecvDropDeadSock)
		}

		d := bind(t, a.svc, ap(addrA, 4002))
		go func() { _, err := d.Read(nil); errs <- err }()
		synctest.Wait()
		err := a.svc.Close()
		var ab *AbandonedError
		if !errors.As(err, &ab) || ab.Messages != 2 {
			t.Errorf("Service.Close: %v; want 2 messages abandoned", err)
		}
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("blocked read: %v", err)
		}
		if err := a.svc.Close(); err != nil {
			t.Errorf("Service.Close again: %v", err)
		}
		if _, err := a.svc.ListenPacket(t.Context(), "10.0.0.1:9"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("bind after Service.Close: %v", err)
		}
	})
}

// A storm of everything at once ends with nothing blocked and nothing accounted.
func TestCloseStorm(t *testing.T) {
	n := newFakeNet()
	sa, ta := n.open(t, Config{SendBuffer: 4096, ReceiveBuffer: 2048, HoldTime: time.Millisecond})
	sb, _ := n.open(t, Config{SendBuffer: 4096, ReceiveBuffer: 2048, HoldTime: time.Millisecond})
	bind(t, sb, ap(addrB, 3999))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			p := make([]byte, 300)
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				default:
				}
				s, err := sa.ListenAddrPort(context.Background(), ap(addrA, uint16(4000+i)))
				if err != nil {
					t.Error(err)
					return
				}
				r, err := sb.ListenAddrPort(context.Background(), ap(addrB, uint16(4000+i)))
				if err != nil {
					t.Error(err)
					return
				}
				var in sync.WaitGroup
				in.Go(func() {
					for {
						if _, err := s.WriteToAddrPort(p, r.AddrPort()); err != nil {
							return
						}
					}
				})
				for range 2 {
					in.Go(func() {
						q := make([]byte, 400)
						for {
							if _, _, err := r.ReadFromAddrPort(q); err != nil {
								return
							}
						}
					})
				}
				in.Go(func() {
					for {
						m, err := r.Receive(context.Background())
						if err != nil {
							return
						}
						m.Release()
					}
				})
				time.Sleep(time.Duration(k%5) * 100 * time.Microsecond)
				if k%2 == 0 {
					r.Close()
					s.Close()
				} else {
					s.SetDeadline(time.Unix(1, 0))
					s.Close()
					r.Close()
				}
				in.Wait()
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	close(stop)
	wg.Wait()
	ta.ack(-1)
	for _, svc := range []*Service{sa, sb} {
		for _, p := range svc.peers.all() {
			if q := p.queued.Load(); q != 0 {
				t.Errorf("%d bytes accounted to %v with nothing queued", q, p.remote)
			}
			if !p.cong.empty() {
				t.Error("a writer still waits")
			}
		}
	}
}

func TestProgressByWaiters(t *testing.T) {
	a, b, _, tb := pair(t, Config{})
	mustWrite(t, b, nil, a.AddrPort())
	wantRead(t, a, nil, b.AddrPort())
	work := 0
	tb.mu.Lock()
	tb.progress = func() bool {
		if work++; work == 2 {
			deliverTo(b.svc, addrB, addrA, 4000, 4000, []byte("worked for"))
		}
		return true
	}
	tb.mu.Unlock()
	wantRead(t, b, []byte("worked for"), a.AddrPort())
	if work < 2 || tb.flushed == 0 {
		t.Errorf("the reader did %d rounds of work after %d flushes", work, tb.flushed)
	}
}

func TestAddr(t *testing.T) {
	a := MustParseAddr("[::ffff:10.0.0.1]:4000")
	if a != MustParseAddr("10.0.0.1:4000") || a.String() != "10.0.0.1:4000" || a.Network() != "rds" {
		t.Errorf("Addr %v on %s", a, a.Network())
	}
	text, _ := a.MarshalText()
	var b Addr
	if err := b.UnmarshalText(text); err != nil || b != a {
		t.Errorf("round trip: %v, %v", b, err)
	}
	if err := b.UnmarshalText([]byte("x")); err == nil || b != a {
		t.Errorf("nonsense: %v, %v", b, err)
	}
	if (Addr{}).IsValid() || (Addr{}).String() != ":0" {
		t.Error("the zero Addr is an address")
	}
	if text, err := (Addr{}).MarshalText(); len(text) != 0 || err != nil || b.UnmarshalText(text) != nil || b != (Addr{}) {
		t.Errorf("the zero Addr as text: %q, %v, and back: %v", text, err, b)
	}
	if _, err := toAddrPort(&net.UnixAddr{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a unix address: %v", err)
	}
	ip := net.IPv4(10, 0, 0, 1)
	for _, other := range []net.Addr{a, &a, &net.UDPAddr{IP: ip, Port: 4000}, &net.TCPAddr{IP: ip.To4(), Port: 4000}} {
		if ap, err := toAddrPort(other); err != nil || ap != a.AddrPort() {
			t.Errorf("%T %v: %v, %v", other, other, ap, err)
		}
	}
	for _, none := range []net.Addr{(*Addr)(nil), (*net.UDPAddr)(nil), (*net.TCPAddr)(nil), &net.UDPAddr{Port: 4000}} {
		if ap, err := toAddrPort(none); err != nil || ap.IsValid() {
			t.Errorf("%T without an address: %v, %v", none, ap, err)
		}
	}
	// A port that is none must not become another one.
	for _, port := range []int{-1, 65536, 1<<31 - 1} {
		for _, bad := range []net.Addr{&net.UDPAddr{IP: ip, Port: port}, &net.TCPAddr{IP: ip, Port: port}} {
			if ap, err := toAddrPort(bad); !errors.Is(err, ErrInvalid) {
				t.Errorf("%T with port %d: %v, %v", bad, port, ap, err)
			}
		}
	}
}

// FuzzAddr: whatever is an address is one value in one form, which is host:port, and text, JSON and netip bring it back.
func FuzzAddr(f *testing.F) {
	for _, s := range []string{"10.0.0.1:4000", "[::ffff:10.0.0.1]:4000", "[fd00::1]:0", "[fe80::1%eth0]:65535", "[fe80::1%1]:1", "[fd00::1%x]:1", "[::ffff:1.2.3.4%x]:1", "[fe80::1%a]:2]:3", "[fe80::1%\xff]:1", ":0", "1.2.3.4:", "host:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddr(s)
		if err != nil {
			if a != (Addr{}) {
				t.Fatalf("%q is no address, and is %v", s, a)
			}
			return
		}
		host, port, err := net.SplitHostPort(a.String())
		if ap := a.AddrPort(); err != nil || host != ap.Addr().String() || port != strconv.Itoa(int(ap.Port())) || ap.Addr().Is4In6() {
			t.Fatalf("%q is %v: host %q, port %q, %v", s, a, host, port, err)
		}
		if b, err := ParseAddr(a.String()); err != nil || b != a {
			t.Fatalf("%q is %v, which is %v, %v", s, a, b, err)
		}
		if b := AddrFromAddrPort(a.AddrPort()); b != a {
			t.Fatalf("%v is %v", a, b)
		}
		text, err := json.Marshal(map[Addr]Addr{a: a})
		if err != nil {
			t.Fatal(err)
		}
		var back map[Addr]Addr
		if err := json.Unmarshal(text, &back); err != nil || len(back) != 1 || back[a] != a {
			t.Fatalf("%v as JSON: %s, and back: %v, %v", a, text, back, err)
		}
	})
}

// Calls that wait with a context have no goroutine but the caller's, as many as there are of them.
func TestContextWithoutGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ta, tb := pair(t, Config{SendBuffer: 100})
		mustWrite(t, a, make([]byte, 100), b.AddrPort())
		full := bind(t, a.svc, ap(addrA, 4001))
		ta.withhold = true
		mustWrite(t, full, make([]byte, 100), b.AddrPort())
		bind(t, b.svc, ap(addrB, 5000))
		tb.SetCongested(addrB, 5000, true)
		ctx, cancel := context.WithCancel(t.Context())
		before := runtime.NumGoroutine()
		const each = 50
		var wg sync.WaitGroup
		calls := map[string]func() error{
			"Receive":           func() error { _, err := a.Receive(ctx); return err },
			"ReadCompletion":    func() error { _, err := a.ReadCompletion(ctx); return err },
			"ReadCongestion":    func() error { _, err := a.ReadCongestion(ctx); return err },
			"Send, buffer full": func() error { return full.Send(ctx, Message{Peer: b.AddrPort(), Data: []byte{1}}) },
			"Send, congested":   func() error { return a.Send(ctx, Message{Peer: ap(addrB, 5000)}) },
		}
		for name, call := range calls {
			for range each {
				wg.Go(func() {
					if err := call(); !errors.Is(err, context.Canceled) || !errors.As(err, new(*OpError)) {
						t.Errorf("%s: %v", name, err)
					}
				})
			}
		}
		synctest.Wait()
		if n := runtime.NumGoroutine() - before; n > each*len(calls) { // fewer if one of another test was about to end
			t.Errorf("%d goroutines for %d calls that wait", n, each*len(calls))
		}
		cancel()
		wg.Wait() // and nothing else is left, or the bubble complains
	})
}

func TestConfigValidate(t *testing.T) {
	_, err := Open(Config{SendBuffer: -1, ReceiveBuffer: -1, MaxPeerBytes: 5, Dialect: 9, HoldBytes: -1, MaxSlabBytes: minSlabBytes - 1})
	if !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	for _, word := range []string{"SendBuffer", "ReceiveBuffer", "MaxPeerBytes", "Dialect", "HoldBytes", "MaxSlabBytes"} {
		if !bytes.Contains([]byte(err.Error()), []byte(word)) {
			t.Errorf("%s is not mentioned in: %v", word, err)
		}
	}
}

func TestCounterNames(t *testing.T) {
	var st Stats
	cs := st.Counters()
	have := make(map[string]int)
	for i, c := range cs {
		have[c.Name] = i
	}
	for i, name := range []string{"conn_reset", "recv_drop_no_sock", "recv_drop_dead_sock", "recv_delivered", "recv_bytes_freed_fromsock", "ib_tx_cq_event"} {
		if _, ok := have[name]; !ok {
			t.Errorf("no counter %s", name)
		}
		_ = i
	}
	if cs[0].Name != "conn_reset" {
		t.Errorf("the first is %s, the kernel's is conn_reset", cs[0].Name)
	}
}
