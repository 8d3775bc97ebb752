package softroce

import (
	"encoding/binary"
	"net/netip"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// grhLen is the space that precedes a UD payload in its receive buffer (rocev2 spec 5.6).
const grhLen = 40

// sendUD sends the datagrams of a UD QP. Each completes as soon as its memory is not needed any more: small ones are copied, others have
// left. One that the socket has no room for is the oldest of its QP, and marked as started.
func (d *device) sendUD(q *qp) (more bool) {
	if h := q.cur; h != q.tail.Load() && q.slot(h).started {
		if d.tx.blocked {
			d.queueTX(q)
			return false
		}
		q.cur++
		q.finishSend(h, q.slot(h))
		q.checkDrained()
	}
	if q.State() != verbs.StateRTS {
		return false
	}
	for sent := 0; q.cur != q.tail.Load(); sent++ {
		if sent >= stepPackets {
			return true
		}
		if !d.tx.ready() {
			d.queueTX(q)
			return false
		}
		h := q.cur
		w := q.slot(h)
		sgs, off, v := d.reach(w.sgs, 0, w.total, false)
		if v == absent && !w.bad && d.pauseTX(q, w, q.nxt, 0, false) == absent {
			return false
		}
		if w.bad || v != granted {
			q.failUD(w, verbs.WCLocProtErr)
			return false
		}
		x := q.ext(h)
		op := roce.UDSendOnly
		if w.op == verbs.OpSendWithImm {
			op = roce.UDSendOnlyImm
		}
		to := netip.AddrPortFrom(x.ah.Remote, d.conn.LocalAddr().Port())
		if to != q.peer {
			q.peer, q.txFlow = to, roce.NewFlow(d.conn.LocalAddr(), to)
		}
		var b pktBuilder
		b.beginTo(d, to, x.ah.TrafficClass, op.Info().HdrLen, int(w.total))
		roce.PutDETH(b.hdr[roce.BTHLen:], x.rqkey, q.num)
		if op == roce.UDSendOnlyImm {
			roce.PutImm(b.hdr[roce.BTHLen+roce.DETHLen:], w.imm)
		}
		v = b.finish(d, q, op, w.flags&verbs.SendSolicited != 0, false, verbs.QPN(x.rqpn), q.nxt, sgs, off)
		if v == absent && d.pauseTX(q, w, q.nxt, 0, false) == absent {
			return false
		}
		if v != granted {
			q.failUD(w, verbs.WCLocProtErr)
			return false
		}
		q.nxt = q.nxt.Add(1)
		q.una, q.max = q.nxt, q.nxt
		if w.total > inlinePayload {
			if d.tx.flush(); d.tx.blocked {
				w.started = true
				if w.indirect {
					q.countUses(w, 1)
				}
				d.queueTX(q)
				return false
			}
		}
		q.cur++
		q.finishSend(h, w)
	}
	return false
}

// failUD completes w with an error and moves the QP to SQE: receiving goes on, what is behind flushes
// (rocev2 spec 5.1).
func (q *qp) failUD(w *swqe, s verbs.WCStatus) {
	h := q.head.Load()
	wc := verbs.WC{ID: w.id, Status: s, QPN: verbs.QPN(q.num)}
	q.freeSend(h, w)
	q.complete(q.scq, &wc, false)
	q.setState(verbs.StateSQE)
	q.flushSends()
}

// recvUD takes a datagram for a UD QP (rocev2 spec 5.6); whatever is wrong with it, it is dropped.
func (d *device) recvUD(q *qp, t *packetio.RxTrain, raw []byte, pk *roce.Packet, i uint16) {
	if pk.Info.Flags&roce.FlagUD == 0 {
		d.stats.add(cRxNoQP, 1)
		return
	}
	switch q.State() {
	case verbs.StateRTR, verbs.StateRTS, verbs.StateSQD, verbs.StateSQE:
	default:
		d.stats.add(cRxBadState, 1)
		return
	}
	if !pk.BTH.PKeyOK() {
		d.stats.add(cRxBadPKey, 1)
		return
	}
	if pk.DETH().QKey() != q.attr.QKey {
		d.stats.add(cRxBadQKey, 1)
		return
	}
	if t.From != q.rxFrom {
		q.rxFrom, q.rxFlow = t.From, roce.NewFlow(t.From, d.conn.LocalAddr())
	}
	id, v := q.rxFlow.Check(raw, i)
	// Many peers may send here: no counter of theirs can be followed, so any identification goes.
	if v != roce.OK0 && v != roce.OKGuess && v != roce.OKSolved {
		d.believe(&q.ids, v, id)
		return
	}
	q.got = 0
	var ok bool
	if ok = q.inMessage; ok {
		// A request that an earlier datagram took, and whose pages it found absent.
	} else if q.srq != nil {
		if ok = q.srq.take(&q.w); ok {
			q.srq.taken()
		}
	} else {
		ok = q.rq.take(&q.w)
	}
	if !ok {
		d.stats.add(cRxNoRecv, 1)
		return
	}
	total := uint32(grhLen + len(pk.Payload))
	sgs, o, got := d.reach(q.w.sgs, 0, min(total, q.w.total), true)
	if got == granted && !q.w.bad && q.w.total >= total {
		var grh [grhLen]byte
		d.makeGRH(&grh, t, len(raw))
		if got = d.put(sgs, o, grh[:]); got == granted {
			got = d.put(sgs, o+grhLen, pk.Payload)
		}
	}
	if got == absent && q.w.total >= total && !q.w.bad {
		if q.inMessage = d.waitRX(q, 0, true, restOf(q.w.sgs, 0, true)) == absent; q.inMessage {
			d.stats.add(cODPHeld, 1)
			return // as if lost on the wire
		}
	}
	q.rxFault.tries = 0
	if q.w.total < total || q.w.bad || got != granted {
		d.stats.add(cRxNoRecv, 1)
		s := verbs.WCLocLenErr
		if q.w.total >= total {
			s = verbs.WCLocProtErr
		}
		q.finishRecv(s)
		return
	}
	wc := verbs.WC{ID: q.w.id, Opcode: verbs.WCRecv, QPN: verbs.QPN(q.num), ByteLen: total, SrcQPN: verbs.QPN(pk.DETH().SrcQP()), Flags: verbs.WCWithGRH}
	if pk.Info.Flags&roce.FlagImm != 0 {
		wc.Flags |= verbs.WCWithImm
		wc.Imm = pk.Imm()
	}
	d.deliverRecv(q, &wc, pk.BTH.SE())
}

// makeGRH writes the network header of a datagram of u bytes as a NIC would: IPv6, or 20 zero bytes and
// IPv4. The identification is not known and left 0.
func (d *device) makeGRH(g *[grhLen]byte, t *packetio.RxTrain, u int) {
	src, dst := t.From.Addr().Unmap(), d.addr
	if !d.is4 {
		s, e := src.As16(), dst.As16()
		g[0], g[1] = 0x60|t.TOS>>4, t.TOS<<4
		binary.BigEndian.PutUint16(g[4:], uint16(u+8))
		g[6], g[7] = 17, t.TTL
		copy(g[8:], s[:])
		copy(g[24:], e[:])
		return
	}
	h := g[20:]
	s, e := src.As4(), dst.As4()
	h[0], h[1] = 0x45, t.TOS
	binary.BigEndian.PutUint16(h[2:], uint16(u+28))
	h[6], h[8], h[9] = 0x40, t.TTL, 17
	copy(h[12:], s[:])
	copy(h[16:], e[:])
	var sum uint32
	for k := 0; k < 20; k += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[k:]))
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}

// gsiMAD is a MAD on its way out.
type gsiMAD struct {
	to  netip.Addr
	mad [madBytes]byte
}

// maxGSIOut bounds MADs that wait for the engine role.
const maxGSIOut = 4096

// sendMAD queues a MAD to QP1 of to. Never blocks; beyond the bound the MAD is dropped, as the wire may
// drop it.
func (d *device) sendMAD(to netip.Addr, mad *[madBytes]byte) {
	d.kickMu.Lock()
	if len(d.gsiOut) >= maxGSIOut {
		d.kickMu.Unlock()
		d.stats.add(cCMDropped, 1)
		return
	}
	d.gsiOut = append(d.gsiOut, gsiMAD{to, *mad})
	d.nKicks.Store(int32(len(d.kicks) + len(d.gsiOut)))
	d.kickMu.Unlock()
	d.runTX()
}

// sendGSI writes one MAD as a UD packet (rocev2 spec 7.1).
func (d *device) sendGSI(m *gsiMAD) {
	if d.tx.blocked {
		return // CM repeats
	}
	to := netip.AddrPortFrom(m.to, d.conn.LocalAddr().Port())
	flow := roce.NewFlow(d.conn.LocalAddr(), to)
	var b pktBuilder
	b.beginTo(d, to, 0, roce.BTHLen+roce.DETHLen, len(m.mad))
	roce.PutDETH(b.hdr[roce.BTHLen:], roce.GSIQKey, 1)
	d.gsiPSN++
	b.finishFlow(d, &flow, roce.UDSendOnly, false, false, 1, psn.New(d.gsiPSN), []sge{direct(m.mad[:])}, 0)
}

// gsiPacket takes a packet for QP1.
func (d *device) gsiPacket(t *packetio.RxTrain, raw []byte, pk *roce.Packet, i uint16) {
	if pk.Op != roce.UDSendOnly && pk.Op != roce.UDSendOnlyImm {
		d.stats.add(cRxNoQP, 1)
		return
	}
	if !pk.BTH.PKeyOK() {
		d.stats.add(cRxBadPKey, 1)
		return
	}
	flow := roce.NewFlow(t.From, d.conn.LocalAddr())
	// The peers of a GSI are many: any identification goes (rocev2 spec 2.8, policy C).
	if id, v := flow.Check(raw, i); v != roce.OK0 && v != roce.OKGuess && v != roce.OKSolved {
		d.believe(&d.gsiIDs, v, id)
		return
	}
	d.cm.gsiInput(t.From.Addr().Unmap(), pk)
}
