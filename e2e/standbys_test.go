package e2e

import (
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// Of several standbys one takes over; the other follows it, and takes over from
// it in turn.
func TestTwoStandbys(t *testing.T) {
	w := newWorld(t)
	redis, _, _, log := w.trio()
	w.startStandby(w.logHost, log.join)
	l := w.startLoad(busy)
	idle := w.dial()
	w.untilStatus(w.primary, "it has two standbys", func(s control.Status) bool { return len(s.Standbys) == 2 })
	w.checkpoint(w.primary, w.standby)
	w.checkpoint(w.primary, w.logHost)
	w.somewhen(500 * time.Millisecond)

	redis.kill(w)
	died := time.Now()
	winner, other := w.successor(w.standby, w.logHost)
	l.past(died)
	w.check(idle.quiet(), idle.ask("one of two"))
	s, ok := w.status(other)
	if !ok || s.Role != control.RoleStandby || s.Epoch != 2 {
		t.Errorf("status of the one that did not win: %+v", s)
	}
	w.checkpoint(winner, other)
	if winner == w.logHost {
		l.finish()
		return // the log dies with it, and that is another test
	}
	w.must(winner.Kill())
	died = time.Now()
	if s := w.takenOver(other, 0); s.Epoch != 3 {
		t.Errorf("epoch %d after two takeovers, want 3", s.Epoch)
	}
	l.past(died)
	w.check(idle.quiet(), idle.ask("the other one"))
	l.finish()
}

// successor waits until one of two standbys is the primary, and sees to it that
// the other is not.
func (w *world) successor(a, b *lab.Host) (winner, other *lab.Host) {
	w.Helper()
	w.until("one of the standbys is the primary", func() bool {
		for _, h := range []*lab.Host{a, b} {
			if s, ok := w.status(h); ok && s.Role == control.RolePrimary {
				winner = h
			}
		}
		return winner != nil
	})
	if other = a; winner == a {
		other = b
	}
	w.takenOver(winner, 0)
	w.untilStatus(other, "it follows the new primary", func(s control.Status) bool { return s.Role == control.RoleStandby && s.Epoch == 2 })
	return winner, other
}
