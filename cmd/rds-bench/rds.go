package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// rdsOptions are what both sides' Services are opened with.
type rdsOptions struct {
	Dialect string `json:"dialect"`
	Port    uint16 `json:"port"` // UDP port of RoCEv2
	// Audit has closing fail if it leaves goroutines behind. The Service looks after all else itself, always.
	Audit bool `json:"audit,omitempty"`
}

func (o rdsOptions) validate() error {
	if o.Dialect != dialectOpen && o.Dialect != dialectKernel {
		return fmt.Errorf("--dialect: %q is neither %s nor %s", o.Dialect, dialectKernel, dialectOpen)
	}
	if o.Port == 0 {
		return errors.New("--roce-port: 0 is not a port")
	}
	return nil
}

// rdsTransport is what this command is about. One Service carries all runs of a session, one socket per
// flow is bound for each.
type rdsTransport struct {
	svc      *rds.Service
	provider *softroce.Provider // ours, so that devices can be removed
	debug    *rdsdebug.Server   // nil: there is no place for its socket
	before   []goleak.Option    // the goroutines before the Service; nil: no audit
}

func openRDS(o rdsOptions, log hclog.Logger) (transport, error) {
	t := &rdsTransport{provider: softroce.New(softroce.Config{Port: o.Port, Logger: log.Named("softroce")})}
	if o.Audit {
		t.before = []goleak.Option{goleak.IgnoreCurrent()}
	}
	cfg := rds.Config{Providers: []verbs.Provider{t.provider}, Logger: log}
	if o.Dialect == dialectKernel {
		cfg.Dialect = rds.DialectKernelOnly
	}
	var err error
	if t.svc, err = rds.Open(cfg); err != nil {
		return nil, err
	}
	// For rdsctl. Whoever may not have the socket measures all the same.
	if t.debug, err = rdsdebug.Listen(t.svc); err != nil {
		log.Debug("rdsctl will not see this process", "error", err)
	}
	return t, nil
}

// settleTimeout bounds the wait for acknowledgements when all is over; a connection that has just lost its device needs a moment.
const settleTimeout = 20 * time.Second

// settle implements settler. A run's last datagrams have arrived, else it would not be over, but a connection that broke then has
// to be made again before their acknowledgements are here.
func (t *rdsTransport) settle() {
	for end := time.Now().Add(settleTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		waiting := 0
		for _, c := range t.svc.Info(rds.InfoConnections).Connections {
			waiting += c.QueuedMsgs
		}
		if waiting == 0 {
			return
		}
	}
}

func (t *rdsTransport) close() error {
	var errs []error
	if t.debug != nil {
		errs = append(errs, t.debug.Close())
	}
	errs = append(errs, t.svc.Close())
	if t.before != nil {
		if err := goleak.Find(t.before...); err != nil {
			errs = append(errs, fmt.Errorf("after closing: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (t *rdsTransport) open(ctx context.Context, cfg endpointConfig) (endpoint, error) {
	ep := &rdsEndpoint{t: t, local: cfg.local}
	for range cfg.flows {
		s, err := t.svc.ListenAddrPort(ctx, netip.AddrPortFrom(cfg.local, 0))
		if err != nil {
			return nil, errors.Join(err, ep.close())
		}
		ep.socks = append(ep.socks, s)
	}
	return ep, nil
}

type rdsEndpoint struct {
	t     *rdsTransport
	local netip.Addr
	socks []*rds.Socket // by flow

	mu         sync.Mutex
	gone, last counters // of devices that have gone, which take theirs with them, and of those there are; guarded by mu
}

// devicesLocked is what all devices of this endpoint have counted, now being what those do that are there. One whose link went down was lost without
// our doing, with what it had counted since we last looked.
func (e *rdsEndpoint) devicesLocked(now counters) counters {
	if now.retransmits < e.last.retransmits || now.drops < e.last.drops {
		e.gone.retransmits += e.last.retransmits
		e.gone.drops += e.last.drops
	}
	e.last = now
	return counters{retransmits: e.gone.retransmits + now.retransmits, drops: e.gone.drops + now.drops}
}

// goneTimeout bounds how long a removed device may stay in sight. It takes microseconds.
const goneTimeout = 5 * time.Second

// unplug and plug implement pluggable.
func (e *rdsEndpoint) unplug() error {
	e.mu.Lock() // whoever counts meanwhile would count the device twice, or not at all
	defer e.mu.Unlock()
	e.devicesLocked(deviceCounters(e.t.svc.Stats().Devices))
	if err := e.t.provider.Remove(e.local); err != nil {
		return err
	}
	for deadline := time.Now().Add(goneTimeout); len(e.t.svc.Stats().Devices) > 0; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the device of %v is still there %v after its removal", e.local, goneTimeout)
		}
	}
	e.devicesLocked(counters{})
	return nil
}

func (e *rdsEndpoint) plug() error { return e.t.provider.Add(e.local) }

func deviceCounters(devices map[string]map[string]uint64) counters {
	var n counters
	for _, dev := range devices {
		n.retransmits += dev["retransmits"]
		n.drops += dev["rx_socket_drops"] + dev["rx_malformed"] + dev["rx_bad_icrc"] + dev["rx_bad_df"]
	}
	return n
}

func (e *rdsEndpoint) addrs() []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range e.socks {
		out = append(out, s.AddrPort())
	}
	return out
}

// connect has nothing to do but to remember: the first datagram makes the connection.
func (e *rdsEndpoint) connect(_ context.Context, peers []netip.AddrPort) ([]flow, error) {
	if len(peers) != len(e.socks) {
		return nil, fmt.Errorf("rds: %d peers for %d sockets", len(peers), len(e.socks))
	}
	var flows []flow
	for i, s := range e.socks {
		flows = append(flows, &rdsFlow{sock: s, peer: peers[i]})
	}
	return flows, nil
}

// counters are of the whole Service, of which this run is the only user.
func (e *rdsEndpoint) counters() counters {
	e.mu.Lock()
	defer e.mu.Unlock()
	st := e.t.svc.Stats()
	dev := e.devicesLocked(deviceCounters(st.Devices))
	return counters{
		retransmits: dev.retransmits + st.Conn.SendRetransmit,
		drops:       dev.drops + st.RecvDropNoSock + st.RecvDropDeadSock + st.Conn.RecvDropBadChecksum,
	}
}

func (e *rdsEndpoint) close() error {
	var errs []error
	for _, s := range e.socks {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

type rdsFlow struct {
	sock *rds.Socket
	peer netip.AddrPort
	out  []byte
}

func (f *rdsFlow) buffer(size int) []byte {
	if len(f.out) < size {
		f.out = make([]byte, size)
	}
	return f.out[:size]
}

func (f *rdsFlow) send(n int, _ bool) error {
	_, err := f.sock.WriteToAddrPort(f.out[:n], f.peer)
	return err
}

func (f *rdsFlow) recv(p []byte) (int, error) {
	n, from, err := f.sock.ReadFromAddrPort(p)
	if err == nil && from != f.peer {
		err = fmt.Errorf("a datagram from %v instead of %v", from, f.peer)
	}
	return n, err
}

func (f *rdsFlow) setDeadline(t time.Time) error { return f.sock.SetDeadline(t) }
