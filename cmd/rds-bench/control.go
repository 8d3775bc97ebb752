package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// The control connection is TCP beside whatever is measured. The client asks, the server answers, one
// JSON object per line each:
//
//	hello     version, options of RDS
//	prepare   spec                     -> addresses of the server's endpoint
//	connect   the client's addresses   -> when every flow greeted
//	start                              -> when the server receives (and sends, if bidir)
//	mark      measured interval begins
//	sample                             -> what the server counted since the last one, or the mark
//	mark      measured interval ends   -> what the server counted in it
//	stop      what the client sent     -> what the server sent, when all that the client sent has arrived
//	end       the run's endpoint is closed
//	bye                                -> when everything is closed, and whether it left anything behind
//
// The connection's end ends the session, and a run in progress with it.
const (
	controlVersion = 2

	opHello   = "hello"
	opPrepare = "prepare"
	opConnect = "connect"
	opStart   = "start"
	opMark    = "mark"
	opSample  = "sample"
	opStop    = "stop"
	opEnd     = "end"
	opBye     = "bye"
)

// Bounds of the control connection.
const (
	maxControlLineBytes = 256 << 10 // maxSockets addresses fit
	helloTimeout        = 5 * time.Second
	answerTimeout       = connectTimeout + 2*maxPatience + 5*time.Second
)

// defaultControlPort is the TCP port of the control connection, the one rds-stress uses.
const defaultControlPort = 4000

type request struct {
	Op      string           `json:"op"`
	Version int              `json:"version,omitempty"`
	RDS     *rdsOptions      `json:"rds,omitempty"`
	Spec    *spec            `json:"spec,omitempty"`
	Addrs   []netip.AddrPort `json:"addrs,omitempty"`
	Sent    []uint64         `json:"sent,omitempty"`
}

type response struct {
	Error  string           `json:"error,omitempty"`
	Verify bool             `json:"verify,omitempty"` // Error is a *verifyError
	Addrs  []netip.AddrPort `json:"addrs,omitempty"`
	Delta  *delta           `json:"delta,omitempty"`
	Sent   []uint64         `json:"sent,omitempty"`
}

// err is the error the response carries, nil without one.
func (r *response) err() error {
	switch {
	case r.Error == "":
		return nil
	case r.Verify:
		return &verifyError{errors.New(r.Error)}
	}
	return &serverError{r.Error}
}

// A serverError is one that the server has told.
type serverError struct{ text string }

func (e *serverError) Error() string { return "server: " + e.text }

// controlConn reads and writes the lines of a control connection.
type controlConn struct {
	net.Conn
	lines *bufio.Scanner
}

func newControlConn(c net.Conn) *controlConn {
	s := bufio.NewScanner(c)
	s.Buffer(nil, maxControlLineBytes)
	return &controlConn{Conn: c, lines: s}
}

func (c *controlConn) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = c.Write(append(b, '\n'))
	return err
}

// read returns io.EOF when the other side has gone.
func (c *controlConn) read(v any) error {
	if !c.lines.Scan() {
		if err := c.lines.Err(); err != nil {
			return err
		}
		return io.EOF
	}
	if err := json.Unmarshal(c.lines.Bytes(), v); err != nil {
		return fmt.Errorf("not a line of rds-bench: %v", err)
	}
	return nil
}

// localAddr and remoteAddr are the addresses the two hosts know each other by, which the data uses too.
func (c *controlConn) localAddr() netip.Addr {
	return c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}

func (c *controlConn) remoteAddr() netip.Addr {
	return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}

// onLink are addresses that the other host, which has its own name for the link, has told, as seen from own.
func onLink(own netip.Addr, told []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range told {
		if own.Zone() != "" && a.Addr().Is6() && a.Addr().IsLinkLocalUnicast() {
			a = netip.AddrPortFrom(a.Addr().WithZone(own.Zone()), a.Port())
		}
		out = append(out, a)
	}
	return out
}
