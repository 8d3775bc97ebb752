package rds

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/openrds/openrds/conn"
)

const cacheLine = 64

// recvq is the receive queue of a socket, or of a port that nobody bound yet.
//
// It has two ends, each with its own lock, so that deliverers and readers meet only when a reader has
// run dry and takes everything that came meanwhile. Lock order: readMu, inMu, waitq.mu.
//
// Accounting is by payload bytes, as the kernel's is (rds-protocol spec 2.7), and beside it by charge, what
// the records cost, since datagrams without payload must have a bound too. Deliverers add per run;
// readers subtract per block, at once when the port is congested.
type recvq struct {
	svc *Service

	_ [cacheLine]byte

	inMu    sync.Mutex
	in      *block        // oldest; guarded by inMu
	inTail  *block        // being filled; guarded by inMu
	spare   *block        // empty; guarded by inMu
	lastBuf *conn.RecvBuf // of the last datagram that was referred to; guarded by inMu
	closed  bool          // guarded by inMu
	stamps  stamps        // what datagrams get; guarded by inMu

	_ [cacheLine]byte

	readMu sync.Mutex
	out    *block // being consumed; guarded by readMu
	done   tally  // consumed but not accounted yet; guarded by readMu

	_ [cacheLine]byte

	bytes     atomic.Int64 // payload queued
	charge    atomic.Int64 // cost of the records queued
	pinned    atomic.Int64 // receive buffers kept by the queue and by loans
	pinLimit  atomic.Int64 // above it datagrams are copied whatever their length
	congested atomic.Bool  // our bit in the map; written under Socket.congMu

	readers waitq
}

// tally is what a run of datagrams of one peer amounts to.
type tally struct {
	peer   *peer
	msgs   int64
	bytes  int64
	charge int64
	copied int64
}

// tallyMax is how far accounting may lag behind: half of the least that makes a port congested by charge.
const tallyMax = 32 << 10

// chargeOf is what a datagram of n payload bytes counts towards the bounds on memory.
func chargeOf(n int) int64 { return int64(n) + recHeader }

// pushLocked appends m. The caller holds inMu and accounts for it.
func (q *recvq) pushLocked(from source32, m *conn.Incoming) {
	if m.Len > copyMax {
		q.pushLongLocked(from, m, meta{})
		return
	}
	copyIn(q.roomLocked(m.Len).put(m, from, recInline, m.Len), m)
}

// pushExtLocked is pushLocked for a datagram with extensions, or for a socket that wants stamps.
func (q *recvq) pushExtLocked(from source32, m *conn.Incoming) {
	mt, has := q.metaLocked(m)
	switch {
	case !has:
		q.pushLocked(from, m)
	case m.Len <= copyMax:
		copyIn(q.roomLocked(m.Len+recAlign+metaLen).putMeta(m, from, &mt), m)
	default:
		q.pushLongLocked(from, m, mt)
	}
}

// stamps are the times that datagrams get as they are queued.
type stamps uint8

const (
	stampTime    stamps = 1 << iota // SO_TIMESTAMP
	stampLatency                    // SO_RDS_MSG_RXPATH_LATENCY
)

// metaLocked is what m has beside its payload. has: anything.
func (q *recvq) metaLocked(m *conn.Incoming) (mt meta, has bool) {
	if m.Ext != nil {
		mt.cookie = Cookie(m.Ext.Cookie)
	}
	if q.stamps == 0 {
		return mt, mt.cookie != 0
	}
	now := time.Now()
	if q.stamps&stampTime != 0 {
		mt.wall = now.UnixNano()
	}
	if q.stamps&stampLatency != 0 {
		mt.queued = int64(now.Sub(q.svc.began)) + 1
		if x := m.Ext; x != nil && !x.Seen.IsZero() {
			mt.start, mt.queue = int64(x.Start.Sub(x.Seen)), int64(now.Sub(x.Start))
		}
	}
	return mt, true
}

func (q *recvq) pushLongLocked(from source32, m *conn.Incoming, mt meta) {
	cost := q.pinCostLocked(m)
	refer := cost >= 0 && q.pinned.Load()+cost <= q.pinLimit.Load()
	if !refer && mt == (meta{}) && m.Len <= inlineMax {
		copyIn(q.roomLocked(m.Len).put(m, from, recInline, m.Len), m)
		return
	}
	x := q.svc.arena.getExt()
	if refer {
		x.refer(m)
		x.pinned, x.owner = cost, &q.pinned
		q.pinned.Add(cost)
		q.lastBuf = x.pieces[len(x.pieces)-1].buf
	} else {
		x.copyFrom(&q.svc.arena, m)
	}
	x.meta = mt
	b := q.roomLocked(0)
	b.put(m, from, recExt, 0)
	b.ext = append(b.ext, x)
}

// pinCostLocked is how many bytes of receive buffers a reference to m would keep from being posted
// again beyond those this queue keeps already, -1 if m must not be referred to: it is not in such buffers (a local
// sender's), or they are running out.
func (q *recvq) pinCostLocked(m *conn.Incoming) int64 {
	if m.First.Buf == nil || m.First.Buf.Scarce() {
		return -1
	}
	cost, last := int64(0), q.lastBuf
	if b := m.First.Buf; b != last {
		cost += int64(len(b.Bytes()))
		last = b
	}
	for i := range m.More {
		if b := m.More[i].Buf; b != last {
			cost += int64(len(b.Bytes()))
			last = b
		}
	}
	return cost
}

// roomLocked is a block in which a record with n bytes of payload fits.
func (q *recvq) roomLocked(n int) *block {
	b := q.inTail
	if b != nil && b.room(n) {
		return b
	}
	nb := q.spare
	q.spare = nil
	if nb == nil {
		nb = q.svc.arena.getBlock()
	}
	if b == nil {
		q.in = nb
	} else {
		b.next = nb
	}
	q.inTail = nb
	return nb
}

// headLocked is the block with the oldest datagram, nil if there is none. The caller holds readMu.
func (q *recvq) headLocked() *block {
	if b := q.out; b != nil && b.r < b.w {
		return b
	}
	return q.nextBlockLocked()
}

// nextBlockLocked leaves the consumed block behind, and when there is no other takes what was
// delivered meanwhile.
func (q *recvq) nextBlockLocked() *block {
	q.flushLocked()
	var empty *block
	if b := q.out; b != nil {
		q.out = b.next
		if q.out != nil {
			q.svc.arena.putBlock(b)
			return q.out
		}
		if b.refs.Load() == 1 { // no loans: ours alone
			b.reset()
			empty = b
		} else {
			q.svc.arena.putBlock(b)
		}
	}
	q.inMu.Lock()
	q.out, q.in, q.inTail, q.lastBuf = q.in, nil, nil, nil
	if empty != nil && q.spare == nil {
		q.spare, empty = empty, nil
	}
	q.inMu.Unlock()
	if empty != nil {
		q.svc.arena.putBlock(empty)
	}
	return q.out
}

// count adds a consumed datagram to the tally. The caller holds readMu.
func (q *recvq) countLocked(p *peer, n, copied int) {
	d := &q.done
	if d.peer != p {
		q.flushLocked()
		d.peer = p
	}
	d.msgs++
	d.bytes += int64(n)
	d.charge += chargeOf(n)
	d.copied += int64(copied)
	if d.charge >= tallyMax {
		q.flushLocked()
	}
}

// flushLocked accounts for what was consumed. The caller holds readMu.
func (q *recvq) flushLocked() {
	d := &q.done
	if d.msgs == 0 {
		return
	}
	q.bytes.Add(-d.bytes)
	q.charge.Add(-d.charge)
	d.peer.queued.Add(-d.charge)
	c := &q.svc.ctr
	c.recvDelivered.Add(uint64(d.msgs))
	c.copyToUser.Add(uint64(d.copied))
	c.recvBytesFreed.Add(uint64(d.bytes))
	*d = tally{}
}

// moreLocked reports whether there are datagrams left that a reader can see at once. The caller holds readMu.
func (q *recvq) moreLocked() bool { return q.out != nil && q.out.r < q.out.w }

// park enters w unless there is something to read. An idle queue keeps no memory.
func (q *recvq) park(w *waiter) bool {
	q.readMu.Lock()
	defer q.readMu.Unlock()
	if q.headLocked() != nil {
		return false
	}
	q.inMu.Lock()
	defer q.inMu.Unlock()
	if q.in != nil {
		return false
	}
	if q.spare != nil {
		q.svc.arena.putBlock(q.spare)
		q.spare = nil
	}
	q.readers.add(w)
	return true
}

// close refuses further datagrams and drops those that nobody read. It returns how many.
func (q *recvq) close() (dropped int) {
	q.inMu.Lock()
	q.closed = true
	q.inMu.Unlock()

	q.readMu.Lock()
	defer q.readMu.Unlock()
	for b := q.headLocked(); b != nil; b = q.headLocked() {
		r := b.head()
		if x := b.take(r); x != nil {
			q.svc.arena.putExt(x)
		}
		q.bytes.Add(-int64(r.length))
		q.charge.Add(-chargeOf(r.length))
		q.svc.peerAt(r.peer).queued.Add(-chargeOf(r.length))
		q.svc.ctr.recvBytesFreed.Add(uint64(r.length))
		dropped++
	}
	q.inMu.Lock()
	if q.spare != nil {
		q.svc.arena.putBlock(q.spare)
		q.spare = nil
	}
	q.inMu.Unlock()
	return dropped
}

// adopt moves what from holds to the empty queue q; from is not used any more. No reader knows
// either queue yet; deliverers may.
func (q *recvq) adopt(from *recvq) {
	from.inMu.Lock()
	in, tail := from.in, from.inTail
	from.in, from.inTail, from.closed = nil, nil, true
	from.inMu.Unlock()

	q.inMu.Lock()
	q.in, q.inTail = in, tail
	q.inMu.Unlock()
	q.bytes.Add(from.bytes.Load())
	q.charge.Add(from.charge.Load())
}
