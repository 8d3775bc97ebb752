// Command rds-bench measures reliable datagrams: between two processes that it starts itself, or
// between two hosts.
//
//	rds-bench                     both processes on this host, 127.0.0.1 to 127.0.0.2
//	rds-bench server              on one host
//	rds-bench client 10.0.0.1     on the other one
//
// It runs a ladder of datagram sizes, throughput and round-trip time of each, and the same ladder
// over Go's TCP beside it, and ends with a table, or with one JSON object (--json). docs/bench.md tells what else it does.
//
// # What is measured
//
// Throughput: senders write as fast as their socket takes datagrams (or keep --depth of them in
// flight), receivers read and count; the rate is what the receiving application counted between two
// moments. Round trip: one datagram in flight per socket, answered by the other application with one
// of the same size. Load: datagrams are due at a rate, answered likewise, and timed from when they were due.
// RDMA: operations on the peer's memory, each with a datagram behind it. CPU is what getrusage says of both processes in the measured interval.
// At the end of each run the senders stop and everything they sent must arrive.
//
// # Exit status
//
// 0 also after an interrupt, which ends the measurement and prints what is there; 1 when something
// failed, --verify's checks included; 2 for a wrong command line; 3 when a condition of --fail-if was true.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends the measurement, the second one the process.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main with everything it touches as arguments; it returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	cmd := newCommand(stdin, stdout, stderr)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var missed *thresholdError
	if errors.As(err, &missed) && err == error(missed) {
		for _, l := range missed.lines {
			fmt.Fprintln(stderr, "rds-bench:", l)
		}
		return 3
	}
	fmt.Fprintln(stderr, "rds-bench:", oneLine(err))
	var usage *usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// oneLine is an error's text for a terminal, joined errors beside each other.
func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
}
