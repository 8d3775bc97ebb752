// Package roce is the codec of RoCEv2 packets: the base transport header, every extension header of
// RC and UD, and the invariant CRC, including the check by a receiver that reads from an ordinary
// UDP socket and so cannot see the IPv4 identification that the CRC covers.
//
// A packet here is the payload of a UDP datagram to port 4791. U is its length, ICRC included; it is
// a multiple of 4.
//
//	IP 20/40 | UDP 8 | BTH 12 | extension headers 0..28 | payload 0..PMTU | pad 0..3 | ICRC 4
//	                 └──────────────────────────── U ──────────────────────────────────────┘
//
//	BTH        0 opcode | 1 SE:1 M:1 pad:2 TVer:4 | 2-3 P_Key | 4 FECN:1 BECN:1 rsvd:6
//	           5-7 DestQP | 8 AckReq:1 rsvd:7 | 9-11 PSN
//	RETH       0-7 VA | 8-11 R_Key | 12-15 DMA length
//	AtomicETH  0-7 VA | 8-11 R_Key | 12-19 swap or add | 20-27 compare
//	AETH       0 syndrome | 1-3 MSN
//	AtomicAck  0-7 original value
//	ImmDt      0-3 immediate
//	IETH       0-3 R_Key
//	DETH       0-3 Q_Key | 4 reserved | 5-7 source QP
//
// Every field is big-endian but the ICRC, which is little-endian.
//
// Headers are named byte slices that alias the packet. Accessors do not check lengths: [Parse] has
// done so, once, and put the pieces into a [Packet]. The Put functions write a whole header, reserved
// bits as zero, into a slice that has room for it. Nothing here allocates, keeps state that changes,
// does I/O or logs; everything may be used by any number of goroutines, except an [IDTracker],
// which is its owner's.
//
// Limitations: RC and UD only (no UC, RD, XRC; no FLUSH and ATOMIC WRITE); no GRH and no VCRC, which
// RoCEv2 does not have; IPv4 options and IPv6 extension headers are not supported by the ICRC.
//
// Source: docs/spec/rocev2.md ("rocev2 spec"), sections 1 and 2.
package roce
