//go:build lab && linux

package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/openrds/openrds/rds"
)

// ourConn is our side of a connection.
func ourConn(svc *rds.Service, local, remote netip.Addr, tos uint8) (c rds.ConnInfo, ok bool) {
	for _, c := range svc.Info(rds.InfoConnections).Connections {
		if c.Local == local && c.Remote == remote && c.TOS == tos {
			return c, true
		}
	}
	return c, false
}

// agree checks that both sides of a connection that is quiet show the same of it: what one sends next is what the other expects.
func agree(t testing.TB, svc *rds.Service, k *kernelEnd, host, guest netip.Addr, tos uint8) {
	t.Helper()
	differ := func() string {
		ours, ok := ourConn(svc, host, guest, tos)
		theirs, ok2 := k.conn(host, tos)
		switch {
		case !ok || !ok2:
			return fmt.Sprintf("the connection is not shown: %+v, %+v", ours, theirs)
		case ours.NextTX != theirs.NextRX || ours.NextRX != theirs.NextTX:
			return fmt.Sprintf("we send %d next and expect %d; the kernel expects %d and sends %d", ours.NextTX, ours.NextRX, theirs.NextRX, theirs.NextTX)
		case ours.Flags&rds.ConnConnected == 0 || theirs.Flags&connUp == 0 || ours.Transport != theirs.Transport:
			return fmt.Sprintf("flags %d over %q; the kernel's %d over %q", ours.Flags, ours.Transport, theirs.Flags, theirs.Transport)
		}
		return ""
	}
	eventually(t, "both sides show the same connection", func() bool { return differ() == "" })
	if d := differ(); d != "" {
		t.Error(d)
	}
}

// TestRDSTypesOfService has sockets with types of service 0 and 5 talk at once: a connection for each, and datagrams of one do not get
// into the other's order. Zero-length datagrams among them.
func TestRDSTypesOfService(t *testing.T) {
	for _, f := range []family{ipv4, ipv6} {
		t.Run(f.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, f)
			k := newKernelEnd(t, g)
			svc := service(t)
			types := []uint8{0, 5}
			var socks []*rds.Socket
			var theirs []Opened
			for i, tos := range types {
				s := listen(t, svc, addrPort(f.host, uint16(4040+i)))
				setTOS(t, s, tos)
				socks = append(socks, s)
				theirs = append(theirs, k.open(OpenArgs{Local: addrPort(f.guest, 0), TOS: tos}))
			}
			sizes := []int{0, 1, 0, 0, 4096, 0, 100000, 0}
			for range 5 {
				sizes = append(sizes, busy(50)...)
				sizes = append(sizes, 0)
			}
			var wg sync.WaitGroup
			for i := range types {
				wg.Go(func() { exchange(t, socks[i], k, theirs[i], sizes) })
			}
			wg.Wait()
			host, peer := socks[0].AddrPort().Addr(), theirs[0].Local.Addr()
			for i, tos := range types {
				drained(t, socks[i], k)
				c, ok := ourConn(svc, host, peer, tos)
				if !ok {
					t.Fatalf("no connection with type of service %d: %+v", tos, svc.Info(rds.InfoConnections))
				}
				if c.NextRX < uint64(len(sizes)) {
					t.Errorf("type of service %d: sequence %d after %d datagrams", tos, c.NextRX, len(sizes))
				}
				if f.name == ipv4.name { // the kernel does not tell which IPv6 connection has which
					agree(t, svc, k, host, peer, tos)
				}
			}
		})
	}
}

// queued is a message in a queue, on either side.
type queued struct {
	Seq, Len    int
	Source, To  netip.AddrPort
	TypeService uint8
}

func ourMessages(list []rds.MessageInfo, received bool) (ms []queued) {
	for _, m := range list {
		from, to := m.Local.AddrPort(), m.Remote.AddrPort()
		if received {
			from, to = to, from
		}
		ms = append(ms, queued{int(m.Seq), m.Len, from, to, m.TOS})
	}
	slices.SortFunc(ms, func(a, b queued) int { return cmp.Compare(a.Seq, b.Seq) })
	return ms
}

func kernelMessages(list []KernelMessage, received bool) (ms []queued) {
	for _, m := range list {
		from, to := m.Local, m.Remote
		if received {
			from, to = to, from
		}
		ms = append(ms, queued{int(m.Seq), m.Len, from, to, m.TOS})
	}
	return ms
}

// TestRDSInfo compares what rds-info shows of the kernel with Service.Info for the same traffic: sequences, queues of what is not sent, not
// acknowledged, not read; sockets.
func TestRDSInfo(t *testing.T) {
	for _, f := range []family{ipv4, ipv6} {
		t.Run(f.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, f)
			k := newKernelEnd(t, g)
			svc := service(t)
			s := listen(t, svc, addrPort(f.host, 4042))
			ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), SndBuf: 300000, RcvBuf: 200000})
			host, peer := s.AddrPort().Addr(), ks.Local.Addr()
			exchange(t, s, k, ks, []int{1, 5000})
			drained(t, s, k)
			agree(t, svc, k, host, peer, 0)

			// Read by nobody: what is in the receivers' queues is what the senders had numbered.
			sizes := []int{0, 1, 4096, 4097, 0, 20000}
			first, _ := k.conn(host, 0)
			var sent Sent
			k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 1, Sizes: sizes}, &sent)
			if err := sendOurs(s, ks.Local, 2, sizes); err != nil {
				t.Fatal(err)
			}
			expect := func(next uint64, from, to netip.AddrPort) (ms []queued) {
				for i, n := range sizes {
					ms = append(ms, queued{int(next) + i, n, from, to, 0})
				}
				return ms
			}
			toUs, toKernel := expect(first.NextTX, ks.Local, s.AddrPort()), expect(first.NextRX, s.AddrPort(), ks.Local)
			same := func(what string, want []queued, got func() []queued) {
				t.Helper()
				eventually(t, what, func() bool { return slices.Equal(got(), want) })
				if ms := got(); !slices.Equal(ms, want) {
					t.Errorf("%s: %+v, want %+v", what, ms, want)
				}
			}
			same("our receive queue", toUs, func() []queued { return ourMessages(svc.Info(rds.InfoRecv).ReceiveQueue, true) })
			same("the kernel's receive queue", toKernel, func() []queued { return kernelMessages(k.messages(host, infoRecvQueue6), true) })
			if err := recvOurs(s, ks.Local, 1, sizes); err != nil {
				t.Error(err)
			}
			var got []Datagram
			k.must("Recv", RecvArgs{ID: ks.ID, Count: len(sizes), Limit: stepLimit}, &got)
			same("our empty receive queue", nil, func() []queued { return ourMessages(svc.Info(rds.InfoRecv).ReceiveQueue, true) })
			same("the kernel's empty receive queue", nil, func() []queued { return kernelMessages(k.messages(host, infoRecvQueue6), true) })
			drained(t, s, k)
			agree(t, svc, k, host, peer, 0)

			// Nothing gets through: what was sent is in the senders' queues, and leaves them for the other side's.
			if err := ip("link", "set", HostLink, "down"); err != nil {
				t.Fatal(err)
			}
			up := sync.OnceFunc(func() { _ = ip("link", "set", HostLink, "up") })
			defer up()
			first, _ = k.conn(host, 0)
			k.must("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 1, Sizes: sizes}, &sent)
			if err := sendOurs(s, ks.Local, 2, sizes); err != nil {
				t.Fatal(err)
			}
			toUs, toKernel = expect(first.NextTX, ks.Local, s.AddrPort()), expect(first.NextRX, s.AddrPort(), ks.Local)
			queues := func() []queued {
				in := svc.Info(rds.InfoSend | rds.InfoRetrans)
				return ourMessages(append(in.RetransQueue, in.SendQueue...), false)
			}
			kernelQueues := func() []queued {
				return kernelMessages(k.messages(host, infoRetrans6, infoSendQueue6), false)
			}
			same("our send and retransmit queues", toKernel, queues)
			same("the kernel's send and retransmit queues", toUs, kernelQueues)
			up()
			if err := recvOurs(s, ks.Local, 1, sizes); err != nil {
				t.Error(err)
			}
			k.must("Recv", RecvArgs{ID: ks.ID, Count: len(sizes), Limit: stepLimit}, &got)
			same("our empty queues", nil, queues)
			same("the kernel's empty queues", nil, kernelQueues)
			agree(t, svc, k, host, peer, 0)

			var socks []KernelSocket
			k.must("Sockets", struct{}{}, &socks)
			i := slices.IndexFunc(socks, func(c KernelSocket) bool { return c.Bound == ks.Local })
			if i < 0 || socks[i].SndBuf != 300000 || socks[i].RcvBuf != 200000 {
				t.Errorf("the kernel's sockets: %+v", socks)
			}
			ours := svc.Info(rds.InfoSockets).Sockets
			j := slices.IndexFunc(ours, func(i rds.SocketInfo) bool { return i.Local.AddrPort() == s.AddrPort() })
			if j < 0 || ours[j].SendBuffer != rds.DefaultBuffer || ours[j].ReceiveBuffer != rds.DefaultBuffer {
				t.Errorf("our sockets: %+v", ours)
			}
		})
	}
}

// TestRDSCTLPing pings the kernel with the program, and the kernel pings us while a process of ours does nothing but exist.
func TestRDSCTLPing(t *testing.T) {
	rdsctl := goBuild(t, "cmd/rdsctl")
	for _, f := range []family{ipv4, ipv6} {
		t.Run(f.name, func(t *testing.T) {
			g := guest(t, 4500)
			f := freshHost(t, g, f)
			for _, tos := range []string{"0", "5"} {
				out, err := output("", rdsctl, "ping", "-c", "5", "-i", "0.05", "-Q", tos, "--wait", "10s", "-I", f.host, f.guest)
				if err != nil {
					t.Fatalf("rdsctl: %v\n%s", err, out)
				}
				if n := strings.Count(string(out), " usec"); n != 5 || strings.Count(string(out), "\n") != 5 {
					t.Errorf("rdsctl says\n%s", out)
				}
				t.Logf("type of service %s: %q", tos, out)
			}
			// At another address: the kernel believes in rdsctl's connections until it gets no answer, for 4 s.
			f = freshHost(t, g, f)
			k := newKernelEnd(t, g)
			svc := service(t)
			s := listen(t, svc, addrPort(f.host, 4044)) // an address belongs to a Service that has bound it
			for i := range 4 {
				ks := k.open(OpenArgs{Local: addrPort(f.guest, 0), TOS: uint8(i % 2 * 5)})
				var sent Sent
				k.must("Send", SendArgs{ID: ks.ID, To: addrPort(f.host, rds.PingPort), Sizes: []int{0, 0}}, &sent)
				var got []Datagram
				k.must("Recv", RecvArgs{ID: ks.ID, Count: 2, Limit: stepLimit}, &got)
				if err := checkDatagrams(got, addrPort(f.host, rds.PingPort), 0, []int{0, 0}); err != nil {
					t.Errorf("ping %d: %v", i, err)
				}
			}
			if _, bytes := s.Unacknowledged(); bytes != 0 {
				t.Error("pongs are charged to a socket")
			}
			if n := svc.Stats().Conn.RecvPing; n != 8 {
				t.Errorf("%d pings answered, want 8", n)
			}
		})
	}
}
