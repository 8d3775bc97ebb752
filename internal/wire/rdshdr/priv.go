package rdshdr

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// Lengths of the RDS part of private data.
const (
	PrivLen4 = 32
	PrivLen6 = 56
	// PrivREQLen is what a REQ has room for behind RDMA-CM's header.
	PrivREQLen = 56
)

// The version we propose, and the mask of minor versions of 4 that we know (rds spec 3.3).
const (
	ProtoMajor = 3
	ProtoMinor = 1
	ProtoMask  = 0x0003
)

// Errors of private data.
var (
	ErrPrivLen      = errors.New("private data too short")
	ErrIncompatible = errors.New("incompatible RDS version")
)

// ConnPriv is the RDS part of the private data of a REQ or a REP.
type ConnPriv struct {
	SAddr, DAddr netip.Addr // of the sender and the receiver; the RDS identity of the connection
	Major, Minor uint8
	Mask         uint16 // minor versions the sender knows, by bit
	TOS          uint8
	AckSeq       uint64 // highest sequence received, 0 none
	Credit       uint32 // initial credits, 0 no flow control
}

// PrivLen is the length of the RDS part for IPv6 or IPv4.
func PrivLen(v6 bool) int {
	if v6 {
		return PrivLen6
	}
	return PrivLen4
}

// Encode writes p to b, in the IPv4 layout if both addresses are IPv4, zero-padded, and returns the
// length: PrivLen4 or PrivLen6. It does not touch b beyond that.
func (p *ConnPriv) Encode(b []byte) int {
	if src, dst := p.SAddr.Unmap(), p.DAddr.Unmap(); src.Is4() && dst.Is4() {
		s, d := src.As4(), dst.As4()
		b = b[:PrivLen4]
		copy(b, s[:])
		copy(b[4:], d[:])
		p.encodeTail(b[8:])
		return PrivLen4
	}
	s, d := p.SAddr.As16(), p.DAddr.As16()
	b = b[:PrivLen6]
	copy(b, s[:])
	copy(b[16:], d[:])
	p.encodeTail(b[32:])
	return PrivLen6
}

// encodeTail writes the 24 bytes behind the addresses, alike in both layouts.
func (p *ConnPriv) encodeTail(b []byte) {
	clear(b)
	b[0], b[1] = p.Major, p.Minor
	binary.BigEndian.PutUint16(b[2:], p.Mask)
	b[4] = p.TOS
	binary.BigEndian.PutUint64(b[8:], p.AckSeq)
	binary.BigEndian.PutUint32(b[16:], p.Credit)
}

// Decode reads private data in the layout of the connection's address family: v6 or IPv4. Only its
// length is checked; addresses and version are the caller's to judge (see Negotiate). The one error is
// ErrPrivLen.
func (p *ConnPriv) Decode(b []byte, v6 bool) error {
	if len(b) < PrivLen(v6) {
		return ErrPrivLen
	}
	if v6 {
		p.SAddr, p.DAddr = netip.AddrFrom16([16]byte(b)), netip.AddrFrom16([16]byte(b[16:]))
		b = b[32:PrivLen6]
	} else {
		p.SAddr, p.DAddr = netip.AddrFrom4([4]byte(b)), netip.AddrFrom4([4]byte(b[4:]))
		b = b[8:PrivLen4]
	}
	p.Major, p.Minor = b[0], b[1]
	p.Mask = binary.BigEndian.Uint16(b[2:])
	p.TOS = b[4]
	p.AckSeq = binary.BigEndian.Uint64(b[8:])
	p.Credit = binary.BigEndian.Uint32(b[16:])
	return nil
}

// Negotiate is the version that a peer's proposal leads to, as a kernel decides: 4.1, 4.0 or 3.1, or
// ErrIncompatible (rds spec 3.3). Major 0 is what a zeroed buffer says and counts as 4.0. Nothing on
// the data path depends on the result.
func Negotiate(major, minor uint8, mask uint16) (uint8, uint8, error) {
	common := mask & ProtoMask
	switch {
	case major == 0:
		return 4, 0, nil
	case major == 4 && common&2 != 0:
		return 4, 1, nil
	case major == 4 && common&1 != 0:
		return 4, 0, nil
	case major == ProtoMajor && minor == ProtoMinor:
		return ProtoMajor, ProtoMinor, nil
	}
	return 0, 0, ErrIncompatible
}
