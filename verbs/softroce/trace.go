package softroce

import (
	"slices"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/verbs"
)

// tracer is one caller of TracePackets.
type tracer struct{ fn func(verbs.Packet) }

// TracePackets implements verbs.PacketTracer: the packets of all devices of the provider, those that are opened later
// included, trains taken apart. Packets out are shown when the socket has taken them, and packets in before
// anything is checked.
func (p *Provider) TracePackets(fn func(verbs.Packet)) (stop func()) {
	t := &tracer{fn}
	p.mu.Lock()
	p.setTracersLocked(append(slices.Clone(p.tracersLocked()), t))
	p.mu.Unlock()
	return func() {
		p.mu.Lock()
		p.setTracersLocked(slices.DeleteFunc(slices.Clone(p.tracersLocked()), func(x *tracer) bool { return x == t }))
		p.mu.Unlock()
		// Who is in the middle of a batch has the old list.
		for _, d := range p.openDevices() {
			d.awaitStep()
		}
	}
}

func (p *Provider) tracersLocked() []*tracer {
	if l := p.tracers.Load(); l != nil {
		return *l
	}
	return nil
}

// setTracersLocked leaves no list at all where there is nobody to tell: that is what the data path looks at.
func (p *Provider) setTracersLocked(l []*tracer) {
	if len(l) == 0 {
		p.tracers.Store(nil)
		return
	}
	p.tracers.Store(&l)
}

func (p *Provider) openDevices() []*device {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*device, 0, len(p.devs))
	for _, d := range p.devs {
		out = append(out, d)
	}
	return out
}

// awaitStep returns when the step in progress, if any, has ended.
func (d *device) awaitStep() {
	d.role.Lock()
	d.unlockRole()
}

// traceIn shows received trains. Engine role.
func (d *device) traceIn(ts []packetio.RxTrain) {
	l := d.prov.tracers.Load()
	if l == nil {
		return
	}
	pkt := verbs.Packet{Time: time.Now(), Local: d.conn.LocalAddr()}
	for i := range ts {
		t := &ts[i]
		pkt.Remote, pkt.TrafficClass, pkt.HopLimit = t.From, t.TOS, t.TTL
		pkt.ID = 0
		for b := t.Data; len(b) > 0; pkt.ID++ {
			n := min(len(b), max(t.SegSize, 1))
			pkt.Payload, b = b[:n], b[n:]
			tell(*l, pkt)
		}
	}
}

// traceOut shows trains that were sent. Engine role.
func (d *device) traceOut(ts []packetio.TxTrain) {
	l := d.prov.tracers.Load()
	if l == nil {
		return
	}
	pkt := verbs.Packet{Time: time.Now(), Out: true, Local: d.conn.LocalAddr(), HopLimit: 64}
	var flat []byte
	for i := range ts {
		t := &ts[i]
		flat = flat[:0]
		for _, v := range t.Vec {
			flat = append(flat, v...)
		}
		pkt.Remote, pkt.TrafficClass = t.To, t.TOS
		pkt.ID = 0
		for b := flat; len(b) > 0; pkt.ID++ {
			n := min(len(b), t.SegSize)
			pkt.Payload, b = b[:n], b[n:]
			tell(*l, pkt)
		}
	}
}

func tell(l []*tracer, pkt verbs.Packet) {
	for _, t := range l {
		t.fn(pkt)
	}
}

var _ verbs.PacketTracer = (*Provider)(nil)
