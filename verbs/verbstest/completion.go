package verbstest

import (
	"runtime"
	"strings"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

func completionCases() []testcase {
	return []testcase{
		{"PollTakesWhatIsThere", pollBatch},
		{"HandlerRunsOncePerArm", armOnce},
		{"ArmReportsWhatIsThere", armMissed},
		{"SolicitedOnly", armSolicited},
		{"SolicitedOnlyFiresOnError", armSolicitedError},
		{"StrongerArmWins", armUpgrade},
		{"HandlerPollsPostsAndArms", handlerContract},
		{"HandlerNeverOnCallersStack", handlerStack},
		{"HandlerMayStartErr", handlerSetError},
		{"SharedByQPs", sharedCQ},
		{"OverflowOnReceive", overflowRecv},
		{"OverflowOnSend", overflowSend},
		{"ProgressByWaiters", progressByWaiters},
	}
}

func pollBatch(l *lab) {
	p := l.pair()
	p.b.recvEmpty(1, 2, 3, 4, 5)
	wcs := make([]verbs.WC, 8)
	if n := p.b.rcq.Poll(wcs); n != 0 {
		l.Fatalf("an empty CQ gives nothing: got %d", n)
	}
	for i := range 5 {
		p.a.send(sendWR(uint64(i), nil))
		p.a.wantSent("the SEND completes", uint64(i), verbs.WCSend)
	}
	if n := p.b.rcq.Poll(nil); n != 0 {
		l.Fatalf("no room takes nothing: got %d", n)
	}
	var got []verbs.WC
	l.await("five completions", func() bool {
		n := p.b.rcq.Poll(wcs[:2])
		got = append(got, wcs[:n]...)
		return len(got) == 5
	})
	for i, wc := range got {
		if wc.ID != uint64(i+1) || wc.QPN != p.b.qp.Num() {
			l.Fatalf("completions are taken in order: %d is %+v", i, wc)
		}
	}
}

// bell counts the runs of a handler.
type bell struct{ n atomic.Int32 }

func (b *bell) ring(verbs.CQ) { b.n.Inc() }

// wantBell waits for n runs and checks that there are not more.
func (l *lab) wantBell(what string, b *bell, n int) {
	l.Helper()
	if !awaitFor(patience, func() bool { return int(b.n.Load()) >= n }) {
		l.Fatalf("%s: the handler ran %d times, want %d", what, b.n.Load(), n)
	}
	l.settle()
	if got := int(b.n.Load()); got != n {
		l.Fatalf("%s: the handler ran %d times, want %d", what, got, n)
	}
}

// bellPair is a pair whose receive CQ on B has a bell and ten receives.
func bellPair(l *lab) (*pair, *bell) {
	l.Helper()
	b := new(bell)
	p := l.pair(func(k *link) { k.cfgB.RecvCQ = l.b.cq(64, b.ring) })
	p.b.recvEmpty(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
	return p, b
}

// ping sends an empty message, solicited or not, and waits until it was acknowledged: its
// completion is in B's CQ then.
func (p *pair) ping(flags verbs.SendFlags) {
	p.l.Helper()
	wr := sendWR(7, nil)
	wr.Flags |= flags
	p.a.send(wr)
	p.a.wantSent("the SEND completes", 7, verbs.WCSend)
}

func armOnce(l *lab) {
	p, b := bellPair(l)
	p.ping(0)
	p.ping(verbs.SendSolicited)
	l.wantBell("a CQ that is not armed stays silent", b, 0)
	p.b.wantRecvd("the completion is there all the same", 0, 0)
	p.b.wantWC("the solicited one says so", p.b.rcq, verbs.WC{ID: 1, Opcode: verbs.WCRecv, Flags: verbs.WCSolicited})

	if p.b.rcq.Arm(false) {
		l.Fatal("arming an empty CQ reports nothing missed")
	}
	p.ping(0)
	l.wantBell("an armed CQ calls its handler", b, 1)
	p.ping(0)
	p.ping(verbs.SendSolicited)
	l.wantBell("firing disarms", b, 1)
	for id := range uint64(2) {
		p.b.wantRecvd("completions", id+2, 0)
	}
	p.b.wantWC("completions", p.b.rcq, verbs.WC{ID: 4, Opcode: verbs.WCRecv, Flags: verbs.WCSolicited})
	if p.b.rcq.Arm(false) {
		l.Fatal("arming an empty CQ reports nothing missed")
	}
	l.wantBell("arming alone calls nobody", b, 1)
	p.ping(0)
	l.wantBell("armed again, it fires again", b, 2)
}

func armMissed(l *lab) {
	p, b := bellPair(l)
	p.ping(0)
	l.settle()
	for _, solicited := range []bool{false, true} {
		if !p.b.rcq.Arm(solicited) {
			l.Fatalf("Arm(%v) reports the completion that is there", solicited)
		}
	}
	p.b.wantRecvd("and it is there", 0, 0)
	// Whether the handler was called for it is not defined; that it is for the next one is, unless
	// it was for the first.
	p.ping(0)
	l.await("the handler runs", func() bool { return b.n.Load() > 0 })
	p.b.wantRecvd("the next completion", 1, 0)
}

func armSolicited(l *lab) {
	p, b := bellPair(l)
	if p.b.rcq.Arm(true) {
		l.Fatal("arming an empty CQ reports nothing missed")
	}
	p.ping(0)
	l.wantBell("an unsolicited SEND does not fire a CQ armed for solicited ones", b, 0)
	p.ping(verbs.SendSolicited)
	l.wantBell("a solicited SEND does", b, 1)
	p.b.wantRecvd("the unsolicited completion", 0, 0)
	p.b.wantWC("the solicited completion", p.b.rcq, verbs.WC{ID: 1, Opcode: verbs.WCRecv, Flags: verbs.WCSolicited})

	p.b.rcq.Arm(true)
	r := l.b.region(64, allAccess)
	write := remoteWR(8, verbs.OpWriteWithImm, l.a.region(64, 0).sg(0, 64), r, 0)
	write.Flags |= verbs.SendSolicited
	p.a.send(write)
	p.a.wantSent("the WRITE completes", 8, verbs.WCWrite)
	l.wantBell("a solicited WRITE with immediate fires too", b, 2)
	p.b.wantWC("its completion", p.b.rcq, verbs.WC{ID: 2, Opcode: verbs.WCRecvWriteWithImm, Flags: verbs.WCWithImm | verbs.WCSolicited, ByteLen: 64})

	p.b.rcq.Arm(true)
	q, qb := bellPair(l)
	q.b.rcq.Arm(true)
	q.b.to(verbs.StateErr)
	l.wantBell("the flush of one QP", qb, 1)
	l.wantBell("does not ring another's CQ", b, 2)
}

// armSolicitedError: a failed completion fires a CQ armed for solicited ones.
func armSolicitedError(l *lab) {
	p, b := bellPair(l)
	p.b.rcq.Arm(true)
	p.a.send(sendWR(1, l.a.region(16, 0).sg(0, 16))) // the receives have no room
	l.wantBell("a failed completion fires a CQ armed for solicited ones", b, 1)
	p.b.wantRecvStatus("the receive is too short", verbs.WCLocLenErr, 0)
}

func armUpgrade(l *lab) {
	p, b := bellPair(l)
	p.b.rcq.Arm(false)
	p.b.rcq.Arm(true)
	p.ping(0)
	l.wantBell("arming for less does not take back arming for the next completion", b, 1)
	p.b.wantRecvd("the completion", 0, 0)
	p.b.rcq.Arm(true)
	p.b.rcq.Arm(false)
	p.ping(0)
	l.wantBell("arming for the next completion extends arming for solicited ones", b, 2)
}

// drainer is a handler that polls, reposts receives and arms again; it checks that it never
// runs beside itself nor on the stack of a caller of ours.
type drainer struct {
	mu   sync.Mutex
	qp   verbs.QP // reposts here when set
	ids  []uint64
	err  string
	arms int
	runs int

	running atomic.Bool
}

func (d *drainer) handle(cq verbs.CQ) {
	if d.running.Swap(true) {
		d.fail("runs beside itself")
		return
	}
	defer d.running.Store(false)
	if f := callerOfOurs(); f != "" {
		d.fail("runs on the stack of " + f)
	}
	d.mu.Lock()
	d.runs++
	if d.runs > d.arms {
		d.err = "runs more often than it was armed"
	}
	qp := d.qp
	d.mu.Unlock()
	var wcs [4]verbs.WC
	for {
		n := cq.Poll(wcs[:])
		for _, wc := range wcs[:n] {
			d.mu.Lock()
			d.ids = append(d.ids, wc.ID)
			d.mu.Unlock()
			if qp != nil {
				if _, err := qp.PostRecv([]verbs.RecvWR{{ID: wc.ID + 1000}}); err != nil {
					d.fail("cannot repost: " + err.Error())
				}
			}
		}
		if n == 0 {
			d.mu.Lock()
			d.arms++
			d.mu.Unlock()
			if !cq.Arm(false) {
				return
			}
		}
	}
}

func (d *drainer) fail(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = s
}

func (d *drainer) arm(cq verbs.CQ) {
	d.mu.Lock()
	d.arms++
	d.mu.Unlock()
	cq.Arm(false)
}

func (d *drainer) got() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.ids)
}

func (d *drainer) check(l *lab) {
	l.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != "" {
		l.Fatalf("the handler %s", d.err)
	}
}

// callerOfOurs is the poster or modifier of this package on the current stack, "" if there is none.
func callerOfOurs() string {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		for _, s := range []string{"(*end).send", "(*end).recv", "(*end).to", "(*pair).move"} {
			if strings.HasSuffix(f.Function, s) {
				return f.Function
			}
		}
		if !more {
			return ""
		}
	}
}

func handlerContract(l *lab) {
	d := new(drainer)
	p := l.pair(func(k *link) { k.cfgB.RecvCQ = l.b.cq(64, d.handle) })
	d.qp = p.b.qp
	for i := range 32 {
		p.b.recvEmpty(uint64(i))
	}
	d.arm(p.b.rcq)
	const n = 500
	for i := range n {
		p.a.send(sendWR(uint64(i), nil))
		if i >= 40 {
			p.a.wantSent("SENDs complete", uint64(i-40), verbs.WCSend)
		}
	}
	l.await("the handler sees all receives", func() bool { return d.got() == n })
	d.check(l)
	for i, id := range d.ids {
		if want := uint64(i%32 + 1000*(i/32)); id != want {
			l.Fatalf("the handler sees receives in order: %d is %d, want %d", i, id, want)
		}
	}
}

func handlerStack(l *lab) {
	send, recv := new(drainer), new(drainer)
	p := l.pair(func(k *link) { k.cfgA.SendCQ, k.cfgA.RecvCQ = l.a.cq(256, send.handle), l.a.cq(256, recv.handle) })
	for i := range 20 {
		p.b.recvEmpty(uint64(i))
		p.a.recvEmpty(uint64(i))
	}
	send.arm(p.a.scq)
	recv.arm(p.a.rcq)
	for i := range 20 {
		p.a.send(sendWR(uint64(i), nil))
	}
	l.await("the send handler sees 20 completions", func() bool { return send.got() == 20 })
	p.a.to(verbs.StateErr)
	l.await("the receive handler sees 20 flushes", func() bool { return recv.got() == 20 })
	for i := range 20 {
		p.a.send(sendWR(uint64(i), nil))
		p.a.recvEmpty(uint64(i))
	}
	l.await("the send handler sees what was posted in ERR", func() bool { return send.got() == 40 })
	l.await("the receive handler sees what was posted in ERR", func() bool { return recv.got() == 40 })
	send.check(l)
	recv.check(l)
}

func handlerSetError(l *lab) {
	var qp atomic.Value
	hit := make(chan struct{}, 1)
	p := l.pair(func(k *link) {
		k.cfgB.RecvCQ = l.b.cq(64, func(verbs.CQ) {
			qp.Load().(verbs.QP).SetError()
			select {
			case hit <- struct{}{}:
			default:
			}
		})
	})
	qp.Store(p.b.qp)
	p.b.recvEmpty(0, 1, 2)
	p.b.rcq.Arm(false)
	p.a.send(sendWR(7, nil)) // whether its acknowledgement leaves before the QP errs is not defined
	recvFrom(l, "the handler runs", hit)
	p.b.wantRecvd("the receive that fired", 0, 0)
	p.b.wantRecvStatus("SetError from a handler flushes", verbs.WCFlushErr, 1, 2)
	p.b.wantState("and moves the QP", verbs.StateErr)
}

func sharedCQ(l *lab) {
	const qps = 5
	scq, rcq := l.a.cq(256, nil), l.b.cq(256, nil)
	var pairs []*pair
	for range qps {
		p := l.pair(func(k *link) { k.cfgA.SendCQ, k.cfgA.RecvCQ, k.cfgB.RecvCQ = scq, scq, rcq })
		p.b.recvEmpty(0, 1, 2, 3)
		pairs = append(pairs, p)
	}
	for i := range 4 {
		for _, p := range pairs {
			p.a.send(sendWR(uint64(i), nil))
		}
	}
	for _, cq := range []verbs.CQ{scq, rcq} {
		next := map[verbs.QPN]uint64{}
		for range 4 * qps {
			wc := pairs[0].a.nextWC("a completion of some QP", cq)
			if wc.Status != verbs.WCSuccess || wc.ID != next[wc.QPN] {
				l.Fatalf("completions of each QP are in order: %+v, want request %d", wc, next[wc.QPN])
			}
			next[wc.QPN]++
		}
		if len(next) != qps {
			l.Fatalf("completions name their QP: %v", next)
		}
	}
}

func overflowRecv(l *lab) {
	small := l.b.cq(4, nil)
	p := l.pair(func(k *link) { k.cfgB.RecvCQ, k.retry = small, 1 })
	for i := range 64 {
		p.b.recvEmpty(uint64(i))
	}
	for i := range 60 {
		p.a.send(sendWR(uint64(i), nil))
	}
	l.b.wantEvent("an overflow is an event", ofCQ(small), verbs.EventCQErr)
	p.b.wantState("the QP that needed the completion errs", verbs.StateErr)
	for i := range 4 {
		p.b.wantRecvd("what the CQ held is still there", uint64(i), 0)
	}
}

func overflowSend(l *lab) {
	small := l.a.cq(4, nil)
	p := l.pair(func(k *link) { k.cfgA.SendCQ = small })
	r := l.b.region(8, allAccess)
	for i := range 60 {
		p.a.send(remoteWR(uint64(i), verbs.OpWrite, nil, r, 0))
	}
	l.a.wantEvent("an overflow is an event", ofCQ(small), verbs.EventCQErr)
	p.a.wantState("the QP that needed the completion errs", verbs.StateErr)
	for i := range 4 {
		p.a.wantSent("what the CQ held is still there", uint64(i), verbs.WCWrite)
	}
}

// progressByWaiters bounces a message between two goroutines that do the devices' work themselves
// while they wait, with handlers that count.
func progressByWaiters(l *lab) {
	pa, ok := l.a.dev.(verbs.Progresser)
	pb, ok2 := l.b.dev.(verbs.Progresser)
	if !ok || !ok2 {
		l.Skip("the provider has no Progress")
	}
	b := new(bell)
	p := l.pair(func(k *link) { k.cfgB.RecvCQ = l.b.cq(64, b.ring) })
	const rounds = 200
	wait := func(pr verbs.Progresser, cq verbs.CQ) bool {
		var wc [1]verbs.WC
		return awaitFor(patience, func() bool {
			for range 4 {
				pr.Progress()
			}
			if cq.Poll(wc[:]) == 1 {
				return true
			}
			pr.Park() // about to sleep
			return false
		})
	}
	done := make(chan bool, 1)
	go func() {
		ok := true
		for i := 0; i < rounds && ok; i++ {
			p.b.rcq.Arm(false)
			n, _ := p.b.qp.PostRecv([]verbs.RecvWR{{}})
			ok = n == 1 && wait(pb, p.b.rcq)
			if ok {
				n, _ = p.b.qp.PostSend([]verbs.SendWR{sendWR(0, nil)})
				ok = n == 1 && wait(pb, p.b.scq)
			}
		}
		done <- ok
	}()
	for i := range rounds {
		p.a.recvEmpty(0)
		p.a.send(sendWR(0, nil))
		if !wait(pa, p.a.scq) || !wait(pa, p.a.rcq) {
			l.Fatalf("round trip %d did not happen", i)
		}
	}
	if !recvFrom(l, "the other side ends", done) {
		l.Fatal("the other side waited in vain")
	}
	if n := b.n.Load(); n < 1 || n > rounds {
		l.Fatalf("handlers run on waiters too, once per arm: %d runs of %d", n, rounds)
	}
}
