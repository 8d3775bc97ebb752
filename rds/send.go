package rds

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/verbs"
)

// MaxMessageSize is the longest datagram in bytes (rds-protocol spec 1.1).
const MaxMessageSize = 1 << 20

const (
	// Socket.snd: messages in the upper bits, payload bytes in the lower.
	sndShift = 40
	sndMask  = 1<<sndShift - 1
	sndOne   = 1 << sndShift

	maxBuffer = 1 << 38
	maxInt64  = 1<<63 - 1

	// A message without payload costs memory as well: a send buffer holds at least minSendMsgs of them, and more
	// only if it is large enough for as many of sndMsgBytes. Longer ones meet the limit on bytes first.
	minSendMsgs = 1 << 16
	sndMsgBytes = 64
)

// owner is a Socket as connections see it.
type owner Socket

func (o *owner) Released(msgs, bytes int) { (*Socket)(o).release(msgs, bytes) }

func (s *Socket) owner() *owner { return (*owner)(s) }

// release gives room in the send buffer back: the messages were acknowledged, or never will be.
func (s *Socket) release(msgs, bytes int) {
	v := s.snd.Add(-(uint64(msgs)<<sndShift + uint64(bytes)))
	c := &s.svc.ctr
	c.sendReleased.Add(uint64(msgs))
	if v == 0 {
		c.sendQueueEmpty.Add(1)
	}
	// A writer is woken when it can do some work, not for each acknowledgement.
	if !s.writers.empty() && s.roomy(v) {
		s.writers.wakeOne()
	}
}

// full reports whether the send buffer takes no more (rds-protocol spec 1.4 step 23: what counts is
// what was queued before).
func (s *Socket) full(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&sndMask) >= sndbuf || int64(v>>sndShift) >= max(minSendMsgs, sndbuf/sndMsgBytes)
}

// roomy reports whether a quarter of the send buffer is free. It is true of an empty one.
func (s *Socket) roomy(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&sndMask) <= sndbuf/4*3 && int64(v>>sndShift) <= max(minSendMsgs, sndbuf/sndMsgBytes)/4*3
}

// offer queues a copy of p for port at d, with x if that is not nil, or says why it cannot now: ErrCongested or
// ErrNoBufferSpace, which pass; any other error does not.
func (s *Socket) offer(d *dest, port uint16, p []byte, x *conn.Extra) error {
	if d.link.PeerCongested(port) {
		return ErrCongested
	}
	delta := uint64(sndOne) | uint64(len(p))
	var v uint64
	for {
		v = s.snd.Load()
		if s.full(v) {
			return ErrNoBufferSpace
		}
		if s.snd.CompareAndSwap(v, v+delta) {
			break
		}
	}
	// A buffer that has become half full, or full, wants an acknowledgement soon (rds-protocol spec 3.6). The
	// kernel asks with every message above half.
	var flags conn.SendFlags
	before, after, sndbuf := int64(v&sndMask), int64((v+delta)&sndMask), s.sndbuf.Load()
	if before < sndbuf/2 && after >= sndbuf/2 || after >= sndbuf {
		flags = conn.AckNow
	}
	if err := d.link.SendExtra(s.owner(), s.port, port, p, flags, x); err != nil {
		s.refund(delta)
		return err
	}
	return nil
}

// refund takes back what an offer has charged and the connection did not take. Another write may have found the buffer
// full because of it.
func (s *Socket) refund(delta uint64) {
	v := s.snd.Add(-delta)
	if !s.writers.empty() && s.full(v+delta) && !s.full(v) {
		s.writers.wakeOne()
	}
}

// refusal is why an offer was not taken, if it may be taken later.
type refusal uint8

const (
	final    refusal = iota // not that: the error is the write's
	noRoom                  // the send buffer is full; acknowledgements make room
	portFull                // the port is congested; the peer's map will tell when it is not
	noMemory                // the connection has no memory. It is all sockets', so nobody tells when it has
)

func refusalOf(err error) refusal {
	switch err {
	case ErrNoBufferSpace:
		return noRoom
	case ErrCongested:
		return portFull
	case conn.ErrNoMemory:
		return noMemory
	}
	return final
}

// finalError gives a connection's reason the names of this package.
func finalError(err error) error {
	switch err {
	case conn.ErrTooManyPieces:
		return fmt.Errorf("%w: %w", ErrRegionTooLarge, err)
	case verbs.ErrDeviceGone:
		return ErrDeviceGone
	}
	return err
}

// cause is what the caller of a write is told.
func (r refusal) cause() error {
	if r == portFull {
		return ErrCongested
	}
	return ErrNoBufferSpace
}

// noMemoryRetry is how long a write waits for memory in the connection between two looks.
const noMemoryRetry = 5 * time.Millisecond

// check is what every write checks before it looks at buffers (rds-protocol spec 1.4 steps 9 and
// 10). The cause of an expired deadline is not known at this point.
func (s *Socket) check(n int) error {
	switch {
	case s.closed.Load():
		return ErrClosed
	case n > MaxMessageSize:
		return fmt.Errorf("%w: %d bytes", ErrMessageTooLong, n)
	case int64(n) > s.sndbuf.Load():
		return fmt.Errorf("%w: %d bytes, send buffer of %d", ErrMessageTooLong, n, s.sndbuf.Load())
	case s.wdl.expired.Load():
		return errDeadlineRead
	}
	return nil
}

// WriteToAddrPort sends p as one datagram and returns len(p) when it is queued; p is the caller's again. It waits
// while the destination port is congested or the send buffer is full, until the write deadline: then nothing was
// sent, and the error matches os.ErrDeadlineExceeded and ErrCongested or ErrNoBufferSpace. A peer
// that cannot be reached is no error; the datagram waits for it.
//
// It does not allocate.
func (s *Socket) WriteToAddrPort(p []byte, addr netip.AddrPort) (int, error) {
	d := s.last.Load()
	if d != nil && d.remote == addr.Addr() && uint32(d.tos) == s.tos.Load() &&
		!s.closed.Load() && !s.wdl.expired.Load() &&
		len(p) <= MaxMessageSize && int64(len(p)) <= s.sndbuf.Load() &&
		s.offer(d, addr.Port(), p, nil) == nil {
		return len(p), nil
	}
	return s.write(context.Background(), p, addr, uint8(s.tos.Load()), nil, true)
}

// WriteTo is WriteToAddrPort for a net.Addr: an Addr, or anything with a method AddrPort.
func (s *Socket) WriteTo(p []byte, addr net.Addr) (int, error) {
	ap, err := toAddrPort(addr)
	if err != nil {
		return 0, s.opError("write", netip.AddrPort{}, err)
	}
	return s.WriteToAddrPort(p, ap)
}

// Write is WriteToAddrPort to the default destination.
func (s *Socket) Write(p []byte) (int, error) {
	d := s.dflt.Load()
	if d == nil {
		err := ErrNotConnected
		if s.closed.Load() {
			err = ErrClosed
		}
		return 0, s.opError("write", netip.AddrPort{}, err)
	}
	return s.WriteToAddrPort(p, d.ap)
}

// Send sends m.Data to m.Peer, or to the default destination if that is zero, with m's type of service
// if it is not zero. It waits as WriteToAddrPort does, and until ctx is done, whichever is first.
func (s *Socket) Send(ctx context.Context, m Message) error {
	return s.send(ctx, m, true)
}

// TrySend is Send that never waits: the error matches ErrCongested or ErrNoBufferSpace instead.
func (s *Socket) TrySend(m Message) error {
	return s.send(context.Background(), m, false)
}

func (s *Socket) send(ctx context.Context, m Message, wait bool) error {
	to, tos, err := s.destination(&m)
	if err != nil {
		return s.opError("write", to, err)
	}
	if m.RDMA != nil || m.Cookie != 0 {
		return s.sendExtra(ctx, &m, to, tos, wait)
	}
	_, err = s.write(ctx, m.Data, to, tos, nil, wait)
	return err
}

// destination is where m goes to.
func (s *Socket) destination(m *Message) (to netip.AddrPort, tos uint8, err error) {
	to, tos = unmap(m.Peer), m.TypeOfService
	if !to.IsValid() {
		d := s.dflt.Load()
		if d == nil {
			return to, tos, ErrNotConnected
		}
		to = d.ap
	}
	if tos == 0 {
		tos = uint8(s.tos.Load())
	}
	return to, tos, nil
}

// sendExtra is send for a message with an operation or a cookie.
func (s *Socket) sendExtra(ctx context.Context, m *Message, to netip.AddrPort, tos uint8, wait bool) error {
	if m.RDMA != nil && m.Cookie != 0 {
		return s.opError("write", to, fmt.Errorf("%w: a cookie and an operation in one message", ErrInvalid))
	}
	if m.RDMA == nil {
		r, err := s.regionOf(m.Cookie)
		if err != nil {
			return s.opError("write", to, err)
		}
		_, err = s.write(ctx, m.Data, to, tos, &conn.Extra{Cookie: uint64(r.cookie)}, wait)
		return err
	}
	o, err := s.operation(m.RDMA, to)
	if err != nil {
		return s.opError("write", to, err)
	}
	if _, err = s.write(ctx, m.Data, to, tos, &o.extra, wait); err != nil {
		o.abort()
	}
	return err
}

// write is every write but the fast one. x may be nil.
func (s *Socket) write(ctx context.Context, p []byte, to netip.AddrPort, tos uint8, x *conn.Extra, wait bool) (int, error) {
	to = unmap(to)
	if !to.IsValid() {
		return 0, s.opError("write", to, ErrNotConnected)
	}
	// The order of the checks is the kernel's (rds-protocol spec 1.4).
	d := s.last.Load()
	if d == nil || d.remote != to.Addr() || d.tos != tos {
		if err := checkDest(s.la.addr, to.Addr()); err != nil {
			return 0, s.opError("write", to, err)
		}
	}
	if err := s.check(len(p)); err != nil {
		return 0, s.opError("write", to, err)
	}
	if d == nil || d.remote != to.Addr() || d.tos != tos {
		var err error
		if d, err = s.la.dest(to.Addr(), tos); err != nil {
			return 0, s.opError("write", to, err)
		}
		s.last.Store(d)
	}
	err := s.offer(d, to.Port(), p, x)
	if err != nil {
		if err = s.offerAgain(ctx, d, to.Port(), p, x, err, wait); err != nil {
			return 0, s.opError("write", to, err)
		}
	}
	return len(p), nil
}

// offerAgain offers p until it is taken or there is a reason to give up. err is why it was not taken
// the first time.
func (s *Socket) offerAgain(ctx context.Context, d *dest, port uint16, p []byte, x *conn.Extra, err error, wait bool) error {
	why := refusalOf(err)
	if why == final {
		return finalError(err)
	}
	s.countRefusal(why, wait)
	if !wait {
		return why.cause()
	}

	wr := writing{s: s, d: d, spin: spinner{hint: &s.writeHint}}
	defer wr.end()
	for {
		switch {
		case s.closed.Load():
			return ErrClosed
		case s.wdl.expired.Load():
			return deadlineFor(why.cause())
		case ctx.Err() != nil:
			return ctxError(ctx.Err(), why.cause())
		}
		wr.wait(ctx, why)
		if err = s.offer(d, port, p, x); err == nil {
			wr.spin.done()
			return nil
		}
		if why = refusalOf(err); why == final {
			return finalError(err)
		}
	}
}

func (s *Socket) countRefusal(why refusal, wait bool) {
	c := &s.svc.ctr
	switch {
	case why == noRoom:
		c.sendQueueFull.Add(1)
	case why == noMemory:
		c.sendNoMemory.Add(1)
	case wait:
		c.congSendBlocked.Add(1)
	default:
		c.congSendError.Add(1)
	}
}

// writing is a write that has to wait.
type writing struct {
	s    *Socket
	d    *dest
	spin spinner
	w    *waiter
	in   refusal // the queue that w is in; final: none
}

// wait returns when it makes sense to offer again: what was in the way may have passed, or something
// else has happened that the caller looks at. It works first, then it enters the queue and returns for one
// more look, then it parks.
func (wr *writing) wait(ctx context.Context, why refusal) {
	s := wr.s
	switch wr.in {
	case why:
		if why == noMemory {
			defer time.AfterFunc(noMemoryRetry, wr.w.notify).Stop()
		}
		wr.spin.park(ctx, s.svc.tr, wr.w)
		wr.leave()
		return
	case final:
		if !wr.spin.spun {
			wr.d.link.Flush() // acknowledgements come for what has been sent
		}
		if wr.spin.turn(s.svc.tr) {
			return
		}
	default:
		wr.leave()
	}
	if wr.w == nil {
		wr.w = s.waiters.get()
	}
	wr.in = why
	switch why {
	case noRoom:
		s.writers.add(wr.w)
	case portFull:
		s.others.add(wr.w)
		wr.d.peer.congWait.add(wr.w)
	case noMemory:
		s.others.add(wr.w)
	}
}

func (wr *writing) leave() {
	switch wr.in {
	case noRoom:
		wr.s.writers.remove(wr.w)
	case portFull:
		wr.d.peer.congWait.remove(wr.w)
		wr.s.others.remove(wr.w)
	case noMemory:
		wr.s.others.remove(wr.w)
	}
	wr.in = final
}

func (wr *writing) end() {
	s := wr.s
	wr.leave()
	if wr.w != nil {
		s.waiters.put(wr.w)
	}
	// Whoever was woken for room passes the rest of it on, also when it gave up.
	if !s.writers.empty() && !s.full(s.snd.Load()) {
		s.writers.wakeOne()
	}
}

// Cancel drops what this socket has sent to addr and the peer has not acknowledged; what had been given to the
// network may still arrive. It returns the number of messages dropped (rds-protocol spec 1.7, RDS_CANCEL_SENT_TO).
func (s *Socket) Cancel(addr netip.AddrPort) (int, error) {
	addr = unmap(addr)
	if s.closed.Load() {
		return 0, s.opError("cancel", addr, ErrClosed)
	}
	if err := checkDest(s.la.addr, addr.Addr()); err != nil {
		return 0, s.opError("cancel", addr, err)
	}
	n := 0
	for _, d := range s.la.known(addr.Addr()) {
		n += d.link.Cancel(s.owner(), int(addr.Port()))
	}
	return n, nil
}
