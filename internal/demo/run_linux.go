package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// LogAt is the host that keeps the log.
type LogAt string

// Where the log can be.
const (
	LogAtStandby LogAt = "standby" // embedded in the standby
	LogAtLog     LogAt = "log"     // a log server on a third host
)

// Options are what Run is told. Zero values mean the defaults.
type Options struct {
	Binary      string        // path of ftckpt; default this executable
	Fault       Fault         // default host
	Connections int           // default 10
	Duration    time.Duration // the load lasts about this long, the fault being in its middle; default 20 s
	Interval    time.Duration // between generations; default 2 s
	LogAt       LogAt         // default standby
	Seed        uint64        // default random
	Report      string        // file of the page; default none
	JSON        bool          // stdout gets one Summary object and nothing else
	LogDir      string        // keep the daemons' logs here; default only when the run failed
}

// ErrNoticed is what Run returns when a client got a wrong byte or lost its
// connection.
var ErrNoticed = errors.New("the clients noticed")

const (
	// connectTime bounds the clients' start.
	connectTime = 30 * time.Second
	// patience bounds how long clients may wait for an answer after the fault.
	patience = 60 * time.Second
	// grace is for requests under way at the end.
	grace = 30 * time.Second
)

func (o Options) withDefaults() (Options, error) {
	if o.Binary == "" {
		exe, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find ftckpt: %w", err)
		}
		o.Binary = exe
	}
	if o.Fault == "" {
		o.Fault = FaultHost
	}
	if o.LogAt == "" {
		o.LogAt = LogAtStandby
	}
	if o.Connections == 0 {
		o.Connections = 10
	}
	if o.Duration == 0 {
		o.Duration = 20 * time.Second
	}
	if o.Interval == 0 {
		o.Interval = 2 * time.Second
	}
	for o.Seed == 0 {
		o.Seed = uint64(rand.Uint32()) // short enough to be typed
	}
	switch {
	case o.Connections < 1:
		return o, fmt.Errorf("check options: %d connections, want at least 1", o.Connections)
	case o.Duration < 0:
		return o, fmt.Errorf("check options: a duration of %v", o.Duration)
	case o.Fault != FaultHost && o.Fault != FaultProcess && o.Fault != FaultLink:
		return o, fmt.Errorf("check options: no fault %q", o.Fault)
	case o.LogAt != LogAtStandby && o.LogAt != LogAtLog:
		return o, fmt.Errorf("check options: no place %q for the log", o.LogAt)
	}
	return o, nil
}

// mix divides the connections among the kinds; most are of the library.
func mix(n int) loadgen.Config {
	c := loadgen.Config{Redis: n}
	for _, kind := range []*int{&c.Idle, &c.Upload, &c.Download, &c.Half} {
		if k := max(1, n/10); c.Redis > 2*k {
			*kind, c.Redis = k, c.Redis-k
		}
	}
	return c
}

// Run shows the job once. stdout gets the timeline, or with JSON one Summary;
// stderr what is being done. It returns ErrNoticed (wrapped) when a client
// noticed anything, and other errors when the demo could not be shown; the
// Summary is that of the clients as far as there is one. Nothing is left behind
// when it returns, ctx ended or not; after a failure the logs are kept and the
// error says where.
func Run(ctx context.Context, o Options, stdout, stderr io.Writer) (sum Summary, err error) {
	if o, err = o.withDefaults(); err != nil {
		return sum, err
	}
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(stderr, "%6.1f s  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	say("building a lab: client, primary, standby and log hosts")
	s, err := buildStage(ctx, o.Binary, o.LogDir)
	if err != nil {
		return sum, err
	}
	defer func() {
		if err != nil && o.LogDir == "" && ctx.Err() == nil {
			err = s.keepLogs(err)
		}
		err = errors.Join(err, s.Close())
	}()
	t, err := s.play(ctx, o, say)
	if err != nil {
		return sum, err
	}
	return t.Summary(), t.tell(o, stdout, stderr)
}

// keepLogs moves the logs out of the lab's directory and says so in why, the
// reason that they are wanted.
func (s *stage) keepLogs(why error) error {
	dir, err := os.MkdirTemp("", "ftckpt-demo-")
	if err != nil {
		return errors.Join(why, fmt.Errorf("keep logs: %w", err))
	}
	dir = filepath.Join(dir, "log")
	if err := os.Rename(s.LogDir(), dir); err != nil {
		return errors.Join(why, fmt.Errorf("keep logs: %w", err))
	}
	return fmt.Errorf("%w (logs: %s)", why, dir)
}

// play is the demo from the server's start to the clients' end.
func (s *stage) play(ctx context.Context, o Options, say func(string, ...any)) (Timeline, error) {
	var none Timeline
	say("starting redis-server on the primary")
	if err := s.startRedis(ctx); err != nil {
		return none, err
	}
	say("starting the standby (log: %s host)", o.LogAt)
	join, err := s.startStandby(ctx, o.LogAt)
	if err != nil {
		return none, fmt.Errorf("start standby: %w", err)
	}
	say("protecting redis, PID %d", s.redis.PID())
	if err := s.protect(ctx, join, o.Interval); err != nil {
		return none, fmt.Errorf("protect: %w", err)
	}

	cfg := mix(o.Connections)
	cfg.Addr, cfg.Seed, cfg.PaceUS, cfg.GraceUS = vip+":"+port, o.Seed, 2000, grace.Microseconds()
	say("connecting %d clients, seed %d", cfg.Connections(), cfg.Seed)
	load, err := startLoad(s.client, s.bin, cfg)
	if err != nil {
		return none, err
	}
	defer load.kill()
	if err := load.wait(ctx, "the clients to connect", connectTime, func(m loadgen.Message) bool {
		return m.Connected == cfg.Connections()
	}); err != nil {
		return none, err
	}
	gen, err := s.checkpoint(ctx)
	if err != nil {
		return none, err
	}
	say("generation %d has all connections; waiting until the standby has it", gen)
	if _, err := s.waitStatus(ctx, s.standby, "the standby to have the generation", func(st control.Status) bool {
		return st.Generation.ID >= gen
	}); err != nil {
		return none, err
	}
	if err := load.pass(ctx, o.Duration/2); err != nil {
		return none, err
	}

	failed, err := s.inject(ctx, o.Fault)
	if err != nil {
		return none, err
	}
	// What is sent from now on only a takeover can answer.
	dead := time.Now()
	say("%s", Timeline{Fault: o.Fault}.says(Failed))
	waitErr := load.wait(ctx, "every client to be answered after the fault", patience, func(m loadgen.Message) bool {
		return m.Oldest.After(dead)
	})
	if ctx.Err() != nil {
		return none, waitErr
	}
	if waitErr == nil {
		say("every client has been answered")
		if err := load.pass(ctx, o.Duration/2); err != nil {
			return none, err
		}
	} else {
		say("not every client was answered: %v", waitErr)
	}
	res, err := load.finish(ctx)
	if err != nil {
		return none, errors.Join(err, waitErr)
	}
	return s.collect(ctx, o, failed, res)
}

// collect asks the standby how it went.
func (s *stage) collect(ctx context.Context, o Options, failed time.Time, res loadgen.Result) (Timeline, error) {
	events, err := s.events()
	if err != nil {
		return Timeline{}, err
	}
	t := NewTimeline(o.Fault, failed, events, res)
	st, err := s.status(ctx, s.standby)
	if err != nil && ctx.Err() != nil {
		return Timeline{}, ctx.Err()
	}
	t.Takes, t.Takeover = st.Takeovers, st.Takeover
	return t, nil
}

// pass lets time pass under load.
func (l *load) pass(ctx context.Context, d time.Duration) error {
	end := time.Now().Add(d)
	return l.wait(ctx, "the load to go on", d+connectTime, func(loadgen.Message) bool { return time.Now().After(end) })
}

// tell writes what happened and judges it.
func (t Timeline) tell(o Options, stdout, stderr io.Writer) error {
	sum := t.Summary()
	if o.Report != "" {
		if err := t.writeReportFile(o.Report); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "          report: %s\n", o.Report)
	}
	people := stdout
	if o.JSON {
		people = stderr
	}
	fmt.Fprintln(people)
	if err := t.Text(people); err != nil {
		return fmt.Errorf("print timeline: %w", err)
	}
	if o.JSON {
		if err := json.NewEncoder(stdout).Encode(sum); err != nil {
			return fmt.Errorf("print summary: %w", err)
		}
	}
	switch {
	case !sum.Perfect():
		return fmt.Errorf("%w: %d wrong replies, %d connections lost", ErrNoticed, sum.Mismatches, sum.Resets)
	case sum.Takeovers == 0:
		return errors.New("the standby did not take over")
	}
	return nil
}

// writeReportFile replaces the file only by a whole page.
func (t Timeline) writeReportFile(name string) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".ftckpt-report-*")
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	defer os.Remove(f.Name()) // gone already when all went well
	err = errors.Join(f.Chmod(0o644), t.WriteReport(f), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("write report %s: %w", name, err)
	}
	return nil
}
