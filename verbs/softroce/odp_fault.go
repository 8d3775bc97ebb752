package softroce

import (
	"slices"
	"sync"
	"time"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// Page faults. The engine, which may not wait, meets an absent page, raises a fault for the QP, and goes on with
// other QPs. A worker, which may wait, brings in the page and the rest of the message, and wakes the QP.
//
//	requester   the send request pauses, the responses to a READ that cannot be placed are dropped and asked for
//	            again
//	responder   answers RNR NAK, as often as the peer bears it, and then holds its peace until the page is there and it
//	            can ask for the packet; the answer to a READ that has begun pauses
//
// A QP has at most one fault on its way for each half. Faults belong to an incarnation of the QP: they are enabled on the
// way from RESET to INIT, disabled and flushed on the way to RESET and ERR and by Close, and enabled again if that move was refused. A
// QP that goes to ERR where nobody may wait (SetError, an error of its own) only marks its incarnation: what
// its faults bring in is kept, the QP does not hear of it.

const (
	// maxFaultTries is how often one packet may find its page absent before its message fails: what came in was
	// taken away each time.
	maxFaultTries = 64
	// maxFaultWorkers bounds the goroutines of a device that wait for pages: one slow disk does not hold up all.
	maxFaultWorkers = 4
)

// fault is a page-fault event.
type fault struct {
	q     *qp
	inc   uint64 // of q
	tx    bool   // of the requester
	write bool
	spans []faultSpan
}

// faultSpan is n bytes at off of an on-demand region, referenced.
type faultSpan struct {
	m      *mr
	off, n uint64
}

func (f *fault) release() {
	for _, s := range f.spans {
		s.m.refs.Put()
	}
}

// qpFaults is what a QP knows of its faults.
type qpFaults struct {
	mu      sync.Mutex
	enabled bool
	inc     uint64        // incarnation; changes when faults are disabled
	out     int           // raised and not over
	idle    chan struct{} // closed when out is 0, if somebody waits
}

func (f *qpFaults) enable() {
	f.mu.Lock()
	f.enabled = true
	f.mu.Unlock()
}

// disable ends the incarnation; what is out finishes without the QP hearing of it.
func (f *qpFaults) disable() {
	f.mu.Lock()
	if f.enabled {
		f.enabled = false
		f.inc++
	}
	f.mu.Unlock()
}

// start counts one more fault of the incarnation inc; false: they are disabled.
func (f *qpFaults) start() (inc uint64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.enabled {
		f.out++
	}
	return f.inc, f.enabled
}

func (f *qpFaults) current(inc uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.enabled && f.inc == inc
}

func (f *qpFaults) done() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.out--; f.out == 0 && f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
}

// flush waits until no fault is out, at most for bound, and reports whether none is.
func (f *qpFaults) flush(bound time.Duration) bool {
	f.mu.Lock()
	if f.out == 0 {
		f.mu.Unlock()
		return true
	}
	if f.idle == nil {
		f.idle = make(chan struct{})
	}
	idle := f.idle
	f.mu.Unlock()
	t := time.NewTimer(bound)
	defer t.Stop()
	select {
	case <-idle:
		return true
	case <-t.C:
		return false
	}
}

// flushFaults waits for q's faults, bounded as Deregister is. Past the bound they are inert, and what they reference
// says so.
func (q *qp) flushFaults() {
	if !q.faults.flush(q.dev.cfg.DeregisterBound) {
		q.dev.stats.add(cODPFlushTimeouts, 1)
		q.dev.cfg.Logger.Warn("page faults are still on their way", "qp", q.num, "bound", q.dev.cfg.DeregisterBound)
	}
}

// faultQueue is the work queue of page faults. Its goroutines exist only while there are any.
type faultQueue struct {
	mu      sync.Mutex
	idle    sync.Cond
	queue   []*fault
	all     map[*fault]struct{} // queued or being handled
	running int
}

// push queues f. Never waits.
func (w *faultQueue) push(d *device, f *fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = append(w.queue, f)
	if w.all == nil {
		w.all = make(map[*fault]struct{})
	}
	w.all[f] = struct{}{}
	if w.running < maxFaultWorkers {
		w.running++
		go w.work(d)
	}
}

func (w *faultQueue) work(d *device) {
	w.mu.Lock()
	for len(w.queue) > 0 {
		f := w.queue[0]
		w.queue[0] = nil
		w.queue = w.queue[1:]
		w.mu.Unlock()
		d.handleFault(f)
		w.mu.Lock()
	}
	w.queue = nil
	if w.running--; w.running == 0 && w.idle.L != nil {
		w.idle.Broadcast()
	}
	w.mu.Unlock()
}

// forget is called when f holds nothing any more.
func (w *faultQueue) forget(f *fault) {
	w.mu.Lock()
	delete(w.all, f)
	w.mu.Unlock()
}

// holds counts faults that reference m.
func (w *faultQueue) holds(m *mr) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for f := range w.all {
		if slices.ContainsFunc(f.spans, func(s faultSpan) bool { return s.m == m }) {
			n++
		}
	}
	return n
}

// wait returns when no worker is left.
func (w *faultQueue) wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idle.L = &w.mu
	for w.running > 0 {
		w.idle.Wait()
	}
}

// raise queues a fault for q on spans, which are referenced and belong to the fault from now on. While faults are disabled
// nothing is queued: whoever enables them again wakes the QP. Engine role.
func (d *device) raise(q *qp, tx, write bool, spans []faultSpan) {
	f := &fault{q: q, tx: tx, write: write, spans: spans}
	inc, ok := q.faults.start()
	if !ok {
		f.release()
		return
	}
	f.inc = inc
	d.stats.add(cODPFaults, 1)
	d.paging.faults.push(d, f)
}

// handleFault brings the pages of f in and wakes its QP.
func (d *device) handleFault(f *fault) {
	var err error
	n := 0
	for _, s := range f.spans {
		var k int
		k, err = d.bring(s.m, s.off, s.n, f.write, func() bool { return f.q.faults.current(f.inc) })
		if n += k; err != nil {
			break
		}
	}
	d.stats.add(cODPFaultPages, uint64(n))
	if err != nil {
		d.stats.add(cODPFaultErrors, 1)
	}
	d.role.Lock()
	if q := f.q; q.faults.current(f.inc) {
		// With an error no further try is of use: the message fails when it comes to that packet again.
		if f.tx {
			if err != nil {
				q.txFault.tries = maxFaultTries
			}
			d.wakeTX(q)
		} else {
			if err != nil {
				q.rxFault.tries = maxFaultTries
			}
			d.wakeRX(q)
		}
	}
	f.release()
	d.paging.faults.forget(f)
	d.unlockRole()
	f.q.faults.done()
}

// wakeFaulted wakes both halves of q, whose faults were flushed, without their pages. Engine role.
func (d *device) wakeFaulted(q *qp) {
	d.wakeTX(q)
	d.wakeRX(q)
}

// faultState is a half's part.
type faultState struct {
	waiting bool    // a fault is out
	at      psn.PSN // the packet that found its page absent last ...
	tries   int     // ... and how often
}

// again counts one more try of packet p; false: it has had enough.
func (s *faultState) again(p psn.PSN) bool {
	if s.tries == 0 || s.at != p {
		s.at, s.tries = p, 0
	}
	s.tries++
	return s.tries <= maxFaultTries
}

// enough is how many of the n bytes that packet p is about have to be there at once: all, until that has failed a
// few times, then what fits a packet. So a READ comes through memory that is being taken away all the time.
func (s *faultState) enough(p psn.PSN, n, pmtu uint32) uint32 {
	if s.tries >= 4 && s.at == p {
		return min(n, pmtu)
	}
	return n
}

// restOf lists, referenced, what the list has in on-demand regions from byte off on.
func restOf(sgs []sge, off uint32, write bool) (out []faultSpan) {
	for i := range sgs {
		s := &sgs[i]
		if off >= s.n {
			off -= s.n
			continue
		}
		if s.base == nil && s.mr.paged != nil {
			if at, ok := s.local(write); ok {
				s.mr.refs.Get() // the request's own keeps it
				out = append(out, faultSpan{s.mr, at + uint64(off), uint64(s.n - off)})
			}
		}
		off = 0
	}
	return out
}

// pauseTX makes the requester wait for the pages of w from byte off on, which packet p needs. It returns refused
// if that has been tried enough. Engine role.
func (d *device) pauseTX(q *qp, w *swqe, p psn.PSN, off uint32, write bool) verdict {
	s := &q.txFault
	if s.waiting {
		return absent
	}
	if !s.again(p) {
		return refused
	}
	s.waiting = true
	d.raise(q, true, write, restOf(w.sgs, off, write))
	return absent
}

// pauseSink is pauseTX for an answer that cannot be placed: it is dropped, and asked for again.
func (d *device) pauseSink(q *qp, w *swqe, off uint32) verdict {
	v := d.pauseTX(q, w, w.got, off, true)
	q.askAgain = q.askAgain || v == absent
	return v
}

// wakeTX lets the requester go on. Engine role, outside a step or in one.
func (d *device) wakeTX(q *qp) {
	if !q.txFault.waiting {
		return
	}
	q.txFault.waiting = false
	if !q.stallSince.IsZero() {
		q.stallSince = time.Now() // it was not the peer's fault
	}
	d.kick(q)
}

// pauseRX deals with the request packet p, at epsn, whose pages are absent: it is dropped, and the peer told as it
// can bear. spans are referenced. It returns refused if that has been tried enough. Engine role.
func (d *device) pauseRX(q *qp, p psn.PSN, write bool, spans []faultSpan) verdict {
	if v := d.waitRX(q, p, write, spans); v != absent {
		return v
	}
	d.notReady(q, p)
	return absent
}

// waitRX raises a fault of the responder unless one is out.
func (d *device) waitRX(q *qp, p psn.PSN, write bool, spans []faultSpan) verdict {
	s := &q.rxFault
	f := fault{spans: spans}
	switch {
	case s.waiting:
		f.release()
	case !s.again(p):
		f.release()
		return refused
	default:
		s.waiting = true
		q.faultWait = faultWaitBase
		for _, x := range spans {
			q.faultWait += time.Duration(x.n>>x.m.paged.table.shift+1) * faultWaitPage
		}
		q.faultWait = min(q.faultWait, faultWaitMax)
		d.raise(q, false, write, spans)
	}
	return absent
}

// wakeRX lets the responder go on. Engine role, outside a step or in one.
func (d *device) wakeRX(q *qp) {
	if !q.rxFault.waiting {
		return
	}
	q.rxFault.waiting = false
	if q.held {
		q.held = false
		q.askPSN, q.askWait = q.epsn, nakRepeat
		d.ask(q, time.Now())
	} else if q.nakSent && q.nakRNR {
		// It comes by itself, unless the RNR NAK was lost.
		q.askPSN, q.askWait = q.epsn, nakRepeat
		q.askAt = time.Now().Add(q.faultWait + nakRepeat)
		d.timers.add(q, q.askAt)
	}
	d.dueAnswer(q)
	d.kick(q)
}

// ask asks the peer for the packet at epsn, when what is due has been answered, and again later: the NAK may be lost,
// and the peer's transport timer may take seconds.
func (d *device) ask(q *qp, now time.Time) {
	q.nakSent, q.nakRNR, q.deferred = false, false, true
	d.dueAnswer(q)
	q.askAt = now.Add(q.askWait)
	q.askWait *= 2
	d.timers.add(q, q.askAt)
}

// askRepeat is called when timers are due.
func (d *device) askRepeat(q *qp) {
	switch {
	case q.askAt.IsZero():
	case q.epsn != q.askPSN || q.rxFault.waiting || q.askWait > maxRTO:
		q.askAt = time.Time{} // it has come, or waits again, or nobody is there
	case d.now.Before(q.askAt):
		d.timers.add(q, q.askAt)
	default:
		d.ask(q, d.now)
	}
}

// How long a peer is told to wait for pages: first what they take from the page cache (a fault costs 20 us, a page 1),
// then double that each time it comes and they are still not in.
const (
	faultWaitBase = 20 * time.Microsecond
	faultWaitPage = time.Microsecond
	faultWaitMax  = 160 * time.Millisecond
)

// rnrCode is the code of the shortest RNR timer of at least d (rocev2 spec 3.8).
func rnrCode(d time.Duration) uint8 {
	for c := uint8(1); c < 32; c++ {
		if roce.RNRTimer(c) >= d {
			return c
		}
	}
	return 0 // the longest
}

// notReady tells the peer that packet p, at epsn, cannot be taken yet.
//
// An RNR NAK uses up one of the retries the peer has (rnr_retry, known from the CM; 7 is without end), and their
// end is the end of the connection. So it gets as many as it has, at growing distances; then, or if nothing is known
// of it, the packet is dropped without a word, which costs the peer nothing unless its transport timer runs out, and
// asked for with a sequence NAK as soon as its page is there. RNR NAKs for want of a receive request count too.
func (d *device) notReady(q *qp, p psn.PSN) {
	if len(q.rdq) > 0 {
		q.deferred = true // no NAK before the responses that are due
		return
	}
	q.nakSent, q.nakRNR, q.nakAt = true, true, d.now
	if q.peerRNR < 7 && q.rnrTold >= int(q.peerRNR) {
		q.held = true
		d.stats.add(cODPHeld, 1)
		return
	}
	code := rnrCode(q.faultWait)
	q.faultWait = min(2*q.faultWait, faultWaitMax)
	q.rnrTold++
	d.stats.add(cRNRSent, 1)
	d.sendAck(q, roce.SynRNR|code, p)
}

// setPeerRNRRetry is told by the CM how often the peer's QP bears an RNR NAK.
func (q *qp) setPeerRNRRetry(n uint8) {
	q.dev.role.Lock()
	q.peerRNR = n
	q.dev.unlockRole()
}

// pauseRemote is pauseRX for n bytes at addr of the region that rkey opens.
func (d *device) pauseRemote(q *qp, p psn.PSN, rkey uint32, addr uint64, n uint32, need verbs.Access) verdict {
	return d.pauseRX(q, p, need != verbs.AccessRemoteRead, d.remoteSpan(q, rkey, addr, n, need))
}

// remoteSpan is that range, referenced.
func (d *device) remoteSpan(q *qp, rkey uint32, addr uint64, n uint32, need verbs.Access) []faultSpan {
	m, off := d.grant(q, rkey, addr, n, need)
	if m == nil || m.paged == nil || !m.refs.TryGet() {
		return nil
	}
	return []faultSpan{{m, off, uint64(n)}}
}
