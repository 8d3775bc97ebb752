//go:build !race

package rds

const raceEnabled = false
