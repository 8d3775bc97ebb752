//go:build lab && linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The RDMA half of the AF_RDS program (rds-protocol spec 1.8, 3.9). Memory it registers is a Buffer, known by a number.

// Options and control messages of level SOL_RDS.
const (
	optGetMR   = 2
	optFreeMR  = 3
	optRecvErr = 5

	cmsgRDMAArgs   = 1
	cmsgRDMADest   = 2
	cmsgRDMAMap    = 3
	cmsgRDMAStatus = 4
	cmsgFetchAdd   = 7
)

// Flags of mappings and operations.
const (
	rdmaWrite      = 0x01 // clear: READ
	rdmaFence      = 0x02
	rdmaInvalidate = 0x04
	rdmaUseOnce    = 0x08
	rdmaNotify     = 0x20
	rdmaSilent     = 0x40
)

// RDMA_STATUS.
const (
	rdmaSuccess     = 0
	rdmaRemoteError = 1
	rdmaCancelled   = 2
	rdmaDropped     = 3
	rdmaOther       = 4
)

// Alloc makes a buffer of size bytes and returns its number.
func (k *KernelRDS) Alloc(size int, out *int) error {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.bufs = append(k.bufs, mem)
	*out = len(k.bufs) - 1
	return nil
}

// Span is a part of a buffer.
type Span struct{ Buf, Off, Len int }

func (k *KernelRDS) span(s Span) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.Buf >= len(k.bufs) || s.Off+s.Len > len(k.bufs[s.Buf]) {
		return nil, fmt.Errorf("no such memory: %+v", s)
	}
	return k.bufs[s.Buf][s.Off : s.Off+s.Len : s.Off+s.Len], nil
}

// PatternArgs name a part of a buffer and a pattern.
type PatternArgs struct {
	Span
	Seed uint32
}

// Fill writes a pattern.
func (k *KernelRDS) Fill(a PatternArgs, _ *struct{}) error {
	b, err := k.span(a.Span)
	if err == nil {
		pattern(b, a.Seed)
	}
	return err
}

// Check compares with a pattern.
func (k *KernelRDS) Check(a PatternArgs, _ *struct{}) error {
	b, err := k.span(a.Span)
	if err == nil {
		err = checkPattern(b, a.Seed)
	}
	return err
}

// MapArgs ask for a mapping: RDS_CMSG_RDMA_MAP, or RDS_GET_MR.
type MapArgs struct {
	Span
	Flags uint64
}

// RDMAArgs are an operation: RDS_CMSG_RDMA_ARGS.
type RDMAArgs struct {
	Cookie       uint64
	RemoteOff    uint64 // from the region's first byte
	RemoteBytes  uint64 // 0: what is local
	Local        []Span
	Flags, Token uint64
}

// AtomicArgs are a FETCH_AND_ADD: RDS_CMSG_ATOMIC_FADD.
type AtomicArgs struct {
	Cookie, RemoteOff uint64
	Local             Span
	Add               uint64
	Flags, Token      uint64
}

// SendRDMAArgs are a datagram of the pattern of Seed, with what it carries.
type SendRDMAArgs struct {
	ID     int
	To     netip.AddrPort
	Seed   uint32
	Size   int
	Map    *MapArgs
	Dest   uint64 // RDS_CMSG_RDMA_DEST, 0: none
	RDMA   *RDMAArgs
	Atomic *AtomicArgs
}

// SentRDMA is what became of it.
type SentRDMA struct {
	Errno   unix.Errno
	Cookie  uint64 // of the mapping
	Refused int    // times it was tried in vain before
}

// where is the address of b's memory as the kernel wants it: mapped memory, which does not move.
func where(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

func appendCmsg(oob []byte, typ int, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = solRDS, int32(typ)
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return append(oob, b...)
}

// SendRDMA sends a datagram with control messages. It waits for a connection, which mappings need.
func (k *KernelRDS) SendRDMA(a SendRDMAArgs, out *SentRDMA) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	ne := binary.NativeEndian
	var oob []byte
	var pin runtime.Pinner // the kernel follows pointers in the control messages
	defer pin.Unpin()
	cookie := new(uint64)
	pin.Pin(cookie)
	if m := a.Map; m != nil {
		b, err := k.span(m.Span)
		if err != nil {
			return err
		}
		d := ne.AppendUint64(nil, where(b))
		d = ne.AppendUint64(d, uint64(len(b)))
		d = ne.AppendUint64(d, uint64(uintptr(unsafe.Pointer(cookie))))
		oob = appendCmsg(oob, cmsgRDMAMap, ne.AppendUint64(d, m.Flags))
	}
	if a.Dest != 0 {
		oob = appendCmsg(oob, cmsgRDMADest, ne.AppendUint64(nil, a.Dest))
	}
	if r := a.RDMA; r != nil {
		vec := make([]uint64, 0, 2*len(r.Local))
		total := uint64(0)
		for _, s := range r.Local {
			b, err := k.span(s)
			if err != nil {
				return err
			}
			vec = append(vec, where(b), uint64(len(b)))
			total += uint64(len(b))
		}
		pin.Pin(&vec[0])
		if r.RemoteBytes != 0 {
			total = r.RemoteBytes
		}
		d := ne.AppendUint64(nil, r.Cookie)
		d = ne.AppendUint64(d, r.RemoteOff)
		d = ne.AppendUint64(d, total)
		d = ne.AppendUint64(d, uint64(uintptr(unsafe.Pointer(&vec[0]))))
		d = ne.AppendUint64(d, uint64(len(r.Local)))
		d = ne.AppendUint64(d, r.Flags)
		oob = appendCmsg(oob, cmsgRDMAArgs, ne.AppendUint64(d, r.Token))
	}
	if t := a.Atomic; t != nil {
		b, err := k.span(t.Local)
		if err != nil {
			return err
		}
		d := make([]byte, 72)
		ne.PutUint64(d, t.Cookie)
		ne.PutUint64(d[8:], where(b))
		ne.PutUint64(d[16:], t.RemoteOff)
		ne.PutUint64(d[24:], t.Add)
		ne.PutUint64(d[56:], t.Flags)
		ne.PutUint64(d[64:], t.Token)
		oob = appendCmsg(oob, cmsgFetchAdd, d)
	}
	buf := make([]byte, a.Size)
	pattern(buf, a.Seed)
	for end := time.Now().Add(stepLimit); ; time.Sleep(time.Millisecond) {
		err := unix.Sendmsg(fd, buf, oob, sockaddr(a.To), 0)
		// Not connected yet; or the QP is there, and not yet in a state in which rxe lets it register.
		if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINVAL) && a.Map != nil) && time.Now().Before(end) {
			out.Refused++
			continue
		}
		out.Cookie = *cookie
		if err != nil {
			return asErrno(err, &out.Errno)
		}
		return nil
	}
}

// GetMR is RDS_GET_MR.
func (k *KernelRDS) GetMR(a struct {
	ID int
	MapArgs
}, out *SentRDMA) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	b, err := k.span(a.Span)
	if err != nil {
		return err
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	cookie := new(uint64)
	pin.Pin(cookie)
	ne := binary.NativeEndian
	d := ne.AppendUint64(nil, where(b))
	d = ne.AppendUint64(d, uint64(len(b)))
	d = ne.AppendUint64(d, uint64(uintptr(unsafe.Pointer(cookie))))
	err = unix.SetsockoptString(fd, solRDS, optGetMR, string(ne.AppendUint64(d, a.Flags)))
	out.Cookie = *cookie
	if err != nil {
		return asErrno(err, &out.Errno)
	}
	return nil
}

// FreeMR is RDS_FREE_MR.
func (k *KernelRDS) FreeMR(a struct {
	ID            int
	Cookie, Flags uint64
}, out *unix.Errno) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	d := binary.NativeEndian.AppendUint64(nil, a.Cookie)
	err = unix.SetsockoptString(fd, solRDS, optFreeMR, string(binary.NativeEndian.AppendUint64(d, a.Flags)))
	if err != nil {
		return asErrno(err, out)
	}
	return nil
}

// RDMAStatus is a completion notification.
type RDMAStatus struct {
	Token  uint64
	Status int32
}

// cmsgs takes what the kernel says beside a datagram, or instead of one.
func (k *KernelRDS) cmsgs(id int, oob []byte, d *Datagram) error {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	ne := binary.NativeEndian
	for _, m := range msgs {
		switch {
		case m.Header.Level != solRDS:
		case m.Header.Type == cmsgRDMADest:
			d.Cookie = ne.Uint64(m.Data)
		case m.Header.Type == cmsgRDMAStatus:
			k.mu.Lock()
			k.statuses[id] = append(k.statuses[id], RDMAStatus{ne.Uint64(m.Data), int32(ne.Uint32(m.Data[8:]))})
			k.mu.Unlock()
		}
	}
	return nil
}

// Statuses takes the notifications of a socket: Count of them, fewer if the limit passes. Datagrams stay in the queue.
func (k *KernelRDS) Statuses(a RecvArgs, out *[]RDMAStatus) error {
	fd, err := k.fd(a.ID)
	if err != nil {
		return err
	}
	oob := make([]byte, 4096)
	for end := time.Now().Add(a.Limit); ; {
		_, n, _, sa, err := unix.Recvmsg(fd, nil, oob, unix.MSG_DONTWAIT|unix.MSG_PEEK)
		if err != nil && err != unix.EAGAIN {
			return os.NewSyscallError("recvmsg", err)
		}
		if err == nil {
			var d Datagram
			if sa == nil {
				err = k.cmsgs(a.ID, oob[:n], &d)
			}
			if err != nil {
				return err
			}
		}
		k.mu.Lock()
		if have := k.statuses[a.ID]; len(have) >= a.Count || time.Now().After(end) {
			*out, k.statuses[a.ID] = have, nil
			k.mu.Unlock()
			return nil
		}
		k.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}
