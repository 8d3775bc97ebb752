package rds_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/openrds/openrds/rds"
)

// Two sockets, here in one process. Nothing is connected: the first datagram makes the connection.
func Example() {
	ctx := context.Background()
	server, client := open(), open()
	defer server.Close()
	defer client.Close() // waits until everything is acknowledged

	s, err := server.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	c, err := client.ListenPacket(ctx, "127.0.0.32:0")
	check(err)

	_, err = c.WriteTo([]byte("hello"), s.LocalAddr())
	check(err)

	p := make([]byte, rds.MaxMessageSize)
	n, from, err := s.ReadFrom(p)
	check(err)
	_, err = s.WriteTo(append(p[:n], " yourself"...), from)
	check(err)

	n, _, err = c.ReadFrom(p)
	check(err)
	fmt.Printf("%s\n", p[:n])
	// Output: hello yourself
}

// Receive lends a datagram instead of copying it.
func ExampleSocket_Receive() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	a, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	b, err := svc.ListenPacket(ctx, "127.0.0.31:4001")
	check(err)
	check(a.Send(ctx, rds.Message{Peer: b.AddrPort(), Data: []byte("lent")}))

	m, err := b.Receive(ctx)
	check(err)
	fmt.Printf("%s from %v\n", m.Bytes(), m.Peer)
	m.Release()
	// Output: lent from 127.0.0.31:4000
}

// A write that waits in vain says for what.
func ExampleSocket_SetWriteDeadline() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	a, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	slow, err := svc.ListenPacket(ctx, "127.0.0.31:4001")
	check(err)
	check(slow.SetReadBuffer(1000))

	check(a.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)))
	for err == nil {
		_, err = a.WriteTo(make([]byte, 500), slow.LocalAddr())
	}
	fmt.Println(errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, rds.ErrCongested))
	// Output: true true
}

func open() *rds.Service {
	// Left out, the port is RoCEv2's own, 4791. Both ends must have the same.
	svc, err := rds.Open(rds.Config{UDPPort: uint16(20000 + os.Getpid()%10000)})
	check(err)
	return svc
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
