package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// A client drives the runs of one session with a server, one after another.
type client struct {
	conn       *controlConn
	transports *transports
	params     params
	progress   progress
	reporter   reporter // hears of intervals as they end

	answers chan *response // from listen to ask
	gone    chan struct{}  // closed when the connection has ended, for
	goneErr error          // this reason, and listen with it
	closing chan struct{}  // closed by close
}

// dialClient connects to the server's control address. local is the address to use on this host; the
// zero Addr leaves it to the kernel's routes.
func dialClient(ctx context.Context, server netip.AddrPort, local netip.Addr, p params, open openTransport, pr progress) (*client, error) {
	d := net.Dialer{Timeout: helloTimeout}
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	nc, err := d.DialContext(ctx, "tcp", server.String())
	if err != nil {
		return nil, err
	}
	conn := newControlConn(nc)
	c := &client{conn: conn, transports: newTransports(open, conn.localAddr(), p.RDS), params: p, progress: pr, reporter: noReporter{},
		answers: make(chan *response), gone: make(chan struct{}), closing: make(chan struct{})}
	go c.listen()
	if _, err := c.ask(request{Op: opHello, Version: controlVersion, RDS: &p.RDS}); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// listen reads answers, also while nobody asks, so that the end of a server is known at once and not at the end of a run.
func (c *client) listen() {
	defer close(c.gone)
	for {
		res := new(response)
		switch err := c.conn.read(res); {
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
			c.goneErr = fmt.Errorf("server %v closed the control connection", c.conn.RemoteAddr())
			return
		case err != nil:
			c.goneErr = fmt.Errorf("control connection: %w", err)
			return
		}
		select {
		case c.answers <- res:
		case <-c.closing:
			c.goneErr = net.ErrClosed
			return
		}
	}
}

// bye closes everything on both sides, and returns what either has found left behind. Neither closes before the other has what is
// still on its way to it.
func (c *client) bye() error {
	c.transports.settle()
	_, serr := c.ask(request{Op: opBye})
	return errors.Join(c.transports.close(), serr)
}

// close is called once.
func (c *client) close() error {
	err := errors.Join(c.transports.close(), c.conn.Close())
	close(c.closing)
	<-c.gone
	return err
}

// ask sends a request and waits for its answer.
func (c *client) ask(req request) (*response, error) {
	timeout := time.NewTimer(answerTimeout)
	defer timeout.Stop()
	if err := c.conn.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return nil, err
	}
	if err := c.conn.write(req); err != nil {
		select {
		case <-c.gone: // the cause
			return nil, c.goneErr
		default:
			return nil, fmt.Errorf("control connection: %w", err)
		}
	}
	select {
	case res := <-c.answers:
		return res, res.err()
	case <-c.gone:
		return nil, c.goneErr
	case <-timeout.C:
		return nil, fmt.Errorf("server %v has not answered for %v", c.conn.RemoteAddr(), answerTimeout)
	}
}

// measure runs specs and returns the results of those that were measured. It stops at the first error,
// and when ctx is done, which is no error.
func (c *client) measure(ctx context.Context, specs []spec) ([]result, error) {
	var out []result
	for _, s := range specs {
		if ctx.Err() != nil {
			break
		}
		r, err := c.run(ctx, s)
		if r != nil {
			out = append(out, *r)
			if rerr := c.reporter.run(r); err == nil {
				err = rerr
			}
		}
		if err != nil && ctx.Err() == nil {
			return out, err
		}
		if err != nil {
			// Interrupted. What went wrong with the content counts all the same.
			var v *verifyError
			if errors.As(err, &v) {
				return out, err
			}
			break
		}
	}
	return out, nil
}

// minInterval is the shortest measured interval of an interrupted run that still says something.
const minInterval = 100 * time.Millisecond

// run does one run. The result is nil if nothing was measured; with Verify there is one and an error when
// the content was wrong.
func (c *client) run(ctx context.Context, s spec) (r *result, err error) {
	var token [8]byte
	rand.Read(token[:]) // never fails (crypto/rand)
	s.Token = binary.BigEndian.Uint64(token[:])
	c.progress.begin(s)

	// 1. Both endpoints. The server's comes first: some transports listen there.
	res, err := c.ask(request{Op: opPrepare, Spec: &s})
	if err != nil {
		return nil, err
	}
	ep, err := c.transports.endpoint(ctx, s, true)
	if err != nil {
		return nil, errors.Join(err, c.end())
	}
	side := newSide(s, true, ep)
	side.parts = c.params.Interval > 0
	defer func() {
		// Ours first: the server's close may wait for what we hold.
		if cerr := errors.Join(side.close(), c.end()); err == nil {
			err = cerr
		}
	}()

	// 2. Flows. Both sides work at it at the same time.
	connected := make(chan error, 1)
	connectCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, err := c.ask(request{Op: opConnect, Addrs: ep.addrs()})
		if err != nil {
			cancel()
		}
		connected <- err
	}()
	err = side.connect(connectCtx, onLink(c.conn.localAddr(), res.Addrs))
	if serr := <-connected; serr != nil {
		return nil, serr // the cause; ours is that we were told to stop
	}
	if err != nil {
		return nil, err
	}

	// 3. Load.
	if _, err := c.ask(request{Op: opStart}); err != nil {
		return nil, err
	}
	side.start()
	if err := c.pause(ctx, side, c.params.Warmup, nil); err != nil {
		return nil, err
	}

	// 4. The measured interval, unless it would be too short to say anything.
	if ctx.Err() == nil {
		if _, err := c.ask(request{Op: opMark}); err != nil {
			return nil, err
		}
		mine := side.mark(true)
		sam := &sampler{c: c, side: side, start: mine.at, last: mine}
		if err := c.pause(ctx, side, c.params.Duration, sam); err != nil {
			return nil, err
		}
		res, err = c.ask(request{Op: opMark})
		if err != nil {
			return nil, err
		}
		if d := side.mark(false).since(mine); ctx.Err() == nil || d.Seconds >= minInterval.Seconds() {
			r = newResult(s, d, *res.Delta)
			r.Intervals = sam.intervals
		}
	}

	// 5. No more load; everything sent arrives.
	if err := c.finish(side); err != nil {
		if ferr := side.failure(); ferr != nil {
			err = ferr // usually the cause
		}
		return r, err
	}
	if r != nil {
		r.Verified = s.Verify
		r.setRoundTrips(side.roundTrips())
		if s.Test == testLoad {
			r.LateSeconds = percentilesOf(side.lateness())
		}
	}
	return r, nil
}

// finish stops both sides and waits for what is on its way.
func (c *client) finish(side *side) error {
	sent, err := side.stop()
	if err != nil {
		return err
	}
	res, err := c.ask(request{Op: opStop, Sent: sent})
	if err != nil {
		return err
	}
	return side.drain(res.Sent)
}

func (c *client) end() error {
	_, err := c.ask(request{Op: opEnd})
	return err
}

// A sampler measures the parts of the measured interval that --interval asks for.
type sampler struct {
	c         *client
	side      *side
	start     time.Time
	last      snapshot
	intervals []interval
}

// sample ends a part.
func (sm *sampler) sample() error {
	res, err := sm.c.ask(request{Op: opSample})
	if err != nil {
		return err
	}
	sn := sm.side.snapshot()
	r := newResult(sm.side.spec, sn.since(sm.last), *res.Delta)
	iv := interval{
		BeginSeconds: sm.last.at.Sub(sm.start).Seconds(), EndSeconds: sn.at.Sub(sm.start).Seconds(),
		MessagesPerSecond: r.MessagesPerSecond, BytesPerSecond: r.BytesPerSecond, RTTSeconds: percentilesOf(sm.side.partRoundTrips()),
		CPUSeconds: r.CPUSeconds, Retransmits: r.Retransmits, Drops: r.Drops, Removals: r.Removals,
	}
	sm.last = sn
	sm.intervals = append(sm.intervals, iv)
	return sm.c.reporter.interval(r, &iv)
}

// pause lets the load run for d, or until something ends it. With a sampler it samples all the while.
func (c *client) pause(ctx context.Context, s *side, d time.Duration, sm *sampler) error {
	const step = 100 * time.Millisecond
	every := c.params.Interval
	if sm == nil || every == 0 {
		sm, every = nil, 2*d+step // none
	}
	begin := time.Now()
	next := every
	t := time.NewTimer(min(step, every, d))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.failed:
			return nil
		case <-c.gone:
			return c.goneErr
		case <-t.C:
		}
		elapsed := time.Since(begin)
		c.progress.advance(min(elapsed, d))
		// A remainder of less than half an interval is not a part of its own.
		if sm != nil && (elapsed >= next || elapsed >= d && elapsed-(next-every) >= every/2) {
			if err := sm.sample(); err != nil {
				return err
			}
			for next <= elapsed {
				next += every
			}
		}
		if elapsed = time.Since(begin); elapsed >= d {
			return nil
		}
		t.Reset(max(0, min(step, d-elapsed, next-elapsed)))
	}
}

// newResult combines what both sides counted.
func newResult(s spec, client, server delta) *result {
	r := &result{
		Transport:   s.Transport,
		Provider:    providerOf(s.Transport),
		Test:        s.Test,
		Size:        s.Size,
		RDMA:        s.RDMA,
		RDMASize:    s.RDMASize,
		Round:       s.Round,
		seconds:     client.Seconds,
		Offered:     s.Rate,
		Removals:    client.Removals + server.Removals,
		RDMAFailed:  client.Failed + server.Failed,
		CPUSeconds:  client.CPUSeconds + server.CPUSeconds,
		Retransmits: client.Retransmits + server.Retransmits,
		Drops:       client.Drops + server.Drops,
		cores:       client.CPUSeconds/client.Seconds + server.CPUSeconds/server.Seconds,
	}
	switch {
	case client.Seconds <= 0 || server.Seconds <= 0:
		r.cores = 0 // a clock that did not move
	case s.Test != testThroughput:
		r.MessagesPerSecond = float64(client.Messages) / client.Seconds
	case s.Bidir:
		r.MessagesPerSecond = float64(client.Messages)/client.Seconds + float64(server.Messages)/server.Seconds
	default:
		r.MessagesPerSecond = float64(server.Messages) / server.Seconds
	}
	r.Messages = uint64(r.MessagesPerSecond*client.Seconds + 0.5)
	r.BytesPerSecond = r.MessagesPerSecond * float64(s.Size+s.RDMASize)
	return r
}

// setRoundTrips takes what h says, which is nil for a throughput run.
func (r *result) setRoundTrips(h *hdrhistogram.Histogram) {
	if r.RTTSeconds = percentilesOf(h); r.RTTSeconds == nil {
		return
	}
	r.times = h
	if b, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase); err == nil {
		r.Histogram = string(b) // in base64
	}
}

// percentilesOf is nil if h is, or empty.
func percentilesOf(h *hdrhistogram.Histogram) *percentiles {
	if h == nil || h.TotalCount() == 0 {
		return nil
	}
	seconds := func(ns int64) float64 { return time.Duration(ns).Seconds() }
	at := func(percent float64) float64 { return seconds(h.ValueAtPercentile(percent)) }
	return &percentiles{
		P50: at(50), P99: at(99), P999: at(99.9),
		P90: at(90), P9999: at(99.99), Min: seconds(h.Min()), Max: seconds(h.Max()), Mean: h.Mean() / 1e9, Count: h.TotalCount(),
	}
}
