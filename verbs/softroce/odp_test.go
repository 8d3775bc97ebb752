package softroce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// fakePaged is paged memory that does what a test says, when it says so.
type fakePaged struct {
	alias []byte

	mu        sync.Mutex
	resident  []bool
	populated []string      // calls, in pages
	gate      chan struct{} // not nil: Populate waits for it
	err       error         // not nil: Populate fails
	fickle    bool          // what is populated is taken away before Populate returns
	keep      bool          // what is taken away keeps its content
	delay     func() time.Duration
	watchErr  error
	watchers  map[int]func(off, n int, gone bool)
	next      int
}

func newFakePaged(pages int) *fakePaged {
	ps := os.Getpagesize()
	b := make([]byte, (pages+1)*ps)
	lead := -int(uintptr(unsafe.Pointer(&b[0]))) & (ps - 1)
	return &fakePaged{alias: b[lead : lead+pages*ps : lead+pages*ps], resident: make([]bool, pages), watchers: map[int]func(int, int, bool){}}
}

func (f *fakePaged) Alias() []byte { return f.alias }

func (f *fakePaged) pages(off, n int) (first, end int) {
	ps := os.Getpagesize()
	return off / ps, (off + n + ps - 1) / ps
}

func (f *fakePaged) Populate(off, n int, write bool) error {
	f.mu.Lock()
	first, end := f.pages(off, n)
	f.populated = append(f.populated, fmt.Sprintf("%d+%d %v", first, end-first, write))
	gate := f.gate
	f.mu.Unlock()
	if f.delay != nil {
		time.Sleep(f.delay())
	}
	if gate != nil {
		<-gate
	}
	f.mu.Lock()
	err, fickle := f.err, f.fickle
	if err == nil {
		for i := first; i < end; i++ {
			f.resident[i] = true
		}
	}
	f.mu.Unlock()
	if err == nil && fickle {
		f.take(first, end-first, false)
	}
	return err
}

func (f *fakePaged) Resident(off, n int, fn func(off, n int)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	ps := os.Getpagesize()
	first, end := f.pages(off, n)
	for i := first; i < end; i++ {
		if f.resident[i] {
			fn(i*ps, ps)
		}
	}
	return nil
}

func (f *fakePaged) Watch(fn func(off, n int, gone bool)) (stop func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watchErr != nil {
		return nil, f.watchErr
	}
	i := f.next
	f.next++
	f.watchers[i] = fn
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watchers, i)
	}, nil
}

// take is an act of the application on n pages, whose content goes.
func (f *fakePaged) take(page, n int, gone bool) {
	ps := os.Getpagesize()
	f.mu.Lock()
	ws := make([]func(int, int, bool), 0, len(f.watchers))
	for _, w := range f.watchers {
		ws = append(ws, w)
	}
	f.mu.Unlock()
	for _, w := range ws {
		w(page*ps, n*ps, gone)
	}
	f.mu.Lock()
	for i := page; i < page+n; i++ {
		f.resident[i] = false
	}
	f.mu.Unlock()
	if !f.keep {
		clear(f.alias[page*ps : (page+n)*ps])
	}
}

// page replaces the memory of both sides by paged memory that is slow to come and goes all the time, until stop is
// called. Of the sides' peers some bear RNR NAKs.
func (tp *testPair) page(t *testing.T, seed uint64) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i := range tp.mr {
		tp.dev[i].attr.Caps |= verbs.CapOnDemandPaging
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		var mu sync.Mutex // workers populate at the same time
		f := newFakePaged(len(tp.mem[i]) / os.Getpagesize())
		f.keep, f.delay = true, func() time.Duration {
			mu.Lock()
			defer mu.Unlock()
			return time.Duration(r.ExpFloat64() * float64(50*time.Microsecond))
		}
		if err := tp.mr[i].Deregister(); err != nil {
			t.Fatal(err)
		}
		m, err := tp.pd[i].RegOnDemandMR(f, 0x1000, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		tp.mem[i], tp.mr[i] = f.alias, m
		tp.qp[i].(*qp).peerRNR = [...]uint8{0, 7, 1, 3}[seed%4]
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(2+i)))
			for {
				select {
				case <-done:
					return
				case <-time.After(time.Millisecond):
					f.take(r.IntN(len(f.resident)-8), 1+r.IntN(8), false)
				}
			}
		})
	}
	return func() {
		close(done)
		wg.Wait()
		for i := range tp.dev {
			s := tp.dev[i].Stats()
			if s["odp_faults"] == 0 || s["odp_invalidated_pages"] == 0 {
				t.Errorf("side %d: %d faults, %d pages taken away: the test is none", i, s["odp_faults"], s["odp_invalidated_pages"])
			}
			if s["odp_present_pages"] != s["odp_fault_pages"]-s["odp_invalidated_pages"] {
				t.Errorf("side %d: the books do not balance: %v", i, s)
			}
		}
	}
}

func (f *fakePaged) close() { // the gate
	f.mu.Lock()
	f.gate = make(chan struct{})
	f.mu.Unlock()
}

func (f *fakePaged) open() {
	f.mu.Lock()
	close(f.gate)
	f.gate = nil
	f.mu.Unlock()
	synctest.Wait()
}

func (f *fakePaged) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.populated
	f.populated = nil
	return out
}

const odpIOVA = 0x40000000

// odpContext is a testContext with an on-demand region.
type odpContext struct {
	*testContext
	f  *fakePaged
	mr verbs.MR
	ps int
}

// odpScript is script with an on-demand region of 1200 pages.
func odpScript(t *testing.T, f func(tc *odpContext)) {
	t.Helper()
	odpScriptCfg(t, Config{}, f)
}

func odpScriptCfg(t *testing.T, cfg Config, f func(tc *odpContext)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tc := &odpContext{testContext: newTestContext(t, cfg), f: newFakePaged(1200), ps: os.Getpagesize()}
		tc.dev.attr.Caps |= verbs.CapOnDemandPaging // whatever the host can do
		var err error
		if tc.mr, err = tc.pd.RegOnDemandMR(tc.f, odpIOVA, accessAll|verbs.AccessOnDemand); err != nil {
			t.Fatal(err)
		}
		tc.q().peerRNR = 7
		f(tc)
		if err := tc.qp.Close(); err != nil {
			t.Error(err)
		}
		if err := tc.mr.Deregister(); err != nil {
			t.Error(err)
		}
		if len(tc.f.watchers) != 0 {
			t.Errorf("%d watchers are left", len(tc.f.watchers))
		}
		tc.counters("at the end", map[string]uint64{"odp_registered_pages": 0, "odp_present_pages": 0})
		tc.close()
	})
}

func (tc *odpContext) q() *qp { return tc.qp.(*qp) }

func (tc *odpContext) list(off, n int) []verbs.SGE {
	return []verbs.SGE{{Addr: odpIOVA + uint64(off), Length: uint32(n), LKey: tc.mr.LKey()}}
}

// counters compares some of the device's.
func (tc *odpContext) counters(when string, want map[string]uint64) {
	tc.t.Helper()
	got := tc.dev.Stats()
	for k, v := range want {
		if got[k] != v {
			tc.t.Fatalf("%s: %s is %d, want %d", when, k, got[k], v)
		}
	}
}

func (tc *odpContext) wantCalls(when string, want ...string) {
	tc.t.Helper()
	if got := tc.f.calls(); fmt.Sprint(got) != fmt.Sprint(want) {
		tc.t.Fatalf("%s: populated %v, want %v", when, got, want)
	}
}

func (tc *odpContext) remoteAddr(off int) uint64 { return odpIOVA + uint64(off) }

func (tc *odpContext) reth(off, n int) []byte {
	return reth(tc.remoteAddr(off), tc.mr.RKey(), uint32(n))
}

func sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// TestFaultSend sends from absent pages: the request pauses, one fault brings in all of it, and the next
// request finds it there.
func TestFaultSend(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		fill(tc.f.alias[:4*tc.ps], 1)
		tc.f.close()
		tc.post(send(1, tc.list(100, 2*tc.ps)), send(2, tc.sge(0, 10)))
		tc.wantIdle("nothing leaves before its pages are there, nor what is behind")
		tc.wantCalls("the fault", "0+3 false")
		sleep(time.Second)
		tc.wantIdle("no timer runs for it")
		tc.f.open()
		n := 2 * tc.ps / 256
		for i := range n {
			op := roce.RCSendMiddle
			switch i {
			case 0:
				op = roce.RCSendFirst
			case n - 1:
				op = roce.RCSendLast
			}
			pk := tc.want("the message goes out", op, tx(i))
			if !bytes.Equal(pk.Payload, tc.f.alias[100+i*256:][:256]) {
				t.Fatalf("packet %d carries something else", i)
			}
		}
		tc.want("then what is behind", roce.RCSendOnly, tx(n))
		tc.write(roce.RCAck, tx(n), false, aeth(roce.SynACK, 2), nil)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.wantWC("", 2, verbs.WCSuccess)
		tc.counters("after the first touch", map[string]uint64{"odp_faults": 1, "odp_fault_pages": 3, "odp_present_pages": 3, "odp_registered_pages": 1200})

		tc.post(send(3, tc.list(tc.ps, 256)))
		tc.want("the second touch does not wait", roce.RCSendOnly, tx(n+1))
		tc.write(roce.RCAck, tx(n+1), false, aeth(roce.SynACK, 3), nil)
		tc.wantWC("", 3, verbs.WCSuccess)

		tc.f.take(1, 1, false)
		tc.counters("after the page was taken", map[string]uint64{"odp_faults": 1, "odp_invalidations": 1, "odp_invalidated_pages": 1, "odp_present_pages": 2})
		tc.post(send(4, tc.list(tc.ps, 256)))
		if pk := tc.want("a page that was taken is brought in again", roce.RCSendOnly, tx(n+2)); !bytes.Equal(pk.Payload, make([]byte, 256)) {
			t.Fatal("and is not empty")
		}
		tc.write(roce.RCAck, tx(n+2), false, aeth(roce.SynACK, 4), nil)
		tc.wantWC("", 4, verbs.WCSuccess)
		tc.counters("after it came back", map[string]uint64{"odp_faults": 2, "odp_fault_pages": 4, "odp_present_pages": 3})
	})
}

// TestFaultMidMessage takes away the page of the second half of a message that is being sent, and looks at its
// retransmission.
func TestFaultMidMessage(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		n := 2 * tc.ps / 256
		tc.post(send(1, tc.list(0, 2*tc.ps)))
		for i := range n {
			if pk, ok := tc.read(); !ok || pk.BTH.PSN() != tx(i) {
				t.Fatalf("packet %d is missing", i)
			}
		}
		tc.f.close()
		tc.f.take(1, 1, false)
		tc.write(roce.RCAck, tx(n/2-1), false, aeth(roce.SynNAKSeq, 0), nil)
		tc.want("what is there is sent again", roce.RCSendMiddle, tx(n/2-1))
		tc.wantIdle("and no more")
		sleep(5 * time.Second)
		tc.wantIdle("probes wait too")
		tc.f.open()
		for i := n / 2; i < n; i++ {
			if pk, ok := tc.read(); !ok || pk.BTH.PSN() != tx(i) {
				t.Fatalf("packet %d is missing when the page is back", i)
			}
		}
		tc.write(roce.RCAck, tx(n-1), false, aeth(roce.SynACK, 1), nil)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.counters("", map[string]uint64{"odp_faults": 2, "odp_fault_pages": 3})
	})
}

// TestFaultReadSink asks for a READ into absent pages, and takes one away under the answer.
func TestFaultReadSink(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		data := make([]byte, 3*256)
		fill(data, 5)
		tc.f.close()
		// Two packets into page 0, one into page 1.
		off := tc.ps - 512
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tc.list(off, len(data)), RemoteAddr: 0x5000, RKey: 0x77})
		tc.wantIdle("nothing is asked for that could not be placed")
		tc.wantCalls("the sink is brought in for writing", "0+2 true")
		tc.f.open()
		tc.want("", roce.RCReadRequest, tx(0))
		tc.write(roce.RCReadRespFirst, tx(0), false, aeth(roce.SynACK, 1), data[:256])
		tc.f.close()
		tc.f.take(0, 1, false)
		tc.write(roce.RCReadRespMiddle, tx(1), false, nil, data[256:512])
		tc.write(roce.RCReadRespLast, tx(2), false, aeth(roce.SynACK, 1), data[512:])
		tc.wantIdle("an answer that cannot be placed is dropped")
		tc.wantNoWC("")
		tc.f.open()
		pk := tc.want("and asked for again when it can be", roce.RCReadRequest, tx(1))
		if r := pk.RETH(); r.VA() != 0x5000+256 || r.Len() != 512 {
			t.Fatalf("asked for %d bytes at %#x", r.Len(), r.VA())
		}
		tc.write(roce.RCReadRespFirst, tx(1), false, aeth(roce.SynACK, 1), data[256:512])
		tc.write(roce.RCReadRespLast, tx(2), false, aeth(roce.SynACK, 1), data[512:])
		tc.wantWC("", 1, verbs.WCSuccess)
		if !bytes.Equal(tc.f.alias[off+256:][:512], data[256:]) {
			t.Fatal("the data arrived changed")
		}
		tc.counters("", map[string]uint64{"odp_faults": 2, "odp_fault_pages": 3, "odp_invalidated_pages": 1})
	})
}

// TestFaultAtomicResult does the same with the result of an atomic.
func TestFaultAtomicResult(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpFetchAdd, Flags: verbs.SendSignaled, SGs: tc.list(8, 8), RemoteAddr: 0x5000, RKey: 0x77, CompareAdd: 1})
		tc.want("", roce.RCFetchAdd, tx(0))
		tc.f.take(0, 1, false)
		tc.f.close()
		ack := func() {
			ext := append(aeth(roce.SynACK, 1), make([]byte, 8)...)
			binary.BigEndian.PutUint64(ext[roce.AETHLen:], 42)
			tc.write(roce.RCAtomicAck, tx(0), false, ext, nil)
		}
		ack()
		tc.wantIdle("the result cannot be placed")
		tc.wantNoWC("")
		tc.f.open()
		tc.want("the peer, who remembers, is asked again", roce.RCFetchAdd, tx(0))
		ack()
		tc.wantWC("", 1, verbs.WCSuccess)
		if v := binary.NativeEndian.Uint64(tc.f.alias[8:]); v != 42 {
			t.Fatalf("the result is %d", v)
		}
	})
}

// TestFaultResponder writes to an absent page for peers with every retry budget. The page takes longer than they would bear.
func TestFaultResponder(t *testing.T) {
	for budget := range uint8(8) {
		t.Run(fmt.Sprintf("rnr_retry %d", budget), func(t *testing.T) {
			odpScript(t, func(tc *odpContext) {
				tc.q().peerRNR = budget
				data := make([]byte, 256)
				fill(data, 6)
				tc.f.close()
				write := func() {
					tc.write(roce.RCWriteFirst, rx(0), false, tc.reth(tc.ps-256, 512), data)
				}
				left, told := int(budget), time.Duration(0)
				for try := range 10 {
					write()
					if budget < 7 && left == 0 {
						tc.wantIdle(fmt.Sprintf("try %d: a peer that bears no more is told nothing", try))
						continue
					}
					left--
					pk := tc.want(fmt.Sprintf("try %d", try), roce.RCAck, rx(0))
					syn := pk.AETH().Syndrome()
					if syn>>5 != 1 {
						t.Fatalf("try %d: syndrome %#x is no RNR NAK", try, syn)
					}
					d := roce.RNRTimer(syn & 31)
					if d < told {
						t.Fatalf("try %d: told to wait %v, after %v", try, d, told)
					}
					told = d
					tc.write(roce.RCWriteLast, rx(1), true, nil, data)
					tc.wantIdle("what follows is dropped without a sequence NAK")
					sleep(d)
				}
				tc.wantCalls("one fault brings in the rest of the message", fmt.Sprintf("%d+2 true", 0))
				tc.f.open()
				if budget < 7 {
					tc.wantAck("the page is in: the packet is asked for", roce.SynNAKSeq, rx(0))
				} else {
					tc.wantIdle("the peer comes back by itself")
				}
				write()
				tc.write(roce.RCWriteLast, rx(1), true, nil, data)
				tc.wantAck("the message is taken", roce.SynACK, rx(1))
				if !bytes.Equal(tc.f.alias[tc.ps-256:][:512], append(data, data...)) {
					t.Fatal("the data arrived changed")
				}
				tc.counters("", map[string]uint64{"odp_faults": 1, "odp_fault_pages": 2})

				// An acknowledgement has left: the budget is whole again.
				tc.f.take(0, 1, false)
				tc.f.close()
				tc.write(roce.RCWriteOnly, rx(2), true, tc.reth(0, 256), data)
				if budget > 0 {
					tc.want("the next fault", roce.RCAck, rx(2))
				}
				tc.wantIdle("")
				tc.f.open()
				if budget == 0 {
					tc.wantAck("", roce.SynNAKSeq, rx(2))
				}
				tc.write(roce.RCWriteOnly, rx(2), true, tc.reth(0, 256), data)
				tc.wantAck("", roce.SynACK, rx(2))
			})
		})
	}
}

// TestFaultReceive takes a SEND into absent pages. The receive request is taken once.
func TestFaultReceive(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		tc.postRecv(verbs.RecvWR{ID: 1, SGs: append(tc.list(0, 100), tc.list(3*tc.ps, tc.ps)...)}, verbs.RecvWR{ID: 2, SGs: tc.list(5*tc.ps, 256)})
		data := make([]byte, 300)
		fill(data, 7)
		tc.f.close()
		for range 3 {
			tc.write(roce.RCSendFirst, rx(0), false, nil, data[:256])
			pk := tc.want("", roce.RCAck, rx(0))
			if pk.AETH().Syndrome()>>5 != 1 {
				t.Fatalf("syndrome %#x", pk.AETH().Syndrome())
			}
		}
		tc.f.open()
		tc.wantCalls("all of the request", "0+1 true", "3+1 true")
		tc.write(roce.RCSendFirst, rx(0), false, nil, data[:256])
		tc.f.take(3, 1, false) // between two packets
		tc.write(roce.RCSendLast, rx(1), true, nil, data[256:])
		tc.want("", roce.RCAck, rx(1))
		tc.write(roce.RCSendLast, rx(1), true, nil, data[256:])
		tc.wantAck("", roce.SynACK, rx(1))
		if wc := tc.wantWC("", 1, verbs.WCSuccess); wc.ByteLen != 300 {
			t.Fatalf("%d bytes", wc.ByteLen)
		}
		if !bytes.Equal(tc.f.alias[:100], data[:100]) || !bytes.Equal(tc.f.alias[3*tc.ps+156:][:44], data[256:]) {
			t.Fatal("the data arrived changed")
		}
		tc.write(roce.RCSendOnly, rx(2), true, nil, data[:10])
		tc.want("", roce.RCAck, rx(2))
		tc.write(roce.RCSendOnly, rx(2), true, nil, data[:10])
		tc.wantAck("", roce.SynACK, rx(2))
		tc.wantWC("the next request is the next", 2, verbs.WCSuccess)
	})
}

// TestFaultReadSource reads from absent pages, and takes one away under the answer, which pauses.
func TestFaultReadSource(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		tc.f.close()
		tc.write(roce.RCReadRequest, rx(0), false, tc.reth(0, 300*256), nil)
		tc.want("a READ of absent pages", roce.RCAck, rx(0))
		tc.f.open()
		tc.wantCalls("one fault for all of it", fmt.Sprintf("0+%d false", (300*256+tc.ps-1)/tc.ps))
		fill(tc.f.alias[:300*256], 8)
		// The socket fills after the first run of responses, so the rest is still to come.
		tc.conn.mu.Lock()
		tc.conn.full = true
		tc.conn.mu.Unlock()
		tc.write(roce.RCReadRequest, rx(0), false, tc.reth(0, 300*256), nil)
		tc.wantIdle("the socket is full")
		tc.f.close()
		pages := (300*256 + tc.ps - 1) / tc.ps
		tc.f.take(pages-1, 1, false) // what waits in the batch and names the region is lost as if on the wire
		tc.conn.mu.Lock()
		tc.conn.full = false
		tc.conn.mu.Unlock()
		tc.conn.Wake()
		synctest.Wait()
		sent := map[uint32]bool{}
		collect := func() {
			for {
				sleep(10 * time.Millisecond)
				pk, ok := tc.read()
				if !ok {
					return
				}
				i := pk.BTH.PSN().Sub(rx(0))
				if !bytes.Equal(pk.Payload, tc.f.alias[i*256:][:256]) {
					t.Fatalf("response %d carries something else", i)
				}
				sent[uint32(i)] = true
			}
		}
		collect()
		if sent[299] {
			t.Fatal("a response left from a page that was not there")
		}
		tc.f.open()
		collect()
		if !sent[299] {
			t.Fatal("the answer did not go on when the page was back")
		}
		// What was lost is asked for again, in the ordinary way.
		for i := range 300 {
			if !sent[uint32(i)] {
				tc.write(roce.RCReadRequest, rx(i), false, tc.reth(i*256, (300-i)*256), nil)
				collect()
				break
			}
		}
		for i := range 300 {
			if !sent[uint32(i)] {
				t.Fatalf("response %d never came", i)
			}
		}
		tc.counters("", map[string]uint64{"odp_invalidated_pages": 1, "remote_access_errors": 0})
	})
}

// TestFaultAtomic does an atomic on an absent page.
func TestFaultAtomic(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		ext := make([]byte, roce.AtomicETHLen)
		roce.PutAtomicETH(ext, tc.remoteAddr(16), uint32(tc.mr.RKey()), 5, 0)
		tc.write(roce.RCFetchAdd, rx(0), false, ext, nil)
		tc.want("", roce.RCAck, rx(0))
		tc.write(roce.RCFetchAdd, rx(0), false, ext, nil)
		tc.want("", roce.RCAtomicAck, rx(0))
		if v := binary.NativeEndian.Uint64(tc.f.alias[16:]); v != 5 {
			t.Fatalf("the word is %d", v)
		}
		tc.wantCalls("", "0+1 true")
	})
}

// TestGone touches what was unmapped: an error where it is known at once, and where the memory only says so when it is
// populated.
func TestGone(t *testing.T) {
	for _, late := range []bool{false, true} {
		gone := func(tc *odpContext) {
			if late {
				tc.f.err = errors.New("bad address")
			} else {
				tc.f.take(0, 1200, true)
			}
		}
		again := func(tc *odpContext, f func()) {
			f()
			if late { // told to come back, and then the truth
				if pk := tc.want("", roce.RCAck, rx(0)); pk.AETH().Syndrome()>>5 != 1 {
					tc.t.Fatalf("syndrome %#x", pk.AETH().Syndrome())
				}
				f()
			}
		}
		for _, c := range []struct {
			name string
			run  func(tc *odpContext)
		}{
			{"WRITE", func(tc *odpContext) {
				again(tc, func() { tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10)) })
				tc.wantAck("", roce.SynNAKAccess, rx(0))
			}},
			{"READ", func(tc *odpContext) {
				again(tc, func() { tc.write(roce.RCReadRequest, rx(0), true, tc.reth(0, 10), nil) })
				tc.wantAck("", roce.SynNAKAccess, rx(0))
			}},
			{"atomic", func(tc *odpContext) {
				ext := make([]byte, roce.AtomicETHLen)
				roce.PutAtomicETH(ext, tc.remoteAddr(16), uint32(tc.mr.RKey()), 5, 0)
				again(tc, func() { tc.write(roce.RCFetchAdd, rx(0), true, ext, nil) })
				tc.wantAck("", roce.SynNAKAccess, rx(0))
			}},
			{"receive", func(tc *odpContext) {
				tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.list(0, 100)})
				again(tc, func() { tc.write(roce.RCSendOnly, rx(0), true, nil, make([]byte, 10)) })
				tc.wantAck("", roce.SynNAKOp, rx(0))
				tc.wantWC("", 1, verbs.WCLocProtErr)
			}},
			{"send", func(tc *odpContext) {
				tc.post(send(1, tc.sge(0, 10)), send(2, tc.list(0, 10)), send(3, tc.sge(0, 10)))
				tc.want("what is before it", roce.RCSendOnly, tx(0))
				tc.wantIdle("")
				tc.wantNoWC("earlier requests finish first")
				tc.write(roce.RCAck, tx(0), false, aeth(roce.SynACK, 1), nil)
				tc.wantWC("", 1, verbs.WCSuccess)
				tc.wantWC("", 2, verbs.WCLocProtErr)
				tc.wantWC("", 3, verbs.WCFlushErr)
			}},
			{"READ sink", func(tc *odpContext) {
				tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpRead, Flags: verbs.SendSignaled, SGs: tc.list(0, 10), RemoteAddr: 1, RKey: 1})
				tc.wantWC("", 1, verbs.WCLocProtErr)
			}},
		} {
			t.Run(fmt.Sprintf("%s, late %v", c.name, late), func(t *testing.T) {
				odpScript(t, func(tc *odpContext) {
					gone(tc)
					c.run(tc)
					tc.wantIdle("")
					if s := tc.qp.State(); s != verbs.StateErr {
						t.Fatalf("QP is in %v", s)
					}
				})
			})
		}
	}
}

// TestGoneMidRead takes the memory away for good under a READ that is being answered: no NAK behind a response.
func TestGoneMidRead(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		tc.f.Populate(0, 1<<20, false)
		if err := tc.pd.AdviseMR(verbs.AdvisePrefetch, tc.list(0, 1<<20)); err != nil {
			t.Fatal(err)
		}
		tc.write(roce.RCReadRequest, rx(0), false, tc.reth(0, 1<<20), nil)
		n := 0
		for {
			pk, ok := tc.read()
			if !ok {
				break
			}
			if pk.Op == roce.RCAck {
				t.Fatalf("syndrome %#x among the responses", pk.AETH().Syndrome())
			}
			n++
		}
		if n == 0 || n >= 4096 {
			t.Fatalf("%d responses in the first run", n)
		}
		tc.f.take(0, 1200, true)
		sleep(time.Second)
		for {
			pk, ok := tc.read()
			if !ok {
				break
			}
			if pk.Op == roce.RCAck {
				t.Fatalf("a NAK with syndrome %#x behind a response", pk.AETH().Syndrome())
			}
		}
		if s := tc.qp.State(); s != verbs.StateErr {
			t.Fatalf("QP is in %v", s)
		}
	})
}

// TestFaultTries has memory that is taken away whenever it comes in: both halves give up after their limit.
func TestFaultTries(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		tc.f.fickle = true
		tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10))
		for i := range maxFaultTries - 1 {
			pk := tc.want(fmt.Sprintf("try %d", i), roce.RCAck, rx(0))
			if pk.AETH().Syndrome()>>5 != 1 {
				t.Fatalf("try %d: syndrome %#x", i, pk.AETH().Syndrome())
			}
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10))
		}
		tc.want("the last", roce.RCAck, rx(0))
		tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10))
		tc.wantAck("enough", roce.SynNAKAccess, rx(0))
		tc.counters("", map[string]uint64{"odp_faults": maxFaultTries, "odp_fault_pages": 0, "odp_present_pages": 0})
		if n := len(tc.f.calls()); n != maxFaultTries*populateTries {
			t.Fatalf("populated %d times, want %d", n, maxFaultTries*populateTries)
		}
	})
	odpScript(t, func(tc *odpContext) {
		tc.f.fickle = true
		tc.post(send(1, tc.list(0, 10)))
		tc.wantWC("the send fails", 1, verbs.WCLocProtErr)
		tc.wantIdle("")
		tc.counters("", map[string]uint64{"odp_faults": maxFaultTries})
	})
}

// TestFaultsAndStates moves a QP with a fault on its way.
func TestFaultsAndStates(t *testing.T) {
	begin := func(tc *odpContext) {
		tc.f.close()
		tc.post(send(1, tc.list(0, 10)))
		tc.postRecv(verbs.RecvWR{ID: 9, SGs: tc.list(tc.ps, 10)})
		tc.write(roce.RCSendOnly, rx(0), true, nil, make([]byte, 10))
		tc.want("", roce.RCAck, rx(0))
	}
	wait := func(t *testing.T, what string, done chan error, want bool) {
		t.Helper()
		synctest.Wait()
		select {
		case err := <-done:
			if !want {
				t.Fatalf("%s returned, with %v", what, err)
			}
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		default:
			if want {
				t.Fatalf("%s did not return", what)
			}
		}
	}
	async := func(f func() error) chan error {
		done := make(chan error, 1)
		go func() { done <- f() }()
		return done
	}
	for _, to := range []verbs.QPState{verbs.StateErr, verbs.StateReset} {
		for _, stuck := range []bool{false, true} {
			t.Run(fmt.Sprintf("to %v, stuck %v", to, stuck), func(t *testing.T) {
				odpScript(t, func(tc *odpContext) {
					begin(tc)
					done := async(func() error { return tc.qp.Modify(verbs.QPAttr{State: to}, verbs.QPStateBit) })
					wait(t, "Modify, with faults on their way,", done, false)
					if stuck {
						sleep(5 * time.Second)
						wait(t, "Modify, after its bound,", done, true)
						tc.counters("", map[string]uint64{"odp_flush_timeouts": 1})
						tc.f.open()
					} else {
						tc.f.open()
						wait(t, "Modify, when they are over,", done, true)
					}
					tc.wantIdle("an incarnation that is over sends nothing")
					if to == verbs.StateErr {
						for _, id := range []uint64{9, 1} {
							tc.wantWC("flushed", id, verbs.WCFlushErr)
						}
					}
					tc.counters("what came in is kept", map[string]uint64{"odp_present_pages": tc.dev.Stats()["odp_fault_pages"]})
				})
			})
		}
	}
	t.Run("Query", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			begin(tc)
			done := async(func() error { tc.qp.Query(); return nil })
			wait(t, "Query, with faults on their way,", done, false)
			tc.f.open()
			wait(t, "Query", done, true)
			tc.want("the QP goes on", roce.RCSendOnly, tx(0))
			tc.f.close()
			tc.f.take(0, 1, false)
			tc.post(send(2, tc.list(0, 10)))
			done = async(func() error { tc.qp.Query(); return nil })
			sleep(5 * time.Second)
			wait(t, "Query, after its bound,", done, true)
			tc.f.open()
			for {
				if _, ok := tc.read(); !ok {
					break
				}
			}
		})
	})
	t.Run("Close", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			begin(tc)
			done := async(tc.qp.Close)
			wait(t, "Close, with faults on their way,", done, false)
			tc.f.open()
			wait(t, "Close", done, true)
			tc.wantIdle("")
		})
	})
	t.Run("Deregister", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			begin(tc)
			tc.qp.SetError() // its requests let go of the region, its faults have yet to
			synctest.Wait()
			done := async(tc.mr.Deregister)
			wait(t, "Deregister, with faults on their way,", done, false)
			tc.f.open()
			wait(t, "Deregister", done, true)
		})
	})
	t.Run("SetError", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			begin(tc)
			tc.qp.SetError() // waits for nothing
			synctest.Wait()
			tc.wantWC("flushed at once", 9, verbs.WCFlushErr)
			tc.wantWC("", 1, verbs.WCFlushErr)
			tc.f.open()
			tc.wantIdle("")
		})
	})
	t.Run("refused", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			tc.q().peerRNR = 0
			tc.f.close()
			tc.post(send(1, tc.list(0, 10)))
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(tc.ps, 10), make([]byte, 10))
			done := async(func() error {
				return tc.qp.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit|verbs.QPPortBit)
			})
			wait(t, "Modify, with faults on their way,", done, false)
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(tc.ps, 10), make([]byte, 10))
			tc.f.open()
			var se *verbs.StateError
			if err := <-done; !errors.As(err, &se) {
				t.Fatalf("a move with an attribute too many: %v", err)
			}
			synctest.Wait()
			if pk, ok := tc.read(); !ok || pk.Op != roce.RCSendOnly || pk.BTH.PSN() != tx(0) {
				t.Fatal("the requester does not go on after a move that was refused")
			}
			tc.wantAck("nor does the responder", roce.SynNAKSeq, rx(0))
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(tc.ps, 10), make([]byte, 10))
			tc.wantAck("", roce.SynACK, rx(0))
		})
	})
	t.Run("another incarnation", func(t *testing.T) {
		odpScript(t, func(tc *odpContext) {
			begin(tc)
			done := async(func() error { return tc.qp.Modify(verbs.QPAttr{State: verbs.StateReset}, verbs.QPStateBit) })
			sleep(5 * time.Second)
			wait(t, "Modify, after its bound,", done, true)
			tc.connect()
			tc.q().peerRNR = 7
			gate := tc.f.gate
			tc.f.gate = nil
			tc.post(send(2, tc.list(0, 10)))
			tc.want("faults are enabled again", roce.RCSendOnly, tx(0))
			tc.f.gate = gate
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(2*tc.ps, 10), make([]byte, 10))
			tc.want("", roce.RCAck, rx(0))
			if !tc.q().rxFault.waiting {
				t.Fatal("no fault is out")
			}
			tc.f.open()
			tc.wantIdle("the old incarnation's faults wake nobody")
			tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(2*tc.ps, 10), make([]byte, 10))
			tc.wantAck("", roce.SynACK, rx(0))
		})
	})
}

// TestDeregisterNamesFaults leaves a page stuck: Deregister says what holds the region, and works later.
func TestDeregisterNamesFaults(t *testing.T) {
	odpScriptCfg(t, Config{DeregisterBound: time.Second}, func(tc *odpContext) {
		tc.f.close()
		tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10))
		tc.want("", roce.RCAck, rx(0))
		var be *verbs.BusyError
		if err := tc.mr.Deregister(); !errors.As(err, &be) || len(be.Holders) != 1 || be.Holders[0] != "1 page faults on their way" {
			t.Fatalf("Deregister: %v", err)
		}
		tc.f.open()
		if err := tc.mr.Deregister(); err != nil {
			t.Fatal(err)
		}
		tc.write(roce.RCWriteOnly, rx(0), true, tc.reth(0, 10), make([]byte, 10))
		tc.wantAck("the key is gone", roce.SynNAKAccess, rx(0))
	})
}

// TestTakeAwayWaits fills the socket with packets that name a page, and takes it away.
func TestTakeAwayWaits(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		if err := tc.pd.AdviseMR(verbs.AdvisePrefetchWrite, tc.list(0, 2*tc.ps)); err != nil {
			t.Fatal(err)
		}
		fill(tc.f.alias[:tc.ps], 3)
		tc.conn.full = true
		tc.post(send(1, tc.list(0, tc.ps)))
		tc.wantIdle("the socket is full")
		if len(tc.dev.tx.trains) == 0 {
			t.Fatal("nothing waits in the batch")
		}
		tc.f.take(0, 1, false)
		for _, tr := range tc.dev.tx.trains {
			for _, v := range tr.Vec {
				for i := range v {
					if &v[i] == &tc.f.alias[0] {
						t.Fatal("the batch still names the page")
					}
				}
			}
		}
		tc.conn.mu.Lock()
		tc.conn.full = false
		tc.conn.mu.Unlock()
		tc.conn.Wake()
		sleep(time.Second)
		n := 0
		for {
			pk, ok := tc.read()
			if !ok {
				break
			}
			if len(pk.Payload) == 256 && !bytes.Equal(pk.Payload, make([]byte, 256)) {
				t.Fatal("what was taken away left later")
			}
			n++
		}
		if n == 0 {
			t.Fatal("nothing is sent when the socket is free again")
		}
	})
}

// TestAdvise prefetches.
func TestAdvise(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		advise := func(a verbs.Advice, off, n int) {
			t.Helper()
			if err := tc.pd.AdviseMR(a, append(tc.list(off, n), verbs.SGE{LKey: 0xbad})); err != nil {
				t.Fatal(err)
			}
		}
		advise(verbs.AdvisePrefetch, 0, 3*tc.ps)
		tc.wantCalls("", "0+3 false")
		tc.counters("", map[string]uint64{"odp_prefetches": 1, "odp_prefetched_pages": 3, "odp_present_pages": 3, "odp_faults": 0})
		advise(verbs.AdvisePrefetchWrite, 2*tc.ps, 2*tc.ps)
		tc.wantCalls("", "2+2 true")
		tc.counters("", map[string]uint64{"odp_prefetches": 2, "odp_prefetched_pages": 4, "odp_present_pages": 4})
		tc.f.resident[7] = true // by the application's own doing
		advise(verbs.AdvisePrefetchNoFault, 6*tc.ps, 3*tc.ps)
		tc.wantCalls("nothing is brought in")
		tc.counters("", map[string]uint64{"odp_prefetches": 3, "odp_prefetched_pages": 5, "odp_present_pages": 5})
		tc.write(roce.RCReadRequest, rx(0), false, tc.reth(7*tc.ps, 10), nil)
		tc.want("what was prefetched does not fault", roce.RCReadRespOnly, rx(0))
		tc.counters("", map[string]uint64{"odp_faults": 0})
		advise(verbs.AdvisePrefetch, 0, 1200*tc.ps) // in steps
		step := populateStep / tc.ps
		var want []string
		for p := 0; p < 1200; p += step {
			want = append(want, fmt.Sprintf("%d+%d false", p, min(step, 1200-p)))
		}
		tc.wantCalls("", want...)

		other, err := tc.dev.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		ro, err := tc.pd.RegOnDemandMR(tc.f, 0, verbs.AccessRemoteRead)
		if err != nil {
			t.Fatal(err)
		}
		defer ro.Deregister()
		for _, c := range []struct {
			what string
			err  error
		}{
			{"a plain region", tc.pd.AdviseMR(verbs.AdvisePrefetch, tc.sge(0, 10))},
			{"an unknown key", tc.pd.AdviseMR(verbs.AdvisePrefetch, []verbs.SGE{{Addr: odpIOVA, Length: 1, LKey: tc.mr.LKey() ^ 1}})},
			{"another PD", other.AdviseMR(verbs.AdvisePrefetch, tc.list(0, 1))},
			{"out of range", tc.pd.AdviseMR(verbs.AdvisePrefetch, tc.list(1200*tc.ps-1, 2))},
			{"no right to write", tc.pd.AdviseMR(verbs.AdvisePrefetchWrite, []verbs.SGE{{Addr: 0, Length: 1, LKey: ro.LKey()}})},
			{"no such advice", tc.pd.AdviseMR(0, nil)},
			{"good and bad", tc.pd.AdviseMR(verbs.AdvisePrefetch, append(tc.list(0, 1), tc.sge(0, 1)...))},
		} {
			if !errors.Is(c.err, verbs.ErrInvalid) {
				t.Errorf("%s: %v", c.what, c.err)
			}
		}
		if n := tc.f.calls(); n != nil {
			t.Errorf("advice that was refused populated %v", n)
		}
		tc.f.err = errors.New("disk on fire")
		if err := tc.pd.AdviseMR(verbs.AdvisePrefetch, tc.list(0, 1)); !errors.Is(err, tc.f.err) {
			t.Errorf("an error of the memory became %v", err)
		}
		tc.f.err = nil
		if refs := tc.mr.(*mr).refs.Refs(); refs != 2 {
			t.Errorf("%d references are held, want the user's and the table's", refs)
		}
	})
}

// TestRegisterOnDemand goes through the ways in which registering fails: none leaves anything behind.
func TestRegisterOnDemand(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		f := newFakePaged(4)
		closed, err := tc.dev.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		if err := closed.Close(); err != nil {
			t.Fatal(err)
		}
		failed := errors.New("no watching")
		for _, c := range []struct {
			what string
			want error
			do   func() (verbs.MR, error)
		}{
			{"no memory", verbs.ErrInvalid, func() (verbs.MR, error) { return tc.pd.RegOnDemandMR(nil, 0, 0) }},
			{"a right that does not exist", verbs.ErrInvalid, func() (verbs.MR, error) { return tc.pd.RegOnDemandMR(f, 0, 1<<20) }},
			{"remote write without local", verbs.ErrInvalid, func() (verbs.MR, error) { return tc.pd.RegOnDemandMR(f, 0, verbs.AccessRemoteWrite) }},
			{"a range that wraps", verbs.ErrInvalid, func() (verbs.MR, error) { return tc.pd.RegOnDemandMR(f, ^uint64(0), 0) }},
			{"a closed PD", verbs.ErrClosed, func() (verbs.MR, error) { return closed.RegOnDemandMR(f, 0, 0) }},
			{"memory that cannot be watched", failed, func() (verbs.MR, error) {
				f.watchErr = failed
				defer func() { f.watchErr = nil }()
				return tc.pd.RegOnDemandMR(f, 0, 0)
			}},
			{"a device that cannot", verbs.ErrNotSupported, func() (verbs.MR, error) {
				tc.dev.attr.Caps &^= verbs.CapOnDemandPaging
				defer func() { tc.dev.attr.Caps |= verbs.CapOnDemandPaging }()
				return tc.pd.RegOnDemandMR(f, 0, 0)
			}},
			{"plain memory on demand", verbs.ErrNotSupported, func() (verbs.MR, error) {
				return tc.pd.RegMR(tc.mem, 0, verbs.AccessOnDemand)
			}},
		} {
			if m, err := c.do(); m != nil || !errors.Is(err, c.want) {
				t.Errorf("%s: %v, %v; want %v", c.what, m, err, c.want)
			}
			if len(f.watchers) != 0 {
				t.Fatalf("%s: left a watcher", c.what)
			}
			tc.counters(c.what, map[string]uint64{"odp_registered_pages": 1200})
		}
		// A part of a page at either end counts as a page.
		part := newFakePaged(4)
		part.alias = part.alias[tc.ps-1 : 2*tc.ps+1]
		m, err := tc.pd.RegOnDemandMR(part, 0x1234, accessAll)
		if err != nil {
			t.Fatal(err)
		}
		tc.counters("a region of three pages in part", map[string]uint64{"odp_registered_pages": 1203})
		if m.Len() != tc.ps+2 || m.Addr() != 0x1234 || m.RKey() == 0 {
			t.Errorf("length %d, address %#x, key %#x", m.Len(), m.Addr(), m.RKey())
		}
		for range 2 {
			if err := m.Deregister(); err != nil {
				t.Fatal(err)
			}
		}
		tc.counters("when it is gone", map[string]uint64{"odp_registered_pages": 1200})
	})
}

// TestFaultUD has the other transport wait for pages too: what arrives meanwhile is lost, as it may be.
func TestFaultUD(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		q, err := tc.pd.CreateQP(verbs.QPConfig{Type: verbs.UD, SendCQ: tc.cq, RecvCQ: tc.cq, MaxSendWR: 4, MaxRecvWR: 4, MaxSendSGE: 1, MaxRecvSGE: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for _, m := range []struct {
			a verbs.QPAttr
			m verbs.QPAttrMask
		}{
			{verbs.QPAttr{State: verbs.StateInit, Port: 1, QKey: 5}, initAttrsUD},
			{verbs.QPAttr{State: verbs.StateRTR}, 0},
			{verbs.QPAttr{State: verbs.StateRTS}, verbs.QPSQPSNBit},
		} {
			if err := q.Modify(m.a, m.m|verbs.QPStateBit); err != nil {
				t.Fatal(err)
			}
		}
		tc.f.close()
		ah := verbs.AH{Remote: tc.peer.Addr()}
		if _, err := q.PostSend([]verbs.SendWR{{ID: 1, Opcode: verbs.OpSend, Flags: verbs.SendSignaled, SGs: tc.list(0, 500), AH: &ah, RemoteQPN: 9}}); err != nil {
			t.Fatal(err)
		}
		if _, err := q.PostRecv([]verbs.RecvWR{{ID: 2, SGs: tc.list(tc.ps, 200)}}); err != nil {
			t.Fatal(err)
		}
		deth := make([]byte, roce.DETHLen)
		roce.PutDETH(deth, 5, 77)
		arrive := func() {
			tc.inject(tc.packet(roce.UDSendOnly, uint32(q.Num()), 3, false, deth, []byte("hello")))
		}
		arrive()
		tc.wantIdle("")
		tc.wantNoWC("both wait")
		arrive()
		tc.f.open()
		tc.want("the datagram leaves", roce.UDSendOnly, 0)
		tc.wantWC("", 1, verbs.WCSuccess)
		tc.wantNoWC("what came meanwhile is lost")
		arrive()
		if wc := tc.wantWC("the request is still there", 2, verbs.WCSuccess); wc.ByteLen != 45 || string(tc.f.alias[tc.ps+40:][:5]) != "hello" {
			t.Fatalf("%d bytes", wc.ByteLen)
		}
	})
}

// TestFaultThroughWindow reaches absent pages through a memory window that begins at 0.
func TestFaultThroughWindow(t *testing.T) {
	odpScript(t, func(tc *odpContext) {
		m, err := tc.pd.RegOnDemandMR(tc.f, odpIOVA, accessAll|verbs.AccessMWBind)
		if err != nil {
			t.Fatal(err)
		}
		w, err := tc.pd.AllocMW(verbs.MWType2B)
		if err != nil {
			t.Fatal(err)
		}
		key := verbs.UpdateFastRegKey(w.RKey())
		tc.post(verbs.SendWR{ID: 1, Opcode: verbs.OpBindMW, Flags: verbs.SendSignaled, Bind: &verbs.MWBind{
			MW: w, Key: key, MR: m, Addr: odpIOVA + uint64(10*tc.ps), Length: uint64(2 * tc.ps), Access: verbs.AccessRemoteWrite | verbs.AccessZeroBased}})
		tc.wantWC("", 1, verbs.WCSuccess)
		data := make([]byte, 256)
		fill(data, 11)
		for range 2 {
			tc.write(roce.RCWriteOnly, rx(0), true, reth(uint64(tc.ps), key, 256), data)
			if pk := tc.want("", roce.RCAck, rx(0)); pk.AETH().Syndrome() == roce.SynACK {
				break
			}
		}
		tc.wantCalls("the page of the region, not of the window", "11+1 true")
		if !bytes.Equal(tc.f.alias[11*tc.ps:][:256], data) {
			t.Fatal("the data is not where the window is")
		}
		if err := m.Deregister(); !errors.Is(err, verbs.ErrBusy) {
			t.Fatalf("Deregister with a window bound: %v", err)
		}
		if err := w.Dealloc(); err != nil {
			t.Fatal(err)
		}
		if err := m.Deregister(); err != nil {
			t.Fatal(err)
		}
	})
}
