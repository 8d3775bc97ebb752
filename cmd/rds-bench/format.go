package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/perf/benchfmt"
)

// Formats of --format.
const (
	formatText    = "text"
	formatJSON    = "json"
	formatNDJSON  = "ndjson"
	formatCSV     = "csv"
	formatGoBench = "gobench"
)

var formats = []string{formatText, formatJSON, formatNDJSON, formatCSV, formatGoBench}

// A reporter hears what a measurement finds as it finds it, and writes it in its format then or at the end.
type reporter interface {
	begin(r *report) error
	// interval is a part of the run that r says something about; only what says which run that is counts.
	interval(r *result, iv *interval) error
	run(r *result) error
	// end has all of it. It is called after errors too.
	end(r *report) error
}

// newReporter is the one of a format that writes to w. Text has intervals and histograms only if somebody wants to see them.
func newReporter(format string, w io.Writer, intervals, histograms bool) reporter {
	switch format {
	case formatJSON:
		return jsonReporter{w: w}
	case formatNDJSON:
		return &ndjsonReporter{enc: json.NewEncoder(w)}
	case formatCSV:
		return &csvReporter{w: csv.NewWriter(w)}
	case formatGoBench:
		return &goBenchReporter{w: benchfmt.NewWriter(w)}
	}
	return &textReporter{w: w, intervals: intervals, histograms: histograms}
}

// noReporter is for those who do not listen, and the base of those who listen to some.
type noReporter struct{}

func (noReporter) begin(*report) error               { return nil }
func (noReporter) interval(*result, *interval) error { return nil }
func (noReporter) run(*result) error                 { return nil }
func (noReporter) end(*report) error                 { return nil }

// textReporter prints intervals as they end, and the table.
type textReporter struct {
	noReporter
	w                     io.Writer
	intervals, histograms bool
	what                  string // the run of the last interval
}

func (t *textReporter) interval(r *result, iv *interval) error {
	if !t.intervals {
		return nil
	}
	if what := r.String(); what != t.what {
		t.what = what
		fmt.Fprintln(t.w, what)
	}
	_, err := fmt.Fprintf(t.w, "  %7.2f-%-7.2f s  %14s messages/s  %7.3f GB/s", iv.BeginSeconds, iv.EndSeconds, groupDigits(iv.MessagesPerSecond), iv.BytesPerSecond/1e9)
	if p := iv.RTTSeconds; p != nil {
		_, err = fmt.Fprintf(t.w, "  p50 %.1f µs  p99 %.1f µs  max %.1f µs", p.P50*1e6, p.P99*1e6, p.Max*1e6)
	}
	if iv.Retransmits+iv.Drops > 0 {
		_, err = fmt.Fprintf(t.w, "  %d resent, %d dropped", iv.Retransmits, iv.Drops)
	}
	if iv.Removals > 0 {
		_, err = fmt.Fprintf(t.w, "  %d devices removed", iv.Removals)
	}
	if err == nil {
		_, err = fmt.Fprintln(t.w)
	}
	return err
}

func (t *textReporter) end(r *report) error {
	if t.what != "" {
		fmt.Fprintln(t.w)
	}
	if len(r.Runs) == 0 {
		return nil // nothing for a table
	}
	if err := r.writeTable(t.w); err != nil || !t.histograms {
		return err
	}
	for i := range r.Runs {
		run := &r.Runs[i]
		if run.times == nil {
			continue
		}
		if _, err := fmt.Fprintf(t.w, "\n%s, µs\n", run); err != nil {
			return err
		}
		if _, err := run.times.PercentilesPrint(t.w, 5, 1e3); err != nil {
			return err
		}
	}
	return nil
}

// jsonReporter writes one object at the end.
type jsonReporter struct {
	noReporter
	w io.Writer
}

func (j jsonReporter) end(r *report) error { return r.writeJSON(j.w) }

// ndjsonReporter writes an object per line: start, intervals and runs as they end, and end.
type ndjsonReporter struct{ enc *json.Encoder }

// runName says in an interval of NDJSON which run it is of.
type runName struct {
	Transport string  `json:"transport"`
	Test      string  `json:"test"`
	Size      int     `json:"size"`
	Offered   float64 `json:"offered_per_second,omitempty"`
	RDMA      string  `json:"rdma,omitempty"`
	RDMASize  int     `json:"rdma_size,omitempty"`
	Round     int     `json:"round,omitempty"`
}

func (n *ndjsonReporter) begin(r *report) error {
	return n.enc.Encode(struct {
		Type          string `json:"type"`
		SchemaVersion int    `json:"schema_version"`
		start
	}{"start", r.SchemaVersion, r.Start})
}

func (n *ndjsonReporter) interval(r *result, iv *interval) error {
	return n.enc.Encode(struct {
		Type string `json:"type"`
		runName
		*interval
	}{"interval", runName{r.Transport, r.Test, r.Size, r.Offered, r.RDMA, r.RDMASize, r.Round}, iv})
}

func (n *ndjsonReporter) run(r *result) error {
	c := *r
	c.Intervals = nil // they had lines of their own
	return n.enc.Encode(struct {
		Type string `json:"type"`
		result
	}{"run", c})
}

func (n *ndjsonReporter) end(r *report) error {
	return n.enc.Encode(struct {
		Type  string `json:"type"`
		Runs  int    `json:"runs"`
		Clean bool   `json:"clean,omitempty"`
	}{"end", len(r.Runs), r.Clean})
}

// csvReporter writes a record per interval and per run, as they end.
type csvReporter struct {
	noReporter
	w *csv.Writer
}

var csvHead = []string{"kind", "transport", "test", "size", "rdma", "rdma_size", "round", "offered_per_second", "begin_seconds", "end_seconds",
	"messages_per_second", "bytes_per_second", "p50_seconds", "p90_seconds", "p99_seconds", "p999_seconds", "p9999_seconds", "max_seconds",
	"cpu_seconds", "retransmits", "drops", "removals", "verified"}

func (c *csvReporter) begin(*report) error { return c.write(csvHead) }

func (c *csvReporter) interval(r *result, iv *interval) error { return c.record("interval", r, iv, "") }

func (c *csvReporter) run(r *result) error {
	return c.record("run", r, &interval{
		MessagesPerSecond: r.MessagesPerSecond, BytesPerSecond: r.BytesPerSecond, RTTSeconds: r.RTTSeconds,
		CPUSeconds: r.CPUSeconds, Retransmits: r.Retransmits, Drops: r.Drops, Removals: r.Removals, EndSeconds: r.seconds,
	}, strconv.FormatBool(r.Verified))
}

func (c *csvReporter) record(kind string, r *result, iv *interval, verified string) error {
	num := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	count := func(v uint64) string { return strconv.FormatUint(v, 10) }
	rec := []string{kind, r.Transport, r.Test, strconv.Itoa(r.Size), r.RDMA, strconv.Itoa(r.RDMASize), strconv.Itoa(r.Round), num(r.Offered),
		num(iv.BeginSeconds), num(iv.EndSeconds), num(iv.MessagesPerSecond), num(iv.BytesPerSecond)}
	times := make([]string, 6)
	if p := iv.RTTSeconds; p != nil {
		for i, v := range []float64{p.P50, p.P90, p.P99, p.P999, p.P9999, p.Max} {
			times[i] = num(v)
		}
	}
	rec = append(rec, times...)
	return c.write(append(rec, num(iv.CPUSeconds), count(iv.Retransmits), count(iv.Drops), count(iv.Removals), verified))
}

func (c *csvReporter) write(rec []string) error {
	if err := c.w.Write(rec); err != nil {
		return err
	}
	c.w.Flush() // somebody may be watching
	return c.w.Error()
}

// goBenchReporter writes what benchstat reads: a line per run. With --count there are several of the same name, and
// benchstat says what to make of their differences.
type goBenchReporter struct {
	noReporter
	w      *benchfmt.Writer
	config []benchfmt.Config
}

func (g *goBenchReporter) begin(r *report) error {
	p := &r.Start.Parameters
	for _, c := range [][2]string{
		{"goos", runtime.GOOS}, {"goarch", runtime.GOARCH}, {"pkg", "github.com/openrds/openrds/cmd/rds-bench"},
		{"host", r.Start.Host}, {"dialect", p.Dialect},
	} {
		g.config = append(g.config, benchfmt.Config{Key: c[0], Value: []byte(strings.Join(strings.Fields(c[1]), "_")), File: true})
	}
	return nil
}

func (g *goBenchReporter) run(r *result) error {
	if r.MessagesPerSecond == 0 {
		return nil // no time per operation
	}
	name := map[string]string{testThroughput: "Throughput", testRTT: "RTT", testLoad: "Load"}[r.Test] +
		"/size=" + strings.ReplaceAll(formatSize(r.moved()), " ", "") + "/over=" + strings.ReplaceAll(r.over(), " ", "-")
	if r.Offered > 0 {
		name += "/rate=" + formatRate(r.Offered)
	}
	var vs []benchfmt.Value
	add := func(v float64, unit string) { vs = append(vs, benchfmt.Value{Value: v, Unit: unit}) }
	if t := r.RTTSeconds; t != nil {
		add(math.Round(t.Mean*1e9), "ns/op")
		add(math.Round(t.P50*1e9), "p50-ns")
		add(math.Round(t.P99*1e9), "p99-ns")
		add(math.Round(t.P999*1e9), "p99.9-ns")
	} else {
		add(1e9/r.MessagesPerSecond, "ns/op")
	}
	add(r.MessagesPerSecond, "msgs/s")
	add(r.BytesPerSecond/1e6, "MB/s")
	add(r.CPUSeconds*1e9/float64(max(1, r.Messages)), "cpu-ns/op")
	return g.w.Write(&benchfmt.Result{
		Config: g.config, Name: benchfmt.Name(fmt.Sprintf("%s-%d", name, runtime.GOMAXPROCS(0))),
		Iters: int(max(1, r.Messages)), Values: vs,
	})
}
