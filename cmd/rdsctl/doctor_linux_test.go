package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func init() { children["doctor"] = sickHost }

// sickHost makes what doctor looks for, on the real machine, in namespaces of its own, and runs it.
func sickHost() int {
	fail := func(what string, err error) int {
		fmt.Fprintln(os.Stderr, what+":", err)
		return 99
	}
	// /sys shows the interfaces of the namespace that has mounted it.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fail("private mounts", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fail("mounting /sys", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		return fail("memlock", err)
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "small0"}, PeerName: "large0"}); err != nil {
		return fail("veth", err)
	}
	for name, mtu := range map[string]int{"small0": 1500, "large0": 9000} {
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetMTU(l, mtu)
		}
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			return fail(name, err)
		}
	}
	// Everything of this user that is configured for modprobe.
	conf := os.Getenv("RDSCTL_TEST_CONF")
	if err := os.WriteFile(filepath.Join(conf, "openrds-test.conf"), []byte("blacklist rdma_ucm\ninstall rds /bin/false\n"), 0o644); err != nil {
		return fail("modprobe", err)
	}
	if err := os.MkdirAll("/etc/modprobe.d", 0o755); err != nil {
		return fail("modprobe", err)
	}
	if err := unix.Mount(conf, "/etc/modprobe.d", "", unix.MS_BIND, ""); err != nil {
		return fail("modprobe", err)
	}
	c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 4791})
	if err != nil {
		return fail("port 4791", err)
	}
	defer c.Close()
	return run(context.Background(), []string{"doctor", "--json"}, os.Stdout, os.Stderr)
}

// On the real machine, in namespaces of its own: a limit of locked memory, a small MTU, port 4791 taken, modules switched off.
func TestRootDoctor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"=doctor", "RDSCTL_TEST_CONF="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, _ := cmd.Output()
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Fatalf("status %d: %s", code, stderr.String())
	}
	var all []struct{ Check, Level, Text, Mend string }
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []struct{ check, level, text, mend string }{
		{"memlock", "", "65536 bytes", "ulimit -l unlimited"}, // an error where there is hardware
		{"mtu", "note", "small0 has MTU 1500: packets carry 1024 bytes", "ip link set dev small0 mtu 4200"},
		{"mtu", "ok", "large0 has MTU 9000", ""},
		{"port", "error", fmt.Sprintf("UDP port 4791 is taken by process %d ", cmd.Process.Pid), fmt.Sprintf("kill %d", cmd.Process.Pid)},
		{"kernel-rds", "warning", "(blacklist rdma_ucm)", "sed -i "},
		{"kernel-rds", "note", "(install rds /bin/false)", "sed -i "},
		{"namespace", "", "network namespace", ""},
	} {
		found := false
		for _, f := range all {
			if f.Check == want.check && (want.level == "" || f.Level == want.level) && strings.Contains(f.Text, want.text) && strings.HasPrefix(f.Mend, want.mend) {
				found = true
			}
		}
		if !found {
			t.Errorf("no finding like %v in %s", want, out)
		}
	}
	for _, f := range all {
		if (f.Level == "ok") != (f.Mend == "") {
			t.Errorf("%s: level %s, mend %q", f.Text, f.Level, f.Mend)
		}
	}
}
