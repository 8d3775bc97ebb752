package softroce

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// region registers n bytes at address 0.
func (tc *testContext) region(n int) (verbs.MR, []byte) {
	tc.t.Helper()
	mem := make([]byte, n)
	m, err := tc.pd.RegMR(mem, 0, accessAll)
	if err != nil {
		tc.t.Fatal(err)
	}
	return m, mem
}

// full makes the socket take nothing, or everything again.
func (tc *testContext) full(v bool) {
	tc.conn.mu.Lock()
	tc.conn.full = v
	tc.conn.mu.Unlock()
	if !v {
		tc.conn.Wake()
		synctest.Wait()
	}
}

// drain takes all packets sent and returns how many.
func (tc *testContext) drain() (n int) {
	for _, ok := tc.read(); ok; _, ok = tc.read() {
		n++
	}
	return n
}

// inject several packets at once.
func (tc *testContext) injectAll(pkts ...[]byte) {
	tc.conn.mu.Lock()
	tc.conn.in = append(tc.conn.in, pkts...)
	tc.conn.mu.Unlock()
	tc.conn.Wake()
	synctest.Wait()
}

// TestDeregisterAfterRead: a peer has read the region and told its owner so, while a last answer, which it asked
// for again and no longer needs, still waits for room in the socket. Deregister waits for that answer
// to leave and succeeds, and the connection lives on.
func TestDeregisterAfterRead(t *testing.T) {
	script(t, func(tc *testContext) {
		mr, _ := tc.region(1000)
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.sge(0, 100)})
		read := tc.packet(roce.RCReadRequest, uint32(tc.qp.Num()), rx(0), true, reth(0, mr.RKey(), 1000), nil)
		tc.inject(bytes.Clone(read))
		if n := tc.drain(); n != 4 {
			t.Fatalf("%d responses", n)
		}
		tc.full(true)
		tc.injectAll(read, tc.packet(roce.RCSendOnly, uint32(tc.qp.Num()), rx(4), true, nil, []byte("I have read it")))
		tc.wantWC("its owner learns", 1, verbs.WCSuccess)
		gone := make(chan error, 1)
		go func() { gone <- mr.Deregister() }()
		synctest.Wait()
		if len(gone) != 0 {
			t.Fatalf("deregistered (%v) while responses name the memory", <-gone)
		}
		tc.full(false)
		if err := <-gone; err != nil {
			t.Fatal(err)
		}
		tc.drain()
		tc.write(roce.RCWriteOnly, rx(5), true, reth(testIOVA, tc.mr.RKey(), 1), []byte{1})
		tc.wantAck("the connection lives", roce.SynACK, rx(5))
	})
}

// TestReplayOfRegionGone: a READ answered in full and asked for again after its region went away is a duplicate
// that the network kept, and dropped; who goes on asking ends his connection, without a NAK.
func TestReplayOfRegionGone(t *testing.T) {
	for _, gone := range []string{"deregistered", "invalidated"} {
		t.Run(gone, func(t *testing.T) {
			script(t, func(tc *testContext) {
				events := tc.events()
				f := tc.fast(1)
				defer f.free()
				tc.post(f.reg(1, accessAll))
				tc.wantWC("", 1, verbs.WCSuccess)
				ask := func() {
					t.Helper()
					tc.write(roce.RCReadRequest, rx(0), true, reth(fastIOVA, f.key, 600), nil)
				}
				ask()
				tc.want("", roce.RCReadRespFirst, rx(0))
				tc.want("", roce.RCReadRespMiddle, rx(1))
				tc.want("", roce.RCReadRespLast, rx(2))
				if gone == "deregistered" {
					if err := f.mr.Deregister(); err != nil {
						t.Fatal(err)
					}
				} else {
					tc.post(f.inv(2))
					tc.wantWC("", 2, verbs.WCSuccess)
				}
				ask()
				ask()
				tc.wantIdle("nothing of it is read")
				if s := tc.qp.State(); s != verbs.StateRTS {
					t.Fatalf("QP is in %v", s)
				}
				time.Sleep(minRTO)
				ask()
				tc.wantIdle("never a NAK behind a response")
				if s := tc.qp.State(); s != verbs.StateErr {
					t.Fatalf("QP is in %v", s)
				}
				if e := events(); len(e) != 1 || e[0].Type != verbs.EventQPAccessErr {
					t.Errorf("events %v", e)
				}
			})
		})
	}
}

// events collects the device's asynchronous events.
func (tc *testContext) events() func() []verbs.AsyncEvent {
	ch := make(chan verbs.AsyncEvent, 100)
	tc.dev.SetAsyncHandler(func(e verbs.AsyncEvent) { ch <- e })
	return func() (all []verbs.AsyncEvent) {
		synctest.Wait()
		for len(ch) > 0 {
			all = append(all, <-ch)
		}
		return all
	}
}

// TestDeregisterInTheMiddleOfRead: the answer of a megabyte is under way when its region goes. No more of it
// leaves, no NAK either, and the connection ends.
func TestDeregisterInTheMiddleOfRead(t *testing.T) {
	script(t, func(tc *testContext) {
		events := tc.events()
		mr, _ := tc.region(1 << 20)
		tc.write(roce.RCReadRequest, rx(0), true, reth(0, mr.RKey(), 1<<20), nil)
		if n := tc.drain(); n != readRun {
			t.Fatalf("%d responses at once", n)
		}
		start := time.Now()
		if err := mr.Deregister(); err != nil || time.Since(start) != 0 {
			t.Fatalf("deregister: %v after %v", err, time.Since(start))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		tc.wantIdle("nothing more leaves")
		if s := tc.qp.State(); s != verbs.StateErr {
			t.Errorf("QP is in %v", s)
		}
		if e := events(); len(e) != 1 || e[0].Type != verbs.EventQPAccessErr {
			t.Errorf("events %v", e)
		}
	})
}

// Before the first response there may be a NAK.
func TestDeregisterBeforeFirstResponse(t *testing.T) {
	script(t, func(tc *testContext) {
		a, _ := tc.region(1 << 20)
		b, _ := tc.region(4096)
		tc.write(roce.RCReadRequest, rx(0), true, reth(0, a.RKey(), 2*readRun*256), nil)
		tc.write(roce.RCReadRequest, rx(2*readRun), true, reth(0, b.RKey(), 4096), nil)
		tc.drain()
		if err := b.Deregister(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		for range readRun {
			tc.read()
		}
		tc.wantAck("the READ that cannot be answered", roce.SynNAKAccess, rx(2*readRun))
		tc.wantIdle("")
		if err := a.Deregister(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestErrDropsReferences: a QP that goes to ERR with requests not sent yet, requests sent, an open message and
// a full replay store lets go of every region, whatever names it.
func TestErrDropsReferences(t *testing.T) {
	for _, how := range []string{"modify", "SetError", "reset", "close", "bad packet"} {
		t.Run(how, func(t *testing.T) {
			script(t, func(tc *testContext) {
				var regions []verbs.MR
				region := func() verbs.MR {
					m, _ := tc.region(1 << 16)
					regions = append(regions, m)
					return m
				}
				sge := func() []verbs.SGE { return []verbs.SGE{{Length: 1000, LKey: region().LKey()}} }
				// Sent, not acknowledged; and behind a fence, not sent.
				tc.post(send(1, sge()), verbs.SendWR{ID: 2, Opcode: verbs.OpRead, SGs: sge(), RKey: 1},
					verbs.SendWR{ID: 3, Opcode: verbs.OpSend, Flags: verbs.SendFence, SGs: sge()}, verbs.SendWR{ID: 4, Opcode: verbs.OpWrite, SGs: sge()})
				// A registration, an invalidation and a binding that have not been executed either.
				f, w := tc.fast(1), tc.window(verbs.MWType2A)
				tc.post(f.reg(5, accessAll), f.inv(6), bindWR(7, w, region(), 0, 100, verbs.AccessRemoteRead))
				// An open message, receives behind it.
				tc.postRecv(verbs.RecvWR{ID: 10, SGs: sge()}, verbs.RecvWR{ID: 11, SGs: sge()})
				// A replay store filled over and over, the last answer under way.
				m := region()
				for i := range 8 {
					tc.write(roce.RCReadRequest, rx(i), true, reth(0, m.RKey(), 100), nil)
				}
				tc.write(roce.RCSendFirst, rx(8), false, nil, make([]byte, 256))
				tc.drain()
				tc.full(true)
				tc.write(roce.RCReadRequest, rx(7), true, reth(0, m.RKey(), 100), nil)
				switch how {
				case "modify":
					if err := tc.qp.Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit); err != nil {
						t.Fatal(err)
					}
				case "SetError":
					tc.full(false)
					tc.qp.SetError()
				case "reset":
					if err := tc.qp.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit); err != nil {
						t.Fatal(err)
					}
				case "close":
					if err := tc.qp.Close(); err != nil {
						t.Fatal(err)
					}
				case "bad packet":
					tc.full(false)
					tc.write(roce.RCWriteMiddle, rx(9), true, nil, make([]byte, 256))
				}
				tc.full(false)
				start := time.Now()
				for i, m := range regions {
					if err := m.Deregister(); err != nil {
						t.Errorf("region %d: %v", i, err)
					}
				}
				if err := w.Dealloc(); err != nil {
					t.Error(err)
				}
				f.free()
				if d := time.Since(start); d != 0 {
					t.Errorf("waited %v", d)
				}
			})
		})
	}
}

// TestDeregisterNamesHolders: after the bound the error says what holds the region, whoever it is.
func TestDeregisterNamesHolders(t *testing.T) {
	script(t, func(tc *testContext) {
		check := func(what string, m verbs.MR, want ...string) {
			t.Helper()
			start := time.Now()
			err := m.Deregister()
			var busy *verbs.BusyError
			if !errors.As(err, &busy) || time.Since(start) != 5*time.Second {
				t.Fatalf("%s: %v after %v", what, err, time.Since(start))
			}
			for _, w := range want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%s: %q does not name %q", what, err, w)
				}
			}
		}
		num := tc.qp.Num()
		m, _ := tc.region(4096)
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, SGs: []verbs.SGE{{Length: 10, LKey: m.LKey()}}, RKey: 1})
		f := tc.fast(1)
		tc.post(verbs.SendWR{ID: 2, Opcode: verbs.OpLocalInv, Flags: verbs.SendFence, InvalidateRKey: f.key})
		go func() { // while the peer does not answer
			time.Sleep(11 * time.Second)
			tc.qp.SetError()
		}()
		check("a READ whose answer does not come", m, fmt.Sprintf("1 send requests of QP %d", num))
		check("an invalidation that waits", f.mr, fmt.Sprintf("1 send requests of QP %d", num))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if err := m.Deregister(); err != nil {
			t.Fatal(err)
		}
		f.free()

		leaked, _ := tc.region(10)
		leaked.(*mr).refs.Get()
		check("a reference that nobody gives back", leaked, "1 references that no queue accounts for")
		leaked.(*mr).refs.Put()
		if err := leaked.Deregister(); err != nil {
			t.Fatal(err)
		}
		tc.drain()
	})
}

// readPair is a pair of hosts with a network between them.
func readPair(t *testing.T, cfg simnet.Config, mtu verbs.MTU, window int) *testPair {
	n := simnet.New(1, cfg)
	t.Cleanup(func() { n.Close() })
	tp := newTestPair(t, Config{Network: n, Peers: 1}, "10.0.0.1", "10.0.0.2", mtu)
	for i := range tp.qp {
		if err := tp.qp[i].Modify(verbs.QPAttr{SendWindow: window}, verbs.QPSendWindowBit); err != nil {
			t.Fatal(err)
		}
	}
	return tp
}

// TestDeregisterUnderReader: a megabyte is deregistered at every stage of being read. Deregister succeeds, and the
// reader has all of it or an error.
func TestDeregisterUnderReader(t *testing.T) {
	for us := range 12 {
		synctest.Test(t, func(t *testing.T) {
			link := simnet.LinkConfig{Delay: 20 * time.Microsecond, RateBytesPerSec: 1 << 30}
			tp := readPair(t, simnet.Config{Link: link}, verbs.MTU1024, 1<<20)
			defer tp.shut(t)
			mem := make([]byte, 1<<20)
			fill(mem, 3)
			m, err := tp.pd[1].RegMR(mem, 0, verbs.AccessRemoteRead)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, len(mem)), RKey: m.RKey()}}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(us) * 120 * time.Microsecond)
			if err := m.Deregister(); err != nil {
				t.Fatalf("after %d: %v", us, err)
			}
			clear(mem) // it is its owner's again
			time.Sleep(time.Minute)
			synctest.Wait()
			var wcs [2]verbs.WC
			if n := tp.cq[0].Poll(wcs[:]); n != 1 {
				t.Fatalf("after %d: %d completions", us, n)
			}
			want := make([]byte, 1<<20)
			fill(want, 3)
			if got := bytes.Equal(tp.mem[0][:1<<20], want); wcs[0].Status == verbs.WCSuccess && !got {
				t.Fatalf("after %d: half a READ passed for a success", us)
			}
		})
	}
}

// TestReadsInRuns: however much is asked for, a responder never has more under way than the receiver takes. Nothing
// is dropped, and so nothing sent twice.
func TestReadsInRuns(t *testing.T) {
	for _, c := range []struct {
		name   string
		buffer int
		window int // announced by each side; 0: kernels
	}{
		{"ours, stock buffer", 425984, 425984},
		{"ours, large buffer", 8 << 20, 8 << 20},
		{"kernel, stock buffer", 425984, 0},
	} {
		for _, mtu := range []verbs.MTU{verbs.MTU1024, verbs.MTU4096} {
			t.Run(c.name+"/"+mtu.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					link := simnet.LinkConfig{Delay: 20 * time.Microsecond}
					tp := readPair(t, simnet.Config{RecvBuffer: c.buffer, GRO: true, Link: link}, mtu, c.window)
					defer tp.shut(t)
					fill(tp.mem[1], 5)
					var wrs []verbs.SendWR
					for i := range 3 {
						wrs = append(wrs, verbs.SendWR{ID: uint64(i), Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tp.sge(0, i<<20, 1<<20), RemoteAddr: 0x1000 + uint64(i)<<20, RKey: tp.mr[1].RKey()})
					}
					if _, err := tp.qp[0].PostSend(wrs); err != nil {
						t.Fatal(err)
					}
					for i := range 3 {
						for tp.cq[0].Poll(make([]verbs.WC, 1)) == 0 {
							time.Sleep(50 * time.Microsecond)
							synctest.Wait()
						}
						if off := i << 20; !bytes.Equal(tp.mem[0][off:off+1<<20], tp.mem[1][off:off+1<<20]) {
							t.Fatal("READ data is wrong")
						}
					}
					if s := tp.dev[0].Stats(); s["rx_socket_drops"] != 0 || s["retransmits"] != 0 {
						t.Errorf("%d packets dropped, %d requests repeated", s["rx_socket_drops"], s["retransmits"])
					}
				})
			})
		}
	}
}

// TestReadsShareWindow: what our own requests have under way towards a peer, READ responses leave room for.
func TestReadsShareWindow(t *testing.T) {
	script(t, func(tc *testContext) {
		const cost = 256 + pktOverhead
		if err := tc.qp.Modify(verbs.QPAttr{SendWindow: 100 * cost}, verbs.QPSendWindowBit); err != nil {
			t.Fatal(err)
		}
		read := func(k, n int) {
			tc.write(roce.RCReadRequest, rx(k), true, reth(testIOVA, tc.mr.RKey(), uint32(n*256)), nil)
		}
		next := 0
		run := func(want int) {
			t.Helper()
			if n := tc.drain(); n != want {
				t.Fatalf("%d responses, want %d", n, want)
			}
			next += want
			time.Sleep(readGapMin)
			synctest.Wait()
		}
		read(0, 110)
		run(100)
		run(10)
		for i := range 60 {
			tc.post(send(uint64(i), tc.sge(0, 256)))
		}
		tc.drain()
		read(next, 50)
		run(40)
		run(10)
		tc.ack(59)
		for i := range 60 {
			tc.wantWC("", uint64(i), verbs.WCSuccess)
		}
		read(next, 100)
		run(100)
		for i := range 45 {
			tc.post(send(uint64(i), tc.sge(0, 512)))
		}
		tc.drain()
		read(next, 2*readRunMin)
		run(readRunMin) // never none at all: two that wait for each other would wait for ever
		run(readRunMin)
		tc.ack(60 + 89)
	})
}

// TestReadPauses: a kernel asks for a megabyte at once. It gets runs of 128 packets with pauses between them,
// longer ones when it has had to ask again.
func TestReadPauses(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey(), 1<<20), nil)
		next := 0
		run := func(gap time.Duration) {
			t.Helper()
			for range readRun {
				if pk, ok := tc.read(); !ok || pk.BTH.PSN() != rx(next) {
					t.Fatalf("response %d: %v", next, ok)
				}
				next++
			}
			time.Sleep(gap - 1)
			synctest.Wait()
			tc.wantIdle("a pause behind each run")
			time.Sleep(time.Nanosecond)
			synctest.Wait()
		}
		run(readGapMin)
		run(readGapMin)
		// It has lost most of them.
		next = 10
		tc.drain()
		tc.write(roce.RCReadRequest, rx(10), true, reth(testIOVA+10*256, tc.mr.RKey(), 1<<20-10*256), nil)
		tc.wantIdle("asking again does not cut the pause short")
		time.Sleep(readGapMin)
		synctest.Wait()
		for next < 10+3*readRun {
			run(2 * readGapMin)
		}
		tc.write(roce.RCWriteOnly, rx(4096), true, reth(testIOVA, tc.mr.RKey(), 0), nil)
		for next < 4096 {
			pk, ok := tc.read()
			if !ok {
				time.Sleep(readGapMax)
				synctest.Wait()
				continue
			}
			if pk.BTH.PSN() != rx(next) {
				t.Fatalf("PSN %#x, want %#x", pk.BTH.PSN(), rx(next))
			}
			next++
		}
		tc.wantAck("what came behind the READ is acknowledged behind its answer", roce.SynACK, rx(4096))
	})
}

// TestReadInChunks: a READ goes out in requests that take half of the receive buffer together, the next when the
// first is answered; a loss in one repeats that from there, and those behind it.
func TestReadInChunks(t *testing.T) {
	script(t, func(tc *testContext) {
		q := tc.qp.(*qp)
		chunk := q.readChunk()
		if chunk != kernelPackets/2 {
			t.Fatalf("chunks of %d packets", chunk)
		}
		n := (3*chunk + 7) * 256
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tc.sge(1<<17, n), RemoteAddr: 0x40000, RKey: 0x77},
			verbs.SendWR{ID: 2, Opcode: verbs.OpSend, Flags: verbs.SendSignaled | verbs.SendFence})
		request := func(what string, k, packets int) {
			t.Helper()
			pk := tc.want(what, roce.RCReadRequest, tx(k))
			if r := pk.RETH(); r.VA() != 0x40000+uint64(k)*256 || int(r.Len()) != packets*256 {
				t.Fatalf("%s: request for %d bytes at %#x", what, r.Len(), r.VA())
			}
		}
		answer := func(from, to int, first bool) {
			t.Helper()
			for k := from; k < to; k++ {
				op, ext := roce.RCReadRespMiddle, []byte(nil)
				switch {
				case k == 3*chunk+6 || k%chunk == chunk-1:
					op, ext = roce.RCReadRespLast, aeth(roce.SynACK, 1)
				case first && k == from:
					op, ext = roce.RCReadRespFirst, aeth(roce.SynACK, 1)
				}
				tc.write(op, tx(k), false, ext, bytes.Repeat([]byte{byte(k)}, 256))
			}
		}
		request("the window takes two", 0, chunk)
		request("", chunk, chunk)
		tc.wantIdle("and no more")
		answer(0, chunk, true)
		request("the first answered, a third is due", 2*chunk, chunk)
		answer(chunk, chunk+5, true)
		answer(chunk+6, chunk+7, false)
		request("a gap: the rest of its chunk", chunk+5, chunk-5)
		request("and those behind", 2*chunk, chunk)
		request("", 3*chunk, 7)
		tc.wantIdle("once")
		answer(chunk+5, 3*chunk, true)
		tc.wantNoWC("")
		if q.rdOut != 1 || q.readDue != 7 {
			t.Errorf("%d requests and %d packets out", q.rdOut, q.readDue)
		}
		answer(3*chunk, 3*chunk+7, true)
		tc.wantWC("", 1, verbs.WCSuccess)
		if q.rdOut != 0 || q.readDue != 0 {
			t.Errorf("%d requests and %d packets out", q.rdOut, q.readDue)
		}
		for k := range 3*chunk + 7 {
			if tc.mem[1<<17+k*256] != byte(k) || tc.mem[1<<17+k*256+255] != byte(k) {
				t.Fatalf("packet %d is not where it belongs", k)
			}
		}
		tc.want("the fence falls with the last", roce.RCSendOnly, tx(3*chunk+7))
		tc.ack(3*chunk + 7)
		tc.wantWC("", 2, verbs.WCSuccess)
	})
}

// TestBehindRead: requests behind a READ whose answer is under way execute, are acknowledged behind it, and a fatal
// one ends the connection behind it.
func TestBehindRead(t *testing.T) {
	script(t, func(tc *testContext) {
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.sge(1<<18, 10)})
		tc.write(roce.RCReadRequest, rx(0), true, reth(testIOVA, tc.mr.RKey(), 2*readRun*256), nil)
		tc.drain()
		tc.write(roce.RCSendOnly, rx(2*readRun), true, nil, []byte("behind"))
		tc.wantWC("a SEND is not held up", 1, verbs.WCSuccess)
		tc.write(roce.RCReadRequest, rx(2*readRun+1), true, reth(testIOVA, tc.mr.RKey(), 256), nil)
		tc.write(roce.RCWriteOnly, rx(2*readRun+2), true, reth(testIOVA, 0, 4), []byte("evil"))
		tc.write(roce.RCSendOnly, rx(2*readRun+3), true, nil, []byte("late"))
		tc.wantIdle("the answer is under way")
		time.Sleep(readGapMin)
		synctest.Wait()
		for i := range readRun {
			if pk, _ := tc.read(); pk.BTH.PSN() != rx(readRun+i) {
				t.Fatalf("response %#x", pk.BTH.PSN())
			}
		}
		time.Sleep(readGapMin)
		synctest.Wait()
		tc.wantAck("its acknowledgement, in PSN order", roce.SynACK, rx(2*readRun))
		tc.want("the second READ", roce.RCReadRespOnly, rx(2*readRun+1))
		tc.wantAck("the NAK last", roce.SynNAKAccess, rx(2*readRun+2))
		tc.wantIdle("")
	})
}
