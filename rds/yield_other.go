//go:build !linux

package rds

func osYield() {}
