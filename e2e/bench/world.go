package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
)

const (
	vip     = "10.77.0.100"
	vipMask = vip + "/24"
	port    = "6379"
	service = "bench"

	startTime = 20 * time.Second
	stopTime  = 20 * time.Second
)

// daemon is a process of the lab with the PID the machine knows it by.
type daemon struct {
	*lab.Process
	pid int
}

// world is a lab with an unprotected server and a standby that waits.
type world struct {
	o   options
	lab *lab.Lab

	client, primary, standby *lab.Host

	server  daemon
	second  daemon  // ftckpt standby
	log     *daemon // ftckpt logserver, nil when the log is in the standby
	agent   *daemon // ftckpt protect, nil when unprotected
	join    string
	started int // agents so far
}

// detectNever keeps a standby from taking over because a machine full of load
// was late with a heartbeat.
const detectNever = 30 * time.Second

// newWorld builds it; detect is the silence after which the standby takes over.
func newWorld(ctx context.Context, o options, detect time.Duration) (_ *world, err error) {
	hosts := []lab.HostSpec{
		{Name: "client", Addr: "10.77.0.10/24"}, {Name: "primary", Addr: "10.77.0.2/24"}, {Name: "standby", Addr: "10.77.0.3/24"},
	}
	if o.logAt == "log" {
		hosts = append(hosts, lab.HostSpec{Name: "log", Addr: "10.77.0.4/24"})
	}
	lctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	l, err := lab.New(lctx, lab.Topology{Hosts: hosts}, lab.Options{})
	if err != nil {
		return nil, err
	}
	w := &world{o: o, lab: l, client: l.Host("client"), primary: l.Host("primary"), standby: l.Host("standby")}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err := w.startServer(lctx); err != nil {
		return nil, err
	}
	args := []string{"--dev", "eth0", "--name", service, "--detect", detect.String()}
	if o.logAt == "log" {
		lh := l.Host("log")
		d, err := w.start(lh, lab.Service{Name: "logserver", Args: w.ftckpt(lh, "logserver", "--listen", lh.Addr().String()+":4222", "--sync", "interval")})
		if err != nil {
			return nil, err
		}
		w.log = &d
		if err := w.readJoin(lctx, d); err != nil {
			return nil, err
		}
		args = append(args, "--join", w.join)
	} else {
		args = append(args, "--log", "embed://"+w.standby.Addr().String()+":4222")
	}
	w.second, err = w.start(w.standby, lab.Service{Name: "standby", Args: w.ftckpt(w.standby, "standby", args...)})
	if err != nil {
		return nil, err
	}
	if w.log == nil {
		return w, w.readJoin(lctx, w.second)
	}
	return w, nil
}

func (w *world) close() error {
	if err := w.lab.Close(); err != nil {
		return fmt.Errorf("close lab: %w", err)
	}
	return nil
}

// ftckpt is a command line with directories of the host's own.
func (w *world) ftckpt(h *lab.Host, command string, args ...string) []string {
	return append([]string{w.o.ftckpt, command, "--run-dir", runDir(h), "--state-dir", filepath.Join(h.Dir(), "state")}, args...)
}

func runDir(h *lab.Host) string { return filepath.Join(h.Dir(), "run") }

func (w *world) start(h *lab.Host, s lab.Service) (daemon, error) {
	p, err := h.Start(s)
	if err != nil {
		return daemon{}, err
	}
	pid, err := machinePID(h, p.PID())
	return daemon{p, pid}, err
}

func (w *world) readJoin(ctx context.Context, d daemon) error {
	line, err := d.WaitLine(ctx, func(s string) bool { return strings.HasPrefix(s, "join: ") })
	w.join = strings.TrimPrefix(line, "join: ")
	return err
}

func (w *world) startServer(ctx context.Context) (err error) {
	if err := w.primary.AddAddr(vipMask); err != nil {
		return err
	}
	w.server, err = w.start(w.primary, lab.Service{Name: "redis", HighPID: true, Args: []string{
		"redis-server", "--bind", vip, "--port", port, "--save", "", "--appendonly", "no", "--protected-mode", "no",
	}})
	if err != nil {
		return err
	}
	return w.ping(ctx)
}

// ping waits until the server answers.
func (w *world) ping(ctx context.Context) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		c, err := w.client.Dial(ctx, "tcp", net.JoinHostPort(vip, port))
		if err == nil {
			return c.Close()
		}
		select {
		case <-t.C:
		case <-w.server.Done():
			return fmt.Errorf("redis-server ended: %w", w.server.Exit())
		case <-ctx.Done():
			return fmt.Errorf("wait for redis-server: %w", err)
		}
	}
}

// protect starts an agent and waits until a standby could take over. It takes
// generations only when asked: what they cost is measured by itself.
func (w *world) protect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	w.started++
	d, err := w.start(w.primary, lab.Service{
		Name: fmt.Sprintf("protect-%d", w.started),
		Args: w.ftckpt(w.primary, "protect", "--pid", strconv.Itoa(w.server.PID()), "--vip", vipMask, "--dev", "eth0",
			"--name", service, "--port", port, "--interval", "0"),
		Env: []string{"FTCKPT_JOIN=" + w.join},
	})
	if err != nil {
		return err
	}
	w.agent = &d
	if _, err := d.WaitLine(ctx, func(s string) bool { return s == "protected" }); err != nil {
		return err
	}
	return w.until(ctx, w.standby, "the standby to have the generation", func(s control.Status) bool { return s.Protected })
}

// unprotect ends protection; the server and its connections live on.
func (w *world) unprotect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	err := w.agent.Stop(ctx)
	w.agent = nil
	if err != nil {
		return fmt.Errorf("end protection: %w", err)
	}
	return nil
}

// until waits for a state of a host's daemon.
func (w *world) until(ctx context.Context, h *lab.Host, what string, ok func(control.Status) bool) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		s, err := control.GetStatus(ctx, runDir(h), service)
		if err == nil && ok(s) {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (%s)", what, ctx.Err(), s.Reason)
		}
	}
}

// generation takes one now and waits until it is stable.
func (w *world) generation(ctx context.Context) (control.CheckpointResult, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return control.Checkpoint(ctx, runDir(w.primary), service)
}

// explain adds the end of the daemons' logs to an error: the lab, and with it
// the logs, is about to go.
func (w *world) explain(err error) error {
	if err == nil {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(w.lab.LogDir(), "*.err"))
	for _, f := range files {
		b, rerr := os.ReadFile(f)
		if rerr == nil && len(bytes.TrimSpace(b)) > 0 {
			err = fmt.Errorf("%w\n--- %s\n%s", err, filepath.Base(f), bytes.TrimSpace(b[max(0, len(b)-2000):]))
		}
	}
	return err
}

// in runs f in a world of its own.
func in(ctx context.Context, o options, detect time.Duration, f func(w *world) error) (err error) {
	w, err := newWorld(ctx, o, detect)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	return w.explain(f(w))
}

// sayf tells a person who waits what is going on.
func (o *options) sayf(format string, args ...any) {
	_, _ = io.WriteString(o.say, fmt.Sprintf("bench: "+format+"\n", args...))
}

// describe says what the results are of.
func describe(ctx context.Context, ftckpt string) machine {
	first := func(name string, args ...string) string {
		out, err := exec.CommandContext(ctx, name, args...).Output()
		if err != nil {
			return "unknown"
		}
		line, _, _ := strings.Cut(string(out), "\n")
		return line
	}
	return machine{Kernel: kernel(), CPUs: cpus(), Server: first("redis-server", "--version"), Ftckpt: first(ftckpt, "version")}
}
