package rds

import (
	"bytes"
	"context"
	"io"
	"testing"

	"pgregory.net/rapid"

	"github.com/openrds/openrds/conn"
)

// The receive queue against its naive twin: a slice of datagrams. Whatever is delivered comes out once, in order, with its
// content; lent content stays; and the port is congested exactly when the specification says
// (rds-protocol spec 2.7).
func TestReceiveQueueModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := newFakeNet()
		svc := newService(Config{MaxLentBytes: 3 * blockSize, HoldTime: -1})
		svc.tr = &fakeTransport{net: n, svc: svc}
		s := bind(t, svc, ap(addrA, 4000))
		var (
			queue     [][]byte
			held      []*Message
			content   [][]byte // of held
			congested bool
			rcvbuf    = DefaultBuffer
			seed      byte
		)
		settle := func() {
			var sum, charge int
			for _, p := range queue {
				sum += len(p)
				charge += int(chargeOf(len(p)))
			}
			if sum > rcvbuf || charge > 2*rcvbuf+chargeSlack {
				congested = true
			} else if (sum < rcvbuf/2 || sum == 0) && charge < rcvbuf+chargeSlack/2 {
				congested = false
			}
			if got := s.q.congested.Load(); got != congested {
				rt.Fatalf("congested %v with %d bytes in %d messages, receive buffer %d", got, sum, len(queue), rcvbuf)
			}
		}
		length := rapid.OneOf(rapid.IntRange(0, 100), rapid.IntRange(copyMax-2, copyMax+2), rapid.IntRange(0, 3*blockSize))
		rt.Repeat(map[string]func(*rapid.T){
			"deliver": func(rt *rapid.T) {
				var ms []conn.Incoming
				for _, size := range rapid.SliceOfN(length, 1, 8).Draw(rt, "sizes") {
					seed++
					p := payload(size, seed)
					m := conn.Incoming{SrcPort: 7, DstPort: 4000, Len: size}
					// In up to three pieces, as a long one arrives.
					cut := rapid.IntRange(0, size).Draw(rt, "cut")
					m.First.Data = p[:cut]
					m.More = []conn.Frag{{Data: p[cut : cut+(size-cut)/2]}, {Data: p[cut+(size-cut)/2:]}}
					ms = append(ms, m)
					queue = append(queue, p)
				}
				if k := svc.deliver(svc.peerOf(addrA, addrB), 0, ms, maxInt64); k != len(ms) {
					rt.Fatalf("took %d of %d", k, len(ms))
				}
				settle()
			},
			"read": func(rt *rapid.T) {
				if len(queue) == 0 {
					rt.Skip()
				}
				p := make([]byte, length.Draw(rt, "buffer"))
				want := queue[0]
				queue = queue[1:]
				k, from, err := s.ReadFromAddrPort(p)
				if (err != nil) != (len(want) > len(p)) || from != ap(addrB, 7) || !bytes.Equal(p[:k], want[:min(len(want), len(p))]) {
					rt.Fatalf("read %d bytes of %d into %d from %v: %v", k, len(want), len(p), from, err)
				}
				if err != nil && err.(*OpError).Err != io.ErrShortBuffer {
					rt.Fatal(err)
				}
				settle()
			},
			"receive": func(rt *rapid.T) {
				if len(queue) == 0 {
					rt.Skip()
				}
				m, err := s.Receive(context.Background())
				if err != nil || !bytes.Equal(bytes.Join(m.Buffers(), nil), queue[0]) {
					rt.Fatalf("received %d bytes of %d: %v", m.Len(), len(queue[0]), err)
				}
				held, content = append(held, m), append(content, queue[0])
				queue = queue[1:]
				settle()
			},
			"release": func(rt *rapid.T) {
				if len(held) == 0 {
					rt.Skip()
				}
				i := rapid.IntRange(0, len(held)-1).Draw(rt, "which")
				if !bytes.Equal(held[i].Bytes(), content[i]) {
					rt.Fatal("a lent message changed")
				}
				held[i].Release()
				held, content = append(held[:i], held[i+1:]...), append(content[:i], content[i+1:]...)
			},
			"buffer": func(rt *rapid.T) {
				rcvbuf = rapid.OneOf(rapid.IntRange(1, 500), rapid.IntRange(1, 1<<20)).Draw(rt, "rcvbuf")
				if err := s.SetReadBuffer(rcvbuf); err != nil {
					rt.Fatal(err)
				}
				settle()
			},
			"": func(rt *rapid.T) {
				if s.lentBytes.Load() > 3*blockSize || int(s.loans.Load()) != len(held) {
					rt.Fatalf("%d loans of %d bytes, %d held", s.loans.Load(), s.lentBytes.Load(), len(held))
				}
			},
		})
		for i, m := range held {
			if !bytes.Equal(m.Bytes(), content[i]) {
				rt.Fatal("a lent message changed")
			}
			m.Release()
		}
		if err := svc.Close(); err != nil {
			rt.Fatal(err)
		}
		p := svc.peerOf(addrA, addrB)
		if q := p.queued.Load(); q != 0 || s.q.bytes.Load() != 0 || s.q.charge.Load() != 0 || s.lentBytes.Load() != 0 || s.loans.Load() != 0 {
			rt.Fatalf("left: peer %d, bytes %d, charge %d, lent %d, loans %d", q, s.q.bytes.Load(), s.q.charge.Load(), s.lentBytes.Load(), s.loans.Load())
		}
	})
}
