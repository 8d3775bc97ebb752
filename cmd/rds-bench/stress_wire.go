package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"

	"github.com/openrds/openrds/rds"
)

// What rds-stress says to its peer (rds-protocol spec 7.2, 7.3), and what it says over IPv6, which the specification does not have.

const (
	stressVersion    = "2.0.7" // whose two forms of options without IPv6 are the specification's
	stressVersionLen = 16
	stressShortLen   = 59                                    // options without a version
	stressFullLen    = stressVersionLen + stressShortLen + 2 // with tos and async behind them
	stressFullLen6   = stressFullLen + 2*16 + 4              // and with IPv6 addresses and a scope
	stressHdrLen     = 63                                    // of a datagram
	stressHdrLen6    = stressHdrLen + 1 + 2*16               // over IPv6: a byte of nothing and the two addresses behind it
	stressUnset      = 1<<32 - 1                             // of numbers nobody gave
)

// stressOptions are what the active side tells the passive one: struct options of rds-stress.
type stressOptions struct {
	Depth, ReqSize, AckSize, RDMASize uint32
	SendAddr, RecvAddr                netip.Addr // of one family, IPv4 never mapped
	Port, Tasks                       uint16
	RunTime                           uint32 // seconds, 0 endless

	SummaryOnly, RTPrio, Tracing, Verify, ShowParams, ShowPerfdata, CongMonitor bool
	UseOnce, UseGetMR, UseFence, CacheMRs, KeyOMeter, SuppressWarnings, OneWay  bool
	RWMode                                                                      uint8 // 0 alternating, 1 read, 2 write

	Segments, Alignment, ConnectRetries uint32
	TOS                                 uint8
	Async                               bool
}

// defaultStressOptions has no AckSize yet: it depends on the addresses (headerLen).
func defaultStressOptions() stressOptions {
	return stressOptions{Depth: 1, ReqSize: 1024, Port: 4000, Tasks: 1, CongMonitor: true, UseFence: true, Segments: 1}
}

func (o *stressOptions) six() bool { return o.SendAddr.Is6() }

// headerLen is the length of a datagram's header: the least of a request and of an ack.
func (o *stressOptions) headerLen() int {
	if o.six() {
		return stressHdrLen6
	}
	return stressHdrLen
}

// validate reports every problem of options a user or a peer gave.
func (o *stressOptions) validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	header := uint32(o.headerLen())
	check(o.ReqSize >= header && o.ReqSize <= rds.MaxMessageSize, "request size %d is not between %d and %d", o.ReqSize, header, rds.MaxMessageSize)
	check(o.AckSize >= header && o.AckSize <= rds.MaxMessageSize, "ack size %d is not between %d and %d", o.AckSize, header, rds.MaxMessageSize)
	check(o.Depth >= 1 && o.Depth <= 1<<15, "depth %d is not between 1 and %d", o.Depth, 1<<15)
	check(o.Tasks >= 1 && o.Tasks <= 1024, "%d tasks are not between 1 and 1024", o.Tasks)
	check(o.Port >= 1 && int(o.Port)+int(o.Tasks) <= 65535, "ports %d and up do not fit", o.Port)
	check(o.Segments >= 1 && o.Segments <= 512, "%d segments are not between 1 and 512", o.Segments)
	check(uint64(o.RDMASize)*uint64(o.Segments) <= rds.MaxRDMASize, "%d segments of %d bytes are more than %d", o.Segments, o.RDMASize, rds.MaxRDMASize)
	check(o.Alignment < 4096, "alignment %d", o.Alignment)
	check(o.RWMode <= 2, "RDMA mode %d is not between 0 and 2", o.RWMode)
	check(!o.CacheMRs || !o.UseOnce, "regions cannot be both kept and used once")
	check(!o.SendAddr.Is4In6() && !o.RecvAddr.Is4In6(), "IPv4 addresses as IPv6 addresses: %v, %v", o.SendAddr, o.RecvAddr)
	for _, a := range []netip.Addr{o.SendAddr, o.RecvAddr} {
		check(!a.Is6() || !a.IsLinkLocalUnicast() || a.Zone() != "", "%v needs a zone, as in %v%%eth0", a, a)
	}
	if o.SendAddr.IsValid() && o.RecvAddr.IsValid() {
		check(o.SendAddr.Is4() == o.RecvAddr.Is4(), "the peer's address %v and the local one %v are of different families", o.SendAddr, o.RecvAddr)
	}
	return errors.Join(errs...)
}

// encode writes the shortest form that has room for what there is to say. The longer ones begin with version, and are not understood by
// an rds-stress of another version.
func (o *stressOptions) encode(version string) []byte {
	var b []byte
	be := binary.BigEndian
	full := o.six() || o.TOS != 0 || o.Async
	if full {
		b = append(make([]byte, 0, stressFullLen6), version...)
		b = b[:stressVersionLen]
	}
	for _, v := range []uint32{o.Depth, o.ReqSize, o.AckSize, o.RDMASize} {
		b = be.AppendUint32(b, v)
	}
	for _, a := range []netip.Addr{o.SendAddr, o.RecvAddr} {
		var v [4]byte
		if a.Is4() {
			v = a.As4()
		}
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
	if o.six() {
		for _, a := range []netip.Addr{o.SendAddr, o.RecvAddr} {
			v := a.As16()
			b = append(b, v[:]...)
		}
		b = be.AppendUint32(b, scopeOf(o.RecvAddr)) // of no use to the other host, which has its own
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

// scopeOf is the number of an address's zone, 0 if it has none.
func scopeOf(a netip.Addr) uint32 {
	if a.Zone() == "" {
		return 0
	}
	if ifi, err := net.InterfaceByName(a.Zone()); err == nil {
		return uint32(ifi.Index)
	}
	n, _ := strconv.ParseUint(a.Zone(), 10, 32) // else it is nobody's
	return uint32(n)
}

// isStressVersion reports whether b begins like options with a version in front of them, of whatever release. Those without one begin with the
// depth, and a depth of more than 800 million is nothing to confuse a digit with. Behind the NUL a peer may have left a mark ("json").
func isStressVersion(b []byte) bool {
	v, _, terminated := bytes.Cut(b, []byte{0})
	if !terminated {
		return false
	}
	return checkStressVersion(string(v)) == nil
}

func checkStressVersion(v string) error {
	ok := len(v) > 0 && len(v) < stressVersionLen && v[0] >= '0' && v[0] <= '9'
	for i := range len(v) {
		ok = ok && v[i] > ' ' && v[i] < 0x7f
	}
	if !ok {
		return fmt.Errorf("%q is no version of rds-stress", v)
	}
	return nil
}

// readStressOptions reads options in any of their forms from a control connection, over IPv6 if six. Numbers that were not given get their defaults;
// addresses have no zones.
func readStressOptions(r io.Reader, six bool) (o stressOptions, err error) {
	b := make([]byte, stressFullLen6)
	if _, err := io.ReadFull(r, b[:stressVersionLen]); err != nil {
		return o, err
	}
	full, n := isStressVersion(b[:stressVersionLen]), stressShortLen
	switch {
	case full && six:
		n = stressFullLen6
	case full:
		n = stressFullLen
	case six:
		return o, errors.New("no version in front of them, as there is over IPv6")
	}
	if _, err := io.ReadFull(r, b[stressVersionLen:n]); err != nil {
		return o, err
	}
	if b = b[:n]; full {
		b = b[stressVersionLen:]
	}
	o.decode(b)
	return o, nil
}

// decode reads options without their version: of stressShortLen bytes, or as many more as the full forms have.
func (o *stressOptions) decode(b []byte) {
	be := binary.BigEndian
	if len(b) > stressShortLen {
		o.TOS, o.Async = b[stressShortLen], b[stressShortLen+1] != 0
	}
	if v6 := b[min(len(b), stressShortLen+2):]; len(v6) > 0 {
		o.SendAddr, o.RecvAddr = netip.AddrFrom16([16]byte(v6[:16])), netip.AddrFrom16([16]byte(v6[16:32]))
	} else {
		o.SendAddr, o.RecvAddr = netip.AddrFrom4([4]byte(b[16:20])), netip.AddrFrom4([4]byte(b[20:24]))
	}
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
	o.Depth, o.ReqSize, o.AckSize, o.RDMASize = u32(1), u32(1024), u32(uint32(o.headerLen())), u32(0)
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
	From, To    netip.AddrPort // of one family, without zones
	Index       uint16         // slot, modulo depth
	Op, RDMAOp  uint8
	RDMAAddr    uint64 // the requester's buffer: comes back as it was
	Pattern     uint64
	RDMAKey     uint64 // cookie; 0: none, or it is in the message's extension header
	RDMASize    uint32 // of a segment
	RDMASegment uint32
	Retry       uint8 // sent before, as far as an asynchronous sender knows
}

// put writes h to the first stressHdrLen bytes of b, or stressHdrLen6 between IPv6 addresses.
func (h *stressHeader) put(b []byte) {
	be := binary.BigEndian
	from, to := h.From.Addr(), h.To.Addr()
	if from.Is6() {
		clear(b[:stressHdrLen6])
		from, to := from.As16(), to.As16()
		copy(b[stressHdrLen+1:], from[:])
		copy(b[stressHdrLen+17:], to[:])
	} else {
		clear(b[:stressHdrLen])
		from, to := from.As4(), to.As4()
		copy(b[4:], from[:])
		copy(b[8:], to[:])
	}
	be.PutUint32(b, h.Seq)
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

// parseStressHeader reads the header of a datagram between IPv6 addresses, if six, or IPv4 ones.
func parseStressHeader(b []byte, six bool) (h stressHeader, err error) {
	if len(b) < stressHdrLen || six && len(b) < stressHdrLen6 {
		return h, fmt.Errorf("a datagram of %d bytes", len(b))
	}
	be := binary.BigEndian
	from, to := netip.AddrFrom4([4]byte(b[4:8])), netip.AddrFrom4([4]byte(b[8:12]))
	if six {
		if zero := netip.IPv4Unspecified(); from != zero || to != zero {
			return h, fmt.Errorf("a datagram with the addresses %v and %v over IPv6", from, to)
		}
		from, to = netip.AddrFrom16([16]byte(b[stressHdrLen+1:])), netip.AddrFrom16([16]byte(b[stressHdrLen+17:]))
	}
	return stressHeader{
		Seq:  be.Uint32(b),
		From: netip.AddrPortFrom(from, be.Uint16(b[12:])), To: netip.AddrPortFrom(to, be.Uint16(b[14:])),
		Index: be.Uint16(b[16:]), Op: b[18], RDMAOp: b[19],
		RDMAAddr: be.Uint64(b[20:]), Pattern: be.Uint64(b[36:]), RDMAKey: be.Uint64(b[44:]),
		RDMASize: be.Uint32(b[52:]), RDMASegment: be.Uint32(b[56:]), Retry: b[60],
	}, nil
}

// bare is ap without a zone, which headers have no room for.
func bare(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr().WithZone(""), ap.Port())
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

// fillRDMA and checkRDMA are of buffers that operations move: the same 64-bit number all over, but for what is left behind the last whole one.
func fillRDMA(b []byte, pattern uint64) {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.NativeEndian.PutUint64(b[i:], pattern)
	}
}

// checkRDMA checks a buffer of which the peer has filled the first segment, size bytes, or all, as ours do: rds-stress leaves the other segments
// as they are. They count as filled if they begin or end so; what an exchange fills them with was never there before.
func checkRDMA(b []byte, size int, pattern uint64) error {
	ne := binary.NativeEndian
	if last := len(b) / 8 * 8; size > last-8 || ne.Uint64(b[(size+7)/8*8:]) != pattern && ne.Uint64(b[last-8:]) != pattern {
		b = b[:size]
	}
	for i := 0; i+8 <= len(b); i += 8 {
		if got := ne.Uint64(b[i:]); got != pattern {
			return fmt.Errorf("RDMA buffer: %#x at %d of %d bytes, not %#x", got, i, len(b), pattern)
		}
	}
	return nil
}
