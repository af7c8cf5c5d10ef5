package capsule

import "slices"

const (
	// firstPID is where helpers' PIDs may begin. The kernel never goes back
	// below 300 by itself (RESERVED_PIDS), so the lowest PIDs belong to what was
	// started first in the service's own namespace.
	firstPID = 101
	// helperPIDs is how many PIDs in a row helpers get before they could meet one
	// of an image. A restore uses a few dozen besides the image's own.
	helperPIDs = 1024
)

// lowWindow returns the lowest PID of a run of n PIDs in [firstPID, pidMax)
// that holds none of taken.
func lowWindow(taken []int, pidMax, n int) (first int, ok bool) {
	taken = slices.Sorted(slices.Values(taken))
	first = firstPID
	for _, p := range taken {
		if p >= first && p < first+n {
			first = p + 1
		}
	}
	return first, first+n <= pidMax
}

// highWindow is lowWindow from the other end.
func highWindow(taken []int, pidMax, n int) (first int, ok bool) {
	taken = slices.Sorted(slices.Values(taken))
	first = pidMax - n
	for _, p := range slices.Backward(taken) {
		if p >= first && p < first+n {
			first = p - n
		}
	}
	return first, first >= firstPID
}
