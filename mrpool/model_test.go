package mrpool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/openrds/openrds/verbs"
)

// model is what the pools must look like, kept by the simplest means.
type model struct {
	t  *rapid.T
	r  *rig
	qs []*modelQP

	held  []*modelMap // mappings their owners have
	given []*modelMap // given back, the owner not told yet
	room  []bool      // pages of r.mem in use, or not known to be free
	over  bool        // it has failed, or was cut short to find a smaller failure
}

type modelQP struct {
	q     *QP
	f     *fakeQP
	marks []modelMark
	next  uint64 // identifier of the connection's next request
}

// modelMark is a signaled request of the connection's.
type modelMark struct {
	id   uint64
	mark uint32
}

type modelMap struct {
	m      Mapping
	at, n  int
	q      *modelQP
	told   int
	window bool
}

const modelPages = 256

func (m *model) memory(n int) int {
	for at := 0; at+n <= modelPages; at++ {
		if !slices.Contains(m.room[at:at+n], true) {
			return at
		}
	}
	return -1
}

func (m *model) use(x *modelMap, v bool) {
	for i := x.at; i < x.at+x.n; i++ {
		m.room[i] = v
	}
}

func (m *model) open() *modelQP {
	q, f := m.r.qp(rapid.IntRange(4, 12).Draw(m.t, "requests"))
	return &modelQP{q: q, f: f}
}

// completions hands out what a queue has completed, as a connection does.
func (m *model) completions(q *modelQP, n int) {
	wcs := q.f.run(n)
	for i := range wcs {
		wc := &wcs[i]
		if q.q.Completion(wc) {
			continue
		}
		for len(q.marks) > 0 && q.marks[0].id < wc.ID {
			q.marks = q.marks[1:]
		}
		if len(q.marks) > 0 && q.marks[0].id == wc.ID && wc.Status == verbs.WCSuccess {
			q.q.Passed(q.marks[0].mark)
		}
	}
}

func (m *model) mapOne(t *rapid.T) {
	q := rapid.SampledFrom(m.qs).Draw(t, "qp")
	n := rapid.SampledFrom([]int{1, 1, 2, 3, 4, 9}).Draw(t, "pages")
	x := &modelMap{n: n, at: m.memory(n), q: q}
	if x.at < 0 {
		t.Skip("no memory")
	}
	req := Request{Segs: m.r.pages(x.at, n), Access: rw}
	if n == 9 { // in two pieces that do not adjoin in the slice's sense
		req.Segs = [][]byte{req.Segs[0][:4*verbs.PageSize], req.Segs[0][4*verbs.PageSize:]}
	}
	var err error
	if x.m, err = q.q.Map(req); err == nil {
		m.use(x, true)
		m.held = append(m.held, x)
	} else if !errors.Is(err, ErrPoolExhausted) && !errors.Is(err, ErrQueueFull) && !errors.Is(err, ErrQPLost) && !errors.Is(err, errFault) && !errors.Is(err, verbs.ErrSQFull) {
		t.Fatalf("map: %v", err)
	}
}

func (m *model) register(t *rapid.T) {
	x := &modelMap{n: 5, at: m.memory(5)}
	if x.at < 0 {
		t.Skip("no memory")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Microsecond)
	defer cancel()
	var err error
	if x.m, err = m.r.ps.Register(ctx, m.r.pages(x.at, x.n)[0], 0, rw|verbs.AccessMWBind); err == nil {
		m.use(x, true)
		m.held = append(m.held, x)
	} else if !errors.Is(err, ErrPoolExhausted) && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errFault) {
		t.Fatalf("register: %v", err)
	}
}

// window binds over the middle page of a registration. Its memory is the registration's to account for.
func (m *model) window(t *rapid.T) {
	for _, over := range m.held {
		if over.q != nil || over.window {
			continue
		}
		q := rapid.SampledFrom(m.qs).Draw(t, "qp")
		x := &modelMap{at: over.at + 2, n: 1, q: q, window: true}
		var err error
		if x.m, err = q.q.Map(Request{Segs: m.r.pages(x.at, 1), Access: rw, Over: over.m}); err == nil {
			m.held = append(m.held, x)
		}
		return
	}
	t.Skip("no registration")
}

func (m *model) giveBack(t *rapid.T) {
	if len(m.held) == 0 {
		t.Skip("nothing mapped")
	}
	i := rapid.IntRange(0, len(m.held)-1).Draw(t, "mapping")
	lazily := rapid.Bool().Draw(t, "lazily")
	m.back(i, lazily)
}

func (m *model) back(i int, lazily bool) {
	x := m.held[i]
	m.held = slices.Delete(m.held, i, i+1)
	m.given = append(m.given, x)
	done := func(err error) {
		if x.told++; m.over {
			return
		}
		if err != nil {
			m.t.Fatalf("told: %v", err)
		}
		if !x.window {
			m.use(x, false)
			if m.r.pd.reaches(m.r.pages(x.at, x.n)[0]) {
				m.t.Fatalf("told, and the peer reaches the memory: %+v", *x)
			}
		}
	}
	var err error
	if lazily {
		err = x.m.Free(done)
	} else {
		err = x.m.Unmap(done)
	}
	if err != nil {
		m.t.Fatalf("give back: %v", err)
	}
}

// check compares everything.
func (m *model) check(t *rapid.T) {
	synctest.Wait()
	m.given = slices.DeleteFunc(m.given, func(x *modelMap) bool {
		if x.told > 1 {
			t.Fatalf("told %d times: %+v", x.told, *x)
		}
		return x.told == 1
	})
	ps := m.r.ps
	// Pinned is what is mapped and what owners have not been told of.
	var pinned int64
	for _, x := range m.given {
		pinned += int64(x.n) * verbs.PageSize
	}
	for _, x := range m.held {
		if gen, s := x.m.it.load(); gen != x.m.gen || s != stMapped && s != stLost && s != stDead {
			t.Fatalf("a mapping that is held is %v, generation %d, not %d", s, gen, x.m.gen)
		} else if s != stDead {
			pinned += int64(x.n) * verbs.PageSize
		}
		if x.m.Valid() && (x.q == nil || !x.q.f.gone && x.q.f.outstanding() == 0 && !x.q.f.err) && !m.r.pd.reaches(m.r.pages(x.at, x.n)[0]) {
			t.Fatalf("a mapping that is valid reaches nothing: %+v", *x)
		}
	}
	// Recovery unpins before it is through with a region; all else is exact.
	if got := ps.Stats().Pinned; got != pinned {
		t.Fatalf("%d bytes pinned, want %d (held %d, given back %d)", got, pinned, len(m.held), len(m.given))
	}
	refs := int64(1 + len(m.held))
	for _, p := range ps.pools() {
		for _, w := range []*worker{p.flush, p.recovery} {
			w.mu.Lock()
			if w.running {
				refs++
			}
			w.mu.Unlock()
		}
		m.places(t, p)
	}
	if got := m.r.dev.Refs(); got != refs {
		t.Fatalf("%d references to the device, want %d", got, refs)
	}
}

// places checks that each item is where its state says, in one place.
func (m *model) places(t *rapid.T, p *pool) {
	where := make(map[*item]string)
	put := func(it *item, place string, states ...state) {
		if where[it] != "" {
			t.Fatalf("pool %s: item %d is on %s and on %s", p.name, it.index, where[it], place)
		}
		where[it] = place
		if s := it.state(); !slices.Contains(states, s) {
			t.Fatalf("pool %s: item %d on %s is %v", p.name, it.index, place, s)
		}
	}
	walk := func(s *stack, place string, states ...state) (n int) {
		for i := uint32(s.head.Load() & stackIndexMask); i != 0; n++ {
			it := p.item(i - 1)
			put(it, place, states...)
			i = it.next.Load()
		}
		return n
	}
	free := 0
	for k := range p.free {
		free += walk(&p.free[k], fmt.Sprint("free ", k), stFree)
	}
	walk(&p.empty, "empty", stEmpty)
	dirty := walk(&p.dirty, "dirty", stFreed)
	walk(&p.stale, "stale", stStale, stLost)
	for _, q := range m.qs {
		q.q.mu.Lock()
		var own, pending, flushed []*item
		for k := range q.q.own[p.class] {
			l := &q.q.own[p.class][k]
			for i := l.first; i != l.last; i++ {
				own = append(own, l.ring[i&uint32(len(l.ring)-1)])
			}
		}
		for _, it := range q.q.pending {
			if it.pool == p {
				pending = append(pending, it)
			}
		}
		for i := q.q.head; i != q.q.tail; i++ {
			if o := &q.q.ring[i&uint32(len(q.q.ring)-1)]; o.it.pool == p && o.batch != nil {
				flushed = append(flushed, o.it)
			}
		}
		q.q.mu.Unlock()
		for place, its := range map[string][]*item{"own list": own, "pending": pending, "flush": flushed} {
			for _, it := range its {
				put(it, place, stInvalid)
			}
		}
	}
	for _, x := range m.held {
		if x.m.it.pool == p && where[x.m.it] == "" {
			put(x.m.it, "owner", stMapped, stLost, stDead)
		}
	}
	for i := range p.items {
		it := p.item(uint32(i))
		// In a worker's hands, or under a window.
		if where[it] == "" && it.state() != stStale && !(it.state() == stInvalid || it.state() == stFreed) {
			t.Fatalf("pool %s: item %d, %v, is nowhere", p.name, it.index, it.state())
		}
		if where[it] == "" && it.kind != byRegistration && it.state() != stStale {
			w := p.flush
			w.mu.Lock()
			running := w.running
			w.mu.Unlock()
			if !running {
				t.Fatalf("pool %s: item %d, %v, is nowhere", p.name, it.index, it.state())
			}
		}
	}
	if s := p.snapshot(); s.Ready != int64(free) || s.Dirty != int64(dirty) || s.Items > p.cfg.MaxItems {
		t.Fatalf("pool %s: %d free, %d dirty, but %+v", p.name, free, dirty, s)
	}
}

func (m *model) end() {
	m.r.pd.failNth(0)
	m.r.pd.denyNext(0)
	for len(m.held) > 0 {
		m.back(len(m.held)-1, false)
	}
	for _, q := range m.qs {
		if !q.f.gone {
			m.completions(q, -1)
			gone(q.q, q.f)
		}
	}
	time.Sleep(time.Minute)
	m.r.ps.Flush(context.Background())
	m.check(m.t)
	if len(m.given) != 0 {
		m.t.Fatalf("%d owners were never told", len(m.given))
	}
}

// TestModel compares pools with a model under random mapping, giving back, execution, flushing, refused calls, and loss
// of queue pairs.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var failed any
		synctest.Test(t, func(t *testing.T) {
			// A panic (rapid's way to fail) may not leave the bubble.
			m := &model{t: rt, room: make([]bool, modelPages)}
			defer func() {
				if failed = recover(); failed != nil && m.r != nil {
					m.over = true
					m.r.ps.Close()
				}
			}()
			m.r = newRig(rt, func(c *Config) {
				c.Small.MaxItems = rapid.IntRange(2, 12).Draw(rt, "8k regions")
				c.Large.MaxItems = rapid.IntRange(1, 5).Draw(rt, "1m regions")
				c.Small.FlushItems = rapid.IntRange(1, 4).Draw(rt, "threshold")
				c.Small.MaxFree = rapid.IntRange(0, 3).Draw(rt, "kept free")
				c.MaxPinned = int64(rapid.IntRange(8, 64).Draw(rt, "pages pinned")) * verbs.PageSize
			})
			for range 3 {
				m.qs = append(m.qs, m.open())
			}
			pick := func() *modelQP { return rapid.SampledFrom(m.qs).Draw(rt, "qp") }
			rt.Repeat(map[string]func(*rapid.T){
				"":          m.check,
				"map":       m.mapOne,
				"map too":   m.mapOne,
				"register":  m.register,
				"window":    m.window,
				"give back": m.giveBack,
				"execute":   func(rt *rapid.T) { m.completions(pick(), rapid.IntRange(1, 9).Draw(rt, "requests")) },
				"send": func(*rapid.T) {
					if q := pick(); q.f.outstanding() < q.f.depth-16 {
						q.next++
						q.marks = append(q.marks, modelMark{q.next, q.q.Mark()})
						m.r.pd.failNth(0)
						q.f.post(q.next, verbs.SendSignaled)
					}
				},
				"flush": func(*rapid.T) {
					for _, p := range m.r.ps.pools() {
						p.flush.kick()
					}
				},
				"time":          func(*rapid.T) { time.Sleep(flushBound) },
				"refuse a call": func(rt *rapid.T) { m.r.pd.failNth(rapid.IntRange(1, 4).Draw(rt, "nth")) },
				"hold a region": func(rt *rapid.T) { m.r.pd.denyNext(rapid.IntRange(1, 3).Draw(rt, "attempts")) },
				"break":         func(*rapid.T) { pick().f.breaks() },
				"replace": func(rt *rapid.T) {
					i := rapid.IntRange(0, len(m.qs)-1).Draw(rt, "qp")
					if rapid.Bool().Draw(rt, "drained") {
						m.qs[i].f.breaks()
						m.completions(m.qs[i], -1)
					}
					m.qs[i].f.destroy()
					m.qs[i].q.Close()
					m.qs[i] = m.open()
				},
			})
			m.end()
			m.r.shut()
		})
		switch {
		case failed == nil:
		case fmt.Sprintf("%T", failed) == "rapid.invalidData": // on the way to a smaller failure
			rt.Skip(failed)
		default:
			rt.Fatal(failed)
		}
	})
}
