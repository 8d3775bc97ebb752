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

// TestCloseInDelivery: whoever closes on the strength of a message that is still being delivered has it acknowledged first.
func TestCloseInDelivery(t *testing.T) {
	net := simnet.ForTest(t, 1, simnet.Config{}) // no bubble: Close waits for the handler's lock
	a, b := newHost(t, net, addrA), newHost(t, net, addrB)
	closed := make(chan struct{})
	b.sink.accept = func(*Conn, *Incoming) bool {
		go func() {
			defer close(closed)
			b.close(10 * time.Second)
		}()
		select {
		case <-b.m.done:
			t.Error("closed while a message was being delivered")
		case <-time.After(50 * time.Millisecond):
		}
		return true
	}
	var o testOwner
	if err := a.conn(addrB).Send(&o, 4001, 4002, []byte("the last word")); err != nil {
		t.Fatal(err)
	}
	<-closed
	eventually(t, "acknowledged", 10*time.Second, func() bool { n, _ := o.get(); return n == 1 })
	a.close(0)
}
