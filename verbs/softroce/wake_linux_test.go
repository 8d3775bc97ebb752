package softroce

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// No Wake is lost, however it falls between those of others and the end of a Wait: after any number of them at once, one more
// is heard.
func TestUDPWake(t *testing.T) {
	c, err := udpNetwork{}.Listen(netip.MustParseAddrPort("127.0.0.72:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var said, heard atomic.Uint64
	var over atomic.Bool
	done := make(chan error, 1)
	go func() {
		for !over.Load() {
			if err := c.Wait(time.Time{}, false); err != nil {
				done <- err
				return
			}
			heard.Store(said.Load())
		}
		done <- nil
	}()
	for word := uint64(1); word <= 1000; word++ {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for range 300 {
					c.Wake()
				}
			})
		}
		wg.Wait()
		said.Store(word)
		c.Wake()
		for end := time.Now().Add(5 * time.Second); heard.Load() < word; {
			if time.Now().After(end) {
				t.Fatalf("word %d was not heard", word)
			}
		}
	}
	over.Store(true)
	c.Wake()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
