package softroce

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// maxMessage is the largest message in bytes (rocev2 spec 3.2).
const maxMessage = 1 << 31

// swqe is a posted send request and, once started, its place in the PSN space.
type swqe struct {
	id       uint64
	op       verbs.SendOpcode
	flags    verbs.SendFlags
	bad      bool   // a key was wrong at post, or a region deregistered
	indirect bool   // elements of sgs are looked up at each access
	started  bool   // PSNs assigned, at least one packet sent; a local operation: executed
	imm      uint32 // also the local key of READ with invalidate, the access of FAST_REG_MR, BIND_MW
	total    uint32
	rkey     uint32 // also the key of a local operation
	raddr    uint64 // also the IOVA of FAST_REG_MR, the address of BIND_MW
	cmp      uint64 // also the length of BIND_MW
	swap     uint64
	sgs      []sge
	first    psn.PSN
	npkts    int
	cost     uint64  // bytes the message's packets cost the peer's receive buffer
	startCum uint64  // cost of everything before it on this QP
	got      psn.PSN // READ: next response PSN expected
	chunk    int32   // READ: packets that one request asks for
	out      int32   // READ, atomic: requests counted in rdOut
}

func (w *swqe) last() psn.PSN    { return w.first.Add(w.npkts - 1) }
func (w *swqe) isRead() bool     { return w.op == verbs.OpRead || w.op == verbs.OpReadWithInv }
func (w *swqe) isReadLike() bool { return w.op >= verbs.OpRead && w.op <= verbs.OpReadWithInv }
func (w *swqe) isLocal() bool    { return w.op >= verbs.OpFastRegMR }

// swqeExt is what only UD sends and local operations have more.
type swqeExt struct {
	ah    verbs.AH
	rqpn  uint32
	rqkey uint32

	mr   *mr // what FAST_REG_MR maps, LOCAL_INV frees, BIND_MW binds to; referenced
	mw   *mw // what BIND_MW binds
	list *pageList
}

// qp is a queue pair.
type qp struct {
	dev    *device
	pd     *pd
	num    uint32
	typ    verbs.QPType
	cfg    verbs.QPConfig
	scq    *cq
	rcq    *cq
	srq    *srq // nil: rq
	rq     recvRing
	state  atomic.Uint32 // verbs.QPState; written under the engine role
	kicked atomic.Bool   // on dev.kicks
	errReq atomic.Bool   // SetError called
	closed atomic.Bool

	// The send queue. Posts append at tail under sqMu; the engine role owns [head, tail).
	sqMu    sync.Mutex
	sq      []swqe
	sqStore []sge
	exts    []swqeExt     // one per slot, from the first request on that needs it
	head    atomic.Uint32 // oldest incomplete request
	tail    atomic.Uint32

	// Everything below belongs to the engine role.
	attr   verbs.QPAttr
	pmtu   int
	peer   netip.AddrPort
	txFlow roce.Flow
	rxFlow roce.Flow      // for rxFrom
	rxFrom netip.AddrPort // RC: the peer, and its port
	ids    roce.IDTracker

	requester
	responder

	timerAt  time.Time // next time runTimers looks at the QP; zero: not in the heap
	timerIdx int
	ackList  bool     // on dev.acks
	faults   qpFaults // takes care of itself
	txList   bool     // on dev.txq
}

func (q *qp) slot(i uint32) *swqe   { return &q.sq[i&uint32(len(q.sq)-1)] }
func (q *qp) ext(i uint32) *swqeExt { return &q.exts[i&uint32(len(q.exts)-1)] }

// CreateQP implements verbs.PD.
func (p *pd) CreateQP(cfg verbs.QPConfig) (verbs.QP, error) {
	d := p.dev
	scq, ok1 := cfg.SendCQ.(*cq)
	rcq, ok2 := cfg.RecvCQ.(*cq)
	bad := func(what string, v any) (verbs.QP, error) {
		return nil, fmt.Errorf("create QP: %s %v: %w", what, v, verbs.ErrInvalid)
	}
	switch {
	case cfg.Type != verbs.RC && cfg.Type != verbs.UD:
		return bad("type", cfg.Type)
	case !ok1 || !ok2 || scq.dev != d || rcq.dev != d:
		return bad("completion queue", "of another device or nil")
	case cfg.MaxSendWR < 0 || cfg.MaxSendWR > d.attr.MaxQPWR:
		return bad("send queue depth", cfg.MaxSendWR)
	case cfg.MaxRecvWR < 0 || cfg.MaxRecvWR > d.attr.MaxQPWR:
		return bad("receive queue depth", cfg.MaxRecvWR)
	case cfg.MaxSendSGE < 0 || cfg.MaxSendSGE > d.attr.MaxSGE || cfg.MaxRecvSGE < 0 || cfg.MaxRecvSGE > d.attr.MaxSGE:
		return bad("SGE limit", fmt.Sprintf("%d/%d", cfg.MaxSendSGE, cfg.MaxRecvSGE))
	}
	var s *srq
	if cfg.SRQ != nil {
		if s, ok1 = cfg.SRQ.(*srq); !ok1 || s.pd.dev != d {
			return bad("shared receive queue", "of another device")
		}
	}
	cfg.MaxSendWR = max(cfg.MaxSendWR, 1)
	cfg.MaxSendSGE, cfg.MaxRecvSGE = max(cfg.MaxSendSGE, 1), max(cfg.MaxRecvSGE, 1)
	if err := p.addChild(); err != nil {
		return nil, fmt.Errorf("create QP: %w", err)
	}
	q := &qp{dev: d, pd: p, typ: cfg.Type, cfg: cfg, scq: scq, rcq: rcq, srq: s, timerIdx: -1}
	q.sq = make([]swqe, ringSlots(cfg.MaxSendWR))
	q.sqStore = make([]sge, len(q.sq)*min(cfg.MaxSendSGE, storedSGEs))
	if s == nil {
		q.rq.init(p, cfg.MaxRecvWR, cfg.MaxRecvSGE)
	}
	open := scq.use()
	open = rcq.use() && open
	if s != nil {
		open = s.use() && open
	}
	if !open {
		q.dropUses()
		return nil, fmt.Errorf("create QP: completion or shared receive queue: %w", verbs.ErrClosed)
	}
	if _, err := d.qps.reserve(func(n uint32) *qp { q.num = n; return q }); err != nil {
		q.dropUses()
		return nil, fmt.Errorf("create QP: %w", err)
	}
	return q, nil
}

func (q *qp) dropUses() {
	q.scq.users.Dec()
	q.rcq.users.Dec()
	if q.srq != nil {
		q.srq.users.Dec()
	}
	q.pd.dropChild()
}

func (q *qp) Num() verbs.QPN       { return verbs.QPN(q.num) }
func (q *qp) Type() verbs.QPType   { return q.typ }
func (q *qp) State() verbs.QPState { return verbs.QPState(q.state.Load()) }
func (q *qp) Context() any         { return q.cfg.Context }
func (q *qp) PD() verbs.PD         { return q.pd }

func (q *qp) setState(s verbs.QPState) { q.state.Store(uint32(s)) }

// PostSend implements verbs.QP.
func (q *qp) PostSend(wrs []verbs.SendWR) (int, error) {
	q.sqMu.Lock()
	n, err := q.postLocked(wrs)
	q.sqMu.Unlock()
	if n > 0 {
		q.dev.kick(q)
		q.dev.runTX()
	}
	return n, err
}

func (q *qp) postLocked(wrs []verbs.SendWR) (int, error) {
	if q.closed.Load() {
		return 0, verbs.ErrClosed
	}
	switch s := q.State(); s {
	case verbs.StateRTS, verbs.StateSQD, verbs.StateSQE, verbs.StateErr:
	default:
		return 0, &verbs.StateError{From: s, To: s}
	}
	for i := range wrs {
		wr := &wrs[i]
		t := q.tail.Load()
		if int(t-q.head.Load()) == q.cfg.MaxSendWR {
			return i, verbs.ErrSQFull
		}
		if len(wr.SGs) > q.cfg.MaxSendSGE {
			return i, fmt.Errorf("post send: %d SGEs, limit %d: %w", len(wr.SGs), q.cfg.MaxSendSGE, verbs.ErrInvalid)
		}
		if wr.Opcode < verbs.OpSend || wr.Opcode > verbs.OpBindMW {
			return i, fmt.Errorf("post send: %v: %w", wr.Opcode, verbs.ErrInvalid)
		}
		if wr.Opcode >= verbs.OpFastRegMR {
			if err := q.postLocalLocked(t, wr); err != nil {
				return i, fmt.Errorf("post send: %v: %w", wr.Opcode, err)
			}
			q.tail.Store(t + 1)
			continue
		}
		var total uint64
		for k := range wr.SGs {
			total += uint64(wr.SGs[k].Length)
		}
		if total > maxMessage {
			return i, fmt.Errorf("post send: %d bytes: %w", total, verbs.ErrInvalid)
		}
		k := t & uint32(len(q.sq)-1)
		w := &q.sq[k]
		*w = swqe{id: wr.ID, op: wr.Opcode, flags: wr.Flags, imm: wr.Imm, rkey: uint32(wr.RKey), raddr: wr.RemoteAddr,
			cmp: wr.CompareAdd, swap: wr.Swap, total: uint32(total)}
		if q.cfg.SignalAll {
			w.flags |= verbs.SendSignaled
		}
		switch {
		case wr.Opcode == verbs.OpSendWithInv:
			w.rkey = uint32(wr.InvalidateRKey)
		case wr.Opcode == verbs.OpReadWithInv:
			w.imm = uint32(wr.InvalidateRKey)
		case (wr.Opcode == verbs.OpCompareSwap || wr.Opcode == verbs.OpFetchAdd) && total != 8:
			return i, fmt.Errorf("post send: atomic with %d bytes of result: %w", total, verbs.ErrInvalid)
		}
		if q.typ == verbs.UD {
			if wr.Opcode != verbs.OpSend && wr.Opcode != verbs.OpSendWithImm {
				return i, fmt.Errorf("post send: %v on UD: %w", wr.Opcode, verbs.ErrInvalid)
			}
			if wr.AH == nil || !wr.AH.Remote.IsValid() || wr.AH.Remote.Is4In6() || wr.AH.Remote.Is4() != q.dev.addr.Is4() {
				return i, fmt.Errorf("post send: no address vector of the device's family: %w", verbs.ErrInvalid)
			}
			if int(total) > q.dev.attr.ActiveMTU.Bytes() {
				return i, fmt.Errorf("post send: %d bytes on UD, MTU %d: %w", total, q.dev.attr.ActiveMTU.Bytes(), verbs.ErrInvalid)
			}
			*q.extend(t) = swqeExt{ah: *wr.AH, rqpn: uint32(wr.RemoteQPN), rqkey: wr.RemoteQKey}
		}
		m := uint32(min(q.cfg.MaxSendSGE, storedSGEs))
		w.sgs, _, w.bad, w.indirect = q.pd.resolve(q.sqStore[k*m:(k+1)*m:(k+1)*m], wr.SGs)
		q.tail.Store(t + 1)
	}
	return len(wrs), nil
}

// storedSGEs is how long a list may be for which each request has room: those of a ring would be most of the QP's memory
// otherwise. A longer one, which only RDMA with scattered memory has, is allocated.
const storedSGEs = 3

// extend is ext for a poster, who may be the first to need it.
func (q *qp) extend(i uint32) *swqeExt {
	if q.exts == nil {
		q.exts = make([]swqeExt, len(q.sq))
	}
	return q.ext(i)
}

// postLocalLocked queues a local operation at index t. Keys and states are looked at when it executes; here
// only that it names objects of this device.
func (q *qp) postLocalLocked(t uint32, wr *verbs.SendWR) error {
	d := q.dev
	if q.typ != verbs.RC || len(wr.SGs) > 0 {
		return verbs.ErrInvalid
	}
	w := swqe{id: wr.ID, op: wr.Opcode, flags: wr.Flags}
	if q.cfg.SignalAll {
		w.flags |= verbs.SendSignaled
	}
	var x swqeExt
	switch wr.Opcode {
	case verbs.OpFastRegMR:
		r := wr.FastReg
		if r == nil {
			return verbs.ErrInvalid
		}
		m, ok1 := r.MR.(*mr)
		l, ok2 := r.Pages.(*pageList)
		if !ok1 || !ok2 || m.pd.dev != d || l.pd.dev != d || m.fast == 0 {
			return verbs.ErrInvalid
		}
		if err := l.take(); err != nil {
			return err
		}
		if x.list = l; m.refs.TryGet() {
			x.mr = m
		} else {
			w.bad = true
		}
		w.rkey, w.raddr, w.imm = uint32(r.Key), r.IOVA, uint32(r.Access)
	case verbs.OpLocalInv:
		w.rkey = uint32(wr.InvalidateRKey)
		if m := d.mrs.get(w.rkey >> 8); m != nil && m.refs.TryGet() {
			x.mr = m
		}
	case verbs.OpBindMW:
		b := wr.Bind
		if b == nil {
			return verbs.ErrInvalid
		}
		win, ok := b.MW.(*mw)
		if !ok || win.pd.dev != d {
			return verbs.ErrInvalid
		}
		if b.MR != nil {
			m, ok := b.MR.(*mr)
			if !ok || m.pd.dev != d {
				return verbs.ErrInvalid
			}
			if m.refs.TryGet() {
				x.mr = m
			} else {
				w.bad = true
			}
		}
		x.mw = win
		w.rkey, w.raddr, w.cmp, w.imm = uint32(b.Key), b.Addr, b.Length, uint32(b.Access)
	}
	*q.slot(t) = w
	*q.extend(t) = x
	return nil
}

// PostRecv implements verbs.QP.
func (q *qp) PostRecv(wrs []verbs.RecvWR) (int, error) {
	if q.srq != nil {
		return 0, fmt.Errorf("post receive on a QP with a shared receive queue: %w", verbs.ErrInvalid)
	}
	if q.closed.Load() {
		return 0, verbs.ErrClosed
	}
	s := q.State()
	if s == verbs.StateReset {
		return 0, &verbs.StateError{From: s, To: s}
	}
	n, err := q.rq.post(wrs)
	if n > 0 && q.State() == verbs.StateErr {
		q.dev.kick(q) // to be flushed
		q.dev.runTX()
	}
	return n, err
}

// SetError implements verbs.QP.
func (q *qp) SetError() {
	q.errReq.Store(true)
	q.dev.kick(q)
	q.dev.runTX()
}

// Query implements verbs.QP.
func (q *qp) Query() verbs.QPAttr {
	q.dev.mayWait("QP.Query")
	// Who is told that the QP is in ERR, say, may take its memory away.
	q.flushFaults()
	q.dev.role.Lock()
	defer q.dev.unlockRole()
	a := q.attr
	a.State = q.State()
	return a
}

// Close implements verbs.QP.
func (q *qp) Close() error {
	d := q.dev
	d.mayWait("QP.Close")
	q.faults.disable()
	q.flushFaults()
	d.role.Lock()
	defer d.unlockRole()
	q.sqMu.Lock()
	was := q.closed.Swap(true)
	q.sqMu.Unlock()
	if was {
		return nil
	}
	q.rq.close()
	// 1. No packet finds it any more. The CM may want its number kept until timewait is over, and may give it
	// back at once.
	tomb := &qp{dev: d, num: q.num}
	tomb.closed.Store(true)
	d.qps.replace(q.num, tomb)
	if !d.cm.qpClosed(q.Num()) {
		d.qps.remove(q.num)
	}
	// 2. Nothing is due for it any more, and its requests vanish with their references.
	q.reset()
	// 3. Parents.
	q.dropUses()
	return nil
}

// reset gives back all requests and clears the state of both halves. Engine role.
func (q *qp) reset() {
	d := q.dev
	d.timers.remove(q)
	d.tx.dropQP(q) // trains that wait for room in the socket may name its memory
	for h := q.head.Load(); h != q.tail.Load(); h++ {
		q.freeSend(h, q.slot(h))
	}
	if q.srq == nil {
		q.rq.discard()
	}
	if q.inMessage {
		release(q.responder.w.sgs)
	}
	q.requester = requester{}
	q.responder = responder{w: rwqe{sgs: q.responder.w.sgs[:0]}}
	q.cur = q.tail.Load()
	q.errReq.Store(false)
	q.setState(verbs.StateReset)
}

// qpRule is what a state transition of one transport demands (rocev2 spec 5.2).
type qpRule struct{ req, opt verbs.QPAttrMask }

type qpMove struct{ from, to verbs.QPState }

const (
	initAttrsRC = verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPAccessBit
	initAttrsUD = verbs.QPPKeyIndexBit | verbs.QPPortBit | verbs.QPQKeyBit
	rtsOptRC    = verbs.QPCurStateBit | verbs.QPAccessBit | verbs.QPMinRNRTimerBit | verbs.QPSendWindowBit
	rtsOptUD    = verbs.QPCurStateBit | verbs.QPQKeyBit
)

var qpRules = [...]map[qpMove]qpRule{
	verbs.RC: {
		{verbs.StateReset, verbs.StateInit}: {req: initAttrsRC},
		{verbs.StateInit, verbs.StateInit}:  {opt: initAttrsRC},
		{verbs.StateInit, verbs.StateRTR}: {req: verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit,
			opt: verbs.QPAccessBit | verbs.QPPKeyIndexBit},
		{verbs.StateRTR, verbs.StateRTS}: {req: verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit, opt: rtsOptRC},
		{verbs.StateRTS, verbs.StateRTS}: {opt: rtsOptRC},
		{verbs.StateRTS, verbs.StateSQD}: {opt: verbs.QPEnSQDNotifyBit},
		{verbs.StateSQD, verbs.StateRTS}: {opt: rtsOptRC},
		{verbs.StateSQD, verbs.StateSQD}: {opt: verbs.QPPortBit | verbs.QPAHBit | verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPMaxRDAtomicBit |
			verbs.QPMaxDestRDAtomicBit | verbs.QPAccessBit | verbs.QPPKeyIndexBit | verbs.QPMinRNRTimerBit},
		{verbs.StateSQE, verbs.StateRTS}: {opt: verbs.QPCurStateBit | verbs.QPAccessBit | verbs.QPMinRNRTimerBit},
	},
	verbs.UD: {
		{verbs.StateReset, verbs.StateInit}: {req: initAttrsUD},
		{verbs.StateInit, verbs.StateInit}:  {opt: initAttrsUD},
		{verbs.StateInit, verbs.StateRTR}:   {opt: verbs.QPPKeyIndexBit | verbs.QPQKeyBit},
		{verbs.StateRTR, verbs.StateRTS}:    {req: verbs.QPSQPSNBit, opt: rtsOptUD},
		{verbs.StateRTS, verbs.StateRTS}:    {opt: rtsOptUD},
		{verbs.StateRTS, verbs.StateSQD}:    {opt: verbs.QPEnSQDNotifyBit},
		{verbs.StateSQD, verbs.StateRTS}:    {opt: rtsOptUD},
		{verbs.StateSQD, verbs.StateSQD}:    {opt: verbs.QPPKeyIndexBit | verbs.QPQKeyBit},
		{verbs.StateSQE, verbs.StateRTS}:    {opt: rtsOptUD},
	},
}

// checkMove decides whether mask admits the transition.
func checkMove(t verbs.QPType, from, to verbs.QPState, mask verbs.QPAttrMask) error {
	mask &^= verbs.QPStateBit
	var r qpRule
	switch {
	case to == verbs.StateReset:
	case to == verbs.StateErr && from != verbs.StateReset:
	default:
		var ok bool
		if r, ok = qpRules[t][qpMove{from, to}]; !ok {
			return &verbs.StateError{From: from, To: to, Extra: verbs.QPStateBit}
		}
	}
	if missing, extra := r.req&^mask, mask&^(r.req|r.opt); missing|extra != 0 {
		return &verbs.StateError{From: from, To: to, Missing: missing, Extra: extra}
	}
	return nil
}

func (q *qp) checkValues(a *verbs.QPAttr, mask verbs.QPAttrMask) error {
	bad := func(what string, v any) error {
		return fmt.Errorf("modify QP: %s %v: %w", what, v, verbs.ErrInvalid)
	}
	has := func(b verbs.QPAttrMask) bool { return mask&b != 0 }
	switch {
	case has(verbs.QPPKeyIndexBit) && a.PKeyIndex != 0:
		return bad("pkey_index", a.PKeyIndex)
	case has(verbs.QPPortBit) && a.Port != 1:
		return bad("port", a.Port)
	case has(verbs.QPAccessBit) && a.Access&^accessAll != 0:
		return bad("access", a.Access)
	case has(verbs.QPAHBit) && (!a.AH.Remote.IsValid() || a.AH.Remote.Is4() != q.dev.addr.Is4() || a.AH.Remote.Is4In6()):
		return bad("address", a.AH.Remote)
	case has(verbs.QPPathMTUBit) && (a.PathMTU.Bytes() == 0):
		return bad("path_mtu", uint8(a.PathMTU))
	case has(verbs.QPDestQPNBit) && a.DestQPN > 0xffffff:
		return bad("dest_qpn", a.DestQPN)
	case has(verbs.QPRQPSNBit) && a.RQPSN > 0xffffff:
		return bad("rq_psn", a.RQPSN)
	case has(verbs.QPSQPSNBit) && a.SQPSN > 0xffffff:
		return bad("sq_psn", a.SQPSN)
	case has(verbs.QPTimeoutBit) && a.Timeout > 31:
		return bad("timeout", a.Timeout)
	case has(verbs.QPMinRNRTimerBit) && a.MinRNRTimer > 31:
		return bad("min_rnr_timer", a.MinRNRTimer)
	case has(verbs.QPRetryCountBit) && a.RetryCount > 7:
		return bad("retry_cnt", a.RetryCount)
	case has(verbs.QPRNRRetryBit) && a.RNRRetry > 7:
		return bad("rnr_retry", a.RNRRetry)
	case has(verbs.QPMaxRDAtomicBit) && int(a.MaxRDAtomic) > q.dev.attr.MaxRDAtomic:
		return bad("max_rd_atomic", a.MaxRDAtomic)
	case has(verbs.QPMaxDestRDAtomicBit) && int(a.MaxDestRDAtomic) > q.dev.attr.MaxRDAtomic:
		return bad("max_dest_rd_atomic", a.MaxDestRDAtomic)
	case has(verbs.QPSendWindowBit) && a.SendWindow < 0:
		return bad("send_window", a.SendWindow)
	case has(verbs.QPCurStateBit) && a.CurState != q.State():
		return bad("cur_state", a.CurState)
	}
	return nil
}

// Modify implements verbs.QP.
func (q *qp) Modify(a verbs.QPAttr, mask verbs.QPAttrMask) error {
	d := q.dev
	d.mayWait("QP.Modify")
	leaving := mask&verbs.QPStateBit != 0 && (a.State == verbs.StateReset || a.State == verbs.StateErr)
	if leaving {
		q.faults.disable()
		q.flushFaults()
	}
	d.role.Lock()
	defer d.unlockRole()
	err := q.modify(a, mask)
	if s := q.State(); leaving && err != nil && s != verbs.StateReset && s != verbs.StateErr && !q.closed.Load() {
		q.faults.enable()
		d.wakeFaulted(q)
	}
	return err
}

// modify is Modify under the engine role.
func (q *qp) modify(a verbs.QPAttr, mask verbs.QPAttrMask) error {
	d := q.dev
	if q.closed.Load() {
		return verbs.ErrClosed
	}
	q.applyErr() // a SetError that nobody has carried out yet comes first
	from := q.State()
	to := from
	if mask&verbs.QPStateBit != 0 {
		to = a.State
	}
	if d.off && to != verbs.StateReset && to != verbs.StateErr {
		return fmt.Errorf("modify QP: %w", verbs.ErrDeviceGone)
	}
	if err := checkMove(q.typ, from, to, mask); err != nil {
		return err
	}
	if err := q.checkValues(&a, mask); err != nil {
		return err
	}
	q.merge(&a, mask)
	switch to {
	case verbs.StateReset:
		q.sqMu.Lock() // posts see RESET before the ring is emptied
		q.reset()
		q.sqMu.Unlock()
		q.attr = verbs.QPAttr{}
	case verbs.StateErr:
		q.enterErr()
	case verbs.StateRTR:
		if from != verbs.StateRTR {
			q.enterRTR()
		}
		q.setState(to)
	case verbs.StateRTS:
		if from == verbs.StateRTR {
			q.enterRTS()
		}
		q.setState(to)
		d.kick(q)
	case verbs.StateSQD:
		q.setState(to)
		if from == verbs.StateRTS {
			q.sqdNotify = mask&verbs.QPEnSQDNotifyBit != 0 && a.EnSQDNotify
			q.checkDrained()
		}
	default:
		if from == verbs.StateReset {
			q.faults.enable()
		}
		q.setState(to)
	}
	if mask&verbs.QPSendWindowBit != 0 {
		q.setWindow(a.SendWindow)
	}
	d.now = time.Now()
	return nil
}

func (q *qp) merge(a *verbs.QPAttr, mask verbs.QPAttrMask) {
	t := &q.attr
	for _, f := range [...]struct {
		bit verbs.QPAttrMask
		set func()
	}{
		{verbs.QPAccessBit, func() { t.Access = a.Access }},
		{verbs.QPPKeyIndexBit, func() { t.PKeyIndex = a.PKeyIndex }},
		{verbs.QPPortBit, func() { t.Port = a.Port }},
		{verbs.QPQKeyBit, func() { t.QKey = a.QKey }},
		{verbs.QPAHBit, func() { t.AH = a.AH; q.setPeer() }},
		{verbs.QPPathMTUBit, func() { t.PathMTU = a.PathMTU; q.pmtu = a.PathMTU.Bytes() }},
		{verbs.QPDestQPNBit, func() { t.DestQPN = a.DestQPN }},
		{verbs.QPRQPSNBit, func() { t.RQPSN = a.RQPSN }},
		{verbs.QPSQPSNBit, func() { t.SQPSN = a.SQPSN }},
		{verbs.QPMaxRDAtomicBit, func() { t.MaxRDAtomic = a.MaxRDAtomic }},
		{verbs.QPMaxDestRDAtomicBit, func() { t.MaxDestRDAtomic = a.MaxDestRDAtomic }},
		{verbs.QPMinRNRTimerBit, func() { t.MinRNRTimer = a.MinRNRTimer }},
		{verbs.QPTimeoutBit, func() { t.Timeout = a.Timeout }},
		{verbs.QPRetryCountBit, func() { t.RetryCount = a.RetryCount }},
		{verbs.QPRNRRetryBit, func() { t.RNRRetry = a.RNRRetry }},
		{verbs.QPEnSQDNotifyBit, func() { t.EnSQDNotify = a.EnSQDNotify }},
		{verbs.QPSendWindowBit, func() { t.SendWindow = a.SendWindow }},
	} {
		if mask&f.bit != 0 {
			f.set()
		}
	}
}

func (q *qp) setPeer() {
	d := q.dev
	q.peer = netip.AddrPortFrom(q.attr.AH.Remote, d.conn.LocalAddr().Port())
	q.txFlow = roce.NewFlow(d.conn.LocalAddr(), q.peer)
	q.rxFrom, q.rxFlow = q.peer, roce.NewFlow(q.peer, d.conn.LocalAddr())
}

func (q *qp) enterRTR() {
	n := 0
	if m := int(q.attr.MaxDestRDAtomic); m > 0 {
		for n = 1; n < m; n *= 2 { // rxe rounds up and may use it (rocev2 spec 4.9)
		}
	}
	q.epsn = psn.New(q.attr.RQPSN)
	q.ring = make([]rdEntry, n)
}

func (q *qp) enterRTS() {
	p := psn.New(q.attr.SQPSN)
	q.una, q.nxt, q.max = p, p, p
	q.cur = q.head.Load()
	q.setWindow(q.attr.SendWindow)
	q.cwnd = initialWindow
	q.ssthresh = 1 << 40
	q.rto = initialRTO
	q.rnrLeft = q.attr.RNRRetry
}

// applyErr carries out a SetError. Engine role.
func (q *qp) applyErr() {
	if q.errReq.Swap(false) && q.State() != verbs.StateReset {
		q.enterErr()
	}
}

// enterErr moves the QP to ERR and flushes (rocev2 spec 3.13). Also called again to flush what was
// posted since. Engine role.
func (q *qp) enterErr() {
	d := q.dev
	first := q.State() != verbs.StateErr
	q.setState(verbs.StateErr)
	if first {
		q.faults.disable() // perhaps in a handler: nobody waits for them here
		d.timers.remove(q)
		d.tx.dropQP(q)
		if q.inMessage {
			// A receive request was in use and no error of its own ended it.
			q.finishRecv(verbs.WCFlushErr)
		}
		q.rdq = q.rdq[:0]
		q.ackDue = false
		q.paceUntil = time.Time{}
	}
	q.flushSends()
	if q.srq == nil {
		var w rwqe
		for q.rq.take(&w) {
			release(w.sgs)
			d.stats.add(cFlushed, 1)
			q.complete(q.rcq, &verbs.WC{ID: w.id, Status: verbs.WCFlushErr, QPN: verbs.QPN(q.num)}, false)
		}
	} else if first {
		d.async(verbs.AsyncEvent{Type: verbs.EventQPLastWQEReached, QP: q})
	}
}

// flushSends completes all send requests as flushed.
func (q *qp) flushSends() {
	for h := q.head.Load(); h != q.tail.Load(); h++ {
		w := q.slot(h)
		wc := verbs.WC{ID: w.id, Status: verbs.WCFlushErr, QPN: verbs.QPN(q.num)}
		q.freeSend(h, w)
		q.dev.stats.add(cFlushed, 1)
		q.complete(q.scq, &wc, false)
	}
	q.cur = q.head.Load()
}

// freeSend releases slot h, which is the head, with all references that the request holds: the only way a
// send request ends. Engine role.
func (q *qp) freeSend(h uint32, w *swqe) {
	if w.indirect && w.started {
		q.countUses(w, -1)
	}
	release(w.sgs)
	w.sgs = nil
	if w.isLocal() {
		x := q.ext(h)
		if x.mr != nil {
			x.mr.refs.Put()
		}
		if x.list != nil {
			x.list.give()
		}
		*x = swqeExt{}
	}
	q.head.Store(h + 1)
}

// countUses counts a started request in the regions it looks up.
func (q *qp) countUses(w *swqe, n int) {
	for i := range w.sgs {
		if s := &w.sgs[i]; s.base == nil {
			s.mr.uses += n
		}
	}
}

// names reports whether send request i references m. Engine role.
func (q *qp) names(i uint32, m *mr) bool {
	w := q.slot(i)
	return namesRegion(w.sgs, m) || w.isLocal() && q.ext(i).mr == m
}

// complete queues a completion; a full CQ moves the QP to ERR (rocev2 spec 5.6).
func (q *qp) complete(c *cq, wc *verbs.WC, solicited bool) {
	if !c.push(wc, solicited) && q.State() != verbs.StateErr && q.State() != verbs.StateReset {
		q.errReq.Store(true)
		q.dev.kick(q)
	}
}

// Sender constants that are not attributes.
const (
	initialWindow = 128 << 10
	minWindow     = 32 << 10 // a handful of full packets: enough to see a NAK rather than a timeout
	initialRTO    = 200 * time.Millisecond
	minRTO        = 100 * time.Millisecond
	maxRTO        = 2 * time.Second
)
