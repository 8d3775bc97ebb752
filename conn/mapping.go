package conn

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Mapping is memory that a device may touch, with its keys. Who made it gives it back with Release, once.
type Mapping struct {
	dev  *ibdev.Device
	lkey verbs.LKey
	rkey verbs.RKey
	iova uint64

	release func(prompt bool, done func(error))
	valid   func() bool // nil: until it is released
}

// Device is the device. A Mapping holds a reference to it until it is released.
func (m *Mapping) Device() *ibdev.Device { return m.dev }

// LKey and RKey are the keys, for operations of ours and of peers.
func (m *Mapping) LKey() verbs.LKey { return m.lkey }
func (m *Mapping) RKey() verbs.RKey { return m.rkey }

// IOVA is the address of the first byte.
func (m *Mapping) IOVA() uint64 { return m.iova }

// Valid reports whether the keys work, as far as is known: the request that was to make them valid may have been lost with its
// connection. Advice.
func (m *Mapping) Valid() bool { return m.valid == nil || m.valid() }

// Release gives the memory back: promptly, or when the device's pools get to it; until then a peer may still reach it. done is
// called once, when nobody does any more; it may run anywhere, handlers included, and may not wait. Nothing of ours
// that is posted names the memory. It does not wait.
func (m *Mapping) Release(prompt bool, done func(error)) { m.release(prompt, done) }

// Register registers mem with the device of local, where peers may touch it through any connection. Memory outside the
// Go heap, or pinned until Release's done. Errors: ErrNoDevice, ErrClosed, verbs.ErrDeviceGone, mrpool's, the provider's. May
// wait, at a bound of the device's pools until something is given back, for a while.
func (m *Manager) Register(ctx context.Context, local netip.Addr, mem []byte, iova uint64, access verbs.Access) (*Mapping, error) {
	d, err := m.device(ctx, local)
	if err != nil {
		return nil, err
	}
	defer d.Put()
	pm, err := d.Pools().Register(ctx, mem, iova, access)
	if err != nil {
		return nil, goneOr(d, err)
	}
	return pooled(d, pm), nil
}

// RegisterPaged is Register for memory of which nothing is pinned. verbs.ErrNotSupported where the device cannot.
func (m *Manager) RegisterPaged(ctx context.Context, local netip.Addr, mem verbs.PagedMemory, iova uint64, access verbs.Access) (*Mapping, error) {
	d, err := m.device(ctx, local)
	if err != nil {
		return nil, err
	}
	defer d.Put()
	mr, err := d.PD().RegOnDemandMR(mem, iova, access)
	if err != nil {
		return nil, fmt.Errorf("register on demand: %w", goneOr(d, err))
	}
	d.GetNamed(holderPaged)
	p := &Mapping{dev: d, lkey: mr.LKey(), rkey: mr.RKey(), iova: iova}
	p.release = func(_ bool, done func(error)) { go deregister(d, mr, done) }
	return p, nil
}

func (m *Manager) device(ctx context.Context, local netip.Addr) (*ibdev.Device, error) {
	s, err := m.site(local)
	if err != nil {
		return nil, err
	}
	return s.device(ctx)
}

// goneOr is err, unless the device went away: that is then the reason.
func goneOr(d *ibdev.Device, err error) error {
	if d.Gone() {
		return verbs.ErrDeviceGone
	}
	return err
}

// Map registers mem through the connection, for its peer: with a request of its queue where the device can. wait: it waits as
// Register does at a bound. Errors as Register; ErrNotUp if there is no connection at this moment.
func (c *Conn) Map(ctx context.Context, mem []byte, iova uint64, access verbs.Access, wait bool) (*Mapping, error) {
	c.mu.Lock()
	if !c.up {
		c.mu.Unlock()
		return nil, ErrNotUp
	}
	l, d := c.link, c.link.Device()
	d.Get() // the link has one while it is up
	c.mu.Unlock()
	defer d.Put()
	pm, err := l.Map(ctx, mrpool.Request{Segs: [][]byte{mem}, IOVA: iova, Access: access}, wait)
	switch {
	case errors.Is(err, mrpool.ErrQPLost):
		l.Fail(err)
		return nil, ErrNotUp
	case err != nil:
		return nil, err
	}
	return pooled(d, pm), nil
}

// pooled is a mapping of the pools'.
func pooled(d *ibdev.Device, pm mrpool.Mapping) *Mapping {
	m := &Mapping{dev: d, lkey: pm.LKey(), rkey: pm.RKey(), iova: pm.IOVA(), valid: pm.Valid}
	m.release = func(prompt bool, done func(error)) {
		give := pm.Free
		if prompt {
			give = pm.Unmap
		}
		if err := give(done); err != nil {
			done(err)
		}
	}
	return m
}

// FlushMemory returns when what was released before it was called is its owners' again, or ctx is done. May wait.
func (m *Manager) FlushMemory(ctx context.Context) error {
	m.mu.RLock()
	sites := make([]*site, 0, len(m.sites))
	for _, s := range m.sites {
		sites = append(sites, s)
	}
	m.mu.RUnlock()
	var errs []error
	for _, s := range sites {
		d, err := s.opened(ctx)
		if err != nil {
			return err
		}
		if d != nil {
			errs = append(errs, d.Pools().Flush(ctx))
			d.Put()
		}
	}
	return errors.Join(errs...)
}

// WaitUp waits until the connection is established, and starts that. It may go down again at any time. Errors: ErrClosed,
// also when stop is closed; ctx's.
func (c *Conn) WaitUp(ctx context.Context, stop <-chan struct{}) error {
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
		case <-stop:
			err = ErrClosed
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

const holderPaged = "on-demand region"

// deregister gives mr back however long its operations take: nothing may touch memory that its owner believes
// to be its own again. A device that refuses for another reason is asked a few times; then the owner is told that it has not
// given the memory back.
func deregister(d *ibdev.Device, mr verbs.MR, done func(error)) {
	err := mr.Deregister()
	for refused := 0; err != nil; err = mr.Deregister() {
		if !errors.Is(err, verbs.ErrBusy) {
			if refused++; refused == deregisterTries {
				break
			}
		}
		time.Sleep(deregisterRetry)
	}
	done(err)
	d.PutNamed(holderPaged)
}

const (
	deregisterRetry = 100 * time.Millisecond
	deregisterTries = 5
)

// opened is the device the address listens on, with a reference for the caller; nil: there is none. May wait.
func (s *site) opened(ctx context.Context) (*ibdev.Device, error) {
	select {
	case s.open <- struct{}{}:
		defer func() { <-s.open }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.dev != nil {
		s.dev.Get()
	}
	return s.dev, nil
}
