// Package rdstest tests what programs expect of reliable datagrams: that a net.PacketConn delivers every datagram
// once, whole, and in the order of each sender, between any number of peers, and that deadlines and Close do what package net says.
// golang.org/x/net/nettest does the same for streams.
//
// Whoever wraps a *rds.Socket (to encrypt, to count, to shape) runs it over the wrapper:
//
//	rdstest.TestPacketConn(t, func(n int) ([]net.PacketConn, func(), error) { ... })
package rdstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// MakeConns makes n endpoints that all reach each other by the addresses that their LocalAddr gives. stop ends
// them and what is below, and fails the test itself if something is left; it is called once, after some or all of the
// endpoints were closed.
type MakeConns func(n int) (conns []net.PacketConn, stop func(), err error)

// MaxSize is the longest datagram that every implementation carries.
const MaxSize = 1 << 20

// patience is how long anything may take before it counts as lost.
const patience = 60 * time.Second

// TestPacketConn runs the suite. Its cases run one after the other, each on endpoints of its own; each logs its seed. The
// implementation must deliver what was accepted: a case that writes more than buffers hold also reads.
func TestPacketConn(t *testing.T, mk MakeConns) {
	for _, c := range []struct {
		name string
		n    int
		run  func(*env)
	}{
		{"BasicIO", 2, testBasicIO},
		{"Boundaries", 2, testBoundaries},
		{"ShortBuffer", 2, testShortBuffer},
		{"Order", 2, testOrder},
		{"MultiPeerOrder", 4, testMultiPeerOrder},
		{"FanIn", 6, testFanIn},
		{"FanOut", 6, testFanOut},
		{"SlowReader", 3, testSlowReader},
		{"PingPong", 2, testPingPong},
		{"PastDeadline", 2, testPastDeadline},
		{"PresentDeadline", 2, testPresentDeadline},
		{"FutureDeadline", 2, testFutureDeadline},
		{"DeadlineStorm", 2, testDeadlineStorm},
		{"Close", 2, testClose},
		{"CloseStorm", 4, testCloseStorm},
		{"ConcurrentMethods", 2, testConcurrentMethods},
		{"Addresses", 3, testAddresses},
	} {
		t.Run(c.name, func(t *testing.T) {
			conns, stop, err := mk(c.n)
			if err != nil {
				t.Fatalf("making %d endpoints: %v", c.n, err)
			}
			defer stop()
			seed := new(maphash.Hash).Sum64()
			t.Logf("seed %#x", seed)
			c.run(&env{T: t, conns: conns, seed: seed, rand: rand.New(rand.NewPCG(seed, 1))})
		})
	}
}

// env is what a case works with.
type env struct {
	*testing.T
	conns []net.PacketConn
	seed  uint64
	rand  *rand.Rand
}

// Datagrams say who sent them and how many he sent before; the rest of their content follows from that, so a reader
// knows what each must look like.
const header = 16

// fill makes p datagram seq of flow.
func (e *env) fill(p []byte, flow, seq int) []byte {
	if len(p) < header {
		return p
	}
	binary.LittleEndian.PutUint64(p, uint64(flow))
	binary.LittleEndian.PutUint64(p[8:], uint64(seq))
	x := e.seed ^ uint64(flow)*0x9e3779b97f4a7c15 ^ uint64(seq)*0xbf58476d1ce4e5b9 | 1
	for i := header; i < len(p); i++ {
		x = x*6364136223846793005 + 1442695040888963407
		p[i] = byte(x >> 56)
	}
	return p
}

// size of datagram seq of flow: most are small, some of every length up to limit.
func (e *env) size(flow, seq, limit int) int {
	r := rand.New(rand.NewPCG(e.seed, uint64(flow)<<32|uint64(seq)))
	return header + r.IntN(1<<(1+r.IntN(bits(limit-header))))
}

func bits(n int) int {
	b := 0
	for ; n > 1; n >>= 1 {
		b++
	}
	return max(b, 1)
}

// check reports what is wrong with datagram p of flow, whose next should be seq.
func (e *env) check(p []byte, flow, seq, want int) error {
	if len(p) != want {
		return fmt.Errorf("flow %d: datagram %d has %d bytes, not %d", flow, seq, len(p), want)
	}
	if got := int(binary.LittleEndian.Uint64(p[8:])); got != seq {
		return fmt.Errorf("flow %d: datagram %d where %d should come", flow, got, seq)
	}
	exp := e.fill(make([]byte, want), flow, seq)
	for i := range p {
		if p[i] != exp[i] {
			return fmt.Errorf("flow %d, datagram %d: byte %d of %d is %#x, not %#x", flow, seq, i, want, p[i], exp[i])
		}
	}
	return nil
}

// send writes count datagrams of up to limit bytes from c to addr as flow.
func (e *env) send(c net.PacketConn, addr net.Addr, flow, count, limit int) error {
	buf := make([]byte, limit)
	for seq := range count {
		p := e.fill(buf[:e.size(flow, seq, limit)], flow, seq)
		if n, err := c.WriteTo(p, addr); err != nil || n != len(p) {
			return fmt.Errorf("flow %d: writing datagram %d of %d bytes: %d, %w", flow, seq, len(p), n, err)
		}
	}
	return nil
}

// receive reads from c until each of the flows has brought count datagrams, and holds them to order and content. from
// gives the sender of a flow.
func (e *env) receive(c net.PacketConn, flows map[int]net.Addr, count, limit int) error {
	buf := make([]byte, limit)
	next := make(map[int]int, len(flows))
	for range count * len(flows) {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("after %v: %w", next, err)
		}
		if n < header {
			return fmt.Errorf("a datagram of %d bytes", n)
		}
		flow := int(binary.LittleEndian.Uint64(buf))
		want, ok := flows[flow]
		if !ok {
			return fmt.Errorf("a datagram of flow %d", flow)
		}
		if from.String() != want.String() {
			return fmt.Errorf("flow %d comes from %v, not %v", flow, from, want)
		}
		if err := e.check(buf[:n], flow, next[flow], e.size(flow, next[flow], limit)); err != nil {
			return err
		}
		next[flow]++
	}
	return e.silent(c)
}

// silent reports a datagram that nobody sent, or that came twice.
func (e *env) silent(c net.PacketConn) error {
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
		return err
	}
	buf := make([]byte, MaxSize)
	n, from, err := c.ReadFrom(buf)
	if err == nil {
		return fmt.Errorf("one datagram too many: %d bytes from %v", n, from)
	}
	if !isTimeout(err) {
		return fmt.Errorf("reading past the last datagram: %w", err)
	}
	return c.SetReadDeadline(time.Now().Add(patience))
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout() && errors.Is(err, os.ErrDeadlineExceeded)
}

// group runs functions beside each other and reports what they return.
type group struct {
	e  *env
	wg sync.WaitGroup
}

func (g *group) goes(what string, f func() error) {
	g.wg.Go(func() {
		if err := f(); err != nil {
			g.e.Errorf("%s: %v", what, err)
		}
	})
}

func (e *env) patient() {
	for _, c := range e.conns {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			e.Fatal(err)
		}
	}
}

func testBasicIO(e *env) {
	e.patient()
	a, b := e.conns[0], e.conns[1]
	want := []byte("hello")
	if n, err := a.WriteTo(want, b.LocalAddr()); n != len(want) || err != nil {
		e.Fatalf("write: %d, %v", n, err)
	}
	buf := make([]byte, 64)
	n, from, err := b.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "hello" || from.String() != a.LocalAddr().String() {
		e.Fatalf("read: %q from %v, %v", buf[:n], from, err)
	}
	// What the caller does with its buffer afterwards changes nothing.
	if _, err := b.WriteTo(want, from); err != nil {
		e.Fatal(err)
	}
	copy(want, "xxxxx")
	if n, _, err := a.ReadFrom(buf); err != nil || string(buf[:n]) != "hello" {
		e.Fatalf("answer: %q, %v", buf[:n], err)
	}
	if err := e.silent(b); err != nil {
		e.Error(err)
	}
}

// Every length around the places where implementations cut comes through as it is, empty ones included.
func testBoundaries(e *env) {
	e.patient()
	a, b := e.conns[0], e.conns[1]
	var sizes []int
	for _, k := range []int{0, 1, 48, 256, 1024, 1400, 4048, 4096, 8192, 61440, 65535, 131072, MaxSize} {
		for _, d := range []int{-49, -48, -1, 0, 1} {
			if s := k + d; s >= 0 && s <= MaxSize {
				sizes = append(sizes, s)
			}
		}
	}
	var g group
	g.e = e
	g.goes("writer", func() error {
		for i, s := range sizes {
			p := e.fill(make([]byte, s), 0, i)
			if n, err := a.WriteTo(p, b.LocalAddr()); n != s || err != nil {
				return fmt.Errorf("%d bytes: %d, %w", s, n, err)
			}
		}
		return nil
	})
	g.goes("reader", func() error {
		buf := make([]byte, MaxSize)
		for i, s := range sizes {
			n, _, err := b.ReadFrom(buf)
			if err != nil || n != s {
				return fmt.Errorf("datagram %d: %d bytes, not %d, %w", i, n, s, err)
			}
			if s >= header {
				if err := e.check(buf[:n], 0, i, s); err != nil {
					return err
				}
			}
		}
		return nil
	})
	g.wg.Wait()
	if n, err := a.WriteTo(make([]byte, MaxSize+1), b.LocalAddr()); err == nil || n != 0 {
		e.Errorf("a datagram longer than MaxSize is refused: %d, %v", n, err)
	}
	if err := e.silent(b); err != nil {
		e.Error(err)
	}
}

// A datagram longer than the buffer is cut, says so, and takes nothing of the next one with it.
func testShortBuffer(e *env) {
	e.patient()
	a, b := e.conns[0], e.conns[1]
	for _, s := range []string{"0123456789", "next"} {
		if _, err := a.WriteTo([]byte(s), b.LocalAddr()); err != nil {
			e.Fatal(err)
		}
	}
	buf := make([]byte, 4)
	n, from, err := b.ReadFrom(buf)
	if n != 4 || string(buf) != "0123" || from.String() != a.LocalAddr().String() || !errors.Is(err, io.ErrShortBuffer) {
		e.Errorf("cut: %q from %v, %v; want io.ErrShortBuffer", buf[:n], from, err)
	}
	if n, _, err := b.ReadFrom(buf); err != nil || string(buf[:n]) != "next" {
		e.Errorf("after it: %q, %v", buf[:n], err)
	}
}

func testOrder(e *env) {
	e.patient()
	a, b := e.conns[0], e.conns[1]
	var g group
	g.e = e
	g.goes("writer", func() error { return e.send(a, b.LocalAddr(), 0, 3000, 8192) })
	g.goes("reader", func() error { return e.receive(b, map[int]net.Addr{0: a.LocalAddr()}, 3000, 8192) })
	g.wg.Wait()
}

// Everybody writes to everybody at once: each pair has its order.
func testMultiPeerOrder(e *env) {
	e.patient()
	const count, limit = 400, 64 << 10
	k := len(e.conns)
	var g group
	g.e = e
	for i, c := range e.conns {
		flows := map[int]net.Addr{}
		for j, d := range e.conns {
			if i == j {
				continue
			}
			flows[j*k+i] = d.LocalAddr()
			g.goes("writer", func() error { return e.send(c, d.LocalAddr(), i*k+j, count, limit) })
		}
		g.goes("reader", func() error { return e.receive(c, flows, count, limit) })
	}
	g.wg.Wait()
}

func testFanIn(e *env) {
	e.patient()
	const count, limit = 800, 16 << 10
	sink := e.conns[0]
	flows := map[int]net.Addr{}
	var g group
	g.e = e
	for i, c := range e.conns[1:] {
		flows[i] = c.LocalAddr()
		g.goes("writer", func() error { return e.send(c, sink.LocalAddr(), i, count, limit) })
	}
	g.goes("reader", func() error { return e.receive(sink, flows, count, limit) })
	g.wg.Wait()
}

// One endpoint writes to all the others in turn, from one goroutine.
func testFanOut(e *env) {
	e.patient()
	const count, limit = 800, 16 << 10
	src := e.conns[0]
	var g group
	g.e = e
	g.goes("writer", func() error {
		buf := make([]byte, limit)
		for seq := range count {
			for i, c := range e.conns[1:] {
				p := e.fill(buf[:e.size(i, seq, limit)], i, seq)
				if _, err := src.WriteTo(p, c.LocalAddr()); err != nil {
					return fmt.Errorf("datagram %d to %d: %w", seq, i, err)
				}
			}
		}
		return nil
	})
	for i, c := range e.conns[1:] {
		g.goes("reader", func() error { return e.receive(c, map[int]net.Addr{i: src.LocalAddr()}, count, limit) })
	}
	g.wg.Wait()
}

// A reader that does not read holds up who writes to it, and nobody else; nothing of what was accepted is lost.
func testSlowReader(e *env) {
	e.patient()
	a, slow, quick := e.conns[0], e.conns[1], e.conns[2]
	const size, most = 64 << 10, 1 << 14 // 1 GiB: no implementation buffers that
	p := make([]byte, size)
	accepted := 0
	for ; accepted < most; accepted++ {
		if err := a.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			e.Fatal(err)
		}
		if _, err := a.WriteTo(e.fill(p, 0, accepted), slow.LocalAddr()); err != nil {
			if !isTimeout(err) {
				e.Fatalf("datagram %d: %v", accepted, err)
			}
			break
		}
	}
	if accepted == most {
		e.Fatalf("%d datagrams of %d bytes were accepted and none read", most, size)
	}
	if err := a.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		e.Fatal(err)
	}
	var g group
	g.e = e
	g.goes("slow reader", func() error {
		buf := make([]byte, size)
		for i := range accepted {
			n, _, err := slow.ReadFrom(buf)
			if err != nil {
				return fmt.Errorf("datagram %d of %d: %w", i, accepted, err)
			}
			if err := e.check(buf[:n], 0, i, size); err != nil {
				return err
			}
		}
		return e.silent(slow)
	})
	g.goes("quick reader", func() error {
		return e.receive(quick, map[int]net.Addr{1: a.LocalAddr()}, 100, 4096)
	})
	g.goes("writer", func() error { return e.send(a, quick.LocalAddr(), 1, 100, 4096) })
	g.wg.Wait()
}

func testPingPong(e *env) {
	e.patient()
	var g group
	g.e = e
	for i, c := range e.conns[:2] {
		other := e.conns[1-i].LocalAddr()
		g.goes("player", func() error {
			buf := make([]byte, 256)
			for seq := range 500 {
				if i == 0 {
					if _, err := c.WriteTo(e.fill(buf[:64], 0, seq), other); err != nil {
						return err
					}
				}
				n, _, err := c.ReadFrom(buf)
				if err != nil {
					return err
				}
				if err := e.check(buf[:n], 0, seq, 64); err != nil {
					return err
				}
				if i == 1 {
					if _, err := c.WriteTo(buf[:n], other); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	g.wg.Wait()
}

var aLongTimeAgo = time.Unix(233431200, 0)

// A deadline in the past fails reads at once, with or without something to read, until it is moved.
func testPastDeadline(e *env) {
	a, b := e.conns[0], e.conns[1]
	if err := b.SetReadDeadline(aLongTimeAgo); err != nil {
		e.Fatal(err)
	}
	buf := make([]byte, 16)
	for range 10 {
		if n, _, err := b.ReadFrom(buf); n != 0 || !isTimeout(err) {
			e.Fatalf("read: %d, %v", n, err)
		}
	}
	if err := a.SetWriteDeadline(aLongTimeAgo); err != nil {
		e.Fatal(err)
	}
	if n, err := a.WriteTo(buf, b.LocalAddr()); n != 0 || !isTimeout(err) {
		e.Errorf("write: %d, %v", n, err)
	}
	e.resync(a, b)
}

// resync sees that both directions work after deadlines were played with.
func (e *env) resync(a, b net.PacketConn) {
	e.Helper()
	for _, c := range []net.PacketConn{a, b} {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			e.Fatal(err)
		}
	}
	buf := make([]byte, 2048)
	for i, pair := range [][2]net.PacketConn{{a, b}, {b, a}} {
		if _, err := pair[0].WriteTo(e.fill(buf[:32], i, 7), pair[1].LocalAddr()); err != nil {
			e.Fatalf("resync: %v", err)
		}
		for {
			n, _, err := pair[1].ReadFrom(buf)
			if err != nil {
				e.Fatalf("resync: %v", err)
			}
			if n == 32 && e.check(buf[:n], i, 7, 32) == nil {
				break
			}
		}
	}
}

// A deadline that is set while a read waits ends that read.
func testPresentDeadline(e *env) {
	a, b := e.conns[0], e.conns[1]
	var g group
	g.e = e
	for range 3 {
		g.goes("reader", func() error {
			if n, _, err := b.ReadFrom(make([]byte, 16)); n != 0 || !isTimeout(err) {
				return fmt.Errorf("%d, %w", n, err)
			}
			return nil
		})
	}
	time.Sleep(20 * time.Millisecond)
	if err := b.SetReadDeadline(time.Now()); err != nil {
		e.Fatal(err)
	}
	g.wg.Wait()
	e.resync(a, b)
}

func testFutureDeadline(e *env) {
	a, b := e.conns[0], e.conns[1]
	start := time.Now()
	if err := b.SetReadDeadline(start.Add(50 * time.Millisecond)); err != nil {
		e.Fatal(err)
	}
	if _, _, err := b.ReadFrom(make([]byte, 16)); !isTimeout(err) {
		e.Errorf("read: %v", err)
	}
	if d := time.Since(start); d < 50*time.Millisecond {
		e.Errorf("the read ended after %v", d)
	}
	e.resync(a, b)
}

// Deadlines that are moved all the time lose and double nothing.
func testDeadlineStorm(e *env) {
	const count, limit = 2000, 2048
	a, b := e.conns[0], e.conns[1]
	var g group
	g.e = e
	stop := make(chan struct{})
	for i, c := range []net.PacketConn{a, b} {
		r := rand.New(rand.NewPCG(e.seed, uint64(i)+10))
		g.goes("storm", func() error {
			for {
				select {
				case <-stop:
					return c.SetDeadline(time.Time{})
				default:
				}
				at := time.Now().Add(time.Duration(r.IntN(2000)-1000) * time.Microsecond)
				set := c.SetReadDeadline
				if i == 0 {
					set = c.SetWriteDeadline
				}
				if err := set(at); err != nil {
					return err
				}
				time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
			}
		})
	}
	g.goes("writer", func() error {
		buf := make([]byte, limit)
		for seq := 0; seq < count; {
			p := e.fill(buf[:e.size(0, seq, limit)], 0, seq)
			n, err := a.WriteTo(p, b.LocalAddr())
			switch {
			case err == nil && n == len(p):
				seq++
			case n != 0 || !isTimeout(err):
				return fmt.Errorf("datagram %d: %d, %w", seq, n, err)
			}
		}
		return nil
	})
	g.goes("reader", func() error {
		defer close(stop)
		buf := make([]byte, limit)
		for seq := 0; seq < count; {
			n, _, err := b.ReadFrom(buf)
			switch {
			case err == nil:
				if err := e.check(buf[:n], 0, seq, e.size(0, seq, limit)); err != nil {
					return err
				}
				seq++
			case n != 0 || !isTimeout(err):
				return fmt.Errorf("datagram %d: %d, %w", seq, n, err)
			}
		}
		return nil
	})
	g.wg.Wait()
	if !e.Failed() {
		if err := e.silent(b); err != nil {
			e.Error(err)
		}
	}
}

// Close ends who is blocked, and everything after it fails the same way.
func testClose(e *env) {
	a, b := e.conns[0], e.conns[1]
	to := a.LocalAddr()
	var g group
	g.e = e
	for range 3 {
		g.goes("reader", func() error {
			if _, _, err := b.ReadFrom(make([]byte, 16)); !errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("blocked read: %w", err)
			}
			return nil
		})
	}
	time.Sleep(10 * time.Millisecond)
	if err := b.Close(); err != nil {
		e.Errorf("close: %v", err)
	}
	g.wg.Wait()
	if _, _, err := b.ReadFrom(make([]byte, 16)); !errors.Is(err, net.ErrClosed) {
		e.Errorf("read: %v", err)
	}
	if _, err := b.WriteTo([]byte("x"), to); !errors.Is(err, net.ErrClosed) {
		e.Errorf("write: %v", err)
	}
	if err := b.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
		e.Errorf("set deadline: %v", err)
	}
}

// Endpoints that are closed while everybody writes and reads: nobody hangs, panics, or sees another error than what it is.
func testCloseStorm(e *env) {
	e.patient()
	var g group
	g.e = e
	var sent atomic.Int64
	for i, c := range e.conns {
		g.goes("writer", func() error {
			p := make([]byte, 512)
			for seq := 0; ; seq++ {
				to := e.conns[(i+1+seq)%len(e.conns)]
				if to == c {
					continue
				}
				if err := c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond)); errors.Is(err, net.ErrClosed) {
					return nil
				}
				_, err := c.WriteTo(p, to.LocalAddr())
				switch {
				case errors.Is(err, net.ErrClosed):
					return nil
				case err != nil && !isTimeout(err):
					return err
				}
				sent.Add(1)
			}
		})
		for range 2 {
			g.goes("reader", func() error {
				buf := make([]byte, 512)
				for {
					n, _, err := c.ReadFrom(buf)
					if errors.Is(err, net.ErrClosed) {
						return nil
					}
					if err != nil || n != 512 {
						return fmt.Errorf("%d bytes, %w", n, err)
					}
				}
			})
		}
		wait := time.Duration(20+e.rand.IntN(100)) * time.Millisecond
		g.goes("closer", func() error {
			time.Sleep(wait)
			err := make(chan error, 3)
			for range 3 {
				go func() { err <- c.Close() }()
			}
			for range 3 {
				if err := <-err; err != nil && !errors.Is(err, net.ErrClosed) {
					return err
				}
			}
			return nil
		})
	}
	g.wg.Wait()
	if sent.Load() == 0 {
		e.Error("nothing was sent")
	}
}

// All methods at once: for the race detector.
func testConcurrentMethods(e *env) {
	a, b := e.conns[0], e.conns[1]
	var wg sync.WaitGroup
	for range 50 {
		for _, f := range []func(){
			func() { _ = a.SetDeadline(time.Now().Add(10 * time.Millisecond)) },
			func() { _ = a.SetReadDeadline(time.Now().Add(10 * time.Millisecond)) },
			func() { _ = a.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)) },
			func() { _, _ = a.WriteTo(make([]byte, 100), b.LocalAddr()) },
			func() { _, _, _ = a.ReadFrom(make([]byte, 100)) },
			func() { _ = a.LocalAddr().String() },
		} {
			wg.Go(f)
		}
	}
	wg.Wait()
	e.resync(a, b)
}

// Addresses are what peers see, differ, and have a network.
func testAddresses(e *env) {
	e.patient()
	seen := map[string]bool{}
	for _, c := range e.conns {
		a := c.LocalAddr()
		if a == nil || a.String() == "" || a.Network() == "" || seen[a.String()] {
			e.Errorf("address %v", a)
		}
		seen[a.String()] = true
	}
	for i, c := range e.conns {
		to := e.conns[(i+1)%len(e.conns)]
		if _, err := c.WriteTo([]byte("who am I"), to.LocalAddr()); err != nil {
			e.Fatal(err)
		}
		_, from, err := to.ReadFrom(make([]byte, 16))
		if err != nil || from.String() != c.LocalAddr().String() || from.Network() != c.LocalAddr().Network() {
			e.Errorf("from %v, not %v: %v", from, c.LocalAddr(), err)
		}
	}
	// The address of a datagram is where the answer goes.
	if _, err := e.conns[0].WriteTo([]byte("q"), e.conns[1].LocalAddr()); err != nil {
		e.Fatal(err)
	}
	buf := make([]byte, 4)
	_, from, err := e.conns[1].ReadFrom(buf)
	if err != nil {
		e.Fatal(err)
	}
	if _, err := e.conns[1].WriteTo([]byte("a"), from); err != nil {
		e.Fatal(err)
	}
	if n, _, err := e.conns[0].ReadFrom(buf); err != nil || string(buf[:n]) != "a" {
		e.Errorf("answer: %q, %v", buf[:n], err)
	}
}
