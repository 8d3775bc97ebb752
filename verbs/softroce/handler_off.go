//go:build !invariants

package softroce

// inHandlerMark tells, in invariant builds, whether a goroutine is inside a handler.
type inHandlerMark struct{}

func (inHandlerMark) enterHandler()  {}
func (inHandlerMark) leaveHandler()  {}
func (inHandlerMark) mayWait(string) {}
