package capsule

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestWindows(t *testing.T) {
	for _, c := range []struct {
		taken     []int
		low, high int
	}{
		{nil, 101, 30000},
		{[]int{30000, 100, 102}, 103, 27232},
		{[]int{2870, 101}, 102, 30000},
		{[]int{32767}, 101, 29999},
	} {
		if got, ok := lowWindow(c.taken, 32768, 2768); got != c.low || !ok {
			t.Errorf("lowWindow(%v) = %d, %v; want %d", c.taken, got, ok, c.low)
		}
		if got, ok := highWindow(c.taken, 32768, 2768); got != c.high || !ok {
			t.Errorf("highWindow(%v) = %d, %v; want %d", c.taken, got, ok, c.high)
		}
	}
}

// A window never holds a taken PID, never leaves the range, and is found
// exactly when there is one.
func TestWindowsAgainstSearch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pidMax := rapid.IntRange(1, 400).Draw(t, "pidMax")
		n := rapid.IntRange(1, 60).Draw(t, "n")
		taken := rapid.SliceOfN(rapid.IntRange(1, 400), 0, 12).Draw(t, "taken")
		var all []int
		for f := firstPID; f+n <= pidMax; f++ {
			if !slices.ContainsFunc(taken, func(p int) bool { return p >= f && p < f+n }) {
				all = append(all, f)
			}
		}
		low, lok := lowWindow(taken, pidMax, n)
		high, hok := highWindow(taken, pidMax, n)
		if lok != (len(all) > 0) || hok != (len(all) > 0) {
			t.Fatalf("found %v and %v, search found %d", lok, hok, len(all))
		}
		if lok && (low != all[0] || high != all[len(all)-1]) {
			t.Fatalf("got %d and %d, want %d and %d", low, high, all[0], all[len(all)-1])
		}
	})
}
