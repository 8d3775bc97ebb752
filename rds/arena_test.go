package rds

import (
	"errors"
	"os"
	"testing"

	"github.com/openrds/openrds/verbs"
)

// TestArena uses an arena as a provider and an application do.
func TestArena(t *testing.T) {
	ps := os.Getpagesize()
	a, err := OpenArena(8*ps - 1)
	if errors.Is(err, ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	resident := func(want int, when string) {
		t.Helper()
		n, err := a.Resident(0, len(a.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		if n != want*ps {
			t.Fatalf("%s %d bytes are resident, want %d pages", when, n, want)
		}
	}
	if len(a.Bytes()) != 8*ps {
		t.Fatalf("%d bytes", len(a.Bytes()))
	}
	resident(0, "at first")
	p, err := a.Paged(ps, 4*ps)
	if err != nil {
		t.Fatal(err)
	}
	type told struct {
		off, n int
		gone   bool
	}
	var got []told
	stop, err := p.Watch(func(off, n int, gone bool) { got = append(got, told{off, n, gone}) })
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Populate(0, 2*ps, true); err != nil {
		t.Fatal(err)
	}
	resident(2, "after populating")
	copy(p.Alias(), "hello")
	if s := string(a.Bytes()[ps : ps+5]); s != "hello" {
		t.Fatalf("the application sees %q", s)
	}
	if err := a.Discard(ps, ps); err != nil {
		t.Fatal(err)
	}
	resident(1, "after Discard")
	if len(got) != 1 || got[0] != (told{0, ps, false}) {
		t.Fatalf("the provider was told %v", got)
	}
	if off, ok := a.Offset(a.Bytes()[3*ps+7 : 4*ps]); !ok || off != 3*ps+7 {
		t.Fatalf("offset %d, %v", off, ok)
	}
	for _, b := range [][]byte{nil, make([]byte, 10), p.Alias()[:1]} {
		if off, ok := a.Offset(b); ok {
			t.Fatalf("memory that is not the arena's is at %d in it", off)
		}
	}
	if err := a.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Fatalf("closing an arena in use: %v", err)
	}
	stop()
	for _, f := range []func() error{
		func() error { return a.Discard(1, ps) },
		func() error { _, err := a.Resident(0, 9*ps); return err },
		func() error { _, err := a.Paged(8*ps, 1); return err },
		func() error { _, err := OpenArena(0); return err },
	} {
		if err := f(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v does not match ErrInvalid", err)
		}
	}
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
