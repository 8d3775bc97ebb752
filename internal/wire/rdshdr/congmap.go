package rdshdr

import (
	"encoding/binary"
	"iter"
	"math/bits"
)

// CongMapLen is the length of a congestion map in bytes.
const CongMapLen = 8192

// CongMap has one bit per RDS port of an address, set when the port is congested: port p is bit p&7 of
// byte p>>3, as it travels (rds spec 2.7). The zero value is a map without congestion. It is not safe for
// concurrent use.
type CongMap [CongMapLen]byte

// Set marks port congested.
func (m *CongMap) Set(port uint16) { m[port>>3] |= 1 << (port & 7) }

// Clear unmarks port.
func (m *CongMap) Clear(port uint16) { m[port>>3] &^= 1 << (port & 7) }

// Test reports whether port is congested.
func (m *CongMap) Test(port uint16) bool { return m[port>>3]>>(port&7)&1 != 0 }

// Count is how many ports are congested.
func (m *CongMap) Count() (n int) {
	for i := range CongMapLen / 8 {
		n += bits.OnesCount64(m.word(i))
	}
	return n
}

// Equal reports whether m and o are the same.
func (m *CongMap) Equal(o *CongMap) bool { return *m == *o }

func (m *CongMap) word(i int) uint64 { return binary.LittleEndian.Uint64(m[8*i:]) }

// Diff yields every port whose bit in m is not as in old, in order, and what it is in m.
func (m *CongMap) Diff(old *CongMap) iter.Seq2[uint16, bool] {
	return func(yield func(port uint16, congested bool) bool) {
		for i := range CongMapLen / 8 {
			w := m.word(i)
			for x := w ^ old.word(i); x != 0; x &= x - 1 {
				b := bits.TrailingZeros64(x)
				if !yield(uint16(64*i+b), w>>b&1 != 0) {
					return
				}
			}
		}
	}
}

// ClearedSince reports whether any port that is congested in old is not in m: whether a writer that
// waits may go on.
func (m *CongMap) ClearedSince(old *CongMap) bool {
	for i := range CongMapLen / 8 {
		if old.word(i)&^m.word(i) != 0 {
			return true
		}
	}
	return false
}

// MaxCongDelta is the most ports that a CongDelta names: beyond that a whole map is not much longer.
const MaxCongDelta = 1024

// CongDelta is the payload of a message that changes some ports of a congestion map. The package comment has its layout.
type CongDelta []byte

// CongDeltaLen is the length of one that names n ports.
func CongDeltaLen(n int) int { return 2 + 2*n }

// PutCongDelta writes to b that set are congested and cleared are not, and returns the length. They are at most MaxCongDelta
// together.
func PutCongDelta(b []byte, set, cleared []uint16) int {
	binary.BigEndian.PutUint16(b, uint16(len(set)))
	n := 2
	for _, ports := range [2][]uint16{set, cleared} {
		for _, p := range ports {
			binary.BigEndian.PutUint16(b[n:], p)
			n += 2
		}
	}
	return n
}

// Valid reports whether d is well-formed. What follows may be called only if it is.
func (d CongDelta) Valid() bool {
	return len(d) >= 2 && len(d)%2 == 0 && len(d) <= CongDeltaLen(MaxCongDelta) && int(binary.BigEndian.Uint16(d)) <= d.Len()
}

// Len is the number of ports it names.
func (d CongDelta) Len() int { return len(d)/2 - 1 }

// At is the i-th port, and whether it is congested.
func (d CongDelta) At(i int) (port uint16, congested bool) {
	return binary.BigEndian.Uint16(d[2+2*i:]), i < int(binary.BigEndian.Uint16(d))
}
