package verbstest

import (
	"fmt"

	"github.com/openrds/openrds/verbs"
)

func orderCases() []testcase {
	return []testcase{
		{"MixedOpcodesCompleteAsPosted", mixedOrder},
		{"BothDirectionsAtOnce", bothDirections},
		{"ReceivesAreTakenAsPosted", recvOrder},
		{"UnsignaledGivesNoCompletion", unsignaled},
		{"SignalAll", signalAll},
		{"UnsignaledSlotsComeBack", unsignaledSlots},
		{"FenceWaitsForRead", fenceWaits},
		{"ReadSeesEarlierWrite", readAfterWrite},
		{"SendTellsOfEarlierWrite", writeThenSend},
		{"MoreReadsThanDepth", manyReads},
		{"AtomicsInOrder", atomicsInOrder},
		{"PostedBeforePeerIsReady", peerNotReady},
	}
}

// mix posts n requests of all kinds and sizes on from and checks their completions, in order. The
// receives it needs at to have ids 0, 1, ...
type mix struct {
	from, to *end
	src, dst *region
	ops      []verbs.SendWR
	recvs    []verbs.WC
}

func newMix(p *pair, from, to *end, n int) *mix {
	p.l.Helper()
	const slot = 40000
	m := &mix{from: from, to: to, src: from.region(slot, allAccess), dst: to.region(slot, allAccess)}
	for i := range n {
		size := (i*i*7919 + i) % slot
		if i%3 == 0 {
			size %= 100
		}
		wr := remoteWR(uint64(i), verbs.OpSend, m.src.sg(0, size), m.dst, 0)
		wr.Imm = uint32(i)
		recv := verbs.WC{ID: uint64(len(m.recvs)), Opcode: verbs.WCRecv, ByteLen: uint32(size)}
		switch i % 7 {
		case 0:
			m.recvs = append(m.recvs, recv)
		case 1:
			wr.Opcode = verbs.OpWrite
		case 2:
			wr.Opcode = verbs.OpRead
		case 3:
			wr.Opcode = verbs.OpSendWithImm
			recv.Flags, recv.Imm = verbs.WCWithImm, wr.Imm
			m.recvs = append(m.recvs, recv)
		case 4:
			wr.Opcode, wr.SGs = verbs.OpFetchAdd, m.src.sg(0, 8)
		case 5:
			wr.Opcode = verbs.OpWriteWithImm
			recv.Opcode, recv.Flags, recv.Imm = verbs.WCRecvWriteWithImm, verbs.WCWithImm, wr.Imm
			m.recvs = append(m.recvs, recv)
		case 6:
			wr.Opcode, wr.SGs = verbs.OpCompareSwap, m.src.sg(8, 8)
		}
		m.ops = append(m.ops, wr)
	}
	for i := range m.recvs {
		to.recv(verbs.RecvWR{ID: uint64(i), SGs: m.dst.sg(0, slot)})
	}
	return m
}

func (m *mix) check(what string) {
	m.from.l.Helper()
	for i, wr := range m.ops {
		want := verbs.WC{ID: uint64(i)}
		switch wr.Opcode {
		case verbs.OpSend, verbs.OpSendWithImm:
			want.Opcode = verbs.WCSend
		case verbs.OpWrite, verbs.OpWriteWithImm:
			want.Opcode = verbs.WCWrite
		case verbs.OpRead:
			want.Opcode, want.ByteLen = verbs.WCRead, wr.SGs[0].Length
		case verbs.OpFetchAdd:
			want.Opcode = verbs.WCFetchAdd
		case verbs.OpCompareSwap:
			want.Opcode = verbs.WCCompareSwap
		}
		m.from.wantWC(what+": sends complete in posting order", m.from.scq, want)
	}
	for _, want := range m.recvs {
		m.to.wantWC(what+": receives complete in arrival order", m.to.rcq, want)
	}
}

func mixedOrder(l *lab) {
	p := l.pair()
	m := newMix(p, p.a, p.b, 63)
	p.a.send(m.ops...)
	m.check("A to B")
	p.a.wantQuiet("no completion is left")
	p.b.wantQuiet("no completion is left")
}

func bothDirections(l *lab) {
	p := l.pair()
	ab, ba := newMix(p, p.a, p.b, 50), newMix(p, p.b, p.a, 50)
	for i := range ab.ops {
		p.a.send(ab.ops[i])
		p.b.send(ba.ops[i])
	}
	ab.check("A to B")
	ba.check("B to A")
}

func recvOrder(l *lab) {
	p := l.pair()
	r := l.b.region(64*8, verbs.AccessLocalWrite)
	src := l.a.region(64, 0)
	copy(src.mem, l.nextPattern(64))
	for i := range 64 {
		p.b.recv(verbs.RecvWR{ID: uint64(100 + i), SGs: r.sg(8*i, 8)})
	}
	for i := range 64 {
		p.a.send(sendWR(uint64(i), src.sg(i, 1)))
	}
	for i := range 64 {
		p.b.wantRecvd("each SEND takes the oldest receive", uint64(100+i), 1)
		if r.mem[8*i] != src.mem[i] {
			l.Fatalf("each SEND takes the oldest receive: receive %d holds another message", i)
		}
		p.a.wantSent("each SEND completes", uint64(i), verbs.WCSend)
	}
}

func unsignaled(l *lab) {
	p := l.pair()
	src := l.a.region(5000, 0)
	for i := range 21 {
		p.b.recv(verbs.RecvWR{ID: uint64(i), SGs: l.b.region(5000, verbs.AccessLocalWrite).sg(0, 5000)})
	}
	for i := range 20 {
		wr := sendWR(uint64(i), src.sg(0, 250*i))
		wr.Flags = 0
		p.a.send(wr)
	}
	for i := range 20 {
		p.b.wantRecvd("unsignaled SENDs arrive", uint64(i), 250*i)
	}
	p.a.wantQuiet("unsignaled SENDs give no completion")
	p.a.send(sendWR(20, nil))
	p.a.wantSent("the signaled one does", 20, verbs.WCSend)
}

func signalAll(l *lab) {
	p := l.pair(func(k *link) { k.cfgA.SignalAll = true })
	p.b.recvEmpty(0)
	r := l.b.region(8, allAccess)
	send := verbs.SendWR{ID: 1, Opcode: verbs.OpSend}
	write := remoteWR(2, verbs.OpWrite, nil, r, 0)
	write.Flags = 0
	p.a.send(send, write)
	p.a.wantSent("SignalAll makes a SEND signaled", 1, verbs.WCSend)
	p.a.wantSent("SignalAll makes a WRITE signaled", 2, verbs.WCWrite)
}

// unsignaledSlots sends ten queues' worth of requests of which one in sixteen is signaled: polling it
// gives back the slots of those before it.
func unsignaledSlots(l *lab) {
	const depth, stride = 64, 16
	p := l.pair(func(k *link) { k.cfgA.MaxSendWR = depth })
	r := l.b.region(4096, allAccess)
	src := l.a.region(4096, 0)
	for i := range 10 * depth {
		wr := remoteWR(uint64(i), verbs.OpWrite, src.sg(0, i%4096), r, 0)
		if i%stride != stride-1 {
			wr.Flags = 0
		}
		p.a.send(wr)
		if i >= depth-1 && i%stride == stride-1 {
			p.a.wantSent("signaled requests complete in order", uint64(i-depth+stride), verbs.WCWrite)
		}
	}
	for i := 10*depth - depth + 2*stride - 1; i < 10*depth; i += stride {
		p.a.wantSent("signaled requests complete in order", uint64(i), verbs.WCWrite)
	}
}

func fenceWaits(l *lab) {
	p := l.pair()
	const n = 1 << 18
	remote, buf, got := l.b.region(n, verbs.AccessRemoteRead), l.a.region(n, verbs.AccessLocalWrite), l.b.region(n, verbs.AccessLocalWrite)
	data := l.nextPattern(n)
	copy(remote.mem, data)
	l.publish()
	p.b.recv(verbs.RecvWR{ID: 20, SGs: got.sg(0, n)})
	read, send := remoteWR(1, verbs.OpRead, buf.sg(0, n), remote, 0), sendWR(2, buf.sg(0, n))
	send.Flags |= verbs.SendFence
	p.a.send(read, send)
	p.b.wantRecvd("the fenced SEND arrives", 20, n)
	l.wantBytes("the fenced SEND carries what the READ before it fetched", got.mem, data)
	p.a.wantRead("the READ completes", 1, n)
	p.a.wantSent("the SEND completes", 2, verbs.WCSend)
}

func readAfterWrite(l *lab) {
	p := l.pair()
	const n = 20000
	remote, src, sink := l.b.region(n, allAccess), l.a.region(n, 0), l.a.region(n, verbs.AccessLocalWrite)
	copy(src.mem, l.nextPattern(n))
	p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), remote, 0), remoteWR(2, verbs.OpRead, sink.sg(0, n), remote, 0))
	p.a.wantSent("the WRITE completes", 1, verbs.WCWrite)
	p.a.wantRead("the READ completes", 2, n)
	l.wantBytes("the READ sees the WRITE posted before it", sink.mem, src.mem)
}

func writeThenSend(l *lab) {
	p := l.pair()
	const n = 100000
	remote, src := l.b.region(n, allAccess), l.a.region(n, 0)
	copy(src.mem, l.nextPattern(n))
	p.b.recvEmpty(20)
	write := remoteWR(1, verbs.OpWrite, src.sg(0, n), remote, 0)
	write.Flags = 0
	p.a.send(write, sendWR(2, nil))
	p.b.wantRecvd("the SEND arrives", 20, 0)
	l.wantBytes("the WRITE posted before it is in place", remote.mem, src.mem)
	p.a.wantSent("the SEND completes", 2, verbs.WCSend)
}

func manyReads(l *lab) {
	for _, depth := range []uint8{1, 2, l.link().rdAtomic} {
		p := l.pair(func(k *link) { k.rdAtomic, k.destRDAtomic = depth, depth })
		const n, size = 40, 9000
		remote, sink := l.b.region(n*size, verbs.AccessRemoteRead), l.a.region(n*size, verbs.AccessLocalWrite)
		data := l.nextPattern(n * size)
		copy(remote.mem, data)
		l.publish()
		for i := range n {
			p.a.send(remoteWR(uint64(i), verbs.OpRead, sink.sg(i*size, size), remote, i*size))
		}
		for i := range n {
			p.a.wantRead(fmt.Sprintf("READs wait for each other at depth %d", depth), uint64(i), size)
		}
		l.wantBytes("each READ fetched its piece", sink.mem, data)
	}
}

func atomicsInOrder(l *lab) {
	p := l.pair()
	target, result := l.b.region(8, allAccess), l.a.region(64*8, verbs.AccessLocalWrite)
	putWord(target.mem, 1000)
	l.publish()
	for i := range 64 {
		wr := remoteWR(uint64(i), verbs.OpFetchAdd, result.sg(8*i, 8), target, 0)
		wr.CompareAdd = 1
		p.a.send(wr)
	}
	for i := range 64 {
		p.a.wantSent("atomics complete in order", uint64(i), verbs.WCFetchAdd)
		if got := getWord(result.mem[8*i:]); got != 1000+uint64(i) {
			l.Fatalf("each atomic is executed once and in order: result %d is %d, want %d", i, got, 1000+i)
		}
	}
}

// peerNotReady posts to a peer still in INIT: packets are dropped there without an answer, and the
// requester's retries get through once it is in RTR (rocev2 spec 5.3).
func peerNotReady(l *lab) {
	k := l.link()
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.b.newEnd(k.cfgB), link: k}
	p.toInit(p.a)
	p.toInit(p.b)
	p.toRTR(p.a)
	p.toRTS(p.a)
	p.b.recvEmpty(20)
	p.a.send(sendWR(1, nil))
	p.b.wantQuiet("a QP in INIT receives nothing")
	p.toRTR(p.b)
	p.b.wantRecvd("a QP in RTR receives", 20, 0)
	p.b.wantEvent("the first packet in RTR establishes communication", ofQP(p.b.qp), verbs.EventCommEst)
	p.a.wantSent("and acknowledges", 1, verbs.WCSend)
}
