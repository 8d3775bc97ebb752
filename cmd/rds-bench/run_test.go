package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Addresses of tests, that neither people nor other test processes use at the same time.
var (
	testClientAddr = ownLoopback(1)
	testServerAddr = ownLoopback(2)
)

func ownLoopback(n byte) string {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, 64 | byte(pid>>8)&0x3f, byte(pid), n}).String()
}

// serveLoopback runs a server in this process and returns its control address.
func serveLoopback(t *testing.T, open openTransport) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(testServerAddr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&server{ln: ln, log: hclog.NewNullLogger(), open: open}).serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// connectClient connects a client to the server at control.
func connectClient(t *testing.T, control netip.AddrPort, p params, open openTransport) *client {
	t.Helper()
	c, err := dialClient(t.Context(), control, netip.MustParseAddr(testClientAddr), p, open, noProgress{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// shortParams are parameters of a run that is over soon.
func shortParams() params {
	p := defaultParams()
	p.Duration, p.Warmup, p.Verify = 250*time.Millisecond, 10*time.Millisecond, true
	return p
}

func testSpec(transport, test string, size int) spec {
	return spec{Transport: transport, Test: test, Size: size, Sockets: 1, Verify: true, Seed: 7, Patience: 10 * time.Second}
}

// testTransports are the transports that the machine under test can run.
var testTransports = []string{transportRDS, transportTCP, transportUDP, transportQUIC}

var newTransport = transportOpener(hclog.NewNullLogger())

func TestRuns(t *testing.T) {
	for _, transport := range testTransports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel() // most of the time they wait
			c := connectClient(t, serveLoopback(t, newTransport), shortParams(), newTransport)
			for _, tc := range []struct {
				name string
				edit func(*spec)
			}{
				{"one byte", func(s *spec) { s.Size = 1 }},
				{"64 B", func(s *spec) {}},
				{"odd size", func(s *spec) { s.Size = 4099 }},
				{"bulk", func(s *spec) { s.Size = bulk }},
				{"unchecked", func(s *spec) { s.Verify = false }},
				{"four sockets", func(s *spec) { s.Sockets = 4 }},
				{"both directions", func(s *spec) { s.Bidir = true }},
				{"bulk, both directions, two sockets", func(s *spec) { s.Size, s.Bidir, s.Sockets = bulk, true, 2 }},
				{"depth 1", func(s *spec) { s.Depth = 1 }},
				{"depth 64, both directions, two sockets", func(s *spec) { s.Depth, s.Bidir, s.Sockets = 64, true, 2 }},
				{"round trip", func(s *spec) { s.Test = testRTT }},
				{"round trip, four sockets", func(s *spec) { s.Test, s.Sockets = testRTT, 4 }},
				{"load", func(s *spec) { s.Test, s.Rate = testLoad, 2000 }},
				{"load, two sockets", func(s *spec) { s.Test, s.Rate, s.Sockets = testLoad, 5000, 2 }},
			} {
				t.Run(tc.name, func(t *testing.T) {
					s := testSpec(transport, testThroughput, 64)
					tc.edit(&s)
					r, err := c.run(t.Context(), s)
					if err == nil && r.MessagesPerSecond == 0 { // a busy machine: take the time
						c.params.Duration = time.Second
						r, err = c.run(t.Context(), s)
						c.params = shortParams()
					}
					if err != nil {
						t.Fatal(err)
					}
					if r.MessagesPerSecond <= 0 || r.BytesPerSecond != r.MessagesPerSecond*float64(s.Size) {
						t.Errorf("rates %v messages/s and %v bytes/s", r.MessagesPerSecond, r.BytesPerSecond)
					}
					if r.Verified != s.Verify {
						t.Errorf("verified is %v, asked for %v", r.Verified, s.Verify)
					}
					if isRTT := s.Test != testThroughput; isRTT != (r.RTTSeconds != nil) {
						t.Fatalf("round-trip times are %v", r.RTTSeconds)
					}
					if r.Offered != s.Rate || (r.LateSeconds != nil) != (s.Rate > 0) {
						t.Errorf("offered %v, late %v", r.Offered, r.LateSeconds)
					}
					if p := r.RTTSeconds; p != nil && !(0 < p.P50 && p.P50 <= p.P99 && p.P99 <= p.P999) {
						t.Errorf("percentiles %+v are not in order", *p)
					}
				})
			}
		})
	}
}

// A depth bounds what is in flight: the receiver tells an error above it, so a passing run is half the test.
// The other half is that a depth of one makes every datagram wait for the one before.
func TestDepthLimitsFlight(t *testing.T) {
	c := connectClient(t, serveLoopback(t, newTransport), shortParams(), newTransport)
	free, err := c.run(t.Context(), testSpec(transportTCP, testThroughput, 64))
	if err != nil {
		t.Fatal(err)
	}
	s := testSpec(transportTCP, testThroughput, 64)
	s.Depth = 1
	one, err := c.run(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if one.MessagesPerSecond >= free.MessagesPerSecond {
		t.Errorf("%.0f messages/s with one in flight, %.0f with any number", one.MessagesPerSecond, free.MessagesPerSecond)
	}
}

// A mangler sits between a flow's sender and its transport.
type mangler func(f *mangledFlow, n int, more bool) error

// mangledTransport lets mangle spoil the datagrams of payload that it sends.
type mangledTransport struct {
	transport
	mangle mangler
}

func (t mangledTransport) open(ctx context.Context, cfg endpointConfig) (endpoint, error) {
	ep, err := t.transport.open(ctx, cfg)
	return mangledEndpoint{ep, t.mangle}, err
}

type mangledEndpoint struct {
	endpoint
	mangle mangler
}

func (e mangledEndpoint) connect(ctx context.Context, peers []netip.AddrPort) ([]flow, error) {
	flows, err := e.endpoint.connect(ctx, peers)
	for i := range flows {
		flows[i] = &mangledFlow{flow: flows[i], mangle: e.mangle}
	}
	return flows, err
}

type mangledFlow struct {
	flow
	mangle mangler
	buf    []byte
	count  int    // datagrams of payload the sender has sent
	kept   []byte // for mangle
}

func (f *mangledFlow) buffer(size int) []byte {
	f.buf = f.flow.buffer(size)
	return f.buf
}

func (f *mangledFlow) send(n int, more bool) error {
	if n == 0 {
		return f.flow.send(n, more)
	}
	defer func() { f.count++ }()
	return f.mangle(f, n, more)
}

// spoiled is the number of the datagram that manglers spoil.
const spoiled = 100

func corruptOne(f *mangledFlow, n int, more bool) error {
	if f.count == spoiled {
		f.buf[n/2] ^= 0x10
	}
	return f.flow.send(n, more)
}

func dropOne(f *mangledFlow, n int, more bool) error {
	if f.count == spoiled {
		return nil
	}
	return f.flow.send(n, more)
}

func repeatOne(f *mangledFlow, n int, more bool) error {
	if f.count == spoiled {
		if err := f.flow.send(n, true); err != nil {
			return err
		}
	}
	return f.flow.send(n, more)
}

func swapOne(f *mangledFlow, n int, more bool) error {
	switch f.count {
	case spoiled:
		f.kept = append([]byte(nil), f.buf[:n]...)
		return nil
	case spoiled + 1:
		if err := f.flow.send(n, true); err != nil {
			return err
		}
		copy(f.buf, f.kept)
	}
	return f.flow.send(n, more)
}

func truncateOne(f *mangledFlow, n int, more bool) error {
	if f.count == spoiled {
		n--
	}
	return f.flow.send(n, more)
}

func TestVerifyFails(t *testing.T) {
	for _, tc := range []struct {
		name   string
		mangle mangler
		want   string
	}{
		{"one corrupted", corruptOne, "datagram 100 differs from what was sent at byte 32 of 64"},
		{"one dropped", dropOne, "datagram 101 came where 100 was due"},
		{"one twice", repeatOne, "datagram 100 came again where 101 was due"},
		{"one swapped with the next", swapOne, "datagram 101 came where 100 was due"},
		{"one cut short", truncateOne, "datagram 100 has 63 bytes instead of 64"},
	} {
		for _, side := range []string{"client", "server"} {
			var spoil atomic.Bool
			mangled := func(name string, o rdsOptions) (transport, error) {
				tr, err := newTransport(name, o)
				return mangledTransport{tr, func(f *mangledFlow, n int, more bool) error {
					if !spoil.Load() {
						return f.flow.send(n, more)
					}
					return tc.mangle(f, n, more)
				}}, err
			}
			t.Run(tc.name+" by the "+side, func(t *testing.T) {
				t.Parallel()
				open := map[string]openTransport{"client": newTransport, "server": newTransport}
				open[side] = mangled
				c := connectClient(t, serveLoopback(t, open["server"]), shortParams(), open["client"])
				s := testSpec(transportTCP, testThroughput, 64)
				s.Bidir = side == "server" // the server sends only then
				spoil.Store(true)
				r, err := c.run(t.Context(), s)
				var v *verifyError
				if !errors.As(err, &v) {
					t.Fatalf("error %v, want one of the check", err)
				}
				if !strings.Contains(err.Error(), tc.want) {
					t.Errorf("error %q does not say %q", err, tc.want)
				}
				if r != nil && r.Verified {
					t.Error("the result claims to be verified")
				}
				spoil.Store(false)
				if _, err := c.run(t.Context(), s); err != nil {
					t.Errorf("a sound run after the spoilt one: %v", err)
				}
			})
		}
	}
}

// The last datagram has none behind it that would give its loss away.
func TestVerifyMissesLast(t *testing.T) {
	var dropped atomic.Bool
	dropLast := func(f *mangledFlow, n int, more bool) error {
		if !more { // the one that the sender knows to be its last
			dropped.Store(true)
			return nil
		}
		return f.flow.send(n, more)
	}
	open := func(name string, o rdsOptions) (transport, error) {
		tr, err := newTransport(name, o)
		return mangledTransport{tr, dropLast}, err
	}
	c := connectClient(t, serveLoopback(t, newTransport), shortParams(), open)
	start := time.Now()
	_, err := c.run(t.Context(), testSpec(transportTCP, testThroughput, 64))
	var v *verifyError
	if !dropped.Load() || !errors.As(err, &v) || !strings.Contains(err.Error(), "arrived within") {
		t.Errorf("error %v after %v, dropped %v", err, time.Since(start), dropped.Load())
	}
}

func TestInterrupt(t *testing.T) {
	p := shortParams()
	p.Duration = time.Hour
	c := connectClient(t, serveLoopback(t, newTransport), p, newTransport)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	specs := []spec{testSpec(transportTCP, testThroughput, 64), testSpec(transportTCP, testRTT, 64)}
	results, err := c.measure(ctx, specs)
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 1 || results[0].MessagesPerSecond <= 0 || !results[0].Verified {
		t.Errorf("results %+v, want the interrupted first run", results)
	}
}

// A server that goes in the midst of a run ends it, long as it may be.
func TestServerGoes(t *testing.T) {
	ln, err := net.Listen("tcp", net.JoinHostPort(testServerAddr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- (&server{ln: ln, log: hclog.NewNullLogger(), open: newTransport}).serve(ctx) }()
	p := shortParams()
	p.Duration = time.Hour
	c := connectClient(t, ln.Addr().(*net.TCPAddr).AddrPort(), p, newTransport)
	time.AfterFunc(200*time.Millisecond, cancel)
	for _, transport := range []string{transportUDP, transportTCP} { // in the midst of the first, and before the second
		if r, err := c.run(t.Context(), testSpec(transport, testThroughput, 64)); err == nil || r != nil || !strings.Contains(err.Error(), "closed the control connection") {
			t.Errorf("%s: %+v, %v", transport, r, err)
		}
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// What devices have counted does not fall when one goes, by our doing or by itself.
func TestDeviceCounters(t *testing.T) {
	e := new(rdsEndpoint)
	for i, c := range []struct{ now, want uint64 }{{5, 5}, {7, 7}, {0, 7}, {0, 7}, {3, 10}, {2, 12}, {4, 14}} {
		if got := e.devicesLocked(counters{retransmits: c.now, drops: 2 * c.now}); got != (counters{retransmits: c.want, drops: 2 * c.want}) {
			t.Errorf("step %d: %+v, want %d", i, got, c.want)
		}
	}
}

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }
