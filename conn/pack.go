package conn

import (
	"github.com/openrds/openrds/conn/ib"
	"github.com/openrds/openrds/internal/wire/rdshdr"
)

// Packing makes SENDs of the send queue.
//
// Between two of ours a SEND is what a chunk holds from the cursor on: whole messages and fragments, each
// with its header. A fragment that is not the last of its message reaches to the end of its SEND, so the receiver needs no
// fragment length. The acknowledgement and the flags of the last header are the SEND's.
//
// Towards a kernel, and towards a peer that takes only small SENDs, each SEND is one fragment, of exactly
// the same size but for the last (rds-protocol spec 3.5). Its header lies in front of the first piece of the
// message, and otherwise in the header slot of the SEND.

// packRun makes the next SEND to one of ours. With onlyFull it makes none unless the SEND cannot grow any more. ask
// sets ACK_REQUIRED. retrans counts messages that go out again.
func (q *sendQueue) packRun(s *ib.Send, ack uint64, ask, onlyFull bool) (ok bool, retrans int) {
	if q.filler > 0 || q.next < q.again {
		return q.packSlowly(s, ack, ask, onlyFull)
	}
	if q.next == q.tail {
		return false, 0
	}
	ser, off := q.cursor()
	c := q.chunk(ser)
	if onlyFull && !c.full {
		return false, 0
	}
	last := q.msg(c.last)
	at := 0 // of the last header in the chunk
	if last.ser == ser {
		at = int(last.off)
	}
	q.setSend(s, c, off, c.used)
	q.stamp(c, at, c.last, last, ack, ask)
	if c.cont {
		sent := c.used - at - hdrLen
		if c.last == q.next {
			sent += q.nextOff
		}
		q.next, q.nextOff, q.runSer = c.last, sent, ser+1
	} else {
		q.next, q.nextOff = c.last+1, 0
	}
	q.everSent = max(q.everSent, q.next, c.last+1)
	return true, 0
}

// packSlowly is packRun message by message: some are cancelled, not copied yet, or being resent.
func (q *sendQueue) packSlowly(s *ib.Send, ack uint64, ask, onlyFull bool) (ok bool, retrans int) {
	q.skipCancelled()
	if q.next == q.tail {
		return false, 0
	}
	ser, off := q.cursor()
	c := q.chunk(ser)
	end, next, nextOff := off, q.next, q.nextOff
	full := false
	at, atSeq := off, next
	for {
		m := q.msg(next)
		left := int(m.len) - nextOff
		k := min(left, c.size-end-hdrLen)
		if !m.mayCut(nextOff, k) {
			break
		}
		at, atSeq = end, next
		q.stamp(c, at, next, m, ack, false)
		if k < left {
			end += hdrLen + k
			nextOff += k
			full = true
			break
		}
		if next < q.again {
			retrans++
		}
		end += hdrLen + left
		next, nextOff = next+1, 0
		if next == q.tail {
			full = c.full
			break
		}
		if m = q.msg(next); m.flags&msgCancelled != 0 || m.ser != ser {
			full = true
			break
		}
	}
	if end == off || onlyFull && !full {
		return false, 0
	}
	q.stamp(c, at, atSeq, q.msg(atSeq), ack, ask)
	q.setSend(s, c, off, end)
	q.next, q.nextOff, q.runSer = next, nextOff, ser+1
	q.everSent = max(q.everSent, atSeq+1)
	q.skipCancelled()
	return true, retrans
}

// cursor is where the next SEND to one of ours begins.
func (q *sendQueue) cursor() (ser uint32, off int) {
	if q.nextOff > 0 {
		return q.runSer, 0
	}
	m := q.msg(q.next)
	return m.ser, int(m.off)
}

// piece names n bytes of the chunk, with a reference of its own: between here and the post the peer may acknowledge, on the strength of
// an earlier connection or of nothing at all, what is about to be sent, and the queue forgets it.
func (c *chunk) piece(off, n int) ib.Piece {
	c.c.Get()
	return ib.Piece{Chunk: c.c, Off: off, Len: n}
}

func (q *sendQueue) setSend(s *ib.Send, c *chunk, from, to int) {
	s.Kind, s.Solicited, s.HeaderLen, s.N = ib.Data, true, 0, 1
	s.Pieces[0] = c.piece(from, to-from)
}

// stamp writes the header of message seq at offset at of c.
func (q *sendQueue) stamp(c *chunk, at int, seq uint64, m *msg, ack uint64, ask bool) {
	var flags uint8
	if ask || m.flags&msgAckNow != 0 {
		flags = rdshdr.FlagAckRequired
	}
	if seq < q.again {
		flags = rdshdr.FlagRetransmitted | rdshdr.FlagAckRequired
	}
	rdshdr.Put(c.mem[at:], seq, ack, m.len, m.sport, m.dport, flags, 0)
	if m.flags&msgSide != 0 {
		q.putExt(c.mem[at:], seq)
	}
}

// skipCancelled moves the cursor past messages that are not to be sent.
func (q *sendQueue) skipCancelled() {
	if q.cancelled == 0 || q.nextOff > 0 {
		return
	}
	for q.next != q.tail && q.msg(q.next).flags&msgCancelled != 0 {
		if q.una == q.next {
			q.trimHead() // moves next along
			continue
		}
		q.next++
		q.filler--
	}
}

// packFragment makes the next SEND to a kernel: a fragment of frag bytes, or the rest. hdr is the
// header slot of the SEND. first reports that it begins a message, asked that its message asks for
// an acknowledgement because of the budget.
func (q *sendQueue) packFragment(s *ib.Send, hdr []byte, frag int, ack uint64) (ok, retrans, asked bool) {
	q.skipCancelled()
	if q.next == q.tail {
		return false, false, false
	}
	m := q.msg(q.next)
	n := min(frag, int(m.len)-q.nextOff)
	if !m.mayCut(q.nextOff, n) {
		return false, false, false
	}
	if q.nextOff == 0 {
		q.cutAck = ack
		q.cutFlags, asked = q.kernelFlags(m)
	}
	ser, off, k := q.at(m, q.nextOff)
	c := q.chunk(ser)
	k = min(k, n)
	s.Kind, s.N, s.HeaderLen = ib.Data, 0, 0
	if q.nextOff == 0 {
		// The header is in front of the payload.
		hdr = c.mem[off-hdrLen : off : off]
		off -= hdrLen
		s.Pieces[0], s.N = c.piece(off, hdrLen+k), 1
	} else {
		s.HeaderLen = hdrLen
		s.Pieces[0], s.N = c.piece(off, k), 1
	}
	if k < n {
		ser, off, _ = q.at(m, q.nextOff+k)
		s.Pieces[1], s.N = q.chunk(ser).piece(off, n-k), 2
	}
	rdshdr.Put(hdr, q.next, q.cutAck, m.len, m.sport, m.dport, q.cutFlags, 0)
	if m.flags&msgSide != 0 {
		q.putExt(hdr, q.next)
	}
	q.everSent = max(q.everSent, q.next+1)
	q.nextOff += n
	s.Solicited = q.nextOff == int(m.len)
	if s.Solicited {
		retrans = q.next < q.again
		q.next++
		q.nextOff = 0
	}
	return true, retrans, asked
}

// kernelFlags are the flags of a message to a kernel, which acknowledges only what asks for it (rds-protocol spec
// 3.6).
func (q *sendQueue) kernelFlags(m *msg) (flags uint8, asked bool) {
	if q.ackMsgs == 0 || q.ackBytes < int(m.len) {
		q.ackMsgs, q.ackBytes = kernelAckMsgs, kernelAckBytes
		flags, asked = rdshdr.FlagAckRequired, true
	} else {
		q.ackMsgs--
		q.ackBytes -= int(m.len)
	}
	if m.flags&msgAckNow != 0 {
		flags |= rdshdr.FlagAckRequired
	}
	if q.next < q.again {
		flags |= rdshdr.FlagAckRequired | rdshdr.FlagRetransmitted
	}
	return flags, asked
}
