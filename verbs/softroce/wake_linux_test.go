package softroce

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// TestUDPWakeAgainstClose: a Wake that comes too late does not write to what has the descriptor's number by then.
func TestUDPWakeAgainstClose(t *testing.T) {
	for i := range 20000 {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		c := &udpConn{fd: -1, ep: -1, timer: -1, evfd: fd}
		var wg sync.WaitGroup
		wg.Go(c.Wake)
		c.Close()
		heir, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		var b [8]byte
		n, _ := unix.Read(heir, b[:])
		unix.Close(heir)
		if n > 0 {
			t.Fatalf("try %d: a stranger's descriptor was written to", i)
		}
	}
}

// TestArmWhileFull: who has polled, and goes to sleep, finds the engine about to wait for a full socket. It still hears that there is room.
func TestArmWhileFull(t *testing.T) {
	pc, err := udpNetwork{}.Listen(netip.MustParseAddrPort("127.0.0.73:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c := pc.(*udpConn)
	// A socket that is full until its other end is read.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(c.fd)
	c.fd = fds[0]
	defer unix.Close(fds[1])
	if err := unix.EpollCtl(c.ep, unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(c.fd)}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; unix.Send(c.fd, make([]byte, 4096), 0) == nil; n++ {
	}
	done := make(chan error, 1)
	go func() { done <- c.Wait(time.Time{}, true) }()
	time.Sleep(20 * time.Millisecond) // it waits
	c.Arm()
	for range n {
		if _, err := unix.Read(fds[1], make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("there is room, and nobody knows")
		c.Wake()
		<-done
	}
}
