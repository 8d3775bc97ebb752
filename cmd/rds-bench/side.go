package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Bounds of what a run waits for.
const (
	connectTimeout = 10 * time.Second // until every flow answered
	maxPatience    = 10 * time.Second // until what was sent has arrived, after the senders stopped
	surplusWait    = 20 * time.Millisecond
)

// A side is one process's part in one run: the flows and the goroutines that load them. Client and server
// use the same code; spec and active decide what the goroutines do:
//
//	                     active (client)              passive (server)
//	throughput           send                         receive, count
//	throughput, bidir    send; receive, count         send; receive, count
//	rtt                  send, receive, time; repeat  receive, send; repeat
//	load                 send at a rate; receive      receive, send; repeat
//	with RDMA            initiate; complete           register, offer; receive, answer
//	with --chaos         remove and add the device again and again, both
//
// Its life: newSide, connect, start, mark twice, stop, drain, close.
//
// A datagram without payload is never data. It is the flow's first, in both directions, which tells
// that it works; and with a depth it is the receiver's word that another batch of datagrams has been taken.
type side struct {
	spec   spec
	active bool
	ep     endpoint
	lanes  []*lane

	parts bool         // times of parts of the measured interval will be asked for
	begun time.Time    // valid from start on
	from  atomic.Int64 // measured interval, in ns since begun; 0: not yet
	to    atomic.Int64

	removals  atomic.Uint64 // of this side's device
	stopping  atomic.Bool   // senders finish with the datagram they are at
	measuring atomic.Bool   // between the two marks
	closing   atomic.Bool   // errors of flows are ours from here on
	stopped   chan struct{} // closed with stopping
	failed    chan struct{} // closed at the first error
	failOnce  sync.Once
	err       error // valid once failed is closed

	senders sync.WaitGroup // they end after stop
	workers sync.WaitGroup // all goroutines; the others end after close
}

// A lane is a flow with what its goroutines own.
type lane struct {
	side  *side
	index int
	flow  flow
	tx    stream
	rx    stream

	received atomic.Uint64 // data datagrams; one writer
	sent     uint64        // written by the sender, read after it has ended

	times *recorder // round trips; nil where there are none
	late  *recorder // how long after their time datagrams were sent; of a load run

	rdma *rdmaLane // of a run with RDMA; nil otherwise

	// With a depth only. batch datagrams make a credit.
	batch   uint64
	credits chan struct{} // credits that arrived, for the sender
	owed    chan struct{} // credits to send, for the goroutine that sends them
	sendMu  sync.Mutex    // flow.send has two users then
}

// newSide prepares a run over flows that connect will make. It takes ep over.
func newSide(s spec, active bool, ep endpoint) *side {
	return &side{spec: s, active: active, ep: ep, stopped: make(chan struct{}), failed: make(chan struct{})}
}

// connect makes the flows and sees that each carries a datagram there and back.
func (s *side) connect(ctx context.Context, peers []netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	flows, err := s.ep.connect(ctx, peers)
	if err != nil {
		return err
	}
	if len(flows) != s.spec.Sockets {
		return fmt.Errorf("%d flows instead of %d", len(flows), s.spec.Sockets)
	}
	for i, f := range flows {
		l := &lane{
			side: s, index: i, flow: f,
			tx: newStream(s.spec.Seed, i, s.active),
			rx: newStream(s.spec.Seed, i, !s.active),
		}
		if s.spec.Depth > 0 && s.spec.Test == testThroughput && s.spec.RDMA == "" {
			l.batch = uint64(max(1, s.spec.Depth/2))
			l.credits = make(chan struct{}, s.spec.Depth+1)
			l.owed = make(chan struct{}, s.spec.Depth+1)
		}
		if s.spec.Test != testThroughput && s.active {
			l.times = newRecorder(s.parts)
			if s.spec.Test == testLoad {
				l.late = newRecorder(false)
			}
		}
		s.lanes = append(s.lanes, l)
		if s.spec.RDMA != "" {
			if err := l.prepareRDMA(); err != nil {
				return err
			}
		}
	}
	return s.greet(ctx)
}

// greet exchanges an empty datagram on every flow.
func (s *side) greet(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	for _, l := range s.lanes {
		if err := l.flow.setDeadline(deadline); err != nil {
			return err
		}
	}
	// Blocked calls end when ctx does, not only at its deadline.
	stop := context.AfterFunc(ctx, func() {
		for _, l := range s.lanes {
			_ = l.flow.setDeadline(time.Unix(1, 0))
		}
	})
	defer stop()
	for _, l := range s.lanes {
		if err := l.greet(s.active); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fmt.Errorf("flow %d: no datagram came through: %w", l.index, err)
		}
	}
	if !stop() {
		return ctx.Err()
	}
	for _, l := range s.lanes {
		if err := l.flow.setDeadline(time.Time{}); err != nil {
			return err
		}
	}
	return nil
}

func (l *lane) greet(active bool) error {
	buf := l.flow.buffer(l.side.spec.Size)
	if active {
		if err := l.flow.send(0, false); err != nil {
			return err
		}
	}
	n, err := l.flow.recv(buf)
	if err != nil {
		return err
	}
	if n != 0 {
		return fmt.Errorf("%d bytes came before the greeting", n)
	}
	if !active {
		return l.flow.send(0, false)
	}
	return nil
}

// start sets the load going. The passive side starts first.
func (s *side) start() {
	s.begun = time.Now()
	if s.spec.Chaos != "" {
		s.goSender(s.churn)
	}
	for _, l := range s.lanes {
		if l.rdma != nil {
			l.rdma.start()
			continue
		}
		switch {
		case s.spec.Test == testThroughput:
		case !s.active:
			s.goWorker(l.pong)
			continue
		case s.spec.Test == testLoad:
			s.goSender(l.sendAtRate)
			s.goWorker(l.receiveAnswers)
			continue
		default:
			s.goSender(l.ping)
			continue
		}
		if s.active || s.spec.Bidir {
			s.goSender(l.send)
		}
		if !s.active || s.spec.Bidir || l.batch > 0 {
			s.goWorker(l.receive)
		}
		if l.batch > 0 {
			s.goWorker(l.sendCredits)
		}
	}
}

func (s *side) goSender(f func() error) {
	s.senders.Add(1)
	s.goWorker(func() error {
		defer s.senders.Done()
		return f()
	})
}

func (s *side) goWorker(f func() error) {
	s.workers.Add(1)
	go func() {
		defer s.workers.Done()
		if err := f(); err != nil && !s.closing.Load() {
			s.fail(err)
		}
	}()
}

func (s *side) fail(err error) {
	s.failOnce.Do(func() {
		s.err = err
		close(s.failed)
	})
}

// failure is the first error of a worker, nil so far.
func (s *side) failure() error {
	select {
	case <-s.failed:
		return s.err
	default:
		return nil
	}
}

func (l *lane) wrap(err error) error {
	return fmt.Errorf("%v: socket %d: %w", l.side.spec, l.index, err)
}

// send is the sender's loop of a throughput run.
func (l *lane) send() error {
	s := l.side
	size := s.spec.Size
	buf := l.flow.buffer(size)
	l.tx.fill(buf, 0)
	room := uint64(math.MaxUint64)
	if l.batch > 0 {
		room = uint64(s.spec.Depth)
	}
	for seq := uint64(0); ; seq++ {
		for room == 0 {
			select {
			case <-l.credits:
				room += l.batch
			case <-s.stopped:
				l.sent = seq
				return nil
			}
		}
		room--
		if s.spec.Verify {
			l.tx.fill(buf, seq)
		}
		last := s.stopping.Load()
		if err := l.sendOne(size, !last && room > 0); err != nil {
			l.sent = seq
			return l.wrap(err)
		}
		if last {
			l.sent = seq + 1
			return nil
		}
	}
}

func (l *lane) sendOne(n int, more bool) error {
	if l.batch > 0 {
		l.sendMu.Lock()
		defer l.sendMu.Unlock()
	}
	return l.flow.send(n, more)
}

// receive is the receiver's loop of a throughput run. After a datagram that is not what it should be it
// goes on, so that senders end as always; the failure is kept.
func (l *lane) receive() error {
	s := l.side
	buf := make([]byte, s.spec.Size+1)
	sound := true
	for seq := uint64(0); ; {
		n, err := l.flow.recv(buf)
		if err != nil {
			return l.wrap(err)
		}
		if n == 0 && l.batch > 0 {
			select {
			case l.credits <- struct{}{}:
			default:
				return l.wrap(errors.New("more credits than datagrams in flight"))
			}
			continue
		}
		if sound {
			if err := l.check(buf[:n], seq); err != nil {
				s.fail(err)
				sound = false
			}
		}
		seq++
		l.received.Store(seq)
		if l.batch > 0 && seq%l.batch == 0 {
			// A sender within its depth cannot fill the channel.
			select {
			case l.owed <- struct{}{}:
			default:
				return l.wrap(errors.New("more datagrams than the depth allows"))
			}
		}
	}
}

// sendCredits is apart from receive, which would not receive while the transport has no room.
func (l *lane) sendCredits() error {
	for {
		select {
		case <-l.owed:
			if err := l.sendOne(0, false); err != nil {
				return l.wrap(err)
			}
		case <-l.side.stopped:
			return nil
		}
	}
}

// check looks at a datagram: at its length always, at its content and place with Verify.
func (l *lane) check(p []byte, seq uint64) error {
	if len(p) != l.side.spec.Size {
		return l.wrap(&verifyError{fmt.Errorf("datagram %d has %d bytes instead of %d", seq, len(p), l.side.spec.Size)})
	}
	if l.side.spec.Verify {
		if err := l.rx.check(p, seq); err != nil {
			return l.wrap(&verifyError{err})
		}
	}
	return nil
}

// A verifyError is a datagram that is not what was sent.
type verifyError struct{ err error }

func (e *verifyError) Error() string { return e.err.Error() }
func (e *verifyError) Unwrap() error { return e.err }

// ping measures round trips, one at a time.
func (l *lane) ping() error {
	s := l.side
	out := l.flow.buffer(s.spec.Size)
	l.tx.fill(out, 0)
	in := make([]byte, s.spec.Size+1)
	for seq := uint64(0); !s.stopping.Load(); {
		if s.spec.Verify {
			l.tx.fill(out, seq)
		}
		measuring := s.measuring.Load()
		start := time.Now()
		if err := l.flow.send(s.spec.Size, false); err != nil {
			return l.wrap(err)
		}
		n, err := l.flow.recv(in)
		if err != nil {
			return l.wrap(err)
		}
		if measuring {
			l.times.record(time.Since(start))
		}
		if err := l.check(in[:n], seq); err != nil {
			return err
		}
		seq++
		l.sent = seq
		l.received.Store(seq)
	}
	return nil
}

// pong answers pings with datagrams of its own content.
func (l *lane) pong() error {
	s := l.side
	out := l.flow.buffer(s.spec.Size)
	l.tx.fill(out, 0)
	in := make([]byte, s.spec.Size+1)
	for seq := uint64(0); ; seq++ {
		n, err := l.flow.recv(in)
		if err != nil {
			return l.wrap(err)
		}
		if err := l.check(in[:n], seq); err != nil {
			s.fail(err)
		}
		l.received.Store(seq + 1)
		if s.spec.Verify {
			l.tx.fill(out, seq)
		}
		if err := l.flow.send(s.spec.Size, false); err != nil {
			return l.wrap(err)
		}
	}
}

// A snapshot is what a side has counted at a moment.
type snapshot struct {
	at       time.Time
	messages uint64
	cpu      time.Duration
	counters counters
	removals uint64
	failed   uint64
}

// mark takes a snapshot; measuring says whether the measured interval begins or ends with it.
func (s *side) mark(measuring bool) snapshot {
	sn := s.snapshot()
	at := max(1, int64(sn.at.Sub(s.begun)))
	if measuring {
		s.from.Store(at)
	} else {
		s.to.Store(at)
	}
	s.measuring.Store(measuring)
	return sn
}

func (s *side) snapshot() snapshot {
	sn := snapshot{at: time.Now(), cpu: cpuTime(), counters: s.ep.counters(), removals: s.removals.Load()}
	for _, l := range s.lanes {
		sn.messages += l.received.Load()
		if l.rdma != nil {
			sn.failed += l.rdma.failed.Load()
		}
	}
	return sn
}

// A delta is the measured interval of one side: what the server tells its client.
type delta struct {
	Seconds     float64 `json:"seconds"`
	Messages    uint64  `json:"messages"` // received; in an RTT run of the active side: round trips
	CPUSeconds  float64 `json:"cpu_seconds"`
	Retransmits uint64  `json:"retransmits"`
	Drops       uint64  `json:"drops"`
	Removals    uint64  `json:"removals,omitempty"`
	Failed      uint64  `json:"rdma_failed,omitempty"`
}

func (sn snapshot) since(start snapshot) delta {
	return delta{
		Seconds:     sn.at.Sub(start.at).Seconds(),
		Messages:    sn.messages - start.messages,
		CPUSeconds:  (sn.cpu - start.cpu).Seconds(),
		Retransmits: sn.counters.retransmits - start.counters.retransmits,
		Drops:       sn.counters.drops - start.counters.drops,
		Removals:    sn.removals - start.removals,
		Failed:      sn.failed - start.failed,
	}
}

// stop ends the senders and returns how many datagrams each flow has sent. It waits for those on
// their way into a full transport, but not for ever.
func (s *side) stop() ([]uint64, error) {
	if s.stopping.CompareAndSwap(false, true) {
		close(s.stopped)
	}
	done := make(chan struct{})
	go func() {
		s.senders.Wait()
		close(done)
	}()
	timeout := time.NewTimer(s.spec.Patience)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		return nil, fmt.Errorf("%v: a send did not return within %v", s.spec, s.spec.Patience)
	}
	sent := make([]uint64, len(s.lanes))
	for i, l := range s.lanes {
		sent[i] = l.sent
	}
	return sent, s.failure()
}

// drain waits until every flow has received what its peer has sent, and a moment longer to see that nothing
// more comes. sent is what the other side's stop returned.
func (s *side) drain(sent []uint64) error {
	if len(sent) != len(s.lanes) {
		return fmt.Errorf("%v: counts of %d flows instead of %d", s.spec, len(sent), len(s.lanes))
	}
	switch {
	case s.active && s.spec.Test == testLoad && s.spec.RDMA == "":
		for i, l := range s.lanes {
			sent[i] = l.sent // as many answers are due
		}
	case s.active && !s.spec.Bidir: // a pinger has seen every answer already
		return s.failure()
	}
	deadline := time.Now().Add(s.spec.Patience)
	for i, l := range s.lanes {
		for l.settled() < sent[i] {
			if err := s.failure(); err != nil {
				return err
			}
			if time.Now().After(deadline) {
				return l.wrap(&verifyError{fmt.Errorf("%d of %d datagrams arrived within %v", l.settled(), sent[i], s.spec.Patience)})
			}
			time.Sleep(time.Millisecond)
		}
	}
	if s.spec.Verify {
		time.Sleep(surplusWait)
	}
	for i, l := range s.lanes {
		if n := l.settled(); n != sent[i] {
			return l.wrap(&verifyError{fmt.Errorf("%d datagrams arrived of %d sent", n, sent[i])})
		}
	}
	return s.failure()
}

// settled is of how many datagrams of the peer it is known what has become of them: those that arrived, and those of
// operations that failed with a device.
func (l *lane) settled() uint64 {
	n := l.received.Load()
	if l.rdma != nil {
		n += l.rdma.voided.Load()
	}
	return n
}

// roundTrips are those of the active side, nil for a run without any.
func (s *side) roundTrips() *hdrhistogram.Histogram {
	return s.merge(func(l *lane) *recorder { return l.times }, (*recorder).addTotal)
}

// partRoundTrips are those since the last call.
func (s *side) partRoundTrips() *hdrhistogram.Histogram {
	return s.merge(func(l *lane) *recorder { return l.times }, (*recorder).takePart)
}

// lateness is by how much datagrams of a load run were sent late.
func (s *side) lateness() *hdrhistogram.Histogram {
	return s.merge(func(l *lane) *recorder { return l.late }, (*recorder).addTotal)
}

func (s *side) merge(of func(*lane) *recorder, add func(*recorder, *hdrhistogram.Histogram)) *hdrhistogram.Histogram {
	var all *hdrhistogram.Histogram
	for _, l := range s.lanes {
		if r := of(l); r != nil {
			if all == nil {
				all = newHistogram()
			}
			add(r, all)
		}
	}
	return all
}

// close ends everything that is left of the run.
func (s *side) close() error {
	s.closing.Store(true)
	if s.stopping.CompareAndSwap(false, true) {
		close(s.stopped)
	}
	for _, l := range s.lanes {
		if l.rdma != nil {
			l.rdma.quit()
		}
	}
	err := s.ep.close()
	s.workers.Wait()
	for _, l := range s.lanes {
		if l.rdma != nil {
			err = errors.Join(err, l.rdma.close())
		}
	}
	return err
}
