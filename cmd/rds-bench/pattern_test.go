package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestStreamContent(t *testing.T) {
	s := newStream(1, 0, true)
	for _, n := range []int{1, 7, 8, 9, 64, 4099} {
		p, q := make([]byte, n), make([]byte, n)
		s.fill(p, 5)
		s.fill(q, 5)
		if !bytes.Equal(p, q) {
			t.Errorf("%d bytes: content is not a function of the sequence", n)
		}
		if err := s.check(p, 5); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
		for i := range p {
			p[i] ^= 0x80
			if off := s.mismatch(p, 5); off != i {
				t.Fatalf("%d bytes, byte %d spoilt: mismatch says %d", n, i, off)
			}
			p[i] ^= 0x80
		}
	}
}

// No two datagrams of a run are alike, whatever differs: sequence, flow, direction, seed.
func TestStreamsDiffer(t *testing.T) {
	seen := make(map[string]string)
	for _, seed := range []uint64{0, 1, 2} {
		for index := range 64 {
			for _, fromActive := range []bool{false, true} {
				s := newStream(seed, index, fromActive)
				for seq := range uint64(64) {
					p := make([]byte, 16)
					s.fill(p, seq)
					if _, ok := seen[string(p)]; ok {
						t.Fatalf("seed %d, flow %d, from active %v, datagram %d: content seen before", seed, index, fromActive, seq)
					}
					seen[string(p)] = ""
				}
			}
		}
	}
}

func TestStreamDiagnosis(t *testing.T) {
	s := newStream(1, 3, false)
	p := make([]byte, 64)
	for _, tc := range []struct {
		is   uint64
		want string
	}{
		{21, "datagram 21 came where 20 was due (lost or out of order)"},
		{20 + lookAround, "lost or out of order"},
		{19, "datagram 19 came again where 20 was due (duplicate or out of order)"},
		{0, "datagram 0 came again"},
		{21 + lookAround, "differs from what was sent at byte 0 of 64 (corrupt)"},
	} {
		s.fill(p, tc.is)
		if err := s.check(p, 20); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("datagram %d for 20: %v, want %q", tc.is, err, tc.want)
		}
	}
}

func BenchmarkStream(b *testing.B) {
	s := newStream(1, 0, true)
	p := make([]byte, 4096)
	b.Run("fill", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for i := uint64(0); b.Loop(); i++ {
			s.fill(p, i)
		}
	})
	b.Run("check", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		s.fill(p, 0)
		for b.Loop() {
			if s.mismatch(p, 0) >= 0 {
				b.Fatal("mismatch")
			}
		}
	})
}
