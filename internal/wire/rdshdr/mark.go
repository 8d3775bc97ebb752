package rdshdr

import "encoding/binary"

// magic is "ORD" and the version of the mark; its first half begins the short mark.
const magic = 0x4F524401

// FlagDeltas of a Mark: the sender takes changes to its peer's congestion map (CongDelta) in place of whole maps.
const FlagDeltas uint16 = 1 << 0

// Lengths of the mark and the short mark.
const (
	MarkLen      = 24
	ShortMarkLen = 4
)

// Where the marks are in private data.
const (
	markOff4    = PrivLen4     // REQ and REP
	markOff6REP = PrivLen6     // REP
	markOff6REQ = PrivLen6 - 4 // REQ, short
)

// Mark is what two of us tell each other beyond what kernels do. The package comment has its layout.
type Mark struct {
	Incarnation uint64 // of the sender's Service; not 0
	MaxSend     uint32 // largest SEND the sender takes, in bytes
	Window      uint32 // bytes the sender lets the receiver have in flight
	Flags       uint16 // those that are not known here are ignored
	// Attempt counts the sender's REQs for this connection, modulo 1 << 16, from any start. In a REQ it is the number of that one,
	// otherwise of the latest: REQs up to it are settled by this handshake, even if the network brings them later.
	Attempt uint16
}

// Put writes the mark to b[:MarkLen]. As the only content of a SEND it is the control message of
// the active side of an IPv6 connection.
func (m *Mark) Put(b []byte) {
	_ = b[MarkLen-1]
	binary.BigEndian.PutUint32(b, magic)
	binary.BigEndian.PutUint64(b[4:], m.Incarnation)
	binary.BigEndian.PutUint32(b[12:], m.MaxSend)
	binary.BigEndian.PutUint32(b[16:], m.Window)
	binary.BigEndian.PutUint16(b[20:], m.Flags)
	binary.BigEndian.PutUint16(b[22:], m.Attempt)
}

// Parse reads a mark from the beginning of b and reports whether there was one; m is as before if not.
// Incarnation 0 is none.
func (m *Mark) Parse(b []byte) bool {
	if len(b) < MarkLen || !isMagic(b) || binary.BigEndian.Uint64(b[4:]) == 0 {
		return false
	}
	*m = Mark{
		Incarnation: binary.BigEndian.Uint64(b[4:]),
		MaxSend:     binary.BigEndian.Uint32(b[12:]),
		Window:      binary.BigEndian.Uint32(b[16:]),
		Flags:       binary.BigEndian.Uint16(b[20:]),
		Attempt:     binary.BigEndian.Uint16(b[22:]),
	}
	return true
}

// ParseSend reads a mark that is a SEND of its own: exactly MarkLen bytes.
func (m *Mark) ParseSend(b []byte) bool { return len(b) == MarkLen && m.Parse(b) }

func isMagic(b []byte) bool { return len(b) >= 4 && binary.BigEndian.Uint32(b) == magic }

// PutREQ writes the mark into the private data of a REQ, behind ConnPriv.Encode: whole for IPv4, short for
// IPv6. It returns the length of the private data.
func (m *Mark) PutREQ(priv []byte, v6 bool) int {
	if v6 {
		binary.BigEndian.PutUint16(priv[markOff6REQ:PrivREQLen], magic>>16)
		binary.BigEndian.PutUint16(priv[markOff6REQ+2:PrivREQLen], m.Attempt)
	} else {
		m.Put(priv[markOff4:PrivREQLen])
	}
	return PrivREQLen
}

// ParseREQ looks for a mark in the private data of a REQ. ours says that the peer is one of us; whole, that
// m was filled in. Where it was not (IPv6), Attempt alone was, and the mark is the peer's first SEND.
func (m *Mark) ParseREQ(priv []byte, v6 bool) (ours, whole bool) {
	if v6 {
		if len(priv) < PrivREQLen || binary.BigEndian.Uint16(priv[markOff6REQ:]) != magic>>16 {
			return false, false
		}
		*m = Mark{Attempt: binary.BigEndian.Uint16(priv[markOff6REQ+2:])}
		return true, false
	}
	if len(priv) < PrivREQLen {
		return false, false
	}
	ok := m.Parse(priv[markOff4:])
	return ok, ok
}

// PutREP writes the mark into the private data of a REP, behind ConnPriv.Encode, and returns the length of
// the private data.
func (m *Mark) PutREP(priv []byte, v6 bool) int {
	off := PrivLen(v6)
	m.Put(priv[off:])
	return off + MarkLen
}

// ParseREP looks for a mark in the private data of a REP and reports whether there was one.
func (m *Mark) ParseREP(priv []byte, v6 bool) bool {
	off := PrivLen(v6)
	return len(priv) >= off && m.Parse(priv[off:])
}
