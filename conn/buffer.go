package conn

import (
	"fmt"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/slab"
)

// MinBuffer is the least payload that is worth a Buffer: shorter ones travel packed with others, and copying them costs less
// than a SEND of their own.
const MinBuffer = copyLocked + 1

// Buffer is memory for the payload of one datagram, laid out as it will be sent: whoever fills it has written to the
// send queue. It belongs to whoever reserved it until a SendExtra has queued it or Release. Not safe for concurrent use.
type Buffer struct {
	m      *Manager
	n      int
	chunks []*slab.Chunk
}

// Reserve makes a Buffer for n bytes, MinBuffer to MaxMessage. It counts as queued: the error is ErrNoMemory when there is as much of
// that as there may be, ErrMessageTooLong above MaxMessage.
func (m *Manager) Reserve(n int) (*Buffer, error) {
	switch {
	case n > MaxMessage:
		return nil, ErrMessageTooLong
	case n < MinBuffer:
		return nil, fmt.Errorf("buffer of %d bytes, needs at least %d", n, MinBuffer)
	}
	k := (n + pieceLen - 1) / pieceLen
	if !m.sendMem.take(k * slab.Large) {
		m.count.sendNoMemory.Inc()
		return nil, ErrNoMemory
	}
	b := &Buffer{m: m, n: n, chunks: make([]*slab.Chunk, k)}
	if got, err := m.cfg.Slab.AllocN(slab.Large, b.chunks); err != nil {
		m.cfg.Slab.FreeN(b.chunks[:got])
		m.sendMem.give(k * slab.Large)
		m.count.sendNoMemory.Inc()
		return nil, ErrNoMemory
	}
	return b, nil
}

// Len is how many bytes it is for, 0 when it is not the caller's any more.
func (b *Buffer) Len() int { return b.n }

// Pieces appends the memory to dst, in order. All but the last are of one length.
func (b *Buffer) Pieces(dst [][]byte) [][]byte {
	for i, c := range b.chunks {
		k := min(pieceLen, b.n-i*pieceLen)
		dst = append(dst, c.Bytes()[hdrLen:hdrLen+k:hdrLen+k])
	}
	return dst
}

// Release gives the memory back, unless it has been queued.
func (b *Buffer) Release() {
	b.m.cfg.Slab.FreeN(b.chunks)
	b.m.sendMem.give(len(b.chunks) * slab.Large)
	b.n, b.chunks = 0, nil
}

// adopt makes the memory of b the chunks that the queue is filled into next, and returns the number of the first.
func (q *sendQueue) adopt(b *Buffer) (ser uint32) {
	for have := int(q.lastSer - q.firstSer); have+len(b.chunks) > len(q.chunks); {
		q.growChunks()
	}
	ser = q.lastSer
	if ser != q.firstSer {
		q.chunk(ser - 1).full = true
	}
	for _, c := range b.chunks {
		*q.chunk(q.lastSer) = chunk{c: c, mem: c.Bytes(), size: ibdev.MaxSend}
		q.lastSer++
	}
	b.n, b.chunks = 0, nil
	return ser
}
