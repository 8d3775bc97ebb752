package conn

import (
	"testing"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

func TestHello(t *testing.T) {
	bubble(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}}, func(t *testing.T, net *simnet.Net) {
		a, b := newHost(t, net, addrA), newHost(t, net, addrB)
		var o testOwner
		if err := a.conn(addrB).Send(&o, 4001, 4002, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "message arrives", time.Second, func() bool { return b.sink.len() == 1 })
		got := b.sink.take()[0]
		if string(got.data) != "hello" || got.sport != 4001 || got.dport != 4002 || got.from != addrA {
			t.Errorf("got %+v", got)
		}
		eventually(t, "acknowledged", time.Second, func() bool { n, bytes := o.get(); return n == 1 && bytes == 5 })
		if n := a.close(time.Second); n != 0 {
			t.Errorf("%d abandoned", n)
		}
		b.close(time.Second)
	})
}
