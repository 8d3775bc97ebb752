package ibdev

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openrds/openrds/internal/invariants"
	"github.com/openrds/openrds/internal/simnet"
	"github.com/openrds/openrds/mrpool"
	"github.com/openrds/openrds/verbs"
	"github.com/openrds/openrds/verbs/faultverbs"
	"github.com/openrds/openrds/verbs/softroce"
)

// newWatchedRig is a rig whose provider tells of its devices, which bendProvider's wrapping hides.
func newWatchedRig(t testing.TB, mod ...func(*Config)) (*rig, *softroce.Provider) {
	net := simnet.New(1, simnet.Config{})
	t.Cleanup(func() { net.Close() })
	p := softroce.New(softroce.Config{Network: net})
	r := newRig(t, append(mod, func(c *Config) { c.Providers = []verbs.Provider{p} })...)
	return r, p
}

// TestRemoval: a removed device is found by nobody, tells everybody once, keeps its objects until they are closed, and its
// address is opened anew before that.
func TestRemoval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, p := newWatchedRig(t)
		d, other := r.open(addrA), r.open(addrB)
		var h1, h2 quietHandler
		q1, _ := connect(t, d, other, Large, &h1, &h2)
		var told []string
		d.OnRemove(func() { told = append(told, "first") })
		cancel := d.OnRemove(func() { told = append(told, "withdrawn") })
		cancel()
		d.OnRemove(func() {
			if part := r.epoch.Register("hook"); r.reg.Lookup(part, addrA) != nil {
				t.Error("found while its removal is told of")
			} else {
				part.Unregister()
			}
			if len(h1.events) != 0 {
				t.Error("the QPs were told first")
			}
			told = append(told, "second")
		})
		if d.Gone() {
			t.Error("gone before it goes")
		}
		if err := errors.Join(p.Remove(addrA), p.Remove(addrA)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		<-d.Removed()
		slices.Sort(told)
		if !d.Gone() || fmt.Sprint(told) != "[first second]" || fmt.Sprint(h1.events) != "[DEVICE_REMOVED QP_LAST_WQE_REACHED]" {
			t.Errorf("gone %v, told %v, events %v", d.Gone(), told, h1.events)
		}
		d.OnRemove(func() { told = append(told, "late") })()
		if told[len(told)-1] != "late" {
			t.Error("who came late was not told")
		}
		if _, err := d.CreateQP(QPConfig{MaxSendWR: 1, MaxSendSGE: 1}, &h2); !errors.Is(err, ErrDeviceGone) {
			t.Errorf("a QP on a removed device: %v", err)
		}
		if _, err := r.reg.Open(context.Background(), addrA); !errors.Is(err, ErrNoDevice) {
			t.Errorf("open of a removed address: %v", err)
		}
		p.Add(addrA)
		d2 := r.open(addrA)
		if d2 == d {
			t.Fatal("the removed device again")
		}
		select {
		case <-d.down:
			t.Error("torn down with a QP")
		default:
		}
		q1.Close()
		d.Put()
		synctest.Wait()
		<-d.down
		if d2.Gone() || d.err != nil {
			t.Errorf("the new device is gone: %v; teardown: %v", d2.Gone(), d.err)
		}
		d2.Put()
		for _, q := range other.allQPs() {
			q.Close()
		}
		other.Put()
		r.close()
	})
}

// TestAwait: whoever waits for a device is woken when it appears, and by nothing else; of a provider that does not tell it asks,
// not too often.
func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, p := newWatchedRig(t)
		p.Remove(addrA)
		var wg sync.WaitGroup
		start := time.Now()
		for range 3 {
			wg.Go(func() {
				d, err := r.reg.Await(context.Background(), addrA)
				if err != nil {
					t.Error(err)
				} else if d.Put(); time.Since(start) != time.Hour {
					t.Errorf("came after %v", time.Since(start))
				}
			})
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if _, err := r.reg.Await(ctx, addrA); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("await with a deadline: %v", err)
		}
		cancel()
		time.Sleep(time.Until(start.Add(time.Hour)))
		p.Add(addrA)
		wg.Wait()
		p.Remove(addrB)
		wg.Go(func() {
			if _, err := r.reg.Await(context.Background(), addrB); !errors.Is(err, ErrClosed) {
				t.Errorf("await of a registry that is closed: %v", err)
			}
		})
		synctest.Wait()
		r.close()
		wg.Wait()
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.prov.wrong = fmt.Errorf("not yet: %w", verbs.ErrNoSuchAddress)
		time.AfterFunc(time.Minute+time.Second/2, func() {
			r.prov.mu.Lock()
			r.prov.wrong = nil
			r.prov.mu.Unlock()
		})
		start := time.Now()
		d, err := r.reg.Await(context.Background(), addrA)
		if err != nil || time.Since(start) != time.Minute+time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		d.Put()
		r.close()
	})
}

// TestFailedDeviceHoldsItsAddress: after a fatal event the address can be opened when the device has been torn down, unless it is
// removed altogether meanwhile.
func TestFailedDeviceHoldsItsAddress(t *testing.T) {
	for _, unplugged := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			soft := r.prov.Provider.(*softroce.Provider)
			d := r.open(addrA)
			d.event(verbs.AsyncEvent{Type: verbs.EventDeviceFatal})
			d.event(verbs.AsyncEvent{Type: verbs.EventDeviceFatal})
			var d2 *Device
			opened := make(chan struct{})
			go func() {
				defer close(opened)
				var err error
				if d2, err = r.reg.Await(t.Context(), addrA); err != nil { // between Remove and Add there is no such address
					t.Error(err)
				}
			}()
			time.Sleep(time.Hour)
			select {
			case <-opened:
				t.Error("opened under the device that failed")
			default:
			}
			if unplugged {
				if err := errors.Join(soft.Remove(addrA), soft.Add(addrA)); err != nil {
					t.Fatal(err)
				}
				<-opened
				d.Put()
			} else {
				d.Put()
				<-opened
			}
			d2.Put()
			r.close()
		})
	}
}

// TestRemovedWhileOpening removes a device between OpenDevice and its being found: nobody gets it, and nothing is left.
func TestRemovedWhileOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		soft := r.prov.Provider.(*softroce.Provider)
		for _, when := range []string{"opened", "PD", "CQ", "handler"} {
			hit := &hitProvider{Provider: soft, when: when, hit: func() {
				if err := soft.Remove(addrA); err != nil {
					t.Error(err)
				}
			}}
			r.reg.cfg.Providers = []verbs.Provider{hit}
			d, err := r.reg.Open(context.Background(), addrA)
			if err == nil {
				// It may be found for a moment, but not for good.
				synctest.Wait()
				if !d.Gone() || len(r.reg.Devices()) != 0 {
					t.Errorf("%s: the registry keeps a removed device", when)
				}
				d.Put()
			} else if !errors.Is(err, ErrDeviceGone) && !errors.Is(err, ErrNoDevice) {
				t.Errorf("%s: %v", when, err)
			}
			soft.Add(addrA)
			synctest.Wait()
		}
		r.close()
	})
}

// hitProvider does something in the middle of a device's being opened.
type hitProvider struct {
	verbs.Provider
	when string
	hit  func()
}

type hitDevice struct {
	verbs.Device
	p *hitProvider
}

func (p *hitProvider) at(when string) {
	if when == p.when {
		p.when = ""
		p.hit()
	}
}

func (p *hitProvider) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err != nil {
		return nil, err
	}
	p.at("opened")
	return &hitDevice{d, p}, nil
}

func (d *hitDevice) AllocPD() (verbs.PD, error) {
	pd, err := d.Device.AllocPD()
	d.p.at("PD")
	return pd, err
}

func (d *hitDevice) CreateCQ(c verbs.CQConfig) (verbs.CQ, error) {
	q, err := d.Device.CreateCQ(c)
	d.p.at("CQ")
	return q, err
}

func (d *hitDevice) SetAsyncHandler(h func(verbs.AsyncEvent)) {
	if h != nil {
		d.p.at("handler")
	}
	d.Device.SetAsyncHandler(h)
}

// TestTeardownOrder writes down what is closed, and in which order.
func TestTeardownOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log closeLog
		r, p := newWatchedRig(t)
		r.reg.cfg.Providers = []verbs.Provider{&logProvider{p, &log}}
		a, b := r.open(addrA), r.open(addrB)
		var ha, hb quietHandler
		qa, err := a.CreateQP(QPConfig{MaxSendWR: 64, PoolWR: 64, MaxSendSGE: 1}, &ha)
		if err != nil {
			t.Fatal(err)
		}
		qb, err := b.CreateQP(QPConfig{MaxSendWR: 64, PoolWR: 64, MaxSendSGE: 1}, &hb)
		if err != nil {
			t.Fatal(err)
		}
		chunk, err := r.slab.Alloc(1 << 16)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.SGE(chunk, 0, 64); err != nil {
			t.Fatal(err)
		}
		m, err := a.Pools().Register(context.Background(), chunk.Bytes(), 0, verbs.AccessLocalWrite)
		if err != nil {
			t.Fatal(err)
		}
		log.clear()
		p.Remove(addrA)
		synctest.Wait()
		a.Put()
		qa.Close()
		time.Sleep(time.Minute)
		if got := log.get(); len(got) > 1 {
			t.Errorf("with a region in use: %v", got)
		}
		if h := a.Holders(); !invariants.Enabled && fmt.Sprint(h) != "[memory region in use (1)]" {
			t.Errorf("held by %v", h)
		}
		m.Free(nil)
		synctest.Wait()
		<-a.down
		if a.err != nil {
			t.Error(a.err)
		}
		// Regions of pools and of slabs are both MRs: one before the receive queues, one behind.
		want := "[QP MR SRQ MR CQ PD device]"
		if got := slices.Compact(log.get()); fmt.Sprint(got) != want {
			t.Errorf("closed in the order %v, want %v", got, want)
		}
		chunk.Put()
		qb.Close()
		b.Put()
		r.close()
	})
}

// TestTeardownTriesAgain: whatever a device does not give back at first, once, it has given back when the teardown has ended, and
// the address can be opened again. What it never gives back is named.
func TestTeardownTriesAgain(t *testing.T) {
	errTest := errors.New("the test says no")
	use := func(t *testing.T, r *rig, d *Device) { // leaves what only the teardown gives back
		var h quietHandler
		qp, err := d.CreateQP(QPConfig{MaxSendWR: 4, PoolWR: 8, MaxSendSGE: 1}, &h)
		if err != nil {
			t.Fatal(err)
		}
		qp.Close()
		c, err := r.slab.Alloc(4096)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.SGE(c, 0, 1); err != nil {
			t.Fatal(err)
		}
		c.Put()
		m, err := d.Pools().Register(context.Background(), make([]byte, 100), 0, verbs.AccessLocalWrite)
		if err != nil {
			t.Fatal(err)
		}
		m.Free(nil)
	}
	for _, op := range []faultverbs.Op{faultverbs.Deregister, faultverbs.CloseSRQ, faultverbs.CloseCQ, faultverbs.ClosePD, faultverbs.CloseDevice} {
		failed := 0
		for n, done := 1, false; !done && !t.Failed(); n++ {
			synctest.Test(t, func(t *testing.T) {
				var f faultverbs.Faults
				r, p := newWatchedRig(t)
				r.reg.cfg.Providers = []verbs.Provider{faultverbs.Wrap(p, &f)}
				d := r.open(addrA)
				use(t, r, d)
				f.Fail(op, n, errTest)
				if err := d.Close(context.Background()); err != nil {
					t.Errorf("%v number %d fails: %v", op, n, err)
				}
				if done = f.Clear() > 0; !done {
					failed++
				}
				// The provider has nothing left: all of a device's children are closed before it is.
				d = r.open(addrA)
				d.Put()
				r.close()
			})
		}
		if want := map[faultverbs.Op]int{faultverbs.Deregister: 3, faultverbs.CloseSRQ: 2, faultverbs.CloseCQ: 2, faultverbs.ClosePD: 1, faultverbs.CloseDevice: 1}[op]; failed < want {
			t.Errorf("%v failed %d times, want %d", op, failed, want)
		}
		synctest.Test(t, func(t *testing.T) {
			var f faultverbs.Faults
			r, p := newWatchedRig(t)
			r.reg.cfg.Providers = []verbs.Provider{faultverbs.Wrap(p, &f)}
			d := r.open(addrA)
			use(t, r, d)
			f.FailAll(op, errTest)
			if err := d.Close(context.Background()); !errors.Is(err, errTest) || !strings.Contains(err.Error(), "device softroce-10.0.0.1: ") {
				t.Errorf("%v always fails: %v", op, err)
			}
			f.Clear()
			if err := d.releaseAll(); err != nil {
				t.Error(err)
			}
			r.close()
		})
	}
}

type closeLog struct {
	mu  sync.Mutex
	all []string
}

func (l *closeLog) add(what string) {
	l.mu.Lock()
	l.all = append(l.all, what)
	l.mu.Unlock()
}

func (l *closeLog) clear() {
	l.mu.Lock()
	l.all = nil
	l.mu.Unlock()
}

func (l *closeLog) get() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

type logProvider struct {
	verbs.Provider
	log *closeLog
}

func (p *logProvider) OpenDevice(a netip.Addr) (verbs.Device, error) {
	d, err := p.Provider.OpenDevice(a)
	if err != nil {
		return nil, err
	}
	return &logDevice{d, p.log}, nil
}

// The wrappers log closes. Objects that name each other are unwrapped on the way down.
type (
	logDevice struct {
		verbs.Device
		log *closeLog
	}
	logPD struct {
		verbs.PD
		log *closeLog
	}
	logQP struct {
		verbs.QP
		log *closeLog
	}
	logCQ struct {
		verbs.CQ
		log *closeLog
	}
	logSRQ struct {
		verbs.SRQ
		log *closeLog
	}
	logMR struct {
		verbs.MR
		log *closeLog
	}
)

func (d *logDevice) Close() error { d.log.add("device"); return d.Device.Close() }
func (d *logDevice) AllocPD() (verbs.PD, error) {
	p, err := d.Device.AllocPD()
	return &logPD{p, d.log}, err
}

func (d *logDevice) CreateCQ(c verbs.CQConfig) (verbs.CQ, error) {
	q, err := d.Device.CreateCQ(c)
	return &logCQ{q, d.log}, err
}

func (p *logPD) Close() error { p.log.add("PD"); return p.PD.Close() }
func (p *logPD) CreateSRQ(c verbs.SRQConfig) (verbs.SRQ, error) {
	q, err := p.PD.CreateSRQ(c)
	return &logSRQ{q, p.log}, err
}

func (p *logPD) RegMR(mem []byte, iova uint64, access verbs.Access) (verbs.MR, error) {
	m, err := p.PD.RegMR(mem, iova, access)
	return &logMR{m, p.log}, err
}

func (p *logPD) CreateQP(c verbs.QPConfig) (verbs.QP, error) {
	c.SendCQ, c.RecvCQ, c.SRQ = c.SendCQ.(*logCQ).CQ, c.RecvCQ.(*logCQ).CQ, c.SRQ.(*logSRQ).SRQ
	q, err := p.PD.CreateQP(c)
	return &logQP{q, p.log}, err
}

func (q *logQP) Close() error      { q.log.add("QP"); return q.QP.Close() }
func (q *logCQ) Close() error      { q.log.add("CQ"); return q.CQ.Close() }
func (q *logSRQ) Close() error     { q.log.add("SRQ"); return q.SRQ.Close() }
func (m *logMR) Deregister() error { m.log.add("MR"); return m.MR.Deregister() }

// TestAudit: what is still held is named.
func TestAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newWatchedRig(t)
		d := r.open(addrA)
		var h quietHandler
		qp, err := d.CreateQP(QPConfig{MaxSendWR: 4, MaxSendSGE: 1}, &h)
		if err != nil {
			t.Fatal(err)
		}
		d.GetNamed("listener")
		d.GetNamed("listener")
		d.Get()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err = d.Close(ctx)
		var busy *verbs.BusyError
		if !errors.As(err, &busy) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("close of a device that is held: %v", err)
		}
		if s := strings.Join(busy.Holders, "; "); invariants.Enabled {
			for what, n := range map[string]int{"QP took it at\n": 1, "listener took it at\n": 2, "(unnamed) took it at\n": 1, "ibdev.TestAudit": 3} {
				if strings.Count(s, what) < n {
					t.Errorf("%q is not %d times in the report:\n%s", what, n, s)
				}
			}
		} else if s != "QP (1); listener (2); unnamed (1)" {
			t.Errorf("held by %s", s)
		}
		if fmt.Sprint(h.events) != "[DEVICE_REMOVED]" {
			t.Errorf("events %v", h.events)
		}
		qp.Close()
		d.PutNamed("listener")
		d.PutNamed("listener")
		d.Put()
		r.close()
	})
}

// TestCloseDevice: closing a device that nobody else holds waits for its end, and the address can be opened again.
func TestCloseDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newWatchedRig(t)
		for range 3 {
			if err := r.open(addrA).Close(context.Background()); err != nil {
				t.Error(err)
			}
		}
		r.close()
	})
}

// TestLastReferenceInFlushWorker: the last reference to a device is that of the run of its flush worker.
func TestLastReferenceInFlushWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, p := newWatchedRig(t, func(c *Config) { c.Pools.Small = mrpool.PoolConfig{MaxItems: 8, FlushItems: 1} })
		for range 20 {
			d := r.open(addrA)
			chunk, err := r.slab.Alloc(4096)
			if err != nil {
				t.Fatal(err)
			}
			m, err := d.Pools().Register(context.Background(), chunk.Bytes()[:4096], 0, verbs.AccessLocalWrite)
			if err != nil {
				t.Fatal(err)
			}
			p.Remove(addrA)
			synctest.Wait()
			d.Put()
			m.Free(nil) // starts a flush, whose run holds a reference; this gives back the region's
			select {
			case <-d.down:
			case <-time.After(time.Minute):
				t.Fatalf("not torn down; held by %v", d.Holders())
			}
			if d.err != nil {
				t.Error(d.err)
			}
			chunk.Put()
			p.Add(addrA)
		}
		r.close()
	})
}

// TestChurn opens, uses and removes devices from all sides at once.
func TestChurn(t *testing.T) {
	r, p := newWatchedRig(t)
	addrs := []netip.Addr{addrA, addrB, netip.MustParseAddr("10.0.0.3")}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			part := r.epoch.Register(fmt.Sprint("user ", i))
			defer part.Unregister()
			chunk, err := r.slab.Alloc(4096)
			if err != nil {
				t.Error(err)
				return
			}
			defer chunk.Put()
			for n := i; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				a := addrs[n%len(addrs)]
				d := r.reg.Lookup(part, a)
				if d == nil {
					ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
					if d, err = r.reg.Await(ctx, a); err != nil {
						cancel()
						continue
					}
					cancel()
				}
				if _, err := d.SGE(chunk, 0, 64); err != nil && !d.Gone() && !errors.Is(err, ErrDeviceGone) {
					t.Errorf("SGE: %v", err)
				}
				var h quietHandler
				if qp, err := d.CreateQP(QPConfig{MaxSendWR: 4, PoolWR: 8, MaxSendSGE: 1}, &h); err == nil {
					qp.Close()
				} else if !errors.Is(err, ErrDeviceGone) {
					t.Errorf("create QP: %v", err)
				}
				d.Put()
			}
		})
	}
	for n := range 60 {
		a := addrs[n%len(addrs)]
		if n%5 == 4 {
			if d, err := r.reg.Open(context.Background(), a); err == nil {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				if err := d.Close(ctx); err != nil {
					t.Error(err)
				}
				cancel()
			}
		} else if err := p.Remove(a); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Duration(n%4) * 500 * time.Microsecond)
		p.Add(a)
	}
	close(stop)
	wg.Wait()
	r.close()
}

// TestCloseWaitsForOpening: a device that is being opened while the registry is closed is part of what Close waits for, and names.
func TestCloseWaitsForOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		gate := make(chan struct{})
		hit := &hitProvider{Provider: r.prov.Provider, when: "opened", hit: func() { <-gate }}
		r.reg.cfg.Providers = []verbs.Provider{hit}
		opened := make(chan error, 1)
		go func() {
			_, err := r.reg.Open(context.Background(), addrA)
			opened <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		var busy *verbs.BusyError
		if err := r.reg.Close(ctx); !errors.As(err, &busy) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("closed while a device is being opened: %v", err)
		} else if !strings.Contains(busy.Error(), addrA.String()) {
			t.Errorf("it does not say what keeps it: %v", busy)
		}
		time.AfterFunc(time.Second, func() { close(gate) })
		r.close()
		if err := <-opened; !errors.Is(err, ErrClosed) {
			t.Errorf("open: %v", err)
		}
	})
}
