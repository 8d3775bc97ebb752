package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/gopacket/gopacket/pcapgo"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

type traceFlags struct {
	*common
	out     string
	packets int
	full    bool
	pid     int
	addr    string
}

func newTrace(c *common, stdout, stderr io.Writer) *cobra.Command {
	f := traceFlags{common: c}
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "Write a process's RoCE packets as pcapng",
		Long: `trace writes the packets of a process's softroce devices as a pcapng file that Wireshark reads (InfiniBand dissector, UDP port
4791). It needs no rights on interfaces, sees loopback, and sees trains taken apart as the wire would.

Of each packet the first 256 bytes behind the UDP header are kept, RDS's own header included. Wireshark calls packets that are longer
malformed: --full is for its eyes.`,
		Example: "  rdsctl trace -w rds.pcapng -n 10000\n  rdsctl trace -w - | wireshark -k -i -",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context(), stdout, stderr) },
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.out, "write", "w", "", "file to write to, - for standard output")
	fl.IntVarP(&f.packets, "packets", "n", 0, "end after so many; 0: when interrupted")
	fl.BoolVar(&f.full, "full", false, "whole packets; otherwise headers and a little of the payload")
	fl.IntVar(&f.pid, "pid", 0, "the process, if there are several")
	fl.StringVar(&f.addr, "addr", "", "whoever has this address")
	return cmd
}

func (f *traceFlags) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	if f.packets < 0 {
		return usageError{fmt.Errorf("--packets %d", f.packets)}
	}
	var addr netip.Addr
	if f.addr != "" {
		if addr, err = netip.ParseAddr(f.addr); err != nil {
			return usageError{fmt.Errorf("--addr: %q is no address", f.addr)}
		}
	}
	switch f.out {
	case "":
		return usageError{errors.New("trace needs --write FILE (- for standard output)")}
	case "-":
		if file, ok := stdout.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
			return usageError{errors.New("a trace is not for a terminal")}
		}
	}
	c, err := f.client(ctx, addr.Unmap())
	if err != nil {
		return err
	}
	out := stdout
	if f.out != "-" { // not earlier: without a process an old trace stays
		file, err := os.Create(f.out)
		if err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	sum, err := trace(ctx, c, out, f.packets, f.full)
	fmt.Fprintf(stderr, "rdsctl: %d packets", sum.packets)
	if sum.missed > 0 {
		fmt.Fprintf(stderr, ", %d missed", sum.missed)
	}
	if sum.cut > 0 {
		fmt.Fprintf(stderr, ", %d cut (--full keeps all of them; Wireshark calls these malformed)", sum.cut)
	}
	fmt.Fprintln(stderr)
	if file, ok := out.(*os.File); ok && f.out != "-" {
		err = errors.Join(err, file.Close())
	}
	return err
}

// client is the one that the flags choose.
func (f *traceFlags) client(ctx context.Context, addr netip.Addr) (*rdsdebug.Client, error) {
	cs, err := f.clients()
	if err != nil {
		return nil, err
	}
	var found []*rdsdebug.Client
	var names []string
	for _, c := range cs {
		in, err := c.Info(ctx, rds.InfoSockets)
		if err != nil {
			continue
		}
		if (f.pid == 0 || in.PID == f.pid) && (!addr.IsValid() || slices.Contains(in.LocalAddresses, addr)) {
			found = append(found, c)
			names = append(names, fmt.Sprintf("%d (%s, %v)", in.PID, printable(in.Program), in.LocalAddresses))
		}
	}
	switch len(found) {
	case 0:
		if addr.IsValid() {
			return nil, fmt.Errorf("no process with a socket in %s has %v", strings.Join(f.dirs, ", "), addr)
		}
		return nil, f.nobody(f.pid)
	case 1:
		return found[0], nil
	}
	return nil, usageError{fmt.Errorf("several to choose from, with --pid or --addr: %s", strings.Join(names, "; "))}
}

// traceSummary is what came of a trace: packets written, those of them that are not whole, and those that came too fast.
type traceSummary struct {
	packets, cut int
	missed       uint64
}

// trace copies packets from c to w, as pcapng.
func trace(ctx context.Context, c *rdsdebug.Client, w io.Writer, packets int, full bool) (sum traceSummary, err error) {
	pr, pw := io.Pipe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		sum.missed, err = c.Trace(ctx, pw, packets, full)
		pw.CloseWithError(err)
		return err
	})
	g.Go(func() (err error) {
		defer func() { pr.CloseWithError(err) }()
		r, err := pcapgo.NewReader(pr)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil // ended before it began
		}
		if err != nil {
			return err
		}
		ng, err := pcapgo.NewNgWriterInterface(w, pcapgo.NgInterface{
			Name: "softroce", LinkType: r.LinkType(), SnapLength: r.Snaplen(), TimestampResolution: 9,
		}, pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{Application: "rdsctl"}})
		if err != nil {
			return err
		}
		for {
			data, ci, err := r.ReadPacketData()
			if err != nil {
				if err != io.EOF && err != io.ErrUnexpectedEOF {
					return errors.Join(err, ng.Flush())
				}
				return ng.Flush()
			}
			if err := ng.WritePacket(ci, data); err != nil {
				return err
			}
			sum.packets++
			if ci.CaptureLength < ci.Length {
				sum.cut++
			}
		}
	})
	err = g.Wait()
	return sum, err
}
