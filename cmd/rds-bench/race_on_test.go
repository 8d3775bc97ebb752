//go:build race

package main

// bulk is the size of large messages in tests: under the race detector a checked megabyte takes longer than a run.
const bulk = 64 << 10
