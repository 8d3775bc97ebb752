package conn

import (
	"context"
	"encoding/binary"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/cm"
	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/internal/wire/roce"
)

// The tests in this file are what a stock kernel showed in the lab (docs/compatibility.md), where the rest of the code
// must not forget it.

// TestCloseTellsKernelsNothing: a kernel that gets a DREQ from a process that ends connects again at once, to nobody,
// and is then deaf for 6 s to the process that comes next. So it gets none; one of ours does.
func TestCloseTellsKernelsNothing(t *testing.T) {
	for _, who := range []string{"kernel connects", "we connect"} {
		t.Run(who, func(t *testing.T) {
			bubble(t, 3, quick, func(t *testing.T, net *simnet.Net) {
				tap := tapCM(net)
				k := newKernel(t, net, addrA)
				i := newHost(t, net, addrB)
				if who == "kernel connects" {
					k.up(i)
				} else {
					if err := i.conn(addrA).Send(nil, 1, 2, []byte("x")); err != nil {
						t.Fatal(err)
					}
					k.accept(k.wantREQ("we connect"), false)
					k.wantMap("map")
					seq := rdshdr.Header(k.want("the message").data).Seq()
					k.write(header(0, seq, 0, 0, 0, 0))
				}
				time.Sleep(time.Second)
				i.close(time.Second)
				time.Sleep(time.Minute)
				if n := tap.count(addrB, cm.AttrDREQ); n != 0 {
					t.Errorf("%d DREQs to a kernel from a process that ends", n)
				}
				select {
				case <-k.ep.Done():
					t.Error("the kernel knows that the connection has ended")
				default:
				}
				// The next process is a stranger with another GUID. The kernel drops the connection at its REQ.
				i = newHost(t, net, addrB)
				if err := i.conn(addrA).Send(nil, 1, 2, []byte("y")); err != nil {
					t.Fatal(err)
				}
				r := k.wantREQ("the next process connects")
				k.accept(r, false)
				k.wantMap("map of the next process")
				k.close()
				i.close(10 * time.Millisecond)
			})
		})
	}
	t.Run("both in the kernel's dialect", func(t *testing.T) {
		bubble(t, 4, quick, func(t *testing.T, net *simnet.Net) {
			tap := tapCM(net)
			kernelOnly := func(o *hostOptions) { o.cfg.Dialect = DialectKernelOnly }
			i, p := newHost(t, net, addrA, kernelOnly), newHost(t, net, addrB, kernelOnly)
			if err := i.conn(addrB).Send(nil, 1, 2, []byte("x")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "delivered", time.Second, func() bool { return p.sink.len() == 1 })
			i.close(time.Second)
			p.close(time.Second)
			if n := tap.count(addrA, cm.AttrDREQ) + tap.count(addrB, cm.AttrDREQ); n != 0 {
				t.Errorf("%d DREQs", n)
			}
		})
	})
	t.Run("one of ours is told", func(t *testing.T) {
		bubble(t, 5, quick, func(t *testing.T, net *simnet.Net) {
			tap := tapCM(net)
			i, p := newHost(t, net, addrA), newHost(t, net, addrB)
			if err := i.conn(addrB).Send(nil, 1, 2, []byte("x")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "delivered", time.Second, func() bool { return p.sink.len() == 1 })
			i.close(time.Second)
			if n := tap.count(addrA, cm.AttrDREQ); n != 1 {
				t.Errorf("%d DREQs, want 1", n)
			}
			synctest.Wait()
			eventually(t, "the peer knows", time.Second, func() bool { return p.m.Stats().ConnsUp == 0 })
			p.close(time.Second)
		})
	})
	t.Run("a kernel is told of a reset", func(t *testing.T) {
		scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
			tap := tapCM(net)
			k.up(i)
			i.conn(addrA).failLink(errStale)
			k.wantGone("the process lives, and resets the connection")
			if n := tap.count(addrB, cm.AttrDREQ); n != 1 {
				t.Errorf("%d DREQs, want 1", n)
			}
		})
	})
}

// TestLostRTU: a kernel does not take our first SEND for the RTU. Until that has arrived it has posted no receives and
// answers RNR, and its CM repeats its REP after 4.1 s only: so the RTU is repeated, soon.
func TestLostRTU(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		tap := tapCM(net)
		const lost = 2
		seen := 0
		net.SetFilter(func(e simnet.Event) bool {
			var p roce.Packet
			if e.Kind != simnet.Sent || roce.Parse(e.Data, &p) != nil || p.BTH.DestQP() != 1 {
				return false
			}
			h, err := cm.PeekHeader(p.Payload)
			if err != nil || h.Attr != cm.AttrRTU {
				return false
			}
			seen++
			return seen <= lost
		})
		if err := i.conn(addrA).Send(nil, 1, 2, []byte("early")); err != nil {
			t.Fatal(err)
		}
		r := k.wantREQ("I connects")
		start := time.Now()
		k.accept(r, true) // our own passive side does take the SEND for it
		eventually(t, "an RTU that arrives", 3*time.Second, func() bool { return tap.count(addrB, cm.AttrRTU) > lost })
		if d := time.Since(start); d > 200*time.Millisecond {
			t.Errorf("it arrives after %v", d)
		}
		// The kernel is up: receives, its map. That is the sign for us.
		k.must(k.postRecvs())
		k.writeMap(&rdshdr.CongMap{})
		k.wantMap("I's map, refused so far")
		if s := k.want("the message"); string(s.data[48:]) != "early" {
			t.Errorf("message %x", s.data)
		}
		time.Sleep(time.Minute)
		if n := tap.count(addrB, cm.AttrRTU); n != lost+1 {
			t.Errorf("%d RTUs, want %d", n, lost+1)
		}
	})
}

// TestAnswersOfKernels: what a kernel may say to a REQ beside the usual.
func TestAnswersOfKernels(t *testing.T) {
	for name, priv := range map[string]func(k *kernelPeer) []byte{
		// CM pads with zeros: a REP without RDS' part (rds-protocol spec Q7).
		"nothing": func(k *kernelPeer) []byte { return nil },
		// A peer of 4.1, which is not RDS over IB as we know it but negotiates down to this (3.3).
		"version 4.1": func(k *kernelPeer) []byte {
			b := k.priv(addrB)
			b[8], b[9] = 4, 1
			return b
		},
		"credits": func(k *kernelPeer) []byte {
			b := k.priv(addrB)
			b[27] = 100
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
				if err := i.conn(addrA).Send(nil, 1, 2, []byte("hello")); err != nil {
					t.Fatal(err)
				}
				r := k.wantREQ("I connects")
				k.newQP()
				p := kernelParam
				p.PrivateData = priv(k)
				ep, err := r.Accept(context.Background(), k.qp, p, k.postRecvs)
				k.must(err)
				k.ep = ep
				close(r.done)
				k.wantMap("map")
				if s := k.want("the message"); string(s.data[48:]) != "hello" {
					t.Errorf("message %x", s.data)
				}
				if info := i.m.Snapshot(); len(info) != 1 || !info[0].PeerIsKernel || info[0].State != Up {
					t.Errorf("%+v", info)
				}
			})
		})
	}
	// 1: it has just dropped a connection, or has a REQ of its own on its way. -95: its device is gone (rxe deleted under
	// it). Neither is for ever.
	for _, code := range []int32{1, -95, 0} {
		t.Run("reject "+strconv.Itoa(int(code)), func(t *testing.T) {
			scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
				if err := i.conn(addrA).Send(nil, 1, 2, []byte("hello")); err != nil {
					t.Fatal(err)
				}
				for range 20 {
					r := k.wantREQ("again")
					k.must(r.Reject(binary.LittleEndian.AppendUint32(nil, uint32(code))))
					close(r.done)
				}
				start := time.Now()
				k.accept(k.wantREQ("and again"), false)
				k.wantMap("map")
				k.want("the message")
				if d := time.Since(start); d > 2*time.Second {
					t.Errorf("the next attempt after %v", d)
				}
			})
		})
	}
}

// TestDuelWithKernel: a kernel with a REQ of its own on the way rejects ours with 1, and its REQ brings the connection up: ours
// keeps out of its way.
func TestDuelWithKernel(t *testing.T) {
	scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
		tap := tapCM(net)
		if err := i.conn(addrA).Send(nil, 1, 2, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		k.reject(k.wantREQ("I connects"))
		start := time.Now()
		for k.connect(addrB, k.priv(addrB)) != nil {
			if time.Since(start) > 5*time.Second {
				t.Fatal("the kernel's REQ is never taken")
			}
		}
		k.wantMap("map")
		k.want("the message")
		if d := time.Since(start); d > 200*time.Millisecond {
			t.Errorf("the duel takes %v", d)
		}
		time.Sleep(time.Second)
		if n := tap.count(addrB, cm.AttrREQ); n != 1 {
			t.Errorf("%d REQs of ours, want 1", n)
		}
		if i.conn(addrA).State() != Up {
			t.Error("not up")
		}
	})
}

// TestShortSendOfKernel: a SEND that is shorter than its header says ends the connection. A kernel takes it, and shows its
// application what the buffer held before (rds-protocol spec X12).
func TestShortSendOfKernel(t *testing.T) {
	for name, send := range map[string][]byte{
		"no payload":              header(1, 0, 100, 9, 10, 2),
		"one byte short":          append(header(1, 0, 4096, 9, 10, 2), make([]byte, 4095)...),
		"a short first fragment":  append(header(1, 0, 5000, 9, 10, 2), make([]byte, 4000)...),
		"a short header":          header(1, 0, 0, 9, 10, 2)[:47],
		"more than the header":    append(header(1, 0, 3, 9, 10, 2), "abcd"...),
		"half a congestion map":   append(header(0, 0, 4096, 0, 0, 1), make([]byte, 4096)...),
		"fragment of one message": append(header(1, 0, 1<<20+1, 9, 10, 2), make([]byte, 4096)...),
	} {
		t.Run(name, func(t *testing.T) {
			scripted(t, func(t *testing.T, net *simnet.Net, i *host, k *kernelPeer) {
				k.up(i)
				k.write(send)
				if name == "half a congestion map" { // counted and ignored
					time.Sleep(time.Second)
					if s := i.m.Stats(); s.RecvMapBadLength != 1 {
						t.Errorf("%d maps of a wrong length", s.RecvMapBadLength)
					}
					return
				}
				k.wantGone(name)
				if i.sink.len() != 0 {
					t.Error("delivered")
				}
			})
		})
	}
}
