package rawudp

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// receiverEnv makes the test binary the receiving process, until standard input ends. Its value says what it
// does with packets.
const (
	receiverEnv = "RAWUDP_RECEIVER"
	discardEnv  = "discard"
	copyEnv     = "copy"

	noGROEnv = "RAWUDP_NOGRO"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(receiverEnv); mode != "" {
		if err := receiverMain(mode); err != nil {
			fmt.Fprintln(os.Stderr, "receiver:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func receiverMain(mode string) error {
	r, err := NewReceiver(netip.MustParseAddrPort("127.0.0.2:0"), Options{NoGRO: os.Getenv(noGROEnv) != ""})
	if err != nil {
		return err
	}
	fmt.Println(r.Addr())
	done := make(chan error, 1)
	go func() {
		if mode == discardEnv {
			done <- r.Discard(math.MaxInt)
			return
		}
		p := make([]byte, MaxMessageBytes)
		for {
			if _, err := r.Recv(p); err != nil {
				done <- err
				return
			}
		}
	}()
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if err := r.Close(); err != nil {
		return err
	}
	if err := <-done; err != ErrClosed {
		return err
	}
	return nil
}

// startReceiver starts the receiving process and returns its address.
func startReceiver(t testing.TB, o Options, mode string) netip.AddrPort {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), receiverEnv+"="+mode)
	if o.NoGRO {
		cmd.Env = append(cmd.Env, noGROEnv+"=1")
	}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netip.ParseAddrPort(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return addr
}
