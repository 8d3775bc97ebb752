package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/perf/benchfmt"

	"github.com/openrds/openrds/rds/rdsdebug"
)

// fullReport has everything that a report may have.
func fullReport() *report {
	rep := testReport()
	h := newHistogram()
	for i := range 1000 {
		_ = h.RecordValue(int64(10000 + 10*i))
	}
	part := &percentiles{P50: 1e-5, P90: 1.5e-5, P99: 2e-5, P999: 3e-5, P9999: 4e-5, Min: 5e-6, Mean: 1e-5, Max: 5e-5, Count: 100}
	rep.Runs = append(rep.Runs,
		result{Transport: "rds", Provider: "softroce", Test: testLoad, Size: 64, Offered: 1e4, MessagesPerSecond: 9999, BytesPerSecond: 9999 * 64, CPUSeconds: 0.5, Messages: 9999, LateSeconds: part, seconds: 1},
		result{Transport: "rds", Provider: "softroce", Test: testLoad, Size: 64, Offered: 1e5, MessagesPerSecond: 99999, BytesPerSecond: 99999 * 64, CPUSeconds: 0.5, Messages: 99999, LateSeconds: part, seconds: 1},
		result{Transport: "rds", Provider: "softroce", Test: testThroughput, Size: 64, RDMA: rdmaWrite, RDMASize: 1 << 20, MessagesPerSecond: 1000, BytesPerSecond: 1000 * (1<<20 + 64), Messages: 1000, Removals: 3, RDMAFailed: 7, seconds: 1},
	)
	for i := range rep.Runs {
		r := &rep.Runs[i]
		if r.Test != testThroughput {
			r.setRoundTrips(h)
		}
		r.Intervals = []interval{
			{EndSeconds: 0.5, MessagesPerSecond: r.MessagesPerSecond * 0.9, BytesPerSecond: r.BytesPerSecond * 0.9, CPUSeconds: 0.5},
			{BeginSeconds: 0.5, EndSeconds: 1, MessagesPerSecond: r.MessagesPerSecond * 1.1, BytesPerSecond: r.BytesPerSecond * 1.1, CPUSeconds: 0.5, Retransmits: 1, Removals: 1},
		}
		if r.Test != testThroughput {
			r.Intervals[0].RTTSeconds, r.Intervals[1].RTTSeconds = part, part
		}
	}
	return rep
}

// render tells a reporter what a measurement of rep would.
func render(t *testing.T, format string, rep *report) []byte {
	t.Helper()
	var b bytes.Buffer
	r := newReporter(format, &b, true, true)
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(r.begin(rep))
	for i := range rep.Runs {
		for j := range rep.Runs[i].Intervals {
			check(r.interval(&rep.Runs[i], &rep.Runs[i].Intervals[j]))
		}
		check(r.run(&rep.Runs[i]))
	}
	check(r.end(rep))
	return b.Bytes()
}

func TestFormatText(t *testing.T) {
	out := string(render(t, formatText, fullReport()))
	for _, want := range []string{
		"rds 64 B throughput\n", "0.50-1.00    s       2,750,000 messages/s    0.176 GB/s  1 resent, 0 dropped  1 devices removed\n",
		"rds 64 B load 10k/s\n", "p50 10.0 µs  p99 20.0 µs  max 50.0 µs", "offered/s", "10,000", "rds write", "due at that rate",
		"rds 64 B rtt, µs", "Percentile",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output does not have %q:\n%s", want, out)
		}
	}
	var quiet bytes.Buffer
	r := newReporter(formatText, &quiet, false, false)
	rep := fullReport()
	if err := r.interval(&rep.Runs[0], &rep.Runs[0].Intervals[0]); err != nil || quiet.Len() > 0 {
		t.Errorf("intervals that nobody asked for: %v, %q", err, quiet.String())
	}
	if err := r.end(rep); err != nil || strings.Contains(quiet.String(), "Percentile") {
		t.Errorf("histograms that nobody asked for: %v", err)
	}
}

func TestFormatJSON(t *testing.T) {
	var rep report
	if err := json.Unmarshal(render(t, formatJSON, fullReport()), &rep); err != nil {
		t.Fatal(err)
	}
	for i := range rep.Runs {
		r := &rep.Runs[i]
		if len(r.Intervals) != 2 {
			t.Errorf("%v: %d intervals", r, len(r.Intervals))
		}
		if r.Test == testThroughput {
			continue
		}
		h, err := hdrhistogram.Decode([]byte(r.Histogram))
		if err != nil {
			t.Fatalf("%v: %v", r, err)
		}
		if got := time.Duration(h.ValueAtPercentile(99)).Seconds(); h.TotalCount() != 1000 || got != r.RTTSeconds.P99 {
			t.Errorf("%v: a histogram of %d values, p99 %v, want %v", r, h.TotalCount(), got, r.RTTSeconds.P99)
		}
	}
}

func TestFormatNDJSON(t *testing.T) {
	rep := fullReport()
	var types []string
	d := json.NewDecoder(bytes.NewReader(render(t, formatNDJSON, rep)))
	for {
		var line struct {
			Type          string
			SchemaVersion int `json:"schema_version"`
			Transport     string
			Test          string
			Begin         *float64 `json:"begin_seconds"`
			Rate          float64  `json:"messages_per_second"`
			Runs          int
		}
		if err := d.Decode(&line); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		types = append(types, line.Type)
		switch line.Type {
		case "start":
			if line.SchemaVersion != schemaVersion {
				t.Errorf("schema %d", line.SchemaVersion)
			}
		case "interval", "run":
			if line.Transport == "" || line.Test == "" || line.Rate <= 0 || (line.Begin != nil) != (line.Type == "interval") {
				t.Errorf("%+v", line)
			}
		case "end":
			if line.Runs != len(rep.Runs) {
				t.Errorf("%d runs", line.Runs)
			}
		}
	}
	if got, want := strings.Join(types, " "), "start "+strings.Repeat("interval interval run ", len(rep.Runs))+"end"; got != want {
		t.Errorf("lines are %s, want %s", got, want)
	}
}

func TestFormatCSV(t *testing.T) {
	rep := fullReport()
	recs, err := csv.NewReader(bytes.NewReader(render(t, formatCSV, rep))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(recs) != 1+3*len(rep.Runs) {
		t.Fatalf("%d records", len(recs))
	}
	col := make(map[string]int)
	for i, name := range recs[0] {
		col[name] = i
	}
	last := recs[len(recs)-1]
	for name, want := range map[string]string{
		"kind": "run", "transport": "rds", "test": "throughput", "size": "64", "rdma": "write", "rdma_size": "1048576",
		"end_seconds": "1", "messages_per_second": "1000", "p50_seconds": "", "removals": "3", "verified": "false",
	} {
		if got := last[col[name]]; got != want {
			t.Errorf("%s of the last record is %q, want %q", name, got, want)
		}
	}
	if iv := recs[1]; iv[col["kind"]] != "interval" || iv[col["end_seconds"]] != "0.5" || iv[col["verified"]] != "" {
		t.Errorf("the first record is %q", iv)
	}
}

// benchstat reads it: the names say what was varied, the units are known.
func TestFormatGoBench(t *testing.T) {
	r := benchfmt.NewReader(bytes.NewReader(render(t, formatGoBench, fullReport())), "test")
	seen := make(map[string]*benchfmt.Result)
	for r.Scan() {
		res, ok := r.Result().(*benchfmt.Result)
		if !ok {
			t.Fatalf("%v", r.Result())
		}
		name, _, _ := strings.Cut(string(res.Name), "-")
		seen[name] = res.Clone()
	}
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	for name, values := range map[string]map[string]float64{
		"Throughput/size=64B/over=rds":    {"sec/op": 4e-7, "msgs/s": 2.5e6, "B/s": 1.6e8},
		"Throughput/size=64B/over=tcp":    {"sec/op": 4e-6},
		"RTT/size=64B/over=rds":           {"msgs/s": 1e5},
		"Load/size=64B/over=rds/rate=10k": {"msgs/s": 9999},
		"Throughput/size=1MiB/over=rds":   {"msgs/s": 1000}, // of RDMA: cut at the hyphen
	} {
		res := seen[name]
		if res == nil {
			t.Errorf("no %s; there are %d", name, len(seen))
			continue
		}
		for unit, want := range values {
			if got, ok := res.Value(unit); !ok || got < want*0.999 || got > want*1.001 {
				t.Errorf("%s: %v %s, want %v", name, got, unit, want)
			}
		}
		if res.GetConfig("goos") == "" || res.GetConfig("pkg") == "" {
			t.Errorf("%s without configuration", name)
		}
	}
	for _, unit := range []string{"p50-sec", "p99-sec", "p99.9-sec", "cpu-sec/op"} {
		if v, ok := seen["Load/size=64B/over=rds/rate=10k"].Value(unit); !ok || v <= 0 {
			t.Errorf("%s is %v; there are %v", unit, v, seen["Load/size=64B/over=rds/rate=10k"].Values)
		}
	}
}

// The page stands alone: no script, nothing fetched, every plot an element that is well formed.
func TestHTML(t *testing.T) {
	rep := fullReport()
	rep.Start.Host = `<script>alert("&")</script>`
	path := filepath.Join(t.TempDir(), "report.html")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(rep.writeHTML(f), f.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, bad := range []string{"<script", "src=", "href=\"http", "@import", "url(", "NaN", "Inf"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	for _, want := range []string{"Throughput over time", "Latency by percentile", "Latency under load", "Beside the baselines", "99.9%", "rds write", "2,500,000"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	plots := 0
	for rest := page; ; plots++ {
		i := strings.Index(rest, "<svg")
		if i < 0 {
			break
		}
		j := strings.Index(rest[i:], "</svg>")
		if j < 0 {
			t.Fatal("an svg without an end")
		}
		svg := rest[i : i+j+len("</svg>")]
		rest = rest[i+j:]
		for d := xml.NewDecoder(strings.NewReader(svg)); ; {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("plot %d: %v", plots, err)
			}
		}
	}
	// Over time: 64 B and 1 MiB, load at two rates, 1 MiB of the operations among them; percentiles: rtt, two rates; one
	// of load; beside tcp, and operations beside datagrams.
	if plots != 4+3+1+2 {
		t.Errorf("%d plots", plots)
	}
}

// Reports of little, or of odd values, are reports too.
func TestHTMLOfLittle(t *testing.T) {
	one := testReport()
	h := newHistogram()
	_ = h.RecordValue(1)
	one.Runs = one.Runs[2:3]
	one.Runs[0].setRoundTrips(h)
	one.Runs[0].Intervals = []interval{{EndSeconds: 1}}
	idle := testReport()
	for i := range idle.Runs {
		idle.Runs[i].MessagesPerSecond, idle.Runs[i].RTTSeconds = 0, nil
		idle.Runs[i].Intervals = []interval{{EndSeconds: 1}}
	}
	none := testReport()
	none.Runs = nil
	for name, rep := range map[string]*report{"one round trip": one, "nothing received": idle, "no runs": none} {
		if page, err := rep.html(); err != nil || !bytes.Contains(page, []byte("</html>")) {
			t.Errorf("%s: %v", name, err)
		} else if bytes.Contains(page, []byte("NaN")) {
			t.Errorf("%s: NaN in the page", name)
		}
	}
}

func TestCommandFormats(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "report.html")
	stdout, stderr, code := runCommand(t, append(quick, "--addr", ownLoopback(25)+","+ownLoopback(26), "--sizes", "64", "--rate", "2k", "--tests", "throughput,load",
		"--compare", "quic", "--count", "2", "--format", "gobench", "--report", path)...)
	if code != 0 || stderr != "" {
		t.Fatalf("exit status %d, standard error:\n%s", code, stderr)
	}
	if n := strings.Count(stdout, "\nBenchmark"); n != 2*2*2 || !strings.Contains(stdout, "\nBenchmarkLoad/size=64B/over=quic/rate=2k-") {
		t.Errorf("%d lines:\n%s", n, stdout)
	}
	if page, err := os.ReadFile(path); err != nil || !bytes.Contains(page, []byte("round 2")) {
		t.Errorf("the report: %v", err)
	}
}

// rdsctl sees every process that measures; where there is no place for the socket, that is nobody's trouble.
func TestDebugSocket(t *testing.T) {
	for _, tc := range []struct {
		name, dir string
		want      int
	}{{"a place", t.TempDir(), 1}, {"no place", "/proc/nowhere", 0}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv(rdsdebug.RuntimeDirVar, tc.dir)
			tr, err := newTransport(transportRDS, defaultParams().RDS)
			if err != nil {
				t.Fatal(err)
			}
			found, _ := rdsdebug.Discover(tc.dir)
			if len(found) != tc.want {
				t.Errorf("rdsctl finds %q", found)
			}
			if err := tr.close(); err != nil {
				t.Error(err)
			}
			if found, _ := rdsdebug.Discover(tc.dir); len(found) != 0 {
				t.Errorf("after closing rdsctl finds %q", found)
			}
		})
	}
}
