package roce

import "strconv"

// Opcode is the first byte of the BTH: transport in bits 7-5, operation in bits 4-0 (rocev2 spec 1.5).
type Opcode uint8

// Opcodes of RC and UD, and the congestion notification packet.
const (
	RCSendFirst      Opcode = 0x00
	RCSendMiddle     Opcode = 0x01
	RCSendLast       Opcode = 0x02
	RCSendLastImm    Opcode = 0x03
	RCSendOnly       Opcode = 0x04
	RCSendOnlyImm    Opcode = 0x05
	RCWriteFirst     Opcode = 0x06
	RCWriteMiddle    Opcode = 0x07
	RCWriteLast      Opcode = 0x08
	RCWriteLastImm   Opcode = 0x09
	RCWriteOnly      Opcode = 0x0A
	RCWriteOnlyImm   Opcode = 0x0B
	RCReadRequest    Opcode = 0x0C
	RCReadRespFirst  Opcode = 0x0D
	RCReadRespMiddle Opcode = 0x0E
	RCReadRespLast   Opcode = 0x0F
	RCReadRespOnly   Opcode = 0x10
	RCAck            Opcode = 0x11
	RCAtomicAck      Opcode = 0x12
	RCCmpSwap        Opcode = 0x13
	RCFetchAdd       Opcode = 0x14
	RCSendLastInv    Opcode = 0x16
	RCSendOnlyInv    Opcode = 0x17

	UDSendOnly    Opcode = 0x64
	UDSendOnlyImm Opcode = 0x65

	// CNP is a congestion notification: BECN set, 16 zero bytes as payload.
	CNP Opcode = 0x81
)

// OpFlags are the facts about an opcode that a state machine asks for.
type OpFlags uint32

// Opcode flags. Start, Middle and End place the packet in its message (an Only packet is both Start
// and End). The header flags say which extension headers follow the BTH.
const (
	FlagStart OpFlags = 1 << iota
	FlagMiddle
	FlagEnd
	FlagRequest      // goes to the responder
	FlagResponse     // goes to the requester
	FlagConsumesRecv // takes a receive work request, at this packet
	FlagCompletesRecv

	FlagSend   // SEND of any kind
	FlagWrite  // RDMA WRITE of any kind
	FlagRead   // READ request or response
	FlagAtomic // CmpSwap, FetchAdd, Atomic Acknowledge

	FlagRETH
	FlagAtomicETH
	FlagAETH
	FlagAtomicAckETH
	FlagDETH
	FlagImm
	FlagInv // IETH

	FlagUD // transport UD; without it (and valid, and not CNP) the transport is RC
	FlagCNP

	FlagNoPayload   // carries none
	FlagFullMTU     // carries exactly the path MTU
	FlagSomePayload // carries 1..PMTU; without any of the three, 0..PMTU
)

// Info is what the opcode alone says about a packet.
type Info struct {
	HdrLen int // BTH and extension headers, in bytes; BTHLen for an unknown opcode
	Flags  OpFlags
	Valid  bool // an opcode of the list above
}

// Has reports whether all of f are set.
func (i *Info) Has(f OpFlags) bool { return i.Flags&f == f }

// opInfo is built once from opTable and never written again.
var opInfo = func() (t [256]Info) {
	for i := range t {
		t[i].HdrLen = BTHLen
	}
	for op, e := range opTable {
		n := BTHLen
		for _, h := range [...]struct {
			flag OpFlags
			len  int
		}{
			{FlagRETH, RETHLen}, {FlagAtomicETH, AtomicETHLen}, {FlagAETH, AETHLen},
			{FlagAtomicAckETH, AtomicAckETHLen}, {FlagDETH, DETHLen}, {FlagImm, ImmLen}, {FlagInv, IETHLen},
		} {
			if e.flags&h.flag != 0 {
				n += h.len
			}
		}
		t[op] = Info{HdrLen: n, Flags: e.flags, Valid: true}
	}
	return t
}()

// Rows of opTable that several opcodes share.
const (
	only    = FlagStart | FlagEnd
	takes   = FlagConsumesRecv | FlagCompletesRecv
	send    = FlagRequest | FlagSend
	write   = FlagRequest | FlagWrite
	readRsp = FlagResponse | FlagRead
	atomic  = FlagRequest | FlagAtomic | FlagAtomicETH | only | FlagNoPayload
)

// opTable is the table of rocev2 spec 1.5; the order of extension headers is fixed (1.4), so flags
// are enough to tell their lengths.
var opTable = map[Opcode]struct {
	name  string
	flags OpFlags
}{
	RCSendFirst:      {"RC SEND First", send | FlagStart | FlagConsumesRecv | FlagFullMTU},
	RCSendMiddle:     {"RC SEND Middle", send | FlagMiddle | FlagFullMTU},
	RCSendLast:       {"RC SEND Last", send | FlagEnd | FlagCompletesRecv | FlagSomePayload},
	RCSendLastImm:    {"RC SEND Last with Immediate", send | FlagEnd | FlagCompletesRecv | FlagSomePayload | FlagImm},
	RCSendOnly:       {"RC SEND Only", send | only | takes},
	RCSendOnlyImm:    {"RC SEND Only with Immediate", send | only | takes | FlagImm},
	RCWriteFirst:     {"RC WRITE First", write | FlagStart | FlagRETH | FlagFullMTU},
	RCWriteMiddle:    {"RC WRITE Middle", write | FlagMiddle | FlagFullMTU},
	RCWriteLast:      {"RC WRITE Last", write | FlagEnd | FlagSomePayload},
	RCWriteLastImm:   {"RC WRITE Last with Immediate", write | FlagEnd | takes | FlagSomePayload | FlagImm},
	RCWriteOnly:      {"RC WRITE Only", write | only | FlagRETH},
	RCWriteOnlyImm:   {"RC WRITE Only with Immediate", write | only | takes | FlagRETH | FlagImm},
	RCReadRequest:    {"RC READ Request", FlagRequest | FlagRead | only | FlagRETH | FlagNoPayload},
	RCReadRespFirst:  {"RC READ Response First", readRsp | FlagStart | FlagAETH | FlagFullMTU},
	RCReadRespMiddle: {"RC READ Response Middle", readRsp | FlagMiddle | FlagFullMTU},
	RCReadRespLast:   {"RC READ Response Last", readRsp | FlagEnd | FlagAETH | FlagSomePayload},
	RCReadRespOnly:   {"RC READ Response Only", readRsp | only | FlagAETH},
	RCAck:            {"RC Acknowledge", FlagResponse | only | FlagAETH | FlagNoPayload},
	RCAtomicAck:      {"RC Atomic Acknowledge", FlagResponse | FlagAtomic | only | FlagAETH | FlagAtomicAckETH | FlagNoPayload},
	RCCmpSwap:        {"RC CmpSwap", atomic},
	RCFetchAdd:       {"RC FetchAdd", atomic},
	RCSendLastInv:    {"RC SEND Last with Invalidate", send | FlagEnd | FlagCompletesRecv | FlagSomePayload | FlagInv},
	RCSendOnlyInv:    {"RC SEND Only with Invalidate", send | only | takes | FlagInv},
	UDSendOnly:       {"UD SEND Only", send | only | takes | FlagUD | FlagDETH},
	UDSendOnlyImm:    {"UD SEND Only with Immediate", send | only | takes | FlagUD | FlagDETH | FlagImm},
	CNP:              {"CNP", FlagCNP},
}

// Info is the opcode's row of the table, never nil. The row is read-only.
func (op Opcode) Info() *Info { return &opInfo[op] }

func (op Opcode) String() string {
	if e, ok := opTable[op]; ok {
		return e.name
	}
	return "opcode 0x" + strconv.FormatUint(uint64(op), 16)
}
