//go:build unix

package rdsdebug

import (
	"io/fs"
	"strconv"
	"syscall"
)

// ownedBy reports whether a file is the user's, given as a number.
func ownedBy(st fs.FileInfo, uid string) bool {
	s, ok := st.Sys().(*syscall.Stat_t)
	return ok && strconv.FormatUint(uint64(s.Uid), 10) == uid
}
