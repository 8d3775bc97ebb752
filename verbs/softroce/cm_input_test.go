package softroce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/psn"
	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// cmPeer is a peer whose messages the test writes itself.
type cmPeer struct {
	t    *testing.T
	n    *cmNet
	h    *cmTestHost // whom it talks to
	addr netip.Addr
	guid uint64
}

func newCMPeer(t *testing.T, n *cmNet, h *cmTestHost) *cmPeer {
	return &cmPeer{t: t, n: n, h: h, addr: netip.MustParseAddr("10.0.0.77"), guid: 0x77}
}

func (p *cmPeer) say(m interface{ Encode([]byte) }) {
	p.h.cm.input(p.addr, encode(m))
	synctest.Wait()
}

// req is a REQ that a listener takes.
func (p *cmPeer) req(id uint32, qpn uint32) *cmwire.REQ {
	r := &cmwire.REQ{
		TID: uint64(id), LocalCommID: id, ServiceID: reqServiceID(cmTestPort), LocalCAGUID: p.guid, LocalQPN: qpn,
		PKey: 0xFFFF, PathMTU: 5, MaxCMRetries: 15, RetryCount: 6, RNRRetryCount: 7, StartingPSN: 77,
		Primary: cmwire.Path{LocalGID: cmwire.GIDOf(p.addr), RemoteGID: cmwire.GIDOf(p.h.addr), AckTimeout: 17, HopLimit: 64},
	}
	cma := cmwire.CMAHeader{SrcPort: 4000, Src: p.addr, Dst: p.h.addr}
	cma.Encode(r.PrivateData[:])
	return r
}

// hears returns the one MAD that the host has sent since the last call, or fails.
func (p *cmPeer) hears(why string, m interface{ Decode([]byte) error }) {
	p.t.Helper()
	synctest.Wait()
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	sent := p.n.sent
	p.n.sent = nil
	if len(sent) != 1 || sent[0].to != p.addr {
		p.t.Fatalf("%s: %d messages", why, len(sent))
	}
	if err := m.Decode(sent[0].mad[:]); err != nil {
		p.t.Fatalf("%s: %v is answered with %v", why, err, sent[0].attr)
	}
}

// hearsNothing fails if the host has sent anything.
func (p *cmPeer) hearsNothing(why string) {
	p.t.Helper()
	p.n.wantTrace(why, "")
}

func (p *cmPeer) hearsREJ(why string, message uint8, reason cmwire.Reason) cmwire.REJ {
	p.t.Helper()
	var rej cmwire.REJ
	p.hears(why, &rej)
	if rej.Message != message || rej.Reason != reason {
		p.t.Errorf("%s: rejected for message %d, %v; want %d, %v", why, rej.Message, rej.Reason, message, reason)
	}
	return rej
}

// connect establishes a connection from p; ids of both.
func (p *cmPeer) connect(ac *accepted, id, qpn uint32) (*acceptedOne, cmwire.REP) {
	p.t.Helper()
	p.say(p.req(id, qpn))
	var rep cmwire.REP
	p.hears("REQ", &rep)
	p.say(&cmwire.RTU{LocalCommID: id, RemoteCommID: rep.LocalCommID})
	o := <-ac.got
	if o.err != nil {
		p.t.Fatal(o.err)
	}
	return o, rep
}

func cmPeerTest(t *testing.T, f func(t *testing.T, p *cmPeer, ac *accepted)) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		b := n.host("B", "10.0.0.2", 2)
		ac := b.accept(cmPassiveParam, nil)
		f(t, newCMPeer(t, n, b), ac)
		settle()
		ac.l.Close()
		b.cm.close()
		b.wantEmpty()
	})
}

// TestCMREQValidation: what is wrong with a REQ, and what it gets for it (rocev2 spec 7.7).
func TestCMREQValidation(t *testing.T) {
	other := netip.MustParseAddr("10.0.0.78")
	for _, tc := range []struct {
		name   string
		break_ func(p *cmPeer, r *cmwire.REQ)
		reason cmwire.Reason // 0: dropped
		stat   cmCounter
	}{
		{"no communication ID", func(p *cmPeer, r *cmwire.REQ) { r.LocalCommID = 0 }, 0, cmMalformed},
		{"QP 0", func(p *cmPeer, r *cmwire.REQ) { r.LocalQPN = 0 }, 0, cmMalformed},
		{"QP 1", func(p *cmPeer, r *cmwire.REQ) { r.LocalQPN = 1 }, 0, cmMalformed},
		{"multicast QP", func(p *cmPeer, r *cmwire.REQ) { r.LocalQPN = 0xFFFFFF }, 0, cmMalformed},
		{"port nobody listens on", func(p *cmPeer, r *cmwire.REQ) { r.ServiceID++ }, 8, cmREQNoListener},
		{"port space", func(p *cmPeer, r *cmwire.REQ) { r.ServiceID = cmwire.ServiceID(cmwire.PortSpaceIB, cmTestPort) }, 8, cmREQNoListener},
		{"service ID of another kind", func(p *cmPeer, r *cmwire.REQ) { r.ServiceID |= 1 << 40 }, 8, cmREQNoListener},
		{"P_Key", func(p *cmPeer, r *cmwire.REQ) { r.PKey = 0x8001 }, 12, cmREQBadPath},
		{"source GID", func(p *cmPeer, r *cmwire.REQ) { r.Primary.LocalGID = cmwire.GIDOf(other) }, 12, cmREQBadPath},
		{"destination GID", func(p *cmPeer, r *cmwire.REQ) { r.Primary.RemoteGID = cmwire.GIDOf(other) }, 12, cmREQBadPath},
		{"source GID of IPv6", func(p *cmPeer, r *cmwire.REQ) { r.Primary.LocalGID = cmwire.GIDOf(netip.MustParseAddr("fd00::1")) }, 12, cmREQBadPath},
		{"unreliable connection", func(p *cmPeer, r *cmwire.REQ) { r.TransportType = cmwire.TransportUC }, 9, cmREQBadPath},
		{"XRC", func(p *cmPeer, r *cmwire.REQ) { r.TransportType = cmwire.TransportXRC }, 9, cmREQBadPath},
		{"CMA version", func(p *cmPeer, r *cmwire.REQ) { r.PrivateData[0] = 1 }, 28, cmREQBadPath},
		{"CMA IP version", func(p *cmPeer, r *cmwire.REQ) { r.PrivateData[1] = 0x50 }, 28, cmREQBadPath},
		{"CMA IPv6", func(p *cmPeer, r *cmwire.REQ) { r.PrivateData[1] = 0x60 }, 28, cmREQBadPath},
		{"CMA destination", func(p *cmPeer, r *cmwire.REQ) { r.PrivateData[35]++ }, 28, cmREQBadPath},
		{"path MTU 0", func(p *cmPeer, r *cmwire.REQ) { r.PathMTU = 0 }, 26, cmREQBadMTU},
		{"path MTU 6", func(p *cmPeer, r *cmwire.REQ) { r.PathMTU = 6 }, 26, cmREQBadMTU},
		{"path MTU beyond ours", func(p *cmPeer, r *cmwire.REQ) { p.h.mtu = verbs.MTU1024; r.PathMTU = 4 }, 26, cmREQBadMTU},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
				r := p.req(5, 0x55)
				tc.break_(p, r)
				p.say(r)
				if tc.reason == 0 {
					p.hearsNothing("malformed REQ")
				} else {
					rej := p.hearsREJ("bad REQ", cmwire.ForREQ, tc.reason)
					if rej.RemoteCommID != 5 || rej.LocalCommID != 0 || rej.TID != 5 {
						t.Errorf("REJ with IDs %d and %d, TID %d", rej.LocalCommID, rej.RemoteCommID, rej.TID)
					}
					if gid := cmwire.GIDOf(p.h.addr); tc.reason == 12 && !bytes.Equal(rej.Info(), gid[:]) {
						t.Errorf("acceptable GID %x", rej.Info())
					}
				}
				if p.h.stat(tc.stat) != 1 {
					t.Errorf("%s is %d", cmCounterNames[tc.stat], p.h.stat(tc.stat))
				}
				p.h.wantEmpty()
			})
		})
	}
	// What no kernel validates must not matter (rocev2 spec 7.7).
	t.Run("harmless oddities", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			r := p.req(5, 0x55)
			r.PKey, r.LocalQKey, r.Modifier, r.VendorID = 0x7FFF, 9, 1, 5
			r.Primary.LocalLID, r.Primary.PacketRate, r.Primary.SL, r.Primary.FlowLabel = 1, 63, 3, 12
			p.say(r)
			p.hears("REQ", new(cmwire.REP))
		})
	})
}

// TestCMUnexpected: messages that fit no connection, or not its state (rocev2 spec 7.5, 7.9).
func TestCMUnexpected(t *testing.T) {
	cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
		o, rep := p.connect(ac, 5, 0x55)
		ours, qpn := rep.LocalCommID, rep.LocalQPN
		estab := func(why string) {
			t.Helper()
			p.hearsNothing(why)
			p.h.wantState(why, cmEstab)
		}
		p.say(p.req(5, 0x55))
		estab("duplicate REQ")
		p.say(&cmwire.RTU{LocalCommID: 5, RemoteCommID: ours})
		estab("duplicate RTU")
		p.say(&cmwire.REP{LocalCommID: 5, RemoteCommID: ours, LocalQPN: 0x55})
		estab("REP for a passive connection")
		p.say(&cmwire.REP{LocalCommID: 5, RemoteCommID: ours + 1, LocalQPN: 0x55})
		estab("REP for an unknown ID")
		p.say(&cmwire.REP{LocalCommID: 0, RemoteCommID: ours, LocalQPN: 0x55})
		estab("REP without an ID")
		p.say(&cmwire.DREP{LocalCommID: 5, RemoteCommID: ours})
		estab("DREP without a DREQ")
		for m := range uint8(4) {
			p.say(&cmwire.MRA{LocalCommID: 5, RemoteCommID: ours, Message: m, ServiceTimeout: 31})
			estab("MRA")
		}
		p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: ours, Message: cmwire.ForREQ, Reason: 28})
		estab("REJ of the REQ after the REP")
		p.say(&cmwire.REJ{LocalCommID: 6, RemoteCommID: ours, Message: cmwire.ForOther, Reason: 28})
		estab("REJ with another ID")
		p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: 0, Message: cmwire.ForOther, Reason: cmwire.RejTimeout})
		estab("REJ 4 without a GUID")
		p.say(&cmwire.DREQ{LocalCommID: 5, RemoteCommID: ours, RemoteQPN: qpn + 1})
		estab("DREQ with the wrong QPN")
		p.say(&cmwire.LAP{LocalCommID: 5, RemoteCommID: ours})
		p.say(&cmwire.SIDRREQ{RequestID: 1})
		estab("messages that are not for us")
		if p.h.stat(cmIgnored) != 2 {
			t.Errorf("%d ignored", p.h.stat(cmIgnored))
		}

		// Another host that knows the IDs does no harm.
		evil := *p
		evil.addr = netip.MustParseAddr("10.0.0.66")
		evil.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: ours, Message: cmwire.ForOther, Reason: 28})
		estab("REJ from elsewhere")
		evil.say(&cmwire.DREQ{TID: 99, LocalCommID: 5, RemoteCommID: ours, RemoteQPN: qpn})
		var drep cmwire.DREP
		evil.hears("DREQ from elsewhere", &drep)
		evil.say(evil.req(5, 0x55))
		evil.hears("REQ from elsewhere with the same GUID, ID and QPN", new(cmwire.REP))
		if isDone(o.ep) {
			t.Error("another host ended the connection")
		}
		evil.say(&cmwire.REJ{LocalCommID: 5, Message: cmwire.ForOther, Reason: cmwire.RejTimeout, ARILen: 8, ARI: [72]byte{7: 0x77}})
		if e := <-ac.got; !errors.Is(e.err, verbs.ErrTimeout) {
			t.Errorf("accept: %v", e.err)
		}

		// DREQ for IDs nobody knows: answered, swapped, with its TID.
		p.say(&cmwire.DREQ{TID: 0x1234, LocalCommID: 70, RemoteCommID: 71, RemoteQPN: 72})
		p.hears("DREQ for an unknown ID", &drep)
		if drep.TID != 0x1234 || drep.LocalCommID != 71 || drep.RemoteCommID != 70 {
			t.Errorf("DREP %+v", drep)
		}

		// The real one; then what comes in timewait.
		p.say(&cmwire.DREQ{TID: 8, LocalCommID: 5, RemoteCommID: ours, RemoteQPN: qpn})
		p.hears("DREQ", &drep)
		if !isDone(o.ep) || drep.TID != 8 || drep.LocalCommID != ours || drep.RemoteCommID != 5 {
			t.Errorf("done %v, DREP %+v", isDone(o.ep), drep)
		}
		p.say(&cmwire.DREQ{TID: 9, LocalCommID: 5, RemoteCommID: ours, RemoteQPN: qpn})
		p.hears("DREQ in timewait", &drep)
		if drep.TID != 9 || p.h.stat(cmDupDREQ) != 1 {
			t.Errorf("DREP %+v", drep)
		}
		p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: ours, Message: cmwire.ForOther, Reason: 28})
		p.say(&cmwire.RTU{LocalCommID: 5, RemoteCommID: ours})
		p.hearsNothing("REJ and RTU in timewait")
		p.say(p.req(5, 0x55))
		p.hearsREJ("duplicate REQ in timewait", cmwire.ForREQ, cmwire.RejStaleConn)
		// Its QPN, though, is the peer's to use again.
		p.say(p.req(6, 0x55))
		p.hears("REQ with the QPN of a connection in timewait", new(cmwire.REP))
	})
}

// TestCMDuplicateREP: what a second REP meets on the active side (rocev2 spec 7.9).
func TestCMDuplicateREP(t *testing.T) {
	cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
		d := p.h.dial(context.Background(), &cmTestHost{addr: p.addr}, cmActiveParam)
		var req cmwire.REQ
		var rtu, again cmwire.RTU
		p.hears("REQ", &req)
		rep := cmwire.REP{LocalCommID: 9, RemoteCommID: req.LocalCommID, LocalQPN: 0x55, LocalCAGUID: p.guid}
		p.say(&rep)
		p.hears("REP", &rtu)
		if d.wait().err != nil || rtu.LocalCommID != req.LocalCommID || rtu.RemoteCommID != 9 || rtu.TID != req.TID {
			t.Errorf("connect: %v, RTU %+v", d.err, rtu)
		}
		p.say(&rep)
		p.hears("the same REP", &again)
		if again != rtu {
			t.Error("the second RTU differs")
		}
		rep.LocalCommID = 10
		p.say(&rep)
		p.hearsNothing("REP with another ID")
		d.ep.Disconnect()
		p.hears("disconnect", new(cmwire.DREQ))
		rep.LocalCommID = 9
		p.say(&rep)
		p.hearsNothing("REP after DREQ")
		p.h.wantState("REP after DREQ", cmDreqSent)
	})
}

// TestCMDuplicateREQ: what a duplicate REQ meets in each state of the passive side (rocev2 spec 7.9).
func TestCMDuplicateREQ(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		b := n.host("B", "10.0.0.2", 2)
		think := make(chan struct{})
		ac := b.accept(cmPassiveParam, func(verbs.ConnRequest) { <-think })
		p := newCMPeer(t, n, b)

		// Before the handler was called. The lock keeps it from being.
		b.cm.mu.Lock()
		for range 3 {
			b.cm.handleLocked(p.addr, (*[madBytes]byte)(encode(p.req(5, 0x55))))
		}
		b.cm.unlock()
		p.hearsNothing("not delivered yet")

		p.say(p.req(5, 0x55))
		var mra cmwire.MRA
		p.hears("application thinking", &mra)
		if mra.Message != cmwire.ForREQ || mra.RemoteCommID != 5 || mra.LocalCommID == 0 || mra.ServiceTimeout != 20 {
			t.Errorf("MRA %+v", mra)
		}
		close(think)
		var rep, again cmwire.REP
		p.hears("REP", &rep)
		p.say(p.req(5, 0x55))
		p.hears("after REP", &again)
		if rep != again {
			t.Error("the REP that answers a duplicate differs")
		}
		// MRA of the REP: the next one waits for its time.
		p.say(&cmwire.MRA{LocalCommID: 5, RemoteCommID: rep.LocalCommID, Message: cmwire.ForREP, ServiceTimeout: 20})
		b.wantState("MRA of the REP", cmMRARepRcvd)
		time.Sleep(4600 * time.Millisecond)
		p.hearsNothing("patience")
		p.say(p.req(5, 0x55))
		p.hears("duplicate REQ after MRA", &again)
		time.Sleep(20 * time.Millisecond)
		p.hears("patience has ended", &again)
		p.say(&cmwire.RTU{LocalCommID: 5, RemoteCommID: rep.LocalCommID})
		if o := <-ac.got; o.err != nil {
			t.Fatal(o.err)
		}
		if b.stat(cmREQs) != 1 || b.stat(cmDupREQ) != 5 {
			t.Errorf("%d REQs, %d duplicates", b.stat(cmREQs), b.stat(cmDupREQ))
		}
		b.cm.close()
	})
}

// TestCMStale: a peer that uses a QPN again has lost the old connection.
func TestCMStale(t *testing.T) {
	t.Run("REQ, established", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			o, rep := p.connect(ac, 5, 0x55)
			p.say(p.req(6, 0x55))
			if !isDone(o.ep) || o.qp.State() != verbs.StateErr {
				t.Error("the old connection lives on")
			}
			var dreq cmwire.DREQ
			if s := p.n.sentBy(p.h, cmwire.AttrDREQ); len(s) != 1 || dreq.Decode(s[0].mad[:]) != nil ||
				dreq.LocalCommID != rep.LocalCommID || dreq.RemoteCommID != 5 || dreq.RemoteQPN != 0x55 {
				t.Errorf("DREQ for the old connection: %+v", dreq)
			}
			p.n.wantTrace("stale", "B DREQ, B REJ")
			// The peer, restarted, knows nothing of it and says so; then it tries once more.
			p.say(&cmwire.DREP{TID: dreq.TID, LocalCommID: dreq.RemoteCommID, RemoteCommID: dreq.LocalCommID})
			p.connect(ac, 7, 0x55)
			if p.h.stat(cmStale) != 1 {
				t.Error("not counted")
			}
		})
	})
	t.Run("REQ, handshake", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			p.say(p.req(5, 0x55))
			p.hears("REQ", new(cmwire.REP))
			p.say(p.req(6, 0x55))
			p.hearsREJ("QPN of a handshake", cmwire.ForREQ, cmwire.RejStaleConn)
			if o := <-ac.got; !errors.Is(o.err, verbs.ErrStaleConn) {
				t.Errorf("accept: %v", o.err)
			}
			p.connect(ac, 7, 0x55)
		})
	})
	t.Run("REP", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			o, _ := p.connect(ac, 5, 0x55)
			d := p.h.dial(context.Background(), &cmTestHost{addr: p.addr}, cmActiveParam)
			var req cmwire.REQ
			p.hears("REQ", &req)
			p.say(&cmwire.REP{LocalCommID: 9, RemoteCommID: req.LocalCommID, LocalQPN: 0x55, LocalCAGUID: p.guid})
			if !isDone(o.ep) {
				t.Error("the old connection lives on")
			}
			if !errors.Is(d.wait().err, verbs.ErrStaleConn) {
				t.Errorf("connect: %v", d.err)
			}
			p.n.wantTrace("stale", "B DREQ, B REJ")
		})
	})
	t.Run("told so", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			d := p.h.dial(context.Background(), &cmTestHost{addr: p.addr}, cmActiveParam)
			var req cmwire.REQ
			p.hears("REQ", &req)
			p.say(&cmwire.REJ{RemoteCommID: req.LocalCommID, Message: cmwire.ForREQ, Reason: cmwire.RejStaleConn})
			if !errors.Is(d.wait().err, verbs.ErrStaleConn) {
				t.Errorf("connect: %v", d.err)
			}
			p.h.wantState("REJ 10", cmTimewait)
			if !p.h.cm.qpClosed(d.qp.n) {
				t.Error("QPN not held")
			}
			time.Sleep(600 * time.Millisecond)
			synctest.Wait()
			if !p.h.isReleased(d.qp.n) {
				t.Error("QPN not released")
			}
		})
	})
}

// TestCMEnded: ways in which a connection or handshake ends that are not a DREQ.
func TestCMEnded(t *testing.T) {
	t.Run("REJ when established", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			o, rep := p.connect(ac, 5, 0x55)
			p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: rep.LocalCommID, Message: cmwire.ForOther, Reason: 28})
			if !isDone(o.ep) || o.qp.State() != verbs.StateErr {
				t.Error("the connection lives on")
			}
			p.h.wantState("REJ", cmTimewait)
			p.hearsNothing("REJ is not answered")
		})
	})
	t.Run("REJ of REP", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			p.say(p.req(5, 0x55))
			var rep cmwire.REP
			p.hears("REQ", &rep)
			p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: rep.LocalCommID, Message: cmwire.ForREP, Reason: 28, PrivateData: [148]byte{3}})
			o := <-ac.got
			var re *verbs.RejectError
			if !errors.As(o.err, &re) || re.Reason != 28 || re.PrivateData[0] != 3 {
				t.Errorf("accept: %v", o.err)
			}
			p.h.wantEmpty()
		})
	})
	t.Run("REJ when DREQ was sent", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			o, rep := p.connect(ac, 5, 0x55)
			o.ep.Disconnect()
			p.hears("disconnect", new(cmwire.DREQ))
			p.say(&cmwire.REJ{LocalCommID: 5, RemoteCommID: rep.LocalCommID, Message: cmwire.ForOther, Reason: 28})
			p.h.wantState("REJ", cmTimewait)
		})
	})
	t.Run("REJ and DREQ when REP was received", func(t *testing.T) {
		for _, how := range []string{"REJ", "DREQ", "QP closed"} {
			cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
				qp := p.h.qp()
				var req cmwire.REQ
				qp.hook = func(to verbs.QPState) error {
					if to == verbs.StateRTR {
						switch how {
						case "REJ":
							p.h.cm.input(p.addr, encode(&cmwire.REJ{LocalCommID: 9, RemoteCommID: req.LocalCommID, Message: cmwire.ForOther, Reason: 28}))
						case "DREQ":
							p.h.cm.input(p.addr, encode(&cmwire.DREQ{LocalCommID: 9, RemoteCommID: req.LocalCommID, RemoteQPN: req.LocalQPN}))
						default:
							p.h.cm.qpClosed(qp.n)
						}
						time.Sleep(time.Millisecond)
					}
					return nil
				}
				d := p.h.dialQP(context.Background(), &cmTestHost{addr: p.addr}, qp, cmActiveParam)
				p.hears("REQ", &req)
				p.say(&cmwire.REP{LocalCommID: 9, RemoteCommID: req.LocalCommID, LocalQPN: 0x55, LocalCAGUID: p.guid})
				var re *verbs.RejectError
				err := d.wait().err
				switch {
				case how == "REJ" && errors.As(err, &re), how == "DREQ" && errors.Is(err, errPeerLeft), how == "QP closed" && errors.Is(err, verbs.ErrClosed):
				default:
					t.Errorf("%s: connect: %v", how, err)
				}
				qp.wantState(t, how, verbs.StateErr)
			})
		}
	})
	t.Run("QP closed", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			o, rep := p.connect(ac, 5, 0x55)
			if !p.h.cm.qpClosed(o.qp.n) {
				t.Error("QPN not held")
			}
			var dreq cmwire.DREQ
			p.hears("QP closed", &dreq)
			if !isDone(o.ep) || o.qp.errs != 0 {
				t.Errorf("done %v, %d calls into a closed QP", isDone(o.ep), o.qp.errs)
			}
			p.say(&cmwire.DREP{LocalCommID: 5, RemoteCommID: rep.LocalCommID})
			if p.h.isReleased(o.qp.n) {
				t.Error("QPN released before timewait")
			}
			settle()
			if !p.h.isReleased(o.qp.n) {
				t.Error("QPN not released")
			}
		})
	})
	t.Run("QP used again in timewait", func(t *testing.T) {
		// A user may reset the QP and connect it once more. Its number is then held twice.
		synctest.Test(t, func(t *testing.T) {
			_, a, b := twoHosts(t)
			ac := b.accept(cmPassiveParam, nil)
			qp := a.qp()
			d := a.dialQP(context.Background(), b, qp, cmActiveParam).wait()
			<-ac.got
			d.ep.Disconnect()
			time.Sleep(10 * time.Millisecond)
			qp.mu.Lock()
			qp.state = verbs.StateReset
			qp.mu.Unlock()
			e := a.dialQP(context.Background(), b, qp, cmActiveParam).wait()
			if e.err != nil {
				t.Fatal(e.err)
			}
			d.ep.Disconnect() // of the connection that has ended
			synctest.Wait()
			qp.wantState(t, "an old endpoint is disconnected again", verbs.StateRTS)
			time.Sleep(time.Minute)
			a.cm.qpClosed(qp.n)
			if !isDone(e.ep) && a.isReleased(qp.n) {
				t.Error("QPN released while in use")
			}
			settle()
			if !a.isReleased(qp.n) || len(a.released) != 1 {
				t.Errorf("released %v", a.released)
			}
			a.wantEmpty()
			b.cm.close()
		})
	})
}

// TestCMBounds: what sources can make us keep is bounded, per source and in total, is counted, and is
// free again when the handshakes are over.
func TestCMBounds(t *testing.T) {
	ask := func(n *cmNet, h *cmTestHost, src netip.Addr, id uint32) {
		p := cmPeer{n: n, h: h, addr: src, guid: uint64(id)}
		h.cm.input(src, encode(p.req(id, 0x1000+id)))
		if id%100 == 0 {
			synctest.Wait() // the queue is bounded too
		}
	}
	t.Run("per source", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			b := n.host("B", "10.0.0.2", 2)
			running := make(chan struct{}, 1000)
			stop := make(chan struct{})
			l := b.listen(func(verbs.ConnRequest) { running <- struct{}{}; <-stop })
			src := netip.MustParseAddr("10.0.0.77")
			for i := range uint32(300) {
				ask(n, b, src, i+1)
			}
			synctest.Wait()
			if len(running) != cmMaxPerSource || b.stat(cmREQOverSource) != 300-cmMaxPerSource {
				t.Errorf("%d handlers run, %d dropped", len(running), b.stat(cmREQOverSource))
			}
			ask(n, b, netip.MustParseAddr("10.0.0.78"), 5)
			synctest.Wait()
			if len(running) != cmMaxPerSource+1 {
				t.Error("another source is kept out")
			}
			// A peer that takes its REQs back frees no place while the handlers run.
			for i := range uint32(300) {
				rej := cmwire.REJ{LocalCommID: i + 1, Message: cmwire.ForOther, Reason: cmwire.RejTimeout, ARILen: 8, ARI: [72]byte{6: byte((i + 1) >> 8), 7: byte(i + 1)}}
				b.cm.input(src, encode(&rej))
			}
			synctest.Wait()
			if b.stat(cmRejReceived) != cmMaxPerSource {
				t.Errorf("%d taken back", b.stat(cmRejReceived))
			}
			ask(n, b, src, 1001)
			synctest.Wait()
			if len(running) != cmMaxPerSource+1 {
				t.Error("more handlers than places")
			}
			close(stop)
			synctest.Wait()
			ask(n, b, src, 1002)
			synctest.Wait()
			if len(running) != cmMaxPerSource+2 {
				t.Error("places are not free again")
			}
			settle()
			l.Close()
			b.wantEmpty()
		})
	})
	t.Run("in total, accepted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			b := n.host("B", "10.0.0.2", 2)
			ac := b.accept(cmPassiveParam, nil)
			total := uint32(cmMaxPending + 200)
			for i := range total {
				ask(n, b, netip.AddrFrom4([4]byte{10, 1, byte(i >> 5), byte(i & 7)}), i+1)
			}
			synctest.Wait()
			b.cm.mu.Lock()
			conns, pending := len(b.cm.conns), b.cm.nPending
			b.cm.mu.Unlock()
			if conns != cmMaxPending || pending != cmMaxPending || b.stat(cmREQOverTotal) != uint64(total-cmMaxPending) {
				t.Errorf("%d connections, %d pending, %d dropped", conns, pending, b.stat(cmREQOverTotal))
			}
			settle() // none of them ever says RTU
			b.wantEmpty()
			p := newCMPeer(t, n, b)
			n.trace()
			for len(ac.got) > 0 {
				if o := <-ac.got; !errors.Is(o.err, verbs.ErrUnreachable) {
					t.Fatalf("accept: %v", o.err)
				}
			}
			p.connect(ac, 5, 0x55)
			b.cm.close()
		})
	})
	t.Run("in timewait", func(t *testing.T) {
		cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
			p.h.cm.mu.Lock()
			p.h.cm.lingering = cmMaxLingering
			p.h.cm.mu.Unlock()
			p.say(p.req(5, 0x55))
			p.hearsNothing("full of timewait")
			p.h.cm.mu.Lock()
			p.h.cm.lingering = 0
			p.h.cm.mu.Unlock()
			o, rep := p.connect(ac, 5, 0x55)
			p.say(&cmwire.DREQ{LocalCommID: 5, RemoteCommID: rep.LocalCommID, RemoteQPN: uint32(o.qp.n)})
			p.h.cm.mu.Lock()
			defer p.h.cm.mu.Unlock()
			if p.h.cm.lingering != 1 || p.h.cm.nPending != 0 {
				t.Errorf("%d in timewait, %d pending", p.h.cm.lingering, p.h.cm.nPending)
			}
		})
	})
	t.Run("queue", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			b := n.host("B", "10.0.0.2", 2)
			p := newCMPeer(t, n, b)
			b.cm.mu.Lock() // the worker waits
			dreq := encode(&cmwire.DREQ{LocalCommID: 1, RemoteCommID: 2})
			b.cm.input(p.addr, dreq)
			for b.cm.queued() != 0 {
				runtime.Gosched() // until the worker has taken the first; blocked on a mutex, it would hold virtual time still
			}
			for range 2 * cmMaxQueued {
				b.cm.input(p.addr, dreq)
			}
			if q := b.cm.queued(); q != cmMaxQueued || b.stat(cmQueueFull) != cmMaxQueued {
				t.Errorf("%d queued, %d dropped", q, b.stat(cmQueueFull))
			}
			b.cm.mu.Unlock()
			synctest.Wait()
			if got := len(n.sentBy(b, cmwire.AttrDREP)); got != cmMaxQueued+1 {
				t.Errorf("%d answered", got)
			}
			b.wantEmpty()
		})
	})
}

func (m *connManager) queued() int {
	m.q.mu.Lock()
	defer m.q.mu.Unlock()
	return len(m.q.mads)
}

// TestCMTimewaitBounds: the peer's ACK timeout decides how long timewait is, within limits.
func TestCMTimewaitBounds(t *testing.T) {
	for _, tc := range []struct {
		code uint8
		want time.Duration
	}{{0, cmMinTimewait}, {1, cmMinTimewait}, {19, 4096 * time.Nanosecond << 19}, {31, cmMaxTimewait}} {
		t.Run(fmt.Sprint(tc.code), func(t *testing.T) {
			cmPeerTest(t, func(t *testing.T, p *cmPeer, ac *accepted) {
				r := p.req(5, 0x55)
				r.Primary.AckTimeout = tc.code
				p.say(r)
				var rep cmwire.REP
				p.hears("REQ", &rep)
				p.say(&cmwire.RTU{LocalCommID: 5, RemoteCommID: rep.LocalCommID})
				<-ac.got
				p.say(&cmwire.DREQ{LocalCommID: 5, RemoteCommID: rep.LocalCommID, RemoteQPN: rep.LocalQPN})
				p.h.wantState("DREQ", cmTimewait)
				time.Sleep(tc.want - time.Nanosecond)
				p.h.wantState("not over yet", cmTimewait)
				time.Sleep(time.Nanosecond)
				p.h.wantEmpty()
			})
		})
	}
}

// TestGSI: what is not a CM MAD in a UD SEND to QP 1 is dropped and counted.
func TestGSI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newCMNet(t)
		b := n.host("B", "10.0.0.2", 2)
		p := newCMPeer(t, n, b)
		good := encode(&cmwire.DREQ{LocalCommID: 1, RemoteCommID: 2})
		change := func(at int, v byte) []byte {
			m := bytes.Clone(good)
			m[at] = v
			return m
		}
		packet := func(op roce.Opcode, qkey uint32, payload []byte) *roce.Packet {
			raw := make([]byte, op.Info().HdrLen+len(payload)+roce.ICRCLen)
			roce.PutBTH(raw, op, false, 0, false, gsiQPN, psn.New(0))
			if op == roce.UDSendOnly {
				roce.PutDETH(raw[roce.BTHLen:], qkey, gsiQPN)
			}
			copy(raw[op.Info().HdrLen:], payload)
			pk := new(roce.Packet)
			if err := roce.Parse(raw, pk); err != nil {
				t.Fatal(err)
			}
			return pk
		}
		for _, tc := range []struct {
			name string
			pk   *roce.Packet
			stat cmCounter
		}{
			{"RC opcode", packet(roce.RCSendOnly, 0, good), cmGSIBadOpcode},
			{"Q_Key", packet(roce.UDSendOnly, 0x80010001, good), cmGSIBadQKey},
			{"short", packet(roce.UDSendOnly, roce.GSIQKey, good[:252]), cmGSIBadLength},
			{"long", packet(roce.UDSendOnly, roce.GSIQKey, append(bytes.Clone(good), 0, 0, 0, 0)), cmGSIBadLength},
			{"base version", packet(roce.UDSendOnly, roce.GSIQKey, change(0, 2)), cmGSINotCM},
			{"class", packet(roce.UDSendOnly, roce.GSIQKey, change(1, 0x03)), cmGSINotCM},
			{"class version", packet(roce.UDSendOnly, roce.GSIQKey, change(2, 1)), cmGSINotCM},
			{"method", packet(roce.UDSendOnly, roce.GSIQKey, change(3, 0x81)), cmGSINotCM},
		} {
			before := b.stat(tc.stat)
			b.cm.gsiInput(p.addr, tc.pk)
			if b.stat(tc.stat) != before+1 {
				t.Errorf("%s is not counted as %s", tc.name, cmCounterNames[tc.stat])
			}
		}
		n.wantTrace("bad packets", "")
		b.cm.gsiInput(netip.AddrFrom16(p.addr.As16()), packet(roce.UDSendOnly, roce.GSIQKey, good))
		p.hears("a good one", new(cmwire.DREP))

		names := make(map[string]bool)
		for _, name := range cmCounterNames {
			if name == "" || names[name] {
				t.Errorf("counter name %q is missing or double", name)
			}
			names[name] = true
		}
		stats := make(map[string]uint64)
		b.cm.stats.snapshot(stats)
		if len(stats) != int(nCMCounters) || stats["gsi_not_cm"] != 4 || stats["cm_rx_mads"] != 1 || stats["cm_tx_mads"] != 1 {
			t.Errorf("snapshot %v", stats)
		}
	})
}
