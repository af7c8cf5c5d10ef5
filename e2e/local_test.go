package e2e

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// The host lives: a server that dies is restored where it died, again and again,
// and its clients notice as little as of a takeover. One that dies too often is
// left to a standby.
func TestRestoredOnItsOwnHost(t *testing.T) {
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	protect := w.protect(redis.PID(), "", "--on-crash", "local", "--log", "embed://127.0.0.1:4222")
	l := w.startLoad(busy)
	idle := w.dial()
	w.checkpoint(w.primary, nil)

	w.somewhen(500 * time.Millisecond)
	redis.kill(w)
	died := time.Now()
	for n := 1; n <= 3; n++ {
		s := w.untilStatus(w.primary, "the server is back", func(s control.Status) bool {
			return s.Role == control.RolePrimary && s.Epoch == uint64(n+1)
		})
		w.takenOver(w.primary, 0)
		l.past(died)
		w.check(idle.quiet(), idle.ask("life "+strconv.Itoa(n)))
		if n == 3 {
			l.finish()
		}
		w.checkpoint(w.primary, nil)
		out, err := w.primary.Command("kill", "-9", strconv.Itoa(s.PID)).CombinedOutput()
		if died = time.Now(); err != nil {
			t.Fatalf("kill the restored server: %v: %s", err, out)
		}
	}
	protect.exits(exitcode.Failed)
	if c := protect.complaint(); !strings.Contains(c, "the server has died 4 times within 1m0s") {
		t.Errorf("complaint: %s", c)
	}
}

// With a standby elsewhere, too: it leaves the server's death to the server's own
// host, and takes over when that dies.
func TestRestoredOnItsOwnHostFirst(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	w.startStandby(w.standby, log.join)
	w.protect(redis.PID(), log.join, "--on-crash", "local")
	l := w.startLoad(busy)
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	died := time.Now()
	w.untilStatus(w.primary, "the server is back", func(s control.Status) bool { return s.Epoch == 2 && s.Role == control.RolePrimary })
	w.takenOver(w.primary, 0)
	l.past(died)
	w.untilStatus(w.standby, "it follows", func(s control.Status) bool { return s.Role == control.RoleStandby && s.Epoch == 2 })
	w.checkpoint(w.primary, w.standby)
	w.must(w.primary.Kill())
	died = time.Now()
	if s := w.takenOver(w.standby, 0); s.Epoch != 3 {
		t.Errorf("epoch %d after the host's death, want 3", s.Epoch)
	}
	l.past(died)
	l.finish()
}
