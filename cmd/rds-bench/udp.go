package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/openrds/openrds/internal/rawudp"
)

// udpTransport is the baseline of what the machine can do with RoCE-like packets over UDP: the window,
// acknowledgements and ICRC of internal/rawudp, and nothing of verbs and RDS. A flow is a pair of
// one-way sockets.
type udpTransport struct{}

func (udpTransport) close() error { return nil }

func (udpTransport) open(_ context.Context, cfg endpointConfig) (endpoint, error) {
	ep := &udpEndpoint{local: cfg.local}
	for range cfg.flows {
		r, err := rawudp.NewReceiver(netip.AddrPortFrom(cfg.local, 0), rawudp.Options{})
		if err != nil {
			return nil, errors.Join(err, ep.close())
		}
		ep.flows = append(ep.flows, &udpFlow{rx: r})
	}
	return ep, nil
}

type udpEndpoint struct {
	local netip.Addr
	flows []*udpFlow
}

func (e *udpEndpoint) addrs() []netip.AddrPort {
	var out []netip.AddrPort
	for _, f := range e.flows {
		out = append(out, f.rx.Addr())
	}
	return out
}

func (e *udpEndpoint) connect(_ context.Context, peers []netip.AddrPort) ([]flow, error) {
	if len(peers) != len(e.flows) {
		return nil, fmt.Errorf("udp: %d peers for %d sockets", len(peers), len(e.flows))
	}
	var flows []flow
	for i, f := range e.flows {
		tx, err := rawudp.NewSender(e.local, peers[i], rawudp.Options{})
		if err != nil {
			return nil, err
		}
		f.tx = tx
		flows = append(flows, f)
	}
	return flows, nil
}

func (e *udpEndpoint) counters() counters {
	var n counters
	for _, f := range e.flows {
		rx := f.rx.Stats()
		n.drops += rx.BadICRC + rx.OutOfOrder
		if f.tx != nil {
			n.retransmits += f.tx.Stats().Retransmits
		}
	}
	return n
}

func (e *udpEndpoint) close() error {
	var errs []error
	for _, f := range e.flows {
		errs = append(errs, f.rx.Close())
		if f.tx != nil {
			errs = append(errs, f.tx.Close())
		}
	}
	return errors.Join(errs...)
}

type udpFlow struct {
	tx  *rawudp.Sender
	rx  *rawudp.Receiver
	out []byte
}

func (f *udpFlow) buffer(size int) []byte {
	if len(f.out) < size {
		f.out = make([]byte, size)
	}
	return f.out[:size]
}

func (f *udpFlow) send(n int, more bool) error { return f.tx.Send(f.out[:n], more) }

func (f *udpFlow) recv(p []byte) (int, error) { return f.rx.Recv(p) }

func (f *udpFlow) setDeadline(t time.Time) error {
	return errors.Join(f.tx.SetDeadline(t), f.rx.SetDeadline(t))
}
