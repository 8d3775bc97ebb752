package ib

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

var (
	addrA = netip.MustParseAddr("10.0.0.1")
	addrB = netip.MustParseAddr("10.0.0.2")
)

// upper keeps what a link reports.
type upper struct {
	mu     sync.Mutex
	got    [][]byte
	ends   int
	broken []error
	closed bool // nothing may come any more
	late   int
}

func (u *upper) RecvSend(l *Link, b *ibdev.RecvBuf, n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.got = append(u.got, bytes.Clone(b.Bytes()[:n]))
	if u.closed {
		u.late++
	}
	b.Put()
}

func (u *upper) BatchEnd(l *Link, recv bool) {
	u.mu.Lock()
	u.ends++
	u.mu.Unlock()
}

func (u *upper) LinkBroken(l *Link, err error) {
	u.mu.Lock()
	u.broken = append(u.broken, err)
	u.mu.Unlock()
}

type rig struct {
	t     *testing.T
	net   *simnet.Net
	reg   *ibdev.Registry
	slab  *slab.Slab
	epoch *epoch.Domain
	stats Stats
	num   uint32
	deaf  atomic.Bool
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, net: simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}}), epoch: epoch.NewDomain()}
	var err error
	if r.slab, err = slab.New(slab.Config{}); err != nil {
		t.Fatal(err)
	}
	p := &deafProvider{softroce.New(softroce.Config{Network: r.net}), &r.deaf}
	r.reg = ibdev.NewRegistry(ibdev.Config{Providers: []verbs.Provider{p}, Slab: r.slab, Epoch: r.epoch})
	return r
}

// deafProvider opens devices whose receive handler (of the CQ that is created first) is not called while deaf is set.
type deafProvider struct {
	verbs.Provider
	deaf *atomic.Bool
}

type deafDevice struct {
	verbs.Device
	deaf *atomic.Bool
	cqs  int
}

func (p *deafProvider) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err != nil {
		return nil, err
	}
	return &deafDevice{Device: d, deaf: p.deaf}, nil
}

func (d *deafDevice) CreateCQ(c verbs.CQConfig) (verbs.CQ, error) {
	d.cqs++
	recv, h := d.cqs == 1, c.Handler
	c.Handler = func(q verbs.CQ) {
		if !recv || !d.deaf.Load() {
			h(q)
		}
	}
	return d.Device.CreateCQ(c)
}

func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, err := range []error{r.reg.Close(ctx), r.epoch.Close(), r.slab.Close()} {
		if err != nil {
			r.t.Error(err)
		}
	}
}

func (r *rig) link(a netip.Addr, u Upper) *Link {
	r.t.Helper()
	d, err := r.reg.Open(context.Background(), a)
	if err != nil {
		r.t.Fatal(err)
	}
	defer d.Put()
	r.num++
	l, err := NewLink(d, r.slab, Config{Ring: 64, Stats: &r.stats}, r.num, u)
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// pair connects two links.
func (r *rig) pair(ua, ub Upper) (a, b *Link) {
	r.t.Helper()
	a, b = r.link(addrA, ua), r.link(addrB, ub)
	accepted := make(chan error, 1)
	lis, err := b.Device().Verbs().Listen(77, func(req verbs.ConnRequest) {
		accepted <- b.Accept(context.Background(), req, []byte("REP"))
	})
	if err != nil {
		r.t.Fatal(err)
	}
	defer lis.Close()
	info, err := a.Connect(context.Background(), netip.AddrPortFrom(addrB, 77), []byte("REQ"))
	if err != nil {
		r.t.Fatal(err)
	}
	if string(info.PrivateData[:3]) != "REP" {
		r.t.Errorf("private data %q", info.PrivateData[:3])
	}
	if err := <-accepted; err != nil {
		r.t.Fatal(err)
	}
	return a, b
}

func (r *rig) chunk(fill byte) *slab.Chunk {
	r.t.Helper()
	c, err := r.slab.Alloc(slab.Large)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range c.Bytes() {
		c.Bytes()[i] = fill
	}
	return c
}

func TestPost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ua, ub upper
		a, b := r.pair(&ua, &ub)
		x, y := r.chunk('x'), r.chunk('y')
		// All shapes of a SEND.
		copy(a.Header(1), "HEADER")
		sends := []Send{
			{Kind: Data, N: 1, Pieces: [2]Piece{{x, 10, 61440}}},
			{Kind: Ack, HeaderLen: 6},
			{Kind: Data, N: 2, Pieces: [2]Piece{{x, 0, 5}, {y, 1, 7}}},
		}
		copy(a.Header(3), "other!")
		sends = append(sends, Send{Kind: Control, HeaderLen: 6, N: 2, Pieces: [2]Piece{{y, 0, 1}, {x, 0, 1}}})
		if n, err := post(a, sends); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if a.Outstanding() != 2 || a.AcksInFlight() != 1 || a.InFlight() != 4 || a.Free() != 60 {
			t.Errorf("outstanding %d, acks %d, in flight %d, free %d", a.Outstanding(), a.AcksInFlight(), a.InFlight(), a.Free())
		}
		x.Put() // the link holds its own
		y.Put()
		pause(time.Second)
		if a.InFlight() != 0 || a.Outstanding() != 0 || a.AcksInFlight() != 0 {
			t.Errorf("outstanding %d, acks %d, in flight %d when all is acknowledged", a.Outstanding(), a.AcksInFlight(), a.InFlight())
		}
		want := []string{string(bytes.Repeat([]byte{'x'}, 61440)), "HEADER", "xxxxxyyyyyyy", "other!yx"}
		for i, w := range want {
			if i >= len(ub.got) || string(ub.got[i]) != w {
				t.Fatalf("SEND %d is not what was posted", i)
			}
		}
		// Around the ring, many times.
		z := r.chunk('z')
		for n := 0; n < 1000; {
			k := min(BatchMax, a.Free())
			batch := make([]Send, k)
			for i := range batch {
				copy(a.Header(i), []byte{byte(n >> 8), byte(n)})
				batch[i] = Send{Kind: Data, HeaderLen: 2, N: 1, Pieces: [2]Piece{{z, 0, n % 3000}}}
				n++
			}
			if k > 0 {
				if _, err := post(a, batch); err != nil {
					t.Fatal(err)
				}
			}
			pause(100 * time.Microsecond)
		}
		z.Put()
		pause(time.Second)
		for i, g := range ub.got[4:] {
			if len(g) != 2+i%3000 || g[0] != byte(i>>8) || g[1] != byte(i) {
				t.Fatalf("SEND %d: %d bytes, begins %x", i, len(g), g[:2])
			}
		}
		if len(ub.got) < 1004 {
			t.Errorf("%d SENDs arrived", len(ub.got))
		}
		for _, l := range []*Link{a, b} {
			if err := l.Close(time.Second); err != nil {
				t.Error(err)
			}
		}
		r.close()
	})
}

// TestDrain closes a link with everything in flight: all memory comes home, nothing comes up any more, and the other side
// learns of it.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ua, ub upper
		a, b := r.pair(&ua, &ub)
		c := r.chunk('x')
		r.net.Partition(addrA, addrB)
		for range 4 {
			batch := make([]Send, BatchMax)
			for i := range batch {
				batch[i] = Send{Kind: Data, N: 1, Pieces: [2]Piece{{c, 0, 10000}}}
			}
			if _, err := post(a, batch); err != nil {
				t.Fatal(err)
			}
		}
		if a.Free() != 0 || c.Refs() != 65 {
			t.Errorf("%d free, %d references", a.Free(), c.Refs())
		}
		start := time.Now()
		if err := a.Close(time.Second); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d > 10*time.Millisecond {
			t.Errorf("Close took %v", d)
		}
		if c.Refs() != 1 {
			t.Errorf("%d references after Close", c.Refs())
		}
		if len(ua.broken) != 0 {
			t.Errorf("closing is reported as %v", ua.broken)
		}
		r.net.Heal(addrA, addrB)
		pause(10 * time.Second) // DREQ is repeated
		if len(ub.broken) != 1 || !errors.Is(ub.broken[0], ErrPeerClosed) {
			t.Errorf("the peer is told %v", ub.broken)
		}
		select {
		case <-b.Done():
		default:
			t.Error("not done")
		}
		if err := b.Close(time.Second); err != nil {
			t.Error(err)
		}
		c.Put()
		if n := r.stats.DrainTimeouts.Load(); n != 0 {
			t.Errorf("%d drains without a marker", n)
		}
		r.close()
	})
}

// TestDrainWhileReceiving closes a link while SENDs keep arriving: none comes up after Close has returned.
func TestDrainWhileReceiving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for round := range 20 {
			r := newRig(t)
			var ua, ub upper
			a, b := r.pair(&ua, &ub)
			c := r.chunk('x')
			for range 4 {
				batch := make([]Send, BatchMax)
				for i := range batch {
					batch[i] = Send{Kind: Data, N: 1, Pieces: [2]Piece{{c, 0, 3000}}}
				}
				post(a, batch)
			}
			pause(time.Duration(40+5*round) * time.Microsecond)
			if err := b.Close(time.Second); err != nil {
				t.Error(err)
			}
			ub.mu.Lock()
			ub.closed = true
			ub.mu.Unlock()
			pause(20 * time.Second)
			if ub.late != 0 {
				t.Errorf("%d SENDs after Close", ub.late)
			}
			if len(ua.broken) == 0 {
				t.Error("the sender does not notice")
			}
			if err := a.Close(time.Second); err != nil {
				t.Error(err)
			}
			c.Put()
			r.close()
		}
	})
}

// TestStaleReceives: what had arrived when Close began, and was not looked at, is dropped and counted: its sender gets no
// acknowledgement and sends it again.
func TestStaleReceives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ua, ub upper
		a, b := r.pair(&ua, &ub)
		c := r.chunk('x')
		r.deaf.Store(true)
		batch := make([]Send, 5)
		for i := range batch {
			batch[i] = Send{Kind: Data, N: 1, Pieces: [2]Piece{{c, 0, 3000}}}
		}
		post(a, batch)
		pause(time.Second)
		if err := b.Close(time.Second); err != nil {
			t.Error(err)
		}
		if len(ub.got) != 0 {
			t.Errorf("%d SENDs brought up by a link that is being closed", len(ub.got))
		}
		if n := r.stats.Stale.Load(); n != 5 {
			t.Errorf("%d counted as stale", n)
		}
		a.Close(time.Second)
		c.Put()
		r.close()
	})
}

// TestCloseUnconnected: a link that never was connected, or failed to, closes as well.
func TestCloseUnconnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var u upper
		l := r.link(addrA, &u)
		if err := l.Close(time.Second); err != nil {
			t.Error(err)
		}
		l = r.link(addrA, &u)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := l.Connect(ctx, netip.AddrPortFrom(addrB, 77), nil); err == nil {
			t.Error("connected to nobody")
		}
		if err := l.Close(time.Second); err != nil {
			t.Error(err)
		}
		r.close()
	})
}

// TestBrokenOnce: a link that fails says so once, and refuses further SENDs without losing their memory.
func TestBrokenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ua, ub upper
		a, b := r.pair(&ua, &ub)
		c := r.chunk('x')
		// Longer than a receive buffer.
		if _, err := post(a, []Send{{Kind: Data, N: 2, Pieces: [2]Piece{{c, 0, 65536}, {c, 0, 100}}}}); err != nil {
			t.Fatal(err)
		}
		pause(time.Second)
		for _, u := range []*upper{&ua, &ub} {
			if len(u.broken) != 1 {
				t.Errorf("reported %d times: %v", len(u.broken), u.broken)
			}
		}
		var wc *verbs.WCError
		if !errors.As(ua.broken[0], &wc) || wc.Status != verbs.WCRemInvReqErr {
			t.Errorf("the sender is told %v", ua.broken[0])
		}
		post(a, []Send{{Kind: Data, N: 1, Pieces: [2]Piece{{c, 0, 1}}}})
		a.Fail(errors.New("again"))
		if len(ua.broken) != 1 {
			t.Error("reported again")
		}
		for _, l := range []*Link{a, b} {
			if err := l.Close(time.Second); err != nil {
				t.Error(err)
			}
		}
		if c.Refs() != 1 {
			t.Errorf("%d references", c.Refs())
		}
		c.Put()
		r.close()
	})
}

func TestHandshake(t *testing.T) {
	mark := rdshdr.Mark{Incarnation: 42, MaxSend: 61440, Window: 1 << 20}
	for _, addrs := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"fd00::1", "fd00::2"}} {
		from, to := netip.MustParseAddr(addrs[0]), netip.MustParseAddr(addrs[1])
		for _, ours := range []bool{true, false} {
			h := Hello{From: from, To: to, TOS: 3, AckSeq: 77, Ours: ours, Mark: mark}
			req := append(h.AppendREQ(nil), make([]byte, 56)...)[:56]
			got, err := ParseREQ(req, from, to)
			want := h
			if from.Is6() && ours {
				want.Mark, want.MarkFollows = rdshdr.Mark{}, true
			} else if !ours {
				want.Mark = rdshdr.Mark{}
			}
			if err != nil || got != want {
				t.Errorf("REQ: %+v, %v, want %+v", got, err, want)
			}
			rep := append(h.AppendREP(nil), make([]byte, 196)...)[:196]
			want = h
			if !ours {
				want.Mark = rdshdr.Mark{}
			}
			got, err = ParseREP(rep, from, to)
			if err != nil || got != want {
				t.Errorf("REP: %+v, %v, want %+v", got, err, want)
			}
			if _, err := ParseREQ(req, to, from); !errors.Is(err, ErrHello) {
				t.Errorf("REQ of somebody else: %v", err)
			}
			if _, err := ParseREQ(nil, from, to); err == nil {
				t.Error("REQ without private data is taken")
			}
			if got, err := ParseREP(make([]byte, 196), from, to); err != nil || got != (Hello{From: from, To: to}) {
				t.Errorf("empty REP: %+v, %v", got, err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	h := Hello{From: addrA, To: addrB, Ours: true, Mark: rdshdr.Mark{Incarnation: 1}}
	f.Add(h.AppendREQ(nil), false)
	f.Add(h.AppendREP(nil), true)
	f.Fuzz(func(t *testing.T, b []byte, rep bool) {
		parse := ParseREQ
		if rep {
			parse = ParseREP
		}
		got, err := parse(b, addrA, addrB)
		if err == nil && (got.From != addrA || got.To != addrB || got.Ours && !got.MarkFollows && got.Mark.Incarnation == 0) {
			t.Errorf("%x is taken for %+v", b, got)
		}
	})
}

// pause lets time go by, and the rest of the bubble come to rest.
func pause(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// post posts with a reference of its own to each chunk.
func post(l *Link, sends []Send) (int, error) {
	for i := range sends {
		for _, p := range sends[i].Pieces[:sends[i].N] {
			p.Chunk.Get()
		}
	}
	return l.Post(sends)
}

type opDone chan verbs.WCStatus

func (d opDone) OpDone(s verbs.WCStatus) { d <- s }

// TestOpMark: the requests of an operation know, as SENDs do, which of the pool's are before them. Without that their completion would say,
// to who counts in 32 bits and is halfway around, that those which are not posted yet have executed.
func TestOpMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ua, ub upper
		a, b := r.pair(&ua, &ub)
		x := r.chunk('x')
		m, err := a.Map(context.Background(), mrpool.Request{Segs: [][]byte{x.Bytes()}, Access: verbs.AccessRemoteRead}, false)
		if err != nil {
			t.Fatal(err)
		}
		sge, err := a.Device().SGE(x, 0, 8)
		if err != nil {
			t.Fatal(err)
		}
		mark := a.pool.Load().Mark()
		if mark == 0 {
			t.Fatal("nothing was posted to map memory")
		}
		h, done := a.head.Load(), make(opDone, 1)
		if _, err := a.PostOp(&Op{Opcode: verbs.OpWrite, SGs: []verbs.SGE{sge}, RKey: 1, Owner: done}); err != nil {
			t.Fatal(err)
		}
		if got := a.slot(h).mark; got != mark {
			t.Errorf("mark %d behind %d requests of the pool's", got, mark)
		}
		<-done
		freed := make(chan struct{})
		if err := m.Free(func(error) { close(freed) }); err != nil {
			t.Error(err)
		}
		for _, l := range []*Link{a, b} {
			if err := l.Close(time.Second); err != nil {
				t.Error(err)
			}
		}
		x.Put()
		r.close()
		<-freed
	})
}

// TestFailedBeforeMade: a device that goes while a QP is being made says so to a link that has none yet.
func TestFailedBeforeMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		d, err := r.reg.Open(t.Context(), addrA)
		if err != nil {
			t.Fatal(err)
		}
		var u upper
		made, err := NewLink(d, r.slab, Config{Ring: 16, Stats: &r.stats}, 1, &u)
		if err != nil {
			t.Fatal(err)
		}
		var early upper
		l := &Link{up: &early}
		l.QPEvent(verbs.EventDeviceRemoved)
		if !l.Broken() || len(early.broken) != 0 {
			t.Errorf("broken %v, told %v", l.Broken(), early.broken)
		}
		l.has(made.qp)
		if len(early.broken) != 1 || !errors.Is(early.broken[0], ErrDeviceGone) {
			t.Errorf("told %v", early.broken)
		}
		l.QPEvent(verbs.EventDeviceRemoved)
		if len(early.broken) != 1 {
			t.Errorf("told %d times", len(early.broken))
		}
		if err := made.Close(time.Second); err != nil {
			t.Error(err)
		}
		d.Put()
		r.close()
	})
}
