package ibdev

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

var (
	addrA = netip.MustParseAddr("10.0.0.1")
	addrB = netip.MustParseAddr("10.0.0.2")
)

// bendProvider wraps softroce devices, so that a test can raise asynchronous events and refuse things.
type bendProvider struct {
	verbs.Provider
	mu      sync.Mutex
	opened  int
	last    *bendDevice
	wrong   error // what OpenDevice says
	failCQs int   // CreateCQ fails when this many have been made; 0: never
}

type bendDevice struct {
	verbs.Device
	p     *bendProvider
	async func(verbs.AsyncEvent)
	cqs   int
	deaf  atomic.Bool // handlers are not called
}

func (p *bendProvider) OpenDevice(a netip.Addr) (verbs.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wrong != nil {
		return nil, p.wrong
	}
	d, err := p.Provider.OpenDevice(a)
	if err != nil {
		return nil, err
	}
	p.opened++
	p.last = &bendDevice{Device: d, p: p}
	return p.last, nil
}

func (d *bendDevice) SetAsyncHandler(h func(verbs.AsyncEvent)) {
	d.async = h
	d.Device.SetAsyncHandler(h)
}

func (d *bendDevice) CreateCQ(c verbs.CQConfig) (verbs.CQ, error) {
	d.cqs++
	if d.p.failCQs != 0 && d.cqs >= d.p.failCQs {
		return nil, verbs.ErrNoMemory
	}
	h := c.Handler
	c.Handler = func(q verbs.CQ) {
		if !d.deaf.Load() {
			h(q)
		}
	}
	return d.Device.CreateCQ(c)
}

type rig struct {
	t     testing.TB
	reg   *Registry
	slab  *slab.Slab
	epoch *epoch.Domain
	prov  *bendProvider
}

func newRig(t testing.TB, mod ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, epoch: epoch.NewDomain()}
	var err error
	if r.slab, err = slab.New(slab.Config{}); err != nil {
		t.Fatal(err)
	}
	net := simnet.New(1, simnet.Config{})
	t.Cleanup(func() { net.Close() })
	r.prov = &bendProvider{Provider: softroce.New(softroce.Config{Network: net})}
	cfg := Config{Providers: []verbs.Provider{r.prov}, Slab: r.slab, Epoch: r.epoch}
	for _, f := range mod {
		f(&cfg)
	}
	r.reg = NewRegistry(cfg)
	return r
}

func (r *rig) open(a netip.Addr) *Device {
	r.t.Helper()
	d, err := r.reg.Open(context.Background(), a)
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, err := range []error{r.reg.Close(ctx), r.epoch.Close(), r.slab.Close()} {
		if err != nil {
			r.t.Error(err)
		}
	}
}

// quietHandler counts.
type quietHandler struct {
	mu     sync.Mutex
	sends  []verbs.WC
	bufs   []*RecvBuf
	lens   []int
	ends   [2]int
	events []verbs.EventType
}

func (h *quietHandler) SendWC(wc *verbs.WC) {
	h.mu.Lock()
	h.sends = append(h.sends, *wc)
	h.mu.Unlock()
}

func (h *quietHandler) RecvWC(wc *verbs.WC, b *RecvBuf) {
	h.mu.Lock()
	h.bufs = append(h.bufs, b)
	h.lens = append(h.lens, int(wc.ByteLen))
	h.mu.Unlock()
}

func (h *quietHandler) BatchEnd(recv bool) {
	h.mu.Lock()
	if recv {
		h.ends[1]++
	} else {
		h.ends[0]++
	}
	h.mu.Unlock()
}

func (h *quietHandler) QPEvent(t verbs.EventType) {
	h.mu.Lock()
	h.events = append(h.events, t)
	h.mu.Unlock()
}

func (h *quietHandler) take() []*RecvBuf {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := h.bufs
	h.bufs, h.lens = nil, nil
	return b
}

func TestRegistryOpensOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var wg sync.WaitGroup
		devs := make([]*Device, 20)
		for i := range devs {
			wg.Go(func() { devs[i] = r.open(addrA) })
		}
		wg.Wait()
		for _, d := range devs {
			if d != devs[0] {
				t.Fatal("two devices for one address")
			}
		}
		if r.prov.opened != 1 {
			t.Errorf("opened %d times", r.prov.opened)
		}
		part := r.epoch.Register("test")
		if d := r.reg.Lookup(part, addrA); d != devs[0] {
			t.Error("Lookup does not find it")
		} else {
			d.Put()
		}
		if d := r.reg.Lookup(part, addrB); d != nil {
			t.Error("Lookup opens")
		}
		part.Unregister()
		for _, d := range devs {
			d.Put()
		}
		r.close()
		if _, err := r.reg.Open(context.Background(), addrA); !errors.Is(err, ErrClosed) {
			t.Errorf("Open after Close: %v", err)
		}
		if err := r.reg.Close(context.Background()); err != nil {
			t.Errorf("second Close: %v", err)
		}
	})
}

func TestRegistryAsksProvidersInOrder(t *testing.T) {
	r := newRig(t)
	none := &bendProvider{wrong: fmt.Errorf("not mine: %w", verbs.ErrNoSuchAddress)}
	broken := &bendProvider{Provider: r.prov, wrong: errors.New("address in use by process 17")}
	none.Provider, broken.Provider = r.prov, r.prov
	r.reg.cfg.Providers = []verbs.Provider{none, r.prov}
	d := r.open(addrA)
	d.Put()
	r.reg.cfg.Providers = []verbs.Provider{none, broken, r.prov}
	if _, err := r.reg.Open(context.Background(), addrB); err == nil || !strings.Contains(err.Error(), "process 17") {
		t.Errorf("an address in use: %v", err)
	}
	r.reg.cfg.Providers = []verbs.Provider{none}
	if _, err := r.reg.Open(context.Background(), addrB); !errors.Is(err, ErrNoDevice) {
		t.Errorf("no provider: %v", err)
	}
	r.close()
}

// TestOpenFailsHalfway fails the n-th completion queue and leaves nothing behind.
func TestOpenFailsHalfway(t *testing.T) {
	r := newRig(t)
	r.prov.failCQs = 1
	if _, err := r.reg.Open(context.Background(), addrA); !errors.Is(err, verbs.ErrNoMemory) {
		t.Errorf("got %v", err)
	}
	r.prov.failCQs = 0
	d := r.open(addrA) // the address is free again
	r.prov.last.cqs, r.prov.failCQs = 0, 1
	if _, err := d.CreateQP(QPConfig{MaxSendWR: 10, MaxSendSGE: 1}, &quietHandler{}); !errors.Is(err, verbs.ErrNoMemory) {
		t.Errorf("got %v", err)
	}
	d.Put()
	r.close()
}

// TestCloseNamesHolders: an audit says what is still held, and the last Put tears down.
func TestCloseNamesHolders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		d := r.open(addrA)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := r.reg.Close(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, verbs.ErrBusy) || !strings.Contains(err.Error(), "device softroce-10.0.0.1 is held by ") {
			t.Errorf("got %v", err)
		}
		d.Put()
		r.close()
	})
}

// TestReopen: an address is opened again while its last device is being torn down: the second waits.
func TestReopen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 20 {
			d := r.open(addrA)
			r.reg.remove(d, verbs.EventDeviceRemoved, false)
			d.Put()
		}
		if r.prov.opened != 20 {
			t.Errorf("opened %d times", r.prov.opened)
		}
		r.close()
	})
}

// TestReservation: completions are promised once, in as many queues as it takes.
func TestReservation(t *testing.T) {
	r := newRig(t)
	d := r.open(addrA)
	var qps []*QP
	for range 100 {
		qp, err := d.CreateQP(QPConfig{MaxSendWR: 257, MaxSendSGE: 1}, &quietHandler{})
		if err != nil {
			t.Fatal(err)
		}
		qps = append(qps, qp)
	}
	if len(d.sendCQs) < 3 {
		t.Errorf("%d queues", len(d.sendCQs))
	}
	for _, q := range d.sendCQs {
		if q.reserved > q.depth {
			t.Errorf("%d completions promised of %d", q.reserved, q.depth)
		}
	}
	if _, err := d.CreateQP(QPConfig{MaxSendWR: 1 << 20, MaxSendSGE: 1}, &quietHandler{}); err == nil {
		t.Error("a QP larger than any queue")
	}
	for _, qp := range qps {
		if err := qp.Close(); err != nil {
			t.Fatal(err)
		}
		if err := qp.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range d.sendCQs {
		if q.reserved != 0 {
			t.Errorf("%d completions still promised", q.reserved)
		}
	}
	if n := d.refs.Refs(); n != 2 {
		t.Errorf("%d references", n)
	}
	d.Put()
	r.close()
}

// connect makes a pair of QPs on two devices.
func connect(t *testing.T, da, db *Device, kind RecvKind, ha, hb QPHandler) (a, b *QP) {
	t.Helper()
	var err error
	if a, err = da.CreateQP(QPConfig{MaxSendWR: 1024, PoolWR: 16, MaxSendSGE: 1, Recv: kind}, ha); err != nil {
		t.Fatal(err)
	}
	if b, err = db.CreateQP(QPConfig{MaxSendWR: 1024, PoolWR: 16, MaxSendSGE: 1, Recv: kind}, hb); err != nil {
		t.Fatal(err)
	}
	p := verbs.ConnParam{RetryCount: 6, RNRRetryCount: 7, MinRNRTimer: 10}
	accepted := make(chan struct{})
	lis, err := db.Verbs().Listen(999, func(r verbs.ConnRequest) {
		defer close(accepted)
		if _, err := r.Accept(context.Background(), b.QP, p, nil); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	if _, _, err := da.Verbs().Connect(context.Background(), netip.AddrPortFrom(db.Addr(), 999), a.QP, p, nil); err != nil {
		t.Fatal(err)
	}
	<-accepted
	return a, b
}

// TestReceive follows receive buffers: filled, lent, put, posted again; the queue grows when it runs low, up to its
// bound, and buffers outlive their device.
func TestReceive(t *testing.T) {
	for _, kind := range []RecvKind{Large, Small} {
		t.Run(fmt.Sprint(kind.Bytes()), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rc := RecvConfig{Initial: 16, PerQP: 1, Max: 96}
				r := newRig(t, func(c *Config) { c.Small, c.Large = rc, rc })
				da, db := r.open(addrA), r.open(addrB)
				var ha, hb quietHandler
				a, b := connect(t, da, db, kind, &ha, &hb)
				chunk, err := r.slab.Alloc(4144)
				if err != nil {
					t.Fatal(err)
				}
				pool := db.large
				if kind == Small {
					pool = db.small
				}
				send := func(n int) {
					t.Helper()
					for i := range n {
						copy(chunk.Bytes(), fmt.Sprintf("message %d", i))
						sge, err := a.Device().SGE(chunk, 0, 4144)
						if err != nil {
							t.Fatal(err)
						}
						if _, err := a.PostSend([]verbs.SendWR{{ID: uint64(i), Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: []verbs.SGE{sge}}}); err != nil {
							t.Fatal(err)
						}
						time.Sleep(10 * time.Millisecond)
					}
				}
				// Put at once: no more chunks than are posted, and one or two in hand.
				for range 10 {
					send(8)
					got := hb.take()
					if len(got) != 8 {
						t.Fatalf("%d of 8 arrived", len(got))
					}
					for i, buf := range got {
						if want := fmt.Sprintf("message %d", i); string(buf.Bytes()[:len(want)]) != want {
							t.Errorf("buffer %d has %q", i, buf.Bytes()[:len(want)])
						}
						buf.Get()
						buf.Put()
						buf.Put()
					}
				}
				if s := pool.snapshot(); s.Posted != 16 || s.Live > 32 {
					t.Errorf("after putting all: %+v", s)
				}
				// Held: replaced, up to the bound, where the sender has to wait.
				send(80)
				held := hb.take()
				if len(held) != 80 {
					t.Fatalf("%d of 80 arrived", len(held))
				}
				if s := pool.snapshot(); s.Posted != 16 || s.Live != 96 || !held[0].Scarce() {
					t.Errorf("80 held: %+v, scarce %v", s, held[0].Scarce())
				}
				send(20)
				got := hb.take()
				if len(got) != 16 {
					t.Errorf("%d arrived when 16 buffers were left", len(got))
				}
				for _, buf := range append(held, got...) {
					buf.Put()
				}
				time.Sleep(time.Second) // RNR timers
				rest := hb.take()
				if len(rest) != 4 {
					t.Errorf("%d arrived when buffers came back, 4 were waiting", len(rest))
				}
				// The device goes, the application still has buffers.
				a.Close()
				b.Close()
				da.Put()
				db.Put()
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if err := r.reg.Close(ctx); err != nil {
					t.Error(err)
				}
				for _, buf := range rest {
					if len(buf.Bytes()) < 4144 || string(buf.Bytes()[:7]) != "message" {
						t.Error("a held buffer is gone with its device")
					}
					buf.Put()
				}
				chunk.Put()
				r.close()
			})
		})
	}
}

// TestPeerInvalidates: a peer's SEND with invalidate ends a key of ours. Its memory is back as soon as it is given back, without a
// request, which would fail and take the connection with it.
func TestPeerInvalidates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		da, db := r.open(addrA), r.open(addrB)
		var ha, hb quietHandler
		a, b := connect(t, da, db, Small, &ha, &hb)
		chunk, err := r.slab.Alloc(slab.Large)
		if err != nil {
			t.Fatal(err)
		}
		mem := chunk.Bytes()[:verbs.PageSize]
		send := func(from *QP, wr verbs.SendWR) {
			t.Helper()
			wr.Flags = verbs.SendSignaled
			if _, err := from.PostSend([]verbs.SendWR{wr}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		m, err := b.Pool().Map(mrpool.Request{Segs: [][]byte{mem}, Access: verbs.AccessLocalWrite | verbs.AccessRemoteRead})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
		send(a, verbs.SendWR{ID: 1, Opcode: verbs.OpSendWithInv, InvalidateRKey: m.RKey()})
		told := false
		if err := m.Unmap(func(err error) { told = err == nil }); err != nil || !told {
			t.Errorf("unmap: %v, given back at once: %v", err, told)
		}
		time.Sleep(10 * time.Millisecond)
		if s := db.Pools().Stats(); s.Pinned != 0 || s.Small.Ready != 1 {
			t.Errorf("%+v", s)
		}
		send(b, verbs.SendWR{ID: 2, Opcode: verbs.OpSend})
		got := append(ha.take(), hb.take()...)
		if len(got) != 2 {
			t.Errorf("%d messages arrived", len(got))
		}
		for _, buf := range got {
			buf.Put()
		}
		chunk.Put()
		a.Close()
		b.Close()
		da.Put()
		db.Put()
		r.close()
	})
}

// TestRefill: buffers that the slab could not give are posted when it can.
func TestRefill(t *testing.T) {
	r := newRig(t)
	var err error
	if r.slab, err = slab.New(slab.Config{MaxBytes: 2 << 20}); err != nil { // 32 large chunks
		t.Fatal(err)
	}
	r.reg.cfg.Slab = r.slab
	var taken []*slab.Chunk
	for range 28 {
		c, err := r.slab.Alloc(slab.Large)
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, c)
	}
	d := r.open(addrA)
	qp, err := d.CreateQP(QPConfig{MaxSendWR: 8, MaxSendSGE: 1}, &quietHandler{})
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Stats(); s.Large.Posted != 32-28 || s.RecvNoMemory == 0 {
		t.Errorf("%+v", s.Large)
	}
	for _, c := range taken {
		c.Put()
	}
	d.Refill()
	if s := d.Stats().Large; s.Posted != s.Target {
		t.Errorf("%+v", s)
	}
	qp.Close()
	d.Put()
	r.close()
}

// TestLimitEventGrows: the queue is made longer when the provider says that it runs low.
func TestLimitEventGrows(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Large = RecvConfig{Initial: 8, Max: 100} })
	d := r.open(addrA)
	qp, err := d.CreateQP(QPConfig{MaxSendWR: 8, MaxSendSGE: 1}, &quietHandler{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{8, 16, 32, 64, 100, 100} {
		if s := d.Stats().Large; s.Posted != want || s.Target != want {
			t.Errorf("%+v, want %d", s, want)
		}
		r.prov.last.async(verbs.AsyncEvent{Type: verbs.EventSRQLimitReached, SRQ: d.large.srq})
	}
	qp.Close()
	d.Put()
	r.close()
}

// TestEvents reach the QP they concern, all QPs of a queue that overflowed, or all of a device that failed.
func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		d := r.open(addrA)
		var h1, h2 quietHandler
		q1, err := d.CreateQP(QPConfig{MaxSendWR: 8, MaxSendSGE: 1}, &h1)
		if err != nil {
			t.Fatal(err)
		}
		q2, err := d.CreateQP(QPConfig{MaxSendWR: 8, MaxSendSGE: 1}, &h2)
		if err != nil {
			t.Fatal(err)
		}
		raise := r.prov.last.async
		raise(verbs.AsyncEvent{Type: verbs.EventQPLastWQEReached, QP: q1.QP})
		raise(verbs.AsyncEvent{Type: verbs.EventCQErr, CQ: q2.sendCQ.vcq})
		raise(verbs.AsyncEvent{Type: verbs.EventDeviceFatal})
		if fmt.Sprint(h1.events) != "[QP_LAST_WQE_REACHED CQ_ERR DEVICE_FATAL]" || fmt.Sprint(h2.events) != "[CQ_ERR DEVICE_FATAL]" {
			t.Errorf("%v, %v", h1.events, h2.events)
		}
		// A failed device is found by nobody, and lives as long as its QPs.
		part := r.epoch.Register("test")
		if r.reg.Lookup(part, addrA) != nil {
			t.Error("a failed device is found")
		}
		part.Unregister()
		q1.Close()
		q2.Close()
		d.Put()
		synctest.Wait()
		d2 := r.open(addrA)
		if d2 == d {
			t.Error("the failed device again")
		}
		d2.Put()
		r.close()
	})
}

// TestStaleCompletions: a QP that was closed brings nothing any more, and its number may be reused.
func TestStaleCompletions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		da, db := r.open(addrA), r.open(addrB)
		var ha, hb quietHandler
		a, b := connect(t, da, db, Large, &ha, &hb)
		chunk, _ := r.slab.Alloc(64)
		for i := range 500 {
			sge, _ := da.SGE(chunk, 0, 64)
			a.PostSend([]verbs.SendWR{{ID: uint64(i), Opcode: verbs.OpSend, SGs: []verbs.SGE{sge}}})
		}
		b.Close()
		got := hb.take()
		time.Sleep(time.Second)
		if more := hb.take(); len(more) != 0 {
			t.Errorf("%d receives after Close (%d before)", len(more), len(got))
		}
		for _, buf := range got {
			buf.Put()
		}
		a.Close()
		ha.mu.Lock()
		s := len(ha.sends)
		ha.mu.Unlock()
		time.Sleep(time.Second)
		if len(ha.sends) != s {
			t.Error("completions after Close")
		}
		chunk.Put()
		da.Put()
		db.Put()
		if n := da.stats.strayCompletions.Load() + db.stats.strayCompletions.Load(); n != 0 {
			t.Errorf("%d stray completions", n)
		}
		r.close()
	})
}

// TestCloseDispatchesTheRest: completions that no handler has been called for yet are dispatched by Close.
func TestCloseDispatchesTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		da := r.open(addrA)
		deafA := &r.prov.last.deaf
		db := r.open(addrB)
		deafB := &r.prov.last.deaf
		var ha, hb quietHandler
		a, b := connect(t, da, db, Large, &ha, &hb)
		deafA.Store(true)
		deafB.Store(true)
		chunk, _ := r.slab.Alloc(64)
		for i := range 5 {
			sge, _ := da.SGE(chunk, 0, 64)
			a.PostSend([]verbs.SendWR{{ID: uint64(i), Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: []verbs.SGE{sge}}})
		}
		time.Sleep(time.Second)
		if len(hb.bufs) != 0 || len(ha.sends) != 0 {
			t.Fatal("handlers are called")
		}
		a.Close()
		b.Close()
		if len(hb.bufs) != 5 || len(ha.sends) != 5 {
			t.Errorf("%d receives, %d sends dispatched, 5 and 5 were there", len(hb.bufs), len(ha.sends))
		}
		for _, buf := range hb.take() {
			buf.Put()
		}
		chunk.Put()
		da.Put()
		db.Put()
		r.close()
	})
}

// TestPutTwicePanics: an error of ours.
func TestPutTwicePanics(t *testing.T) {
	b := &RecvBuf{}
	for what, f := range map[string]func(){"put twice": b.Put, "revived": b.Get} {
		func() {
			defer func() {
				if p := recover(); p == nil || !strings.HasPrefix(fmt.Sprint(p), "BUG:") {
					t.Errorf("%s: %v", what, p)
				}
				b.refs.Store(0)
			}()
			f()
		}()
	}
}

// BenchmarkRegistryLookup finds a device and puts its reference, on distinct devices.
func BenchmarkRegistryLookup(b *testing.B) {
	r := newRig(b)
	addrs := make([]netip.Addr, 16)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		r.open(addrs[i]).Put()
	}
	var mu sync.Mutex
	next := 0
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		mu.Lock()
		a := addrs[next%len(addrs)]
		next++
		mu.Unlock()
		p := r.epoch.Register("bench")
		defer p.Unregister()
		for pb.Next() {
			r.reg.Lookup(p, a).Put()
		}
	})
	b.StopTimer()
	r.close()
}
