package softroce

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// What a step of FuzzCMInput does with its argument; steps are three bytes: what, how, which.
const (
	fuzzCMReplay  = iota // a MAD the peer sent, from the peer
	fuzzCMMutant         // one with a few bytes changed
	fuzzCMForged         // a message the peer never sent, about a live connection: its IDs, QPN and GUID
	fuzzCMForeign        // a MAD the peer sent, from another address
	fuzzCMRandom         // 256 random bytes, behind a header that gets past the GSI
	fuzzCMShort          // any length
	fuzzCMTime           // time goes by
	fuzzCMUser           // the user disconnects, closes a QP, connects
	fuzzCMKinds
)

// FuzzCMInput throws MADs at a manager that has a live connection in each role, an attempt under way and a
// request that waits for its answer. Nothing panics, what is kept stays within its bounds, and when all is closed
// nothing is left.
func FuzzCMInput(f *testing.F) {
	for kind := range byte(fuzzCMKinds) {
		f.Add(uint64(kind), []byte{kind, 0, 0, kind, 1, 1, kind, 2, 2, kind, 3, 3, fuzzCMTime, 3, 0, kind, 4, 4, kind, 5, 5, kind, 6, 6})
	}
	f.Add(uint64(20), []byte{fuzzCMForged, 5, 0, fuzzCMForged, 5, 1, fuzzCMForged, 2, 2, fuzzCMForged, 3, 2, fuzzCMForged, 0, 0, fuzzCMUser, 1, 0})
	f.Fuzz(func(t *testing.T, seed uint64, steps []byte) {
		synctest.Test(t, func(t *testing.T) { fuzzCMInput(t, seed, steps) })
	})
}

func fuzzCMInput(t *testing.T, seed uint64, steps []byte) {
	rng := rand.New(rand.NewPCG(seed, 7))
	n, a, b := twoHosts(t)
	// A manager may be told to disconnect from anyone; what B sends in reply is not the point.
	stop := make(chan struct{})
	handler := func(h *cmTestHost) func(verbs.ConnRequest) {
		return func(r verbs.ConnRequest) {
			if r.Info().PeerQPN%3 == 0 {
				select {
				case <-stop:
				case <-time.After(3 * time.Second):
				}
			}
			if ep, err := r.Accept(context.Background(), h.qp(), cmPassiveParam, nil); err == nil {
				_ = ep
			}
		}
	}
	la, lb := a.listen(handler(a)), b.listen(handler(b))
	ctx, cancel := context.WithCancel(context.Background())
	var dials []*dialed
	dials = append(dials, a.dial(ctx, b, cmActiveParam), b.dial(ctx, a, cmActiveParam), b.dial(ctx, a, cmActiveParam),
		a.dial(ctx, &cmTestHost{addr: netip.MustParseAddr("10.0.0.9")}, cmActiveParam))
	time.Sleep(10 * time.Millisecond)
	synctest.Wait()

	for i := 0; i+3 <= len(steps) && i < 3*200; i += 3 {
		how, which := steps[i+1], int(steps[i+2])
		n.mu.Lock()
		var mad [madBytes]byte
		if len(n.sent) > 0 {
			mad = n.sent[which%len(n.sent)].mad
		}
		n.mu.Unlock()
		from := b.addr
		switch steps[i] % fuzzCMKinds {
		case fuzzCMReplay:
			a.cm.input(from, mad[:])
		case fuzzCMMutant:
			for range 1 + how%4 {
				// The first 24 bytes are the header; the IDs follow.
				mad[16+rng.IntN(madBytes-16)] ^= byte(1 + rng.IntN(255))
			}
			a.cm.input(from, mad[:])
		case fuzzCMForged:
			a.cm.input(from, forgeCM(a, b, rng, cmwire.AttrREQ+cmwire.Attr(how%7), which))
		case fuzzCMForeign:
			a.cm.input(netip.AddrFrom4([4]byte{10, 9, how, byte(which)}), mad[:])
		case fuzzCMRandom:
			for k := 4; k < madBytes; k += 4 {
				binary.BigEndian.PutUint32(mad[k:], rng.Uint32())
			}
			binary.BigEndian.PutUint16(mad[16:], uint16(cmwire.AttrREQ)+uint16(how%12))
			a.cm.input(from, mad[:])
		case fuzzCMShort:
			a.cm.input(from, mad[:which%madBytes])
		case fuzzCMTime:
			time.Sleep(time.Millisecond << (how % 14))
		case fuzzCMUser:
			d := dials[which%len(dials)]
			switch how % 3 {
			case 0:
				dials = append(dials, a.dial(ctx, b, cmActiveParam))
			case 1:
				select {
				case <-d.done:
					if d.ep != nil {
						d.ep.Disconnect()
					}
				default:
				}
			case 2:
				a.cm.qpClosed(d.qp.n)
			}
		}
		if i%30 == 0 {
			synctest.Wait()
			wantBounded(t, a)
		}
	}
	synctest.Wait()
	wantBounded(t, a)

	// The end: nothing holds out.
	cancel()
	close(stop)
	for _, d := range dials {
		d.wait()
	}
	la.Close()
	lb.Close()
	a.cm.close()
	b.cm.close()
	a.wantEmpty()
	b.wantEmpty()
	a.cm.mu.Lock()
	defer a.cm.mu.Unlock()
	for _, d := range dials {
		d.qp.mu.Lock()
		if len(d.qp.bad) != 0 {
			t.Errorf("QP %#x was asked for %v", d.qp.n, d.qp.bad)
		}
		d.qp.mu.Unlock()
	}
}

// forgeCM makes a message of b about one of a's connections: all that a has to know it by is right.
func forgeCM(a, b *cmTestHost, rng *rand.Rand, attr cmwire.Attr, which int) []byte {
	a.cm.mu.Lock()
	cs := a.cm.sortedLocked()
	if len(cs) == 0 {
		a.cm.unlock()
		return make([]byte, madBytes)
	}
	c := cs[which%len(cs)]
	ours, theirs, qpn, peerQPN := c.id, c.peerID, uint32(c.qpn), uint32(c.info.PeerQPN)
	a.cm.unlock()
	if theirs == 0 {
		theirs = 1 + uint32(which)
	}
	if peerQPN == 0 {
		peerQPN = 0x4000 + uint32(which)
	}
	small := uint8(rng.IntN(256))
	switch attr {
	case cmwire.AttrREQ:
		p := cmPeer{h: a, addr: b.addr, guid: b.id}
		r := p.req(rng.Uint32(), peerQPN)
		r.MaxCMRetries, r.PathMTU, r.Primary.AckTimeout = small&15, 1+small%5, small&31
		if small&1 != 0 {
			r.LocalQPN = 0x5000 + uint32(small)
		}
		return encode(r)
	case cmwire.AttrMRA:
		return encode(&cmwire.MRA{LocalCommID: theirs, RemoteCommID: ours, Message: small & 3, ServiceTimeout: small >> 3})
	case cmwire.AttrREJ:
		r := &cmwire.REJ{LocalCommID: theirs, RemoteCommID: ours, Message: small & 3, Reason: cmwire.Reason(small >> 2 & 31)}
		var guid [8]byte
		binary.BigEndian.PutUint64(guid[:], b.id)
		r.SetInfo(guid[:])
		return encode(r)
	case cmwire.AttrREP:
		return encode(&cmwire.REP{LocalCommID: theirs, RemoteCommID: ours, LocalQPN: peerQPN, LocalCAGUID: b.id,
			TargetAckDelay: small & 31, ResponderResources: small, InitiatorDepth: small})
	case cmwire.AttrRTU:
		return encode(&cmwire.RTU{LocalCommID: theirs, RemoteCommID: ours})
	case cmwire.AttrDREQ:
		return encode(&cmwire.DREQ{LocalCommID: theirs, RemoteCommID: ours, RemoteQPN: qpn})
	}
	return encode(&cmwire.DREP{LocalCommID: theirs, RemoteCommID: ours})
}

// wantBounded fails if a table holds what no connection accounts for, or more than its bound.
func wantBounded(t *testing.T, h *cmTestHost) {
	t.Helper()
	m := h.cm
	m.mu.Lock()
	defer m.mu.Unlock()
	pending, lingering, held := 0, 0, 0
	for id, c := range m.conns {
		if c.id != id || c.state == cmIdle {
			t.Errorf("connection %#x in %v is entered as %#x", c.id, c.state, id)
		}
		if c.slot {
			pending++
		}
		if c.state == cmTimewait && !c.active {
			lingering++
		}
		if c.held {
			held++
		}
		waits := c.state != cmEstab && c.state != cmRepRcvd && !c.unanswered() ||
			c.state == cmEstab && c.active && !c.heard && c.tries < cmMaxRTURepeats
		if waits != (c.timer != nil) {
			t.Errorf("connection in %v, with a timer: %v", c.state, c.timer != nil)
		}
		if c.state == cmEstab != (c.wasEstab && !isDone(c)) {
			t.Errorf("connection in %v, was established: %v, done: %v", c.state, c.wasEstab, isDone(c))
		}
	}
	for k, c := range m.byPeerID {
		if m.conns[c.id] != c || c.peerIDKey() != k {
			t.Errorf("connection in %v is left in the table of IDs", c.state)
		}
	}
	for k, c := range m.byPeerQPN {
		if m.conns[c.id] != c || c.peerQPNKey() != k || c.state == cmTimewait {
			t.Errorf("connection in %v is left in the table of QPNs", c.state)
		}
	}
	sum := 0
	for src, k := range m.pending {
		if k <= 0 || k > cmMaxPerSource {
			t.Errorf("%v has %d places", src, k)
		}
		sum += k
	}
	// A place outlives its connection only while its handler runs.
	if sum != m.nPending || pending > sum || sum > cmMaxPending || lingering != m.lingering {
		t.Errorf("places: %d by source, %d counted, %d held; %d in timewait, %d counted", sum, m.nPending, pending, lingering, m.lingering)
	}
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	holds := 0
	for _, q := range m.q.qps {
		holds += q.n
	}
	if holds != held {
		t.Errorf("%d QPNs held, by %d connections", holds, held)
	}
}
