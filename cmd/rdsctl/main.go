// Command rdsctl shows and tries what processes that use package rds are doing on this host.
//
//	rdsctl info            counters, sockets, connections, queues: rds-info's options and columns
//	rdsctl ping HOST       as rds-ping
//	rdsctl doctor          what on this host stands in the way, with the line that mends it
//	rdsctl trace           packets, for Wireshark
//
// It finds processes by the unix sockets that package rds/rdsdebug makes, and talks to all of them.
//
// # Exit status
//
// 0; 1 when something failed, ping had no reply, or doctor found an error; 2 for a wrong command line.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/openrds/openrds/rds/rdsdebug"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the first signal ends the command, the second one the process
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// A usageError is a command line that makes no sense.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errFailed ends a command that has said already what is wrong.
var errFailed = errors.New("failed")

// run is main with everything it touches as arguments; it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := newCommand(stdout, stderr)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errFailed):
		return 1
	}
	fmt.Fprintln(stderr, "rdsctl:", strings.ReplaceAll(err.Error(), "\n", "; "))
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// common are the flags of every subcommand.
type common struct{ dirs []string }

func newCommand(stdout, stderr io.Writer) *cobra.Command {
	var c common
	root := &cobra.Command{
		Use:           "rdsctl",
		Short:         "Look into Reliable Datagram Sockets of this host",
		Long:          "rdsctl shows and tries what processes that use Reliable Datagram Sockets (package rds) are doing on this host.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("%q is no command: see rdsctl --help", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().StringSliceVar(&c.dirs, "dir", rdsdebug.RuntimeDirs(), "where processes have their sockets")
	root.AddCommand(newInfo(&c, stdout, stderr), newPing(&c, stdout, stderr), newDoctor(stdout), newTrace(&c, stdout, stderr), newMan())
	return root
}

// version is what the go command knows of the module: that of a release, or of a commit.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "(devel)"
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", args[0])}
	}
	return nil
}

// nobody is the error that there is no process to look into, with this pid if it is not 0.
func (c *common) nobody(pid int) error {
	who := "process"
	if pid != 0 {
		who = fmt.Sprintf("process %d", pid)
	}
	return fmt.Errorf("no %s with a socket in %s", who, strings.Join(c.dirs, ", "))
}

// clients are those of all processes found.
func (c *common) clients() ([]*rdsdebug.Client, error) {
	var out []*rdsdebug.Client
	for _, dir := range c.dirs {
		paths, err := rdsdebug.Discover(dir)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			out = append(out, rdsdebug.NewClient(p))
		}
	}
	return out, nil
}
