package softroce

import (
	"testing"
	"time"

	"github.com/openrds/openrds/verbs"
)

// TestStockReceiveBuffer streams into a socket with the buffer an unprivileged process gets under
// stock limits (net.core.rmem_max 212992). The announced share keeps the sender from flooding it; what
// is dropped all the same is counted, and made up for without collapse: far fewer packets are sent
// again than are sent.
func TestStockReceiveBuffer(t *testing.T) {
	tp := newTestPair(t, Config{RecvBuffer: 212992}, "127.0.0.17", "127.0.0.18", verbs.MTU4096)
	defer tp.shut(t)
	if w := tp.dev[0].attr.RecvWindow; w > 2*212992/4 || w < 32<<10 {
		t.Fatalf("a peer may have %d bytes in flight", w)
	}
	const size, total, depth = 15 * 4096, 2000, 32
	recv := func(id uint64) verbs.RecvWR {
		return verbs.RecvWR{ID: id, SGs: tp.sge(1, int(id)*size, size)}
	}
	for i := range uint64(2 * depth) {
		if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{recv(i)}); err != nil {
			t.Fatal(err)
		}
	}
	var wcs [depth]verbs.WC
	out, sent, done, got := 0, 0, 0, 0
	deadline := time.Now().Add(60 * time.Second)
	for done < total {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d done: %v", done, total, tp.dev[0].Stats())
		}
		for ; sent < total && out < depth; sent, out = sent+1, out+1 {
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{send(uint64(sent), tp.sge(0, 0, size))}); err != nil {
				t.Fatal(err)
			}
		}
		n := tp.cq[0].Poll(wcs[:])
		for i := range n {
			if err := wcs[i].Err(); err != nil {
				t.Fatal(err)
			}
		}
		done, out = done+n, out-n
		k := tp.cq[1].Poll(wcs[:])
		for i := range k {
			tp.qp[1].PostRecv([]verbs.RecvWR{recv(wcs[i].ID)})
		}
		if got += k; n+k == 0 {
			time.Sleep(20 * time.Microsecond)
		}
	}
	s, r := tp.dev[0].Stats(), tp.dev[1].Stats()
	t.Logf("%d packets sent, %d of them again; %d dropped by the socket", s["tx_packets"], s["retransmits"], r["rx_socket_drops"])
	if s["retransmits"] > s["tx_packets"]/4 {
		t.Errorf("%d of %d packets were sent again", s["retransmits"], s["tx_packets"])
	}
}
