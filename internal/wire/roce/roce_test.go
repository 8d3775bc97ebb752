package roce

import (
	"bytes"
	"errors"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/wiretest"
)

// encode builds the packet that p was parsed from out of its fields.
func encode(p *Packet, pad []byte, f *Flow, id uint16) []byte {
	h := p.BTH
	b := make([]byte, BTHLen, MaxLen)
	PutBTH(b, p.Op, h.SE(), h.Pad(), h.AckReq(), h.DestQP(), h.PSN())
	if !h.M() {
		b[1] &^= 0x40 // we always send it set, a kernel never
	}
	if h.BECN() {
		b[4] |= 0x40
	}
	ext := func(n int) []byte {
		b = b[:len(b)+n]
		return b[len(b)-n:]
	}
	flags := p.Info.Flags
	if flags&FlagRETH != 0 {
		r := p.RETH()
		PutRETH(ext(RETHLen), r.VA(), r.RKey(), r.Len())
	}
	if flags&FlagAtomicETH != 0 {
		a := p.AtomicETH()
		PutAtomicETH(ext(AtomicETHLen), a.VA(), a.RKey(), a.SwapAdd(), a.Compare())
	}
	if flags&FlagDETH != 0 {
		d := p.DETH()
		PutDETH(ext(DETHLen), d.QKey(), d.SrcQP())
	}
	if flags&FlagAETH != 0 {
		a := p.AETH()
		PutAETH(ext(AETHLen), a.Syndrome(), a.MSN())
	}
	if flags&FlagImm != 0 {
		PutImm(ext(ImmLen), p.Imm())
	}
	if flags&FlagInv != 0 {
		PutIETH(ext(IETHLen), p.IETH())
	}
	if flags&FlagAtomicAckETH != 0 {
		PutAtomicAckETH(ext(AtomicAckETHLen), p.AtomicAck())
	}
	b = append(append(b, p.Payload...), pad...)
	u := len(b) + ICRCLen
	b = b[:u]
	PutICRC(b[u-4:], f.ICRC(u, b[:u-4])^IDDelta(u, id))
	return b
}

// padOf is the pad of a parsed packet, which a codec does not keep.
func padOf(udp []byte, p *Packet) []byte {
	return udp[len(udp)-ICRCLen-p.BTH.Pad() : len(udp)-ICRCLen]
}

// TestCaptures parses every packet of real traffic, checks its ICRC without looking at the IPv4
// identification, and encodes it again.
func TestCaptures(t *testing.T) {
	seen := map[Opcode]int{}
	for _, tc := range []struct {
		name  string
		count int
	}{{"rds-ib", 357}, {"rxe-ops", 1169}} {
		count := 0
		trackers := map[netip.Addr]*IDTracker{}
		for _, pk := range wiretest.Capture(t, tc.name) {
			if pk.Proto != wiretest.UDP || pk.Dst.Port() != Port {
				continue
			}
			count++
			var p Packet
			if err := Parse(pk.Payload, &p); err != nil {
				t.Fatalf("%s packet %d: %v", tc.name, pk.N, err)
			}
			if !p.Info.Valid || !p.BTH.PKeyOK() || p.BTH.TVer() != 0 {
				t.Errorf("%s packet %d: %v, P_Key %#x", tc.name, pk.N, p.Op, p.BTH.PKey())
			}
			if !p.PayloadOK(4096) && !p.PayloadOK(1024) {
				t.Errorf("%s packet %d: %v with %d bytes", tc.name, pk.N, p.Op, len(p.Payload))
			}
			seen[p.Op]++
			f := NewFlow(pk.Src, pk.Dst)
			id, v := f.Check(pk.Payload, 0)
			if id != pk.ID || v != OKSolved {
				t.Errorf("%s packet %d: %v, id %#x, was sent with %#x", tc.name, pk.N, v, id, pk.ID)
			}
			if got := encode(&p, padOf(pk.Payload, &p), &f, pk.ID); !bytes.Equal(got, pk.Payload) {
				t.Errorf("%s packet %d: %v encodes to\n%x, was\n%x", tc.name, pk.N, p.Op, got, pk.Payload)
			}
			tr := trackers[pk.Src.Addr()]
			if tr == nil {
				tr = new(IDTracker)
				trackers[pk.Src.Addr()] = tr
			}
			if !tr.Accept(v, id, pk.Time) {
				t.Errorf("%s packet %d: identification %#x not believed", tc.name, pk.N, id)
			}
		}
		if count != tc.count {
			t.Errorf("%s: %d RoCE packets, want %d", tc.name, count, tc.count)
		}
		for a, tr := range trackers {
			if tr.Resyncs != 0 {
				t.Errorf("%s: %d resyncs for %v, an ordinary kernel", tc.name, tr.Resyncs, a)
			}
		}
	}
	if len(seen) < 15 {
		t.Errorf("only %d opcodes in the captures: %v", len(seen), seen)
	}
	t.Log(seen)
}

func TestVectorFields(t *testing.T) {
	parse := func(ip []byte) (p Packet) {
		_, _, udp := split(ip)
		if err := Parse(udp, &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	eq := func(what string, got, want any) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	p := parse(vectorV0)
	eq("V0 opcode", p.Op, CNP)
	eq("V0 BECN", p.BTH.BECN(), true)
	eq("V0 QP", p.BTH.DestQP(), uint32(0x118))
	eq("V0 payload", len(p.Payload), 16)
	p = parse(vectorV0b)
	eq("V0b is UC, which we do not know", p.Info.Valid, false)
	eq("V0b M", p.BTH.M(), true)
	eq("V0b pad", p.BTH.Pad(), 2)
	eq("V0b PSN", p.BTH.PSN(), psn.New(13571856))
	p = parse(vectorV1)
	eq("V1 opcode", p.Op, RCSendOnly)
	eq("V1 payload", string(p.Payload), "hello, roce")
	eq("V1 AckReq", p.BTH.AckReq(), true)
	eq("V1 SE", p.BTH.SE(), false)
	eq("V1 QP", p.BTH.DestQP(), uint32(0x11))
	eq("V1 PSN", p.BTH.PSN(), psn.New(0x123456))
	eq("V1 P_Key", p.BTH.PKey(), uint16(DefaultPKey))
	p = parse(vectorV3)
	eq("V3 opcode", p.Op, RCAck)
	eq("V3 AckReq", p.BTH.AckReq(), false)
	eq("V3 syndrome", p.AETH().Syndrome(), SynACK)
	eq("V3 MSN", p.AETH().MSN(), uint32(1))
	p = parse(vectorV4)
	eq("V4 opcode", p.Op, RCWriteOnly)
	eq("V4 VA", p.RETH().VA(), uint64(0x00007F0012345678))
	eq("V4 R_Key", p.RETH().RKey(), uint32(0xC0DE))
	eq("V4 length", p.RETH().Len(), uint32(5))
	eq("V4 payload", string(p.Payload), "abcde")
}

// TestHeaders builds every header with values that fill it and compares with bytes laid out by hand.
func TestHeaders(t *testing.T) {
	for _, tc := range []struct {
		what string
		put  func(b []byte)
		want string
	}{
		{"BTH, all set", func(b []byte) { PutBTH(b, RCSendOnlyInv, true, 3, true, 0xFFFFFFFF, 0xFFFFFF) }, "17f0ffff 00ffffff 80ffffff"},
		{"BTH, nothing set", func(b []byte) { PutBTH(b, RCSendFirst, false, 0, false, 1, 0) }, "0040ffff 00000001 00000000"},
		{"BTH, pad 4 is none", func(b []byte) { PutBTH(b, RCAck, false, 4, false, 0x010203, 0x040506) }, "1140ffff 00010203 00040506"},
		{"RETH", func(b []byte) { PutRETH(b, 0x0102030405060708, 0x090A0B0C, 0x0D0E0F10) }, "0102030405060708 090a0b0c 0d0e0f10"},
		{"AtomicETH", func(b []byte) {
			PutAtomicETH(b, 0x0102030405060708, 0x090A0B0C, 0x1112131415161718, 0x2122232425262728)
		},
			"0102030405060708 090a0b0c 1112131415161718 2122232425262728"},
		{"AETH", func(b []byte) { PutAETH(b, SynNAKAccess, 0xFF010203) }, "62010203"},
		{"AtomicAckETH", func(b []byte) { PutAtomicAckETH(b, 0x0102030405060708) }, "0102030405060708"},
		{"ImmDt", func(b []byte) { PutImm(b, 0x01020304) }, "01020304"},
		{"IETH", func(b []byte) { PutIETH(b, 0x01020304) }, "01020304"},
		{"DETH", func(b []byte) { PutDETH(b, GSIQKey, 0xFF000001) }, "80010000 00000001"},
	} {
		want := wiretest.Hex(tc.want)
		b := bytes.Repeat([]byte{0xEE}, len(want))
		tc.put(b)
		if !bytes.Equal(b, want) {
			t.Errorf("%s: %x, want %x", tc.what, b, want)
		}
	}
}

// TestOpcodeTable checks the table by the rules that every row obeys, not by a second copy.
func TestOpcodeTable(t *testing.T) {
	valid := 0
	for i := range 256 {
		op := Opcode(i)
		info := op.Info()
		has := info.Has
		if !info.Valid {
			if info.HdrLen != BTHLen || info.Flags != 0 {
				t.Errorf("%v: an unknown opcode has a row", op)
			}
			if !strings.HasPrefix(op.String(), "opcode 0x") {
				t.Errorf("unknown opcode %#x is called %q", i, op)
			}
			continue
		}
		valid++
		if op == CNP {
			continue
		}
		name := op.String()
		check := func(what string, got, want bool) {
			t.Helper()
			if got != want {
				t.Errorf("%s: %s is %v", name, what, got)
			}
		}
		check("UD", has(FlagUD), op>>5 == 3)
		check("RC", !has(FlagUD), op>>5 == 0)
		check("DETH", has(FlagDETH), has(FlagUD))
		check("request", has(FlagRequest), !has(FlagResponse))
		kinds := 0
		for _, f := range []OpFlags{FlagSend, FlagWrite, FlagRead, FlagAtomic} {
			if has(f) {
				kinds++
			}
		}
		check("of one kind", kinds == 1 || op == RCAck, true)
		check("middle", has(FlagMiddle), !has(FlagStart) && !has(FlagEnd))
		// The names are the specification's, so they must agree with the flags.
		check("start", has(FlagStart), !strings.Contains(name, "Middle") && !strings.Contains(name, "Last"))
		check("end", has(FlagEnd), !strings.Contains(name, "Middle") && !strings.Contains(name, "First"))
		check("immediate", has(FlagImm), strings.Contains(name, "Immediate"))
		check("invalidate", has(FlagInv), strings.Contains(name, "Invalidate"))
		check("a SEND", has(FlagSend), strings.Contains(name, "SEND"))
		check("a WRITE", has(FlagWrite), strings.Contains(name, "WRITE"))
		check("a READ", has(FlagRead), strings.Contains(name, "READ"))
		// A receive is taken where a SEND starts, or with an immediate of a WRITE; completed where they end.
		check("takes a receive", has(FlagConsumesRecv), has(FlagSend|FlagStart) || has(FlagWrite|FlagImm))
		check("completes a receive", has(FlagCompletesRecv), has(FlagSend|FlagEnd) || has(FlagWrite|FlagImm))
		// Payload: none on READ requests, acknowledgements and atomics; First and Middle are full.
		check("without payload", has(FlagNoPayload), has(FlagAtomic) || op == RCReadRequest || op == RCAck)
		check("full", has(FlagFullMTU), !has(FlagEnd))
		check("not empty", has(FlagSomePayload), has(FlagEnd) && !has(FlagStart))
		// Headers.
		check("RETH", has(FlagRETH), has(FlagWrite|FlagStart) || op == RCReadRequest)
		check("AETH", has(FlagAETH), has(FlagResponse) && !has(FlagMiddle))
		check("AtomicETH", has(FlagAtomicETH), has(FlagAtomic|FlagRequest))
		check("AtomicAckETH", has(FlagAtomicAckETH), has(FlagAtomic|FlagResponse))
	}
	if valid != 23+2+1 {
		t.Errorf("%d opcodes, want 26", valid)
	}
	// Column "Hdr" of rocev2 spec 1.5.
	for op, n := range map[Opcode]int{
		RCSendFirst: 12, RCSendLastImm: 16, RCWriteFirst: 28, RCWriteOnlyImm: 32, RCReadRequest: 28, RCReadRespFirst: 16,
		RCReadRespMiddle: 12, RCAck: 16, RCAtomicAck: 24, RCCmpSwap: 40, RCSendOnlyInv: 16, UDSendOnly: 20, UDSendOnlyImm: 24,
	} {
		if got := op.Info().HdrLen; got != n {
			t.Errorf("%v: headers of %d bytes, want %d", op, got, n)
		}
	}
}

func TestParseLengths(t *testing.T) {
	pkt := func(op Opcode, n, pad int) []byte {
		b := make([]byte, n)
		if n >= BTHLen {
			PutBTH(b, op, false, pad, false, 1, 0)
		}
		return b
	}
	version := pkt(RCSendOnly, 16, 0)
	version[1] |= 1
	for _, tc := range []struct {
		what string
		b    []byte
		err  error
		n    int // payload
	}{
		{"nothing", nil, ErrShort, 0},
		{"a BTH without ICRC", pkt(RCSendOnly, 12, 0), ErrShort, 0},
		{"an empty SEND", pkt(RCSendOnly, 16, 0), nil, 0},
		{"not a multiple of 4", pkt(RCSendOnly, 17, 0), ErrLength, 0},
		{"another transport version", version, ErrVersion, 0},
		{"pad longer than the payload", pkt(RCSendOnly, 16, 1), ErrTruncated, 0},
		{"one byte and its pad", pkt(RCSendOnly, 20, 3), nil, 1},
		{"WRITE without its RETH", pkt(RCWriteOnly, 28, 0), ErrTruncated, 0},
		{"an empty WRITE", pkt(RCWriteOnly, 32, 0), nil, 0},
		{"an atomic that ends in its header", pkt(RCCmpSwap, 40, 0), ErrTruncated, 0},
		{"an atomic", pkt(RCCmpSwap, 44, 0), nil, 0},
		{"a reserved opcode", pkt(0x15, 64, 2), nil, 46},
		{"a reserved opcode with too much pad", pkt(0x1F, 16, 1), ErrTruncated, 0},
	} {
		var p Packet
		err := Parse(tc.b, &p)
		if !errors.Is(err, tc.err) {
			t.Errorf("%s: %v, want %v", tc.what, err, tc.err)
		} else if err == nil && len(p.Payload) != tc.n {
			t.Errorf("%s: payload of %d, want %d", tc.what, len(p.Payload), tc.n)
		}
	}
}

func TestPayloadOK(t *testing.T) {
	const mtu = 256
	for _, tc := range []struct {
		op   Opcode
		n    int
		want bool
	}{
		{RCSendFirst, mtu, true}, {RCSendFirst, mtu - 4, false}, {RCSendFirst, 0, false}, {RCReadRespMiddle, mtu, true},
		{RCSendLast, 1, true}, {RCSendLast, mtu, true}, {RCSendLast, 0, false}, {RCSendLast, mtu + 1, false},
		{RCSendOnly, 0, true}, {RCSendOnly, 3, true}, {RCSendOnly, mtu, true}, {RCSendOnly, mtu + 4, false},
		{RCReadRequest, 0, true}, {RCReadRequest, 4, false}, {RCAck, 0, true}, {RCAtomicAck, 8, false},
	} {
		b := make([]byte, tc.op.Info().HdrLen+tc.n+PadLen(tc.n)+ICRCLen)
		PutBTH(b, tc.op, false, PadLen(tc.n), false, 1, 0)
		var p Packet
		if err := Parse(b, &p); err != nil {
			t.Fatal(err)
		}
		if got := p.PayloadOK(mtu); got != tc.want {
			t.Errorf("%v with %d bytes at path MTU %d: %v", tc.op, tc.n, mtu, got)
		}
	}
	b := make([]byte, 24) // 8 bytes said to be 5 and pad 3, but 5 bytes have pad 3 and 4 have none
	PutBTH(b, RCSendOnly, false, 3, false, 1, 0)
	var p Packet
	if err := Parse(b, &p); err != nil || !p.PayloadOK(mtu) {
		t.Errorf("5 bytes with pad 3: %v", err)
	}
}

// TestRNRTimer checks the table by its pattern: from code 2 on times double every two codes, and the
// odd ones are one and a half times the even one before; 1 is 10 µs; 0 is where code 32 would be.
func TestRNRTimer(t *testing.T) {
	if got := RNRTimer(1); got != 10*time.Microsecond {
		t.Errorf("code 1 is %v", got)
	}
	if got := RNRTimer(0); got != 655360*time.Microsecond {
		t.Errorf("code 0 is %v", got)
	}
	for code := uint8(2); code < 32; code++ {
		want := 10 * time.Microsecond << (code / 2)
		if code%2 == 1 {
			want = want * 3 / 2
		}
		if got := RNRTimer(code); got != want {
			t.Errorf("code %d is %v, want %v", code, got, want)
		}
		if RNRTimer(code|0xE0) != want {
			t.Errorf("the upper bits of code %d matter", code)
		}
	}
}

func TestSyndromes(t *testing.T) {
	for s, kind := range map[uint8]uint8{
		0: KindACK, SynACK: KindACK, SynRNR: KindRNR, SynRNR | 31: KindRNR,
		SynNAKSeq: KindNAK, SynNAKInvReq: KindNAK, SynNAKAccess: KindNAK, SynNAKOp: KindNAK, SynNAKInvRD: KindNAK,
	} {
		if SynKind(s) != kind {
			t.Errorf("syndrome %#x is of kind %d, want %d", s, SynKind(s), kind)
		}
	}
	for _, s := range []uint8{0x40, 0x5F, 0x80, 0x9F, 0xFF} {
		if k := SynKind(s); k == KindACK || k == KindRNR || k == KindNAK {
			t.Errorf("reserved syndrome %#x is of kind %d", s, k)
		}
	}
	if SynValue(SynRNR|14) != 14 || SynValue(SynNAKAccess) != 2 {
		t.Error("SynValue")
	}
}

func TestPathMTU(t *testing.T) {
	for _, tc := range []struct{ ifMTU, bytes int }{ // column "rdma_cm" of rocev2 spec 1.7
		{0, 0}, {-1, 0}, {math.MinInt32, 0}, {351, 0}, {352, 256}, {607, 256}, {608, 512}, {1119, 512}, {1120, 1024}, {1500, 1024},
		{2143, 1024}, {2144, 2048}, {4191, 2048}, {4192, 4096}, {9000, 4096}, {65536, 4096},
	} {
		if got := MTUBytes(PathMTU(tc.ifMTU)); got != tc.bytes {
			t.Errorf("interface MTU %d: path MTU %d, want %d", tc.ifMTU, got, tc.bytes)
		}
	}
	if MTUBytes(0) != 0 || MTUBytes(6) != 0 || MTUBytes(255) != 0 {
		t.Error("a code that does not exist has a size")
	}
}

func TestPKey(t *testing.T) {
	for key, want := range map[uint16]bool{0xFFFF: true, 0x7FFF: true, 0xFFFE: false, 0: false, 0x8000: false} {
		b := make([]byte, BTHLen)
		PutBTH(b, RCAck, false, 0, false, 1, 0)
		b[2], b[3] = byte(key>>8), byte(key)
		if got := BTH(b).PKeyOK(); got != want {
			t.Errorf("P_Key %#x: %v", key, got)
		}
	}
}

func TestParseAllocs(t *testing.T) {
	_, _, udp := split(bytes.Clone(vectorV4))
	var p Packet
	if n := testing.AllocsPerRun(100, func() {
		if Parse(udp, &p) != nil || p.RETH().Len() != 5 {
			t.Fatal("V4")
		}
		PutBTH(udp, p.Op, false, 3, true, 1, 2)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzParse(f *testing.F) {
	for _, ip := range [][]byte{vectorV0, vectorV0b, vectorV1, vectorV3, vectorV4} {
		_, _, udp := split(ip)
		f.Add(udp)
	}
	flow := NewFlow(netip.MustParseAddrPort("10.0.0.1:57236"), netip.MustParseAddrPort("10.0.0.2:4791"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Packet
		if err := Parse(b, &p); err != nil {
			return
		}
		if n := BTHLen + len(p.Ext) + len(p.Payload) + p.BTH.Pad() + ICRCLen; n != len(b) {
			t.Fatalf("pieces make %d of %d bytes", n, len(b))
		}
		p.PayloadOK(256)
		if !p.Info.Valid || len(b) > MaxLen {
			return
		}
		// What was parsed and encoded again parses to the same.
		var q Packet
		again := encode(&p, padOf(b, &p), &flow, 0)
		if err := Parse(again, &q); err != nil {
			t.Fatal(err)
		}
		if len(again) != len(b) || !bytes.Equal(q.Payload, p.Payload) || q.Op != p.Op || q.BTH.PSN() != p.BTH.PSN() ||
			q.BTH.DestQP() != p.BTH.DestQP() || q.BTH.AckReq() != p.BTH.AckReq() || q.BTH.SE() != p.BTH.SE() ||
			q.BTH.M() != p.BTH.M() || q.BTH.BECN() != p.BTH.BECN() {
			t.Fatalf("%x encodes to %x", b, again)
		}
		if p.Info.Flags&FlagDETH == 0 && !bytes.Equal(q.Ext, p.Ext) { // DETH has a reserved byte
			t.Fatalf("extension headers %x encode to %x", p.Ext, q.Ext)
		}
	})
}

func TestIDTracker(t *testing.T) {
	now := time.Unix(1000, 0)
	var tr *IDTracker
	step := func(what string, v Verdict, id uint16, want bool) {
		t.Helper()
		if got := tr.Accept(v, id, now); got != want {
			t.Errorf("%s: believed %v, want %v", what, got, want)
		}
	}

	tr = new(IDTracker)
	step("a bad packet", Bad, 0, false)
	step("a packet without DF", BadDF, 0, false)
	step("the first identification of a peer", OKSolved, 65000, true)
	step("the next", OKSolved, 65001, true)
	step("one far ahead, across the wrap", OKSolved, tr.last+idWindow-1, true)
	last := tr.last
	step("one beyond the window", OKSolved, last+idWindow, false)
	step("one a little behind: reordered", OKSolved, last-idBehind, true)
	step("which does not move the window", OKSolved, last+idWindow, false)
	step("one further behind", OKSolved, last-idBehind-1, false)
	now = now.Add(1500 * time.Millisecond)
	step("a pause widens the window", OKSolved, last+idWindow+1499, true)
	now = now.Add(24 * time.Hour)
	step("a long one opens it, but not behind", OKSolved, tr.last-idBehind-1, true)
	now = now.Add(-time.Hour)
	step("a clock that goes back does not close it", OKSolved, tr.last+1, true)
	if tr.Refused != 3 || tr.Resyncs != 0 {
		t.Errorf("refused %d, resyncs %d", tr.Refused, tr.Resyncs)
	}

	// A peer whose counter jumped, as after its restart, is silent for seven packets.
	tr = new(IDTracker)
	step("first", OKSolved, 1, true)
	for range idMisses - 1 {
		step("a jump", OKSolved, tr.last+30000, false)
	}
	step("its eighth packet", OKSolved, tr.last+30000, true)
	step("and it goes on from there", OKSolved, tr.last+1, true)
	if tr.Resyncs != 1 {
		t.Errorf("resyncs %d", tr.Resyncs)
	}

	// Rare misses never add up to a jump.
	tr = new(IDTracker)
	step("first", OKSolved, 1, true)
	for range 100 {
		step("a corrupted packet", OKSolved, tr.last+20000, false)
		for range idClear {
			step("right ones", OKSolved, tr.last+1, true)
		}
	}
	if tr.Resyncs != 0 {
		t.Errorf("resyncs %d", tr.Resyncs)
	}

	// A peer that never used an identification is held to that.
	tr = new(IDTracker)
	for range idPlain {
		step("identification 0", OK0, 0, true)
	}
	step("a solved one from such a peer", OKSolved, 500, false)
	step("its own traffic goes on", OKGuess, 3, true)
	for i := range uint16(idTrain) {
		step("also where trains were joined", OKSolved, i, true)
	}
	for range idMisses - 2 {
		step("more solved ones", OKSolved, idTrain, false)
	}
	step("a peer that changed is followed in the end", OKSolved, 500, true)
	step("by its counter", OKSolved, 501, true)

	// Two counters in turn, as a NIC with one per QP: nobody starves.
	tr = new(IDTracker)
	refused := 0
	for i := range 200 {
		id := uint16(100 + i)
		if i%2 == 1 {
			id += 30000
		}
		if !tr.Accept(OKSolved, id, now) {
			refused++
		}
	}
	if want := idResyncs * (idMisses - 1); refused != want {
		t.Errorf("two counters: %d refused, want %d and then none", refused, want)
	}
}
