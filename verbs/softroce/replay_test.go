package softroce

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/internal/wire/wiretest"
	"github.com/openrds/openrds/verbs"
)

// The tests in this file put us in the place of either side of a capture between two kernels' soft RoCE (perftest's
// tools over QPs without CM): the other side's packets are played back, with our QPN and keys in them.

var (
	rxeClient = netip.MustParseAddr("10.77.0.2")
	rxeServer = netip.MustParseAddr("10.77.0.1")
)

// replay is one connection of the capture. Both QPs have the same number.
type replay struct {
	name     string
	qpn      uint32
	mtu      verbs.MTU
	op       verbs.SendOpcode
	size     int
	requests []roce.Packet // of the client, in order
	answers  []roce.Packet // of the server
}

func replays(t *testing.T) []*replay {
	t.Helper()
	rs := []*replay{
		{name: "SEND", qpn: 0x11, mtu: verbs.MTU4096, op: verbs.OpSend, size: 10000},
		{name: "WRITE", qpn: 0x12, mtu: verbs.MTU4096, op: verbs.OpWrite, size: 10000},
		{name: "READ", qpn: 0x13, mtu: verbs.MTU4096, op: verbs.OpRead, size: 10000},
		{name: "FETCH_AND_ADD", qpn: 0x14, mtu: verbs.MTU4096, op: verbs.OpFetchAdd, size: 8},
		{name: "SEND, path MTU 1024", qpn: 0x15, mtu: verbs.MTU1024, op: verbs.OpSend, size: 3000},
	}
	for _, p := range wiretest.Capture(t, "rxe-ops") {
		var pk roce.Packet
		if p.Proto != wiretest.UDP || p.Dst.Port() != roce.Port || roce.Parse(p.Payload, &pk) != nil {
			continue
		}
		for _, r := range rs {
			switch {
			case pk.BTH.DestQP() != r.qpn:
			case p.Src.Addr() == rxeClient:
				r.requests = append(r.requests, pk)
			default:
				r.answers = append(r.answers, pk)
			}
		}
	}
	for _, r := range rs {
		if len(r.requests) == 0 || len(r.answers) == 0 {
			t.Fatalf("%s: %d requests and %d answers in the capture", r.name, len(r.requests), len(r.answers))
		}
	}
	return rs
}

// count is how many work requests the client posted.
func (r *replay) count() (n int) {
	for _, p := range r.requests {
		if p.Info.Flags&roce.FlagEnd != 0 || p.Info.Flags&(roce.FlagRead|roce.FlagAtomic) != 0 {
			n++
		}
	}
	return n
}

// run plays f with a QP at local whose first PSN to be sent or expected is that of the capture.
func (r *replay) run(t *testing.T, local, peer netip.Addr, f func(tc *testContext)) {
	synctest.Test(t, func(t *testing.T) {
		n := &scriptNet{}
		d, err := New(Config{Network: n}).OpenDevice(local)
		if err != nil {
			t.Fatal(err)
		}
		tc := &testContext{t: t, dev: d.(*device), conn: n.conn, peer: netip.AddrPortFrom(peer, roce.Port)}
		n.conn.from = tc.peer
		tc.flow = roce.NewFlow(tc.peer, n.conn.local)
		tc.pd, _ = d.AllocPD()
		tc.cq, _ = d.CreateCQ(verbs.CQConfig{Depth: 256})
		tc.qp, err = tc.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: tc.cq, RecvCQ: tc.cq, MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 2, MaxRecvSGE: 2})
		if err != nil {
			t.Fatal(err)
		}
		tc.mem = make([]byte, 1<<20)
		if tc.mr, err = tc.pd.RegMR(tc.mem, testIOVA, accessAll); err != nil {
			t.Fatal(err)
		}
		first := uint32(r.requests[0].BTH.PSN())
		for _, m := range []struct {
			a verbs.QPAttr
			m verbs.QPAttrMask
		}{
			{verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: accessRemote}, initAttrsRC},
			{verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: peer}, PathMTU: r.mtu, DestQPN: verbs.QPN(r.qpn), RQPSN: first, MaxDestRDAtomic: 16, MinRNRTimer: 12},
				verbs.QPAHBit | verbs.QPPathMTUBit | verbs.QPDestQPNBit | verbs.QPRQPSNBit | verbs.QPMaxDestRDAtomicBit | verbs.QPMinRNRTimerBit},
			{verbs.QPAttr{State: verbs.StateRTS, Timeout: 14, RetryCount: 7, RNRRetry: 7, SQPSN: first, MaxRDAtomic: 16},
				verbs.QPTimeoutBit | verbs.QPRetryCountBit | verbs.QPRNRRetryBit | verbs.QPSQPSNBit | verbs.QPMaxRDAtomicBit},
		} {
			if err := tc.qp.Modify(m.a, m.m|verbs.QPStateBit); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		f(tc)
		st := tc.dev.Stats()
		for _, c := range []string{"rx_malformed", "rx_bad_icrc", "seq_nak_sent", "seq_nak_received", "implied_nak", "read_deferred", "timeouts"} {
			if st[c] != 0 {
				t.Errorf("%s is %d", c, st[c])
			}
		}
		tc.close()
	})
}

// sealed is pk for tc's QP, its extension headers replaced by ext unless that is nil.
func (tc *testContext) sealed(pk *roce.Packet, ext []byte) []byte {
	if ext == nil {
		ext = pk.Ext
	}
	return tc.packet(pk.Op, uint32(tc.qp.Num()), pk.BTH.PSN(), pk.BTH.AckReq(), ext, pk.Payload)
}

// TestReplayClient: a kernel's requests against our responder. We answer what the other kernel answered: READ responses of the
// same shape and PSNs, the same last ACK. The requests come one by one, or all before we look once.
func TestReplayClient(t *testing.T) {
	for _, r := range replays(t) {
		for _, all := range []bool{false, true} {
			name := r.name + ", one by one"
			if all {
				name = r.name + ", at once"
			}
			t.Run(name, func(t *testing.T) {
				r.run(t, rxeServer, rxeClient, func(tc *testContext) {
					fill(tc.mem, 7)
					const recvAt = 512 << 10
					for i := range r.count() {
						tc.postRecv(verbs.RecvWR{ID: uint64(i), SGs: tc.sge(recvAt+i*16384, 16384)})
					}
					var batch [][]byte
					for i := range r.requests {
						pk := &r.requests[i]
						var ext []byte
						switch {
						case pk.Info.Flags&roce.FlagAtomic != 0:
							a := pk.AtomicETH()
							ext = make([]byte, roce.AtomicETHLen)
							roce.PutAtomicETH(ext, testIOVA, uint32(tc.mr.RKey()), a.SwapAdd(), a.Compare())
						case pk.Info.Flags&roce.FlagRETH != 0:
							ext = reth(testIOVA, tc.mr.RKey(), pk.RETH().Len())
						}
						b := tc.sealed(pk, ext)
						if all {
							batch = append(batch, b)
						} else {
							tc.inject(b)
						}
					}
					if all {
						tc.conn.mu.Lock()
						tc.conn.in = append(tc.conn.in, batch...)
						tc.conn.mu.Unlock()
						tc.conn.Wake()
						synctest.Wait()
					}
					var got []roce.Packet
					for pk, ok := tc.read(); ok; pk, ok = tc.read() {
						got = append(got, pk)
					}
					switch r.op {
					case verbs.OpRead, verbs.OpFetchAdd:
						if len(got) != len(r.answers) {
							t.Fatalf("%d answers, the kernel gave %d", len(got), len(r.answers))
						}
						for i := range got {
							w := &r.answers[i]
							if got[i].Op != w.Op || got[i].BTH.PSN() != w.BTH.PSN() || len(got[i].Payload) != len(w.Payload) ||
								w.Info.Flags&roce.FlagAETH != 0 && got[i].AETH().Syndrome()>>5 != w.AETH().Syndrome()>>5 {
								t.Errorf("answer %d is %v PSN %#x, %d bytes; the kernel's %v PSN %#x, %d bytes", i,
									got[i].Op, got[i].BTH.PSN(), len(got[i].Payload), w.Op, w.BTH.PSN(), len(w.Payload))
							}
						}
					default:
						// We may answer several with one ACK; the last one says the same.
						last, want := got[len(got)-1], r.answers[len(r.answers)-1]
						if last.Op != roce.RCAck || last.AETH().Syndrome() != roce.SynACK || last.BTH.PSN() != want.BTH.PSN() || last.AETH().MSN() != want.AETH().MSN() {
							t.Errorf("the last answer is %v PSN %#x MSN %d, the kernel's %v PSN %#x MSN %d",
								last.Op, last.BTH.PSN(), last.AETH().MSN(), want.Op, want.BTH.PSN(), want.AETH().MSN())
						}
					}
					// Content.
					var sent []byte
					for _, p := range r.requests {
						sent = append(sent, p.Payload...)
					}
					switch r.op {
					case verbs.OpSend:
						var have []byte
						for i := range r.count() {
							wc := tc.wantWC("a SEND has arrived", uint64(i), verbs.WCSuccess)
							have = append(have, tc.mem[recvAt+i*16384:][:wc.ByteLen]...)
						}
						if !bytes.Equal(have, sent) {
							t.Error("what was sent arrives changed")
						}
					case verbs.OpWrite: // all to one place
						if !bytes.Equal(tc.mem[:r.size], sent[len(sent)-r.size:]) {
							t.Error("what was written arrives changed")
						}
					case verbs.OpRead:
						var read []byte
						for _, p := range got {
							read = append(read, p.Payload...)
						}
						if !bytes.Equal(read, bytes.Repeat(tc.mem[:r.size], r.count())) {
							t.Error("what was read is something else")
						}
					}
				})
			})
		}
	}
}

// TestReplayServer: our requests, answered by what a kernel answered to another's. We send what that one sent: the same
// opcodes, PSNs and lengths.
func TestReplayServer(t *testing.T) {
	for _, r := range replays(t) {
		t.Run(r.name, func(t *testing.T) {
			r.run(t, rxeClient, rxeServer, func(tc *testContext) {
				fill(tc.mem[512<<10:], 9)
				n := r.count()
				var wrs []verbs.SendWR
				for i := range n {
					wr := verbs.SendWR{ID: uint64(i), Opcode: r.op, Flags: verbs.SendSignaled, SGs: tc.sge(i*16384, r.size)}
					switch r.op {
					case verbs.OpSend, verbs.OpWrite:
						wr.SGs = tc.sge(512<<10+i*16384, r.size)
					}
					if r.op != verbs.OpSend {
						first := &r.requests[0]
						if r.op == verbs.OpFetchAdd {
							wr.RemoteAddr, wr.RKey, wr.CompareAdd = first.AtomicETH().VA(), verbs.RKey(first.AtomicETH().RKey()), first.AtomicETH().SwapAdd()
						} else {
							wr.RemoteAddr, wr.RKey = first.RETH().VA(), verbs.RKey(first.RETH().RKey())
						}
					}
					wrs = append(wrs, wr)
				}
				tc.post(wrs...)
				// An answer is played when what it answers has been sent; the window may let the rest go only then.
				var got []roce.Packet
				var last psn.PSN
				answers := slices.Clone(r.answers)
				for {
					pk, ok := tc.read()
					if ok {
						got = append(got, pk)
						last = pk.BTH.PSN()
						if pk.Info.Flags&roce.FlagRead != 0 {
							last = last.Add((int(pk.RETH().Len()) - 1) / r.mtu.Bytes())
						}
						continue
					}
					if len(answers) == 0 || last.Less(answers[0].BTH.PSN()) {
						break
					}
					tc.inject(tc.sealed(&answers[0], nil))
					answers = answers[1:]
				}
				if len(got) != len(r.requests) || len(answers) != 0 {
					t.Fatalf("%d packets, the kernel sent %d; %d answers were of no use", len(got), len(r.requests), len(answers))
				}
				for i := range got {
					w := &r.requests[i]
					if got[i].Op != w.Op || got[i].BTH.PSN() != w.BTH.PSN() || len(got[i].Payload) != len(w.Payload) || !bytes.Equal(got[i].Ext, w.Ext) && r.op != verbs.OpFetchAdd ||
						got[i].BTH.DestQP() != r.qpn || got[i].BTH.PKey() != w.BTH.PKey() {
						t.Errorf("packet %d is %v PSN %#x, %d bytes, %x; the kernel's %v PSN %#x, %d bytes, %x", i,
							got[i].Op, got[i].BTH.PSN(), len(got[i].Payload), got[i].Ext, w.Op, w.BTH.PSN(), len(w.Payload), w.Ext)
					}
				}
				for i := range n {
					tc.wantWC("the request completes", uint64(i), verbs.WCSuccess)
				}
				if r.op == verbs.OpRead {
					var read, have []byte
					for _, p := range r.answers {
						read = append(read, p.Payload...)
					}
					for i := range n {
						have = append(have, tc.mem[i*16384:][:r.size]...)
					}
					if !bytes.Equal(read, have) {
						t.Error("what was read arrives changed")
					}
				}
			})
		})
	}
}

// TestRefusals: the NAKs with which a kernel ends a request, as it sends them for a key that is wrong, for an operation the
// QP does not allow, and for a SEND longer than its receive (a NIC says 0x61 then).
func TestRefusals(t *testing.T) {
	for syn, status := range map[uint8]verbs.WCStatus{
		roce.SynNAKInvReq: verbs.WCRemInvReqErr, roce.SynNAKAccess: verbs.WCRemAccessErr, roce.SynNAKOp: verbs.WCRemOpErr, roce.SynNAKInvRD: verbs.WCRemOpErr,
	} {
		script(t, func(tc *testContext) {
			tc.post(send(1, tc.sge(0, 10)), send(2, tc.sge(0, 300)), send(3, nil))
			for {
				if _, ok := tc.read(); !ok {
					break
				}
			}
			tc.write(roce.RCAck, tx(1), false, aeth(syn, 1), nil)
			tc.wantWC("what came before is done", 1, verbs.WCSuccess)
			tc.wantWC("the request that was refused", 2, status)
			tc.wantWC("what is behind is flushed", 3, verbs.WCFlushErr)
			if s := tc.qp.State(); s != verbs.StateErr {
				t.Errorf("NAK %#x: QP is in %v", syn, s)
			}
		})
	}
}
