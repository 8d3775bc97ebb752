package main

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/openrds/openrds/rds/rdsdebug"
)

// mainEnv makes the test binary the command.
const mainEnv = "RDS_BENCH_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
	}
	// Debug sockets of tests are nobody else's business.
	dir, err := os.MkdirTemp("", "rds-bench-test")
	if err == nil {
		err = os.Setenv(rdsdebug.RuntimeDirVar, dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}
