package softroce

import (
	"hash/crc32"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// Guarded access. The functions here, the gather lists handed to the packet socket and the placement of trains are all
// that touches registered bytes. Memory that the application has unmapped behind the back of its registration, or
// that the machine has lost (a hardware error, no memory left for a page), faults; here that is an error of the one
// operation, not the end of the process. It is the second line: memory pinned or kept until Deregister, and pages
// that a table says are present, do not fault.
//
// A guard costs 2 ns beside the 90 that a full packet's copy and checksum take; setting it for the whole time that a
// goroutine has the engine role would save one of them, and hide faults of handlers.

// unguard ends a guarded function, which defers it with what debug.SetPanicOnFault(true) returned. A fault's
// address goes to at, never 0; other panics go on.
func unguard(old bool, at *uintptr) {
	debug.SetPanicOnFault(old)
	switch e := recover().(type) {
	case nil:
	case interface {
		runtime.Error
		Addr() uintptr
	}:
		*at = max(e.Addr(), 1)
	default:
		panic(e)
	}
}

// scatter copies b into a list of direct elements at byte offset off. The list is long enough.
func scatter(sgs []sge, off uint32, b []byte) (fault uintptr) {
	defer unguard(debug.SetPanicOnFault(true), &fault)
	for i := range sgs {
		s := sgs[i].bytes()
		if off >= uint32(len(s)) {
			off -= uint32(len(s))
			continue
		}
		n := copy(s[off:], b)
		b = b[n:]
		if len(b) == 0 {
			break
		}
		off = 0
	}
	return 0
}

// gather adds n bytes of a list of direct elements, from byte off on, to the packet being written: copied into scratch if
// inline, else summed up in st and named. It returns the sum.
func (t *txBatch) gather(st uint32, sgs []sge, off uint32, n int, inline bool) (sum uint32, fault uintptr) {
	defer unguard(debug.SetPanicOnFault(true), &fault)
	for n > 0 {
		s := sgs[0].bytes()
		sgs = sgs[1:]
		if off >= uint32(len(s)) {
			off -= uint32(len(s))
			continue
		}
		s = s[off:]
		off = 0
		if len(s) > n {
			s = s[:n:n]
		}
		n -= len(s)
		if inline {
			t.used += copy(t.scratch[t.used:], s)
			continue
		}
		st = crc32.Update(st, crc32.IEEETable, s)
		t.vecs = append(t.vecs, t.scratch[t.runStart:t.used:t.used], s)
		t.runStart = t.used
	}
	return st, 0
}

// atomically executes an atomic on w and returns what was there.
func atomically(w *uint64, op roce.Opcode, swapAdd, compare uint64) (orig uint64, fault uintptr) {
	defer unguard(debug.SetPanicOnFault(true), &fault)
	if op == roce.RCFetchAdd {
		return atomic.AddUint64(w, swapAdd) - swapAdd, 0
	}
	for {
		orig = atomic.LoadUint64(w)
		if orig != compare || atomic.CompareAndSwapUint64(w, orig, swapAdd) {
			return orig, 0
		}
	}
}

// put is scatter with a verdict.
func (d *device) put(sgs []sge, off uint32, b []byte) verdict { return d.faultAt(scatter(sgs, off, b)) }

// faultAt is the verdict on an access that faulted at address at, 0 for none: an on-demand region's page is absent,
// whatever its table said; memory of others is not to be had.
func (d *device) faultAt(at uintptr) verdict {
	if at == 0 {
		return granted
	}
	d.stats.add(cMemoryFaults, 1)
	if d.forget(at, 1) {
		return absent
	}
	return refused
}

// forget drops the entries of on-demand regions for n bytes of memory at address at. It reports whether there is such a
// region. Engine role.
func (d *device) forget(at uintptr, n int) (found bool) {
	for _, m := range d.paging.regions {
		lo := uintptr(unsafe.Pointer(unsafe.SliceData(m.paged.alias)))
		from, to := max(at, lo), min(at+uintptr(n), lo+uintptr(len(m.paged.alias)))
		if from < to {
			k := m.paged.table.drop(uint64(from-lo), uint64(to-from), false)
			d.paging.present.Sub(int64(k))
			d.stats.add(cODPInvalidatedPages, uint64(k))
			found = true
		}
	}
	return found
}

// gatherFaulted is called when the socket could not read what train t names (EFAULT). The train is lost; who has something on
// its way to that peer sends it again, and meets there, under guard, what cannot be read: pages of on-demand
// regions are brought in again, or their requests fail. Engine role.
func (d *device) gatherFaulted(t *packetio.TxTrain) {
	d.stats.add(cMemoryFaults, 1)
	for _, v := range t.Vec {
		if len(v) > 0 {
			d.forget(uintptr(unsafe.Pointer(&v[0])), len(v))
		}
	}
	d.qps.each(func(q *qp) {
		if q.typ == verbs.RC && q.peer == t.To && q.una != q.max && !q.closed.Load() {
			q.resend = true
			d.kick(q)
		}
	})
}

func isFault(err error) bool { return err == syscall.EFAULT }
