package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/rds"
)

func rdmaSpec(op string, size int) spec {
	s := testSpec(transportRDS, testThroughput, 64)
	s.RDMA, s.RDMASize = op, size
	return s
}

func TestRunsRDMA(t *testing.T) {
	p := shortParams()
	p.Duration = 100 * time.Millisecond
	c := connectClient(t, serveLoopback(t, newTransport), p, newTransport)
	for _, tc := range []struct {
		name string
		edit func(*spec)
	}{
		{"write", func(s *spec) {}},
		{"read", func(s *spec) { s.RDMA = rdmaRead }},
		{"one byte", func(s *spec) { s.RDMASize, s.Size = 1, rdmaHeaderBytes }},
		{"bulk read, unchecked", func(s *spec) { s.RDMA, s.RDMASize, s.Verify = rdmaRead, rds.MaxRDMASize, false }},
		{"odd size, both directions, two sockets", func(s *spec) { s.RDMASize, s.Bidir, s.Sockets = 12345, true, 2 }},
		{"read, both directions, depth 3", func(s *spec) { s.RDMA, s.Bidir, s.Depth = rdmaRead, true, 3 }},
		{"round trip of writes", func(s *spec) { s.Test = testRTT }},
		{"round trip of reads, two sockets", func(s *spec) { s.Test, s.RDMA, s.Sockets = testRTT, rdmaRead, 2 }},
		{"on demand", func(s *spec) { s.ODP = true }},
		{"on demand, pages given back", func(s *spec) { s.ODP, s.Discard = true, true }},
		{"on demand, read, pages given back", func(s *spec) { s.RDMA, s.ODP, s.Discard = rdmaRead, true, true }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := rdmaSpec(rdmaWrite, 8192)
			tc.edit(&s)
			if s.ODP {
				a, err := rds.OpenArena(1)
				if errors.Is(err, rds.ErrNotSupported) {
					t.Skip(err)
				} else if err != nil {
					t.Fatal(err)
				}
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
			}
			r, err := c.run(t.Context(), s)
			if err == nil && r.MessagesPerSecond == 0 { // a busy machine: take the time
				c.params.Duration = time.Second
				r, err = c.run(t.Context(), s)
				c.params = p
			}
			if err != nil {
				t.Fatal(err)
			}
			if r.MessagesPerSecond <= 0 || r.BytesPerSecond != r.MessagesPerSecond*float64(s.Size+s.RDMASize) {
				t.Errorf("rates %v messages/s and %v bytes/s", r.MessagesPerSecond, r.BytesPerSecond)
			}
			if r.Verified != s.Verify || r.RDMA != s.RDMA || r.RDMASize != s.RDMASize || r.RDMAFailed != 0 {
				t.Errorf("result %+v", r)
			}
			if isRTT := s.Test == testRTT; isRTT != (r.RTTSeconds != nil) {
				t.Errorf("round-trip times are %v", r.RTTSeconds)
			}
		})
	}
}

// testTarget is a target of four slots that has heard of operations 0 and 1.
func testTarget(t *testing.T, op rds.RDMAOp, chaos string) (*rdmaLane, func(seq uint64) []byte) {
	t.Helper()
	spec := rdmaSpec(rdmaWrite, 100)
	spec.Chaos = chaos
	l := &lane{side: newSide(spec, false, nil), tx: newStream(7, 0, false), rx: newStream(7, 0, true)}
	r := &rdmaLane{lane: l, op: op, missing: make(map[uint64]struct{})}
	for range 4 {
		r.mem = append(r.mem, make([]byte, 100))
	}
	// What a sound initiator does: memory first, then the datagram.
	initiate := func(seq uint64) []byte {
		if op == rds.RDMAWrite {
			r.rx.fill(r.mem[seq%4], contentOf(seq))
		}
		p := make([]byte, spec.Size)
		r.rx.fill(p[rdmaHeaderBytes:], seq)
		return putRDMAHeader(p, rdmaOp, seq)
	}
	for seq := range uint64(2) {
		if err := r.hearOp(seq, initiate(seq)); err != nil {
			t.Fatal(err)
		}
	}
	return r, initiate
}

// The target finds out whatever an initiator, or RDS, may do wrong.
func TestTargetFindsErrors(t *testing.T) {
	for _, tc := range []struct {
		name  string
		chaos string
		do    func(r *rdmaLane, initiate func(uint64) []byte) error
		want  string
	}{
		{"twice", "", func(r *rdmaLane, op func(uint64) []byte) error { return r.hearOp(1, op(1)) }, "operation 1 came again where 2 was due"},
		{"twice, with removals", chaosDevices, func(r *rdmaLane, op func(uint64) []byte) error { return r.hearOp(1, op(1)) }, "operation 1 came again where 2 was due"},
		{"lost", "", func(r *rdmaLane, op func(uint64) []byte) error { return r.hearOp(3, op(3)) }, "operation 3 came where 2 was due"},
		{"more lost than in flight", chaosDevices, func(r *rdmaLane, op func(uint64) []byte) error { return r.hearOp(7, op(7)) }, "operation 7 came where 2 was due"},
		{"late", chaosDevices, func(r *rdmaLane, op func(uint64) []byte) error {
			return errors.Join(r.hearOp(3, op(3)), r.hearOp(2, op(2)))
		}, "operation 2 came again where 4 was due"},
		{"void without a reason", "", func(r *rdmaLane, op func(uint64) []byte) error { _, err := r.hearVoid(2); return err }, "operation 2 is void where 2 was due"},
		{"datagram before its operation", "", func(r *rdmaLane, op func(uint64) []byte) error {
			p := op(2)
			clear(r.mem[2][50:])
			return r.hearOp(2, p)
		}, "what WRITE 2 has written differs at byte 50 of 100"},
		{"corrupt datagram", "", func(r *rdmaLane, op func(uint64) []byte) error {
			p := op(2)
			p[40] ^= 1
			return r.hearOp(2, p)
		}, "datagram 2 differs from what was sent at byte 40 of 64"},
		{"short datagram", "", func(r *rdmaLane, op func(uint64) []byte) error { return r.hearOp(2, op(2)[:63]) }, "63 bytes instead of 64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, initiate := testTarget(t, rds.RDMAWrite, tc.chaos)
			err := tc.do(r, initiate)
			var v *verifyError
			if !errors.As(err, &v) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

// Every operation is answered once: by its datagram if that has come, else when it is known that it will not.
func TestTargetAccounts(t *testing.T) {
	for _, op := range []rds.RDMAOp{rds.RDMAWrite, rds.RDMARead} {
		r, initiate := testTarget(t, op, chaosDevices)
		step := func(what string, answered, want bool, err error) {
			t.Helper()
			if err != nil || answered != want {
				t.Fatalf("%v: %s: answered %v, %v", op, what, answered, err)
			}
		}
		answered, err := r.hearVoid(1)
		step("void, but had arrived", answered, false, err)
		err = r.hearOp(4, initiate(4))
		step("two are missing", true, true, err)
		answered, err = r.hearVoid(3)
		step("the second is void", answered, true, err)
		if n := r.received.Load() + r.voided.Load(); n != 4 {
			t.Errorf("%v: %d are settled while one is missing of 5", op, n)
		}
		answered, err = r.hearVoid(2)
		step("the first is void", answered, true, err)
		answered, err = r.hearVoid(6)
		step("void before anything was heard of it", answered, true, err)
		err = r.hearOp(7, initiate(7))
		step("next", true, true, err)
		answered, err = r.hearVoid(5)
		step("void late", answered, true, err)
		if got, void := r.received.Load(), r.voided.Load(); got != 4 || void != 4 || len(r.missing) != 0 {
			t.Errorf("%v: %d received, %d void, %d missing", op, got, void, len(r.missing))
		}
		if op == rds.RDMARead && r.tx.mismatch(r.mem[6%4], contentOf(6)) >= 0 {
			t.Errorf("%v: the slot of a void operation was not filled again", op)
		}
	}
}

func TestReadFindsErrors(t *testing.T) {
	spec := rdmaSpec(rdmaRead, 100)
	l := &lane{side: newSide(spec, true, nil), tx: newStream(7, 0, true), rx: newStream(7, 0, false)}
	r := &rdmaLane{lane: l, op: rds.RDMARead, slots: make([]slot, 4)}
	s := &r.slots[2]
	s.mem = make([]byte, 100)
	r.rx.fill(s.mem, firstContent(2))
	if err := r.checkRead(s, 2); err != nil {
		t.Error(err)
	}
	var v *verifyError
	if err := r.checkRead(s, 6); !errors.As(err, &v) || !strings.Contains(err.Error(), "READ 6 differs from what is there at byte 0 of 100") {
		t.Errorf("stale content: %v", err)
	}
	r.rx.fill(s.mem, contentOf(2))
	if err := r.checkRead(s, 6); err != nil {
		t.Error(err)
	}
	// The second credit for an operation.
	s.seq = 6
	if _, err := r.hear(rdmaCredit, 6, nil, 0); !errors.As(err, &v) {
		t.Errorf("a credit that nobody owed: %v", err)
	}
}
