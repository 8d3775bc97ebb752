//go:build linux

// Package e2e tests whole processes against each other: over loopback, across a kill, and over a veth
// pair between network namespaces.
package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/rds"
)

// roleEnv makes the test binary a peer process: its value is a role in JSON.
const roleEnv = "OPENRDS_E2E_ROLE"

func TestMain(m *testing.M) {
	if r := os.Getenv(roleEnv); r != "" {
		var ro role
		if err := json.Unmarshal([]byte(r), &ro); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		if err := ro.run(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leak.Main(m)
}

// role is what a peer process does: for every pair (local port, remote port) it sends Count datagrams
// (0: for ever) and verifies what it receives.
type role struct {
	Local, Remote netip.Addr
	UDPPort       uint16
	Ports         []uint16 // of both sides
	Seed          uint64   // of what it sends; what it receives is of PeerSeed
	PeerSeed      uint64
	Count         int // to send per port
	Expect        int // to receive per port before it ends
	MaxSize       int
	// Journal makes it print "recv PORT FIRST" and then "upto PORT N" for what it has read.
	Journal bool
	// Every spaces what is sent.
	Every time.Duration
	// Free accepts streams that start anywhere, and start again when the peer did.
	Free bool
}

// run ends when everything was sent, acknowledged and received, or when stdin ends.
func (r *role) run(stdin io.Reader, stdout io.Writer) error {
	svc, err := rds.Open(rds.Config{UDPPort: r.UDPPort, Linger: 30 * time.Second})
	if err != nil {
		return err
	}
	var socks []*rds.Socket
	for _, p := range r.Ports {
		s, err := svc.ListenAddrPort(context.Background(), netip.AddrPortFrom(r.Local, p))
		if err != nil {
			return err
		}
		socks = append(socks, s)
	}
	out := &lineWriter{w: stdout}
	out.printf("ready")
	stop := make(chan struct{})
	go func() {
		io.Copy(io.Discard, stdin)
		close(stop)
		for _, s := range socks {
			s.SetDeadline(time.Now())
		}
	}()
	var wg sync.WaitGroup
	errs := make(chan error, 2*len(socks))
	for i, s := range socks {
		peer := netip.AddrPortFrom(r.Remote, r.Ports[i])
		wg.Go(func() { errs <- r.send(s, peer, stop) })
		wg.Go(func() { errs <- r.receive(s, peer, out, stop) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	st := svc.Stats()
	if err := svc.Close(); err != nil {
		return err
	}
	var resent, drops uint64
	for _, d := range st.Devices {
		resent += d["retransmits"]
		drops += d["rx_socket_drops"]
	}
	out.printf("done resent %d drops %d devices %d %d", resent, drops, st.Conn.DevicesLost, st.Conn.DevicesBack)
	return nil
}

func (r *role) send(s *rds.Socket, peer netip.AddrPort, stop chan struct{}) error {
	g := stream{seed: r.Seed ^ uint64(peer.Port()), max: r.MaxSize}
	buf := make([]byte, max(r.MaxSize, headerLen))
	for i := uint64(0); r.Count == 0 || i < uint64(r.Count); i++ {
		n := g.fill(buf, r.Seed, i)
		if _, err := s.WriteToAddrPort(buf[:n], peer); err != nil {
			select {
			case <-stop:
				return nil
			default:
				return fmt.Errorf("datagram %d to %v: %w", i, peer, err)
			}
		}
		if r.Every > 0 {
			time.Sleep(r.Every)
		}
	}
	return nil
}

func (r *role) receive(s *rds.Socket, peer netip.AddrPort, out *lineWriter, stop chan struct{}) error {
	buf := make([]byte, max(r.MaxSize, headerLen))
	var next, seed uint64
	seed = r.PeerSeed
	started := !r.Free
	for got := 0; got < r.Expect || r.Expect == 0; got++ {
		n, from, err := s.ReadFromAddrPort(buf)
		if err != nil {
			select {
			case <-stop:
				return nil
			default:
				return fmt.Errorf("datagram %d from %v: %w", got, peer, err)
			}
		}
		if from != peer || n < headerLen {
			return fmt.Errorf("%d bytes from %v", n, from)
		}
		inc, seq := binary.BigEndian.Uint64(buf), binary.BigEndian.Uint64(buf[8:])
		if r.Free && (!started || inc != seed) {
			started, seed, next = true, inc, seq
			out.printf("recv %d %d %d", peer.Port(), inc, seq)
		}
		g := stream{seed: seed ^ uint64(s.AddrPort().Port()), max: r.MaxSize}
		if seq != next || inc != seed || !g.check(buf[:n], seed, seq) {
			return fmt.Errorf("port %d: datagram %d of incarnation %d (want %d of %d), %d bytes", peer.Port(), seq, inc, next, seed, n)
		}
		next++
		if r.Journal {
			out.printf("upto %d %d", peer.Port(), seq)
		}
	}
	return nil
}

// stream generates datagrams: content and length follow from seed and number. A header of incarnation and
// sequence stands in front.
type stream struct {
	seed uint64
	max  int
}

const headerLen = 16

// pool is what payloads are cut from, so that making and checking one costs a copy or a compare.
var pool = sync.OnceValue(func() []byte {
	b := make([]byte, 3<<20)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
})

func (g stream) shape(i uint64) (n, off int) {
	x := g.seed*0x9e3779b97f4a7c15 ^ i*0xbf58476d1ce4e5b9
	x ^= x >> 31
	x *= 0x94d049bb133111eb
	x ^= x >> 29
	off = int(x >> 40 & (1<<20 - 1))
	// Mostly small, some of several fragments, few large.
	switch k := x & 1023; {
	case k < 900:
		n = int(x>>10) & 1023
	case k < 1020:
		n = int(x>>10) & (16<<10 - 1)
	case k < 1023:
		n = int(x>>10) & (128<<10 - 1)
	default:
		n = int(x>>10) & (1<<20 - 1)
	}
	return headerLen + min(n, g.max-headerLen), off
}

func (g stream) fill(b []byte, inc, i uint64) int {
	n, off := g.shape(i)
	binary.BigEndian.PutUint64(b, inc)
	binary.BigEndian.PutUint64(b[8:], i)
	copy(b[headerLen:n], pool()[off:])
	return n
}

func (g stream) check(b []byte, inc, i uint64) bool {
	n, off := g.shape(i)
	return len(b) == n && binary.BigEndian.Uint64(b) == inc && string(b[headerLen:]) == string(pool()[off:off+n-headerLen])
}

type lineWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lineWriter) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.w, format+"\n", args...)
}

// proc is a running peer process.
type proc struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
	errs  strings.Builder
}

// start runs a role in a process of its own, started by in (nil: as it is).
func start(t *testing.T, r role, in func(f func() error) error) *proc {
	t.Helper()
	j, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	p := &proc{t: t, cmd: exec.Command("/proc/self/exe"), lines: make(chan string, 1<<16)}
	p.cmd.Env = append(os.Environ(), roleEnv+"="+string(j))
	p.cmd.Stderr = &p.errs
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if in == nil {
		in = func(f func() error) error { return f() }
	}
	if err := in(p.cmd.Start); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		sc := bufio.NewScanner(stdout)
		for sc.Scan() {
			p.lines <- sc.Text()
		}
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		for range p.lines {
		}
		p.cmd.Wait()
	})
	return p
}

// expect reads lines until one begins with prefix.
func (p *proc) expect(prefix string, within time.Duration) string {
	p.t.Helper()
	deadline := time.After(within)
	for {
		select {
		case l, ok := <-p.lines:
			if !ok {
				p.t.Fatalf("process ended before it said %q: %s", prefix, p.errs.String())
			}
			if strings.HasPrefix(l, prefix) {
				return l
			}
		case <-deadline:
			p.t.Fatalf("process did not say %q within %v: %s", prefix, within, p.errs.String())
		}
	}
}
