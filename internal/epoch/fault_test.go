package epoch

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/invariants"
)

// The callers' part of the protocol can be broken too.
const (
	callerAnnounceLate fault = 100 + iota // a reader reads the pointer, then enters
	callerLeaveEarly                      // a reader leaves, then uses what it found
	callerRetireEarly                     // a writer retires, then unpublishes
)

// mistakes are the broken variants of the protocol: each makes the model fail (TestSpin), and is caught here.
var mistakes = []struct {
	fault  fault
	model  string // the -D of spin/epoch.pml
	hangs  bool   // somebody waits for ever, instead of using what is freed or forgetting to free it
	litmus bool   // needs processors that really reorder: TestFences has it
}{
	{fault: callerAnnounceLate, model: "ANNOUNCE_LATE"},
	{fault: callerLeaveEarly, model: "LEAVE_EARLY"},
	{fault: callerRetireEarly, model: "RETIRE_EARLY"},
	{fault: faultNoFence, model: "NO_FENCE", litmus: true},
	{fault: faultCheckBeforeMark, model: "CHECK_BEFORE_MARK", hangs: true},
	{fault: faultNoMarkFence, model: "NO_MARK_FENCE", hangs: true, litmus: true},
	{fault: faultNoWake, model: "NO_WAKE", hangs: true},
	{fault: faultLookBeforeTake, model: "LOOK_BEFORE_TAKE"},
	{fault: faultOldParticipants, model: "OLD_PARTICIPANTS"},
	{fault: faultEndUnlocked, model: "END_UNLOCKED"},
}

// pause lets others run, mostly.
func pause() {
	for range rand.IntN(4) {
		runtime.Gosched()
	}
}

// stressRound runs a few readers and writers on a domain of their own, in a bubble, and returns what went
// wrong. A waiter that is not woken shows exactly: nobody sleeps, so the bubble's clock moves only when
// everybody waits for somebody else.
func stressRound(cfg Config, f fault) (wrong string) {
	type object struct{ freed atomic.Bool }
	var mu sync.Mutex
	report := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		if wrong == "" {
			wrong = s
		}
	}
	cfg.rig = &rig{fault: f, at: func(string) { pause() }}
	cfg.StallAfter = time.Hour
	d := cfg.NewDomain()
	var cur atomic.Pointer[object]
	cur.Store(new(object))
	began := time.Now()
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			pause()
			p := d.Register("reader")
			defer p.Unregister()
			for range 3 {
				var o *object
				if f == callerAnnounceLate {
					o = cur.Load()
					pause()
					p.Enter()
				} else {
					p.Enter()
					pause()
					o = cur.Load()
				}
				if f == callerLeaveEarly {
					p.Exit()
				}
				for range 3 {
					pause()
					if o.freed.Load() {
						report("a reader used a freed object")
					}
				}
				if f != callerLeaveEarly {
					p.Exit()
				}
				pause()
			}
		})
	}
	var freed atomic.Int64
	const each = 3
	for w := range 2 {
		all.Go(func() {
			for i := range each {
				pause()
				free := func(o *object) { o.freed.Store(true); freed.Add(1) }
				switch {
				case f == callerRetireEarly:
					old := cur.Load()
					d.Retire(func() { free(old) })
					pause()
					cur.CompareAndSwap(old, new(object))
				case i == w:
					old := cur.Swap(new(object))
					d.Synchronize()
					free(old)
				default:
					old := cur.Swap(new(object))
					d.Retire(func() { free(old) })
				}
			}
		})
	}
	all.Wait()
	if err := d.Close(); err != nil {
		report(err.Error())
	}
	if n := freed.Load(); n != 2*each {
		report(fmt.Sprintf("%d of %d objects were freed", n, 2*each))
	}
	if waited := time.Since(began); waited != 0 {
		report("somebody was not woken")
	}
	for range len(d.participants) {
		report("a participant is left")
	}
	return wrong
}

// stress runs up to n rounds, and returns what went wrong and in which.
func stress(t *testing.T, cfg Config, f fault, n int) (wrong string, round int) {
	synctest.Test(t, func(*testing.T) {
		for round = 1; round <= n && wrong == ""; round++ {
			wrong = stressRound(cfg, f)
		}
	})
	return wrong, round - 1
}

// TestStressSteps has every step of the protocol interrupted at random.
func TestStressSteps(t *testing.T) {
	for _, procs := range []int{1, 2, 8} {
		for _, fenced := range []bool{false, true} {
			t.Run(fmt.Sprintf("procs=%d/fenced=%t", procs, fenced), func(t *testing.T) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				if wrong, round := stress(t, Config{fenced: fenced}, faultNone, 1000); wrong != "" {
					t.Errorf("%s in round %d", wrong, round)
				}
			})
		}
	}
}

// TestFaults: the same finds each mistake, soon, on one processor as on several.
func TestFaults(t *testing.T) {
	for _, m := range mistakes {
		if m.litmus {
			continue
		}
		for _, procs := range []int{1, 2, 8} {
			t.Run(fmt.Sprintf("%s/procs=%d", m.model, procs), func(t *testing.T) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				wrong, round := stress(t, Config{}, m.fault, 20000)
				if wrong == "" {
					t.Fatalf("not found in %d rounds", round)
				}
				if m.hangs != (wrong == "somebody was not woken") {
					t.Errorf("found: %s", wrong)
				}
				t.Logf("round %d: %s", round, wrong)
			})
		}
	}
}

// spin passes some nanoseconds, at least n turns, without leaving the processor.
func spin(n uint32) {
	for range n {
		runtime.KeepAlive(n)
	}
}

// litmus is a race that a reader and a writer run again and again, starting together and at random distances.
type litmus struct {
	d          *Domain
	p          *Participant
	turn, left atomic.Int64 // the race that runs, the last that the reader has finished
	caught     atomic.Bool
	// Each writes its half of these lines before the steps that matter. Stores to lines that the other processor
	// has wait in the store buffer, and those that matter wait behind them.
	lines [8]struct {
		reader, writer uint64
		_              [112]byte
	}
}

// run is the test: races until one is caught or limit is over. It returns whether one was, and how many ran.
func (l *litmus) run(f fault, at func(step string), reader func(n int64, delay uint32), writer func(n int64), limit time.Duration) (bool, int64) {
	const end = -1
	l.d = Config{StallAfter: time.Millisecond, rig: &rig{fault: f, at: at}}.NewDomain()
	l.p = l.d.Register("reader")
	var wg sync.WaitGroup
	wg.Go(func() {
		defer l.p.Unregister()
		r := rand.New(rand.NewPCG(1, 2))
		for n := int64(1); ; n++ {
			delay := r.Uint32N(1000)
			for l.turn.Load() != n {
				if l.turn.Load() == end {
					return
				}
			}
			reader(n, delay)
			l.left.Store(n)
		}
	})
	var n int64
	for end := time.Now().Add(limit); !l.caught.Load() && time.Now().Before(end); {
		n++
		writer(n)
		for l.left.Load() != n {
		}
	}
	l.turn.Store(end)
	wg.Wait()
	return l.caught.Load(), n
}

// lookLitmus: a reader enters while a writer replaces the object, looks, and frees; caught is a reader that uses a
// freed object.
func lookLitmus(f fault, limit time.Duration) (caught bool, races int64) {
	var l litmus
	var cur atomic.Uint32
	var freed [2]struct {
		atomic.Bool
		_ [127]byte
	}
	var race int64
	r := rand.New(rand.NewPCG(3, 4))
	return l.run(f,
		func(step string) {
			if step == "G_FENCE" { // off they go; this is the latest time to unpublish, when everybody is registered
				l.turn.Store(race)
				spin(r.Uint32N(1000))
				cur.Store(1 - cur.Load())
			}
		},
		func(n int64, delay uint32) {
			spin(delay)
			for i := range l.lines {
				l.lines[i].reader = uint64(n)
			}
			l.p.Enter()
			o := &freed[cur.Load()]
			for range 1000 {
				if o.Load() {
					l.caught.Store(true)
				}
			}
			l.p.Exit()
		},
		func(n int64) {
			old := cur.Load()
			freed[1-old].Store(false)
			for i := range l.lines {
				l.lines[i].writer = uint64(n)
			}
			race = n
			l.d.Synchronize()
			freed[old].Store(true)
		}, limit)
}

// markLitmus: a reader leaves while somebody marks it; caught is a waiter that sleeps although the reader has left.
func markLitmus(f fault, limit time.Duration) (caught bool, races int64) {
	var l litmus
	var inside, marks atomic.Int64
	r := rand.New(rand.NewPCG(3, 4))
	return l.run(f,
		func(step string) {
			switch step {
			case "G_MARK":
				marks.Store(l.turn.Load())
				spin(r.Uint32N(1000))
			case "G_SLEEP":
				// First see the reader leave. Was the waiter woken, then? (To sleep in earnest would take so long that there
				// would be few races.)
				for l.left.Load() != l.turn.Load() {
				}
				l.d.mu.Lock()
				if len(l.d.waiters[0]) == 0 {
					l.caught.Store(true)
				}
				l.d.mu.Unlock()
			}
		},
		func(n int64, delay uint32) {
			l.p.Enter()
			inside.Store(n)
			for marks.Load() != n {
			}
			spin(delay)
			for i := range l.lines {
				l.lines[i].reader = uint64(n)
			}
			l.p.Exit()
		},
		func(n int64) {
			for i := range l.lines {
				l.lines[i].writer = uint64(n)
			}
			l.turn.Store(n)
			for inside.Load() != n {
			}
			l.d.Synchronize()
		}, limit)
}

// TestFences: without either fence of the writers' side this machine's processors do what the model's store
// buffers do; with them they do not.
func TestFences(t *testing.T) {
	if d := NewDomain(); !d.light {
		t.Skip("readers fence themselves here: no membarrier(2), not linux/amd64, or under the race detector")
	}
	if invariants.Enabled {
		t.Skip("the bookkeeping of -tags invariants is a fence for readers")
	}
	if runtime.NumCPU() < 2 {
		t.Skip("one processor: nothing is reordered")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	for _, c := range []struct {
		name   string
		litmus func(fault, time.Duration) (bool, int64)
		fault  fault
	}{
		{"look", lookLitmus, faultNoFence},
		{"mark", markLitmus, faultNoMarkFence},
	} {
		t.Run(c.name, func(t *testing.T) {
			if caught, n := c.litmus(faultNone, 300*time.Millisecond); caught {
				t.Errorf("with the fence, race %d went wrong", n)
			}
			caught, n := c.litmus(c.fault, 30*time.Second)
			if !caught {
				t.Errorf("without the fence nothing went wrong in %d races", n)
			}
			t.Logf("without the fence, race %d went wrong", n)
		})
	}
}
