package pagemem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

var (
	errClosed  = net.ErrClosed
	errFault   = unix.EFAULT
	errInvalid = unix.EINVAL
)

// PageSize is the host's page size in bytes.
func PageSize() int { return os.Getpagesize() }

// Source: linux/userfaultfd.h of 6.1.
const (
	uffdAPI          = 0xaa
	uffdUserModeOnly = 1

	featEventRemap  = 1 << 2
	featEventRemove = 1 << 3
	featEventUnmap  = 1 << 6
	featWPShmem     = 1 << 12 // 5.19

	registerWP = 1 << 1

	msgSize   = 32
	msgRemap  = 0x14
	msgRemove = 0x15
	msgUnmap  = 0x16
)

// ioc is _IOC of asm-generic/ioctl.h: dir is 0 for none, 2 to read from the kernel, 3 for both ways.
func ioc(dir, nr, size uintptr) uintptr {
	switch runtime.GOARCH {
	case "mips", "mipsle", "mips64", "mips64le", "ppc64", "ppc64le": // 13 bits of size, none is 1, write 4
		return [...]uintptr{0: 1, 2: 2, 3: 6}[dir]<<29 | size<<16 | uffdAPI<<8 | nr
	}
	return dir<<30 | size<<16 | uffdAPI<<8 | nr
}

type uffdioAPI struct{ api, features, ioctls uint64 }

type uffdioRegister struct{ start, len, mode, ioctls uint64 }

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

// openUFFD opens a userfaultfd that reports what happens to shared memory.
//
// It asks for one that handles faults of user mode only, which any process may have since Linux 5.11
// whatever vm.unprivileged_userfaultfd says: we want no faults at all. What then still stands in the way is an older
// kernel, a seccomp filter or a security module.
func openUFFD() (int, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	open := func(f uintptr) (int, error) {
		fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, f, 0, 0)
		if e != 0 {
			return -1, e
		}
		return int(fd), nil
	}
	fd, err := open(flags | uffdUserModeOnly)
	if err == unix.EINVAL { // before 5.11
		fd, err = open(flags)
	}
	if err == unix.EPERM || err == unix.ENOSYS {
		if dev, derr := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0); derr == nil {
			n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), ioc(0, 0, 0), flags)
			unix.Close(dev)
			if e == 0 {
				fd, err = int(n), nil
			}
		}
	}
	switch err {
	case nil:
	case unix.EPERM, unix.EACCES:
		return -1, fmt.Errorf("userfaultfd is not permitted: set sysctl vm.unprivileged_userfaultfd to 1, or let this user open /dev/userfaultfd, "+
			"or admit userfaultfd(2) in the container's seccomp profile: %w (%w)", errors.ErrUnsupported, err)
	case unix.ENOSYS:
		return -1, fmt.Errorf("the kernel has no userfaultfd (CONFIG_USERFAULTFD), or a seccomp profile hides it: %w (%w)", errors.ErrUnsupported, err)
	default:
		return -1, fmt.Errorf("userfaultfd: %w", err)
	}
	a := uffdioAPI{api: uffdAPI, features: featEventRemap | featEventRemove | featEventUnmap | featWPShmem}
	if err := ioctl(fd, ioc(3, 0x3f, unsafe.Sizeof(a)), unsafe.Pointer(&a)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("userfaultfd of this kernel does not watch shared memory (5.19 does): %w (%w)", errors.ErrUnsupported, err)
	}
	return fd, nil
}

// Supported is nil where Open will work; otherwise it says why not, as Open does.
func Supported() error {
	fd, err := openUFFD()
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// eventSource reads reports on a goroutine of its own, until it is closed.
type eventSource struct {
	f    *os.File
	done chan struct{}
}

func (s *eventSource) close() error {
	err := s.f.Close()
	<-s.done
	return err
}

// open maps n bytes, a multiple of the page size, and starts the reader.
func (m *Memory) open(n int) (err error) {
	fd, err := openUFFD()
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "userfaultfd") // non-blocking: the runtime's poller waits
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	mfd, err := unix.MemfdCreate("openrds-paged", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	defer unix.Close(mfd) // the mappings keep it
	if err := unix.Ftruncate(mfd, int64(n)); err != nil {
		return fmt.Errorf("memfd of %d bytes: %w", n, err)
	}
	// Nobody may shorten it: an access behind its end would be a SIGBUS.
	if _, err := unix.FcntlInt(uintptr(mfd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal memfd: %w", err)
	}
	if m.alias, err = mapFD(mfd, n); err != nil {
		return err
	}
	if m.app, err = mapFD(mfd, n); err != nil {
		return errors.Join(err, unmapBytes(m.alias))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unmapBytes(m.alias), unmapBytes(m.app))
		}
	}()
	r := uffdioRegister{start: uint64(addrOf(m.app)), len: uint64(n), mode: registerWP}
	if err := ioctl(fd, ioc(3, 0, unsafe.Sizeof(r)), unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("userfaultfd of this kernel does not watch shared memory: %w (%w)", errors.ErrUnsupported, err)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	m.segs = []segment{{addrOf(m.app), 0, n}}
	m.events = eventSource{f: f, done: make(chan struct{})}
	go func() {
		defer close(m.events.done)
		for rc.Read(m.readEvents) == nil {
		}
	}()
	return nil
}

// readEvents reads and acts on what reports there are; false: none.
//
// The lock is taken before the reading, which is what lets those who act on the mapping go on. So whoever has the lock
// afterwards finds their acts dealt with.
func (m *Memory) readEvents(fd uintptr) bool {
	m.eventMu.Lock()
	defer m.eventMu.Unlock()
	var buf [16 * msgSize]byte
	n, err := unix.Read(int(fd), buf[:])
	if err != nil || n <= 0 {
		return err != unix.EAGAIN
	}
	for b := buf[:n]; len(b) >= msgSize; b = b[msgSize:] {
		u64 := func(i int) uintptr { return uintptr(binary.NativeEndian.Uint64(b[8*i:])) }
		switch b[0] {
		case msgRemove:
			m.handle(event{kind: eventRemove, start: u64(1), end: u64(2)})
		case msgUnmap:
			m.handle(event{kind: eventUnmap, start: u64(1), end: u64(2)})
		case msgRemap:
			m.handle(event{kind: eventRemap, start: u64(1), to: u64(2), end: u64(1) + u64(3)})
		}
	}
	return true
}

func mapFD(fd, n int) ([]byte, error) {
	p, err := unix.MmapPtr(fd, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap %d bytes: %w", n, err)
	}
	b := unsafe.Slice((*byte)(p), n)
	// A child must not share memory that a device writes to, nor lose it when we punch holes: as
	// ibv_fork_init(3) has it.
	if err := unix.Madvise(b, unix.MADV_DONTFORK); err != nil {
		return nil, errors.Join(fmt.Errorf("madvise: %w", err), unmapBytes(b))
	}
	// What was not touched is absent, page by page. EINVAL where there are no huge pages.
	_ = unix.Madvise(b, unix.MADV_NOHUGEPAGE)
	return b, nil
}

func addrOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func unmapBytes(b []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)))
}

// unmap unmaps n bytes at addr, which is no memory of the Go heap.
func unmap(addr uintptr, n int) error {
	if _, _, e := unix.Syscall(unix.SYS_MUNMAP, addr, uintptr(n), 0); e != 0 {
		return fmt.Errorf("munmap: %w", e)
	}
	return nil
}

// pages rounds [off, off+n) of b outwards.
func pages(b []byte, off, n int) []byte {
	ps := PageSize()
	return b[off&^(ps-1) : min(len(b), (off+n+ps-1)&^(ps-1))]
}

func (m *Memory) populate(off, n int, write bool) error {
	advice := unix.MADV_POPULATE_READ
	if write {
		advice = unix.MADV_POPULATE_WRITE
	}
	b := pages(m.alias, off, n)
	for {
		err := unix.Madvise(b, advice)
		switch err {
		case nil:
			return nil
		case unix.EINTR: // a signal of the runtime's; what is in already is passed over quickly
			continue
		case unix.EINVAL:
			return fmt.Errorf("madvise(MADV_POPULATE): the kernel does not know it (5.14 does): %w", err)
		}
		return fmt.Errorf("madvise(MADV_POPULATE) of [%#x, %#x): %w", off, off+n, err)
	}
}

func (m *Memory) resident(off, n int, fn func(off, n int)) error {
	const batch = 4096 // pages: 16 MiB by a system call
	ps := PageSize()
	var vec [batch]byte
	b := pages(m.alias, off, n)
	at, start, end := off&^(ps-1), 0, 0 // the run that is growing
	for len(b) > 0 {
		k := min(len(b), batch*ps)
		if _, _, e := unix.Syscall(unix.SYS_MINCORE, addrOf(b), uintptr(k), uintptr(unsafe.Pointer(&vec))); e != 0 {
			return fmt.Errorf("mincore: %w", e)
		}
		for i := range k / ps {
			switch p := at + i*ps; {
			case vec[i]&1 == 0:
			case p == end && end > start:
				end = p + ps
			default:
				if end > start {
					fn(start, end-start)
				}
				start, end = p, p+ps
			}
		}
		b, at = b[k:], at+k
	}
	if end > start {
		fn(start, end-start)
	}
	return nil
}

// discard is MADV_REMOVE on the application's mapping: it waits for the report to be read.
func (m *Memory) discard(b []byte) error {
	if err := unix.Madvise(b, unix.MADV_REMOVE); err != nil {
		return fmt.Errorf("madvise(MADV_REMOVE): %w", err)
	}
	return nil
}

// release gives back pages that nobody has mapped but the alias, through which there is no report.
func (m *Memory) release(off, n int) {
	_ = unix.Madvise(m.alias[off:off+n], unix.MADV_REMOVE) // at worst they stay until Close
}
