package conn

import "time"

// ackedLocked takes the peer's acknowledgement of everything up to ack. Owners are collected in r, and told there if it
// fills up: mu is held on entry and on return, and let go in between then.
func (c *Conn) ackedLocked(ack uint64, r *released) {
	if ack < c.q.una {
		return
	}
	if ack >= c.q.everSent {
		// Never sent by anybody at this address since our sequences began: not believed.
		c.m.count.recvBadAck.Inc()
		return
	}
	for {
		n, more := c.q.ack(ack, r)
		c.m.count.sendAcked.Add(uint64(n))
		if !more {
			break
		}
		c.mu.Unlock()
		r.tell()
		c.mu.Lock()
	}
	c.emptyLocked()
}

// emptyLocked tells Manager.Close, which waits for that, that nothing of anybody's is queued.
func (c *Conn) emptyLocked() {
	if c.ctl.drained != nil && !c.q.owes() {
		close(c.ctl.drained)
		c.ctl.drained = nil
	}
}

// armAckLocked makes sure that what has been received is acknowledged within the delay, asked for or not. The timer
// goes off at half of it, and sends only if nothing else has carried an acknowledgement since it was set: in a dialogue
// it never does, because the answers carry them.
func (c *Conn) armAckLocked() {
	c.ackArmed, c.ackAtArm = true, c.ackSent
	if d := c.m.cfg.AckDelay / 2; c.ackTimer == nil {
		c.ackTimer = time.AfterFunc(d, c.ackTimeout)
	} else {
		c.ackTimer.Reset(d)
	}
}

func (c *Conn) ackTimeout() {
	c.mu.Lock()
	c.ackArmed = false
	switch {
	case !c.up || c.ackNext == c.ackSent:
		c.mu.Unlock()
	case c.ackSent != c.ackAtArm:
		c.armAckLocked()
		c.mu.Unlock()
	default:
		c.ackNow = true
		c.m.count.ackDelayed.Inc()
		c.transmitLocked()
	}
}

// askDelay is how long messages to a kernel may stay without an acknowledgement after the last one was sent
// before we ask for it. A kernel acknowledges only when asked (rds-protocol spec 3.6, P10), and our budget leaves up
// to eight messages without the question.
const askDelay = 100 * time.Millisecond

// armAsk has ask look after the messages just sent. mu is held.
func (c *Conn) armAsk() {
	if c.askArmed {
		return
	}
	c.askArmed = true
	if c.askTimer == nil {
		c.askTimer = time.AfterFunc(askDelay, c.ask)
	} else {
		c.askTimer.Reset(askDelay)
	}
}

// ask sends a ping that asks for an acknowledgement if the last messages to a kernel have none.
func (c *Conn) ask() {
	c.mu.Lock()
	c.askArmed = false
	switch {
	case !c.up || c.open || c.q.una == c.q.tail:
		c.mu.Unlock()
	case c.q.next != c.q.tail || c.link.Outstanding() > 0:
		c.armAsk() // on their way
		c.mu.Unlock()
	case c.q.ackMsgs == kernelAckMsgs:
		c.mu.Unlock() // the last message asked
	default:
		c.pingLocked(nil)
		c.transmitLocked()
	}
}
