package rdsdebug

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

// Root looks where the other users' processes are, and not where somebody has put something that is not what it seems.
func TestUsersDirs(t *testing.T) {
	run, tmp, me := t.TempDir(), t.TempDir(), strconv.Itoa(os.Geteuid())
	mkdir := func(d string, mode os.FileMode) string {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(d, mode); err != nil {
			t.Fatal(err)
		}
		return d
	}
	want := []string{mkdir(filepath.Join(run, me, "openrds"), 0o700), mkdir(filepath.Join(tmp, "openrds-"+me), 0o700)}
	mkdir(filepath.Join(run, "12345", "openrds"), 0o700) // mine, in the name of another
	mkdir(filepath.Join(tmp, "openrds-x"), 0o700)
	other := t.TempDir()
	mkdir(filepath.Join(other, "openrds-"+me), 0o777) // anybody may write there
	for _, d := range [][2]string{{run, tmp}, {run, other}} {
		got := usersDirs(d[0], d[1])
		if w := want[:1]; d[1] == tmp && !slices.Equal(got, want) || d[1] == other && !slices.Equal(got, w) {
			t.Errorf("%v: %v", d, got)
		}
	}
	link := t.TempDir()
	if err := os.Symlink(want[0], filepath.Join(link, "openrds-"+me)); err != nil {
		t.Fatal(err)
	}
	if got := usersDirs(link, link); got != nil {
		t.Errorf("by a link: %v", got)
	}
}
