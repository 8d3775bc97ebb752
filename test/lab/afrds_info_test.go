//go:build lab && linux

package lab

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The information half of the AF_RDS program: what rds-info asks for (rds-protocol spec 6.1).

// infoItems reads one of the RDS_INFO lists (rds-protocol spec 6.1).
func (k *KernelRDS) infoItems(num int) ([][]byte, error) {
	buf := make([]byte, 64<<10)
	for {
		length := uint32(len(buf))
		size, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(k.info), solRDS, uintptr(num), uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&length)), 0)
		if errno == unix.ENOSPC {
			buf = make([]byte, length+4096)
			continue
		}
		if errno != 0 {
			return nil, fmt.Errorf("RDS_INFO %d: %w", num, errno)
		}
		var items [][]byte
		for b := buf[:length]; size > 0 && len(b) >= int(size); b = b[size:] {
			items = append(items, b[:size])
		}
		return items, nil
	}
}

// Counters are the kernel's counters by name.
func (k *KernelRDS) Counters(_ struct{}, out *map[string]uint64) error {
	items, err := k.infoItems(infoCounters)
	if err != nil {
		return err
	}
	*out = make(map[string]uint64)
	for _, it := range items {
		name, _, _ := bytes.Cut(it[:32], []byte{0})
		(*out)[string(name)] = binary.NativeEndian.Uint64(it[32:])
	}
	return nil
}

// KernelConn is a connection as the kernel shows it.
type KernelConn struct {
	NextTX, NextRX uint64
	Local, Remote  netip.Addr
	TOS            uint8 // of an IPv4 connection; the other list does not have it
	Transport      string
	Flags          uint8
}

// Connection flags.
const (
	connSending    = 1
	connConnecting = 2
	connUp         = 4
)

// Conns lists the connections.
func (k *KernelRDS) Conns(_ struct{}, out *[]KernelConn) error {
	ne := binary.NativeEndian
	name := func(b []byte) string {
		s, _, _ := bytes.Cut(b[:16], []byte{0})
		return string(s)
	}
	items, err := k.infoItems(infoConns)
	if err != nil {
		return err
	}
	for _, it := range items {
		*out = append(*out, KernelConn{
			NextTX: ne.Uint64(it), NextRX: ne.Uint64(it[8:]),
			Local: netip.AddrFrom4([4]byte(it[16:20])), Remote: netip.AddrFrom4([4]byte(it[20:24])),
			Transport: name(it[24:]), Flags: it[40], TOS: it[41],
		})
	}
	if items, err = k.infoItems(infoConns6); err != nil {
		return err
	}
	for _, it := range items {
		local := netip.AddrFrom16([16]byte(it[16:32]))
		if local.Is4In6() {
			continue
		}
		*out = append(*out, KernelConn{
			NextTX: ne.Uint64(it), NextRX: ne.Uint64(it[8:]),
			Local: local, Remote: netip.AddrFrom16([16]byte(it[32:48])),
			Transport: name(it[48:]), Flags: it[64],
		})
	}
	return nil
}

// KernelMessage is a message in a queue.
type KernelMessage struct {
	Seq           uint64
	Len           int
	Local, Remote netip.AddrPort
	TOS           uint8
}

// Messages lists a queue: infoSendQueue6, infoRetrans6 or infoRecvQueue6.
func (k *KernelRDS) Messages(list int, out *[]KernelMessage) error {
	items, err := k.infoItems(list)
	if err != nil {
		return err
	}
	addr := func(b, port []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[:16])).Unmap(), binary.BigEndian.Uint16(port))
	}
	for _, it := range items {
		*out = append(*out, KernelMessage{
			Seq: binary.NativeEndian.Uint64(it), Len: int(binary.NativeEndian.Uint32(it[8:])),
			Local: addr(it[12:], it[44:]), Remote: addr(it[28:], it[46:]), TOS: it[49],
		})
	}
	return nil
}

// KernelSocket is a socket as the kernel shows it.
type KernelSocket struct {
	SndBuf, RcvBuf   int
	Bound, Connected netip.AddrPort
}

// Sockets lists the sockets.
func (k *KernelRDS) Sockets(_ struct{}, out *[]KernelSocket) error {
	items, err := k.infoItems(infoSockets6)
	if err != nil {
		return err
	}
	addr := func(b, port []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[:16])).Unmap(), binary.BigEndian.Uint16(port))
	}
	for _, it := range items {
		*out = append(*out, KernelSocket{
			SndBuf: int(binary.NativeEndian.Uint32(it)), RcvBuf: int(binary.NativeEndian.Uint32(it[40:])),
			Bound: addr(it[4:], it[36:]), Connected: addr(it[20:], it[38:]),
		})
	}
	return nil
}

func (k *kernelEnd) counters() (m map[string]uint64) {
	k.t.Helper()
	k.must("Counters", struct{}{}, &m)
	return m
}

func (k *kernelEnd) conns() (c []KernelConn) {
	k.t.Helper()
	k.must("Conns", struct{}{}, &c)
	return c
}

// conn is the connection to remote with a type of service.
func (k *kernelEnd) conn(remote netip.Addr, tos uint8) (c KernelConn, ok bool) {
	k.t.Helper()
	all := k.conns()
	i := slices.IndexFunc(all, func(c KernelConn) bool { return c.Remote == remote && (c.TOS == tos || !remote.Is4()) })
	if i < 0 {
		return c, false
	}
	return all[i], true
}

// messages lists the messages on lists to or from remote, by sequence.
func (k *kernelEnd) messages(remote netip.Addr, lists ...int) (ms []KernelMessage) {
	k.t.Helper()
	for _, list := range lists {
		var l []KernelMessage
		k.must("Messages", list, &l)
		ms = append(ms, slices.DeleteFunc(l, func(m KernelMessage) bool { return m.Remote.Addr() != remote })...)
	}
	slices.SortStableFunc(ms, func(a, b KernelMessage) int { return cmp.Compare(a.Seq, b.Seq) })
	return ms
}

// queued counts the messages to remote on the kernel's send and retransmit queues.
func (k *kernelEnd) queued(remote netip.Addr) int {
	k.t.Helper()
	return len(k.messages(remote, infoSendQueue6, infoRetrans6))
}
