package cm

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/internal/wire/wiretest"
)

type message interface {
	Decode(mad []byte) error
	Encode(mad []byte)
}

func newMessage(a Attr) message {
	switch a {
	case AttrREQ:
		return new(REQ)
	case AttrMRA:
		return new(MRA)
	case AttrREJ:
		return new(REJ)
	case AttrREP:
		return new(REP)
	case AttrRTU:
		return new(RTU)
	case AttrDREQ:
		return new(DREQ)
	case AttrDREP:
		return new(DREP)
	case AttrSIDRREQ:
		return new(SIDRREQ)
	case AttrSIDRREP:
		return new(SIDRREP)
	case AttrLAP:
		return new(LAP)
	case AttrAPR:
		return new(APR)
	}
	return nil
}

var attrs = []Attr{AttrREQ, AttrMRA, AttrREJ, AttrREP, AttrRTU, AttrDREQ, AttrDREP, AttrSIDRREQ, AttrSIDRREP, AttrLAP, AttrAPR}

// vectorV5 is the packet of rocev2 spec 7.12 without its 48 bytes of zero and its ICRC.
var vectorV5 = wiretest.Hex(`
	45 00 01 34 00 00 40 00 40 11 25 b7 0a 00 00 01
	0a 00 00 02 d8 72 12 b7 01 20 00 00 64 00 ff ff
	00 00 00 01 00 00 00 00 80 01 00 00 00 00 00 01
	01 07 02 03 00 00 00 00 00 00 00 01 11 22 33 44
	00 10 00 00 00 00 00 00 11 22 33 44 00 00 00 00
	00 00 00 00 01 06 4e 51 02 00 5e 10 00 00 00 01
	00 00 00 00 00 00 00 00 00 0a bc 10 00 00 00 10
	00 00 00 a0 12 34 56 a7 ff ff 37 f0 ff ff ff ff
	00 00 00 00 00 00 00 00 00 00 ff ff 0a 00 00 01
	00 00 00 00 00 00 00 00 00 00 ff ff 0a 00 00 02
	11 b1 50 03 00 40 00 98 00 00 00 00 00 00 00 00
	00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
	00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
	00 00 00 00 00 40 8a bc 00 00 00 00 00 00 00 00
	00 00 00 00 0a 00 00 01 00 00 00 00 00 00 00 00
	00 00 00 00 0a 00 00 02 75 73 65 72 64 61 74 61`)

// reqV5 is the REQ that the text of rocev2 spec 7.12 describes.
func reqV5() *REQ {
	src, dst := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	m := &REQ{
		TID:                   0x111223344,
		LocalCommID:           0x11223344,
		ServiceID:             ServiceID(PortSpaceTCP, 20049),
		LocalCAGUID:           0x02005E1000000001,
		LocalQPN:              0xABC,
		ResponderResources:    16,
		InitiatorDepth:        16,
		RemoteResponseTimeout: 20,
		TransportType:         TransportRC,
		StartingPSN:           0x123456,
		LocalResponseTimeout:  20,
		RetryCount:            7,
		PKey:                  0xFFFF,
		PathMTU:               3,
		RNRRetryCount:         7,
		MaxCMRetries:          15,
		Primary: Path{
			LocalLID: 0xFFFF, RemoteLID: 0xFFFF, LocalGID: GIDOf(src), RemoteGID: GIDOf(dst),
			FlowLabel: 0x11B15, PacketRate: 3, HopLimit: 64, AckTimeout: 19,
		},
	}
	cma := CMAHeader{SrcPort: 0x8ABC, Src: src, Dst: dst}
	cma.Encode(m.PrivateData[:])
	copy(m.PrivateData[CMAHeaderLen:], "userdata")
	return m
}

func TestVectorV5(t *testing.T) {
	udp := append(bytes.Clone(vectorV5[28:]), make([]byte, 48+4)...)
	const u = 280
	if len(udp) != u {
		t.Fatalf("vector of %d bytes", len(udp))
	}
	copy(udp[u-4:], wiretest.Hex("eb df f7 24"))
	src, dst := netip.MustParseAddrPort("10.0.0.1:55410"), netip.MustParseAddrPort("10.0.0.2:4791")
	f := roce.NewFlow(src, dst)

	got := make([]byte, u)
	roce.PutBTH(got, roce.UDSendOnly, false, 0, false, 1, 0)
	got[1] = 0 // the vector has MigReq clear
	roce.PutDETH(got[roce.BTHLen:], roce.GSIQKey, 1)
	mad := got[roce.BTHLen+roce.DETHLen : u-roce.ICRCLen]
	reqV5().Encode(mad)
	roce.PutICRC(got[u-4:], f.ICRC(u, got[:u-4]))
	if !bytes.Equal(got, udp) {
		t.Errorf("V5 encodes to\n%x, want\n%x", got, udp)
	}

	if _, v := f.Check(udp, 0); v != roce.OK0 {
		t.Errorf("V5 is %v", v)
	}
	var m REQ
	if err := m.Decode(mad); err != nil {
		t.Fatal(err)
	}
	if m != *reqV5() {
		t.Errorf("V5 decodes to\n%+v, want\n%+v", m, *reqV5())
	}
	var h CMAHeader
	if err := h.Decode(m.PrivateData[:]); err != nil {
		t.Fatal(err)
	}
	if want := (CMAHeader{0x8ABC, src.Addr(), dst.Addr()}); h != want {
		t.Errorf("CMA header %+v, want %+v", h, want)
	}
	if space, port, ok := SplitServiceID(m.ServiceID); space != PortSpaceTCP || port != 20049 || !ok {
		t.Errorf("service ID %#x is %#x, %d, %v", m.ServiceID, space, port, ok)
	}
}

// TestCaptures decodes and encodes every MAD of real traffic.
func TestCaptures(t *testing.T) {
	seen := map[Attr]int{}
	for _, name := range []string{"rds-ib", "rxe-ops"} {
		for _, pk := range wiretest.Capture(t, name) {
			var p roce.Packet
			if pk.Dst.Port() != roce.Port || roce.Parse(pk.Payload, &p) != nil || p.Op != roce.UDSendOnly {
				continue
			}
			h, err := PeekHeader(p.Payload)
			if err != nil {
				t.Fatalf("%s packet %d: %v", name, pk.N, err)
			}
			seen[h.Attr]++
			m := newMessage(h.Attr)
			if m == nil {
				t.Fatalf("%s packet %d: %v", name, pk.N, h.Attr)
			}
			if err := m.Decode(p.Payload); err != nil {
				t.Fatalf("%s packet %d: %v: %v", name, pk.N, h.Attr, err)
			}
			again := bytes.Repeat([]byte{0xEE}, MADLen)
			m.Encode(again)
			if !bytes.Equal(again, p.Payload) {
				t.Errorf("%s packet %d: %v encodes to\n%x, was\n%x", name, pk.N, h.Attr, again, p.Payload)
			}
			if req, ok := m.(*REQ); ok {
				var cma CMAHeader
				if err := cma.Decode(req.PrivateData[:]); err != nil {
					t.Fatalf("%s packet %d: %v", name, pk.N, err)
				}
				if cma.Src != pk.Src.Addr() || cma.Dst != pk.Dst.Addr() || req.Primary.LocalGID.Addr() != pk.Src.Addr() ||
					req.Primary.RemoteGID.Addr() != pk.Dst.Addr() || req.HasAlternate() {
					t.Errorf("%s packet %d: REQ from %v to %v says %+v, %+v", name, pk.N, pk.Src, pk.Dst, cma, req.Primary)
				}
				b := make([]byte, CMAHeaderLen)
				cma.Encode(b)
				if !bytes.Equal(b, req.PrivateData[:CMAHeaderLen]) {
					t.Errorf("%s packet %d: CMA header encodes to %x", name, pk.N, b)
				}
			}
		}
	}
	for _, a := range []Attr{AttrREQ, AttrREP, AttrRTU, AttrDREQ, AttrDREP} {
		if seen[a] == 0 {
			t.Errorf("no %v in the captures", a)
		}
	}
	t.Log(seen)
}

// TestLayout sets one field at a time and looks for it at offset C of the specification's tables.
// (V5 and the captures place the fields of REQ that are in use.)
func TestLayout(t *testing.T) {
	gid := GID(wiretest.Hex("000102030405060708090a0b0c0d0e0f"))
	for _, tc := range []struct {
		what string
		m    message
		c    int
		want string
	}{
		{"REQ vendor ID", &REQ{VendorID: 0xFF010203}, 5, "010203"},
		{"REQ Q_Key", &REQ{LocalQKey: 0x01020304}, 28, "01020304"},
		{"REQ local EECN", &REQ{LocalEECN: 0x010203}, 36, "010203"},
		{"REQ remote EECN", &REQ{RemoteEECN: 0x010203}, 40, "010203"},
		{"REQ flow control", &REQ{FlowControl: true}, 43, "01"},
		{"REQ transport type", &REQ{TransportType: 7}, 43, "06"},
		{"REQ RDC exists", &REQ{RDCExists: true}, 50, "08"},
		{"REQ SRQ", &REQ{SRQ: true}, 51, "08"},
		{"REQ extended transport", &REQ{ExtendedTransport: 0xFF}, 51, "07"},
		{"REQ primary class", &REQ{Primary: Path{TrafficClass: 0x55}}, 92, "55"},
		{"REQ primary SL", &REQ{Primary: Path{SL: 0x15}}, 94, "50"},
		{"REQ primary subnet local", &REQ{Primary: Path{SubnetLocal: true}}, 94, "08"},
		{"REQ alternate local LID", &REQ{Alternate: Path{LocalLID: 0x0102}}, 96, "0102"},
		{"REQ alternate remote LID", &REQ{Alternate: Path{RemoteLID: 0x0102}}, 98, "0102"},
		{"REQ alternate local GID", &REQ{Alternate: Path{LocalGID: gid}}, 100, "000102030405060708090a0b0c0d0e0f"},
		{"REQ alternate remote GID", &REQ{Alternate: Path{RemoteGID: gid}}, 116, "000102030405060708090a0b0c0d0e0f"},
		{"REQ alternate flow label", &REQ{Alternate: Path{FlowLabel: 0xF12345}}, 132, "12345000"},
		{"REQ alternate rate", &REQ{Alternate: Path{PacketRate: 0xFF}}, 135, "3f"},
		{"REQ alternate class", &REQ{Alternate: Path{TrafficClass: 0x55}}, 136, "55"},
		{"REQ alternate hop limit", &REQ{Alternate: Path{HopLimit: 0x55}}, 137, "55"},
		{"REQ alternate SL", &REQ{Alternate: Path{SL: 0xF}}, 138, "f0"},
		{"REQ alternate ACK timeout", &REQ{Alternate: Path{AckTimeout: 0x1F}}, 139, "f8"},
		{"REQ SAP supported", &REQ{SAPSupported: true}, 139, "04"},

		{"REP Q_Key", &REP{LocalQKey: 0x01020304}, 8, "01020304"},
		{"REP vendor ID", &REP{VendorID: 0x010203}, 12, "000000 01 000000 02 000000 03"},
		{"REP EE context", &REP{LocalEECN: 0x010203}, 16, "010203"},
		{"REP target ACK delay", &REP{TargetAckDelay: 0x1F}, 26, "f8"},
		{"REP failover accepted", &REP{FailoverAccepted: 3}, 26, "06"},
		{"REP flow control", &REP{FlowControl: true}, 26, "01"},
		{"REP RNR retry", &REP{RNRRetryCount: 7}, 27, "e0"},
		{"REP SRQ", &REP{SRQ: true}, 27, "10"},
		{"REP GUID", &REP{LocalCAGUID: 0x0102030405060708}, 28, "0102030405060708"},

		{"MRA message", &MRA{Message: ForLAP}, 8, "8000"},
		{"MRA service timeout", &MRA{ServiceTimeout: 24}, 8, "00c0"},
		{"MRA private data", &MRA{PrivateData: [222]byte{1}}, 10, "01"},
		{"REJ message", &REJ{Message: ForREP}, 8, "4000"},
		{"REJ info length", &REJ{ARILen: 8}, 8, "0010"},
		{"REJ reason", &REJ{Reason: RejConsumer}, 10, "001c"},
		{"REJ info", &REJ{ARI: [72]byte{1, 71: 2}}, 12, "01" + strings.Repeat("00", 70) + "02"},
		{"REJ private data", &REJ{PrivateData: [148]byte{1, 147: 2}}, 84, "01" + strings.Repeat("00", 146) + "02"},
		{"RTU private data", &RTU{PrivateData: [224]byte{1}}, 8, "01"},
		{"DREQ remote QPN", &DREQ{RemoteQPN: 0x010203}, 8, "01020300"},
		{"DREQ private data", &DREQ{PrivateData: [220]byte{1}}, 12, "01"},
		{"DREP private data", &DREP{PrivateData: [224]byte{1}}, 8, "01"},

		{"SIDR_REQ", &SIDRREQ{RequestID: 0x01020304, PKey: 0x0506, ServiceID: 0x0708090A0B0C0D0E, PrivateData: [216]byte{0xF}}, 0,
			"01020304 0506 0000 0708090a0b0c0d0e 0f"},
		{"SIDR_REP", &SIDRREP{RequestID: 0x01020304, Status: SIDRNoQP, InfoLen: 5, VendorID: 0x060708, QPN: 0x090A0B, ServiceID: 0x1112131415161718, QKey: 0x191A1B1C, Info: [72]byte{0x1D}}, 0,
			"01020304 03 05 0607 090a0b 08 1112131415161718 191a1b1c 1d"},
		{"SIDR_REP private data", &SIDRREP{PrivateData: [136]byte{1}}, 96, "01"},
		{"LAP QPN", &LAP{RemoteQPN: 0x010203, RemoteResponseTimeout: 0x1F}, 12, "010203f8"},
		{"LAP path", &LAP{Alternate: Path{LocalLID: 0x0102, RemoteLID: 0x0304, LocalGID: gid, RemoteGID: gid, FlowLabel: 0x12345, TrafficClass: 6, HopLimit: 7, PacketRate: 8, SL: 9, SubnetLocal: true, AckTimeout: 10}}, 20,
			"0102 0304 000102030405060708090a0b0c0d0e0f 000102030405060708090a0b0c0d0e0f 123450 06 07 08 98 50"},
		{"LAP private data", &LAP{PrivateData: [168]byte{1}}, 64, "01"},
		{"APR", &APR{InfoLen: 1, Status: 2, Info: [72]byte{3}}, 8, "01 02 0000 03"},
		{"APR private data", &APR{PrivateData: [148]byte{1}}, 84, "01"},
	} {
		mad := bytes.Repeat([]byte{0xEE}, MADLen)
		tc.m.Encode(mad)
		c := mad[24:]
		want := make([]byte, len(c)) // nothing else is set
		copy(want[tc.c:], wiretest.Hex(tc.want))
		if !bytes.Equal(c, want) {
			t.Errorf("%s: message is\n%x, want\n%x", tc.what, c, want)
		}
	}
	// The communication IDs are in front everywhere.
	for _, m := range []message{
		&REP{LocalCommID: 0x01020304, RemoteCommID: 0x05060708}, &RTU{LocalCommID: 0x01020304, RemoteCommID: 0x05060708},
		&MRA{LocalCommID: 0x01020304, RemoteCommID: 0x05060708}, &REJ{LocalCommID: 0x01020304, RemoteCommID: 0x05060708},
		&DREQ{LocalCommID: 0x01020304, RemoteCommID: 0x05060708}, &DREP{LocalCommID: 0x01020304, RemoteCommID: 0x05060708},
		&LAP{LocalCommID: 0x01020304, RemoteCommID: 0x05060708}, &APR{LocalCommID: 0x01020304, RemoteCommID: 0x05060708},
	} {
		mad := make([]byte, MADLen)
		m.Encode(mad)
		if want := wiretest.Hex("01020304 05060708"); !bytes.Equal(mad[24:32], want) {
			t.Errorf("%T: communication IDs %x", m, mad[24:32])
		}
	}
}

// TestEveryBit decodes and encodes a MAD of ones: all bits come back but those that are reserved,
// so no field is forgotten and none overlaps another.
func TestEveryBit(t *testing.T) {
	reserved := map[Attr]map[int]byte{ // C: bits
		AttrREQ: {4: 0xFF, 24: 0xFF, 25: 0xFF, 26: 0xFF, 27: 0xFF, 90: 0x0F, 91: 0xC0, 94: 0x07, 95: 0x07,
			134: 0x0F, 135: 0xC0, 138: 0x07, 139: 0x03},
		AttrREP:     {27: 0x0F},
		AttrMRA:     {8: 0x3F, 9: 0x07},
		AttrREJ:     {8: 0x3F, 9: 0x01},
		AttrDREQ:    {11: 0xFF},
		AttrSIDRREQ: {6: 0xFF, 7: 0xFF},
		AttrLAP: {8: 0xFF, 9: 0xFF, 10: 0xFF, 11: 0xFF, 15: 0x07, 16: 0xFF, 17: 0xFF, 18: 0xFF, 19: 0xFF, 58: 0x0F,
			61: 0xC0, 62: 0x07, 63: 0x07},
		AttrAPR: {10: 0xFF, 11: 0xFF},
	}
	for _, a := range attrs {
		ones := make([]byte, MADLen)
		copy(create(ones, a, 0xFFFFFFFFFFFFFFFF, 0), bytes.Repeat([]byte{0xFF}, MADLen))
		want := bytes.Clone(ones)
		for c, bits := range reserved[a] {
			want[24+c] &^= bits
		}
		m := newMessage(a)
		if err := m.Decode(ones); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, MADLen)
		m.Encode(got)
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%v: C %d is %#02x, want %#02x", a, i-24, got[i], want[i])
			}
		}
	}
}

func TestPeekHeader(t *testing.T) {
	good := make([]byte, MADLen)
	reqV5().Encode(good)
	h, err := PeekHeader(good)
	if want := (Header{Attr: AttrREQ, TID: 0x111223344}); err != nil || h != want {
		t.Errorf("%+v, %v", h, err)
	}
	for _, tc := range []struct {
		what string
		edit func(b []byte) []byte
		want error
	}{
		{"empty", func([]byte) []byte { return nil }, ErrLength},
		{"short", func(b []byte) []byte { return b[:255] }, ErrLength},
		{"long", func(b []byte) []byte { return append(b, 0) }, ErrLength},
		{"base version 2", func(b []byte) []byte { b[0] = 2; return b }, ErrVersion},
		{"subnet administration", func(b []byte) []byte { b[1] = 3; return b }, ErrNotCM},
		{"class version 1", func(b []byte) []byte { b[2] = 1; return b }, ErrVersion},
		{"method Get", func(b []byte) []byte { b[3] = 1; return b }, ErrNotCM},
		{"a REP", func(b []byte) []byte { b[17] = 0x13; return b }, ErrAttr},
	} {
		var m REQ
		if err := m.Decode(tc.edit(bytes.Clone(good))); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.what, err, tc.want)
		}
	}
}

func TestCMAHeader(t *testing.T) {
	h := CMAHeader{SrcPort: 0x0102, Src: netip.MustParseAddr("fd00::1"), Dst: netip.MustParseAddr("fd00::2")}
	b := bytes.Repeat([]byte{0xEE}, CMAHeaderLen)
	h.Encode(b)
	want := wiretest.Hex("00600102 fd000000000000000000000000000001 fd000000000000000000000000000002")
	if !bytes.Equal(b, want) {
		t.Errorf("IPv6: %x", b)
	}
	var g CMAHeader
	if err := g.Decode(b); err != nil || g != h {
		t.Errorf("IPv6: %+v, %v", g, err)
	}
	mixed := CMAHeader{Src: netip.MustParseAddr("fd00::1"), Dst: netip.MustParseAddr("::ffff:10.0.0.2")}
	mixed.Encode(b)
	if err := g.Decode(b); err != nil || g != mixed {
		t.Errorf("mixed families: %+v, %v", g, err)
	}
	b[0] = 1
	if g.Decode(b) != ErrCMA {
		t.Error("version 1 is understood")
	}
	b[0], b[1] = 0, 0x50
	if g.Decode(b) != ErrCMA {
		t.Error("IP version 5 is understood")
	}
	if g.Decode(b[:CMAHeaderLen-1]) != ErrCMA {
		t.Error("35 bytes are understood")
	}
}

func TestREJInfo(t *testing.T) {
	var m REJ
	m.SetInfo([]byte{1, 2, 3})
	if !bytes.Equal(m.Info(), []byte{1, 2, 3}) {
		t.Errorf("info %x", m.Info())
	}
	m.SetInfo(make([]byte, 100))
	if len(m.Info()) != 72 {
		t.Errorf("info of %d bytes", len(m.Info()))
	}
	m.ARILen = 127 // a peer may say so
	if len(m.Info()) != 72 {
		t.Errorf("info of %d bytes", len(m.Info()))
	}
}

func TestTimers(t *testing.T) {
	for code, want := range map[uint8]time.Duration{0: 1, 8: 1, 9: 2, 18: 1024, 19: 2048, 20: 4096, 24: 65536, 31: 1 << 23, 32 + 9: 2} {
		if got := Timeout(code); got != want*time.Millisecond {
			t.Errorf("timeout code %d is %v, want %v ms", code, got, int64(want))
		}
	}
	// combine, as rocev2 spec 7.6 writes it.
	combine := func(d, l int) int {
		a := l + 1
		r := d
		if a >= d {
			if r = a; d >= a-1 {
				r++
			}
		} else if a >= d-1 {
			r++
		}
		return min(r, 31)
	}
	for d := range 32 {
		for l := range 32 {
			if got := AckTimeout(uint8(d), uint8(l)); int(got) != combine(d, l) {
				t.Errorf("delay %d, lifetime %d: %d, want %d", d, l, got, combine(d, l))
			}
		}
	}
	if AckTimeout(15, 18) != 19 {
		t.Error("rxe's 15 and 18 must give 19")
	}
}

func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for r := range Reason(40) {
		s := r.String()
		if known := r >= 1 && r <= 33 || r == 35; known == strings.HasPrefix(s, "reject reason ") {
			t.Errorf("reason %d is called %q", uint16(r), s)
		}
		if seen[s] {
			t.Errorf("two reasons are called %q", s)
		}
		seen[s] = true
	}
	if RejVendorOption != 35 || RejConsumer != 28 || RejInvalidServiceID != 8 || RejInvalidMTU != 26 {
		t.Error("reason codes are not the specification's")
	}
	if AttrREQ.String() != "REQ" || AttrAPR.String() != "APR" || Attr(0x1B).String() != "attribute 0x1b" {
		t.Error("attribute names")
	}
}

func TestGID(t *testing.T) {
	for _, s := range []string{"10.0.0.1", "fd00::1"} {
		a := netip.MustParseAddr(s)
		if got := GIDOf(a).Addr(); got != a {
			t.Errorf("%v comes back as %v", a, got)
		}
	}
	if GIDOf(netip.Addr{}) != (GID{}) {
		t.Error("no address is not the zero GID")
	}
}

func TestAllocs(t *testing.T) {
	mad := make([]byte, MADLen)
	var m REQ
	req := reqV5()
	if n := testing.AllocsPerRun(100, func() {
		req.Encode(mad)
		if m.Decode(mad) != nil {
			t.Fatal("V5")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzMAD(f *testing.F) {
	mad := make([]byte, MADLen)
	for _, a := range attrs {
		newMessage(a).Encode(mad)
		f.Add(bytes.Clone(mad))
	}
	reqV5().Encode(mad)
	f.Add(bytes.Clone(mad))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := PeekHeader(b)
		if err != nil {
			return
		}
		m := newMessage(h.Attr)
		if m == nil {
			return
		}
		if err := m.Decode(b); err != nil {
			t.Fatalf("%v: %v", h.Attr, err)
		}
		switch m := m.(type) {
		case *REQ:
			var c CMAHeader
			if c.Decode(m.PrivateData[:]) == nil {
				var again CMAHeader
				buf := make([]byte, CMAHeaderLen)
				// An IPv4-mapped address in the IPv6 form comes back as IPv4.
				if c.Encode(buf); again.Decode(buf) != nil || again.Dst.Unmap() != c.Dst.Unmap() || again.SrcPort != c.SrcPort {
					t.Fatalf("CMA header %+v encodes to %+v", c, again)
				}
			}
		case *REJ:
			m.Info()
		}
		again, n := make([]byte, MADLen), newMessage(h.Attr)
		m.Encode(again)
		if err := n.Decode(again); err != nil || !reflect.DeepEqual(m, n) {
			t.Fatalf("%+v encodes to %+v, %v", m, n, err)
		}
	})
}
