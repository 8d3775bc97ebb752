//go:build lab && linux

package lab

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// The tools that come with rdma-core, with their peer's part played here.

// info is rping's message: where the sender's buffer is.
type rpingInfo struct {
	addr uint64
	key  verbs.RKey
	size uint32
}

const rpingInfoLen = 16

func (i rpingInfo) put(b []byte) {
	binary.BigEndian.PutUint64(b, i.addr)
	binary.BigEndian.PutUint32(b[8:], uint32(i.key))
	binary.BigEndian.PutUint32(b[12:], i.size)
}

func rpingInfoAt(b []byte) rpingInfo {
	return rpingInfo{binary.BigEndian.Uint64(b), verbs.RKey(binary.BigEndian.Uint32(b[8:])), binary.BigEndian.Uint32(b[12:])}
}

// Places in our region for rping, and the numbers of requests.
const (
	rpingRecv, rpingSend, rpingStart, rpingSink = 0, 4096, 1 << 20, 2 << 20
	rpingSize                                   = 5000
)

// await takes completions until n receives have come, and requires the others to be good.
func (h *hostEnd) await(n int) {
	h.t.Helper()
	for n > 0 {
		wc := h.poll()
		if err := wc.Err(); err != nil {
			h.t.Fatal(err)
		}
		if wc.Opcode == verbs.WCRecv {
			n--
		}
	}
}

// finish waits for the good end of one of our requests.
func (h *hostEnd) finish(op verbs.WCOpcode) {
	h.t.Helper()
	for {
		wc := h.poll()
		if err := wc.Err(); err != nil {
			h.t.Fatal(err)
		}
		if wc.Opcode == op {
			return
		}
	}
}

// TestRXERping plays both of rping's parts against the real one.
func TestRXERping(t *testing.T) {
	const count = 10
	t.Run("guest serves", func(t *testing.T) {
		g := guest(t, 4500)
		h := newHost(t, ipv4.host)
		p, err := g.Start("rping", "-s", "-a", ipv4.guest, "-p", fmt.Sprint(port), "-C", fmt.Sprint(count), "-S", fmt.Sprint(rpingSize), "-v")
		if err != nil {
			t.Fatal(err)
		}
		for try := 0; ; try++ { // it says nothing when it listens
			h.ep, _, err = h.dev.Connect(h.ctx, addrPort(ipv4.guest, port), h.qp, connParam, nil)
			if err == nil {
				break
			}
			if try == 50 {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
			if err := h.qp.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("rping: %s %s", p.Output(), p.Stderr())
			}
		})
		text := bytes.Repeat([]byte("0123456789abcdef "), rpingSize/17-2) // NUL ends it: the server WRITEs back a string
		for i := range count {
			want := append(fmt.Appendf(nil, "rdma-ping-%d: ", i), text...)
			copy(h.at(rpingStart, rpingSize), append(want, 0))
			clear(h.at(rpingSink, rpingSize))
			for _, off := range []int{rpingStart, rpingSink} { // the server READs the one and WRITEs it to the other
				h.recv(2, rpingRecv, rpingInfoLen)
				rpingInfo{hostIOVA + uint64(off), h.mr.RKey(), rpingSize}.put(h.at(rpingSend, rpingInfoLen))
				h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: h.sge(rpingSend, rpingInfoLen)})
				h.await(1)
			}
			if !bytes.HasPrefix(h.at(rpingSink, rpingSize), want) {
				t.Fatalf("ping %d comes back as %q", i, h.at(rpingSink, 40))
			}
		}
		h.ep.Disconnect()
		if err := p.Wait(h.ctx); err != nil {
			t.Error(err)
		}
		if n := strings.Count(p.Output(), "server ping data: rdma-ping-"); n != count {
			t.Errorf("the guest's rping shows %d pings, want %d", n, count)
		}
	})
	t.Run("guest calls", func(t *testing.T) {
		g := guest(t, 4500)
		h := newHost(t, ipv4.host)
		ch := make(chan error, 1)
		l, err := h.dev.Listen(port, func(r verbs.ConnRequest) {
			ep, err := r.Accept(h.ctx, h.qp, connParam, func() error {
				h.recv(2, rpingRecv, rpingInfoLen)
				return nil
			})
			h.ep = ep
			ch <- err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		p, err := g.Start("rping", "-c", "-a", ipv4.host, "-I", ipv4.guest, "-p", fmt.Sprint(port), "-C", fmt.Sprint(count), "-S", fmt.Sprint(rpingSize), "-v", "-V")
		if err != nil {
			t.Fatal(err)
		}
		if err := <-ch; err != nil {
			t.Fatal(err)
		}
		for i := range count {
			h.await(1)
			src := rpingInfoAt(h.at(rpingRecv, rpingInfoLen))
			h.recv(2, rpingRecv, rpingInfoLen)
			h.post(verbs.SendWR{ID: 3, Opcode: verbs.OpRead, SGs: h.sge(rpingStart, int(src.size)), RemoteAddr: src.addr, RKey: src.key})
			h.finish(verbs.WCRead)
			if want := fmt.Sprintf("rdma-ping-%d: ", i); !bytes.HasPrefix(h.at(rpingStart, 40), []byte(want)) {
				t.Fatalf("the guest's ping %d is %q", i, h.at(rpingStart, 40))
			}
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: h.sge(rpingSend, rpingInfoLen)})
			h.await(1)
			sink := rpingInfoAt(h.at(rpingRecv, rpingInfoLen))
			h.recv(2, rpingRecv, rpingInfoLen)
			h.post(verbs.SendWR{ID: 4, Opcode: verbs.OpWrite, SGs: h.sge(rpingStart, int(sink.size)), RemoteAddr: sink.addr, RKey: sink.key})
			h.post(verbs.SendWR{ID: 1, Opcode: verbs.OpSend, SGs: h.sge(rpingSend, rpingInfoLen)})
		}
		if err := p.Wait(h.ctx); err != nil {
			t.Error(err)
		}
		select {
		case <-h.ep.Done():
		case <-h.ctx.Done():
			t.Error("no end of the connection")
		}
	})
}

// TestRXEPingpong connects to ibv_rc_pingpong without CM: QP numbers and PSNs go over a TCP connection.
func TestRXEPingpong(t *testing.T) {
	const (
		iters, size = 200, 5000
		tcpPort     = 18515
		msgLen      = len("0000:000000:000000:00000000000000000000000000000000") + 1
		psn         = 0x123456
	)
	g := guest(t, 4500)
	for _, mtu := range []verbs.MTU{verbs.MTU1024, verbs.MTU4096} {
		t.Run(fmt.Sprintf("mtu=%v", mtu), func(t *testing.T) {
			h := newHost(t, ipv4.host)
			p, err := g.Start("ibv_rc_pingpong", "-d", RXE, "-g", gidIndex(t, g, "0000:0000:0000:0000:0000:ffff:0a4d:0002"), "-m", mtu.String(), "-s", fmt.Sprint(size), "-n", fmt.Sprint(iters), "-p", fmt.Sprint(tcpPort), "-c")
			if err != nil {
				t.Fatal(err)
			}
			var c net.Conn
			for try := 0; ; try++ {
				if c, err = net.Dial("tcp", addrPort(ipv4.guest, tcpPort).String()); err == nil {
					break
				}
				if try == 50 {
					t.Fatalf("%v; %s", err, p.Stderr())
				}
				time.Sleep(100 * time.Millisecond)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(stepLimit))
			gid := [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 77, 14: 0, 15: 1}
			fmt.Fprintf(c, "%04x:%06x:%06x:%x\x00", 0, h.qp.Num(), psn, gid)
			buf := make([]byte, msgLen)
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Fatalf("%v; %s", err, p.Stderr())
			}
			f := strings.Split(strings.TrimRight(string(buf), "\x00"), ":")
			var qpn, peerPSN uint32
			fmt.Sscanf(f[1], "%x", &qpn)
			fmt.Sscanf(f[2], "%x", &peerPSN)
			peerGID, err := hex.DecodeString(f[3])
			if err != nil || !bytes.Equal(peerGID[12:], []byte{10, 77, 0, 2}) {
				t.Fatalf("the guest's GID is %s", f[3])
			}
			h.connectByHand(ipv4.guest, mtu, qpn, peerPSN, psn, 1)
			h.recv(2, offB, size)
			if _, err := c.Write([]byte("done\x00")); err != nil {
				t.Fatal(err)
			}
			for i := range iters {
				// The tool's -c wants each page to begin with zero.
				h.post(verbs.SendWR{ID: uint64(i), Opcode: verbs.OpSend, SGs: h.sge(offA, size)})
				h.await(1)
				h.recv(2, offB, size)
			}
			ctx := h.ctx
			if err := p.Wait(ctx); err != nil {
				t.Error(err)
			}
			if out := p.Output(); strings.Contains(out, "invalid") || !strings.Contains(out, fmt.Sprintf("%d iters", iters)) {
				t.Error(out)
			}
		})
	}
}

// gidIndex finds a GID in the table of the guest's device.
func gidIndex(t testing.TB, g *Guest, gid string) string {
	t.Helper()
	return strings.TrimSpace(g.Run(t, "sh", "-c", "cd /sys/class/infiniband/"+RXE+"/ports/1/gids && grep -l "+gid+" * 2>/dev/null"))
}
