package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/ftckpt/ftckpt/internal/procfs"
)

// ErrNoProcess says that a process does not exist.
var ErrNoProcess = errors.New("no such process")

// ProcTree lists a running process and its descendants with the ids we see. Errors:
// ErrNoProcess.
func ProcTree(root int) ([]Task, error) {
	var tasks []Task
	todo := []int{root}
	for len(todo) > 0 {
		pid := todo[0]
		todo = todo[1:]
		t, err := procTask(pid)
		if err != nil {
			if pid != root && errors.Is(err, ErrNoProcess) {
				continue // it ended while we looked
			}
			return nil, err
		}
		tasks = append(tasks, t)
		for _, tid := range t.Threads {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, tid))
			if err != nil {
				continue // as above
			}
			for _, f := range strings.Fields(string(b)) {
				if child, err := strconv.Atoi(f); err == nil {
					todo = append(todo, child)
				}
			}
		}
	}
	return tasks, nil
}

// procTask reads one process from /proc.
func procTask(pid int) (Task, error) {
	f, err := procfs.Stat(pid)
	if err != nil {
		return Task{}, procError(err)
	}
	t := Task{PID: pid}
	for place, p := range map[int]*int{procfs.PPID: &t.PPID, procfs.PGID: &t.PGID, procfs.SID: &t.SID} {
		if *p, err = strconv.Atoi(f[place]); err != nil {
			return Task{}, fmt.Errorf("read process: %w", err)
		}
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return Task{}, ErrNoProcess
	}
	for _, e := range threads {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			t.Threads = append(t.Threads, tid)
		}
	}
	return t, nil
}

// innerPID is the id which a process has in its own PID namespace.
func innerPID(pid int) (int, error) {
	inner, err := procfs.InnerPID(pid)
	if err != nil {
		return 0, procError(err)
	}
	return inner, nil
}

func procError(err error) error {
	if procfs.Gone(err) {
		return ErrNoProcess
	}
	return fmt.Errorf("read process: %w", err)
}

// OuterPID finds what we call the process with the given id in the PID namespace
// of init, or in ours when init is 0. Errors: ErrNoProcess.
func OuterPID(inner, init int) (int, error) {
	if init == 0 {
		return inner, nil
	}
	if same, err := sameNS(0, init, "pid"); err != nil {
		return 0, err
	} else if same {
		return inner, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if in, err := innerPID(pid); err != nil || in != inner {
			continue
		}
		if same, err := sameNS(pid, init, "pid"); err == nil && same {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("find process %d of the PID namespace of %d: %w", inner, init, ErrNoProcess)
}
