package leak

import (
	"errors"
	"os"
	"testing"
)

type tests func() int

func (f tests) Run() int { return f() }

// quiet keeps what run prints out of the test's own output.
func quiet(t *testing.T) {
	t.Helper()
	old := os.Stderr
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	os.Stderr = null
	t.Cleanup(func() { os.Stderr = old; null.Close() })
}

func TestRun(t *testing.T) {
	quiet(t)
	pass := tests(func() int { return 0 })
	held := func() error { return errors.New("two chunks held") }
	none := func() error { return nil }
	for _, tc := range []struct {
		name   string
		m      TestingM
		checks []func() error
		want   int
	}{
		{"failed tests keep their code, checks do not run", tests(func() int { return 3 }), []func() error{func() error {
			t.Error("a check ran after failed tests")
			return nil
		}}, 3},
		{"nothing left", pass, []func() error{none}, 0},
		{"a check that fails", pass, []func() error{none, held}, 1},
	} {
		if got := run(tc.m, tc.checks); got != tc.want {
			t.Errorf("%s: code %d, want %d", tc.name, got, tc.want)
		}
	}
}

// TestGoroutine: a goroutine left behind by tests that passed makes them fail.
func TestGoroutine(t *testing.T) {
	quiet(t)
	stop := make(chan struct{})
	defer close(stop)
	if code := run(tests(func() int { go func() { <-stop }(); return 0 }), nil); code != 1 {
		t.Errorf("code %d with a goroutine left, want 1", code)
	}
}

func TestMain(m *testing.M) { Main(m) }
