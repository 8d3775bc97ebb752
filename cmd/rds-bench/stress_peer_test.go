package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/rds"
)

// simStress is a side on a simulated network.
func simStress(out io.Writer, n *simnet.Net) *stress {
	s := newStress(out)
	s.network, s.burnIn, s.second = n, 40*time.Millisecond, 50*time.Millisecond
	return s
}

// Over IPv6 everything is the same but for the forms; link-local addresses find their zone.
func TestStressIPv6(t *testing.T) {
	for _, c := range []struct {
		name, active, passive, tells string
		change                       func(*stressOptions)
	}{
		{"defaults", "fd00::1", "fd00::2", "fd00::2", func(*stressOptions) {}},
		{"tasks, sizes and type of service", "fd00::1", "fd00::2", "fd00::2", func(o *stressOptions) { o.Tasks, o.Depth, o.ReqSize, o.AckSize, o.TOS = 2, 2, 5000, 97, 3 }},
		{"RDMA", "fd00::1", "fd00::2", "fd00::2", func(o *stressOptions) { o.RDMASize, o.Segments, o.Depth = 10000, 2, 2 }},
		{"link-local, the zone of one", "fe80::1%lo", "fe80::2%lo", "fe80::2", func(*stressOptions) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 200 * time.Microsecond}})
				var out [2]syncBuffer
				active, passive := simStress(&out[0], n), simStress(&out[1], n)
				o := &active.opt
				o.SendAddr, o.RecvAddr, o.RunTime, o.Verify = netip.MustParseAddr(c.tells), netip.MustParseAddr(c.active), 2, true
				c.change(o)
				if o.settle(); o.validate() != nil {
					t.Fatal(o.validate())
				}
				ours, theirs := net.Pipe()
				var errs [2]error
				var wg sync.WaitGroup
				wg.Go(func() { errs[0] = active.lead(t.Context(), ours) })
				wg.Go(func() { errs[1] = passive.follow(t.Context(), theirs, netip.MustParseAddr(c.passive)) })
				wg.Wait()
				for i, s := range []*stress{active, passive} {
					tx, rx, kps, in, away := average(t, out[i].String())
					if rdma := o.RDMASize > 0; errs[i] != nil || tx == 0 || rx == 0 || kps == 0 || rdma != (in > 0) || rdma != (away > 0) {
						t.Errorf("%v\n%s", errs[i], out[i].String())
					}
					if zone := netip.MustParseAddr(c.passive).Zone(); s.opt.SendAddr.Zone() != zone || s.opt.RecvAddr.Zone() != zone {
						t.Errorf("from %v to %v", s.opt.RecvAddr, s.opt.SendAddr)
					}
				}
			})
		})
	}
}

// rawPeer plays a program that is not ours, byte by byte.
type rawPeer struct {
	t       *testing.T
	ctx     context.Context // of not much longer than a test takes
	control net.Conn
	svc     *rds.Service
	sock    *rds.Socket
	seq     uint32 // of the next datagram
}

var (
	rawOurs   = netip.MustParseAddrPort("10.0.0.1:4001")
	rawTheirs = netip.MustParseAddrPort("10.0.0.2:4001")
)

// bind opens the socket of the peer's only task.
func (p *rawPeer) bind(n *simnet.Net) {
	var err error
	if p.svc, err = rds.Open(rds.Config{Network: n, Linger: -1}); err == nil {
		p.sock, err = p.svc.ListenAddrPort(p.ctx, rawTheirs)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { p.svc.Close() })
}

// say writes to the control connection.
func (p *rawPeer) say(hexBytes string) {
	b, err := hex.DecodeString(hexBytes)
	if err == nil {
		_, err = p.control.Write(b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// hear reads n bytes from it.
func (p *rawPeer) hear(n int) string {
	b := make([]byte, n)
	if _, err := io.ReadFull(p.control, b); err != nil {
		p.t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

// send is a datagram of size bytes with the fields of its header from index on: as many bytes as are given, the rest is 0.
func (p *rawPeer) send(size int, fromIndex ...byte) {
	p.sendAs(p.seq, size, fromIndex...)
	p.seq++
}

func (p *rawPeer) sendAs(seq uint32, size int, fromIndex ...byte) {
	b := binary.BigEndian.AppendUint32(nil, seq)
	b = append(b, 10, 0, 0, 2, 10, 0, 0, 1, 0x0f, 0xa1, 0x0f, 0xa1)
	b = append(b, fromIndex...)
	b = append(b, make([]byte, size-len(b))...)
	if err := p.sock.Send(p.ctx, rds.Message{Peer: rawOurs, Data: b}); err != nil {
		p.t.Fatal(err)
	}
}

// receive is the next datagram, nil if none comes within ten seconds.
func (p *rawPeer) receive() (b []byte, cookie rds.Cookie) {
	ctx, cancel := context.WithTimeout(p.ctx, 10*time.Second)
	defer cancel()
	m, err := p.sock.Receive(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, 0
	}
	if err != nil {
		p.t.Fatal(err)
	}
	defer m.Release()
	if m.Peer != rawOurs {
		p.t.Errorf("a datagram from %v", m.Peer)
	}
	return bytes.Clone(m.Bytes()), m.Cookie
}

// followRaw is follow, at the address that a raw peer expects.
func (s *stress) followRaw(ctx context.Context, c net.Conn) error {
	return s.follow(ctx, c, rawOurs.Addr())
}

// rawTest is one of ours and a raw peer; play is the peer's part, ours the other side's.
func rawTest(t *testing.T, change func(*stressOptions), ours func(*stress, context.Context, net.Conn) error, play func(p *rawPeer, n *simnet.Net)) string {
	var out syncBuffer
	synctest.Test(t, func(t *testing.T) {
		n := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})
		s := simStress(&out, n)
		s.opt.SendAddr, s.opt.RecvAddr = rawTheirs.Addr(), rawOurs.Addr()
		if change != nil {
			change(&s.opt)
		}
		s.opt.settle()
		c, theirs := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- ours(s, t.Context(), c) }()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		p := &rawPeer{t: t, ctx: ctx, control: theirs}
		play(p, n)
		theirs.Close()
		closed := time.Now()
		if err := <-done; err != nil {
			t.Errorf("ours: %v\n%s", err, out.String())
		}
		// It has listened on for a second, in case that something was still to come.
		if p.sock != nil && time.Since(closed) < s.second {
			t.Errorf("over after %v", time.Since(closed))
		}
	})
	return out.String()
}

// The newest rds-stress, told, makes its tasks only when it has been told to start; without a fence it executes READs by themselves, and its ack has the
// key and no operation. That ack ends the use of the memory.
func TestStressUnfencedPeer(t *testing.T) {
	reads := 0
	out := rawTest(t, func(o *stressOptions) {
		o.RDMASize, o.Segments, o.RWMode, o.UseFence, o.OneWay = 1000, 2, 1, false, true
	},
		(*stress).lead,
		func(p *rawPeer, n *simnet.Net) {
			const told = "00000001" + "00000400" + "0000003f" + "000003e8" + "0a000002" + "0a000001" + "0fa0" + "0001" + "00000000" +
				"00" + "00" + "00" + "00" + "00" + "00" + "01" + "00" + "00" + "00" + "00" + "00" + "00" + "01" + "01" + "00000002" + "00000000" + "00000000"
			if got := p.hear(59); got != told {
				p.t.Errorf("options:\n%s, want\n%s", got, told)
			}
			p.hear(1) // ready
			p.bind(n)
			p.say("00")
			mem := make([]byte, 2000)
			region, err := p.sock.RegisterRegion(p.ctx, mem, rds.RegionOptions{})
			if err != nil {
				p.t.Fatal(err)
			}
			read := func(from rds.Cookie) rds.CompletionStatus {
				op := &rds.RDMA{Op: rds.RDMARead, Remote: from, Local: []rds.Piece{region.Piece(0, 2000)}, Silent: true, Notify: true}
				if err := p.sock.Send(p.ctx, rds.Message{Peer: rawOurs, RDMA: op}); err != nil {
					p.t.Fatal(err)
				}
				c, err := p.sock.ReadCompletion(p.ctx)
				if err != nil {
					p.t.Fatal(err)
				}
				return c.Status
			}
			for i, begin := 0, time.Now(); time.Since(begin) < 150*time.Millisecond; i++ {
				b, cookie := p.receive()
				if len(b) != 1024 || binary.BigEndian.Uint32(b) != uint32(i) || b[18] != 1 || (b[19] == 1) != (i > 10) || (cookie != 0) != (i > 10) {
					p.t.Fatalf("request %d: %x, cookie %v", i, b[:min(len(b), 63)], cookie)
				}
				if b[19] == 0 {
					p.send(63, 0, 0, 2)
					continue
				}
				// Memory whose use is over is mapped anew, and its key is not known when the header is written.
				if key := binary.BigEndian.Uint64(b[44:]); key != 0 {
					p.t.Fatalf("request %d is about memory that is still mapped: key %#x", i, key)
				}
				if st := read(cookie); st != rds.StatusSuccess {
					p.t.Fatalf("READ %d: %v", i, st)
				}
				reads++
				ack := append([]byte{0, 0, 2, 0}, b[20:44]...)
				ack = binary.BigEndian.AppendUint64(ack, uint64(cookie))
				p.send(63, append(ack, b[52:60]...)...)
			}
		})
	if _, _, _, in, away := average(t, out); in != 0 || away == 0 || reads < 100 {
		t.Errorf("%d reads:\n%s", reads, out)
	}
}

// Told to do without a fence, ours does as much: the ack comes when the READ has completed, and does not name it. Acks keep their order.
func TestStressUnfenced(t *testing.T) {
	rawTest(t, nil,
		(*stress).followRaw,
		func(p *rawPeer, n *simnet.Net) {
			p.bind(n)
			p.say("00000003" + "00000400" + "0000003f" + "00001000" + "0a000001" + "0a000002" + "0fa0" + "0001" + "00000000" +
				"00" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "00" + "00" + "00" + "00" + "01" + "00" + "00000001" + "00000000" + "00000000")
			p.say("00")
			p.hear(1)
			mem := make([]byte, 4096)
			pattern := stressPattern(1024 - 63)
			request := func(index, op byte, words uint64) rds.Cookie {
				switch op {
				case 1:
					fillRDMA(mem, words)
				case 2:
					fillRDMA(mem, 0)
				}
				b := binary.BigEndian.AppendUint32(nil, p.seq)
				p.seq++
				b = append(b, 10, 0, 0, 2, 10, 0, 0, 1, 0x0f, 0xa1, 0x0f, 0xa1, 0, index, 1, op)
				b = append(b, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0)
				b = binary.BigEndian.AppendUint64(b, words)
				b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 1, 0, 0, 0)
				m := rds.Message{Peer: rawOurs, Data: append(b, pattern...)}
				if op == 0 {
					if err := p.sock.Send(p.ctx, m); err != nil {
						p.t.Fatal(err)
					}
					return 0
				}
				r, err := p.sock.SendMapped(p.ctx, m, mem, rds.RegionOptions{})
				if err != nil {
					p.t.Fatal(err)
				}
				return r.Cookie()
			}
			// A READ, and a plain request whose ack is ready before the READ is: one of them waits.
			keys := []rds.Cookie{request(0, 1, 1<<32|77), request(1, 0, 0)}
			for i, key := range keys {
				b, _ := p.receive()
				if len(b) != 63 || binary.BigEndian.Uint32(b) != uint32(i) || b[17] != byte(i) || b[18] != 2 || b[19] != 0 || binary.BigEndian.Uint64(b[44:]) != uint64(key) {
					p.t.Errorf("ack %d: %x, key %v", i, b, key)
				}
			}
			// What is not a READ goes with its ack.
			key := request(2, 2, 5<<32|77)
			b, _ := p.receive()
			if len(b) != 63 || b[17] != 2 || b[19] != 2 || binary.BigEndian.Uint64(b[44:]) != uint64(key) || !bytes.Equal(b[20:28], []byte{1, 2, 3, 4, 5, 6, 7, 8}) {
				p.t.Errorf("ack of a WRITE: %x, key %v", b, key)
			}
			if err := checkRDMA(mem, len(mem), 5<<32|77); err != nil {
				p.t.Error(err)
			}
		})
}

// An rds-stress of another release whose sockets are asynchronous sends again what it believes to be lost.
func TestStressAsyncPeer(t *testing.T) {
	rawTest(t, nil,
		(*stress).followRaw,
		func(p *rawPeer, n *simnet.Net) {
			p.bind(n)
			p.say("322e332e34" + "0000000000000000000000" + "00000002" + "00000400" + "0000003f" + "00000000" + "0a000001" + "0a000002" + "0fa0" + "0001" + "00000000" +
				"00" + "00" + "00" + "00" + "00" + "00" + "01" + "00" + "00" + "01" + "00" + "00" + "00" + "01" + "00" + "00000001" + "00000000" + "00000000" + "00" + "01")
			p.say("00")
			p.hear(1)
			again := func(index byte) []byte { return append([]byte{0, index, 1}, append(make([]byte, 41), 1)...) }
			wantAck := func(seq int) {
				p.t.Helper()
				if b, _ := p.receive(); len(b) != 63 || binary.BigEndian.Uint32(b) != uint32(seq) || b[17] != byte(seq%2) || b[18] != 2 {
					p.t.Fatalf("ack %d: %x", seq, b)
				}
			}
			p.send(1024, 0, 0, 1)
			wantAck(0)
			p.sendAs(0, 1024, again(0)...)
			p.sendAs(0, 1024, again(0)...)
			p.send(1024, again(1)...) // had really been lost
			wantAck(1)
			p.send(1024, 0, 0, 1)
			wantAck(2)
			if b, _ := p.receive(); b != nil {
				p.t.Errorf("one more: %x", b)
			}
		})
}

// A peer built to exchange options as JSON too finds that we are not, and ends; nothing is wrong then.
func TestStressJSONPeer(t *testing.T) {
	out := rawTest(t, nil,
		(*stress).followRaw,
		func(p *rawPeer, n *simnet.Net) {
			p.say("322e332e34" + "000000" + "6a736f6e" + "00000000" + stressShortHex + "0000")
			p.say("00")
			if got := p.hear(1); got == "61" {
				p.t.Error("the answer says that ours speaks JSON")
			}
		})
	if !strings.Contains(out, "Starting up") {
		t.Errorf("%s", out)
	}
}

// Only a peer that may come is waited for.
func TestStressConnect(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.53:0")
	if err != nil {
		t.Fatal(err)
	}
	at := hostOf(l.Addr())
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	l.Close()
	for _, c := range []struct {
		retries uint32
		ends    string
	}{{0, ": connection refused\n"}, {3, ": connection refused - retrying...\n"}} {
		var out syncBuffer
		s := newStress(&out)
		s.opt.SendAddr, s.opt.Port, s.opt.ConnectRetries, s.second = at, port, c.retries, time.Millisecond
		if err := s.active(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v", err)
		}
		if want := fmt.Sprintf("connecting to 127.0.0.53:%d%s", port, c.ends); out.String() != want {
			t.Errorf("%q, want %q", out.String(), want)
		}
	}
	var out syncBuffer
	s := newStress(&out)
	s.opt.SendAddr, s.opt.RecvAddr, s.opt.ConnectRetries = at, netip.MustParseAddr("192.0.2.77"), 1000 // of nobody here
	if err := s.active(t.Context()); err == nil || strings.Contains(out.String(), "retrying") {
		t.Errorf("%v, %q", err, out.String())
	}
}

// At the end each task takes back what it has sent to each task of the peer.
func TestStressCancel(t *testing.T) {
	active, _ := stressPair(t, func(o *stressOptions) { o.Tasks, o.Depth, o.ReqSize, o.RunTime = 2, 16, 100000, 2 }, func(s *stress) { s.cancelSent = true })
	for _, to := range []string{"(127.0.0.51:4301)[0]", "(127.0.0.51:4302)[0]", "(127.0.0.51:4301)[1]", "(127.0.0.51:4302)[1]"} {
		if strings.Count(active, "\nRDS_CANCEL_SENT_TO"+to+" took ") != 1 {
			t.Errorf("%s:\n%s", to, active)
		}
	}
	average(t, active)
}

// The process goes after its time, which begins when that of burning in is over, and not if the test has ended before.
func TestStressAbort(t *testing.T) {
	for _, after := range []uint32{3, 100} {
		calls := make(chan time.Duration, 2)
		var begin time.Time
		stressPair(t, func(*stressOptions) { begin = time.Now() }, func(s *stress) {
			s.abortAfter = after
			s.abort = func() { calls <- time.Since(begin) }
		})
		switch {
		case after == 3 && len(calls) != 2, after == 100 && len(calls) != 0:
			t.Errorf("after %d: %d calls", after, len(calls))
		case after == 3:
			if took := <-calls; took < 360*time.Millisecond {
				t.Errorf("after %v", took)
			}
		}
	}
}

// Numbers are written as for rds-stress, names resolved, and what cannot be is refused.
func TestStressFlags(t *testing.T) {
	cmd := newStressCommand(io.Discard)
	if err := cmd.ParseFlags([]string{"-q", "4k", "-a", "0x60", "-D", "1M", "-I", "010", "-d", "2K", "-t", "0x10", "-T", "1g", "-p", "5k", "-Q", "0xff", "-M", "2",
		"--rdma-alignment", "1k", "--connect-retries", "0x7fffffff", "--abort-after", "1m", "--show-outliers", "5k", "--disable-inq", "--async", "--cancel-sent-to", "--rdma-use-fence", "0"}); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{"req-bytes": "4096", "ack-bytes": "96", "rdma-bytes": "1048576", "rdma-buffers": "8", "depth": "2048", "tasks": "16",
		"time": "1073741824", "port": "5120", "tos": "255", "rdma-mode": "2", "rdma-alignment": "1024", "connect-retries": "2147483647", "abort-after": "1048576",
		"show-outliers": "5.12ms", "async": "true", "cancel-sent-to": "true", "rdma-use-fence": "0"} {
		if got := cmd.Flags().Lookup(flag).Value.String(); got != want {
			t.Errorf("--%s is %s, not %s", flag, got, want)
		}
	}
	for _, bad := range [][]string{{"-d", "k"}, {"-d", ""}, {"-d", "4x"}, {"-d", "-1"}, {"-d", "4kk"}, {"-q", "4g"}, {"-t", "64k"}, {"-Q", "256"}, {"-q", "0x100000000000000000"},
		{"--show-outliers", "-1us"}, {"--show-outliers", "soon"}, {"--rdma-use-fence", "2"}} {
		if err := newStressCommand(io.Discard).ParseFlags(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	for _, ok := range []string{"1500", "1500us", "1.5ms"} {
		var v stressMicros
		if err := v.Set(ok); err != nil || time.Duration(v) != 1500*time.Microsecond {
			t.Errorf("%s: %v, %v", ok, v, err)
		}
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"Oracle's kernels", []string{"--reset"}},
		{"different families", []string{"-s", "fd00::1", "-r", "10.0.0.1"}},
		{"needs a zone", []string{"-s", "fe80::1", "-r", "fe80::2"}},
		{"ack size 63 is not between 96", []string{"-s", "fd00::1", "-a", "63"}},
		{"request size 95 is not between 96", []string{"-s", "fd00::1", "-q", "95"}},
		{"both kept and used once", []string{"--rdma-cache-mrs", "1", "--rdma-use-once", "1"}},
		{"no version", []string{"--peer-version", "newest"}},
		{"no version", []string{"--peer-version", "2.0.7.2.0.7.2.0.7"}},
	} {
		cmd := newStressCommand(io.Discard)
		cmd.SetArgs(c.args)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		if err := cmd.Execute(); !errors.As(err, new(*usageError)) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v", c.args, err)
		}
	}
	if a, err := resolveStress(t.Context(), "localhost"); err != nil || !a.IsLoopback() || a.Is4In6() {
		t.Errorf("localhost: %v, %v", a, err)
	}
	if a, err := resolveStress(t.Context(), "::ffff:10.0.0.1"); err != nil || a != netip.MustParseAddr("10.0.0.1") {
		t.Errorf("%v, %v", a, err)
	}
}
