package roce

import (
	"encoding/binary"
	"time"

	"github.com/openrds/openrds/internal/psn"
)

// Header lengths in bytes.
const (
	BTHLen          = 12
	RETHLen         = 16
	AtomicETHLen    = 28
	AETHLen         = 4
	AtomicAckETHLen = 8
	ImmLen          = 4
	IETHLen         = 4
	DETHLen         = 8
	ICRCLen         = 4

	// MaxHdrLen is the longest BTH with extension headers (an atomic request).
	MaxHdrLen = BTHLen + AtomicETHLen
	// MinLen is the shortest packet: BTH and ICRC.
	MinLen = BTHLen + ICRCLen
)

// Numbers of rocev2 spec 1.8 and 1.10.
const (
	Port        = 4791       // UDP destination port, both directions
	DefaultPKey = 0xFFFF     // the only partition key
	GSIQKey     = 0x80010000 // Q_Key of QP 1
	QPNMask     = 0xFFFFFF
)

// BTH is a base transport header, BTHLen bytes.
type BTH []byte

func (h BTH) Opcode() Opcode { return Opcode(h[0]) }
func (h BTH) SE() bool       { return h[1]&0x80 != 0 } // solicited event
func (h BTH) M() bool        { return h[1]&0x40 != 0 } // MigReq
func (h BTH) Pad() int       { return int(h[1] >> 4 & 3) }
func (h BTH) TVer() uint8    { return h[1] & 0x0F }
func (h BTH) PKey() uint16   { return binary.BigEndian.Uint16(h[2:]) }
func (h BTH) BECN() bool     { return h[4]&0x40 != 0 }
func (h BTH) DestQP() uint32 { return binary.BigEndian.Uint32(h[4:]) & QPNMask }
func (h BTH) AckReq() bool   { return h[8]&0x80 != 0 }
func (h BTH) PSN() psn.PSN   { return psn.New(binary.BigEndian.Uint32(h[8:])) }

// PKeyOK reports whether a receiver in the default partition accepts the P_Key (rocev2 spec 1.10):
// ours has the membership bit, so that of the sender is free.
func (h BTH) PKeyOK() bool { return h.PKey()&0x7FFF == DefaultPKey&0x7FFF }

// PutBTH writes a BTH to b[:BTHLen], with MigReq set, which is the state "migrated" that every
// implementation accepts, and the default P_Key. pad is 0..3, destQP 24 bits.
func PutBTH(b []byte, op Opcode, se bool, pad int, ackReq bool, destQP uint32, p psn.PSN) {
	_ = b[BTHLen-1]
	flags := uint32(0x40 | pad&3<<4)
	if se {
		flags |= 0x80
	}
	w := uint32(p) & (psn.Space - 1)
	if ackReq {
		w |= 1 << 31
	}
	binary.BigEndian.PutUint32(b, uint32(op)<<24|flags<<16|DefaultPKey)
	binary.BigEndian.PutUint32(b[4:], destQP&QPNMask)
	binary.BigEndian.PutUint32(b[8:], w)
}

// PadLen is the pad that follows n bytes of payload: 0..3.
func PadLen(n int) int { return -n & 3 }

// RETH is an RDMA extended transport header, RETHLen bytes.
type RETH []byte

func (h RETH) VA() uint64   { return binary.BigEndian.Uint64(h) }
func (h RETH) RKey() uint32 { return binary.BigEndian.Uint32(h[8:]) }
func (h RETH) Len() uint32  { return binary.BigEndian.Uint32(h[12:]) } // bytes of the whole message

// PutRETH writes a RETH to b[:RETHLen]; length is in bytes.
func PutRETH(b []byte, va uint64, rkey, length uint32) {
	_ = b[RETHLen-1]
	binary.BigEndian.PutUint64(b, va)
	binary.BigEndian.PutUint64(b[8:], uint64(rkey)<<32|uint64(length))
}

// AtomicETH is an atomic extended transport header, AtomicETHLen bytes.
type AtomicETH []byte

func (h AtomicETH) VA() uint64      { return binary.BigEndian.Uint64(h) }
func (h AtomicETH) RKey() uint32    { return binary.BigEndian.Uint32(h[8:]) }
func (h AtomicETH) SwapAdd() uint64 { return binary.BigEndian.Uint64(h[12:]) } // swap of CmpSwap, addend of FetchAdd
func (h AtomicETH) Compare() uint64 { return binary.BigEndian.Uint64(h[20:]) }

// PutAtomicETH writes an AtomicETH to b[:AtomicETHLen]. compare is 0 for FetchAdd.
func PutAtomicETH(b []byte, va uint64, rkey uint32, swapAdd, compare uint64) {
	_ = b[AtomicETHLen-1]
	binary.BigEndian.PutUint64(b, va)
	binary.BigEndian.PutUint32(b[8:], rkey)
	binary.BigEndian.PutUint64(b[12:], swapAdd)
	binary.BigEndian.PutUint64(b[20:], compare)
}

// AETH is an acknowledgement extended transport header, AETHLen bytes.
type AETH []byte

func (h AETH) Syndrome() uint8 { return h[0] }
func (h AETH) MSN() uint32     { return binary.BigEndian.Uint32(h) & 0xFFFFFF }

// PutAETH writes an AETH to b[:AETHLen]; msn is 24 bits.
func PutAETH(b []byte, syndrome uint8, msn uint32) {
	binary.BigEndian.PutUint32(b, uint32(syndrome)<<24|msn&0xFFFFFF)
}

// AtomicAckETH carries the original value of an atomic, AtomicAckETHLen bytes.
type AtomicAckETH []byte

func (h AtomicAckETH) Orig() uint64 { return binary.BigEndian.Uint64(h) }

// PutAtomicAckETH writes an AtomicAckETH to b[:AtomicAckETHLen].
func PutAtomicAckETH(b []byte, orig uint64) { binary.BigEndian.PutUint64(b, orig) }

// PutImm writes an immediate to b[:ImmLen].
func PutImm(b []byte, imm uint32) { binary.BigEndian.PutUint32(b, imm) }

// PutIETH writes an IETH, the R_Key to invalidate, to b[:IETHLen].
func PutIETH(b []byte, rkey uint32) { binary.BigEndian.PutUint32(b, rkey) }

// DETH is a datagram extended transport header, DETHLen bytes.
type DETH []byte

func (h DETH) QKey() uint32  { return binary.BigEndian.Uint32(h) }
func (h DETH) SrcQP() uint32 { return binary.BigEndian.Uint32(h[4:]) & QPNMask }

// PutDETH writes a DETH to b[:DETHLen]; srcQP is 24 bits.
func PutDETH(b []byte, qkey, srcQP uint32) {
	_ = b[DETHLen-1]
	binary.BigEndian.PutUint32(b, qkey)
	binary.BigEndian.PutUint32(b[4:], srcQP&QPNMask)
}

// AETH syndromes (rocev2 spec 3.7). The low five bits of an ACK are a credit code, those of an RNR
// NAK the timer code.
const (
	SynACK       uint8 = 0x1F // credits: unlimited
	SynRNR       uint8 = 0x20
	SynNAKSeq    uint8 = 0x60 // PSN sequence error
	SynNAKInvReq uint8 = 0x61 // invalid request
	SynNAKAccess uint8 = 0x62 // remote access error
	SynNAKOp     uint8 = 0x63 // remote operational error
	SynNAKInvRD  uint8 = 0x64 // invalid RD request; not sent on RC, treated as 0x63
)

// Kinds of syndrome: its bits 7-5. Bit 7 is not part of any kind that exists.
const (
	KindACK uint8 = 0
	KindRNR uint8 = 1
	KindNAK uint8 = 3
)

// SynKind is bits 7-5 of a syndrome: KindACK, KindRNR, KindNAK or a reserved value.
func SynKind(syndrome uint8) uint8 { return syndrome >> 5 }

// SynValue is bits 4-0 of a syndrome: credit code, RNR timer code or NAK code.
func SynValue(syndrome uint8) uint8 { return syndrome & 0x1F }

// rnrTimer is the table of rocev2 spec 3.8, in units of 10 µs.
var rnrTimer = [32]uint32{
	65536, 1, 2, 3, 4, 6, 8, 12,
	16, 24, 32, 48, 64, 96, 128, 192,
	256, 384, 512, 768, 1024, 1536, 2048, 3072,
	4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
}

// RNRTimer is the time that the low five bits of code mean, in an RNR NAK and in the QP attribute
// min_rnr_timer: 10 µs to 491.52 ms, and 655.36 ms for code 0.
func RNRTimer(code uint8) time.Duration {
	return time.Duration(rnrTimer[code&31]) * 10 * time.Microsecond
}

// Path MTU codes run from 1 (256 bytes) to 5 (4096).
const (
	MinMTUCode = 1
	MaxMTUCode = 5
)

// MTUBytes is the payload of a full packet for a path MTU code, 0 for a code that does not exist.
func MTUBytes(code uint8) int {
	if code < MinMTUCode || code > MaxMTUCode {
		return 0
	}
	return 128 << code
}

// PathMTU is the largest path MTU code that an interface with an IP MTU of ifMTU bytes carries, 0
// when it is too small for any. It keeps 96 bytes for headers, as rdma_cm does (rocev2 spec 1.7), so
// both ends of a link choose alike: 1500 gives 1024 bytes, 9000 gives 4096.
func PathMTU(ifMTU int) uint8 {
	for code := uint8(MaxMTUCode); code >= MinMTUCode; code-- {
		if MTUBytes(code)+96 <= ifMTU {
			return code
		}
	}
	return 0
}
