package softroce

import "math/bits"

// pageTable says which pages of an on-demand region the engine may touch. It is made of leaves that exist from the
// first touch of their part on, so that a region over a whole arena costs what is used of it.
//
// A page is absent, present for reading, present for writing as well, or gone:
//
//	absent ──fault, prefetch──▶ present ──act of the application──▶ absent
//	  └──────────────┬─────────────┘
//	                 └── unmapped, moved ──▶ gone, for ever
//
// All of it belongs to the engine role. Pages are numbered from the one that holds the region's first byte.
type pageTable struct {
	shift   uint   // log2 of the page size
	lead    uint64 // bytes of the first page that are before the region
	leaves  []*pageLeaf
	allGone *pageLeaf // a leaf all of whose pages are gone; shared
	present int       // pages
}

const leafPages = 512

// pageLeaf is leafPages pages, a bit for each. What is in write is in read; what is in gone is in neither.
type pageLeaf struct {
	read, write, gone [leafPages / 64]uint64
}

// init makes an empty table for n bytes, the first of which is lead bytes into its page.
func (t *pageTable) init(shift uint, lead, n uint64) {
	t.shift, t.lead = shift, lead
	pages := (lead + n + 1<<shift - 1) >> shift
	t.leaves = make([]*pageLeaf, (pages+leafPages-1)/leafPages)
}

// span is the pages that hold the n > 0 bytes at off.
func (t *pageTable) span(off, n uint64) (first, end uint64) {
	off += t.lead
	return off >> t.shift, (off+n-1)>>t.shift + 1
}

// pageRun is the pages from p on, at most to end, that share a word of bits: the word's index in its leaf, and their bits.
func pageRun(p, end uint64) (word int, mask uint64, n uint64) {
	n = min(64-p%64, end-p)
	return int(p % leafPages / 64), ^uint64(0) >> (64 - n) << (p % 64), n
}

// look says whether the n bytes at off may be touched, and if not, where they are first not (absent) or whether any of
// them is gone (refused).
func (t *pageTable) look(off, n uint64, write bool) verdict {
	if n == 0 {
		return granted
	}
	v := granted
	p, end := t.span(off, n)
	for p < end {
		w, mask, k := pageRun(p, end)
		l := t.leaves[p/leafPages]
		switch {
		case l == nil:
			v = absent
		case l.gone[w]&mask != 0:
			return refused
		case write && l.write[w]&mask != mask, l.read[w]&mask != mask:
			v = absent
		}
		p += k
	}
	return v
}

// enter makes the pages of the n bytes at off present, those that are gone excepted. It returns how many were not.
func (t *pageTable) enter(off, n uint64, write bool) (fresh int) {
	if n == 0 {
		return 0
	}
	p, end := t.span(off, n)
	for p < end {
		w, mask, k := pageRun(p, end)
		l := t.leaves[p/leafPages]
		if l == nil {
			l = new(pageLeaf)
			t.leaves[p/leafPages] = l
		}
		mask &^= l.gone[w]
		fresh += bits.OnesCount64(mask &^ l.read[w])
		l.read[w] |= mask
		if write {
			l.write[w] |= mask
		}
		p += k
	}
	t.present += fresh
	return fresh
}

// drop makes the pages that hold any of the n bytes at off absent, or gone. It returns how many were present.
func (t *pageTable) drop(off, n uint64, gone bool) (dropped int) {
	if n == 0 {
		return 0
	}
	p, end := t.span(off, n)
	for p < end {
		w, mask, k := pageRun(p, end)
		l := t.leaves[p/leafPages]
		if l == nil && !gone {
			p += leafPages - p%leafPages
			continue
		}
		if gone && p%leafPages == 0 && end-p >= leafPages {
			if l != nil {
				dropped += l.count()
			}
			t.leaves[p/leafPages] = t.goneLeaf()
			p += leafPages
			continue
		}
		if l == nil {
			l = new(pageLeaf)
			t.leaves[p/leafPages] = l
		}
		dropped += bits.OnesCount64(mask & l.read[w])
		l.read[w] &^= mask
		l.write[w] &^= mask
		if gone && l != t.allGone {
			l.gone[w] |= mask
		}
		p += k
	}
	t.present -= dropped
	return dropped
}

func (t *pageTable) goneLeaf() *pageLeaf {
	if t.allGone == nil {
		t.allGone = new(pageLeaf)
		for i := range t.allGone.gone {
			t.allGone.gone[i] = ^uint64(0)
		}
	}
	return t.allGone
}

func (l *pageLeaf) count() (n int) {
	for _, w := range l.read {
		n += bits.OnesCount64(w)
	}
	return n
}

// clear empties the table, and returns how many pages were present.
func (t *pageTable) clear() int {
	n := t.present
	clear(t.leaves)
	t.allGone, t.present = nil, 0
	return n
}
