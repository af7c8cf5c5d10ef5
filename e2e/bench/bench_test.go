package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
	}{
		{nil, spread{}},
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{3, 1, 2}, spread{1, 2, 3}},
		{[]float64{4, 1, 3, 2}, spread{1, 2.5, 4}},
	} {
		if got := spreadOf(c.in); got != c.want {
			t.Errorf("spreadOf(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}

const csvOut = `WARNING: Could not fetch server CONFIG
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"SET","12500.00","0.071","0.024","0.063","0.119","0.215","0.423"
`

func TestParseBenchmark(t *testing.T) {
	s, err := parseBenchmark([]byte(csvOut))
	if err != nil || s.PerSecond != 12500 || s.P50MS != 0.063 || s.P99MS != 0.215 {
		t.Errorf("got %+v, %v", s, err)
	}
	for what, out := range map[string]string{
		"nothing":      "",
		"no row":       `"test","rps","p50_latency_ms","p99_latency_ms"` + "\n",
		"two tests":    csvOut + `"GET","1","1","1","1","1","1","1"`,
		"no number":    strings.Replace(csvOut, "12500.00", "many", 1),
		"none":         strings.Replace(csvOut, "12500.00", "0", 1),
		"no p99":       strings.Replace(csvOut, "p99", "p98", 1),
		"not a number": strings.Replace(csvOut, "0.215", "NaN", 1),
	} {
		if s, err := parseBenchmark([]byte(out)); err == nil {
			t.Errorf("%s: accepted as %+v", what, s)
		}
	}
}

// Ratios are made pair by pair: a machine that is twice as fast in one pair
// must not show.
func TestRatiosAreOfPairs(t *testing.T) {
	at := func(rate, cpu float64) sample {
		return sample{PerSecond: rate, P50MS: 1000 / rate, P99MS: 2000 / rate, CPU: cpuUse{Server: cpu, Total: cpu}}
	}
	l := summarize(workloads()[0], []pair{{at(1000, 10), at(500, 30)}, {at(2000, 5), at(1000, 15)}, {at(100, 100), at(50, 300)}})
	if want := (spread{0.5, 0.5, 0.5}); l.Throughput != want {
		t.Errorf("throughput %v", l.Throughput)
	}
	if want := (spread{3, 3, 3}); l.CPU != want {
		t.Errorf("CPU %v", l.CPU)
	}
	if want := (spread{2, 2, 2}); l.P50 != want || l.P99 != want {
		t.Errorf("p50 %v, p99 %v", l.P50, l.P99)
	}
	if l.Unprotected.PerSecond != 1000 || l.Protected.CPU.Server != 30 {
		t.Errorf("medians: %+v, %+v", l.Unprotected, l.Protected)
	}
}

func TestTableAndFile(t *testing.T) {
	r := &results{
		Started: time.Unix(0, 0), LogAt: "standby", Machine: machine{CPUs: 2, Server: "redis", Ftckpt: "ftckpt 1"},
		Load:     []load{summarize(workloads()[8], []pair{{sample{PerSecond: 10, MBPerSec: 10.5}, sample{PerSecond: 5, MBPerSec: 5.2}}})},
		Pauses:   []pause{{ResidentMB: 10, PauseMS: spread{1, 2, 3}, Runs: make([]pauseRun, 3)}},
		Takeover: []takeover{{Fault: "host", StallMS: spread{100, 200, 300}, Runs: make([]takeoverRun, 5)}},
	}
	var b bytes.Buffer
	if err := r.table(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"upload 1 MiB", "10 MB/s", "0.50 (0.50-0.50)", "2 (1-3)", "200 (100-300)"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table has no %q:\n%s", want, &b)
		}
	}
	file := filepath.Join(t.TempDir(), "new", "bench.json")
	if err := r.save(file); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var back results
	if err := json.Unmarshal(raw, &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Load) != 1 || back.Load[0].Throughput.Median != 0.5 || back.Takeover[0].StallMS.Max != 300 {
		t.Errorf("read back %+v", back)
	}
}

func TestParse(t *testing.T) {
	t.Setenv("BENCH_QUICK", "")
	o, err := parse(nil, io.Discard)
	if err != nil || o.Pairs < 5 || o.Slice != fullPlan.Slice || !o.does("load") || !o.does("takeover") {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	t.Setenv("BENCH_QUICK", "1")
	if o, err = parse([]string{"-pairs", "3", "-only", "load"}, io.Discard); err != nil || o.Pairs != 3 || o.Slice != quickPlan.Slice || o.does("pause") {
		t.Errorf("quick: %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-log-at", "moon"}, {"-only", "x"}, {"load"}, {"-pairs", "x"}, {"-match", "("}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%v: accepted", args)
		}
	}
}

// The clock of another process goes on, and is the kernel's own account.
func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for after := before; after-before < 5*time.Millisecond; {
		if time.Now().After(deadline) {
			t.Fatal("10 s of work, and less than 5 ms of CPU time")
		}
		if after, err = cpuTime(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := cpuTime(1 << 22); err == nil {
		t.Error("a process that cannot be has CPU time")
	}
}
