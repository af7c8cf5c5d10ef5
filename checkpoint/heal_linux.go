package checkpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// heal takes the TCP sockets of a process tree out of repair mode. A CRIU that
// was killed in the midst of a dump leaves them there, and in repair mode a
// socket discards what it is sent: the connections of a server that otherwise
// runs on would end. Sockets that are not in repair mode are left alone. It
// answers how many it healed.
func heal(tasks []Task) (int, error) {
	n := 0
	for _, t := range tasks {
		k, err := healTask(t.PID)
		n += k
		if err != nil && !os.IsNotExist(err) {
			return n, fmt.Errorf("take sockets of pid %d out of repair mode: %w", t.PID, err)
		}
	}
	return n, nil
}

func healTask(pid int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		num, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if target, err := os.Readlink(dir + "/" + e.Name()); err != nil || !strings.HasPrefix(target, "socket:[") {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, num, 0)
		if err != nil {
			continue // it was closed just now
		}
		if on, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR); err == nil && on != 0 {
			// Without a window probe: the client must not hear of it.
			if unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_OFF_NO_WP) == nil {
				n++
			}
		}
		_ = unix.Close(fd)
	}
	return n, nil
}
