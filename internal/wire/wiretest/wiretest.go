// Package wiretest gives tests the packets of real captures, and bytes written as hex.
package wiretest

import (
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"
)

//go:embed testdata/*.pcap.gz
var captures embed.FS

// IP protocols.
const (
	TCP = 6
	UDP = 17
)

// Packet is a captured IPv4 packet with a UDP or TCP header.
type Packet struct {
	N        int // number in the capture, from 1
	Time     time.Time
	IP       []byte
	Proto    uint8
	Src, Dst netip.AddrPort
	ID       uint16 // IPv4 identification
	TCPSeq   uint32
	TCPFlags uint8
	Payload  []byte // of UDP or TCP
}

// Capture returns the IPv4 UDP and TCP packets of a capture: "rds-ib", "rds-tcp", "rxe-ops".
func Capture(tb testing.TB, name string) []Packet {
	tb.Helper()
	f, err := captures.Open("testdata/" + name + ".pcap.gz")
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		tb.Fatal(err)
	}
	const magic, ethernet = 0xA1B2C3D4, 1
	if binary.LittleEndian.Uint32(b) != magic || binary.LittleEndian.Uint32(b[20:]) != ethernet {
		tb.Fatalf("%s: not a little-endian Ethernet pcap", name)
	}
	var ps []Packet
	for n, b := 1, b[24:]; len(b) > 0; n++ {
		at := time.Unix(int64(binary.LittleEndian.Uint32(b)), int64(binary.LittleEndian.Uint32(b[4:]))*1000)
		size := binary.LittleEndian.Uint32(b[8:])
		frame := b[16 : 16+size]
		b = b[16+size:]
		if p, ok := parse(frame); ok {
			p.N, p.Time = n, at
			ps = append(ps, p)
		}
	}
	if len(ps) == 0 {
		tb.Fatalf("%s: no packets", name)
	}
	return ps
}

func parse(frame []byte) (p Packet, ok bool) {
	const ethLen, ip4 = 14, 0x0800
	if binary.BigEndian.Uint16(frame[12:]) != ip4 {
		return p, false
	}
	ip := frame[ethLen:]
	ip = ip[:binary.BigEndian.Uint16(ip[2:])] // not the Ethernet padding
	p = Packet{IP: ip, Proto: ip[9], ID: binary.BigEndian.Uint16(ip[4:])}
	l4 := ip[ip[0]&15*4:]
	switch p.Proto {
	case UDP:
		p.Payload = l4[8:]
	case TCP:
		p.TCPSeq, p.TCPFlags = binary.BigEndian.Uint32(l4[4:]), l4[13]
		p.Payload = l4[l4[12]>>4*4:]
	default:
		return p, false
	}
	p.Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[12:])), binary.BigEndian.Uint16(l4))
	p.Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[16:])), binary.BigEndian.Uint16(l4[2:]))
	return p, true
}

// Streams reassembles the TCP streams of ps, one per direction of a connection, in order of their
// first packet. Retransmissions are dropped; a gap ends the stream.
func Streams(ps []Packet) [][]byte {
	type key struct{ src, dst netip.AddrPort }
	type stream struct {
		next uint32
		data *bytes.Buffer
	}
	const fin, syn = 1, 2
	open := map[key]*stream{}
	var all []*stream
	for _, p := range ps {
		if p.Proto != TCP {
			continue
		}
		k := key{p.Src, p.Dst}
		if p.TCPFlags&syn != 0 {
			s := &stream{next: p.TCPSeq + 1, data: new(bytes.Buffer)}
			open[k] = s
			all = append(all, s)
			continue
		}
		s := open[k]
		if s == nil {
			continue
		}
		if skip := int32(s.next - p.TCPSeq); skip >= 0 && int(skip) < len(p.Payload) {
			s.data.Write(p.Payload[skip:])
			s.next = p.TCPSeq + uint32(len(p.Payload))
		}
		if p.TCPFlags&fin != 0 {
			delete(open, k)
		}
	}
	var out [][]byte
	for _, s := range all {
		out = append(out, s.data.Bytes())
	}
	return out
}

// Hex is the bytes written in s; white space does not count.
func Hex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}
