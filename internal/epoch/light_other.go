//go:build !linux || !amd64 || race

package epoch

import "sync/atomic"

// haveLight is false: readers announce themselves with Go's atomics, which order everything, and there is nothing for
// writers to do.
const haveLight = false

func storeRelease(*atomic.Uint64, uint64) { panic("BUG: epoch: no light readers here") }

func registerFence() bool { return false }

func fence() { panic("BUG: epoch: no light readers here") }
