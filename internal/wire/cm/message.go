package cm

// Path is one of the two paths in a REQ (rocev2 spec 7.3).
type Path struct {
	LocalLID, RemoteLID uint16 // 0xFFFF when HopLimit > 1 on RoCE, else 0
	LocalGID, RemoteGID GID    // of the sender and of the receiver of the REQ
	FlowLabel           uint32 // 20 bits
	PacketRate          uint8  // 6 bits: IB rate enum
	TrafficClass        uint8
	HopLimit            uint8
	SL                  uint8 // 4 bits
	SubnetLocal         bool
	AckTimeout          uint8 // 5 bits: local ACK timeout
}

func (p *Path) decode(b []byte) {
	p.LocalLID, p.RemoteLID = get16(b), get16(b[2:])
	p.LocalGID, p.RemoteGID = GID(b[4:20]), GID(b[20:36])
	p.FlowLabel = get24(b[36:]) >> 4
	p.PacketRate = b[39] & 0x3F
	p.TrafficClass = b[40]
	p.HopLimit = b[41]
	p.SL, p.SubnetLocal = b[42]>>4, bit(b[42], 3)
	p.AckTimeout = b[43] >> 3
}

func (p *Path) encode(b []byte) {
	put16(b, p.LocalLID)
	put16(b[2:], p.RemoteLID)
	copy(b[4:], p.LocalGID[:])
	copy(b[20:], p.RemoteGID[:])
	put24(b[36:], p.FlowLabel<<4)
	b[39] = p.PacketRate & 0x3F
	b[40] = p.TrafficClass
	b[41] = p.HopLimit
	b[42] = p.SL<<4 | putBit(3, p.SubnetLocal)
	b[43] = p.AckTimeout << 3
}

// Transport service types of a REQ.
const (
	TransportRC  = 0
	TransportUC  = 1
	TransportXRC = 3
)

// REQ asks for a connection.
type REQ struct {
	TID                   uint64
	Modifier              uint32 // ECE options
	LocalCommID           uint32
	VendorID              uint32 // 24 bits, ECE
	ServiceID             uint64
	LocalCAGUID           uint64
	LocalQKey             uint32
	LocalQPN              uint32 // 24 bits
	ResponderResources    uint8  // READs and atomics the sender can serve
	LocalEECN             uint32 // 24 bits
	InitiatorDepth        uint8  // READs and atomics the sender will issue
	RemoteEECN            uint32 // 24 bits
	RemoteResponseTimeout uint8  // 5 bits: how long the receiver may take to answer
	TransportType         uint8  // 2 bits
	FlowControl           bool
	StartingPSN           uint32 // 24 bits; the PSN the sender expects to receive first
	LocalResponseTimeout  uint8  // 5 bits: how long the sender may take to answer
	RetryCount            uint8  // 3 bits
	PKey                  uint16
	PathMTU               uint8 // 4 bits: code, 1 to 5
	RDCExists             bool
	RNRRetryCount         uint8 // 3 bits
	MaxCMRetries          uint8 // 4 bits
	SRQ                   bool
	ExtendedTransport     uint8 // 3 bits
	Primary               Path
	Alternate             Path // all zero: none
	SAPSupported          bool // bit 2 of the alternate path's last byte
	PrivateData           [92]byte
}

// HasAlternate reports whether the REQ names an alternate path: by its local LID, as Linux does.
func (m *REQ) HasAlternate() bool { return m.Alternate.LocalLID != 0 }

// Decode reads a REQ.
func (m *REQ) Decode(mad []byte) error {
	h, c, err := open(mad, AttrREQ)
	if err != nil {
		return err
	}
	m.TID, m.Modifier = h.TID, h.Modifier
	m.LocalCommID = get32(c)
	m.VendorID = get24(c[5:])
	m.ServiceID = get64(c[8:])
	m.LocalCAGUID = get64(c[16:])
	m.LocalQKey = get32(c[28:])
	m.LocalQPN, m.ResponderResources = get24(c[32:]), c[35]
	m.LocalEECN, m.InitiatorDepth = get24(c[36:]), c[39]
	m.RemoteEECN = get24(c[40:])
	m.RemoteResponseTimeout, m.TransportType, m.FlowControl = c[43]>>3, c[43]>>1&3, bit(c[43], 0)
	m.StartingPSN = get24(c[44:])
	m.LocalResponseTimeout, m.RetryCount = c[47]>>3, c[47]&7
	m.PKey = get16(c[48:])
	m.PathMTU, m.RDCExists, m.RNRRetryCount = c[50]>>4, bit(c[50], 3), c[50]&7
	m.MaxCMRetries, m.SRQ, m.ExtendedTransport = c[51]>>4, bit(c[51], 3), c[51]&7
	m.Primary.decode(c[52:96])
	m.Alternate.decode(c[96:140])
	m.SAPSupported = bit(c[139], 2)
	m.PrivateData = [92]byte(c[140:232])
	return nil
}

// Encode writes the REQ to mad[:MADLen].
func (m *REQ) Encode(mad []byte) {
	c := create(mad, AttrREQ, m.TID, m.Modifier)
	put32(c, m.LocalCommID)
	put24(c[5:], m.VendorID)
	put64(c[8:], m.ServiceID)
	put64(c[16:], m.LocalCAGUID)
	put32(c[28:], m.LocalQKey)
	put24(c[32:], m.LocalQPN)
	c[35] = m.ResponderResources
	put24(c[36:], m.LocalEECN)
	c[39] = m.InitiatorDepth
	put24(c[40:], m.RemoteEECN)
	c[43] = m.RemoteResponseTimeout<<3 | m.TransportType&3<<1 | putBit(0, m.FlowControl)
	put24(c[44:], m.StartingPSN)
	c[47] = m.LocalResponseTimeout<<3 | m.RetryCount&7
	put16(c[48:], m.PKey)
	c[50] = m.PathMTU<<4 | putBit(3, m.RDCExists) | m.RNRRetryCount&7
	c[51] = m.MaxCMRetries<<4 | putBit(3, m.SRQ) | m.ExtendedTransport&7
	m.Primary.encode(c[52:96])
	m.Alternate.encode(c[96:140])
	c[139] |= putBit(2, m.SAPSupported)
	copy(c[140:], m.PrivateData[:])
}

// REP accepts a REQ.
type REP struct {
	TID                uint64 // of the REQ
	Modifier           uint32 // ECE options
	LocalCommID        uint32
	RemoteCommID       uint32 // the REQ's LocalCommID
	LocalQKey          uint32
	LocalQPN           uint32 // 24 bits
	VendorID           uint32 // 24 bits, ECE
	LocalEECN          uint32 // 24 bits
	StartingPSN        uint32 // 24 bits; the PSN the sender of the REP expects to receive first
	ResponderResources uint8
	InitiatorDepth     uint8
	TargetAckDelay     uint8 // 5 bits
	FailoverAccepted   uint8 // 2 bits
	FlowControl        bool
	RNRRetryCount      uint8 // 3 bits
	SRQ                bool
	LocalCAGUID        uint64
	PrivateData        [196]byte
}

// Decode reads a REP.
func (m *REP) Decode(mad []byte) error {
	h, c, err := open(mad, AttrREP)
	if err != nil {
		return err
	}
	m.TID, m.Modifier = h.TID, h.Modifier
	m.LocalCommID, m.RemoteCommID = get32(c), get32(c[4:])
	m.LocalQKey = get32(c[8:])
	m.LocalQPN = get24(c[12:])
	m.VendorID = uint32(c[15])<<16 | uint32(c[19])<<8 | uint32(c[23])
	m.LocalEECN = get24(c[16:])
	m.StartingPSN = get24(c[20:])
	m.ResponderResources, m.InitiatorDepth = c[24], c[25]
	m.TargetAckDelay, m.FailoverAccepted, m.FlowControl = c[26]>>3, c[26]>>1&3, bit(c[26], 0)
	m.RNRRetryCount, m.SRQ = c[27]>>5, bit(c[27], 4)
	m.LocalCAGUID = get64(c[28:])
	m.PrivateData = [196]byte(c[36:232])
	return nil
}

// Encode writes the REP to mad[:MADLen].
func (m *REP) Encode(mad []byte) {
	c := create(mad, AttrREP, m.TID, m.Modifier)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	put32(c[8:], m.LocalQKey)
	put24(c[12:], m.LocalQPN)
	put24(c[16:], m.LocalEECN)
	put24(c[20:], m.StartingPSN)
	c[15], c[19], c[23] = byte(m.VendorID>>16), byte(m.VendorID>>8), byte(m.VendorID)
	c[24], c[25] = m.ResponderResources, m.InitiatorDepth
	c[26] = m.TargetAckDelay<<3 | m.FailoverAccepted&3<<1 | putBit(0, m.FlowControl)
	c[27] = m.RNRRetryCount<<5 | putBit(4, m.SRQ)
	put64(c[28:], m.LocalCAGUID)
	copy(c[36:], m.PrivateData[:])
}

// RTU tells that a REP was received and the sender is ready.
type RTU struct {
	TID                       uint64 // of the REQ
	LocalCommID, RemoteCommID uint32
	PrivateData               [224]byte
}

// Decode reads an RTU.
func (m *RTU) Decode(mad []byte) error {
	h, c, err := open(mad, AttrRTU)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.PrivateData = [224]byte(c[8:232])
	return nil
}

// Encode writes the RTU to mad[:MADLen].
func (m *RTU) Encode(mad []byte) {
	c := create(mad, AttrRTU, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	copy(c[8:], m.PrivateData[:])
}

// Message that an MRA or a REJ answers.
const (
	ForREQ   = 0
	ForREP   = 1
	ForLAP   = 2 // MRA
	ForOther = 2 // REJ: no message
)

// MRA tells that a message was received and its answer will take a while.
type MRA struct {
	TID                       uint64 // of the REQ
	LocalCommID, RemoteCommID uint32
	Message                   uint8 // 2 bits: ForREQ, ForREP, ForLAP
	ServiceTimeout            uint8 // 5 bits
	PrivateData               [222]byte
}

// Decode reads an MRA.
func (m *MRA) Decode(mad []byte) error {
	h, c, err := open(mad, AttrMRA)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.Message, m.ServiceTimeout = c[8]>>6, c[9]>>3
	m.PrivateData = [222]byte(c[10:232])
	return nil
}

// Encode writes the MRA to mad[:MADLen].
func (m *MRA) Encode(mad []byte) {
	c := create(mad, AttrMRA, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	c[8], c[9] = m.Message<<6, m.ServiceTimeout<<3
	copy(c[10:], m.PrivateData[:])
}

// REJ refuses a REQ or a REP, or gives a connection attempt up.
type REJ struct {
	TID                       uint64 // of the REQ
	LocalCommID, RemoteCommID uint32 // LocalCommID is 0 if the rejecter has none
	Message                   uint8  // 2 bits: ForREQ, ForREP, ForOther
	ARILen                    uint8  // 7 bits: bytes of ARI, at most 72
	Reason                    Reason
	ARI                       [72]byte
	PrivateData               [148]byte
}

// Info is the additional reject information: ARI cut to its length.
func (m *REJ) Info() []byte { return m.ARI[:min(int(m.ARILen), len(m.ARI))] }

// SetInfo sets ARI, at most 72 bytes, and its length.
func (m *REJ) SetInfo(b []byte) {
	m.ARI = [72]byte{}
	m.ARILen = uint8(copy(m.ARI[:], b))
}

// Decode reads a REJ.
func (m *REJ) Decode(mad []byte) error {
	h, c, err := open(mad, AttrREJ)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.Message, m.ARILen, m.Reason = c[8]>>6, c[9]>>1, Reason(get16(c[10:]))
	m.ARI = [72]byte(c[12:84])
	m.PrivateData = [148]byte(c[84:232])
	return nil
}

// Encode writes the REJ to mad[:MADLen].
func (m *REJ) Encode(mad []byte) {
	c := create(mad, AttrREJ, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	c[8], c[9] = m.Message<<6, m.ARILen<<1
	put16(c[10:], uint16(m.Reason))
	copy(c[12:], m.ARI[:])
	copy(c[84:], m.PrivateData[:])
}

// DREQ ends a connection.
type DREQ struct {
	TID                       uint64
	LocalCommID, RemoteCommID uint32
	RemoteQPN                 uint32 // 24 bits: the QPN of the receiver, which checks it
	PrivateData               [220]byte
}

// Decode reads a DREQ.
func (m *DREQ) Decode(mad []byte) error {
	h, c, err := open(mad, AttrDREQ)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.RemoteQPN = get24(c[8:])
	m.PrivateData = [220]byte(c[12:232])
	return nil
}

// Encode writes the DREQ to mad[:MADLen].
func (m *DREQ) Encode(mad []byte) {
	c := create(mad, AttrDREQ, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	put24(c[8:], m.RemoteQPN)
	copy(c[12:], m.PrivateData[:])
}

// DREP answers a DREQ.
type DREP struct {
	TID                       uint64 // of the DREQ
	LocalCommID, RemoteCommID uint32
	PrivateData               [224]byte
}

// Decode reads a DREP.
func (m *DREP) Decode(mad []byte) error {
	h, c, err := open(mad, AttrDREP)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.PrivateData = [224]byte(c[8:232])
	return nil
}

// Encode writes the DREP to mad[:MADLen].
func (m *DREP) Encode(mad []byte) {
	c := create(mad, AttrDREP, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	copy(c[8:], m.PrivateData[:])
}

// SIDRREQ asks for the UD QP behind a service ID.
type SIDRREQ struct {
	TID         uint64
	Modifier    uint32
	RequestID   uint32
	PKey        uint16
	ServiceID   uint64
	PrivateData [216]byte // CMA header and 180 bytes
}

// Decode reads a SIDR_REQ.
func (m *SIDRREQ) Decode(mad []byte) error {
	h, c, err := open(mad, AttrSIDRREQ)
	if err != nil {
		return err
	}
	m.TID, m.Modifier = h.TID, h.Modifier
	m.RequestID, m.PKey, m.ServiceID = get32(c), get16(c[4:]), get64(c[8:])
	m.PrivateData = [216]byte(c[16:232])
	return nil
}

// Encode writes the SIDR_REQ to mad[:MADLen].
func (m *SIDRREQ) Encode(mad []byte) {
	c := create(mad, AttrSIDRREQ, m.TID, m.Modifier)
	put32(c, m.RequestID)
	put16(c[4:], m.PKey)
	put64(c[8:], m.ServiceID)
	copy(c[16:], m.PrivateData[:])
}

// Status codes of a SIDR_REP.
const (
	SIDRValid          = 0
	SIDRUnsupported    = 1
	SIDRRejected       = 2
	SIDRNoQP           = 3
	SIDRRedirect       = 4
	SIDRVersionUnknown = 5
)

// SIDRREP answers a SIDR_REQ.
type SIDRREP struct {
	TID         uint64 // of the SIDR_REQ
	Modifier    uint32
	RequestID   uint32
	Status      uint8
	InfoLen     uint8
	VendorID    uint32 // 24 bits, ECE
	QPN         uint32 // 24 bits
	ServiceID   uint64
	QKey        uint32
	Info        [72]byte
	PrivateData [136]byte
}

// Decode reads a SIDR_REP.
func (m *SIDRREP) Decode(mad []byte) error {
	h, c, err := open(mad, AttrSIDRREP)
	if err != nil {
		return err
	}
	m.TID, m.Modifier = h.TID, h.Modifier
	m.RequestID, m.Status, m.InfoLen = get32(c), c[4], c[5]
	m.VendorID = uint32(get16(c[6:]))<<8 | uint32(c[11])
	m.QPN = get24(c[8:])
	m.ServiceID, m.QKey = get64(c[12:]), get32(c[20:])
	m.Info = [72]byte(c[24:96])
	m.PrivateData = [136]byte(c[96:232])
	return nil
}

// Encode writes the SIDR_REP to mad[:MADLen].
func (m *SIDRREP) Encode(mad []byte) {
	c := create(mad, AttrSIDRREP, m.TID, m.Modifier)
	put32(c, m.RequestID)
	c[4], c[5] = m.Status, m.InfoLen
	put16(c[6:], uint16(m.VendorID>>8))
	put24(c[8:], m.QPN)
	c[11] = byte(m.VendorID)
	put64(c[12:], m.ServiceID)
	put32(c[20:], m.QKey)
	copy(c[24:], m.Info[:])
	copy(c[96:], m.PrivateData[:])
}

// LAP proposes an alternate path. Linux ignores it on RoCE.
type LAP struct {
	TID                       uint64
	LocalCommID, RemoteCommID uint32
	RemoteQPN                 uint32 // 24 bits
	RemoteResponseTimeout     uint8  // 5 bits
	Alternate                 Path
	PrivateData               [168]byte
}

// Decode reads a LAP.
func (m *LAP) Decode(mad []byte) error {
	h, c, err := open(mad, AttrLAP)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.RemoteQPN, m.RemoteResponseTimeout = get24(c[12:]), c[15]>>3
	p := &m.Alternate // the fields of a REQ's path in another order
	p.LocalLID, p.RemoteLID = get16(c[20:]), get16(c[22:])
	p.LocalGID, p.RemoteGID = GID(c[24:40]), GID(c[40:56])
	p.FlowLabel = get24(c[56:]) >> 4
	p.TrafficClass, p.HopLimit = c[59], c[60]
	p.PacketRate = c[61] & 0x3F
	p.SL, p.SubnetLocal = c[62]>>4, bit(c[62], 3)
	p.AckTimeout = c[63] >> 3
	m.PrivateData = [168]byte(c[64:232])
	return nil
}

// Encode writes the LAP to mad[:MADLen].
func (m *LAP) Encode(mad []byte) {
	c := create(mad, AttrLAP, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	put24(c[12:], m.RemoteQPN)
	c[15] = m.RemoteResponseTimeout << 3
	p := &m.Alternate
	put16(c[20:], p.LocalLID)
	put16(c[22:], p.RemoteLID)
	copy(c[24:], p.LocalGID[:])
	copy(c[40:], p.RemoteGID[:])
	put24(c[56:], p.FlowLabel<<4)
	c[59], c[60] = p.TrafficClass, p.HopLimit
	c[61] = p.PacketRate & 0x3F
	c[62] = p.SL<<4 | putBit(3, p.SubnetLocal)
	c[63] = p.AckTimeout << 3
	copy(c[64:], m.PrivateData[:])
}

// APR answers a LAP.
type APR struct {
	TID                       uint64 // of the LAP
	LocalCommID, RemoteCommID uint32
	InfoLen                   uint8
	Status                    uint8
	Info                      [72]byte
	PrivateData               [148]byte
}

// Decode reads an APR.
func (m *APR) Decode(mad []byte) error {
	h, c, err := open(mad, AttrAPR)
	if err != nil {
		return err
	}
	m.TID, m.LocalCommID, m.RemoteCommID = h.TID, get32(c), get32(c[4:])
	m.InfoLen, m.Status = c[8], c[9]
	m.Info = [72]byte(c[12:84])
	m.PrivateData = [148]byte(c[84:232])
	return nil
}

// Encode writes the APR to mad[:MADLen].
func (m *APR) Encode(mad []byte) {
	c := create(mad, AttrAPR, m.TID, 0)
	put32(c, m.LocalCommID)
	put32(c[4:], m.RemoteCommID)
	c[8], c[9] = m.InfoLen, m.Status
	copy(c[12:], m.Info[:])
	copy(c[84:], m.PrivateData[:])
}
