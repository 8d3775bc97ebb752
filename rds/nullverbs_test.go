package rds

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// nullVerbs is a provider that costs next to nothing: a SEND is one copy into the buffer at the head of the peer's
// shared receive queue, in the goroutine that calls Progress. What a datagram costs over it is the price of everything
// above verbs. It does RC SENDs between devices of one nullVerbs, and no more than conn needs.
type nullVerbs struct {
	role sync.Mutex // of whoever does the work; handlers run under it

	mu   sync.Mutex
	devs map[netip.Addr]*nullDev
	nQPs int

	dirtyMu sync.Mutex
	qps     []*nullQP // with something posted
	cqs     []*nullCQ // with completions
	qpsRun  []*nullQP // the role's, as the next
	cqsRun  []*nullCQ
	stop    chan struct{}
	stopped chan struct{}
}

// newNullVerbs starts an engine that looks every millisecond for what nobody waits for.
func newNullVerbs(t testing.TB) *nullVerbs {
	n := &nullVerbs{devs: make(map[netip.Addr]*nullDev), stop: make(chan struct{}), stopped: make(chan struct{})}
	go func() {
		defer close(n.stopped)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				n.work()
			case <-n.stop:
				return
			}
		}
	}()
	t.Cleanup(func() { close(n.stop); <-n.stopped })
	return n
}

func (n *nullVerbs) Name() string { return "null" }

func (n *nullVerbs) OpenDevice(addr netip.Addr) (verbs.Device, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := &nullDev{n: n, addr: addr, listeners: make(map[uint16]func(verbs.ConnRequest))}
	n.devs[addr] = d
	return d, nil
}

// work does what there is to do once and reports whether there was anything.
func (n *nullVerbs) work() bool {
	if !n.role.TryLock() {
		return false
	}
	defer n.role.Unlock()
	did := false
	n.dirtyMu.Lock()
	n.qpsRun, n.qps = n.qps, n.qpsRun[:0]
	n.dirtyMu.Unlock()
	for _, qp := range n.qpsRun {
		did = qp.send() || did
	}
	n.dirtyMu.Lock()
	n.cqsRun, n.cqs = n.cqs, n.cqsRun[:0]
	n.dirtyMu.Unlock()
	for _, cq := range n.cqsRun {
		if cq.due() {
			did = true
			cq.handler(cq)
		}
	}
	return did
}

type nullDev struct {
	n         *nullVerbs
	addr      netip.Addr
	mrs       atomic.Pointer[[]*nullMR] // by lkey
	listeners map[uint16]func(verbs.ConnRequest)
}

func (d *nullDev) Name() string                           { return "null/" + d.addr.String() }
func (d *nullDev) Addr() netip.Addr                       { return d.addr }
func (d *nullDev) Progress() bool                         { return d.n.work() }
func (d *nullDev) Park()                                  {}
func (d *nullDev) Stats() map[string]uint64               { return nil }
func (d *nullDev) Close() error                           { return nil }
func (d *nullDev) SetAsyncHandler(func(verbs.AsyncEvent)) {}
func (d *nullDev) AllocPD() (verbs.PD, error)             { return nullPD{d: d}, nil }

func (d *nullDev) Attr() verbs.DeviceAttr {
	return verbs.DeviceAttr{MaxQP: 1 << 20, MaxQPWR: 1 << 16, MaxSGE: 64, MaxCQ: 1 << 16, MaxCQE: 1 << 20, MaxSRQ: 1 << 16, MaxSRQWR: 1 << 20,
		MaxMR: 1 << 20, MaxMRBytes: 1 << 40, MaxMsgBytes: 1 << 30, ActiveMTU: verbs.MTU4096, PreferredMsg: 61440}
}

func (d *nullDev) CreateCQ(cfg verbs.CQConfig) (verbs.CQ, error) {
	return &nullCQ{n: d.n, handler: cfg.Handler}, nil
}

// Connect asks the listener; connection management is a function call.
func (d *nullDev) Connect(ctx context.Context, remote netip.AddrPort, qp verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, verbs.Connected, error) {
	d.n.mu.Lock()
	var handler func(verbs.ConnRequest)
	if peer := d.n.devs[remote.Addr()]; peer != nil {
		handler = peer.listeners[remote.Port()]
	}
	d.n.mu.Unlock()
	if handler == nil {
		return nil, verbs.Connected{}, verbs.ErrRefused
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			return nil, verbs.Connected{}, err
		}
	}
	req := &nullRequest{from: qp.(*nullQP), remote: netip.AddrPortFrom(d.addr, 1), local: remote, answer: make(chan nullAnswer, 1),
		info: verbs.Connected{PrivateData: padded(p.PrivateData, 56), PathMTU: verbs.MTU4096}}
	go handler(req)
	select {
	case a := <-req.answer:
		if a.err != nil {
			return nil, verbs.Connected{}, a.err
		}
		return a.ep, a.info, nil
	case <-ctx.Done():
		return nil, verbs.Connected{}, ctx.Err()
	}
}

func padded(p []byte, n int) []byte {
	out := make([]byte, n)
	copy(out, p)
	return out
}

func (d *nullDev) Listen(port uint16, handler func(verbs.ConnRequest)) (verbs.Listener, error) {
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	d.listeners[port] = handler
	return nullListener{d, port}, nil
}

type nullListener struct {
	d    *nullDev
	port uint16
}

func (l nullListener) Close() error {
	l.d.n.mu.Lock()
	defer l.d.n.mu.Unlock()
	delete(l.d.listeners, l.port)
	return nil
}

type nullAnswer struct {
	ep   verbs.Endpoint
	info verbs.Connected
	err  error
}

type nullRequest struct {
	from          *nullQP
	remote, local netip.AddrPort
	info          verbs.Connected
	answer        chan nullAnswer
}

func (r *nullRequest) Remote() netip.AddrPort { return r.remote }
func (r *nullRequest) Local() netip.AddrPort  { return r.local }
func (r *nullRequest) Info() verbs.Connected  { return r.info }

func (r *nullRequest) Accept(_ context.Context, vqp verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, error) {
	if prepare != nil {
		if err := prepare(); err != nil {
			return nil, err
		}
	}
	qp := vqp.(*nullQP)
	done := make(chan struct{})
	ends := &nullEnds{done: done, qps: [2]*nullQP{r.from, qp}}
	for i, q := range ends.qps {
		q.mu.Lock()
		q.peer, q.state = ends.qps[1-i], verbs.StateRTS
		q.mu.Unlock()
	}
	r.answer <- nullAnswer{ep: nullEndpoint{ends, netip.AddrPort{}, r.local},
		info: verbs.Connected{PrivateData: padded(p.PrivateData, 196), PathMTU: verbs.MTU4096, PeerQPN: qp.num}}
	return nullEndpoint{ends, r.local, r.remote}, nil
}

func (r *nullRequest) Reject(p []byte) error {
	r.answer <- nullAnswer{err: &verbs.RejectError{Reason: 28, PrivateData: padded(p, 148)}}
	return nil
}

type nullEnds struct {
	once sync.Once
	done chan struct{}
	qps  [2]*nullQP
}

type nullEndpoint struct {
	*nullEnds
	local, remote netip.AddrPort
}

func (e nullEndpoint) Local() netip.AddrPort  { return e.local }
func (e nullEndpoint) Remote() netip.AddrPort { return e.remote }
func (e nullEndpoint) Done() <-chan struct{}  { return e.done }
func (e nullEndpoint) Disconnect() error {
	e.once.Do(func() {
		for _, q := range e.qps {
			q.SetError()
		}
		close(e.done)
	})
	return nil
}

// nullPD has what RDS needs; the rest is missing.
type nullPD struct {
	verbs.PD
	d *nullDev
}

func (pd nullPD) Close() error { return nil }

func (pd nullPD) RegMR(mem []byte, iova uint64, _ verbs.Access) (verbs.MR, error) {
	d := pd.d
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	var mrs []*nullMR
	if p := d.mrs.Load(); p != nil {
		mrs = *p
	} else {
		mrs = []*nullMR{nil}
	}
	mr := &nullMR{mem: mem, iova: iova, key: verbs.LKey(len(mrs))}
	mrs = append(mrs, mr)
	d.mrs.Store(&mrs)
	return mr, nil
}

func (d *nullDev) at(s verbs.SGE) []byte {
	mr := (*d.mrs.Load())[s.LKey]
	return mr.mem[s.Addr-mr.iova:][:s.Length]
}

type nullMR struct {
	mem  []byte
	iova uint64
	key  verbs.LKey
}

func (m *nullMR) LKey() verbs.LKey  { return m.key }
func (m *nullMR) RKey() verbs.RKey  { return 0 }
func (m *nullMR) Addr() uint64      { return m.iova }
func (m *nullMR) Len() int          { return len(m.mem) }
func (m *nullMR) Deregister() error { return nil }

func (pd nullPD) CreateSRQ(verbs.SRQConfig) (verbs.SRQ, error) { return &nullSRQ{}, nil }

type nullSRQ struct {
	mu  sync.Mutex
	wrs []nullRecv
	r   int
}

type nullRecv struct {
	id uint64
	sg verbs.SGE
}

func (s *nullSRQ) PostRecv(wrs []verbs.RecvWR) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.r > len(s.wrs)/2 {
		s.wrs = s.wrs[:copy(s.wrs, s.wrs[s.r:])]
		s.r = 0
	}
	for _, wr := range wrs {
		s.wrs = append(s.wrs, nullRecv{wr.ID, wr.SGs[0]})
	}
	return len(wrs), nil
}

func (s *nullSRQ) take() (nullRecv, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.r == len(s.wrs) {
		return nullRecv{}, false
	}
	s.r++
	return s.wrs[s.r-1], true
}

func (s *nullSRQ) Arm(int) error { return nil }
func (s *nullSRQ) Close() error  { return nil }

type nullCQ struct {
	n       *nullVerbs
	handler func(verbs.CQ)
	mu      sync.Mutex
	wcs     []verbs.WC
	r       int
	armed   bool
	listed  bool
}

func (c *nullCQ) add(wc verbs.WC) {
	c.mu.Lock()
	c.wcs = append(c.wcs, wc)
	list := !c.listed
	c.listed = true
	c.mu.Unlock()
	if list {
		c.n.dirtyMu.Lock()
		c.n.cqs = append(c.n.cqs, c)
		c.n.dirtyMu.Unlock()
	}
}

func (c *nullCQ) due() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listed = false
	if !c.armed || c.r == len(c.wcs) {
		return false
	}
	c.armed = false
	return true
}

func (c *nullCQ) Poll(out []verbs.WC) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := copy(out, c.wcs[c.r:])
	if c.r += n; c.r == len(c.wcs) {
		c.wcs, c.r = c.wcs[:0], 0
	}
	return n
}

func (c *nullCQ) Arm(bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed = true
	return c.r < len(c.wcs)
}

func (c *nullCQ) Close() error { return nil }

func (pd nullPD) CreateQP(cfg verbs.QPConfig) (verbs.QP, error) {
	n := pd.d.n
	n.mu.Lock()
	defer n.mu.Unlock()
	n.nQPs++
	return &nullQP{d: pd.d, cfg: cfg, num: verbs.QPN(n.nQPs + 1), wrs: make([]nullSend, min(cfg.MaxSendWR, 16))}, nil
}

type nullQP struct {
	d   *nullDev
	cfg verbs.QPConfig
	num verbs.QPN

	mu     sync.Mutex
	state  verbs.QPState
	peer   *nullQP
	wrs    []nullSend // ring, a power of two
	head   int        // next to send
	tail   int        // next to post
	listed bool
}

type nullSend struct {
	id     uint64
	signal bool
	sgs    []verbs.SGE
}

func (q *nullQP) PostSend(wrs []verbs.SendWR) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.listed {
		q.listed = true
		q.list()
	}
	for i := range wrs {
		if q.tail-q.head == len(q.wrs) {
			old := q.wrs
			q.wrs = make([]nullSend, 2*len(old))
			for k := q.head; k != q.tail; k++ {
				q.wrs[k%len(q.wrs)] = old[k%len(old)]
			}
		}
		s := &q.wrs[q.tail%len(q.wrs)]
		s.id, s.signal = wrs[i].ID, wrs[i].Flags&verbs.SendSignaled != 0
		s.sgs = append(s.sgs[:0], wrs[i].SGs...)
		q.tail++
	}
	return len(wrs), nil
}

func (q *nullQP) list() {
	n := q.d.n
	n.dirtyMu.Lock()
	n.qps = append(n.qps, q)
	n.dirtyMu.Unlock()
}

// send carries out what is posted.
func (q *nullQP) send() (did bool) {
	q.mu.Lock()
	defer func() {
		if q.listed = q.head != q.tail; q.listed {
			q.list() // no buffer at the peer, or no peer yet: later
		}
		q.mu.Unlock()
	}()
	for ; q.head != q.tail; q.head++ {
		s := &q.wrs[q.head%len(q.wrs)]
		if q.state == verbs.StateErr {
			q.cfg.SendCQ.(*nullCQ).add(verbs.WC{ID: s.id, Status: verbs.WCFlushErr, QPN: q.num})
			did = true
			continue
		}
		if q.peer == nil {
			return did
		}
		r, ok := q.peer.cfg.SRQ.(*nullSRQ).take()
		if !ok {
			return did
		}
		to, n := q.peer.d.at(r.sg), 0
		for _, sg := range s.sgs {
			n += copy(to[n:], q.d.at(sg))
		}
		q.peer.cfg.RecvCQ.(*nullCQ).add(verbs.WC{ID: r.id, Opcode: verbs.WCRecv, QPN: q.peer.num, ByteLen: uint32(n)})
		if s.signal {
			q.cfg.SendCQ.(*nullCQ).add(verbs.WC{ID: s.id, Opcode: verbs.WCSend, QPN: q.num})
		}
		did = true
	}
	return did
}

func (q *nullQP) Num() verbs.QPN                       { return q.num }
func (q *nullQP) Type() verbs.QPType                   { return verbs.RC }
func (q *nullQP) Context() any                         { return q.cfg.Context }
func (q *nullQP) PD() verbs.PD                         { return nullPD{d: q.d} }
func (q *nullQP) PostRecv([]verbs.RecvWR) (int, error) { return 0, verbs.ErrInvalid }
func (q *nullQP) Query() verbs.QPAttr                  { return verbs.QPAttr{} }

func (q *nullQP) State() verbs.QPState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state
}

func (q *nullQP) Modify(a verbs.QPAttr, mask verbs.QPAttrMask) error {
	if mask&verbs.QPStateBit != 0 {
		if a.State != verbs.StateErr {
			return fmt.Errorf("null: no transition to %v", a.State)
		}
		q.SetError()
	}
	return nil
}

func (q *nullQP) SetError() {
	q.mu.Lock()
	q.state = verbs.StateErr
	q.mu.Unlock()
}

func (q *nullQP) Close() error {
	q.d.n.role.Lock()
	defer q.d.n.role.Unlock()
	q.mu.Lock()
	q.head, q.peer = q.tail, nil
	q.mu.Unlock()
	return nil
}

// nullPair is two sockets over nullVerbs.
func nullPair(t testing.TB, cfg Config) (a, b *Socket) {
	t.Helper()
	cfg.Providers = []verbs.Provider{newNullVerbs(t)}
	a, b = bind(t, openUDP(t, cfg), ap(addrA, 4000)), bind(t, openUDP(t, cfg), ap(addrB, 4000))
	mustWrite(t, a, []byte("hello"), b.AddrPort())
	wantRead(t, b, []byte("hello"), a.AddrPort())
	return a, b
}

func TestNullVerbs(t *testing.T) {
	a, b := nullPair(t, Config{})
	exchange0(t, a, b, 2000)
}

func exchange0(t *testing.T, a, b *Socket, count int) {
	t.Helper()
	done := make(chan error)
	go func() {
		var p [64]byte
		for i := range count {
			binary.LittleEndian.PutUint64(p[:], uint64(i))
			if _, err := a.WriteToAddrPort(p[:], b.AddrPort()); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	var p [64]byte
	b.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i := range count {
		if n, _, err := b.ReadFromAddrPort(p[:]); err != nil || n != 64 || binary.LittleEndian.Uint64(p[:]) != uint64(i) {
			t.Fatalf("datagram %d: %d bytes, %v", i, n, err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// The service time of a 64-byte datagram per side: everything above verbs, packed, one goroutine. The budget is 120 ns and
// no allocation.
func BenchmarkServiceOverhead64(b *testing.B) {
	for _, d := range []struct {
		name    string
		dialect Dialect
	}{{"open", DialectOpen}, {"kernel", DialectKernelOnly}} {
		b.Run(d.name, func(b *testing.B) {
			x, y := nullPair(b, Config{Dialect: d.dialect})
			p, q, to := make([]byte, 64), make([]byte, 64), y.AddrPort()
			const burst = 4096
			var tx, rx time.Duration
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if n%burst == 0 {
					start := time.Now()
					for range burst {
						if _, err := x.WriteToAddrPort(p, to); err != nil {
							b.Fatal(err)
						}
					}
					mid := time.Now()
					for range burst {
						if _, _, err := y.ReadFromAddrPort(q); err != nil {
							b.Fatal(err)
						}
					}
					tx += mid.Sub(start)
					rx += time.Since(mid)
				}
				n++
			}
			total := float64((n + burst - 1) / burst * burst)
			b.ReportMetric(float64(tx)/total, "ns/write")
			b.ReportMetric(float64(rx)/total, "ns/handle+read")
			b.ReportMetric(float64(tx+rx)/total/2, "ns/datagram/side")
		})
	}
}
