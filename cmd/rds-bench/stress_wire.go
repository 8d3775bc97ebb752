package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/openrds/openrds/rds"
)

// What rds-stress says to its peer (rds-protocol spec 7.2, 7.3).

const (
	stressVersion  = "2.0.7" // padded to 16 bytes
	stressFullLen  = 77
	stressShortLen = 59
	stressHdrLen   = 63
	stressUnset    = 1<<32 - 1 // of numbers nobody gave
)

// stressOptions are what the active side tells the passive one: struct options of rds-stress.
type stressOptions struct {
	Depth, ReqSize, AckSize, RDMASize uint32
	SendAddr, RecvAddr                netip.Addr // IPv4
	Port, Tasks                       uint16
	RunTime                           uint32 // seconds, 0 endless

	SummaryOnly, RTPrio, Tracing, Verify, ShowParams, ShowPerfdata, CongMonitor bool
	UseOnce, UseGetMR, UseFence, CacheMRs, KeyOMeter, SuppressWarnings, OneWay  bool
	RWMode                                                                      uint8 // 0 alternating, 1 read, 2 write

	Segments, Alignment, ConnectRetries uint32
	TOS                                 uint8
	Async                               bool
}

func defaultStressOptions() stressOptions {
	return stressOptions{Depth: 1, ReqSize: 1024, AckSize: stressHdrLen, Port: 4000, Tasks: 1, CongMonitor: true, UseFence: true, Segments: 1}
}

// validate reports every problem of options a user or a peer gave.
func (o *stressOptions) validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(o.ReqSize >= stressHdrLen && o.ReqSize <= rds.MaxMessageSize, "request size %d is not between %d and %d", o.ReqSize, stressHdrLen, rds.MaxMessageSize)
	check(o.AckSize >= stressHdrLen && o.AckSize <= rds.MaxMessageSize, "ack size %d is not between %d and %d", o.AckSize, stressHdrLen, rds.MaxMessageSize)
	check(o.Depth >= 1 && o.Depth <= 1<<15, "depth %d is not between 1 and %d", o.Depth, 1<<15)
	check(o.Tasks >= 1 && o.Tasks <= 1024, "%d tasks are not between 1 and 1024", o.Tasks)
	check(o.Port >= 1 && int(o.Port)+int(o.Tasks) <= 65535, "ports %d and up do not fit", o.Port)
	check(o.Segments >= 1 && o.Segments <= 512, "%d segments are not between 1 and 512", o.Segments)
	check(uint64(o.RDMASize)*uint64(o.Segments) <= rds.MaxRDMASize, "%d segments of %d bytes are more than %d", o.Segments, o.RDMASize, rds.MaxRDMASize)
	check(o.Alignment < 4096, "alignment %d", o.Alignment)
	check(o.RWMode <= 2, "RDMA mode %d is not between 0 and 2", o.RWMode)
	return errors.Join(errs...)
}

// encode writes the form of 2.0.7: the full one only if it must say something that the short one has no room for.
func (o *stressOptions) encode() []byte {
	var b []byte
	be := binary.BigEndian
	full := o.TOS != 0 || o.Async
	if full {
		b = append(b, stressVersion...)
		b = append(b, make([]byte, 16-len(stressVersion))...)
	}
	for _, v := range []uint32{o.Depth, o.ReqSize, o.AckSize, o.RDMASize} {
		b = be.AppendUint32(b, v)
	}
	for _, a := range []netip.Addr{o.SendAddr, o.RecvAddr} {
		v := a.As4()
		b = append(b, v[:]...)
	}
	b = be.AppendUint16(b, o.Port)
	b = be.AppendUint16(b, o.Tasks)
	b = be.AppendUint32(b, o.RunTime)
	for _, f := range o.flags() {
		b = append(b, boolByte(*f))
	}
	b = append(b, o.RWMode)
	for _, v := range []uint32{o.Segments, o.Alignment, o.ConnectRetries} {
		b = be.AppendUint32(b, v)
	}
	if full {
		b = append(b, o.TOS, boolByte(o.Async))
	}
	return b
}

func (o *stressOptions) flags() []*bool {
	return []*bool{&o.SummaryOnly, &o.RTPrio, &o.Tracing, &o.Verify, &o.ShowParams, &o.ShowPerfdata, &o.CongMonitor, &o.UseOnce, &o.UseGetMR, &o.UseFence,
		&o.CacheMRs, &o.KeyOMeter, &o.SuppressWarnings, &o.OneWay}
}

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// readStressOptions reads either form. Numbers that were not given get their defaults.
func readStressOptions(r io.Reader) (o stressOptions, err error) {
	var buf [stressFullLen]byte
	if _, err := io.ReadFull(r, buf[:16]); err != nil {
		return o, err
	}
	rest, full := buf[:stressShortLen], false
	if string(bytes.TrimRight(buf[:16], "\x00")) == stressVersion {
		full = true
		if _, err := io.ReadFull(r, buf[:stressFullLen-16]); err != nil {
			return o, err
		}
		rest = buf[:stressFullLen-16]
	} else if _, err := io.ReadFull(r, buf[16:stressShortLen]); err != nil {
		return o, err
	}
	o.decode(rest, full)
	return o, nil
}

func (o *stressOptions) decode(b []byte, full bool) {
	be := binary.BigEndian
	u32 := func(def uint32) uint32 {
		v := be.Uint32(b)
		b = b[4:]
		if v == stressUnset {
			return def
		}
		return v
	}
	u16 := func(def uint16) uint16 {
		v := be.Uint16(b)
		b = b[2:]
		if v == 1<<16-1 {
			return def
		}
		return v
	}
	o.Depth, o.ReqSize, o.AckSize, o.RDMASize = u32(1), u32(1024), u32(stressHdrLen), u32(0)
	o.SendAddr, o.RecvAddr = netip.AddrFrom4([4]byte(b[:4])), netip.AddrFrom4([4]byte(b[4:8]))
	b = b[8:]
	o.Port, o.Tasks, o.RunTime = u16(4000), u16(1), u32(0)
	for _, f := range o.flags() {
		*f = b[0] != 0 && b[0] != 0xff
		b = b[1:]
	}
	if o.RWMode = b[0]; o.RWMode == 0xff {
		o.RWMode = 0
	}
	b = b[1:]
	o.Segments, o.Alignment, o.ConnectRetries = u32(1), u32(0), u32(0)
	if full {
		o.TOS, o.Async = b[0], b[1] != 0
	}
}

// Operations of a stressHeader.
const (
	stressReq = 1
	stressAck = 2

	stressRDMARead  = 1 // as the replier executes it
	stressRDMAWrite = 2
)

// stressHeader begins every datagram.
type stressHeader struct {
	Seq         uint32
	From, To    netip.AddrPort // IPv4
	Index       uint16         // slot, modulo depth
	Op, RDMAOp  uint8
	RDMAAddr    uint64 // the requester's buffer: comes back as it was
	Pattern     uint64
	RDMAKey     uint64 // cookie; 0: it is in the message's extension header
	RDMASize    uint32 // of a segment
	RDMASegment uint32
	Retry       uint8
}

func (h *stressHeader) put(b []byte) {
	be := binary.BigEndian
	clear(b[:stressHdrLen])
	be.PutUint32(b, h.Seq)
	from, to := h.From.Addr().As4(), h.To.Addr().As4()
	copy(b[4:], from[:])
	copy(b[8:], to[:])
	be.PutUint16(b[12:], h.From.Port())
	be.PutUint16(b[14:], h.To.Port())
	be.PutUint16(b[16:], h.Index)
	b[18], b[19] = h.Op, h.RDMAOp
	be.PutUint64(b[20:], h.RDMAAddr)
	be.PutUint64(b[36:], h.Pattern)
	be.PutUint64(b[44:], h.RDMAKey)
	be.PutUint32(b[52:], h.RDMASize)
	be.PutUint32(b[56:], h.RDMASegment)
	b[60] = h.Retry
}

func parseStressHeader(b []byte) (h stressHeader, err error) {
	if len(b) < stressHdrLen {
		return h, fmt.Errorf("a datagram of %d bytes", len(b))
	}
	be := binary.BigEndian
	return stressHeader{
		Seq:  be.Uint32(b),
		From: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), be.Uint16(b[12:])), To: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[8:12])), be.Uint16(b[14:])),
		Index: be.Uint16(b[16:]), Op: b[18], RDMAOp: b[19],
		RDMAAddr: be.Uint64(b[20:]), Pattern: be.Uint64(b[36:]), RDMAKey: be.Uint64(b[44:]),
		RDMASize: be.Uint32(b[52:]), RDMASegment: be.Uint32(b[56:]), Retry: b[60],
	}, nil
}

// stressPattern is the payload that -v sends and expects behind the header.
func stressPattern(n int) []byte {
	b := make([]byte, n)
	k := uint32(11)
	for i := range b {
		b[i] = byte(k)
		k = 41*(k+3) + uint32(i)>>8
	}
	return b
}

// fillRDMA and checkRDMA are of buffers that operations move: the same 64-bit number all over.
func fillRDMA(b []byte, pattern uint64) {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.NativeEndian.PutUint64(b[i:], pattern)
	}
}

func checkRDMA(b []byte, pattern uint64) error {
	for i := 0; i+8 <= len(b); i += 8 {
		if got := binary.NativeEndian.Uint64(b[i:]); got != pattern {
			return fmt.Errorf("RDMA buffer: %#x at %d of %d bytes, not %#x", got, i, len(b), pattern)
		}
	}
	return nil
}
