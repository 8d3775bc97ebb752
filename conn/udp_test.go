package conn

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/openrds/openrds/verbs/softroce"
)

// orderSink verifies order and content without keeping anything but a few buffers, which it puts much later.
type orderSink struct {
	testSink
	t    testing.TB
	next map[uint16]uint64
	n    int
	lent []*RecvBuf
}

func (s *orderSink) Deliver(c *Conn, msgs []Incoming) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range msgs {
		m := &msgs[i]
		data := m.First.Data
		if len(m.More) > 0 {
			data = append([]byte(nil), data...)
			for _, f := range m.More {
				data = append(data, f.Data...)
			}
		}
		if len(data) != m.Len {
			s.t.Errorf("message of %d bytes has %d", m.Len, len(data))
		}
		n := binary.BigEndian.Uint64(data)
		if n != s.next[m.SrcPort] {
			s.t.Errorf("port %d: message %d when %d is due", m.SrcPort, n, s.next[m.SrcPort])
		}
		s.next[m.SrcPort] = n + 1
		if sum(data) != sum(payload(m.SrcPort, n, m.Len)) {
			s.t.Errorf("port %d: message %d arrived changed", m.SrcPort, n)
		}
		if m.First.Buf != nil && !m.First.Buf.Scarce() {
			m.First.Buf.Get()
			s.lent = append(s.lent, m.First.Buf)
			if len(s.lent) > 200 {
				for _, b := range s.lent[:100] {
					b.Put()
				}
				s.lent = append(s.lent[:0], s.lent[100:]...)
			}
		}
		s.n++
	}
	return len(msgs)
}

func (s *orderSink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// ownLoopback is an address of 127.0.0.0/8 that other processes which run these tests do not use.
func ownLoopback(n byte) netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, 64 | byte(pid>>8)&0x3f, byte(pid), n})
}

// TestConcurrentUDP has many goroutines send both ways over real sockets while links are broken under them, ports
// turn congested, and receive buffers are held: for the race detector.
func TestConcurrentUDP(t *testing.T) {
	perSender := 400
	if testing.Short() {
		perSender = 100
	}
	const senders = 6
	addrs := [2]netip.Addr{ownLoopback(31), ownLoopback(32)}
	var hosts [2]*host
	var sinks [2]*orderSink
	for i := range hosts {
		sinks[i] = &orderSink{t: t, next: make(map[uint16]uint64)}
		hosts[i] = newHost(t, nil, addrs[i], func(o *hostOptions) { o.cfg.Sink = sinks[i]; o.sr = softroce.Config{Port: 14792} })
	}
	var wg, bg sync.WaitGroup
	stop := make(chan struct{})
	var owner testOwner
	for i, h := range hosts {
		c := h.conn(addrs[1-i])
		for k := range senders {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), uint64(k)))
				port := uint16(100*i + k + 10)
				for n := range uint64(perSender) {
					size := testSizes[rng.IntN(len(testSizes))]
					for {
						err := c.Send(&owner, port, port, payload(port, n, size))
						if err == nil {
							break
						}
						if !errors.Is(err, ErrNoMemory) {
							t.Error(err)
							return
						}
						time.Sleep(time.Millisecond)
					}
					if rng.IntN(10) == 0 {
						c.Flush()
						h.m.Progress()
						time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
					}
				}
				c.Flush()
			})
		}
		bg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 99))
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(rng.IntN(20)) * time.Millisecond):
				}
				switch rng.IntN(8) {
				case 0:
					c.failLink(errors.New("test"))
				case 1:
					h.m.Snapshot()
					h.m.Stats()
				case 2:
					h.m.SetCongested(addrs[i], uint16(rng.IntN(100)), rng.IntN(2) == 0)
				case 3:
					c.QueuedMessages(100)
				case 4:
					c.Cancel(&testOwner{}, -1)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	bg.Wait()
	for i := range sinks {
		eventually(t, "everything arrives", time.Minute, func() bool { return sinks[i].count() == senders*perSender })
	}
	eventually(t, "everything is acknowledged", time.Minute, func() bool { n, _ := owner.get(); return n == 2*senders*perSender })
	t.Logf("resets %d, resent %d", hosts[0].m.Stats().ConnReset, hosts[0].m.Stats().SendRetransmit)
	for i, h := range hosts {
		sinks[i].mu.Lock()
		for _, b := range sinks[i].lent {
			b.Put()
		}
		sinks[i].mu.Unlock()
		h.close(time.Second)
	}
}
