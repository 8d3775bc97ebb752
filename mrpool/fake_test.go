package mrpool

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/ref"
	"github.com/openrds/openrds/verbs"
)

func TestMain(m *testing.M) { leak.Main(m) }

var errFault = errors.New("fault asked for by a test")

// fakePD is a protection domain whose queues do nothing until a test says so. It keeps the rules of the memory work requests
// (rocev2 spec 6.5) and knows at any time which memory a peer could reach.
type fakePD struct {
	verbs.PD // nil: the pools call nothing else

	mu    sync.Mutex
	idx   uint32
	mrs   map[uint32]*fakeMR // by index
	lists int
	calls int // that may fail
	fail  int // the n-th from now does; 0: none
	deny  int // deregistrations that fail
}

func newFakePD() *fakePD { return &fakePD{mrs: make(map[uint32]*fakeMR)} }

// callLocked counts a call that may fail.
func (p *fakePD) callLocked() error {
	p.calls++
	if p.fail > 0 {
		if p.fail--; p.fail == 0 {
			return errFault
		}
	}
	return nil
}

func (p *fakePD) failNth(n int) {
	p.mu.Lock()
	p.fail = n
	p.mu.Unlock()
}

// denyNext makes the next n deregistrations fail.
func (p *fakePD) denyNext(n int) {
	p.mu.Lock()
	p.deny = n
	p.mu.Unlock()
}

type fakeMR struct {
	pd    *fakePD
	fast  bool
	pages int
	win   bool // it is a window
	qp    *fakeQP
	over  *fakeMR
	bound int
	key   uint32
	valid bool
	segs  [][]byte
	iova  uint64
	gone  bool
}

func (p *fakePD) addLocked(m *fakeMR) *fakeMR {
	p.idx++
	m.pd, m.key = p, p.idx<<8|0xfe // variants come round soon
	p.mrs[p.idx] = m
	return m
}

func (p *fakePD) RegMR(mem []byte, iova uint64, _ verbs.Access) (verbs.MR, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.callLocked(); err != nil {
		return nil, err
	}
	return p.addLocked(&fakeMR{valid: true, segs: [][]byte{mem}, iova: iova}), nil
}

func (p *fakePD) AllocFastRegMR(pages int) (verbs.MR, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.callLocked(); err != nil {
		return nil, err
	}
	return p.addLocked(&fakeMR{fast: true, pages: pages}), nil
}

func (p *fakePD) AllocMW(verbs.MWType) (verbs.MW, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.callLocked(); err != nil {
		return nil, err
	}
	return fakeMW{p.addLocked(&fakeMR{win: true})}, nil
}

func (p *fakePD) AllocPageList(pages int) (verbs.PageList, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.callLocked(); err != nil {
		return nil, err
	}
	p.lists++
	return &fakeList{pd: p, max: pages}, nil
}

func (m *fakeMR) LKey() verbs.LKey { return verbs.LKey(m.RKey()) }
func (m *fakeMR) Addr() uint64     { return m.iova }
func (m *fakeMR) Len() int         { return 0 }
func (m *fakeMR) RKey() verbs.RKey {
	m.pd.mu.Lock()
	defer m.pd.mu.Unlock()
	return verbs.RKey(m.key)
}

func (m *fakeMR) Deregister() error {
	p := m.pd
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.gone {
		return nil
	}
	if m.bound > 0 {
		return &verbs.BusyError{Object: "region", Holders: []string{"a window"}}
	}
	if err := p.callLocked(); err != nil {
		return &verbs.BusyError{Object: "region", Holders: []string{err.Error()}}
	}
	if p.deny > 0 {
		p.deny--
		return &verbs.BusyError{Object: "region", Holders: []string{"the test"}}
	}
	m.gone, m.valid, m.segs = true, false, nil
	if m.over != nil {
		m.over.bound--
		m.over = nil
	}
	delete(p.mrs, m.key>>8)
	return nil
}

type fakeMW struct{ *fakeMR }

func (w fakeMW) Type() verbs.MWType { return verbs.MWType2B }
func (w fakeMW) Dealloc() error     { return w.Deregister() }

type fakeList struct {
	pd   *fakePD
	max  int
	segs [][]byte
	busy bool
	gone bool
}

func (l *fakeList) Set(segs [][]byte) error {
	l.pd.mu.Lock()
	defer l.pd.mu.Unlock()
	if err := l.pd.callLocked(); err != nil {
		return err
	}
	if l.busy {
		return verbs.ErrBusy
	}
	if l.gone {
		return verbs.ErrClosed
	}
	l.segs = append(l.segs[:0], segs...)
	return nil
}
func (l *fakeList) Len() int   { return 0 }
func (l *fakeList) Pages() int { return 0 }
func (l *fakeList) Cap() int   { return l.max }
func (l *fakeList) Close() error {
	l.pd.mu.Lock()
	defer l.pd.mu.Unlock()
	if l.busy {
		return verbs.ErrBusy
	}
	if !l.gone {
		l.gone = true
		l.pd.lists--
	}
	return nil
}

// reaches reports whether a peer could touch b.
func (p *fakePD) reaches(b []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.mrs {
		if !m.valid {
			continue
		}
		for _, s := range m.segs {
			if overlap(s, b) {
				return true
			}
		}
	}
	return false
}

func overlap(a, b []byte) bool {
	x, y := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return x < y+uintptr(len(b)) && y < x+uintptr(len(a))
}

// fakeQP is a send queue that stands still.
type fakeQP struct {
	verbs.QP
	pd    *fakePD
	num   verbs.QPN
	depth int

	mu    sync.Mutex
	queue []fakeWR
	done  []verbs.WC
	err   bool
	gone  bool

	refuses bool // posts
	refused int
}

// refuse makes posts fail, or ends that.
func (q *fakeQP) refuse(on bool) {
	q.mu.Lock()
	q.refuses = on
	q.mu.Unlock()
}

type fakeWR struct {
	wr   verbs.SendWR
	list *fakeList
	segs [][]byte
	fr   verbs.FastReg
	bind verbs.MWBind
}

func (q *fakeQP) Num() verbs.QPN { return q.num }

func (q *fakeQP) PostSend(wrs []verbs.SendWR) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pd.mu.Lock()
	defer q.pd.mu.Unlock()
	if q.gone {
		return 0, verbs.ErrClosed
	}
	if q.refuses {
		q.refused++
		return 0, errFault
	}
	for i := range wrs {
		if err := q.pd.callLocked(); err != nil {
			return i, err
		}
		if len(q.queue) >= q.depth {
			return i, verbs.ErrSQFull
		}
		w := fakeWR{wr: wrs[i]}
		if f := wrs[i].FastReg; f != nil {
			w.fr = *f
			w.list = f.Pages.(*fakeList)
			if w.list.busy {
				return i, verbs.ErrBusy
			}
			w.list.busy = true
			w.segs = slices.Clone(w.list.segs)
		}
		if b := wrs[i].Bind; b != nil {
			w.bind = *b
		}
		q.queue = append(q.queue, w)
	}
	return len(wrs), nil
}

// post adds a request of the connection's.
func (q *fakeQP) post(id uint64, flags verbs.SendFlags) {
	if _, err := q.PostSend([]verbs.SendWR{{ID: id, Opcode: verbs.OpSend, Flags: flags}}); err != nil {
		panic(err)
	}
}

func (q *fakeQP) outstanding() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.queue)
}

// run executes up to n requests, the rest if n < 0, and returns the completions there are now.
func (q *fakeQP) run(n int) []verbs.WC {
	q.mu.Lock()
	defer q.mu.Unlock()
	for ; n != 0 && len(q.queue) > 0; n-- {
		w := q.queue[0]
		q.queue = q.queue[1:]
		status := verbs.WCFlushErr
		if !q.err {
			status = q.pd.execute(q, &w)
		}
		if w.list != nil {
			q.pd.mu.Lock()
			w.list.busy = false
			q.pd.mu.Unlock()
		}
		if status != verbs.WCSuccess {
			q.err = true
		}
		if status != verbs.WCSuccess || w.wr.Flags&verbs.SendSignaled != 0 {
			q.done = append(q.done, verbs.WC{ID: w.wr.ID, Status: status, QPN: q.num})
		}
	}
	wcs := q.done
	q.done = nil
	return wcs
}

func (q *fakeQP) breaks() {
	q.mu.Lock()
	q.err = true
	q.mu.Unlock()
}

// destroy makes the requests vanish.
func (q *fakeQP) destroy() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pd.mu.Lock()
	defer q.pd.mu.Unlock()
	for _, w := range q.queue {
		if w.list != nil {
			w.list.busy = false
		}
	}
	q.queue, q.done, q.gone = nil, nil, true
}

func (p *fakePD) execute(q *fakeQP, w *fakeWR) verbs.WCStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch w.wr.Opcode {
	case verbs.OpFastRegMR:
		m := w.fr.MR.(*fakeMR)
		if m.gone || m.valid || !m.fast || m.key>>8 != uint32(w.fr.Key)>>8 {
			return verbs.WCLocQPOpErr
		}
		m.valid, m.key, m.segs, m.iova = true, uint32(w.fr.Key), w.segs, w.fr.IOVA
	case verbs.OpBindMW:
		m := w.bind.MW.(fakeMW).fakeMR
		over := w.bind.MR.(*fakeMR)
		if m.gone || m.valid || over.gone || m.key>>8 != uint32(w.bind.Key)>>8 {
			return verbs.WCMWBindErr
		}
		off := w.bind.Addr - over.iova
		m.valid, m.key, m.qp, m.over = true, uint32(w.bind.Key), q, over
		m.segs = [][]byte{over.segs[0][off : off+w.bind.Length]}
		over.bound++
	case verbs.OpLocalInv:
		m := p.mrs[uint32(w.wr.InvalidateRKey)>>8]
		if m == nil || !m.valid || m.key != uint32(w.wr.InvalidateRKey) || !m.fast && !m.win {
			return verbs.WCLocQPOpErr
		}
		m.valid, m.segs = false, nil
		if m.over != nil {
			m.over.bound--
			m.over = nil
		}
	}
	return verbs.WCSuccess
}

// tb is a *testing.T, *testing.B or *rapid.T.
type tb interface {
	Helper()
	Error(...any)
	Errorf(string, ...any)
	Fatal(...any)
	Fatalf(string, ...any)
}

// rig is pools over a fakePD, with a device that is counted.
type rig struct {
	t     tb
	pd    *fakePD
	ps    *Pools
	epoch *epoch.Domain
	dev   *ref.Count
	down  chan error // the teardown, started by the last reference
	mem   []byte     // page aligned
	qpn   verbs.QPN
}

const fakeCaps = verbs.CapMemMgtExtensions | verbs.CapMW2B

func newRig(t tb, mod ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, pd: newFakePD(), epoch: epoch.NewDomain(), dev: new(ref.Count), down: make(chan error, 1)}
	b := make([]byte, 2<<20+verbs.PageSize)
	off := -uintptr(unsafe.Pointer(&b[0])) & (verbs.PageSize - 1)
	r.mem = b[off : off+2<<20]
	cfg := Config{PD: r.pd, Attr: verbs.DeviceAttr{Caps: fakeCaps, MaxFastRegPageListLen: 512, MaxMR: 1 << 20}, Epoch: r.epoch, Ref: r.dev}
	for _, f := range mod {
		f(&cfg)
	}
	var err error
	if r.ps, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.dev.Init(func() { go func() { r.down <- r.ps.Close() }() })
	return r
}

// shut drops the device's reference and waits for the teardown, which must find everything given back.
func (r *rig) shut() {
	r.t.Helper()
	r.dev.Put()
	if err := <-r.down; err != nil {
		r.t.Errorf("close: %v", err)
	}
	r.clean()
}

// clean checks that nothing is left after Close.
func (r *rig) clean() {
	r.t.Helper()
	if err := r.ps.Close(); err != nil {
		r.t.Errorf("second close: %v", err)
	}
	if err := r.epoch.Close(); err != nil {
		r.t.Error(err)
	}
	if n := len(r.pd.mrs); n != 0 {
		r.t.Errorf("%d regions are left on the device", n)
	}
	if r.pd.lists != 0 {
		r.t.Errorf("%d page lists are left on the device", r.pd.lists)
	}
	s := r.ps.Stats()
	if s.Pinned != 0 || s.Small.Pinned != 0 || s.Large.Pinned != 0 || s.Small.Mapped != 0 || s.Large.Mapped != 0 {
		r.t.Errorf("left: %+v", s)
	}
	if s.Misuse != 0 || s.StrayWCs != 0 {
		r.t.Errorf("misuse %d, stray completions %d", s.Misuse, s.StrayWCs)
	}
	for _, p := range []*PoolStats{&s.Small, &s.Large} {
		if p.Alloc != p.Free {
			r.t.Errorf("%d regions allocated, %d freed", p.Alloc, p.Free)
		}
	}
}

// qp makes a queue pair with n requests for the pools.
func (r *rig) qp(n int) (*QP, *fakeQP) {
	r.qpn++
	f := &fakeQP{pd: r.pd, num: r.qpn, depth: n + 256}
	return r.ps.NewQP(f, n), f
}

// pages is n pages of memory from page at.
func (r *rig) pages(at, n int) [][]byte {
	return [][]byte{r.mem[at*verbs.PageSize : (at+n)*verbs.PageSize : (at+n)*verbs.PageSize]}
}

const rw = verbs.AccessLocalWrite | verbs.AccessRemoteRead | verbs.AccessRemoteWrite

func (r *rig) mustMap(q *QP, at, n int) Mapping {
	r.t.Helper()
	m, err := q.Map(Request{Segs: r.pages(at, n), Access: rw})
	if err != nil {
		r.t.Fatalf("map: %v", err)
	}
	return m
}

func (r *rig) mustUnmap(m Mapping, done func(error)) {
	r.t.Helper()
	if err := m.Unmap(done); err != nil {
		r.t.Fatalf("unmap: %v", err)
	}
}

// give hands completions to the pools.
func give(q *QP, wcs []verbs.WC) {
	for i := range wcs {
		q.Completion(&wcs[i])
	}
}

// gone ends a queue pair the way a connection does.
func gone(q *QP, f *fakeQP) {
	f.breaks()
	give(q, f.run(-1))
	f.destroy()
	q.Close()
}

// within runs f, which must end soon.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		b := make([]byte, 1<<20)
		t.Fatalf("%s does not end\n%s", what, b[:runtime.Stack(b, true)])
	}
}
