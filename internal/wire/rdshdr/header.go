package rdshdr

import (
	"encoding/binary"
	"math/bits"
)

const (
	// HeaderLen is the length of a header.
	HeaderLen = 48
	// FragLen is the payload of every fragment but the last towards a kernel (rds spec 3.5).
	FragLen = 4096
	// MaxMessage is the largest payload of a message in bytes.
	MaxMessage = 1 << 20

	// ExtAreaLen is the length of the extension area.
	ExtAreaLen = HeaderLen - extOff

	extOff  = 32
	csumOff = 30
)

// Flags of a header (rds spec 2.3).
const (
	FlagCongBitmap    uint8 = 0x01 // the payload is a congestion map; must be the only flag
	FlagAckRequired   uint8 = 0x02
	FlagRetransmitted uint8 = 0x04
	// FlagCongDelta: the payload is a CongDelta. Between two of ours only, and the only flag.
	FlagCongDelta uint8 = 0x80
)

// Header is an RDS header: HeaderLen bytes that alias a packet. Accessors do not check its length.
type Header []byte

func (h Header) Seq() uint64      { return binary.BigEndian.Uint64(h) }
func (h Header) Ack() uint64      { return binary.BigEndian.Uint64(h[8:]) }
func (h Header) Len() uint32      { return binary.BigEndian.Uint32(h[16:]) } // payload bytes of the whole message
func (h Header) SPort() uint16    { return binary.BigEndian.Uint16(h[20:]) }
func (h Header) DPort() uint16    { return binary.BigEndian.Uint16(h[22:]) }
func (h Header) Flags() uint8     { return h[24] }
func (h Header) Credit() uint8    { return h[25] }
func (h Header) Checksum() uint16 { return binary.BigEndian.Uint16(h[csumOff:]) }

// Ext is the extension area, 16 bytes. Whoever writes to it calls Seal afterwards.
func (h Header) Ext() []byte { return h[extOff:HeaderLen:HeaderLen] }

// HasExt reports whether there is any extension.
func (h Header) HasExt() bool { return h[extOff] != byte(ExtNone) }

// IsMap reports whether this is the header of a congestion map. Any flag beside the one makes it
// an ordinary message to port 0 (rds spec 2.3).
func (h Header) IsMap() bool { return h[24] == FlagCongBitmap }

// SameMessage reports whether o can be the header of another fragment of h's message: sequence, length
// and ports agree (rds spec 3.5).
func (h Header) SameMessage(o Header) bool {
	return h.Seq() == o.Seq() && binary.BigEndian.Uint64(h[16:]) == binary.BigEndian.Uint64(o[16:])
}

// Put writes a header with a valid checksum and no extensions to b[:HeaderLen].
//
// The checksum is the Internet checksum: a sum of 16-bit words modulo 0xFFFF, which is the same over
// 64-bit words folded afterwards. The words are at hand here, so nothing is read back.
func Put(b []byte, seq, ack uint64, length uint32, sport, dport uint16, flags, credit uint8) {
	_ = b[HeaderLen-1]
	w2 := uint64(length)<<32 | uint64(sport)<<16 | uint64(dport)
	w3 := uint64(flags)<<56 | uint64(credit)<<48
	s, c := bits.Add64(seq, ack, 0)
	s, c = bits.Add64(s, w2, c)
	s, c = bits.Add64(s, w3, c)
	w3 |= uint64(^fold(s, c))
	binary.BigEndian.PutUint64(b, seq)
	binary.BigEndian.PutUint64(b[8:], ack)
	binary.BigEndian.PutUint64(b[16:], w2)
	binary.BigEndian.PutUint64(b[24:], w3)
	binary.BigEndian.PutUint64(b[32:], 0)
	binary.BigEndian.PutUint64(b[40:], 0)
}

// fold brings a 64-bit ones' complement sum and its carry down to 16 bits.
func fold(s, c uint64) uint16 {
	s = s>>32 + s&0xFFFFFFFF + c
	s = s>>16&0xFFFF + s&0xFFFF + s>>32
	s = s>>16 + s&0xFFFF
	return uint16(s + s>>16)
}

// sum is the ones' complement sum of the header with w3 for its fourth 64-bit word, the one that has
// the checksum in its low 16 bits.
func (h Header) sum(w3 uint64) uint16 {
	_ = h[HeaderLen-1]
	s, c := bits.Add64(binary.BigEndian.Uint64(h), binary.BigEndian.Uint64(h[8:]), 0)
	s, c = bits.Add64(s, binary.BigEndian.Uint64(h[16:]), c)
	s, c = bits.Add64(s, w3, c)
	s, c = bits.Add64(s, binary.BigEndian.Uint64(h[32:]), c)
	s, c = bits.Add64(s, binary.BigEndian.Uint64(h[40:]), c)
	return fold(s, c)
}

// Seal sets the checksum after other bytes of the header were changed.
//
// It sums all anew: patching (RFC 1624) saves a nanosecond and confuses the two zeroes of the sum.
// The whole word is stored, so that a load of it soon after need not wait for two stores.
func (h Header) Seal() {
	w3 := binary.BigEndian.Uint64(h[24:]) &^ 0xFFFF
	binary.BigEndian.PutUint64(h[24:], w3|uint64(^h.sum(w3)))
}

// SetAck replaces the ack of a header and its checksum.
func (h Header) SetAck(ack uint64) {
	binary.BigEndian.PutUint64(h[8:], ack)
	h.Seal()
}

// SetChecksum stores a checksum as it is: 0 for none, as on TCP.
func (h Header) SetChecksum(c uint16) { binary.BigEndian.PutUint16(h[csumOff:], c) }

// Valid reports whether b begins with a header whose checksum is right, or absent (0). On IB a
// connection that brings an invalid one is dropped (rds spec 2.2).
func Valid(b []byte) bool {
	if len(b) < HeaderLen {
		return false
	}
	h := Header(b)
	return h.sum(binary.BigEndian.Uint64(h[24:])) == 0xFFFF || h.Checksum() == 0
}
