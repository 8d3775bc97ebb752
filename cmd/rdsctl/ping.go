package main

import (
	"context"
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

func newPing(c *common, stdout io.Writer) *cobra.Command {
	f := pingFlags{common: c}
	cmd := &cobra.Command{
		Use:   "ping DESTINATION",
		Short: "Ask a host's RDS for a sign of life",
		Long: `ping sends empty datagrams to port 0 of a host, which its RDS answers, kernel or not, whatever applications do.

If a running process owns the source address, the ping goes through that process and its connection; otherwise rdsctl opens the
address itself. Without -I the source is the address from which the host reaches the destination.`,
		Example: "  rdsctl ping -c 3 10.0.0.2\n  rdsctl ping -i 10ms -I 10.0.0.1 10.0.0.2",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("ping needs one destination")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd.Context(), args[0], stdout) },
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
		return 0, usageError{fmt.Errorf("interval %q", s)}
	}
	return d, nil
}

func (f *pingFlags) run(ctx context.Context, dest string, stdout io.Writer) (err error) {
	if f.cfg.Interval, err = parseInterval(f.interval); err != nil {
		return err
	}
	if f.cfg.Count < 0 {
		return usageError{fmt.Errorf("count %d", f.cfg.Count)}
	}
	if f.cfg.Dest, err = resolve(ctx, dest); err != nil {
		return err
	}
	if f.source != "" {
		if f.cfg.Source, err = netip.ParseAddr(f.source); err != nil {
			return usageError{err}
		}
	} else if f.cfg.Source, err = sourceFor(f.cfg.Dest); err != nil {
		return err
	}
	report := func(r rdsping.Reply) { fmt.Fprintln(stdout, r.Line(f.cfg.Dest)) }
	sum, err := f.ping(ctx, report)
	if err != nil {
		return err
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
