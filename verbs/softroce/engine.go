package softroce

import (
	"container/heap"
	"runtime"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// rxBatch is how many trains one engine step takes from the socket: as many 64 KiB buffers stay warm in
// a second-level cache.
const rxBatch = 8

// pollTick is how long the engine leaves the socket to those who poll it before it looks again. If they
// go off without Park, to compute say, acknowledgements wait that long.
const pollTick = 200 * time.Microsecond

// maxRounds bounds how often one step goes round between requesters and handlers that post.
const maxRounds = 8

// run is the engine goroutine.
func (d *device) run() {
	defer close(d.stopped)
	var seen uint64 // polls at the last Sleep
	for {
		d.role.Lock()
		if d.closing {
			d.role.Unlock()
			return
		}
		busy := d.step(engineStep)
		next := d.timers.next()
		blocked := d.tx.blocked
		if blocked {
			next = time.Time{} // nothing is done, timers neither, until the socket takes something
		}
		d.waitUntil.Store(unixNano(next))
		d.role.Unlock()
		if !blocked && (busy || d.nKicks.Load() > 0) {
			continue
		}
		var err error
		if n := d.polls.Load(); n != seen && !blocked && d.sleeper != nil {
			// Somebody has polled since we were last here, and most likely goes on: packets are left to
			// him for a while, so that their arrival does not wake two.
			seen = n
			tick := time.Now().Add(pollTick)
			if !next.IsZero() && next.Before(tick) {
				tick = next
			}
			d.asleep.Store(true)
			if d.parked.Load() == d.polls.Load() { // the last who polled has parked since: see Park
				d.sleeper.Arm()
			}
			err = d.sleeper.Sleep(tick)
			d.asleep.Store(false)
		} else {
			err = d.conn.Wait(next, blocked)
		}
		if err != nil {
			return
		}
	}
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 1<<63 - 1
	}
	return t.UnixNano()
}

// Progress implements verbs.Progresser.
func (d *device) Progress() bool {
	d.polls.Inc() // also of who comes too early: he will come again
	if !d.role.TryLock() {
		return false
	}
	if d.closing {
		d.role.Unlock()
		return false
	}
	did := d.step(pollStep)
	d.unlockRole()
	return did
}

// Park implements verbs.Progresser.
func (d *device) Park() {
	d.parked.Store(d.polls.Load())
	if d.asleep.Load() {
		d.sleeper.Arm()
	}
}

// runTX lets requesters send from the caller's goroutine, unless somebody has the role, who will
// then see the kick when he lets go of it.
func (d *device) runTX() {
	for d.nKicks.Load() > 0 && d.role.TryLock() {
		if d.closing {
			d.role.Unlock()
			return
		}
		d.step(postStep)
		blocked := d.tx.blocked
		d.leaveRole()
		if blocked {
			return // the engine goroutine goes on when the socket does
		}
	}
}

// unlockRole lets go of the role and looks after what was left meanwhile by those who found it taken.
func (d *device) unlockRole() {
	d.leaveRole()
	d.runTX()
}

// leaveRole unlocks, and wakes the engine goroutine for what only it (or a Progress) may do: handlers, and
// timers earlier than the one it sleeps for.
func (d *device) leaveRole() {
	wake := len(d.cqReady) > 0 || d.more || d.tx.blocked || unixNano(d.timers.next()) < d.waitUntil.Load()
	if wake {
		d.waitUntil.Store(0)
	}
	d.role.Unlock()
	if wake {
		d.conn.Wake()
	}
}

// kick notes that q has something to be done by the holder of the role.
func (d *device) kick(q *qp) {
	if q.kicked.Swap(true) {
		return
	}
	d.kickMu.Lock()
	d.kicks = append(d.kicks, q)
	d.nKicks.Store(int32(len(d.kicks) + len(d.gsiOut)))
	d.kickMu.Unlock()
}

// stepKind is who takes a step.
type stepKind uint8

const (
	engineStep stepKind = iota // the engine goroutine: everything
	pollStep                   // Progress: everything
	postStep                   // a poster: no receiving, timers or handlers
)

// step does everything that is due, and reports whether there may be more at once. Engine role.
func (d *device) step(kind stepKind) (more bool) {
	full, yield := kind != postStep, kind == engineStep
	d.part.Enter()
	defer d.part.Exit()
	d.now = time.Now()
	d.more = false
	if d.tx.blocked {
		// What waits names memory of requests that an acknowledgement would complete: first it leaves.
		if d.tx.flush(); d.tx.blocked {
			return false
		}
	}
	if full {
		n := d.receiveBatch()
		if n > 0 {
			d.noteDrops()
		}
		d.runTimers()
		more = more || n > 0
	}
	handled := false
	for round := 0; ; round++ {
		d.takeKicks()
		d.runRequesters()
		if !full || len(d.cqReady) == 0 {
			if d.nKicks.Load() == 0 || round >= maxRounds {
				break
			}
			continue
		}
		d.runHandlers()
		handled = true
		if round >= maxRounds {
			break
		}
		if yield && d.nKicks.Load() == 0 {
			// Give the reader that was just woken a chance to answer: its data then carries our
			// acknowledgements along.
			yield = false
			runtime.Gosched()
		}
	}
	answered := kind != pollStep || !handled || !d.asleep.Load()
	if answered {
		d.answers()
	}
	// Otherwise he who polls takes what was delivered and most likely answers it: acknowledgements go
	// along with the answer, in one train, or in his next poll. If he does neither, the engine goroutine, which looks
	// every pollTick while somebody polls, sends them.
	if d.tx.open || len(d.tx.trains) > 0 {
		d.tx.flush()
	}
	if !d.tx.blocked && (len(d.txq) > 0 || answered && len(d.acks) > 0) {
		d.more = true // they stopped for a socket that was full then, and nothing else tells that it is not any more
	}
	return more || d.more || len(d.cqReady) > 0
}

// takeKicks empties the list of kicked QPs and the GSI's output.
func (d *device) takeKicks() {
	if d.nKicks.Load() == 0 {
		return
	}
	d.kickMu.Lock()
	d.kicks, d.kickSpare = d.kickSpare[:0], d.kicks
	d.gsiOut, d.gsiSpare = d.gsiSpare[:0], d.gsiOut
	d.nKicks.Store(0)
	d.kickMu.Unlock()
	for i, q := range d.kickSpare {
		d.kickSpare[i] = nil
		q.kicked.Store(false)
		if q.closed.Load() {
			continue
		}
		q.applyErr()
		switch q.State() {
		case verbs.StateErr:
			q.enterErr() // flushes what was posted since
		case verbs.StateSQE:
			q.flushSends()
		default:
			d.queueTX(q)
		}
	}
	for i := range d.gsiSpare {
		d.sendGSI(&d.gsiSpare[i])
	}
}

// queueTX puts q on the list of QPs that may have something to send.
func (d *device) queueTX(q *qp) {
	if !q.txList {
		q.txList = true
		d.txq = append(d.txq, q)
	}
}

// runRequesters gives each QP on the list one turn.
func (d *device) runRequesters() {
	n := len(d.txq)
	for i := 0; i < n; i++ {
		q := d.txq[i]
		q.txList = false
		if !q.closed.Load() && d.runRequester(q) {
			d.queueTX(q)
			d.more = true
		}
	}
	d.txq = append(d.txq[:0], d.txq[n:]...)
}

// runHandlers calls the handlers of CQs that fired.
func (d *device) runHandlers() {
	n := len(d.cqReady)
	for i := 0; i < n; i++ {
		c := d.cqReady[i]
		c.fire = false
		d.enterHandler()
		c.handler(c)
		d.leaveHandler()
	}
	d.cqReady = append(d.cqReady[:0], d.cqReady[n:]...)
}

// answers sends what responders owe.
func (d *device) answers() {
	n := len(d.acks)
	for i := 0; i < n; i++ {
		q := d.acks[i]
		q.ackList = false
		if d.answer(q) {
			d.dueAnswer(q)
			d.more = !d.tx.blocked
		}
	}
	d.acks = append(d.acks[:0], d.acks[n:]...)
}

// receive takes a train apart.
func (d *device) receive(t *packetio.RxTrain) {
	d.train = t
	d.stats.add(cRxTrains, 1)
	d.stats.add(cRxBytes, uint64(len(t.Data)))
	size := t.SegSize
	if size <= 0 {
		size = len(t.Data)
	}
	data := t.Data
	var n uint64
	for i := uint16(0); len(data) > 0; i++ {
		k := min(size, len(data))
		d.packet(t, data[:k:k], i)
		data = data[k:]
		n++
	}
	d.stats.add(cRxPackets, n)
}

// packet checks one datagram (rocev2 spec 8.4) and hands it to the half of the QP it is for. i is its
// place in the train, a guess at its IPv4 identification.
func (d *device) packet(t *packetio.RxTrain, b []byte, i uint16) {
	var pk roce.Packet
	if roce.Parse(b, &pk) != nil {
		d.stats.add(cRxMalformed, 1)
		return
	}
	if pk.Op == roce.CNP {
		d.stats.add(cRxCNP, 1)
		return
	}
	num := pk.BTH.DestQP()
	if num == 1 {
		d.gsiPacket(t, b, &pk, i)
		return
	}
	q := d.qps.get(num)
	if q == nil || q.closed.Load() {
		d.stats.add(cRxNoQP, 1)
		if pk.Op>>5 == 0 && d.strays.due(d.now) && pk.BTH.PKeyOK() {
			d.stray(t, b, i)
		}
		return
	}
	if q.typ == verbs.UD {
		d.recvUD(q, t, b, &pk, i)
		return
	}
	if pk.Op>>5 != 0 {
		d.stats.add(cRxNoQP, 1)
		return
	}
	if !pk.BTH.PKeyOK() {
		d.stats.add(cRxBadPKey, 1)
		return
	}
	if t.From != q.rxFrom {
		if t.From.Addr().WithZone("") != q.peer.Addr().WithZone("") { // a link-local peer is on our link, whatever it is called
			d.stats.add(cRxBadSource, 1)
			return
		}
		q.rxFrom, q.rxFlow = t.From, roce.NewFlow(t.From, d.conn.LocalAddr())
	}
	id, v := q.rxFlow.Check(b, i)
	if v != roce.OK0 && !d.believe(&q.ids, v, id) {
		return
	}
	if v == roce.OK0 || v == roce.OKGuess {
		q.ids.Accept(v, id, d.now)
	}
	if pk.Info.Valid && pk.Info.Flags&roce.FlagResponse != 0 {
		d.response(q, &pk)
	} else {
		d.request(q, &pk)
	}
}

// believe decides on a packet whose ICRC was not right as it stood.
func (d *device) believe(ids *roce.IDTracker, v roce.Verdict, id uint16) bool {
	switch v {
	case roce.OKGuess:
		return true
	case roce.OKSolved:
		if ids.Accept(v, id, d.now) {
			d.stats.add(cRxICRCSolved, 1)
			return true
		}
	case roce.BadDF:
		d.stats.add(cRxBadDF, 1)
		return false
	}
	d.stats.add(cRxBadICRC, 1)
	return false
}

func (d *device) noteDrops() {
	if n := d.conn.Dropped(); n != d.drops {
		d.stats.add(cRxSockDrops, n-d.drops)
		d.drops = n
	}
}

// timerHeap holds the QPs for which something may be due at a time. An entry is never moved later in
// place: when it comes up early, timeout puts it back where it belongs. So a timer that every
// acknowledgement restarts costs a comparison.
type timerHeap []*qp

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].timerAt.Before(h[j].timerAt) }
func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].timerIdx, h[j].timerIdx = i, j
}
func (h *timerHeap) Push(x any) {
	q := x.(*qp)
	q.timerIdx = len(*h)
	*h = append(*h, q)
}
func (h *timerHeap) Pop() any {
	old := *h
	q := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	q.timerIdx = -1
	return q
}

func (h timerHeap) next() time.Time {
	if len(h) == 0 {
		return time.Time{}
	}
	return h[0].timerAt
}

// add makes sure that q is looked at by t.
func (h *timerHeap) add(q *qp, t time.Time) {
	switch {
	case q.timerIdx < 0:
		q.timerAt = t
		heap.Push(h, q)
	case t.Before(q.timerAt):
		q.timerAt = t
		heap.Fix(h, q.timerIdx)
	}
}

func (h *timerHeap) remove(q *qp) {
	if q.timerIdx >= 0 {
		heap.Remove(h, q.timerIdx)
	}
}

func (d *device) runTimers() {
	for len(d.timers) > 0 && !d.now.Before(d.timers[0].timerAt) {
		d.timeout(heap.Pop(&d.timers).(*qp))
	}
}
