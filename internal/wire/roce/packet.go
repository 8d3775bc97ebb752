package roce

import (
	"encoding/binary"
	"errors"
)

// Reasons why Parse refuses a packet. Each is to be dropped silently (rocev2 spec 8.4).
var (
	ErrShort     = errors.New("packet shorter than BTH and ICRC")
	ErrLength    = errors.New("packet length not a multiple of 4")
	ErrTruncated = errors.New("packet shorter than its headers and pad")
	ErrVersion   = errors.New("transport version not 0")
)

// Packet is a parsed packet: views of the buffer that was parsed, valid as long as that is.
type Packet struct {
	Op      Opcode
	Info    *Info
	BTH     BTH
	Ext     []byte // extension headers, Info.HdrLen-BTHLen bytes
	Payload []byte // without pad and ICRC
}

// Parse splits b, a UDP payload including its ICRC, into p. It checks the lengths of rocev2 spec 1.6
// and the transport version, not the ICRC (see Flow.Check), keys, queue pair or payload rules that
// depend on the path MTU (see PayloadOK).
//
// An opcode that is not in the table parses too, without extension headers and with Info.Valid
// false: a responder must NAK it. On error p is not meaningful.
func Parse(b []byte, p *Packet) error {
	if len(b) < MinLen {
		return ErrShort
	}
	if len(b)&3 != 0 {
		return ErrLength
	}
	if b[1]&0x0F != 0 {
		return ErrVersion
	}
	info := &opInfo[b[0]]
	hdr := info.HdrLen
	end := len(b) - ICRCLen - int(b[1]>>4&3)
	if end < hdr {
		return ErrTruncated
	}
	p.Op = Opcode(b[0])
	p.Info = info
	p.BTH = BTH(b[:BTHLen:BTHLen])
	p.Ext = b[BTHLen:hdr:hdr]
	p.Payload = b[hdr:end:end]
	return nil
}

// Each of the following is meaningful only when the opcode has that header (Info.Flags), and panics
// or gives another header's bytes otherwise.

func (p *Packet) RETH() RETH           { return RETH(p.Ext[:RETHLen]) }
func (p *Packet) AtomicETH() AtomicETH { return AtomicETH(p.Ext[:AtomicETHLen]) }
func (p *Packet) AETH() AETH           { return AETH(p.Ext[:AETHLen]) }
func (p *Packet) DETH() DETH           { return DETH(p.Ext[:DETHLen]) }

// AtomicAck is the original value of an Atomic Acknowledge.
func (p *Packet) AtomicAck() uint64 {
	return AtomicAckETH(p.Ext[AETHLen : AETHLen+AtomicAckETHLen]).Orig()
}

// Imm is the immediate, always the last extension header.
func (p *Packet) Imm() uint32 { return binary.BigEndian.Uint32(p.Ext[len(p.Ext)-ImmLen:]) }

// IETH is the R_Key to invalidate.
func (p *Packet) IETH() uint32 { return binary.BigEndian.Uint32(p.Ext[:IETHLen]) }

// PayloadOK reports whether the payload has a length that the opcode allows at a path MTU of pmtu
// bytes: none, exactly pmtu, 1..pmtu or 0..pmtu (rocev2 spec 1.5), and the pad that belongs
// to it (1.6).
func (p *Packet) PayloadOK(pmtu int) bool {
	n := len(p.Payload)
	if p.BTH.Pad() != PadLen(n) {
		return false
	}
	switch f := p.Info.Flags; {
	case f&FlagNoPayload != 0:
		return n == 0
	case f&FlagFullMTU != 0:
		return n == pmtu
	case f&FlagSomePayload != 0:
		return n >= 1 && n <= pmtu
	}
	return n <= pmtu
}
