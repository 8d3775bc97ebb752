package verbstest

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/openrds/openrds/verbs"
)

// Memory windows (rocev2 spec 6.3 to 6.5).

var capOfMW = map[verbs.MWType]verbs.DeviceCaps{verbs.MWType1: verbs.CapMW1, verbs.MWType2A: verbs.CapMW2A, verbs.MWType2B: verbs.CapMW2B}

var mwTypes = []verbs.MWType{verbs.MWType1, verbs.MWType2A, verbs.MWType2B}

// type2 windows are those that are bound while free, to one QP.
func type2(t verbs.MWType) bool { return t != verbs.MWType1 }

func windowCases() (cases []testcase) {
	add := func(t verbs.MWType, name string, run func(*lab, verbs.MWType)) {
		cases = append(cases, testcase{fmt.Sprintf("%v/%s", t, name), needs(capOfMW[t], func(l *lab) { run(l, t) })})
	}
	ext := func(run func(*lab, verbs.MWType)) func(*lab, verbs.MWType) {
		return func(l *lab, t verbs.MWType) { needs(verbs.CapMemMgtExtensions, func(l *lab) { run(l, t) })(l) }
	}
	for _, t := range mwTypes {
		add(t, "BindUseUnbind", bindUseUnbind)
		add(t, "InOneBatch", bindInBatch)
		add(t, "BindThenTell", bindThenTell)
		add(t, "OfFastRegMR", ext(windowOfFastReg))
		add(t, "OtherQP", windowOtherQP)
		add(t, "TwoOfOneRegion", windowsOfOneRegion)
		add(t, "DeregisterIsBusy", windowHoldsRegion)
		add(t, "DeallocWhileBound", deallocBound)
		add(t, "DeallocDuringPeersWrite", deallocDuringWrite)
		add(t, "ParentsAreBusy", windowParents)
		add(t, "ZeroLengthIsExempt", windowZeroLength)
		add(t, "RefusedBindChangesNothing", refusedBind)
		add(t, "FlushedBindDoesNotHappen", flushedBind)
		add(t, "BadPosts", badBindPosts)
		add(t, "QPCloses", windowQPCloses)
		add(t, "Stress", stressWindow)
		for _, f := range windowFaults(t) {
			add(t, f.name, func(l *lab, _ verbs.MWType) { f.run(l) })
		}
		for _, c := range badWindowInvalidations(t) {
			add(t, "SendWithInv/Refused/"+c.name, ext(func(l *lab, _ verbs.MWType) { sendWithInvRefused(l, c.key) }))
		}
		add(t, "LOC_QP_OP/Invalidate", ext(windowInvalidFault))
		if type2(t) {
			add(t, "LocalInv", windowLocalInv)
			add(t, "SendWithInv", windowSendInv)
			add(t, "ZeroBased", windowZeroBased)
		} else {
			add(t, "BoundAgainWhileBound", rebindBound)
		}
	}
	return append(cases, testcase{"UnknownType", unknownWindow})
}

// window is a memory window with what was last posted of it.
type window struct {
	mw   verbs.MW
	l    *lab
	r    *region
	key  verbs.RKey
	addr uint64 // of its first byte, as a peer gives it
}

func (n *node) window(t verbs.MWType) *window {
	n.l.Helper()
	return n.windowIn(n.pd, t)
}

func (n *node) windowIn(pd verbs.PD, t verbs.MWType) *window {
	n.l.Helper()
	mw, err := pd.AllocMW(t)
	n.l.must(fmt.Sprintf("allocate a %v window on %s", t, n.name), err)
	n.l.mws = append(n.l.mws, mw)
	if mw.Type() != t || mw.RKey()>>8 == 0 {
		n.l.Fatalf("a window has its type and a key: %v, %#x", mw.Type(), mw.RKey())
	}
	return &window{mw: mw, l: n.l, key: mw.RKey()}
}

const bindAccess = allAccess | verbs.AccessMWBind

// bindWR is a binding to n bytes of r at off.
func (w *window) bindWR(id uint64, r *region, off, n int, access verbs.Access) verbs.SendWR {
	w.r, w.key, w.addr = r, verbs.UpdateFastRegKey(w.key), r.addr(off)
	if access&verbs.AccessZeroBased != 0 {
		w.addr = 0
	}
	return verbs.SendWR{ID: id, Opcode: verbs.OpBindMW, Flags: verbs.SendSignaled,
		Bind: &verbs.MWBind{MW: w.mw, Key: w.key, MR: r.mr, Addr: r.addr(off), Length: uint64(n), Access: access}}
}

// bind binds w on e and waits for it.
func (e *end) bind(w *window, r *region, off, n int, access verbs.Access) {
	e.l.Helper()
	wr := w.bindWR(regID, r, off, n, access)
	e.send(wr)
	*wr.Bind = verbs.MWBind{} // it was copied
	e.wantSent("the bind completes", regID, verbs.WCBindMW)
	if w.mw.RKey() != w.key {
		e.l.Fatalf("a window's key is that of its last bind: %#x, want %#x", w.mw.RKey(), w.key)
	}
}

// endWR takes the rights away that w grants: by a bind of length 0, or an invalidation.
func (w *window) endWR(id uint64) (verbs.SendWR, verbs.WCOpcode) {
	if type2(w.mw.Type()) {
		return invWR(id, w.key), verbs.WCLocalInv
	}
	w.key = verbs.UpdateFastRegKey(w.key)
	return verbs.SendWR{ID: id, Opcode: verbs.OpBindMW, Flags: verbs.SendSignaled, Bind: &verbs.MWBind{MW: w.mw, Key: w.key}}, verbs.WCBindMW
}

// unbind does that, on the QP that bound it, and waits for it.
func (e *end) unbind(w *window) {
	e.l.Helper()
	wr, op := w.endWR(regID + 1)
	e.send(wr)
	e.wantSent("the unbind completes", regID+1, op)
}

// wr is a request op of the peer through the window, at off.
func (w *window) wr(id uint64, op verbs.SendOpcode, sgs []verbs.SGE, off int) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: op, Flags: verbs.SendSignaled, SGs: sgs, RemoteAddr: w.addr + uint64(off), RKey: w.key}
}

// wantShut checks that nothing gets through w any more, over p, whose QPs err.
func (p *pair) wantShut(what string, w *window) {
	p.l.Helper()
	p.a.send(w.wr(regID+4, verbs.OpWrite, newSink(p.a), 0))
	p.a.wantRefused(what, verbs.WCRemAccessErr, regID+4)
}

// wantOpen checks that w admits WRITEs over p.
func (p *pair) wantOpen(what string, w *window) {
	p.l.Helper()
	p.a.send(w.wr(regID+5, verbs.OpWrite, newSink(p.a), 0))
	p.a.wantSent(what, regID+5, verbs.WCWrite)
}

// bindUseUnbind: a window gives rights its region does not.
func bindUseUnbind(l *lab, t verbs.MWType) {
	const n = 20000
	r := l.b.region(n, verbs.AccessLocalWrite|verbs.AccessMWBind)
	if k := r.mr.RKey(); k != 0 {
		l.Fatalf("a region has no rkey for that windows may be bound to it: %#x", k)
	}
	local := l.a.region(n, verbs.AccessLocalWrite)
	want := slices.Clone(r.mem)
	for _, at := range [][2]int{{0, n}, {1, n - 2}, {4096, 8192}, {n - 8, 8}} {
		off, size := at[0], at[1]
		p, w := l.pair(), l.b.window(t)
		p.b.bind(w, r, off, size, remoteAccess)
		data := l.nextPattern(size)
		copy(local.mem, data)
		copy(want[off:], data)
		p.a.send(w.wr(1, verbs.OpWrite, local.sg(0, size), 0))
		p.a.wantSent("a WRITE of the whole window", 1, verbs.WCWrite)
		clear(local.mem)
		p.a.send(w.wr(2, verbs.OpRead, local.sg(0, size-1), 1))
		p.a.wantRead("a READ", 2, size-1)
		l.wantBytes("what is read through it", local.mem[:size-1], data[1:])
		if l.b.dev.Attr().Caps&verbs.CapAtomics != 0 && w.addr%8 == 0 {
			p.a.send(w.wr(3, verbs.OpFetchAdd, local.sg(0, 8), size/8*8-8)) // of 0
			p.a.wantSent("an atomic", 3, verbs.WCFetchAdd)
		}
		p.fence()
		l.wantBytes("the region, and nothing around the window", r.mem, want)
		old := *w
		p.b.unbind(w)
		p.wantShut("unbound", &old)
	}
	l.deregister("nothing is bound to it", r)
}

// bindInBatch: bound and unbound and bound to something else, in one queue.
func bindInBatch(l *lab, t verbs.MWType) {
	p := l.pair()
	r, s := l.b.region(64, bindAccess), l.b.region(64, bindAccess)
	w := l.b.window(t)
	var wrs []verbs.SendWR
	var ops []verbs.WCOpcode
	add := func(wr verbs.SendWR, op verbs.WCOpcode) { wrs, ops = append(wrs, wr), append(ops, op) }
	for range 10 {
		add(w.bindWR(0, r, 0, 64, remoteAccess), verbs.WCBindMW)
		add(w.endWR(0))
		add(w.bindWR(0, s, 8, 16, remoteAccess), verbs.WCBindMW)
		add(w.endWR(0))
	}
	add(w.bindWR(0, s, 8, 16, remoteAccess), verbs.WCBindMW)
	p.b.send(wrs...)
	for _, op := range ops {
		p.b.wantSent("binds and invalidations complete in order", 0, op)
	}
	src := l.a.region(16, 0)
	copy(src.mem, l.nextPattern(16))
	p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, 16), 0))
	p.a.wantSent("the last is in force", 1, verbs.WCWrite)
	p.fence()
	l.wantBytes("and leads where it was bound", s.mem[8:24], src.mem)
	l.deregister("the other region is free", r)
	l.wantBusy("this one is not", s.mr.Deregister())
}

// bindThenTell: a SEND behind a bind tells the peer of a key that is good when it arrives.
func bindThenTell(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.b.region(64*20, bindAccess)
	for i := range 20 {
		w := l.b.window(t)
		bind := w.bindWR(1, r, 64*i, 64, remoteAccess)
		bind.Flags = 0
		p.a.recvEmpty(30)
		p.b.send(bind, sendWR(2, nil))
		p.a.wantRecvd("the SEND arrives", 30, 0)
		p.wantOpen("and the key is good", w)
		p.b.wantSent("the SEND completes", 2, verbs.WCSend)
	}
}

// windowOfFastReg: what is bound to a region of fast registration holds its mapping.
func windowOfFastReg(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	f := l.b.fast(8)
	f.set(f.mem[7*4096:], f.mem[:3*4096], f.mem[4*4096:5*4096+9])
	p.b.register(f, verbs.AccessLocalWrite|verbs.AccessMWBind)
	w := l.b.window(t)
	n := f.segs.len() - 200
	p.b.bind(w, &f.region, 100, n, remoteAccess)
	src := l.a.region(n, 0)
	copy(src.mem, l.nextPattern(n))
	p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, n), 0))
	p.a.wantSent("a WRITE through it", 1, verbs.WCWrite)
	p.fence()
	l.wantBytes("across the pages of the list", f.segs.bytes(100, n), src.mem)

	q.b.send(f.invWR(2))
	q.b.wantSendStatus("its region cannot be invalidated", verbs.WCLocQPOpErr, 2)
	l.wantBusy("nor deregistered", f.mr.Deregister())
	p.wantOpen("nothing was changed", w)
	p.b.unbind(w)
	p.b.invalidate(f)
	l.deregister("unbound it can", &f.region)
}

// windowOtherQP: type 1 works through every QP of the PD, type 2 through the one that bound it.
func windowOtherQP(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 0, 64, remoteAccess)
	if type2(t) {
		q.wantShut("another QP of its PD", w)
	} else {
		q.wantOpen("another QP of its PD", w)
	}
	other := l.b.newEndIn(l.b.allocPD(), l.b.qpConfig(verbs.RC))
	l.pairOf(l.a.newEnd(l.a.qpConfig(verbs.RC)), other).wantShut("a QP of another PD", w)
	p.wantOpen("the one that bound it", w)
}

// windowsOfOneRegion: windows over one region have nothing to do with each other.
func windowsOfOneRegion(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.b.region(64, bindAccess)
	v, w := l.b.window(t), l.b.window(t)
	p.b.bind(v, r, 0, 40, verbs.AccessRemoteRead)
	p.b.bind(w, r, 24, 40, verbs.AccessRemoteWrite)
	src := l.a.region(40, verbs.AccessLocalWrite)
	copy(src.mem, l.nextPattern(40))
	data := slices.Clone(src.mem)
	p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, 40), 0))
	p.a.wantSent("one writes", 1, verbs.WCWrite)
	p.a.send(v.wr(2, verbs.OpRead, src.sg(0, 40), 0))
	p.a.wantRead("the other reads", 2, 40)
	l.wantBytes("where they overlap", src.mem[24:], data[:16])
	p.b.unbind(v)
	l.wantBusy("the other holds the region still", r.mr.Deregister())
	p.wantOpen("and works", w)
	p.b.unbind(w)
	l.deregister("unbound both", r)
}

// windowHoldsRegion: a region with a window bound cannot be deregistered: the error names the window, and nothing
// is changed.
func windowHoldsRegion(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 0, 64, remoteAccess)
	for range 2 {
		var e *verbs.BusyError
		l.within(promptly, "it is refused at once", func() { e = l.wantBusy("deregister", r.mr.Deregister()) })
		if !slices.ContainsFunc(e.Holders, func(h string) bool { return strings.Contains(h, "window") }) {
			l.Fatalf("the error names the window: %v", e)
		}
	}
	p.wantOpen("the window works on", w)
	p.a.send(remoteWR(1, verbs.OpWrite, newSink(p.a), r, 0))
	p.a.wantSent("the region works on", 1, verbs.WCWrite)
	p.b.send(remoteWR(2, verbs.OpWrite, r.sg(0, 8), l.a.region(8, allAccess), 0))
	p.b.wantSent("here too", 2, verbs.WCWrite)
	p.b.unbind(w)
	l.deregister("unbound it can", r)
}

func deallocBound(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 0, 64, remoteAccess)
	p.wantOpen("bound", w)
	for range 2 {
		l.must("deallocate", w.mw.Dealloc())
	}
	l.deregister("it holds the region no more", r)
	p.wantShut("its key is gone", w)
}

// deallocDuringWrite: nothing is written through a window once Dealloc has returned.
func deallocDuringWrite(l *lab, t verbs.MWType) {
	const n = 1 << 20
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		src, dst := l.a.region(n, 0), l.b.region(n, verbs.AccessLocalWrite|verbs.AccessMWBind)
		w := l.b.window(t)
		p.b.bind(w, dst, 0, n, verbs.AccessRemoteWrite)
		p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, n), 0), w.wr(2, verbs.OpWrite, src.sg(0, n), 0))
		time.Sleep(pause)
		l.within(promptly, "deallocate", func() { l.must("deallocate", w.mw.Dealloc()) })
		l.deregister("the region", dst)
		for i := range dst.mem {
			dst.mem[i] = 0x77
		}
		l.settle()
		for i, b := range dst.mem {
			if b != 0x77 {
				l.Fatalf("%v into a WRITE: byte %d was written after Dealloc returned", pause, i)
			}
		}
		l.must("close", p.a.qp.Close())
	}
}

func windowParents(l *lab, t verbs.MWType) {
	pd := l.a.allocPD()
	mw, err := pd.AllocMW(t)
	l.must("allocate", err)
	l.wantBusy("PD with a window", pd.Close())
	for range 2 {
		l.must("deallocate", mw.Dealloc())
	}
	l.must("close the PD", pd.Close())
	_, err = pd.AllocMW(t)
	l.wantErr("AllocMW in a closed PD", err, verbs.ErrClosed)
}

// windowZeroLength: a request of no bytes goes through whatever its key.
func windowZeroLength(l *lab, t verbs.MWType) {
	p := l.pair()
	w := l.b.window(t)
	p.a.send(w.wr(1, verbs.OpWrite, nil, 0), w.wr(2, verbs.OpRead, nil, 0))
	p.a.wantSent("an empty WRITE", 1, verbs.WCWrite)
	p.a.wantRead("an empty READ", 2, 0)
}

// refusedBind: a bind that fails leaves the window what it was.
func refusedBind(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r, s := l.b.region(64, bindAccess), l.b.region(64, allAccess) // nothing may be bound to s
	w := l.b.window(t)
	if !type2(t) {
		p.b.bind(w, r, 0, 64, remoteAccess)
	}
	before := *w
	q.b.send(w.bindWR(1, s, 0, 64, remoteAccess))
	q.b.wantSendStatus("a bind to what admits none", verbs.WCMWBindErr, 1)
	q.b.wantState("the QP", verbs.StateErr)
	if got := w.mw.RKey(); got != before.key {
		l.Fatalf("the key is as it was: %#x, want %#x", got, before.key)
	}
	l.deregister("nothing is bound to it", s)
	*w = before
	if type2(t) {
		p.b.bind(w, r, 0, 64, remoteAccess)
	}
	p.wantOpen("and the window works", w)
}

// flushedBind: a bind that is flushed binds nothing, and holds nothing.
func flushedBind(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.toSQD(p.b, false)
	before := *w
	p.b.send(w.bindWR(1, r, 0, 64, remoteAccess))
	p.b.wantQuiet("SQD executes nothing")
	p.b.qp.SetError()
	p.b.wantSendStatus("it is flushed", verbs.WCFlushErr, 1)
	l.deregister("nothing is bound", r)
	s := l.b.region(64, bindAccess)
	*w = before
	q.b.bind(w, s, 0, 64, remoteAccess)
	q.wantOpen("the window can be bound by another QP", w)
}

// badBindPosts: what no execution could make right is refused when it is posted.
func badBindPosts(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.a.region(64, bindAccess)
	w := l.a.window(t)
	for _, c := range []struct {
		name string
		set  func(*verbs.SendWR)
	}{
		{"without parameters", func(wr *verbs.SendWR) { wr.Bind = nil }},
		{"without a window", func(wr *verbs.SendWR) { wr.Bind.MW = nil }},
		{"of a window of another device", func(wr *verbs.SendWR) { wr.Bind.MW = l.b.window(t).mw }},
		{"to a region of another device", func(wr *verbs.SendWR) { wr.Bind.MR = l.b.region(64, bindAccess).mr }},
	} {
		wr := w.bindWR(1, r, 0, 64, remoteAccess)
		c.set(&wr)
		n, err := p.a.qp.PostSend([]verbs.SendWR{wr})
		if n != 0 {
			l.Fatalf("a bind %s was taken", c.name)
		}
		l.wantErr("a bind "+c.name, err, verbs.ErrInvalid)
	}
	p.a.bind(w, r, 0, 64, remoteAccess)
}

// windowQPCloses: the QP that bound a window goes. Neither window nor region depend on it.
func windowQPCloses(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 0, 64, remoteAccess)
	l.must("close the QP", p.b.qp.Close())
	if type2(t) {
		q.wantShut("no other QP may use it", w)
	} else {
		q.wantOpen("the others may use it", w)
	}
	l.must("deallocate", w.mw.Dealloc())
	l.deregister("the region", r)
}

// rebindBound: type 1 is bound again without being unbound.
func rebindBound(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r, s := l.b.region(64, bindAccess), l.b.region(64, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 0, 64, remoteAccess)
	old := *w
	p.b.bind(w, s, 0, 64, remoteAccess)
	l.deregister("the first region is free", r)
	l.wantBusy("the second is not", s.mr.Deregister())
	p.wantOpen("the new key works", w)
	q.wantShut("the old one does not", &old)
}

func windowLocalInv(l *lab, t verbs.MWType) {
	p, q := l.pair(), l.pair()
	r := l.b.region(64, bindAccess)
	w := l.b.window(t)
	for range 300 { // past the last variant
		p.b.bind(w, r, 0, 64, remoteAccess)
		p.b.unbind(w)
	}
	q.b.bind(w, r, 0, 64, remoteAccess)
	q.wantOpen("freed, another QP may bind it", w)
	p.wantShut("then it is that one's", w)
}

// windowSendInv: the peer gives the window back with the message that says it is done.
func windowSendInv(l *lab, t verbs.MWType) {
	p := l.pair()
	const n = 10000
	r := l.b.region(n, verbs.AccessLocalWrite|verbs.AccessMWBind)
	w := l.b.window(t)
	src := l.a.region(n, 0)
	for i := range uint64(5) {
		p.b.bind(w, r, 0, n, remoteAccess)
		copy(src.mem, l.nextPattern(n))
		p.b.recvEmpty(i)
		p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, n), 0), sendInvWR(2, nil, w.key))
		p.a.wantSent("the WRITE", 1, verbs.WCWrite)
		p.a.wantSent("the SEND", 2, verbs.WCSend)
		p.b.wantInvalidated("the window is back", i, 0, w.key)
		l.wantBytes("with what was written", r.mem, src.mem)
	}
	l.deregister("nothing is bound any more", r)
	p.wantShut("its key is gone", w)
}

// windowZeroBased: addresses in it are offsets from its start.
func windowZeroBased(l *lab, t verbs.MWType) {
	p := l.pair()
	r := l.b.region(10000, bindAccess)
	w := l.b.window(t)
	p.b.bind(w, r, 5000, 3000, remoteAccess|verbs.AccessZeroBased)
	src := l.a.region(2990, verbs.AccessLocalWrite)
	copy(src.mem, l.nextPattern(2990))
	p.a.send(w.wr(1, verbs.OpWrite, src.sg(0, 2990), 10))
	p.a.wantSent("a WRITE at an offset", 1, verbs.WCWrite)
	p.fence()
	l.wantBytes("where it leads", r.mem[5010:8000], src.mem)
	w.addr = r.addr(5000)
	p.wantShut("the region's own address is outside", w)
}

func unknownWindow(l *lab) {
	for _, t := range []verbs.MWType{0, 9} {
		if mw, err := l.a.pd.AllocMW(t); err == nil {
			l.mws = append(l.mws, mw)
			l.Fatalf("a window of type %d", t)
		}
	}
}

// windowFaults are what the responder refuses through a window (REM_ACCESS), and binds that are refused (MW_BIND).
func windowFaults(t verbs.MWType) (fs []fault) {
	right := map[verbs.SendOpcode]verbs.Access{
		verbs.OpWrite: verbs.AccessRemoteWrite, verbs.OpRead: verbs.AccessRemoteRead,
		verbs.OpFetchAdd: verbs.AccessRemoteAtomic, verbs.OpCompareSwap: verbs.AccessRemoteAtomic,
	}
	for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd, verbs.OpCompareSwap} {
		access := func(name string, wr func(p *pair) verbs.SendWR) {
			fs = append(fs, fault{name: fmt.Sprintf("REM_ACCESS/%v/%s", op, name), status: verbs.WCRemAccessErr, peer: peerEvent, bad: wr})
		}
		// Bytes 64 to 128 of 192.
		bound := func(p *pair, a verbs.Access) *window {
			w := p.b.window(t)
			p.b.bind(w, p.b.region(192, bindAccess), 64, 64, a)
			return w
		}
		use := func(p *pair, w *window, off int) verbs.SendWR { return w.wr(0, op, newSink(p.a), off) }
		access("NeverBound", func(p *pair) verbs.SendWR { return use(p, p.b.window(t), 0) })
		access("Unbound", func(p *pair) verbs.SendWR {
			w := bound(p, remoteAccess)
			p.b.unbind(w)
			return use(p, w, 0)
		})
		access("OldKey", func(p *pair) verbs.SendWR {
			w := bound(p, remoteAccess)
			old := w.key
			p.b.unbind(w)
			p.b.bind(w, w.r, 64, 64, remoteAccess)
			wr := use(p, w, 0)
			wr.RKey = old
			return wr
		})
		access("NextKey", func(p *pair) verbs.SendWR {
			wr := use(p, bound(p, remoteAccess), 0)
			wr.RKey = verbs.UpdateFastRegKey(wr.RKey)
			return wr
		})
		if op == verbs.OpWrite || op == verbs.OpRead {
			access("PastTheEndByOne", func(p *pair) verbs.SendWR { return use(p, bound(p, remoteAccess), 57) })
			access("BeforeTheStartByOne", func(p *pair) verbs.SendWR { return use(p, bound(p, remoteAccess), -1) })
		} else {
			access("PastTheEnd", func(p *pair) verbs.SendWR { return use(p, bound(p, remoteAccess), 64) })
			access("BeforeTheStart", func(p *pair) verbs.SendWR { return use(p, bound(p, remoteAccess), -8) })
		}
		access("NoRight", func(p *pair) verbs.SendWR { return use(p, bound(p, remoteAccess&^right[op]), 0) })
		access("NoRightAtAll", func(p *pair) verbs.SendWR { return use(p, bound(p, 0), 0) })
		access("Deallocated", func(p *pair) verbs.SendWR {
			w := bound(p, remoteAccess)
			p.l.must("deallocate", w.mw.Dealloc())
			return use(p, w, 0)
		})
	}

	type bindCase struct {
		name string
		bad  func(p *pair) verbs.SendWR
	}
	plain := func(r func(p *pair) *region, off, n int, a verbs.Access) func(p *pair) verbs.SendWR {
		return func(p *pair) verbs.SendWR { return p.a.window(t).bindWR(0, r(p), off, n, a) }
	}
	of := func(a verbs.Access) func(p *pair) *region {
		return func(p *pair) *region { return p.a.region(64, a) }
	}
	binds := []bindCase{
		{"RegionAdmitsNone", plain(of(allAccess), 0, 64, remoteAccess)},
		{"PastTheEndByOne", plain(of(bindAccess), 1, 64, remoteAccess)},
		{"BeforeTheStartByOne", plain(of(bindAccess), -1, 64, remoteAccess)},
		{"Outside", plain(of(bindAccess), 64, 1, remoteAccess)},
		{"WriteWithoutLocalWrite", plain(of(verbs.AccessRemoteRead|verbs.AccessMWBind), 0, 64, verbs.AccessRemoteWrite)},
		{"AtomicWithoutLocalWrite", plain(of(verbs.AccessRemoteRead|verbs.AccessMWBind), 0, 64, verbs.AccessRemoteAtomic)},
		{"RegionOfOtherPD", plain(func(p *pair) *region { return p.a.regionIn(p.a.allocPD(), 64, bindAccess) }, 0, 64, remoteAccess)},
		{"WindowOfOtherPD", func(p *pair) verbs.SendWR {
			return p.a.windowIn(p.a.allocPD(), t).bindWR(0, p.a.region(64, bindAccess), 0, 64, remoteAccess)
		}},
		{"RegionDeregistered", func(p *pair) verbs.SendWR {
			r := p.a.region(64, bindAccess)
			p.l.deregister("deregister", r)
			return p.a.window(t).bindWR(0, r, 0, 64, remoteAccess)
		}},
		{"WindowDeallocated", func(p *pair) verbs.SendWR {
			w := p.a.window(t)
			p.l.must("deallocate", w.mw.Dealloc())
			return w.bindWR(0, p.a.region(64, bindAccess), 0, 64, remoteAccess)
		}},
		{"AnotherIndex", func(p *pair) verbs.SendWR {
			wr := p.a.window(t).bindWR(0, p.a.region(64, bindAccess), 0, 64, remoteAccess)
			wr.Bind.Key ^= 0x100
			return wr
		}},
		{"AddressWraps", func(p *pair) verbs.SendWR {
			wr := p.a.window(t).bindWR(0, p.a.region(64, bindAccess), 0, 64, remoteAccess)
			wr.Bind.Addr, wr.Bind.Length = wr.Bind.Addr+8, ^uint64(0)
			return wr
		}},
	}
	if type2(t) {
		binds = append(binds,
			bindCase{"NoLength", plain(of(bindAccess), 0, 0, remoteAccess)},
			bindCase{"NoRegion", func(p *pair) verbs.SendWR {
				w := p.a.window(t)
				return verbs.SendWR{Opcode: verbs.OpBindMW, Bind: &verbs.MWBind{MW: w.mw, Key: verbs.UpdateFastRegKey(w.key)}}
			}},
			bindCase{"BoundAlready", func(p *pair) verbs.SendWR {
				w, r := p.a.window(t), p.a.region(64, bindAccess)
				p.a.bind(w, r, 0, 64, remoteAccess)
				return w.bindWR(0, r, 0, 64, remoteAccess)
			}})
	} else {
		binds = append(binds, bindCase{"ZeroBased", plain(of(bindAccess), 0, 64, remoteAccess|verbs.AccessZeroBased)})
	}
	for _, c := range binds {
		fs = append(fs, fault{name: "MW_BIND/" + c.name, status: verbs.WCMWBindErr, bad: c.bad}.orAtPost())
	}
	return append(fs, fault{name: "LOC_PROT/WindowKeyAsLKey", status: verbs.WCLocProtErr, bad: func(p *pair) verbs.SendWR {
		w, r := p.a.window(t), p.a.region(64, bindAccess)
		p.a.bind(w, r, 0, 64, remoteAccess)
		return sendWR(0, []verbs.SGE{{Addr: w.addr, Length: 8, LKey: verbs.LKey(w.key)}})
	}})
}

// windowInvalidFault: a window of type 1 is never freed by invalidation, one of type 2 not while it is free.
func windowInvalidFault(l *lab, t verbs.MWType) {
	fault{status: verbs.WCLocQPOpErr, bad: func(p *pair) verbs.SendWR {
		w := p.a.window(t)
		if !type2(t) {
			p.a.bind(w, p.a.region(64, bindAccess), 0, 64, remoteAccess)
		}
		return invWR(0, w.key)
	}}.run(l)
}

// badWindowInvalidations are keys of windows, or of regions because of them, that a peer's SEND may not free.
func badWindowInvalidations(t verbs.MWType) []badInvalidation {
	bound := func(e *end) *window {
		w := e.windowIn(e.qp.PD(), t)
		r := e.regionIn(e.qp.PD(), 64, bindAccess)
		e.bind(w, r, 0, 64, remoteAccess)
		return w
	}
	cases := []badInvalidation{
		{"RegionWithWindow", func(p *pair) verbs.RKey {
			f := p.b.valid(1, bindAccess)
			p.b.bind(p.b.window(t), &f.region, 0, 64, remoteAccess)
			return f.key
		}},
		{"OtherPD", func(p *pair) verbs.RKey { return bound(p.b.worker(p.b.allocPD())).key }},
	}
	if !type2(t) {
		return append(cases, badInvalidation{"Type1", func(p *pair) verbs.RKey { return bound(p.b).key }})
	}
	return append(cases,
		badInvalidation{"NeverBound", func(p *pair) verbs.RKey { return p.b.window(t).key }},
		badInvalidation{"KeyVariant", func(p *pair) verbs.RKey { return bound(p.b).key ^ 1 }},
		badInvalidation{"OtherQP", func(p *pair) verbs.RKey { return bound(p.b.worker(p.b.pd)).key }})
}

// stressWindow: windows over parts of one region are bound, used and unbound over several QPs at once.
func stressWindow(l *lab, t verbs.MWType) {
	const part = 4000
	r := l.b.region(4*part, verbs.AccessLocalWrite|verbs.AccessMWBind)
	var fs []func() error
	for g := range 4 {
		p := l.pair()
		w := l.b.window(t)
		buf := l.a.region(2*part, verbs.AccessLocalWrite)
		fs = append(fs, func() error {
			for i := range 50 {
				n := 1 + (i*977)%part
				if err := p.b.post(w.bindWR(1, r, g*part, n, verbs.AccessRemoteRead|verbs.AccessRemoteWrite)); err != nil {
					return err
				}
				if err := collect(p.b.scq, 1, nil); err != nil {
					return fmt.Errorf("bind: %w", err)
				}
				data := pattern(byte(g*50+i), n)
				copy(buf.mem, data)
				if err := p.a.post(w.wr(2, verbs.OpWrite, buf.sg(0, n), 0), w.wr(3, verbs.OpRead, buf.sg(part, n), 0)); err != nil {
					return err
				}
				if err := collect(p.a.scq, 2, nil); err != nil {
					return fmt.Errorf("use: %w", err)
				}
				if !slices.Equal(buf.mem[part:part+n], data) {
					return fmt.Errorf("round %d: read something else than was written", i)
				}
				wr, _ := w.endWR(4)
				if err := p.b.post(wr); err != nil {
					return err
				}
				if err := collect(p.b.scq, 1, nil); err != nil {
					return fmt.Errorf("unbind: %w", err)
				}
			}
			return nil
		})
	}
	l.together(fs...)
	l.deregister("nothing is bound", r)
}
