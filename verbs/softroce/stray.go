package softroce

import (
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// strays bounds how many packets for QPs that do not exist are looked at closely, and told of: most of them are the rest of connections
// that have just ended, which is no news to anybody. Engine role.
type strays struct {
	since time.Time
	n     int
}

const (
	strayEvery = 10 * time.Millisecond
	strayMost  = 4 // in that time
)

// due reports whether one more may be told of.
func (s *strays) due(now time.Time) bool {
	if now.Sub(s.since) >= strayEvery {
		s.since, s.n = now, 0
	}
	s.n++
	return s.n <= strayMost
}

// stray tells of an RC packet for a QP that does not exist, if its ICRC is right, so that it came from where it says it did for all
// that can be seen of it.
func (d *device) stray(t *packetio.RxTrain, b []byte, i uint16) {
	f := roce.NewFlow(t.From, d.conn.LocalAddr())
	if _, v := f.Check(b, i); v == roce.OK0 || v == roce.OKGuess {
		d.async(verbs.AsyncEvent{Type: verbs.EventStrayPacket, From: t.From.Addr()})
	}
}
