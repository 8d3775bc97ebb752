//go:build lab && linux

package lab

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openrds/openrds/rds"
)

// TestRDSFrozen stops the guest for longer than a peer may be silent: ours says that it is down when it should, and that it is up
// when it is, and what either side sent meanwhile or before arrives once and in order.
func TestRDSFrozen(t *testing.T) {
	const (
		bound  = 10 * time.Second // conn.Config.DeadAfter
		frozen = 15 * time.Second
	)
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	svc := service(t)
	s := listen(t, svc, addrPort(f.host, 4030))
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
	exchange(t, s, k, ks, []int{1})
	drained(t, s, k)

	before := busy(50)
	kernelSent := make(chan Sent, 1)
	go func() { // ends when the guest runs again
		var sent Sent
		if err := k.call("Send", SendArgs{ID: ks.ID, To: s.AddrPort(), Seed: 5000, Sizes: busy(400)}, &sent); err != nil {
			t.Error(err)
		}
		kernelSent <- sent
	}()
	if err := sendOurs(s, ks.Local, 0, before); err != nil {
		t.Fatal(err)
	}
	thaw := g.Freeze(t)
	start := time.Now()
	if err := sendOurs(s, ks.Local, 50, busy(200)); err != nil { // queued
		t.Fatal(err)
	}
	var down time.Duration
	for time.Since(start) < frozen {
		if svc.Stats().PeerDownReported > 0 && down == 0 {
			down = time.Since(start)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("reported as down %v after its last sign of life", down.Round(10*time.Millisecond))
	// A sign of life is looked for every quarter of the time, and none of it may be spent twice.
	if down < bound*3/4 || down > bound+time.Second {
		t.Errorf("reported as down after %v, want %v", down, bound)
	}
	if n := svc.Stats().PeerUpReported; n != 0 {
		t.Errorf("reported as up %d times while it is frozen", n)
	}
	thaw()
	start = time.Now()
	if err := recvOurs(s, ks.Local, 5000, busy(400)); err != nil {
		t.Errorf("from the kernel: %v", err)
	}
	t.Logf("its datagrams are through %v after it goes on", time.Since(start).Round(10*time.Millisecond))
	if sent := <-kernelSent; sent.N != 400 {
		t.Errorf("the kernel sent %d of 400: %v", sent.N, sent.Errno)
	}
	var got []Datagram
	k.must("Recv", RecvArgs{ID: ks.ID, Count: 250, Limit: stepLimit}, &got)
	if err := checkDatagrams(got, s.AddrPort(), 0, slices.Concat(before, busy(200))); err != nil {
		t.Error(err)
	}
	if st := svc.Stats(); st.PeerDownReported != 1 || st.PeerUpReported != 1 {
		t.Errorf("reported as down %d times, as up %d times, want once each", st.PeerDownReported, st.PeerUpReported)
	}
	exchange(t, s, k, ks, []int{1, 5000})
	drained(t, s, k)
}

// TestRDSReboot kills the guest and boots it again while we send. What its kernel had acknowledged is gone with it; all else arrives
// at the new one, once and in order, and it may send with sequences that begin anew.
func TestRDSReboot(t *testing.T) {
	Need(t)
	at := addrPort(HostAddr4, 4031)
	svc := service(t)
	s := listen(t, svc, at)
	const total = 600
	sizes := busy(total)

	old := Boot(t, Config{MTU: 4500})
	k := newKernelEnd(t, old)
	ks := k.open(OpenArgs{Local: addrPort(old.Addr4(), 4032)})
	exchange(t, s, k, ks, busy(20))
	var written atomic.Int64
	wrote := make(chan error, 1)
	go func() {
		for i, n := range sizes {
			if err := sendOurs(s, ks.Local, uint32(i), []int{n}); err != nil {
				wrote <- err
				return
			}
			written.Store(int64(i + 1))
			time.Sleep(time.Millisecond)
		}
		wrote <- nil
	}()
	for written.Load() < total/3 {
		time.Sleep(time.Millisecond)
	}
	old.CheckLog(t)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	at3 := written.Load()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	left, _ := s.Unacknowledged()
	if left < total-int(at3) || left > total {
		t.Fatalf("%d of %d datagrams are not acknowledged, %d were written before the end", left, total, at3)
	}
	info := svc.Info(rds.InfoSend | rds.InfoRetrans)
	if n := len(info.SendQueue) + len(info.RetransQueue); n != left {
		t.Errorf("Info shows %d messages in the queues, want %d", n, left)
	}

	// The new kernel must not hear of us before the port is bound: it would drop, and acknowledge, what is for nobody.
	end := drop(t, "")
	fresh := Boot(t, Config{MTU: 4500})
	if fresh.Addr4() != old.Addr4() {
		t.Fatalf("the guest comes back as %s, was %s", fresh.Addr4(), old.Addr4())
	}
	k = newKernelEnd(t, fresh)
	again := k.open(OpenArgs{Local: ks.Local})
	end()
	start := time.Now()
	var got []Datagram
	k.must("Recv", RecvArgs{ID: again.ID, Count: left, Limit: stepLimit}, &got)
	t.Logf("%d of %d datagrams were not acknowledged by the old kernel; through %v after the new one can hear us",
		left, total, time.Since(start).Round(10*time.Millisecond))
	if err := checkDatagrams(got, at, uint32(total-left), sizes[total-left:]); err != nil {
		t.Error(err)
	}
	exchange(t, s, k, again, busy(20))
	drained(t, s, k)
	agree(t, svc, k, s.AddrPort().Addr(), again.Local.Addr(), 0)
}

// TestRDSRestarts ends our process and starts it again, twenty times in a row, while the kernel goes on sending. Each process gets
// datagrams in order and none twice, and everything that was sent while there was none.
func TestRDSRestarts(t *testing.T) {
	const restarts = 20
	g := guest(t, 4500)
	f := freshHost(t, g, ipv4)
	k := newKernelEnd(t, g)
	ks := k.open(OpenArgs{Local: addrPort(f.guest, 0)})
	at := addrPort(f.host, 4033)

	// A process's word is shorter than any datagram, and is its first: it says where its echoes begin.
	const word = "hello"
	size := func(i int) int { return 100 + i%3000 }
	index := make(map[uint32]int) // by checksum
	const most = 20000
	for i := range most {
		index[sum(size(i), uint32(i))] = i
	}
	var sent atomic.Int64
	stop := make(chan struct{})
	sender := make(chan error, 1)
	go func() {
		for i := range most {
			select {
			case <-stop:
				sender <- nil
				return
			default:
			}
			var out Sent
			if err := k.call("Send", SendArgs{ID: ks.ID, To: at, Seed: uint32(i), Sizes: []int{size(i)}}, &out); err != nil || out.N != 1 {
				t.Errorf("the kernel's datagram %d: %v %v", i, err, out.Errno)
				sender <- err
				return
			}
			sent.Store(int64(i + 1))
		}
		sender <- nil
	}()
	var seen map[int]bool // by the process of the moment
	last, words := -1, 0
	// through reads echoes until index has been there.
	through := func(process, want int) {
		t.Helper()
		for end := time.Now().Add(stepLimit); !seen[want] || words != process; {
			var got []Datagram
			k.must("Recv", RecvArgs{ID: ks.ID, Count: 5, Limit: 10 * time.Millisecond}, &got)
			for _, d := range got {
				if d.Len == len(word) {
					words++
					seen, last = make(map[int]bool), -1
					continue
				}
				i, ok := index[d.Sum]
				switch {
				case !ok || d.From != at:
					t.Fatalf("process %d: an echo of nothing: %+v", words, d)
				case last >= 0 && i != last+1:
					t.Fatalf("process %d: datagram %d after datagram %d", words, i, last)
				}
				last, seen[i] = i, true
			}
			if time.Now().After(end) {
				t.Fatalf("process %d: datagram %d does not arrive; last is %d, the kernel has sent %d", process, want, last, sent.Load())
			}
		}
	}
	start := time.Now()
	var gone int // the first datagram that no process can have had before
	for n := 1; ; n++ {
		waiting := int(sent.Load())
		cmd := startEcho(t, at, ks.Local, word)
		through(n, max(gone, waiting-1))
		// All of what was sent while there was nobody, in order: the order was checked on the way.
		for i := gone; i < waiting; i++ {
			if !seen[i] {
				t.Fatalf("process %d has not had datagram %d, sent while there was none (%d to %d)", n, i, gone, waiting-1)
			}
		}
		if n > restarts {
			break
		}
		if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		gone = int(sent.Load()) + 1 // one may be on its way
		for int(sent.Load()) < gone+3 {
			time.Sleep(time.Millisecond)
		}
	}
	took := time.Since(start)
	close(stop)
	if err := <-sender; err != nil {
		t.Fatal(err)
	}
	through(restarts+1, int(sent.Load())-1)
	t.Logf("%d restarts in %v, %d datagrams", restarts, took.Round(10*time.Millisecond), sent.Load())
	if took > 2*restarts*time.Second {
		t.Errorf("%d restarts take %v", restarts, took)
	}
}
