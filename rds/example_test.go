package rds_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/openrds/openrds/rds"
)

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

// A Dialer makes a net.Conn whose datagrams go to one destination.
func ExampleDialer() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	server, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)

	d := rds.Dialer{ListenConfig: rds.ListenConfig{Service: svc}}
	c, err := d.Dial("rds", "127.0.0.31:4000")
	check(err)
	_, err = c.Write([]byte("ping"))
	check(err)

	p := make([]byte, 100)
	n, from, err := server.ReadFrom(p)
	check(err)
	fmt.Println(string(p[:n]), from.String() == c.LocalAddr().String())
	// Output: ping true
}

// A write that does not wait says which port is congested, and when it is worth trying again.
func ExampleCongestedError() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	a, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	slow, err := svc.ListenPacket(ctx, "127.0.0.31:4001")
	check(err)
	check(slow.SetReadBuffer(1000))
	read := make(chan int)
	go func() {
		p := make([]byte, 500)
		for range 10 {
			time.Sleep(time.Millisecond)
			_, _, err := slow.ReadFrom(p)
			check(err)
		}
		read <- 10
	}()

	for sent := 0; sent < 10; {
		err := a.TrySend(rds.Message{Peer: slow.AddrPort(), Data: make([]byte, 500)})
		if congested, ok := errors.AsType[*rds.CongestedError](err); ok {
			<-congested.Ready() // or whatever else there is to do, in a select
			continue
		}
		check(err)
		sent++
	}
	fmt.Println("read:", <-read)
	// Output: read: 10
}

// Alloc saves the copy that Send makes of a payload, and Notify tells when the peer has it.
func ExampleSocket_Alloc() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	a, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	b, err := svc.ListenPacket(ctx, "127.0.0.31:4001")
	check(err)

	buf, err := a.Alloc(100_000)
	check(err)
	defer buf.Free() // nothing, once it was sent
	for _, piece := range buf.Buffers() {
		for i := range piece {
			piece[i] = 'x'
		}
	}
	check(a.Send(ctx, rds.Message{Peer: b.AddrPort(), Buffer: buf, Notify: true, Token: 7}))

	done, err := a.ReadCompletion(ctx)
	check(err)
	m, err := b.Receive(ctx)
	check(err)
	defer m.Release()
	fmt.Println(done.Token, done.Err(), m.Len())
	// Output: 7 <nil> 100000
}

// Many datagrams in one call.
func ExampleSocket_ReadBatch() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	a, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	b, err := svc.ListenPacket(ctx, "127.0.0.31:4001")
	check(err)

	out := []rds.BatchMessage{
		{Buffers: [][]byte{[]byte("one")}, Addr: b.AddrPort()},
		{Buffers: [][]byte{[]byte("header "), []byte("and body")}, Addr: b.AddrPort()},
	}
	_, err = a.WriteBatch(out, 0)
	check(err)

	in := make([]rds.BatchMessage, 8)
	for i := range in {
		in[i].Buffers = [][]byte{make([]byte, 1500)}
	}
	n, err := b.ReadBatch(in, 0) // waits for the first, not for the others
	check(err)
	for _, m := range in[:n] {
		fmt.Printf("%s\n", m.Buffers[0][:m.N])
	}
	// Output:
	// one
	// header and body
}

// An event loop polls a socket beside other descriptors.
func ExampleSocket_SyscallConn() {
	ctx := context.Background()
	svc := open()
	defer svc.Close()
	s, err := svc.ListenPacket(ctx, "127.0.0.31:4000")
	check(err)
	rc, err := s.SyscallConn()
	check(err)
	// rc.Control(func(fd uintptr) { ... epoll_ctl(epfd, EPOLL_CTL_ADD, fd, EPOLLIN) ... })

	_, err = s.WriteTo([]byte("to myself"), s.Addr())
	check(err)
	p := make([]byte, 100)
	err = rc.Read(func(uintptr) bool {
		n, from, err := s.TryReadFromAddrPort(p)
		if errors.Is(err, rds.ErrWouldBlock) {
			return false
		}
		check(err)
		fmt.Printf("%s from %v\n", p[:n], from)
		return true
	})
	check(err)
	// Output: to myself from 127.0.0.31:4000
}
