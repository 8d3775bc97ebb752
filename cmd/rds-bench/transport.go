package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/hashicorp/go-hclog"
)

// maxMessageBytes is the largest datagram: RDS's own limit, kept for the baselines too.
const maxMessageBytes = 1 << 20

// A transport opens one process's end of runs. The measuring code knows nothing else about RDS, TCP,
// UDP and QUIC. It lives as long as the session of a client with a server, its endpoints as long as a run.
type transport interface {
	// open makes ready for one run at cfg.local.
	open(ctx context.Context, cfg endpointConfig) (endpoint, error)
	close() error
}

// endpointConfig is what an endpoint needs to know of its run.
type endpointConfig struct {
	local  netip.Addr
	flows  int
	active bool   // the client's side
	token  uint64 // the same on both sides, another for each run
}

// An endpoint is one process's end of a run: a number of flows to the same peer.
type endpoint interface {
	// addrs is where the peer reaches this endpoint: one address per flow, or a single one.
	addrs() []netip.AddrPort
	// connect returns the flows; flow i of one side is flow i of the other. peers is the other side's
	// addrs. Both sides call it at the same time.
	connect(ctx context.Context, peers []netip.AddrPort) ([]flow, error)
	// counters are running totals of this side since open.
	counters() counters
	// close closes the flows too. Whoever is blocked in one returns with an error.
	close() error
}

// counters are what a transport counted on one side.
type counters struct {
	retransmits uint64 // packets, segments or messages sent again
	drops       uint64 // packets that arrived and were not accepted, or found no room
}

// A flow carries datagrams of up to maxMessageBytes to its peer flow and back: whole, in order,
// once. One goroutine may send while another one receives.
type flow interface {
	// buffer returns memory for the payload of a datagram of up to size bytes. It is the flow's: every
	// send takes its payload from there, which lets TCP put a header before it without a
	// copy that a real user of TCP would not make.
	buffer(size int) []byte
	// send sends the first n bytes of buffer, blocking while the transport has no room. more says
	// that another send follows at once, so this one may wait for it.
	send(n int, more bool) error
	// recv copies the next datagram to p and returns its length.
	recv(p []byte) (int, error)
	// setDeadline bounds sends and receives; the zero time takes the bound away.
	setDeadline(t time.Time) error
}

// openTransport makes the transport called name.
type openTransport func(name string, o rdsOptions) (transport, error)

// transportOpener is the openTransport of the command. log is for the Service of RDS.
func transportOpener(log hclog.Logger) openTransport {
	return func(name string, o rdsOptions) (transport, error) {
		switch name {
		case transportRDS:
			return openRDS(o, log)
		case transportTCP:
			return tcpTransport{}, nil
		case transportUDP:
			return udpTransport{}, nil
		case transportQUIC:
			return newQUIC()
		}
		return nil, fmt.Errorf("unknown transport %q", name)
	}
}

// transports are a session's transports, opened when first used.
type transports struct {
	openTransport openTransport
	local         netip.Addr
	rds           rdsOptions
	opened        map[string]transport
}

func newTransports(open openTransport, local netip.Addr, o rdsOptions) *transports {
	return &transports{openTransport: open, local: local, rds: o, opened: make(map[string]transport)}
}

// endpoint opens one side's end of a run.
func (t *transports) endpoint(ctx context.Context, s spec, active bool) (endpoint, error) {
	tr := t.opened[s.Transport]
	if tr == nil {
		var err error
		if tr, err = t.openTransport(s.Transport, t.rds); err != nil {
			return nil, err
		}
		t.opened[s.Transport] = tr
	}
	return tr.open(ctx, endpointConfig{local: t.local, flows: s.Sockets, active: active, token: s.Token})
}

// settler is a transport that still has something to give to its peer when a run is over.
type settler interface{ settle() }

// settle waits until the peers have all of it, or it is plain that they do not get it. They have to be there still.
func (t *transports) settle() {
	for _, tr := range t.opened {
		if s, ok := tr.(settler); ok {
			s.settle()
		}
	}
}

// close closes them; nil the second time.
func (t *transports) close() error {
	var errs []error
	for _, tr := range t.opened {
		errs = append(errs, tr.close())
	}
	clear(t.opened)
	return errors.Join(errs...)
}
