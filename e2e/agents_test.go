package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// agent is one daemon of ftckpt on a host.
type agent struct {
	w    *world
	host *lab.Host
	proc *lab.Process
	join string // of the log

	keepsLog bool
}

// start starts a daemon; env is added to its environment.
func (w *world) start(h *lab.Host, env []string, args ...string) *agent {
	w.Helper()
	w.starts++
	// -v would be welcome, but what users run is without.
	args = append([]string{ftckpt}, append(args, "--state-dir", h.Dir()+"/state", "--log-format", "json")...)
	p, err := h.Start(lab.Service{Name: fmt.Sprintf("%s-%d", args[1], w.starts), Args: args, Env: env})
	w.must(err)
	a := &agent{w: w, host: h, proc: p}
	w.agents = append(w.agents, a)
	return a
}

// line waits for a line of the daemon's standard output.
func (a *agent) line(prefix string) string {
	a.w.Helper()
	ctx, cancel := context.WithTimeout(a.w.Context(), patience)
	defer cancel()
	s, err := a.proc.WaitLine(ctx, func(l string) bool { return strings.HasPrefix(l, prefix) })
	a.w.must(err)
	return strings.TrimPrefix(s, prefix)
}

// startStandby starts a standby, with a log of its own unless args say where
// it is.
func (w *world) startStandby(h *lab.Host, join string, args ...string) *agent {
	w.Helper()
	var env []string
	if join != "" {
		env = append(env, "FTCKPT_JOIN="+join)
	}
	a := w.start(h, env, append([]string{"standby", "--dev", "eth0"}, args...)...)
	if a.join = join; join == "" {
		a.join, a.keepsLog = a.line("join: "), true
	}
	return a
}

// startLog starts the log on a host of its own.
func (w *world) startLog(args ...string) *agent {
	w.Helper()
	a := w.start(w.logHost, nil, append([]string{"logserver", "--listen", "10.77.0.5:4222"}, args...)...)
	a.join, a.keepsLog = a.line("join: "), true
	return a
}

// tryProtect starts protect without waiting for anything.
func (w *world) tryProtect(pid int, join string, args ...string) *agent {
	w.Helper()
	var env []string
	if join != "" {
		env = append(env, "FTCKPT_JOIN="+join)
	}
	return w.start(w.primary, env,
		append([]string{"protect", "--pid", strconv.Itoa(pid), "--vip", strings.Join(w.vips, ","), "--dev", "eth0", "--interval", "1s"}, args...)...)
}

// protect starts protect and waits until the first generation is stable.
func (w *world) protect(pid int, join string, args ...string) *agent {
	w.Helper()
	a := w.tryProtect(pid, join, args...)
	a.line("protected")
	return a
}

// exitError is how the daemon ended, or that it has not.
func (a *agent) exitError() error {
	select {
	case <-a.proc.Done():
		return a.proc.Exit()
	default:
		return errors.New("still running")
	}
}

// exits waits for the daemon's end and compares its status.
func (a *agent) exits(want exitcode.Code) {
	a.w.Helper()
	a.w.until(fmt.Sprintf("the end of %s", a.proc.ErrFile()), func() bool {
		select {
		case <-a.proc.Done():
			return true
		default:
			return false
		}
	})
	if got := statusOf(a.proc.Exit()); got != want {
		a.w.Errorf("%s: exit status %d, want %d", a.proc.ErrFile(), got, want)
	}
}

// statusOf is the exit status in what Wait returned, -1 for a signal.
func statusOf(err error) exitcode.Code {
	if err == nil {
		return exitcode.OK
	}
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return exitcode.Code(e.ExitCode())
	}
	return -1
}

// stop ends the daemon as a user does, and harder if that takes too long.
func (a *agent) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := a.proc.Stop(ctx); errors.Is(err, context.DeadlineExceeded) {
		a.w.Errorf("%s did not end on SIGTERM", a.proc.ErrFile())
	}
}

// kill is kill -9.
func (a *agent) kill() {
	a.w.Helper()
	a.w.must(a.proc.Signal(syscall.SIGKILL))
	<-a.proc.Done()
}

// said is the daemon's standard error.
func (a *agent) said() string {
	b, err := os.ReadFile(a.proc.ErrFile())
	a.w.must(err)
	return string(b)
}

// complaint is the one line of an agent that gave up.
func (a *agent) complaint() string {
	var lines []string
	for line := range strings.Lines(a.said()) {
		if strings.HasPrefix(line, "ftckpt: ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	if len(lines) != 1 {
		a.w.Errorf("%s: want one line that says what is wrong, got %q", a.proc.ErrFile(), lines)
	}
	return strings.Join(lines, "\n")
}

// cli runs a command of ftckpt on a host and returns its status and output.
func (w *world) cli(h *lab.Host, args ...string) (code exitcode.Code, stdout, stderr string) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	var out, errs bytes.Buffer
	c := h.CommandContext(ctx, ftckpt, args...)
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && (!exited || ctx.Err() != nil) {
		w.Fatalf("ftckpt %v on %s: %v: %s", args, h.Name(), errors.Join(err, ctx.Err()), errs.String())
	}
	return statusOf(err), out.String(), errs.String()
}

// status asks the daemon of a host; ok is false while none answers.
func (w *world) status(h *lab.Host) (s control.Status, ok bool) {
	w.Helper()
	code, out, _ := w.cli(h, "status", "--json")
	if json.Unmarshal([]byte(out), &s) != nil {
		return s, false
	}
	if want := s.ExitCode(); code != want {
		w.Errorf("status on %s: exit status %d, want %d for %s", h.Name(), code, want, out)
	}
	return s, true
}

// untilStatus waits until the daemon of a host says what ok wants.
func (w *world) untilStatus(h *lab.Host, what string, ok func(control.Status) bool) control.Status {
	w.Helper()
	var last control.Status
	start := time.Now()
	for {
		s, there := w.status(h)
		if there {
			if last = s; ok(s) {
				break
			}
		}
		if time.Since(start) > patience {
			b, _ := json.Marshal(last)
			w.Fatalf("waited %v for status of %s: %s; last was %s", patience, h.Name(), what, b)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if took := time.Since(start); took > 2*time.Second {
		w.Logf("waited %.1f s for status of %s: %s", took.Seconds(), h.Name(), what)
	}
	return last
}

// checkpoint asks for a generation, so that all connections there are now are
// in one, and waits until the standby can restore from it.
func (w *world) checkpoint(primary, standby *lab.Host) control.CheckpointResult {
	w.Helper()
	code, out, errs := w.cli(primary, "checkpoint")
	var r control.CheckpointResult
	n, err := fmt.Sscanf(out, "generation=%d bytes=%d pause_us=%d\n", &r.ID, &r.Bytes, &r.PauseUS)
	if code != exitcode.OK || err != nil || n != 3 {
		w.Fatalf("checkpoint: status %d, %q %q (%v)", code, out, errs, err)
	}
	if standby != nil {
		w.untilStatus(standby, fmt.Sprintf("it has generation %d", r.ID), func(s control.Status) bool { return s.Generation.ID >= r.ID })
	}
	return r
}

// takenOver waits until a standby is the primary and live, having reset so
// many connections.
func (w *world) takenOver(h *lab.Host, resets int) control.Status {
	w.Helper()
	s := w.untilStatus(h, "it is the primary", func(s control.Status) bool { return s.Role == control.RolePrimary })
	if s.Takeover == nil {
		w.Errorf("status of %s: a takeover without times", h.Name())
	} else {
		if s.Takeover.Resets != resets {
			w.Errorf("status of %s: %d connections reset, want %d", h.Name(), s.Takeover.Resets, resets)
		}
		w.Logf("takeover on %s: total %.0f ms (detect %.0f, fence %.0f, address %.0f, restore %.0f, replay %.0f), %d connections, %d resets",
			h.Name(), s.Takeover.TotalMS, s.Takeover.DetectMS, s.Takeover.FenceMS, s.Takeover.VIPMS, s.Takeover.RestoreMS, s.Takeover.ReplayMS, s.Takeover.Connections, s.Takeover.Resets)
	}
	return s
}
