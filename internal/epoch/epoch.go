// Package epoch delays the freeing of what the garbage collector cannot free (registered memory,
// keys, queue pairs, devices, mapped memory) until nobody can be using it any more. It is RCU in
// spirit.
//
// Readers are Participants: engines and workers that registered. A participant calls Enter before
// it reads a shared table and Exit after its last use of what it found there (once per batch, and
// always before it blocks). A writer first unpublishes the object, with an atomic store, then
// hands a callback to Retire, or calls Synchronize; the callback runs once every participant that
// was inside at that moment has left. That time is a grace period:
//
//	reader                         writer
//	p.Enter()                      table.Store(&without)
//	x := table.Load().find(key)    d.Retire(func() { x.unmap() })
//	x.use()
//	p.Exit()
//
// There is no global epoch number. Each participant counts its own entries and exits on a cache line
// that nobody else writes: odd is inside. A grace period is over when every participant seen
// at an odd count has moved on from it. Compared with a shared number that readers copy and a
// reclaimer advances, Enter reads nothing shared, and there is nothing to advance by polling.
//
// Two pairs of steps need an order that a store and a later load do not have by themselves. A reader's Enter
// comes before what it reads, as the writer's unpublishing comes before its look at the counts: so a
// reader that the writer does not see inside cannot find the object. A reader's Exit comes before its look for a
// mark, as the waiter's mark comes before its check of the counts: so a reader that leaves unseen
// sees the mark. Writers pay for both where the system lets them (Linux on amd64: membarrier(2)), and readers write
// with plain stores; elsewhere readers count with Go's atomics, which are sequentially consistent.
//
// Nothing polls and nothing runs on an idle Domain: a goroutine exists only while there is garbage.
// It marks the participants it waits for, and only the Exit of a marked participant wakes it; other
// Exits pay for one load of their own cache line.
//
// The protocol is modelled in spin/epoch.pml and checked over every interleaving. Steps that the model
// has are named here as there: R_ENTER, G_MARK.
//
// Limitations: a participant that stays inside holds back all garbage; that is reported with its stack
// (Config.OnStall), not cured. Order is by grace period: callbacks run in the order of their Retire.
package epoch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openrds/openrds/internal/invariants"
)

const (
	// defaultMaxPending is far above what a flush of a memory pool retires at once, and small beside the
	// memory such garbage holds.
	defaultMaxPending = 4096
	// defaultStallAfter is a hundred thousand times the batch of an engine. A goroutine that the
	// scheduler does not run for want of a core stays below it.
	defaultStallAfter = 10 * time.Second
)

// Config is the configuration of a Domain. The zero value is valid.
type Config struct {
	// MaxPending is how many retired callbacks may wait before Throttle holds its callers; 0 means 4096.
	MaxPending int
	// OnStall, if not nil, is told of a participant that holds back a grace period, first after
	// StallAfter and then each time the wait has doubled. It runs on the goroutine that waits (the
	// worker or a caller of Synchronize) with no lock held.
	OnStall func(Stall)
	// StallAfter is when OnStall is first called; 0 means 10 s.
	StallAfter time.Duration

	fenced bool // readers order their own steps even where writers could; for tests
	rig    *rig // for tests
}

// Domain is a set of readers and the garbage that waits for them. All methods are safe for
// concurrent use.
type Domain struct {
	cfg     Config
	light   bool // participants are light
	rig     *rig
	pending atomic.Int64 // callbacks retired and not yet run

	mu           sync.Mutex
	participants []*Participant // replaced, never changed, so that a copy of the slice is a snapshot
	retired      []func()
	spare        []func()    // the previous batch's array, for the next
	waiters      []chan wake // one per grace period in progress
	room         chan struct{}
	idle         chan struct{} // closed when the worker ends; nil when there is none
	workerID     int64         // goroutine of the worker, under invariants
	closed       bool
}

type wake = struct{}

// NewDomain returns a Domain with the default configuration.
func NewDomain() *Domain { return Config{}.NewDomain() }

// NewDomain returns a Domain without participants. The first of a process takes about 10 ms on Linux
// (see registerFence).
func (cfg Config) NewDomain() *Domain {
	if cfg.MaxPending <= 0 {
		cfg.MaxPending = defaultMaxPending
	}
	if cfg.StallAfter <= 0 {
		cfg.StallAfter = defaultStallAfter
	}
	return &Domain{cfg: cfg, rig: cfg.rig, light: haveLight && !cfg.fenced && registerFence()}
}

// Retire has fn run after every participant that is inside now has left. The object was unpublished
// before. fn runs on the domain's worker, after the callbacks retired before it; it may call Retire,
// and should not wait for long, since the rest waits for it. Retire itself never blocks, so it is
// good for completion handlers, and therefore takes garbage without bound: callers that allocate
// what will be retired call Throttle there.
func (d *Domain) Retire(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed && d.idle == nil {
		panic("BUG: epoch: Retire after Close")
	}
	// W_RETIRE; W_UNPUBLISH was the caller's, before.
	d.pending.Add(1)
	d.retired = append(d.retired, fn)
	if d.idle == nil {
		d.idle = make(chan struct{})
		go d.work()
	}
}

// Pending returns how many callbacks were retired and have not yet run.
func (d *Domain) Pending() int { return int(d.pending.Load()) }

// Throttle waits while the garbage is at its bound, and returns ctx's error if that ends first. The
// caller is not inside: it would wait for itself.
func (d *Domain) Throttle(ctx context.Context) error {
	d.MayWait("Throttle")
	if d.pending.Load() < int64(d.cfg.MaxPending) {
		return nil
	}
	for {
		d.mu.Lock()
		if d.pending.Load() < int64(d.cfg.MaxPending) {
			d.mu.Unlock()
			return nil
		}
		if d.room == nil {
			d.room = make(chan struct{})
		}
		room := d.room
		d.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Synchronize returns after every participant that is inside now has left. The caller is not
// inside and is no callback: panics for both under -tags invariants, and without it waits for ever in the first
// case. Callbacks retired earlier may not have run yet.
func (d *Domain) Synchronize() { d.SynchronizeUntil(nil) }

// SynchronizeUntil is Synchronize for who cannot wait for a reader that stays. It returns false if stop is closed first: there
// has been no grace period then, and nothing may be freed.
func (d *Domain) SynchronizeUntil(stop <-chan struct{}) bool {
	d.MayWait("Synchronize")
	return d.wait(d.look(d.snapshot()), stop)
}

// Synchronize is Domain.Synchronize for the goroutine that uses p, and panics in every build when p
// is inside.
func (p *Participant) Synchronize() {
	if p.Inside() {
		panic(fmt.Sprintf("BUG: epoch: Synchronize by %q, which is inside", p.name))
	}
	p.domain.Synchronize()
}

// MayWait panics, under -tags invariants, if the caller of op is inside, as completion handlers are, or is a callback: op may
// wait, and these may not. Without the tag the goroutines are not known.
func (d *Domain) MayWait(op string) {
	if !invariants.Enabled {
		return
	}
	me := invariants.GoroutineID()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.workerID == me {
		panic(fmt.Sprintf("BUG: epoch: %s in a retired callback", op))
	}
	for _, p := range d.participants {
		if p.inside.Load() == me {
			panic(fmt.Sprintf("BUG: epoch: %s by the goroutine of %q, which is inside", op, p.name))
		}
	}
}

// Close runs everything that was retired, in order, waits for the worker to end, and refuses what
// is retired later. It returns an error that names the participants still registered: whoever
// registered them did not close. The caller is not inside and is no callback. Returns the same the second
// time.
func (d *Domain) Close() error { return d.CloseUntil(nil) }

// CloseUntil is Close that gives up when stop is closed, because a participant stays inside. The error counts what waits for it: the
// worker frees that when it leaves. Close may be called again to wait for that.
func (d *Domain) CloseUntil(stop <-chan struct{}) error {
	d.MayWait("Close")
	d.mu.Lock()
	d.closed = true // callbacks still to run may retire more; when the worker has ended nobody may
	idle := d.idle
	d.mu.Unlock()
	var left []string
	if idle != nil {
		select {
		case <-idle:
		case <-stop:
			left = append(left, fmt.Sprintf("%d callbacks wait", d.Pending()))
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.participants) > 0 {
		names := make([]string, len(d.participants))
		for i, p := range d.participants {
			names[i] = p.name
		}
		left = append(left, "still registered: "+strings.Join(names, ", "))
	}
	if left == nil {
		return nil
	}
	return errors.New("epoch: close: " + strings.Join(left, "; "))
}

// work runs batches until there is no garbage left.
func (d *Domain) work() {
	if invariants.Enabled {
		d.mu.Lock()
		d.workerID = invariants.GoroutineID()
		d.mu.Unlock()
	}
	var old []*Participant
	if d.broken(faultOldParticipants) {
		old = d.snapshot()
	}
	for {
		var in []section
		if d.broken(faultLookBeforeTake) {
			in = d.look(d.snapshot())
		}
		d.at("G_TAKE")
		d.mu.Lock()
		batch := d.retired
		if len(batch) == 0 {
			if d.broken(faultEndUnlocked) {
				d.mu.Unlock()
				d.at("G_END")
				d.mu.Lock()
			}
			// G_END: in the same critical section, so that a Retire either came before or starts another worker.
			close(d.idle)
			d.idle, d.workerID = nil, 0
			d.mu.Unlock()
			return
		}
		d.retired, d.spare = d.spare[:0], nil
		d.mu.Unlock()

		// From here on d.snapshot and d.look are later than every Retire of the batch.
		switch {
		case d.broken(faultLookBeforeTake):
		case d.broken(faultOldParticipants):
			in = d.look(old)
		default:
			in = d.look(d.snapshot())
		}
		d.wait(in, nil)
		d.at("G_FREE")
		for i, fn := range batch {
			batch[i] = nil
			fn()
			d.pending.Add(-1)
		}

		d.mu.Lock()
		if cap(batch) <= defaultMaxPending { // do not keep the array of an extraordinary burst
			d.spare = batch[:0]
		}
		if d.room != nil && d.pending.Load() < int64(d.cfg.MaxPending) {
			close(d.room)
			d.room = nil
		}
		d.mu.Unlock()
	}
}
