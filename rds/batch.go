package rds

import (
	"context"
	"fmt"
	"io"
	"net/netip"
)

// Flags modify calls as those of the system's sendmsg and recvmsg do, whose values they have.
type Flags uint32

const (
	// MsgPeek leaves the datagram in the queue (MSG_PEEK).
	MsgPeek Flags = 0x2
	// MsgTrunc in a result says that the datagram was longer than the buffer, and the rest is gone. In a call it asks for
	// the datagram's length, whatever the buffer's, and says that no error is needed (MSG_TRUNC).
	MsgTrunc Flags = 0x20
	// MsgDontWait never waits (MSG_DONTWAIT): the error matches ErrWouldBlock, or what a TrySend's does.
	MsgDontWait Flags = 0x40
)

// readFlags are those of a read. MSG_OOB, which returns nothing at once in the kernel, MSG_WAITALL and MSG_ERRQUEUE are refused.
const readFlags = MsgPeek | MsgTrunc | MsgDontWait

func (f Flags) check(known Flags) error {
	if f&^known != 0 {
		return fmt.Errorf("%w: flags %#x", ErrNotSupported, uint32(f&^known))
	}
	return nil
}

// ReadMsg is ReadFromAddrPort with flags (recvmsg): MsgPeek, MsgDontWait, MsgTrunc. out has MsgTrunc if the datagram was longer than p.
// Unless the caller has passed that too, the error then matches io.ErrShortBuffer, and n is len(p); if it has, n is the datagram's
// length.
func (s *Socket) ReadMsg(p []byte, flags Flags) (n int, from netip.AddrPort, out Flags, err error) {
	if err := flags.check(readFlags); err != nil {
		return 0, from, 0, s.opError("read", from, err)
	}
	r := readOp{p: p, peek: flags&MsgPeek != 0}
	if err = s.readInto(&r, flags&MsgDontWait == 0); err != nil {
		return 0, netip.AddrPort{}, 0, err
	}
	n, from = r.n, r.from
	if r.n < r.length {
		out = MsgTrunc
		if flags&MsgTrunc == 0 {
			return n, from, out, s.opError("read", from, io.ErrShortBuffer)
		}
		n = r.length
	}
	return n, from, out, nil
}

// TryReadFromAddrPort is ReadFromAddrPort that never waits (MSG_DONTWAIT): the error matches ErrWouldBlock if there is nothing to read. That
// error too costs no allocation.
func (s *Socket) TryReadFromAddrPort(p []byte) (int, netip.AddrPort, error) {
	n, from, _, err := s.ReadMsg(p, MsgDontWait)
	return n, from, err
}

// BatchMessage is an element of a batch. It is to this package what golang.org/x/net/ipv4's Message is to that, with an
// address that costs no allocation.
type BatchMessage struct {
	// Buffers are filled, or sent, one after the other, as one datagram.
	Buffers [][]byte
	// Addr is the sender, or the destination; zero: the socket's default one.
	Addr netip.AddrPort
	// N is how many bytes were received, or sent.
	N int
	// Flags has MsgTrunc if a received datagram was longer than Buffers: the rest is gone.
	Flags Flags
	// TypeOfService as in Message.
	TypeOfService uint8
}

// ReadBatch receives as many datagrams as there are, len(ms) at most, and returns how many. It waits for the first until the
// read deadline, unless flags has MsgDontWait, and for no other (recvmmsg with MSG_WAITFORONE). A datagram that did not fit says so in its
// Flags, and is no error.
//
// It does not allocate.
func (s *Socket) ReadBatch(ms []BatchMessage, flags Flags) (int, error) {
	if err := flags.check(MsgDontWait); err != nil {
		return 0, s.opError("read", netip.AddrPort{}, err)
	}
	wait := flags&MsgDontWait == 0
	for i := range ms {
		m := &ms[i]
		r := readOp{ps: m.Buffers}
		if i == 0 {
			if err := s.readInto(&r, wait); err != nil {
				return 0, err
			}
		} else if s.readErr() != nil || !s.tryInto(&r) {
			return i, nil
		}
		m.Addr, m.N, m.TypeOfService, m.Flags = r.from, r.n, r.tos, 0
		if r.n < r.length {
			m.Flags = MsgTrunc
		}
	}
	return len(ms), nil
}

// readOp is a read into one or more buffers, and what came of it.
type readOp struct {
	p    []byte
	ps   [][]byte // in the place of p, if that is nil
	peek bool

	n, length int
	from      netip.AddrPort
	tos       uint8
}

// copyFrom copies as much of piece as there is room for.
func (r *readOp) copyFrom(piece []byte) {
	if r.ps == nil {
		r.n += copy(r.p[r.n:], piece)
		return
	}
	at := r.n
	for _, p := range r.ps {
		if at >= len(p) {
			at -= len(p)
			continue
		}
		k := copy(p[at:], piece)
		r.n, at = r.n+k, 0
		if piece = piece[k:]; len(piece) == 0 {
			return
		}
	}
}

// tryInto does r if there is a datagram.
func (s *Socket) tryInto(r *readOp) bool {
	q := &s.q
	q.readMu.Lock()
	b := q.headLocked()
	if b == nil {
		q.readMu.Unlock()
		return false
	}
	rec := b.head()
	peer := s.svc.peerAt(rec.peer)
	r.length, r.from, r.tos = rec.length, netip.AddrPortFrom(peer.remote, rec.port), rec.tos
	var x *extMsg
	switch {
	case rec.kind != recExt:
		r.copyFrom(b.buf[rec.off : rec.off+rec.length])
		if !r.peek {
			b.take(rec)
		}
	case r.peek:
		r.copyAll(b.ext[b.extR])
	default:
		x = b.take(rec)
	}
	if r.peek {
		next := !q.readers.empty() // it may have been this one that was woken
		q.readMu.Unlock()
		if next {
			q.readers.wakeOne()
		}
		return true
	}
	n := r.n
	if x != nil {
		n = min(r.room(), rec.length)
	}
	q.countLocked(peer, rec.length, n)
	s.unlockRead()
	if x != nil {
		r.copyAll(x) // without the lock: it may be a megabyte
		s.svc.arena.putExt(x)
	}
	if n < rec.length {
		s.svc.ctr.recvShort.Add(1)
	}
	return true
}

func (r *readOp) room() int {
	if r.ps == nil {
		return len(r.p)
	}
	n := 0
	for _, p := range r.ps {
		n += len(p)
	}
	return n
}

func (r *readOp) copyAll(x *extMsg) {
	for i := range x.pieces {
		r.copyFrom(x.pieces[i].data)
	}
}

// readInto does r, and waits for a datagram if told so.
func (s *Socket) readInto(r *readOp, wait bool) error {
	rd := reading{s: s, spin: spinner{hint: &s.readHint}}
	got := false
	err := s.readErr()
	for err == nil {
		if got = s.tryInto(r); got {
			break
		}
		if !wait {
			// Somebody has to do the provider's work, if all anybody does is to ask.
			if !s.svc.tr.Progress() || !s.tryInto(r) {
				err = ErrWouldBlock
			} else {
				got = true
			}
			break
		}
		if err = rd.wait(context.Background()); err == nil {
			err = s.readErr()
		}
	}
	if wait {
		rd.end(got)
	}
	switch err {
	case nil:
		return nil
	case ErrWouldBlock:
		s.settle(true)
		return s.wouldBlock()
	}
	return s.opError("read", netip.AddrPort{}, err)
}

// wouldBlock is ErrWouldBlock as a socket's error, the same every time.
func (s *Socket) wouldBlock() error {
	if e := s.again.Load(); e != nil {
		return e
	}
	e := &OpError{Op: "read", Local: s.Addr(), Err: ErrWouldBlock}
	s.again.Store(e)
	return e
}

// WriteBatch sends the datagrams in order and returns how many it sent; n < len(ms) says that ms[n] failed with err. It waits as
// WriteToAddrPort does, unless flags has MsgDontWait (sendmmsg). Those to one host leave together. Other flags are refused, as
// the kernel does.
//
// It does not allocate for datagrams in one piece.
func (s *Socket) WriteBatch(ms []BatchMessage, flags Flags) (n int, err error) {
	if err := flags.check(MsgDontWait); err != nil {
		return 0, s.opError("write", netip.AddrPort{}, err)
	}
	var b batchWrite
	defer b.end()
	for i := range ms {
		if err := b.write(s, ms, i, flags&MsgDontWait == 0); err != nil {
			return i, err
		}
	}
	return len(ms), nil
}

// batchWrite is a WriteBatch.
type batchWrite struct {
	held *flow // where the one before waits for company
}

// end sends what waits for company that does not come.
func (b *batchWrite) end() {
	if b.held != nil {
		b.held.link.Flush()
	}
}

// write sends ms[i].
func (b *batchWrite) write(s *Socket, ms []BatchMessage, i int, wait bool) error {
	m := &ms[i]
	msg := Message{Peer: m.Addr, TypeOfService: m.TypeOfService}
	to, tos, err := s.destination(&msg)
	var f *flow
	if err == nil {
		n := 0
		for _, p := range m.Buffers {
			n += len(p)
		}
		if f, err = s.route(to, tos, n); err == nil {
			it := item{f: f, port: to.Port(), n: n, further: s.goesWith(ms, i)}
			switch len(m.Buffers) {
			case 0:
			case 1:
				it.p = m.Buffers[0]
			default:
				it.p = make([]byte, 0, n)
				for _, p := range m.Buffers {
					it.p = append(it.p, p...)
				}
			}
			if err = it.put(context.Background(), wait); err == nil {
				m.N = n
				if b.held != f {
					b.end()
				}
				if b.held = nil; it.further {
					b.held = f
				}
				return nil
			}
		}
	}
	return s.opError("write", to, err)
}

// goesWith reports whether ms[i] may wait for the next one, which most likely takes the same connection.
func (s *Socket) goesWith(ms []BatchMessage, i int) bool {
	return i+1 < len(ms) && ms[i].Addr.Addr() == ms[i+1].Addr.Addr() && ms[i].TypeOfService == ms[i+1].TypeOfService
}
