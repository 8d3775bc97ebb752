package main

import (
	"errors"
	"net/netip"
)

func openUDP(local netip.Addr) (transport, error) {
	return nil, errors.ErrUnsupported
}
