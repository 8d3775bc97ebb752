package main

import "time"

// A load run offers datagrams at a rate that does not depend on how fast they are answered: each has a time at which it is
// due, and its latency is counted from that time until its answer is there, whatever held it up: the transport, the peer, or the
// sender itself that was late. A slow moment therefore counts for every datagram that it delayed, not for one (what is called
// coordinated omission).
//
// The datagrams of a flow are due at equal distances, and those of all flows together too. What was due in the measured interval
// counts, whenever its answer comes; what was due there and could not even be sent before the run stopped counts with the time
// it had waited by then.

// due is when datagram seq of the flow should go, as a time since the load began.
func (l *lane) due(seq uint64) time.Duration {
	s := &l.side.spec
	return time.Duration((float64(seq) + float64(l.index)/float64(s.Sockets)) * float64(s.Sockets) / s.Rate * float64(time.Second))
}

// measured reports whether a time since the load began is within the measured interval.
func (s *side) measured(at time.Duration) bool {
	from, to := s.from.Load(), s.to.Load()
	return from != 0 && int64(at) >= from && (to == 0 || int64(at) < to)
}

// sendAtRate is the sender's loop.
func (l *lane) sendAtRate() error {
	s := l.side
	buf := l.flow.buffer(s.spec.Size)
	l.tx.fill(buf, 0)
	p := newPacer()
	defer p.close()
	more := false // the flow was promised another one at once
	for seq := uint64(0); ; seq++ {
		due := l.due(seq)
		if !more && !s.awaitDue(p, due) {
			l.sent = seq
			l.countUnsent(seq)
			return nil
		}
		if s.spec.Verify {
			l.tx.fill(buf, seq)
		}
		now := time.Since(s.begun)
		if s.measured(due) {
			l.late.record(now - due)
		}
		more = l.due(seq+1) <= now && !s.stopping.Load()
		if err := l.sendOne(s.spec.Size, more); err != nil {
			l.sent = seq
			return l.wrap(err)
		}
	}
}

// awaitDue waits for a time since the load began, and returns false when the run stops.
func (s *side) awaitDue(p *pacer, due time.Duration) bool {
	const step = 20 * time.Millisecond // how soon a stop is noticed
	for !s.stopping.Load() {
		left := due - time.Since(s.begun)
		if left <= 0 {
			return true
		}
		p.sleep(min(left, step))
	}
	return false
}

// countUnsent counts the datagrams from seq on that were due in the measured interval.
func (l *lane) countUnsent(seq uint64) {
	s := l.side
	now := time.Since(s.begun)
	end := time.Duration(s.to.Load())
	if end == 0 || end > now {
		end = now
	}
	last := uint64(float64(end) / float64(time.Second) * s.spec.Rate / float64(s.spec.Sockets)) // due at end, or one later
	if last <= seq {
		return
	}
	// Far behind these may be billions: in a thousand groups then.
	group := max(1, (last-seq)/1000)
	for ; seq < last; seq += group {
		n := min(group, last-seq)
		if due := l.due(seq + n/2); s.measured(due) {
			l.times.recordN(now-due, int64(n))
			l.late.recordN(now-due, int64(n))
		}
	}
}

// receiveAnswers is the other half: the answers come in the order of what they answer.
func (l *lane) receiveAnswers() error {
	s := l.side
	in := make([]byte, s.spec.Size+1)
	for seq := uint64(0); ; seq++ {
		n, err := l.flow.recv(in)
		if err != nil {
			return l.wrap(err)
		}
		if due := l.due(seq); s.measured(due) {
			l.times.record(time.Since(s.begun) - due)
		}
		if err := l.check(in[:n], seq); err != nil {
			return err
		}
		l.received.Store(seq + 1)
	}
}
