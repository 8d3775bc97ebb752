// Package cm is the codec of the InfiniBand Communication Manager's datagrams (MADs) as RDMA-CM uses
// them over RoCEv2: 256 bytes in a UD SEND to QP 1.
//
//	 0 base version 1 | 1 class 0x07 | 2 class version 2 | 3 method 0x03 | 4-5 status | 6-7 class specific
//	 8-15 transaction ID | 16-17 attribute ID | 18-19 reserved | 20-23 attribute modifier
//	24-255 the message; offsets "C" in the specification count from here
//
// Each message is a struct with Decode and Encode, which read and write a whole MAD. Decode copies, so
// that the struct outlives the buffer; fields narrower than their Go type are masked on Encode;
// reserved fields are ignored by Decode and zero in Encode. The length of private data is
// not transmitted: both sides see the whole field.
//
// Nothing here allocates, keeps state, does I/O or logs.
//
// Limitations: the Enhanced Connection Establishment options (attribute modifier and vendor ID)
// are carried, not interpreted.
//
// Source: docs/spec/rocev2.md ("rocev2 spec"), section 7.
package cm
