package softroce

import (
	"net/netip"

	"github.com/openrds/openrds/verbs"
)

// hostAddrs are the addresses of a host that a socket can be bound to: those of interfaces that are up and, for IPv6,
// have passed duplicate address detection. Whether an interface has a carrier does not matter: a cable that is pulled for
// a second is what retransmission is for.
type hostAddrs struct {
	addrs map[netip.Addr]struct{} // link-local ones with their zone, by name
	nets  []netip.Prefix          // of loopback interfaces: all of 127.0.0.0/8 is local
}

// lists reports whether an interface has a.
func (h *hostAddrs) lists(a netip.Addr) bool {
	_, ok := h.addrs[a]
	return ok
}

func (h *hostAddrs) has(a netip.Addr) bool {
	if h.lists(a) {
		return true
	}
	for _, n := range h.nets {
		if n.Contains(a) {
			return true
		}
	}
	return false
}

// addressesChanged takes what the host has now: devices of addresses that are gone are removed, and the watchers told.
// bindable asks the kernel about an address that is on no interface, since some can be bound to nevertheless (a local route,
// ip_nonlocal_bind), and their devices stay. m is the monitor that calls; one that was replaced meanwhile is not heard.
func (p *Provider) addressesChanged(m *monitor, now *hostAddrs, bindable func(netip.Addr) bool) {
	p.changes.Lock()
	defer p.changes.Unlock()
	if p.mon != m {
		return
	}
	old := p.host
	p.host = now
	p.mu.Lock()
	open := make([]netip.Addr, 0, len(p.devs))
	for a := range p.devs {
		open = append(open, a)
	}
	p.mu.Unlock()
	for _, a := range open {
		if now.has(a) || !old.has(a) && bindable(a) {
			continue
		}
		if p.unplug(a) {
			p.cfg.Logger.Info("address is gone", "addr", a)
		}
		if !old.lists(a) {
			p.lost[a] = struct{}{} // nothing else would remember that it was there
			p.tell(verbs.DeviceEvent{Addr: a})
		}
	}
	for a := range old.addrs {
		if !now.has(a) {
			p.tell(verbs.DeviceEvent{Addr: a})
		}
	}
	for a := range p.lost {
		if now.has(a) || bindable(a) {
			delete(p.lost, a)
			if !now.lists(a) {
				p.appeared(a)
			}
		}
	}
	for a := range now.addrs {
		if !old.has(a) {
			p.appeared(a)
		}
	}
}

// appeared tells of an address, unless it was removed by hand. The caller holds changes.
func (p *Provider) appeared(a netip.Addr) {
	p.mu.Lock()
	removed := p.removed[a]
	p.mu.Unlock()
	if !removed {
		p.tell(verbs.DeviceEvent{Addr: a, Present: true})
	}
}
