//go:build !linux

package rawudp

import (
	"net/netip"
	"time"
)

// Sender and Receiver exist on Linux only.
type (
	Sender   struct{ other }
	Receiver struct{ other }
)

func NewSender(netip.Addr, netip.AddrPort, Options) (*Sender, error) { return nil, ErrNotSupported }
func NewReceiver(netip.AddrPort, Options) (*Receiver, error)         { return nil, ErrNotSupported }
func (*Sender) Send([]byte, bool) error                              { return ErrNotSupported }
func (*Sender) SendPackets(int, int) error                           { return ErrNotSupported }
func (*Sender) Drain() error                                         { return ErrNotSupported }
func (*Receiver) Recv([]byte) (int, error)                           { return 0, ErrNotSupported }
func (*Receiver) Discard(int) error                                  { return ErrNotSupported }

type other struct{}

func (other) Addr() netip.AddrPort        { return netip.AddrPort{} }
func (other) Stats() Stats                { return Stats{} }
func (other) SetDeadline(time.Time) error { return ErrNotSupported }
func (other) Close() error                { return nil }
