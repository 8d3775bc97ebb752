package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"golang.org/x/term"
)

// A usageError is a command line that makes no sense.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(err error) error {
	if err == nil {
		return nil
	}
	return &usageError{err}
}

// Addresses of the two processes when both are ours.
const (
	defaultClientAddr = "127.0.0.1"
	defaultServerAddr = "127.0.0.2"
)

// clientFlags are the flags of a measurement, local or between two hosts.
type clientFlags struct {
	params     params
	format     string
	json       bool
	histograms bool
	intervals  bool // --interval was given
	report     string
	failIf     thresholds
	addr       string
	profile    string
}

func (f *clientFlags) register(cmd *cobra.Command) {
	f.params = defaultParams()
	p := &f.params
	fl := cmd.Flags()
	fl.Var(sizesValue{&p.Sizes}, "sizes", "bytes per datagram, with units: 64,4KiB,1MiB; with --rdma of the one behind each operation (64B)")
	fl.StringSliceVar(&p.Tests, "tests", p.Tests, "what to measure: throughput, rtt, load (see --rate)")
	fl.Var(compareValue{&p.Compare}, "compare", "baselines to measure beside it: tcp, udp, quic, none; with --rdma also rds, for datagrams")
	fl.IntVar(&p.Sockets, "sockets", p.Sockets, "sockets on each side, each with one peer socket")
	fl.IntVar(&p.Depth, "depth", p.Depth, "datagrams in flight per socket, 0: as many as the send buffer takes")
	fl.DurationVar(&p.Duration, "duration", p.Duration, "measured interval of each run")
	fl.DurationVar(&p.Warmup, "warmup", p.Warmup, "load before it that is not measured")
	fl.BoolVar(&p.Bidir, "bidir", p.Bidir, "throughput in both directions at once, rates added")
	fl.BoolVar(&p.Verify, "verify", p.Verify, "check content and order of every datagram")
	fl.StringSliceVar(&p.RDMA, "rdma", nil, "measure RDMA operations with a datagram behind each: read, write")
	fl.Var(sizesValue{&p.RDMASizes}, "rdma-size", "bytes per operation, with units, up to 1MiB")
	fl.BoolVar(&p.ODP, "odp", false, "on-demand paging: memory of operations is not pinned")
	fl.BoolVar(&p.Discard, "odp-discard", false, "give pages back after each operation, so that the next one finds none")
	fl.StringVar(&p.Chaos, "chaos", "", "trouble to make: devices (remove and add them again while they carry the traffic; --duration is that of all runs together)")
	fl.DurationVar(&p.ChaosEvery, "chaos-every", p.ChaosEvery, "how often a device of --chaos goes, on average")
	fl.StringVar(&p.RDS.Dialect, "dialect", p.RDS.Dialect, "what to speak to the peer: open (ours) or kernel (Linux's)")
	fl.Uint16Var(&p.RDS.Port, "roce-port", p.RDS.Port, "UDP port of RoCEv2 on both sides")
	fl.Uint64Var(&p.Seed, "seed", p.Seed, "seed of the content")
	fl.Var(ratesValue{&p.Rates}, "rate", "load at these rates, in datagrams per second over all sockets, with units: 500,20k,1.5M; each is answered, and timed from when it was due")
	fl.DurationVar(&p.Interval, "interval", 0, "report parts of each run, this long (0: none, or twenty with --report)")
	fl.IntVar(&p.Count, "count", p.Count, "measure everything so many times")
	fl.StringVar(&f.format, "format", formatText, "what to print: "+strings.Join(formats, ", "))
	fl.BoolVar(&f.json, "json", false, "as --format json: one JSON object instead of the table")
	fl.BoolVar(&f.histograms, "histogram", false, "print the distributions of round-trip times below the table")
	fl.StringVar(&f.report, "report", "", "write an HTML report with plots to this file")
	fl.Var(thresholdsValue{&f.failIf}, "fail-if", "exit with 3 if this is true of a run, as in 'p99>50us' or '4KiB/rtt: p50 >= 20us'; may be repeated")
	fl.StringVar(&f.profile, "cpuprofile", "", "write CPU profiles of the measured processes to this file, .client and .server appended")
}

// settle completes the parameters and says what is wrong with them.
func (f *clientFlags) settle(cmd *cobra.Command) error {
	f.params.settle(cmd.Flags().Changed)
	if f.json {
		if cmd.Flags().Changed("format") && f.format != formatJSON {
			return errors.New("--json and --format " + f.format)
		}
		f.format = formatJSON
	}
	if !slices.Contains(formats, f.format) {
		return fmt.Errorf("--format: %q is none of %s", f.format, strings.Join(formats, ", "))
	}
	if err := f.params.validate(); err != nil {
		return err
	}
	if f.intervals = f.params.Interval > 0; f.report != "" && !f.intervals {
		f.params.Interval = max(f.params.perRun()/20, minInterval)
	}
	return f.failIf.watch(f.params.runs())
}

// newCommand is the command line.
func newCommand(stdin io.Reader, stdout, stderr io.Writer) *cobra.Command {
	var f clientFlags
	root := &cobra.Command{
		Use:   "rds-bench",
		Short: "Measure reliable datagrams between two processes or two hosts",
		Long: `rds-bench measures Reliable Datagram Sockets: throughput and round-trip time of a ladder of
datagram sizes, beside the same ladder over Go's TCP.

Without a subcommand it starts its own second process and measures between ` + defaultClientAddr + ` and
` + defaultServerAddr + `. For two hosts run "rds-bench server" on one and "rds-bench client HOST" on the other.`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("%q is no command: see rds-bench --help", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.settle(cmd); err != nil {
				return usage(err)
			}
			client, server, err := parseLocalAddrs(f.addr)
			if err != nil {
				return usage(err)
			}
			return f.runLocal(cmd.Context(), client, server, stdout, stderr)
		},
	}
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	f.register(root)
	root.Flags().StringVar(&f.addr, "addr", defaultClientAddr+","+defaultServerAddr, "addresses of the client and of the server")
	root.AddCommand(newServerCommand(stdin, stdout, stderr), newClientCommand(stdout, stderr), newStressCommand(stdout), newManCommand())
	return root
}

// version is what the go command knows of the module: that of a release, or of a commit.
func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "(devel)"
}

// newManCommand writes the manual; "rds-bench completion" is cobra's own.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIRECTORY",
		Short: "Write the manual pages",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("man needs a directory"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true // the same text for the same program
			return doc.GenManTree(root, &doc.GenManHeader{Title: "RDS-BENCH", Section: "1", Source: "OpenRDS", Manual: "OpenRDS"}, args[0])
		},
	}
}

func newClientCommand(stdout, stderr io.Writer) *cobra.Command {
	var f clientFlags
	cmd := &cobra.Command{
		Use:   "client SERVER[:PORT]",
		Short: "Measure against a server on another host",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("client needs the server's address, as in: rds-bench client 10.0.0.1"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.settle(cmd); err != nil {
				return usage(err)
			}
			var local netip.Addr
			if f.addr != "" {
				var err error
				if local, err = netip.ParseAddr(f.addr); err != nil {
					return usage(fmt.Errorf("--addr: %v", err))
				}
			}
			server, err := resolveServer(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if local.IsValid() && local.Unmap().Is4() != server.Addr().Unmap().Is4() {
				return usage(fmt.Errorf("--addr: %v and the server's %v are of different IP versions", local, server.Addr()))
			}
			return f.measure(cmd.Context(), server, local, stdout, stderr)
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.addr, "addr", "", "address of this host to use (default: the one the route to the server has)")
	return cmd
}

func newServerCommand(stdin io.Reader, stdout, stderr io.Writer) *cobra.Command {
	var addr, profile string
	var child, verbose bool
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Serve clients on other hosts, one after another",
		Long: `Serve clients on other hosts, one after another, until interrupted. --addr bounds the addresses that
clients may use, and sets the TCP port of the control connection; what a client measures runs
between the two addresses of its control connection.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			listen, err := parseListenAddr(addr)
			if err != nil {
				return usage(fmt.Errorf("--addr: %v", err))
			}
			var lc net.ListenConfig
			ln, err := lc.Listen(cmd.Context(), "tcp", listen)
			if err != nil {
				return err
			}
			level := hclog.Info
			if child && !verbose {
				level = hclog.Error
			}
			log := hclog.New(&hclog.LoggerOptions{Name: "rds-bench", Level: level, Output: stderr})
			stopProfile, err := startProfile(profile, ".server")
			if err != nil {
				ln.Close()
				return err
			}
			srv := &server{ln: ln, log: log, open: transportOpener(log)}
			ctx := cmd.Context()
			if child {
				ctx = childContext(ctx, stdin)
				fmt.Fprintln(stdout, ln.Addr()) // the parent waits for it
			} else {
				log.Info("serving", "control", ln.Addr().String())
			}
			return errors.Join(srv.serve(ctx), stopProfile())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&addr, "addr", "", "address and control port to listen on (default: every address, port "+strconv.Itoa(defaultControlPort)+")")
	fl.StringVar(&profile, "cpuprofile", "", "write a CPU profile to this file, .server appended")
	fl.BoolVar(&verbose, "verbose", false, "log sessions of a child too")
	fl.BoolVar(&child, "child", false, "serve the process that holds the other end of standard input")
	_ = fl.MarkHidden("child")
	_ = fl.MarkHidden("verbose")
	return cmd
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("unexpected argument %q", args[0]))
	}
	return nil
}

// parseLocalAddrs reads "client,server" addresses of this host.
func parseLocalAddrs(s string) (client, server netip.Addr, err error) {
	c, sv, ok := strings.Cut(s, ",")
	if !ok {
		return client, server, fmt.Errorf("--addr: %q is not two addresses with a comma between", s)
	}
	if client, err = netip.ParseAddr(c); err != nil {
		return client, server, fmt.Errorf("--addr: %v", err)
	}
	if server, err = netip.ParseAddr(sv); err != nil {
		return client, server, fmt.Errorf("--addr: %v", err)
	}
	if client.Is4() != server.Is4() {
		return client, server, fmt.Errorf("--addr: %v and %v are of different IP versions", client, server)
	}
	if client == server {
		return client, server, fmt.Errorf("--addr: client and server need an address each, not both %v", client)
	}
	return client, server, nil
}

// parseListenAddr turns ADDR, ADDR:PORT, :PORT or nothing into what net.Listen takes.
func parseListenAddr(s string) (string, error) {
	if s == "" {
		return net.JoinHostPort("", strconv.Itoa(defaultControlPort)), nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, defaultControlPort).String(), nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", err
	}
	if host != "" {
		if _, err := netip.ParseAddr(host); err != nil {
			return "", err
		}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", fmt.Errorf("%q is not a port", port)
	}
	return s, nil
}

// resolveServer turns HOST, HOST:PORT into an address.
func resolveServer(ctx context.Context, s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, defaultControlPort), nil
	}
	host, port := s, strconv.Itoa(defaultControlPort)
	if h, p, err := net.SplitHostPort(s); err == nil {
		host, port = h, p
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, usage(fmt.Errorf("%q is not a port", port))
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ips[0].Unmap(), uint16(n)), nil
}

// measure runs the ladder against a server and reports.
func (f *clientFlags) measure(ctx context.Context, server netip.AddrPort, local netip.Addr, stdout, stderr io.Writer) (err error) {
	if !server.Addr().Unmap().Is4() && slices.Contains(f.params.Compare, transportUDP) {
		return usage(fmt.Errorf("--compare: udp knows IPv4 only, and not %v", server.Addr()))
	}
	stopProfile, err := startProfile(f.profile, ".client")
	if err != nil {
		return err
	}
	defer func() {
		if perr := stopProfile(); err == nil {
			err = perr
		}
	}()

	var page *os.File // found out now that it cannot be written, not after ten minutes
	if f.report != "" {
		if page, err = os.Create(f.report); err != nil {
			return err
		}
		defer page.Close()
	}
	specs := f.params.runs()
	p := f.params
	p.Duration = p.perRun()
	var pr progress = noProgress{}
	// Lines of standard output in between would tear the bar to pieces.
	lines := f.format != formatJSON && isTerminal(stdout) && (f.intervals || f.format != formatText)
	if file, ok := stderr.(*os.File); ok && isTerminal(stderr) && !lines {
		pr = newBarProgress(file, len(specs), p)
	}
	c, err := dialClient(ctx, server, local, p, transportOpener(hclog.NewNullLogger()), pr)
	if err != nil {
		return err
	}
	c.reporter = newReporter(f.format, stdout, f.intervals, f.histograms)
	rep := newReport(f.params, c.conn.localAddr().String(), c.conn.remoteAddr().String())
	if err := c.reporter.begin(rep); err != nil {
		return errors.Join(err, c.close())
	}
	results, err := c.measure(ctx, specs)
	rep.Runs = append(rep.Runs, results...)
	pr.finish()
	if err == nil {
		err = c.bye()
	}
	if err == nil && ctx.Err() == nil && p.Chaos != "" && rep.Removals() == 0 {
		err = fmt.Errorf("no device went in %d runs of %v: --duration, which is that of all of them, is too short for --chaos-every %v", len(results), p.Duration, p.ChaosEvery)
	}
	rep.Clean = err == nil && p.Chaos != "" && p.Verify && rep.Removals() > 0
	if cerr := c.close(); err == nil {
		err = cerr
	}
	if ctx.Err() != nil {
		fmt.Fprintf(stderr, "rds-bench: interrupted after %d of %d runs\n", len(results), len(specs))
	}
	err = errors.Join(err, c.reporter.end(rep))
	if page != nil {
		err = errors.Join(err, rep.writeHTML(page), page.Close())
	}
	if err == nil {
		err = f.failIf.check(rep)
	}
	return err
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
