package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// A server serves one client after another.
type server struct {
	ln   net.Listener
	log  hclog.Logger
	open openTransport
}

// serve accepts clients until ctx is done.
func (s *server) serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.ln.Close() })
	defer stop()
	defer s.ln.Close()
	var busy sync.Mutex
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for {
		c, err := s.ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		sessions.Go(func() {
			defer c.Close()
			cc := newControlConn(c)
			if !busy.TryLock() {
				_ = c.SetDeadline(time.Now().Add(helloTimeout))
				_ = cc.write(response{Error: "busy with another client"})
				return
			}
			defer busy.Unlock()
			s.serveConn(ctx, cc)
		})
	}
}

// serveConn runs one session and says in the log how it went.
func (s *server) serveConn(ctx context.Context, c *controlConn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	log := s.log.With("client", c.RemoteAddr().String())
	log.Info("session begins")
	ses := &session{stage: stageNew, ctx: ctx, conn: c, open: s.open}
	err := ses.run()
	if cerr := ses.close(); err == nil {
		err = cerr
	}
	switch {
	case ctx.Err() != nil:
	case err != nil:
		log.Warn("session failed", "error", err)
	default:
		log.Info("session ends")
	}
}

// A session answers one client's requests.
type session struct {
	ctx        context.Context
	conn       *controlConn
	open       openTransport
	transports *transports // after hello

	stage stage
	side  *side // the run in progress; not nil from stagePrepared on
	start snapshot
	last  snapshot // start, or the last sample
}

// A stage is how far a session is.
//
//	                                                                                    sample, any number
//	new ──hello──▶ idle ──prepare──▶ prepared ──connect──▶ connected ──start──▶ started ──mark──▶ measuring
//	                 ▲                                                           stop │  ◀──mark──┘
//	                 └───────────── end, from anywhere after idle ──────────────── stopped
//
// bye leads from idle to over. A request that fails ends its run: only end is possible then.
type stage string

const (
	stageNew       stage = "new"
	stageIdle      stage = "idle"
	stagePrepared  stage = "prepared"
	stageConnected stage = "connected"
	stageStarted   stage = "started"
	stageMeasuring stage = "measuring"
	stageMeasured  stage = "measured"
	stageStopped   stage = "stopped"
	stageFailed    stage = "failed"
	stageOver      stage = "over"
)

func (s *session) run() error {
	if err := s.conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	for {
		var req request
		if err := s.conn.read(&req); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		res, err := s.answer(&req)
		if err != nil {
			var v *verifyError
			res.Error, res.Verify = err.Error(), errors.As(err, &v)
		}
		if err := s.conn.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
			return err
		}
		if err := s.conn.write(res); err != nil {
			return err
		}
	}
}

// answer does what req asks.
func (s *session) answer(req *request) (response, error) {
	type at struct {
		op string
		stage
	}
	var res response
	var err error
	next := stageFailed
	switch (at{req.Op, s.stage}) {
	case at{opHello, stageNew}:
		next, err = stageIdle, s.hello(req)
	case at{opPrepare, stageIdle}:
		next = stagePrepared
		res.Addrs, err = s.prepare(req)
		if err != nil {
			s.stage = stageIdle
			return res, err
		}
	case at{opConnect, stagePrepared}:
		next, err = stageConnected, s.side.connect(s.ctx, onLink(s.conn.localAddr(), req.Addrs))
	case at{opStart, stageConnected}:
		s.side.start()
		next = stageStarted
	case at{opMark, stageStarted}:
		s.start = s.side.mark(true)
		s.last = s.start
		next = stageMeasuring
	case at{opSample, stageMeasuring}:
		sn := s.side.snapshot()
		d := sn.since(s.last)
		res.Delta, s.last = &d, sn
		next = stageMeasuring
	case at{opMark, stageMeasuring}:
		d := s.side.mark(false).since(s.start)
		res.Delta = &d
		next = stageMeasured
	case at{opStop, stageStarted}, at{opStop, stageMeasuring}, at{opStop, stageMeasured}:
		next = stageStopped
		if res.Sent, err = s.side.stop(); err == nil {
			err = s.side.drain(req.Sent)
		}
	case at{opBye, stageIdle}:
		s.transports.settle()
		next, err = stageOver, s.close()
	default:
		if req.Op == opEnd && s.stage != stageNew && s.stage != stageOver {
			next, err = stageIdle, s.endRun()
			break
		}
		return res, fmt.Errorf("request %q is out of place (%s)", req.Op, s.stage)
	}
	if err != nil {
		next = stageFailed
	}
	s.stage = next
	return res, err
}

func (s *session) hello(req *request) error {
	if req.Version != controlVersion {
		return fmt.Errorf("speaks version %d of the control protocol, the client %d", controlVersion, req.Version)
	}
	if req.RDS == nil {
		return errors.New("hello without options of RDS")
	}
	if err := req.RDS.validate(); err != nil {
		return err
	}
	s.transports = newTransports(s.open, s.conn.localAddr(), *req.RDS)
	return s.conn.SetReadDeadline(time.Time{})
}

func (s *session) prepare(req *request) ([]netip.AddrPort, error) {
	if req.Spec == nil {
		return nil, errors.New("prepare without a spec")
	}
	if err := req.Spec.validate(); err != nil {
		return nil, err
	}
	ep, err := s.transports.endpoint(s.ctx, *req.Spec, false)
	if err != nil {
		return nil, err
	}
	s.side = newSide(*req.Spec, false, ep)
	return ep.addrs(), nil
}

func (s *session) endRun() error {
	if s.side == nil {
		return nil
	}
	err := s.side.close()
	s.side = nil
	return err
}

func (s *session) close() error {
	err := s.endRun()
	if s.transports != nil {
		err = errors.Join(err, s.transports.close())
	}
	return err
}
