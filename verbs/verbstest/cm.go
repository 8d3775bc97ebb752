package verbstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/openrds/openrds/verbs"
)

func cmCases() []testcase {
	return []testcase{
		{"ConnectAcceptPrivateData", cmConnect},
		{"Parameters", cmParameters},
		{"Resources", cmResources},
		{"PrepareComesBeforeData", cmPrepare},
		{"PrepareFails", cmPrepareFails},
		{"RejectWithPrivateData", cmReject},
		{"UnansweredIsRejected", cmUnanswered},
		{"AnswerTwice", cmAnswerTwice},
		{"NobodyListens", cmRefused},
		{"NobodyThere", cmUnreachable},
		{"ContextEndsWhileAcceptorThinks", cmSlowAcceptor},
		{"ContextDoneAlready", cmContextDone},
		{"PrivateDataTooLong", cmTooLong},
		{"QPMustBeInReset", cmWrongState},
		{"DisconnectByActive", func(l *lab) { cmDisconnect(l, true, false) }},
		{"DisconnectByPassive", func(l *lab) { cmDisconnect(l, false, true) }},
		{"DisconnectByBoth", func(l *lab) { cmDisconnect(l, true, true) }},
		{"DisconnectFromHandler", cmDisconnectHandler},
		{"ClosingTheQPDisconnects", cmCloseQP},
		{"CrossingConnects", cmCrossing},
		{"SeveralConnections", cmSeveral},
		{"ManyAtOnce", cmManyAtOnce},
		{"ReconnectOverTheSameQPs", cmReconnect},
		{"ListenerClose", cmListenerClose},
		{"ListenerCloseWaitsForHandler", cmListenerCloseWaits},
		{"ListenTwice", cmListenTwice},
		{"WithinDevice", cmWithinDevice},
		{"DeviceCloseEndsConnections", cmDeviceClose},
	}
}

// listen listens on n and closes with the case.
func (n *node) listen(port uint16, handler func(verbs.ConnRequest)) verbs.Listener {
	n.l.Helper()
	ln, err := n.dev.Listen(port, handler)
	n.l.must(fmt.Sprintf("listen on %s:%d", n.name, port), err)
	n.l.listeners = append(n.l.listeners, ln)
	return ln
}

// cmParam asks for quick and generous service.
func cmParam(private []byte) verbs.ConnParam {
	return verbs.ConnParam{PrivateData: private, ResponderResources: 4, InitiatorDepth: 4, RetryCount: 6, RNRRetryCount: 7, AckTimeout: 14, MinRNRTimer: 12}
}

// conn is an established connection as one side sees it.
type conn struct {
	*end
	ep   verbs.Endpoint
	info verbs.Connected
	err  error
}

// acceptor accepts every request with a QP of its own and hands the connections out.
type acceptor struct {
	n     *node
	param verbs.ConnParam
	recvs int // receives posted in prepare, without memory

	mu   sync.Mutex
	ends []*end // made beforehand: the lab is not for other goroutines
	out  chan conn
}

// handlerRuns is room for what handlers report. A reject that the network loses brings the request,
// and so the handler, back: a handler must not get stuck on its second run.
const handlerRuns = 64

// accept listens on port with n QPs to accept with.
func (n *node) accept(port uint16, qps int, param verbs.ConnParam) *acceptor {
	n.l.Helper()
	a := &acceptor{n: n, param: param, recvs: 16, out: make(chan conn, qps)}
	for range qps {
		a.ends = append(a.ends, n.newEnd(n.qpConfig(verbs.RC)))
	}
	n.listen(port, a.handle)
	return a
}

func (a *acceptor) handle(req verbs.ConnRequest) {
	a.mu.Lock()
	if len(a.ends) == 0 {
		a.mu.Unlock()
		return
	}
	e := a.ends[0]
	a.ends = a.ends[1:]
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ep, err := req.Accept(ctx, e.qp, a.param, postEmpty(e, a.recvs))
	a.out <- conn{end: e, ep: ep, info: req.Info(), err: err}
}

// postEmpty is a prepare callback that posts receives 0 to n-1.
func postEmpty(e *end, n int) func() error {
	return func() error {
		wrs := make([]verbs.RecvWR, n)
		for i := range wrs {
			wrs[i].ID = uint64(i)
		}
		_, err := e.qp.PostRecv(wrs)
		return err
	}
}

// next is the next connection accepted.
func (a *acceptor) next(what string) conn {
	a.n.l.Helper()
	c := recvFrom(a.n.l, what, a.out)
	a.n.l.must(what, c.err)
	a.n.l.endpoints = append(a.n.l.endpoints, c.ep)
	return c
}

// dial connects e to a port of peer, without asserting the outcome.
func (e *end) dial(ctx context.Context, peer *node, port uint16, param verbs.ConnParam, prepare func() error) conn {
	ep, info, err := e.dev.Connect(ctx, netip.AddrPortFrom(peer.dev.Addr(), port), e.qp, param, prepare)
	return conn{end: e, ep: ep, info: info, err: err}
}

// connect connects a new QP of n to a port of peer.
func (n *node) connect(peer *node, port uint16, param verbs.ConnParam) conn {
	n.l.Helper()
	ctx, cancel := context.WithTimeout(n.l.Context(), patience)
	defer cancel()
	e := n.newEnd(n.qpConfig(verbs.RC))
	c := e.dial(ctx, peer, port, param, postEmpty(e, 16))
	n.l.must(fmt.Sprintf("connect %s to %s:%d", n.name, peer.name, port), c.err)
	n.l.endpoints = append(n.l.endpoints, c.ep)
	return c
}

// wantFailed checks a connect that did not succeed: no endpoint, and a QP that belongs to the caller
// still, in RESET or ERR.
func (l *lab) wantFailed(what string, c conn) {
	l.Helper()
	if c.err == nil {
		l.endpoints = append(l.endpoints, c.ep)
		l.Fatalf("%s: the connect succeeded", what)
	}
	if c.ep != nil {
		l.Fatalf("%s: there is an endpoint beside the error %v", what, c.err)
	}
	if s := c.qp.State(); s != verbs.StateReset && s != verbs.StateErr {
		l.Fatalf("%s: the QP is in %v, want RESET or ERR", what, s)
	}
}

func (l *lab) wantDone(what string, c conn) {
	l.Helper()
	recvFrom(l, what+": Done of "+c.name, c.ep.Done())
	c.wantState(what, verbs.StateErr)
}

func (l *lab) wantAlive(what string, c conn) {
	l.Helper()
	select {
	case <-c.ep.Done():
		l.Fatalf("%s: the connection of %s has ended", what, c.name)
	default:
	}
	if s := c.qp.State(); s != verbs.StateRTS {
		l.Fatalf("%s: the QP of %s is in %v", what, c.name, s)
	}
}

// talk sends one message each way, into receives id of both.
func (l *lab) talk(what string, a, b conn, id uint64) {
	l.Helper()
	a.send(sendWR(1, nil))
	b.wantRecvd(what, id, 0)
	b.send(sendWR(2, nil))
	a.wantRecvd(what, id, 0)
	a.wantSent(what, 1, verbs.WCSend)
	b.wantSent(what, 2, verbs.WCSend)
}

func cmConnect(l *lab) {
	for _, c := range []struct{ req, rep int }{{56, 196}, {0, 0}, {1, 7}} {
		req, rep := l.nextPattern(c.req), l.nextPattern(c.rep)
		port := uint16(7000 + c.req)
		acc := l.b.accept(port, 1, cmParam(rep))
		a := l.a.connect(l.b, port, cmParam(req))
		b := acc.next("accept")
		l.wantBytes("the passive side sees the 56 bytes of a connect", b.info.PrivateData, append(slices.Clone(req), make([]byte, 56-c.req)...))
		l.wantBytes("the active side sees the 196 bytes of an accept", a.info.PrivateData, append(slices.Clone(rep), make([]byte, 196-c.rep)...))
		l.wantAlive("connected", a)
		l.wantAlive("connected", b)
		l.talk("messages pass", a, b, 0)
		if a.ep.Local().Addr() != l.a.dev.Addr() || a.ep.Remote() != netip.AddrPortFrom(l.b.dev.Addr(), port) {
			l.Fatalf("the active endpoint: %v to %v", a.ep.Local(), a.ep.Remote())
		}
		if b.ep.Local() != a.ep.Remote() || b.ep.Remote() != a.ep.Local() {
			l.Fatalf("both ends agree: %v to %v and %v to %v", a.ep.Local(), a.ep.Remote(), b.ep.Local(), b.ep.Remote())
		}
	}
}

// cmParameters: what each side says arrives at the other and in the QPs (rocev2 spec 7.6).
func cmParameters(l *lab) {
	pa, pb := cmParam(nil), cmParam(nil)
	pa.ResponderResources, pa.InitiatorDepth, pa.RetryCount, pa.RNRRetryCount, pa.AckTimeout, pa.MinRNRTimer = 3, 2, 5, 4, 16, 9
	// More than was asked for is not granted.
	pb.ResponderResources, pb.InitiatorDepth, pb.RNRRetryCount, pb.MinRNRTimer = 7, 8, 6, 11
	acc := l.b.accept(7000, 1, pb)
	a := l.a.connect(l.b, 7000, pa)
	b := acc.next("accept")
	if i := b.info; i.ResponderResources != 3 || i.InitiatorDepth != 2 || i.PeerGUID != l.a.dev.Attr().GUID || i.PeerQPN != a.qp.Num() || i.PathMTU != l.mtu() {
		l.Fatalf("what the passive side learns: %+v", i)
	}
	if i := a.info; i.ResponderResources != 2 || i.InitiatorDepth != 3 || i.PeerGUID != l.b.dev.Attr().GUID || i.PeerQPN != b.qp.Num() || i.PathMTU != l.mtu() {
		l.Fatalf("what the active side learns: %+v", i)
	}
	qa, qb := a.qp.Query(), b.qp.Query()
	for _, c := range []struct {
		what      string
		got, want uint64
	}{
		{"A's path MTU", uint64(qa.PathMTU), uint64(l.mtu())},
		{"B's path MTU", uint64(qb.PathMTU), uint64(l.mtu())},
		{"A's peer", uint64(qa.DestQPN), uint64(b.qp.Num())},
		{"B's peer", uint64(qb.DestQPN), uint64(a.qp.Num())},
		{"A sends with the PSN B expects", uint64(qa.SQPSN), uint64(qb.RQPSN)},
		{"B sends with the PSN A expects", uint64(qb.SQPSN), uint64(qa.RQPSN)},
		{"A issues what B serves", uint64(qa.MaxRDAtomic), 2},
		{"B serves what A issues", uint64(qb.MaxDestRDAtomic), 2},
		{"B issues what A serves", uint64(qb.MaxRDAtomic), 3},
		{"A serves what B issues", uint64(qa.MaxDestRDAtomic), 3},
		{"A's retries are its own", uint64(qa.RetryCount), 5},
		{"B's retries are the REQ's", uint64(qb.RetryCount), 5},
		{"A's RNR retries are the REP's", uint64(qa.RNRRetry), 6},
		{"B's RNR retries are the REQ's", uint64(qb.RNRRetry), 4},
		{"B's ACK timeout is the REQ's", uint64(qb.Timeout), 16},
		{"A's RNR timer is its own", uint64(qa.MinRNRTimer), 9},
		{"B's RNR timer is its own", uint64(qb.MinRNRTimer), 11},
	} {
		if c.got != c.want {
			l.Errorf("%s: %d, want %d", c.what, c.got, c.want)
		}
	}
}

// cmResources: a connected QP serves WRITEs, and as many READs and atomics as its side said.
func cmResources(l *lab) {
	for i, served := range []uint8{4, 0} {
		pb := cmParam(nil)
		pb.ResponderResources = served
		port := uint16(7000 + i)
		acc := l.b.accept(port, 1, pb)
		a := l.a.connect(l.b, port, cmParam(nil))
		acc.next("accept")
		r := l.b.region(64, allAccess)
		a.send(remoteWR(1, verbs.OpWrite, newSink(a.end), r, 0))
		a.wantSent("WRITEs are served", 1, verbs.WCWrite)
		if served == 0 {
			a.send(remoteWR(2, verbs.OpRead, newSink(a.end), r, 0))
			a.wantSendStatus("no READ is issued to who serves none", verbs.WCLocQPOpErr, 2)
			continue
		}
		a.send(remoteWR(2, verbs.OpRead, newSink(a.end), r, 0), remoteWR(3, verbs.OpFetchAdd, newSink(a.end), r, 0))
		a.wantRead("READs are", 2, 8)
		a.wantSent("and atomics", 3, verbs.WCFetchAdd)
	}
}

// cmPrepare: prepare runs with the QP in INIT, before the peer can send anything.
func cmPrepare(l *lab) {
	eb := l.b.newEnd(l.b.qpConfig(verbs.RC))
	accepted := make(chan conn, 1)
	var prepared verbs.QPState
	l.b.listen(7000, func(req verbs.ConnRequest) {
		ep, err := req.Accept(context.Background(), eb.qp, cmParam(nil), func() error {
			prepared = eb.qp.State()
			return postEmpty(eb, 40)()
		})
		// The passive side speaks as soon as it can.
		if err == nil {
			for i := range uint64(20) {
				_, err = eb.qp.PostSend([]verbs.SendWR{sendWR(i, nil)})
			}
		}
		accepted <- conn{end: eb, ep: ep, err: err}
	})
	ea := l.a.newEnd(l.a.qpConfig(verbs.RC))
	var states []verbs.QPState
	a := ea.dial(l.Context(), l.b, 7000, cmParam(nil), func() error {
		states = append(states, ea.qp.State())
		return postEmpty(ea, 40)()
	})
	l.must("connect", a.err)
	l.endpoints = append(l.endpoints, a.ep)
	for i := range uint64(20) {
		a.send(sendWR(i, nil))
	}
	b := recvFrom(l, "accept", accepted)
	l.must("accept", b.err)
	l.endpoints = append(l.endpoints, b.ep)
	if !slices.Equal(states, []verbs.QPState{verbs.StateInit}) || prepared != verbs.StateInit {
		l.Fatalf("prepare is called once, with the QP in INIT: %v, %v", states, prepared)
	}
	for i := range uint64(20) {
		a.wantRecvd("nothing precedes the receives posted in prepare", i, 0)
		b.wantRecvd("nothing precedes the receives posted in prepare", i, 0)
		a.wantSent("sends complete", i, verbs.WCSend)
		b.wantSent("sends complete", i, verbs.WCSend)
	}
}

var errTest = errors.New("the test says no")

func cmPrepareFails(l *lab) {
	eb := l.b.newEnd(l.b.qpConfig(verbs.RC))
	out := make(chan error, handlerRuns)
	l.b.listen(7000, func(req verbs.ConnRequest) {
		ep, err := req.Accept(context.Background(), eb.qp, cmParam(nil), func() error { return errTest })
		if ep != nil {
			err = errors.New("an endpoint in spite of the error")
		}
		out <- err
	})
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	c := e.dial(l.Context(), l.b, 7000, cmParam(nil), func() error { return errTest })
	l.wantFailed("prepare of a connect fails", c)
	l.wantErr("the error of prepare comes back", c.err, errTest)

	e = l.a.newEnd(l.a.qpConfig(verbs.RC))
	c = e.dial(l.Context(), l.b, 7000, cmParam(nil), nil)
	l.wantFailed("prepare of the accept fails", c)
	wantErrAs[*verbs.RejectError](l, "the peer is told", c.err)
	l.wantErr("the error of prepare comes back", recvFrom(l, "Accept returns", out), errTest)
	if s := eb.qp.State(); s != verbs.StateReset && s != verbs.StateErr {
		l.Fatalf("its QP is in %v, want RESET or ERR", s)
	}
}

func cmReject(l *lab) {
	for i, n := range []int{148, 0, 20} {
		data := l.nextPattern(n)
		port := uint16(7000 + i)
		var info verbs.Connected
		out := make(chan error, handlerRuns)
		l.b.listen(port, func(req verbs.ConnRequest) {
			info = req.Info()
			out <- req.Reject(data)
		})
		e := l.a.newEnd(l.a.qpConfig(verbs.RC))
		c := e.dial(l.Context(), l.b, port, cmParam([]byte("please")), nil)
		l.wantFailed("a request is rejected", c)
		rej := wantErrAs[*verbs.RejectError](l, "the error says so", c.err)
		if rej.Reason != 28 {
			l.Fatalf("the reason is consumer reject: %d", rej.Reason)
		}
		l.wantBytes("148 bytes of private data come along", rej.PrivateData, append(slices.Clone(data), make([]byte, 148-n)...))
		l.must("Reject", recvFrom(l, "Reject returns", out))
		if !bytes.HasPrefix(info.PrivateData, []byte("please")) {
			l.Fatal("the request's private data was there to decide by")
		}
		if errors.Is(c.err, verbs.ErrRefused) {
			l.Fatal("a consumer's reject is not a refused port")
		}
	}
}

func cmUnanswered(l *lab) {
	l.b.listen(7000, func(verbs.ConnRequest) {})
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	c := e.dial(l.Context(), l.b, 7000, cmParam(nil), nil)
	l.wantFailed("the handler returns without an answer", c)
	if rej := wantErrAs[*verbs.RejectError](l, "the request is rejected", c.err); rej.Reason != 28 {
		l.Fatalf("the reason is consumer reject: %d", rej.Reason)
	}
}

func cmAnswerTwice(l *lab) {
	eb := l.b.newEnd(l.b.qpConfig(verbs.RC))
	type answers struct {
		ep            verbs.Endpoint
		first, second error
	}
	out := make(chan answers, handlerRuns)
	l.b.listen(7000, func(req verbs.ConnRequest) {
		ep, first := req.Accept(context.Background(), eb.qp, cmParam(nil), nil)
		out <- answers{ep, first, req.Reject(nil)}
	})
	a := l.a.connect(l.b, 7000, cmParam(nil))
	got := recvFrom(l, "the handler answers", out)
	l.must("Accept", got.first)
	l.endpoints = append(l.endpoints, got.ep)
	if got.second == nil {
		l.Fatal("Reject after Accept is refused")
	}
	l.settle()
	l.wantAlive("and changes nothing", a)

	idle := l.b.newEnd(l.b.qpConfig(verbs.RC))
	l.b.listen(7001, func(req verbs.ConnRequest) {
		first := req.Reject(nil)
		ep, second := req.Accept(context.Background(), idle.qp, cmParam(nil), nil)
		out <- answers{ep, first, second}
	})
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	l.wantFailed("rejected", e.dial(l.Context(), l.b, 7001, cmParam(nil), nil))
	got = recvFrom(l, "the handler answers", out)
	l.must("Reject", got.first)
	if got.second == nil || got.ep != nil {
		l.Fatal("Accept after Reject is refused")
	}
	if s := idle.qp.State(); s != verbs.StateReset {
		l.Fatalf("and leaves the QP alone: %v", s)
	}
}

func cmRefused(l *lab) {
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	c := e.dial(l.Context(), l.b, 7999, cmParam(nil), nil)
	l.wantFailed("nobody listens on the port", c)
	l.wantErr("nobody listens on the port", c.err, verbs.ErrRefused)
	if rej := wantErrAs[*verbs.RejectError](l, "the error says so", c.err); rej.Reason != 8 {
		l.Fatalf("the reason is invalid service: %d", rej.Reason)
	}
}

func cmUnreachable(l *lab) {
	if !l.env.Nowhere.IsValid() {
		l.Skip("the environment has no silent address")
	}
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	ctx, cancel := context.WithTimeout(l.Context(), 700*time.Millisecond)
	defer cancel()
	start := time.Now()
	ep, _, err := e.dev.Connect(ctx, netip.AddrPortFrom(l.env.Nowhere, 7000), e.qp, cmParam(nil), nil)
	took := time.Since(start)
	l.wantFailed("nobody answers", conn{end: e, ep: ep, err: err})
	l.wantErr("the context's deadline ends it", err, context.DeadlineExceeded)
	if took < 700*time.Millisecond || took > 700*time.Millisecond+promptly {
		l.Fatalf("in time: it took %v", took)
	}
}

// cmSlowAcceptor: the active side gives up while the acceptor thinks; the acceptor is told.
func cmSlowAcceptor(l *lab) {
	eb := l.b.newEnd(l.b.qpConfig(verbs.RC))
	release, out := make(chan struct{}), make(chan error, handlerRuns)
	l.b.listen(7000, func(req verbs.ConnRequest) {
		<-release
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, err := req.Accept(ctx, eb.qp, cmParam(nil), nil)
		out <- err
	})
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	ctx, cancel := context.WithTimeout(l.Context(), 400*time.Millisecond)
	defer cancel()
	c := e.dial(ctx, l.b, 7000, cmParam(nil), nil)
	l.wantFailed("the context ends", c)
	l.wantErr("with its error", c.err, context.DeadlineExceeded)
	l.settle()
	close(release)
	if err := recvFrom(l, "Accept returns", out); err == nil {
		l.Fatal("Accept of a request given up is an error")
	}
	if s := eb.qp.State(); s != verbs.StateReset && s != verbs.StateErr {
		l.Fatalf("its QP is in %v, want RESET or ERR", s)
	}
}

func cmContextDone(l *lab) {
	acc := l.b.accept(7000, 1, cmParam(nil))
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	ctx, cancel := context.WithCancel(l.Context())
	cancel()
	c := e.dial(ctx, l.b, 7000, cmParam(nil), nil)
	l.wantFailed("a context that is done", c)
	l.wantErr("a context that is done", c.err, context.Canceled)
	l.settle()
	select {
	case c := <-acc.out:
		if c.err == nil {
			l.Fatal("nothing was connected")
		}
	default:
	}
}

func cmTooLong(l *lab) {
	out := make(chan [2]error, handlerRuns)
	eb := l.b.newEnd(l.b.qpConfig(verbs.RC))
	l.b.listen(7000, func(req verbs.ConnRequest) {
		_, accept := req.Accept(context.Background(), eb.qp, cmParam(make([]byte, 197)), nil)
		out <- [2]error{accept, req.Reject(make([]byte, 149))}
	})
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	c := e.dial(l.Context(), l.b, 7000, cmParam(make([]byte, 57)), nil)
	l.wantFailed("57 bytes in a connect", c)
	l.wantErr("57 bytes in a connect", c.err, verbs.ErrInvalid)
	if s := e.qp.State(); s != verbs.StateReset {
		l.Fatalf("nothing was begun: the QP is in %v", s)
	}
	l.wantFailed("the acceptor has no answer that fits", e.dial(l.Context(), l.b, 7000, cmParam(nil), nil))
	errs := recvFrom(l, "the handler", out)
	l.wantErr("197 bytes in an accept", errs[0], verbs.ErrInvalid)
	l.wantErr("149 bytes in a reject", errs[1], verbs.ErrInvalid)
	for _, p := range []verbs.ConnParam{{RetryCount: 8}, {RNRRetryCount: 8}, {AckTimeout: 32}, {MinRNRTimer: 32}} {
		e := l.a.newEnd(l.a.qpConfig(verbs.RC))
		c := e.dial(l.Context(), l.b, 7000, p, nil)
		l.wantFailed("a parameter out of range", c)
		l.wantErr(fmt.Sprintf("a parameter out of range: %+v", p), c.err, verbs.ErrInvalid)
	}
}

func cmWrongState(l *lab) {
	acc := l.b.accept(7000, 1, cmParam(nil))
	p := l.pair()
	_, _, err := l.a.dev.Connect(l.Context(), netip.AddrPortFrom(l.b.dev.Addr(), 7000), p.a.qp, cmParam(nil), nil)
	wantErrAs[*verbs.StateError](l, "connecting a QP in RTS", err)
	p.b.recvEmpty(20)
	p.ping(0)
	p.b.wantRecvd("leaves it alone", 20, 0)
	ud := l.udEnd(l.a, nil)
	ud.to(verbs.StateReset)
	_, _, err = l.a.dev.Connect(l.Context(), netip.AddrPortFrom(l.b.dev.Addr(), 7000), ud.qp, cmParam(nil), nil)
	l.wantErr("connecting a UD QP", err, verbs.ErrInvalid)
	foreign := l.b.newEnd(l.b.qpConfig(verbs.RC))
	_, _, err = l.a.dev.Connect(l.Context(), netip.AddrPortFrom(l.b.dev.Addr(), 7000), foreign.qp, cmParam(nil), nil)
	l.wantErr("connecting another device's QP", err, verbs.ErrInvalid)
	l.settle()
	if len(acc.out) != 0 {
		l.Fatal("no request went out")
	}
}

func cmDisconnect(l *lab, byA, byB bool) {
	acc := l.b.accept(7000, 1, cmParam(nil))
	a := l.a.connect(l.b, 7000, cmParam(nil))
	b := acc.next("accept")
	l.talk("messages pass", a, b, 0)
	if byA {
		l.must("disconnect A", a.ep.Disconnect())
	}
	if byB {
		l.must("disconnect B", b.ep.Disconnect())
	}
	l.wantDone("disconnected", a)
	l.wantDone("disconnected", b)
	for _, c := range []conn{a, b} {
		l.must("disconnect again", c.ep.Disconnect())
		for id := uint64(1); id < 16; id++ {
			c.wantRecvStatus("receives flush in order", verbs.WCFlushErr, id)
		}
		c.wantQuiet("one completion each")
	}
	c := l.a.newEnd(l.a.qpConfig(verbs.RC)).dial(l.Context(), l.b, 7000, cmParam(nil), nil)
	l.wantFailed("the acceptor has no QP left", c)
}

func cmDisconnectHandler(l *lab) {
	eps := make(chan verbs.Endpoint, 1)
	cq := l.a.cq(64, func(verbs.CQ) {
		select {
		case ep := <-eps:
			ep.Disconnect()
		default:
		}
	})
	acc := l.b.accept(7000, 1, cmParam(nil))
	cfg := l.a.qpConfig(verbs.RC)
	cfg.RecvCQ = cq
	e := l.a.newEnd(cfg)
	a := e.dial(l.Context(), l.b, 7000, cmParam(nil), postEmpty(e, 4))
	l.must("connect", a.err)
	l.endpoints = append(l.endpoints, a.ep)
	b := acc.next("accept")
	eps <- a.ep
	cq.Arm(false)
	b.send(sendWR(1, nil))
	l.wantDone("a handler disconnects", a)
	l.wantDone("a handler disconnects", b)
}

// cmCloseQP: destroying the QP ends the connection; the peer learns it.
func cmCloseQP(l *lab) {
	acc := l.b.accept(7000, 2, cmParam(nil))
	a := l.a.connect(l.b, 7000, cmParam(nil))
	b := acc.next("accept")
	l.must("close A's QP", a.qp.Close())
	l.wantDone("the peer's QP was closed", b)
	recvFrom(l, "A's own Done", a.ep.Done())
	a = l.a.connect(l.b, 7000, cmParam(nil))
	b = acc.next("accept")
	l.must("close B's QP", b.qp.Close())
	l.wantDone("the peer's QP was closed", a)
}

func cmCrossing(l *lab) {
	accA, accB := l.a.accept(7000, 1, cmParam([]byte("A accepts"))), l.b.accept(7000, 1, cmParam([]byte("B accepts")))
	ea, eb := l.a.newEnd(l.a.qpConfig(verbs.RC)), l.b.newEnd(l.b.qpConfig(verbs.RC))
	out := make(chan conn, 1)
	ctx, cancel := context.WithTimeout(l.Context(), patience)
	defer cancel()
	go func() { out <- eb.dial(ctx, l.a, 7000, cmParam([]byte("B connects")), postEmpty(eb, 16)) }()
	a1 := ea.dial(ctx, l.b, 7000, cmParam([]byte("A connects")), postEmpty(ea, 16))
	b1 := recvFrom(l, "B's connect", out)
	l.must("A's connect", a1.err)
	l.must("B's connect", b1.err)
	l.endpoints = append(l.endpoints, a1.ep, b1.ep)
	a2, b2 := accA.next("A accepts"), accB.next("B accepts")
	for _, c := range []struct {
		got  conn
		want string
	}{{a1, "B accepts"}, {b1, "A accepts"}, {a2, "B connects"}, {b2, "A connects"}} {
		if !bytes.HasPrefix(c.got.info.PrivateData, []byte(c.want)) {
			l.Fatalf("each side hears the other: %q, want %q", c.got.info.PrivateData, c.want)
		}
	}
	l.talk("A's connection works", a1, b2, 0)
	l.talk("B's connection works", b1, a2, 0)
	l.must("disconnect one", a1.ep.Disconnect())
	l.wantDone("it ends", b2)
	l.talk("the other stays", b1, a2, 1)
}

func cmSeveral(l *lab) {
	acc := l.b.accept(7000, 5, cmParam(nil))
	var as, bs []conn
	for range 5 {
		as = append(as, l.a.connect(l.b, 7000, cmParam(nil)))
		bs = append(bs, acc.next("accept"))
	}
	for i := range as {
		l.talk("connections do not mix", as[i], bs[i], 0)
	}
	l.must("disconnect one", as[2].ep.Disconnect())
	l.wantDone("that one ends", bs[2])
	for i := range as {
		if i != 2 {
			l.talk("the others stay", as[i], bs[i], 1)
		}
	}
}

func cmManyAtOnce(l *lab) {
	const n = 16
	acc := l.b.accept(7000, n, cmParam(nil))
	out := make(chan conn, n)
	for range n {
		e := l.a.newEnd(l.a.qpConfig(verbs.RC))
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			out <- e.dial(ctx, l.b, 7000, cmParam(nil), postEmpty(e, 16))
		}()
	}
	as, bs := map[verbs.QPN]conn{}, map[verbs.QPN]conn{}
	for range n {
		c := recvFrom(l, "connect", out)
		l.must("connect", c.err)
		l.endpoints = append(l.endpoints, c.ep)
		as[c.qp.Num()] = c
		b := acc.next("accept")
		bs[b.qp.Num()] = b
	}
	for _, a := range as {
		b, ok := bs[a.info.PeerQPN]
		if !ok || b.info.PeerQPN != a.qp.Num() {
			l.Fatalf("each connection has two ends that know each other: %d, %d", a.qp.Num(), a.info.PeerQPN)
		}
		l.talk("they all work", a, b, 0)
	}
}

// cmReconnect: after RESET a QP serves another connection, to the same peer, at once.
func cmReconnect(l *lab) {
	ea, eb := l.a.newEnd(l.a.qpConfig(verbs.RC)), l.b.newEnd(l.b.qpConfig(verbs.RC))
	out := make(chan conn, 1)
	l.b.listen(7000, func(req verbs.ConnRequest) {
		ep, err := req.Accept(context.Background(), eb.qp, cmParam(nil), postEmpty(eb, 4))
		out <- conn{end: eb, ep: ep, err: err}
	})
	for round := range 3 {
		var a conn
		// The peer may still hold the old connection in timewait: it then says so, and we try again.
		l.await("connect", func() bool {
			ea.to(verbs.StateReset)
			a = ea.dial(l.Context(), l.b, 7000, cmParam(nil), postEmpty(ea, 4))
			if a.err != nil && !errors.Is(a.err, verbs.ErrStaleConn) {
				l.Fatalf("connect, round %d: %v", round, a.err)
			}
			return a.err == nil
		})
		l.endpoints = append(l.endpoints, a.ep)
		b := recvFrom(l, "accept", out)
		l.must("accept", b.err)
		l.endpoints = append(l.endpoints, b.ep)
		l.talk("the connection works", a, b, 0)
		l.must("disconnect", b.ep.Disconnect())
		l.wantDone("it ends", a)
		l.wantDone("it ends", b)
		for id := uint64(1); id < 4; id++ {
			a.wantRecvStatus("receives flush", verbs.WCFlushErr, id)
			b.wantRecvStatus("receives flush", verbs.WCFlushErr, id)
		}
		ea.to(verbs.StateReset)
		eb.to(verbs.StateReset)
	}
}

func cmListenerClose(l *lab) {
	acc := l.b.accept(7000, 2, cmParam(nil))
	a := l.a.connect(l.b, 7000, cmParam(nil))
	b := acc.next("accept")
	ln := l.listeners[len(l.listeners)-1]
	for range 2 {
		l.must("close the listener", ln.Close())
	}
	c := l.a.newEnd(l.a.qpConfig(verbs.RC)).dial(l.Context(), l.b, 7000, cmParam(nil), nil)
	l.wantFailed("nobody listens any more", c)
	l.wantErr("nobody listens any more", c.err, verbs.ErrRefused)
	l.talk("connections outlive their listener", a, b, 0)
	l.b.listen(7000, acc.handle)
	a = l.a.connect(l.b, 7000, cmParam(nil))
	l.talk("the port is free again", a, acc.next("accept"), 0)
}

func cmListenerCloseWaits(l *lab) {
	in, release := make(chan struct{}), make(chan struct{})
	var finished bool
	ln := l.b.listen(7000, func(req verbs.ConnRequest) {
		close(in)
		<-release
		req.Reject(nil)
		finished = true
	})
	out := make(chan conn, 1)
	e := l.a.newEnd(l.a.qpConfig(verbs.RC))
	go func() { out <- e.dial(context.Background(), l.b, 7000, cmParam(nil), nil) }()
	recvFrom(l, "the handler runs", in)
	closed := make(chan error, 1)
	go func() { closed <- ln.Close() }()
	l.settle()
	if len(closed) != 0 {
		l.Fatal("Close waits for the handler")
	}
	close(release)
	l.must("close", recvFrom(l, "Close returns", closed))
	if !finished {
		l.Fatal("no handler runs once Close has returned")
	}
	l.wantFailed("the request is answered all the same", recvFrom(l, "connect", out))
}

func cmListenTwice(l *lab) {
	l.b.listen(7000, func(verbs.ConnRequest) {})
	ln, err := l.b.dev.Listen(7000, func(verbs.ConnRequest) {})
	if err == nil {
		l.listeners = append(l.listeners, ln)
		l.Fatal("a port has one listener")
	}
	l.a.listen(7000, func(verbs.ConnRequest) {}) // of another device
}

func cmWithinDevice(l *lab) {
	acc := l.a.accept(7000, 1, cmParam(nil))
	a := l.a.connect(l.a, 7000, cmParam(nil))
	b := acc.next("accept")
	l.talk("a device connects to itself", a, b, 0)
	l.must("disconnect", b.ep.Disconnect())
	l.wantDone("it ends", a)
	l.wantDone("it ends", b)
}

// cmDeviceClose: whoever closes a device has closed the QPs before; the peers learn it.
func cmDeviceClose(l *lab) {
	acc := l.b.accept(7000, 1, cmParam(nil))
	a := l.a.connect(l.b, 7000, cmParam(nil))
	b := acc.next("accept")
	l.must("close", a.qp.Close())
	l.must("close", a.scq.Close())
	l.must("close", a.rcq.Close())
	l.must("close", l.a.pd.Close())
	l.within(promptly, "closing a device does not wait for peers", func() { l.must("close", l.a.dev.Close()) })
	recvFrom(l, "A's Done", a.ep.Done())
	if l.env.Lossy {
		return // nobody is left to repeat a DREQ that was lost
	}
	l.wantDone("the peer is told", b)
}
