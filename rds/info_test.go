package rds

import (
	"encoding/json"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/simnet"
)

// What Info lists is what the sockets, queues and connections hold, and it reads back from JSON as it was.
func TestInfo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.New(1, simnet.Config{})
		a, b := openSim(t, net, Config{Linger: -1}), openSim(t, net, Config{})
		defer a.Close() // it abandons the last message
		defer closeService(t, b)
		s, r := bind(t, a, ap(addrA, 4000)), bind(t, b, ap(addrB, 5000))
		for i := range 3 {
			if _, err := s.WriteToAddrPort(make([]byte, 100*i), r.AddrPort()); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		in := b.Info(InfoAll)
		if len(in.ReceiveQueue) != 3 {
			t.Fatalf("receive queue: %+v", in.ReceiveQueue)
		}
		for i, m := range in.ReceiveQueue {
			if m.Len != 100*i || m.Local != r.Addr() || m.Remote != s.Addr() || i > 0 && m.Seq != in.ReceiveQueue[i-1].Seq+1 {
				t.Errorf("message %d: %+v", i, m)
			}
		}
		if n := in.Connections[0].NextRX; in.ReceiveQueue[2].Seq != n-1 {
			t.Errorf("last sequence is %d, the connection expects %d", in.ReceiveQueue[2].Seq, n)
		}
		if c := in.Connections[0]; len(in.Connections) != 1 || c.Local != addrB || c.Remote != addrA || c.Flags != ConnConnected || c.Kernel {
			t.Errorf("connections: %+v", in.Connections)
		}
		if ib := in.IBConnections[0]; ib.LocalGID != addrB || ib.QPN == 0 || ib.MaxSendWR == 0 || ib.MaxSendSGE == 0 || ib.MaxRecvWR == 0 || ib.RDMAMRMax != 4096 || ib.RDMAMRSize != 257 {
			t.Errorf("verbs connection: %+v", ib)
		}
		if len(in.Devices) != 1 || in.Devices[0].Addr != addrB || in.Devices[0].QPs != 1 || in.Devices[0].Small.BufBytes == 0 {
			t.Errorf("devices: %+v", in.Devices)
		}
		region := mustRegister(t, r, 100<<10, RegionOptions{})
		small := mustRegister(t, r, 100, RegionOptions{})
		d := b.Info(InfoDevices).Devices[0]
		if p := d.Pool1M; p.Max != 4096 || p.Pages != 257 || p.Regions != 1 || p.Mapped != 1 || p.Pinned < 100<<10 || p.MaxPinned < p.Pinned {
			t.Errorf("1m pool with a region: %+v", p)
		}
		if p := d.Pool8K; p.Pages != 3 || p.Mapped != 1 || p.Pinned != 1<<12 && p.Pinned != 2<<12 {
			t.Errorf("8k pool with a region: %+v", p)
		}
		region.Close()
		small.Close()
		if p := b.Info(InfoDevices).Devices[0].Pool1M; p.Mapped != 0 || p.Regions != 1 || p.Dirty+p.Ready != 1 {
			t.Errorf("1m pool without a region in use: %+v", p)
		}
		if n := b.Stats().Conn.SlabBytes; n == 0 || n > 1<<30 {
			t.Errorf("%d bytes of slab memory", n)
		}
		if len(in.Sockets) != 1 || in.Sockets[0].QueuedBytes != 300 {
			t.Errorf("sockets: %+v", in.Sockets)
		}
		text, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var back Info
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatal(err)
		}
		if len(back.ReceiveQueue) != 3 || back.ReceiveQueue[1] != in.ReceiveQueue[1] || back.Sockets[0] != in.Sockets[0] {
			t.Errorf("JSON changes it: %s", text)
		}
		// Nobody there: what is sent stays in the send queue.
		if _, err := s.WriteToAddrPort(make([]byte, 7), netip.MustParseAddrPort("10.0.0.99:7000")); err != nil {
			t.Fatal(err)
		}
		in = a.Info(InfoSend | InfoRetrans)
		if len(in.SendQueue) != 1 || in.SendQueue[0].Len != 7 || in.SendQueue[0].Remote.String() != "10.0.0.99:7000" || in.Sockets != nil || in.Counters != nil {
			t.Errorf("send queue: %+v", in)
		}
	})
}

// Half of a sequence and the next one expected give the whole.
func TestFullSeq(t *testing.T) {
	for _, c := range []struct{ want, next uint64 }{
		{1, 2}, {0xffffffff, 0x100000000}, {0x1ffffffff, 0x200000001}, {0x200000000, 0x200000001}, {1<<60 + 5, 1<<60 + 1<<31},
	} {
		if got := fullSeq(uint32(c.want), c.next); got != c.want {
			t.Errorf("%#x before %#x: got %#x", c.want, c.next, got)
		}
	}
}
