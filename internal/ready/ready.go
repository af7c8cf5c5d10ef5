// Package ready tells whoever started a daemon that it has come up: one line
// on standard output for a person or a script, READY=1 for systemd.
package ready

import (
	"fmt"
	"io"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Announce writes line to out and, when a systemd unit of Type=notify started
// us, says READY=1 with that status. It is for the first time only; later
// changes are for Status. The two texts are apart because line may be a
// secret, which status must not be.
func Announce(out io.Writer, line, status string) error {
	if _, err := fmt.Fprintln(out, line); err != nil {
		return fmt.Errorf("announce readiness: %w", err)
	}
	return notify(daemon.SdNotifyReady + "\nSTATUS=" + status)
}

// Status shows line in "systemctl status"; without systemd it does nothing.
func Status(line string) error { return notify("STATUS=" + line) }

// Stopping tells systemd that the daemon is on its way out.
func Stopping() error { return notify(daemon.SdNotifyStopping) }

func notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}
