//go:build linux

package rawudp

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
)

var (
	senderAddr   = netip.MustParseAddr("127.0.0.1")
	receiverAddr = netip.MustParseAddrPort("127.0.0.2:0")
)

// The benchmarks' load, once and briefly.
func TestTwoProcesses(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			s, err := NewSender(senderAddr, startReceiver(t, v.o, discardEnv), v.o)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for _, payload := range []int{0, 112, 4096} {
				if err := s.SendPackets(3000, payload); err != nil {
					t.Fatalf("%d bytes: %v", payload, err)
				}
			}
			if st := s.Stats(); st.Packets != 9000 || st.BadICRC != 0 {
				t.Errorf("%+v after 9000 packets", st)
			}
		})
	}
}

func TestMessages(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			r, err := NewReceiver(receiverAddr, v.o)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			s, err := NewSender(senderAddr, r.Addr(), v.o)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()

			rng := rand.New(rand.NewPCG(1, 2))
			content := make([]byte, MaxMessageBytes)
			for i := range content {
				content[i] = byte(rng.Uint32())
			}
			sizes := []int{0, 1, 3, 4, 4095, 4096, 4097, 61440, 61441, MaxMessageBytes, 0}
			for range 300 {
				sizes = append(sizes, rng.IntN(1<<rng.IntN(18)+1))
			}
			sent := make(chan error, 1)
			go func() {
				for i, n := range sizes {
					if err := s.Send(content[:n], i%7 != 0 && i < len(sizes)-1); err != nil {
						sent <- err
						return
					}
				}
				sent <- s.Drain()
			}()
			p := make([]byte, MaxMessageBytes)
			for i, want := range sizes {
				n, err := r.Recv(p)
				if err != nil {
					t.Fatal(err)
				}
				if n != want || !bytes.Equal(p[:n], content[:n]) {
					t.Fatalf("message %d: %d bytes instead of %d, or other ones", i, n, want)
				}
			}
			// The last acknowledgement goes out before Recv looks at its deadline.
			if err := r.SetDeadline(time.Now()); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Recv(p); !errors.Is(err, ErrDeadline) {
				t.Errorf("after the last message: %v", err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if st := r.Stats(); st.BadICRC != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A scripted peer: an ordinary socket and what the test says.
type peer struct {
	t    *testing.T
	conn *net.UDPConn
	addr netip.AddrPort // ours
	to   netip.AddrPort
}

func newPeer(t *testing.T, local string) *peer {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(local)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) { // identification 0, as in socket.setup
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	if err != nil {
		t.Fatal(err)
	}
	return &peer{t: t, conn: c, addr: c.LocalAddr().(*net.UDPAddr).AddrPort()}
}

// want reads the next packet and checks its number.
func (p *peer) want(sentence string, op roce.Opcode, number int) roce.Packet {
	p.t.Helper()
	if err := p.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		p.t.Fatal(err)
	}
	b := make([]byte, 8192)
	n, from, err := p.conn.ReadFromUDPAddrPort(b)
	if err != nil {
		p.t.Fatalf("%s: %v", sentence, err)
	}
	p.to = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	f := roce.NewFlow(p.to, p.addr)
	var pkt roce.Packet
	if id, v := f.Check(b[:n], 0); v == roce.Bad || id >= maxTrainSegs {
		p.t.Fatalf("%s: ICRC is %v, id %d", sentence, v, id)
	}
	if err := roce.Parse(b[:n], &pkt); err != nil {
		p.t.Fatalf("%s: %v", sentence, err)
	}
	if pkt.Op != op || pkt.BTH.PSN() != psn.New(uint32(number)) {
		p.t.Fatalf("%s: got %v %d, want %v %d", sentence, pkt.Op, pkt.BTH.PSN(), op, number)
	}
	return pkt
}

// write sends a packet with a right ICRC, of which a byte is spoilt afterwards if spoil is not zero.
func (p *peer) write(op roce.Opcode, number int, ackReq bool, body []byte, spoil byte) {
	p.t.Helper()
	b := make([]byte, roce.BTHLen+len(body)+roce.ICRCLen)
	roce.PutBTH(b, op, false, 0, ackReq, testQPN, psn.New(uint32(number)))
	copy(b[roce.BTHLen:], body)
	f := roce.NewFlow(p.addr, p.to)
	roce.PutICRC(b[len(b)-4:], f.Begin(len(b), b[:len(b)-4]))
	b[roce.BTHLen] ^= spoil
	if _, err := p.conn.WriteToUDPAddrPort(b, p.to); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) writeAck(number int, syndrome uint8) {
	p.t.Helper()
	p.write(roce.RCAck, number, false, []byte{syndrome, 0, 0, 0}, 0)
}

func TestSenderGoesBack(t *testing.T) {
	p := newPeer(t, "127.0.0.2:0")
	s, err := NewSender(senderAddr, p.addr, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 3 {
		if err := s.Send(make([]byte, 64), false); err != nil {
			t.Fatal(err)
		}
		if pkt := p.want("each message goes out at once", roce.RCSendOnly, i); !pkt.BTH.AckReq() {
			t.Error("a message with none behind it does not ask for an acknowledgement")
		}
	}
	drained := make(chan error, 1)
	go func() { drained <- s.Drain() }()
	p.want("without an acknowledgement the window goes out again", roce.RCSendOnly, 0)
	p.want("all of it", roce.RCSendOnly, 1)
	p.want("in order", roce.RCSendOnly, 2)
	p.writeAck(99, roce.SynACK) // never sent: ignored
	p.writeAck(0, roce.SynNAKSeq)
	p.want("a NAK brings what comes after it", roce.RCSendOnly, 1)
	p.want("to the end", roce.RCSendOnly, 2)
	p.writeAck(2, roce.SynACK)
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.Packets != 3 || st.Retransmits < 5 {
		t.Errorf("%+v", st)
	}
}

func TestReceiverRefuses(t *testing.T) {
	r, err := NewReceiver(receiverAddr, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := newPeer(t, "127.0.0.1:0")
	p.to = r.Addr()
	received := make(chan []byte, 8)
	done := make(chan error, 1)
	go func() {
		b := make([]byte, 64)
		for {
			n, err := r.Recv(b)
			if err != nil {
				done <- err
				return
			}
			received <- bytes.Clone(b[:n])
		}
	}()
	p.write(roce.RCSendOnly, 0, true, []byte("zero"), 0x01)
	p.write(roce.RCSendOnly, 0, true, []byte("ZERO"), 0)
	p.want("a corrupt packet is ignored, the sound one acknowledged", roce.RCAck, 0)
	p.write(roce.RCSendOnly, 2, false, []byte("two2"), 0)
	if pkt := p.want("a gap is reported", roce.RCAck, 0); pkt.AETH().Syndrome() != roce.SynNAKSeq {
		t.Errorf("syndrome %#x", pkt.AETH().Syndrome())
	}
	p.write(roce.RCSendOnly, 3, false, []byte("thre"), 0) // one NAK per gap
	p.write(roce.RCSendOnly, 0, true, []byte("ZERO"), 0)
	if pkt := p.want("a duplicate that asks is acknowledged", roce.RCAck, 0); pkt.AETH().Syndrome() != roce.SynACK {
		t.Errorf("syndrome %#x", pkt.AETH().Syndrome())
	}
	stranger := newPeer(t, "127.0.0.1:0")
	stranger.to = r.Addr()
	stranger.write(roce.RCSendOnly, 1, false, []byte("evil"), 0)
	p.write(roce.RCSendOnly, 1, true, []byte("ONE1"), 0)
	p.want("after the gap is closed", roce.RCAck, 1)
	for _, want := range []string{"ZERO", "ONE1"} {
		if got := <-received; string(got) != want {
			t.Errorf("received %q, want %q", got, want)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("a blocked Recv returned %v", err)
	}
	if st := r.Stats(); st.Packets != 2 || st.BadICRC != 2 || st.OutOfOrder != 2 || st.Duplicates != 1 {
		t.Errorf("%+v", st)
	}
	if len(received) != 0 {
		t.Errorf("%q was delivered, too", <-received)
	}
}

func TestDeadline(t *testing.T) {
	r, err := NewReceiver(receiverAddr, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.SetDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Recv(nil); !errors.Is(err, ErrDeadline) {
		t.Errorf("Recv past its deadline: %v", err)
	}
}
