package main

import (
	"encoding/binary"
	"fmt"
)

// A stream is the content of all datagrams of one direction of one flow. Datagram seq is a function of
// (key, seq) alone, where the key derives from the run's seed, the flow and the direction: the receiver
// computes what it must get and believes nothing that came over the wire.
type stream struct{ key uint64 }

// newStream returns the content that flow index's sender on the active or passive side sends.
func newStream(seed uint64, index int, fromActive bool) stream {
	lane := uint64(index) << 1
	if fromActive {
		lane |= 1
	}
	return stream{key: mix64(mix64(seed) + lane*goldenGamma)}
}

// goldenGamma and mix64 are SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
// generators", 2014): a counter in steps of goldenGamma through a bijective mixer. About 1 ns for 8 bytes,
// so that checking does not become what is measured.
const goldenGamma = 0x9e3779b97f4a7c15

func mix64(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// fill writes the content of datagram seq to p.
func (s stream) fill(p []byte, seq uint64) {
	x := mix64(s.key + seq*goldenGamma)
	for ; len(p) >= 8; p = p[8:] {
		x += goldenGamma
		binary.LittleEndian.PutUint64(p, mix64(x))
	}
	x += goldenGamma
	for i, v := 0, mix64(x); i < len(p); i++ {
		p[i] = byte(v >> (8 * i))
	}
}

// mismatch returns the first offset at which p differs from datagram seq, or -1.
func (s stream) mismatch(p []byte, seq uint64) int {
	x := mix64(s.key + seq*goldenGamma)
	off := 0
	for ; len(p)-off >= 8; off += 8 {
		x += goldenGamma
		if binary.LittleEndian.Uint64(p[off:]) != mix64(x) {
			break
		}
	}
	// The tail, or the eight bytes that differ.
	if len(p)-off < 8 {
		x += goldenGamma
	}
	for i, v := 0, mix64(x); i < 8 && off+i < len(p); i++ {
		if p[off+i] != byte(v>>(8*i)) {
			return off + i
		}
	}
	return -1
}

// lookAround is how far from the sequence that was due check looks for the one that came instead.
const lookAround = 1 << 12

// check reports whether p is datagram seq, and if not, what it is.
func (s stream) check(p []byte, seq uint64) error {
	off := s.mismatch(p, seq)
	if off < 0 {
		return nil
	}
	// A short datagram looks like many others by chance: eight bytes tell.
	if len(p) >= 8 {
		for d := uint64(1); d <= lookAround; d++ {
			if s.mismatch(p, seq+d) < 0 {
				return fmt.Errorf("datagram %d came where %d was due (lost or out of order)", seq+d, seq)
			}
			if d <= seq && s.mismatch(p, seq-d) < 0 {
				return fmt.Errorf("datagram %d came again where %d was due (duplicate or out of order)", seq-d, seq)
			}
		}
	}
	return fmt.Errorf("datagram %d differs from what was sent at byte %d of %d (corrupt)", seq, off, len(p))
}
