//go:build lab && linux

package lab

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

const accessAll = verbs.AccessLocalWrite | verbs.AccessRemoteWrite | verbs.AccessRemoteRead | verbs.AccessRemoteAtomic | verbs.AccessMWBind

const (
	stepLimit = 30 * time.Second // of one step of a test: emulation, retransmission timers
	memBytes  = 8 << 20          // of the region on each side
	hostIOVA  = 0x1000
)

// pattern fills b with the sequence of seed that verbspeer checks.
func pattern(b []byte, seed uint32) {
	for i := range b {
		b[i] = byte((uint32(i)*2654435761+seed*40503)>>13 ^ uint32(i))
	}
}

// checkPattern reports the first byte of b that is not of the sequence of seed.
func checkPattern(b []byte, seed uint32) error {
	want := make([]byte, len(b))
	pattern(want, seed)
	for i := range b {
		if b[i] != want[i] {
			return fmt.Errorf("byte %d is %02x, want %02x", i, b[i], want[i])
		}
	}
	return nil
}

// hostEnd is our end: a softroce device with one QP and one region.
type hostEnd struct {
	t   testing.TB
	ctx context.Context
	dev verbs.Device
	pd  verbs.PD
	cq  verbs.CQ
	qp  verbs.QP
	mem []byte
	mr  verbs.MR
	ep  verbs.Endpoint
	got verbs.Connected
}

func newHost(t testing.TB, addr string) *hostEnd {
	t.Helper()
	dev, err := softroce.New(softroce.Config{}).OpenDevice(netip.MustParseAddr(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	return newHostOn(t, dev)
}

// newHostOn makes a QP on dev that is gone when t ends.
func newHostOn(t testing.TB, dev verbs.Device) *hostEnd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
	h := &hostEnd{t: t, ctx: ctx, dev: dev}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	h.pd, err = dev.AllocPD()
	must(err)
	h.cq, err = dev.CreateCQ(verbs.CQConfig{Depth: 1024})
	must(err)
	h.qp, err = h.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: h.cq, RecvCQ: h.cq, MaxSendWR: 256, MaxRecvWR: 256, MaxSendSGE: 2, MaxRecvSGE: 2})
	must(err)
	h.mem, err = unix.Mmap(-1, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(err)
	h.mr, err = h.pd.RegMR(h.mem, hostIOVA, accessAll)
	must(err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("our counters: %s", nonZero(dev.Stats()))
		}
		if h.ep != nil {
			_ = h.ep.Disconnect()
		}
		for _, step := range []func() error{h.qp.Close, h.mr.Deregister, h.pd.Close, h.cq.Close, func() error { return unix.Munmap(h.mem) }} {
			if err := step(); err != nil {
				t.Error(err)
			}
		}
		cancel()
	})
	return h
}

func nonZero(m map[string]uint64) string {
	var s []string
	for k, v := range m {
		if v != 0 {
			s = append(s, fmt.Sprintf("%s=%d", k, v))
		}
	}
	return strings.Join(s, " ")
}

// at is mem[off:off+n] ordered behind the engine, which nothing else does (of use to the race detector).
func (h *hostEnd) at(off, n int) []byte {
	h.qp.Query()
	return h.mem[off : off+n]
}

func (h *hostEnd) sge(off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: hostIOVA + uint64(off), Length: uint32(n), LKey: h.mr.LKey()}}
}

func (h *hostEnd) post(wr verbs.SendWR) {
	h.t.Helper()
	wr.Flags |= verbs.SendSignaled
	if _, err := h.qp.PostSend([]verbs.SendWR{wr}); err != nil {
		h.t.Fatalf("post %v: %v", wr.Opcode, err)
	}
}

func (h *hostEnd) recv(id uint64, off, n int) {
	h.t.Helper()
	if _, err := h.qp.PostRecv([]verbs.RecvWR{{ID: id, SGs: h.sge(off, n)}}); err != nil {
		h.t.Fatal(err)
	}
}

// poll waits for one completion.
func (h *hostEnd) poll() verbs.WC {
	h.t.Helper()
	var wc [1]verbs.WC
	for end := time.Now().Add(stepLimit); time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
		if h.cq.Poll(wc[:]) == 1 {
			return wc[0]
		}
	}
	h.t.Fatalf("no completion; QP %v", h.qp.State())
	return verbs.WC{}
}

// done waits for the completion of request id.
func (h *hostEnd) done(id uint64) verbs.WC {
	h.t.Helper()
	wc := h.poll()
	if err := wc.Err(); err != nil || wc.ID != id {
		h.t.Fatalf("completion %+v (%v), want request %d done", wc, err, id)
	}
	return wc
}

// guestEnd is the guest's end: a verbspeer process.
type guestEnd struct {
	t     testing.TB
	p     *Process
	lines *bufio.Reader
	addr  uint64 // of its region
	rkey  verbs.RKey
}

func newGuestEnd(t testing.TB, g *Guest) *guestEnd {
	t.Helper()
	p, err := g.Start(CompileC(t, "testdata/verbspeer.c"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.CloseWrite()
		ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
		defer cancel()
		if err := p.Wait(ctx); err != nil {
			t.Error(err)
		}
	})
	return newGuestEndOn(t, p)
}

func newGuestEndOn(t testing.TB, p *Process) *guestEnd {
	return &guestEnd{t: t, p: p, lines: bufio.NewReader(p)}
}

// try sends a command and returns what follows "ok" in the answer, or what follows "err" as an error.
func (e *guestEnd) try(format string, args ...any) (string, error) {
	cmd := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(e.p, cmd); err != nil {
		return "", err
	}
	limit := time.AfterFunc(2*stepLimit, func() { _ = e.p.Signal(unix.SIGKILL) })
	defer limit.Stop()
	line, err := e.lines.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("guest: %s: no answer (%w) %s", cmd, err, e.p.Stderr())
	}
	answer := strings.TrimSpace(line)
	if rest, ok := strings.CutPrefix(answer, "ok"); ok {
		return strings.TrimSpace(rest), nil
	}
	return "", fmt.Errorf("guest: %s: %s", cmd, answer)
}

func (e *guestEnd) do(format string, args ...any) string {
	e.t.Helper()
	out, err := e.try(format, args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// setup reads the answer to resolve and getreq and returns the private data of the REQ.
func (e *guestEnd) setup(answer string) []byte {
	e.t.Helper()
	var qpn uint32
	var priv string
	if n, err := fmt.Sscan(answer, &e.addr, &e.rkey, &qpn, &priv); n < 3 {
		e.t.Fatalf("guest: setup answers %q: %v", answer, err)
	}
	data, err := hex.DecodeString(priv)
	if err != nil {
		e.t.Fatal(err)
	}
	return data
}

// guestWC is a completion in the guest; status and opcode have libibverbs' values.
type guestWC struct {
	id             uint64
	status, opcode int
	bytes          int
	imm            uint32
	flags          int
	inv            uint32
}

const (
	ibvWCSend, ibvWCWrite, ibvWCRead, ibvWCCas, ibvWCFadd, ibvWCBind = 0, 1, 2, 3, 4, 5
	ibvWCRecv, ibvWCRecvWriteImm                                     = 128, 129
	ibvWithImm, ibvWithInv                                           = 2, 8
	kernelWithInv                                                    = 4 // ib_verbs.h; rxe 6.1 gives it to user space as it is
)

func (e *guestEnd) poll() (wc guestWC) {
	e.t.Helper()
	out := e.do("poll")
	if _, err := fmt.Sscan(out, &wc.id, &wc.status, &wc.opcode, &wc.bytes, &wc.imm, &wc.flags, &wc.inv); err != nil {
		e.t.Fatalf("guest: poll answers %q: %v", out, err)
	}
	return wc
}

func (e *guestEnd) done(id uint64, opcode int) guestWC {
	e.t.Helper()
	wc := e.poll()
	if wc.status != 0 || wc.id != id || wc.opcode != opcode {
		e.t.Fatalf("guest: completion %+v, want request %d done with opcode %d", wc, id, opcode)
	}
	return wc
}

// family is an address family of the link.
type family struct{ name, host, guest string }

var (
	ipv4 = family{"IPv4", HostAddr4, GuestAddr4}
	ipv6 = family{"IPv6", HostAddr6, GuestAddr6}
)

var connParam = verbs.ConnParam{ResponderResources: 16, InitiatorDepth: 16, RetryCount: 6, RNRRetryCount: 7}

const port = 7471

// connect makes a connection that we open, with private data both ways.
func connect(t testing.TB, h *hostEnd, e *guestEnd, f family) {
	t.Helper()
	e.do("listen %s %d", f.guest, port)
	type result struct {
		ep  verbs.Endpoint
		got verbs.Connected
		err error
	}
	ch := make(chan result, 1)
	go func() {
		p := connParam
		p.PrivateData = []byte("from our REQ")
		var r result
		r.ep, r.got, r.err = h.dev.Connect(h.ctx, netip.AddrPortFrom(netip.MustParseAddr(f.guest), port), h.qp, p, nil)
		ch <- r
	}()
	if priv := e.setup(e.do("getreq")); len(priv) != 56 || !strings.HasPrefix(string(priv), "from our REQ\x00") {
		t.Errorf("the guest's listener sees private data %q", priv)
	}
	e.do("accept %x", "from the guest's REP")
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	h.ep, h.got = r.ep, r.got
	if len(r.got.PrivateData) != 196 || !strings.HasPrefix(string(r.got.PrivateData), "from the guest's REP\x00") {
		t.Errorf("Connect returns private data %q", r.got.PrivateData)
	}
}

// accept makes a connection that the guest opens.
func accept(t testing.TB, h *hostEnd, e *guestEnd, f family) {
	t.Helper()
	type result struct {
		ep  verbs.Endpoint
		got verbs.Connected
		err error
	}
	ch := make(chan result, 1)
	l, err := h.dev.Listen(port, func(r verbs.ConnRequest) {
		p := connParam
		p.PrivateData = []byte("from our REP")
		ep, err := r.Accept(h.ctx, h.qp, p, nil)
		ch <- result{ep, r.Info(), err}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e.setup(e.do("resolve %s %s %d", f.guest, f.host, port))
	out := e.do("connect %x", "from the guest's REQ")
	if priv, err := hex.DecodeString(out); err != nil || len(priv) != 196 || !strings.HasPrefix(string(priv), "from our REP\x00") {
		t.Errorf("the guest's connect sees private data %q (%v)", priv, err)
	}
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	h.ep, h.got = r.ep, r.got
	if len(r.got.PrivateData) != 56 || !strings.HasPrefix(string(r.got.PrivateData), "from the guest's REQ\x00") {
		t.Errorf("the request carries private data %q", r.got.PrivateData)
	}
}
