package e2e

import (
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// translated is how many connections a host translates.
func (w *world) translated(h *lab.Host) (n int) {
	w.Helper()
	w.untilStatus(h, "it answers", func(s control.Status) bool { n = s.Translated; return true })
	return n
}

// Connections whose numbers are translated survive whatever others do: the death
// of the agent that translates, a generation, and a second takeover, which makes
// young ones of its own.
func TestTranslatedTwice(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, log.join, "--recreate", "translate")
	w.protect(redis.PID(), log.join, "--interval", "1h")
	w.untilStatus(w.standby, "it has a generation", func(s control.Status) bool { return s.Generation.ID > 0 && s.Recreate == "translate" })
	l := w.startLoad(busy) // all of it is younger than the generation
	idle, talker := w.dial(), w.dial()
	churn := w.startChurn(2)
	w.must(talker.send(command("SET", "young", longName("talk", 20_000))))
	w.must(talker.expect([]byte("+OK\r\n")))
	w.somewhen(500 * time.Millisecond)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0)
	l.past(died)
	if n := w.translated(w.standby); n < 16 {
		t.Errorf("%d connections are translated, want 16 at least", n)
	}
	w.check(idle.quiet(), idle.ask("once"), talker.get("young", []byte(longName("talk", 20_000))))

	standby.kill()
	died = time.Now()
	w.startStandby(w.standby, log.join, "--recreate", "translate")
	w.untilStatus(w.standby, "it is the primary again", func(s control.Status) bool {
		return s.Role == control.RolePrimary && s.Generation.ID > 1
	})
	l.past(died)
	if n := w.translated(w.standby); n < 16 {
		t.Errorf("%d connections are translated by the agent that was started again, want 16 at least", n)
	}
	w.check(idle.ask("the agent is back"))

	w.gone(w.primary)
	w.startStandby(w.primary, log.join, "--recreate", "translate")
	w.untilStatus(w.standby, "the new primary is protected", func(s control.Status) bool { return s.Protected })
	w.checkpoint(w.standby, w.primary)
	late := w.dial()
	w.somewhen(500 * time.Millisecond)
	w.must(w.standby.Kill())
	died = time.Now()
	w.takenOver(w.primary, 0)
	l.past(died)
	// Those of before have their clients' numbers in TCP itself now.
	if n := w.translated(w.primary); n < 1 || n > 15 {
		t.Errorf("%d connections are translated, want the youngest alone", n)
	}
	w.check(idle.quiet(), idle.ask("twice"), late.quiet(), late.ask("young twice"), talker.get("young", []byte(longName("talk", 20_000))))
	w.checkpoint(w.primary, nil)
	w.check(late.ask("and after another generation"))
	l.finish()
	churn.finish(died)
}
