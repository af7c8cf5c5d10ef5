package e2e

import (
	"testing"

	"github.com/ftckpt/ftckpt/internal/control"
)

// Generations come by a cron expression, and sooner when there would be too much
// to replay.
func TestSchedule(t *testing.T) {
	for name, args := range map[string][]string{
		"cron": {"--schedule", "@every 1s", "--max-replay", "0"},
		"load": {"--interval", "0", "--max-replay", "100ms"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "")
			w.protect(redis.PID(), standby.join, args...)
			l := w.startLoad(busy)
			first := w.untilStatus(w.primary, "it has a generation", func(s control.Status) bool { return s.Generation.ID > 0 })
			w.untilStatus(w.primary, "two more come", func(s control.Status) bool { return s.Generation.ID >= first.Generation.ID+2 })
			l.finish()
		})
	}
}
