//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bootLimit    = 90 * time.Second // a busy machine emulates slowly
	commandLimit = 60 * time.Second // of Guest.Run
	hangLimit    = 10 * time.Second // for an answer the guest always gives
)

// Config are the parameters of a guest. The zero value is the documented default.
type Config struct {
	MTU    int // Ethernet MTU of the link, 0: 4500 (path MTU 4096); 1500 gives path MTU 1024
	Memory int // MiB, 0: 1024
	// Modules are loaded in order with modprobe; nil: DefaultModules.
	Modules []string
	// NoRXE leaves the guest without an rxe device.
	NoRXE bool

	shell bool
}

// DefaultModules make a guest with rxe, verbs for user space, and RDS over both transports.
var DefaultModules = []string{"crc32_generic", "rdma_rxe", "ib_uverbs", "rdma_ucm", "rds", "rds_rdma", "rds_tcp", "sch_netem"}

// Guest is a running machine.
type Guest struct {
	number  int // place on the link, from 1
	mtu     int
	qemu    *exec.Cmd
	console string // file
	port    *os.File
	exited  chan struct{} // closed when QEMU has ended
	ready   chan struct{} // closed when the agent has said hello
	closed  atomic.Bool   // by Close: there is no log any more

	encMu sync.Mutex
	enc   *gob.Encoder

	mu     sync.Mutex // guards below
	procs  map[uint32]*Process
	nextID uint32
	dead   error // why there is no agent any more

	logMu  sync.Mutex
	logPos int // bytes of the kernel's log CheckLog has seen
}

// Boot starts a guest for t, which it ends with; MaxGuests may run at the same time and reach each other. Without root it
// skips t; a guest that does not start fails it.
func Boot(t testing.TB, cfg Config) *Guest {
	t.Helper()
	Need(t)
	g, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !g.closed.Load() {
			g.CheckLog(t)
		}
		g.Close()
	})
	return g
}

// Start boots a guest; it returns once the link is configured and the rxe device is up.
func Start(ctx context.Context, cfg Config) (g *Guest, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if cfg.MTU == 0 {
		cfg.MTU = 4500
	}
	if cfg.Modules == nil {
		cfg.Modules = DefaultModules
	}
	g = &Guest{
		mtu:    cfg.MTU,
		exited: make(chan struct{}),
		ready:  make(chan struct{}),
		procs:  make(map[uint32]*Process),
	}
	if err := g.plug(); err != nil {
		return nil, fmt.Errorf("lab guest: %w", err)
	}
	g.console = workPath("console" + strconv.Itoa(g.number))
	if err := g.startQEMU(cfg); err != nil {
		g.unplug()
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("lab guest: %w; its console ends:\n%s", err, g.consoleTail(30))
			g.Close()
		}
	}()
	select {
	case <-g.ready:
	case <-g.exited:
		return g, errors.New("QEMU ended")
	case <-ctx.Done():
		return g, fmt.Errorf("no sign of life after %v", bootLimit)
	}
	if err := g.loadModules(ctx, cfg.Modules); err != nil {
		return g, err
	}
	for _, argv := range g.linkCommands() {
		if _, err := g.Output(ctx, argv...); err != nil {
			return g, err
		}
	}
	if !cfg.NoRXE {
		if err := g.AddRXE(ctx); err != nil {
			return g, err
		}
	}
	return g, nil
}

func (g *Guest) linkCommands() [][]string {
	return [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/" + GuestLink + "/keep_addr_on_down"},
		{"ip", "link", "set", GuestLink, "mtu", fmt.Sprint(g.mtu), "up"},
		{"ip", "addr", "add", g.Addr4() + "/24", "dev", GuestLink},
		{"ip", "addr", "add", g.Addr6() + "/64", "dev", GuestLink, "nodad"},
	}
}

func (g *Guest) startQEMU(cfg Config) error {
	kernel := os.Getenv(kernelEnv)
	release, err := kernelRelease(kernel)
	if err != nil {
		return err
	}
	initrd, err := initrdPath()
	if err != nil {
		return err
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	cmdline := []string{
		// A busy machine emulates timers so late that the kernel takes them for broken, and says "bug".
		"no_timer_check", "console=ttyS0", "loglevel=5", "panic=-1", "net.ifnames=0", "nokaslr", "mitigations=off", "random.trust_cpu=on",
		roleEnv + "=" + roleAgent, "OPENRDS_LAB_EXE=" + exe,
	}
	serial := []string{"-chardev", "file,id=console,path=" + g.console}
	if cfg.shell {
		cmdline = append(cmdline, shellEnv+"=1")
		serial = []string{"-chardev", "stdio,id=console,mux=on,signal=off", "-mon", "chardev=console"}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	g.port = os.NewFile(uintptr(fds[0]), "agent")
	theirs := os.NewFile(uintptr(fds[1]), "agent of guest")
	defer theirs.Close()
	memory := cfg.Memory
	if memory == 0 {
		memory = 1024
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		// Emulation, always: /dev/kvm being there, and making machines, does not say that they run.
		"-machine", "pc", "-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1", "-m", fmt.Sprint(memory),
		"-kernel", filepath.Join(kernel, "boot", "vmlinuz-"+release), "-initrd", initrd, "-append", strings.Join(cmdline, " "),
		"-serial", "chardev:console",
		"-chardev", "socket,id=agent,fd=3", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,nr=1",
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=root,mount_tag=host",
		"-netdev", "tap,id=net,ifname=" + g.tap() + ",script=no,downscript=no,vnet_hdr=off", "-device", "virtio-net-pci,netdev=net,mac=" + g.mac() + ",romfile=",
		"-device", "virtio-rng-pci",
	}
	g.qemu = exec.Command("qemu-system-x86_64", append(args, serial...)...)
	g.qemu.ExtraFiles = []*os.File{theirs}
	var stderr bytes.Buffer
	g.qemu.Stderr = &stderr
	if cfg.shell {
		g.qemu.Stdin, g.qemu.Stdout, g.qemu.Stderr = os.Stdin, os.Stdout, os.Stderr
	}
	g.enc = gob.NewEncoder(g.port)
	if err := g.qemu.Start(); err != nil {
		g.port.Close()
		return fmt.Errorf("qemu: %w", err)
	}
	go g.receive()
	go func() {
		err := g.qemu.Wait()
		g.lost(fmt.Errorf("the guest is gone (qemu: %v %s)", err, strings.TrimSpace(stderr.String())))
		g.port.Close()
		g.unplug()
		close(g.exited)
	}()
	return nil
}

// receive hands the agent's reports to their processes.
func (g *Guest) receive() {
	dec := gob.NewDecoder(g.port)
	for {
		var r report
		if err := dec.Decode(&r); err != nil {
			g.lost(fmt.Errorf("the guest's agent is gone: %w", err))
			return
		}
		if r.Kind == repHello {
			close(g.ready)
			continue
		}
		g.mu.Lock()
		p := g.procs[r.ID]
		if r.Kind == repExit {
			delete(g.procs, r.ID)
		}
		g.mu.Unlock()
		if p != nil {
			p.report(&r)
		}
	}
}

// lost ends all processes with err.
func (g *Guest) lost(err error) {
	g.mu.Lock()
	if g.dead == nil {
		g.dead = err
	}
	procs := g.procs
	g.procs = nil
	g.mu.Unlock()
	for _, p := range procs {
		p.report(&report{Kind: repExit, Err: err.Error()})
	}
}

func (g *Guest) request(r *request) error {
	g.encMu.Lock()
	defer g.encMu.Unlock()
	_ = g.port.SetWriteDeadline(time.Now().Add(hangLimit))
	if err := g.enc.Encode(r); err != nil {
		return fmt.Errorf("lab guest: %w", err)
	}
	return nil
}

// Close kills the machine and removes its end of the link. Twice is once.
func (g *Guest) Close() error {
	g.closed.Store(true)
	_ = g.qemu.Process.Kill()
	<-g.exited
	return nil
}

// Freeze stops the machine, all of it, and returns what lets it go on. To its kernel the time in between has passed
// unseen, as on a host whose hypervisor is busy elsewhere.
func (g *Guest) Freeze(t testing.TB) (thaw func()) {
	t.Helper()
	signal := func(s syscall.Signal) {
		if err := g.qemu.Process.Signal(s); err != nil {
			t.Errorf("the guest's machine: %v", err)
		}
	}
	signal(syscall.SIGSTOP)
	var once sync.Once
	thaw = func() { once.Do(func() { signal(syscall.SIGCONT) }) }
	t.Cleanup(thaw)
	return thaw
}

// Wait waits until the machine has stopped by itself.
func (g *Guest) Wait() { <-g.exited }

// Process is a command running in a guest.
type Process struct {
	g       *Guest
	id      uint32
	argv    []string
	out     *spool
	errMu   sync.Mutex
	errText bytes.Buffer
	done    chan struct{}
	err     error // valid when done is closed
}

// ExitError is a command that did not end with status 0.
type ExitError struct {
	Argv   []string
	Code   int    // exit status; -1 if there is none
	Reason string // why there is none
	Stderr string
}

func (e *ExitError) Error() string {
	s := fmt.Sprintf("%s: exit status %d", strings.Join(e.Argv, " "), e.Code)
	if e.Reason != "" {
		s = fmt.Sprintf("%s: %s", strings.Join(e.Argv, " "), e.Reason)
	}
	if e.Stderr != "" {
		s += ": " + strings.TrimSpace(e.Stderr)
	}
	return s
}

// Start starts a command: a path on the host's file system, or a name that is looked up in the guest's
// PATH. Its standard input is Process.Write, its output Process.Read.
func (g *Guest) Start(argv ...string) (*Process, error) { return g.start(nil, argv) }

// StartProgram starts one of the programs given to Main.
func (g *Guest) StartProgram(name string, args ...string) (*Process, error) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	return g.start([]string{roleEnv + "=" + roleRun}, append([]string{exe, name}, args...))
}

func (g *Guest) start(env, argv []string) (*Process, error) {
	p := &Process{g: g, argv: argv, out: newSpool(), done: make(chan struct{})}
	g.mu.Lock()
	if g.dead != nil {
		g.mu.Unlock()
		return nil, g.dead
	}
	g.nextID++
	p.id = g.nextID
	g.procs[p.id] = p
	g.mu.Unlock()
	if err := g.request(&request{ID: p.id, Kind: reqStart, Argv: argv, Env: env}); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Process) report(r *report) {
	switch r.Kind {
	case repStdout:
		_, _ = p.out.Write(r.Data)
	case repStderr:
		p.errMu.Lock()
		p.errText.Write(r.Data)
		p.errMu.Unlock()
	case repExit:
		if r.Code != 0 || r.Err != "" {
			code := r.Code
			if r.Err != "" {
				code = -1
			}
			p.err = &ExitError{Argv: p.argv, Code: code, Reason: r.Err, Stderr: p.Stderr()}
		}
		p.out.Close()
		close(p.done)
	}
}

// Write gives b to the command's standard input; it does not wait for the command to read it.
func (p *Process) Write(b []byte) (int, error) {
	if err := p.g.request(&request{ID: p.id, Kind: reqStdin, Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// CloseWrite ends the command's standard input.
func (p *Process) CloseWrite() error { return p.g.request(&request{ID: p.id, Kind: reqEOF}) }

// Output is what the command has written to its standard output and Read has not taken.
func (p *Process) Output() string {
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	return string(p.out.buf)
}

// Read reads the command's standard output; io.EOF when it has ended.
func (p *Process) Read(b []byte) (int, error) { return p.out.Read(b) }

// Stderr is what the command has written to its standard error so far.
func (p *Process) Stderr() string {
	p.errMu.Lock()
	defer p.errMu.Unlock()
	return p.errText.String()
}

// Signal sends a signal to the command and its children.
func (p *Process) Signal(s syscall.Signal) error {
	return p.g.request(&request{ID: p.id, Kind: reqSignal, Signal: int(s)})
}

// Done is closed when the command has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits until the command has ended: nil, or an *ExitError. When ctx ends first the command is killed
// and the error is ctx's; a guest that cannot even do that is killed itself.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
	}
	if p.Signal(syscall.SIGKILL) == nil {
		select {
		case <-p.done:
			return fmt.Errorf("%s: %w: %s", strings.Join(p.argv, " "), ctx.Err(), strings.TrimSpace(p.Stderr()))
		case <-time.After(hangLimit):
		}
	}
	_ = p.g.qemu.Process.Kill()
	return fmt.Errorf("%s: %w, and the guest hangs", strings.Join(p.argv, " "), ctx.Err())
}

// Output runs a command and returns its standard output.
func (g *Guest) Output(ctx context.Context, argv ...string) ([]byte, error) {
	p, err := g.Start(argv...)
	if err != nil {
		return nil, err
	}
	err = p.Wait(ctx)
	out, _ := io.ReadAll(p)
	return out, err
}

// Run runs a command for t, with a limit of a minute, and returns its standard output. A status
// other than 0 fails t.
func (g *Guest) Run(t testing.TB, argv ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), commandLimit)
	defer cancel()
	out, err := g.Output(ctx, argv...)
	if err != nil {
		t.Fatalf("in the guest: %v\n%s", err, out)
	}
	return string(out)
}

// ReadFile fetches a file of the guest, one under /sys or /run for instance.
func (g *Guest) ReadFile(t testing.TB, path string) string {
	t.Helper()
	return g.Run(t, "cat", path)
}

// Sysctl sets a kernel parameter of the guest, named with dots.
func (g *Guest) Sysctl(t testing.TB, name, value string) {
	t.Helper()
	g.Run(t, "sh", "-c", fmt.Sprintf("echo %s > /proc/sys/%s", value, strings.ReplaceAll(name, ".", "/")))
}

func (g *Guest) loadModules(ctx context.Context, modules []string) error {
	modules = append([]string{"virtio_net", "virtio_rng"}, modules...)
	// What the kernel asks for by itself (queueing disciplines, devices) is in the unpacked package too.
	const helper = "/run/modprobe"
	script := fmt.Sprintf("printf '#!/bin/sh\\nexec /sbin/modprobe -d %s \"$@\"\\n' > %s && chmod +x %[2]s && echo %[2]s > /proc/sys/kernel/modprobe", os.Getenv(kernelEnv), helper)
	if _, err := g.Output(ctx, "sh", "-c", script); err != nil {
		return err
	}
	if _, err := g.Output(ctx, append([]string{"modprobe", "-a", "-d", os.Getenv(kernelEnv)}, modules...)...); err != nil {
		return err
	}
	return nil
}

// AddRXE makes the guest's soft RoCE device on its link.
func (g *Guest) AddRXE(ctx context.Context) error {
	_, err := g.Output(ctx, "rdma", "link", "add", RXE, "type", "rxe", "netdev", GuestLink)
	return err
}

// Impair has the guest's link treat packets in both directions as netem's arguments say ("loss", "1%") until t
// ends. Both are bent through ifb devices, so that the sender is not told of a drop: a queueing discipline on the
// device itself reports it to rxe's transmit call.
func (g *Guest) Impair(t testing.TB, netem ...string) {
	t.Helper()
	g.Run(t, "tc", "qdisc", "add", "dev", GuestLink, "clsact")
	for _, dir := range []string{"ingress", "egress"} {
		ifb := "ifb-" + dir
		g.Run(t, "ip", "link", "add", ifb, "type", "ifb")
		g.Run(t, "ip", "link", "set", ifb, "up", "txqueuelen", "16384")
		g.Run(t, append([]string{"tc", "qdisc", "add", "dev", ifb, "root", "netem", "limit", "16384"}, netem...)...)
		g.Run(t, "tc", "filter", "add", "dev", GuestLink, dir, "matchall", "action", "mirred", "egress", "redirect", "dev", ifb)
	}
	t.Cleanup(func() {
		g.Run(t, "tc", "qdisc", "del", "dev", GuestLink, "clsact")
		g.Run(t, "ip", "link", "del", "ifb-ingress")
		g.Run(t, "ip", "link", "del", "ifb-egress")
	})
}

// Silence has the link carry nothing for a while: the host's end is down, which no guest can see.
func (g *Guest) Silence(t testing.TB, d time.Duration) {
	t.Helper()
	if err := ip("link", "set", HostLink, "down"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
	if err := ip("link", "set", HostLink, "up"); err != nil {
		t.Fatal(err)
	}
}

// SetMTU sets the Ethernet MTU of the whole link, all guests' ends included.
func (g *Guest) SetMTU(t testing.TB, mtu int) {
	t.Helper()
	for _, other := range running() {
		if other.mtu == mtu {
			continue
		}
		for _, dev := range []string{other.tap(), HostLink} {
			if err := ip("link", "set", dev, "mtu", fmt.Sprint(mtu)); err != nil {
				t.Fatal(err)
			}
		}
		other.Run(t, "ip", "link", "set", GuestLink, "mtu", fmt.Sprint(mtu))
		other.mtu = mtu
	}
}

// Release is the guest's kernel release and version, as uname -rv says it.
func (g *Guest) Release(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(g.Run(t, "uname", "-rv"))
}

// Counters are the hardware counters of the guest's rxe device by name.
func (g *Guest) Counters(t testing.TB) map[string]uint64 {
	t.Helper()
	dir := "/sys/class/infiniband/" + RXE + "/ports/1/hw_counters"
	out := make(map[string]uint64)
	for line := range strings.Lines(g.Run(t, "sh", "-c", "cd "+dir+" && grep -H . *")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		var n uint64
		if _, err := fmt.Sscan(value, &n); err == nil {
			out[name] = n
		}
	}
	return out
}

// complaints in a kernel's log that no test provokes on purpose: faults of the kernel itself, and rxe
// complaining about a packet's ICRC.
var complaints = regexp.MustCompile(`(?i)\b(bug:|oops|warning:|general protection|call trace|kasan|hung task|bad icrc|icrc)`)

// CheckLog fails t for each complaint that the guest's kernel has logged since the last call.
func (g *Guest) CheckLog(t testing.TB) {
	t.Helper()
	g.logMu.Lock()
	defer g.logMu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), hangLimit)
	defer cancel()
	out, err := g.Output(ctx, "dmesg")
	if err != nil {
		t.Errorf("the guest's log: %v; its console ends:\n%s", err, g.consoleTail(40))
		return
	}
	fresh := string(out[min(g.logPos, len(out)):])
	g.logPos = len(out)
	var found []string
	for line := range strings.Lines(fresh) {
		if complaints.MatchString(line) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	if found != nil {
		t.Errorf("the guest's kernel complains: %s\nall it says:\n%s", strings.Join(found, "; "), fresh)
	}
}

func (g *Guest) consoleTail(lines int) string {
	data, _ := os.ReadFile(g.console)
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
