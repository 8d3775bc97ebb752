package rds

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/openrds/openrds/conn"
)

// Received datagrams are kept in blocks, packed as records one behind the other:
//
//	 0        4        8     10     12       16
//	├────────┼────────┼─────┼──────┼────────┼──────────────┬─────────┤
//	│ length │ peer   │port │ kind │  seq   │ payload      │ to 8    │
//	└────────┴────────┴─────┴──────┴────────┴──────────────┴─────────┘
//
// The upper half of kind is the type of service; seq is the lower half of the sequence, for listings.
// A record costs a reader no pointer to chase and the collector nothing to scan. A long datagram is
// a record without payload (recExt) and the next element of the block's ext list, which refers to
// the connection's receive buffers, or to blocks of its own.
//
// A block is filled by deliverers under recvq.inMu, then handed as a whole to the readers, who consume it
// under recvq.readMu; it is never with both.
const (
	blockSize = 64 << 10 // a 1 KiB datagram wastes 1.5 % of it at most; twice as much would leave L2
	recHeader = 16
	recAlign  = 8

	// copyMax is the longest datagram that is copied out of the receive buffer at once: below it the
	// copy costs less than keeping the buffer from being posted again (design section 2).
	copyMax = 1 << 10
	// inlineMax is the longest that is packed into a shared block when it must be copied.
	inlineMax = blockSize/2 - recHeader
)

type recKind uint8

const (
	recInline recKind = iota
	recExt
	recMeta // recInline with a meta behind the payload
)

type block struct {
	next *block
	r, w int // consumed, filled up to here
	ext  []*extMsg
	extR int // ext[:extR] is consumed

	// refs counts the queue (one) and the loans. Only a reader that holds readMu makes a loan, so it
	// may take a count of one as its own.
	refs   atomic.Int32
	lender *Socket // set at the first loan, whose lentBytes holds this block's size; guarded by readMu

	buf *[blockSize]byte
}

func recSize(payload int) int {
	return (recHeader + payload + recAlign - 1) &^ (recAlign - 1)
}

// room reports whether a record with n bytes of payload fits.
func (b *block) room(n int) bool { return blockSize-b.w >= recSize(n) }

// put appends a record's header and returns its room for payload.
func (b *block) put(m *conn.Incoming, from source32, kind recKind, payload int) []byte {
	h := b.buf[b.w : b.w+recHeader]
	binary.NativeEndian.PutUint32(h[0:], uint32(m.Len))
	binary.NativeEndian.PutUint32(h[4:], from.peer)
	binary.NativeEndian.PutUint16(h[8:], m.SrcPort)
	h[10], h[11] = uint8(kind), from.tos
	binary.NativeEndian.PutUint32(h[12:], uint32(m.Seq))
	off := b.w + recHeader
	b.w += recSize(payload)
	return b.buf[off : off+payload]
}

// record is the header of the next record in b and where its payload starts.
type record struct {
	length int
	peer   uint32
	port   uint16
	kind   recKind
	tos    uint8
	seq    uint32
	off    int
}

// source32 is where a datagram came from, in the form in which records keep it.
type source32 struct {
	peer uint32 // index in Service.peers
	tos  uint8
}

func (b *block) head() record { return b.at(b.r) }

// at is the record that starts at offset i.
func (b *block) at(i int) record {
	h := b.buf[i : i+recHeader]
	return record{
		length: int(binary.NativeEndian.Uint32(h[0:])),
		peer:   binary.NativeEndian.Uint32(h[4:]),
		port:   binary.NativeEndian.Uint16(h[8:]),
		kind:   recKind(h[10]),
		tos:    h[11],
		seq:    binary.NativeEndian.Uint32(h[12:]),
		off:    i + recHeader,
	}
}

// size is what the record takes in its block.
func (r record) size() int {
	switch r.kind {
	case recInline:
		return recSize(r.length)
	case recMeta:
		return recSize(r.length) + metaLen
	}
	return recSize(0)
}

// meta is what few datagrams have beside their payload.
type meta struct {
	cookie Cookie
	// Stamps that the socket wants, 0 otherwise. In nanoseconds.
	wall   int64 // when it was queued, since 1970
	queued int64 // the same since Service.began
	start  int64 // from its SEND to its header
	queue  int64 // from its header to the queue
}

const metaLen = 40

// putMeta is put for a datagram with a meta, for which there is room behind it.
func (b *block) putMeta(m *conn.Incoming, from source32, mt *meta) []byte {
	p := b.put(m, from, recMeta, m.Len)
	for i, v := range [...]int64{int64(mt.cookie), mt.wall, mt.queued, mt.start, mt.queue} {
		binary.NativeEndian.PutUint64(b.buf[b.w+8*i:], uint64(v))
	}
	b.w += metaLen
	return p
}

// meta is that of a recMeta.
func (b *block) meta(r record) meta {
	p := b.buf[r.off-recHeader+recSize(r.length):]
	at := func(i int) int64 { return int64(binary.NativeEndian.Uint64(p[8*i:])) }
	return meta{Cookie(at(0)), at(1), at(2), at(3), at(4)}
}

// take consumes r, which head returned, and gives its extMsg if it has one.
func (b *block) take(r record) *extMsg {
	if r.kind == recInline {
		b.r += recSize(r.length)
		return nil
	}
	return b.takeOther(r)
}

func (b *block) takeOther(r record) *extMsg {
	b.r += r.size()
	if r.kind != recExt {
		return nil
	}
	x := b.ext[b.extR]
	b.ext[b.extR] = nil
	b.extR++
	return x
}

// reset makes b an empty block with one reference.
func (b *block) reset() {
	if b.lender != nil {
		b.lender.lentBytes.Add(-blockSize)
		b.lender = nil
	}
	b.next, b.r, b.w = nil, 0, 0
	b.ext, b.extR = b.ext[:0], 0
	b.refs.Store(1)
}

// arena is the memory of received datagrams of one Service. What is idle in it the collector takes back.
type arena struct {
	blocks sync.Pool // *block
	exts   sync.Pool // *extMsg
}

func (a *arena) getBlock() *block {
	if b, ok := a.blocks.Get().(*block); ok {
		return b
	}
	b := &block{buf: new([blockSize]byte)}
	b.reset()
	return b
}

// putBlock drops one reference to b.
func (a *arena) putBlock(b *block) {
	switch n := b.refs.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("BUG: rds: block released more often than referenced")
	}
	b.reset()
	a.blocks.Put(b)
}

// piece is a part of a long datagram; exactly one of buf and blk owns data.
type piece struct {
	data []byte
	buf  *conn.RecvBuf
	blk  *block
}

// extMsg is a datagram that is not packed into a block. Whoever took it from the queue releases it.
type extMsg struct {
	pieces []piece
	pinned int64 // what it counts in *owner
	meta   meta
	owner  *atomic.Int64 // bytes of receive buffers that the queue or its loans keep
}

func (a *arena) getExt() *extMsg {
	if x, ok := a.exts.Get().(*extMsg); ok {
		return x
	}
	return new(extMsg)
}

func (a *arena) putExt(x *extMsg) {
	for i := range x.pieces {
		if p := &x.pieces[i]; p.buf != nil {
			p.buf.Put()
		} else {
			a.putBlock(p.blk)
		}
	}
	clear(x.pieces)
	x.pieces = x.pieces[:0]
	if x.pinned != 0 {
		x.owner.Add(-x.pinned)
	}
	x.pinned, x.owner, x.meta = 0, nil, meta{}
	a.exts.Put(x)
}

// refer makes x refer to m's receive buffers.
func (x *extMsg) refer(m *conn.Incoming) {
	m.First.Buf.Get()
	x.pieces = append(x.pieces, piece{data: m.First.Data, buf: m.First.Buf})
	for i := range m.More {
		f := &m.More[i]
		f.Buf.Get()
		x.pieces = append(x.pieces, piece{data: f.Data, buf: f.Buf})
	}
}

// copyFrom makes x a copy of m in blocks of its own.
func (x *extMsg) copyFrom(a *arena, m *conn.Incoming) {
	var room []byte
	add := func(data []byte) {
		for len(data) > 0 {
			if len(room) == 0 {
				b := a.getBlock()
				room = b.buf[:]
				x.pieces = append(x.pieces, piece{blk: b})
			}
			n := copy(room, data)
			p := &x.pieces[len(x.pieces)-1]
			p.data = p.blk.buf[:len(p.data)+n]
			room, data = room[n:], data[n:]
		}
	}
	add(m.First.Data)
	for i := range m.More {
		add(m.More[i].Data)
	}
}

// copyOut copies x to p and returns how much.
func (x *extMsg) copyOut(p []byte) int {
	n := 0
	for i := range x.pieces {
		c := copy(p[n:], x.pieces[i].data)
		n += c
		if c < len(x.pieces[i].data) {
			break
		}
	}
	return n
}

// copyIn copies m's payload to p, which is m.Len long.
func copyIn(p []byte, m *conn.Incoming) {
	n := copy(p, m.First.Data)
	for i := range m.More {
		n += copy(p[n:], m.More[i].Data)
	}
}
