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
	w.unharmed(redis) // what it does from here on is its owner's business
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
