package rds

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

func newEventfd() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) }

// eventfdSet makes fd readable, and wakes who polls it though it is. It cannot fail: the counter has 64 bits.
func eventfdSet(fd int) {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.Write(fd, one[:])
}

// eventfdClear makes it not readable.
func eventfdClear(fd int) {
	var n [8]byte
	unix.Read(fd, n[:])
}

func eventfdClose(fd int) { unix.Close(fd) }
