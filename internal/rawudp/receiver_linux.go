package rawudp

import (
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
)

const (
	recvBuffers     = 8 // hot: more of them would leave the cache
	recvBufferBytes = 64 << 10
)

// A Receiver receives the messages of one Sender: the first whose packet 0 arrives.
type Receiver struct {
	*socket

	bufs  [][]byte
	from  [recvBuffers]unix.RawSockaddrInet4
	ctl   [recvBuffers]segmentControl
	iovs  [recvBuffers]unix.Iovec
	msgs  [recvBuffers]mmsghdr
	count int    // messages of the last recvmmsg
	at    int    // the one being walked
	rest  []byte // of it
	seg   int    // size of its packets
	index uint16 // of the next packet in it

	peer   unix.RawSockaddrInet4
	flow   roce.Flow
	back   roce.Flow
	bound  bool // peer is known
	expect psn.PSN
	ackDue bool // at the end of the batch
	nakDue bool
	gap    bool // a NAK for expect has been sent

	ackBuf [roce.BTHLen + roce.AETHLen + roce.ICRCLen]byte
	ackIov unix.Iovec
	ackMsg [1]mmsghdr

	accepted uint64
	counters
}

// NewReceiver opens a Receiver at local; port 0 picks one.
func NewReceiver(local netip.AddrPort, o Options) (*Receiver, error) {
	sock, err := openSocket(local)
	if err != nil {
		return nil, err
	}
	if !o.NoGRO {
		// Kernels without it (before 5.0) deliver one by one, which is a difference in speed only.
		_ = unix.SetsockoptInt(sock.fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	}
	r := &Receiver{socket: sock}
	for i := range r.msgs {
		b := make([]byte, recvBufferBytes)
		r.bufs = append(r.bufs, b)
		r.iovs[i].Base = &b[0]
		r.iovs[i].SetLen(len(b))
		h := &r.msgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&r.from[i]))
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Control = (*byte)(unsafe.Pointer(&r.ctl[i]))
		r.reset(i)
	}
	h := &r.ackMsg[0].hdr
	h.Name, h.Namelen = (*byte)(unsafe.Pointer(&r.peer)), unix.SizeofSockaddrInet4
	r.ackIov.Base = &r.ackBuf[0]
	r.ackIov.SetLen(len(r.ackBuf))
	h.Iov = &r.ackIov
	h.SetIovlen(1)
	return r, nil
}

// Recv copies the next message to p and returns its length.
func (r *Receiver) Recv(p []byte) (int, error) {
	n := 0
	for {
		op, b, err := r.next()
		if err != nil {
			return 0, err
		}
		if n+len(b) > len(p) {
			return 0, fmt.Errorf("message longer than the buffer of %d bytes", len(p))
		}
		n += copy(p[n:], b)
		if op == roce.RCSendOnly || op == roce.RCSendLast {
			return n, nil
		}
	}
}

// Discard receives n packets, checks their ICRC and their order, and looks no further.
func (r *Receiver) Discard(n int) error {
	for range n {
		if _, _, err := r.next(); err != nil {
			return err
		}
	}
	return nil
}

// next returns the next packet in order. payload is valid until the next call.
func (r *Receiver) next() (op roce.Opcode, payload []byte, err error) {
	for {
		if len(r.rest) == 0 {
			if err := r.fill(); err != nil {
				return 0, nil, err
			}
		}
		n := min(r.seg, len(r.rest))
		pkt, index := r.rest[:n], r.index
		r.rest = r.rest[n:]
		r.index++
		if op, payload, ok := r.accept(pkt, index); ok {
			return op, payload, nil
		}
	}
}

// accept looks at one packet.
func (r *Receiver) accept(pkt []byte, index uint16) (roce.Opcode, []byte, bool) {
	if !r.bound {
		r.bind(&r.from[r.at-1])
	}
	var p roce.Packet
	id, v := r.flow.Check(pkt, index)
	if v == roce.Bad || v == roce.BadDF || id >= maxTrainSegs || r.from[r.at-1] != r.peer || roce.Parse(pkt, &p) != nil {
		r.badICRC.Add(1)
		return 0, nil, false
	}
	d := p.BTH.PSN().Sub(r.expect)
	switch {
	case d == 0:
		r.expect = r.expect.Add(1)
		r.accepted++
		r.bound, r.gap = true, false
		r.ackDue = r.ackDue || p.BTH.AckReq()
		return p.Op, p.Payload, true
	case d < 0:
		r.duplicates.Add(1)
		r.ackDue = r.ackDue || p.BTH.AckReq()
	default:
		r.outOfOrder.Add(1)
		r.nakDue = r.nakDue || !r.gap
		r.gap = true
	}
	return 0, nil, false
}

// bind makes from the peer for now.
func (r *Receiver) bind(from *unix.RawSockaddrInet4) {
	r.peer = *from
	remote := addrPort(from)
	r.flow, r.back = roce.NewFlow(remote, r.local), roce.NewFlow(r.local, remote)
}

// fill goes to the next datagram, or train. When the batch is done it acknowledges what is to be
// acknowledged and waits for another one.
func (r *Receiver) fill() error {
	for r.at == r.count {
		r.packets.Store(r.accepted)
		if err := r.acknowledge(); err != nil {
			return err
		}
		if err := r.usable(); err != nil {
			return err
		}
		for i := range r.count {
			r.reset(i)
		}
		r.at, r.count = 0, 0
		n, err := r.recvmmsg(r.msgs[:], unix.MSG_WAITFORONE)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
		if r.closed.Load() {
			return ErrClosed // what woke us looks like an empty datagram
		}
		r.count = n
	}
	i := r.at
	r.at++
	n := int(r.msgs[i].len)
	r.rest, r.seg, r.index = r.bufs[i][:n], max(n, 1), 0
	h := &r.msgs[i].hdr
	if g := &r.ctl[i]; h.Controllen >= unix.SizeofCmsghdr && g.hdr.Level == unix.SOL_UDP && g.hdr.Type == unix.UDP_GRO {
		if size := *(*int32)(unsafe.Pointer(&g.size)); size > 0 {
			r.seg = int(size)
		}
	}
	return nil
}

// reset restores what the kernel has written to message i.
func (r *Receiver) reset(i int) {
	h := &r.msgs[i].hdr
	h.Namelen = unix.SizeofSockaddrInet4
	h.SetControllen(int(unsafe.Sizeof(r.ctl[i])))
}

// acknowledge sends an ACK or a NAK if one is due.
func (r *Receiver) acknowledge() error {
	syndrome := roce.SynACK
	switch {
	case r.nakDue:
		syndrome = roce.SynNAKSeq
	case !r.ackDue:
		return nil
	}
	b := r.ackBuf[:]
	roce.PutBTH(b, roce.RCAck, false, 0, false, testQPN, r.expect.Add(-1))
	roce.PutAETH(b[roce.BTHLen:], syndrome, 0)
	roce.PutICRC(b[len(b)-roce.ICRCLen:], r.back.Begin(len(b), b[:len(b)-roce.ICRCLen]))
	r.ackDue, r.nakDue = false, false
	_, err := r.sendmmsg(r.ackMsg[:])
	return err
}
