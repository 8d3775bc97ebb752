//go:build !linux

package main

import (
	"fmt"

	"github.com/openrds/openrds/rds"
)

func openKernelRDS() (stressHost, error) {
	return nil, fmt.Errorf("the kernel's RDS: %w", rds.ErrNotSupported)
}
