package rds

import (
	"net/netip"
	"sync/atomic"

	"github.com/openrds/openrds/conn"
)

const (
	// Counts of what is not acknowledged: messages in the upper bits, payload bytes in the lower.
	outShift = 40
	outMask  = 1<<outShift - 1
	outOne   = 1 << outShift

	maxBuffer = 1 << 38
	maxInt64  = 1<<63 - 1

	// A message without payload costs memory as well: a send buffer holds at least minSendMsgs of them, and more
	// only if it is large enough for as many of sndMsgBytes. Longer ones meet the limit on bytes first.
	minSendMsgs = 1 << 16
	sndMsgBytes = 64
)

// flow is what a socket sends to one destination: a host and a type of service. Connections know it as the owner
// of those messages. The first write to a destination makes it, and it stays as long as the socket.
type flow struct {
	// What a write touches is one cache line: who writes to a thousand hosts in turn finds none of it warm.
	remote netip.Addr // d's, as link and tos
	link   link
	out    atomic.Uint64 // messages << outShift | payload bytes that are not acknowledged
	s      *Socket
	tos    uint8

	d       *dest
	next    *flow // to the same host with another type of service; guarded by Socket.flowMu
	writers waitq // wait for room in the flow's share
}

// The send buffer is accounted for as the kernel's is, by what was queued before (rds-protocol spec 1.4 step 23); and
// so that a destination which takes nothing leaves room for the others, none may hold more than half of it once a
// socket has a second one. What is out is
//
//	the first flow's out  +  Socket.others: that of all other flows
//
// so a socket with one destination pays for one count. Two writers to different flows may each find room that is enough
// for one of them; the buffer then holds a message more.

var _ conn.Owner = (*flow)(nil)

// flow finds or makes the flow to remote, which is unmapped and legal.
func (s *Socket) flow(remote netip.Addr, tos uint8) (*flow, error) {
	s.flowMu.RLock()
	f := s.flowLocked(remote, tos)
	s.flowMu.RUnlock()
	if f != nil {
		return f, nil
	}
	d, err := s.la.dest(remote, tos)
	if err != nil {
		return nil, err
	}
	s.flowMu.Lock()
	defer s.flowMu.Unlock()
	if f = s.flowLocked(remote, tos); f != nil {
		return f, nil
	}
	if s.flows == nil {
		s.flows = make(map[netip.Addr]*flow)
		f = &s.first
	} else {
		f = new(flow)
		s.shared.Store(true)
	}
	f.remote, f.link, f.tos, f.d, f.s, f.next = d.remote, d.link, d.tos, d, s, s.flows[remote]
	s.flows[remote] = f
	return f, nil
}

func (s *Socket) flowLocked(remote netip.Addr, tos uint8) *flow {
	f := s.flows[remote]
	for f != nil && f.tos != tos {
		f = f.next
	}
	return f
}

// flowsTo is the flows to remote there are.
func (s *Socket) flowsTo(remote netip.Addr) (fs []*flow) {
	s.flowMu.RLock()
	defer s.flowMu.RUnlock()
	for f := s.flows[remote]; f != nil; f = f.next {
		fs = append(fs, f)
	}
	return fs
}

// unacked is all that is out.
func (s *Socket) unacked() uint64 { return s.first.out.Load() + s.others.Load() }

// full reports whether a send buffer with v in it takes no more.
func (s *Socket) full(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&outMask) >= sndbuf || int64(v>>outShift) >= max(minSendMsgs, sndbuf/sndMsgBytes)
}

// roomy reports whether a quarter of the send buffer is free. It is true of an empty one.
func (s *Socket) roomy(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&outMask) <= sndbuf/4*3 && int64(v>>outShift) <= max(minSendMsgs, sndbuf/sndMsgBytes)/4*3
}

// fullShare and roomyShare are the same for a flow's share of a buffer that others use too.
func (s *Socket) fullShare(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&outMask) >= max(1, sndbuf/2) || int64(v>>outShift) >= max(minSendMsgs, sndbuf/sndMsgBytes)/2
}

func (s *Socket) roomyShare(v uint64) bool {
	sndbuf := s.sndbuf.Load()
	return int64(v&outMask) <= sndbuf/8*3 && int64(v>>outShift) <= max(minSendMsgs, sndbuf/sndMsgBytes)/8*3
}

// charge accounts for a message, or says that there is no room: errFull or errShare. ask: its acknowledgement is
// wanted soon, since the buffer, or the flow's share of it, has become half full, or full (rds-protocol spec 3.6; the
// kernel asks with every message above half).
func (f *flow) charge(delta uint64) (ask bool, err error) {
	s := f.s
	if s.shared.Load() {
		return f.chargeShared(delta)
	}
	var before uint64
	for {
		before = f.out.Load()
		if s.full(before) {
			return false, errFull
		}
		if f.out.CompareAndSwap(before, before+delta) {
			break
		}
	}
	return wantsAck(before, delta, s.sndbuf.Load()), nil
}

// chargeShared is charge where there is more than one flow.
func (f *flow) chargeShared(delta uint64) (ask bool, err error) {
	s := f.s
	own := f.out.Load()
	if s.fullShare(own) {
		return false, errShare
	}
	var before uint64
	if f == &s.first {
		for {
			if before = own + s.others.Load(); s.full(before) {
				return false, errFull
			}
			if f.out.CompareAndSwap(own, own+delta) {
				break
			}
			own = f.out.Load()
		}
	} else {
		for {
			others := s.others.Load()
			if before = others + s.first.out.Load(); s.full(before) {
				return false, errFull
			}
			if s.others.CompareAndSwap(others, others+delta) {
				break
			}
		}
		own = f.out.Add(delta) - delta
	}
	sndbuf := s.sndbuf.Load()
	return wantsAck(before, delta, sndbuf) || wantsAck(own, delta, sndbuf/2), nil
}

// wantsAck reports whether a buffer of limit bytes becomes half full, or full, with delta.
func wantsAck(before, delta uint64, limit int64) bool {
	b := int64(before & outMask)
	after := b + int64(delta&outMask)
	return b < limit/2 && after >= limit/2 || after >= limit
}

// discharge takes delta back and says what is left.
func (f *flow) discharge(delta uint64) (own, total uint64) {
	s := f.s
	own = f.out.Add(-delta)
	if f == &s.first {
		return own, own + s.others.Load()
	}
	return own, s.others.Add(-delta) + s.first.out.Load()
}

// Released gives room in the send buffer back: the messages were acknowledged, or never will be.
func (f *flow) Released(msgs, bytes int, _ bool) {
	s := f.s
	own, total := f.discharge(uint64(msgs)<<outShift + uint64(bytes))
	c := &s.svc.ctr
	c.sendReleased.Add(uint64(msgs))
	if total == 0 {
		c.sendQueueEmpty.Add(1)
	}
	// A writer is woken when it can do some work, not for each acknowledgement.
	if !s.writers.empty() && s.roomy(total) {
		s.writers.wakeOne()
	}
	if !f.writers.empty() && s.roomyShare(own) {
		f.writers.wakeOne()
	}
}

// refund takes back what an offer has charged and the connection did not take. Because of it another write may have found the buffer
// full, or an acknowledgement too little room to wake one.
func (f *flow) refund(delta uint64) {
	s := f.s
	own, total := f.discharge(delta)
	if !s.writers.empty() && !s.roomy(total+delta) && !s.full(total) {
		s.writers.wakeOne()
	}
	if !f.writers.empty() && !s.roomyShare(own+delta) && !s.fullShare(own) {
		f.writers.wakeOne()
	}
}

// notice is the owner of one message whose sender wants to know how it ends.
type notice struct {
	f    *flow
	what Completion
}

var _ conn.Part = (*notice)(nil)

// Whole is the flow: cancelling its messages cancels this one.
func (n *notice) Whole() conn.Owner { return n.f }

// Released gives the room back and tells the socket.
func (n *notice) Released(msgs, bytes int, acked bool) {
	n.f.Released(msgs, bytes, acked)
	if !acked {
		n.what.Status = StatusCancelled
	}
	if n.f.s.comp.keep(n.what) {
		n.f.s.raise()
	}
}
