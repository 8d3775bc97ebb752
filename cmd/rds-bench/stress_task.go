package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openrds/openrds/rds"
)

// stressCounts are what a task has done. Times are sums.
type stressCounts struct {
	ReqTx, ReqRx, AckTx, AckRx                     uint64
	ReqTxBytes, ReqRxBytes, AckTxBytes, AckRxBytes uint64
	MbusIn, MbusOut                                uint64 // RDMA bytes into, out of memory here
	SendTime, RTT                                  time.Duration
}

func (c *stressCounts) add(o stressCounts, sign uint64) {
	for _, p := range []struct{ a, b *uint64 }{{&c.ReqTx, &o.ReqTx}, {&c.ReqRx, &o.ReqRx}, {&c.AckTx, &o.AckTx}, {&c.AckRx, &o.AckRx},
		{&c.ReqTxBytes, &o.ReqTxBytes}, {&c.ReqRxBytes, &o.ReqRxBytes}, {&c.AckTxBytes, &o.AckTxBytes}, {&c.AckRxBytes, &o.AckRxBytes},
		{&c.MbusIn, &o.MbusIn}, {&c.MbusOut, &o.MbusOut}} {
		*p.a += sign * *p.b
	}
	c.SendTime += time.Duration(sign) * o.SendTime
	c.RTT += time.Duration(sign) * o.RTT
}

// stressHistogram counts round trips by powers of two of microseconds: 2^i and more in bucket i. What is less than one is in the first, all above
// in the last.
type stressHistogram [16]uint64

func (h *stressHistogram) add(d time.Duration) {
	h[min(max(bits.Len64(uint64(d.Microseconds()))-1, 0), len(h)-1)]++
}

// stressTask is a child of rds-stress: one socket that talks to every task of the peer. rds-stress gives each a process; here a
// goroutine reads, and whoever makes it possible to send does so (pump).
type stressTask struct {
	opt    *stressOptions
	ctx    context.Context // of the test
	active bool            // may send requests
	sock   stressSocket
	fail   func(error)
	wg     *sync.WaitGroup

	mu     sync.Mutex
	peers  []*stressPeer
	counts stressCounts
	buf    []byte // being sent; guarded by mu
	want   []byte // the pattern of -v, nil without it
	hist   stressHistogram

	outlier func(to netip.AddrPort, rtt time.Duration) // nil: nobody wants to know

	sending  context.Context // until nothing more is to be sent; waits for room and for ports end with it
	silence  context.CancelFunc
	stopping atomic.Bool
}

// stressPeer is a task of the other side, as one of ours sees it.
type stressPeer struct {
	t                *stressTask
	addr             netip.AddrPort
	sendSeq, recvSeq uint32
	sendIndex        uint16 // slot of the next request
	recvIndex        uint16 // slot of the next request expected
	pending          int    // requests that wait for their acks
	unacked          int    // requests that wait for our ack
	busy             bool   // somebody is waiting to send to it, and will go on with it
	slots            []stressSlot
	nextOp           uint8 // RDMA, alternating
}

// stressSlot is an exchange in progress, one of depth in each direction.
type stressSlot struct {
	sent  time.Time    // our request
	asked stressHeader // of the peer, with it
	ack   stressHeader // to the peer's request
	alone bool         // a READ goes before that ack, by itself: the ack is not sent before it is complete

	region   stressRegion // what the peer reads from or writes to, nil unless mapped
	remote   []byte       // its memory
	used     bool         // the peer was done with it before we knew that it is mapped
	local    stressRegion // what our operations read into or write from
	inflight bool         // an operation uses local
	first    bool         // it is the READ that goes alone
	op       stressHeader // the ack it goes with, or before
}

// rdmaAfter is how many messages go before the first operation.
const rdmaAfter = 10

func newStressTask(ctx context.Context, host stressHost, opt *stressOptions, nr int, active bool, wg *sync.WaitGroup, fail func(error)) (*stressTask, error) {
	t := &stressTask{opt: opt, ctx: ctx, active: active || !opt.OneWay, wg: wg, fail: fail, buf: make([]byte, max(opt.ReqSize, opt.AckSize))}
	t.sending, t.silence = context.WithCancel(ctx)
	size := int(opt.Tasks) * int(opt.Depth) * int(opt.ReqSize+opt.AckSize) * 2
	sock, err := host.listen(ctx, netip.AddrPortFrom(opt.RecvAddr, opt.Port+1+uint16(nr)), max(size, int(opt.ReqSize), int(opt.AckSize)), size, opt.TOS)
	if err != nil {
		t.silence()
		return nil, err
	}
	t.sock = sock
	if opt.Verify {
		t.want = stressPattern(len(t.buf) - opt.headerLen())
		copy(t.buf[opt.headerLen():], t.want)
	}
	for i := range opt.Tasks {
		p := &stressPeer{t: t, addr: netip.AddrPortFrom(opt.SendAddr, opt.Port+1+i), slots: make([]stressSlot, opt.Depth), nextOp: stressRDMAWrite}
		if i&1 == 1 {
			p.nextOp = stressRDMARead
		}
		t.peers = append(t.peers, p)
		if opt.RDMASize == 0 {
			continue
		}
		n := int(opt.RDMASize * opt.Segments)
		for s := range p.slots {
			mem := make([]byte, 2*(n+int(opt.Alignment)))
			p.slots[s].remote = mem[opt.Alignment:][:n]
			if p.slots[s].local, err = sock.local(ctx, mem[n+2*int(opt.Alignment):][:n]); err != nil {
				return nil, errors.Join(err, t.stop())
			}
		}
	}
	return t, nil
}

// start sets the task to work.
func (t *stressTask) start() {
	t.wg.Go(t.read)
	if t.opt.RDMASize > 0 {
		t.wg.Go(t.readCompletions)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		p.pumpLocked()
	}
}

// check reports whether all is well, and fails the test if it is not and nobody has ended it.
func (t *stressTask) check(err error) bool {
	if err != nil && !t.stopping.Load() && t.ctx.Err() == nil {
		t.fail(err)
	}
	return err == nil
}

// quiet has the task send nothing more. It still takes what the peers have sent, who do not stop at the same instant.
func (t *stressTask) quiet() {
	t.stopping.Store(true)
	t.silence()
	t.mu.Lock() // whoever is sending has seen it
	defer t.mu.Unlock()
}

// cancel takes back what the peers have not acknowledged, and says how long that took.
func (t *stressTask) cancel(nr int, w io.Writer) error {
	for _, p := range t.peers {
		begin := time.Now()
		if err := t.sock.cancel(p.addr); err != nil {
			return err
		}
		fmt.Fprintf(w, "RDS_CANCEL_SENT_TO(%v)[%d] took %d msec\n", p.addr, nr, time.Since(begin).Milliseconds())
	}
	return nil
}

// stop ends the task. What is on its way stays so.
func (t *stressTask) stop() error {
	t.quiet()
	return t.sock.Close()
}

func (t *stressTask) snapshot() stressCounts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts
}

// pumpLocked sends to p what may be sent: READs that go alone, then acks, then requests. A message that has to wait is sent by a goroutine
// that waits with it, so that one congested peer holds up none of the others.
func (p *stressPeer) pumpLocked() {
	t := p.t
	for i := p.unacked; i > 0 && !p.busy && !t.stopping.Load(); i-- {
		if s := &p.slots[p.oldest(p.recvIndex, i)]; s.alone && !s.inflight {
			p.offerLocked(stressMessage{to: p.addr, op: p.operation(s)}, t.sock.try, t.sock.send, func() {}, nil)
		}
	}
	for !p.busy && !t.stopping.Load() {
		switch {
		case p.unacked > 0:
			slot := p.oldest(p.recvIndex, p.unacked)
			s := &p.slots[slot]
			if s.ack.RDMAOp != 0 && s.inflight {
				return // until its completion is there; a READ that goes alone has been posted above
			}
			p.sendLocked(stressAck, slot)
		case t.active && p.pending < len(p.slots):
			p.sendLocked(stressReq, int(p.sendIndex))
		default:
			return
		}
	}
}

// oldest is the slot of the first of n exchanges of which the last was in the slot before next.
func (p *stressPeer) oldest(next uint16, n int) int {
	return (int(next) - n + len(p.slots)) % len(p.slots)
}

// sendLocked sends the ack or request of slot.
func (p *stressPeer) sendLocked(op uint8, slot int) {
	t := p.t
	o := t.opt
	s := &p.slots[slot]
	h := stressHeader{Op: op, Index: uint16(slot)}
	size := o.ReqSize
	if op == stressAck {
		h, size = s.ack, o.AckSize
	} else if o.RDMASize > 0 && p.sendSeq > rdmaAfter {
		p.request(&h, s)
	}
	h.Seq, h.From, h.To = p.sendSeq, bare(t.sock.AddrPort()), bare(p.addr)
	h.put(t.buf)
	m := stressMessage{to: p.addr, data: t.buf[:size]}
	try, wait := t.sock.try, t.sock.send
	switch {
	case h.RDMAOp == 0:
	case op == stressAck:
		m.op = p.operation(s)
	case s.region != nil: // the key is known: it travels in the header, and as the kernel's extension
		m.cookie = s.region.Cookie()
	default:
		try, wait = nil, func(ctx context.Context, m stressMessage) error { return p.sendMapped(ctx, m, s) }
	}
	var spent *time.Duration
	if op == stressReq {
		s.asked, s.sent, spent = h, time.Now(), &t.counts.SendTime
	}
	p.offerLocked(m, try, wait, func() { p.sentLocked(op, slot, int(size)) }, spent)
}

// offerLocked sends m by try, which does not wait, or else, and if try is nil, leaves it to a goroutine that does it by wait; p is busy until then.
// A message that has to wait counts as sent already, since its answer may be faster than we are to say so: sent is called before offerLocked
// returns. The time it takes is added to spent, unless that is nil.
func (p *stressPeer) offerLocked(m stressMessage, try func(stressMessage) error, wait func(context.Context, stressMessage) error, sent func(), spent *time.Duration) {
	t := p.t
	begin := time.Now()
	took := func() {
		if spent != nil {
			*spent += time.Since(begin)
		}
	}
	if try != nil {
		err := try(m)
		if err == nil {
			took()
			sent()
			return
		}
		if !errors.Is(err, rds.ErrCongested) && !errors.Is(err, rds.ErrNoBufferSpace) {
			p.busy = !t.check(err) // for good
			return
		}
	}
	p.busy = true
	sent()
	m.data = slices.Clone(m.data)
	t.wg.Go(func() {
		if !t.check(wait(t.sending, m)) {
			return
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		p.busy = false
		took()
		p.pumpLocked()
	})
}

// sentLocked accounts for a message that was sent.
func (p *stressPeer) sentLocked(op uint8, slot, size int) {
	c := &p.t.counts
	p.sendSeq++
	if op == stressAck {
		p.unacked--
		c.AckTx++
		c.AckTxBytes += uint64(size)
		return
	}
	p.sendIndex = uint16((slot + 1) % len(p.slots))
	p.pending++
	c.ReqTx++
	c.ReqTxBytes += uint64(size)
}

// request asks the peer to read or write our memory in its reply.
func (p *stressPeer) request(h *stressHeader, s *stressSlot) {
	o := p.t.opt
	switch o.RWMode {
	case 0:
		p.nextOp = stressRDMARead + stressRDMAWrite - p.nextOp
	case 1:
		p.nextOp = stressRDMARead
	case 2:
		p.nextOp = stressRDMAWrite
	}
	h.RDMAOp, h.RDMASize, h.RDMASegment = p.nextOp, o.RDMASize, o.Segments
	h.Pattern = uint64(p.sendSeq)<<32 | uint64(p.addr.Port())
	if s.region != nil {
		h.RDMAKey = uint64(s.region.Cookie())
	}
	if o.Verify {
		fill := uint64(0)
		if h.RDMAOp == stressRDMARead {
			fill = h.Pattern
		}
		fillRDMA(s.remote, fill)
	}
}

// sendMapped maps the slot's memory and sends m with its cookie.
func (p *stressPeer) sendMapped(ctx context.Context, m stressMessage, s *stressSlot) error {
	t := p.t
	var r stressRegion
	var err error
	if t.opt.UseGetMR {
		if r, err = t.sock.register(ctx, m.to, s.remote, t.opt.UseOnce); err != nil {
			return err
		}
		m.cookie = r.Cookie()
		err = t.sock.send(ctx, m)
	} else {
		r, err = t.sock.sendMapped(ctx, m, s.remote, t.opt.UseOnce)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		return err
	}
	s.region = r
	if s.used { // the answer has been here already
		s.used = false
		return p.unmap(s)
	}
	return nil
}

// operation is what the request asked for that an ack answers.
func (p *stressPeer) operation(s *stressSlot) *stressOp {
	h := &s.ack
	op := &stressOp{write: h.RDMAOp == stressRDMAWrite, remote: rds.Cookie(h.RDMAKey), local: s.local, segments: int(h.RDMASegment), size: int(h.RDMASize)}
	if op.write && p.t.opt.Verify {
		fillRDMA(s.local.Bytes(), h.Pattern)
	}
	for i, x := range p.t.peers {
		if x == p {
			op.token = uint64(i)<<32 | uint64(h.Index)
		}
	}
	s.inflight, s.first, s.op = true, s.alone, *h
	return op
}

// readCompletions frees the slots of operations.
func (t *stressTask) readCompletions() {
	for {
		c, err := t.sock.completion(t.ctx)
		if !t.check(err) {
			return
		}
		p := t.peers[c.Token>>32]
		s := &p.slots[uint32(c.Token)]
		read := s.op.RDMAOp == stressRDMARead
		if c.Status != rds.StatusSuccess {
			t.check(fmt.Errorf("operation %d on %d bytes for %v: %v", s.op.RDMAOp, t.opt.RDMASize, p.addr, c.Status))
			return
		}
		if read && t.opt.Verify {
			if !t.check(checkRDMA(s.local.Bytes(), int(t.opt.RDMASize), s.op.Pattern)) {
				return
			}
		}
		t.mu.Lock()
		n := uint64(t.opt.RDMASize) * uint64(t.opt.Segments)
		if read {
			t.counts.MbusIn += n
		} else {
			t.counts.MbusOut += n
		}
		if s.inflight = false; s.first {
			s.alone, s.first, s.ack.RDMAOp = false, false, 0 // the ack that goes now has nothing to execute
		}
		p.pumpLocked()
		t.mu.Unlock()
	}
}

// read takes what the peers send, and holds it to order and content.
func (t *stressTask) read() {
	buf := make([]byte, len(t.buf))
	for {
		n, from, cookie, err := t.sock.receive(t.ctx, buf)
		if !t.check(err) {
			return
		}
		if n > len(buf) {
			err = fmt.Errorf("a datagram of %d bytes from %v", n, from)
		} else {
			err = t.received(buf[:n], from, cookie)
		}
		if !t.check(err) {
			return
		}
	}
}

func (t *stressTask) received(b []byte, from netip.AddrPort, cookie rds.Cookie) error {
	i := int(from.Port()) - int(t.opt.Port) - 1
	if i < 0 || i >= len(t.peers) || bare(t.peers[i].addr) != bare(from) {
		return fmt.Errorf("a datagram from %v, which is no task", from)
	}
	if len(b) == 0 {
		return nil // what a kernel sends with a READ that goes alone
	}
	h, err := parseStressHeader(b, t.opt.six())
	if err != nil {
		return fmt.Errorf("%w from %v", err, from)
	}
	p := t.peers[i]
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if h.Retry != 0 && h.Seq < p.recvSeq {
		return nil // an asynchronous sender did not know that it had arrived
	}
	want := stressHeader{Seq: p.recvSeq, From: bare(from), To: bare(t.sock.AddrPort()), Index: p.recvIndex, Op: h.Op}
	size := t.opt.ReqSize
	switch h.Op {
	case stressReq:
		if p.unacked == len(p.slots) {
			return fmt.Errorf("request %d of %v, and %d are not acknowledged yet", h.Seq, from, p.unacked)
		}
	case stressAck:
		size = t.opt.AckSize
		if p.pending == 0 {
			return fmt.Errorf("an ack of %v for nothing", from)
		}
		want.Index = uint16(p.oldest(p.sendIndex, p.pending))
	default:
		return fmt.Errorf("operation %d from %v", h.Op, from)
	}
	if h.Seq != want.Seq || h.From != want.From || h.To != want.To || h.Index != want.Index || len(b) != int(size) {
		return fmt.Errorf("header from %v is bogus: seq %d, from %v to %v, index %d, %d bytes; expected seq %d, from %v to %v, index %d, %d bytes",
			from, h.Seq, h.From, h.To, h.Index, len(b), want.Seq, want.From, want.To, want.Index, size)
	}
	if header := t.opt.headerLen(); t.want != nil {
		for k, c := range b[header:] {
			if c != t.want[k] {
				return fmt.Errorf("datagram %d from %v: byte %d is %#x, not %#x", h.Seq, from, header+k, c, t.want[k])
			}
		}
	}
	p.recvSeq++
	s := &p.slots[want.Index]
	if h.Op == stressAck {
		p.pending--
		t.counts.AckRx++
		t.counts.AckRxBytes += uint64(len(b))
		rtt := now.Sub(s.sent)
		t.counts.RTT += rtt
		t.hist.add(rtt)
		if t.outlier != nil {
			t.outlier(from, rtt)
		}
		// By the key, not by the operation: that is 0 when a READ has gone before the ack.
		if (h.RDMAKey != 0) != (s.asked.RDMAOp != 0) {
			return fmt.Errorf("ack %d of %v: RDMA with key %#x, and operation %d was asked for", h.Seq, from, h.RDMAKey, s.asked.RDMAOp)
		}
		if h.RDMAKey != 0 {
			if err := p.answered(s); err != nil {
				return err
			}
		}
		p.pumpLocked()
		return nil
	}
	t.counts.ReqRx++
	t.counts.ReqRxBytes += uint64(len(b))
	s.ack = stressHeader{Op: stressAck, Index: want.Index}
	if h.RDMAOp != 0 {
		if cookie != 0 {
			h.RDMAKey = uint64(cookie)
		}
		if h.RDMAOp > stressRDMAWrite || h.RDMAKey == 0 || h.RDMASize != t.opt.RDMASize || h.RDMASegment != t.opt.Segments {
			return fmt.Errorf("request %d of %v: RDMA operation %d of %d times %d bytes, key %#x", h.Seq, from, h.RDMAOp, h.RDMASegment, h.RDMASize, h.RDMAKey)
		}
		s.ack.RDMAOp, s.ack.RDMAAddr, s.ack.Pattern, s.ack.RDMAKey = h.RDMAOp, h.RDMAAddr, h.Pattern, h.RDMAKey
		s.ack.RDMASize, s.ack.RDMASegment = h.RDMASize, h.RDMASegment
		// Without a fence the ack could overtake the READ, whose memory the peer would take back too early.
		s.alone = h.RDMAOp == stressRDMARead && !t.opt.UseFence
	}
	p.unacked++
	p.recvIndex = uint16((int(want.Index) + 1) % len(p.slots))
	p.pumpLocked()
	return nil
}

// answered takes the reply to a request with an operation: the peer has read or written our memory.
func (p *stressPeer) answered(s *stressSlot) error {
	t := p.t
	n := uint64(t.opt.RDMASize) * uint64(t.opt.Segments)
	if s.asked.RDMAOp == stressRDMAWrite {
		t.counts.MbusIn += n
		if t.opt.Verify {
			if err := checkRDMA(s.remote, int(t.opt.RDMASize), s.asked.Pattern); err != nil {
				return fmt.Errorf("%w, written by %v", err, p.addr)
			}
		}
	} else {
		t.counts.MbusOut += n
	}
	if s.region == nil {
		s.used = true
		return nil
	}
	return p.unmap(s)
}

// unmap frees a region after its use.
func (p *stressPeer) unmap(s *stressSlot) error {
	o := p.t.opt
	if o.CacheMRs {
		return nil
	}
	r := s.region
	s.region = nil
	if o.UseOnce {
		return nil // the reply has freed it
	}
	return r.Close()
}
