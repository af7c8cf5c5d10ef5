package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/procfs"
)

// Cmd is an exec.Cmd whose process runs in all namespaces of a host: a child of
// ours with nothing in between, so Process, signals and exit status are the
// command's own. It leads a session of its own, its working directory is / if
// Dir is empty, and its stdin is the host's /dev/null if Stdin is nil.
//
// Only the methods declared here start it on the host.
type Cmd struct {
	*exec.Cmd
	host *Host
}

// Command prepares a command to run on the host. It lives as long as it likes,
// at most as long as the host.
func (h *Host) Command(name string, args ...string) *Cmd {
	return h.wrap(exec.CommandContext(context.Background(), name, args...))
}

// CommandContext is Command with a context that kills the process.
func (h *Host) CommandContext(ctx context.Context, name string, args ...string) *Cmd {
	return h.wrap(exec.CommandContext(ctx, name, args...))
}

func (h *Host) wrap(c *exec.Cmd) *Cmd {
	if abs, err := filepath.Abs(c.Path); err == nil && strings.Contains(c.Path, "/") {
		c.Path = abs // the namespace's working directory is not ours
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return &Cmd{Cmd: c, host: h}
}

// Start starts the command on the host. The caller must Wait.
func (c *Cmd) Start() error {
	return c.host.space.inside(spaceFlags, func() error { return c.Cmd.Start() })
}

// Run starts the command and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns its standard output. A failure has the
// end of its standard error.
func (c *Cmd) Output() ([]byte, error) {
	var out, errs bytes.Buffer
	if c.Stdout != nil {
		return nil, errors.New("run command: Stdout already set")
	}
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &errs
	}
	err := c.Run()
	if err != nil && errs.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(tail(errs.Bytes(), 2000)))
	}
	return out.Bytes(), err
}

// CombinedOutput runs the command and returns what it wrote to either.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	if c.Stdout != nil || c.Stderr != nil {
		return nil, errors.New("run command: Stdout or Stderr already set")
	}
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// HostPID is the PID the started command has on its host.
func (c *Cmd) HostPID() (int, error) {
	pid, err := procfs.InnerPID(c.Process.Pid)
	if err != nil {
		return 0, fmt.Errorf("find PID on the host: %w", err)
	}
	return pid, nil
}

// Service is a long-running process for Start.
type Service struct {
	Name string // of the log files NAME.out and NAME.err; default the program's
	Args []string
	Env  []string // added to ours
	Dir  string   // default the host's Dir
	// HighPID gives the process a PID from 30001 up, and those after it low
	// ones, so that a restore elsewhere finds its PIDs free.
	HighPID bool
}

// highPID and lowPID are what checkpoint.md found to work.
const (
	highPID = "30000"
	lowPID  = "100"
)

// Process is a started Service.
type Process struct {
	cmd      *Cmd
	pid      int
	out, err string
	from     int64 // where its own output begins in out
	done     chan struct{}
	exit     error // valid after done
}

// Start starts a service with /dev/null as stdin and its output appended to
// files of LogDir, which the host itself opened: such a process can be
// checkpointed. The lab waits for it; Done tells.
func (h *Host) Start(s Service) (*Process, error) {
	if len(s.Args) == 0 {
		return nil, errors.New("start service: no command")
	}
	if s.Name == "" {
		s.Name = filepath.Base(s.Args[0])
	}
	base := filepath.Join(h.lab.logDir, h.name+"-"+s.Name)
	p := &Process{out: base + ".out", err: base + ".err", done: make(chan struct{})}
	p.cmd = h.Command(s.Args[0], s.Args[1:]...)
	p.cmd.Env = append(os.Environ(), s.Env...)
	p.cmd.Dir = s.Dir
	if p.cmd.Dir == "" {
		p.cmd.Dir = h.dir
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.HighPID {
		if err := h.space.ask("last-pid " + highPID); err != nil {
			return nil, err
		}
	}
	err := h.space.inside(spaceFlags, func() error {
		var files [2]*os.File
		for i, name := range []string{p.out, p.err} {
			f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
			if err != nil {
				return err
			}
			defer f.Close()
			files[i] = f
		}
		fi, err := files[0].Stat()
		if err != nil {
			return err
		}
		p.from = fi.Size()
		p.cmd.Stdout, p.cmd.Stderr = files[0], files[1]
		return p.cmd.Cmd.Start()
	})
	if s.HighPID {
		err = errors.Join(err, h.space.ask("last-pid "+lowPID))
	}
	if err == nil {
		p.pid, err = p.cmd.HostPID()
	}
	if p.cmd.Process != nil {
		go func() {
			p.exit = p.cmd.Wait()
			close(p.done)
		}()
		h.procs = append(h.procs, p)
	}
	if err != nil {
		if p.cmd.Process != nil {
			_ = p.cmd.Process.Kill()
		}
		return nil, fmt.Errorf("start %s on %s: %w", s.Name, h.name, err)
	}
	return p, nil
}

// PID is the process's PID on its host.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process ended and was waited for.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit is how the process ended (nil: status 0). Only valid after Done.
func (p *Process) Exit() error { return p.exit }

// OutFile and ErrFile are the files its output goes to.
func (p *Process) OutFile() string { return p.out }

// ErrFile is the file its standard error goes to.
func (p *Process) ErrFile() string { return p.err }

// Signal sends the process a signal; one that has ended is not an error.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stop sends SIGTERM and waits; when ctx ends first it kills. It returns how
// the process ended.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.exit
	case <-ctx.Done():
		_ = p.Signal(unix.SIGKILL)
		<-p.done
		return fmt.Errorf("stop process %d: %w", p.pid, ctx.Err())
	}
}

// linePoll is how often WaitLine looks.
const linePoll = 10 * time.Millisecond

// WaitLine returns the first line of the process's standard output that match
// accepts. It fails when the process ends without it and when ctx ends; the
// error then has the end of its standard error.
func (p *Process) WaitLine(ctx context.Context, match func(line string) bool) (string, error) {
	t := time.NewTicker(linePoll)
	defer t.Stop()
	for {
		ended := false
		select {
		case <-p.done:
			ended = true // and look one last time
		default:
		}
		b, err := os.ReadFile(p.out)
		if err != nil {
			return "", fmt.Errorf("read output: %w", err)
		}
		for line := range bytes.Lines(b[min(p.from, int64(len(b))):]) {
			text, whole := strings.CutSuffix(string(line), "\n")
			if (whole || ended) && match(text) {
				return text, nil
			}
		}
		if ended {
			return "", fmt.Errorf("%s ended (%v) before the line came: %s", p.cmd.Args[0], p.cmd.ProcessState, p.errTail())
		}
		select {
		case <-t.C:
		case <-p.done:
		case <-ctx.Done():
			return "", fmt.Errorf("wait for a line of %s: %w: %s", p.cmd.Args[0], ctx.Err(), p.errTail())
		}
	}
}

func (p *Process) errTail() string {
	b, err := os.ReadFile(p.err)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(tail(b, 2000)))
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }
