package softroce

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/verbs"
)

// linkLocal is a link-local address of this host, with the index of its interface.
func linkLocal(t *testing.T) (a netip.Addr, index int) {
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, ifi := range ifs {
		addrs, _ := ifi.Addrs()
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() && ifi.Flags&net.FlagUp != 0 {
				return p.Addr().WithZone(ifi.Name), ifi.Index
			}
		}
	}
	t.Skip("no interface has a link-local IPv6 address")
	return
}

// TestLinkLocalUDP connects a device with itself by its link-local address, which may be called by the name of the link or by its
// number, and packets from which come with neither.
func TestLinkLocalUDP(t *testing.T) {
	addr, index := linkLocal(t)
	for _, zone := range []string{addr.Zone(), strconv.Itoa(index)} {
		t.Run(zone, func(t *testing.T) {
			d, err := New(Config{}).OpenDevice(addr)
			if err != nil {
				t.Fatal(err)
			}
			tp := &testPair{}
			pd, _ := d.AllocPD()
			cq, _ := d.CreateCQ(verbs.CQConfig{Depth: 10})
			mr, err := pd.RegMR(make([]byte, 4096), 0, accessAll)
			if err != nil {
				t.Fatal(err)
			}
			for i := range tp.qp {
				tp.dev[i], tp.cq[i] = d.(*device), cq
				if tp.qp[i], err = pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: cq, RecvCQ: cq, MaxSendWR: 4, MaxRecvWR: 4}); err != nil {
					t.Fatal(err)
				}
			}
			sgs := []verbs.SGE{{Length: 100, LKey: mr.LKey()}}
			accepted := make(chan netip.Addr, 1)
			lis, err := d.Listen(77, func(r verbs.ConnRequest) {
				if _, err := r.Accept(t.Context(), tp.qp[1], verbs.ConnParam{}, func() error {
					_, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: 1, SGs: sgs}})
					return err
				}); err != nil {
					t.Error(err)
				}
				accepted <- r.Remote().Addr()
			})
			if err != nil {
				t.Fatal(err)
			}
			ep, _, err := d.Connect(t.Context(), netip.AddrPortFrom(addr.WithZone(zone), 77), tp.qp[0], verbs.ConnParam{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{send(2, sgs)}); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if wc := tp.wait(t, 0); wc.Err() != nil {
					t.Error(wc.Err())
				}
			}
			if a := <-accepted; a != addr {
				t.Errorf("the request is from %v, want %v", a, addr)
			}
			if n := d.Stats()["rx_bad_source"]; n != 0 {
				t.Errorf("%d packets were of a stranger", n)
			}
			for _, c := range []func() error{ep.Disconnect, lis.Close, tp.qp[0].Close, tp.qp[1].Close, mr.Deregister, pd.Close, cq.Close, d.Close} {
				if err := c(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Where a packet goes to is written without asking the kernel for the link's number.
func TestLinkLocalName(t *testing.T) {
	addr, index := linkLocal(t)
	c, err := udpNetwork{rcvbuf: 1 << 16}.Listen(netip.AddrPortFrom(addr, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u := c.(*udpConn)
	var sa unix.RawSockaddrInet6
	to := netip.AddrPortFrom(netip.MustParseAddr("fe80::77"), 4791)
	if n := testing.AllocsPerRun(10, func() { u.name(&sa, to) }); n != 0 || sa.Scope_id != uint32(index) || sa.Addr != to.Addr().As16() {
		t.Errorf("%v allocations, %+v, want scope %d", n, sa, index)
	}
	if u.name(&sa, netip.AddrPortFrom(netip.MustParseAddr("fd00::77"), 4791)); sa.Scope_id != 0 {
		t.Errorf("%+v", sa)
	}
}

// A link-local address on a link that this host does not have is one that it does not have.
func TestLinkLocalNowhere(t *testing.T) {
	if d, err := New(Config{}).OpenDevice(netip.MustParseAddr("fe80::1%nosuchlink")); !errors.Is(err, verbs.ErrNoSuchAddress) {
		t.Errorf("%v, %v", d, err)
	}
}
