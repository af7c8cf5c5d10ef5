package stream

import (
	"time"

	"golang.org/x/sys/unix"
)

// nap sleeps for less than a millisecond, which is the finest that the runtime's
// timers can do on an idle processor.
func nap(d time.Duration) {
	if d > 0 {
		t := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&t, nil) // too short a nap does no harm
	}
}
