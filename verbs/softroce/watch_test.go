package softroce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/verbs"
)

var (
	goneAddr  = netip.MustParseAddr("10.3.0.1")
	otherAddr = netip.MustParseAddr("10.3.0.2")
)

// eventLog keeps asynchronous events.
type eventLog struct {
	mu  sync.Mutex
	all []verbs.EventType
}

func (l *eventLog) add(e verbs.AsyncEvent) {
	l.mu.Lock()
	l.all = append(l.all, e.Type)
	l.mu.Unlock()
}

func (l *eventLog) get() []verbs.EventType {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// removalPair is a pair of QPs in RTS whose side 0 is at goneAddr.
func removalPair(t *testing.T, srq int) (*testPair, *Provider, *eventLog) {
	net := simnet.ForTest(t, 3, simnet.Config{SendBuffer: 64 << 10, Link: simnet.LinkConfig{Delay: 100 * time.Microsecond, RateBytesPerSec: 1 << 30}})
	tp := newTestPairSRQ(t, Config{Network: net}, goneAddr.String(), otherAddr.String(), verbs.MTU4096, srq)
	events := new(eventLog)
	tp.dev[0].SetAsyncHandler(events.add)
	return tp, tp.dev[0].prov, events
}

// TestRemove takes a device away that has SENDs, WRITEs, READs and receives outstanding, and READs of its peer under way: each
// request completes once, the object are closed as ever, and the address serves again before they are.
func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tp, p, events := removalPair(t, 0)
		const n = 8
		posted := 0
		for i := range n {
			for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpSend} {
				if _, err := tp.qp[0].PostSend([]verbs.SendWR{{ID: uint64(posted), Opcode: op, Flags: verbs.SendSignaled, SGs: tp.sge(0, i<<17, 1<<17),
					RemoteAddr: 0x1000 + uint64(i)<<17, RKey: tp.mr[1].RKey()}}); err != nil {
					t.Fatal(err)
				}
				posted++
			}
			if _, err := tp.qp[0].PostRecv([]verbs.RecvWR{{ID: uint64(posted), SGs: tp.sge(0, 3<<20, 4096)}}); err != nil {
				t.Fatal(err)
			}
			posted++
		}
		tp.qp[1].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tp.sge(1, 2<<20, 1<<20), RemoteAddr: 0x1000, RKey: tp.mr[0].RKey()}})
		time.Sleep(250 * time.Microsecond)
		if err := p.Remove(goneAddr); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := tp.qp[0].State(); s != verbs.StateErr {
			t.Errorf("the QP is in %v", s)
		}
		if got := events.get(); !slices.Equal(got, []verbs.EventType{verbs.EventDeviceRemoved}) {
			t.Errorf("events %v", got)
		}
		var wcs [1024]verbs.WC
		k := tp.cq[0].Poll(wcs[:])
		seen := map[uint64]int{}
		flushed := 0
		for _, wc := range wcs[:k] {
			seen[wc.ID]++
			if wc.Status == verbs.WCFlushErr {
				flushed++
			} else if wc.Status != verbs.WCSuccess {
				t.Errorf("completion %+v", wc)
			}
		}
		if k != posted || len(seen) != posted || flushed < n {
			t.Errorf("%d completions of %d requests, %d of them flushed", k, posted, flushed)
		}
		// Nothing more goes out, and nothing new is made.
		sent := tp.dev[0].Stats()["tx_packets"]
		d := tp.dev[0]
		for what, f := range map[string]func() error{
			"AllocPD":  func() error { _, err := d.AllocPD(); return err },
			"CreateCQ": func() error { _, err := d.CreateCQ(verbs.CQConfig{Depth: 1}); return err },
			"CreateQP": func() error {
				_, err := tp.pd[0].CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: tp.cq[0], RecvCQ: tp.cq[0]})
				return err
			},
			"RegMR":  func() error { _, err := tp.pd[0].RegMR(tp.mem[0], 0, accessAll); return err },
			"Listen": func() error { _, err := d.Listen(1, func(verbs.ConnRequest) {}); return err },
			"Connect": func() error {
				_, _, err := d.Connect(context.Background(), netip.AddrPortFrom(otherAddr, 1), tp.qp[0], verbs.ConnParam{}, nil)
				return err
			},
		} {
			if err := f(); !errors.Is(err, verbs.ErrDeviceGone) {
				t.Errorf("%s on a removed device: %v", what, err)
			}
		}
		if err := tp.qp[0].Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit); err != nil {
			t.Errorf("to RESET: %v", err)
		}
		if err := tp.qp[0].Modify(verbs.QPAttr{State: verbs.StateInit, Port: 1}, verbs.QPStateBit|initAttrsRC); !errors.Is(err, verbs.ErrDeviceGone) {
			t.Errorf("to INIT: %v", err)
		}
		if _, err := p.OpenDevice(goneAddr); !errors.Is(err, verbs.ErrNoSuchAddress) {
			t.Errorf("open a removed address: %v", err)
		}
		if err := p.Remove(goneAddr); err != nil {
			t.Errorf("remove again: %v", err)
		}
		// The address comes back while the old device is still open.
		if err := p.Add(goneAddr); err != nil {
			t.Fatal(err)
		}
		again, err := p.OpenDevice(goneAddr)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if now := tp.dev[0].Stats()["tx_packets"]; now != sent {
			t.Errorf("a removed device sent %d packets", now-sent)
		}
		if wc := tp.wait(t, 1); wc.Status != verbs.WCRetryExcErr {
			t.Errorf("a READ from a device that is gone: %+v", wc)
		}
		begin := time.Now()
		tp.shut(t)
		if d := time.Since(begin); d > 0 {
			t.Errorf("closing took %v", d)
		}
		if _, err := p.OpenDevice(goneAddr); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("the old device's Close took the new one out of the table: %v", err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestRemoveBlocked: what waits for a full socket goes with it.
func TestRemoveBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{SendBuffer: 64 << 10, Link: simnet.LinkConfig{RateBytesPerSec: 1 << 20}})
		tp := newTestPair(t, Config{Network: net}, goneAddr.String(), otherAddr.String(), verbs.MTU4096)
		for range 4 {
			tp.qp[0].PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpWrite, Flags: verbs.SendSignaled, SGs: tp.sge(0, 0, 1<<20), RemoteAddr: 0x1000, RKey: tp.mr[1].RKey()}})
		}
		time.Sleep(time.Millisecond)
		tp.dev[0].role.Lock()
		blocked := tp.dev[0].tx.blocked
		tp.dev[0].role.Unlock()
		if !blocked {
			t.Error("the socket is not full: the test tests nothing")
		}
		if err := tp.dev[0].prov.Remove(goneAddr); err != nil {
			t.Fatal(err)
		}
		for range 4 {
			if wc := tp.wait(t, 0); wc.Status != verbs.WCFlushErr {
				t.Errorf("completion %+v", wc)
			}
		}
		tp.shut(t)
	})
}

// TestRemoveTellsFirst: EventDeviceRemoved comes before the events that follow from it, and to who asks too late as well.
func TestRemoveTellsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tp, p, _ := removalPair(t, 4)
		var other eventLog
		tp.dev[1].SetAsyncHandler(other.add) // side 1 has the shared receive queue
		if err := p.Remove(otherAddr); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		want := []verbs.EventType{verbs.EventDeviceRemoved, verbs.EventQPLastWQEReached}
		if got := other.get(); !slices.Equal(got, want) {
			t.Errorf("events %v, want %v", got, want)
		}
		tp.dev[0].SetAsyncHandler(nil)
		if err := p.Remove(goneAddr); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		var late eventLog
		tp.dev[0].SetAsyncHandler(late.add)
		tp.dev[0].SetAsyncHandler(late.add)
		synctest.Wait()
		if got := late.get(); !slices.Equal(got, want[:1]) {
			t.Errorf("events of a handler that came late %v", got)
		}
		tp.shut(t)
	})
}

// cmSide is a device with what a connection needs.
type cmSide struct {
	dev verbs.Device
	pd  verbs.PD
	cq  verbs.CQ
	qp  verbs.QP
}

func newCMSide(t *testing.T, p *Provider, a netip.Addr) *cmSide {
	t.Helper()
	s := &cmSide{}
	var err [4]error
	s.dev, err[0] = p.OpenDevice(a)
	s.pd, err[1] = s.dev.AllocPD()
	s.cq, err[2] = s.dev.CreateCQ(verbs.CQConfig{Depth: 64})
	s.qp, err[3] = s.pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: s.cq, RecvCQ: s.cq, MaxSendWR: 16, MaxRecvWR: 16})
	if e := errors.Join(err[:]...); e != nil {
		t.Fatal(e)
	}
	return s
}

func (s *cmSide) close(t *testing.T) {
	t.Helper()
	for _, c := range []interface{ Close() error }{s.qp, s.cq, s.pd, s.dev} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRemoveConnections removes the device of either side at every moment of a connection's life, one network delay apart.
func TestRemoveConnections(t *testing.T) {
	for side, addr := range []netip.Addr{goneAddr, otherAddr} {
		for step := range 14 {
			t.Run(fmt.Sprintf("side %d after %d", side, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					const delay = 100 * time.Microsecond
					net := simnet.ForTest(t, 3, simnet.Config{Link: simnet.LinkConfig{Delay: delay}})
					p := New(Config{Network: net, GiveUp: time.Second})
					a, b := newCMSide(t, p, goneAddr), newCMSide(t, p, otherAddr)
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
					defer cancel()
					par := verbs.ConnParam{RetryCount: 6, RNRRetryCount: 7}
					var wg sync.WaitGroup
					var epB verbs.Endpoint
					var errB error
					l, err := b.dev.Listen(7, func(r verbs.ConnRequest) {
						time.Sleep(2 * delay)
						epB, errB = r.Accept(ctx, b.qp, par, nil)
					})
					if err != nil {
						t.Fatal(err)
					}
					var epA verbs.Endpoint
					var errA error
					wg.Go(func() {
						epA, _, errA = a.dev.Connect(ctx, netip.AddrPortFrom(otherAddr, 7), a.qp, par, nil)
						if errA == nil {
							a.qp.PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend, Flags: verbs.SendSignaled}})
						}
					})
					time.Sleep(time.Duration(step)*delay/2 + delay/4)
					begin := time.Now()
					if err := p.Remove(addr); err != nil {
						t.Fatal(err)
					}
					if d := time.Since(begin); d > 0 {
						t.Errorf("Remove took %v", d)
					}
					synctest.Wait()
					// On the side that is gone everything has ended now.
					if side == 0 {
						wg.Wait()
						if time.Since(begin) > 0 {
							t.Error("Connect did not end with its device")
						}
						if errA != nil && !errors.Is(errA, verbs.ErrDeviceGone) {
							t.Errorf("connect: %v", errA)
						}
					} else if errB != nil && !errors.Is(errB, verbs.ErrDeviceGone) {
						t.Errorf("accept: %v", errB)
					}
					for i, ep := range []verbs.Endpoint{epA, epB} {
						if ep != nil && i == side {
							select {
							case <-ep.Done():
							default:
								t.Error("the endpoint of a removed device has not ended")
							}
							if err := ep.Disconnect(); err != nil {
								t.Errorf("disconnect: %v", err)
							}
						}
					}
					// The other side hears nothing, and gives up by itself.
					cancel()
					wg.Wait()
					if err := l.Close(); err != nil {
						t.Error(err)
					}
					a.close(t)
					b.close(t)
				})
			})
		}
	}
}

// TestWatch follows addresses that are removed and added by hand.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{})
		p := New(Config{Network: net})
		var got []verbs.DeviceEvent
		gate := make(chan struct{})
		stop, err := p.WatchDevices(func(e verbs.DeviceEvent) {
			<-gate
			got = append(got, e)
		})
		if err != nil {
			t.Fatal(err)
		}
		stop2, err := p.WatchDevices(func(verbs.DeviceEvent) {})
		if err != nil {
			t.Fatal(err)
		}
		step := func() []verbs.DeviceEvent {
			synctest.Wait()
			out := got
			got = nil
			return out
		}
		want := func(what string, got []verbs.DeviceEvent, want ...verbs.DeviceEvent) {
			t.Helper()
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
		away := func(a netip.Addr) verbs.DeviceEvent { return verbs.DeviceEvent{Addr: a} }
		here := func(a netip.Addr) verbs.DeviceEvent { return verbs.DeviceEvent{Addr: a, Present: true} }

		close(gate)
		p.Add(goneAddr)
		want("adding what was not removed", step())
		p.Remove(goneAddr) // which nobody has opened
		want("removing an address", step(), away(goneAddr))
		p.Remove(goneAddr)
		want("removing it twice", step())
		p.Add(goneAddr)
		want("adding it", step(), here(goneAddr))

		// What is not delivered yet is overtaken by what is new of the same address.
		gate = make(chan struct{})
		p.Remove(otherAddr)
		synctest.Wait() // this one is being delivered
		for range 100 {
			p.Remove(goneAddr)
			p.Add(otherAddr)
			p.Add(goneAddr)
			p.Remove(otherAddr)
		}
		if n := len(p.watchers[0].queue); n > 2 {
			t.Errorf("%d events wait", n)
		}
		close(gate)
		want("a hundred changes", step(), away(otherAddr), here(goneAddr), away(otherAddr))

		stop2()
		// stop waits for the call in progress, and none follows.
		gate = make(chan struct{})
		p.Add(otherAddr)
		p.Remove(goneAddr)
		synctest.Wait()
		stopped := make(chan struct{})
		go func() { stop(); close(stopped) }()
		synctest.Wait()
		select {
		case <-stopped:
			t.Error("stop did not wait for the call in progress")
		default:
		}
		close(gate)
		<-stopped
		want("stopping", step(), here(otherAddr))
		p.Add(goneAddr)
		want("after stop", step())
		stop()

		for _, bad := range []string{"0.0.0.0", "224.0.0.1", "::", "ff02::1", "255.255.255.255"} {
			if err := errors.Join(p.Remove(netip.MustParseAddr(bad)), p.Add(netip.MustParseAddr(bad))); !errors.Is(err, verbs.ErrInvalid) {
				t.Errorf("%s: %v", bad, err)
			}
		}
	})
}

// TestAddressesChanged plays the host.
func TestAddressesChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 3, simnet.Config{})
		p := New(Config{Network: net})
		var got []verbs.DeviceEvent
		stop, err := p.WatchDevices(func(e verbs.DeviceEvent) { got = append(got, e) })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		host := func(nets string, addrs ...string) *hostAddrs {
			h := &hostAddrs{addrs: map[netip.Addr]struct{}{}}
			for _, a := range addrs {
				h.addrs[netip.MustParseAddr(a)] = struct{}{}
			}
			if nets != "" {
				h.nets = append(h.nets, netip.MustParsePrefix(nets))
			}
			return h
		}
		p.mon = new(monitor)
		defer func() { p.mon = nil }()
		p.host = host("127.0.0.0/8", "10.3.0.1", "127.0.0.1", "fe80::1%eth0")
		bound := map[netip.Addr]bool{}
		see := func(h *hostAddrs, wantEvents ...string) {
			t.Helper()
			p.addressesChanged(p.mon, h, func(a netip.Addr) bool { return bound[a] })
			synctest.Wait()
			var s []string
			for _, e := range got {
				s = append(s, fmt.Sprintf("%v %v", e.Addr, e.Present))
			}
			slices.Sort(s)
			got = nil
			if !slices.Equal(s, wantEvents) {
				t.Errorf("events %v, want %v", s, wantEvents)
			}
		}
		open := func(a string) verbs.Device {
			t.Helper()
			d, err := p.OpenDevice(netip.MustParseAddr(a))
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		gone := func(d verbs.Device) bool { return d.(*device).isRemoved() }
		var devs []verbs.Device
		lo, own, zoned := open("127.0.0.9"), open("10.3.0.1"), open("fe80::1%eth0")
		anyIP, unknown := open("10.9.0.1"), open("10.9.0.2")
		devs = append(devs, lo, own, zoned, anyIP, unknown)
		bound[netip.MustParseAddr("10.9.0.1")] = true // by a local route

		// What no interface has and cannot be bound to is gone; the local route is not.
		see(host("127.0.0.0/8", "10.3.0.1", "127.0.0.1", "fe80::1%eth0"), "10.9.0.2 false")
		if gone(lo) || gone(own) || gone(zoned) || gone(anyIP) || !gone(unknown) {
			t.Error("the wrong devices were removed")
		}
		// An interface goes down, the loopback too.
		see(host(""), "10.3.0.1 false", "127.0.0.1 false", "127.0.0.9 false", "fe80::1%eth0 false")
		if !gone(lo) || !gone(own) || !gone(zoned) || gone(anyIP) {
			t.Error("the wrong devices were removed")
		}
		// One that was removed by hand meanwhile does not come back with its interface.
		p.Remove(netip.MustParseAddr("10.3.0.1"))
		synctest.Wait()
		got = nil
		see(host("127.0.0.0/8", "10.3.0.1", "127.0.0.1", "10.9.0.2"), "10.9.0.2 true", "127.0.0.1 true", "127.0.0.9 true")
		delete(bound, netip.MustParseAddr("10.9.0.1"))
		see(host("127.0.0.0/8", "10.3.0.1", "127.0.0.1", "10.9.0.2"), "10.9.0.1 false")
		if !gone(anyIP) {
			t.Error("the local route is gone, the device is not")
		}
		bound[netip.MustParseAddr("10.9.0.1")] = true
		see(host("127.0.0.0/8", "10.3.0.1", "127.0.0.1", "10.9.0.2"), "10.9.0.1 true")
		// With every address bindable (ip_nonlocal_bind), one that an interface has lost is gone nevertheless.
		again := open("10.9.0.2")
		devs = append(devs, again)
		bound[netip.MustParseAddr("10.9.0.2")] = true
		see(host("127.0.0.0/8"), "10.3.0.1 false", "10.9.0.2 false")
		if !gone(again) {
			t.Error("the device of an address that went is still there")
		}
		// A monitor that was replaced is not heard.
		p.addressesChanged(nil, host(""), func(netip.Addr) bool { return false })
		for _, d := range devs {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}
