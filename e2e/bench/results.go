package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"
)

// results is the whole run; its JSON form is what -out has.
type results struct {
	Started  time.Time  `json:"started"`
	Seconds  float64    `json:"seconds"`
	LogAt    string     `json:"log_at"` // the host that has the log
	Machine  machine    `json:"machine"`
	Load     []load     `json:"load"`
	Pauses   []pause    `json:"pauses"`
	Takeover []takeover `json:"takeovers"`
	Growth   []growth   `json:"growth"`
}

type machine struct {
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	Server string `json:"server"`
	Ftckpt string `json:"ftckpt"`
}

func cpus() int { return runtime.NumCPU() }

// pair is two measurements, one soon after the other.
type pair struct {
	Unprotected sample `json:"unprotected"`
	Protected   sample `json:"protected"`
}

// load is a workload's outcome. Ratios are protected to unprotected, pair by
// pair: of throughput more is better, of the others less.
type load struct {
	Workload    string `json:"workload"`
	Unprotected side   `json:"unprotected"`
	Protected   side   `json:"protected"`
	Throughput  spread `json:"ratio_throughput"`
	P50         spread `json:"ratio_p50"`
	P99         spread `json:"ratio_p99"`
	CPU         spread `json:"ratio_cpu"` // of server, agent, log and standby to the server alone
	Pairs       []pair `json:"pairs"`
	bulk        bool   // its rate is told in MB/s
}

// side is the medians of one side.
type side struct {
	PerSecond float64 `json:"requests_per_second"`
	MBPerSec  float64 `json:"mb_per_second"`
	P50MS     float64 `json:"p50_ms"`
	P99MS     float64 `json:"p99_ms"`
	CPU       cpuUse  `json:"cpu_us_per_request"`
}

// spread is what is told of several numbers.
type spread struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return spread{s[0], (s[(n-1)/2] + s[n/2]) / 2, s[n-1]}
}

func (s spread) String() string { return fmt.Sprintf("%.2f (%.2f-%.2f)", s.Median, s.Min, s.Max) }

// ms is the spread with the precision of a stopwatch.
func (s spread) ms() string { return fmt.Sprintf("%.0f (%.0f-%.0f)", s.Median, s.Min, s.Max) }

func summarize(l workload, pairs []pair) load {
	each := func(f func(pair) float64) spread {
		var v []float64
		for _, p := range pairs {
			v = append(v, f(p))
		}
		return spreadOf(v)
	}
	ratio := func(f func(sample) float64) spread {
		return each(func(p pair) float64 {
			if f(p.Unprotected) == 0 { // a latency below the clock's grain
				return 0
			}
			return f(p.Protected) / f(p.Unprotected)
		})
	}
	of := func(pick func(pair) sample) side {
		med := func(f func(sample) float64) float64 {
			return each(func(p pair) float64 { return f(pick(p)) }).Median
		}
		return side{
			PerSecond: med(func(s sample) float64 { return s.PerSecond }),
			MBPerSec:  med(func(s sample) float64 { return s.MBPerSec }),
			P50MS:     med(func(s sample) float64 { return s.P50MS }),
			P99MS:     med(func(s sample) float64 { return s.P99MS }),
			CPU: cpuUse{
				Server:  med(func(s sample) float64 { return s.CPU.Server }),
				Agent:   med(func(s sample) float64 { return s.CPU.Agent }),
				Log:     med(func(s sample) float64 { return s.CPU.Log }),
				Standby: med(func(s sample) float64 { return s.CPU.Standby }),
				Total:   med(func(s sample) float64 { return s.CPU.Total }),
			},
		}
	}
	return load{
		Workload: l.Name, Pairs: pairs, bulk: l.Octets == bulk,
		Unprotected: of(func(p pair) sample { return p.Unprotected }),
		Protected:   of(func(p pair) sample { return p.Protected }),
		Throughput:  ratio(func(s sample) float64 { return s.PerSecond }),
		P50:         ratio(func(s sample) float64 { return s.P50MS }),
		P99:         ratio(func(s sample) float64 { return s.P99MS }),
		CPU:         ratio(func(s sample) float64 { return s.CPU.Total }),
	}
}

// table tells the results to a person.
func (r *results) table(w io.Writer) error {
	t := &table{w: w}
	t.title("%s\n%s\n%d CPUs, Linux %s; the log is on the %s host; %.0f s\n",
		r.Machine.Ftckpt, r.Machine.Server, r.Machine.CPUs, r.Machine.Kernel, r.LogAt, r.Seconds)
	if len(r.Load) > 0 {
		t.title("\nLoad: medians without and with (+) protection; ratios with/without: median (min-max) of %d pairs\n", len(r.Load[0].Pairs))
		t.row("workload", "rate", "rate+", "ratio", "p50 ms", "p50+", "ratio", "p99 ms", "p99+", "ratio")
		for _, l := range r.Load {
			u, v := l.Unprotected, l.Protected
			t.row(l.Workload, l.rate(u), l.rate(v), l.Throughput, f3(u.P50MS), f3(v.P50MS), l.P50, f3(u.P99MS), f3(v.P99MS), l.P99)
		}
		t.title("\nCPU, microseconds per request\n")
		t.row("workload", "server", "server+", "agent+", "log+", "standby+", "sum+", "ratio")
		for _, l := range r.Load {
			u, v := l.Unprotected.CPU, l.Protected.CPU
			standby := f1(v.Standby)
			if r.LogAt == "standby" {
				standby = "in log"
			}
			t.row(l.Workload, f1(u.Server), f1(v.Server), f1(v.Agent), f1(v.Log), standby, f1(v.Total), l.CPU)
		}
	}
	if len(r.Pauses) > 0 {
		t.title("\nGeneration, ms: median (min-max)\n")
		t.row("resident MB", "image MB", "packets held", "longest wait of a client", "until stable", "runs")
		for _, q := range r.Pauses {
			t.row(f0(q.ResidentMB), f0(q.ImageMB), q.PauseMS.ms(), q.ClientMS.ms(), q.StableMS.ms(), len(q.Runs))
		}
	}
	if len(r.Takeover) > 0 {
		t.title("\nTakeover, ms: median (min-max)\n")
		t.row("fault", "kill to next reply", "slowest client", "detect", "restore", "replay", "runs")
		for _, q := range r.Takeover {
			t.row(q.Fault, q.FirstMS.ms(), q.StallMS.ms(), q.DetectMS.ms(), q.RestoreMS.ms(), q.ReplayMS.ms(), len(q.Runs))
		}
	}
	if len(r.Growth) > 0 {
		t.title("\nGrowth: a generation and a takeover by the host's death, ms\n")
		t.row("connections", "active", "image MB", "packets held", "until stable", "detect", "fence", "address", "restore", "replay", "live", "slowest client", "resets")
		for _, g := range r.Growth {
			s := g.Steps
			t.row(g.Connections, g.Active, f1(g.ImageMB), f0(g.PauseMS), f0(g.StableMS), f0(s.DetectMS), f0(s.FenceMS), f0(s.VIPMS),
				f0(s.RestoreMS), f0(s.ReplayMS), f0(s.TotalMS), f0(g.StallMS), g.Resets+g.Mismatches)
		}
	}
	t.flush()
	return t.err
}

// table aligns the rows between two titles.
type table struct {
	w   io.Writer
	tab *tabwriter.Writer
	err error
}

func (t *table) flush() {
	if t.tab != nil {
		t.err = errors.Join(t.err, t.tab.Flush())
	}
	t.tab = tabwriter.NewWriter(t.w, 0, 8, 2, ' ', tabwriter.AlignRight)
}

func (t *table) title(format string, args ...any) {
	t.flush()
	_, err := fmt.Fprintf(t.w, format, args...)
	t.err = errors.Join(t.err, err)
}

func (t *table) row(cells ...any) {
	for _, c := range cells {
		fmt.Fprintf(t.tab, "%v\t", c) // Flush has its error
	}
	fmt.Fprintln(t.tab)
}

func f0(v float64) string { return fmt.Sprintf("%.0f", v) }
func f1(v float64) string { return fmt.Sprintf("%.1f", v) }
func f3(v float64) string { return fmt.Sprintf("%.3f", v) }

func (l *load) rate(s side) string {
	if l.bulk {
		return fmt.Sprintf("%.0f MB/s", s.MBPerSec)
	}
	return fmt.Sprintf("%.0f/s", s.PerSecond)
}
