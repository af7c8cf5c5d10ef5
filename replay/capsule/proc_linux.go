package capsule

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/procfs"
)

// identify says who pid is now. A zombie is nobody.
func identify(pid int) (identity, error) {
	stat, err := procfs.Stat(pid)
	if err != nil {
		return identity{}, err
	}
	if s := stat[procfs.State]; s == "Z" || s == "X" {
		return identity{}, fmt.Errorf("process %d has ended", pid)
	}
	start, err := strconv.ParseUint(stat[procfs.StartTime], 10, 64)
	if err != nil {
		return identity{}, fmt.Errorf("read /proc/%d/stat: start time: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return identity{}, err
	}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return identity{}, err
	}
	return identity{PID: pid, StartTime: start, BootID: strings.TrimSpace(string(boot)), PIDNS: ns}, nil
}

// checkProc refuses a /proc that counts PIDs differently from this process.
func checkProc() error {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return err
	}
	if self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("/proc is of another PID namespace (there we are %s, here %d): mount proc anew in this one", self, os.Getpid())
	}
	return nil
}

// openPIDFD returns a descriptor that names this one process for ever, even
// when its PID is reused, and that the runtime can wait for.
func openPIDFD(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitExit returns nil when the process has ended and an error when pidfd was
// closed before.
func awaitExit(pidfd *os.File) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return n == 1 && err == nil
	})
}

func killPIDFD(pidfd *os.File) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var kerr error
	err = conn.Control(func(fd uintptr) { kerr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if errors.Is(kerr, unix.ESRCH) {
		kerr = nil
	}
	return errors.Join(err, kerr)
}
