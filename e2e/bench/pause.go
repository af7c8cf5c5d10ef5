package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

// pause is what generations of a server of one size cost.
type pause struct {
	ResidentMB float64    `json:"resident_mb"`
	ImageMB    float64    `json:"image_mb"` // the last one's
	PauseMS    spread     `json:"pause_ms"` // packets held, as the agent says
	ClientMS   spread     `json:"client_ms"`
	StableMS   spread     `json:"stable_ms"` // from the request until a standby may use it
	Runs       []pauseRun `json:"runs"`
}

type pauseRun struct {
	PauseMS  float64 `json:"pause_ms"`
	ClientMS float64 `json:"client_ms"` // longest wait between two replies
	StableMS float64 `json:"stable_ms"`
	ImageMB  float64 `json:"image_mb"`
}

// measurePauses takes generations of a server that a few clients keep busy.
func measurePauses(ctx context.Context, o options, r *results) error {
	for _, mb := range o.PauseMB {
		err := in(ctx, o, detectNever, func(w *world) error {
			if err := w.fill(ctx, mb); err != nil {
				return err
			}
			o.sayf("pause: %d generations at %d MB", o.Generations, mb)
			if err := w.protect(ctx); err != nil {
				return err
			}
			p, err := w.pauses(ctx)
			r.Pauses = append(r.Pauses, p)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *world) pauses(ctx context.Context) (p pause, err error) {
	probes, stop, err := startProbes(ctx, w, 4)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	var pms, cms, sms []float64
	for range w.o.Generations {
		for _, q := range probes {
			q.reset()
		}
		begin := time.Now()
		res, err := w.generation(ctx)
		if err != nil {
			return p, err
		}
		end := time.Now()
		if err := waitReplies(ctx, probes, func(q *probe) bool { return q.last.After(end) }); err != nil {
			return p, err
		}
		run := pauseRun{PauseMS: float64(res.PauseUS) / 1000, StableMS: ms(end.Sub(begin)), ImageMB: float64(res.Bytes) / 1e6}
		for _, q := range probes {
			d, _ := q.stall()
			run.ClientMS = max(run.ClientMS, ms(d))
		}
		p.Runs = append(p.Runs, run)
		pms, cms, sms = append(pms, run.PauseMS), append(cms, run.ClientMS), append(sms, run.StableMS)
		p.ImageMB = run.ImageMB
	}
	p.PauseMS, p.ClientMS, p.StableMS = spreadOf(pms), spreadOf(cms), spreadOf(sms)
	p.ResidentMB, err = residentMB(w.server.pid)
	return p, err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// fill writes random values, which nothing can compress or deduplicate, until
// the server is of that resident size.
func (w *world) fill(ctx context.Context, mb int) error {
	c, err := w.client.Dial(ctx, "tcp", net.JoinHostPort(vip, port))
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	rng := rand.NewChaCha8([32]byte{1})
	r := bufio.NewReader(c)
	value := make([]byte, 64<<10)
	for n := 0; ; n++ {
		have, err := residentMB(w.server.pid)
		if err != nil {
			return err
		}
		if have >= float64(mb) {
			return nil
		}
		if n > 2*mb*1e6/len(value) {
			return fmt.Errorf("fill server: %d values and still %.0f MB", n, have)
		}
		_, _ = rng.Read(value) // never fails
		key := fmt.Sprintf("fill-%d", n)
		req := fmt.Appendf(nil, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", len(key), key, len(value))
		if _, err := c.Write(append(append(req, value...), "\r\n"...)); err != nil {
			return fmt.Errorf("fill server: %w", err)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "+OK\r\n" {
			return fmt.Errorf("fill server: %q, %w", line, err)
		}
	}
}
