//go:build !linux

package main

import "time"

// A pacer sleeps as exactly as it can.
type pacer struct{}

func newPacer() *pacer               { return &pacer{} }
func (*pacer) sleep(d time.Duration) { time.Sleep(d) }
func (*pacer) close()                {}
