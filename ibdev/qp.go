package ibdev

import (
	"errors"
	"fmt"

	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// QPHandler is what a QP's completions are brought to. SendWC, RecvWC and BatchEnd run in completion
// handlers and may not wait; those of the send side never run concurrently with each other, nor do those of
// the receive side, but the two sides may.
type QPHandler interface {
	// SendWC is a completion of the send queue.
	SendWC(wc *verbs.WC)
	// RecvWC is a receive completion. b has one reference, which is the handler's to put.
	RecvWC(wc *verbs.WC, b *RecvBuf)
	// BatchEnd follows the last completion of one side in a batch.
	BatchEnd(recv bool)
	// QPEvent is an asynchronous event of the QP, its CQ or its device: EventQPLastWQEReached says that the QP
	// is in ERR (a peer's DREQ does that). It runs on a goroutine of the provider.
	QPEvent(t verbs.EventType)
}

// RecvKind names a shared receive queue.
type RecvKind uint8

// Shared receive queues.
const (
	Large RecvKind = iota // buffers of LargeRecv bytes: for peers that are of ours, or may be
	Small                 // buffers of SmallRecv bytes: for kernels
)

// Bytes is the largest SEND a queue of this kind takes, as we announce it.
func (k RecvKind) Bytes() int {
	if k == Small {
		return SmallRecv
	}
	return MaxSend
}

// QPConfig are the parameters of a QP.
type QPConfig struct {
	MaxSendWR  int // of the owner
	PoolWR     int // beside those, of the device's pools (QP.Pool); 0: none
	MaxSendSGE int
	Recv       RecvKind
}

func (c *QPConfig) sendWRs() int { return c.MaxSendWR + c.PoolWR }

// QP is a queue pair of a Device, an RC QP on one of its shared receive queues. It holds a reference
// to the device and room for the completions of all its requests.
type QP struct {
	verbs.QP
	pool    *mrpool.QP // nil without PoolWR
	dev     *Device
	num     verbs.QPN
	handler QPHandler
	sendCQ  *cq
	cfg     QPConfig
	touched [2]bool // has completions in the batch of the send, receive poller; theirs
}

// CreateQP makes a QP whose completions go to h. The caller holds a reference to d. May wait.
func (d *Device) CreateQP(cfg QPConfig, h QPHandler) (_ *QP, err error) {
	q, err := d.reserve(cfg.sendWRs())
	if err != nil {
		return nil, err
	}
	pool := d.large
	if cfg.Recv == Small {
		pool = d.small
	}
	qp := &QP{dev: d, handler: h, sendCQ: q, cfg: cfg}
	qp.QP, err = d.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: q.vcq, RecvCQ: d.recvCQ.vcq, SRQ: pool.srq,
		MaxSendWR: cfg.sendWRs(), MaxSendSGE: cfg.MaxSendSGE, Context: qp})
	if err != nil {
		d.unreserve(q, cfg.sendWRs())
		return nil, err
	}
	if cfg.PoolWR > 0 {
		qp.pool = d.pools.NewQP(qp.QP, cfg.PoolWR)
	}
	qp.num = qp.Num()
	d.GetNamed(holderQP)
	d.mu.Lock()
	d.nKind[cfg.Recv]++
	n := d.nKind[cfg.Recv]
	d.mu.Unlock()
	pool.want(max(pool.cfg.Initial, n*pool.cfg.PerQP))
	// A completion of an earlier QP of this number may still lie in a queue: it is dispatched before the
	// number means this one. A new QP has no completions before it is connected.
	q.barrier()
	d.recvCQ.barrier()
	d.qpsMu.Lock()
	d.qps[qp.num] = qp
	d.qpsMu.Unlock()
	if d.Gone() {
		// The removal may have looked at the QPs before this one was among them.
		return nil, errors.Join(fmt.Errorf("create QP: %w", ErrDeviceGone), qp.Close())
	}
	return qp, nil
}

// Limits are the sizes of the send queue and of its gather lists, and how many receives the shared queue keeps posted.
func (qp *QP) Limits() (sendWR, sendSGE, recvWR int) {
	pool := qp.dev.large
	if qp.cfg.Recv == Small {
		pool = qp.dev.small
	}
	return qp.cfg.MaxSendWR, qp.cfg.MaxSendSGE, pool.snapshot().Target
}

// Device is the QP's device.
func (qp *QP) Device() *Device { return qp.dev }

// Pool maps memory on the QP; nil if QPConfig.PoolWR was 0. Its completions are given to it, and are not the handler's.
func (qp *QP) Pool() *mrpool.QP { return qp.pool }

// InRecv runs fn as the receive handler: not concurrently with it, and with what it leaves to be polled
// polled afterwards. fn may not wait. Not in a handler.
func (qp *QP) InRecv(fn func()) { qp.dev.recvCQ.as(fn) }

// Close destroys the QP and dispatches what is left of its completions: once it has returned, the
// handler is not called any more, and no memory of the QP's is touched. Not in a handler.
func (qp *QP) Close() error {
	if err := qp.QP.Close(); err != nil {
		return err
	}
	d := qp.dev
	qp.sendCQ.barrier()
	d.recvCQ.barrier()
	d.qpsMu.Lock()
	known := d.qps[qp.num] == qp
	if known {
		delete(d.qps, qp.num)
	}
	d.qpsMu.Unlock()
	if !known {
		return nil // closed before
	}
	if qp.pool != nil {
		qp.pool.Close() // what it had outstanding and no completion has told of
	}
	d.unreserve(qp.sendCQ, qp.cfg.sendWRs())
	d.mu.Lock()
	d.nKind[qp.cfg.Recv]--
	d.mu.Unlock()
	d.PutNamed(holderQP)
	return nil
}

// minCQDepth and maxCQDepth bound the size of a send CQ. Each further one is twice as large: one
// of 4096 entries is 58 connections between ours.
const (
	minCQDepth = 4096
	maxCQDepth = 65536
)

// reserve finds a send CQ with room for n completions. No queue is ever overcommitted: a QP in ERR
// completes everything it was given, all QPs at once.
func (d *Device) reserve(n int) (*cq, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	depth := minCQDepth
	for _, q := range d.sendCQs {
		if q.depth-q.reserved >= n {
			q.reserved += n
			return q, nil
		}
		depth = 2 * q.depth
	}
	depth = min(depth, maxCQDepth, d.attr.MaxCQE)
	if n > depth {
		return nil, fmt.Errorf("%d send requests, completion queue of %d: %w", n, depth, verbs.ErrNoMemory)
	}
	q, err := d.newCQ(false, depth)
	if err != nil {
		return nil, err
	}
	q.reserved = n
	d.sendCQs = append(d.sendCQs, q)
	return q, nil
}

func (d *Device) unreserve(q *cq, n int) {
	d.mu.Lock()
	q.reserved -= n
	d.mu.Unlock()
}
