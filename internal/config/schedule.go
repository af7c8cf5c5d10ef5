package config

import (
	"fmt"
	"time"

	"github.com/robfig/cron/v3"

	"github.com/ftckpt/ftckpt/internal/pace"
)

// ParseSchedule reads a cron expression of five fields (crontab(5)), or one such
// as @daily or @every 90s, in this host's time zone unless it begins with
// CRON_TZ=ZONE. It is nil for "". A schedule that never comes, as the 30th of
// February, is an error.
func ParseSchedule(s string) (pace.Schedule, error) {
	if s == "" {
		return nil, nil //nolint:nilnil // no schedule, and nothing wrong with that
	}
	if len(s) > MaxSchedule {
		return nil, fmt.Errorf("%d octets: want at most %d", len(s), MaxSchedule)
	}
	c, err := cron.ParseStandard(s)
	if err != nil {
		return nil, fmt.Errorf("%q is no cron expression: %w", s, err)
	}
	if c.Next(time.Now()).IsZero() {
		return nil, fmt.Errorf("%q never comes", s)
	}
	return c, nil
}
