package verbstest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/openrds/openrds/verbs"
)

func memoryCases() []testcase {
	return []testcase{
		{"DeregisterEndsRemoteAccess", deregisterKeys},
		{"DeregisterWithPostedReceives", deregisterHeld},
		{"DeregisterWithPostedSends", deregisterHeldSends},
		{"DeregisterDuringPeersRead", deregisterDuringRead},
		{"DeregisterDuringPeersWrite", deregisterDuringWrite},
		{"DeregisterAfterPeerFellSilent", deregisterSilent},
		{"DeregisterAfterPartition", deregisterPartition},
		{"DeregisterWhenPeerSaysItHasRead", deregisterAfterRead},
		{"DeregisterWhilePeerReadsInALoop", deregisterReadLoop},
		{"DeregisterWhenQPErrs", deregisterQPErrs},
		{"DeregisterAndReadStress", stressDeregister},
		{"KeysDiffer", keysDiffer},
		{"SameMemoryTwice", sameMemoryTwice},
		{"CompletionGivesMemoryBack", completionGivesBack},
		{"CloseOfQPGivesMemoryBack", closeGivesBack},
	}
}

// promptly is the time Deregister may take when nothing of ours holds the region. What a peer does, or
// fails to do, is no reason to wait for longer than the handling of a packet.
const promptly = 2 * time.Second

func (l *lab) deregister(what string, r *region) {
	l.Helper()
	l.within(promptly, what, func() { l.must(what, r.mr.Deregister()) })
}

func deregisterKeys(l *lab) {
	r := l.b.region(64, allAccess)
	keep := l.b.region(64, allAccess)
	p, q := l.pair(), l.pair()
	p.a.send(remoteWR(1, verbs.OpWrite, newSink(p.a), r, 0))
	p.a.wantSent("a WRITE while registered", 1, verbs.WCWrite)
	l.deregister("deregister", r)
	l.must("again", r.mr.Deregister())
	p.a.send(remoteWR(2, verbs.OpWrite, newSink(p.a), r, 0))
	p.a.wantRefused("the key is gone", verbs.WCRemAccessErr, 2)
	q.a.send(remoteWR(3, verbs.OpWrite, newSink(q.a), keep, 0))
	q.a.wantSent("another region's is not", 3, verbs.WCWrite)
}

// holder deregisters a region that posted requests of QP e name, and checks that it is told so.
func holder(l *lab, r *region, e *end, free func()) {
	l.Helper()
	for range 2 {
		l.wantBusy("deregistering what posted requests name", r.mr.Deregister())
	}
	// The keys went at once all the same.
	q := &pair{l: l, a: l.a.newEnd(l.link().cfgA), b: l.b.newEnd(l.link().cfgB), link: l.link()}
	if e.node == l.b {
		q.connect()
		q.a.send(remoteWR(1, verbs.OpWrite, newSink(q.a), r, 0))
		q.a.wantRefused("its rkey is invalid at once", verbs.WCRemAccessErr, 1)
	} else {
		q.connect()
		q.a.send(sendWR(1, r.sg(0, 1)))
		q.a.wantSendStatus("its lkey is invalid at once", verbs.WCLocProtErr, 1)
	}
	l.wantBusy("and the memory still belongs to them", r.mr.Deregister())
	free()
	l.deregister("when they are gone it is ours", r)
	for i := range r.mem {
		r.mem[i] = 1
	}
}

func deregisterHeld(l *lab) {
	p := l.pair()
	r := l.b.region(256, allAccess)
	for i := range 4 {
		p.b.recv(verbs.RecvWR{ID: uint64(i), SGs: r.sg(64*i, 64)})
	}
	holder(l, r, p.b, func() { p.b.to(verbs.StateErr) })
	p.b.wantRecvStatus("the receives flushed", verbs.WCFlushErr, 0, 1, 2, 3)
}

func deregisterHeldSends(l *lab) {
	p := l.pair()
	r := l.a.region(256, allAccess)
	p.toSQD(p.a, false)
	p.a.send(sendWR(0, r.sg(0, 64)), sendWR(1, r.sg(0, 64)))
	holder(l, r, p.a, func() { l.must("close the QP", p.a.qp.Close()) })
}

// pauses are moments in the life of a large transfer.
var pauses = []time.Duration{0, 20 * time.Microsecond, 100 * time.Microsecond, 300 * time.Microsecond, time.Millisecond, 3 * time.Millisecond}

// deregisterDuringRead: a READ in progress does not hold the region. The reader sees either all of it or
// an error.
func deregisterDuringRead(l *lab) {
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		src, sink := l.b.region(n, allAccess), l.a.region(n, verbs.AccessLocalWrite)
		data := l.nextPattern(n)
		copy(src.mem, data)
		l.publish()
		p.a.send(remoteWR(1, verbs.OpRead, sink.sg(0, n), src, 0))
		time.Sleep(pause)
		l.deregister(fmt.Sprintf("deregister %v into a READ", pause), src)
		for i := range src.mem {
			src.mem[i] = 0 // ours again
		}
		p.wholeOrError(sink, data)
	}
}

// sourceGone are the statuses a READ may have whose source went away.
var sourceGone = []verbs.WCStatus{verbs.WCRemAccessErr, verbs.WCRetryExcErr, verbs.WCRemOpErr}

// wholeOrError checks the completion of a READ whose source went away: an error, or all of the data, never
// something between.
func (p *pair) wholeOrError(sink *region, data []byte) {
	p.l.Helper()
	switch wc := p.a.nextWC("the READ completes", p.a.scq); {
	case wc.Status == verbs.WCSuccess:
		p.l.wantBytes("a READ that succeeds has all of what was there", sink.mem, data)
	case !slices.Contains(sourceGone, wc.Status):
		p.l.Fatalf("a READ whose source goes away: %v", wc.Status)
	}
}

// deregisterAfterRead: the peer has read the region and said so. Its owner believes it, and deregisters while the
// last responses may be on their way out still, or are sent again.
func deregisterAfterRead(l *lab) {
	const n = 1 << 20
	for _, fence := range []verbs.SendFlags{0, verbs.SendFence} {
		for range 5 {
			p := l.pair(func(k *link) { k.timeout, k.retry = 12, 5 })
			src, sink := l.b.region(n, allAccess), l.a.region(n, verbs.AccessLocalWrite)
			data := l.nextPattern(n)
			copy(src.mem, data)
			p.b.recvEmpty(20)
			tell := sendWR(2, nil)
			tell.Flags |= fence
			p.a.send(remoteWR(1, verbs.OpRead, sink.sg(0, n), src, 0), tell)
			p.b.wantRecvd("the peer says it has read", 20, 0)
			l.deregister("then the region can go", src)
			clear(src.mem)  // ours again
			if fence == 0 { // it had only asked
				p.wholeOrError(sink, data)
				continue
			}
			p.a.wantRead("it has", 1, n)
			l.wantBytes("all of it", sink.mem, data)
			p.a.wantSent("and has said so", 2, verbs.WCSend)
		}
	}
}

// readUntilRefused reads src over and over until a READ fails. Every one before has all of the data.
func readUntilRefused(p *pair, src, sink *region, data []byte) error {
	n := len(data)
	for {
		if err := p.a.post(remoteWR(1, verbs.OpRead, sink.sg(0, n), src, 0), remoteWR(2, verbs.OpRead, sink.sg(n, n), src, 0)); err != nil {
			return err
		}
		for i := range 2 {
			var e *verbs.WCError
			if err := collect(p.a.scq, 1, nil); errors.As(err, &e) {
				if !slices.Contains(sourceGone, e.Status) {
					return fmt.Errorf("a READ whose source goes away: %w", err)
				}
				return nil
			} else if err != nil {
				return err
			}
			if !bytes.Equal(sink.mem[i*n:(i+1)*n], data) {
				return errors.New("a READ that succeeds has all of what was there")
			}
		}
	}
}

// deregisterReadLoop: traffic never keeps a region from going.
func deregisterReadLoop(l *lab) {
	const n = 64 << 10
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		src, sink := l.b.region(n, allAccess), l.a.region(2*n, verbs.AccessLocalWrite)
		data := l.nextPattern(n)
		copy(src.mem, data)
		l.publish()
		l.together(
			func() error { return readUntilRefused(p, src, sink, data) },
			func() error {
				time.Sleep(pause)
				start := time.Now()
				if err := src.mr.Deregister(); err != nil || time.Since(start) > promptly {
					return fmt.Errorf("deregister after %v: %w", time.Since(start), err)
				}
				clear(src.mem)
				return nil
			})
	}
}

// stressDeregister: regions go, one after the other, while several QPs read them.
func stressDeregister(l *lab) {
	const n, readers, regions = 20000, 2, 3
	for range 3 {
		var fs []func() error
		for i := range regions {
			src := l.b.region(n, allAccess)
			data := l.nextPattern(n)
			copy(src.mem, data)
			for range readers {
				p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
				sink := l.a.region(2*n, verbs.AccessLocalWrite)
				fs = append(fs, func() error { return readUntilRefused(p, src, sink, data) })
			}
			fs = append(fs, func() error {
				time.Sleep(time.Duration(i*i) * 200 * time.Microsecond)
				defer clear(src.mem)
				return src.mr.Deregister()
			})
		}
		l.publish()
		l.together(fs...)
	}
}

// deregisterQPErrs: a QP that errs lets go of everything: of what was posted and not sent, what was sent and
// not acknowledged, a message half received, and what READs it has answered.
func deregisterQPErrs(l *lab) {
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.rnrTimer = 0 })
		read := l.b.region(n, allAccess)
		for i := range 2 * uint64(p.destRDAtomic) {
			p.a.send(remoteWR(i, verbs.OpRead, newSink(p.a), read, 0))
			p.a.wantRead("READs fill what B remembers of them", i, 8)
		}
		src, sink, recv := l.a.region(n, allAccess), l.a.region(n, allAccess), l.b.region(n, allAccess)
		p.a.recv(verbs.RecvWR{ID: 30, SGs: sink.sg(0, n)})
		p.b.recv(verbs.RecvWR{ID: 40, SGs: recv.sg(0, n)})
		for i := range uint64(20) { // B takes one
			p.a.send(sendWR(i, src.sg(0, n)), remoteWR(100+i, verbs.OpRead, sink.sg(0, n), read, 0))
		}
		time.Sleep(pause)
		p.a.qp.SetError()
		p.b.qp.SetError()
		p.a.wantState("A's QP", verbs.StateErr)
		p.b.wantState("B's QP", verbs.StateErr)
		for _, r := range []*region{src, sink, recv, read} {
			l.deregister(fmt.Sprintf("deregister after %v and an error", pause), r)
			for i := range r.mem {
				r.mem[i] = 1
			}
		}
	}
}

// deregisterDuringWrite: nothing is written once Deregister has returned.
func deregisterDuringWrite(l *lab) {
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		src, dst := l.a.region(n, 0), l.b.region(n, allAccess)
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), dst, 0), remoteWR(2, verbs.OpWrite, src.sg(0, n), dst, 0))
		time.Sleep(pause)
		l.deregister(fmt.Sprintf("deregister %v into a WRITE", pause), dst)
		for i := range dst.mem {
			dst.mem[i] = 0x77
		}
		l.settle()
		for i, b := range dst.mem {
			if b != 0x77 {
				l.Fatalf("%v into a WRITE: byte %d was written after Deregister returned", pause, i)
			}
		}
		p.writtenOrRefused()
	}
}

// writtenOrRefused checks the completions of two WRITEs whose target went away. The one NAK that says so may come
// too late for a requester on a machine that is busy with other things.
func (p *pair) writtenOrRefused() {
	p.l.Helper()
	wc := p.a.nextWC("the first WRITE completes", p.a.scq)
	if wc.Status == verbs.WCSuccess {
		wc = p.a.nextWC("the second WRITE completes", p.a.scq)
	}
	if wc.Status != verbs.WCSuccess && wc.Status != verbs.WCRemAccessErr && (p.l.exact || wc.Status != verbs.WCRetryExcErr) {
		p.l.Fatalf("a WRITE whose target goes away: %v", wc.Status)
	}
}

// deregisterSilent: a peer that ends in the middle of a WRITE, without a word, holds nothing.
func deregisterSilent(l *lab) {
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair()
		src, dst := l.a.region(n, 0), l.b.region(n, allAccess)
		recv := l.b.region(n, verbs.AccessLocalWrite)
		p.b.recv(verbs.RecvWR{ID: 1, SGs: recv.sg(0, n)})
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), dst, 0), sendWR(2, src.sg(0, n)))
		time.Sleep(pause)
		l.must("the peer's QP vanishes", p.a.qp.Close())
		l.deregister(fmt.Sprintf("deregister after a peer vanished %v into a WRITE", pause), dst)
		// A receive in use is a posted request of ours: it holds its memory until the QP is told to stop.
		l.must("close our QP", p.b.qp.Close())
		l.deregister("deregister the receive buffer", recv)
	}
}

func deregisterPartition(l *lab) {
	if l.env.Partition == nil {
		l.Skip("the network cannot be cut")
	}
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		src, dst, from := l.a.region(n, verbs.AccessLocalWrite), l.b.region(n, allAccess), l.b.region(n, allAccess)
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), dst, 0), remoteWR(2, verbs.OpRead, src.sg(0, n), from, 0))
		time.Sleep(pause)
		l.env.Partition(true)
		time.Sleep(50 * time.Millisecond)
		l.deregister("deregister the target of a WRITE that stopped", dst)
		l.deregister("deregister the source of a READ that stopped", from)
		l.env.Partition(false)
		l.must("close", p.a.qp.Close())
	}
}

func keysDiffer(l *lab) {
	keys := map[verbs.LKey]bool{}
	for range 64 {
		r := l.a.region(8, allAccess)
		if k := r.mr.LKey(); keys[k] || uint32(r.mr.RKey()) == 0 {
			l.Fatalf("live regions have keys of their own: %#x", k)
		}
		keys[r.mr.LKey()] = true
	}
	last := verbs.LKey(0)
	for range 64 {
		r := l.a.region(8, allAccess)
		l.must("deregister", r.mr.Deregister())
		if r.mr.LKey() == last {
			l.Fatalf("a key is not given out again at once: %#x", last)
		}
		last = r.mr.LKey()
	}
}

// sameMemoryTwice registers the same bytes with different rights and addresses.
func sameMemoryTwice(l *lab) {
	p := l.pair()
	r := l.b.region(64, verbs.AccessRemoteRead)
	mr, err := l.b.pd.RegMR(r.mem, 0, allAccess) // an address may be 0
	l.must("register the same memory again", err)
	l.mrs = append(l.mrs, mr)
	w := &region{mr: mr, mem: r.mem}
	src := l.a.region(8, 0)
	copy(src.mem, l.nextPattern(8))
	sink := l.a.region(8, verbs.AccessLocalWrite)
	p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, 8), w, 40), remoteWR(2, verbs.OpRead, sink.sg(0, 8), r, 40))
	p.a.wantSent("written through one", 1, verbs.WCWrite)
	p.a.wantRead("read through the other", 2, 8)
	l.wantBytes("it is the same memory", sink.mem, src.mem)
	l.deregister("deregister one", w)
	p.a.send(remoteWR(3, verbs.OpRead, sink.sg(0, 8), r, 0))
	p.a.wantRead("the other stays", 3, 8)
}

// completionGivesBack: once its completion is polled a request holds nothing.
func completionGivesBack(l *lab) {
	p := l.pair()
	for _, n := range []int{1, 5000, 200000} {
		src, dst := l.a.region(n, verbs.AccessLocalWrite), l.b.region(n, allAccess)
		p.b.recv(verbs.RecvWR{ID: 20, SGs: dst.sg(0, n)})
		unsignaled := remoteWR(0, verbs.OpWrite, src.sg(0, n), dst, 0)
		unsignaled.Flags = 0
		p.a.send(unsignaled, remoteWR(1, verbs.OpRead, src.sg(0, n), dst, 0), sendWR(2, src.sg(0, n)))
		p.a.wantRead("the READ", 1, n)
		p.a.wantSent("the SEND", 2, verbs.WCSend)
		p.b.wantRecvd("the SEND", 20, n)
		l.deregister("the sender's region", src)
		l.deregister("the receiver's region", dst)
		src.mem[0], dst.mem[0] = 1, 1
	}
}

func closeGivesBack(l *lab) {
	p := l.pair(func(k *link) { k.rnrTimer = 0 })
	src, dst := l.a.region(1<<18, verbs.AccessLocalWrite), l.a.region(1<<18, verbs.AccessLocalWrite)
	p.a.recv(verbs.RecvWR{ID: 1, SGs: dst.sg(0, 1<<18)})
	p.a.send(sendWR(1, src.sg(0, 1<<18)))
	p.b.send(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: l.b.region(1<<18, 0).sg(0, 1<<18)})
	time.Sleep(50 * time.Microsecond)
	l.must("close the QP", p.a.qp.Close())
	l.deregister("the send buffer", src)
	l.deregister("the receive buffer", dst)
	for i := range dst.mem {
		src.mem[i], dst.mem[i] = 0x55, 0x55
	}
	l.settle()
	for i, b := range dst.mem {
		if b != 0x55 {
			l.Fatalf("byte %d of the receive buffer was written after Close", i)
		}
	}
}
