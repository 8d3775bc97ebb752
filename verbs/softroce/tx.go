package softroce

import (
	"hash/crc32"
	"net/netip"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// txBatch collects the packets of one engine step into trains. Headers, trailers and small payloads
// are written into scratch, back to back, so that the trailer of a packet and the header of the next are one piece
// of the gather list; large payloads are named where they lie. Engine role.
type txBatch struct {
	d       *device
	scratch []byte
	used    int
	vecs    [][]byte
	trains  []packetio.TxTrain
	starts  []int // first vec of each train
	refs    []*mr // regions that READ responses name, until they have left

	// The open train, the last of trains.
	open     bool
	runStart int // start of the scratch run not yet in vecs
	bytes    int
	to       netip.AddrPort
	segSize  int
	segs     int
	tos      uint8

	blocked bool // the socket is full: trains[done:] wait
	done    int
}

const (
	scratchBytes = 128 << 10
	// maxVecs is after how many entries of gather lists no packet is begun: with those of one more (32 SGEs, each of two pieces of its
	// region, each with a run of scratch before it) the kernel still takes them as one message (UIO_MAXIOV, 1024).
	maxVecs   = 1024 - 130
	maxTrains = 64
	// inlinePayload bytes and less are copied behind their header: an entry of a gather list costs the
	// kernel more than copying that many.
	inlinePayload = 256
	maxPktScratch = 64 + inlinePayload
)

func (t *txBatch) init(d *device) {
	t.d = d
	t.scratch = make([]byte, scratchBytes)
	t.vecs = make([][]byte, 0, 1024)
	t.trains = make([]packetio.TxTrain, 0, maxTrains)
	t.starts = make([]int, 0, maxTrains)
}

// pktBuilder is one packet being written.
type pktBuilder struct {
	hdr []byte // BTH and extension headers, in scratch
	n   int    // payload bytes
	u   int    // UDP payload bytes
	seg uint16 // index in its train
	// Where the batch was before it: see undo.
	used, vecs, run int
}

// begin makes room for a packet of hdrLen bytes of headers and n of payload to q's peer.
func (b *pktBuilder) begin(d *device, q *qp, op roce.Opcode, hdrLen, n int) {
	b.beginTo(d, q.peer, q.attr.AH.TrafficClass, hdrLen, n)
}

func (b *pktBuilder) beginTo(d *device, to netip.AddrPort, tos uint8, hdrLen, n int) {
	t := &d.tx
	u := hdrLen + n + roce.PadLen(n) + roce.ICRCLen
	b.n, b.u = n, u
	if t.used+maxPktScratch > len(t.scratch) || len(t.vecs) > maxVecs {
		t.makeRoom()
	}
	if t.open && d.caps.GSO && t.segs < packetio.MaxTrainSegs && u <= t.segSize && t.bytes+u <= packetio.MaxTrainBytes && t.bytes == t.segs*t.segSize &&
		t.to == to && t.tos == tos {
		b.seg = uint16(t.segs)
		t.segs++
	} else {
		t.closeTrain()
		if len(t.trains) == maxTrains {
			t.makeRoom()
		}
		t.open, t.to, t.tos, t.segSize, t.segs, t.bytes = true, to, tos, u, 1, 0
		t.starts = append(t.starts, len(t.vecs))
		t.runStart = t.used
		b.seg = 0
	}
	b.used, b.vecs, b.run = t.used, len(t.vecs), t.runStart
	t.bytes += u
	b.hdr = t.scratch[t.used : t.used+hdrLen : t.used+hdrLen]
	t.used += hdrLen
}

// undo takes the packet out of the batch again.
func (b *pktBuilder) undo(t *txBatch) {
	t.used, t.vecs, t.runStart = b.used, t.vecs[:b.vecs], b.run
	t.bytes -= b.u
	if t.segs--; t.segs == 0 {
		t.open, t.starts = false, t.starts[:len(t.starts)-1]
	}
}

// finish writes BTH, payload, pad and ICRC. The payload is b.n bytes of sgs from off on. Extension
// headers have been written to b.hdr. There is no packet if the payload could not be read.
func (b *pktBuilder) finish(d *device, q *qp, op roce.Opcode, se, ackReq bool, destQP verbs.QPN, p psn.PSN, sgs []sge, off uint32) verdict {
	return b.finishFlow(d, &q.txFlow, op, se, ackReq, uint32(destQP), p, sgs, off)
}

func (b *pktBuilder) finishFlow(d *device, f *roce.Flow, op roce.Opcode, se, ackReq bool, destQP uint32, p psn.PSN, sgs []sge, off uint32) verdict {
	t := &d.tx
	pad := roce.PadLen(b.n)
	roce.PutBTH(b.hdr, op, se, pad, ackReq, destQP, p)
	st := f.Begin(b.u, b.hdr)
	inline := b.n <= inlinePayload
	if b.n > 0 {
		var fault uintptr
		if st, fault = t.gather(st, sgs, off, b.n, inline); fault != 0 {
			b.undo(t)
			return d.faultAt(fault)
		}
	}
	x := t.scratch[t.used : t.used+pad+roce.ICRCLen]
	clear(x[:pad])
	if inline {
		st = crc32.Update(st, crc32.IEEETable, t.scratch[t.used-b.n:t.used+pad])
	} else if pad > 0 {
		st = crc32.Update(st, crc32.IEEETable, x[:pad])
	}
	if b.seg != 0 && d.is4 {
		// The kernel numbers the segments of a train 0, 1, 2 ... (rocev2 spec 2.4).
		st ^= roce.IDDelta(b.u, b.seg)
	}
	roce.PutICRC(x[pad:], st)
	t.used += pad + roce.ICRCLen
	return granted
}

// closeTrain ends the open train.
func (t *txBatch) closeTrain() {
	if !t.open {
		return
	}
	t.open = false
	if t.used > t.runStart {
		t.vecs = append(t.vecs, t.scratch[t.runStart:t.used:t.used])
		t.runStart = t.used
	}
	t.trains = append(t.trains, packetio.TxTrain{To: t.to, TOS: t.tos, Segs: t.segs, SegSize: t.segSize})
}

// hold references m until the batch has left.
func (t *txBatch) hold(m *mr) {
	if n := len(t.refs); n > 0 && t.refs[n-1] == m {
		m.refs.Put()
		return
	}
	t.refs = append(t.refs, m)
}

// flush sends the batch. When the socket is full what is left stays, and nothing is built until it
// has gone.
func (t *txBatch) flush() {
	d := t.d
	if !t.blocked {
		t.closeTrain()
		for i := range t.trains {
			end := len(t.vecs)
			if i+1 < len(t.starts) {
				end = t.starts[i+1]
			}
			t.trains[i].Vec = t.vecs[t.starts[i]:end]
		}
		t.done = 0
	}
	t.blocked = false
	for t.done < len(t.trains) {
		n, err := d.conn.Send(t.trains[t.done:])
		for _, tr := range t.trains[t.done : t.done+n] {
			d.stats.add(cTxPackets, uint64(tr.Segs))
			d.stats.add(cTxBytes, uint64(tr.SegSize*tr.Segs))
		}
		d.stats.add(cTxTrains, uint64(n))
		if d.prov.tracers.Load() != nil {
			d.traceOut(t.trains[t.done : t.done+n])
		}
		t.done += n
		if t.done == len(t.trains) {
			break
		}
		if err == packetio.ErrWouldBlock {
			d.stats.add(cTxBlocked, 1)
			t.blocked = true
			return
		}
		// The train is lost, as if on the wire.
		d.stats.add(cTxErrors, 1)
		if isFault(err) {
			d.gatherFaulted(&t.trains[t.done])
		}
		d.caps.GSO = d.conn.Caps().GSO // the socket may have learnt that the path has no segmentation
		t.done++
	}
	t.clear()
}

func (t *txBatch) clear() {
	t.open = false
	clear(t.vecs)
	clear(t.trains)
	t.vecs, t.trains, t.starts = t.vecs[:0], t.trains[:0], t.starts[:0]
	t.used, t.runStart, t.done = 0, 0, 0
	for i, m := range t.refs {
		m.refs.Put()
		t.refs[i] = nil
	}
	t.refs = t.refs[:0]
}

// ready reports whether one more packet can be written, and sends what is there first if there is no room
// for it. False: the socket is full; who sends more than a packet at a time stops and stays on his
// list.
func (t *txBatch) ready() bool {
	if !t.blocked && t.full() {
		t.flush()
	}
	return !t.blocked
}

// full reports whether a packet may not fit.
func (t *txBatch) full() bool {
	return t.used+maxPktScratch > len(t.scratch) || len(t.vecs) > maxVecs || len(t.trains) == maxTrains-1
}

// makeRoom sends what is there. In the middle of a step a full socket cannot park it: what is left is
// lost, as if on the wire.
func (t *txBatch) makeRoom() {
	t.flush()
	if t.blocked {
		t.d.stats.add(cTxErrors, uint64(len(t.trains)-t.done))
		t.blocked = false
		t.clear()
	}
}

// names reports whether the batch may name memory of m.
func (t *txBatch) names(m *mr) bool {
	if len(t.trains) == 0 && !t.open {
		return false
	}
	if m.uses > 0 {
		return true
	}
	for _, r := range t.refs {
		if r == m {
			return true
		}
	}
	return false
}

// dropQP makes sure that no packet of q waits in the batch: its memory is about to be given back. What
// other QPs have in there is sent or, if the socket is full, lost as if on the wire.
func (t *txBatch) dropQP(q *qp) {
	if len(t.trains) == 0 && !t.open {
		return
	}
	t.makeRoom()
}
