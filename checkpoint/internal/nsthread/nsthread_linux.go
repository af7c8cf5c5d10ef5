// Package nsthread runs code on threads that are thrown away afterwards, because
// what setns(2) and unshare(2) do to a thread cannot be undone for certain.
package nsthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs f on a thread of its own, which ends with it, and waits for f. What f
// starts as a child process inherits the thread's namespaces. A goroutine that f
// starts runs elsewhere.
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
		done <- f()
		return // still locked, which ends the thread
	}
	inner := make(chan error, 1)
	go run(f, inner) // cannot be given the main thread, which we hold
	done <- <-inner
	runtime.UnlockOSThread()
}
