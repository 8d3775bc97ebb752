//go:build lab && linux

package lab

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/openrds/openrds/internal/wire/rdshdr"
	"github.com/openrds/openrds/verbs"
)

// wirePeer speaks RDS/IB with the kernel SEND by SEND, to find out what the kernel does with what no
// implementation sends.
type wirePeer struct {
	*hostEnd
	f      family
	posted uint64
	inbox  [][]byte
}

const (
	sendMax = rdshdr.HeaderLen + 4096
	recvs   = 64
)

// dialRDS connects to the kernel's RDS, proposing a version, and takes its congestion map.
func dialRDS(t testing.TB, f family, major, minor uint8) (*wirePeer, error) {
	t.Helper()
	w := &wirePeer{hostEnd: newHost(t, f.host), f: f}
	p := connParam
	priv := rdshdr.ConnPriv{SAddr: netip.MustParseAddr(f.host), DAddr: netip.MustParseAddr(f.guest), Major: major, Minor: minor, Mask: 3}
	p.PrivateData = make([]byte, rdshdr.PrivLen4)
	priv.Encode(p.PrivateData)
	var err error
	w.ep, w.got, err = w.dev.Connect(w.ctx, addrPort(f.guest, 18634), w.qp, p, func() error {
		for range recvs {
			w.repost()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if h, body := w.next(); !h.IsMap() || len(body) != 4096 {
		t.Fatalf("the kernel's first SEND is %x", []byte(h))
	}
	if h, body := w.next(); !h.IsMap() || len(body) != 4096 {
		t.Fatalf("the kernel's second SEND is %x", []byte(h))
	}
	return w, nil
}

func (w *wirePeer) repost() {
	w.recv(w.posted, int(w.posted%recvs)*8192, sendMax)
	w.posted++
}

// step takes one completion; a SEND of the kernel's goes to the inbox.
func (w *wirePeer) step() verbs.WC {
	w.t.Helper()
	wc := w.poll()
	if err := wc.Err(); err != nil {
		w.t.Fatal(err)
	}
	if wc.Opcode == verbs.WCRecv {
		w.inbox = append(w.inbox, bytes.Clone(w.at(int(wc.ID%recvs)*8192, int(wc.ByteLen))))
		w.repost()
	}
	return wc
}

// next is the next SEND of the kernel.
func (w *wirePeer) next() (rdshdr.Header, []byte) {
	w.t.Helper()
	for len(w.inbox) == 0 {
		w.step()
	}
	b := w.inbox[0]
	w.inbox = w.inbox[1:]
	if len(b) < rdshdr.HeaderLen || !rdshdr.Valid(b) {
		w.t.Fatalf("the kernel sends %x", b)
	}
	return rdshdr.Header(b[:rdshdr.HeaderLen]), b[rdshdr.HeaderLen:]
}

// wantAck takes SENDs until one acknowledges seq.
func (w *wirePeer) wantAck(seq uint64) {
	w.t.Helper()
	for {
		if h, _ := w.next(); h.Ack() == seq {
			return
		}
	}
}

// message builds a datagram of one fragment; edit, when not nil, changes its header before it is sealed.
func message(seq uint64, sport, dport uint16, flags uint8, payload string, edit func(rdshdr.Header)) []byte {
	b := make([]byte, rdshdr.HeaderLen, sendMax)
	rdshdr.Put(b, seq, 0, uint32(len(payload)), sport, dport, flags, 0)
	if edit != nil {
		edit(rdshdr.Header(b))
		rdshdr.Header(b).Seal()
	}
	return append(b, payload...)
}

func (w *wirePeer) send(b []byte) {
	w.t.Helper()
	const off = 4 << 20
	copy(w.at(off, len(b)), b)
	w.post(verbs.SendWR{ID: 1 << 40, Opcode: verbs.OpSend, Flags: verbs.SendSolicited, SGs: w.sge(off, len(b))})
	for w.step().Opcode != verbs.WCSend {
	}
}

// TestRDSVersions proposes versions (rds-protocol spec 3.3).
func TestRDSVersions(t *testing.T) {
	g := guest(t, 4500)
	for _, tc := range []struct {
		major, minor uint8
		ok           bool
	}{{3, 1, true}, {4, 1, true}, {4, 0, true}, {3, 0, false}, {5, 0, false}, {2, 1, false}} {
		w, err := dialRDS(t, freshHost(t, g, ipv4), tc.major, tc.minor)
		if tc.ok {
			if err != nil {
				t.Errorf("version %d.%d: %v", tc.major, tc.minor, err)
				continue
			}
			var p rdshdr.ConnPriv
			if err := p.Decode(w.got.PrivateData, false); err != nil {
				t.Error(err)
			}
			t.Logf("version %d.%d proposed, the kernel answers %d.%d mask %#x ack %d credit %d", tc.major, tc.minor, p.Major, p.Minor, p.Mask, p.AckSeq, p.Credit)
			continue
		}
		var rej *verbs.RejectError
		if !errors.As(err, &rej) || rej.Reason != 28 || !bytes.Equal(rej.PrivateData[:4], []byte{1, 0, 0, 0}) {
			t.Errorf("version %d.%d: %v, want a rejection with the number 1", tc.major, tc.minor, err)
		}
	}
}

// TestRDSKernelRules holds the kernel to what our behaviour builds on (rds-protocol spec 1.10, 2.2, 2.5, 2.6).
func TestRDSKernelRules(t *testing.T) {
	g := guest(t, 4500)
	k := newKernelEnd(t, g)
	ks := k.open(OpenArgs{Local: addrPort(ipv4.guest, 0)})
	port := ks.Local.Port()
	const rexmit, ackReq = rdshdr.FlagRetransmitted, rdshdr.FlagAckRequired
	want := func(what string, payloads ...string) {
		t.Helper()
		var got []Datagram
		k.must("Recv", RecvArgs{ID: ks.ID, Count: len(payloads) + 1, Limit: 300 * time.Millisecond}, &got)
		ok := len(got) == len(payloads)
		for i := range min(len(got), len(payloads)) {
			ok = ok && got[i].Len == len(payloads[i]) && got[i].Sum == crc([]byte(payloads[i]))
		}
		if !ok {
			t.Errorf("%s: the kernel delivers %v, want %q", what, got, payloads)
		}
	}
	dial := func(t *testing.T) *wirePeer {
		t.Helper()
		w, err := dialRDS(t, freshHost(t, g, ipv4), 3, 1)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}

	t.Run("duplicates", func(t *testing.T) {
		w := dial(t)
		w.send(message(100, 9, port, ackReq, "hundred", nil))
		w.wantAck(100)
		want("a first sequence of 100", "hundred")
		w.send(message(100, 9, port, ackReq|rexmit, "hundred", nil))
		w.wantAck(100)
		want("a retransmission of it")
		w.send(message(200, 9, port, ackReq, "two hundred", nil))
		w.wantAck(200)
		want("a gap", "two hundred")
		w.send(message(50, 9, port, ackReq, "fifty", nil))
		w.wantAck(50)
		want("a lower sequence without RETRANSMITTED", "fifty")
		w.send(message(60, 9, port, ackReq|rexmit, "sixty", nil))
		w.wantAck(60)
		want("a retransmission above it", "sixty")
	})
	t.Run("no socket", func(t *testing.T) {
		w := dial(t)
		w.send(message(1, 9, 3, ackReq, "nobody", nil))
		w.wantAck(1)
	})
	t.Run("ping", func(t *testing.T) {
		w := dial(t)
		w.send(message(1, 777, 0, 0, "", nil))
		h, body := w.next()
		for h.Seq() == 0 {
			h, body = w.next()
		}
		if h.SPort() != 0 || h.DPort() != 777 || len(body) != 0 || h.Ack() != 1 {
			t.Errorf("the pong is %x", []byte(h))
		}
		t.Logf("the pong: sequence %d, ack %d, flags %#x", h.Seq(), h.Ack(), h.Flags())
	})
	t.Run("short fragment", func(t *testing.T) {
		w := dial(t)
		secret := strings.Repeat("secret of the last message ", 20)
		w.send(message(1, 9, port, ackReq, secret, nil))
		w.wantAck(1)
		want("a message", secret)
		w.send(message(2, 9, port, ackReq, "", func(h rdshdr.Header) { rdshdr.Put(h, 2, 0, 100, 9, port, ackReq, 0) }))
		w.wantAck(2)
		var got []Datagram
		k.must("Recv", RecvArgs{ID: ks.ID, Count: 1, Limit: time.Second}, &got)
		if len(got) != 1 || got[0].Len != 100 {
			t.Errorf("100 bytes announced and none sent: the kernel delivers %v", got)
		} else {
			t.Logf("100 bytes announced and none sent: the kernel delivers 100 bytes (zeros: %v)", got[0].Sum == crc(make([]byte, 100)))
		}
	})
	t.Run("generation in an ordinary message", func(t *testing.T) {
		w := dial(t)
		w.send(message(1, 9, port, ackReq, "generation", func(h rdshdr.Header) {
			if err := h.AddExt(rdshdr.ExtGenNum, []byte{1, 2, 3, 4}); err != nil {
				t.Fatal(err)
			}
		}))
		w.wantAck(1)
		want("a message with GEN_NUM", "generation")
	})
	t.Run("wrong checksum", func(t *testing.T) {
		w := dial(t)
		b := message(1, 9, port, ackReq, "wrong", nil)
		b[30] ^= 1
		w.send(b)
		select {
		case <-w.ep.Done():
		case <-time.After(stepLimit):
			t.Error("the connection outlives a wrong checksum")
		}
		want("a message with a wrong checksum")
	})
	t.Run("no checksum", func(t *testing.T) {
		w := dial(t)
		b := message(1, 9, port, ackReq, "none", nil)
		rdshdr.Header(b).SetChecksum(0)
		w.send(b)
		w.wantAck(1)
		want("a message without a checksum", "none")
	})
	// A probe as TCP has it, with a new generation, makes the kernel assert that this is TCP (Q6): a
	// warning with a stack trace, so it is not sent.
	t.Run("generation probe", func(t *testing.T) {
		t.Cleanup(discardGuest)
		w := dial(t)
		w.send(message(1, 1, 0, ackReq, "", func(h rdshdr.Header) {
			if err := h.AddExt(rdshdr.ExtGenNum, []byte{1, 2, 3, 4}); err != nil {
				t.Fatal(err)
			}
		}))
		h, _ := w.next()
		for h.Seq() == 0 {
			h, _ = w.next()
		}
		t.Logf("the pong: %x", []byte(h))
		if log := g.Run(t, "dmesg"); !strings.Contains(log, "WARNING:") {
			t.Error("the kernel has no objection to a probe over IB")
		} else {
			_, warning, _ := strings.Cut(log, "WARNING:")
			line, _, _ := strings.Cut(warning, "\n")
			t.Logf("the kernel warns: %s", line)
		}
	})
}
