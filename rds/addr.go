package rds

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

// Network is what [Addr.Network] says.
const Network = "rds"

// Port numbers with a meaning of their own (rds-protocol spec 1.1). The port space of an address is
// independent of TCP's and UDP's.
const (
	// PingPort answers every datagram with an empty one from port 0. It is never bound.
	PingPort = 0
	// ProbePort is reserved for the handshake of multipath transports. It is never bound.
	ProbePort = 1

	firstUserPort = 2
)

// Addr is the address of a socket. It is comparable; the zero Addr is no address. IPv4 addresses
// have one form only: an IPv4-mapped IPv6 address becomes IPv4.
type Addr struct {
	ap netip.AddrPort
}

// AddrFromAddrPort is the Addr of ap.
func AddrFromAddrPort(ap netip.AddrPort) Addr { return Addr{unmap(ap)} }

// ParseAddr parses "10.0.0.1:4000" or "[fd00::1]:4000".
func ParseAddr(s string) (Addr, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return Addr{}, err
	}
	if z := ap.Addr().Zone(); strings.ContainsAny(z, "[]") || !utf8.ValidString(z) { // netip lets it pass; as text it would not come back
		return Addr{}, fmt.Errorf("%w: zone %q", ErrInvalid, z)
	}
	return AddrFromAddrPort(ap), nil
}

// MustParseAddr is ParseAddr for constants; it panics where ParseAddr fails.
func MustParseAddr(s string) Addr {
	a, err := ParseAddr(s)
	if err != nil {
		panic(err)
	}
	return a
}

// AddrPort is the address as a netip value.
func (a Addr) AddrPort() netip.AddrPort { return a.ap }

// IsValid reports whether a is an address at all.
func (a Addr) IsValid() bool { return a.ap.IsValid() }

// Network is "rds".
func (a Addr) Network() string { return Network }

// String is host:port, always: "10.0.0.1:4000", "[fe80::1%eth0]:4000", and ":0" for the zero Addr, as of a zero net.UDPAddr.
func (a Addr) String() string {
	if !a.IsValid() {
		return ":0"
	}
	return a.ap.String()
}

// MarshalText is String's text, and empty for the zero Addr.
func (a Addr) MarshalText() ([]byte, error) {
	if !a.IsValid() {
		return nil, nil
	}
	return a.ap.MarshalText()
}

// UnmarshalText is the inverse of MarshalText.
func (a *Addr) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*a = Addr{}
		return nil
	}
	v, err := ParseAddr(string(text))
	if err == nil {
		*a = v
	}
	return err
}

// unmap gives ap the only form in which the package compares addresses: IPv4 as such, a zone where it has a
// meaning, and then by the interface's name ("%2" and "%eth0" are one scope).
func unmap(ap netip.AddrPort) netip.AddrPort {
	a := ap.Addr()
	if !a.Is4In6() && a.Zone() == "" {
		return ap
	}
	return netip.AddrPortFrom(canonical(a), ap.Port())
}

func canonical(a netip.Addr) netip.Addr {
	a = a.Unmap()
	zone := a.Zone()
	if zone == "" {
		return a
	}
	if !a.IsLinkLocalUnicast() {
		return a.WithZone("") // scope 0 (rds-protocol spec 1.2)
	}
	if i, err := strconv.Atoi(zone); err == nil {
		if ifc, err := net.InterfaceByIndex(i); err == nil {
			return a.WithZone(ifc.Name)
		}
	}
	return a
}

// toAddrPort takes Addr and whatever else knows its netip form (*net.UDPAddr, *net.TCPAddr). A nil pointer is no address.
func toAddrPort(a net.Addr) (netip.AddrPort, error) {
	port := 0 // where it may be one that AddrPort would cut
	switch a := a.(type) {
	case nil:
		return netip.AddrPort{}, ErrNotConnected
	case Addr:
		return a.ap, nil
	case *Addr:
		if a == nil {
			return netip.AddrPort{}, nil
		}
		return a.ap, nil
	case *net.UDPAddr:
		if a != nil {
			port = a.Port
		}
	case *net.TCPAddr:
		if a != nil {
			port = a.Port
		}
	}
	if port != int(uint16(port)) {
		return netip.AddrPort{}, fmt.Errorf("%w: port %d", ErrInvalid, port)
	}
	if a, ok := a.(interface{ AddrPort() netip.AddrPort }); ok {
		return unmap(a.AddrPort()), nil
	}
	return netip.AddrPort{}, fmt.Errorf("%w: %T is not an address of this network", ErrInvalid, a)
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// What is wrong with an address (rds-protocol spec 1.2 to 1.4). They match ErrInvalid, or another errno where the kernel's
// connect has one.
var (
	errNoAddress = &condition{text: "no address", errno: syscall.EINVAL, kind: ErrInvalid}
	errWildcard  = &condition{text: "wildcard address", errno: syscall.EINVAL, kind: ErrInvalid}
	errBroadcast = &condition{text: "broadcast address", errno: syscall.EINVAL, kind: ErrInvalid}
	errMulticast = &condition{text: "multicast address", errno: syscall.EINVAL, kind: ErrInvalid}
	errNoZone    = &condition{text: "link-local address without a zone", errno: syscall.EINVAL, kind: ErrInvalid}

	errConnectNoFamily = &condition{text: "no address", errno: syscall.EAFNOSUPPORT, kind: ErrInvalid}
	errConnectWildcard = &condition{text: "wildcard address", errno: syscall.EDESTADDRREQ, kind: ErrInvalid}
	errConnectUnicast6 = &condition{text: "not a unicast address", errno: syscall.EPROTOTYPE, kind: ErrInvalid}
)

// checkUnicast refuses what neither bind nor connect nor send take (rds-protocol spec 1.2 to 1.4). a is unmapped.
func checkUnicast(a netip.Addr) error {
	switch {
	case !a.IsValid():
		return errNoAddress
	case a.IsUnspecified():
		return errWildcard
	case a == broadcast4:
		return errBroadcast
	case a.IsMulticast():
		return errMulticast
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		return errNoZone
	}
	return nil
}

// checkConnect is the part of connect's rules that concerns the destination alone (rds-protocol spec 1.3). to is unmapped.
func checkConnect(to netip.Addr) error {
	switch err := checkUnicast(to); {
	case err == errNoAddress:
		return errConnectNoFamily
	case err == errWildcard && to.Is4():
		return errConnectWildcard
	case (err == errWildcard || err == errMulticast) && to.Is6():
		return errConnectUnicast6
	default:
		return err
	}
}

// checkBind is the part of bind's rules that needs no tables (rds-protocol spec 1.2). ap is unmapped.
func checkBind(ap netip.AddrPort) error {
	if err := checkUnicast(ap.Addr()); err != nil {
		return err
	}
	if ap.Port() == ProbePort {
		return fmt.Errorf("%w: port 1 is reserved", ErrInvalid)
	}
	return nil
}

// checkDest is the part of send's rules that needs no tables: a destination is a unicast address of
// the socket's IP version, and link-local zones do not mix (rds-protocol spec 1.4 steps 3, 6 and 7). to is
// unmapped. Any port is legal: 0 is a ping.
func checkDest(local, to netip.Addr) error {
	if err := checkUnicast(to); err != nil {
		return err
	}
	if local.Is4() != to.Is4() {
		return fmt.Errorf("%w: destination and socket are of different IP versions", ErrNotSupported)
	}
	if lz, tz := local.Zone(), to.Zone(); lz != "" && tz != "" && lz != tz {
		return fmt.Errorf("%w: destination and socket are in different zones", ErrInvalid)
	}
	return nil
}
