package rds_test

import (
	"context"
	"fmt"
	"log"
	"os"

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

// open and check are what the other examples use as well.
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
