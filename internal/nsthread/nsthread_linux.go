// Package nsthread runs code in other namespaces than the process's. What
// setns(2) and unshare(2) do to a thread is never left to a goroutine that
// knows nothing of it.
package nsthread

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// errLeft is reported for a function that left by runtime.Goexit.
var errLeft = errors.New("the function left its goroutine")

// Run runs f on a thread of its own, which ends with it, and waits for f: for
// what cannot be undone for certain. What f starts as a child process inherits
// the thread's namespaces. A goroutine that f starts runs elsewhere.
//
// The main thread never ends, and /proc/self shows its namespaces as those of
// the whole process, so it is kept away from f.
func Run(f func() error) error {
	done := make(chan error, 1)
	go run(f, done)
	return <-done
}

func run(f func() error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		err := errLeft
		defer func() { done <- err }()
		err = f()
		return // still locked, which ends the thread
	}
	inner := make(chan error, 1)
	go run(f, inner) // cannot be given the main thread, which we hold
	done <- <-inner
	runtime.UnlockOSThread()
}

// RunInNewNet is Run in a network namespace that ends with f, with lo up.
func RunInNewNet(f func() error) error {
	return Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if err := LoopbackUp(); err != nil {
			return err
		}
		return f()
	})
}

// InNet runs f on a thread that is in the network namespace ns, and waits for
// it. The thread goes back to the runtime only if it came home: so nothing that
// f starts sees its parent thread die, as it would with Run.
func InNet(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errLeft
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, e := os.Open("/proc/thread-self/ns/net")
		if e != nil {
			err = fmt.Errorf("open own network namespace: %w", e)
			return
		}
		defer home.Close()
		if e := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); e != nil {
			err = fmt.Errorf("enter network namespace %s (needs CAP_SYS_ADMIN): %w", ns.Name(), e)
			return
		}
		defer func() {
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	return <-done
}

// InNamed is InNet in the namespace ns: a path such as /proc/42/ns/net, a name
// under /run/netns, or "" for the caller's own. Sockets that f opens and commands
// that it starts are of that namespace for good. f must not start goroutines that
// rely on it.
func InNamed(ns string, f func() error) error {
	if ns == "" {
		return f()
	}
	if !strings.Contains(ns, "/") {
		ns = filepath.Join("/run/netns", ns)
	}
	file, err := os.Open(ns)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer file.Close()
	return InNet(file, f)
}

// LoopbackUp sets lo up in the calling thread's network namespace.
func LoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set lo up: open socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}
