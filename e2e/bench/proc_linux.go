package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/lab"
)

// cpuTime is what a process has used of the processors, its ended threads
// included (clock_getcpuclockid(3)). Unlike /proc/PID/stat it counts in
// nanoseconds.
func cpuTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
		return 0, fmt.Errorf("read CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// machinePID is the machine's PID of a host's process.
func machinePID(h *lab.Host, pid int) (int, error) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.InitPID()))
	if err != nil {
		return 0, fmt.Errorf("find process %d of %s: %w", pid, h.Name(), err)
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, d := range dirs {
		if l, err := os.Readlink(d + "/ns/pid"); err != nil || l != ns {
			continue
		}
		f := strings.Fields(statusField(d, "NSpid:"))
		if len(f) > 0 && f[len(f)-1] == strconv.Itoa(pid) {
			return strconv.Atoi(filepath.Base(d))
		}
	}
	return 0, fmt.Errorf("find process %d of %s: no such process", pid, h.Name())
}

// residentMB is a process's resident size in millions of octets.
func residentMB(pid int) (float64, error) {
	f := strings.Fields(statusField(fmt.Sprintf("/proc/%d", pid), "VmRSS:"))
	if len(f) == 0 {
		return 0, fmt.Errorf("read resident size of process %d", pid)
	}
	kb, err := strconv.ParseFloat(f[0], 64)
	return kb * 1024 / 1e6, err
}

func statusField(dir, key string) string {
	b, err := os.ReadFile(dir + "/status")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(b) {
		if rest, ok := strings.CutPrefix(string(line), key); ok {
			return rest
		}
	}
	return ""
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// kill9 ends a process of ours as an out-of-memory kill does.
func kill9(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}
