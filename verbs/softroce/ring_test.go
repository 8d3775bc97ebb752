package softroce

import (
	"testing"

	"github.com/openrds/openrds/verbs"
)

// Indexes of the rings run on past 2^32: an hour of a million requests per second. Rings of any
// depth keep their order across it, and take what they are asked for, no more.
func TestRingsPassIndexWrap(t *testing.T) {
	for _, depth := range []int{1, 3, 5, 8, 100} {
		var r recvRing
		r.init(nil, depth, 1)
		r.head.Store(0xffff_ffff - 1)
		r.tail.Store(0xffff_ffff - 1)
		var w rwqe
		next, taken := uint64(0), uint64(0)
		for range 20 {
			wrs := make([]verbs.RecvWR, depth+1)
			for i := range wrs {
				wrs[i].ID = next + uint64(i)
			}
			n, err := r.post(wrs)
			if n != depth || err != verbs.ErrRQFull {
				t.Fatalf("an empty ring of %d takes %d: %v", depth, n, err)
			}
			next += uint64(n)
			for range n {
				if !r.take(&w) || w.id != taken {
					t.Fatalf("a ring of %d gives request %d where %d is due", depth, w.id, taken)
				}
				taken++
			}
			if r.take(&w) {
				t.Fatalf("a ring of %d gives more than it took", depth)
			}
		}

		q := &qp{sq: make([]swqe, ringSlots(depth))}
		seen := map[*swqe]bool{}
		for i := range uint32(depth) {
			seen[q.slot(0xffff_ffff-uint32(depth)/2+i)] = true
		}
		if len(seen) != depth {
			t.Errorf("%d send requests in a row have %d slots", depth, len(seen))
		}
	}
}
