// Package rdshdr is the codec of what RDS puts on the wire: the message header with its checksum and
// extensions, the private data of an RDS/IB connection with our mark, and congestion maps.
//
// The header, 48 bytes, in front of every message, and on IB of every fragment of one:
//
//	 0-7 sequence | 8-15 ack | 16-19 len | 20-21 sport | 22-23 dport
//	24 flags | 25 credit | 26-29 padding | 30-31 checksum | 32-47 extensions
//
// Private data of REQ (behind RDMA-CM's header) and REP, with the mark of a peer that is one of us:
//
//	         IPv4                                 IPv6
//	 0-3     sender's address              0-15   sender's address
//	 4-7     receiver's address           16-31   receiver's address
//	 8       major version 3              32      major version 3
//	 9       minor version 1              33      minor version 1
//	10-11    minor mask 0x0003            34-35   minor mask 0x0003
//	12       type of service              36      type of service
//	13-15    reserved 0                   37-39   reserved 0
//	16-23    ack: last sequence received  40-47   ack: last sequence received
//	24-27    initial credits 0            48-51   initial credits 0
//	28-31    padding 0                    52-55   padding; REQ of ours: the short mark
//	32-55    ours: the mark               56-79   REP of ours: the mark
//
// The mark, 24 bytes:
//
//	 0-3     magic and version: 'O' 'R' 'D' 0x01
//	 4-11    incarnation of the sender, not 0
//	12-15    largest SEND the sender takes, bytes
//	16-19    window share: bytes the sender lets this peer have in flight
//	20-21    flags: 0x0001 the sender takes changes to congestion maps; unknown ones are ignored
//	22-23    number of the sender's latest REQ for this connection
//
// The short mark is all that fits into an IPv6 REQ: 'O' 'R' and the number of the REQ. A REP that answers one
// with a mark tells the active side that it talks to one of us, and the active side's mark follows as
// the first SEND, exactly 24 bytes, which is shorter than any header and so nothing else. A kernel
// looks at nothing of this: it stops reading at byte 32 or 56 and at the padding. Another version of
// the magic is another dialect: who does not know it sees a kernel.
//
// Changes to a congestion map (CongDelta), between two of ours only, are the payload of a header with the flag 0x80 and
// nothing else, ports 0, and for its sequence the number of the message among those of the connection, from 1: they are changes to the map
// that the message before it left, a whole map or number n-1.
//
//	0-1     number n of ports that are congested now
//	2-      these n ports, then any number of ports that are not, 2 bytes each
//
// Everything is big-endian. Nothing here allocates, keeps state, does I/O or logs.
//
// Limitations: TCP generation numbers are only carried; UEK's fragment size negotiation (reserved
// bytes 14 and 15) is not spoken.
//
// Source: docs/spec/rds-protocol.md ("rds spec"), sections 2 and 3.2 to 3.3.
package rdshdr
