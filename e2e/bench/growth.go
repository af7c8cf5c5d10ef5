package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// growth is what a generation and a takeover by the host's death cost with so
// many connections, most of them idle.
type growth struct {
	Connections int              `json:"connections"`
	Active      int              `json:"active"` // of them, under load
	PauseMS     float64          `json:"pause_ms"`
	ImageMB     float64          `json:"image_mb"`
	StableMS    float64          `json:"stable_ms"` // until the generation counts
	Steps       control.Takeover `json:"steps"`
	StallMS     float64          `json:"stall_ms"` // longest wait of an active client over the fault
	Resets      int64            `json:"resets"`
	Mismatches  int64            `json:"mismatches"`
}

const (
	// growthRate is how many requests a second the active connections make
	// together, whatever their number: what grows is the number alone.
	growthRate = 1000
	// growthLimit bounds each step of one run.
	growthLimit = 3 * time.Minute
)

// active is how many of n connections are busy.
func active(n int) int { return max(min(n, 10), n/20) }

func measureGrowth(ctx context.Context, o options, r *results) error {
	for _, n := range o.Growth {
		for i := range o.GrowthRuns {
			o.sayf("growth: %d connections, run %d of %d", n, i+1, o.GrowthRuns)
			err := in(ctx, o, config.DefaultDetect, func(w *world) error {
				g, err := w.grow(ctx, n)
				r.Growth = append(r.Growth, g)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *world) grow(ctx context.Context, n int) (g growth, err error) {
	ctx, cancel := context.WithTimeout(ctx, growthLimit)
	defer cancel()
	g.Connections, g.Active = n, active(n)
	l, err := w.startCrowd(loadgen.Config{
		Seed: uint64(n), Redis: g.Active, Sleep: n - g.Active, MaxSamples: 2,
		PaceUS: int64(g.Active) * time.Second.Microseconds() / growthRate,
	})
	if err != nil {
		return g, err
	}
	defer func() { err = errors.Join(err, l.abort()) }()
	if err := l.until(ctx, "all clients to be connected", func(m loadgen.Message) bool { return m.Connected == n }); err != nil {
		return g, err
	}
	if err := w.protect(ctx); err != nil {
		return g, err
	}
	old := time.Now().Add(tenure)
	if err := l.until(ctx, "the primary to be one for a while", func(m loadgen.Message) bool { return m.Time.After(old) }); err != nil {
		return g, err
	}
	asked := time.Now()
	res, err := w.generation(ctx)
	if err != nil {
		return g, err
	}
	g.StableMS, g.PauseMS, g.ImageMB = ms(time.Since(asked)), float64(res.PauseUS)/1000, float64(res.Bytes)/(1<<20)
	err = w.until(ctx, w.standby, "the generation to be on the standby", func(s control.Status) bool { return s.Generation.ID >= res.ID })
	if err != nil {
		return g, err
	}
	behind := time.Now().Add(time.Second)
	if err := l.until(ctx, "some log", func(m loadgen.Message) bool { return m.Oldest.After(behind) }); err != nil {
		return g, err
	}
	killed := time.Now()
	if err := w.primary.Kill(); err != nil {
		return g, err
	}
	err = w.until(ctx, w.standby, "the takeover", func(s control.Status) bool {
		if s.Takeover != nil {
			g.Steps = *s.Takeover
		}
		return s.Takeovers > 0
	})
	if err != nil {
		return g, err
	}
	live := time.Now()
	if err := l.until(ctx, "every active client after the takeover", func(m loadgen.Message) bool { return m.Oldest.After(live) }); err != nil {
		return g, err
	}
	out, err := l.stop(ctx)
	if err != nil {
		return g, err
	}
	g.Resets, g.Mismatches = out.Resets, out.Mismatches
	for _, c := range out.Conns {
		if c.Kind == "redis" && c.StallAt.Add(time.Duration(c.StallUS)*time.Microsecond).After(killed) {
			g.StallMS = max(g.StallMS, float64(c.StallUS)/1000)
		}
	}
	return g, nil
}

// crowd is clients of package loadgen on the client host.
type crowd struct {
	cmd  *lab.Cmd
	in   io.WriteCloser
	done chan struct{} // the output has ended

	mu   sync.Mutex
	last loadgen.Message

	result loadgen.Result
	err    error
}

func (w *world) startCrowd(cfg loadgen.Config) (*crowd, error) {
	cfg.Addr = vip + ":" + port
	c := &crowd{cmd: w.client.Command(w.o.ftckpt, loadgen.Arg), done: make(chan struct{})}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start clients: %w", err)
	}
	go func() {
		defer close(c.done)
		c.result, c.err = loadgen.Follow(out, func(m loadgen.Message) {
			c.mu.Lock()
			c.last = m
			c.mu.Unlock()
		})
		c.err = errors.Join(c.err, c.cmd.Wait())
	}()
	if err := json.NewEncoder(c.in).Encode(cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("tell clients what to do: %w", err), c.abort())
	}
	return c, nil
}

func (c *crowd) until(ctx context.Context, what string, ok func(loadgen.Message) bool) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		c.mu.Lock()
		m := c.last
		c.mu.Unlock()
		if ok(m) {
			return nil
		}
		select {
		case <-t.C:
		case <-c.done:
			return fmt.Errorf("wait for %s: the clients ended: %w", what, c.err)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (%d connected, %d resets)", what, ctx.Err(), m.Connected, m.Resets)
		}
	}
}

// stop ends the clients and answers what they saw.
func (c *crowd) stop(ctx context.Context) (loadgen.Result, error) {
	_ = c.in.Close() // its end is the word
	select {
	case <-c.done:
		return c.result, c.err
	case <-ctx.Done():
		return loadgen.Result{}, fmt.Errorf("wait for the clients' end: %w", ctx.Err())
	}
}

// abort ends clients that were not stopped.
func (c *crowd) abort() error {
	select {
	case <-c.done:
		return nil
	default:
	}
	err := c.cmd.Process.Kill()
	<-c.done
	return err
}
