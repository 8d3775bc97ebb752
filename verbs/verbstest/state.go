package verbstest

import (
	"fmt"
	"math/bits"
	"time"

	"github.com/openrds/openrds/verbs"
)

// The QP state machine: rocev2 spec 5.1 to 5.3. OpenRDS' own send_window may be given to RC on the way
// into RTS and within it.

type rule struct{ required, optional verbs.QPAttrMask }

type move struct{ from, to verbs.QPState }

const (
	rcCommon = verbs.QPCurStateBit | verbs.QPAccessBit | verbs.QPMinRNRTimerBit | verbs.QPSendWindowBit
	udCommon = verbs.QPCurStateBit | verbs.QPQKeyBit
)

var rules = map[verbs.QPType]map[move]rule{
	verbs.RC: {
		{verbs.StateReset, verbs.StateInit}: {required: rcInitMask &^ verbs.QPStateBit},
		{verbs.StateInit, verbs.StateInit}:  {optional: rcInitMask &^ verbs.QPStateBit},
		{verbs.StateInit, verbs.StateRTR}:   {rcRTRMask &^ verbs.QPStateBit, verbs.QPAccessBit | verbs.QPPKeyIndexBit},
		{verbs.StateRTR, verbs.StateRTS}:    {rcRTSMask &^ verbs.QPStateBit, rcCommon},
		{verbs.StateRTS, verbs.StateRTS}:    {optional: rcCommon},
		{verbs.StateRTS, verbs.StateSQD}:    {optional: verbs.QPEnSQDNotifyBit},
		{verbs.StateSQD, verbs.StateRTS}:    {optional: rcCommon},
		{verbs.StateSQD, verbs.StateSQD}: {optional: verbs.QPPortBit | verbs.QPAHBit | verbs.QPTimeoutBit | verbs.QPRetryCountBit |
			verbs.QPRNRRetryBit | verbs.QPMaxRDAtomicBit | verbs.QPMaxDestRDAtomicBit | verbs.QPAccessBit | verbs.QPPKeyIndexBit | verbs.QPMinRNRTimerBit},
	},
	verbs.UD: {
		{verbs.StateReset, verbs.StateInit}: {required: udInitMask &^ verbs.QPStateBit},
		{verbs.StateInit, verbs.StateInit}:  {optional: udInitMask &^ verbs.QPStateBit},
		{verbs.StateInit, verbs.StateRTR}:   {optional: verbs.QPPKeyIndexBit | verbs.QPQKeyBit},
		{verbs.StateRTR, verbs.StateRTS}:    {udRTSMask &^ verbs.QPStateBit, udCommon},
		{verbs.StateRTS, verbs.StateRTS}:    {optional: udCommon},
		{verbs.StateRTS, verbs.StateSQD}:    {optional: verbs.QPEnSQDNotifyBit},
		{verbs.StateSQD, verbs.StateRTS}:    {optional: udCommon},
		{verbs.StateSQD, verbs.StateSQD}:    {optional: verbs.QPPKeyIndexBit | verbs.QPQKeyBit},
		{verbs.StateSQE, verbs.StateRTS}:    {optional: udCommon},
	},
}

// ruleOf is the rule of a move; !ok when there is no such move.
func ruleOf(t verbs.QPType, m move) (rule, bool) {
	if m.to == verbs.StateReset || m.to == verbs.StateErr && m.from != verbs.StateReset {
		return rule{}, true
	}
	r, ok := rules[t][m]
	return r, ok
}

// allAttrs are the attributes a move may be given too much of. SendWindow is left out where no rule
// mentions it: a provider in hardware ignores it.
const allAttrs = verbs.QPCurStateBit | verbs.QPAccessBit | verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPQKeyBit | verbs.QPAHBit |
	verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit | verbs.QPMaxDestRDAtomicBit |
	verbs.QPMinRNRTimerBit | verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPEnSQDNotifyBit

func stateCases() (cases []testcase) {
	for _, t := range []verbs.QPType{verbs.RC, verbs.UD} {
		for from := verbs.StateReset; from <= verbs.StateErr; from++ {
			if t == verbs.RC && from == verbs.StateSQE {
				continue
			}
			for to := verbs.StateReset; to <= verbs.StateErr; to++ {
				m := move{from, to}
				cases = append(cases, testcase{fmt.Sprintf("%v/%v to %v", t, from, to), func(l *lab) { checkMove(l, t, m) }})
			}
		}
		cases = append(cases, testcase{fmt.Sprintf("%v/Posting", t), func(l *lab) { checkPosting(l, t) }})
	}
	return append(cases,
		testcase{"ValuesOutOfRange", valuesOutOfRange},
		testcase{"CurStateMustMatch", curState},
		testcase{"ModifyWithoutState", modifyInPlace},
		testcase{"QueryAfterModify", queryAfterModify},
		testcase{"AccessChangesInRTS", accessInRTS},
		testcase{"SQD/DrainsAndResumes", sqdDrain},
		testcase{"SQD/IdleDrainsAtOnce", sqdIdle},
		testcase{"SQD/NoEventUnlessAsked", sqdSilent},
		testcase{"SQD/ResponderWorksOn", sqdResponder},
		testcase{"SQD/FlushedByErr", sqdErr},
		testcase{"RESET/ForgetsEverything", resetForgets},
		testcase{"RESET/UsableAgain", resetReuse},
		testcase{"RESET/InTheMiddle", resetMiddle},
		testcase{"RESET/WhileWaitingForRNR", resetRNR},
		testcase{"RTR/AnswersButDoesNotSend", rtrAnswers},
	)
}

// inState is a QP of A in state s, with a peer of B it could talk to.
func (l *lab) inState(t verbs.QPType, s verbs.QPState) *pair {
	l.Helper()
	k := l.link()
	k.cfgA.Type, k.cfgB.Type = t, t
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.b.newEnd(k.cfgB), link: k}
	path := map[verbs.QPState][]verbs.QPState{
		verbs.StateReset: {},
		verbs.StateInit:  {verbs.StateInit},
		verbs.StateRTR:   {verbs.StateInit, verbs.StateRTR},
		verbs.StateRTS:   {verbs.StateInit, verbs.StateRTR, verbs.StateRTS},
		verbs.StateSQD:   {verbs.StateInit, verbs.StateRTR, verbs.StateRTS, verbs.StateSQD},
		verbs.StateSQE:   {verbs.StateInit, verbs.StateRTR, verbs.StateRTS, verbs.StateSQE},
		verbs.StateErr:   {verbs.StateInit, verbs.StateErr},
	}[s]
	for i, to := range path {
		from := verbs.StateReset
		if i > 0 {
			from = path[i-1]
		}
		if to == verbs.StateSQE { // only an error leads there
			bad := udWR(p.b, 1, []verbs.SGE{{Length: 1, LKey: 1}})
			p.a.send(bad)
			p.a.wantSendStatus("a bad key fails the datagram", verbs.WCLocProtErr, 1)
			p.a.wantState("the QP", verbs.StateSQE)
			continue
		}
		r, _ := ruleOf(t, move{from, to})
		l.must(fmt.Sprintf("%v to %v", from, to), p.a.qp.Modify(p.moveAttr(move{from, to}), r.required|verbs.QPStateBit))
	}
	if got := p.a.qp.State(); got != s {
		l.Fatalf("the QP is in %v, want %v", got, s)
	}
	return p
}

// moveAttr are valid values of all attributes for a move of A's QP.
func (p *pair) moveAttr(m move) verbs.QPAttr {
	a := p.attr(p.a)
	a.State, a.CurState = m.to, m.from
	a.QKey = testQKey
	a.SendWindow = 1 << 20
	return a
}

// checkMove: a move with what it requires happens, with anything missing or anything more it is refused
// by name and changes nothing; a move that does not exist is refused in any case.
func checkMove(l *lab, t verbs.QPType, m move) {
	r, legal := ruleOf(t, m)
	p := l.inState(t, m.from)
	a := p.moveAttr(m)
	before := p.a.qp.Query()
	refused := func(what string, mask verbs.QPAttrMask) *verbs.StateError {
		l.Helper()
		err := p.a.qp.Modify(a, mask|verbs.QPStateBit)
		e := wantErrAs[*verbs.StateError](l, what, err)
		if e.From != m.from || e.To != m.to {
			l.Fatalf("%s: the error names the move %v to %v", what, e.From, e.To)
		}
		if after := p.a.qp.Query(); after != before {
			l.Fatalf("%s: a refusal changes nothing:\n%+v\n%+v", what, before, after)
		}
		if s := p.a.qp.State(); s != m.from {
			l.Fatalf("%s: the state stays: %v", what, s)
		}
		return e
	}
	if !legal {
		refused("a move that does not exist, with nothing", 0)
		refused("a move that does not exist, with everything", allAttrs)
		return
	}
	for mask := r.required; mask != 0; mask &= mask - 1 {
		bit := verbs.QPAttrMask(1) << bits.TrailingZeros32(uint32(mask))
		e := refused("without "+bit.String(), r.required&^bit)
		if e.Missing != bit || e.Extra != 0 {
			l.Fatalf("without %v: the error says missing %v, extra %v", bit, e.Missing, e.Extra)
		}
	}
	for mask := allAttrs &^ (r.required | r.optional); mask != 0; mask &= mask - 1 {
		bit := verbs.QPAttrMask(1) << bits.TrailingZeros32(uint32(mask))
		e := refused("with "+bit.String(), r.required|bit)
		if e.Missing != 0 || e.Extra != bit {
			l.Fatalf("with %v: the error says missing %v, extra %v", bit, e.Missing, e.Extra)
		}
	}
	l.must("with what it requires", p.a.qp.Modify(a, r.required|verbs.QPStateBit))
	p.a.wantState("after the move", m.to)
	if got := p.a.qp.Query().State; got != m.to {
		l.Fatalf("Query agrees with State: %v, want %v", got, m.to)
	}
	p = l.inState(t, m.from)
	l.must("with everything it may be given", p.a.qp.Modify(p.moveAttr(m), r.required|r.optional|verbs.QPStateBit))
	p.a.wantState("after the move", m.to)
}

// checkPosting: what may be posted in which state (rocev2 spec 5.3).
func checkPosting(l *lab, t verbs.QPType) {
	const (
		refused = iota
		queued
		flushed
	)
	for _, c := range []struct {
		s          verbs.QPState
		send, recv int
	}{
		{verbs.StateReset, refused, refused},
		{verbs.StateInit, refused, queued},
		{verbs.StateRTR, refused, queued},
		{verbs.StateRTS, queued, queued},
		{verbs.StateSQD, queued, queued},
		{verbs.StateErr, flushed, flushed},
	} {
		p := l.inState(t, c.s)
		check := func(what string, want, n int, err error) {
			l.Helper()
			if want != refused {
				l.must(fmt.Sprintf("%s in %v", what, c.s), err)
				return
			}
			e := wantErrAs[*verbs.StateError](l, fmt.Sprintf("%s in %v", what, c.s), err)
			if n != 0 || e.From != c.s || e.To != c.s {
				l.Fatalf("%s in %v: took %d, error names %v and %v", what, c.s, n, e.From, e.To)
			}
		}
		wr := sendWR(1, nil)
		if t == verbs.UD {
			wr = udWR(p.b, 1, nil)
		}
		n, err := p.a.qp.PostSend([]verbs.SendWR{wr})
		check("PostSend", c.send, n, err)
		n, err = p.a.qp.PostRecv([]verbs.RecvWR{{ID: 2}})
		check("PostRecv", c.recv, n, err)
		if c.send == flushed {
			p.a.wantSendStatus("a send posted in ERR", verbs.WCFlushErr, 1)
			p.a.wantRecvStatus("a receive posted in ERR", verbs.WCFlushErr, 2)
		} else if c.s == verbs.StateRTS && t == verbs.UD {
			p.a.wantSent("a datagram sent in RTS", 1, verbs.WCSend)
		}
		p.a.wantQuiet(fmt.Sprintf("no completion comes of posting in %v", c.s))
	}
}

func valuesOutOfRange(l *lab) {
	maxRD := l.a.dev.Attr().MaxRDAtomic
	for _, c := range []struct {
		name string
		m    move
		set  func(*verbs.QPAttr)
		skip bool
	}{
		{"pkey_index 1", move{verbs.StateReset, verbs.StateInit}, func(a *verbs.QPAttr) { a.PKeyIndex = 1 }, false},
		{"port 0", move{verbs.StateReset, verbs.StateInit}, func(a *verbs.QPAttr) { a.Port = 0 }, false},
		{"port 2", move{verbs.StateReset, verbs.StateInit}, func(a *verbs.QPAttr) { a.Port = 2 }, false},
		{"unknown access", move{verbs.StateReset, verbs.StateInit}, func(a *verbs.QPAttr) { a.Access = 1 << 30 }, false},
		{"no address", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.AH = verbs.AH{} }, false},
		{"path_mtu 0", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.PathMTU = 0 }, false},
		{"path_mtu 6", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.PathMTU = 6 }, false},
		{"dest_qpn over 24 bits", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.DestQPN = 1 << 24 }, false},
		{"rq_psn over 24 bits", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.RQPSN = 1 << 24 }, false},
		{"min_rnr_timer 32", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.MinRNRTimer = 32 }, false},
		{"max_dest_rd_atomic over the device's", move{verbs.StateInit, verbs.StateRTR}, func(a *verbs.QPAttr) { a.MaxDestRDAtomic = uint8(maxRD + 1) }, maxRD >= 255},
		{"timeout 32", move{verbs.StateRTR, verbs.StateRTS}, func(a *verbs.QPAttr) { a.Timeout = 32 }, false},
		{"retry_cnt 8", move{verbs.StateRTR, verbs.StateRTS}, func(a *verbs.QPAttr) { a.RetryCount = 8 }, false},
		{"rnr_retry 8", move{verbs.StateRTR, verbs.StateRTS}, func(a *verbs.QPAttr) { a.RNRRetry = 8 }, false},
		{"sq_psn over 24 bits", move{verbs.StateRTR, verbs.StateRTS}, func(a *verbs.QPAttr) { a.SQPSN = 1 << 24 }, false},
		{"max_rd_atomic over the device's", move{verbs.StateRTR, verbs.StateRTS}, func(a *verbs.QPAttr) { a.MaxRDAtomic = uint8(maxRD + 1) }, maxRD >= 255},
	} {
		if c.skip {
			continue
		}
		p := l.inState(verbs.RC, c.m.from)
		before := p.a.qp.Query()
		good := p.moveAttr(c.m)
		bad := good
		c.set(&bad)
		r, _ := ruleOf(verbs.RC, c.m)
		l.wantErr(c.name, p.a.qp.Modify(bad, r.required|verbs.QPStateBit), verbs.ErrInvalid)
		if after := p.a.qp.Query(); after != before {
			l.Fatalf("%s: a refusal changes nothing:\n%+v\n%+v", c.name, before, after)
		}
		l.must(c.name+", mended", p.a.qp.Modify(good, r.required|verbs.QPStateBit))
	}
}

func curState(l *lab) {
	p := l.inState(verbs.RC, verbs.StateRTS)
	a := p.moveAttr(move{verbs.StateSQD, verbs.StateRTS})
	if err := p.a.qp.Modify(a, verbs.QPStateBit|verbs.QPCurStateBit); err == nil {
		l.Fatal("a wrong cur_state is refused")
	}
	p.a.wantState("after the refusal", verbs.StateRTS)
	a.CurState = verbs.StateRTS
	l.must("the right cur_state", p.a.qp.Modify(a, verbs.QPStateBit|verbs.QPCurStateBit))
}

// modifyInPlace: without the state bit the QP stays where it is, by the rule of that move.
func modifyInPlace(l *lab) {
	p := l.inState(verbs.RC, verbs.StateRTS)
	l.must("min_rnr_timer in RTS", p.a.qp.Modify(verbs.QPAttr{MinRNRTimer: 5}, verbs.QPMinRNRTimerBit))
	if got := p.a.qp.Query().MinRNRTimer; got != 5 {
		l.Fatalf("the attribute is in force: min_rnr_timer is %d", got)
	}
	e := wantErrAs[*verbs.StateError](l, "path_mtu in RTS", p.a.qp.Modify(verbs.QPAttr{PathMTU: verbs.MTU256}, verbs.QPPathMTUBit))
	if e.From != verbs.StateRTS || e.To != verbs.StateRTS || e.Extra != verbs.QPPathMTUBit {
		l.Fatalf("path_mtu in RTS: error is %v", e)
	}
	p = l.inState(verbs.RC, verbs.StateRTR)
	wantErrAs[*verbs.StateError](l, "RTR has no move to itself", p.a.qp.Modify(verbs.QPAttr{MinRNRTimer: 5}, verbs.QPMinRNRTimerBit))
}

func queryAfterModify(l *lab) {
	p := l.inState(verbs.RC, verbs.StateRTS)
	got, want := p.a.qp.Query(), p.attr(p.a)
	want.State = verbs.StateRTS
	if got.State != want.State || got.Access != want.Access || got.Port != 1 || got.AH != want.AH || got.PathMTU != want.PathMTU ||
		got.DestQPN != want.DestQPN || got.RQPSN != want.RQPSN || got.SQPSN != want.SQPSN || got.MaxRDAtomic != want.MaxRDAtomic ||
		got.MaxDestRDAtomic != want.MaxDestRDAtomic || got.MinRNRTimer != want.MinRNRTimer || got.Timeout != want.Timeout ||
		got.RetryCount != want.RetryCount || got.RNRRetry != want.RNRRetry {
		l.Fatalf("Query returns what was given:\n%+v\n%+v", got, want)
	}
	if p.a.qp.Num() < 2 || p.a.qp.Num() > 0xfffffe || p.a.qp.Type() != verbs.RC || p.a.qp.PD() != l.a.pd {
		l.Fatalf("the QP knows number, type and PD: %d, %v", p.a.qp.Num(), p.a.qp.Type())
	}
}

// accessInRTS: what a peer may do is changed while connected.
func accessInRTS(l *lab) {
	p := l.pair()
	r := l.b.region(8, allAccess)
	p.a.send(remoteWR(1, verbs.OpRead, newSink(p.a), r, 0))
	p.a.wantRead("a READ that is admitted", 1, 8)
	l.must("forbid READs", p.b.qp.Modify(verbs.QPAttr{Access: verbs.AccessRemoteWrite}, verbs.QPAccessBit))
	p.a.send(remoteWR(2, verbs.OpWrite, newSink(p.a), r, 0), remoteWR(3, verbs.OpRead, newSink(p.a), r, 0))
	p.a.wantSent("WRITEs still are", 2, verbs.WCWrite)
	p.a.wantRefused("READs are not", verbs.WCRemInvReqErr, 3)
}

func (p *pair) toSQD(e *end, notify bool) {
	p.l.Helper()
	p.l.must("RTS to SQD", e.qp.Modify(verbs.QPAttr{State: verbs.StateSQD, EnSQDNotify: notify}, verbs.QPStateBit|verbs.QPEnSQDNotifyBit))
}

func sqdDrain(l *lab) {
	p := l.pair()
	const n = 1 << 19
	src, dst := l.a.region(n, 0), l.b.region(n, allAccess)
	copy(src.mem, l.nextPattern(n))
	for i := range uint64(8) {
		p.a.send(remoteWR(i, verbs.OpWrite, src.sg(0, n), dst, 0))
	}
	p.toSQD(p.a, true)
	l.a.wantEvent("the send queue drains", ofQP(p.a.qp), verbs.EventSQDrained)
	// Drained: what was begun is complete and no other has been begun.
	l.settle()
	var wcs [16]verbs.WC
	done := uint64(p.a.scq.Poll(wcs[:]))
	for i, wc := range wcs[:done] {
		if wc.Status != verbs.WCSuccess || wc.ID != uint64(i) {
			l.Fatalf("what was begun completes in order: %+v", wc)
		}
	}
	p.a.send(sendWR(100, nil))
	p.b.recvEmpty(20)
	p.a.wantQuiet("nothing is begun in SQD")
	p.b.wantQuiet("what is posted in SQD waits")
	p.move(p.a, verbs.StateRTS, verbs.QPStateBit)
	for i := done; i < 8; i++ {
		p.a.wantSent("the rest goes on in RTS", i, verbs.WCWrite)
	}
	p.a.wantSent("what was posted in SQD too", 100, verbs.WCSend)
	p.b.wantRecvd("and arrives", 20, 0)
	l.wantBytes("the data is intact", dst.mem, src.mem)
	l.a.wantNoEvent("it drained once", verbs.EventSQDrained)
}

func sqdIdle(l *lab) {
	for _, t := range []verbs.QPType{verbs.RC, verbs.UD} {
		p := l.inState(t, verbs.StateRTS)
		p.toSQD(p.a, true)
		l.a.wantEvent(fmt.Sprintf("an idle %v QP drains", t), ofQP(p.a.qp), verbs.EventSQDrained)
		l.must("back to RTS", p.a.qp.Modify(p.moveAttr(move{verbs.StateSQD, verbs.StateRTS}), verbs.QPStateBit))
	}
}

func sqdSilent(l *lab) {
	p := l.pair()
	p.toSQD(p.a, false)
	p.b.to(verbs.StateSQD)
	l.settle()
	l.a.wantNoEvent("no event unless asked for", verbs.EventSQDrained)
	l.b.wantNoEvent("no event unless asked for", verbs.EventSQDrained)
}

// sqdResponder: the responder of a QP in SQD works on.
func sqdResponder(l *lab) {
	p := l.pair()
	p.toSQD(p.b, true)
	l.b.wantEvent("B drains", ofQP(p.b.qp), verbs.EventSQDrained)
	moveSend(p, verbs.OpSend, 10000)
	moveWrite(p, verbs.OpWriteWithImm, 10000)
	moveRead(p, verbs.OpRead, 10000)
	p.b.recvEmpty(1)
	p.ping(0)
	p.b.wantRecvd("receives posted in SQD are used", 1, 0)
}

func sqdErr(l *lab) {
	p := l.pair()
	p.toSQD(p.a, false)
	p.a.send(sendWR(1, nil), sendWR(2, nil))
	p.a.recvEmpty(3)
	p.a.to(verbs.StateErr)
	p.a.wantSendStatus("what waited in SQD flushes", verbs.WCFlushErr, 1, 2)
	p.a.wantRecvStatus("receives flush", verbs.WCFlushErr, 3)
}

// resetForgets: RESET drops all requests without completions; nothing of them is referenced any more.
func resetForgets(l *lab) {
	p := l.pair(func(k *link) { k.rnrTimer = 0 })
	r := l.a.region(1000, verbs.AccessLocalWrite)
	p.a.recv(verbs.RecvWR{ID: 1, SGs: r.sg(0, 500)}, verbs.RecvWR{ID: 2, SGs: r.sg(500, 500)})
	p.a.send(sendWR(3, r.sg(0, 1000)), sendWR(4, nil)) // B has no receive
	time.Sleep(time.Millisecond)
	p.a.to(verbs.StateReset)
	p.a.wantQuiet("requests vanish without completions")
	l.must("their memory is free", r.mr.Deregister())
	if got, want := p.a.qp.Query(), (verbs.QPAttr{}); got != want {
		l.Fatalf("no attribute is left: %+v", got)
	}
	p.b.recvEmpty(20)
	p.b.wantQuiet("nothing is sent any more")
}

// resetReuse: after RESET a QP is as new. Old packets and states do not come back.
func resetReuse(l *lab) {
	p := l.pair()
	for round := range 4 {
		moveSend(p, verbs.OpSend, 5000)
		moveRead(p, verbs.OpRead, 5000)
		p.b.recvEmpty(50, 51)
		switch round {
		case 1:
			p.a.to(verbs.StateErr)
			p.b.to(verbs.StateErr)
			p.b.wantRecvStatus("receives flush", verbs.WCFlushErr, 50, 51)
		case 2: // in the middle of something
			p.a.send(sendWR(60, l.a.region(1<<18, 0).sg(0, 1<<18)))
			p.a.wantRefused("a SEND of 256 KiB into an empty receive", verbs.WCRemInvReqErr, 60)
			p.b.wantRecvStatus("the receive is too short", verbs.WCLocLenErr, 50)
			p.b.wantRecvStatus("the other flushes", verbs.WCFlushErr, 51)
		}
		p.reconnect()
		p.a.wantQuiet("nothing is left of before")
		p.b.wantQuiet("nothing is left of before")
	}
}

// reconnect takes both QPs through RESET to RTS, with other PSNs.
func (p *pair) reconnect() {
	p.l.Helper()
	p.a.to(verbs.StateReset)
	p.b.to(verbs.StateReset)
	p.psnAB, p.psnBA = (p.psnAB+0x654321)&0xffffff, p.psnBA^0x5a5a5a
	p.connect()
}

// resetMiddle resets QPs with messages half sent, half received and half read: nothing of that is left.
func resetMiddle(l *lab) {
	const n = 1 << 19
	for _, pause := range pauses {
		p := l.pair(func(k *link) { k.rdAtomic, k.destRDAtomic = 1, 1 })
		a, b := l.a.region(n, allAccess), l.b.region(n, allAccess)
		for _, op := range []verbs.SendOpcode{verbs.OpSend, verbs.OpWrite, verbs.OpRead} {
			p.b.recv(verbs.RecvWR{ID: 1, SGs: b.sg(0, n)})
			p.a.send(remoteWR(1, op, a.sg(0, n), b, 0))
			time.Sleep(pause)
			p.reconnect()
			// What completed before the reset remains.
			l.settle()
			var wcs [4]verbs.WC
			p.a.scq.Poll(wcs[:])
			p.b.rcq.Poll(wcs[:])
			moveRead(p, verbs.OpRead, 9000)
			moveSend(p, verbs.OpSend, 9000)
			moveWrite(p, verbs.OpWriteWithImm, 9000)
			q := &pair{l: l, a: p.b, b: p.a, link: p.link}
			moveRead(q, verbs.OpRead, 9000)
			moveSend(q, verbs.OpSend, 9000)
		}
		l.must("close", p.a.qp.Close())
		l.must("close", p.b.qp.Close())
		l.deregister("nothing of the old messages holds memory", a)
		l.deregister("nothing of the old messages holds memory", b)
	}
}

// resetRNR resets a QP that sits out an RNR wait: the next incarnation does not.
func resetRNR(l *lab) {
	p := l.pair(func(k *link) { k.rnrTimer = 0 }) // 655 ms
	p.a.send(sendWR(1, nil))
	l.settle() // the RNR NAK is there
	p.reconnect()
	p.b.recvEmpty(20)
	start := time.Now()
	p.a.send(sendWR(2, nil))
	p.b.wantRecvd("the new message arrives", 20, 0)
	if took := time.Since(start); l.exact && took > 100*time.Millisecond {
		l.Fatalf("at once: it took %v", took)
	}
	p.a.wantSent("the new message completes", 2, verbs.WCSend)
	p.a.wantQuiet("the old one does not")
}

// rtrAnswers: a QP in RTR serves its peer's requests.
func rtrAnswers(l *lab) {
	k := l.link()
	p := &pair{l: l, a: l.a.newEnd(k.cfgA), b: l.b.newEnd(k.cfgB), link: k}
	p.toInit(p.a)
	p.toInit(p.b)
	p.toRTR(p.b)
	p.toRTR(p.a)
	p.toRTS(p.a)
	moveRead(p, verbs.OpRead, 5000)
	moveSend(p, verbs.OpSendWithImm, 5000)
	moveWrite(p, verbs.OpWriteWithImm, 5000)
	if s := p.b.qp.State(); s != verbs.StateRTR {
		l.Fatalf("it stays in RTR: %v", s)
	}
	l.b.wantEvent("the first packet in RTR establishes communication", ofQP(p.b.qp), verbs.EventCommEst)
	l.b.wantNoEvent("once", verbs.EventCommEst)
	p.toRTS(p.b)
	q := &pair{l: l, a: p.b, b: p.a, link: p.link}
	moveSend(q, verbs.OpSend, 5000)
}
