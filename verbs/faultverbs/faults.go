// Package faultverbs wraps a verbs provider and misbehaves on request, for tests of what stands on
// verbs.
//
// It does nothing a provider might not do by the letter of package verbs: calls fail, take their time,
// or take part of a batch; completions come late, and those of different QPs in another order;
// a request fails; a QP errs; a device dies or is unplugged, or lacks what others have. With no fault set it is the provider it wraps and passes verbstest; with
// delayed and shuffled completions it passes as well.
//
//	var faults faultverbs.Faults
//	provider := faultverbs.Wrap(softroce.New(cfg), &faults)
//	faults.Fail(faultverbs.CreateQP, 3, verbs.ErrNoMemory) // the third from now
//
// The loop over all calls that may fail:
//
//	for n := 1; ; n++ {
//		faults.Fail(faultverbs.Any, n, errTest)
//		run(t) // must leave nothing behind, whatever failed
//		if faults.Clear() > 0 {
//			break // fewer than n calls were made
//		}
//	}
//
// # Limitations
//
// What is in the provider's hands stays there: packets are lost by internal/simnet, not here. Objects
// of a wrapped provider are to be used with objects of the same wrapper only.
package faultverbs

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// Op names a call that can be made to fail or to take its time.
type Op uint8

// The calls. Those that cannot fail by the letter of verbs are not among them.
const (
	Any Op = iota // all of them, counted together
	OpenDevice
	WatchDevices
	AllocPD
	CreateCQ
	CreateSRQ
	CreateQP
	RegMR
	RegOnDemandMR
	AllocFastRegMR
	Deregister
	AdviseMR
	AllocPageList
	SetPageList
	ClosePageList
	AllocMW
	DeallocMW
	CloseDevice
	ClosePD
	CloseCQ
	CloseSRQ
	Modify
	PostSend
	PostRecv
	PostSRQ
	ArmSRQ
	Connect
	Listen
	Accept
	Reject
	numOps
)

func (o Op) String() string {
	names := [...]string{"Any", "OpenDevice", "WatchDevices", "AllocPD", "CreateCQ", "CreateSRQ", "CreateQP", "RegMR", "RegOnDemandMR", "AllocFastRegMR",
		"Deregister", "AdviseMR", "AllocPageList", "SetPageList", "ClosePageList", "AllocMW", "DeallocMW", "CloseDevice", "ClosePD", "CloseCQ",
		"CloseSRQ", "Modify", "PostSend", "PostRecv", "PostSRQ", "ArmSRQ", "Connect", "Listen", "Accept", "Reject"}
	if int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("Op(%d)", uint8(o))
}

// ErrDeviceGone is what a device answers after DeviceFatal or DeviceRemoved. It matches verbs.ErrClosed.
var ErrDeviceGone = fmt.Errorf("device is gone: %w", verbs.ErrClosed)

// Faults is a program of misbehaviour. The zero value does nothing. All methods may be called from
// any goroutine, at any time.
type Faults struct {
	calls [numOps]atomic.Int64

	armed    atomic.Int32 // len(rules): lets calls pass without the lock
	armedWRs atomic.Int32 // len(wrRules)
	mu       sync.Mutex
	rules    []*rule
	wrRules  []*wrRule

	without atomic.Uint32 // verbs.DeviceCaps

	wcDelay   atomic.Duration // of completions
	wcShuffle atomic.Bool
	seed      atomic.Uint64
}

// rule acts on the nth call of op from now, or on every one.
type rule struct {
	op    Op
	nth   int // 0: every call
	err   error
	delay time.Duration
}

// wrRule acts on the nth send request of opcode op from now: it is refused with err, or completes with status.
type wrRule struct {
	op     verbs.SendOpcode
	nth    int
	err    error
	status verbs.WCStatus
}

// Fail makes the nth call of op from now (1: the next) fail with err instead of reaching the provider. A
// call that posts a batch takes the first half of it and fails for the rest. To be legal, err
// must be one op may return.
func (f *Faults) Fail(op Op, nth int, err error) { f.add(&rule{op: op, nth: nth, err: err}) }

// FailAll makes every call of op fail with err, until Clear.
func (f *Faults) FailAll(op Op, err error) { f.add(&rule{op: op, err: err}) }

// Delay makes the nth call of op from now sleep for d before it reaches the provider. For calls that may
// wait: a delayed post in a handler would stop the provider.
func (f *Faults) Delay(op Op, nth int, d time.Duration) { f.add(&rule{op: op, nth: nth, delay: d}) }

// DelayAll makes every call of op sleep for d, until Clear.
func (f *Faults) DelayAll(op Op, d time.Duration) { f.add(&rule{op: op, delay: d}) }

// FailPost makes PostSend refuse the nth request of opcode op from now with err: it takes those before it in the
// batch. Requests are counted when they are posted, refused or not.
func (f *Faults) FailPost(op verbs.SendOpcode, nth int, err error) {
	f.addWR(&wrRule{op: op, nth: nth, err: err})
}

// FailWR makes the nth request of opcode op from now complete with status when its turn comes. It has no effect
// but this; what was posted before it is not touched, what is behind it is flushed, and its QP errs. For
// providers with CapMemMgtExtensions. Until then no other request of its QP may have the same ID.
func (f *Faults) FailWR(op verbs.SendOpcode, nth int, status verbs.WCStatus) {
	f.addWR(&wrRule{op: op, nth: nth, status: status})
}

func (f *Faults) addWR(r *wrRule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrRules = append(f.wrRules, r)
	f.armedWRs.Store(int32(len(f.wrRules)))
}

// request counts a request of opcode op and gives the rule that is to act on it, if any.
func (f *Faults) request(op verbs.SendOpcode) (due *wrRule) {
	if f.armedWRs.Load() == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrRules = slices.DeleteFunc(f.wrRules, func(r *wrRule) bool {
		if r.op != op {
			return false
		}
		r.nth--
		if r.nth > 0 || due != nil {
			r.nth = max(r.nth, 1)
			return false
		}
		due = r
		return true
	})
	f.armedWRs.Store(int32(len(f.wrRules)))
	return due
}

func (f *Faults) add(r *rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, r)
	f.armed.Store(int32(len(f.rules)))
}

// DelayCompletions makes every completion arrive in its CQ d later than it did, handlers accordingly; 0
// stops it for those to come. A CQ that exists follows from when it is next polled or armed. A CQ
// holds up to twice its depth then.
func (f *Faults) DelayCompletions(d time.Duration) { f.wcDelay.Store(d) }

// ShuffleCompletions makes Poll return what is in a CQ in an order drawn from seed, in which only the
// completions of one QP keep theirs; 0 stops it.
func (f *Faults) ShuffleCompletions(seed uint64) {
	f.seed.Store(seed)
	f.wcShuffle.Store(seed != 0)
}

// Clear drops all rules of Fail, Delay, FailPost and FailWR and returns how many had not acted yet (those for every
// call do not count). Completions are not touched.
func (f *Faults) Clear() (unused int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.nth > 0 {
			unused++
		}
	}
	unused += len(f.wrRules)
	f.rules, f.wrRules = nil, nil
	f.armed.Store(0)
	f.armedWRs.Store(0)
	return unused
}

// Calls is how many calls of op were made so far, failed ones included.
func (f *Faults) Calls(op Op) int { return int(f.calls[op].Load()) }

// call counts a call and says how it is to fail, after whatever delay it is due.
func (f *Faults) call(op Op) error {
	f.calls[op].Inc()
	f.calls[Any].Inc()
	if f.armed.Load() == 0 {
		return nil
	}
	var err error
	var delay time.Duration
	f.mu.Lock()
	keep := f.rules[:0]
	for _, r := range f.rules {
		switch {
		case r.op != op && r.op != Any:
		case r.nth > 1:
			r.nth--
		default:
			delay += r.delay
			if err == nil {
				err = r.err
			}
			if r.nth == 1 {
				continue // has acted
			}
		}
		keep = append(keep, r)
	}
	clear(f.rules[len(keep):])
	f.rules = keep
	f.armed.Store(int32(len(keep)))
	f.mu.Unlock()
	if delay > 0 {
		time.Sleep(delay)
	}
	return err
}

// Without makes devices that are opened from now on lack caps: they do not announce them, and what takes them fails with
// verbs.ErrNotSupported. Requests of peers are the provider's affair, as ever.
func (f *Faults) Without(caps verbs.DeviceCaps) {
	if caps&verbs.CapMemMgtExtensions != 0 {
		caps |= verbs.CapReadWithInv // which has nothing to invalidate then
	}
	f.without.Store(uint32(caps))
}

// BreakQP makes the connection of vq fail: the oldest send request whose completion has not been polled
// completes with status, all behind it are flushed, and the QP moves to ERR. The peer is not told. With no
// send outstanding the QP just moves to ERR.
//
// A request may complete with an error although the peer has executed it: its acknowledgement was lost.
// So completions that are in the CQ already are turned into errors; receives never are, their messages
// have been acknowledged. Where sends and receives of vq share a CQ, their IDs must differ.
func (f *Faults) BreakQP(vq verbs.QP, status verbs.WCStatus) {
	q := vq.(*qp)
	q.scq.breakQP(q.Num(), status, q.recentSends())
	q.QP.SetError()
}

// DeviceFatal makes dev die of an error of its own: EventDeviceFatal is raised, every QP moves to ERR,
// connections end, and calls that make anything new fail with ErrDeviceGone. What exists can, and
// must, still be closed.
func (f *Faults) DeviceFatal(dev verbs.Device) { dev.(*device).die(verbs.EventDeviceFatal) }

// DeviceRemoved is DeviceFatal for a device that is unplugged: EventDeviceRemoved is raised. As after a replug,
// its address may be opened again once it is closed. Those who watch for devices are not told.
func (f *Faults) DeviceRemoved(dev verbs.Device) { dev.(*device).die(verbs.EventDeviceRemoved) }
