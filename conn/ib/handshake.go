package ib

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// Hello is what one side says in its private data.
type Hello struct {
	From, To netip.Addr // RDS addresses of the sender and the receiver
	TOS      uint8
	AckSeq   uint64 // last sequence received, 0 none

	// Ours: the sender is one of us. Mark is then what it said, unless MarkFollows: an IPv6 REQ has room for
	// the magic only, and the mark is the first SEND.
	Ours        bool
	MarkFollows bool
	Mark        rdshdr.Mark
}

func (h *Hello) put(b []byte) bool {
	p := rdshdr.ConnPriv{SAddr: h.From, DAddr: h.To, Major: rdshdr.ProtoMajor, Minor: rdshdr.ProtoMinor, Mask: rdshdr.ProtoMask,
		TOS: h.TOS, AckSeq: h.AckSeq}
	p.Encode(b)
	return h.To.Is6()
}

// AppendREQ appends the private data of a REQ.
func (h *Hello) AppendREQ(b []byte) []byte {
	var buf [rdshdr.PrivREQLen]byte
	v6 := h.put(buf[:])
	n := rdshdr.PrivLen(v6)
	if h.Ours {
		n = h.Mark.PutREQ(buf[:], v6)
	}
	return append(b, buf[:n]...)
}

// AppendREP appends the private data of a REP.
func (h *Hello) AppendREP(b []byte) []byte {
	var buf [rdshdr.PrivLen6 + rdshdr.MarkLen]byte
	v6 := h.put(buf[:])
	n := rdshdr.PrivLen(v6)
	if h.Ours {
		n = h.Mark.PutREP(buf[:], v6)
	}
	return append(b, buf[:n]...)
}

// ErrHello is private data that does not belong to this connection.
var ErrHello = errors.New("private data names other addresses")

// parse reads what REQ and REP have in common, and checks that it comes from the peer and is meant for us: the
// private data is a connection's identity, so it must agree with the addresses that CM talks to.
func (h *Hello) parse(b []byte, from, to netip.Addr) error {
	var p rdshdr.ConnPriv
	if err := p.Decode(b, to.Is6()); err != nil {
		return err
	}
	if p.SAddr.WithZone("") != from.WithZone("") || p.DAddr.WithZone("") != to.WithZone("") {
		return fmt.Errorf("%w: %v to %v", ErrHello, p.SAddr, p.DAddr)
	}
	if _, _, err := rdshdr.Negotiate(p.Major, p.Minor, p.Mask); err != nil {
		return fmt.Errorf("%w %d.%d mask %#x", err, p.Major, p.Minor, p.Mask)
	}
	*h = Hello{From: from, To: to, TOS: p.TOS, AckSeq: p.AckSeq}
	return nil
}

// ParseREQ reads the private data of a REQ that came from one address to the other, both without
// IPv4-mapped forms.
func ParseREQ(b []byte, from, to netip.Addr) (h Hello, err error) {
	if err = h.parse(b, from, to); err != nil {
		return h, err
	}
	ours, whole := h.Mark.ParseREQ(b, to.Is6())
	h.Ours, h.MarkFollows = ours, ours && !whole
	return h, nil
}

// ParseREP reads the private data of a REP. Some peers send none: an all-zero REP is a kernel's that
// has nothing to say (rds-protocol spec 3.3), and then h has no sequence and no mark.
func ParseREP(b []byte, from, to netip.Addr) (h Hello, err error) {
	v6 := to.Is6()
	h = Hello{From: from, To: to}
	if major := rdshdr.PrivLen(v6) - 24; len(b) <= major || b[major] == 0 {
		return h, nil
	}
	if err = h.parse(b, from, to); err != nil {
		return h, err
	}
	h.Ours = h.Mark.ParseREP(b, v6)
	return h, nil
}
