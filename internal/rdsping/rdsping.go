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
	Seq  int           `json:"seq"` // of the ping, from 1 on
	RTT  time.Duration `json:"rtt"`
	From netip.Addr    `json:"from"`
	Dup  bool          `json:"dup,omitempty"` // that ping has been answered
	Err  string        `json:"err,omitempty"` // it could not be sent; there is nothing else then
}

// Line is r as rds-ping prints it to somebody who has asked dest.
func (r Reply) Line(dest netip.Addr) string {
	s := fmt.Sprintf(" %3d:", r.Seq)
	if r.Err != "" {
		return s + " ERROR: " + r.Err
	}
	s += fmt.Sprintf(" %d usec", r.RTT.Microseconds())
	if r.From != dest {
		s += " (" + r.From.String() + ")"
	}
	if r.Dup {
		s += " DUP!"
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

	mu       sync.Mutex
	seq      int // of the last ping
	sent     time.Time
	answered bool
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
	// What is returned is sum as it is when the readers have ended.
	for seq := 1; cfg.Count == 0 || seq <= cfg.Count; seq++ {
		if seq > 1 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
		if err = ps[seq%sockets].send(seq, dst); err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			mu.Lock()
			report(Reply{Seq: seq, Err: err.Error()})
			mu.Unlock()
			err = nil
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
	return
}

func (p *pinger) send(seq int, dst netip.AddrPort) error {
	p.mu.Lock()
	p.seq, p.sent, p.answered = seq, time.Now(), false
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
		r := Reply{Seq: p.seq, RTT: now.Sub(p.sent), From: from.Addr(), Dup: p.answered}
		p.answered = true
		p.mu.Unlock()
		report(r)
	}
}
