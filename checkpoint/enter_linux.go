package checkpoint

import (
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// nsFlags maps the names under /proc/PID/ns to setns(2) flags, in the order in
// which they have to be entered: mnt last, since it takes /proc away.
var nsFlags = []struct {
	name string
	flag int
}{
	{"ipc", unix.CLONE_NEWIPC},
	{"uts", unix.CLONE_NEWUTS},
	{"cgroup", unix.CLONE_NEWCGROUP},
	{"net", unix.CLONE_NEWNET},
	{"pid", unix.CLONE_NEWPID},
	{"mnt", unix.CLONE_NEWNS},
}

// sameNS reports whether two processes share the namespace called name. A pid of
// 0 means the calling thread.
func sameNS(a, b int, name string) (bool, error) {
	la, err := os.Readlink(nsPath(a, name))
	if err != nil {
		return false, fmt.Errorf("read namespace: %w", err)
	}
	lb, err := os.Readlink(nsPath(b, name))
	if err != nil {
		return false, fmt.Errorf("read namespace: %w", err)
	}
	return la == lb, nil
}

func nsPath(pid int, name string) string {
	if pid == 0 {
		return "/proc/thread-self/ns/" + name
	}
	return fmt.Sprintf("/proc/%d/ns/%s", pid, name)
}

// startIn starts cmd as a child in those of the named namespaces of pid that are
// not ours.
func startIn(pid int, names map[string]bool, cmd *exec.Cmd) error {
	return nsthread.Run(func() error {
		if err := enter(pid, names); err != nil {
			return err
		}
		return cmd.Start()
	})
}

func enter(pid int, names map[string]bool) error {
	type namespace struct {
		f    *os.File
		name string
		flag int
	}
	var todo []namespace
	defer func() {
		for _, n := range todo {
			_ = n.f.Close()
		}
	}()
	for _, n := range nsFlags { // open all before the first is entered
		if !names[n.name] {
			continue
		}
		same, err := sameNS(0, pid, n.name)
		if err != nil {
			return err
		}
		if same {
			continue
		}
		f, err := os.Open(nsPath(pid, n.name))
		if err != nil {
			return fmt.Errorf("open namespace: %w", err)
		}
		todo = append(todo, namespace{f, n.name, n.flag})
	}
	for _, n := range todo {
		if n.flag == unix.CLONE_NEWNS {
			// A mount namespace can only be entered by a thread that shares its
			// root and working directory with no other (setns(2)).
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare directories: %w", err)
			}
		}
		if err := unix.Setns(int(n.f.Fd()), n.flag); err != nil {
			return fmt.Errorf("enter %s namespace of pid %d: %w", n.name, pid, err)
		}
	}
	return nil
}
