package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// A streamFlow makes datagrams out of a stream of bytes: length, payload.
type streamFlow struct {
	w   io.Writer
	r   *bufio.Reader
	out []byte // length, payload
}

const streamHeaderBytes = 4 // big-endian length of the payload

func (f *streamFlow) buffer(size int) []byte {
	if len(f.out) < streamHeaderBytes+size {
		f.out = make([]byte, streamHeaderBytes+size)
	}
	return f.out[streamHeaderBytes:][:size]
}

func (f *streamFlow) send(n int, _ bool) error {
	binary.BigEndian.PutUint32(f.out, uint32(n))
	_, err := f.w.Write(f.out[:streamHeaderBytes+n])
	return err
}

func (f *streamFlow) recv(p []byte) (int, error) {
	h, err := f.r.Peek(streamHeaderBytes)
	if err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint32(h))
	if _, err := f.r.Discard(streamHeaderBytes); err != nil {
		return 0, err
	}
	if n > len(p) {
		return 0, fmt.Errorf("a message of %d bytes for a buffer of %d", n, len(p))
	}
	return io.ReadFull(f.r, p[:n])
}

// preambleBytes begin a connection: token of the run, index of the flow.
const preambleBytes = 10

func appendPreamble(b []byte, token uint64, flow int) []byte {
	b = binary.BigEndian.AppendUint64(b, token)
	return binary.BigEndian.AppendUint16(b, uint16(flow))
}

// readPreamble returns which flow of the run a connection is.
func readPreamble(r io.Reader, token uint64) (flow int, ok bool) {
	var pre [preambleBytes]byte
	if _, err := io.ReadFull(r, pre[:]); err != nil || binary.BigEndian.Uint64(pre[:]) != token {
		return 0, false
	}
	return int(binary.BigEndian.Uint16(pre[8:])), true
}
