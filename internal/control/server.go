package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

const (
	maxConns     = 16
	ioTimeout    = 5 * time.Second // for a peer to send its line or take ours
	acceptPause  = 100 * time.Millisecond
	socketMode   = 0o600
	runDirMode   = 0o755
	lockFileMode = 0o600
)

// Handler is the daemon behind a socket. Its methods are called from several
// goroutines at once, Checkpoint and Failover from one at a time.
type Handler interface {
	// Status must not wait for anything slow: it is asked every second.
	Status() Status
	// Checkpoint returns when a new generation is stable. Its context ends
	// with the server, not with the client that asked: half a generation is
	// worse than one nobody waits for. An error's exitcode is passed on.
	Checkpoint(ctx context.Context) (CheckpointResult, error)
	// Failover gives the service to another node, and returns when it is live
	// there or stays here. Its context is as Checkpoint's.
	Failover(ctx context.Context, req FailoverRequest) (FailoverResult, error)
}

// Server is a listening control socket. It holds the service's lock in its
// run directory, so a second daemon of the same name is refused.
type Server struct {
	path  string
	lock  *os.File
	ln    net.Listener
	log   *slog.Logger
	slots chan struct{}
	busy  chan struct{} // one token: a checkpoint or a failover on request is under way
	conns sync.WaitGroup
}

// Listen takes the lock of service name in runDir, which it creates where it
// is missing, and opens the socket. What a dead daemon left is replaced; a
// living one makes it fail. Call Serve next, and Close in the end.
func Listen(runDir, name string, log *slog.Logger) (*Server, error) {
	path := socketPath(runDir, name)
	if len(path) > maxPath {
		return nil, exitcode.Errorf(exitcode.Config, "control socket %s: the path is %d bytes, %d at most: choose a shorter --run-dir or --name",
			path, len(path), maxPath)
	}
	if err := os.MkdirAll(runDir, runDirMode); err != nil {
		return nil, fmt.Errorf("create run directory: %w", err)
	}
	lock, err := takeLock(lockPath(runDir, name), runDir, name)
	if err != nil {
		return nil, err
	}
	ln, err := listenPrivate(path)
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("open control socket: %w", err)
	}
	return &Server{
		path:  path,
		lock:  lock,
		ln:    ln,
		log:   log,
		slots: make(chan struct{}, maxConns),
		busy:  make(chan struct{}, 1),
	}, nil
}

// takeLock holds an flock(2) for as long as the file is open, so it goes with
// the process, however that ends. The file itself stays: removing it would let
// two daemons lock two files of one name.
func takeLock(path, runDir, name string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, lockFileMode)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		var owner [20]byte
		n, _ := f.ReadAt(owner[:], 0) // only to be helpful
		return nil, fmt.Errorf("service %q already has a daemon in %s (pid %s): stop it, or use another --name or --run-dir",
			name, runDir, printable(owner[:n]))
	}
	if err := f.Truncate(0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write lock file: %w", err)
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write lock file: %w", err)
	}
	return f, nil
}

func printable(pid []byte) string {
	if n, err := strconv.Atoi(string(pid)); err == nil {
		return strconv.Itoa(n)
	}
	return "unknown"
}

// listenPrivate binds aside and moves the socket into place when its mode is
// right: nobody can connect in between, and a stale socket is replaced at once.
func listenPrivate(path string) (net.Listener, error) {
	aside := path + ".new"
	if len(aside) > maxPath {
		aside = path // then its mode is set a moment late
	}
	for _, p := range []string{aside, path} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: aside, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false) // it would unlink the name it was bound to
	if err := os.Chmod(aside, socketMode); err != nil {
		_ = ln.Close()
		return nil, err
	}
	if err := os.Rename(aside, path); err != nil {
		_ = ln.Close()
		return nil, err
	}
	return ln, nil
}

// Serve answers requests until ctx ends, then returns nil. It returns once
// every answer under way is finished.
func (s *Server) Serve(ctx context.Context, h Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = s.ln.Close() })
	defer stop()
	defer s.conns.Wait()
	for {
		c, err := s.ln.Accept()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			if err == nil {
				_ = c.Close()
			}
			return nil
		case err != nil:
			// Out of descriptors, most likely: it passes, and losing the socket
			// would be worse than waiting.
			s.log.Warn("control socket: accept failed", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case s.slots <- struct{}{}:
			s.conns.Go(func() {
				defer func() { <-s.slots }()
				s.answer(ctx, c, h)
			})
		default:
			_ = c.SetWriteDeadline(time.Now().Add(acceptPause))
			_ = writeLine(c, failure(errors.New("too many requests at once: try again")))
			_ = c.Close()
		}
	}
}

func (s *Server) answer(ctx context.Context, c net.Conn, h Handler) {
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(ioTimeout)); err != nil {
		return
	}
	// A silent client must not delay the daemon's end.
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var req request
	var a answer
	if err := readLine(c, maxRequest, &req); err != nil {
		a = failure(fmt.Errorf("read request: %w", err))
	} else {
		a = s.do(ctx, req, h)
	}
	_ = c.SetWriteDeadline(time.Now().Add(ioTimeout))
	if err := writeLine(c, a); err != nil {
		s.log.Debug("control socket: client went away", "op", req.Op, "err", err)
	}
}

func (s *Server) do(ctx context.Context, req request, h Handler) answer {
	if req.V != Version {
		return failure(fmt.Errorf("this daemon speaks control protocol %d, not %d: use the ftckpt it was started from, or restart it", Version, req.V))
	}
	switch req.Op {
	case opStatus:
		st := h.Status().normal()
		return answer{V: Version, Status: &st}
	case opCheckpoint, opFailover:
		select {
		case s.busy <- struct{}{}:
			defer func() { <-s.busy }()
		default:
			return failure(errors.New("a checkpoint or failover that was asked for is already under way"))
		}
		return s.change(ctx, req, h)
	default:
		return failure(fmt.Errorf("unknown request %.32q", req.Op))
	}
}

// change does what takes a while and must not be done twice at once.
func (s *Server) change(ctx context.Context, req request, h Handler) answer {
	a := answer{V: Version}
	var err error
	if req.Op == opCheckpoint {
		var res CheckpointResult
		res, err = h.Checkpoint(ctx)
		a.Checkpoint = &res
	} else {
		var res FailoverResult
		if req.Failover == nil {
			return failure(errors.New("a failover request without its settings"))
		}
		res, err = h.Failover(ctx, *req.Failover)
		a.Failover = &res
	}
	if err != nil {
		return failure(err)
	}
	return a
}

// Close removes the socket and gives up the lock. It does not wait for Serve.
func (s *Server) Close() error {
	err := s.ln.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	rm := os.Remove(s.path)
	if errors.Is(rm, fs.ErrNotExist) {
		rm = nil
	}
	return errors.Join(err, rm, s.lock.Close())
}
