package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// The lab's hosts and addresses.
const (
	service = "redis"
	port    = "6379"
	vip     = "10.77.0.100"
	vipLen  = vip + "/24"
	logPort = "4222"
)

var topology = lab.Topology{Hosts: []lab.HostSpec{
	{Name: "client", Addr: "10.77.0.2/24"},
	{Name: "primary", Addr: "10.77.0.11/24"},
	{Name: "standby", Addr: "10.77.0.12/24"},
	{Name: "log", Addr: "10.77.0.13/24"},
}}

// startTime bounds the start of a daemon, the first generation included.
const startTime = 60 * time.Second

// stage is the lab with what runs on it.
type stage struct {
	*lab.Lab
	bin                           string
	client, primary, standby, log *lab.Host

	redis, agent, backup *lab.Process
}

func buildStage(ctx context.Context, bin, logDir string) (*stage, error) {
	l, err := lab.New(ctx, topology, lab.Options{LogDir: logDir})
	if err != nil {
		return nil, err
	}
	return &stage{
		Lab: l, bin: bin,
		client: l.Host("client"), primary: l.Host("primary"), standby: l.Host("standby"), log: l.Host("log"),
	}, nil
}

// startRedis runs the server to be protected on the primary, at the VIP.
func (s *stage) startRedis(ctx context.Context) error {
	if err := s.primary.AddAddr(vipLen); err != nil {
		return err
	}
	dir := filepath.Join(s.primary.Dir(), "redis")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var err error
	s.redis, err = s.primary.Start(lab.Service{
		Name: "redis", HighPID: true, Dir: dir,
		Args: []string{
			"redis-server", "--bind", vip, "--port", port, "--dir", dir,
			"--save", "", "--appendonly", "no", "--protected-mode", "no", "--daemonize", "no",
		},
	})
	if err != nil {
		return fmt.Errorf("%w (is redis-server installed?)", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	_, err = s.redis.WaitLine(ctx, func(line string) bool { return strings.Contains(line, "Ready to accept connections") })
	return err
}

// ftckpt is the command line of an ftckpt on a host.
func (s *stage) ftckpt(h *lab.Host, args ...string) []string {
	return append([]string{
		s.bin, args[0], "--run-dir", "/run/ftckpt", "--state-dir", filepath.Join(h.Dir(), "state"), "--log-format", "json",
	}, args[1:]...)
}

// joinPrefix begins the line with which a daemon says how to reach its log.
const joinPrefix = "join: "

func waitJoin(ctx context.Context, p *lab.Process) (string, error) {
	line, err := p.WaitLine(ctx, func(line string) bool { return strings.HasPrefix(line, joinPrefix) })
	return strings.TrimPrefix(line, joinPrefix), err
}

// startStandby starts the standby, and a log server first if the log is to be
// on a host of its own; it returns what a primary needs to join.
func (s *stage) startStandby(ctx context.Context, at LogAt) (join string, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	args := s.ftckpt(s.standby, "standby", "--dev", "eth0", "--name", service)
	if at == LogAtLog {
		srv, err := s.log.Start(lab.Service{
			Name: "logserver", Args: s.ftckpt(s.log, "logserver", "--listen", s.log.Addr().String()+":"+logPort),
		})
		if err != nil {
			return "", err
		}
		if join, err = waitJoin(ctx, srv); err != nil {
			return "", err
		}
	}
	svc := lab.Service{Name: "standby", Args: args}
	if join != "" {
		svc.Env = []string{"FTCKPT_JOIN=" + join}
	}
	if s.backup, err = s.standby.Start(svc); err != nil {
		return "", err
	}
	if join != "" {
		return join, nil
	}
	return waitJoin(ctx, s.backup)
}

// protect starts ftckpt on the primary and waits until it says "protected".
func (s *stage) protect(ctx context.Context, join string, interval time.Duration) error {
	var err error
	s.agent, err = s.primary.Start(lab.Service{
		Name: "protect", Env: []string{"FTCKPT_JOIN=" + join},
		Args: s.ftckpt(s.primary, "protect", "--pid", fmt.Sprint(s.redis.PID()), "--vip", vipLen, "--dev", "eth0",
			"--name", service, "--port", port, "--interval", interval.String()),
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	_, err = s.agent.WaitLine(ctx, func(line string) bool { return strings.HasPrefix(line, "protected") })
	return err
}

// checkpoint takes a generation now and returns its number.
func (s *stage) checkpoint(ctx context.Context) (id uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	args := s.ftckpt(s.primary, "checkpoint", "--name", service)
	out, err := s.primary.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil {
		return 0, fmt.Errorf("take a generation: %w", err)
	}
	return parseCheckpoint(string(out))
}

func parseCheckpoint(out string) (id uint64, err error) {
	if _, err := fmt.Sscanf(out, "generation=%d ", &id); err != nil {
		return 0, fmt.Errorf("take a generation: unexpected output %q", out)
	}
	return id, nil
}

// status asks a host's daemon.
func (s *stage) status(ctx context.Context, h *lab.Host) (control.Status, error) {
	args := s.ftckpt(h, "status", "--name", service, "--json")
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, runErr := h.CommandContext(ctx, args[0], args[1:]...).Output()
	var st control.Status
	// The exit status tells the state; it is no failure while there is an object.
	if err := json.Unmarshal(out, &st); err != nil {
		return st, errors.Join(fmt.Errorf("ask status on %s: %w", h.Name(), err), runErr)
	}
	return st, nil
}

// waitStatus waits until the status of a host's daemon satisfies cond.
func (s *stage) waitStatus(ctx context.Context, h *lab.Host, what string, cond func(control.Status) bool) (control.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		st, err := s.status(ctx, h)
		if err == nil && cond(st) {
			return st, nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return st, fmt.Errorf("wait for %s: %w (last: %+v)", what, errors.Join(ctx.Err(), err), st)
		}
	}
}

// inject injects the fault and returns when that began. When it returns, the
// primary answers no client any more.
func (s *stage) inject(ctx context.Context, f Fault) (began time.Time, err error) {
	began = time.Now().Round(0)
	switch f {
	case FaultHost:
		return began, s.primary.Kill()
	case FaultLink:
		return began, s.primary.CutLink()
	case FaultProcess:
		if err := s.redis.Signal(os.Kill); err != nil {
			return began, fmt.Errorf("kill the server: %w", err)
		}
		select {
		case <-s.redis.Done():
			return began, nil
		case <-ctx.Done():
			return began, ctx.Err()
		}
	}
	return began, fmt.Errorf("inject fault: unknown fault %q", f)
}

// events reads what the standby has logged so far.
func (s *stage) events() ([]Event, error) {
	f, err := os.Open(s.backup.ErrFile())
	if err != nil {
		return nil, fmt.Errorf("read the standby's log: %w", err)
	}
	defer f.Close()
	return ParseEvents(io.LimitReader(f, 256<<20))
}
