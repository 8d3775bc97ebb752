package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// childExitTimeout is what a child gets to end after its session has ended.
const childExitTimeout = 10 * time.Second

// runLocal measures against a second process of this program.
func (f *clientFlags) runLocal(ctx context.Context, client, server netip.Addr, stdout, stderr io.Writer) error {
	ch, err := startChild(server, f.profile, stderr)
	if err != nil {
		return err
	}
	err = f.measure(ctx, ch.control, client, stdout, stderr)
	if cerr := ch.stop(); err == nil {
		err = cerr
	}
	return err
}

// A child is the server process that rds-bench starts of itself. It ends when its standard input
// does, so it cannot outlive us, however we end.
type child struct {
	cmd     *exec.Cmd
	stdin   io.Closer
	control netip.AddrPort
}

func startChild(server netip.Addr, profile string, stderr io.Writer) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{"server", "--child", "--addr", net.JoinHostPort(server.String(), "0")}
	if profile != "" {
		args = append(args, "--cpuprofile", profile)
	}
	cmd := exec.Command(exe, args...)
	errOut := &heldWriter{to: stderr}
	cmd.Stderr = errOut
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ch := &child{cmd: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		if serr := ch.stop(); serr != nil {
			err = serr
		}
		if said := strings.TrimSpace(errOut.take()); said != "" {
			err = errors.New(strings.TrimPrefix(said, "rds-bench: "))
		}
		return nil, fmt.Errorf("the server process did not start: %w", err)
	}
	if err := errOut.release(); err != nil {
		return nil, errors.Join(err, ch.stop())
	}
	if ch.control, err = netip.ParseAddrPort(strings.TrimSpace(line)); err != nil {
		return nil, errors.Join(fmt.Errorf("the server process: %v", err), ch.stop())
	}
	return ch, nil
}

// stop ends the child and waits for it.
func (ch *child) stop() error {
	ch.stdin.Close()
	kill := time.AfterFunc(childExitTimeout, func() { _ = ch.cmd.Process.Kill() })
	defer kill.Stop()
	if err := ch.cmd.Wait(); err != nil {
		return fmt.Errorf("the server process: %w", err)
	}
	return nil
}

// childContext is done when the parent closes stdin, or has ended, or at SIGTERM. A terminal sends an interrupt
// to both of us; it is the parent that decides what follows from it.
func childContext(ctx context.Context, stdin io.Reader) context.Context {
	signal.Ignore(os.Interrupt)
	ctx, stop := signal.NotifyContext(context.WithoutCancel(ctx), syscall.SIGTERM)
	go func() {
		defer stop()
		_, _ = io.Copy(io.Discard, stdin)
	}()
	return ctx
}

// A heldWriter keeps what is written to it until it is released, and passes everything on from then.
type heldWriter struct {
	mu       sync.Mutex
	to       io.Writer
	held     bytes.Buffer
	released bool
}

func (w *heldWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.released {
		return w.to.Write(p)
	}
	return w.held.Write(p)
}

func (w *heldWriter) release() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.released = true
	_, err := w.held.WriteTo(w.to)
	return err
}

// take returns what is held.
func (w *heldWriter) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.held.String()
}
