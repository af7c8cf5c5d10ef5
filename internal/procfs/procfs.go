// Package procfs reads what /proc says of a process. A process that has ended,
// or ends while it is read, gives an error for which Gone holds.
package procfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Places of proc_pid_stat(5) in what Stat returns.
const (
	State     = 3 - firstField
	PPID      = 4 - firstField
	PGID      = 5 - firstField
	SID       = 6 - firstField
	StartTime = 22 - firstField // in clock ticks since boot: with the PID it names a process for good

	firstField = 3
)

// Stat returns the fields of /proc/PID/stat behind the name, at least up to
// StartTime.
func Stat(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	f, ok := statFields(string(b))
	if !ok {
		return nil, fmt.Errorf("read /proc/%d/stat: cut short", pid)
	}
	return f, nil
}

// statFields leaves out the PID and the name, which may hold anything, spaces
// and parentheses too.
func statFields(stat string) ([]string, bool) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	return f, len(f) > StartTime
}

// Status returns the fields of /proc/PID/status by name, without the space
// around them.
func Status(pid int) (map[string]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	st := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			st[k] = strings.TrimSpace(v)
		}
	}
	return st, nil
}

// InnerPID is the id which a process has in its own PID namespace.
func InnerPID(pid int) (int, error) {
	st, err := Status(pid)
	if err != nil {
		return 0, err
	}
	f := strings.Fields(st["NSpid"])
	if len(f) == 0 {
		return 0, fmt.Errorf("read /proc/%d/status: no NSpid", pid)
	}
	return strconv.Atoi(f[len(f)-1])
}

// Tree lists a process and its descendants, parents first. It is a snapshot: a
// process may fork or end meanwhile.
func Tree(root int) ([]int, error) {
	if _, err := Stat(root); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		f, err := Stat(pid)
		if err != nil {
			continue // it has ended
		}
		if parent, err := strconv.Atoi(f[PPID]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree, nil
}

// Gone reports whether err says that there is no such process.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
