package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/openrds/openrds/internal/leak"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/rds/rdsdebug"
)

func TestMain(m *testing.M) {
	if f := children[os.Getenv(childVar)]; f != nil {
		os.Exit(f())
	}
	leak.Main(m)
}

// children are what this program does in the place of tests, in another environment: by the value of childVar.
var children = map[string]func() int{}

const childVar = "RDSCTL_TEST_CHILD"

// rdsctl runs the command.
func rdsctl(ctx context.Context, args ...string) (stdout, stderr string, code int) {
	var out, err bytes.Buffer
	code = run(ctx, args, &out, &err)
	return out.String(), err.String(), code
}

// world is two Services with a debug socket each; the first has a datagram on its way to the second.
func world(t *testing.T) (dir string, port uint16, sock *rds.Socket) {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	c.Close()
	dir = filepath.Join(t.TempDir(), "run")
	for _, a := range []string{"127.0.0.95:4000", "127.0.0.96:5000"} {
		svc, err := rds.Open(rds.Config{UDPPort: port})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := svc.Close(); err != nil {
				t.Error(err)
			}
		})
		s, err := svc.ListenPacket(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		if sock == nil {
			sock = s
		}
		srv, err := rdsdebug.ListenIn(svc, dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { srv.Close() })
	}
	if _, err := sock.WriteToAddrPort(make([]byte, 77), netip.MustParseAddrPort("127.0.0.96:5000")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if n, _ := sock.Unacknowledged(); n == 0 {
			return dir, port, sock
		}
	}
	t.Fatal("the datagram is not acknowledged")
	return
}

// traffic sends datagrams of 5000 bytes to a port of the second Service that nobody has, where they are dropped and no port becomes congested,
// until the test ends; what was sent arrives before anything is closed.
func traffic(t *testing.T, sock *rds.Socket) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for tick := time.NewTicker(time.Millisecond); ; {
			select {
			case <-tick.C:
				sock.TrySend(rds.Message{Peer: netip.MustParseAddrPort("127.0.0.96:6000"), Data: make([]byte, 5000)})
			case <-stop:
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if n, _ := sock.Unacknowledged(); n == 0 {
				return
			}
		}
		t.Error("the traffic is not acknowledged")
	})
}

func TestInfo(t *testing.T) {
	dir, _, _ := world(t)
	out, _, code := rdsctl(t.Context(), "--dir", dir, "info", "-n", "-r")
	if code != 0 || strings.Count(out, "RDS Connections:") != 2 || !strings.Contains(out, "     127.0.0.96  5000      127.0.0.95  4000    0") || strings.Contains(out, "Counters") {
		t.Errorf("status %d:\n%s", code, out)
	}
	out, _, code = rdsctl(t.Context(), "--dir", dir, "info", "--json")
	var all []rds.Info
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 0 || len(all) != 2 || len(all[0].Counters) == 0 {
		t.Errorf("status %d, %v, %d services", code, err, len(all))
	}
	if out, _, code := rdsctl(t.Context(), "--dir", dir, "info", "-T"); code != 0 || !strings.Contains(out, "TCP Connections:") || strings.Contains(out, "Counters") {
		t.Errorf("status %d:\n%s", code, out)
	}
	if _, errs, code := rdsctl(t.Context(), "--dir", t.TempDir(), "info"); code != 0 || !strings.Contains(errs, "no process") {
		t.Errorf("nobody there: status %d, %q", code, errs)
	}
	if out, errs, code := rdsctl(t.Context(), "--dir", dir, "info", "--json", "--pid", "1"); code != 1 || out != "" || !strings.Contains(errs, "no process 1 with") {
		t.Errorf("another process: status %d, %q, %q", code, out, errs)
	}
	for _, every := range []string{"0", "-1s", "soon"} {
		if _, errs, code := rdsctl(t.Context(), "--dir", dir, "info", "--watch", every); code != 2 || !strings.Contains(errs, "--watch") {
			t.Errorf("--watch %s: status %d, %q", every, code, errs)
		}
	}
	if got := printable("a\x1b]0;b\x07\n\u00e4\xff"); got != "a?]0;b?\n\u00e4\ufffd" {
		t.Errorf("printable: %q", got)
	}
	// --watch goes on until it is interrupted.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if out, _, code := rdsctl(ctx, "--dir", dir, "info", "-c", "--watch", "0.01"); code != 0 || strings.Count(out, "Counters:") < 4 {
		t.Errorf("status %d, %d times", code, strings.Count(out, "Counters:"))
	}
}

func TestPing(t *testing.T) {
	dir, port, _ := world(t)
	// Through the process that owns the source address,
	out, errs, code := rdsctl(t.Context(), "--dir", dir, "ping", "-c", "3", "-i", "1ms", "-I", "127.0.0.95", "127.0.0.96")
	if code != 0 || strings.Count(out, " usec\n") != 3 || strings.Count("\n"+out, "\n   1: ") != 1 { // in any order: each has a reader
		t.Errorf("status %d: %q %q", code, out, errs)
	}
	// and from an address that nobody has yet.
	out, errs, code = rdsctl(t.Context(), "--dir", dir, "ping", "-c", "2", "-i", "1ms", "-I", "127.0.0.97", "--roce-port", fmt.Sprint(port), "127.0.0.96")
	if code != 0 || strings.Count(out, " usec\n") != 2 {
		t.Errorf("status %d: %q %q", code, out, errs)
	}
	// Who does not answer is not in the output, which is rds-ping's, but said.
	out, errs, code = rdsctl(t.Context(), "--dir", dir, "ping", "-c", "1", "--wait", "10ms", "-I", "127.0.0.97", "--roce-port", fmt.Sprint(port), "127.0.0.98")
	if code != 1 || out != "" || errs != "rdsctl: 127.0.0.98 answered 0 of 1 pings from 127.0.0.97\n" {
		t.Errorf("nobody answers: status %d, %q, %q", code, out, errs)
	}
	interrupted, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	out, errs, code = rdsctl(interrupted, "--dir", dir, "ping", "-I", "127.0.0.97", "--roce-port", fmt.Sprint(port), "127.0.0.98")
	if code != 1 || out != "" || !strings.HasPrefix(errs, "rdsctl: 127.0.0.98 answered 0 of ") {
		t.Errorf("interrupted: status %d, %q, %q", code, out, errs)
	}
	for _, c := range [][]string{{"ping"}, {"ping", "-i", "0", "127.0.0.1"}, {"ping", "-i", "x", "127.0.0.1"}, {"ping", "-c", "-1", "127.0.0.1"}, {"ping", "-I", "me", "127.0.0.1"},
		{"ping", "--none", "127.0.0.1"}, {"ping", "--wait", "-1s", "127.0.0.1"}, {"ping", "-I", "::1", "127.0.0.1"}, {"ping", "fe80::1"}} {
		if _, errs, code := rdsctl(t.Context(), c...); code != 2 || errs == "" {
			t.Errorf("%v: status %d, %q", c, code, errs)
		}
	}
}

func TestParseInterval(t *testing.T) {
	for s, want := range map[string]time.Duration{"1": time.Second, "0.5": time.Second / 2, "10ms": 10 * time.Millisecond, "7us": 7 * time.Microsecond, "10msec": 10 * time.Millisecond, "7usec": 7 * time.Microsecond} {
		if d, err := parseInterval(s); err != nil || d != want {
			t.Errorf("%s: %v, %v", s, d, err)
		}
	}
}

// A trace is a pcapng file with as many packets as were asked for.
func TestTrace(t *testing.T) {
	dir, _, sock := world(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	traffic(t, sock)
	file := filepath.Join(t.TempDir(), "x.pcapng")
	if err := os.WriteFile(file, []byte("an old one"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := rdsctl(ctx, "--dir", dir, "trace", "-w", file, "-n", "25"); code != 2 || !strings.Contains(errs, "--pid") {
		t.Errorf("two to choose from: status %d, %q", code, errs)
	}
	if b, err := os.ReadFile(file); string(b) != "an old one" {
		t.Errorf("a trace that was none left %q of the old one, %v", b, err)
	}
	// Both Services are of this process: --pid does not tell them apart, their addresses do.
	for _, c := range []struct {
		args []string
		code int
		errs string
	}{
		{[]string{"--pid", fmt.Sprint(os.Getpid())}, 2, "--addr"},
		{[]string{"--addr", "127.0.0.94"}, 1, "has 127.0.0.94"},
		{[]string{"--addr", "here"}, 2, "here"},
		{[]string{"--addr", "127.0.0.95", "--pid", "1"}, 1, "no process"},
		{[]string{"--addr", "127.0.0.95", "-n", "25"}, 0, "25 packets"},
	} {
		if _, errs, code := rdsctl(ctx, append([]string{"--dir", dir, "trace", "-w", file}, c.args...)...); code != c.code || !strings.Contains(errs, c.errs) {
			t.Fatalf("%v: status %d, %q", c.args, code, errs)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := pcapgo.NewNgReader(f, pcapgo.DefaultNgReaderOptions)
	if err != nil || r.LinkType() != layers.LinkTypeRaw {
		t.Fatal(r.LinkType(), err)
	}
	got := 0
	var last time.Time
	for {
		data, ci, err := r.ReadPacketData()
		if err != nil {
			break
		}
		got++
		if data[0]>>4 != 4 || ci.Timestamp.Before(last) || time.Since(ci.Timestamp) > time.Minute {
			t.Errorf("packet %d at %v: %x", got, ci.Timestamp, data[:20])
		}
		last = ci.Timestamp
	}
	if got != 25 {
		t.Errorf("%d packets in the file", got)
	}
}

// Wireshark takes a trace apart down to RoCE's headers, whole packets and their beginnings alike, and finds nothing wrong with it. What it
// guesses about payloads, of RPC over RDMA and the like, is not asked for.
func TestTraceTshark(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("needs tshark")
	}
	dir, port, sock := world(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	traffic(t, sock)
	paths, err := rdsdebug.Discover(dir)
	if err != nil || len(paths) != 2 {
		t.Fatal(paths, err)
	}
	const packets = 60
	for _, full := range []bool{true, false} {
		file := filepath.Join(t.TempDir(), "x.pcapng")
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		sum, err := trace(ctx, rdsdebug.NewClient(paths[0]), f, packets, full)
		if err != nil || sum.packets != packets || sum.cut > 0 == full || f.Close() != nil {
			t.Fatalf("full %v: %+v, %v", full, sum, err)
		}
		cmd := exec.CommandContext(ctx, tshark, "-n", "-r", file, "-o", fmt.Sprintf("infiniband.rroce.port:%d", port), "--disable-protocol", "rpcordma,smb_direct,nvme-rdma,iser,lnet,smc", "-T", "fields", "-E", "separator=/s", "-E", "occurrence=f",
			"-e", "ip.src", "-e", "ip.dst", "-e", "infiniband.bth.opcode", "-e", "infiniband.bth.destqp", "-e", "_ws.malformed", "-e", "ip.checksum.status")
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir()) // whoever tests may have settings
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		opcodes := map[string]int{}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		for _, line := range lines {
			w := strings.Fields(line)
			if len(w) < 4 || len(w) > 5 || !(w[0] == "127.0.0.95" && w[1] == "127.0.0.96" || w[0] == "127.0.0.96" && w[1] == "127.0.0.95") || !strings.HasPrefix(w[3], "0x") {
				t.Errorf("full %v: %q", full, line)
				continue
			}
			opcodes[w[2]]++
		}
		// RC SEND first and last, or only, and acknowledgements.
		if len(lines) != packets || opcodes["17"] == 0 || opcodes["0"]+opcodes["4"] == 0 {
			t.Errorf("full %v: %d packets, by opcode %v", full, len(lines), opcodes)
		}
	}
}

func TestMan(t *testing.T) {
	dir := t.TempDir()
	if _, errs, code := rdsctl(t.Context(), "man", dir); code != 0 {
		t.Fatal(errs)
	}
	for _, name := range []string{"rdsctl.1", "rdsctl-info.1", "rdsctl-ping.1", "rdsctl-doctor.1", "rdsctl-trace.1"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Contains(b, []byte(".TH \"RDSCTL")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv(rdsdebug.RuntimeDirVar, "/somewhere/else")
	again := t.TempDir()
	if _, errs, code := rdsctl(t.Context(), "man", again); code != 0 {
		t.Fatal(errs)
	}
	one, err1 := os.ReadFile(filepath.Join(dir, "rdsctl-info.1"))
	two, err2 := os.ReadFile(filepath.Join(again, "rdsctl-info.1"))
	if err1 != nil || err2 != nil || !bytes.Equal(one, two) {
		t.Errorf("the manual depends on who writes it: %v, %v\n%s", err1, err2, two)
	}
	if _, errs, code := rdsctl(t.Context(), "pong"); code != 2 || !strings.Contains(errs, `"pong" is no command`) {
		t.Errorf("pong: status %d, %q", code, errs)
	}
	if out, _, code := rdsctl(t.Context(), "--version"); code != 0 || !strings.HasPrefix(out, "rdsctl version ") {
		t.Errorf("--version: status %d, %q", code, out)
	}
	if out, _, code := rdsctl(t.Context(), "completion", "bash"); code != 0 || !strings.Contains(out, "__start_rdsctl") {
		t.Errorf("completion: status %d", code)
	}
}

// healthy is a machine without findings, hardware included.
func healthy() fstest.MapFS {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: 0o666} }
	link := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: fs.ModeSymlink | 0o777} }
	return fstest.MapFS{
		"dev/infiniband/uverbs0":                                 file(""),
		"dev/infiniband/rdma_cm":                                 file(""),
		"sys/class/infiniband/mlx5_0/ports/1/gids/0":             file("fe80:0000:0000:0000:0000:0000:0000:0001\n"),
		"sys/class/infiniband/mlx5_0/ports/1/gids/1":             file(zeroGID + "\n"),
		"sys/class/infiniband/mlx5_0/ports/1/gid_attrs/types/0":  file("RoCE v2\n"),
		"sys/class/infiniband/mlx5_0/ports/1/link_layer":         file("Ethernet\n"),
		"sys/class/net/lo/mtu":                                   file("65536\n"),
		"sys/class/net/eth0/mtu":                                 file("9000\n"),
		"sys/class/net/eth0/operstate":                           file("up\n"),
		"proc/self/limits":                                       file("Limit   Soft Limit   Hard Limit   Units\nMax locked memory         unlimited            unlimited            bytes     \n"),
		"proc/sys/net/core/rmem_max":                             file("16777216\n"),
		"proc/sys/net/core/wmem_max":                             file("16777216\n"),
		"proc/net/udp":                                           file("  sl  local_address rem_address   st\n  1: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 100 2 0 0\n"),
		"proc/sys/vm/unprivileged_userfaultfd":                   file("1\n"),
		"proc/self/ns/net":                                       link("net:[4026531840]"),
		"proc/1/ns/net":                                          link("net:[4026531840]"),
		"sys/module/ib_core/refcnt":                              file("1\n"),
		"etc/modprobe.d/other.conf":                              file("# nothing\noptions snd power_save=1\n"),
		"proc/77/comm":                                           file("oracle\n"),
		"proc/77/fd/5":                                           link("socket:[4711]"),
		"sys/class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/0":  file("eth0\n"),
		"sys/class/infiniband/mlx5_0/ports/1/gid_attrs/types/99": file("\n"),
	}
}

// Each condition that doctor knows, made on an otherwise healthy machine, gives its finding and the line that mends it.
func TestDoctorConditions(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: 0o666} }
	set := func(kv ...string) func(fstest.MapFS) {
		return func(m fstest.MapFS) {
			for i := 0; i < len(kv); i += 2 {
				m[kv[i]] = file(kv[i+1])
			}
		}
	}
	drop := func(prefix string) func(fstest.MapFS) {
		return func(m fstest.MapFS) {
			for name := range m {
				if strings.HasPrefix(name, prefix) {
					delete(m, name)
				}
			}
		}
	}
	udp := func(addr string) func(fstest.MapFS) {
		return set("proc/net/udp", "  sl ...\n  1: "+addr+":12B7 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0\n")
	}
	for _, c := range []struct {
		name   string
		change func(fstest.MapFS)
		check  string
		level  level
		text   string
		mend   string
	}{
		{"no uverbs", drop("dev/infiniband/uverbs"), "hardware", warn, "uverbs", "modprobe ib_uverbs"},
		{"uverbs for root only", func(m fstest.MapFS) { m["dev/infiniband/uverbs0"].Mode = 0o600 }, "hardware", warn, "not for everybody", "chmod 0666 /dev/infiniband/uverbs0"},
		{"no rdma_cm", drop("dev/infiniband/rdma_cm"), "hardware", warn, "rdma_cm", "modprobe rdma_ucm"},
		{"no GID", set("sys/class/infiniband/mlx5_0/ports/1/gids/0", zeroGID), "gids", warn, "no GID", "ip address add ADDRESS/PREFIX dev eth0"},
		{"RoCE v1 only", set("sys/class/infiniband/mlx5_0/ports/1/gid_attrs/types/0", "IB/RoCE v1"), "gids", warn, "no RoCE v2", "cma_roce_mode"},
		{"memlock", set("proc/self/limits", "Max locked memory         65536                65536                bytes\n"), "memlock", bad, "65536", "ulimit -l unlimited"},
		{"small MTU", set("sys/class/net/eth0/mtu", "1500"), "mtu", note, "1024", "ip link set dev eth0 mtu 4200"},
		{"rmem", set("proc/sys/net/core/rmem_max", "212992"), "buffers", warn, "212992", "sysctl -w net.core.rmem_max=8388608"},
		{"wmem", set("proc/sys/net/core/wmem_max", "212992"), "buffers", warn, "212992", "sysctl -w net.core.wmem_max=1048576"},
		{"port taken everywhere", udp("00000000"), "port", bad, "77 (oracle)", "kill 77"},
		{"port taken on one address", udp("0100007F"), "port", note, "77 (oracle) on 127.0.0.1,", "kill 77"},
		{"port taken on one IPv6 address", func(m fstest.MapFS) {
			m["proc/net/udp6"] = file("  1: 000080FE00000000FF00FC0001000000:12B7 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0\n")
		}, "port", note, "77 (oracle) on fe80::fc:ff:0:1,", "kill 77"},
		{"port of rxe", func(m fstest.MapFS) {
			udp("00000000")(m)
			drop("proc/77")(m)
			set("sys/module/rdma_rxe/refcnt", "1")(m)
		}, "port", bad, "rdma_rxe", "modprobe -r rdma_rxe"},
		{"port taken, owner unknown", func(m fstest.MapFS) { udp("00000000")(m); drop("proc/77")(m) }, "port", bad, "another user", "sudo fuser -k 4791/udp"},
		{"kernel RDS over RDMA", set("sys/module/rds_rdma/refcnt", "1", "sys/module/rds/refcnt", "1"), "kernel-rds", warn, "own RDS", "modprobe -r rds_rdma"},
		{"RDS switched off", set("etc/modprobe.d/rds.conf", "install rds /bin/true\n"), "kernel-rds", note, "etc/modprobe.d/rds.conf", `sed -i 's/^[[:space:]]*install[[:space:]]\+rds\b/# &/' /etc/modprobe.d/rds.conf`},
		{"RDMA switched off", set("usr/lib/modprobe.d/no.conf", "blacklist ib_uverbs\n"), "kernel-rds", warn, "RDMA devices are switched off", `sed -i 's/^[[:space:]]*blacklist[[:space:]]\+ib_uverbs\b/# &/' /usr/lib/modprobe.d/no.conf && modprobe ib_uverbs`},
		{"namespace", func(m fstest.MapFS) { m["proc/self/ns/net"].Data = []byte("net:[1]") }, "namespace", warn, "not the initial", "rdma system set netns shared"},
		{"userfaultfd", set("proc/sys/vm/unprivileged_userfaultfd", "0"), "userfaultfd", warn, "root only", "sysctl -w vm.unprivileged_userfaultfd=1"},
		{"no userfaultfd", drop("proc/sys/vm"), "userfaultfd", warn, "no userfaultfd", "grep CONFIG_USERFAULTFD"},
		{"memlock unreadable", drop("proc/self/limits"), "memlock", note, "cannot be read", mendProc},
		{"rmem unreadable", drop("proc/sys/net/core/rmem"), "buffers", note, "rmem_max cannot be read", "nsenter --net --target 1 sysctl -w net.core.rmem_max=8388608"},
		{"namespace unreadable", drop("proc/1/ns"), "namespace", note, "cannot be told", "sudo rdsctl doctor"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := healthy()
			c.change(m)
			h := &host{FS: m, roce: 4791}
			found := false
			for _, ck := range checks {
				for _, f := range h.run(ck) {
					switch {
					case f.Check == c.check && f.Level == c.level && strings.Contains(f.Text, c.text) && c.mend != "" && strings.HasPrefix(f.Mend, c.mend):
						found = true
					case f.Level != fine:
						t.Errorf("also: %+v", f)
					}
				}
			}
			if !found {
				t.Error("not found")
			}
		})
	}
}

// A healthy machine has no findings, and one without hardware neither.
func TestDoctorHealthy(t *testing.T) {
	for _, m := range []fstest.MapFS{healthy(), func() fstest.MapFS {
		m := healthy()
		m["sys/module/rds/refcnt"] = &fstest.MapFile{Data: []byte("1")} // without RDMA it is in nobody's way
		return m
	}(), func() fstest.MapFS {
		m := healthy()
		for name := range m {
			if strings.HasPrefix(name, "sys/class/infiniband") || strings.HasPrefix(name, "dev/infiniband") {
				delete(m, name)
			}
		}
		return m
	}()} {
		h := &host{FS: m, roce: 4791}
		for _, c := range checks {
			for _, f := range h.run(c) {
				if f.Level != fine {
					t.Errorf("%+v", f)
				}
			}
		}
	}
}

// The line that mends a modprobe configuration does so: on a real file, and for modprobe's eyes.
func TestDoctorMendsModprobe(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs GNU sed")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "etc/modprobe.d/x.conf")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("blacklist rds\n  install \trds_rdma /bin/true\nblacklist rds_tcp\nalias net-pf-21 off\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	h := &host{FS: os.DirFS(dir)}
	findings := checkKernelRDS(h)
	if len(findings) != 3 {
		t.Fatalf("%+v", findings)
	}
	for _, f := range findings {
		line := strings.ReplaceAll(f.Mend, " /etc/", " "+dir+"/etc/")
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	if fs := checkKernelRDS(h); len(fs) != 1 || fs[0].Level != fine {
		t.Errorf("after it: %+v", fs)
	}
	if text := h.read("etc/modprobe.d/x.conf"); !strings.Contains(text, "\nblacklist rds_tcp\n") {
		t.Errorf("also: %s", text)
	}
}

// Numbers that sysctl files have are read whole.
func TestDoctorRealSysctl(t *testing.T) {
	const name = "proc/sys/net/core/rmem_max"
	b, err := os.ReadFile("/" + name)
	if err != nil {
		t.Skip(err)
	}
	h := &host{FS: os.DirFS("/")}
	if got, want := h.read(name), strings.TrimSpace(string(b)); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// On the real machine: a socket of this very process on the port is found, and named.
func TestDoctorRealPort(t *testing.T) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	port := c.LocalAddr().(*net.UDPAddr).Port
	out, errs, code := rdsctl(t.Context(), "doctor", "--json", "--roce-port", fmt.Sprint(port))
	var all []struct{ Check, Level, Text string }
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 1 {
		t.Fatalf("status %d, %v, %q", code, err, errs)
	}
	if i := slices.IndexFunc(all, func(f struct{ Check, Level, Text string }) bool { return f.Check == "port" && f.Level == "error" }); i < 0 || !strings.Contains(all[i].Text, fmt.Sprint(os.Getpid())) {
		t.Errorf("%s", out)
	}
	for _, c := range checks {
		if !slices.ContainsFunc(all, func(f struct{ Check, Level, Text string }) bool { return f.Check == c.name }) && c.name != "gids" && c.name != "mtu" {
			t.Errorf("nothing about %s", c.name)
		}
	}
}
