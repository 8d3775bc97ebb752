package ib

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Upper is what a Link reports to. RecvSend and the two kinds of BatchEnd run in completion handlers: the receive
// side's never concurrently, the send side's never concurrently, the two sides possibly. None may wait.
type Upper interface {
	// RecvSend is a received SEND: the first n bytes of b. b has one reference, which passes to the callee.
	RecvSend(l *Link, b *ibdev.RecvBuf, n int)
	// BatchEnd follows the last completion of one side in a batch. On the send side slots may have become free
	// (Link.Free) and SENDs acknowledged (Link.Outstanding).
	BatchEnd(l *Link, recv bool)
	// LinkBroken says once that the link is of no use any more: a completion in error, the peer's DREQ, the
	// device gone. The QP is on its way to ERR. It may run anywhere, handlers included.
	LinkBroken(l *Link, err error)
}

// Errors of a link.
var (
	ErrPeerClosed = errors.New("connection closed by the peer")
	ErrDeviceGone = verbs.ErrDeviceGone
)

// Config are the parameters of a Link.
type Config struct {
	Ring  int            // SENDs in flight at most, data, acknowledgements and maps together; a power of two
	Recv  ibdev.RecvKind // the shared receive queue to join
	TOS   uint8
	Stats *Stats
}

// Stats are counters of all links of a Manager.
type Stats struct {
	Stale         atomic.Uint64 // completions of an old incarnation
	DrainTimeouts atomic.Uint64 // QPs destroyed without having seen their marker
	Posted        atomic.Uint64 // SENDs
}

// Parameters of connection establishment (rds-protocol spec 3.5; rocev2 spec 3.8).
const (
	ackTimeout     = verbs.DefaultAckTimeout
	retryCount     = 6  // 7 means "for ever" to rxe
	rnrRetry       = 7  // for ever: RDS has no other back-pressure
	minRNRTimer    = 10 // the code of 0.32 ms
	maxRDResources = 16
)

const (
	slotBytes = rdshdr.HeaderLen
	// signalEvery bounds how many SENDs of a batch go unsignalled. The last one of a batch is always signalled:
	// nothing else would tell that the link has become idle.
	signalEvery = 16
	// BatchMax is how many SENDs one Post takes.
	BatchMax = 16
	maxSGE   = 3 // of a SEND
	// poolWRs are the requests that map memory which may be outstanding. With a ring of 64 and the marker they fill a
	// power of two.
	poolWRs = 63
)

// Work request IDs: the link's number in the upper half, of 31 bits, since bit 63 is the pools' (package mrpool); below it the
// count of the request, or the marker.
const (
	idMarker = 1 << 31
	idCount  = idMarker - 1
)

// Link is one QP and its connection. See the package comment. Post, Header and the methods marked so
// belong to the transmitter, one goroutine at a time; SendWC, RecvWC, BatchEnd are the handlers'.
type Link struct {
	up      Upper
	qp      *ibdev.QP
	cfg     Config
	num     uint64         // incarnation, in the upper half of work request IDs
	ep      verbs.Endpoint // nil until established; control side
	hdrs    *slab.Chunk    // a header for each slot of the ring
	hmem    []byte
	closed  atomic.Bool // drained or being drained: nothing goes up any more
	broken  atomic.Bool
	why     atomic.Pointer[error] // it failed, and nobody has been told
	made    atomic.Bool           // qp is set
	flushed atomic.Bool           // the QP is in ERR, and what is posted goes nowhere; why, is still to come
	drained chan struct{}         // closed when the marker was polled
	quiet   bool                  // Close does not tell the peer

	// The ring: request number i, a SEND or a part of an Op, is in slot i mod Ring. The transmitter moves head, the send
	// handler tail. The slots between belong to the QP.
	slots    []slot
	head     atomic.Uint32 // next to post
	tail     atomic.Uint32 // oldest not completed
	dataHead atomic.Uint32 // SENDs of kind Data posted
	dataTail atomic.Uint32 // completed
	acks     atomic.Int32  // acknowledgement frames in flight

	opSGE int // SGEs of an Op's requests

	lastMark uint32 // the pool's requests before the marker

	poolMu     sync.Mutex
	poolClosed bool                      // guarded by poolMu
	pool       atomic.Pointer[mrpool.QP] // made when memory is first mapped here, closed with the link; written under poolMu

	// The transmitter's.
	wrs  [BatchMax]verbs.SendWR
	sges [BatchMax * maxSGE]verbs.SGE
}

// slot is what a request in flight holds.
type slot struct {
	kind   Kind
	mark   uint32         // the pool's requests before it
	chunks [2]*slab.Chunk // referenced until the completion
	op     *Op            // of a oneSided one
}

func (l *Link) slot(i uint32) *slot { return &l.slots[int(i)&(l.cfg.Ring-1)] }

// Kind is what a SEND is for.
type Kind uint8

// Kinds of SENDs.
const (
	Data Kind = iota
	Ack
	Control  // congestion map, mark
	oneSided // no SEND: a part of an Op
)

// Piece is a part of a SEND: n bytes of a chunk.
type Piece struct {
	Chunk *slab.Chunk
	Off   int
	Len   int
}

// Send is a SEND to post.
type Send struct {
	Kind      Kind
	Solicited bool
	Fence     bool // executes after all READs and atomics before it
	// Header says that the SEND begins with HeaderLen bytes from the header slot (Link.Header) of its place in
	// the ring.
	HeaderLen int
	N         int // pieces
	Pieces    [2]Piece
}

// NewLink creates the QP of a new incarnation. num tells it from every other link of the Manager.
// The caller holds a reference to dev for the call. May wait.
func NewLink(dev *ibdev.Device, mem *slab.Slab, cfg Config, num uint32, up Upper) (*Link, error) {
	l := &Link{up: up, cfg: cfg, num: uint64(num) << 33 >> 1, slots: make([]slot, cfg.Ring), drained: make(chan struct{})}
	l.opSGE = max(1, min(MaxOpSGE, dev.Attr().MaxSGE))
	hdrs, err := mem.Alloc(cfg.Ring * slotBytes)
	if err != nil {
		return nil, fmt.Errorf("header slots: %w", err)
	}
	l.hdrs, l.hmem = hdrs, hdrs.Bytes()
	// One more than the ring: the marker. And what maps memory.
	qp, err := dev.CreateQP(ibdev.QPConfig{MaxSendWR: cfg.Ring + 1 + poolWRs, MaxSendSGE: max(maxSGE, l.opSGE), Recv: cfg.Recv}, l)
	if err != nil {
		hdrs.Put()
		return nil, err
	}
	l.has(qp)
	return l, nil
}

// has gives the link its QP, whose events may have come before it.
func (l *Link) has(qp *ibdev.QP) {
	l.qp = qp
	l.made.Store(true)
	l.tellBroken()
}

func (l *Link) param(priv []byte) verbs.ConnParam {
	rd := uint8(min(maxRDResources, l.qp.Device().Attr().MaxRDAtomic))
	return verbs.ConnParam{PrivateData: priv, ResponderResources: rd, InitiatorDepth: rd, RetryCount: retryCount, RNRRetryCount: rnrRetry,
		AckTimeout: ackTimeout, MinRNRTimer: minRNRTimer, TrafficClass: l.cfg.TOS, SRQ: true}
}

// Connect asks remote for a connection. Receive buffers are posted already: they are the shared
// queue's. May wait.
func (l *Link) Connect(ctx context.Context, remote netip.AddrPort, priv []byte) (verbs.Connected, error) {
	ep, info, err := l.qp.Device().Verbs().Connect(ctx, remote, l.qp.QP, l.param(priv), nil)
	if err != nil {
		return info, err
	}
	l.ep = ep
	return info, nil
}

// Accept answers req. What the peer sends may come up before it returns. May wait.
func (l *Link) Accept(ctx context.Context, req verbs.ConnRequest, priv []byte) error {
	p := l.param(priv)
	offered := req.Info()
	p.ResponderResources = min(p.ResponderResources, offered.InitiatorDepth)
	p.InitiatorDepth = min(p.InitiatorDepth, offered.ResponderResources)
	ep, err := req.Accept(ctx, l.qp.QP, p, nil)
	if err != nil {
		return err
	}
	l.ep = ep
	return nil
}

// SetWindow tells the provider how many bytes the peer lets us have in flight. Established links only. May wait.
func (l *Link) SetWindow(bytes int) error {
	return l.qp.Modify(verbs.QPAttr{SendWindow: bytes}, verbs.QPSendWindowBit)
}

// Done is closed when CM has ended the connection. nil before it is established.
func (l *Link) Done() <-chan struct{} {
	if l.ep == nil {
		return nil
	}
	return l.ep.Done()
}

// QPN is the number of the local QP.
func (l *Link) QPN() verbs.QPN { return l.qp.Num() }

// Limits are the sizes of the QP's send queue and gather lists, and how many receives its shared queue keeps posted.
func (l *Link) Limits() (sendWR, sendSGE, recvWR int) { return l.qp.Limits() }

// Device is the device the link is on.
func (l *Link) Device() *ibdev.Device { return l.qp.Device() }

// Recv is the kind of receive queue the link is on.
func (l *Link) Recv() ibdev.RecvKind { return l.cfg.Recv }

// Ring is the number of requests in flight at most.
func (l *Link) Ring() int { return l.cfg.Ring }

// Free is the number of SENDs that may be posted now: none when earlier ones have been flushed. Transmitter.
func (l *Link) Free() int {
	free := l.cfg.Ring - int(l.head.Load()-l.tail.Load())
	if l.flushed.Load() {
		return 0
	}
	return free
}

// Outstanding is the number of data SENDs posted and not known to be complete.
func (l *Link) Outstanding() int { return int(l.dataHead.Load() - l.dataTail.Load()) }

// InFlight is the number of SENDs of all kinds posted and not known to be complete.
func (l *Link) InFlight() int { return int(l.head.Load() - l.tail.Load()) }

// AcksInFlight is the number of acknowledgement frames posted and not known to be complete.
func (l *Link) AcksInFlight() int { return int(l.acks.Load()) }

// Header is the header slot of the i-th SEND of the next Post. Transmitter.
func (l *Link) Header(i int) []byte {
	s := int(l.head.Load()+uint32(i)) & (l.cfg.Ring - 1)
	return l.hmem[s*slotBytes : (s+1)*slotBytes : (s+1)*slotBytes]
}

// Post posts sends in order; there are at most BatchMax, and Free slots for them. The caller's reference to the chunk of each
// piece is the link's from here on, which puts it when the SEND has completed, or at once if it could not be posted. It returns how
// many the QP took; an error means that the link is broken and says why. Transmitter, with no lock held.
func (l *Link) Post(sends []Send) (int, error) {
	h := l.head.Load()
	fail := func(err error) (int, error) {
		for i := range sends {
			for _, p := range sends[i].Pieces[:sends[i].N] {
				p.Chunk.Put()
			}
		}
		l.fail(err)
		return 0, err
	}
	for i := range sends {
		s := &sends[i]
		sl := int(h+uint32(i)) & (l.cfg.Ring - 1)
		sg := l.sges[i*maxSGE : i*maxSGE : (i+1)*maxSGE]
		if s.HeaderLen > 0 {
			e, err := l.qp.Device().SGE(l.hdrs, sl*slotBytes, s.HeaderLen)
			if err != nil {
				return fail(err)
			}
			sg = append(sg, e)
		}
		for k := range s.Pieces[:s.N] {
			p := &s.Pieces[k]
			e, err := l.qp.Device().SGE(p.Chunk, p.Off, p.Len)
			if err != nil {
				return fail(err)
			}
			sg = append(sg, e)
		}
		wr := &l.wrs[i]
		wr.ID = l.num | uint64(h+uint32(i))&idCount
		wr.Opcode = verbs.OpSend
		wr.SGs = sg
		wr.Flags = 0
		if i == len(sends)-1 || i%signalEvery == signalEvery-1 {
			wr.Flags = verbs.SendSignaled
		}
		if s.Solicited {
			wr.Flags |= verbs.SendSolicited
		}
		if s.Fence {
			wr.Flags |= verbs.SendFence
		}
	}
	// The slots are filled before the QP may complete them.
	data := uint32(0)
	for i := range sends {
		s := &sends[i]
		sl := l.slot(h + uint32(i))
		sl.kind = s.Kind
		for k := range s.Pieces[:s.N] {
			sl.chunks[k] = s.Pieces[k].Chunk
		}
		switch s.Kind {
		case Data:
			data++
		case Ack:
			l.acks.Inc()
		}
	}
	if p := l.pool.Load(); p != nil {
		mark := p.Mark()
		for i := range sends {
			l.slot(h + uint32(i)).mark = mark
		}
	}
	l.dataHead.Add(data)
	l.head.Store(h + uint32(len(sends)))
	n, err := l.qp.PostSend(l.wrs[:len(sends)])
	l.cfg.Stats.Posted.Add(uint64(n))
	if err != nil {
		// What was not taken never completes: close finds it in the ring.
		l.fail(fmt.Errorf("post: %w", err))
	}
	return n, err
}

// SendWC implements ibdev.QPHandler.
func (l *Link) SendWC(wc *verbs.WC) {
	if wc.ID&mrpool.WRBit != 0 {
		l.poolWC(wc)
		return
	}
	if wc.ID>>32<<32 != l.num {
		l.cfg.Stats.Stale.Inc()
		return
	}
	if wc.ID&idMarker != 0 {
		l.passed(l.lastMark)
		close(l.drained)
		return
	}
	// An RC send queue completes in order: this one and all before it.
	t := l.tail.Load()
	n := (uint32(wc.ID)-t)&idCount + 1
	if n > l.head.Load()-t {
		l.fail(fmt.Errorf("completion of send %d, which is not in flight", uint32(wc.ID)))
		return
	}
	l.passed(l.slot(t + n - 1).mark)
	if wc.Status == verbs.WCFlushErr {
		l.flushed.Store(true) // before the slots are seen to be free
	}
	l.reclaim(t, n, wc.Status, false)
	if wc.Status != verbs.WCSuccess {
		l.failWC(wc)
	}
}

// reclaim empties n slots from t on. status is the last one's, those before it have succeeded; or it is that of all.
func (l *Link) reclaim(t, n uint32, status verbs.WCStatus, all bool) {
	data := uint32(0)
	for i := range n {
		sl := l.slot(t + i)
		for k, c := range sl.chunks {
			if c != nil {
				c.Put()
				sl.chunks[k] = nil
			}
		}
		switch sl.kind {
		case Data:
			data++
		case Ack:
			l.acks.Dec()
		case oneSided:
			o := sl.op
			sl.op = nil
			if i == n-1 || all {
				o.completed(status)
			} else {
				o.completed(verbs.WCSuccess)
			}
		}
	}
	l.dataTail.Add(data)
	l.tail.Store(t + n)
}

// RecvWC implements ibdev.QPHandler.
func (l *Link) RecvWC(wc *verbs.WC, b *ibdev.RecvBuf) {
	if l.closed.Load() {
		l.cfg.Stats.Stale.Inc()
		b.Put()
		return
	}
	if wc.Status != verbs.WCSuccess {
		b.Put()
		l.failWC(wc)
		return
	}
	l.up.RecvSend(l, b, int(wc.ByteLen))
}

// BatchEnd implements ibdev.QPHandler. A link that was closed in the middle of a batch still ends it.
func (l *Link) BatchEnd(recv bool) { l.up.BatchEnd(l, recv) }

// InRecv runs fn as the receive handler does: not concurrently with it. Not in a handler.
func (l *Link) InRecv(fn func()) { l.qp.InRecv(fn) }

// QPEvent implements ibdev.QPHandler.
func (l *Link) QPEvent(t verbs.EventType) {
	switch t {
	case verbs.EventCommEst, verbs.EventSQDrained:
	case verbs.EventQPLastWQEReached:
		l.fail(ErrPeerClosed)
	case verbs.EventDeviceFatal, verbs.EventDeviceRemoved:
		l.fail(ErrDeviceGone)
	default:
		l.fail(fmt.Errorf("QP event %v", t))
	}
}

// Fail declares the link broken: a protocol error of the peer. It may be called from anywhere.
func (l *Link) Fail(err error) { l.fail(err) }

// failWC is fail for a completion that is none of success. One that was flushed says that the QP is in ERR and not why, and would
// hide the reason if it came first: there is a completion before it that says so, or an event of the QP, which has a shared receive
// queue and therefore always gives one (EventQPLastWQEReached).
func (l *Link) failWC(wc *verbs.WC) {
	if wc.Status != verbs.WCFlushErr {
		l.fail(wc.Err())
	}
}

func (l *Link) fail(err error) {
	if l.broken.Swap(true) {
		return
	}
	l.why.Store(&err)
	if l.made.Load() { // else NewLink does it
		l.tellBroken()
	}
}

// tellBroken does what is to be done once when the link has failed. There is a QP.
func (l *Link) tellBroken() {
	err := l.why.Swap(nil)
	if err == nil {
		return
	}
	l.qp.SetError()
	if !l.closed.Load() {
		l.up.LinkBroken(l, *err)
	}
}

// Broken reports whether the link has failed or was closed.
func (l *Link) Broken() bool { return l.broken.Load() }

// CloseQuietly has Close not tell the peer, if the provider can do that. A kernel that is told connects again at once;
// if nobody answers it, it is deaf to its peer's next process for 6 s (docs/compatibility.md). One that is not told
// takes that process's REQ for what it is. Before Close, by who calls it.
func (l *Link) CloseQuietly() { l.quiet = true }

// Close drains the link and destroys its QP. Once it has returned, nothing of it comes up, no memory
// it was given is touched, and every chunk has been put. The transmitter has left and does not come back. It waits for
// completions, at most timeout: a provider flushes a QP in ERR at once. Not in a handler; once.
func (l *Link) Close(timeout time.Duration) error {
	// 1. Nothing goes up any more. What the handlers are in the middle of ends at the barrier of step 5.
	l.closed.Store(true)
	l.broken.Store(true)
	// 2. QP to ERR, and tell the peer. A QP that never left RESET stays there: it was never given anything.
	var errs []error
	if l.ep != nil {
		end := l.ep.Disconnect
		if a, ok := l.ep.(verbs.Abandoner); ok && l.quiet {
			end = a.Abandon
		}
		errs = append(errs, end())
	}
	var state *verbs.StateError
	err := l.qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit)
	inERR := err == nil
	if err != nil && !errors.As(err, &state) {
		errs = append(errs, err)
	}
	// 3. The marker behind the last send.
	if inERR {
		if p := l.pool.Load(); p != nil {
			l.lastMark = p.Mark()
		}
		wr := []verbs.SendWR{{ID: l.num | idMarker, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}}
		if _, err := l.qp.PostSend(wr); err != nil {
			errs = append(errs, fmt.Errorf("marker: %w", err))
			inERR = false
		}
	}
	// 4. Poll to it: the handler does, and closes drained. Buffers come home here.
	if inERR {
		t := time.NewTimer(timeout)
		select {
		case <-l.drained:
			t.Stop()
		case <-t.C:
			l.cfg.Stats.DrainTimeouts.Inc()
			errs = append(errs, fmt.Errorf("no marker within %v: %w", timeout, verbs.ErrTimeout))
		}
	}
	// 5. Destroy the QP, and poll once more: no handler is in the middle of anything of ours after that. Memory that was mapped
	// here goes to others, or stays mapped where the device lets it.
	dev := l.qp.Device()
	dev.Get()
	defer dev.Put()
	errs = append(errs, l.qp.Close())
	l.poolMu.Lock()
	l.poolClosed = true
	p := l.pool.Load()
	l.poolMu.Unlock()
	if p != nil {
		p.Close()
	}
	// 6. What never completed: sends the QP did not take, and everything if the marker did not come.
	t := l.tail.Load()
	l.reclaim(t, l.head.Load()-t, verbs.WCFlushErr, true)
	l.hdrs.Put()
	return errors.Join(errs...)
}
