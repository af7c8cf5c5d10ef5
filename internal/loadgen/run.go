package loadgen

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// errGrace is why a run that was told to stop gives up on late replies. Unlike
// an abort it makes them resets: a connection without its reply is lost.
var errGrace = errors.New("no reply within the grace period")

// aborted reports whether the run's end, and not the server, is the reason for
// an error.
func aborted(ctx context.Context) bool {
	return ctx.Err() != nil && !errors.Is(context.Cause(ctx), errGrace)
}

// progressEvery is the time between two progress messages.
const progressEvery = 50 * time.Millisecond

// Run loads the server until stop is closed, completes what is under way and
// returns what it saw; when ctx ends it returns at once. Progress is reported
// every 50 ms from one goroutine. It fails only for an unusable Config: trouble
// with the server is in the Result.
func Run(ctx context.Context, cfg Config, stop <-chan struct{}, progress func(Message)) (Result, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	res := Result{Seed: cfg.Seed, Started: time.Now()}
	meters, lanes := cfg.lanes(res.Started)

	var wg sync.WaitGroup
	for _, l := range lanes {
		wg.Go(func() { l.run(ctx, stop) })
	}
	finished := make(chan struct{})
	go func() { wg.Wait(); close(finished) }()
	report(meters, stop, time.Duration(cfg.GraceUS)*time.Microsecond, finished, progress, func() { cancel(errGrace) })

	res.Ended = time.Now()
	for _, m := range meters {
		res.Conns = append(res.Conns, m.result())
	}
	res.sum()
	return res, nil
}

// lanes makes the connections, each with randomness of its own.
func (c Config) lanes(started time.Time) (meters []*meter, lanes []lane) {
	add := func(n int, kind string, mk func(m *meter, rng *rand.Rand, name string) lane) {
		for range n {
			id := len(lanes)
			m := newMeter(id, kind, started, c.MaxSamples)
			rng := rand.New(rand.NewPCG(c.Seed, uint64(id)))
			meters = append(meters, m)
			lanes = append(lanes, mk(m, rng, fmt.Sprintf("c%d", id)))
		}
	}
	lib := func(pace time.Duration) func(*meter, *rand.Rand, string) lane {
		return func(m *meter, rng *rand.Rand, name string) lane {
			return &redisLane{addr: c.Addr, pace: pace, rng: rng, name: name, m: m}
		}
	}
	raw := func(kind string) func(*meter, *rand.Rand, string) lane {
		return func(m *meter, rng *rand.Rand, name string) lane {
			return &rawLane{
				addr: c.Addr, kind: kind, size: c.TransferBytes,
				takes: time.Duration(c.TransferUS) * time.Microsecond, rng: rng, name: name, m: m,
			}
		}
	}
	add(c.Redis, "redis", lib(time.Duration(c.PaceUS)*time.Microsecond))
	add(c.Idle, "idle", lib(1500*time.Millisecond))
	add(c.Upload, "upload", raw("upload"))
	add(c.Download, "download", raw("download"))
	add(c.Half, "half", raw("half"))
	gate := make(chan struct{}, dialling)
	add(c.Sleep, kindSleep, func(m *meter, rng *rand.Rand, name string) lane {
		return &sleepLane{addr: c.Addr, gate: gate, rng: rng, name: name, m: m}
	})
	return meters, lanes
}

// report sends progress until finished, and calls giveUp when grace has passed
// since stop.
func report(meters []*meter, stop <-chan struct{}, grace time.Duration, finished <-chan struct{}, progress func(Message), giveUp func()) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	var over <-chan time.Time
	for {
		select {
		case <-finished:
			return
		case <-stop:
			stop, over = nil, time.After(grace)
		case <-over:
			over = nil
			giveUp()
		case now := <-tick.C:
			progress(summarize(meters, now))
		}
	}
}

func summarize(meters []*meter, now time.Time) Message {
	msg := Message{Event: "progress", Time: now.Round(0), Oldest: now.Round(0)}
	for _, m := range meters {
		r, alive := m.snapshot()
		if !alive.IsZero() {
			msg.Connected++
		}
		if r.Kind != kindSleep && alive.Before(msg.Oldest) {
			msg.Oldest = alive.Round(0)
		}
		msg.Requests += r.Requests
		msg.Mismatches += r.Mismatches
		msg.Resets += r.Resets
	}
	return msg
}
