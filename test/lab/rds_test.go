//go:build lab && linux

package lab

import (
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// service is our end of RDS: a Service with its default softroce device, gone when t ends.
func service(t testing.TB) *rds.Service {
	t.Helper()
	svc, err := rds.Open(rds.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, c := range svc.Stats().Counters() {
				if c.Value != 0 {
					t.Logf("ours: %s %d", c.Name, c.Value)
				}
			}
		}
		if err := svc.Close(); err != nil {
			t.Error(err)
		}
	})
	return svc
}

// freshHost gives the host one more address of the family. To the guest's kernel it is a peer it has never
// heard of: what it remembers of others (sequences, congestion, a REQ it has sent into the void and waits 6 s
// for before it sends it again) does not concern the test.
func freshHost(t testing.TB, g *Guest, f family) family {
	t.Helper()
	f.host = g.AddHostAddr(t, netip.MustParseAddr(f.host)).String()
	// Its link address is known, though: rdma_cm, when it has to ask, does not notice the answer before 5 s have passed.
	g.Run(t, "busybox", "ping", "-q", "-c1", "-W5", f.host)
	return f
}

func listen(t testing.TB, svc *rds.Service, at netip.AddrPort) *rds.Socket {
	t.Helper()
	s, err := svc.ListenAddrPort(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func setTOS(t testing.TB, s *rds.Socket, tos uint8) {
	t.Helper()
	if err := s.SetTypeOfService(tos); err != nil {
		t.Fatal(err)
	}
}

// sizesRDS are lengths around every boundary of the protocol, up to the maximum.
var sizesRDS = []int{0, 1, 5, 47, 48, 100, 1023, 1024, 4047, 4048, 4095, 4096, 4097, 8191, 8192, 8193, 61392, 65536, 100001, 1<<20 - 1, 1 << 20}

func sum(n int, seed uint32) uint32 {
	b := make([]byte, n)
	pattern(b, seed)
	return crc(b)
}

func crc(b []byte) uint32 { return crc32.ChecksumIEEE(b) }

// sendOurs sends the datagrams that KernelRDS.Send would.
func sendOurs(s *rds.Socket, to netip.AddrPort, seed uint32, sizes []int) error {
	buf := make([]byte, 1<<20)
	for i, n := range sizes {
		pattern(buf[:n], seed+uint32(i))
		if _, err := s.WriteToAddrPort(buf[:n], to); err != nil {
			return fmt.Errorf("datagram %d of %d bytes: %w", i, n, err)
		}
	}
	return nil
}

// recvOurs receives len(sizes) datagrams and compares them with what KernelRDS.Send sent.
func recvOurs(s *rds.Socket, from netip.AddrPort, seed uint32, sizes []int) error {
	buf := make([]byte, 1<<20)
	for i, n := range sizes {
		_ = s.SetReadDeadline(time.Now().Add(stepLimit))
		got, peer, err := s.ReadFromAddrPort(buf)
		if err != nil {
			return fmt.Errorf("datagram %d of %d bytes: %w", i, n, err)
		}
		if peer != from || got != n {
			return fmt.Errorf("datagram %d has %d bytes from %v, want %d from %v", i, got, peer, n, from)
		}
		if err := checkPattern(buf[:n], seed+uint32(i)); err != nil {
			return fmt.Errorf("datagram %d of %d bytes: %w", i, n, err)
		}
	}
	return nil
}

// checkDatagrams compares what the kernel received with what sendOurs sent.
func checkDatagrams(got []Datagram, from netip.AddrPort, seed uint32, sizes []int) error {
	for i, n := range sizes {
		if i >= len(got) {
			return fmt.Errorf("the kernel received %d datagrams, want %d", len(got), len(sizes))
		}
		want := Datagram{From: from, Len: n, Sum: sum(n, seed+uint32(i))}
		if got[i] != want {
			return fmt.Errorf("the kernel's datagram %d is %+v, want %+v", i, got[i], want)
		}
	}
	if len(got) > len(sizes) {
		return fmt.Errorf("the kernel received %d datagrams, want %d", len(got), len(sizes))
	}
	return nil
}

// eventually waits until ok says so.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(stepLimit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within %v: %s", stepLimit, what)
}

// exchange sends sizes both ways at once and checks what arrives.
func exchange(t testing.TB, s *rds.Socket, k *kernelEnd, ks Opened, sizes []int) {
	t.Helper()
	const seedOurs, seedKernel = 1000, 2000
	type kres struct {
		got  []Datagram
		sent Sent
		err  error
	}
	recv, send, ours := make(chan kres, 1), make(chan kres, 1), make(chan error, 1)
	go func() {
		var r kres
		r.err = k.call("Recv", RecvArgs{ID: ks.ID, Count: len(sizes), Limit: stepLimit}, &r.got)
		recv <- r
	}()
	go func() {
		var r kres
		r.err = k.call("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: seedKernel, Sizes: sizes}, &r.sent)
		send <- r
	}()
	go func() { ours <- sendOurs(s, ks.Local, seedOurs, sizes) }()
	if err := recvOurs(s, ks.Local, seedKernel, sizes); err != nil {
		t.Errorf("from the kernel: %v", err)
	}
	if err := <-ours; err != nil {
		t.Errorf("to the kernel: %v", err)
	}
	if r := <-send; r.err != nil || r.sent.N != len(sizes) {
		t.Errorf("the kernel sent %d of %d (%v, %v)", r.sent.N, len(sizes), r.sent.Errno, r.err)
	}
	r := <-recv
	if r.err == nil {
		r.err = checkDatagrams(r.got, s.AddrPort(), seedOurs, sizes)
	}
	if r.err != nil {
		t.Error(r.err)
	}
}

// drained checks that both sides get rid of what they sent.
func drained(t testing.TB, s *rds.Socket, k *kernelEnd) {
	t.Helper()
	eventually(t, "our messages are acknowledged", func() bool { n, _ := s.Unacknowledged(); return n == 0 })
	eventually(t, "the kernel's queues drain", func() bool { return k.queued(s.AddrPort().Addr()) == 0 })
}

// TestRDS exchanges datagrams with the kernel's RDS over connections made by either side and both.
func TestRDS(t *testing.T) {
	for _, f := range []family{ipv4, ipv6} {
		for _, mtu := range []int{4500, 1500} {
			t.Run(fmt.Sprintf("%s/mtu=%d", f.name, mtu), func(t *testing.T) {
				g := guest(t, mtu)
				f := freshHost(t, g, f)
				k := newKernelEnd(t, g)
				ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
				svc := service(t)
				s := listen(t, svc, addrPort(f.host, 4001))
				start := time.Now()
				if err := sendOurs(s, ks.Local, 7, []int{5}); err != nil {
					t.Fatal(err)
				}
				var got []Datagram
				k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: stepLimit}, &got)
				if err := checkDatagrams(got, s.AddrPort(), 7, []int{5}); err != nil {
					t.Fatal(err)
				}
				t.Logf("first datagram after %v", time.Since(start).Round(time.Millisecond))
				exchange(t, s, k, ks, sizesRDS)
				drained(t, s, k)
			})
		}
	}
}

// TestRDSKernelConnects lets the kernel have the first word.
func TestRDSKernelConnects(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	s := listen(t, svc, addrPort(f.host, 4002))
	setTOS(t, s, 40)
	// A type of service that was not used before is a connection that was not there before.
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), TOS: 40})
	var sent Sent
	k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 1, Sizes: []int{100}}, &sent)
	if err := recvOurs(s, ks.Local, 1, []int{100}); err != nil {
		t.Fatal(err)
	}
	exchange(t, s, k, ks, []int{1, 5000, 0, 100000})
	drained(t, s, k)
}

// TestRDSDuel has both sides start the same connection at the same time, again and again.
func TestRDSDuel(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	for i := range 10 {
		s := listen(t, svc, addrPort(f.host, uint16(4100+i)))
		tos := uint8(50 + i)
		ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), TOS: tos})
		setTOS(t, s, tos)
		start := time.Now()
		exchange(t, s, k, ks, []int{10, 6000})
		t.Logf("duel %d: %v", i, time.Since(start).Round(time.Millisecond))
		k.must("Close", ks.ID, &struct{}{})
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRDSPing pings in both directions.
func TestRDSPing(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
	svc := service(t)
	s := listen(t, svc, addrPort(f.host, 4004))
	for range 3 {
		start := time.Now()
		if err := sendOurs(s, addrPort(f.guest, rds.PingPort), 0, []int{0}); err != nil {
			t.Fatal(err)
		}
		if err := recvOurs(s, addrPort(f.guest, rds.PingPort), 0, []int{0}); err != nil {
			t.Fatal(err)
		}
		t.Logf("the kernel's pong after %v", time.Since(start))
		var sent Sent
		k.must("Send", SendArgs{ID: ks.ID, To: addrPort(f.host, rds.PingPort), Sizes: []int{0}}, &sent)
		var got []Datagram
		k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: stepLimit}, &got)
		if err := checkDatagrams(got, addrPort(f.host, rds.PingPort), 0, []int{0}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRDSCongestion has a reader stop on each side.
func TestRDSCongestion(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	t.Run("the kernel's reader stops", func(t *testing.T) {
		s := listen(t, svc, addrPort(f.host, 4005))
		defer s.Close()
		ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), RcvBuf: 64 << 10})
		exchange(t, s, k, ks, []int{1})
		p := make([]byte, 4096)
		n := 0
		for ; n < 2000; n++ {
			_ = s.SetWriteDeadline(time.Now().Add(2 * time.Second))
			pattern(p, uint32(n))
			if _, err := s.WriteToAddrPort(p, ks.Local); err != nil {
				if !errors.Is(err, rds.ErrCongested) || !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("a write to a congested port: %v", err)
				}
				break
			}
			time.Sleep(time.Millisecond)
		}
		t.Logf("%d datagrams of 4096 bytes until congestion", n)
		if n < 16 || n == 2000 {
			t.Fatalf("%d datagrams into a receive buffer of 64 KiB", n)
		}
		// Another port of the same peer is open.
		other := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
		_ = s.SetWriteDeadline(time.Now().Add(stepLimit))
		if err := sendOurs(s, other.Local, 3, []int{77}); err != nil {
			t.Errorf("a write to another port: %v", err)
		}
		// A writer that waits goes on when the reader does.
		done := make(chan error, 1)
		go func() { done <- sendOurs(s, ks.Local, uint32(n), []int{4096}) }()
		var got []Datagram
		k.must("Recv", RecvArgs{ID: ks.ID, Count: n + 1, Limit: 10 * time.Second}, &got)
		if err := <-done; err != nil {
			t.Errorf("the waiting write: %v", err)
		}
		sizes := make([]int, n+1)
		for i := range sizes {
			sizes[i] = 4096
		}
		if err := checkDatagrams(got, s.AddrPort(), 0, sizes); err != nil {
			t.Error(err)
		}
	})
	t.Run("our reader stops", func(t *testing.T) {
		s := listen(t, svc, addrPort(f.host, 4006))
		defer s.Close()
		if err := s.SetReadBuffer(64 << 10); err != nil {
			t.Fatal(err)
		}
		ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
		exchange(t, s, k, ks, []int{1})
		n := 0
		for ; n < 2000; n++ {
			var sent Sent
			k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: uint32(n), Sizes: []int{4096}, NoWait: true}, &sent)
			if sent.N == 0 {
				if sent.Errno != unix.ENOBUFS {
					t.Fatalf("the kernel's send: %v", sent.Errno)
				}
				break
			}
		}
		t.Logf("%d datagrams of 4096 bytes until congestion", n)
		if n < 16 || n == 2000 {
			t.Fatalf("%d datagrams into a receive buffer of 64 KiB", n)
		}
		done := make(chan error, 1)
		go func() {
			var sent Sent
			err := k.call("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: uint32(n), Sizes: []int{4096}}, &sent)
			if err == nil && sent.N != 1 {
				err = sent.Errno
			}
			done <- err
		}()
		sizes := make([]int, n+1)
		for i := range sizes {
			sizes[i] = 4096
		}
		if err := recvOurs(s, ks.Local, 0, sizes); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("the kernel's waiting send: %v", err)
		}
	})
}

// TestRDSFlowControl switches the kernel's credit flow control on for a new connection.
func TestRDSFlowControl(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	for i, on := range []string{"1", "0"} {
		s := listen(t, svc, addrPort(f.host, uint16(4120+i)))
		g.Sysctl(t, "net.rds.ib.flow_control", on)
		tos := uint8(70 + i)
		setTOS(t, s, tos)
		ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), TOS: tos})
		sizes := make([]int, 600) // more than the kernel's send ring holds
		for j := range sizes {
			sizes[j] = j
		}
		exchange(t, s, k, ks, sizes)
		drained(t, s, k)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
