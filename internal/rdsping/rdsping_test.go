package rdsping

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/rds"
)

func TestMain(m *testing.M) { leak.Main(m) }

var addrA, addrB, addrC = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")

// The lines are rds-ping's.
func TestLine(t *testing.T) {
	for want, r := range map[string]Reply{
		"   1: 123 usec":                 {Seq: 1, RTT: 123456 * time.Nanosecond, From: addrB},
		" 1000: 7 usec":                  {Seq: 1000, RTT: 7 * time.Microsecond, From: addrB},
		"   2: 9 usec (10.0.0.3)":        {Seq: 2, RTT: 9 * time.Microsecond, From: addrC},
		"   3: 9 usec DUP!":              {Seq: 3, RTT: 9 * time.Microsecond, From: addrB, Dup: true},
		"   4: 9 usec (10.0.0.3) DUP!":   {Seq: 4, RTT: 9 * time.Microsecond, From: addrC, Dup: true},
		"   5: ERROR: send buffer full!": {Seq: 5, Err: "send buffer full!"},
	} {
		if got := r.Line(addrB); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// On a network of known delay: numbers from 1, at the interval, with the round trip's time; who is interrupted is told what came.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay = 3 * time.Millisecond
		net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: delay}})
		open := func(a netip.Addr) *rds.Service {
			svc, err := rds.Open(rds.Config{Network: net, Linger: -1})
			if err != nil {
				t.Fatal(err)
			}
			s, err := svc.ListenAddrPort(t.Context(), netip.AddrPortFrom(a, 4000))
			if err != nil {
				t.Fatal(err)
			}
			if a == addrA { // the connection is not what is measured
				if _, err := s.WriteToAddrPort(nil, netip.AddrPortFrom(addrB, 4000)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
			}
			return svc
		}
		b := open(addrB)
		a := open(addrA)
		next := 1
		sum, err := Run(t.Context(), a, Config{Source: addrA, Dest: addrB, Count: 20, Interval: 100 * time.Millisecond, TOS: 0}, func(r Reply) {
			if r.Seq != next || r.RTT < 2*delay || r.RTT > 2*delay+time.Millisecond || r.From != addrB || r.Dup || r.Err != "" {
				t.Errorf("reply %d: %+v", next, r)
			}
			next++
		})
		if err != nil || sum != (Summary{20, 20}) {
			t.Errorf("%+v, %v", sum, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
		defer cancel()
		start := time.Now()
		sum, err = Run(ctx, a, Config{Source: addrA, Dest: addrB}, func(Reply) {})
		if d := time.Since(start); err != nil || sum != (Summary{11, 10}) && sum != (Summary{11, 11}) || d != 10*time.Second+time.Millisecond {
			t.Errorf("interrupted: %+v, %v after %v", sum, err, d)
		}
		// The network goes away: silence is no error.
		net.Partition(addrA, addrB)
		sum, err = Run(t.Context(), a, Config{Source: addrA, Dest: addrB, Count: 3, Interval: time.Millisecond, Wait: time.Millisecond}, func(r Reply) { t.Errorf("%+v", r) })
		if err != nil || sum != (Summary{3, 0}) {
			t.Errorf("partition: %+v, %v", sum, err)
		}
		a.Close()
		b.Close()
	})
}
