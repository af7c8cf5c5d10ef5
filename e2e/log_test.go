package e2e

import (
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
)

// trio is the set-up with the log on a host of its own.
func (w *world) trio() (redis *server, protect, standby, log *agent) {
	w.Helper()
	log = w.startLog()
	redis = w.startRedis(w.primary)
	standby = w.startStandby(w.standby, log.join)
	protect = w.protect(redis.PID(), log.join)
	return redis, protect, standby, log
}

// The log dies and comes back: clients wait meanwhile and lose nothing. Then a
// failure must find a log that is whole.
func TestLogDies(t *testing.T) {
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			redis, _, _, log := w.trio()
			l := w.startLoad(busy)
			w.checkpoint(w.primary, w.standby)
			w.somewhen(500 * time.Millisecond)
			log.kill()
			died := time.Now()
			s := w.untilStatus(w.primary, "the log has failed", func(s control.Status) bool { return s.Log.State == control.LogFailed })
			if s.Protected || s.Reason == "" {
				t.Errorf("status without a log: protected %v, reason %q", s.Protected, s.Reason)
			}
			if l.now().Oldest.After(died) {
				t.Error("every client had answers to requests made after the log's death")
			}
			if again := w.startLog(); again.join != log.join {
				t.Error("the log server came back with another join string")
			}
			l.past(died)
			w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
			w.checkpoint(w.primary, w.standby)
			w.somewhen(500 * time.Millisecond)
			d.do(w, redis)
			failed := time.Now()
			w.takenOver(w.standby, 0)
			l.past(failed)
			l.finish()
		})
	}
}

// The log's disk fills up: clients wait, status says so, and when there is room
// again they go on.
func TestLogFull(t *testing.T) {
	w := newWorld(t)
	dir := w.logHost.Dir() + "/state"
	run := func(args ...string) {
		t.Helper()
		if out, err := w.logHost.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	run("mkdir", "-p", dir)
	run("mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", dir)
	t.Cleanup(func() { _ = w.logHost.Command("umount", "-l", dir).Run() })
	redis, _, _, log := w.trio()
	k := w.dial()
	w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected }) // a standby does not begin with a log that is full
	// All but so much that a few generations fit.
	run("sh", "-c", "fallocate -l $(($(df -B1 --output=avail "+dir+" | tail -1) - 24000000)) "+dir+"/ballast")
	value := noise(w.seed, 48<<20)
	up := k.upload("much", value, 0)
	w.untilStatus(w.primary, "the log has failed", func(s control.Status) bool { return s.Log.State == control.LogFailed })
	w.unharmed(redis)
	run("rm", dir+"/ballast")
	log.kill() // a disk that was full is looked at again at the next start
	w.startLog()
	w.check(<-up.done, k.get("much", value))
	w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	w.takenOver(w.standby, 0)
	w.check(k.get("much", value))
}
