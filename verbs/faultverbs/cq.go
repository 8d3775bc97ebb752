package faultverbs

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/openrds/openrds/verbs"
)

// cq wraps a completion queue. While no fault concerns completions, and none that was held back is left,
// calls go straight to the provider's. Else completions move from there to held, where they wait until
// they are due; "arrived" are those whose time has come.
type cq struct {
	verbs.CQ
	d       *device
	handler func(verbs.CQ) // nil: only polled
	depth   int            // bound on held

	mu        sync.Mutex
	held      []heldWC // in the order they came
	full      bool     // held could take no more, more may be there
	broken    map[verbs.QPN]*breakage
	doctored  map[doctored]verbs.WCStatus
	armed     bool // the user has armed it, and it has not fired
	solicited bool // ... for solicited completions only
	listening bool // the provider's CQ is armed for all completions, on our own behalf
	timer     *time.Timer
	rng       *rand.Rand
	closed    bool

	run sync.Mutex // the handler is running; never taken with mu held
	wg  sync.WaitGroup
}

type heldWC struct {
	wc      verbs.WC
	due     time.Time
	arrived bool
}

// breakage is a QP whose sends fail: the first with status, then flushed. A flushed completion does not
// say of which queue it is: sends are known by their IDs.
type breakage struct {
	status verbs.WCStatus
	told   bool
	sends  map[uint64]bool
}

// doctored is a request that was spoilt before it was posted, so that the provider fails it: its status is
// to be another.
type doctored struct {
	qpn verbs.QPN
	id  uint64
}

func (d *device) CreateCQ(cfg verbs.CQConfig) (verbs.CQ, error) {
	if err := d.call(CreateCQ); err != nil {
		return nil, err
	}
	c := &cq{d: d, handler: cfg.Handler, depth: cfg.Depth, broken: map[verbs.QPN]*breakage{}, doctored: map[doctored]verbs.WCStatus{}}
	// Even of a CQ that is only polled we want to hear when completions come: their delay starts then. None
	// comes before CreateCQ returns.
	cfg.Handler = func(verbs.CQ) { c.notified() }
	var err error
	if c.CQ, err = d.Device.CreateCQ(cfg); err != nil {
		return nil, err
	}
	c.mu.Lock()
	if !c.bypassLocked() {
		c.listenLocked()
	}
	c.mu.Unlock()
	d.mu.Lock()
	d.cqs[c.CQ] = c
	d.mu.Unlock()
	return c, nil
}

// bypassLocked reports whether the provider's CQ is the user's.
func (c *cq) bypassLocked() bool {
	f := c.d.f
	return len(c.held) == 0 && len(c.broken) == 0 && len(c.doctored) == 0 && f.wcDelay.Load() == 0 && !f.wcShuffle.Load()
}

// breakQP makes the send completions of a QP fail. sends are the IDs of those that may be outstanding.
func (c *cq) breakQP(n verbs.QPN, s verbs.WCStatus, sends map[uint64]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken[n] == nil {
		c.broken[n] = &breakage{status: s, sends: sends}
	}
	for i := range c.held {
		c.breakLocked(&c.held[i].wc)
	}
}

// doctor gives the request id of QP n the status its failure is to have.
func (c *cq) doctor(n verbs.QPN, id uint64, s verbs.WCStatus) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.doctored[doctored{n, id}] = s
}

// undoctor is for a request that was not posted after all.
func (c *cq) undoctor(n verbs.QPN, id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.doctored, doctored{n, id})
}

// mendQP forgets that a QP is broken, and what was doctored of it: it was reset or closed.
func (c *cq) mendQP(n verbs.QPN) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.broken, n)
	maps.DeleteFunc(c.doctored, func(d doctored, _ verbs.WCStatus) bool { return d.qpn == n })
}

// breakLocked turns a send completion of a broken QP, or of a doctored request, into its error.
func (c *cq) breakLocked(wc *verbs.WC) {
	if s, ok := c.doctored[doctored{wc.QPN, wc.ID}]; ok && wc.Status != verbs.WCSuccess {
		delete(c.doctored, doctored{wc.QPN, wc.ID})
		if wc.Status != verbs.WCFlushErr { // its turn came
			wc.Status = s
		}
	}
	b := c.broken[wc.QPN]
	if b == nil {
		return
	}
	switch wc.Status {
	case verbs.WCSuccess:
		if wc.Opcode == verbs.WCRecv || wc.Opcode == verbs.WCRecvWriteWithImm {
			return
		}
	case verbs.WCFlushErr:
		if !b.sends[wc.ID] {
			return
		}
	default:
		b.told = true // it failed by itself first
		return
	}
	s := verbs.WCFlushErr
	if !b.told {
		b.told, s = true, b.status
	}
	*wc = verbs.WC{ID: wc.ID, Status: s, QPN: wc.QPN}
}

// drainLocked takes over what the provider's CQ has, up to the depth of the queue: the rest stays
// there, and overflows there if nobody polls.
func (c *cq) drainLocked() (full bool) {
	var wcs [32]verbs.WC
	for {
		room := c.depth - len(c.held)
		if room <= 0 {
			return true
		}
		n := c.CQ.Poll(wcs[:min(room, len(wcs))])
		if n == 0 {
			return false
		}
		due := time.Now().Add(c.d.f.wcDelay.Load())
		for i := range wcs[:n] {
			c.breakLocked(&wcs[i])
			// Due times never go back: a delay made shorter does not reorder a QP's completions.
			if k := len(c.held); k > 0 && c.held[k-1].due.After(due) {
				due = c.held[k-1].due
			}
			c.held = append(c.held, heldWC{wc: wcs[i], due: due})
		}
	}
}

// arriveLocked lets arrive what is due, and reports whether that calls for the handler. The timer is set for
// the next.
func (c *cq) arriveLocked() (fire bool) {
	now := time.Now()
	for i := range c.held {
		h := &c.held[i]
		if h.arrived {
			continue
		}
		if h.due.After(now) {
			c.wakeLocked(h.due.Sub(now))
			break
		}
		h.arrived = true
		if c.armed && (!c.solicited || h.wc.Status != verbs.WCSuccess || h.wc.Flags&verbs.WCSolicited != 0) {
			c.armed, fire = false, true
		}
	}
	return fire
}

// wakeLocked has the held completions looked at in d.
func (c *cq) wakeLocked(d time.Duration) {
	if c.timer != nil || c.closed || c.handler == nil {
		return // nobody waits; or it is set, and then it looks at all that is due, and sets itself again
	}
	c.wg.Add(1)
	c.timer = time.AfterFunc(d, func() {
		defer c.wg.Done()
		c.mu.Lock()
		c.timer = nil
		if c.closed {
			c.mu.Unlock()
			return
		}
		fire := c.arriveLocked()
		c.mu.Unlock()
		if fire {
			c.fire()
		}
	})
}

// notified is the provider's CQ calling its handler.
func (c *cq) notified() {
	c.mu.Lock()
	if c.bypassLocked() && !c.listening {
		c.armed = false
		c.mu.Unlock()
		c.fire()
		return
	}
	c.listening = false
	fire := c.listenLocked()
	c.mu.Unlock()
	if fire {
		c.fire()
	}
}

// listenLocked takes over what there is and, while the user waits or arrivals matter, has the provider
// tell of whatever comes.
func (c *cq) listenLocked() (fire bool) {
	for {
		c.full = c.drainLocked()
		fire = c.arriveLocked() || fire
		if c.full {
			return fire // Poll goes on here
		}
		if !c.armed && c.d.f.wcDelay.Load() == 0 {
			return fire
		}
		c.listening = true
		if !c.CQ.Arm(false) {
			return fire
		}
	}
}

func (c *cq) fire() {
	if c.handler == nil {
		return
	}
	c.run.Lock()
	defer c.run.Unlock()
	c.handler(c)
}

// expedite lets all completions arrive that are on their way: the QP they may be of is about to go, and
// what is in the CQ by then remains, while nothing comes after.
func (c *cq) expedite() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bypassLocked() {
		return
	}
	c.drainLocked()
	now := time.Now()
	for i := range c.held {
		if c.held[i].due.After(now) {
			c.held[i].due = now
		}
	}
	if c.arriveLocked() {
		c.wg.Go(c.fire)
	}
}

func (c *cq) Poll(wcs []verbs.WC) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bypassLocked() {
		return c.CQ.Poll(wcs)
	}
	if c.listenLocked() {
		// The user polls before the handler had a chance to run. It runs all the same.
		c.wg.Go(c.fire)
	}
	arrived := 0
	for arrived < len(c.held) && c.held[arrived].arrived {
		arrived++
	}
	if c.d.f.wcShuffle.Load() {
		c.shuffleLocked(arrived)
	}
	n := min(len(wcs), arrived)
	for i := range n {
		wcs[i] = c.held[i].wc
	}
	c.held = slices.Delete(c.held, 0, n)
	if c.full && n > 0 && c.listenLocked() {
		c.wg.Go(c.fire)
	}
	return n
}

// shuffleLocked permutes the first n completions, keeping those of a QP in order.
func (c *cq) shuffleLocked(n int) {
	if c.rng == nil {
		c.rng = rand.New(rand.NewPCG(c.d.f.seed.Load(), 0))
	}
	byQP := map[verbs.QPN][]heldWC{}
	turns := make([]verbs.QPN, n)
	for i, h := range c.held[:n] {
		byQP[h.wc.QPN] = append(byQP[h.wc.QPN], h)
		turns[i] = h.wc.QPN
	}
	c.rng.Shuffle(n, func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	for i, qpn := range turns {
		c.held[i] = byQP[qpn][0]
		byQP[qpn] = byQP[qpn][1:]
	}
}

func (c *cq) Arm(solicitedOnly bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	if !c.armed {
		c.armed, c.solicited = true, solicitedOnly
	} else if !solicitedOnly {
		c.solicited = false // the stronger arm wins
	}
	if c.bypassLocked() {
		return c.CQ.Arm(solicitedOnly)
	}
	if c.listenLocked() {
		// One of them calls for the handler, now that it is armed; it has not missed it then.
		c.wg.Go(c.fire)
	}
	return len(c.held) > 0 && c.held[0].arrived
}

func (c *cq) Close() error {
	if err := c.d.f.call(CloseCQ); err != nil {
		return err
	}
	if err := c.CQ.Close(); err != nil {
		return err
	}
	c.mu.Lock()
	c.closed, c.armed, c.held = true, false, nil
	if c.timer != nil && c.timer.Stop() {
		c.wg.Done()
	}
	c.timer = nil
	c.mu.Unlock()
	c.wg.Wait()
	c.run.Lock() // a handler of the provider's is over; ours may be at its end
	defer c.run.Unlock()
	c.d.mu.Lock()
	delete(c.d.cqs, c.CQ)
	c.d.mu.Unlock()
	return nil
}
