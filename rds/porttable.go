package rds

import (
	"math/rand/v2"
	"sync/atomic"

	"github.com/openrds/openrds/conn"
)

// portTable maps the ports of one local address to sockets. Lookups take no lock and touch two
// words; changes are made under localAddr.mu. Pages appear as ports in them are bound and stay.
type portTable struct {
	pages [256]atomic.Pointer[portPage]
}

type portPage [256]atomic.Pointer[Socket]

func (t *portTable) lookup(port uint16) *Socket {
	page := t.pages[port>>8].Load()
	if page == nil {
		return nil
	}
	return page[port&0xff].Load()
}

func (t *portTable) bind(port uint16, s *Socket) bool {
	page := t.pages[port>>8].Load()
	if page == nil {
		page = new(portPage)
		t.pages[port>>8].Store(page)
	}
	return page[port&0xff].CompareAndSwap(nil, s)
}

// unbind frees port if it is s's.
func (t *portTable) unbind(port uint16, s *Socket) {
	if page := t.pages[port>>8].Load(); page != nil {
		page[port&0xff].CompareAndSwap(s, nil)
	}
}

// free is an unbound port: from a random start upwards, around, never 0 or 1 (rds-protocol spec 1.2),
// nor the port that connections send their own pings from. It reports false when all are taken.
func (t *portTable) free() (uint16, bool) {
	start := uint16(rand.Uint32())
	for port := start; ; {
		if port >= firstUserPort && port != conn.PingSourcePort && t.lookup(port) == nil {
			return port, true
		}
		if port++; port == start {
			return 0, false
		}
	}
}

// each calls f for every bound socket.
func (t *portTable) each(f func(*Socket)) {
	for i := range t.pages {
		page := t.pages[i].Load()
		if page == nil {
			continue
		}
		for j := range page {
			if s := page[j].Load(); s != nil {
				f(s)
			}
		}
	}
}
