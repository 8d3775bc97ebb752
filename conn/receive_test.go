package conn

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// inject is a connection whose link is not connected: the test plays the receive handler.
type inject struct {
	t testing.TB
	h *host
	c *Conn
	l *ib.Link
}

// newInject makes a connection in state connecting whose peer is not known yet.
func newInject(t testing.TB, h *host) *inject {
	x := &inject{t: t, h: h, c: h.conn(addrA)}
	x.start()
	return x
}

func (x *inject) start() {
	x.t.Helper()
	if !x.c.state.move(Down, Connecting) {
		x.t.Fatal(x.c.State())
	}
	ctx, end := x.c.begin(new(request), time.Hour)
	defer end()
	l, err := x.c.newLink(ctx, ibdev.Large)
	if err != nil {
		x.t.Fatal(err)
	}
	x.l = l
}

// know tells who the peer is.
func (x *inject) know(open bool, inc uint64) {
	x.l.InRecv(func() {
		if err := x.c.know(x.l, open, &rdshdr.Mark{Incarnation: inc}); err != nil {
			x.t.Error(err)
		}
	})
}

// recv is a received SEND and the end of a batch.
func (x *inject) recv(sends ...[]byte) {
	x.t.Helper()
	x.l.InRecv(func() {
		for _, s := range sends {
			c, err := x.h.slab.Alloc(max(len(s), 1))
			if err != nil {
				x.t.Fatal(err)
			}
			copy(c.Bytes(), s)
			x.c.RecvSend(x.l, ibdev.NewRecvBuf(c, len(s)), len(s))
		}
		x.c.BatchEnd(x.l, true)
	})
}

// end shuts the connection down.
func (x *inject) end() {
	x.t.Helper()
	x.l.Fail(errors.New("end of test"))
	x.c.mu.Lock()
	x.c.ctl.attempt = nil
	x.c.mu.Unlock()
	x.c.state.move(Connecting, Error)
	x.c.shutdown()
}

func (x *inject) dead() bool { return x.l.Broken() }

func injected(t *testing.T, fn func(t *testing.T, x *inject)) {
	t.Helper()
	bubble(t, 1, simnet.Config{}, func(t *testing.T, net *simnet.Net) {
		h := newHost(t, net, addrB)
		x := newInject(t, h)
		fn(t, x)
		x.end()
		h.close(0)
	})
}

// run puts messages and fragments into one SEND.
func run(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func msgBytes(seq uint64, p []byte, flags uint8) []byte {
	return append(header(seq, 0, len(p), 9, 10, flags), p...)
}

func TestReceivePacked(t *testing.T) {
	injected(t, func(t *testing.T, x *inject) {
		x.know(true, 5)
		big := payload(1, 1, 100000)
		congested := make([]byte, 8192)
		congested[77>>3] = 1 << (77 & 7)
		x.recv(
			run(msgBytes(10, []byte("a"), 0), msgBytes(11, nil, 0), append(header(12, 0, len(big), 9, 10, 0), big[:50000]...)),
			run(append(header(12, 0, len(big), 9, 10, 2), big[50000:90000]...)),
			run(append(header(0, 0, 8192, 0, 0, 1), congested...)), // a map does not wait for the end of a message
			run(append(header(12, 0, len(big), 9, 10, 2), big[90000:]...), msgBytes(13, []byte("b"), 0)),
		)
		got := x.h.sink.take()
		if len(got) != 4 || string(got[0].data) != "a" || len(got[1].data) != 0 || !bytes.Equal(got[2].data, big) || string(got[3].data) != "b" {
			t.Fatalf("%d messages", len(got))
		}
		if !x.c.PeerCongested(77) || x.c.PeerCongested(78) {
			t.Error("the map in the middle was not taken")
		}
		for i, m := range got {
			if m.seq != 10+uint64(i) {
				t.Errorf("message %d has sequence %d", i, m.seq)
			}
		}
		// Between two of ours what is below the expected sequence is old, flag or not.
		x.recv(run(msgBytes(12, []byte("old"), 0), msgBytes(13, []byte("old"), rdshdr.FlagRetransmitted), msgBytes(14, []byte("new"), 0), msgBytes(20, []byte("gap"), 0)))
		got = x.h.sink.take()
		if len(got) != 2 || string(got[0].data) != "new" || string(got[1].data) != "gap" {
			t.Fatalf("%+v", got)
		}
		if s := x.h.m.Stats(); s.RecvDropOldSeq != 2 || s.RecvSeqGap != 1 {
			t.Errorf("%d old, %d gaps", s.RecvDropOldSeq, s.RecvSeqGap)
		}
		if x.dead() {
			t.Error("link broken")
		}
	})
}

// TestReceiveRules: what one of ours may not send.
func TestReceiveRules(t *testing.T) {
	full := make([]byte, 61392)
	for name, bad := range map[string][][]byte{
		"a few bytes behind a message":      {run(msgBytes(1, []byte("a"), 0), []byte("xxx"))},
		"a small fragment":                  {append(header(1, 0, 8192, 9, 10, 0), full[:4095]...)},
		"another message in the middle":     {append(header(1, 0, 8192, 9, 10, 0), full[:4096]...), msgBytes(2, []byte("x"), 0)},
		"a second header with bad checksum": {run(msgBytes(1, []byte("a"), 0), bytes.Repeat([]byte{0x77}, 48))},
		"a message of 2 MiB":                {append(header(1, 0, 2<<20, 9, 10, 0), full...)},
		"nothing":                           {{}},
	} {
		t.Run(name, func(t *testing.T) {
			injected(t, func(t *testing.T, x *inject) {
				x.know(true, 5)
				x.recv(bad...)
				if !x.dead() {
					t.Error("the connection stays up")
				}
				for _, m := range x.h.sink.take() {
					if m.seq != 1 || string(m.data) != "a" {
						t.Errorf("message %d delivered", m.seq)
					}
				}
				if s := x.h.m.Stats(); s.RecvBadFragment+s.RecvDropBadChecksum != 1 {
					t.Errorf("counted %d times", s.RecvBadFragment+s.RecvDropBadChecksum)
				}
				// What still comes is dropped.
				x.recv(msgBytes(7, []byte("x"), 0))
				if x.h.sink.len() > 1 {
					t.Error("delivered after the connection was lost")
				}
			})
		})
	}
}

// TestEarlySends: SENDs that arrive before our own handshake has returned are kept, and taken apart by the dialect that it brings.
func TestEarlySends(t *testing.T) {
	injected(t, func(t *testing.T, x *inject) {
		x.recv(run(msgBytes(5, []byte("a"), 0), msgBytes(6, []byte("b"), 0)))
		x.recv(run(msgBytes(7, []byte("c"), 0)))
		if x.h.sink.len() != 0 {
			t.Fatal("delivered before the peer is known")
		}
		x.know(true, 9)
		if got := x.h.sink.take(); len(got) != 3 || string(got[2].data) != "c" {
			t.Errorf("%d delivered", len(got))
		}
		x.end()
		// The same peer: it goes on where it was.
		x.start()
		x.recv(run(msgBytes(7, []byte("c"), 0), msgBytes(8, []byte("d"), 0)))
		x.know(true, 9)
		if got := x.h.sink.take(); len(got) != 1 || string(got[0].data) != "d" {
			t.Errorf("%+v delivered", got)
		}
		x.end()
		// Another process at the same address: anything goes.
		x.start()
		x.recv(run(msgBytes(3, []byte("e"), rdshdr.FlagRetransmitted)))
		x.know(true, 10)
		if got := x.h.sink.take(); len(got) != 1 || string(got[0].data) != "e" {
			t.Errorf("%+v delivered", got)
		}
		x.end()
		// A kernel would never pack.
		x.start()
		x.recv(run(msgBytes(5, []byte("a"), 0), msgBytes(6, []byte("b"), 0)))
		x.know(false, 0)
		if !x.dead() {
			t.Error("a kernel that packs is believed")
		}
		x.end()
		// There is a bound.
		x.start()
		for range maxEarly + 1 {
			x.recv(msgBytes(5, []byte("a"), 0))
		}
		if !x.dead() || x.h.m.Stats().RecvEarlyDropped != 1 {
			t.Error("no bound on early SENDs")
		}
	})
}

// TestRefusalInTheMiddle: what the Sink does not take has not been received.
func TestRefusalInTheMiddle(t *testing.T) {
	injected(t, func(t *testing.T, x *inject) {
		x.know(true, 5)
		x.h.sink.accept = func(c *Conn, m *Incoming) bool { return m.Seq != 13 }
		x.recv(run(msgBytes(10, []byte("a"), 0), msgBytes(11, nil, 0)), run(msgBytes(12, nil, 0), msgBytes(13, nil, 0), msgBytes(14, nil, 2)), msgBytes(15, nil, 0))
		if !x.dead() {
			t.Error("connection stays up")
		}
		if x.c.rx.expected != 13 || x.c.ackNext != 12 {
			t.Errorf("expected %d, acknowledged %d", x.c.rx.expected, x.c.ackNext)
		}
		if n := len(x.h.sink.take()); n != 3 {
			t.Errorf("%d delivered", n)
		}
		x.end()
		x.h.sink.accept = nil
		x.start()
		x.know(true, 5)
		x.recv(run(msgBytes(13, []byte("x"), 4), msgBytes(14, nil, 4)))
		if got := x.h.sink.take(); len(got) != 2 || got[0].seq != 13 {
			t.Errorf("%+v", got)
		}
	})
}

// TestPongWithoutPing is delivered: a socket may have bound the port and pinged.
func TestPongWithoutPing(t *testing.T) {
	injected(t, func(t *testing.T, x *inject) {
		x.know(true, 5)
		x.recv(header(1, 0, 0, 0, PingSourcePort, 0))
		if x.h.sink.len() != 1 {
			t.Error("dropped")
		}
	})
}

// FuzzReceive throws bytes at the receive side, as SENDs cut where the input says, in either dialect. Whatever comes: no panic, no
// buffer lost, no message that is not whole.
func FuzzReceive(f *testing.F) {
	big := make([]byte, 5000)
	f.Add(run(msgBytes(1, []byte("a"), 0), msgBytes(2, []byte("b"), 2)), uint16(0), true, uint8(0))
	f.Add(run(append(header(3, 0, 8000, 9, 10, 0), big[:4500]...), append(header(3, 0, 8000, 9, 10, 0), big[:3500]...)), uint16(4548), true, uint8(1))
	f.Add(run(append(header(3, 0, 5000, 9, 10, 0), big[:4096]...), append(header(3, 0, 5000, 9, 10, 0), big[:904]...)), uint16(4144), false, uint8(1))
	f.Add(append(header(0, 0, 8192, 0, 0, 1), make([]byte, 8192)...), uint16(0), true, uint8(3))
	f.Add(header(0, 1<<63, 0, 0, 0, 0), uint16(0), false, uint8(0))
	f.Add(header(1, 0, 0, 9, 0, 2), uint16(0), false, uint8(0))
	net := simnet.New(1, simnet.Config{})
	h := newHost(f, net, addrB)
	f.Cleanup(func() { net.Close() })
	x := newInject(f, h)
	x.end()
	seal := rand.New(rand.NewPCG(1, 1))
	f.Fuzz(func(t *testing.T, b []byte, cut uint16, open bool, fix uint8) {
		x.t = t
		x.start()
		x.know(open, 7)
		var sends [][]byte
		for n := int(cut); n > 0 && len(b) > n; b = b[n:] {
			sends = append(sends, bytes.Clone(b[:n]))
		}
		sends = append(sends, bytes.Clone(b))
		for i, s := range sends {
			if len(s) > 65536 {
				sends[i] = s[:65536]
			}
			// Most mutants have a right checksum, or nothing behind it would ever be tried.
			for at := 0; fix != 0xff && at+48 <= len(s); {
				hd := rdshdr.Header(s[at:])
				hd.Seal()
				if seal.IntN(64) == 0 {
					break
				}
				at += 48 + min(int(hd.Len()), len(s)-at-48)
			}
		}
		x.recv(sends...)
		for _, m := range h.sink.take() {
			if len(m.data) > MaxMessage {
				t.Errorf("message of %d bytes", len(m.data))
			}
		}
		x.c.peer.mu.Lock()
		x.c.peer.penalty.until = time.Time{}
		x.c.peer.mu.Unlock()
		x.end()
		if n := h.slab.Stats(); n.SmallInUse > 8 { // the queue's own: pongs
			x.c.mu.Lock()
			q := x.c.q.queued()
			x.c.mu.Unlock()
			if q == 0 {
				t.Errorf("chunks lost: %+v", n)
			}
		}
		x.c.Cancel(&x.c.rx.pongs, -1)
	})
}

// TestScratchIsBounded: pieces of what is not delivered, maps and old messages, are not kept until something is.
func TestScratchIsBounded(t *testing.T) {
	for _, open := range []bool{true, false} {
		injected(t, func(t *testing.T, x *inject) {
			x.know(open, 5)
			x.h.m.TraceReceive(true)
			defer x.h.m.TraceReceive(false)
			half := make([]byte, rdshdr.FragLen)
			old := payload(1, 1, 2*rdshdr.FragLen)
			x.recv(msgBytes(1<<20, nil, 0))
			for range 1000 {
				x.recv(append(header(0, 0, 8192, 0, 0, 1), half...), append(header(0, 0, 8192, 0, 0, 1), half...),
					append(header(7, 0, len(old), 9, 10, rdshdr.FlagRetransmitted), old[:rdshdr.FragLen]...),
					append(header(7, 0, len(old), 9, 10, rdshdr.FlagRetransmitted), old[rdshdr.FragLen:]...))
			}
			if x.dead() {
				t.Fatal("link broken")
			}
			if s := x.c.rx.scr; cap(s.frags) > 100 || cap(s.exts) > 100 {
				t.Errorf("room for %d pieces and %d extensions of 2000 messages that were not delivered", cap(s.frags), cap(s.exts))
			}
		})
	}
}
