package rdsdebug_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/internal/rdsping"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

func TestMain(m *testing.M) { leak.Main(m) }

var addrA, addrB = netip.MustParseAddr("127.0.0.91"), netip.MustParseAddr("127.0.0.92")

// open is a Service on real sockets.
func open(t *testing.T, port uint16) *rds.Service {
	t.Helper()
	svc, err := rds.Open(rds.Config{UDPPort: port})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := svc.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return svc
}

func listen(t *testing.T, svc *rds.Service, a netip.Addr, port uint16) *rds.Socket {
	t.Helper()
	s, err := svc.ListenAddrPort(t.Context(), netip.AddrPortFrom(a, port))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4zero})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// pair is two Services; a has sent one datagram that b's socket has not read.
func pair(t *testing.T) (a, b *rds.Service) {
	t.Helper()
	port := freePort(t)
	a, b = open(t, port), open(t, port)
	s, r := listen(t, a, addrA, 4000), listen(t, b, addrB, 5000)
	if _, err := s.WriteToAddrPort([]byte("unread"), r.AddrPort()); err != nil {
		t.Fatal(err)
	}
	for len(b.Info(rds.InfoRecv).ReceiveQueue) == 0 {
		time.Sleep(time.Millisecond)
	}
	return a, b
}

func serve(t *testing.T, svc *rds.Service, dir string) *rdsdebug.Server {
	t.Helper()
	srv, err := rdsdebug.ListenIn(svc, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return srv
}

// Through the socket a client sees what Service.Info says, in both forms, and only the parts it asks for.
func TestInfo(t *testing.T) {
	_, b := pair(t)
	dir := filepath.Join(t.TempDir(), "run")
	srv := serve(t, b, dir)
	paths, err := rdsdebug.Discover(dir)
	if err != nil || len(paths) != 1 || paths[0] != srv.Path() {
		t.Fatalf("discovered %v, %v", paths, err)
	}
	in, err := rdsdebug.NewClient(paths[0]).Info(t.Context(), rds.InfoRecv|rds.InfoConnections)
	if err != nil {
		t.Fatal(err)
	}
	if in.PID != os.Getpid() || len(in.ReceiveQueue) != 1 || in.ReceiveQueue[0].Len != 6 || len(in.Connections) != 1 || in.Sockets != nil || in.Counters != nil {
		t.Errorf("%+v", in)
	}
	w := httptest.NewRecorder()
	rdsdebug.Handler(b).ServeHTTP(w, httptest.NewRequest("GET", "/info?format=text&verbose=1", nil))
	text := w.Body.String()
	for _, want := range []string{
		"\nCounters:\n              CounterName            Value\n               conn_reset                0\n",
		"\nRDS Sockets:\n      BoundAddr BPort        ConnAddr CPort     SndBuf     RcvBuf    Inode\n     127.0.0.92  5000         0.0.0.0     0    4194304    4194304        0\n",
		"\nRDS Connections:\n      LocalAddr      RemoteAddr  Tos           NextTX           NextRX Flgs\n     127.0.0.92      127.0.0.91    0 ",
		"--C-\n",
		"\nReceive Message Queue:\n      LocalAddr LPort      RemoteAddr RPort  Tos              Seq      Bytes\n     127.0.0.92  5000      127.0.0.91  4000    0 ",
		"          6\n",
		"\nRDS IB Connections:\n      LocalAddr      RemoteAddr  Tos  SL                         LocalDev                        RemoteDev\n" +
			"     127.0.0.92      127.0.0.91    0   0                ::ffff:127.0.0.92                ::ffff:127.0.0.91  send_wr=",
		", send_sge=", ", rdma_mr_max=4096, rdma_mr_size=257, qpn=",
		"\nMemory Pools:\n           Addr Pool      Max    Pages  Regions   Mapped    Ready    Dirty    PinnedBytes\n     127.0.0.92   8k   ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	for path, status := range map[string]int{"/info?items=x": 400, "/info?format=xml": 400, "/trace?packets=0": 400, "/nothing": 404, "/": 200} {
		w := httptest.NewRecorder()
		rdsdebug.Handler(b).ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != status {
			t.Errorf("%s: status %d, want %d", path, w.Code, status)
		}
	}
}

// A ping through a process that owns the address: every one is answered, none twice.
func TestPing(t *testing.T) {
	a, _ := pair(t)
	c := rdsdebug.NewClient(serve(t, a, t.TempDir()).Path())
	seen := map[int]int{}
	sum, err := c.Ping(t.Context(), rdsping.Config{Source: addrA, Dest: addrB, Count: 20, Interval: time.Millisecond, Wait: 10 * time.Second},
		func(r rdsping.Reply) {
			if r.Err != "" || r.Dup || r.From != addrB || r.RTT <= 0 {
				t.Errorf("%+v", r)
			}
			seen[r.Seq]++
		})
	if err != nil || sum.Sent != 20 || sum.Received != 20 || len(seen) != 20 {
		t.Errorf("%+v, %v, %d different", sum, err, len(seen))
	}
	// An address of somebody else is an error, not silence.
	if _, err := c.Ping(t.Context(), rdsping.Config{Source: netip.MustParseAddr("192.0.2.1"), Dest: addrB, Count: 1}, nil); err == nil {
		t.Error("a source that this host does not have")
	}
}

// Nobody answers: pings are counted as sent, and the command ends in time.
func TestPingSilence(t *testing.T) {
	svc, err := rds.Open(rds.Config{UDPPort: freePort(t), Linger: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer svc.Close() // abandons the pings
	cfg := rdsping.Config{Source: addrA, Dest: netip.MustParseAddr("127.0.0.93"), Count: 3, Interval: time.Millisecond, Wait: 20 * time.Millisecond}
	sum, err := rdsping.Run(t.Context(), svc, cfg, func(r rdsping.Reply) { t.Errorf("reply %v", r) })
	if err != nil || sum.Sent != 3 || sum.Received != 0 {
		t.Errorf("%+v, %v", sum, err)
	}
}

// A process that ends in the midst of an answer is what the error says.
func TestProcessEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	defer func() {
		l.Close()
		<-done
	}()
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				t.Error(err)
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{")
			c.Close()
		}
	}()
	c := rdsdebug.NewClient(path)
	_, pinged := c.Ping(t.Context(), rdsping.Config{Source: addrA, Dest: addrB}, nil)
	_, traced := c.Trace(t.Context(), io.Discard, 0, false)
	for _, err := range []error{pinged, traced} {
		if err == nil || !strings.Contains(err.Error(), "closed it or ended") {
			t.Error(err)
		}
	}
}

// A trace holds packets whose addresses, lengths and ICRC are right.
func TestTrace(t *testing.T) {
	a, _ := pair(t)
	srv := serve(t, a, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := rdsdebug.NewClient(srv.Path()).Trace(ctx, pw, 40, true)
		pw.Close()
		done <- err
	}()
	r, err := pcapgo.NewReader(pr)
	if err != nil {
		t.Fatal(err)
	}
	s := listen(t, a, addrA, 0)
	go func() {
		for ctx.Err() == nil {
			s.TrySend(rds.Message{Peer: netip.AddrPortFrom(addrB, 5000), Data: make([]byte, 9000)})
			time.Sleep(time.Millisecond)
		}
	}()
	in, out := 0, 0
	for n := range 40 {
		data, ci, err := r.ReadPacketData()
		if err != nil {
			t.Fatal(err)
		}
		p := gopacket.NewPacket(data, layers.LayerTypeIPv4, gopacket.Default)
		ip, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
		if ip == nil || udp == nil || ci.Length != len(data) || int(ip.Length) != len(data) || int(udp.Length) != len(udp.Payload)+8 {
			t.Fatalf("packet %d of %d bytes: %v", n, len(data), p)
		}
		switch ip.SrcIP.String() + " " + ip.DstIP.String() {
		case addrA.String() + " " + addrB.String():
			out++
			if !icrcOK(ip, udp) {
				t.Errorf("packet %d: wrong ICRC with ID %d", n, ip.Id)
			}
		case addrB.String() + " " + addrA.String():
			in++
		default:
			t.Errorf("from %v to %v", ip.SrcIP, ip.DstIP)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if in == 0 || out == 0 {
		t.Errorf("%d in, %d out", in, out)
	}
}

// icrcOK computes the packet's ICRC with the very headers that the trace shows.
func icrcOK(ip *layers.IPv4, udp *layers.UDP) bool {
	src, _ := netip.AddrFromSlice(ip.SrcIP)
	dst, _ := netip.AddrFromSlice(ip.DstIP)
	f := roce.NewFlow(netip.AddrPortFrom(src.Unmap(), uint16(udp.SrcPort)), netip.AddrPortFrom(dst.Unmap(), uint16(udp.DstPort)))
	id, v := f.Check(udp.Payload, ip.Id)
	return (v == roce.OK0 || v == roce.OKGuess) && id == ip.Id
}

// What a dead process left is removed; a directory that others write to is refused.
func TestRuntimeDirectory(t *testing.T) {
	svc := open(t, freePort(t))
	dir := t.TempDir()
	left := filepath.Join(dir, "999999999-0.sock")
	l, err := net.Listen("unix", left)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	first, second := serve(t, svc, dir), serve(t, svc, dir)
	if paths, err := rdsdebug.Discover(dir); err != nil || len(paths) != 2 {
		t.Errorf("%v, %v", paths, err)
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the socket of a dead process is still there: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if paths, _ := rdsdebug.Discover(dir); len(paths) != 1 || paths[0] != second.Path() {
		t.Errorf("%v", paths)
	}
	if err := first.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := rdsdebug.ListenIn(svc, dir); err == nil {
		t.Error("a directory that everybody may write to")
	}
	if paths, err := rdsdebug.Discover(filepath.Join(dir, "none")); err != nil || paths != nil {
		t.Errorf("no directory: %v, %v", paths, err)
	}
}

func TestParseItems(t *testing.T) {
	if items, err := rdsdebug.ParseItems(""); err != nil || items != rds.InfoAll {
		t.Errorf("%v, %v", items, err)
	}
	if items, err := rdsdebug.ParseItems("cI"); err != nil || items != rds.InfoCounters|rds.InfoIB {
		t.Errorf("%v, %v", items, err)
	}
	if _, err := rdsdebug.ParseItems("cx"); err == nil {
		t.Error("x is no item")
	}
}

// Mounted beside pprof, as the package comment has it.
func TestMounted(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle("/debug/rds/", http.StripPrefix("/debug/rds", rdsdebug.Handler(open(t, freePort(t)))))
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest("GET", "/debug/rds/info?items=c", nil))
	var in rds.Info
	if err := json.Unmarshal(w.Body.Bytes(), &in); err != nil || len(in.Counters) < 50 {
		t.Errorf("%v: %s", err, w.Body)
	}
}
