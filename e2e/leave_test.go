package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// Protection ends and begins again under load, and nobody notices.
func TestProtectEndsAndBeginsAgain(t *testing.T) {
	w := newWorld(t)
	redis, protect, standby := w.pair()
	l := w.startLoad(busy)
	idle := w.dial()
	w.checkpoint(w.primary, w.standby)

	protect.stop()
	protect.exits(exitcode.OK)
	ended := time.Now()
	if r := w.rules(w.primary); len(r) != 0 {
		t.Errorf("rules are left: %q", r)
	}
	w.unharmed(redis)
	l.past(ended)
	// Five times the silence after which a primary that had died is replaced.
	for time.Since(ended) < time.Second {
		if s, ok := w.status(w.standby); ok && s.Role != control.RoleStandby {
			t.Fatalf("the standby is %s, although protection ended on purpose", s.Role)
		}
		time.Sleep(50 * time.Millisecond)
	}

	w.protect(redis.PID(), standby.join)
	w.checkpoint(w.primary, w.standby)
	w.somewhen(500 * time.Millisecond)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0)
	w.check(idle.quiet(), idle.ask("all the time"))
	l.past(died)
	l.finish()
}

// The standby may go and come back, too.
func TestStandbyComesBack(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, log.join)
	w.protect(redis.PID(), log.join)
	l := w.startLoad(busy)
	w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
	standby.kill()
	w.untilStatus(w.primary, "it is unprotected", func(s control.Status) bool { return !s.Protected && len(s.Standbys) == 0 })
	l.past(time.Now()) // the log is elsewhere: the service goes on
	w.startStandby(w.standby, log.join)
	w.untilStatus(w.primary, "it is protected again", func(s control.Status) bool { return s.Protected })
	w.checkpoint(w.primary, w.standby)
	w.must(w.primary.Kill())
	died := time.Now()
	w.takenOver(w.standby, 0)
	l.past(died)
	l.finish()
}

// Protection ended, the server went on with what no log has, and protection has
// begun again without a generation of its own yet: a failure now must not bring
// back the past.
func TestNoTakeoverFromThePast(t *testing.T) {
	w := newWorld(t)
	set := w.fakeCRIU()
	redis, protect, standby := w.pair()
	k := w.dial()
	w.must(k.ask("one"))
	protect.stop()
	w.must(k.send(command("SET", "unlogged", "yes")))
	w.must(k.expect([]byte("+OK\r\n")))

	set("refuse")
	again := w.tryProtect(redis.PID(), standby.join)
	w.untilStatus(w.primary, "it tries in vain", func(s control.Status) bool { return strings.Contains(s.Reason, "no generation yet: ") })
	if s, ok := w.status(w.standby); !ok || s.Protected || s.Reason == "" {
		t.Errorf("status of the standby: %+v", s)
	}
	again.kill()
	for died := time.Now(); time.Since(died) < 2*time.Second; time.Sleep(50 * time.Millisecond) {
		if s, ok := w.status(w.standby); !ok || s.Role != control.RoleStandby {
			t.Fatalf("status of the standby: %+v", s)
		}
	}
	set("work")
	w.protect(redis.PID(), standby.join)
	w.check(k.get("unlogged", []byte("yes")))
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	w.takenOver(w.standby, 0)
	w.check(k.get("unlogged", []byte("yes")))
}

// A server that ends because its users want it to (exit status 0) has ended:
// clients hear of it from its TCP, and no standby brings it back.
func TestServerEndsByItself(t *testing.T) {
	for _, where := range []string{"primary", "capsule"} {
		t.Run(where, func(t *testing.T) {
			w := newWorld(t)
			_, ends, standby, log := w.trio()
			w.checkpoint(w.primary, w.standby)
			other := w.standby
			if where == "capsule" {
				w.failover(w.primary)
				w.takenOver(w.standby, 0)
				ends.exits(exitcode.OK)
				w.startStandby(w.primary, log.join)
				ends, other = standby, w.primary
				w.untilStatus(w.standby, "the new primary is protected", func(s control.Status) bool { return s.Protected })
			}
			idle, k := w.dial(), w.dial()
			w.must(k.send(command("SHUTDOWN", "NOSAVE")))
			asked := time.Now()
			w.check(idle.ends(), k.ends())
			ends.exits(exitcode.OK)
			if !strings.Contains(ends.said(), "the server has ended by itself") {
				t.Errorf("the agent does not say why it ended: %s", ends.said())
			}
			for time.Since(asked) < time.Second { // five times the silence of a dead primary
				if s, ok := w.status(other); !ok || s.Role != control.RoleStandby || s.Reason != "the primary ended protection on purpose" {
					t.Fatalf("status of the standby: %+v", s)
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
}
