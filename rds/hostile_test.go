package rds_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/rds"
)

// TestHostilePeer throws mutants of a connection's own packets at both its ends for twenty seconds of its
// traffic: from the peer's address, to the live QPN, with a PSN in the window, half of them with a
// right ICRC. Any of them may end the connection, as a peer may end its own; each datagram arrives all
// the same, once and in order, nothing panics, and in the end everything closes with nothing held.
//
// Mutants that are a wellformed continuation of the stream would be the peer itself, so payloads of SENDs
// are not among what is made valid.
func TestHostilePeer(t *testing.T) {
	for seed := range uint64(3) {
		synctest.Test(t, func(t *testing.T) { hostile(t, seed) })
	}
}

func hostile(t *testing.T, seed uint64) {
	t.Logf("seed %d", seed)
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	n := simnet.New(seed, simnet.Config{Link: simnet.LinkConfig{Delay: 20 * time.Microsecond}})
	defer n.Close()
	r := rand.New(rand.NewPCG(seed, 99))

	// The attacker reads along and speaks from the addresses of both hosts.
	attack := map[netip.Addr]packetio.Conn{}
	for _, x := range []netip.Addr{a, b} {
		c, err := n.Listen(netip.AddrPortFrom(x, 5000))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		attack[x] = c
	}
	var mu sync.Mutex
	seen := map[netip.Addr][][]byte{} // recent packets by source
	n.SetTap(func(e simnet.Event) {
		if e.Kind != simnet.Sent || e.From.Port() != roce.Port || len(e.Data) > 200 && e.N%8 != 0 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		s := append(seen[e.From.Addr()], append([]byte(nil), e.Data...))
		seen[e.From.Addr()] = s[max(0, len(s)-64):]
	})

	open := func(addr netip.Addr) (*rds.Service, *rds.Socket) {
		svc, err := rds.Open(rds.Config{Network: n})
		if err != nil {
			t.Fatal(err)
		}
		s, err := svc.ListenAddrPort(t.Context(), netip.AddrPortFrom(addr, 4000))
		if err != nil {
			t.Fatal(err)
		}
		return svc, s
	}
	sa, ka := open(a)
	sb, kb := open(b)
	stop := time.Now().Add(20 * time.Second)
	var wg sync.WaitGroup
	for _, dir := range []struct{ from, to *rds.Socket }{{ka, kb}, {kb, ka}} {
		end := make(chan uint64, 1)
		wg.Go(func() {
			buf := make([]byte, 9000)
			i := uint64(0)
			for ; time.Now().Before(stop); i++ {
				binary.BigEndian.PutUint64(buf, i)
				if _, err := dir.from.WriteToAddrPort(buf[:8+int(i*797%8900)], dir.to.AddrPort()); err != nil {
					t.Errorf("write %d: %v", i, err)
					break
				}
				time.Sleep(time.Millisecond)
			}
			end <- i
		})
		wg.Go(func() {
			buf := make([]byte, 9000)
			for i := uint64(0); ; i++ {
				dir.to.SetReadDeadline(time.Now().Add(2 * time.Minute))
				k, _, err := dir.to.ReadFromAddrPort(buf)
				if err != nil {
					if total := <-end; total != i {
						t.Errorf("%d of %d arrived: %v", i, total, err)
					}
					return
				}
				if got := binary.BigEndian.Uint64(buf); got != i || k != 8+int(i*797%8900) {
					t.Errorf("datagram %d, %d bytes, in the place of %d", got, k, i)
					return
				}
			}
		})
	}
	sent := 0
	for time.Now().Before(stop) {
		time.Sleep(time.Duration(r.IntN(4000)) * time.Microsecond)
		for _, from := range []netip.Addr{a, b} {
			to := b
			if from == b {
				to = a
			}
			mu.Lock()
			var base []byte
			if s := seen[from]; len(s) > 0 {
				base = append(base, s[len(s)-1-r.IntN(min(4, len(s)))]...)
			}
			mu.Unlock()
			if base == nil {
				continue
			}
			src := netip.AddrPortFrom(from, 5000)
			m := mutate(r, base, roce.NewFlow(src, netip.AddrPortFrom(to, roce.Port)))
			attack[from].Send([]packetio.TxTrain{{To: netip.AddrPortFrom(to, roce.Port), Segs: 1, SegSize: len(m), Vec: [][]byte{m}}})
			sent++
		}
	}
	wg.Wait()
	n.SetTap(nil)
	resets := sa.Stats().Conn.ConnReset + sb.Stats().Conn.ConnReset
	t.Logf("%d mutants; connections were reset %d times", sent, resets)
	if resets == 0 {
		t.Error("no mutant was taken for valid")
	}
	for _, svc := range []*rds.Service{sa, sb} {
		if err := svc.Close(); err != nil {
			t.Error(err)
		}
	}
}

// mutate changes a packet and computes its ICRC again in half of the cases.
func mutate(r *rand.Rand, b []byte, f roce.Flow) []byte {
	bth := roce.BTH(b)
	switch r.IntN(6) {
	case 0: // another opcode, acknowledgements and NAKs among them
		b[0] = byte(r.IntN(0x20))
		if r.IntN(2) == 0 {
			b[0] = byte(roce.RCAck)
		}
		if len(b) > 13 {
			b[12] = byte(r.Uint32())
		}
	case 1: // a PSN nearby
		p := bth.PSN().Add(r.IntN(16) - 8)
		putPSN(b, p)
		if !bth.Opcode().Info().Valid || bth.Opcode().Info().Flags&roce.FlagSend != 0 {
			b[0] = byte(roce.RCReadRequest) // never the peer's own next SEND
		}
	case 2: // cut
		b = b[:max(16, r.IntN(len(b))&^3)]
	case 3: // bits
		for range 1 + r.IntN(4) {
			b[r.IntN(min(len(b), 40))] ^= 1 << r.IntN(8)
		}
	case 4: // lengths and keys of RETHs
		for i := 12; i < min(len(b)-4, 28); i++ {
			b[i] = byte(r.Uint32())
		}
		putPSN(b, bth.PSN().Add(1+r.IntN(2))) // what the peer would send next, as like as not
		b[0] = []byte{byte(roce.RCWriteFirst), byte(roce.RCWriteOnly), byte(roce.RCReadRequest), byte(roce.RCCmpSwap)}[r.IntN(4)]
	case 5: // noise
		for i := range b[12:] {
			b[12+i] = byte(r.Uint32())
		}
		b[0] = byte(r.Uint32())
	}
	if op := roce.Opcode(b[0]); op.Info().Valid && op.Info().Flags&roce.FlagSend != 0 {
		return b // its ICRC stays wrong: with a right one it would be the peer that speaks
	}
	if r.IntN(2) == 0 && len(b)%4 == 0 && len(b) >= 16 && len(b) <= roce.MaxLen {
		roce.PutICRC(b[len(b)-4:], f.Begin(len(b), b[:len(b)-4]))
	}
	return b
}

func putPSN(b []byte, p psn.PSN) { b[9], b[10], b[11] = byte(p>>16), byte(p>>8), byte(p) }
