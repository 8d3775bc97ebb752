package conn

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/slab"
)

// partOwner is one message of a testOwner.
type partOwner struct {
	testOwner
	whole *testOwner
	acked bool
}

func (o *partOwner) Whole() Owner { return o.whole }
func (o *partOwner) Released(msgs, bytes int, acked bool) {
	o.testOwner.Released(msgs, bytes, acked)
	o.mu.Lock()
	o.acked = acked
	o.mu.Unlock()
}

func (o *partOwner) told(msgs int, acked bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.msgs == msgs && o.acked == acked
}

// TestBuffer sends buffers of every kind of length among ordinary messages: all arrive whole and in order, with both
// dialects, and their memory comes home.
func TestBuffer(t *testing.T) {
	for _, dialect := range []Dialect{DialectOpen, DialectKernelOnly} {
		for _, loss := range []float64{0, 0.02} {
			bubble(t, 7, simnet.Config{GRO: true, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, Loss: loss}}, func(t *testing.T, net *simnet.Net) {
				mod := func(o *hostOptions) { o.cfg.Dialect = dialect }
				a, b := newHost(t, net, addrA, mod), newHost(t, net, addrB, mod)
				c := a.conn(addrB)
				var o testOwner
				var want [][]byte
				for i, n := range []int{MinBuffer, pieceLen - 1, pieceLen, pieceLen + 1, 2 * pieceLen, 300000, MaxMessage} {
					small := bytes.Repeat([]byte{byte(i)}, 100*i)
					if err := c.Send(&o, 1, 2, small); err != nil {
						t.Fatal(err)
					}
					buf, err := a.m.Reserve(n)
					if err != nil {
						t.Fatal(err)
					}
					big := bytes.Repeat([]byte{byte(i + 100)}, n)
					rest := big
					for _, p := range buf.Pieces(nil) {
						rest = rest[copy(p, rest):]
					}
					if len(rest) > 0 {
						t.Fatalf("buffer of %d has no room for %d", n, len(rest))
					}
					x := Extra{Buffer: buf}
					if i%2 == 1 {
						x.Cookie = 0x12345
					}
					if err := c.SendExtra(&o, 1, 2, nil, 0, &x); err != nil {
						t.Fatal(err)
					}
					if buf.Len() != 0 {
						t.Error("a buffer that was queued is still its owner's")
					}
					want = append(want, small, big)
				}
				eventually(t, "all arrive", time.Minute, func() bool { return b.sink.len() == len(want) })
				for i, m := range b.sink.take() {
					if !bytes.Equal(m.data, want[i]) {
						t.Errorf("message %d: %d bytes, want %d", i, len(m.data), len(want[i]))
					}
					if got, want := m.ext.Cookie != 0, i%4 == 3; got != want {
						t.Errorf("message %d: cookie %v, want %v", i, got, want)
					}
				}
				eventually(t, "all are acknowledged", time.Minute, func() bool { return o.count() == len(want) })
				a.close(time.Second)
				b.close(time.Second)
				if n := a.m.sendMem.used.Load(); n != 0 {
					t.Errorf("%d bytes of send memory left", n)
				}
			})
		}
	}
}

// TestBufferLimits: what is reserved counts as queued, and is given back.
func TestBufferLimits(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA, func(o *hostOptions) { o.cfg.SendMemory = 4 * slab.Large })
		if _, err := a.m.Reserve(MaxMessage + 1); !errors.Is(err, ErrMessageTooLong) {
			t.Errorf("too long: %v", err)
		}
		if _, err := a.m.Reserve(MinBuffer - 1); err == nil {
			t.Error("too short: no error")
		}
		x, err := a.m.Reserve(3 * pieceLen)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.m.Reserve(2 * pieceLen); !errors.Is(err, ErrNoMemory) {
			t.Errorf("beyond the bound: %v", err)
		}
		x.Release()
		x.Release()
		y, err := a.m.Reserve(4 * pieceLen)
		if err != nil {
			t.Fatal(err)
		}
		// A queue that is not connected, and Close, keep and free it.
		var o testOwner
		if err := a.conn(addrB).SendExtra(&o, 1, 2, nil, 0, &Extra{Buffer: y}); err != nil {
			t.Fatal(err)
		}
		if n := a.close(0); n != 1 || o.count() != 1 {
			t.Errorf("%d abandoned, %d released", n, o.count())
		}
		if n := a.m.sendMem.used.Load(); n != 0 {
			t.Errorf("%d bytes of send memory left", n)
		}
	})
}

// TestPart: an owner of one message hears how that ended, and is cancelled with the whole.
func TestPart(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a := newHost(t, net, addrA)
		c := a.conn(addrB)
		whole := &testOwner{}
		parts := [3]partOwner{{whole: whole}, {whole: whole}, {whole: &testOwner{}}}
		for i := range parts {
			if err := c.Send(&parts[i], 1, uint16(2+i), []byte("part")); err != nil {
				t.Fatal(err)
			}
		}
		if n := c.Cancel(whole, 2); n != 1 || !parts[0].told(1, false) {
			t.Errorf("%d cancelled, and the first part does not know", n)
		}
		b := newHost(t, net, addrB)
		eventually(t, "the others arrive", 10*time.Second, func() bool { return b.sink.len() == 2 && c.Info().QueuedMsgs == 0 })
		if !parts[1].told(1, true) || !parts[2].told(1, true) {
			t.Error("acknowledged parts do not know")
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}

// TestTraceReceive: stamps are there while somebody wants them, in the order in which things happen.
func TestTraceReceive(t *testing.T) {
	bubble(t, 1, quick, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		got := 0
		send := func(n int) Ext {
			t.Helper()
			a.conn(addrB).Send(&o, 1, 2, make([]byte, n))
			got++
			eventually(t, "message", time.Second, func() bool { return b.sink.len() == got })
			return b.sink.take()[0].ext
		}
		for _, n := range []int{1, 200000} {
			if x := send(n); x != (Ext{}) {
				t.Errorf("not traced: %+v", x)
			}
			b.m.TraceReceive(true)
			begin := time.Now()
			if x := send(n); x.Seen.Before(begin) || x.Start.Before(x.Seen) || x.Start.After(time.Now()) {
				t.Errorf("%d bytes, begun %v: seen %v, started %v", n, begin, x.Seen, x.Start)
			}
			b.m.TraceReceive(false)
		}
		a.close(time.Second)
		b.close(time.Second)
	})
}
