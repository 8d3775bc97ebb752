package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/rds"
)

// The options of "rds-stress -s 10.0.0.2 -r 10.0.0.1 -q 2048 -a 100 -d 4 -t 3 -T 20 -v", written by hand from the table of
// rds-protocol spec 7.2, in both forms.
const (
	stressShortHex = "00000004" + "00000800" + "00000064" + "00000000" + "0a000002" + "0a000001" + "0fa0" + "0003" + "00000014" +
		"00" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "00" + "00" + "00" + "00000001" + "00000000" + "00000000"
	stressFullPrefix = "322e302e37" + "0000000000000000000000"
)

func TestStressOptions(t *testing.T) {
	o := defaultStressOptions()
	o.SendAddr, o.RecvAddr = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.1")
	o.ReqSize, o.AckSize, o.Depth, o.Tasks, o.RunTime, o.Verify = 2048, 100, 4, 3, 20, true
	if got := hex.EncodeToString(o.encode()); got != stressShortHex {
		t.Errorf("short form:\n%s, want\n%s", got, stressShortHex)
	}
	o.TOS = 7
	want := stressFullPrefix + stressShortHex + "07" + "00"
	if got := hex.EncodeToString(o.encode()); got != want {
		t.Errorf("full form:\n%s, want\n%s", got, want)
	}
	for _, tos := range []uint8{0, 7} {
		o.TOS = tos
		got, err := readStressOptions(bytes.NewReader(append(o.encode(), "what follows"...)))
		if err != nil || got != o {
			t.Errorf("TOS %d: %+v, %v, want %+v", tos, got, err, o)
		}
	}
	// What nobody gave is all ones.
	got, err := readStressOptions(bytes.NewReader(bytes.Repeat([]byte{0xff}, stressShortLen)))
	if err != nil || got.Depth != 1 || got.ReqSize != 1024 || got.AckSize != 63 || got.Port != 4000 || got.Tasks != 1 || got.RunTime != 0 || got.Verify || got.Segments != 1 || got.validate() != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range stressShortLen {
		if _, err := readStressOptions(bytes.NewReader(o.encode()[:n])); err == nil {
			t.Errorf("%d bytes are taken for options", n)
		}
	}
	for _, bad := range []func(*stressOptions){
		func(o *stressOptions) { o.ReqSize = 62 }, func(o *stressOptions) { o.ReqSize = 1<<20 + 1 }, func(o *stressOptions) { o.AckSize = 0 }, func(o *stressOptions) { o.Depth = 0 },
		func(o *stressOptions) { o.Depth = 1 << 20 }, func(o *stressOptions) { o.Tasks = 0 }, func(o *stressOptions) { o.Port = 65535 }, func(o *stressOptions) { o.Segments = 0 },
		func(o *stressOptions) { o.RDMASize, o.Segments = 1<<20, 2 }, func(o *stressOptions) { o.RWMode = 3 }, func(o *stressOptions) { o.Alignment = 4096 },
	} {
		o := defaultStressOptions()
		bad(&o)
		if o.validate() == nil {
			t.Errorf("%+v is valid", o)
		}
	}
}

func FuzzStressOptions(f *testing.F) {
	b, _ := hex.DecodeString(stressFullPrefix + stressShortHex + "0700")
	f.Add(b)
	f.Add(b[16:75])
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := readStressOptions(bytes.NewReader(b))
		if err != nil || o.validate() != nil {
			return
		}
		again, err := readStressOptions(bytes.NewReader(o.encode()))
		if err != nil || again != o {
			t.Errorf("%+v becomes %+v, %v", o, again, err)
		}
	})
}

// A header by the table of rds-protocol spec 7.3.
func TestStressHeader(t *testing.T) {
	h := stressHeader{Seq: 0x01020304, From: netip.MustParseAddrPort("10.0.0.1:4001"), To: netip.MustParseAddrPort("10.0.0.2:4002"), Index: 0x0506, Op: stressAck,
		RDMAOp: stressRDMAWrite, RDMAAddr: 0x1112131415161718, Pattern: 0x2122232425262728, RDMAKey: 0x3132333435363738, RDMASize: 0x41424344, RDMASegment: 0x51525354, Retry: 9}
	b := bytes.Repeat([]byte{0xee}, 70)
	h.put(b)
	want := "01020304" + "0a000001" + "0a000002" + "0fa1" + "0fa2" + "0506" + "02" + "02" + "1112131415161718" + "0000000000000000" + "2122232425262728" +
		"3132333435363738" + "41424344" + "51525354" + "09" + "0000" + "eeeeeeeeeeeeee"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("%s, want\n%s", got, want)
	}
	if got, err := parseStressHeader(b); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseStressHeader(b[:62]); err == nil {
		t.Error("62 bytes are no header")
	}
}

func TestStressPattern(t *testing.T) {
	b := stressPattern(600)
	k := uint32(11)
	for i, c := range b {
		if c != byte(k) {
			t.Fatalf("byte %d is %#x, not %#x", i, c, byte(k))
		}
		k = 41*(k+3) + uint32(i>>8)
	}
	m := make([]byte, 64)
	fillRDMA(m, 42)
	if err := checkRDMA(m, 42); err != nil || binary.NativeEndian.Uint64(m[56:]) != 42 {
		t.Error(err)
	}
	m[60]++
	if checkRDMA(m, 42) == nil {
		t.Error("a wrong byte")
	}
}

// syncBuffer is output that a test reads while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func freeUDPPort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// stressPair runs both sides in this process, with seconds of 100 ms.
func stressPair(t *testing.T, change func(*stressOptions), also func(*stress)) (active, passive string) {
	t.Helper()
	port := freeUDPPort(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out [2]syncBuffer
	var errs [2]error
	var wg sync.WaitGroup
	for i, a := range []string{"127.0.0.51", "127.0.0.52"} {
		s := &stress{opt: defaultStressOptions(), rds: rdsOptions{Dialect: dialectOpen, Port: port}, stdout: &out[i],
			delay: 20 * time.Millisecond, burnIn: 40 * time.Millisecond, second: 100 * time.Millisecond}
		s.opt.RecvAddr = netip.MustParseAddr(a)
		s.opt.Port = 4300
		if i == 1 {
			s.opt.SendAddr = netip.MustParseAddr("127.0.0.51")
			s.opt.RunTime, s.opt.ConnectRetries, s.opt.Verify = 8, 50, true
			change(&s.opt)
		}
		if also != nil {
			also(s)
		}
		wg.Go(func() {
			if i == 0 {
				errs[i] = s.passive(ctx)
			} else {
				errs[i] = s.active(ctx)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Errorf("passive: %v; active: %v\n%s\n%s", errs[0], errs[1], out[0].String(), out[1].String())
	}
	return out[1].String(), out[0].String()
}

// average is the last line of the output: requests sent and received per second, KiB/s of messages, of RDMA in and out.
func average(t *testing.T, out string) (tx, rx int, kps, in, away float64) {
	t.Helper()
	m := regexp.MustCompile(`(?m)^ *(\d+) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +(-?[\d.]+)  \(average\)$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no average in:\n%s", out)
	}
	if _, err := fmt.Sscan(strings.Join(m[2:7], " "), &tx, &rx, &kps, &in, &away); err != nil {
		t.Fatal(err)
	}
	return
}

func TestStress(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*stressOptions)
	}{
		{"defaults", func(*stressOptions) {}},
		{"tasks and depth", func(o *stressOptions) { o.Tasks, o.Depth, o.ReqSize, o.AckSize = 3, 8, 4096, 300 }},
		{"type of service", func(o *stressOptions) { o.TOS = 5 }},
		{"large", func(o *stressOptions) { o.ReqSize, o.AckSize, o.Depth = 1<<20, 100000, 2 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			active, passive := stressPair(t, c.change, nil)
			for _, out := range []string{active, passive} {
				if tx, rx, kps, in, away := average(t, out); tx == 0 || rx == 0 || kps == 0 || in != 0 || away != 0 {
					t.Errorf("nothing happened:\n%s", out)
				}
			}
			if n := strings.Count(active, "\n"); n < 9 || !strings.Contains(active, "tsks   tx/s   rx/s  tx+rx K/s    mbi K/s    mbo K/s tx us/c   rtt us cpu %\n") {
				t.Errorf("%d lines:\n%s", n, active)
			}
		})
	}
}

func TestStressOneWay(t *testing.T) {
	active, passive := stressPair(t, func(o *stressOptions) { o.OneWay, o.Depth = true, 4 }, nil)
	if tx, rx, _, _, _ := average(t, active); tx == 0 || rx != 0 {
		t.Errorf("active: %d sent, %d received", tx, rx)
	}
	if tx, rx, _, _, _ := average(t, passive); tx != 0 || rx == 0 {
		t.Errorf("passive: %d sent, %d received", tx, rx)
	}
}

func TestStressRDMA(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*stressOptions)
	}{
		{"in turn", func(o *stressOptions) {}},
		{"reads", func(o *stressOptions) { o.RWMode = 1 }},
		{"writes, several segments", func(o *stressOptions) { o.RWMode, o.RDMASize, o.Segments, o.Alignment = 2, 8192, 12, 100 }},
		{"use once", func(o *stressOptions) { o.UseOnce = true }},
		{"for the destination, kept", func(o *stressOptions) { o.UseGetMR, o.CacheMRs = true, true }},
	} {
		t.Run(c.name, func(t *testing.T) {
			active, passive := stressPair(t, func(o *stressOptions) {
				o.RDMASize, o.Depth, o.Tasks = 64<<10, 4, 2
				c.change(o)
			}, nil)
			for _, out := range []string{active, passive} {
				if _, _, _, in, away := average(t, out); in == 0 || away == 0 {
					t.Errorf("no RDMA:\n%s", out)
				}
			}
		})
	}
}

// -z prints one line; :: lines have as many fields as their header; a histogram counts every round trip.
func TestStressOutput(t *testing.T) {
	active, _ := stressPair(t, func(o *stressOptions) { o.ShowPerfdata, o.ShowParams = true, true }, func(s *stress) { s.cpu, s.hist, s.outliers = true, true, time.Nanosecond })
	var fields []int
	for line := range strings.Lines(active) {
		if strings.HasPrefix(line, "::") {
			fields = append(fields, strings.Count(line, ","))
		}
	}
	if len(fields) < 3 {
		t.Fatalf("no performance data:\n%s", active)
	}
	for _, n := range fields {
		if n != fields[0] || n < 50 {
			t.Errorf("fields: %v", fields)
			break
		}
	}
	if !strings.Contains(active, "RTT histogram") || !strings.Contains(active, "Found RTT = ") || !strings.Contains(active, "Parameters:") || strings.Contains(active, "-1.00") {
		t.Errorf("%s", active)
	}
	active, _ = stressPair(t, func(o *stressOptions) { o.SummaryOnly = true }, nil)
	if i := strings.Index(active, "cpu %\n"); strings.Count(active[i:], "\n") != 2 {
		t.Errorf("%s", active)
	}
}

// A peer that talks nonsense ends the test with an error that says what.
func TestStressBadPeer(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.53:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	for _, c := range []struct {
		name string
		send []byte
		want string
	}{
		{"nothing", nil, "EOF"},
		{"half", bytes.Repeat([]byte{1}, 30), "EOF"},
		{"zeros", make([]byte, stressShortLen), "depth 0"},
		{"no go", (&stressOptions{Depth: 1, ReqSize: 100, AckSize: 100, Port: 4400, Tasks: 1, Segments: 1,
			SendAddr: netip.MustParseAddr("127.0.0.53"), RecvAddr: netip.MustParseAddr("127.0.0.54")}).encode(), "control connection"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &stress{opt: defaultStressOptions(), rds: rdsOptions{Dialect: dialectOpen, Port: freeUDPPort(t)}, stdout: new(syncBuffer), second: time.Millisecond}
			s.opt.RecvAddr, s.opt.Port = netip.MustParseAddr("127.0.0.53"), port
			done := make(chan error)
			go func() { done <- s.passive(t.Context()) }()
			var conn net.Conn
			for range 1000 {
				if conn, err = net.Dial("tcp4", fmt.Sprintf("127.0.0.53:%d", port)); err == nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(c.send); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if err := <-done; err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// A datagram that breaks the protocol is refused with a reason.
func TestStressBadDatagram(t *testing.T) {
	svc, err := rds.Open(rds.Config{UDPPort: freeUDPPort(t), Linger: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer svc.Close() // abandons the ack
	o := defaultStressOptions()
	o.RecvAddr, o.SendAddr, o.Depth = netip.MustParseAddr("127.0.0.55"), netip.MustParseAddr("127.0.0.56"), 4
	var wg sync.WaitGroup
	defer wg.Wait()
	task, err := newStressTask(t.Context(), ownHost{svc}, &o, 0, false, &wg, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	defer task.stop()
	task.active = false
	from, to := task.peers[0].addr, task.sock.AddrPort()
	put := func(h stressHeader, n int) []byte {
		b := make([]byte, max(n, stressHdrLen))
		h.put(b)
		return b[:n]
	}
	if err := task.received(put(stressHeader{From: from, To: to, Op: stressReq}, 1024), from, 0); err != nil {
		t.Fatal(err)
	}
	next := stressHeader{From: from, To: to, Op: stressReq, Seq: 1, Index: 1}
	with := func(f func(*stressHeader)) []byte {
		h := next
		f(&h)
		return put(h, 1024)
	}
	stranger := netip.AddrPortFrom(from.Addr(), 9)
	for _, c := range []struct {
		name, want string
		b          []byte
		from       netip.AddrPort
	}{
		{"short", "40 bytes", put(next, 40), from},
		{"wrong size", "1000 bytes", put(next, 1000), from},
		{"stranger", "no task", put(next, 1024), stranger},
		{"wrong sequence", "bogus", with(func(h *stressHeader) { h.Seq = 5 }), from},
		{"wrong index", "bogus", with(func(h *stressHeader) { h.Index = 3 }), from},
		{"wrong destination", "bogus", with(func(h *stressHeader) { h.To = from }), from},
		{"wrong source", "bogus", with(func(h *stressHeader) { h.From = to }), from},
		{"unknown operation", "operation 3", with(func(h *stressHeader) { h.Op = 3 }), from},
		{"ack for nothing", "for nothing", with(func(h *stressHeader) { h.Op = stressAck }), from},
	} {
		if err := task.received(c.b, c.from, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := task.received(with(func(h *stressHeader) { h.RDMAOp = 1 }), from, 0); err == nil || !strings.Contains(err.Error(), "RDMA") {
		t.Errorf("RDMA without a key: %v", err)
	}
}

// Without the kernel's modules --kernel says which they are.
func TestStressNoKernel(t *testing.T) {
	h, err := openKernelRDS()
	if err == nil {
		h.Close()
		t.Skip("this kernel has RDS; the lab tests it")
	}
	if !strings.Contains(err.Error(), "kernel's RDS") {
		t.Errorf("%v", err)
	}
}
