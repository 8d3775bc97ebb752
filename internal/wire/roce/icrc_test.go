package roce

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/wiretest"
)

// naiveICRC is rocev2 spec 2.1 and 2.2 to the letter, over a whole IP packet without its ICRC.
func naiveICRC(ip []byte) uint32 {
	b := append(bytes.Repeat([]byte{0xFF}, 8), ip...)
	h := b[8:]
	n := 40
	if h[0]>>4 == 4 {
		n = 20
		h[1], h[8], h[10], h[11] = 0xFF, 0xFF, 0xFF, 0xFF
	} else {
		h[0] |= 0x0F
		h[1], h[2], h[3], h[7] = 0xFF, 0xFF, 0xFF, 0xFF
	}
	h[n+6], h[n+7] = 0xFF, 0xFF
	h[n+8+4] = 0xFF
	return crc32.ChecksumIEEE(b)
}

// split finds the flow and the UDP payload of an IP packet.
func split(ip []byte) (src, dst netip.AddrPort, udp []byte) {
	n := 40
	var s, d netip.Addr
	if ip[0]>>4 == 4 {
		n = 20
		s, d = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	} else {
		s, d = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
	}
	return netip.AddrPortFrom(s, binary.BigEndian.Uint16(ip[n:])),
		netip.AddrPortFrom(d, binary.BigEndian.Uint16(ip[n+2:])), ip[n+8:]
}

// The packets of rocev2 spec 2.6.
var (
	vectorV0 = wiretest.Hex(`
		45 c2 00 3c 71 8c 40 00 40 11 91 61 0a 00 11 01
		0a 00 12 01 00 00 12 b7 00 28 00 00 81 00 ff ff
		40 00 01 18 00 00 00 00 00 00 00 00 00 00 00 00
		00 00 00 00 00 00 00 00 82 fd 00 2a`)
	payloadV0b = wiretest.Hex(`
		24 60 ff ff 00 00 00 d3 00 cf 17 10
		46 30 81 8b e2 89 35 d9 0e 9a 95 50 54 01 be 88 5e 50 00 00`)
	vectorV0b = append(append(wiretest.Hex(`
		45 01 00 40 04 78 40 00 40 11 00 00 c0 a8 00 07
		c0 a8 00 07 c0 00 12 b7 00 2c 00 00`), payloadV0b...), wiretest.Hex("78 f3 53 f3")...)
	vectorV0c = append(append(wiretest.Hex(`
		6e 21 fa ce 00 2c 11 ff 20 22 00 00 00 00 00 00
		00 00 00 00 00 00 10 23 20 23 00 00 00 00 00 00
		00 00 00 00 00 00 10 24 c0 00 12 b7 00 2c 00 00`), payloadV0b...), wiretest.Hex("3e 5b 74 3b")...)
	vectorV1 = wiretest.Hex(`
		45 00 00 38 00 00 40 00 40 11 26 b3 0a 00 00 01
		0a 00 00 02 df 94 12 b7 00 24 00 00 04 10 ff ff
		00 00 00 11 80 12 34 56 68 65 6c 6c 6f 2c 20 72
		6f 63 65 00 e3 e0 35 82`)
	vectorV2 = wiretest.Hex(`
		45 00 00 38 12 34 40 00 40 11 14 7f 0a 00 00 01
		0a 00 00 02 df 94 12 b7 00 24 00 00 04 10 ff ff
		00 00 00 11 80 12 34 56 68 65 6c 6c 6f 2c 20 72
		6f 63 65 00 f3 28 51 89`)
	vectorV3 = wiretest.Hex(`
		45 00 00 30 00 00 40 00 40 11 26 bb 0a 00 00 02
		0a 00 00 01 d8 72 12 b7 00 1c 00 00 11 00 ff ff
		00 00 0a bc 00 12 34 56 1f 00 00 01 63 d5 26 3c`)
	vectorV4 = wiretest.Hex(`
		60 21 23 45 00 30 11 40 fd 00 00 00 00 00 00 00
		00 00 00 00 00 00 00 01 fd 00 00 00 00 00 00 00
		00 00 00 00 00 00 00 02 c0 01 12 b7 00 30 00 00
		0a 70 ff ff 00 00 ca fe 80 00 00 01 00 00 7f 00
		12 34 56 78 00 00 c0 de 00 00 00 05 61 62 63 64
		65 00 00 00 91 45 43 93`)
)

func TestICRCVectors(t *testing.T) {
	for _, tc := range []struct {
		name string
		ip   []byte
		id   uint16
		v    Verdict
	}{
		{"V0 ConnectX-4 CNP", vectorV0, 0x718C, OKSolved},
		{"V0b", vectorV0b, 1144, OKSolved},
		{"V0c IPv6", vectorV0c, 0, OK0},
		{"V1", vectorV1, 0, OK0},
		{"V2", vectorV2, 0x1234, OKSolved},
		{"V3", vectorV3, 0, OK0},
		{"V4 IPv6", vectorV4, 0, OK0},
	} {
		src, dst, udp := split(tc.ip)
		u := len(udp)
		wire := LoadICRC(udp[u-4:])
		if got := naiveICRC(tc.ip[:len(tc.ip)-4]); got != wire {
			t.Errorf("%s: the naive twin gives %#08x, the packet carries %#08x", tc.name, got, wire)
		}
		f := NewFlow(src, dst)
		if got := f.ICRC(u, udp[:u-4]) ^ IDDelta(u, tc.id); got != wire {
			t.Errorf("%s: ICRC %#08x, want %#08x", tc.name, got, wire)
		}
		if id, v := f.Check(udp, 7); id != tc.id || v != tc.v {
			t.Errorf("%s: Check says %v, id %#x; want %v, %#x", tc.name, v, id, tc.v, tc.id)
		}
		if tc.v == OKSolved {
			if id, v := f.Check(udp, tc.id); id != tc.id || v != OKGuess {
				t.Errorf("%s: Check with the right guess says %v, id %#x", tc.name, v, id)
			}
		}
	}
}

// TestICRCConstants are the constants that rocev2 spec 2.5 and 2.7 give.
func TestICRCConstants(t *testing.T) {
	if got := crc32.ChecksumIEEE(bytes.Repeat([]byte{0xFF}, 8)); got != seed {
		t.Errorf("register after eight 0xFF is %#08x, want %#08x", got, uint32(seed))
	}
	// Residue: including the ICRC, a right packet leaves the seed.
	src, dst, udp := split(vectorV1)
	f := NewFlow(src, dst)
	if got := f.ICRC(len(udp), udp); got != seed {
		t.Errorf("residue %#08x, want %#08x", got, uint32(seed))
	}
	for _, tc := range []struct {
		u    int
		k, f uint32
	}{
		{16, 0xD50CBCF7, 0x78ED02D5}, {20, 0xEBD369B3, 0xA700E96A}, {28, 0x9D764201, 0x15141C31},
		{32, 0x4CC54C19, 0x1ED8F66E}, {60, 0x17958E0B, 0x4721589F}, {280, 0x8D11EA66, 0x7FB797E1},
		{1040, 0xB871DB31, 0x7D21AA2E}, {1056, 0xCCF87F2E, 0x3B43BBB1}, {2080, 0x1AC1A255, 0xAFAC536C},
		{4112, 0x2D1024AA, 0x189D6678}, {4128, 0xB6C39C82, 0x708E6B25},
	} {
		if got := tables.solve[tc.u/4]; got != tc.k {
			t.Errorf("K(%d) = %#08x, want %#08x", tc.u, got, tc.k)
		}
		if got := mul(tc.k, tc.f); got != 1<<31 {
			t.Errorf("K(%d)*F(%d) = %#08x, want 1", tc.u, tc.u, got)
		}
		for _, id := range []uint16{1, 2, 63, 0x1234, 0xFFFF} {
			if got, want := IDDelta(tc.u, id), mul(uint32(id<<8|id>>8), tc.f); got != want {
				t.Errorf("IDDelta(%d, %#x) = %#08x, want %#08x", tc.u, id, got, want)
			}
		}
	}
	// The worked example of 2.7.
	if got := mul(0x0B64C810, 0x9D764201); got != 0x3412 {
		t.Errorf("worked example: v = %#08x", got)
	}
}

// packet builds a random IP packet around a UDP payload of u bytes, with its ICRC.
func packet(r *rand.Rand, v6 bool, u int, id uint16, frag uint16) (ip []byte) {
	n := 20
	if v6 {
		n = 40
	}
	ip = make([]byte, n+8+u)
	for i := range ip {
		ip[i] = byte(r.Uint32())
	}
	if v6 {
		ip[0] = 0x60 | ip[0]&15
		binary.BigEndian.PutUint16(ip[4:], uint16(u+8))
		ip[6] = 17
		ip[8], ip[24] = 0xFD, 0xFD // not IPv4-mapped
	} else {
		ip[0] = 0x45
		binary.BigEndian.PutUint16(ip[2:], uint16(u+28))
		binary.BigEndian.PutUint16(ip[4:], id)
		binary.BigEndian.PutUint16(ip[6:], frag)
		ip[9] = 17
	}
	binary.BigEndian.PutUint16(ip[n+4:], uint16(u+8))
	PutICRC(ip[len(ip)-4:], naiveICRC(ip[:len(ip)-4]))
	return ip
}

// TestICRCTwin compares with the naive computation for every U there is.
func TestICRCTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for u := MinLen; u <= MaxLen; u += 4 {
		for _, v6 := range []bool{false, true} {
			id := uint16(r.Uint32())
			src, dst, udp := split(packet(r, v6, u, id, 0x4000))
			if v6 {
				id = 0
			}
			f := NewFlow(src, dst)
			// In pieces, as a sender has them.
			cut := BTHLen + r.IntN(u-MinLen+1)
			if got := f.ICRC(u, udp[:cut], udp[cut:u-4]) ^ IDDelta(u, id); got != LoadICRC(udp[u-4:]) {
				t.Fatalf("u=%d v6=%v id=%#x: ICRC %#08x, want %#08x", u, v6, id, got, LoadICRC(udp[u-4:]))
			}
			if got, v := f.Check(udp, 0); got != id || v == Bad || v == BadDF {
				t.Fatalf("u=%d v6=%v id=%#x: Check says %v, %#x", u, v6, id, v, got)
			}
			// Routers may change what is masked, byte 4 of the BTH included.
			udp[4] ^= byte(1 + r.IntN(255))
			if got, v := f.Check(udp, 0); got != id || v == Bad || v == BadDF {
				t.Fatalf("u=%d: a changed BTH byte 4 makes it %v", u, v)
			}
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	src, dst, udp := split(packet(r, false, 280, 5, 0))
	f := NewFlow(src, dst)
	if _, v := f.Check(udp, 0); v != BadDF {
		t.Errorf("a packet sent without DF is %v", v)
	}
	src, dst, udp = split(packet(r, false, 280, 5, 0x2001))
	f = NewFlow(src, dst)
	if _, v := f.Check(udp, 0); v != Bad {
		t.Errorf("a fragment is %v", v)
	}
	for _, n := range []int{0, 1, 4, 12, 15, 17, 18, 19, 279, MaxLen + 4, 65507} {
		if _, v := f.Check(make([]byte, n), 0); v != Bad {
			t.Errorf("%d zero bytes are %v", n, v)
		}
	}
	// IPv6 is strict: every wrong ICRC is bad.
	src, dst, udp = split(packet(r, true, 64, 0, 0))
	f = NewFlow(src, dst)
	PutICRC(udp[60:], LoadICRC(udp[60:])^IDDelta(64, 3))
	if _, v := f.Check(udp, 3); v != Bad {
		t.Errorf("an IPv6 packet off by an identification is %v", v)
	}
}

// TestNewFlowForms checks that the forms of one address make one flow.
func TestNewFlowForms(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.0.0.1:1000"), netip.MustParseAddrPort("10.0.0.2:4791")
	m := netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
	if NewFlow(a, b) != NewFlow(m, b) {
		t.Error("an IPv4-mapped address is another flow")
	}
	if NewFlow(a, b) == NewFlow(b, a) {
		t.Error("the directions of a flow are one")
	}
	x, y := netip.MustParseAddrPort("[fe80::1%eth0]:1000"), netip.MustParseAddrPort("[fe80::2]:4791")
	if NewFlow(x, y) != NewFlow(netip.MustParseAddrPort("[fe80::1]:1000"), y) {
		t.Error("a zone makes another flow")
	}
}

// TestSingleBitErrors checks the claim of rocev2 spec 2.8: no single-bit error in a packet of any length
// passes for an identification. What an error becomes depends only on its distance from the
// identification, so walking back from there covers all lengths.
func TestSingleBitErrors(t *testing.T) {
	back := mul(tables.solve[0], steps(1<<31, 19)) // x^-8
	if mul(back, steps(1<<31, 1)) != 1<<31 {
		t.Fatal("not an inverse")
	}
	for bit := range 8 {
		w := uint32(1) << bit // an error in the first byte of the word that solve finds
		for n := 1; n <= 4300; n++ {
			w = mul(w, back)
			if n >= 4 && w>>16 == 0 { // beyond the word itself
				t.Fatalf("bit %d, %d bytes behind the identification, passes", bit, n)
			}
		}
	}
	// And in the ICRC field itself.
	for u := MinLen; u <= MaxLen; u += 4 {
		for bit := range 32 {
			if _, v := solve(u, 1<<bit); v == OKSolved {
				t.Fatalf("U=%d: bit %d of the ICRC passes", u, bit)
			}
		}
	}
}

func TestICRCAllocs(t *testing.T) {
	src, dst, udp := split(vectorV2)
	f := NewFlow(src, dst)
	n := len(udp)
	if a := testing.AllocsPerRun(100, func() {
		f = NewFlow(src, dst)
		f.ICRC(n, udp[:12], udp[12:16], udp[16:n-4])
		f.Check(udp, 0)
	}); a != 0 {
		t.Errorf("%v allocations", a)
	}
}

func FuzzCheck(f *testing.F) {
	for _, ip := range [][]byte{vectorV0, vectorV1, vectorV2, vectorV3} {
		_, _, udp := split(ip)
		f.Add(udp, uint16(0), uint16(0x1234), false)
	}
	_, _, udp := split(vectorV4)
	f.Add(udp, uint16(0), uint16(0), true)
	src4, dst4 := netip.MustParseAddrPort("10.0.0.1:57236"), netip.MustParseAddrPort("10.0.0.2:4791")
	src6, dst6 := netip.MustParseAddrPort("[fd00::1]:49153"), netip.MustParseAddrPort("[fd00::2]:4791")
	f.Fuzz(func(t *testing.T, b []byte, guess, sent uint16, v6 bool) {
		flow := NewFlow(src4, dst4)
		if v6 {
			flow = NewFlow(src6, dst6)
			sent = 0
		}
		id, v := flow.Check(b, guess)
		if v == OK0 || v == OKGuess || v == OKSolved {
			// The packet is what a sender with that identification sends.
			u := len(b)
			if got := flow.ICRC(u, b[:u-4]) ^ IDDelta(u, id); got != LoadICRC(b[u-4:]) {
				t.Fatalf("%v with id %#x, but the ICRC is %#08x", v, id, got)
			}
		}
		if len(b) < MinLen || len(b) > MaxLen || len(b)%4 != 0 {
			if v != Bad {
				t.Fatalf("length %d is %v", len(b), v)
			}
			return
		}
		// And one with a right ICRC is accepted with the identification it was sent with.
		b = bytes.Clone(b)
		u := len(b)
		PutICRC(b[u-4:], flow.ICRC(u, b[:BTHLen], b[BTHLen:u-4])^IDDelta(u, sent))
		want := OKSolved
		switch sent {
		case 0:
			want = OK0
		case guess:
			want = OKGuess
		}
		if id, v := flow.Check(b, guess); id != sent || v != want {
			t.Fatalf("sent with id %#x (guess %#x): %v, %#x", sent, guess, v, id)
		}
	})
}

func BenchmarkBegin(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		src, dst := netip.MustParseAddrPort("10.0.0.1:57236"), netip.MustParseAddrPort("10.0.0.2:4791")
		if v6 {
			src, dst = netip.MustParseAddrPort("[fd00::1]:57236"), netip.MustParseAddrPort("[fd00::2]:4791")
		}
		flow := NewFlow(src, dst)
		hdr := make([]byte, BTHLen)
		PutBTH(hdr, RCSendOnly, false, 0, true, 17, psn.New(1))
		b.Run(fmt.Sprintf("v6=%v", v6), func(b *testing.B) {
			b.ReportAllocs()
			var x uint32
			for i := range b.N {
				x ^= flow.Begin(128+i&64, hdr)
			}
			sink = x
		})
	}
}

func BenchmarkCheck(b *testing.B) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, u := range []int{20, 128, 4112} {
		for _, id := range []uint16{0, 13, 0x1234} {
			src, dst, udp := split(packet(r, false, u, id, 0x4000))
			flow := NewFlow(src, dst)
			b.Run(fmt.Sprintf("U=%d/id=%d", u, id), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(u))
				for range b.N {
					if _, v := flow.Check(udp, 13); v < OK0 {
						b.Fatal(v)
					}
				}
			})
		}
	}
}

func BenchmarkIDDelta(b *testing.B) {
	var x uint32
	for i := range b.N {
		x ^= IDDelta(4112, uint16(i&15))
	}
	sink = x
}

var sink uint32
