package conn

import (
	"bytes"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

// TestPingPongTraffic: a request and its answer are two SENDs, not four: acknowledgements travel with them.
func TestPingPongTraffic(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
			mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			var o testOwner
			const rounds = 1000
			ca, cb := a.conn(addrB), b.conn(addrA)
			for n := 1; n <= rounds; n++ {
				ca.Send(&o, 1, 2, []byte("request"))
				eventually(t, "request", time.Second, func() bool { return b.sink.len() == n })
				cb.Send(&o, 2, 1, []byte("answer"))
				eventually(t, "answer", time.Second, func() bool { return a.sink.len() == n })
			}
			for _, h := range []*host{a, b} {
				// A kernel's budget asks on every ninth, and its answer may not be there yet.
				if s := h.m.Stats(); s.SendSends > rounds+rounds/8+10 {
					t.Errorf("dialect %v: %v sent %d SENDs in %d rounds: %+v", dialect, h.addr, s.SendSends, rounds, s)
				}
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}

// TestStreamTraffic: a stream fills its SENDs, and is acknowledged about once for each of them.
func TestStreamTraffic(t *testing.T) {
	bubble(t, 1, simnet.Config{GRO: true, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, RateBytesPerSec: 1 << 30}}, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		const msgs = 100000
		p := make([]byte, 64)
		c := a.conn(addrB)
		for n := range msgs {
			if n-o.count() > 20000 {
				c.Flush()
				eventually(t, "room", time.Second, func() bool { return n-o.count() <= 10000 })
			}
			if err := c.Send(&o, 1, 2, p); err != nil {
				t.Fatal(err)
			}
		}
		c.Flush()
		eventually(t, "all arrives", 10*time.Second, func() bool { return o.count() == msgs })
		sa, sb := a.m.Stats(), b.m.Stats()
		full := msgs * 112 / 61440
		if sa.SendSends > uint64(2*full) {
			t.Errorf("%d SENDs for what fills %d", sa.SendSends, full)
		}
		if sb.IBAckSent > sa.SendSends+10 {
			t.Errorf("%d acknowledgements of %d SENDs", sb.IBAckSent, sa.SendSends)
		}
		t.Logf("%d SENDs (%d would be full), %d acknowledgement frames", sa.SendSends, full, sb.IBAckSent)
		a.close(time.Second)
		b.close(time.Second)
	})
}

func (o *testOwner) count() int { n, _ := o.get(); return n }

// TestMessagesDoNotAllocate: neither side, in the steady state.
func TestMessagesDoNotAllocate(t *testing.T) {
	bubble(t, 1, simnet.Config{}, func(t *testing.T, net *simnet.Net) {
		h := newHost(t, net, addrB)
		x := newInject(t, h)
		x.know(true, 5)
		h.sink.discard = true
		var o windowOwner
		c := x.c
		p := make([]byte, 64)
		var r released
		send := func() {
			for range 100 {
				if err := c.Send(&o, 1, 2, p); err != nil {
					t.Fatal(err)
				}
			}
			// What the transmitter and the peer would do.
			c.mu.Lock()
			for ok := true; ok; {
				if ok, _ = c.q.packRun(&c.sends[0], 1, true, false); ok {
					c.sends[0].Pieces[0].Chunk.Put() // as the link does
				}
			}
			c.q.ack(c.q.tail-1, &r)
			c.mu.Unlock()
			r.tell()
		}
		for range 100 {
			send()
		}
		if n := testing.AllocsPerRun(1000, send); n != 0 {
			t.Errorf("%v allocations for 100 messages sent", n)
		}
		// Receiving: one SEND of 100 messages.
		seq := uint64(1)
		var send1 []byte
		for range 100 {
			send1 = append(send1, msgBytes(seq, p, 0)...)
			seq++
		}
		recv := func() {
			c.rx.expected = 0 // the same SEND again
			x.recv(send1)
		}
		recv()
		// The test's own: a buffer and what holds it, the slice of SENDs, a closure.
		if n := testing.AllocsPerRun(100, recv); n > 4 {
			t.Errorf("%v allocations for 100 messages received", n)
		}
		x.end()
		h.close(0)
	})
}

// TestAckBeforePost: the peer acknowledges what is about to be sent, as it does with what it had on an earlier connection, between
// the moment when the SENDs are built and that when they are posted. Their memory stays what it was.
func TestAckBeforePost(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
			mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
			a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
			var o testOwner
			c := a.conn(addrB)
			if err := c.Send(&o, 1, 2, []byte("hello")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "acknowledged", 10*time.Second, func() bool { return o.count() == 1 })
			c.mu.Lock()
			c.txBusy = true // the test is the transmitter
			c.mu.Unlock()
			big := payload(1, 1, 5*pieceLen/2)
			for range 2 { // the end of the first shares a SEND with the second
				if err := c.Send(&o, 1, 2, big); err != nil {
					t.Fatal(err)
				}
			}
			c.mu.Lock()
			l, r := c.link, released{acked: true}
			for {
				built := c.build(l)
				if built.n == 0 {
					break
				}
				if c.q.next > c.q.una {
					c.ackedLocked(c.q.next-1, &r)
				}
				c.mu.Unlock()
				if _, err := l.Post(c.sends[:built.n]); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Millisecond) // slots become free
				c.mu.Lock()
			}
			c.transmitRounds()
			r.tell()
			if o.count() != 3 {
				t.Errorf("%d messages acknowledged", o.count())
			}
			eventually(t, "arrives", 10*time.Second, func() bool { return b.sink.len() == 3 })
			for _, got := range b.sink.take()[1:] {
				if !bytes.Equal(got.data, big) {
					t.Error("something else was sent")
				}
			}
			a.close(time.Second)
			b.close(time.Second)
		})
	}
}
