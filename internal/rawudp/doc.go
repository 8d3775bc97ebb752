// Package rawudp moves bytes over UDP as fast as a Go program can and still call it RoCE: packets
// with a BTH and an ICRC that is computed and checked, a window, acknowledgements, going back after a loss, and nothing
// else. No queue pairs, no work requests, no completions, no connection management.
//
// It is a measuring rod, not a transport. Its benchmarks are the limit that softroce is held
// against (a softroce figure above it means that the benchmark is wrong), and rds-bench
// offers it as the baseline "udp".
//
// A [Sender] and a [Receiver] are one direction of traffic between two processes. Each belongs to one
// goroutine, except Close and SetDeadline. They use blocking system calls: a goroutine that
// waits for the network occupies a thread, which is what makes the wakeup as cheap as it gets.
//
// Limitations: Linux, IPv4. A stranger's packet with a right ICRC and the expected PSN is taken for the
// sender's.
package rawudp

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
)

// MaxMessageBytes is the largest message of Sender.Send.
const MaxMessageBytes = 1 << 20

var (
	ErrClosed       = net.ErrClosed
	ErrNotSupported = errors.ErrUnsupported
	ErrDeadline     = os.ErrDeadlineExceeded
)

// Options choose how a Sender and a Receiver use the kernel. The zero value is the fastest way known.
type Options struct {
	NoGSO bool // one datagram per message of sendmmsg
	NoGRO bool // receive datagrams one by one
	// Slots is the window in trains of up to 64 packets or 64 KiB. 0 means 16.
	Slots int
}

const (
	defaultSlots     = 16
	socketBufferSize = 4 << 20 // asked for; the kernel may grant less
)

// counters are Stats that another goroutine may read; packets is stored once per batch.
type counters struct {
	packets, retransmits, badICRC, outOfOrder, duplicates atomic.Uint64
}

// Stats is a snapshot, by any goroutine. Packets may lag behind by what is not flushed yet.
func (c *counters) Stats() Stats {
	return Stats{
		Packets: c.packets.Load(), Retransmits: c.retransmits.Load(), BadICRC: c.badICRC.Load(),
		OutOfOrder: c.outOfOrder.Load(), Duplicates: c.duplicates.Load(),
	}
}

// Stats are running counts.
type Stats struct {
	Packets     uint64 // sent for the first time, or accepted
	Retransmits uint64 // sent again
	BadICRC     uint64
	OutOfOrder  uint64 // behind a gap
	Duplicates  uint64
}
