package rds_test

import (
	"context"
	"fmt"

	"github.com/openrds/openrds/rds"
)

// A client hands out memory with its request; the server writes to it, and says so with its reply.
func ExampleSocket_SendMapped() {
	ctx := context.Background()
	here, there := open(), open()
	defer there.Close()
	defer here.Close()
	client, err := here.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	server, err := there.ListenPacket(ctx, "127.0.0.32:4000")
	check(err)

	buf := make([]byte, 100000)
	region, err := client.SendMapped(ctx, rds.Message{Peer: server.AddrPort(), Data: []byte("page 7, please")}, buf,
		rds.RegionOptions{UseOnce: true, Invalidate: true})
	check(err)

	// The server:
	m, err := server.Receive(ctx)
	check(err)
	pages, err := server.RegisterRegion(ctx, make([]byte, 1<<20), rds.RegionOptions{})
	check(err)
	n := copy(pages.Bytes(), "the content of page 7")
	check(server.Send(ctx, rds.Message{Peer: m.Peer, Data: []byte("here it is"),
		RDMA: &rds.RDMA{Op: rds.RDMAWrite, Local: []rds.Piece{pages.Piece(0, n)}, Remote: m.Cookie, Notify: true, Token: 7}}))
	m.Release()
	c, err := server.ReadCompletion(ctx)
	check(err)
	fmt.Println("page", c.Token, c.Status)

	// The client:
	m, err = client.Receive(ctx)
	check(err)
	<-region.Done() // it was for one use: the memory is the client's alone again
	fmt.Printf("%s: %s\n", m.Bytes(), buf[:n])
	m.Release()
	// Output:
	// page 7 success
	// here it is: the content of page 7
}
