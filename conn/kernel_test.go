package conn

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// kernelPeer is the test in the role of a kernel: a bare QP with 4144-byte receive buffers, whose SENDs the
// test writes and reads one by one.
type kernelPeer struct {
	t    testing.TB
	addr netip.Addr
	dev  verbs.Device
	pd   verbs.PD
	cq   verbs.CQ
	qp   verbs.QP
	ep   verbs.Endpoint
	mem  []byte
	mr   verbs.MR
	lis  verbs.Listener
	reqs chan *kernelReq

	sends int
	got   []gotSend // polled, not yet wanted
	peer  verbs.Connected

	mapAck   uint64 // ack of the last map
	noRepost bool   // receives are not posted again: RNR
	closed   bool
}

type gotSend struct {
	data      []byte
	solicited bool
}

// kernelReq is a REQ that the test has not answered yet.
type kernelReq struct {
	verbs.ConnRequest
	done chan struct{}
}

const (
	kernelRecvs = 256
	kernelBuf   = 4144
	kernelSends = 256
)

func newKernel(t testing.TB, net packetio.Network, addr netip.Addr) *kernelPeer {
	t.Helper()
	k := &kernelPeer{t: t, addr: addr, reqs: make(chan *kernelReq, 4)}
	var err error
	k.dev, err = softroce.New(softroce.Config{Network: net}).OpenDevice(addr)
	k.must(err)
	k.pd, err = k.dev.AllocPD()
	k.must(err)
	k.cq, err = k.dev.CreateCQ(verbs.CQConfig{Depth: 4096})
	k.must(err)
	k.mem = make([]byte, (kernelRecvs+kernelSends)*kernelBuf)
	k.mr, err = k.pd.RegMR(k.mem, 0, verbs.AccessLocalWrite)
	k.must(err)
	k.lis, err = k.dev.Listen(cmPort(addr), func(r verbs.ConnRequest) {
		kr := &kernelReq{r, make(chan struct{})}
		select {
		case k.reqs <- kr:
			<-kr.done
		default:
		}
	})
	k.must(err)
	t.Cleanup(func() {
		if !k.closed {
			k.close()
		}
	})
	return k
}

func (k *kernelPeer) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *kernelPeer) newQP() {
	k.t.Helper()
	if k.qp != nil {
		k.must(k.qp.Close())
	}
	var wcs [64]verbs.WC
	for k.cq.Poll(wcs[:]) > 0 {
	}
	k.got, k.sends = nil, 0
	var err error
	k.qp, err = k.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: k.cq, RecvCQ: k.cq, MaxSendWR: kernelSends, MaxRecvWR: kernelRecvs, MaxSendSGE: 1, MaxRecvSGE: 1})
	k.must(err)
}

func (k *kernelPeer) postRecv(i uint64) {
	_, err := k.qp.PostRecv([]verbs.RecvWR{{ID: i, SGs: []verbs.SGE{{Addr: i * kernelBuf, Length: kernelBuf, LKey: k.mr.LKey()}}}})
	k.must(err)
}

func (k *kernelPeer) postRecvs() error {
	for i := range uint64(kernelRecvs) {
		k.postRecv(i)
	}
	return nil
}

var kernelParam = verbs.ConnParam{ResponderResources: 16, InitiatorDepth: 16, RetryCount: 1, RNRRetryCount: 7, AckTimeout: 19, MinRNRTimer: 10}

// kernelPriv is a kernel's private data (rds-protocol spec 3.2).
func (k *kernelPeer) priv(to netip.Addr) []byte {
	b := make([]byte, rdshdr.PrivLen6)
	p := rdshdr.ConnPriv{SAddr: k.addr, DAddr: to, Major: 3, Minor: 1, Mask: 3}
	return b[:p.Encode(b)]
}

// connect asks for a connection as a kernel does.
func (k *kernelPeer) connect(to netip.Addr, priv []byte) error {
	k.t.Helper()
	k.newQP()
	p := kernelParam
	p.PrivateData = priv
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ep, info, err := k.dev.Connect(ctx, netip.AddrPortFrom(to, cmPort(to)), k.qp, p, k.postRecvs)
	k.ep, k.peer = ep, info
	return err
}

// wantREQ waits for a REQ and returns it unanswered.
func (k *kernelPeer) wantREQ(what string) *kernelReq {
	k.t.Helper()
	select {
	case r := <-k.reqs:
		return r
	case <-time.After(5 * time.Second):
		k.t.Fatalf("%s: no REQ", what)
		return nil
	}
}

// accept answers a REQ. late leaves the receives to be posted after it, as a kernel does.
func (k *kernelPeer) accept(r *kernelReq, late bool) {
	k.t.Helper()
	k.newQP()
	p := kernelParam
	p.PrivateData = k.priv(r.Remote().Addr())
	prepare := k.postRecvs
	if late {
		prepare = nil
	}
	ep, err := r.Accept(context.Background(), k.qp, p, prepare)
	k.must(err)
	k.ep, k.peer = ep, r.Info()
	close(r.done)
}

func (k *kernelPeer) reject(r *kernelReq) {
	k.must(r.Reject([]byte{1, 0, 0, 0}))
	close(r.done)
}

func (k *kernelPeer) poll() {
	var wcs [64]verbs.WC
	for n := k.cq.Poll(wcs[:]); n > 0; n = k.cq.Poll(wcs[:]) {
		for i := range wcs[:n] {
			wc := &wcs[i]
			if wc.Opcode != verbs.WCRecv || wc.Status != verbs.WCSuccess {
				continue
			}
			at := wc.ID * kernelBuf
			k.got = append(k.got, gotSend{bytes.Clone(k.mem[at : at+uint64(wc.ByteLen)]), wc.Flags&verbs.WCSolicited != 0})
			if !k.noRepost {
				k.postRecv(wc.ID)
			}
		}
	}
}

// want waits for the next SEND.
func (k *kernelPeer) want(what string) gotSend {
	k.t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		k.poll()
		if len(k.got) > 0 {
			s := k.got[0]
			k.got = k.got[1:]
			if !rdshdr.Valid(s.data) || rdshdr.Header(s.data).Checksum() == 0 {
				k.t.Fatalf("%s: SEND without a valid checksum: %x", what, s.data[:min(48, len(s.data))])
			}
			if rdshdr.Header(s.data).Credit() != 0 {
				k.t.Fatalf("%s: credits", what)
			}
			return s
		}
		if time.Now().After(end) {
			k.t.Fatalf("%s: nothing arrives", what)
		}
	}
}

// wantIdle says that nothing arrives for d.
func (k *kernelPeer) wantIdle(what string, d time.Duration) {
	k.t.Helper()
	time.Sleep(d)
	k.poll()
	if len(k.got) > 0 {
		k.t.Fatalf("%s: but a SEND arrives: %s", what, describe(k.got[0].data))
	}
}

// wantMap waits for a congestion map: two SENDs.
func (k *kernelPeer) wantMap(what string) (m rdshdr.CongMap) {
	k.t.Helper()
	for i := range 2 {
		s := k.want(what)
		h := rdshdr.Header(s.data)
		if len(s.data) != 4144 || h.Seq() != 0 || h.Len() != 8192 || h.Flags() != 0x01 || h.SPort() != 0 || h.DPort() != 0 || s.solicited != (i == 1) {
			k.t.Fatalf("%s: part %d is %s, solicited %v", what, i, describe(s.data), s.solicited)
		}
		copy(m[i*4096:], s.data[48:])
		k.mapAck = h.Ack()
	}
	return m
}

type wantHdr struct {
	seq, ack     uint64
	len          int
	sport, dport uint16
	flags        uint8
	bytes        int // of the SEND
	se           bool
}

// wantSend waits for a SEND with exactly this header.
func (k *kernelPeer) wantSend(what string, w wantHdr) []byte {
	k.t.Helper()
	s := k.want(what)
	h := rdshdr.Header(s.data)
	g := wantHdr{h.Seq(), h.Ack(), int(h.Len()), h.SPort(), h.DPort(), h.Flags(), len(s.data), s.solicited}
	if g != w {
		k.t.Fatalf("%s:\n got %+v\nwant %+v", what, g, w)
	}
	return s.data[48:]
}

func describe(b []byte) string {
	if len(b) < 48 {
		return hex.EncodeToString(b)
	}
	h := rdshdr.Header(b)
	return "header " + hex.EncodeToString(h[:48]) + " and " + itoa(len(b)-48) + " bytes"
}

func itoa(n int) string { return string(appendInt(nil, n)) }

func appendInt(b []byte, n int) []byte {
	if n >= 10 {
		b = appendInt(b, n/10)
	}
	return append(b, byte('0'+n%10))
}

// write posts a SEND.
func (k *kernelPeer) write(data []byte) {
	k.t.Helper()
	i := uint64(kernelRecvs + k.sends%kernelSends)
	k.sends++
	copy(k.mem[i*kernelBuf:], data)
	_, err := k.qp.PostSend([]verbs.SendWR{{ID: 1 << 20, Opcode: verbs.OpSend, Flags: verbs.SendSignaled | verbs.SendSolicited,
		SGs: []verbs.SGE{{Addr: i * kernelBuf, Length: uint32(len(data)), LKey: k.mr.LKey()}}}})
	k.must(err)
}

func header(seq, ack uint64, n int, sport, dport uint16, flags uint8) []byte {
	b := make([]byte, 48)
	rdshdr.Put(b, seq, ack, uint32(n), sport, dport, flags, 0)
	return b
}

// writeMap sends a map as a kernel does.
func (k *kernelPeer) writeMap(m *rdshdr.CongMap) {
	h := header(0, 0, 8192, 0, 0, 1)
	k.write(append(bytes.Clone(h), m[:4096]...))
	k.write(append(bytes.Clone(h), m[4096:]...))
}

// writeMsg sends a message cut as a kernel cuts it.
func (k *kernelPeer) writeMsg(seq, ack uint64, p []byte, sport, dport uint16, flags uint8) {
	h := header(seq, ack, len(p), sport, dport, flags)
	for first := true; first || len(p) > 0; first = false {
		n := min(4096, len(p))
		k.write(append(bytes.Clone(h), p[:n]...))
		p = p[n:]
	}
}

// gone waits until the other side has ended the connection.
func (k *kernelPeer) wantGone(what string) {
	k.t.Helper()
	select {
	case <-k.ep.Done():
	case <-time.After(15 * time.Second):
		k.t.Fatalf("%s: the connection stays up", what)
	}
}

func (k *kernelPeer) close() {
	k.t.Helper()
	k.closed = true
	if k.ep != nil {
		k.ep.Disconnect()
	}
	for len(k.reqs) > 0 {
		close((<-k.reqs).done)
	}
	k.must(k.lis.Close())
	if k.qp != nil {
		k.must(k.qp.Close())
	}
	k.must(k.mr.Deregister())
	k.must(k.cq.Close())
	k.must(k.pd.Close())
	k.must(k.dev.Close())
}

// cmTap keeps the CM messages that cross a network.
type cmTap struct {
	mu   sync.Mutex
	msgs []cmMsg
}

type cmMsg struct {
	from netip.Addr
	attr cm.Attr
	mad  []byte
}

func tapCM(net *simnet.Net) *cmTap {
	tap := &cmTap{}
	net.SetTap(func(e simnet.Event) {
		var p roce.Packet
		if e.Kind != simnet.Sent || roce.Parse(e.Data, &p) != nil || p.BTH.DestQP() != 1 {
			return
		}
		if h, err := cm.PeekHeader(p.Payload); err == nil {
			tap.mu.Lock()
			tap.msgs = append(tap.msgs, cmMsg{e.From.Addr(), h.Attr, bytes.Clone(p.Payload)})
			tap.mu.Unlock()
		}
	})
	return tap
}

// find returns the first message of a kind from an address.
func (tap *cmTap) find(from netip.Addr, attr cm.Attr) []byte {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	for _, m := range tap.msgs {
		if m.from == from && m.attr == attr {
			return m.mad
		}
	}
	return nil
}

func (tap *cmTap) count(from netip.Addr, attr cm.Attr) int {
	tap.mu.Lock()
	defer tap.mu.Unlock()
	n := 0
	for _, m := range tap.msgs {
		if m.from == from && m.attr == attr {
			n++
		}
	}
	return n
}

var errState = verbs.QPAttr{State: verbs.StateErr}

const errStateMask = verbs.QPStateBit
