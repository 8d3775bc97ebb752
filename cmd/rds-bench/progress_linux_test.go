package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// terminal is a pseudoterminal: what is written to the returned file can be read by calling output, once the file is closed
// everywhere.
func terminal(t *testing.T) (tty *os.File, output func() string) {
	t.Helper()
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudoterminals: %v", err)
	}
	fd := int(pty.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	done := make(chan string)
	go func() {
		b, _ := io.ReadAll(pty) // ends with EIO
		pty.Close()
		done <- string(b)
	}()
	return tty, func() string {
		tty.Close()
		return <-done
	}
}

// A bar is drawn when a terminal shows standard error, unless lines of standard output would come in between.
func TestProgressOnTerminals(t *testing.T) {
	for _, tc := range []struct {
		stdout, stderr bool // terminals
		args           []string
		bar            bool
	}{
		{false, true, nil, true},
		{true, true, nil, true}, // the table comes when the bar has gone
		{true, false, nil, false},
		{true, true, []string{"--interval", "100ms"}, false},
		{false, true, []string{"--interval", "100ms"}, true},
		{true, true, []string{"--format", "ndjson"}, false},
		{true, true, []string{"--json"}, true},
	} {
		t.Run(fmt.Sprint(tc.stdout, tc.stderr, tc.args), func(t *testing.T) {
			cmd := command(t, append(append(quick, "--addr", localAddrs, "--sizes", "64", "--tests", "rtt", "--compare", "none"), tc.args...)...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			outText, errText := stdout.String, stderr.String
			if tc.stdout {
				cmd.Stdout, outText = terminal(t)
			}
			if tc.stderr {
				cmd.Stderr, errText = terminal(t)
			}
			err := cmd.Run()
			out, errs := outText(), errText()
			if err != nil {
				t.Fatalf("%v: %s", err, errs)
			}
			if bar := strings.Contains(errs, "%") && strings.Contains(errs, "rds 64 B rtt"); bar != tc.bar {
				t.Errorf("bar %v, want %v: %q", bar, tc.bar, errs)
			}
			if !tc.bar && errs != "" {
				t.Errorf("standard error: %q", errs)
			}
			if strings.Contains(out, "%|") || strings.TrimSpace(out) == "" {
				t.Errorf("standard output: %q", out)
			}
		})
	}
}
