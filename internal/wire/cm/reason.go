package cm

import "strconv"

// Reason is why a REJ refuses (rocev2 spec 7.11).
type Reason uint16

// Reject reasons.
const (
	RejNoQP                Reason = 1
	RejNoEEC               Reason = 2
	RejNoResources         Reason = 3
	RejTimeout             Reason = 4 // ARI: CA GUID of the rejecter
	RejUnsupported         Reason = 5
	RejInvalidCommID       Reason = 6
	RejInvalidCommInstance Reason = 7
	RejInvalidServiceID    Reason = 8 // nobody listens
	RejInvalidTransport    Reason = 9
	RejStaleConn           Reason = 10
	RejNoRDC               Reason = 11
	RejInvalidGID          Reason = 12 // ARI: acceptable GID
	RejInvalidLID          Reason = 13
	RejInvalidSL           Reason = 14
	RejInvalidTrafficClass Reason = 15
	RejInvalidHopLimit     Reason = 16
	RejInvalidPacketRate   Reason = 17
	RejInvalidAltGID       Reason = 18
	RejInvalidAltLID       Reason = 19
	RejInvalidAltSL        Reason = 20
	RejInvalidAltClass     Reason = 21
	RejInvalidAltHopLimit  Reason = 22
	RejInvalidAltRate      Reason = 23
	RejPortCMRedirect      Reason = 24
	RejPortRedirect        Reason = 25
	RejInvalidMTU          Reason = 26
	RejInsufficientRespRes Reason = 27
	RejConsumer            Reason = 28 // the application, with its private data
	RejRNRRetryCount       Reason = 29
	RejDuplicateCommID     Reason = 30
	RejInvalidClassVersion Reason = 31
	RejInvalidFlowLabel    Reason = 32
	RejInvalidAltFlowLabel Reason = 33
	RejVendorOption        Reason = 35
)

var reasonNames = [...]string{
	RejNoQP:                "no QP available",
	RejNoEEC:               "no EE context available",
	RejNoResources:         "no resources",
	RejTimeout:             "timeout",
	RejUnsupported:         "unsupported request",
	RejInvalidCommID:       "invalid communication ID",
	RejInvalidCommInstance: "invalid communication instance",
	RejInvalidServiceID:    "invalid service ID",
	RejInvalidTransport:    "invalid transport type",
	RejStaleConn:           "stale connection",
	RejNoRDC:               "RDC does not exist",
	RejInvalidGID:          "invalid primary GID",
	RejInvalidLID:          "invalid primary LID",
	RejInvalidSL:           "invalid primary SL",
	RejInvalidTrafficClass: "invalid primary traffic class",
	RejInvalidHopLimit:     "invalid primary hop limit",
	RejInvalidPacketRate:   "invalid primary packet rate",
	RejInvalidAltGID:       "invalid alternate GID",
	RejInvalidAltLID:       "invalid alternate LID",
	RejInvalidAltSL:        "invalid alternate SL",
	RejInvalidAltClass:     "invalid alternate traffic class",
	RejInvalidAltHopLimit:  "invalid alternate hop limit",
	RejInvalidAltRate:      "invalid alternate packet rate",
	RejPortCMRedirect:      "port and CM redirect",
	RejPortRedirect:        "port redirect",
	RejInvalidMTU:          "invalid path MTU",
	RejInsufficientRespRes: "insufficient responder resources",
	RejConsumer:            "consumer reject",
	RejRNRRetryCount:       "RNR retry count",
	RejDuplicateCommID:     "duplicate local communication ID",
	RejInvalidClassVersion: "invalid class version",
	RejInvalidFlowLabel:    "invalid primary flow label",
	RejInvalidAltFlowLabel: "invalid alternate flow label",
	RejVendorOption:        "vendor option not supported",
}

func (r Reason) String() string {
	if int(r) < len(reasonNames) && reasonNames[r] != "" {
		return reasonNames[r]
	}
	return "reject reason " + strconv.Itoa(int(r))
}
