package softroce

import (
	"fmt"
	"slices"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// cq is a completion queue: a ring filled by the holder of the engine role and emptied by Poll.
type cq struct {
	dev     *device
	handler func(verbs.CQ)
	users   atomic.Int32 // queues of QPs that complete here

	mu       sync.Mutex
	ring     []verbs.WC
	head, n  int
	armed    uint8 // armNone, armNext, armSolicited
	overflow bool
	closed   bool

	fire bool // on dev.cqReady; engine role
}

const (
	armNone uint8 = iota
	armNext
	armSolicited
)

// CreateCQ implements verbs.Device.
func (d *device) CreateCQ(cfg verbs.CQConfig) (verbs.CQ, error) {
	if cfg.Depth < 1 || cfg.Depth > d.attr.MaxCQE {
		return nil, fmt.Errorf("create CQ: depth %d outside 1..%d: %w", cfg.Depth, d.attr.MaxCQE, verbs.ErrInvalid)
	}
	if err := d.addChild(&d.nCQ, d.attr.MaxCQ); err != nil {
		return nil, fmt.Errorf("create CQ: %w", err)
	}
	return &cq{dev: d, handler: cfg.Handler, ring: make([]verbs.WC, cfg.Depth)}, nil
}

// use counts a queue that completes here; false, though counted, when the CQ is closed.
func (c *cq) use() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.users.Inc()
	return !c.closed
}

// push adds a completion. Engine role. It reports false on overflow, when the completion is lost.
func (c *cq) push(wc *verbs.WC, solicited bool) bool {
	c.mu.Lock()
	if c.n == len(c.ring) {
		first := !c.overflow
		c.overflow = true
		c.mu.Unlock()
		c.dev.stats.add(cCQOverflow, 1)
		if first {
			c.dev.async(verbs.AsyncEvent{Type: verbs.EventCQErr, CQ: c})
		}
		return false
	}
	i := c.head + c.n
	if i >= len(c.ring) {
		i -= len(c.ring)
	}
	c.ring[i] = *wc
	c.n++
	fire := c.armed == armNext || c.armed == armSolicited && (solicited || wc.Status != verbs.WCSuccess)
	if fire {
		c.armed = armNone
	}
	c.mu.Unlock()
	if fire && c.handler != nil && !c.fire {
		c.fire = true
		c.dev.cqReady = append(c.dev.cqReady, c)
	}
	return true
}

// Poll implements verbs.CQ.
func (c *cq) Poll(wcs []verbs.WC) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(len(wcs), c.n)
	k := copy(wcs[:n], c.ring[c.head:])
	copy(wcs[k:n], c.ring)
	c.head = (c.head + n) % len(c.ring)
	c.n -= n
	return n
}

// Arm implements verbs.CQ.
func (c *cq) Arm(solicitedOnly bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if solicitedOnly && c.armed != armNext {
		c.armed = armSolicited
	} else {
		c.armed = armNext
	}
	return c.n > 0
}

// Close implements verbs.CQ.
func (c *cq) Close() error {
	c.dev.mayWait("CQ.Close")
	c.dev.role.Lock() // no handler runs while we hold it
	defer c.dev.unlockRole()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	if n := c.users.Load(); n > 0 {
		return &verbs.BusyError{Object: "completion queue", Holders: []string{fmt.Sprintf("%d QP queues", n)}}
	}
	c.closed, c.armed, c.n = true, armNone, 0
	if c.fire {
		c.fire = false
		c.dev.cqReady = slices.DeleteFunc(c.dev.cqReady, func(x *cq) bool { return x == c })
	}
	c.dev.dropChild(&c.dev.nCQ)
	return nil
}
