package epoch

import (
	"fmt"
	"runtime"
	"sync/atomic"

	"github.com/openrds/openrds/internal/invariants"
)

// Participant is a reader. One goroutine at a time uses it; a role that moves between goroutines
// may take its participant along.
type Participant struct {
	// The pads keep the words below alone on their cache line, whatever the allocation's
	// alignment, and out of the neighbour line that processors fetch along with it.
	_ [128]byte
	// count is the number of entries and exits: odd while inside. Written by the reader only.
	count atomic.Uint64
	// watched counts the grace periods that wait for this participant's next Exit. Decides
	// whether Exit wakes somebody.
	watched atomic.Int32
	// light says that count is written by plain stores, which the writers' fences order. Constant.
	light bool
	_     [128]byte

	domain *Domain
	name   string
	reader atomic.Pointer[string] // the function that entered first; for reports
	inside atomic.Int64           // the goroutine that is inside, under invariants
}

// Register adds a reader; name is what reports call it.
func (d *Domain) Register(name string) *Participant {
	p := &Participant{domain: d, name: name, light: d.light}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		panic(fmt.Sprintf("BUG: epoch: Register of %q after Close", name))
	}
	// P_REGISTER. A grace period that took its snapshot before may miss p: p enters later than that, and finds
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
	d.participants = rest // P_UNREGISTER
}

// Name returns the name given to Register.
func (p *Participant) Name() string { return p.name }

// Enter begins a read-side section: what is retired from now on stays usable until Exit. p is outside.
func (p *Participant) Enter() {
	// R_ENTER; R_READ and R_USE are the caller's, between this and Exit.
	var n uint64
	if haveLight && p.light {
		n = p.count.Load() + 1 // nobody else writes it
		storeRelease(&p.count, n)
	} else {
		n = p.count.Add(1)
	}
	if n&1 == 0 {
		p.enteredTwice()
	} else if n == 1 {
		p.enteredFirst()
	}
	if invariants.Enabled {
		p.inside.Store(invariants.GoroutineID())
	}
}

// Exit ends the section: nothing found inside may be touched any more.
func (p *Participant) Exit() {
	if invariants.Enabled {
		p.inside.Store(0)
	}
	// R_EXIT
	var n uint64
	if haveLight && p.light {
		n = p.count.Load() + 1
		storeRelease(&p.count, n)
	} else {
		n = p.count.Add(1)
	}
	if n&1 != 0 {
		p.exitedTwice()
	}
	// R_LOOK. The waiter marks first and checks the count then; this is the other order, so one of the two
	// sees the other.
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

// enteredFirst notes who calls Enter, so that a report can tell readers from other goroutines. Only the
// first time: asking at each would cost twenty times what Enter does.
//
//go:noinline
func (p *Participant) enteredFirst() {
	var pc [1]uintptr
	if runtime.Callers(3, pc[:]) == 1 { // Callers, enteredFirst, Enter
		f, _ := runtime.CallersFrames(pc[:]).Next()
		p.reader.Store(&f.Function)
	}
}
