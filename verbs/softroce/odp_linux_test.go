package softroce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/internal/pagemem"
	"github.com/openrds/openrds/verbs"
)

// pagedPair is a testPair, on sockets, with real paged memory registered at both ends.
type pagedPair struct {
	*testPair
	mem [2]*pagemem.Memory
	mr  [2]verbs.MR
	ps  int
}

// newPagedPair gives each side pages pages; wrap, if not nil, goes between the memory and its device. rnr is the RNR
// retry count of both QPs, which both know.
func newPagedPair(t testing.TB, pages int, rnr uint8, wrap func(verbs.PagedMemory) verbs.PagedMemory) *pagedPair {
	t.Helper()
	if err := pagemem.Supported(); err != nil {
		t.Skip(err)
	}
	tp := &pagedPair{testPair: newTestPair(t, Config{GiveUp: time.Second}, "127.0.0.41", "127.0.0.42", verbs.MTU4096), ps: pagemem.PageSize()}
	for i := range tp.mem {
		if tp.dev[i].Attr().Caps&verbs.CapOnDemandPaging == 0 {
			t.Fatal("the device does not say that it can")
		}
		var err error
		if tp.mem[i], err = pagemem.Open(pages * tp.ps); err != nil {
			t.Fatal(err)
		}
		var m verbs.PagedMemory = tp.mem[i]
		if wrap != nil {
			m = wrap(m)
		}
		if tp.mr[i], err = tp.pd[i].RegOnDemandMR(m, odpIOVA, accessAll); err != nil {
			t.Fatal(err)
		}
		q := tp.qp[i].(*qp)
		tp.dev[i].role.Lock()
		q.peerRNR, q.attr.RNRRetry, q.rnrLeft = rnr, rnr, rnr
		tp.dev[i].unlockRole()
	}
	return tp
}

func (tp *pagedPair) shut(t testing.TB) {
	t.Helper()
	for i := range tp.mem {
		if err := tp.qp[i].Close(); err != nil {
			t.Error(err)
		}
	}
	for i := range tp.mem {
		if err := tp.mem[i].Close(); !errors.Is(err, pagemem.ErrBusy) {
			t.Errorf("memory that is registered closes with %v", err)
		}
		if err := tp.mr[i].Deregister(); err != nil {
			t.Error(err)
		}
		for _, k := range []string{"odp_present_pages", "odp_registered_pages", "odp_flush_timeouts"} {
			if n := tp.dev[i].Stats()[k]; n != 0 {
				t.Errorf("side %d: %s is %d at the end", i, k, n)
			}
		}
		if err := tp.mem[i].Close(); err != nil {
			t.Error(err)
		}
	}
	tp.testPair.shut(t)
}

func (tp *pagedPair) list(i, off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: odpIOVA + uint64(off), Length: uint32(n), LKey: tp.mr[i].LKey()}}
}

// do posts wr on side 0 and waits for its completion.
func (tp *pagedPair) do(t testing.TB, wr verbs.SendWR) verbs.WC {
	t.Helper()
	wr.Flags |= verbs.SendSignaled
	if _, err := tp.qp[0].PostSend([]verbs.SendWR{wr}); err != nil {
		t.Fatal(err)
	}
	return tp.wait(t, 0)
}

func (tp *pagedPair) rdma(op verbs.SendOpcode, from, to, n int) verbs.SendWR {
	return verbs.SendWR{ID: 1, Opcode: op, SGs: tp.list(0, from, n), RemoteAddr: odpIOVA + uint64(to), RKey: tp.mr[1].RKey()}
}

func (tp *pagedPair) resident(t testing.TB, i int) (out []int) {
	t.Helper()
	m := tp.mem[i]
	if err := m.Resident(0, len(m.Alias()), func(off, n int) {
		for p := off / tp.ps; p < (off+n)/tp.ps; p++ {
			out = append(out, p)
		}
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func (tp *pagedPair) want(t testing.TB, when string, i int, resident []int, counters map[string]uint64) {
	t.Helper()
	if got := tp.resident(t, i); fmt.Sprint(got) != fmt.Sprint(resident) {
		t.Fatalf("%s: side %d has pages %v resident, want %v", when, i, got, resident)
	}
	s := tp.dev[i].Stats()
	for k, v := range counters {
		if s[k] != v {
			t.Fatalf("%s: side %d: %s is %d, want %d", when, i, k, s[k], v)
		}
	}
}

// TestOnDemandResident looks, with mincore, at what is resident before and after each operation, and at the counters.
func TestOnDemandResident(t *testing.T) {
	tp := newPagedPair(t, 64, 7, nil)
	defer tp.shut(t)
	for i := range tp.mem {
		tp.want(t, "before the first access", i, nil, map[string]uint64{"odp_registered_pages": 64, "odp_present_pages": 0})
	}
	// WRITE of pages 2, 3 and 4 to half of page 10 and on.
	copy(tp.mem[0].Bytes()[3*tp.ps:], "touched by the application")
	tp.want(t, "after the application's own touch", 0, []int{3}, map[string]uint64{"odp_present_pages": 0})
	if wc := tp.do(t, tp.rdma(verbs.OpWrite, 2*tp.ps, 10*tp.ps+tp.ps/2, 3*tp.ps)); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	tp.want(t, "after the WRITE", 0, []int{2, 3, 4}, map[string]uint64{"odp_faults": 1, "odp_fault_pages": 3, "odp_present_pages": 3})
	tp.want(t, "after the WRITE", 1, []int{10, 11, 12, 13}, map[string]uint64{"odp_faults": 1, "odp_fault_pages": 4, "odp_present_pages": 4})
	if !bytes.Equal(tp.mem[1].Bytes()[11*tp.ps+tp.ps/2:][:26], []byte("touched by the application")) {
		t.Fatal("the data arrived changed")
	}
	// Again: no fault.
	if wc := tp.do(t, tp.rdma(verbs.OpWrite, 2*tp.ps, 10*tp.ps+tp.ps/2, 3*tp.ps)); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	tp.want(t, "after the second", 1, []int{10, 11, 12, 13}, map[string]uint64{"odp_faults": 1, "odp_fault_pages": 4})
	// The application gives two back.
	if err := tp.mem[1].Discard(11*tp.ps, 2*tp.ps); err != nil {
		t.Fatal(err)
	}
	tp.want(t, "after MADV_REMOVE", 1, []int{10, 13}, map[string]uint64{"odp_invalidations": 1, "odp_invalidated_pages": 2, "odp_present_pages": 2})
	// A READ of one of them finds zeros, and brings it in.
	copy(tp.mem[0].Bytes()[20*tp.ps:], "to be overwritten")
	if wc := tp.do(t, tp.rdma(verbs.OpRead, 20*tp.ps, 11*tp.ps, tp.ps)); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	if !bytes.Equal(tp.mem[0].Bytes()[20*tp.ps:21*tp.ps], make([]byte, tp.ps)) {
		t.Fatal("what was given back is not zero")
	}
	tp.want(t, "after the READ", 0, []int{2, 3, 4, 20}, map[string]uint64{"odp_faults": 2, "odp_fault_pages": 4, "odp_present_pages": 4})
	tp.want(t, "after the READ", 1, []int{10, 11, 13}, map[string]uint64{"odp_faults": 2, "odp_fault_pages": 5, "odp_present_pages": 3})
	// MADV_DONTNEED drops entries, not pages.
	if err := unix.Madvise(tp.mem[1].Bytes()[10*tp.ps:11*tp.ps], unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	tp.mem[1].Sync()
	tp.want(t, "after MADV_DONTNEED", 1, []int{10, 11, 13}, map[string]uint64{"odp_invalidations": 2, "odp_invalidated_pages": 3, "odp_present_pages": 2})
	// Prefetching: two pages in, one that the application touched entered.
	if err := tp.pd[1].AdviseMR(verbs.AdvisePrefetchWrite, tp.list(1, 30*tp.ps, 2*tp.ps)); err != nil {
		t.Fatal(err)
	}
	tp.mem[1].Bytes()[40*tp.ps] = 1
	if err := tp.pd[1].AdviseMR(verbs.AdvisePrefetchNoFault, tp.list(1, 39*tp.ps, 5*tp.ps)); err != nil {
		t.Fatal(err)
	}
	tp.want(t, "after prefetching", 1, []int{10, 11, 13, 30, 31, 40}, map[string]uint64{"odp_prefetches": 2, "odp_prefetched_pages": 3, "odp_present_pages": 5, "odp_faults": 2})
	// SEND into what was given back, from what is absent.
	if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: 5, SGs: tp.list(1, 12*tp.ps, 100)}}); err != nil {
		t.Fatal(err)
	}
	if wc := tp.do(t, verbs.SendWR{Opcode: verbs.OpSend, SGs: tp.list(0, 50*tp.ps, 100)}); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	if wc := tp.wait(t, 1); wc.Err() != nil || wc.ByteLen != 100 {
		t.Fatalf("receive: %+v", wc)
	}
	tp.want(t, "after the SEND", 0, []int{2, 3, 4, 20, 50}, map[string]uint64{"odp_faults": 3, "odp_fault_pages": 5})
	tp.want(t, "after the SEND", 1, []int{10, 11, 12, 13, 30, 31, 40}, map[string]uint64{"odp_faults": 3, "odp_fault_pages": 6})
	// Atomics.
	if wc := tp.do(t, func() verbs.SendWR { w := tp.rdma(verbs.OpFetchAdd, 60*tp.ps, 60*tp.ps, 8); w.CompareAdd = 3; return w }()); wc.Err() != nil {
		t.Fatal(wc.Err())
	}
	if tp.mem[1].Bytes()[60*tp.ps] != 3 {
		t.Fatal("the atomic did nothing")
	}
	tp.want(t, "after the atomic", 1, []int{10, 11, 12, 13, 30, 31, 40, 60}, map[string]uint64{"odp_faults": 4, "memory_faults": 0})
}

// TestOnDemandActs does each of what an application may do to its mapping while READs, WRITEs and SENDs go on over it. Acts that
// give pages back are not noticed by the traffic; after acts that take the mapping away the peer gets a remote access
// error. Nothing faults, whatever the moment.
func TestOnDemandActs(t *testing.T) {
	const pages, hole, holePages = 48, 16, 8
	acts := []struct {
		name string
		gone bool
		do   func(m *pagemem.Memory, page, n int) error
	}{
		{"MADV_REMOVE", false, func(m *pagemem.Memory, page, n int) error {
			return unix.Madvise(m.Bytes()[page*pagemem.PageSize():(page+n)*pagemem.PageSize()], unix.MADV_REMOVE)
		}},
		{"MADV_DONTNEED", false, func(m *pagemem.Memory, page, n int) error {
			return unix.Madvise(m.Bytes()[page*pagemem.PageSize():(page+n)*pagemem.PageSize()], unix.MADV_DONTNEED)
		}},
		{"munmap", true, func(m *pagemem.Memory, page, n int) error {
			return unix.MunmapPtr(unsafe.Pointer(&m.Bytes()[page*pagemem.PageSize()]), uintptr(n*pagemem.PageSize()))
		}},
		{"mremap", true, func(m *pagemem.Memory, page, n int) error {
			size := uintptr(n * pagemem.PageSize())
			// Onto memory of our own choosing, or it might stay where it is.
			to, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				return err
			}
			_, err = unix.MremapPtr(unsafe.Pointer(&m.Bytes()[page*pagemem.PageSize()]), size, to, size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED)
			return err
		}},
	}
	for _, act := range acts {
		for _, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpSend} {
			for _, side := range []int{0, 1} {
				t.Run(fmt.Sprintf("%s, %v, side %d", act.name, op, side), func(t *testing.T) {
					tp := newPagedPair(t, pages, 7, nil)
					defer tp.shut(t)
					var stop atomic.Bool
					var acted atomic.Int64
					var wg sync.WaitGroup
					wg.Go(func() {
						for i := 0; !stop.Load(); i++ {
							if act.gone && i >= holePages {
								return
							}
							time.Sleep(time.Millisecond) // the distance of acts from one another
							page, n := hole+i%holePages, 1
							if err := act.do(tp.mem[side], page, n); err != nil {
								t.Error(err)
								return
							}
							acted.Add(1)
						}
					})
					status := verbs.WCSuccess
					end := time.Now().Add(60 * time.Millisecond)
					for i := 0; time.Now().Before(end) || act.gone; i++ {
						// Ten pages from somewhere: across the hole, or beside it.
						at := (i * 7 % (pages - 10)) * tp.ps
						wr := tp.rdma(op, at, at, 10*tp.ps)
						if op == verbs.OpSend {
							if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: 2, SGs: tp.list(1, at, 10*tp.ps)}}); err != nil {
								t.Fatal(err)
							}
						}
						wc := tp.do(t, wr)
						if status = wc.Status; status != verbs.WCSuccess {
							break
						}
						if op == verbs.OpSend {
							if wc := tp.wait(t, 1); wc.Err() != nil {
								t.Fatalf("receive: %v", wc.Err())
							}
						}
						if i > 100000 {
							t.Fatal("what is gone is never noticed")
						}
					}
					stop.Store(true)
					wg.Wait()
					tp.mem[side].Sync()
					want := verbs.WCSuccess
					switch {
					case !act.gone:
					case side == 0:
						want = verbs.WCLocProtErr
					case op == verbs.OpSend:
						want = verbs.WCRemOpErr // the receive request's memory is the peer's own affair
					default:
						want = verbs.WCRemAccessErr
					}
					if op == verbs.OpRead && act.gone && side == 1 && status == verbs.WCRetryExcErr && tp.qp[1].State() == verbs.StateErr {
						// It went when a response had left already. No NAK may follow then (rocev2 spec 4.9): the peer falls
						// silent, and with the CM hangs up.
						want = status
					}
					if status != want {
						t.Fatalf("ended with %v, want %v; counters %v", status, want, tp.dev[side].Stats())
					}
					if acted.Load() == 0 {
						t.Fatal("nothing was done to the mapping")
					}
					s := tp.dev[side].Stats()
					if s["memory_faults"] != 0 {
						t.Errorf("the device's mapping faulted %d times", s["memory_faults"])
					}
					if n := s["odp_invalidations"]; n < uint64(acted.Load()) {
						t.Errorf("%d acts, %d reports", acted.Load(), n)
					}
					// The books balance: what came in and was not taken away is there.
					if got, want := s["odp_present_pages"], s["odp_fault_pages"]-s["odp_invalidated_pages"]; got != want {
						t.Errorf("%d pages are present; %d came in and %d were taken", got, s["odp_fault_pages"], s["odp_invalidated_pages"])
					}
					_ = tp.mem[side].Alias()[hole*tp.ps] // still to be touched
				})
			}
		}
	}
}

// slowMemory takes its time, as a disk would.
type slowMemory struct {
	verbs.PagedMemory
	delay time.Duration
}

func (m slowMemory) Populate(off, n int, write bool) error {
	time.Sleep(m.delay)
	return m.PagedMemory.Populate(off, n, write)
}

// TestOnDemandBudget runs over slow memory with every retry count a peer may have: none runs out.
func TestOnDemandBudget(t *testing.T) {
	for rnr := range uint8(8) {
		t.Run(fmt.Sprint(rnr), func(t *testing.T) {
			tp := newPagedPair(t, 64, rnr, func(m verbs.PagedMemory) verbs.PagedMemory { return slowMemory{m, 4 * time.Millisecond} })
			defer tp.shut(t)
			for i, op := range []verbs.SendOpcode{verbs.OpWrite, verbs.OpRead, verbs.OpSend} {
				at := i * 20 * tp.ps
				if op == verbs.OpSend {
					if _, err := tp.qp[1].PostRecv([]verbs.RecvWR{{ID: 2, SGs: tp.list(1, at, 20*tp.ps)}}); err != nil {
						t.Fatal(err)
					}
				}
				fill(tp.mem[0].Bytes()[at:at+20*tp.ps], uint64(i))
				if op == verbs.OpRead {
					fill(tp.mem[1].Bytes()[at:at+20*tp.ps], 99)
				}
				if wc := tp.do(t, tp.rdma(op, at, at, 20*tp.ps)); wc.Err() != nil {
					t.Fatalf("%v: %v", op, wc.Err())
				}
				if !bytes.Equal(tp.mem[0].Bytes()[at:at+20*tp.ps], tp.mem[1].Bytes()[at:at+20*tp.ps]) {
					t.Fatalf("%v: the data arrived changed", op)
				}
			}
			if n := tp.dev[1].Stats()["odp_faults"]; n != 3 {
				t.Errorf("%d faults for three messages", n)
			}
			if n := tp.dev[1].Stats()["odp_held"]; (n > 0) != (rnr < 7) {
				t.Logf("%d packets were held for a peer that bears %d RNR NAKs", n, rnr)
			}
		})
	}
}

// TestOnDemandTeardown closes everything in the middle of faults, acts and traffic.
func TestOnDemandTeardown(t *testing.T) {
	for i := range 6 {
		tp := newPagedPair(t, 64, 7, func(m verbs.PagedMemory) verbs.PagedMemory {
			return slowMemory{m, time.Duration(i) * 300 * time.Microsecond}
		})
		var stop atomic.Bool
		var wg sync.WaitGroup
		for side := range 2 {
			wg.Go(func() {
				for k := 0; !stop.Load(); k++ {
					if err := tp.mem[side].Discard(k%64*tp.ps, tp.ps); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		for k := range 20 {
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{tp.rdma(verbs.OpWrite, k*tp.ps, k*tp.ps, 20*tp.ps), tp.rdma(verbs.OpRead, k*tp.ps, k*tp.ps, 20*tp.ps)}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(i) * 400 * time.Microsecond) // teardown meets it at different points
		if i%2 == 0 {
			for k := range tp.qp {
				if err := tp.qp[k].Modify(verbs.QPAttr{State: verbs.StateErr}, verbs.QPStateBit); err != nil {
					t.Error(err)
				}
			}
		}
		for k := range tp.qp {
			if err := tp.qp[k].Close(); err != nil {
				t.Error(err)
			}
			if err := tp.mr[k].Deregister(); err != nil {
				t.Error(err)
			}
		}
		stop.Store(true)
		wg.Wait()
		for k := range tp.mem {
			if err := tp.mem[k].Close(); err != nil {
				t.Error(err)
			}
			if n := tp.dev[k].Stats()["odp_present_pages"]; n != 0 {
				t.Errorf("%d pages are still present", n)
			}
		}
		tp.testPair.shut(t)
	}
}

// TestOnDemandWholeArena registers a terabyte of which nothing is there.
func TestOnDemandWholeArena(t *testing.T) {
	tp := newPagedPair(t, 8, 7, nil)
	defer tp.shut(t)
	big, err := pagemem.Open(1 << 40)
	if err != nil {
		t.Skipf("no terabyte of address space: %v", err)
	}
	defer func() {
		if err := big.Close(); err != nil {
			t.Error(err)
		}
	}()
	m, err := tp.pd[1].RegOnDemandMR(big, 0, accessAll)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Deregister(); err != nil {
			t.Error(err)
		}
	}()
	copy(tp.mem[0].Bytes(), "far away")
	for _, at := range []uint64{0, 1 << 39, 1<<40 - 8} {
		wr := verbs.SendWR{Opcode: verbs.OpWrite, SGs: tp.list(0, 0, 8), RemoteAddr: at, RKey: m.RKey()}
		if wc := tp.do(t, wr); wc.Err() != nil {
			t.Fatalf("at %#x: %v", at, wc.Err())
		}
		if s := string(big.Bytes()[at : at+8]); s != "far away" {
			t.Fatalf("at %#x there is %q", at, s)
		}
	}
	if s := tp.dev[1].Stats(); s["odp_fault_pages"] != 3 || s["odp_registered_pages"] != 1<<40/uint64(tp.ps)+8 {
		t.Fatalf("counters %v", s)
	}
}

// BenchmarkOnDemand is a WRITE between two devices whose target page is absent (first touch), present (second), or plain
// memory.
func BenchmarkOnDemand(b *testing.B) {
	for _, pages := range []int{1, 256} {
		tp := newPagedPair(b, 2048, 7, nil)
		n := pages * tp.ps
		if err := tp.pd[0].AdviseMR(verbs.AdvisePrefetch, tp.list(0, 0, n)); err != nil {
			b.Fatal(err)
		}
		run := func(b *testing.B, wr verbs.SendWR) {
			wr.Flags = verbs.SendSignaled
			var wc [1]verbs.WC
			if _, err := tp.qp[0].PostSend([]verbs.SendWR{wr}); err != nil {
				b.Fatal(err)
			}
			for tp.cq[0].Poll(wc[:]) == 0 {
				tp.dev[0].Progress()
				tp.dev[1].Progress()
			}
			if wc[0].Err() != nil {
				b.Fatal(wc[0].Err())
			}
		}
		name := fmt.Sprintf("%dKiB", n>>10)
		b.Run("first/"+name, func(b *testing.B) {
			b.SetBytes(int64(n))
			for i := range b.N {
				at := i * n % (2048 * tp.ps)
				if at == 0 {
					b.StopTimer()
					if err := tp.mem[1].Discard(0, 2048*tp.ps); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				run(b, tp.rdma(verbs.OpWrite, 0, at, n))
			}
		})
		b.Run("second/"+name, func(b *testing.B) {
			if err := tp.pd[1].AdviseMR(verbs.AdvisePrefetchWrite, tp.list(1, 0, 2048*tp.ps)); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := range b.N {
				run(b, tp.rdma(verbs.OpWrite, 0, i*n%(2048*tp.ps), n))
			}
		})
		b.Run("plain/"+name, func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for range b.N {
				run(b, verbs.SendWR{Opcode: verbs.OpWrite, SGs: tp.sge(0, 0, n), RemoteAddr: 0x1000, RKey: tp.testPair.mr[1].RKey()})
			}
		})
		tp.shut(b)
	}
}

// BenchmarkScatter is the copy of a packet's payload into a region, guard included.
func BenchmarkScatter(b *testing.B) {
	dst, src := make([]byte, 4096), make([]byte, 4096)
	for _, n := range []int{64, 4096} {
		b.Run(fmt.Sprintf("%dB", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			l := []sge{direct(dst)}
			for range b.N {
				scatter(l, 0, src[:n])
			}
		})
	}
}

// TestPeerRNRRetry connects by CM: each side's responder knows what the peer's QP bears, which is what it was told.
func TestPeerRNRRetry(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p := New(Config{})
	var dev [2]verbs.Device
	var qps [2]*qp
	for i, addr := range []string{"127.0.0.43", "127.0.0.44"} {
		d, err := p.OpenDevice(netip.MustParseAddr(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		pd, err := d.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		defer pd.Close()
		c, err := d.CreateCQ(verbs.CQConfig{Depth: 8})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		q, err := pd.CreateQP(verbs.QPConfig{Type: verbs.RC, SendCQ: c, RecvCQ: c})
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		dev[i], qps[i] = d, q.(*qp)
	}
	accepted := make(chan error, 1)
	l, err := dev[1].Listen(18635, func(r verbs.ConnRequest) {
		_, err := r.Accept(ctx, qps[1], verbs.ConnParam{RNRRetryCount: 2, RetryCount: 6}, nil)
		accepted <- err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, _, err := dev[0].Connect(ctx, netip.MustParseAddrPort("127.0.0.44:18635"), qps[0], verbs.ConnParam{RNRRetryCount: 5, RetryCount: 6}, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	for i, q := range qps {
		other := qps[1-i].Query()
		q.dev.role.Lock()
		got := q.peerRNR
		q.dev.unlockRole()
		if want := [...]uint8{5, 2}[i]; got != want || other.RNRRetry != want {
			t.Errorf("side %d believes its peer bears %d RNR NAKs; it bears %d, and was told %d", i, got, other.RNRRetry, want)
		}
	}
}
