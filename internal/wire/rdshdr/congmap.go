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
