package simnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/packetio"
)

// settle lets everything that is under way arrive.
func settle() {
	time.Sleep(time.Minute)
	synctest.Wait()
}

func TestListen(t *testing.T) {
	n := ForTest(t, 1, Config{})
	a := listen(t, n, hostA)
	if a.LocalAddr() != hostA {
		t.Errorf("bound to %v, want %v", a.LocalAddr(), hostA)
	}
	_, err := n.Listen(hostA)
	var op *net.OpError
	if !errors.Is(err, syscall.EADDRINUSE) || !errors.As(err, &op) || op.Addr.String() != hostA.String() {
		t.Errorf("an address in use: %v", err)
	}
	if _, err := n.Listen(netip.MustParseAddrPort("[::ffff:10.0.0.1]:4791")); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the same address mapped to IPv6: %v", err)
	}
	if _, err := n.Listen(netip.MustParseAddrPort("0.0.0.0:1")); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("no address: %v", err)
	}
	p := listen(t, n, netip.AddrPortFrom(hostA.Addr(), 0))
	q := listen(t, n, netip.AddrPortFrom(hostA.Addr(), 0))
	if p.LocalAddr().Port() == 0 || p.LocalAddr() == q.LocalAddr() {
		t.Errorf("port 0 gave %v and %v", p.LocalAddr(), q.LocalAddr())
	}
	a.Close()
	a.Close()
	listen(t, n, hostA) // free again
	n.Close()
	n.Close()
	if _, err := n.Listen(hostB); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen on a closed network: %v", err)
	}
}

func TestClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Config{})
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		send(t, a, train(hostB, 1, []byte{1}))
		waits := make(chan error, 2)
		for _, c := range []packetio.Conn{a, listen(t, n, netip.MustParseAddrPort("10.0.0.3:1"))} {
			go func() { waits <- c.Wait(time.Time{}, false) }()
		}
		synctest.Wait()
		n.Close()
		for range 2 {
			if err := <-waits; !errors.Is(err, net.ErrClosed) {
				t.Errorf("Wait when the network closes: %v", err)
			}
		}
		settle()
		if _, err := b.Recv(make([]packetio.RxTrain, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Recv: %v", err)
		}
		if _, err := a.Send([]packetio.TxTrain{train(hostB, 1, []byte{1})}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Send: %v", err)
		}
		if n.Count(Delivered) != 0 || n.Pending() != 0 {
			t.Errorf("%d delivered, %d pending after Close", n.Count(Delivered), n.Pending())
		}
	})
}

func TestBadTrains(t *testing.T) {
	n := ForTest(t, 1, Config{NoGSO: true})
	gso := ForTest(t, 1, Config{})
	one := func(size int) [][]byte { return [][]byte{make([]byte, size)} }
	for _, tc := range []struct {
		name string
		net  *Net
		t    packetio.TxTrain
	}{
		{"two datagrams without GSO", n, packetio.TxTrain{To: hostB, Segs: 2, SegSize: 10, Vec: one(20)}},
		{"more bytes than segments", gso, packetio.TxTrain{To: hostB, Segs: 2, SegSize: 10, Vec: one(21)}},
		{"an empty last segment", gso, packetio.TxTrain{To: hostB, Segs: 3, SegSize: 10, Vec: one(20)}},
		{"too many segments", gso, packetio.TxTrain{To: hostB, Segs: 65, SegSize: 1, Vec: one(65)}},
		{"too many bytes", gso, packetio.TxTrain{To: hostB, Segs: 1, Vec: one(packetio.MaxTrainBytes + 1)}},
		{"another family", gso, packetio.TxTrain{To: netip.MustParseAddrPort("[fd00::1]:1"), Segs: 1, Vec: one(1)}},
		{"port 0", gso, packetio.TxTrain{To: netip.MustParseAddrPort("10.0.0.2:0"), Segs: 1, Vec: one(1)}},
		{"no address", gso, packetio.TxTrain{Segs: 1, Vec: one(1)}},
	} {
		c := listen(t, tc.net, netip.AddrPortFrom(hostA.Addr(), 0))
		// The good one in front goes out, and the error is about the one behind it.
		k, err := c.Send([]packetio.TxTrain{train(hostB, 10, make([]byte, 10)), tc.t})
		if k != 1 || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: sent %d, %v; want 1 and EINVAL", tc.name, k, err)
		}
	}
}

// TestGRO: datagrams of a train arrive as a train, as far as fate lets them, and never joined across
// sizes, sources or types of service.
func TestGRO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := ForTest(t, 1, Config{GRO: true})
		a, b, c := listen(t, n, hostA), listen(t, n, hostB), listen(t, n, netip.MustParseAddrPort("10.0.0.3:7"))
		data := []byte("aaaabbbbccccdd")
		marked := train(hostB, 4, data[:8])
		marked.TOS = 8
		send(t, a, train(hostB, 4, data), train(hostB, 4, data[:8]), marked)
		send(t, c, train(hostB, 4, data[:4]))
		settle()
		ts := make([]packetio.RxTrain, 16)
		k, err := b.Recv(ts)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range ts[:k] {
			got = append(got, fmt.Sprintf("%v/%d/%d %s", x.From.Addr(), x.SegSize, x.TOS, x.Data))
		}
		want := []string{
			"10.0.0.1/4/0 aaaabbbbccccdd", // the short one ends it
			"10.0.0.1/4/0 aaaabbbb",
			"10.0.0.1/4/8 aaaabbbb",
			"10.0.0.3/4/0 aaaa",
		}
		if !slices.Equal(got, want) {
			t.Errorf("received %q\nwant %q", got, want)
		}

		n.SetFilter(func(e Event) bool { return bytes.Equal(e.Data, []byte("bbbb")) })
		send(t, a, train(hostB, 4, data[:12]))
		settle()
		if k, _ := b.Recv(ts); k != 1 || string(ts[0].Data) != "aaaacccc" {
			t.Errorf("a train with a hole: %d, %q", k, ts[0].Data)
		}
	})
}

// TestLent: what Recv lent is overwritten by the next Recv, and not before.
func TestLent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := ForTest(t, 1, Config{})
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		send(t, a, train(hostB, 3, []byte("one")), train(hostB, 3, []byte("two")))
		settle()
		ts := make([]packetio.RxTrain, 1)
		b.Recv(ts)
		lent := ts[0].Data
		send(t, a, train(hostB, 3, []byte("six")))
		settle()
		if string(lent) != "one" {
			t.Errorf("lent memory became %q before the next Recv", lent)
		}
		b.Recv(ts)
		if string(lent) != "\xdb\xdb\xdb" || string(ts[0].Data) != "two" {
			t.Errorf("after the next Recv: %q lent before, %q now", lent, ts[0].Data)
		}
	})
}

// TestOneAtATime: packets sent at the same moment arrive at different ones, and what an arrival
// sets off is done before the next.
func TestOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := ForTest(t, 1, Config{Link: LinkConfig{Delay: time.Millisecond, Dup: 0.5}})
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		var at []time.Duration
		n.SetTap(func(e Event) {
			if e.Kind == Delivered {
				at = append(at, e.At)
			}
		})
		for range 50 {
			send(t, a, train(hostB, 1, []byte{1}))
			send(t, b, train(hostA, 1, []byte{1}))
		}
		settle()
		if len(at) <= 100 {
			t.Fatalf("%d deliveries of 100 packets, half of them doubled", len(at))
		}
		for i := 1; i < len(at); i++ {
			if at[i] <= at[i-1] {
				t.Fatalf("deliveries %d and %d at %v and %v", i-1, i, at[i-1], at[i])
			}
		}
		if at[0] != time.Millisecond {
			t.Errorf("the first at %v, want 1 ms", at[0])
		}
	})
}

// TestFateIsPerLink: traffic elsewhere changes nothing about which packets of a link are lost.
func TestFateIsPerLink(t *testing.T) {
	lost := func(others int) (ns []uint64) {
		synctest.Test(t, func(t *testing.T) {
			n := ForTest(t, 77, Config{Link: LinkConfig{Loss: 0.3}})
			a, b := listen(t, n, hostA), listen(t, n, hostB)
			n.SetTap(func(e Event) {
				if e.Kind == Lost && e.From == hostA {
					ns = append(ns, e.N)
				}
			})
			for range 200 {
				for range others {
					send(t, b, train(hostA, 1, []byte{1}))
				}
				send(t, a, train(hostB, 1, []byte{1}))
			}
			settle()
		})
		return ns
	}
	alone, beside := lost(0), lost(3)
	if !slices.Equal(alone, beside) {
		t.Errorf("lost alone %v\nbeside others %v", alone, beside)
	}
	if len(alone) < 40 || len(alone) > 80 {
		t.Errorf("%d of 200 lost at 30 %%", len(alone))
	}
}

func TestDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := ForTest(t, 1, Config{MTU: 9000, Capacity: 5})
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		big := train(hostB, 2000, make([]byte, 2000))
		expect := func(what string, k Kind, want uint64, arrived int) {
			t.Helper()
			settle()
			if got := n.Count(k); got != want {
				t.Errorf("%s: %d %v, want %d", what, got, k, want)
			}
			if got := len(drain(t, b)); got != arrived {
				t.Errorf("%s: %d arrived, want %d", what, got, arrived)
			}
		}
		n.SetLink(hostA.Addr(), hostB.Addr(), LinkConfig{MTU: 2027})
		send(t, a, big)
		expect("a smaller MTU on the way, one byte too many", TooBig, 1, 0)
		n.SetLink(hostA.Addr(), hostB.Addr(), LinkConfig{MTU: 2028})
		send(t, a, big)
		expect("a smaller MTU on the way, just so", TooBig, 1, 1)

		// 10 ms a packet of 2028 bytes: one leaving and one waiting.
		n.SetLink(hostA.Addr(), hostB.Addr(), LinkConfig{RateBytesPerSec: 202800, QueueBytes: 4056})
		send(t, a, big, big, big)
		expect("a queue for two", QueueFull, 1, 2)
		begin := n.now()
		var last time.Duration
		n.SetTap(func(e Event) { last = e.At - begin })
		send(t, a, big, big)
		expect("a queue that has emptied", QueueFull, 1, 2)
		n.SetTap(nil)
		if last != 20*time.Millisecond+1 { // and the 1 ns that every packet travels
			t.Errorf("the second packet of a link of 100 packets/s came after %v", last)
		}

		n.SetLink(hostA.Addr(), hostB.Addr(), LinkConfig{Delay: time.Second})
		for range 7 {
			send(t, a, big)
		}
		expect("seven packets, capacity for five", QueueFull, 3, 5)

		send(t, a, train(netip.AddrPortFrom(hostB.Addr(), 9), 1, []byte{1}))
		expect("nobody there", Unreachable, 1, 0)
		send(t, a, train(hostB, 1, []byte{1}), big)
		b.Close()
		settle()
		if got := n.Count(Unreachable); got != 3 {
			t.Errorf("%d unreachable after the receiver closed, want 3", got)
		}
	})
}

// TestWakeAndArrivals: one Wake ends one Wait; while waiting for room to send arrivals do not count.
func TestWakeAndArrivals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := ForTest(t, 1, Config{SendBuffer: 1000, Link: LinkConfig{RateBytesPerSec: 1000}})
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		took := func(deadline time.Duration, write bool) time.Duration {
			t.Helper()
			begin := time.Now()
			if err := b.Wait(begin.Add(deadline), write); err != nil {
				t.Fatal(err)
			}
			return time.Since(begin)
		}
		b.Wake()
		b.Wake()
		if d := took(time.Second, false); d != 0 {
			t.Errorf("Wait after Wake took %v", d)
		}
		if d := took(time.Second, false); d != time.Second {
			t.Errorf("Wait after that took %v: one Wait answers all Wakes before it", d)
		}
		go func() {
			time.Sleep(100 * time.Millisecond)
			b.Wake()
		}()
		if d := took(time.Second, false); d != 100*time.Millisecond {
			t.Errorf("Wait during which Wake came took %v", d)
		}

		send(t, a, train(hostB, 72, make([]byte, 72))) // 100 bytes with headers: 0.1 s
		send(t, b, train(hostA, 972, make([]byte, 972)))
		if k, err := b.Send([]packetio.TxTrain{train(hostA, 72, make([]byte, 72))}); k != 0 || err != packetio.ErrWouldBlock {
			t.Fatalf("a full send buffer: %d, %v", k, err)
		}
		if d := took(10*time.Second, true); d != time.Second {
			t.Errorf("room to send after %v, want the second that the first train takes", d)
		}
		if d := took(time.Second, false); d != 0 {
			t.Errorf("what arrived meanwhile was noticed after %v", d)
		}
		if d := took(-time.Second, false); d != 0 {
			t.Errorf("a deadline in the past: %v", d)
		}
	})
}

type fakeTB struct {
	testing.TB
	cleanup []func()
	log     string
}

func (f *fakeTB) Helper()           {}
func (f *fakeTB) Cleanup(fn func()) { f.cleanup = append(f.cleanup, fn) }
func (f *fakeTB) Failed() bool      { return true }
func (f *fakeTB) Logf(format string, args ...any) {
	f.log += fmt.Sprintf(format, args...)
}

func TestSeedIsPrinted(t *testing.T) {
	var f fakeTB
	n := ForTest(&f, 4711, Config{})
	for _, fn := range f.cleanup {
		fn()
	}
	if f.log != "simnet seed 4711 (0x1267)" || n.Seed() != 4711 {
		t.Errorf("a failed test printed %q", f.log)
	}
	if _, err := n.Listen(hostA); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the network of a finished test: %v", err)
	}
}

func TestRecorder(t *testing.T) {
	var a, b Recorder
	e := Event{Kind: Delivered, At: 1500 * time.Nanosecond, N: 3, From: hostA, To: hostB, Data: []byte("123456789")}
	a.Record(e)
	b.Record(e)
	if d := a.Diff(&b); d != "" {
		t.Errorf("equal traces differ: %s", d)
	}
	if want := "1.5µs          10.0.0.1:4791 > 10.0.0.2:4791 #3 delivered len 9 tos 0 crc cbf43926"; a.String() != want {
		t.Errorf("trace %q\nwant  %q", a.String(), want)
	}
	e.Kind = Lost
	b.Record(e)
	if d := a.Diff(&b); d != "event 1 of 1 and 2:\n  (end)\n  "+e.String() {
		t.Errorf("a longer trace: %q", d)
	}
}
