// Package sandbox runs a small TCP server and its clients in private network,
// PID and mount namespaces, so that a host's ability to dump and restore can be
// tried without touching anything else on it.
//
// Topology: two processes of our own binary and one loopback device.
//
//	our process --pipes--> init (PID 1, holds the clients) --lo--> target (server)
//
// The target is dumped, ended and restored by our process; the clients in init
// do not know. Everything ends with init, and init ends with our process.
//
// Main must be called first thing in main or TestMain.
package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	initName   = "ftckpt-sandbox-init"
	targetName = "ftckpt-sandbox-target"
)

// Main returns at once in every process but a sandbox's own, where it does that
// process's work and never returns.
func Main() {
	switch os.Args[0] {
	case initName:
		runInit()
	case targetName:
		runTarget(os.Args[1:])
	}
}

// Options says what to run.
type Options struct {
	// Hold lists what the target should hold besides its listener: see the
	// holders in target_linux.go.
	Hold []string
	// Pause makes the target one that never serves; it only holds.
	NoWScale     bool // connections without window scaling
	NoTimestamps bool // connections without timestamps
}

// Sandbox is a running one. Its methods are for one goroutine at a time.
type Sandbox struct {
	InitPID   int // as we see it
	TargetPID int // in the sandbox

	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	once  sync.Once
	errs  *strings.Builder
	wait  chan struct{}
	Seqno int
}

// request and reply are lines of JSON on init's stdin and stdout.
type request struct {
	Op   string `json:"op"`
	Conn int    `json:"conn,omitempty"`
	Mode string `json:"mode,omitempty"`
}

type reply struct {
	Error  string `json:"error,omitempty"`
	PID    int    `json:"pid,omitempty"`
	Conn   int    `json:"conn,omitempty"`
	Client Client `json:"client,omitempty"`
}

// Client is where the client's end of a connection stands, as its kernel says.
type Client struct {
	Port     uint16 `json:"port"`
	RcvNxt   uint32 `json:"rcv_nxt"`   // of what the server sent
	WriteSeq uint32 `json:"write_seq"` // of what the client wrote
	Queued   int    `json:"queued"`    // octets received and not read
}

// Start makes a sandbox with its target serving. It needs root.
func Start(ctx context.Context, o Options) (*Sandbox, error) {
	spec, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	s := &Sandbox{errs: &strings.Builder{}, wait: make(chan struct{})}
	s.cmd = &exec.Cmd{Path: exe, Args: []string{initName, string(spec)}, Dir: "/", Stderr: s.errs}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Setsid:     true,
	}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	s.InitPID = s.cmd.Process.Pid
	r, err := s.ask(ctx, request{Op: "start"})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	s.TargetPID = r.PID
	return s, nil
}

// Dial makes a connection to the target; mode says what the target does with it
// (the modes are in target_linux.go). It returns a number for it.
func (s *Sandbox) Dial(ctx context.Context, mode string) (int, error) {
	r, err := s.ask(ctx, request{Op: "dial", Mode: mode})
	return r.Conn, err
}

// Exchange sends octets over a connection of mode Echo and checks the answer,
// which only a target that remembers all exchanges so far can give.
func (s *Sandbox) Exchange(ctx context.Context, conn int) error {
	_, err := s.ask(ctx, request{Op: "exchange", Conn: conn})
	return err
}

// Client asks the client's kernel where a connection stands.
func (s *Sandbox) Client(ctx context.Context, conn int) (Client, error) {
	r, err := s.ask(ctx, request{Op: "client", Conn: conn})
	return r.Client, err
}

// HalfClose closes the client's sending side.
func (s *Sandbox) HalfClose(ctx context.Context, conn int) error {
	_, err := s.ask(ctx, request{Op: "halfclose", Conn: conn})
	return err
}

// Close ends every process of the sandbox.
func (s *Sandbox) Close() {
	s.once.Do(func() {
		_ = s.in.Close()
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
}

// ask sends one request and waits for its reply, at most until ctx ends; then
// the sandbox is of no more use.
func (s *Sandbox) ask(ctx context.Context, q request) (reply, error) {
	stop := context.AfterFunc(ctx, func() { _ = s.cmd.Process.Kill() })
	defer stop()
	b, err := json.Marshal(q)
	if err != nil {
		return reply{}, err
	}
	if _, err := s.in.Write(append(b, '\n')); err != nil {
		return reply{}, fmt.Errorf("%s: %w", q.Op, s.explain(ctx, err))
	}
	line, err := s.out.ReadBytes('\n')
	if err != nil {
		return reply{}, fmt.Errorf("%s: %w", q.Op, s.explain(ctx, err))
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		return reply{}, fmt.Errorf("%s: sandbox said %.100q", q.Op, line)
	}
	if r.Error != "" {
		return r, fmt.Errorf("%s: %s", q.Op, r.Error)
	}
	return r, nil
}

// explain says why init is gone.
func (s *Sandbox) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.Close()
	if said := strings.TrimSpace(s.errs.String()); said != "" {
		return fmt.Errorf("sandbox ended: %.300s", said)
	}
	return fmt.Errorf("sandbox ended: %w", err)
}

// patience bounds everything a helper waits for inside the sandbox.
const patience = 10 * time.Second
