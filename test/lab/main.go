//go:build linux

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The process's role is in the environment: none for the one the user started.
const (
	roleEnv    = "OPENRDS_LAB_ROLE"
	roleInside = "inside" // in the namespaces: runs the tests
	roleAgent  = "agent"  // process one of a guest
	roleRun    = "run"    // a Program in a guest; its name is the first argument

	kernelEnv = "OPENRDS_LAB_KERNEL" // directory of the unpacked kernel package
	workEnv   = "OPENRDS_LAB_WORK"   // temporary directory
)

// Program is a main function of the test binary that Guest.StartProgram runs in a guest: args as in
// os.Args[1:], the result is the exit status.
type Program func(args []string) int

// Runner is *testing.M, or what else wants to run inside a lab.
type Runner interface{ Run() int }

// skip says why there is no lab ("" if there is one). Written once, before tests run.
var skip string

// Main is the main function of a process that uses the package; it does not return. It prepares tools and
// kernel, runs r in fresh namespaces, and, in a guest, is the agent and the programs.
//
// A process without root runs r outside of any lab; Boot and Need then skip. With root everything else
// missing (a tool that apt cannot install, the kernel package) is fatal, said in one line.
func Main(r Runner, programs map[string]Program) {
	switch os.Getenv(roleEnv) {
	case roleAgent:
		agentMain()
	case roleRun:
		p := programs[os.Args[1]]
		if p == nil {
			fatalf("no program %q", os.Args[1])
		}
		os.Exit(p(os.Args[2:]))
	case roleInside:
		if err := enterNamespaces(); err != nil {
			fatalf("%v", err)
		}
		os.Exit(r.Run())
	}
	if os.Geteuid() != 0 {
		skip = "needs root (namespaces, tap devices)"
		os.Exit(r.Run())
	}
	os.Exit(outside())
}

func fatalf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "lab: "+format+"\n", args...)
	os.Exit(1)
}

// Need skips the test, by name of what is missing, where there is no lab.
func Need(t testing.TB) {
	t.Helper()
	switch {
	case skip != "":
		t.Skip("lab: " + skip)
	case os.Getenv(roleEnv) != roleInside:
		t.Fatal("lab: TestMain does not call lab.Main")
	}
}

// outside prepares what needs the host's network, then runs this program again in namespaces of its own and
// returns its exit status.
func outside() int {
	kernel, err := prepare()
	if err != nil {
		fatalf("%v", err)
	}
	work, err := os.MkdirTemp("", "openrds-lab-")
	if err != nil {
		fatalf("%v", err)
	}
	defer os.RemoveAll(work)

	// The kernel kills the child when the thread that forked it ends: pin it.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), roleEnv+"="+roleInside, kernelEnv+"="+kernel, workEnv+"="+work)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// The end of the first process of a PID namespace is the end of all of them, guests included, and the
		// network namespace goes with its last process.
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		fatalf("namespaces: %v", err)
	}
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	go func() {
		for s := range sigs {
			_ = cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	signal.Stop(sigs)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	return 1
}

// enterNamespaces gives the new namespaces a /proc and a /sys of their own, brings lo up and makes the link.
func enterNamespaces() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	if err := ip("link", "set", "lo", "up"); err != nil {
		return err
	}
	return makeLink()
}

// ip runs ip(8).
func ip(args ...string) error {
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// workPath is a path in the lab's temporary directory.
func workPath(elem ...string) string {
	return filepath.Join(append([]string{os.Getenv(workEnv)}, elem...)...)
}
