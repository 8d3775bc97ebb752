package main

import (
	"errors"
	"net/netip"
)

func openRDS(local netip.Addr, dialect string) (transport, error) {
	return nil, errors.ErrUnsupported
}
