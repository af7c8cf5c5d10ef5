package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// swrk is one CRIU that serves one request over a socket pair ("criu swrk FD").
//
// It speaks go-criu's rpc messages itself instead of using go-criu's client:
// that one gives no way to end a CRIU that hangs, leaves its end of the socket
// open in whatever else is being forked at that moment, and starts CRIU on
// whichever thread it happens to run.
type swrk struct {
	cmd    *exec.Cmd
	conn   *os.File
	stderr bytes.Buffer
}

// maxResponse is twice what CRIU itself allots to a message.
const maxResponse = 16 << 10

// cancelGrace is how long a CRIU that was told to give up may take. Killing it is
// the last resort, for one that hangs: a target that is full of CRIU's parasite
// code and whose sockets are in repair mode may not survive that.
var cancelGrace = 30 * time.Second // a variable for tests

// shield starts CRIU deaf to what a service manager or a terminal sends to a
// whole group, and to the signals that would kill it where a system call's error
// makes it heal its target: a write into a socket whose reader died, and one
// beyond the file size limit, which is how giveUp stops it.
const shield = `trap "" TERM INT HUP QUIT PIPE XFSZ; exec "$@"`

// startSwrk starts criu with args in the named namespaces of pid.
func startSwrk(argv []string, pid int, names map[string]bool) (*swrk, error) {
	fds, err := unix.Socketpair(unix.AF_LOCAL, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // so that Close ends a Read
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return nil, fmt.Errorf("set non-blocking: %w", err)
	}
	s := &swrk{conn: os.NewFile(uintptr(fds[0]), "criu-rpc")}
	theirs := os.NewFile(uintptr(fds[1]), "criu-rpc-child")
	defer theirs.Close()
	// No context of the caller's: CRIU is asked to give up and only then killed.
	s.cmd = exec.CommandContext(context.Background(), argv[0], append(argv[1:], "swrk", "3")...)
	s.cmd.ExtraFiles = []*os.File{theirs}
	s.cmd.Stderr = limitWriter{&s.stderr}
	// Its group is what we kill. No parent-death signal: if we die, CRIU finds
	// the socket closed, heals the target and ends.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.WaitDelay = 2 * time.Second // a restored process may hold stderr open
	if err := startIn(pid, names, s.cmd); err != nil {
		_ = s.conn.Close()
		return nil, fmt.Errorf("start criu: %w", err)
	}
	return s, nil
}

// limitWriter keeps the first few kilobytes and takes the rest.
type limitWriter struct{ b *bytes.Buffer }

func (w limitWriter) Write(p []byte) (int, error) {
	if room := 8<<10 - w.b.Len(); room > 0 {
		w.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// spare keeps the out-of-memory killer off CRIU: the target would go with it.
func (s *swrk) spare() {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", s.cmd.Process.Pid), []byte("-1000"), 0)
}

// giveUp makes a dump fail at CRIU's next write into an image file, whereupon it
// heals the target and ends by itself.
func (s *swrk) giveUp() {
	_ = unix.Prlimit(s.cmd.Process.Pid, unix.RLIMIT_FSIZE, &unix.Rlimit{}, nil)
}

// run sends one request and answers CRIU's notifications with notify until the
// response is there; then CRIU has ended. When ctx ends, the next notification is
// refused and the next write fails, which makes CRIU undo what it did.
func (s *swrk) run(ctx context.Context, typ rpc.CriuReqType, opts *rpc.CriuOpts, notify func(script string, pid int32) error) error {
	answered := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-answered:
			return
		case <-ctx.Done():
		}
		s.giveUp()
		t := time.NewTimer(cancelGrace)
		defer t.Stop()
		select {
		case <-answered:
		case <-t.C:
			s.kill()
		}
	}()
	err := s.converse(ctx, typ, opts, notify)
	close(answered)
	<-watched
	_ = s.conn.Close()
	s.wait()
	if ctx.Err() != nil && err != nil {
		err = context.Cause(ctx)
	}
	return err
}

func (s *swrk) converse(ctx context.Context, typ rpc.CriuReqType, opts *rpc.CriuOpts, notify func(string, int32) error) error {
	opts.NotifyScripts = proto.Bool(true)
	req := &rpc.CriuReq{Type: &typ, Opts: opts}
	var refused error // why we made CRIU fail
	for {
		resp, err := s.exchange(req)
		if err != nil {
			return errors.Join(refused, err)
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			if refused != nil {
				return refused
			}
			if !resp.GetSuccess() {
				if n := resp.GetCrErrno(); n != 0 {
					return fmt.Errorf("failed (%w)", syscall.Errno(n))
				}
				return errors.New("failed")
			}
			if resp.GetType() != typ {
				return fmt.Errorf("answered %s to %s", resp.GetType(), typ)
			}
			return nil
		}
		n := resp.GetNotify()
		if ctx.Err() != nil {
			refused = context.Cause(ctx)
		} else if refused == nil {
			refused = notify(n.GetScript(), n.GetPid())
			if refused == nil && ctx.Err() != nil {
				refused = context.Cause(ctx)
			}
		}
		req = &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(refused == nil)}
	}
}

func (s *swrk) exchange(req *rpc.CriuReq) (*rpc.CriuResp, error) {
	b, err := proto.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	if _, err := s.conn.Write(b); err != nil {
		return nil, fmt.Errorf("ended early: %w", s.early(err))
	}
	b = make([]byte, maxResponse)
	n, err := s.conn.Read(b)
	if err != nil {
		return nil, fmt.Errorf("ended early: %w", s.early(err))
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(b[:n], resp); err != nil {
		return nil, fmt.Errorf("decode answer: %w", err)
	}
	return resp, nil
}

// early adds what a CRIU that did not come to its log said on stderr.
func (s *swrk) early(err error) error {
	s.wait()
	if line, _, _ := bytes.Cut(bytes.TrimSpace(s.stderr.Bytes()), []byte("\n")); len(line) > 0 {
		return fmt.Errorf("%w: %.200s", err, line)
	}
	return err
}

// kill ends CRIU and its helpers, which share its process group, and nothing
// else: a target keeps its own group.
func (s *swrk) kill() {
	_ = unix.Kill(-s.cmd.Process.Pid, unix.SIGKILL)
}

// wait reaps CRIU; it may be called more than once. Its exit status says nothing:
// swrk ends with 1 where all went well.
func (s *swrk) wait() {
	if s.cmd.ProcessState != nil {
		return
	}
	_ = s.conn.Close() // CRIU ends when its peer has
	t := time.AfterFunc(cancelGrace, s.kill)
	_ = s.cmd.Wait()
	t.Stop()
}
