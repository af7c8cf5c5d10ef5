package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// The primary lives, its link does not: the standby takes over, and when the
// link is back the old primary has nothing to say any more.
func TestPartition(t *testing.T) {
	w := newWorld(t)
	redis, protect, _ := w.pair()
	l := w.startLoad(busy)
	w.checkpoint(w.primary, w.standby)
	w.somewhen(time.Second)

	w.must(w.primary.CutLink())
	cut := time.Now()
	w.takenOver(w.standby, 0)
	l.past(cut)
	// As long as nobody has told it, the old primary knows no better.
	if s, ok := w.status(w.primary); !ok || s.Protected || s.Role != control.RolePrimary && s.Role != control.RoleFenced {
		t.Errorf("status of a primary that is cut off: %+v", s)
	}
	w.unharmed(redis)

	w.must(w.primary.RestoreLink())
	protect.exits(exitcode.Fenced)
	if !strings.Contains(protect.complaint(), "fenced") {
		t.Errorf("complaint: %s", protect.complaint())
	}
	l.past(time.Now())
	l.finish()
	w.silent(w.primary, cut)
	w.gone(w.primary)
	w.stopped(redis) // it must not go on doing what its successor does
	if conns := w.connections(w.primary); len(conns) != 0 {
		t.Errorf("the old server still has connections: %q", conns)
	}
}

// gone fails the test if a host still has the VIP or rules for it.
func (w *world) gone(h *lab.Host) {
	w.Helper()
	if r := w.rules(h); len(r) != 0 {
		w.Errorf("%s still has rules: %q", h.Name(), r)
	}
	if w.hasVIP(h) {
		w.Errorf("%s still has the address %s", h.Name(), vip)
	}
}

// hasVIP reports whether the service's address is one of a host's.
func (w *world) hasVIP(h *lab.Host) bool {
	w.Helper()
	out, err := h.Command("ip", "-o", "addr").Output()
	w.must(err)
	return strings.Contains(string(out), vip+"/")
}

// connections lists the TCP connections of the service on a host.
func (w *world) connections(h *lab.Host) []string {
	w.Helper()
	out, err := h.Command("ss", "-Htan", "state", "connected", "src", vip).Output()
	w.must(err)
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' })
}

// The standby is cut off, and the log with it: the primary can make nothing
// stable, so clients wait. It must not be fenced by someone who reaches nobody.
func TestStandbyCutOff(t *testing.T) {
	w := newWorld(t)
	redis, protect, _ := w.pair()
	l := w.startLoad(busy)
	idle := w.dial()
	w.checkpoint(w.primary, w.standby)
	w.somewhen(time.Second)

	w.must(w.standby.CutLink())
	cut := time.Now()
	w.untilStatus(w.primary, "its log has failed", func(s control.Status) bool { return s.Log.State == control.LogFailed && !s.Protected })
	for time.Since(cut) < 2*time.Second {
		if s, ok := w.status(w.standby); !ok || s.Role != control.RoleStandby {
			t.Fatalf("the standby, cut off, is %q", s.Role)
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.must(w.standby.RestoreLink())
	l.past(time.Now())
	w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected && s.Epoch == 1 })
	w.check(idle.quiet(), idle.ask("still here"))
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0)
	protect.exits(exitcode.Failed)
	l.past(died)
	w.check(idle.quiet(), idle.ask("and still"))
	l.finish()
}

// The network between the hosts fails without a sign of it on any link.
func TestSilentPartition(t *testing.T) {
	for _, side := range []string{"primary", "standby"} {
		t.Run(side, func(t *testing.T) {
			w := newWorld(t)
			redis, protect, _ := w.pair()
			l := w.startLoad(busy)
			idle := w.dial()
			w.checkpoint(w.primary, w.standby)
			w.somewhen(time.Second)

			h := w.lab.Host(side)
			w.must(h.Loss(100))
			lost := time.Now()
			w.takenOver(w.standby, 0)
			if side == "primary" {
				l.past(lost)
			}
			w.must(h.Loss(0))
			healed := time.Now()
			l.past(healed)
			protect.exits(exitcode.Fenced)
			w.check(idle.quiet(), idle.ask("still here"), w.dial().ask("a new one"))
			if r := l.finish(); r.StallUS > 10_000_000 {
				t.Errorf("a client waited %d ms, although the network was away for a moment", r.StallUS/1000)
			}
			if side == "primary" {
				w.silent(w.primary, healed) // what was lost before reached nobody
			}
			w.gone(w.primary)
			w.stopped(redis)
		})
	}
}
