//go:build linux

// Labsh boots a lab guest and gives a shell in it.
//
//	go run ./test/lab/labsh [-mtu 1500] [-host 'command']
//
// The shell is on the guest's console; exit, or Ctrl-A X, ends it. With -host the command
// runs beside the guest in the lab's network namespace (10.77.0.1), tcpdump for instance.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"

	"github.com/openrds/openrds/test/lab"
)

type shell struct{}

// Run implements lab.Runner.
func (shell) Run() int {
	var cfg lab.Config
	flag.IntVar(&cfg.MTU, "mtu", 4500, "Ethernet MTU of the link")
	host := flag.String("host", "", "shell command to run beside the guest")
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "labsh: needs root (namespaces, tap devices)")
		return 1
	}
	if *host != "" {
		cmd := exec.Command("/bin/sh", "-c", *host)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, "labsh:", err)
			return 1
		}
		defer cmd.Process.Kill()
	}
	if err := lab.Shell(context.Background(), cfg); err != nil {
		fmt.Fprintln(os.Stderr, "labsh:", err)
		return 1
	}
	return 0
}

func main() { lab.Main(shell{}, nil) }
