package rds

import (
	"context"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/verbs"
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
	return &localLink{from: p, back: to.localPeer(p.la.addr)}
}

func (l *localLink) deliver(o conn.Owner, m [1]conn.Incoming) {
	to, n := l.back, m[0].Len
	if m[0].DstPort == PingPort {
		// The stack answers, whatever the payload (rds-protocol spec 2.6).
		to = l.from
		m[0] = conn.Incoming{SrcPort: PingPort, DstPort: m[0].SrcPort}
		to.la.svc.ctr.recvPing.Add(1)
	}
	// Senders stop at congested ports, so each socket's buffer bounds this; the bound per peer is
	// for senders who do not.
	to.la.svc.deliver(to, 0, m[:], maxInt64)
	o.Released(1, n, true)
}

// SendExtra executes an operation here and now: memory is copied.
func (l *localLink) SendExtra(o conn.Owner, srcPort, dstPort uint16, payload []byte, _ conn.SendFlags, x *conn.Extra) error {
	m := [1]conn.Incoming{{SrcPort: srcPort, DstPort: dstPort, Len: len(payload), First: conn.Frag{Data: payload}}}
	if x == nil {
		l.deliver(o, m)
		return nil
	}
	if b := x.Buffer; b != nil {
		m[0].Len = b.Len()
		for i, p := range b.Pieces(nil) {
			if i == 0 {
				m[0].First.Data = p
			} else {
				m[0].More = append(m[0].More, conn.Frag{Data: p})
			}
		}
		defer b.Release()
	}
	if x.RDMA == nil {
		if x.Cookie != 0 {
			m[0].Ext = &conn.Ext{Cookie: x.Cookie}
		}
		l.deliver(o, m)
		return nil
	}
	op := x.RDMA.Owner.(*operation)
	st := op.execute(l.back.la)
	if silent := op.Silent && m[0].Len == 0; st != conn.RDMASuccess || silent {
		o.Released(1, m[0].Len, st == conn.RDMASuccess)
	} else {
		m[0].Ext = &conn.Ext{Used: op.RKey, HasUsed: !op.what.Op.atomic()}
		l.deliver(o, m)
	}
	op.RDMADone(st)
	return nil
}

// Map is not called: memory for a peer in this Service is registered as for any.
func (l *localLink) Map(context.Context, []byte, uint64, verbs.Access, bool) (*conn.Mapping, error) {
	return nil, verbs.ErrNotSupported
}

func (l *localLink) WaitUp(context.Context, <-chan struct{}) error { return nil }

func (l *localLink) Flush() {}

func (l *localLink) PeerCongested(port uint16) bool {
	s := l.back.la.ports.lookup(port)
	return s != nil && s.q.congested.Load()
}

func (l *localLink) Cancel(conn.Owner, int) int { return 0 }
