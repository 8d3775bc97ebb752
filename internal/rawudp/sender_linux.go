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
	maxTrainSegs  = 64    // UDP_MAX_SEGMENTS
	maxTrainBytes = 61680 // 15 packets of 4112
	batchTrains   = 8     // messages of one sendmmsg when trains are full
	testQPN       = 0x11
)

// A Sender sends messages to one Receiver. They stay in its window until acknowledged and are sent
// again from the first missing one when the receiver says so, or says nothing for pollInterval.
type Sender struct {
	*socket
	flow, back roce.Flow
	gso        bool
	maxPayload int

	// The window: ring[una:next] (modulo its length) are sent or queued trains, ring[next] is being filled,
	// ring[unsent:next] are queued.
	ring              []train
	una, unsent, next uint64
	psn               uint64 // of the next packet

	to   unix.RawSockaddrInet4
	msgs []mmsghdr // of one sendmmsg
	iovs []unix.Iovec
	gsos []segmentControl

	ackBuf  [256]byte
	ackFrom unix.RawSockaddrInet4
	ackIov  unix.Iovec
	ackMsg  [1]mmsghdr

	counters
}

// A train is a run of packets of one size, the last of which may be shorter.
type train struct {
	buf     []byte // capacity maxTrainBytes
	segSize int
	segs    int
	first   uint64 // PSN, unwrapped
	closed  bool   // took a shorter packet
}

// NewSender opens a Sender at local for the Receiver at remote.
func NewSender(local netip.Addr, remote netip.AddrPort, o Options) (*Sender, error) {
	sock, err := openSocket(netip.AddrPortFrom(local, 0))
	if err != nil {
		return nil, err
	}
	if !remote.Addr().Is4() {
		return nil, errors.Join(fmt.Errorf("raw udp to %v: %w: not IPv4", remote, ErrNotSupported), sock.Close())
	}
	code := roce.PathMTU(interfaceMTU(local))
	if code == 0 {
		return nil, errors.Join(fmt.Errorf("raw udp from %v: interface MTU too small", local), sock.Close())
	}
	s := &Sender{
		socket: sock,
		flow:   roce.NewFlow(sock.local, remote), back: roce.NewFlow(remote, sock.local),
		gso: !o.NoGSO, maxPayload: roce.MTUBytes(code),
		to: sockaddr(remote),
	}
	slots := o.Slots
	if slots == 0 {
		slots = defaultSlots
	}
	// Half of a receive buffer like ours: a train costs up to 64 KiB of it.
	slots = max(2, min(slots, sock.rcvbuf/2>>16))
	s.ring = make([]train, slots)
	for i := range s.ring {
		s.ring[i].buf = make([]byte, 0, maxTrainBytes)
	}
	n := maxTrainSegs // without GSO a train takes as many messages as it has packets
	s.msgs, s.iovs, s.gsos = make([]mmsghdr, n), make([]unix.Iovec, n), make([]segmentControl, n)
	for i := range s.msgs {
		h := &s.msgs[i].hdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.to)), unix.SizeofSockaddrInet4
		h.Iov = &s.iovs[i]
		h.SetIovlen(1)
		g := &s.gsos[i]
		g.hdr.Level, g.hdr.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		g.hdr.SetLen(unix.CmsgLen(2))
	}
	h := &s.ackMsg[0].hdr
	s.ackIov.Base = &s.ackBuf[0]
	s.ackIov.SetLen(len(s.ackBuf))
	h.Iov = &s.ackIov
	h.SetIovlen(1)
	h.Name = (*byte)(unsafe.Pointer(&s.ackFrom))
	return s, nil
}

// Send sends a message of up to MaxMessageBytes, copying it into the window. It waits while the window is
// full. more says that another follows at once, and lets this one wait for a fuller train.
func (s *Sender) Send(p []byte, more bool) error {
	if len(p) > MaxMessageBytes {
		return fmt.Errorf("message of %d bytes", len(p))
	}
	for first := true; ; first = false {
		n := min(len(p), s.maxPayload)
		last := n == len(p)
		op := roce.RCSendMiddle
		switch {
		case first && last:
			op = roce.RCSendOnly
		case first:
			op = roce.RCSendFirst
		case last:
			op = roce.RCSendLast
		}
		t, err := s.room(n)
		if err != nil {
			return err
		}
		copy(s.reserve(t, n), p[:n])
		s.commit(t, op, n, last && !more)
		if p = p[n:]; last {
			break
		}
	}
	if !more {
		return s.flush()
	}
	return nil
}

// SendPackets sends n packets with payload bytes each, whatever the window's memory holds: the limit of
// what the machine does without a copy on this side. It returns when all are acknowledged.
func (s *Sender) SendPackets(n, payload int) error {
	for i := range n {
		t, err := s.room(payload)
		if err != nil {
			return err
		}
		s.reserve(t, payload)
		s.commit(t, roce.RCSendOnly, payload, i == n-1)
	}
	return s.Drain()
}

// Drain sends what is queued and waits until all of it is acknowledged. The last packet must have asked
// for that: Send without more does.
func (s *Sender) Drain() error {
	if err := s.flush(); err != nil {
		return err
	}
	for s.una < s.next {
		if err := s.awaitAck(); err != nil {
			return err
		}
	}
	return nil
}

func packetBytes(payload int) int {
	return roce.BTHLen + payload + roce.PadLen(payload) + roce.ICRCLen
}

// room returns the train that takes a packet of payload bytes, waiting for the window.
func (s *Sender) room(payload int) (*train, error) {
	u := packetBytes(payload)
	t := s.filling()
	if t.segs > 0 && (t.closed || t.segs == maxTrainSegs || u > t.segSize || len(t.buf)+u > maxTrainBytes) {
		s.next++
		if s.next-s.unsent >= min(batchTrains, uint64(len(s.ring)/2)) {
			if err := s.sendQueued(); err != nil {
				return nil, err
			}
		}
		t = s.filling()
	}
	if t.segs == 0 {
		// The train being filled takes a slot, too.
		for s.next-s.una >= uint64(len(s.ring))-1 {
			if err := s.sendQueued(); err != nil {
				return nil, err
			}
			if err := s.awaitAck(); err != nil {
				return nil, err
			}
		}
		t.segSize, t.first = u, s.psn
	}
	return t, nil
}

func (s *Sender) filling() *train { return &s.ring[s.next%uint64(len(s.ring))] }

// reserve returns where the payload of the next packet of t goes.
func (s *Sender) reserve(t *train, payload int) []byte {
	off := len(t.buf)
	t.buf = t.buf[:off+packetBytes(payload)]
	return t.buf[off+roce.BTHLen:][:payload]
}

// commit stamps the packet reserved last. It asks for an acknowledgement if it is the last one for now, and
// four times per window.
func (s *Sender) commit(t *train, op roce.Opcode, payload int, last bool) {
	u := packetBytes(payload)
	pkt := t.buf[len(t.buf)-u:]
	quarter := max(1, uint64(len(s.ring))/4)
	ack := last || t.segs == 0 && s.next%quarter == 0
	pad := roce.PadLen(payload)
	roce.PutBTH(pkt, op, last, pad, ack, testQPN, psn.New(uint32(s.psn)))
	clear(pkt[roce.BTHLen+payload:][:pad])
	id := uint16(0)
	if s.gso {
		id = uint16(t.segs)
	}
	roce.PutICRC(pkt[u-roce.ICRCLen:], s.flow.Begin(u, pkt[:u-roce.ICRCLen])^roce.IDDelta(u, id))
	t.closed = u < t.segSize
	t.segs++
	s.psn++
}

// flush sends everything there is.
func (s *Sender) flush() error {
	if s.filling().segs > 0 {
		s.next++
	}
	return s.sendQueued()
}

// sendQueued sends ring[unsent:next].
func (s *Sender) sendQueued() error {
	s.packets.Store(s.psn)
	for s.unsent < s.next {
		if !s.gso {
			if err := s.sendSingles(&s.ring[s.unsent%uint64(len(s.ring))]); err != nil {
				return err
			}
			s.unsent++
			continue
		}
		n := int(min(s.next-s.unsent, uint64(len(s.msgs))))
		for i := range n {
			t := &s.ring[(s.unsent+uint64(i))%uint64(len(s.ring))]
			s.prepare(i, t.buf, t.segSize, t.segs > 1)
		}
		sent, err := s.sendmmsg(s.msgs[:n])
		switch {
		case errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL):
			// No GSO on this path. The packets keep the identifications they were stamped with: the
			// receiver solves for them.
			s.gso = false
		case err != nil:
			return err
		}
		s.unsent += uint64(sent)
	}
	return nil
}

// sendSingles sends the packets of t one by one.
func (s *Sender) sendSingles(t *train) error {
	n := 0
	for b := t.buf; len(b) > 0; n++ {
		u := min(t.segSize, len(b))
		s.prepare(n, b[:u], u, false)
		b = b[u:]
	}
	for i := 0; i < n; {
		sent, err := s.sendmmsg(s.msgs[i:n])
		if err != nil {
			return err
		}
		i += sent
	}
	return nil
}

// prepare makes message i one of b, in segments or whole.
func (s *Sender) prepare(i int, b []byte, segSize int, segment bool) {
	s.iovs[i].Base = unsafe.SliceData(b)
	s.iovs[i].SetLen(len(b))
	h := &s.msgs[i].hdr
	h.Control = nil
	h.SetControllen(0)
	if segment {
		g := &s.gsos[i]
		*(*uint16)(unsafe.Pointer(&g.size)) = uint16(segSize)
		h.Control = (*byte)(unsafe.Pointer(g))
		h.SetControllen(unix.CmsgSpace(2))
	}
}

// awaitAck waits for one acknowledgement and does what it says. Without one it sends the window again.
func (s *Sender) awaitAck() error {
	h := &s.ackMsg[0].hdr
	h.Namelen = unix.SizeofSockaddrInet4
	_, err := s.recvmmsg(s.ackMsg[:], 0)
	if uerr := s.usable(); uerr != nil {
		return uerr
	}
	if errors.Is(err, unix.EAGAIN) {
		return s.goBack()
	}
	if err != nil {
		return err
	}
	return s.handleAck(s.ackBuf[:s.ackMsg[0].len])
}

func (s *Sender) handleAck(b []byte) error {
	var p roce.Packet
	if _, v := s.back.Check(b, 0); v != roce.OK0 || roce.Parse(b, &p) != nil || roce.BTH(b).Opcode() != roce.RCAck {
		s.badICRC.Add(1)
		return nil
	}
	// The PSN is the last one received in order. Unwrap it around the oldest train.
	t := &s.ring[s.una%uint64(len(s.ring))]
	if s.una == s.next {
		return nil
	}
	acked := int64(t.first) + int64(roce.BTH(b).PSN().Sub(psn.New(uint32(t.first)))) + 1
	if acked > int64(s.psn) {
		return nil // not honoured: never sent
	}
	for s.una < s.unsent && t.first+uint64(t.segs) <= uint64(max(acked, 0)) {
		t.buf, t.segs, t.closed = t.buf[:0], 0, false
		s.una++
		t = &s.ring[s.una%uint64(len(s.ring))]
	}
	if p.AETH().Syndrome() == roce.SynNAKSeq {
		return s.goBack()
	}
	return nil
}

// goBack sends all that is not acknowledged again.
func (s *Sender) goBack() error {
	for i := s.una; i < s.unsent; i++ {
		s.retransmits.Add(uint64(s.ring[i%uint64(len(s.ring))].segs))
	}
	s.unsent = s.una
	return s.sendQueued()
}
