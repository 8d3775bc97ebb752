//go:build lab && linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// Readiness (rds-protocol spec 1.6) is a part of the differential test: what poll and epoll say of the kernel's socket, and what
// SyscallConn's descriptor and RawConn.Write say of ours.

// readySock is the part of a sock that concerns it.
type readySock interface {
	// poll is what the socket is ready for.
	poll() outcome
	// await waits until it is ready for events, unix.POLLIN or unix.POLLOUT, and no longer than limit.
	await(events int, limit time.Duration) outcome
	// descriptor is poll for who has nothing but the descriptor.
	descriptor() outcome
	// epoll watches it for input.
	epoll(flags int) poller
	// news takes what there is to tell of congestion: "its port" if that is port and no other.
	news(port uint16) outcome
	// completion takes a notification.
	completion() outcome
	// lend makes memory accessible to a socket of the other side, which gets a datagram of 1 byte with its cookie.
	lend(to netip.AddrPort) (cookie uint64)
	// operate writes to such memory, wants to be notified, and sends a datagram of 1 byte.
	operate(to netip.AddrPort, cookie uint64) outcome
}

// poller is an epoll descriptor with a socket.
type poller interface {
	wait(limit time.Duration) outcome
	close()
}

func readyText(events int) string {
	var s []string
	for _, e := range []struct {
		bit  int
		name string
	}{{unix.POLLIN, "in"}, {unix.POLLOUT, "out"}, {unix.POLLERR, "err"}, {unix.POLLHUP, "hup"}} {
		if events&e.bit != 0 {
			s = append(s, e.name)
		}
	}
	if s == nil {
		return "nothing"
	}
	return strings.Join(s, "+")
}

// The kernel's.

func (s *kernelSock) poll() outcome { return s.await(unix.POLLIN|unix.POLLOUT, 0) }

func (s *kernelSock) await(events int, limit time.Duration) outcome {
	r := s.do(Call{Call: callPoll, Num: events, Size: int(limit.Milliseconds())})
	return outcomeOf(r, readyText(r.Flags))
}

func (s *kernelSock) descriptor() outcome { return s.poll() }

func (s *kernelSock) epoll(flags int) poller {
	r := s.do(Call{Call: callEpoll, Num: unix.EPOLLIN | flags})
	if r.Errno != 0 {
		s.k.t.Fatalf("epoll: %v", r.Errno)
	}
	return &kernelPoller{kernelSock{s.k, r.N}}
}

type kernelPoller struct{ kernelSock }

func (p *kernelPoller) wait(limit time.Duration) outcome {
	r := p.do(Call{Call: callEpollWait, Size: int(limit.Milliseconds())})
	return outcomeOf(r, readyText(r.Flags))
}

// notice takes a control message of a kind that comes without a datagram.
func (s *kernelSock) notice(typ int) (data []byte, o outcome) {
	r := s.do(Call{Call: callRecv, Size: 10, Flags: unix.MSG_DONTWAIT})
	switch {
	case r.Errno == unix.EAGAIN:
		return nil, outcome{text: "nothing"}
	case r.Errno != 0:
		return nil, outcome{err: r.Errno}
	}
	for _, c := range r.Cmsgs {
		if c.Level == solRDS && c.Type == typ && r.N == 0 && len(r.Cmsgs) == 1 {
			return c.Data, outcome{}
		}
	}
	return nil, outcome{text: fmt.Sprintf("%d bytes with %d control messages", r.N, len(r.Cmsgs))}
}

func (s *kernelSock) news(port uint16) outcome {
	data, o := s.notice(cmsgCongUpdate)
	if data != nil {
		o.text = newsText(binary.NativeEndian.Uint64(data), port)
	}
	return o
}

func newsText(mask uint64, port uint16) string {
	if mask == 1<<(port%64) {
		return "its port"
	}
	return fmt.Sprintf("%#x", mask)
}

func (s *kernelSock) completion() outcome {
	data, o := s.notice(cmsgRDMAStatus)
	if data != nil {
		o.text = fmt.Sprintf("status %d", int32(binary.NativeEndian.Uint32(data[8:])))
	}
	return o
}

func (s *kernelSock) sendRDMA(a SendRDMAArgs) SentRDMA {
	a.ID, a.Size = s.id, 1
	var sent SentRDMA
	s.k.must("SendRDMA", a, &sent)
	return sent
}

func (s *kernelSock) memory() Span {
	mem := Span{Len: 4096}
	s.k.must("Alloc", mem.Len, &mem.Buf)
	return mem
}

func (s *kernelSock) lend(to netip.AddrPort) uint64 {
	sent := s.sendRDMA(SendRDMAArgs{To: to, Map: &MapArgs{Span: s.memory()}})
	if sent.Errno != 0 {
		s.k.t.Fatalf("RDS_CMSG_RDMA_MAP: %v", sent.Errno)
	}
	return sent.Cookie
}

func (s *kernelSock) operate(to netip.AddrPort, cookie uint64) outcome {
	sent := s.sendRDMA(SendRDMAArgs{To: to, RDMA: &RDMAArgs{Cookie: cookie, Local: []Span{s.memory()}, Flags: rdmaWrite | rdmaNotify}})
	return outcomeOf(Outcome{Errno: sent.Errno}, "ok")
}

// Ours.

// withFD calls f with the descriptor.
func (s *ourSock) withFD(f func(fd int) error) error {
	rc, err := s.s.SyscallConn()
	if err != nil {
		return err
	}
	if e := rc.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
		return e
	}
	return err
}

func (s *ourSock) pollFD(events int, limit time.Duration) (got int, err error) {
	err = s.withFD(func(fd int) (err error) {
		got, err = pollOne(fd, events, limit)
		return err
	})
	return got, err
}

func (s *ourSock) poll() outcome {
	in, err := s.pollFD(unix.POLLIN, 0)
	out, err2 := s.writable(500 * time.Millisecond)
	return outcome{text: readyText(in | out), err: errors.Join(err, err2)}
}

// writable is unix.POLLOUT if RawConn.Write calls its function within limit.
func (s *ourSock) writable(limit time.Duration) (events int, err error) {
	rc, err := s.s.SyscallConn()
	if err != nil {
		return 0, err
	}
	_ = s.s.SetWriteDeadline(time.Now().Add(limit))
	defer s.s.SetWriteDeadline(time.Time{})
	if err = rc.Write(func(uintptr) bool { events = unix.POLLOUT; return true }); errors.Is(err, rds.ErrNoBufferSpace) {
		err = nil
	}
	return events, err
}

func (s *ourSock) await(events int, limit time.Duration) outcome {
	var got int
	var err error
	if events == unix.POLLOUT {
		got, err = s.writable(limit)
	} else {
		got, err = s.pollFD(events, limit)
	}
	return outcome{text: readyText(got), err: err}
}

func (s *ourSock) descriptor() outcome {
	got, err := s.pollFD(unix.POLLIN|unix.POLLOUT, 0)
	return outcome{text: readyText(got), err: err}
}

func (s *ourSock) epoll(flags int) poller {
	p := &ourPoller{}
	if err := s.withFD(func(fd int) (err error) {
		p.ep, err = newEpoll(fd, unix.EPOLLIN|flags)
		return err
	}); err != nil {
		s.side.t.Fatal(err)
	}
	return p
}

type ourPoller struct{ ep int }

func (p *ourPoller) wait(limit time.Duration) outcome {
	got, err := epollOne(p.ep, limit)
	return outcome{text: readyText(got), err: err}
}

func (p *ourPoller) close() { _ = unix.Close(p.ep) }

func (s *ourSock) news(port uint16) outcome {
	mask := s.s.TryReadCongestion()
	if mask == 0 {
		return outcome{text: "nothing"}
	}
	return outcome{text: newsText(mask, port)}
}

func (s *ourSock) completion() outcome {
	c, ok := s.s.TryReadCompletion()
	if !ok {
		return outcome{text: "nothing"}
	}
	return outcome{text: fmt.Sprintf("status %d", c.Status)}
}

// oneByte is the datagram that goes with an operation or a cookie: the first byte of pattern 0.
func oneByte() []byte {
	b := make([]byte, 1)
	pattern(b, 0)
	return b
}

func (s *ourSock) region() *rds.Region {
	r, err := s.s.RegisterRegion(s.side.context(), make([]byte, 4096), rds.RegionOptions{})
	if err != nil {
		s.side.t.Fatal(err)
	}
	return r
}

func (s *ourSock) lend(to netip.AddrPort) uint64 {
	r := s.region()
	if err := s.s.Send(s.side.context(), rds.Message{Peer: to, Data: oneByte(), Cookie: r.Cookie()}); err != nil {
		s.side.t.Fatal(err)
	}
	return uint64(r.Cookie())
}

func (s *ourSock) operate(to netip.AddrPort, cookie uint64) outcome {
	r := s.region()
	return ok(s.s.TrySend(rds.Message{Peer: to, Data: oneByte(), RDMA: &rds.RDMA{
		Op: rds.RDMAWrite, Local: []rds.Piece{r.Piece(0, r.Len())}, Remote: rds.Cookie(cookie), Notify: true,
	}}))
}

// readiness is the script.
func (x *play) readiness() {
	near, far := x.near, x.far
	f, w, s := x.bound(far, 0), x.bound(near, 0), x.bound(near, 0)
	for _, so := range []sock{f, w, s} {
		defer so.close()
	}
	// The connection, with the maps that come first on it (2.7), is older than what follows.
	w.send(sending{to: f.at(), size: 1, wait: stepLimit})
	x.arrives("before readiness", f, 1, 0)
	// bring has datagrams of 10 bytes arrive at a socket; w's, sent behind them, shows that they have.
	bring := func(to sock, n int) {
		x.t.Helper()
		for range n {
			f.send(sending{to: to.at(), size: 10, wait: stepLimit})
		}
		f.send(sending{to: w.at(), size: 1, wait: stepLimit})
		if o := w.recv(receiving{size: 1, wait: stepLimit}); o.err != nil {
			x.t.Fatalf("the datagram behind: %v", o)
		}
		if o := to.await(unix.POLLIN, stepLimit); o.text != "in" {
			x.t.Errorf("poll, where a datagram has come: %v", o)
		}
	}
	take := func(from sock) {
		x.t.Helper()
		if o := from.recv(receiving{size: 10, wait: stepLimit}); o.err != nil {
			x.t.Fatalf("recv: %v", o)
		}
	}
	none := func(at sock) {
		x.t.Helper()
		if o := at.recv(receiving{size: 10}); !errors.Is(o.err, unix.EAGAIN) {
			x.t.Errorf("recv, where nothing is left: %v", o)
		}
	}
	// waits has a socket wait for events, and do happen meanwhile.
	waits := func(s sock, events int) <-chan outcome {
		c := make(chan outcome, 1)
		go func() { c <- s.await(events, stepLimit) }()
		return c
	}
	const moment = 200 * time.Millisecond // for what is not to come, and for a call to begin

	x.is("poll: not bound", near.raw(false, Call{Call: callPoll, Num: unix.POLLIN | unix.POLLOUT}))
	fresh := x.bound(near, 0)
	defer fresh.close()
	x.is("poll: a fresh socket", fresh.poll(), fresh.poll())
	monitor := x.bound(near, 0)
	defer monitor.close()
	monitor.monitor(true)
	x.is("poll: a fresh socket, congestion monitor", monitor.poll())

	s.poll() // the kernel's first has old news
	bring(s, 1)
	x.is("poll: a datagram", s.poll(), s.poll())
	bring(s, 1)
	x.is("poll: two datagrams", s.poll())
	take(s)
	x.is("poll: one of two was read", s.poll())
	s.recv(receiving{size: 10, peek: true})
	x.is("poll: after a peek", s.poll())
	take(s)
	x.is("poll: all were read", s.poll())
	none(s)
	x.is("poll: a read has found nothing", s.poll())
	f.send(sending{to: s.at(), wait: stepLimit})
	x.is("poll: an empty datagram", s.await(unix.POLLIN, stepLimit), s.poll())
	take(s)
	x.is("poll: the empty datagram was read", s.poll())
	bring(s, 1)
	s.recv(receiving{size: 5})
	x.is("poll: a datagram was read in part", s.poll())
	x.is("poll: waits, and nothing comes", s.await(unix.POLLIN, moment))
	come := waits(s, unix.POLLIN)
	time.Sleep(moment)
	f.send(sending{to: s.at(), size: 10, wait: stepLimit})
	x.is("poll: waits, and a datagram comes", <-come)
	take(s)

	x.sendReadiness(f, waits, moment)
	x.congestionReadiness(w, waits, moment)

	// Notifications.
	d := x.bound(near, 0)
	defer d.close()
	d.poll()
	cookie := f.lend(d.at())
	take(d)
	x.is("send: an operation that notifies", d.operate(f.at(), cookie))
	x.is("poll: a notification", d.await(unix.POLLIN, stepLimit), d.poll())
	x.is("recv: a notification", d.completion())
	x.is("poll: the notification was read", d.poll())
	x.arrives("with an operation", f, 1, 0)
	come = waits(d, unix.POLLIN)
	d.operate(nobody, cookie)
	x.is("poll: an operation is not done", d.poll())
	d.cancel(nobody)
	x.is("poll: waits, and an operation is cancelled", <-come)
	bring(d, 1)
	x.is("poll: a notification and a datagram", d.poll())
	x.is("recv: a notification before a datagram", d.completion())
	x.is("poll: the notification was read, and not the datagram", d.poll())
	take(d)
	x.is("poll: both were read", d.poll())

	// Edge-triggered.
	e := s.epoll(unix.EPOLLET)
	defer e.close()
	const edge = "epoll, edge-triggered: "
	x.is(edge+"nothing", e.wait(0))
	bring(s, 1)
	x.is(edge+"a datagram", e.wait(stepLimit), e.wait(0))
	take(s)
	x.is(edge+"a read", e.wait(0))
	bring(s, 1)
	x.is(edge+"a datagram after a read that took all", e.wait(moment))
	take(s)
	none(s)
	bring(s, 1)
	x.is(edge+"a datagram after a read that found nothing", e.wait(moment))
	bring(s, 1)
	x.is(edge+"another, none being read", e.wait(moment))
	take(s)
	x.is(edge+"one of two was read", e.wait(0))
	bring(s, 1)
	x.is(edge+"another, one of two being read", e.wait(moment))
	take(s)
	take(s)
	none(s)
	d.monitor(true) // or the kernel's has old news
	de := d.epoll(unix.EPOLLET)
	defer de.close()
	d.operate(nobody, cookie)
	d.cancel(nobody)
	x.is(edge+"a notification", de.wait(stepLimit), de.wait(0))
	bring(d, 1)
	x.is(edge+"a datagram, a notification being unread", de.wait(moment))
	d.completion()
	take(d)
	x.is(edge+"all were read", de.wait(0), e.wait(0))
}

// sendReadiness is about POLLOUT.
func (x *play) sendReadiness(f sock, waits func(sock, int) <-chan outcome, moment time.Duration) {
	b := x.bound(x.near, 0)
	defer b.close()
	const size = 10000
	b.buffers(size, 0)
	b.poll() // the kernel's first has old news
	b.send(sending{to: nobody, size: size - 1})
	x.is("poll: room in the send buffer", b.poll())
	b.send(sending{to: nobody, size: size})
	x.is("poll: a full send buffer", b.poll())
	x.is("poll: a full send buffer, the descriptor", b.descriptor())
	x.is("poll: waits with a full send buffer", b.await(unix.POLLOUT, moment))
	f.send(sending{to: b.at(), size: 10, wait: stepLimit})
	x.is("poll: a full send buffer and a datagram", b.await(unix.POLLIN, stepLimit), b.poll())
	b.recv(receiving{size: 10, wait: stepLimit})
	come := waits(b, unix.POLLOUT)
	time.Sleep(moment)
	b.cancel(nobody)
	x.is("poll: waits, and RDS_CANCEL_SENT_TO makes room", <-come, b.poll())

	// A peer that is silent for a while.
	up := func() { _ = ip("link", "set", HostLink, "up") }
	x.t.Cleanup(up)
	if err := ip("link", "set", HostLink, "down"); err != nil {
		x.t.Fatal(err)
	}
	b.send(sending{to: f.at(), size: size, seed: 1})
	x.is("poll: a full send buffer, the peer silent", b.poll())
	come = waits(b, unix.POLLOUT)
	up()
	x.is("poll: waits, and the peer acknowledges", <-come, b.poll())
	x.arrives("from a full send buffer", f, size, 1)
	hostLinkLocal(x.t) // gone with the link, and not to be bound again at once
}

// congestionReadiness is about a port that does not read; w is a socket of the near side.
func (x *play) congestionReadiness(w sock, waits func(sock, int) <-chan outcome, moment time.Duration) {
	c := x.bound(x.far, 0)
	defer c.close()
	c.buffers(0, 20000)
	type sender struct {
		sock
		label                string
		monitored, connected bool
		come                 <-chan outcome
	}
	senders := []*sender{
		{label: "no monitor"}, {label: "no monitor, connected", connected: true}, {label: "monitor", monitored: true}, {label: "monitor, connected", monitored: true, connected: true},
	}
	open := func(monitor bool) sock {
		s := x.bound(x.near, 0)
		s.monitor(monitor)
		s.poll() // the kernel's first has old news
		return s
	}
	for _, s := range senders {
		s.sock = open(s.monitored)
		defer s.close()
		if s.connected {
			s.connect(c.at())
		}
	}
	bystander := open(false)
	defer bystander.close()
	// Event loops that watch from the beginning.
	loop, monitorLoop := open(false), open(true)
	defer loop.close()
	defer monitorLoop.close()
	e, me := loop.epoll(0), monitorLoop.epoll(0)
	defer e.close()
	defer me.close()

	sent := 0
	for ; sent < 1000; sent++ {
		if o := w.send(sending{to: c.at(), size: 4000, seed: uint32(sent)}); o.err != nil {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	refused := func(s sock, connected bool) outcome {
		m := sending{size: 1}
		if !connected {
			m.to = c.at()
		}
		return s.send(m)
	}
	for _, s := range senders {
		x.is("poll: a port has become congested, "+s.label, s.poll(), s.poll())
		x.is("send: to a congested port, "+s.label, refused(s, s.connected))
		x.is("poll: refused at a congested port, "+s.label, s.poll())
		refused(s, s.connected) // a poll makes the kernel forget that its socket waits
		s.come = waits(s, unix.POLLIN)
	}
	refused(loop, false)
	refused(monitorLoop, false)
	time.Sleep(moment)
	for i := range sent {
		x.arrives(fmt.Sprintf("datagram %d to the congested port", i), c, 4000, uint32(i))
	}
	port := c.at().Port()
	for _, s := range senders {
		x.is("poll: waits, and the port clears, "+s.label, <-s.come)
		x.is("poll: the port has cleared, "+s.label, s.poll(), s.poll())
		if s.monitored {
			x.is("recv: news of congestion, "+s.label, s.news(port))
		} else {
			x.is("recv: nothing but news, "+s.label, s.recv(receiving{size: 10}))
		}
		x.is("poll: news were read, "+s.label, s.poll())
		x.is("send: the port has cleared, "+s.label, refused(s, s.connected))
		x.arrives("to a port that has cleared", c, 1, 0)
	}
	x.is("poll: the port has cleared, never refused", bystander.poll(), bystander.poll())
	x.is("epoll: the port has cleared, no monitor", e.wait(moment))
	x.is("epoll: the port has cleared, monitor", me.wait(stepLimit))
}
