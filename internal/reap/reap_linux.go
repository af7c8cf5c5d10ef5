// Package reap is for processes that are PID 1 of a namespace, to which orphans
// fall: a zombie would keep its PID, and no restore could have it.
package reap

import (
	"errors"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Ended waits for every child that has ended, and for none that has not. A
// process that calls it must not wait for children of its own elsewhere.
func Ended() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
	}
}

// Forever is Ended whenever a child ends. It does not return.
func Forever() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	for range c {
		Ended()
	}
}
