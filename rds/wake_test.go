package rds

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/conn"
)

// TestWakeIsPassedOn: a writer that is woken for room and cannot use it, because its destination has become congested in the meantime or holds its
// share, leaves it to the next one. The wake may have been the last.
func TestWakeIsPassedOn(t *testing.T) {
	addrC, addrD := netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4")
	type msg struct {
		to netip.Addr
		n  int
	}
	congested := func(_ *Socket, tr *fakeTransport) { tr.SetCongested(addrC, 7, true) }
	for name, c := range map[string]struct {
		fill   []msg                              // all of the buffer
		then   func(a *Socket, tr *fakeTransport) // when one writer waits to send to C, and then another one to B
		acked  int                                // of fill, as one
		second netip.Addr
	}{
		"buffer, congestion": {[]msg{{addrC, 4000}, {addrC, 4000}}, congested, 2, addrC},
		"share, congestion":  {[]msg{{addrB, 2000}, {addrC, 4000}}, congested, 2, addrC},
		"buffer, share": {[]msg{{addrD, 2900}, {addrD, 2900}, {addrC, 1200}, {addrB, 1000}}, func(a *Socket, tr *fakeTransport) {
			f := a.flowsTo(addrC)[0] // whoever was faster has filled C's share
			f.out.Add(2800)
			a.others.Add(2800)
		}, 2, addrB},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newFakeNet()
				svc, tr := n.open(t, Config{SendBuffer: 8000})
				a := bind(t, svc, ap(addrA, 4000))
				tr.withhold = true
				for _, m := range c.fill {
					mustWrite(t, a, make([]byte, m.n), ap(m.to, 1))
				}
				var wg sync.WaitGroup
				var done [2]bool
				for i, to := range []netip.AddrPort{ap(addrC, 7), ap(c.second, 8)} {
					wg.Go(func() {
						_, err := a.WriteToAddrPort([]byte("x"), to)
						if err != nil && !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						done[i] = err == nil
					})
					synctest.Wait()
				}
				if done != [2]bool{} {
					t.Fatalf("%v went into a full buffer, or share", done)
				}
				c.then(a, tr)
				tr.ackAtOnce(c.acked)
				synctest.Wait()
				if done != [2]bool{false, true} {
					t.Errorf("writers are through: %v", done)
				}
				a.Close()
				wg.Wait()
			})
		})
	}
}

// TestRefundWakes: an offer that a connection refuses for want of memory has taken room for a moment. An acknowledgement in that moment found too little
// to wake anybody for, and may have been the last.
func TestRefundWakes(t *testing.T) {
	for _, shared := range []bool{false, true} {
		n := newFakeNet()
		svc, _ := n.open(t, Config{SendBuffer: 1200})
		a := bind(t, svc, ap(addrA, 4000))
		f, err := a.flow(addrB, 0)
		if err != nil {
			t.Fatal(err)
		}
		q, size := &a.writers, uint64(1200)
		if shared { // half of it, a flow's share
			if f, err = a.flow(netip.MustParseAddr("10.0.0.3"), 0); err != nil {
				t.Fatal(err)
			}
			q, size = &f.writers, 600
		}
		charge := func(n uint64) {
			t.Helper()
			if _, err := f.charge(outOne | n); err != nil {
				t.Fatal(err)
			}
		}
		w := newWaiter()
		wait := func() {
			t.Helper()
			if _, err := f.charge(outOne | 1); err == nil {
				t.Fatal("there is room")
			}
			q.add(w)
		}
		charge(size / 2)
		charge(size / 2)
		wait()
		f.Released(1, int(size/2), true)
		<-w.wake
		x := outOne | size*5/6
		charge(size * 5 / 6) // by somebody who was faster
		wait()
		f.Released(1, int(size/2), true) // all that is really out
		f.refund(x)
		select {
		case <-w.wake:
		default:
			t.Errorf("shared %v: a writer sleeps, and the buffer is empty: %d", shared, a.unacked())
		}
	}
}

// ackAtOnce acknowledges the n oldest messages, as one.
func (tr *fakeTransport) ackAtOnce(n int) {
	tr.mu.Lock()
	done := tr.unacked[:n:n]
	tr.unacked = tr.unacked[n:]
	tr.mu.Unlock()
	sum := make(map[conn.Owner]fakeSent)
	for _, s := range done {
		sum[s.o] = fakeSent{s.o, sum[s.o].n + s.n}
	}
	for _, s := range sum {
		msgs := 0
		for _, d := range done {
			if d.o == s.o {
				msgs++
			}
		}
		s.o.Released(msgs, s.n, true)
	}
}

// TestLocalBeforeAccounts: what a reader has taken before its deliverer has accounted for it, such as one that was held for a bind, makes a peer's
// count less than nothing for that moment. A datagram of an address of the same Service, which has no bound, gets through.
func TestLocalBeforeAccounts(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	a, b := bind(t, svc, ap(addrA, 4000)), bind(t, svc, ap(addrB, 5000))
	svc.peerOf(addrB, addrA).queued.Add(-chargeOf(100))
	mustWrite(t, a, make([]byte, 100), b.AddrPort())
	if m, err := b.TryReceive(); err != nil {
		t.Errorf("lost: %v", err)
	} else {
		m.Release()
	}
	svc.peerOf(addrB, addrA).queued.Add(chargeOf(100))
}

// flushes is a link that counts its Flushes, and what was sent with company announced since the last.
type flushes struct {
	link
	n, held int
}

func (l *flushes) SendExtra(o conn.Owner, srcPort, dstPort uint16, payload []byte, flags conn.SendFlags, x *conn.Extra) error {
	if l.held = 0; flags&conn.More != 0 {
		l.held = 1
	}
	return l.link.SendExtra(o, srcPort, dstPort, payload, flags, x)
}

func (l *flushes) Flush() {
	l.n++
	l.held = 0
	l.link.Flush()
}

// TestBatchIsNotHeldBack: a datagram of a batch that was to leave with the next one leaves also if that fails, or goes elsewhere, whatever others
// write meanwhile.
func TestBatchIsNotHeldBack(t *testing.T) {
	n := newFakeNet()
	svc, _ := n.open(t, Config{})
	a := bind(t, svc, ap(addrA, 4000))
	addrC := netip.MustParseAddr("10.0.0.3")
	mustWrite(t, a, nil, ap(addrB, 1))
	mustWrite(t, a, nil, ap(addrC, 1))
	b := &flushes{link: a.flowsTo(addrB)[0].link}
	a.flowsTo(addrB)[0].link = b
	other := func(to netip.Addr) { mustWrite(t, a, nil, ap(to, 1)) } // of another goroutine
	ok := BatchMessage{Addr: ap(addrB, 5000), Buffers: [][]byte{nil}}
	tooLong := BatchMessage{Addr: ap(addrB, 5000), Buffers: [][]byte{make([]byte, MaxMessageSize+1)}}
	var batch batchWrite
	if err := batch.write(a, []BatchMessage{ok, tooLong}, 0, true); err != nil || b.held != 1 {
		t.Fatalf("%v, %d held back", err, b.held)
	}
	other(addrC)
	if err := batch.write(a, []BatchMessage{ok, tooLong}, 1, true); !errors.Is(err, ErrMessageTooLong) {
		t.Fatal(err)
	}
	batch.end()
	if b.held != 0 {
		t.Error("a datagram waits for one that has failed")
	}
	// The default destination changes in the middle.
	a.ConnectAddrPort(ap(addrB, 5000))
	ok.Addr = netip.AddrPort{}
	batch = batchWrite{}
	if err := batch.write(a, []BatchMessage{ok, ok}, 0, true); err != nil || b.held != 1 {
		t.Fatalf("%v, %d held back", err, b.held)
	}
	a.ConnectAddrPort(ap(addrC, 5000))
	if err := batch.write(a, []BatchMessage{ok, ok}, 1, true); err != nil {
		t.Fatal(err)
	}
	batch.end()
	if b.held != 0 {
		t.Error("a datagram waits for one that has gone elsewhere")
	}
}
