package softroce

import (
	"testing"

	"github.com/openrds/openrds/internal/psn"
	"github.com/openrds/openrds/internal/wire/roce"
	"github.com/openrds/openrds/verbs"
)

// hostileOps are what a fuzzer's bytes are made of: a request or response with a right ICRC to the live QP, a
// mutant of one, or raw bytes.
const (
	hostileValid = iota
	hostileMutant
	hostileRaw
	hostileKinds
)

// FuzzPacket throws packets at a QP with work outstanding in both directions: half of them with a
// right ICRC, the live QPN and a PSN in the window. Whatever comes, nothing panics, and in the end
// everything can be closed with nothing held.
func FuzzPacket(f *testing.F) {
	f.Add([]byte{0, byte(roce.RCSendOnly), 0x80, 0, 10, 1, 2, 3})
	f.Add([]byte{0, byte(roce.RCWriteFirst), 0, 1, 20, 0, byte(roce.RCWriteLast), 1, 1, 4})
	f.Add([]byte{0, byte(roce.RCReadRequest), 0, 1, 0, 0, byte(roce.RCReadRequest), 0xff, 1, 0})
	f.Add([]byte{0, byte(roce.RCAck), 0, 0x1f, 0, 0, byte(roce.RCAck), 2, 0x60, 0, 0, byte(roce.RCAck), 1, 0x21, 0})
	f.Add([]byte{0, byte(roce.RCReadRespOnly), 3, 0x1f, 200, 0, byte(roce.RCAtomicAck), 4, 0x1f, 0})
	f.Add([]byte{1, byte(roce.RCSendOnly), 0, 9, 3, 7, 2, 0x64, 0, 0, 0, 1})
	f.Add([]byte{0, byte(roce.RCReadRequest), 0, 0x10, 200, 0, byte(roce.RCSendOnlyInv), 0, 0x10, 9, 0, 0, byte(roce.RCReadRequest), 0xff, 0x10, 200, 0})
	f.Add([]byte{0, byte(roce.RCWriteFirst), 0, 0x20, 3, 0, 0, byte(roce.RCWriteMiddle), 0, 0, 0, 0, 0, byte(roce.RCSendOnlyInv), 0, 0x20, 9, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		n := &scriptNet{}
		tc := hostileContext(t, n)
		next := func() byte {
			if len(in) == 0 {
				return 0
			}
			b := in[0]
			in = in[1:]
			return b
		}
		for round := 0; len(in) > 0 && round < 64; round++ {
			kind, op, d, arg, size := next()%hostileKinds, roce.Opcode(next()), int8(next()), next(), int(next())
			p := rx(0).Add(int(d))
			if op.Info().Flags&roce.FlagResponse != 0 {
				p = tx(0).Add(int(d))
			}
			q := tc.qp.(*qp)
			tc.dev.role.Lock()
			if op.Info().Flags&roce.FlagResponse == 0 && d >= 0 {
				p = q.epsn.Add(int(d) & 3)
			}
			tc.dev.role.Unlock()
			tc.injectNow(hostilePacket(tc, kind, op, p, arg, size, next()))
		}
		tc.close()
	})
}

func hostilePacket(tc *testContext, kind byte, op roce.Opcode, p psn.PSN, arg byte, size int, mut byte) []byte {
	info := op.Info()
	ext := make([]byte, info.HdrLen-roce.BTHLen)
	switch {
	case info.Flags&(roce.FlagRETH|roce.FlagAtomicETH) != 0:
		roce.PutRETH(ext, testIOVA+uint64(arg&3)*(1<<19), hostileKey(tc, arg), uint32(size)<<(arg&15))
	case info.Flags&roce.FlagInv != 0:
		roce.PutIETH(ext, hostileKey(tc, arg))
	case info.Flags&roce.FlagAETH != 0:
		ext[0] = arg
	}
	if info.Flags&roce.FlagNoPayload != 0 {
		size = 0
	} else if info.Flags&roce.FlagFullMTU != 0 && arg&1 == 0 {
		size = 256
	}
	b := tc.packet(op, uint32(tc.qp.Num()), p, mut&1 != 0, ext, make([]byte, size))
	switch kind {
	case hostileMutant:
		b[int(mut)%len(b)] ^= arg | 1
		if u := len(b); arg&2 != 0 { // ICRC computed again
			roce.PutICRC(b[u-roce.ICRCLen:], tc.flow.Begin(u, b[:u-roce.ICRCLen]))
		}
	case hostileRaw:
		b = b[:int(mut)%len(b)]
	}
	return b
}

// hostileKey is one of the keys there are, or one close by.
func hostileKey(tc *testContext, arg byte) uint32 {
	return uint32(tc.keys[int(arg>>4&3)%len(tc.keys)]) ^ uint32(arg>>6)
}

// hostileContext has a SEND, a READ and an atomic outstanding, and a SEND from a region that is to be freed behind
// it; receives posted, also into that region, a window bound, and every remote right granted.
func hostileContext(t *testing.T, n *scriptNet) *testContext {
	tc := newTestContextOn(t, Config{GiveUp: 1 << 40}, n)
	tc.postRecv(verbs.RecvWR{ID: 1, SGs: tc.sge(0, 300)}, verbs.RecvWR{ID: 2, SGs: tc.sge(300, 1000)}, verbs.RecvWR{ID: 3}, verbs.RecvWR{ID: 4, SGs: tc.sge(0, 100)})
	if _, err := tc.qp.PostSend([]verbs.SendWR{
		send(5, tc.sge(0, 600)),
		{ID: 6, Opcode: verbs.OpRead, SGs: tc.sge(4096, 600), RemoteAddr: 1, RKey: 2},
		{ID: 7, Opcode: verbs.OpFetchAdd, SGs: tc.sge(8192, 8), RemoteAddr: 8, RKey: 2},
		send(8, tc.sge(0, 10)),
	}); err != nil {
		t.Fatal(err)
	}
	r, w := tc.fast(2), tc.window(verbs.MWType2A)
	reg := r.reg(9, accessAll)
	reg.FastReg.IOVA = testIOVA
	bind := bindWR(10, w, tc.mr, testIOVA, 1<<19, accessRemote)
	from := []verbs.SGE{{Addr: testIOVA, Length: 700, LKey: verbs.LKey(r.key)}}
	if _, err := tc.qp.PostSend([]verbs.SendWR{reg, bind, send(11, from), r.inv(12)}); err != nil {
		t.Fatal(err)
	}
	tc.postRecv(verbs.RecvWR{ID: 13, SGs: from})
	tc.keys = []verbs.RKey{tc.mr.RKey(), r.key, bind.Bind.Key}
	tc.more = append(tc.more, func() error { r.free(); return nil }, w.Dealloc)
	return tc
}

// injectNow is inject outside a bubble.
func (tc *testContext) injectNow(b []byte) {
	tc.conn.mu.Lock()
	tc.conn.in = append(tc.conn.in, b)
	tc.conn.out = tc.conn.out[:0]
	tc.conn.mu.Unlock()
	tc.dev.role.Lock()
	tc.dev.step(engineStep)
	tc.dev.unlockRole()
}
