package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/openrds/openrds/rds"
)

// stress is rds-stress: one side of a test, whose other side may be rds-stress itself on a kernel's RDS.
type stress struct {
	opt      stressOptions
	rds      rdsOptions
	kernel   bool // the kernel's RDS, not ours
	cpu      bool
	stdout   io.Writer
	outliers time.Duration
	hist     bool

	// Shorter in tests.
	delay, burnIn, second time.Duration
}

// Times of rds-stress: tasks start so long after both sides are ready, and what they do at first is not counted.
const (
	stressDelay  = 2 * time.Second
	stressBurnIn = 4 * time.Second
)

func newStressCommand(stdout io.Writer) *cobra.Command {
	s := stress{opt: defaultStressOptions(), rds: rdsOptions{Dialect: dialectOpen, Port: 4791}, stdout: stdout, delay: stressDelay, burnIn: stressBurnIn, second: time.Second}
	o := &s.opt
	var send, recv string
	var useCong, useOnce, useGetMR, useFence, cacheMRs intBool = 1, 0, 0, 1, 0
	var ignored intBool
	cmd := &cobra.Command{
		Use:   "stress",
		Short: "Speak rds-stress's protocol, with rds-stress or with another of these",
		Long: `stress is rds-stress with this RDS in place of the kernel's: the same options, control connection, datagrams and output. Its peer is
another "rds-bench stress", or rds-stress on a host that uses the kernel's RDS. With --kernel it uses the kernel's RDS itself, and is
rds-stress for hosts that have none.

Without -s it waits for one that connects and does as it is told; with -s it connects, tells, and measures.`,
		Example: "  rds-bench stress -r 10.0.0.1\n  rds-bench stress -r 10.0.0.2 -s 10.0.0.1 -q 4096 -t 4 -d 8 -T 30",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.CongMonitor, o.UseOnce, o.UseGetMR, o.UseFence, o.CacheMRs = useCong != 0, useOnce != 0, useGetMR != 0, useFence != 0, cacheMRs != 0
			for _, a := range []struct {
				text string
				addr *netip.Addr
				flag string
			}{{send, &o.SendAddr, "-s"}, {recv, &o.RecvAddr, "-r"}} {
				if a.text == "" {
					continue
				}
				ap, err := netip.ParseAddr(a.text)
				if err != nil || !ap.Is4() {
					return usage(fmt.Errorf("%s: %q is not an IPv4 address, which is all the protocol knows", a.flag, a.text))
				}
				*a.addr = ap
			}
			if err := errors.Join(o.validate(), s.rds.validate()); err != nil {
				return usage(err)
			}
			if o.SendAddr.IsValid() {
				return s.active(cmd.Context())
			}
			return s.passive(cmd.Context())
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&recv, "recv-addr", "r", "", "local address; default that of the control connection")
	fl.StringVarP(&send, "send-addr", "s", "", "peer's address: this side is the active one")
	fl.Uint16VarP(&o.Port, "port", "p", o.Port, "TCP port of the control connection; RDS ports follow")
	fl.VarP(stressSize{&o.AckSize}, "ack-bytes", "a", "bytes of an ack, with suffix k, m, g")
	fl.VarP(stressSize{&o.ReqSize}, "req-bytes", "q", "bytes of a request")
	fl.Uint32VarP(&o.Depth, "depth", "d", o.Depth, "requests outstanding per task and peer task")
	fl.Uint16VarP(&o.Tasks, "tasks", "t", o.Tasks, "tasks on each side, each with a socket")
	fl.Uint32VarP(&o.RunTime, "time", "T", 0, "seconds, after the burn-in; 0: until interrupted")
	fl.VarP(stressSize{&o.RDMASize}, "rdma-bytes", "D", "bytes per RDMA segment; 0: no RDMA")
	fl.Uint32VarP(&o.Segments, "rdma-segments", "I", o.Segments, "local segments per RDMA")
	fl.Uint8VarP(&o.RWMode, "rdma-mode", "M", 0, "0: RDMA reads and writes in turn, 1: reads, 2: writes")
	fl.BoolVarP(&o.OneWay, "one-way", "o", false, "only the active side sends requests")
	fl.Uint8VarP(&o.TOS, "tos", "Q", 0, "type of service")
	fl.BoolVarP(&s.cpu, "report-cpu", "c", false, "report the CPU that this process uses, of all there is")
	fl.BoolVarP(&o.RTPrio, "rtprio", "R", false, "accepted and passed on; goroutines have no priorities")
	fl.BoolVarP(&o.Verify, "verify", "v", false, "check every byte")
	fl.BoolVarP(&o.Tracing, "trace", "V", false, "accepted and passed on; see rdsctl trace")
	fl.BoolVarP(&o.SummaryOnly, "report-summary", "z", false, "the last line only")
	fl.Var(&useOnce, "rdma-use-once", "regions that the reply frees")
	fl.Var(&useGetMR, "rdma-use-get-mr", "register regions for the destination (RDS_GET_MR_FOR_DEST), not with the message")
	fl.Var(&useFence, "rdma-use-fence", "fence RDMA reads")
	fl.Var(&cacheMRs, "rdma-cache-mrs", "keep regions")
	fl.Uint32Var(&o.Alignment, "rdma-alignment", 0, "offset of RDMA buffers")
	fl.BoolVar(&o.KeyOMeter, "rdma-key-o-meter", false, "accepted and passed on")
	fl.Var(&ignored, "rdma-use-notify", "ignored, as by rds-stress")
	fl.BoolVar(&o.ShowParams, "show-params", false, "print the parameters")
	fl.BoolVar(&o.ShowPerfdata, "show-perfdata", false, "lines for programs, which begin with ::")
	fl.Uint32Var(&o.ConnectRetries, "connect-retries", 0, "times to try the control connection again, each second")
	fl.Var(&useCong, "use-cong-monitor", "accepted and passed on: who waits for a port is always woken by it alone")
	fl.DurationVar(&s.outliers, "show-outliers", 0, "report round trips above this")
	fl.BoolVar(&s.hist, "show-histogram", false, "print a histogram of round trips at the end")
	fl.BoolVar(&s.kernel, "kernel", false, "use the kernel's RDS in place of this one")
	fl.StringVar(&s.rds.Dialect, "dialect", s.rds.Dialect, "what to speak to the peer: open (ours, where it can) or kernel")
	fl.Uint16Var(&s.rds.Port, "roce-port", s.rds.Port, "UDP port of RoCEv2")
	return cmd
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

// stressSize is a number of bytes with rds-stress's suffixes.
type stressSize struct{ n *uint32 }

func (v stressSize) String() string {
	if v.n == nil {
		return "0"
	}
	return strconv.FormatUint(uint64(*v.n), 10)
}
func (v stressSize) Type() string { return "bytes" }
func (v stressSize) Set(s string) error {
	shift := 0
	if i := strings.IndexAny(s, "kKmMgG"); i >= 0 && i == len(s)-1 {
		shift = map[byte]int{'k': 10, 'm': 20, 'g': 30}[s[i]|0x20]
		s = s[:i]
	}
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil || n<<shift > stressUnset-1 {
		return fmt.Errorf("%q is no number of bytes", s)
	}
	*v.n = uint32(n << shift)
	return nil
}

// active connects, tells the peer its options, and runs.
func (s *stress) active(ctx context.Context) error {
	o := &s.opt
	d := net.Dialer{Timeout: 10 * time.Second}
	if o.RecvAddr.IsValid() {
		d.LocalAddr = &net.TCPAddr{IP: o.RecvAddr.AsSlice()}
	}
	to := netip.AddrPortFrom(o.SendAddr, o.Port)
	fmt.Fprintf(s.stdout, "connecting to %v\n", to)
	var c net.Conn
	for try := uint32(0); ; try++ {
		var err error
		if c, err = d.DialContext(ctx, "tcp", to.String()); err == nil {
			break
		}
		if try >= o.ConnectRetries || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(s.second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer c.Close()
	if !o.RecvAddr.IsValid() {
		o.RecvAddr = c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	}
	// What the peer is told is what we send and receive at; it swaps them.
	if _, err := c.Write(o.encode()); err != nil {
		return err
	}
	fmt.Fprintf(s.stdout, "negotiated options, tasks will start in %v\n", s.delay)
	return s.run(ctx, c, true)
}

// passive waits for a peer and does as it is told.
func (s *stress) passive(ctx context.Context) error {
	host := ""
	if s.opt.RecvAddr.IsValid() {
		host = s.opt.RecvAddr.String()
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp4", net.JoinHostPort(host, strconv.Itoa(int(s.opt.Port))))
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	fmt.Fprintf(s.stdout, "waiting for incoming connection on %v\n", l.Addr())
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
	fmt.Fprintf(s.stdout, "accepted connection from %v\n", c.RemoteAddr())
	own := s.opt.RecvAddr
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if s.opt, err = readStressOptions(c); err != nil {
		return fmt.Errorf("options of the peer: %w", err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	s.opt.SendAddr = s.opt.RecvAddr
	if s.opt.RecvAddr = own; !own.IsValid() {
		s.opt.RecvAddr = c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	}
	if err := s.opt.validate(); err != nil {
		return fmt.Errorf("options of the peer: %w", err)
	}
	fmt.Fprintf(s.stdout, "negotiated options, tasks will start in %v\n", s.delay)
	return s.run(ctx, c, false)
}

// open makes the RDS that is tested.
func (s *stress) open() (stressHost, error) {
	if s.kernel {
		return openKernelRDS()
	}
	cfg := rds.Config{UDPPort: s.rds.Port, Linger: -1}
	if s.rds.Dialect == dialectKernel {
		cfg.Dialect = rds.DialectKernelOnly
	}
	svc, err := rds.Open(cfg)
	if err != nil {
		return nil, err
	}
	return ownHost{svc}, nil
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
		if s.outliers > 0 {
			t.outlier = func(to netip.AddrPort, rtt time.Duration) {
				if rtt > s.outliers {
					fmt.Fprintf(s.stdout, "Found RTT = %.2f us to %v\n", float64(rtt)/1e3, to)
				}
			}
		}
	}
	if o.ShowParams {
		fmt.Fprintf(s.stdout, "Parameters:\n  Transport   : rds\n  Tasks       : %d\n  Depth       : %d\n  Request     : %d\n  Ack         : %d\n  RDMA        : %d x %d\n  Type of service: %d\n",
			o.Tasks, o.Depth, o.ReqSize, o.AckSize, o.RDMASize, o.Segments, o.TOS)
	}
	// Both sides are ready before either starts.
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	one := []byte{0}
	steps := []func() error{
		func() error { _, err := c.Write(one); return err },
		func() error { _, err := io.ReadFull(c, one); return err },
	}
	if !active {
		steps[0], steps[1] = steps[1], steps[0]
	}
	for _, f := range steps {
		if err := f(); err != nil {
			return fmt.Errorf("control connection: %w", err)
		}
	}
	// From here on anything that happens on the control connection is the end, and no error.
	over := make(chan struct{})
	go func() {
		defer close(over)
		bufio.NewReader(c).ReadByte()
	}()
	defer func() {
		c.Close()
		<-over
	}()
	if !pause(ctx, over, s.delay) {
		return context.Cause(ctx)
	}
	for _, t := range tasks {
		t.start()
	}
	s.report(ctx, over, active, host, tasks)
	// The sides do not stop at the same instant: what fails from here on fails because the other one has. So the active one
	// says that it is over, and keeps its sockets until the passive one knows.
	for _, t := range tasks {
		t.stopping.Store(true)
	}
	if h, ok := c.(interface{ CloseWrite() error }); ok && active {
		h.CloseWrite()
		pause(ctx, over, 2*time.Second)
	}
	if cause := context.Cause(ctx); cause != nil && cause != interrupted && !errors.Is(cause, context.Canceled) {
		return cause
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

func total(tasks []*stressTask) (c stressCounts) {
	for _, t := range tasks {
		c.add(t.snapshot(), 1)
	}
	return c
}

// report prints a line per second and the average. The active side ends when the time is over, the passive one when the
// active one has ended.
func (s *stress) report(ctx context.Context, over <-chan struct{}, active bool, host stressHost, tasks []*stressTask) {
	w := s.stdout
	fmt.Fprint(w, "Starting up")
	for range 4 {
		if !pause(ctx, over, s.burnIn/4) {
			fmt.Fprintln(w)
			return
		}
		fmt.Fprint(w, ".")
	}
	fmt.Fprintln(w)
	fmt.Fprintf(w, "%4s %6s %6s %10s %10s %10s %7s %8s %5s\n", "tsks", "tx/s", "rx/s", "tx+rx K/s", "mbi K/s", "mbo K/s", "tx us/c", "rtt us", "cpu %")
	if s.opt.ShowPerfdata {
		names := []string{"tasks", "req", "ack", "rdma", "requests", "kB/s", "in", "out", "tx", "rtt", "cpu"}
		for _, c := range host.counters() {
			names = append(names, c.Name)
		}
		fmt.Fprintf(w, "::%s\n", strings.Join(names, ","))
	}
	begin := time.Now()
	first := total(tasks)
	last, lastAt := first, begin
	firstCPU, lastCPU := cpuTime(), cpuTime()
	lastCounters := host.counters()
	for n := 1; !active || s.opt.RunTime == 0 || n <= int(s.opt.RunTime); n++ {
		on := pause(ctx, over, time.Until(begin.Add(time.Duration(n)*s.second)))
		now, c, cpu := time.Now(), total(tasks), cpuTime()
		if !on {
			break
		}
		d := c
		d.add(last, ^uint64(0))
		took := now.Sub(lastAt)
		if !s.opt.SummaryOnly {
			s.line(d, took, d.ReqTx, d.ReqRx, s.cpuPercent(cpu-lastCPU, took), "")
		}
		if s.opt.ShowPerfdata {
			counters := host.counters()
			// One write: whoever finds a long round trip writes between two.
			line := fmt.Appendf(nil, "::%d,%d,%d,%d,%d,%.2f,%.2f,%.2f,%.2f,%.2f,%.2f", s.opt.Tasks, s.opt.ReqSize, s.opt.AckSize, s.opt.RDMASize, d.ReqTx,
				kps(d.bytes(), took), kps(d.MbusIn, took), kps(d.MbusOut, took), mean(d.SendTime, d.ReqTx), mean(d.RTT, d.AckRx), s.cpuPercent(cpu-lastCPU, took))
			for i, x := range counters {
				old := uint64(0)
				if i < len(lastCounters) && lastCounters[i].Name == x.Name {
					old = lastCounters[i].Value
				}
				line = fmt.Appendf(line, ",%.0f", float64(x.Value-old)/took.Seconds())
			}
			w.Write(append(line, '\n'))
			lastCounters = counters
		}
		last, lastAt, lastCPU = c, now, cpu
	}
	d := last
	d.add(first, ^uint64(0))
	took := lastAt.Sub(begin)
	if took <= 0 {
		return
	}
	if !s.opt.SummaryOnly {
		fmt.Fprintln(w, strings.Repeat("-", 75))
	}
	if s.hist {
		defer s.histogram(tasks)
	}
	secs := took.Seconds()
	s.line(d, took, uint64(float64(d.ReqTx)/secs), uint64(float64(d.ReqRx)/secs), s.cpuPercent(lastCPU-firstCPU, took), "  (average)")
}

// histogram prints round trips by powers of two.
func (s *stress) histogram(tasks []*stressTask) {
	var sum stressHistogram
	for _, t := range tasks {
		t.mu.Lock()
		for i, n := range t.hist {
			sum[i] += n
		}
		t.mu.Unlock()
	}
	fmt.Fprintln(s.stdout, "\nRTT histogram (all of the run):")
	for i, n := range sum {
		switch {
		case i == len(sum)-1:
			fmt.Fprintf(s.stdout, "RTT (us)          >= %8d %10d\n", 1<<(i-1), n)
		default:
			fmt.Fprintf(s.stdout, "RTT (us) %8d <  %8d %10d\n", 1<<i>>1, 1<<i, n)
		}
	}
}

func (c *stressCounts) bytes() uint64 {
	return c.ReqTxBytes + c.ReqRxBytes + c.AckTxBytes + c.AckRxBytes
}

// kps is KiB per second.
func kps(bytes uint64, d time.Duration) float64 { return float64(bytes) / 1024 / d.Seconds() }

// mean is the mean in microseconds.
func mean(sum time.Duration, n uint64) float64 {
	if n == 0 {
		return 0
	}
	return float64(sum) / float64(n) / 1e3
}

func (s *stress) line(d stressCounts, took time.Duration, tx, rx uint64, cpu float64, suffix string) {
	fmt.Fprintf(s.stdout, "%4d %6d %6d %10.2f %10.2f %10.2f %7.2f %8.2f %5.2f%s\n", s.opt.Tasks, tx, rx,
		kps(d.bytes(), took), kps(d.MbusIn, took), kps(d.MbusOut, took), mean(d.SendTime, d.ReqTx), mean(d.RTT, d.AckRx), cpu, suffix)
}

// cpuPercent is what the process used of all processors, -1 unless asked for.
func (s *stress) cpuPercent(used, took time.Duration) float64 {
	if !s.cpu {
		return -1
	}
	return 100 * used.Seconds() / took.Seconds() / float64(runtime.NumCPU())
}
