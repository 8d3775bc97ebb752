package rds

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// rdmaPair is a client and a server that do RDMA with each other.
type rdmaPair struct {
	net            *simnet.Net
	svcs           []*Service
	client, server *Socket
}

// eachPair runs fn between two hosts in both dialects, between two addresses of one Service, and between hosts whose devices have
// neither fast registration nor windows.
func eachPair(t *testing.T, fn func(t *testing.T, p *rdmaPair)) {
	for _, mode := range []string{"open", "kernel", "local", "plain"} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newRDMAPair(t, mode, Config{})
				fn(t, p)
				p.close(t)
			})
		})
	}
}

func newRDMAPair(t *testing.T, mode string, cfg Config) *rdmaPair {
	p := &rdmaPair{net: simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})}
	if mode == "kernel" {
		cfg.Dialect = DialectKernelOnly
	}
	open := func() {
		if mode != "plain" {
			p.svcs = append(p.svcs, openSim(t, p.net, cfg))
			return
		}
		var f faultverbs.Faults
		f.Without(verbs.CapMemMgtExtensions | verbs.CapMW1 | verbs.CapMW2A | verbs.CapMW2B)
		cfg.Providers = []verbs.Provider{faultverbs.Wrap(softroce.New(softroce.Config{Network: p.net}), &f)}
		svc, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		p.svcs = append(p.svcs, svc)
	}
	if open(); mode != "local" {
		open()
	}
	p.client = bind(t, p.svcs[0], ap(addrA, 4000))
	p.server = bind(t, p.svcs[len(p.svcs)-1], ap(addrB, 4000))
	return p
}

func (p *rdmaPair) close(t *testing.T) {
	for _, svc := range p.svcs {
		closeService(t, svc)
	}
}

var addrStranger = netip.MustParseAddr("10.0.0.99")

func bg() context.Context { return context.Background() }

// mustRegister registers n bytes that begin at an odd place.
func mustRegister(t testing.TB, s *Socket, n int, opt RegionOptions) *Region {
	t.Helper()
	r, err := s.RegisterRegion(bg(), make([]byte, n+56)[56:], opt)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustSend(t testing.TB, s *Socket, m Message) {
	t.Helper()
	if err := s.Send(bg(), m); err != nil {
		t.Fatal(err)
	}
}

func mustReceive(t testing.TB, s *Socket) Message {
	t.Helper()
	m, err := s.Receive(bg())
	if err != nil {
		t.Fatal(err)
	}
	c := Message{Peer: m.Peer, Data: bytes.Clone(m.Bytes()), Cookie: m.Cookie}
	m.Release()
	return c
}

func wantCompletion(t testing.TB, s *Socket, token uint64, st CompletionStatus) {
	t.Helper()
	c, err := s.ReadCompletion(bg())
	if err != nil {
		t.Fatal(err)
	}
	if c.Token != token || c.Status != st {
		t.Errorf("completion %d: %v, want %d: %v", c.Token, c.Status, token, st)
	}
}

func isDone(r *Region) bool {
	select {
	case <-r.Done():
		return true
	default:
		return false
	}
}

// waitDone waits for the memory of regions.
func waitDone(t testing.TB, rs ...*Region) {
	t.Helper()
	for _, r := range rs {
		select {
		case <-r.Done():
		case <-time.After(time.Minute):
			t.Fatal("a region is not given back")
		}
	}
}

// TestRDMARequest is how RDMA is used: a client hands out a region with a request, the server reads or writes it
// and says so in its reply.
func TestRDMARequest(t *testing.T) {
	ways := map[string]func(s *Socket, m Message, mem []byte, opt RegionOptions) (*Region, error){
		"register": func(s *Socket, m Message, mem []byte, opt RegionOptions) (*Region, error) {
			r, err := s.RegisterRegion(bg(), mem, opt)
			if err == nil {
				m.Cookie = r.Cookie()
				err = s.Send(bg(), m)
			}
			return r, err
		},
		"for": func(s *Socket, m Message, mem []byte, opt RegionOptions) (*Region, error) {
			r, err := s.RegisterRegionFor(bg(), m.Peer, mem, opt)
			if err == nil {
				m.Cookie = r.Cookie()
				err = s.Send(bg(), m)
			}
			return r, err
		},
		"mapped": func(s *Socket, m Message, mem []byte, opt RegionOptions) (*Region, error) {
			return s.SendMapped(bg(), m, mem, opt)
		},
	}
	for name, hand := range ways {
		t.Run(name, func(t *testing.T) {
			eachPair(t, func(t *testing.T, p *rdmaPair) {
				for _, size := range []int{1, 100, 4096, 70000, 1 << 20} {
					for _, request := range []int{0, 16, 3000, 50000} {
						mem := make([]byte, size+33)[33:]
						r, err := hand(p.client, Message{Peer: p.server.AddrPort(), Data: payload(request, 7)}, mem, RegionOptions{UseOnce: true, Invalidate: true})
						if err != nil {
							t.Fatal(err)
						}
						m := mustReceive(t, p.server)
						if m.Cookie != r.Cookie() || !bytes.Equal(m.Data, payload(request, 7)) {
							t.Fatalf("the request of %d bytes has cookie %v, want %v", len(m.Data), m.Cookie, r.Cookie())
						}
						src := mustRegister(t, p.server, size, RegionOptions{})
						copy(src.Bytes(), payload(size, byte(size)))
						mustSend(t, p.server, Message{Peer: m.Peer, Data: []byte("done"),
							RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{src.Piece(0, size)}, Remote: m.Cookie, Notify: true, Token: uint64(size)}})
						reply := mustReceive(t, p.client)
						if reply.Cookie != 0 || string(reply.Data) != "done" || !bytes.Equal(mem, payload(size, byte(size))) {
							t.Fatalf("%d bytes are not there with the reply %q", size, reply.Data)
						}
						wantCompletion(t, p.server, uint64(size), StatusSuccess)
						waitDone(t, r) // used once
						if err := r.Err(); !errors.Is(err, ErrStaleCookie) {
							t.Errorf("the region was used, and is %v", err)
						}
						if err := src.Invalidate(bg()); err != nil {
							t.Fatal(err)
						}
					}
				}
				if st := p.client.svc.Stats(); st.RecvUsedOnce != 20 || st.RecvUnknownKey != 0 {
					t.Errorf("%d regions used, %d unknown", st.RecvUsedOnce, st.RecvUnknownKey)
				}
			})
		})
	}
}

// TestRDMAPieces: READ and WRITE of several pieces, at offsets.
func TestRDMAPieces(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		local, local2 := mustRegister(t, p.server, 10000, RegionOptions{}), mustRegister(t, p.server, 5000, RegionOptions{})
		remote := mustRegister(t, p.client, 20000, RegionOptions{})
		copy(local.Bytes(), payload(10000, 1))
		copy(local2.Bytes(), payload(5000, 2))
		pieces := []Piece{local.Piece(10, 990), local2.Piece(0, 5000), local.Piece(9000, 1000), local.Piece(0, 1)}
		var want []byte
		for _, x := range pieces {
			want = append(want, x.Region.Bytes()[x.Offset:x.Offset+x.Length]...)
		}
		mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: pieces, Remote: remote.Cookie(), RemoteOffset: 77}})
		mustReceive(t, p.client)
		if !bytes.Equal(remote.Bytes()[77:77+len(want)], want) {
			t.Error("WRITE: wrong bytes")
		}
		clear(local.Bytes())
		clear(local2.Bytes())
		mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMARead, Local: pieces, Remote: remote.Cookie(), RemoteOffset: 77, Notify: true}})
		wantCompletion(t, p.server, 0, StatusSuccess)
		var got []byte
		for _, x := range pieces[:3] {
			got = append(got, x.Region.Bytes()[x.Offset:x.Offset+x.Length]...)
		}
		if !bytes.Equal(got, want[:len(got)]) || local.Bytes()[0] != want[len(got)] {
			t.Error("READ: wrong bytes")
		}
		mustReceive(t, p.client)
		if isDone(remote) || remote.Err() != nil {
			t.Error("a region that is not for one use is gone")
		}
	})
}

func TestRDMAAtomic(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		old := mustRegister(t, p.server, 8, RegionOptions{})
		word := mustRegister(t, p.client, 16, RegionOptions{Atomic: true})
		plain := mustRegister(t, p.client, 16, RegionOptions{})
		at := func(r *Region, off int) uint64 { return binary.NativeEndian.Uint64(r.Bytes()[off:]) }
		do := func(r RDMA, st CompletionStatus) {
			t.Helper()
			r.Local, r.Notify, r.Silent = []Piece{old.Piece(0, 8)}, true, true
			mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &r})
			wantCompletion(t, p.server, 0, st)
		}
		do(RDMA{Op: FetchAdd, Remote: word.Cookie(), RemoteOffset: 8, Add: 5}, StatusSuccess)
		do(RDMA{Op: FetchAdd, Remote: word.Cookie(), RemoteOffset: 8, Add: 1}, StatusSuccess)
		if at(old, 0) != 5 || at(word, 8) != 6 || at(word, 0) != 0 {
			t.Errorf("additions: %d, then %d", at(old, 0), at(word, 8))
		}
		do(RDMA{Op: CompareSwap, Remote: word.Cookie(), RemoteOffset: 8, Compare: 6, Swap: 9}, StatusSuccess)
		do(RDMA{Op: CompareSwap, Remote: word.Cookie(), RemoteOffset: 8, Compare: 6, Swap: 10}, StatusSuccess)
		if at(old, 0) != 9 || at(word, 8) != 9 {
			t.Errorf("swaps: %d, then %d", at(old, 0), at(word, 8))
		}
		do(RDMA{Op: FetchAdd, Remote: plain.Cookie(), Add: 5}, StatusRemoteError)
		if at(plain, 0) != 0 {
			t.Error("an addition to a region that does not admit it")
		}
		for _, r := range []RDMA{
			{Op: FetchAdd, Local: []Piece{old.Piece(0, 4)}, Remote: word.Cookie()},
			{Op: FetchAdd, Local: []Piece{old.Piece(0, 8)}, Remote: word.Cookie(), RemoteOffset: 4},
			{Op: FetchAdd, Local: []Piece{word.Piece(4, 8)}, Remote: word.Cookie()},
			{Op: CompareSwap, Local: []Piece{old.Piece(0, 4), old.Piece(4, 4)}, Remote: word.Cookie()},
		} {
			if err := p.server.Send(bg(), Message{Peer: p.client.AddrPort(), RDMA: &r}); !errors.Is(err, ErrMisaligned) || !errors.Is(err, syscall.EFAULT) {
				t.Errorf("%v of %v at %d: %v", r.Op, r.Local[0].Length, r.RemoteOffset, err)
			}
		}
		for _, op := range []RDMAOp{MaskedCompareSwap, MaskedFetchAdd} {
			err := p.server.Send(bg(), Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: op, Local: []Piece{old.Piece(0, 8)}, Remote: word.Cookie()}})
			if !errors.Is(err, ErrNotSupported) {
				t.Errorf("%v: %v", op, err)
			}
		}
	})
}

// TestRDMAProtection: what a cookie does not grant is refused, and the other datagrams do not suffer.
func TestRDMAProtection(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		local := mustRegister(t, p.server, 200, RegionOptions{})
		rw, ro, freed := mustRegister(t, p.client, 100, RegionOptions{}), mustRegister(t, p.client, 100, RegionOptions{ReadOnly: true}), mustRegister(t, p.client, 100, RegionOptions{})
		if err := freed.Invalidate(bg()); err != nil {
			t.Fatal(err)
		}
		n := 0
		do := func(what string, r RDMA, st CompletionStatus) {
			t.Helper()
			n++
			r.Notify, r.Token = true, uint64(n)
			if r.Local == nil {
				r.Local = []Piece{local.Piece(0, 100)}
			}
			mustWrite(t, p.server, []byte("before"), p.client.AddrPort())
			mustSend(t, p.server, Message{Peer: p.client.AddrPort(), Data: []byte("with"), RDMA: &r})
			mustWrite(t, p.server, []byte("after"), p.client.AddrPort())
			c, err := p.server.ReadCompletion(bg())
			if err != nil || c.Token != uint64(n) || c.Status != st || (c.Err() == nil) != (st == StatusSuccess) || st == StatusRemoteError && c.Err() != ErrRemoteAccess {
				t.Errorf("%s: %+v, %v", what, c, err)
			}
			want := []string{"before", "with", "after"}
			if st != StatusSuccess {
				want = []string{"before", "after"}
			}
			for _, w := range want {
				if m := mustReceive(t, p.client); string(m.Data) != w {
					t.Fatalf("%s: received %q, want %q", what, m.Data, w)
				}
			}
		}
		do("READ of a region for reading", RDMA{Op: RDMARead, Remote: ro.Cookie()}, StatusSuccess)
		do("WRITE to it", RDMA{Op: RDMAWrite, Remote: ro.Cookie()}, StatusRemoteError)
		do("past the end", RDMA{Op: RDMAWrite, Remote: rw.Cookie(), RemoteOffset: 1}, StatusRemoteError)
		do("before the begin", RDMA{Op: RDMARead, Remote: MakeCookie(rw.Cookie().RKey(), rw.Cookie().Offset()-1)}, StatusRemoteError)
		do("far away", RDMA{Op: RDMARead, Remote: rw.Cookie(), RemoteOffset: 1 << 31}, StatusRemoteError)
		do("another variant of the key", RDMA{Op: RDMAWrite, Remote: rw.Cookie() ^ 1}, StatusRemoteError)
		do("a key of nobody", RDMA{Op: RDMAWrite, Remote: 0xffffff01}, StatusRemoteError)
		do("a region that was freed", RDMA{Op: RDMAWrite, Remote: freed.Cookie()}, StatusRemoteError)
		do("all of it", RDMA{Op: RDMAWrite, Remote: rw.Cookie()}, StatusSuccess)
		if !bytes.Equal(ro.Bytes(), make([]byte, 100)) || !bytes.Equal(freed.Bytes(), make([]byte, 100)) {
			t.Error("memory was written that was not to be")
		}
	})
}

// TestRegionErrors: what is refused here, with the kernel's errno.
func TestRegionErrors(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		s := p.client
		other := bind(t, s.svc, ap(addrA, 4001))
		mine, theirs := mustRegister(t, s, 100, RegionOptions{}), mustRegister(t, other, 100, RegionOptions{})
		stale := mustRegister(t, s, 100, RegionOptions{})
		stale.Close()
		big := make([]byte, MaxRDMASize+1)
		to := p.server.AddrPort()
		send := func(m Message) error { m.Peer = to; return s.Send(bg(), m) }
		op := func(pieces ...Piece) error { return send(Message{RDMA: &RDMA{Op: RDMAWrite, Local: pieces}}) }
		reg := func(mem []byte, opt RegionOptions) error { _, err := s.RegisterRegion(bg(), mem, opt); return err }
		cancelled, cancel := context.WithCancel(bg())
		cancel()
		_, errCtx := s.RegisterRegion(cancelled, big[:1], RegionOptions{})
		_, errDest := s.RegisterRegionFor(bg(), netip.AddrPort{}, big[:1], RegionOptions{})
		for what, c := range map[string]struct {
			err, want error
			errno     syscall.Errno
		}{
			"region of 1 MiB and a byte":  {reg(big, RegionOptions{}), ErrRegionTooLarge, syscall.EMSGSIZE},
			"region of nothing":           {reg(nil, RegionOptions{}), ErrInvalid, syscall.EINVAL},
			"read-only and atomic":        {reg(big[:8], RegionOptions{ReadOnly: true, Atomic: true}), ErrInvalid, syscall.EINVAL},
			"context done":                {errCtx, context.Canceled, 0},
			"no destination":              {errDest, ErrInvalid, syscall.EINVAL},
			"cookie of a freed region":    {send(Message{Cookie: stale.Cookie()}), ErrStaleCookie, syscall.EINVAL},
			"cookie of nothing":           {send(Message{Cookie: 12345}), ErrStaleCookie, syscall.EINVAL},
			"cookie with another offset":  {send(Message{Cookie: mine.Cookie() ^ 1<<32}), ErrStaleCookie, syscall.EINVAL},
			"cookie of another socket":    {send(Message{Cookie: theirs.Cookie()}), ErrForeignRegion, syscall.EINVAL},
			"cookie and operation":        {send(Message{Cookie: mine.Cookie(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{mine.Piece(0, 1)}}}), ErrInvalid, syscall.EINVAL},
			"piece of a freed region":     {op(mine.Piece(0, 10), stale.Piece(0, 10)), ErrStaleCookie, syscall.EINVAL},
			"piece of another socket":     {op(mine.Piece(0, 10), theirs.Piece(0, 10)), ErrForeignRegion, syscall.EINVAL},
			"piece of nothing":            {op(Piece{}), ErrInvalid, syscall.EINVAL},
			"piece past the end":          {op(mine.Piece(91, 10)), ErrInvalid, syscall.EINVAL},
			"piece that wraps":            {op(mine.Piece(1<<62, 1<<62)), ErrInvalid, syscall.EINVAL},
			"piece before the begin":      {op(mine.Piece(-1, 10)), ErrInvalid, syscall.EINVAL},
			"empty piece":                 {op(mine.Piece(0, 0)), ErrInvalid, syscall.EINVAL},
			"no pieces":                   {op(), ErrInvalid, syscall.EINVAL},
			"1025 pieces":                 {op(make1025(mine)...), ErrRegionTooLarge, syscall.EMSGSIZE},
			"operation that is none":      {send(Message{RDMA: &RDMA{Local: []Piece{mine.Piece(0, 1)}}}), ErrInvalid, syscall.EINVAL},
			"remote offset over 32 bits":  {send(Message{RDMA: &RDMA{Op: RDMARead, Local: []Piece{mine.Piece(0, 1)}, RemoteOffset: 1 << 32}}), ErrInvalid, syscall.EINVAL},
			"freeing what is not there":   {s.FreeRegion(stale.Cookie(), false), ErrStaleCookie, syscall.EINVAL},
			"freeing another's":           {s.FreeRegion(theirs.Cookie(), false), ErrForeignRegion, syscall.EINVAL},
			"message to a foreign family": {s.Send(bg(), Message{Peer: netip.MustParseAddrPort("[fd00::1]:1"), Cookie: mine.Cookie()}), ErrNotSupported, syscall.EOPNOTSUPP},
		} {
			var oe *OpError
			if !errors.Is(c.err, c.want) || c.errno != 0 && !errors.Is(c.err, c.errno) || !errors.As(c.err, &oe) {
				t.Errorf("%s: %v", what, c.err)
			}
		}
		if mine.Err() != nil {
			t.Error(mine.Err())
		}
		if err := s.FreeRegion(mine.Cookie(), true); err != nil {
			t.Error(err)
		}
		waitDone(t, mine)
		if err := mine.Invalidate(bg()); err != nil {
			t.Error("freeing twice:", err)
		}
		if err := mine.Close(); err != nil {
			t.Error("freeing twice:", err)
		}
		other.Close()
		waitDone(t, theirs)
		if _, err := other.RegisterRegion(bg(), big[:1], RegionOptions{}); !errors.Is(err, ErrClosed) {
			t.Errorf("registering with a closed socket: %v", err)
		}
		if _, err := other.ReadCompletion(bg()); !errors.Is(err, ErrClosed) {
			t.Errorf("completions of a closed socket: %v", err)
		}
	})
}

func make1025(r *Region) (ps []Piece) {
	for range 1025 {
		ps = append(ps, r.Piece(0, 1))
	}
	return ps
}

// TestSocketCloseFreesRegions: peers cannot reach the memory of a socket that was closed; an operation of its own on the
// way keeps what it needs until it is through.
func TestSocketCloseFreesRegions(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		local := mustRegister(t, p.server, 1<<20, RegionOptions{})
		remote := mustRegister(t, p.client, 1<<20, RegionOptions{})
		again := bind(t, p.client.svc, ap(addrA, 4001))
		copy(local.Bytes(), payload(1<<20, 3))
		mustSend(t, p.server, Message{Peer: p.client.AddrPort(), Data: []byte("x"),
			RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 1<<20)}, Remote: remote.Cookie()}})
		p.server.Close()
		mustReceive(t, p.client)
		if !bytes.Equal(remote.Bytes(), payload(1<<20, 3)) {
			t.Error("the last operation of a closed socket did not arrive")
		}
		waitDone(t, local)
		p.client.Close()
		waitDone(t, remote)
		// Its key is of no use to anybody.
		server := bind(t, p.server.svc, ap(addrB, 4001))
		local = mustRegister(t, server, 100, RegionOptions{})
		mustSend(t, server, Message{Peer: again.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 100)}, Remote: remote.Cookie(), Notify: true}})
		wantCompletion(t, server, 0, StatusRemoteError)
	})
}

// TestCompletions: one for each operation that asked, in order; for the others if they fail and RecvErr is set.
func TestCompletions(t *testing.T) {
	eachPair(t, func(t *testing.T, p *rdmaPair) {
		s := p.server
		local, remote := mustRegister(t, s, 100, RegionOptions{}), mustRegister(t, p.client, 100, RegionOptions{})
		do := func(token uint64, notify bool, c Cookie) {
			t.Helper()
			mustSend(t, s, Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 100)}, Remote: c,
				Silent: true, Notify: notify, Token: token}})
		}
		for i := range uint64(200) {
			do(i, i%2 == 0, remote.Cookie())
		}
		for i := range uint64(100) {
			wantCompletion(t, s, 2*i, StatusSuccess)
		}
		if c, ok := s.TryReadCompletion(); ok {
			t.Errorf("one too many: %+v", c)
		}
		// Failures.
		do(1, false, remote.Cookie()^1)
		do(2, true, remote.Cookie())
		c, err := s.ReadCompletion(bg())
		if err != nil || c.Token != 2 || c.Status != StatusSuccess && c.Status != StatusDropped {
			t.Errorf("%+v, %v", c, err)
		}
		s.SetRecvErr(true)
		do(3, false, remote.Cookie()^1)
		wantCompletion(t, s, 3, StatusRemoteError)
		time.Sleep(time.Second) // the connection ends with it, and what is posted until then is dropped
		do(4, false, remote.Cookie())
		do(5, true, remote.Cookie())
		wantCompletion(t, s, 5, StatusSuccess)
		if !s.RecvErr() {
			t.Error("RecvErr is not what was set")
		}
		// Deadlines, contexts.
		start := time.Now()
		s.SetReadDeadline(start.Add(time.Second))
		if _, err := s.ReadCompletion(bg()); !isTimeout(err) || time.Since(start) < time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		s.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(bg(), time.Second)
		defer cancel()
		if _, err := s.ReadCompletion(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		do(6, true, remote.Cookie())
		time.Sleep(time.Second)
		if c, err := s.ReadCompletion(ctx); err != nil || c.Token != 6 {
			t.Errorf("a completion that is there, and a context that is done: %v", err)
		}
		// Several who wait, one by one.
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if _, err := s.ReadCompletion(bg()); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(time.Second)
		for i := range uint64(5) {
			do(i, true, remote.Cookie())
		}
		wg.Wait()
		wg.Go(func() {
			if _, err := s.ReadCompletion(bg()); !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		})
		time.Sleep(time.Second)
		s.Close()
		wg.Wait()
	})
}

// TestCompletionsBound: operations whose completions nobody reads come to an end.
func TestCompletionsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newRDMAPair(t, "local", Config{})
		s := p.server
		local, remote := mustRegister(t, s, 1, RegionOptions{}), mustRegister(t, p.client, 1, RegionOptions{})
		m := Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 1)}, Remote: remote.Cookie(), Silent: true, Notify: true}}
		for range maxCompletions {
			mustSend(t, s, m)
		}
		if err := s.Send(bg(), m); !errors.Is(err, ErrNoBufferSpace) {
			t.Errorf("one more: %v", err)
		}
		s.SetRecvErr(true)
		m.RDMA.Notify, m.RDMA.Remote = false, 1
		mustSend(t, s, m)
		if n := s.svc.Stats().CompletionsLost; n != 1 {
			t.Errorf("%d completions lost", n)
		}
		for range maxCompletions {
			wantCompletion(t, s, 0, StatusSuccess)
		}
		mustSend(t, s, m)
		wantCompletion(t, s, 0, StatusRemoteError)
		p.close(t)
	})
}

// TestRDMADropped: the peer falls silent. The operation that was on its way is dropped, later ones wait, and are cancelled.
func TestRDMADropped(t *testing.T) {
	for _, mode := range []string{"open", "kernel"} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newRDMAPair(t, mode, Config{})
				local, remote := mustRegister(t, p.server, 1<<20, RegionOptions{}), mustRegister(t, p.client, 1<<20, RegionOptions{})
				r := RDMA{Op: RDMARead, Local: []Piece{local.Piece(0, 1<<20)}, Remote: remote.Cookie(), Notify: true}
				mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &r})
				wantCompletion(t, p.server, 0, StatusSuccess)
				mustReceive(t, p.client)
				time.Sleep(time.Second) // it is acknowledged
				p.net.Partition(addrA, addrB)
				r.Token = 1
				mustSend(t, p.server, Message{Peer: p.client.AddrPort(), Data: []byte("lost"), RDMA: &r})
				wantCompletion(t, p.server, 1, StatusDropped)
				r.Token = 2
				mustSend(t, p.server, Message{Peer: p.client.AddrPort(), Data: []byte("never"), RDMA: &r})
				time.Sleep(time.Second)
				if n, err := p.server.Cancel(p.client.AddrPort()); n != 1 || err != nil {
					t.Errorf("%d cancelled, %v", n, err)
				}
				wantCompletion(t, p.server, 2, StatusCancelled)
				r.Token = 3
				mustSend(t, p.server, Message{Peer: p.client.AddrPort(), Data: []byte("late"), RDMA: &r})
				p.net.Heal(addrA, addrB)
				wantCompletion(t, p.server, 3, StatusSuccess)
				if m := mustReceive(t, p.client); string(m.Data) != "late" {
					t.Errorf("received %q", m.Data)
				}
				if msgs, bytes := p.server.Unacknowledged(); msgs > 1 || bytes > 4 {
					t.Errorf("%d messages of %d bytes in the send buffer", msgs, bytes)
				}
				p.close(t)
			})
		})
	}
}

// TestUsedOnceLies: a peer that claims to have used memory frees only what its socket registered for one use.
func TestUsedOnceLies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newRDMAPair(t, "open", Config{})
		svc, s := p.client.svc, p.client
		other := bind(t, svc, ap(addrA, 4001))
		lasting, foreign, once := mustRegister(t, s, 8, RegionOptions{}), mustRegister(t, other, 8, RegionOptions{UseOnce: true}), mustRegister(t, s, 8, RegionOptions{UseOnce: true, Invalidate: true})
		forC, err := s.RegisterRegionFor(bg(), p.server.AddrPort(), make([]byte, 8), RegionOptions{UseOnce: true, Invalidate: true})
		if err != nil {
			t.Fatal(err)
		}
		claim := func(from netip.Addr, key verbs.RKey) {
			m := conn.Incoming{SrcPort: 1, DstPort: 4000, Ext: &conn.Ext{Used: key, HasUsed: true}}
			svc.deliver(svc.peerOf(addrA, from), 0, []conn.Incoming{m}, maxInt64)
		}
		for _, k := range []Cookie{lasting.Cookie(), foreign.Cookie(), forC.Cookie(), 0, 0xffffffff, once.Cookie() ^ 1} {
			claim(addrStranger, verbs.RKey(k.RKey()))
		}
		time.Sleep(time.Second)
		for _, r := range []*Region{lasting, foreign, once, forC} {
			if r.Err() != nil {
				t.Errorf("%v: %v", r.Cookie(), r.Err())
			}
		}
		if st := svc.Stats(); st.RecvUnknownKey != 5 || st.RecvUsedOnce != 0 {
			t.Errorf("%d unknown, %d used", st.RecvUnknownKey, st.RecvUsedOnce)
		}
		claim(addrStranger, verbs.RKey(once.Cookie().RKey()))
		claim(addrStranger, verbs.RKey(once.Cookie().RKey()))
		claim(addrB, verbs.RKey(forC.Cookie().RKey()))
		waitDone(t, once, forC)
		if st := svc.Stats(); st.RecvUnknownKey != 6 || st.RecvUsedOnce != 2 {
			t.Errorf("%d unknown, %d used", st.RecvUnknownKey, st.RecvUsedOnce)
		}
		p.close(t)
	})
}

// TestRegionMemory: Go memory stays where it is, and is not collected, until the region is given back.
func TestRegionMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newRDMAPair(t, "open", Config{})
		for range 50 {
			r := mustRegister(t, p.client, 1000, RegionOptions{})
			src := mustRegister(t, p.server, 1000, RegionOptions{})
			copy(src.Bytes(), payload(1000, 9))
			mustSend(t, p.server, Message{Peer: p.client.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{src.Piece(0, 1000)}, Remote: r.Cookie()}})
			src.Close() // while the operation is on its way
			runtime.GC()
			mustReceive(t, p.client)
			if !bytes.Equal(r.Bytes(), payload(1000, 9)) {
				t.Fatal("wrong bytes")
			}
			if err := r.Invalidate(bg()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond) // for the end of the operation
			if isDone(src) {
				t.Error("a region that was freed without invalidation was given back at once")
			}
			if err := p.server.svc.FlushRegions(bg()); err != nil || !isDone(src) {
				t.Errorf("flushed: %v, given back: %v", err, isDone(src))
			}
		}
		p.close(t)
	})
}

// TestRegionFreedAsDeviceGoes: regions are freed, both ways, while their device goes away. Their memory comes back once.
func TestRegionFreedAsDeviceGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := simnet.ForTest(t, 1, simnet.Config{})
		svc, prov := openRemovable(t, net)
		s := bind(t, svc, ap(addrB, 4000))
		for range 8 {
			regions := make([]*Region, 32)
			for i := range regions {
				regions[i] = mustRegister(t, s, verbs.PageSize, RegionOptions{})
			}
			var wg sync.WaitGroup
			for i, r := range regions {
				wg.Go(func() {
					if i%2 == 0 {
						r.Close()
					} else if err := r.Invalidate(bg()); err != nil {
						t.Error(err)
					}
				})
			}
			if err := prov.Remove(addrB); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			waitDone(t, regions...)
			for _, r := range regions {
				if !errors.Is(r.Err(), ErrStaleCookie) {
					t.Errorf("freed, and is %v", r.Err())
				}
			}
			if err := prov.Add(addrB); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		closeService(t, svc)
	})
}

// TestRegionDeviceGone: the device goes away. Its regions are tombstones, their memory comes back without anybody asking, and
// the next device has regions of its own.
func TestRegionDeviceGone(t *testing.T) {
	for _, mode := range []string{"open", "kernel"} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := simnet.ForTest(t, 1, simnet.Config{Link: simnet.LinkConfig{Delay: 50 * time.Microsecond}})
				prov := softroce.New(softroce.Config{Network: net})
				cfg := Config{Providers: []verbs.Provider{prov}}
				peer := Config{}
				if mode == "kernel" {
					cfg.Dialect, peer.Dialect = DialectKernelOnly, DialectKernelOnly
				}
				svc, err := Open(cfg)
				if err != nil {
					t.Fatal(err)
				}
				other := openSim(t, net, peer)
				s, c := bind(t, svc, ap(addrB, 4000)), bind(t, other, ap(addrA, 4000))
				local, remote := mustRegister(t, s, 1<<20, RegionOptions{}), mustRegister(t, c, 1<<20, RegionOptions{})
				forC, err := s.RegisterRegionFor(bg(), c.AddrPort(), make([]byte, 100), RegionOptions{})
				if err != nil {
					t.Fatal(err)
				}
				send := func(r *Region) error {
					return s.Send(bg(), Message{Peer: c.AddrPort(), Data: []byte("x"), RDMA: &RDMA{Op: RDMARead, Local: []Piece{r.Piece(0, r.Len())}, Remote: remote.Cookie(), Notify: true}})
				}
				if err := send(local); err != nil {
					t.Fatal(err)
				}
				if err := prov.Remove(addrB); err != nil {
					t.Fatal(err)
				}
				wantCompletion(t, s, 0, StatusDropped)
				waitDone(t, local, forC)
				for _, r := range []*Region{local, forC} {
					if !errors.Is(r.Err(), ErrDeviceGone) || !errors.Is(r.Err(), syscall.ENODEV) {
						t.Errorf("the region is %v", r.Err())
					}
					if err := send(r); !errors.Is(err, ErrDeviceGone) {
						t.Errorf("an operation on it: %v", err)
					}
				}
				if err := s.Send(bg(), Message{Peer: c.AddrPort(), Cookie: local.Cookie()}); !errors.Is(err, ErrDeviceGone) {
					t.Errorf("handing it out: %v", err)
				}
				if _, err := s.RegisterRegion(bg(), make([]byte, 1), RegionOptions{}); !errors.Is(err, ErrDeviceGone) {
					t.Errorf("registering without a device: %v", err)
				}
				mustWrite(t, s, []byte("waits"), c.AddrPort())
				if err := prov.Add(addrB); err != nil {
					t.Fatal(err)
				}
				if m := mustReceive(t, c); string(m.Data) != "waits" {
					t.Errorf("received %q", m.Data)
				}
				again, err := s.RegisterRegion(bg(), local.Bytes(), RegionOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if err := local.Close(); err != nil {
					t.Error(err)
				}
				if again.Err() != nil {
					t.Error(again.Err())
				}
				copy(remote.Bytes(), payload(1<<20, 5))
				if err := send(again); err != nil {
					t.Fatal(err)
				}
				wantCompletion(t, s, 0, StatusSuccess)
				if !bytes.Equal(again.Bytes(), payload(1<<20, 5)) {
					t.Error("wrong bytes")
				}
				closeService(t, svc)
				closeService(t, other)
			})
		})
	}
}

// TestRegionsBounded: a device has so many regions and no more. What waits gets the one that comes back.
func TestRegionsBounded(t *testing.T) {
	for _, mode := range []string{"open", "kernel", "plain"} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newRDMAPair(t, mode, Config{MemoryPools: ibdev.PoolConfig{Small: mrpool.PoolConfig{MaxItems: 4}, Large: mrpool.PoolConfig{MaxPinned: 1 << 20}}})
				s, peer := p.client, p.server.AddrPort()
				mustWrite(t, s, []byte("connect"), peer)
				mustReceive(t, p.server)
				var rs []*Region
				for i := range 4 {
					var r *Region
					var err error
					if i%2 == 0 {
						r, err = s.RegisterRegion(bg(), make([]byte, 100), RegionOptions{})
					} else {
						r, err = s.RegisterRegionFor(bg(), peer, make([]byte, 100), RegionOptions{})
					}
					if err != nil {
						t.Fatal(i, err)
					}
					rs = append(rs, r)
				}
				full := func(what string, err error) {
					t.Helper()
					if !errors.Is(err, ErrPoolExhausted) || !errors.Is(err, syscall.EAGAIN) {
						t.Errorf("%s: %v", what, err)
					}
				}
				_, err := s.RegisterRegion(bg(), make([]byte, 100), RegionOptions{})
				full("a fifth", err)
				_, err = s.RegisterRegionFor(bg(), peer, make([]byte, 100), RegionOptions{})
				full("a fifth for a peer", err)
				_, err = s.SendMapped(bg(), Message{Peer: peer}, make([]byte, 100), RegionOptions{})
				full("a fifth with a message", err)
				_, err = s.TrySendMapped(Message{Peer: peer}, make([]byte, 100), RegionOptions{})
				full("a fifth at once", err)
				var wg sync.WaitGroup
				for i := range 2 {
					wg.Go(func() {
						time.Sleep(500 * time.Millisecond)
						rs[i].Close() // without invalidation: whoever waits has it flushed
					})
					if i == 0 {
						rs[i], err = s.RegisterRegion(bg(), make([]byte, 100), RegionOptions{})
					} else {
						rs[i], err = s.RegisterRegionFor(bg(), peer, make([]byte, 100), RegionOptions{})
					}
					if err != nil {
						t.Error("waiting for one:", err)
					}
					wg.Wait()
				}
				big, err := s.RegisterRegion(bg(), make([]byte, 1<<20-8192), RegionOptions{})
				if err != nil {
					t.Fatal(err)
				}
				_, err = s.RegisterRegion(bg(), make([]byte, 1<<20-8192), RegionOptions{})
				full("more pinned bytes", err)
				big.Close()
				if st := s.svc.Stats(); st.MemoryPools["ib_rdma_mr_8k_pool_depleted"] == 0 || st.MemoryPools["ib_rdma_mr_8k_used"] != 6 {
					t.Errorf("counters: %v", st.MemoryPools)
				}
				p.close(t)
				waitDone(t, append(rs, big)...)
			})
		})
	}
}

// TestRegionForDestination: without a connection it waits for one, or says so; with the connection lost and back the key still
// works.
func TestRegionForDestination(t *testing.T) {
	for _, mode := range []string{"open", "kernel"} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newRDMAPair(t, mode, Config{})
				s, peer := p.client, p.server.AddrPort()
				p.net.Partition(addrA, addrB)
				if r, err := s.TrySendMapped(Message{Peer: peer}, make([]byte, 100), RegionOptions{}); !errors.Is(err, ErrNotReady) || !errors.Is(err, syscall.EAGAIN) {
					t.Fatalf("%v, %v", r, err)
				}
				ctx, cancel := context.WithTimeout(bg(), 15*time.Second)
				defer cancel()
				if _, err := s.RegisterRegionFor(ctx, peer, make([]byte, 100), RegionOptions{}); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatal(err)
				}
				time.AfterFunc(time.Second, func() { p.net.Heal(addrA, addrB) })
				mem := make([]byte, 100000)
				r, err := s.RegisterRegionFor(bg(), peer, mem, RegionOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if n := s.svc.Stats().MemoryPools["ib_rdma_mr_1m_used"]; n != 1 {
					t.Errorf("%d regions of the pool were used", n)
				}
				time.Sleep(time.Second) // the request that makes the key valid is executed
				// The connection breaks.
				resets := s.svc.Stats().Conn.ConnReset
				p.net.Partition(addrA, addrB)
				mustWrite(t, s, []byte("lost"), peer)
				time.Sleep(30 * time.Second)
				p.net.Heal(addrA, addrB)
				mustReceive(t, p.server)
				if s.svc.Stats().Conn.ConnReset == resets {
					t.Error("the connection did not break")
				}
				if r.Err() != nil {
					t.Error(r.Err())
				}
				local := mustRegister(t, p.server, 100000, RegionOptions{})
				copy(local.Bytes(), payload(100000, 3))
				mustSend(t, p.server, Message{Peer: s.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 100000)}, Remote: r.Cookie(), Notify: true}})
				wantCompletion(t, p.server, 0, StatusSuccess)
				if !bytes.Equal(mem, payload(100000, 3)) {
					t.Error("wrong bytes")
				}
				if err := r.Invalidate(bg()); err != nil {
					t.Error(err)
				}
				mustSend(t, p.server, Message{Peer: s.AddrPort(), RDMA: &RDMA{Op: RDMAWrite, Local: []Piece{local.Piece(0, 100000)}, Remote: r.Cookie(), Notify: true}})
				wantCompletion(t, p.server, 0, StatusRemoteError)
				// A message that cannot be sent gives the region back.
				s.SetWriteBuffer(10)
				if _, err := s.SendMapped(bg(), Message{Peer: peer, Data: make([]byte, 11)}, mem, RegionOptions{}); !errors.Is(err, ErrMessageTooLong) {
					t.Error(err)
				}
				if err := s.svc.FlushRegions(bg()); err != nil {
					t.Error(err)
				}
				s.la.regions.mu.Lock()
				if n := len(s.la.regions.byKey); n != 0 {
					t.Errorf("%d regions are left", n)
				}
				s.la.regions.mu.Unlock()
				p.close(t)
			})
		})
	}
}

// TestArenaRegion: peers read and write memory of which nothing was resident, and what is discarded reads as zero.
func TestArenaRegion(t *testing.T) {
	a, err := OpenArena(4 << 20)
	if errors.Is(err, ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	svc, other := openUDP(t, Config{}), openUDP(t, Config{})
	s, c := bind(t, svc, ap(netip.MustParseAddr("127.0.7.1"), 4000)), bind(t, other, ap(netip.MustParseAddr("127.0.7.2"), 4000))
	near := bind(t, other, ap(netip.MustParseAddr("127.0.7.3"), 4000))
	region, err := c.RegisterRegion(bg(), a.Bytes()[4096:], RegionOptions{Arena: a})
	if err != nil {
		t.Fatal(err)
	}
	forS, err := c.RegisterRegionFor(bg(), s.AddrPort(), a.Bytes()[:100], RegionOptions{Arena: a})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.RegisterRegion(bg(), make([]byte, 100), RegionOptions{Arena: a}); !errors.Is(err, ErrNotSupported) {
		t.Errorf("Go memory on demand: %v", err)
	}
	if n, err := a.Resident(0, 4<<20); n != 0 || err != nil {
		t.Errorf("%d bytes are resident, %v", n, err)
	}
	for _, from := range []*Socket{s, near} { // over the wire, and inside a Service
		local := mustRegister(t, from, 1<<20, RegionOptions{})
		copy(local.Bytes(), payload(1<<20, 7))
		do := func(op RDMAOp, cookie Cookie, off uint64, n int) {
			t.Helper()
			mustSend(t, from, Message{Peer: c.AddrPort(), RDMA: &RDMA{Op: op, Local: []Piece{local.Piece(0, n)}, Remote: cookie, RemoteOffset: off, Notify: true}})
			wantCompletion(t, from, 0, StatusSuccess)
			mustReceive(t, c)
		}
		do(RDMAWrite, region.Cookie(), 1<<20, 1<<20)
		if !bytes.Equal(a.Bytes()[4096+1<<20:][:1<<20], payload(1<<20, 7)) {
			t.Error("WRITE: wrong bytes")
		}
		if n, _ := a.Resident(4096+1<<20, 1<<20); n < 1<<20 {
			t.Errorf("%d bytes are resident", n)
		}
		if err := a.Discard(4096+1<<20, 1<<20); err != nil {
			t.Fatal(err)
		}
		do(RDMARead, region.Cookie(), 1<<20, 1<<20)
		if !bytes.Equal(local.Bytes(), make([]byte, 1<<20)) {
			t.Error("READ of what was discarded: not zero")
		}
		do(RDMAWrite, forS.Cookie(), 0, 100)
		if err := a.Discard(0, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Errorf("closing the arena under its regions: %v", err)
	}
	region.Close()
	if err := forS.Invalidate(bg()); err != nil {
		t.Error(err)
	}
	waitDone(t, region, forS)
	closeService(t, svc)
	closeService(t, other)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

func TestCookieText(t *testing.T) {
	for text, c := range map[string]Cookie{"0x11223344+0x10": MakeCookie(0x11223344, 0x10), "0x0+0x0": 0, "0xffffffff+0xffffffff": ^Cookie(0)} {
		if c.String() != text {
			t.Errorf("%#x is %q, want %q", uint64(c), c.String(), text)
		}
		var back Cookie
		if err := back.UnmarshalText([]byte(text)); err != nil || back != c {
			t.Errorf("%q is %v, %v", text, back, err)
		}
	}
	if c, err := ParseCookie("18"); err != nil || c != 18 {
		t.Error(c, err)
	}
	for _, bad := range []string{"", "+", "1+", "x", "0x100000000+0", "-1", "1+1+1"} {
		if c, err := ParseCookie(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is %v, %v", bad, c, err)
		}
	}
	if s := fmt.Sprint(StatusDropped, CompareSwap, RDMAOp(99), CompletionStatus(9)); s != "dropped CMP_AND_SWP RDMAOp(99) CompletionStatus(9)" {
		t.Error(s)
	}
}
