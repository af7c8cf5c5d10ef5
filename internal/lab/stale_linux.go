package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/procfs"
)

// A lab's directory is named after its owner, PID and start time, so that a
// directory alone says whether its owner still lives.
var dirName = regexp.MustCompile(`^ftckpt-lab-([0-9]+)-([0-9]+)-[0-9]+$`)

func makeDir() (string, error) {
	start, err := startTime(os.Getpid())
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("ftckpt-lab-%d-%s-", os.Getpid(), start))
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755) // a service may run as another user
}

// startTime, with the PID, names a process for good.
func startTime(pid int) (string, error) {
	f, err := procfs.Stat(pid)
	if err != nil {
		return "", err
	}
	return f[procfs.StartTime], nil
}

// CleanupStale removes what labs of dead owners left. Their processes end by
// themselves; should one be stopped or stuck, it is killed here.
func CleanupStale() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "ftckpt-lab-*"))
	if err != nil {
		return fmt.Errorf("look for stale labs: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		m := dirName.FindStringSubmatch(filepath.Base(dir))
		if m == nil || !ours(dir) {
			continue
		}
		pid, err := strconv.Atoi(m[1])
		if err != nil {
			continue
		}
		if start, err := startTime(pid); err == nil && start == m[2] {
			continue
		} else if err != nil && !procfs.Gone(err) {
			continue // cannot tell: leave it
		}
		errs = append(errs, killInits(dir), os.RemoveAll(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up stale labs: %w", err)
	}
	return nil
}

// ours reports whether dir is a directory that this user made: the temporary
// directory is everybody's.
func ours(dir string) bool {
	fi, err := os.Lstat(dir)
	if err != nil || !fi.IsDir() {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// killInits kills the PID 1s of the lab with that directory.
func killInits(dir string) error {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // it ended meanwhile
		}
		args := strings.Split(string(b), "\x00")
		if len(args) < 4 || args[1] != InitArg || args[2] != dir {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil {
			return err
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill init %d: %w", pid, err)
		}
	}
	return nil
}
