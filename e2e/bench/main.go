package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
)

func main() {
	lab.Hook()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // the first signal asks, the second one kills
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// plan is how much is measured. The full one takes about eight minutes.
type plan struct {
	Pairs       int           // unprotected and protected, each workload
	Slice       time.Duration // of one measurement
	PauseMB     []int         // resident sizes of the server
	Generations int           // at each size
	Takeovers   int           // of each fault
	Growth      []int         // numbers of connections
	GrowthRuns  int           // with each of them
}

// crowds are the numbers of connections whose takeovers are compared.
var crowds = []int{10, 100, 1000, 5000}

var (
	fullPlan  = plan{Pairs: 7, Slice: 2 * time.Second, PauseMB: []int{10, 500}, Generations: 7, Takeovers: 5, Growth: crowds, GrowthRuns: 3}
	quickPlan = plan{Pairs: 5, Slice: 600 * time.Millisecond, PauseMB: []int{10, 500}, Generations: 3, Takeovers: 2, Growth: crowds, GrowthRuns: 1}
)

type options struct {
	plan
	ftckpt string
	out    string
	logAt  string         // "standby" or "log"
	only   string         // "load", "pause", "takeover", "growth" or all but the last
	match  *regexp.Regexp // of the workloads' names
	say    io.Writer
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{say: stderr}
	full := fullPlan
	if os.Getenv("BENCH_QUICK") == "1" {
		full = quickPlan
	}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.ftckpt, "ftckpt", "bin/ftckpt", "the program to measure, `FILE`")
	fs.StringVar(&o.out, "out", "out/bench.json", "write the results to `FILE` too")
	fs.StringVar(&o.logAt, "log-at", "standby", "keep the log on the `standby|log` host")
	fs.StringVar(&o.only, "only", "", "measure `load|pause|takeover|growth` alone; growth only so")
	crowd := fs.Int("connections", 0, "of the growth, `N` connections alone (default 10, 100, 1000 and 5000)")
	match := fs.String("match", "", "of the load, only workloads whose name matches `REGEXP`")
	quick := fs.Bool("quick", false, "a run of two minutes (also BENCH_QUICK=1)")
	fs.IntVar(&o.Pairs, "pairs", 0, "`N` pairs of measurements (default by the plan)")
	fs.DurationVar(&o.Slice, "slice", 0, "`TIME` of one measurement (default by the plan)")
	mb := fs.Int("mb", 0, "pauses of a server of `N` MB alone (default 10 and 500)")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if *quick {
		full = quickPlan
	}
	if o.Pairs > 0 {
		full.Pairs = o.Pairs
	}
	if *mb > 0 {
		full.PauseMB = []int{*mb}
	}
	if *crowd > 0 {
		full.Growth = []int{*crowd}
	}
	if o.Slice > 0 {
		full.Slice = o.Slice
	}
	o.plan = full
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.logAt != "standby" && o.logAt != "log":
		return o, fmt.Errorf("-log-at %q: want standby or log", o.logAt)
	case !slices.Contains([]string{"", "load", "pause", "takeover", "growth"}, o.only):
		return o, fmt.Errorf("-only %q: want load, pause, takeover or growth", o.only)
	}
	var err error
	if o.match, err = regexp.Compile(*match); err != nil {
		return o, fmt.Errorf("-match: %w", err)
	}
	o.ftckpt, err = filepath.Abs(o.ftckpt)
	return o, err
}

func (o *options) does(what string) bool { return o.only == "" || o.only == what }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintf(stderr, "bench: %v\n", err)
		}
		return 2
	}
	r, err := measure(ctx, o)
	if err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	if err := r.table(stdout); err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	if err := r.save(o.out); err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	fmt.Fprintf(stdout, "\nresults: %s\n", o.out)
	return 0
}

func measure(ctx context.Context, o options) (*results, error) {
	r := &results{Started: time.Now().UTC().Truncate(time.Second), LogAt: o.logAt, Machine: describe(ctx, o.ftckpt)}
	if o.does("load") {
		if err := measureLoad(ctx, o, r); err != nil {
			return nil, fmt.Errorf("measure load: %w", err)
		}
	}
	if o.does("pause") {
		if err := measurePauses(ctx, o, r); err != nil {
			return nil, fmt.Errorf("measure pauses: %w", err)
		}
	}
	if o.does("takeover") {
		if err := measureTakeovers(ctx, o, r); err != nil {
			return nil, fmt.Errorf("measure takeovers: %w", err)
		}
	}
	if o.only == "growth" {
		if err := measureGrowth(ctx, o, r); err != nil {
			return nil, fmt.Errorf("measure growth: %w", err)
		}
	}
	r.Seconds = time.Since(r.Started).Seconds()
	return r, nil
}

// save writes the results as JSON.
func (r *results) save(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	return nil
}
