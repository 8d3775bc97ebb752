package cm

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"time"
)

// MADLen is the length of every MAD.
const MADLen = 256

// hdrLen is where the message begins.
const hdrLen = 24

// Values of the common header (rocev2 spec 7.1).
const (
	baseVersion  = 1
	classCM      = 0x07
	classVersion = 2
	methodSend   = 0x03
)

// Reasons to drop a MAD. None is answered.
var (
	ErrLength  = errors.New("MAD not of 256 bytes")
	ErrNotCM   = errors.New("MAD not of the communication manager")
	ErrAttr    = errors.New("MAD of another attribute")
	ErrVersion = errors.New("MAD or class version not supported")
)

// Attr is an attribute ID: the kind of a message (rocev2 spec 7.2).
type Attr uint16

// Messages.
const (
	AttrREQ     Attr = 0x0010
	AttrMRA     Attr = 0x0011
	AttrREJ     Attr = 0x0012
	AttrREP     Attr = 0x0013
	AttrRTU     Attr = 0x0014
	AttrDREQ    Attr = 0x0015
	AttrDREP    Attr = 0x0016
	AttrSIDRREQ Attr = 0x0017
	AttrSIDRREP Attr = 0x0018
	AttrLAP     Attr = 0x0019
	AttrAPR     Attr = 0x001A
)

func (a Attr) String() string {
	names := [...]string{"REQ", "MRA", "REJ", "REP", "RTU", "DREQ", "DREP", "SIDR_REQ", "SIDR_REP", "LAP", "APR"}
	if i := int(a) - int(AttrREQ); i >= 0 && i < len(names) {
		return names[i]
	}
	return "attribute 0x" + strconv.FormatUint(uint64(a), 16)
}

// Header is what the common header says beyond its constants.
type Header struct {
	Attr     Attr
	TID      uint64 // transaction ID; repeated, never matched on (rocev2 spec 7.4)
	Status   uint16 // 0
	Modifier uint32 // attribute modifier: ECE options, 0 for none
}

// PeekHeader checks that mad is a MAD of the communication manager and reads its common header.
func PeekHeader(mad []byte) (Header, error) {
	if len(mad) != MADLen {
		return Header{}, ErrLength
	}
	if mad[0] != baseVersion {
		return Header{}, ErrVersion
	}
	if mad[1] != classCM || mad[3] != methodSend {
		return Header{}, ErrNotCM
	}
	if mad[2] != classVersion {
		return Header{}, ErrVersion
	}
	return Header{
		Attr:     Attr(binary.BigEndian.Uint16(mad[16:])),
		TID:      binary.BigEndian.Uint64(mad[8:]),
		Status:   binary.BigEndian.Uint16(mad[4:]),
		Modifier: binary.BigEndian.Uint32(mad[20:]),
	}, nil
}

// open checks a MAD for a Decode and returns its message.
func open(mad []byte, attr Attr) (h Header, c []byte, err error) {
	if h, err = PeekHeader(mad); err != nil {
		return h, nil, err
	}
	if h.Attr != attr {
		return h, nil, ErrAttr
	}
	return h, mad[hdrLen:MADLen], nil
}

// create writes the common header of an Encode, zeroes the message and returns it. mad must hold
// MADLen bytes.
func create(mad []byte, attr Attr, tid uint64, modifier uint32) []byte {
	mad = mad[:MADLen]
	clear(mad)
	mad[0], mad[1], mad[2], mad[3] = baseVersion, classCM, classVersion, methodSend
	binary.BigEndian.PutUint64(mad[8:], tid)
	binary.BigEndian.PutUint16(mad[16:], uint16(attr))
	binary.BigEndian.PutUint32(mad[20:], modifier)
	return mad[hdrLen:]
}

func get16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
func get24(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }
func get32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func get64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

func put16(b []byte, v uint16) { binary.BigEndian.PutUint16(b, v) }
func put24(b []byte, v uint32) { b[0], b[1], b[2] = byte(v>>16), byte(v>>8), byte(v) }
func put32(b []byte, v uint32) { binary.BigEndian.PutUint32(b, v) }
func put64(b []byte, v uint64) { binary.BigEndian.PutUint64(b, v) }

func bit(b byte, n int) bool { return b>>n&1 != 0 }

func putBit(n int, v bool) byte {
	if v {
		return 1 << n
	}
	return 0
}

// GID is a global identifier: an IPv6 address, or an IPv4 address in its mapped form (rocev2 spec
// 1.9).
type GID [16]byte

// GIDOf is the GID of an address; of the zero Addr, the zero GID.
func GIDOf(a netip.Addr) GID { return a.As16() }

// Addr is the address of a GID: IPv4 if it is mapped.
func (g GID) Addr() netip.Addr { return netip.AddrFrom16(g).Unmap() }

// Port spaces of RDMA-CM (rocev2 spec 7.3).
const (
	PortSpaceIPoIB = 0x0002
	PortSpaceTCP   = 0x0106
	PortSpaceUDP   = 0x0111
	PortSpaceIB    = 0x013F
)

// ServiceID is the service ID of a port of a port space.
func ServiceID(space, port uint16) uint64 { return uint64(space)<<16 | uint64(port) }

// SplitServiceID undoes ServiceID; ok is false for a service ID that is not of RDMA-CM's form.
func SplitServiceID(id uint64) (space, port uint16, ok bool) {
	return uint16(id >> 16), uint16(id), id>>32 == 0
}

// Timeout is the time of a 5-bit CM timeout code: Linux' approximation 1 ms << (t-8) of 4.096 µs << t,
// at least 1 ms (rocev2 spec 7.8).
func Timeout(t uint8) time.Duration { return time.Millisecond << max(int(t&31)-8, 0) }

// AckTimeout is the local ACK timeout code for a path with packet lifetime code l to a peer with
// target ACK delay code d: the sum of 2^(l+1) and 2^d rounded to a power of two, at most 31
// (rocev2 spec 7.6).
func AckTimeout(d, l uint8) uint8 {
	hi, lo := max(int(l)+1, int(d)), min(int(l)+1, int(d))
	if lo >= hi-1 {
		hi++
	}
	return uint8(min(hi, 31))
}

// CMAHeader is the header that RDMA-CM puts in front of an application's private data in REQ and
// SIDR_REQ (rocev2 spec 7.3). It names the addresses and the port of the active side.
//
//	0 version 0 | 1 IP version in bits 7-4 | 2-3 source port | 4-19 source | 20-35 destination
//
// IPv4 addresses are in the last four bytes of their field, behind zeroes.
type CMAHeader struct {
	SrcPort  uint16
	Src, Dst netip.Addr
}

// CMAHeaderLen is the length of a CMAHeader.
const CMAHeaderLen = 36

// ErrCMA is a CMA header of another version, or of neither IPv4 nor IPv6: the REQ is to be rejected
// with RejConsumer (rocev2 spec 7.7).
var ErrCMA = errors.New("RDMA-CM header not understood")

// Decode reads the header from b[:CMAHeaderLen].
func (h *CMAHeader) Decode(b []byte) error {
	if len(b) < CMAHeaderLen || b[0] != 0 {
		return ErrCMA
	}
	h.SrcPort = get16(b[2:])
	switch b[1] >> 4 {
	case 4:
		h.Src = netip.AddrFrom4([4]byte(b[16:20]))
		h.Dst = netip.AddrFrom4([4]byte(b[32:36]))
	case 6:
		h.Src = netip.AddrFrom16([16]byte(b[4:20]))
		h.Dst = netip.AddrFrom16([16]byte(b[20:36]))
	default:
		return ErrCMA
	}
	return nil
}

// Encode writes the header to b[:CMAHeaderLen]: the IPv4 form if both addresses are IPv4.
func (h *CMAHeader) Encode(b []byte) {
	b = b[:CMAHeaderLen]
	clear(b)
	put16(b[2:], h.SrcPort)
	if s, d := h.Src.Unmap(), h.Dst.Unmap(); s.Is4() && d.Is4() {
		b[1] = 4 << 4
		src, dst := s.As4(), d.As4()
		copy(b[16:], src[:])
		copy(b[32:], dst[:])
		return
	}
	b[1] = 6 << 4
	src, dst := h.Src.As16(), h.Dst.As16()
	copy(b[4:], src[:])
	copy(b[20:], dst[:])
}
