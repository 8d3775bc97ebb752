//go:build lab && linux

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/verbs"
)

// busy is a long run of datagrams of changing lengths.
func busy(n int) []int {
	sizes := make([]int, n)
	for i := range sizes {
		sizes[i] = (i * 7919) % 9000
	}
	return sizes
}

// TestRDSFaults breaks the connection in the middle of traffic both ways: it resumes, and nothing is lost,
// changed, out of order or twice there.
func TestRDSFaults(t *testing.T) {
	readdRXE := func(t *testing.T, g *Guest) {
		ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
		defer cancel()
		if err := g.AddRXE(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name    string
		fault   func(t *testing.T, g *Guest)
		poisons bool // the guest's kernel does not get over it
	}{
		{"rxe removed", func(t *testing.T, g *Guest) {
			g.Run(t, "rdma", "link", "delete", RXE)
			time.Sleep(300 * time.Millisecond)
			readdRXE(t, g)
		}, false},
		{"silence", func(t *testing.T, g *Guest) { g.Silence(t, 3*time.Second) }, false},
		// rxe's CM may not survive a link that goes down under it, hence a new device; and the kernel warns about
		// what the old one leaks (docs/compatibility.md).
		{"guest's link down", func(t *testing.T, g *Guest) {
			g.Run(t, "ip", "link", "set", GuestLink, "down")
			time.Sleep(3 * time.Second)
			g.Run(t, "rdma", "link", "delete", RXE)
			g.Run(t, "ip", "link", "set", GuestLink, "up")
			readdRXE(t, g)
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := guest(t, 4500)
			if tc.poisons {
				t.Cleanup(discardGuest)
			}
			f := freshHost(t, g, ipv4)
			k := newKernelEnd(t, g)
			svc := service(t)
			s := listen(t, svc, addrPort(f.host, 4008))
			ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
			exchange(t, s, k, ks, []int{1})
			done := make(chan struct{})
			go func() {
				defer close(done)
				exchange(t, s, k, ks, busy(3000))
			}()
			time.Sleep(200 * time.Millisecond)
			select {
			case <-done:
				t.Error("the traffic was over before the fault")
			default:
			}
			tc.fault(t, g)
			over := time.Now()
			<-done
			t.Logf("traffic is through %v after the fault is over", time.Since(over).Round(time.Millisecond))
			drained(t, s, k)
		})
	}
}

// TestRDSLoss is traffic with 1 % of the packets lost in each direction.
func TestRDSLoss(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	s := listen(t, svc, addrPort(f.host, 4009))
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
	exchange(t, s, k, ks, []int{1})
	g.Impair(t, "loss", "1%")
	start := time.Now()
	exchange(t, s, k, ks, busy(1500))
	t.Logf("1500 datagrams each way in %v", time.Since(start).Round(time.Millisecond))
	drained(t, s, k)
}

// echoMain is a process of ours on the host: a socket at its first argument that says the third to the
// second, and then returns what it gets to whoever sent it. SIGTERM closes its Service.
func echoMain(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	svc, err := rds.Open(rds.Config{})
	if err != nil {
		return fail(err)
	}
	s, err := svc.ListenAddrPort(context.Background(), netip.MustParseAddrPort(args[0]))
	if err != nil {
		return fail(err)
	}
	if _, err := s.WriteToAddrPort([]byte(args[2]), netip.MustParseAddrPort(args[1])); err != nil {
		return fail(err)
	}
	fmt.Println("ready")
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() {
		<-term
		_ = s.Close()
	}()
	buf := make([]byte, rds.MaxMessageSize)
	for {
		n, from, err := s.ReadFromAddrPort(buf)
		if errors.Is(err, rds.ErrClosed) {
			if err := svc.Close(); err != nil {
				return fail(err)
			}
			return 0
		}
		if err == nil {
			_, err = s.WriteToAddrPort(buf[:n], from)
		}
		if err != nil {
			return fail(err)
		}
	}
}

// startEcho starts echoMain and waits until it has sent its word.
func startEcho(t testing.TB, at, to netip.AddrPort, word string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "echo", at.String(), to.String(), word)
	cmd.Env = append(os.Environ(), roleEnv+"="+roleRun)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("echo says %q (%v)", line, err)
	}
	return cmd
}

// TestRDSRestart ends our process and starts another at the same address, while the kernel, which never forgets a
// peer, sends to it.
func TestRDSRestart(t *testing.T) {
	for _, how := range []struct {
		name string
		sig  unix.Signal
	}{{"killed", unix.SIGKILL}, {"closed", unix.SIGTERM}} {
		t.Run(how.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, ipv4)
			k := newKernelEnd(t, g)
			ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
			at := addrPort(f.host, 4010)
			recv := func(what string, n int) []Datagram {
				t.Helper()
				var got []Datagram
				k.must("Recv", RecvArgs{ID: ks.ID, Count: n, Limit: stepLimit}, &got)
				if len(got) != n {
					t.Fatalf("%s: the kernel received %d datagrams, want %d", what, len(got), n)
				}
				return got
			}
			send := func(seed uint32, sizes []int) {
				t.Helper()
				var sent Sent
				k.must("Send", SendArgs{ID: ks.ID, To: at, Seed: seed, Sizes: sizes}, &sent)
				if sent.N != len(sizes) {
					t.Fatalf("the kernel sent %d of %d: %v", sent.N, len(sizes), sent.Errno)
				}
			}
			first := startEcho(t, at, ks.Local, "first")
			if got := recv("the first process's word", 1); got[0].Len != len("first") {
				t.Errorf("the first process says %+v", got[0])
			}
			send(100, busy(50))
			if err := checkDatagrams(recv("echoes of the first process", 50), at, 100, busy(50)); err != nil {
				t.Error(err)
			}
			if err := first.Process.Signal(how.sig); err != nil {
				t.Fatal(err)
			}
			_ = first.Wait()
			send(200, busy(20)) // to nobody
			start := time.Now()
			startEcho(t, at, ks.Local, "the second")
			// Its word and the echoes of what waited for it have no order among them.
			got := recv("the second process's word and echoes", 21)
			took := time.Since(start)
			t.Logf("the second process is through after %v", took.Round(time.Millisecond))
			if took > 3*time.Second { // a kernel that had tried to connect meanwhile would let 6 s pass
				t.Errorf("the second process is through after %v", took)
			}
			var echoes []Datagram
			words := 0
			for _, d := range got {
				if d.Len == len("the second") && d.Sum != sum(d.Len, 200) {
					words++
					continue
				}
				echoes = append(echoes, d)
			}
			if words != 1 {
				t.Errorf("the second process's word arrives %d times", words)
			}
			if err := checkDatagrams(echoes, at, 200, busy(20)); err != nil {
				t.Error(err)
			}
			send(300, []int{1, 5000})
			if err := checkDatagrams(recv("echoes of the second process", 2), at, 300, []int{1, 5000}); err != nil {
				t.Error(err)
			}
		})
	}
}

// drop has the host drop packets it sends that match nft's expression, until the returned function is called.
func drop(t testing.TB, match string) (end func() (packets int)) {
	t.Helper()
	nft := func(script string) string {
		t.Helper()
		out, err := output("", "nft", script)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	nft("add table inet lab; add chain inet lab out { type filter hook output priority 0; }; add rule inet lab out udp dport 4791 " + match + " counter drop")
	ended := false
	end = func() (packets int) {
		if ended {
			return 0
		}
		ended = true
		_, after, _ := strings.Cut(nft("list chain inet lab out"), "counter packets ")
		fmt.Sscan(after, &packets)
		nft("delete table inet lab")
		return packets
	}
	t.Cleanup(func() { end() })
	return end
}

// rtu matches RTU MADs: to QP 1, CM attribute 0x14 (offsets in bits from the UDP header).
const rtu = "@th,104,24 0x1 @th,352,16 0x14"

// TestRDSLostRTU loses our RTU, or all of them for two seconds (rds-protocol spec Q1).
func TestRDSLostRTU(t *testing.T) {
	for _, tc := range []struct {
		name  string
		match string
		hold  time.Duration
		limit time.Duration // until the datagrams are there
	}{
		// Ours is repeated after 50 ms. The rest is for the guest's slowness; the kernel's own repetition takes 4.1 s.
		{"the first", rtu + " limit rate 1/day burst 1 packets", 0, 3 * time.Second},
		// None of ours is left then; the kernel repeats its REP after 4.1 s.
		{"all for 2 s", rtu, 2 * time.Second, stepLimit},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, ipv4)
			k := newKernelEnd(t, g)
			ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
			svc := service(t)
			s := listen(t, svc, addrPort(f.host, 4011))
			end := drop(t, tc.match)
			start := time.Now()
			if err := sendOurs(s, ks.Local, 1, []int{1, 5000}); err != nil {
				t.Fatal(err)
			}
			dropped := 0
			if tc.hold > 0 {
				time.Sleep(tc.hold)
				dropped = end()
			}
			var got []Datagram
			k.must("Recv", RecvArgs{ID: ks.ID, Count: 2, Limit: stepLimit}, &got)
			took := time.Since(start)
			if tc.hold == 0 {
				dropped = end()
			}
			t.Logf("%d RTUs dropped; the first datagrams are through after %v", dropped, took.Round(time.Millisecond))
			if tc.hold == 0 && dropped != 1 || dropped == 0 {
				t.Errorf("%d RTUs were dropped", dropped)
			}
			if took > tc.limit {
				t.Errorf("the first datagrams take %v, want at most %v", took, tc.limit)
			}
			if err := checkDatagrams(got, s.AddrPort(), 1, []int{1, 5000}); err != nil {
				t.Error(err)
			}
			exchange(t, s, k, ks, []int{1, 5000})
			drained(t, s, k)
		})
	}
}

// TestRDSShortREP accepts the kernel's connection with a REP that has no RDS part (rds-protocol spec Q7): the kernel
// takes it, and its congestion map arrives.
func TestRDSShortREP(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	h := newHost(t, f.host)
	ch := make(chan error, 1)
	l, err := h.dev.Listen(18634, func(r verbs.ConnRequest) {
		p := connParam
		ep, err := r.Accept(h.ctx, h.qp, p, func() error {
			for i := range 32 {
				h.recv(uint64(i), i*4144, 4144)
			}
			return nil
		})
		h.ep = ep
		ch <- err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	k := newKernelEnd(t, g)
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
	var sent Sent
	k.must("Send", SendArgs{ID: ks.ID, To: addrPort(f.host, 4012), Seed: 1, Sizes: []int{10}}, &sent)
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint32{4144, 4144, 58} { // map, map, datagram
		if wc := h.done(uint64(i)); wc.ByteLen != want {
			t.Errorf("SEND %d of the kernel has %d bytes, want %d", i, wc.ByteLen, want)
		}
	}
}

// TestRDSGiveUp measures how long a kernel takes to notice a peer that has fallen silent (rds-protocol spec Q2), by who made
// the connection.
func TestRDSGiveUp(t *testing.T) {
	for i, who := range []string{"kernel connected", "we connected"} {
		t.Run(who, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, ipv4)
			k := newKernelEnd(t, g)
			ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
			svc := service(t)
			s := listen(t, svc, addrPort(f.host, 4013))
			var sent Sent
			if i == 0 {
				k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 1, Sizes: []int{1}}, &sent)
				if err := recvOurs(s, ks.Local, 1, []int{1}); err != nil {
					t.Fatal(err)
				}
			} else {
				if err := sendOurs(s, ks.Local, 1, []int{1}); err != nil {
					t.Fatal(err)
				}
				var got []Datagram
				k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: stepLimit}, &got)
			}
			exchange(t, s, k, ks, []int{1})
			drained(t, s, k)
			up := func() bool {
				for _, c := range k.conns() {
					if c.Remote == s.AddrPort().Addr() && c.Flags&connUp != 0 {
						return true
					}
				}
				return false
			}
			if !up() {
				t.Fatal("the kernel does not show the connection")
			}
			if err := ip("link", "set", HostLink, "down"); err != nil {
				t.Fatal(err)
			}
			defer ip("link", "set", HostLink, "up")
			k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 2, Sizes: []int{1}}, &sent)
			start := time.Now()
			eventually(t, "the kernel notices the silence", func() bool { return !up() })
			t.Logf("the kernel gives up after %v", time.Since(start).Round(10*time.Millisecond))
			if err := ip("link", "set", HostLink, "up"); err != nil {
				t.Fatal(err)
			}
			start = time.Now()
			if err := recvOurs(s, ks.Local, 2, []int{1}); err != nil {
				t.Fatal(err)
			}
			t.Logf("the datagram arrives %v after the silence", time.Since(start).Round(10*time.Millisecond))
		})
	}
}

// TestRDSReceiveLimit: a kernel that has as many receive buffers as it may posts none for the next connection, and answers
// RNR (rds-protocol spec Q3). What we send waits; when the kernel may have more it arrives, once.
func TestRDSReceiveLimit(t *testing.T) {
	Need(t)
	g := Boot(t, Config{MTU: 4500})
	g.Sysctl(t, "net.rds.ib.max_recv_allocation", "1200") // a connection takes 1024
	k := newKernelEnd(t, g)
	ks := k.open(OpenArgs{Local: addrPort(g.Addr4(), 0)})
	svc := service(t)
	var socks []*rds.Socket
	for i := range 3 {
		socks = append(socks, listen(t, svc, addrPort(g.AddHostAddr(t, netip.MustParseAddr(HostAddr4)).String(), 4014)))
		if err := sendOurs(socks[i], ks.Local, uint32(10*i), []int{1}); err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			var got []Datagram
			k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: stepLimit}, &got)
			if err := checkDatagrams(got, socks[i].AddrPort(), uint32(10*i), []int{1}); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
		}
	}
	var got []Datagram
	k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: 3 * time.Second}, &got)
	if len(got) != 0 {
		t.Fatalf("the third connection's datagram arrives: %v", got)
	}
	if c := k.counters(); c["ib_rx_alloc_limit"] == 0 {
		t.Errorf("the kernel's limit is not reached: %v", c)
	}
	g.Sysctl(t, "net.rds.ib.max_recv_allocation", "100000")
	start := time.Now()
	k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: stepLimit}, &got)
	t.Logf("it arrives %v after the limit is raised", time.Since(start).Round(10*time.Millisecond))
	if err := checkDatagrams(got, socks[2].AddrPort(), 20, []int{1}); err != nil {
		t.Error(err)
	}
	exchange(t, socks[2], k, ks, []int{1, 100000})
	drained(t, socks[2], k)
}
