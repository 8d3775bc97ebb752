package ibdev

import (
	"fmt"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
)

// RecvBuf is a receive buffer: a slab chunk that a shared receive queue was given, with one SEND in
// it. Whoever holds a reference may read it. With the last one it goes back to its queue, or to
// the slab when the queue has enough or its device is gone. All methods may be called from
// anywhere, handlers included.
type RecvBuf struct {
	refs  atomic.Int32
	idx   uint32
	pool  *recvPool
	chunk *slab.Chunk
	mem   []byte // chunk's first pool.size bytes
}

// NewRecvBuf makes a buffer of n bytes of chunk that belongs to no queue, with one reference, which takes over the caller's to
// the chunk. For what did not come from a device.
func NewRecvBuf(chunk *slab.Chunk, n int) *RecvBuf {
	b := &RecvBuf{chunk: chunk, mem: chunk.Bytes()[:n:n]}
	b.refs.Store(1)
	return b
}

// Bytes is the buffer. The caller holds a reference.
func (b *RecvBuf) Bytes() []byte { return b.mem }

// Get takes a further reference. The caller holds one.
func (b *RecvBuf) Get() {
	if b.refs.Inc() <= 1 {
		panic("BUG: receive buffer revived")
	}
}

// Put gives a reference back.
func (b *RecvBuf) Put() {
	switch n := b.refs.Dec(); {
	case n == 0 && b.pool == nil:
		b.chunk.Put()
	case n == 0:
		b.pool.putBack(b)
	case n < 0:
		panic("BUG: receive buffer put twice")
	}
}

// Scarce reports whether buffers of this kind are running out: more than three quarters of what the device
// may have are in use. Whoever would keep the buffer for long copies its content instead.
func (b *RecvBuf) Scarce() bool {
	return b.pool != nil && b.pool.live.Load() > int32(b.pool.cfg.Max-b.pool.cfg.Max/4)
}

// RecvConfig says how many buffers a shared receive queue has.
type RecvConfig struct {
	Initial int // kept posted once a QP uses the queue; doubled when it runs low
	PerQP   int // kept posted for each QP, if that is more
	Max     int // buffers at most, posted or held by somebody
}

// recvPool is a shared receive queue and its buffers.
//
// A buffer is vacant (no chunk), idle (has a chunk, may be posted), posted, or out (completed and
// referenced by somebody). The pool keeps target buffers posted: it replaces those that are out
// by idle ones, then by fresh chunks, up to Max.
type recvPool struct {
	dev  *Device
	srq  verbs.SRQ
	size int    // bytes of a buffer
	bit  uint64 // in the work request IDs of this pool
	cfg  RecvConfig
	used int          // completions of the batch so far; the poller's
	live atomic.Int32 // buffers with a chunk; advice

	bufs []*RecvBuf // by index, made on first use; entries are written under mu before they are posted

	mu     sync.Mutex
	idle   []*RecvBuf // last in, first out: its memory is warm
	vacant []*RecvBuf
	made   int  // bufs[:made] exist
	posted int  // given to the SRQ, not completed
	target int  // how many should be
	closed bool // device gone: buffers go to the slab

	// The poster: one at a time, whoever finds one at work leaves a note. No lock is held across
	// the provider.
	posting bool      // guarded by mu
	again   bool      // guarded by mu
	quiet   sync.Cond // on mu: posting ended
	batch   [recvBatch]*RecvBuf
	wrs     [recvBatch]verbs.RecvWR
	sgs     [recvBatch]verbs.SGE
}

// recvBatch is how many buffers are posted at a time. Posting costs a lock and some 10 ns per buffer;
// a batch of 16 large ones is a megabyte.
const recvBatch = 16

// smallBit marks the work request IDs of the queue of small buffers. The rest is the index of the buffer.
const smallBit = 1 << 32

func newRecvPool(d *Device, size int, bit uint64, cfg RecvConfig) (*recvPool, error) {
	p := &recvPool{dev: d, size: size, bit: bit, cfg: cfg}
	srq, err := d.pd.CreateSRQ(verbs.SRQConfig{MaxWR: cfg.Max, MaxSGE: 1})
	if err != nil {
		return nil, fmt.Errorf("shared receive queue of %d x %d bytes: %w", cfg.Max, size, err)
	}
	p.srq = srq
	p.quiet.L = &p.mu
	p.bufs = make([]*RecvBuf, cfg.Max)
	return p, nil
}

// completed takes note that the request with the given ID was used, and returns its buffer with
// one reference, the caller's. nil for an ID that was never posted, which is a provider's bug.
func (p *recvPool) completed(id uint64) *RecvBuf {
	id &^= p.bit
	if id >= uint64(len(p.bufs)) || p.bufs[id] == nil {
		return nil
	}
	b := p.bufs[id]
	b.refs.Store(1)
	p.used++
	return b
}

// settle ends a batch: it accounts the completions and posts replacements. The poller's.
func (p *recvPool) settle() {
	if p.used == 0 {
		return
	}
	p.mu.Lock()
	p.posted -= p.used
	p.used = 0
	p.refillLocked()
}

// refill posts what is missing.
func (p *recvPool) refill() {
	p.mu.Lock()
	if p.posted >= p.target {
		p.mu.Unlock()
		return
	}
	p.refillLocked()
}

// want makes sure that at least n buffers are kept posted, within the bound.
func (p *recvPool) want(n int) {
	p.mu.Lock()
	if n = min(n, p.cfg.Max); n <= p.target {
		p.mu.Unlock()
		return
	}
	p.target = n
	p.refillLocked()
	p.arm()
}

// putBack takes a buffer nobody references any more.
func (p *recvPool) putBack(b *RecvBuf) {
	p.mu.Lock()
	if b.chunk == nil {
		p.mu.Unlock() // close found it between the last reference and here
		return
	}
	if p.closed || p.posted+len(p.idle) >= p.target+2*recvBatch {
		chunk := p.vacateLocked(b)
		p.mu.Unlock()
		chunk.Put()
		return
	}
	p.idle = append(p.idle, b)
	// The handler refills at the end of its batch. Anybody else does when the queue has run low,
	// and otherwise leaves the buffer until there is a batch of them.
	if missing := p.target - p.posted; missing >= 2*recvBatch || p.posted < p.target/2 {
		p.refillLocked()
		return
	}
	p.mu.Unlock()
}

// vacateLocked takes b's chunk from it.
func (p *recvPool) vacateLocked(b *RecvBuf) *slab.Chunk {
	chunk := b.chunk
	p.dev.reg.recvMem.Sub(int64(p.size))
	b.chunk, b.mem = nil, nil
	p.vacant = append(p.vacant, b)
	p.live.Dec()
	return chunk
}

// refillLocked posts buffers until target are. It is called with mu held and returns with it released.
func (p *recvPool) refillLocked() {
	if p.posting {
		p.again = true
		p.mu.Unlock()
		return
	}
	p.posting = true
	for {
		p.again = false
		n := min(p.target-p.posted, recvBatch)
		if p.closed {
			n = 0
		}
		k := 0
		for k < n {
			b := p.takeLocked()
			if b == nil {
				break
			}
			p.batch[k] = b
			k++
		}
		if k == 0 {
			break
		}
		p.posted += k
		p.mu.Unlock()
		done := p.post(k)
		p.mu.Lock()
		if done < k {
			p.posted -= k - done
			p.idle = append(p.idle, p.batch[done:k]...)
			break
		}
		if k < recvBatch && !p.again {
			break
		}
	}
	p.posting = false
	p.quiet.Signal()
	p.mu.Unlock()
}

// takeLocked finds a buffer with a chunk, nil when a bound or the slab is exhausted.
func (p *recvPool) takeLocked() *RecvBuf {
	if n := len(p.idle); n > 0 {
		b := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return b
	}
	var b *RecvBuf
	if n := len(p.vacant); n > 0 {
		b = p.vacant[n-1]
		p.vacant = p.vacant[:n-1]
	} else if p.made < len(p.bufs) {
		b = &RecvBuf{pool: p, idx: uint32(p.made)}
		p.bufs[p.made] = b
		p.made++
	} else {
		return nil
	}
	r := p.dev.reg
	var chunk *slab.Chunk
	err := slab.ErrNoMemory
	if r.recvMem.Add(int64(p.size)) <= r.cfg.RecvMemory || int(p.live.Load()) < p.cfg.Initial {
		chunk, err = r.cfg.Slab.Alloc(p.size)
	}
	if err != nil {
		r.recvMem.Sub(int64(p.size))
		p.vacant = append(p.vacant, b)
		p.dev.stats.recvNoMemory.Inc()
		return nil
	}
	b.chunk, b.mem = chunk, chunk.Bytes()[:p.size:p.size]
	p.live.Inc()
	return b
}

// post posts batch[:k] and returns how many the queue took. The poster's.
func (p *recvPool) post(k int) int {
	for i, b := range p.batch[:k] {
		sge, err := p.dev.SGE(b.chunk, 0, p.size)
		if err != nil {
			k = i
			break
		}
		p.sgs[i] = sge
		p.wrs[i] = verbs.RecvWR{ID: p.bit | uint64(b.idx), SGs: p.sgs[i : i+1 : i+1]}
	}
	n, err := p.srq.PostRecv(p.wrs[:k])
	if err != nil {
		p.dev.stats.recvPostErrors.Inc()
	}
	return n
}

// grow answers the limit event: the queue ran low, so it was too short.
func (p *recvPool) grow() {
	p.mu.Lock()
	p.target = min(2*p.target, p.cfg.Max)
	p.refillLocked()
	p.arm()
}

// arm asks for the limit event at a quarter of the target.
func (p *recvPool) arm() {
	p.mu.Lock()
	limit := p.target / 4
	if p.target == p.cfg.Max {
		limit = 0
	}
	p.mu.Unlock()
	_ = p.srq.Arm(limit)
}

// close destroys the queue and gives all buffers that nobody holds to the slab; the others follow
// when they are put. The QPs are gone.
func (p *recvPool) close() error {
	p.mu.Lock()
	p.closed = true
	for p.posting {
		p.quiet.Wait()
	}
	p.mu.Unlock()
	if err := p.srq.Close(); err != nil {
		return err
	}
	// What was posted vanished without completions: whatever has a chunk and no reference is free.
	p.mu.Lock()
	var chunks []*slab.Chunk
	p.idle = nil
	for _, b := range p.bufs[:p.made] {
		if b.chunk != nil && b.refs.Load() == 0 {
			chunks = append(chunks, p.vacateLocked(b))
		}
	}
	p.posted = 0
	p.mu.Unlock()
	for _, c := range chunks {
		c.Put()
	}
	return nil
}

// RecvStats describes a shared receive queue.
type RecvStats struct {
	BufBytes int `json:"buf_bytes"` // of one buffer
	Posted   int `json:"posted"`
	Target   int `json:"target"` // how many the queue keeps posted
	Idle     int `json:"idle"`   // with memory, not posted
	Live     int `json:"live"`   // with memory: posted, idle, or held by somebody
	Max      int `json:"max"`
}

func (p *recvPool) snapshot() RecvStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return RecvStats{BufBytes: p.size, Posted: p.posted, Target: p.target, Idle: len(p.idle), Live: int(p.live.Load()), Max: p.cfg.Max}
}
