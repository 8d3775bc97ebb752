package rds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/verbs"
)

// MaxMessageSize is the longest datagram in bytes (rds-protocol spec 1.1).
const MaxMessageSize = 1 << 20

// What is in a write's way within the socket.
var (
	errFull  = errors.New("send buffer is full")
	errShare = errors.New("destination's share of the send buffer is full")
)

// item is a datagram on its way to a connection that may have to wait.
type item struct {
	f       *flow
	port    uint16      // at f's host
	p       []byte      // payload
	n       int         // its length, wherever it is
	x       *conn.Extra // nil: nothing but a payload
	notice  *notice     // nil: nobody wants to know how it ends
	further bool        // there is another one behind it
}

func (it *item) offer() error {
	var flags conn.SendFlags
	if it.further {
		flags = conn.More
	}
	var o conn.Owner = it.f
	if it.notice != nil {
		o, flags = it.notice, flags|conn.AckNow
	}
	return it.f.offer(o, it.port, it.p, it.n, flags, it.x)
}

// offer queues a copy of p, or the n bytes that x has, for port, or says why it cannot now: ErrCongested, errFull, errShare
// or conn.ErrNoMemory, which pass; any other error does not.
func (f *flow) offer(o conn.Owner, port uint16, p []byte, n int, flags conn.SendFlags, x *conn.Extra) error {
	if f.link.PeerCongested(port) {
		return ErrCongested
	}
	delta := uint64(outOne) | uint64(n)
	ask, err := f.charge(delta)
	if err != nil {
		return err
	}
	if ask {
		flags |= conn.AckNow
	}
	if err = f.link.SendExtra(o, f.s.port, port, p, flags, x); err != nil {
		f.refund(delta)
	}
	return err
}

// refusal is why an offer was not taken, if it may be taken later.
type refusal uint8

const (
	final    refusal = iota // not that: the error is the write's
	noRoom                  // the send buffer is full; acknowledgements make room
	noShare                 // the destination's share of it is; acknowledgements of that peer make room
	portFull                // the port is congested; the peer's map will tell when it is not
	noMemory                // the connection has no memory. It is all sockets', so nobody tells when it has
)

func refusalOf(err error) refusal {
	switch err {
	case errFull:
		return noRoom
	case errShare:
		return noShare
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
func (it *item) cause(why refusal) error {
	if why == portFull {
		return &CongestedError{Dest: netip.AddrPortFrom(it.f.remote, it.port), d: it.f.d}
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

// route checks a write of n bytes to to, which is unmapped, with type of service tos, in the kernel's order (rds-protocol spec
// 1.4 steps 3 to 10), and finds its flow.
func (s *Socket) route(to netip.AddrPort, tos uint8, n int) (*flow, error) {
	if !to.IsValid() {
		return nil, ErrNotConnected
	}
	f := s.last.Load()
	known := f != nil && f.remote == to.Addr() && f.tos == tos
	if !known {
		if err := checkDest(s.la.addr, to.Addr()); err != nil {
			return nil, err
		}
	}
	if err := s.check(n); err != nil {
		return nil, err
	}
	if !known {
		var err error
		if f, err = s.flow(to.Addr(), tos); err != nil {
			return nil, err
		}
		s.last.Store(f)
	}
	return f, nil
}

// WriteToAddrPort sends p as one datagram and returns len(p) when it is queued; p is the caller's again. It waits
// while the destination port is congested or the send buffer is full, until the write deadline: then nothing was
// sent, and the error matches os.ErrDeadlineExceeded and ErrCongested or ErrNoBufferSpace. A peer
// that cannot be reached is no error; the datagram waits for it.
//
// It does not allocate.
func (s *Socket) WriteToAddrPort(p []byte, addr netip.AddrPort) (int, error) {
	f := s.last.Load()
	if f != nil && f.remote == addr.Addr() && uint32(f.tos) == s.tos.Load() &&
		!s.closed.Load() && !s.wdl.expired.Load() &&
		len(p) <= MaxMessageSize && int64(len(p)) <= s.sndbuf.Load() &&
		f.offer(f, addr.Port(), p, len(p), 0, nil) == nil {
		return len(p), nil
	}
	return s.write(p, addr, true)
}

// TryWriteToAddrPort is WriteToAddrPort that never waits (MSG_DONTWAIT): the error matches ErrCongested or ErrNoBufferSpace
// instead.
func (s *Socket) TryWriteToAddrPort(p []byte, addr netip.AddrPort) (int, error) {
	return s.write(p, addr, false)
}

// write is every write of mere bytes but the fast one.
func (s *Socket) write(p []byte, to netip.AddrPort, wait bool) (int, error) {
	to = unmap(to)
	f, err := s.route(to, uint8(s.tos.Load()), len(p))
	if err == nil {
		if err = f.offer(f, to.Port(), p, len(p), 0, nil); err == nil {
			return len(p), nil
		}
		it := item{f: f, port: to.Port(), p: p, n: len(p)}
		err = it.again(context.Background(), wait, err)
	}
	if err != nil {
		return 0, s.opError("write", to, err)
	}
	return len(p), nil
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

// Send sends m.Data, or m.Buffer, to m.Peer, or to the default destination if that is zero, with m's type of service
// if it is not zero. It waits as WriteToAddrPort does, and until ctx is done, whichever is first.
func (s *Socket) Send(ctx context.Context, m Message) error {
	return s.send(ctx, &m, true)
}

// TrySend is Send that never waits (MSG_DONTWAIT): the error matches ErrCongested or ErrNoBufferSpace instead.
func (s *Socket) TrySend(m Message) error {
	return s.send(context.Background(), &m, false)
}

func (s *Socket) send(ctx context.Context, m *Message, wait bool) error {
	to, tos, err := s.destination(m)
	if err == nil {
		if err = s.sendTo(ctx, m, to, tos, wait); err == nil {
			return nil
		}
	}
	return s.opError("write", to, err)
}

// sendTo is send to a known destination. The order of the checks is the kernel's (rds-protocol spec 1.4).
func (s *Socket) sendTo(ctx context.Context, m *Message, to netip.AddrPort, tos uint8, wait bool) (err error) {
	it := item{port: to.Port(), p: m.Data, n: len(m.Data)}
	if m.Buffer != nil {
		it.n = m.Buffer.Len()
	}
	if it.f, err = s.route(to, tos, it.n); err != nil {
		return err
	}
	if m.RDMA == nil && m.Cookie == 0 && m.Buffer == nil && !m.Notify {
		return it.put(ctx, wait)
	}
	return s.sendExtra(ctx, m, &it, to, wait)
}

// destination is where m goes to.
func (s *Socket) destination(m *Message) (to netip.AddrPort, tos uint8, err error) {
	to, tos = unmap(m.Peer), m.TypeOfService
	if !to.IsValid() {
		d := s.dflt.Load()
		switch {
		case d != nil:
			to = d.ap
		case s.closed.Load():
			return to, tos, ErrClosed
		default:
			return to, tos, ErrNotConnected
		}
	}
	if tos == 0 {
		tos = uint8(s.tos.Load())
	}
	return to, tos, nil
}

// sendExtra is the end of sendTo for a message with more than a payload.
func (s *Socket) sendExtra(ctx context.Context, m *Message, it *item, to netip.AddrPort, wait bool) (err error) {
	switch {
	case m.RDMA != nil && m.Cookie != 0:
		return fmt.Errorf("%w: a cookie and an operation in one message", ErrInvalid)
	case m.Buffer != nil && m.Data != nil:
		return fmt.Errorf("%w: Data and a Buffer in one message", ErrInvalid)
	}
	var o *operation
	switch {
	case m.RDMA != nil:
		if o, err = s.operation(m.RDMA, to); err != nil {
			return s.unlessClosed(err)
		}
		it.x = &o.extra
	case m.Cookie != 0:
		r, err := s.regionOf(m.Cookie)
		if err != nil {
			return s.unlessClosed(err)
		}
		it.x = &conn.Extra{Cookie: uint64(r.cookie)}
	}
	if m.Notify {
		if !s.comp.promise() {
			err = errTooManyCompletions
		} else {
			it.notice = &notice{f: it.f, what: Completion{Token: m.Token, Peer: to}}
		}
	}
	if err == nil {
		if m.Buffer == nil {
			err = it.put(ctx, wait)
		} else {
			err = m.Buffer.put(ctx, it, wait)
		}
		if err != nil && m.Notify {
			s.comp.breakPromise()
		}
	}
	if err != nil && o != nil {
		o.abort()
	}
	return err
}

// unlessClosed is err, of a write whose region cannot be used, or ErrClosed: Close frees regions also under a write that
// has found the socket open.
func (s *Socket) unlessClosed(err error) error {
	if s.closed.Load() {
		return ErrClosed
	}
	return err
}

// put offers the item until it is taken, or there is a reason to give up.
func (it *item) put(ctx context.Context, wait bool) error {
	err := it.offer()
	if err != nil {
		err = it.again(ctx, wait, err)
	}
	return err
}

// again is put after an offer that was refused with err.
func (it *item) again(ctx context.Context, wait bool, err error) error {
	s, why := it.f.s, refusalOf(err)
	if why == final {
		return finalError(err)
	}
	if !wait {
		if why == portFull && (s.mon.on.Load() || s.ready.Load() != nil) {
			// Told when it clears, unless that has happened by now (rds-protocol spec 1.9).
			s.mon.met(s, &it.f.d.peer.cong, it.port)
			if err = it.offer(); err == nil {
				return nil
			}
			if why = refusalOf(err); why == final {
				return finalError(err)
			}
		}
		s.countRefusal(why, wait)
		return it.cause(why)
	}
	s.countRefusal(why, wait)

	it.further = false // whoever waits wants what is behind it sent
	wr := writing{s: s, f: it.f, port: it.port, spin: spinner{hint: &s.writeHint}}
	defer wr.end()
	for {
		switch {
		case s.closed.Load():
			return ErrClosed
		case s.wdl.expired.Load():
			return deadlineFor(it.cause(why))
		case ctx.Err() != nil:
			return ctxError(ctx.Err(), it.cause(why))
		}
		wr.wait(ctx, why)
		if err = it.offer(); err == nil {
			wr.spin.done()
			return nil
		}
		was := why
		if why = refusalOf(err); why == final {
			return finalError(err)
		}
		if why != was {
			wr.leave() // first: no wake comes behind this
			wr.passOn()
		}
	}
}

func (s *Socket) countRefusal(why refusal, wait bool) {
	c := &s.svc.ctr
	switch {
	case why == noRoom || why == noShare:
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
	f    *flow
	port uint16
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
			wr.f.link.Flush() // acknowledgements come for what has been sent
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
	case noShare:
		s.blocked.add(wr.w)
		wr.f.writers.add(wr.w)
	case portFull:
		s.blocked.add(wr.w)
		wr.f.d.peer.cong.add(wr.port, wr.w)
	case noMemory:
		s.blocked.add(wr.w)
	}
}

func (wr *writing) leave() {
	switch wr.in {
	case noRoom:
		wr.s.writers.remove(wr.w)
	case noShare:
		wr.f.writers.remove(wr.w)
		wr.s.blocked.remove(wr.w)
	case portFull:
		wr.f.d.peer.cong.remove(wr.port, wr.w)
		wr.s.blocked.remove(wr.w)
	case noMemory:
		wr.s.blocked.remove(wr.w)
	}
	wr.in = final
}

func (wr *writing) end() {
	wr.leave()
	if wr.w != nil {
		wr.s.waiters.put(wr.w)
	}
	wr.passOn()
}

// passOn is for a write that may have been woken for room: it passes on what it leaves of it, also when it gives up, or finds something else in
// its way.
func (wr *writing) passOn() {
	s := wr.s
	if !s.writers.empty() && !s.full(s.unacked()) {
		s.writers.wakeOne()
	}
	if !wr.f.writers.empty() && !s.fullShare(wr.f.out.Load()) {
		wr.f.writers.wakeOne()
	}
}

// Cancel drops what this socket has sent to addr and the peer has not acknowledged; what had been given to the
// network may still arrive. It returns the number of messages dropped, of all types of service (rds-protocol spec 1.7,
// RDS_CANCEL_SENT_TO). Whoever asked for it is told (StatusCancelled). Memory of operations that were cancelled may be in use for a
// moment still, until Region.Done; the kernel's call waits for that.
func (s *Socket) Cancel(addr netip.AddrPort) (int, error) {
	addr = unmap(addr)
	if s.closed.Load() {
		return 0, s.opError("cancel", addr, ErrClosed)
	}
	if err := checkDest(s.la.addr, addr.Addr()); err != nil {
		return 0, s.opError("cancel", addr, err)
	}
	n := 0
	for _, f := range s.flowsTo(addr.Addr()) {
		n += f.link.Cancel(f, int(addr.Port()))
	}
	return n, nil
}
