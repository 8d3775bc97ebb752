package rds

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/internal/simnet"
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
