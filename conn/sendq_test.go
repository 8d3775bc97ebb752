package conn

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// twin is the naive send queue: a slice of messages.
type twin struct {
	msgs []*twinMsg // una..tail
}

type twinMsg struct {
	seq    uint64
	owner  *testOwner
	data   []byte
	ready  bool
	posted bool // to its end, on any connection
	again  bool // to its end, on an earlier connection
}

// wire is the peer: it puts SENDs together by the rules of receive.go.
type wire struct {
	t      *rapid.T
	part   []byte
	partH  rdshdr.Header
	got    []wireMsg
	kernel bool
}

type wireMsg struct {
	seq   uint64
	data  []byte
	flags uint8
	ack   uint64
}

func (w *wire) send(b []byte, frag int) {
	for first := true; first || len(b) > 0; first = false {
		if !rdshdr.Valid(b) {
			w.t.Fatalf("SEND of %d bytes without a valid header", len(b))
		}
		h := rdshdr.Header(b[:48])
		b = b[48:]
		size := int(h.Len())
		if w.part != nil && !w.partH.SameMessage(h) {
			w.t.Fatalf("message %d in the middle of %d", h.Seq(), w.partH.Seq())
		}
		left := size - len(w.part)
		n := min(left, len(b))
		if w.kernel {
			if len(b) != min(left, frag) {
				w.t.Fatalf("fragment of %d bytes, %d are left", len(b), left)
			}
			if w.part != nil && !bytes.Equal(w.partH, h) {
				w.t.Fatalf("headers of a message differ")
			}
		} else if n < left && n < minSplit {
			w.t.Fatalf("fragment of %d bytes is not the last", n)
		}
		if n < left {
			if w.part == nil {
				w.partH = bytes.Clone(h)
			}
			w.part = append(w.part, b[:n]...)
			if w.part == nil {
				w.part = []byte{}
			}
		} else {
			flags := h.Flags()
			w.got = append(w.got, wireMsg{h.Seq(), append(w.part, b[:n]...), flags, h.Ack()})
			w.part = nil
		}
		b = b[n:]
		if w.kernel && len(b) > 0 {
			w.t.Fatalf("%d bytes behind the fragment", len(b))
		}
	}
}

// TestSendQueue runs random operations on the send queue and its twin.
func TestSendQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mem, err := slab.New(slab.Config{MaxBytes: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		const first = 100
		var q sendQueue
		q.init(mem, &memBudget{limit: 60 << 20}, 64, first)
		var tw twin
		seq := uint64(first)
		owners := []*testOwner{{}, {}, {}}
		released := map[*testOwner]int{}
		w := &wire{t: t}
		frag := 0
		hdr := make([]byte, 48)
		link := func() {
			frag = rapid.SampledFrom([]int{0, 0, 4096, 20000}).Draw(t, "frag")
			w.part, w.got, w.kernel = nil, nil, frag != 0
		}
		link()
		tell := func(r *released_) {
			for _, run := range r.runs[:r.n] {
				released[run.owner.(*testOwner)] += run.msgs
			}
			r.n = 0
		}
		expect := map[*testOwner]int{}
		checkWire := func() {
			// Everything the twin knows as sent on this connection, in order.
			for _, g := range w.got {
				found := false
				for _, m := range tw.msgs {
					if m.seq != g.seq {
						continue
					}
					found = true
					if !m.ready || !bytes.Equal(m.data, g.data) {
						t.Fatalf("message %d arrives changed", g.seq)
					}
					if re := g.flags&rdshdr.FlagRetransmitted != 0; re != m.again {
						t.Fatalf("message %d: flagged %v, sent before %v", g.seq, re, m.again)
					}
					m.posted = true
				}
				if !found {
					t.Fatalf("message %d arrives, which is not queued", g.seq)
				}
			}
			for i := 1; i < len(w.got); i++ {
				if w.got[i].seq <= w.got[i-1].seq {
					t.Fatalf("message %d after %d", w.got[i].seq, w.got[i-1].seq)
				}
			}
			w.got = w.got[:0]
		}
		pack := func(onlyFull bool) bool {
			var s ib.Send
			var ok bool
			ack := rapid.Uint64Range(0, 1000).Draw(t, "ack")
			if frag == 0 {
				ok, _ = q.packRun(&s, ack, rapid.Bool().Draw(t, "ask"), onlyFull)
			} else {
				ok, _, _ = q.packFragment(&s, hdr, frag, ack)
			}
			if !ok {
				return false
			}
			var b []byte
			if s.HeaderLen > 0 {
				b = append(b, hdr[:s.HeaderLen]...)
			}
			for _, p := range s.Pieces[:s.N] {
				b = append(b, p.Chunk.Bytes()[p.Off:p.Off+p.Len]...)
				p.Chunk.Put()
			}
			limit := 61440
			if frag != 0 {
				limit = frag + 48
			}
			if len(b) > limit {
				t.Fatalf("SEND of %d bytes", len(b))
			}
			w.send(b, frag)
			if frag == 0 && w.got != nil && len(w.got) > 0 && w.part == nil && w.got[len(w.got)-1].ack != ack {
				t.Fatalf("the last header carries ack %d, not %d", w.got[len(w.got)-1].ack, ack)
			}
			q.handed = max(q.handed, q.next)
			checkWire()
			return true
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				size := rapid.SampledFrom([]int{0, 1, 64, 64, 1000, 4096, 7168, 7169, 9000, 57000, 61392, 61393, 130000}).Draw(t, "size")
				o := rapid.SampledFrom(owners).Draw(t, "owner")
				data := payload(uint16(size), seq, size)
				s, mem, ok := q.append(o, 7, uint16(rapid.IntRange(5, 6).Draw(t, "port")), size, 0, 0, nil)
				if !ok {
					if len(tw.msgs) < 64 {
						t.Fatalf("refused with %d messages", len(tw.msgs))
					}
					return
				}
				if s != seq {
					t.Fatalf("sequence %d, not %d", s, seq)
				}
				seq++
				m := &twinMsg{seq: s, owner: o, data: data, ready: size <= copyLocked}
				tw.msgs = append(tw.msgs, m)
				if m.ready {
					copy(mem, data)
				}
				expect[o]++
			},
			"copied": func(t *rapid.T) {
				for _, m := range tw.msgs {
					if !m.ready && rapid.Bool().Draw(t, "this one") {
						var parts [maxPieces][]byte
						d := m.data
						for _, p := range parts[:q.pieces(m.seq, &parts)] {
							d = d[copy(p, d):]
						}
						q.ready(m.seq)
						m.ready = true
						return
					}
				}
			},
			"copiedInPart": func(t *rapid.T) {
				for _, m := range tw.msgs {
					if !m.ready && rapid.Bool().Draw(t, "this one") {
						var parts [maxPieces][]byte
						n := q.pieces(m.seq, &parts)
						have, d := 0, m.data
						for _, p := range parts[:rapid.IntRange(0, n-1).Draw(t, "pieces")] {
							have += copy(p, d[have:])
						}
						q.copied(m.seq, max(have, int(q.msg(m.seq).have)))
						return
					}
				}
			},
			"pack":     func(t *rapid.T) { pack(false) },
			"packFull": func(t *rapid.T) { pack(frag == 0) },
			"ack": func(t *rapid.T) {
				n := rapid.IntRange(0, len(tw.msgs)).Draw(t, "n")
				for ; n > 0 && !tw.msgs[n-1].posted; n-- {
				}
				if n == 0 {
					return
				}
				upTo := tw.msgs[n-1].seq
				var r released_
				for more := true; more; {
					_, more = q.ack(upTo, &r)
					tell(&r)
				}
				if q.una < upTo && q.nextOff == 0 {
					t.Fatalf("una %d after ack %d", q.una, upTo)
				}
				tw.msgs = tw.msgs[q.una-tw.msgs[0].seq:]
			},
			"cancel": func(t *rapid.T) {
				o := rapid.SampledFrom(owners).Draw(t, "owner")
				port := rapid.IntRange(-1, 6).Draw(t, "port")
				var r released_
				total := 0
				for from := q.una; ; {
					end, n := q.cancelRange(o, port, from, &r)
					total += n
					tell(&r)
					if end == q.tail {
						break
					}
					from = end
				}
				if len(tw.msgs) > 0 {
					tw.msgs = tw.msgs[q.una-tw.msgs[0].seq:]
				}
				_ = total
			},
			"reset": func(t *rapid.T) {
				for _, m := range tw.msgs {
					m.again = m.again || m.posted
				}
				q.rewind()
				if len(tw.msgs) > 0 {
					tw.msgs = tw.msgs[q.una-tw.msgs[0].seq:]
				}
				link()
			},
			"trim": func(t *rapid.T) { q.trim() },
			"": func(t *rapid.T) {
				checkQueue(t, &q)
				if q.queued() != len(tw.msgs) {
					t.Fatalf("%d messages queued, %d in the twin", q.queued(), len(tw.msgs))
				}
			},
		})
		// At the end everything that is ready and not cancelled gets through on a new connection.
		for _, m := range tw.msgs {
			m.again = m.again || m.posted
			if !m.ready {
				var parts [maxPieces][]byte
				d := m.data
				for _, p := range parts[:q.pieces(m.seq, &parts)] {
					d = d[copy(p, d):]
				}
				q.ready(m.seq)
				m.ready = true
			}
		}
		q.rewind()
		link()
		var want []uint64
		for s := q.una; s != q.tail; s++ {
			if q.msg(s).flags&msgCancelled == 0 {
				want = append(want, s)
			}
		}
		tw.msgs = tw.msgs[len(tw.msgs)-q.queued():]
		var got []uint64
		for {
			n := len(tw.msgs)
			_ = n
			before := q.next
			if !pack(false) {
				break
			}
			for s := before; s != q.next; s++ {
				if q.msg(s).flags&msgCancelled == 0 {
					got = append(got, s)
				}
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("sent %v of %v", got, want)
		}
		var r released_
		for more := q.una != q.tail; more; {
			_, more = q.ack(q.tail-1, &r)
			tell(&r)
		}
		if q.una != q.tail || q.bytes != 0 || q.cancelled != 0 || q.filler != 0 {
			t.Fatalf("queue is not empty: %+v", q)
		}
		for _, o := range owners {
			if released[o] != expect[o] {
				t.Fatalf("%d messages of an owner released, %d were queued", released[o], expect[o])
			}
		}
		q.trim()
		if n := q.budget.used.Load(); n != 0 {
			t.Fatalf("%d bytes of the budget are not given back", n)
		}
		if err := mem.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

type released_ = released

// checkQueue recounts what the queue keeps counts of.
func checkQueue(t *rapid.T, q *sendQueue) {
	var bytes, cancelled, copying, filler int
	for s := q.una; s != q.tail; s++ {
		m := q.msg(s)
		if m.flags&msgCancelled != 0 {
			cancelled++
		} else {
			bytes += int(m.len)
		}
		if m.flags&msgReady == 0 {
			copying++
		}
		begun := s == q.next && q.nextOff > 0
		if s >= q.next && (m.flags&msgCancelled != 0 && !begun || m.flags&msgReady == 0) {
			filler++
		}
	}
	if q.bytes != bytes || q.cancelled != cancelled || q.copying != copying || q.filler != filler {
		t.Fatalf("counts: bytes %d (%d), cancelled %d (%d), copying %d (%d), filler %d (%d)", q.bytes, bytes, q.cancelled, cancelled, q.copying, copying, q.filler, filler)
	}
	if q.una > q.next || q.next > q.tail || q.everSent > q.tail {
		t.Fatalf("una %d next %d tail %d ever sent %d", q.una, q.next, q.tail, q.everSent)
	}
	if q.una == q.tail && q.lastSer-q.firstSer > 1 {
		t.Fatalf("%d chunks for nothing", q.lastSer-q.firstSer)
	}
}
