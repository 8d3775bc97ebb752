package conn

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
)

// The tests in this file are the checklist of rds-protocol spec 9 for RDS/IB, each against a scripted kernel.
// addrA is the kernel K, addrB the implementation I, as in the reference traces.

const firstSeq = 1_000_000

var quick = simnet.Config{Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}}

func withSeq(first uint64) func(*hostOptions) {
	return func(o *hostOptions) { o.cfg.FirstSequence = func() uint64 { return first } }
}

// scripted runs fn with a host I and a kernel K.
func scripted(t *testing.T, fn func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer), mods ...func(*hostOptions)) {
	t.Helper()
	bubble(t, 3, quick, func(t *testing.T, net *simnet.Net) {
		k := newKernel(t, net, addrA)
		i := newHost(t, net, addrB, append([]func(*hostOptions){withSeq(firstSeq)}, mods...)...)
		fn(t, net, i, k)
		k.close()
		i.close(10 * time.Millisecond)
	})
}

// TestTraceA is reference trace A: the implementation connects to an idle kernel and both say something.
func TestTraceA(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		tap := tapCM(net)
		var o testOwner
		if err := i.conn(addrA).Send(&o, 4001, 4002, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		// 1
		r := k.wantREQ("I connects")
		var req cm.REQ
		if err := req.Decode(tap.find(addrB, cm.AttrREQ)); err != nil {
			t.Fatal(err)
		}
		if space, port, _ := cm.SplitServiceID(req.ServiceID); space != 0x106 || port != 18634 {
			t.Errorf("REQ to port space %#x, port %d", space, port)
		}
		if req.RNRRetryCount != 7 || req.RetryCount != 6 || req.ResponderResources != 16 || req.InitiatorDepth != 16 || req.Primary.AckTimeout != 17 {
			t.Errorf("REQ: %+v", req)
		}
		want, _ := hex.DecodeString("0a4d0002" + "0a4d0001" + "03" + "01" + "0003" + "00" + "00" + "0000" + "0000000000000000" + "00000000" + "00000000")
		if got := r.Info().PrivateData[:32]; !bytes.Equal(got, want) {
			t.Errorf("private data\n got %x\nwant %x", got, want)
		}
		// 2, 3
		k.accept(r, false)
		// 4
		if m := k.wantMap("I's map is the first message"); m != (rdshdr.CongMap{}) {
			t.Errorf("map with congestion")
		}
		// 5
		k.writeMap(&rdshdr.CongMap{})
		// 6
		p := k.wantSend("I's message", wantHdr{seq: firstSeq, len: 5, sport: 4001, dport: 4002, flags: 2, bytes: 53, se: true})
		if string(p) != "hello" {
			t.Errorf("payload %q", p)
		}
		// 7
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		eventually(t, "the acknowledgement releases the message", time.Second, func() bool { n, b := o.get(); return n == 1 && b == 5 })
		// 8
		k.writeMsg(1, firstSeq, []byte("answer"), 4002, 4001, 2)
		// 9
		k.wantSend("I acknowledges at once", wantHdr{ack: 1, bytes: 48, se: true})
		if got := i.sink.take(); len(got) != 1 || string(got[0].data) != "answer" || got[0].sport != 4002 || got[0].dport != 4001 {
			t.Errorf("delivered %+v", got)
		}
		k.wantIdle("nothing else", time.Second)
	})
}

// TestTraceB is reference trace B: a kernel's ping over a fresh connection.
func TestTraceB(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.must(k.connect(addrB, k.priv(addrB)))
		k.wantMap("map")
		k.writeMsg(1, 0, nil, 5000, 0, 2)
		k.wantSend("the pong carries the acknowledgement", wantHdr{seq: firstSeq, ack: 1, dport: 5000, flags: 2, bytes: 48, se: true})
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		k.wantIdle("no frame of its own", time.Second)
		if s := i.m.Stats(); s.RecvPing != 1 || s.SendPong != 1 || s.IBAckSent != 0 || s.IBAckSendPiggybacked != 1 {
			t.Errorf("%+v", s)
		}
	})
}

// up connects the kernel to the host.
func (k *kernelPeer) up(to *host) {
	k.t.Helper()
	k.must(k.connect(to.addr, k.priv(to.addr)))
	k.wantMap("map")
}

// Item 1: a header with a bad checksum ends the connection and is counted; its message is not delivered.
func TestBadChecksumDropsConnection(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		b := append(header(1, 0, 4, 1000, 2000, 0), "evil"...)
		b[30] ^= 0x40
		k.write(b)
		k.wantGone("bad checksum")
		eventually(t, "down", time.Second, func() bool { return i.m.Stats().ConnReset == 1 })
		if s := i.m.Stats(); s.RecvDropBadChecksum != 1 || s.ConnReset != 1 || i.sink.len() != 0 {
			t.Errorf("%d bad checksums, %d resets, %d delivered", s.RecvDropBadChecksum, s.ConnReset, i.sink.len())
		}
	})
}

// Items 2 and 3: what a kernel gets are fragments of exactly 4096 bytes with identical headers, solicited on the last.
func TestFragmentsToKernel(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		c := i.conn(addrA)
		var o testOwner
		seq := uint64(firstSeq)
		for n, size := range []int{0, 1, 4095, 4096, 4097, 8192, 12289, 61391, 61392, 61393, 100000, 1 << 20} {
			p := payload(9, uint64(n), size)
			if err := c.SendMsg(&o, 9, 10, p, AckNow); err != nil {
				t.Fatal(err)
			}
			var got []byte
			var first []byte
			for parts := max(1, (size+4095)/4096); parts > 0; parts-- {
				s := k.want("fragment")
				h := rdshdr.Header(s.data)
				if first == nil {
					first = s.data[:48]
					if h.Seq() != seq || h.Len() != uint32(size) || h.SPort() != 9 || h.DPort() != 10 {
						t.Fatalf("size %d: %s", size, describe(s.data))
					}
				} else if !bytes.Equal(first, s.data[:48]) {
					t.Fatalf("size %d: headers of one message differ:\n%x\n%x", size, first, s.data[:48])
				}
				if parts > 1 && len(s.data) != 4144 || s.solicited != (parts == 1) {
					t.Fatalf("size %d: fragment of %d bytes, solicited %v, %d to come", size, len(s.data), s.solicited, parts-1)
				}
				got = append(got, s.data[48:]...)
			}
			if !bytes.Equal(got, p) {
				t.Fatalf("size %d: content", size)
			}
			k.write(header(0, seq, 0, 0, 0, 0))
			seq++
		}
		k.wantIdle("that was all", time.Second)
	})
}

// Item 2: a kernel's fragments are put together, and its mistakes end the connection.
func TestFragmentsFromKernel(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		seq := uint64(1)
		for n, size := range []int{0, 1, 4096, 4097, 65536, 1 << 20} {
			p := payload(9, uint64(n), size)
			k.writeMsg(seq, 0, p, 9, 10, 2)
			k.wantSend("acknowledged", wantHdr{ack: seq, bytes: 48, se: true})
			got := i.sink.take()
			if len(got) != 1 || got[0].seq != seq || !bytes.Equal(got[0].data, p) {
				t.Fatalf("size %d: %d messages", size, len(got))
			}
			seq++
		}
	})
	full := make([]byte, 4096)
	for name, bad := range map[string][][]byte{
		"shorter than a header":    {{1, 2, 3}},
		"short first fragment":     {append(header(1, 0, 8192, 9, 10, 0), full[:4000]...)},
		"short last fragment":      {append(header(1, 0, 100, 9, 10, 0), full[:99]...)},
		"long last fragment":       {append(header(1, 0, 100, 9, 10, 0), full[:101]...)},
		"other sequence in middle": {append(header(1, 0, 8192, 9, 10, 0), full...), append(header(2, 0, 8192, 9, 10, 0), full...)},
		"other length in middle":   {append(header(1, 0, 8192, 9, 10, 0), full...), append(header(1, 0, 8191, 9, 10, 0), full...)},
		"other port in middle":     {append(header(1, 0, 8192, 9, 10, 0), full...), append(header(1, 0, 8192, 9, 11, 0), full...)},
		"longer than a message":    {append(header(1, 0, 1<<20+1, 9, 10, 0), full...)},
	} {
		t.Run(name, func(t *testing.T) {
			scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
				k.up(i)
				for _, b := range bad {
					k.write(b)
				}
				k.wantGone(name)
				if s := i.m.Stats(); s.RecvBadFragment != 1 || i.sink.len() != 0 {
					t.Errorf("%d bad fragments, %d delivered", s.RecvBadFragment, i.sink.len())
				}
			})
		})
	}
}

// Item 4: every SEND carries the cumulative acknowledgement, which is sent at once if asked for and after a short delay if not.
func TestAcknowledgements(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		start := time.Now()
		k.writeMsg(1, 0, []byte("a"), 9, 10, 0)
		k.writeMsg(2, 0, []byte("b"), 9, 10, 0)
		k.wantSend("not asked for", wantHdr{ack: 2, bytes: 48, se: true})
		if d := time.Since(start); d < 5*time.Millisecond || d > 10*time.Millisecond {
			t.Errorf("delayed by %v", d)
		}
		start = time.Now()
		k.writeMsg(3, 0, []byte("c"), 9, 10, 2)
		k.wantSend("asked for", wantHdr{ack: 3, bytes: 48, se: true})
		if d := time.Since(start); d > 2*time.Millisecond {
			t.Errorf("an acknowledgement that was asked for took %v", d)
		}
		// Data takes it along.
		k.writeMsg(4, 0, []byte("d"), 9, 10, 0)
		eventually(t, "delivered", time.Second, func() bool { return i.sink.len() == 4 })
		var o testOwner
		if err := i.conn(addrA).Send(&o, 10, 9, []byte("x")); err != nil {
			t.Fatal(err)
		}
		k.wantSend("data carries it", wantHdr{seq: firstSeq, ack: 4, len: 1, sport: 10, dport: 9, flags: 2, bytes: 49, se: true})
		k.wantIdle("and no frame follows", 50*time.Millisecond)
		// The map carries it too.
		k.writeMsg(5, 0, []byte("e"), 9, 10, 0)
		eventually(t, "delivered", time.Second, func() bool { return i.sink.len() == 5 })
		i.m.SetCongested(addrB, 10, true)
		for range 2 {
			if s := k.want("map"); rdshdr.Header(s.data).Ack() != 5 {
				t.Errorf("map with ack %d", rdshdr.Header(s.data).Ack())
			}
		}
		k.wantIdle("and no frame follows", 50*time.Millisecond)
	})
}

// Item 5: ACK_REQUIRED on the first message and at least on every ninth.
func TestAckRequired(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		since := 0
		for n := range 100 {
			if err := i.conn(addrA).Send(&o, 10, 9, []byte("x")); err != nil {
				t.Fatal(err)
			}
			s := k.want("message")
			asks := rdshdr.Header(s.data).Flags()&rdshdr.FlagAckRequired != 0
			if n == 0 && !asks {
				t.Error("the first message does not ask")
			}
			if since++; asks {
				since = 0
			}
			if since >= 9 {
				t.Fatalf("message %d: %d in a row do not ask", n, since)
			}
		}
		// 100 = 11*9 + 1: the last one asked. Two more do not, and a ping asks for them.
		k.write(header(0, firstSeq+99, 0, 0, 0, 0))
		for range 2 {
			i.conn(addrA).Send(&o, 10, 9, []byte("x"))
			k.want("message")
		}
		k.wantSend("a ping asks on behalf of the last ones", wantHdr{seq: firstSeq + 102, sport: PingSourcePort, flags: 2, bytes: 48, se: true})
		k.write(header(0, firstSeq+102, 0, 0, 0, 0))
		eventually(t, "released", time.Second, func() bool { n, _ := o.get(); return n == 102 })
	})
}

// Item 6: receives are there before the peer can send, and a kernel that posts its own late is waited for.
func TestLateReceives(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		tap := tapCM(net)
		var o testOwner
		if err := i.conn(addrA).Send(&o, 4001, 4002, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		k.accept(k.wantREQ("I connects"), true)
		k.writeMap(&rdshdr.CongMap{}) // finds a buffer
		time.Sleep(700 * time.Millisecond)
		k.postRecvs()
		k.wantMap("map, after RNR NAKs")
		k.want("message")
		if i.conn(addrA).State() != Up {
			t.Error("not up")
		}
		k.ep.Disconnect()
		eventually(t, "down", 5*time.Second, func() bool { return i.m.Stats().ConnReset == 1 })
		// And as the passive side: REP with rnr_retry 7.
		for len(k.reqs) > 0 {
			k.reject(<-k.reqs)
		}
		eventually(t, "our connect gets through", 10*time.Second, func() bool {
			for len(k.reqs) > 0 {
				k.reject(<-k.reqs)
			}
			return k.connect(addrB, k.priv(addrB)) == nil
		})
		var rep cm.REP
		if err := rep.Decode(tap.find(addrB, cm.AttrREP)); err != nil {
			t.Fatal(err)
		}
		if rep.RNRRetryCount != 7 {
			t.Errorf("REP with rnr_retry %d", rep.RNRRetryCount)
		}
	})
}

// Item 7: private data of REP, and what is refused, with reason 28 and the int 1.
func TestPrivateData(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		tap := tapCM(net)
		good := k.priv(addrB)
		bad := func(name string, off int, v byte) {
			p := bytes.Clone(good)
			p[off] = v
			n := tap.count(addrB, cm.AttrREJ)
			if err := k.connect(addrB, p); err == nil {
				t.Errorf("%s: accepted", name)
			}
			if tap.count(addrB, cm.AttrREJ) != n+1 {
				t.Errorf("%s: no reject", name)
			}
		}
		bad("another sender", 3, 9)
		bad("another receiver", 7, 9)
		bad("version 2.1", 8, 2)
		bad("version 3.2", 9, 2)
		bad("version 5", 8, 5)
		if s := i.m.Stats(); s.AcceptRejected != 5 || s.AcceptBadPrivate != 5 {
			t.Errorf("%d requests refused, %d for their private data", s.AcceptRejected, s.AcceptBadPrivate)
		}
		var rej cm.REJ
		if err := rej.Decode(tap.find(addrB, cm.AttrREJ)); err != nil {
			t.Fatal(err)
		}
		if rej.Reason != 28 || !bytes.Equal(rej.PrivateData[:8], []byte{1, 0, 0, 0, 0, 0, 0, 0}) {
			t.Errorf("reject reason %v, data %x", rej.Reason, rej.PrivateData[:8])
		}
		k.must(k.connect(addrB, good))
		want, _ := hex.DecodeString("0a4d0002" + "0a4d0001" + "03010003" + "00000000" + "0000000000000000" + "00000000" + "00000000")
		if got := k.peer.PrivateData[:32]; !bytes.Equal(got, want) {
			t.Errorf("REP\n got %x\nwant %x", got, want)
		}
		if !bytes.Equal(k.peer.PrivateData[32:], make([]byte, 196-32)) {
			t.Errorf("a kernel is told more than it asked for")
		}
		k.wantMap("map")
		// TOS makes another connection.
		p := bytes.Clone(good)
		p[12] = 4
		k2 := newKernel(t, net, addrC)
		copy(p, addrC.AsSlice())
		k2.must(k2.connect(addrB, p))
		if k2.peer.PrivateData[12] != 4 {
			t.Errorf("REP with TOS %d", k2.peer.PrivateData[12])
		}
		for _, info := range i.m.Snapshot() {
			if info.Remote == addrC && info.TOS != 4 {
				t.Errorf("connection with TOS %d", info.TOS)
			}
		}
		k2.close()
	})
}

// Item 8: credits are never sent (kernelPeer.want checks every SEND), those received are ignored, and nothing comes from port 1.
func TestCreditsAndPort1(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		p := k.priv(addrB)
		p[27] = 200 // initial credits
		k.must(k.connect(addrB, p))
		k.wantMap("map")
		h := make([]byte, 48)
		rdshdr.Put(h, 1, 0, 0, 9, 10, 2, 17)
		k.write(h)
		k.wantSend("acknowledged", wantHdr{ack: 1, bytes: 48, se: true})
		if s := i.m.Stats(); s.IBRxCreditUpdates != 1 || i.sink.len() != 1 {
			t.Errorf("%d credit updates, %d delivered", s.IBRxCreditUpdates, i.sink.len())
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		go i.conn(addrA).Ping(ctx)
		if s := k.want("ping"); rdshdr.Header(s.data).SPort() <= 1 {
			t.Errorf("ping from port %d", rdshdr.Header(s.data).SPort())
		}
		// A probe ping of a confused peer is a ping; a probe pong is nothing.
		k.writeMsg(2, 0, nil, 1, 0, 2)
		s := k.want("pong to port 1")
		if h := rdshdr.Header(s.data); h.SPort() != 0 || h.DPort() != 1 {
			t.Errorf("%s", describe(s.data))
		}
		k.writeMsg(3, 0, nil, 0, 1, 2)
		k.wantSend("acknowledged", wantHdr{ack: 3, bytes: 48, se: true})
		if i.sink.len() != 1 {
			t.Errorf("delivered %+v", i.sink.take())
		}
		synctest.Wait()
	})
}

// Item 9: acknowledgement frames between fragments, and any starting sequence.
func TestAckBetweenFragments(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		i.conn(addrA).Send(&o, 10, 9, []byte("x"))
		k.want("message")
		p := payload(9, 0, 10000)
		const seq = 1 << 40
		h := header(seq, 0, len(p), 9, 10, 0)
		k.write(append(bytes.Clone(h), p[:4096]...))
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		k.write(append(bytes.Clone(h), p[4096:8192]...))
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		k.write(append(bytes.Clone(h), p[8192:]...))
		eventually(t, "delivered", time.Second, func() bool { return i.sink.len() == 1 })
		if got := i.sink.take()[0]; got.seq != seq || !bytes.Equal(got.data, p) {
			t.Errorf("message %d, %d bytes", got.seq, len(got.data))
		}
		if n, _ := o.get(); n != 1 {
			t.Error("acknowledgement in between not taken")
		}
		// A kernel that begins again without the flag is believed (rds-protocol spec 1.10).
		k.writeMsg(5, 0, []byte("low"), 9, 10, 2)
		k.wantSend("acknowledged", wantHdr{ack: seq, bytes: 48, se: true}.or(t, k, 5))
		if i.sink.len() != 2 {
			t.Error("not delivered")
		}
	})
}

// or accepts the delayed acknowledgement of what came before, and goes on to the next.
func (w wantHdr) or(t *testing.T, k *kernelPeer, ack uint64) wantHdr {
	k.poll()
	if len(k.got) > 0 && rdshdr.Header(k.got[0].data).Ack() == w.ack {
		k.got = k.got[1:]
	}
	w.ack = ack
	return w
}

// Item 12: the map first on every connection, whole, with flags 1 and sequence 0; and the peer's map replaces the old one.
func TestMaps(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		i.m.SetCongested(addrB, 4002, true)
		i.m.SetCongested(addrB, 65535, true)
		var o testOwner
		i.conn(addrA).Send(&o, 10, 9, []byte("x"))
		k.accept(k.wantREQ("I connects"), false)
		m := k.wantMap("map before data")
		var want rdshdr.CongMap
		want.Set(4002)
		want.Set(65535)
		if m != want {
			t.Error("another map")
		}
		k.want("message")
		i.m.SetCongested(addrB, 4002, false)
		i.m.SetCongested(addrB, 4003, true)
		want.Clear(4002)
		want.Set(4003)
		m = k.wantMap("the new map")
		for range 2 { // two changes are one map or two
			if m == want {
				break
			}
			m = k.wantMap("the newer map")
		}
		if m != want {
			t.Error("another map")
		}
		c := i.conn(addrA)
		k.writeMap(&want)
		eventually(t, "the peer's map counts", time.Second, func() bool { return c.PeerCongested(4003) && c.PeerCongested(65535) })
		if c.PeerCongested(4002) {
			t.Error("4002 is not congested")
		}
		k.writeMap(&rdshdr.CongMap{})
		eventually(t, "the empty map replaces it", time.Second, func() bool { return !c.PeerCongested(4003) && !c.PeerCongested(65535) })
		i.sink.mu.Lock()
		if want := []netip.AddrPort{netip.AddrPortFrom(addrA, 4003), netip.AddrPortFrom(addrA, 65535)}; !slices.Equal(i.sink.clear, want) {
			t.Errorf("reported clear: %v", i.sink.clear)
		}
		i.sink.mu.Unlock()
		// A map of another length is ignored; with another flag it is an ordinary message to port 0, from port 0: nothing.
		k.write(append(header(0, 0, 100, 0, 0, 1), make([]byte, 100)...))
		k.writeMsg(7, 0, make([]byte, 100), 0, 0, 3)
		k.wantSend("acknowledged", wantHdr{ack: 7, bytes: 48, se: true})
		if s := i.m.Stats(); s.RecvMapBadLength != 1 || i.sink.len() != 0 {
			t.Errorf("%d maps of a bad length, %d delivered", s.RecvMapBadLength, i.sink.len())
		}
		// The same on the next connection.
		k.ep.Disconnect()
		eventually(t, "down", 5*time.Second, func() bool { return i.m.Stats().ConnReset == 1 })
		if n, _ := o.get(); n != 0 {
			t.Error("acknowledged by nobody")
		}
		for {
			r := k.wantREQ("again")
			k.accept(r, false)
			break
		}
		if k.wantMap("map on the next connection") != want {
			t.Error("another map")
		}
	})
}

// Item 14, and 3.8: what was not acknowledged is sent again, in order, flagged; what was acknowledged is not.
func TestRetransmission(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		c := i.conn(addrA)
		big := payload(1, 1, 9000)
		c.Send(&o, 10, 9, []byte("zero"))
		c.Send(&o, 10, 9, []byte("one"))
		c.Send(&o, 10, 9, big)
		c.Send(&o, 10, 9, []byte("three"))
		for range 6 {
			k.want("first time")
		}
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		eventually(t, "one released", time.Second, func() bool { n, _ := o.get(); return n == 1 })
		k.ep.Disconnect()
		eventually(t, "down", 5*time.Second, func() bool { return i.m.Stats().ConnReset == 1 })
		c.Send(&o, 10, 9, []byte("four"))
		k.accept(k.wantREQ("again"), false)
		k.wantMap("map first")
		const re = rdshdr.FlagRetransmitted | rdshdr.FlagAckRequired
		k.wantSend("one, again", wantHdr{seq: firstSeq + 1, len: 3, sport: 10, dport: 9, flags: re, bytes: 51, se: true})
		for n := range 3 {
			k.wantSend("two, again, whole", wantHdr{seq: firstSeq + 2, len: 9000, sport: 10, dport: 9, flags: re, bytes: 48 + []int{4096, 4096, 808}[n], se: n == 2})
		}
		k.wantSend("three, again", wantHdr{seq: firstSeq + 3, len: 5, sport: 10, dport: 9, flags: re, bytes: 53, se: true})
		s := k.want("four, for the first time")
		if h := rdshdr.Header(s.data); h.Seq() != firstSeq+4 || h.Flags()&rdshdr.FlagRetransmitted != 0 {
			t.Errorf("%s", describe(s.data))
		}
		if st := i.m.Stats(); st.SendRetransmit != 3 {
			t.Errorf("%d retransmissions counted", st.SendRetransmit)
		}
		k.write(header(0, firstSeq+4, 0, 0, 0, 0))
		eventually(t, "all released", time.Second, func() bool { n, b := o.get(); return n == 5 && b == 4+3+9000+5+4 })
	})
}

// A message that was sent in part only is not flagged: the peer cannot have it (rds-protocol spec 5.6).
func TestHalfSentIsNotFlagged(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		c := i.conn(addrA)
		// More than the ring holds, to a peer that takes nothing.
		k.must(k.qp.Modify(errState, errStateMask))
		c.Send(&o, 10, 9, make([]byte, 1<<20))
		c.Send(&o, 10, 9, make([]byte, 1<<20))
		time.Sleep(100 * time.Millisecond)
		k.ep.Disconnect()
		k.accept(k.wantREQ("again"), false)
		k.wantMap("map")
		for range 512 {
			s := k.want("fragment")
			if h := rdshdr.Header(s.data); h.Seq() == firstSeq+1 && h.Flags()&rdshdr.FlagRetransmitted != 0 {
				t.Fatal("the second message was never sent to its end")
			}
		}
		k.write(header(0, firstSeq+1, 0, 0, 0, 0))
	})
}

// Item 15: sequences grow over restarts.
func TestSequenceEpoch(t *testing.T) {
	bubble(t, 3, quick, func(t *testing.T, net *simnet.Net) {
		k := newKernel(t, net, addrA)
		var last uint64
		for range 3 {
			i := newHost(t, net, addrB)
			var o testOwner
			for range 100 {
				i.conn(addrA).Send(&o, 10, 9, []byte("x"))
			}
			k.accept(k.wantREQ("I connects"), false)
			k.wantMap("map")
			for range 100 {
				s := k.want("message")
				if h := rdshdr.Header(s.data); h.Seq() <= last {
					t.Fatalf("sequence %d after %d", h.Seq(), last)
				} else {
					last = h.Seq()
				}
			}
			i.close(0)
		}
		k.close()
	})
}

// Item 16: pings are answered; pongs are bounded, and suppressed while the port is congested.
func TestPongs(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var m rdshdr.CongMap
		m.Set(5000)
		k.writeMap(&m)
		k.writeMsg(1, 0, []byte("payload is ignored"), 5001, 0, 2)
		k.wantSend("pong", wantHdr{seq: firstSeq, ack: 1, dport: 5001, flags: 2, bytes: 48, se: true})
		k.writeMsg(2, 0, nil, 5000, 0, 2)
		k.wantSend("no pong to a congested port, but an acknowledgement", wantHdr{ack: 2, bytes: 48, se: true})
		// From port 0 to port 0 is nothing.
		k.writeMsg(3, 0, []byte("x"), 0, 0, 2)
		k.wantSend("acknowledged", wantHdr{ack: 3, bytes: 48, se: true})
		// A flood, none of whose pongs is acknowledged.
		seq := uint64(4)
		for range 30 {
			for range 100 {
				k.writeMsg(seq, 0, nil, 5001, 0, 0)
				seq++
			}
			time.Sleep(2 * time.Millisecond)
			k.poll()
		}
		time.Sleep(50 * time.Millisecond)
		k.poll()
		pongs := 0
		for _, s := range k.got {
			if rdshdr.Header(s.data).DPort() == 5001 {
				pongs++
			}
		}
		if pongs == 0 || pongs > maxPongs {
			t.Errorf("%d pongs to a flood", pongs)
		}
		if s := i.m.Stats(); s.RecvPongDropped == 0 || i.sink.len() != 0 {
			t.Errorf("%d pongs dropped, %d messages delivered", s.RecvPongDropped, i.sink.len())
		}
	})
}

// Item 17 and 1.10: duplicates of a kernel are dropped by its flag, and acknowledged.
func TestDuplicatesOfKernel(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		k.writeMsg(1, 0, []byte("a"), 9, 10, 0)
		k.writeMsg(2, 0, []byte("b"), 9, 10, 2)
		k.wantSend("acknowledged", wantHdr{ack: 2, bytes: 48, se: true})
		k.ep.Disconnect()
		eventually(t, "down", 5*time.Second, func() bool { return i.m.Stats().ConnReset == 1 })
		k.up(i)
		if k.mapAck != 0 {
			// After a restart of the kernel it would acknowledge what nobody has (rds-protocol spec 2.4).
			t.Errorf("a new connection begins with ack %d", k.mapAck)
		}
		const re = rdshdr.FlagRetransmitted | rdshdr.FlagAckRequired
		k.writeMsg(2, 0, []byte("b"), 9, 10, re)
		k.wantSend("a duplicate is acknowledged", wantHdr{ack: 2, bytes: 48, se: true})
		k.writeMsg(3, 0, []byte("c"), 9, 10, re)
		k.wantSend("what was lost is new", wantHdr{ack: 3, bytes: 48, se: true})
		got := i.sink.take()
		if len(got) != 3 || string(got[2].data) != "c" {
			t.Errorf("%d delivered", len(got))
		}
		if s := i.m.Stats(); s.RecvDropOldSeq != 1 {
			t.Errorf("%d duplicates", s.RecvDropOldSeq)
		}
	})
}

// An acknowledgement of what was never sent is not honoured.
func TestAckAboveSent(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		i.conn(addrA).Send(&o, 10, 9, []byte("x"))
		k.want("message")
		k.write(header(0, firstSeq+1, 0, 0, 0, 0))
		k.write(header(0, ^uint64(0), 0, 0, 0, 0))
		time.Sleep(time.Millisecond)
		if n, _ := o.get(); n != 0 {
			t.Fatal("released")
		}
		if s := i.m.Stats(); s.RecvBadAck != 2 {
			t.Errorf("%d counted", s.RecvBadAck)
		}
		k.write(header(0, firstSeq, 0, 0, 0, 0))
		eventually(t, "released", time.Second, func() bool { n, _ := o.get(); return n == 1 })
	})
}

// A kernel believes the last SEND of a batch alone, so acknowledgements never go down: not even when one is asked for
// in the middle of a message whose fragments repeat an older one.
func TestAcksNeverGoDown(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		k.noRepost = true
		var o testOwner
		c := i.conn(addrA)
		for range 2 {
			c.Send(&o, 10, 9, make([]byte, 1<<20))
		}
		c.Send(&o, 10, 9, nil)
		time.Sleep(time.Millisecond)
		c.mu.Lock()
		mid := c.midMessage()
		c.mu.Unlock()
		if !mid {
			t.Fatal("not in the middle of a message")
		}
		for seq := range uint64(5) {
			k.writeMsg(seq+1, 0, []byte("x"), 9, 10, 2)
			time.Sleep(time.Millisecond)
		}
		k.poll()
		k.noRepost = false
		for n := range uint64(kernelRecvs) {
			k.postRecv(n)
		}
		var last uint64
		for range 600 {
			time.Sleep(time.Millisecond)
			k.poll()
		}
		frags := 0
		for _, s := range k.got {
			h := rdshdr.Header(s.data)
			if h.Ack() < last {
				t.Fatalf("ack %d after %d", h.Ack(), last)
			}
			last = h.Ack()
			if h.Len() > 0 {
				frags++
			}
		}
		if frags != 512 || last != 5 {
			t.Errorf("%d fragments, acknowledged %d", frags, last)
		}
	})
}

// TestPostInPart: the device takes the first SENDs of a batch and refuses the rest. The peer may have the first, so they are flagged when they are
// sent again: to a kernel nothing else tells that it has them.
func TestPostInPart(t *testing.T) {
	var faults faultverbs.Faults
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		k.up(i)
		var o testOwner
		c := i.conn(addrA)
		c.mu.Lock()
		c.txBusy = true // the test is the transmitter
		c.mu.Unlock()
		for range 8 {
			c.Send(&o, 10, 9, []byte("x"))
		}
		faults.Fail(faultverbs.PostSend, 1, verbs.ErrSQFull) // after half of it
		c.mu.Lock()
		c.transmitRounds()
		for n := range 4 {
			if h := rdshdr.Header(k.want("first time").data); h.Seq() != firstSeq+uint64(n) || h.Flags()&rdshdr.FlagRetransmitted != 0 {
				t.Errorf("%d: %s", n, describe(h))
			}
		}
		k.accept(k.wantREQ("again"), false)
		k.wantMap("map first")
		for n := range 8 {
			h := rdshdr.Header(k.want("again").data)
			if h.Seq() != firstSeq+uint64(n) || n < 4 && h.Flags()&rdshdr.FlagRetransmitted == 0 {
				t.Errorf("%d, again: %s", n, describe(h))
			}
		}
		k.write(header(0, firstSeq+7, 0, 0, 0, 0))
		eventually(t, "all released", time.Second, func() bool { n, _ := o.get(); return n == 8 })
	}, func(o *hostOptions) {
		o.wrap = func(p verbs.Provider) verbs.Provider { return faultverbs.Wrap(p, &faults) }
	})
}
