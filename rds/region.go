package rds

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"unsafe"

	"github.com/openrds/openrds/conn"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
)

// Region is memory of the application's that the device may touch: for peers, who know its Cookie, and for operations of
// its own socket, as local memory (Piece). The kernel calls it an MR. It belongs to the Socket it was registered with,
// whose Close frees it; it can be freed before that, once, in four ways:
//
//	Close            promptly if RegionOptions.Invalidate says so; otherwise peers may still reach the memory for a while
//	Invalidate       promptly, and waits for it
//	UseOnce          when a peer's message says that its operation used the region
//	FreeRegion       by its cookie
//
// The memory belongs to the device until Done is closed: after the last operation of the socket's own on it has ended,
// and the key is not valid any more. Go memory is pinned until then. Memory that is not Go's (a mapping) must stay
// mapped until then.
//
// If the device goes away the region is a tombstone: it can only be freed, and whatever else is done with it fails with
// ErrDeviceGone.
//
//	              ┌────┐ operations of the socket's own: hold, drop
//	register ──▶ usable ──▶ freed, or its device is gone ──last drop──▶ given ──nobody can touch it──▶ Done closed
//
// Each step is taken once, whoever brings it about: freed, gone and given below decide, under mu.
type Region struct {
	s      *Socket
	mem    []byte
	opt    RegionOptions
	paged  verbs.PagedMemory // on demand; nil: pinned
	from   netip.Addr        // the peer it is for; zero: any
	m      *conn.Mapping
	cookie Cookie
	forget func() // withdraws the device's promise to tell us when it goes

	mu     sync.Mutex
	uses   int  // operations in progress on it
	freed  bool // by its owner, or a peer
	gone   bool // the device went away
	prompt bool // free it promptly
	given  bool // back to the device
	err    error

	pin  runtime.Pinner
	done chan struct{}
}

// RegionOptions say what a region is for. The zero value is for peers to read and write until it is freed.
type RegionOptions struct {
	// UseOnce frees the region when a message arrives that says that an operation has used it (RDS_RDMA_USE_ONCE).
	UseOnce bool
	// Invalidate frees it promptly, whatever it is that frees it (RDS_RDMA_INVALIDATE): nobody waits for company to
	// make its key invalid, so it costs more.
	Invalidate bool
	// ReadOnly lets peers read it only; Atomic lets them execute atomics on it as well. Neither is the kernel's, whose
	// regions are always for reading and writing.
	ReadOnly bool
	Atomic   bool
	// Arena says that the memory is part of it, and that nothing is to be pinned: pages are brought in as they are needed.
	// Such a region may be larger than MaxRDMASize.
	Arena *Arena
}

// regions are those of a local address, whatever socket they belong to, by key.
type regions struct {
	mu    sync.Mutex
	byKey map[uint32]*Region
}

func (t *regions) get(rkey uint32) *Region {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byKey[rkey]
}

// RegisterRegion registers mem with the device of the socket's address: at most MaxRDMASize bytes, which peers may touch
// through any connection (RDS_GET_MR). It waits, at most until ctx is done, if the device has as many regions as it may.
//
// The error matches ErrRegionTooLarge, ErrPoolExhausted, ErrDeviceGone, ErrNotSupported, ErrInvalid, ErrClosed or ctx's error.
func (s *Socket) RegisterRegion(ctx context.Context, mem []byte, opt RegionOptions) (*Region, error) {
	ctx, end := s.wdl.context(ctx, false)
	defer end()
	r, err := s.register(ctx, mem, opt, netip.Addr{}, func(iova uint64, access verbs.Access, p verbs.PagedMemory) (*conn.Mapping, error) {
		return s.svc.tr.Register(ctx, s.la.addr, mem, p, iova, access)
	})
	if err != nil {
		return nil, s.opError("register", netip.AddrPort{}, waitError(ctx, err, nil))
	}
	return r, nil
}

// RegisterRegionFor registers mem for operations of the host of addr, on the connection to it (RDS_GET_MR_FOR_DEST). That is
// cheaper than RegisterRegion: a request that the device executes in its turn. It waits for the connection to be
// established, at most until ctx is done.
//
// On a device without fast registration the key works through that connection alone, and ends with it. Errors are
// RegisterRegion's.
func (s *Socket) RegisterRegionFor(ctx context.Context, addr netip.AddrPort, mem []byte, opt RegionOptions) (*Region, error) {
	addr = unmap(addr)
	ctx, end := s.wdl.context(ctx, false)
	defer end()
	r, err := s.registerFor(ctx, addr, uint8(s.tos.Load()), mem, opt, true)
	if err != nil {
		return nil, s.opError("register", addr, waitError(ctx, err, nil))
	}
	return r, nil
}

// SendMapped registers mem as RegisterRegionFor does, and sends m with the cookie (RDS_CMSG_RDMA_MAP). If the message cannot
// be sent the region is freed again. It waits until ctx is done or the write deadline, whichever is first: for the connection
// (the error then matches ErrNotReady too), for a region (ErrPoolExhausted), and for what Send waits for.
func (s *Socket) SendMapped(ctx context.Context, m Message, mem []byte, opt RegionOptions) (*Region, error) {
	return s.sendMapped(ctx, m, mem, opt, true)
}

// TrySendMapped is SendMapped that never waits (MSG_DONTWAIT, RDS_RDMA_DONTWAIT): if there is no connection the error matches ErrNotReady, and it is being
// connected.
func (s *Socket) TrySendMapped(m Message, mem []byte, opt RegionOptions) (*Region, error) {
	return s.sendMapped(context.Background(), m, mem, opt, false)
}

func (s *Socket) sendMapped(ctx context.Context, m Message, mem []byte, opt RegionOptions, wait bool) (*Region, error) {
	to, tos, err := s.destination(&m)
	if err != nil {
		return nil, s.opError("write", to, err)
	}
	for {
		r, err := s.registerToSend(ctx, to, tos, mem, opt, wait)
		if err != nil {
			return nil, s.opError("register", to, err)
		}
		m.Cookie = r.cookie
		if err = s.send(ctx, &m, wait); err == nil {
			return r, nil
		}
		lost := !r.m.Valid() && errors.Is(err, ErrStaleCookie)
		r.free(true)
		if !lost {
			return nil, err
		}
		// The key was lost with its connection, between the two. There will be another one.
		if !wait {
			return nil, s.opError("register", to, ErrNotReady)
		}
	}
}

// registerToSend is registerFor as a part of a write.
func (s *Socket) registerToSend(ctx context.Context, to netip.AddrPort, tos uint8, mem []byte, opt RegionOptions, wait bool) (*Region, error) {
	if s.wdl.expired.Load() && !s.closed.Load() {
		return nil, errDeadlineRead
	}
	ctx, end := s.wdl.context(ctx, true)
	defer end()
	r, err := s.registerFor(ctx, to, tos, mem, opt, wait)
	if err != nil {
		cause := ErrNotReady
		if errors.Is(err, ErrPoolExhausted) {
			cause = ErrPoolExhausted
		}
		err = waitError(ctx, err, cause)
	}
	return r, err
}

func (s *Socket) registerFor(ctx context.Context, addr netip.AddrPort, tos uint8, mem []byte, opt RegionOptions, wait bool) (*Region, error) {
	if err := checkDest(s.la.addr, addr.Addr()); err != nil {
		return nil, err
	}
	d, err := s.la.dest(addr.Addr(), tos)
	if err != nil {
		return nil, err
	}
	for {
		r, err := s.register(ctx, mem, opt, addr.Addr(), func(iova uint64, access verbs.Access, p verbs.PagedMemory) (*conn.Mapping, error) {
			if p != nil || d.isLocal() {
				return s.svc.tr.Register(ctx, s.la.addr, mem, p, iova, access)
			}
			return d.link.Map(ctx, mem, iova, access, wait)
		})
		if !errors.Is(err, ErrNotReady) || !wait {
			return r, err
		}
		if err := d.link.WaitUp(ctx, s.done); err != nil {
			return nil, err
		}
	}
}

// register makes a region of what mapping returns.
func (s *Socket) register(ctx context.Context, mem []byte, opt RegionOptions, from netip.Addr, mapping func(uint64, verbs.Access, verbs.PagedMemory) (*conn.Mapping, error)) (*Region, error) {
	r := &Region{s: s, mem: mem, opt: opt, from: from, prompt: opt.Invalidate, done: make(chan struct{})}
	switch {
	case s.closed.Load():
		return nil, ErrClosed
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case len(mem) == 0:
		return nil, fmt.Errorf("%w: no memory", ErrInvalid)
	case opt.ReadOnly && opt.Atomic:
		return nil, fmt.Errorf("%w: region both ReadOnly and Atomic", ErrInvalid)
	case opt.Arena != nil:
		off, ok := opt.Arena.Offset(mem)
		if !ok {
			return nil, fmt.Errorf("%w: on-demand paging of memory outside the arena", ErrNotSupported)
		}
		var err error
		if r.paged, err = opt.Arena.Paged(off, len(mem)); err != nil {
			return nil, err
		}
	case len(mem) > MaxRDMASize:
		return nil, fmt.Errorf("%w: %d bytes", ErrRegionTooLarge, len(mem))
	}
	access := verbs.AccessLocalWrite | verbs.AccessRemoteRead
	if !opt.ReadOnly {
		access |= verbs.AccessRemoteWrite
	}
	if opt.Atomic {
		access |= verbs.AccessRemoteAtomic
	}
	// As the kernel's: the key opens an address space that begins with the region's first page, so that the offset fits into a
	// cookie (rds-protocol spec 3.9).
	iova := uint64(uintptr(unsafe.Pointer(&mem[0])) & (verbs.PageSize - 1))
	if r.paged == nil {
		r.pin.Pin(&mem[0])
	}
	m, err := mapping(iova, access, r.paged)
	if err != nil {
		r.pin.Unpin()
		return nil, regionError(err)
	}
	r.m, r.cookie = m, MakeCookie(uint32(m.RKey()), uint32(iova))
	if err := s.addRegion(r); err != nil {
		r.free(true)
		return nil, err
	}
	return r, nil
}

// addRegion enters r, or says that the socket is closed.
func (s *Socket) addRegion(r *Region) error {
	t := &s.la.regions
	t.mu.Lock()
	if s.closed.Load() { // Close looks through the table after it has set this
		t.mu.Unlock()
		return ErrClosed
	}
	if t.byKey == nil {
		t.byKey = make(map[uint32]*Region)
	}
	t.byKey[r.cookie.RKey()] = r // over a tombstone perhaps, whose device counted its keys too
	t.mu.Unlock()
	forget := r.m.Device().OnRemove(r.bury)
	r.mu.Lock()
	r.forget = forget
	given := r.given
	r.mu.Unlock()
	if given {
		forget()
	}
	return nil
}

// regionError gives what registering says the names of this package.
func regionError(err error) error {
	for _, c := range []struct{ is, as error }{
		{mrpool.ErrPoolExhausted, ErrPoolExhausted}, {mrpool.ErrQueueFull, ErrPoolExhausted}, {verbs.ErrNoMemory, ErrPoolExhausted},
		{mrpool.ErrTooLarge, ErrRegionTooLarge}, {conn.ErrNotUp, ErrNotReady}, {mrpool.ErrQPLost, ErrNotReady},
		{verbs.ErrDeviceGone, ErrDeviceGone}, {verbs.ErrNoSuchAddress, ErrDeviceGone}, {verbs.ErrNotSupported, ErrNotSupported},
		{verbs.ErrInvalid, ErrInvalid},
	} {
		if errors.Is(err, c.is) {
			return fmt.Errorf("%w: %w", c.as, err)
		}
	}
	return err
}

// Cookie names the region to peers: sent as Message.Cookie, or in any other way.
func (r *Region) Cookie() Cookie { return r.cookie }

// Bytes is the memory. What peers do to it is visible as soon as it is done; a message that says so is a good time to look.
func (r *Region) Bytes() []byte { return r.mem }

// Len is its length in bytes.
func (r *Region) Len() int { return len(r.mem) }

// Piece is the n bytes from off on, for RDMA.Local.
func (r *Region) Piece(off, n int) Piece { return Piece{Region: r, Offset: off, Length: n} }

// Close frees the region, unless that has been done, and does not wait: Done tells when the memory is the application's
// alone.
func (r *Region) Close() error {
	r.free(false)
	return nil
}

// Invalidate frees the region and waits until nobody can touch its memory any more, or ctx is done. It may be called after
// Close too.
func (r *Region) Invalidate(ctx context.Context) error {
	if !r.free(true) {
		select {
		case <-r.done:
		default:
			// Freed before, and perhaps waiting for company.
			if err := r.s.svc.tr.FlushMemory(ctx); err != nil && ctx.Err() == nil {
				return r.s.opError("free", netip.AddrPort{}, err)
			}
		}
	}
	select {
	case <-r.done:
		if r.err != nil {
			return r.s.opError("free", netip.AddrPort{}, r.err)
		}
		return nil
	case <-ctx.Done():
		return r.s.opError("free", netip.AddrPort{}, ctx.Err())
	}
}

// Done is closed when the memory is the application's alone: the region was freed, and nobody touches it any more.
func (r *Region) Done() <-chan struct{} { return r.done }

// Err is nil while the region can be used; then it matches ErrStaleCookie, if it was freed, or if its key was lost with the
// connection that it was registered for, or ErrDeviceGone.
func (r *Region) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.errLocked()
}

func (r *Region) errLocked() error {
	switch {
	case r.freed:
		return ErrStaleCookie
	case r.gone:
		return ErrDeviceGone
	case !r.m.Valid():
		return fmt.Errorf("%w: lost with its connection", ErrStaleCookie)
	}
	return nil
}

// hold keeps the region for an operation, until drop.
func (r *Region) hold() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.errLocked(); err != nil {
		return err
	}
	r.uses++
	return nil
}

func (r *Region) drop() {
	r.mu.Lock()
	r.uses--
	give := r.giveLocked()
	r.mu.Unlock()
	if give {
		r.giveBack()
	}
}

// free frees the region, and reports false if that has been done before. It does not wait.
func (r *Region) free(prompt bool) bool {
	t := &r.s.la.regions
	t.mu.Lock()
	if t.byKey[r.cookie.RKey()] == r {
		delete(t.byKey, r.cookie.RKey())
	}
	t.mu.Unlock()
	r.mu.Lock()
	first := !r.freed
	r.freed = true
	r.prompt = r.prompt || prompt
	give := r.giveLocked()
	r.mu.Unlock()
	if give {
		r.giveBack()
	}
	return first
}

// bury makes the region a tombstone: its device goes away, and waits for nobody.
func (r *Region) bury() {
	r.mu.Lock()
	r.gone, r.prompt = true, true
	give := r.giveLocked()
	r.mu.Unlock()
	if give {
		r.giveBack()
	}
}

// giveLocked reports, once, that the time has come to give the memory back.
func (r *Region) giveLocked() bool {
	if r.given || r.uses > 0 || !r.freed && !r.gone {
		return false
	}
	r.given = true
	return true
}

func (r *Region) giveBack() {
	r.mu.Lock()
	forget, prompt := r.forget, r.prompt // whoever comes second may still set them
	r.mu.Unlock()
	if forget != nil {
		forget()
	}
	if !prompt {
		r.s.lazy.Store(true)
	}
	r.m.Release(prompt, func(err error) {
		if r.err = err; err == nil {
			r.pin.Unpin()
		} else {
			r.keep()
		}
		close(r.done)
	})
	if !prompt && r.s.closed.Load() {
		r.s.startFlush() // the socket's Close may have been too early for this one
	}
}

// startFlush has the memory of regions given back that were freed, and not promptly: nobody else may come to keep them
// company. The kernel flushes too when a socket closes (rds-protocol spec 3.10).
func (s *Socket) startFlush() { s.svc.tr.StartFlush(s.la.addr) }

// keep is for memory that the device did not give back, and may touch for ever: it stays pinned where it is. Each time
// the collector comes for the region it is sent away again.
func (r *Region) keep() { runtime.SetFinalizer(r, (*Region).keep) }

// FreeRegion frees the socket's region of that cookie (RDS_FREE_MR), promptly if invalidate (RDS_RDMA_INVALIDATE). It does not
// wait. The error matches ErrStaleCookie if there is none.
func (s *Socket) FreeRegion(c Cookie, invalidate bool) error {
	r, err := s.regionOf(c)
	if err != nil && r == nil {
		return s.opError("free", netip.AddrPort{}, err)
	}
	r.free(invalidate)
	return nil
}

// regionOf is the region of a cookie. With ErrDeviceGone there is one too.
func (s *Socket) regionOf(c Cookie) (*Region, error) {
	r := s.la.regions.get(c.RKey())
	switch {
	case r == nil || r.cookie != c:
		return nil, fmt.Errorf("%w: %v", ErrStaleCookie, c)
	case r.s != s:
		return nil, fmt.Errorf("%w: %v", ErrForeignRegion, c)
	}
	return r, r.Err()
}

// closeRegions frees what the socket has.
func (s *Socket) closeRegions() {
	t := &s.la.regions
	var mine []*Region
	t.mu.Lock()
	for _, r := range t.byKey {
		if r.s == s {
			mine = append(mine, r)
		}
	}
	t.mu.Unlock()
	for _, r := range mine {
		r.free(true)
	}
	if s.lazy.Load() {
		s.startFlush()
	}
}

// used is told by a peer that an operation of its has used the region of a key of socket s: it is freed if it was for one use. In
// a completion handler.
func (s *Socket) used(from netip.Addr, rkey uint32) {
	r := s.la.regions.get(rkey)
	switch {
	case r == nil || r.s != s || r.from.IsValid() && r.from != from:
		s.svc.ctr.recvUnknownKey.Add(1) // freed meanwhile, or a lie
	case r.opt.UseOnce && r.free(false):
		s.svc.ctr.recvUsedOnce.Add(1)
	}
}

// FlushRegions returns when the memory of all regions of this Service that were freed before it was called is the
// application's again (RDS_FREE_MR with cookie 0), except what operations of ours are at work on, or ctx is done.
func (svc *Service) FlushRegions(ctx context.Context) error { return svc.tr.FlushMemory(ctx) }
