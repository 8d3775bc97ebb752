package epoch

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// stallFor has somebody stall inside p until it may go on, and returns the first report.
func stallFor(t *testing.T, stall func(p *Participant, done <-chan struct{})) (first Stall) {
	synctest.Test(t, func(t *testing.T) {
		var once sync.Once
		done := make(chan struct{})
		d := Config{StallAfter: time.Second, OnStall: func(s Stall) {
			once.Do(func() {
				first = s
				close(done)
			})
		}}.NewDomain()
		p := d.Register("engine 7")
		go bystander(done)
		var reader sync.WaitGroup
		reader.Go(func() { stall(p, done) })
		synctest.Wait()
		d.Retire(func() {})
		d.Synchronize()
		reader.Wait()
		p.Unregister()
		mustClose(t, d)
	})
	return first
}

//go:noinline
func bystander(done <-chan struct{}) { <-done }

//go:noinline
func stuckInLookup(done <-chan struct{}) { <-done }

// engine has a method that enters, as engines do: its Participant is no argument of anything.
type engine struct{ p *Participant }

//go:noinline
func (e *engine) work(done <-chan struct{}) {
	e.p.Enter()
	defer e.p.Exit()
	stuckInLookup(done)
}

//go:noinline
func enterFirst(p *Participant) {
	p.Enter()
	p.Exit()
}

//go:noinline
func lookup(p *Participant, done <-chan struct{}) {
	p.Enter()
	stuckInLookup(done)
	p.Exit()
}

// TestStallStack: a report holds the stack of who is inside, and not those of everybody.
func TestStallStack(t *testing.T) {
	for _, c := range []struct {
		name  string
		stall func(p *Participant, done <-chan struct{})
		frame string
	}{
		{"entered by a method", func(p *Participant, done <-chan struct{}) { (&engine{p}).work(done) }, ".(*engine).work("},
		{"participant as an argument", func(p *Participant, done <-chan struct{}) {
			enterFirst(p) // another function, so that does not tell
			lookup(p, done)
		}, ".lookup("},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := stallFor(t, c.stall)
			if s.Participant != "engine 7" || s.Inside < time.Second || s.Pending != 1 {
				t.Errorf("reported %q after %v with %d pending", s.Participant, s.Inside, s.Pending)
			}
			for _, want := range []string{"goroutine ", ".stuckInLookup(", c.frame, "stall_test.go:"} {
				if !strings.Contains(s.Stacks, want) {
					t.Errorf("no %q in\n%s", want, s.Stacks)
				}
			}
			if strings.Contains(s.Stacks, ".bystander(") || strings.Contains(s.Stacks, ".(*Domain).work") {
				t.Errorf("too many goroutines:\n%s", s.Stacks)
			}
		})
	}
}

// TestStallWithoutReader: a participant left inside by a goroutine that has ended has no stack to show, and
// nobody else's is shown.
func TestStallWithoutReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []Stall
		var p *Participant
		d := Config{StallAfter: time.Second, OnStall: func(s Stall) {
			if got = append(got, s); len(got) == 3 {
				p.Exit()
			}
		}}.NewDomain()
		p = d.Register("orphan")
		func() {
			var enter sync.WaitGroup
			enter.Go(func() { p.Enter() })
			enter.Wait()
		}()
		began := time.Now()
		d.Synchronize()
		if len(got) != 3 || got[0].Stacks != "" {
			t.Errorf("reported %+v", got)
		}
		// After 1, 2 and 4 seconds: each time the wait has doubled.
		for i, s := range got {
			if s.Inside != time.Second<<i {
				t.Errorf("report %d after %v", i, s.Inside)
			}
		}
		if waited := time.Since(began); waited != 4*time.Second {
			t.Errorf("waited %v", waited)
		}
		p.Unregister()
		mustClose(t, d)
	})
}

func TestHasArgument(t *testing.T) {
	const stack = "goroutine 7 [running]:\nrds.f({0xc000012345, 0x2}, 0xc00001)\n\t/x.go:1 +0x1\nrds.g(0xc00002?)\n"
	for arg, want := range map[string]bool{"0xc00001": true, "0xc00002": true, "0xc000012345": true, "0xc0000": false, "0xc0000123": false} {
		if hasArgument(stack, arg) != want {
			t.Errorf("hasArgument %s is not %t", arg, want)
		}
	}
}
