package sim

import (
	"os"
	"strconv"
	"testing"
	"time"
)

// seconds is how long TestPromises runs; FTCKPT_SIM_SECONDS sets it.
func seconds(t *testing.T) time.Duration {
	s := os.Getenv("FTCKPT_SIM_SECONDS")
	if s == "" {
		return 5 * time.Second
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("FTCKPT_SIM_SECONDS: %v", err)
	}
	return time.Duration(n) * time.Second
}

// Whatever happens, the promises are kept. Each run has other seeds; the one that
// fails is printed, and replays with make sim SEED=n ONE=1.
func TestPromises(t *testing.T) {
	seed := uint64(time.Now().UnixNano()) >> 16
	first, takeovers := seed, 0
	for begin := time.Now(); time.Since(begin) < seconds(t); seed++ {
		s := Generate(seed)
		out := Run(s, nil)
		takeovers += out.Takeovers
		if v := out.Violation; v != nil {
			short := Shrink(s, v.Promise, 1000)
			t.Logf("the shortest found:\n%s", short)
			Run(short, func(line string) { t.Log(line) })
			t.Fatalf("seed %d: %v", seed, v)
		}
	}
	t.Logf("%d schedules from seed %d on, %d takeovers", seed-first, first, takeovers)
	if takeovers == 0 {
		t.Error("nobody ever took over")
	}
}

// The same seed is the same schedule, to the last word.
func TestDeterministic(t *testing.T) {
	for seed := range uint64(60) {
		var a, b []string
		x := Run(Generate(seed), func(s string) { a = append(a, s) })
		y := Run(Generate(seed), func(s string) { b = append(b, s) })
		if x.Takeovers != y.Takeovers || x.Lost != y.Lost || len(a) != len(b) {
			t.Fatalf("seed %d: %+v and %d lines, then %+v and %d lines", seed, x, len(a), y, len(b))
		}
		for i := range a {
			if a[i] != b[i] {
				t.Fatalf("seed %d, line %d:\n%s\n%s", seed, i, a[i], b[i])
			}
		}
	}
}
