package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/openrds/openrds/rds"
)

// What rds-stress prints (rds-protocol spec 7.4, and the release that knows IPv6).

// params prints what is going to be measured.
func (s *stress) params() {
	o := &s.opt
	w := s.stdout
	fmt.Fprintln(w, "Options:")
	for _, p := range []struct {
		name string
		n    uint32
	}{{"Tasks", uint32(o.Tasks)}, {"Req size", o.ReqSize}, {"ACK size", o.AckSize}, {"RDMA size", o.RDMASize}} {
		fmt.Fprintf(w, "  %-10s %-7d\n", p.name, p.n)
	}
	set := ""
	for _, p := range []struct {
		name string
		on   bool
	}{{"use_once", o.UseOnce}, {"use_get_mr", o.UseGetMR}, {"use_fence", o.UseFence}, {"cache_mrs", o.CacheMRs}, {fmt.Sprintf("align=%d", o.Alignment), o.Alignment != 0}} {
		if p.on {
			set += " " + p.name
		}
	}
	if set == "" {
		set = " (defaults)"
	}
	fmt.Fprintf(w, "  %-10s%s\n\n", "RDMA opts", set)
}

func total(tasks []*stressTask) (c stressCounts) {
	for _, t := range tasks {
		c.add(t.snapshot(), 1)
	}
	return c
}

// report starts the tasks, and prints a line per second. The active side ends when the time is over, the passive one when the active one has
// ended. The average is printed by done, once all is quiet. The error is that the peer has ended before the active side's time was over; in the
// last second it may, since rds-stress's passive side has a clock of its own.
func (s *stress) report(ctx context.Context, over <-chan struct{}, active bool, host stressHost, tasks []*stressTask) (done func(), early error) {
	w := s.stdout
	fmt.Fprint(w, "Starting up")
	for i := range 4 {
		if !pause(ctx, over, s.burnIn/4) {
			fmt.Fprintln(w)
			return func() {}, s.early(active, 0)
		}
		fmt.Fprint(w, ".")
		if i == 1 {
			for _, t := range tasks {
				t.start()
			}
		}
	}
	fmt.Fprintln(w)
	if s.abortAfter > 0 {
		defer time.AfterFunc(time.Duration(s.abortAfter)*s.second, s.abort).Stop()
	}
	perf := newPerfdata(host)
	if s.opt.ShowPerfdata {
		s.perfHeader(perf)
	} else {
		fmt.Fprintf(w, "%4s %6s %6s %10s %10s %10s %7s %8s %5s\n", "tsks", "tx/s", "rx/s", "tx+rx K/s", "mbi K/s", "mbo K/s", "tx us/c", "rtt us", "cpu %")
	}
	begin := time.Now()
	first := total(tasks)
	last, lastAt := first, begin
	firstCPU, lastCPU := cpuTime(), cpuTime()
	for n := 1; !active || s.opt.RunTime == 0 || n <= int(s.opt.RunTime); n++ {
		on := pause(ctx, over, time.Until(begin.Add(time.Duration(n)*s.second)))
		now, c, cpu := time.Now(), total(tasks), cpuTime()
		if !on {
			early = s.early(active, n-1)
			break
		}
		d := c
		d.add(last, ^uint64(0))
		took := now.Sub(lastAt)
		percent := s.cpuPercent(cpu-lastCPU, took)
		switch {
		case s.opt.SummaryOnly:
		case s.opt.ShowPerfdata:
			s.perfLine(perf, d, took, percent)
		default:
			s.line(d, took, d.ReqTx, d.ReqRx, percent, "")
		}
		last, lastAt, lastCPU = c, now, cpu
	}
	return func() {
		d := last
		d.add(first, ^uint64(0))
		took := lastAt.Sub(begin)
		if took <= 0 {
			return
		}
		if !s.opt.SummaryOnly {
			fmt.Fprintln(w, strings.Repeat("-", 45))
		}
		secs := took.Seconds()
		s.line(d, took, uint64(float64(d.ReqTx)/secs), uint64(float64(d.ReqRx)/secs), s.cpuPercent(lastCPU-firstCPU, took), "  (average)")
		if s.hist {
			s.histogram(tasks)
		}
	}, early
}

// early is the error of a test that the peer ended after so many seconds.
func (s *stress) early(active bool, seconds int) error {
	if !active || seconds+1 >= int(s.opt.RunTime) {
		return nil
	}
	return fmt.Errorf("the peer ended the test after %d of %d seconds", seconds, s.opt.RunTime)
}

// histogram prints round trips by powers of two.
func (s *stress) histogram(tasks []*stressTask) {
	var sum stressHistogram
	all := uint64(0)
	for _, t := range tasks {
		t.mu.Lock()
		for i, n := range t.hist {
			sum[i] += n
			all += n
		}
		t.mu.Unlock()
	}
	fmt.Fprintf(s.stdout, "\nRTT histogram\nRTT (us)        \t\t    Count\n")
	for i, n := range sum {
		fmt.Fprintf(s.stdout, "[%6d - %6d] \t\t %8d \t\t (%.2f%%)\n", 1<<i, 1<<(i+1), n, 100*float64(n)/float64(max(all, 1)))
	}
}

func (c *stressCounts) bytes() uint64 {
	return c.ReqTxBytes + c.ReqRxBytes + c.AckTxBytes + c.AckRxBytes
}

// kps is KiB per second.
func kps(bytes uint64, d time.Duration) float64 { return float64(bytes) / 1024 / d.Seconds() }

// mean is the mean in microseconds.
func mean(sum time.Duration, n uint64) float64 {
	if n == 0 {
		return 0
	}
	return float64(sum) / float64(n) / 1e3
}

func (s *stress) line(d stressCounts, took time.Duration, tx, rx uint64, cpu float64, suffix string) {
	fmt.Fprintf(s.stdout, "%4d %6d %6d %10.2f %10.2f %10.2f %7.2f %8.2f %5.2f%s\n", s.opt.Tasks, tx, rx,
		kps(d.bytes(), took), kps(d.MbusIn, took), kps(d.MbusOut, took), mean(d.SendTime, d.ReqTx), mean(d.RTT, d.AckRx), cpu, suffix)
}

// cpuPercent is what the process used of all processors, -1 unless asked for.
func (s *stress) cpuPercent(used, took time.Duration) float64 {
	if !s.cpu {
		return -1
	}
	return 100 * used.Seconds() / took.Seconds() / float64(runtime.NumCPU())
}

// perfdata is what --show-perfdata has beside the columns of the table: the counters of an RDS, and the processors' times, where there are any.
type perfdata struct {
	host     stressHost
	counters []rds.Counter // when they were last printed
	system   systemTimes
	hasTimes bool
}

func newPerfdata(host stressHost) *perfdata {
	p := &perfdata{host: host, counters: host.counters()}
	p.system, p.hasTimes = readSystemTimes()
	return p
}

// perfHeader names the fields of perfLine. rds-stress has one name, thruput_rdma, for the two that are in and out here.
func (s *stress) perfHeader(p *perfdata) {
	b := []byte("::nr_tasks:count,req_size:bytes,ack_size:bytes,rdma_size:bytes,req_sent:count,thruput:kB/s,thruput_mbi:kB/s,thruput_mbo:kB/s," +
		"tx_delay:microseconds,rtt:microseconds,cpu:percent")
	for _, c := range p.counters {
		unit := "count"
		if strings.Contains(c.Name, "_bytes") {
			unit = "bytes"
		}
		b = fmt.Appendf(b, ",%s:%s", c.Name, unit)
	}
	if p.hasTimes {
		b = append(b, ",user:percent,system:percent,idle:percent,irq:percent,intr:count"...)
	}
	s.stdout.Write(append(b, '\n'))
}

// perfLine prints what happened in the time that it took: counters per second, times in percent.
func (s *stress) perfLine(p *perfdata, d stressCounts, took time.Duration, cpu float64) {
	o := &s.opt
	// One write: whoever finds a long round trip writes between two.
	b := fmt.Appendf(nil, "::%d,%d,%d,%d,%d,%f,%f,%f,%f,%f,%f", o.Tasks, o.ReqSize, o.AckSize, o.RDMASize, d.ReqTx,
		kps(d.bytes(), took), kps(d.MbusIn, took), kps(d.MbusOut, took), mean(d.SendTime, d.ReqTx), mean(d.RTT, d.AckRx), max(cpu, 0))
	now := p.host.counters()
	for i := range p.counters { // the header's
		rate := 0.0
		if i < len(now) {
			rate = float64(int64(now[i].Value-p.counters[i].Value)) / took.Seconds() // some tell how much there is, and may fall
		}
		b = fmt.Appendf(b, ",%f", rate)
	}
	if len(now) == len(p.counters) {
		p.counters = now
	}
	if p.hasTimes {
		now, _ := readSystemTimes()
		user, system, idle, irq, intr := now.since(p.system)
		b = fmt.Appendf(b, ",%f,%f,%f,%f,%d", user, system, idle, irq, intr)
		p.system = now
	}
	s.stdout.Write(append(b, '\n'))
}

// systemTimes are the times of all processors since the system started, in ticks, and its interrupts.
type systemTimes struct {
	user, system, idle, irq, all, intr uint64
}

// readSystemTimes reads /proc/stat, where there is one.
func readSystemTimes() (t systemTimes, ok bool) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, false
	}
	return parseSystemTimes(b)
}

// Source: proc_stat(5).
func parseSystemTimes(b []byte) (t systemTimes, ok bool) {
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line[:min(len(line), 512)])) // intr goes on for long
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "cpu": // user, nice, system, idle, iowait, irq, softirq, steal; what guests took is among them
			var n [8]uint64
			for i := range min(len(n), len(f)-1) {
				n[i], _ = strconv.ParseUint(f[i+1], 10, 64)
				t.all += n[i]
			}
			t.user, t.system, t.idle, t.irq, ok = n[0]+n[1], n[2], n[3]+n[4], n[5]+n[6], true
		case "intr":
			t.intr, _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	return t, ok
}

// since is the share of each in percent, and the interrupts, since old.
func (t systemTimes) since(old systemTimes) (user, system, idle, irq float64, intr uint64) {
	part := func(now, then uint64) float64 {
		if t.all <= old.all || now < then { // the kernel's times of waiting may go back
			return 0
		}
		return 100 * float64(now-then) / float64(t.all-old.all)
	}
	return part(t.user, old.user), part(t.system, old.system), part(t.idle, old.idle), part(t.irq, old.irq), t.intr - old.intr
}
