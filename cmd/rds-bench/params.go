package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/openrds/openrds/rds"
)

// Names of transports and tests, as they appear in flags and reports.
const (
	transportRDS = "rds"
	transportTCP = "tcp"
	transportUDP = "udp"

	transportQUIC = "quic"

	baselineNames = "tcp, udp, quic, none" // for people

	testThroughput = "throughput"
	testRTT        = "rtt"
	testLoad       = "load"
)

// baselines may stand in --compare: RDS beside RDMA.
var baselines = []string{transportTCP, transportUDP, transportQUIC, transportRDS}

// Bounds of parameters. A server holds its client to them.
const (
	maxSockets = 1024
	maxDepth   = 1 << 16
	minRate    = 0.1
	maxRate    = 1e9
	maxCount   = 1000
)

// params is what a client measures.
type params struct {
	Sizes    []int         // bytes per datagram, 1..maxMessageBytes
	Tests    []string      // testThroughput, testRTT, testLoad
	Compare  []string      // baselines beside RDS
	Sockets  int           // flows
	Depth    int           // datagrams in flight per flow, 0 as many as the send buffer takes
	Duration time.Duration // measured interval of a run
	Warmup   time.Duration // before it
	Bidir    bool          // throughput in both directions at once
	Verify   bool          // check content and order of every datagram
	RDS      rdsOptions
	Seed     uint64 // of the content

	Rates    []float64     // of load runs, in datagrams per second over all flows
	Interval time.Duration // of reports within a run, 0 for none
	Count    int           // how often the whole ladder is measured

	RDMA       []string      // operations to measure, with a datagram behind each; none: datagrams alone
	RDMASizes  []int         // bytes per operation
	ODP        bool          // memory of operations in an rds.Arena
	Discard    bool          // each operation finds no page there
	Chaos      string        // chaosDevices, or nothing
	ChaosEvery time.Duration // between two removals of a device, on average
}

func defaultParams() params {
	return params{
		Sizes:    []int{64, 4 << 10, 64 << 10, 1 << 20},
		Tests:    []string{testThroughput, testRTT},
		Compare:  []string{transportTCP},
		Sockets:  1,
		Duration: time.Second,
		Warmup:   200 * time.Millisecond,
		RDS:      rdsOptions{Dialect: dialectOpen, Port: 4791},
		Seed:     1,
		Count:    1,

		RDMASizes: []int{rds.MaxRDMASize}, ChaosEvery: defaultChaosEvery,
	}
}

// settle chooses what depends on other flags, unless it was chosen.
func (p *params) settle(chosen func(flag string) bool) {
	if len(p.RDMA) > 0 {
		if !chosen("sizes") {
			p.Sizes = []int{64}
		}
		if !chosen("compare") {
			p.Compare = []string{transportRDS, transportTCP}
		}
	}
	if len(p.Rates) > 0 && !chosen("tests") {
		p.Tests = []string{testLoad}
	}
	if p.Chaos != "" {
		p.RDS.Audit = true
		if !chosen("compare") {
			p.Compare = nil // baselines have no devices to remove
		}
	}
}

// Dialects: what to speak to a peer that is one of ours.
const (
	dialectOpen   = "open"   // several messages in a SEND
	dialectKernel = "kernel" // as to the Linux kernel: one fragment in a SEND
)

// validate reports every problem.
func (p params) validate() error {
	var errs []error
	complain := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(p.Sizes) == 0 {
		complain("--sizes is empty")
	}
	for _, s := range p.Sizes {
		if s < 1 || s > maxMessageBytes {
			complain("--sizes: %d is not between 1 and %d bytes", s, maxMessageBytes)
		}
	}
	if len(p.Tests) == 0 {
		complain("--tests is empty")
	}
	for _, t := range p.Tests {
		if t != testThroughput && t != testRTT && t != testLoad {
			complain("--tests: %q is none of %s, %s, %s", t, testThroughput, testRTT, testLoad)
		}
	}
	if slices.Contains(p.Tests, testLoad) != (len(p.Rates) > 0) {
		complain("--rate is for --tests %s, and needed there", testLoad)
	}
	for _, r := range p.Rates {
		if !(r >= minRate && r <= maxRate) {
			complain("--rate: %v is not between %v and %v datagrams per second", r, minRate, maxRate)
		}
	}
	if p.Interval != 0 && p.Interval < minInterval {
		complain("--interval: %v is less than %v", p.Interval, minInterval)
	}
	if p.Count < 1 || p.Count > maxCount {
		complain("--count: %d is not between 1 and %d", p.Count, maxCount)
	}
	for _, c := range p.Compare {
		if !slices.Contains(baselines, c) {
			complain("--compare: %q is none of %s", c, baselineNames)
		}
		if c == transportRDS && len(p.RDMA) == 0 {
			complain("--compare: rds is what is measured, unless there is --rdma")
		}
	}
	if p.Sockets < 1 || p.Sockets > maxSockets {
		complain("--sockets: %d is not between 1 and %d", p.Sockets, maxSockets)
	}
	if p.Depth < 0 || p.Depth > maxDepth {
		complain("--depth: %d is not between 0 and %d", p.Depth, maxDepth)
	}
	if p.Duration <= 0 {
		complain("--duration: %v is not positive", p.Duration)
	}
	if p.Warmup < 0 {
		complain("--warmup: %v is negative", p.Warmup)
	}
	if err := p.RDS.validate(); err != nil {
		errs = append(errs, err)
	}
	p.validateRDMA(complain)
	if p.Chaos != "" && p.Chaos != chaosDevices {
		complain("--chaos: %q is not %s", p.Chaos, chaosDevices)
	}
	if p.Chaos != "" && p.ChaosEvery < minChaosEvery {
		complain("--chaos-every: %v is less than %v", p.ChaosEvery, minChaosEvery)
	}
	return errors.Join(errs...)
}

func (p *params) validateRDMA(complain func(string, ...any)) {
	if len(p.RDMA) == 0 {
		if p.ODP || p.Discard {
			complain("--odp is about the memory of --rdma")
		}
		return
	}
	for _, op := range p.RDMA {
		if op != rdmaRead && op != rdmaWrite {
			complain("--rdma: %q is neither %s nor %s", op, rdmaRead, rdmaWrite)
		}
	}
	for _, s := range p.Sizes {
		if s < rdmaHeaderBytes {
			complain("--sizes: %d is less than the %d bytes that a datagram of --rdma needs", s, rdmaHeaderBytes)
		}
	}
	if len(p.RDMASizes) == 0 {
		complain("--rdma-size is empty")
	}
	for _, n := range p.RDMASizes {
		if n < 1 || n > rds.MaxRDMASize {
			complain("--rdma-size: %d is not between 1 and %d bytes", n, rds.MaxRDMASize)
			continue
		}
		// Both of a flow's ends may be initiator and target.
		s := spec{Test: testThroughput, RDMASize: n, Depth: p.Depth}
		if p.Sockets > 0 && p.Depth >= 0 && p.Depth <= maxDepth && p.Sockets <= maxSockets &&
			int64(p.Sockets)*int64(s.slotCount())*int64(s.stride())*2 > rdmaMemoryBytes {
			complain("--rdma-size: %d sockets with %d operations of %d bytes in flight need more than %d MiB on each side",
				p.Sockets, s.slotCount(), n, rdmaMemoryBytes>>20)
		}
	}
	if p.Discard && !p.ODP {
		complain("--odp-discard without --odp")
	}
}

// runs lists the specs of the ladder in the order they are measured: for each size and test RDS first and
// its baselines right after it, so that what drifts on the machine drifts for all.
func (p params) runs() []spec {
	var out []spec
	for round := range max(1, p.Count) {
		first := len(out)
		for _, size := range p.Sizes {
			if len(p.RDMA) == 0 {
				out = p.rung(out, p.spec(size), size)
				continue
			}
			for _, n := range p.RDMASizes {
				out = p.rung(out, p.spec(size), n)
			}
		}
		for i := range out[first:] {
			out[first+i].Round = round
		}
	}
	return out
}

// perRun is the measured interval of each run: with removals of devices Duration is that of all together, so that a soak takes
// the time that was asked for.
func (p *params) perRun() time.Duration {
	if p.Chaos == "" {
		return p.Duration
	}
	return p.Duration / time.Duration(max(1, len(p.runs())))
}

// rung appends the runs of one size: of RDS as base says, of the baselines with datagrams of size.
func (p *params) rung(out []spec, base spec, size int) []spec {
	for _, test := range p.Tests {
		rates := []float64{0}
		if test == testLoad {
			rates = p.Rates
		}
		for _, rate := range rates {
			s := base
			s.Test, s.Rate, s.Bidir = test, rate, p.Bidir && test == testThroughput
			if p.Chaos != "" {
				s.Chaos, s.ChaosEvery = p.Chaos, p.ChaosEvery
			}
			plain := s
			for _, op := range p.RDMA {
				s.RDMA, s.RDMASize, s.ODP, s.Discard = op, size, p.ODP, p.Discard
				out = append(out, s)
			}
			if len(p.RDMA) == 0 {
				out = append(out, s)
			}
			for _, tr := range p.Compare {
				b := plain
				if b.Transport, b.Size = tr, size; tr != transportRDS {
					b.Chaos, b.ChaosEvery = "", 0
				}
				out = append(out, b)
			}
		}
	}
	return out
}

// spec is what all runs of a size have in common.
func (p *params) spec(size int) spec {
	return spec{Transport: transportRDS, Size: size, Sockets: p.Sockets, Depth: p.Depth, Verify: p.Verify, Seed: p.Seed, Patience: maxPatience}
}

// A spec says what one run is. The client sends it to its server.
type spec struct {
	Transport string `json:"transport"`
	Test      string `json:"test"`
	Size      int    `json:"size"`
	Sockets   int    `json:"sockets"`
	Depth     int    `json:"depth"`
	Bidir     bool   `json:"bidir"`
	Verify    bool   `json:"verify"`
	Seed      uint64 `json:"seed"`
	Token     uint64 `json:"token"`

	Rate       float64       `json:"rate,omitempty"` // of a load run, over all flows
	RDMA       string        `json:"rdma,omitempty"`
	RDMASize   int           `json:"rdma_size,omitempty"`
	ODP        bool          `json:"odp,omitempty"`
	Discard    bool          `json:"odp_discard,omitempty"`
	Chaos      string        `json:"chaos,omitempty"`
	ChaosEvery time.Duration `json:"chaos_every_ns,omitempty"`

	// Patience bounds how long either side waits, after the senders have stopped, for what is on its way.
	Patience time.Duration `json:"patience_ns"`

	Round int `json:"-"` // of --count
}

// moved is how many bytes each operation, or datagram, is about.
func (s spec) moved() int {
	if s.RDMA != "" {
		return s.RDMASize
	}
	return s.Size
}

func (s spec) String() string {
	t := fmt.Sprintf("%s %s %s", s.Transport, formatSize(s.Size), s.Test)
	if s.RDMA != "" {
		t = fmt.Sprintf("%s %s %s %s", s.Transport, s.RDMA, formatSize(s.RDMASize), s.Test)
	}
	if s.Rate > 0 {
		t += " " + formatRate(s.Rate) + "/s"
	}
	return t
}

// validate is the server's look at what a stranger asks for.
func (s spec) validate() error {
	p := params{
		Sizes: []int{s.Size}, Tests: []string{s.Test}, Sockets: s.Sockets, Depth: s.Depth,
		Duration: 1, Count: 1, RDS: defaultParams().RDS, ODP: s.ODP, Discard: s.Discard, Chaos: s.Chaos, ChaosEvery: s.ChaosEvery,
	}
	if s.Rate != 0 {
		p.Rates = []float64{s.Rate}
	}
	if s.RDMA != "" {
		p.RDMA, p.RDMASizes = []string{s.RDMA}, []int{s.RDMASize}
	}
	if s.Patience < 0 || s.Patience > maxPatience {
		return fmt.Errorf("patience of %v", s.Patience)
	}
	return p.validate()
}

// sizesValue is the flag value of --sizes.
type sizesValue struct{ sizes *[]int }

func (v sizesValue) Type() string { return "sizes" }

func (v sizesValue) String() string {
	if v.sizes == nil {
		return ""
	}
	var out []string
	for _, s := range *v.sizes {
		out = append(out, strings.ReplaceAll(formatSize(s), " ", ""))
	}
	return strings.Join(out, ",")
}

func (v sizesValue) Set(s string) error {
	var out []int
	for _, f := range strings.Split(s, ",") {
		n, err := parseSize(f)
		if err != nil {
			return err
		}
		out = append(out, n)
	}
	*v.sizes = out
	return nil
}

// parseSize reads a number of bytes with an optional binary unit: 64, 64B, 4K, 4KiB, 1M, 1MiB.
func parseSize(s string) (int, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	shift := 0
	for _, u := range []struct {
		suffix string
		shift  int
	}{{"kib", 10}, {"mib", 20}, {"k", 10}, {"m", 20}, {"b", 0}} {
		if strings.HasSuffix(t, u.suffix) {
			t, shift = strings.TrimSuffix(t, u.suffix), u.shift
			break
		}
	}
	n, err := strconv.ParseUint(strings.TrimSpace(t), 10, 31)
	if err != nil || n<<shift > maxMessageBytes {
		return 0, fmt.Errorf("%q is not a size between 1 and 1MiB, like 64, 4KiB or 1MiB", s)
	}
	return int(n << shift), nil
}

// formatSize is parseSize's inverse for people.
func formatSize(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

// compareValue is the flag value of --compare.
type compareValue struct{ names *[]string }

func (v compareValue) Type() string { return "names" }

func (v compareValue) String() string {
	if v.names == nil {
		return ""
	}
	if len(*v.names) == 0 {
		return "none"
	}
	return strings.Join(*v.names, ",")
}

func (v compareValue) Set(s string) error {
	*v.names = nil
	if s == "none" {
		return nil
	}
	for _, f := range strings.Split(s, ",") {
		if !slices.Contains(baselines, f) {
			return fmt.Errorf("%q is none of %s", f, baselineNames)
		}
		*v.names = append(*v.names, f)
	}
	return nil
}

// ratesValue is the flag value of --rate.
type ratesValue struct{ rates *[]float64 }

func (v ratesValue) Type() string { return "rates" }

func (v ratesValue) String() string {
	if v.rates == nil {
		return ""
	}
	var out []string
	for _, r := range *v.rates {
		out = append(out, formatRate(r))
	}
	return strings.Join(out, ",")
}

func (v ratesValue) Set(s string) error {
	*v.rates = nil
	for _, f := range strings.Split(s, ",") {
		r, err := parseRate(f)
		if err != nil {
			return err
		}
		*v.rates = append(*v.rates, r)
	}
	return nil
}

// parseRate reads a number with an optional decimal unit: 500, 20k, 1.5M.
func parseRate(s string) (float64, error) {
	t, scale := strings.TrimSpace(s), 1.0
	switch {
	case strings.HasSuffix(t, "k"), strings.HasSuffix(t, "K"):
		t, scale = t[:len(t)-1], 1e3
	case strings.HasSuffix(t, "M"):
		t, scale = t[:len(t)-1], 1e6
	}
	v, err := strconv.ParseFloat(t, 64)
	if v *= scale; err != nil || !(v >= 0 && v <= maxRate) {
		return 0, fmt.Errorf("%q is not a rate, like 500, 20k or 1.5M", s)
	}
	return v, nil
}

// formatRate is parseRate's inverse for people.
func formatRate(r float64) string {
	f := func(v float64) string { return strconv.FormatFloat(v, 'g', 6, 64) }
	switch {
	case r >= 1e6:
		return f(r/1e6) + "M"
	case r >= 1e3:
		return f(r/1e3) + "k"
	}
	return f(r)
}
