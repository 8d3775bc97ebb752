package rds

import (
	"context"
	"net/netip"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/verbs"
)

// transport is what a Service needs of a conn.Manager. Tests put their own in its place.
type transport interface {
	// Listen opens local and accepts connections there from now on. May wait.
	Listen(local netip.Addr) error
	// Get is the link of a pair of hosts and a type of service, the same one every time.
	Get(local, remote netip.Addr, tos uint8) (link, error)
	// Register gives peers that connect to local a key to mem, or to paged if that is not nil. May wait.
	Register(ctx context.Context, local netip.Addr, mem []byte, paged verbs.PagedMemory, iova uint64, access verbs.Access) (*conn.Mapping, error)
	// Reserve is memory to send from.
	Reserve(n int) (*conn.Buffer, error)
	// TraceReceive switches stamps of arriving datagrams on, and off again when it was called as often with false.
	TraceReceive(on bool)
	// FlushMemory returns when memory that was released is its owners' again. May wait.
	FlushMemory(ctx context.Context) error
	// StartFlush has memory that was released at local given back soon. It does not wait.
	StartFlush(local netip.Addr)
	// SetCongested sets or clears the bit of port in the map of local. It does not wait and may be called while a
	// Sink's method runs.
	SetCongested(local netip.Addr, port uint16, on bool)
	// Progress does the provider's work that is due and reports whether there was any.
	Progress() bool
	// Park says that the caller, who has called Progress, is about to sleep.
	Park()
	// Providers are those of the devices.
	Providers() []verbs.Provider
	// Conns are the connections of this moment, in no order.
	Conns() []*conn.Conn
	// Stats are the counters of everything below.
	Stats() (conn.Stats, []ibdev.DeviceStats)
	// Close lingers until all messages are acknowledged or ctx is done, then ends all. It says
	// how many messages it abandoned.
	Close(ctx context.Context) (abandoned int, err error)
}

// link is what a Socket needs to send to one host: a *conn.Conn or a localLink. No method but WaitUp and Map waits.
type link interface {
	// SendExtra queues a copy of payload, with x if that is not nil. o.Released tells of its end, and the owner of an operation
	// of the operation's, unless there is an error.
	SendExtra(o conn.Owner, srcPort, dstPort uint16, payload []byte, flags conn.SendFlags, x *conn.Extra) error
	// Map gives the peer a key to mem. conn.ErrNotUp if there is no connection at this moment. It waits only if told so.
	Map(ctx context.Context, mem []byte, iova uint64, access verbs.Access, wait bool) (*conn.Mapping, error)
	// WaitUp waits until there is a connection, or stop is closed. May wait.
	WaitUp(ctx context.Context, stop <-chan struct{}) error
	// Flush sends what still waits for company. Callers that are about to wait call it.
	Flush()
	// PeerCongested reports whether the peer's map has port's bit set.
	PeerCongested(port uint16) bool
	// Cancel drops what o has queued to dstPort (-1: all ports) and the peer has not acknowledged. It
	// returns the number of messages, for which Released has been called.
	Cancel(o conn.Owner, dstPort int) int
}

var _ link = (*conn.Conn)(nil)
