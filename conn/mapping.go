package conn

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/verbs"
)

// Mapping is memory that a device may touch, with its keys. Who made it gives it back with Release, once.
type Mapping struct {
	dev  *ibdev.Device
	lkey verbs.LKey
	rkey verbs.RKey
	iova uint64

	release func(prompt bool, done func(error))
}

// Device is the device. A Mapping holds a reference to it until it is released.
func (m *Mapping) Device() *ibdev.Device { return m.dev }

// LKey and RKey are the keys, for operations of ours and of peers.
func (m *Mapping) LKey() verbs.LKey { return m.lkey }
func (m *Mapping) RKey() verbs.RKey { return m.rkey }

// IOVA is the address of the first byte.
func (m *Mapping) IOVA() uint64 { return m.iova }

// Release gives the memory back: promptly, or when the device's pools get to it; until then a peer may still reach it. done is
// called once, when nobody does any more; it may run anywhere, handlers included, and may not wait. Nothing of ours
// that is posted names the memory. It does not wait.
func (m *Mapping) Release(prompt bool, done func(error)) { m.release(prompt, done) }

// Register registers mem with the device of local, where peers may touch it through any connection. Memory outside the
// Go heap, or pinned until Release's done. Errors: ErrNoDevice, ErrClosed, verbs.ErrDeviceGone, the provider's. May wait.
func (m *Manager) Register(ctx context.Context, local netip.Addr, mem []byte, iova uint64, access verbs.Access) (*Mapping, error) {
	s, err := m.site(local)
	if err != nil {
		return nil, err
	}
	d, err := s.device(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Put()
	return registerPlain(d, mem, iova, access)
}

// Map registers mem through the connection, for its peer. As Register otherwise; ErrNotUp if there is no
// connection at this moment. It does not wait.
func (c *Conn) Map(mem []byte, iova uint64, access verbs.Access) (*Mapping, error) {
	c.mu.Lock()
	l, up := c.link, c.up
	c.mu.Unlock()
	if !up {
		return nil, ErrNotUp
	}
	return registerPlain(l.Device(), mem, iova, access)
}

// WaitUp waits until the connection is established, and starts that. It may go down again at any time. Errors: ErrClosed,
// ctx's.
func (c *Conn) WaitUp(ctx context.Context) error {
	for {
		c.mu.Lock()
		switch {
		case c.closed:
			c.mu.Unlock()
			return ErrClosed
		case c.up:
			c.mu.Unlock()
			return nil
		}
		if c.upWait == nil {
			c.upWait = make(chan struct{})
		}
		wait := c.upWait
		c.upWaiters++
		c.kickLocked()
		c.mu.Unlock()
		var err error
		select {
		case <-wait:
		case <-ctx.Done():
			err = ctx.Err()
		}
		c.mu.Lock()
		c.upWaiters--
		c.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

func (c *Conn) wakeUpWaitLocked() {
	if c.upWait != nil {
		close(c.upWait)
		c.upWait = nil
	}
}

// registerPlain makes a region of its own.
func registerPlain(d *ibdev.Device, mem []byte, iova uint64, access verbs.Access) (*Mapping, error) {
	if d.Gone() {
		return nil, verbs.ErrDeviceGone
	}
	mr, err := d.PD().RegMR(mem, iova, access)
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	return newMapping(d, mr, iova), nil
}

func newMapping(d *ibdev.Device, mr verbs.MR, iova uint64) *Mapping {
	d.GetNamed(holderRegion)
	m := &Mapping{dev: d, lkey: mr.LKey(), rkey: mr.RKey(), iova: iova}
	m.release = func(_ bool, done func(error)) { go deregister(d, mr, done) }
	return m
}

const holderRegion = "region"

// deregister gives mr back however long its operations take: nothing may touch memory that its owner believes
// to be its own again.
func deregister(d *ibdev.Device, mr verbs.MR, done func(error)) {
	err := mr.Deregister()
	for errors.Is(err, verbs.ErrBusy) {
		time.Sleep(deregisterRetry)
		err = mr.Deregister()
	}
	done(err)
	d.PutNamed(holderRegion)
}

const deregisterRetry = 100 * time.Millisecond

// RegisterPaged is Register for memory of which nothing is pinned. verbs.ErrNotSupported where the device cannot.
func (m *Manager) RegisterPaged(ctx context.Context, local netip.Addr, mem verbs.PagedMemory, iova uint64, access verbs.Access) (*Mapping, error) {
	s, err := m.site(local)
	if err != nil {
		return nil, err
	}
	d, err := s.device(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Put()
	mr, err := d.PD().RegOnDemandMR(mem, iova, access)
	if err != nil {
		return nil, fmt.Errorf("register on demand: %w", err)
	}
	return newMapping(d, mr, iova), nil
}

// FlushMemory returns when what was released before it was called is its owners' again, or ctx is done. May wait.
func (m *Manager) FlushMemory(ctx context.Context) error { return nil }
