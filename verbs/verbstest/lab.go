package verbstest

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// patience is how long a case waits for what must happen. Longer than a provider takes to give up
// on a silent peer (rocev2 spec 3.9; 10 s by default in softroce).
const patience = 30 * time.Second

// lab is the bench of one case: two nodes, and everything opened on them, closed at its end in
// dependency order with every Close asserted to succeed.
type lab struct {
	*testing.T
	env  Env
	a, b *node
	// exact says that time is virtual and nothing is lost: things take as long as they should.
	exact bool

	iova uint64 // where the next region is registered
	seed byte

	endpoints []verbs.Endpoint
	listeners []verbs.Listener
	qps       []verbs.QP
	srqs      []verbs.SRQ
	cqs       []verbs.CQ
	mws       []verbs.MW
	mrs       []verbs.MR
	lists     []verbs.PageList
	pds       []verbs.PD
	devs      []verbs.Device
	pins      runtime.Pinner // of the memory of mrs and lists; released last
}

// node is an open device with one PD and a record of its asynchronous events.
type node struct {
	l    *lab
	name string
	dev  verbs.Device
	pd   verbs.PD

	mu     sync.Mutex
	events []verbs.AsyncEvent
}

func newLab(t *testing.T, env Env, virtual bool) *lab {
	t.Helper()
	if env.Settle == 0 {
		env.Settle = 20 * time.Millisecond
	}
	if len(env.Addrs) < 2 {
		t.Fatal("the environment has fewer than two addresses")
	}
	l := &lab{T: t, env: env, exact: virtual && !env.Lossy, iova: 0x7f00_0000_0000}
	t.Cleanup(l.closeAll)
	l.a = l.node("A", 0)
	l.b = l.node("B", 1)
	return l
}

// node opens the i-th address of the environment.
func (l *lab) node(name string, i int) *node {
	l.Helper()
	dev, err := l.env.Provider.OpenDevice(l.env.Addrs[i])
	l.must("open device "+name, err)
	l.devs = append(l.devs, dev)
	n := &node{l: l, name: name, dev: dev}
	dev.SetAsyncHandler(func(ev verbs.AsyncEvent) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.events = append(n.events, ev)
	})
	n.pd = n.allocPD()
	return n
}

// closeAll closes children before parents. What a case closed itself is closed a second time, which
// must be nil too.
func (l *lab) closeAll() {
	for _, ep := range l.endpoints {
		if err := ep.Disconnect(); err != nil {
			l.Errorf("cleanup: disconnect: %v", err)
		}
	}
	closeList(l, "listener", l.listeners, verbs.Listener.Close)
	closeList(l, "QP", l.qps, verbs.QP.Close)
	closeList(l, "SRQ", l.srqs, verbs.SRQ.Close)
	closeList(l, "CQ", l.cqs, verbs.CQ.Close)
	closeList(l, "MW", l.mws, verbs.MW.Dealloc)
	closeList(l, "MR", l.mrs, verbs.MR.Deregister)
	closeList(l, "page list", l.lists, verbs.PageList.Close)
	closeList(l, "PD", l.pds, verbs.PD.Close)
	closeList(l, "device", l.devs, verbs.Device.Close)
	l.pins.Unpin()
}

func closeList[T any](l *lab, what string, list []T, close func(T) error) {
	for _, x := range slices.Backward(list) {
		if err := close(x); err != nil {
			l.Errorf("cleanup: close of a %s: %v", what, err)
		}
	}
}

// must ends the case unless err is nil.
func (l *lab) must(what string, err error) {
	l.Helper()
	if err != nil {
		l.Fatalf("%s: %v", what, err)
	}
}

// wantErr ends the case unless err matches want.
func (l *lab) wantErr(what string, err, want error) {
	l.Helper()
	if !errors.Is(err, want) {
		l.Fatalf("%s: error is %v, want %v", what, err, want)
	}
}

// wantErrAs ends the case unless err holds a T, which it returns.
func wantErrAs[T error](l *lab, what string, err error) T {
	l.Helper()
	var e T
	if !errors.As(err, &e) {
		l.Fatalf("%s: error is %T %v, want a %T", what, err, err, e)
	}
	return e
}

// within fails the case if f takes longer than d.
func (l *lab) within(d time.Duration, what string, f func()) {
	l.Helper()
	start := time.Now()
	f()
	if took := time.Since(start); took > d {
		l.Fatalf("%s: took %v, want at most %v", what, took, d)
	}
}

// await polls cond until it holds.
func (l *lab) await(what string, cond func() bool) {
	l.Helper()
	if !awaitFor(patience, cond) {
		l.Fatalf("%s: did not happen within %v", what, patience)
	}
}

func awaitFor(limit time.Duration, cond func() bool) bool {
	deadline := time.Now().Add(limit)
	pause := 20 * time.Microsecond
	for !cond() {
		if time.Now().After(deadline) {
			return cond()
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Millisecond)
	}
	return true
}

// recvFrom receives from c.
func recvFrom[T any](l *lab, what string, c <-chan T) (v T) {
	l.Helper()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case v = <-c:
	case <-t.C:
		l.Fatalf("%s: did not happen within %v", what, patience)
	}
	return v
}

// publish orders what the case did to registered memory before what devices do to it for a peer's
// request: a call into each device. The hardware has no need of it, the race detector has, which
// knows nothing of packets.
func (l *lab) publish() {
	for _, qp := range l.qps {
		qp.Query()
	}
}

// settle waits as long as nothing is expected to happen.
func (l *lab) settle() { time.Sleep(l.env.Settle) }

// wantEvent waits for an event of one of types that concerns match, and takes it off the record.
func (n *node) wantEvent(what string, match func(verbs.AsyncEvent) bool, types ...verbs.EventType) {
	n.l.Helper()
	ok := awaitFor(patience, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		for i, ev := range n.events {
			if slices.Contains(types, ev.Type) && match(ev) {
				n.events = slices.Delete(n.events, i, i+1)
				return true
			}
		}
		return false
	})
	if !ok {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.l.Fatalf("%s: no such event on %s, there are %+v", what, n.name, n.events)
	}
}

// wantNoEvent checks that there is no event of one of types on the record.
func (n *node) wantNoEvent(what string, types ...verbs.EventType) {
	n.l.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, ev := range n.events {
		if slices.Contains(types, ev.Type) {
			n.l.Fatalf("%s: unexpected %v on %s", what, ev.Type, n.name)
		}
	}
}

func ofQP(qp verbs.QP) func(verbs.AsyncEvent) bool {
	return func(ev verbs.AsyncEvent) bool { return ev.QP == qp && ev.CQ == nil && ev.SRQ == nil }
}

func ofCQ(cq verbs.CQ) func(verbs.AsyncEvent) bool {
	return func(ev verbs.AsyncEvent) bool { return ev.CQ == cq && ev.QP == nil && ev.SRQ == nil }
}

func ofSRQ(srq verbs.SRQ) func(verbs.AsyncEvent) bool {
	return func(ev verbs.AsyncEvent) bool { return ev.SRQ == srq && ev.QP == nil && ev.CQ == nil }
}

func (n *node) allocPD() verbs.PD {
	n.l.Helper()
	pd, err := n.dev.AllocPD()
	n.l.must("allocate PD on "+n.name, err)
	n.l.pds = append(n.l.pds, pd)
	return pd
}

func (n *node) cq(depth int, handler func(verbs.CQ)) verbs.CQ {
	n.l.Helper()
	cq, err := n.dev.CreateCQ(verbs.CQConfig{Depth: depth, Handler: handler})
	n.l.must("create CQ on "+n.name, err)
	n.l.cqs = append(n.l.cqs, cq)
	return cq
}

func (n *node) srq(wrs, sges int) verbs.SRQ {
	n.l.Helper()
	srq, err := n.pd.CreateSRQ(verbs.SRQConfig{MaxWR: wrs, MaxSGE: sges})
	n.l.must("create SRQ on "+n.name, err)
	n.l.srqs = append(n.l.srqs, srq)
	return srq
}

const allAccess = verbs.AccessLocalWrite | verbs.AccessRemoteRead | verbs.AccessRemoteWrite | verbs.AccessRemoteAtomic

const remoteAccess = allAccess &^ verbs.AccessLocalWrite

// region is registered memory. Its IOVA has nothing to do with where mem is.
type region struct {
	mr  verbs.MR
	mem []byte
}

const poison = 0xee

// region registers size poisoned bytes in the node's PD.
func (n *node) region(size int, access verbs.Access) *region {
	n.l.Helper()
	return n.regionIn(n.pd, size, access)
}

func (n *node) regionIn(pd verbs.PD, size int, access verbs.Access) *region {
	n.l.Helper()
	return n.regionOf(pd, make([]byte, size), access)
}

// regionOf registers mem, after poisoning it.
func (n *node) regionOf(pd verbs.PD, mem []byte, access verbs.Access) *region {
	n.l.Helper()
	n.l.pins.Pin(&mem[0])
	for i := range mem {
		mem[i] = poison
	}
	mr, err := pd.RegMR(mem, n.l.nextIOVA(len(mem)), access)
	n.l.must("register memory on "+n.name, err)
	n.l.mrs = append(n.l.mrs, mr)
	return &region{mr: mr, mem: mem}
}

// nextIOVA is where size bytes may be registered: apart from everything else.
func (l *lab) nextIOVA(size int) uint64 {
	iova := l.iova
	l.iova += uint64(size+0xfffff) &^ 0xffff
	return iova
}

// sge names n bytes at off.
func (r *region) sge(off, n int) verbs.SGE {
	return verbs.SGE{Addr: r.mr.Addr() + uint64(off), Length: uint32(n), LKey: r.mr.LKey()}
}

// sg is a list of one sge.
func (r *region) sg(off, n int) []verbs.SGE { return []verbs.SGE{r.sge(off, n)} }

func (r *region) addr(off int) uint64 { return r.mr.Addr() + uint64(off) }

// pieces is a scatter or gather list over a region with holes between its elements.
type pieces struct {
	r    *region
	sgs  []verbs.SGE
	offs []int
	lens []int
}

// pieces cuts size bytes after each of cuts and lays the pieces into r, 5 bytes apart, starting
// at off. A zero-length element with a key of nobody's is thrown in: it is not looked at.
func (r *region) pieces(off, size int, cuts ...int) pieces {
	p := pieces{r: r}
	add := func(n int) {
		p.offs, p.lens = append(p.offs, off), append(p.lens, n)
		p.sgs = append(p.sgs, r.sge(off, n))
		off += n + 5
	}
	for i, c := range cuts {
		c = min(c, size)
		if c == 0 && size == 0 {
			break
		}
		add(c)
		size -= c
		if i == 0 {
			p.sgs = append(p.sgs, verbs.SGE{Addr: 1, LKey: 0xdeadbeef})
		}
	}
	if size > 0 {
		add(size)
	}
	return p
}

// put writes b through the list.
func (p pieces) put(mem, b []byte) {
	for i, off := range p.offs {
		n := copy(mem[off:off+p.lens[i]], b)
		b = b[n:]
	}
}

// pattern is n bytes that depend on seed and place, so that a byte missing, twice or elsewhere shows.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed)*2654435761 + 12345
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x >> 11)
	}
	return b
}

// nextPattern is a pattern no other call in this case has given.
func (l *lab) nextPattern(n int) []byte {
	l.seed++
	return pattern(l.seed, n)
}

// wantBytes compares memory.
func (l *lab) wantBytes(what string, got, want []byte) {
	l.Helper()
	if len(got) != len(want) {
		l.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			bad := 0
			for j := range want {
				if got[j] != want[j] {
					bad++
				}
			}
			l.Fatalf("%s: byte %d of %d is %#x, want %#x (%d differ)", what, i, len(want), got[i], want[i], bad)
		}
	}
}

// end is a QP with its CQs.
type end struct {
	*node
	qp       verbs.QP
	scq, rcq verbs.CQ
}

// qpConfig is what newEnd creates unless its caller changes it.
func (n *node) qpConfig(t verbs.QPType) verbs.QPConfig {
	return verbs.QPConfig{Type: t, MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 4, MaxRecvSGE: 4}
}

// needs is run on devices that have all of caps. The case is skipped where one has not.
func needs(caps verbs.DeviceCaps, run func(*lab)) func(*lab) {
	return func(l *lab) {
		for _, n := range []*node{l.a, l.b} {
			if missing := caps &^ n.dev.Attr().Caps; missing != 0 {
				l.Skipf("%s lacks capabilities %#x", n.name, missing)
			}
		}
		run(l)
	}
}

// newEndIn is newEnd in another PD than the node's own.
func (n *node) newEndIn(pd verbs.PD, cfg verbs.QPConfig) *end {
	n.l.Helper()
	own := n.pd
	n.pd = pd
	defer func() { n.pd = own }()
	return n.newEnd(cfg)
}

// newEnd creates a QP in RESET, with CQs of its own unless cfg names some.
func (n *node) newEnd(cfg verbs.QPConfig) *end {
	n.l.Helper()
	if cfg.SendCQ == nil {
		cfg.SendCQ = n.cq(256, nil)
	}
	if cfg.RecvCQ == nil {
		cfg.RecvCQ = n.cq(256, nil)
	}
	qp, err := n.pd.CreateQP(cfg)
	n.l.must("create QP on "+n.name, err)
	n.l.qps = append(n.l.qps, qp)
	return &end{node: n, qp: qp, scq: cfg.SendCQ, rcq: cfg.RecvCQ}
}

// link are the attributes of a pair of RC QPs.
type link struct {
	mtu                verbs.MTU
	timeout, retry     uint8
	rnrRetry, rnrTimer uint8
	rdAtomic           uint8 // READs and atomics outstanding
	destRDAtomic       uint8 // READs and atomics served
	access             verbs.Access
	psnAB, psnBA       uint32
	cfgA, cfgB         verbs.QPConfig
}

// pair is two connected RC QPs.
type pair struct {
	l    *lab
	a, b *end
	link
}

func (l *lab) mtu() verbs.MTU {
	return min(l.a.dev.Attr().ActiveMTU, l.b.dev.Attr().ActiveMTU)
}

func (l *lab) link() link {
	rd := uint8(min(4, l.a.dev.Attr().MaxRDAtomic, l.b.dev.Attr().MaxRDAtomic))
	return link{
		mtu: l.mtu(), timeout: 14, retry: 7, rnrRetry: 7, rnrTimer: 12,
		rdAtomic: rd, destRDAtomic: rd, access: remoteAccess,
		psnAB: 0x111111, psnBA: 0xabcdef,
		cfgA: l.a.qpConfig(verbs.RC), cfgB: l.b.qpConfig(verbs.RC),
	}
}

// pair connects a QP of A and one of B by hand, through INIT and RTR to RTS.
func (l *lab) pair(change ...func(*link)) *pair {
	l.Helper()
	k := l.link()
	for _, f := range change {
		f(&k)
	}
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.b.newEnd(k.cfgB), link: k}
	p.connect()
	return p
}

// pairOf connects two ends made before.
func (l *lab) pairOf(a, b *end) *pair {
	l.Helper()
	p := &pair{l: l, a: a, b: b, link: l.link()}
	p.connect()
	return p
}

// deaf is a pair of which B drops whatever comes (it is in INIT) until hears: requests of A stay unanswered.
func (l *lab) deaf() *pair {
	l.Helper()
	k := l.link()
	k.timeout = 18 // 8.6 s: longer than a busy machine takes from here to hears
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.b.newEnd(k.cfgB), link: k}
	p.toInit(p.a)
	p.toInit(p.b)
	p.toRTR(p.a)
	p.toRTS(p.a)
	return p
}

func (p *pair) hears() {
	p.l.Helper()
	p.toRTR(p.b)
	p.toRTS(p.b)
}

// connect takes both QPs from RESET to RTS.
func (p *pair) connect() {
	p.l.Helper()
	p.toInit(p.a)
	p.toInit(p.b)
	p.toRTR(p.a)
	p.toRTR(p.b)
	p.toRTS(p.a)
	p.toRTS(p.b)
}

const (
	rcInitMask = verbs.QPStateBit | verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPAccessBit
	rcRTRMask  = verbs.QPStateBit | verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit
	rcRTSMask  = verbs.QPStateBit | verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit
	udInitMask = verbs.QPStateBit | verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPQKeyBit
	udRTRMask  = verbs.QPStateBit
	udRTSMask  = verbs.QPStateBit | verbs.QPSQPSNBit
)

// attr are all attributes of e, towards its peer.
func (p *pair) attr(e *end) verbs.QPAttr {
	peer, rx, tx := p.b, p.psnBA, p.psnAB
	if e == p.b {
		peer, rx, tx = p.a, p.psnAB, p.psnBA
	}
	return verbs.QPAttr{
		Access: p.access, Port: 1, AH: verbs.AH{Remote: peer.dev.Addr()}, PathMTU: p.mtu, DestQPN: peer.qp.Num(),
		RQPSN: rx, SQPSN: tx, MaxRDAtomic: p.rdAtomic, MaxDestRDAtomic: p.destRDAtomic, MinRNRTimer: p.rnrTimer,
		Timeout: p.timeout, RetryCount: p.retry, RNRRetry: p.rnrRetry,
	}
}

func (p *pair) move(e *end, to verbs.QPState, mask verbs.QPAttrMask) {
	p.l.Helper()
	a := p.attr(e)
	a.State = to
	p.l.must(fmt.Sprintf("QP of %s to %v", e.name, to), e.qp.Modify(a, mask))
}

func (p *pair) toInit(e *end) { p.l.Helper(); p.move(e, verbs.StateInit, rcInitMask) }
func (p *pair) toRTR(e *end)  { p.l.Helper(); p.move(e, verbs.StateRTR, rcRTRMask) }
func (p *pair) toRTS(e *end)  { p.l.Helper(); p.move(e, verbs.StateRTS, rcRTSMask) }

// to moves a QP to a state that needs no attributes.
func (e *end) to(s verbs.QPState) {
	e.l.Helper()
	e.l.must(fmt.Sprintf("QP of %s to %v", e.name, s), e.qp.Modify(verbs.QPAttr{State: s}, verbs.QPStateBit))
}

// send posts wrs, all of which must be taken. The case is skipped if the device has no such requests.
func (e *end) send(wrs ...verbs.SendWR) {
	e.l.Helper()
	e.l.posted(e.post(wrs...))
}

// post is send for other goroutines than the case's: the caller hands the error to posted there.
func (e *end) post(wrs ...verbs.SendWR) error {
	n, err := e.qp.PostSend(wrs)
	switch {
	case n == len(wrs) && err == nil:
		return nil
	case n < len(wrs) && e.lacks(wrs[n].Opcode) && errors.Is(err, verbs.ErrNotSupported):
		return &lackError{e.name, wrs[n].Opcode}
	}
	return fmt.Errorf("post on %s: took %d of %d: %w", e.name, n, len(wrs), err)
}

// posted fails the case for an error of post, or skips it if requests are missing that a device need not have.
func (l *lab) posted(err error) {
	l.Helper()
	var lack *lackError
	if errors.As(err, &lack) {
		l.Skip(lack)
	}
	if err != nil {
		l.Fatal(err)
	}
}

// lacks reports whether the device need not take requests of opcode op, as far as its capabilities say.
func (n *node) lacks(op verbs.SendOpcode) bool {
	return op.Caps() != 0 && op.Caps()&n.dev.Attr().Caps == 0
}

type lackError struct {
	name string
	op   verbs.SendOpcode
}

func (e *lackError) Error() string { return fmt.Sprintf("%s has no %v", e.name, e.op) }

// recv posts wrs, all of which must be taken.
func (e *end) recv(wrs ...verbs.RecvWR) {
	e.l.Helper()
	if n, err := e.qp.PostRecv(wrs); n != len(wrs) || err != nil {
		e.l.Fatalf("post %d receives on %s: took %d, %v", len(wrs), e.name, n, err)
	}
}

// recvEmpty posts receives without memory, one per id.
func (e *end) recvEmpty(ids ...uint64) {
	e.l.Helper()
	for _, id := range ids {
		e.recv(verbs.RecvWR{ID: id})
	}
}

// nextWC waits for the next completion of cq.
func (e *end) nextWC(what string, cq verbs.CQ) verbs.WC {
	e.l.Helper()
	var wc [1]verbs.WC
	if !awaitFor(patience, func() bool { return cq.Poll(wc[:]) == 1 }) {
		e.l.Fatalf("%s: no completion on %s within %v (QP in %v)", what, e.name, patience, e.qp.State())
	}
	return wc[0]
}

// wantWC waits for the next completion of cq, which must be want (whose QPN is filled in).
func (e *end) wantWC(what string, cq verbs.CQ, want verbs.WC) verbs.WC {
	e.l.Helper()
	got := e.nextWC(what, cq)
	want.QPN = e.qp.Num()
	if msg := diffWC(got, want); msg != "" {
		e.l.Fatalf("%s: completion on %s: %s", what, e.name, msg)
	}
	return got
}

func diffWC(got, want verbs.WC) string {
	switch {
	case got.ID != want.ID || got.Status != want.Status:
		return fmt.Sprintf("request %d, %v, want request %d, %v", got.ID, got.Status, want.ID, want.Status)
	case got.QPN != want.QPN:
		return fmt.Sprintf("request %d names QP %d, want %d", got.ID, got.QPN, want.QPN)
	case want.Status != verbs.WCSuccess:
		return ""
	case got.Opcode != want.Opcode:
		return fmt.Sprintf("request %d has opcode %d, want %d", got.ID, got.Opcode, want.Opcode)
	case got.Flags != want.Flags:
		return fmt.Sprintf("request %d has flags %#x, want %#x", got.ID, got.Flags, want.Flags)
	case want.Flags&verbs.WCWithImm != 0 && got.Imm != want.Imm:
		return fmt.Sprintf("request %d has immediate %#x, want %#x", got.ID, got.Imm, want.Imm)
	case (want.Opcode == verbs.WCRecv || want.Opcode == verbs.WCRecvWriteWithImm || want.Opcode == verbs.WCRead) && got.ByteLen != want.ByteLen:
		return fmt.Sprintf("request %d has %d bytes, want %d", got.ID, got.ByteLen, want.ByteLen)
	}
	return ""
}

// wantSent expects the successful completion of send request id.
func (e *end) wantSent(what string, id uint64, op verbs.WCOpcode) {
	e.l.Helper()
	e.wantWC(what, e.scq, verbs.WC{ID: id, Opcode: op})
}

// wantRead expects the successful completion of READ request id.
func (e *end) wantRead(what string, id uint64, n int) {
	e.l.Helper()
	e.wantWC(what, e.scq, verbs.WC{ID: id, Opcode: verbs.WCRead, ByteLen: uint32(n)})
}

// wantRecvd expects a SEND of n bytes in receive request id.
func (e *end) wantRecvd(what string, id uint64, n int) {
	e.l.Helper()
	e.wantWC(what, e.rcq, verbs.WC{ID: id, Opcode: verbs.WCRecv, ByteLen: uint32(n)})
}

// wantSendStatus expects send requests ids to complete with st, in order.
func (e *end) wantSendStatus(what string, st verbs.WCStatus, ids ...uint64) {
	e.l.Helper()
	for _, id := range ids {
		e.wantWC(what, e.scq, verbs.WC{ID: id, Status: st})
	}
}

// wantRefused expects send request id to fail with st, as the peer's NAK says. A NAK is sent once
// and its sender's QP is in ERR then: where the network may lose it, the request runs out of retries
// instead.
func (e *end) wantRefused(what string, st verbs.WCStatus, id uint64) {
	e.l.Helper()
	wc := e.nextWC(what, e.scq)
	if e.l.env.Lossy && wc.Status == verbs.WCRetryExcErr {
		st = verbs.WCRetryExcErr
	}
	if msg := diffWC(wc, verbs.WC{ID: id, Status: st, QPN: e.qp.Num()}); msg != "" {
		e.l.Fatalf("%s: completion on %s: %s", what, e.name, msg)
	}
}

// wantRecvStatus expects receive requests ids to complete with st, in order.
func (e *end) wantRecvStatus(what string, st verbs.WCStatus, ids ...uint64) {
	e.l.Helper()
	for _, id := range ids {
		e.wantWC(what, e.rcq, verbs.WC{ID: id, Status: st})
	}
}

// wantQuiet checks that no completion comes on either CQ.
func (e *end) wantQuiet(what string) {
	e.l.Helper()
	e.l.settle()
	var wc [1]verbs.WC
	for _, cq := range []verbs.CQ{e.scq, e.rcq} {
		if cq.Poll(wc[:]) != 0 {
			e.l.Fatalf("%s: unexpected completion on %s: %+v", what, e.name, wc[0])
		}
	}
}

// wantState waits for the QP to reach s.
func (e *end) wantState(what string, s verbs.QPState) {
	e.l.Helper()
	if !awaitFor(patience, func() bool { return e.qp.State() == s }) {
		e.l.Fatalf("%s: QP of %s is in %v, want %v", what, e.name, e.qp.State(), s)
	}
}

// sendWR is a signaled SEND of sgs.
func sendWR(id uint64, sgs []verbs.SGE) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: sgs}
}

// remoteWR is a signaled request op between sgs and the peer's region at off.
func remoteWR(id uint64, op verbs.SendOpcode, sgs []verbs.SGE, r *region, off int) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: op, Flags: verbs.SendSignaled, SGs: sgs, RemoteAddr: r.addr(off), RKey: r.mr.RKey()}
}
