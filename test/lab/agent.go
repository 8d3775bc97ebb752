//go:build linux

package lab

import (
	"encoding/gob"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The agent is the guest's first process. It serves one stream, a virtio serial port, of gob values:
// request towards the guest, report towards the host. Commands are told apart by numbers the host chooses.

type reqKind uint8

const (
	reqStart    reqKind = iota + 1 // Argv, Env
	reqStdin                       // Data
	reqEOF                         // end of standard input
	reqSignal                      // Signal, to the command's process group
	reqPoweroff                    // no report follows
)

type request struct {
	ID     uint32
	Kind   reqKind
	Argv   []string
	Env    []string
	Data   []byte
	Signal int
}

type repKind uint8

const (
	repHello  repKind = iota + 1 // the agent is there
	repStdout                    // Data
	repStderr                    // Data
	repExit                      // Code, or Err if it could not be started; the last report of an ID
)

type report struct {
	ID   uint32
	Kind repKind
	Data []byte
	Code int
	Err  string
}

// agentPort is the first port of the first virtio serial device.
const agentPort = "/dev/vport0p1"

// shellEnv, on the kernel's command line, asks for a shell on the serial console.
const shellEnv = "OPENRDS_LAB_SHELL"

type agent struct {
	mu  sync.Mutex // guards enc and its stream
	enc *gob.Encoder

	procMu sync.Mutex
	procs  map[uint32]*agentProc
}

type agentProc struct {
	pid   int
	stdin *spool
}

// agentMain does not return. If it fails the kernel panics and the machine stops, which is what the host
// looks for.
func agentMain() {
	if os.Getpid() == 1 {
		processOne()
	}
	os.Unsetenv(roleEnv)
	os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	os.Setenv("TMPDIR", "/run")
	os.Setenv("LC_ALL", "C")
	_ = os.Chdir("/run")
	_ = unix.Sethostname([]byte("lab"))
	port, err := os.OpenFile(agentPort, os.O_RDWR, 0)
	if err != nil {
		fatalf("agent: %v", err)
	}
	if os.Getenv(shellEnv) != "" {
		go serveShell()
	}
	a := &agent{enc: gob.NewEncoder(port), procs: make(map[uint32]*agentProc)}
	a.send(&report{Kind: repHello})
	dec := gob.NewDecoder(port)
	for {
		var r request
		if err := dec.Decode(&r); err != nil {
			fatalf("agent: %v", err)
		}
		a.handle(&r)
	}
}

// processOne starts the agent proper and reaps what commands leave behind, which the agent cannot do
// beside exec.Cmd: waiting for any child would take the statuses of its commands.
func processOne() {
	agent, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		fatalf("agent: %v", err)
	}
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid == agent {
			fatalf("the agent ended: %v %v", ws, err)
		}
	}
}

// serveShell keeps a shell on the console; the machine stops when it ends.
func serveShell() {
	cmd := exec.Command("/bin/bash", "--norc", "-i")
	tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
	if err != nil {
		fatalf("shell: %v", err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.Env = append(os.Environ(), "PS1=lab# ", "TERM=linux")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	_ = cmd.Run()
	poweroff()
}

func poweroff() {
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func (a *agent) send(r *report) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.enc.Encode(r); err != nil {
		fatalf("agent: %v", err)
	}
}

func (a *agent) handle(r *request) {
	a.procMu.Lock()
	p := a.procs[r.ID]
	a.procMu.Unlock()
	switch {
	case r.Kind == reqStart:
		if err := a.start(r); err != nil {
			a.send(&report{ID: r.ID, Kind: repExit, Err: err.Error()})
		}
	case r.Kind == reqPoweroff:
		poweroff()
	case p == nil: // it has just ended
	case r.Kind == reqStdin:
		_, _ = p.stdin.Write(r.Data)
	case r.Kind == reqEOF:
		p.stdin.Close()
	case r.Kind == reqSignal:
		_ = unix.Kill(-p.pid, unix.Signal(r.Signal))
	}
}

func (a *agent) start(r *request) error {
	path := r.Argv[0]
	if filepath.Base(path) == path {
		var err error
		if path, err = exec.LookPath(path); err != nil {
			return err
		}
	}
	p := &agentProc{stdin: newSpool()}
	cmd := &exec.Cmd{Path: path, Args: r.Argv, Env: append(os.Environ(), r.Env...)}
	// Pipes of our own: those of exec.Cmd keep Wait from returning while a grandchild holds them.
	var ours [3]*os.File
	var theirs [3]*os.File
	closeAll := func(fs []*os.File) {
		for _, f := range fs {
			if f != nil {
				f.Close()
			}
		}
	}
	for i := range ours {
		rd, wr, err := os.Pipe()
		if err != nil {
			closeAll(ours[:])
			closeAll(theirs[:])
			return err
		}
		ours[i], theirs[i] = rd, wr
		if i == 0 {
			ours[i], theirs[i] = wr, rd
		}
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs[0], theirs[1], theirs[2]
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Start()
	closeAll(theirs[:])
	if err != nil {
		closeAll(ours[:])
		return err
	}
	p.pid = cmd.Process.Pid
	a.procMu.Lock()
	a.procs[r.ID] = p
	a.procMu.Unlock()

	go func() {
		_, _ = io.Copy(ours[0], p.stdin)
		ours[0].Close()
	}()
	var copies sync.WaitGroup
	for i, kind := range map[int]repKind{1: repStdout, 2: repStderr} {
		copies.Go(func() {
			defer ours[i].Close()
			buf := make([]byte, 32<<10)
			for {
				n, err := ours[i].Read(buf)
				if n > 0 {
					a.send(&report{ID: r.ID, Kind: kind, Data: buf[:n]})
				}
				if err != nil {
					return
				}
			}
		})
	}
	go func() {
		err := cmd.Wait()
		_ = unix.Kill(-p.pid, unix.SIGKILL) // whatever it left behind holds the pipes
		copies.Wait()
		a.procMu.Lock()
		delete(a.procs, r.ID)
		a.procMu.Unlock()
		p.stdin.Close()
		rep := &report{ID: r.ID, Kind: repExit, Code: cmd.ProcessState.ExitCode()}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			rep.Err = fmt.Sprintf("killed by %v", ws.Signal())
		} else if cmd.ProcessState.ExitCode() < 0 && err != nil {
			rep.Err = err.Error()
		}
		a.send(rep)
	}()
	return nil
}

// spool is a pipe without a bound: Write never waits, Read waits for data or Close.
type spool struct {
	mu     sync.Mutex
	cond   sync.Cond
	buf    []byte
	closed bool
}

func newSpool() *spool {
	s := &spool{}
	s.cond.L = &s.mu
	return s
}

func (s *spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, io.ErrClosedPipe
	}
	s.buf = append(s.buf, p...)
	s.cond.Broadcast()
	return len(p), nil
}

func (s *spool) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.buf) == 0 {
		if s.closed {
			return 0, io.EOF
		}
		s.cond.Wait()
	}
	n := copy(p, s.buf)
	s.buf = s.buf[n:]
	return n, nil
}

// Close ends the stream behind what was written. Twice is once.
func (s *spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.cond.Broadcast()
	return nil
}
