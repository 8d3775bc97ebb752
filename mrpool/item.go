package mrpool

import (
	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// state is where an item is in its life.
//
//	empty ──allocate──▶ free ──Map──▶ mapped ──Unmap──▶ invalid ──proven──▶ free    (before that, on its own queue: mapped)
//	                                  │    │             ▲   │
//	              request failed      │    └─Free▶ freed ┘   │ queue lost
//	           ┌──────────────────────┘              │       ▼
//	           ▼                                     └───▶ stale ──recovered──▶ free, or empty
//	         lost ──given back─────────────────────────────▶ ▲
//	           └──recovered──▶ dead ──given back──▶ empty
//
//	plain registration: mapped ──given back──▶ freed ──deregistered──▶ empty, or stale if it is refused
//
//	empty    no objects: on pool.empty, or being filled
//	free     objects ready: on pool.free
//	mapped   the owner of a Mapping has it
//	invalid  given back; its invalidation is due, posted or proven
//	freed    given back; mapped still, on pool.dirty
//	lost     the owner has it still, but its request failed: recovery has the objects
//	dead     lost, and recovery is done: the owner's giving back makes it empty
//	stale    nobody has it but recovery
type state uint8

const (
	stEmpty state = iota
	stFree
	stMapped
	stInvalid
	stFreed
	stLost
	stDead
	stStale
	numStates
)

func (s state) String() string {
	return [...]string{"empty", "free", "mapped", "invalid", "freed", "lost", "dead", "stale"}[s]
}

// kind is the way an item gives a peer a key; what objects it has follows from it.
type kind uint8

const (
	byFastReg kind = iota
	byWindow
	byRegistration
	numKinds
)

// item is a place in a pool for one region. Items are made once and stay; the objects in them come and go.
//
// Who owns it by its state: a stack while empty, free or freed, the owner of the Mapping while mapped, then its QP
// under QP.mu, then flush worker or recovery. Only an owner touches the plain fields.
type item struct {
	pool  *pool
	index uint32        // in its pool
	next  atomic.Uint32 // on a stack: index of the one below, plus one
	word  atomic.Uint64 // generation << 8 | state; decides

	kind kind
	mr   verbs.MR // of AllocFastRegMR, or RegMR
	mw   verbs.MW
	key  atomic.Uint32 // the key last given to a request

	q      *QP   // the mapping's; nil for plain registration
	pinned int64 // bytes pinned, until proven given back
	done   func(error)
	batch  *batch // the flush that invalidates it
	over   *item  // window: the region under it, on which it has a use
	invSeq uint32 // of its last invalidation, in the record of q
	// users of a plain registration: its Mapping and the windows over it. Not 0 while it may be used.
	users atomic.Int32
	gone  atomic.Uint64 // the generation whose key the peer has invalidated

	dones []func(error) // of generations that failed; under pool.mu
	lives int           // how often nothing was left that could touch its memory; under pool.mu, or by the owner
	tries int           // of recovery

	debug
}

const stateBits = 8

func (it *item) load() (gen uint64, s state) {
	w := it.word.Load()
	return w >> stateBits, state(w & (1<<stateBits - 1))
}

func (it *item) state() state { return state(it.word.Load() & (1<<stateBits - 1)) }

// is reports whether generation and state are these.
func (it *item) is(gen uint64, s state) bool { return it.word.Load() == gen<<stateBits|uint64(s) }

// isGone reports whether the peer has invalidated it: a request of ours to do so would fail.
func (it *item) isGone() bool {
	gen, _ := it.load()
	return it.gone.Load() == gen
}

// set is for the owner.
func (it *item) set(gen uint64, s state) { it.word.Store(gen<<stateBits | uint64(s)) }

// move changes the state if generation and state are as expected.
func (it *item) move(gen uint64, from, to state) bool {
	return it.word.CompareAndSwap(gen<<stateBits|uint64(from), gen<<stateBits|uint64(to))
}

// destroy gives the objects back to the device. On error the item still has them. May wait.
func (it *item) destroy() error {
	if it.mw != nil {
		if err := it.mw.Dealloc(); err != nil {
			return err
		}
		it.mw = nil
	}
	if it.mr != nil {
		if err := it.mr.Deregister(); err != nil {
			return err
		}
		it.mr = nil
	}
	return nil
}

// use takes a use of a plain registration of generation gen, unless it was given back.
func (it *item) use(gen uint64) bool {
	for {
		n := it.users.Load()
		if n <= 0 {
			return false
		}
		if it.users.CompareAndSwap(n, n+1) {
			break
		}
	}
	if g, s := it.load(); g != gen || s != stMapped {
		it.unuse()
		return false
	}
	return true
}

// unuse gives a use back; after the last the region can be deregistered. The caller holds a reference to the device.
func (it *item) unuse() {
	if it.users.Dec() == 0 {
		it.pool.setAside(it, it.state() == stInvalid)
	}
}
