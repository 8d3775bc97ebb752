package slab

import "golang.org/x/sys/unix"

// mapRegion maps RegionSize bytes. Pages come into being when first touched.
func mapRegion() ([]byte, error) {
	return unix.Mmap(-1, 0, RegionSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
}

func unmapRegion(mem []byte) error { return unix.Munmap(mem) }
