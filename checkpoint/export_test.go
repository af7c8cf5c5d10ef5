package checkpoint

import "time"

// SetCancelGrace shortens the patience with a CRIU that hangs.
func SetCancelGrace(d time.Duration) (restore func()) {
	old := cancelGrace
	cancelGrace = d
	return func() { cancelGrace = old }
}
