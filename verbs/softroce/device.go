package softroce

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/pagemem"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

var errNoMemory = verbs.ErrNoMemory

// Config is the configuration of a Provider. The zero value is the documented default.
type Config struct {
	// Network carries the packets; nil: UDP sockets of the host.
	Network packetio.Network
	// Port is the UDP port of the device and of its peers; 0: 4791.
	Port uint16
	// Epoch is the domain the devices' engines register with; nil: one of the provider's own.
	Epoch *epoch.Domain
	// Logger, nil: none.
	Logger hclog.Logger
	// GiveUp is how long a QP may go without any progress before its oldest request fails with
	// RETRY_EXC, unless the attributes (timeout, retry_cnt) say longer; 0: 10 s.
	GiveUp time.Duration
	// DeregisterBound is how long MR.Deregister waits for operations on the region; 0: 5 s.
	DeregisterBound time.Duration
	// RecvBuffer is what to ask of the kernel for the socket's receive buffer, in bytes; 0: 8 MiB.
	// The kernel grants what net.core.rmem_max allows (or all of it, to root).
	RecvBuffer int
	// Peers is among how many peers sending at once the receive buffer is shared; 0: 4.
	Peers int
	// NoGSO switches UDP segmentation offload off, as is done when the kernel refuses it.
	NoGSO bool
}

func (c Config) withDefaults() Config {
	def := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.GiveUp, 10*time.Second)
	def(&c.DeregisterBound, 5*time.Second)
	if c.Port == 0 {
		c.Port = roce.Port
	}
	if c.RecvBuffer == 0 {
		c.RecvBuffer = 8 << 20
	}
	if c.Peers <= 0 {
		c.Peers = 4
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.Network == nil {
		c.Network = udpNetwork{rcvbuf: c.RecvBuffer, noGSO: c.NoGSO}
	}
	return c
}

// Provider opens softroce devices: verbs.Provider and verbs.DeviceWatcher.
type Provider struct {
	cfg Config

	// changes is held while devices come or go, events of it being queued included; it is taken before mu.
	changes  sync.Mutex
	watchers []*watcher
	mon      *monitor                // nil: nobody watches, or the network is not the host's
	host     *hostAddrs              // with mon: what the host had when last looked at
	lost     map[netip.Addr]struct{} // removed because an address could no longer be used that no interface had

	mu      sync.Mutex
	devs    map[netip.Addr]*device // open, and not removed
	removed map[netip.Addr]bool    // by Remove

	tracers atomic.Pointer[[]*tracer] // of TracePackets; nil: none, and the list is never changed
}

// New makes a provider.
func New(cfg Config) *Provider {
	return &Provider{cfg: cfg.withDefaults(), devs: make(map[netip.Addr]*device), removed: make(map[netip.Addr]bool),
		lost: make(map[netip.Addr]struct{})}
}

// Name implements verbs.Provider.
func (*Provider) Name() string { return "softroce" }

func checkAddr(addr netip.Addr) error {
	if !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("%v is not a unicast address: %w", addr, verbs.ErrInvalid)
	}
	return nil
}

// OpenDevice opens a device on a local unicast address. Errors match verbs.ErrNoSuchAddress when the host
// does not have the address or it was removed, verbs.ErrBusy when it is opened already, here or elsewhere.
func (p *Provider) OpenDevice(addr netip.Addr) (verbs.Device, error) {
	addr = addr.Unmap()
	if err := checkAddr(addr); err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.devs[addr]
	if p.removed[addr] || old != nil && old.isRemoved() {
		return nil, fmt.Errorf("open device %v, which was removed: %w", addr, verbs.ErrNoSuchAddress)
	}
	if old != nil {
		return nil, &verbs.BusyError{Object: "address " + addr.String(), Holders: []string{"this process"}}
	}
	conn, err := p.cfg.Network.Listen(netip.AddrPortFrom(addr, p.cfg.Port))
	if err != nil {
		return nil, fmt.Errorf("open device %v: %w", addr, err)
	}
	d := newDevice(p, addr, conn)
	p.devs[addr] = d
	go d.run()
	return d, nil
}

// device is an opened device: one address, one socket, one engine.
type device struct {
	prov *Provider
	cfg  *Config
	addr netip.Addr
	is4  bool
	conn packetio.Conn
	caps packetio.Caps
	attr verbs.DeviceAttr
	cm   *connManager
	qps  table[qp]
	mrs  table[mr]
	mws  table[mw] // its keys are the other half of those of mrs

	ownEpoch *epoch.Domain // to close with the device; nil when the configuration gave one
	stats    counters
	stopped  chan struct{}

	role      sync.Mutex   // the engine role
	waitUntil atomic.Int64 // when the engine goroutine will wake by itself, Unix ns

	// Callers of Progress, and the engine goroutine's leaving the socket to them.
	polls   atomic.Uint64
	asleep  atomic.Bool
	parked  atomic.Uint64    // polls when somebody last parked
	sleeper packetio.Sleeper // conn, if it can; else nil

	// Notes for the holder of the role, left by whoever.
	nKicks    atomic.Int32
	kickMu    sync.Mutex
	kicks     []*qp
	kickSpare []*qp // engine role
	gsiOut    []gsiMAD
	gsiSpare  []gsiMAD // engine role

	// Under the engine role.
	closing bool
	off     bool // removed: see watch.go
	part    *epoch.Participant
	now     time.Time // read once per step
	rx      [rxBatch]packetio.RxTrain
	train   *packetio.RxTrain // being taken apart
	place   placement
	direct  []sge // see translate
	tx      txBatch
	timers  timerHeap
	txq     []*qp
	acks    []*qp
	cqReady []*cq
	more    bool
	drops   uint64
	gsiPSN  uint32
	gsiIDs  roce.IDTracker
	paging  paging // says itself what is under the role
	inHandlerMark

	mu             sync.Mutex
	srqs           map[*srq]struct{}
	nPD, nCQ, nSRQ int
	removed        atomic.Bool // written under mu
	closed         bool
	events         asyncQueue
	strays         strays
}

func newDevice(p *Provider, addr netip.Addr, conn packetio.Conn) *device {
	d := &device{prov: p, cfg: &p.cfg, addr: addr, is4: addr.Is4(), conn: conn, caps: conn.Caps(), stopped: make(chan struct{}), srqs: make(map[*srq]struct{})}
	d.attr = verbs.DeviceAttr{
		GUID:  d.random64()&^(0xff<<56) | 0x02<<56, // locally administered
		MaxQP: 1 << 16, MaxQPWR: 1 << 15, MaxSGE: 32, MaxCQ: 1 << 16, MaxCQE: 1 << 20, MaxSRQ: 1 << 12, MaxSRQWR: 1 << 16,
		MaxMR: 1 << 20, MaxMRBytes: 1 << 40, MaxRDAtomic: 128, MaxMsgBytes: maxMessage,
		Caps:  verbs.CapMemMgtExtensions | verbs.CapReadWithInv | verbs.CapMW1 | verbs.CapMW2A | verbs.CapMW2B | verbs.CapAtomics,
		MaxMW: 1 << 20, MaxFastRegPageListLen: maxFastRegPages,
		ActiveMTU:    verbs.MTU(roce.PathMTU(d.caps.MTU)),
		RecvWindow:   d.recvWindow(),
		PreferredMsg: 15 * 4096, // also 60 packets of 1024: a GSO train in either case
	}
	if pagemem.Supported() == nil {
		d.attr.Caps |= verbs.CapOnDemandPaging
	}
	if d.attr.ActiveMTU == 0 {
		d.attr.ActiveMTU = verbs.MTU256
	}
	d.qps.init(uint32(d.random64()), 16, 0xfffffe, d.attr.MaxQP) // 0xffffff is the multicast QPN
	d.mrs.init(uint32(d.random64()), 1, firstWindow-1, d.attr.MaxMR)
	d.mws.init(uint32(d.random64()), firstWindow, lastIndex, d.attr.MaxMW)
	e := p.cfg.Epoch
	if e == nil {
		e = epoch.NewDomain()
		d.ownEpoch = e
	}
	d.part = e.Register("softroce " + addr.String())
	d.tx.init(d)
	d.sleeper, _ = conn.(packetio.Sleeper)
	d.place.conn, _ = conn.(packetio.Placer)
	d.cm = newConnManager(d, mrand.New(mrand.NewChaCha8(d.randomKey())))
	return d
}

// recvWindow is the share of the receive buffer that one peer may fill.
func (d *device) recvWindow() int {
	buf := d.caps.RecvBuffer
	if buf <= 0 {
		buf = 4 << 20
	}
	return max(buf/d.cfg.Peers, 32<<10)
}

func (d *device) random64() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}

// randomKey seeds communication IDs and PSNs, which peers see and must not be able to predict.
func (d *device) randomKey() (key [32]byte) {
	rand.Read(key[:]) // never fails
	return key
}

// Name implements verbs.Device.
func (d *device) Name() string           { return "softroce-" + d.addr.String() }
func (d *device) Attr() verbs.DeviceAttr { return d.attr }
func (d *device) Addr() netip.Addr       { return d.addr }

// Connect implements verbs.Device.
func (d *device) Connect(ctx context.Context, remote netip.AddrPort, vq verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, verbs.Connected, error) {
	d.mayWait("Device.Connect")
	if q, ok := vq.(*qp); !ok || q.dev != d {
		return nil, verbs.Connected{}, fmt.Errorf("connect: the QP is of another device: %w", verbs.ErrInvalid)
	}
	if d.isRemoved() {
		return nil, verbs.Connected{}, fmt.Errorf("connect: %w", verbs.ErrDeviceGone)
	}
	return d.cm.connect(ctx, remote, vq, p, prepare)
}

// Listen implements verbs.Device.
func (d *device) Listen(port uint16, handler func(verbs.ConnRequest)) (verbs.Listener, error) {
	if d.isRemoved() {
		return nil, fmt.Errorf("listen: %w", verbs.ErrDeviceGone)
	}
	return d.cm.listen(port, handler)
}

// Stats implements verbs.Device.
func (d *device) Stats() map[string]uint64 {
	m := make(map[string]uint64, int(nCounters)+16)
	d.stats.snapshot(m)
	d.cm.stats.snapshot(m)
	d.paging.snapshot(m)
	return m
}

// What the CM asks of its host.

func (d *device) localAddr() netip.Addr { return d.addr }
func (d *device) guid() uint64          { return d.attr.GUID }

func (d *device) pathMTU(remote netip.Addr) verbs.MTU {
	m := verbs.MTU(roce.PathMTU(d.conn.PathMTU(remote)))
	return max(m, verbs.MTU256)
}

// releaseQPN makes a number free again that the CM kept for the time of timewait.
func (d *device) releaseQPN(n verbs.QPN) { d.qps.remove(uint32(n)) }

// addChild counts a child of the device, up to limit.
func (d *device) addChild(n *int, limit int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return verbs.ErrClosed
	case d.removed.Load():
		return verbs.ErrDeviceGone
	}
	if *n >= limit {
		return fmt.Errorf("%d exist: %w", *n, verbs.ErrNoMemory)
	}
	*n++
	return nil
}

func (d *device) dropChild(n *int) {
	d.mu.Lock()
	*n--
	d.mu.Unlock()
}

// Close implements verbs.Device.
func (d *device) Close() error {
	d.mayWait("Device.Close")
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	var held []string
	for _, c := range []struct {
		n    int
		what string
	}{{d.nPD, "protection domains"}, {d.nCQ, "completion queues"}, {d.cm.listening(), "listeners"}} {
		if c.n > 0 {
			held = append(held, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	if held != nil {
		d.mu.Unlock()
		return &verbs.BusyError{Object: "device " + d.Name(), Holders: held}
	}
	d.closed = true
	d.mu.Unlock()
	// 1. CM: says DREQ or REJ for what is open ...
	d.cm.close()
	// 2. ... and the engine, as far as the socket takes it.
	d.role.Lock()
	d.step(postStep)
	d.closing = true
	d.role.Unlock()
	d.conn.Wake()
	<-d.stopped
	// 3. Its socket, once nobody reads it.
	err := d.conn.Close()
	// 4. Events still on their way.
	d.events.stop()
	d.paging.faults.wait()
	d.part.Unregister()
	if d.ownEpoch != nil {
		err = errors.Join(err, d.ownEpoch.Close())
	}
	d.prov.mu.Lock()
	if d.prov.devs[d.addr] == d { // a removed device is in the table no more, and its successor may be
		delete(d.prov.devs, d.addr)
	}
	d.prov.mu.Unlock()
	return err
}

// pd is a protection domain.
type pd struct {
	dev      *device
	mu       sync.Mutex
	children int
	closed   bool
}

// AllocPD implements verbs.Device.
func (d *device) AllocPD() (verbs.PD, error) {
	if err := d.addChild(&d.nPD, 1<<16); err != nil {
		return nil, fmt.Errorf("allocate PD: %w", err)
	}
	return &pd{dev: d}, nil
}

func (p *pd) addChild() error {
	if p.dev.isRemoved() {
		return verbs.ErrDeviceGone
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return verbs.ErrClosed
	}
	p.children++
	return nil
}

func (p *pd) dropChild() {
	p.mu.Lock()
	p.children--
	p.mu.Unlock()
}

// Close implements verbs.PD.
func (p *pd) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	if p.children > 0 {
		return &verbs.BusyError{Object: "protection domain", Holders: []string{fmt.Sprintf("%d regions, windows, page lists, queue pairs and shared receive queues", p.children)}}
	}
	p.closed = true
	p.dev.dropChild(&p.dev.nPD)
	return nil
}
