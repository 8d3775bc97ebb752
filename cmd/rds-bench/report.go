package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// schemaVersion changes when a field changes its meaning or goes away.
const schemaVersion = 1

// A report is what a measurement found: the object that --json prints. Numbers are in base units.
type report struct {
	SchemaVersion int      `json:"schema_version"`
	Start         start    `json:"start"`
	Runs          []result `json:"runs"`

	// Clean says of a measurement with removals of devices, of which there were some, that nothing was lost, nothing repeated, and nothing left behind by
	// either process.
	Clean bool `json:"clean,omitempty"`
}

// start says where, when and how.
type start struct {
	Time       time.Time        `json:"time"`
	Host       string           `json:"host"`
	Go         string           `json:"go"`
	CPUs       int              `json:"cpus"`
	Provider   string           `json:"provider"` // of RDS
	Parameters reportParameters `json:"parameters"`
}

type reportParameters struct {
	Sizes           []int     `json:"sizes"`
	Tests           []string  `json:"tests"`
	Compare         []string  `json:"compare"`
	Sockets         int       `json:"sockets"`
	Depth           int       `json:"depth"`
	DurationSeconds float64   `json:"duration_seconds"`
	WarmupSeconds   float64   `json:"warmup_seconds"`
	Bidir           bool      `json:"bidir"`
	Verify          bool      `json:"verify"`
	Dialect         string    `json:"dialect"`
	RoCEPort        uint16    `json:"roce_port"`
	Seed            uint64    `json:"seed"`
	Rates           []float64 `json:"rates,omitempty"` // of load runs
	IntervalSeconds float64   `json:"interval_seconds,omitempty"`
	Count           int       `json:"count,omitempty"`
	RDMA            []string  `json:"rdma,omitempty"`
	RDMASizes       []int     `json:"rdma_sizes,omitempty"`
	ODP             bool      `json:"odp,omitempty"`
	ODPDiscard      bool      `json:"odp_discard,omitempty"`
	Chaos           string    `json:"chaos,omitempty"`
	ChaosSeconds    float64   `json:"chaos_every_seconds,omitempty"`
	Client          string    `json:"client"` // addresses
	Server          string    `json:"server"`
}

// A result is one run's. Rates are counted at the receiving application.
type result struct {
	Transport         string       `json:"transport"`
	Provider          string       `json:"provider"`
	Test              string       `json:"test"`
	Size              int          `json:"size"`                // bytes
	MessagesPerSecond float64      `json:"messages_per_second"` // round trips in an RTT run
	BytesPerSecond    float64      `json:"bytes_per_second"`    // one way in an RTT run
	RTTSeconds        *percentiles `json:"rtt_seconds"`         // null in a throughput run
	CPUSeconds        float64      `json:"cpu_seconds"`         // of both processes, in the measured interval
	Retransmits       uint64       `json:"retransmits"`
	Drops             uint64       `json:"drops"`
	Verified          bool         `json:"verified"` // content and order of every datagram were checked and right

	Messages    uint64       `json:"messages,omitempty"`           // received in the measured interval
	Offered     float64      `json:"offered_per_second,omitempty"` // of a load run
	LateSeconds *percentiles `json:"late_seconds,omitempty"`       // how late a load run's sender was; part of RTTSeconds
	Histogram   string       `json:"histogram,omitempty"`          // of RTTSeconds in ns: HdrHistogram, V2 compressed, base64
	Intervals   []interval   `json:"intervals,omitempty"`
	Round       int          `json:"round,omitempty"` // of --count, from 0

	RDMA       string `json:"rdma,omitempty"`        // operation before each datagram
	RDMASize   int    `json:"rdma_size,omitempty"`   // its bytes, counted in BytesPerSecond
	RDMAFailed uint64 `json:"rdma_failed,omitempty"` // operations that devices which went away have cost
	Removals   uint64 `json:"removals,omitempty"`    // of devices, on both sides

	seconds float64                 // measured interval of the client
	cores   float64                 // CPUSeconds per second
	times   *hdrhistogram.Histogram // of Histogram; nil without round trips
}

// An interval is a part of a run's measured interval.
type interval struct {
	BeginSeconds      float64      `json:"begin_seconds"` // since the measured interval began
	EndSeconds        float64      `json:"end_seconds"`
	MessagesPerSecond float64      `json:"messages_per_second"`
	BytesPerSecond    float64      `json:"bytes_per_second"`
	RTTSeconds        *percentiles `json:"rtt_seconds,omitempty"`
	CPUSeconds        float64      `json:"cpu_seconds"`
	Retransmits       uint64       `json:"retransmits"`
	Drops             uint64       `json:"drops"`
	Removals          uint64       `json:"removals,omitempty"`
}

type percentiles struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`

	P90   float64 `json:"p90,omitempty"`
	P9999 float64 `json:"p9999,omitempty"`
	Min   float64 `json:"min,omitempty"`
	Mean  float64 `json:"mean,omitempty"`
	Max   float64 `json:"max,omitempty"`
	Count int64   `json:"count,omitempty"`
}

// providerOf says who carries a transport.
func providerOf(transport string) string {
	if transport == transportRDS {
		return "softroce"
	}
	return runtime.GOOS // the operating system's sockets
}

func newReport(p params, client, server string) *report {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	compare := p.Compare
	if compare == nil {
		compare = []string{}
	}
	r := &report{
		SchemaVersion: schemaVersion,
		Start: start{
			Time:     time.Now().UTC(),
			Host:     host,
			Go:       runtime.Version(),
			CPUs:     runtime.NumCPU(),
			Provider: providerOf(transportRDS),
			Parameters: reportParameters{
				Sizes: p.Sizes, Tests: p.Tests, Compare: compare, Sockets: p.Sockets, Depth: p.Depth,
				DurationSeconds: p.Duration.Seconds(), WarmupSeconds: p.Warmup.Seconds(),
				Bidir: p.Bidir, Verify: p.Verify, Dialect: p.RDS.Dialect, RoCEPort: p.RDS.Port, Seed: p.Seed,
				Client: client, Server: server,
			},
		},
		Runs: []result{},
	}
	rp := &r.Start.Parameters
	rp.Rates, rp.IntervalSeconds = p.Rates, p.Interval.Seconds()
	if p.Count > 1 {
		rp.Count = p.Count
	}
	if len(p.RDMA) > 0 {
		rp.RDMA, rp.RDMASizes, rp.ODP, rp.ODPDiscard = p.RDMA, p.RDMASizes, p.ODP, p.Discard
	}
	if p.Chaos != "" {
		rp.Chaos, rp.ChaosSeconds = p.Chaos, p.ChaosEvery.Seconds()
	}
	return r
}

// String names the run, as spec.String does.
func (r *result) String() string {
	return spec{Transport: r.Transport, Test: r.Test, Size: r.Size, RDMA: r.RDMA, RDMASize: r.RDMASize, Rate: r.Offered}.String()
}

// over says what carried a result's bytes.
func (r *result) over() string {
	if r.RDMA != "" {
		return r.Transport + " " + r.RDMA
	}
	return r.Transport
}

// moved is how many bytes each of its operations, or datagrams, was about.
func (r *result) moved() int {
	if r.RDMA != "" {
		return r.RDMASize
	}
	return r.Size
}

func (r *report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// writeTable prints a line per size and transport: throughput and round trip side by side.
func (r *report) writeTable(w io.Writer) error {
	p := r.Start.Parameters
	fmt.Fprintf(w, "rds-bench on %s: %s, %d CPUs, %s to %s, %s, %s dialect, %d socket(s)",
		r.Start.Host, r.Start.Go, r.Start.CPUs, p.Client, p.Server, r.Start.Provider, p.Dialect, p.Sockets)
	if p.Depth > 0 {
		fmt.Fprintf(w, ", depth %d", p.Depth)
	}
	if p.Bidir {
		fmt.Fprint(w, ", both directions")
	}
	fmt.Fprintln(w)

	var grid bytes.Buffer
	t := tabwriter.NewWriter(&grid, 0, 0, 2, ' ', tabwriter.AlignRight)
	head, hasLoad := r.head()
	writeRow(t, head)
	last := line{lineKey: lineKey{size: -1}}
	for _, l := range r.lines() {
		size := ""
		if l.size != last.size || l.round != last.round {
			size = formatSize(l.size)
			writeRow(t, make([]string, len(head)))
		}
		last = l
		writeRow(t, r.row(size, l, hasLoad))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for l := range strings.Lines(grid.String()) {
		fmt.Fprintln(w, strings.TrimRight(l, " \n"))
	}
	_, err := fmt.Fprint(w, "\nRates as the receiving application counts them. CPU: cores used by both processes together during\n"+
		"throughput. µs: round trip, one datagram in flight. vs tcp: messages/s.\n")
	if hasLoad {
		_, err = fmt.Fprint(w, "offered/s: due at that rate, each answered; µs counts from when it was due to its answer.\n")
	}
	if r.Clean {
		failed := uint64(0)
		for i := range r.Runs {
			failed += r.Runs[i].RDMAFailed
		}
		_, err = fmt.Fprintf(w, "\nDevices were removed and added again %s times: 0 lost, 0 duplicated, 0 leaked", groupDigits(float64(r.Removals())))
		if p.RDMA != nil {
			_, err = fmt.Fprintf(w, "; %s operations failed with them, each accounted for", groupDigits(float64(failed)))
		}
		fmt.Fprintln(w, ".")
	}
	return err
}

// Removals is how often a device went in all runs together.
func (r *report) Removals() (n uint64) {
	for i := range r.Runs {
		n += r.Runs[i].Removals
	}
	return n
}

// head is the table's heading. hasLoad: there are runs of a rate.
func (r *report) head() (head []string, hasLoad bool) {
	head = []string{"size", "over"}
	if hasLoad = slices.ContainsFunc(r.Runs, func(r result) bool { return r.Test == testLoad }); hasLoad {
		head = append(head, "offered/s")
	}
	head = append(head, "messages/s", "GB/s", "vs tcp", "p50 µs", "p99 µs", "p99.9 µs", "CPU", "resent", "drops")
	if r.Start.Parameters.Verify {
		head = append(head, "verified")
	}
	return head, hasLoad
}

// writeRow writes the cells of a tabwriter that aligns right; its errors come out of Flush.
func writeRow(w io.Writer, cells []string) {
	fmt.Fprintln(w, strings.Join(cells, "\t")+"\t")
}

// A line is what the table shows of one size over one transport, or of one rate offered to it.
type line struct {
	lineKey
	throughput, rtt *result // both are the run of a rate
	tcp             *result // throughput of the baseline
}

type lineKey struct {
	round int
	size  int
	over  string
	rate  float64
}

// lines groups runs in the order they were measured.
func (r *report) lines() []line {
	var out []line
	find := func(k lineKey) *line {
		for i := range out {
			if out[i].lineKey == k {
				return &out[i]
			}
		}
		return nil
	}
	for i := range r.Runs {
		run := &r.Runs[i]
		k := lineKey{run.Round, run.moved(), run.over(), run.Offered}
		l := find(k)
		if l == nil {
			out = append(out, line{lineKey: k})
			l = &out[len(out)-1]
		}
		if run.Test != testThroughput {
			l.rtt = run
		}
		if run.Test != testRTT {
			l.throughput = run
		}
	}
	for i := range out {
		k := out[i].lineKey
		k.over = transportTCP
		if base := find(k); base != nil && k.rate == 0 {
			out[i].tcp = base.throughput
		}
	}
	return out
}

// row is a line's cells.
func (r *report) row(size string, l line, hasLoad bool) []string {
	const none = "-"
	row := []string{size, l.over}
	if hasLoad {
		offered := none
		if l.rate > 0 {
			offered = groupDigits(l.rate)
		}
		row = append(row, offered)
	}
	cores, resent, drops := none, uint64(0), uint64(0)
	if t := l.throughput; t != nil {
		ratio := none
		if l.tcp != nil && l.tcp != t && l.tcp.MessagesPerSecond > 0 {
			ratio = fmt.Sprintf("%.2fx", t.MessagesPerSecond/l.tcp.MessagesPerSecond)
		}
		row = append(row, groupDigits(t.MessagesPerSecond), fmt.Sprintf("%.3f", t.BytesPerSecond/1e9), ratio)
		cores = fmt.Sprintf("%.2f", t.cores)
		resent, drops = resent+t.Retransmits, drops+t.Drops
	} else {
		row = append(row, none, none, none)
	}
	if t := l.rtt; t != nil && t != l.throughput {
		resent, drops = resent+t.Retransmits, drops+t.Drops
	}
	if l.rtt != nil && l.rtt.RTTSeconds != nil {
		for _, s := range []float64{l.rtt.RTTSeconds.P50, l.rtt.RTTSeconds.P99, l.rtt.RTTSeconds.P999} {
			row = append(row, fmt.Sprintf("%.1f", s*1e6))
		}
	} else {
		row = append(row, none, none, none)
	}
	row = append(row, cores, strconv.FormatUint(resent, 10), strconv.FormatUint(drops, 10))
	if r.Start.Parameters.Verify {
		ok := (l.throughput == nil || l.throughput.Verified) && (l.rtt == nil || l.rtt.Verified)
		row = append(row, map[bool]string{true: "yes", false: "NO"}[ok])
	}
	return row
}

// groupDigits formats a count with a comma between thousands.
func groupDigits(v float64) string {
	s := strconv.FormatInt(int64(v+0.5), 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
