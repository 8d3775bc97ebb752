//go:build !linux

package slab

import "github.com/openrds/openrds/verbs"

func mapRegion() ([]byte, error) { return nil, verbs.ErrNotSupported }

func unmapRegion([]byte) error { return verbs.ErrNotSupported }
