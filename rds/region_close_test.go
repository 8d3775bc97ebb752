package rds

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

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
