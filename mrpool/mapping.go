package mrpool

import (
	"fmt"

	"github.com/openrds/openrds/verbs"
)

// Mapping is memory that a key names. It is a value: copies are the same mapping, which is given back once, by Unmap or
// Free. It holds a reference to the device until then. The zero Mapping is none.
type Mapping struct {
	it     *item
	gen    uint64
	rkey   verbs.RKey
	lkey   verbs.LKey
	iova   uint64
	access verbs.Access
	mem    []byte // of a plain registration
	n      int
}

// mapped makes the Mapping of an item that is the caller's.
func (p *pool) mapped(it *item, q *QP, s shape, r *Request) Mapping {
	gen, _ := it.load()
	gen++
	it.q, it.pinned, it.done = q, int64(s.pages)*verbs.PageSize, nil
	it.mapped()
	m := Mapping{it: it, gen: gen, rkey: verbs.RKey(it.key.Load()), lkey: p.ps.ways[it.kind].lkey(it), iova: r.IOVA, access: r.Access, n: s.bytes}
	if it.kind == byRegistration {
		m.mem = it.bytes(r, s.bytes)
	}
	p.ps.ref.Get()
	p.used.Inc()
	p.stats.mapped.Inc()
	it.set(gen, stMapped)
	return m
}

// unmapped undoes mapped, before anybody has seen the Mapping. key is the one the item had.
func (p *pool) unmapped(it *item, key uint32) {
	gen, _ := it.load()
	it.set(gen-1, stFree)
	it.key.Store(key)
	it.pinned = 0
	p.used.Dec()
	p.stats.mapped.Dec()
	p.ps.ref.Put()
}

// RKey is the key for the peer.
func (m Mapping) RKey() verbs.RKey { return m.rkey }

// LKey is the key for requests of our own. Where a window was bound it is that of the region under it, and
// addresses are that region's.
func (m Mapping) LKey() verbs.LKey { return m.lkey }

// IOVA is the address of the first byte.
func (m Mapping) IOVA() uint64 { return m.iova }

// Len is how many bytes are mapped.
func (m Mapping) Len() int { return m.n }

// Valid reports whether m is mapped and, as far as is known, its key works: not given back, not invalidated by the peer, and its
// request has not failed. Advice: it may end at any time.
func (m Mapping) Valid() bool {
	if m.it == nil {
		return false
	}
	gen, s := m.it.load()
	return gen == m.gen && s == stMapped && m.it.gone.Load() != m.gen
}

// Unmap ends the key: by a request posted at once on the queue pair, by the flush worker for a plain registration, by the
// recovery worker if the queue pair is lost. done (nil: nobody waits) is called once, with no lock held, in a
// handler or a worker, when nothing can touch the memory any more; it may not wait. With an error the device did
// not take the region back before the pools were closed: the memory can not be used for anything else.
//
// The error matches ErrNotMapped when m was given back before; done is not called then. Does not wait.
func (m Mapping) Unmap(done func(error)) error { return m.giveBack(stInvalid, done) }

// Free gives m back and leaves the key valid until enough has been freed, or somebody calls Flush. done and the error
// are Unmap's. Does not wait.
func (m Mapping) Free(done func(error)) error { return m.giveBack(stFreed, done) }

func (m Mapping) giveBack(to state, done func(error)) error {
	it := m.it
	if it == nil {
		return fmt.Errorf("unmap: %w", ErrNotMapped)
	}
	p := it.pool
	if !it.move(m.gen, stMapped, to) {
		return m.giveBackLost(done)
	}
	q := it.q // once the item is handed on, it is somebody else's
	it.gaveBack()
	it.done = done
	p.used.Dec()
	switch {
	case it.kind == byRegistration:
		it.unuse()
	case to == stFreed:
		p.setAside(it, false)
		if q.lost() { // else it flushes when it is
			p.flush.kick()
		}
	case it.isGone():
		p.settle(it, nil)
		p.putFree(it)
	case q.enqueue(it):
		q.pump()
	default:
		p.doom(it)
	}
	p.ps.ref.Put()
	return nil
}

// giveBackLost is giveBack of a mapping whose request failed, or of none.
func (m Mapping) giveBackLost(done func(error)) error {
	it := m.it
	p := it.pool
	p.mu.Lock()
	switch {
	case it.move(m.gen, stLost, stStale):
		if done != nil {
			it.dones = append(it.dones, done)
		}
		it.gaveBack()
		p.mu.Unlock()
	case it.move(m.gen, stDead, stEmpty):
		it.gaveBack()
		p.mu.Unlock()
		p.putEmpty(it)
		if done != nil {
			done(nil)
		}
	default:
		p.mu.Unlock()
		p.ps.misuse.Inc()
		it.misused("Unmap")
		return fmt.Errorf("unmap: key %#x: %w", m.rkey, ErrNotMapped)
	}
	p.used.Dec()
	p.ps.ref.Put()
	return nil
}
