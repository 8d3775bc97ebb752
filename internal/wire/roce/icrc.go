package roce

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
)

// The ICRC is the Ethernet CRC-32 over 8 bytes 0xFF, the IP, UDP and base transport headers with
// what routers may change replaced by ones, and everything up to the ICRC itself (rocev2 spec 2.1,
// 2.2).
//
// A CRC is affine: what the XOR of some bits does to it depends on their place only, not on the
// rest of the packet. Three things follow, and are all that this file does beyond hash/crc32:
//
//   - The masked IP and UDP headers of a flow differ from packet to packet only in their lengths. So
//     their CRC is a constant of the flow XOR a number from a table indexed by U.
//   - The masked byte 4 of the BTH need not be patched in a copy: XORing its effect into the register
//     in front lets hash/crc32 run over the packet where it lies, in one piece.
//   - A receiver that does not see the IPv4 identification assumes 0, and can compute from the
//     mismatch which identification would explain it (2.7).
//
// Registers below are the complemented ones that hash/crc32 takes and returns. Polynomials are in its
// reflected representation: bit 31 is the coefficient of x^0.

// seed is the register after the 8 bytes 0xFF that stand for the LRH (2.5).
const seed = 0x2144DF1C

// MaxLen is the largest U there is: the longest headers in front of a 4096-byte payload. The tables
// end there, and no longer packet is valid.
const MaxLen = MaxHdrLen + 4096 + ICRCLen

// icrcTables are functions of U, indexed by U/4. They are computed once, before main, in well under a
// millisecond, and never written again.
type icrcTables struct {
	// len4 and len6 are the effect of the length fields of the IP and UDP headers on the register
	// behind the UDP header.
	len4, len6 [MaxLen/4 + 1]uint32
	// id is the effect on the ICRC of each bit of the IPv4 identification; a row is a cache
	// line.
	id [MaxLen/4 + 1][16]uint32
	// solve is x^(-8(U+20)), which takes a mismatch of the ICRC back to bytes 4 to 7 of the IPv4
	// header.
	solve [MaxLen/4 + 1]uint32
	// bth4 is what unmasking byte 4 of the BTH, of the value of the index, does to the register in
	// front of the BTH.
	bth4 [256]uint32
}

var tables = newICRCTables()

func newICRCTables() *icrcTables {
	t := new(icrcTables)

	// unstep undoes step: the upper byte of a table entry tells its index.
	var index [256]uint8
	for i, w := range crc32.IEEETable {
		index[w>>24] = uint8(i)
	}
	unstep := func(r uint32) uint32 {
		i := index[r>>24]
		return (r^crc32.IEEETable[i])<<8 | uint32(i)
	}

	// A 16-bit length field (big-endian, so its first byte is the upper one) followed by n bytes.
	field := func(v int, n int) uint32 {
		return steps(uint32(v>>8&0xFF|v&0xFF<<8), n)
	}
	// It is linear, so 16 of each are enough.
	var ip4, ip6, udp [16]uint32
	for b := range 16 {
		ip4[b] = field(1<<b, 20-2+8)
		ip6[b] = field(1<<b, 40-4+8)
		udp[b] = field(1<<b, 4)
	}
	for i := range t.len4 {
		u := uint16(4 * i)
		t.len4[i] = combine(&ip4, u+28) ^ combine(&udp, u+8)
		t.len6[i] = combine(&ip6, u+8) ^ combine(&udp, u+8)
	}

	// From byte 4 of the IPv4 header to the end of the covered area there are U+20 bytes behind the
	// word whose contribution we want.
	for b := range 16 {
		t.id[0][b] = field(1<<b, 20)
	}
	t.solve[0] = 1 << 31
	for range 20 {
		t.solve[0] = unstep(t.solve[0])
	}
	for i := 1; i < len(t.id); i++ {
		for b, w := range t.id[i-1] {
			t.id[i][b] = steps(w, 4)
		}
		w := t.solve[i-1]
		for range 4 {
			w = unstep(w)
		}
		t.solve[i] = w
	}

	for x := range t.bth4 {
		w := uint32(x ^ 0xFF)
		for range 4 {
			w = unstep(w)
		}
		t.bth4[x] = w
	}
	return t
}

// steps advances the bare (not complemented) register r over n zero bytes.
func steps(r uint32, n int) uint32 {
	for range n {
		r = crc32.IEEETable[r&0xFF] ^ r>>8
	}
	return r
}

// combine XORs the words of basis whose bits are set in v.
func combine(basis *[16]uint32, v uint16) (w uint32) {
	for i := 0; v != 0; i, v = i+1, v>>1 {
		w ^= basis[i&15] & -uint32(v&1)
	}
	return w
}

// mul is a*b modulo the CRC polynomial.
func mul(a, b uint32) (p uint32) {
	for ; a != 0; a <<= 1 {
		p ^= b & uint32(int32(a)>>31)
		b = b>>1 ^ crc32.IEEE&-(b&1)
	}
	return p
}

// Flow computes and checks the ICRC of packets between one pair of UDP endpoints, in one direction.
// It is a small immutable value: copy it, share it.
type Flow struct {
	base uint32                // register behind the masked headers, their lengths taken as 0
	lens *[MaxLen/4 + 1]uint32 // effect of the lengths
	v4   bool
}

// NewFlow is the flow of packets from src to dst: IPv4 if both addresses are IPv4, or mapped IPv4.
// Zones do not matter.
//
// The packets are taken to have an IPv4 header of 20 bytes with DF set, offset 0 and identification 0
// (see IDDelta).
func NewFlow(src, dst netip.AddrPort) Flow {
	var hdr [40 + 8]byte
	b := hdr[:]
	s4, d4 := src.Addr().Unmap(), dst.Addr().Unmap()
	f := Flow{v4: s4.Is4() && d4.Is4(), lens: &tables.len6}
	if f.v4 {
		s, d := s4.As4(), d4.As4()
		b = hdr[:20+8]
		copy(b, []byte{
			0x45, 0xFF, 0, 0, // version, IHL; TOS masked; total length
			0, 0, 0x40, 0, // identification; DF
			0xFF, 17, 0xFF, 0xFF, // TTL masked; protocol; checksum masked
		})
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		f.lens = &tables.len4
	} else {
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(b, []byte{
			0x6F, 0xFF, 0xFF, 0xFF, // version; class and flow label masked
			0, 0, 17, 0xFF, // payload length; next header; hop limit masked
		})
		copy(b[8:], s[:])
		copy(b[24:], d[:])
	}
	udp := b[len(b)-8:]
	binary.BigEndian.PutUint16(udp, src.Port())
	binary.BigEndian.PutUint16(udp[2:], dst.Port())
	binary.BigEndian.PutUint16(udp[6:], 0xFFFF)

	// Not crc32.Update, which would move hdr to the heap.
	r := ^uint32(seed)
	for _, x := range b {
		r = crc32.IEEETable[uint8(r)^x] ^ r>>8
	}
	f.base = ^r
	return f
}

// Seed is the register behind the masked IP and UDP headers of a packet with a UDP payload of u
// bytes: a multiple of 4, at most MaxLen. Byte 4 of the BTH is to be fed as 0xFF then.
func (f *Flow) Seed(u int) uint32 { return f.base ^ f.lens[uint(u)/4] }

// Begin is the register behind hdr, the beginning of a UDP payload of u bytes: the BTH, and any
// more of the packet. Go on with Update over the rest up to the ICRC; the last register is the ICRC.
func (f *Flow) Begin(u int, hdr []byte) uint32 {
	return crc32.Update(f.Seed(u)^tables.bth4[hdr[4]], crc32.IEEETable, hdr)
}

// Update feeds p, the bytes that follow, to register st.
func Update(st uint32, p []byte) uint32 { return crc32.Update(st, crc32.IEEETable, p) }

// ICRC is the ICRC of the packet that is the concatenation of hdr (see Begin) and rest, without the
// ICRC field, which u counts.
func (f *Flow) ICRC(u int, hdr []byte, rest ...[]byte) uint32 {
	st := f.Begin(u, hdr)
	for _, p := range rest {
		st = Update(st, p)
	}
	return st
}

// PutICRC stores an ICRC: little-endian, unlike everything else (rocev2 spec 2.3).
func PutICRC(b []byte, icrc uint32) { binary.LittleEndian.PutUint32(b, icrc) }

// LoadICRC reads an ICRC.
func LoadICRC(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// IDDelta is what to XOR into the ICRC of an IPv4 packet with a UDP payload of u bytes whose
// identification is id instead of 0: the index of a segment in its GSO train (rocev2 spec 2.9). It is
// 0 for id 0. It has no meaning for IPv6.
func IDDelta(u int, id uint16) uint32 { return combine(&tables.id[uint(u)/4], id) }

// Verdict is what Flow.Check found. The zero value is a packet to drop.
type Verdict uint8

// Verdicts.
const (
	Bad      Verdict = iota // corrupt, or not a RoCE packet by its length
	BadDF                   // the ICRC of an IPv4 packet sent without DF: drop, but count apart (2.7, 2.8)
	OK0                     // right, identification 0 (or IPv6)
	OKGuess                 // right, identification as guessed
	OKSolved                // right if the peer sent this identification: ask an IDTracker
)

func (v Verdict) String() string {
	if names := [...]string{"bad", "bad (no DF)", "ok", "ok (guessed id)", "ok (solved id)"}; int(v) < len(names) {
		return names[v]
	}
	return "unknown verdict"
}

// Check checks the ICRC of pkt, a whole UDP payload of this flow.
//
// For IPv4 the identification is not known. The one that most packets of our own peers have is
// tried first: 0, then guess, which is the index of the packet in the train it arrived in. If neither
// fits, the identification that explains the ICRC is computed: of the 2^32 possible mismatches
// 2^16 have one, so OKSolved lets a corrupted packet through 65536 times as often, unless the
// identification itself is judged (rocev2 spec 2.7, 2.8). id is meaningful for the OK verdicts.
//
// For IPv6 the check is exact and guess is not looked at.
func (f *Flow) Check(pkt []byte, guess uint16) (id uint16, v Verdict) {
	u := len(pkt)
	if u < MinLen || u > MaxLen || u&3 != 0 {
		return 0, Bad
	}
	z := f.Begin(u, pkt[:u-ICRCLen]) ^ LoadICRC(pkt[u-ICRCLen:])
	if z == 0 {
		return 0, OK0
	}
	if !f.v4 {
		return 0, Bad
	}
	if z == IDDelta(u, guess) {
		return guess, OKGuess
	}
	return solve(u, z)
}

// solve finds the identification that explains the mismatch z. Multiplying by x^(-8(U+20)) undoes the
// way from bytes 4-7 of the IPv4 header to the end of the packet, so w is, little-endian, what
// those bytes differ from 00 00 40 00 in.
func solve(u int, z uint32) (id uint16, v Verdict) {
	w := mul(z, tables.solve[uint(u)/4])
	switch w >> 16 {
	case 0:
		return uint16(w<<8 | w>>8), OKSolved
	case 0x0040:
		return 0, BadDF
	}
	return 0, Bad
}
