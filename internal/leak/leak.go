// Package leak is the TestMain of packages whose tests may leave nothing behind. Only tests import
// it.
package leak

import (
	"fmt"
	"os"

	"go.uber.org/goleak"
)

// TestingM is a *testing.M.
type TestingM interface{ Run() int }

// Main runs the tests of m and ends the process. After tests that passed it fails if a goroutine is
// left that is not the runtime's, or if one of checks (references, chunks, regions, whatever the
// package counts) returns an error.
func Main(m TestingM, checks ...func() error) {
	os.Exit(run(m, checks))
}

func run(m TestingM, checks []func() error) int {
	if code := m.Run(); code != 0 {
		return code // a test that failed may leave things behind: its message is the one to read
	}
	code := 0
	for _, check := range append(checks, func() error { return goleak.Find() }) {
		if err := check(); err != nil {
			fmt.Fprintf(os.Stderr, "leak: after all tests passed: %v\n", err)
			code = 1
		}
	}
	return code
}
