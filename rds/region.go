package rds

import (
	"context"
	"net/netip"
)

// Region is memory of the application's that the device may touch: peers by its Cookie, and operations of its own socket as
// local memory (Piece). It belongs to the Socket it was registered with.
type Region struct {
	s      *Socket
	mem    []byte
	cookie Cookie
	done   chan struct{}
}

// RegionOptions say what a region is for. The zero value is a region that peers may read and write until it is closed.
type RegionOptions struct {
	// UseOnce frees the region when a message arrives that says that an operation has used it (RDS_RDMA_USE_ONCE).
	UseOnce bool
	// Invalidate frees it promptly, by whatever it is freed (RDS_RDMA_INVALIDATE).
	Invalidate bool
	// ReadOnly lets peers read it only. The kernel has no such thing.
	ReadOnly bool
}

// RegisterRegion registers mem, at most MaxRDMASize bytes (RDS_GET_MR).
func (s *Socket) RegisterRegion(ctx context.Context, mem []byte, opt RegionOptions) (*Region, error) {
	return nil, s.opError("register", netip.AddrPort{}, ErrNotSupported)
}

// RegisterRegionFor registers mem for operations of the peer at addr (RDS_GET_MR_FOR_DEST).
func (s *Socket) RegisterRegionFor(ctx context.Context, addr netip.AddrPort, mem []byte, opt RegionOptions) (*Region, error) {
	return nil, s.opError("register", addr, ErrNotSupported)
}

// SendMapped registers mem for m.Peer and sends m with its cookie (RDS_CMSG_RDMA_MAP). If the message cannot be sent
// the region is freed again.
func (s *Socket) SendMapped(ctx context.Context, m Message, mem []byte, opt RegionOptions) (*Region, error) {
	return nil, s.opError("register", m.Peer, ErrNotSupported)
}

// FreeRegion frees the region of a cookie (RDS_FREE_MR).
func (s *Socket) FreeRegion(c Cookie, invalidate bool) error {
	return s.opError("free", netip.AddrPort{}, ErrNotSupported)
}

// Cookie names the region to peers.
func (r *Region) Cookie() Cookie { return r.cookie }

// Bytes is the memory.
func (r *Region) Bytes() []byte { return r.mem }

// Len is its length in bytes.
func (r *Region) Len() int { return len(r.mem) }

// Piece is the n bytes from off on, for RDMA.Local.
func (r *Region) Piece(off, n int) Piece { return Piece{Region: r, Offset: off, Length: n} }

// Close frees the region.
func (r *Region) Close() error { return nil }

// Invalidate frees the region and waits until nobody can touch its memory any more, or ctx is done.
func (r *Region) Invalidate(ctx context.Context) error { return nil }

// Done is closed when nobody but the application touches the memory any more.
func (r *Region) Done() <-chan struct{} { return r.done }
