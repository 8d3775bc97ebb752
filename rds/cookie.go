package rds

import (
	"fmt"
	"strconv"
	"strings"
)

// Cookie names a region of memory to peers (rds_rdma_cookie_t of the kernel): its key in the lower half, and in the upper
// the offset of the region's first byte in the address space that the key opens. 0 is no cookie.
//
// A cookie is a number that a peer may keep, guess or pass on: what it opens is what the region admits, to
// everybody who is connected to the address (rds-protocol spec 3.9).
type Cookie uint64

// MakeCookie is the cookie of a key and an offset.
func MakeCookie(rkey, offset uint32) Cookie { return Cookie(rkey) | Cookie(offset)<<32 }

// RKey is the key.
func (c Cookie) RKey() uint32 { return uint32(c) }

// Offset is where the region begins: what an operation's RemoteOffset is added to.
func (c Cookie) Offset() uint32 { return uint32(c >> 32) }

// String is the cookie as "rkey+offset", both in hexadecimal: "0x11223344+0x10".
func (c Cookie) String() string { return fmt.Sprintf("%#x+%#x", c.RKey(), c.Offset()) }

// ParseCookie reads what String wrote, or a number: the cookie itself. The error matches ErrInvalid.
func ParseCookie(text string) (Cookie, error) {
	if key, off, ok := strings.Cut(text, "+"); ok {
		k, err1 := strconv.ParseUint(key, 0, 32)
		o, err2 := strconv.ParseUint(off, 0, 32)
		if err1 == nil && err2 == nil {
			return MakeCookie(uint32(k), uint32(o)), nil
		}
	} else if n, err := strconv.ParseUint(text, 0, 64); err == nil {
		return Cookie(n), nil
	}
	return 0, fmt.Errorf("%w: cookie %q", ErrInvalid, text)
}

// MarshalText implements encoding.TextMarshaler.
func (c Cookie) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Cookie) UnmarshalText(text []byte) (err error) {
	*c, err = ParseCookie(string(text))
	return err
}
