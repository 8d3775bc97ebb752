package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A threshold is a condition of --fail-if:
//
//	condition = [ selector ":" ] metric operator value
//	selector  = word { "/" word }           a transport, "rds write", a test, a size: all must fit
//	metric    = "p50" | "p90" | "p99" | "p99.9" | "p99.99" | "min" | "mean" | "max"      latency
//	          | "rate" | "bytes" | "cpu" | "resent" | "drops" | "vs-" baseline
//	operator  = "<" | "<=" | ">" | ">=" | "==" | "!="
//	value     = a number, with a unit where the metric has one: 50us, 1.5M, 2GB
//
// rate is in messages per second, bytes in bytes per second, cpu in cores of both processes together, vs-tcp the
// rate in multiples of the baseline's in the same place. Without a transport in its selector a condition is about RDS only.
type threshold struct {
	text     string
	selector []string
	metric   string
	op       string
	value    float64
}

// latencyMetrics are those of runs with round trips.
var latencyMetrics = map[string]func(*percentiles) float64{
	"p50": func(p *percentiles) float64 { return p.P50 }, "p90": func(p *percentiles) float64 { return p.P90 },
	"p99": func(p *percentiles) float64 { return p.P99 }, "p99.9": func(p *percentiles) float64 { return p.P999 },
	"p99.99": func(p *percentiles) float64 { return p.P9999 }, "min": func(p *percentiles) float64 { return p.Min },
	"mean": func(p *percentiles) float64 { return p.Mean }, "max": func(p *percentiles) float64 { return p.Max },
}

// plainMetrics are those of every run.
var plainMetrics = map[string]func(*result) float64{
	"rate":  func(r *result) float64 { return r.MessagesPerSecond },
	"bytes": func(r *result) float64 { return r.BytesPerSecond },
	"cpu":   func(r *result) float64 { return r.cores }, "resent": func(r *result) float64 { return float64(r.Retransmits) },
	"drops": func(r *result) float64 { return float64(r.Drops) },
}

const vsPrefix = "vs-"

func parseThreshold(text string) (threshold, error) {
	t := threshold{text: text}
	fail := func(format string, args ...any) (threshold, error) {
		return threshold{}, fmt.Errorf("%q: %s", text, fmt.Sprintf(format, args...))
	}
	cond := text
	if sel, rest, ok := strings.Cut(text, ":"); ok {
		cond = rest
		for _, w := range strings.Split(sel, "/") {
			w = strings.Join(strings.Fields(w), " ")
			if w == "" {
				return fail("an empty word before the colon")
			}
			t.selector = append(t.selector, w)
		}
	}
	i := strings.IndexAny(cond, "<>=!")
	if i < 0 {
		return fail("no comparison, as in p99>50us")
	}
	t.metric = strings.TrimSpace(cond[:i])
	j := i + 1
	if j < len(cond) && cond[j] == '=' {
		j++
	}
	t.op = cond[i:j]
	if !slices.Contains([]string{"<", "<=", ">", ">=", "==", "!="}, t.op) {
		return fail("%q is no comparison", t.op)
	}
	value := strings.TrimSpace(cond[j:])
	var err error
	switch {
	case latencyMetrics[t.metric] != nil:
		var d time.Duration
		if d, err = time.ParseDuration(value); err != nil {
			return fail("%q is no time, like 50us", value)
		}
		t.value = d.Seconds()
	case t.metric == "bytes":
		if t.value, err = parseBytes(value); err != nil {
			return fail("%q is no number of bytes per second, like 1.5GB", value)
		}
	case plainMetrics[t.metric] != nil || slices.Contains(baselines, strings.TrimPrefix(t.metric, vsPrefix)) && strings.HasPrefix(t.metric, vsPrefix):
		if t.value, err = parseRate(strings.TrimSuffix(value, "x")); err != nil {
			return fail("%q is no number, like 500, 20k or 1.5M", value)
		}
	default:
		return fail("%q is no metric: p50, p90, p99, p99.9, p99.99, min, mean, max, rate, bytes, cpu, resent, drops, vs-tcp", t.metric)
	}
	return t, nil
}

// parseBytes reads a number of bytes with an optional unit, decimal or binary, and an optional "/s".
func parseBytes(s string) (float64, error) {
	s = strings.TrimSuffix(strings.TrimSpace(s), "/s")
	scale := 1.0
	for _, u := range []struct {
		unit  string
		scale float64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"B", 1}} {
		if rest, ok := strings.CutSuffix(s, u.unit); ok {
			s, scale = rest, u.scale
			break
		}
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err == nil && !(v >= 0 && v < 1e15) {
		err = strconv.ErrRange
	}
	return v * scale, err
}

// runWords are what a selector may say of a run, and whether it is of RDS.
func runWords(transport, rdma, test string, size int) []string {
	words := []string{transport, test, strings.ReplaceAll(formatSize(size), " ", "")}
	if rdma != "" {
		words = append(words, rdma, transport+" "+rdma)
	}
	return words
}

// selects reports whether t is about a run that words describe.
func (t *threshold) selects(words []string) bool {
	transport := false
	for _, w := range t.selector {
		if n, err := parseSize(w); err == nil { // however it is written
			w = strings.ReplaceAll(formatSize(n), " ", "")
		}
		if !slices.Contains(words, w) {
			return false
		}
		first, _, _ := strings.Cut(w, " ")
		transport = transport || slices.Contains(baselines, first)
	}
	return transport || words[0] == transportRDS
}

// watches reports whether t will have something to say about a measurement. One that watches nothing would always pass.
func (t *threshold) watches(specs []spec) bool {
	return slices.ContainsFunc(specs, func(s spec) bool {
		if !t.selects(runWords(s.Transport, s.RDMA, s.Test, s.moved())) {
			return false
		}
		if base, ok := strings.CutPrefix(t.metric, vsPrefix); ok {
			return slices.ContainsFunc(specs, func(b spec) bool { return b.Transport == base && b.RDMA == "" && b.Test == s.Test })
		}
		return latencyMetrics[t.metric] == nil || s.Test != testThroughput
	})
}

// violations are the runs for which t is true, each as a line.
func (t *threshold) violations(rep *report) []string {
	var out []string
	for i := range rep.Runs {
		r := &rep.Runs[i]
		if !t.selects(runWords(r.Transport, r.RDMA, r.Test, r.moved())) {
			continue
		}
		v, ok := t.of(rep, r)
		if !ok || !t.holds(v) {
			continue
		}
		out = append(out, fmt.Sprintf("%s: %s is %s (--fail-if '%s')", r, t.metric, t.format(v), t.text))
	}
	return out
}

// of is the metric of a run, if it has it.
func (t *threshold) of(rep *report, r *result) (float64, bool) {
	if f := latencyMetrics[t.metric]; f != nil {
		if r.RTTSeconds == nil {
			return 0, false
		}
		return f(r.RTTSeconds), true
	}
	if f := plainMetrics[t.metric]; f != nil {
		return f(r), true
	}
	over := strings.TrimPrefix(t.metric, vsPrefix)
	for i := range rep.Runs {
		b := &rep.Runs[i]
		if b.over() == over && b.Test == r.Test && b.moved() == r.moved() && b.Offered == r.Offered && b.Round == r.Round && b.MessagesPerSecond > 0 {
			return r.MessagesPerSecond / b.MessagesPerSecond, true
		}
	}
	return 0, false
}

func (t *threshold) holds(v float64) bool {
	switch t.op {
	case "<":
		return v < t.value
	case "<=":
		return v <= t.value
	case ">":
		return v > t.value
	case ">=":
		return v >= t.value
	case "==":
		return v == t.value
	}
	return v != t.value
}

func (t *threshold) format(v float64) string {
	switch {
	case latencyMetrics[t.metric] != nil:
		return time.Duration(v * 1e9).String()
	case t.metric == "bytes":
		return fmt.Sprintf("%.4g GB/s", v/1e9)
	}
	return strconv.FormatFloat(v, 'g', 6, 64)
}

// A thresholdError is a measurement that is not as good as --fail-if asks for, with a line for each run and condition.
type thresholdError struct{ lines []string }

func (e *thresholdError) Error() string { return strings.Join(e.lines, "\n") }

// thresholds are the values of --fail-if.
type thresholds []threshold

// check is a *thresholdError if one of them is true.
func (ts thresholds) check(rep *report) error {
	var lines []string
	for i := range ts {
		lines = append(lines, ts[i].violations(rep)...)
	}
	if lines == nil {
		return nil
	}
	return &thresholdError{lines}
}

// watch says which of them is about no run.
func (ts thresholds) watch(specs []spec) error {
	var errs []error
	for i := range ts {
		if !ts[i].watches(specs) {
			errs = append(errs, fmt.Errorf("--fail-if %q: nothing that is measured has this", ts[i].text))
		}
	}
	return errors.Join(errs...)
}

// thresholdsValue is the flag value of --fail-if.
type thresholdsValue struct{ list *thresholds }

func (v thresholdsValue) Type() string { return "condition" }

func (v thresholdsValue) String() string {
	if v.list == nil {
		return ""
	}
	var out []string
	for _, t := range *v.list {
		out = append(out, t.text)
	}
	return strings.Join(out, ",")
}

// Set adds conditions, with commas between them.
func (v thresholdsValue) Set(s string) error {
	for _, c := range strings.Split(s, ",") {
		t, err := parseThreshold(c)
		if err != nil {
			return err
		}
		*v.list = append(*v.list, t)
	}
	return nil
}
