package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openrds/openrds/rds"
)

// Operations of --rdma.
const (
	rdmaRead  = "read"
	rdmaWrite = "write"
)

// A run with RDMA moves its bytes by operations: the initiator's on memory of the target's, each with a datagram behind it
// that tells the target so. The initiator is the side that sends in a plain run of that kind.
//
// Memory is in slots, as many as operations may be in flight, one region each on both sides. Operation seq uses slot seq mod
// slots. What is said on the flow, in order as ever:
//
//	target     offer   slot, with the cookie of its region: at the start, and each time the region was lost with its device
//	initiator  op      seq, behind its operation
//	target     credit  seq: has looked at the memory (WRITE) or has put new content there (READ); the slot is free
//	initiator  void    seq: the operation has failed, its datagram may have arrived or not; answered with a credit in the
//	                   latter case, so that there is one for each seq
//
// Operations fail only when devices go away: in flight (nobody knows what was executed), by a cookie of memory that is not
// registered any more, or because their local region went. Datagrams do not get lost even then, so whatever the initiator
// has neither sent successfully nor called void is a loss.
type rdmaLane struct {
	*lane
	sock  *rds.Socket
	peer  netip.AddrPort
	op    rds.RDMAOp
	arena *rds.Arena // nil: plain memory
	ctx   context.Context
	quit  context.CancelFunc

	changed chan struct{} // a slot may have become free; capacity one, for the one initiator

	failed atomic.Uint64 // operations that devices which went away have cost
	voided atomic.Uint64 // of the peer's

	mu    sync.Mutex
	slots []slot        // of the initiator; guarded by mu, memory and regions aside
	mem   [][]byte      // of the target, by slot
	given []*rds.Region // that may not have been given back; guarded by mu

	// Of the target; its receiver's alone.
	next    uint64              // sequence that is due
	missing map[uint64]struct{} // below next, neither arrived nor void
}

// slot is an initiator's. The goroutine that posts to a free slot, and the one that completes a busy one, may use mem and
// region.
type slot struct {
	mem    []byte
	region *rds.Region
	seq    uint64     // of its last operation
	cookie rds.Cookie // of the peer's memory; 0: none that is known to work
	used   rds.Cookie // by the last operation
	busy   bool       // posted, its completion has not come
	owed   bool       // the target's credit has not come
	timed  bool       // the round trip counts
	start  time.Time
}

// rdmaHeaderBytes begin a datagram: its kind, seven zeros, sequence or slot (little-endian).
const rdmaHeaderBytes = 16

type rdmaKind uint8

const (
	rdmaOffer rdmaKind = 1 + iota
	rdmaOp
	rdmaCredit
	rdmaVoid
)

func putRDMAHeader(p []byte, k rdmaKind, n uint64) []byte {
	clear(p[:rdmaHeaderBytes])
	p[0] = byte(k)
	binary.LittleEndian.PutUint64(p[8:], n)
	return p
}

// Contents of memory have numbers that datagrams do not: what WRITE seq brings, and what the target puts into the slot of
// READ seq behind it. What is there at first has the numbers from the end downwards.
func contentOf(seq uint64) uint64  { return seq | 1<<63 }
func firstContent(slot int) uint64 { return ^uint64(slot) }

// rdmaMemoryBytes bounds the memory of a run on each side.
const rdmaMemoryBytes = 1 << 30

// slotCount is how many operations of a flow are in flight.
func (s *spec) slotCount() int {
	switch {
	case s.Test == testRTT:
		return 1
	case s.Depth > 0:
		return s.Depth
	}
	return min(max(4<<20/max(1, s.RDMASize), 4), 32)
}

// stride is the distance of slots in memory. Pages are given back slot by slot.
func (s *spec) stride() int {
	page := os.Getpagesize()
	return (s.RDMASize + page - 1) / page * page
}

func (l *lane) initiates() bool { return l.side.active || l.side.spec.Bidir }
func (l *lane) isTarget() bool  { return !l.side.active || l.side.spec.Bidir }

// prepareRDMA makes the lane one that carries operations.
func (l *lane) prepareRDMA() error {
	f, ok := l.flow.(*rdsFlow)
	if !ok {
		return fmt.Errorf("no RDMA over %s", l.side.spec.Transport)
	}
	s := &l.side.spec
	r := &rdmaLane{
		lane: l, sock: f.sock, peer: f.peer, op: rds.RDMAWrite,
		changed: make(chan struct{}, 1), missing: make(map[uint64]struct{}),
	}
	if s.RDMA == rdmaRead {
		r.op = rds.RDMARead
	}
	r.ctx, r.quit = context.WithCancel(context.Background())
	l.rdma = r
	n, stride := s.slotCount(), s.stride()
	var mem []byte
	if s.ODP {
		var err error
		if r.arena, err = rds.OpenArena(2 * n * stride); err != nil {
			return err
		}
		mem = r.arena.Bytes()
	} else {
		mem = make([]byte, 2*n*stride)
	}
	take := func() []byte {
		p := mem[:s.RDMASize:s.RDMASize]
		mem = mem[stride:]
		return p
	}
	if l.isTarget() {
		for i := range n {
			p := take()
			if r.op == rds.RDMARead {
				l.tx.fill(p, firstContent(i))
			}
			r.mem = append(r.mem, p)
		}
	}
	if l.initiates() {
		for i := range n {
			p := take()
			if r.op == rds.RDMAWrite {
				l.tx.fill(p, firstContent(i))
			}
			reg, err := r.register(p)
			if err != nil {
				return err
			}
			r.slots = append(r.slots, slot{mem: p, region: reg})
		}
	}
	return nil
}

// register registers a slot's memory, waiting for the device if devices may be away.
func (r *rdmaLane) register(mem []byte) (*rds.Region, error) {
	const again = 2 * time.Millisecond
	deadline := time.Now().Add(maxPatience)
	for {
		reg, err := r.sock.RegisterRegion(r.ctx, mem, rds.RegionOptions{Arena: r.arena})
		if err == nil {
			r.mu.Lock()
			r.given = append(r.given, reg)
			r.mu.Unlock()
			return reg, nil
		}
		if r.side.spec.Chaos == "" || !errors.Is(err, rds.ErrDeviceGone) || time.Now().After(deadline) {
			return nil, r.wrap(err)
		}
		select {
		case <-time.After(again):
		case <-r.ctx.Done():
			return nil, r.ctx.Err()
		}
	}
}

// lost gives up a region whose device went away, once nobody touches its memory any more.
func (r *rdmaLane) lost(reg *rds.Region) error {
	_ = reg.Close() // nil always
	if err := awaitRegion(reg); err != nil {
		return r.wrap(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, g := range r.given {
		if g == reg {
			r.given = append(r.given[:i], r.given[i+1:]...)
			break
		}
	}
	return nil
}

// awaitRegion waits until the memory of a region that was freed is ours alone.
func awaitRegion(reg *rds.Region) error {
	t := time.NewTimer(maxPatience)
	defer t.Stop()
	select {
	case <-reg.Done():
		return nil
	case <-t.C:
		return fmt.Errorf("region %v was not given back within %v", reg.Cookie(), maxPatience)
	}
}

// start sets the lane's goroutines going.
func (r *rdmaLane) start() {
	s := r.side
	for i := range r.mem {
		s.goWorker(func() error { return r.offer(i) })
	}
	if r.initiates() {
		s.goWorker(r.complete)
		s.goSender(r.initiate)
	}
	s.goWorker(r.receiveRDMA)
}

// offer keeps a slot of the target registered, and the peer told.
func (r *rdmaLane) offer(i int) error {
	buf := putRDMAHeader(make([]byte, rdmaHeaderBytes), rdmaOffer, uint64(i))
	for {
		reg, err := r.register(r.mem[i])
		if err != nil {
			return err
		}
		err = r.sock.Send(r.ctx, rds.Message{Peer: r.peer, Data: buf, Cookie: reg.Cookie()})
		if err == nil {
			select {
			case <-reg.Done():
				err = rds.ErrDeviceGone
			case <-r.ctx.Done():
				return nil
			}
		}
		if r.side.spec.Chaos == "" || !errors.Is(err, rds.ErrDeviceGone) {
			return r.wrap(err)
		}
		if err := r.lost(reg); err != nil {
			return err
		}
	}
}

// initiate posts operations until the run stops, and then sees each of them through.
func (r *rdmaLane) initiate() error {
	spec := &r.side.spec
	buf := make([]byte, spec.Size)
	r.tx.fill(buf, 0)
	var p *pacer
	if spec.Test == testLoad {
		p = newPacer()
		defer p.close()
	}
	posted := uint64(0)
	for {
		if p != nil && !r.side.awaitDue(p, r.due(posted)) {
			break
		}
		if !r.await(func() bool { return r.slots[posted%uint64(len(r.slots))].freeLocked() }) {
			break
		}
		if err := r.post(buf, posted); err != nil {
			return err
		}
		posted++
	}
	if p != nil {
		r.countUnsent(posted)
	}
	for !r.idle() {
		select {
		case <-r.changed:
		case <-r.ctx.Done():
			return nil
		}
	}
	r.sent = posted
	return nil
}

// freeLocked reports whether an operation may be posted.
func (s *slot) freeLocked() bool { return !s.busy && !s.owed && s.cookie != 0 }

// await waits until ready, which is called with mu held, and reports false when the run stops.
func (r *rdmaLane) await(ready func() bool) bool {
	for !r.side.stopping.Load() {
		r.mu.Lock()
		ok := ready()
		r.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-r.changed:
		case <-r.side.stopped:
		}
	}
	return false
}

// idle reports whether no operation is in flight.
func (r *rdmaLane) idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.slots {
		if r.slots[i].busy {
			return false
		}
	}
	return true
}

func (r *rdmaLane) notify() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// post posts operation seq to its slot, which is free, with the datagram in buf.
func (r *rdmaLane) post(buf []byte, seq uint64) error {
	spec := &r.side.spec
	s := &r.slots[seq%uint64(len(r.slots))]
	if spec.Verify {
		r.tx.fill(buf[rdmaHeaderBytes:], seq)
		if r.op == rds.RDMAWrite {
			r.tx.fill(s.mem, contentOf(seq))
		}
	}
	putRDMAHeader(buf, rdmaOp, seq)
	for {
		r.mu.Lock()
		s.seq, s.used, s.busy, s.owed = seq, s.cookie, true, true
		s.timed, s.start = r.side.measuring.Load(), time.Now()
		if spec.Test == testLoad {
			due := r.due(seq)
			if s.timed = r.side.measured(due); s.timed {
				r.late.record(s.start.Sub(r.side.begun) - due)
			}
			s.start = r.side.begun.Add(due)
		}
		m := rds.Message{Peer: r.peer, Data: buf, RDMA: &rds.RDMA{
			Op: r.op, Local: []rds.Piece{s.region.Piece(0, len(s.mem))}, Remote: s.cookie, Notify: true, Token: seq,
		}}
		r.mu.Unlock()
		err := r.sock.Send(r.ctx, m)
		if err == nil {
			return nil
		}
		if spec.Chaos == "" || !errors.Is(err, rds.ErrDeviceGone) {
			return r.wrap(err)
		}
		if err := r.lost(s.region); err != nil {
			return err
		}
		if s.region, err = r.register(s.mem); err != nil {
			return err
		}
	}
}

// complete takes the completions of the initiator's operations.
func (r *rdmaLane) complete() error {
	buf := make([]byte, rdmaHeaderBytes)
	for {
		c, err := r.sock.ReadCompletion(r.ctx)
		if err != nil {
			return r.wrap(err)
		}
		s := &r.slots[c.Token%uint64(len(r.slots))]
		err = c.Err()
		switch {
		case err == nil && r.op == rds.RDMARead:
			if err := r.checkRead(s, c.Token); err != nil {
				return err
			}
		case err == nil:
		case r.side.spec.Chaos == "" || c.Status == rds.StatusCancelled:
			return r.wrap(fmt.Errorf("operation %d: %w", c.Token, err))
		default:
			r.failed.Add(1)
			if err := r.sock.Send(r.ctx, rds.Message{Peer: r.peer, Data: putRDMAHeader(buf, rdmaVoid, c.Token)}); err != nil {
				return r.wrap(err)
			}
		}
		r.mu.Lock()
		s.busy = false
		if c.Status == rds.StatusRemoteError && s.cookie == s.used {
			s.cookie = 0 // there will be another offer
		}
		s.timed = s.timed && err == nil
		r.settleLocked(s)
		r.mu.Unlock()
		r.notify()
	}
}

// checkRead looks at what READ seq has brought.
func (r *rdmaLane) checkRead(s *slot, seq uint64) error {
	if r.side.spec.Verify {
		content := firstContent(int(seq))
		if n := uint64(len(r.slots)); seq >= n {
			content = contentOf(seq - n)
		}
		if off := r.rx.mismatch(s.mem, content); off >= 0 {
			return r.wrap(&verifyError{fmt.Errorf("READ %d differs from what is there at byte %d of %d", seq, off, len(s.mem))})
		}
	}
	return r.discard(s.mem)
}

// discard gives the pages of a slot back, if that is what is measured.
func (r *rdmaLane) discard(mem []byte) error {
	if !r.side.spec.Discard {
		return nil
	}
	off, _ := r.arena.Offset(mem)
	return r.arena.Discard(off, r.side.spec.stride())
}

// settleLocked counts a round trip when both its operation and the credit for it are there.
func (r *rdmaLane) settleLocked(s *slot) {
	if s.busy || s.owed || r.times == nil {
		return
	}
	if s.timed {
		r.times.record(time.Since(s.start))
	}
	r.received.Add(1)
}

// receiveRDMA takes what the peer says, as target and as initiator.
func (r *rdmaLane) receiveRDMA() error {
	credit := make([]byte, rdmaHeaderBytes)
	for {
		m, err := r.sock.Receive(r.ctx)
		if err != nil {
			return r.wrap(err)
		}
		answer := false
		var n uint64
		if p := m.Bytes(); len(p) < rdmaHeaderBytes || m.Peer != r.peer {
			err = fmt.Errorf("%d bytes from %v", len(p), m.Peer)
		} else {
			n = binary.LittleEndian.Uint64(p[8:])
			answer, err = r.hear(rdmaKind(p[0]), n, p, m.Cookie)
		}
		m.Release()
		if err == nil && answer {
			err = r.sock.Send(r.ctx, rds.Message{Peer: r.peer, Data: putRDMAHeader(credit, rdmaCredit, n)})
		}
		if err != nil {
			return r.wrap(err)
		}
	}
}

// hear deals with one datagram, and reports whether a credit is the answer.
func (r *rdmaLane) hear(k rdmaKind, n uint64, p []byte, c rds.Cookie) (answer bool, err error) {
	switch {
	case k == rdmaOp && r.mem != nil:
		return true, r.hearOp(n, p)
	case k == rdmaVoid && r.mem != nil:
		return r.hearVoid(n)
	case k == rdmaOffer && n < uint64(len(r.slots)):
		r.mu.Lock()
		r.slots[n].cookie = c
		r.mu.Unlock()
	case k == rdmaCredit && r.slots != nil:
		s := &r.slots[n%uint64(len(r.slots))]
		r.mu.Lock()
		ok := s.owed && s.seq == n
		s.owed = false
		r.settleLocked(s)
		r.mu.Unlock()
		if !ok {
			return false, &verifyError{fmt.Errorf("a second credit for operation %d", n)}
		}
	default:
		return false, fmt.Errorf("kind %d, number %d", k, n)
	}
	r.notify()
	return false, nil
}

// hearOp is the datagram behind operation seq.
func (r *rdmaLane) hearOp(seq uint64, p []byte) error {
	s := &r.side.spec
	switch {
	case len(p) != s.Size:
		return &verifyError{fmt.Errorf("datagram %d has %d bytes instead of %d", seq, len(p), s.Size)}
	case seq < r.next:
		return &verifyError{fmt.Errorf("operation %d came again where %d was due (duplicate or out of order)", seq, r.next)}
	case seq > r.next && s.Chaos == "", seq-r.next > uint64(len(r.mem)):
		return &verifyError{fmt.Errorf("operation %d came where %d was due (lost or out of order)", seq, r.next)}
	}
	for ; r.next < seq; r.next++ {
		r.missing[r.next] = struct{}{}
	}
	r.next++
	mem := r.mem[seq%uint64(len(r.mem))]
	if s.Verify {
		if off := r.rx.mismatch(p[rdmaHeaderBytes:], seq); off >= 0 {
			return &verifyError{fmt.Errorf("datagram %d differs from what was sent at byte %d of %d (corrupt)", seq, rdmaHeaderBytes+off, len(p))}
		}
		if r.op == rds.RDMAWrite {
			if off := r.rx.mismatch(mem, contentOf(seq)); off >= 0 {
				return &verifyError{fmt.Errorf("what WRITE %d has written differs at byte %d of %d", seq, off, len(mem))}
			}
		}
	}
	if err := r.renew(seq); err != nil {
		return err
	}
	r.received.Add(1)
	return nil
}

// hearVoid is about an operation that failed, and reports whether its datagram has not come and will not.
func (r *rdmaLane) hearVoid(seq uint64) (bool, error) {
	if r.side.spec.Chaos == "" || seq >= r.next+uint64(len(r.mem)) {
		return false, &verifyError{fmt.Errorf("operation %d is void where %d was due", seq, r.next)}
	}
	for ; r.next <= seq; r.next++ {
		r.missing[r.next] = struct{}{}
	}
	if _, ok := r.missing[seq]; !ok {
		return false, nil // it had arrived
	}
	delete(r.missing, seq)
	if err := r.renew(seq); err != nil {
		return false, err
	}
	r.voided.Add(1)
	return true, nil
}

// renew makes the memory of operation seq ready for the next one.
func (r *rdmaLane) renew(seq uint64) error {
	mem := r.mem[seq%uint64(len(r.mem))]
	if r.op == rds.RDMARead {
		if r.side.spec.Verify {
			r.tx.fill(mem, contentOf(seq))
		}
		return nil
	}
	return r.discard(mem)
}

// close waits until all memory is ours again. The socket has been closed.
func (r *rdmaLane) close() error {
	var errs []error
	for _, reg := range r.given {
		errs = append(errs, reg.Close(), awaitRegion(reg))
	}
	if r.arena != nil {
		errs = append(errs, r.arena.Close())
	}
	return errors.Join(errs...)
}
