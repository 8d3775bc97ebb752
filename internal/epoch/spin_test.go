//go:build !race && !invariants

package epoch

// The model does not depend on how Go is built: once is enough.

import (
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const model = "spin/epoch.pml"

// tool returns where a program is. Only in CI must it be there.
func tool(t *testing.T, name, pkg string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing (Debian: apt-get install %s)", name, pkg)
		}
		t.Skipf("%s is not installed (Debian: apt-get install %s)", name, pkg)
	}
	return path
}

// check runs the checker over the whole model with the given definitions, and returns its report. A violation
// ends it early.
func check(t *testing.T, defs ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	pml, err := filepath.Abs(model)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	spin, cc := tool(t, "spin", "spin"), tool(t, "gcc", "gcc")
	run(spin, append(append([]string{"-a"}, defs...), pml)...)
	// SAFETY: assertions and invalid end states, which is all that is claimed. COLLAPSE: a third of the memory.
	run(cc, "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2000", "-o", "pan", "pan.c")
	out := run("./pan", "-m100000")
	// A search that was cut short proves nothing.
	for _, cut := range []string{"search depth too small", "out of memory", "Search not completed"} {
		if strings.Contains(out, cut) && !strings.Contains(out, "errors: 1") {
			t.Fatalf("the checker gave up:\n%s", out)
		}
	}
	return out
}

// TestSpin checks the protocol's model over every interleaving, at the sizes that a minute allows.
func TestSpin(t *testing.T) {
	for _, c := range []struct{ name, defs string }{
		{"retire and synchronize", "-DROUNDS=1 -DRETIRES=1 -DSYNCS=1"},
		{"batches", "-DROUNDS=2 -DRETIRES=2 -DSYNCS=0"},
		{"fenced, retire and synchronize", "-DFENCED -DROUNDS=1 -DRETIRES=1 -DSYNCS=1"},
		{"fenced, batches", "-DFENCED -DROUNDS=2 -DRETIRES=2 -DSYNCS=0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := check(t, strings.Fields(c.defs)...)
			if !strings.Contains(out, "errors: 0") {
				t.Errorf("the checker found a violation:\n%s", out)
			}
			t.Log(regexp.MustCompile(`(?m)^.*states, stored$`).FindString(out))
		})
	}
}

// TestSpinFindsMistakes: each broken variant fails, and in the way that the stress test sees too.
func TestSpinFindsMistakes(t *testing.T) {
	text, err := os.ReadFile(model)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mistakes {
		t.Run(m.model, func(t *testing.T) {
			if !regexp.MustCompile(`(?m)^#ifn?def ` + m.model + `$`).Match(text) {
				t.Fatal("the model has no such variant")
			}
			out := check(t, "-DROUNDS=1", "-DRETIRES=2", "-DSYNCS=0", "-D"+m.model)
			want := "assertion violated"
			if m.hangs {
				want = "invalid end state"
			}
			if !strings.Contains(out, "errors: 1") || !strings.Contains(out, "pan:1: "+want) {
				t.Errorf("the checker should say %q:\n%s", want, out)
			}
		})
	}
}

// TestSpinNames: the code names every step of the model, and no other.
func TestSpinNames(t *testing.T) {
	pml, err := os.ReadFile(model)
	if err != nil {
		t.Fatal(err)
	}
	inModel := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^([RGWP]_[A-Z_]+):`).FindAllSubmatch(pml, -1) {
		inModel[string(m[1])] = true
	}
	inCode := make(map[string]bool)
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\b[RGWP]_[A-Z_]+\b`).FindAllString(string(text), -1) {
			inCode[name] = true
		}
	}
	model, code := slices.Sorted(maps.Keys(inModel)), slices.Sorted(maps.Keys(inCode))
	if len(model) == 0 || !slices.Equal(model, code) {
		t.Errorf("steps of the model %v\nsteps of the code  %v", model, code)
	}
}
