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
// reclaimer advances, Enter reads nothing shared, and there is nothing to advance by polling. It is
// correct because Go's atomics are sequentially consistent: a reader whose Enter comes after the
// reclaimer's look at it also comes after the unpublishing, and so cannot find the object.
//
// Nothing polls and nothing runs on an idle Domain: a goroutine exists only while there is garbage.
// It marks the participants it waits for, and only the Exit of a marked participant wakes it; other
// Exits pay for one load of their own cache line.
//
// Limitations: a participant that stays inside holds back all garbage; that is reported (Config.
// OnStall), not cured. Order is by grace period: callbacks run in the order of their Retire.
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
	// OnStall, if not nil, is told of a participant that has held back a grace period for inside, first
	// after StallAfter and then each time the wait has doubled. It runs on the goroutine that waits
	// (the worker or a caller of Synchronize) with no lock held.
	OnStall func(participant string, inside time.Duration)
	// StallAfter is when OnStall is first called; 0 means 10 s.
	StallAfter time.Duration
}

// Domain is a set of readers and the garbage that waits for them. All methods are safe for
// concurrent use.
type Domain struct {
	cfg     Config
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

// NewDomain returns a Domain without participants.
func (cfg Config) NewDomain() *Domain {
	if cfg.MaxPending <= 0 {
		cfg.MaxPending = defaultMaxPending
	}
	if cfg.StallAfter <= 0 {
		cfg.StallAfter = defaultStallAfter
	}
	return &Domain{cfg: cfg}
}

// Participant is a reader. One goroutine at a time uses it; a role that moves between goroutines
// may take its participant along.
type Participant struct {
	// The pads keep the two words below alone on their cache line, whatever the allocation's
	// alignment, and out of the neighbour line that processors fetch along with it.
	_ [128]byte
	// count is the number of entries and exits: odd while inside. Written by the reader only.
	count atomic.Uint64
	// watched counts the grace periods that wait for this participant's next Exit. Decides
	// whether Exit wakes somebody.
	watched atomic.Int32
	_       [128]byte

	domain    *Domain
	name      string
	goroutine atomic.Int64 // who is inside, under invariants
}

// Register adds a reader; name is what reports call it.
func (d *Domain) Register(name string) *Participant {
	p := &Participant{domain: d, name: name}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		panic(fmt.Sprintf("BUG: epoch: Register of %q after Close", name))
	}
	// A grace period that took its snapshot before may miss p: p enters later than that, and finds
	// nothing that was unpublished earlier.
	d.participants = append(d.participants[:len(d.participants):len(d.participants)], p)
	return p
}

// Unregister removes p, which is outside and is not used again.
func (p *Participant) Unregister() {
	d := p.domain
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.Inside() {
		panic(fmt.Sprintf("BUG: epoch: Unregister of %q, which is inside", p.name))
	}
	rest := make([]*Participant, 0, len(d.participants))
	for _, q := range d.participants {
		if q != p {
			rest = append(rest, q)
		}
	}
	if len(rest) == len(d.participants) {
		panic(fmt.Sprintf("BUG: epoch: Unregister of %q twice", p.name))
	}
	d.participants = rest
}

// Name returns the name given to Register.
func (p *Participant) Name() string { return p.name }

// Enter begins a read-side section: what is retired from now on stays usable until Exit. p is outside.
func (p *Participant) Enter() {
	if p.count.Add(1)&1 == 0 {
		p.enteredTwice()
	}
	if invariants.Enabled {
		p.goroutine.Store(invariants.GoroutineID())
	}
}

// Exit ends the section: nothing found inside may be touched any more.
func (p *Participant) Exit() {
	if invariants.Enabled {
		p.goroutine.Store(0)
	}
	if p.count.Add(1)&1 != 0 {
		p.exitedTwice()
	}
	// The waiter marks first and looks at the count then; this is the other order, so one of the two sees
	// the other.
	if p.watched.Load() != 0 {
		p.domain.wake()
	}
}

// Checkpoint is Exit and Enter in one for a reader that goes from one batch to the next without
// blocking: nothing found before may be touched after it. It costs one load while no grace period waits for
// p. p is inside, before and after.
func (p *Participant) Checkpoint() {
	if p.watched.Load() != 0 {
		p.Exit()
		p.Enter()
	} else if invariants.Enabled && !p.Inside() {
		panic(fmt.Sprintf("BUG: epoch: Checkpoint by %q, which is outside", p.name))
	}
}

// Inside reports whether p is between Enter and Exit. It means something to p's own goroutine only.
func (p *Participant) Inside() bool { return p.count.Load()&1 != 0 }

//go:noinline
func (p *Participant) enteredTwice() {
	p.count.Add(^uint64(0))
	panic(fmt.Sprintf("BUG: epoch: Enter by %q, which is inside", p.name))
}

//go:noinline
func (p *Participant) exitedTwice() {
	p.count.Add(^uint64(0))
	panic(fmt.Sprintf("BUG: epoch: Exit by %q, which is outside", p.name))
}

// wake tells every grace period in progress to look again.
//
//go:noinline
func (d *Domain) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range d.waiters {
		select {
		case w <- wake{}:
		default: // it has not yet looked since the last time
		}
	}
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
	if d.pending.Load() < int64(d.cfg.MaxPending) {
		return nil
	}
	if invariants.Enabled {
		d.refuseInside("Throttle")
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
func (d *Domain) Synchronize() {
	if invariants.Enabled {
		d.refuseInside("Synchronize")
	}
	d.gracePeriod()
}

// Synchronize is Domain.Synchronize for the goroutine that uses p, and panics in every build when p
// is inside.
func (p *Participant) Synchronize() {
	if p.Inside() {
		panic(fmt.Sprintf("BUG: epoch: Synchronize by %q, which is inside", p.name))
	}
	p.domain.Synchronize()
}

// refuseInside panics if the calling goroutine is inside, or is the worker. Only under invariants
// are the goroutines known.
func (d *Domain) refuseInside(op string) {
	me := invariants.GoroutineID()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.workerID == me {
		panic(fmt.Sprintf("BUG: epoch: %s in a retired callback", op))
	}
	for _, p := range d.participants {
		if p.goroutine.Load() == me {
			panic(fmt.Sprintf("BUG: epoch: %s by the goroutine of %q, which is inside", op, p.name))
		}
	}
}

// Close runs everything that was retired, in order, waits for the worker to end, and refuses what
// is retired later. It returns an error that names the participants still registered: whoever
// registered them did not close. The caller is not inside and is no callback. Returns the same the second
// time.
func (d *Domain) Close() error {
	if invariants.Enabled {
		d.refuseInside("Close")
	}
	d.mu.Lock()
	d.closed = true // callbacks still to run may retire more; when the worker has ended nobody may
	idle := d.idle
	d.mu.Unlock()
	if idle != nil {
		<-idle
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.participants) == 0 {
		return nil
	}
	var names []string
	for _, p := range d.participants {
		names = append(names, p.name)
	}
	return errors.New("epoch: close: still registered: " + strings.Join(names, ", "))
}

// work runs batches until there is no garbage left.
func (d *Domain) work() {
	if invariants.Enabled {
		d.mu.Lock()
		d.workerID = invariants.GoroutineID()
		d.mu.Unlock()
	}
	for {
		d.mu.Lock()
		batch := d.retired
		if len(batch) == 0 {
			close(d.idle)
			d.idle, d.workerID = nil, 0
			d.mu.Unlock()
			return
		}
		d.retired, d.spare = d.spare[:0], nil
		d.mu.Unlock()

		d.gracePeriod()
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

// inside is a participant that a grace period waits for.
type inside struct {
	p     *Participant
	count uint64 // odd; the wait is over once p has another
}

// gracePeriod waits until every participant that is inside when it is called has left.
func (d *Domain) gracePeriod() {
	d.mu.Lock()
	all := d.participants
	d.mu.Unlock()
	var wait []inside
	for _, p := range all {
		if n := p.count.Load(); n&1 != 0 {
			wait = append(wait, inside{p, n})
		}
	}
	if len(wait) > 0 {
		d.waitFor(wait)
	}
}

func (d *Domain) waitFor(wait []inside) {
	woken := make(chan wake, 1)
	d.mu.Lock()
	d.waiters = append(d.waiters, woken)
	d.mu.Unlock()
	for _, w := range wait {
		w.p.watched.Add(1)
	}

	began, bound := time.Now(), d.cfg.StallAfter
	stall := time.NewTimer(bound)
	defer stall.Stop()
	for {
		// Only now, after the marks: an Exit before a mark is seen here, one after it wakes us.
		still := wait[:0]
		for _, w := range wait {
			if w.p.count.Load() == w.count {
				still = append(still, w)
			} else {
				w.p.watched.Add(-1)
			}
		}
		if wait = still; len(wait) == 0 {
			break
		}
		select {
		case <-woken:
		case <-stall.C:
			if d.cfg.OnStall != nil {
				for _, w := range wait {
					if w.p.count.Load() == w.count {
						d.cfg.OnStall(w.p.name, time.Since(began))
					}
				}
			}
			stall.Reset(bound)
			bound *= 2
		}
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	for i, w := range d.waiters {
		if w == woken {
			last := len(d.waiters) - 1
			d.waiters[i], d.waiters[last] = d.waiters[last], nil
			d.waiters = d.waiters[:last]
			break
		}
	}
}
