package softroce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// scriptConn is a packetio.Conn whose other end is a test: what the device sends is kept, what it
// receives is put in by hand.
type scriptConn struct {
	local netip.AddrPort
	mu    sync.Mutex
	in    [][]byte
	from  netip.AddrPort
	out   [][]byte
	full  bool // Send takes nothing
	wake  chan struct{}
	done  bool
}

type scriptNet struct{ conn *scriptConn }

func (n *scriptNet) Listen(local netip.AddrPort) (packetio.Conn, error) {
	n.conn = &scriptConn{local: local, wake: make(chan struct{}, 1)}
	return n.conn, nil
}

func (c *scriptConn) LocalAddr() netip.AddrPort { return c.local }
func (c *scriptConn) Caps() packetio.Caps       { return packetio.Caps{MTU: 65536} }
func (c *scriptConn) PathMTU(netip.Addr) int    { return 65536 }
func (c *scriptConn) Dropped() uint64           { return 0 }

func (c *scriptConn) Recv(ts []packetio.RxTrain) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(len(ts), len(c.in))
	for i := range n {
		ts[i] = packetio.RxTrain{From: c.from, Data: c.in[i], SegSize: len(c.in[i]), TTL: 64}
	}
	c.in = c.in[n:]
	return n, nil
}

func (c *scriptConn) Send(ts []packetio.TxTrain) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.full {
		return 0, packetio.ErrWouldBlock
	}
	for _, t := range ts {
		var b []byte
		for _, v := range t.Vec {
			b = append(b, v...)
		}
		c.out = append(c.out, b)
	}
	return len(ts), nil
}

func (c *scriptConn) Wait(deadline time.Time, wantWrite bool) error {
	c.mu.Lock()
	ready, done := len(c.in) > 0 && !wantWrite || wantWrite && !c.full, c.done
	c.mu.Unlock()
	if done {
		return net.ErrClosed
	}
	if ready {
		return nil
	}
	if deadline.IsZero() {
		<-c.wake
		return nil
	}
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-c.wake:
	case <-t.C:
	}
	return nil
}

func (c *scriptConn) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *scriptConn) Unplug() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in, c.full = nil, false
}

func (c *scriptConn) Close() error {
	c.mu.Lock()
	c.done = true
	c.mu.Unlock()
	c.Wake()
	return nil
}

// testContext is one RC QP in RTS whose peer the test plays.
type testContext struct {
	t    testing.TB
	dev  *device
	conn *scriptConn
	pd   verbs.PD
	cq   verbs.CQ
	qp   verbs.QP
	mem  []byte
	mr   verbs.MR
	peer netip.AddrPort
	flow roce.Flow
	keys []verbs.RKey   // for a hostile peer to choose from
	more []func() error // what close ends after the QP
}

const (
	peerQPN  = 0xabc
	txPSN    = 0xfffffe // first PSN of the QP under test: the space wraps early
	rxPSN    = 0x100    // first PSN it expects
	testMTU  = verbs.MTU256
	testIOVA = 0x10000
)

// script runs f with a QP whose peer it plays, in a bubble of virtual time.
func script(t *testing.T, f func(tc *testContext)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tc := newTestContext(t, Config{})
		f(tc)
		tc.close()
	})
}

func newTestContext(t *testing.T, cfg Config) *testContext {
	tc := newTestContextOn(t, cfg, &scriptNet{})
	synctest.Wait()
	return tc
}

func newTestContextOn(t *testing.T, cfg Config, n *scriptNet) *testContext {
	cfg.Network = n
	d, err := New(cfg).OpenDevice(netip.MustParseAddr("10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	tc := &testContext{t: t, dev: d.(*device), conn: n.conn, peer: netip.MustParseAddrPort("10.0.0.2:4791")}
	n.conn.from = tc.peer
	tc.flow = roce.NewFlow(tc.peer, n.conn.local)
	tc.pd, _ = d.AllocPD()
	tc.cq, _ = d.CreateCQ(verbs.CQConfig{Depth: 256})
	tc.qp, err = tc.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: tc.cq, RecvCQ: tc.cq, MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 2, MaxRecvSGE: 2})
	if err != nil {
		t.Fatal(err)
	}
	tc.mem = make([]byte, 1<<20)
	fill(tc.mem[:1<<16], 42)
	if tc.mr, err = tc.pd.RegMR(tc.mem, testIOVA, accessAll); err != nil {
		t.Fatal(err)
	}
	tc.connect()
	return tc
}

// connect moves the QP to RTS.
func (tc *testContext) connect() {
	tc.t.Helper()
	for _, m := range []struct {
		a verbs.QPAttr
		m verbs.QPAttrMask
	}{
		{verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: accessRemote}, initAttrsRC},
		{verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: tc.peer.Addr()}, PathMTU: testMTU, DestQPN: peerQPN, RQPSN: rxPSN, MaxDestRDAtomic: 4, MinRNRTimer: 12},
			verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit},
		{verbs.QPAttr{State: verbs.StateRTS, Timeout: 14, RetryCount: 3, RNRRetry: 3, SQPSN: txPSN, MaxRDAtomic: 4},
			verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit},
	} {
		if err := tc.qp.Modify(m.a, m.m|verbs.QPStateBit); err != nil {
			tc.t.Fatal(err)
		}
	}
}

func (tc *testContext) close() {
	tc.t.Helper()
	for _, c := range slices.Concat([]func() error{tc.qp.Close}, tc.more, []func() error{tc.mr.Deregister, tc.pd.Close, tc.cq.Close, tc.dev.Close}) {
		if err := c(); err != nil {
			tc.t.Error(err)
		}
	}
}

func (tc *testContext) sge(off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: testIOVA + uint64(off), Length: uint32(n), LKey: tc.mr.LKey()}}
}

func (tc *testContext) post(wrs ...verbs.SendWR) {
	tc.t.Helper()
	if n, err := tc.qp.PostSend(wrs); err != nil || n != len(wrs) {
		tc.t.Fatalf("post: %d, %v", n, err)
	}
	synctest.Wait()
}

func (tc *testContext) postRecv(wrs ...verbs.RecvWR) {
	tc.t.Helper()
	if n, err := tc.qp.PostRecv(wrs); err != nil || n != len(wrs) {
		tc.t.Fatalf("post receive: %d, %v", n, err)
	}
}

// write sends a packet from the peer: op with extension headers ext and payload.
func (tc *testContext) write(op roce.Opcode, p psn.PSN, ackReq bool, ext, payload []byte) {
	tc.t.Helper()
	tc.inject(tc.packet(op, uint32(tc.qp.Num()), p, ackReq, ext, payload))
}

func (tc *testContext) packet(op roce.Opcode, qpn uint32, p psn.PSN, ackReq bool, ext, payload []byte) []byte {
	pad := roce.PadLen(len(payload))
	b := make([]byte, roce.BTHLen, roce.BTHLen+len(ext)+len(payload)+pad+roce.ICRCLen)
	roce.PutBTH(b, op, op.Info().Flags&roce.FlagEnd != 0, pad, ackReq, qpn, p)
	b = append(b, ext...)
	b = append(b, payload...)
	b = append(b, make([]byte, pad+roce.ICRCLen)...)
	u := len(b)
	roce.PutICRC(b[u-roce.ICRCLen:], tc.flow.Begin(u, b[:u-roce.ICRCLen]))
	return b
}

func (tc *testContext) inject(b []byte) {
	tc.conn.mu.Lock()
	tc.conn.in = append(tc.conn.in, b)
	tc.conn.mu.Unlock()
	tc.conn.Wake()
	synctest.Wait()
}

func aeth(syn uint8, msn uint32) []byte {
	b := make([]byte, roce.AETHLen)
	roce.PutAETH(b, syn, msn)
	return b
}

func reth(va uint64, rkey verbs.RKey, n uint32) []byte {
	b := make([]byte, roce.RETHLen)
	roce.PutRETH(b, va, uint32(rkey), n)
	return b
}

// read takes the next packet the QP has sent, whose ICRC must be right.
func (tc *testContext) read() (pk roce.Packet, ok bool) {
	tc.t.Helper()
	tc.conn.mu.Lock()
	defer tc.conn.mu.Unlock()
	if len(tc.conn.out) == 0 {
		return pk, false
	}
	b := tc.conn.out[0]
	tc.conn.out = tc.conn.out[1:]
	if err := roce.Parse(b, &pk); err != nil {
		tc.t.Fatalf("sent a packet that does not parse: %v", err)
	}
	f := roce.NewFlow(tc.conn.local, tc.peer)
	if _, v := f.Check(b, 0); v != roce.OK0 {
		tc.t.Fatalf("sent a packet with ICRC %v", v)
	}
	return pk, true
}

func (tc *testContext) want(what string, op roce.Opcode, p psn.PSN) roce.Packet {
	tc.t.Helper()
	pk, ok := tc.read()
	if !ok {
		tc.t.Fatalf("%s: nothing sent, want %v PSN %#x", what, op, p)
	}
	if pk.Op != op || pk.BTH.PSN() != p {
		tc.t.Fatalf("%s: sent %v PSN %#x, want %v PSN %#x", what, pk.Op, pk.BTH.PSN(), op, p)
	}
	return pk
}

func (tc *testContext) wantAck(what string, syn uint8, p psn.PSN) {
	tc.t.Helper()
	if pk := tc.want(what, roce.RCAck, p); pk.AETH().Syndrome() != syn {
		tc.t.Fatalf("%s: syndrome %#x, want %#x", what, pk.AETH().Syndrome(), syn)
	}
}

func (tc *testContext) wantIdle(what string) {
	tc.t.Helper()
	if pk, ok := tc.read(); ok {
		tc.t.Fatalf("%s: sent %v PSN %#x, want nothing", what, pk.Op, pk.BTH.PSN())
	}
}

func (tc *testContext) wantWC(what string, id uint64, s verbs.WCStatus) verbs.WC {
	tc.t.Helper()
	var wc [1]verbs.WC
	if tc.cq.Poll(wc[:]) == 0 {
		tc.t.Fatalf("%s: no completion, want %d %v", what, id, s)
	}
	if wc[0].ID != id || wc[0].Status != s {
		tc.t.Fatalf("%s: completion %d %v, want %d %v", what, wc[0].ID, wc[0].Status, id, s)
	}
	return wc[0]
}

func (tc *testContext) wantNoWC(what string) {
	tc.t.Helper()
	var wc [1]verbs.WC
	if tc.cq.Poll(wc[:]) != 0 {
		tc.t.Fatalf("%s: completion %d %v, want none", what, wc[0].ID, wc[0].Status)
	}
}

func send(id uint64, sgs []verbs.SGE) verbs.SendWR {
	return verbs.SendWR{ID: id, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: sgs}
}

func tx(n int) psn.PSN { return psn.New(txPSN).Add(n) }
func rx(n int) psn.PSN { return psn.New(rxPSN).Add(n) }

func TestSendRNR(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.post(send(1, tc.sge(0, 100)))
		tc.want("first SEND goes out", roce.RCSendOnly, tx(0))
		tc.write(roce.RCAck, tx(0), false, aeth(roce.SynRNR|12, 0), nil)
		tc.write(roce.RCAck, tx(0), false, aeth(roce.SynNAKSeq, 0), nil)
		tc.wantIdle("requester sits out the RNR timer, whatever sequence NAK follows")
		time.Sleep(640 * time.Microsecond)
		synctest.Wait()
		tc.want("the same PSN is sent again", roce.RCSendOnly, tx(0))
		tc.write(roce.RCAck, tx(0), false, aeth(roce.SynACK, 1), nil)
		tc.wantWC("SEND completes", 1, verbs.WCSuccess)
		for i := range 4 { // rnr_retry 3
			if i == 0 {
				tc.post(send(2, tc.sge(0, 100)))
			}
			tc.want(fmt.Sprintf("attempt %d", i), roce.RCSendOnly, tx(1))
			tc.write(roce.RCAck, tx(1), false, aeth(roce.SynRNR|1, 0), nil)
			time.Sleep(10 * time.Microsecond)
			synctest.Wait()
		}
		tc.wantWC("RNR retries run out", 2, verbs.WCRNRRetryExcErr)
		if s := tc.qp.State(); s != verbs.StateErr {
			t.Fatalf("QP is in %v", s)
		}
	})
}

func TestGoBackOnNAK(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.post(send(1, tc.sge(0, 3*256)), send(2, tc.sge(0, 10)))
		tc.want("", roce.RCSendFirst, tx(0))
		tc.want("", roce.RCSendMiddle, tx(1))
		tc.want("", roce.RCSendLast, tx(2))
		tc.want("", roce.RCSendOnly, tx(3))
		tc.write(roce.RCAck, tx(1), false, aeth(roce.SynNAKSeq, 0), nil)
		tc.want("goes back to the middle of the message", roce.RCSendMiddle, tx(1))
		tc.want("", roce.RCSendLast, tx(2))
		tc.want("", roce.RCSendOnly, tx(3))
		tc.write(roce.RCAck, tx(1), false, aeth(roce.SynNAKSeq, 0), nil)
		tc.wantIdle("a second NAK for the same loss is not answered")
		tc.wantNoWC("nothing is complete")
		tc.write(roce.RCAck, tx(3), false, aeth(roce.SynACK, 2), nil)
		tc.wantWC("one ACK completes both", 1, verbs.WCSuccess)
		tc.wantWC("in order", 2, verbs.WCSuccess)
	})
}

func TestProbeOnTimeout(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.post(send(1, tc.sge(0, 10)), send(2, tc.sge(0, 10)), send(3, tc.sge(0, 10)))
		for i := range 3 {
			tc.want("", roce.RCSendOnly, tx(i))
		}
		time.Sleep(initialRTO)
		synctest.Wait()
		if pk := tc.want("the oldest packet is sent again, alone", roce.RCSendOnly, tx(0)); !pk.BTH.AckReq() {
			t.Fatal("the probe does not ask for an acknowledgement")
		}
		tc.wantIdle("a timeout sends one probe, never a window")
		tc.write(roce.RCAck, tx(1), false, aeth(roce.SynACK, 2), nil)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.wantWC("", 2, verbs.WCSuccess)
		tc.want("what the answer did not cover is sent again", roce.RCSendOnly, tx(2))
		tc.write(roce.RCAck, tx(2), false, aeth(roce.SynACK, 3), nil)
		tc.wantWC("", 3, verbs.WCSuccess)
		time.Sleep(time.Minute)
		synctest.Wait()
		tc.wantIdle("an idle QP is silent")
	})
}

func TestRetryExceeded(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.post(send(1, tc.sge(0, 10)), send(2, tc.sge(0, 10)))
		tc.postRecv(verbs.RecvWR{ID: 3})
		time.Sleep(10*time.Second + 3*time.Second)
		synctest.Wait()
		tc.wantWC("the oldest request fails", 1, verbs.WCRetryExcErr)
		tc.wantWC("the rest is flushed", 2, verbs.WCFlushErr)
		tc.wantWC("receives too", 3, verbs.WCFlushErr)
		tc.post(send(4, nil))
		tc.wantWC("what is posted in ERR is flushed", 4, verbs.WCFlushErr)
		for {
			if _, ok := tc.read(); !ok {
				break
			}
		}
	})
}

// TestReadGap plays a responder that loses the middle of a READ's answer.
func TestReadGap(t *testing.T) {
	script(t, func(tc *testContext) {
		data := tc.mem[:4*256]
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tc.sge(1<<17, 4*256), RemoteAddr: 0x4000, RKey: 0x77})
		pk := tc.want("", roce.RCReadRequest, tx(0))
		if r := pk.RETH(); r.VA() != 0x4000 || r.RKey() != 0x77 || r.Len() != 1024 {
			t.Fatalf("request for %#x %#x %d", r.VA(), r.RKey(), r.Len())
		}
		tc.write(roce.RCReadRespFirst, tx(0), false, aeth(roce.SynACK, 1), data[:256])
		tc.write(roce.RCReadRespMiddle, tx(2), false, nil, data[512:768])
		pk = tc.want("asks again from the first missing packet", roce.RCReadRequest, tx(1))
		if r := pk.RETH(); r.VA() != 0x4100 || r.Len() != 768 {
			t.Fatalf("second request for %#x, %d bytes", r.VA(), r.Len())
		}
		tc.write(roce.RCReadRespLast, tx(3), false, aeth(roce.SynACK, 1), data[768:])
		tc.wantIdle("once per gap")
		tc.write(roce.RCAck, tx(3), false, aeth(roce.SynACK, 1), nil)
		tc.wantNoWC("a plain ACK never completes a READ")
		tc.write(roce.RCReadRespFirst, tx(1), false, aeth(roce.SynACK, 1), data[256:512])
		tc.write(roce.RCReadRespMiddle, tx(2), false, nil, data[512:768])
		tc.write(roce.RCReadRespLast, tx(3), false, aeth(roce.SynACK, 1), data[768:])
		tc.wantWC("READ completes", 1, verbs.WCSuccess)
		if string(tc.mem[1<<17:1<<17+1024]) != string(data) {
			t.Fatal("READ data is wrong")
		}
	})
}

func TestResponderOrder(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.sge(0, 1024)})
		tc.write(roce.RCSendMiddle, rx(1), true, nil, make([]byte, 256))
		tc.wantAck("a gap is reported", roce.SynNAKSeq, rx(0))
		tc.write(roce.RCSendLast, rx(2), true, nil, make([]byte, 10))
		tc.wantIdle("once")
		time.Sleep(nakRepeat)
		tc.write(roce.RCSendLast, rx(2), true, nil, make([]byte, 10))
		tc.wantAck("and again when it lasts", roce.SynNAKSeq, rx(0))
		tc.write(roce.RCSendFirst, rx(0), false, nil, make([]byte, 256))
		tc.wantIdle("no AckReq, no ACK")
		tc.write(roce.RCSendMiddle, rx(1), false, nil, make([]byte, 256))
		tc.write(roce.RCSendLast, rx(2), true, nil, make([]byte, 10))
		tc.wantAck("", roce.SynACK, rx(2))
		if wc := tc.wantWC("", 1, verbs.WCSuccess); wc.ByteLen != 522 {
			t.Fatalf("%d bytes received", wc.ByteLen)
		}
		tc.write(roce.RCSendFirst, rx(0), false, nil, make([]byte, 256))
		tc.wantAck("a duplicate is acknowledged with all there is", roce.SynACK, rx(2))
		tc.wantNoWC("and not executed")
		tc.write(roce.RCSendOnly, rx(3), true, nil, nil)
		tc.wantAck("no receive request: RNR", roce.SynRNR|12, rx(3))
		tc.write(roce.RCSendOnly, rx(4), true, nil, nil)
		tc.wantIdle("what follows is dropped without a NAK")
	})
}

// TestDeregisterWriteFallsSilent: a peer that begins a WRITE and says no more does not hold the
// region.
func TestDeregisterWriteFallsSilent(t *testing.T) {
	script(t, func(tc *testContext) {
		mr, err := tc.pd.RegMR(make([]byte, 4096), 0, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		tc.write(roce.RCWriteFirst, rx(0), false, reth(0, mr.RKey(), 1024), make([]byte, 256))
		if err := mr.Deregister(); err != nil {
			t.Fatalf("deregister during a WRITE: %v", err)
		}
		tc.write(roce.RCWriteMiddle, rx(1), false, nil, make([]byte, 256))
		tc.wantAck("the next packet finds the key gone", roce.SynNAKAccess, rx(1))
	})
}

// TestDeregisterDuringRead: a READ whose answer is on its way does not hold the region; its replay
// finds the key gone.
func TestDeregisterDuringRead(t *testing.T) {
	script(t, func(tc *testContext) {
		mr, err := tc.pd.RegMR(make([]byte, 1<<20), 0, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		tc.conn.mu.Lock()
		tc.conn.full = true // the first batch of responses waits in the batch for the socket
		tc.conn.mu.Unlock()
		tc.write(roce.RCReadRequest, rx(0), true, reth(0, mr.RKey(), 1<<20), nil)
		gone := make(chan error)
		go func() { gone <- mr.Deregister() }()
		synctest.Wait()
		select {
		case err := <-gone:
			t.Fatalf("deregistered (%v) while responses name the memory", err)
		default:
		}
		tc.conn.mu.Lock()
		tc.conn.full = false
		tc.conn.mu.Unlock()
		tc.conn.Wake()
		if err := <-gone; err != nil {
			t.Fatalf("deregister during a READ: %v", err)
		}
		for {
			if _, ok := tc.read(); !ok {
				break
			}
		}
	})
}

// TestDeregisterHeld: a region that posted requests name is kept from its owner, with the holders
// named; its keys are gone at once, and the call may be repeated.
func TestDeregisterHeld(t *testing.T) {
	script(t, func(tc *testContext) {
		mr, err := tc.pd.RegMR(make([]byte, 4096), 0, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: []verbs.SGE{{Length: 100, LKey: mr.LKey()}}})
		start := time.Now()
		err = mr.Deregister()
		var busy *verbs.BusyError
		if !errors.As(err, &busy) || len(busy.Holders) != 1 || busy.Holders[0] != fmt.Sprintf("1 receive requests of QP %d", tc.qp.Num()) {
			t.Fatalf("deregister: %v", err)
		}
		if d := time.Since(start); d != 5*time.Second {
			t.Fatalf("returned after %v", d)
		}
		if tc.dev.mrs.get(uint32(mr.RKey())>>8) != nil {
			t.Fatal("the key is still there")
		}
		if err := tc.qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit); err != nil {
			t.Fatal(err)
		}
		tc.wantWC("", 1, verbs.WCFlushErr)
		if err := mr.Deregister(); err != nil {
			t.Fatal(err)
		}
		if err := mr.Deregister(); err != nil {
			t.Fatalf("the second time: %v", err)
		}
	})
}

// TestSocketFull: while the socket takes nothing the engine sleeps, timers or not, and goes on when
// it does again.
func TestSocketFull(t *testing.T) {
	script(t, func(tc *testContext) {
		full := func(v bool) {
			tc.conn.mu.Lock()
			tc.conn.full = v
			tc.conn.mu.Unlock()
			tc.conn.Wake()
		}
		tc.post(send(1, tc.sge(0, 10)))
		tc.want("", roce.RCSendOnly, tx(0))
		full(true)
		tc.post(send(2, tc.sge(0, 10)))
		time.Sleep(5 * time.Second) // timers expire
		synctest.Wait()
		tc.wantIdle("the socket is full")
		full(false)
		synctest.Wait()
		tc.want("what waited leaves", roce.RCSendOnly, tx(1))
		tc.write(roce.RCAck, tx(1), false, aeth(roce.SynACK, 2), nil)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.wantWC("", 2, verbs.WCSuccess)
		for ok := true; ok; _, ok = tc.read() {
		}
	})
}

// TestBadResponses: an answer of the wrong kind, or of the wrong length, fails the request.
func TestBadResponses(t *testing.T) {
	read := verbs.SendWR{ID: 1, Opcode: verbs.OpRead, RemoteAddr: 0x4000, RKey: 0x77}
	for name, tc := range map[string]struct {
		wr     verbs.SendWR
		n      int
		op     roce.Opcode
		ext    []byte
		data   int
		status verbs.WCStatus
	}{
		"a READ response to a SEND":        {verbs.SendWR{ID: 1, Opcode: verbs.OpSend}, 10, roce.RCReadRespOnly, aeth(roce.SynACK, 1), 10, verbs.WCBadRespErr},
		"an atomic's answer to a SEND":     {verbs.SendWR{ID: 1, Opcode: verbs.OpSend}, 10, roce.RCAtomicAck, append(aeth(roce.SynACK, 1), make([]byte, 8)...), 0, verbs.WCBadRespErr},
		"an atomic's answer to a READ":     {read, 10, roce.RCAtomicAck, append(aeth(roce.SynACK, 1), make([]byte, 8)...), 0, verbs.WCBadRespErr},
		"Last in the middle of a READ":     {read, 600, roce.RCReadRespOnly, aeth(roce.SynACK, 1), 256, verbs.WCBadRespErr},
		"a READ response that is short":    {read, 100, roce.RCReadRespOnly, aeth(roce.SynACK, 1), 99, verbs.WCLocLenErr},
		"a READ response that is too long": {read, 100, roce.RCReadRespOnly, aeth(roce.SynACK, 1), 101, verbs.WCLocLenErr},
	} {
		t.Run(name, func(t *testing.T) {
			script(t, func(c *testContext) {
				tc.wr.SGs = c.sge(0, tc.n)
				c.post(tc.wr, send(2, nil))
				for {
					if _, ok := c.read(); !ok {
						break
					}
				}
				c.write(tc.op, tx(0), false, tc.ext, make([]byte, tc.data))
				c.wantWC("the request fails", 1, tc.status)
				c.wantWC("what is behind is flushed", 2, verbs.WCFlushErr)
				if s := c.qp.State(); s != verbs.StateErr {
					t.Errorf("QP is in %v", s)
				}
			})
		})
	}
}

// TestOverlappingReads: READ duplicates move the answer in progress, they never start a second, and a plain ACK never
// carries a READ's PSN.
func TestOverlappingReads(t *testing.T) {
	script(t, func(tc *testContext) {
		const n = 4 * 256
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey(), n), nil)
		for i, op := range []roce.Opcode{roce.RCReadRespFirst, roce.RCReadRespMiddle, roce.RCReadRespMiddle, roce.RCReadRespLast} {
			tc.want("the answer", op, rx(i))
		}
		tc.wantIdle("a READ's answer is its acknowledgement")
		tc.write(roce.RCReadRequest, rx(2), true, reth(testIOVA+512, tc.mr.RKey(), n-512), nil)
		tc.want("asked again from the middle", roce.RCReadRespFirst, rx(2))
		pk := tc.want("", roce.RCReadRespLast, rx(3))
		if string(pk.Payload) != string(tc.mem[768:1024]) {
			t.Error("replayed data")
		}
		tc.write(roce.RCReadRequest, rx(1), true, reth(testIOVA, tc.mr.RKey(), 256), nil)
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey()^1, n), nil)
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey(), n+1), nil)
		tc.wantIdle("replays with another range or key are dropped")
	})
}
