package main

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// level is how bad a finding is.
type level uint8

const (
	fine level = iota
	note       // worth knowing
	warn       // it works, less well than it could
	bad        // something will not work
)

func (l level) String() string { return [...]string{"ok", "note", "warning", "error"}[l] }

func (l level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// finding is what a check has to say.
type finding struct {
	Check string `json:"check"`
	Level level  `json:"level"`
	Text  string `json:"text"`
	Mend  string `json:"mend,omitempty"` // the line that mends it; there is one for all that are not fine
}

// host is what checks look at: the files of a machine, and who asks.
type host struct {
	fs.FS      // of the root directory
	root  bool // has every right
	roce  uint16
}

type check struct {
	name string
	run  func(h *host) []finding
}

var checks = []check{
	{"hardware", checkHardware},
	{"gids", checkGIDs},
	{"memlock", checkMemlock},
	{"mtu", checkMTU},
	{"buffers", checkBuffers},
	{"port", checkPort},
	{"kernel-rds", checkKernelRDS},
	{"namespace", checkNamespace},
	{"userfaultfd", checkUserfaultfd},
}

func newDoctor(stdout io.Writer) *cobra.Command {
	var asJSON bool
	h := host{FS: os.DirFS("/"), root: os.Geteuid() == 0}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what stands in the way on this host",
		Long: `doctor looks at limits, devices, ports, modules and namespaces, and says for each finding which command mends it. It changes
nothing. The exit status is 1 if there is an error; warnings and notes are no errors.`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			var all []finding
			for _, c := range checks {
				all = append(all, h.run(c)...)
			}
			if asJSON {
				enc := json.NewEncoder(stdout)
				enc.SetIndent("", "  ")
				if err := enc.Encode(all); err != nil {
					return err
				}
			} else {
				for _, f := range all {
					fmt.Fprintf(stdout, "%-8s %-12s %s\n", f.Level, f.Check, f.Text)
					if f.Mend != "" {
						fmt.Fprintf(stdout, "%21s mend: %s\n", "", f.Mend)
					}
				}
			}
			if slices.ContainsFunc(all, func(f finding) bool { return f.Level == bad }) {
				return errFailed
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "a JSON array of findings")
	cmd.Flags().Uint16Var(&h.roce, "roce-port", 4791, "UDP port of RoCEv2")
	return cmd
}

// run is c's findings, with its name in each.
func (h *host) run(c check) []finding {
	fs := c.run(h)
	for i := range fs {
		fs[i].Check = c.name
	}
	return fs
}

// read is the text of a file, "" if it cannot be read. Not fs.ReadFile, which begins with a read of one byte where the size is said to be 0:
// what sysctl files have is read at once or not at all, so that of 4194304 there would be a 4.
func (h *host) read(name string) string {
	f, err := h.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (h *host) glob(pattern string) []string {
	m, _ := fs.Glob(h, pattern) // the only error is a bad pattern
	return m
}

func (h *host) number(name string) (int64, bool) {
	n, err := strconv.ParseInt(h.read(name), 10, 64)
	return n, err == nil
}

func checkHardware(h *host) []finding {
	devs := h.glob("sys/class/infiniband/*")
	if len(devs) == 0 {
		return []finding{{Level: fine, Text: "no RDMA device: softroce does the work in software"}}
	}
	var names []string
	for _, d := range devs {
		names = append(names, path.Base(d))
	}
	var out []finding
	nodes := h.glob("dev/infiniband/uverbs*")
	if len(nodes) == 0 {
		out = append(out, finding{Level: warn, Text: fmt.Sprintf("RDMA devices %v, but no /dev/infiniband/uverbs*: programs cannot use them", names), Mend: "modprobe ib_uverbs"})
	} else {
		out = append(out, finding{Level: fine, Text: fmt.Sprintf("RDMA devices %v", names)})
	}
	for _, n := range nodes {
		st, err := fs.Stat(h, n)
		if err == nil && !h.root && st.Mode().Perm()&0o006 != 0o006 {
			out = append(out, finding{Level: warn, Text: fmt.Sprintf("/%s is not for everybody (%v)", n, st.Mode().Perm()), Mend: "chmod 0666 /" + n})
		}
	}
	if len(h.glob("dev/infiniband/rdma_cm")) == 0 {
		out = append(out, finding{Level: warn, Text: "no /dev/infiniband/rdma_cm: no connections over these devices", Mend: "modprobe rdma_ucm"})
	}
	return out
}

// zeroGID is an unused entry of a GID table.
const zeroGID = "0000:0000:0000:0000:0000:0000:0000:0000"

func checkGIDs(h *host) (out []finding) {
	for _, port := range h.glob("sys/class/infiniband/*/ports/*") {
		dev := path.Base(path.Dir(path.Dir(port)))
		used, v2 := 0, 0
		for _, g := range h.glob(port + "/gids/*") {
			v := h.read(g)
			if v == "" || v == zeroGID {
				continue
			}
			used++
			if strings.EqualFold(h.read(port+"/gid_attrs/types/"+path.Base(g)), "RoCE v2") {
				v2++
			}
		}
		switch link := h.read(port + "/link_layer"); {
		case used == 0:
			out = append(out, finding{Level: warn, Text: fmt.Sprintf("%s port %s has no GID: its interface has no address", dev, path.Base(port)),
				Mend: "ip address add ADDRESS/PREFIX dev " + h.netdev(port)})
		case link == "Ethernet" && v2 == 0:
			out = append(out, finding{Level: warn, Text: fmt.Sprintf("%s port %s has no RoCE v2 GID", dev, path.Base(port)),
				Mend: "cma_roce_mode -d " + dev + " -p " + path.Base(port) + " -m 2"})
		default:
			out = append(out, finding{Level: fine, Text: fmt.Sprintf("%s port %s has %d GIDs", dev, path.Base(port), used)})
		}
	}
	return out
}

// netdev is the network interface of a port of an RDMA device.
func (h *host) netdev(port string) string {
	dev := path.Dir(path.Dir(port))
	for _, name := range append(h.glob(port+"/gid_attrs/ndevs/*"), dev+"/parent") { // the latter is rxe's
		if s := h.read(name); s != "" {
			return s
		}
	}
	if m := h.glob(dev + "/device/net/*"); len(m) > 0 {
		return path.Base(m[0])
	}
	return "INTERFACE"
}

// mendProc is for what should be in /proc.
const mendProc = "mount -t proc proc /proc"

// wantMemlock is what a Service may pin: its slabs.
const wantMemlock = 1 << 30

func checkMemlock(h *host) []finding {
	for line := range strings.Lines(h.read("proc/self/limits")) {
		rest, ok := strings.CutPrefix(line, "Max locked memory")
		if !ok {
			continue
		}
		f := strings.Fields(rest)
		if len(f) == 0 {
			break
		}
		n, err := strconv.ParseInt(f[0], 10, 64)
		if f[0] == "unlimited" || err == nil && n >= wantMemlock {
			return []finding{{Level: fine, Text: "locked memory: " + f[0]}}
		}
		l, who := note, "softroce does not care, RDMA devices do"
		if len(h.glob("sys/class/infiniband/*")) > 0 && !h.root {
			l, who = bad, "registering memory with an RDMA device will fail"
		}
		return []finding{{Level: l, Text: fmt.Sprintf("locked memory is limited to %s bytes: %s", f[0], who), Mend: "ulimit -l unlimited"}}
	}
	return []finding{{Level: note, Text: "the limit of locked memory cannot be read", Mend: mendProc}}
}

func checkMTU(h *host) (out []finding) {
	for _, dir := range h.glob("sys/class/net/*") {
		name := path.Base(dir)
		mtu, ok := h.number(dir + "/mtu")
		if !ok || name == "lo" || h.read(dir+"/operstate") == "down" {
			continue
		}
		// What fits beside the headers of IPv6, UDP, BTH, RETH and the ICRC.
		code := int64(4096)
		for code > 256 && code+40+8+12+16+4+4 > mtu {
			code /= 2
		}
		if code < 4096 {
			out = append(out, finding{Level: note, Text: fmt.Sprintf("%s has MTU %d: packets carry %d bytes; 4096 fit into 4200", name, mtu, code),
				Mend: "ip link set dev " + name + " mtu 4200"})
			continue
		}
		out = append(out, finding{Level: fine, Text: fmt.Sprintf("%s has MTU %d", name, mtu)})
	}
	return out
}

// wantBuffer is what softroce asks of a socket's receive buffer.
const wantBuffer = 8 << 20

func checkBuffers(h *host) (out []finding) {
	for _, f := range []struct {
		file, what string
		want       int64
	}{{"rmem_max", "receive", wantBuffer}, {"wmem_max", "send", 1 << 20}} {
		n, ok := h.number("proc/sys/net/core/" + f.file)
		switch {
		case !ok:
			out = append(out, finding{Level: note, Text: "net.core." + f.file + " cannot be read: it is the initial network namespace's",
				Mend: fmt.Sprintf("nsenter --net --target 1 sysctl -w net.core.%s=%d", f.file, f.want)})
		case n >= f.want || h.root:
			out = append(out, finding{Level: fine, Text: fmt.Sprintf("%s buffers of up to %d bytes", f.what, max(n, f.want))})
		default:
			out = append(out, finding{Level: warn, Text: fmt.Sprintf("%s buffers are limited to %d bytes, %d are wanted: bursts are lost and sent again", f.what, n, f.want),
				Mend: fmt.Sprintf("sysctl -w net.core.%s=%d", f.file, f.want)})
		}
	}
	return out
}

func checkPort(h *host) (out []finding) {
	want := fmt.Sprintf(":%04X", h.roce)
	for _, table := range []string{"proc/net/udp", "proc/net/udp6"} {
		for line := range strings.Lines(h.read(table)) {
			f := strings.Fields(line)
			if len(f) < 10 || !strings.HasSuffix(f[1], want) {
				continue
			}
			out = append(out, h.portOwner(f[1], f[9]))
		}
	}
	if len(out) == 0 {
		out = []finding{{Level: fine, Text: fmt.Sprintf("UDP port %d is free", h.roce)}}
	}
	return out
}

// procAddr is an address as /proc/net has it: words of 32 bits in the machine's order.
func procAddr(digits string) (netip.Addr, bool) {
	b, err := hex.DecodeString(digits)
	if err != nil || len(b)%4 != 0 {
		return netip.Addr{}, false
	}
	for w := b; len(w) > 0; w = w[4:] {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	return netip.AddrFromSlice(b)
}

// portOwner is a finding about the socket that has addr ("0100007F:12B7").
func (h *host) portOwner(addr, inode string) finding {
	digits, _, _ := strings.Cut(addr, ":")
	l, only := note, "   # if it should not have that address"
	where := "on one address, which no other process can open"
	if a, ok := procAddr(digits); ok {
		where = fmt.Sprintf("on %v, which no other process can open", a.Unmap())
	}
	if strings.Trim(digits, "0") == "" {
		l, only, where = bad, "", "on every address: no softroce device can be opened"
	}
	for _, fd := range h.glob("proc/[0-9]*/fd/*") {
		if t, err := fs.ReadLink(h.FS, fd); err == nil && t == "socket:["+inode+"]" {
			pid := strings.Split(fd, "/")[1]
			return finding{Level: l, Text: fmt.Sprintf("UDP port %d is taken by process %s (%s) %s", h.roce, pid, h.read("proc/"+pid+"/comm"), where),
				Mend: "kill " + pid + only}
		}
	}
	if len(h.glob("sys/module/rdma_rxe")) > 0 {
		return finding{Level: bad, Text: fmt.Sprintf("UDP port %d belongs to the kernel's soft RoCE (rdma_rxe)", h.roce), Mend: "modprobe -r rdma_rxe"}
	}
	return finding{Level: l, Text: fmt.Sprintf("UDP port %d is taken %s; the owner is another user's, or the kernel", h.roce, where),
		Mend: fmt.Sprintf("sudo fuser -k %d/udp", h.roce) + only}
}

func checkKernelRDS(h *host) (out []finding) {
	loaded := func(m string) bool { return len(h.glob("sys/module/"+m)) > 0 }
	switch {
	case loaded("rds_rdma"):
		out = append(out, finding{Level: warn, Text: "the kernel's own RDS over RDMA is loaded: it answers on the addresses of the kernel's RDMA devices", Mend: "modprobe -r rds_rdma"})
	case loaded("rds"):
		out = append(out, finding{Level: fine, Text: "the kernel's RDS is loaded, without RDMA: it does not disturb"})
	}
	for _, dir := range []string{"etc/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d", "run/modprobe.d"} {
		for _, file := range h.glob(dir + "/*.conf") {
			for line := range strings.Lines(h.read(file)) {
				f := strings.Fields(line)
				if len(f) < 2 || f[0] != "blacklist" && f[0] != "install" && f[0] != "alias" {
					continue
				}
				switch m := f[1]; {
				case m == "rds" || m == "rds_rdma" || m == "net-pf-21":
					out = append(out, finding{Level: note, Text: fmt.Sprintf("the kernel's RDS is switched off by /%s (%s): this one does not need it", file, strings.Join(f, " ")), Mend: mendModprobe(f, file)})
				case m == "rdma_ucm" || m == "ib_uverbs" || m == "ib_core":
					out = append(out, finding{Level: warn, Text: fmt.Sprintf("RDMA devices are switched off by /%s (%s)", file, strings.Join(f, " ")), Mend: mendModprobe(f, file) + " && modprobe " + m})
				}
			}
		}
	}
	if len(out) == 0 {
		out = []finding{{Level: fine, Text: "the kernel's RDS is not in the way"}}
	}
	return out
}

// mendModprobe makes a comment of the line of a file whose first words are f.
func mendModprobe(f []string, file string) string {
	return fmt.Sprintf(`sed -i 's/^[[:space:]]*%s[[:space:]]\+%s\b/# &/' /%s`, f[0], f[1], file)
}

func checkNamespace(h *host) []finding {
	mine, err1 := fs.ReadLink(h.FS, "proc/self/ns/net")
	init, err2 := fs.ReadLink(h.FS, "proc/1/ns/net")
	switch {
	case err1 != nil || err2 != nil:
		mend := "sudo rdsctl doctor"
		if h.root { // of a container, say
			mend = "nsenter --target 1 --all rdsctl doctor   # on the host"
		}
		return []finding{{Level: note, Text: "whether this is the initial network namespace cannot be told: /proc/1/ns/net is not for us", Mend: mend}}
	case mine != init && len(h.glob("sys/class/infiniband/*")) > 0:
		return []finding{{Level: warn, Text: "this is not the initial network namespace: RDMA devices may not be visible in it", Mend: "rdma system set netns shared"}}
	case mine != init:
		return []finding{{Level: fine, Text: "a network namespace of its own; softroce works there"}}
	}
	return []finding{{Level: fine, Text: "the initial network namespace"}}
}

func checkUserfaultfd(h *host) []finding {
	v, ok := h.number("proc/sys/vm/unprivileged_userfaultfd")
	if !ok {
		return []finding{{Level: warn, Text: "this kernel has no userfaultfd: no on-demand paging (rds.Arena)", Mend: "grep CONFIG_USERFAULTFD /boot/config-*   # boot one that has it"}}
	}
	if h.root || v == 1 {
		return []finding{{Level: fine, Text: "userfaultfd may be used: on-demand paging works"}}
	}
	if st, err := fs.Stat(h, "dev/userfaultfd"); err == nil && st.Mode().Perm()&0o006 == 0o006 {
		return []finding{{Level: fine, Text: "userfaultfd may be used through /dev/userfaultfd"}}
	}
	return []finding{{Level: warn, Text: "userfaultfd is for root only: no on-demand paging (rds.Arena)", Mend: "sysctl -w vm.unprivileged_userfaultfd=1"}}
}
