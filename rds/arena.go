package rds

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/openrds/openrds/internal/pagemem"
	"github.com/openrds/openrds/verbs"
)

// Arena is memory for on-demand paging: a region over it pins nothing. A page comes in when a peer, or an operation of
// this side, first touches it, and the application gives it back with Discard, or with what the system
// offers: MADV_REMOVE, munmap, mremap on Bytes. The device has a mapping of its own of the same pages, and is told of each of
// these. What has been given back reads as zero when it is touched again; what has been unmapped or moved is gone,
// and a peer's access to it is a remote access error.
//
// The kernel's RDS does the same when it is asked to register memory that cannot be pinned (IB_ACCESS_ON_DEMAND). There
// any memory will do; here the application's acts on it could fault a device that runs in the same process, so
// that memory other than an Arena's is refused with ErrNotSupported.
//
// An act on the mapping waits until this process has read the report of it (a userfaultfd), so it may not be done in
// a completion handler. Methods are safe for concurrent use.
type Arena struct {
	mem *pagemem.Memory
}

// OpenArena makes an Arena of n bytes, rounded up to pages, of which none is resident. Address space is all it costs.
// The error matches ErrNotSupported where the system has no userfaultfd, or does not let this process have one: then it
// names the setting to change.
func OpenArena(n int) (*Arena, error) {
	m, err := pagemem.Open(n)
	switch {
	case err == nil:
		return &Arena{m}, nil
	case errors.Is(err, errors.ErrUnsupported):
		return nil, fmt.Errorf("rds: open arena: %w: %w", ErrNotSupported, err)
	case n <= 0:
		return nil, fmt.Errorf("rds: open arena of %d bytes: %w", n, ErrInvalid)
	}
	return nil, fmt.Errorf("rds: open arena of %d bytes: %w", n, err)
}

// Bytes is the memory, page aligned, at the same address until Close.
func (a *Arena) Bytes() []byte { return a.mem.Bytes() }

// Discard gives the pages of [off, off+n), both multiples of the page size, back to the system (MADV_REMOVE). It
// returns when every device knows: until one of them, or the application, touches such a page again it is absent,
// and then it is zero. ErrInvalid for what is not aligned, not inside, or was unmapped.
func (a *Arena) Discard(off, n int) error {
	if err := a.mem.Discard(off, n); err != nil {
		return fmt.Errorf("rds: arena: %w: %w", ErrInvalid, err)
	}
	return nil
}

// Sync returns when every device has dealt with what the application has done to the mapping by itself.
func (a *Arena) Sync() { a.mem.Sync() }

// Resident is how many bytes of [off, off+n) are in memory.
func (a *Arena) Resident(off, n int) (sum int, err error) {
	if err := a.mem.Resident(off, n, func(_, n int) { sum += n }); err != nil {
		return 0, fmt.Errorf("rds: arena: %w: %w", ErrInvalid, err)
	}
	return sum, nil
}

// Paged is [off, off+n) for verbs.PD.RegOnDemandMR. ErrInvalid when that is not inside.
func (a *Arena) Paged(off, n int) (verbs.PagedMemory, error) {
	s, err := a.mem.Section(off, n)
	if err != nil {
		return nil, fmt.Errorf("rds: arena: %w: %w", ErrInvalid, err)
	}
	return s, nil
}

// Offset is where in the arena b begins. ok is false when b is not all inside: memory that may not be
// registered on demand.
func (a *Arena) Offset(b []byte) (off int, ok bool) {
	if len(b) == 0 {
		return 0, false
	}
	all := a.mem.Bytes()
	d := uintptr(unsafe.Pointer(&b[0])) - uintptr(unsafe.Pointer(&all[0])) // wraps when b is before all
	if d >= uintptr(len(all)) || uintptr(len(b)) > uintptr(len(all))-d {
		return 0, false
	}
	return int(d), true
}

// Close unmaps the arena. It matches verbs.ErrBusy, and changes nothing, while regions are registered over it; nil when
// already done. Nobody may use Bytes any more.
func (a *Arena) Close() error {
	err := a.mem.Close()
	if errors.Is(err, pagemem.ErrBusy) {
		return &verbs.BusyError{Object: "arena", Holders: []string{"regions registered over it"}}
	}
	return err
}
