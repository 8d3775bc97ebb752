package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/dustin/go-humanize"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

//go:embed report.html
var reportHTML string

var reportTemplate = template.Must(template.New("report").Parse(reportHTML))

// writeHTML writes a page that needs nothing but itself: table, parameters, and plots as inline SVG.
func (r *report) writeHTML(w io.Writer) error {
	page, err := r.html()
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	_, err = w.Write(page)
	return err
}

// A section of the page is a heading with plots of one kind.
type section struct {
	Title, Text string
	Plots       []template.HTML
}

func (r *report) html() ([]byte, error) {
	var sections []section
	for _, s := range []struct {
		title, text string
		plots       func() ([]*plot.Plot, error)
	}{
		{"Throughput over time", "Messages per second, as the receiving application counts them, in each interval of the run.", r.plotOverTime},
		{"Latency by percentile", "Of round trips: of one datagram in flight, or, at an offered rate, from when a datagram was due to its answer.", r.plotPercentiles},
		{"Latency under load", "From when a datagram was due to its answer, by the rate at which datagrams were due.", r.plotLoad},
		{"Beside the baselines", "Messages per second in multiples of the baseline's.", r.plotComparison},
	} {
		plots, err := s.plots()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.title, err)
		}
		sec := section{Title: s.title, Text: s.text}
		for _, p := range plots {
			svg, err := inlineSVG(p)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.title, err)
			}
			sec.Plots = append(sec.Plots, svg)
		}
		if len(plots) > 0 {
			sections = append(sections, sec)
		}
	}
	head, hasLoad := r.head()
	var rows [][]string
	for _, l := range r.lines() {
		rows = append(rows, r.row(formatSize(l.size), l, hasLoad))
	}
	var b bytes.Buffer
	err := reportTemplate.Execute(&b, struct {
		*report
		Head     []string
		Rows     [][]string
		Sections []section
	}{r, head, rows, sections})
	return b.Bytes(), err
}

const (
	plotWidth  = 6.5 * vg.Inch
	plotHeight = 3.6 * vg.Inch
)

// inlineSVG is p as an element of HTML. What is in it comes from this program alone, and the library escapes it too.
func inlineSVG(p *plot.Plot) (template.HTML, error) {
	c := vgsvg.New(plotWidth, plotHeight)
	p.Draw(draw.New(c))
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return "", err
	}
	s := b.String()
	return template.HTML(s[max(0, strings.Index(s, "<svg")):]), nil
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	return p
}

// addLine adds a line, and a dot where it begins, so that a line of one point is seen.
func addLine(p *plot.Plot, n int, name string, xys plotter.XYs) error {
	l, dots, err := plotter.NewLinePoints(xys)
	if err != nil {
		return err
	}
	l.Color, l.Dashes, l.Width = plotutil.Color(n), plotutil.Dashes(n/len(plotutil.DefaultColors)), vg.Points(1.5)
	dots.Color, dots.Shape, dots.Radius = l.Color, draw.CircleGlyph{}, vg.Points(1.5)
	p.Add(l, dots)
	p.Legend.Add(name, l)
	return nil
}

// siTicks are the default ones with units: 1.5 M.
type siTicks struct{ plot.Ticker }

func (t siTicks) Ticks(from, to float64) []plot.Tick {
	ticks := t.Ticker.Ticks(from, to)
	for i := range ticks {
		if ticks[i].Label != "" {
			ticks[i].Label = strings.TrimSpace(humanize.SIWithDigits(ticks[i].Value, 3, ""))
		}
	}
	return ticks
}

// rungs groups runs that are compared with each other, in order.
func (r *report) rungs(of func(*result) bool) [][]*result {
	type key struct {
		round, size int
		test        string
		rate        float64
	}
	var order []key
	groups := make(map[key][]*result)
	for i := range r.Runs {
		if run := &r.Runs[i]; of(run) {
			k := key{run.Round, run.moved(), run.Test, run.Offered}
			if groups[k] == nil {
				order = append(order, k)
			}
			groups[k] = append(groups[k], run)
		}
	}
	var out [][]*result
	for _, k := range order {
		out = append(out, groups[k])
	}
	return out
}

// title names a rung.
func (r *report) title(run *result) string {
	t := formatSize(run.moved()) + ", " + run.Test
	if run.Offered > 0 {
		t += " of " + formatRate(run.Offered) + "/s"
	}
	if r.Start.Parameters.Count > 1 {
		t += fmt.Sprintf(", round %d", run.Round+1)
	}
	return t
}

func (r *report) plotOverTime() ([]*plot.Plot, error) {
	var out []*plot.Plot
	for _, rung := range r.rungs(func(run *result) bool { return run.Test != testRTT && len(run.Intervals) > 0 }) {
		p := newPlot(r.title(rung[0]), "seconds", "messages/s")
		p.Y.Min = 0
		p.Y.Tick.Marker = siTicks{plot.DefaultTicks{}}
		for i, run := range rung {
			var xys plotter.XYs
			for _, iv := range run.Intervals {
				xys = append(xys, plotter.XY{X: (iv.BeginSeconds + iv.EndSeconds) / 2, Y: iv.MessagesPerSecond})
				p.Y.Max = max(p.Y.Max, iv.MessagesPerSecond*1.3) // room for the legend
			}
			if err := addLine(p, i, run.over(), xys); err != nil {
				return nil, err
			}
		}
		p.X.Min, p.X.Max = 0, p.X.Max*1.1
		out = append(out, p)
	}
	return out, nil
}

// plotPercentiles has 1/(1-q) on a logarithmic axis, on which a tail is as wide as the body.
func (r *report) plotPercentiles() ([]*plot.Plot, error) {
	var out []*plot.Plot
	for _, rung := range r.rungs(func(run *result) bool { return run.times != nil }) {
		p := newPlot(r.title(rung[0]), "percentile", "µs")
		p.Legend.Left = true
		for i, run := range rung {
			if err := addLine(p, i, run.over(), percentileLine(run.times)); err != nil {
				return nil, err
			}
		}
		var ticks []plot.Tick
		for x, nines := 10.0, "90%"; x <= p.X.Max; x *= 10 {
			ticks = append(ticks, plot.Tick{Value: x, Label: nines})
			if nines = strings.TrimSuffix(nines, "%") + "9%"; nines == "909%" {
				nines = "99%"
			} else if nines == "999%" {
				nines = "99.9%"
			}
		}
		p.X.Tick.Marker = append(plot.ConstantTicks{{Value: 1, Label: "0%"}, {Value: 2, Label: "50%"}}, ticks...)
		logAxis(&p.X)
		logAxis(&p.Y)
		p.Y.Tick.Marker = siTicks{plot.LogTicks{Prec: -1}}
		out = append(out, p)
	}
	return out, nil
}

func percentileLine(h *hdrhistogram.Histogram) plotter.XYs {
	var xys plotter.XYs
	for _, b := range h.CumulativeDistributionWithTicks(5) {
		if b.Quantile >= 100 {
			// The largest value: as far out as the number of values justifies.
			x := max(2, float64(h.TotalCount()))
			xys = append(xys, plotter.XY{X: x, Y: float64(h.Max()) / 1e3})
			break
		}
		xys = append(xys, plotter.XY{X: 100 / (100 - b.Quantile), Y: float64(max(1, b.ValueAt)) / 1e3})
	}
	return xys
}

// logAxis makes an axis logarithmic whose data are above 0.
func logAxis(a *plot.Axis) {
	a.Scale = plot.LogScale{}
	a.AutoRescale = false
	if a.Min <= 0 || math.IsInf(a.Min, 0) {
		a.Min = 1e-3
	}
	if a.Max <= a.Min {
		a.Min, a.Max = a.Min/1.5, a.Min*1.5
	}
}

func (r *report) plotLoad() ([]*plot.Plot, error) {
	type key struct {
		size int
		over string
	}
	var sizes []int
	runs := make(map[key][]*result)
	var order []key
	for i := range r.Runs {
		run := &r.Runs[i]
		if run.Test != testLoad || run.RTTSeconds == nil {
			continue
		}
		k := key{run.moved(), run.over()}
		if runs[k] == nil {
			order = append(order, k)
		}
		if !slices.Contains(sizes, k.size) {
			sizes = append(sizes, k.size)
		}
		runs[k] = append(runs[k], run)
	}
	var out []*plot.Plot
	for _, size := range sizes {
		p := newPlot(formatSize(size), "offered messages/s", "µs")
		p.Legend.Left = true
		n, points := 0, 0
		for _, k := range order {
			if k.size != size {
				continue
			}
			slices.SortStableFunc(runs[k], func(a, b *result) int { return cmp.Compare(a.Offered, b.Offered) })
			for _, q := range []struct {
				name string
				of   func(*percentiles) float64
			}{{"p50", latencyMetrics["p50"]}, {"p99", latencyMetrics["p99"]}} {
				var xys plotter.XYs
				for _, run := range runs[k] {
					xys = append(xys, plotter.XY{X: run.Offered, Y: max(q.of(run.RTTSeconds)*1e6, 1e-3)})
				}
				points = max(points, len(xys))
				if err := addLine(p, n, k.over+" "+q.name, xys); err != nil {
					return nil, err
				}
				n++
			}
		}
		if points < 2 {
			continue // one rate makes no curve
		}
		p.Y.Max *= 10 // room for the legend
		logAxis(&p.X)
		logAxis(&p.Y)
		p.X.Tick.Marker = siTicks{plot.LogTicks{Prec: -1}}
		p.Y.Tick.Marker = siTicks{plot.LogTicks{Prec: -1}}
		out = append(out, p)
	}
	return out, nil
}

// plotComparison has a group of bars for each size, one for each baseline.
func (r *report) plotComparison() ([]*plot.Plot, error) {
	var out []*plot.Plot
	for _, base := range baselines {
		var overs, labels []string
		ratios := make(map[string]plotter.Values) // by over, one for each label
		for _, rung := range r.rungs(func(run *result) bool { return run.Test == testThroughput }) {
			i := slices.IndexFunc(rung, func(run *result) bool { return run.over() == base })
			if i < 0 || rung[i].MessagesPerSecond <= 0 {
				continue
			}
			label := formatSize(rung[i].moved())
			if r.Start.Parameters.Count > 1 {
				label += fmt.Sprintf(" (%d)", rung[i].Round+1)
			}
			labels = append(labels, label)
			for _, run := range rung {
				over := run.over()
				if over == base || slices.Contains(baselines, over) && over != transportRDS {
					continue // baselines are not compared with each other
				}
				if ratios[over] == nil {
					overs = append(overs, over)
				}
				for len(ratios[over]) < len(labels)-1 {
					ratios[over] = append(ratios[over], 0) // not measured there
				}
				ratios[over] = append(ratios[over], run.MessagesPerSecond/rung[i].MessagesPerSecond)
			}
		}
		if len(overs) == 0 {
			continue
		}
		p := newPlot("beside "+base, "", "times "+base)
		width := vg.Points(min(24, 300/float64(len(labels)*len(overs))))
		for i, over := range overs {
			for len(ratios[over]) < len(labels) {
				ratios[over] = append(ratios[over], 0)
			}
			bars, err := plotter.NewBarChart(ratios[over], width)
			if err != nil {
				return nil, err
			}
			bars.Color, bars.LineStyle.Width = plotutil.Color(i), 0
			bars.Offset = width * vg.Length(float64(i)-float64(len(overs)-1)/2)
			p.Add(bars)
			p.Legend.Add(over, bars)
		}
		one := plotter.NewFunction(func(float64) float64 { return 1 })
		one.XMin, one.XMax = -0.5, float64(len(labels))-0.5
		one.Dashes, one.Width = plotutil.Dashes(1), vg.Points(1)
		p.Add(one)
		p.Legend.Add(base, one)
		p.NominalX(labels...)
		p.X.Min, p.X.Max = -0.5, float64(len(labels))-0.5
		p.Y.Min = 0
		p.Y.Max = max(p.Y.Max, 1) * 1.3
		out = append(out, p)
	}
	return out, nil
}

// Started is for the page.
func (s start) Started() string { return s.Time.Format(time.RFC1123) }
