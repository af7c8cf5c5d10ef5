package e2e

import (
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// crowdSize is how many connections TestManyConnections has.
func crowdSize(t *testing.T) int {
	s := os.Getenv("FTCKPT_E2E_CONNECTIONS")
	if s == "" {
		return 600
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 100 {
		t.Fatalf("FTCKPT_E2E_CONNECTIONS: want a number from 100 on, not %q", s)
	}
	return n
}

// Hundreds of connections, most of them idle, survive the host's death: those of
// the generation, and others younger than it.
func TestManyConnections(t *testing.T) {
	n := crowdSize(t)
	active, young := n/20, n/10
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, "")
	w.protect(redis.PID(), standby.join, "--interval", "1h")
	l := w.startLoad(loadgen.Config{
		Redis: active, Sleep: n - active - young, MaxSamples: 2,
		PaceUS: int64(active) * 1000, // a thousand requests a second, whatever the number
	})
	w.checkpoint(w.primary, w.standby)
	late := w.startLoad(loadgen.Config{Sleep: young})
	w.somewhen(500 * time.Millisecond)
	w.must(w.primary.Kill())
	died := time.Now()
	if s := w.takenOver(w.standby, 0); s.Takeover.Connections != n {
		t.Errorf("status: %d connections carried over, want %d", s.Takeover.Connections, n)
	}
	l.past(died)
	w.checkpoint(w.standby, nil) // the new primary goes on with all of them
	l.finish()
	late.finish()
}
