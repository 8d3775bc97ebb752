package rdshdr

import (
	"encoding/binary"
	"errors"
	"strconv"
)

// ExtType is the type of an entry in the extension area: {type, data of a length the type implies}.
// The list ends with ExtNone or with the area (rds spec 2.5).
type ExtType uint8

// Extension types.
const (
	ExtNone      ExtType = 0
	ExtVersion   ExtType = 1 // u32 version
	ExtRDMA      ExtType = 2 // u32 rkey of the receiver's region that was just used
	ExtRDMADest  ExtType = 3 // u32 rkey, u32 offset: a region handed out
	ExtRDMABytes ExtType = 4 // u32 bytes, u8 direction, 3 pad; kernels after 6.1
	ExtNPaths    ExtType = 5 // u16 number of paths
	ExtGenNum    ExtType = 6 // u32 generation
	ExtCapBits   ExtType = 7 // u32; UEK
	ExtSPortIdx  ExtType = 8 // u8; kernels after 6.1
)

// extLens are the lengths we know; -1 for a type whose length we do not.
var extLens = [...]int8{
	ExtNone: 0, ExtVersion: 4, ExtRDMA: 4, ExtRDMADest: 8, ExtRDMABytes: 8, ExtNPaths: 2, ExtGenNum: 4,
	ExtCapBits: 4, ExtSPortIdx: 1,
}

// ExtLen is the length of the data of an entry, -1 for an unknown type.
func ExtLen(t ExtType) int {
	if int(t) < len(extLens) {
		return int(extLens[t])
	}
	return -1
}

func (t ExtType) String() string {
	names := [...]string{"NONE", "VERSION", "RDMA", "RDMA_DEST", "RDMA_BYTES", "NPATHS", "GEN_NUM", "CAP_BITS", "SPORT_IDX"}
	if int(t) < len(names) {
		return names[t]
	}
	return "extension " + strconv.Itoa(int(t))
}

// ErrExtUnknown ends a list at a type whose length we do not know. What came before it counts.
var ErrExtUnknown = errors.New("unknown extension type")

// ErrExtSpace is an entry that does not fit entirely.
var ErrExtSpace = errors.New("no room in extension area")

// NextExt takes the first entry off area, the rest of an extension area:
//
//	for a := h.Ext(); ; {
//		t, data, rest, err := NextExt(a)
//		if t == ExtNone { ... end of the list; err says whether it was a clean one }
//		a = rest
//	}
//
// t is ExtNone at the end, and when the next entry is unknown or does not fit (err then says so).
func NextExt(area []byte) (t ExtType, data, rest []byte, err error) {
	if len(area) == 0 || area[0] == byte(ExtNone) {
		return ExtNone, nil, nil, nil
	}
	t = ExtType(area[0])
	n := ExtLen(t)
	if n < 0 {
		return ExtNone, nil, nil, ErrExtUnknown
	}
	if 1+n > len(area) {
		return ExtNone, nil, nil, ErrExtSpace
	}
	return t, area[1 : 1+n : 1+n], area[1+n:], nil
}

// FindExt is the data of the first entry of type t, nil if there is none.
func (h Header) FindExt(t ExtType) []byte {
	for area := h.Ext(); ; {
		typ, data, rest, err := NextExt(area)
		if typ == ExtNone || err != nil {
			return nil
		}
		if typ == t {
			return data
		}
		area = rest
	}
}

// AddExt appends an entry to h's list and leaves room for the end mark, as kernels do. data has the
// length of the type, or ErrExtUnknown; ErrExtSpace changes nothing. Call Seal when all is added.
//
// A 6.1 kernel understands one entry per header, of types 1 to 3, 5 and 6 only; nothing else may be
// sent to it.
func (h Header) AddExt(t ExtType, data []byte) error {
	if n := ExtLen(t); n <= 0 || n != len(data) {
		return ErrExtUnknown
	}
	area := h.Ext()
	for {
		typ, _, rest, err := NextExt(area)
		if err != nil {
			return err
		}
		if typ == ExtNone {
			break
		}
		area = rest
	}
	if 1+len(data)+1 > len(area) {
		return ErrExtSpace
	}
	area[0] = byte(t)
	copy(area[1:], data)
	clear(area[1+len(data):])
	return nil
}

// AddRDMA appends ExtRDMA: the receiver's region rkey was used by the RDMA operation that this
// message accompanies.
func (h Header) AddRDMA(rkey uint32) error {
	var d [4]byte
	binary.BigEndian.PutUint32(d[:], rkey)
	return h.AddExt(ExtRDMA, d[:])
}

// AddRDMADest appends ExtRDMADest: the cookie of a region handed out.
func (h Header) AddRDMADest(rkey, offset uint32) error {
	var d [8]byte
	binary.BigEndian.PutUint32(d[:], rkey)
	binary.BigEndian.PutUint32(d[4:], offset)
	return h.AddExt(ExtRDMADest, d[:])
}

// AddNPaths appends ExtNPaths.
func (h Header) AddNPaths(n uint16) error {
	var d [2]byte
	binary.BigEndian.PutUint16(d[:], n)
	return h.AddExt(ExtNPaths, d[:])
}
