package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// ErrNotRunning means that no daemon of that name answers in the run directory.
var ErrNotRunning = errors.New("not running")

// Services are the names that have a socket in runDir, in order, whether a
// daemon still answers there or not. A run directory that does not exist has
// none.
func Services(runDir string) ([]string, error) {
	entries, err := os.ReadDir(runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := serviceOf(e.Name()); ok && e.Type() == fs.ModeSocket {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// GetStatus asks the daemon of service name in runDir how it stands.
func GetStatus(ctx context.Context, runDir, name string) (Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, ioTimeout, fmt.Errorf("no answer within %v: the daemon is stuck", ioTimeout))
	defer cancel()
	a, err := roundTrip(ctx, runDir, name, request{Op: opStatus})
	if err != nil {
		return Status{}, err
	}
	if a.Status == nil {
		return Status{}, fmt.Errorf("ask %s for its status: the answer has none", name)
	}
	return *a.Status, nil
}

// Checkpoint asks the daemon of service name for a generation and waits until
// it is stable; only ctx bounds how long. An error that the daemon returned
// keeps its exit status.
func Checkpoint(ctx context.Context, runDir, name string) (CheckpointResult, error) {
	a, err := roundTrip(ctx, runDir, name, request{Op: opCheckpoint})
	if err != nil {
		return CheckpointResult{}, err
	}
	if a.Checkpoint == nil {
		return CheckpointResult{}, fmt.Errorf("ask %s for a checkpoint: the answer has none", name)
	}
	return *a.Checkpoint, nil
}

// Failover asks the daemon of service name for a planned move and waits until
// it has happened or has not; only ctx bounds how long.
func Failover(ctx context.Context, runDir, name string, req FailoverRequest) (FailoverResult, error) {
	a, err := roundTrip(ctx, runDir, name, request{Op: opFailover, Failover: &req})
	if err != nil {
		return FailoverResult{}, err
	}
	if a.Failover == nil {
		return FailoverResult{}, fmt.Errorf("ask %s for a failover: the answer has none", name)
	}
	return *a.Failover, nil
}

func roundTrip(ctx context.Context, runDir, name string, req request) (answer, error) {
	req.V = Version
	path := socketPath(runDir, name)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return answer{}, fmt.Errorf("service %q in %s: %w", name, runDir, ErrNotRunning)
	case errors.Is(err, syscall.ECONNREFUSED):
		return answer{}, fmt.Errorf("service %q in %s: %w: its daemon died and left its socket", name, runDir, ErrNotRunning)
	case err != nil:
		return answer{}, fmt.Errorf("connect to service %q: %w", name, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := writeLine(c, req); err != nil && !errors.Is(err, syscall.EPIPE) {
		return answer{}, fmt.Errorf("ask %s for %s: %w", name, req.Op, because(ctx, err))
	}
	// A server that was too busy to read has answered all the same.
	var a answer
	if err := readLine(c, maxAnswer, &a); err != nil {
		return answer{}, fmt.Errorf("answer of %s to %s: %w", name, req.Op, because(ctx, err))
	}
	switch {
	case a.V != Version:
		return answer{}, fmt.Errorf("the daemon of %s speaks control protocol %d, not %d: restart it with this ftckpt", name, a.V, Version)
	case a.Error != nil:
		return answer{}, exitcode.Errorf(a.Error.status(), "%s: %s", name, a.Error.Message)
	}
	return a, nil
}

// because prefers why we stopped waiting to how that showed on the socket.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// status keeps a strange peer from making a failure look like success.
func (e *remoteError) status() exitcode.Code {
	if e.Code <= exitcode.OK || e.Code > exitcode.Fenced {
		return exitcode.Failed
	}
	return e.Code
}
