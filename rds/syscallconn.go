package rds

import (
	"context"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// readiness is a socket's eventfd: readable while the socket has something to read, as the kernel's poll has it (rds-protocol
// spec 1.6): a datagram, a completion, or news of congestion. It is made at the first SyscallConn, and costs a look at a
// pointer where there is none.
//
// Whoever adds to an empty queue raises it afterwards, whoever has taken from one, or found it empty, settles it. Both look at the
// queues under mu, so the last of them leaves fd as the queues are.
//
// A raise writes though fd may be readable already. Who polls edge-triggered and has found one queue empty waits for the
// next event, and must get it whatever another queue, or another reader's settle that is still to come, has kept readable.
type readiness struct {
	s *Socket

	mu   sync.Mutex
	fd   int  // -1: closed
	uses int  // calls that have been given fd
	end  bool // close fd with the last of them
	set  bool // fd is readable
	news bool // a port that a write was refused at has cleared, and nobody has looked since
}

func (r *readiness) raise() {
	r.mu.Lock()
	if r.s.readable() { // else somebody has taken it meanwhile
		r.raiseLocked()
	}
	r.mu.Unlock()
}

func (r *readiness) raiseLocked() {
	if r.fd >= 0 && !r.end {
		r.set = true
		eventfdSet(r.fd)
	}
}

// raiseNews is raise for something that no queue has.
func (r *readiness) raiseNews() {
	r.mu.Lock()
	r.news = true
	r.raiseLocked()
	r.mu.Unlock()
}

// settle is called after something was taken. looked: the caller has found that there is nothing to read, so that news are none any more.
func (r *readiness) settle(looked bool) {
	r.mu.Lock()
	if looked {
		r.news = false
	}
	if r.set && r.fd >= 0 && !r.news && !r.s.readable() {
		r.set = false
		eventfdClear(r.fd)
	}
	r.mu.Unlock()
}

// readable reports whether there is something to read.
func (s *Socket) readable() bool { return s.q.some() || s.comp.n.Load() > 0 || s.mon.news() }

// some reports whether there is a datagram. It looks at the end first where they come in: one that a reader moves to the other end
// meanwhile is seen at least once, and a deliverer who asks finds what it has brought without a look at readMu.
func (q *recvq) some() bool {
	q.inMu.Lock()
	in := q.in != nil && q.in.r < q.in.w
	q.inMu.Unlock()
	if in {
		return true
	}
	q.readMu.Lock()
	defer q.readMu.Unlock()
	return q.moreLocked() || q.out != nil && q.out.next != nil
}

// raise says that something can be read now, if somebody listens.
func (s *Socket) raise() {
	if r := s.ready.Load(); r != nil {
		r.raise()
	}
}

// settle says that something was taken, or that there is nothing.
func (s *Socket) settle(looked bool) {
	if r := s.ready.Load(); r != nil {
		r.settle(looked)
	}
}

// SyscallConn gives programs that wait for many things at once a descriptor to poll. It is an eventfd, and readable as
// the kernel's socket is (POLLIN): while there is a datagram, a Completion, or news of congestion (TryReadCongestion; without a congestion
// monitor, that a port has cleared which refused a write of this socket, until a read finds nothing). It is for
// epoll, poll and select only: nothing may be read from it or written to it, and it is always writable. Whether the socket is, is a
// matter of its destinations: CongestedError.Ready tells, and RawConn.Write waits for room in the send buffer.
//
// Edge-triggered (EPOLLET), there is an event when something comes after a call that reads it has found nothing (epoll(7)): each kind is to
// be read until there is none. What comes while there are unread ones of its kind need not be an event.
//
// The descriptor is valid inside the functions given to the RawConn; until Close of the socket outside of them, when an epoll
// forgets it without an event, as it does any that is closed. Having one costs a system call each time the socket's queue becomes
// empty or ceases to be. ErrNotSupported where there is no eventfd.
func (s *Socket) SyscallConn() (syscall.RawConn, error) {
	r, err := s.readiness()
	if err != nil {
		return nil, s.opError("syscallconn", netip.AddrPort{}, err)
	}
	return rawConn{r}, nil
}

func (s *Socket) readiness() (*readiness, error) {
	if r := s.ready.Load(); r != nil {
		return r, nil
	}
	s.readyMu.Lock()
	defer s.readyMu.Unlock()
	if r := s.ready.Load(); r != nil {
		return r, nil
	}
	if s.closed.Load() { // Close looks for one under readyMu
		return nil, ErrClosed
	}
	fd, err := newEventfd()
	if err != nil {
		return nil, err
	}
	r := &readiness{s: s, fd: fd, set: true}
	eventfdSet(fd)
	s.ready.Store(r)
	r.settle(false) // what was there before anybody knew r
	return r, nil
}

// closeReadiness is part of Close.
func (s *Socket) closeReadiness() {
	s.readyMu.Lock()
	r := s.ready.Load()
	s.readyMu.Unlock()
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.end {
		return
	}
	if !r.set { // whoever polls it has something to see
		r.set = true
		eventfdSet(r.fd)
	}
	r.end = true
	r.closeLocked()
}

func (r *readiness) closeLocked() {
	if r.end && r.uses == 0 && r.fd >= 0 {
		eventfdClose(r.fd)
		r.fd = -1
	}
}

// use keeps the descriptor open for a call.
func (r *readiness) use(f func(fd uintptr)) error {
	r.mu.Lock()
	if r.end {
		r.mu.Unlock()
		return ErrClosed
	}
	fd := r.fd
	r.uses++
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.uses--
		r.closeLocked()
		r.mu.Unlock()
	}()
	f(uintptr(fd))
	return nil
}

// rawConn is a readiness for syscall.RawConn's purposes.
type rawConn struct{ r *readiness }

func (c rawConn) error(op string, err error) error {
	if err == nil {
		return nil
	}
	return c.r.s.opError(op, netip.AddrPort{}, err)
}

// Control calls f with the descriptor.
func (c rawConn) Control(f func(fd uintptr)) error { return c.error("control", c.r.use(f)) }

// Read calls f until it returns true, each time when something can be read, at most until the read deadline. If f does not
// read it, it is called again after some milliseconds.
func (c rawConn) Read(f func(fd uintptr) (done bool)) error {
	s := c.r.s
	w := s.waiters.get()
	defer s.waiters.put(w)
	sp := spinner{hint: &s.readHint}
	ready := func() bool { return s.readable() || c.r.hasNews() }
	park := func() {
		qs := [...]*waitq{&s.q.readers, &s.comp.readers, &s.mon.readers}
		for _, q := range qs {
			q.add(w)
		}
		if !ready() && s.readErr() == nil {
			sp.park(context.Background(), s.svc.tr, w)
		}
		for _, q := range qs {
			q.remove(w)
		}
		if s.readable() {
			// A wake that was for one who takes something: this one perhaps does not, or takes one thing of several.
			for _, q := range qs {
				q.wakeOne()
			}
		}
	}
	for {
		if err := s.readErr(); err != nil {
			return c.error("read", err)
		}
		done := false
		if err := c.r.use(func(fd uintptr) { done = f(fd) }); err != nil || done {
			return c.error("read", err)
		}
		if ready() {
			time.Sleep(rawConnRetry) // out of all queues: who waits in one of them takes what he is woken for
		}
		for !ready() && s.readErr() == nil {
			if !sp.turn(s.svc.tr) {
				park()
			}
		}
	}
}

// rawConnRetry is after how long a function that did not do what it could is called again.
const rawConnRetry = 5 * time.Millisecond

func (r *readiness) hasNews() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.news
}

// Write calls f until it returns true, each time when there is room in the send buffer (POLLOUT, rds-protocol spec 1.6), at most until the
// write deadline. If f cannot write though there is room, for congestion perhaps, it is called again after some milliseconds.
func (c rawConn) Write(f func(fd uintptr) (done bool)) error {
	s := c.r.s
	w := s.waiters.get()
	defer s.waiters.put(w)
	sp := spinner{hint: &s.writeHint}
	writeErr := func() error {
		switch {
		case s.closed.Load():
			return ErrClosed
		case s.wdl.expired.Load():
			return errDeadlineNoBuffer
		}
		return nil
	}
	park := func() {
		s.writers.add(w)
		if s.full(s.unacked()) && writeErr() == nil {
			sp.park(context.Background(), s.svc.tr, w)
		}
		s.writers.remove(w)
		if !s.full(s.unacked()) {
			s.writers.wakeOne() // the room is for whoever writes
		}
	}
	for {
		for s.full(s.unacked()) && writeErr() == nil {
			if f := s.last.Load(); f != nil && !sp.spun {
				f.link.Flush()
			}
			if !sp.turn(s.svc.tr) {
				park()
			}
		}
		if err := writeErr(); err != nil {
			return c.error("write", err)
		}
		done := false
		if err := c.r.use(func(fd uintptr) { done = f(fd) }); err != nil || done {
			return c.error("write", err)
		}
		time.Sleep(rawConnRetry)
	}
}

var _ syscall.Conn = (*Socket)(nil)
