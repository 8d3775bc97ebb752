package invariants

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	defer func() {
		r := recover()
		if Enabled && r != "BUG: two is not three" {
			t.Errorf("a failed check panicked with %v", r)
		}
		if !Enabled && r != nil {
			t.Errorf("a check that is not enabled panicked with %v", r)
		}
	}()
	two := len("ab")
	Check(two == 2, "two is two")
	Check(two == 3, "two is not three")
}

func TestGoroutineID(t *testing.T) {
	other := make(chan int64)
	go func() { other <- GoroutineID() }()
	a, b, c := GoroutineID(), GoroutineID(), <-other
	if !Enabled {
		if a != 0 {
			t.Errorf("GoroutineID is %d without the tag, want 0", a)
		}
		return
	}
	if a != b || a == c || a <= 0 || c <= 0 {
		t.Errorf("goroutines are numbered %d, %d and another one %d", a, b, c)
	}
}

func TestStack(t *testing.T) {
	s := func() Stack { return Caller(0) }().String()
	if Enabled && !strings.HasPrefix(s, "github.com/openrds/openrds/internal/invariants.TestStack ") {
		t.Errorf("the stack starts with %q", s)
	}
	if !Enabled && s != "(no stack)" {
		t.Errorf("a stack without the tag: %q", s)
	}
}
