package checkpoint

import "time"

// OuterPID lets tests find a sandbox's processes.
var OuterPID = outerPID

// SetCancelGrace shortens the patience with a CRIU that hangs.
func SetCancelGrace(d time.Duration) (restore func()) {
	old := cancelGrace
	cancelGrace = d
	return func() { cancelGrace = old }
}
