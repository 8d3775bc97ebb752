package softroce

import (
	"math/rand/v2"
	"testing"
)

// TestPageTable compares the table with one word per page.
func TestPageTable(t *testing.T) {
	const shift, pages = 4, 3*leafPages + 70
	r := rand.New(rand.NewPCG(3, 4))
	for round := range 60 {
		lead := uint64(r.IntN(1 << shift))
		size := uint64(pages<<shift) - lead - uint64(r.IntN(1<<shift))
		var tab pageTable
		tab.init(shift, lead, size)
		type state struct{ read, write, gone bool }
		var model [pages + 1]state
		present := 0
		for step := range 60 {
			off := r.Uint64N(size)
			n := r.Uint64N(size-off) + 1
			if r.IntN(2) == 0 {
				n = min(n, uint64(r.IntN(100)+1))
			}
			first, end := (off+lead)>>shift, (off+lead+n-1)>>shift
			span := model[first : end+1]
			write := r.IntN(2) == 0
			switch r.IntN(5) {
			case 0, 1:
				fresh := 0
				for i := range span {
					if s := &span[i]; !s.gone {
						if !s.read {
							fresh++
						}
						s.read, s.write = true, s.write || write
					}
				}
				if got := tab.enter(off, n, write); got != fresh {
					t.Fatalf("round %d, step %d: enter brought %d pages, want %d", round, step, got, fresh)
				}
				present += fresh
			case 2:
				gone := r.IntN(8) == 0
				dropped := 0
				for i := range span {
					s := &span[i]
					if s.read {
						dropped++
					}
					*s = state{gone: s.gone || gone}
				}
				if got := tab.drop(off, n, gone); got != dropped {
					t.Fatalf("round %d, step %d: drop took %d pages, want %d", round, step, got, dropped)
				}
				present -= dropped
			default:
				want := granted
				for _, s := range span {
					switch {
					case s.gone:
						want = refused
					case want == granted && (!s.read || write && !s.write):
						want = absent
					}
				}
				if got := tab.look(off, n, write); got != want {
					t.Fatalf("round %d, step %d: [%d, %d) for writing %v: %v, want %v", round, step, off, off+n, write, got, want)
				}
			}
			if tab.present != present {
				t.Fatalf("round %d, step %d: %d pages are present, want %d", round, step, tab.present, present)
			}
		}
		if got := tab.clear(); got != present || tab.present != 0 {
			t.Fatalf("clear took %d pages, want %d", got, present)
		}
	}
}

// TestPageTableSparse sees to it that a table for a terabyte costs what is used of it.
func TestPageTableSparse(t *testing.T) {
	var tab pageTable
	tab.init(12, 0, 1<<40)
	tab.enter(1<<39, 4096, true)
	tab.drop(0, 1<<38, true)
	if v := tab.look(1<<39, 4096, true); v != granted {
		t.Fatalf("a page that came in is %v", v)
	}
	if v := tab.look(1<<38-1, 2, false); v != refused {
		t.Fatalf("the end of what is gone is %v", v)
	}
	if v := tab.look(1<<38, 1, false); v != absent {
		t.Fatalf("what is behind it is %v", v)
	}
	distinct := map[*pageLeaf]bool{}
	for _, l := range tab.leaves {
		if l != nil {
			distinct[l] = true
		}
	}
	if len(distinct) != 2 {
		t.Fatalf("%d leaves, want one for the page and one for all that is gone", len(distinct))
	}
}
