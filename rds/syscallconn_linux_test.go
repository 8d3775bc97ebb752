package rds

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// polled reports whether fd is readable now.
func polled(t *testing.T, fd uintptr) bool {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil {
		t.Fatal(err)
	}
	return p[0].Revents&unix.POLLIN != 0
}

// The descriptor is readable while there is something to read, whatever it is and whoever takes it.
func TestReadiness(t *testing.T) {
	a, b, _, tb := pair(t, Config{})
	mustWrite(t, a, []byte("before"), b.AddrPort())
	rc, err := b.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd uintptr
	if err := rc.Control(func(f uintptr) { fd = f }); err != nil {
		t.Fatal(err)
	}
	want := func(what string, readable bool) {
		t.Helper()
		for range 2 { // level-triggered
			if got := polled(t, fd); got != readable {
				t.Fatalf("%s: readable is %v", what, got)
			}
		}
	}
	want("what was there before", true)
	wantRead(t, b, []byte("before"), a.AddrPort())
	want("empty", false)
	for _, n := range []int{0, 10, 200000} {
		mustWrite(t, a, payload(n, 1), b.AddrPort())
		mustWrite(t, a, payload(n, 2), b.AddrPort())
		want("two datagrams", true)
		wantRead(t, b, payload(n, 1), a.AddrPort())
		want("one datagram", true)
		b.ReadMsg(nil, MsgPeek)
		want("after a peek", true)
		m, err := b.TryReceive()
		if err != nil {
			t.Fatal(err)
		}
		want("none", false)
		m.Release()
	}
	ms := []BatchMessage{{}, {}, {}}
	for range ms {
		mustWrite(t, a, []byte("x"), b.AddrPort())
	}
	b.ReadBatch(ms[:2], 0)
	want("part of a batch", true)
	b.ReadBatch(ms, 0)
	want("after a batch", false)

	// A completion.
	if err := b.Send(t.Context(), Message{Peer: a.AddrPort(), Notify: true}); err != nil {
		t.Fatal(err)
	}
	want("a completion", true)
	if _, err := b.TryReceive(); !errors.Is(err, ErrWouldBlock) {
		t.Error(err)
	}
	want("a completion, and no datagram", true)
	b.TryReadCompletion()
	want("the completion was read", false)

	// A port that refused a write clears: once, without a monitor.
	for _, monitor := range []bool{false, true} {
		if err := b.SetCongestionMonitor(monitor); err != nil {
			t.Fatal(err)
		}
		tb.SetCongested(addrA, 4000, true)
		if err := b.TrySend(Message{Peer: a.AddrPort()}); !errors.Is(err, ErrCongested) {
			t.Fatal(err)
		}
		want("congested", false)
		tb.SetCongested(addrA, 4000, false)
		want("cleared", true)
		if monitor {
			b.TryReceive()
			want("the monitor's news are for ReadCongestion", true)
			if mask := b.TryReadCongestion(); mask != 1<<(4000%64) {
				t.Errorf("mask %#x", mask)
			}
		} else if _, err := b.TryReceive(); !errors.Is(err, ErrWouldBlock) {
			t.Error(err)
		}
		want("looked", false)
	}

	// Close is something to see for whoever polls, and closes the descriptor after its users.
	if err := rc.Control(func(f uintptr) {
		b.Close()
		want("closed", true)
	}); err != nil {
		t.Error(err)
	}
	if err := rc.Control(func(uintptr) { t.Error("called with no descriptor") }); !errors.Is(err, ErrClosed) {
		t.Errorf("Control after Close: %v", err)
	}
	if _, err := b.SyscallConn(); err != nil && !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if _, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is still open: %v", err)
	}
}

// Edge-triggered, the descriptor has an event for what comes after a read that found nothing, whatever else is unread.
func TestReadinessEdge(t *testing.T) {
	a, b, _, tb := pair(t, Config{})
	rc, err := b.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ep)
	if err := rc.Control(func(fd uintptr) {
		err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET})
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := func(what string, event bool) {
		t.Helper()
		var evs [1]unix.EpollEvent
		n, err := unix.EpollWait(ep, evs[:], 0)
		if err != nil || (n == 1) != event {
			t.Fatalf("%s: %d events, %v", what, n, err)
		}
	}
	send := func() { mustWrite(t, a, []byte("x"), b.AddrPort()) }
	recv := func() {
		t.Helper()
		m, err := b.TryReceive()
		if err != nil {
			t.Fatal(err)
		}
		m.Release()
	}
	nothing := func() {
		t.Helper()
		if _, err := b.TryReceive(); !errors.Is(err, ErrWouldBlock) {
			t.Fatal(err)
		}
	}
	notify := func() {
		t.Helper()
		if err := b.Send(t.Context(), Message{Peer: a.AddrPort(), Notify: true}); err != nil {
			t.Fatal(err)
		}
	}
	want("nothing has come", false)
	send()
	want("a datagram", true)
	want("nothing more", false)
	recv()
	want("a read is no event", false)
	send()
	want("after a read that took all", true)
	recv()
	nothing()
	send()
	want("after a read that found nothing", true)
	send()
	recv()
	want("one of two was read", false)
	send()
	want("another after that", true)
	recv()
	recv()
	nothing()
	want("all were read", false)

	// Of one kind nothing is left, of another something is.
	notify()
	want("a completion", true)
	nothing()
	send()
	want("a datagram beside a completion", true)
	b.TryReadCompletion()
	if _, ok := b.TryReadCompletion(); ok {
		t.Error("a second completion")
	}
	notify()
	want("a completion beside a datagram", true)
	notify()
	want("a second completion, the first being unread", false)
	b.TryReadCompletion()
	b.TryReadCompletion()
	recv()
	tb.SetCongested(addrA, 4000, true)
	if err := b.TrySend(Message{Peer: a.AddrPort()}); !errors.Is(err, ErrCongested) {
		t.Fatal(err)
	}
	tb.SetCongested(addrA, 4000, false)
	want("news of congestion", true)
	send()
	want("a datagram beside news", true)
	recv()
	nothing()
	want("all were read", false)

	// A deliverer says so after a reader has taken what it brought.
	b.raise()
	want("there is nothing any more", false)
	if err := rc.Control(func(fd uintptr) {
		if polled(t, fd) {
			t.Error("readable with nothing there")
		}
	}); err != nil {
		t.Error(err)
	}
}

// RawConn's Read and Write wait for what they are named after, and no longer than the deadlines.
func TestRawConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ta, _ := pair(t, Config{SendBuffer: 100})
		rb, err := b.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		ra, err := a.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var got atomic.Int32
		for range 3 {
			wg.Go(func() {
				err := rb.Read(func(uintptr) bool {
					_, _, err := b.TryReadFromAddrPort(make([]byte, 100))
					return !errors.Is(err, ErrWouldBlock)
				})
				if err != nil {
					t.Error(err)
				}
				got.Add(1)
			})
		}
		synctest.Wait()
		for i := range int32(3) {
			mustWrite(t, a, []byte("x"), b.AddrPort())
			synctest.Wait()
			if n := got.Load(); n != i+1 {
				t.Errorf("%d reads ended after %d datagrams", n, i+1)
			}
		}
		wg.Wait()
		b.SetReadDeadline(time.Now().Add(time.Second))
		if err := rb.Read(func(uintptr) bool { return false }); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read until the deadline: %v", err)
		}

		ta.withhold = true
		mustWrite(t, a, make([]byte, 100), b.AddrPort())
		wg.Go(func() {
			calls := 0
			err := ra.Write(func(uintptr) bool { calls++; return calls == 3 })
			if err != nil || calls != 3 {
				t.Errorf("Write: %d calls, %v", calls, err)
			}
		})
		synctest.Wait()
		start := time.Now()
		ta.ack(-1)
		wg.Wait()
		if d := time.Since(start); d != 2*rawConnRetry {
			t.Errorf("called again at once, though nothing has changed: three calls in %v", d)
		}
		mustWrite(t, a, make([]byte, 100), b.AddrPort())
		a.SetWriteDeadline(time.Now().Add(time.Second))
		if err := ra.Write(func(uintptr) bool { t.Error("called without room"); return true }); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, ErrNoBufferSpace) {
			t.Errorf("Write until the deadline: %v", err)
		}
		wg.Go(func() {
			b.SetReadDeadline(time.Time{})
			if err := rb.Read(func(uintptr) bool { return false }); !errors.Is(err, ErrClosed) {
				t.Errorf("Close under a Read: %v", err)
			}
		})
		synctest.Wait()
		b.Close()
		wg.Wait()
	})
}

// A settle does not miss a datagram that a reader moves from one end of the queue to the other while it looks.
func TestReadinessMove(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	mustWrite(t, a, []byte("x"), b.AddrPort())
	q := &b.q
	q.inMu.Lock()
	seen := make(chan bool)
	go func() { seen <- q.some() }()
	time.Sleep(10 * time.Millisecond) // who looks at the ends in the wrong order is between them now
	q.readMu.Lock()
	q.out, q.in, q.inTail = q.in, nil, nil
	q.readMu.Unlock()
	q.inMu.Unlock()
	if !<-seen {
		t.Error("the datagram was not seen at either end")
	}
	wantRead(t, b, []byte("x"), a.AddrPort())
}

// Readers that see their datagrams through the descriptor alone leave none behind, whoever of them reads, and whoever settles
// meanwhile what others have just changed.
func TestReadinessReaders(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	rc, err := b.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const readers, rounds, burst = 3, 1000, 3
	var n atomic.Int32
	var end atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end.Store(true)
	for range readers {
		wg.Go(func() {
			p := make([]byte, 10)
			if err := rc.Control(func(fd uintptr) {
				for !end.Load() {
					pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
					if k, _ := unix.Poll(pfd, 1); k != 1 {
						continue
					}
					if _, _, err := b.TryReadFromAddrPort(p); err == nil {
						n.Add(1)
					} else if !errors.Is(err, ErrWouldBlock) {
						t.Error(err)
						return
					}
				}
			}); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range int32(rounds) {
		for range burst {
			mustWrite(t, a, []byte("x"), b.AddrPort())
		}
		for limit := time.Now().Add(10 * time.Second); n.Load() < (i+1)*burst; time.Sleep(10 * time.Microsecond) {
			if time.Now().After(limit) {
				t.Fatalf("%d datagrams were read, %d sent, and the descriptor is not readable", n.Load(), (i+1)*burst)
			}
		}
	}
}

// An event loop that sees its datagrams through the descriptor alone misses none, whoever delivers them.
func TestReadinessStorm(t *testing.T) {
	a, b, _, _ := pair(t, Config{})
	rc, err := b.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const writers, each = 4, 3000
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for i := range each {
				mustWrite(t, a, []byte("x"), b.AddrPort())
				if i%100 == 0 {
					time.Sleep(50 * time.Microsecond)
				}
			}
		})
	}
	p := make([]byte, 10)
	for n, waits := 0, 0; n < writers*each; {
		if err := rc.Control(func(fd uintptr) {
			pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			for {
				k, err := unix.Poll(pfd, 10_000)
				if err == unix.EINTR {
					continue
				}
				if k != 1 || err != nil {
					t.Fatalf("after %d datagrams nothing for 10 s: %v, %d in the queue", n, err, b.q.bytes.Load())
				}
				return
			}
		}); err != nil {
			t.Fatal(err)
		}
		waits++
		for {
			_, _, err := b.TryReadFromAddrPort(p)
			if errors.Is(err, ErrWouldBlock) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
	}
	wg.Wait()
}
