package node

import (
	"bytes"
	"log/slog"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// enoughFiles is a limit that is not worth a warning.
const enoughFiles = 16384

// raiseLimits lets this process, and the CRIU it starts, have as many open files
// as the kernel allows any: a service has one for each connection, and whoever
// dumps or restores it has them all.
func raiseLimits(log *slog.Logger) {
	b, err := os.ReadFile("/proc/sys/fs/nr_open")
	if err != nil {
		log.Debug("read the limit of open files", "err", err)
		return
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return
	}
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &now) == nil && now.Cur >= n {
		return
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: max(n, now.Max)}); err != nil && now.Cur < enoughFiles {
		log.Warn("raise the limit of open files (needs CAP_SYS_RESOURCE): a service of more connections than that may not be dumped or restored", "have", now.Cur, "err", err)
	}
}
