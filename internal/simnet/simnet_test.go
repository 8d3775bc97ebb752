package simnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/packetio"
)

func TestMain(m *testing.M) { leak.Main(m) }

var (
	hostA = netip.MustParseAddrPort("10.0.0.1:4791")
	hostB = netip.MustParseAddrPort("10.0.0.2:4791")
)

func listen(t *testing.T, n *Net, a netip.AddrPort) packetio.Conn {
	t.Helper()
	c, err := n.Listen(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func train(to netip.AddrPort, segSize int, data []byte) packetio.TxTrain {
	return packetio.TxTrain{To: to, Segs: (len(data) + segSize - 1) / segSize, SegSize: segSize, Vec: [][]byte{data[:len(data)/2], data[len(data)/2:]}}
}

func send(t *testing.T, c packetio.Conn, ts ...packetio.TxTrain) {
	t.Helper()
	if n, err := c.Send(ts); n != len(ts) || err != nil {
		t.Fatalf("sent %d of %d trains: %v", n, len(ts), err)
	}
}

// drain receives all that is there.
func drain(t *testing.T, c packetio.Conn) (out [][]byte) {
	t.Helper()
	var ts [16]packetio.RxTrain
	for {
		n, err := c.Recv(ts[:])
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return out
		}
		for _, x := range ts[:n] {
			out = append(out, bytes.Clone(x.Data))
		}
	}
}

func TestDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Config{Link: LinkConfig{Delay: time.Millisecond}})
		defer n.Close()
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		if _, err := n.Listen(hostA); err == nil {
			t.Fatal("an address twice")
		}
		data := []byte("abcdefghij")
		send(t, a, train(hostB, 4, data))
		data[0] = 'X' // the packet was copied
		if got := drain(t, b); got != nil {
			t.Fatalf("arrived at once: %q", got)
		}
		begin := time.Now()
		if err := b.Wait(time.Time{}, false); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d < time.Millisecond || d > time.Millisecond+time.Microsecond {
			t.Errorf("first packet after %v", d)
		}
		time.Sleep(time.Microsecond)
		synctest.Wait()
		if got := fmt.Sprintf("%s", drain(t, b)); got != "[abcd efgh ij]" {
			t.Fatalf("got %s", got)
		}
	})
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Config{})
		defer n.Close()
		a := listen(t, n, hostA)
		begin := time.Now()
		if err := a.Wait(begin.Add(time.Second), false); err != nil || time.Since(begin) != time.Second {
			t.Fatalf("deadline: %v after %v", err, time.Since(begin))
		}
		a.Wake()
		if err := a.Wait(time.Time{}, false); err != nil {
			t.Fatalf("a wake before the wait is not lost: %v", err)
		}
		done := make(chan error)
		go func() { done <- a.Wait(time.Time{}, false) }()
		synctest.Wait()
		a.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("close: %v", err)
		}
	})
}

// TestFates sends ten thousand packets through each fault and looks at what came of them.
func TestFates(t *testing.T) {
	const count = 10_000
	near := func(got, want int) bool { return got > want*9/10-20 && got < want*11/10+20 }
	for _, tc := range []struct {
		name  string
		link  LinkConfig
		check func(t *testing.T, got [][]byte)
	}{
		{"none", LinkConfig{}, func(t *testing.T, got [][]byte) {
			for i, p := range got {
				if string(p) != fmt.Sprintf("%08d", i) {
					t.Fatalf("packet %d is %q", i, p)
				}
			}
			if len(got) != count {
				t.Errorf("%d arrived", len(got))
			}
		}},
		{"loss", LinkConfig{Loss: 0.2}, func(t *testing.T, got [][]byte) {
			if !near(len(got), count*8/10) {
				t.Errorf("%d of %d arrived at 20 %% loss", len(got), count)
			}
		}},
		{"dup", LinkConfig{Dup: 0.3}, func(t *testing.T, got [][]byte) {
			if !near(len(got), count*13/10) {
				t.Errorf("%d arrived of %d with 30 %% doubled", len(got), count)
			}
		}},
		{"corrupt", LinkConfig{Corrupt: 0.1}, func(t *testing.T, got [][]byte) {
			bad := 0
			for i, p := range got {
				diff := 0
				for k, x := range fmt.Appendf(nil, "%08d", i) {
					for d := x ^ p[k]; d != 0; d &= d - 1 {
						diff++
					}
				}
				if diff > 1 {
					t.Fatalf("%d bits changed", diff)
				}
				bad += diff
			}
			if !near(bad, count/10) {
				t.Errorf("%d corrupted", bad)
			}
		}},
		{"reorder", LinkConfig{Reorder: 0.1}, func(t *testing.T, got [][]byte) {
			late, last := 0, ""
			for _, p := range got {
				if string(p) < last {
					late++
				} else {
					last = string(p)
				}
			}
			if len(got) != count || late < count/100 {
				t.Errorf("%d arrived, %d of them late", len(got), late)
			}
		}},
		{"jitter alone keeps the order", LinkConfig{Delay: time.Millisecond, Jitter: time.Millisecond}, func(t *testing.T, got [][]byte) {
			for i, p := range got {
				if string(p) != fmt.Sprintf("%08d", i) {
					t.Fatalf("packet %d is %q", i, p)
				}
			}
		}},
		{"down", LinkConfig{Down: true}, func(t *testing.T, got [][]byte) {
			if len(got) != 0 {
				t.Errorf("%d arrived", len(got))
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := New(5, Config{RecvBuffer: 64 << 20})
				defer n.Close()
				a, b := listen(t, n, hostA), listen(t, n, hostB)
				n.SetLink(hostA.Addr(), hostB.Addr(), tc.link)
				for i := range count {
					send(t, a, train(hostB, 8, fmt.Appendf(nil, "%08d", i)))
					if i%100 == 0 {
						time.Sleep(10 * time.Microsecond)
					}
				}
				time.Sleep(time.Second)
				synctest.Wait()
				tc.check(t, drain(t, b))
			})
		})
	}
}

// TestDeterminism: the same seed gives the same trace to the nanosecond, another seed another.
func TestDeterminism(t *testing.T) {
	trace := func(seed uint64) *Recorder {
		rec := new(Recorder)
		synctest.Test(t, func(t *testing.T) {
			n := New(seed, Config{Link: LinkConfig{Loss: 0.1, Dup: 0.1, Corrupt: 0.1, Reorder: 0.1, Delay: time.Millisecond, Jitter: time.Millisecond}})
			defer n.Close()
			a, b := listen(t, n, hostA), listen(t, n, hostB)
			n.SetTap(rec.Record)
			for i := range 200 {
				send(t, a, train(hostB, 100, make([]byte, 250)))
				if i%3 == 0 {
					send(t, b, train(hostA, 50, make([]byte, 50)))
				}
				time.Sleep(time.Duration(i) * time.Microsecond)
			}
			time.Sleep(time.Second)
		})
		return rec
	}
	one := trace(1)
	if d := one.Diff(trace(1)); d != "" {
		t.Errorf("same seed: %s", d)
	}
	if one.Diff(trace(2)) == "" {
		t.Error("another seed gives the same trace")
	}
	if len(one.Lines()) < 1000 {
		t.Errorf("%d events", len(one.Lines()))
	}
}

func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Config{MTU: 1500, RecvBuffer: 10 * (1000 + recvOverhead), SendBuffer: 4000, Link: LinkConfig{RateBytesPerSec: 1 << 20}})
		defer n.Close()
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		if a.Caps().MTU != 1500 || a.PathMTU(hostB.Addr()) != 1500 {
			t.Errorf("MTU %d, path %d", a.Caps().MTU, a.PathMTU(hostB.Addr()))
		}
		a.Send([]packetio.TxTrain{train(hostB, 1473, make([]byte, 1473))})
		if n.Count(TooBig) != 1 {
			t.Errorf("%d packets above the MTU", n.Count(TooBig))
		}
		sent := 0
		for {
			k, err := a.Send([]packetio.TxTrain{train(hostB, 1000, make([]byte, 1000))})
			if sent += k; err == packetio.ErrWouldBlock {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if sent < 2 || sent > 5 {
			t.Errorf("%d kilobytes fit a send buffer of 4000 bytes", sent)
		}
		begin := time.Now()
		if err := a.Wait(time.Time{}, true); err != nil || time.Since(begin) == 0 {
			t.Errorf("wait for room: %v after %v", err, time.Since(begin))
		}
		for range 30 {
			for {
				if _, err := a.Send([]packetio.TxTrain{train(hostB, 1000, make([]byte, 1000))}); err == nil {
					break
				}
				a.Wait(time.Time{}, true)
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := len(drain(t, b)); got != 10 || b.Dropped() != uint64(sent+30-10) {
			t.Errorf("%d held, %d dropped of %d", got, b.Dropped(), sent+30)
		}
	})
}

func TestPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Config{})
		defer n.Close()
		a, b := listen(t, n, hostA), listen(t, n, hostB)
		one := func() int {
			send(t, a, train(hostB, 1, []byte{1}))
			send(t, b, train(hostA, 1, []byte{1}))
			time.Sleep(time.Millisecond)
			synctest.Wait()
			return len(drain(t, a)) + len(drain(t, b))
		}
		if one() != 2 {
			t.Error("not joined")
		}
		n.Partition(hostA.Addr(), hostB.Addr())
		if one() != 0 {
			t.Error("not parted")
		}
		n.Heal(hostA.Addr(), hostB.Addr())
		if one() != 2 {
			t.Error("not healed")
		}
	})
}

// TestRealTime: it works outside of a bubble too.
func TestRealTime(t *testing.T) {
	n := New(1, Config{GRO: true})
	defer n.Close()
	a, b := listen(t, n, hostA), listen(t, n, hostB)
	go a.Send([]packetio.TxTrain{train(hostB, 100, bytes.Repeat([]byte("x"), 1000))})
	total := 0
	for total < 1000 {
		if err := b.Wait(time.Now().Add(10*time.Second), false); err != nil {
			t.Fatal(err)
		}
		for _, p := range drain(t, b) {
			total += len(p)
		}
	}
}
