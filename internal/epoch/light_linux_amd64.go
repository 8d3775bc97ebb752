//go:build !race

package epoch

import (
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// haveLight: on this processor a store that orders what follows it is a locked instruction, 5 to 6 ns each, and
// a read-side section needs two. Writers are rare. So they fence the readers' processors from afar with
// membarrier(2), which costs them 0.2 to 10 us, and readers write with plain stores: 5.2 ns for Enter and Exit
// instead of 12.3. liburcu's default flavour works like this. (On arm64 the ordinary stores are cheap.
// The race detector sees only Go's own atomics, so it gets those.)
const haveLight = true

// linux/membarrier.h
const (
	membarrierPrivateExpedited         = 1 << 3
	membarrierRegisterPrivateExpedited = 1 << 4
)

// storeRelease stores v in p, after all loads and stores before it, and lets later loads pass.
// sync/atomic has no such store, and a plain one in Go may be moved by the compiler.
//
//go:noescape
func storeRelease(p *atomic.Uint64, v uint64)

// registerFence asks the kernel for fence, and reports whether there is one: not before Linux 4.14, nor where a filter of system
// calls forbids it. The first time in a process takes about 10 ms.
func registerFence() bool {
	return membarrier(membarrierRegisterPrivateExpedited) == 0
}

// fence returns after every thread of the process has gone through a full memory barrier.
func fence() {
	// After registration there is one error, ENOMEM for a mask of processors in old kernels. (A filter
	// put in place since would give another; garbage then is kept, not freed too early.)
	for wait := time.Microsecond; membarrier(membarrierPrivateExpedited) != 0; wait = min(2*wait, time.Second) {
		time.Sleep(wait)
	}
}

func membarrier(cmd uintptr) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, cmd, 0, 0)
	return errno
}
