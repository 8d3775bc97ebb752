package faultverbs

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"go.uber.org/atomic"

	"github.com/openrds/openrds/verbs"
)

// Wrap wraps inner. faults is consulted on every call. The result implements verbs.DeviceWatcher: what it
// answers is inner's, or ErrNotSupported. It implements verbs.PacketTracer if inner does.
func Wrap(inner verbs.Provider, faults *Faults) verbs.Provider {
	p := &provider{inner, faults}
	if t, ok := inner.(verbs.PacketTracer); ok {
		return &tracingProvider{p, t}
	}
	return p
}

type tracingProvider struct {
	*provider
	verbs.PacketTracer
}

type provider struct {
	verbs.Provider
	f *Faults
}

func (p *provider) OpenDevice(addr netip.Addr) (verbs.Device, error) {
	if err := p.f.call(OpenDevice); err != nil {
		return nil, err
	}
	d, err := p.Provider.OpenDevice(addr)
	if err != nil {
		return nil, err
	}
	attr := d.Attr()
	without := attr.Caps & verbs.DeviceCaps(p.f.without.Load())
	attr.Caps &^= without
	if attr.Caps&verbs.CapMemMgtExtensions == 0 {
		attr.MaxFastRegPageListLen = 0
	}
	if attr.Caps&verbs.OpBindMW.Caps() == 0 {
		attr.MaxMW = 0
	}
	return &device{Device: d, f: p.f, attr: attr, without: without, qps: map[verbs.QP]*qp{}, cqs: map[verbs.CQ]*cq{}, srqs: map[verbs.SRQ]*srq{}}, nil
}

// WatchDevices implements verbs.DeviceWatcher for providers that do.
func (p *provider) WatchDevices(fn func(verbs.DeviceEvent)) (stop func(), err error) {
	w, ok := p.Provider.(verbs.DeviceWatcher)
	if !ok {
		return nil, fmt.Errorf("watch devices of %s: %w", p.Name(), verbs.ErrNotSupported)
	}
	if err := p.f.call(WatchDevices); err != nil {
		return nil, err
	}
	return w.WatchDevices(fn)
}

// device wraps a device. Objects are embedded: what is not overridden goes to the provider's.
type device struct {
	verbs.Device
	f    *Faults
	dead atomic.Bool

	attr    verbs.DeviceAttr
	without verbs.DeviceCaps // what it had

	mu        sync.Mutex
	qps       map[verbs.QP]*qp // by the provider's object, to be found by events
	cqs       map[verbs.CQ]*cq
	srqs      map[verbs.SRQ]*srq
	endpoints []verbs.Endpoint
	handler   func(verbs.AsyncEvent)

	eventMu sync.Mutex // one event at a time, the provider's and ours
	wg      sync.WaitGroup
}

// call is Faults.call on a device that may be dead.
func (d *device) call(op Op) error {
	err := d.f.call(op)
	if err == nil && d.dead.Load() {
		err = ErrDeviceGone
	}
	return err
}

func (d *device) Attr() verbs.DeviceAttr { return d.attr }

// lacks is the refusal of what takes one of caps, if it has been taken from the device.
func (d *device) lacks(caps verbs.DeviceCaps, what string) error {
	if caps&d.without != 0 && caps&d.attr.Caps == 0 {
		return fmt.Errorf("%s: %w", what, verbs.ErrNotSupported)
	}
	return nil
}

func (d *device) AllocPD() (verbs.PD, error) {
	if err := d.call(AllocPD); err != nil {
		return nil, err
	}
	p, err := d.Device.AllocPD()
	if err != nil {
		return nil, err
	}
	return &pd{p, d}, nil
}

func (d *device) SetAsyncHandler(handler func(verbs.AsyncEvent)) {
	d.mu.Lock()
	d.handler = handler
	d.mu.Unlock()
	if handler == nil {
		d.Device.SetAsyncHandler(nil)
		return
	}
	d.Device.SetAsyncHandler(d.event)
}

// event hands on an event of the provider's, unless its object is closed.
func (d *device) event(ev verbs.AsyncEvent) {
	d.eventMu.Lock()
	defer d.eventMu.Unlock()
	d.mu.Lock()
	h := d.handler
	known := true
	if ev.QP != nil {
		ev.QP, known = wrapped(d.qps, ev.QP)
	}
	if ev.CQ != nil {
		ev.CQ, known = wrapped(d.cqs, ev.CQ)
	}
	if ev.SRQ != nil {
		ev.SRQ, known = wrapped(d.srqs, ev.SRQ)
	}
	d.mu.Unlock()
	if known && h != nil {
		h(ev)
	}
}

// wrapped finds the wrapper of a provider's object.
func wrapped[I comparable, W any](m map[I]W, inner I) (out I, ok bool) {
	w, ok := m[inner]
	if ok {
		out = any(w).(I)
	}
	return out, ok
}

// die kills the device, and tells so with an event of type t.
func (d *device) die(t verbs.EventType) {
	if d.dead.Swap(true) {
		return
	}
	d.mu.Lock()
	qps := make([]*qp, 0, len(d.qps))
	for _, q := range d.qps {
		qps = append(qps, q)
	}
	eps := d.endpoints
	d.endpoints = nil
	d.mu.Unlock()
	for _, q := range qps {
		q.QP.SetError()
	}
	for _, ep := range eps {
		_ = ep.Disconnect() // says nothing new
	}
	d.wg.Go(func() { d.event(verbs.AsyncEvent{Type: t}) })
}

// keep remembers an endpoint until it has ended.
func (d *device) keep(ep verbs.Endpoint) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endpoints = append(slices.DeleteFunc(d.endpoints, func(ep verbs.Endpoint) bool {
		select {
		case <-ep.Done():
			return true
		default:
			return false
		}
	}), ep)
}

func (d *device) Connect(ctx context.Context, remote netip.AddrPort, vq verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, verbs.Connected, error) {
	if err := d.call(Connect); err != nil {
		return nil, verbs.Connected{}, err
	}
	ep, c, err := d.Device.Connect(ctx, remote, innerQP(vq), p, prepare)
	if err == nil {
		d.keep(ep)
	}
	return ep, c, err
}

func (d *device) Listen(port uint16, handler func(verbs.ConnRequest)) (verbs.Listener, error) {
	if err := d.call(Listen); err != nil {
		return nil, err
	}
	return d.Device.Listen(port, func(req verbs.ConnRequest) { handler(&request{req, d}) })
}

// Progress and Park implement verbs.Progresser for providers that do.
func (d *device) Progress() bool {
	p, ok := d.Device.(verbs.Progresser)
	return ok && p.Progress()
}

func (d *device) Park() {
	if p, ok := d.Device.(verbs.Progresser); ok {
		p.Park()
	}
}

func (d *device) Close() error {
	if err := d.f.call(CloseDevice); err != nil {
		return err
	}
	err := d.Device.Close()
	if err == nil {
		d.wg.Wait()
	}
	return err
}

type request struct {
	verbs.ConnRequest
	d *device
}

func (r *request) Accept(ctx context.Context, vq verbs.QP, p verbs.ConnParam, prepare func() error) (verbs.Endpoint, error) {
	if err := r.d.call(Accept); err != nil {
		return nil, err
	}
	ep, err := r.ConnRequest.Accept(ctx, innerQP(vq), p, prepare)
	if err == nil {
		r.d.keep(ep)
	}
	return ep, err
}

func (r *request) Reject(privateData []byte) error {
	if err := r.d.f.call(Reject); err != nil {
		return err
	}
	return r.ConnRequest.Reject(privateData)
}

type pd struct {
	verbs.PD
	d *device
}

func (p *pd) RegMR(mem []byte, iova uint64, access verbs.Access) (verbs.MR, error) {
	if err := p.d.call(RegMR); err != nil {
		return nil, err
	}
	return p.wrapMR(p.PD.RegMR(mem, iova, access))
}

func (p *pd) RegOnDemandMR(mem verbs.PagedMemory, iova uint64, access verbs.Access) (verbs.MR, error) {
	if err := p.d.call(RegOnDemandMR); err != nil {
		return nil, err
	}
	if err := p.d.lacks(verbs.CapOnDemandPaging, "register on-demand memory"); err != nil {
		return nil, err
	}
	return p.wrapMR(p.PD.RegOnDemandMR(mem, iova, access))
}

func (p *pd) AllocFastRegMR(maxPages int) (verbs.MR, error) {
	if err := p.d.call(AllocFastRegMR); err != nil {
		return nil, err
	}
	if err := p.d.lacks(verbs.CapMemMgtExtensions, "allocate region"); err != nil {
		return nil, err
	}
	return p.wrapMR(p.PD.AllocFastRegMR(maxPages))
}

func (p *pd) wrapMR(inner verbs.MR, err error) (verbs.MR, error) {
	if err != nil {
		return nil, err
	}
	return &mr{inner, p.d}, nil
}

func (p *pd) AdviseMR(a verbs.Advice, sgs []verbs.SGE) error {
	if err := p.d.call(AdviseMR); err != nil {
		return err
	}
	if err := p.d.lacks(verbs.CapOnDemandPaging, "advise"); err != nil {
		return err
	}
	return p.PD.AdviseMR(a, sgs)
}

func (p *pd) AllocPageList(maxPages int) (verbs.PageList, error) {
	if err := p.d.call(AllocPageList); err != nil {
		return nil, err
	}
	if err := p.d.lacks(verbs.CapMemMgtExtensions, "allocate page list"); err != nil {
		return nil, err
	}
	inner, err := p.PD.AllocPageList(maxPages)
	if err != nil {
		return nil, err
	}
	return &pageList{inner, p.d}, nil
}

func (p *pd) AllocMW(t verbs.MWType) (verbs.MW, error) {
	if err := p.d.call(AllocMW); err != nil {
		return nil, err
	}
	if err := p.d.lacks(capOfWindow[t], "allocate window: "+t.String()); err != nil {
		return nil, err
	}
	inner, err := p.PD.AllocMW(t)
	if err != nil {
		return nil, err
	}
	return &mw{inner, p.d}, nil
}

var capOfWindow = map[verbs.MWType]verbs.DeviceCaps{verbs.MWType1: verbs.CapMW1, verbs.MWType2A: verbs.CapMW2A, verbs.MWType2B: verbs.CapMW2B}

func (p *pd) CreateSRQ(cfg verbs.SRQConfig) (verbs.SRQ, error) {
	if err := p.d.call(CreateSRQ); err != nil {
		return nil, err
	}
	inner, err := p.PD.CreateSRQ(cfg)
	if err != nil {
		return nil, err
	}
	s := &srq{inner, p.d}
	p.d.mu.Lock()
	p.d.srqs[inner] = s
	p.d.mu.Unlock()
	return s, nil
}

func (p *pd) CreateQP(cfg verbs.QPConfig) (verbs.QP, error) {
	if err := p.d.call(CreateQP); err != nil {
		return nil, err
	}
	q := &qp{pd: p, recent: make([]uint64, 0, max(cfg.MaxSendWR, 1))}
	// What is not ours goes to the provider, which knows how to refuse it.
	if c, ok := cfg.SendCQ.(*cq); ok {
		q.scq, cfg.SendCQ = c, c.CQ
	}
	if c, ok := cfg.RecvCQ.(*cq); ok {
		q.rcq, cfg.RecvCQ = c, c.CQ
	}
	if s, ok := cfg.SRQ.(*srq); ok {
		cfg.SRQ = s.SRQ
	}
	var err error
	if q.QP, err = p.PD.CreateQP(cfg); err != nil {
		return nil, err
	}
	p.d.mu.Lock()
	p.d.qps[q.QP] = q
	p.d.mu.Unlock()
	if p.d.dead.Load() {
		q.QP.SetError() // it was on its way while the device died
	}
	return q, nil
}

func (p *pd) Close() error {
	if err := p.d.f.call(ClosePD); err != nil {
		return err
	}
	return p.PD.Close()
}

type mr struct {
	verbs.MR
	d *device
}

func (m *mr) Deregister() error {
	if err := m.d.f.call(Deregister); err != nil {
		return err
	}
	return m.MR.Deregister()
}

type mw struct {
	verbs.MW
	d *device
}

func (w *mw) Dealloc() error {
	if err := w.d.f.call(DeallocMW); err != nil {
		return err
	}
	return w.MW.Dealloc()
}

type pageList struct {
	verbs.PageList
	d *device
}

func (l *pageList) Set(segs [][]byte) error {
	if err := l.d.f.call(SetPageList); err != nil {
		return err
	}
	return l.PageList.Set(segs)
}

func (l *pageList) Close() error {
	if err := l.d.f.call(ClosePageList); err != nil {
		return err
	}
	return l.PageList.Close()
}

// The provider's objects. What is not ours goes to the provider, which knows how to refuse it.

func innerMR(m verbs.MR) verbs.MR {
	if w, ok := m.(*mr); ok {
		return w.MR
	}
	return m
}

func innerMW(m verbs.MW) verbs.MW {
	if w, ok := m.(*mw); ok {
		return w.MW
	}
	return m
}

func innerPages(l verbs.PageList) verbs.PageList {
	if w, ok := l.(*pageList); ok {
		return w.PageList
	}
	return l
}

type srq struct {
	verbs.SRQ
	d *device
}

func (s *srq) PostRecv(wrs []verbs.RecvWR) (int, error) {
	if err := s.d.f.call(PostSRQ); err != nil {
		return short(s.SRQ.PostRecv, wrs, err)
	}
	return s.SRQ.PostRecv(wrs)
}

func (s *srq) Arm(limit int) error {
	if err := s.d.f.call(ArmSRQ); err != nil {
		return err
	}
	return s.SRQ.Arm(limit)
}

func (s *srq) Close() error {
	if err := s.d.f.call(CloseSRQ); err != nil {
		return err
	}
	err := s.SRQ.Close()
	if err == nil {
		s.d.mu.Lock()
		delete(s.d.srqs, s.SRQ)
		s.d.mu.Unlock()
	}
	return err
}

// short posts the first half of a batch whose rest fails with err.
func short[WR any](post func([]WR) (int, error), wrs []WR, err error) (int, error) {
	if half := len(wrs) / 2; half > 0 {
		if n, e := post(wrs[:half]); e != nil {
			return n, e
		}
		return half, err
	}
	return 0, err
}

type qp struct {
	verbs.QP
	pd  *pd
	scq *cq
	rcq *cq

	mu     sync.Mutex
	recent []uint64 // IDs of the last sends, as many as can be outstanding; a ring
	next   int
}

// note remembers sends, before they are posted.
func (q *qp) note(wrs []verbs.SendWR) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range wrs {
		if len(q.recent) < cap(q.recent) {
			q.recent = append(q.recent, wrs[i].ID)
			continue
		}
		q.recent[q.next] = wrs[i].ID
		q.next = (q.next + 1) % len(q.recent)
	}
}

func (q *qp) recentSends() map[uint64]bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	ids := make(map[uint64]bool, len(q.recent))
	for _, id := range q.recent {
		ids[id] = true
	}
	return ids
}

// innerQP is the provider's QP of vq.
func innerQP(vq verbs.QP) verbs.QP {
	if q, ok := vq.(*qp); ok {
		return q.QP
	}
	return vq
}

func (q *qp) PD() verbs.PD { return q.pd }

func (q *qp) PostSend(wrs []verbs.SendWR) (int, error) {
	if err := q.pd.d.f.call(PostSend); err != nil {
		return short(q.post, wrs, err)
	}
	return q.post(wrs)
}

func (q *qp) post(wrs []verbs.SendWR) (n int, err error) {
	f := q.pd.d.f
	if q.pd.d.without != 0 {
		for i := range wrs {
			if err = q.pd.d.lacks(wrs[i].Opcode.Caps(), wrs[i].Opcode.String()); err == nil {
				continue
			}
			if i > 0 {
				if n, e := q.post(wrs[:i]); e != nil {
					return n, e
				}
			}
			return i, err
		}
	}
	if f.armedWRs.Load() == 0 && !slices.ContainsFunc(wrs, namesObjects) {
		q.note(wrs)
		return q.QP.PostSend(wrs)
	}
	wrs = slices.Clone(wrs)
	spoilt := map[int]*wrRule{} // by index in wrs
	for i := range wrs {
		unwrap(&wrs[i])
		if r := f.request(wrs[i].Opcode); r != nil && r.err != nil {
			wrs, err = wrs[:i], r.err
			break
		} else if r != nil {
			spoilt[i] = r
			spoil(&wrs[i])
			q.scq.doctor(q.Num(), wrs[i].ID, r.status)
		}
	}
	q.note(wrs)
	n, e := q.QP.PostSend(wrs)
	for i, r := range spoilt {
		if i >= n { // it was refused: the rule is for another
			q.scq.undoctor(q.Num(), wrs[i].ID)
			f.addWR(&wrRule{op: r.op, nth: 1, status: r.status})
		}
	}
	if e != nil {
		err = e
	}
	return n, err
}

// namesObjects says that a request names objects, which are wrapped.
func namesObjects(wr verbs.SendWR) bool { return wr.FastReg != nil || wr.Bind != nil }

func unwrap(wr *verbs.SendWR) {
	if wr.FastReg != nil {
		r := *wr.FastReg
		r.MR, r.Pages = innerMR(r.MR), innerPages(r.Pages)
		wr.FastReg = &r
	}
	if wr.Bind != nil {
		b := *wr.Bind
		b.MW, b.MR = innerMW(b.MW), innerMR(b.MR)
		wr.Bind = &b
	}
}

// spoil makes a request fail when its turn comes, without a word to the peer: a key's index must not change, and no
// key is 0.
func spoil(wr *verbs.SendWR) {
	switch {
	case wr.Opcode == verbs.OpFastRegMR && wr.FastReg != nil:
		wr.FastReg.Key ^= 1 << 8
	case wr.Opcode == verbs.OpBindMW && wr.Bind != nil:
		wr.Bind.Key ^= 1 << 8
	default:
		*wr = verbs.SendWR{ID: wr.ID, Opcode: verbs.OpLocalInv, Flags: wr.Flags & verbs.SendSignaled}
	}
}

func (q *qp) PostRecv(wrs []verbs.RecvWR) (int, error) {
	if err := q.pd.d.f.call(PostRecv); err != nil {
		return short(q.QP.PostRecv, wrs, err)
	}
	return q.QP.PostRecv(wrs)
}

func (q *qp) Modify(attr verbs.QPAttr, mask verbs.QPAttrMask) error {
	if err := q.pd.d.f.call(Modify); err != nil {
		return err
	}
	err := q.QP.Modify(attr, mask)
	if err == nil && mask&verbs.QPStateBit != 0 && attr.State == verbs.StateReset {
		q.forget()
	}
	return err
}

// forget is for after a QP was reset or closed: it completes nothing any more.
func (q *qp) forget() {
	q.scq.expedite()
	q.rcq.expedite()
	q.scq.mendQP(q.Num())
}

func (q *qp) Close() error {
	err := q.QP.Close()
	if err == nil {
		q.forget()
		q.pd.d.mu.Lock()
		delete(q.pd.d.qps, q.QP)
		q.pd.d.mu.Unlock()
	}
	return err
}
