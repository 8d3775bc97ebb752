package rds

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/internal/invariants"
)

// SendBuf is memory for the payload of one datagram that lies where it will be sent from: whoever fills it saves the copy that
// Send makes of Data.
//
//	b, err := s.Alloc(n)
//	defer b.Free()
//	... b.Buffers(), or b.Write ...
//	err = s.Send(ctx, rds.Message{Peer: addr, Buffer: b})
//
// It is in the place of the kernel's MSG_ZEROCOPY (SO_ZEROCOPY), which sends from the application's own memory, over TCP only.
//
// It belongs to the caller until a Send has taken it, or Free; after that it has no memory. It outlives its socket, not its
// Service. Not safe for concurrent use.
type SendBuf struct {
	s     *Socket
	n     int
	w     int          // written by Write
	buf   *conn.Buffer // the memory, if it is worth one
	small []byte       // otherwise
	extra conn.Extra
	loan  *loan
}

// Alloc reserves memory for a datagram of n bytes, which is sent as Message.Buffer. A short one, of up to 7 KiB, is copied
// once more as it is sent: it then travels with others, which saves more than the copy costs.
//
// The memory is that of all connections, and so the error matches ErrNoBufferSpace if there is none, or if this socket has
// Config.MaxReservedBytes of it in SendBufs already; ErrMessageTooLong if no datagram is that long; ErrInvalid if n is negative. It does not
// wait: Send does, for room in the send buffer, and nothing is accounted for before.
func (s *Socket) Alloc(n int) (*SendBuf, error) {
	b, err := s.alloc(n)
	if err != nil {
		return nil, s.opError("alloc", netip.AddrPort{}, err)
	}
	return b, nil
}

func (s *Socket) alloc(n int) (*SendBuf, error) {
	switch {
	case s.closed.Load():
		return nil, ErrClosed
	case n < 0:
		return nil, fmt.Errorf("%w: %d bytes", ErrInvalid, n)
	case n > MaxMessageSize || int64(n) > s.sndbuf.Load():
		return nil, fmt.Errorf("%w: %d bytes", ErrMessageTooLong, n)
	}
	if s.reserved.Add(int64(n)) > int64(s.svc.cfg.MaxReservedBytes) {
		s.reserved.Add(-int64(n))
		s.svc.ctr.sendNoReserve.Add(1)
		return nil, fmt.Errorf("%w: SendBufs of %d bytes", ErrNoBufferSpace, s.svc.cfg.MaxReservedBytes)
	}
	b := &SendBuf{s: s, n: n}
	if n < conn.MinBuffer {
		b.small = make([]byte, n)
	} else {
		var err error
		if b.buf, err = s.svc.tr.Reserve(n); err != nil {
			s.reserved.Add(-int64(n))
			s.svc.ctr.sendNoReserve.Add(1)
			return nil, fmt.Errorf("%w: %w", ErrNoBufferSpace, err)
		}
		b.extra.Buffer = b.buf
	}
	b.loan = s.svc.lent.add("SendBuf")
	return b, nil
}

// Len is how many bytes the datagram has; 0 once it was sent or freed.
func (b *SendBuf) Len() int { return b.n }

// Buffers is the memory, in order: one piece up to 61392 bytes, and more of them for longer datagrams.
func (b *SendBuf) Buffers() net.Buffers {
	switch {
	case b.buf != nil:
		return b.buf.Pieces(nil)
	case len(b.small) > 0:
		return net.Buffers{b.small}
	}
	return nil
}

// Write fills the memory from where the last Write ended. What does not fit is not written, with io.ErrShortWrite.
func (b *SendBuf) Write(p []byte) (n int, err error) {
	at := b.w
	for _, piece := range b.Buffers() {
		if at >= len(piece) {
			at -= len(piece)
			continue
		}
		k := copy(piece[at:], p[n:])
		n, at = n+k, 0
		if n == len(p) {
			break
		}
	}
	b.w += n
	if n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

// ReadFrom fills the rest of the memory from r. It stops when the memory is full, or r is at its end; the datagram keeps its
// length.
func (b *SendBuf) ReadFrom(r io.Reader) (n int64, err error) {
	at := b.w
	for _, piece := range b.Buffers() {
		if at >= len(piece) {
			at -= len(piece)
			continue
		}
		k, err := io.ReadFull(r, piece[at:])
		at, b.w, n = 0, b.w+k, n+int64(k)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return n, nil
		default:
			return n, err
		}
	}
	return n, nil
}

// Free gives the memory back. It does nothing after a Send that succeeded, nor the second time.
func (b *SendBuf) Free() {
	if b.s == nil {
		return
	}
	if b.buf != nil {
		b.buf.Release()
	}
	b.end()
}

// end is the end of the loan.
func (b *SendBuf) end() {
	s := b.s
	s.reserved.Add(-int64(b.n))
	s.svc.lent.remove(b.loan)
	*b = SendBuf{}
}

// put is item.put for a message with b as its payload.
func (b *SendBuf) put(ctx context.Context, it *item, wait bool) error {
	if b.s == nil || b.s.svc != it.f.s.svc {
		return fmt.Errorf("%w: SendBuf that was sent or freed, or of another service", ErrInvalid)
	}
	if b.buf == nil {
		it.p = b.small
	} else {
		if it.x != nil {
			b.extra.Cookie, b.extra.RDMA = it.x.Cookie, it.x.RDMA
		}
		it.x = &b.extra
	}
	err := it.put(ctx, wait)
	if err == nil {
		b.end()
	} else {
		b.extra.Cookie, b.extra.RDMA = 0, nil
	}
	return err
}

// loans are what a Service's application has borrowed and not given back: messages and SendBufs. Under the tag invariants
// each is known with where that was.
type loans struct {
	mu    sync.Mutex
	list  map[*loan]struct{} // guarded by mu
	twice []string           // given back that often; guarded by mu
}

type loan struct {
	what  string
	where invariants.Stack
}

// add enters a loan that the caller's caller makes.
func (l *loans) add(what string) *loan {
	if !invariants.Enabled {
		return nil
	}
	o := &loan{what, invariants.Caller(0)}
	l.mu.Lock()
	if l.list == nil {
		l.list = make(map[*loan]struct{})
	}
	l.list[o] = struct{}{}
	l.mu.Unlock()
	return o
}

func (l *loans) remove(o *loan) {
	if !invariants.Enabled {
		return
	}
	l.mu.Lock()
	delete(l.list, o)
	l.mu.Unlock()
}

// again is told of a loan that is given back a second time by the caller's caller.
func (l *loans) again(what string) {
	site := fmt.Sprintf("%s, given back a second time at\n%v", what, invariants.Caller(0))
	l.mu.Lock()
	l.twice = append(l.twice, site)
	l.mu.Unlock()
}

// err names what is still lent, and what was given back twice.
func (l *loans) err() error {
	if !invariants.Enabled {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) == 0 && len(l.twice) == 0 {
		return nil
	}
	e := &LoanError{Sites: slices.Clone(l.twice)}
	for o := range l.list {
		e.Sites = append(e.Sites, fmt.Sprintf("%s, lent at\n%v", o.what, o.where))
	}
	return e
}

// LoanError is what Service.Close returns under the tag invariants when the application has not given back what it
// had borrowed, or has done so twice.
type LoanError struct {
	Sites []string // each with the stack of the call that lent it, or that gave it back the second time
}

func (e *LoanError) Error() string {
	s := fmt.Sprintf("rds close: %d loans out, or given back twice", len(e.Sites))
	for _, site := range e.Sites {
		s += "\n" + site
	}
	return s
}
