// Package psn is the 24-bit packet sequence number of the InfiniBand transport and its serial
// arithmetic: everything is modulo 2^24, and order is the sign of the 24-bit difference (rocev2
// spec 0). Values are plain and safe to copy.
package psn

// Bits is the width of a PSN, Space the number of them.
const (
	Bits  = 24
	Space = 1 << Bits
	mask  = Space - 1
)

// PSN is a packet sequence number, always below Space. Compare it only by its methods.
type PSN uint32

// New is the low 24 bits of v.
func New(v uint32) PSN { return PSN(v & mask) }

// Add is p plus n, which may be negative.
func (p PSN) Add(n int) PSN { return PSN((uint32(p) + uint32(n)) & mask) }

// Sub is the signed distance p-q, in [-2^23, 2^23): how far p is ahead of q. Two PSNs exactly half
// the space apart are each behind the other (-2^23), so neither end of a window may be that wide.
func (p PSN) Sub(q PSN) int { return int(int32(uint32(p-q)<<(32-Bits)) >> (32 - Bits)) }

// Less reports whether p comes before q.
func (p PSN) Less(q PSN) bool { return p.Sub(q) < 0 }

// LessEq reports whether p is q or comes before it.
func (p PSN) LessEq(q PSN) bool { return p.Sub(q) <= 0 }

// InRange reports whether p is in [lo, hi), which is empty when lo == hi. The range may be
// any length below Space.
func (p PSN) InRange(lo, hi PSN) bool {
	return uint32(p-lo)&mask < uint32(hi-lo)&mask
}
