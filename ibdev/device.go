package ibdev

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/ref"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Buffer sizes of the shared receive queues.
const (
	// SmallRecv is the largest SEND of a kernel: a header and one fragment (rds-protocol spec 3.5).
	SmallRecv = 48 + 4096
	// LargeRecv holds the largest SEND between two of ours, MaxSend, with what is left of a slab chunk.
	LargeRecv = 64 << 10
	// MaxSend is the SEND that softroce moves most cheaply and the one we announce: 15 packets of 4096
	// bytes fill one GSO train.
	MaxSend = 15 * 4096
)

// Device is what RDS keeps per RDMA device. Whoever got it from a Registry holds a reference and
// gives it back with Put. Methods are safe for concurrent use.
//
//	opened ──▶ listed ──unplugged, failed, Close──▶ removed ──last Put──▶ teardown ──▶ down
//	              └──────────────Registry.Close, last Put──────────────────▲
//
// Nothing new can be made on a removed one, and its users let go: see Registry.remove and release.
type Device struct {
	reg  *Registry
	addr netip.Addr
	dev  verbs.Device
	attr verbs.DeviceAttr
	prog verbs.Progresser // nil: the device works on its own
	refs ref.Count

	pd     verbs.PD
	recvCQ *cq
	small  *recvPool
	large  *recvPool
	pools  *mrpool.Pools
	mrs    mrTable
	stats  deviceStats

	qpsMu sync.RWMutex
	qps   map[verbs.QPN]*QP

	mu      sync.Mutex
	sendCQs []*cq
	nKind   [2]int // QPs per shared receive queue

	holders holders
	removed chan struct{} // closed when the device was removed: see Registry.remove
	free    chan struct{} // closed when the address can be opened again: the hardware is gone, or the teardown has ended
	freed   bool          // free is closed; guarded by reg.mu
	listed  bool          // in the Registry's table, which holds a reference; guarded by reg.mu

	hooksMu sync.Mutex
	hooks   map[*func()]struct{} // nil: they have been called

	stray atomic.Pointer[func(netip.Addr)]

	down chan struct{} // closed when the teardown has ended
	err  error         // of the teardown; read after down
}

type deviceStats struct {
	sendCompletions  atomic.Uint64
	recvCompletions  atomic.Uint64
	strayCompletions atomic.Uint64 // for a QP that is gone; their buffers were put back
	recvNoMemory     atomic.Uint64
	recvPostErrors   atomic.Uint64
	regErrors        atomic.Uint64
	limitEvents      atomic.Uint64
}

// openDevice sets up vdev. On error everything is closed again, vdev included.
func openDevice(r *Registry, addr netip.Addr, vdev verbs.Device) (_ *Device, err error) {
	d := &Device{reg: r, addr: addr, dev: vdev, attr: vdev.Attr(), qps: make(map[verbs.QPN]*QP), hooks: make(map[*func()]struct{}),
		removed: make(chan struct{}), free: make(chan struct{}), down: make(chan struct{})}
	d.prog, _ = vdev.(verbs.Progresser)
	d.refs.Init(func() { go d.teardown() })
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("device %s: %w", vdev.Name(), err), d.releaseAll())
		}
	}()
	if d.pd, err = vdev.AllocPD(); err != nil {
		return nil, err
	}
	if d.recvCQ, err = d.newCQ(true, r.cfg.Small.Max+r.cfg.Large.Max); err != nil {
		return nil, err
	}
	if d.small, err = newRecvPool(d, SmallRecv, smallBit, r.cfg.Small); err != nil {
		return nil, err
	}
	if d.large, err = newRecvPool(d, LargeRecv, 0, r.cfg.Large); err != nil {
		return nil, err
	}
	d.pools, err = mrpool.New(mrpool.Config{PD: d.pd, Attr: d.attr, Epoch: r.cfg.Epoch, Ref: (*mrRef)(d), Logger: r.logger.Named("mrpool"),
		Small: r.cfg.Pools.Small, Large: r.cfg.Pools.Large, MaxPinned: r.cfg.Pools.MaxPinned})
	if err != nil {
		return nil, err
	}
	vdev.SetAsyncHandler(d.event)
	return d, nil
}

// Verbs is the device itself, for connection management.
func (d *Device) Verbs() verbs.Device { return d.dev }

// Name is the provider's name of the device.
func (d *Device) Name() string { return d.dev.Name() }

// Addr is the local address the device was opened for.
func (d *Device) Addr() netip.Addr { return d.addr }

// Attr are the device's limits.
func (d *Device) Attr() verbs.DeviceAttr { return d.attr }

// Pools is the device's registered memory. Whoever has a mapping of it holds a reference to the device through
// it, and one more for the calls.
func (d *Device) Pools() *mrpool.Pools { return d.pools }

// Progress does what is due on the device, on the caller's goroutine, and reports whether there was
// anything: verbs.Progresser, where the device has it.
func (d *Device) Progress() bool { return d.prog != nil && d.prog.Progress() }

// Park is verbs.Progresser's: a caller of Progress is about to sleep.
func (d *Device) Park() {
	if d.prog != nil {
		d.prog.Park()
	}
}

// Refill posts receive buffers that are missing because there was no memory for them. What frees memory elsewhere in
// the slab does not know of queues that want it, so somebody asks from time to time.
func (d *Device) Refill() {
	d.small.refill()
	d.large.refill()
}

// event is the receiver of asynchronous events.
func (d *Device) event(e verbs.AsyncEvent) {
	switch {
	case e.Type == verbs.EventSRQLimitReached:
		d.stats.limitEvents.Inc()
		switch e.SRQ {
		case d.small.srq:
			d.small.grow()
		case d.large.srq:
			d.large.grow()
		}
	case e.Type == verbs.EventDeviceFatal, e.Type == verbs.EventDeviceRemoved:
		d.reg.logger.Warn("device lost", "device", d.dev.Name(), "addr", d.addr, "event", e.Type)
		// What has failed holds its address until it has been closed; what is gone does not.
		d.reg.remove(d, e.Type, e.Type == verbs.EventDeviceRemoved)
	case e.Type == verbs.EventStrayPacket:
		if f := d.stray.Load(); f != nil {
			(*f)(e.From.Unmap())
		}
	case e.QP != nil:
		if qp := d.findQP(e.QP.Num()); qp != nil && qp.QP == e.QP {
			if e.Type == verbs.EventQPLastWQEReached {
				// It comes on a way of its own, and may overtake the completion that says why the QP is in ERR.
				qp.sendCQ.barrier()
			}
			qp.handler.QPEvent(e.Type)
		}
	case e.CQ != nil:
		// Completions are reserved, so an overflow is a bug of ours or the provider's, and completions
		// are lost: no QP of the queue can be trusted.
		d.reg.logger.Error("completion queue overflowed", "device", d.dev.Name())
		for _, qp := range d.allQPs() {
			if qp.sendCQ.vcq == e.CQ || d.recvCQ.vcq == e.CQ {
				qp.handler.QPEvent(e.Type)
			}
		}
	}
}

// OnStray has f called with the source of a packet for a QP that does not exist (verbs.EventStrayPacket), in place of who was called
// before. It runs on a goroutine of the provider, and does not wait.
func (d *Device) OnStray(f func(from netip.Addr)) { d.stray.Store(&f) }

// teardown frees the device. It runs when the last reference is gone: no QP, no listener, not
// in the registry. It waits for nothing an application does.
func (d *Device) teardown() {
	d.err = d.releaseAll()
	if d.err != nil {
		d.reg.logger.Error("device teardown", "device", d.dev.Name(), "err", d.err)
	}
	d.reg.forget(d) // first: who waits for the end, and has been told how it went, is not told again by Registry.Close
	close(d.down)
}

// gone tells the users of a device that was removed, once. Whoever asks (Gone) has been told already, so a QP that is
// being made is among those below or finds out by itself.
func (d *Device) gone(why verbs.EventType) {
	// 1. Regions become tombstones, listeners know that they are of no use. First, so that a connection that fails in
	// step 2 finds that it has no device.
	d.hooksMu.Lock()
	hooks := d.hooks
	d.hooks = nil
	d.hooksMu.Unlock()
	for f := range hooks {
		(*f)()
	}
	// 2. The connections fail over to "no device".
	for _, qp := range d.allQPs() {
		qp.handler.QPEvent(why)
	}
}

// A device that does not give something back is asked again, since what kept it may pass, and what is left stays for
// as long as the process: memory pinned, the address taken. 5 times and 150 ms in all.
const (
	releaseTries = 5
	releasePause = 10 * time.Millisecond // doubles
)

// releaseAll is release as often as it takes.
func (d *Device) releaseAll() (err error) {
	for try := range releaseTries {
		if try > 0 {
			d.reg.logger.Warn("device teardown: again", "device", d.dev.Name(), "err", err)
			time.Sleep(releasePause << (try - 1))
		}
		if err = d.release(); err == nil {
			break
		}
	}
	return err
}

// release frees what openDevice made, in order, and tolerates that it got only part of the way, also the last time it was
// called.
func (d *Device) release() error {
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	// 1. No more events: nothing grows a queue any more.
	d.dev.SetAsyncHandler(nil)
	// 2. Listeners and QPs are gone: each held a reference, and a QP was drained before it put its own.
	// 3. The pools: recovery is cancelled, then the flush, and what was freed is invalidated here, on no queue. The run
	// of a worker that has dropped the last reference is over: that was its last act.
	if d.pools != nil {
		note("pools", d.pools.Close())
	}
	// 4. The shared receive queues, before the regions that their requests hold; the buffers come home, but for those
	// that applications hold, which stay theirs.
	for _, p := range []*recvPool{d.small, d.large} {
		if p != nil {
			note("shared receive queue", p.close())
		}
	}
	// 5. The regions over slab memory: nothing names them now.
	note("memory regions", d.mrs.close())
	// 6. The completion queues, which QPs used.
	if d.recvCQ != nil {
		note("receive CQ", d.recvCQ.close())
	}
	for _, q := range d.sendCQs {
		note("send CQ", q.close())
	}
	// 7. The protection domain, parent of all that is registered; then the device itself.
	if d.pd != nil {
		note("PD", d.pd.Close())
	}
	note("close", d.dev.Close())
	return errors.Join(errs...)
}

func (d *Device) findQP(n verbs.QPN) *QP {
	d.qpsMu.RLock()
	qp := d.qps[n]
	d.qpsMu.RUnlock()
	return qp
}

func (d *Device) allQPs() []*QP {
	d.qpsMu.RLock()
	defer d.qpsMu.RUnlock()
	out := make([]*QP, 0, len(d.qps))
	for _, qp := range d.qps {
		out = append(out, qp)
	}
	return out
}

// DeviceStats is a snapshot of a device.
type DeviceStats struct {
	Name             string
	Addr             netip.Addr
	Refs             int64
	QPs              int
	SendCompletions  uint64
	RecvCompletions  uint64
	StrayCompletions uint64 // for QPs that are gone
	RecvNoMemory     uint64 // receive buffers the slab did not give
	RecvPostErrors   uint64
	RegErrors        uint64
	LimitEvents      uint64 // a shared receive queue ran low and was made longer
	Small, Large     RecvStats
	Pools            mrpool.Stats
	Provider         map[string]uint64 // verbs.Device.Stats
}

// Stats is a snapshot of the device's counters.
func (d *Device) Stats() DeviceStats {
	d.qpsMu.RLock()
	n := len(d.qps)
	d.qpsMu.RUnlock()
	return DeviceStats{
		Name: d.dev.Name(), Addr: d.addr, Refs: d.refs.Refs(), QPs: n,
		SendCompletions:  d.stats.sendCompletions.Load(),
		RecvCompletions:  d.stats.recvCompletions.Load(),
		StrayCompletions: d.stats.strayCompletions.Load(),
		RecvNoMemory:     d.stats.recvNoMemory.Load(),
		RecvPostErrors:   d.stats.recvPostErrors.Load(),
		RegErrors:        d.stats.regErrors.Load(),
		LimitEvents:      d.stats.limitEvents.Load(),
		Small:            d.small.snapshot(),
		Large:            d.large.snapshot(),
		Pools:            d.pools.Stats(),
		Provider:         d.dev.Stats(),
	}
}
