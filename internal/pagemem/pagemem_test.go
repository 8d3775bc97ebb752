package pagemem

import (
	"math/rand/v2"
	"testing"

	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) {
	if helper != nil && helper() {
		return
	}
	leak.Main(m)
}

// helper, where the platform sets it, is what this program does as a child of one of its own tests.
var helper func() bool

// TestRanges compares ranges with a set of numbers.
func TestRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var got ranges
		var want [64]bool
		for range 20 {
			lo := r.IntN(60)
			hi := lo + 1 + r.IntN(4)
			got.add(lo, hi)
			for i := lo; i < hi; i++ {
				want[i] = true
			}
			for i := range want {
				if got.overlap(i, i+1) != want[i] {
					t.Fatalf("after add(%d, %d): %v says %v of %d", lo, hi, got, !want[i], i)
				}
			}
			for i := 1; i < len(got); i++ {
				if got[i-1].hi >= got[i].lo {
					t.Fatalf("%v is not sorted and merged", got)
				}
			}
			if got.overlap(5, 5) {
				t.Fatalf("%v overlaps an empty range", got)
			}
		}
	}
}
