// Package verbstest is the suite that defines package verbs: what it asserts is what a provider
// does. Every provider passes it; a provider bug becomes a case here first.
//
// The suite sees only the interfaces of verbs. It brings its own time-outs and, where the provider
// under test lives entirely in this process (softroce over a simulated network), runs each case in
// a bubble of virtual time (see [Within]), so that seconds of retransmission cost nothing.
//
// # Limitations
//
// What needs hostile or hand-made packets (a response of the wrong kind, a WRITE whose Last never
// comes with everything else alive) cannot be said in verbs and belongs to a provider's own tests.
package verbstest

import (
	"net/netip"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// Env is the world a case runs in.
type Env struct {
	// Provider is the provider under test. No device of Addrs is open.
	Provider verbs.Provider
	// Addrs are the addresses of at least two devices that reach each other.
	Addrs []netip.Addr

	// Nowhere is an address of the same family at which nothing answers. Cases that want
	// one are skipped when it is not valid.
	Nowhere netip.Addr
	// Unowned is an address no device of the provider has. The case that wants one is skipped when it is
	// not valid.
	Unowned netip.Addr
	// Partition cuts every link between Addrs (packets vanish in both directions) or heals it. Cases
	// that want it are skipped when it is nil.
	Partition func(cut bool)
	// Lossy says that the network loses, repeats or reorders packets: that an unreliable datagram
	// arrives, or the one NAK that says why a request was refused, is then not asserted.
	Lossy bool
	// Settle is how long nothing must happen before the suite believes that nothing will. Zero: 20 ms.
	Settle time.Duration
}

// Option changes how Run runs its cases.
type Option func(*options)

type options struct {
	within   func(*testing.T, func(*testing.T))
	virtual  bool // within was given
	parallel bool
}

// Within runs the body of each case through f. testing/synctest.Test is meant: a provider whose
// packets stay in the process is then tested in virtual time.
func Within(f func(*testing.T, func(*testing.T))) Option {
	return func(o *options) { o.within, o.virtual = f, true }
}

// Parallel runs the cases in parallel. open must then give each call addresses of its own.
func Parallel() Option { return func(o *options) { o.parallel = true } }

// Run runs the suite. open is called once per case, in the case's goroutine (inside the bubble, if
// there is one); what it opens it closes through t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) Env, opts ...Option) {
	o := options{within: func(t *testing.T, f func(*testing.T)) { f(t) }}
	for _, opt := range opts {
		opt(&o)
	}
	for _, g := range groups() {
		t.Run(g.name, func(t *testing.T) {
			for _, c := range g.cases {
				t.Run(c.name, func(t *testing.T) {
					if o.parallel {
						t.Parallel()
					}
					o.within(t, func(t *testing.T) {
						c.run(newLab(t, open(t), o.virtual))
					})
				})
			}
		})
	}
}

type group struct {
	name  string
	cases []testcase
}

type testcase struct {
	name string
	run  func(*lab)
}

func groups() []group {
	return []group{
		{"Opcode", opcodeCases()},
		{"Order", orderCases()},
		{"Completion", completionCases()},
		{"SRQ", srqCases()},
		{"UD", udCases()},
		{"Error", errorCases()},
		{"State", stateCases()},
		{"Limit", limitCases()},
		{"Memory", memoryCases()},
		{"FastReg", fastRegCases()},
		{"Window", windowCases()},
		{"Close", closeCases()},
		{"CM", cmCases()},
		{"Stress", stressCases()},
	}
}
