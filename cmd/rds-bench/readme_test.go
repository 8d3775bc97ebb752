package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The program in the README is what people try first.
func TestReadmeProgram(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, program, ok := strings.Cut(string(readme), "```go\n")
	program, _, closed := strings.Cut(program, "```\n")
	if !ok || !closed {
		t.Fatal("the README has no program")
	}
	dir := t.TempDir()
	src, exe := filepath.Join(dir, "main.go"), filepath.Join(dir, "hello")
	if err := os.WriteFile(src, []byte(program), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", exe, src)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	listener, speaker := ownLoopback(3)+":4000", ownLoopback(4)+":4000"
	for _, firstIsSender := range []bool{false, true} {
		var heard, said bytes.Buffer
		receiver := exec.Command(exe, listener)
		receiver.Stdout, receiver.Stderr = &heard, &heard
		sender := exec.Command(exe, speaker, listener)
		sender.Stderr = &said
		order := []*exec.Cmd{receiver, sender}
		if firstIsSender {
			order = []*exec.Cmd{sender, receiver}
		}
		for _, c := range order {
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			kill := time.AfterFunc(20*time.Second, func() { _ = c.Process.Kill() })
			defer kill.Stop()
		}
		if err := sender.Wait(); err != nil {
			t.Errorf("sender first %v: the sender: %v\n%s", firstIsSender, err, said.String())
		}
		if err := receiver.Wait(); err != nil {
			t.Errorf("sender first %v: the receiver: %v", firstIsSender, err)
		}
		if got, want := heard.String(), speaker+" says hello\n"; got != want {
			t.Errorf("sender first %v: heard %q, want %q", firstIsSender, got, want)
		}
	}
}
