// Package arch holds the direction of imports: calls go down, imports go down to verbs and stop there.
package arch

import (
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/openrds/openrds"

type pkg struct {
	ImportPath string
	Standard   bool
	Imports    []string
	CgoFiles   []string
	Deps       []string
}

// list is `go list -deps -json ./...`, run at the module's root.
func list(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Imports,CgoFiles,Deps", "./...")
	cmd.Dir = "../.."
	// With cgo off, files that import "C" would be left out of the list instead of found.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	// go test keeps a result until a file or directory that the test itself opened has changed, and does not know
	// what go list reads. So the directories are opened here.
	if err := filepath.WalkDir("../..", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && len(e.Name()) > 2 && e.Name()[0] == '.' {
			return filepath.SkipDir
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	pkgs := make(map[string]pkg)
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[p.ImportPath] = p
	}
	return pkgs
}

// layers are the core packages from the bottom up, with what of ours each may import.
var layers = []struct {
	path string
	may  []string
}{
	{"internal/psn", nil},
	{"internal/invariants", nil},
	{"internal/packetio", nil},
	{"internal/wire/roce", []string{"internal/psn"}},
	{"internal/wire/cm", nil},
	{"internal/wire/rdshdr", nil},
	{"internal/epoch", []string{"internal/invariants"}},
	{"internal/ref", []string{"internal/invariants"}},
	{"internal/slab", []string{"internal/invariants"}},
	{"internal/pagemem", nil},
	{"internal/simnet", []string{"internal/packetio"}},
	{"verbs", nil},
	{"verbs/faultverbs", []string{"verbs"}},
	{"verbs/softroce", []string{"verbs", "internal/epoch", "internal/ref", "internal/psn", "internal/packetio", "internal/wire/roce", "internal/wire/cm", "internal/invariants", "internal/pagemem"}},
	{"mrpool", []string{"verbs", "internal/epoch", "internal/ref", "internal/invariants"}},
	{"ibdev", []string{"verbs", "mrpool", "internal/epoch", "internal/ref", "internal/slab", "internal/invariants"}},
	{"conn/ib", []string{"verbs", "mrpool", "ibdev", "internal/slab", "internal/wire/rdshdr", "internal/invariants"}},
	{"conn", []string{"verbs", "mrpool", "ibdev", "conn/ib", "internal/epoch", "internal/ref", "internal/slab", "internal/wire/rdshdr", "internal/invariants"}},
	{"rds", []string{"verbs", "verbs/softroce", "mrpool", "ibdev", "conn", "internal/epoch", "internal/ref", "internal/slab", "internal/packetio", "internal/invariants", "internal/pagemem"}},
	{"internal/rdsping", []string{"rds"}},
	{"rds/rdsdebug", []string{"verbs", "rds", "internal/rdsping"}},
}

// outside is what core packages may import beyond the standard library and each other.
var outside = []string{"github.com/hashicorp/go-hclog", "golang.org/x/sys/unix", "go.uber.org/atomic"}

func TestDirection(t *testing.T) {
	pkgs := list(t)
	for _, l := range layers {
		p, ok := pkgs[module+"/"+l.path]
		if !ok {
			t.Errorf("there is no package %s", l.path)
			continue
		}
		for _, imp := range p.Imports {
			ours, inside := strings.CutPrefix(imp, module+"/")
			switch {
			case inside && !slices.Contains(l.may, ours):
				t.Errorf("%s imports %s", l.path, ours)
			case !inside && !pkgs[imp].Standard && imp != "C" && imp != "unsafe" && !slices.Contains(outside, imp):
				t.Errorf("%s imports %s, which the core does without", l.path, imp)
			case !inside && !pkgs[imp].Standard && (strings.HasPrefix(l.path, "internal/wire/") || l.path == "internal/psn" || l.path == "verbs"):
				t.Errorf("%s imports %s: it has the standard library only", l.path, imp)
			}
		}
	}
}

func TestNoCgo(t *testing.T) {
	for _, p := range list(t) {
		if strings.HasPrefix(p.ImportPath, module) && len(p.CgoFiles) > 0 {
			t.Errorf("%s uses cgo: %v", p.ImportPath, p.CgoFiles)
		}
	}
}

// TestLayersComplete makes sure that a new core package gets its line in layers.
func TestLayersComplete(t *testing.T) {
	known := map[string]bool{}
	for _, l := range layers {
		known[l.path] = true
	}
	for path := range list(t) {
		ours, inside := strings.CutPrefix(path, module+"/")
		if !inside || known[ours] {
			continue
		}
		for _, free := range []string{"cmd/", "test/", "internal/arch", "internal/leak", "internal/rawudp", "internal/bench", "internal/wire/wiretest", "verbs/verbstest", "rds/rdstest"} {
			if strings.HasPrefix(ours, free) {
				known[ours] = true
			}
		}
		if !known[ours] {
			t.Errorf("package %s has no line in layers", ours)
		}
	}
}

// TestTestOnly keeps what is made for tests out of programs: go list without -test shows the imports of
// code that is shipped.
func TestTestOnly(t *testing.T) {
	testOnly := []string{
		module + "/internal/leak", module + "/internal/simnet", module + "/internal/wire/wiretest",
		module + "/verbs/verbstest", module + "/verbs/faultverbs", module + "/rds/rdstest",
		"testing", "testing/synctest", "go.uber.org/goleak", "pgregory.net/rapid", "github.com/google/go-cmp/cmp",
	}
	// rds-bench counts what a run has left behind: that is part of its work.
	audit := [2]string{"cmd/rds-bench", "go.uber.org/goleak"}
	for _, p := range list(t) {
		ours, inside := strings.CutPrefix(p.ImportPath, module+"/")
		if !inside || slices.Contains(testOnly, p.ImportPath) || strings.HasPrefix(ours, "test/") {
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(testOnly, imp) && audit != [2]string{ours, imp} {
				t.Errorf("%s imports %s outside of its tests", ours, imp)
			}
		}
	}
}
