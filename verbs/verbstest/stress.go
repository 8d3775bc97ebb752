package verbstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/openrds/openrds/verbs"
)

func stressCases() []testcase {
	return []testcase{
		{"FetchAddFromManyQPs", stressFetchAdd},
		{"CompareSwapLock", stressCompareSwap},
		{"BatchesDoNotInterleave", stressBatches},
		{"AllOpcodesBothWays", stressAll},
		{"ErrorsUnderLoad", stressErrors},
		{"OpenAndCloseUnderLoad", stressLifecycle},
	}
}

// collect polls cq for n completions on behalf of a goroutine that is not the case's. It gives up and
// returns an error on the first that failed, or after the suite's patience.
func collect(cq verbs.CQ, n int, each func(verbs.WC) error) error {
	var wcs [16]verbs.WC
	got := 0
	var err error
	if !awaitFor(patience, func() bool {
		k := cq.Poll(wcs[:min(len(wcs), n-got)])
		for _, wc := range wcs[:k] {
			got++
			if e := wc.Err(); e != nil && err == nil {
				err = e
			}
			if each != nil && err == nil {
				err = each(wc)
			}
		}
		return got == n || err != nil
	}) {
		return fmt.Errorf("%d of %d completions within %v", got, n, patience)
	}
	return err
}

// together runs fs concurrently and fails the case with their errors.
func (l *lab) together(fs ...func() error) {
	l.Helper()
	errs := make([]error, len(fs))
	var wg sync.WaitGroup
	for i, f := range fs {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	l.posted(errors.Join(errs...))
}

// stressFetchAdd: concurrent additions by several QPs of both devices sum up, and every result is
// seen once.
func stressFetchAdd(l *lab) {
	const each = 100
	target := l.b.region(8, allAccess)
	putWord(target.mem, 0)
	var fs []func() error
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var pairs []*pair
	for i := range 4 {
		p := l.pair()
		if i == 3 { // from the device that owns the memory
			p = &pair{l: l, a: l.b.newEnd(p.cfgB), b: l.b.newEnd(p.cfgB), link: p.link}
			p.connect()
		}
		pairs = append(pairs, p)
		result := p.a.region(8*each, verbs.AccessLocalWrite)
		fs = append(fs, func() error {
			for k := 0; k < each; k += 20 {
				for j := k; j < k+20; j++ {
					wr := remoteWR(uint64(j), verbs.OpFetchAdd, result.sg(8*j, 8), target, 0)
					wr.CompareAdd = 3
					if err := p.a.post(wr); err != nil {
						return err
					}
				}
				if err := collect(p.a.scq, 20, nil); err != nil {
					return err
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for j := range each {
				v := getWord(result.mem[8*j:])
				if seen[v] || v%3 != 0 {
					return fmt.Errorf("the value %d was returned twice", v)
				}
				seen[v] = true
			}
			return nil
		})
	}
	l.publish()
	l.together(fs...)
	pairs[0].fence()
	if got := getWord(target.mem); got != 4*each*3 {
		l.Fatalf("the sum is %d, want %d", got, 4*each*3)
	}
}

// stressCompareSwap: a lock word taken by compare-and-swap guards a counter that is read and written.
func stressCompareSwap(l *lab) {
	const each, workers = 10, 3
	lock, counter := l.b.region(8, allAccess), l.b.region(8, allAccess)
	putWord(lock.mem, 0)
	putWord(counter.mem, 0)
	var fs []func() error
	for i := range uint64(workers) {
		p := l.pair()
		r := l.a.region(24, verbs.AccessLocalWrite)
		do := func(wr verbs.SendWR) error {
			if err := p.a.post(wr); err != nil {
				return err
			}
			return collect(p.a.scq, 1, nil)
		}
		swap := func(from, to uint64) (bool, error) {
			wr := remoteWR(1, verbs.OpCompareSwap, r.sg(0, 8), lock, 0)
			wr.CompareAdd, wr.Swap = from, to
			err := do(wr)
			return getWord(r.mem) == from, err
		}
		fs = append(fs, func() error {
			for done := 0; done < each; {
				ok, err := swap(0, i+1)
				if err != nil {
					return err
				}
				if !ok {
					time.Sleep(100 * time.Microsecond)
					continue
				}
				if err := do(remoteWR(2, verbs.OpRead, r.sg(8, 8), counter, 0)); err != nil {
					return err
				}
				putWord(r.mem[16:], getWord(r.mem[8:])+1)
				if err := do(remoteWR(3, verbs.OpWrite, r.sg(16, 8), counter, 0)); err != nil {
					return err
				}
				if ok, err = swap(i+1, 0); err != nil || !ok {
					return fmt.Errorf("the lock was taken away: %w", err)
				}
				done++
			}
			return nil
		})
	}
	l.publish()
	l.together(fs...)
	p := l.pair()
	p.fence()
	if got := getWord(counter.mem); got != workers*each {
		l.Fatalf("the counter is %d, want %d", got, workers*each)
	}
}

// stressBatches: goroutines post batches to one QP; each arrives in one piece, and those of one
// goroutine in order.
func stressBatches(l *lab) {
	const posters, batches, size = 4, 25, 8
	p := l.pair(func(k *link) {
		k.cfgA.MaxSendWR, k.cfgA.SendCQ = 2*posters*size, l.a.cq(1024, nil)
		k.cfgB.MaxRecvWR, k.cfgB.RecvCQ = 256, l.b.cq(1024, nil)
	})
	const total = posters * batches * size
	in := l.b.region(256*12, verbs.AccessLocalWrite)
	for i := range 256 {
		p.b.recv(verbs.RecvWR{ID: uint64(i), SGs: in.sg(12*i, 12)})
	}
	credits := make(chan struct{}, 2*posters)
	for range cap(credits) {
		credits <- struct{}{}
	}
	var fs []func() error
	for g := range posters {
		out := l.a.region(12*batches*size, 0)
		fs = append(fs, func() error {
			for b := range batches {
				wrs := make([]verbs.SendWR, size)
				for k := range wrs {
					off := 12 * (b*size + k)
					binary.BigEndian.PutUint32(out.mem[off:], uint32(g))
					binary.BigEndian.PutUint32(out.mem[off+4:], uint32(b))
					binary.BigEndian.PutUint32(out.mem[off+8:], uint32(k))
					wrs[k] = verbs.SendWR{ID: uint64(g), Opcode: verbs.OpSend, SGs: out.sg(off, 12)}
				}
				wrs[size-1].Flags = verbs.SendSignaled
				<-credits
				if err := p.a.post(wrs...); err != nil {
					return err
				}
			}
			return nil
		})
	}
	fs = append(fs, func() error {
		return collect(p.a.scq, posters*batches, func(verbs.WC) error { credits <- struct{}{}; return nil })
	}, func() error {
		var next [posters]uint32 // batch
		var g, k uint32
		return collect(p.b.rcq, total, func(wc verbs.WC) error {
			m := in.mem[12*wc.ID : 12*wc.ID+12]
			mg, mb, mk := binary.BigEndian.Uint32(m), binary.BigEndian.Uint32(m[4:]), binary.BigEndian.Uint32(m[8:])
			if mk != k || k > 0 && mg != g || mg >= posters || mb != next[mg] {
				return fmt.Errorf("request %d of batch %d of poster %d comes where request %d of poster %d is due", mk, mb, mg, k, g)
			}
			g = mg
			if k++; k == size {
				k = 0
				next[g]++
			}
			_, err := p.b.qp.PostRecv([]verbs.RecvWR{{ID: wc.ID, SGs: in.sg(12*int(wc.ID), 12)}})
			return err
		})
	})
	l.together(fs...)
}

// stressAll runs mixes of all opcodes over several pairs in both directions at once, with receives
// that come late on purpose, and checks every completion.
func stressAll(l *lab) {
	var mixes []*mix
	for range 4 {
		p := l.pair()
		mixes = append(mixes, newMix(p, p.a, p.b, 56), newMix(p, p.b, p.a, 56))
	}
	var fs []func() error
	for _, m := range mixes {
		fs = append(fs, func() error {
			for _, wr := range m.ops {
				if err := m.from.post(wr); err != nil {
					return err
				}
			}
			return nil
		})
	}
	l.together(fs...)
	for _, m := range mixes {
		m.check("under load")
	}
}

// stressErrors moves QPs to ERR from several goroutines while others post: every request that was taken
// completes exactly once.
func stressErrors(l *lab) {
	for range 5 {
		p := l.pair(func(k *link) {
			k.cfgA.MaxSendWR, k.cfgA.MaxRecvWR = 1024, 1024
			k.cfgA.SendCQ, k.cfgA.RecvCQ = l.a.cq(4096, nil), l.a.cq(4096, nil)
		})
		r := l.b.region(64, allAccess)
		var mu sync.Mutex
		sent, recvd := map[uint64]bool{}, map[uint64]bool{}
		var fs []func() error
		for g := range uint64(3) {
			fs = append(fs, func() error {
				for i := range uint64(100) {
					id := g<<32 | i
					n, err := p.a.qp.PostSend([]verbs.SendWR{{ID: id, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, RemoteAddr: r.addr(0), RKey: r.mr.RKey()}})
					if err != nil && !errors.Is(err, verbs.ErrSQFull) {
						return err
					}
					m, err := p.a.qp.PostRecv([]verbs.RecvWR{{ID: id}})
					if err != nil && !errors.Is(err, verbs.ErrRQFull) {
						return err
					}
					mu.Lock()
					if n == 1 {
						sent[id] = true
					}
					if m == 1 {
						recvd[id] = true
					}
					mu.Unlock()
					if i == 50 {
						p.a.qp.SetError()
					}
				}
				return nil
			})
		}
		l.together(fs...)
		once := func(what string, cq verbs.CQ, want map[uint64]bool) {
			l.Helper()
			for range len(want) {
				wc := p.a.nextWC(what, cq)
				if !want[wc.ID] {
					l.Fatalf("%s: request %#x completes twice, or was never taken", what, wc.ID)
				}
				delete(want, wc.ID)
			}
		}
		once("every send completes once", p.a.scq, sent)
		once("every receive completes once", p.a.rcq, recvd)
		p.a.wantQuiet("and nothing else")
	}
}

// stressLifecycle opens, uses and closes QPs and regions on several goroutines of one pair of devices
// while another pair of QPs works.
func stressLifecycle(l *lab) {
	steady := l.pair()
	m := newMix(steady, steady.a, steady.b, 60)
	var fs []func() error
	fs = append(fs, func() error {
		for _, wr := range m.ops {
			if err := steady.a.post(wr); err != nil {
				return err
			}
			time.Sleep(50 * time.Microsecond)
		}
		return nil
	})
	base := l.iova
	l.iova += 1 << 32
	for g := range 3 {
		fs = append(fs, func() error {
			for i := range 20 {
				if err := oneLife(l, base+uint64(g*20+i)<<16); err != nil {
					return fmt.Errorf("round %d: %w", i, err)
				}
			}
			return nil
		})
	}
	l.together(fs...)
	m.check("beside it")
}

// oneLife is a whole life of CQs, QPs and a region, on no goroutine in particular.
func oneLife(l *lab, iova uint64) (err error) {
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	mem := make([]byte, 4096)
	mr, err := l.b.pd.RegMR(mem, iova, allAccess)
	if err != nil {
		return err
	}
	undo = append(undo, mr.Deregister)
	var ends [2]*end
	for i, n := range []*node{l.a, l.b} {
		cq, err := n.dev.CreateCQ(verbs.CQConfig{Depth: 16})
		if err != nil {
			return err
		}
		undo = append(undo, cq.Close)
		cfg := n.qpConfig(verbs.RC)
		cfg.SendCQ, cfg.RecvCQ = cq, cq
		qp, err := n.pd.CreateQP(cfg)
		if err != nil {
			return err
		}
		undo = append(undo, qp.Close)
		ends[i] = &end{node: n, qp: qp, scq: cq, rcq: cq}
	}
	p := &pair{l: l, a: ends[0], b: ends[1], link: l.link()}
	for _, e := range ends {
		for _, step := range []struct {
			to   verbs.QPState
			mask verbs.QPAttrMask
		}{{verbs.StateInit, rcInitMask}, {verbs.StateRTR, rcRTRMask}, {verbs.StateRTS, rcRTSMask}} {
			a := p.attr(e)
			a.State = step.to
			if err := e.qp.Modify(a, step.mask); err != nil {
				return err
			}
		}
	}
	r := &region{mr: mr, mem: mem}
	if err := p.a.post(remoteWR(1, verbs.OpWrite, nil, r, 0)); err != nil {
		return err
	}
	return collect(p.a.scq, 1, nil)
}
