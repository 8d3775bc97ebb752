package rds

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/openrds/openrds/internal/invariants"
)

const allocDatagrams = 100_000

func skipIfInstrumented(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget things")
	}
	if invariants.Enabled {
		t.Skip("invariants keep stacks, on the heap")
	}
}

// wantNoAllocs calls f, which moves per datagrams, until allocDatagrams have been moved. A few allocations are
// nobody's: the collector empties pools, and an engine going to sleep may allocate.
func wantNoAllocs(t *testing.T, what string, per int, few float64, f func()) {
	t.Helper()
	skipIfInstrumented(t)
	if n := testing.AllocsPerRun(1, func() {
		for range allocDatagrams / per {
			f()
		}
	}); n > few {
		t.Errorf("%s: %.0f allocations for %d datagrams", what, n, allocDatagrams)
	}
}

func TestNoAllocs(t *testing.T) {
	svc, s := openNull(t)
	p := make([]byte, 64)
	to := ap(addrB, 4000)
	wantNoAllocs(t, "WriteToAddrPort", 1, 10, func() {
		if _, err := s.WriteToAddrPort(p, to); err != nil {
			t.Fatal(err)
		}
	})
	ctx := context.Background()
	wantNoAllocs(t, "Send", 1, 10, func() {
		if err := s.Send(ctx, Message{Peer: to, Data: p}); err != nil {
			t.Fatal(err)
		}
	})
	peer := svc.peerOf(addrA, addrB)
	ms := batch64(4000)
	wantNoAllocs(t, "ReadFromAddrPort", len(ms), 10, func() {
		svc.deliver(peer, 0, ms, maxInt64)
		for range ms {
			if _, _, err := s.ReadFromAddrPort(p); err != nil {
				t.Fatal(err)
			}
		}
	})
	wantNoAllocs(t, "ReadFrom", len(ms), 10, func() {
		svc.deliver(peer, 0, ms, maxInt64)
		for range ms {
			if _, _, err := s.ReadFrom(p); err != nil {
				t.Fatal(err)
			}
		}
	})
	wantNoAllocs(t, "Receive", len(ms), 10, func() {
		svc.deliver(peer, 0, ms, maxInt64)
		for range ms {
			m, err := s.Receive(ctx)
			if err != nil {
				t.Fatal(err)
			}
			m.Release()
		}
	})
	in := make([]BatchMessage, len(ms))
	for i := range in {
		in[i].Buffers = [][]byte{make([]byte, 64)}
	}
	wantNoAllocs(t, "ReadBatch", len(ms), 10, func() {
		svc.deliver(peer, 0, ms, maxInt64)
		if n, err := s.ReadBatch(in, 0); n != len(ms) || err != nil {
			t.Fatal(n, err)
		}
	})
	out := make([]BatchMessage, 64)
	for i := range out {
		out[i] = BatchMessage{Buffers: [][]byte{p}, Addr: to}
	}
	wantNoAllocs(t, "WriteBatch", len(out), 10, func() {
		if n, err := s.WriteBatch(out, 0); n != len(out) || err != nil {
			t.Fatal(n, err)
		}
	})
	wantNoAllocs(t, "TryReadFromAddrPort", 2, 10, func() {
		svc.deliver(peer, 0, ms[:1], maxInt64)
		if _, _, err := s.TryReadFromAddrPort(p); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.TryReadFromAddrPort(p); !errors.Is(err, ErrWouldBlock) {
			t.Fatal(err)
		}
	})
	wantNoAllocs(t, "TryWriteToAddrPort", 1, 10, func() {
		if _, err := s.TryWriteToAddrPort(p, to); err != nil {
			t.Fatal(err)
		}
	})
	wantNoAllocs(t, "TrySend", 1, 10, func() {
		if err := s.TrySend(Message{Peer: to, Data: p}); err != nil {
			t.Fatal(err)
		}
	})
	if err := s.ConnectAddrPort(to); err != nil {
		t.Fatal(err)
	}
	wantNoAllocs(t, "Write", 1, 10, func() {
		if _, err := s.Write(p); err != nil {
			t.Fatal(err)
		}
	})
	var toAddr net.Addr = AddrFromAddrPort(to)
	wantNoAllocs(t, "WriteTo", 1, 10, func() {
		if _, err := s.WriteTo(p, toAddr); err != nil {
			t.Fatal(err)
		}
	})
	wantNoAllocs(t, "TryReceive", 2, 10, func() {
		svc.deliver(peer, 0, ms[:1], maxInt64)
		m, err := s.TryReceive()
		if err != nil {
			t.Fatal(err)
		}
		m.Release()
		if _, err := s.TryReceive(); !errors.Is(err, ErrWouldBlock) {
			t.Fatal(err)
		}
	})
	wantNoAllocs(t, "ReadMsg", 2, 10, func() {
		svc.deliver(peer, 0, ms[:1], maxInt64)
		for _, f := range []Flags{MsgPeek, 0} {
			if _, _, _, err := s.ReadMsg(p, f); err != nil {
				t.Fatal(err)
			}
		}
	})
	if err := s.SetTimestamps(true); err != nil {
		t.Fatal(err)
	}
	wantNoAllocs(t, "Receive with a time", len(ms), 10, func() {
		svc.deliver(peer, 0, ms, maxInt64)
		for range ms {
			m, err := s.Receive(ctx)
			if err != nil {
				t.Fatal(err)
			}
			m.Release()
		}
	})
	s.SetTimestamps(false)
	drained(s)
	second := ap(addrB.Next(), 4000)
	wantNoAllocs(t, "WriteToAddrPort to a second host", 1, 10, func() {
		if _, err := s.WriteToAddrPort(p, second); err != nil {
			t.Fatal(err)
		}
	})
	drained(s)
	big := batch64(4000)
	for i := range big {
		big[i].Len, big[i].First.Data = 100000, make([]byte, 100000)
	}
	q := make([]byte, 100000)
	wantNoAllocs(t, "ReadFromAddrPort of 100 kB", 100, 10, func() {
		svc.deliver(peer, 0, big[:4], maxInt64)
		for range 4 {
			if _, _, err := s.ReadFromAddrPort(q); err != nil {
				t.Fatal(err)
			}
		}
	})
}
