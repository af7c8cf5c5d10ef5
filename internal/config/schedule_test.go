package config

import (
	"strings"
	"testing"
	"time"
)

func TestParseSchedule(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"CRON_TZ=UTC 30 2 * * *": time.Date(2026, 11, 22, 2, 30, 0, 0, time.UTC),
		"@every 90s":             at.Add(90 * time.Second),
	} {
		p, err := ParseSchedule(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if got := p.Next(at); !got.Equal(want) {
			t.Errorf("%q: after %v comes %v, want %v", s, at, got, want)
		}
	}
	for s, want := range map[string]string{
		"30 2":                    "is no cron expression",
		"0 0 30 2 *":              "never comes",
		strings.Repeat("1,", 300): "600 octets",
	} {
		if _, err := ParseSchedule(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", s, err, want)
		}
	}
	if p, err := ParseSchedule(""); p != nil || err != nil {
		t.Errorf("none: %v, %v", p, err)
	}
}
