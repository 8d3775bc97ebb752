package pagemem

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// open skips where the kernel lets nobody have a userfaultfd.
func open(t testing.TB, pages int) *Memory {
	t.Helper()
	m, err := Open(pages * PageSize())
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func closeMemory(t testing.TB, m *Memory) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// residentPages lists the resident pages, as the device's mapping sees them.
func residentPages(t testing.TB, m *Memory) (out []int) {
	t.Helper()
	if err := m.Resident(0, len(m.Alias()), func(off, n int) {
		for i := off; i < off+n; i += PageSize() {
			out = append(out, i/PageSize())
		}
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// record keeps what a watcher was told, in pages.
type record struct {
	mu   sync.Mutex
	told []string
}

func (r *record) fn(off, n int, gone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, fmt.Sprintf("%d+%d %v", off/PageSize(), n/PageSize(), gone))
}

func (r *record) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.told
	r.told = nil
	return out
}

func want[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func pageOf(m *Memory, b []byte, i int) []byte { return b[i*PageSize() : (i+1)*PageSize()] }

// TestActs does to the application's mapping what an application may do, and looks at what the device is told, at
// what is resident, and at what the device's mapping still holds.
func TestActs(t *testing.T) {
	m := open(t, 16)
	var none []int
	want(t, "pages resident before anything", residentPages(t, m), none)
	var rec record
	stop, err := m.Watch(rec.fn)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Populate(2*PageSize()+5, 3*PageSize(), true); err != nil {
		t.Fatal(err)
	}
	want(t, "resident after populating from within page 2 to within page 5", residentPages(t, m), []int{2, 3, 4, 5})
	copy(pageOf(m, m.Alias(), 3), "from the device")
	if got := pageOf(m, m.Bytes(), 3)[:15]; string(got) != "from the device" {
		t.Fatalf("the application sees %q", got)
	}

	advise := func(page, n, advice int) {
		t.Helper()
		if err := unix.Madvise(m.Bytes()[page*PageSize():(page+n)*PageSize()], advice); err != nil {
			t.Fatal(err)
		}
		m.Sync()
	}
	advise(3, 1, unix.MADV_DONTNEED)
	want(t, "told of MADV_DONTNEED", rec.take(), []string{"3+1 false"})
	want(t, "resident after MADV_DONTNEED", residentPages(t, m), []int{2, 3, 4, 5})
	if got := pageOf(m, m.Alias(), 3)[:15]; string(got) != "from the device" {
		t.Fatalf("MADV_DONTNEED took the content: %q", got)
	}
	advise(3, 2, unix.MADV_REMOVE)
	want(t, "told of MADV_REMOVE", rec.take(), []string{"3+2 false"})
	want(t, "resident after MADV_REMOVE", residentPages(t, m), []int{2, 5})
	if err := m.Discard(2*PageSize(), PageSize()); err != nil {
		t.Fatal(err)
	}
	want(t, "told of Discard", rec.take(), []string{"2+1 false"})
	want(t, "resident after Discard", residentPages(t, m), []int{5})

	// munmap in the middle: gone for the device, its pages given back, the mapping of the device intact.
	if err := unix.MunmapPtr(unsafe.Pointer(&m.Bytes()[4*PageSize()]), uintptr(3*PageSize())); err != nil {
		t.Fatal(err)
	}
	m.Sync()
	want(t, "told of munmap", rec.take(), []string{"4+3 true"})
	want(t, "resident after munmap", residentPages(t, m), none)
	if err := m.Populate(3*PageSize(), 2*PageSize(), false); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("populating what is partly gone: %v", err)
	}
	if err := m.Discard(4*PageSize(), PageSize()); !errors.Is(err, unix.EINVAL) {
		t.Fatalf("discarding what is gone: %v", err)
	}
	if b := m.Alias()[5*PageSize()]; b != 0 {
		t.Fatalf("a page that was given back holds %#x", b)
	}

	// mremap elsewhere, page 8 and 9.
	if err := m.Populate(8*PageSize(), 2*PageSize(), true); err != nil {
		t.Fatal(err)
	}
	copy(pageOf(m, m.Alias(), 9), "moved")
	p, err := unix.MremapPtr(unsafe.Pointer(&m.Bytes()[8*PageSize()]), uintptr(2*PageSize()), nil, uintptr(4*PageSize()), unix.MREMAP_MAYMOVE)
	if err != nil {
		t.Fatal(err)
	}
	m.Sync()
	moved := unsafe.Slice((*byte)(p), 2*PageSize())
	want(t, "told of mremap", rec.take(), []string{"8+2 true"})
	if got := moved[PageSize():][:5]; string(got) != "moved" {
		t.Fatalf("the application's moved mapping holds %q", got)
	}
	if got := pageOf(m, m.Alias(), 9)[:5]; string(got) != "moved" {
		t.Fatalf("the device's mapping holds %q after mremap", got)
	}
	if err := m.Populate(9*PageSize(), 1, true); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("populating what was moved: %v", err)
	}
	// What is done at the new address is known by its old offset.
	if err := unix.Madvise(moved[PageSize():2*PageSize()], unix.MADV_REMOVE); err != nil {
		t.Fatal(err)
	}
	m.Sync()
	want(t, "told of MADV_REMOVE at the new address", rec.take(), []string{"9+1 false"})
	// After an mremap nothing is given back by munmap: the page may be mapped twice.
	if err := m.Populate(12*PageSize(), 1, true); err != nil {
		t.Fatal(err)
	}
	if err := unix.MunmapPtr(unsafe.Pointer(&m.Bytes()[12*PageSize()]), uintptr(PageSize())); err != nil {
		t.Fatal(err)
	}
	m.Sync()
	want(t, "told of munmap after mremap", rec.take(), []string{"12+1 true"})
	if got := residentPages(t, m); got[len(got)-1] != 12 {
		t.Fatalf("resident: %v; page 12 was given back though it may be mapped elsewhere", got)
	}

	if err := m.Close(); !errors.Is(err, ErrBusy) {
		t.Fatalf("close of watched memory: %v", err)
	}
	stop()
	advise(0, 1, unix.MADV_REMOVE)
	want(t, "told after stop", rec.take(), nil)
	closeMemory(t, m)
	closeMemory(t, m)
	if _, err := m.Watch(rec.fn); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("watching closed memory: %v", err)
	}
	if err := m.Populate(0, 1, false); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("populating closed memory: %v", err)
	}
}

// TestCloseLeavesForeignMemoryAlone unmaps the application's mapping by hand and lets something else live there: Close
// does not touch it.
func TestCloseLeavesForeignMemoryAlone(t *testing.T) {
	m := open(t, 4)
	at := unsafe.Pointer(&m.Bytes()[PageSize()])
	if err := unix.MunmapPtr(at, uintptr(PageSize())); err != nil {
		t.Fatal(err)
	}
	p, err := unix.MmapPtr(-1, 0, at, uintptr(PageSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_FIXED_NOREPLACE)
	if err != nil {
		t.Fatal(err)
	}
	other := unsafe.Slice((*byte)(p), PageSize())
	other[0] = 7
	closeMemory(t, m)
	if other[0] != 7 { // a fault, had it been unmapped
		t.Fatal("somebody else's memory changed")
	}
	if err := unix.MunmapPtr(p, uintptr(PageSize())); err != nil {
		t.Fatal(err)
	}
}

// TestWatchersAreIndependent stops one watcher while another is being called.
func TestWatchersAreIndependent(t *testing.T) {
	m := open(t, 4)
	defer closeMemory(t, m)
	in, out := make(chan struct{}), make(chan struct{})
	stopSlow, err := m.Watch(func(int, int, bool) { in <- struct{}{}; <-out })
	if err != nil {
		t.Fatal(err)
	}
	var rec record
	stop, err := m.Watch(rec.fn)
	if err != nil {
		t.Fatal(err)
	}
	discarded := make(chan error)
	go func() { discarded <- m.Discard(0, PageSize()) }()
	<-in
	stop() // does not wait for the other one
	var slowStopped atomic.Bool
	stopped := make(chan struct{})
	go func() { stopSlow(); slowStopped.Store(true); close(stopped) }()
	if slowStopped.Load() {
		t.Error("stop returned during the call")
	}
	close(out)
	if err := <-discarded; err != nil {
		t.Error(err)
	}
	<-stopped
	want(t, "the stopped one was told", rec.take(), nil)
}

// TestConcurrentActs populates, discards and writes from many sides; the device's mapping never faults.
func TestConcurrentActs(t *testing.T) {
	m := open(t, 64)
	defer closeMemory(t, m)
	var told atomic.Int64
	stop, err := m.Watch(func(off, n int, gone bool) { told.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	const rounds = 300
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range rounds {
				off := (w*16 + i%16) * PageSize()
				if err := m.Populate(off, PageSize(), true); err != nil {
					t.Error(err)
					return
				}
				m.Alias()[off] = byte(i)
				if err := m.Discard(off, PageSize()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := told.Load(); n != 4*rounds {
		t.Fatalf("%d acts, %d told", 4*rounds, n)
	}
	want(t, "resident at the end", residentPages(t, m), []int(nil))
}

func TestArguments(t *testing.T) {
	for _, n := range []int{0, -1, math.MaxInt} {
		if m, err := Open(n); err == nil {
			m.Close()
			t.Errorf("Open(%d) worked", n)
		}
	}
	m := open(t, 2)
	defer closeMemory(t, m)
	for _, c := range [][2]int{{-1, 1}, {0, -1}, {0, len(m.Alias()) + 1}, {len(m.Alias()), 1}, {math.MaxInt, math.MaxInt}} {
		if err := m.Populate(c[0], c[1], false); !errors.Is(err, unix.EFAULT) {
			t.Errorf("Populate%v: %v", c, err)
		}
		if err := m.Resident(c[0], c[1], func(int, int) {}); !errors.Is(err, unix.EFAULT) {
			t.Errorf("Resident%v: %v", c, err)
		}
		if err := m.Discard(c[0], c[1]); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Discard%v: %v", c, err)
		}
	}
	if err := m.Discard(1, PageSize()); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Discard that is not aligned: %v", err)
	}
}

const childEnv = "PAGEMEM_TEST_ERRNO"

func init() {
	helper = func() bool {
		switch os.Getenv(childEnv) {
		case "":
			return false
		case "EPERM":
			forbid(unix.EPERM)
		case "ENOSYS":
			forbid(unix.ENOSYS)
		}
		_, err := Open(1)
		fmt.Printf("unsupported=%v supported=%v: %v\n", errors.Is(err, errors.ErrUnsupported), Supported() == nil, err)
		return true
	}
}

// forbid makes userfaultfd(2) and the opening of files, /dev/userfaultfd among them, fail for the rest of
// this process's life.
func forbid(errno unix.Errno) {
	load := unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}
	eq := func(nr uint32, to uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jt: to}
	}
	prog := []unix.SockFilter{
		load,
		eq(unix.SYS_USERFAULTFD, 2),
		eq(unix.SYS_OPENAT, 2),
		{Code: unix.BPF_RET, K: 0x7fff0000}, // SECCOMP_RET_ALLOW
		{Code: unix.BPF_RET, K: 0x00050000 | uint32(errno)},
		{Code: unix.BPF_RET, K: 0x00050000 | uint32(unix.EACCES)},
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, 1, 1, uintptr(unsafe.Pointer(&fprog))); e != 0 { // SET_MODE_FILTER, TSYNC
		panic(e)
	}
}

// TestNotPermitted runs this program where userfaultfd is forbidden: opening says so, and names the settings.
func TestNotPermitted(t *testing.T) {
	for errno, texts := range map[string][]string{
		"EPERM":  {"vm.unprivileged_userfaultfd", "/dev/userfaultfd", "seccomp", "operation not permitted"},
		"ENOSYS": {"CONFIG_USERFAULTFD"},
	} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+errno, "GORACE=atexit_sleep_ms=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if !bytes.HasPrefix(out, []byte("unsupported=true supported=false: ")) {
			t.Errorf("with userfaultfd forbidden by %s: %s", errno, out)
		}
		for _, text := range texts {
			if !strings.Contains(string(out), text) {
				t.Errorf("with userfaultfd forbidden by %s the error does not name %s: %s", errno, text, out)
			}
		}
	}
}

// TestUnprivileged runs this program as nobody: no setting is needed since 5.11.
func TestUnprivileged(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become nobody; the other tests have shown that this user may")
	}
	exe := t.TempDir() + "/pagemem.test" // where nobody may read it
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Dir = "/"
	cmd.Env = []string{childEnv + "=none", "GORACE=atexit_sleep_ms=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Skipf("cannot run as nobody here: %v: %s", err, out)
	}
	if !bytes.HasPrefix(out, []byte("unsupported=false supported=true: <nil>")) {
		t.Errorf("as nobody: %s", out)
	}
}

// BenchmarkTouch is what it costs the device to get at a page: the first time, when it is populated, and the
// second.
func BenchmarkTouch(b *testing.B) {
	m := open(b, 4096)
	defer m.Close()
	ps := PageSize()
	for _, pages := range []int{1, 256} {
		n := pages * ps
		b.Run(fmt.Sprintf("first/%dKiB", n>>10), func(b *testing.B) {
			b.SetBytes(int64(n))
			for i := range b.N {
				off := i * n % len(m.Alias())
				if off == 0 {
					b.StopTimer()
					if err := m.Discard(0, len(m.Alias())); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				if err := m.Populate(off, n, true); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("second/%dKiB", n>>10), func(b *testing.B) {
			b.SetBytes(int64(n))
			if err := m.Populate(0, len(m.Alias()), true); err != nil {
				b.Fatal(err)
			}
			for i := range b.N {
				if err := m.Populate(i*n%len(m.Alias()), n, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestSection sees to it that a section speaks of itself in its own offsets.
func TestSection(t *testing.T) {
	m := open(t, 8)
	defer closeMemory(t, m)
	ps := PageSize()
	s, err := m.Section(2*ps+100, 2*ps) // pages 2, 3 and 4, in part
	if err != nil {
		t.Fatal(err)
	}
	if a := s.Alias(); len(a) != 2*ps || cap(a) != 2*ps || &a[0] != &m.Alias()[2*ps+100] {
		t.Fatalf("alias of %d bytes, capacity %d, at the wrong place or of the wrong size", len(a), cap(a))
	}
	type run struct {
		off, n int
		gone   bool
	}
	var told []run
	stop, err := s.Watch(func(off, n int, gone bool) { told = append(told, run{off, n, gone}) })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := s.Populate(ps, 1, true); err != nil {
		t.Fatal(err)
	}
	want(t, "resident in the memory", residentPages(t, m), []int{3})
	var res []run
	if err := s.Resident(0, 2*ps, func(off, n int) { res = append(res, run{off, n, false}) }); err != nil {
		t.Fatal(err)
	}
	want(t, "resident in the section", res, []run{{ps - 100, ps, false}})
	for _, p := range []int{1, 2, 5} { // outside, in part, outside
		if err := m.Discard(p*ps, ps); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.MunmapPtr(unsafe.Pointer(&m.Bytes()[4*ps]), uintptr(ps)); err != nil {
		t.Fatal(err)
	}
	m.Sync()
	want(t, "told", told, []run{{0, ps - 100, false}, {2*ps - 100, 100, true}})
	if err := s.Populate(2*ps-1, 1, false); !errors.Is(err, unix.EFAULT) {
		t.Errorf("populating the part that is gone: %v", err)
	}
	for _, c := range [][2]int{{-1, 1}, {0, 0}, {0, 8*ps + 1}, {8 * ps, 1}} {
		if _, err := m.Section(c[0], c[1]); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Section%v: %v", c, err)
		}
	}
	if err := s.Populate(0, 2*ps+1, false); !errors.Is(err, unix.EFAULT) {
		t.Errorf("populating more than the section: %v", err)
	}
}
