//go:build !linux

package pagemem

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

var (
	errClosed  = net.ErrClosed
	errFault   = errors.New("bad address")
	errInvalid = error(syscall.EINVAL)
)

// PageSize is the host's page size in bytes.
func PageSize() int { return os.Getpagesize() }

// Supported is nil where Open will work; otherwise it says why not, as Open does.
func Supported() error { return fmt.Errorf("userfaultfd is Linux's: %w", errors.ErrUnsupported) }

type eventSource struct{}

func (eventSource) close() error { return nil }

func (m *Memory) open(int) error                          { return Supported() }
func (m *Memory) populate(int, int, bool) error           { return Supported() }
func (m *Memory) resident(int, int, func(_, _ int)) error { return Supported() }
func (m *Memory) discard([]byte) error                    { return Supported() }
func (m *Memory) release(int, int)                        {}

func unmap(uintptr, int) error { return nil }
func unmapBytes([]byte) error  { return nil }
