package rds

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Socket is a bound port. It sends to and receives from every host. All methods may be called
// from any goroutine.
//
// A Socket is a net.PacketConn, and once it has a default destination (Connect) a net.Conn as well, in the way in which a net.UDPConn
// is one: each Write is a datagram, each Read takes one, an empty one is 0 bytes and no error, and there is no io.EOF. What reads
// through a buffer of its own must have room in it for the longest datagram, bufio.NewReaderSize(s, MaxMessageSize) for any: what does
// not fit is lost, and the read fails with io.ErrShortBuffer.
type Socket struct {
	svc  *Service
	la   *localAddr
	port uint16
	tos  atomic.Uint32

	// What a write looks at.
	closed atomic.Bool   // decides
	done   chan struct{} // closed after it
	wdl    deadline
	sndbuf atomic.Int64
	last   atomic.Pointer[flow]    // of the latest write
	dflt   atomic.Pointer[defDest] // Connect's

	_ [cacheLine]byte

	// What peers have not acknowledged: flow.go. Writers add, completion handlers subtract.
	first   flow
	others  atomic.Uint64 // of all flows but the first
	shared  atomic.Bool   // there is more than one flow
	writers waitq         // wait for room in the send buffer
	flowMu  sync.RWMutex
	flows   map[netip.Addr]*flow // by host; guarded by flowMu

	_ [cacheLine]byte

	rdl      deadline
	rcvbuf   atomic.Int64
	q        recvq
	congMu   sync.Mutex             // serialises our bit's changes; held across transport.SetCongested
	lastFrom atomic.Pointer[source] // of the latest ReadFrom

	_ [cacheLine]byte

	blocked   waitq // writers that wait for something else: a peer's port (and in its portWaits too), a flow's share (and in its writers too), memory
	waiters   waiterPool
	readHint  spinHint
	writeHint spinHint
	comp      completions
	mon       congMonitor
	recvErr   atomic.Bool
	lazy      atomic.Bool             // regions were freed that wait for company
	loans     atomic.Int64            // messages lent
	lentBytes atomic.Int64            // blocks kept by loans
	reserved  atomic.Int64            // bytes in SendBufs
	again     atomic.Pointer[OpError] // ErrWouldBlock's
	readyMu   sync.Mutex              // serialises making ready with Close
	ready     atomic.Pointer[readiness]
}

// defDest is a default destination.
type defDest struct {
	ap netip.AddrPort
}

// source is a sender's address in the form ReadFrom returns.
type source struct {
	ap   netip.AddrPort
	addr net.Addr
}

var (
	_ net.PacketConn = (*Socket)(nil)
	_ net.Conn       = (*Socket)(nil)
)

func newSocket(svc *Service, la *localAddr) *Socket {
	s := &Socket{svc: svc, la: la, done: make(chan struct{})}
	s.q.svc = svc
	s.sndbuf.Store(int64(svc.cfg.SendBuffer))
	s.setReadBuffer(svc.cfg.ReceiveBuffer)
	s.rdl.fire = s.wakeReaders
	s.wdl.fire = s.wakeWriters
	return s
}

func (s *Socket) wakeReaders() {
	s.q.readers.wakeAll()
	s.comp.readers.wakeAll()
	s.mon.readers.wakeAll()
}

func (s *Socket) wakeWriters() {
	s.writers.wakeAll()
	s.blocked.wakeAll()
}

// Addr is the address the socket is bound to.
func (s *Socket) Addr() Addr { return Addr{s.AddrPort()} }

// Service is what the socket belongs to.
func (s *Socket) Service() *Service { return s.svc }

// AddrPort is Addr as a netip value.
func (s *Socket) AddrPort() netip.AddrPort { return netip.AddrPortFrom(s.la.addr, s.port) }

// LocalAddr is Addr as a net.Addr (getsockname).
func (s *Socket) LocalAddr() net.Addr { return s.Addr() }

// RemoteAddr is the default destination, nil if there is none (getpeername, ENOTCONN).
func (s *Socket) RemoteAddr() net.Addr {
	if d := s.dflt.Load(); d != nil {
		return Addr{d.ap}
	}
	return nil
}

func (s *Socket) opError(op string, peer netip.AddrPort, err error) error {
	return &OpError{Op: op, Local: s.Addr(), Peer: Addr{peer}, Err: err}
}

// Connect makes addr the destination of Write and of messages without one, as connect(2) does. Nothing is sent, and what is received
// does not change. It may be called again, but not undone (rds-protocol spec 1.3).
func (s *Socket) Connect(addr net.Addr) error {
	ap, err := toAddrPort(addr)
	if err != nil {
		return s.opError("connect", netip.AddrPort{}, err)
	}
	return s.ConnectAddrPort(ap)
}

// ConnectAddrPort is Connect with a netip value.
func (s *Socket) ConnectAddrPort(addr netip.AddrPort) error {
	addr = unmap(addr)
	if s.closed.Load() {
		return s.opError("connect", addr, ErrClosed)
	}
	err := checkConnect(addr.Addr())
	if err == nil {
		err = checkDest(s.la.addr, addr.Addr())
	}
	if err != nil {
		return s.opError("connect", addr, err)
	}
	s.dflt.Store(&defDest{ap: addr})
	return nil
}

// SetDeadline sets both deadlines.
func (s *Socket) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// SetReadDeadline is the time from which on reads fail with an error that matches os.ErrDeadlineExceeded; zero is
// never. Blocked reads too; it can be moved at any time. The kernel has SO_RCVTIMEO.
func (s *Socket) SetReadDeadline(t time.Time) error {
	if s.closed.Load() {
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	}
	s.rdl.set(t)
	return nil
}

// SetWriteDeadline is the same for writes (SO_SNDTIMEO). The error also matches what the write waited for, which may be a congested
// destination: the kernel's wait for that has no timeout.
func (s *Socket) SetWriteDeadline(t time.Time) error {
	if s.closed.Load() {
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	}
	s.wdl.set(t)
	return nil
}

// SetReadBuffer sets the receive buffer in payload bytes (SO_RCVBUF). It is a soft limit: with more queued than that the port is
// congested, and its senders wait until there is less than half of it (rds-protocol spec 2.7).
func (s *Socket) SetReadBuffer(bytes int) error {
	if err := s.checkBuffer(bytes); err != nil {
		return err
	}
	s.setReadBuffer(bytes)
	s.updateCongestion()
	return nil
}

func (s *Socket) setReadBuffer(bytes int) {
	s.rcvbuf.Store(int64(bytes))
	// What a stalled reader may keep the provider's buffers from being posted again for; the
	// rest of its queue is copied.
	s.q.pinLimit.Store(2*int64(bytes) + MaxMessageSize)
}

// SetWriteBuffer sets the send buffer in payload bytes (SO_SNDBUF): a write waits while at least as many are
// unacknowledged. No message is larger than it (rds-protocol spec 1.4).
func (s *Socket) SetWriteBuffer(bytes int) error {
	if err := s.checkBuffer(bytes); err != nil {
		return err
	}
	s.sndbuf.Store(int64(bytes))
	s.wakeWriters()
	return nil
}

func (s *Socket) checkBuffer(bytes int) error {
	if s.closed.Load() {
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	}
	if bytes < 1 || int64(bytes) > maxBuffer {
		return s.opError("set", netip.AddrPort{}, fmt.Errorf("%w: buffer of %d bytes", ErrInvalid, bytes))
	}
	return nil
}

// Unacknowledged is how many messages and payload bytes of this socket wait for their peers.
func (s *Socket) Unacknowledged() (msgs int, bytes int64) {
	v := s.unacked()
	return int(v >> outShift), int64(v & outMask)
}

// Close unbinds the port. Whoever is blocked in the socket returns with ErrClosed; what was received and not read
// vanishes; what was written is still delivered. Lent messages stay valid. Its regions are freed: Region.Done tells when
// their memory is the application's alone.
func (s *Socket) Close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return nil
	}
	close(s.done)
	// 1. The port is not congested any more, and says so while it is still ours: from here on its bit is the next socket's.
	s.updateCongestion()
	// 2. No new datagrams: the port can be bound again at once.
	s.la.mu.Lock()
	s.la.ports.unbind(s.port, s)
	s.la.mu.Unlock()
	// 3. Everybody out.
	s.rdl.stop()
	s.wdl.stop()
	s.wakeReaders()
	s.wakeWriters()
	// 4. What nobody read. What others do about their congestion is of no interest any more.
	s.svc.ctr.recvDropDeadSock.Add(uint64(s.q.close()))
	s.stopStamps()
	s.mon.stop(s)
	s.closeReadiness()
	// 5. Peers may not touch the socket's memory any more. Operations of its own that are on their way keep theirs to
	// their end.
	s.closeRegions()
	return nil
}

// overfull reports whether a queue of that much makes the port congested. Datagrams without payload do not count for
// the kernel; here they do, by what their records cost, since every queue has a bound.
func (s *Socket) overfull(bytes, charge int64) bool {
	limit := s.rcvbuf.Load()
	return bytes > limit || charge > 2*limit+chargeSlack
}

// hardBound is the charge past which the peers with most in the queue are refused: they ignore congestion.
func (s *Socket) hardBound() int64 {
	return max(int64(s.svc.cfg.MaxSocketBytes), 2*s.rcvbuf.Load()+chargeSlack)
}

// relaxed reports whether it is little enough to end congestion.
func (s *Socket) relaxed(bytes, charge int64) bool {
	limit := s.rcvbuf.Load()
	return (bytes < limit/2 || bytes <= 0) && charge < limit+chargeSlack/2
}

// chargeSlack keeps small receive buffers from being ruled by the cost of records.
const chargeSlack = 64 << 10

// updateCongestion brings our bit in the local map in line with the queue. Whoever has changed the
// queue calls it after the change, so that of two at the same time the last one sees both.
func (s *Socket) updateCongestion() {
	q := &s.q
	s.congMu.Lock()
	defer s.congMu.Unlock()
	for {
		bytes, charge := q.bytes.Load(), q.charge.Load()
		if s.overfull(bytes, charge) && q.readMu.TryLock() { // else a reader is at it
			q.flushLocked()
			q.readMu.Unlock()
			bytes, charge = q.bytes.Load(), q.charge.Load()
		}
		now := q.congested.Load()
		want := now
		switch {
		case s.closed.Load():
			want = false
		case s.overfull(bytes, charge):
			want = true
		case s.relaxed(bytes, charge):
			want = false
		}
		if want == now {
			return
		}
		q.congested.Store(want)
		s.svc.tr.SetCongested(s.la.addr, s.port, want)
		if !want {
			s.la.clearNearby(s.port)
		} else {
			s.svc.ctr.congSet.Add(1)
		}
	}
}
