// Package simnet is a network made up for tests: packetio.Conns that exchange datagrams over links
// which lose, delay, reorder, duplicate and corrupt them, or are cut, as the test says.
//
// The fate of packet n on a link (a pair of addresses, in one direction) is a hash of (seed, link, n)
// and of nothing else, so what happens on one link does not change what happens on another, and a
// run can be repeated from its seed. There is one clock, package time's, and one queue; no two deliveries
// share an instant. In a testing/synctest bubble everything that a delivery sets off has
// therefore come to rest before the next one, and a run is repeated exactly, as far as the code under test
// is itself deterministic. Outside a bubble the same network works in real time.
//
// Packets are copied on the way in, and a received buffer is overwritten at the next Recv: memory used
// longer than packetio allows shows up as rubbish.
//
// All methods may be called from any goroutine. A Net has no goroutine of its own, only a timer
// while packets are under way. A Net and its Conns belong to the bubble they were made in.
//
// Limitations: no fragments (a packet above the MTU is dropped), no ICMP, no routing. A train is
// taken apart when sent and fares packet by packet.
package simnet

import (
	"container/heap"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/openrds/openrds/internal/packetio"
)

const (
	defaultMTU        = 9000
	defaultRecvBuffer = 4 << 20
	defaultCapacity   = 1 << 20
	defaultTTL        = 64
	defaultReorderBy  = 100 * time.Microsecond

	// recvOverhead is what a datagram costs a receive buffer beside its bytes. Linux charges about as
	// much over loopback (struct sk_buff and the slack of its data).
	recvOverhead = 768
)

// Config is the configuration of a Net. The zero value is a network without faults.
type Config struct {
	// MTU is the IP MTU of every interface in bytes; 0 means 9000.
	MTU int
	// RecvBuffer is what a Conn holds before it drops, in bytes; a datagram costs its payload and 768;
	// 0 means 4 MiB.
	RecvBuffer int
	// SendBuffer is how many bytes a Conn may have waiting in front of links with a rate; more is
	// ErrWouldBlock; 0 means no bound.
	SendBuffer int
	// Capacity is how many packets may be under way together; more are dropped; 0 means 1,048,576.
	Capacity int
	// NoGSO makes Conns refuse trains of more than one.
	NoGSO bool
	// GRO joins packets that arrive together into trains: neighbours in the queue of one link and
	// direction, due at the same moment, of equal length. Without it every packet is received singly.
	GRO bool
	// Link is the configuration of every link that SetLink did not set.
	Link LinkConfig
}

// LinkConfig is the behaviour of one direction between two addresses. Probabilities are between 0
// and 1 and concern single packets.
type LinkConfig struct {
	Loss    float64 // does not arrive
	Dup     float64 // arrives twice
	Corrupt float64 // arrives with one bit of its payload changed
	Reorder float64 // arrives late by up to ReorderBy, so that others overtake it

	// ReorderBy is the bound on the delay of a reordered packet; 0 means 100 µs.
	ReorderBy time.Duration

	// Delay, and up to Jitter more, pass between departure and arrival. Jitter alone never changes
	// the order of packets.
	Delay, Jitter time.Duration

	// Down loses every packet sent.
	Down bool

	// RateBytesPerSec spaces departures by the size of the packets with their IP and UDP headers; 0: no
	// limit. QueueBytes bounds what may wait for departure; more is dropped; 0: no bound.
	RateBytesPerSec int64
	QueueBytes      int64

	// MTU, when not 0, is a smaller IP MTU somewhere on the way, of which the sender does not know.
	MTU int
}

// Kind says what happened to a packet.
type Kind uint8

const (
	Sent        Kind = iota // each packet, before its fate
	Delivered               // each packet put into a receive buffer
	Lost                    // LinkConfig.Loss
	Duplicated              // a second delivery will follow
	Corrupted               // Data is as changed
	Reordered               // LinkConfig.Reorder
	TooBig                  // above an MTU
	Cut                     // Down, or Partition
	Filtered                // the filter dropped it
	QueueFull               // QueueBytes or Capacity exceeded
	Overflow                // no room in the receive buffer
	Unreachable             // nobody listens there
	numKinds
)

var kindNames = [numKinds]string{"sent", "delivered", "lost", "duplicated", "corrupted", "reordered",
	"too big", "cut", "filtered", "queue full", "overflow", "unreachable"}

func (k Kind) String() string { return kindNames[k] }

// Event tells of a packet.
type Event struct {
	Kind     Kind
	At       time.Duration // since New
	N        uint64        // number of the packet on its link, from 0
	From, To netip.AddrPort
	TOS      uint8
	Data     []byte // the UDP payload, valid during the call
}

// Net is a simulated network; it implements packetio.Network.
type Net struct {
	seed  uint64
	cfg   Config
	start time.Time
	wg    sync.WaitGroup // the timer's function, from arming to its return

	mu     sync.Mutex // guards all below, and the Conns
	conns  map[netip.AddrPort]*conn
	links  map[linkKey]*link
	cut    map[linkKey]bool
	queue  queue
	pushed uint64        // packets ever queued: orders those due at the same moment
	last   time.Duration // instant of the last delivery
	timer  *time.Timer
	armed  bool // the timer will call deliver, or is about to
	due    time.Duration
	tap    func(Event)
	filter func(Event) bool
	counts [numKinds]uint64
	closed bool
}

type linkKey struct{ from, to netip.Addr }

// link is one direction between two addresses.
type link struct {
	cfg     *LinkConfig // nil: the Net's
	base    uint64      // hash of seed and addresses
	n       uint64      // packets sent
	free    time.Duration
	arrival time.Duration // of the last packet that kept its place
}

// packet is under way.
type packet struct {
	at   time.Duration // due; delivered then or a little later
	seq  uint64
	n    uint64
	from netip.AddrPort
	to   netip.AddrPort
	tos  uint8
	data []byte
}

// New returns a network without Conns. seed decides every packet's fate: print it when a test fails
// (ForTest does).
func New(seed uint64, cfg Config) *Net {
	setDefault(&cfg.MTU, defaultMTU)
	setDefault(&cfg.RecvBuffer, defaultRecvBuffer)
	setDefault(&cfg.Capacity, defaultCapacity)
	return &Net{
		seed:  seed,
		cfg:   cfg,
		start: time.Now(),
		conns: make(map[netip.AddrPort]*conn),
		links: make(map[linkKey]*link),
		cut:   make(map[linkKey]bool),
	}
}

func setDefault(v *int, d int) {
	if *v <= 0 {
		*v = d
	}
}

// TB is what ForTest needs of a *testing.T.
type TB interface {
	Helper()
	Cleanup(func())
	Failed() bool
	Logf(format string, args ...any)
}

// ForTest is New for a test: it closes the network at the end, and prints the seed if the test failed.
func ForTest(tb TB, seed uint64, cfg Config) *Net {
	tb.Helper()
	n := New(seed, cfg)
	tb.Cleanup(func() {
		n.Close()
		if tb.Failed() {
			tb.Logf("simnet seed %d (%#x)", seed, seed)
		}
	})
	return n
}

// Seed returns the seed given to New.
func (n *Net) Seed() uint64 { return n.seed }

// SetTap has fn see every event, in order, with a lock held: fn calls neither the Net nor its
// Conns. nil for none.
func (n *Net) SetTap(fn func(Event)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tap = fn
}

// SetFilter has fn decide about every packet sent, before chance does: true drops it. Calling rules
// as for SetTap. nil for none.
func (n *Net) SetFilter(fn func(Event) (drop bool)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.filter = fn
}

// SetLink sets the behaviour from one address to another, from the next packet sent on; the other
// direction keeps its own. Packets under way arrive as they would have.
func (n *Net) SetLink(from, to netip.Addr, cfg LinkConfig) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from.Unmap(), to.Unmap()).cfg = &cfg
}

// SetDefaultLink sets the behaviour of every link that SetLink did not set.
func (n *Net) SetDefaultLink(cfg LinkConfig) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cfg.Link = cfg
}

// Partition cuts both directions between two addresses until Heal. Packets under way still arrive.
func (n *Net) Partition(a, b netip.Addr) { n.setCut(a, b, true) }

// Heal ends a Partition.
func (n *Net) Heal(a, b netip.Addr) { n.setCut(a, b, false) }

func (n *Net) setCut(a, b netip.Addr, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a, b = a.Unmap(), b.Unmap()
	n.cut[linkKey{a, b}] = cut
	n.cut[linkKey{b, a}] = cut
}

// Count returns how many packets met k so far.
func (n *Net) Count(k Kind) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.counts[k]
}

// Pending returns how many packets are under way.
func (n *Net) Pending() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.queue)
}

// Listen binds a Conn to local; port 0 is one from 49152 on that is free. The error for an address
// in use matches syscall.EADDRINUSE.
func (n *Net) Listen(local netip.AddrPort) (packetio.Conn, error) {
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	fail := func(err error) (packetio.Conn, error) {
		return nil, &net.OpError{Op: "listen", Net: "simnet", Addr: net.UDPAddrFromAddrPort(local), Err: err}
	}
	if !local.Addr().IsValid() || local.Addr().IsUnspecified() {
		return fail(os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fail(net.ErrClosed)
	}
	for port := 49152; local.Port() == 0 && port < 65536; port++ {
		if at := netip.AddrPortFrom(local.Addr(), uint16(port)); n.conns[at] == nil {
			local = at
		}
	}
	if local.Port() == 0 || n.conns[local] != nil {
		return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	c := &conn{net: n, local: local, wake: make(chan struct{}, 1)}
	n.conns[local] = c
	return c, nil
}

// Close closes every Conn and drops what is under way. Once it has returned no tap runs. Safe to
// call twice.
func (n *Net) Close() error {
	n.mu.Lock()
	n.closed = true
	for _, c := range n.conns {
		c.closeLocked()
	}
	n.queue = nil
	if n.armed && n.timer.Stop() {
		n.armed = false
		n.wg.Done()
	}
	n.mu.Unlock()
	n.wg.Wait()
	return nil
}

// now is the time since New.
func (n *Net) now() time.Duration { return time.Since(n.start) }

// link returns the link of a direction. Caller holds n.mu.
func (n *Net) link(from, to netip.Addr) *link {
	k := linkKey{from, to}
	l := n.links[k]
	if l == nil {
		l = &link{base: mix(n.seed)}
		for _, a := range []netip.Addr{from, to} {
			b := a.As16()
			l.base = mix(l.base ^ binary.BigEndian.Uint64(b[:8]))
			l.base = mix(l.base ^ binary.BigEndian.Uint64(b[8:]))
		}
		n.links[k] = l
	}
	return l
}

// mix is the finaliser of splitmix64: every bit of x moves every bit of the result.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// draw numbers the decisions about one packet.
type draw uint64

const (
	drawLoss draw = iota
	drawDup
	drawCorrupt
	drawBit
	drawReorder
	drawReorderBy
	drawJitter
	drawsPerPacket = 8
)

// random is the hash for decision d about packet k.
func (l *link) random(k uint64, d draw) uint64 {
	return mix(l.base + (k*drawsPerPacket+uint64(d))*0x9e3779b97f4a7c15)
}

// chance reports whether decision d about packet k falls below probability p.
func (l *link) chance(k uint64, d draw, p float64) bool {
	return p > 0 && float64(l.random(k, d)>>11) < p*(1<<53)
}

// upTo returns a duration of at most max.
func (l *link) upTo(k uint64, d draw, max time.Duration) time.Duration {
	if max <= 0 {
		return 0
	}
	return time.Duration(l.random(k, d) % uint64(max+1))
}

// note counts and reports an event. Caller holds n.mu.
func (n *Net) note(kind Kind, at time.Duration, p *packet) {
	n.counts[kind]++
	if n.tap != nil {
		n.tap(p.event(kind, at))
	}
}

func (p *packet) event(kind Kind, at time.Duration) Event {
	return Event{Kind: kind, At: at, N: p.n, From: p.from, To: p.to, TOS: p.tos, Data: p.data}
}

// ipBytes is the length of the IP packet that carries a payload between addresses of a's family.
func ipBytes(a netip.Addr, payload int) int {
	const ip4, ip6, udp = 20, 40, 8
	if a.Is4() {
		return ip4 + udp + payload
	}
	return ip6 + udp + payload
}

// transmit decides what becomes of p, whose data is the sender's still, and returns when it leaves
// the sender. Caller holds n.mu.
func (n *Net) transmit(now time.Duration, p packet) (departure time.Duration) {
	l := n.link(p.from.Addr(), p.to.Addr())
	cfg := &n.cfg.Link
	if l.cfg != nil {
		cfg = l.cfg
	}
	p.n = l.n
	l.n++
	n.note(Sent, now, &p)

	size := ipBytes(p.to.Addr(), len(p.data))
	departure = now
	switch {
	case size > n.cfg.MTU:
		n.note(TooBig, now, &p)
		return now
	case n.filter != nil && n.filter(p.event(Sent, now)):
		n.note(Filtered, now, &p)
		return now
	case cfg.Down || n.cut[linkKey{p.from.Addr(), p.to.Addr()}]:
		n.note(Cut, now, &p)
		return now
	}
	if cfg.RateBytesPerSec > 0 {
		begin := max(now, l.free)
		waiting := int64((begin - now).Seconds() * float64(cfg.RateBytesPerSec))
		if cfg.QueueBytes > 0 && waiting+int64(size) > cfg.QueueBytes {
			n.note(QueueFull, now, &p)
			return now
		}
		l.free = begin + time.Duration(int64(size)*int64(time.Second)/cfg.RateBytesPerSec)
		departure = l.free
	}
	switch {
	case cfg.MTU > 0 && size > cfg.MTU:
		n.note(TooBig, now, &p)
		return departure
	case l.chance(p.n, drawLoss, cfg.Loss):
		n.note(Lost, now, &p)
		return departure
	case len(n.queue) >= n.cfg.Capacity:
		n.note(QueueFull, now, &p)
		return departure
	}

	// At least one instant: in virtual time the sender has come to rest before its packet arrives.
	p.at = departure + max(1, cfg.Delay+l.upTo(p.n, drawJitter, cfg.Jitter))
	p.at = max(p.at, l.arrival)
	if l.chance(p.n, drawReorder, cfg.Reorder) {
		by := cfg.ReorderBy
		if by <= 0 {
			by = defaultReorderBy
		}
		p.at += l.upTo(p.n, drawReorderBy, by)
		n.note(Reordered, now, &p)
	} else {
		l.arrival = p.at
	}
	p.data = append(make([]byte, 0, len(p.data)), p.data...)
	if len(p.data) > 0 && l.chance(p.n, drawCorrupt, cfg.Corrupt) {
		bit := l.random(p.n, drawBit) % uint64(8*len(p.data))
		p.data[bit/8] ^= 1 << (bit % 8)
		n.note(Corrupted, now, &p)
	}
	n.push(p)
	if l.chance(p.n, drawDup, cfg.Dup) {
		n.note(Duplicated, now, &p)
		p.data = append([]byte(nil), p.data...)
		n.push(p)
	}
	return departure
}

// Inject has a packet arrive that was seen before, such as one that a filter has dropped: now, and whatever the link does
// to others. It is not counted as sent.
func (n *Net) Inject(e Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.push(packet{at: n.now() + 1, n: e.N, from: e.From, to: e.To, tos: e.TOS, data: append([]byte(nil), e.Data...)})
	n.arm()
}

func (n *Net) push(p packet) {
	p.seq = n.pushed
	n.pushed++
	heap.Push(&n.queue, p)
}

// arm sets the timer for the first packet of the queue. Caller holds n.mu.
func (n *Net) arm() {
	if n.closed || len(n.queue) == 0 {
		return
	}
	due := n.nextDelivery()
	if n.armed {
		if n.due <= due || !n.timer.Stop() {
			return // early enough; or deliver is on its way and arms again
		}
		n.wg.Done()
	}
	n.wg.Add(1)
	n.armed, n.due = true, due
	if wait := due - n.now(); n.timer == nil {
		n.timer = time.AfterFunc(wait, n.deliver)
	} else {
		n.timer.Reset(wait)
	}
}

// nextDelivery is when the first packet of the queue arrives: when it is due, but after the last
// delivery.
func (n *Net) nextDelivery() time.Duration { return max(n.queue[0].at, n.last+1) }

// deliver hands over the packets whose time has come: in virtual time one, or one train.
func (n *Net) deliver() {
	defer n.wg.Done()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.armed = false
	for now := n.now(); len(n.queue) > 0 && n.nextDelivery() <= now; {
		n.last = n.nextDelivery()
		p := heap.Pop(&n.queue).(packet)
		c := n.admit(&p)
		if c == nil {
			continue
		}
		t := rxTrain{packet: p, segSize: len(p.data), segs: 1, cost: cost(&p)}
		for n.cfg.GRO && len(n.queue) > 0 && t.takes(&n.queue[0]) {
			p := heap.Pop(&n.queue).(packet)
			if n.admit(&p) == nil {
				break
			}
			t.data = append(t.data, p.data...)
			t.segs++
			t.cost += cost(&p)
		}
		c.rx = append(c.rx, t)
		c.signal()
	}
	n.arm()
}

// admit returns the Conn that p is for if it takes p into its receive buffer, and charges p to it.
func (n *Net) admit(p *packet) *conn {
	c := n.conns[p.to]
	switch {
	case c == nil:
		n.note(Unreachable, n.last, p)
		return nil
	case c.rxCost+cost(p) > n.cfg.RecvBuffer:
		c.dropped++
		n.note(Overflow, n.last, p)
		return nil
	}
	c.rxCost += cost(p)
	n.note(Delivered, n.last, p)
	return c
}

// cost is what p takes of a receive buffer.
func cost(p *packet) int { return len(p.data) + recvOverhead }

// queue is a heap of packets, the one due first at the front.
type queue []packet

func (q queue) Len() int      { return len(q) }
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q queue) Less(i, j int) bool {
	if q[i].at != q[j].at {
		return q[i].at < q[j].at
	}
	return q[i].seq < q[j].seq
}
func (q *queue) Push(p any) { *q = append(*q, p.(packet)) }
func (q *queue) Pop() any {
	old := *q
	last := len(old) - 1
	p := old[last]
	old[last] = packet{}
	*q = old[:last]
	return p
}

var _ packetio.Network = (*Net)(nil)
