package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite golden files")

func testReport() *report {
	p := defaultParams()
	p.Sizes, p.Verify = []int{64, 1 << 20}, true
	r := newReport(p, "10.0.0.1", "10.0.0.2")
	r.Start.Time = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.Start.Host, r.Start.Go, r.Start.CPUs = "host", "go1.26", 2
	r.Runs = []result{
		{Transport: "rds", Provider: "softroce", Test: "throughput", Size: 64, MessagesPerSecond: 2.5e6, BytesPerSecond: 1.6e8, CPUSeconds: 1.9, Retransmits: 3, Drops: 1, Verified: true, cores: 1.9},
		{Transport: "tcp", Provider: "linux", Test: "throughput", Size: 64, MessagesPerSecond: 2.5e5, BytesPerSecond: 1.6e7, CPUSeconds: 1.5, Verified: true, cores: 1.5},
		{Transport: "rds", Provider: "softroce", Test: "rtt", Size: 64, MessagesPerSecond: 1e5, BytesPerSecond: 6.4e6, RTTSeconds: &percentiles{P50: 1e-5, P99: 2e-5, P999: 3.25e-5}, CPUSeconds: 1, Retransmits: 2, Verified: true, cores: 1},
		{Transport: "rds", Provider: "softroce", Test: "throughput", Size: 1 << 20, MessagesPerSecond: 2000, BytesPerSecond: 2000 << 20, CPUSeconds: 1.9, cores: 1.9},
	}
	return r
}

// golden compares got with a file, or writes it with -update.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", path, d)
	}
}

func TestWriteTable(t *testing.T) {
	var b bytes.Buffer
	if err := testReport().writeTable(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "table.txt", b.Bytes())
}

func TestWriteJSON(t *testing.T) {
	var b bytes.Buffer
	if err := testReport().writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.json", b.Bytes())
}

// checkSchema looks at a report as somebody who has only the description of the format.
func checkSchema(t *testing.T, b []byte, runs int) {
	t.Helper()
	var r struct {
		SchemaVersion int `json:"schema_version"`
		Start         struct {
			Time       time.Time
			Host, Go   string
			CPUs       int
			Provider   string
			Parameters map[string]any
		}
		Runs []map[string]any
	}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%v in:\n%s", err, b)
	}
	if r.SchemaVersion != 1 || r.Start.Time.IsZero() || r.Start.Host == "" || r.Start.Go == "" || r.Start.CPUs == 0 || r.Start.Provider != "softroce" || r.Start.Parameters["sockets"] == nil {
		t.Errorf("start of the report: %+v", r)
	}
	if len(r.Runs) != runs {
		t.Errorf("%d runs, want %d", len(r.Runs), runs)
	}
	moved := 0.0 // in a short run on a busy machine nothing may arrive; in all of them something does
	for i, run := range r.Runs {
		if v, ok := run["messages_per_second"].(float64); ok {
			moved += v
		}
		for _, k := range []string{"messages_per_second", "bytes_per_second", "cpu_seconds", "size"} {
			if v, ok := run[k].(float64); !ok || v < 0 {
				t.Errorf("run %d: %s is %v", i, k, run[k])
			}
		}
		for _, k := range []string{"retransmits", "drops"} {
			if v, ok := run[k].(float64); !ok || v < 0 {
				t.Errorf("run %d: %s is %v", i, k, run[k])
			}
		}
		for _, k := range []string{"transport", "provider", "test"} {
			if v, ok := run[k].(string); !ok || v == "" {
				t.Errorf("run %d: %s is %v", i, k, run[k])
			}
		}
		if _, ok := run["verified"].(bool); !ok {
			t.Errorf("run %d: verified is %v", i, run["verified"])
		}
		rtt, ok := run["rtt_seconds"].(map[string]any)
		if !ok && run["messages_per_second"] == 0.0 {
			continue
		}
		for _, k := range []string{"p50", "p99", "p999"} {
			if v, ok := rtt[k].(float64); run["test"] == "rtt" && (!ok || v <= 0 || v > 60) {
				t.Errorf("run %d: %s is %v", i, k, rtt[k])
			}
		}
	}
	if moved == 0 {
		t.Error("nothing was received in any run")
	}
}
