package e2e

import (
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// The primary's agent dies and a standby is there: nothing more leaves, and the
// standby takes over as for a dead host.
func TestAgentDiesWithStandby(t *testing.T) {
	w := newWorld(t)
	redis, protect, standby := w.pair()
	l := w.startLoad(busy)
	w.checkpoint(w.primary, w.standby)
	w.somewhen(time.Second)
	protect.kill()
	died := time.Now()
	w.takenOver(w.standby, 0)
	l.past(died)
	w.unharmed(redis)

	// Its owner, or systemd, starts the agent again: it must not win the service
	// back, and the old server must stay silent.
	again := w.tryProtect(redis.PID(), standby.join)
	again.exits(exitcode.Fenced)
	again.complaint()
	w.gone(w.primary)
	l.past(time.Now())
	w.check(w.dial().ask("a new connection finds the new primary"))
	l.finish()
	w.silent(w.primary, died.Add(time.Millisecond))
}

// There is no standby: connections stall until the agent is started again, and
// then go on.
func TestAgentDiesAlone(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	protect := w.protect(redis.PID(), log.join)
	l := w.startLoad(busy)
	w.checkpoint(w.primary, nil)
	idle := w.dial()
	for range runs(t) {
		w.somewhen(500 * time.Millisecond)
		protect.kill()
		died := time.Now()
		w.unharmed(redis)
		time.Sleep(300 * time.Millisecond) // of silence, to be looked at below
		w.silentBetween(died, time.Now())
		protect = w.protect(redis.PID(), log.join)
		l.past(died)
		w.check(idle.quiet(), idle.ask("hello again"))
	}
	l.finish()
}

// The agent is killed at some moment of a dump. The server must not be left
// frozen, nor traced, nor with foreign code in it.
func TestAgentDiesInADump(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	protect := w.protect(redis.PID(), log.join, "--interval", "0")
	l := w.startLoad(loadgen.Config{Redis: 4, Half: 1, PaceUS: 2000})
	pause := time.Duration(w.checkpoint(w.primary, nil).PauseUS) * time.Microsecond
	for range 2 * runs(t) {
		asked := make(chan struct{})
		cmd := w.primary.Command(ftckpt, "checkpoint")
		w.must(cmd.Start())
		go func() {
			_ = cmd.Wait() // it fails when its daemon dies, or does not
			close(asked)
		}()
		// The program's start, CRIU's start and the pause.
		w.somewhen(150*time.Millisecond + 2*pause)
		protect.kill()
		died := time.Now()
		<-asked
		w.unharmed(redis)
		protect = w.protect(redis.PID(), log.join, "--interval", "0")
		l.past(died)
	}
	l.finish()
}

// silentBetween fails the test if the primary's host spoke for the service at
// that time.
func (w *world) silentBetween(from, to time.Time) {
	w.Helper()
	for _, f := range w.spokeAsVIP(w.primary, from.Add(time.Millisecond)) {
		if f.at.Before(to) {
			w.Errorf("the primary spoke as the service %v after its agent's death: %s", f.at.Sub(from), f.text)
		}
	}
}
