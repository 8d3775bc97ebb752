//go:build lab && linux

package lab

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/openrds/openrds/rds"
)

// ourConn is our side of a connection.
func ourConn(svc *rds.Service, local, remote netip.Addr, tos uint8) (c rds.ConnInfo, ok bool) {
	for _, c := range svc.Info(rds.InfoConnections).Connections {
		if c.Local == local && c.Remote == remote && c.TOS == tos {
			return c, true
		}
	}
	return c, false
}

// agree checks that both sides of a connection that is quiet show the same of it: what one sends next is what the other expects.
func agree(t testing.TB, svc *rds.Service, k *kernelEnd, host, guest netip.Addr, tos uint8) {
	t.Helper()
	differ := func() string {
		ours, ok := ourConn(svc, host, guest, tos)
		theirs, ok2 := k.conn(host, tos)
		switch {
		case !ok || !ok2:
			return fmt.Sprintf("the connection is not shown: %+v, %+v", ours, theirs)
		case ours.NextTX != theirs.NextRX || ours.NextRX != theirs.NextTX:
			return fmt.Sprintf("we send %d next and expect %d; the kernel expects %d and sends %d", ours.NextTX, ours.NextRX, theirs.NextRX, theirs.NextTX)
		case ours.Flags&rds.ConnConnected == 0 || theirs.Flags&connUp == 0 || ours.Transport != theirs.Transport:
			return fmt.Sprintf("flags %d over %q; the kernel's %d over %q", ours.Flags, ours.Transport, theirs.Flags, theirs.Transport)
		}
		return ""
	}
	eventually(t, "both sides show the same connection", func() bool { return differ() == "" })
	if d := differ(); d != "" {
		t.Error(d)
	}
}
