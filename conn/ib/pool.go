package ib

import (
	"context"

	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Map maps memory through the link: mrpool's QP.MapWait, if wait, or QP.Map. A link whose queue takes no more such requests is
// broken. The caller holds a reference to the device.
func (l *Link) Map(ctx context.Context, r mrpool.Request, wait bool) (mrpool.Mapping, error) {
	p := l.pool.Load()
	if p == nil {
		l.poolMu.Lock()
		if p = l.pool.Load(); p == nil {
			if l.poolClosed {
				l.poolMu.Unlock()
				return mrpool.Mapping{}, mrpool.ErrQPLost
			}
			p = l.qp.Device().Pools().NewQP(l.qp, poolWRs)
			l.pool.Store(p)
		}
		l.poolMu.Unlock()
	}
	if wait {
		return p.MapWait(ctx, r)
	}
	return p.Map(r)
}

// passed tells the pool that a request with that mark has completed, in whatever way: of the pool's requests before it, those that
// were not executed have completed themselves. Send handler.
func (l *Link) passed(mark uint32) {
	if p := l.pool.Load(); p != nil {
		p.Passed(mark)
	}
}

// poolWC is a completion of a request of the pool's.
func (l *Link) poolWC(wc *verbs.WC) {
	if p := l.pool.Load(); p == nil || !p.Completion(wc) {
		l.cfg.Stats.Stale.Inc()
		return
	}
	if wc.Status != verbs.WCSuccess {
		l.failWC(wc)
	}
}
