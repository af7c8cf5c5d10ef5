package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
)

// takeover is what one kind of fault costs clients.
type takeover struct {
	Fault     string        `json:"fault"` // process or host
	FirstMS   spread        `json:"first_ms"`
	StallMS   spread        `json:"stall_ms"`
	DetectMS  spread        `json:"detect_ms"`
	RestoreMS spread        `json:"restore_ms"`
	ReplayMS  spread        `json:"replay_ms"`
	Runs      []takeoverRun `json:"runs"`
}

// takeoverRun is one takeover: from the kill to the next reply of the first
// and of the slowest client, and what the standby says of its steps.
type takeoverRun struct {
	FirstMS float64          `json:"first_ms"`
	StallMS float64          `json:"stall_ms"`
	Steps   control.Takeover `json:"steps"`
}

const (
	takeoverClients = 10
	takeoverLimit   = 30 * time.Second
	// tenure is how long a primary is one before its fault: a standby does not
	// doubt a new one for its first seconds.
	tenure = 4 * time.Second
)

// measureTakeovers kills the server, and its host, in labs of their own.
func measureTakeovers(ctx context.Context, o options, r *results) error {
	for _, fault := range []string{"process", "host"} {
		t := takeover{Fault: fault}
		var first, stall, detect, restore, replay []float64
		for n := range o.Takeovers {
			o.sayf("takeover: %s fault, run %d of %d", fault, n+1, o.Takeovers)
			err := in(ctx, o, config.DefaultDetect, func(w *world) error {
				run, err := w.takeOver(ctx, fault)
				t.Runs = append(t.Runs, run)
				first, stall = append(first, run.FirstMS), append(stall, run.StallMS)
				s := run.Steps
				detect, restore, replay = append(detect, s.DetectMS), append(restore, s.RestoreMS), append(replay, s.ReplayMS)
				return err
			})
			if err != nil {
				return err
			}
		}
		t.FirstMS, t.StallMS = spreadOf(first), spreadOf(stall)
		t.DetectMS, t.RestoreMS, t.ReplayMS = spreadOf(detect), spreadOf(restore), spreadOf(replay)
		r.Takeover = append(r.Takeover, t)
	}
	return nil
}

func (w *world) takeOver(ctx context.Context, fault string) (run takeoverRun, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute+takeoverLimit)
	defer cancel()
	if err := w.protect(ctx); err != nil {
		return run, err
	}
	old := time.Now().Add(tenure)
	probes, stop, err := startProbes(ctx, w, takeoverClients)
	if err != nil {
		return run, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if err := waitReplies(ctx, probes, func(p *probe) bool { return p.last.After(old) }); err != nil {
		return run, err
	}
	// The generation that has these connections, and some log behind it.
	res, err := w.generation(ctx)
	if err != nil {
		return run, err
	}
	err = w.until(ctx, w.standby, "the generation to be on the standby", func(s control.Status) bool { return s.Generation.ID >= res.ID })
	if err != nil {
		return run, err
	}
	behind := time.Now().Add(time.Second)
	if err := waitReplies(ctx, probes, func(p *probe) bool { return p.last.After(behind) }); err != nil {
		return run, err
	}

	for _, p := range probes {
		p.reset()
	}
	killed := time.Now()
	if fault == "host" {
		err = w.primary.Kill()
	} else {
		err = kill9(w.server.pid)
	}
	if err != nil {
		return run, err
	}
	lctx, cancel := context.WithTimeout(ctx, takeoverLimit)
	defer cancel()
	err = w.until(lctx, w.standby, "the takeover", func(s control.Status) bool {
		if s.Takeover != nil {
			run.Steps = *s.Takeover
		}
		return s.Takeovers > 0
	})
	if err != nil {
		return run, err
	}
	live := time.Now()
	if err := waitReplies(lctx, probes, func(p *probe) bool { return p.last.After(live) }); err != nil {
		return run, fmt.Errorf("after the takeover: %w", err)
	}
	for i, p := range probes {
		// The longest wait since the kill is the takeover's. A reply that was on
		// its way at the kill may be later than it, so the end counts.
		_, end := p.stall()
		d := ms(end.Sub(killed))
		run.StallMS = max(run.StallMS, d)
		if i == 0 || d < run.FirstMS {
			run.FirstMS = d
		}
	}
	return run, nil
}
