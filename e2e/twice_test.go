package e2e

import (
	"strconv"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// The service survives a second failure on the same sockets: the first primary's
// host, cleaned by its own agent, stands by for the new primary.
func TestSecondFailure(t *testing.T) {
	for _, second := range []string{"process", "host"} {
		t.Run(second, func(t *testing.T) {
			w := newWorld(t)
			redis, protect, _, log := w.trio()
			l := w.startLoad(busy)
			idle := w.dial()
			w.checkpoint(w.primary, w.standby)
			w.somewhen(500 * time.Millisecond)
			redis.kill(w)
			died := time.Now()
			s := w.takenOver(w.standby, 0)
			l.past(died)
			protect.exits(exitcode.Failed)
			w.gone(w.primary)

			w.startStandby(w.primary, log.join)
			w.untilStatus(w.standby, "the new primary is protected", func(s control.Status) bool { return s.Protected })
			w.checkpoint(w.standby, w.primary)
			w.somewhen(500 * time.Millisecond)
			if second == "host" {
				w.must(w.standby.Kill())
			} else if out, err := w.standby.Command("kill", "-9", strconv.Itoa(s.PID)).CombinedOutput(); err != nil {
				t.Fatalf("kill the restored server: %v: %s", err, out)
			}
			died = time.Now()
			if s = w.takenOver(w.primary, 0); s.Epoch != 3 {
				t.Errorf("epoch %d after two takeovers, want 3", s.Epoch)
			}
			l.past(died)
			w.check(idle.quiet(), idle.ask("twice"))
			l.finish()
		})
	}
}

// The agent of a service that was taken over dies, too, and is started again.
func TestAgentDiesAfterTakeover(t *testing.T) {
	w := newWorld(t)
	redis, _, standby, log := w.trio()
	l := w.startLoad(busy)
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0)
	l.past(died)

	standby.kill()
	died = time.Now()
	w.startStandby(w.standby, log.join)
	w.untilStatus(w.standby, "it is the primary again", func(s control.Status) bool {
		return s.Role == control.RolePrimary && s.Generation.ID > 0
	})
	l.past(died)
	l.finish()
}
