package epoch

import (
	"fmt"
	"runtime"
	"strings"
	"time"
)

// Stall describes a participant that keeps a grace period, and with it all garbage, waiting.
type Stall struct {
	Participant string        // its name
	Inside      time.Duration // how long it has been waited for; it was inside before that
	Pending     int           // callbacks that wait
	// Stacks holds the stack of the goroutine that is inside, as runtime.Stack prints it. Under -tags invariants it is
	// known. Otherwise Enter would have to pay for knowing it, so these are all goroutines it can be:
	// first those with the *Participant among the arguments of their functions, then those in the function that
	// entered first, of which there are several at times when participants share it. Empty if there is none: the
	// participant was left inside by a goroutine that has ended, or was entered by another function.
	Stacks string
}

const (
	// maxDump bounds what is read of the goroutines' stacks: some ten thousand of them.
	maxDump = 16 << 20
	// maxStacks bounds a report.
	maxStacks = 16 << 10
)

// stalled reports sections that have been waited for since a time ago.
func (d *Domain) stalled(in []section, waited time.Duration) {
	if d.cfg.OnStall == nil {
		return
	}
	dump := allStacks()
	for _, s := range in {
		stacks := s.p.find(dump)
		// It may have left, and then the stacks are of what came later.
		if s.p.count.Load() == s.count {
			d.cfg.OnStall(Stall{s.p.name, waited, d.Pending(), stacks})
		}
	}
}

// allStacks returns the stacks of all goroutines, each with an empty line behind it. It stops the world for
// it: about 10 us a goroutine.
func allStacks() string {
	for size := 64 << 10; ; size *= 4 {
		b := make([]byte, size)
		if n := runtime.Stack(b, true); n < size || size >= maxDump {
			return string(b[:n])
		}
	}
}

// find returns the stacks in dump that belong to whoever is inside p, as far as that can be told.
func (p *Participant) find(dump string) string {
	id := "goroutine "
	if n := p.inside.Load(); n != 0 {
		id = fmt.Sprintf("goroutine %d ", n)
	}
	// A frame is "package.(*Type).method(0xc000123456, 0x1?)"; the question mark says that the value may be out
	// of date.
	self := fmt.Sprintf("%p", p)
	reader := "\x00"
	if f := p.reader.Load(); f != nil {
		reader = "\n" + *f + "("
	}
	var named, likely []string
	for s := range strings.SplitSeq(strings.TrimRight(dump, "\n"), "\n\n") {
		switch {
		case !strings.HasPrefix(s, id):
		case len(id) > len("goroutine "), hasArgument(s, self):
			named = append(named, s)
		case strings.Contains(s, reader):
			likely = append(likely, s)
		}
	}
	found := strings.Join(append(named, likely...), "\n\n")
	if len(found) > maxStacks {
		found = found[:maxStacks] + "\n..."
	}
	return found
}

// hasArgument reports whether a function of the stack s has the argument arg.
func hasArgument(s, arg string) bool {
	for {
		_, after, ok := strings.Cut(s, arg)
		if !ok {
			return false
		}
		if strings.IndexAny(after, ",)?}") == 0 {
			return true
		}
		s = after
	}
}
