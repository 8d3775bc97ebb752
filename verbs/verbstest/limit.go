package verbstest

import (
	"errors"
	"fmt"

	"github.com/openrds/openrds/verbs"
)

func limitCases() []testcase {
	return []testcase{
		{"DeviceAttributes", deviceAttr},
		{"Capabilities", capabilities},
		{"SendQueueFull", sendQueueFull},
		{"ReceiveQueueFull", recvQueueFull},
		{"TooManySGEs", tooManySGEs},
		{"BadRequests", badRequests},
		{"BadConfigs", badConfigs},
		{"BadRegistrations", badRegistrations},
		{"ObjectsOfAnotherDevice", foreignObjects},
		{"SGEsAtTheLimit", sgesAtLimit},
		{"OpenUnknownAddress", openUnknown},
		{"OpenTwice", openTwice},
	}
}

func deviceAttr(l *lab) {
	for _, n := range []*node{l.a, l.b} {
		a := n.dev.Attr()
		if a.MaxQP < 2 || a.MaxQPWR < 64 || a.MaxSGE < 4 || a.MaxCQ < 2 || a.MaxCQE < 256 || a.MaxMR < 2 || a.MaxSRQ < 1 || a.MaxSRQWR < 32 {
			l.Errorf("%s: the limits leave room for work: %+v", n.name, a)
		}
		if a.ActiveMTU.Bytes() == 0 || a.MaxMsgBytes < 1<<20 || a.MaxRDAtomic < 1 || a.GUID == 0 {
			l.Errorf("%s: MTU, message size, READ depth and GUID are set: %+v", n.name, a)
		}
		if n.dev.Addr() != l.env.Addrs[0] && n.dev.Addr() != l.env.Addrs[1] || n.dev.Name() == "" {
			l.Errorf("%s: the device knows its address and name: %v, %q", n.name, n.dev.Addr(), n.dev.Name())
		}
	}
	if l.a.dev.Attr().GUID == l.b.dev.Attr().GUID {
		l.Error("devices have GUIDs of their own")
	}
	if l.a.dev.Name() == l.b.dev.Name() {
		l.Error("devices have names of their own")
	}
	if l.env.Provider.Name() == "" {
		l.Error("the provider has a name")
	}
}

// capabilities: what a device says it has fits the limits it gives, and what it lacks it refuses.
func capabilities(l *lab) {
	for _, n := range []*node{l.a, l.b} {
		a := n.dev.Attr()
		if has := a.Caps&verbs.CapMemMgtExtensions != 0; has != (a.MaxFastRegPageListLen > 0) {
			l.Errorf("%s: fast registration is announced with its largest list: %#x, %d", n.name, a.Caps, a.MaxFastRegPageListLen)
		} else if !has {
			_, err := n.pd.AllocFastRegMR(1)
			l.wantErr("a region for fast registration", err, verbs.ErrNotSupported)
			_, err = n.pd.AllocPageList(1)
			l.wantErr("a page list", err, verbs.ErrNotSupported)
		}
		if a.Caps&verbs.CapReadWithInv != 0 && a.Caps&verbs.CapMemMgtExtensions == 0 {
			l.Errorf("%s: READ with invalidate has nothing to invalidate", n.name)
		}
		mws := false
		for t, c := range capOfMW {
			if a.Caps&c == 0 {
				_, err := n.pd.AllocMW(t)
				l.wantErr(t.String()+" window", err, verbs.ErrNotSupported)
			}
			mws = mws || a.Caps&c != 0
		}
		if mws != (a.MaxMW > 0) {
			l.Errorf("%s: windows are announced with their number: %#x, %d", n.name, a.Caps, a.MaxMW)
		}
		if a.Caps&verbs.CapOnDemandPaging == 0 {
			_, err := n.pd.RegOnDemandMR(nil, 0, verbs.AccessLocalWrite)
			l.wantErr("on-demand registration", err, verbs.ErrNotSupported)
			l.wantErr("advice", n.pd.AdviseMR(verbs.AdvisePrefetch, nil), verbs.ErrNotSupported)
		}
	}
	p := l.pair()
	mem := l.a.region(8, verbs.AccessLocalWrite)
	for op := verbs.OpSend; op <= verbs.OpBindMW; op++ {
		if l.a.lacks(op) {
			n, err := p.a.qp.PostSend([]verbs.SendWR{sendWR(1, nil), {ID: 2, Opcode: op, Flags: verbs.SendSignaled, SGs: []verbs.SGE{mem.sge(0, 8)}}})
			if n != 1 {
				l.Errorf("%v: %d requests were taken", op, n)
			}
			l.wantErr(op.String(), err, verbs.ErrNotSupported)
			p.b.recvEmpty(1)
			p.a.wantSent("what was before it", 1, verbs.WCSend)
			p.b.wantRecvd("what was before it", 1, 0)
		}
	}
}

// sendQueueFull fills the queue of a QP whose peer takes nothing.
func sendQueueFull(l *lab) {
	const depth = 16
	p := l.pair(func(k *link) { k.cfgA.MaxSendWR, k.rnrTimer = depth, 12 })
	wrs := make([]verbs.SendWR, 100*depth)
	for i := range wrs {
		wrs[i] = sendWR(uint64(i), nil)
	}
	n, err := p.a.qp.PostSend(wrs)
	if n < depth || n == len(wrs) {
		l.Fatalf("a send queue of %d took %d requests", depth, n)
	}
	l.wantErr("posting more than fits", err, verbs.ErrSQFull)
	if more, err := p.a.qp.PostSend(wrs[n:]); more != 0 || !errors.Is(err, verbs.ErrSQFull) {
		l.Fatalf("posting to a full queue: took %d, %v", more, err)
	}
	for i := range n {
		p.b.recvEmpty(uint64(i))
		p.a.wantSent("what it took is sent in order", uint64(i), verbs.WCSend)
		p.b.wantRecvd("what it took is sent in order", uint64(i), 0)
	}
	p.a.wantQuiet("what it refused is not")
	p.b.recvEmpty(1)
	p.a.send(sendWR(1, nil))
	p.a.wantSent("polled completions make room", 1, verbs.WCSend)
}

func recvQueueFull(l *lab) {
	const depth = 16
	p := l.pair(func(k *link) { k.cfgB.MaxRecvWR = depth })
	wrs := make([]verbs.RecvWR, 100*depth)
	for i := range wrs {
		wrs[i] = verbs.RecvWR{ID: uint64(i)}
	}
	n, err := p.b.qp.PostRecv(wrs)
	if n < depth || n == len(wrs) {
		l.Fatalf("a receive queue of %d took %d requests", depth, n)
	}
	l.wantErr("posting more than fits", err, verbs.ErrRQFull)
	for i := range n {
		p.ping(0)
		p.b.wantRecvd("what it took is used in order", uint64(i), 0)
	}
	p.b.recvEmpty(1)
}

func tooManySGEs(l *lab) {
	p := l.pair(func(k *link) {
		k.cfgA.MaxSendSGE, k.cfgA.MaxRecvSGE = 3, 2
		k.cfgB.MaxRecvWR = 4
	})
	r := l.a.region(64, verbs.AccessLocalWrite)
	sgs := []verbs.SGE{r.sge(0, 1), r.sge(1, 1), r.sge(2, 1), r.sge(3, 1), r.sge(4, 1), r.sge(5, 1), r.sge(6, 1), r.sge(7, 1)}
	p.b.recvEmpty(20)
	n, err := p.a.qp.PostSend([]verbs.SendWR{sendWR(1, nil), sendWR(2, sgs), sendWR(3, nil)})
	if n != 1 {
		l.Fatalf("a request with too many SGEs stops the batch: took %d, want 1", n)
	}
	l.wantErr("a send with too many SGEs", err, verbs.ErrInvalid)
	p.a.wantSent("what is before it is sent", 1, verbs.WCSend)
	n, err = p.a.qp.PostRecv([]verbs.RecvWR{{ID: 1}, {ID: 2, SGs: sgs}, {ID: 3}})
	if n != 1 {
		l.Fatalf("a request with too many SGEs stops the batch: took %d, want 1", n)
	}
	l.wantErr("a receive with too many SGEs", err, verbs.ErrInvalid)
	p.a.to(verbs.StateErr)
	p.a.wantRecvStatus("what is before it was posted", verbs.WCFlushErr, 1)
	p.a.wantQuiet("and nothing else")
}

func badRequests(l *lab) {
	p := l.pair()
	r, target := l.a.region(64, verbs.AccessLocalWrite), l.b.region(64, allAccess)
	refuse := func(what string, wr verbs.SendWR) {
		l.Helper()
		n, err := p.a.qp.PostSend([]verbs.SendWR{wr})
		if n != 0 {
			l.Fatalf("%s was taken", what)
		}
		l.wantErr(what, err, verbs.ErrInvalid)
	}
	refuse("opcode 0", verbs.SendWR{})
	refuse("an unknown opcode", verbs.SendWR{Opcode: 200})
	for _, op := range []verbs.SendOpcode{verbs.OpFetchAdd, verbs.OpCompareSwap} {
		if l.a.lacks(op) {
			continue
		}
		for _, n := range []int{0, 4, 7, 9, 16} {
			refuse(fmt.Sprintf("a %v with a result of %d bytes", op, n), remoteWR(1, op, r.sg(0, n), target, 0))
		}
	}
	huge := []verbs.SGE{{Addr: r.addr(0), Length: 1 << 31, LKey: r.mr.LKey()}, {Addr: r.addr(0), Length: 1, LKey: r.mr.LKey()}}
	refuse("a message over 2 GiB", sendWR(1, huge))
	if n, err := p.a.qp.PostSend(nil); n != 0 || err != nil {
		l.Fatalf("an empty batch: %d, %v", n, err)
	}
	if n, err := p.a.qp.PostRecv(nil); n != 0 || err != nil {
		l.Fatalf("an empty batch: %d, %v", n, err)
	}
	p.b.recvEmpty(20)
	p.ping(0)
	p.b.wantRecvd("the QP has not noticed", 20, 0)
}

func badConfigs(l *lab) {
	attr := l.a.dev.Attr()
	for _, depth := range []int{0, -1, attr.MaxCQE + 1} {
		_, err := l.a.dev.CreateCQ(verbs.CQConfig{Depth: depth})
		l.wantErr(fmt.Sprintf("a CQ of depth %d", depth), err, verbs.ErrInvalid)
	}
	for _, c := range []verbs.SRQConfig{{MaxWR: 0}, {MaxWR: -1}, {MaxWR: attr.MaxSRQWR + 1}, {MaxWR: 1, MaxSGE: attr.MaxSGE + 1}, {MaxWR: 1, MaxSGE: -1}} {
		_, err := l.a.pd.CreateSRQ(c)
		l.wantErr(fmt.Sprintf("an SRQ of %+v", c), err, verbs.ErrInvalid)
	}
	cq := l.a.cq(16, nil)
	good := l.a.qpConfig(verbs.RC)
	good.SendCQ, good.RecvCQ = cq, cq
	for _, c := range []struct {
		name string
		set  func(*verbs.QPConfig)
	}{
		{"no type", func(c *verbs.QPConfig) { c.Type = 0 }},
		{"an unknown type", func(c *verbs.QPConfig) { c.Type = 9 }},
		{"no send CQ", func(c *verbs.QPConfig) { c.SendCQ = nil }},
		{"no receive CQ", func(c *verbs.QPConfig) { c.RecvCQ = nil }},
		{"too many sends", func(c *verbs.QPConfig) { c.MaxSendWR = attr.MaxQPWR + 1 }},
		{"negative sends", func(c *verbs.QPConfig) { c.MaxSendWR = -1 }},
		{"too many receives", func(c *verbs.QPConfig) { c.MaxRecvWR = attr.MaxQPWR + 1 }},
		{"too many send SGEs", func(c *verbs.QPConfig) { c.MaxSendSGE = attr.MaxSGE + 1 }},
		{"too many receive SGEs", func(c *verbs.QPConfig) { c.MaxRecvSGE = attr.MaxSGE + 1 }},
	} {
		bad := good
		c.set(&bad)
		_, err := l.a.pd.CreateQP(bad)
		l.wantErr("a QP with "+c.name, err, verbs.ErrInvalid)
	}
	_, err := l.a.dev.Listen(0, func(verbs.ConnRequest) {})
	l.wantErr("listening on port 0", err, verbs.ErrInvalid)
	// Nothing that was refused counts as a child.
	l.must("close the CQ", cq.Close())
}

func badRegistrations(l *lab) {
	mem := make([]byte, 64)
	for _, c := range []struct {
		name   string
		mem    []byte
		iova   uint64
		access verbs.Access
	}{
		{"remote write without local write", mem, 4096, verbs.AccessRemoteWrite},
		{"remote atomic without local write", mem, 4096, verbs.AccessRemoteAtomic | verbs.AccessRemoteRead},
		{"an unknown right", mem, 4096, verbs.AccessLocalWrite | 1<<30},
		{"no memory", nil, 4096, verbs.AccessLocalWrite},
		{"addresses that wrap", mem, ^uint64(0) - 32, verbs.AccessLocalWrite},
	} {
		_, err := l.a.pd.RegMR(c.mem, c.iova, c.access)
		l.wantErr("registering "+c.name, err, verbs.ErrInvalid)
	}
	r := l.a.region(64, allAccess)
	if r.mr.Len() != 64 || r.mr.RKey() == 0 || r.mr.Addr() == 0 {
		l.Fatalf("a region knows its length, address and keys: %d, %#x, %#x", r.mr.Len(), r.mr.Addr(), r.mr.RKey())
	}
	if r := l.a.region(64, verbs.AccessLocalWrite); r.mr.RKey() != 0 {
		l.Fatalf("a region without remote rights has no rkey: %#x", r.mr.RKey())
	}
}

func foreignObjects(l *lab) {
	cqA, cqB := l.a.cq(16, nil), l.b.cq(16, nil)
	srqB := l.b.srq(16, 1)
	for _, c := range []struct {
		name       string
		send, recv verbs.CQ
		srq        verbs.SRQ
	}{
		{"send CQ", cqB, cqA, nil},
		{"receive CQ", cqA, cqB, nil},
		{"SRQ", cqA, cqA, srqB},
	} {
		cfg := l.a.qpConfig(verbs.RC)
		cfg.SendCQ, cfg.RecvCQ, cfg.SRQ = c.send, c.recv, c.srq
		_, err := l.a.pd.CreateQP(cfg)
		l.wantErr("a QP with another device's "+c.name, err, verbs.ErrInvalid)
	}
}

// sgesAtLimit gathers from and scatters to as many elements as the device admits, a few
// bytes apart, over several packets.
func sgesAtLimit(l *lab) {
	n := min(l.a.dev.Attr().MaxSGE, l.b.dev.Attr().MaxSGE, 256)
	p := l.pair(func(k *link) { k.cfgA.MaxSendSGE, k.cfgB.MaxRecvSGE = n, n })
	each := 2*p.mtu.Bytes()/n + 1
	src, dst := l.a.region(n*(each+3), 0), l.b.region(n*(each+5), verbs.AccessLocalWrite)
	data := l.nextPattern(n * each)
	var out, in []verbs.SGE
	want := append([]byte(nil), dst.mem...)
	for i := range n {
		out = append(out, src.sge(i*(each+3), each))
		in = append(in, dst.sge(i*(each+5), each))
		copy(src.mem[i*(each+3):], data[i*each:(i+1)*each])
		copy(want[i*(each+5):], data[i*each:(i+1)*each])
	}
	p.b.recv(verbs.RecvWR{ID: 20, SGs: in})
	p.a.send(sendWR(1, out))
	p.b.wantRecvd("the message arrives", 20, n*each)
	l.wantBytes("every element where it belongs", dst.mem, want)
	p.a.wantSent("the message is sent", 1, verbs.WCSend)
}

func openUnknown(l *lab) {
	if !l.env.Unowned.IsValid() {
		l.Skip("the environment names no address without a device")
	}
	dev, err := l.env.Provider.OpenDevice(l.env.Unowned)
	if err == nil {
		l.devs = append(l.devs, dev)
	}
	l.wantErr("opening an address nobody has", err, verbs.ErrNoSuchAddress)
}

func openTwice(l *lab) {
	dev, err := l.env.Provider.OpenDevice(l.env.Addrs[0])
	if err == nil {
		l.devs = append(l.devs, dev)
		l.Fatal("opening an address twice is refused")
	}
	l.must("close A's PD", l.a.pd.Close())
	l.must("close A", l.a.dev.Close())
	dev, err = l.env.Provider.OpenDevice(l.env.Addrs[0])
	l.must("a closed address opens again", err)
	l.devs = append(l.devs, dev)
}
