package conn

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

// stream is what one socket sends to another host: numbered messages of random sizes.
type stream struct {
	port  uint16
	next  uint64
	rng   *rand.Rand
	owner testOwner
	sent  int
}

var testSizes = []int{8, 8, 9, 64, 64, 64, 100, 1000, 4095, 4096, 4097, 8000, 20000, 61392, 61393, 65536, 200000}

func (s *stream) send(t testing.TB, c *Conn, n int) {
	t.Helper()
	for range n {
		size := testSizes[s.rng.IntN(len(testSizes))]
		if err := c.Send(&s.owner, s.port, s.port, payload(s.port, s.next, size)); err != nil {
			t.Fatal(err)
		}
		s.next++
		s.sent++
	}
}

// checkStreams verifies that every stream arrived exactly once, in order, with its content.
func checkStreams(t testing.TB, got []gotMsg, streams ...*stream) {
	t.Helper()
	next := make(map[uint16]uint64)
	var last uint64
	for _, m := range got {
		n := binary.BigEndian.Uint64(m.data)
		if want := next[m.dport]; n != want {
			t.Fatalf("port %d: message %d arrived when %d was due (%d lost, or twice)", m.dport, n, want, int64(n-want))
		}
		next[m.dport]++
		if !bytes.Equal(m.data, payload(m.sport, n, len(m.data))) {
			t.Fatalf("port %d: message %d of %d bytes arrived changed", m.dport, n, len(m.data))
		}
		if m.seq <= last {
			t.Fatalf("sequence %d after %d", m.seq, last)
		}
		last = m.seq
	}
	for _, s := range streams {
		if next[s.port] != s.next {
			t.Fatalf("port %d: %d of %d messages arrived", s.port, next[s.port], s.next)
		}
	}
}

func TestFaults(t *testing.T) {
	type faults struct {
		name string
		link simnet.LinkConfig
		msgs int
	}
	delay := 50 * time.Microsecond
	for _, f := range []faults{
		{"clean", simnet.LinkConfig{Delay: delay}, 600},
		{"loss 1 %", simnet.LinkConfig{Delay: delay, Loss: 0.01}, 400},
		{"loss 5 %", simnet.LinkConfig{Delay: delay, Loss: 0.05}, 200},
		{"loss 20 %", simnet.LinkConfig{Delay: delay, Loss: 0.2}, 100},
		{"reorder", simnet.LinkConfig{Delay: delay, Reorder: 0.1, ReorderBy: 300 * time.Microsecond}, 300},
		{"duplicates", simnet.LinkConfig{Delay: delay, Dup: 0.2}, 300},
		{"corruption", simnet.LinkConfig{Delay: delay, Corrupt: 0.02}, 300},
		{"everything", simnet.LinkConfig{Delay: delay, Jitter: 50 * time.Microsecond, Loss: 0.02, Dup: 0.02, Corrupt: 0.02, Reorder: 0.02}, 300},
	} {
		for _, dialect := range []string{"open", "kernel"} {
			t.Run(f.name+"/"+dialect, func(t *testing.T) {
				bubble(t, 7, simnet.Config{Link: f.link}, func(t *testing.T, net *simnet.Net) {
					var mods []func(*hostOptions)
					if dialect == "kernel" {
						mods = append(mods, func(o *hostOptions) { o.cfg.Dialect = DialectKernelOnly })
					}
					a, b := newHost(t, net, addrA, mods...), newHost(t, net, addrB, mods...)
					rng := rand.New(rand.NewPCG(1, 2))
					s1 := &stream{port: 4001, rng: rng}
					s2 := &stream{port: 4002, rng: rng}
					s3 := &stream{port: 4003, rng: rng} // the other way
					for left := f.msgs; left > 0; {
						n := min(left, 1+rng.IntN(50))
						s1.send(t, a.conn(addrB), n)
						s2.send(t, a.conn(addrB), n)
						s3.send(t, b.conn(addrA), n)
						left -= n
						time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
					}
					eventually(t, "everything arrives", 10*time.Minute, func() bool {
						return b.sink.len() >= s1.sent+s2.sent && a.sink.len() >= s3.sent
					})
					for _, s := range []*stream{s1, s2, s3} {
						eventually(t, "everything is acknowledged", time.Minute, func() bool { n, _ := s.owner.get(); return n == s.sent })
					}
					checkStreams(t, b.sink.take(), s1, s2)
					checkStreams(t, a.sink.take(), s3)
					st := a.m.Stats()
					t.Logf("resets %d, attempts %d, retransmitted %d, old %d, bad csum %d", st.ConnReset, st.ConnectAttempts, st.SendRetransmit,
						b.m.Stats().RecvDropOldSeq, b.m.Stats().RecvDropBadChecksum)
					a.close(time.Second)
					b.close(time.Second)
				})
			})
		}
	}
}
