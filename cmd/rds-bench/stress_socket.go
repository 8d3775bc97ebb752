package main

import (
	"context"
	"errors"
	"net/netip"

	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

// stressHost is an RDS: this one, or the kernel's.
type stressHost interface {
	// listen binds a socket with buffers of that many bytes. May wait.
	listen(ctx context.Context, at netip.AddrPort, sendBuffer, receiveBuffer int, tos uint8) (stressSocket, error)
	counters() []rds.Counter
	Close() error
}

// stressSocket is a socket of a stressHost. Its methods may be called from any goroutine; try does not wait, the others do, until there is
// an answer, ctx is done or the socket is closed.
type stressSocket interface {
	AddrPort() netip.AddrPort
	// try sends m; the error matches rds.ErrCongested or rds.ErrNoBufferSpace if it would have to wait.
	try(m stressMessage) error
	send(ctx context.Context, m stressMessage) error
	// receive copies a datagram to buf and says how long it is, from whom, and which memory of the sender's it names.
	receive(ctx context.Context, buf []byte) (n int, from netip.AddrPort, cookie rds.Cookie, err error)
	// completion is the next end of an operation.
	completion(ctx context.Context) (rds.Completion, error)
	// local makes mem known for operations from here.
	local(ctx context.Context, mem []byte) (stressRegion, error)
	// register gives to's host a key to mem; sendMapped does, with a message that carries it.
	register(ctx context.Context, to netip.AddrPort, mem []byte, once bool) (stressRegion, error)
	sendMapped(ctx context.Context, m stressMessage, mem []byte, once bool) (stressRegion, error)
	// cancel takes back what to has not acknowledged.
	cancel(to netip.AddrPort) error
	Close() error
}

// stressRegion is memory for operations.
type stressRegion interface {
	Bytes() []byte
	Cookie() rds.Cookie
	Close() error
}

// stressMessage is a datagram to send.
type stressMessage struct {
	to     netip.AddrPort
	data   []byte     // nil: none, an operation only
	cookie rds.Cookie // memory of ours for the peer; 0: none
	op     *stressOp  // nil: none
}

// stressOp is an operation that is complete before its datagram goes: between remote, from its first byte, and local, of which it takes
// segments pieces of size bytes.
type stressOp struct {
	write          bool // else a read
	remote         rds.Cookie
	local          stressRegion
	segments, size int
	token          uint64 // of its completion
}

// ownHost is a Service.
type ownHost struct {
	svc   *rds.Service
	debug *rdsdebug.Server // for rdsctl; nil: there is no place for its socket
}

func (h ownHost) counters() []rds.Counter { return h.svc.Stats().Counters() }

// Close ends the Service. The other side may be gone: what it did not acknowledge is nobody's loss.
func (h ownHost) Close() error {
	if h.debug != nil {
		defer h.debug.Close()
	}
	if err := h.svc.Close(); err != nil && !errors.As(err, new(*rds.AbandonedError)) {
		return err
	}
	return nil
}

func (h ownHost) listen(ctx context.Context, at netip.AddrPort, sendBuffer, receiveBuffer int, tos uint8) (stressSocket, error) {
	lc := rds.ListenConfig{Service: h.svc, TypeOfService: tos, WriteBuffer: sendBuffer, ReadBuffer: receiveBuffer}
	s, err := lc.Bind(ctx, at)
	if err != nil {
		return nil, err
	}
	return ownSocket{s}, nil
}

// ownSocket is a Socket.
type ownSocket struct{ *rds.Socket }

func (m *stressMessage) own() rds.Message {
	out := rds.Message{Peer: m.to, Data: m.data, Cookie: m.cookie}
	if o := m.op; o != nil {
		r := &rds.RDMA{Op: rds.RDMARead, Remote: o.remote, Silent: m.data == nil, Notify: true, Token: o.token}
		if o.write {
			r.Op = rds.RDMAWrite
		}
		for i := range o.segments {
			r.Local = append(r.Local, o.local.(*rds.Region).Piece(i*o.size, o.size))
		}
		out.RDMA = r
	}
	return out
}

func (s ownSocket) try(m stressMessage) error                       { return s.TrySend(m.own()) }
func (s ownSocket) send(ctx context.Context, m stressMessage) error { return s.Send(ctx, m.own()) }

func (s ownSocket) receive(ctx context.Context, buf []byte) (n int, from netip.AddrPort, cookie rds.Cookie, err error) {
	m, err := s.Receive(ctx)
	if err != nil {
		return 0, from, 0, err
	}
	defer m.Release()
	at := 0
	for _, b := range m.Buffers() {
		at += copy(buf[at:], b)
	}
	return m.Len(), m.Peer, m.Cookie, nil
}

func (s ownSocket) completion(ctx context.Context) (rds.Completion, error) {
	return s.ReadCompletion(ctx)
}

func region(r *rds.Region, err error) (stressRegion, error) {
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (s ownSocket) local(ctx context.Context, mem []byte) (stressRegion, error) {
	return region(s.RegisterRegion(ctx, mem, rds.RegionOptions{}))
}

func (s ownSocket) register(ctx context.Context, to netip.AddrPort, mem []byte, once bool) (stressRegion, error) {
	return region(s.RegisterRegionFor(ctx, to, mem, rds.RegionOptions{UseOnce: once}))
}

func (s ownSocket) sendMapped(ctx context.Context, m stressMessage, mem []byte, once bool) (stressRegion, error) {
	return region(s.SendMapped(ctx, m.own(), mem, rds.RegionOptions{UseOnce: once}))
}

func (s ownSocket) cancel(to netip.AddrPort) error {
	_, err := s.Cancel(to)
	return err
}
