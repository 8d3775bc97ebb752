// Package invariants holds checks that are too dear for a release build. They exist only in
// binaries built with -tags invariants, which a test run uses:
//
//	if invariants.Enabled {
//		q.checkOrder()
//	}
//
// Enabled is a constant, so that without the tag the compiler removes the branch. A check that
// fails panics with a text that starts with "BUG:": it found our own mistake, never bad input.
package invariants

import (
	"bytes"
	"runtime"
	"strconv"
	"strings"
)

// Check panics with "BUG: " and msg when checks are enabled and cond is false. Its arguments are
// evaluated in every build: put what costs behind Enabled.
func Check(cond bool, msg string) {
	if Enabled && !cond {
		panic("BUG: " + msg)
	}
}

// GoroutineID returns the number of the calling goroutine, or 0 when checks are disabled. It costs
// about a microsecond and serves only to recognise a goroutine that calls what it may not call where it is.
func GoroutineID() int64 {
	if !Enabled {
		return 0
	}
	var buf [64]byte
	b := buf[:runtime.Stack(buf[:], false)] // "goroutine 17 [running]:..."
	b = bytes.TrimPrefix(b, []byte("goroutine "))
	b, _, _ = bytes.Cut(b, []byte(" "))
	id, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		panic("BUG: runtime.Stack does not begin with a goroutine number")
	}
	return id
}

// Stack is where something happened, kept cheaply until somebody wants to read it.
type Stack struct {
	pcs [16]uintptr
	n   int
}

// Caller returns the stack of the caller of the function that calls Caller, skip frames further
// up; an empty one when checks are disabled.
func Caller(skip int) (s Stack) {
	if Enabled {
		s.n = runtime.Callers(skip+3, s.pcs[:])
	}
	return s
}

// String returns one "function file:line" per line, innermost first.
func (s Stack) String() string {
	if s.n == 0 {
		return "(no stack)"
	}
	var b strings.Builder
	for frames := runtime.CallersFrames(s.pcs[:s.n]); ; {
		f, more := frames.Next()
		b.WriteString(f.Function + " " + f.File + ":" + strconv.Itoa(f.Line))
		if !more {
			return b.String()
		}
		b.WriteByte('\n')
	}
}
