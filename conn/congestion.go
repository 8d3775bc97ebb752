package conn

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// Congestion maps, both ways (rds-protocol spec 2.7).
//
// Out: each local address has one map (ourMap). Its changes have numbers, and the ports of the latest ones are kept. A connection remembers
// the number up to which its peer knows the map, from the whole one that each new link begins with. So what is due on a
// connection is known without a copy of what was sent: nothing, the ports that changed since, or, towards a kernel or when too many
// did, all of it. What is sent is read when it is posted: changes in the meantime go out as one.
//
//	changes      1    2    3    4    5    6    7
//	port       4000 4001 4000 4002 4000 4001 4005
//	                      ▲              ▲         ▲
//	                      │              │         └ a connection that is up to date
//	                      │              └ one that is due 4005
//	                      └ one that is due 4000, 4001, 4002, 4005, as they are now
//
// In: what is known of the peer's map belongs to the Peer, since all its connections tell of the same one. Those of two connections
// may cross, and each port is then for a moment what the slower one said; but each connection's last word on a port
// is what it is in the end.

// ourMap is the map of a local address. Guarded by site.mu.
type ourMap struct {
	ports rdshdr.CongMap
	ver   uint64         // changes so far
	log   [mapLog]uint16 // the port of change v is log[v % mapLog]

	changed uint64     // ports changed since the pusher looked, modulo 64
	counts  [64]uint16 // congested ports, by number modulo 64

	// What was posted last, for the other connections: it is the same for most. Each has a reference, and is dropped when
	// the map changes.
	whole     *slab.Chunk
	delta     *slab.Chunk
	deltaFrom uint64 // delta is the changes after that one
	deltaLen  int
}

// mapLog is how many changes are kept. A connection that is more behind gets a whole map, which is then cheaper to find than what
// changed, and not much longer.
const mapLog = 256

func (m *ourMap) set(port uint16, on bool) {
	if on {
		m.ports.Set(port)
		m.counts[port%64]++
	} else {
		m.ports.Clear(port)
		m.counts[port%64]--
	}
	m.ver++
	m.log[m.ver%mapLog] = port
	m.changed |= 1 << (port % 64)
	m.dropChunks()
}

func (m *ourMap) dropChunks() {
	for _, c := range [...]**slab.Chunk{&m.whole, &m.delta} {
		if *c != nil {
			(*c).Put()
			*c = nil
		}
	}
}

// mapUpdate is what brings a peer up to date.
type mapUpdate struct {
	chunk *slab.Chunk // nil: it is. A reference for the caller
	len   int         // of a delta; 0: the whole map
	ver   uint64      // what the peer then knows
}

// mapSince is what is due to a peer that knows the map as it was after change from, and takes deltas. fresh: it knows nothing.
func (s *site) mapSince(from uint64, fresh, deltas bool) (u mapUpdate, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.cong
	u.ver = m.ver
	switch {
	case !fresh && from == m.ver:
		return u, nil
	case !fresh && deltas && m.ver-from <= mapLog:
		if m.delta == nil || m.deltaFrom != from {
			if err = m.makeDelta(s.m.cfg.Slab, from); err != nil {
				return u, err
			}
		}
		u.chunk, u.len = m.delta, m.deltaLen
	default:
		if m.whole == nil {
			if m.whole, err = s.m.cfg.Slab.Alloc(rdshdr.CongMapLen); err != nil {
				return u, err
			}
			copy(m.whole.Bytes(), m.ports[:])
		}
		u.chunk = m.whole
	}
	u.chunk.Get()
	return u, nil
}

// makeDelta writes what has changed after change from, each port once.
func (m *ourMap) makeDelta(mem *slab.Slab, from uint64) error {
	c, err := mem.Alloc(rdshdr.CongDeltaLen(mapLog))
	if err != nil {
		return err
	}
	var seen rdshdr.CongMap
	var ports [2][mapLog]uint16 // congested ones, the others
	var n [2]int
	for v := from + 1; v <= m.ver; v++ {
		p := m.log[v%mapLog]
		if seen.Test(p) {
			continue
		}
		seen.Set(p)
		k := 1
		if m.ports.Test(p) {
			k = 0
		}
		ports[k][n[k]] = p
		n[k]++
	}
	if m.delta != nil {
		m.delta.Put()
	}
	m.delta, m.deltaFrom = c, from
	m.deltaLen = rdshdr.PutCongDelta(c.Bytes(), ports[0][:n[0]], ports[1][:n[1]])
	return nil
}

// setCongested changes the bit of port. It is called with sockets locked, so it leaves the sending to a goroutine; what changes
// meanwhile goes out with it.
func (s *site) setCongested(port uint16, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.cong
	if m.ports.Test(port) == on {
		return
	}
	m.set(port, on)
	s.crowded.Store(m.crowded())
	switch {
	case s.stopped:
	case s.pushing:
		select {
		case s.wake <- struct{}{}:
		default:
		}
	default:
		s.pushing = true
		s.m.wg.Add(1)
		go s.push()
	}
}

// crowded is the congested ports, modulo 64.
func (m *ourMap) crowded() (ports uint64) {
	for i, n := range m.counts {
		if n > 0 {
			ports |= 1 << i
		}
	}
	return ports
}

// pushGroup connections are told of a change at a time, those apart that concerns most, and then pushPause is left for others: a port that
// changes all the time may not keep 10,000 idle connections busy. All of 10,000 are told within 160 ms.
const (
	pushGroup = 64
	pushPause = time.Millisecond
)

// push tells the peers of changes: first those that have sent to the port lately, at once, then the others, group by group. A change
// meanwhile has its own senders told first, and the round begun again from where it is: nobody is passed over for ever.
func (s *site) push() {
	defer s.m.wg.Done()
	left, at := 0, 0
	for {
		s.mu.Lock()
		conns := s.conns // appended to, or replaced
		changed := s.cong.changed
		s.cong.changed = 0
		if changed != 0 {
			left = len(conns)
		}
		if left == 0 || s.stopped || len(conns) == 0 {
			s.pushing = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		if changed != 0 {
			for _, c := range conns {
				if (c.lately.Load()|c.before.Load())&changed != 0 {
					c.pushMap()
				}
			}
		}
		for n := min(left, pushGroup); n > 0; n-- {
			at = (at + 1) % len(conns)
			conns[at].pushMap()
			left--
		}
		if left > 0 {
			t := time.NewTimer(pushPause)
			select {
			case <-t.C:
			case <-s.wake:
			case <-s.m.done:
			}
			t.Stop()
		}
	}
}

// pushMap sends what is due of the local map if the connection is up; if it is not, the map is the first thing that is sent when
// it is.
func (c *Conn) pushMap() {
	c.mu.Lock()
	if !c.up || c.mapDue {
		c.mu.Unlock()
		return
	}
	c.mapDue = true
	c.m.count.congQueued.Inc()
	c.transmitLocked()
}

// sentTo notes that messages for these ports, modulo 64, have come. Receive handler.
func (c *Conn) sentTo(ports uint64) {
	for {
		old := c.lately.Load()
		if old|ports == old || c.lately.CompareAndSwap(old, old|ports) {
			return
		}
	}
}

// age forgets the ports that the peer has not sent to for one to two looks of the heartbeat, unless they are congested: it may be
// waiting for them.
func (c *Conn) age() {
	c.before.Store(c.lately.Swap(0) | c.before.Load()&c.site.crowded.Load())
}

// peerMap is a peer's congestion map as far as it is known. Reading takes no lock.
type peerMap struct {
	mu    sync.Mutex                   // serialises changes, of several connections and of the control side
	count atomic.Int32                 // congested ports
	words atomic.Pointer[peerMapWords] // nil: none
}

type peerMapWords [rdshdr.CongMapLen / 8]atomic.Uint64

// test is on the way of every datagram.
func (m *peerMap) test(port uint16) bool {
	w := m.words.Load()
	return w != nil && w[port/64].Load()>>(port%64)&1 != 0
}

// setLocked makes word i of the map w and appends the ports that are no longer congested to fell.
func (m *peerMap) setLocked(i int, w uint64, fell []uint16) []uint16 {
	words := m.words.Load()
	if words == nil {
		if w == 0 {
			return fell
		}
		words = new(peerMapWords)
		m.words.Store(words)
	}
	old := words[i].Load()
	if old == w {
		return fell
	}
	words[i].Store(w)
	m.count.Add(int32(bits.OnesCount64(w) - bits.OnesCount64(old)))
	for x := old &^ w; x != 0; x &= x - 1 {
		fell = append(fell, uint16(64*i+bits.TrailingZeros64(x)))
	}
	return fell
}

// replace takes a whole map, in pieces that are together as long as one.
func (m *peerMap) replace(first []byte, more []Frag, fell []uint16) []uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := 0
	var part [8]byte // a word that two pieces share
	n := 0
	take := func(b []byte) {
		for len(b) > 0 {
			if n == 0 && len(b) >= 8 {
				fell = m.setLocked(i, binary.LittleEndian.Uint64(b), fell)
				b, i = b[8:], i+1
				continue
			}
			k := copy(part[n:], b)
			b = b[k:]
			if n += k; n == 8 {
				fell = m.setLocked(i, binary.LittleEndian.Uint64(part[:]), fell)
				n, i = 0, i+1
			}
		}
	}
	take(first)
	for _, f := range more {
		take(f.Data)
	}
	return fell
}

// apply takes changes.
func (m *peerMap) apply(d rdshdr.CongDelta, fell []uint16) []uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range d.Len() {
		port, on := d.At(i)
		w := uint64(0)
		if words := m.words.Load(); words != nil {
			w = words[port/64].Load()
		}
		if on {
			w |= 1 << (port % 64)
		} else {
			w &^= 1 << (port % 64)
		}
		fell = m.setLocked(int(port/64), w, fell)
	}
	return fell
}

// clear is for a peer of which nothing is known any more.
func (m *peerMap) clear() (fell []uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.count.Load() > 0 {
		for i := range m.words.Load() {
			fell = m.setLocked(i, 0, fell)
		}
	}
	m.words.Store(nil)
	return fell
}

// trim gives back the memory of a map without congestion.
func (m *peerMap) trim() {
	if m.words.Load() == nil {
		return
	}
	m.mu.Lock()
	if m.count.Load() == 0 {
		m.words.Store(nil)
	}
	m.mu.Unlock()
}

// recvMap takes a whole map of the peer's. Receive handler.
func (c *Conn) recvMap(size int, first Frag, more []Frag) {
	k := &c.m.count
	if size != rdshdr.CongMapLen {
		k.mapBadLength.Inc()
		return
	}
	k.congReceived.Inc()
	c.rx.mapSeq, c.rx.mapKnown = 0, true
	// Most maps are empty, and found no other.
	p := &c.peer.cong
	if p.words.Load() == nil && emptyMap(first, more) {
		return
	}
	s := c.rx.scr
	s.fell = p.replace(first.Data, more, s.fell[:0])
	c.peer.tell(s.fell)
}

// noMap is half of a map without congestion, to compare with.
var noMap [rdshdr.FragLen]byte

func emptyMap(first Frag, more []Frag) bool {
	empty := func(b []byte) bool {
		for ; len(b) > len(noMap); b = b[len(noMap):] {
			if !bytes.Equal(b[:len(noMap)], noMap[:]) {
				return false
			}
		}
		return bytes.Equal(b, noMap[:len(b)])
	}
	if !empty(first.Data) {
		return false
	}
	for _, f := range more {
		if !empty(f.Data) {
			return false
		}
	}
	return true
}

// recvDelta takes changes to the peer's map. They come in order, behind a whole map: anything else is a peer that is not to be
// believed. Receive handler.
func (c *Conn) recvDelta(seq uint64, d rdshdr.CongDelta) error {
	rx := &c.rx
	if !d.Valid() || !rx.mapKnown || seq != rx.mapSeq+1 {
		return fmt.Errorf("%w: change %d to a congestion map, after %d, %d bytes", ErrBadFragment, seq, rx.mapSeq, len(d))
	}
	rx.mapSeq = seq
	c.m.count.congReceived.Inc()
	c.m.count.congDeltas.Inc()
	s := rx.scr
	s.fell = c.peer.cong.apply(d, s.fell[:0])
	c.peer.tell(s.fell)
	return nil
}
