package psn

import (
	"testing"

	"pgregory.net/rapid"
)

func gen() *rapid.Generator[PSN] {
	return rapid.Custom(func(t *rapid.T) PSN { return New(rapid.Uint32().Draw(t, "v")) })
}

func TestEdges(t *testing.T) {
	const last = PSN(Space - 1)
	for _, tc := range []struct {
		what      string
		got, want any
	}{
		{"New drops the upper byte", New(0xAB000001), PSN(1)},
		{"Add wraps", last.Add(1), PSN(0)},
		{"Add of a negative wraps back", PSN(0).Add(-1), last},
		{"Add of the whole space is nothing", PSN(5).Add(Space), PSN(5)},
		{"the PSN after the wrap is one ahead", PSN(0).Sub(last), 1},
		{"the PSN before the wrap is one behind", last.Sub(0), -1},
		{"largest distance ahead", PSN(Space/2 - 1).Sub(0), Space/2 - 1},
		{"half the space reads as behind", PSN(Space / 2).Sub(0), -Space / 2},
		{"and from the other side too", PSN(0).Sub(Space / 2), -Space / 2},
		{"Less across the wrap", last.Less(0), true},
		{"Less is strict", PSN(7).Less(7), false},
		{"LessEq is not", PSN(7).LessEq(7), true},
		{"a range across the wrap holds its first", last.InRange(last, 2), true},
		{"and the one past the wrap", PSN(1).InRange(last, 2), true},
		{"but not its end", PSN(2).InRange(last, 2), false},
		{"an empty range holds nothing", PSN(3).InRange(3, 3), false},
		{"a range wider than half the space", PSN(0xC00000).InRange(0, 0xD00000), true},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.what, tc.got, tc.want)
		}
	}
}

// TestProperties compares with a twin that works on unbounded integers.
func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := gen().Draw(t, "p")
		n := rapid.IntRange(-Space/2, Space/2-1).Draw(t, "n")
		q := p.Add(n)
		if q >= Space {
			t.Fatalf("%d + %d = %#x leaves the space", p, n, uint32(q))
		}
		if want := PSN(((int64(p)+int64(n))%Space + Space) % Space); q != want {
			t.Fatalf("%d + %d = %d, want %d", p, n, q, want)
		}
		if got := q.Sub(p); got != n {
			t.Fatalf("(%d + %d) - %d = %d", p, n, p, got)
		}
		if p.Less(q) != (n > 0) && n != -Space/2 {
			t.Fatalf("%d < %d is %v", p, q, p.Less(q))
		}
		if p.LessEq(q) != (p.Less(q) || p == q) {
			t.Fatalf("%d <= %d is %v", p, q, p.LessEq(q))
		}
		if n != -Space/2 && p != q && p.Less(q) == q.Less(p) {
			t.Fatalf("%d and %d: neither is first", p, q)
		}
		// x is in [p, p+w) exactly when it is fewer than w steps after p.
		w := rapid.IntRange(0, Space-1).Draw(t, "w")
		k := rapid.IntRange(0, Space-1).Draw(t, "k")
		if got := p.Add(k).InRange(p, p.Add(w)); got != (k < w) {
			t.Fatalf("%d+%d in [%d, +%d) is %v", p, k, p, w, got)
		}
	})
}
