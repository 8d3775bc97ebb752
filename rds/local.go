package rds

import (
	"github.com/openrds/openrds/conn"
)

// localLink carries datagrams between two addresses of one Service (which may be the same), in the caller's
// goroutine. Congestion is exact: a writer sees the port's bit the moment it is set. What was sent
// is queued at its socket, and so acknowledged, when Send returns.
type localLink struct {
	from *peer // the destination as the sender knows it
	back *peer // the sender as the destination knows it
}

// newLocalLink links p to another address of its Service.
func newLocalLink(p *peer, to *localAddr) *localLink {
	for {
		old := to.nearby.Load()
		var list []*peer
		if old != nil {
			list = *old
		}
		list = append(list[:len(list):len(list)], p)
		if to.nearby.CompareAndSwap(old, &list) {
			break
		}
	}
	return &localLink{from: p, back: to.peer(p.la.addr)}
}

func (l *localLink) SendMsg(o conn.Owner, srcPort, dstPort uint16, payload []byte, _ conn.SendFlags) error {
	to, m := l.back, [1]conn.Incoming{{SrcPort: srcPort, DstPort: dstPort, Len: len(payload), First: conn.Frag{Data: payload}}}
	if dstPort == PingPort {
		// The stack answers, whatever the payload (rds-protocol spec 2.6).
		to = l.from
		m[0] = conn.Incoming{SrcPort: PingPort, DstPort: srcPort}
		to.la.svc.ctr.recvPing.Add(1)
	}
	// Senders stop at congested ports, so each socket's buffer bounds this; the bound per peer is
	// for senders who do not.
	to.la.svc.deliver(to, 0, m[:], maxInt64)
	o.Released(1, len(payload))
	return nil
}

func (l *localLink) Flush() {}

func (l *localLink) PeerCongested(port uint16) bool {
	s := l.back.la.ports.lookup(port)
	return s != nil && s.q.congested.Load()
}

func (l *localLink) Cancel(conn.Owner, int) int { return 0 }

// wakeNearby wakes writers of this Service that wait for a port of la.
func (la *localAddr) wakeNearby() {
	if list := la.nearby.Load(); list != nil {
		for _, p := range *list {
			p.congWait.wakeAll()
		}
	}
}
