package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// workload is one way of calling redis-benchmark.
type workload struct {
	Name     string
	Test     string // set or get
	Conns    int
	Pipeline int
	Octets   int // of a value
}

const (
	small = 100
	bulk  = 1 << 20
)

// workloads are those of the issue. A get finds what the set before it wrote.
func workloads() []workload {
	var ws []workload
	for _, conns := range []int{1, 50} {
		for _, pipeline := range []int{1, 16} {
			for _, test := range []string{"set", "get"} {
				ws = append(ws, workload{
					Name: fmt.Sprintf("%s c%d P%d", strings.ToUpper(test), conns, pipeline),
					Test: test, Conns: conns, Pipeline: pipeline, Octets: small,
				})
			}
		}
	}
	return append(ws,
		workload{Name: "upload 1 MiB", Test: "set", Conns: 1, Pipeline: 4, Octets: bulk},
		workload{Name: "download 1 MiB", Test: "get", Conns: 1, Pipeline: 4, Octets: bulk})
}

// cpuUse is CPU time per request, in microseconds, or in all.
type cpuUse struct {
	Server  float64 `json:"server"`
	Agent   float64 `json:"agent"`
	Log     float64 `json:"log"` // and standby, where it is one process with it
	Standby float64 `json:"standby"`
	Total   float64 `json:"total"`
}

// sample is one measurement of a workload.
type sample struct {
	Requests  int     `json:"requests"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"requests_per_second"`
	MBPerSec  float64 `json:"mb_per_second"` // of values
	P50MS     float64 `json:"p50_ms"`
	P99MS     float64 `json:"p99_ms"`
	CPU       cpuUse  `json:"cpu_us_per_request"`
}

// measureLoad measures every workload without and with protection, in turn.
func measureLoad(ctx context.Context, o options, r *results) error {
	return in(ctx, o, detectNever, func(w *world) error {
		m := &meter{w: w, rate: map[string]float64{}}
		var todo []workload
		for _, l := range workloads() {
			if o.match.MatchString(l.Name) {
				todo = append(todo, l)
			}
		}
		if len(todo) == 0 {
			return fmt.Errorf("no workload's name matches %q", o.match)
		}
		pairs := make([][]pair, len(todo))
		for i := range pairs {
			pairs[i] = make([]pair, o.Pairs)
		}
		// Every second pair is the other way round: the protection changes only
		// between pairs, and a drift of the machine favours neither.
		for n := range o.Pairs {
			for _, protected := range [2]bool{n%2 == 1, n%2 == 0} {
				if err := w.set(ctx, protected); err != nil {
					return err
				}
				o.sayf("load: pair %d of %d, protected: %v", n+1, o.Pairs, protected)
				for i, l := range todo {
					s, err := m.run(ctx, l)
					if err != nil {
						return fmt.Errorf("%s: %w", l.Name, err)
					}
					if protected {
						pairs[i][n].Protected = s
					} else {
						pairs[i][n].Unprotected = s
					}
				}
			}
		}
		for i, l := range todo {
			r.Load = append(r.Load, summarize(l, pairs[i]))
		}
		return nil
	})
}

// set starts or ends protection where that is not as wanted.
func (w *world) set(ctx context.Context, protected bool) error {
	switch {
	case protected && w.agent == nil:
		return w.protect(ctx)
	case !protected && w.agent != nil:
		return w.unprotect(ctx)
	}
	return nil
}

// meter runs redis-benchmark. It counts requests, not time, so what was
// measured before says how many make a slice.
type meter struct {
	w    *world
	rate map[string]float64 // requests per second, by workload and protection
}

func (m *meter) run(ctx context.Context, l workload) (sample, error) {
	key := fmt.Sprint(l.Name, m.w.agent != nil)
	// A look first: one too short to be timed says nothing.
	for n := 2 * l.Conns * l.Pipeline; m.rate[key] == 0; n *= 8 {
		s, err := m.bench(ctx, l, n)
		if err != nil {
			return s, err
		}
		if s.Seconds >= m.w.o.Slice.Seconds()/16 {
			m.rate[key] = s.PerSecond
		}
	}
	s, err := m.bench(ctx, l, m.requests(l, key, m.w.o.Slice))
	if err != nil {
		return s, err
	}
	if s.Seconds == 0 {
		return s, fmt.Errorf("%d requests took no time: give it longer slices", s.Requests)
	}
	m.rate[key] = s.PerSecond
	if m.w.agent != nil && l.Octets == bulk {
		// Makes room in the log, as the generations of a real service do.
		for range 2 {
			if _, err := m.w.generation(ctx); err != nil {
				return s, err
			}
		}
	}
	return s, nil
}

func (m *meter) requests(l workload, key string, d time.Duration) int {
	return max(4, l.Conns*l.Pipeline, int(m.rate[key]*d.Seconds()))
}

func (m *meter) bench(ctx context.Context, l workload, requests int) (s sample, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*m.w.o.Slice+20*time.Second)
	defer cancel()
	args := []string{"-h", vip, "-p", port, "--csv", "-t", l.Test, "-c", strconv.Itoa(l.Conns), "-P", strconv.Itoa(l.Pipeline),
		"-d", strconv.Itoa(l.Octets), "-n", strconv.Itoa(requests)}
	if l.Octets == small {
		args = append(args, "-r", "10000")
	}
	before, err := m.w.cpu()
	if err != nil {
		return s, err
	}
	out, err := m.w.client.CommandContext(ctx, "redis-benchmark", args...).Output()
	if err != nil {
		return s, errors.Join(fmt.Errorf("redis-benchmark: %w", err), ctx.Err())
	}
	after, err := m.w.cpu()
	if err != nil {
		return s, err
	}
	if s, err = parseBenchmark(out); err != nil {
		return s, err
	}
	s.Requests = requests
	s.Seconds = float64(requests) / s.PerSecond // 0 where that is infinite: no tick of its clock
	s.MBPerSec = s.PerSecond * float64(l.Octets) / 1e6
	s.CPU = after.less(before, requests)
	return s, nil
}

// cpu is the CPU time of all parts so far, in microseconds.
func (w *world) cpu() (u cpuUse, err error) {
	at := func(d *daemon) float64 {
		if d == nil || err != nil {
			return 0
		}
		var t time.Duration
		t, err = cpuTime(d.pid)
		return float64(t.Nanoseconds()) / 1000
	}
	u.Server, u.Agent = at(&w.server), at(w.agent)
	if w.log != nil {
		u.Log, u.Standby = at(w.log), at(&w.second)
	} else {
		u.Log = at(&w.second)
	}
	if w.agent == nil { // then their idling is no part of the service
		u.Log, u.Standby = 0, 0
	}
	u.Total = u.Server + u.Agent + u.Log + u.Standby
	return u, err
}

func (u cpuUse) less(v cpuUse, requests int) cpuUse {
	n := float64(requests)
	return cpuUse{(u.Server - v.Server) / n, (u.Agent - v.Agent) / n, (u.Log - v.Log) / n, (u.Standby - v.Standby) / n, (u.Total - v.Total) / n}
}

// parseBenchmark reads what redis-benchmark --csv prints for one test.
func parseBenchmark(out []byte) (s sample, err error) {
	// Warnings come on lines before; the table begins with its head.
	i := bytes.Index(out, []byte(`"test","rps"`))
	if i < 0 {
		return s, fmt.Errorf("read redis-benchmark's output: no table in %q (version 6.2 or newer is needed)", short(out))
	}
	rows, err := csv.NewReader(bytes.NewReader(out[i:])).ReadAll()
	if err != nil || len(rows) != 2 {
		return s, fmt.Errorf("read redis-benchmark's output: want one row, got %q: %w", short(out), err)
	}
	for want, to := range map[string]*float64{"rps": &s.PerSecond, "p50_latency_ms": &s.P50MS, "p99_latency_ms": &s.P99MS} {
		found := false
		for c, name := range rows[0] {
			if name != want {
				continue
			}
			found = true
			if *to, err = strconv.ParseFloat(rows[1][c], 64); err != nil || !(*to >= 0) {
				return s, fmt.Errorf("read redis-benchmark's output: %s is %q", name, rows[1][c])
			}
		}
		if !found {
			return s, fmt.Errorf("read redis-benchmark's output: no column %s", want)
		}
	}
	if s.PerSecond <= 0 {
		return s, errors.New("read redis-benchmark's output: no requests per second")
	}
	return s, nil
}

func short(b []byte) []byte { return b[:min(len(b), 300)] }
