package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

const spaceFlags = unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS

// killWait bounds the wait for the last process of a killed host to be gone.
const killWait = 10 * time.Second

// space is a set of namespaces with a PID 1 of ours in it.
type space struct {
	name  string
	init  *exec.Cmd
	pidfd int
	gone  chan struct{} // closed when PID 1 was reaped: all its processes are gone

	mu  sync.Mutex // one command and its answer at a time; guards fields below
	in  io.WriteCloser
	out *bufio.Scanner
}

// newSpace starts PID 1 of new namespaces and waits until it is ready.
func newSpace(ctx context.Context, dir, name string) (*space, error) {
	s := &space{name: name, pidfd: -1, gone: make(chan struct{})}
	// Its life is the host's, not that of ctx, which bounds only the start.
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe", InitArg, dir, name)
	// argv[0] as a person expects it in ps.
	cmd.Args[0] = "ftckpt"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: spaceFlags,
		Setsid:     true, // a Ctrl-C is for the owner, which ends the host in order
		PidFD:      &s.pidfd,
	}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start init of host %s (are you root?): %w", name, err)
	}
	s.init, s.in, s.out = cmd, in, bufio.NewScanner(out)
	go func() {
		_, _ = cmd.Process.Wait()
		close(s.gone)
	}()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := s.answer("ready"); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare host %s: %w", name, err), ctx.Err(), s.kill())
	}
	return s, nil
}

// ask sends PID 1 one command and returns its failure, if any.
func (s *space) ask(line string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		return fmt.Errorf("command host %s: %w", s.name, err)
	}
	if err := s.answer("ok"); err != nil {
		return fmt.Errorf("command host %s: %w", s.name, err)
	}
	return nil
}

func (s *space) answer(want string) error {
	if !s.out.Scan() {
		return errors.Join(errors.New("its init is gone"), s.out.Err())
	}
	got := s.out.Text()
	if got == want {
		return nil
	}
	return errors.New(strings.TrimPrefix(got, "error: "))
}

// kill ends every process of the space at once and waits until they are gone.
func (s *space) kill() error {
	if err := s.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill host %s: %w", s.name, err)
	}
	select {
	case <-s.gone:
	case <-time.After(killWait):
		return fmt.Errorf("kill host %s: processes are left after %v (was every Cmd waited for?)", s.name, killWait)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.in.Close()
	if s.pidfd >= 0 {
		_ = unix.Close(s.pidfd)
		s.pidfd = -1
	}
	return nil
}

// dup returns a descriptor of PID 1 that a concurrent kill does not close.
func (s *space) dup() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pidfd < 0 {
		return -1, fmt.Errorf("enter host %s: it is dead", s.name)
	}
	return unix.FcntlInt(uintptr(s.pidfd), unix.F_DUPFD_CLOEXEC, 0)
}

// inside runs f on a thread of its own that has joined the namespaces flags
// names. The thread ends with f; goroutines that f starts are not inside.
func (s *space) inside(flags int, f func() error) error {
	fd, err := s.dup()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return nsthread.Run(func() error {
		if flags&unix.CLONE_NEWNS != 0 {
			// The kernel wants a thread with a root and cwd of its own.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("enter host %s: unshare: %w", s.name, err)
			}
		}
		if err := unix.Setns(fd, flags); err != nil {
			return fmt.Errorf("enter host %s: setns: %w", s.name, err)
		}
		return f()
	})
}
