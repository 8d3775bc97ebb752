package verbstest

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/openrds/openrds/verbs"
)

// sizes are message sizes around the edges of segmentation (rocev2 spec 11, item 3).
var sizes = []struct {
	name  string
	bytes func(pmtu int) int
}{
	{"0", func(int) int { return 0 }},
	{"1", func(int) int { return 1 }},
	{"PMTU-1", func(m int) int { return m - 1 }},
	{"PMTU", func(m int) int { return m }},
	{"PMTU+1", func(m int) int { return m + 1 }},
	{"3PMTU+5", func(m int) int { return 3*m + 5 }},
	{"1MiB", func(int) int { return 1 << 20 }},
}

const testImm = 0x01a2b3c4

func opcodeCases() (cases []testcase) {
	ops := []struct {
		op  verbs.SendOpcode
		run func(p *pair, op verbs.SendOpcode, size int)
	}{
		{verbs.OpSend, moveSend},
		{verbs.OpSendWithImm, moveSend},
		{verbs.OpWrite, moveWrite},
		{verbs.OpWriteWithImm, moveWrite},
		{verbs.OpRead, moveRead},
	}
	for _, o := range ops {
		for _, s := range sizes {
			cases = append(cases, testcase{fmt.Sprintf("%v/%s", o.op, s.name), func(l *lab) {
				p := l.pair()
				o.run(p, o.op, s.bytes(p.mtu.Bytes()))
			}})
		}
	}
	for m := verbs.MTU256; m <= verbs.MTU4096; m++ {
		cases = append(cases, testcase{fmt.Sprintf("AllAtMTU%v", m), func(l *lab) {
			if m > l.mtu() {
				l.Skipf("the devices' path MTU is %v", l.mtu())
			}
			p := l.pair(func(k *link) { k.mtu = m })
			for _, o := range ops {
				for _, s := range sizes[:6] {
					o.run(p, o.op, s.bytes(m.Bytes()))
				}
			}
		}})
	}
	return append(cases,
		testcase{"SEND_WITH_INV/OfRegion", sendWithInvalidate},
		testcase{"FETCH_ADD", fetchAdd},
		testcase{"CMP_SWAP", compareSwap},
		testcase{"LoopbackWithinDevice", loopback},
		testcase{"PSNWrap", psnWrap},
		testcase{"ZeroLengthIgnoresKeys", zeroLengthKeys},
	)
}

// moveSend sends size bytes from an odd gather list on A to an odd scatter list on B.
func moveSend(p *pair, op verbs.SendOpcode, size int) {
	p.l.Helper()
	src, dst := p.a.region(size+64, 0), p.b.region(size+64, verbs.AccessLocalWrite)
	data := p.l.nextPattern(size)
	out := src.pieces(3, size, 1, 1021)
	in := dst.pieces(1, size, 7, 258)
	out.put(src.mem, data)
	want := slices.Clone(dst.mem)
	in.put(want, data)

	p.b.recv(verbs.RecvWR{ID: 20, SGs: in.sgs})
	wr := sendWR(10, out.sgs)
	wr.Opcode, wr.Imm = op, testImm
	p.a.send(wr)
	wc := verbs.WC{ID: 20, Opcode: verbs.WCRecv, ByteLen: uint32(size)}
	if op == verbs.OpSendWithImm {
		wc.Flags, wc.Imm = verbs.WCWithImm, testImm
	}
	p.b.wantWC("the receive completes with the sender's length", p.b.rcq, wc)
	p.l.wantBytes("the receive buffer holds the message and nothing around it is touched", dst.mem, want)
	p.a.wantSent("the send completes", 10, verbs.WCSend)
}

// moveWrite writes size bytes from an odd gather list on A to an odd place on B.
func moveWrite(p *pair, op verbs.SendOpcode, size int) {
	p.l.Helper()
	src, dst := p.a.region(size+64, 0), p.b.region(size+64, verbs.AccessLocalWrite|verbs.AccessRemoteWrite)
	data := p.l.nextPattern(size)
	out := src.pieces(2, size, 3, 509)
	out.put(src.mem, data)
	want := slices.Clone(dst.mem)
	copy(want[13:], data)

	wr := remoteWR(10, op, out.sgs, dst, 13)
	wr.Imm = testImm
	if op == verbs.OpWriteWithImm {
		p.b.recvEmpty(20)
	}
	p.l.publish()
	p.a.send(wr)
	p.a.wantSent("the write completes", 10, verbs.WCWrite)
	if op == verbs.OpWriteWithImm {
		p.b.wantWC("the immediate consumes a receive, which tells the length written", p.b.rcq,
			verbs.WC{ID: 20, Opcode: verbs.WCRecvWriteWithImm, Flags: verbs.WCWithImm, Imm: testImm, ByteLen: uint32(size)})
	}
	p.fence()
	p.l.wantBytes("the target holds the data and nothing around it is touched", dst.mem, want)
}

// moveRead reads size bytes from an odd place on B into an odd scatter list on A.
func moveRead(p *pair, op verbs.SendOpcode, size int) {
	p.l.Helper()
	src, dst := p.b.region(size+64, verbs.AccessRemoteRead), p.a.region(size+64, verbs.AccessLocalWrite)
	data := p.l.nextPattern(size)
	copy(src.mem[11:], data)
	in := dst.pieces(1, size, 5, 300)
	want := slices.Clone(dst.mem)
	in.put(want, data)

	p.l.publish()
	p.a.send(remoteWR(10, op, in.sgs, src, 11))
	p.a.wantRead("the read completes with its length", 10, size)
	p.l.wantBytes("the sink holds the data and nothing around it is touched", dst.mem, want)
}

// fence makes what A did to B's memory visible to this goroutine: A tells B, B's completion is polled.
func (p *pair) fence() {
	p.l.Helper()
	p.b.recvEmpty(1 << 40)
	wr := sendWR(1<<40, nil)
	p.a.send(wr)
	p.b.wantRecvd("an empty SEND behind it arrives", 1<<40, 0)
	p.a.wantSent("an empty SEND behind it completes", 1<<40, verbs.WCSend)
}

// sendWithInvalidate: a region made by RegMR is never invalidated from afar (rocev2 spec 6.3). The
// receiver's request fails and its QP errs; whether the sender is told is not defined (4.6).
func sendWithInvalidate(l *lab) {
	p := l.pair(func(k *link) { k.retry = 1 })
	r := l.b.region(64, allAccess)
	p.b.recvEmpty(20, 21)
	wr := sendWR(10, nil)
	wr.Opcode, wr.InvalidateRKey = verbs.OpSendWithInv, r.mr.RKey()
	p.a.send(wr)

	wc := p.b.nextWC("the receive completes", p.b.rcq)
	if wc.ID != 20 || wc.Status == verbs.WCSuccess || wc.Status == verbs.WCFlushErr {
		l.Fatalf("the receive fails with an error of its own: request %d, %v", wc.ID, wc.Status)
	}
	p.b.wantRecvStatus("the rest flushes", verbs.WCFlushErr, 21)
	p.b.wantState("the receiver's QP", verbs.StateErr)
	if wc := p.a.nextWC("the sender's request completes", p.a.scq); wc.ID != 10 {
		l.Fatalf("the sender's request completes: got request %d", wc.ID)
	}

	q := l.pair()
	q.a.send(remoteWR(11, verbs.OpRead, newSink(q.a), r, 0))
	q.a.wantRead("the region's key is still good", 11, 8)
}

// newSink is a fresh 8-byte sink.
func newSink(e *end) []verbs.SGE {
	e.l.Helper()
	return e.region(8, verbs.AccessLocalWrite).sg(0, 8)
}

func getWord(b []byte) uint64    { return binary.NativeEndian.Uint64(b) }
func putWord(b []byte, v uint64) { binary.NativeEndian.PutUint64(b, v) }

func fetchAdd(l *lab) {
	p := l.pair()
	target, result := l.b.region(64, allAccess), l.a.region(64, verbs.AccessLocalWrite)
	want := slices.Clone(target.mem)
	const start = 0xffff_fffe_1234_5678
	putWord(target.mem[8:], start)
	putWord(want[8:], start)
	v := uint64(start)
	l.publish()
	for i, add := range []uint64{1, 0, 0x1_0000_0000, 1 << 63, ^uint64(0)} {
		wr := remoteWR(uint64(i), verbs.OpFetchAdd, result.sg(16, 8), target, 8)
		wr.CompareAdd = add
		p.a.send(wr)
		p.a.wantSent("the fetch-and-add completes", uint64(i), verbs.WCFetchAdd)
		if got := getWord(result.mem[16:]); got != v {
			l.Fatalf("the result is the value before, in the host's order: got %#x, want %#x", got, v)
		}
		v += add
	}
	p.fence()
	putWord(want[8:], v)
	l.wantBytes("the word was added to modulo 2^64, nothing else was touched", target.mem, want)
}

func compareSwap(l *lab) {
	p := l.pair()
	target := l.b.region(16, allAccess)
	const start, swapped = 0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210
	putWord(target.mem, start)
	l.publish()
	result := l.a.region(64, verbs.AccessLocalWrite)
	// The result may be scattered.
	in := result.pieces(1, 8, 3)
	swap := func(id, compare, swap, want uint64) {
		l.Helper()
		wr := remoteWR(id, verbs.OpCompareSwap, in.sgs, target, 0)
		wr.CompareAdd, wr.Swap = compare, swap
		p.a.send(wr)
		p.a.wantSent("the compare-and-swap completes", id, verbs.WCCompareSwap)
		var b [8]byte
		n := 0
		for i, off := range in.offs {
			n += copy(b[n:], result.mem[off:off+in.lens[i]])
		}
		if got := getWord(b[:]); got != want {
			l.Fatalf("the result is the value before: got %#x, want %#x", got, want)
		}
	}
	swap(1, start+1, 1, start)
	swap(2, start, swapped, start)
	swap(3, start, 2, swapped)
	p.fence()
	if got := getWord(target.mem); got != swapped {
		l.Fatalf("only the swap whose operand matched was done: got %#x, want %#x", got, uint64(swapped))
	}
}

// loopback connects two QPs of one device.
func loopback(l *lab) {
	k := l.link()
	k.mtu = l.a.dev.Attr().ActiveMTU
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.a.newEnd(k.cfgA), link: k}
	p.connect()
	for _, s := range sizes {
		n := s.bytes(k.mtu.Bytes())
		moveSend(p, verbs.OpSend, n)
		moveWrite(p, verbs.OpWrite, n)
		moveRead(p, verbs.OpRead, n)
	}
}

// psnWrap carries every opcode across the end of the 24-bit PSN space, in both directions.
func psnWrap(l *lab) {
	for back := uint32(1); back <= 5; back++ {
		p := l.pair(func(k *link) { k.psnAB, k.psnBA = 1<<24-back, 1<<24-back })
		n := 3*p.mtu.Bytes() + 5
		moveRead(p, verbs.OpRead, n)
		moveSend(p, verbs.OpSendWithImm, n)
		moveWrite(p, verbs.OpWrite, n)
		q := &pair{l: l, a: p.b, b: p.a, link: p.link}
		moveWrite(q, verbs.OpWriteWithImm, n)
		moveRead(q, verbs.OpRead, n)
		moveSend(q, verbs.OpSend, n)
	}
}

// zeroLengthKeys: keys of zero-length operations are not looked at, at either end (rocev2 spec 6.4).
func zeroLengthKeys(l *lab) {
	p := l.pair()
	bogus := []verbs.SGE{{Addr: 0xdead, Length: 0, LKey: 0xbad}}
	p.b.recv(verbs.RecvWR{ID: 20, SGs: bogus})
	p.a.send(
		verbs.SendWR{ID: 1, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, SGs: bogus, RemoteAddr: 0xdead, RKey: 0xbad},
		verbs.SendWR{ID: 2, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, RemoteAddr: 0xdead, RKey: 0xbad},
		sendWR(3, bogus),
	)
	p.a.wantSent("an empty WRITE to a bad key completes", 1, verbs.WCWrite)
	p.a.wantRead("an empty READ from a bad key completes", 2, 0)
	p.a.wantSent("an empty SEND from a bad key completes", 3, verbs.WCSend)
	p.b.wantRecvd("an empty SEND into a bad key completes", 20, 0)
}
