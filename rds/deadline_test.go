package rds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/conn"
)

// TestEveryWaitEnds: each call that waits, whatever it waits for, ends with a deadline that comes, with one that is moved into the past under
// it, and with Close; those with a context also with that. The error says which, and for what the call has waited.
func TestEveryWaitEnds(t *testing.T) {
	type call struct {
		name string
		run  func(ctx context.Context, s *Socket) error
		ctx  bool
	}
	var dest = ap(addrB, 5000)
	reads := []call{
		{"ReadFrom", func(_ context.Context, s *Socket) error { _, _, err := s.ReadFrom(nil); return err }, false},
		{"ReadFromAddrPort", func(_ context.Context, s *Socket) error { _, _, err := s.ReadFromAddrPort(nil); return err }, false},
		{"Read", func(_ context.Context, s *Socket) error { _, err := s.Read(nil); return err }, false},
		{"ReadMsg", func(_ context.Context, s *Socket) error { _, _, _, err := s.ReadMsg(nil, 0); return err }, false},
		{"ReadMsg, peek", func(_ context.Context, s *Socket) error { _, _, _, err := s.ReadMsg(nil, MsgPeek); return err }, false},
		{"ReadBatch", func(_ context.Context, s *Socket) error {
			_, err := s.ReadBatch(make([]BatchMessage, 3), 0)
			return err
		}, false},
		{"Receive", func(ctx context.Context, s *Socket) error { _, err := s.Receive(ctx); return err }, true},
		{"ReadCompletion", func(ctx context.Context, s *Socket) error { _, err := s.ReadCompletion(ctx); return err }, true},
		{"ReadCongestion", func(ctx context.Context, s *Socket) error { _, err := s.ReadCongestion(ctx); return err }, true},
	}
	writes := []call{
		{"WriteTo", func(_ context.Context, s *Socket) error {
			_, err := s.WriteTo([]byte{1}, AddrFromAddrPort(dest))
			return err
		}, false},
		{"WriteToAddrPort", func(_ context.Context, s *Socket) error { _, err := s.WriteToAddrPort([]byte{1}, dest); return err }, false},
		{"Write", func(_ context.Context, s *Socket) error { _, err := s.Write([]byte{1}); return err }, false},
		{"WriteBatch", func(_ context.Context, s *Socket) error {
			_, err := s.WriteBatch([]BatchMessage{{Buffers: [][]byte{{1}}, Addr: dest}, {}}, 0)
			return err
		}, false},
		{"Send", func(ctx context.Context, s *Socket) error { return s.Send(ctx, Message{Peer: dest, Data: []byte{1}}) }, true},
		{"Send, a Completion", func(ctx context.Context, s *Socket) error {
			return s.Send(ctx, Message{Peer: dest, Data: []byte{1}, Notify: true})
		}, true},
		{"Send, a SendBuf", func(ctx context.Context, s *Socket) error {
			b, err := s.Alloc(10)
			if err != nil {
				return err
			}
			defer b.Free()
			return s.Send(ctx, Message{Peer: dest, Buffer: b})
		}, true},
	}
	waits := []struct {
		name  string
		cause error
		calls []call
		make  func(t *testing.T, s *Socket, ta, tb *fakeTransport)
	}{
		{"nothing to read", nil, reads, func(*testing.T, *Socket, *fakeTransport, *fakeTransport) {}},
		{"send buffer", ErrNoBufferSpace, writes, func(t *testing.T, s *Socket, ta, _ *fakeTransport) {
			ta.withhold = true
			mustWrite(t, s, make([]byte, 1000), dest)
		}},
		{"share of it", ErrNoBufferSpace, writes, func(t *testing.T, s *Socket, ta, _ *fakeTransport) {
			ta.withhold = true
			mustWrite(t, s, nil, ap(addrC, 1))
			mustWrite(t, s, make([]byte, 500), dest)
		}},
		{"congestion", ErrCongested, writes, func(_ *testing.T, _ *Socket, _, tb *fakeTransport) { tb.SetCongested(addrB, 5000, true) }},
		{"memory", ErrNoBufferSpace, writes, func(_ *testing.T, _ *Socket, ta, _ *fakeTransport) {
			ta.mu.Lock()
			ta.sendErr = conn.ErrNoMemory
			ta.mu.Unlock()
		}},
	}
	ends := []struct {
		name string
		only bool // calls with a context
		end  func(s *Socket, cancel func()) (check func(err, cause error) bool)
	}{
		{"deadline", false, func(s *Socket, _ func()) func(error, error) bool {
			s.SetDeadline(time.Now().Add(time.Second))
			time.Sleep(time.Second)
			return expired
		}},
		{"deadline moved into the past", false, func(s *Socket, _ func()) func(error, error) bool {
			s.SetDeadline(time.Now().Add(time.Hour))
			time.Sleep(time.Second)
			s.SetDeadline(time.Unix(1, 0))
			return expired
		}},
		{"Close", false, func(s *Socket, _ func()) func(error, error) bool {
			time.Sleep(time.Second)
			s.Close()
			return func(err, _ error) bool { return errors.Is(err, ErrClosed) }
		}},
		{"context", true, func(_ *Socket, cancel func()) func(error, error) bool {
			time.Sleep(time.Second)
			cancel()
			return func(err, cause error) bool {
				return errors.Is(err, context.Canceled) && (cause == nil || errors.Is(err, cause)) && !errors.Is(err, os.ErrDeadlineExceeded)
			}
		}},
	}
	for _, w := range waits {
		for _, c := range w.calls {
			for _, e := range ends {
				if e.only && !c.ctx {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%s", w.name, c.name, e.name), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := newFakeNet()
						sa, ta := n.open(t, Config{SendBuffer: 1000})
						sb, tb := n.open(t, Config{})
						s := bind(t, sa, ap(addrA, 4000))
						bind(t, sb, dest)
						if err := s.ConnectAddrPort(dest); err != nil {
							t.Fatal(err)
						}
						w.make(t, s, ta, tb)
						ctx, cancel := context.WithCancel(t.Context())
						defer cancel()
						start := time.Now()
						errs := make(chan error, 1)
						go func() { errs <- c.run(ctx, s) }()
						synctest.Wait()
						check := e.end(s, cancel)
						synctest.Wait()
						select {
						case err := <-errs:
							if !check(err, w.cause) || !errors.As(err, new(*OpError)) || time.Since(start) != time.Second {
								t.Errorf("%v after %v", err, time.Since(start))
							}
						default:
							t.Error("it still waits")
							s.Close()
							<-errs
						}
						if !s.q.readers.empty() || !s.comp.readers.empty() || !s.mon.readers.empty() || !s.writers.empty() || !s.blocked.empty() {
							t.Error("somebody is still entered")
						}
						ta.mu.Lock()
						ta.sendErr = nil
						ta.mu.Unlock()
					})
				})
			}
		}
	}
}

// expired reports whether err is an expired deadline, for cause.
func expired(err, cause error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) && errors.Is(err, syscall.ETIMEDOUT) && (cause == nil || errors.Is(err, cause))
}
