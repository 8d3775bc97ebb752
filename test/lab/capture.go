//go:build linux

package lab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Capture is a capture of the lab's link, what guests say to each other included, to a pcap file of whole Ethernet
// frames with times in microseconds.
type Capture struct {
	file *os.File
	sock *os.File
	done chan struct{}
	err  error // valid when done is closed
	once sync.Once
}

// snapLen is above any frame of a link of ours.
const snapLen = 1 << 16

// StartCapture captures to the file path until Close.
func StartCapture(path string) (*Capture, error) {
	ifi, err := net.InterfaceByName(HostLink)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	sock := os.NewFile(uintptr(fd), "packet socket") // by the poller, so that Close ends a read
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		sock.Close()
		return nil, fmt.Errorf("capture: %w", err)
	}
	// A bridge shows what it forwards only to those who want to see everything.
	promisc := &unix.PacketMreq{Ifindex: int32(ifi.Index), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, promisc); err != nil {
		sock.Close()
		return nil, fmt.Errorf("capture: %w", err)
	}
	file, err := os.Create(path)
	if err != nil {
		sock.Close()
		return nil, fmt.Errorf("capture: %w", err)
	}
	c := &Capture{file: file, sock: sock, done: make(chan struct{})}
	go c.run()
	return c, nil
}

func (c *Capture) run() {
	defer close(c.done)
	w := bufio.NewWriterSize(c.file, 1<<20)
	le := binary.LittleEndian
	// magic, version 2.4, zone, accuracy, snapshot length, link type Ethernet
	hdr := le.AppendUint32(nil, 0xa1b2c3d4)
	hdr = le.AppendUint16(le.AppendUint16(hdr, 2), 4)
	hdr = le.AppendUint32(le.AppendUint32(le.AppendUint32(le.AppendUint32(hdr, 0), 0), snapLen), 1)
	_, c.err = w.Write(hdr)
	buf := make([]byte, snapLen)
	for c.err == nil {
		n, err := c.sock.Read(buf)
		if errors.Is(err, unix.ENETDOWN) { // the link was taken down; it may come back
			continue
		}
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				c.err = err
			}
			break
		}
		now := time.Now()
		rec := le.AppendUint32(nil, uint32(now.Unix()))
		rec = le.AppendUint32(rec, uint32(now.Nanosecond()/1000))
		rec = le.AppendUint32(le.AppendUint32(rec, uint32(n)), uint32(n))
		if _, err := w.Write(rec); err != nil {
			c.err = err
			break
		}
		if _, err := w.Write(buf[:n]); err != nil {
			c.err = err
		}
	}
	c.err = errors.Join(c.err, w.Flush(), c.file.Close())
}

// Close ends the capture and completes the file. Twice is once.
func (c *Capture) Close() error {
	c.once.Do(func() { c.sock.Close() })
	<-c.done
	return c.err
}
