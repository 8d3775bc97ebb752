//go:build lab && linux

package lab

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rdmaShapes are regions by where in a page they begin and how long they are, up to the maximum of 1 MiB.
var rdmaShapes = []struct{ off, len int }{
	{0, 1}, {1, 1}, {4095, 1}, {0, 100}, {123, 4096}, {0, 4096}, {4095, 2}, {0, 4097}, {1000, 8192}, {0, 65536}, {77, 100001}, {0, 1 << 20}, {4000, 1<<20 - 4096},
}

// rdmaEnd is one side of RDMA through RDS between two kernels: a socket and a buffer.
type rdmaEnd struct {
	*kernelEnd
	Opened
	buf int
}

const rdmaMem = 2 << 20

func newRDMAEnd(t testing.TB, g *Guest) *rdmaEnd {
	t.Helper()
	e := &rdmaEnd{kernelEnd: newKernelEnd(t, g)}
	e.Opened = e.open(OpenArgs{Local: addrPort(g.Addr4(), 0)})
	e.must("Alloc", rdmaMem, &e.buf)
	return e
}

func (e *rdmaEnd) span(off, n int) Span { return Span{e.buf, off, n} }

func (e *rdmaEnd) fill(off, n int, seed uint32) {
	e.t.Helper()
	e.must("Fill", PatternArgs{e.span(off, n), seed}, &struct{}{})
}

func (e *rdmaEnd) check(what string, off, n int, seed uint32) {
	e.t.Helper()
	if err := e.call("Check", PatternArgs{e.span(off, n), seed}, &struct{}{}); err != nil {
		e.t.Errorf("%s: %v", what, err)
	}
}

// sendRDMA sends a datagram with what a carries, and returns the cookie of its mapping.
func (e *rdmaEnd) sendRDMA(a SendRDMAArgs) uint64 {
	e.t.Helper()
	a.ID = e.ID
	var sent SentRDMA
	e.must("SendRDMA", a, &sent)
	if sent.Errno != 0 {
		e.t.Fatalf("sendmsg: %v", sent.Errno)
	}
	return sent.Cookie
}

// want receives a datagram of the pattern of seed.
func (e *rdmaEnd) want(from netip.AddrPort, n int, seed uint32) Datagram {
	e.t.Helper()
	var got []Datagram
	e.must("Recv", RecvArgs{ID: e.ID, Count: 1, Limit: stepLimit}, &got)
	if len(got) != 1 || got[0].From != from || got[0].Len != n || got[0].Sum != sum(n, seed) {
		e.t.Fatalf("received %+v, want %d bytes from %v", got, n, from)
	}
	return got[0]
}

// wantStatus takes one notification.
func (e *rdmaEnd) wantStatus(token uint64, status int32) {
	e.t.Helper()
	var got []RDMAStatus
	e.must("Statuses", RecvArgs{ID: e.ID, Count: 1, Limit: stepLimit}, &got)
	if len(got) != 1 || got[0] != (RDMAStatus{token, status}) {
		e.t.Errorf("notifications %v, want status %d of token %d", got, status, token)
	}
}

// TestRDSRDMAKernels is RDMA between two kernels, to know what they do: the client maps memory and says so in a datagram, the
// server answers with an operation and a datagram.
func TestRDSRDMAKernels(t *testing.T) {
	a, b := twoGuests(t)
	client, server := newRDMAEnd(t, a), newRDMAEnd(t, b)

	var sent SentRDMA
	client.must("GetMR", struct {
		ID int
		MapArgs
	}{client.ID, MapArgs{Span: client.span(0, 4096)}}, &sent)
	t.Logf("RDS_GET_MR before any connection: %v", sent.Errno)
	for i, s := range rdmaShapes {
		seed := uint32(10 * i)
		for _, write := range []bool{true, false} {
			name := fmt.Sprintf("READ of %d bytes at %d", s.len, s.off)
			flags := uint64(rdmaNotify | rdmaFence)
			if write {
				name = fmt.Sprintf("WRITE of %d bytes at %d", s.len, s.off)
				flags = rdmaNotify | rdmaWrite
				server.fill(0, s.len, seed+1)
				client.fill(s.off, s.len, seed+2)
			} else {
				client.fill(s.off, s.len, seed+1)
				server.fill(0, s.len, seed+2)
			}
			cookie := client.sendRDMA(SendRDMAArgs{To: server.Local, Seed: seed + 3, Size: 30, Map: &MapArgs{client.span(s.off, s.len), rdmaUseOnce}})
			if cookie>>32 != uint64(s.off) || cookie&0xffffffff == 0 {
				t.Errorf("%s: the kernel's cookie is %#x", name, cookie)
			}
			if d := server.want(client.Local, 30, seed+3); d.Cookie != cookie {
				t.Fatalf("%s: cookie %#x arrives as %#x", name, cookie, d.Cookie)
			}
			server.sendRDMA(SendRDMAArgs{To: client.Local, Seed: seed + 4, Size: 40, RDMA: &RDMAArgs{Cookie: cookie, Local: []Span{server.span(0, s.len)}, Flags: flags, Token: uint64(seed)}})
			client.want(server.Local, 40, seed+4)
			server.wantStatus(uint64(seed), rdmaSuccess)
			client.check(name+": the client's memory", s.off, s.len, seed+1)
			server.check(name+": the server's memory", 0, s.len, seed+1)
			// Used once: it is gone.
			var errno unix.Errno
			client.must("FreeMR", struct {
				ID            int
				Cookie, Flags uint64
			}{client.ID, cookie, 0}, &errno)
			if errno != unix.EINVAL {
				t.Errorf("%s: RDS_FREE_MR of a region that was used once: %v", name, errno)
			}
		}
	}
	client.must("GetMR", struct {
		ID int
		MapArgs
	}{client.ID, MapArgs{Span: client.span(0, 4096)}}, &sent)
	t.Logf("RDS_GET_MR with a connection: %v", sent.Errno)

	// A dead key breaks the connection; the operation is reported, and what it was sent with is dropped.
	cookie := client.sendRDMA(SendRDMAArgs{To: server.Local, Seed: 1, Size: 1, Map: &MapArgs{client.span(0, 4096), rdmaInvalidate}})
	server.want(client.Local, 1, 1)
	// The message that carries a mapping holds it until it is acknowledged, which a kernel does not do unless asked; but
	// each of its messages acknowledges.
	server.sendRDMA(SendRDMAArgs{To: client.Local, Seed: 5, Size: 5})
	client.want(server.Local, 5, 5)
	eventually(t, "acknowledged", func() bool { return client.queued(server.Local.Addr()) == 0 })
	var errno unix.Errno
	client.must("FreeMR", struct {
		ID            int
		Cookie, Flags uint64
	}{client.ID, cookie, rdmaInvalidate}, &errno)
	if errno != 0 {
		t.Fatalf("RDS_FREE_MR: %v", errno)
	}
	server.sendRDMA(SendRDMAArgs{To: client.Local, Seed: 2, Size: 2, RDMA: &RDMAArgs{Cookie: cookie, Local: []Span{server.span(0, 100)}, Flags: rdmaNotify | rdmaWrite, Token: 99}})
	server.wantStatus(99, rdmaRemoteError)
	server.sendRDMA(SendRDMAArgs{To: client.Local, Seed: 3, Size: 3})
	start := time.Now()
	client.want(server.Local, 3, 3)
	t.Logf("the next datagram arrives %v after the connection broke", time.Since(start).Round(time.Millisecond))
}
