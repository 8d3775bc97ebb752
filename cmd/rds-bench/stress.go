package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

// stress is rds-stress: one side of a test, whose other side may be rds-stress itself on a kernel's RDS.
type stress struct {
	opt         stressOptions
	rds         rdsOptions
	kernel      bool   // the kernel's RDS, not ours
	peerVersion string // of the rds-stress that is told
	cpu         bool
	outliers    stressMicros
	hist        bool
	cancelSent  bool
	abortAfter  uint32 // seconds, 0: never
	stdout      io.Writer

	// Tests have others.
	network        packetio.Network // nil: UDP
	burnIn, second time.Duration
	abort          func()
}

// stressBurnIn is what passes, once both sides are ready, before anything is counted. The tasks start when half of it is over.
const stressBurnIn = 4 * time.Second

func newStress(stdout io.Writer) *stress {
	return &stress{opt: defaultStressOptions(), rds: rdsOptions{Dialect: dialectOpen, Port: 4791}, peerVersion: stressVersion, stdout: stdout,
		burnIn: stressBurnIn, second: time.Second, abort: func() { os.Exit(1) }}
}

func newStressCommand(stdout io.Writer) *cobra.Command {
	s := newStress(stdout)
	o := &s.opt
	var send, recv string
	var useCong, useOnce, useGetMR, useFence, cacheMRs intBool = 1, 0, 0, 1, 0
	var reset bool
	var ignored intBool
	cmd := &cobra.Command{
		Use:   "stress",
		Short: "Speak rds-stress's protocol, with rds-stress or with another of these",
		Long: `stress is rds-stress with this RDS in place of the kernel's: the same options, control connection, datagrams and output. Its peer is
another "rds-bench stress", or rds-stress on a host that uses the kernel's RDS. With --kernel it uses the kernel's RDS itself, and is
rds-stress for hosts that have none.

Without -s it waits for one that connects and does as it is told; with -s it connects, tells, and measures. Numbers may be followed by
k, m or g, and begin with 0x.`,
		Example: "  rds-bench stress -r 10.0.0.1\n  rds-bench stress -r 10.0.0.2 -s 10.0.0.1 -q 4096 -t 4 -d 8 -T 30",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.CongMonitor, o.UseOnce, o.UseGetMR, o.UseFence, o.CacheMRs = useCong != 0, useOnce != 0, useGetMR != 0, useFence != 0, cacheMRs != 0
			if reset {
				return usage(errors.New("--reset: neither this RDS nor Linux's has connections that a program could reset; Oracle's kernels do"))
			}
			for _, a := range []struct {
				text string
				addr *netip.Addr
				flag string
			}{{send, &o.SendAddr, "-s"}, {recv, &o.RecvAddr, "-r"}} {
				if a.text == "" {
					continue
				}
				var err error
				if *a.addr, err = resolveStress(cmd.Context(), a.text); err != nil {
					return fmt.Errorf("%s: %w", a.flag, err)
				}
			}
			o.settle()
			if err := errors.Join(o.validate(), s.rds.validate(), checkStressVersion(s.peerVersion)); err != nil {
				return usage(err)
			}
			out := &firstError{w: stdout}
			s.stdout = out
			test := s.passive
			if o.SendAddr.IsValid() {
				test = s.active
			}
			err := test(cmd.Context())
			return errors.Join(err, out.get())
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&recv, "recv-addr", "r", "", "local address or name; default that of the control connection")
	fl.StringVarP(&send, "send-addr", "s", "", "peer's address or name: this side is the active one")
	fl.VarP(stressNumber[uint16]{&o.Port, "port"}, "port", "p", "TCP port of the control connection; RDS ports follow")
	fl.VarP(stressNumber[uint32]{&o.AckSize, "bytes"}, "ack-bytes", "a", "bytes of an ack; 0: the least, 63, or 96 over IPv6")
	fl.VarP(stressNumber[uint32]{&o.ReqSize, "bytes"}, "req-bytes", "q", "bytes of a request")
	fl.VarP(stressNumber[uint32]{&o.Depth, "n"}, "depth", "d", "requests outstanding per task and peer task")
	fl.VarP(stressNumber[uint16]{&o.Tasks, "n"}, "tasks", "t", "tasks on each side, each with a socket")
	fl.VarP(stressNumber[uint32]{&o.RunTime, "seconds"}, "time", "T", "seconds, after the burn-in; 0: until interrupted")
	fl.VarP(stressNumber[uint32]{&o.RDMASize, "bytes"}, "rdma-bytes", "D", "bytes per RDMA segment; 0: no RDMA")
	fl.VarP(stressNumber[uint32]{&o.Segments, "n"}, "rdma-buffers", "I", "local segments per RDMA")
	fl.VarP(stressNumber[uint8]{&o.RWMode, "mode"}, "rdma-mode", "M", "0: RDMA reads and writes in turn, 1: reads, 2: writes")
	fl.BoolVarP(&o.OneWay, "one-way", "o", false, "only the active side sends requests")
	fl.VarP(stressNumber[uint8]{&o.TOS, "tos"}, "tos", "Q", "type of service")
	fl.BoolVarP(&s.cpu, "report-cpu", "c", false, "report the CPU that this process uses, of all there is")
	fl.BoolVarP(&o.RTPrio, "rtprio", "R", false, "accepted and passed on; goroutines have no priorities")
	fl.BoolVarP(&o.Verify, "verify", "v", false, "check every byte")
	fl.BoolVarP(&o.Tracing, "trace", "V", false, "accepted and passed on; see rdsctl trace")
	fl.BoolVarP(&o.SummaryOnly, "report-summary", "z", false, "the last line only")
	fl.Var(&useOnce, "rdma-use-once", "regions that the reply frees")
	fl.Var(&useGetMR, "rdma-use-get-mr", "register regions for the destination (RDS_GET_MR_FOR_DEST), not with the message")
	fl.Var(&useFence, "rdma-use-fence", "send acks with the RDMA reads they follow, fenced; 0: once the read has completed")
	fl.Var(&cacheMRs, "rdma-cache-mrs", "keep regions")
	fl.Var(stressNumber[uint32]{&o.Alignment, "bytes"}, "rdma-alignment", "offset of RDMA buffers")
	fl.BoolVar(&o.KeyOMeter, "rdma-key-o-meter", false, "accepted and passed on")
	fl.Var(&ignored, "rdma-use-notify", "ignored, as by rds-stress")
	fl.BoolVar(&o.Async, "async", false, "passed on, for Oracle's kernels: the peer's sockets send again what failed; those here do so by themselves")
	fl.BoolVar(new(bool), "disable-inq", false, "ignored: for Oracle's kernels")
	fl.BoolVar(&reset, "reset", false, "refused: for Oracle's kernels")
	fl.BoolVar(&s.cancelSent, "cancel-sent-to", false, "at the end take back what the peer has not acknowledged (RDS_CANCEL_SENT_TO)")
	fl.Var(stressNumber[uint32]{&s.abortAfter, "seconds"}, "abort-after", "end the process in the midst of it, so long after the burn-in")
	fl.BoolVar(&o.ShowParams, "show-params", false, "print the parameters")
	fl.BoolVar(&o.ShowPerfdata, "show-perfdata", false, "lines for programs, which begin with ::, in place of the table")
	fl.Var(stressNumber[uint32]{&o.ConnectRetries, "n"}, "connect-retries", "times to try the control connection again, each second")
	fl.Var(&useCong, "use-cong-monitor", "accepted and passed on: who waits for a port is always woken by it alone")
	fl.Var(&s.outliers, "show-outliers", "report round trips above this, in microseconds or with a unit")
	fl.BoolVar(&s.hist, "show-histogram", false, "print a histogram of round trips at the end")
	fl.BoolVar(&s.kernel, "kernel", false, "use the kernel's RDS in place of this one")
	fl.StringVar(&s.peerVersion, "peer-version", s.peerVersion, "release of the peer's rds-stress: with -Q, --async and over IPv6 it understands its own only")
	fl.StringVar(&s.rds.Dialect, "dialect", s.rds.Dialect, "what to speak to the peer: open (ours, where it can) or kernel")
	fl.Uint16Var(&s.rds.Port, "roce-port", s.rds.Port, "UDP port of RoCEv2")
	return cmd
}

// firstError is a writer that remembers what went wrong first. Safe for concurrent use.
type firstError struct {
	w io.Writer

	mu  sync.Mutex
	err error
}

func (f *firstError) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.w.Write(p)
	if f.err == nil {
		f.err = err
	}
	return n, err
}

func (f *firstError) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// intBool is a flag that rds-stress gives 0 or 1.
type intBool int

func (b *intBool) String() string { return strconv.Itoa(int(*b)) }
func (b *intBool) Type() string   { return "0|1" }
func (b *intBool) Set(s string) error {
	if s != "0" && s != "1" {
		return errors.New("wants 0 or 1")
	}
	*b = intBool(s[0] - '0')
	return nil
}

// parseStressNumber reads a number as rds-stress does: decimal, octal or hexadecimal, and a suffix for its multiples of 1024.
func parseStressNumber(s string, max uint64) (uint64, error) {
	digits, shift := s, 0
	if i := len(s) - 1; i > 0 {
		switch s[i] | 0x20 {
		case 'k':
			shift = 10
		case 'm':
			shift = 20
		case 'g':
			shift = 30
		}
		if shift > 0 {
			digits = s[:i]
		}
	}
	n, err := strconv.ParseUint(digits, 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no number", s)
	}
	if n > max>>shift {
		return 0, fmt.Errorf("%s is more than %d", s, max)
	}
	return n << shift, nil
}

// stressNumber is a flag with a number.
type stressNumber[T uint8 | uint16 | uint32] struct {
	n    *T
	kind string // for the help
}

func (v stressNumber[T]) String() string {
	if v.n == nil {
		return "0"
	}
	return strconv.FormatUint(uint64(*v.n), 10)
}
func (v stressNumber[T]) Type() string { return v.kind }
func (v stressNumber[T]) Set(s string) error {
	n, err := parseStressNumber(s, uint64(^T(0)))
	if err == nil {
		*v.n = T(n)
	}
	return err
}

// stressMicros is a flag with a time: a number of microseconds, as rds-stress has it, or with a unit.
type stressMicros time.Duration

func (v *stressMicros) String() string { return time.Duration(*v).String() }
func (v *stressMicros) Type() string   { return "us" }
func (v *stressMicros) Set(s string) error {
	if n, err := parseStressNumber(s, uint64(1<<63-1)/uint64(time.Microsecond)); err == nil {
		*v = stressMicros(time.Duration(n) * time.Microsecond)
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is neither a number of microseconds nor a time", s)
	}
	*v = stressMicros(d)
	return nil
}

// resolveStress is the address that text is, or the first one of a host with that name.
func resolveStress(ctx context.Context, text string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.Unmap(), nil
	}
	as, err := net.DefaultResolver.LookupNetIP(ctx, "ip", text)
	if err != nil {
		return netip.Addr{}, err
	}
	return as[0].Unmap(), nil
}

// settle completes options that a user gave: one of two link-local addresses may do without a zone; the least ack is the default;
// an address that says nothing is none.
func (o *stressOptions) settle() {
	if o.RecvAddr.IsUnspecified() {
		o.RecvAddr = netip.Addr{}
	}
	shareZone(&o.SendAddr, o.RecvAddr)
	shareZone(&o.RecvAddr, o.SendAddr)
	if o.AckSize == 0 {
		o.AckSize = uint32(o.headerLen())
	}
}

// shareZone has a in the zone of b, if it has none and needs one.
func shareZone(a *netip.Addr, b netip.Addr) {
	if a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "" {
		*a = a.WithZone(b.Zone())
	}
}

// ready is the error of a host that lacks what the test needs, which is better known before there is a peer.
func (s *stress) ready() error {
	if !s.kernel {
		return nil
	}
	h, err := openKernelRDS()
	if err != nil {
		return err
	}
	return h.Close()
}

// active connects, tells the peer its options, and runs.
func (s *stress) active(ctx context.Context) error {
	if err := s.ready(); err != nil {
		return err
	}
	if s.opt.ShowParams {
		s.params()
	}
	c, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if !s.opt.RecvAddr.IsValid() {
		s.opt.RecvAddr = hostOf(c.LocalAddr())
	}
	return s.lead(ctx, c)
}

// dial connects to a peer that may not be there yet.
func (s *stress) dial(ctx context.Context) (net.Conn, error) {
	o := &s.opt
	d := net.Dialer{Timeout: 10 * time.Second}
	if o.RecvAddr.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(o.RecvAddr, 0))
	}
	to := netip.AddrPortFrom(o.SendAddr, o.Port)
	fmt.Fprintf(s.stdout, "connecting to %v", to)
	defer fmt.Fprintln(s.stdout)
	for try := uint32(0); ; try++ {
		c, err := d.DialContext(ctx, "tcp", to.String())
		if err == nil {
			return c, nil
		}
		var errno syscall.Errno
		if try == 0 && errors.As(err, &errno) {
			fmt.Fprintf(s.stdout, ": %v", errno)
		}
		absent := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH)
		if !absent || try >= o.ConnectRetries {
			return nil, err
		}
		if try == 0 {
			fmt.Fprint(s.stdout, " - retrying")
		}
		fmt.Fprint(s.stdout, ".")
		if !pause(ctx, nil, s.second) {
			return nil, ctx.Err()
		}
	}
}

// hostOf is the address in that of a TCP connection's end.
func hostOf(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// lead is the active side's part of the control connection.
func (s *stress) lead(ctx context.Context, c net.Conn) error {
	// What the peer is told is what we send and receive at; it swaps them.
	if _, err := c.Write(s.opt.encode(s.peerVersion)); err != nil {
		return err
	}
	return s.run(ctx, c, true)
}

// passive waits for a peer and does as it is told.
func (s *stress) passive(ctx context.Context) error {
	if err := s.ready(); err != nil {
		return err
	}
	own := s.opt.RecvAddr
	host := ""
	if own.IsValid() {
		host = own.String()
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(s.opt.Port))))
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	at := l.Addr().String()
	if own.Zone() != "" {
		at = netip.AddrPortFrom(own, s.opt.Port).String() // the listener does not know it any more
	}
	fmt.Fprintf(s.stdout, "waiting for incoming connection on %s\n", at)
	c, err := l.Accept()
	stop()
	l.Close() // one test only
	if err != nil {
		if ctx.Err() != nil {
			return nil // interrupted, as its user wanted
		}
		return err
	}
	defer c.Close()
	on := ""
	if !own.IsValid() {
		own, on = hostOf(c.LocalAddr()), " on "+c.LocalAddr().String()
	}
	fmt.Fprintf(s.stdout, "accepted connection from %v%s\n", c.RemoteAddr(), on)
	return s.follow(ctx, c, own)
}

// follow is the passive side's part of the control connection; own is the address to use here.
func (s *stress) follow(ctx context.Context, c net.Conn, own netip.Addr) error {
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	o, err := readStressOptions(c, own.Is6())
	if err != nil {
		return fmt.Errorf("options of the peer: %w", err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	o.SendAddr, o.RecvAddr = o.RecvAddr, own
	shareZone(&o.SendAddr, own)
	if err := o.validate(); err != nil {
		return fmt.Errorf("options of the peer: %w", err)
	}
	s.opt = o
	return s.run(ctx, c, false)
}

// open makes the RDS that is tested.
func (s *stress) open() (stressHost, error) {
	if s.kernel {
		return openKernelRDS()
	}
	cfg := rds.Config{UDPPort: s.rds.Port, Network: s.network, Linger: -1}
	if s.rds.Dialect == dialectKernel {
		cfg.Dialect = rds.DialectKernelOnly
	}
	svc, err := rds.Open(cfg)
	if err != nil {
		return nil, err
	}
	h := ownHost{svc: svc}
	if s.network == nil {
		h.debug, _ = rdsdebug.Listen(svc) // whoever may not have the socket is tested all the same
	}
	return h, nil
}

// run is both sides' test over the control connection c.
func (s *stress) run(ctx context.Context, c net.Conn, active bool) (err error) {
	o := &s.opt
	host, err := s.open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	interrupted := context.Cause(ctx)
	var wg sync.WaitGroup
	var tasks []*stressTask
	defer wg.Wait()
	defer func() {
		cancel(nil)
		for _, t := range tasks {
			err = errors.Join(err, t.stop())
		}
	}()
	for i := range int(o.Tasks) {
		t, err := newStressTask(ctx, host, o, i, active, &wg, func(err error) { cancel(err) })
		if err != nil {
			return err
		}
		tasks = append(tasks, t)
		if limit := time.Duration(s.outliers); limit > 0 {
			t.outlier = func(to netip.AddrPort, rtt time.Duration) {
				if rtt > limit {
					fmt.Fprintf(s.stdout, "Found RTT = %.2f us to %v\n", float64(rtt)/1e3, to)
				}
			}
		}
	}
	// Both sides are ready before either starts.
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	steps := []func() error{
		func() error { _, err := c.Write([]byte{0}); return err },
		func() error { _, err := io.ReadFull(c, make([]byte, 1)); return err },
	}
	if !active {
		steps[0], steps[1] = steps[1], steps[0]
	}
	for _, f := range steps {
		switch err := f(); {
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
			return fmt.Errorf("control connection: the peer ended before it was ready, and says itself why: %w", err)
		case err != nil:
			return fmt.Errorf("control connection: %w", err)
		}
	}
	fmt.Fprintf(s.stdout, "negotiated options, tasks will start in %g seconds\n", (s.burnIn / 2).Seconds())
	// From here on anything that happens on the control connection is the end, and no error.
	over := make(chan struct{})
	go func() {
		defer close(over)
		c.Read(make([]byte, 1))
	}()
	defer func() {
		c.Close()
		<-over
	}()
	done, early := s.report(ctx, over, active, host, tasks)
	// The sides do not stop at the same instant: what fails from here on fails because the other one has, and what it sent last
	// still finds a socket.
	for i, t := range tasks {
		t.quiet()
		if s.cancelSent {
			if err := t.cancel(i, s.stdout); err != nil {
				return err
			}
		}
	}
	c.Close()
	pause(ctx, nil, s.second)
	done()
	if cause := context.Cause(ctx); cause != nil && cause != interrupted && !errors.Is(cause, context.Canceled) {
		return cause
	}
	if ctx.Err() == nil {
		return early
	}
	return nil
}

// pause waits and reports whether the test still goes on.
func pause(ctx context.Context, over <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-over:
	case <-ctx.Done():
	}
	return false
}
