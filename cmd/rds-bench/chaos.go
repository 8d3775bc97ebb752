package main

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// chaosDevices is the only kind of --chaos.
const chaosDevices = "devices"

// Bounds of how often a device goes.
const (
	defaultChaosEvery = time.Second
	minChaosEvery     = 10 * time.Millisecond
)

// A pluggable is an endpoint whose device can be taken away while it carries the run's traffic.
type pluggable interface {
	unplug() error
	plug() error
}

// churn takes this side's device away and gives it back until the run stops: once in half to one and a half times
// Spec.ChaosEvery, and away for up to a fifth of that, or for no time at all. It ends with the device in place.
func (s *side) churn() error {
	dev, ok := s.ep.(pluggable)
	if !ok {
		return fmt.Errorf("%s has no devices to remove", s.spec.Transport)
	}
	which := uint64(0)
	if s.active {
		which = 1
	}
	rng := rand.New(rand.NewPCG(s.spec.Seed, which))
	every := int64(s.spec.ChaosEvery)
	for s.sleep(time.Duration(every/2 + rng.Int64N(every))) {
		if err := dev.unplug(); err != nil {
			return err
		}
		if away := rng.Int64N(every/5+1) - every/20; away > 0 {
			s.sleep(time.Duration(away))
		}
		if err := dev.plug(); err != nil {
			return err
		}
		s.removals.Add(1)
	}
	return nil
}

// sleep returns false, at once, when the run stops.
func (s *side) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.stopped:
		return false
	}
}
