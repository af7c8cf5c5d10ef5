package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// kdatPath is where CRIU looks for what it found out about the kernel.
const kdatPath = "/run/criu.kdat"

// maxKdat bounds the cache, which has about a kilobyte.
const maxKdat = 64 << 10

// Warm makes CRIU's cache of kernel features, without which every dump and
// restore spends 30 to 100 ms on finding them out again. CRIU writes the cache
// on tmpfs only, gives up for good where a killed one left a temporary file, and
// believes it whatever kernel it is of; so it is made on a private tmpfs, once
// per boot. Dump and Restore call Warm themselves; a standby that is going to be in
// a hurry calls it early.
func (c Criu) Warm(ctx context.Context) error {
	boot, err := bootTime()
	if err != nil {
		return fmt.Errorf("warm criu: %w", err)
	}
	if info, err := os.Stat(kdatPath); err == nil && info.ModTime().After(boot) && info.Size() > 0 {
		return nil
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c",
		`mount -t tmpfs tmpfs /run && "$1" check >/dev/null 2>&1; cat /run/criu.kdat`, "sh", c.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	b, err := cmd.Output()
	if err != nil || len(b) == 0 || len(b) > maxKdat {
		return fmt.Errorf("warm criu: it made no cache: %w", errors.Join(err, ctx.Err()))
	}
	tmp, err := os.CreateTemp("/run", "ftckpt-kdat-")
	if err != nil {
		return fmt.Errorf("warm criu: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err != nil {
		return fmt.Errorf("warm criu: %w", err)
	}
	if err := os.Rename(tmp.Name(), kdatPath); err != nil {
		return fmt.Errorf("warm criu: %w", err)
	}
	return nil
}

// bootTime is when this kernel started, by its own clocks.
func bootTime() (time.Time, error) {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}, fmt.Errorf("read clock: %w", err)
	}
	return time.Now().Add(-time.Duration(up.Nano())), nil
}
