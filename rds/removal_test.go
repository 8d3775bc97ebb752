package rds

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// openRemovable is a Service on net whose devices can be removed by hand.
func openRemovable(t testing.TB, net *simnet.Net) (*Service, *softroce.Provider) {
	t.Helper()
	p := softroce.New(softroce.Config{Network: net})
	svc, err := Open(Config{Providers: []verbs.Provider{p}})
	if err != nil {
		t.Fatal(err)
	}
	return svc, p
}

// TestSocketsOutliveDevices: what a socket has and does while its device is gone.
func TestSocketsOutliveDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})
		svc, prov := openRemovable(t, net)
		other := openSim(t, net, Config{})
		ctx := context.Background()
		a, err := svc.ListenPacket(ctx, "10.0.0.1:4000")
		if err != nil {
			t.Fatal(err)
		}
		b, err := other.ListenPacket(ctx, "10.0.0.2:4000")
		if err != nil {
			t.Fatal(err)
		}
		addrA, addrB := a.AddrPort(), b.AddrPort()
		big := make([]byte, 64<<10)
		big[0], big[len(big)-1] = 1, 2
		if _, err := b.WriteToAddrPort(big, addrA); err != nil {
			t.Fatal(err)
		}
		lent, err := a.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.WriteToAddrPort(big, addrA); err != nil { // stays in the receive queue
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := prov.Remove(addrA.Addr()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)

		// What was received is there, lent or queued; the device did not wait for it.
		if n := len(svc.Stats().Devices); n != 0 {
			t.Errorf("%d devices", n)
		}
		if p := lent.Bytes(); len(p) != len(big) || p[0] != 1 || p[len(p)-1] != 2 {
			t.Error("a lent message changed when its device went")
		}
		a.SetReadDeadline(time.Now().Add(time.Second))
		if n, _, err := a.ReadFromAddrPort(make([]byte, len(big))); n != len(big) || err != nil {
			t.Errorf("a queued message: %d bytes, %v", n, err)
		}
		if _, _, err := a.ReadFromAddrPort(big); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("reading from nobody: %v", err)
		}
		// Writes are taken until the send buffer is full, and then wait their time.
		a.SetWriteDeadline(time.Now().Add(time.Second))
		written := 0
		for ; ; written++ {
			if _, err = a.WriteToAddrPort(big, addrB); err != nil {
				break
			}
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, ErrNoBufferSpace) || written*len(big) < DefaultBuffer/2 {
			t.Errorf("after %d writes: %v", written, err)
		}
		// Another socket binds: the address is still this Service's. A socket at an address that was never there does not.
		if s, err := svc.ListenPacket(ctx, "10.0.0.1:4001"); err != nil {
			t.Errorf("binding at an address without its device: %v", err)
		} else if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := prov.Remove(netip.MustParseAddr("10.0.0.9")); err != nil {
			t.Fatal(err)
		}
		if _, err := svc.ListenPacket(ctx, "10.0.0.9:4000"); !errors.Is(err, ErrAddrNotAvailable) {
			t.Errorf("binding at an address that is not there: %v", err)
		}
		// With a transport chosen it is that transport that does not have the address (rds-protocol spec 1.2).
		pinned := ListenConfig{Service: svc, Transport: TransportIB}
		if _, err := pinned.Bind(ctx, netip.MustParseAddrPort("10.0.0.9:4000")); !errors.Is(err, ErrNoTransport) || !errors.Is(err, syscall.ENOPROTOOPT) || errors.Is(err, ErrAddrNotAvailable) {
			t.Errorf("binding there with a transport chosen: %v", err)
		}
		if s, err := pinned.Bind(ctx, netip.MustParseAddrPort("10.0.0.1:4002")); err != nil || s.Transport() != TransportIB {
			t.Errorf("binding with the right transport: %v", err)
		} else {
			s.Close()
		}

		// A write that waits goes on when the device is back, and so does everything else.
		a.SetWriteDeadline(time.Time{})
		waiting := make(chan error)
		go func() {
			_, err := a.WriteToAddrPort(big, addrB)
			waiting <- err
		}()
		time.Sleep(time.Hour)
		if err := prov.Add(addrA.Addr()); err != nil {
			t.Fatal(err)
		}
		b.SetReadDeadline(time.Now().Add(time.Minute))
		for i := range written + 1 {
			if n, from, err := b.ReadFromAddrPort(make([]byte, len(big))); n != len(big) || from != addrA || err != nil {
				t.Fatalf("datagram %d: %d bytes from %v, %v", i, n, from, err)
			}
		}
		if err := <-waiting; err != nil {
			t.Errorf("the write that waited: %v", err)
		}
		lent.Release()
		if c := svc.Stats().Conn; c.DevicesLost != 1 || c.DevicesBack != 1 || c.PeersDown != 0 {
			t.Errorf("devices lost %d, back %d, peers down %d", c.DevicesLost, c.DevicesBack, c.PeersDown)
		}
		// Closing without a device leaves nothing.
		time.Sleep(time.Second)
		if err := prov.Remove(addrA.Addr()); err != nil {
			t.Fatal(err)
		}
		closeService(t, svc)
		closeService(t, other)
	})
}
