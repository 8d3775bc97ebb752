package verbstest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/openrds/openrds/verbs"
)

const (
	grhBytes = 40
	testQKey = 0x01234567
)

func udCases() []testcase {
	cases := []testcase{
		{"ManyToOne", udManyToOne},
		{"ReplyToSource", udReply},
		{"QKeyMismatchDropped", udQKey},
		{"NoReceiveDropped", udNoReceive},
		{"TooLongForBuffer", udTooLong},
		{"TooLongToSend", udTooLongToSend},
		{"OnlySendsAllowed", udOpcodes},
		{"LocalErrorEntersSQE", udSQE},
		{"FlushInErr", udFlush},
	}
	for _, s := range sizes[:4] {
		for _, op := range []verbs.SendOpcode{verbs.OpSend, verbs.OpSendWithImm} {
			cases = append(cases, testcase{fmt.Sprintf("%v/%s", op, s.name), func(l *lab) { udMove(l, op, s.bytes(l.mtu().Bytes())) }})
		}
	}
	return cases
}

// udEnd is a UD QP in RTS with the test's Q_Key.
func (l *lab) udEnd(n *node, change func(*verbs.QPConfig)) *end {
	l.Helper()
	cfg := n.qpConfig(verbs.UD)
	if change != nil {
		change(&cfg)
	}
	e := n.newEnd(cfg)
	e.udTo(verbs.StateInit)
	e.udTo(verbs.StateRTR)
	e.udTo(verbs.StateRTS)
	return e
}

func (e *end) udTo(s verbs.QPState) {
	e.l.Helper()
	mask := map[verbs.QPState]verbs.QPAttrMask{verbs.StateInit: udInitMask, verbs.StateRTR: udRTRMask, verbs.StateRTS: udRTSMask}[s]
	e.l.must(fmt.Sprintf("UD QP of %s to %v", e.name, s), e.qp.Modify(verbs.QPAttr{State: s, Port: 1, QKey: testQKey, SQPSN: 0xfffffe}, mask))
}

// udWR is a signaled datagram to another UD QP.
func udWR(to *end, id uint64, sgs []verbs.SGE) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: sgs,
		AH: &verbs.AH{Remote: to.dev.Addr()}, RemoteQPN: to.qp.Num(), RemoteQKey: testQKey}
}

// wantUD expects a datagram of n bytes (without the network header) from another QP.
func (e *end) wantUD(what string, id uint64, n int, from *end) {
	e.l.Helper()
	wc := e.wantWC(what, e.rcq, verbs.WC{ID: id, Opcode: verbs.WCRecv, Flags: verbs.WCWithGRH, ByteLen: uint32(grhBytes + n)})
	if wc.SrcQPN != from.qp.Num() {
		e.l.Fatalf("%s: the completion names the sender's QP: got %d, want %d", what, wc.SrcQPN, from.qp.Num())
	}
}

func udMove(l *lab, op verbs.SendOpcode, size int) {
	if l.env.Lossy {
		l.Skip("the network loses datagrams")
	}
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	src, dst := l.a.region(size+64, 0), l.b.region(size+128, verbs.AccessLocalWrite)
	data := l.nextPattern(size)
	out := src.pieces(3, size, 1, 333)
	out.put(src.mem, data)
	in := dst.pieces(1, grhBytes+size, 39, 2) // the network header ends inside the second element
	b.recv(verbs.RecvWR{ID: 20, SGs: in.sgs})
	wr := udWR(b, 10, out.sgs)
	wr.Opcode, wr.Imm = op, testImm
	wr.Flags |= verbs.SendSolicited
	a.send(wr)
	a.wantSent("the datagram is sent", 10, verbs.WCSend)
	want := verbs.WC{ID: 20, Opcode: verbs.WCRecv, Flags: verbs.WCWithGRH | verbs.WCSolicited, ByteLen: uint32(grhBytes + size)}
	if op == verbs.OpSendWithImm {
		want.Flags |= verbs.WCWithImm
		want.Imm = testImm
	}
	wc := b.wantWC("it arrives", b.rcq, want)
	if wc.SrcQPN != a.qp.Num() {
		l.Fatalf("the completion names the sender's QP: got %d, want %d", wc.SrcQPN, a.qp.Num())
	}
	var got []byte
	for i, off := range in.offs {
		got = append(got, dst.mem[off:off+in.lens[i]]...)
	}
	l.wantBytes("the payload follows 40 bytes of network header", got[grhBytes:], data)
	l.checkGRH(got[:grhBytes], l.a.dev.Addr(), l.b.dev.Addr(), udPayload(size, op))
}

// udPayload is the UDP payload of a datagram: BTH, DETH, immediate, padded payload, ICRC.
func udPayload(size int, op verbs.SendOpcode) int {
	n := 12 + 8 + (size+3)&^3 + 4
	if op == verbs.OpSendWithImm {
		n += 4
	}
	return n
}

// checkGRH checks what a consumer looks at in the 40 bytes (rocev2 spec 5.6): the kind of header,
// whose IPv4 checksum must be right, its length, and the addresses.
func (l *lab) checkGRH(grh []byte, src, dst netip.Addr, payload int) {
	l.Helper()
	if src.Is4() {
		h := grh[20:]
		sum := uint32(0)
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(h[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		s, d := src.As4(), dst.As4()
		switch {
		case !slices.Equal(grh[:20], make([]byte, 20)):
			l.Fatalf("20 zero bytes precede the IPv4 header: % x", grh[:20])
		case h[0] != 0x45 || h[9] != 17 || sum != 0xffff:
			l.Fatalf("the IPv4 header is one of UDP with a right checksum: % x", h)
		case int(binary.BigEndian.Uint16(h[2:])) != 20+8+payload:
			l.Fatalf("its length is %d, want %d", binary.BigEndian.Uint16(h[2:]), 28+payload)
		case !slices.Equal(h[12:16], s[:]) || !slices.Equal(h[16:], d[:]):
			l.Fatalf("its addresses are %v and %v: % x", src, dst, h[12:])
		}
		return
	}
	s, d := src.As16(), dst.As16()
	switch {
	case grh[0]>>4 != 6 || grh[6] != 17:
		l.Fatalf("the header is one of UDP over IPv6: % x", grh)
	case int(binary.BigEndian.Uint16(grh[4:])) != 8+payload:
		l.Fatalf("its length is %d, want %d", binary.BigEndian.Uint16(grh[4:]), 8+payload)
	case !slices.Equal(grh[8:24], s[:]) || !slices.Equal(grh[24:], d[:]):
		l.Fatalf("its addresses are %v and %v: % x", src, dst, grh[8:])
	}
}

func udManyToOne(l *lab) {
	if l.env.Lossy {
		l.Skip("the network loses datagrams")
	}
	b := l.udEnd(l.b, nil)
	r := l.b.region(64*64, verbs.AccessLocalWrite)
	for i := range 60 {
		b.recv(verbs.RecvWR{ID: uint64(i), SGs: r.sg(64*i, 64)})
	}
	// Two QPs of A and one of B's own device.
	from := []*end{l.udEnd(l.a, nil), l.udEnd(l.a, nil), l.udEnd(l.b, nil)}
	src := []*region{l.a.region(20, 0), l.a.region(20, 0), l.b.region(20, 0)}
	for i := range 60 {
		k := i % 3
		src[k].mem[i/3] = byte(i)
		from[k].send(udWR(b, uint64(i), src[k].sg(i/3, 1)))
		from[k].wantSent("the datagram is sent", uint64(i), verbs.WCSend)
		b.wantUD("it arrives from where it came", uint64(i), 1, from[k])
		if got := r.mem[64*i+grhBytes]; got != byte(i) {
			l.Fatalf("datagram %d holds %d", i, got)
		}
	}
}

func udReply(l *lab) {
	if l.env.Lossy {
		l.Skip("the network loses datagrams")
	}
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	ra, rb := l.a.region(64, verbs.AccessLocalWrite), l.b.region(64, verbs.AccessLocalWrite)
	a.recv(verbs.RecvWR{ID: 1, SGs: ra.sg(0, 64)})
	b.recv(verbs.RecvWR{ID: 2, SGs: rb.sg(0, 64)})
	a.send(udWR(b, 3, nil))
	wc := b.nextWC("the question", b.rcq)
	src := netip.AddrFrom16([16]byte(rb.mem[8:24]))
	if l.a.dev.Addr().Is4() {
		src = netip.AddrFrom4([4]byte(rb.mem[32:36]))
	}
	b.send(verbs.SendWR{ID: 4, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, AH: &verbs.AH{Remote: src}, RemoteQPN: wc.SrcQPN, RemoteQKey: testQKey})
	a.wantUD("what the completion and the header say is enough to answer", 1, 0, b)
}

func udQKey(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	r := l.b.region(64, verbs.AccessLocalWrite)
	b.recv(verbs.RecvWR{ID: 20, SGs: r.sg(0, 64)})
	bad := udWR(b, 1, nil)
	bad.RemoteQKey++
	a.send(bad)
	a.wantSent("the sender does not learn", 1, verbs.WCSend)
	b.wantQuiet("a datagram with another Q_Key is dropped")
	l.udStillWorks(a, b, 20)
}

// udStillWorks sends a datagram that b must get in receive id.
func (l *lab) udStillWorks(a, b *end, id uint64) {
	l.Helper()
	if s := b.qp.State(); s != verbs.StateRTS {
		l.Fatalf("the receiver's QP stays in RTS: it is in %v", s)
	}
	if l.env.Lossy {
		return
	}
	a.send(udWR(b, 99, nil))
	a.wantSent("the next datagram is sent", 99, verbs.WCSend)
	b.wantUD("the next datagram arrives", id, 0, a)
}

func udNoReceive(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	for i := range uint64(3) {
		a.send(udWR(b, i, nil))
		a.wantSent("the sender does not learn", i, verbs.WCSend)
	}
	b.wantQuiet("datagrams without a receive are dropped")
	r := l.b.region(64, verbs.AccessLocalWrite)
	b.recv(verbs.RecvWR{ID: 20, SGs: r.sg(0, 64)})
	b.wantQuiet("for good")
	l.udStillWorks(a, b, 20)
}

// udTooLong: a datagram longer than the buffer is dropped; that the receive it would have taken
// completes with LOC_LEN_ERR is permitted (rocev2 spec 5.6). The QP lives on.
func udTooLong(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	r, other := l.b.region(64, verbs.AccessLocalWrite), l.b.region(64, verbs.AccessLocalWrite)
	b.recv(verbs.RecvWR{ID: 20, SGs: r.sg(0, grhBytes+9)}, verbs.RecvWR{ID: 21, SGs: other.sg(0, 64)})
	before := slices.Clone(r.mem)
	a.send(udWR(b, 1, l.a.region(10, 0).sg(0, 10)))
	a.wantSent("the sender does not learn", 1, verbs.WCSend)
	l.settle()
	var wc [1]verbs.WC
	next := uint64(20)
	if b.rcq.Poll(wc[:]) == 1 {
		if wc[0].ID != 20 || wc[0].Status != verbs.WCLocLenErr {
			l.Fatalf("a datagram that is too long completes its receive with LOC_LEN_ERR or not at all: %+v", wc[0])
		}
		next = 21
	}
	l.wantBytes("nothing is written past the buffer", r.mem[grhBytes+9:], before[grhBytes+9:])
	l.udStillWorks(a, b, next)
}

func udTooLongToSend(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	n := l.a.dev.Attr().ActiveMTU.Bytes() + 1
	src := l.a.region(n, 0)
	took, err := a.qp.PostSend([]verbs.SendWR{udWR(b, 1, nil), udWR(b, 2, src.sg(0, n)), udWR(b, 3, nil)})
	if took != 1 {
		l.Fatalf("a datagram over the MTU stops the batch: took %d, want 1", took)
	}
	l.wantErr("a datagram over the MTU", err, verbs.ErrInvalid)
	a.wantSent("the one before it is sent", 1, verbs.WCSend)
	a.wantQuiet("nothing else is")
}

func udOpcodes(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	for op := verbs.OpSendWithInv; op <= verbs.OpFetchAdd; op++ {
		wr := udWR(b, 1, nil)
		wr.Opcode = op
		n, err := a.qp.PostSend([]verbs.SendWR{wr})
		if n != 0 {
			l.Fatalf("UD took a %v", op)
		}
		if !l.a.lacks(op) {
			l.wantErr(fmt.Sprintf("a %v on UD", op), err, verbs.ErrInvalid)
		}
	}
	wr := udWR(b, 1, nil)
	wr.AH = nil
	_, err := a.qp.PostSend([]verbs.SendWR{wr})
	l.wantErr("a datagram to nowhere", err, verbs.ErrInvalid)
	wr.AH = &verbs.AH{}
	_, err = a.qp.PostSend([]verbs.SendWR{wr})
	l.wantErr("a datagram to no address", err, verbs.ErrInvalid)
}

// udSQE: a local error of a datagram ends sending until the user says otherwise; receiving goes on.
func udSQE(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	ra, rb := l.a.region(64, verbs.AccessLocalWrite), l.b.region(64, verbs.AccessLocalWrite)
	a.recv(verbs.RecvWR{ID: 30, SGs: ra.sg(0, 64)})
	b.recv(verbs.RecvWR{ID: 40, SGs: rb.sg(0, 64)})
	bad := udWR(b, 1, []verbs.SGE{{Addr: ra.addr(0), Length: 1, LKey: ra.mr.LKey() ^ 1}})
	bad.Flags = 0
	behind := udWR(b, 2, nil)
	behind.Flags = 0
	a.send(bad, behind, udWR(b, 3, nil))
	a.wantSendStatus("a bad key fails the datagram", verbs.WCLocProtErr, 1)
	a.wantSendStatus("those behind it flush", verbs.WCFlushErr, 2, 3)
	a.wantState("the QP may send no more", verbs.StateSQE)
	a.send(udWR(b, 4, nil))
	a.wantSendStatus("what is posted in SQE flushes", verbs.WCFlushErr, 4)
	b.wantQuiet("nothing was sent")
	if !l.env.Lossy {
		b.send(udWR(a, 5, nil))
		a.wantUD("receiving goes on in SQE", 30, 0, b)
	}
	l.must("SQE to RTS", a.qp.Modify(verbs.QPAttr{State: verbs.StateRTS}, verbs.QPStateBit))
	l.udStillWorks(a, b, 40)
}

func udFlush(l *lab) {
	a, b := l.udEnd(l.a, nil), l.udEnd(l.b, nil)
	r := l.b.region(64, verbs.AccessLocalWrite)
	b.recv(verbs.RecvWR{ID: 1, SGs: r.sg(0, 64)}, verbs.RecvWR{ID: 2})
	b.to(verbs.StateErr)
	b.wantRecvStatus("receives flush", verbs.WCFlushErr, 1, 2)
	b.recv(verbs.RecvWR{ID: 3})
	b.wantRecvStatus("what is posted in ERR flushes", verbs.WCFlushErr, 3)
	b.send(udWR(a, 4, nil))
	b.wantSendStatus("what is posted in ERR flushes", verbs.WCFlushErr, 4)
	a.send(udWR(b, 5, nil))
	a.wantSent("the other side does not notice", 5, verbs.WCSend)
	b.wantQuiet("nothing is received in ERR")
}
