// Package rdsping asks a host's RDS for signs of life, as rds-ping does: empty datagrams to port 0, which the
// peer's stack answers by itself (rds-protocol spec 2.6, 7.5).
package rdsping

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/openrds/openrds/rds"
)

// sockets are used in turn, each with one ping outstanding, so that eight unanswered ones do not delay the next.
const sockets = 8

// Config says what to ask whom.
type Config struct {
	Source   netip.Addr    `json:"source"`
	Dest     netip.Addr    `json:"dest"`
	Count    int           `json:"count"`    // 0: until ctx is done
	Interval time.Duration `json:"interval"` // 0: one second
	TOS      uint8         `json:"tos"`
	Wait     time.Duration `json:"wait"` // for the last answers; 0: one second
}

// Reply is an answer, or what came instead.
type Reply struct {
	Seq  int           `json:"seq"`
	RTT  time.Duration `json:"rtt"`
	From netip.Addr    `json:"from"`
	Dup  bool          `json:"dup,omitempty"` // nothing was outstanding on this socket
	Err  string        `json:"err,omitempty"`
}

func (r Reply) String() string {
	s := fmt.Sprintf("%4d: %d usec", r.Seq, r.RTT.Microseconds())
	switch {
	case r.Err != "":
		s = fmt.Sprintf("%4d: ERROR: %s", r.Seq, r.Err)
	case r.Dup:
		s = fmt.Sprintf("%4d: DUP!", r.Seq)
	}
	return s
}

// Summary is the outcome.
type Summary struct {
	Sent     int `json:"sent"`
	Received int `json:"received"`
}

// pinger is one of the sockets.
type pinger struct {
	sock *rds.Socket

	mu   sync.Mutex
	seq  int
	sent time.Time // zero: nothing is outstanding
}

// Run pings until cfg.Count were sent and answered, or ctx is done. report is called for each reply, one at a
// time. The error is that of the sockets; silence is none.
func Run(ctx context.Context, svc *rds.Service, cfg Config, report func(Reply)) (sum Summary, err error) {
	if cfg.Interval <= 0 {
		cfg.Interval = time.Second
	}
	if cfg.Wait <= 0 {
		cfg.Wait = time.Second
	}
	var (
		ps  [sockets]pinger
		wg  sync.WaitGroup
		mu  sync.Mutex // report, sum.Received
		all = make(chan struct{}, 1)
	)
	defer wg.Wait()
	for i := range ps {
		p := &ps[i]
		if p.sock, err = svc.ListenAddrPort(ctx, netip.AddrPortFrom(cfg.Source, 0)); err != nil {
			return sum, err
		}
		defer p.sock.Close()
		p.sock.SetTypeOfService(cfg.TOS)
		wg.Go(func() {
			p.read(func(r Reply) {
				mu.Lock()
				defer mu.Unlock()
				if !r.Dup {
					sum.Received++
				}
				report(r)
				if cfg.Count > 0 && sum.Received == cfg.Count {
					all <- struct{}{}
				}
			})
		})
	}
	dst := netip.AddrPortFrom(cfg.Dest, rds.PingPort)
	tick := time.NewTicker(cfg.Interval)
	defer tick.Stop()
	for seq := 0; cfg.Count == 0 || seq < cfg.Count; seq++ {
		if seq > 0 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return sum, nil
			}
		}
		if err := ps[seq%sockets].send(seq, dst); err != nil {
			if errors.Is(err, net.ErrClosed) {
				return sum, err
			}
			mu.Lock()
			report(Reply{Seq: seq, Err: err.Error()})
			mu.Unlock()
		}
		sum.Sent++
	}
	t := time.NewTimer(cfg.Wait)
	defer t.Stop()
	select {
	case <-all:
	case <-t.C:
	case <-ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	return sum, nil
}

func (p *pinger) send(seq int, dst netip.AddrPort) error {
	p.mu.Lock()
	p.seq, p.sent = seq, time.Now()
	p.mu.Unlock()
	return p.sock.TrySend(rds.Message{Peer: dst})
}

func (p *pinger) read(report func(Reply)) {
	for {
		_, from, err := p.sock.ReadFromAddrPort(nil)
		if err != nil {
			return // closed
		}
		now := time.Now()
		p.mu.Lock()
		r := Reply{Seq: p.seq, From: from.Addr(), Dup: p.sent.IsZero()}
		if !r.Dup {
			r.RTT = now.Sub(p.sent)
			p.sent = time.Time{}
		}
		p.mu.Unlock()
		report(r)
	}
}
