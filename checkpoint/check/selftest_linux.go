package check

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/checkpoint/internal/sandbox"
)

// Main must be called first thing in main, and in TestMain of packages that use
// Host: the dump-and-restore probe runs this very program again as the process to
// be dumped. It returns at once in every other case.
func Main() { sandbox.Main() }

// selfTestLimit bounds the probe, which takes about 200 ms.
const selfTestLimit = 60 * time.Second

func probeDumpRestore(ctx context.Context, o Options) (State, string) {
	c, err := checkpoint.Locate(ctx, o.Criu)
	if err != nil {
		return Unknown, "there is no criu to try it with"
	}
	if os.Geteuid() != 0 {
		return Unknown, "only root can try it"
	}
	ctx, cancel := context.WithTimeout(ctx, selfTestLimit)
	defer cancel()
	s, err := sandbox.Start(ctx, sandbox.Options{})
	if err != nil {
		return Unknown, err.Error()
	}
	defer s.Close()
	d, err := dumpRestore(ctx, c, s)
	if err != nil {
		return judge(err)
	}
	return Works, fmt.Sprintf("an established connection went on; dump %d ms, restore %d ms", d[0].Milliseconds(), d[1].Milliseconds())
}

// dumpRestore dumps the sandbox's target, ends it, restores it and checks that
// its connection carries octets before and after.
func dumpRestore(ctx context.Context, c checkpoint.Criu, s *sandbox.Sandbox) (took [2]time.Duration, err error) {
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = os.TempDir()
	}
	tmp, err := os.MkdirTemp(base, "ftckpt-check-")
	if err != nil {
		return took, fmt.Errorf("make image directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	dir := filepath.Join(tmp, "image")
	conn, err := s.Dial(ctx, sandbox.Echo)
	if err != nil {
		return took, fmt.Errorf("connect: %w", err)
	}
	if err := s.Exchange(ctx, conn); err != nil {
		return took, fmt.Errorf("before the dump: %w", err)
	}
	pid, err := checkpoint.OuterPID(s.TargetPID, s.InitPID)
	if err != nil {
		return took, err
	}
	d, err := c.Dump(ctx, checkpoint.DumpRequest{PID: pid, InitPID: s.InitPID, Dir: dir, Stop: true})
	if err != nil {
		return took, err
	}
	r, err := c.Restore(ctx, checkpoint.RestoreRequest{Dir: dir, InitPID: s.InitPID})
	if err != nil {
		return took, err
	}
	if err := s.Exchange(ctx, conn); err != nil {
		return took, fmt.Errorf("after the restore: %w", err)
	}
	return [2]time.Duration{d.Pause, r.Took}, nil
}
