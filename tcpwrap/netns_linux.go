package tcpwrap

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// InNetNS runs fn on a thread that is in the network namespace ns: a path such
// as /proc/42/ns/net, a name under /run/netns, or "" for the caller's own.
// Sockets that fn opens and commands that it starts are of that namespace for
// good. fn must not start goroutines that rely on it.
func InNetNS(ns string, fn func() error) error {
	if ns == "" {
		return fn()
	}
	if !strings.Contains(ns, "/") {
		ns = filepath.Join("/run/netns", ns)
	}
	fd, err := unix.Open(ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", ns, err)
	}
	defer unix.Close(fd)
	done := make(chan error, 1)
	go func() { done <- onThreadIn(fd, ns, fn) }()
	return <-done
}

// onThreadIn is the goroutine of InNetNS. Its thread goes back to where it was
// or, should that fail, dies with the goroutine: no other goroutine may ever
// be run in ns by accident. Going back is the rule because the process's first
// thread cannot be thrown away, and /proc/PID/ns shows that one.
func onThreadIn(fd int, ns string, fn func() error) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s (needs CAP_SYS_ADMIN): %w", ns, err)
	}
	err = fn()
	if unix.Setns(home, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}
