package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/openrds/openrds/internal/rdsping"
	"github.com/openrds/openrds/rds"
)

type pingFlags struct {
	*common
	cfg      rdsping.Config
	interval string
	source   string
	rocePort uint16
}

func newPing(c *common, stdout, stderr io.Writer) *cobra.Command {
	f := pingFlags{common: c}
	cmd := &cobra.Command{
		Use:   "ping DESTINATION",
		Short: "Ask a host's RDS for a sign of life",
		Long: `ping sends empty datagrams to port 0 of a host, which its RDS answers, kernel or not, whatever applications do. Without a kernel's RDS
an address answers while a process has a socket bound to it.

If a running process owns the source address, the ping goes through that process and its connection; otherwise rdsctl opens the
address itself. Without -I the source is the address from which the host reaches the destination.

Standard output has a line per reply, as rds-ping's. How many were missing at the end is said on standard error; the exit status is 1 if
all were.`,
		Example: "  rdsctl ping -c 3 10.0.0.2\n  rdsctl ping -i 10ms -I 10.0.0.1 10.0.0.2",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("ping needs one destination, as in: rdsctl ping 10.0.0.2")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd.Context(), args[0], stdout, stderr) },
	}
	fl := cmd.Flags()
	fl.IntVarP(&f.cfg.Count, "count", "c", 0, "pings to send; 0: until interrupted")
	fl.StringVarP(&f.interval, "interval", "i", "1", "time between pings: seconds, or with a unit (500ms, 100us)")
	fl.StringVarP(&f.source, "source", "I", "", "source address")
	fl.Uint8VarP(&f.cfg.TOS, "tos", "Q", 0, "type of service")
	fl.DurationVar(&f.cfg.Wait, "wait", time.Second, "time to wait for the last reply")
	fl.Uint16Var(&f.rocePort, "roce-port", 0, "UDP port of RoCEv2, when rdsctl opens the address itself; 0: 4791")
	return cmd
}

// parseInterval reads rds-ping's: a number of seconds, or of what is behind it.
func parseInterval(s string) (time.Duration, error) {
	if n, err := strconv.ParseFloat(s, 64); err == nil && n > 0 && n < 1e6 {
		return time.Duration(n * float64(time.Second)), nil
	}
	if n, ok := strings.CutSuffix(s, "sec"); ok && (strings.HasSuffix(n, "m") || strings.HasSuffix(n, "u")) { // rds-ping's msec and usec
		s = n + "s"
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is no time above 0, like 1, 0.5, 500ms or 100us", s)
	}
	return d, nil
}

func (f *pingFlags) run(ctx context.Context, dest string, stdout, stderr io.Writer) (err error) {
	if f.cfg.Interval, err = parseInterval(f.interval); err != nil {
		return usageError{fmt.Errorf("--interval: %w", err)}
	}
	if f.cfg.Count < 0 {
		return usageError{fmt.Errorf("--count: %d is less than 0", f.cfg.Count)}
	}
	if f.cfg.Wait <= 0 {
		return usageError{fmt.Errorf("--wait: %v is not positive", f.cfg.Wait)}
	}
	if f.cfg.Dest, err = resolve(ctx, dest); err != nil {
		return err
	}
	if f.source != "" {
		if f.cfg.Source, err = netip.ParseAddr(f.source); err != nil {
			return usageError{fmt.Errorf("--source: %q is no address", f.source)}
		}
		f.cfg.Source = f.cfg.Source.Unmap()
	}
	if d := f.cfg.Dest; d.Is6() && d.IsLinkLocalUnicast() && d.Zone() == "" {
		if f.cfg.Dest = d.WithZone(f.cfg.Source.Zone()); f.cfg.Dest.Zone() == "" {
			return usageError{fmt.Errorf("%v needs a zone, as in %v%%eth0", d, d)}
		}
	}
	if f.source == "" {
		if f.cfg.Source, err = sourceFor(f.cfg.Dest); err != nil {
			return err
		}
	}
	if f.cfg.Source.Is4() != f.cfg.Dest.Is4() {
		return usageError{fmt.Errorf("source %v and destination %v are of different IP versions", f.cfg.Source, f.cfg.Dest)}
	}
	report := func(r rdsping.Reply) { fmt.Fprintln(stdout, r.Line(f.cfg.Dest)) }
	sum, err := f.ping(ctx, report)
	if err != nil {
		return err
	}
	switch {
	case sum.Sent == 0: // interrupted before anybody could tell
		fmt.Fprintf(stderr, "rdsctl: no answer from %v to %v\n", f.cfg.Dest, f.cfg.Source)
	case sum.Received < sum.Sent:
		fmt.Fprintf(stderr, "rdsctl: %v answered %d of %d pings from %v\n", f.cfg.Dest, sum.Received, sum.Sent, f.cfg.Source)
	}
	if sum.Received == 0 {
		return errFailed
	}
	return nil
}

// ping goes through the process that has the source address, if there is one.
func (f *pingFlags) ping(ctx context.Context, report func(rdsping.Reply)) (rdsping.Summary, error) {
	cs, err := f.clients()
	if err != nil {
		return rdsping.Summary{}, err
	}
	for _, c := range cs {
		if in, err := c.Info(ctx, rds.InfoSockets); err == nil && slices.Contains(in.LocalAddresses, f.cfg.Source) {
			return c.Ping(ctx, f.cfg, report)
		}
	}
	svc, err := rds.Open(rds.Config{UDPPort: f.rocePort, Linger: -1})
	if err != nil {
		return rdsping.Summary{}, err
	}
	sum, err := rdsping.Run(ctx, svc, f.cfg, report)
	svc.Close() // pings that nobody answered are abandoned
	return sum, err
}

func resolve(ctx context.Context, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap(), nil
	}
	as, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range as {
		if a.Unmap().Is4() { // as rds-ping
			return a.Unmap(), nil
		}
	}
	return as[0], nil
}

// sourceFor is the address from which this host sends to dest: that of a UDP socket connected to it. Nothing is sent.
func sourceFor(dest netip.Addr) (netip.Addr, error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(dest, 4791)))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("no way to %v: %w", dest, err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}
