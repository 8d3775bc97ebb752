package verbstest

import (
	"errors"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"github.com/openrds/openrds/verbs"
)

// Memory management extensions: regions that work requests map and unmap (rocev2 spec 4.11, 6.3 to 6.5).

func fastRegCases() (cases []testcase) {
	cases = []testcase{
		{"BadAllocations", badFastRegAllocations},
		{"BadPosts", badFastRegPosts},
		{"ParentsAreBusy", fastRegParents},
		{"PageList/Shapes", pageListShapes},
		{"PageList/BusyWhileQueued", pageListQueued},
		{"PageList/BusyUntilFlushed", pageListFlushed},
		{"PageList/FreeAfterClose", pageListClosed},
		{"PageList/OneRequestAtATime", pageListShared},
		{"PageList/ChangedLater", pageListChanged},
		{"MapUseUnmap", mapUseUnmap},
		{"LargestList", largestList},
		{"FirstUseInOneBatch", firstUseInBatch},
		{"RemapInOneBatch", remapInBatch},
		{"EveryVariant", everyVariant},
		{"Unsignaled", fastRegUnsignaled},
		{"SharedByQPs", fastRegShared},
		{"Fence", fastRegFence},
		{"LocalInv/OvertakesOtherMemory", localInvOvertakes},
		{"LocalInv/WaitsForRead", localInvAfterRead},
		{"LocalInv/WaitsForSend", localInvAfterSend},
		{"LocalInv/DuringPeersWrite", localInvDuringWrite},
		{"LocalInv/DuringPeersRead", localInvDuringRead},
		{"SendWithInv/Sizes", sendWithInvSizes},
		{"SendWithInv/AfterWrite", sendWithInvAfterWrite},
		{"SendWithInv/OfItsOwnBuffer", sendWithInvOfBuffer},
		{"SendWithInv/ThenMapAgain", sendWithInvRemap},
		{"SendWithInv/DuringRead", sendWithInvDuringRead},
		{"Deregister/Valid", deregisterValid},
		{"Deregister/DuringPeersRead", deregisterFastDuringRead},
		{"Deregister/PostedRegistration", deregisterPosted},
		{"Deregister/FromFreeAndStale", deregisterStates},
		{"ERR/FlushesRegistrations", fastRegFlush},
		{"Stress/MapReadInvalidate", stressFastReg},
		{"Stress/SharedPool", stressFastRegPool},
	}
	for _, f := range append(fastRegLocalFaults(), fastRegRemoteFaults()...) {
		cases = append(cases, testcase{f.name, f.run})
	}
	for _, c := range badInvalidations() {
		cases = append(cases, testcase{"SendWithInv/Refused/" + c.name, func(l *lab) { sendWithInvRefused(l, c.key) }})
	}
	for i := range cases {
		cases[i].run = needs(verbs.CapMemMgtExtensions, cases[i].run)
	}
	for _, c := range []testcase{
		{"ReadWithInv", readWithInv},
		{"ReadWithInv/OfAnotherRegion", readWithInvOther},
	} {
		cases = append(cases, testcase{c.name, needs(verbs.CapMemMgtExtensions|verbs.CapReadWithInv, c.run)})
	}
	return cases
}

// segments is memory in the order a page list names it.
type segments [][]byte

func (s segments) len() (n int) {
	for _, b := range s {
		n += len(b)
	}
	return n
}

// bytes is a copy of n bytes at off.
func (s segments) bytes(off, n int) []byte {
	return slices.Concat(s...)[off : off+n]
}

// put writes b at off.
func (s segments) put(off int, b []byte) {
	for _, seg := range s {
		if off >= len(seg) {
			off -= len(seg)
			continue
		}
		b = b[copy(seg[off:], b):]
		off = 0
	}
}

// pages is n pages of memory that a page list may name, poisoned.
func (l *lab) pages(n int) []byte {
	mem := make([]byte, (n+1)*verbs.PageSize)
	l.pins.Pin(&mem[0])
	mem = mem[-uintptr(unsafe.Pointer(&mem[0]))%verbs.PageSize:][:n*verbs.PageSize]
	for i := range mem {
		mem[i] = poison
	}
	return mem
}

// fast is a region for fast registration with a page list and as many pages of memory of its own.
type fast struct {
	region // its mem is all the pages
	l      *lab
	list   verbs.PageList
	segs   segments   // what the list names
	key    verbs.RKey // of the last registration posted, executed or not
	iova   uint64
}

func (n *node) fast(pages int) *fast {
	n.l.Helper()
	return n.fastIn(n.pd, pages)
}

func (n *node) fastIn(pd verbs.PD, pages int) *fast {
	n.l.Helper()
	mr, err := pd.AllocFastRegMR(pages)
	n.l.must("allocate a region for fast registration on "+n.name, err)
	n.l.mrs = append(n.l.mrs, mr)
	f := &fast{region: region{mr, n.l.pages(pages)}, l: n.l, list: n.pageListIn(pd, pages), key: mr.RKey()}
	f.set(f.mem)
	return f
}

func (n *node) pageListIn(pd verbs.PD, pages int) verbs.PageList {
	n.l.Helper()
	list, err := pd.AllocPageList(pages)
	n.l.must("allocate a page list on "+n.name, err)
	n.l.lists = append(n.l.lists, list)
	return list
}

// set makes the list name segs.
func (f *fast) set(segs ...[]byte) {
	f.l.Helper()
	f.l.must("set the page list", f.list.Set(segs))
	f.segs = segs
	if f.list.Len() != f.segs.len() {
		f.l.Fatalf("the list names %d bytes, want %d", f.list.Len(), f.segs.len())
	}
}

// regWR is the next registration of what the list names: with the next key, at an address of its own.
func (f *fast) regWR(id uint64, access verbs.Access) verbs.SendWR {
	f.key = verbs.UpdateFastRegKey(f.key)
	first := uint64(uintptr(unsafe.Pointer(&f.segs[0][0])) % verbs.PageSize)
	f.iova = f.l.nextIOVA(len(f.mem)+verbs.PageSize) + first
	return verbs.SendWR{ID: id, Opcode: verbs.OpFastRegMR, Flags: verbs.SendSignaled,
		FastReg: &verbs.FastReg{MR: f.mr, Key: f.key, Pages: f.list, IOVA: f.iova, Access: access}}
}

func (f *fast) invWR(id uint64) verbs.SendWR { return invWR(id, f.key) }

func invWR(id uint64, key verbs.RKey) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpLocalInv, Flags: verbs.SendSignaled, InvalidateRKey: key}
}

// sge names n bytes at off of the last registration posted.
func (f *fast) sge(off, n int) verbs.SGE {
	return verbs.SGE{Addr: f.iova + uint64(off), Length: uint32(n), LKey: verbs.LKey(f.key)}
}

func (f *fast) sg(off, n int) []verbs.SGE { return []verbs.SGE{f.sge(off, n)} }

const regID = 1 << 41 // of requests that prepare what a case is about

// register posts a registration on e and waits for it.
func (e *end) register(f *fast, access verbs.Access) {
	e.l.Helper()
	wr := f.regWR(regID, access)
	e.send(wr)
	*wr.FastReg = verbs.FastReg{} // it was copied
	e.wantSent("the registration completes", regID, verbs.WCFastRegMR)
	if f.mr.RKey() != f.key || f.mr.LKey() != verbs.LKey(f.key) || f.mr.Addr() != f.iova || f.mr.Len() != f.segs.len() {
		e.l.Fatalf("a region is what its last registration made it: keys %#x and %#x, %d bytes at %#x, want %#x, %d at %#x",
			f.mr.RKey(), f.mr.LKey(), f.mr.Len(), f.mr.Addr(), f.key, f.segs.len(), f.iova)
	}
}

// invalidate posts the invalidation of f on e and waits for it.
func (e *end) invalidate(f *fast) {
	e.l.Helper()
	e.send(f.invWR(regID + 1))
	e.wantSent("the invalidation completes", regID+1, verbs.WCLocalInv)
}

// valid is a region of the node's that QP e has registered whole.
func (e *end) valid(pages int, access verbs.Access) *fast {
	e.l.Helper()
	f := e.fastIn(e.qp.PD(), pages)
	e.register(f, access)
	return f
}

// freed is one that was invalidated since.
func (e *end) freed(pages int, access verbs.Access) *fast {
	e.l.Helper()
	f := e.valid(pages, access)
	e.invalidate(f)
	return f
}

// worker is a QP of n in pd in RTS that nothing depends on: for local operations.
func (n *node) worker(pd verbs.PD) *end {
	n.l.Helper()
	return n.l.pairOf(n.newEndIn(pd, n.qpConfig(verbs.RC)), n.newEnd(n.qpConfig(verbs.RC))).a
}

// works checks that the last registration posted of f is in force, by a WRITE that node e.node makes from it over a
// connection of its own, or that it is not.
func (f *fast) works(e *end, what string, want bool) {
	f.l.Helper()
	w := e.worker(e.qp.PD())
	dst := e.region(8, allAccess)
	w.send(remoteWR(regID+2, verbs.OpWrite, f.sg(0, 8), dst, 0))
	if !want {
		w.wantSendStatus(what, verbs.WCLocProtErr, regID+2)
		return
	}
	w.wantSent(what, regID+2, verbs.WCWrite)
}

func badFastRegAllocations(l *lab) {
	most := l.a.dev.Attr().MaxFastRegPageListLen
	for _, n := range []int{0, -1, most + 1} {
		_, err := l.a.pd.AllocFastRegMR(n)
		l.wantErr(fmt.Sprintf("a region for %d pages", n), err, verbs.ErrInvalid)
		_, err = l.a.pd.AllocPageList(n)
		l.wantErr(fmt.Sprintf("a list for %d pages", n), err, verbs.ErrInvalid)
	}
	keys := map[verbs.RKey]bool{}
	for range 32 {
		f := l.a.fast(1)
		k := f.mr.RKey() >> 8
		if keys[k] || k == 0 {
			l.Fatalf("regions have key indices of their own: %#x", f.mr.RKey())
		}
		keys[k] = true
	}
	pd := l.a.allocPD()
	l.must("close the PD", pd.Close())
	_, err := pd.AllocFastRegMR(1)
	l.wantErr("AllocFastRegMR in a closed PD", err, verbs.ErrClosed)
	_, err = pd.AllocPageList(1)
	l.wantErr("AllocPageList in a closed PD", err, verbs.ErrClosed)
}

// badFastRegPosts: what no execution could make right is refused when it is posted.
func badFastRegPosts(l *lab) {
	p := l.pair()
	f := l.a.fast(2)
	gone := l.a.pageListIn(l.a.pd, 1)
	l.must("close a list", gone.Close())
	for _, c := range []struct {
		name string
		set  func(*verbs.SendWR)
	}{
		{"without parameters", func(wr *verbs.SendWR) { wr.FastReg = nil }},
		{"without a region", func(wr *verbs.SendWR) { wr.FastReg.MR = nil }},
		{"without a list", func(wr *verbs.SendWR) { wr.FastReg.Pages = nil }},
		{"of a region of another device", func(wr *verbs.SendWR) { wr.FastReg.MR = l.b.fast(2).mr }},
		{"with a list of another device", func(wr *verbs.SendWR) { wr.FastReg.Pages = l.b.fast(2).list }},
		{"with a list that is closed", func(wr *verbs.SendWR) { wr.FastReg.Pages = gone }},
	} {
		wr := f.regWR(1, allAccess)
		c.set(&wr)
		n, err := p.a.qp.PostSend([]verbs.SendWR{wr})
		if n != 0 {
			l.Fatalf("a registration %s was taken", c.name)
		}
		l.wantUnusable("a registration "+c.name, err)
	}
	l.must("a list that was refused is free", f.list.Set([][]byte{f.mem}))
	p.a.register(f, allAccess)
}

func fastRegParents(l *lab) {
	pd := l.a.allocPD()
	mr, err := pd.AllocFastRegMR(4)
	l.must("allocate", err)
	l.wantBusy("PD with a region", pd.Close())
	for range 2 {
		l.must("deregister", mr.Deregister())
	}
	list, err := pd.AllocPageList(4)
	l.must("allocate", err)
	l.wantBusy("PD with a page list", pd.Close())
	for range 2 {
		l.must("close the list", list.Close())
	}
	l.wantUnusable("Set of a closed list", list.Set([][]byte{l.pages(1)}))
	l.must("close the PD", pd.Close())
}

// pageListShapes: only the first segment may begin, and only the last end, within a page.
func pageListShapes(l *lab) {
	const pg = verbs.PageSize
	mem := l.pages(16)
	list := l.a.pageListIn(l.a.pd, 4)
	if list.Cap() < 4 || list.Len() != 0 || list.Pages() != 0 {
		l.Fatalf("a new list for 4 pages: room for %d, names %d bytes, %d pages", list.Cap(), list.Len(), list.Pages())
	}
	for _, c := range []struct {
		name  string
		segs  segments
		pages int // 0: refused
	}{
		{"a page", segments{mem[:pg]}, 1},
		{"part of a page", segments{mem[100:200]}, 1},
		{"a byte", segments{mem[pg-1 : pg]}, 1},
		{"across a boundary", segments{mem[pg-1 : pg+1]}, 2},
		{"a page's worth off its boundary", segments{mem[100 : pg+100]}, 2},
		{"as many as fit", segments{mem[:4*pg]}, 4},
		{"as many as fit, begun and ended within", segments{mem[1 : 4*pg-1]}, 4},
		{"pages here and there", segments{mem[8*pg : 9*pg], mem[2*pg : 4*pg], mem[6*pg : 7*pg]}, 4},
		{"begun and ended within, whole between", segments{mem[pg-8 : pg], mem[4*pg : 6*pg], mem[2*pg : 2*pg+1]}, 4},
		{"the first ends within", segments{mem[:100], mem[pg : 2*pg]}, 0},
		{"the last begins within", segments{mem[:pg], mem[2*pg+1 : 3*pg]}, 0},
		{"one between begins within", segments{mem[:pg], mem[2*pg+8 : 3*pg], mem[4*pg : 5*pg]}, 0},
		{"one between ends within", segments{mem[:pg], mem[2*pg : 3*pg-8], mem[4*pg : 5*pg]}, 0},
		{"two short ones in one page", segments{mem[:8], mem[8:16]}, 0},
		{"a byte too many", segments{mem[:4*pg+1]}, 0},
		{"a byte too early", segments{mem[pg-1 : 5*pg-1]}, 0},
		{"a page too many", segments{mem[:pg], mem[2*pg : 4*pg], mem[6*pg : 8*pg]}, 0},
	} {
		before, pages := list.Len(), list.Pages()
		err := list.Set(c.segs)
		if c.pages == 0 {
			l.wantErr(c.name, err, verbs.ErrInvalid)
			if list.Len() != before || list.Pages() != pages {
				l.Fatalf("%s: a refusal changes nothing: %d bytes, %d pages, were %d, %d", c.name, list.Len(), list.Pages(), before, pages)
			}
			continue
		}
		l.must(c.name, err)
		if list.Len() != c.segs.len() || list.Pages() != c.pages || list.Cap() < 4 {
			l.Fatalf("%s: the list names %d bytes in %d of %d pages, want %d in %d of 4", c.name, list.Len(), list.Pages(), list.Cap(), c.segs.len(), c.pages)
		}
	}
}

// wantHeld checks that a list may not be changed.
func (f *fast) wantHeld(what string) {
	f.l.Helper()
	n := f.list.Len()
	f.l.wantErr(what+": Set", f.list.Set([][]byte{f.l.pages(1)}), verbs.ErrBusy)
	f.l.wantErr(what+": Close", f.list.Close(), verbs.ErrBusy)
	if f.list.Len() != n {
		f.l.Fatalf("%s: a refusal changes nothing: %d bytes, were %d", what, f.list.Len(), n)
	}
}

// pageListQueued: between post and completion a list may not be changed.
func pageListQueued(l *lab) {
	p := l.pair()
	f := l.a.fast(4)
	f.set(f.mem[10:9000])
	p.toSQD(p.a, false)
	p.a.send(f.regWR(1, allAccess))
	for range 2 {
		f.wantHeld("a list in a registration that is queued")
	}
	p.a.wantQuiet("SQD executes nothing")
	p.a.to(verbs.StateRTS)
	p.a.wantSent("the registration completes", 1, verbs.WCFastRegMR)
	f.works(p.a, "it maps what the list named when it was posted", true)
	f.set(f.mem[:100])
	l.must("a list no request has can be closed", f.list.Close())
}

// pageListFlushed: a registration that is flushed gives its list back, and registers nothing.
func pageListFlushed(l *lab) {
	for _, fail := range []func(*end){
		func(e *end) { e.to(verbs.StateErr) },
		func(e *end) { e.qp.SetError() },
	} {
		p := l.pair()
		f, g := l.a.fast(2), l.a.fast(2)
		p.toSQD(p.a, false)
		p.a.send(f.regWR(1, allAccess))
		fail(p.a)
		p.a.wantSendStatus("the registration is flushed", verbs.WCFlushErr, 1)
		f.works(p.a, "it did not happen", false)
		f.set(f.mem[:10])
		p.a.send(g.regWR(2, allAccess))
		p.a.wantSendStatus("one posted in ERR is flushed", verbs.WCFlushErr, 2)
		g.set(g.mem[:10])
		l.a.worker(l.a.pd).register(f, allAccess)
	}
}

// pageListClosed: a QP that is reset or closed gives its lists back.
func pageListClosed(l *lab) {
	for _, end := range []func(*end){
		func(e *end) { e.to(verbs.StateReset) },
		func(e *end) { l.must("close the QP", e.qp.Close()) },
	} {
		p := l.pair()
		f := l.a.fast(2)
		p.toSQD(p.a, false)
		p.a.send(f.regWR(1, allAccess))
		f.wantHeld("queued")
		end(p.a)
		f.set(f.mem[:10])
		l.must("the list can be closed", f.list.Close())
		l.deregister("and the region deregistered", &f.region)
		p.a.wantQuiet("without a completion")
	}
}

// pageListShared: a list serves one request at a time.
func pageListShared(l *lab) {
	p := l.pair()
	f, g := l.a.fast(2), l.a.fast(2)
	p.toSQD(p.a, false)
	second := g.regWR(2, allAccess)
	second.FastReg.Pages = f.list
	n, err := p.a.qp.PostSend([]verbs.SendWR{f.regWR(1, allAccess), second})
	if n != 1 {
		l.Fatalf("two registrations of one list: took %d, want 1", n)
	}
	l.wantErr("a list that another request has", err, verbs.ErrBusy)
	p.a.to(verbs.StateRTS)
	p.a.wantSent("the first completes", 1, verbs.WCFastRegMR)
	f.works(p.a, "the first is in force", true)
	p.a.send(second)
	p.a.wantSent("now the other may have it", 2, verbs.WCFastRegMR)
}

// pageListChanged: a completed registration does not depend on its list any more.
func pageListChanged(l *lab) {
	p := l.pair()
	f := l.b.fast(4)
	p.b.register(f, allAccess)
	other := l.pages(2)
	l.must("set the list anew", f.list.Set([][]byte{other}))
	src := l.a.region(8192, 0)
	copy(src.mem, l.nextPattern(8192))
	p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, 8192), &f.region, 100))
	p.a.wantSent("a WRITE", 1, verbs.WCWrite)
	p.fence()
	l.wantBytes("the mapping is the registration's", f.mem[100:100+8192], src.mem)
	l.publish()
	l.must("close the list", f.list.Close())
	p.a.send(remoteWR(2, verbs.OpWrite, src.sg(0, 8192), &f.region, 0))
	p.a.wantSent("a WRITE after the list is gone", 2, verbs.WCWrite)
	p.fence()
	l.wantBytes("the mapping is the registration's", f.mem[:8192], src.mem)
	for i, b := range other {
		if b != poison {
			l.Fatalf("what was never registered is untouched: byte %d is %#x", i, b)
		}
	}
}

// layouts cut 16 pages into the segments of a list.
var layouts = []struct {
	name string
	cut  func(mem []byte) segments
}{
	{"Whole", func(m []byte) segments { return segments{m} }},
	{"PartOfPage", func(m []byte) segments { return segments{m[8:900]} }},
	{"OffBoundaries", func(m []byte) segments { return segments{m[4000 : 16*4096-24]} }},
	{"Scattered", func(m []byte) segments {
		return segments{m[7*4096 : 8*4096], m[:3*4096], m[12*4096 : 13*4096], m[5*4096 : 6*4096]}
	}},
	{"ScatteredOffBoundaries", func(m []byte) segments {
		return segments{m[9*4096+4080 : 10*4096], m[14*4096 : 15*4096], m[4*4096 : 6*4096], m[2*4096 : 2*4096+48]}
	}},
	{"Backwards", func(m []byte) (s segments) {
		for i := 15; i >= 0; i-- {
			s = append(s, m[i*4096:(i+1)*4096])
		}
		return s
	}},
}

// mapUseUnmap does every kind of access to regions of various layouts: each byte is where the list says, and
// nothing around is touched.
func mapUseUnmap(l *lab) {
	p := l.pair()
	for _, lay := range layouts {
		f := l.b.fast(16)
		f.set(lay.cut(f.mem)...)
		n := f.segs.len()
		copyOf := slices.Clone(f.mem)
		want := lay.cut(copyOf)
		p.b.register(f, allAccess)
		peer := l.a.region(n, allAccess)
		check := func(what string) {
			l.Helper()
			p.fence()
			l.wantBytes(lay.name+": "+what, f.mem, copyOf)
			l.publish() // that it was read, before the next is written
		}
		for _, r := range [][2]int{{0, n}, {0, 1}, {n - 1, 1}, {n / 3, n / 2}, {15, 1}, {n - 17, 16}} {
			off, size := r[0], r[1]
			data := l.nextPattern(size)
			copy(peer.mem, data)
			p.a.send(remoteWR(1, verbs.OpWrite, peer.sg(0, size), &f.region, off))
			p.a.wantSent("a WRITE into it", 1, verbs.WCWrite)
			want.put(off, data)
			check("a WRITE")

			clear(peer.mem)
			p.a.send(remoteWR(2, verbs.OpRead, peer.sg(0, size), &f.region, off))
			p.a.wantRead("a READ from it", 2, size)
			l.wantBytes(lay.name+": a READ", peer.mem[:size], data)

			clear(peer.mem)
			p.a.recv(verbs.RecvWR{ID: 30, SGs: peer.sg(0, size)})
			p.b.send(sendWR(3, f.sg(off, size)))
			p.a.wantRecvd("a SEND from it arrives", 30, size)
			p.b.wantSent("a SEND from it completes", 3, verbs.WCSend)
			l.wantBytes(lay.name+": a SEND", peer.mem[:size], data)

			data = l.nextPattern(size)
			copy(peer.mem, data)
			p.b.recv(verbs.RecvWR{ID: 40, SGs: f.sg(off, size)})
			p.a.send(sendWR(4, peer.sg(0, size)))
			p.b.wantRecvd("a SEND into it", 40, size)
			p.a.wantSent("a SEND into it", 4, verbs.WCSend)
			want.put(off, data)
			check("a receive")

			data = l.nextPattern(size)
			copy(peer.mem, data)
			l.publish()
			p.b.send(remoteWR(5, verbs.OpRead, f.sg(off, size), peer, 0))
			p.b.wantRead("a READ into it", 5, size)
			want.put(off, data)
			check("a READ sink")

			clear(peer.mem)
			l.publish()
			p.b.send(remoteWR(6, verbs.OpWrite, f.sg(off, size), peer, 0))
			p.b.wantSent("a WRITE from it", 6, verbs.WCWrite)
			p.fenceB()
			l.wantBytes(lay.name+": a WRITE's source", peer.mem[:size], data)
		}
		// Two elements of one list, the second before the first.
		data := l.nextPattern(n)
		copy(peer.mem, data)
		p.b.recv(verbs.RecvWR{ID: 50, SGs: []verbs.SGE{f.sge(n/2, n-n/2), f.sge(0, n/2)}})
		p.a.send(sendWR(7, peer.sg(0, n)))
		p.b.wantRecvd("a SEND into both halves", 50, n)
		p.a.wantSent("a SEND into both halves", 7, verbs.WCSend)
		want.put(n/2, data[:n-n/2])
		want.put(0, data[n-n/2:])
		check("two elements")

		if l.b.dev.Attr().Caps&verbs.CapAtomics != 0 { // every layout begins at a multiple of 8
			old := getWord(f.segs.bytes(0, 8))
			l.publish()
			wr := remoteWR(8, verbs.OpFetchAdd, peer.sg(0, 8), &f.region, 0)
			wr.CompareAdd = 5
			p.a.send(wr)
			p.a.wantSent("an atomic", 8, verbs.WCFetchAdd)
			if got := getWord(peer.mem); got != old {
				l.Fatalf("%s: an atomic returns the value before: %#x, want %#x", lay.name, got, old)
			}
			var sum [8]byte
			putWord(sum[:], old+5)
			want.put(0, sum[:])
			check("an atomic")
		}
		p.b.invalidate(f)
		f.works(p.b, "unmapped", false)
		l.deregister("deregister", &f.region)
	}
}

// fenceB makes what B did to A's memory visible to this goroutine.
func (p *pair) fenceB() {
	p.l.Helper()
	(&pair{l: p.l, a: p.b, b: p.a, link: p.link}).fence()
}

// largestList maps as many pages as the device admits, none beside the next.
func largestList(l *lab) {
	n := min(l.b.dev.Attr().MaxFastRegPageListLen, 1024)
	p := l.pair()
	f := l.b.fast(n)
	var segs segments
	for i := range n {
		at := i * 7 % n // 7 is no divisor of any size a device gives
		if n%7 == 0 {
			at = n - 1 - i
		}
		segs = append(segs, f.mem[at*verbs.PageSize:(at+1)*verbs.PageSize])
	}
	f.set(segs...)
	if f.list.Pages() != n {
		l.Fatalf("the list names %d pages, want %d", f.list.Pages(), n)
	}
	p.b.register(f, allAccess)
	size := f.segs.len()
	src := l.a.region(size, verbs.AccessLocalWrite)
	data := l.nextPattern(size)
	copy(src.mem, data)
	p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, size), &f.region, 0))
	p.a.wantSent("a WRITE of all of it", 1, verbs.WCWrite)
	p.fence()
	l.wantBytes("every page where the list says", f.segs.bytes(0, size), data)
	clear(src.mem)
	p.a.send(remoteWR(2, verbs.OpRead, src.sg(0, size), &f.region, 0))
	p.a.wantRead("a READ of all of it", 2, size)
	l.wantBytes("every page where the list says", src.mem, data)
}

// firstUseInBatch: requests may use a key that one before them in the queue makes valid.
func firstUseInBatch(l *lab) {
	p := l.pair()
	f, target, sink := l.a.fast(8), l.b.region(20000, allAccess), l.b.region(20000, verbs.AccessLocalWrite)
	data := l.nextPattern(20000)
	copy(f.mem, data)
	p.b.recv(verbs.RecvWR{ID: 20, SGs: sink.sg(0, 20000)})
	p.a.send(f.regWR(1, verbs.AccessLocalWrite), sendWR(2, f.sg(0, 20000)), remoteWR(3, verbs.OpWrite, f.sg(0, 20000), target, 0),
		remoteWR(4, verbs.OpRead, f.sg(10, 19990), target, 0), f.invWR(5))
	p.a.wantSent("the registration", 1, verbs.WCFastRegMR)
	p.a.wantSent("a SEND from it", 2, verbs.WCSend)
	p.a.wantSent("a WRITE from it", 3, verbs.WCWrite)
	p.a.wantRead("a READ into it", 4, 19990)
	p.a.wantSent("the invalidation", 5, verbs.WCLocalInv)
	p.b.wantRecvd("the SEND arrives", 20, 20000)
	l.wantBytes("the SEND's content", sink.mem, data)
	l.wantBytes("the READ's content", f.mem[10:20000], data[:19990])
	f.works(p.a, "nothing of it is left", false)
}

// remapInBatch: one region, mapped to other memory again and again in one queue, without a completion between.
func remapInBatch(l *lab) {
	const rounds, size = 20, 5000
	p := l.pair(func(k *link) { k.cfgA.MaxSendWR, k.cfgA.SendCQ = 64, l.a.cq(256, nil) })
	f := l.a.fast(2)
	sink := l.b.region(rounds*size, verbs.AccessLocalWrite)
	var data []byte
	var wrs []verbs.SendWR
	for i := range uint64(rounds) {
		mem := l.pages(2)
		d := l.nextPattern(size)
		copy(mem[i:], d)
		data = append(data, d...)
		f.list = l.a.pageListIn(l.a.pd, 2)
		f.set(mem[i : i+size])
		reg, send, inv := f.regWR(3*i, 0), sendWR(3*i+1, f.sg(0, size)), f.invWR(3*i+2)
		if i%3 == 1 {
			reg.Flags, inv.Flags = 0, 0
		}
		p.b.recv(verbs.RecvWR{ID: i, SGs: sink.sg(int(i)*size, size)})
		wrs = append(wrs, reg, send, inv)
	}
	p.a.send(wrs...)
	for i := range uint64(rounds) {
		if i%3 != 1 {
			p.a.wantSent("registrations complete in order", 3*i, verbs.WCFastRegMR)
		}
		p.a.wantSent("SENDs complete in order", 3*i+1, verbs.WCSend)
		if i%3 != 1 {
			p.a.wantSent("invalidations complete in order", 3*i+2, verbs.WCLocalInv)
		}
		p.b.wantRecvd("each SEND arrives", i, size)
	}
	l.wantBytes("each SEND carries what was mapped when it was its turn", sink.mem, data)
}

// everyVariant goes through all variants of a key, and past the end.
func everyVariant(l *lab) {
	p := l.pair()
	f := l.b.fast(1)
	index := f.mr.RKey() >> 8
	src := l.a.region(8, 0)
	seen := map[verbs.RKey]bool{}
	for i := range 300 {
		p.b.register(f, allAccess)
		if f.key>>8 != index || i < 256 && seen[f.key] {
			l.Fatalf("registration %d has key %#x: 256 of them differ, in the variant", i, f.key)
		}
		seen[f.key] = true
		if i%16 == 0 {
			p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, 8), &f.region, 0))
			p.a.wantSent("its key is good", 1, verbs.WCWrite)
		}
		p.b.invalidate(f)
	}
}

func fastRegUnsignaled(l *lab) {
	p := l.pair()
	f, g := l.a.fast(1), l.a.fast(1)
	for range 100 {
		reg, inv, last := f.regWR(1, 0), f.invWR(2), g.regWR(3, 0)
		reg.Flags, inv.Flags = 0, 0
		p.a.send(reg, inv, last)
		p.a.wantSent("only what is signaled completes", 3, verbs.WCFastRegMR)
		f.set(f.mem) // a later completion was polled: the list is ours again
		p.a.invalidate(g)
	}
	p.a.wantQuiet("nothing else")
}

// fastRegShared: a region belongs to its PD: any QP may use it, map it, unmap it.
func fastRegShared(l *lab) {
	p, q := l.pair(), l.pair()
	f := l.b.fast(2)
	p.b.register(f, allAccess)
	q.a.send(remoteWR(1, verbs.OpWrite, newSink(q.a), &f.region, 0))
	q.a.wantSent("another QP's peer writes", 1, verbs.WCWrite)
	q.b.invalidate(f)
	f.works(p.b, "another QP has unmapped it", false)
	q.b.register(f, allAccess)
	p.a.send(remoteWR(2, verbs.OpWrite, newSink(p.a), &f.region, 0))
	p.a.wantSent("and mapped it", 2, verbs.WCWrite)
}

// fastRegFence: a fenced registration waits for READs before it, one that is not does not.
func fastRegFence(l *lab) {
	p := l.deaf()
	remote, f, g := l.b.region(64, allAccess), l.a.fast(1), l.a.fast(1)
	fenced := g.regWR(3, 0)
	fenced.Flags |= verbs.SendFence
	p.a.send(remoteWR(1, verbs.OpRead, newSink(p.a), remote, 0), f.regWR(2, 0), fenced)
	l.await("the registration that is not fenced is executed", func() bool { return f.mr.RKey() == f.key })
	p.a.wantQuiet("but completes in order")
	f.works(p.a, "it is in force", true)
	g.works(p.a, "the fenced one is not", false)
	p.hears()
	p.a.wantRead("the READ", 1, 8)
	p.a.wantSent("the registration", 2, verbs.WCFastRegMR)
	p.a.wantSent("the fenced registration", 3, verbs.WCFastRegMR)
	g.works(p.a, "now it is in force", true)
}

// localInvOvertakes: an invalidation does not wait for requests that have nothing to do with its region, however
// long their peer takes. It completes behind them all the same.
func localInvOvertakes(l *lab) {
	p := l.deaf()
	f := p.a.valid(2, verbs.AccessLocalWrite)
	old := *f
	other := p.a.valid(2, verbs.AccessLocalWrite)
	remote := l.b.region(4096, allAccess)
	copy(f.mem[100:], l.nextPattern(8))
	want := slices.Clone(f.mem[100:108])
	p.a.send(
		remoteWR(1, verbs.OpRead, other.sg(0, 4096), remote, 0),
		remoteWR(2, verbs.OpWrite, newSink(p.a), remote, 0),
		sendWR(3, nil),
		f.invWR(4))
	f.set(f.mem[100:4196])
	p.a.send(f.regWR(5, verbs.AccessLocalWrite))
	l.await("unmapped and mapped anew behind requests without an answer", func() bool { return f.mr.RKey() == f.key })
	p.a.wantQuiet("but completed in order")
	old.works(p.a, "the old key", false)
	// The new mapping is in use while the READs before it in the queue still wait.
	w := l.a.worker(l.a.pd)
	dst := l.a.region(8, allAccess)
	w.send(remoteWR(6, verbs.OpWrite, f.sg(0, 8), dst, 0))
	w.wantSent("a WRITE from the new mapping", 6, verbs.WCWrite)
	p.b.recvEmpty(20)
	p.hears()
	p.a.wantRead("the READ", 1, 4096)
	p.a.wantSent("the WRITE", 2, verbs.WCWrite)
	p.a.wantSent("the SEND", 3, verbs.WCSend)
	p.a.wantSent("the invalidation", 4, verbs.WCLocalInv)
	p.a.wantSent("the registration", 5, verbs.WCFastRegMR)
	l.wantBytes("what the new mapping maps", dst.mem, want)
}

// localInvAfterRead: an invalidation waits for an earlier READ into its region.
func localInvAfterRead(l *lab) {
	p := l.deaf()
	f := p.a.valid(4, verbs.AccessLocalWrite)
	key := f.key
	const n = 3*verbs.PageSize + 77
	remote := l.b.region(n, allAccess)
	data := l.nextPattern(n)
	copy(remote.mem, data)
	read := remoteWR(1, verbs.OpRead, f.sg(3, n), remote, 0)
	works := *f
	p.a.send(read, f.invWR(2), f.regWR(3, verbs.AccessLocalWrite))
	works.works(p.a, "while the READ waits the region is mapped", true)
	l.settle()
	if f.mr.RKey() != key {
		l.Fatal("an invalidation overtook a READ into its region")
	}
	p.hears()
	p.a.wantRead("the READ", 1, n)
	p.a.wantSent("the invalidation", 2, verbs.WCLocalInv)
	p.a.wantSent("the next registration", 3, verbs.WCFastRegMR)
	l.wantBytes("the READ has arrived whole", f.mem[3:3+n], data)
	works.works(p.a, "the old key is gone", false)
	f.works(p.a, "the new key is good", true)
}

// localInvAfterSend: and for an earlier SEND or WRITE from it, which may have to be sent again.
func localInvAfterSend(l *lab) {
	for _, op := range []verbs.SendOpcode{verbs.OpSend, verbs.OpWrite} {
		p := l.deaf()
		f := p.a.valid(4, 0)
		const n = 3*verbs.PageSize + 77
		copy(f.mem, l.nextPattern(n))
		data := slices.Clone(f.mem[:n])
		dst := l.b.region(n, allAccess)
		p.b.recv(verbs.RecvWR{ID: 20, SGs: dst.sg(0, n)})
		wr, done := remoteWR(1, op, f.sg(0, n), dst, 0), verbs.WCWrite
		if op == verbs.OpSend {
			done = verbs.WCSend
		}
		works := *f
		other := l.pages(4)
		p.a.send(wr, f.invWR(2))
		f.set(other)
		p.a.send(f.regWR(3, 0))
		works.works(p.a, "while its data is not acknowledged the region is mapped", true)
		p.hears()
		p.a.wantSent("the request", 1, done)
		p.a.wantSent("the invalidation", 2, verbs.WCLocalInv)
		p.a.wantSent("the next registration", 3, verbs.WCFastRegMR)
		if op == verbs.OpSend {
			p.b.wantRecvd("the SEND", 20, n)
		} else {
			p.a.send(sendWR(4, nil))
			p.b.wantRecvd("a SEND behind the WRITE", 20, 0)
			p.a.wantSent("a SEND behind the WRITE", 4, verbs.WCSend)
		}
		l.wantBytes("what was sent is what was mapped", dst.mem, data)
	}
}

// megabyte is 1 MiB in pages, or the most a device maps.
func (n *node) megabyte() int { return min(256, n.dev.Attr().MaxFastRegPageListLen) }

// localInvDuringWrite: nothing is written once the invalidation has completed.
func localInvDuringWrite(l *lab) {
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		f := p.b.valid(l.b.megabyte(), allAccess)
		n := len(f.mem)
		src := l.a.region(n, 0)
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), &f.region, 0), remoteWR(2, verbs.OpWrite, src.sg(0, n), &f.region, 0))
		time.Sleep(pause)
		l.within(promptly, "invalidate", func() { p.b.invalidate(f) })
		for i := range f.mem {
			f.mem[i] = 0x77
		}
		l.settle()
		for i, b := range f.mem {
			if b != 0x77 {
				l.Fatalf("%v into a WRITE: byte %d was written after the invalidation", pause, i)
			}
		}
		p.writtenOrRefused()
	}
}

// localInvDuringRead: what is read successfully is what was there before the invalidation.
func localInvDuringRead(l *lab) {
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		f := l.b.fast(l.b.megabyte())
		n := len(f.mem)
		data := l.nextPattern(n)
		copy(f.mem, data)
		p.b.register(f, verbs.AccessRemoteRead)
		sink := l.a.region(n, verbs.AccessLocalWrite)
		p.a.send(remoteWR(1, verbs.OpRead, sink.sg(0, n), &f.region, 0))
		time.Sleep(pause)
		l.within(promptly, "invalidate", func() { p.b.invalidate(f) })
		clear(f.mem) // ours again
		p.wholeOrError(sink, data)
	}
}

// wantInvalidated expects a SEND of n bytes in receive request id that has invalidated key.
func (e *end) wantInvalidated(what string, id uint64, n int, key verbs.RKey) {
	e.l.Helper()
	wc := e.wantWC(what, e.rcq, verbs.WC{ID: id, Opcode: verbs.WCRecv, Flags: verbs.WCWithInvalidate, ByteLen: uint32(n)})
	if wc.InvRKey != key {
		e.l.Fatalf("%s: the completion names key %#x, want %#x", what, wc.InvRKey, key)
	}
}

func sendInvWR(id uint64, sgs []verbs.SGE, key verbs.RKey) verbs.SendWR {
	wr := sendWR(id, sgs)
	wr.Opcode, wr.InvalidateRKey = verbs.OpSendWithInv, key
	return wr
}

// sendWithInvSizes: the data is placed, the region freed, the receiver told.
func sendWithInvSizes(l *lab) {
	for _, s := range sizes {
		p := l.pair()
		n := s.bytes(p.mtu.Bytes())
		f := p.b.valid(1, allAccess)
		src, dst := l.a.region(n+8, 0), l.b.region(n+8, verbs.AccessLocalWrite)
		data := l.nextPattern(n)
		copy(src.mem, data)
		p.b.recv(verbs.RecvWR{ID: 20, SGs: dst.sg(0, n+8)}, verbs.RecvWR{ID: 21})
		p.a.send(sendInvWR(1, src.sg(0, n), f.key), sendWR(2, nil))
		p.b.wantInvalidated(s.name+" bytes", 20, n, f.key)
		l.wantBytes("the data is in place", dst.mem[:n], data)
		p.a.wantSent("the SEND with invalidate", 1, verbs.WCSend)
		p.a.wantSent("what is behind it", 2, verbs.WCSend)
		p.b.wantRecvd("what is behind it", 21, 0)
		f.works(p.b, "the region is free", false)
		p.a.send(remoteWR(3, verbs.OpWrite, newSink(p.a), &f.region, 0))
		p.a.wantRefused("its key is refused", verbs.WCRemAccessErr, 3)
	}
}

// sendWithInvAfterWrite: the usual end of a storage request: the answer written, and the region freed with the
// message that says so.
func sendWithInvAfterWrite(l *lab) {
	p := l.pair()
	f := p.b.valid(8, allAccess)
	n := len(f.mem)
	src, sink := l.a.region(n, verbs.AccessLocalWrite), l.a.region(n, verbs.AccessLocalWrite)
	copy(src.mem, l.nextPattern(n))
	p.b.recvEmpty(20)
	inv := sendInvWR(3, nil, f.key)
	inv.Flags |= verbs.SendFence // a READ whose answer is lost is asked for again
	p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, n), &f.region, 0), remoteWR(2, verbs.OpRead, sink.sg(0, n), &f.region, 0), inv)
	p.b.wantInvalidated("the SEND arrives", 20, 0, f.key)
	l.wantBytes("the WRITE before it is in place", f.mem, src.mem)
	clear(f.mem) // ours again
	p.a.wantSent("the WRITE", 1, verbs.WCWrite)
	p.a.wantRead("the READ", 2, n)
	p.a.wantSent("the SEND", 3, verbs.WCSend)
	l.wantBytes("the READ before it has read it", sink.mem, src.mem)
}

// sendWithInvOfBuffer invalidates the region the message is received into.
func sendWithInvOfBuffer(l *lab) {
	p := l.pair()
	f := p.b.valid(8, verbs.AccessLocalWrite|verbs.AccessRemoteWrite)
	n := len(f.mem)
	src := l.a.region(n, 0)
	copy(src.mem, l.nextPattern(n))
	p.b.recv(verbs.RecvWR{ID: 20, SGs: f.sg(0, n)})
	p.a.send(sendInvWR(1, src.sg(0, n), f.key))
	p.b.wantInvalidated("the SEND arrives", 20, n, f.key)
	p.a.wantSent("the SEND", 1, verbs.WCSend)
	l.wantBytes("the data was placed first", f.mem, src.mem)
	f.works(p.b, "then the region was freed", false)
}

func sendWithInvRemap(l *lab) {
	p := l.pair()
	f := l.b.fast(2)
	src := l.a.region(8192, 0)
	for i := range uint64(40) {
		p.b.register(f, allAccess)
		copy(src.mem, l.nextPattern(8192))
		p.b.recvEmpty(i)
		p.a.send(remoteWR(1, verbs.OpWrite, src.sg(0, 8192), &f.region, 0), sendInvWR(2, nil, f.key))
		p.a.wantSent("the WRITE", 1, verbs.WCWrite)
		p.a.wantSent("the SEND", 2, verbs.WCSend)
		p.b.wantInvalidated("the SEND", i, 0, f.key)
		l.wantBytes("round after round", f.mem, src.mem)
	}
}

// sendWithInvDuringRead: our own READ is no protection against a peer that takes its sink away: what comes later is
// not written.
func sendWithInvDuringRead(l *lab) {
	p, q := l.deaf(), l.pair()
	f := p.a.valid(2, verbs.AccessLocalWrite|verbs.AccessRemoteWrite)
	remote := l.b.region(8192, allAccess)
	p.a.send(remoteWR(1, verbs.OpRead, f.sg(0, 8192), remote, 0))
	q.a.recvEmpty(30)
	q.b.send(sendInvWR(2, nil, f.key))
	q.a.wantInvalidated("a peer frees the sink of a READ", 30, 0, f.key)
	for i := range f.mem {
		f.mem[i] = 0x55 // ours again
	}
	p.hears()
	if wc := p.a.nextWC("the READ", p.a.scq); wc.ID != 1 || wc.Status != verbs.WCLocProtErr && wc.Status != verbs.WCLocAccessErr {
		l.Fatalf("a READ whose sink is gone fails: request %d, %v", wc.ID, wc.Status)
	}
	p.a.wantState("its QP", verbs.StateErr)
	for i, b := range f.mem {
		if b != 0x55 {
			l.Fatalf("byte %d was written after the invalidation", i)
		}
	}
}

// badInvalidation gives a key of B's that a SEND with invalidate over p may not free.
type badInvalidation struct {
	name string
	key  func(p *pair) verbs.RKey
}

func badInvalidations() []badInvalidation {
	return []badInvalidation{
		{"KeyVariant", func(p *pair) verbs.RKey { return p.b.valid(1, allAccess).key ^ 1 }},
		{"KeyZero", func(*pair) verbs.RKey { return 0 }},
		{"KeyIndex", func(p *pair) verbs.RKey { return p.b.valid(1, allAccess).key ^ 0x40000000 }},
		{"Free", func(p *pair) verbs.RKey { return p.b.freed(1, allAccess).key }},
		{"NeverMapped", func(p *pair) verbs.RKey { return p.b.fast(1).key }},
		{"OldKey", func(p *pair) verbs.RKey {
			f := p.b.freed(1, allAccess)
			old := f.key
			p.b.register(f, allAccess)
			return old
		}},
		{"OtherPD", func(p *pair) verbs.RKey { return p.b.worker(p.b.allocPD()).valid(1, allAccess).key }},
		{"Deregistered", func(p *pair) verbs.RKey {
			f := p.b.valid(1, allAccess)
			p.l.deregister("deregister", &f.region)
			return f.key
		}},
	}
}

// sendWithInvRefused: the receive fails with an error of its own, and the QP errs. Whether the sender is told is
// not defined (rocev2 spec 4.6).
func sendWithInvRefused(l *lab, bad func(p *pair) verbs.RKey) {
	p := l.pair(func(k *link) { k.retry = 1 })
	key := bad(p)
	witness := p.b.valid(1, allAccess)
	p.b.recvEmpty(20, 21)
	p.a.send(sendInvWR(10, nil, key))
	wc := p.b.nextWC("the receive completes", p.b.rcq)
	if wc.ID != 20 || wc.Status == verbs.WCSuccess || wc.Status == verbs.WCFlushErr {
		l.Fatalf("the receive fails with an error of its own: request %d, %v", wc.ID, wc.Status)
	}
	p.b.wantRecvStatus("the rest flushes", verbs.WCFlushErr, 21)
	p.b.wantState("the receiver's QP", verbs.StateErr)
	if wc := p.a.nextWC("the sender's request completes", p.a.scq); wc.ID != 10 {
		l.Fatalf("the sender's request completes: got request %d", wc.ID)
	}
	witness.works(p.b, "what it did not name is not touched", true)
}

// readWithInv: the sink is free when the READ completes.
func readWithInv(l *lab) {
	for _, s := range sizes[1:] {
		p := l.pair()
		n := s.bytes(p.mtu.Bytes())
		f := p.a.valid(min((n+2*verbs.PageSize)/verbs.PageSize, l.a.dev.Attr().MaxFastRegPageListLen), verbs.AccessLocalWrite)
		n = min(n, len(f.mem))
		src := l.b.region(n, allAccess)
		copy(src.mem, l.nextPattern(n))
		l.publish()
		read := remoteWR(1, verbs.OpReadWithInv, f.sg(0, n), src, 0)
		read.InvalidateRKey = f.key
		old := *f
		p.a.send(read, f.regWR(2, verbs.AccessLocalWrite), remoteWR(3, verbs.OpRead, f.sg(0, 1), src, n-1))
		wc := p.a.nextWC("the READ with invalidate", p.a.scq)
		wc.Flags = 0
		if msg := diffWC(wc, verbs.WC{ID: 1, Opcode: verbs.WCRead, QPN: p.a.qp.Num(), ByteLen: uint32(n)}); msg != "" {
			l.Fatalf("the READ with invalidate: %s", msg)
		}
		p.a.wantSent("the region is free: it can be registered", 2, verbs.WCFastRegMR)
		p.a.wantRead("and used", 3, 1)
		l.wantBytes("its data is in place", f.mem[1:n], src.mem[1:])
		old.works(p.a, "its old key is gone", false)
	}
}

func readWithInvOther(l *lab) {
	for _, key := range []func(p *pair, sink *fast) verbs.RKey{
		func(_ *pair, sink *fast) verbs.RKey { return sink.key ^ 1 },
		func(p *pair, _ *fast) verbs.RKey { return p.a.freed(1, verbs.AccessLocalWrite).key },
		func(p *pair, _ *fast) verbs.RKey { return p.a.region(8, allAccess).mr.RKey() },
	} {
		p := l.pair()
		f := p.a.valid(1, verbs.AccessLocalWrite)
		read := remoteWR(1, verbs.OpReadWithInv, f.sg(0, 64), p.b.region(64, allAccess), 0)
		read.InvalidateRKey = key(p, f)
		n, err := p.a.qp.PostSend([]verbs.SendWR{read})
		if n == 0 {
			l.wantErr("a READ that would invalidate what is not its sink", err, verbs.ErrInvalid)
			continue
		}
		if wc := p.a.nextWC("the READ", p.a.scq); wc.Status == verbs.WCSuccess || wc.Status == verbs.WCFlushErr {
			l.Fatalf("a READ that would invalidate what is not its sink: %v", wc.Status)
		}
		p.a.wantState("its QP", verbs.StateErr)
	}
}

// Faults of the requester's own: of its memory (LOC_PROT) and of its memory requests (LOC_QP_OP).

func fastRegLocalFaults() (fs []fault) {
	for _, op := range []verbs.SendOpcode{verbs.OpSend, verbs.OpWrite, verbs.OpRead} {
		for _, c := range []struct {
			name string
			sgs  func(p *pair) []verbs.SGE
		}{
			{"NeverMapped", func(p *pair) []verbs.SGE { return p.a.fast(1).sg(0, 8) }},
			{"Free", func(p *pair) []verbs.SGE { return p.a.freed(1, allAccess).sg(0, 8) }},
			{"OldKey", func(p *pair) []verbs.SGE {
				f := p.a.freed(1, allAccess)
				old := verbs.LKey(f.key)
				p.a.register(f, allAccess)
				sg := f.sg(0, 8)
				sg[0].LKey = old
				return sg
			}},
			{"NextKey", func(p *pair) []verbs.SGE {
				sg := p.a.valid(1, allAccess).sg(0, 8)
				sg[0].LKey = verbs.LKey(verbs.UpdateFastRegKey(verbs.RKey(sg[0].LKey)))
				return sg
			}},
			{"PastTheEndByOne", func(p *pair) []verbs.SGE {
				f := p.a.fast(2)
				f.set(f.mem[100:5000])
				p.a.register(f, allAccess)
				return f.sg(4893, 8)
			}},
			{"BeforeTheStartByOne", func(p *pair) []verbs.SGE {
				f := p.a.fast(2)
				f.set(f.mem[100:5000])
				p.a.register(f, allAccess)
				return f.sg(-1, 8)
			}},
			{"OldAddress", func(p *pair) []verbs.SGE {
				f := p.a.freed(1, allAccess)
				old := f.iova
				p.a.register(f, allAccess)
				sg := f.sg(0, 8)
				sg[0].Addr = old
				return sg
			}},
			{"OtherPD", func(p *pair) []verbs.SGE { return p.a.worker(p.a.allocPD()).valid(1, allAccess).sg(0, 8) }},
			{"Deregistered", func(p *pair) []verbs.SGE {
				f := p.a.valid(1, allAccess)
				p.l.deregister("deregister", &f.region)
				return f.sg(0, 8)
			}},
		} {
			fs = append(fs, fault{name: fmt.Sprintf("LOC_PROT/%v/%s", op, c.name), status: verbs.WCLocProtErr,
				bad: func(p *pair) verbs.SendWR { return remoteWR(0, op, c.sgs(p), p.b.region(64, allAccess), 0) }})
		}
	}
	for _, op := range []verbs.SendOpcode{verbs.OpRead, verbs.OpFetchAdd} {
		fs = append(fs, fault{name: fmt.Sprintf("LOC_PROT/%v/NoLocalWrite", op), status: verbs.WCLocProtErr,
			bad: func(p *pair) verbs.SendWR {
				return remoteWR(0, op, p.a.valid(1, verbs.AccessRemoteRead).sg(0, 8), p.b.region(64, allAccess), 0)
			}})
	}
	for _, c := range []struct {
		name string
		bad  func(p *pair) verbs.SendWR
	}{
		{"RegisterValid", func(p *pair) verbs.SendWR { return p.a.valid(1, allAccess).regWR(0, allAccess) }},
		{"RegisterWithAnotherIndex", func(p *pair) verbs.SendWR {
			wr := p.a.fast(1).regWR(0, allAccess)
			wr.FastReg.Key ^= 0x100
			return wr
		}},
		{"RegisterWithKeyZero", func(p *pair) verbs.SendWR {
			wr := p.a.fast(1).regWR(0, allAccess)
			wr.FastReg.Key = 0
			return wr
		}},
		{"RegisterOfOtherPD", func(p *pair) verbs.SendWR { return p.a.fastIn(p.a.allocPD(), 1).regWR(0, allAccess) }},
		{"RegisterDeregistered", func(p *pair) verbs.SendWR {
			f := p.a.fast(1)
			p.l.deregister("deregister", &f.region)
			return f.regWR(0, allAccess)
		}},
		{"InvalidateKeyVariant", func(p *pair) verbs.SendWR { return invWR(0, p.a.valid(1, allAccess).key^1) }},
		{"InvalidateKeyIndex", func(p *pair) verbs.SendWR { return invWR(0, p.a.valid(1, allAccess).key^0x40000000) }},
		{"InvalidateKeyZero", func(p *pair) verbs.SendWR { return invWR(0, 0) }},
		{"InvalidateNeverMapped", func(p *pair) verbs.SendWR { return invWR(0, p.a.fast(1).key) }},
		{"InvalidateTwice", func(p *pair) verbs.SendWR { return invWR(0, p.a.freed(1, allAccess).key) }},
		{"InvalidateOldKey", func(p *pair) verbs.SendWR {
			f := p.a.freed(1, allAccess)
			old := f.key
			p.a.register(f, allAccess)
			return invWR(0, old)
		}},
		{"InvalidatePlainRegion", func(p *pair) verbs.SendWR { return invWR(0, p.a.region(64, allAccess).mr.RKey()) }},
		{"InvalidateOtherPD", func(p *pair) verbs.SendWR { return invWR(0, p.a.worker(p.a.allocPD()).valid(1, allAccess).key) }},
		{"InvalidateDeregistered", func(p *pair) verbs.SendWR {
			f := p.a.valid(1, allAccess)
			p.l.deregister("deregister", &f.region)
			return invWR(0, f.key)
		}},
	} {
		fs = append(fs, fault{name: "LOC_QP_OP/" + c.name, status: verbs.WCLocQPOpErr, bad: c.bad})
	}
	// What can be known when it is posted may be refused then.
	for _, c := range []struct {
		name string
		bad  func(p *pair) verbs.SendWR
	}{
		{"RegisterPlainRegion", func(p *pair) verbs.SendWR {
			wr := p.a.fast(1).regWR(0, allAccess)
			wr.FastReg.MR = p.a.region(64, allAccess).mr
			return wr
		}},
		{"RegisterMorePagesThanFit", func(p *pair) verbs.SendWR {
			wr := p.a.fast(1).regWR(0, allAccess)
			wr.FastReg.Pages = p.a.fast(9).list
			return wr
		}},
		{"RegisterEmptyList", func(p *pair) verbs.SendWR {
			wr := p.a.fast(1).regWR(0, allAccess)
			wr.FastReg.Pages = p.a.pageListIn(p.a.pd, 1)
			return wr
		}},
		{"RegisterRemoteWriteWithoutLocal", func(p *pair) verbs.SendWR { return p.a.fast(1).regWR(0, verbs.AccessRemoteWrite) }},
		{"RegisterRemoteAtomicWithoutLocal", func(p *pair) verbs.SendWR { return p.a.fast(1).regWR(0, verbs.AccessRemoteAtomic) }},
		{"RegisterUnknownRight", func(p *pair) verbs.SendWR { return p.a.fast(1).regWR(0, allAccess|1<<30) }},
		{"RegisterAddressWraps", func(p *pair) verbs.SendWR {
			wr := p.a.fast(2).regWR(0, allAccess)
			wr.FastReg.IOVA = ^uint64(verbs.PageSize - 1)
			return wr
		}},
	} {
		fs = append(fs, fault{name: "LOC_QP_OP/" + c.name, status: verbs.WCLocQPOpErr, bad: c.bad}.orAtPost())
	}
	return fs
}

// orAtPost is a fault that may also be refused when it is posted.
func (f fault) orAtPost() fault {
	bad := f.bad
	f.bad = func(p *pair) verbs.SendWR {
		probe := p.a.worker(p.a.qp.PD())
		if n, err := probe.qp.PostSend([]verbs.SendWR{bad(p)}); n == 0 {
			p.l.wantUnusable("refused when posted", err)
			return verbs.SendWR{}
		}
		return bad(p)
	}
	return f
}

// Faults the responder finds, of regions that were registered fast.

func fastRegRemoteFaults() (fs []fault) {
	right := map[verbs.SendOpcode]verbs.Access{
		verbs.OpWrite: verbs.AccessRemoteWrite, verbs.OpRead: verbs.AccessRemoteRead,
		verbs.OpFetchAdd: verbs.AccessRemoteAtomic, verbs.OpCompareSwap: verbs.AccessRemoteAtomic,
	}
	for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpFetchAdd, verbs.OpCompareSwap} {
		access := func(name string, target func(p *pair) (*fast, verbs.RKey, int)) {
			fs = append(fs, fault{name: fmt.Sprintf("REM_ACCESS/%v/%s", op, name), status: verbs.WCRemAccessErr, peer: peerEvent,
				bad: func(p *pair) verbs.SendWR {
					f, key, off := target(p)
					wr := remoteWR(0, op, newSink(p.a), &f.region, 0)
					wr.RemoteAddr, wr.RKey = f.iova+uint64(off), key
					return wr
				}})
		}
		access("NeverMapped", func(p *pair) (*fast, verbs.RKey, int) { f := p.b.fast(1); return f, f.key, 0 })
		access("Free", func(p *pair) (*fast, verbs.RKey, int) { f := p.b.freed(1, allAccess); return f, f.key, 0 })
		access("OldKey", func(p *pair) (*fast, verbs.RKey, int) {
			f := p.b.freed(1, allAccess)
			old := f.key
			p.b.register(f, allAccess)
			return f, old, 0
		})
		access("NextKey", func(p *pair) (*fast, verbs.RKey, int) {
			f := p.b.valid(1, allAccess)
			return f, verbs.UpdateFastRegKey(f.key), 0
		})
		part := func(p *pair) *fast {
			f := p.b.fast(2)
			f.set(f.mem[96:5000])
			p.b.register(f, allAccess)
			return f
		}
		if op == verbs.OpWrite || op == verbs.OpRead {
			access("PastTheEndByOne", func(p *pair) (*fast, verbs.RKey, int) { f := part(p); return f, f.key, 4904 - 7 })
			access("BeforeTheStartByOne", func(p *pair) (*fast, verbs.RKey, int) { f := part(p); return f, f.key, -1 })
		} else {
			access("PastTheEnd", func(p *pair) (*fast, verbs.RKey, int) { f := part(p); return f, f.key, 4904 })
			access("BeforeTheStart", func(p *pair) (*fast, verbs.RKey, int) { f := part(p); return f, f.key, -8 })
		}
		access("NoRight", func(p *pair) (*fast, verbs.RKey, int) { f := p.b.valid(1, allAccess&^right[op]); return f, f.key, 0 })
		access("LocalOnly", func(p *pair) (*fast, verbs.RKey, int) { f := p.b.valid(1, verbs.AccessLocalWrite); return f, f.key, 0 })
		access("RightOfAnEarlierMapping", func(p *pair) (*fast, verbs.RKey, int) {
			f := p.b.freed(1, allAccess)
			p.b.register(f, allAccess&^right[op])
			return f, f.key, 0
		})
		access("OtherPD", func(p *pair) (*fast, verbs.RKey, int) {
			f := p.b.worker(p.b.allocPD()).valid(1, allAccess)
			return f, f.key, 0
		})
		access("Deregistered", func(p *pair) (*fast, verbs.RKey, int) {
			f := p.b.valid(1, allAccess)
			p.l.deregister("deregister", &f.region)
			return f, f.key, 0
		})
	}
	// A receive into a region that is free when the message comes.
	fs = append(fs, fault{name: "REM_OP/ReceiveIntoFreed", status: verbs.WCRemOpErr, peer: peerCompletion, peerState: verbs.WCLocProtErr,
		bad:   func(p *pair) verbs.SendWR { return sendWR(0, p.a.region(8, 0).sg(0, 8)) },
		recvs: func(p *pair) verbs.RecvWR { return verbs.RecvWR{SGs: p.b.freed(1, allAccess).sg(0, 8)} }})
	return fs
}

func deregisterValid(l *lab) {
	p, q := l.pair(), l.pair()
	f := p.b.valid(2, allAccess)
	p.a.send(remoteWR(1, verbs.OpWrite, newSink(p.a), &f.region, 0))
	p.a.wantSent("a WRITE while registered", 1, verbs.WCWrite)
	l.deregister("deregister a valid region", &f.region)
	l.must("again", f.mr.Deregister())
	p.a.send(remoteWR(2, verbs.OpWrite, newSink(p.a), &f.region, 0))
	p.a.wantRefused("the key is gone", verbs.WCRemAccessErr, 2)
	f.set(f.mem[:5]) // the list has nothing to do with it
	g := q.b.valid(2, allAccess)
	if g.key>>8 == f.key>>8 && g.key == f.key {
		l.Fatalf("a new region has the key of one just gone: %#x", g.key)
	}
}

func deregisterFastDuringRead(l *lab) {
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.timeout, k.retry = 10, 1 })
		f := l.b.fast(l.b.megabyte())
		n := len(f.mem)
		data := l.nextPattern(n)
		copy(f.mem, data)
		p.b.register(f, verbs.AccessRemoteRead)
		sink := l.a.region(n, verbs.AccessLocalWrite)
		p.a.send(remoteWR(1, verbs.OpRead, sink.sg(0, n), &f.region, 0))
		time.Sleep(pause)
		l.deregister(fmt.Sprintf("deregister %v into a READ", pause), &f.region)
		clear(f.mem)
		p.wholeOrError(sink, data)
	}
}

// deregisterPosted: a registration that is posted holds the region.
func deregisterPosted(l *lab) {
	p := l.pair()
	f := l.a.fast(2)
	p.toSQD(p.a, false)
	p.a.send(f.regWR(1, allAccess))
	l.wantBusy("deregistering what a posted registration names", f.mr.Deregister())
	p.a.to(verbs.StateRTS)
	p.a.wantSendStatus("it is too late to register it", verbs.WCLocQPOpErr, 1)
	l.deregister("when it has completed the region is ours", &f.region)
	f.set(f.mem[:5])
}

func deregisterStates(l *lab) {
	w := l.a.worker(l.a.pd)
	for _, f := range []*fast{l.a.fast(1), w.freed(1, allAccess), w.valid(1, 0)} {
		l.deregister("deregister", &f.region)
		l.must("close its list", f.list.Close())
	}
}

// fastRegFlush: of a queue that errs, what was executed stays so and what was not never is.
func fastRegFlush(l *lab) {
	p := l.deaf()
	f, g := p.a.valid(2, verbs.AccessLocalWrite), l.a.fast(2)
	remote := l.b.region(64, allAccess)
	p.a.send(remoteWR(1, verbs.OpRead, f.sg(0, 8), remote, 0), f.invWR(2))
	gWR := g.regWR(3, verbs.AccessLocalWrite)
	gWR.Flags |= verbs.SendFence
	p.a.send(gWR, sendWR(4, g.sg(0, 8)), g.invWR(5))
	p.a.qp.SetError()
	p.a.wantSendStatus("everything flushes, in order", verbs.WCFlushErr, 1, 2, 3, 4, 5)
	f.works(p.a, "an invalidation that waited has not happened", true)
	g.works(p.a, "nor a registration", false)
	w := l.a.worker(l.a.pd)
	w.invalidate(f)
	w.register(g, verbs.AccessLocalWrite)
	l.deregister("nothing holds the region", &f.region)
	l.deregister("nothing holds the region", &g.region)
	p.a.wantQuiet("exactly one completion each")
}

// mapReadInvalidate is the life of a region in the hands of a service: mapped, read by the peer, freed by one or the
// other, round after round. p.b owns the region, whose pages hold data.
func mapReadInvalidate(p *pair, f *fast, sink *region, rounds int) error {
	for i := range rounds {
		off := (i * 1237) % 3000
		n := 1 + (i*7919)%(len(f.mem)-off)
		data := pattern(byte(i), n)
		copy(f.mem[off:], data)
		if err := f.list.Set([][]byte{f.mem[off : off+n]}); err != nil {
			return err
		}
		f.key = verbs.UpdateFastRegKey(f.key)
		iova := 0x5000_0000_0000 + uint64(f.key)<<24 + uint64(off)
		if err := p.b.post(verbs.SendWR{ID: 1, Opcode: verbs.OpFastRegMR, Flags: verbs.SendSignaled,
			FastReg: &verbs.FastReg{MR: f.mr, Key: f.key, Pages: f.list, IOVA: iova, Access: verbs.AccessRemoteRead}}); err != nil {
			return err
		}
		if err := collect(p.b.scq, 1, nil); err != nil {
			return fmt.Errorf("register: %w", err)
		}
		read := verbs.SendWR{ID: 2, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: sink.sg(0, n), RemoteAddr: iova, RKey: f.key}
		if i%2 == 0 {
			if err := p.a.post(read); err != nil {
				return err
			}
			if err := collect(p.a.scq, 1, nil); err != nil {
				return fmt.Errorf("READ: %w", err)
			}
			if err := p.b.post(invWR(3, f.key)); err != nil {
				return err
			}
			if err := collect(p.b.scq, 1, nil); err != nil {
				return fmt.Errorf("invalidate: %w", err)
			}
		} else {
			if _, err := p.b.qp.PostRecv([]verbs.RecvWR{{ID: 4}}); err != nil {
				return err
			}
			inv := sendInvWR(3, nil, f.key)
			inv.Flags |= verbs.SendFence // a READ whose answer is lost is asked for again
			if err := p.a.post(read, inv); err != nil {
				return err
			}
			if err := errors.Join(collect(p.a.scq, 2, nil), collect(p.b.rcq, 1, func(wc verbs.WC) error {
				if wc.Flags&verbs.WCWithInvalidate == 0 || wc.InvRKey != f.key {
					return fmt.Errorf("the SEND invalidates %#x: flags %#x, key %#x", f.key, wc.Flags, wc.InvRKey)
				}
				return nil
			})); err != nil {
				return fmt.Errorf("READ and invalidate: %w", err)
			}
		}
		if !slices.Equal(sink.mem[:n], data) {
			return fmt.Errorf("round %d: the peer has read something else", i)
		}
	}
	return nil
}

func stressFastReg(l *lab) {
	var fs []func() error
	for range 4 {
		p := l.pair()
		f, sink := l.b.fast(4), l.a.region(4*verbs.PageSize, verbs.AccessLocalWrite)
		fs = append(fs, func() error { return mapReadInvalidate(p, f, sink, 60) })
	}
	l.together(fs...)
}

// stressFastRegPool: regions go from QP to QP through a pool, freed by whoever had them last.
func stressFastRegPool(l *lab) {
	pool := make(chan *fast, 3)
	for range cap(pool) {
		pool <- l.b.fast(4)
	}
	var fs []func() error
	for range 5 {
		p := l.pair()
		sink := l.a.region(4*verbs.PageSize, verbs.AccessLocalWrite)
		fs = append(fs, func() error {
			for range 15 {
				f := <-pool
				err := mapReadInvalidate(p, f, sink, 4)
				pool <- f
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	l.together(fs...)
}
