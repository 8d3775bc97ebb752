package rds

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/epoch"
	"github.com/openrds/openrds/internal/slab"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// teardownBound is how long Close waits for devices after the last connection is gone; longer means a leaked
// reference, or a reader of the epoch that stays inside, which the error names.
const teardownBound = 10 * time.Second

// stack is the transport of a Service: everything below the sockets, built here and taken down
// here.
type stack struct {
	providers []verbs.Provider
	mgr       *conn.Manager
	reg       *ibdev.Registry
	slab      *slab.Slab
	epoch     *epoch.Domain
}

func openTransport(cfg *Config, k conn.Sink) (transport, error) {
	log := cfg.Logger.Named("epoch")
	st := &stack{epoch: epoch.Config{OnStall: func(s epoch.Stall) {
		log.Error("memory waits for a reader that stays inside", "reader", s.Participant, "for", s.Inside, "waiting", s.Pending, "stacks", s.Stacks)
	}}.NewDomain()}
	var err error
	if st.slab, err = slab.New(slab.Config{MaxBytes: cfg.MaxSlabBytes, Name: "rds"}); err != nil {
		return nil, errors.Join(err, st.epoch.Close())
	}
	providers := cfg.Providers
	if len(providers) == 0 {
		providers = []verbs.Provider{softroce.New(softroce.Config{
			Network: cfg.Network, Port: cfg.UDPPort, Epoch: st.epoch, Logger: cfg.Logger.Named("softroce"),
		})}
	}
	// Half of the memory is for what waits to be sent, three eighths for what is received: neither may take what the
	// other, or a new connection, needs.
	st.reg = ibdev.NewRegistry(ibdev.Config{
		Providers: providers, Slab: st.slab, Epoch: st.epoch, Logger: cfg.Logger.Named("ibdev"),
		RecvMemory: cfg.MaxSlabBytes / 8 * 3, // 0 with the slab's own default
		Pools:      cfg.MemoryPools,
	})
	cc := cfg.Conn
	cc.SendMemory = cfg.MaxSlabBytes / 2
	cc.Registry, cc.Slab, cc.Epoch, cc.Sink = st.reg, st.slab, st.epoch, k
	cc.Logger, cc.Dialect = cfg.Logger.Named("conn"), cfg.Dialect
	st.mgr = conn.NewManager(cc)
	st.providers = providers
	return st, nil
}

func (st *stack) Listen(local netip.Addr) error { return st.mgr.Listen(local) }

func (st *stack) Get(local, remote netip.Addr, tos uint8) (link, error) {
	c, err := st.mgr.Get(local, remote, tos)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (st *stack) Register(ctx context.Context, local netip.Addr, mem []byte, paged verbs.PagedMemory, iova uint64, access verbs.Access) (*conn.Mapping, error) {
	if paged != nil {
		return st.mgr.RegisterPaged(ctx, local, paged, iova, access)
	}
	return st.mgr.Register(ctx, local, mem, iova, access)
}

func (st *stack) Reserve(n int) (*conn.Buffer, error) { return st.mgr.Reserve(n) }
func (st *stack) TraceReceive(on bool)                { st.mgr.TraceReceive(on) }

func (st *stack) StartFlush(local netip.Addr) {
	if d := st.reg.Get(local); d != nil {
		d.Pools().StartFlush()
		d.Put()
	}
}

func (st *stack) FlushMemory(ctx context.Context) error { return st.mgr.FlushMemory(ctx) }

func (st *stack) SetCongested(local netip.Addr, port uint16, on bool) {
	st.mgr.SetCongested(local, port, on)
}

func (st *stack) Progress() bool { return st.mgr.Progress() }
func (st *stack) Park()          { st.mgr.Park() }

func (st *stack) Providers() []verbs.Provider { return st.providers }

func (st *stack) Conns() []*conn.Conn { return st.mgr.Conns() }

func (st *stack) Stats() (conn.Stats, []ibdev.DeviceStats) {
	var devs []ibdev.DeviceStats
	for _, d := range st.reg.Devices() {
		devs = append(devs, d.Stats())
	}
	return st.mgr.Stats(), devs
}

// Close takes everything down in the order in which it was built, backwards. Each step ends what uses the next.
func (st *stack) Close(ctx context.Context) (int, error) {
	n, err := st.mgr.Close(ctx)
	ctx, cancel := context.WithTimeout(context.Background(), teardownBound)
	defer cancel()
	return n, errors.Join(err, st.reg.Close(ctx), st.epoch.CloseUntil(ctx.Done()), st.slab.Close())
}
