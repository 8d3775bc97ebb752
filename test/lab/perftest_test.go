//go:build lab && linux

package lab

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// perftest's side channel is a TCP connection to port 18515 on which both sides say the same, the client first (read off
// captures of version 4.5):
//
//	16  version, text       4  cycle buffer       4  cache line       2  path MTU, enum as text
//	108 keys: where the sender's QP and memory are; then, to keep in step, the same again and again
//	    ... the work is done ...
//	108 keys; one-sided bandwidth tools: five reports of 8, and keys once more
//	5   "done"
//
// ib_write_lat has nothing more to say when the work is done.
const (
	perfPort    = 18515
	perfIters   = 100
	perfKeysLen = 108
)

// perfTool is one of the tools, and what we do in its client's and its server's place.
type perfTool struct {
	name    string
	bytes   int // of a request
	steps   int // keys exchanged before the work
	reports bool
	verb    perfVerb
}

type perfVerb int

const (
	perfSend perfVerb = iota
	perfSendLat
	perfWrite
	perfWriteLat
	perfRead
	perfAtomic
)

var perfTools = []perfTool{
	{"ib_send_bw", 65536, 4, false, perfSend},
	{"ib_send_lat", 2, 4, false, perfSendLat},
	{"ib_write_bw", 65536, 3, true, perfWrite},
	{"ib_write_lat", 2, 4, false, perfWriteLat},
	{"ib_read_bw", 65536, 3, true, perfRead},
	{"ib_read_lat", 2, 4, false, perfRead},
	{"ib_atomic_bw", 8, 3, true, perfAtomic},
	{"ib_atomic_lat", 8, 4, false, perfAtomic},
}

// perfKeys is what a side says of itself.
type perfKeys struct {
	lid, reads, qpn, psn, rkey uint32
	addr                       uint64
	gid                        [16]byte
}

func (k *perfKeys) bytes() []byte {
	b := fmt.Appendf(nil, "%04x:%04x:%06x:%06x:%08x:%016x:", k.lid, k.reads, k.qpn, k.psn, k.rkey, k.addr)
	for _, g := range k.gid {
		b = fmt.Appendf(b, "%02x:", g)
	}
	return append(fmt.Appendf(b, "%08x:", 0), 0)
}

func (k *perfKeys) parse(b []byte) error {
	f := strings.Split(strings.TrimRight(string(b), "\x00"), ":")
	if len(f) < 23 {
		return fmt.Errorf("keys %q", b)
	}
	var n [22]uint64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseUint(f[i], 16, 64); err != nil {
			return fmt.Errorf("keys %q: %w", b, err)
		}
	}
	k.lid, k.reads, k.qpn, k.psn, k.rkey, k.addr = uint32(n[0]), uint32(n[1]), uint32(n[2]), uint32(n[3]), uint32(n[4]), n[5]
	for i := range k.gid {
		k.gid[i] = byte(n[6+i])
	}
	return nil
}

// perfPeer speaks the side channel.
type perfPeer struct {
	t      testing.TB
	c      net.Conn
	client bool
	ours   perfKeys
}

// swap says b and returns what the other side says, which is as long; b as the server may be nil, for an echo.
func (p *perfPeer) swap(b []byte, n int) []byte {
	p.t.Helper()
	got := make([]byte, n)
	say := func(b []byte) {
		if _, err := p.c.Write(b); err != nil {
			p.t.Fatal(err)
		}
	}
	if p.client {
		say(b)
	}
	if _, err := io.ReadFull(p.c, got); err != nil {
		p.t.Fatalf("side channel: %v", err)
	}
	if !p.client {
		if b == nil {
			b = got
		}
		say(b)
	}
	return got
}

// hello is all before the keys.
func (p *perfPeer) hello(mtu verbs.MTU) {
	p.t.Helper()
	version := make([]byte, 16)
	if p.client {
		out, err := exec.Command("ib_send_bw", "-V").CombinedOutput() // status 10 and "Version: 6.06"
		_, v, ok := strings.Cut(string(out), "Version: ")
		if !ok {
			p.t.Fatalf("ib_send_bw -V says %q (%v)", out, err)
		}
		copy(version, strings.TrimSpace(v))
		p.swap(version, 16)
	} else {
		p.swap(nil, 16)
	}
	p.swap(binary.BigEndian.AppendUint32(nil, 4096), 4)
	p.swap(binary.BigEndian.AppendUint32(nil, 64), 4)
	if got := p.swap([]byte{'0' + byte(mtu), 0}, 2); got[0] != '0'+byte(mtu) {
		p.t.Errorf("the tool's path MTU is %q, ours %v", got, mtu)
	}
}

func (p *perfPeer) keys() (k perfKeys) {
	p.t.Helper()
	if err := k.parse(p.swap(p.ours.bytes(), perfKeysLen)); err != nil {
		p.t.Fatal(err)
	}
	return k
}

// bye is all behind the work.
func (p *perfPeer) bye(reports bool) {
	p.t.Helper()
	p.keys()
	if reports {
		for range 5 {
			p.swap(make([]byte, 8), 8)
		}
		p.keys()
	}
	if got := p.swap([]byte("done\x00"), 5); !bytes.Equal(got, []byte("done\x00")) {
		p.t.Errorf("the tool ends with %q", got)
	}
}

// connectByHand takes the QP to RTS without CM.
func (h *hostEnd) connectByHand(remote string, mtu verbs.MTU, qpn, rqPSN, sqPSN uint32, reads uint8) {
	h.t.Helper()
	must := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	access := verbs.AccessRemoteWrite | verbs.AccessRemoteRead | verbs.AccessRemoteAtomic
	must(h.qp.Modify(verbs.QPAttr{State: verbs.StateInit, Port: 1, Access: access}, verbs.QPStateBit|verbs.QPPKeyIndexBit|verbs.QPPortBit|verbs.QPAccessBit))
	must(h.qp.Modify(verbs.QPAttr{State: verbs.StateRTR, AH: verbs.AH{Remote: addrPort(remote, 0).Addr()}, PathMTU: mtu, DestQPN: verbs.QPN(qpn), RQPSN: rqPSN, MaxDestRDAtomic: reads, MinRNRTimer: 12},
		verbs.QPStateBit|verbs.QPAHBit|verbs.QPPathMTUBit|verbs.QPDestQPNBit|verbs.QPRQPSNBit|verbs.QPMaxDestRDAtomicBit|verbs.QPMinRNRTimerBit))
	must(h.qp.Modify(verbs.QPAttr{State: verbs.StateRTS, Timeout: 14, RetryCount: 7, RNRRetry: 7, SQPSN: sqPSN, MaxRDAtomic: reads},
		verbs.QPStateBit|verbs.QPTimeoutBit|verbs.QPRetryCountBit|verbs.QPRNRRetryBit|verbs.QPSQPSNBit|verbs.QPMaxRDAtomicBit))
}

// Places in our region: what perftest's peer reads, writes and receives; and what we send from.
const (
	perfTarget, perfSource = 0, 4 << 20
	perfRecvs              = 32
	perfReads              = 16
)

// issue posts n requests, some at a time, and waits for all of them.
func (h *hostEnd) issue(n int, wr verbs.SendWR) {
	h.t.Helper()
	for posted, done := 0, 0; done < n; done++ {
		for ; posted < n && posted-done < perfRecvs; posted++ {
			wr.ID = uint64(posted)
			h.post(wr)
		}
		if wc := h.poll(); wc.Err() != nil {
			h.t.Fatalf("request %d of %d: %v", done, n, wc.Err())
		}
	}
}

// lastByte waits until the last byte of our target is v.
func (h *hostEnd) lastByte(n int, v byte) {
	h.t.Helper()
	for end := time.Now().Add(stepLimit); h.at(perfTarget, n)[n-1] != v; time.Sleep(20 * time.Microsecond) {
		if time.Now().After(end) {
			h.t.Fatalf("the tool's WRITE number %d does not arrive", v)
		}
	}
}

// work is our part of the measurement.
func (tool *perfTool) work(h *hostEnd, client bool, peer *perfKeys) {
	h.t.Helper()
	wr := verbs.SendWR{SGs: h.sge(perfSource, tool.bytes), RemoteAddr: peer.addr, RKey: verbs.RKey(peer.rkey)}
	switch tool.verb {
	case perfSend:
		wr.Opcode = verbs.OpSend
		if client {
			h.issue(perfIters, wr)
			return
		}
		for i := range perfIters {
			wc := h.poll()
			if wc.Err() != nil || int(wc.ByteLen) != tool.bytes {
				h.t.Fatalf("SEND %d of the tool: %+v", i, wc)
			}
			h.recv(wc.ID, perfTarget+int(wc.ID)*65536, 65536)
		}
	case perfSendLat:
		wr.Opcode = verbs.OpSend
		for range perfIters {
			if client {
				h.post(wr)
			}
			h.await(1)
			h.recv(0, perfTarget, 65536)
			if !client {
				h.post(wr)
			}
		}
		if !client {
			h.finish(verbs.WCSend)
		}
	case perfWrite, perfRead, perfAtomic:
		if !client {
			return // the tool works, our device serves
		}
		switch tool.verb {
		case perfWrite:
			wr.Opcode = verbs.OpWrite
		case perfRead:
			wr.Opcode = verbs.OpRead
		case perfAtomic:
			wr.Opcode, wr.CompareAdd = verbs.OpFetchAdd, 1
		}
		h.issue(perfIters, wr)
	case perfWriteLat:
		// Each WRITE's last byte is its number, and the other side looks for it in its memory. The server begins.
		wr.Opcode = verbs.OpWrite
		for i := range perfIters {
			if client {
				h.lastByte(tool.bytes, byte(i+1))
			}
			h.at(perfSource, tool.bytes)[tool.bytes-1] = byte(i + 1)
			h.post(wr)
			h.finish(verbs.WCWrite)
			if !client {
				h.lastByte(tool.bytes, byte(i+1))
			}
		}
	}
}

// TestRXEPerftest plays both parts of each of perftest's tools against the real one.
func TestRXEPerftest(t *testing.T) {
	for _, tool := range perfTools {
		for _, client := range []bool{true, false} {
			role := "guest serves"
			if !client {
				role = "guest calls"
			}
			t.Run(tool.name+"/"+role, func(t *testing.T) {
				g := guest(t, 4500)
				h := newHost(t, ipv4.host)
				wantLossFree(t, g, h.dev)
				argv := []string{tool.name, "-d", RXE, "-x", gidIndex(t, g, "0000:0000:0000:0000:0000:ffff:0a4d:0002"), "-n", fmt.Sprint(perfIters), "-s", fmt.Sprint(tool.bytes), "-F"}
				if tool.verb == perfAtomic {
					argv = append(argv[:len(argv)-3], "-F") // has one size
				}
				var c net.Conn
				var p *Process
				var err error
				if client {
					if p, err = g.Start(argv...); err != nil {
						t.Fatal(err)
					}
					for try := 0; ; try++ { // until it listens
						if c, err = net.Dial("tcp", addrPort(ipv4.guest, perfPort).String()); err == nil {
							break
						}
						if try == 100 {
							t.Fatalf("%v; %s", err, p.Stderr())
						}
						time.Sleep(50 * time.Millisecond)
					}
				} else {
					l, err := net.Listen("tcp", addrPort(ipv4.host, perfPort).String())
					if err != nil {
						t.Fatal(err)
					}
					defer l.Close()
					if p, err = g.Start(append(argv, ipv4.host)...); err != nil {
						t.Fatal(err)
					}
					_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(stepLimit))
					if c, err = l.Accept(); err != nil {
						t.Fatalf("%v; %s", err, p.Stderr())
					}
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(2 * stepLimit))
				t.Cleanup(func() {
					if t.Failed() {
						t.Logf("%s: %s %s", tool.name, p.Output(), p.Stderr())
					}
				})

				pp := &perfPeer{t: t, c: c, client: client, ours: perfKeys{reads: perfReads, qpn: uint32(h.qp.Num()), psn: 0x123456,
					rkey: uint32(h.mr.RKey()), addr: hostIOVA + perfTarget, gid: addrPort(ipv4.host, 0).Addr().As16()}}
				pp.hello(verbs.MTU4096)
				peer := pp.keys()
				if peer.gid != addrPort(ipv4.guest, 0).Addr().As16() {
					t.Fatalf("the tool's GID is %x", peer.gid)
				}
				h.connectByHand(ipv4.guest, verbs.MTU4096, peer.qpn, peer.psn, pp.ours.psn, perfReads)
				for i := range perfRecvs {
					h.recv(uint64(i), perfTarget+i*65536, 65536)
				}
				for range tool.steps - 1 {
					pp.keys()
				}
				tool.work(h, client, &peer)
				if tool.verb != perfWriteLat {
					pp.bye(tool.reports)
				}
				if tool.verb == perfAtomic && !client {
					// One word in each cache line, in turn.
					var v uint64
					for off := 0; off < 4096; off += 64 {
						v += binary.NativeEndian.Uint64(h.at(perfTarget+off, 8))
					}
					if v != perfIters {
						t.Errorf("the words that the tool has added 1 to %d times sum up to %d", perfIters, v)
					}
				}
				if err := p.Wait(h.ctx); err != nil {
					t.Error(err)
				}
				// A client shows its figures; a server only some.
				if out := p.Output(); !client && !strings.Contains(out, fmt.Sprintf(" %d ", perfIters)) {
					t.Errorf("no line of figures: %s", out)
				}
			})
		}
	}
}
