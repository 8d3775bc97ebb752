package rdshdr

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/internal/wire/wiretest"
	"pgregory.net/rapid"
)

// naiveSum is the Internet checksum of RFC 1071 by 16-bit words.
func naiveSum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
		s = s&0xFFFF + s>>16
	}
	return uint16(s)
}

// again encodes what a header says.
func again(t *testing.T, h Header) []byte {
	t.Helper()
	b := bytes.Repeat([]byte{0xEE}, HeaderLen)
	Put(b, h.Seq(), h.Ack(), h.Len(), h.SPort(), h.DPort(), h.Flags(), h.Credit())
	for area := h.Ext(); ; {
		typ, data, rest, err := NextExt(area)
		if err != nil {
			t.Fatalf("extensions %x: %v", h.Ext(), err)
		}
		if typ == ExtNone {
			break
		}
		if err := Header(b).AddExt(typ, data); err != nil {
			t.Fatal(err)
		}
		area = rest
	}
	Header(b).Seal()
	if h.Checksum() == 0 {
		Header(b).SetChecksum(0)
	}
	return b
}

// TestHeaderVectors are the headers of rds spec 2.8.
func TestHeaderVectors(t *testing.T) {
	for _, tc := range []struct {
		what string
		hex  string
		put  func(b []byte)
	}{
		{"ack frame", "0000000000000000 0000000000000005 00000000 0000 0000 00 00 00000000 fffa 00000000000000000000000000000000",
			func(b []byte) { Put(b, 0, 5, 0, 0, 0, 0, 0) }},
		{"data", "0000000000000001 0000000000000000 00000005 0fa1 0fa2 02 00 00000000 deb6 00000000000000000000000000000000",
			func(b []byte) { Put(b, 1, 0, 5, 4001, 4002, FlagAckRequired, 0) }},
		{"ping", "0000000000000007 0000000000000003 00000000 0fa1 0000 00 00 00000000 f054 00000000000000000000000000000000",
			func(b []byte) { Put(b, 7, 3, 0, 4001, 0, 0, 0) }},
		{"pong", "0000000000000009 0000000000000007 00000000 0000 0fa1 00 00 00000000 f04e 00000000000000000000000000000000",
			func(b []byte) { Put(b, 9, 7, 0, 0, 4001, 0, 0) }},
		{"congestion map", "0000000000000000 0000000000000000 00002000 0000 0000 01 00 00000000 deff 00000000000000000000000000000000",
			func(b []byte) { Put(b, 0, 0, CongMapLen, 0, 0, FlagCongBitmap, 0) }},
		{"RDMA_DEST", "0000000000000002 0000000000000001 00000040 0fa1 0fa2 02 00 00000000 6535 03112233440000001000000000000000",
			func(b []byte) {
				Put(b, 2, 1, 64, 4001, 4002, FlagAckRequired, 0)
				if err := Header(b).AddRDMADest(0x11223344, 0x10); err != nil {
					t.Fatal(err)
				}
				Header(b).Seal()
			}},
		{"TCP probe ping", "0000000000000001 0000000000000000 00000000 0001 0000 00 00 00000000 0000 05000800000000000000000000000000",
			func(b []byte) {
				Put(b, 1, 0, 0, 1, 0, 0, 0)
				if err := Header(b).AddNPaths(8); err != nil {
					t.Fatal(err)
				}
				Header(b).SetChecksum(0)
			}},
	} {
		want := wiretest.Hex(tc.hex)
		got := bytes.Repeat([]byte{0xEE}, HeaderLen)
		tc.put(got)
		if !bytes.Equal(got, want) {
			t.Errorf("%s:\n%x, want\n%x", tc.what, got, want)
		}
		if !Valid(want) {
			t.Errorf("%s: not valid", tc.what)
		}
		if b := again(t, want); !bytes.Equal(b, want) {
			t.Errorf("%s: decodes and encodes to\n%x, want\n%x", tc.what, b, want)
		}
	}
}

func TestHeaderFields(t *testing.T) {
	b := make([]byte, HeaderLen)
	Put(b, 0x0102030405060708, 0x1112131415161718, 0x21222324, 0x3132, 0x3334, 0x41, 0x42)
	if want := wiretest.Hex("0102030405060708 1112131415161718 21222324 3132 3334 41 42 00000000"); !bytes.Equal(b[:30], want) {
		t.Errorf("%x, want %x", b[:30], want)
	}
	h := Header(b)
	if h.Seq() != 0x0102030405060708 || h.Ack() != 0x1112131415161718 || h.Len() != 0x21222324 || h.SPort() != 0x3132 ||
		h.DPort() != 0x3334 || h.Flags() != 0x41 || h.Credit() != 0x42 || h.HasExt() || h.IsMap() {
		t.Errorf("fields of %x", b)
	}
	o := Header(bytes.Clone(b))
	o.SetAck(7)
	o[25] = 9
	if !h.SameMessage(o) {
		t.Error("another ack or credit makes another message")
	}
	for _, i := range []int{7, 19, 21, 23} {
		o := Header(bytes.Clone(b))
		o[i]++
		if h.SameMessage(o) {
			t.Errorf("a change of byte %d makes the same message", i)
		}
	}
	Put(b, 0, 0, CongMapLen, 0, 0, FlagCongBitmap, 0)
	if !h.IsMap() {
		t.Error("a map is none")
	}
	Put(b, 0, 0, CongMapLen, 0, 0, FlagCongBitmap|FlagRetransmitted, 0)
	if h.IsMap() {
		t.Error("a map with another flag is one")
	}
}

// TestChecksum compares with the sum by 16-bit words.
func TestChecksum(t *testing.T) {
	edge := rapid.OneOf(rapid.Uint64(), rapid.SampledFrom([]uint64{0, 1, 0xFFFF, 1 << 63, 1<<64 - 1, 0xFFFF0000FFFF0000}))
	rapid.Check(t, func(t *rapid.T) {
		b := bytes.Repeat([]byte{0xEE}, HeaderLen)
		h := Header(b)
		check := func(what string) {
			t.Helper()
			bare := bytes.Clone(b)
			bare[30], bare[31] = 0, 0
			if want := ^naiveSum(bare); h.Checksum() != want {
				t.Fatalf("%s: checksum %#04x, want %#04x", what, h.Checksum(), want)
			}
			if !Valid(b) {
				t.Fatalf("%s: not valid", what)
			}
		}
		Put(b, edge.Draw(t, "seq"), edge.Draw(t, "ack"), rapid.Uint32().Draw(t, "len"), rapid.Uint16().Draw(t, "sport"),
			rapid.Uint16().Draw(t, "dport"), rapid.Uint8().Draw(t, "flags"), rapid.Uint8().Draw(t, "credit"))
		check("Put")
		h.SetAck(edge.Draw(t, "ack2"))
		check("SetAck")
		copy(h.Ext(), rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ext"))
		h.Seal()
		check("Seal")
		// Any one changed word is seen, unless that makes the checksum 0: none.
		i := rapid.IntRange(0, HeaderLen-1).Draw(t, "i")
		b[i] ^= byte(rapid.IntRange(1, 255).Draw(t, "x"))
		if valid := naiveSum(b) == 0xFFFF || h.Checksum() == 0; Valid(b) != valid {
			t.Fatalf("byte %d changed: valid is %v", i, Valid(b))
		}
	})
	if Valid(make([]byte, HeaderLen-1)) {
		t.Error("47 bytes are a header")
	}
}

func TestExtensions(t *testing.T) {
	h := func(hex string) Header {
		b := make([]byte, HeaderLen)
		copy(b[extOff:], wiretest.Hex(hex))
		return b
	}
	for _, tc := range []struct {
		what  string
		area  string
		types []ExtType
		err   error
	}{
		{"none", "", nil, nil},
		{"end mark first", "00 03", nil, nil},
		{"one", "0511 22", []ExtType{ExtNPaths}, nil},
		{"two, as a probe with generation", "05 0001 06 01020304", []ExtType{ExtNPaths, ExtGenNum}, nil},
		{"those of newer kernels", "02 01020304 04 0000100001000000 08 07", []ExtType{ExtRDMA, ExtRDMABytes, ExtSPortIdx}, nil},
		{"all sixteen bytes, no end mark", "03 0102030405060708 01 01020304 08 07", []ExtType{ExtRDMADest, ExtVersion, ExtSPortIdx}, nil},
		{"a type in the last byte", "03 0102030405060708 05 0008 05 0008 08", []ExtType{ExtRDMADest, ExtNPaths, ExtNPaths}, ErrExtSpace},
		{"an unknown type", "05 0001 09 01020304", []ExtType{ExtNPaths}, ErrExtUnknown},
		{"a type beyond the table", "FF", nil, ErrExtUnknown},
		{"an entry that does not fit", "03 0102030405060708 03 010203040506", []ExtType{ExtRDMADest}, ErrExtSpace},
	} {
		var types []ExtType
		var err error
		for area := h(tc.area).Ext(); ; {
			typ, data, rest, e := NextExt(area)
			if typ == ExtNone {
				err = e
				break
			}
			if len(data) != ExtLen(typ) {
				t.Errorf("%s: %v has %d bytes", tc.what, typ, len(data))
			}
			types = append(types, typ)
			area = rest
		}
		if !errors.Is(err, tc.err) || !slices.Equal(types, tc.types) {
			t.Errorf("%s: %v, %v; want %v, %v", tc.what, types, err, tc.types, tc.err)
		}
	}

	b := h("")
	step := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	step("RDMA", b.AddRDMA(0x01020304), nil)
	step("RDMA_DEST", b.AddRDMADest(0x11121314, 0x21222324), nil)
	before := bytes.Clone(b)
	step("NPATHS fills the area, but there would be no end mark", b.AddNPaths(0x3132), ErrExtSpace)
	step("an end mark is no entry", b.AddExt(ExtNone, nil), ErrExtUnknown)
	step("nor is a type without length", b.AddExt(9, nil), ErrExtUnknown)
	step("nor data of another length", b.AddExt(ExtNPaths, []byte{1}), ErrExtUnknown)
	if !bytes.Equal(b, before) {
		t.Error("an entry that was refused left something")
	}
	if want := wiretest.Hex("02 01020304 03 1112131421222324 0000"); !bytes.Equal(b.Ext(), want) {
		t.Errorf("%x, want %x", b.Ext(), want)
	}
	if d := b.FindExt(ExtRDMADest); !bytes.Equal(d, wiretest.Hex("1112131421222324")) {
		t.Errorf("found %x", d)
	}
	if b.FindExt(ExtNPaths) != nil || h("FF").FindExt(ExtNPaths) != nil {
		t.Error("found what is not there")
	}
	b = h("FF")
	step("a list that cannot be read to its end", b.AddNPaths(1), ErrExtUnknown)
}

func TestConnPriv(t *testing.T) {
	// The example of rds spec 3.2.
	want := wiretest.Hex("0a4d0002 0a4d0001 03 01 0003 00 00 0000 0000000000000000 00000000 00000000")
	p := ConnPriv{SAddr: netip.MustParseAddr("10.77.0.2"), DAddr: netip.MustParseAddr("10.77.0.1"), Major: ProtoMajor, Minor: ProtoMinor, Mask: ProtoMask}
	b := bytes.Repeat([]byte{0xEE}, 100)
	if n := p.Encode(b); n != PrivLen4 || !bytes.Equal(b[:n], want) {
		t.Errorf("%x, want %x", b[:n], want)
	}
	if b[PrivLen4] != 0xEE {
		t.Error("more was written than the RDS part")
	}
	// Every field, both families.
	for _, tc := range []struct {
		src, dst, hex string
	}{
		{"1.2.3.4", "5.6.7.8", "01020304 05060708 04 01 1112 13 000000 2122232425262728 31323334 00000000"},
		{"fd00::1", "fd00::2", "fd000000000000000000000000000001 fd000000000000000000000000000002 04 01 1112 13 000000 2122232425262728 31323334 00000000"},
	} {
		p := ConnPriv{netip.MustParseAddr(tc.src), netip.MustParseAddr(tc.dst), 4, 1, 0x1112, 0x13, 0x2122232425262728, 0x31323334}
		want := wiretest.Hex(tc.hex)
		v6 := p.DAddr.Is6()
		b := bytes.Repeat([]byte{0xEE}, 100)
		if n := p.Encode(b); n != PrivLen(v6) || !bytes.Equal(b[:n], want) {
			t.Errorf("%x, want %x", b[:n], want)
		}
		var q ConnPriv
		if err := q.Decode(want, v6); err != nil || q != p {
			t.Errorf("%+v, want %+v (%v)", q, p, err)
		}
		if err := q.Decode(want[:len(want)-1], v6); err != ErrPrivLen {
			t.Errorf("a byte less: %v", err)
		}
	}
}

func TestNegotiate(t *testing.T) {
	for _, tc := range []struct {
		major, minor uint8
		mask         uint16
		wmaj, wmin   uint8
		ok           bool
	}{
		{3, 1, 3, 3, 1, true}, {3, 1, 0, 3, 1, true}, {0, 0, 0, 4, 0, true}, {0, 9, 9, 4, 0, true},
		{4, 0, 1, 4, 0, true}, {4, 1, 2, 4, 1, true}, {4, 1, 3, 4, 1, true}, {4, 2, 7, 4, 1, true}, {4, 0, 0, 0, 0, false}, {4, 2, 4, 0, 0, false},
		{3, 0, 3, 0, 0, false}, {3, 2, 3, 0, 0, false}, {5, 0, 3, 0, 0, false}, {1, 1, 3, 0, 0, false}, {255, 255, 0xFFFF, 0, 0, false},
	} {
		major, minor, err := Negotiate(tc.major, tc.minor, tc.mask)
		if major != tc.wmaj || minor != tc.wmin || (err == nil) != tc.ok || (err != nil && err != ErrIncompatible) {
			t.Errorf("%d.%d mask %#x: %d.%d, %v", tc.major, tc.minor, tc.mask, major, minor, err)
		}
	}
}

func TestMark(t *testing.T) {
	m := Mark{Incarnation: 0x0102030405060708, MaxSend: 0x11121314, Window: 0x21222324, Flags: 0x3132, Attempt: 0x3334}
	want := wiretest.Hex("4f524401 0102030405060708 11121314 21222324 31323334")
	b := bytes.Repeat([]byte{0xEE}, MarkLen)
	m.Put(b)
	if !bytes.Equal(b, want) {
		t.Errorf("%x, want %x", b, want)
	}
	var got Mark
	if !got.ParseSend(b) || got != m {
		t.Errorf("%+v, want %+v", got, m)
	}
	if got.ParseSend(append(b, 0)) || got.ParseSend(b[:MarkLen-1]) {
		t.Error("a SEND of another length is a mark")
	}

	for _, tc := range []struct{ v6 bool }{{false}, {true}} {
		p := ConnPriv{SAddr: netip.MustParseAddr("10.0.0.1"), DAddr: netip.MustParseAddr("10.0.0.2"), Major: 3, Minor: 1, Mask: 3}
		if tc.v6 {
			p.SAddr, p.DAddr = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
		}
		req, rep := make([]byte, PrivREQLen), make([]byte, 196)
		n := p.Encode(req)
		kernel := bytes.Clone(req[:n])
		p.Encode(rep)
		var g Mark
		if ours, _ := g.ParseREQ(req, tc.v6); ours || g.ParseREP(rep, tc.v6) {
			t.Errorf("v6=%v: a kernel's private data has a mark", tc.v6)
		}
		if n := m.PutREQ(req, tc.v6); n != 56 {
			t.Errorf("v6=%v: REQ private data of %d bytes", tc.v6, n)
		}
		if ours, whole := g.ParseREQ(req, tc.v6); !ours || whole == tc.v6 {
			t.Errorf("v6=%v: ours %v, whole %v", tc.v6, ours, whole)
		} else if want := m; g != want && (whole || g != Mark{Attempt: want.Attempt}) {
			t.Errorf("v6=%v: %+v", tc.v6, g)
		}
		if n, want := m.PutREP(rep, tc.v6), PrivLen(tc.v6)+MarkLen; n != want {
			t.Errorf("v6=%v: REP private data of %d bytes, want %d", tc.v6, n, want)
		}
		g = Mark{}
		if !g.ParseREP(rep, tc.v6) || g != m {
			t.Errorf("v6=%v: REP says %+v", tc.v6, g)
		}
		// A kernel reads what it read before.
		if end := PrivLen(tc.v6) - 4; !bytes.Equal(req[:end], kernel[:end]) || !bytes.Equal(rep[:end], kernel[:end]) {
			t.Errorf("v6=%v: the mark is in the kernel's part", tc.v6)
		}
		var q ConnPriv
		if err := q.Decode(req, tc.v6); err != nil || q != p {
			t.Errorf("v6=%v: %+v, %v", tc.v6, q, err)
		}
		// Cut short, there is no mark.
		for n := range req {
			if ours, _ := g.ParseREQ(req[:n], tc.v6); ours {
				t.Errorf("v6=%v: %d bytes of a REQ have a mark", tc.v6, n)
			}
		}
		for n := range PrivLen(tc.v6) + MarkLen {
			if g.ParseREP(rep[:n], tc.v6) {
				t.Errorf("v6=%v: %d bytes of a REP have a mark", tc.v6, n)
			}
		}
	}

	b[3]++
	if got.Parse(b) {
		t.Error("another version of the mark is ours")
	}
	b[3]--
	clear(b[4:12])
	if got = m; got.Parse(b) || got != m {
		t.Error("a mark without incarnation is one")
	}
}

// TestCongMap compares with a set of ports.
func TestCongMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m, old CongMap
		set, was := map[uint16]bool{}, map[uint16]bool{}
		port := rapid.OneOf(rapid.Uint16(), rapid.Uint16Range(4000, 4010), rapid.SampledFrom([]uint16{0, 7, 8, 63, 64, 65535}))
		for range rapid.IntRange(0, 50).Draw(t, "steps") {
			p := port.Draw(t, "port")
			switch rapid.IntRange(0, 2).Draw(t, "op") {
			case 0:
				m.Set(p)
				set[p] = true
			case 1:
				m.Clear(p)
				delete(set, p)
			case 2:
				old, was = m, maps.Clone(set)
			}
			if m.Test(p) != set[p] {
				t.Fatalf("port %d is %v", p, m.Test(p))
			}
		}
		last := -1
		n := 0
		cleared := false
		for p, congested := range m.Diff(&old) {
			if int(p) <= last {
				t.Fatalf("port %d behind %d", p, last)
			}
			last = int(p)
			if congested != set[p] || congested == was[p] {
				t.Fatalf("port %d: now %v, was %v, diff says %v", p, set[p], was[p], congested)
			}
			cleared = cleared || !congested
			n++
		}
		for p := range 1 << 16 {
			if set[uint16(p)] != was[uint16(p)] {
				n--
			}
		}
		if n != 0 {
			t.Fatalf("the difference is off by %d ports", n)
		}
		if m.Equal(&old) != (last < 0) {
			t.Fatalf("equal is %v", m.Equal(&old))
		}
		if m.ClearedSince(&old) != cleared {
			t.Fatalf("cleared is %v", m.ClearedSince(&old))
		}
		for range m.Diff(&old) {
			break // stopping early is allowed
		}
	})
	var m CongMap
	m.Set(4009) // rds spec 2.7: byte p>>3, bit p&7
	if m[501] != 0x02 {
		t.Errorf("byte 501 is %#x", m[501])
	}
}

// rdsPort is the RDMA-CM port of RDS over IPv4 (rds spec 1.1).
const rdsPort = 18634

// TestCapturesIB looks at every RDS/IB handshake and at the header of every SEND of real traffic.
func TestCapturesIB(t *testing.T) {
	for _, tc := range []struct {
		name    string
		headers int
		types   []ExtType // extensions that must occur
	}{{"rds-ib", 142, nil}, {"rxe-ops", 0, []ExtType{ExtRDMA, ExtRDMADest}}} {
		rds := map[uint32]bool{}     // QPs of RDS connections
		pending := map[uint32]bool{} // communication IDs of their REQs
		headers := 0
		exts := map[ExtType]int{}
		for _, pk := range wiretest.Capture(t, tc.name) {
			var p roce.Packet
			if pk.Dst.Port() != roce.Port || roce.Parse(pk.Payload, &p) != nil {
				continue
			}
			if p.Op == roce.UDSendOnly {
				var req cm.REQ
				var rep cm.REP
				if req.Decode(p.Payload) == nil && req.ServiceID == cm.ServiceID(cm.PortSpaceTCP, rdsPort) {
					pending[req.LocalCommID] = true
					rds[req.LocalQPN] = true
					checkPriv(t, pk, req.PrivateData[cm.CMAHeaderLen:], PrivREQLen)
					if ours, _ := new(Mark).ParseREQ(req.PrivateData[cm.CMAHeaderLen:], false); ours {
						t.Errorf("%s packet %d: a kernel's REQ is ours", tc.name, pk.N)
					}
				}
				if rep.Decode(p.Payload) == nil && pending[rep.RemoteCommID] {
					rds[rep.LocalQPN] = true
					checkPriv(t, pk, rep.PrivateData[:], 196)
					if new(Mark).ParseREP(rep.PrivateData[:], false) {
						t.Errorf("%s packet %d: a kernel's REP is ours", tc.name, pk.N)
					}
				}
				continue
			}
			if !rds[p.BTH.DestQP()] || !p.Info.Has(roce.FlagSend|roce.FlagStart) {
				continue
			}
			headers++
			h := Header(p.Payload)
			if !Valid(h) || h.Checksum() == 0 || naiveSum(h[:HeaderLen]) != 0xFFFF {
				t.Errorf("%s packet %d: header %x is not valid", tc.name, pk.N, h[:HeaderLen])
			}
			if got := again(t, h); !bytes.Equal(got, h[:HeaderLen]) {
				t.Errorf("%s packet %d: header encodes to\n%x, was\n%x", tc.name, pk.N, got, h[:HeaderLen])
			}
			if typ, _, _, _ := NextExt(h.Ext()); typ != ExtNone {
				exts[typ]++
			}
			if h.IsMap() && (h.Len() != CongMapLen || h.Seq() != 0) {
				t.Errorf("%s packet %d: a map of %d bytes, sequence %d", tc.name, pk.N, h.Len(), h.Seq())
			}
		}
		if headers == 0 || tc.headers != 0 && headers != tc.headers {
			t.Errorf("%s: %d headers, want %d", tc.name, headers, tc.headers)
		}
		for _, typ := range tc.types {
			if exts[typ] == 0 {
				t.Errorf("%s: no %v", tc.name, typ)
			}
		}
		t.Log(tc.name, headers, "headers, extensions", exts)
	}
}

func checkPriv(t *testing.T, pk wiretest.Packet, priv []byte, n int) {
	t.Helper()
	var p ConnPriv
	if err := p.Decode(priv, false); err != nil {
		t.Fatalf("packet %d: %v", pk.N, err)
	}
	if want := (ConnPriv{SAddr: pk.Src.Addr(), DAddr: pk.Dst.Addr(), Major: 3, Minor: 1, Mask: 3}); p != want {
		t.Errorf("packet %d: private data %+v, want %+v", pk.N, p, want)
	}
	if _, _, err := Negotiate(p.Major, p.Minor, p.Mask); err != nil {
		t.Errorf("packet %d: %v", pk.N, err)
	}
	b := make([]byte, n)
	p.Encode(b)
	if !bytes.Equal(b, priv) {
		t.Errorf("packet %d: private data encodes to\n%x, was\n%x", pk.N, b, priv)
	}
}

// TestCapturesTCP walks through the streams of real RDS/TCP traffic.
func TestCapturesTCP(t *testing.T) {
	streams, messages, probes := 0, 0, 0
	congested := map[uint16]bool{}
	for _, s := range wiretest.Streams(wiretest.Capture(t, "rds-tcp")) {
		if len(s) == 0 {
			continue
		}
		streams++
		for len(s) >= HeaderLen {
			h := Header(s[:HeaderLen])
			messages++
			if !Valid(h) || h.Checksum() != 0 {
				t.Fatalf("header %x", h)
			}
			if got := again(t, h); !bytes.Equal(got, h) {
				t.Errorf("header encodes to\n%x, was\n%x", got, h)
			}
			if h.FindExt(ExtNPaths) != nil {
				probes++
			}
			n := HeaderLen + int(h.Len())
			if h.Len() > MaxMessage || n > len(s) {
				t.Fatalf("message of %d bytes, %d left", h.Len(), len(s))
			}
			if h.IsMap() {
				var none CongMap
				m := CongMap(s[HeaderLen:n])
				for port := range m.Diff(&none) {
					congested[port] = true
				}
			}
			s = s[n:]
		}
		if len(s) != 0 {
			t.Errorf("%d bytes left over", len(s))
		}
	}
	if streams < 2 || messages < 50 || probes == 0 {
		t.Errorf("%d streams, %d messages, %d probes", streams, messages, probes)
	}
	// Nobody read port 4009 until it was congested.
	if len(congested) != 1 || !congested[4009] {
		t.Errorf("congested ports %v", congested)
	}
}

func TestAllocs(t *testing.T) {
	b := make([]byte, HeaderLen)
	priv := make([]byte, PrivREQLen)
	var m CongMap
	var old CongMap
	m.Set(77)
	p := ConnPriv{SAddr: netip.MustParseAddr("10.0.0.1"), DAddr: netip.MustParseAddr("10.0.0.2")}
	if n := testing.AllocsPerRun(100, func() {
		Put(b, 1, 2, 3, 4, 5, 6, 7)
		h := Header(b)
		if h.AddRDMADest(1, 2) != nil || h.FindExt(ExtRDMADest) == nil {
			t.Fatal("extension")
		}
		h.SetAck(9)
		if !Valid(b) {
			t.Fatal("not valid")
		}
		p.Encode(priv)
		if p.Decode(priv, false) != nil {
			t.Fatal("private data")
		}
		mark := Mark{Incarnation: 1}
		mark.PutREQ(priv, false)
		if ours, _ := mark.ParseREQ(priv, false); !ours {
			t.Fatal("mark")
		}
		for range m.Diff(&old) {
			old.Set(77)
		}
		old.Clear(77)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzHeader(f *testing.F) {
	b := make([]byte, HeaderLen)
	Put(b, 1, 0, 5, 4001, 4002, FlagAckRequired, 0)
	f.Add(bytes.Clone(b), uint64(9))
	f.Add(make([]byte, HeaderLen), uint64(0))
	f.Add(b[:HeaderLen-1], uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, ack uint64) {
		valid := Valid(b)
		if len(b) < HeaderLen {
			if valid {
				t.Fatal("a short header is valid")
			}
			return
		}
		b = bytes.Clone(b[:HeaderLen])
		h := Header(b)
		if want := h.Checksum() == 0 || naiveSum(b) == 0xFFFF; valid != want {
			t.Fatalf("%x: valid is %v", b, valid)
		}
		h.SetAck(ack)
		if !Valid(b) || h.Ack() != ack {
			t.Fatalf("%x after SetAck", b)
		}
		c := make([]byte, HeaderLen)
		Put(c, h.Seq(), h.Ack(), h.Len(), h.SPort(), h.DPort(), h.Flags(), h.Credit())
		copy(c[26:30], b[26:30]) // padding, which we neither send nor look at
		copy(Header(c).Ext(), h.Ext())
		if Header(c).Seal(); !bytes.Equal(b, c) {
			t.Fatalf("%x encodes to %x", b, c)
		}
	})
}

func FuzzExt(f *testing.F) {
	f.Add(wiretest.Hex("03112233440000001000000000000000"), uint8(2))
	f.Add(wiretest.Hex("05000106010203040000000000000000"), uint8(5))
	f.Add(wiretest.Hex("0904"), uint8(9))
	f.Fuzz(func(t *testing.T, area []byte, add uint8) {
		b := make([]byte, HeaderLen)
		h := Header(b)
		copy(h.Ext(), area)
		walk := func() (n, bytes int, clean bool) {
			for a := h.Ext(); ; n++ {
				typ, data, rest, err := NextExt(a)
				if typ == ExtNone {
					return n, bytes, err == nil
				}
				if len(data) != ExtLen(typ) || len(a) != 1+len(data)+len(rest) {
					t.Fatalf("%v of %x: data %x, rest %x", typ, a, data, rest)
				}
				bytes += 1 + len(data)
				a = rest
			}
		}
		n, used, clean := walk()
		if used > 16 || n > 16 {
			t.Fatalf("%d entries in %d bytes", n, used)
		}
		h.FindExt(ExtType(add))
		size := max(ExtLen(ExtType(add)), 0)
		err := h.AddExt(ExtType(add), make([]byte, size))
		n2, used2, clean2 := walk()
		if err == nil && (!clean || !clean2 || n2 != n+1 || used2 != used+1+size || used2 >= 16) {
			t.Fatalf("%x: entry %d added: %d entries in %d bytes, was %d in %d", h.Ext(), add, n2, used2, n, used)
		}
		if err != nil && (n2 != n || used2 != used || clean2 != clean) {
			t.Fatalf("%x: entry %d refused (%v), but the list changed", h.Ext(), add, err)
		}
	})
}

func FuzzConnPriv(f *testing.F) {
	f.Add(wiretest.Hex("0a4d00020a4d000103010003000000000000000000000000000000000000000000"), false)
	f.Add(make([]byte, PrivLen6), true)
	f.Fuzz(func(t *testing.T, b []byte, v6 bool) {
		var p, q ConnPriv
		if err := p.Decode(b, v6); err != nil {
			if len(b) >= PrivLen(v6) {
				t.Fatalf("%d bytes: %v", len(b), err)
			}
			return
		}
		Negotiate(p.Major, p.Minor, p.Mask)
		c := make([]byte, PrivLen6)
		n := p.Encode(c)
		if v6 && n == PrivLen4 {
			return // both addresses were mapped IPv4
		}
		if err := q.Decode(c[:n], v6); err != nil || p != q {
			t.Fatalf("%+v encodes to %+v, %v", p, q, err)
		}
	})
}

func FuzzMark(f *testing.F) {
	m := Mark{1, 61440, 1 << 20, FlagDeltas, 7}
	b := make([]byte, 196)
	m.Put(b)
	f.Add(bytes.Clone(b[:MarkLen]), false)
	clear(b)
	m.PutREP(b, true)
	f.Add(bytes.Clone(b), true)
	clear(b)
	m.PutREQ(b, false)
	f.Add(bytes.Clone(b), false)
	f.Fuzz(func(t *testing.T, b []byte, v6 bool) {
		var m, n Mark
		check := func(what string) {
			c := make([]byte, MarkLen)
			m.Put(c)
			if !n.ParseSend(c) || n != m || m.Incarnation == 0 {
				t.Fatalf("%s: %+v encodes to %+v", what, m, n)
			}
		}
		if m.ParseSend(b) {
			if check("SEND"); len(b) != MarkLen {
				t.Fatal("a SEND of another length")
			}
		}
		if m.Parse(b) {
			check("Parse")
		}
		if _, whole := m.ParseREQ(b, v6); whole {
			check("REQ")
		}
		if m.ParseREP(b, v6) {
			check("REP")
		}
	})
}

func TestCongDelta(t *testing.T) {
	var b [64]byte
	n := PutCongDelta(b[:], []uint16{4000, 65535}, []uint16{1, 2, 3})
	d := CongDelta(b[:n])
	if want := wiretest.Hex("0002 0fa0 ffff 0001 0002 0003"); !bytes.Equal(d, want) || n != CongDeltaLen(5) {
		t.Errorf("%x, want %x", d, want)
	}
	if !d.Valid() || d.Len() != 5 {
		t.Errorf("valid %v, %d ports", d.Valid(), d.Len())
	}
	for i, want := range []uint16{4000, 65535, 1, 2, 3} {
		if p, on := d.At(i); p != want || on != (i < 2) {
			t.Errorf("entry %d: port %d, %v", i, p, on)
		}
	}
	for _, bad := range []CongDelta{nil, d[:1], d[:3], d[:4], make(CongDelta, CongDeltaLen(MaxCongDelta)+2)} {
		if bad.Valid() {
			t.Errorf("%d bytes are valid", len(bad))
		}
	}
	if ok := CongDelta(make([]byte, CongDeltaLen(MaxCongDelta))); !ok.Valid() || !(CongDelta{0, 0}).Valid() {
		t.Error("the longest, or the shortest, is not valid")
	}
}

func FuzzCongDelta(f *testing.F) {
	f.Add([]byte{0, 1, 0, 5, 0, 6})
	f.Add([]byte{0, 9, 0, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		d := CongDelta(b)
		if !d.Valid() {
			return
		}
		var set, cleared []uint16
		for i := range d.Len() {
			if p, on := d.At(i); on {
				set = append(set, p)
			} else {
				cleared = append(cleared, p)
			}
		}
		c := make([]byte, len(b))
		if n := PutCongDelta(c, set, cleared); n != len(b) || !bytes.Equal(b, c) {
			t.Fatalf("%x encodes to %x", b, c)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	buf := make([]byte, HeaderLen)
	b.ReportAllocs()
	for i := range b.N {
		Put(buf, uint64(i), uint64(i)-3, 64, 4001, 4002, 0, 0)
	}
}

func BenchmarkSetAck(b *testing.B) {
	buf := make([]byte, HeaderLen)
	Put(buf, 1, 2, 64, 4001, 4002, 0, 0)
	for i := range b.N {
		Header(buf).SetAck(uint64(i))
	}
}

func BenchmarkValid(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	bufs := make([][]byte, 64)
	for i := range bufs {
		bufs[i] = make([]byte, HeaderLen)
		Put(bufs[i], r.Uint64(), r.Uint64(), 64, 4001, 4002, 0, 0)
	}
	b.ReportAllocs()
	for i := range b.N {
		if !Valid(bufs[i&63]) {
			b.Fatal("not valid")
		}
	}
}
