package epoch

import "time"

// A grace period has two halves. look finds who is inside; wait waits until each of them has left. Steps
// carry the names of the model (spin/epoch.pml).

// section is what a grace period waits for: that p moves on from count, which is odd.
type section struct {
	p     *Participant
	count uint64
}

// snapshot returns who is registered.
func (d *Domain) snapshot() []*Participant {
	d.at("G_SNAPSHOT")
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.participants
}

// look returns the sections among all that began before look was called, and maybe some that began during it.
func (d *Domain) look(all []*Participant) []section {
	if len(all) == 0 {
		return nil
	}
	d.at("G_FENCE")
	if d.light && !d.broken(faultNoFence) {
		// A reader whose Enter is not yet visible after this also does not yet have read what it reads
		// inside, and will find what is published now.
		fence()
	}
	d.at("G_LOOK")
	var in []section
	for _, p := range all {
		if n := p.count.Load(); n&1 != 0 {
			in = append(in, section{p, n})
		}
	}
	return in
}

// wait returns true when every section of in is over, false if stop is closed before. It overwrites in.
func (d *Domain) wait(in []section, stop <-chan struct{}) bool {
	if len(in) == 0 {
		return true
	}
	d.at("G_WAIT")
	woken := make(chan wake, 1)
	d.mu.Lock()
	d.waiters = append(d.waiters, woken)
	d.mu.Unlock()

	marked := false
	check := func() {
		still := in[:0]
		for _, s := range in {
			if s.p.count.Load() == s.count {
				still = append(still, s)
			} else if marked {
				s.p.watched.Add(-1)
			}
		}
		in = still
	}
	if d.broken(faultCheckBeforeMark) {
		check()
	}
	d.at("G_MARK")
	for _, s := range in {
		s.p.watched.Add(1)
	}
	marked = true
	d.at("G_MARK_FENCE")
	if d.light && !d.broken(faultNoMarkFence) {
		// A reader whose Exit is not yet visible after this has also not yet looked for our mark, and will find it.
		fence()
	}
	if !d.broken(faultCheckBeforeMark) {
		d.at("G_CHECK")
		check()
	}

	began, bound := time.Now(), d.cfg.StallAfter
	stall := time.NewTimer(bound)
	defer stall.Stop()
	for stopped := false; len(in) > 0 && !stopped; {
		d.at("G_SLEEP")
		select {
		case <-woken:
			check()
		case <-stop:
			check()
			stopped = true
		case <-stall.C:
			if check(); len(in) > 0 {
				d.stalled(in, time.Since(began))
			}
			stall.Reset(bound) // the next report comes when the wait is twice as long
			bound *= 2
		}
	}

	for _, s := range in { // given up: their Exits need not wake anybody on our account
		s.p.watched.Add(-1)
	}
	d.at("G_DONE")
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
	return len(in) == 0
}

// wake tells every grace period in progress to look again.
//
//go:noinline
func (d *Domain) wake() {
	// R_WAKE
	if d.broken(faultNoWake) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range d.waiters {
		select {
		case w <- wake{}:
		default: // it has not yet looked since the last time
		}
	}
}

// fault is a mistake in the protocol that the checker finds in the model and the stress test finds here: proof that
// both can. They are the model's broken variants of the same names.
type fault uint8

const (
	faultNone            fault = iota
	faultNoFence               // look at the counts without a fence
	faultCheckBeforeMark       // look for those who left, mark the rest, sleep
	faultNoMarkFence           // no fence between marking and checking
	faultNoWake                // an Exit that is watched tells nobody
	faultLookBeforeTake        // the worker looks who is inside, then takes the garbage
	faultOldParticipants       // the worker asks the participants of when it began
	faultEndUnlocked           // the worker finds no garbage, and ends a moment later
)

// rig is what a test does to a domain's slow paths; nil outside tests.
type rig struct {
	fault fault
	at    func(step string)
}

func (d *Domain) broken(f fault) bool { return d.rig != nil && d.rig.fault == f }

// at marks a step of the model, and lets a test stand in the way there.
func (d *Domain) at(step string) {
	if d.rig != nil && d.rig.at != nil {
		d.rig.at(step)
	}
}
