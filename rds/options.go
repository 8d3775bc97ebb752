package rds

import (
	"fmt"
	"net/netip"
)

// Transport is what carries datagrams; the values are the kernel's (SO_RDS_TRANSPORT, rds-protocol spec 1.7), plus one.
type Transport uint8

const (
	TransportAny Transport = iota // the first that owns the address
	TransportIB                   // RDMA verbs (RDS_TRANS_IB, 0 there)
	TransportTCP                  // RDS_TRANS_TCP, 2 there
)

func (t Transport) String() string {
	switch t {
	case TransportAny:
		return "any"
	case TransportIB:
		return "infiniband"
	case TransportTCP:
		return "tcp"
	}
	return fmt.Sprintf("Transport(%d)", uint8(t))
}

// check refuses a transport that this package does not have, as the kernel does without the module.
func (t Transport) check() error {
	switch t {
	case TransportAny, TransportIB:
		return nil
	case TransportTCP:
		return fmt.Errorf("%w: %v", ErrNoTransport, t)
	}
	return fmt.Errorf("%w: transport %d", ErrInvalid, uint8(t))
}

// Transport is what the socket's datagrams travel on: TransportIB, always. It is chosen when a socket is bound
// (ListenConfig.Transport) and cannot be changed.
func (s *Socket) Transport() Transport { return TransportIB }

// SetTypeOfService chooses the connection on which writes travel (SIOCRDSSETTOS): each type of service of a pair of hosts has
// its own, with no order between them. The default is 0. As with the kernel it can be chosen once, before anything is sent; later the
// error matches ErrInvalid. Messages can choose for themselves (Message.TypeOfService).
func (s *Socket) SetTypeOfService(tos uint8) error {
	switch {
	case s.closed.Load():
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	case s.last.Load() != nil:
		return s.opError("set", netip.AddrPort{}, fmt.Errorf("%w: type of service of a socket that has sent", ErrInvalid))
	case !s.tos.CompareAndSwap(0, uint32(tos)):
		return s.opError("set", netip.AddrPort{}, fmt.Errorf("%w: type of service was set to %d", ErrInvalid, s.tos.Load()))
	}
	return nil
}

// TypeOfService is that of writes that do not choose their own (SIOCRDSGETTOS).
func (s *Socket) TypeOfService() uint8 { return uint8(s.tos.Load()) }

// ReadBuffer is what SetReadBuffer has set, in payload bytes (SO_RCVBUF).
func (s *Socket) ReadBuffer() int { return int(s.rcvbuf.Load()) }

// WriteBuffer is what SetWriteBuffer has set, in payload bytes (SO_SNDBUF).
func (s *Socket) WriteBuffer() int { return int(s.sndbuf.Load()) }

// SetTimestamps chooses whether datagrams that arrive from now on get a Message.Time (SO_TIMESTAMP).
func (s *Socket) SetTimestamps(on bool) error { return s.setStamps(stampTime, on) }

// SetReceiveLatency chooses whether datagrams that arrive from now on get a Message.Latency (SO_RDS_MSG_RXPATH_LATENCY). While
// any socket of the Service has it on, each datagram costs two readings of the clock. Between sockets of one Service there is
// only the last stage.
func (s *Socket) SetReceiveLatency(on bool) error { return s.setStamps(stampLatency, on) }

func (s *Socket) setStamps(which stamps, on bool) error {
	q := &s.q
	q.inMu.Lock()
	if q.closed {
		q.inMu.Unlock()
		return s.opError("set", netip.AddrPort{}, ErrClosed)
	}
	was := q.stamps
	if on {
		q.stamps |= which
	} else {
		q.stamps &^= which
	}
	changed := (was^q.stamps)&stampLatency != 0
	q.inMu.Unlock()
	if changed {
		s.svc.tr.TraceReceive(on)
	}
	return nil
}

// stopStamps is the end of the socket's part in tracing. Its queue is closed.
func (s *Socket) stopStamps() {
	q := &s.q
	q.inMu.Lock()
	was := q.stamps
	q.stamps = 0
	q.inMu.Unlock()
	if was&stampLatency != 0 {
		s.svc.tr.TraceReceive(false)
	}
}
