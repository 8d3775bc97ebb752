package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// command is rds-bench with args, as a process of its own.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), mainEnv+"=1")
	return cmd
}

// runCommand runs it to its end.
func runCommand(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := command(t, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// quick are flags of a measurement that is over soon, between addresses of tests.
var quick = []string{"--duration", "200ms", "--warmup", "20ms"}

var localAddrs = testClientAddr + "," + testServerAddr

func TestCommandLocal(t *testing.T) {
	stdout, stderr, code := runCommand(t, append(quick, "--addr", localAddrs, "--json", "--verify", "--compare", "tcp,udp", "--sizes", "64,4KiB,16KiB,"+strconv.Itoa(bulk))...)
	if code != 0 || stderr != "" {
		t.Fatalf("exit status %d, standard error:\n%s", code, stderr)
	}
	checkSchema(t, []byte(stdout), 4*2*3)
	if n := strings.Count(stdout, `"verified": true`); n != 4*2*3 {
		t.Errorf("%d of 24 runs are verified", n)
	}
}

func TestCommandTable(t *testing.T) {
	stdout, stderr, code := runCommand(t, append(quick, "--addr", localAddrs, "--sizes", "64,4KiB", "--bidir", "--sockets", "2", "--depth", "16", "--dialect", "kernel")...)
	if code != 0 || stderr != "" {
		t.Fatalf("exit status %d, standard error:\n%s", code, stderr)
	}
	for _, want := range []string{"kernel dialect, 2 socket(s), depth 16, both directions", "messages/s", "p99.9 µs", "64 B   rds", "4 KiB   rds", "tcp"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the output does not have %q:\n%s", want, stdout)
		}
	}
}

// One clear line and a status that is not 0.
func TestCommandErrors(t *testing.T) {
	used, err := net.Listen("tcp", testServerAddr+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	// RoCE's port on the client's address is somebody else's.
	roce, err := net.ListenPacket("udp", testClientAddr+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer roce.Close()
	rocePort := strconv.Itoa(roce.LocalAddr().(*net.UDPAddr).Port)
	free, err := net.Listen("tcp", testServerAddr+":0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := free.Addr().String()
	free.Close()

	for _, tc := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"unknown flag", []string{"--speed"}, 2, "unknown flag: --speed"},
		{"unknown flag of a subcommand", []string{"client", "--speed"}, 2, "unknown flag: --speed"},
		{"bad size", []string{"--sizes", "64,2MiB"}, 2, `"2MiB" is not a size`},
		{"bad baseline", []string{"--compare", "sctp"}, 2, `"sctp" is none of tcp, udp, quic, none`},
		{"bad dialect", []string{"--dialect", "latin"}, 2, `"latin" is neither kernel nor open`},
		{"RDS beside itself", []string{"--compare", "rds"}, 2, "rds is what is measured"},
		{"bad operation", []string{"--rdma", "send"}, 2, `"send" is neither read nor write`},
		{"on-demand paging of nothing", []string{"--odp"}, 2, "--odp is about the memory of --rdma"},
		{"operation too long", []string{"--rdma", "read", "--rdma-size", "2MiB"}, 2, `"2MiB" is not a size`},
		{"too much memory", []string{"--rdma", "read", "--sockets", "1000"}, 2, "need more than 1024 MiB"},
		{"bad chaos", []string{"--chaos", "monkeys"}, 2, `"monkeys" is not devices`},
		{"load without a rate", []string{"--tests", "load"}, 2, "--rate is for --tests load, and needed there"},
		{"bad rate", []string{"--rate", "fast"}, 2, `"fast" is not a rate`},
		{"bad interval", []string{"--interval", "1ms"}, 2, "--interval: 1ms is less than"},
		{"bad format", []string{"--format", "xml"}, 2, `"xml" is none of text, json, ndjson, csv, gobench`},
		{"two formats", []string{"--format", "csv", "--json"}, 2, "--json and --format csv"},
		{"bad condition", []string{"--fail-if", "p99"}, 2, "no comparison"},
		{"condition on nothing", []string{"--fail-if", "quic:p99>1ms"}, 2, "nothing that is measured has this"},
		{"report into nowhere", []string{"--addr", localAddrs, "--report", "/nowhere/x.html"}, 1, "/nowhere/x.html"},
		{"several", []string{"--sockets", "0", "--duration", "-1s"}, 2, "--sockets: 0 is not between 1 and 1024; --duration: -1s is not positive"},
		{"one address", []string{"--addr", "127.0.0.1"}, 2, "not two addresses"},
		{"same address twice", []string{"--addr", "127.0.0.1,127.0.0.1"}, 2, "an address each"},
		{"addresses of two IPs", []string{"--addr", "127.0.0.1,::1"}, 2, "different IP versions"},
		{"UDP over IPv6", []string{"client", "--compare", "tcp,udp", "::1"}, 2, "udp knows IPv4 only"},
		{"client with an address of the other IP", []string{"client", "--addr", "::1", "127.0.0.1"}, 2, "different IP versions"},
		{"wrong command", []string{"now"}, 2, `"now" is no command`},
		{"unexpected argument", []string{"server", "now"}, 2, `unexpected argument "now"`},
		{"manual into nothing", []string{"man"}, 2, "needs a directory"},
		{"client without a server", []string{"client"}, 2, "needs the server's address"},
		{"client with a bad port", []string{"client", "127.0.0.1:http"}, 2, `"http" is not a port`},
		{"server with a bad address", []string{"server", "--addr", "here"}, 2, "--addr"},
		{"peer that is not there", []string{"client", nobody}, 1, "connection refused"},
		{"address in use", []string{"server", "--addr", used.Addr().String()}, 1, "address already in use"},
		{"address of nobody", []string{"--addr", testClientAddr + ",192.0.2.1"}, 1, "192.0.2.1"},
		{"RoCE port in use", []string{"--addr", localAddrs, "--roce-port", rocePort}, 1, testClientAddr + ":" + rocePort},
		{"profile into nowhere", []string{"--addr", localAddrs, "--cpuprofile", "/nowhere/x"}, 1, "/nowhere/x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stdout, stderr, code := runCommand(t, tc.args...)
			if code != tc.code || stdout != "" {
				t.Errorf("exit status %d, want %d; standard output:\n%s", code, tc.code, stdout)
			}
			if !strings.Contains(stderr, tc.want) || strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "rds-bench: ") {
				t.Errorf("standard error is not one line with %q:\n%s", tc.want, stderr)
			}
		})
	}
}

// Whoever packages this finds a version and a manual, without what is not for people.
func TestCommandManual(t *testing.T) {
	if stdout, _, code := runCommand(t, "--version"); code != 0 || !strings.HasPrefix(stdout, "rds-bench version ") {
		t.Errorf("exit status %d, %q", code, stdout)
	}
	dir := t.TempDir()
	if _, stderr, code := runCommand(t, "man", dir); code != 0 {
		t.Fatal(stderr)
	}
	for _, name := range []string{"rds-bench.1", "rds-bench-stress.1", "rds-bench-server.1", "rds-bench-client.1"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(b), `.TH "RDS-BENCH`) || strings.Contains(string(b), "child") {
			t.Errorf("%s: %v\n%s", name, err, b)
		}
	}
}

// startServer runs the server subcommand and returns its control address.
func startServer(t *testing.T) netip.AddrPort {
	t.Helper()
	cmd := command(t, "server", "--addr", testServerAddr+":0")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server after an interrupt: %v", err)
		}
	})
	line, err := bufio.NewReader(stderr).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	_, addr, ok := strings.Cut(strings.TrimSpace(line), "control=")
	if !ok {
		t.Fatalf("the server says %q", line)
	}
	control, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return control
}

func TestCommandTwoHosts(t *testing.T) {
	control := startServer(t)
	for range 2 { // one after another
		stdout, stderr, code := runCommand(t, append(quick, "client", control.String(), "--addr", testClientAddr, "--sizes", "64", "--json", "--verify")...)
		if code != 0 || stderr != "" {
			t.Fatalf("exit status %d, standard error:\n%s", code, stderr)
		}
		checkSchema(t, []byte(stdout), 4)
	}
}

func TestCommandServerBusy(t *testing.T) {
	control := startServer(t)
	first, err := net.Dial("tcp", control.String())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	// Its hello is answered when it is the server's client.
	c := newControlConn(first)
	if err := c.write(request{Op: opHello, Version: controlVersion, RDS: &rdsOptions{Dialect: dialectOpen, Port: 4791}}); err != nil {
		t.Fatal(err)
	}
	var res response
	if err := c.read(&res); err != nil || res.Error != "" {
		t.Fatal(err, res.Error)
	}
	_, stderr, code := runCommand(t, "client", control.String(), "--addr", testClientAddr)
	if code != 1 || !strings.Contains(stderr, "busy with another client") {
		t.Errorf("exit status %d, standard error:\n%s", code, stderr)
	}
}

func TestCommandInterrupt(t *testing.T) {
	cmd := command(t, "--addr", localAddrs, "--duration", "400ms", "--warmup", "0s", "--json", "--sizes", "64,64,64,64,64,64,64,64,64,64")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	interrupt := time.AfterFunc(1500*time.Millisecond, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	defer interrupt.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v; standard error:\n%s", err, errOut.String())
	}
	var done, of int
	if _, err := fmt.Sscanf(errOut.String(), "rds-bench: interrupted after %d of %d runs\n", &done, &of); err != nil || done < 1 || of != 40 {
		t.Errorf("standard error: %q", errOut.String())
	}
	checkSchema(t, out.Bytes(), done)
}

// A parent that is killed takes its child with it, and the child's RoCE port is free again.
func TestCommandParentKilled(t *testing.T) {
	if !hasUDPTable() {
		t.Skip("needs /proc/net/udp")
	}
	cmd := command(t, "--addr", localAddrs, "--duration", "1m", "--sizes", "64")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the child has opened its device", func() bool { return udpBound(t, testServerAddr, 4791) })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	waitFor(t, "the child has gone", func() bool { return !udpBound(t, testServerAddr, 4791) })
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

const udpTable = "/proc/net/udp"

func hasUDPTable() bool {
	_, err := os.Stat(udpTable)
	return err == nil
}

// udpBound reports whether some process has a UDP socket bound to addr and port, without binding one itself, which
// could get into the way of the process that is about to.
func udpBound(t *testing.T, addr string, port int) bool {
	t.Helper()
	b, err := os.ReadFile(udpTable)
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr(addr).As4()
	// The address is printed as the number that its bytes are in memory.
	return strings.Contains(string(b), fmt.Sprintf(" %08X:%04X ", binary.NativeEndian.Uint32(a[:]), port))
}
