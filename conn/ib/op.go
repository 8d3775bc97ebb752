package ib

import (
	"errors"
	"fmt"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// MaxOpSGE is how many SGEs one work request of an Op names at most, as a kernel's does (rds-protocol spec 3.9).
const MaxOpSGE = 8

// Op is a one-sided operation: RDMA READ, RDMA WRITE, or an atomic. It is posted as one work request, or as several in a
// row if it names more pieces of local memory than fit into one, the remote address advancing. Nothing in it may be changed
// between PostOp and OpDone.
type Op struct {
	Opcode     verbs.SendOpcode // OpRead, OpWrite, OpCompareSwap, OpFetchAdd
	SGs        []verbs.SGE      // local memory, keys of the link's device; at least one, none of them empty
	RKey       verbs.RKey
	RemoteAddr uint64
	CompareAdd uint64 // of an atomic
	Swap       uint64

	Owner OpOwner

	left   atomic.Int32  // requests not complete, and one while PostOp is at it
	status atomic.Uint32 // verbs.WCStatus of the first that did not succeed
}

// OpOwner is told of the end of an Op.
type OpOwner interface {
	// OpDone is called once for an Op of which anything was posted, when the QP touches none of its memory any more: by the
	// send handler, by PostOp, or by Close. s is the status of its first request that did not succeed; WCFlushErr
	// if it is not known whether that was executed; WCGeneralErr if the device refused it.
	OpDone(s verbs.WCStatus)
}

// OpWRs is how many slots of the ring an Op with n SGEs takes.
func (l *Link) OpWRs(n int) int { return (n + l.opSGE - 1) / l.opSGE }

// PostOp posts o, for which there are enough slots (Free). posted says whether anything of it was: OpDone is then called, here or
// later. An error that matches ErrRefused says that the device does not take the operation; the link
// is as it was. Any other error means that the link is broken. Transmitter, with no lock held.
func (l *Link) PostOp(o *Op) (posted bool, err error) {
	o.status.Store(uint32(verbs.WCSuccess))
	o.left.Store(1)
	sgs, raddr := o.SGs, o.RemoteAddr
	for len(sgs) > 0 && err == nil {
		h := l.head.Load()
		mark := uint32(0)
		if p := l.pool.Load(); p != nil {
			mark = p.Mark()
		}
		n := 0
		for ; n < BatchMax && len(sgs) > 0; n++ {
			k := min(l.opSGE, len(sgs))
			// Each is signaled: if the device refuses a later one nothing else tells of those it took.
			l.wrs[n] = verbs.SendWR{ID: l.num | uint64(h+uint32(n))&idCount, Opcode: o.Opcode, Flags: verbs.SendSignaled, SGs: sgs[:k:k],
				RemoteAddr: raddr, RKey: o.RKey, CompareAdd: o.CompareAdd, Swap: o.Swap}
			for _, s := range sgs[:k] {
				raddr += uint64(s.Length)
			}
			sgs = sgs[k:]
			*l.slot(h + uint32(n)) = slot{kind: oneSided, op: o, mark: mark} // before the QP may complete it
		}
		o.left.Add(int32(n))
		l.head.Store(h + uint32(n))
		var got int
		got, err = l.qp.PostSend(l.wrs[:n])
		clear(l.wrs[:n])
		l.cfg.Stats.Posted.Add(uint64(got))
		posted = posted || got > 0
		if got < n {
			// What was not taken never completes. Nobody but the transmitter fills slots, so these are the last.
			for i := got; i < n; i++ {
				*l.slot(h + uint32(i)) = slot{}
			}
			l.head.Store(h + uint32(got))
			o.left.Sub(int32(n - got))
		}
	}
	if err != nil {
		if refusal(err) {
			o.status.CompareAndSwap(uint32(verbs.WCSuccess), uint32(verbs.WCGeneralErr))
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		} else {
			err = fmt.Errorf("post: %w", err)
			l.fail(err)
		}
	}
	if o.left.Dec() == 0 && posted {
		o.Owner.OpDone(verbs.WCStatus(o.status.Load()))
	}
	return posted, err
}

// ErrRefused is an operation that the device does not take.
var ErrRefused = errors.New("operation refused by the device")

// refusal tells a request the device does not like from a queue that takes nothing.
func refusal(err error) bool {
	var state *verbs.StateError
	return !errors.Is(err, verbs.ErrSQFull) && !errors.Is(err, verbs.ErrClosed) && !errors.As(err, &state)
}

// completed takes note that one request of o has completed.
func (o *Op) completed(s verbs.WCStatus) {
	o.status.CompareAndSwap(uint32(verbs.WCSuccess), uint32(s))
	if o.left.Dec() == 0 {
		o.Owner.OpDone(verbs.WCStatus(o.status.Load()))
	}
}
