//go:build !linux

package rds

func newEventfd() (int, error) { return -1, ErrNotSupported }

func eventfdSet(int)   {}
func eventfdClear(int) {}
func eventfdClose(int) {}
