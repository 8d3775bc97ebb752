package rds

import (
	"context"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/openrds/openrds/internal/invariants"
)

// Message is a datagram to send, or one that was received and is lent.
type Message struct {
	// Peer is the destination (zero: the socket's default one), or the sender.
	Peer netip.AddrPort
	// Data is the payload to send; nobody keeps it after Send has returned. In a received message
	// it is set if the payload arrived in one piece; Bytes works always.
	Data []byte
	// TypeOfService is the connection that a message takes, or took; 0 in one to send is the socket's (SIOCRDSSETTOS).
	TypeOfService uint8
	// RDMA is an operation to execute before the datagram (RDS_CMSG_RDMA_ARGS); nil: none.
	RDMA *RDMA
	// Buffer has the payload, in the place of Data (Socket.Alloc). It is the caller's again if Send fails.
	Buffer *SendBuf
	// Notify asks for a Completion with Token when the peer has acknowledged the message, or it was cancelled. It is to Send
	// what a zero-copy completion (RDS_CMSG_ZCOPY_COMPLETION) is to the kernel's sendmsg, and Token what RDS_CMSG_ZCOPY_COOKIE is.
	Notify bool
	Token  uint64
	// Cookie names a region of the sender's that the datagram hands out (RDS_CMSG_RDMA_DEST): of the sending socket's,
	// or, in a received message, the peer's. 0: none.
	Cookie Cookie

	// Time is when a received message was queued at the socket (SO_TIMESTAMP, SCM_TIMESTAMP); zero unless SetTimestamps is on.
	Time time.Time
	// Latency is what became of the time until then, and since (RDS_CMSG_RXPATH_LATENCY); zero unless SetReceiveLatency is on.
	Latency ReceiveLatency

	// Of a received message.
	length int
	loan   *loan
	sock   *Socket // lender; nil once released
	blk    *block  // holds Data, if not nil
	ext    *extMsg // holds the pieces, if not nil
	spent  *loans  // under the tag invariants, once released: who wants to hear of a second time
}

// ReceiveLatency is where a message was on its way from the device to the application.
type ReceiveLatency struct {
	HeaderToStart     time.Duration // from its SEND's completion to the message's turn in it (RDS_MSG_RX_HDR_TO_DGRAM_START)
	StartToQueued     time.Duration // until it was whole and queued at the socket (RDS_MSG_RX_DGRAM_REASSEMBLE)
	QueuedToDelivered time.Duration // until Receive took it (RDS_MSG_RX_DGRAM_DELIVERED)
}

// Len is the length of the payload in bytes.
func (m *Message) Len() int {
	if m.sock == nil {
		if m.Buffer != nil {
			return m.Buffer.Len()
		}
		return len(m.Data)
	}
	return m.length
}

// Bytes is the payload in one slice. It copies once if the payload arrived in several pieces. Valid until Release.
func (m *Message) Bytes() []byte {
	if m.Data == nil && m.ext != nil {
		m.Data = make([]byte, m.length)
		m.ext.copyOut(m.Data)
	}
	return m.Data
}

// Buffers is the payload in the pieces in which it arrived, without copying. Valid until Release.
func (m *Message) Buffers() net.Buffers {
	if m.ext == nil {
		return net.Buffers{m.Data}
	}
	bs := make(net.Buffers, len(m.ext.pieces))
	for i := range m.ext.pieces {
		bs[i] = m.ext.pieces[i].data
	}
	return bs
}

// Release gives a received message back. It must be called once, from any goroutine, also after the
// socket was closed; neither m nor its payload may be used after it. It does nothing to a message
// that was not received. A second Release may be another message's, whose reader then has nothing: under the tag
// invariants Service.Close names it.
func (m *Message) Release() {
	s := m.sock
	if s == nil {
		if m.spent != nil {
			m.spent.again("Message")
		}
		return
	}
	if m.blk != nil {
		s.svc.arena.putBlock(m.blk)
	}
	if m.ext != nil {
		s.svc.arena.putExt(m.ext)
	}
	s.svc.lent.remove(m.loan)
	*m = Message{}
	s.loans.Add(-1)
	if invariants.Enabled {
		m.spent = &s.svc.lent // and is not used again
		return
	}
	s.svc.msgs.Put(m)
}

// status is the outcome of one look at a receive queue.
type status uint8

const (
	nothing  status = iota // to read
	complete               // the datagram fitted
	short                  // it did not
)

// tryRead copies the oldest datagram to p.
func (s *Socket) tryRead(p []byte) (n int, from netip.AddrPort, st status) {
	q := &s.q
	q.readMu.Lock()
	b := q.headLocked()
	if b == nil {
		q.readMu.Unlock()
		return 0, from, nothing
	}
	r := b.head()
	x := b.take(r)
	if x == nil {
		n = copy(p, b.buf[r.off:r.off+r.length])
	} else {
		n = min(len(p), r.length)
	}
	peer := s.svc.peerAt(r.peer)
	q.countLocked(peer, r.length, n)
	s.unlockRead()
	if x != nil {
		x.copyOut(p) // without the lock: it may be a megabyte
		s.svc.arena.putExt(x)
	}
	st = complete
	if n < r.length {
		st = short
		s.svc.ctr.recvShort.Add(1)
	}
	return n, netip.AddrPortFrom(peer.remote, r.port), st
}

// tryReceive lends the oldest datagram, nil if there is none.
func (s *Socket) tryReceive() *Message {
	q := &s.q
	q.readMu.Lock()
	b := q.headLocked()
	if b == nil {
		q.readMu.Unlock()
		return nil
	}
	m, ok := s.svc.msgs.Get().(*Message)
	if !ok {
		m = new(Message)
	}
	r := b.head()
	peer := s.svc.peerAt(r.peer)
	m.sock, m.length, m.Peer, m.TypeOfService = s, r.length, netip.AddrPortFrom(peer.remote, r.port), r.tos
	if r.kind == recMeta {
		m.setMeta(b.meta(r))
	}
	if m.ext = b.take(r); m.ext != nil {
		if m.ext.meta != (meta{}) {
			m.setMeta(m.ext.meta)
		}
		if len(m.ext.pieces) == 1 {
			m.Data = m.ext.pieces[0].data
		}
	} else {
		m.Data = s.lendLocked(m, b, b.buf[r.off:r.off+r.length:r.off+r.length])
	}
	q.countLocked(peer, r.length, 0)
	s.loans.Add(1)
	s.unlockRead()
	m.loan = s.svc.lent.add("Message")
	return m
}

// setMeta is given to messages that are not mere payload.
func (m *Message) setMeta(mt meta) {
	m.Cookie = mt.cookie
	if mt.wall != 0 {
		m.Time = time.Unix(0, mt.wall)
	}
	if mt.queued != 0 {
		m.Latency = ReceiveLatency{time.Duration(mt.start), time.Duration(mt.queue), time.Since(m.sock.svc.began) + 1 - time.Duration(mt.queued)}
	}
}

// lendLocked makes data, which lies in b, m's. A loan keeps the whole block, so when the socket's
// loans keep as much as they may the message gets a copy of its own instead: a program that keeps messages pays
// with its own heap, not with everybody's.
func (s *Socket) lendLocked(m *Message, b *block, data []byte) []byte {
	if b.lender == nil {
		if s.lentBytes.Load()+blockSize > int64(s.svc.cfg.MaxLentBytes) {
			s.svc.ctr.recvLoanCopied.Add(1)
			return append(make([]byte, 0, len(data)), data...)
		}
		s.lentBytes.Add(blockSize)
		b.lender = s
	}
	b.refs.Add(1)
	m.blk = b
	return data
}

// unlockRead ends a read: if the port is congested that may be over, and if there is more to read the next
// reader may have it.
//
// What is left unaccounted is less than what ends congestion, and the bit is looked at after the accounts; who sets it looks at the accounts
// after that (updateCongestion). So one of the two sees that the queue is empty, whoever else holds it up.
func (s *Socket) unlockRead() {
	q := &s.q
	if q.congested.Load() || q.done.bytes >= s.rcvbuf.Load()/2 {
		q.flushLocked()
	}
	more := q.moreLocked()
	next := more && !q.readers.empty()
	q.readMu.Unlock()
	if next {
		q.readers.wakeOne()
	} else if !more {
		s.settle(false)
	}
	if q.congested.Load() && s.relaxed(q.bytes.Load(), q.charge.Load()) {
		s.updateCongestion()
	}
}

// readErr is why a read may not begin or go on.
func (s *Socket) readErr() error {
	switch {
	case s.closed.Load():
		return ErrClosed
	case s.rdl.expired.Load():
		return errDeadlineRead
	}
	return nil
}

// reading is a read that found nothing.
type reading struct {
	s    *Socket
	comp bool // of completions
	spin spinner
	w    *waiter
}

// wait returns nil when there may be something to read now.
func (r *reading) wait(ctx context.Context) error {
	s := r.s
	if err := ctx.Err(); err != nil {
		return ctxError(err, nil)
	}
	if !r.spin.spun {
		// What we wait for may be the answer to what we have not sent yet.
		if f := s.last.Load(); f != nil {
			f.link.Flush()
		}
	}
	if r.spin.turn(s.svc.tr) {
		return nil
	}
	if r.w == nil {
		r.w = s.waiters.get()
		s.settle(true)
	}
	q := &s.q.readers
	if r.comp {
		q = &s.comp.readers
		if !s.comp.park(r.w) {
			return nil
		}
	} else if !s.q.park(r.w) {
		return nil
	}
	if s.readErr() == nil {
		r.spin.park(ctx, s.svc.tr, r.w)
	}
	q.remove(r.w)
	return nil
}

// end ends the read. A wake that this reader got and did not use belongs to the next one.
func (r *reading) end(got bool) {
	s := r.s
	if r.w != nil {
		s.waiters.put(r.w)
	}
	switch {
	case got:
		r.spin.done()
	case r.comp:
		s.comp.readers.wakeOne()
	default:
		s.q.readers.wakeOne()
	}
}

// ReadFromAddrPort copies the next datagram to p and returns its length and its sender. It waits for one until the
// read deadline. A datagram longer than p gives the first len(p) bytes, the sender, and an error
// that matches io.ErrShortBuffer; the rest is gone.
//
// It does not allocate.
func (s *Socket) ReadFromAddrPort(p []byte) (int, netip.AddrPort, error) {
	if s.readErr() == nil {
		if n, from, st := s.tryRead(p); st == complete {
			return n, from, nil
		} else if st == short {
			return n, from, s.opError("read", from, io.ErrShortBuffer)
		}
	}
	return s.readSlow(p)
}

func (s *Socket) readSlow(p []byte) (n int, from netip.AddrPort, err error) {
	rd := reading{s: s, spin: spinner{hint: &s.readHint}}
	var st status
	for {
		if err = s.readErr(); err != nil {
			break
		}
		if n, from, st = s.tryRead(p); st != nothing {
			break
		}
		if err = rd.wait(context.Background()); err != nil {
			break
		}
	}
	rd.end(err == nil)
	if st == short {
		err = io.ErrShortBuffer
	}
	if err != nil {
		err = s.opError("read", from, err)
	}
	return n, from, err
}

// ReadFrom is ReadFromAddrPort with the sender as an Addr. It allocates only when the sender changes.
func (s *Socket) ReadFrom(p []byte) (int, net.Addr, error) {
	n, from, err := s.ReadFromAddrPort(p)
	if !from.IsValid() {
		return n, nil, err
	}
	c := s.lastFrom.Load()
	if c == nil || c.ap != from {
		c = &source{ap: from, addr: Addr{from}}
		s.lastFrom.Store(c)
	}
	return n, c.addr, err
}

// Read is ReadFromAddrPort without the sender. It reads from everybody, connected or not.
func (s *Socket) Read(p []byte) (int, error) {
	n, _, err := s.ReadFromAddrPort(p)
	return n, err
}

// Receive lends the next datagram, which the caller must Release. It waits for one until the read
// deadline or until ctx is done, whichever is first; a datagram that is here already beats a done ctx.
//
// It does not allocate, unless the socket's loans keep more than Config.MaxLentBytes: the message then has a copy.
func (s *Socket) Receive(ctx context.Context) (*Message, error) {
	rd := reading{s: s, spin: spinner{hint: &s.readHint}}
	var (
		m   *Message
		err error
	)
	for {
		if err = s.readErr(); err != nil {
			break
		}
		if m = s.tryReceive(); m != nil {
			break
		}
		if err = rd.wait(ctx); err != nil {
			break
		}
	}
	rd.end(err == nil)
	if err != nil {
		return nil, s.opError("read", netip.AddrPort{}, err)
	}
	return m, nil
}

// TryReceive is Receive that never waits (MSG_DONTWAIT): the error matches ErrWouldBlock if there is nothing to receive.
func (s *Socket) TryReceive() (*Message, error) {
	if err := s.readErr(); err != nil {
		return nil, s.opError("read", netip.AddrPort{}, err)
	}
	m := s.tryReceive()
	if m == nil && s.svc.tr.Progress() {
		m = s.tryReceive()
	}
	if m == nil {
		s.settle(true)
		return nil, s.wouldBlock()
	}
	return m, nil
}
