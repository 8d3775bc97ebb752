package softroce

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// cmNet joins connection managers by a wire that the test scripts. Each packet takes cmWireDelay
// unless fate says otherwise. It is used inside a synctest bubble.
type cmNet struct {
	t     testing.TB
	mu    sync.Mutex
	hosts map[netip.Addr]*cmTestHost
	sent  []cmSent
	count map[string]int
	// fate gives the delay of each copy of s that arrives; none: s is lost.
	fate func(s *cmSent) []time.Duration
}

const cmWireDelay = time.Millisecond

// cmSent is a MAD that somebody sent.
type cmSent struct {
	at       time.Duration // since the net began
	from, to netip.Addr
	attr     cmwire.Attr
	nth      int // 1 for the first of its kind from that host
	mad      [madBytes]byte
}

var cmOnce = []time.Duration{cmWireDelay}

func newCMNet(t testing.TB) *cmNet {
	return &cmNet{t: t, hosts: make(map[netip.Addr]*cmTestHost), count: make(map[string]int)}
}

// cmTestHost is the device of a manager under test.
type cmTestHost struct {
	net      *cmNet
	name     string
	addr     netip.Addr
	id       uint64
	mtu      verbs.MTU
	cm       *connManager
	start    time.Time
	mu       sync.Mutex
	nextQPN  verbs.QPN
	released []verbs.QPN
}

// host adds a host. Its GUID and QPNs follow from its address, its random numbers from seed.
func (n *cmNet) host(name, addr string, seed uint64) *cmTestHost {
	a := netip.MustParseAddr(addr)
	b := a.As16()
	h := &cmTestHost{
		net: n, name: name, addr: a, id: 0x0200_0000_0000_0000 | uint64(b[14])<<8 | uint64(b[15]), mtu: verbs.MTU4096,
		start: time.Now(), nextQPN: 0x100 * verbs.QPN(b[15]),
	}
	h.cm = newConnManager(h, rand.New(rand.NewPCG(seed, uint64(b[15]))))
	n.hosts[a.WithZone("")] = h
	return h
}

// twoHosts is the usual net: A is active, B passive.
func twoHosts(t testing.TB) (n *cmNet, a, b *cmTestHost) {
	n = newCMNet(t)
	return n, n.host("A", "10.0.0.1", 1), n.host("B", "10.0.0.2", 2)
}

func (h *cmTestHost) sendMAD(to netip.Addr, mad *[madBytes]byte) {
	n := h.net
	hdr, err := cmwire.PeekHeader(mad[:])
	if err != nil {
		n.t.Errorf("%s sends a MAD that is not CM's: %v", h.name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	k := h.name + " " + hdr.Attr.String()
	n.count[k]++
	s := cmSent{at: time.Since(h.start), from: h.addr, to: to, attr: hdr.Attr, nth: n.count[k], mad: *mad}
	n.sent = append(n.sent, s)
	delays := cmOnce
	if n.fate != nil {
		delays = n.fate(&s)
	}
	dst := n.hosts[to.WithZone("")]
	if dst == nil {
		return
	}
	for _, d := range delays {
		time.AfterFunc(d, func() { dst.cm.input(s.from, s.mad[:]) })
	}
}

func (h *cmTestHost) localAddr() netip.Addr               { return h.addr }
func (h *cmTestHost) guid() uint64                        { return h.id }
func (h *cmTestHost) pathMTU(remote netip.Addr) verbs.MTU { return h.mtu }

func (h *cmTestHost) releaseQPN(n verbs.QPN) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released = append(h.released, n)
}

func (h *cmTestHost) isReleased(n verbs.QPN) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Contains(h.released, n)
}

func (h *cmTestHost) stat(c cmCounter) uint64 { return h.cm.stats[c].Load() }

// state is the state of the host's connection with communication ID id, IDLE for none.
func (h *cmTestHost) state(id uint32) cmState {
	h.cm.mu.Lock()
	defer h.cm.mu.Unlock()
	if c := h.cm.conns[id]; c != nil {
		return c.state
	}
	return cmIdle
}

// only is the host's single connection.
func (h *cmTestHost) only() *cmConn {
	h.net.t.Helper()
	h.cm.mu.Lock()
	defer h.cm.mu.Unlock()
	if len(h.cm.conns) != 1 {
		h.net.t.Fatalf("%s has %d connections, want 1", h.name, len(h.cm.conns))
	}
	for _, c := range h.cm.conns {
		return c
	}
	return nil
}

func (h *cmTestHost) wantState(why string, want cmState) {
	h.net.t.Helper()
	synctest.Wait()
	if c := h.only(); h.state(c.id) != want {
		h.net.t.Fatalf("%s: %s is in %v, want %v", why, h.name, h.state(c.id), want)
	}
}

// wantEmpty fails unless nothing is left of any connection.
func (h *cmTestHost) wantEmpty() {
	h.net.t.Helper()
	synctest.Wait()
	m := h.cm
	m.mu.Lock()
	defer m.mu.Unlock()
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	left := []int{len(m.conns), len(m.byPeerID), len(m.byPeerQPN), len(m.pending), m.nPending, m.lingering, len(m.q.qps), len(m.q.mads), len(m.q.notes)}
	if slices.Max(left) != 0 || m.q.running {
		h.net.t.Errorf("%s is not empty: conns %d, IDs %d, QPNs %d, sources %d, pending %d, lingering %d, held %d, MADs %d, notes %d, worker %v",
			h.name, left[0], left[1], left[2], left[3], left[4], left[5], left[6], left[7], left[8], m.q.running)
	}
}

// trace is what was sent since the last call, as "A REQ, B REP".
func (n *cmNet) trace() string {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, s := range n.sent {
		out = append(out, n.nameOf(s.from)+" "+s.attr.String())
	}
	n.sent = nil
	return strings.Join(out, ", ")
}

func (n *cmNet) nameOf(a netip.Addr) string {
	if h := n.hosts[a.WithZone("")]; h != nil {
		return h.name
	}
	return "?"
}

func (n *cmNet) wantTrace(why, want string) {
	n.t.Helper()
	if got := n.trace(); got != want {
		n.t.Fatalf("%s:\n got %s\nwant %s", why, got, want)
	}
}

// sentBy is the MADs of one kind that h has sent since the last trace.
func (n *cmNet) sentBy(h *cmTestHost, attr cmwire.Attr) []cmSent {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []cmSent
	for _, s := range n.sent {
		if s.from == h.addr && s.attr == attr {
			out = append(out, s)
		}
	}
	return out
}

// lose makes the wire lose the first count messages of a kind that h sends.
func (n *cmNet) lose(h *cmTestHost, attr cmwire.Attr, count int) {
	n.fate = func(s *cmSent) []time.Duration {
		if s.from == h.addr && s.attr == attr && s.nth <= count {
			return nil
		}
		return cmOnce
	}
}

// fakeQP is a QP that checks and records its moves.
type fakeQP struct {
	verbs.QP // what the connection manager has no business calling
	n        verbs.QPN
	typ      verbs.QPType
	// hook, if set, runs in each Modify and may fail it or sleep.
	hook func(to verbs.QPState) error

	mu    sync.Mutex
	state verbs.QPState
	got   map[verbs.QPState]verbs.QPAttr // attributes of the last move to each state
	bad   []string
	errs  int // SetError calls
}

func (h *cmTestHost) qp() *fakeQP {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nextQPN++
	return &fakeQP{n: h.nextQPN, typ: verbs.RC, got: make(map[verbs.QPState]verbs.QPAttr)}
}

func (q *fakeQP) Num() verbs.QPN     { return q.n }
func (q *fakeQP) Type() verbs.QPType { return q.typ }

func (q *fakeQP) State() verbs.QPState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state
}

func (q *fakeQP) SetError() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.errs++
	if q.state != verbs.StateReset {
		q.state = verbs.StateErr
	}
}

// fakeMoves are the transitions a connection manager makes and the masks they want (rocev2 spec 5.2).
var fakeMoves = map[[2]verbs.QPState]verbs.QPAttrMask{
	{verbs.StateReset, verbs.StateInit}: verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPAccessBit,
	{verbs.StateInit, verbs.StateRTR}: verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit |
		verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit,
	{verbs.StateRTR, verbs.StateRTS}:  verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit,
	{verbs.StateInit, verbs.StateErr}: 0,
	{verbs.StateRTR, verbs.StateErr}:  0,
	{verbs.StateRTS, verbs.StateErr}:  0,
	{verbs.StateErr, verbs.StateErr}:  0,
}

func (q *fakeQP) Modify(a verbs.QPAttr, mask verbs.QPAttrMask) error {
	if q.hook != nil {
		if err := q.hook(a.State); err != nil {
			return err
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	want, ok := fakeMoves[[2]verbs.QPState{q.state, a.State}]
	if !ok || mask != want|verbs.QPStateBit {
		q.bad = append(q.bad, fmt.Sprintf("%v to %v with %v", q.state, a.State, mask))
		return &verbs.StateError{From: q.state, To: a.State}
	}
	q.state = a.State
	q.got[a.State] = a
	return nil
}

func (q *fakeQP) wantState(t testing.TB, why string, want verbs.QPState) {
	t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != want || len(q.bad) != 0 {
		t.Fatalf("%s: QP %#x is in %v, want %v; refused moves: %v", why, q.n, q.state, want, q.bad)
	}
}

// Parameters of the usual connection.
var (
	cmActiveParam = verbs.ConnParam{PrivateData: []byte("from the active side"), ResponderResources: 16, InitiatorDepth: 12,
		RetryCount: 6, RNRRetryCount: 7, MinRNRTimer: 9, TrafficClass: 0x28}
	cmPassiveParam = verbs.ConnParam{PrivateData: []byte("from the passive side"), ResponderResources: 8, InitiatorDepth: 32,
		RetryCount: 3, RNRRetryCount: 5, MinRNRTimer: 11}
)

const cmTestPort = 18634

// dialed is what a Connect on a goroutine of its own gave.
type dialed struct {
	qp   *fakeQP
	done chan struct{}
	ep   verbs.Endpoint
	info verbs.Connected
	err  error
}

// dial starts a Connect.
func (h *cmTestHost) dial(ctx context.Context, to *cmTestHost, p verbs.ConnParam) *dialed {
	return h.dialQP(ctx, to, h.qp(), p)
}

func (h *cmTestHost) dialQP(ctx context.Context, to *cmTestHost, qp *fakeQP, p verbs.ConnParam) *dialed {
	d := &dialed{qp: qp, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		d.ep, d.info, d.err = h.cm.connect(ctx, netip.AddrPortFrom(to.addr, cmTestPort), qp, p, nil)
	}()
	return d
}

// wait waits for the Connect to return.
func (d *dialed) wait() *dialed {
	<-d.done
	return d
}

// accepted collects what Accept gave in a listener's handlers.
type accepted struct {
	h   *cmTestHost
	l   verbs.Listener
	got chan *acceptedOne
}

type acceptedOne struct {
	req verbs.ConnRequest
	qp  *fakeQP
	ep  verbs.Endpoint
	err error
}

// accept listens and accepts everything with p; before, if set, runs first in each handler.
func (h *cmTestHost) accept(p verbs.ConnParam, before func(verbs.ConnRequest)) *accepted {
	h.net.t.Helper()
	ac := &accepted{h: h, got: make(chan *acceptedOne, 2*cmMaxPending)}
	ac.l = h.listen(func(r verbs.ConnRequest) {
		if before != nil {
			before(r)
		}
		o := &acceptedOne{req: r, qp: h.qp()}
		o.ep, o.err = r.Accept(context.Background(), o.qp, p, nil)
		ac.got <- o
	})
	return ac
}

func (h *cmTestHost) listen(handler func(verbs.ConnRequest)) verbs.Listener {
	h.net.t.Helper()
	l, err := h.cm.listen(cmTestPort, handler)
	if err != nil {
		h.net.t.Fatal(err)
	}
	return l
}

// connected makes one connection from a to b.
func connected(t testing.TB, a, b *cmTestHost) (*dialed, *acceptedOne) {
	t.Helper()
	ac := b.accept(cmPassiveParam, nil)
	d := a.dial(context.Background(), b, cmActiveParam).wait()
	if d.err != nil {
		t.Fatal(d.err)
	}
	o := <-ac.got
	if o.err != nil {
		t.Fatal(o.err)
	}
	return d, o
}

func isDone(ep verbs.Endpoint) bool {
	select {
	case <-ep.Done():
		return true
	default:
		return false
	}
}

// settle lets everything that has a timer end.
func settle() { time.Sleep(10 * time.Minute); synctest.Wait() }
