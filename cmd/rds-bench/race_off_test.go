//go:build !race

package main

// bulk is the size of large messages in tests.
const bulk = 1 << 20
