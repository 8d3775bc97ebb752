package softroce

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cmwire "github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/verbs"
)

// TestCMLost loses the first messages of each kind.
func TestCMLost(t *testing.T) {
	t.Run("REQ", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrREQ, 3)
			start := time.Now()
			connected(t, a, b)
			// 250 ms, 500 ms and 1 s of patience, then a round trip.
			if d := time.Since(start); d < 1750*time.Millisecond || d > 1760*time.Millisecond {
				t.Errorf("took %v", d)
			}
			reqs := n.sentBy(a, cmwire.AttrREQ)
			for _, r := range reqs[1:] {
				if r.mad != reqs[0].mad {
					t.Error("a retransmitted REQ differs from the first")
				}
			}
			n.wantTrace("three REQs lost", "A REQ, A REQ, A REQ, A REQ, B REP, A RTU")
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("REP", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(b, cmwire.AttrREP, 1)
			start := time.Now()
			connected(t, a, b)
			if d := time.Since(start); d > 255*time.Millisecond {
				t.Errorf("took %v", d)
			}
			// Both timers run out together; the REQ brings out one more REP, whose RTU is a duplicate's.
			time.Sleep(time.Second)
			tr := n.trace()
			if !strings.HasPrefix(tr, "A REQ, B REP, ") || strings.Count(tr, "A REQ") != 2 || !strings.Contains(tr, "A RTU") {
				t.Errorf("trace %s", tr)
			}
			a.wantState("REP lost", cmEstab)
			b.wantState("REP lost", cmEstab)
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("RTU", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrRTU, 2)
			ac := b.accept(cmPassiveParam, nil)
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			if d.err != nil {
				t.Fatal(d.err)
			}
			start := time.Now()
			if o := <-ac.got; o.err != nil {
				t.Fatal(o.err)
			}
			if d := time.Since(start); d > 160*time.Millisecond {
				t.Errorf("established after %v", d)
			}
			n.wantTrace("two RTUs lost", "A REQ, B REP, A RTU, A RTU, A RTU")
			a.cm.commEstablished(d.qp.n)
			time.Sleep(time.Minute)
			n.wantTrace("the peer has sent a request", "")
			if a.stat(cmRTURepeats) != 2 || b.stat(cmUnmatched) != 0 {
				t.Errorf("%d RTUs repeated, %d not understood", a.stat(cmRTURepeats), b.stat(cmUnmatched))
			}
			a.cm.close()
			ac.l.Close()
			b.cm.close()
		})
	})
	t.Run("every RTU", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.fate = func(s *cmSent) []time.Duration {
				if s.attr == cmwire.AttrRTU || s.attr == cmwire.AttrREP && s.nth > 1 {
					return nil
				}
				return cmOnce
			}
			b.accept(cmPassiveParam, nil)
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			time.Sleep(10 * time.Second)
			// Bounded, ever slower, and always the same message.
			sent := n.sentBy(a, cmwire.AttrRTU)
			var at []time.Duration
			for _, s := range sent {
				at = append(at, (s.at-sent[0].at)/time.Millisecond)
				if s.mad != sent[0].mad {
					t.Error("a repeated RTU differs")
				}
			}
			if want := []time.Duration{0, 50, 150, 350, 750, 1550}; !slices.Equal(at, want) || a.stat(cmRTURepeats) != 5 {
				t.Errorf("RTUs at %v, want %v ms; %d repetitions counted", at, want, a.stat(cmRTURepeats))
			}
			a.wantState("nothing of the peer's has come", cmEstab)
			n.lose(a, cmwire.AttrRTU, 0)
			d.ep.Disconnect()
			settle()
			a.wantEmpty()
			b.wantEmpty()
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("RTU, then disconnected", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			d, _ := connected(t, a, b)
			time.Sleep(60 * time.Millisecond)
			d.ep.Disconnect()
			settle()
			n.wantTrace("no RTU behind DREQ", "A REQ, B REP, A RTU, A RTU, A DREQ, B DREP")
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("RTU, repeated REP", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrRTU, 2)
			ac := b.accept(cmPassiveParam, nil)
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			a.cm.commEstablished(d.qp.n) // no repetition of its own any more
			if o := <-ac.got; o.err != nil {
				t.Fatal(o.err)
			}
			n.wantTrace("two RTUs lost", "A REQ, B REP, A RTU, B REP, A RTU, B REP, A RTU")
			if a.stat(cmDupREP) != 2 {
				t.Errorf("%d duplicate REPs", a.stat(cmDupREP))
			}
			a.cm.close()
			ac.l.Close()
			b.cm.close()
		})
	})
	t.Run("RTU, data instead", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrRTU, 1000)
			ac := b.accept(cmPassiveParam, nil)
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			if d.err != nil {
				t.Fatal(d.err)
			}
			b.wantState("RTU lost", cmRepSent)
			a.cm.commEstablished(d.qp.n)
			b.cm.commEstablished(b.only().qpn)
			b.cm.commEstablished(0xBADBAD)
			if o := <-ac.got; o.err != nil {
				t.Fatal(o.err)
			}
			if b.stat(cmCommEst) != 1 {
				t.Error("not counted")
			}
			time.Sleep(time.Minute)
			n.wantTrace("data in place of RTU", "A REQ, B REP, A RTU")
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("RTU, DREQ instead", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrRTU, 1000)
			ac := b.accept(cmPassiveParam, nil)
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			d.ep.Disconnect()
			o := <-ac.got
			if !errors.Is(o.err, errPeerLeft) || o.qp.State() != verbs.StateErr {
				t.Errorf("accept: %v", o.err)
			}
			settle()
			n.wantTrace("disconnect before RTU", "A REQ, B REP, A RTU, A DREQ, B DREP")
			ac.l.Close()
			a.wantEmpty()
			b.wantEmpty()
		})
	})
	t.Run("DREQ", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(a, cmwire.AttrDREQ, 2)
			d, o := connected(t, a, b)
			n.trace()
			d.ep.Disconnect()
			<-o.ep.Done()
			settle()
			n.wantTrace("two DREQs lost", "A DREQ, A DREQ, A DREQ, B DREP")
			a.wantEmpty()
			b.wantEmpty()
			b.cm.close()
		})
	})
	t.Run("DREP", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.lose(b, cmwire.AttrDREP, 3)
			d, _ := connected(t, a, b)
			n.trace()
			d.ep.Disconnect()
			settle()
			// The last DREQ finds nothing left at B and is answered all the same.
			n.wantTrace("three DREPs lost", "A DREQ, B DREP, A DREQ, B DREP, A DREQ, B DREP, A DREQ, B DREP")
			if b.stat(cmDupDREQ) == 0 || b.stat(cmUnmatched) == 0 {
				t.Errorf("%d duplicates, %d unknown", b.stat(cmDupDREQ), b.stat(cmUnmatched))
			}
			a.wantEmpty()
			b.wantEmpty()
			b.cm.close()
		})
	})
}

// TestCMNoAnswer: a peer that is silent gets each message 16 times, then we give up.
func TestCMNoAnswer(t *testing.T) {
	gaps := func(s []cmSent) (out []time.Duration) {
		for i := range s[1:] {
			out = append(out, s[i+1].at-s[i].at)
		}
		return out
	}
	want := []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second}
	for len(want) < 15 {
		want = append(want, 6*time.Second)
	}
	t.Run("to REQ", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			a := n.host("A", "10.0.0.1", 1)
			nobody := &cmTestHost{addr: netip.MustParseAddr("10.0.0.9")}
			d := a.dial(context.Background(), nobody, cmActiveParam).wait()
			if !errors.Is(d.err, verbs.ErrUnreachable) {
				t.Errorf("error %v", d.err)
			}
			d.qp.wantState(t, "given up", verbs.StateErr)
			if g := gaps(n.sentBy(a, cmwire.AttrREQ)); !slices.Equal(g, want) {
				t.Errorf("REQ repeated after %v", g)
			}
			wantTimeoutREJ(t, n, a)
			if !a.cm.qpClosed(d.qp.n) {
				t.Error("QPN not held: the peer may know it")
			}
			settle()
			if !a.isReleased(d.qp.n) {
				t.Error("QPN not released")
			}
			a.wantEmpty()
		})
	})
	t.Run("to REP", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			b := n.host("B", "10.77.0.1", 1)
			ac := b.accept(cmPassiveParam, nil)
			b.cm.input(netip.MustParseAddr("10.77.0.2"), kernelMAD(t, kernelREQ)[:])
			o := <-ac.got
			if !errors.Is(o.err, verbs.ErrUnreachable) || o.qp.State() != verbs.StateErr {
				t.Errorf("accept: %v", o.err)
			}
			if g := gaps(n.sentBy(b, cmwire.AttrREP)); !slices.Equal(g, want) {
				t.Errorf("REP repeated after %v", g)
			}
			settle()
			ac.l.Close()
			b.wantEmpty()
		})
	})
	t.Run("to REP, of a peer with few retries", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			b := n.host("B", "10.77.0.1", 1)
			ac := b.accept(cmPassiveParam, nil)
			var req cmwire.REQ
			if err := req.Decode(kernelMAD(t, kernelREQ)[:]); err != nil {
				t.Fatal(err)
			}
			req.MaxCMRetries = 1
			b.cm.input(netip.MustParseAddr("10.77.0.2"), encode(&req))
			start := time.Now()
			o := <-ac.got
			if !errors.Is(o.err, verbs.ErrUnreachable) || len(n.sentBy(b, cmwire.AttrREP)) != 2 || time.Since(start) != 6250*time.Millisecond {
				t.Errorf("accept: %v after %v", o.err, time.Since(start))
			}
			ac.l.Close()
			b.cm.close()
		})
	})
	t.Run("to DREQ", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			d, _ := connected(t, a, b)
			n.trace()
			b.cm.close()
			b.cm = nil
			delete(n.hosts, b.addr)
			n.trace()
			<-d.ep.Done()
			settle()
			// B's own DREQ ended the connection; so that A asks in vain, do it again with a deaf B.
			b = n.host("B", "10.0.0.2", 3)
			d, _ = connected(t, a, b)
			n.trace()
			n.fate = func(*cmSent) []time.Duration { return nil }
			if err := d.ep.Disconnect(); err != nil {
				t.Fatal(err)
			}
			settle()
			dreqs := n.sentBy(a, cmwire.AttrDREQ)
			if g := gaps(dreqs); !slices.Equal(g, want) {
				t.Errorf("DREQ repeated after %v", g)
			}
			a.wantEmpty()
			b.cm.close()
		})
	})
}

// encode is a message as a MAD.
func encode(m interface{ Encode([]byte) }) []byte {
	b := make([]byte, madBytes)
	m.Encode(b)
	return b
}

// wantTimeoutREJ fails unless the last message of h is a REJ 4 with its GUID (rocev2 spec 7.8).
func wantTimeoutREJ(t *testing.T, n *cmNet, h *cmTestHost) {
	t.Helper()
	rejs := n.sentBy(h, cmwire.AttrREJ)
	var rej cmwire.REJ
	if len(rejs) != 1 || rej.Decode(rejs[0].mad[:]) != nil {
		t.Fatalf("%d REJs", len(rejs))
	}
	guid := []byte{byte(h.id >> 56), byte(h.id >> 48), byte(h.id >> 40), byte(h.id >> 32), byte(h.id >> 24), byte(h.id >> 16), byte(h.id >> 8), byte(h.id)}
	if rej.Reason != cmwire.RejTimeout || rej.Message != cmwire.ForOther || rej.LocalCommID == 0 || rej.RemoteCommID != 0 || !slices.Equal(rej.Info(), guid) {
		t.Errorf("REJ %v for message %d, IDs %#x %#x, info %x", rej.Reason, rej.Message, rej.LocalCommID, rej.RemoteCommID, rej.Info())
	}
}

// TestCMCancel: a context that ends takes the attempt back, and the peer hears of it in every state.
func TestCMCancel(t *testing.T) {
	t.Run("connect, peer thinking", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			ac := b.accept(cmPassiveParam, func(verbs.ConnRequest) { time.Sleep(time.Second) })
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			d := a.dial(ctx, b, cmActiveParam).wait()
			if !errors.Is(d.err, context.DeadlineExceeded) {
				t.Errorf("connect: %v", d.err)
			}
			d.qp.wantState(t, "cancelled", verbs.StateErr)
			wantTimeoutREJ(t, n, a)
			o := <-ac.got
			if !errors.Is(o.err, verbs.ErrTimeout) || o.qp.State() != verbs.StateReset {
				t.Errorf("accept: %v, QP %v", o.err, o.qp.State())
			}
			n.wantTrace("cancelled", "A REQ, A REJ")
			settle()
			a.wantEmpty()
			b.wantEmpty()
			b.cm.close()
		})
	})
	t.Run("connect, peer withdrawn in the middle of accept", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			ctx, cancel := context.WithCancel(context.Background())
			got := make(chan error, 1)
			qp := b.qp()
			qp.hook = func(to verbs.QPState) error {
				if to == verbs.StateRTR {
					cancel()
					time.Sleep(time.Second)
				}
				return nil
			}
			b.listen(func(r verbs.ConnRequest) {
				_, err := r.Accept(context.Background(), qp, cmPassiveParam, nil)
				got <- err
			})
			a.dial(ctx, b, cmActiveParam).wait()
			if err := <-got; !errors.Is(err, verbs.ErrTimeout) {
				t.Errorf("accept: %v", err)
			}
			qp.wantState(t, "withdrawn", verbs.StateErr)
			n.wantTrace("no REP for a REQ that was taken back", "A REQ, A REJ")
			settle()
			b.wantEmpty()
			b.cm.close()
		})
	})
	t.Run("connect, REJ lost", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.fate = func(s *cmSent) []time.Duration {
				if s.attr == cmwire.AttrREJ && s.nth == 1 || s.attr == cmwire.AttrREP && s.nth <= 2 {
					return nil
				}
				return cmOnce
			}
			ac := b.accept(cmPassiveParam, nil)
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			a.dial(ctx, b, cmActiveParam).wait()
			// B repeats its REP, and A, which lingers, its REJ.
			o := <-ac.got
			if !errors.Is(o.err, verbs.ErrTimeout) {
				t.Errorf("accept: %v", o.err)
			}
			n.wantTrace("REJ lost", "A REQ, B REP, A REJ, B REP, B REP, A REJ")
			settle()
			a.wantEmpty()
			b.wantEmpty()
			b.cm.close()
		})
	})
	t.Run("accept", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			n.fate = func(s *cmSent) []time.Duration {
				switch {
				case s.attr == cmwire.AttrRTU && s.nth == 1:
					return []time.Duration{time.Second}
				case s.attr == cmwire.AttrRTU:
					return nil
				case s.attr == cmwire.AttrREJ && s.nth == 1:
					return nil
				}
				return cmOnce
			}
			got := make(chan error, 1)
			qp := b.qp()
			b.listen(func(r verbs.ConnRequest) {
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				defer cancel()
				_, err := r.Accept(ctx, qp, cmPassiveParam, nil)
				got <- err
			})
			d := a.dial(context.Background(), b, cmActiveParam).wait()
			if err := <-got; !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("accept: %v", err)
			}
			qp.wantState(t, "cancelled", verbs.StateErr)
			if isDone(d.ep) {
				t.Error("the REJ was lost, but the active side knows")
			}
			<-d.ep.Done() // told again when its RTU came late
			n.wantTrace("accept cancelled", "A REQ, B REP, A RTU, A RTU, B REJ, A RTU, A RTU, A RTU, B REJ")
			settle()
			a.wantEmpty()
			b.wantEmpty()
			b.cm.close()
		})
	})
}

// TestCMMRA: both sides ask for patience when they see a duplicate while the application thinks, and both
// grant it.
func TestCMMRA(t *testing.T) {
	t.Run("passive thinking", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			ac := b.accept(cmPassiveParam, func(verbs.ConnRequest) { time.Sleep(10 * time.Second) })
			d := a.dial(context.Background(), b, cmActiveParam)
			time.Sleep(300 * time.Millisecond)
			a.wantState("MRA has come", cmMRAReqRcvd)
			b.wantState("MRA was sent", cmMRAReqSent)
			if d.wait().err != nil {
				t.Fatal(d.err)
			}
			<-ac.got
			// Each MRA holds the next REQ back for 4.096 s and the ACK timeout's 512 ms.
			reqs := n.sentBy(a, cmwire.AttrREQ)
			if len(reqs) != 4 || reqs[1].at != 250*time.Millisecond || reqs[2].at-reqs[1].at != 4608*time.Millisecond+2*cmWireDelay {
				t.Errorf("%d REQs, at %v, %v, %v", len(reqs), reqs[1].at, reqs[2].at, reqs[3].at)
			}
			n.wantTrace("patience", "A REQ, A REQ, B MRA, A REQ, B MRA, A REQ, B MRA, B REP, A RTU")
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("active thinking", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := twoHosts(t)
			ac := b.accept(cmPassiveParam, nil)
			qp := a.qp()
			qp.hook = func(to verbs.QPState) error {
				if to == verbs.StateRTR {
					time.Sleep(3 * time.Second)
				}
				return nil
			}
			d := a.dialQP(context.Background(), b, qp, cmActiveParam)
			time.Sleep(300 * time.Millisecond)
			a.wantState("REP has come", cmRepRcvd)
			b.wantState("MRA has come", cmMRARepRcvd)
			if d.wait().err != nil {
				t.Fatal(d.err)
			}
			if o := <-ac.got; o.err != nil {
				t.Fatal(o.err)
			}
			n.wantTrace("patience", "A REQ, B REP, B REP, A MRA, A RTU")
			a.cm.close()
			b.cm.close()
		})
	})
	t.Run("promises too much", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newCMNet(t)
			a := n.host("A", "10.0.0.1", 1)
			peer := &cmTestHost{addr: netip.MustParseAddr("10.0.0.9")}
			d := a.dial(context.Background(), peer, cmActiveParam)
			synctest.Wait()
			mra := cmwire.MRA{LocalCommID: 5, RemoteCommID: a.only().id, Message: cmwire.ForREQ, ServiceTimeout: 31}
			for range 1000 { // code 31 is 2.3 hours
				a.cm.input(peer.addr, encode(&mra))
			}
			start := time.Now()
			for len(n.sentBy(a, cmwire.AttrREQ)) < 2 {
				time.Sleep(time.Second)
			}
			if e := time.Since(start); e > cmMaxMRA+time.Second {
				t.Errorf("waited %v", e)
			}
			if a.stat(cmMRAReceived) != 1 {
				t.Errorf("%d MRAs heard for one REQ", a.stat(cmMRAReceived))
			}
			d.wait()
			if e := time.Since(start); e > 5*time.Minute {
				t.Errorf("gave up after %v", e)
			}
			settle()
			a.wantEmpty()
		})
	})
}

// TestCMSimultaneousDisconnect: crossing DREQs end in timewait on both sides.
func TestCMSimultaneousDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := twoHosts(t)
		d, o := connected(t, a, b)
		n.trace()
		d.ep.Disconnect()
		o.ep.Disconnect()
		time.Sleep(10 * time.Millisecond)
		a.wantState("DREQs have crossed", cmTimewait)
		b.wantState("DREQs have crossed", cmTimewait)
		tr := n.trace()
		for _, want := range []string{"A DREQ", "B DREQ", "A DREP", "B DREP"} {
			if strings.Count(tr, want) != 1 {
				t.Errorf("trace %s", tr)
			}
		}
		if d.qp.errs != 1 || o.qp.errs != 1 || !isDone(d.ep) || !isDone(o.ep) {
			t.Error("not ended, or twice")
		}
		settle()
		a.wantEmpty()
		b.wantEmpty()
		b.cm.close()
	})
}

// TestCMSoak runs many connections both ways over a wire that loses, duplicates, delays and reorders,
// and checks what must hold at any loss: both sides of an established connection name each other, its
// end reaches both, and nothing is left. Its seeds are fixed; a failure names its own.
func TestCMSoak(t *testing.T) {
	for seed := uint64(1); seed <= 12; seed++ {
		synctest.Test(t, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			testCMSoak(t, seed)
		})
	}
}

func testCMSoak(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 99))
	loss := float64(seed%4) * 0.15
	n, a, b := twoHosts(t)
	n.fate = func(s *cmSent) (out []time.Duration) {
		for range 1 + rng.IntN(2) {
			if rng.Float64() >= loss {
				out = append(out, cmWireDelay+time.Duration(rng.IntN(int(400*time.Millisecond))))
			}
		}
		return out
	}
	type result struct {
		name string
		ep   verbs.Endpoint
		err  error
	}
	// More than can come: 120 connects, and what handlers make of their REQs.
	results := make(chan result, 10000)
	var lns []verbs.Listener
	for _, h := range []*cmTestHost{a, b} {
		lns = append(lns, h.listen(func(r verbs.ConnRequest) {
			// From the request, so that it does not depend on the order of handlers.
			time.Sleep(time.Duration(r.Info().PeerQPN%7) * 100 * time.Millisecond)
			if r.Info().PeerQPN%11 == 0 {
				r.Reject([]byte("eleven")) // the peer may have gone meanwhile
				return
			}
			ep, err := r.Accept(context.Background(), h.qp(), cmPassiveParam, nil)
			results <- result{h.name + " passive", ep, err}
		}))
	}
	const each = 60
	for i := range each {
		for _, x := range [][2]*cmTestHost{{a, b}, {b, a}} {
			ctx, cancel := context.Background(), context.CancelFunc(func() {})
			if i%5 == 0 {
				ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
			}
			d := x[0].dial(ctx, x[1], cmActiveParam)
			go func() {
				d.wait()
				cancel()
				results <- result{x[0].name + " active", d.ep, d.err}
			}()
			time.Sleep(20 * time.Millisecond)
		}
	}
	settle()
	close(results)
	byAddr := make(map[[2]netip.AddrPort][]verbs.Endpoint)
	active, refused := 0, 0
	for r := range results {
		if r.err != nil {
			refused++
			continue
		}
		k := [2]netip.AddrPort{r.ep.Local(), r.ep.Remote()}
		if strings.HasSuffix(r.name, "passive") {
			k[0], k[1] = k[1], k[0]
		} else {
			active++
		}
		byAddr[k] = append(byAddr[k], r.ep)
	}
	if active < each/4 {
		t.Errorf("only %d connections at %.0f %% loss", active, 100*loss)
	}
	for k, eps := range byAddr {
		live := 0
		for _, ep := range eps {
			if !isDone(ep) {
				live++
			}
		}
		// Two connections may have drawn the same port; each has both its ends or none.
		if live%2 != 0 {
			t.Errorf("%v: %d of %d endpoints live", k, live, len(eps))
		}
		for _, ep := range eps {
			ep.Disconnect()
		}
	}
	settle()
	for k, eps := range byAddr {
		for _, ep := range eps {
			if !isDone(ep) {
				t.Errorf("%v outlives its disconnect", k)
			}
		}
	}
	for _, l := range lns {
		l.Close()
	}
	a.wantEmpty()
	b.wantEmpty()
	a.cm.close()
	b.cm.close()
	if t.Failed() || testing.Verbose() {
		t.Logf("seed %d: loss %.0f %%, %d connections, %d attempts or requests failed", seed, 100*loss, active, refused)
	}
}
