package main

import (
	"errors"
	"io"
	"testing"
	"time"
)

// nullFlow moves nothing: what is left is what measuring costs.
type nullFlow struct {
	side *side
	size int
	left int // calls until it ends the loop that uses it
	buf  []byte
}

func (f *nullFlow) buffer(size int) []byte {
	if f.buf == nil {
		f.buf = make([]byte, size)
	}
	return f.buf
}

func (f *nullFlow) send(int, bool) error {
	if f.left--; f.left == 0 {
		f.side.stopping.Store(true)
	}
	return nil
}

func (f *nullFlow) recv([]byte) (int, error) {
	if f.left--; f.left < 0 {
		return 0, io.EOF
	}
	return f.size, nil
}

func (f *nullFlow) setDeadline(time.Time) error { return nil }

func nullLane(messages int) *lane {
	s := newSide(spec{Transport: "null", Test: testThroughput, Size: 64, Sockets: 1}, true, nil)
	return &lane{side: s, flow: &nullFlow{side: s, size: 64, left: messages}}
}

// BenchmarkOverhead is what the loops of a throughput run cost per datagram on each side.
func BenchmarkOverhead(b *testing.B) {
	b.Run("send", func(b *testing.B) {
		b.ReportAllocs()
		if err := nullLane(b.N).send(); err != nil {
			b.Fatal(err)
		}
	})
	b.Run("receive", func(b *testing.B) {
		b.ReportAllocs()
		if err := nullLane(b.N).receive(); !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
	})
}

func TestOverheadAllocatesNothing(t *testing.T) {
	const messages = 10000
	for name, loop := range map[string]func(){
		"send":    func() { _ = nullLane(messages).send() },
		"receive": func() { _ = nullLane(messages).receive() },
	} {
		// The lane, its buffers and the error at the end, but nothing per datagram.
		if n := testing.AllocsPerRun(5, loop); n > 50 {
			t.Errorf("%s: %v allocations for %d datagrams", name, n, messages)
		}
	}
}
