//go:build lab && linux

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// The differential test: one script of socket operations (rds-protocol spec 1.2 to 1.8), run by the AF_RDS program in the guest and with
// package rds on the host, each with the other one as its peer. What each operation answers has to be the same, an errno of
// the kernel's being matched by errors.Is, or the difference stands in docs/compatibility.md.

const differencesHeading = "## Socket semantics: the differences"

// outcome is what an operation answered.
type outcome struct {
	text string // what a call that succeeded said
	err  error  // of the kernel's a unix.Errno
	none bool   // there is no such operation
}

func (o outcome) String() string {
	var errno unix.Errno
	switch {
	case o.none:
		return "-"
	case o.err == nil:
		return o.text
	case errors.As(o.err, &errno) && o.err == error(errno):
		return errnoName(errno)
	}
	// What the kernel's users would recognise.
	for e := unix.Errno(1); e < 134; e++ {
		if errors.Is(o.err, e) {
			return errnoName(e)
		}
	}
	return o.err.Error()
}

func errnoName(e unix.Errno) string {
	if e == unix.EOPNOTSUPP { // and ENOTSUP
		return "EOPNOTSUPP"
	}
	return unix.ErrnoName(e)
}

// same reports whether ours answers as the kernel does.
func (kernel outcome) same(ours outcome) bool {
	if kernel.none || ours.none {
		return kernel.none == ours.none
	}
	if kernel.err != nil {
		return ours.err != nil && errors.Is(ours.err, kernel.err)
	}
	return ours.err == nil && ours.text == kernel.text
}

func ok(err error) outcome { return outcome{text: "ok", err: err} }

var impossible = outcome{none: true}

// side is one of the two kinds of RDS.
type side interface {
	addr4() netip.Addr
	addr6() netip.Addr
	linkLocal() netip.Addr // with its zone
	socket() sock          // not bound
	// raw makes a system call on a new socket, bound to addr4 if so asked: for what cannot be said with the other side's types.
	raw(bound bool, c Call) outcome
}

// sock is a socket of a side.
type sock interface {
	bind(netip.AddrPort) outcome
	transport(int) outcome // SO_RDS_TRANSPORT, the kernel's numbers
	getTransport() outcome
	connect(netip.AddrPort) outcome
	send(sending) outcome
	recv(receiving) outcome
	buffers(snd, rcv int) outcome
	name() outcome
	peerName() outcome
	setTOS(uint8) outcome
	getTOS() outcome
	cancel(netip.AddrPort) outcome
	recvErr(on bool) outcome
	monitor(on bool) outcome
	timestamp(on bool) outcome
	latency() outcome
	freeMR(cookie uint64) outcome
	close()

	at() netip.AddrPort

	readySock
}

// sending is a datagram of a pattern.
type sending struct {
	to    netip.AddrPort // invalid: none
	size  int
	seed  uint32
	wait  time.Duration // 0: not at all
	flags int           // the kernel's
	// Of a datagram that carries something.
	cookie   uint64 // RDS_CMSG_RDMA_DEST
	segments int    // RDS_CMSG_RDMA_ARGS with that many, negative: 0, of segment bytes
	segment  int
}

type receiving struct {
	size        int
	seed        uint32 // of the pattern that is expected
	wait        time.Duration
	peek, trunc bool
}

// received is the text of a datagram.
func received(n, size int, p []byte, seed uint32, cut, stamped, timed bool, from netip.AddrPort) string {
	s := fmt.Sprintf("%d", n)
	if cut {
		s += " cut"
	}
	want := make([]byte, min(n, size))
	pattern(want, seed)
	if p != nil && string(p[:len(want)]) != string(want) || p == nil && n > 0 {
		s += " garbage"
	}
	if stamped {
		s += " stamped"
	}
	if timed {
		s += " timed"
	}
	if !from.IsValid() {
		return s + " from nobody"
	}
	return s + fmt.Sprintf(" from port %d", from.Port())
}

// kernelSide is the guest's.
type kernelSide struct {
	k      *kernelEnd
	v4, v6 netip.Addr
	ll     netip.Addr
}

func (s *kernelSide) addr4() netip.Addr     { return s.v4 }
func (s *kernelSide) addr6() netip.Addr     { return s.v6 }
func (s *kernelSide) linkLocal() netip.Addr { return s.ll }

func (s *kernelSide) socket() sock {
	s.k.t.Helper()
	r := s.k.do(Call{Call: callSocket, Level: unix.SOCK_SEQPACKET})
	if r.Errno != 0 {
		s.k.t.Fatalf("socket: %v", r.Errno)
	}
	return &kernelSock{s.k, r.N}
}

func (s *kernelSide) raw(bound bool, c Call) outcome {
	if c.Call == callSocket {
		return outcomeOf(s.k.do(c), "ok")
	}
	so := s.socket().(*kernelSock)
	defer so.close()
	if bound {
		so.bind(netip.AddrPortFrom(s.v4, 0))
	}
	c.ID = so.id
	r := s.k.do(c)
	text := "ok"
	switch c.Call {
	case callSend, callRecv:
		text = fmt.Sprint(r.N)
	case callPoll:
		text = readyText(r.Flags)
	case callSockName:
		text = fmt.Sprintf("family %d, %d bytes", binary.NativeEndian.Uint16(r.Name), len(r.Name))
	}
	return outcomeOf(r, text)
}

func outcomeOf(r Outcome, text string) outcome {
	if r.Errno != 0 {
		return outcome{err: r.Errno}
	}
	return outcome{text: text}
}

type kernelSock struct {
	k  *kernelEnd
	id int
}

func (s *kernelSock) do(c Call) Outcome {
	s.k.t.Helper()
	c.ID = s.id
	return s.k.do(c)
}

func (s *kernelSock) set(level, num int, data []byte) outcome {
	return outcomeOf(s.do(Call{Call: callSetOpt, Level: level, Num: num, Data: data}), "ok")
}

func (s *kernelSock) setInt(level, num, v int) outcome {
	return s.set(level, num, binary.NativeEndian.AppendUint32(nil, uint32(v)))
}

func (s *kernelSock) bind(at netip.AddrPort) outcome {
	return outcomeOf(s.do(Call{Call: callBind, Name: rawAddr(at)}), "ok")
}

func (s *kernelSock) transport(n int) outcome { return s.setInt(solRDS, optTransport, n) }

func (s *kernelSock) getTransport() outcome {
	r := s.do(Call{Call: callGetOpt, Level: solRDS, Num: optTransport, Data: make([]byte, 4)})
	return outcomeOf(r, fmt.Sprint(int32(binary.NativeEndian.Uint32(r.Data))))
}

func (s *kernelSock) connect(to netip.AddrPort) outcome {
	return outcomeOf(s.do(Call{Call: callConnect, Name: rawAddr(to)}), "ok")
}

func timeval(d time.Duration) []byte {
	tv := unix.NsecToTimeval(int64(d))
	return binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, uint64(tv.Sec)), uint64(tv.Usec))
}

func (s *kernelSock) send(m sending) outcome {
	c := Call{Call: callSend, Size: m.size, Seed: m.seed, Flags: m.flags}
	if m.to.IsValid() {
		c.Name = rawAddr(m.to)
	}
	if m.wait == 0 {
		c.Flags |= unix.MSG_DONTWAIT
	} else {
		s.set(unix.SOL_SOCKET, unix.SO_SNDTIMEO, timeval(m.wait))
	}
	ne := binary.NativeEndian
	if m.cookie != 0 {
		c.Cmsgs = append(c.Cmsgs, Cmsg{Level: solRDS, Type: cmsgRDMADest, Data: ne.AppendUint64(nil, m.cookie)})
	}
	if m.segments != 0 {
		n := max(m.segments, 0)
		d := ne.AppendUint64(nil, 1)
		d = ne.AppendUint64(d, 0)
		d = ne.AppendUint64(d, uint64(n*m.segment))
		d = ne.AppendUint64(d, 0)
		d = ne.AppendUint64(d, uint64(n))
		c.Cmsgs = append(c.Cmsgs, Cmsg{Level: solRDS, Type: cmsgRDMAArgs, Data: append(d, make([]byte, 16)...), Vector: n})
	}
	r := s.do(c)
	return outcomeOf(r, fmt.Sprint(r.N))
}

func (s *kernelSock) recv(m receiving) outcome {
	c := Call{Call: callRecv, Size: m.size}
	if m.wait == 0 {
		c.Flags |= unix.MSG_DONTWAIT
	} else {
		s.set(unix.SOL_SOCKET, unix.SO_RCVTIMEO, timeval(m.wait))
	}
	if m.peek {
		c.Flags |= unix.MSG_PEEK
	}
	if m.trunc {
		c.Flags |= unix.MSG_TRUNC
	}
	r := s.do(c)
	if r.Errno != 0 {
		return outcome{err: r.Errno}
	}
	stamped, timed := false, false
	for _, c := range r.Cmsgs {
		stamped = stamped || c.Level == unix.SOL_SOCKET
		timed = timed || c.Level == solRDS && c.Type == cmsgPathLatency && c.Data[0] == 3
	}
	// The program has the content's checksum.
	p := make([]byte, min(r.N, m.size))
	pattern(p, m.seed)
	if crc(p) != r.Sum {
		p = nil
	}
	return outcome{text: received(r.N, m.size, p, m.seed, r.Flags&unix.MSG_TRUNC != 0, stamped, timed, parseRawAddr(r.Name))}
}

func (s *kernelSock) buffers(snd, rcv int) outcome {
	for opt, n := range map[int]int{unix.SO_SNDBUFFORCE: snd, unix.SO_RCVBUFFORCE: rcv} {
		if n > 0 {
			if o := s.setInt(unix.SOL_SOCKET, opt, n); o.err != nil {
				return o
			}
		}
	}
	return ok(nil)
}

func (s *kernelSock) name() outcome {
	r := s.do(Call{Call: callSockName})
	return outcomeOf(r, parseRawAddr(r.Name).Addr().String())
}

func (s *kernelSock) at() netip.AddrPort {
	ap := parseRawAddr(s.do(Call{Call: callSockName}).Name)
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func (s *kernelSock) peerName() outcome {
	r := s.do(Call{Call: callPeerName})
	return outcomeOf(r, parseRawAddr(r.Name).String())
}

func (s *kernelSock) setTOS(tos uint8) outcome {
	return outcomeOf(s.do(Call{Call: callIoctl, Num: siocSetTOS, Data: []byte{tos}}), "ok")
}

func (s *kernelSock) getTOS() outcome {
	r := s.do(Call{Call: callIoctl, Num: siocGetTOS, Data: make([]byte, 1)})
	return outcomeOf(r, fmt.Sprint(r.Data))
}

func (s *kernelSock) cancel(to netip.AddrPort) outcome {
	return s.set(solRDS, optCancelSentTo, rawAddr(to))
}

func (s *kernelSock) bool(level, num int, on bool) outcome {
	v := 0
	if on {
		v = 1
	}
	return s.setInt(level, num, v)
}

func (s *kernelSock) recvErr(on bool) outcome {
	if o := s.bool(solRDS, optRecvErr, on); o.err != nil {
		return o
	}
	r := s.do(Call{Call: callGetOpt, Level: solRDS, Num: optRecvErr, Data: make([]byte, 4)})
	return outcomeOf(r, fmt.Sprint(binary.NativeEndian.Uint32(r.Data) != 0))
}

func (s *kernelSock) monitor(on bool) outcome { return s.bool(solRDS, optCongMonitor, on) }
func (s *kernelSock) timestamp(on bool) outcome {
	return s.bool(solRDS, unix.SO_TIMESTAMP, on) // the level is the kernel's own idea (rds-protocol spec 1.7)
}
func (s *kernelSock) latency() outcome { return s.set(solRDS, optPathLatency, []byte{3, 0, 1, 2}) }

func (s *kernelSock) freeMR(cookie uint64) outcome {
	return s.set(solRDS, optFreeMR, binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, cookie), 0))
}

func (s *kernelSock) close() { s.do(Call{Call: callClose}) }

// ourSide is the host's.
type ourSide struct {
	t      testing.TB
	svc    *rds.Service
	v4, v6 netip.Addr
	ll     netip.Addr
}

func (s *ourSide) addr4() netip.Addr        { return s.v4 }
func (s *ourSide) addr6() netip.Addr        { return s.v6 }
func (s *ourSide) linkLocal() netip.Addr    { return s.ll }
func (s *ourSide) socket() sock             { return &ourSock{side: s, lc: rds.ListenConfig{Service: s.svc}} }
func (*ourSide) raw(bool, Call) outcome     { return impossible }
func (s *ourSide) context() context.Context { return s.t.Context() }

type ourSock struct {
	side *ourSide
	lc   rds.ListenConfig // of one that is not bound
	s    *rds.Socket
	mem  []*rds.Region
}

func (s *ourSock) bind(at netip.AddrPort) outcome {
	if s.s != nil {
		return impossible
	}
	var err error
	s.s, err = s.lc.Bind(s.side.context(), at)
	return ok(err)
}

func (s *ourSock) transport(n int) outcome {
	if s.s != nil {
		return impossible
	}
	s.lc.Transport = map[int]rds.Transport{transportIB: rds.TransportIB, transportTCP: rds.TransportTCP}[n]
	if s.lc.Transport == rds.TransportAny {
		s.lc.Transport = rds.TransportTCP + 1
	}
	return ok(nil) // its error is that of bind
}

func (s *ourSock) getTransport() outcome {
	if s.s == nil {
		return impossible
	}
	return outcome{text: map[rds.Transport]string{rds.TransportIB: "0", rds.TransportTCP: "2"}[s.s.Transport()]}
}

func (s *ourSock) connect(to netip.AddrPort) outcome {
	if s.s == nil {
		return impossible
	}
	return ok(s.s.ConnectAddrPort(to))
}

func (s *ourSock) send(m sending) outcome {
	if s.s == nil {
		return impossible
	}
	p := make([]byte, m.size)
	pattern(p, m.seed)
	if m.flags != 0 {
		n, err := s.s.WriteBatch([]rds.BatchMessage{{Buffers: [][]byte{p}, Addr: m.to}}, rds.Flags(m.flags))
		return outcome{text: fmt.Sprint(n * len(p)), err: err}
	}
	msg := rds.Message{Peer: m.to, Data: p, Cookie: rds.Cookie(m.cookie)}
	if m.segments != 0 {
		msg.RDMA = &rds.RDMA{Op: rds.RDMARead, Remote: 1}
		for range m.segments {
			if s.mem == nil {
				r, err := s.s.RegisterRegion(s.side.context(), make([]byte, 1<<20), rds.RegionOptions{})
				if err != nil {
					return outcome{err: err}
				}
				s.mem = append(s.mem, r)
			}
			msg.RDMA.Local = append(msg.RDMA.Local, s.mem[0].Piece(0, m.segment))
		}
	}
	var err error
	if m.wait == 0 {
		err = s.s.TrySend(msg)
	} else {
		_ = s.s.SetWriteDeadline(time.Now().Add(m.wait))
		err = s.s.Send(s.side.context(), msg)
		_ = s.s.SetWriteDeadline(time.Time{})
	}
	return outcome{text: fmt.Sprint(len(p)), err: err}
}

func (s *ourSock) recv(m receiving) outcome {
	if s.s == nil {
		return impossible
	}
	var flags rds.Flags
	if m.wait == 0 {
		flags |= rds.MsgDontWait
	} else {
		_ = s.s.SetReadDeadline(time.Now().Add(m.wait))
		defer s.s.SetReadDeadline(time.Time{})
	}
	if s.lc.Timestamps || s.lc.ReceiveLatency { // only a Message has these
		msg, err := s.s.Receive(s.side.context())
		if err != nil {
			return outcome{err: err}
		}
		defer msg.Release()
		return outcome{text: received(msg.Len(), m.size, msg.Bytes(), m.seed, msg.Len() > m.size, !msg.Time.IsZero(), msg.Latency.QueuedToDelivered > 0, msg.Peer)}
	}
	if m.peek {
		flags |= rds.MsgPeek
	}
	if m.trunc {
		flags |= rds.MsgTrunc
	}
	p := make([]byte, m.size)
	n, from, out, err := s.s.ReadMsg(p, flags)
	if errors.Is(err, io.ErrShortBuffer) && out&rds.MsgTrunc != 0 {
		err = nil // said twice: a Go program that does not look at flags notices too
	}
	if err != nil {
		return outcome{err: err}
	}
	return outcome{text: received(n, m.size, p, m.seed, out&rds.MsgTrunc != 0, false, false, from)}
}

func (s *ourSock) buffers(snd, rcv int) outcome {
	if s.s == nil {
		s.lc.WriteBuffer, s.lc.ReadBuffer = snd, rcv
		return ok(nil)
	}
	var errs []error
	if snd > 0 {
		errs = append(errs, s.s.SetWriteBuffer(snd))
	}
	if rcv > 0 {
		errs = append(errs, s.s.SetReadBuffer(rcv))
	}
	return ok(errors.Join(errs...))
}

func (s *ourSock) name() outcome {
	if s.s == nil {
		return impossible
	}
	return outcome{text: s.s.AddrPort().Addr().String()}
}

func (s *ourSock) at() netip.AddrPort { return s.s.AddrPort() }

func (s *ourSock) peerName() outcome {
	if s.s == nil {
		return impossible
	}
	if s.s.RemoteAddr() == nil {
		return outcome{text: "nil"}
	}
	return outcome{text: s.s.RemoteAddr().String()}
}

func (s *ourSock) setTOS(tos uint8) outcome {
	if s.s == nil {
		return impossible
	}
	return ok(s.s.SetTypeOfService(tos))
}

func (s *ourSock) getTOS() outcome { return outcome{text: fmt.Sprint([]byte{s.s.TypeOfService()})} }

func (s *ourSock) cancel(to netip.AddrPort) outcome {
	if s.s == nil {
		return impossible
	}
	_, err := s.s.Cancel(to)
	return ok(err)
}

func (s *ourSock) recvErr(on bool) outcome {
	s.s.SetRecvErr(on)
	return outcome{text: fmt.Sprint(s.s.RecvErr())}
}

func (s *ourSock) monitor(on bool) outcome { return ok(s.s.SetCongestionMonitor(on)) }

func (s *ourSock) timestamp(on bool) outcome {
	s.lc.Timestamps = on
	return ok(s.s.SetTimestamps(on))
}

func (s *ourSock) latency() outcome {
	s.lc.ReceiveLatency = true
	return ok(s.s.SetReceiveLatency(true))
}

func (s *ourSock) freeMR(cookie uint64) outcome {
	if cookie == 0 {
		return ok(s.side.svc.FlushRegions(s.side.context()))
	}
	return ok(s.s.FreeRegion(rds.Cookie(cookie), false))
}

func (s *ourSock) close() {
	if s.s != nil {
		_ = s.s.Close()
	}
}

// play is a run of the script by one side.
type play struct {
	t         *testing.T
	near, far side
	order     []string
	said      map[string][]outcome
}

// is notes what operations of the near side answered.
func (x *play) is(what string, os ...outcome) {
	x.t.Helper()
	if _, twice := x.said[what]; !twice {
		x.order = append(x.order, what)
	}
	x.said[what] = append(x.said[what], os...)
}

// bound is a socket of a side's at a port (0: any) of its IPv4 address.
func (x *play) bound(s side, port uint16) sock {
	x.t.Helper()
	so := s.socket()
	if o := so.bind(netip.AddrPortFrom(s.addr4(), port)); o.err != nil {
		x.t.Fatalf("bind: %v", o.err)
	}
	return so
}

// nobody is an address of the link that nobody has: what is sent there waits.
var nobody = netip.MustParseAddrPort("10.77.0.9:4000")

func (x *play) binds() {
	near := x.near
	v4, v6 := near.addr4(), near.addr6()
	bind := func(what string, at netip.AddrPort) {
		x.t.Helper()
		s := near.socket()
		defer s.close()
		x.is("bind: "+what, s.bind(at))
	}
	port := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 4200) }
	parse := netip.MustParseAddr
	bind("IPv4, port 0", netip.AddrPortFrom(v4, 0))
	bind("IPv6, port 0", netip.AddrPortFrom(v6, 0))
	bind("127.0.0.1", port(parse("127.0.0.1")))
	bind("0.0.0.0", port(parse("0.0.0.0")))
	bind("255.255.255.255", port(parse("255.255.255.255")))
	bind("224.0.0.1", port(parse("224.0.0.1")))
	bind("::", port(parse("::")))
	bind("::ffff:0.0.0.0", port(parse("::ffff:0.0.0.0")))
	bind("ff02::1", port(parse("ff02::1")))
	bind("fe80::1 without a zone", port(parse("fe80::1")))
	bind("link-local, zone", port(near.linkLocal()))
	bind("port 1", netip.AddrPortFrom(v4, 1))
	bind("an address of somebody else", port(x.far.addr4()))
	bind("an address of nobody", port(nobody.Addr()))
	bind("an IPv6 address of nobody", port(parse("fd00:77::fff0")))

	s := near.socket()
	s.bind(netip.AddrPortFrom(v4, 0))
	if at := s.at(); at.Addr() == v4 && at.Port() > 1 {
		x.is("bind: the port chosen", outcome{text: "above 1"})
	} else {
		x.is("bind: the port chosen", outcome{text: at.String()})
	}
	x.is("bind: a second time", s.bind(port(v4)), s.bind(s.at()))
	bind("an address in use", s.at())
	bind("an address in use, mapped", netip.AddrPortFrom(netip.AddrFrom16(v4.As16()), s.at().Port()))
	bind("the same port of another address", netip.AddrPortFrom(v6, s.at().Port()))
	used := s.at()
	s.close()
	bind("an address that was in use", used)

	m := near.socket()
	x.is("bind: a mapped address", m.bind(netip.AddrPortFrom(netip.AddrFrom16(v4.As16()), 0)))
	x.is("getsockname: of a mapped address", outcome{text: strings.ReplaceAll(m.name().String(), v4.String(), "address")})
	m.close()

	for _, l := range []struct {
		n    int
		text string
	}{{transportIB, "InfiniBand"}, {transportTCP, "TCP"}, {3, "none there is"}} {
		s := near.socket()
		// Ours is told of its transport, and refuses it, when it is bound.
		a, b := s.transport(l.n), s.bind(netip.AddrPortFrom(v4, 0))
		if a.err != nil {
			b = a
		}
		x.is("SO_RDS_TRANSPORT: "+l.text, b)
		if b.err == nil && l.n == transportIB {
			x.is("SO_RDS_TRANSPORT: what it was bound with", s.getTransport())
			x.is("SO_RDS_TRANSPORT: once bound", s.transport(transportIB))
		}
		s.close()
	}
	unbound := near.socket()
	x.is("SO_RDS_TRANSPORT: read before bind", unbound.getTransport())
	unbound.close()

	addr := rawAddr(port(v4))
	x.is("bind: a short address", near.raw(false, Call{Call: callBind, Name: addr[:1]}), near.raw(false, Call{Call: callBind, Name: addr[:15]}),
		near.raw(false, Call{Call: callBind, Name: rawAddr(port(v6))[:27]}))
	x.is("bind: another family", near.raw(false, Call{Call: callBind, Name: append([]byte{unix.AF_UNIX, 0}, make([]byte, 30)...)}))
	x.is("socket: SOCK_DGRAM, a protocol", near.raw(false, Call{Call: callSocket, Level: unix.SOCK_DGRAM}),
		near.raw(false, Call{Call: callSocket, Level: unix.SOCK_SEQPACKET, Num: 1}))
}

func (x *play) connects() {
	near, far := x.near, x.far
	peer := netip.AddrPortFrom(far.addr4(), 4201)
	s := x.bound(near, 0)
	x.is("getpeername: not connected", s.peerName())
	x.is("send: no destination", s.send(sending{size: 1}))
	parse := netip.MustParseAddr
	for _, a := range []string{"0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "fe80::1", "::ffff:0.0.0.0", "::ffff:224.0.0.1"} {
		x.is("connect: "+a, s.connect(netip.AddrPortFrom(parse(a), 4201)))
	}
	x.is("connect: the other IP version", s.connect(netip.AddrPortFrom(far.addr6(), 4201)))
	x.is("connect: port 0", s.connect(netip.AddrPortFrom(far.addr4(), 0)))
	x.is("connect: again", s.connect(peer))
	o := s.peerName()
	x.is("getpeername: connected", outcome{text: strings.Replace(o.text, far.addr4().String(), "peer", 1), err: o.err})
	s.close()

	l := near.socket()
	if o := l.bind(netip.AddrPortFrom(near.linkLocal(), 0)); o.err != nil {
		x.t.Errorf("bind to %v: %v", near.linkLocal(), o.err)
	}
	zone := netip.AddrPortFrom(parse("fe80::1").WithZone("1"), 4201)
	x.is("connect: another zone", l.connect(zone))
	x.is("send: to another zone", l.send(sending{to: zone}))
	l.close()
	z := near.socket()
	x.is("bind: in another zone than it is connected to", z.connect(zone), z.bind(netip.AddrPortFrom(near.linkLocal(), 0)))
	z.close()

	u := near.socket()
	x.is("connect: before bind", u.connect(peer))
	x.is("bind: once connected", u.bind(netip.AddrPortFrom(near.addr4(), 0)))
	u.close()

	addr := rawAddr(peer)
	x.is("connect: a short address", near.raw(true, Call{Call: callConnect, Name: addr[:1]}), near.raw(true, Call{Call: callConnect, Name: addr[:15]}),
		near.raw(true, Call{Call: callConnect, Name: rawAddr(netip.AddrPortFrom(far.addr6(), 1))[:27]}))
	x.is("connect: AF_UNSPEC", near.raw(true, Call{Call: callConnect, Name: make([]byte, 16)}))
	x.is("listen, accept, shutdown", near.raw(true, Call{Call: callListen, Num: 1}), near.raw(true, Call{Call: callAccept}), near.raw(true, Call{Call: callShutdown}))
	x.is("getsockname: not bound", near.raw(false, Call{Call: callSockName}))

	// A default destination does not keep others from sending.
	s = x.bound(near, 0)
	defer s.close()
	a, b := x.bound(far, 0), x.bound(far, 0)
	defer a.close()
	defer b.close()
	s.connect(a.at())
	x.is("send: to the default destination", s.send(sending{size: 10, seed: 1, wait: stepLimit}))
	x.arrives("send: to the default destination, arrives", a, 10, 1)
	b.send(sending{to: s.at(), size: 20, seed: 2, wait: stepLimit})
	o = s.recv(receiving{size: 100, seed: 2, wait: stepLimit})
	x.is("recv: from another than the default destination", from(o, b))
}

// from replaces the port of a socket in a received datagram's text.
func from(o outcome, s sock) outcome {
	o.text = strings.Replace(o.text, fmt.Sprintf("from port %d", s.at().Port()), "from it", 1)
	return o
}

// arrives checks what the far side has.
func (x *play) arrives(what string, s sock, n int, seed uint32) {
	x.t.Helper()
	o := s.recv(receiving{size: 2 << 20, seed: seed, wait: stepLimit})
	if !strings.HasPrefix(o.text, fmt.Sprintf("%d from", n)) {
		x.t.Errorf("%s: %v, want %d bytes", what, o, n)
	}
}

func (x *play) sends() {
	near, far := x.near, x.far
	parse := netip.MustParseAddr
	f := x.bound(far, 0)
	defer f.close()
	to := f.at()
	s := x.bound(near, 0)
	defer s.close()
	s.buffers(2<<20, 0)
	for _, a := range []string{"0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "fe80::1", "::ffff:0.0.0.0"} {
		x.is("send: to "+a, s.send(sending{to: netip.AddrPortFrom(parse(a), 4201), size: 1}))
	}
	six := netip.AddrPortFrom(far.addr6(), 4201)
	x.is("send: to the other IP version", s.send(sending{to: six, size: 1}))
	const tooLong = 1<<20 + 1
	x.is("send: 1 MiB and 1 byte", s.send(sending{to: to, size: tooLong}))
	x.is("send: too long, to nowhere", s.send(sending{size: tooLong}))
	x.is("send: too long, to 0.0.0.0", s.send(sending{to: netip.AddrPortFrom(parse("0.0.0.0"), 1), size: tooLong}))
	x.is("send: too long, to the other IP version", s.send(sending{to: six, size: tooLong}))
	x.is("send: 1 MiB", s.send(sending{to: to, size: 1 << 20, seed: 3, wait: stepLimit}))
	x.arrives("1 MiB", f, 1<<20, 3)
	x.is("send: nothing", s.send(sending{to: to, wait: stepLimit}))
	x.arrives("nothing", f, 0, 0)
	x.is("send: to a port that nobody has bound", s.send(sending{to: netip.AddrPortFrom(to.Addr(), 9), size: 5, wait: stepLimit}))
	mapped := netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port())
	x.is("send: to a mapped address", s.send(sending{to: mapped, size: 7, seed: 4, wait: stepLimit}))
	x.arrives("to a mapped address", f, 7, 4)
	for what, flag := range map[string]int{"MSG_NOSIGNAL": unix.MSG_NOSIGNAL, "MSG_MORE": unix.MSG_MORE, "MSG_OOB": unix.MSG_OOB} {
		x.is("send: "+what, s.send(sending{to: to, size: 1, flags: flag}))
	}

	// The send buffer, towards nobody, who acknowledges nothing.
	b := x.bound(near, 0)
	defer b.close()
	b.buffers(10000, 0)
	x.is("send: longer than the send buffer", b.send(sending{to: nobody, size: 10001}))
	x.is("send: longer than the send buffer, to nowhere", b.send(sending{size: 10001}))
	x.is("send: as long as the send buffer less 1", b.send(sending{to: nobody, size: 9999}))
	x.is("send: past the send buffer", b.send(sending{to: nobody, size: 10000}))
	x.is("send: into a full buffer", b.send(sending{to: nobody, size: 1}))
	x.is("send: nothing, into a full buffer", b.send(sending{to: nobody}))
	x.is("send: into a full buffer, waiting", b.send(sending{to: nobody, size: 1, wait: 200 * time.Millisecond}))
	x.is("send: longer than a full buffer", b.send(sending{to: nobody, size: 10001}))
	x.is("RDS_CANCEL_SENT_TO: another port", b.cancel(netip.AddrPortFrom(nobody.Addr(), 4001)), b.send(sending{to: nobody, size: 1}))
	x.is("RDS_CANCEL_SENT_TO", b.cancel(nobody))
	x.is("send: after RDS_CANCEL_SENT_TO", b.send(sending{to: nobody, size: 10000}))
	x.is("send: when the buffer is exactly full", b.send(sending{to: nobody}))
	b.cancel(nobody)
	x.is("RDS_CANCEL_SENT_TO: nothing there", b.cancel(nobody), b.cancel(to))
	x.is("RDS_CANCEL_SENT_TO: 0.0.0.0", b.cancel(netip.AddrPortFrom(parse("0.0.0.0"), 4000)))

	// Congestion.
	c := x.bound(far, 0)
	defer c.close()
	c.buffers(0, 20000)
	sent := 0
	var last outcome
	for ; sent < 1000; sent++ {
		if last = s.send(sending{to: c.at(), size: 4000, seed: uint32(sent)}); last.err != nil {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	x.is("send: to a congested port", last)
	x.is("send: nothing, to a congested port", s.send(sending{to: c.at()}))
	x.is("send: to another port of that host", s.send(sending{to: to, size: 6, seed: 5, wait: stepLimit}))
	x.arrives("another port", f, 6, 5)
	full := x.bound(near, 0)
	defer full.close()
	full.buffers(10000, 0)
	full.send(sending{to: nobody, size: 10000})
	x.is("send: to a congested port, with a full buffer", full.send(sending{to: c.at(), size: 1}))
	full.cancel(nobody)
	waited := make(chan outcome, 1)
	go func() { waited <- s.send(sending{to: c.at(), size: 1, seed: 6, wait: 300 * time.Millisecond}) }()
	select {
	case o := <-waited:
		x.is("send: to a congested port, waiting with a time limit", o)
	case <-time.After(2 * time.Second):
		x.is("send: to a congested port, waiting with a time limit", outcome{text: "waits on"})
	}
	for i := range sent {
		x.arrives(fmt.Sprintf("datagram %d to the congested port", i), c, 4000, uint32(i))
	}
	go func() { waited <- s.send(sending{to: c.at(), size: 1, seed: 6, wait: stepLimit}) }()
	x.is("send: to a port that was congested", <-waited)

	x.is("send: not bound", near.raw(false, Call{Call: callSend, Name: rawAddr(to), Size: 1}), near.raw(false, Call{Call: callSend, Size: 1}))
	x.is("send: a short address", near.raw(true, Call{Call: callSend, Name: rawAddr(to)[:15], Size: 1}), near.raw(true, Call{Call: callSend, Name: rawAddr(six)[:27], Size: 1}))
	x.is("send: another family", near.raw(true, Call{Call: callSend, Name: append([]byte{unix.AF_UNIX, 0}, make([]byte, 30)...), Size: 1}))
	carry := func(flags int, cs ...Cmsg) outcome {
		return near.raw(true, Call{Call: callSend, Name: rawAddr(to), Size: 1, Flags: flags | unix.MSG_DONTWAIT, Cmsgs: cs})
	}
	cmsg := func(typ, n int) outcome { return carry(0, Cmsg{Level: solRDS, Type: typ, Data: make([]byte, n)}) }
	x.is("send: RDMA_ARGS too short", cmsg(cmsgRDMAArgs, 48))
	x.is("send: control messages of types 4, 10 and 99", cmsg(4, 16), cmsg(10, 4), cmsg(99, 8))
	x.is("send: control message of another level", carry(0, Cmsg{Level: unix.SOL_SOCKET, Type: 99, Data: make([]byte, 8)}))
	x.is("send: RDMA_DEST too short", cmsg(cmsgRDMADest, 4))
	x.is("send: MSG_ZEROCOPY without a cookie", carry(unix.MSG_ZEROCOPY))
	x.is("send: ZCOPY_COOKIE without MSG_ZEROCOPY", cmsg(cmsgZcopyCookie, 4))

	// Operations on memory.
	x.is("send: a cookie and an operation", s.send(sending{to: to, size: 1, cookie: 1, segments: 1, segment: 10}))
	x.is("send: an operation of no segments", s.send(sending{to: to, size: 1, segments: -1}))
	x.is("send: an operation of 1025 segments", s.send(sending{to: to, size: 1, segments: 1025, segment: 1}))
	x.is("send: an operation of 1 MiB and 1 byte", s.send(sending{to: to, size: 1, segments: 3, segment: 1<<20/3 + 1}))
	x.is("send: a cookie of nothing", s.send(sending{to: to, size: 1, cookie: 12345}))
	x.is("RDS_FREE_MR: a cookie of nothing", s.freeMR(12345))
	x.is("RDS_FREE_MR: cookie 0", s.freeMR(0))
}

func (x *play) receives() {
	near, far := x.near, x.far
	s := x.bound(near, 0)
	defer s.close()
	f := x.bound(far, 0)
	defer f.close()
	f.buffers(2<<20, 0)
	x.is("recv: nothing there", s.recv(receiving{size: 10}))
	x.is("recv: nothing there, waiting", s.recv(receiving{size: 10, wait: 200 * time.Millisecond}))
	send := func(size int, seed uint32) {
		x.t.Helper()
		if o := f.send(sending{to: s.at(), size: size, seed: seed, wait: stepLimit}); o.err != nil {
			x.t.Fatalf("the peer's send: %v", o.err)
		}
	}
	recv := func(what string, r receiving) {
		x.t.Helper()
		r.wait = stepLimit
		x.is("recv: "+what, from(s.recv(r), f))
	}
	send(100, 1)
	send(5000, 2)
	recv("cut", receiving{size: 10, seed: 1})
	recv("what follows one that was cut", receiving{size: 6000, seed: 2})
	send(100, 3)
	recv("cut, its length asked for", receiving{size: 10, seed: 3, trunc: true})
	send(50, 4)
	send(60, 5)
	recv("peek", receiving{size: 100, seed: 4, peek: true})
	recv("peek again, cut", receiving{size: 10, seed: 4, peek: true})
	recv("peek, its length asked for", receiving{size: 10, seed: 4, peek: true, trunc: true})
	recv("after a peek", receiving{size: 100, seed: 4})
	recv("the next", receiving{size: 60, seed: 5})
	send(0, 0)
	send(0, 0)
	send(1, 6)
	recv("an empty datagram", receiving{size: 10})
	recv("an empty datagram into no buffer", receiving{size: 0})
	recv("1 byte into no buffer", receiving{size: 0})
	send(1<<20, 7)
	recv("1 MiB", receiving{size: 1 << 20, seed: 7})
	x.is("recv: nothing there any more", s.recv(receiving{size: 10}))
	s.send(sending{to: netip.AddrPortFrom(far.addr4(), 0), wait: stepLimit})
	x.is("recv: a pong", s.recv(receiving{size: 10, wait: stepLimit}))

	stamps := x.bound(near, 0)
	defer stamps.close()
	x.is("SO_TIMESTAMP", stamps.timestamp(true))
	f.send(sending{to: stamps.at(), size: 9, seed: 8, wait: stepLimit})
	x.is("SO_TIMESTAMP: recv", from(stamps.recv(receiving{size: 10, seed: 8, wait: stepLimit}), f))
	paths := x.bound(near, 0)
	defer paths.close()
	x.is("SO_RDS_MSG_RXPATH_LATENCY", paths.latency())
	f.send(sending{to: paths.at(), size: 9, seed: 9, wait: stepLimit})
	x.is("SO_RDS_MSG_RXPATH_LATENCY: recv", from(paths.recv(receiving{size: 10, seed: 9, wait: stepLimit}), f))

	// On one host.
	other := x.bound(near, 0)
	defer other.close()
	other.send(sending{to: s.at(), size: 11, seed: 10, wait: stepLimit})
	x.is("recv: from a socket of the same address", from(s.recv(receiving{size: 20, seed: 10, wait: stepLimit}), other))
	s.send(sending{to: s.at(), size: 12, seed: 11, wait: stepLimit})
	x.is("recv: from itself", from(s.recv(receiving{size: 20, seed: 11, wait: stepLimit}), s))

	x.is("recv: not bound", near.raw(false, Call{Call: callRecv, Size: 10, Flags: unix.MSG_DONTWAIT}))
	x.is("recv: MSG_OOB", near.raw(true, Call{Call: callRecv, Size: 10, Flags: unix.MSG_OOB}))
}

func (x *play) options() {
	near, far := x.near, x.far
	f := x.bound(far, 0)
	defer f.close()
	s := x.bound(near, 0)
	defer s.close()
	x.is("SIOCRDSGETTOS: not set", s.getTOS())
	x.is("SIOCRDSSETTOS: 0", s.setTOS(0))
	x.is("SIOCRDSSETTOS: 7", s.setTOS(7), s.getTOS())
	x.is("SIOCRDSSETTOS: again", s.setTOS(8), s.setTOS(7), s.getTOS())
	sent := x.bound(near, 0)
	defer sent.close()
	sent.send(sending{to: f.at(), size: 1, seed: 1, wait: stepLimit})
	x.arrives("before SIOCRDSSETTOS", f, 1, 1)
	x.is("SIOCRDSSETTOS: once it has sent", sent.setTOS(9))
	x.is("SIOCRDSSETTOS: not bound", near.raw(false, Call{Call: callIoctl, Num: siocSetTOS, Data: []byte{5}}))
	x.is("ioctl: another", near.raw(true, Call{Call: callIoctl, Num: siocSetTOS + 2, Data: []byte{5}}))
	x.is("RDS_RECVERR", s.recvErr(true), s.recvErr(false))
	x.is("RDS_CONG_MONITOR", s.monitor(true), s.monitor(false))
	x.is("RDS_FREE_MR: not bound", near.raw(false, Call{Call: callSetOpt, Level: solRDS, Num: optFreeMR, Data: append([]byte{1}, make([]byte, 15)...)}))

	set := func(what string, bound bool, num int, data []byte) {
		x.is("setsockopt: "+what, near.raw(bound, Call{Call: callSetOpt, Level: solRDS, Num: num, Data: data}))
	}
	set("RDS_CANCEL_SENT_TO, not bound", false, optCancelSentTo, rawAddr(f.at()))
	set("RDS_CANCEL_SENT_TO, a short address", true, optCancelSentTo, rawAddr(f.at())[:15])
	set("RDS_RECVERR of 3 bytes", true, optRecvErr, make([]byte, 3))
	set("RDS_CONG_MONITOR of 3 bytes", true, optCongMonitor, make([]byte, 3))
	set("SO_RDS_TRANSPORT of 8 bytes", false, optTransport, make([]byte, 8))
	set("SO_TIMESTAMP of 1 byte", true, unix.SO_TIMESTAMP, make([]byte, 1))
	set("RXPATH_LATENCY of 4 stages, of stage 3", true, optPathLatency, []byte{4, 0, 1, 2})
	set("RXPATH_LATENCY of stage 3", true, optPathLatency, []byte{1, 3, 0, 0})
	set("RDS_GET_MR, short", true, optGetMR, make([]byte, 31))
	set("RDS_FREE_MR, short", true, optFreeMR, make([]byte, 15))
	set("4 (barrier)", true, 4, make([]byte, 4))
	set("99", true, 99, make([]byte, 4))
	get := func(what string, num, size int) {
		x.is("getsockopt: "+what, near.raw(true, Call{Call: callGetOpt, Level: solRDS, Num: num, Data: make([]byte, size)}))
	}
	get("RDS_RECVERR of 3 bytes", optRecvErr, 3)
	get("RDS_CONG_MONITOR", optCongMonitor, 4)
	get("99", 99, 4)
	get("RDS_INFO_COUNTERS of 0 bytes", infoCounters, 0)
	get("10002", 10002, 100)
}

// textOf is the table's form of what was answered.
func textOf(os []outcome) string {
	var s []string
	for _, o := range os {
		s = append(s, o.String())
	}
	if !slices.ContainsFunc(s, func(v string) bool { return v != s[0] }) {
		s = s[:1]
	}
	return strings.Join(s, ", ")
}

// differences reads the table: by what was done, the kernel's answer and ours.
func differences(t testing.TB) map[string][2]string {
	t.Helper()
	doc, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(doc), differencesHeading)
	if !found {
		t.Fatalf("docs/compatibility.md has no %q", differencesHeading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	all := make(map[string][2]string)
	for line := range strings.Lines(rest) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells) != 4 || cells[0] == "Operation" || strings.HasPrefix(cells[0], "---") {
			continue
		}
		if cells[3] == "" {
			t.Errorf("%s: no reason given", cells[0])
		}
		all[cells[0]] = [2]string{cells[1], cells[2]}
	}
	return all
}

// showLinkLocal is the command that shows the link-local address of the interface named last.
var showLinkLocal = []string{"ip", "-6", "addr", "show", "scope", "link", "dev"}

// linkLocal is the link-local address that show, run where it is, tells of; it is one's own after a second or two.
func linkLocal(t testing.TB, show func() string, zone string) netip.Addr {
	t.Helper()
	var a netip.Addr
	eventually(t, "a link-local address", func() bool {
		text := show()
		_, rest, _ := strings.Cut(text, "inet6 ")
		addr, _, _ := strings.Cut(rest, "/")
		a, _ = netip.ParseAddr(addr)
		return a.IsLinkLocalUnicast() && !strings.Contains(text, "tentative")
	})
	return a.WithZone(zone)
}

// hostLinkLocal is the host's.
func hostLinkLocal(t testing.TB) netip.Addr {
	t.Helper()
	return linkLocal(t, func() string {
		out, err := output("", showLinkLocal[0], append(showLinkLocal[1:], HostLink)...)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}, HostLink)
}

// TestRDSSemantics runs the script on both sides and compares.
func TestRDSSemantics(t *testing.T) {
	g := guest(t, 4500)
	f4, f6 := freshHost(t, g, ipv4), freshHost(t, g, ipv6)
	svc, err := rds.Open(rds.Config{Linger: -1}) // some of it is for nobody
	if err != nil {
		t.Fatal(err)
	}
	defer svc.Close()
	there := func() string { return g.Run(t, append(showLinkLocal, GuestLink)...) }
	index := strings.TrimSpace(g.ReadFile(t, "/sys/class/net/"+GuestLink+"/ifindex"))
	addr := netip.MustParseAddr
	ours := &ourSide{t: t, svc: svc, v4: addr(f4.host), v6: addr(f6.host), ll: hostLinkLocal(t)}
	kernel := &kernelSide{k: newKernelEnd(t, g), v4: addr(f4.guest), v6: addr(f6.guest), ll: linkLocal(t, there, index)}

	run := func(near, far side) *play {
		x := &play{t: t, near: near, far: far, said: make(map[string][]outcome)}
		for _, part := range []func(){x.binds, x.connects, x.sends, x.receives, x.options, x.readiness} {
			part()
		}
		return x
	}
	start := time.Now()
	k := run(kernel, ours)
	t.Logf("the kernel: %d operations in %v", len(k.order), time.Since(start).Round(time.Millisecond))
	start = time.Now()
	o := run(ours, kernel)
	t.Logf("ours: %d operations in %v", len(o.order), time.Since(start).Round(time.Millisecond))

	named := differences(t)
	equal := 0
	for _, what := range k.order {
		a, b := k.said[what], o.said[what]
		same := len(a) == len(b)
		for i := 0; same && i < len(a); i++ {
			same = a[i].same(b[i])
		}
		row := [2]string{textOf(a), textOf(b)}
		want, listed := named[what]
		delete(named, what)
		switch {
		case same && !listed:
			equal++
		case same:
			t.Errorf("listed as a difference, and is none: %s: %s", what, row[0])
		case !listed:
			t.Errorf("not listed: | %s | %s | %s |", what, row[0], row[1])
		case want != row:
			t.Errorf("%s: the kernel says %s, ours %s; listed are %s and %s", what, row[0], row[1], want[0], want[1])
		}
	}
	for _, what := range o.order {
		if _, ok := k.said[what]; !ok {
			t.Errorf("only ours was asked: %s: %s", what, textOf(o.said[what]))
		}
	}
	for what := range named {
		t.Errorf("listed, and not tried: %s", what)
	}
	t.Logf("%d of %d operations have the same outcome", equal, len(k.order))
}
