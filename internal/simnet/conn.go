package simnet

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/openrds/openrds/internal/packetio"
)

// conn is a packetio.Conn. Its fields are guarded by net.mu, where not said otherwise.
type conn struct {
	net   *Net
	local netip.AddrPort
	wake  chan struct{} // wakes Wait to look again; holds at most one
	timer *time.Timer   // Wait's own

	rx      []rxTrain
	rxCost  int
	lent    [][]byte // data of the last Recv
	dropped uint64
	woken   bool // Wake was called since Wait returned
	closed  bool
	off     bool // Unplug was called

	leaving []departure // trains sent and not yet departed, in order
	txBytes int         // their bytes
	refused int         // bytes of the train that Send refused last
}

// rxTrain is a packet in a receive buffer, or several that GRO joined.
type rxTrain struct {
	packet
	segSize int
	segs    int
	cost    int
}

// takes reports whether p can go on at the end of t.
func (t *rxTrain) takes(p *packet) bool {
	return p.from == t.from && p.to == t.to && p.tos == t.tos && p.at == t.at &&
		len(p.data) > 0 && len(p.data) <= t.segSize &&
		len(t.data) == t.segs*t.segSize && // the last one is full
		t.segs < packetio.MaxTrainSegs && len(t.data)+len(p.data) <= packetio.MaxTrainBytes
}

type departure struct {
	at    time.Duration
	bytes int
}

func (c *conn) LocalAddr() netip.AddrPort { return c.local }

func (c *conn) Caps() packetio.Caps {
	cfg := &c.net.cfg
	return packetio.Caps{MTU: cfg.MTU, GSO: !cfg.NoGSO, RecvBuffer: cfg.RecvBuffer}
}

func (c *conn) PathMTU(netip.Addr) int { return c.net.cfg.MTU }

// poison is what lent memory holds once it has been given back. The race detector takes a copy for one access.
var poison = bytes.Repeat([]byte{0xdb}, 64<<10)

func (c *conn) Recv(ts []packetio.RxTrain) (int, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for i, b := range c.lent {
		for len(b) > 0 {
			b = b[copy(b, poison):] // whoever looks at it still finds out
		}
		c.lent[i] = nil
	}
	c.lent = c.lent[:0]
	if c.closed {
		return 0, net.ErrClosed
	}
	n := min(len(ts), len(c.rx))
	for i := range n {
		t := &c.rx[i]
		ts[i] = packetio.RxTrain{From: t.from, Data: t.data, SegSize: t.segSize, TOS: t.tos, TTL: defaultTTL}
		c.lent = append(c.lent, t.data)
		c.rxCost -= t.cost
	}
	// Moved down rather than cut off at the front, so that the array serves again.
	rest := copy(c.rx, c.rx[n:])
	clear(c.rx[rest:])
	c.rx = c.rx[:rest]
	return n, nil
}

func (c *conn) Send(ts []packetio.TxTrain) (int, error) {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	defer n.arm()
	for i := range ts {
		switch {
		case c.closed:
			return i, net.ErrClosed
		case c.off:
			return len(ts), nil
		}
		if err := c.sendTrain(&ts[i]); err != nil {
			return i, err
		}
	}
	return len(ts), nil
}

// sendTrain sends the datagrams of t.
func (c *conn) sendTrain(t *packetio.TxTrain) error {
	size := 0
	for _, b := range t.Vec {
		size += len(b)
	}
	segs, segSize := t.Segs, t.SegSize
	if segs <= 1 {
		segs, segSize = 1, size
	}
	to := netip.AddrPortFrom(t.To.Addr().Unmap(), t.To.Port())
	switch {
	case size > packetio.MaxTrainBytes || segs > packetio.MaxTrainSegs || segs > 1 && c.net.cfg.NoGSO,
		size > segs*segSize || segs > 1 && size <= (segs-1)*segSize,
		!to.IsValid() || to.Port() == 0 || to.Addr().Is4() != c.local.Addr().Is4():
		return fmt.Errorf("simnet: send %d bytes as %d x %d from %v to %v: %w",
			size, segs, segSize, c.local, t.To, syscall.EINVAL)
	}
	now := c.net.now()
	if _, ok := c.roomAt(now, size); !ok {
		c.refused = size
		return packetio.ErrWouldBlock
	}

	p := packet{from: c.local, to: to, tos: t.TOS}
	gone := now
	if segs == 1 && len(t.Vec) == 1 {
		p.data = t.Vec[0]
		gone = c.net.transmit(now, p)
	} else {
		flat := make([]byte, 0, size)
		for _, b := range t.Vec {
			flat = append(flat, b...)
		}
		for range segs {
			n := min(segSize, len(flat))
			p.data, flat = flat[:n:n], flat[n:]
			gone = max(gone, c.net.transmit(now, p))
		}
	}
	if c.net.cfg.SendBuffer > 0 && gone > now {
		c.leaving = append(c.leaving, departure{gone, size})
		c.txBytes += size
	}
	return nil
}

// roomAt reports whether a train of size bytes can be sent, and if not, when. An empty send buffer
// takes any train.
func (c *conn) roomAt(now time.Duration, size int) (at time.Duration, ok bool) {
	done := 0
	for ; done < len(c.leaving) && c.leaving[done].at <= now; done++ {
		c.txBytes -= c.leaving[done].bytes
	}
	c.leaving = append(c.leaving[:0], c.leaving[done:]...)
	left := c.txBytes
	if left == 0 || left+size <= c.net.cfg.SendBuffer {
		return now, true
	}
	for _, d := range c.leaving {
		at = d.at
		if left -= d.bytes; left+size <= c.net.cfg.SendBuffer {
			break
		}
	}
	return at, false
}

func (c *conn) Wait(deadline time.Time, wantWrite bool) error {
	for {
		until, err := c.look(deadline, wantWrite)
		if err != nil || until == 0 {
			return err
		}
		var expired <-chan time.Time
		if until > 0 {
			if c.timer == nil {
				c.timer = time.NewTimer(until)
			} else {
				c.timer.Reset(until)
			}
			expired = c.timer.C
		}
		select {
		case <-c.wake:
		case <-expired:
		}
		if until > 0 {
			c.timer.Stop()
		}
	}
}

// look returns how long Wait has to wait before it looks again: 0 if there is a reason to return,
// less than 0 for ever.
func (c *conn) look(deadline time.Time, wantWrite bool) (time.Duration, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	until := time.Duration(-1)
	if !deadline.IsZero() {
		until = max(0, time.Until(deadline))
	}
	if wantWrite {
		now := c.net.now()
		at, ok := c.roomAt(now, c.refused)
		switch {
		case ok:
			until = 0
		case until < 0 || at-now < until:
			until = at - now
		}
	}
	switch {
	case c.closed:
		return 0, net.ErrClosed
	case until == 0 || c.woken || len(c.rx) > 0 && !wantWrite:
		c.woken = false
		return 0, nil
	}
	return until, nil
}

func (c *conn) Wake() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.woken = true
	c.signal()
}

// signal has Wait look again. Caller holds net.mu.
func (c *conn) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *conn) Dropped() uint64 {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	return c.dropped
}

func (c *conn) Unplug() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.off = true
	c.leaveLocked()
}

// leaveLocked gives up the address.
func (c *conn) leaveLocked() {
	c.rx, c.rxCost = nil, 0
	if c.net.conns[c.local] == c { // after Unplug it may be another's
		delete(c.net.conns, c.local)
	}
}

func (c *conn) Close() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.closeLocked()
	return nil
}

func (c *conn) closeLocked() {
	if !c.closed {
		c.closed = true
		c.leaveLocked()
		c.signal()
	}
}
