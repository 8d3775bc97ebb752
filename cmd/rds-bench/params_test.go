package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int{
		"64": 64, "64B": 64, " 4KiB": 4096, "4k": 4096, "4K": 4096, "1MiB": 1 << 20, "1m": 1 << 20, "64 KiB": 65536, "0": 0,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "-1", "1.5K", "2MiB", "1GiB", "1048577", "99999999999999999999", "KiB"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q is %d", in, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"64", "4KiB", "1 MiB", "b", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		n, err := parseSize(in)
		if err != nil {
			return
		}
		if n < 0 || n > maxMessageBytes {
			t.Fatalf("%q is %d", in, n)
		}
		if again, err := parseSize(formatSize(n)); err != nil || again != n {
			t.Fatalf("%d formats as %q, which is %d, %v", n, formatSize(n), again, err)
		}
	})
}

func TestValidateNamesEveryProblem(t *testing.T) {
	p := params{Sizes: []int{0, 2 << 20}, Tests: []string{"speed"}, Compare: []string{"sctp"}, Sockets: 0, Depth: -1, Duration: 0, Warmup: -1}
	err := p.validate()
	if err == nil {
		t.Fatal("no problem found")
	}
	for _, flag := range []string{"--sizes: 0", "--sizes: 2097152", "--tests", "--compare", "--sockets", "--depth", "--duration", "--warmup", "--dialect"} {
		if !strings.Contains(err.Error(), flag) {
			t.Errorf("%q is not mentioned in %q", flag, err)
		}
	}
	if err := defaultParams().validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
}

// The default ladder has to be over well within a minute.
func TestLadder(t *testing.T) {
	p := defaultParams()
	runs := p.runs()
	if total := time.Duration(len(runs)) * (p.Duration + p.Warmup); total > 30*time.Second {
		t.Errorf("%d runs take %v", len(runs), total)
	}
	var got []string
	for _, s := range runs[:4] {
		got = append(got, s.String())
	}
	want := []string{"rds 64 B throughput", "tcp 64 B throughput", "rds 64 B rtt", "tcp 64 B rtt"}
	if !slices.Equal(got, want) {
		t.Errorf("the ladder begins with %q, want %q", got, want)
	}
	p.Bidir = true
	for _, s := range p.runs() {
		if s.Bidir != (s.Test == testThroughput) {
			t.Errorf("%v: bidir %v", s, s.Bidir)
		}
		if err := s.validate(); err != nil {
			t.Errorf("%v: %v", s, err)
		}
	}
}
