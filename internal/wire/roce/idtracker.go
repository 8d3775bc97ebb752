package roce

import "time"

// IDTracker decides which solved IPv4 identifications of one peer to believe. A kernel's soft RoCE
// numbers its packets to us by a counter that other traffic shares: the next identification is a
// little ahead of the last, by more after a pause. Accepting only those brings the chance that a
// corrupted packet passes back from 2^-16 to about 2^-20 (policy B of rocev2 spec 2.8).
//
//	fresh ──solved──▶ tracking ◀── resync: idMisses ── misses ──┐
//	  │                  └──────────────────────────────────────┘ idResyncs of them: any
//	  └─ idPlain packets with identification 0 ──▶ plain ── idMisses misses ──▶ tracking
//
// In "any" nothing is judged any more (policy C): a peer with an identification per QP, or a random
// one, must be able to talk. A peer that only ever used 0, or the index in a train, is held to that (policy A) in the same
// way: a solved identification is a miss, unless it is an index too. A receiver's GRO joins the end of one train and
// the beginning of the next, which the guess does not know of.
//
// The zero value is ready. It is not safe for concurrent use.
type IDTracker struct {
	state  uint8
	plain  uint8  // packets with identification 0 (or guessed) seen in fresh, up to idPlain
	hits   uint8  // identifications inside the window since the last miss, up to idClear
	misses uint8  // refused since the last resync, or since idClear hits in a row
	jumps  uint8  // resyncs since idClear hits in a row
	last   uint16 // last identification accepted
	at     time.Time

	// Refused and Resyncs count packets not believed and identifications believed although out of
	// the window.
	Refused, Resyncs uint64
}

const (
	idFresh = iota
	idTracking
	idPlainOnly
	idAny
)

const (
	idWindow  = 4096 // how far ahead an identification may be, plus 1 per millisecond since the last
	idBehind  = 64   // how far behind: packets reordered on the way
	idMisses  = 8    // refused before the next one is taken for a jump of the counter
	idClear   = 32   // hits in a row that make past misses forgotten
	idResyncs = 4    // jumps without that: the peer has no counter we understand
	idPlain   = 64   // packets after which a peer without identifications is held to that
	idTrain   = 64   // packets of a train at most (UDP_MAX_SEGMENTS)
)

// Accept reports whether a packet on which Flow.Check said v, with this id, is to be believed. Call
// it for every packet of the peer, in order of arrival.
func (t *IDTracker) Accept(v Verdict, id uint16, now time.Time) bool {
	switch v {
	case OK0, OKGuess:
		if t.state == idFresh {
			if t.plain++; t.plain == idPlain {
				t.state = idPlainOnly
			}
		}
		return true
	case OKSolved:
		return t.solved(id, now)
	}
	return false
}

func (t *IDTracker) solved(id uint16, now time.Time) bool {
	switch t.state {
	case idAny:
		return true
	case idFresh:
		t.state = idTracking
		t.last, t.at = id, now
		return true
	case idTracking:
		ahead := id - t.last
		window := min(idWindow+max(now.Sub(t.at).Milliseconds(), 0), 1<<16-idBehind)
		switch {
		case int64(ahead) < window:
			t.last, t.at = id, now
		case -ahead > idBehind:
			return t.miss(id, now)
		}
		if t.hits++; t.hits >= idClear {
			t.hits, t.misses, t.jumps = 0, 0, 0
		}
		return true
	case idPlainOnly:
		if id < idTrain {
			return true
		}
	}
	return t.miss(id, now)
}

func (t *IDTracker) miss(id uint16, now time.Time) bool {
	t.hits = 0
	if t.misses++; t.misses < idMisses {
		t.Refused++
		return false
	}
	t.Resyncs++
	t.misses = 0
	t.state = idTracking
	t.last, t.at = id, now
	if t.jumps++; t.jumps == idResyncs {
		t.state = idAny
	}
	return true
}
