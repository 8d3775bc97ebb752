package rds

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Who registers memory for a peer that cannot be reached waits for the connection, and no longer than the socket is
// open.
func TestRegisterForEndsWithClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		svc := openSim(t, simnet.New(1, simnet.Config{}), Config{Linger: -1})
		defer svc.Close()
		s := bind(t, svc, ap(addrA, 4000))
		nobody := netip.MustParseAddrPort("10.0.0.99:7000")
		errs := make(chan error, 2)
		go func() {
			_, err := s.RegisterRegionFor(context.Background(), nobody, make([]byte, 100), RegionOptions{})
			errs <- err
		}()
		go func() {
			_, err := s.SendMapped(context.Background(), Message{Peer: nobody}, make([]byte, 100), RegionOptions{})
			errs <- err
		}()
		time.Sleep(time.Minute)
		select {
		case err := <-errs:
			t.Fatalf("before the close: %v", err)
		default:
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := <-errs; !errors.Is(err, ErrClosed) {
				t.Errorf("after it: %v", err)
			}
		}
	})
}

// TestCloseFlushesRegions: the memory of regions that wait for company comes back when their socket closes, also of one that an
// operation is still at work on then.
func TestCloseFlushesRegions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newRDMAPair(t, "open", Config{})
		mem := mustRegister(t, p.client, 64<<10, RegionOptions{})
		first, err := p.server.RegisterRegionFor(bg(), p.client.AddrPort(), make([]byte, 100), RegionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		second, busy := mustRegister(t, p.server, 100, RegionOptions{}), mustRegister(t, p.server, mem.Len(), RegionOptions{})
		first.Close()
		second.Close()
		time.Sleep(time.Hour)
		if isDone(first) || isDone(second) {
			t.Error("regions were given back without a reason")
		}
		mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMARead, Local: []Piece{busy.Piece(0, busy.Len())}, Remote: mem.Cookie()}})
		busy.Close()
		if err := p.server.Close(); err != nil {
			t.Fatal(err)
		}
		if isDone(busy) {
			t.Error("a region was given back under an operation")
		}
		time.Sleep(time.Second)
		for i, r := range []*Region{first, second, busy} {
			if !isDone(r) {
				t.Errorf("region %d is pinned after its socket was closed", i)
			}
		}
		p.close(t)
	})
}

// TestCloseWithStalledReader: a reader of the epoch that stays inside is reported, and keeps memory, but not Close.
func TestCloseWithStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		svc := openSim(t, simnet.ForTest(t, 1, simnet.Config{}), Config{Logger: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Error})})
		s := bind(t, svc, ap(addrA, 4000))
		r := mustRegister(t, s, 100, RegionOptions{})
		d := svc.tr.(*stack).epoch
		reader := d.Register("stuck")
		leave, left := make(chan struct{}), make(chan struct{})
		go func() {
			reader.Enter()
			<-leave
			reader.Exit()
			reader.Unregister()
			close(left)
		}()
		synctest.Wait()
		begin := time.Now()
		err := svc.Close()
		if took := time.Since(begin); took > teardownBound+time.Second {
			t.Errorf("Close took %v", took)
		}
		if err == nil || !strings.Contains(err.Error(), "stuck") || isDone(r) {
			t.Errorf("Close: %v; region given back: %v", err, isDone(r))
		}
		time.Sleep(time.Minute)
		close(leave)
		<-left
		time.Sleep(time.Second) // what waited for it ends: the bubble would miss it
		if !isDone(r) {
			t.Error("the region was not given back when the reader had left")
		}
		if !strings.Contains(log.String(), "reader=stuck") || !strings.Contains(log.String(), "TestCloseWithStalledReader") {
			t.Errorf("log: %s", log.String())
		}
	})
}

// A write deadline ends a SendMapped whatever it waits for, and says what that was; so does Close.
func TestSendMappedDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		svc := openSim(t, simnet.New(1, simnet.Config{}), Config{Linger: -1, MemoryPools: ibdev.PoolConfig{Small: mrpool.PoolConfig{MaxItems: 1}}})
		defer svc.Close()
		s, local := bind(t, svc, ap(addrA, 4000)), bind(t, svc, ap(addrA, 4001))
		nobody := netip.MustParseAddrPort("10.0.0.99:7000")
		send := func(to netip.AddrPort) error {
			_, err := s.SendMapped(t.Context(), Message{Peer: to}, make([]byte, 100), RegionOptions{})
			return err
		}
		// For the connection: moved while somebody waits.
		errs := make(chan error)
		s.SetWriteDeadline(time.Now().Add(time.Second))
		go func() { errs <- send(nobody) }()
		time.Sleep(time.Second / 2)
		start := time.Now()
		s.SetWriteDeadline(start.Add(time.Minute))
		err := <-errs
		wantTimeout(t, err, ErrNotReady)
		if d := time.Since(start); d != time.Minute || !errors.Is(err, syscall.ETIMEDOUT) || !errors.Is(err, syscall.EAGAIN) {
			t.Errorf("%v after %v", err, d)
		}
		wantTimeout(t, send(nobody), nil) // at once
		s.SetWriteDeadline(time.Time{})
		// Into the past under who waits.
		go func() { errs <- send(nobody) }()
		time.Sleep(time.Minute)
		s.SetWriteDeadline(time.Unix(1, 0))
		wantTimeout(t, <-errs, ErrNotReady)
		s.SetWriteDeadline(time.Time{})
		// A read deadline is none of its business.
		go func() { errs <- send(nobody) }()
		s.SetReadDeadline(time.Unix(1, 0))
		time.Sleep(time.Minute)
		select {
		case err := <-errs:
			t.Fatalf("the read deadline: %v", err)
		default:
		}
		s.SetWriteDeadline(time.Unix(1, 0))
		wantTimeout(t, <-errs, ErrNotReady)
		s.SetWriteDeadline(time.Time{})

		// For a region.
		r := mustRegister(t, local, 100, RegionOptions{})
		s.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		start = time.Now()
		wantTimeout(t, send(local.AddrPort()), ErrPoolExhausted)
		if d := time.Since(start); d != 100*time.Millisecond {
			t.Errorf("waited %v for a region", d)
		}
		s.SetWriteDeadline(time.Time{})
		for _, f := range []func() error{
			func() error { return send(local.AddrPort()) },
			func() error { _, err := s.RegisterRegion(t.Context(), make([]byte, 100), RegionOptions{}); return err },
		} {
			go func() { errs <- f() }()
		}
		time.Sleep(100 * time.Millisecond)
		start = time.Now()
		s.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, ErrClosed) || time.Since(start) != 0 {
				t.Errorf("Close under who waits for a region: %v after %v", err, time.Since(start))
			}
		}
		r.Close()
		if n := len(s.wdl.calls); n != 0 {
			t.Errorf("%d calls are still entered", n)
		}
	})
}

// A write that Close overtakes says so, and not that its region is gone, which Close has freed.
func TestCloseUnderWriteWithRegion(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		s, to := p.client, p.server.AddrPort()
		r := mustRegister(t, s, 100, RegionOptions{})
		f, err := s.route(to, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		for _, m := range []Message{
			{Peer: to, Cookie: r.Cookie()},
			{Peer: to, RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{r.Piece(0, 8)}, Remote: 1}},
		} {
			if err := s.sendExtra(bg(), &m, &item{f: f, port: to.Port()}, to, true); err != ErrClosed {
				t.Errorf("a write with cookie %v that was overtaken by Close: %v", m.Cookie, err)
			}
		}
	})
}

// cutLink loses its connection between a mapping, whose request has not been executed by then, and the message that is to tell of it.
type cutLink struct {
	link
	times       int
	before, cut func()
}

func (l *cutLink) Map(ctx context.Context, mem []byte, iova uint64, access verbs.Access, wait bool) (*conn.Mapping, error) {
	now := l.times > 0
	if now {
		l.before()
	}
	m, err := l.link.Map(ctx, mem, iova, access, wait)
	if now {
		l.cut()
		l.times--
	}
	return m, err
}

// A key that is lost with its connection before its message has gone is none of SendMapped's caller's doing: it maps again.
func TestSendMappedOverLostConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newRDMAPair(t, "open", Config{})
		defer p.close(t)
		to := p.server.AddrPort()
		mustWrite(t, p.client, []byte("hello"), to)
		mustReceive(t, p.server)
		d, err := p.client.la.dest(to.Addr(), 0)
		if err != nil {
			t.Fatal(err)
		}
		const ahead = 300 // more than are under way at once
		cut := &cutLink{link: d.link, before: func() {
			p.net.Partition(addrA, addrB)
			for range ahead {
				mustWrite(t, p.client, make([]byte, 10_000), to)
			}
		}, cut: func() {
			time.Sleep(time.Minute)
			p.net.Heal(addrA, addrB)
			for range ahead {
				mustReceive(t, p.server)
			}
		}}
		d.link = cut

		cut.times = 1
		r, err := p.client.SendMapped(bg(), Message{Peer: to, Data: []byte("mapped")}, make([]byte, 100), RegionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if m := mustReceive(t, p.server); string(m.Data) != "mapped" || m.Cookie != r.Cookie() || r.Err() != nil {
			t.Errorf("%q with cookie %v, and the region is %v: %v", m.Data, m.Cookie, r.Cookie(), r.Err())
		}
		r.Close()

		cut.times = 1
		if _, err := p.client.TrySendMapped(Message{Peer: to}, make([]byte, 100), RegionOptions{}); !errors.Is(err, ErrNotReady) || errors.Is(err, ErrStaleCookie) {
			t.Errorf("without waiting: %v", err)
		}
	})
}
