package rds

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestLimitsDocumented: the counters that docs/limits.md names exist.
func TestLimitsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	svc := openUDP(t, Config{})
	bind(t, svc, ap(loA, 0))
	have := make(map[string]bool)
	for _, c := range svc.Stats().Counters() {
		if i := strings.LastIndexByte(c.Name, '/'); i >= 0 {
			c.Name = "DEVICE" + c.Name[i:]
		}
		have[c.Name] = true
	}
	names := regexp.MustCompile("`((?:DEVICE/)?[a-z][a-z0-9]*(?:_[a-z0-9]+)+)`").FindAllSubmatch(doc, -1)
	if len(names) < 20 {
		t.Errorf("only %d names found", len(names))
	}
	for _, n := range names {
		if !have[string(n[1])] {
			t.Errorf("no counter %s", n[1])
		}
	}
}
