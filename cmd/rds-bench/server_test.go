package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// rawSession connects to a server without a client's manners.
func rawSession(t *testing.T) *controlConn {
	t.Helper()
	c, err := net.Dial("tcp", serveLoopback(t, newTransport).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return newControlConn(c)
}

func TestServerOutOfPlace(t *testing.T) {
	c := rawSession(t)
	p := defaultParams()
	good := testSpec(transportTCP, testThroughput, 64)
	bad := good
	bad.Sockets = 1 << 30
	slow := good
	slow.Patience = time.Hour
	for _, step := range []struct {
		req  request
		want string // in the error; empty for none
	}{
		{request{Op: opPrepare, Spec: &good}, "out of place (new)"},
		{request{Op: opEnd}, "out of place (new)"},
		{request{Op: opHello, Version: controlVersion, RDS: &p.RDS}, ""},
		{request{Op: opHello, Version: controlVersion, RDS: &p.RDS}, "out of place (idle)"},
		{request{Op: opStart}, "out of place (idle)"},
		{request{Op: opMark}, "out of place (idle)"},
		{request{Op: opPrepare}, "without a spec"},
		{request{Op: opPrepare, Spec: &bad}, "--sockets"},
		{request{Op: opPrepare, Spec: &slow}, "patience"},
		{request{Op: opPrepare, Spec: &spec{Transport: "carrier pigeon", Test: testRTT, Size: 1, Sockets: 1}}, "unknown transport"},
		{request{Op: opPrepare, Spec: &good}, ""},
		{request{Op: opPrepare, Spec: &good}, "out of place (prepared)"},
		{request{Op: opStop}, "out of place (prepared)"},
		{request{Op: "dance"}, "out of place"},
		{request{Op: opEnd}, ""},
		{request{Op: opEnd}, ""},
	} {
		if err := c.write(step.req); err != nil {
			t.Fatal(err)
		}
		var res response
		if err := c.read(&res); err != nil {
			t.Fatalf("%s: %v", step.req.Op, err)
		}
		if (step.want == "") != (res.Error == "") || !strings.Contains(res.Error, step.want) {
			t.Errorf("%s: error %q, want %q", step.req.Op, res.Error, step.want)
		}
	}
}

func TestServerOtherVersion(t *testing.T) {
	c := rawSession(t)
	if err := c.write(request{Op: opHello, Version: 99}); err != nil {
		t.Fatal(err)
	}
	var res response
	if err := c.read(&res); err != nil || !strings.Contains(res.Error, "the client 99") {
		t.Errorf("%v, %+v", err, res)
	}
}

// Whatever is not a line of the protocol ends the session, and only that.
func TestServerGarbage(t *testing.T) {
	for _, tc := range []struct{ name, text string }{
		{"another protocol", "GET / HTTP/1.1\r\n\r\n"},
		{"a line without an end", strings.Repeat("x", maxControlLineBytes+1)},
		{"wrong types", `{"op":7}` + "\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := rawSession(t)
			if _, err := io.WriteString(c, tc.text); err != nil {
				t.Fatal(err)
			}
			var res response
			if err := c.read(&res); err == nil {
				t.Errorf("the server answered %+v", res)
			}
		})
	}
}

// A client that vanishes in the middle of a run leaves nothing behind: the server serves the next one.
func TestServerClientVanishes(t *testing.T) {
	control := serveLoopback(t, newTransport)
	c, err := dialClient(t.Context(), control, mustAddr(testClientAddr), shortParams(), newTransport, noProgress{})
	if err != nil {
		t.Fatal(err)
	}
	s := testSpec(transportTCP, testThroughput, 64)
	res, err := c.ask(request{Op: opPrepare, Spec: &s})
	if err != nil {
		t.Fatal(err)
	}
	ep, err := c.transports.endpoint(t.Context(), s, true)
	if err != nil {
		t.Fatal(err)
	}
	go c.ask(request{Op: opConnect, Addrs: ep.addrs()}) // its answer never comes, or does
	if _, err := ep.connect(t.Context(), res.Addrs); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(ep.close(), c.close()); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(15 * time.Second)
	for {
		next, err := dialClient(t.Context(), control, mustAddr(testClientAddr), shortParams(), newTransport, noProgress{})
		if err != nil && time.Now().Before(deadline) && strings.Contains(err.Error(), "busy") {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer next.close()
		if _, err := next.run(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		return
	}
}

func FuzzRequest(f *testing.F) {
	good := testSpec(transportTCP, testThroughput, 64)
	for _, r := range []request{
		{Op: opHello, Version: controlVersion, RDS: &rdsOptions{Dialect: dialectOpen, Port: 4791}},
		{Op: opPrepare, Spec: &good}, {Op: opStop, Sent: []uint64{1}},
	} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var r request
		if json.Unmarshal(line, &r) != nil || r.Spec == nil || r.Spec.validate() != nil {
			return
		}
		if s := r.Spec; s.Size < 1 || s.Size > maxMessageBytes || s.Sockets < 1 || s.Sockets > maxSockets || s.Depth < 0 || s.Depth > maxDepth {
			t.Fatalf("%+v passes as valid", *s)
		}
	})
}

// A link has a name on either host.
func TestOnLink(t *testing.T) {
	at := func(as ...string) (out []netip.AddrPort) {
		for _, a := range as {
			out = append(out, netip.MustParseAddrPort(a))
		}
		return out
	}
	told := at("[fe80::1%far]:5", "[fe80::2]:6", "[fd00::1]:7", "10.0.0.1:8", "169.254.0.1:9")
	for _, c := range []struct {
		own  string
		want []netip.AddrPort
	}{
		{"fe80::9%near", at("[fe80::1%near]:5", "[fe80::2%near]:6", "[fd00::1]:7", "10.0.0.1:8", "169.254.0.1:9")},
		{"fd00::9", told},
		{"10.0.0.9", told},
	} {
		if got := onLink(mustAddr(c.own), told); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v", c.own, got)
		}
	}
}
