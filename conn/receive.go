package conn

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// Why a connection was dropped for what its peer sent.
var (
	ErrBadChecksum = errors.New("message header with a bad checksum")
	ErrBadFragment = errors.New("fragment against the rules")
	ErrOverrun     = errors.New("peer passed the hard bound of what may be queued for it")
	errEarly       = errors.New("too much data before the handshake was through")
	errNoMark      = errors.New("first SEND is not the mark that was promised")
)

// rxState is the receive side of a connection. It belongs to the receive handler of the link's
// device, which is one goroutine at a time; to the control side while no link exists or the handler has nothing
// yet to bring.
type rxState struct {
	scr      *rxScratch
	ready    bool // the peer is known and SENDs are processed; before that they are kept in early
	wantMark bool // the first SEND is the peer's mark
	open     bool // the peer is one of us
	dead     bool // the connection is lost: what still comes is dropped
	early    []earlySend

	peerInc  uint64 // incarnation of the peer whose sequences these are; 0: a kernel, or nobody yet
	expected uint64 // next sequence; 0: any
	ack      uint64 // sequence to acknowledge, 0 none
	part     partial
	mapSeq   uint64 // changes to the peer's map since the whole one
	mapKnown bool   // which has come

	// Since the last batch ended.
	peerAck  uint64 // ack of the last SEND
	gotAck   bool
	asked    uint64 // messages that asked for an acknowledgement
	got      bool   // messages arrived
	sends    uint64
	gaps     uint64
	oldSeq   uint64
	credits  uint64
	ackFrame uint64

	traced bool      // stamp messages
	seen   time.Time // when the SEND being taken apart was taken from its completion, if traced

	pongs pongs

	expectedSeen atomic.Uint64 // expected, for Info
}

type earlySend struct {
	b *ibdev.RecvBuf
	n int
}

// maxEarly bounds what is kept before our own handshake has returned: the peer may send as soon as it has
// our RTU. It has no more than its window in flight.
const maxEarly = 256

// partial is a message of which not all fragments are here. Its frags hold references.
type partial struct {
	active       bool
	seq          uint64
	len, got     int
	sport, dport uint16
	flags        uint8
	ext          Ext // of the first header
	frags        []Frag
}

func (p *partial) drop() {
	for i := range p.frags {
		p.frags[i].Buf.Put()
		p.frags[i] = Frag{}
	}
	p.frags = p.frags[:0]
	p.active = false
}

// rxScratch is where a device's receive handler gathers messages: of one connection at a time.
type rxScratch struct {
	conn  *Conn
	msgs  []Incoming
	frags []Frag           // of messages in more than one piece
	exts  []Ext            // of messages with extensions
	bufs  []*ibdev.RecvBuf // to put when the messages have been delivered
	ports uint64           // that they are for, modulo 64
	fell  []uint16         // congestion.go

	// State of conn.rx before msgs[0], in case the Sink does not take it.
	expected, ack uint64
}

const (
	// deliverBatch is how many messages go to the Sink at once: 40 KiB of descriptions.
	deliverBatch = 512
	// heldBufs is how many buffers a batch holds at most before it delivers and gives them back warm.
	heldBufs = 16
)

// RecvSend implements ib.Upper.
func (c *Conn) RecvSend(l *ib.Link, b *ibdev.RecvBuf, n int) {
	rx := &c.rx
	switch {
	case rx.dead:
		b.Put()
	case !rx.ready:
		if len(rx.early) == maxEarly {
			c.m.count.recvEarlyDropped.Inc()
			b.Put()
			c.dropLink(l, errEarly)
			return
		}
		rx.early = append(rx.early, earlySend{b, n})
	case rx.wantMark:
		var mark rdshdr.Mark
		ok := mark.ParseSend(b.Bytes()[:n])
		b.Put()
		if !ok {
			c.dropLink(l, errNoMark)
			return
		}
		rx.wantMark = false
		c.gotMark(l, &mark)
	default:
		c.recvSend(l, b, n)
	}
}

// gotMark takes the mark of a peer whose REQ had no room for it. Receive handler.
func (c *Conn) gotMark(l *ib.Link, mark *rdshdr.Mark) {
	c.meet(true, mark.Incarnation)
	c.mu.Lock()
	c.ctl.theirMark = *mark
	close(c.ctl.markKnown)
	c.mu.Unlock()
}

// dropLink ends the link for something its peer did. The peer stays away for a while: it would do it again.
// Receive handler.
func (c *Conn) dropLink(l *ib.Link, err error) {
	c.rx.dead = true
	c.penalise()
	l.Fail(err)
}

// recvSend takes a SEND apart. It has b's reference.
func (c *Conn) recvSend(l *ib.Link, b *ibdev.RecvBuf, n int) {
	rx, s := &c.rx, c.rx.scr
	if s.conn != c {
		if s.conn != nil {
			s.conn.deliver(s)
		}
		s.begin(c)
	}
	rx.sends++
	if rx.traced = c.m.tracing.Load() > 0; rx.traced {
		rx.seen = time.Now()
	}
	s.bufs = append(s.bufs, b)
	data := b.Bytes()[:n]
	for {
		if !rdshdr.Valid(data) {
			if len(data) < hdrLen {
				c.m.count.recvBadFragment.Inc()
				c.dropLink(l, fmt.Errorf("%w: %d bytes where a header should be", ErrBadFragment, len(data)))
			} else {
				c.m.count.recvBadChecksum.Inc()
				c.dropLink(l, ErrBadChecksum)
			}
			return
		}
		h := rdshdr.Header(data)
		rx.peerAck, rx.gotAck = h.Ack(), true
		if h.Credit() != 0 {
			rx.credits++
		}
		payload := data[hdrLen:]
		if h.SPort() == 0 && h.DPort() == 0 && len(payload) == 0 && h.Len() == 0 {
			rx.ackFrame++
			break
		}
		k, err := c.fragment(s, b, h, payload)
		if err != nil {
			c.m.count.recvBadFragment.Inc()
			c.dropLink(l, err)
			return
		}
		if rx.dead || k == len(payload) {
			break
		}
		data = payload[k:]
	}
	if len(s.bufs) >= heldBufs {
		c.deliver(s)
	}
}

// fragment processes the fragment that begins payload and returns its length. The rules: towards a kernel a SEND is one
// fragment, of 4096 bytes or what is left; between two of ours a fragment reaches to the end of its message or of its
// SEND, and one that is not the last has at least minSplit bytes, which bounds how many buffers a
// message can hold. Fragments of a message follow each other (rds-protocol spec 3.5).
func (c *Conn) fragment(s *rxScratch, b *ibdev.RecvBuf, h rdshdr.Header, payload []byte) (int, error) {
	p := &c.rx.part
	size, got := int(h.Len()), 0
	if p.active && c.rx.open && h.IsMap() && size == rdshdr.CongMapLen && len(payload) >= size {
		// Between two of ours a map does not wait for the end of a message, which in a stream of SENDs that all end in
		// the middle of one might never come.
		c.recvMap(size, Frag{b, payload[:size:size]}, nil)
		return size, nil
	}
	if c.rx.open && h.Flags() == rdshdr.FlagCongDelta {
		if size > len(payload) {
			return 0, fmt.Errorf("%w: %d bytes of %d that changed in a congestion map", ErrBadFragment, len(payload), size)
		}
		return size, c.recvDelta(h.Seq(), rdshdr.CongDelta(payload[:size]))
	}
	if p.active {
		if h.Seq() != p.seq || size != p.len || h.SPort() != p.sport || h.DPort() != p.dport {
			return 0, fmt.Errorf("%w: of message %d in the middle of message %d", ErrBadFragment, h.Seq(), p.seq)
		}
		got = p.got
	}
	if size > MaxMessage {
		return 0, fmt.Errorf("%w: message of %d bytes", ErrBadFragment, size)
	}
	left := size - got
	k := min(left, len(payload))
	if c.rx.open {
		if k < left && k < minSplit {
			return 0, fmt.Errorf("%w: %d bytes, %d are left", ErrBadFragment, k, left)
		}
	} else if len(payload) != min(left, rdshdr.FragLen) {
		// A kernel would take a short one and deliver stale bytes (rds-protocol spec 8.3, X12).
		return 0, fmt.Errorf("%w: %d bytes, %d are left", ErrBadFragment, len(payload), left)
	}
	if k == left && !p.active {
		// The usual case: a message in one piece.
		var x *Ext
		if h.HasExt() || c.rx.traced {
			x = s.ext(h)
		}
		c.message(s, h.Seq(), size, h.SPort(), h.DPort(), h.Flags(), x, Frag{b, payload[:k:k]}, nil)
		return k, nil
	}
	if !p.active {
		*p = partial{active: true, seq: h.Seq(), len: size, sport: h.SPort(), dport: h.DPort(), flags: h.Flags(), frags: p.frags}
		if h.HasExt() || c.rx.traced {
			if x := s.ext(h); x != nil {
				p.ext = *x
			}
		}
	}
	if k < left {
		b.Get()
		p.frags = append(p.frags, Frag{b, payload[:k:k]})
		p.got += k
		return k, nil
	}
	// The last piece. The earlier ones' references are put after the delivery. ACK_REQUIRED counts on any
	// fragment between two of ours, whose last header is the one that is stamped when it leaves.
	flags := p.flags
	if c.rx.open {
		flags |= h.Flags() & rdshdr.FlagAckRequired
	}
	at := len(s.frags)
	for _, f := range p.frags {
		s.bufs = append(s.bufs, f.Buf)
	}
	s.frags = append(s.frags, p.frags[1:]...)
	s.frags = append(s.frags, Frag{b, payload[:k:k]})
	firstFrag := p.frags[0]
	clear(p.frags)
	p.frags = p.frags[:0]
	p.active = false
	var x *Ext
	if p.ext != (Ext{}) {
		s.exts = append(s.exts, p.ext)
		x = &s.exts[len(s.exts)-1]
	}
	c.message(s, p.seq, size, p.sport, p.dport, flags, x, firstFrag, s.frags[at:len(s.frags):len(s.frags)])
	return k, nil
}

// message processes a complete message.
func (c *Conn) message(s *rxScratch, seq uint64, size int, sport, dport uint16, flags uint8, x *Ext, first Frag, more []Frag) {
	rx := &c.rx
	if flags == rdshdr.FlagCongBitmap {
		// Anything else in the flags makes it an ordinary message to port 0, which nobody answers.
		c.recvMap(size, first, more)
		return
	}
	if flags&rdshdr.FlagAckRequired != 0 {
		rx.asked++
	}
	rx.got = true
	if seq < rx.expected && (rx.open || flags&rdshdr.FlagRetransmitted != 0) {
		// Seen before: dropped, and acknowledged.
		rx.oldSeq++
		if !rx.open {
			rx.ack = seq
		}
		return
	}
	if rx.expected != 0 && seq > rx.expected {
		rx.gaps++
	}
	if dport == 0 || sport == 0 && (dport == 1 || dport == PingSourcePort && c.takePong()) {
		// A ping, or nothing: an ordinary message to port 0 from port 0, the answer to a probe we never make, or
		// to a ping of ours.
		rx.expected, rx.ack = seq+1, seq
		if dport == 0 && sport != 0 {
			c.m.count.recvPing.Inc()
			c.pong(sport)
		}
		if len(s.msgs) == 0 {
			s.expected, s.ack = rx.expected, rx.ack
		}
		return
	}
	rx.expected, rx.ack = seq+1, seq
	s.ports |= 1 << (dport % 64)
	s.msgs = append(s.msgs, Incoming{Seq: seq, Len: size, SrcPort: sport, DstPort: dport, First: first, More: more, Ext: x})
	if len(s.msgs) >= deliverBatch {
		s.flush()
	}
}

func (s *rxScratch) begin(c *Conn) {
	s.conn = c
	s.expected, s.ack = c.rx.expected, c.rx.ack
}

// flush hands the gathered messages to the Sink. The buffers stay until deliver: the SEND in hand goes on.
func (s *rxScratch) flush() {
	c := s.conn
	if len(s.msgs) == 0 {
		return
	}
	m := c.m
	bytes := 0
	for i := range s.msgs {
		bytes += s.msgs[i].Len
	}
	c.sentTo(s.ports) // before the Sink finds a port congested by them
	s.ports = 0
	c.delivered.Inc()
	n := m.cfg.Sink.Deliver(c, s.msgs)
	if n < len(s.msgs) {
		// Nothing from msgs[n] on has been received. The peer sends it again on the next connection, which
		// waits: only that peer pays.
		for i := n; i < len(s.msgs); i++ {
			bytes -= s.msgs[i].Len
		}
		if n > 0 {
			s.ack = s.msgs[n-1].Seq
			s.expected = s.ack + 1
		}
		c.rx.expected, c.rx.ack = s.expected, s.ack
		m.count.recvRefused.Add(uint64(len(s.msgs) - n))
		c.penalise()
		c.rx.dead = true
		c.rx.part.drop()
		c.failLink(ErrOverrun)
	}
	m.count.recvMessages.Add(uint64(n))
	m.count.recvBytes.Add(uint64(bytes))
	s.msgs, s.frags, s.exts = s.msgs[:0], s.frags[:0], s.exts[:0]
	s.expected, s.ack = c.rx.expected, c.rx.ack
}

// deliver ends the gathering for s.conn.
func (c *Conn) deliver(s *rxScratch) {
	s.flush()
	for i, b := range s.bufs {
		b.Put()
		s.bufs[i] = nil
	}
	s.bufs = s.bufs[:0]
	s.frags, s.exts = s.frags[:0], s.exts[:0] // also of what was not for the Sink: maps, old messages
	s.conn = nil
}

// BatchEnd implements ib.Upper.
func (c *Conn) BatchEnd(l *ib.Link, recv bool) {
	if !recv {
		// Slots are free and SENDs acknowledged.
		c.mu.Lock()
		if !c.up || c.link != l || c.txBusy || !c.due() {
			c.mu.Unlock()
			return
		}
		c.transmitLocked()
		return
	}
	if s := c.rx.scr; s.conn == c {
		c.deliver(s)
	}
	c.endReceive(l)
}

// due reports whether there may be something to post.
func (c *Conn) due() bool { return c.q.next != c.q.tail || c.ackNow || c.mapDue || c.markDue }

// endReceive publishes what a batch has brought: our acknowledgement, the peer's, and what is due because of
// it leaves together.
func (c *Conn) endReceive(l *ib.Link) {
	rx, k := &c.rx, &c.m.count
	k.recvSends.Add(rx.sends)
	if rx.gaps|rx.oldSeq|rx.credits|rx.ackFrame != 0 {
		k.recvGap.Add(rx.gaps)
		k.recvOldSeq.Add(rx.oldSeq)
		k.rxCredits.Add(rx.credits)
		k.ackReceived.Add(rx.ackFrame)
		rx.gaps, rx.oldSeq, rx.credits, rx.ackFrame = 0, 0, 0, 0
	}
	rx.sends = 0
	rx.expectedSeen.Store(rx.expected)
	r := released{acked: true}
	c.mu.Lock()
	if c.link != l {
		c.mu.Unlock()
		return
	}
	c.beat.heard = true
	if rx.gotAck {
		rx.gotAck = false
		c.ackedLocked(rx.peerAck, &r) // lets go of mu in between
	}
	if rx.got {
		rx.got = false
		c.ackNext = rx.ack
		if rx.asked > 0 {
			c.ackNow = true
			k.recvAckRequired.Add(rx.asked)
			rx.asked = 0
		} else if !c.ackNow && c.ackNext != c.ackSent && !c.ackArmed {
			c.armAckLocked()
		}
	}
	if !c.up || c.txBusy || !c.due() {
		c.mu.Unlock()
	} else {
		c.transmitLocked()
	}
	r.tell()
}
