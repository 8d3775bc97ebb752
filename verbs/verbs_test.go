package verbs_test

import (
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// The vocabulary stands on the standard library alone: providers and users import it, not the other
// way round.
func TestImportsOnlyStandardLibrary(t *testing.T) {
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, e := range files {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		seen++
		f, err := parser.ParseFile(token.NewFileSet(), e.Name(), nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range f.Imports {
			if path, _ := strconv.Unquote(imp.Path.Value); strings.Contains(path, ".") {
				t.Errorf("%s imports %s", e.Name(), path)
			}
		}
	}
	if seen == 0 {
		t.Fatal("no files found")
	}
}

func TestMTUBytes(t *testing.T) {
	want := 256
	for m := verbs.MTU256; m <= verbs.MTU4096; m++ {
		if m.Bytes() != want || m.String() != strconv.Itoa(want) {
			t.Errorf("MTU code %d is %d bytes, %q, want %d", uint8(m), m.Bytes(), m, want)
		}
		want *= 2
	}
	if want != 8192 {
		t.Errorf("the last code is 4096, not %d", want/2)
	}
	for _, m := range []verbs.MTU{0, 6, 255} {
		if m.Bytes() != 0 {
			t.Errorf("MTU code %d does not exist: %d bytes", uint8(m), m.Bytes())
		}
	}
}

// The ACK timeout is 4.096 us << code (rocev2 spec 3.9): each is twice the one before, 14 is 67 ms,
// 31 over two hours, and 0 is none.
func TestAckTimeoutDuration(t *testing.T) {
	if d := verbs.AckTimeoutDuration(0); d != 0 {
		t.Errorf("code 0 disables the timer: %v", d)
	}
	if d := verbs.AckTimeoutDuration(1); d != 8192*time.Nanosecond {
		t.Errorf("code 1 is 8.192 us: %v", d)
	}
	for c := uint8(2); c < 32; c++ {
		if a, b := verbs.AckTimeoutDuration(c-1), verbs.AckTimeoutDuration(c); b != 2*a {
			t.Errorf("code %d is twice code %d: %v, %v", c, c-1, b, a)
		}
	}
	if d := verbs.AckTimeoutDuration(14).Round(time.Millisecond); d != 67*time.Millisecond {
		t.Errorf("code 14 is 67 ms: %v", d)
	}
	if d := verbs.AckTimeoutDuration(verbs.DefaultAckTimeout).Round(10 * time.Millisecond); d != 540*time.Millisecond {
		t.Errorf("the default is 0.54 s: %v", d)
	}
}

// Codes of the wire and of ibverbs, which other programs know by number.
func TestValues(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"LOCAL_WRITE", int(verbs.AccessLocalWrite), 1},
		{"REMOTE_WRITE", int(verbs.AccessRemoteWrite), 2},
		{"REMOTE_READ", int(verbs.AccessRemoteRead), 4},
		{"REMOTE_ATOMIC", int(verbs.AccessRemoteAtomic), 8},
		{"SUCCESS", int(verbs.WCSuccess), 0},
		{"LOC_LEN_ERR", int(verbs.WCLocLenErr), 1},
		{"LOC_PROT_ERR", int(verbs.WCLocProtErr), 4},
		{"WR_FLUSH_ERR", int(verbs.WCFlushErr), 5},
		{"REM_INV_REQ_ERR", int(verbs.WCRemInvReqErr), 9},
		{"RNR_RETRY_EXC_ERR", int(verbs.WCRNRRetryExcErr), 13},
		{"GENERAL_ERR", int(verbs.WCGeneralErr), 21},
		{"RESET", int(verbs.StateReset), 0},
		{"ERR", int(verbs.StateErr), 6},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, want %d", c.name, c.got, c.want)
		}
	}
}

// Every named value has a name, every other prints as a number and none panics.
func TestStrings(t *testing.T) {
	check := func(kind string, named func(int) bool, s func(int) string) {
		seen := map[string]int{}
		for i := range 256 {
			got := s(i)
			if numbered := strings.Contains(got, "("+strconv.Itoa(i)+")"); numbered == named(i) || got == "" {
				t.Errorf("%s %d prints as %q", kind, i, got)
			}
			if j, ok := seen[got]; ok {
				t.Errorf("%s %d and %d print alike: %q", kind, i, j, got)
			}
			seen[got] = i
		}
	}
	within := func(lo, hi int) func(int) bool { return func(i int) bool { return i >= lo && i <= hi } }
	check("QPState", within(0, int(verbs.StateErr)), func(i int) string { return verbs.QPState(i).String() })
	check("QPType", within(1, 2), func(i int) string { return verbs.QPType(i).String() })
	check("SendOpcode", within(1, int(verbs.OpBindMW)), func(i int) string { return verbs.SendOpcode(i).String() })
	check("MWType", within(1, int(verbs.MWType2B)), func(i int) string { return verbs.MWType(i).String() })
	check("EventType", within(1, int(verbs.EventStrayPacket)), func(i int) string { return verbs.EventType(i).String() })
	statuses := map[int]bool{}
	for _, s := range []verbs.WCStatus{0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 19, 21} {
		statuses[int(s)] = true
	}
	check("WCStatus", func(i int) bool { return statuses[i] }, func(i int) string { return verbs.WCStatus(i).String() })

	seen := map[string]bool{}
	for b := verbs.QPStateBit; b <= verbs.QPSendWindowBit; b <<= 1 {
		if s := b.String(); s == "" || seen[s] || strings.Contains(s, "|") {
			t.Errorf("attribute bit %#x prints as %q", uint32(b), s)
		}
		seen[b.String()] = true
	}
	if s := (verbs.QPPortBit | verbs.QPTimeoutBit).String(); s != "port|timeout" {
		t.Errorf("a mask lists its attributes: %q", s)
	}
}

func TestWCErr(t *testing.T) {
	ok := verbs.WC{ID: 1, QPN: 2}
	if err := ok.Err(); err != nil {
		t.Errorf("success is no error: %v", err)
	}
	bad := verbs.WC{ID: 7, QPN: 17, Status: verbs.WCRemAccessErr, VendorErr: 3}
	var e *verbs.WCError
	if err := bad.Err(); !errors.As(err, &e) || *e != (verbs.WCError{Status: verbs.WCRemAccessErr, QPN: 17, WRID: 7, VendorErr: 3}) {
		t.Errorf("the error holds the facts: %+v", err)
	} else if errors.Is(err, verbs.ErrFlushed) {
		t.Error("only a flush is ErrFlushed")
	}
	flush := verbs.WC{Status: verbs.WCFlushErr}
	if err := fmt.Errorf("wrapped: %w", flush.Err()); !errors.Is(err, verbs.ErrFlushed) {
		t.Errorf("a flush is ErrFlushed: %v", err)
	}
}

func TestErrors(t *testing.T) {
	if !errors.Is(verbs.ErrClosed, net.ErrClosed) {
		t.Error("ErrClosed is net.ErrClosed")
	}
	busy := error(&verbs.BusyError{Object: "protection domain", Holders: []string{"QP 17", "region 0x100"}})
	if !errors.Is(busy, verbs.ErrBusy) || errors.Is(busy, verbs.ErrClosed) || busy.Error() != "protection domain is held by QP 17, region 0x100" {
		t.Errorf("a BusyError matches ErrBusy and names everybody: %v", busy)
	}
	for _, c := range []struct {
		reason uint16
		want   error
	}{{4, verbs.ErrTimeout}, {8, verbs.ErrRefused}, {10, verbs.ErrStaleConn}, {28, nil}} {
		err := error(&verbs.RejectError{Reason: c.reason})
		for _, target := range []error{verbs.ErrTimeout, verbs.ErrRefused, verbs.ErrStaleConn} {
			if got, want := errors.Is(err, target), target == c.want; got != want {
				t.Errorf("reason %d matches %v: %v, want %v", c.reason, target, got, want)
			}
		}
	}
	for _, c := range []struct {
		err  verbs.StateError
		want string
	}{
		{verbs.StateError{From: verbs.StateInit, To: verbs.StateInit}, "not possible in QP state INIT"},
		{verbs.StateError{From: verbs.StateInit, To: verbs.StateRTR, Missing: verbs.QPAHBit, Extra: verbs.QPQKeyBit},
			"QP transition INIT to RTR refused: missing av: not allowed qkey"},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
