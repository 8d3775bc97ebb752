package conn

import (
	"go.uber.org/atomic"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// The send queue of a connection: every message that was accepted and not yet acknowledged. It is
// the kernel's send queue and retransmit queue in one, in sequence order:
//
//	    una                    next                      tail
//	     │    handed to the     │     not yet sent        │
//	─────┼──────────────────────┼─────────────────────────┼──────▶ sequence
//	     │  (retransmit queue)  │      (send queue)       │
//
// una moves with the peer's acknowledgements, next with the transmitter, tail with Send. A lost
// connection sets next back to una.
//
// Payloads lie in slab chunks, copied there once, each behind room for its header:
//
//	chunk  ┌────┬─────────┬────┬─────────┬────┬─────────────────┐╶ ╶ ╶ ┐
//	       │hdr │ message │hdr │ message │hdr │ message, part 1 │       │
//	       └────┴─────────┴────┴─────────┴────┴─────────────────┘╶ ╶ ╶ ┘
//	chunk  ┌────┬──────────────────┬────┬────────               ▲
//	       │hdr │ message, part 2  │hdr │ ...                   ibdev.MaxSend,
//	       └────┴──────────────────┴────┴────────               or slab.Small
//
// so that between two of ours a SEND is a range of one chunk: one SGE, whatever it packs. Headers are
// written when the message is queued, while its memory is warm, and the last one of a SEND again when it is
// posted, since its acknowledgement is the one that counts (pack.go). Towards a kernel the
// same bytes are cut differently.
//
// All of it is guarded by Conn.mu, except that a large payload is copied without it.
type sendQueue struct {
	mem    *slab.Slab
	budget *memBudget // of all queues together
	max    int        // messages

	una, next, tail uint64
	nextOff         int    // payload bytes of message next that are in SENDs already
	handed          uint64 // messages below were posted to their end, on some connection
	again           uint64 // messages below were posted to their end on an earlier connection: RETRANSMITTED
	everSent        uint64 // messages below were posted at least in part; no ack from here on is believed

	ring      []msg // sequence s is ring[s & mask]; a power of two
	bytes     int   // payload of una..tail, cancelled ones excluded
	cancelled int   // messages in una..tail that are cancelled
	copying   int   // messages in next..tail that are not ready
	filler    int   // messages in next..tail that are cancelled or not ready: packing goes one by one

	// Chunks by serial number; the last one is being filled.
	chunks            []chunk // serial n is chunks[n & mask]; a power of two
	firstSer, lastSer uint32  // lastSer is one past the last

	sides map[uint64]side // of messages with msgSide: rdma.go

	runSer uint32 // open dialect, nextOff > 0: the chunk that the rest of message next begins

	// Towards a kernel, of the message being cut: all its fragments carry the same header.
	cutAck   uint64
	cutFlags uint8
	// Messages and bytes until the next ACK_REQUIRED (rds-protocol spec 3.6). The first message of a connection
	// asks.
	ackMsgs, ackBytes int
}

// msg is a queued message.
type msg struct {
	owner        Owner // nil: our own, or cancelled
	len          uint32
	have         uint32 // payload bytes that are there already, if it is not ready: whole pieces
	ser          uint32 // chunk of its first piece
	off          uint16 // of its first header in there
	sport, dport uint16
	flags        uint8
}

const (
	msgReady     uint8 = 1 << iota // all of the payload is there
	msgCancelled                   // not to be sent (again)
	msgAckNow                      // AckNow was asked for
	msgSide                        // has an entry in sides
	msgOp                          // has an operation that has to be posted first
)

// chunk is a slab chunk with messages.
type chunk struct {
	c    *slab.Chunk
	mem  []byte
	size int    // bytes that may be laid out
	used int    // bytes laid out
	last uint64 // highest sequence with a piece here
	full bool   // nothing is added any more
	cont bool   // message last goes on in the next chunk
}

const (
	hdrLen = rdshdr.HeaderLen
	// pieceLen is the payload of a piece that has a large chunk to itself: all pieces of a message but the first and the
	// last are of this length.
	pieceLen = ibdev.MaxSend - hdrLen
	// noSplit is the largest message that is never spread over two chunks only to fill the first: its
	// receiver would hold two buffers and copy twice. That leaves at most an eighth of a SEND unused.
	noSplit = 7 << 10
	// minSplit is the least payload worth starting a message with at the end of a chunk, and the
	// least that a fragment which is not the last may carry (receive.go).
	minSplit = 4096
	// copyLocked is the largest payload that is copied with Conn.mu held: about a microsecond. It never takes more
	// than one piece.
	copyLocked = noSplit
	// smallLen is the largest message for which an empty queue takes a small chunk.
	smallLen = 1 << 10
	// minRing is the capacity of an idle queue.
	minRing = 16

	// Towards a kernel: max_unacked_packets, and far less than max_unacked_bytes (16 MiB), which is more than a
	// socket may have queued.
	kernelAckMsgs  = 8
	kernelAckBytes = 256 << 10
	maxPieces      = MaxMessage/pieceLen + 3
)

// memBudget bounds the slab memory of all send queues. They may not take all of it: receive buffers and header slots are
// what brings the acknowledgements that free it again.
type memBudget struct {
	used  atomic.Int64 // bytes
	limit int64
}

func (b *memBudget) take(n int) bool {
	if b.used.Add(int64(n)) > b.limit {
		b.used.Sub(int64(n))
		return false
	}
	return true
}

func (b *memBudget) give(n int) { b.used.Sub(int64(n)) }

func (q *sendQueue) init(mem *slab.Slab, budget *memBudget, maxMsgs int, first uint64) {
	q.mem, q.budget, q.max = mem, budget, maxMsgs
	q.una, q.next, q.tail, q.handed, q.again, q.everSent = first, first, first, first, first, first
	q.ackBytes = kernelAckBytes
}

func (q *sendQueue) msg(seq uint64) *msg     { return &q.ring[seq&uint64(len(q.ring)-1)] }
func (q *sendQueue) chunk(ser uint32) *chunk { return &q.chunks[ser&uint32(len(q.chunks)-1)] }
func (q *sendQueue) queued() int             { return int(q.tail - q.una) }
func (q *sendQueue) unsent() int             { return int(q.tail - q.next) }

// append lays out a message of n bytes behind the others and returns its sequence and the memory of its
// first piece, into which the caller copies. If the message is longer than copyLocked it is not ready: the caller
// copies to all its pieces, with or without the lock, and calls ready. A message with a Buffer has its n bytes there, and is
// ready. False: no memory, and nothing was changed.
func (q *sendQueue) append(o Owner, sport, dport uint16, n int, ack uint64, flags uint8, b *Buffer) (seq uint64, first []byte, ok bool) {
	if q.queued() == len(q.ring) && !q.growRing() {
		return 0, nil, false
	}
	var ser uint32
	if b != nil {
		ser = q.adopt(b)
	} else if ser, ok = q.place(n, flags&msgOp != 0); !ok {
		return 0, nil, false
	}
	seq = q.tail
	c := q.chunk(ser)
	if n <= copyLocked || b != nil {
		flags |= msgReady
	} else {
		q.copying++
		q.filler++
	}
	var hflags uint8
	if flags&msgAckNow != 0 {
		hflags = rdshdr.FlagAckRequired
	}
	*q.msg(seq) = msg{owner: o, len: uint32(n), ser: ser, off: uint16(c.used), sport: sport, dport: dport, flags: flags}
	for left := n; ; {
		k := min(left, c.size-c.used-hdrLen)
		rdshdr.Put(c.mem[c.used:], seq, ack, uint32(n), sport, dport, hflags, 0)
		if left == n {
			first = c.mem[c.used+hdrLen : c.used+hdrLen+k]
		}
		c.used += hdrLen + k
		c.last = seq
		if left -= k; left == 0 {
			break
		}
		c.full, c.cont = true, true
		ser++
		c = q.chunk(ser)
	}
	if c.size-c.used < hdrLen || flags&msgOp != 0 {
		c.full = true
	}
	q.tail++
	q.bytes += n
	return seq, first, true
}

// place finds the chunk where a message of n bytes begins, and adds the chunks it goes on in. alone: it begins one.
func (q *sendQueue) place(n int, alone bool) (ser uint32, ok bool) {
	if alone || q.firstSer == q.lastSer || q.chunk(q.lastSer-1).full {
		ser = q.lastSer
		if ok = q.addChunks(n, alone); ok && ser != q.firstSer {
			q.chunk(ser - 1).full = true
		}
		return ser, ok
	}
	ser = q.lastSer - 1
	c := q.chunk(ser)
	avail := c.size - c.used - hdrLen
	if n <= avail {
		return ser, true
	}
	if n > noSplit && avail >= minSplit {
		ok = q.addChunks(n-avail, false)
		return ser, ok
	}
	if !q.addChunks(n, false) {
		return 0, false
	}
	q.chunk(ser).full = true
	return ser + 1, true
}

// addChunks appends empty chunks for n bytes of payload, or none. A short message to an idle peer gets a
// small one: that is all that most idle connections ever have. So does one that is to be alone.
func (q *sendQueue) addChunks(n int, alone bool) bool {
	k := max(1, (n+pieceLen-1)/pieceLen)
	for have := int(q.lastSer - q.firstSer); have+k > len(q.chunks); {
		q.growChunks()
	}
	size, mem := ibdev.MaxSend, slab.Large
	if n <= smallLen && q.una == q.tail || alone && n <= slab.Small-hdrLen {
		size, mem = slab.Small, slab.Small
	}
	if !q.budget.take(k * mem) {
		return false
	}
	for i := range k {
		c, err := q.mem.Alloc(mem)
		if err != nil {
			q.budget.give((k - i) * mem)
			for ; i > 0; i-- {
				q.lastSer--
				q.dropChunk(q.lastSer)
			}
			return false
		}
		*q.chunk(q.lastSer) = chunk{c: c, mem: c.Bytes(), size: size}
		q.lastSer++
	}
	return true
}

func (q *sendQueue) dropChunk(ser uint32) {
	c := q.chunk(ser)
	c.c.Put()
	q.budget.give(len(c.mem))
	*c = chunk{}
}

func (q *sendQueue) growChunks() {
	old, oldMask := q.chunks, uint32(len(q.chunks)-1)
	q.chunks = make([]chunk, max(2, 2*len(old)))
	for s := q.firstSer; s != q.lastSer; s++ {
		*q.chunk(s) = old[s&oldMask]
	}
}

func (q *sendQueue) growRing() bool {
	old, oldMask := q.ring, uint64(len(q.ring)-1)
	if len(old) >= q.max {
		return false
	}
	q.ring = make([]msg, max(minRing, 2*len(old)))
	for s := q.una; s != q.tail; s++ {
		*q.msg(s) = old[s&oldMask]
	}
	return true
}

// at is where byte p of the payload of m lies: the chunk, the place in it, and how many bytes of payload
// follow there. p may be the length of the payload only if that is 0.
func (q *sendQueue) at(m *msg, p int) (ser uint32, off, n int) {
	first := min(int(m.len), q.chunk(m.ser).size-int(m.off)-hdrLen)
	if p < first || m.len == 0 {
		return m.ser, int(m.off) + hdrLen + p, first - p
	}
	k := (p - first) / pieceLen
	in := (p - first) % pieceLen
	rest := int(m.len) - first - k*pieceLen
	return m.ser + 1 + uint32(k), hdrLen + in, min(rest, pieceLen) - in
}

// pieces fills parts with the memory of a message's payload, and returns how many there are. The memory
// stays where it is while the message is not ready.
func (q *sendQueue) pieces(seq uint64, parts *[maxPieces][]byte) int {
	m := q.msg(seq)
	n := 0
	for p := 0; p < int(m.len); {
		ser, off, k := q.at(m, p)
		parts[n] = q.chunk(ser).mem[off : off+k : off+k]
		n++
		p += k
	}
	return n
}

// copied says that the first have bytes of a message that is not ready have been copied: a whole number of pieces. They
// may be sent.
func (q *sendQueue) copied(seq uint64, have int) { q.msg(seq).have = uint32(have) }

// mayCut reports whether n bytes of payload from off on may be sent. The end of a message that is not ready may not:
// it is not taken off the queue under the hands of who copies.
func (m *msg) mayCut(off, n int) bool { return m.flags&msgReady != 0 || off+n <= int(m.have) }

// ready says that the payload of a message longer than copyLocked has been copied.
func (q *sendQueue) ready(seq uint64) {
	q.msg(seq).flags |= msgReady
	q.copying--
	q.filler--
}

// runFull reports whether the next SEND to one of ours would be a full one.
func (q *sendQueue) runFull() bool {
	if q.next == q.tail {
		return false
	}
	ser, _ := q.cursor()
	return q.chunk(ser).full
}

// released is what a message queue gives back: to its owners when the lock is off.
type released struct {
	acked bool // by the peer
	n     int
	runs  [32]releasedRun
	op    endedOp   // the first
	ops   []endedOp // the rest
}

type releasedRun struct {
	owner       Owner
	msgs, bytes int
}

// add accounts a message and reports false if it has no room for another owner.
func (r *released) add(o Owner, bytes int) bool {
	if o == nil {
		return true
	}
	if r.n > 0 && r.runs[r.n-1].owner == o {
		last := &r.runs[r.n-1]
		last.msgs++
		last.bytes += bytes
		return true
	}
	if r.n == len(r.runs) {
		return false
	}
	r.runs[r.n] = releasedRun{o, 1, bytes}
	r.n++
	return true
}

// some reports whether there is anything to tell.
func (r *released) some() bool { return r.n > 0 || r.op.o != nil }

// tell calls the owners. No lock is held.
func (r *released) tell() {
	for i := range r.runs[:r.n] {
		run := &r.runs[i]
		run.owner.Released(run.msgs, run.bytes, r.acked)
		run.owner = nil
	}
	r.n = 0
	if r.op.o != nil {
		first, rest := r.op, r.ops
		r.op, r.ops = endedOp{}, nil
		first.tell()
		for _, e := range rest {
			e.tell()
		}
	}
}

// popBatch bounds how many messages are taken off under one hold of the lock: some 20 us.
const popBatch = 4096

// ack takes off messages up to and including sequence upTo, into r. It returns how many, and whether it
// stopped early and is to be called again when r has been told. The caller has checked that upTo was sent.
func (q *sendQueue) ack(upTo uint64, r *released) (n int, more bool) {
	end := upTo + 1
	if end <= q.una {
		return 0, false
	}
	if end > q.next {
		// Acknowledged on an earlier connection, and not resent yet. A message that is half sent is sent to
		// its end: the peer has begun to receive it.
		if q.nextOff > 0 {
			end = q.next
		} else {
			for ; q.next != end; q.next++ {
				m := q.msg(q.next)
				if m.flags&(msgReady|msgOp) != msgReady {
					end = q.next // cannot be: it was never sent to its end
					break
				}
				if m.flags&msgCancelled != 0 {
					q.filler--
				}
			}
		}
	}
	for q.una < end {
		m := q.msg(q.una)
		if n == popBatch || !r.add(m.owner, int(m.len)) {
			more = true
			break
		}
		q.pop(m, r)
		n++
	}
	if more {
		q.freeChunks()
	} else {
		q.trimHead()
	}
	return n, more
}

// pop forgets message una. r may be nil for one whose operation is not queued.
func (q *sendQueue) pop(m *msg, r *released) {
	if m.flags&(msgCancelled|msgSide) == 0 {
		q.bytes -= int(m.len)
	} else {
		if m.flags&msgSide != 0 {
			q.dropSide(q.una, r)
		}
		if m.flags&msgCancelled != 0 {
			q.cancelled--
		} else {
			q.bytes -= int(m.len)
		}
	}
	m.owner = nil
	q.una++
}

// trimHead takes off messages at the head that were cancelled, since nobody acknowledges what was not sent, and gives
// back the chunks that hold nothing any more.
func (q *sendQueue) trimHead() {
	for q.cancelled > 0 && q.una != q.tail {
		m := q.msg(q.una)
		if m.flags&msgCancelled == 0 {
			break
		}
		if q.una == q.next {
			if q.nextOff > 0 {
				break
			}
			q.next++
			q.filler--
		}
		q.pop(m, nil)
	}
	q.freeChunks()
}

// freeChunks gives back the chunks that hold no message any more, except the one being filled.
func (q *sendQueue) freeChunks() {
	for q.firstSer != q.lastSer {
		if c := q.chunk(q.firstSer); c.last >= q.una || !c.full {
			return
		}
		q.dropChunk(q.firstSer)
		q.firstSer++
	}
}

// cancelRange marks the messages of o to dport (-1: all) among from..from+popBatch as not to be sent, and returns where to go on:
// q.tail when it is through. A message being sent is sent to its end; one already sent is only not sent again.
func (q *sendQueue) cancelRange(o Owner, dport int, from uint64, r *released) (upTo uint64, n int) {
	s := max(from, q.una)
	for end := min(q.tail, s+popBatch); s < end; s++ {
		m := q.msg(s)
		if !isOwner(m.owner, o) || dport >= 0 && int(m.dport) != dport || m.flags&(msgReady|msgCancelled) != msgReady {
			continue
		}
		if !r.add(m.owner, int(m.len)) {
			break
		}
		if m.flags&msgSide != 0 {
			q.cancelOp(s, r)
		}
		q.cancelMsg(s, m)
		n++
	}
	q.trimHead()
	return s, n
}

// isOwner reports whether a message of m is o's.
func isOwner(m, o Owner) bool {
	if m == o {
		return true
	}
	p, ok := m.(Part)
	return ok && p.Whole() == o
}

// rewind sets the queue back to what has to be sent again on a new connection.
func (q *sendQueue) rewind() {
	q.again = max(q.again, q.handed)
	q.next, q.nextOff = q.una, 0
	q.ackMsgs, q.ackBytes = kernelAckMsgs, kernelAckBytes
	q.filler = q.copying
	if q.cancelled > 0 {
		q.trimHead()
		q.filler = 0
		for s := q.next; s != q.tail; s++ {
			if m := q.msg(s); m.flags&msgCancelled != 0 || m.flags&msgReady == 0 {
				q.filler++
			}
		}
	}
}

// ours reports whether a message is a ping or pong of the connection's own, which nobody has written.
func (m *msg) ours() bool { return m.sport == 0 || m.sport == PingSourcePort && m.dport == 0 }

// owes reports whether there is anything that somebody has written, and not cancelled.
func (q *sendQueue) owes() bool {
	for s := q.una; s != q.tail; s++ {
		if m := q.msg(s); m.flags&msgCancelled == 0 && !m.ours() {
			return true // most often the first
		}
	}
	return false
}

// drop takes off everything, into r, as far as r has room and payloads are not being copied. It returns how many messages of others
// there were, and whether the queue is empty.
// There is no connection any more.
func (q *sendQueue) drop(r *released) (n int, empty bool) {
	for q.una != q.tail {
		m := q.msg(q.una)
		if m.flags&msgReady == 0 || !r.add(m.owner, int(m.len)) {
			break
		}
		if m.flags&msgCancelled == 0 && !m.ours() {
			n++
		}
		q.pop(m, r)
	}
	q.next, q.nextOff, q.filler = q.una, 0, q.cancelled+q.copying
	q.freeChunks()
	return n, q.una == q.tail
}

// trim gives back memory of an idle queue.
func (q *sendQueue) trim() {
	if q.una != q.tail {
		return
	}
	for q.firstSer != q.lastSer {
		q.dropChunk(q.firstSer)
		q.firstSer++
	}
	if len(q.ring) > minRing {
		q.ring = nil
	}
	q.chunks = nil
}
