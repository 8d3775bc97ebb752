package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

type infoFlags struct {
	*common
	on      map[rds.InfoItems]*bool
	tcp     bool
	verbose bool
	json    bool
	watch   string        // as it was given
	every   time.Duration // 0: once
	pid     int
}

func newInfo(c *common, stdout, stderr io.Writer) *cobra.Command {
	f := infoFlags{common: c, on: map[rds.InfoItems]*bool{}}
	cmd := &cobra.Command{
		Use:   "info",
		Short: "Show counters, sockets, connections and queues",
		Long: `info shows what the RDS of each process holds, in the columns of rds-info and under its options; without one of
them, everything. Processes are found by their sockets; a process that has none (package rds/rdsdebug) is not seen. That there is none at
all is no error; that the one with --pid is not there, or has ended under --watch, is.`,
		Example: "  rdsctl info -n\n  rdsctl info -c --watch 1s\n  rdsctl info --json | jq '.[].connections'",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd.Context(), stdout, stderr)
		},
	}
	fl := cmd.Flags()
	for _, o := range []struct {
		item             rds.InfoItems
		long, short, use string
	}{
		{rds.InfoCounters, "counters", "c", "counters"},
		{rds.InfoSockets, "sockets", "k", "sockets"},
		{rds.InfoConnections, "connections", "n", "connections"},
		{rds.InfoRecv, "receive", "r", "receive message queues"},
		{rds.InfoSend, "send", "s", "send message queues"},
		{rds.InfoRetrans, "retransmit", "t", "retransmit message queues"},
		{rds.InfoIB, "ib", "I", "verbs connections"},
		{rds.InfoDevices, "devices", "d", "devices and their receive queues (rds-info has no such option)"},
	} {
		f.on[o.item] = fl.BoolP(o.long, o.short, false, o.use)
	}
	fl.BoolVarP(&f.tcp, "tcp", "T", false, "TCP connections: there are none, the option is rds-info's")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "more columns with -I")
	fl.BoolVar(&f.json, "json", false, "a JSON array with an object per process")
	fl.StringVar(&f.watch, "watch", "", "time after which to show it again, until interrupted: seconds, or with a unit (500ms); as JSON one array per line")
	fl.IntVar(&f.pid, "pid", 0, "only this process")
	return cmd
}

func (f *infoFlags) items() (items rds.InfoItems) {
	for i, on := range f.on {
		if *on {
			items |= i
		}
	}
	if items == 0 && !f.tcp {
		items = rds.InfoAll
	}
	return items
}

func (f *infoFlags) run(ctx context.Context, stdout, stderr io.Writer) error {
	if f.watch != "" {
		var err error
		if f.every, err = parseInterval(f.watch); err != nil {
			return usageError{fmt.Errorf("--watch: %w", err)}
		}
	}
	for {
		if err := f.show(ctx, stdout, stderr); err != nil {
			return err
		}
		if f.every == 0 {
			return nil
		}
		t := time.NewTimer(f.every)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

func (f *infoFlags) show(ctx context.Context, stdout, stderr io.Writer) error {
	cs, err := f.clients()
	if err != nil {
		return err
	}
	items := f.items()
	all := []*rds.Info{}
	for _, c := range cs {
		in, err := c.Info(ctx, items)
		if err != nil { // it may have ended just now
			fmt.Fprintln(stderr, "rdsctl:", err)
			continue
		}
		if f.pid == 0 || f.pid == in.PID {
			all = append(all, in)
		}
	}
	if f.pid != 0 && len(all) == 0 {
		return f.nobody(f.pid)
	}
	if f.json {
		enc := json.NewEncoder(stdout)
		if f.every == 0 {
			enc.SetIndent("", "  ")
		}
		return enc.Encode(all)
	}
	if len(all) == 0 {
		fmt.Fprintln(stderr, "rdsctl:", f.nobody(0))
	}
	for _, in := range all {
		if len(all) > 1 || f.every > 0 {
			fmt.Fprintf(stdout, "\n%s, process %d, %s\n", printable(in.Program), in.PID, in.Time.Format("15:04:05.000"))
		}
		if f.tcp {
			fmt.Fprintf(stdout, "\nTCP Connections:\n%15s %5s %15s %5s %10s %10s %10s %10s %10s\n",
				"LocalAddr", "LPort", "RemoteAddr", "RPort", "HdrRemain", "DataRemain", "SentNxt", "ExpectUna", "SeenUna")
		}
		var text strings.Builder
		if err := rdsdebug.WriteText(&text, in, items, f.verbose); err != nil {
			return err
		}
		if _, err := io.WriteString(stdout, printable(text.String())); err != nil {
			return err
		}
	}
	return nil
}

// printable is what a process says about itself, for a terminal that belongs to somebody else.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) && r != '\n' {
			return '?'
		}
		return r
	}, s)
}
