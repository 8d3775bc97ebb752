package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParseThreshold(t *testing.T) {
	for text, want := range map[string]threshold{
		"p99>50us":                    {metric: "p99", op: ">", value: 50e-6},
		" p99.9 >= 1.5ms ":            {metric: "p99.9", op: ">=", value: 1.5e-3},
		"rate<1.5M":                   {metric: "rate", op: "<", value: 1.5e6},
		"bytes<=2GB/s":                {metric: "bytes", op: "<=", value: 2e9},
		"bytes < 1 MiB":               {metric: "bytes", op: "<", value: 1 << 20},
		"vs-tcp<2x":                   {metric: "vs-tcp", op: "<", value: 2},
		"drops!=0":                    {metric: "drops", op: "!=", value: 0},
		"4KiB/rtt: mean > 10µs":       {selector: []string{"4KiB", "rtt"}, metric: "mean", op: ">", value: 10e-6},
		"rds  write/1MiB:bytes < 1GB": {selector: []string{"rds write", "1MiB"}, metric: "bytes", op: "<", value: 1e9},
	} {
		got, err := parseThreshold(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got.metric != want.metric || got.op != want.op || got.value != want.value || !slices.Equal(got.selector, want.selector) {
			t.Errorf("%q is %+v, want %+v", text, got, want)
		}
	}
	for text, want := range map[string]string{
		"": "no comparison", "p99": "no comparison", "p99>50": "no time", "p99>fast": "no time", "p98>1us": "no metric",
		"rate>": "no number", "rate=5": "no comparison", "rate!5": "no comparison", "bytes<-1": "no number of bytes",
		"bytes<NaN": "no number of bytes", "rate<NaN": "no number", "vs-sctp<1": "no metric", ":p99>1us": "an empty word", "vs->1": "no metric",
	} {
		if got, err := parseThreshold(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %+v, %v; want an error with %q", text, got, err, want)
		}
	}
}

func FuzzParseThreshold(f *testing.F) {
	for _, s := range []string{"p99>50us", "4KiB/rtt: p50 >= 20us", "bytes<1GB/s", "vs-tcp!=1x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := parseThreshold(s)
		if err != nil {
			return
		}
		if !(c.value >= 0) && latencyMetrics[c.metric] == nil {
			t.Fatalf("%q compares with %v", s, c.value)
		}
		c.violations(testReport())
		c.watches(defaultParams().runs())
	})
}

func TestThresholdViolations(t *testing.T) {
	rep := testReport() // rds 64 B 2.5M/s, rtt 10, 20, 32.5 us; tcp 64 B 250k/s; rds 1 MiB 2000/s
	for text, want := range map[string][]string{
		"p99>15us":                   {"rds 64 B rtt: p99 is 20µs"},
		"p99>20us":                   nil,
		"p50>=10us":                  {"rds 64 B rtt: p50 is 10µs"},
		"rate<1M":                    {"rds 1 MiB throughput: rate is 2000"}, // RTT runs have a rate, too
		"throughput:rate>0":          {"rds 64 B throughput: rate is 2.5e+06", "rds 1 MiB throughput: rate is 2000"},
		"tcp:rate<1M":                {"tcp 64 B throughput: rate is 250000"},
		"64/throughput: bytes < 1GB": {"rds 64 B throughput: bytes is 0.16 GB/s"},
		"vs-tcp<11":                  {"rds 64 B throughput: vs-tcp is 10"},
		"vs-tcp<10":                  nil,
		"1024KiB: cpu > 1":           {"rds 1 MiB throughput: cpu is 1.9"},
		"resent != 0":                {"rds 64 B throughput: resent is 3", "rds 64 B rtt: resent is 2"},
	} {
		c, err := parseThreshold(text)
		if err != nil {
			t.Fatal(err)
		}
		if text == "rate<1M" {
			want = append([]string{"rds 64 B rtt: rate is 100000"}, want...)
		}
		got := c.violations(rep)
		if len(got) != len(want) {
			t.Errorf("%q: %q, want %q", text, got, want)
			continue
		}
		for i := range got {
			if !strings.HasPrefix(got[i], want[i]) || !strings.Contains(got[i], text) {
				t.Errorf("%q: %q, want %q", text, got[i], want[i])
			}
		}
	}
}

// A condition that nothing can make true is a mistake, and would look like a success for ever.
func TestThresholdWatches(t *testing.T) {
	p := defaultParams()
	for text, want := range map[string]bool{
		"p99>1us": true, "rtt:p99>1us": true, "throughput:p99>1us": false, "load:rate<1": false, "tcp:rate<1": true, "udp:rate<1": false,
		"4KiB:rate<1": true, "4096:rate<1": true, "8KiB:rate<1": false, "vs-tcp<1": true, "vs-udp<1": false, "write:rate<1": false,
	} {
		c, err := parseThreshold(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.watches(p.runs()); got != want {
			t.Errorf("%q watches something: %v, want %v", text, got, want)
		}
	}
	p.RDMA, p.Compare = []string{rdmaWrite}, []string{transportRDS}
	c, err := parseThreshold("write/1MiB: vs-rds<1")
	if err != nil || !c.watches(p.runs()) {
		t.Errorf("of RDMA beside datagrams: %v", err)
	}
}

func TestCommandFailIf(t *testing.T) {
	t.Parallel()
	args := append(slices.Clone(quick), "--addr", ownLoopback(27)+","+ownLoopback(28), "--sizes", "64", "--tests", "rtt", "--compare", "none")
	stdout, stderr, code := runCommand(t, append(args, "--fail-if", "p50>1ns,rate<1", "--fail-if", "p50>10s")...)
	if code != 3 || !strings.Contains(stdout, "messages/s") {
		t.Errorf("exit status %d; standard output:\n%s", code, stdout)
	}
	if strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "rds-bench: rds 64 B rtt: p50 is ") || !strings.HasSuffix(stderr, "(--fail-if 'p50>1ns')\n") {
		t.Errorf("standard error: %q", stderr)
	}
	if _, stderr, code := runCommand(t, append(args, "--fail-if", "p50>1m")...); code != 0 || stderr != "" {
		t.Errorf("nothing violated: exit status %d, %q", code, stderr)
	}
}

func TestThresholdErrorBesideOthers(t *testing.T) {
	var missed *thresholdError
	if err := (thresholds{}).check(testReport()); err != nil || errors.As(err, &missed) {
		t.Errorf("no conditions: %v", err)
	}
}
