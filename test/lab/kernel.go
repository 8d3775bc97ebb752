//go:build linux

package lab

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// tools are the Debian packages a lab needs and a program of each that tells whether it is there.
var tools = []struct{ pkg, program string }{
	{"qemu-system-x86", "/usr/bin/qemu-system-x86_64"},
	{"busybox-static", "/bin/busybox"},
	{"kmod", "/sbin/depmod"},
	{"iproute2", "/sbin/ip"},
	{"rdma-core", "/bin/rdma"}, // rdma itself is iproute2's
	{"ibverbs-providers", "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so"},
	{"ibverbs-utils", "/usr/bin/ibv_rc_pingpong"},
	{"rdmacm-utils", "/usr/bin/rping"},
	{"perftest", "/usr/bin/ib_send_bw"},
	{"gcc", "/usr/bin/gcc"},
	{"libibverbs-dev", "/usr/include/infiniband/verbs.h"},
	{"librdmacm-dev", "/usr/include/rdma/rdma_cma.h"},
	{"nftables", "/usr/sbin/nft"},
	{"tshark", "/usr/bin/tshark"},
}

// kernelMeta is the package that depends on the current kernel.
const kernelMeta = "linux-image-amd64"

// prepare sees to tools and kernel and returns the directory of the unpacked kernel package. It works without a
// network when everything is there from an earlier run.
func prepare() (dir string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "openrds-lab")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// One lab at a time installs and unpacks.
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	if err := installTools(); err != nil {
		return "", err
	}
	return fetchKernel(cache)
}

func missingTools() (pkgs []string) {
	for _, t := range tools {
		if _, err := os.Stat(t.program); err != nil {
			// The provider's file name carries an ABI number.
			if m, _ := filepath.Glob(filepath.Join(filepath.Dir(t.program), "librxe-rdmav*.so")); t.pkg == "ibverbs-providers" && len(m) > 0 {
				continue
			}
			pkgs = append(pkgs, t.pkg)
		}
	}
	return pkgs
}

func installTools() error {
	pkgs := missingTools()
	if len(pkgs) == 0 {
		return nil
	}
	install := func() error {
		return command("apt-get", append([]string{"install", "-y", "-q", "--no-install-recommends"}, pkgs...)...)
	}
	err := install()
	if err != nil { // the package lists may be old, or not there at all
		if err = command("apt-get", "update", "-q"); err == nil {
			err = install()
		}
	}
	if left := missingTools(); len(left) > 0 {
		return fmt.Errorf("missing: %s (%w)", strings.Join(left, ", "), errors.Join(err, errors.New("apt-get install was tried")))
	}
	return nil
}

// command runs a program and returns its output's last line with an error.
func command(name string, args ...string) error {
	_, err := output("", name, args...)
	return err
}

func output(dir, name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		return out, fmt.Errorf("%s: %w: %s", name, err, lines[len(lines)-1])
	}
	return out, nil
}

// fetchKernel downloads and unpacks the package that kernelMeta depends on, once per version.
func fetchKernel(cache string) (dir string, err error) {
	pkg, version, err := kernelPackage()
	if err != nil {
		if command("apt-get", "update", "-q") == nil {
			pkg, version, err = kernelPackage()
		}
		if err != nil {
			return "", fmt.Errorf("missing: %s (%w)", kernelMeta, err)
		}
	}
	dir = filepath.Join(cache, pkg+"_"+strings.ReplaceAll(version, ":", "_"))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	get := func() error {
		_, err := output(tmp, "apt-get", "download", "-q", pkg+"="+version)
		return err
	}
	if err := get(); err != nil {
		if command("apt-get", "update", "-q") != nil || get() != nil {
			return "", fmt.Errorf("missing: %s (%w)", pkg, err)
		}
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return "", fmt.Errorf("missing: %s (apt-get download left %d packages)", pkg, len(debs))
	}
	root := filepath.Join(tmp, "root")
	if err := command("dpkg", "-x", debs[0], root); err != nil {
		return "", err
	}
	release, err := kernelRelease(root)
	if err != nil {
		return "", err
	}
	if err := command("depmod", "-b", root, release); err != nil {
		return "", err
	}
	return dir, os.Rename(root, dir)
}

// kernelPackage is the package with the current kernel and its candidate version.
func kernelPackage() (pkg, version string, err error) {
	out, err := output("", "apt-cache", "depends", kernelMeta)
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(out)) {
		if _, p, ok := strings.Cut(line, "Depends: linux-image-"); ok {
			pkg = "linux-image-" + strings.TrimSpace(p)
			break
		}
	}
	if pkg == "" {
		return "", "", fmt.Errorf("%s depends on no kernel", kernelMeta)
	}
	if out, err = output("", "apt-cache", "policy", pkg); err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(out)) {
		if _, v, ok := strings.Cut(line, "Candidate: "); ok {
			version = strings.TrimSpace(v)
		}
	}
	if version == "" || version == "(none)" {
		return "", "", fmt.Errorf("%s is not to be had", pkg)
	}
	return pkg, version, nil
}

// kernelRelease is the release (uname -r) of the kernel unpacked in dir.
func kernelRelease(dir string) (string, error) {
	m, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if len(m) != 1 {
		return "", fmt.Errorf("%s holds %d kernels, not one", dir, len(m))
	}
	return strings.TrimPrefix(filepath.Base(m[0]), "vmlinuz-"), nil
}

// moduleOrder lists the files of modules and all they depend on, each behind its dependencies, relative to
// the directory of modules.dep. Modules built into the kernel are left out.
func moduleOrder(dep []byte, modules ...string) ([]string, error) {
	path := make(map[string]string)    // name -> file
	needs := make(map[string][]string) // file -> files, as modules.dep has them: the last one is loaded first
	sc := bufio.NewScanner(bytes.NewReader(dep))
	for sc.Scan() {
		file, deps, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			continue
		}
		name, _, _ := strings.Cut(filepath.Base(file), ".ko")
		path[strings.ReplaceAll(name, "-", "_")] = file
		needs[file] = strings.Fields(deps)
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	var order []string
	done := make(map[string]bool)
	var add func(string)
	add = func(file string) {
		if done[file] {
			return
		}
		done[file] = true
		for _, d := range needs[file] {
			add(d)
		}
		order = append(order, file)
	}
	for _, m := range modules {
		file := path[m]
		if file == "" {
			return nil, fmt.Errorf("module %s: %w", m, fs.ErrNotExist)
		}
		add(file)
	}
	return order, nil
}

// bootModules take the guest as far as the host's file system and the agent's port. Everything else is
// loaded from there with modprobe.
var bootModules = []string{"virtio_pci", "virtio_console", "9p", "9pnet_virtio"}

// initScript finds the environment in the kernel's command line: the kernel hands on what it does not know.
const initScript = `#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
mount -t proc proc /proc
for m in $(cat /modules/order); do insmod /modules/$m; done
umount /proc
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mount -t devtmpfs devtmpfs /host/dev
mkdir -p /host/dev/pts /host/dev/shm
mount -t devpts devpts /host/dev/pts
mount -t tmpfs tmpfs /host/dev/shm
mount -t tmpfs tmpfs /host/run
exec switch_root /host "$OPENRDS_LAB_EXE"
`

// initramfs makes the initial RAM disk for the kernel in dir, in memory: some MiB, uncompressed.
func initramfs(dir string) ([]byte, error) {
	release, err := kernelRelease(dir)
	if err != nil {
		return nil, err
	}
	modDir := filepath.Join(dir, "lib/modules", release)
	dep, err := os.ReadFile(filepath.Join(modDir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	files, err := moduleOrder(dep, bootModules...)
	if err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, err
	}
	var c cpio
	for _, d := range []string{"bin", "dev", "host", "modules", "proc"} {
		c.dir(d)
	}
	c.console("dev/console")
	c.file("init", 0o755, []byte(initScript))
	c.file("bin/busybox", 0o755, busybox)
	var order bytes.Buffer
	for _, f := range files {
		data, err := readModule(filepath.Join(modDir, f))
		if err != nil {
			return nil, err
		}
		name, _, _ := strings.Cut(filepath.Base(f), ".ko")
		c.file("modules/"+name+".ko", 0o644, data)
		fmt.Fprintf(&order, "%s.ko\n", name)
	}
	c.file("modules/order", 0o644, order.Bytes())
	return c.bytes(), nil
}

// readModule reads a module, compressed or not (busybox's insmod wants it plain).
func readModule(path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return output("", "xz", "-dc", path)
	case ".zst":
		return output("", "zstd", "-dc", path)
	}
	return os.ReadFile(path)
}

// cpio writes an archive in the "newc" format that the kernel unpacks.
type cpio struct {
	buf bytes.Buffer
	ino int
}

func (c *cpio) entry(name string, mode uint32, rmajor, rminor int, data []byte) {
	c.ino++
	// magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	fmt.Fprintf(&c.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, rmajor, rminor, len(name)+1, 0)
	c.buf.WriteString(name)
	c.buf.WriteByte(0)
	c.pad()
	c.buf.Write(data)
	c.pad()
}

func (c *cpio) pad() {
	for c.buf.Len()%4 != 0 {
		c.buf.WriteByte(0)
	}
}

func (c *cpio) dir(name string) { c.entry(name, unix.S_IFDIR|0o755, 0, 0, nil) }

func (c *cpio) file(name string, perm uint32, data []byte) {
	c.entry(name, unix.S_IFREG|perm, 0, 0, data)
}

func (c *cpio) console(name string) { c.entry(name, unix.S_IFCHR|0o600, 5, 1, nil) }

func (c *cpio) bytes() []byte {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.buf.Bytes()
}

// CompileC compiles a C file against libibverbs and librdmacm for the guest and returns the program's path.
func CompileC(t testing.TB, src string) string {
	t.Helper()
	Need(t)
	out := workPath(strings.TrimSuffix(filepath.Base(src), ".c"))
	if _, err := os.Stat(out); err == nil {
		return out
	}
	if err := command("gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", out, src, "-lrdmacm", "-libverbs"); err != nil {
		t.Fatal(err)
	}
	return out
}

// initrdPath writes the RAM disk once per process.
var initrdPath = sync.OnceValues(func() (string, error) {
	data, err := initramfs(os.Getenv(kernelEnv))
	if err != nil {
		return "", fmt.Errorf("initramfs: %w", err)
	}
	path := workPath("initrd")
	return path, os.WriteFile(path, data, 0o644)
})
