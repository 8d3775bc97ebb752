// Package ib is the RDS transport over verbs: what one incarnation of a connection needs of a device.
//
// A [Link] is one RC QP, from its creation through CM's handshake to the drain that destroys it. It
// posts SENDs and reclaims their slots, and brings received SENDs and the ends of batches to an [Upper]. It posts
// one-sided operations (op.go) into the same ring, and has the pools' requests that map memory on its QP (pool.go).
// It knows nothing of messages, sequences or acknowledgements.
//
//	         Conn (package conn)
//	Post │            ▲ RecvSend, BatchEnd, LinkBroken
//	     ▼            │
//	   Link: ring of SENDs, header slots, QP, CM endpoint
//	     │            ▲ SendWC, RecvWC, BatchEnd, QPEvent
//	     ▼            │
//	     ibdev.QP, shared receive queue
//
// Private data (handshake.go) is the other half: what both sides tell each other in REQ and REP.
//
// # Incarnations
//
// The work request IDs of a Link carry its number, and a completion that carries another number only
// counts as stale. A Link that was closed brings no SENDs up any more: received buffers go back.
package ib
