package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

// The options of "rds-stress -s 10.0.0.2 -r 10.0.0.1 -q 2048 -a 100 -d 4 -t 3 -T 20 -v", written by hand from the table of
// rds-protocol spec 7.2, in both forms.
const (
	stressShortHex = "00000004" + "00000800" + "00000064" + "00000000" + "0a000002" + "0a000001" + "0fa0" + "0003" + "00000014" +
		"00" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "00" + "00" + "00" + "00000001" + "00000000" + "00000000"
	stressFullPrefix = "322e302e37" + "0000000000000000000000"
	// The same over IPv6 with -a 200, from fd00::1 to fd00::2: the version, the old form with addresses that mean nothing, tos, async, addresses, scope.
	stressIPv6Hex = stressFullPrefix + "00000004" + "00000800" + "000000c8" + "00000000" + "00000000" + "00000000" + "0fa0" + "0003" + "00000014" +
		"00" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "00" + "00" + "00" + "00000001" + "00000000" + "00000000" +
		"00" + "00" + "fd000000000000000000000000000002" + "fd000000000000000000000000000001" + "00000000"
)

func TestStressOptions(t *testing.T) {
	o := defaultStressOptions()
	o.SendAddr, o.RecvAddr = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.1")
	o.ReqSize, o.AckSize, o.Depth, o.Tasks, o.RunTime, o.Verify = 2048, 100, 4, 3, 20, true
	six := o
	six.SendAddr, six.RecvAddr, six.AckSize = netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::1"), 200
	tos, async := o, o
	tos.TOS, async.Async = 7, true
	for _, c := range []struct {
		name, version, want string
		o                   stressOptions
	}{
		{"short", stressVersion, stressShortHex, o},
		{"short, whatever the version", "2.3.1", stressShortHex, o},
		{"full", stressVersion, stressFullPrefix + stressShortHex + "07" + "00", tos},
		{"full, asynchronous", stressVersion, stressFullPrefix + stressShortHex + "00" + "01", async},
		{"full, for another release", "2.10.14", "322e31302e3134" + "000000000000000000" + stressShortHex + "07" + "00", tos},
		{"IPv6", stressVersion, stressIPv6Hex, six},
	} {
		b := c.o.encode(c.version)
		if got := hex.EncodeToString(b); got != c.want {
			t.Errorf("%s:\n%s, want\n%s", c.name, got, c.want)
		}
		// What a peer says is understood whatever its release, and no byte more than it is read.
		r := bytes.NewReader(append(b, "what follows"...))
		got, err := readStressOptions(r, c.o.six())
		if err != nil || got != c.o || r.Len() != len("what follows") {
			t.Errorf("%s: %+v, %v, want %+v; %d bytes left", c.name, got, err, c.o, r.Len())
		}
		for n := range len(b) {
			if _, err := readStressOptions(bytes.NewReader(b[:n]), c.o.six()); err == nil {
				t.Errorf("%s: %d bytes are taken for options", c.name, n)
			}
		}
	}
	// A mark behind the version disturbs nobody: this peer would like to say it in JSON, too.
	b := tos.encode(stressVersion)
	copy(b[8:], "json")
	if got, err := readStressOptions(bytes.NewReader(b), false); err != nil || got != tos {
		t.Errorf("%+v, %v, want %+v", got, err, tos)
	}
	// The scope is a number of the sender's; its own addresses tell the other side what it needs.
	six.SendAddr, six.RecvAddr = netip.MustParseAddr("fe80::2%77777"), netip.MustParseAddr("fe80::1%77777")
	b = six.encode(stressVersion)
	if got := hex.EncodeToString(b[77:]); got != "fe800000000000000000000000000002"+"fe800000000000000000000000000001"+"00012fd1" {
		t.Errorf("link-local addresses: %s", got)
	}
	if got, err := readStressOptions(bytes.NewReader(b), true); err != nil || got.SendAddr != netip.MustParseAddr("fe80::2") || got.validate() == nil {
		t.Errorf("link-local addresses without a zone: %+v, %v, %v", got, err, got.validate())
	}
	if _, err := readStressOptions(bytes.NewReader(make([]byte, 200)), true); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("options without a version over IPv6: %v", err)
	}
	// What nobody gave is all ones.
	ones := bytes.Repeat([]byte{0xff}, stressFullLen6)
	copy(ones, b[:stressVersionLen])
	for _, c := range []struct {
		six bool
		b   []byte
		ack uint32
	}{{false, ones[stressFullLen6-stressShortLen:], 63}, {true, ones, 96}} {
		got, err := readStressOptions(bytes.NewReader(c.b), c.six)
		if err != nil || got.Depth != 1 || got.ReqSize != 1024 || got.AckSize != c.ack || got.Port != 4000 || got.Tasks != 1 || got.RunTime != 0 || got.Verify || got.Segments != 1 {
			t.Errorf("%+v, %v", got, err)
		}
		got.SendAddr, got.RecvAddr = o.SendAddr, o.RecvAddr
		if err := got.validate(); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []func(*stressOptions){
		func(o *stressOptions) { o.ReqSize = 62 }, func(o *stressOptions) { o.ReqSize = 1<<20 + 1 }, func(o *stressOptions) { o.AckSize = 0 }, func(o *stressOptions) { o.Depth = 0 },
		func(o *stressOptions) { o.Depth = 1 << 20 }, func(o *stressOptions) { o.Tasks = 0 }, func(o *stressOptions) { o.Port = 65535 }, func(o *stressOptions) { o.Segments = 0 },
		func(o *stressOptions) { o.RDMASize, o.Segments = 1<<20, 2 }, func(o *stressOptions) { o.RWMode = 3 }, func(o *stressOptions) { o.Alignment = 4096 },
		func(o *stressOptions) { o.CacheMRs, o.UseOnce = true, true },
		func(o *stressOptions) { o.SendAddr, o.AckSize = six.SendAddr, 96 }, // and an IPv4 address here
		func(o *stressOptions) { o.SendAddr, o.RecvAddr, o.AckSize = six.SendAddr, six.RecvAddr, 95 },
		func(o *stressOptions) {
			o.SendAddr, o.RecvAddr, o.AckSize = netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::2%eth0"), 96
		},
		func(o *stressOptions) { o.SendAddr, o.AckSize = netip.MustParseAddr("::ffff:10.0.0.1"), 96 },
	} {
		o := o
		if err := o.validate(); err != nil {
			t.Fatal(err)
		}
		if bad(&o); o.validate() == nil {
			t.Errorf("%+v is valid", o)
		}
	}
}

func FuzzStressOptions(f *testing.F) {
	for _, s := range []string{stressFullPrefix + stressShortHex + "0700", stressShortHex, stressIPv6Hex} {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, s == stressIPv6Hex)
	}
	f.Fuzz(func(t *testing.T, b []byte, six bool) {
		o, err := readStressOptions(bytes.NewReader(b), six)
		if err != nil || o.validate() != nil {
			return
		}
		again, err := readStressOptions(bytes.NewReader(o.encode(stressVersion)), six)
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
	if got, err := parseStressHeader(b, false); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseStressHeader(b[:62], false); err == nil {
		t.Error("62 bytes are no header")
	}
	// Over IPv6 the addresses are zero, and others behind it.
	h.From, h.To = netip.MustParseAddrPort("[fd00::1]:4001"), netip.MustParseAddrPort("[fd00::2]:4002")
	b = bytes.Repeat([]byte{0xee}, 100)
	h.put(b)
	want = "01020304" + "00000000" + "00000000" + want[24:126] + "00" + "fd000000000000000000000000000001" + "fd000000000000000000000000000002" + "eeeeeeee"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("IPv6:\n%s, want\n%s", got, want)
	}
	if got, err := parseStressHeader(b, true); err != nil || got != h {
		t.Errorf("IPv6: %+v, %v", got, err)
	}
	if _, err := parseStressHeader(b[:95], true); err == nil {
		t.Error("95 bytes are no header over IPv6")
	}
	for _, i := range []int{4, 11} {
		b := bytes.Clone(b)
		b[i] = 1
		if _, err := parseStressHeader(b, true); err == nil {
			t.Errorf("IPv6: byte %d is not 0, and nobody minds", i)
		}
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
}

// What is moved is checked as far as the peer has filled it: the first segment or all.
func TestStressRDMAPattern(t *testing.T) {
	const pattern = 42<<32 | 4001
	for _, c := range []struct{ size, segments int }{{1, 1}, {7, 4}, {8, 1}, {13, 1}, {64, 1}, {100, 3}, {4096, 2}} {
		n := c.size * c.segments
		full := make([]byte, n)
		fillRDMA(full, pattern)
		first := bytes.Repeat([]byte{0x2f}, n)
		fillRDMA(first[:c.size], pattern)
		if err := errors.Join(checkRDMA(full, c.size, pattern), checkRDMA(first, c.size, pattern)); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		for i := range n / 8 * 8 {
			full[i]++
			if checkRDMA(full, c.size, pattern) == nil {
				t.Errorf("%+v: byte %d is wrong, and nobody minds", c, i)
			}
			full[i]--
			first[i]++
			if err := checkRDMA(first, c.size, pattern); (err == nil) != (i >= c.size/8*8) {
				t.Errorf("%+v: the first segment is filled, and byte %d is wrong: %v", c, i, err)
			}
			first[i]--
		}
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

// testStress is a side with seconds of 100 ms.
func testStress(t *testing.T, out io.Writer) *stress {
	s := newStress(out)
	s.burnIn, s.second = 60*time.Millisecond, 100*time.Millisecond
	s.rds.Port = freeUDPPort(t)
	return s
}

// stressPair runs both sides in this process.
func stressPair(t *testing.T, change func(*stressOptions), also func(*stress)) (active, passive string) {
	t.Helper()
	return stressBetween(t, "127.0.0.52", "127.0.0.51", change, also)
}

// stressBetween is stressPair with those addresses of the active and the passive side.
func stressBetween(t *testing.T, active, passive string, change func(*stressOptions), also func(*stress)) (string, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out [2]syncBuffer
	var errs [2]error
	var wg sync.WaitGroup
	port := freeUDPPort(t)
	for i, a := range []string{passive, active} {
		s := testStress(t, &out[i])
		s.rds.Port, s.opt.Port = port, 4300
		s.opt.RecvAddr = netip.MustParseAddr(a)
		if i == 1 {
			s.opt.SendAddr = netip.MustParseAddr(passive)
			s.opt.RunTime, s.opt.ConnectRetries, s.opt.Verify = 8, 50, true
			change(&s.opt)
		}
		if also != nil {
			also(s)
		}
		s.opt.settle()
		if err := s.opt.validate(); err != nil {
			t.Fatal(err)
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
		{"no fence", func(o *stressOptions) { o.UseFence = false }},
		{"no fence, reads, used once", func(o *stressOptions) { o.UseFence, o.UseOnce, o.RWMode = false, true, 1 }},
		{"odd sizes", func(o *stressOptions) { o.RDMASize, o.Segments = 1001, 3 }},
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

// What a program that reads rds-stress's output looks for.
func TestStressOutput(t *testing.T) {
	active, passive := stressPair(t, func(o *stressOptions) { o.ShowParams = true }, func(s *stress) { s.cpu, s.hist, s.outliers = true, true, stressMicros(time.Nanosecond) })
	for _, c := range []struct{ name, out, want string }{
		{"parameters", active, `^Options:\n  Tasks      1      \n  Req size   1024   \n  ACK size   63     \n  RDMA size  0      \n  RDMA opts  use_fence\n\nconnecting to 127\.0\.0\.51:4300`},
		{"head", active, `\nnegotiated options, tasks will start in 0\.03 seconds\nStarting up\.\.`},
		{"table", active, `\ntsks   tx/s   rx/s  tx\+rx K/s    mbi K/s    mbo K/s tx us/c   rtt us cpu %\n`},
		{"tail", active, `\n-{45}\n +1 +\d+ .* \d+\.\d\d  \(average\)\n\nRTT histogram\n`},
		{"outliers", active, `\nFound RTT = \d+\.\d\d us to 127\.0\.0\.51:4301\n`},
		{"passive", passive, `^waiting for incoming connection on 127\.0\.0\.51:4300\naccepted connection from 127\.0\.0\.52:\d+\nnegotiated options, `},
	} {
		if !regexp.MustCompile(c.want).MatchString(c.out) {
			t.Errorf("%s: no %s in\n%s", c.name, c.want, c.out)
		}
	}
	_, rows, _ := strings.Cut(active, "\nRTT histogram\nRTT (us)        \t\t    Count\n")
	row := regexp.MustCompile(`^\[ *(\d+) - +(\d+)\] \t\t +(\d+) \t\t \(([\d.]+)%\)$`)
	sum, n := 0.0, 0
	for line := range strings.Lines(rows) {
		m := row.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			t.Fatalf("%q", line)
		}
		from, _ := strconv.Atoi(m[1])
		to, _ := strconv.Atoi(m[2])
		percent, _ := strconv.ParseFloat(m[4], 64)
		if from != 1<<n || to != 2<<n {
			t.Errorf("bucket %d: %s", n, line)
		}
		sum += percent
		n++
	}
	if n != 16 || sum < 99.8 || sum > 100.2 {
		t.Errorf("%d buckets of %.2f%%:\n%s", n, sum, rows)
	}
	active, _ = stressPair(t, func(o *stressOptions) { o.SummaryOnly = true }, nil)
	if i := strings.Index(active, "cpu %\n"); strings.Count(active[i:], "\n") != 2 {
		t.Errorf("%s", active)
	}
}

// Lines for programs stand in place of the table, on both sides, each with as many fields as their header.
func TestStressPerfdata(t *testing.T) {
	const begin = "::nr_tasks:count,req_size:bytes,ack_size:bytes,rdma_size:bytes,req_sent:count,thruput:kB/s,thruput_mbi:kB/s,thruput_mbo:kB/s,tx_delay:microseconds,rtt:microseconds,cpu:percent,"
	_, hasTimes := readSystemTimes()
	active, passive := stressPair(t, func(o *stressOptions) { o.ShowPerfdata, o.Tasks = true, 2 }, nil)
	for _, out := range []string{active, passive} {
		if strings.Contains(out, "tsks") || !strings.HasSuffix(out, "  (average)\n") {
			t.Errorf("%s", out)
		}
		var header []string
		lines, busy := 0, 0
		for line := range strings.Lines(out) {
			line, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "::")
			if !ok {
				continue
			}
			fields := strings.Split(line, ",")
			if header == nil {
				if header = fields; !strings.HasPrefix("::"+line, begin) || strings.HasSuffix(line, ",user:percent,system:percent,idle:percent,irq:percent,intr:count") != hasTimes {
					t.Fatalf("header: %s", line)
				}
				for _, f := range fields[11:] {
					if name, unit, _ := strings.Cut(f, ":"); strings.Contains(name, "_bytes") != (unit == "bytes") {
						t.Errorf("unit of %s", f)
					}
				}
				continue
			}
			lines++
			if len(fields) != len(header) {
				t.Fatalf("%d fields, %d names", len(fields), len(header))
			}
			value := make(map[string]float64)
			for i, f := range fields {
				whole := i < 5 || header[i] == "intr:count"
				if whole == strings.Contains(f, ".") {
					t.Errorf("%s is %s", header[i], f)
				}
				v, err := strconv.ParseFloat(f, 64)
				if err != nil || math.Abs(v) > 1e15 {
					t.Errorf("%s is %s", header[i], f)
				}
				value[header[i]] = v
			}
			if fields[0] != "2" || fields[1] != "1024" || fields[2] != "63" || value["cpu:percent"] != 0 {
				t.Errorf("%s", line)
			}
			if value["req_sent:count"] > 0 && value["rtt:microseconds"] > 0 { // not in every second, when they are short and the machine is busy
				busy++
			}
			if all := value["user:percent"] + value["system:percent"] + value["idle:percent"] + value["irq:percent"]; all > 101 {
				t.Errorf("%.1f%% of the processors' time", all)
			}
		}
		if lines < 3 || busy == 0 {
			t.Errorf("%d lines, something happened in %d:\n%s", lines, busy, out)
		}
	}
}

// fallingHost has a counter that tells how much there is, and does not only grow.
type fallingHost struct {
	stressHost
	left uint64
}

func (h *fallingHost) counters() []rds.Counter {
	h.left -= 3
	return []rds.Counter{{Name: "queued_bytes", Value: h.left}}
}

func TestStressPerfdataFalls(t *testing.T) {
	var out syncBuffer
	s := newStress(&out)
	p := newPerfdata(&fallingHost{left: 100})
	p.hasTimes = false
	s.perfLine(p, stressCounts{}, 2*time.Second, 0)
	if want := ",-1.500000\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("%q", out.String())
	}
}

func TestStressSystemTimes(t *testing.T) {
	parse := func(s string) systemTimes {
		n, ok := parseSystemTimes([]byte(s))
		if !ok {
			t.Fatalf("%q", s)
		}
		return n
	}
	long := strings.Repeat(" 0", 4000)
	old := parse("cpu  100 20 30 400 50 6 7 8 1 1\ncpu0 1 1 1 1\nintr 1000 5" + long + "\nctxt 77\n")
	now := parse("cpu  180 40 80 420 60 10 13 18 9 9\ncpu0 1 1 1 1\nintr 1234 5" + long + "\nctxt 99\n")
	user, system, idle, irq, intr := now.since(old) // of 200 ticks
	if user != 50 || system != 25 || idle != 15 || irq != 5 || intr != 234 {
		t.Error(user, system, idle, irq, intr)
	}
	if user, system, idle, irq, intr = now.since(now); user+system+idle+irq != 0 || intr != 0 {
		t.Error("no time has passed")
	}
	if _, ok := parseSystemTimes([]byte("intr 5\ncpu0 1 2 3 4\n")); ok {
		t.Error("no line of all processors")
	}
}

func TestStressHistogram(t *testing.T) {
	for _, c := range []struct {
		us, bucket int
	}{{0, 0}, {1, 0}, {2, 1}, {3, 1}, {4, 2}, {1023, 9}, {1024, 10}, {32767, 14}, {32768, 15}, {65536, 15}, {1e9, 15}} {
		var h stressHistogram
		h.add(time.Duration(c.us) * time.Microsecond)
		if h[c.bucket] != 1 {
			t.Errorf("%d us: %v", c.us, h)
		}
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
			SendAddr: netip.MustParseAddr("127.0.0.53"), RecvAddr: netip.MustParseAddr("127.0.0.54")}).encode(stressVersion), "says itself why"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testStress(t, new(syncBuffer))
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
	o.settle()
	var wg sync.WaitGroup
	defer wg.Wait()
	task, err := newStressTask(t.Context(), ownHost{svc: svc}, &o, 0, false, &wg, func(err error) { t.Error(err) })
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
		{"repetition of what never came", "bogus", with(func(h *stressHeader) { h.Seq, h.Retry = 2, 1 }), from},
	} {
		if err := task.received(c.b, c.from, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Two that break nothing: what an asynchronous sender sends again, and a datagram of nothing beside a READ.
	for _, b := range [][]byte{put(stressHeader{From: from, To: to, Op: stressReq, Retry: 1}, 1024), {}} {
		if err := task.received(b, from, 0); err != nil {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
	if err := task.received(put(next, 1024), from, 0); err != nil || task.snapshot().ReqRx != 2 {
		t.Errorf("%d requests, %v", task.snapshot().ReqRx, err)
	}
	if err := task.received(put(stressHeader{From: from, To: to, Op: stressReq, Seq: 2, Index: 2, RDMAOp: stressRDMARead}, 1024), from, 0); err == nil || !strings.Contains(err.Error(), "RDMA") {
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
	// Known before anybody is waited for.
	var out syncBuffer
	s := newStress(&out)
	s.kernel, s.opt.SendAddr = true, netip.MustParseAddr("127.0.0.53")
	for _, side := range []func(context.Context) error{s.active, s.passive} {
		if got := side(t.Context()); got == nil || got.Error() != err.Error() || out.String() != "" {
			t.Errorf("%v, %q", got, out.String())
		}
	}
}

// rdsctl finds a test that runs.
func TestStressDebug(t *testing.T) {
	find := func() int {
		t.Helper()
		paths, err := rdsdebug.Discover(rdsdebug.RuntimeDir())
		if err != nil {
			t.Fatal(err)
		}
		return len(paths)
	}
	before := find()
	h, err := testStress(t, io.Discard).open()
	if err != nil {
		t.Fatal(err)
	}
	if n := find() - before; n != 1 {
		t.Errorf("%d sockets", n)
	}
	if err := h.Close(); err != nil || find() != before {
		t.Errorf("%v; %d sockets left", err, find()-before)
	}
}

// A test whose peer goes before its time is no success on the active side, which wanted it; one that its own user ends is.
func TestStressEarly(t *testing.T) {
	for _, c := range []struct {
		name    string
		runTime uint32
		after   float64 // seconds behind the burn-in
		active  bool    // who is interrupted
		want    string
	}{
		{"peer interrupted", 20, 3.5, false, "the peer ended the test after 3 of 20 seconds"},
		{"in the burn-in", 20, -0.1, false, "the peer ended the test after 0 of 20 seconds"},
		{"in the last second", 20, 19.5, false, ""},
		{"endless", 0, 3.5, false, ""},
		{"own interrupt", 20, 3.5, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond}})
				active, passive := simStress(io.Discard, n), simStress(io.Discard, n)
				o := &active.opt
				o.SendAddr, o.RecvAddr, o.RunTime = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), c.runTime
				o.settle()
				ctx := [2]context.Context{t.Context(), t.Context()}
				interrupted, cancel := context.WithCancel(t.Context())
				defer time.AfterFunc(active.burnIn+time.Duration(c.after*float64(active.second)), cancel).Stop()
				if c.active {
					ctx[0] = interrupted
				} else {
					ctx[1] = interrupted
				}
				ours, theirs := net.Pipe()
				var errs [2]error
				var wg sync.WaitGroup
				wg.Go(func() { errs[0] = active.lead(ctx[0], ours) })
				wg.Go(func() { errs[1] = passive.follow(ctx[1], theirs, netip.MustParseAddr("10.0.0.1")) })
				wg.Wait()
				got := ""
				if errs[0] != nil {
					got = errs[0].Error()
				}
				if got != c.want || errs[1] != nil {
					t.Errorf("%v; passive: %v", errs[0], errs[1])
				}
			})
		})
	}
}

// brokenWriter is a full disk.
type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

// Output that nobody gets is an error.
func TestStressNoOutput(t *testing.T) {
	cmd := newStressCommand(brokenWriter{})
	cmd.SetArgs([]string{"-s", "127.0.0.53", "-p", fmt.Sprint(freeUDPPort(t))})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if err := cmd.Execute(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
}
