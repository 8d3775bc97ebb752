//go:build lab && linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
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

func newRDMAEnd(t testing.TB, g *Guest, addr string) *rdmaEnd {
	t.Helper()
	e := &rdmaEnd{kernelEnd: newKernelEnd(t, g)}
	e.Opened = e.open(OpenArgs{Local: addrPort(addr, 0)})
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
	client, server := newRDMAEnd(t, a, a.Addr4()), newRDMAEnd(t, b, b.Addr4())

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

// ourRDMA is our side of RDMA with a kernel: a socket and page-aligned memory.
type ourRDMA struct {
	t   testing.TB
	s   *rds.Socket
	mem []byte
}

func newOurRDMA(t testing.TB, at netip.AddrPort) *ourRDMA {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, rdmaMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) }) // after the Service has closed
	return &ourRDMA{t: t, s: listen(t, service(t), at), mem: mem}
}

func (o *ourRDMA) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(o.t.Context()), stepLimit)
	o.t.Cleanup(cancel)
	return ctx
}

// want receives a datagram of the pattern of seed and returns its cookie.
func (o *ourRDMA) want(from netip.AddrPort, n int, seed uint32) rds.Cookie {
	o.t.Helper()
	m, err := o.s.Receive(o.ctx())
	if err != nil {
		o.t.Fatal(err)
	}
	defer m.Release()
	if m.Peer != from || m.Len() != n {
		o.t.Fatalf("%d bytes from %v, want %d from %v", m.Len(), m.Peer, n, from)
	}
	if err := checkPattern(m.Bytes(), seed); err != nil {
		o.t.Fatal(err)
	}
	return m.Cookie
}

func (o *ourRDMA) message(to netip.AddrPort, n int, seed uint32) rds.Message {
	b := make([]byte, n)
	pattern(b, seed)
	return rds.Message{Peer: to, Data: b}
}

func (o *ourRDMA) wantCompletion(token uint64, status rds.CompletionStatus) {
	o.t.Helper()
	c, err := o.s.ReadCompletion(o.ctx())
	if err != nil {
		o.t.Fatal(err)
	}
	if c.Token != token || c.Status != status {
		o.t.Errorf("completion %+v, want %v of token %d", c, status, token)
	}
}

func (o *ourRDMA) check(what string, off, n int, seed uint32) {
	o.t.Helper()
	if err := checkPattern(o.mem[off:off+n], seed); err != nil {
		o.t.Errorf("%s: %v", what, err)
	}
}

// freed checks that a region has been freed, and, if that is to be prompt, waits until nobody touches its memory any more.
func (o *ourRDMA) freed(what string, r *rds.Region, prompt bool) {
	o.t.Helper()
	if err := r.Err(); !errors.Is(err, rds.ErrStaleCookie) {
		o.t.Errorf("%s: the region is not freed: %v", what, err)
	}
	if !prompt {
		return
	}
	select {
	case <-r.Done():
	case <-time.After(stepLimit):
		o.t.Fatalf("%s: the region is not given back", what)
	}
}

// rdmaPaths runs fn over IPv4 with path MTU 4096 and over IPv6 with 1024.
func rdmaPaths(t *testing.T, fn func(t *testing.T, g *Guest, f family)) {
	for _, p := range []struct {
		f   family
		mtu int
	}{{ipv4, 4500}, {ipv6, 1500}} {
		t.Run(fmt.Sprintf("%s/mtu=%d", p.f.name, p.mtu), func(t *testing.T) {
			g := guest(t, p.mtu)
			fn(t, g, freshHost(t, g, p.f))
		})
	}
}

// TestRDSRDMATarget hands out regions of ours to the kernel, which reads and writes them.
func TestRDSRDMATarget(t *testing.T) { rdmaPaths(t, testRDSRDMATarget) }

func testRDSRDMATarget(t *testing.T, g *Guest, f family) {
	o := newOurRDMA(t, addrPort(f.host, 4030))
	k := newRDMAEnd(t, g, f.guest)
	ways := []struct {
		name   string
		prompt bool
		hand   func(m rds.Message, mem []byte) (*rds.Region, error)
	}{
		{"RegisterRegion", false, func(m rds.Message, mem []byte) (*rds.Region, error) {
			r, err := o.s.RegisterRegion(o.ctx(), mem, rds.RegionOptions{UseOnce: true})
			if err == nil {
				m.Cookie = r.Cookie()
				err = o.s.Send(o.ctx(), m)
			}
			return r, err
		}},
		{"SendMapped", true, func(m rds.Message, mem []byte) (*rds.Region, error) {
			return o.s.SendMapped(o.ctx(), m, mem, rds.RegionOptions{UseOnce: true, Invalidate: true})
		}},
	}
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			o.t, k.t = t, t
			for i, s := range rdmaShapes {
				seed := uint32(10 * i)
				for _, write := range []bool{true, false} {
					name := fmt.Sprintf("the kernel's READ of %d bytes at %d", s.len, s.off)
					flags := uint64(rdmaNotify | rdmaFence)
					if write {
						name = fmt.Sprintf("the kernel's WRITE of %d bytes at %d", s.len, s.off)
						flags = rdmaNotify | rdmaWrite
						k.fill(0, s.len, seed+1)
						pattern(o.mem[s.off:s.off+s.len], seed+2)
					} else {
						pattern(o.mem[s.off:s.off+s.len], seed+1)
						k.fill(0, s.len, seed+2)
					}
					r, err := way.hand(o.message(k.Local, 30, seed+3), o.mem[s.off:s.off+s.len])
					if err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					cookie := k.want(o.s.AddrPort(), 30, seed+3).Cookie
					if cookie != uint64(r.Cookie()) {
						t.Fatalf("%s: cookie %v arrives as %#x", name, r.Cookie(), cookie)
					}
					k.sendRDMA(SendRDMAArgs{To: o.s.AddrPort(), Seed: seed + 4, Size: 40, RDMA: &RDMAArgs{Cookie: cookie, Local: []Span{k.span(0, s.len)}, Flags: flags, Token: uint64(seed)}})
					o.want(k.Local, 40, seed+4)
					k.wantStatus(uint64(seed), rdmaSuccess)
					o.check(name+": our memory", s.off, s.len, seed+1)
					k.check(name+": the kernel's memory", 0, s.len, seed+1)
					o.freed(name, r, way.prompt) // used once
				}
			}
		})
	}
}

// TestRDSRDMAInitiator reads and writes memory of the kernel's.
func TestRDSRDMAInitiator(t *testing.T) { rdmaPaths(t, testRDSRDMAInitiator) }

func testRDSRDMAInitiator(t *testing.T, g *Guest, f family) {
	o := newOurRDMA(t, addrPort(f.host, 4031))
	k := newRDMAEnd(t, g, f.guest)
	for i, s := range rdmaShapes {
		seed := uint32(10 * i)
		for _, write := range []bool{true, false} {
			name, op := fmt.Sprintf("our READ of %d bytes at %d", s.len, s.off), rds.RDMARead
			mine := o.mem[1<<20-s.off : 1<<20-s.off+s.len] // begins elsewhere in a page
			if write {
				name, op = fmt.Sprintf("our WRITE of %d bytes at %d", s.len, s.off), rds.RDMAWrite
				pattern(mine, seed+1)
				k.fill(s.off, s.len, seed+2)
			} else {
				k.fill(s.off, s.len, seed+1)
				pattern(mine, seed+2)
			}
			cookie := k.sendRDMA(SendRDMAArgs{To: o.s.AddrPort(), Seed: seed + 3, Size: 30, Map: &MapArgs{k.span(s.off, s.len), rdmaUseOnce}})
			got := o.want(k.Local, 30, seed+3)
			if uint64(got) != cookie {
				t.Fatalf("%s: the kernel's cookie %#x arrives as %v", name, cookie, got)
			}
			r, err := o.s.RegisterRegion(o.ctx(), mine, rds.RegionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			// In two pieces, where there are two bytes.
			local := []rds.Piece{r.Piece(0, s.len)}
			if s.len > 1 {
				local = []rds.Piece{r.Piece(0, s.len/2), r.Piece(s.len/2, s.len-s.len/2)}
			}
			m := o.message(k.Local, 40, seed+4)
			m.RDMA = &rds.RDMA{Op: op, Local: local, Remote: got, Notify: true, Token: uint64(seed)}
			if err := o.s.Send(o.ctx(), m); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			k.want(o.s.AddrPort(), 40, seed+4)
			o.wantCompletion(uint64(seed), rds.StatusSuccess)
			k.check(name+": the kernel's memory", s.off, s.len, seed+1)
			if err := checkPattern(mine, seed+1); err != nil {
				t.Errorf("%s: our memory: %v", name, err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			// Our message named the key that was used: the kernel has freed the region.
			var errno unix.Errno
			k.must("FreeMR", struct {
				ID            int
				Cookie, Flags uint64
			}{k.ID, cookie, 0}, &errno)
			if errno != unix.EINVAL {
				t.Errorf("%s: RDS_FREE_MR of a region that was used once: %v", name, errno)
			}
		}
	}
}

// TestRDSRDMAErrors uses keys that are not valid any more, from either side: the operation fails, the connection breaks and comes
// back, and what else was under way arrives.
func TestRDSRDMAErrors(t *testing.T) {
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	o := newOurRDMA(t, addrPort(f.host, 4032))
	k := newRDMAEnd(t, g, f.guest)
	r, err := o.s.RegisterRegion(o.ctx(), o.mem[:8192], rds.RegionOptions{Invalidate: true})
	if err != nil {
		t.Fatal(err)
	}

	// The kernel's key.
	cookie := k.sendRDMA(SendRDMAArgs{To: o.s.AddrPort(), Seed: 1, Size: 1, Map: &MapArgs{k.span(0, 4096), rdmaInvalidate}})
	o.want(k.Local, 1, 1)
	if err := o.s.Send(o.ctx(), o.message(k.Local, 2, 2)); err != nil {
		t.Fatal(err)
	}
	k.want(o.s.AddrPort(), 2, 2)
	eventually(t, "acknowledged", func() bool { return k.queued(o.s.AddrPort().Addr()) == 0 })
	var errno unix.Errno
	k.must("FreeMR", struct {
		ID            int
		Cookie, Flags uint64
	}{k.ID, cookie, rdmaInvalidate}, &errno)
	if errno != 0 {
		t.Fatalf("RDS_FREE_MR: %v", errno)
	}
	m := o.message(k.Local, 3, 3)
	m.RDMA = &rds.RDMA{Op: rds.RDMAWrite, Local: []rds.Piece{r.Piece(0, 100)}, Remote: rds.Cookie(cookie), Notify: true, Token: 7}
	if err := o.s.Send(o.ctx(), m); err != nil {
		t.Fatal(err)
	}
	if err := o.s.Send(o.ctx(), o.message(k.Local, 4, 4)); err != nil {
		t.Fatal(err)
	}
	o.wantCompletion(7, rds.StatusRemoteError)
	start := time.Now()
	k.want(o.s.AddrPort(), 4, 4) // not 3: it went with its operation
	t.Logf("the next datagram arrives %v after our operation failed", time.Since(start).Round(time.Millisecond))

	// Ours.
	dead := r.Cookie()
	if err := r.Invalidate(o.ctx()); err != nil {
		t.Fatal(err)
	}
	o.freed("invalidated", r, true)
	k.sendRDMA(SendRDMAArgs{To: o.s.AddrPort(), Seed: 5, Size: 5, RDMA: &RDMAArgs{Cookie: uint64(dead), Local: []Span{k.span(0, 100)}, Flags: rdmaNotify | rdmaWrite, Token: 8}})
	k.sendRDMA(SendRDMAArgs{To: o.s.AddrPort(), Seed: 6, Size: 6})
	k.wantStatus(8, rdmaRemoteError)
	start = time.Now()
	o.want(k.Local, 6, 6)
	t.Logf("the kernel's next datagram arrives %v after its operation failed", time.Since(start).Round(time.Millisecond))
	drained(t, o.s, k.kernelEnd)
}
