package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// Both devices come and go many times in each run; the processes check everything and audit themselves.
func TestCommandChaos(t *testing.T) {
	for _, tc := range []struct {
		name  string
		addrs string
		args  []string
		runs  int
	}{
		{"datagrams", ownLoopback(21) + "," + ownLoopback(22), []string{"--sizes", "64,16KiB", "--sockets", "2", "--bidir"}, 4},
		{"operations", ownLoopback(23) + "," + ownLoopback(24), []string{"--rdma", "read,write", "--rdma-size", "32KiB", "--bidir"}, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"--addr", tc.addrs, "--json", "--verify", "--chaos", "devices", "--chaos-every", "40ms", "--duration", "1600ms", "--warmup", "20ms"}, tc.args...)
			stdout, stderr, code := runCommand(t, args...)
			if code != 0 || stderr != "" {
				t.Fatalf("exit status %d, standard error:\n%s", code, stderr)
			}
			checkSchema(t, []byte(stdout), tc.runs)
			var rep report
			if err := json.Unmarshal([]byte(stdout), &rep); err != nil {
				t.Fatal(err)
			}
			if !rep.Clean || rep.Start.Parameters.Chaos != chaosDevices {
				t.Errorf("the report does not say that all went well:\n%s", stdout)
			}
			for _, r := range rep.Runs {
				if r.Retransmits > 1<<40 || r.Drops > 1<<40 {
					t.Errorf("%v: %d resent, %d dropped: counters went backwards", &r, r.Retransmits, r.Drops)
				}
				if r.Removals == 0 || !r.Verified {
					t.Errorf("%s %d B %s: %d removals, verified %v", r.over(), r.Size, r.Test, r.Removals, r.Verified)
				}
			}
		})
	}
}

// A measurement in which no device went has shown nothing, and says so.
func TestChaosNone(t *testing.T) {
	stdout, stderr, code := runCommand(t, "--addr", ownLoopback(91)+","+ownLoopback(92), "--sizes", "64", "--verify", "--chaos", "devices", "--chaos-every", "1h", "--duration", "200ms", "--warmup", "10ms")
	if code != 1 || !strings.Contains(stderr, "no device went in 2 runs of 100ms") || strings.Contains(stdout, "0 lost") {
		t.Errorf("exit status %d, %s\n%s", code, stderr, stdout)
	}
}

// A goroutine that outlives the Service is found.
func TestAuditFindsGoroutine(t *testing.T) {
	tr, err := openRDS(rdsOptions{Dialect: dialectOpen, Port: 4791, Audit: true}, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	quit := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		<-quit
		close(ended)
	}()
	err = tr.close()
	close(quit)
	<-ended
	if err == nil || !strings.Contains(err.Error(), "TestAuditFindsGoroutine") {
		t.Errorf("the audit says %v", err)
	}
}

// What is left behind on the server's side is the client's error.
func TestByeTellsServersErrors(t *testing.T) {
	leaky := func(name string, o rdsOptions) (transport, error) {
		tr, err := newTransport(name, o)
		return leakyTransport{tr}, err
	}
	c := connectClient(t, serveLoopback(t, leaky), shortParams(), newTransport)
	s := testSpec(transportTCP, testThroughput, 64)
	if _, err := c.run(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := c.bye(); err == nil || !strings.Contains(err.Error(), "server: "+errLeaky.Error()) {
		t.Errorf("bye: %v", err)
	}
	if _, err := c.run(t.Context(), s); err == nil || !strings.Contains(err.Error(), "out of place") {
		t.Errorf("a run after bye: %v", err)
	}
}

var errLeaky = &serverError{"something is left"}

type leakyTransport struct{ transport }

func (t leakyTransport) close() error {
	_ = t.transport.close()
	return errLeaky
}
