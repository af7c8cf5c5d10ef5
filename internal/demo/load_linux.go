package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// load is a load generator that runs on a host.
type load struct {
	cmd   *lab.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when res and err are final
	res   loadgen.Result
	err   error

	mu     sync.Mutex
	last   loadgen.Message
	change chan struct{} // closed and replaced with each message
}

// startLoad starts the clients on a host; bin must call loadgen.Hook.
func startLoad(h *lab.Host, bin string, cfg loadgen.Config) (*load, error) {
	l := &load{cmd: h.Command(bin, loadgen.Arg), done: make(chan struct{}), change: make(chan struct{})}
	l.cmd.Stderr = os.Stderr
	var err error
	if l.stdin, err = l.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := l.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start clients on %s: %w", h.Name(), err)
	}
	go func() {
		defer close(l.done)
		res, err := loadgen.Follow(out, l.heard)
		l.res, l.err = res, errors.Join(err, l.cmd.Wait())
	}()
	if err := json.NewEncoder(l.stdin).Encode(cfg); err != nil {
		l.kill()
		return nil, fmt.Errorf("start clients on %s: %w", h.Name(), err)
	}
	return l, nil
}

func (l *load) heard(m loadgen.Message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = m
	close(l.change)
	l.change = make(chan struct{})
}

func (l *load) latest() (loadgen.Message, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last, l.change
}

// wait waits until the clients' progress satisfies cond, for at most limit.
func (l *load) wait(ctx context.Context, what string, limit time.Duration, cond func(loadgen.Message) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	for {
		m, change := l.latest()
		if cond(m) {
			return nil
		}
		select {
		case <-change:
		case <-l.done:
			return fmt.Errorf("wait for %s: the clients ended: %w", what, l.err)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		}
	}
}

// finish ends the load and returns what the clients saw. It takes as long as
// requests under way take, which the clients bound themselves.
func (l *load) finish(ctx context.Context) (loadgen.Result, error) {
	_ = l.stdin.Close() // an error means that they ended, and Follow says why
	select {
	case <-l.done:
		return l.res, l.err
	case <-ctx.Done():
		l.kill()
		return loadgen.Result{}, fmt.Errorf("end load: %w", ctx.Err())
	}
}

func (l *load) kill() {
	_ = l.cmd.Process.Kill()
	<-l.done
}
