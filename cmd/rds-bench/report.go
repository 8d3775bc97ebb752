package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// schemaVersion changes when a field changes its meaning or goes away.
const schemaVersion = 1

// A report is what a measurement found: the object that --json prints. Numbers are in base units.
type report struct {
	SchemaVersion int      `json:"schema_version"`
	Start         start    `json:"start"`
	Runs          []result `json:"runs"`

	// Clean says of a measurement with removals of devices that nothing was lost, nothing repeated, and nothing left behind by
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
	Sizes           []int    `json:"sizes"`
	Tests           []string `json:"tests"`
	Compare         []string `json:"compare"`
	Sockets         int      `json:"sockets"`
	Depth           int      `json:"depth"`
	DurationSeconds float64  `json:"duration_seconds"`
	WarmupSeconds   float64  `json:"warmup_seconds"`
	Bidir           bool     `json:"bidir"`
	Verify          bool     `json:"verify"`
	Dialect         string   `json:"dialect"`
	RoCEPort        uint16   `json:"roce_port"`
	Seed            uint64   `json:"seed"`
	RDMA            []string `json:"rdma,omitempty"`
	RDMASizes       []int    `json:"rdma_sizes,omitempty"`
	ODP             bool     `json:"odp,omitempty"`
	ODPDiscard      bool     `json:"odp_discard,omitempty"`
	Chaos           string   `json:"chaos,omitempty"`
	ChaosSeconds    float64  `json:"chaos_every_seconds,omitempty"`
	Client          string   `json:"client"` // addresses
	Server          string   `json:"server"`
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

	RDMA       string `json:"rdma,omitempty"`        // operation before each datagram
	RDMASize   int    `json:"rdma_size,omitempty"`   // its bytes, counted in BytesPerSecond
	RDMAFailed uint64 `json:"rdma_failed,omitempty"` // operations that devices which went away have cost
	Removals   uint64 `json:"removals,omitempty"`    // of devices, on both sides

	cores float64 // CPUSeconds per second
}

type percentiles struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`
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
	if len(p.RDMA) > 0 {
		rp.RDMA, rp.RDMASizes, rp.ODP, rp.ODPDiscard = p.RDMA, p.RDMASizes, p.ODP, p.Discard
	}
	if p.Chaos != "" {
		rp.Chaos, rp.ChaosSeconds = p.Chaos, p.ChaosEvery.Seconds()
	}
	return r
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
	head := []string{"size", "over", "messages/s", "GB/s", "vs tcp", "p50 µs", "p99 µs", "p99.9 µs", "CPU", "resent", "drops"}
	if p.Verify {
		head = append(head, "verified")
	}
	writeRow(t, head)
	lastSize := -1
	for _, l := range r.lines() {
		size := ""
		if l.size != lastSize {
			size = formatSize(l.size)
			writeRow(t, make([]string, len(head)))
		}
		lastSize = l.size
		writeRow(t, r.row(size, l))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for l := range strings.Lines(grid.String()) {
		fmt.Fprintln(w, strings.TrimRight(l, " \n"))
	}
	_, err := fmt.Fprint(w, "\nRates as the receiving application counts them. CPU: cores used by both processes together during\n"+
		"throughput. µs: round trip, one datagram in flight. vs tcp: messages/s.\n")
	if r.Clean {
		removals, failed := uint64(0), uint64(0)
		for i := range r.Runs {
			removals += r.Runs[i].Removals
			failed += r.Runs[i].RDMAFailed
		}
		_, err = fmt.Fprintf(w, "\nDevices were removed and added again %s times: 0 lost, 0 duplicated, 0 leaked", groupDigits(float64(removals)))
		if p.RDMA != nil {
			_, err = fmt.Fprintf(w, "; %s operations failed with them, each accounted for", groupDigits(float64(failed)))
		}
		fmt.Fprintln(w, ".")
	}
	return err
}

// writeRow writes the cells of a tabwriter that aligns right; its errors come out of Flush.
func writeRow(w io.Writer, cells []string) {
	fmt.Fprintln(w, strings.Join(cells, "\t")+"\t")
}

// A line is what the table shows of one size over one transport.
type line struct {
	size            int
	transport       string
	throughput, rtt *result
	tcp             *result // throughput of the baseline
}

// lines groups runs by size and transport in the order they were measured.
func (r *report) lines() []line {
	var out []line
	find := func(size int, transport string) *line {
		for i := range out {
			if out[i].size == size && out[i].transport == transport {
				return &out[i]
			}
		}
		return nil
	}
	for i := range r.Runs {
		run := &r.Runs[i]
		l := find(run.moved(), run.over())
		if l == nil {
			out = append(out, line{size: run.moved(), transport: run.over()})
			l = &out[len(out)-1]
		}
		if run.Test == testRTT {
			l.rtt = run
		} else {
			l.throughput = run
		}
	}
	for i := range out {
		if base := find(out[i].size, transportTCP); base != nil {
			out[i].tcp = base.throughput
		}
	}
	return out
}

// row is a line's cells.
func (r *report) row(size string, l line) []string {
	const none = "-"
	row := []string{size, l.transport}
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
	if t := l.rtt; t != nil {
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
