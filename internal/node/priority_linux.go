package node

import (
	"log/slog"
	"runtime"

	"golang.org/x/sys/unix"
)

// ahead gives the calling goroutine a thread of its own that runs before
// ordinary ones: every packet of the service waits for it, and on a busy host
// it would queue behind the very server it serves. It lasts for the goroutine's
// life; threads and processes started elsewhere do not inherit it.
func ahead(log *slog.Logger) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20); err != nil {
		log.Debug("run the packet thread ahead of others", "err", err) // slower on a busy host, no less right
	}
}
