package rds

import (
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/ibdev"
	"github.com/openrds/openrds/internal/packetio"
	"github.com/openrds/openrds/verbs"
)

// Dialect is how a Service presents itself to its peers.
type Dialect = conn.Dialect

// Dialects.
const (
	// DialectOpen packs datagrams towards peers that are of this project, and speaks as a kernel
	// to kernels. The default.
	DialectOpen = conn.DialectOpen
	// DialectKernelOnly speaks as a kernel to everybody.
	DialectKernelOnly = conn.DialectKernelOnly
)

// Defaults of Config.
const (
	DefaultBuffer         = 4 << 20 // send and receive buffer: the largest message fits four times
	DefaultMaxPeerBytes   = 64 << 20
	DefaultMaxSocketBytes = 256 << 20
	DefaultMaxLentBytes   = 16 << 20
	DefaultMaxReserved    = 16 << 20
	DefaultHoldTime       = time.Second
	DefaultHoldBytes      = 4 << 20
	DefaultLinger         = 5 * time.Second
)

// minPeerBytes lets any peer have the longest message queued and the next on its way.
const minPeerBytes = 2 * MaxMessageSize

// minSlabBytes is 2 MiB for what is received, and 4 MiB for what is sent, in chunks that are not all full; with half of it a write of
// 1 MiB would wait for ever.
const minSlabBytes = 8 * MaxMessageSize

// Config are the parameters of a Service. The zero value works; nobody changes it after Open.
type Config struct {
	// Providers are asked in order for the device of an address. None: a softroce provider, which
	// has one for every address of this host, on Network and UDPPort.
	Providers []verbs.Provider

	// Network carries the packets of the default provider; nil: UDP sockets. Its type is internal: this project's tests have others.
	Network packetio.Network
	// UDPPort is the UDP port of the default provider; 0: 4791, RoCEv2's.
	UDPPort uint16

	// Logger gets what an operator would like to know; nil: nobody does.
	Logger hclog.Logger

	Dialect Dialect

	// SendBuffer and ReceiveBuffer are what sockets start with, in payload bytes.
	// Zero: DefaultBuffer. Socket.SetWriteBuffer and SetReadBuffer say what they mean.
	SendBuffer    int
	ReceiveBuffer int

	// MaxPeerBytes bounds what the sockets of an address have queued from one peer, when it ignores
	// congestion: past it the connection is reset, nothing is lost, and only that peer waits.
	// Zero: DefaultMaxPeerBytes; at least 2 MiB.
	MaxPeerBytes int

	// MaxSocketBytes bounds what a socket has queued beyond its receive buffer, of all peers together, when they ignore congestion: past
	// it the connections of those that have more than 1 MiB queued are reset as above. Zero: DefaultMaxSocketBytes; twice the
	// receive buffer is always allowed.
	MaxSocketBytes int

	// MaxSlabBytes bounds the memory that is sent from and received into, of all connections together, three eighths of it for
	// what is received (net.rds.ib.max_recv_allocation). Zero: 1 GiB; at least 8 MiB, with which the longest message still passes.
	MaxSlabBytes int64

	// MemoryPools bounds the regions of each device, those of up to three pages and larger ones, by number and by bytes pinned.
	// Zero values are the kernel's figures.
	MemoryPools ibdev.PoolConfig

	// MaxLentBytes bounds, per socket, the memory shared with other messages that received messages
	// keep until Release; messages beyond it are copied. Zero: DefaultMaxLentBytes; negative: all are copied.
	MaxLentBytes int

	// MaxReservedBytes bounds, per socket, what SendBufs hold that were neither sent nor freed. Zero: DefaultMaxReserved; negative:
	// there are none.
	MaxReservedBytes int

	// HoldTime is how long after the first bind on an address datagrams for ports that are not bound
	// yet are held for a bind to come, and HoldBytes how much at most; others are dropped and
	// acknowledged. Zero: DefaultHoldTime, DefaultHoldBytes; negative time: not at all.
	HoldTime  time.Duration
	HoldBytes int

	// Linger is how long Service.Close waits for acknowledgements. Zero: DefaultLinger; negative: not at all.
	Linger time.Duration

	// Conn are further parameters of connections, for tests and special networks. What a Service provides
	// itself in it (Registry, Slab, Epoch, Sink, Logger, Dialect) is ignored.
	Conn conn.Config
}

// validate reports every problem.
func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for i, p := range c.Providers {
		if p == nil {
			bad("Providers[%d] is nil", i)
		}
	}
	if len(c.Providers) > 0 && (c.Network != nil || c.UDPPort != 0) {
		bad("Network and UDPPort are of the default provider, but Providers are given")
	}
	if c.Dialect > DialectKernelOnly {
		bad("Dialect %d does not exist", c.Dialect)
	}
	if c.SendBuffer < 0 || int64(c.SendBuffer) > maxBuffer {
		bad("SendBuffer of %d bytes", c.SendBuffer)
	}
	if c.ReceiveBuffer < 0 || int64(c.ReceiveBuffer) > maxBuffer {
		bad("ReceiveBuffer of %d bytes", c.ReceiveBuffer)
	}
	if c.MaxPeerBytes != 0 && c.MaxPeerBytes < minPeerBytes {
		bad("MaxPeerBytes of %d bytes, needs at least %d", c.MaxPeerBytes, minPeerBytes)
	}
	if c.MaxSocketBytes < 0 {
		bad("MaxSocketBytes of %d bytes", c.MaxSocketBytes)
	}
	if c.MaxSlabBytes != 0 && c.MaxSlabBytes < minSlabBytes {
		bad("MaxSlabBytes of %d bytes, needs at least %d", c.MaxSlabBytes, minSlabBytes)
	}
	if c.HoldBytes < 0 {
		bad("HoldBytes of %d", c.HoldBytes)
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("rds config: %w: %w", ErrInvalid, errors.Join(errs...))
}

// withDefaults is c with its zeros replaced.
func (c Config) withDefaults() Config {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.SendBuffer, DefaultBuffer)
	def(&c.ReceiveBuffer, DefaultBuffer)
	def(&c.MaxPeerBytes, DefaultMaxPeerBytes)
	def(&c.MaxSocketBytes, DefaultMaxSocketBytes)
	def(&c.MaxLentBytes, DefaultMaxLentBytes)
	def(&c.MaxReservedBytes, DefaultMaxReserved)
	def(&c.HoldBytes, DefaultHoldBytes)
	if c.HoldTime == 0 {
		c.HoldTime = DefaultHoldTime
	}
	if c.Linger == 0 {
		c.Linger = DefaultLinger
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	return c
}
