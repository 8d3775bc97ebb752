package rds

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Tests over real UDP sockets on loopback.

var (
	loA = netip.MustParseAddr("127.0.0.21")
	loB = netip.MustParseAddr("127.0.0.22")
)

// udpPort is not RoCEv2's, so that the tests do not meet whatever runs on this machine, nor themselves.
var udpPort = uint16(20000 + os.Getpid()%10000)

func openUDP(t testing.TB, cfg Config) *Service {
	t.Helper()
	if len(cfg.Providers) == 0 {
		cfg.UDPPort = udpPort
	}
	svc, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeService(t, svc) })
	return svc
}

func TestUDP(t *testing.T) {
	for name, cfg := range map[string]Config{"open": {}, "kernel": {Dialect: DialectKernelOnly}} {
		t.Run(name, func(t *testing.T) {
			sa, sb := openUDP(t, cfg), openUDP(t, cfg)
			var as, bs []*Socket
			for i := range 4 {
				as = append(as, bind(t, sa, ap(loA, uint16(4000+i))))
				bs = append(bs, bind(t, sb, ap(loB, uint16(4000+i))))
			}
			var wg sync.WaitGroup
			count := 500
			if raceEnabled {
				count = 60 // its checks of copies make this 50 times slower
			}
			half := func(from, to []*Socket) {
				for i, r := range to {
					st, c := stream{seed: uint64(i), max: MaxMessageSize}, newChecker(r)
					c.lend = i%2 == 0
					c.streams[from[i].AddrPort()] = st
					wg.Go(func() {
						if err := st.send(from[i], r.AddrPort(), 0, count); err != nil {
							t.Error(err)
						}
					})
					wg.Go(func() {
						r.SetReadDeadline(time.Now().Add(time.Minute))
						for range count {
							if err := c.read(); err != nil {
								t.Errorf("%v, after %d datagrams: %v", r.Addr(), c.total(), err)
								return
							}
						}
					})
				}
			}
			half(as, bs)
			half(bs, as)
			wg.Wait()
		})
	}
}

// An address that this host does not have is told from one that another process has.
func TestUDPAddresses(t *testing.T) {
	svc := openUDP(t, Config{})
	for _, a := range []string{"192.0.2.1:4000", "[2001:db8::1]:4000"} {
		if _, err := svc.ListenPacket(t.Context(), a); !errors.Is(err, ErrAddrNotAvailable) || !errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, ErrAddrInUse) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestUDPPing(t *testing.T) {
	sa, sb := openUDP(t, Config{}), openUDP(t, Config{})
	a := bind(t, sa, ap(loA, 4000))
	bind(t, sb, ap(loB, 4000))
	for range 3 {
		mustWrite(t, a, nil, ap(loB, PingPort))
		wantRead(t, a, nil, ap(loB, PingPort))
	}
}

// Whole stacks on both sides, and not one allocation per datagram.
func TestUDPNoAllocs(t *testing.T) {
	skipIfInstrumented(t)
	for _, size := range []int{64, 8192} {
		a := bind(t, openUDP(t, Config{}), ap(loA, 4000))
		b := bind(t, openUDP(t, Config{}), ap(loB, 4000))
		// Bursts that fit in the buffers, so that one goroutine can do both sides.
		burst := min(1000, DefaultBuffer/2/size)
		p, q, to := payload(size, 1), make([]byte, size), b.AddrPort()
		b.SetReadDeadline(time.Now().Add(time.Minute))
		round := func(lend bool) func() {
			return func() {
				for range burst {
					if _, err := a.WriteToAddrPort(p, to); err != nil {
						t.Fatal(err)
					}
				}
				for range burst {
					if lend {
						m, err := b.Receive(context.Background())
						if err != nil {
							t.Fatal(err)
						}
						m.Release()
					} else if n, _, err := b.ReadFromAddrPort(q); err != nil || n != size {
						t.Fatal(n, err)
					}
				}
			}
		}
		for _, lend := range []bool{false, true} {
			f := round(lend)
			for range 20 {
				f() // queues and pools grow to their size
			}
			wantNoAllocs(t, "datagrams over UDP", burst, 2000, f) // two per burst and engine
		}
		if !bytes.Equal(p, q) {
			t.Error("wrong content")
		}
		a.svc.Close()
		b.svc.Close()
	}
}
